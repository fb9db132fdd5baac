"""A full disk, a folder that cannot be written, files that vanish: each is named, and a run goes on
from its last whole checkpoint to the bits of an undisturbed one.

RLIMIT_FSIZE makes the kernel refuse, with a real error, whatever grows a file beyond a size: a
write fails as on a full disk, partly, then not at all.
"""

import importlib
import os
import resource
import shutil
from contextlib import contextmanager

import launch
import pytest
import tiny
from breaking import SETTINGS, assert_same_end, program, write_rows
from misbehaving import Misbehaving, completion

import data
import eval as evaluation
import oracle
import train


@contextmanager
def no_file_above(size):
    """Writes beyond `size` bytes of a file fail."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@contextmanager
def full_at(name, path):
    """The disk is full from the first call of "module.function" with `path` in an argument on."""
    module, _, name = name.rpartition(".")
    module = importlib.import_module(module)
    function = getattr(module, name)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def call(*args, **kwargs):
        if any(path in str(arg) for arg in args):
            resource.setrlimit(resource.RLIMIT_FSIZE, (20, limits[1]))
        return function(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, name, call)
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def assert_names_full_disk(said, path):
    said = said[said.index("error: "):]
    assert path in said and ("too large" in said or "No space" in said), said
    assert "Traceback" not in said


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A checkpoint and pairs."""
    w = tmp_path_factory.mktemp("disk")
    tiny.write_checkpoint(w / "model")
    tiny.write_pairs(w / "pairs.jsonl", 8)
    shutil.copy(w / "pairs.jsonl", w / "held.jsonl")
    return w


def options(w, out):
    return ["--model", w / "model", "--pairs", w / "pairs.jsonl", "--eval_pairs", w / "held.jsonl",
            "--out", out, *SETTINGS, "--save_every", "1"]


@pytest.fixture(scope="module")
def undisturbed(world):
    """A run of four steps."""
    assert program(train, *options(world, world / "undisturbed"))[0] == 0
    return world / "undisturbed"


FULL = {  # what is being written: the function that meets the full disk, in its path
    "reference cache": ("model.save_file", "reference.safetensors"),
    "options": ("data.write_text", "run/config.json"),
    "metrics": ("data.append_row", "metrics.jsonl"),
    "held-out metrics": ("data.append_row", "eval.jsonl"),
    "watched pair": ("data.append_row", "surgery.jsonl"),
    "checkpoint": ("model.save_file", "tmp_step_000002/shard_0.safetensors"),
    "state": ("data.write_text", "tmp_step_000002/state.json"),
    "export": ("model.save_file", "model.tmp/model.safetensors"),
    "configuration of the export": ("data.write_text", "model.tmp/config.json"),
    "tokenizer of the export": ("shutil.copyfile", "model.tmp/generation_config.json"),
}


@pytest.mark.parametrize("part", FULL)
def test_a_full_disk_is_named_and_the_run_goes_on(world, undisturbed, tmp_path, part):
    function, path = FULL[part]
    with full_at(function, path):
        code, said = program(train, *options(world, tmp_path / "run"))
    assert code == 1
    assert_names_full_disk(said, path)
    assert not os.path.exists(tmp_path / "run/model")
    for folder in train.whole_checkpoints(tmp_path / "run"):  # only a whole one has this name
        digests = [train.file_sha256(os.path.join(folder, "shard_0.safetensors"))]
        assert digests == data.read_json(os.path.join(folder, "state.json"))["sha256"]
    if not os.path.exists(tmp_path / "run/config.json"):  # so early that the same command works
        code, said = program(train, *options(world, tmp_path / "run"))
        assert code == 0, said
    code, said = program(train, "--resume", "--out", tmp_path / "run")
    assert code == 0, said
    assert_same_end(undisturbed, tmp_path / "run")


