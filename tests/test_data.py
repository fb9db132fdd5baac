"""data.py against transformers' templates, brute-force LCS and hand-made files."""

import gzip
import json
import subprocess
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import data
import tiny
from data import UserError

SHARED = Path(__file__).parents[2] / "shared" / "data"
real = pytest.mark.skipif(not SHARED.exists(), reason="the real files are not here")


# --- change ratio ---------------------------------------------------------------------------------


@settings(deadline=None, max_examples=200)
@given(st.lists(st.integers(0, 4), max_size=40), st.lists(st.integers(0, 4), max_size=40))
def test_lcs_equals_dynamic_programming(a, b):
    table = [[0] * (len(b) + 1) for _ in range(len(a) + 1)]
    for i, x in enumerate(a):
        for j, y in enumerate(b):
            table[i + 1][j + 1] = table[i][j] + 1 if x == y else max(table[i][j + 1], table[i + 1][j])
    assert data.lcs_length(a, b) == table[-1][-1]
    matches = data.lcs_matches(a, b)
    assert len(matches) == table[-1][-1] and all(a[i] == b[j] for i, j in matches)
    assert all(i < k and j < n for (i, j), (k, n) in zip(matches, matches[1:]))


def test_change_ratio_by_hand():
    assert data.change_ratio([1, 2, 3, 4], [1, 2, 9, 4]) == 0.25
    assert data.change_ratio([], [1]) == 1.0 and data.change_ratio([1, 5, 2], [1, 2]) == 0.0
    assert data.lcs_length(list(range(8192)), list(range(8191, -1, -1))) == 1
    assert data.lcs_matches("abcabba", "cbabac") == [(1, 1), (3, 2), (4, 3), (6, 4)]


# --- reading --------------------------------------------------------------------------------------

OFFICIAL = {"question": "q", "gemini_corrected_answer": "right", "original_answer": "wrong", "index": 3}
TRL = {"prompt": "q", "chosen": "right", "rejected": "wrong"}
TURNS = [{"role": "system", "content": "s"}, {"role": "user", "content": "a"},
         {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]


def write(path, *rows):
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows))
    return str(path)


def test_rows_of_both_kinds(tmp_path):
    said = [{"role": "assistant", "content": "right"}]
    rows = [OFFICIAL, TRL, {**TRL, "prompt": TURNS, "chosen": said}, {**OFFICIAL, "original_answer": ""},
            {**TRL, "rejected": None}, {**OFFICIAL, "is_correct": False, "gemini_corrected_answer": ""}, "",
            {"prompt": "q", "gemini_corrected_answer": "\n\n=== CORRECTED STARTED ===\nright\n"
             "=== CORRECTED ENDED ===\nbye", "original_answer": "\n\nwrong", "is_correct": True},
            '{"prompt": "q", "chosen": "right", "rejected": "a\u2028b"}']
    pairs, dropped, _ = data.read_pairs(write(tmp_path / "p.jsonl", *rows))
    user = [{"role": "user", "content": "q"}]
    assert [(p.messages, p.chosen, p.rejected, p.line) for p in pairs] == [
        (user, "right", "wrong", 1), (user, "right", "wrong", 2), (TURNS, "right", "wrong", 3),
        (user, "right", None, 4), (user, "right", None, 5), (user, "right", "wrong", 8),
        (user, "right", "a\u2028b", 9)]
    assert dropped == {"correction is wrong (is_correct: false)": 1}
    with gzip.open(tmp_path / "p.jsonl.gz", "wt", encoding="utf-8-sig") as f:  # with a byte order mark
        f.write(json.dumps(TRL))
    assert len(data.read_pairs(str(tmp_path / "p.jsonl.gz"))[0]) == 1


