"""A small world of every file this project reads, ways to break one thing in it, and the real programs.

`build` makes a folder with a checkpoint, pairs, questions, benchmark files, a stopped training run and two
finished evaluations. A breakage is a function of that folder. `program` runs train.py, oracle.py or eval.py
in this process, as their command lines do, and tells how that ended.
"""

import gzip
import io
import json
import os
import shutil
import signal
import sys
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass

import pytest
import tiny
import torch.distributed as dist
from tqdm import tqdm

import eval as evaluation
import oracle
import train


class Hang(BaseException):
    """Not an OSError such as TimeoutError, which the programs would take for one of their own."""


@contextmanager
def at_most(seconds):
    """Whatever runs longer ends in Hang."""
    def stop(*_):
        raise Hang(f"still running after {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@dataclass
class Ending:
    """How a program ended: its exit code, the exception that ended it (None for wrong options), its words."""

    code: int
    error: BaseException | None
    said: str


def program(module, *argv, seconds=30) -> Ending:
    """`python MODULE.py ARGV` in this process; an exception that the program does not name comes out."""
    error, handler, said = None, signal.getsignal(signal.SIGTERM), io.StringIO()
    quiet = (redirect_stdout(said), redirect_stderr(said))
    with pytest.MonkeyPatch.context() as patch, at_most(seconds), quiet[0], quiet[1]:
        patch.setattr(os, "sched_getaffinity", lambda _: {0})  # one thread will do for so small a model
        patch.setattr(sys, "argv", [f"{module.__name__}.py", *map(str, argv)])
        for name in ("RANK", "WORLD_SIZE", "OPENAI_BASE_URL"):
            patch.delenv(name, raising=False)
        try:
            code = module.main()
        except SystemExit as e:
            code, error = e.code, e.__context__
        finally:
            signal.signal(signal.SIGTERM, handler)
            if dist.is_initialized():
                dist.destroy_process_group()
            for bar in list(tqdm._instances):  # of a program that an error ended; else the next one draws it
                bar.close()
    return Ending(code, error, said.getvalue())


def say(request, text):
    """A line for the log of the tests, whether or not they pass."""
    with request.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
        print("\n" + text)


def files(folder) -> dict:
    """{path: content} of everything below a folder; a folder's content is None, a link's is its target."""
    found = {}
    for root, folders, names in os.walk(folder):
        for name in folders + names:
            path = os.path.join(root, name)
            if os.path.islink(path):
                found[os.path.relpath(path, folder)] = os.readlink(path)
            elif os.path.isdir(path):
                found[os.path.relpath(path, folder)] = None
            else:
                with open(path, "rb") as f:
                    found[os.path.relpath(path, folder)] = f.read()
    return found


# --- the world ------------------------------------------------------------------------------------

SETTINGS = ("--dtype", "float32", "--lr", "1e-3", "--batch_size", "4", "--max_change_ratio", "1",
            "--checkpointing", "none", "--epochs", "2", "--save_every", "2")
ASKED = ("--max_tokens", "4", "--dtype", "float32", "--samples", "1", "--temperature", "0")


def command(name, w) -> tuple:
    """(module, arguments) of each program on the world in folder w; all of them write to w/out at most."""
    return {
        "train": (train, ["--model", w / "model", "--pairs", w / "pairs.jsonl", "--eval_pairs",
                          w / "held.jsonl.gz", "--out", w / "out", *SETTINGS]),
        "resume": (train, ["--resume", "--out", w / "run"]),
        "elicit": (oracle, ["elicit", "--model", w / "model", "--questions", w / "questions.jsonl", "--out",
                            w / "out", *ASKED]),
        "rectify": (oracle, ["rectify", "--errors", w / "errors.jsonl", "--tokenizer", w / "model", "--out",
                             w / "out", "--function", f"{w / 'mine.py'}:fix"]),
        "edited": (oracle, ["rectify", "--errors", w / "errors.jsonl", "--tokenizer", w / "model", "--out",
                            w / "out", "--edited", w / "edited.jsonl"]),
        "retention": (evaluation, ["retention", "--model", w / "model", "--base", w / "model", "--texts",
                                   w / "texts.jsonl", "--dtype", "float32"]),
        "sharded": (evaluation, ["retention", "--model", w / "sharded", "--base", w / "model", "--texts",
                                 w / "texts.jsonl", "--dtype", "float32"]),
        "again": (evaluation, ["--model", w / "model", "--tasks", f"own={w / 'tasks/own.jsonl'}", "--out",
                               w / "a", *ASKED]),
        "compare": (evaluation, ["compare", "--a", w / "a", "--b", w / "b"]),
        "report": (evaluation, ["report", w / "run", w / "a", "--out", w / "report.html"]),
        **{task: (evaluation, ["--model", w / "model", "--tasks", task, "--data", w / "tasks", "--out",
                               w / "out", *ASKED]) for task in ("gpqa", "ifeval", "connect4", "math500")},
    }[name]


ROWS = {
    "questions.jsonl": [{"question": f"{i} + {i}?", "answer": str(2 * i)} for i in range(3)],
    "errors.jsonl": [{"id": f"q{i}", "question": f"{i} + {i}?", "ground_truth": str(2 * i),
                      "original_answer": f"It is $\\boxed{{{2 * i + 1}}}$."} for i in range(3)],
    "edited.jsonl": [{"id": "q0", "corrected_answer": "It is $\\boxed{0}$."}],
    "texts.jsonl": [{"text": "the quick brown fox"}, {"text": "a lazy dog"}],
    "tasks/own.jsonl": [{"id": f"n{i}", "question": f"{i} + {i}?", "answer": str(2 * i)} for i in range(3)],
    "tasks/math500.jsonl": [{"problem": f"{i} + {i}?", "answer": str(2 * i)} for i in range(3)],
    "tasks/gpqa.jsonl": [tiny.gpqa_row(i) for i in range(3)],
    "tasks/ifeval.jsonl": [{"key": i, "prompt": f"p{i}", "instruction_id_list": ["punctuation:no_comma"],
                            "kwargs": [{}]} for i in range(3)],
    "tasks/connect4.jsonl": [{k: row[k] for k in ("state", "answer")}
                             for row in evaluation.connect4_rows(2, seed=0)],
}


def build(w):
    """All good: every command above ends with exit code 0 on it."""
    tiny.write_checkpoint(w / "model")
    (w / "model" / "generation_config.json").write_text('{"eos_token_id": [258]}')
    tiny.write_pairs(w / "pairs.jsonl", 8)
    with gzip.open(w / "held.jsonl.gz", "wb") as f:
        f.write((w / "pairs.jsonl").read_bytes())
    os.mkdir(w / "tasks")
    for name, rows in ROWS.items():
        (w / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    (w / "mine.py").write_text("def fix(item):\n    return f'It is $\\\\boxed{{{item.gold}}}$.'\n")
    shutil.copytree(w / "model", w / "sharded")
    shard(w / "sharded")
    stop_after(1, w)
    for name in "ab":
        module, argv = command("again", w)
        argv[argv.index(w / "a")] = w / name
        assert program(module, *argv).code == 0
    return w


def stop_after(step, w, out="run"):
    """A training run in w/OUT as SIGTERM right after that step leaves it: one more step, a checkpoint."""
    write = train.data.append_row

    def write_and_ask(path, row):
        write(path, row)
        if path.endswith("metrics.jsonl") and row["step"] == step:
            train.STOP["asked"] = True

    module, argv = command("train", w)
    argv = [w / out if a == w / "out" else a for a in argv]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train.data, "append_row", write_and_ask)
        patch.setitem(train.STOP, "asked", False)
        assert program(module, *argv).code == 143


def shard(folder):
    """The same checkpoint, its weights in two files and an index."""
    names, header, data = read_safetensors(folder / "model.safetensors")
    index = {n: f"model-0000{1 + (i % 2)}-of-00002.safetensors" for i, n in enumerate(names)}
    for file in sorted(set(index.values())):
        write_safetensors(folder / file, {n: header[n] for n in names if index[n] == file}, data)
    os.remove(folder / "model.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))


# --- safetensors by hand --------------------------------------------------------------------------


def read_safetensors(path):
    """(tensor names, header, data) of a file."""
    raw = path.read_bytes()
    size = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8:8 + size])
    return [n for n in header if n != "__metadata__"], header, raw[8 + size:]


