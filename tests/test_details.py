"""What no curve shows: AdamW, delta across a stop, the canary, refusals, signals."""

import math
import os
import shutil
import signal
import time

import launch
import pytest
import tiny
import torch
from launch import assert_same_end, last_step, metrics
from safetensors.torch import load_file
from test_train import argv, both_logps, here, merged, run, run_here

import data
import train


def run_and_stop(monkeypatch, at, world, out, *extra):
    """As if SIGTERM came right after step `at`: the step after it is the last one."""
    write = train.data.append_row

    def write_and_ask(path, row):
        write(path, row)
        if path.endswith("metrics.jsonl") and row["step"] == at:
            train.STOP.set()
    with monkeypatch.context() as patch:
        patch.setattr(train.data, "append_row", write_and_ask)
        run_here(world, out, *extra, code=143)
    train.STOP.clear()
    assert last_step(out) == at + 2 and not os.path.exists(out / "model")


def with_weights(hf, weights):
    """Put a checkpoint of ours into a model of transformers."""
    for name, p in hf.named_parameters():
        p.data.copy_(weights[name.removeprefix("model.")])


@pytest.fixture(scope="module")
def two_steps(world, tmp_path_factory):
    """Rates of 0.01 and 0.02 (warm-up over 3 of 6 steps to 0.03); stopped there; clipped."""
    out = tmp_path_factory.mktemp("adamw") / "run"
    with pytest.MonkeyPatch.context() as patch:
        run_and_stop(patch, 0, world, out, "--lr", "0.03", "--warmup", "0.5", "--max_steps", "6",
                     "--save_every", "1", "--keep", "2", "--clip", "0.05")
    start = {k.removeprefix("model."): v.double() for k, v in
             load_file(os.path.join(world["model"], "model.safetensors")).items()}
    return out, start, *({k: v.double() for k, v in merged(out, i).items()} for i in (0, 1))


def test_second_gradient_is_of_the_second_batch_alone(world, two_steps):
    """At rewards that are not 0, and without what the first step left behind."""
    from transformers import AutoModelForCausalLM

    out, _, first, second = two_steps
    hf = AutoModelForCausalLM.from_pretrained(world["model"], dtype=torch.float32)
    chat, (pairs, *_) = data.load_chat(world["model"], 265), tiny.read_pairs(world["pairs"])
    pairs = [pairs[i] for i in train.epoch_batches(24, 8, 0, 0)[1]]
    with torch.no_grad():
        reference = both_logps(hf, chat, pairs)
    with_weights(hf, first)
    chosen, rejected = (0.1 * (both_logps(hf, chat, pairs) - reference)).unbind(1)
    value = -(torch.sigmoid(chosen).log() + torch.sigmoid(-rejected).log()).mean()
    value.backward()
    gradients = {n.removeprefix("model."): p.grad for n, p in hf.named_parameters()}
    norm = math.sqrt(sum(float(g.double().square().sum()) for g in gradients.values()))
    logged = [metrics(out)[1][key] for key in ("loss", "grad_norm")]
    assert logged == pytest.approx([value.item(), norm], rel=1e-4) and norm > 0.1
    scale = max(g.abs().max() for g in gradients.values()) * 0.05 / norm
    for name, g in gradients.items():
        gradient = (second[name + ".exp_avg"] - 0.9 * first[name + ".exp_avg"]) / 0.1
        assert (gradient - g * 0.05 / norm).abs().max() <= 1e-4 * scale, name


