"""Mutated files of every format we parse: each is read, or refused by the project's own error; never anything
else, never a hang, and nothing is written.

    pytest tests/faults/test_fuzz.py                 # the short form: some 3,000 cases, the same in every run
    FUZZ=20000 pytest tests/faults/test_fuzz.py      # the long one: that many a reader, others each time

A case starts from a real file (saved by transformers and tokenizers, or made by this project), and is damaged
up to four times: bytes flipped, cut out, repeated or put in, the end lost; or, in JSON, a value somewhere in
the tree replaced by another of any type, removed, doubled, or swapped with one of another place.
"""

import gzip
import json
import os
import random
import shutil
from collections import Counter
from pathlib import Path

import pytest
import tiny
import torch
from breaking import ROWS, at_most, files, say, shard, with_header
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import data
import eval as evaluation
import model as qwen
import oracle
import train
from data import UserError

MANY = int(os.environ.get("FUZZ", 0))
SHARED = Path(__file__).parents[3] / "shared" / "data"
COUNTS = Counter()  # (reader, how it ended): cases

# No database and no randomness of its own in the short form: what is green here is green everywhere.
fuzzing = settings(max_examples=MANY or 150, derandomize=not MANY, database=None, deadline=None,
                   suppress_health_check=list(HealthCheck))

ODD = [None, True, False, 0, 1, -1, 2**31, 2**63, -(2**63) - 1, 10**30, [2**64], 0.0, -0.5, 1e308,
       float("nan"), float("inf"), "1e999", "NaN", "", "x", "\0", "\ud800", "\N{RIGHT-TO-LEFT OVERRIDE}",
       "x" * 3000, "<|im_end|>", "../../etc/passwd", "/etc/passwd", "qwen3", [], {}, [[]], [None], {"": 0},
       [1, "a"], {"a": {"b": []}}, {"role": "user", "content": "x"}]
PIECES = [b"\0", b"\xff", b"\xed\xa0\x80", b"\xe2\x80\xa8", b"\xef\xbb\xbf", b"\x1f\x8b", b"{", b"}",
          b"[" * 1200, b'"', b",", b":", b"\n", b"\r", b"\\ud800", b"NaN", b"-Infinity", b"1e999",
          b"9" * 5000, b"null", b"<|im_start|>"]


# --- mutations: a seed makes one --------------------------------------------------------------------


def damaged_bytes(raw: bytes, rng) -> bytes:
    """One wound of a file as bytes."""
    a, b = sorted(rng.randrange(len(raw) + 1) for _ in "ab")
    how = rng.randrange(6)
    if how == 0 and raw:
        at = min(a, len(raw) - 1)
        return raw[:at] + bytes([raw[at] ^ 1 << rng.randrange(8)]) + raw[at + 1:]
    if how == 1:
        return raw[:a]
    if how == 2:
        return raw[:a] + rng.choice(PIECES) + raw[a:]
    if how == 3:
        return raw[:a] + raw[min(b, a + rng.randrange(1, 40)):]
    if how == 4:
        return raw[:a] + raw[a:min(b, a + 200)] * 2 + raw[b:]
    return raw[:a] + rng.randbytes(rng.randrange(1, 9)) + raw[a + rng.randrange(9):]


def places(value, found):
    """Every (container, key) in a JSON tree."""
    for key in (value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()):
        found.append((value, key))
        places(value[key], found)
    return found


def damaged_value(value, rng):
    """A JSON value with one place in its tree changed."""
    value = json.loads(json.dumps(value))
    all_places = places(value, [])
    if not all_places or rng.random() < 0.03:
        return rng.choice(ODD)
    # Large vocabularies would draw all the fire: choose among the tops of the tree more often.
    at = rng.choice(all_places[:50]) if rng.random() < 0.5 else rng.choice(all_places)
    container, key = at
    how = rng.randrange(5)
    if how == 0:
        other, where = rng.choice(all_places)
        container[key], other[where] = other[where], container[key]
        try:
            json.dumps(value)
        except (ValueError, RecursionError):  # a tree inside itself
            return rng.choice(ODD)
    elif how == 1:
        del container[key]
    elif how == 2 and isinstance(container, dict):
        container[rng.choice(["", "x", "\ud800", key + " "])] = container[key]
    elif how == 3 and isinstance(container[key], (int, float)) and not isinstance(container[key], bool):
        container[key] = container[key] * rng.choice([-1, 0, 2, 0.5, 10**9]) + rng.choice([0, 1, -1])
    else:
        container[key] = rng.choice(ODD)
    return value