BAD = [
    ('{"question": ', "not valid JSON"), ("[1]", "a JSON object expected"), ("[" * 100000, "not valid JSON"),
    ({**TRL, "prompt": 3}, "'prompt', message 0: a string expected, found int"),
    ({**TRL, "chosen": ["x"]}, "'chosen'"), ({**TRL, "chosen": ""}, "'chosen' is empty"),
    ({**OFFICIAL, "gemini_corrected_answer": "\n\n"}, "'gemini_corrected_answer' is empty"),
    ({**TRL, "rejected": {}}, "'rejected': a string expected"),
    ({"prompt": "q"}, "prompt, chosen, rejected expected, found ['prompt']"),
    ({"chosen": "a", "rejected": "b"}, "expected, found ['chosen', 'rejected']"),
    ({"chosen": [TURNS[0]] + TURNS[2:3], "rejected": "b"}, "user turn expected at the end"),
    ({"chosen": TURNS[1:3], "rejected": [TURNS[3], TURNS[2]]}, "'rejected': a string, or one"),
    ({**TRL, "prompt": [{"role": "user", "content": [{"type": "image"}]}]}, "parts of type text"),
    *(({**TRL, "chosen": [{"role": "assistant", "content": "r", key: "t"}]}, f"{key!r} is not rendered")
      for key in ("reasoning_content", "thinking", "tool_calls")),
    *(({**TRL, key: value}, f'"{key}" changes the prompt') for key, value in (
        ("tools", [{"name": "f"}]), ("system", "Be brief."), ("images", ["a.png"]), ("image", "a"),
        ("system_prompt", "x"), ("history", [["a", "b"]]), ("documents", ["d"]), ("videos", ["v"]),
        ("chat_template_kwargs", {"enable_thinking": True}))),
    ({**TRL, "prompt": []}, "user turn expected"),
    ({**TRL, "prompt": TURNS[:3]}, "user turn expected"), ({**TRL, "prompt": ""}, "user turn expected"),
    ({**TRL, "prompt": [{"role": "tool", "content": "x"}]}, "role system, user or assistant"),
    ({**TRL, "prompt": [{"role": "user", "content": ["x"]}]}, "parts of type text expected"),
    ({**OFFICIAL, "is_correct": "no"}, "true or false expected"),
    ('{"prompt": "q", "chosen": "\\ud800", "rejected": "x"}', "lone surrogate"),
]


@pytest.mark.parametrize("row,message", BAD, ids=[str(b[0])[:40] for b in BAD])
def test_malformed_rows_name_line_and_field(tmp_path, row, message):
    path = write(tmp_path / "p.jsonl", TRL, row)
    with pytest.raises(UserError) as e:
        data.read_pairs(path)
    assert path in str(e.value) and "line 2" in str(e.value) and message in str(e.value)
    pairs, dropped, _ = data.read_pairs(path, skip_malformed=True)
    assert len(pairs) == 1 and dropped == {"malformed": 1}


def test_layouts_of_trl_and_nulls_of_mixed_files(tmp_path):
    right, wrong = ([{"role": "assistant", "content": text}] for text in ("right", "wrong"))
    parts = [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]
    official, trl = dict.fromkeys(OFFICIAL), dict.fromkeys([*TRL, "tools", "system"])
    rows = [
        {"chosen": TURNS + right, "rejected": TURNS + wrong},  # the prompt is what both begin with
        {"chosen": TURNS + right, "rejected": wrong}, {"chosen": TURNS + right},
        {"question": "q", "chosen": "right", "rejected": "wrong"},
        {"prompt": parts, "chosen": [{"role": "assistant", "content": [{"type": "text", "text": "right"}]}],
         "rejected": "wrong"},
        {**official, **TRL}, {**trl, **OFFICIAL}, {**trl, **OFFICIAL, "original_answer": None},
        {**official, **TRL, "rejected": None}, {**OFFICIAL, "tools": [], "is_correct": None}]
    pairs, dropped, _ = data.read_pairs(write(tmp_path / "p.jsonl", *rows))
    user = [{"role": "user", "content": "q"}]
    assert not dropped and {p.chosen for p in pairs} == {"right"}
    assert [p.messages for p in pairs] == [TURNS] * 3 + [user, [{"role": "user", "content": "ab"}]] + [user] * 5
    assert [p.rejected for p in pairs] == ["wrong", "wrong", None, "wrong", "wrong", "wrong", "wrong", None,
                                           None, "wrong"]


