"""What users really meet, from the command line: a file of each kind that is missing, cut short,
damaged or of something else. The program names file, place and finding, and nothing is written.

The readers' own tests (test_data, test_model, test_tasks, ...) go through every field.
"""

import json
import re
import shutil

import pytest
from breaking import (COMMANDS, build, cut, edit, files, flip, gone, holds, line, run_command,
                      tensors)

import data

MODEL, INDEX = "model/model.safetensors", "sharded/model.safetensors.index.json"
STEP, CACHE = "run/checkpoints/step_000003/", "run/reference.safetensors"
SHARD, STATE, RAW = STEP + "shard_0.safetensors", STEP + "state.json", "a/own/raw-0.jsonl"
NORM, SECOND = "model.norm.weight", "sharded/model-00002-of-00002.safetensors"

CELLS = [  # the command, what is broken, what the message must match
    # pair files
    ("train", gone("pairs.jsonl"), "pairs.jsonl: cannot be read: No such file"),
    ("train", holds("pairs.jsonl", ""), "pairs.jsonl: the file is empty"),
    ("train", cut("pairs.jsonl", -20), r"pairs.jsonl.*\n  line 8: not valid JSON in UTF-8"),
    ("train", line("pairs.jsonl", b'{"prompt": "caf\xe9"}'), "line 2: .*can't decode byte 0xe9"),
    ("train", line("pairs.jsonl", b"[1]"), "line 2: a JSON object expected, found list"),
    ("train", line("pairs.jsonl", b'{"prompt": "q"}'), r"line 2: .* expected, found \['prompt'\]"),
    ("train", line("pairs.jsonl", {"question": {"a": 1}}), "line 2: 'question', .* found dict"),
    ("train", line("pairs.jsonl", {"gemini_corrected_answer": "\ud800"}),
     "line 2: 'gemini_corrected_answer': holds a lone surrogate"),
    ("train", cut("held.jsonl.gz", -12), "held.jsonl.gz: cannot be read: .*end-of-stream"),
    ("train", holds("held.jsonl.gz", "text"), "held.jsonl.gz: cannot be read: Not a gzipped file"),
    ("train", flip("held.jsonl.gz", 200), "held.jsonl.gz: "),
    # questions, errors, corrections by hand, texts
    ("elicit", gone("questions.jsonl"), "questions.jsonl: cannot be read: No such file"),
    ("elicit", cut("questions.jsonl", -5), r"questions.jsonl.*\n  line 3: not valid JSON"),
    ("elicit", line("questions.jsonl", {"question": 5}), "line 2: 'question'.* found int"),
    ("elicit", line("questions.jsonl", {"answer": None}), "line 2: a gold answer expected"),
    ("elicit", line("questions.jsonl", {"id": "n0"}), "1 ids occur more than once, first 'n0'"),
    ("rectify", line("errors.jsonl", {"original_answer": 5}), "line 2: 'original_answer': a str"),
    ("rectify", line("edited.jsonl", {"corrected_answer": 5}, 1),
     r"edited.jsonl.*\n  line 1: 'corrected_answer': a string expected, found int"),
    ("retention", line("texts.jsonl", {"text": 5}), "line 2: 'text': a string expected, found int"),
    ("retention", holds("texts.jsonl", '{"text": ""}\n'), "texts.jsonl: 0 texts"),
    # a checkpoint: configuration, tokenizer, template
    ("train", gone("model"), "model is no folder: a folder with config.json"),
    ("train", gone("model/config.json"), "model/config.json is missing"),
    ("train", cut("model/config.json", 99), r"model/config.json: .* line \d+ column"),
    ("train", edit("model/config.json", lambda c: c.pop("hidden_size")), '"hidden_size": a whole'),
    ("train", edit("model/config.json", lambda c: c.update(intermediate_size=96)),
     r"up_proj.weight is \(64, 32\), config.json says \(96, 32\)"),
    ("train", edit("model/config.json", lambda c: c.update(tie_word_embeddings=False)),
     "missing: lm_head.weight"),
    ("train", edit("model/config.json", lambda c: c.update(model_type="llama")),
     "\"model_type\" is 'llama'; only 'qwen3' is supported"),
    ("train", gone("model/tokenizer.json"), "model/tokenizer.json is missing"),
    ("train", cut("model/tokenizer.json", 3000), r"model/tokenizer.json: .* line \d+"),
    ("train", holds("model/tokenizer.json", "{}"), "model/tokenizer.json"),
    ("train", edit("model/tokenizer.json", lambda t: t["added_tokens"].pop(2)),
     r"tokenizer.json: lacks the token '<\|im_end\|>'"),
    ("train", edit("model/config.json", lambda c: c.update(vocab_size=200)),
     "tokenizer.json: holds token id 260, but the model's vocabulary has 200"),
    ("train", gone("model/tokenizer_config.json"), "tokenizer_config.json is missing"),
    ("train", holds("model/chat_template.jinja", "{{ messages }}"),
     "chat_template.jinja: this chat template is not known"),
    ("elicit", cut("model/generation_config.json", 9), "generation_config.json: "),
    # its weights
    ("train", gone(MODEL), "model: neither model.safetensors nor .*index.json"),
    ("train", lambda w: (w / MODEL).rename(w / "model/pytorch_model.bin"), "in pickle formats"),
    ("train", cut(MODEL, 0), "model.safetensors is missing, truncated or corrupt"),
    ("train", cut(MODEL, 200), "model.safetensors is missing, truncated or corrupt"),
    ("train", cut(MODEL, -1), "model.safetensors is missing, truncated or corrupt"),
    ("train", flip(MODEL, 9), "model.safetensors is missing, truncated or corrupt"),
    ("train", holds(MODEL, "version https://git-lfs.github.com/spec/v1\n"), "model.safetensors is"),
    ("train", tensors(MODEL, lambda t: t.pop(NORM)), f"missing: {NORM}"),
    ("train", tensors(MODEL, lambda t: t.update({NORM: t[NORM].int()})), f"type: {NORM} is I32"),
    ("train", tensors(MODEL, lambda t: t[NORM].fill_(float("nan"))), f"{NORM} holds NaN"),
    ("retention", gone(SECOND), f"{SECOND} is missing"),
    ("retention", cut(SECOND, -1), f"{SECOND} is missing, truncated or corrupt"),
    ("retention", cut(INDEX, -9), r"index.json: .* line \d+ column"),
    ("retention", holds(INDEX, "{}"), 'index.json: "weight_map", an object of file names'),
    # what --resume reads
    ("resume", gone("run/config.json"), "--model is required"),
    ("resume", cut("run/config.json", 80), r"run/config.json: .* line \d+ column"),
    ("resume", line("pairs.jsonl", {"question": "another"}), "reference.safetensors belongs to other pairs than"),
    ("resume", gone(STATE), "step_000003/state.json is missing"),
    ("resume", cut(STATE, 40), "step_000003/state.json: .* line"),
    ("resume", gone(SHARD), "No such file .*shard_0.safetensors"),
    ("resume", cut(SHARD, -1), "shard_0.safetensors is corrupt: its hash"),
    ("resume", flip(SHARD, -1), "shard_0.safetensors is corrupt: its hash"),
    ("resume", gone(CACHE), f"{CACHE} is missing or corrupt"),
    ("resume", cut(CACHE, -8), f"{CACHE} is missing or corrupt"),
    ("resume", line("run/metrics.jsonl", b'{"step": 1, "lo'), "run/metrics.jsonl, line 2: "),
    # benchmark files
    ("tasks", gone("tasks/own.jsonl"), "tasks/own.jsonl: cannot be read"),
    ("tasks", cut("tasks/own.jsonl", -4), r"own.jsonl.*\n  line 3: not valid JSON"),
    ("tasks", line("tasks/own.jsonl", {"id": "n0"}), "1 ids occur more than once, first 'n0'"),
    ("tasks", line("tasks/gpqa.jsonl", {"Correct Answer": 5}), "line 2: 'Correct Answer': a str"),
    ("tasks", line("tasks/ifeval.jsonl", {"kwargs": [{}, {}]}), "line 2: .*two lists of one"),
    ("tasks", line("tasks/connect4.jsonl", {"state": "no board"}), "line 2: 'state'"),
    # finished evaluations, reports
    ("again", cut("a/settings.json", 20), "a/settings.json: .* line"),
    ("again", edit("a/settings.json", lambda s: s.update(seed=5)), "seed was 5, now 0"),
    ("again", line("tasks/own.jsonl", {"question": "another"}), "is not among the questions given"),
    ("again", line(RAW, b'{"key": "n0', 1), "own/raw-0.jsonl, line 1: "),
    ("compare", gone("b/results.json"), "b/results.json is missing"),
    ("compare", cut("b/results.json", 99), "b/results.json: .* line"),
    ("report", gone("run/metrics.jsonl"), r"run: no run \(metrics.jsonl\) and no evaluation"),
    ("report", line("run/metrics.jsonl", b'{"step": 1, "lo'), "run/metrics.jsonl, line 2: "),
]


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """The world before anything is broken."""
    w = tmp_path_factory.mktemp("good") / "world"
    w.mkdir()
    build(w)
    return w


