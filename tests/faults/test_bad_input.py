"""Every reader of the project against every class of failure that applies to it: one table.

A row of the table is one cell: the reader, the class, the program that is started as from the command line,
what is broken in the world of breaking.py, and what the message must say. Each cell asserts that the program
ends with the project's own error (no traceback), that the message names file, place and finding, and that
not a byte anywhere has changed.
"""

import json
import re
import shutil

import pytest
from breaking import (
    build,
    command,
    cut,
    edit,
    files,
    flip,
    folder,
    gone,
    holds,
    keys,
    line,
    link,
    program,
    replace,
    say,
    tensor,
)
from misbehaving import Misbehaving, completion

import data
import oracle
from data import UserError

CLASSES = ("missing", "empty", "truncated", "type", "shape", "encoding", "contradictory", "hostile", "huge")
DEEP = "[" * 100_000 + "]" * 100_000
DIGITS = "9" * 5000  # more than Python turns into an integer
MODEL, INDEX = "model/model.safetensors", "sharded/model.safetensors.index.json"
STEP, EMBED = "run/checkpoints/step_000003/", "model.embed_tokens.weight"
SHARD, RAW = STEP + "shard_0.safetensors", "a/own/raw-0.jsonl"
PAIR = {"prompt": "q", "chosen": "good", "rejected": "bad"}


def weight_map(change):
    """A breakage of the index: `change(weight_map)`."""
    return edit(INDEX, lambda index: change(index["weight_map"]))


def rehashed(path, breakage):
    """A breakage of a checkpoint's shard by one who also writes the hash of it: state.json agrees."""
    def do(w):
        import train
        breakage(w)
        edit(STEP + "state.json", lambda s: s.update(sha256=[train.file_sha256(w / path)]))(w)
    return do


def cache_with(change):
    """The reference cache with other tensors, {name: tensor} changed in place, and a hash that agrees."""
    def do(w):
        from safetensors import safe_open
        from safetensors.torch import load_file, save_file

        import train
        path = str(w / "run/reference.safetensors")
        with safe_open(path, "pt") as f:
            metadata = f.metadata()
        tensors = load_file(path)
        change(tensors)
        content = train.sha256(*(memoryview(tensors[k].numpy()) for k in sorted(tensors)))
        save_file(tensors, path, {**metadata, "content": content})
    return do


