"""A run that dies and goes on: killed at random moments, a rank alone, on other world sizes, over two nodes.

Every test starts the real command and compares checkpoints, exported weights and metrics with those of a run
that nobody disturbed. What is slow has a short form here, and its long one by `pytest -m slow tests/faults`.
"""

import glob
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file

import data
import tiny
import train

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
OPTIONS = ["--dtype", "float32", "--lr", "1e-4", "--batch_size", "8", "--max_change_ratio", "1", "--loss",
           "spot-bco", "--checkpointing", "none", "--epochs", "6", "--save_every", "1", "--keep", "2"]
STEPS = 18
TIMING = ("tokens_per_s", "mfu", "memory_gb")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    # Wide enough that a checkpoint takes some time to write: else no kill would ever meet one.
    return {"model": tiny.write_checkpoint(folder / "model", hidden_size=256, intermediate_size=1024),
            "pairs": tiny.write_pairs(folder / "pairs.jsonl")}


@pytest.fixture(scope="module")
def undisturbed(world, tmp_path_factory):
    out = tmp_path_factory.mktemp("undisturbed") / "run"
    finish(world, out)
    return out


def command(world, out, *extra, ranks=2):
    """The command that a user gives and, after a kill, gives again: --resume also starts a run."""
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}",
            "train.py", *given(world, out), *extra]


def given(world, out):
    return ["--model", world["model"], "--pairs", world["pairs"], "--out", str(out), *OPTIONS, "--resume"]


def start(*args, **kwargs):
    return subprocess.Popen(command(*args, **kwargs), cwd=ROOT, stderr=subprocess.PIPE, text=True,
                            start_new_session=True)


def finish(*args, **kwargs):
    """The command to its end; returns what it said."""
    process = start(*args, **kwargs)
    said = process.communicate(timeout=300)[1]
    assert process.returncode == 0, said[-3000:]
    return said


def workers(out):
    """Process ids of all ranks and launchers that name this run folder."""
    found = []
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{pid}/cmdline", "rb") as f:
                if str(out).encode() in f.read():
                    found.append(int(pid))
        except OSError:
            pass
    return found


def rank_of(pid):
    try:
        with open(f"/proc/{pid}/environ", "rb") as f:
            return next((int(v[5:]) for v in f.read().split(b"\0") if v.startswith(b"RANK=")), None)
    except OSError:
        return None


def send(pids, which):
    for pid in pids:
        try:
            os.kill(pid, which)
        except OSError:
            pass


def steps_done(out):
    path = os.path.join(out, "metrics.jsonl")
    return len(data.read_log(path))


def merged(folder):
    shards = [load_file(f) for f in sorted(glob.glob(os.path.join(folder, "shard_*.safetensors")))]
    return {k: torch.cat([s[k] for s in shards]) for k in shards[0]}


def metrics(out):
    return [{k: v for k, v in row.items() if k not in TIMING}
            for row in data.read_log(os.path.join(out, "metrics.jsonl"))]


def same_end(one, other):
    a, b = (merged(train.whole_checkpoints(out)[-1]) for out in (one, other))
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    a, b = (load_file(os.path.join(out, "model", "model.safetensors")) for out in (one, other))
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    assert metrics(one) == metrics(other)


def whole(out):
    """Steps of the checkpoints that carry a whole one's name; each must be what its hashes say."""
    found = train.whole_checkpoints(out)
    for folder in found:
        with open(os.path.join(folder, "state.json")) as f:
            state = json.load(f)
        for i, digest in enumerate(state["sha256"]):
            assert train.file_sha256(os.path.join(folder, f"shard_{i}.safetensors")) == digest, folder
    return [int(folder[-6:]) for folder in found]


# --- killed at any moment -------------------------------------------------------------------------