@pytest.fixture
def world(good, tmp_path):
    """A copy of the good world, whose recorded paths lead to the copy."""
    w = tmp_path / "world"
    shutil.copytree(good, w)
    config = w / "run/config.json"
    config.write_text(config.read_text().replace(str(good), str(w)))
    return w


@pytest.mark.parametrize("command", COMMANDS)
def test_unbroken_every_command_succeeds(world, command):
    """Else a cell could pass for a reason of its own."""
    code, said = run_command(command, world)
    assert code == 0, said


@pytest.mark.parametrize("command,breakage,message", CELLS, ids=[f"{c[0]}: {c[2]}" for c in CELLS])
def test_bad_input_is_named_and_nothing_is_written(world, command, breakage, message):
    breakage(world)
    before = files(world)
    code, said = run_command(command, world)
    assert code in (1, 2), f"not refused:\n{said[-2000:]}"
    said = said[said.index("error: "):]
    assert re.search(message, said) and "Traceback" not in said, said[:2000]
    assert files(world) == before


def as_the_hub_keeps_it(w):
    """The hub's cache: a folder of links into a folder of blobs beside it."""
    (w / "blobs").mkdir()
    for path in list((w / "model").iterdir()):
        path.rename(w / "blobs" / path.name)
        path.symlink_to(f"../blobs/{path.name}")


