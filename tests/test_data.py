"""data.py against transformers' templates, brute-force LCS and hand-made files."""

import gzip
import json
import os
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import SHARED, needs_data

import data
import tiny
import train
from data import UserError

# --- change ratio ---------------------------------------------------------------------------------

@settings(deadline=None, max_examples=200)
@given(st.lists(st.integers(0, 4), max_size=40), st.lists(st.integers(0, 4), max_size=40))
def test_lcs_equals_dynamic_programming(a, b):
    table = [[0] * (len(b) + 1) for _ in range(len(a) + 1)]
    for i, x in enumerate(a):
        for j, y in enumerate(b):
            longest = max(table[i][j + 1], table[i + 1][j])
            table[i + 1][j + 1] = table[i][j] + 1 if x == y else longest
    assert data.lcs_length(a, b) == table[-1][-1]


def test_change_ratio_by_hand():
    assert data.change_ratio([1, 2, 3, 4], [1, 2, 9, 4]) == 0.25
    assert data.change_ratio([], [1]) == 1.0 and data.change_ratio([1, 5, 2], [1, 2]) == 0.0


# --- reading --------------------------------------------------------------------------------------

OFFICIAL = {"question": "q", "gemini_corrected_answer": "right", "original_answer": "wrong"}
TRL = {"prompt": "q", "chosen": "right", "rejected": "wrong"}
TURNS = [{"role": "system", "content": "s"}, {"role": "user", "content": "a"},
         {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
RIGHT, WRONG = ([{"role": "assistant", "content": text}] for text in ("right", "wrong"))
USER = [{"role": "user", "content": "q"}]


def write(path, *rows):
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows))
    return str(path)


NULLS = dict.fromkeys([*OFFICIAL, *TRL, "tools", "is_correct"])  # as datasets writes them
ROWS = [  # a row, its prompt, y-; y+ is "right"
    (OFFICIAL, USER, "wrong"), (TRL, USER, "wrong"), ({**NULLS, **OFFICIAL}, USER, "wrong"),
    ({**NULLS, **TRL}, USER, "wrong"), ({**OFFICIAL, "original_answer": ""}, USER, ""),
    ({**OFFICIAL, "original_answer": None}, USER, ""), ({**TRL, "rejected": None}, USER, ""),
    ({**OFFICIAL, "tools": []}, USER, "wrong"),
    ({"prompt": "q", "gemini_corrected_answer": f"\n\n{data.START}\nright\n{data.END}\nbye",
      "original_answer": "\n\nwrong", "is_correct": True}, USER, "wrong"),
    ('{"prompt": "q", "chosen": "right", "rejected": "a\u2028b"}', USER, "a\u2028b"),
    ({**TRL, "prompt": TURNS, "chosen": RIGHT}, TURNS, "wrong"),
    ({"chosen": TURNS + RIGHT, "rejected": TURNS + WRONG}, TURNS, "wrong"),
    ({"chosen": TURNS + RIGHT}, TURNS, ""),
    ({"question": "q", "chosen": "right", "rejected": "wrong"}, USER, "wrong"),
    ({**TRL, "prompt": [{"role": "user", "content": [
        {"type": "text", "text": text} for text in ("", "q", "")]}]}, USER, "wrong")]


def test_rows_of_both_kinds(tmp_path):
    wrong = [{**OFFICIAL, "is_correct": value} for value in (False, "false", 0)]
    path = write(tmp_path / "p.jsonl", *(row for row, *_ in ROWS), "", *wrong)
    pairs, dropped, _ = tiny.read_pairs(path)
    assert pairs == [(prompt, "right", y, i) for i, (_, prompt, y) in enumerate(ROWS, 1)]
    assert dropped == {"is_correct is not true": 3}
    with gzip.open(tmp_path / "p.jsonl.gz", "wt", encoding="utf-8-sig") as f:  # byte order mark
        f.write(json.dumps(TRL))
    assert len(tiny.read_pairs(str(tmp_path / "p.jsonl.gz"))[0]) == 1