def test_what_the_template_writes_is_stripped_and_odd_texts_are_counted(tmp_path):
    block = "<think>\n\n</think>\n\n"
    rows = [{**TRL, "chosen": block + "right", "rejected": block + "wrong<|im_end|>\n"},
            {**TRL, "chosen": "right<|im_end|>"}, {**TRL, "rejected": "<think>\nhm\n</think>\n\nwrong"},
            {**TRL, "prompt": "<|im_start|>user\nq<|im_end|>\n"}, OFFICIAL]
    pairs, _, notes = data.read_pairs(write(tmp_path / "p.jsonl", *rows))
    assert [p.chosen for p in pairs] == ["right"] * 5
    assert [p.rejected for p in pairs] == ["wrong", "wrong", rows[2]["rejected"], "wrong", "wrong"]
    assert notes == {"answers began with an empty think block: stripped": 2,
                     "answers ended with <|im_end|>: stripped": 2,
                     "answers hold thoughts (<think>): trained as they are": 1,
                     "prompts hold <|im_start|> or <|im_end|>: are they templated already?": 1,
                     "column index ignored": 1}


@pytest.mark.parametrize("text, wanted", [
    ("<think>\n</think>\n\nr", "r"), ("<think></think>r", "r"), ("\n<think>\n\n</think>\nr", "r"),
    ("<think>\n\n</think>\n\n<think></think>r", "r"), ("r<|im_end|><|im_end|>", "r"),
    ("r<|im_end|>\n<|endoftext|>\n", "r"), ("r<|endoftext|>", "r"), ("r \n", "r \n"),
    ("a <|im_end|> b", "a <|im_end|> b"), ("hm\n</think>\n\nr", "hm\n</think>\n\nr")])
def test_spellings_of_what_the_template_writes(tmp_path, text, wanted):
    pairs, _, notes = data.read_pairs(write(tmp_path / "p.jsonl", {**TRL, "chosen": text}))
    assert pairs[0].chosen == wanted
    assert bool(notes) == (text != wanted or "</think>" in text)


@pytest.mark.parametrize("content, message", [
    (json.dumps([TRL, TRL]), "is a JSON array"), ("\n\n" + json.dumps([TRL]), "is a JSON array"),
    ("\ufeff" + json.dumps([TRL]), "is a JSON array"), (json.dumps([TRL, TRL], indent=2), "is a JSON array"),
    (json.dumps(TRL, indent=2), "is pretty-printed JSON"), ("PAR1\x15\x04", "is a parquet file")])
def test_other_formats_are_named_with_a_command_that_converts_them(tmp_path, content, message):
    path = tmp_path / "it's $HOME.json"
    path.write_text(content)
    with pytest.raises(UserError, match=message) as e:
        data.read_pairs(str(path))
    command = str(e.value).splitlines()[-1].strip()
    if "parquet" not in message:
        subprocess.run(command, shell=True, check=True, cwd=tmp_path)
        assert data.read_log(str(tmp_path / "rows.jsonl")) in ([TRL], [TRL, TRL])


def test_unreadable_files(tmp_path):
    (tmp_path / "latin").write_bytes(json.dumps(TRL).encode() + b"\n\xe9\n")
    (tmp_path / "cut.gz").write_bytes(gzip.compress(json.dumps(TRL).encode() * 100)[:-20])
    (tmp_path / "not.gz").write_bytes(b"hello")
    (tmp_path / "empty").write_bytes(b"")
    for name, message in (("latin", "line 2: not valid JSON in UTF-8"), ("cut.gz", "cannot be read"),
                          ("not.gz", "cannot be read"), ("empty", "is empty"), ("none", "No such file"),
                          (".", "cannot be read")):
        with pytest.raises(UserError, match=message):
            data.read_pairs(str(tmp_path / name))


def test_many_problems_are_counted_and_the_first_ones_shown(tmp_path):
    with pytest.raises(UserError) as e:
        data.read_pairs(write(tmp_path / "p", *["x"] * 20))
    assert "20 malformed rows" in str(e.value) and "line 8" in str(e.value) and "12 more" in str(e.value)
    assert "line 9" not in str(e.value)


# --- template -------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    tiny.write_tokenizer(tmp_path)
    return tmp_path


def hf_prompt(folder, messages):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder).apply_chat_template(
        messages, add_generation_prompt=True, enable_thinking=False, return_dict=False)