# The moment after which the signal comes, within so many seconds.
MOMENTS = {
    "start": (lambda out: True, 5.0),
    "reference pass": (os.path.isdir, 0.2),
    "step": (lambda out: steps_done(out) > 0, 0.5),
    "checkpoint": (lambda out: glob.glob(f"{out}/checkpoints/tmp_*"), 0.01),
    "export": (lambda out: os.path.isdir(f"{out}/model.tmp"), 0.005),
}


def disturb(world, out, moment, rng, how):
    """Start the command, wait for the moment, send the signal; returns what became of it."""
    process, (condition, within) = start(world, out), MOMENTS[moment]
    while process.poll() is None and not condition(out):
        time.sleep(0.001)
    time.sleep(rng.uniform(0, within))
    ended = process.poll() is not None  # before the signal could meet it
    pids, victim = workers(out), rng.randrange(2)
    if how == "SIGKILL to all":
        send([process.pid, *pids], signal.SIGKILL)
    elif how == "SIGKILL to one":
        send([pid for pid in pids if rank_of(pid) == victim], signal.SIGKILL)
    else:
        send([process.pid], signal.SIGTERM)
    _, said = process.communicate(timeout=120)  # a dead rank ends the others: no hang
    send(workers(out), signal.SIGKILL)
    return "ended before" if ended else ("done" if process.returncode == 0 else "killed"), said


def storm(world, undisturbed, out, kills, seed):
    rng, outcomes, last = random.Random(seed), [], []
    for i in range(kills):
        moment = list(MOMENTS)[i % len(MOMENTS)]
        how = ("SIGKILL to all", "SIGKILL to one", "SIGTERM")[rng.randrange(3)]
        outcome, said = disturb(world, out, moment, rng, how)
        now = whole(out) if os.path.isdir(out) else []
        assert not last or (now and now[-1] >= last[-1]), (last, now)  # the last whole one is never lost
        assert "corrupt" not in said, said[-2000:]
        outcomes.append((moment, how, outcome, now[-1] if now else 0))
        last = now
        if outcome != "killed" and os.path.isdir(f"{out}/model"):
            same_end(undisturbed, out)
            subprocess.run(["rm", "-r", str(out)], check=True)  # begin anew: more kills are asked for
            last = []
    finish(world, out)
    same_end(undisturbed, out)
    killed = [o for o in outcomes if o[2] == "killed"]
    print(f"\n{len(killed)} of {kills} tries met a living run; all ended as the undisturbed one")
    for outcome in outcomes:
        print("  ", *outcome)
    return killed


def test_killed_in_every_phase_ends_as_undisturbed(world, undisturbed, tmp_path):
    assert len(storm(world, undisturbed, tmp_path / "run", 5, seed=1)) >= 3


@pytest.mark.slow  # some 8 minutes
def test_fifty_kills(world, undisturbed, tmp_path):
    killed = storm(world, undisturbed, tmp_path / "run", 50, seed=0)
    assert len(killed) >= 35 and {k[0] for k in killed} >= {"start", "reference pass", "step", "checkpoint"}


def train_here(world, out):
    ranks = train.open_ranks(60)
    try:
        return train.train(train.parse_options(given(world, out)), ranks)
    finally:
        train.close_ranks()


def test_a_death_in_mid_deletion_leaves_no_half_checkpoint(world, tmp_path, monkeypatch):
    remove, out = train.shutil.rmtree, tmp_path / "run"

    def die(folder, **kwargs):
        if "step_000001" in folder:
            os.remove(os.path.join(folder, "state.json"))
            raise KeyboardInterrupt
        remove(folder, **kwargs)
    monkeypatch.setattr(train.shutil, "rmtree", die)
    with pytest.raises(KeyboardInterrupt):
        train_here(world, out)
    assert whole(out) == [2, 3]
    monkeypatch.undo()
    assert train_here(world, out) == 0 and whole(out) == [STEPS - 1, STEPS]
    assert sorted(os.listdir(out / "checkpoints")) == [f"step_{n:06d}" for n in (STEPS - 1, STEPS)]


