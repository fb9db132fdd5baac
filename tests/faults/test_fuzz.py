"""Damaged files that come from elsewhere: each is read, or refused with UserError; nothing else.

    pytest tests/faults/test_fuzz.py                # 100 cases a reader, the same in every run
    FUZZ=20000 pytest tests/faults/test_fuzz.py     # so many a reader, others each time
"""

import json
import os
import random

import pytest
import tiny
from breaking import SUMS, write_rows

import data
import eval as evaluation
import model as qwen
import oracle
from data import UserError

CASES, SEED = 100, 0
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


def damaged(raw: bytes, rng) -> bytes:
    """A file with one wound: a value in a line of JSON is another or gone, or a bit is flipped,
    bytes are lost or put in, or the end is lost."""
    lines = raw.split(b"\n") if b'}\n{"' in raw else [raw]
    i = rng.randrange(len(lines))
    if lines[i].startswith(b"{") and rng.random() < 0.7:
        value = json.loads(lines[i])
        container, key = rng.choice(places(value)[:60])  # a vocabulary would draw all the fire
        if rng.random() < 0.3:
            del container[key]
        else:
            container[key] = rng.choice(VALUES)
        lines[i] = json.dumps(value).encode()
        return b"\n".join(lines)
    at = rng.randrange(min(len(raw), 4000))  # of weights mostly the header
    flipped = bytes([raw[at] ^ 1 << rng.randrange(8)])
    return rng.choice([raw[:at] + flipped + raw[at + 1:], raw[:at] + raw[at + rng.randrange(40):],
                       raw[:at] + rng.choice(PIECES) + raw[at:], raw[:at]])


def read_chat(w):
    """A tokenizer that is accepted encodes and decodes whatever text there is."""
    chat = data.load_chat(str(w / "model"), 265)
    for text in ("a question\n", "\N{SNOWMAN} \0 <|im_end|>", ""):
        ids = chat.prompt([{"role": "user", "content": text}])
        assert all(0 <= i < 265 for i in ids)
        chat.tokenizer.decode(ids)


def read_pairs(w):
    """What is accepted goes all the way to packs."""
    pairs, *_ = data.read_pairs(str(w / "pairs.jsonl"))
    forks, *_ = data.make_forks(pairs, data.load_chat(str(w / "model"), 265), 3000, 1.0, False)
    for i in range(len(forks)):
        data.make_pack(forks, [i])


def read_questions(w):
    for item in oracle.read_questions(str(w / "questions.jsonl"), oracle.INSTRUCTION)[0]:
        evaluation.request_for(item.id, item.messages, 0)
        evaluation.answers_match("1", item.gold)


READERS = {"pairs.jsonl": read_pairs, "questions.jsonl": read_questions,
           "model/config.json": lambda w: qwen.read_config(str(w / "model")),
           "model/tokenizer.json": read_chat, "model/tokenizer_config.json": read_chat,
           "model/model.safetensors": lambda w: qwen.load_model(str(w / "model"))}


@pytest.mark.parametrize("file", READERS)
def test_damaged_files_are_read_or_refused(tmp_path, file):
    tiny.write_checkpoint(tmp_path / "model")
    tiny.write_pairs(tmp_path / "pairs.jsonl", 4)
    write_rows(tmp_path / "questions.jsonl", SUMS)
    good, refused = (tmp_path / file).read_bytes(), 0
    READERS[file](tmp_path)  # unhurt it is accepted
    for case in range(CASES):
        (tmp_path / file).write_bytes(damaged(good, random.Random(f"{SEED} {case}")))
        try:
            READERS[file](tmp_path)
        except UserError as e:
            refused += 1
            assert str(tmp_path) in str(e) and len(str(e)) < 20_000
    assert refused  # the damage was damage
