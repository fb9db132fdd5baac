"""The sharded loop as a user starts it: real processes, real files, curves and bits compared."""

import glob
import math
import os

import numpy as np
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

import data
import launch
import loss
import model as qwen
import tiny
import train
from data import UserError
from launch import metrics


def argv(world, out, *extra):
    """The command line of a run; --resume may stand last."""
    options = {"--model": world["model"], "--pairs": world["pairs"], "--out": str(out),
               "--dtype": "float32", "--lr": "1e-4", "--batch_size": "8", "--max_change_ratio": "1",
               "--checkpointing": "none"}
    options.update(zip(extra[::2], extra[1::2]))
    resume = ["--resume"] if extra[-1:] == ("--resume",) else []
    return [part for pair in options.items() for part in pair] + resume


def run(world, out, *extra, ranks):
    return launch.run(["train.py", *argv(world, out, *extra)], ranks)


def here(*given, code=0):
    """train.py in this process; what it said."""
    found, said = launch.program(train, *given)
    assert found == code, said[-3000:]
    return said


def run_here(world, out, *extra, code=0):
    return here(*argv(world, out, *extra), code=code)


def merged(out, which=-1):
    """{name: whole tensor} of one of a run's checkpoints, weights and moments."""
    folder = train.whole_checkpoints(out)[which]
    shards = [load_file(f) for f in sorted(glob.glob(os.path.join(folder, "shard_*.safetensors")))]
    return {k: torch.cat([s[k] for s in shards]) for k in shards[0]}


# The default, then 1 x N against N x 1 (packs of one fork), two pack sizes, uneven shards (265 rows
# on 3 ranks), and a 2-D mesh: ranks, tokens a pack, shard size.
LAYOUTS = [(1, 16384, 0), (1, 1, 0), (2, 300, 0), (3, 16384, 0), (4, 500, 2)]


def run_layout(world, layout, out, *extra):
    ranks, tokens, shard_size = layout
    run(world, out, *extra, "--tokens_per_pack", str(tokens), "--shard_size", str(shard_size),
        ranks=ranks)


@pytest.fixture(scope="module")
def layouts(world, tmp_path_factory):
    """One run of 20 steps in every layout; the checkpoint after step 1 is kept."""
    outs = [tmp_path_factory.mktemp("layouts") / str(i) for i in range(len(LAYOUTS))]
    for layout, out in zip(LAYOUTS, outs):
        run_layout(world, layout, out, "--max_steps", "20", "--epochs", "9", "--save_every", "1",
                   "--keep", "20")
    return outs


def test_curve_is_independent_of_ranks_packs_and_micro_batches(layouts):
    curves = torch.tensor([[(m["loss"], m["grad_norm"], m["reward_rejected"]) for m in metrics(out)]
                           for out in layouts], dtype=torch.float64)
    assert curves.shape[1] == 20
    assert curves[0, 0, 0] - curves[0, -1, 0] > 0.01  # it learns, so equality says something
    worst = ((curves - curves[0]).abs() / curves[0].abs().clamp_min(1e-2)).amax((1, 2))
    print("largest relative difference of loss, gradient norm, reward by layout:", worst.tolist())
    assert worst.max() <= 1e-4


def both_logps(hf, chat, pairs):
    """(N, 2) log pi of y+ and y- by one plain forward of transformers an answer, differentiable."""
    def logp(messages, text):
        prompt, answer = chat.prompt(messages), chat.encode(text) + [chat.im_end]
        logits = hf(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1:-1]
        return logits.double().log_softmax(-1).gather(1, torch.tensor(answer)[:, None]).sum()
    return torch.stack([torch.stack([logp(p.messages, p.chosen), logp(p.messages, p.rejected)])
                        for p in pairs])


def transformers_gradients(folder, pairs_path):
    """{our name: gradient} of the first step's loss by two plain forwards a pair. At r = 0 the
    coefficients are known: beta/2 (grad log pi(y-) - grad log pi(y+)) / N."""
    from transformers import AutoModelForCausalLM

    hf = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    pairs, *_ = tiny.read_pairs(pairs_path)
    first = [pairs[i] for i in train.epoch_batches(24, 8, 0, 0)[0]]
    chosen, rejected = both_logps(hf, data.load_chat(folder, 265), first).unbind(1)
    (0.05 * (rejected - chosen).mean()).backward()
    return {n.removeprefix("model."): p.grad for n, p in hf.named_parameters()}