TOLERATED = {
    "a torn last line of a raw log": ("again", cut(RAW, -7)),
    "a torn last line of metrics.jsonl": ("resume", cut("run/metrics.jsonl", -7)),
    "no metrics.jsonl": ("resume", gone("run/metrics.jsonl")),
    "no surgery.jsonl": ("resume", gone("run/surgery.jsonl")),
    "a checkpoint half written": (
        "resume", lambda w: shutil.copytree(w / STEP, w / "run/checkpoints/tmp_000004")),
    "a folder of another name": (
        "resume", lambda w: shutil.copytree(w / STEP, w / "run/checkpoints/step_x")),
    "links into the hub's cache": ("train", as_the_hub_keeps_it),
    "byte order mark and blank lines": ("train", lambda w: (w / "pairs.jsonl").write_bytes(
        b"\xef\xbb\xbf" + (w / "pairs.jsonl").read_bytes().replace(b"\n", b"\n\n"))),
    "fields nobody asked for": ("train", line("pairs.jsonl", {"meta": {"a": [None]}})),
}


@pytest.mark.parametrize("damage", TOLERATED)
def test_what_a_kill_leaves_and_what_is_allowed_is_no_error(world, damage):
    command, breakage = TOLERATED[damage]
    breakage(world)
    code, said = run_command(command, world)
    assert code == 0, said
    for path in ("run/metrics.jsonl", RAW):  # nothing torn is left
        for row in (world / path).read_text().split("\n")[:-1]:
            assert isinstance(json.loads(row), dict)
        assert data.read_log(str(world / path))