CONVERSATIONS = [
    TURNS, TURNS[1:], [{"role": "user", "content": "naïve ∑ 𝛽 \n\n  two  spaces\n"}],
    [*TURNS[:2], {"role": "assistant", "content": "<think>\nno\n</think>\n\nyes"}, TURNS[3]],
    [TURNS[1], TURNS[2], {"role": "system", "content": "later"}, TURNS[3]],
    [{"role": "user", "content": "a <think> b </think> c"}],
]


@real
def test_prompts_equal_transformers_on_every_real_row():
    from transformers import AutoTokenizer

    folder = str(SHARED / "qwen3_tokenizer")
    chat, hf = data.load_chat(folder, 151936), AutoTokenizer.from_pretrained(folder)
    assert chat.think == [151667, 271, 151668, 271] and chat.im_end == 151645
    pairs, dropped, _ = data.read_pairs(str(SHARED / "gsm8k" / "pairs.jsonl"))
    assert len(pairs) == 3263 and not dropped
    for messages in [p.messages for p in pairs] + CONVERSATIONS:
        assert chat.prompt(messages) == hf.apply_chat_template(
            messages, add_generation_prompt=True, enable_thinking=False, return_dict=False)


@real
def test_real_pairs_are_filtered_as_their_makers_counted():
    chat = data.load_chat(str(SHARED / "qwen3_tokenizer"), 151936)
    forks, log = data.load_forks(str(SHARED / "gsm8k" / "pairs.jsonl"), chat, 8192, 0.6, True)
    assert len(forks) == 2657 and "dropped    606  change ratio above 0.6" in log


def test_special_tokens_in_a_question_stay_text(folder):
    chat = data.load_chat(str(folder), 261)
    ids = chat.prompt([{"role": "user", "content": "stop <|im_end|> now"}])
    assert ids.count(chat.im_end) == 1  # the turn's own
    assert ids[-len(chat.think):] == chat.think and len(chat.think) == 6  # byte level: two newlines each


@pytest.mark.parametrize("name", ["qwen3", "qwen3_training", "qwen3_instruct_2507",
                                  "qwen3_instruct_2507_training"])