def write_safetensors(path, header, data):
    """A file of these tensors, their parts of `data` moved together."""
    header, moved, at = json.loads(json.dumps(header)), [], 0
    for entry in header.values():
        start, end = entry["data_offsets"]
        entry["data_offsets"] = [at, at + end - start]
        at += end - start
        moved.append(data[start:end])
    path.write_bytes(with_header(header, b"".join(moved)))


def with_header(header, data) -> bytes:
    """A file of this header, a dict or the bytes as they are."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


# --- breakages: each makes a function of the world's folder ---------------------------------------


def gone(path):
    def do(w):
        shutil.rmtree(w / path) if (w / path).is_dir() else os.remove(w / path)
    return do


def folder(path):
    """A folder where a file should be."""
    def do(w):
        if (w / path).exists():
            os.remove(w / path)
        os.mkdir(w / path)
    return do


def holds(path, content):
    """The file holds this and nothing else: bytes, text, or a value as JSON."""
    def do(w):
        raw = content if isinstance(content, bytes) else (
            content if isinstance(content, str) else json.dumps(content)).encode()
        (w / path).write_bytes(gzip.compress(raw) if path.endswith(".gz") else raw)
    return do


def cut(path, left):
    """Only the first `left` bytes, or all but the last -left."""
    def do(w):
        (w / path).write_bytes((w / path).read_bytes()[:left])
    return do


def flip(path, at):
    """One bit of the byte at this place."""
    def do(w):
        raw = bytearray((w / path).read_bytes())
        raw[at] ^= 1
        (w / path).write_bytes(raw)
    return do


def line(path, content, number=2):
    """The line of this number is another one: text, or a value as JSON, or {field: value} of the row that
    stands there (a value of ... removes the field)."""
    def do(w):
        opened = gzip.open if path.endswith(".gz") else open
        with opened(w / path, "rb") as f:
            lines = f.read().split(b"\n")
        new = content
        if isinstance(new, dict):
            new = {**json.loads(lines[number - 1]), **new}
            new = {k: v for k, v in new.items() if v is not ...}
        new = new if isinstance(new, (bytes, str)) else json.dumps(new)
        lines[number - 1] = new if isinstance(new, bytes) else new.encode()
        with opened(w / path, "wb") as f:
            f.write(b"\n".join(lines))
    return do


def keys(path, **changes):
    """These top-level keys of a JSON file are others (a value of ... removes one)."""
    def do(w):
        value = {**json.loads((w / path).read_text()), **changes}
        (w / path).write_text(json.dumps({k: v for k, v in value.items() if v is not ...}))
    return do


def edit(path, change):
    """`change(value)` of a JSON file's value, in place."""
    def do(w):
        value = json.loads((w / path).read_text())
        change(value)
        (w / path).write_text(json.dumps(value))
    return do


def replace(path, old, new):
    """One piece of text in a file is another."""
    def do(w):
        raw = (w / path).read_bytes()
        assert old.encode() in raw
        (w / path).write_bytes(raw.replace(old.encode(), new.encode(), 1))
    return do


def tensor(path, name=None, raw_header=None, data=None, **changes):
    """A safetensors file whose header says something else of one tensor, or whose header or data is another;
    the name may be the number of a tensor."""
    def do(w):
        names, header, kept = read_safetensors(w / path)
        if name is not None:
            header[names[name] if isinstance(name, int) else name].update(changes)
        head = raw_header(header) if raw_header else header
        (w / path).write_bytes(with_header(head, kept if data is None else data(kept)))
    return do


def link(path, target):
    """A symbolic link in the file's place."""
    def do(w):
        if (w / path).exists():
            os.remove(w / path)
        os.symlink(target, w / path)
    return do


def both(*breakages):
    def do(w):
        for breakage in breakages:
            breakage(w)
    return do
