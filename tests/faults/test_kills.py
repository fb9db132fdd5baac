"""Runs that die and go on: killed in every phase, a stalled rank, another number of ranks, nodes.

The real programs run as ranks (launch.py). Each test compares what is left at the end with what a
run leaves that nobody disturbed. The long forms: pytest -m slow -s tests/faults/test_kills.py
"""

import contextlib
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import launch
import pytest
import tiny
from launch import assert_same_end, die, last_step, metrics, program

import data
import eval as evaluation
import oracle
import train

OPTIONS = ["--dtype", "float32", "--lr", "1e-4", "--batch_size", "8", "--max_change_ratio", "1",
           "--loss", "spot-bco", "--checkpointing", "none", "--save_every", "1", "--keep", "2",
           "--resume"]  # which also begins a run: after a kill the same command is given again


def make_world(folder, epochs, **shape):
    """(the command of a run of 3 steps an epoch, without --out; what it leaves on two ranks)."""
    model = tiny.write_checkpoint(folder / "model", **shape)
    pairs = tiny.write_pairs(folder / "pairs.jsonl")
    command = ["train.py", "--model", model, "--pairs", pairs, *OPTIONS, "--epochs", str(epochs)]
    launch.run([*command, "--out", folder / "undisturbed"], ranks=2)
    return command, folder / "undisturbed"


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("small"), epochs=2)


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """A model that takes some time to be saved: a random kill meets its checkpoints too."""
    return make_world(tmp_path_factory.mktemp("wide"), 6, hidden_size=256, intermediate_size=1024)


def assert_same_curve(one, other):
    losses = [[row["loss"] for row in metrics(out)] for out in (one, other)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


# --- a training run -------------------------------------------------------------------------------

PHASES = [  # the rank that dies as it makes the n-th call of this function; one start each
    (0, "train.prepare", 1), (1, "train.score_all", 1),
    (0, "model.write_tensors", 1),  # the reference cache
    (1, "train.check_step", 1), (0, "train.finish_step", 1),
    (1, "model.write_tensors", 1),  # its shard of the first checkpoint
    (0, "os.rename", 1),  # of the whole checkpoint
    (1, "train.save_checkpoint", 2),
    (0, "os.rmdir", 1),  # an old checkpoint, its files gone
    (1, "model.export", 1), (0, "shutil.copyfile", 1),  # weights are there, the tokenizer is not
    (0, "os.rename", 1),  # of the whole model
]


def test_killed_in_every_phase_ends_as_undisturbed(small, tmp_path):
    command, undisturbed = small
    out, last = tmp_path / "run", 0
    for rank, function, count in PHASES:
        run = launch.Started([*command, "--out", out], 2, {rank: (function, count, die)})
        codes = run.wait()
        assert codes[rank] == -signal.SIGKILL and codes[1 - rank], (function, run.said[-3000:])
        assert last_step(out) >= last and not (out / "model").exists()
        last = last_step(out)
    os.mkdir(out / "checkpoints/tmp_notes")  # a user's own
    launch.run([*command, "--out", out], ranks=2)
    assert_same_end(undisturbed, out)
    assert sorted(os.listdir(out / "checkpoints")) == ["step_000005", "step_000006", "tmp_notes"]
    run = launch.Started([*command, "--out", out], 2, {0: ("os.rmdir", 1, die)})
    assert run.wait()[0] == -signal.SIGKILL  # while the model makes room for itself
    launch.run([*command, "--out", out], ranks=2)
    assert_same_end(undisturbed, out)
    assert sorted(os.listdir(out)) == sorted(os.listdir(undisturbed))


def test_a_stalled_rank_ends_the_run_by_its_time_out(small, tmp_path):
    out = tmp_path / "run"
    run = launch.Started([*small[0], "--out", out, "--timeout", "5", "--epochs", "1000"], 2)
    while len(metrics(out)) < 3:
        assert run.running, run.said
        time.sleep(0.01)
    run.send(signal.SIGSTOP, rank=1)
    assert run.wait()[0] == 1
    assert "Timed out" in run.said
    assert last_step(out)


def test_a_run_folder_is_held_by_one_run(small):
    command, undisturbed = small
    with train.lock_folder(undisturbed):
        run = launch.Started([*command, "--out", undisturbed])
        assert run.wait() == [1]
    assert f"error: {undisturbed} is being written by another process" in run.said
    train.lock_folder(undisturbed).close()  # free again


MOMENTS = {  # what is there, and within how many seconds after that the signal comes
    "start": (".", 2.0), "reference pass": (".lock", 0.2), "step": ("metrics.jsonl", 0.5),
    "checkpoint": ("checkpoints/new", 0.01), "export": ("model.tmp", 0.005)}


@pytest.mark.slow  # minutes
def test_fifty_kills(wide, tmp_path):
    """At random moments: SIGKILL to all ranks or to one, SIGTERM to all."""
    command, undisturbed = wide
    out, last, rng, met = tmp_path / "run", 0, random.Random(0), []
    for i in range(50):
        moment = list(MOMENTS)[i % len(MOMENTS)]
        name, within = MOMENTS[moment]
        os.makedirs(out, exist_ok=True)
        run = launch.Started([*command, "--out", out], 2)
        while run.running and not (out / name).exists():
            time.sleep(0.001)
        time.sleep(rng.uniform(0, within))
        if run.running:
            met.append(moment)
        number, rank = rng.choice([(signal.SIGKILL, None), (signal.SIGKILL, rng.randrange(2)),
                                   (signal.SIGTERM, None)])
        run.send(number, rank)
        run.wait()
        assert last_step(out) >= last and "corrupt" not in run.said, run.said[-2000:]
        last = last_step(out)
        if (out / "model").exists():
            assert_same_end(undisturbed, out)
            shutil.rmtree(out)  # begin anew: more kills are asked for
            last = 0
    launch.run([*command, "--out", out], ranks=2)
    assert_same_end(undisturbed, out)
    print(f"\n{len(met)} of 50 kills met a living run; all ended as the undisturbed one")
    assert len(met) >= 35 and set(met) >= set(MOMENTS) - {"export"}


@pytest.mark.parametrize("ranks", [3, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 4))])
def test_a_checkpoint_of_two_ranks_goes_on_elsewhere(small, tmp_path, ranks):
    command, undisturbed = small
    run = launch.Started([*command, "--out", tmp_path / "run"], 2, {0: ("os.rename", 3, die)})
    run.wait()
    assert 0 < last_step(tmp_path / "run") < 6
    launch.run([*command, "--out", tmp_path / "run"], ranks)
    assert_same_curve(undisturbed, tmp_path / "run")