# reader, class, program, breakage, what the message must match
CELLS = [
    # --- pairs: what train.py reads; the held-out ones are .gz ---
    ("pairs", "missing", "train", gone("pairs.jsonl"),
     r"--pairs \S+pairs.jsonl: cannot be read: no such file"),
    ("pairs", "missing", "train", folder("pairs.jsonl"), r"pairs.jsonl: cannot be read"),
    ("pairs", "empty", "train", holds("pairs.jsonl", ""), r"pairs.jsonl: the file is empty"),
    ("pairs", "empty", "train", line("pairs.jsonl", {"gemini_corrected_answer": " \n"[1:] * 2}),
     r"pairs.jsonl: 1 malformed .*\n  line 2: 'gemini_corrected_answer' is empty"),
    ("pairs", "truncated", "train", cut("pairs.jsonl", -20),
     r"pairs.jsonl.*\n  line 8: not valid JSON in UTF-8"),
    ("pairs", "type", "train", line("pairs.jsonl", "[1]"), r"line 2: a JSON object expected, found list"),
    ("pairs", "type", "train", line("pairs.jsonl", {"question": {"a": 1}}),
     r"line 2: 'question', message 0: a string expected, found dict"),
    ("pairs", "type", "train", line("pairs.jsonl", {"is_correct": 1}),
     r'line 2: "is_correct": true or false expected, found 1'),
    ("pairs", "shape", "train", line("pairs.jsonl", {"original_answer": ...}),
     r"line 2: missing 'original_answer'"),
    ("pairs", "shape", "train", line("pairs.jsonl", {"question": [{"role": "tool", "content": "x"}]}),
     r"line 2: 'question', message 0: role system, user or assistant"),
    ("pairs", "encoding", "train", line("pairs.jsonl", json.dumps(PAIR).encode("utf-16")),
     r"line 2: not valid JSON"),
    ("pairs", "encoding", "train", line("pairs.jsonl", b'{"prompt": "caf\xe9"}'),
     r"line 2: .*can't decode byte 0xe9"),
    ("pairs", "encoding", "train", line("pairs.jsonl", json.dumps({**PAIR, "chosen": "\ud800"})),
     r"line 2: 'chosen': holds a lone surrogate"),
    ("pairs", "contradictory", "train", line("pairs.jsonl", {**PAIR, "prompt": [
        {"role": "user", "content": "q"}], "chosen": [{"role": "user", "content": "other"}, {
            "role": "assistant", "content": "a"}], "question": ..., "original_answer": ...,
        "gemini_corrected_answer": ...}),
     r"line 2: 'chosen': .* \(the prompt's messages may stand before it\)"),
    ("pairs", "contradictory", "train", line("pairs.jsonl", '{"prompt": "q", "chosen": "a", "chosen": "b", '
                                             '"rejected": "c"}'), r"line 2: .*'chosen' twice"),
    ("pairs", "hostile", "train", line("pairs.jsonl", DEEP), r"line 2: not valid JSON .*recursion"),
    ("pairs", "hostile", "train", line("pairs.jsonl", {"question": float("nan")}),
     r"line 2: 'question'.* found float"),
    ("pairs", "hostile", "train", line("pairs.jsonl", f'{{"prompt": {DIGITS}}}'),
     r"line 2: not valid JSON.*digits"),
    ("pairs", "huge", "train", holds("pairs.jsonl", json.dumps({**PAIR, "prompt": "a" * 10**6})),
     r"pairs.jsonl: 0 of 1 rows kept\n.*longer than max_length"),
    ("pairs.gz", "empty", "train", holds("held.jsonl.gz", ""), r"held.jsonl.gz: the file is empty"),
    ("pairs.gz", "truncated", "train", cut("held.jsonl.gz", -12),
     r"held.jsonl.gz: cannot be read: .*end-of-stream"),
    ("pairs.gz", "type", "train", lambda w: (w / "held.jsonl.gz").write_text("text"),
     r"held.jsonl.gz: cannot be read: Not a gzipped file"),
    ("pairs.gz", "hostile", "train", flip("held.jsonl.gz", 200), r"held.jsonl.gz: "),
    ("pairs.gz", "huge", "train", holds("held.jsonl.gz", b" " * 2**27 + b"{}\n"),
     r"held.jsonl.gz: line 1 is longer than \d+ MiB"),

    # --- questions, errors, hand-made corrections: what oracle.py reads ---
    ("questions", "missing", "elicit", gone("questions.jsonl"),
     r"questions.jsonl: cannot be read: No such file"),
    ("questions", "empty", "elicit", holds("questions.jsonl", "\n\n"), r"questions.jsonl: the file is empty"),
    ("questions", "empty", "elicit", line("questions.jsonl", {"question": ""}),
     r"line 2: 'question': a non-empty"),
    ("questions", "truncated", "elicit", cut("questions.jsonl", -5),
     r"questions.jsonl.*\n  line 3: not valid JSON"),
    ("questions", "type", "elicit", line("questions.jsonl", {"answer": True}),
     r"line 2: a gold answer expected"),
    ("questions", "shape", "elicit", line("questions.jsonl", {"question": ...}),
     r"line 2: question, problem or prompt expected, found \['answer'\]"),
    ("questions", "encoding", "elicit", line("questions.jsonl", b"\xff\xfe"),
     r"line 2: not valid JSON in UTF-8"),
    ("questions", "contradictory", "elicit", holds("questions.jsonl", "".join(
        json.dumps({"id": 7, "question": f"{i}?", "answer": "1"}) + "\n" for i in (1, 2))),
     r"questions.jsonl: 1 ids occur more than once, first '7'"),
    ("questions", "hostile", "elicit", line("questions.jsonl", '{"question": "q", "answer": Infinity}'),
     r"line 2: a gold answer expected.* found inf"),
    ("questions", "huge", "elicit", line("questions.jsonl", {"answer": "1" * 10**6}),
     r"line 2: 'answer': no final"),
    ("errors", "type", "rectify", line("errors.jsonl", {"original_answer": 5}),
     r"line 2: 'original_answer': a string"),
    ("errors", "encoding", "rectify", line("errors.jsonl", {"id": "\ud800"}),
     r'line 2: "id": holds a lone surrogate'),
    ("edited", "type", "edited", line("edited.jsonl", {"corrected_answer": 5}, 1),
     r"edited.jsonl.*\n  line 1: 'corrected_answer': a string expected, found int"),
    ("texts", "missing", "retention", gone("texts.jsonl"), r"texts.jsonl: cannot be read"),
    ("texts", "empty", "retention", holds("texts.jsonl", '{"text": ""}\n'),
     r"texts.jsonl: 0 texts.* no row has a token to score"),
    ("texts", "type", "retention", line("texts.jsonl", {"text": 5}),
     r"line 2: 'text': a string expected, found int"),
    ("texts", "hostile", "retention", line("texts.jsonl", {"text": "\udfff"}),
     r"line 2: 'text': holds a lone surrogate"),

    # --- config.json of a checkpoint ---
    ("config.json", "missing", "train", gone("model/config.json"), r"model/config.json is missing"),
    ("config.json", "missing", "train", gone("model"), r"model is no folder: a folder with config.json"),
    ("config.json", "missing", "train", keys("model/config.json", hidden_size=...),
     r'"hidden_size": a whole number above 0'),
    ("config.json", "empty", "train", holds("model/config.json", ""),
     r"model/config.json: Expecting value: line 1"),
    ("config.json", "truncated", "train", cut("model/config.json", 99),
     r"model/config.json: .* line \d+ column"),
    ("config.json", "type", "train", holds("model/config.json", "[]"),
     r"model/config.json: a JSON object expected"),
    ("config.json", "type", "train", keys("model/config.json", num_hidden_layers="2"),
     r"""model/config.json (.|\n)*\n  "num_hidden_layers": a whole number above 0 .* found '2'"""),
    ("config.json", "shape", "train", keys("model/config.json", num_key_value_heads=3),
     r"config.json: 4 query heads on 3 key heads"),
    ("config.json", "encoding", "train", holds("model/config.json", '{"a": 1}'.encode("utf-16")),
     r"model/config.json: .*(codec can't decode|BOM)"),
    ("config.json", "contradictory", "train", keys("model/config.json", intermediate_size=96),
     r"mlp.up_proj.weight is \(64, 32\), config.json says \(96, 32\)"),
    ("config.json", "contradictory", "train", keys("model/config.json", rope_theta=1e4,
                                                   rope_parameters={"rope_theta": 1e6}),
     r'config.json .*\n  "rope_theta" and "rope_parameters" contradict'),
    ("config.json", "contradictory", "train", keys("model/config.json", layer_types=["full_attention"] * 3),
     r'config.json: "layer_types" is .* "num_hidden_layers" \(2\) times'),
    ("config.json", "hostile", "train", keys("model/config.json", auto_map={"AutoModel": "x--evil.Model"}),
     r'"auto_map": .* is unknown and might'),
    ("config.json", "hostile", "train", replace("model/config.json", '"hidden_size": 32',
     '"hidden_size": NaN'),
     r'"hidden_size": a whole number above 0 .* found nan'),
    ("config.json", "hostile", "train", holds("model/config.json", f'{{"a": {DEEP}}}'),
     r"config.json: .*recursion"),
    ("config.json", "huge", "train", keys("model/config.json", vocab_size=2**22, hidden_size=2**22),
     r"weights do not fit config.json:(.|\n)*wrong shape: model.embed_tokens.weight is \(265, 32\)"),
    ("config.json", "huge", "retention", keys("model/config.json", vocab_size=2**20, hidden_size=2**18),
     r"weights do not fit config.json:(.|\n)*wrong shape: model.embed_tokens.weight is \(265, 32\)"),

    # --- tokenizer.json, chat template, generation_config.json ---
    ("tokenizer.json", "missing", "train", gone("model/tokenizer.json"), r"model/tokenizer.json is missing"),
    ("tokenizer.json", "empty", "train", holds("model/tokenizer.json", "{}"),
     r"model/tokenizer.json: not a tokenizer"),
    ("tokenizer.json", "truncated", "train", cut("model/tokenizer.json", 3000),
     r"model/tokenizer.json: .* line \d+"),
    ("tokenizer.json", "type", "train", keys("model/tokenizer.json", model={"type": "BPE", "vocab": [],
     "merges": []}),
     r"model/tokenizer.json: not a tokenizer"),
    ("tokenizer.json", "encoding", "train", holds("model/tokenizer.json", b'{"a": "\xff"}'),
     r"tokenizer.json: 'utf-8'"),
    ("tokenizer.json", "contradictory", "train",
     edit("model/tokenizer.json", lambda t: t["added_tokens"].pop(2)),
     r"model/tokenizer.json: lacks the token '<\|im_end\|>'"),
    ("tokenizer.json", "contradictory", "train", keys("model/config.json", vocab_size=200),
     r"tokenizer.json: holds token id 260, but the model's vocabulary has 200"),
    ("tokenizer.json", "hostile", "train", edit("model/tokenizer.json", lambda t: t["added_tokens"][2].update(
        special=False)), r"tokenizer.json: .*'<\|im_end\|>' .*special"),
    ("tokenizer.json", "hostile", "train", holds("model/tokenizer.json", f'{{"model": {DEEP}}}'),
     r"tokenizer.json: "),
    ("tokenizer.json", "huge", "train",
     edit("model/tokenizer.json", lambda t: t["added_tokens"][4].update(id=2**40)),
     r"model/tokenizer.json: not a tokenizer"),
    ("template", "missing", "train", gone("model/tokenizer_config.json"),
     r"tokenizer_config.json is missing"),
    ("template", "empty", "train", holds("model/chat_template.jinja", ""),
     r"chat_template.jinja: a Qwen3 chat template"),
    ("template", "truncated", "train", cut("model/tokenizer_config.json", 50), r"tokenizer_config.json: "),
    ("template", "type", "train", keys("model/tokenizer_config.json", chat_template=[{"name": "a",
     "template": "b"}]),
     r"tokenizer_config.json: a Qwen3 chat template"),
    ("template", "encoding", "train", holds("model/chat_template.jinja", b"<|im_start|>\xff"),
     r"chat_template.jinja: not UTF-8 text"),
    ("template", "contradictory", "train", holds("model/chat_template.jinja",
     "<|im_start|>{{ add_generation_prompt "
                                                 "}}<think>\n"),
     r"chat_template.jinja: .* always opens a <think>"),
    ("template", "hostile", "train", holds("model/chat_template.jinja", "{{ ''.__class__.__mro__[1] }}"),
     r"chat_template.jinja: a Qwen3 chat template"),
    ("generation", "type", "elicit", holds("model/generation_config.json", {"eos_token_id": "<|im_end|>"}),
     r"generation_config.json: \"eos_token_id\": an integer or a list .* found '<\|im_end\|>'"),
    ("generation", "truncated", "elicit", cut("model/generation_config.json", 9),
     r"generation_config.json: "),
    ("generation", "hostile", "elicit", holds("model/generation_config.json", '{"eos_token_id": [NaN]}'),
     r'generation_config.json: "eos_token_id": .* found \[nan\]'),

    # --- safetensors: the weights of a checkpoint ---
    ("safetensors", "missing", "train", gone(MODEL), r"model: neither model.safetensors nor .*index.json"),
    ("safetensors", "missing", "train", lambda w: (w / MODEL).rename(w / "model/pytorch_model.bin"),
     r"weights in pickle formats are not read"),
    ("safetensors", "empty", "train", holds(MODEL, b""),
     r"model.safetensors is missing, truncated or corrupt"),
    ("safetensors", "truncated", "train", cut(MODEL, 5), r"model.safetensors is missing, truncated .*header"),
    ("safetensors", "truncated", "train", cut(MODEL, 200),
     r"model.safetensors is missing, truncated .*header"),
    ("safetensors", "truncated", "train", cut(MODEL, -1),
     r"model.safetensors is missing, truncated or corrupt"),
    ("safetensors", "type", "train", tensor(MODEL, "model.norm.weight", dtype="I32"),
     r"wrong type: model.norm.weight is I32, F32/BF16/F16 expected"),
    ("safetensors", "type", "train", tensor(MODEL, 0, dtype="QQ"), r"model.safetensors .*corrupt: .*QQ"),
    ("safetensors", "shape", "train", tensor(MODEL, EMBED, shape=[32, 265]),
     r"wrong shape: model.embed_tokens.weight is \(32, 265\), config.json says \(265, 32\)"),
    ("safetensors", "shape", "train", tensor(MODEL, 0, shape=[2**40, 2**40]), r"model.safetensors .*corrupt"),
    ("safetensors", "shape", "train", tensor(MODEL, 0, shape=[-1]), r"model.safetensors .*corrupt"),
    ("safetensors", "encoding", "train", tensor(MODEL, raw_header=lambda h: json.dumps(h).encode() + b"\xff"),
     r"model.safetensors .*corrupt: .*(header|UTF)"),
    ("safetensors", "contradictory", "train", tensor(MODEL, raw_header=lambda h: {
        ("x" if k == "model.norm.weight" else k): v for k, v in h.items()}),
     r"missing: model.norm.weight \(32,\)\n  unexpected: x \(32,\)"),
    ("safetensors", "contradictory", "train", tensor(MODEL, 1, data_offsets=[0, 8]),
     r"model.safetensors .*corrupt"),
    ("safetensors", "hostile", "train", lambda w: (w / MODEL).write_bytes((2**63).to_bytes(8,
     "little") + b"{}"),
     r"model.safetensors .*corrupt: .*header too large"),
    ("safetensors", "hostile", "train", tensor(MODEL, 0, data_offsets=[-8, 0]),
     r"model.safetensors .*corrupt"),
    ("safetensors", "hostile", "train", tensor(MODEL, 0, data_offsets=[8, 0]),
     r"model.safetensors .*corrupt"),
    ("safetensors", "hostile", "train", tensor(MODEL, 0, data_offsets=[0, 2**62]),
     r"model.safetensors .*corrupt"),
    ("safetensors", "hostile", "train", tensor(MODEL, raw_header=lambda h: DEEP.encode()),
     r"model.safetensors .*corrupt"),
    ("safetensors", "hostile", "train", tensor(MODEL, data=lambda d: d + b"PK\3\4 a second life"),
     r"model.safetensors .*corrupt"),
    ("safetensors", "hostile", "train", link(MODEL, "/etc/passwd"),
     r"model.safetensors .*corrupt: (?!.*root:)"),
    ("safetensors", "huge", "train", lambda w: (w / MODEL).write_bytes((2**28).to_bytes(8,
     "little") + b" " * 2**10),
     r"model.safetensors .*corrupt: .*header"),

    # --- model.safetensors.index.json ---
    ("index", "missing", "sharded", gone("sharded/model-00002-of-00002.safetensors"),
     r"sharded/model-00002-of-00002.safetensors is missing"),
    ("index", "empty", "sharded", holds(INDEX, {"weight_map": {}}),
     r"sharded: weights do not fit .*\n  missing: model"),
    ("index", "truncated", "sharded", cut(INDEX, -9), r"index.json: .* line \d+ column"),
    ("index", "type", "sharded", holds(INDEX, {"weight_map": ["a"]}),
     r'index.json: "weight_map", an object of file names'),
    ("index", "hostile", "sharded", link("sharded/model-00001-of-00002.safetensors", "/etc/passwd"),
     r"sharded/model-00001-of-00002.safetensors is missing, truncated or corrupt"),

    # --- what --resume reads: config.json, state.json, shards, reference cache, metrics ---
    ("run config", "missing", "resume", gone("run/config.json"), r"--model is required"),
    ("run config", "empty", "resume", holds("run/config.json", "{}"),
     r"run/config.json: no options of this program"),
    ("run config", "truncated", "resume", cut("run/config.json", 80), r"run/config.json: .* line \d+ column"),
    ("run config", "type", "resume", edit("run/config.json", lambda c: c["options"].update(lr="fast")),
     r"run/config.json: no options of this program \(lr\)"),
    ("run config", "contradictory", "resume",
     edit("run/config.json", lambda c: c["hashes"].update(weights="0" * 64)),
     r"run belongs to other weights than given now"),
    ("run config", "contradictory", "resume",
     edit("run/config.json", lambda c: c["options"].update(loss="foo")),
     r"run/config.json: no options of this program \(loss\)"),
    ("run config", "hostile", "resume", edit("run/config.json", lambda c: c["options"].update(dtype="load")),
     r"run/config.json: no options of this program \(dtype\)"),
    ("run config", "hostile", "resume", edit("run/config.json", lambda c: c["options"].update(pairs="a\0b")),
     r"pairs.* NUL"),
    ("state.json", "missing", "resume", gone(STEP + "state.json"), r"step_000003/state.json is missing"),
    ("state.json", "empty", "resume", holds(STEP + "state.json", ""),
     r"step_000003/state.json: Expecting value"),
    ("state.json", "truncated", "resume", cut(STEP + "state.json", 40), r"step_000003/state.json: .* line"),
    ("state.json", "type", "resume", keys(STEP + "state.json", step="3"), r"state.json is no state .*: step"),
    ("state.json", "shape", "resume", keys(STEP + "state.json", sha256=[]),
     r"state.json is no state .*: sha256"),
    ("state.json", "shape", "resume", keys(STEP + "state.json", sha256=[], shards=0),
     r"state.json is no state .*shards"),
    ("state.json", "contradictory", "resume",
     edit(STEP + "state.json", lambda s: s["hashes"].update(pairs="0")),
     r"step_000003 belongs to other pairs than given now"),
    ("state.json", "contradictory", "resume", keys(STEP + "state.json", step=2),
     r"state.json is no state .*: step"),
    ("state.json", "hostile", "resume", keys(STEP + "state.json", step=-1),
     r"state.json is no state .*: step"),
    ("state.json", "hostile", "resume", keys(STEP + "state.json", delta=float("nan")),
     r"state.json is no state .*: delta"),
    ("state.json", "huge", "resume", keys(STEP + "state.json", step=10**30),
     r"state.json is no state .*: step"),
    ("state.json", "huge", "resume", keys(STEP + "state.json", shards=10**9),
     r"state.json is no state .*: sha256"),
    ("shard", "missing", "resume", gone(SHARD), r"No such file .*shard_0.safetensors"),
    ("shard", "truncated", "resume", cut(SHARD, -1), r"shard_0.safetensors is corrupt: its hash"),
    ("shard", "hostile", "resume", flip(SHARD, -1), r"shard_0.safetensors is corrupt: its hash"),
    ("shard", "type", "resume", rehashed(SHARD, holds(SHARD, b"no tensors")),
     r"shard_0.safetensors .*corrupt"),
    ("shard", "shape", "resume", rehashed(SHARD, tensor(SHARD, "norm.weight", shape=[4, 8])),
     r"shard_0.safetensors.*: norm.weight"),
    ("shard", "contradictory", "resume", rehashed(SHARD, tensor(SHARD, raw_header=lambda h: {
        ("x" if k == "norm.weight" else k): v for k, v in h.items()})), r"shard_0.safetensors.* norm.weight"),
    ("reference", "missing", "resume", gone("run/reference.safetensors"),
     r"run/reference.safetensors is missing or of other weights or pairs"),
    ("reference", "empty", "resume", holds("run/reference.safetensors", b""),
     r"run/reference.safetensors.*corrupt"),
    ("reference", "truncated", "resume", cut("run/reference.safetensors", -8),
     r"run/reference.safetensors.*corrupt"),
    ("reference", "hostile", "resume", flip("run/reference.safetensors", -1),
     r"run/reference.safetensors is corrupt"),
    ("reference", "contradictory", "resume", replace("run/reference.safetensors", '"hashes"', '"hashed"'),
     r"run/reference.safetensors is missing or of other weights"),
    ("reference", "shape", "resume", cache_with(lambda t: t.update(pairs=t["pairs"][:3])),
     r"run/reference.safetensors is .*"),
    ("reference", "type", "resume", cache_with(lambda t: t.pop("eval_pairs")),
     r"run/reference.safetensors is .*"),
    ("metrics", "missing", "resume", folder("run/metrics.jsonl"),
     r"run/metrics.jsonl: cannot be read: Is a directory"),
    ("metrics", "missing", "report", gone("run/metrics.jsonl"), r"run: no run \(metrics.jsonl\) and no eval"),
    ("metrics", "truncated", "report", line("run/metrics.jsonl", b'{"step": 1, "lo', 2),  # not the last
     r"run/metrics.jsonl, line 2: "),

    # --- benchmark files and finished evaluations ---
    ("math task", "missing", "math500", gone("tasks/math500.jsonl"), r"tasks/math500.jsonl: cannot be read"),
    ("math task", "empty", "math500", holds("tasks/math500.jsonl", ""),
     r"tasks/math500.jsonl: the file is empty"),
    ("math task", "truncated", "math500", cut("tasks/math500.jsonl", -4),
     r"math500.jsonl.*\n  line 3: not valid JSON"),
    ("math task", "type", "math500", line("tasks/math500.jsonl", {"answer": {}}),
     r"line 2: a gold answer expected"),
    ("math task", "contradictory", "math500", holds("tasks/math500.jsonl", (json.dumps(
        {"id": "x", "problem": "p", "answer": "1"}) + "\n") * 2),
     r"math500.jsonl: 1 ids occur more than once, first 'x'"),
    ("math task", "hostile", "math500", line("tasks/math500.jsonl", {"problem": "\ud800"}),
     r"line 2: 'problem'.*surrogate"),
    ("gpqa", "shape", "gpqa", line("tasks/gpqa.jsonl", {"Incorrect Answer 3": " "}),
     r"gpqa.jsonl.*\n  line 2: .*a choice is empty"),
    ("gpqa", "type", "gpqa", line("tasks/gpqa.jsonl", {"Correct Answer": 5}),
     r"line 2: 'Correct Answer': a string expected"),
    ("gpqa", "contradictory", "gpqa", line("tasks/gpqa.jsonl", {"Correct Answer": "b"}),
     r"line 2: .*the right choice is there twice"),
    ("ifeval", "shape", "ifeval", line("tasks/ifeval.jsonl", {"kwargs": [{}, {}]}),
     r"line 2: .*two lists of one length"),
    ("ifeval", "type", "ifeval", line("tasks/ifeval.jsonl", {"instruction_id_list": [5]}),
     r"line 2: .*no instruction 5 with"),
    ("ifeval", "encoding", "ifeval", line("tasks/ifeval.jsonl", {"key": "\ud800"}),
     r"line 2: .*key.*surrogate"),
    ("connect4", "shape", "connect4", line("tasks/connect4.jsonl", {"state": "no board"}),
     r"connect4.jsonl.*\n  line 2: 'state': not in the layout"),
    ("connect4", "contradictory", "connect4", line("tasks/connect4.jsonl", {"answer": [[[0, 0]], [[9, 9]]]}),
     r"line 2: 'answer': by the rules it is"),
    ("settings", "truncated", "again", cut("a/settings.json", 20), r"a/settings.json: .* line"),
    ("settings", "contradictory", "again", keys("a/settings.json", seed=5),
     r"other settings.*\n  seed was 5, now 0"),
    ("samples", "truncated", "again", line(RAW, '{"key": "n0', 1), r"own/raw-0.jsonl, line 1: "),
    ("samples", "contradictory", "again", line(RAW, {"key": "other"}, 1),
     r"own/raw-0.jsonl: answers 'other', which is not among"),
    ("results", "missing", "compare", gone("b/results.json"), r"b/results.json is missing"),
    ("results", "empty", "compare", holds("b/results.json", "{}"), r"nothing to compare: \S+/a has own"),
    ("results", "truncated", "compare", cut("b/results.json", 99), r"b/results.json: .* line"),
    ("results", "type", "compare", holds("b/results.json", {"own": 5}), r"b/results.json: .*own"),
    ("results", "shape", "compare", edit("b/results.json", lambda r: r["own"].pop("scores")),
     r"b/results.json: .*own"),
]


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """The world before anything is broken; made when the first cell asks for it."""
    return tmp_path_factory.mktemp("good") / "world"


