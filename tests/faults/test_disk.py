"""A full disk, a folder that cannot be written, files that vanish: named, and the last good state is kept.

RLIMIT_FSIZE makes the kernel refuse, with a real error, whatever would grow a file beyond a number of bytes.
Python ignores the signal that comes with it, so a write fails as on a full disk: partly, then not at all.
"""

import os
import resource
import shutil
import subprocess
import sys
from contextlib import contextmanager

import pytest
import tiny
import torch
from breaking import SETTINGS, files, program
from misbehaving import Misbehaving, completion
from safetensors.torch import load_file

import eval as evaluation
import model as qwen
import oracle
import train
import data
from data import UserError


@contextmanager
def no_file_above(size):
    """Writes beyond `size` bytes of a file fail with EFBIG."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@contextmanager
def full_at(function_of, name, part):
    """As soon as a function gets a path with `part` in it, every file is full, until the block ends."""
    whole, limits = getattr(function_of, name), resource.getrlimit(resource.RLIMIT_FSIZE)

    def call(*args, **kwargs):
        if any(part in str(a) for a in (*args, *kwargs.values()) if isinstance(a, (str, os.PathLike))):
            resource.setrlimit(resource.RLIMIT_FSIZE, (20, limits[1]))
        return whole(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(function_of, name, call)
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A checkpoint, pairs, an undisturbed run and one that stopped after step 2 of 4."""
    w = tmp_path_factory.mktemp("disk")
    tiny.write_checkpoint(w / "model")
    tiny.write_pairs(w / "pairs.jsonl", 8)
    shutil.copy(w / "pairs.jsonl", w / "held.jsonl")
    return w


def argv(w, out="out"):
    return ["--model", w / "model", "--pairs", w / "pairs.jsonl", "--eval_pairs", w / "held.jsonl", "--out",
            w / out, *SETTINGS, "--save_every", "1"]


@pytest.fixture(scope="module")
def whole(world):
    """The weights and moments at the end of a run that nothing disturbed."""
    assert program(train, *argv(world, "whole")).code == 0
    return last_state(world / "whole")


def last_state(out):
    return load_file(os.path.join(train.whole_checkpoints(out)[-1], "shard_0.safetensors"))


# what is written, the function that meets the full disk, the part of its path, which file the message names
FULL = {
    "reference cache": (train, "save_file", "reference.safetensors", "out/reference.safetensors"),
    "run config": (qwen, "write_json", "out/config.json", "out/config.json"),
    "metrics": (train.data, "append_row", "metrics.jsonl", "out/metrics.jsonl"),
    "held-out metrics": (train.data, "append_row", "eval.jsonl", "out/eval.jsonl"),
    "checkpoint": (train, "save_file", "tmp_000002", "tmp_000002/shard_0.safetensors"),
    "checkpoint state": (qwen, "write_json", "tmp_000002", "tmp_000002/state.json"),
    "export": (qwen, "write_tensors", "model.tmp", "model.tmp/model.safetensors"),
    "export config": (qwen, "write_json", "model.tmp", "model.tmp/config.json"),
    "export tokenizer": (shutil, "copyfile", "model.tmp", "model.tmp/generation_config.json"),
}


@pytest.mark.parametrize("what", FULL)
def test_a_full_disk_is_named_and_the_run_goes_on_from_its_last_state(world, whole, what):
    function_of, name, part, named = FULL[what]
    shutil.rmtree(world / "out", ignore_errors=True)
    with full_at(function_of, name, part):
        ending = program(train, *argv(world))
    assert ending.code == 1 and isinstance(ending.error, (UserError, OSError)), repr(ending.error)
    said = ending.said[ending.said.index("error: "):]
    assert named in said and ("too large" in said or "No space" in said), said
    assert not os.path.exists(world / "out/model")
    for folder in train.whole_checkpoints(world / "out"):  # whatever has the name of a whole one is whole
        state = qwen.read_json(os.path.join(folder, "state.json"))
        assert [train.file_sha256(os.path.join(folder, "shard_0.safetensors"))] == state["sha256"]
    resume = ["--resume"] if os.path.exists(world / "out/config.json") else []
    ending = program(train, *argv(world), *resume)
    assert ending.code == 0, ending.said
    assert ("resumed from" in ending.said) == (what not in ("reference cache", "run config", "metrics"))
    found = last_state(world / "out")
    assert found.keys() == whole.keys() and all(torch.equal(found[k], whole[k]) for k in whole)
    steps = [row["step"] for row in train.data.read_log(str(world / "out/metrics.jsonl"))]
    assert steps == [0, 1, 2, 3]


def test_the_log_of_a_resumed_run_survives_a_full_disk(world):
    """keep_steps_before writes beside, then renames: the lines that were there stay."""
    log = world / "metrics.jsonl"
    log.write_text("".join(f'{{"step": {i}, "loss": 1.0}}\n' for i in range(50)))
    before = log.read_bytes()
    with no_file_above(100), pytest.raises((UserError, OSError), match="metrics.jsonl"):
        train.keep_steps_before(str(log), 40)
    assert log.read_bytes() == before
    train.keep_steps_before(str(log), 40)
    assert log.read_bytes() == b"".join(before.splitlines(True)[:40])