def test_two_adamw_steps_equal_torchs(two_steps):
    """Given the clipped gradients, which are read from the first moments."""
    out, start, first, second = two_steps
    assert [m["lr"] for m in metrics(out)] == pytest.approx([0.01, 0.02])
    assert start.keys() <= first.keys() and len(first) == 3 * len(start)
    weights = {name: torch.nn.Parameter(w.clone()) for name, w in start.items()}
    groups = [{"params": [w for w in weights.values() if w.ndim > 1], "weight_decay": 0.01},
              {"params": [w for w in weights.values() if w.ndim == 1], "weight_decay": 0.0}]
    adamw = torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-8, foreach=False)
    for rate, before, after in ((0.01, None, first), (0.02, first, second)):
        for name, w in weights.items():
            kept = 0.9 * before[name + ".exp_avg"] if before else 0.0
            w.grad = (after[name + ".exp_avg"] - kept) / 0.1
        for group in adamw.param_groups:
            group["lr"] = rate
        adamw.step()
        for name, w in weights.items():
            assert (w - after[name]).abs().max() <= 1e-6, name
            found, square = after[name + ".exp_avg_sq"], adamw.state[w]["exp_avg_sq"]
            assert (found - square).abs().max() <= 1e-5 * square.max(), name


def test_cumulative_delta_by_hand_and_across_a_stop(world, tmp_path, monkeypatch):
    """24 pairs in batches of 10: a step of 4 pairs weighs less."""
    extra = ("--loss", "spot-bco", "--delta", "cumulative", "--batch_size", "10", "--epochs", "3",
             "--lr", "1e-3")
    run_here(world, tmp_path / "whole", *extra)
    rows, total, seen = metrics(tmp_path / "whole"), 0.0, 0
    assert len(rows) == 9
    for row, pairs in zip(rows, 3 * (10, 10, 4)):
        assert row["delta"] == pytest.approx(total / max(seen, 1), rel=1e-9, abs=1e-12)
        total += pairs * (row["reward_chosen"] + row["reward_rejected"]) / 2
        seen += pairs
    assert max(abs(row["delta"]) for row in rows) > 1e-3
    state = data.read_json(train.whole_checkpoints(tmp_path / "whole")[-1] + "/state.json")
    assert state["delta"] == pytest.approx(total / seen, rel=1e-9)
    run_and_stop(monkeypatch, 3, world, tmp_path / "stopped", *extra)
    here("--resume", "--out", tmp_path / "stopped")
    assert_same_end(tmp_path / "whole", tmp_path / "stopped")


@pytest.mark.parametrize("objective", ["spot-bce", "sft"])
def test_canary_sees_one_bit_of_a_reference(world, tmp_path, monkeypatch, objective):
    """In one pair of the first step: the mean loss stays what it must be."""
    pair, reference_pass = train.epoch_batches(24, 8, 0, 0)[0][5], train.reference_pass

    def differing(run):
        reference_pass(run)
        logp = run.train_set.reference[pair, 1]
        logp.copy_(logp.nextafter(torch.zeros_like(logp)))
    monkeypatch.setattr(train, "reference_pass", differing)
    said = run_here(world, tmp_path / "out", "--loss", objective, code=1)
    assert "error: step 0 must give rewards of exactly 0" in said
    assert not {"model", "model.tmp", "checkpoints"} & set(os.listdir(tmp_path / "out"))


def test_step_that_is_not_finite_is_named_and_earlier_checkpoints_stay(world, tmp_path):
    out = tmp_path / "out"
    said = run_here(world, out, "--lr", "1e8", "--save_every", "1", "--keep", "9", code=1)
    lines = ", ".join(str(i + 1) for i in train.epoch_batches(24, 8, 0, 0)[1])
    assert "error: step 1: loss " in said
    assert f"left as they were. Is --lr too high? Lines {lines} of {world['pairs']}\n" in said
    assert [m["step"] for m in metrics(out)] == [0] and not (out / "model").exists()
    assert sorted(os.listdir(out / "checkpoints")) == ["step_000001"]
    assert all(t.isfinite().all() for t in merged(out).values())


