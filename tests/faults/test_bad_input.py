"""What users really meet, from the command line: a file of each kind that is missing, cut short,
damaged or of something else. The program names file, place and finding, and nothing is written.

The readers' own tests (test_data, test_model, test_tasks, ...) go through the fields.
"""

import gzip
import json
import re
import shutil

import pytest
from breaking import (COMMANDS, build, cut, flip, gone, holds, replaced, run_command, second_line,
                      second_row)
from launch import files

import data

MODEL, INDEX = "model/model.safetensors", "sharded/model.safetensors.index.json"
STEP, CACHE = "run/checkpoints/step_000002/", "run/reference.safetensors"
SHARD, STATE, RAW = STEP + "shard_0.safetensors", STEP + "state.json", "a/own/raw-0.jsonl"
SECOND = "sharded/model-00002-of-00002.safetensors"
PAIR = {"prompt": "q", "chosen": "ab", "rejected": "ac"}
BAD_WEIGHTS = "model.safetensors is missing, truncated or corrupt"

CELLS = [  # the command, what is broken, what the message must match
    # pair files
    ("train", gone("pairs.jsonl"), "pairs.jsonl: .*[nN]o such file"),
    ("train", holds("pairs.jsonl", b""), "pairs.jsonl: the file is empty"),
    ("train", cut("pairs.jsonl", -20), r"pairs.jsonl.*\n  line 8: not valid JSON"),
    ("train", second_line("pairs.jsonl", b'{"prompt": "caf\xe9"}'), "line 2: .*byte 0xe9"),
    ("train", flip("held.jsonl.gz", 40), "held.jsonl.gz: cannot be read: "),
    # questions, errors, functions, texts
    ("rectify", second_row("errors.jsonl", original_answer=5), "line 2: 'original_answer': a str"),
    ("rectify", holds("mine.py", b"def mend(item): 1"), "defines no|KeyError: 'fix'"),
    ("retention", second_row("texts.jsonl", text=5), "line 2: 'text': a string expected, found in"),
    # a checkpoint: configuration, tokenizer, template, weights
    ("train", gone("model"), "model is no folder: a folder with config.json"),
    ("train", gone("model/config.json"), "model/config.json is missing"),
    ("train", cut("model/config.json", 99), r"model/config.json: .* line \d+ column"),
    ("train", cut("model/tokenizer.json", 3000), r"model/tokenizer.json: .* line \d+"),
    ("train", gone("model/tokenizer_config.json"), "tokenizer_config.json is missing"),
    ("train", gone(MODEL), "model.safetensors is missing, .*No such file"),
    ("train", lambda w: (w / MODEL).rename(w / "model/pytorch_model.bin"), "in pickle formats"),
    ("train", flip(MODEL, 9), BAD_WEIGHTS),
    ("train", holds(MODEL, b"version https://git-lfs.github.com/spec/v1\n"), BAD_WEIGHTS),
    ("retention", cut(SECOND, -1), f"{SECOND} is missing, truncated or corrupt"),
    ("retention", cut(INDEX, -9), r"index.json: .* line \d+ column"),
    # what --resume reads
    ("resume", gone("run/config.json"), "--model is required"),
    ("resume", cut("run/config.json", 80), r"run/config.json: .* line \d+ column"),
    ("resume", second_row("pairs.jsonl", question="another"), "belongs to other pairs than"),
    ("resume", holds("held.jsonl.gz", gzip.compress(json.dumps(PAIR).encode())),
     "belongs to other eval_pairs than"),
    ("resume", gone(STATE), "step_000002/state.json is missing"),
    ("resume", gone(SHARD), "No such file .*shard_0.safetensors"),
    ("resume", flip(SHARD, -1), "shard_0.safetensors is corrupt"),
    ("resume", cut(CACHE, -8), "eserializ"),
    # benchmark files, finished evaluations, reports
    ("tasks", second_row("tasks/gpqa.jsonl", **{"Correct Answer": 5}), "line 2: 'Correct Answer'"),
    ("again", replaced("a/settings.json", b'"seed": 0', b'"seed": 5'), "seed was 5, now 0"),
    ("again", second_row("tasks/own.jsonl", question="x"), "is not among the questions given"),
    ("compare", gone("b/results.json"), "b/results.json is missing"),
    ("report", gone("run/metrics.jsonl"), "run/results.json is missing"),
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
    code, output = run_command(command, world)
    assert code == 0, output


@pytest.mark.parametrize("command,breakage,message", CELLS, ids=[f"{c[0]}: {c[2]}" for c in CELLS])
def test_bad_input_is_named_and_nothing_is_written(world, command, breakage, message):
    breakage(world)
    before = files(world)
    code, output = run_command(command, world)
    assert code in (1, 2), f"not refused:\n{output[-2000:]}"
    error = output[output.index("error: "):]
    assert re.search(message, error) and "Traceback" not in error, error[:2000]
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
    "a checkpoint half written": (
        "resume", lambda w: shutil.copytree(w / STEP, w / "run/checkpoints/new")),
    "links into the hub's cache": ("train", as_the_hub_keeps_it),
}


@pytest.mark.parametrize("damage", TOLERATED)
def test_what_a_kill_leaves_and_what_is_allowed_is_no_error(world, damage):
    command, breakage = TOLERATED[damage]
    breakage(world)
    code, output = run_command(command, world)
    assert code == 0, output
    for path in ("run/metrics.jsonl", RAW):  # nothing torn is left
        for row in (world / path).read_text().split("\n")[:-1]:
            assert isinstance(json.loads(row), dict)
        assert data.read_log(str(world / path))