# --- answers --------------------------------------------------------------------------------------


def asked(w, server, *more):
    return program(oracle, "elicit", "--questions", w / "questions.jsonl", "--out", w / "asked", "--server",
                   server.url, "--workers", "1", *more)


@pytest.fixture
def questions(tmp_path):
    (tmp_path / "questions.jsonl").write_text("".join(
        f'{{"question": "{i} + {i}?", "answer": "{2 * i}"}}\n' for i in range(12)))
    return tmp_path


@pytest.mark.parametrize("size", [700, 777, 1500])
def test_a_full_disk_loses_no_answer_but_the_one_in_hand(questions, size):
    with Misbehaving(lambda body, attempt: completion("It is \\boxed{7} " + "x" * 80)) as server:
        with no_file_above(size):
            ending = asked(questions, server)
        assert ending.code == 1 and isinstance(ending.error, (UserError, OSError)), ending.said
        assert "Traceback" not in ending.said and ending.said.count("error: ") == 1
        assert "asked/raw-0.jsonl" in ending.said[ending.said.index("error: "):], ending.said
        kept = len(evaluation.read_answers(str(questions / "asked"), server_keys(questions)))
        assert 0 < kept < 12 and len(server.requests) <= kept + 2  # it stopped at once
        before = len(server.requests)
        ending = asked(questions, server)
        assert ending.code == 0, ending.said
        assert len(server.requests) == before + 12 - kept
    rows = [row for row in train.data.read_log(str(questions / "asked/samples.jsonl"))]
    assert [row["id"] for row in rows] == [f"{i + 1}/0" for i in range(12)]


def server_keys(w):
    items, _ = oracle.read_questions(str(w / "questions.jsonl"), oracle.INSTRUCTION)
    return [oracle.request_for(f"{item.id}/0", item.messages, 0).key for item in items]


@pytest.mark.parametrize("name", ["samples.jsonl", "errors.jsonl", "summary.json"])
def test_files_made_from_the_answers_are_whole_or_as_before(questions, name, monkeypatch):
    """The raw log has room, one of the files made from it has not; as if they lay on two disks."""
    with Misbehaving(lambda body, attempt: completion("It is \\boxed{7}")) as server:
        with full_at(oracle.data, "write_rows" if name.endswith("l") else "write_json", name):
            ending = asked(questions, server)
        assert ending.code == 1 and isinstance(ending.error, (UserError, OSError)), repr(ending.error)
        assert f"asked/{name}" in ending.said[ending.said.index("error: "):], ending.said
        assert not (questions / "asked" / name).exists()
        assert asked(questions, server).code == 0 and len(server.requests) == 12
    assert (questions / "asked" / name).exists()


def test_pairs_of_an_earlier_start_survive_a_full_disk(questions):
    """pairs.jsonl is written anew at each start: beside, then renamed."""
    path = questions / "pairs.jsonl"
    data.write_rows(str(path), [{"a": 1}])
    with no_file_above(50), pytest.raises((UserError, OSError), match="pairs.jsonl"):
        data.write_rows(str(path), ({"a": i} for i in range(100)))
    assert path.read_text() == '{"a": 1}\n'


# --- folders that cannot be written, files that vanish --------------------------------------------


def test_a_folder_that_cannot_be_made_is_named_before_the_work(world):
    """/proc takes no folders, not even from root."""
    before = files(world / "model")
    ending = program(train, *argv(world), "--out", "/proc/spot/run")
    assert ending.code == 1 and isinstance(ending.error, OSError) and "'/proc/spot" in ending.said
    assert "batch/s" not in ending.said  # no reference pass
    ending = program(evaluation, "--model", world / "model", "--tasks", "connect4", "--limit", "1", "--out",
                     "/proc/spot/run")
    assert ending.code == 1 and "'/proc/spot" in ending.said
    assert files(world / "model") == before


@contextmanager
def small_disk(folder, size):
    """A tmpfs of its own; the test is skipped where none may be mounted."""
    folder.mkdir()
    try:
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder], check=True,
                       capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("no tmpfs may be mounted here")
    try:
        yield folder
    finally:
        subprocess.run(["umount", folder], check=True)


def test_a_read_only_disk_is_named_and_the_run_goes_on_elsewhere(world, tmp_path, whole):
    with small_disk(tmp_path / "disk", "8m") as disk:
        stop(world, disk / "run")
        subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
        ending = program(train, "--resume", "--out", disk / "run")
        assert ending.code == 1 and isinstance(ending.error, (UserError, OSError))
        assert str(disk / "run/.lock") in ending.said and "Read-only file system" in ending.said
        assert "reference" not in ending.said  # said before anything long
        shutil.copytree(disk / "run", tmp_path / "run")
    assert program(train, "--resume", "--out", tmp_path / "run").code == 0
    found = last_state(tmp_path / "run")
    assert all(torch.equal(found[k], whole[k]) for k in whole)