@pytest.fixture
def world(good, tmp_path):
    """A copy of the good world, whose recorded paths lead to the copy."""
    if not good.exists():
        good.mkdir()
        build(good)
    w = tmp_path / "world"
    shutil.copytree(good, w, symlinks=True)
    edit("run/config.json", lambda c: c["options"].update(
        model=str(w / "model"), pairs=str(w / "pairs.jsonl"), eval_pairs=str(w / "held.jsonl.gz"),
        out=str(w / "run")))(w)
    return w


@pytest.mark.parametrize("name", ["train", "resume", "elicit", "rectify", "edited", "retention", "sharded",
                                  "again", "compare", "report", "gpqa", "ifeval", "connect4", "math500"])
def test_unbroken_every_program_succeeds(world, name):
    """Else a cell could pass for a reason of its own."""
    module, argv = command(name, world)
    ending = program(module, *argv)
    assert ending.code == 0, ending.said


@pytest.mark.parametrize("reader,kind,name,breakage,message", CELLS,
                         ids=[f"{i:03} {c[0]}: {c[1]}" for i, c in enumerate(CELLS)])
def test_bad_input_is_named_and_nothing_is_written(world, reader, kind, name, breakage, message):
    breakage(world)
    before = files(world)
    module, argv = command(name, world)
    ending = program(module, *argv)
    assert ending.code in (1, 2), f"not refused:\n{ending.said[-2000:]}"
    assert ending.code == 2 or isinstance(ending.error, (UserError, OSError)), repr(ending.error)
    said = ending.said[ending.said.index("error: "):]
    assert re.search(message, said), said[:2000]
    assert "Traceback" not in ending.said and len(said) < 10_000
    assert files(world) == before