def test_held_out_numbers_equal_transformers(world, tmp_path):
    from transformers import AutoModelForCausalLM

    out, held_out = tmp_path / "out", tiny.write_pairs(tmp_path / "held_out.jsonl", 9, seed=7)
    run_here(world, out, "--loss", "spot-bco", "--eval_pairs", held_out, "--lr", "1e-3",
             "--epochs", "3", "--max_steps", "7", "--save_every", "1", "--keep", "9",
             "--save_dtype", "float32")
    chat, (pairs, *_) = data.load_chat(world["model"], 265), tiny.read_pairs(held_out)
    hf = AutoModelForCausalLM.from_pretrained(world["model"], dtype=torch.float32)
    with torch.no_grad():
        reference = both_logps(hf, chat, pairs)
    rows = metrics(out, "eval")
    assert [row["step"] for row in rows] == [3, 6, 7]
    for row in rows:
        state = data.read_json(train.whole_checkpoints(out)[row["step"] - 1] + "/state.json")
        delta = state["delta"]
        assert state["step"] == row["step"] and abs(delta) > 1e-4
        with_weights(hf, merged(out, row["step"] - 1))
        with torch.no_grad():
            r = 0.1 * (both_logps(hf, chat, pairs) - reference)
        (chosen, rejected), sigma = r.unbind(1), torch.sigmoid
        expected = {"reward_chosen": chosen, "reward_rejected": rejected,
                    "margin": chosen - rejected, "accuracy": (chosen > rejected).double(),
                    "tether_chosen": 1 - sigma(chosen - delta),
                    "tether_rejected": sigma(rejected - delta),
                    "loss": -sigma(chosen - delta).log() - sigma(delta - rejected).log()}
        for key, value in expected.items():
            assert row[key] == pytest.approx(value.mean().item(), rel=1e-4), key
    exported = AutoModelForCausalLM.from_pretrained(out / "model", dtype=torch.float32)
    for a, b in zip(exported.parameters(), hf.parameters(), strict=True):
        assert torch.equal(a, b)


def test_sigterm_to_one_rank_stops_both_at_the_same_step(world, tmp_path):
    extra, out = ("--epochs", "6", "--save_every", "0"), tmp_path / "stopped"
    run(world, tmp_path / "whole", *extra, ranks=2)
    started = launch.Started(["train.py", *argv(world, out, *extra)], 2)
    while len(metrics(out)) < 3:
        assert started.running, started.said
        time.sleep(0.01)
    started.send(signal.SIGTERM, rank=1)
    codes, said, step = started.wait(), started.said, last_step(out)
    assert codes == [143, 143] and 3 < step < 18 and not os.path.exists(out / "model")
    assert said.count(f"SIGTERM: saved at step {step} of 18; go on with --resume") == 1
    assert sorted(os.listdir(out / "checkpoints" / f"step_{step:06d}")) == [
        "shard_0.safetensors", "shard_1.safetensors", "state.json"]
    said = run(world, out, *extra, "--resume", ranks=2)
    assert f"resumed from {out}/checkpoints/step_{step:06d}\n" in said
    assert_same_end(tmp_path / "whole", out)


def test_two_ranks_say_once_what_is_wrong_with_the_options(world, tmp_path):
    """Rank 0 is a second later than rank 1, which must wait until it has spoken."""
    command = ["train.py", *argv(world, tmp_path / "out", "--loss", "foo")]
    started = launch.Started(command, 2, {0: ("train.parse_options", 1, launch.late)})
    assert started.wait() == [2, -signal.SIGKILL]
    assert started.said.count("argument --loss: invalid choice: 'foo'") == 1, started.said
    assert not os.path.exists(tmp_path / "out")


def test_resume_takes_moved_files(world, tmp_path, monkeypatch):
    held_out = tiny.write_pairs(tmp_path / "held_out.jsonl", 9, seed=7)
    options = ("--epochs", "2", "--eval_pairs", held_out)
    run_and_stop(monkeypatch, 1, world, tmp_path / "moved", *options)  # after 3 of 6 steps
    data.append_row(tmp_path / "moved" / "eval.jsonl", {"step": 6})  # as if killed, not stopped
    run_here(world, tmp_path / "whole", *options)
    here("--resume", "--out", tmp_path / "moved",
         "--model", shutil.copytree(world["model"], tmp_path / "model"),
         "--pairs", shutil.copy(world["pairs"], tmp_path / "copy.jsonl"))
    assert_same_end(tmp_path / "whole", tmp_path / "moved")
    assert metrics(tmp_path / "whole", "eval") == metrics(tmp_path / "moved", "eval")
