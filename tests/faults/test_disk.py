"""A full disk, a folder that cannot be made: each is named, and a run goes on from its last whole
checkpoint to the bits of an undisturbed one.

RLIMIT_FSIZE makes the kernel refuse, with a real error, whatever grows a file beyond a size: a
write fails as on a full disk, partly, then not at all.
"""

import os
import pkgutil
import resource
from contextlib import contextmanager

import pytest
from breaking import SETTINGS
from launch import assert_same_end, program
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
def full_at(name, path, count):
    """The disk is full from the count-th call of "module.function" with `path` in an argument."""
    function, calls = pkgutil.resolve_name(name), []
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def call(*args, **kwargs):
        if any(path in str(arg) for arg in args):
            calls.append(1)
        if len(calls) == count:
            resource.setrlimit(resource.RLIMIT_FSIZE, (20, hard))
        return function(*args, **kwargs)

    with no_file_above(soft), pytest.MonkeyPatch.context() as patch:
        patch.setattr(name, call)
        yield


def assert_full_disk(output):
    error = output[output.index("error: "):]
    assert "too large" in error or "No space" in error, error
    assert "Traceback" not in error


def options(world, out):
    """Of a run of four steps."""
    return ["--model", world["model"], "--pairs", world["pairs"], "--eval_pairs", world["pairs"],
            "--out", out, *SETTINGS, "--save_every", "1", "--max_steps", "4"]


@pytest.fixture(scope="module")
def undisturbed(world, tmp_path_factory):
    out = tmp_path_factory.mktemp("disk") / "undisturbed"
    assert program(train, *options(world, out))[0] == 0
    return out


@pytest.mark.parametrize("function,path,count", [
    ("model.save_file", "reference.safetensors", 1), ("data.append_row", "metrics.jsonl", 1),
    ("model.save_file", "checkpoints/new/shard_0.safetensors", 2),
    ("data.write_text", "checkpoints/new/state.json", 2),
    ("model.save_file", "model.tmp/model.safetensors", 1)])
def test_a_full_disk_is_named_and_the_run_goes_on(world, undisturbed, tmp_path, function, path,
                                                  count):
    with full_at(function, path, count):
        code, output = program(train, *options(world, tmp_path / "run"))
    assert code == 1
    assert_full_disk(output)
    assert not os.path.exists(tmp_path / "run/model")
    for folder in train.whole_checkpoints(tmp_path / "run"):  # only a whole one has this name
        digests = [train.file_sha256(os.path.join(folder, "shard_0.safetensors"))]
        assert digests == data.read_json(os.path.join(folder, "state.json"))["sha256"]
    if not os.path.exists(tmp_path / "run/config.json"):  # so early that the same command works
        code, output = program(train, *options(world, tmp_path / "run"))
        assert code == 0, output
    code, output = program(train, "--resume", "--out", tmp_path / "run")
    assert code == 0, output
    assert_same_end(undisturbed, tmp_path / "run")


def test_a_full_disk_loses_no_answer_but_the_one_in_hand(tmp_path):
    rows = [{"question": f"{i} + {i}?", "answer": str(2 * i)} for i in range(12)]
    data.write_rows(f"{tmp_path}/questions.jsonl", rows)
    with Misbehaving(lambda body, attempt: completion("It is \\boxed{7} " + "x" * 80)) as server:
        elicit = ("elicit", "--questions", tmp_path / "questions.jsonl", "--out", tmp_path / "out",
                  "--server", server.url, "--workers", "1")
        with no_file_above(777):
            code, output = program(oracle, *elicit)
        assert code == 1 and output.count("error: ") == 1
        assert_full_disk(output)
        kept = len(evaluation.read_answers(str(tmp_path / "out")))
        assert 0 < kept < 12 and len(server.requests) <= kept + 2  # it stopped at once
        server.requests.clear()
        code, output = program(oracle, *elicit)
        assert code == 0 and len(server.requests) == 12 - kept, output
    rows = data.read_log(str(tmp_path / "out/samples.jsonl"))
    assert [row["id"] for row in rows] == [f"{i + 1}/0" for i in range(12)]


def test_a_folder_that_cannot_be_made_is_named_before_the_work(world):
    """/proc takes no folders, not even from root."""
    code, output = program(train, *options(world, "/proc/spot/run"))
    assert code == 1 and "error: " in output and "'/proc/spot" in output
    assert "reference" not in output  # no reference pass
