"""A small world of every file that this project reads, and ways to break one thing in it.

`build` makes the world in a folder. A breakage is a function of that folder.
"""

import gzip
import json
import os
import shutil

import tiny
from launch import program

import data
import eval as evaluation
import oracle
import train

# --- the world ------------------------------------------------------------------------------------

SETTINGS = ("--dtype", "float32", "--lr", "1e-3", "--batch_size", "4", "--max_change_ratio", "1",
            "--checkpointing", "none", "--epochs", "2", "--save_every", "2")
SAMPLING = ("--max_tokens", "4", "--dtype", "float32", "--temperature", "0")
SUMS = [{"id": f"n{i}", "question": f"{i} + {i}?", "answer": str(2 * i)} for i in range(3)]
ROWS = {
    "questions.jsonl": SUMS,
    "errors.jsonl": [{**row, "original_answer": "It is $\\boxed{1}$."} for row in SUMS],
    "texts.jsonl": [{"text": "the quick brown fox"}, {"text": "a lazy dog"}],
    "tasks/own.jsonl": SUMS,
    "tasks/gpqa.jsonl": [tiny.gpqa_row(i) for i in range(3)],
}
COMMANDS = {  # "@" stands for the world's folder; all of them write to @out, @run or @a
    "train": (train, "--model @model --pairs @pairs.jsonl --eval_pairs @held.jsonl.gz --out @out",
              SETTINGS),
    "resume": (train, "--resume --out @run", ()),
    "elicit": (oracle, "elicit --model @model --questions @questions.jsonl --out @out", SAMPLING),
    "rectify": (oracle, "rectify --errors @errors.jsonl --tokenizer @model --out @out "
                "--function @mine.py:fix", ()),
    "retention": (evaluation, "retention --model @sharded --base @model --texts @texts.jsonl "
                  "--dtype float32", ()),
    "tasks": (evaluation, "--model @model --tasks own=@tasks/own.jsonl,gpqa --data @tasks "
              "--samples 1 --out @out", SAMPLING),
    "again": (evaluation, "--model @model --tasks own=@tasks/own.jsonl --samples 2 --out @a",
              SAMPLING),
    "compare": (evaluation, "compare --a @a --b @b", ()),
    "report": (evaluation, "report @run @a --out @report.html", ()),
}


def run_command(name, w) -> tuple:
    """(exit code, output) of a command on the world in the folder w."""
    module, text, more = COMMANDS[name]
    return program(module, *text.replace("@", f"{w}/").split(), *more)


def build(w):
    """All good: every command ends with exit code 0 on it."""
    tiny.write_checkpoint(w / "model")
    tiny.write_pairs(w / "pairs.jsonl", 8)
    (w / "held.jsonl.gz").write_bytes(gzip.compress((w / "pairs.jsonl").read_bytes()))
    os.mkdir(w / "tasks")
    for name, rows in ROWS.items():
        data.write_rows(str(w / name), rows)
    (w / "mine.py").write_text("def fix(item):\n    return item.answer + ' No: $\\\\boxed{0}$.'\n")
    tiny.write_checkpoint(w / "sharded", shard="70KB")  # the same in two files
    argv = COMMANDS["train"][1].replace("@out", "@run").replace("@", f"{w}/").split()
    assert program(train, *argv, *SETTINGS, "--keep", "2")[0] == 0
    for path in ("run/checkpoints/step_000004", "run/model"):  # as if killed before them
        shutil.rmtree(w / path)
    assert run_command("again", w)[0] == 0
    shutil.copytree(w / "a", w / "b")


# --- breakages: each makes a function of the world's folder ---------------------------------------

def gone(path):
    """The file or folder is not there."""
    def breakage(w):
        if (w / path).is_dir():
            shutil.rmtree(w / path)
        else:
            os.remove(w / path)
    return breakage


def changed(path, change):
    """The file's bytes are change(bytes)."""
    def breakage(w):
        (w / path).write_bytes(change((w / path).read_bytes()))
    return breakage


def holds(path, content):
    """The file holds these bytes and nothing else."""
    return lambda w: (w / path).write_bytes(content)


def cut(path, end):
    """The file's bytes up to `end`, as in a slice."""
    return changed(path, lambda raw: raw[:end])


def flip(path, at):
    """One bit of the byte at this place."""
    return changed(path, lambda raw: raw[:at] + bytes([raw[at] ^ 1]) + raw[at:][1:])


def second_line(path, content):
    """The second line is these bytes."""
    def change(raw):
        first, _, rest = raw.split(b"\n", 2)
        return b"\n".join([first, content, rest])
    return changed(path, change)


def second_row(path, **values):
    """The JSON object in the second line has other values."""
    def breakage(w):
        row = json.loads((w / path).read_bytes().split(b"\n")[1])
        second_line(path, json.dumps({**row, **values}).encode())(w)
    return breakage


def replaced(path, old, new):
    """The file with other bytes in the place of these."""
    return changed(path, lambda raw: raw.replace(old, new))