def test_the_table_is_whole(request):
    """Every class occurs, and every reader the issue names has cells."""
    assert {c[1] for c in CELLS} == set(CLASSES)
    say(request, f"bad input: {len(CELLS)} cells of files, {len(ANSWERS) + len(MODELS)} of API answers, "
                 f"{len(TOLERATED)} kinds of damage that is none")
    assert len(CELLS) + len(ANSWERS) >= 80


# --- what a server answers ------------------------------------------------------------------------

KEY = "sk-recognisable-0123456789abcdef"
# class, the answer to every request, exit code, what the reason or the message must match
ANSWERS = [
    ("missing", b"", 0, "JSONDecodeError|UnicodeDecodeError|ValueError"),
    ("missing", {"choices": [{"message": {}}]}, 0, "no text between the markers"),
    ("empty", {}, 0, "no chat completion"),
    ("empty", completion(""), 0, "no text between the markers"),
    ("truncated", "truncated", 0, "IncompleteRead"),
    ("truncated", json.dumps(completion("x")).encode()[:-9], 0, "JSONDecodeError|UnicodeDecodeError|ValueError"),
    ("encoding", {"error": "\ud800 lone"}, 0, "HTTP 200 with an error: . lone"),
    ("type", b"[]", 0, "no chat completion"),
    ("type", completion({"a": 1}), 0, "the answer's content is a dict, not text"),
    ("shape", {"choices": {"0": 1}}, 0, "no chat completion"),
    ("shape", {"choices": [{"message": ["x"]}]}, 0, "no chat completion"),
    ("encoding", '{"choices": "café"}'.encode("latin-1"), 0, "JSONDecodeError|UnicodeDecodeError|ValueError"),
    ("encoding", completion("\ud800 lone"), 0, "no text between the markers"),
    ("contradictory", {**completion("x"), "choices": [], "error": None}, 0,
     "no chat completion"),
    ("contradictory", {"error": "but status 200"}, 0,
     "HTTP 200 with an error: but status 200"),
    ("contradictory", (200, {"Content-Length": "-5"}, b"{}"), 0, "IncompleteRead|JSONDecodeError|no chat completion"),
    ("hostile", f'{{"choices": {DIGITS}}}'.encode(), 0, "JSONDecodeError|UnicodeDecodeError|ValueError"),
    ("hostile", b'{"choices": NaN}', 0, "no chat completion"),
    ("hostile", completion("x", finish={"a": []}), 0,
     "the server ended the answer with \"\\{'a': \\[\\]\\}\""),
    ("hostile", (302, {"Location": "http://127.0.0.1:1/"}, b""), 0, "HTTP 302"),
    ("hostile", (400, {}, b" " * 1990 + KEY.encode()), 0, "HTTP 400: (?!.*sk-recog)"),
    ("hostile", (401, {}, KEY.encode()), 1,
     r"chat/completions: the key in OPENAI_API_KEY is missing or wrong"),
    ("huge", (400, {}, b"x" * 10**6), 0, "HTTP 400: x{300}"),
]