BAD = [
    ('{"a": ' * 9999, "not valid JSON"), ("[1]", "a JSON object expected"), ("x", "not valid JSON"),
    ({**TRL, "prompt": 3}, "'prompt': a string"), ({**TRL, "chosen": ""}, "'chosen' is empty"),
    ({"prompt": "q"}, "gemini_corrected_answer, expected, found ['prompt']"),
    ({"chosen": "a", "rejected": "b"}, "expected, found ['chosen', 'rejected']"),
    ({"chosen": [TURNS[0]] + TURNS[2:3], "rejected": "b"}, "'prompt': a turn of role user"),
    ({"chosen": TURNS[1:3], "rejected": [TURNS[3], TURNS[2]]}, "'rejected': messages before"),
    ({**TRL, "chosen": [{**RIGHT[0], "reasoning_content": "t"}]}, "'chosen': tool calls and"),
    ({**TRL, "tools": [{"name": "f"}]}, "'tools' is not rendered"),
    ({**TRL, "prompt": [{"role": "tool", "content": "x"}]}, "role system, user or assistant"),
    ({**TRL, "prompt": [{"role": "user", "content": [{"type": "image"}]}]}, "'prompt': a string"),
    ('{"prompt": "q", "chosen": "\\ud800", "rejected": "x"}', "lone surrogate")]


@pytest.mark.parametrize("row,message", BAD, ids=[str(b[0])[:40] for b in BAD])
def test_malformed_rows_name_line_and_field(tmp_path, row, message):
    path = write(tmp_path / "p.jsonl", TRL, row)
    with pytest.raises(UserError) as e:
        tiny.read_pairs(path)
    assert path in str(e.value) and "line 2" in str(e.value) and message in str(e.value)
    pairs, dropped, _ = tiny.read_pairs(path, skip_malformed=True)
    assert len(pairs) == 1 and dropped == {"malformed": 1}


BLOCK, THOUGHT = "<think>\n\n</think>\n\n", "<think>\nhm\n</think>\n\nr"
STRIPPED = "answers carried an empty think block or <|im_end|>: stripped"
ODD = "rows hold <|im_start|> or <think>: are they templated already?"


@pytest.mark.parametrize("text, wanted, note", [
    ("r \n", "r \n", None), (BLOCK + "r", "r", STRIPPED), ("r<|im_end|>", "r", STRIPPED),
    (f"\n<think></think>{BLOCK}r<|im_end|>\n<|endoftext|>\n", "r", STRIPPED),
    ("a <|im_end|> b", "a <|im_end|> b", None), (THOUGHT, THOUGHT, ODD),
    ("<|im_start|>r", "<|im_start|>r", ODD)])
def test_remnants_are_stripped_and_odd_texts_counted(tmp_path, text, wanted, note):
    path = write(tmp_path / "p.jsonl", {**TRL, "chosen": text, "meta": 1, "index": 1})
    pairs, _, notes = tiny.read_pairs(path)
    assert pairs[0].chosen == wanted
    assert notes == {"column meta ignored": 1} | ({note: 1} if note else {})


@pytest.mark.parametrize("name", ["json", "parquet"])
def test_other_formats_are_named_with_a_command_that_converts_them(tmp_path, monkeypatch, name):
    from datasets import Dataset

    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.setenv("PATH", os.path.dirname(sys.executable), prepend=":")
    path = write(tmp_path / f"my pairs.{name}", "\n" + json.dumps([TRL, TRL], indent=2))
    if name == "parquet":
        Dataset.from_list([TRL, TRL]).to_parquet(path)
    with pytest.raises(UserError, match="is no JSON Lines file") as e:
        tiny.read_pairs(path)
    subprocess.run(str(e.value).splitlines()[-1], shell=True, check=True)
    assert data.read_log(f"{path}.jsonl") == [TRL, TRL]