def test_a_death_while_a_model_is_replaced_leaves_a_whole_one(world, undisturbed, tmp_path, monkeypatch):
    out = tmp_path / "run"
    subprocess.run(["cp", "-r", undisturbed, out], check=True)
    remove = train.shutil.rmtree

    def die(folder, **kwargs):
        if "model" in os.path.basename(folder):
            os.remove(os.path.join(folder, "tokenizer.json"))
            raise KeyboardInterrupt
        remove(folder, **kwargs)
    monkeypatch.setattr(train.shutil, "rmtree", die)
    with pytest.raises(KeyboardInterrupt):
        train_here(world, out)
    same_end(undisturbed, out)
    assert os.listdir(out / "model") == os.listdir(undisturbed / "model")
    monkeypatch.undo()
    assert train_here(world, out) == 0 and sorted(os.listdir(out)) == sorted(os.listdir(undisturbed))


def test_a_run_folder_is_held_by_one_run(world, undisturbed, capsys):
    ranks = train.open_ranks(60)
    with train.claimed(undisturbed, ranks):
        with pytest.raises(SystemExit):
            train.train(train.parse_options(given(world, undisturbed)), ranks)
    assert f"error: {undisturbed} is being written by another process" in capsys.readouterr().err
    ranks = train.open_ranks(60)
    with train.claimed(undisturbed, ranks):  # free again
        pass
    train.close_ranks()


def test_what_does_not_belong_among_checkpoints_is_left_alone(world, undisturbed, tmp_path):
    out = tmp_path / "run"
    os.makedirs(out / "checkpoints/tmp_notes")
    (out / "checkpoints/tmp_7").write_text("mine")
    finish(world, out)
    same_end(undisturbed, out)
    assert (out / "checkpoints/tmp_notes").is_dir() and (out / "checkpoints/tmp_7").read_text() == "mine"


def test_a_checkpoint_elsewhere_behind_a_link_is_unlinked_not_emptied(tmp_path):
    (tmp_path / "far").mkdir()
    (tmp_path / "far/state.json").write_text("{}")
    os.symlink(tmp_path / "far", tmp_path / "step_000001")
    train.discard(str(tmp_path / "step_000001"))
    assert sorted(os.listdir(tmp_path)) == ["far"] and os.listdir(tmp_path / "far") == ["state.json"]


def test_a_stalled_rank_ends_the_run_by_its_time_out(world, tmp_path):
    out = tmp_path / "run"
    process = start(world, out, "--timeout", "5", "--epochs", "1000")
    while steps_done(out) < 3:
        assert process.poll() is None
        time.sleep(0.01)
    stalled = [pid for pid in workers(out) if rank_of(pid) == 1]
    send(stalled, signal.SIGSTOP)
    try:
        began = time.monotonic()
        while any(rank_of(pid) == 0 for pid in workers(out)):  # rank 0 gives up; torchrun then ends all
            assert time.monotonic() - began < 60
            time.sleep(0.05)
        send(stalled, signal.SIGCONT)
        said = process.communicate(timeout=60)[1]
    finally:
        send([process.pid, *workers(out)], signal.SIGKILL)
    assert process.returncode != 0
    assert "another rank has died or has not answered within --timeout" in said, said[-3000:]
    assert whole(out)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 3, 4])
def test_a_checkpoint_of_two_ranks_goes_on_elsewhere(world, undisturbed, tmp_path, ranks):
    out = tmp_path / "run"
    process = start(world, out)
    while steps_done(out) < 6:
        assert process.poll() is None
        time.sleep(0.01)
    send([process.pid, *workers(out)], signal.SIGKILL)
    process.communicate()
    assert 4 <= whole(out)[-1] < STEPS
    assert "no longer to the bit" in finish(world, out, ranks=ranks)
    curves = [[row["loss"] for row in metrics(o)] for o in (undisturbed, out)]
    assert curves[0] == pytest.approx(curves[1], rel=1e-5)


# --- the other programs, on two ranks --------------------------------------------------------------