@pytest.mark.parametrize("kind,answer,code,reason", ANSWERS,
                         ids=[f"{i:02} {c[0]}" for i, c in enumerate(ANSWERS)])
def test_bad_answers_of_a_server_are_named_and_make_no_pair(world, monkeypatch, kind, answer, code, reason):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    line("errors.jsonl", "", 2)(world)  # two questions will do
    before = files(world)
    with Misbehaving(lambda *_: answer) as server:
        ending = program(oracle, "rectify", "--errors", world / "errors.jsonl", "--tokenizer",
                         world / "model", "--out", world / "out", "--server", server.url, "--tries", "1",
                         "--workers", "1")
    after = files(world)
    assert after["out/pairs.jsonl"] == b""
    rows = [json.loads(row) for row in after["out/rejected.jsonl"].splitlines()]
    said = [row["reason"] for row in rows] if code == 0 else [ending.said]
    unanswered = all(text.startswith("request failed") for text in said)  # and that is no success
    assert ending.code == (code or unanswered) and "Traceback" not in ending.said, ending.said
    assert len(said) == (1 if code else 2) and all(re.search(reason, text) for text in said), said
    assert all(KEY.encode() not in content for content in after.values() if content)
    assert {k: v for k, v in after.items() if not k.startswith("out")} == before