def test_torn_lines_of_a_log_do_not_count(tmp_path):
    last = '{"a": "é"}'.encode()  # cut anywhere, also inside the character
    for end in range(1, len(last) + 1):
        (tmp_path / "log").write_bytes(b'{"a": 1}\n{"a": \n{"a": 3}\n' + last[:end])
        assert data.read_log(str(tmp_path / "log")) == [{"a": 1}, {"a": 3}]


def test_of_many_malformed_rows_twenty_are_named(tmp_path):
    with pytest.raises(UserError, match="(?s)30 malformed rows.*line 20.*and 10 more") as e:
        tiny.read_pairs(write(tmp_path / "many", *["x"] * 30))
    assert "line 21" not in str(e.value)


# --- template -------------------------------------------------------------------------------------

@pytest.fixture
def folder(tmp_path):
    tiny.write_tokenizer(tmp_path)
    return tmp_path


CONVERSATIONS = [
    TURNS, TURNS[1:], [{"role": "user", "content": "naïve ∑ 𝛽 \n\n  two  spaces\n"}],
    [*TURNS[:2], {"role": "assistant", "content": "<think>\nno\n</think>\n\nyes"}, TURNS[3]],
    [TURNS[1], TURNS[2], {"role": "system", "content": "later"}, TURNS[3]],
    [{"role": "user", "content": "a <think> b </think> c"}]]


@needs_data
def test_real_prompts_equal_transformers_and_pairs_are_filtered_as_their_makers_counted():
    from transformers import AutoTokenizer

    folder, path = str(SHARED / "qwen3_tokenizer"), str(SHARED / "gsm8k" / "pairs.jsonl")
    chat, hf = data.load_chat(folder, 151936), AutoTokenizer.from_pretrained(folder)
    assert chat.think == [151667, 271, 151668, 271] and chat.im_end == 151645
    pairs, dropped, _ = tiny.read_pairs(path)
    assert len(pairs) == 3263 and not dropped
    for messages in [p.messages for p in pairs[::5]] + CONVERSATIONS:
        assert chat.prompt(messages) == hf.apply_chat_template(
            messages, add_generation_prompt=True, enable_thinking=False, return_dict=False)
    forks, log = data.load_forks(path, chat, 8192, 0.6, True)
    assert len(forks) == 2657 and "dropped    606  change ratio above 0.6" in log


@pytest.mark.parametrize("name", ["qwen3", "qwen3_instruct_2507", "qwen3_instruct_2507_training"])
@pytest.mark.parametrize("form", ["chat_template.jinja", "tokenizer_config.json"])
def test_known_templates_equal_transformers(folder, name, form):
    from transformers import AutoTokenizer

    template = (tiny.TEMPLATES / f"{name}.jinja").read_text()
    config = json.loads((folder / "tokenizer_config.json").read_text())
    if form == "chat_template.jinja":  # wins over tokenizer_config.json
        (folder / form).write_text(template.strip())
    else:
        (folder / form).write_text(json.dumps({**config, "chat_template": template}))
    chat, hf = data.load_chat(str(folder), 261), AutoTokenizer.from_pretrained(folder)
    assert bool(chat.think) == ("instruct" not in name)
    for messages in CONVERSATIONS[:5]:  # under instruct a thought stays text here, no token
        if chat.think or "<think>" not in str(messages):
            assert chat.prompt(messages) == hf.apply_chat_template(
                messages, add_generation_prompt=True, enable_thinking=False, return_dict=False)


@pytest.mark.parametrize("change", [
    lambda text: text + " ", lambda text: text + "\n\n\n", lambda text: "[INST] {{ messages }}",
    lambda text: text.replace("<|im_end|>\\n", "<|im_end|>")])
