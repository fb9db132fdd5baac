"""Damaged files of every foreign kind: each is read, or refused with UserError; nothing else.

    pytest tests/faults/test_fuzz.py                # 60 cases a reader, the same in every run
    FUZZ=20000 pytest tests/faults/test_fuzz.py     # so many a reader, others each time
"""

import json
import os
import random

import pytest
import tiny
from breaking import ROWS, write_rows

import data
import eval as evaluation
import model as qwen
import oracle
from data import UserError

CASES, SEED = 60, 0
if "FUZZ" in os.environ:
    CASES, SEED = int(os.environ["FUZZ"]), random.random()
VALUES = [None, True, 0, -1, 10**30, 0.5, float("nan"), "", "x", "\ud800", [], [[]], {}, {"a": []},
          [1, "a"], "<|im_end|>", {"role": "user", "content": "x"}]
PIECES = [b"\0", b"\xff", b"\xef\xbb\xbf", b"{", b"}", b'"', b",", b"\n", b"NaN", b"9" * 30]


def places(value) -> list:
    """Every (container, key) in a JSON value."""
    keys = []
    if isinstance(value, dict):
        keys = list(value)
    elif isinstance(value, list):
        keys = range(len(value))
    inner = [place for key in keys for place in places(value[key])]
    return [(value, key) for key in keys] + inner


def damaged_value(line: bytes, rng) -> bytes:
    """One value of a line of JSON is another, or gone."""
    value = json.loads(line)
    container, key = rng.choice(places(value)[:60])  # the vocabulary would draw all the fire
    if rng.random() < 0.3:
        del container[key]
    else:
        container[key] = rng.choice(VALUES)
    return json.dumps(value).encode()


def damaged_bytes(raw: bytes, rng) -> bytes:
    """A bit is flipped, bytes are lost or put in, or the end is lost."""
    at = rng.randrange(min(len(raw), 4000))  # of weights mostly the header
    flipped = bytes([raw[at] ^ 1 << rng.randrange(8)])
    return rng.choice([raw[:at] + flipped + raw[at + 1:], raw[:at] + raw[at + rng.randrange(40):],
                       raw[:at] + rng.choice(PIECES) + raw[at:], raw[:at]])


def damaged(raw: bytes, rng) -> bytes:
    """A file with one wound, in a value or in bytes."""
    lines = raw.split(b"\n") if b'}\n{"' in raw else [raw]
    at = rng.randrange(len(lines))
    if lines[at].startswith(b"{") and rng.random() < 0.7:
        lines[at] = damaged_value(lines[at], rng)
        return b"\n".join(lines)
    return damaged_bytes(raw, rng)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    w = tmp_path_factory.mktemp("fuzz")
    tiny.write_checkpoint(w / "model")
    tiny.write_pairs(w / "pairs.jsonl", 4)
    (w / "tasks").mkdir()
    for name, rows in ROWS.items():
        write_rows(w / name, rows)
    return w


def read_pairs(w):
    """What is accepted goes all the way to packs."""
    pairs, *_ = data.read_pairs(str(w / "pairs.jsonl"))
    chat = data.load_chat(str(w / "model"), 265)
    forks, *_ = data.make_forks(pairs, chat, 3000, 1.0, False)
    for i in range(len(forks)):
        data.make_pack(forks, [i])


def read_chat(w):
    """A tokenizer that is accepted encodes and decodes whatever text there is."""
    chat = data.load_chat(str(w / "model"), 265)
    for text in ("a question\n", "\N{SNOWMAN} \0 <|im_end|>", ""):
        ids = chat.prompt([{"role": "user", "content": text}])
        assert all(0 <= i < 265 for i in ids)
        chat.tokenizer.decode(ids)


def read_questions(w):
    for item in oracle.read_questions(str(w / "questions.jsonl"), oracle.INSTRUCTION)[0]:
        evaluation.request_for(item.id, item.messages, 0)
        evaluation.answers_match("1", item.gold)


def read_errors(w):
    for item in oracle.read_errors(str(w / "errors.jsonl"))[0]:
        oracle.oracle_messages(item, "correct")


def reader_of_task(name):
    def read(w):
        task = evaluation.load_task(name, str(w / "tasks"))
        for _, _, gold in task.rows:
            task.grade("It is \\boxed{1}, (A).", gold)
    return read


READERS = {
    "pairs.jsonl": read_pairs,
    "model/config.json": lambda w: qwen.read_config(str(w / "model")),
    "model/tokenizer.json": read_chat,
    "model/tokenizer_config.json": read_chat,
    "model/model.safetensors": lambda w: qwen.load_model(str(w / "model")),
    "questions.jsonl": read_questions,
    "errors.jsonl": read_errors,
    "tasks/gpqa.jsonl": reader_of_task("gpqa"),
    "tasks/ifeval.jsonl": reader_of_task("ifeval"),
    "tasks/connect4.jsonl": reader_of_task("connect4"),
}


@pytest.mark.parametrize("file", READERS)
def test_damaged_files_are_read_or_refused(world, file):
    good, refused = (world / file).read_bytes(), 0
    READERS[file](world)  # unhurt it is accepted
    for case in range(CASES):
        (world / file).write_bytes(damaged(good, random.Random(f"{SEED} {case}")))
        try:
            READERS[file](world)
        except UserError as e:
            refused += 1
            assert str(world) in str(e) and len(str(e)) < 20_000
        finally:
            (world / file).write_bytes(good)
    assert refused  # the damage was damage