def test_a_full_disk_at_the_export_of_two_ranks_ends_both(world, tmp_path):
    """The other rank waits for the main one, which must not just leave."""
    run = launch.Started(["train.py", *options(world, tmp_path / "run"), "--timeout", "60"], 2,
                         {0: ("model.save_file", 6, launch.disk_full)})  # cache, 4 checkpoints
    assert run.wait() == [1, 1]
    assert "No space left on device" in run.said and "has not answered" not in run.said
    assert os.listdir(tmp_path / "run/checkpoints") == ["step_000004"]


def test_files_that_are_written_anew_are_whole_or_as_before(tmp_path):
    """pairs.jsonl at each start of rectify, metrics.jsonl at each resume."""
    path = tmp_path / "rows.jsonl"
    data.write_rows(str(path), [{"step": i} for i in range(50)])
    before = path.read_bytes()
    with no_file_above(100), pytest.raises(OSError, match="rows.jsonl"):
        train.keep_steps_before(str(path), 40)
    assert path.read_bytes() == before
    train.keep_steps_before(str(path), 40)
    assert path.read_bytes() == b"".join(before.splitlines(True)[:40])


# --- answers --------------------------------------------------------------------------------------


@pytest.fixture
def questions(tmp_path):
    rows = [{"question": f"{i} + {i}?", "answer": str(2 * i)} for i in range(12)]
    write_rows(tmp_path / "questions.jsonl", rows)
    return tmp_path


def elicit(w, server):
    return program(oracle, "elicit", "--questions", w / "questions.jsonl", "--out", w / "out",
                   "--server", server.url, "--workers", "1")


@pytest.mark.parametrize("size", [700, 777, 1500])
def test_a_full_disk_loses_no_answer_but_the_one_in_hand(questions, size):
    with Misbehaving(lambda body, attempt: completion("It is \\boxed{7} " + "x" * 80)) as server:
        with no_file_above(size):
            code, said = elicit(questions, server)
        assert code == 1 and said.count("error: ") == 1
        assert_names_full_disk(said, "out/raw-0.jsonl")
        kept = len(evaluation.read_answers(str(questions / "out")))
        assert 0 < kept < 12 and len(server.requests) <= kept + 2  # it stopped at once
        server.requests.clear()
        code, said = elicit(questions, server)
        assert code == 0 and len(server.requests) == 12 - kept, said
    rows = data.read_log(str(questions / "out/samples.jsonl"))
    assert [row["id"] for row in rows] == [f"{i + 1}/0" for i in range(12)]


# --- folders that cannot be written, files that vanish --------------------------------------------


def test_a_folder_that_cannot_be_made_is_named_before_the_work(world):
    """/proc takes no folders, not even from root."""
    code, said = program(train, *options(world, "/proc/spot/run"))
    assert code == 1 and "error: " in said and "'/proc/spot" in said
    assert "reference" not in said  # no reference pass


@pytest.mark.parametrize("name,message", [("model", "model/config.json is missing"),
                                          ("out", "out/metrics.jsonl")])
def test_folders_that_vanish_in_mid_run_are_named(world, tmp_path, undisturbed, monkeypatch, name,
                                                  message):
    """The export takes config.json from the model's folder; the run goes on once it is back."""
    shutil.copytree(world / "model", tmp_path / "model")
    step = train.train_step

    def train_step(run, batch, lr):
        if run.state.step == 2:
            os.rename(tmp_path / name, tmp_path / "elsewhere")
        return step(run, batch, lr)

    monkeypatch.setattr(train, "train_step", train_step)
    given = [*options(world, tmp_path / "out"), "--model", tmp_path / "model"]
    code, said = program(train, *given)
    assert code == 1 and message in said[said.index("error: "):], said
    monkeypatch.undo()
    shutil.rmtree(tmp_path / name, ignore_errors=True)
    os.rename(tmp_path / "elsewhere", tmp_path / name)
    code, said = program(train, "--resume", "--out", tmp_path / "out")
    assert code == 0, said
    assert_same_end(undisturbed, tmp_path / "out")