def test_other_templates_are_refused_unless_one_is_named(folder, change):
    known = data.load_chat(str(folder), 261)
    (folder / "chat_template.jinja").write_text(change(tiny.TEMPLATE))
    with pytest.raises(UserError, match="unknown chat template. --template hybrid"):
        data.load_chat(str(folder), 261)
    assert data.load_chat(str(folder), 261, "hybrid").prompt(TURNS) == known.prompt(TURNS)
    assert data.load_chat(str(folder), 261, "instruct").think == []


@pytest.mark.parametrize("change, message", [
    (lambda t: t["added_tokens"].pop(2), "<|im_end|> is missing"),
    (lambda t: t["added_tokens"][2].update(special=False), "or not marked special"),
    (lambda t: t.update(normalizer={"type": "Sequence", "normalizers": [
        {"type": "NFC"}, {"type": "Lowercase"}]}), "Lowercase is in no Qwen3"),
    (lambda t: t.update(decoder={"type": "Replace"}), "Replace is in")])
def test_tokenizers_of_other_kinds_are_refused(folder, change, message):
    with pytest.raises(UserError, match="has ids beyond the model's vocabulary of 260"):
        data.load_chat(str(folder), 260)
    spec = json.loads((folder / "tokenizer.json").read_text())
    change(spec)
    (folder / "tokenizer.json").write_text(json.dumps(spec))
    with pytest.raises(UserError) as e:
        data.load_chat(str(folder), 261)
    assert message in str(e.value)


def test_what_is_dropped_is_counted_by_reason(folder, tmp_path):
    rows = [TRL, {**TRL, "rejected": "right"}, {**TRL, "rejected": ""},
            {**TRL, "chosen": "r" * 300}, {**TRL, "chosen": "totally different"},
            {**TRL, "is_correct": False}]
    chat = data.load_chat(str(folder), 261)
    path = write(tmp_path / "p.jsonl", *rows)
    forks, log = data.load_forks(path, chat, 100, 0.8, True)
    assert [f.line for f in forks] == [1]
    for reason in ("identical", "no rejected answer", "longer than max_length",
                   "change ratio above 0.8", "is_correct is not"):
        (line,) = [line for line in log.splitlines() if reason in line]
        assert line.split()[:2] == ["dropped", "1"]
    assert "at 25, 50, 75, 90 %: [0.67, 0.74, 0.81, 0.85]" in log  # of 0.6 and 15/17
    with pytest.raises(UserError, match="Nothing is left to train on"):
        data.load_forks(path, chat, 5, 0.8, True)
    assert len(data.load_forks(path, chat, 100, 1.0, False)[0]) == 3  # positive-only ones too


# --- the plan -------------------------------------------------------------------------------------

@settings(deadline=None, max_examples=100)
@given(st.lists(st.integers(1, 500), min_size=1, max_size=40), st.integers(1, 9),
       st.integers(1, 900))
def test_a_batch_is_split_whole_and_balanced(lengths, ranks, tokens_per_pack):
    plan = train.split_batch(range(len(lengths)), lengths, ranks, tokens_per_pack)
    assert sorted(i for micro in plan for pack in micro for i in pack) == list(range(len(lengths)))
    assert all(len(micro) == ranks for micro in plan) and any(plan[-1])
    for pack in (pack for micro in plan for pack in micro):
        assert sum(lengths[i] for i in pack) <= tokens_per_pack or len(pack) == 1
    load = [sum(lengths[i] for micro in plan for i in micro[r]) for r in range(ranks)]
    assert max(load) - min(load) <= max(lengths)


def test_epochs_are_permutations_and_keep_the_last_small_batch():
    first, again, second, other = (
        train.epoch_batches(70, 32, *place) for place in ((0, 0), (0, 0), (0, 1), (1, 1)))
    assert [len(b) for b in first] == [32, 32, 6]
    assert sorted(i for b in first for i in b) == list(range(70))
    assert list(first[0]) == list(again[0]) != list(second[0]) != list(other[0])