def damaged(raw: bytes, rng) -> bytes:
    """One to four wounds; JSON, and JSON lines, are hurt as values or as bytes."""
    for _ in range(rng.randint(1, 4)):
        lines = raw.split(b"\n")
        at = rng.randrange(len(lines))
        try:
            whole = json.loads(raw) if raw[:1] == b"{" and rng.random() < 0.7 else None
            part = json.loads(lines[at]) if whole is None and rng.random() < 0.7 else None
        except (ValueError, RecursionError):
            whole = part = None
        try:
            if whole is not None:
                raw = json.dumps(damaged_value(whole, rng)).encode()
            elif part is not None:
                lines[at] = json.dumps(damaged_value(part, rng)).encode()
                raw = b"\n".join(lines)
            else:
                raw = damaged_bytes(raw, rng)
        except RecursionError:
            raw = damaged_bytes(raw, rng)
    return raw


def damaged_safetensors(raw: bytes, rng) -> bytes:
    """The header hurt as JSON, or the whole file as bytes, or its length field."""
    size = int.from_bytes(raw[:8], "little")
    how = rng.randrange(4)
    if how == 0:
        return damaged_bytes(raw[:8 + size + 64], rng) + raw[8 + size + 64:]
    if how == 1:
        return rng.choice([0, 1, size - 1, size + 1, 2**32, 2**63, 2**64 - 1]).to_bytes(8, "little") + raw[8:]
    if how == 2:
        return with_header(damaged(raw[8:8 + size], rng), raw[8 + size:])
    return damaged_bytes(raw, rng)