# --- elicit, rectify, evaluation ------------------------------------------------------------------

SAMPLING = ["--temperature", "1", "--dtype", "float32", "--batch_size", "2"]
WORK = {"elicit": (oracle, ["elicit", "--samples", "2", "--questions", "@"], "samples.jsonl"),
        "rectify": (oracle, ["rectify", "--errors", "@"], "rejected.jsonl"),
        "evaluation": (evaluation, ["--samples", "2", "--tasks", "own=@"], "results.json")}


@pytest.mark.parametrize("count,kills,tokens", [
    (8, 1, 40), pytest.param(96, 12, 200, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", WORK)
def test_sampling_killed_on_two_ranks_ends_as_undisturbed(small, tmp_path, name, count, kills,
                                                          tokens):
    """Ranks die in turn in mid-work; the end is that of an undisturbed process, and nothing was
    lost or asked twice."""
    module, options, result = WORK[name]
    data.write_rows(f"{tmp_path}/rows.jsonl", [
        {"id": f"q{i}", "question": f"What is {i} + {i}?", "answer": str(2 * i),
         "original_answer": f"It is \\boxed{{{2 * i + 1}}}."} for i in range(count)])
    options = [part.replace("@", f"{tmp_path / 'rows.jsonl'}") for part in options]
    options += ["--model", small[0][2], "--max_tokens", tokens, *SAMPLING, "--out"]
    outs = [tmp_path / "undisturbed", tmp_path / "killed"]
    code, output = program(module, *options, outs[0])
    assert code == 0, output
    command = [f"{module.__name__}.py", *options, outs[1]]
    for i in range(kills):  # as a rank keeps its second answer
        run = launch.Started(command, 2, {i % 2: ("data.append_row", 2, die)})
        assert -signal.SIGKILL in run.wait(), run.said[-3000:]
    launch.run(command, ranks=2)
    assert (outs[0] / result).read_bytes() == (outs[1] / result).read_bytes()
    keys = [[row["key"] for path in out.glob("**/raw-*.jsonl")
             for row in data.read_log(str(path))] for out in outs]
    assert sorted(keys[0]) == sorted(keys[1]) and len(set(keys[1])) == len(keys[1])


# --- two nodes on loopback, started by torchrun ---------------------------------------------------

def start_node(command, out, node, port):
    """One node of two, two ranks each; the mesh is 2 replicas of 2 shards."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc_per_node=2",
                "--rdzv_backend=c10d", f"--rdzv_endpoint=127.0.0.1:{port}", "--rdzv_id=spot",
                "--local_addr=127.0.0.1", f"--rdzv_conf=is_host={1 - node}", "--max_restarts=3"]
    # Without the variable a restarted agent and one that lives on wait in different stores.
    return subprocess.Popen(
        [*torchrun, *command, "--out", out, "--shard_size", "2", "--timeout", "20"],
        cwd=launch.ROOT, stderr=subprocess.PIPE, text=True, start_new_session=True,
        env={**os.environ, "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"})


def descendants(pid):
    """Ids of a process and of all that it started."""
    path = f"/proc/{pid}/task/{pid}/children"
    children = open(path).read().split() if os.path.exists(path) else []
    return [pid] + [p for child in children for p in descendants(int(child))]


@pytest.mark.slow
@pytest.mark.parametrize("killed", [False, True])
def test_two_nodes_give_one_nodes_curve(wide, tmp_path, killed):
    """Also where one node dies and is started again: torchrun restarts the other's ranks, and both
    go on from the checkpoint."""
    command, undisturbed = wide
    out = tmp_path / "run"
    port = launch.free_port()
    nodes = [start_node(command, out, i, port) for i in range(2)]
    try:
        if killed:
            while len(metrics(out)) < 5:
                assert all(node.poll() is None for node in nodes)
                time.sleep(0.01)
            for pid in descendants(nodes[1].pid):
                os.kill(pid, signal.SIGKILL)
            nodes[1].wait()
            nodes[1] = start_node(command, out, 1, port)
        said = [node.communicate(timeout=300)[1] for node in nodes]
    finally:
        for pid in descendants(nodes[0].pid) + descendants(nodes[1].pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
    assert [node.returncode for node in nodes] == [0, 0], said[0][-2000:] + said[1][-2000:]
    assert any(f"resumed from {out}" in text for text in said) == killed
    assert_same_curve(undisturbed, out)
