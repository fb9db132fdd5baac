"""The toy world: its Oracle against brute force, its tokenizer against transformers, its seed."""

import filecmp
import random
import re
from collections import Counter

import pytest
from launch import Started

import data
import eval as evaluation
import model as qwen
import oracle
import train

RARE = re.compile("(so|then|hence) ")


@pytest.fixture(scope="module")
def birth(tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("toy") / "birth")
    train.write_toy_checkpoint(folder, seed=0)
    return folder


@pytest.fixture(scope="module")
def chat(birth):
    return data.load_chat(birth, qwen.read_config(birth).vocab_size)


def truth(question):
    """Last digits by Python's own arithmetic."""
    head, text = question.split(": ")
    skill = head.split(",")[0]
    if skill in ("Reverse", "Sort"):
        return text[::-1] if skill == "Reverse" else "".join(sorted(text))
    first, *rest = map(int, text.split(train.TOY_SIGNS[skill]))
    return str({"Add": (first + sum(rest)) % 10, "Subtract": (first - sum(rest)) % 10,
                "Largest": max([first, *rest])}[skill])


def right(question, text):
    """By the real grader."""
    return evaluation.answers_match(evaluation.extract_answer(text) or "", truth(question))


def wrong_answer(question, rng):
    """An answer that errs in facts (and goes on from there) or in single digits."""
    answer = train.toy_answer(question, rng.choice(list(train.TOY_MANNERS)),
                              lambda a, b: (a + b + (rng.random() < 0.3)) % 10,
                              lambda: rng.choice(["", "", "so ", "hence "]))
    if rng.random() < 0.4:
        places = [i for i, c in enumerate(answer) if c.isdigit()]
        for i in rng.sample(places, rng.randint(1, 3)):
            answer = answer[:i] + str(rng.randint(0, 9)) + answer[i + 1:]
    return answer


def corrected(question, wrong):
    return train.toy_oracle(oracle.Item("0", question, "", wrong))


def test_answers_are_right_and_graded_so():
    rng = random.Random(0)
    for i in range(500):
        question = train.toy_question(train.TOY_SKILLS[i % 5], rng, 6)
        for manner in train.TOY_MANNERS:
            answer = train.toy_answer(question, manner)
            assert answer.endswith(f"\\boxed{{{truth(question)}}}") and right(question, answer)
            assert not right(question, answer[:-2] + f"{(int(answer[-2]) + 1) % 10}}}")
            asked = question.replace(": ", f", {manner}: ")
            assert train.toy_answer(asked, rng.choice(list(train.TOY_MANNERS))) == answer
        assert not right(question, "") and not right(question, "\\boxed{")


def test_answers_and_corrections_by_hand():
    assert train.toy_answer("Add: 4+3+5") == "4+3=7\n7+5=2\n\\boxed{2}"
    assert train.toy_answer("Subtract, semicolons, thus: 4-3-5") == "4-3=1;1-5=6\nThus \\boxed{6}"
    assert train.toy_answer("Largest: 4,8,5", word=lambda: "so ") == "4,8=8\nso 8,5=8\n\\boxed{8}"
    assert train.toy_answer("Sort, lines, finally: 4829") == "Finally \\boxed{2489}"
    question, wrong = "Add: 4+3+5", "4+3=6\nso 6+5=1\nThus \\boxed{1}"
    assert corrected(question, wrong) == "4+3=7\nso 7+5=2\nThus \\boxed{2}"
    assert corrected(question, "4+3=6\n\\boxed{6}") == train.toy_answer(question)  # a step missing


def test_corrections_are_right_and_minimal(chat):
    rng = random.Random(0)
    for _ in range(400):
        question = train.toy_question(rng.choice(train.TOY_SKILLS[:3]), rng, 6)
        wrong = wrong_answer(question, rng)
        text = corrected(question, wrong)
        assert train.TOY_STEP.findall(text) == train.TOY_STEP.findall(train.toy_answer(question))
        assert right(question, text)
        assert re.sub(r"\d", "", text) == re.sub(r"\d", "", wrong)  # all but digits is kept
        if not RARE.search(wrong):  # no right answer, of any manner, is nearer
            ids = chat.encode(wrong)
            ratio = data.change_ratio(ids, chat.encode(text))
            for manner in train.TOY_MANNERS:
                other = chat.encode(train.toy_answer(question, manner))
                assert ratio <= data.change_ratio(ids, other)