# --- the readers ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def w(tmp_path_factory):
    w = tmp_path_factory.mktemp("fuzz")
    tiny.write_checkpoint(w / "model")
    (w / "model" / "generation_config.json").write_text('{"eos_token_id": [258, 5], "pad_token_id": 256}')
    shutil.copytree(w / "model", w / "sharded")
    shard(w / "sharded")
    (w / "model" / "chat_template.jinja").write_text(tiny.TEMPLATE)
    tiny.write_pairs(w / "pairs.jsonl", 4)
    turns = [{"role": "system", "content": "s"}, {"role": "user", "content": "a"}]
    rows = [{"prompt": turns, "chosen": [{"role": "assistant", "content": "right"}], "rejected": "wrong"},
            {"prompt": "q", "chosen": "a", "rejected": None}]
    with open(w / "pairs.jsonl", "a") as f:
        f.writelines(json.dumps(row) + "\n" for row in rows)
    if SHARED.exists():
        with open(SHARED / "gsm8k" / "pairs.jsonl") as f, open(w / "pairs.jsonl", "a") as g:
            g.writelines(next(f) for _ in range(3))
    (w / "pairs.jsonl.gz").write_bytes(gzip.compress((w / "pairs.jsonl").read_bytes(), mtime=0))
    (w / "tasks").mkdir()
    for name, rows in ROWS.items():
        (w / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = {f.name: f.default for f in train.fields(train.Options)}
    options |= {"model": "m", "pairs": "p", "out": "o"}
    (w / "config.json").write_text(json.dumps({"options": options}))
    (w / "metrics.jsonl").write_text("".join(f'{{"step": {i}, "loss": 1.5}}\n' for i in range(6)))
    return w


def read_pairs(w):
    pairs, _ = data.read_pairs(str(w / "pairs.jsonl"))
    use_pairs(w, pairs)


def read_pairs_gz(w):
    use_pairs(w, data.read_pairs(str(w / "pairs.jsonl.gz"))[0])


def read_what_can_be_read(w):
    use_pairs(w, data.read_pairs(str(w / "pairs.jsonl"), skip_malformed=True)[0])


def use_pairs(w, pairs):
    """What is accepted must also go all the way to packs, and back into a file."""
    chat = data.load_chat(str(w / "model"), 265)
    forks, *_ = data.make_forks(pairs, chat, 3000, 1.0, False)
    for i in range(len(forks)):
        data.make_pack(forks, [i])
    json.dumps([[p.messages, p.chosen, p.rejected] for p in pairs], ensure_ascii=False).encode()


def read_config(w):
    config = qwen.read_config(str(w / "model"))
    assert all(0 < v < 1e13 for v in vars(config).values() if v is not False)


def read_chat(w):
    """A tokenizer that is accepted encodes whatever text there is."""
    chat = data.load_chat(str(w / "model"), 265)
    for text in ("a question\n", "\N{SNOWMAN} \x00 <|im_end|>", ""):
        ids = chat.prompt([{"role": "user", "content": text}])
        assert all(0 <= i < 265 for i in ids)
        chat.tokenizer.decode(ids)


def read_end_tokens(w):
    evaluation.open_local_model(str(w / "model"), torch.float32, "cpu")


def read_weights(w):
    qwen.load_model(str(w / "model"))


def read_sharded(w):
    qwen.load_model(str(w / "sharded"))


def read_questions(w):
    items, _ = oracle.read_questions(str(w / "questions.jsonl"), oracle.INSTRUCTION)
    for item in items:
        evaluation.request_for(item.id, item.messages, 0)
        evaluation.answers_match("1", item.gold)
    json.dumps([vars(item) for item in items], ensure_ascii=False).encode()


def read_errors(w):
    items, _ = oracle.read_errors(str(w / "errors.jsonl"))
    for item in items:
        for prompt in oracle.PROMPTS:
            evaluation.request_for(item.id, oracle.oracle_messages(item, prompt), 0)
    json.dumps([vars(item) for item in items], ensure_ascii=False).encode()


def read_texts(w):
    chat = data.load_chat(str(w / "model"), 265)
    rows, _ = evaluation.read_sequences(str(w / "texts.jsonl"), chat, 500)
    assert all(first < len(ids) for ids, first in rows)


def reader_of_task(name):
    def read(w):
        task = evaluation.load_task(name, str(w / "tasks"))
        for key, turn, gold in task.rows:
            evaluation.request_for(f"{key}/0", [{"role": "user", "content": turn}], 0)
            task.grade("It is \\boxed{1}, (A).", gold)
    return read


def read_options(w):
    o = train.parse_options(["--resume", "--out", str(w)])
    for f in train.fields(o):
        assert getattr(o, f.name) in (f.metadata["choices"] or [getattr(o, f.name)]), f.name
        assert "\0" not in str(getattr(o, f.name)), f.name
    train.learning_rate(0, 10, o)


def read_metrics(w):
    train.keep_steps_before(str(w / "metrics.jsonl"), 3)
    assert all(row["step"] < 3 for row in data.read_log(str(w / "metrics.jsonl")))


# name: (reader, the file that is hurt, how, cases for one of the others)
READERS = {
    "pairs": (read_pairs, "pairs.jsonl", damaged, 2),
    "pairs, malformed ones skipped": (read_what_can_be_read, "pairs.jsonl", damaged, 1),
    "pairs.gz": (read_pairs_gz, "pairs.jsonl.gz", damaged_bytes, 1),
    "config.json": (read_config, "model/config.json", damaged, 2),
    "tokenizer.json": (read_chat, "model/tokenizer.json", damaged, 2),
    "tokenizer_config.json": (read_chat, "sharded/tokenizer_config.json", damaged, 0.5),
    "chat_template.jinja": (read_chat, "model/chat_template.jinja", damaged_bytes, 1),
    "generation_config.json": (read_end_tokens, "model/generation_config.json", damaged, 0.5),
    "safetensors": (read_weights, "model/model.safetensors", damaged_safetensors, 2),
    "a shard": (read_sharded, "sharded/model-00002-of-00002.safetensors", damaged_safetensors, 0.5),
    "index": (read_sharded, "sharded/model.safetensors.index.json", damaged, 1),
    "questions": (read_questions, "questions.jsonl", damaged, 1),
    "errors": (read_errors, "errors.jsonl", damaged, 0.5),
    "texts": (read_texts, "texts.jsonl", damaged, 0.5),
    **{name: (reader_of_task(name), f"tasks/{name}.jsonl", damaged, 0.5)
       for name in ("math500", "gpqa", "ifeval", "connect4")},
    "options of a run": (read_options, "config.json", damaged, 2),
    "metrics.jsonl": (read_metrics, "metrics.jsonl", damaged, 0.5),
}


@pytest.mark.parametrize("name", READERS)
def test_damaged_files_are_read_or_refused(w, name):
    read, file, damage, share = READERS[name]
    good = (w / file).read_bytes()
    if name == "tokenizer_config.json":  # the folder without chat_template.jinja
        def read(w):
            data.load_chat(str(w / "sharded"), 265)
    read(w)  # unhurt it is accepted, whatever else it does
    (w / file).write_bytes(good)
    before = files(w)

    @settings(fuzzing, max_examples=max(1, int(fuzzing.max_examples * share)))
    @given(st.integers(0, 2**64 - 1))
    def check(seed):
        rng = random.Random(seed)
        (w / file).write_bytes(damage(good, rng))
        try:
            with at_most(20):
                read(w)
            COUNTS[name, "read"] += 1
        except UserError as e:
            COUNTS[name, "refused"] += 1
            assert str(w) in str(e) or name == "options of a run", f"no file in {e}"
            assert len(str(e)) < 20_000
        now = files(w)
        assert now.keys() == before.keys()
        assert all(now[k] == before[k] for k in before if k != file)

    try:
        check()
    finally:
        (w / file).write_bytes(good)


@pytest.fixture(scope="module", autouse=True)
def say_how_many(request):
    yield
    refused = sum(n for (_, how), n in COUNTS.items() if how == "refused")
    say(request, f"fuzz: {COUNTS.total()} cases of {len({k[0] for k in COUNTS})} readers, {refused} refused, "
                 f"{COUNTS.total() - refused} read")