def test_a_full_disk_at_the_export_of_two_ranks_is_named_at_once(world, tmp_path):
    """The other rank waits for the main one in a gather, which the main one must not leave."""
    (tmp_path / "full.py").write_text(f"""import sys
sys.path.insert(0, {os.path.dirname(train.__file__)!r})
import model, train
def full(path, *_):
    raise OSError(28, "No space left on device", path)
model.write_tensors = full
model.leave(train.main)
""")
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
         tmp_path / "full.py", *map(str, argv(world)), "--out", tmp_path / "run", "--timeout", "60"],
        capture_output=True, text=True)
    assert done.returncode != 0 and "has not answered" not in done.stderr
    assert f"error: [Errno 28] No space left on device: '{tmp_path}/run/model.tmp/model" in done.stderr
    assert train.whole_checkpoints(tmp_path / "run")


def test_a_small_disk_fills_up_with_checkpoints_and_is_named(world, tmp_path):
    """ENOSPC itself: a tmpfs with room for one checkpoint and a half."""
    with small_disk(tmp_path / "disk", "720k") as disk:
        ending = program(train, *argv(world), "--out", disk / "run")
        assert ending.code == 1 and isinstance(ending.error, (UserError, OSError)), repr(ending.error)
        said = ending.said[ending.said.index("error: "):]
        assert "No space left on device" in said and "tmp_000002/shard_0.safetensors" in said, said
        (last,) = train.whole_checkpoints(disk / "run")
        assert last.endswith("step_000001")
        shutil.copytree(disk / "run", tmp_path / "run")
    ending = program(train, "--resume", "--out", tmp_path / "run")
    assert ending.code == 0 and "resumed from" in ending.said, ending.said


def stop(world, out):
    """As if SIGTERM came after step 1 of 4."""
    write = train.data.append_row

    def write_and_ask(path, row):
        write(path, row)
        train.STOP["asked"] |= path.endswith("metrics.jsonl") and row["step"] == 1
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train.data, "append_row", write_and_ask)
        patch.setitem(train.STOP, "asked", False)
        assert program(train, *argv(world), "--out", out).code == 143


@pytest.mark.parametrize("name", ["pairs.jsonl", "held.jsonl", "model", "model/config.json",
                                  "model/tokenizer.json", "model/model.safetensors"])
def test_a_file_that_is_gone_at_resume_is_named_and_may_come_back(world, tmp_path, whole, name):
    stop(world, tmp_path / "run")
    before = files(tmp_path / "run")
    os.rename(world / name, world / "elsewhere")
    try:
        ending = program(train, "--resume", "--out", tmp_path / "run")
    finally:
        os.rename(world / "elsewhere", world / name)
    assert ending.code == 1 and isinstance(ending.error, UserError)
    named = f"{world}/model: neither model.safetensors" if name.endswith("safetensors") else str(world / name)
    assert named in ending.said
    assert files(tmp_path / "run") == before
    assert program(train, "--resume", "--out", tmp_path / "run").code == 0
    found = last_state(tmp_path / "run")
    assert all(torch.equal(found[k], whole[k]) for k in whole)


@pytest.mark.parametrize("name", ["model", "pairs.jsonl"])
def test_inputs_that_vanish_in_mid_run(world, tmp_path, monkeypatch, whole, name):
    """Pairs are read once, and nobody misses them; the export takes its config.json from the model folder."""
    step, away = train.train_step, world / "elsewhere"

    def train_step(run, batch, lr):
        if run.step == 1:
            os.rename(world / name, away)
        return step(run, batch, lr)

    monkeypatch.setattr(train, "train_step", train_step)
    try:
        ending = program(train, *argv(world), "--out", tmp_path / "run")
    finally:
        os.rename(away, world / name)
    if name == "model":
        assert ending.code == 1 and "model/config.json is missing" in ending.said
        assert not (tmp_path / "run/model").exists()
        monkeypatch.undo()
        assert program(train, "--resume", "--out", tmp_path / "run").code == 0
    else:
        assert ending.code == 0
    found = last_state(tmp_path / "run")
    assert all(torch.equal(found[k], whole[k]) for k in whole)
    assert (tmp_path / "run/model/model.safetensors").exists()


def test_a_run_folder_that_vanishes_in_mid_run_is_named(world, tmp_path, monkeypatch):
    step = train.train_step

    def train_step(run, batch, lr):
        if run.step == 2:
            shutil.rmtree(tmp_path / "run")
        return step(run, batch, lr)

    monkeypatch.setattr(train, "train_step", train_step)
    ending = program(train, *argv(world), "--out", tmp_path / "run")
    assert ending.code == 1 and isinstance(ending.error, (UserError, OSError))
    assert str(tmp_path / "run/metrics.jsonl") in ending.said and "No such file" in ending.said