SAMPLED = ["--max_tokens", "200", "--temperature", "1", "--dtype", "float32", "--batch_size", "2"]
WORK = {"elicit": (["oracle.py", "elicit", "--samples", "3"], "--questions", "samples.jsonl"),
        "rectify": (["oracle.py", "rectify"], "--errors", "rejected.jsonl"),
        "evaluation": (["eval.py", "--samples", "3"], "--tasks", "results.json")}


def storm_of_work(world, folder, name, kills, seed):
    """Kill a program on two ranks again and again in mid-work; returns how many kills met a living one."""
    rng, met = random.Random(seed), 0
    program, option, result = WORK[name]
    rows = [{"id": f"q{i}", "question": f"What is {i} + {i}?", "answer": str(2 * i),
             "ground_truth": str(2 * i), "original_answer": f"It is \\boxed{{{2 * i + 1}}}."}
            for i in range(60)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = f"own={folder}/rows.jsonl" if name == "evaluation" else f"{folder}/rows.jsonl"

    def begin(out):
        return subprocess.Popen(
            [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", *program,
             option, source, "--model", world["model"], "--out", str(out), *SAMPLED], cwd=ROOT,
            stderr=subprocess.PIPE, text=True, start_new_session=True)

    def answers(out):
        return sum(path.read_bytes().count(b"\n") for path in out.glob("**/raw-*.jsonl"))

    calm, out = folder / "calm", folder / "out"
    process = begin(calm)
    said = process.communicate(timeout=300)[1]
    assert process.returncode == 0, said[-2000:]
    total = answers(calm)
    for i in range(kills):
        process, enough = begin(out), answers(out) + rng.randint(1, max(1, total // (kills + 1)))
        while process.poll() is None and answers(out) < enough:
            time.sleep(0.001)
        met += process.poll() is None
        pids, victim = workers(out), rng.randrange(2)
        if i % 3 == 1:
            send([pid for pid in pids if rank_of(pid) == victim], signal.SIGKILL)
        else:
            send([process.pid, *pids], (signal.SIGKILL, None, signal.SIGTERM)[i % 3])
        process.communicate(timeout=120)
        send(workers(out), signal.SIGKILL)
    process = begin(out)
    said = process.communicate(timeout=300)[1]
    assert process.returncode == 0, said[-2000:]
    assert (out / result).read_bytes() == (calm / result).read_bytes()
    keys = [json.loads(line)["key"] for path in out.glob("**/raw-*.jsonl")
            for line in path.read_text().split("\n")[:-1]]
    assert len(set(keys)) == total and len(keys) == total  # nothing was lost, nothing was asked twice
    return met


@pytest.mark.parametrize("name", WORK)
def test_sampling_killed_on_two_ranks_ends_as_undisturbed(world, tmp_path, name):
    assert storm_of_work(world, tmp_path, name, 2, seed=0) >= 1


@pytest.mark.slow  # some 3 minutes each
@pytest.mark.parametrize("name", WORK)
def test_sampling_killed_a_dozen_times(world, tmp_path, name):
    met = storm_of_work(world, tmp_path, name, 12, seed=1)
    print(f"\n{name}: {met} of 12 kills met a living program; the end was the undisturbed one's")
    assert met >= 8


# --- two nodes on loopback ------------------------------------------------------------------------


def agent(world, out, node, port):
    """One node of two, two ranks each; the mesh is 2 replicas of 2 shards."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc_per_node=2",
                "--rdzv_backend=c10d", f"--rdzv_endpoint=127.0.0.1:{port}", "--rdzv_id=spot",
                "--local_addr=127.0.0.1", f"--rdzv_conf=is_host={1 - node}", "--max_restarts=3"]
    return subprocess.Popen(
        [*launcher, "train.py", *given(world, out), "--shard_size", "2", "--timeout", "20"], cwd=ROOT,
        stderr=subprocess.PIPE, text=True, start_new_session=True,
        # Without the second, a restarted agent and one that lives on look for each other in different stores.
        env={**os.environ, "NODE_OF_TEST": str(node), "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"})


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def of_node(pids, node):
    def belongs(pid):
        try:
            with open(f"/proc/{pid}/environ", "rb") as f:
                return f"NODE_OF_TEST={node}".encode() in f.read().split(b"\0")
        except OSError:
            return False
    return [pid for pid in pids if belongs(pid)]


@pytest.mark.slow
def test_two_nodes_give_one_nodes_curve(world, undisturbed, tmp_path):
    out, port = tmp_path / "run", free_port()
    nodes = [agent(world, out, i, port) for i in range(2)]
    said = [node.communicate(timeout=300)[1] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], said[0][-2000:] + said[1][-2000:]
    curves = [[row["loss"] for row in metrics(o)] for o in (undisturbed, out)]
    assert curves[0] == pytest.approx(curves[1], rel=1e-5)


@pytest.mark.slow
def test_a_node_that_dies_and_comes_back(world, undisturbed, tmp_path):
    """torchrun's elastic restart: the other node's workers fail, it waits, both go on from the checkpoint."""
    out, port = tmp_path / "run", free_port()
    nodes = [agent(world, out, i, port) for i in range(2)]
    try:
        while steps_done(out) < 5:
            assert all(node.poll() is None for node in nodes)
            time.sleep(0.01)
        send([nodes[1].pid, *of_node(workers(out), 1)], signal.SIGKILL)
        nodes[1].wait()
        kept = whole(out)[-1]
        time.sleep(2)
        nodes[1] = agent(world, out, 1, port)
        said = [node.communicate(timeout=300)[1] for node in nodes]
    finally:
        send([*(node.pid for node in nodes), *workers(out)], signal.SIGKILL)
    assert [node.returncode for node in nodes] == [0, 0], said[0][-3000:] + said[1][-3000:]
    assert kept >= 3 and any(f"resumed from {out}" in text for text in said)
    curves = [[row["loss"] for row in metrics(o)] for o in (undisturbed, out)]
    assert curves[0] == pytest.approx(curves[1], rel=1e-5)


# --- endurance ------------------------------------------------------------------------------------


def endure(world, tmp_path, monkeypatch, steps):
    """`steps` steps at once and in ten resumed pieces; peak memory in GB after a tenth and at the end."""
    def go(out):
        ranks = train.open_ranks(60)
        code = train.train(train.parse_options(
            [*given(world, out), "--batch_size", "4", "--epochs", str(steps), "--max_steps", str(steps),
             "--save_every", "0"]), ranks)
        train.close_ranks()
        return code
    assert go(tmp_path / "whole") == 0
    write = train.data.append_row

    def write_and_ask(path, row):
        write(path, row)
        train.STOP["asked"] = (row["step"] + 2) % (steps // 10) == 0  # the step after the look is the last
    monkeypatch.setattr(train.data, "append_row", write_and_ask)
    codes = [go(tmp_path / "pieces") for _ in range(10)]
    assert codes == [143] * 9 + [0]
    same_end(tmp_path / "whole", tmp_path / "pieces")
    memory = [row["memory_gb"] for row in data.read_log(str(tmp_path / "whole" / "metrics.jsonl"))]
    assert len(memory) == steps
    return memory[steps // 10], memory[-1]


def test_ten_pieces_equal_the_whole(world, tmp_path, monkeypatch):
    endure(world, tmp_path, monkeypatch, 50)


@pytest.mark.slow
def test_two_thousand_steps(tmp_path, monkeypatch):
    small = {"model": tiny.write_checkpoint(tmp_path / "model"),
             "pairs": tiny.write_pairs(tmp_path / "pairs.jsonl")}
    early, late = endure(small, tmp_path, monkeypatch, 2000)
    print(f"\npeak memory after 200 steps {early:.3f} GB, after 2,000 {late:.3f} GB")
    assert late < 1.02 * early