def largest_difference(expected, out):
    """Of a step's gradient, from Adam's first moment (0.1 g, g clipped), over the largest entry."""
    clipped = max(1.0, metrics(out)[0]["grad_norm"] / 1.0)
    gradients = {k.removesuffix(".exp_avg"): v / 0.1 * clipped
                 for k, v in merged(out, 0).items() if k.endswith(".exp_avg")}
    assert gradients.keys() == expected.keys()
    scale = max(g.abs().max() for g in expected.values())
    return max(float((gradients[k] - expected[k]).abs().max() / scale) for k in expected)


def test_one_step_gradient_equals_transformers_on_every_layout(world, layouts):
    expected = transformers_gradients(world["model"], world["pairs"])
    worst = [largest_difference(expected, out) for out in layouts]
    print("tied: largest gradient difference relative to the largest entry by layout:", worst)
    assert max(worst) <= 1e-5


def test_one_step_gradient_of_an_untied_model_equals_transformers(world, tmp_path):
    """On 3 ranks: 265 rows of embedding and head in uneven shards."""
    run_layout({**world, "model": world["untied"]}, LAYOUTS[3], tmp_path, "--max_steps", "1")
    worst = largest_difference(transformers_gradients(world["untied"], world["pairs"]), tmp_path)
    print("untied, 3 ranks: largest gradient difference relative to the largest entry:", worst)
    assert worst <= 1e-5


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_step_0_is_exact_and_checkpointing_changes_no_bit(world, tmp_path, dtype):
    for kind in ("none", "full"):
        said = run_here(world, tmp_path / kind, "--max_steps", "1", "--dtype", dtype,
                        "--checkpointing", kind)
        assert "step 0: sum of |reward| 0.0, loss 1.386294361\n" in said
    (first,) = metrics(tmp_path / "none")
    assert torch.tensor(first["loss"]).float() == torch.tensor(2 * math.log(2)).float()
    assert first["reward_chosen"] == first["reward_rejected"] == first["trunk_coef"] == 0.0
    assert first["tether_chosen"] == first["tether_rejected"] == 0.5
    launch.assert_same_end(tmp_path / "none", tmp_path / "full")


@pytest.mark.parametrize("objective", loss.OBJECTIVES)
def test_every_objective_trains_and_evaluates(world, tmp_path, objective):
    rows, pairs = data.read_log(world["pairs"]), str(tmp_path / "pairs.jsonl")
    if objective not in loss.PAIR_OBJECTIVES:
        rows[3]["original_answer"] = ""  # a positive-only row goes along
    data.write_rows(pairs, rows)
    run_here({**world, "pairs": pairs}, tmp_path / "run", "--loss", objective, "--eval_pairs",
             world["pairs"], "--lr", "1e-3", "--epochs", "3")
    held_out = metrics(tmp_path / "run", "eval")
    assert [row["step"] for row in held_out] == [3, 6, 9]
    # What each is after. (Of dft the loss itself, -pi log pi, can rise while pi rises.)
    aim = "margin" if objective in loss.PAIR_OBJECTIVES else "reward_chosen"
    assert held_out[-1][aim] > 0.2


