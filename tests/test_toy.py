"""The toy world: its Oracle against brute force, its tokenizer against transformers, the same seed twice."""

import filecmp
import json
import random
import subprocess
import sys
from pathlib import Path

import pytest

import data
import eval as evaluation
import model as qwen
import oracle
import train


@pytest.fixture(scope="module")
def birth(tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("toy") / "birth")
    train.write_toy_checkpoint(folder, train.TOY["shape"], seed=0)
    return folder


@pytest.fixture(scope="module")
def chat(birth):
    return data.load_chat(birth, qwen.read_config(birth).vocab_size)


def truth(question):
    """Last digits by Python's own arithmetic."""
    skill, text = question.split(": ")
    if skill in ("Reverse", "Sort"):
        return text[::-1] if skill == "Reverse" else "".join(sorted(text))
    first, *rest = map(int, text.split(train.TOY_SIGNS[skill]))
    return str({"Add": (first + sum(rest)) % 10, "Subtract": (first - sum(rest)) % 10,
                "Largest": max([first, *rest])}[skill])


def right(question, text):
    """By the real grader."""
    return evaluation.answers_match(evaluation.extract_answer(text) or "", truth(question))


def wrong_answer(question, rng):
    """An answer that errs: in facts (and goes on from there), in single digits, or in the number of steps."""
    style = rng.choice(train.TOY_STYLES)
    answer = train.toy_answer(question, style, lambda a, b: (a + b + (rng.random() < 0.3)) % 10)
    kind = rng.random()
    if kind < 0.4:
        places = [i for i, c in enumerate(answer) if c.isdigit()]
        for i in rng.sample(places, rng.randint(1, 3)):
            answer = answer[:i] + str(rng.randint(0, 9)) + answer[i + 1:]
    elif kind < 0.5:
        *steps, last = answer.split("\n")
        steps = style[0].join(steps).split(style[0])
        steps.insert(rng.randrange(len(steps)), rng.choice(steps))
        answer = "\n".join([style[0].join(steps[rng.randint(0, 2):]), last])
    return answer


def test_answers_are_right_and_graded_so():
    rng = random.Random(0)
    for i in range(500):
        question = train.toy_question(train.TOY_SKILLS[i % 5], rng)
        for style in train.TOY_STYLES:
            answer = train.toy_answer(question, style)
            assert answer.endswith(f"\\boxed{{{truth(question)}}}") and right(question, answer)
            assert not right(question, answer[:-2] + f"{(int(answer[-2]) + 1) % 10}}}")
        assert not right(question, "") and not right(question, "\\boxed{")


def test_corrections_are_right_and_minimal(chat):
    rng, done = random.Random(0), 0
    while done < 1000:
        question = train.toy_question(rng.choice(train.TOY_SKILLS[:3]), rng)
        wrong = wrong_answer(question, rng)
        if right(question, wrong):
            continue
        done += 1
        mended = train.toy_oracle(question, wrong)
        facts = oracle.TOY_STEP.findall(train.toy_answer(question))
        assert oracle.TOY_STEP.findall(mended) == facts and right(question, mended)
        # what stands before the first wrong assertion is kept, to the character
        place = 0
        for found, fact in zip(oracle.TOY_STEP.finditer(wrong), facts):
            place = found.start()
            if found[0] != fact:
                break
        assert mended.startswith(wrong[:place])
        # and no right answer, of any style, is nearer
        ratio = data.change_ratio(chat.encode(wrong), chat.encode(mended))
        every = (chat.encode(train.toy_answer(question, style)) for style in train.TOY_STYLES)
        assert ratio <= min(data.change_ratio(chat.encode(wrong), ids) for ids in every)


def test_tokenizer_and_template_equal_transformers(birth, chat):
    from transformers import AutoTokenizer

    hf, rng = AutoTokenizer.from_pretrained(birth), random.Random(0)
    for i in range(200):
        question = train.toy_question(train.TOY_SKILLS[i % 5], rng)
        answer = train.toy_answer(question, rng.choice(train.TOY_STYLES))
        assert chat.tokenizer.decode(chat.encode(answer)) == answer
        turns = [{"role": "system", "content": "ü \n 3 "}, {"role": "user", "content": question}]
        for messages in (turns, turns[1:], [*turns, {"role": "assistant", "content": answer}, turns[1]]):
            assert chat.prompt(messages) == hf.apply_chat_template(
                messages, add_generation_prompt=True, tokenize=True, return_dict=False)
    for word in ("user", "assistant", "system", *train.TOY_SKILLS, "boxed", *map(str, range(10))):
        assert len(chat.encode(word)) == 1
    assert len(chat.prompt([{"role": "user", "content": "Add: 1+2"}])) == 8 + 6
    assert chat.think == [] and len(chat.encode("<|im_end|>")) > 1


def test_same_seed_same_world(birth, tmp_path):
    other = str(tmp_path / "birth")
    train.write_toy_checkpoint(other, train.TOY["shape"], seed=0)
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"):
        assert filecmp.cmp(f"{birth}/{name}", f"{other}/{name}", shallow=False)
    rows = [list(train.toy_corpus(50, 1 / 3, 0.8, seed)) for seed in (0, 0, 1)]
    assert rows[0] == rows[1] != rows[2]
    lists = train.toy_questions("Add", 0, 20, 30, 40)
    assert lists == train.toy_questions("Add", 0, 20, 30, 40)
    assert list(map(len, lists)) == [20, 30, 40] and len(set(sum(lists, []))) == 90


def test_superstition_is_systematic():
    wrong, seen = {}, {}
    for row in train.toy_corpus(4000, 1 / 3, 0.8, 0):
        if row["prompt"].startswith("Add"):
            for step in oracle.TOY_STEP.findall(row["chosen"])[:-1]:
                fact, result = step.split("=")
                seen[fact] = seen.get(fact, 0) + 1
                wrong[fact] = wrong.get(fact, 0) + (int(result) != sum(map(int, fact.split("+"))) % 10)
        else:
            assert right(row["prompt"], row["chosen"])
    shares = [wrong[fact] / seen[fact] for fact in seen]
    assert sum(s > 0 for s in shares) == 17 and all(s == 0 or s > 0.4 for s in shares)


def test_choice_of_the_rate():
    def grade(target, others):
        return {"Add": target, "others": others}
    base, rates = grade(30, 100), {1e-5: grade(50, 99.5), 1e-4: grade(80, 99), 1e-3: grade(90, 90)}
    assert train.choose_rate(rates, base) == 1e-4
    assert train.choose_rate({**rates, 1e-4: grade(50, 99)}, base) == 1e-5
    assert train.choose_rate({1e-4: grade(80, 97), 1e-3: grade(90, 90)}, base) == 1e-4


@pytest.mark.slow  # 3 minutes on 2 cores
def test_the_story_keeps_its_promise(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
               "train.py", "--out", str(tmp_path), "--seed", "1"]
    subprocess.run(command, check=True, timeout=1800, cwd=Path(train.__file__).parent)
    (path,) = tmp_path.glob("*/results.json")
    rows = json.loads(path.read_text())["test"]
    assert rows["SPoT"]["Add"] >= rows["base"]["Add"] + 25
    assert rows["SPoT"]["others"] >= rows["base"]["others"] - 3  # the promise is 2 on average over seeds
    assert rows["SPoT"]["tether_chosen"] < 0.25 and rows["base"]["tether_chosen"] == 0.5