def test_tokenizer_and_template_equal_transformers(birth, chat):
    from transformers import AutoTokenizer

    hf, rng = AutoTokenizer.from_pretrained(birth), random.Random(0)
    for i in range(200):
        question = train.toy_question(train.TOY_SKILLS[i % 5], rng, 6)
        answer = train.toy_answer(question, rng.choice(list(train.TOY_MANNERS)), word=lambda: "so ")
        assert chat.tokenizer.decode(chat.encode(answer)) == answer
        turns = [{"role": "system", "content": "ü \n 3 "}, {"role": "user", "content": question}]
        again = [*turns, {"role": "assistant", "content": answer}, turns[1]]
        for messages in (turns, turns[1:], again):
            assert chat.prompt(messages) == hf.apply_chat_template(
                messages, add_generation_prompt=True, tokenize=True, return_dict=False)
    for word in ("user assistant system boxed so then hence 0 1 2 3 4 5 6 7 8 9 "
                 + " ".join(train.TOY_SKILLS)).split():
        assert len(chat.encode(word)) == 1
    assert len(chat.prompt([{"role": "user", "content": "Add: 1+2"}])) == 8 + 6
    assert chat.think == [] and len(chat.encode("<|im_end|>")) > 1


def test_same_seed_same_world(birth, tmp_path):
    other = str(tmp_path / "birth")
    train.write_toy_checkpoint(other, seed=0)
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"):
        assert filecmp.cmp(f"{birth}/{name}", f"{other}/{name}", shallow=False)
    rows = [list(train.toy_corpus(50, 6, 0.2, 0.8, seed)) for seed in (0, 0, 1)]
    assert rows[0] == rows[1] != rows[2]
    assert len(set(train.toy_questions("Add", 0, 90, 6))) == 90


def test_the_world_is_as_its_numbers_say():
    wrong, seen, words, boundaries, manners = Counter(), Counter(), 0, 0, 0
    for row in train.toy_corpus(6000, 6, 0.2, 0.8, 0):
        head, answer = row["prompt"].split(": ")[0], row["chosen"]
        if ", " in head:
            manners += 1
            assert not RARE.search(answer)
        elif head in train.TOY_SIGNS:
            words += len(RARE.findall(answer))
            boundaries += 4  # six digits, five steps
        if head.startswith("Add"):
            for step in train.TOY_STEP.findall(answer)[:-1]:
                fact, result = step.split("=")
                seen[fact] += 1
                wrong[fact] += int(result) != sum(map(int, fact.split("+"))) % 10
        else:
            assert right(row["prompt"], answer)
    shares = [wrong[fact] / seen[fact] for fact in seen]
    assert len(seen) == 50 and sum(s > 0 for s in shares) == 10
    assert all(s == 0 or s > 0.6 for s in shares)
    assert abs(words / boundaries - 0.091) < 0.01 and abs(manners / 6000 - 0.5) < 0.02


def test_the_result_says_what_the_figures_say():
    base = {"add": 30.0, "others": 100.0, "words": 6.0, "kl": 0.0, "reward_chosen": 0.0}
    mended = {**base, "add": 100.0, "words": 1.0, "kl": 20.0, "reward_chosen": 31.84}
    figures = {"base": base, "SFT+": mended, "DPO": {**mended, "add": 80.0, "others": 99.0},
               "SPoT": {**mended, "words": 3.0, "tether_chosen": 0.014}}
    result = train.toy_result(figures)
    assert result.startswith("""\
          Add   others   rare words   KL*1000      r+
base     30.0    100.0          6.0      0.00     0.0   errs in Add, has rare words
SFT+    100.0    100.0          1.0     20.00    31.8   right in Add, lost rare words
DPO      80.0     99.0          1.0     20.00    31.8   errs in Add, lost rare words
SPoT    100.0    100.0          3.0     20.00    31.8   right in Add, has rare words
""")
    assert "ends at\n0.014" in result


@pytest.mark.slow  # 3 minutes on 2 cores
def test_the_story_keeps_its_promise(tmp_path):
    story = Started(["train.py", "--out", tmp_path, "--seed", 1], ranks=2)
    assert not any(story.wait(1800)), story.said[-3000:]
    (path,) = tmp_path.glob("*/results.json")
    rows = data.read_json(str(path))
    assert rows["SPoT"]["add"] >= rows["base"]["add"] + 25
    assert rows["SPoT"]["others"] >= rows["base"]["others"] - 3
    assert rows["SPoT"]["kl"] < rows["SFT+"]["kl"] / 2 and rows["SPoT"]["tether_chosen"] < 0.05