def test_plan_adds_up_and_writes_nothing(world, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = train.plan(train.parse_options([
        "--model", world["model"], "--pairs", world["pairs"], "--plan", "--gpus", "2",
        "--batch_size", "8", "--tokens_per_pack", "512"]))
    assert not list(tmp_path.iterdir())
    parts = [float(line.split()[0]) for line in text.splitlines() if " GB  " in line]
    assert len(parts) == 5 and sum(parts[:-1]) == pytest.approx(parts[-1], abs=0.04)


@pytest.mark.parametrize("gpus,checkpointing,tied", [
    (1, "full", True), (8, "none", False),
    pytest.param(1, "none", True, marks=pytest.mark.slow),
    pytest.param(8, "full", False, marks=pytest.mark.slow)])
def test_planned_memory_is_what_torchs_tracker_sees(gpus, checkpointing, tied, monkeypatch):
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker
    from torch.testing._internal.distributed.fake_pg import FakeStore

    config = qwen.Config(32768, 1024, 3072, 4, 16, 8, 128, 1e-6, 1e6, tied)
    # In fp32 the CPU keeps as many values as a GPU in 16 bit: attention and norms widen nothing.
    o = train.Options(gpus=gpus, checkpointing=checkpointing, dtype="float32")
    ids = np.zeros(1000, dtype=np.int64)
    forks = [data.Fork(300, ids, ids[:500], ids[:500], line=i) for i in range(2)]
    monkeypatch.setattr(loss, "LOGITS_AT_ONCE", loss.LOGITS_AT_ONCE * loss.GPU_FACTOR)
    monkeypatch.setattr(qwen, "load_weights", lambda *_: None)
    monkeypatch.setattr(qwen, "causal_lower_right",  # torch's is no fake tensor
                        lambda q, k: torch.ones(q, k, dtype=torch.bool).tril(k - q))
    dist.init_process_group("fake", rank=0, world_size=gpus, store=FakeStore())
    policy = train.build_policy("", config, o, qwen.Ranks(0, gpus, torch.device("cpu")))
    with FakeTensorMode(allow_non_fake_inputs=True):
        policy.to_empty(device="cpu")
        tracker = FSDPMemTracker(policy, train.make_optimizer(policy, o))
        with tracker:
            for _ in range(2):  # in the second pass there are gradients from the start
                tracker.reset_mod_stats()
                p = data.make_pack(forks, [0, 1])
                policy(p.tokens, p.positions, p.spans, p.rows, p.targets).sum().backward()
    dist.destroy_process_group()
    peak = tracker.get_tracker_snapshot("peak")[torch.device("cpu")]["Total"]
    parts = train.plan_memory(policy, o, len(p.tokens))
    assert sum(parts.values()) == pytest.approx(peak, rel=0.05)


def test_learning_rate_by_hand():
    o = train.Options(lr=1.0, warmup=0.2)
    rates = [train.learning_rate(k, 10, o) for k in range(10)]
    assert rates[:3] == [0.5, 1.0, 1.0]
    assert rates[6] == pytest.approx(0.5) and 0 < rates[9] < 0.04


# --- what is refused; broken files are in tests/faults --------------------------------------------

@pytest.mark.parametrize("extra,message", [
    (["--max_length", "5"], "Nothing is left to train on"),
    (["--shard_size", "3"], "does not divide"), (["--out", "TAKEN"], "exists: add --resume")])
def test_bad_options_touch_nothing(world, tmp_path, monkeypatch, extra, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "TAKEN").mkdir()
    (tmp_path / "TAKEN" / "config.json").write_text("{}")
    before = launch.files(tmp_path)
    assert message in run_here(world, "out", *extra, code=1)
    assert launch.files(tmp_path) == before


def test_options_are_checked_all_at_once(tmp_path):
    with pytest.raises(UserError) as e:
        train.parse_options(["--lr", "-1", "--epochs", "0", "--pairs", "p", "--warmup", "2"])
    for part in ("--model is required", "--out is required", "--lr is -1.0, above 0 expected",
                 "--epochs is 0", "--warmup is 2.0"):
        assert part in str(e.value)


def test_resume_refuses_options_that_change_the_curve(world, tmp_path):
    run_here(world, tmp_path / "run", "--max_steps", "1")
    with pytest.raises(UserError, match="--beta is 0.5, the run in .* has 0.1"):
        train.parse_options(["--resume", "--out", str(tmp_path / "run"), "--beta", "0.5"])
    assert train.parse_options(["--resume", "--out", str(tmp_path / "run")]).batch_size == 8
    with pytest.raises(UserError, match="config.json exists: add --resume"):  # no toy beside it
        train.parse_options(["--out", str(tmp_path / "run")])
    for out in (world["model"], tmp_path / "run/model"):  # a checkpoint is no run to go on with
        with pytest.raises(UserError, match="belongs to no run"):
            train.parse_options(["--resume", "--out", str(out)])


def test_more_ranks_than_gpus_names_both_ways_out(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    with pytest.raises(UserError, match=r"--nproc_per_node=2.*CUDA_VISIBLE_DEVICES="):
        train.open_ranks(60)