MODELS = {"missing": {}, "empty": {"data": []}, "type": {"data": "x"},
          "contradictory": {"data": [{"id": "a"}, {"id": "b"}]},
          "huge": {"data": [{"id": "x" * 10**5}] * 2}}


@pytest.mark.parametrize("kind", MODELS)
def test_bad_lists_of_models_are_named(monkeypatch, kind):
    import eval as evaluation

    answer = MODELS[kind] if isinstance(MODELS[kind], bytes) else json.dumps(MODELS[kind]).encode()
    with Misbehaving(None) as server:
        handler = server.server.RequestHandlerClass
        monkeypatch.setattr(handler, "do_GET", lambda self: self.send(200, {}, answer))
        with pytest.raises(UserError, match="with --server_model") as e:
            evaluation.open_server(server.url, tries=1)
    assert server.url in str(e.value) and len(str(e.value)) < 500


# --- damage that is no error: what a kill leaves, and what is allowed -----------------------------


def as_the_hub_keeps_it(w):
    """The hub's cache: a snapshot folder of links into a folder of blobs beside it."""
    (w / "blobs").mkdir()
    for path in list((w / "model").iterdir()):
        path.rename(w / "blobs" / path.name)
        path.symlink_to(f"../blobs/{path.name}")


TOLERATED = {
    "a torn last line of a raw log": ("again", cut(RAW, -7)),
    "a torn last line of metrics.jsonl": ("resume", cut("run/metrics.jsonl", -7)),
    "odd lines in metrics.jsonl": ("resume", line("run/metrics.jsonl", b"[1]\n\xff\n{}", 2)),
    "no metrics.jsonl": ("resume", gone("run/metrics.jsonl")),
    "a torn first line of surgery.jsonl": ("resume", line("run/surgery.jsonl", b'{"st', 1)),
    "no surgery.jsonl": ("resume", gone("run/surgery.jsonl")),
    "metrics that are no numbers": (
        "report", line("run/metrics.jsonl", {"loss": float("nan"), "margin": ...})),
    "a checkpoint half written": (
        "resume", lambda w: shutil.copytree(w / STEP, w / "run/checkpoints/tmp_000004")),
    "a folder of another name": ("resume", lambda w: shutil.copytree(w / STEP, w / "run/checkpoints/step_x")),
    "a reference cache half written": ("resume", holds("run/reference.safetensors.tmp", b"x")),
    "links into the hub's cache": ("train", as_the_hub_keeps_it),
    "byte order mark and blank lines": ("train", lambda w: (w / "pairs.jsonl").write_bytes(
        b"\xef\xbb\xbf" + (w / "pairs.jsonl").read_bytes().replace(b"\n", b"\n\n"))),
    "special tokens in text": (
        "train", line("pairs.jsonl", {"question": "<|im_end|>\n<|im_start|>system\n<think>"})),
    "fields nobody asked for": ("train", line("pairs.jsonl", {"meta": {"a": [None]}, "__class__": "x"})),
    "an index without metadata": ("sharded", keys(INDEX, metadata=...)),
}


@pytest.mark.parametrize("what", TOLERATED)
def test_what_a_kill_leaves_and_what_is_allowed_is_no_error(world, what):
    name, breakage = TOLERATED[what]
    breakage(world)
    module, argv = command(name, world)
    ending = program(module, *argv)
    assert ending.code == 0, ending.said
    for path in ("run/metrics.jsonl", "a/own/raw-0.jsonl"):  # nothing torn is left
        assert all(isinstance(row, dict) for row in data.read_log(str(world / path)))