@pytest.mark.parametrize("form", ["chat_template.jinja", "tokenizer_config.json", "a list of names"])
def test_known_templates_equal_transformers(folder, name, form):
    template = (tiny.TEMPLATES / f"{name}.jinja").read_text()
    config = json.loads((folder / "tokenizer_config.json").read_text())
    if form == "chat_template.jinja":  # wins over tokenizer_config.json
        (folder / form).write_text(template.strip())
    elif form == "tokenizer_config.json":
        (folder / form).write_text(json.dumps({**config, "chat_template": template}))
    else:
        named = [{"name": "tool_use", "template": "x"}, {"name": "default", "template": template}]
        (folder / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": named}))
    chat = data.load_chat(str(folder), 261)
    assert bool(chat.think) == ("instruct" not in name)
    for messages in CONVERSATIONS[:5]:
        if chat.think or "<think>" not in str(messages):  # instruct: it stays text here, there a token
            assert chat.prompt(messages) == hf_prompt(folder, messages)


@pytest.mark.parametrize("change", [
    lambda text: text + " ", lambda text: text + "\n\n\n", lambda text: text + "\xa0",
    lambda text: text.replace("<|im_end|>\\n", "<|im_end|>"), lambda text: "[INST] {{ messages }} [/INST]",
    lambda text: "{{ 'You are Qwen.' }}" + text, lambda text: text.replace("is false", "is true")])
def test_other_templates_are_refused_unless_one_is_named(folder, change):
    known = data.load_chat(str(folder), 261)
    (folder / "chat_template.jinja").write_text(change(tiny.TEMPLATE))
    with pytest.raises(UserError, match="not known here. --template hybrid"):
        data.load_chat(str(folder), 261)
    assert data.load_chat(str(folder), 261, "hybrid").prompt(TURNS) == known.prompt(TURNS)
    assert data.load_chat(str(folder), 261, "instruct").think == []


def test_tokenizers_that_do_not_fit_are_refused(folder):
    with pytest.raises(UserError, match="token id 260, but the model's vocabulary has 260 rows"):
        data.load_chat(str(folder), 260)
    raw = json.loads((folder / "tokenizer.json").read_text())
    for text, message in (("{}", "is no tokenizer.json"), ('{"version"', "tokenizer.json"), (json.dumps(
            {**raw, "added_tokens": raw["added_tokens"][:2]}), "lacks the token '<|im_end|>'")):
        (folder / "tokenizer.json").write_text(text)
        with pytest.raises(UserError, match=message):
            data.load_chat(str(folder), 261)


@pytest.mark.parametrize("part,value,message", [
    ("normalizer", {"type": "Precompiled", "precompiled_charsmap": "AAAA"}, "'Precompiled', NFC expected"),
    ("normalizer", {"type": "Sequence", "normalizers": [{"type": "NFC"}, {"type": "Replace"}]}, "'Replace'"),
    ("pre_tokenizer", {"type": "FixedLength", "length": 0}, "'FixedLength', Split or ByteLevel or Digits"),
    ("pre_tokenizer", {"type": "Sequence", "pretokenizers": [["Split"]]}, "is no tokenizer.json"),
    ("decoder", {"type": "Replace"}, "'Replace', ByteLevel expected"),
    ("model", {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "b"}, "'WordLevel', BPE expected"),
    ("model", {"dropout": 0.5}, "\"dropout\" is 0.5, null expected")])
def test_parts_that_no_qwen3_tokenizer_has_are_refused(folder, part, value, message):
    raw = json.loads((folder / "tokenizer.json").read_text())
    whole = {**raw[part], **value} if part == "model" else value
    (folder / "tokenizer.json").write_text(json.dumps({**raw, part: whole}))
    with pytest.raises(UserError, match=message):
        data.load_chat(str(folder), 261)


def test_what_is_dropped_is_counted_by_reason(folder, tmp_path):
    rows = [TRL, {**TRL, "rejected": "right"}, {**TRL, "rejected": ""}, {**TRL, "chosen": "r" * 300},
            {**TRL, "chosen": "totally different"}, {**TRL, "is_correct": False}]
    chat = data.load_chat(str(folder), 261)
    path = write(tmp_path / "p.jsonl", *rows)
    forks, log = data.load_forks(path, chat, 100, 0.8, True)
    assert [f.line for f in forks] == [1]
    for reason in ("identical", "no rejected answer", "longer than max_length", "change ratio above 0.8",
                   "is_correct: false"):
        (line,) = [line for line in log.splitlines() if reason in line]
        assert line.split()[:2] == ["dropped", "1"]
    with pytest.raises(UserError, match="Nothing is left to train on"):
        data.load_forks(path, chat, 5, 0.8, True)
    assert len(data.load_forks(path, chat, 100, 1.0, False)[0]) == 3  # positive-only and different ones too


# --- the plan -------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=100)
@given(st.lists(st.integers(1, 500), min_size=1, max_size=40), st.integers(1, 9), st.integers(1, 900))
def test_a_batch_is_split_whole_and_balanced(lengths, ranks, tokens_per_pack):
    plan = data.split_batch(range(len(lengths)), lengths, ranks, tokens_per_pack)
    assert plan == data.split_batch(range(len(lengths)), lengths, ranks, tokens_per_pack)
    assert sorted(i for micro in plan for pack in micro for i in pack) == list(range(len(lengths)))
    assert all(len(micro) == ranks for micro in plan) and any(plan[-1])
    for pack in (pack for micro in plan for pack in micro):
        assert sum(lengths[i] for i in pack) <= tokens_per_pack or len(pack) == 1
    load = [sum(lengths[i] for micro in plan for i in micro[r]) for r in range(ranks)]
    assert max(load) - min(load) <= max(lengths)


def test_epochs_are_permutations_and_keep_the_last_small_batch():
    first, second = (data.epoch_batches(70, 32, 0, e) for e in (0, 1))
    assert [len(b) for b in first] == [32, 32, 6]
    assert sorted(i for b in first for i in b) == list(range(70))
    assert [list(b) for b in first] == [list(b) for b in data.epoch_batches(70, 32, 0, 0)]
    assert list(first[0]) != list(second[0]) != list(data.epoch_batches(70, 32, 1, 1)[0])
