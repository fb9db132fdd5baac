"""The explicit training loop of Surgical Post-Training, from one CPU core to several nodes of GPUs.

Comes in:  --model, a Qwen3 checkpoint folder, and --pairs, a JSONL file of surgical pairs.
Goes out:  a run folder: config.json, metrics.jsonl, reference.safetensors, checkpoints/, report.html with
           surgery.jsonl behind it, and model/, the trained checkpoint in the layout it came in.

    torchrun --nproc_per_node=8 train.py --model Qwen3-8B --pairs pairs.jsonl --out runs/first
    torchrun --nproc_per_node=2 train.py         # nothing given: the toy story, the whole method in minutes

Without arguments (--seed and --out are allowed) `story` makes a small world with a base model, its errors
and their corrections, trains on them, and prints a table of what came of it.

One optimizer step is `train_step`: for each pack the policy gives one log-prob a scored row, loss.py gives
one coefficient a row, and `row_logps.backward(coefficients)` is the backward pass. Which pairs form a step
does not depend on the number of ranks; each rank computes its share of the tokens, gradients are summed.
"""

import argparse
import contextlib
import fcntl
import hashlib
import json
import math
import os
import re
import resource
import shutil
import signal
import sys
import time
from collections import Counter
from dataclasses import asdict, dataclass, fields, replace

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from tqdm import tqdm

import data
import eval as evaluation
import loss
import model as qwen
import oracle
from model import Ranks, UserError, add_options, begin, close_ranks, open_ranks, option

# Dense bf16 peaks in FLOP/s, for mfu. Any other device: the rate of a square GEMM measured at the start.
PEAKS = {"H100": 989e12, "H200": 989e12, "H800": 989e12, "A100": 312e12, "A800": 312e12, "B200": 2250e12}


@dataclass
class Options:
    """Everything that can be chosen. Defaults are the paper's (Qwen3-8B)."""

    model: str = option("", "checkpoint folder in Hugging Face layout, or a hub id (required)")
    pairs: str = option("", "pair file, .jsonl or .jsonl.gz (required)")
    out: str = option("", "run folder to write (required)")
    loss: str = option("spot-bce", "objective", loss.OBJECTIVES)
    beta: float = option(0.1, "reward scale: r = beta * (log pi - log pi_ref)")
    delta: str = option("ema", "running mean of spot-bco: moving (0.9) or of all", ("ema", "cumulative"))
    lr: float = option(1e-6, "peak learning rate (SFT in the paper: 5e-6)")
    epochs: int = option(2, "passes over the pairs")
    max_steps: int = option(0, "optimizer steps at most, schedule included; 0: as many as the epochs have")
    batch_size: int = option(32, "pairs per optimizer step, over all ranks")
    warmup: float = option(0.05, "share of the steps with rising learning rate; a cosine to 0 follows")
    weight_decay: float = option(0.01, "AdamW's, on all weights but norms")
    clip: float = option(1.0, "largest norm of the gradient")
    max_length: int = option(8192, "tokens of prompt + one answer; longer pairs are dropped, never cut")
    max_change_ratio: float = option(0.6, "drop pairs with 1 - LCS(y-, y+)/|y+| above this (gamma)")
    skip_malformed: bool = option(False, "drop and count malformed rows instead of stopping")
    eval_pairs: str = option("", "held-out pair file, scored after each epoch")
    seed: int = option(0, "order of the pairs")
    dtype: str = option("bfloat16", "of the computation; weights, moments and sums stay float32",
                        ("float32", "bfloat16"))
    checkpointing: str = option("full", "recompute each block in backward (less memory), or not",
                                ("none", "full"))
    tokens_per_pack: int = option(16384, "tokens of one micro-batch; memory grows with it, results do not")
    shard_size: int = option(0, "ranks that share one copy of the model, the others replicate; 0: all ranks")
    save_dtype: str = option("bfloat16", "of the trained checkpoint in --out/model", ("float32", "bfloat16"))
    save_every: int = option(50, "optimizer steps between checkpoints; 0: only at the end and on SIGTERM")
    keep: int = option(1, "checkpoints to keep")
    timeout: int = option(1800, "seconds after which a stalled rank ends the run")
    resume: bool = option(False, "go on with the run in --out from its last checkpoint")
    plan: bool = option(False, "train nothing: say what memory and time the run would take on GPUs")
    gpus: int = option(8, "with --plan: how many GPUs")
    gpu_memory: float = option(80.0, "with --plan: memory of each, in GB")


# Options that may differ when a run is resumed: none changes the curve beyond floating-point noise.
# Files may move: their content is what must be the same, and its hash tells.
FREE = ("resume", "keep", "save_every", "timeout", "tokens_per_pack", "checkpointing", "shard_size", "model",
        "pairs", "eval_pairs", "out", "plan", "gpus", "gpu_memory")


def parse_options(argv=None) -> Options:
    """Command line to Options. With --resume what is not given comes from OUT/config.json, and what is given
    must agree with it. Without any, and with --out or --seed alone, `model` stays empty: that is the toy
    story's mark. Raises UserError listing every problem at once."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser, Options)
    given = vars(parser.parse_args(argv))
    problems = []
    problems += qwen.unfit(given)
    path = os.path.join(given.get("out", ""), "config.json")
    if given.get("resume") and not problems and os.path.exists(path):
        stored = qwen.read_json(path).get("options")
        stored = stored if isinstance(stored, dict) else {}
        kept = {f.name: stored[f.name] for f in fields(Options) if f.name in stored}
        wrong = [f.name for f in fields(Options) if f.name in kept and (
            type(kept[f.name]) not in ((int, float) if f.type is float else (f.type,))
            or f.metadata["choices"] and kept[f.name] not in f.metadata["choices"])]
        if wrong or not kept:
            raise UserError(f"{path}: no options of this program ({', '.join(wrong) or 'options'})")
        problems += [f"--{k} is {v!r}, the run in {given['out']} has {kept[k]!r}" for k, v in given.items()
                     if k in kept and k not in FREE and kept[k] != v]
        given = {**kept, **given}
        problems += qwen.unfit(given)
    o = Options(**given)
    if set(given) <= {"out", "seed"}:  # nothing to train and nothing to train on: the toy story
        o.out = o.out or "runs/toy"
    else:
        problems += [f"--{name} is required" for name in ("model", "pairs", "out")
                     if not getattr(o, name) and not (o.plan and name == "out")]
    for name in ("beta", "lr", "epochs", "batch_size", "clip", "max_length", "tokens_per_pack", "keep",
                 "timeout", "gpus", "gpu_memory"):
        if not 0 < getattr(o, name) < 1e9:  # also a week in seconds is below
            problems.append(f"--{name} is {getattr(o, name)}, a number above 0 (and below 1e9) expected")
    for name in ("max_steps", "save_every", "shard_size", "weight_decay", "seed", "max_change_ratio"):
        if not 0 <= getattr(o, name) < math.inf:
            problems.append(f"--{name} is {getattr(o, name)}, a number of 0 or more expected")
    if not 0 <= o.warmup <= 1:
        problems.append(f"--warmup is {o.warmup}, a share between 0 and 1 expected")
    if o.delta != "ema" and o.loss != "spot-bco":
        problems.append(f"--delta {o.delta} goes with --loss spot-bco, found --loss {o.loss}")
    if problems:
        raise UserError("\n  ".join(["these options do not work:"] + problems))
    return o


# --- the sharded policy ---------------------------------------------------------------------------


def build_policy(folder, config, o: Options, ranks: Ranks):
    """Meta device -> shard each block -> root -> memory -> each rank reads its own rows. fp32 shards."""
    with torch.device("meta"):
        policy = qwen.Qwen3(config, checkpointing=o.checkpointing == "full")
    shape, names = (ranks.world,), ("shard",)
    if o.shard_size and o.shard_size != ranks.world:
        if ranks.world % o.shard_size:
            raise UserError(f"--shard_size {o.shard_size} does not divide the {ranks.world} ranks")
        shape, names = (ranks.world // o.shard_size, o.shard_size), ("replicate", "shard")
    mesh = init_device_mesh(ranks.device.type, shape, mesh_dim_names=names)
    precision = MixedPrecisionPolicy(param_dtype=getattr(torch, o.dtype), reduce_dtype=torch.float32)
    how = {"mesh": mesh, "mp_policy": precision}
    for block in policy.layers:
        fully_shard(block, **how)
    if not config.tie_word_embeddings:  # big tables in units of their own, else one buffer holds both
        fully_shard(policy.embed_tokens, **how)
        fully_shard(policy.lm_head, **how)
    fully_shard(policy, reshard_after_forward=False, **how)
    for unit in policy.modules():
        # Sum gradients: we divide by our own global counts. One rank alone would divide by 1, at a cost.
        if isinstance(unit, FSDPModule) and ranks.world > 1:
            unit.set_gradient_divide_factor(1.0)
            unit.set_force_sum_reduction_for_comms(True)  # without it gloo dies on the factor
    qwen.load_weights(policy, folder, ranks.device)
    return policy, mesh


def make_optimizer(policy, o: Options):
    """AdamW as in the paper (betas 0.9, 0.95), no decay on norms (the only 1-D weights)."""
    weights = [p for p in policy.parameters() if p.ndim > 1]
    norms = [p for p in policy.parameters() if p.ndim == 1]
    groups = [{"params": weights, "weight_decay": o.weight_decay}, {"params": norms, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=o.lr, betas=(0.9, 0.95), fused=True)
    for p in policy.parameters():  # made now, not in the first step, so that resume has a place to load into
        optimizer.state[p] = {"step": torch.zeros((), device=p.device), "exp_avg": torch.zeros_like(p),
                              "exp_avg_sq": torch.zeros_like(p)}
    return optimizer


def learning_rate(step: int, total: int, o: Options) -> float:
    """(k+1)/W of the peak in step k of W warm-up steps (HF starts at 0, a wasted step), then a cosine."""
    warm = math.ceil(o.warmup * total)
    if step < warm:
        return o.lr * (step + 1) / warm
    return o.lr * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, total - warm)))


def count_flops(config, pack) -> float:
    """FLOPs of forward + backward of one pack: products only, recomputation left out."""
    heads, groups = config.num_attention_heads, config.num_key_value_heads
    layer = config.hidden_size * (config.head_dim * 2 * (heads + groups) + 3 * config.intermediate_size)
    seen = 0  # pairs of query and key
    for start, trunk, rejected, chosen in pack.forks:
        seen += sum(n * (n + 1) // 2 for n in (trunk - start, rejected - trunk, chosen - rejected))
        seen += (chosen - trunk) * (trunk - start)
    attention = 2 * heads * config.head_dim * seen
    head = config.vocab_size * config.hidden_size * len(pack.rows)
    return 6.0 * (config.num_hidden_layers * (layer * len(pack.tokens) + attention) + head)


def peak_flops(device, dtype) -> float:
    """Published peak of a known GPU, else a 512^3 product's measured rate, in FLOP/s of this rank."""
    if device.type == "cuda":
        for name, peak in PEAKS.items():
            if name in torch.cuda.get_device_name(device):
                return peak
    a = torch.ones(512, 512, dtype=dtype, device=device)
    best = math.inf
    for _ in range(3):
        start = time.perf_counter()
        (a @ a).sum().item()
        best = min(best, time.perf_counter() - start)
    return 2 * 512**3 / best


# --- a plan without a run -------------------------------------------------------------------------

PLANNED_MFU = 0.4  # of PEAKS["H100"]; where the rest goes is counted in tests/bench/LOG.md
PLANNED_TRAFFIC = 300e9  # bytes/s that FSDP's collectives bring to one GPU of a node


def plan_memory(policy, o: Options, tokens: int) -> dict:
    """Peak bytes of one GPU in a training step, by part: `policy` on any device, `tokens` of the
    largest pack. Within 2.2 % of torch's tracker (LOG.md); fragments, CUDA, NCCL come on top."""
    c, size, full = policy.config, getattr(torch, o.dtype).itemsize, o.checkpointing == "full"
    weights, block = (sum(p.numel() for p in m.parameters()) for m in (policy, policy.layers[0]))
    query, key = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
    # Values that autograd keeps of a token in a block. Two norms: input, normed, times the weight.
    # q, k: projected, normed, rotated. k, v beside each branch, trunk included: up to twice; v.
    # Attention's output in two layouts. gate, up, silu(gate), product.
    kept = 6 * c.hidden_size + 3 * (query + key) + 5 * key + 2 * query + 4 * c.intermediate_size
    return {
        "weights, gradients, Adam's moments, fp32": 16 * weights // (o.shard_size or o.gpus),
        # Two blocks are gathered, a third is on its way. A tied table waits with its gradient; that
        # of an untied head is summed in fp32.
        "gathered weights, the head's gradient": 3 * block * size
            + c.vocab_size * c.hidden_size * (2 * size if c.tie_word_embeddings else 4),
        "activations kept for backward":
            tokens * c.num_hidden_layers * (c.hidden_size if full else kept) * size,
        "one block in backward": tokens * (2 * c.intermediate_size + full * kept) * size,
    }


def plan(o: Options) -> str:
    """What the run would take: memory a GPU by part, FLOPs, minutes. Reads no weights."""
    shards = o.shard_size or o.gpus
    if o.gpus % shards:
        raise UserError(f"--shard_size {o.shard_size} does not divide --gpus {o.gpus}")
    folder, config, forks, eval_forks, log = read_inputs(o)
    with torch.device("meta"):
        policy = qwen.Qwen3(config)
    weights, size = sum(p.numel() for p in policy.parameters()), getattr(torch, o.dtype).itemsize
    steps = total_steps(Run(o, None, config, folder, forks, *[None] * 4))
    epoch = data.epoch_batches(len(forks), o.batch_size, o.seed, 0)
    held_out = fixed_batches(eval_forks or [], o)
    epochs = steps / len(epoch)
    tokens, flops, moved = 0, 0.0, 0.0
    # Forward alone (the reference pass; held-out pairs, by the reference and after each epoch) is a
    # third of the FLOPs and gathers weights once. Training does so twice, and sums fp32 gradients.
    for pairs, batches, trained, scored in ((forks, epoch, epochs, min(1, epochs)),
                                            (eval_forks, held_out, 0, 1 + math.ceil(epochs))):
        for batch in batches:
            for micro in data.split_batch(batch, list(map(len, pairs)), o.gpus, o.tokens_per_pack):
                packs = [data.make_pack(pairs, indices) for indices in micro if indices]
                tokens = max(tokens, *(len(pack.tokens) for pack in packs))
                flops += (trained + scored / 3) * sum(count_flops(config, p) for p in packs)
                moved += (trained * (2 * size + 4) + scored * size) * weights * (1 - 1 / shards)
    parts = plan_memory(policy, o, tokens)
    total = sum(parts.values()) / 1e9
    verdict = "" if total < 0.9 * o.gpu_memory else ": TOO MUCH, above nine tenths of its memory"
    products = flops / (o.gpus * PLANNED_MFU * PEAKS["H100"]) / 60
    traffic = moved / PLANNED_TRAFFIC / 60
    return "\n".join([
        log,
        f"{o.gpus} GPU(s) of {o.gpu_memory:g} GB, {o.dtype}, --checkpointing {o.checkpointing}, "
        f"packs of at most {tokens} tokens. A GPU would hold",
        *(f"  {value / 1e9:8.2f} GB  {name}" for name, value in parts.items()),
        f"  {total:8.2f} GB  in all{verdict}",
        f"{steps} step{'s' if steps > 1 else ''}, {flops / 1e15:.4g} PFLOP: {products:.2g} minutes "
        f"at {PLANNED_MFU:.0%} of an H100's 989 TFLOP/s and {traffic:.2g} of communication, less "
        f"what overlaps, at {PLANNED_TRAFFIC / 1e9:.0f} GB/s a GPU. Loading, saving come on top."])


# --- the run --------------------------------------------------------------------------------------


@dataclass
class Run:
    """What the functions below share: a record, no behaviour."""

    o: Options
    ranks: Ranks
    config: qwen.Config
    folder: str  # of the checkpoint we start from
    forks: list
    policy: torch.nn.Module
    mesh: object
    optimizer: torch.optim.Optimizer
    hashes: dict  # of weights and pairs
    step: int = 0
    delta: float = 0.0
    seen: int = 0  # pairs that went into delta
    reference: torch.Tensor = None  # (N, 2) fp64, sequence_logps before training
    eval_forks: list = None
    eval_reference: torch.Tensor = None
    peak_flops: float = math.nan  # of one rank, FLOP/s

    def packs(self, batch, forks):
        """This rank's micro-batches of one global batch."""
        plan = data.split_batch(batch, list(map(len, forks)), self.ranks.world, self.o.tokens_per_pack)
        for micro in plan:
            yield data.make_pack(forks, micro[self.ranks.rank])

    def score(self, pack):
        """Row log-probs (R,) of a pack on the device, graph attached."""
        return self.policy(pack.tokens, pack.positions, pack.forks, pack.rows, pack.targets)


def score_all(run: Run, forks, batches, title) -> torch.Tensor:
    """(N, 2) fp64 sequence log-probs of all forks under the policy as it is, on every rank."""
    device, scores = run.ranks.device, torch.zeros(len(forks), 2, dtype=torch.float64)
    with torch.no_grad():
        for batch in tqdm(batches, desc=title, disable=not run.ranks.main, unit="batch"):
            for pack in run.packs(batch, forks):
                pack = pack.to(device)
                sums = loss.sequence_logps(run.score(pack), pack.lengths)
                scores[pack.pairs.cpu()] = sums.cpu()
    run.policy.reshard()  # a forward without backward leaves the root's weights gathered
    return run.ranks.reduce(scores).cpu()  # each pair was scored by one rank, the others add zeros


def train_step(run: Run, batch, lr: float) -> tuple[dict, bool]:
    """One optimizer step on one global batch of pair indices; returns its metrics and whether SIGTERM asks
    to stop. Raises UserError on NaN or infinity, on all ranks alike and before the weights are touched."""
    o, ranks, started = run.o, run.ranks, time.perf_counter()
    forks = [run.forks[i] for i in batch]
    # The global count is known to every rank from the plan: no communication.
    if o.loss in loss.TOKEN_OBJECTIVES:
        count = sum(len(f.trunk) - f.prompt_length + len(f.chosen) for f in forks)
    else:
        count = len(forks)
    sums, largest, flops = 0.0, torch.zeros((), dtype=torch.float64, device=ranks.device), 0.0
    for pack in run.packs(batch, run.forks):
        reference = run.reference[pack.pairs].to(ranks.device)
        flops += count_flops(run.config, pack)
        pack = pack.to(ranks.device)
        row_logps = run.score(pack)
        coefficients, stats = loss.row_coefficients(o.loss, row_logps, pack.lengths, reference, o.beta,
                                                    run.delta)
        row_logps.backward(coefficients / count)
        largest = torch.maximum(largest, stats.pop("max_abs_reward"))
        sums = sums + torch.stack(list(stats.values()))
    grad_norm = torch.nn.utils.clip_grad_norm_(run.policy.parameters(), o.clip).full_tensor().item()
    extra = torch.tensor([flops, float(STOP["asked"])], dtype=torch.float64, device=ranks.device)
    total = ranks.reduce(torch.cat([sums, extra])).tolist()  # the step's only look at other ranks' numbers
    stats = dict(zip(stats, total))
    stop = total[-1] > 0
    if run.step == 0:
        canary(run, float(ranks.reduce(largest, dist.ReduceOp.MAX)), stats["loss"] / count)
    if not math.isfinite(stats["loss"]) or not math.isfinite(grad_norm):
        lines = ", ".join(str(f.line) for f in forks)
        raise UserError(f"step {run.step}: loss {stats['loss'] / count}, gradient norm {grad_norm}: not "
                        f"finite, weights left as they were. The step's pairs: lines {lines} of {o.pairs}")
    for group in run.optimizer.param_groups:
        group["lr"] = lr
    run.optimizer.step()
    run.optimizer.zero_grad()
    metrics = {"step": run.step, "epoch": run.step // steps_per_epoch(run), **loss.average(stats, o.loss),
               "delta": run.delta, "grad_norm": grad_norm, "lr": lr}
    if o.loss == "spot-bco":
        mean = (stats["reward_chosen"] + stats["reward_rejected"]) / (2 * stats["pairs"])
        run.delta = loss.update_delta(run.delta, mean, len(forks), run.seen, o.delta)
        run.seen += len(forks)
    run.step += 1
    seconds, tokens = time.perf_counter() - started, sum(map(len, forks))
    metrics |= {"tokens": tokens, "tokens_per_s": tokens / seconds,
                "mfu": total[-2] / seconds / (run.peak_flops * ranks.world), "memory_gb": memory_gb(ranks)}
    return metrics, stop


STOP = {"asked": False}  # set by SIGTERM, looked at in the step's all-reduce so that all ranks stop together


def memory_gb(ranks) -> float:
    """Peak so far: of this rank's GPU, or resident of this process."""
    if ranks.device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def canary(run, largest_reward, mean_loss):
    """Step 0: the policy is its own reference, so every reward is exactly 0 and the tether exactly 1/2."""
    expected = {"spot-bce": 2 * math.log(2), "spot-bco": 2 * math.log(2), "dpo": math.log(2),
                "reward-sft": math.log(2)}.get(run.o.loss)
    same = expected is None or torch.tensor(mean_loss).float() == torch.tensor(expected).float()
    run.ranks.say(f"step 0: largest |reward| {largest_reward}, loss {mean_loss:.9f}"
                  + (f", expected {expected:.9f}" if expected else ""))
    if largest_reward != 0 or not same:
        raise UserError("step 0 must give rewards of exactly 0. Delete reference.safetensors, which may be of "
                        f"another model, and start again with --resume --out {run.o.out}. If it returns, the "
                        "forward pass is not deterministic here: try --dtype float32, another torch, or "
                        "another machine")


def evaluate(run: Run) -> dict:
    """The diagnostics of the held-out pairs under the policy as it is, delta frozen."""
    sums = torch.zeros(len(loss.SUMS), dtype=torch.float64, device=run.ranks.device)
    with torch.no_grad():
        for batch in fixed_batches(run.eval_forks, run.o):
            for pack in run.packs(batch, run.eval_forks):
                pack = pack.to(run.ranks.device)
                reference = run.eval_reference[pack.pairs.cpu()].to(run.ranks.device)
                _, stats = loss.row_coefficients(run.o.loss, run.score(pack), pack.lengths, reference,
                                                 run.o.beta, run.delta)
                sums += torch.stack(list(stats.values()))
    run.policy.reshard()
    return loss.average(dict(zip(loss.SUMS, run.ranks.reduce(sums).tolist())), run.o.loss)


def fixed_batches(forks, o):
    """Held-out pairs in file order, in batches of --batch_size: ranges of indices."""
    return [range(i, min(i + o.batch_size, len(forks))) for i in range(0, len(forks), o.batch_size)]


def steps_per_epoch(run) -> int:
    """Optimizer steps of one pass; the last, smaller batch counts."""
    return -(-len(run.forks) // run.o.batch_size)


def total_steps(run) -> int:
    """Optimizer steps of the whole run: --epochs, cut by --max_steps."""
    steps = steps_per_epoch(run) * run.o.epochs
    return min(steps, run.o.max_steps) if run.o.max_steps else steps


# --- the watched pair: how the coefficients of one pair's tokens move ------------------------------

LOOKS = 10  # about so many are taken, and one after the last step


def watched_pair(run) -> int:
    """Index of the pair of median length (in tokens) among those the run trains on and that have a y-."""
    batches = data.epoch_batches(len(run.forks), run.o.batch_size, run.o.seed, 0)[:total_steps(run)]
    trained = [int(i) for batch in batches for i in batch]
    some = [i for i in trained if len(run.forks[i].rejected)] or trained
    return sorted(some, key=lambda i: (len(run.forks[i]), i))[len(some) // 2]


def look(run: Run, path: str):
    """Add a line to surgery.jsonl: the watched pair's coefficients (of the summed loss, as in `trunk_coef`)
    and log-probs under the policy as it is, one a token after the prompt, trunk before rejected and chosen.
    No gradient, no random number: training does not notice."""
    o, ranks, index = run.o, run.ranks, watched_pair(run)
    with torch.no_grad():
        (pack,) = run.packs([index], run.forks)  # the main rank's; the others forward a dummy
        pack = pack.to(ranks.device)
        row_logps = run.score(pack)
    run.policy.reshard()
    with ranks.together():
        if ranks.main:
            sums = loss.sequence_logps(row_logps, pack.lengths)
            reference = watched_reference(run, path, index, sums).to(ranks.device)
            coefficients, stats = loss.row_coefficients(o.loss, row_logps, pack.lengths, reference, o.beta,
                                                        run.delta)
            append_line(path, {"step": run.step, "delta": run.delta,
                               "reward_chosen": float(stats["reward_chosen"]),
                               "reward_rejected": float(stats["reward_rejected"]),
                               "coefficients": coefficients.tolist(), "logps": row_logps.tolist()})


def watched_reference(run, path, index, sums) -> torch.Tensor:
    """(1, 2) reference log-probs of the watched pair: those of the first look, kept in the first line of
    surgery.jsonl, which step 0 writes; it is of "step" -1, so that no resume drops it.

    Not reference.safetensors': there the pair was scored in a pack with others, and in bf16 another pack is
    another sum. Against its own every coefficient of step 0 is exact."""
    if run.step:
        try:
            return torch.tensor([evaluation.read_surgery(path)[0]["reference"]], dtype=torch.float64)
        except UserError:  # lost, broken, or the run began before there was such a file
            sums = run.reference[[index]]
    fork, tokenizer = run.forks[index], data.load_chat(run.folder, run.config.vocab_size).tokenizer
    prompt = fork.prompt_length
    parts = {"prompt": fork.trunk[:prompt], "trunk": fork.trunk[prompt:], "rejected": fork.rejected,
             "chosen": fork.chosen}
    ratios = Counter(min(int(20 * f.ratio), 19) for f in run.forks if f.ratio is not None)
    evaluation.write_rows(path, [{
        "step": -1, "line": fork.line, "reference": sums[0].tolist(),
        **{k: [tokenizer.decode([i], skip_special_tokens=False) for i in ids] for k, ids in parts.items()},
        "rejected_ids": fork.rejected.tolist(), "chosen_ids": fork.chosen.tolist(),
        "change_ratios": [ratios[i] for i in range(20)], "gamma": run.o.max_change_ratio}])
    return sums


# --- the reference cache --------------------------------------------------------------------------


def sha256(*parts) -> str:
    """Hex digest of bytes-like parts, and of str() of any others, one after the other."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part if isinstance(part, (bytes, memoryview)) else str(part).encode())
    return digest.hexdigest()


def file_sha256(path) -> str:
    """Hex digest of a file's content, read in pieces."""
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def share_digests(ranks: Ranks, mine: dict, count: int) -> list:
    """[hex digest of item 0, ...] on every rank, where each rank brings {item: hex digest} of some."""
    digests = torch.zeros(count, 32, dtype=torch.int64)
    for i, digest in mine.items():
        digests[i] = torch.tensor(list(bytes.fromhex(digest)))
    return [bytes(row).hex() for row in ranks.reduce(digests).tolist()]


def hash_inputs(folder, forks, eval_forks, ranks) -> dict:
    """Content hashes of the weights and of the encoded pairs (which hold tokenizer and template too)."""
    files = sorted({path for path, _ in qwen.open_tensors(folder).values()})
    mine = {}
    with ranks.together():  # each rank reads some of the files
        mine = {i: file_sha256(f) for i, f in enumerate(files) if i % ranks.world == ranks.rank}
    weights = sha256(*share_digests(ranks, mine, len(files)))

    def tokens(forks):
        parts = [part for f in forks or [] for part in (f.trunk, f.rejected, f.chosen)]
        bounds = [(f.prompt_length, len(f.trunk), len(f.rejected)) for f in forks or []]
        return sha256(bounds, *map(memoryview, parts))

    return {"weights": weights, "pairs": tokens(forks), "eval_pairs": tokens(eval_forks)}


def reference_pass(run: Run):
    """Score the pairs with the policy as it is, in the packs of epoch 0, or take the cached scores.

    The same code path, packs and dtype as in training make step-0 rewards exactly 0. The cache's key holds
    all that can change a bit of them, the plan included (bf16 log-probs depend on the pack).
    """
    o, ranks = run.o, run.ranks
    path = os.path.join(o.out, "reference.safetensors")
    batches = data.epoch_batches(len(run.forks), o.batch_size, o.seed, 0)
    batches = batches[:total_steps(run)]  # --max_steps may end the run before every pair was seen
    key = sha256(json.dumps([run.hashes, o.dtype, o.seed, o.batch_size, len(batches), o.tokens_per_pack,
                             o.shard_size, ranks.world, ranks.device.type, torch.get_num_threads(),
                             torch.__version__]))
    started = run.step > 0  # resumed: the scores the run began with, whatever the plan is now
    usable = torch.zeros(1)
    with ranks.together():
        if ranks.main and os.path.exists(path):
            try:
                with safe_open(path, framework="pt") as f:
                    kept = f.metadata() or {}
                tensors = load_file(path)
            except SafetensorError as e:
                raise UserError(f"{path} is corrupt ({e}): delete it") from None
            sizes = {"pairs": (len(run.forks), 2), "eval_pairs": (len(run.eval_forks or []), 2)}
            found = {k: tuple(t.shape) for k, t in tensors.items() if t.dtype == torch.float64}
            if found.keys() != tensors.keys() or (
                    kept.get("content") != sha256(*(memoryview(tensors[k].numpy()) for k in sorted(tensors)))
                    or kept.get("hashes") == json.dumps(run.hashes) and sizes != found):
                raise UserError(f"{path} is corrupt (its content does not have the hash it names, or not the "
                                "size of these pairs): delete it")
            same = kept.get("hashes") == json.dumps(run.hashes) if started else kept.get("key") == key
            usable[0] = float(same)
        if ranks.main and started and not usable[0]:
            raise UserError(f"{path} is missing or of other weights or pairs than this run's checkpoint")
    if ranks.reduce(usable)[0]:
        ranks.say(f"reference log-probs taken from {path}")
        size = [(len(run.forks), 2), (len(run.eval_forks or []), 2)]
        parts = [tensors[k] if ranks.main else torch.zeros(s, dtype=torch.float64)
                 for k, s in zip(("pairs", "eval_pairs"), size)]
        run.reference, run.eval_reference = map(ranks.reduce, parts)  # zeros elsewhere: a broadcast
        return
    run.reference = score_all(run, run.forks, batches, "reference")
    run.eval_reference = torch.zeros(0, 2, dtype=torch.float64)
    if run.eval_forks:
        batches = fixed_batches(run.eval_forks, o)
        run.eval_reference = score_all(run, run.eval_forks, batches, "reference, held out")
    with ranks.together():
        bad = (~run.reference.isfinite()).any(1).nonzero().flatten().tolist()
        if bad:
            raise UserError(f"the model gives log-probs that are not finite, first at line "
                            f"{run.forks[bad[0]].line} of {o.pairs}: are its weights sound?")
        if ranks.main:
            tensors = {"pairs": run.reference, "eval_pairs": run.eval_reference}
            content = sha256(*(memoryview(tensors[k].numpy()) for k in sorted(tensors)))
            metadata = {"key": key, "hashes": json.dumps(run.hashes), "content": content}
            with qwen.writing(path):
                save_file(tensors, path + ".tmp", metadata)
                fsync(path + ".tmp")
                os.replace(path + ".tmp", path)


# --- checkpoints ----------------------------------------------------------------------------------


def checkpoint_tensors(run: Run):
    """{name: (local tensor, first row, end row, rows in all)} of fp32 weights and both Adam moments."""
    tensors = {}
    for name, p in run.policy.named_parameters():
        state = run.optimizer.state[p]
        for suffix, t in (("", p), (".exp_avg", state["exp_avg"]), (".exp_avg_sq", state["exp_avg_sq"])):
            tensors[name + suffix] = (*qwen.rows_here(t), t.shape[0])
    return tensors


def save_checkpoint(run: Run):
    """checkpoints/step_N: one shard a rank and state.json, written beside, made durable, then renamed. The
    last whole checkpoint is deleted only after that."""
    o, ranks = run.o, run.ranks
    root = os.path.join(o.out, "checkpoints")
    final, beside = os.path.join(root, f"step_{run.step:06d}"), os.path.join(root, f"tmp_{run.step:06d}")
    shard, shards = run.mesh.get_local_rank("shard"), run.mesh.size(run.mesh.mesh_dim_names.index("shard"))
    mine = {}
    with ranks.together():
        if ranks.main:
            os.makedirs(root, exist_ok=True)
            for name in os.listdir(root):
                if re.fullmatch(r"tmp_(step_)?\d{6,}", name):  # of a run that was killed
                    remove(os.path.join(root, name))
            os.makedirs(beside)
    with ranks.together():
        if ranks.rank < shards:  # the first replica writes
            path = os.path.join(beside, f"shard_{shard}.safetensors")
            with qwen.writing(path):
                save_file({k: t.cpu().contiguous() for k, (t, *_) in checkpoint_tensors(run).items()}, path)
                fsync(path)
            mine[shard] = file_sha256(path)
    digests = share_digests(ranks, mine, shards)
    with ranks.together():
        if ranks.main:
            qwen.write_json(os.path.join(beside, "state.json"), {
                "step": run.step, "delta": run.delta, "seen": run.seen, "shards": shards,
                "world": ranks.world, "threads": torch.get_num_threads(), "hashes": run.hashes,
                "sha256": digests})
            fsync(beside)
            if os.path.isdir(final):  # only ever one from before a resume that repeats it
                discard(final)
            os.rename(beside, final)
            fsync(root)
            for old in whole_checkpoints(o.out)[:-o.keep]:
                discard(old)


def discard(checkpoint):
    """Delete a checkpoint; its name goes first, so that no kill leaves half of one under it."""
    root, name = os.path.split(checkpoint)
    os.rename(checkpoint, os.path.join(root, "tmp_" + name))
    remove(os.path.join(root, "tmp_" + name))


def remove(path):
    """Delete a folder, or what stands in its place: of a link only the link."""
    if os.path.isdir(path) and not os.path.islink(path):
        shutil.rmtree(path)
    elif os.path.lexists(path):
        os.remove(path)


def fsync(path):
    """Make a file or folder durable, so that a rename after it cannot come first."""
    handle = os.open(path, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)


def whole_checkpoints(out) -> list:
    """Paths of the whole checkpoints of a run, oldest first; a name is given only to whole ones."""
    root = os.path.join(out, "checkpoints")
    names = os.listdir(root) if os.path.isdir(root) else []
    names = [n for n in names if re.fullmatch(r"step_\d{6,}", n)]
    return [os.path.join(root, n) for n in sorted(names, key=lambda n: int(n[5:]))]


def check_hashes(run: Run, kept, where: str):
    """Raises UserError where a run began with other weights or pairs than those given now."""
    differ = [k for k in run.hashes if not isinstance(kept, dict) or kept.get(k) != run.hashes[k]]
    if differ:
        raise UserError(f"{where} belongs to other {' and '.join(differ)} than given now")


def open_shard(file) -> dict:
    """{name: safetensors slice} of a file; raises UserError where it is none."""
    try:
        with safe_open(file, framework="pt") as f:
            return {name: f.get_slice(name) for name in f.keys()}
    except SafetensorError as e:
        raise UserError(f"{file} is corrupt: {e}") from None


def load_checkpoint(run: Run, path: str):
    """Restore weights, moments, step and delta; each rank copies the rows it needs, so that another number
    of ranks works. Raises UserError where a hash or a shape does not agree."""
    ranks = run.ranks
    with ranks.together():
        state = qwen.read_json(os.path.join(path, "state.json"))
        kinds = {"step": int, "delta": float, "seen": int, "shards": int, "world": int, "threads": int,
                 "hashes": dict, "sha256": list}
        wrong = [k for k, kind in kinds.items() if type(state.get(k)) is not kind]
        if not wrong:
            fits = {"step": os.path.basename(path) == f"step_{state['step']:06d}",
                    "shards": state["shards"] > 0, "delta": math.isfinite(state["delta"]),
                    "seen": 0 <= state["seen"] < 2**62,
                    "sha256": len(state["sha256"]) == state["shards"]}
            wrong = [k for k, fit in fits.items() if not fit]
        if wrong:
            raise UserError(f"{path}/state.json is no state of this program: {', '.join(wrong)}")
        check_hashes(run, state["hashes"], path)
        files = [os.path.join(path, f"shard_{i}.safetensors") for i in range(state["shards"])]
        for i, (file, digest) in enumerate(zip(files, state["sha256"])):  # each rank checks its part
            if i % ranks.world == ranks.rank and file_sha256(file) != digest:
                raise UserError(f"{file} is corrupt: its hash is not the one in state.json")
    with ranks.together():
        shards = [open_shard(file) for file in files]
        for name, (local, start, end, rows) in checkpoint_tensors(run).items():
            chunk = -(-rows // len(shards))
            for i, (file, f) in enumerate(zip(files, shards)):
                first, last = min(i * chunk, rows), min((i + 1) * chunk, rows)
                if name not in f or f[name].get_shape() != [last - first, *local.shape[1:]] or (
                        f[name].get_dtype() != "F32"):
                    raise UserError(f"{file} does not fit: {name} is missing, of another shape or type")
                a, b = max(first, start), min(last, end)
                if a < b:
                    local[a - start:b - start].copy_(f[name][a - first:b - first])
    for s in run.optimizer.state.values():
        s["step"].fill_(state["step"])
    run.step, run.delta, run.seen = state["step"], state["delta"], state["seen"]
    if (state["world"], state["threads"]) != (ranks.world, torch.get_num_threads()):
        ranks.say(f"saved by {state['world']} ranks x {state['threads']} threads, resumed by {ranks.world} x "
                  f"{torch.get_num_threads()}: the curve goes on, but no longer to the bit")


# --- from start to end ----------------------------------------------------------------------------


def read_inputs(o: Options):
    """(checkpoint folder, its Config, forks, held-out forks or None, text for the log). Raises UserError."""
    files = {"pairs": o.pairs, "eval_pairs": o.eval_pairs}
    missing = [f"--{k} {f}: cannot be read: no such file" for k, f in files.items()
               if f and not os.path.isfile(f)]
    missing += [f"--out {o.out} is a file"] * os.path.isfile(o.out)
    try:
        folder = qwen.checkpoint_folder(o.model)
    except UserError as e:
        missing.insert(0, str(e))
    if missing:
        raise UserError("\n  ".join(missing))
    config = qwen.read_config(folder)
    chat = data.load_chat(folder, config.vocab_size)
    limits = (chat, o.max_length, o.max_change_ratio, o.loss in loss.PAIR_OBJECTIVES, o.skip_malformed)
    forks, log = data.load_forks(o.pairs, *limits)
    if not o.eval_pairs:
        return folder, config, forks, None, log
    eval_forks, more = data.load_forks(o.eval_pairs, *limits)
    return folder, config, forks, eval_forks, f"{log}\n{more}"


def prepare(o: Options, ranks: Ranks) -> Run:
    """Read and check everything before anything is written: model, tokenizer, pairs, output folder."""
    with ranks.together():
        taken = [n for n in ("config.json", "metrics.jsonl", "checkpoints", "model") if
                 os.path.exists(os.path.join(o.out, n))]
        if taken and not o.resume:
            raise UserError(f"{o.out} holds a run already ({', '.join(taken)}): add --resume to go on with "
                            "it, or choose another --out")
        folder, config, forks, eval_forks, log = read_inputs(o)
        ranks.say(log)
    with ranks.together():
        policy, mesh = build_policy(folder, config, o, ranks)
        count = sum(p.numel() for p in policy.parameters())
        ranks.say(f"{count / 1e6:.1f}M parameters, {ranks.world} rank(s) on {ranks.device.type}, {o.dtype}"
                  + (f", {torch.get_num_threads()} thread(s) each" if ranks.device.type == "cpu" else ""))
    hashes = hash_inputs(folder, forks, eval_forks, ranks)
    return Run(o, ranks, config, folder, forks, policy, mesh, make_optimizer(policy, o), hashes,
               eval_forks=eval_forks)


@contextlib.contextmanager
def claimed(out, ranks):
    """The run folder, made and held as long as this block lasts: two runs in one would spoil both."""
    lock = None
    with ranks.together():
        if ranks.main:
            os.makedirs(out, exist_ok=True)
            lock = open(os.path.join(out, ".lock"), "w")  # a folder that cannot be written shows here
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                lock.close()
                raise UserError(f"{out} is being written by another process, perhaps by ranks whose torchrun "
                                "was killed: wait for it, or end it") from None
            except OSError:
                pass  # a file system without locks
    try:
        yield
    finally:
        if lock:
            lock.close()


def train(o: Options, ranks: Ranks) -> int:
    """The whole run; returns the exit code."""
    run = prepare(o, ranks)
    with claimed(o.out, ranks):
        return train_in_folder(run)


def train_in_folder(run: Run) -> int:
    """Reference pass, steps, checkpoints, export, from wherever the folder stands; returns the exit code."""
    o, ranks, total = run.o, run.ranks, total_steps(run)
    run.peak_flops = peak_flops(ranks.device, getattr(torch, o.dtype))
    begin_or_resume(run)
    metrics_path, eval_path, surgery_path = (os.path.join(o.out, f"{n}.jsonl")
                                             for n in ("metrics", "eval", "surgery"))
    with ranks.together():
        if ranks.main:
            keep_steps_before(metrics_path, run.step)
            keep_steps_before(eval_path, run.step + 1)
            keep_steps_before(surgery_path, run.step)
    bar = tqdm(total=total, initial=run.step, disable=not ranks.main, unit="step", desc=o.loss)
    while run.step < total:
        if run.step % max(1, total // LOOKS) == 0:
            look(run, surgery_path)
        epoch, index = divmod(run.step, steps_per_epoch(run))
        batch = data.epoch_batches(len(run.forks), o.batch_size, o.seed, epoch)[index]
        with ranks.together():
            metrics, stop = train_step(run, batch, learning_rate(run.step, total, o))
            if ranks.main:
                append_line(metrics_path, metrics)
        bar.update()
        bar.set_postfix(loss=f"{metrics['loss']:.4f}", r_chosen=f"{metrics['reward_chosen']:.3f}",
                        tether=f"{metrics['tether_chosen']:.3f}", refresh=False)
        saving = stop or run.step == total or bool(o.save_every) and run.step % o.save_every == 0
        evaluating = run.eval_forks and (run.step % steps_per_epoch(run) == 0 or run.step == total)
        if saving or evaluating:
            with ranks.together():
                if not all(bool(qwen.rows_here(p)[0].isfinite().all()) for p in run.policy.parameters()):
                    raise UserError(f"step {run.step - 1} made weights that are not finite: they are not "
                                    "saved. Is --lr or --weight_decay too large?")
        if evaluating:
            held_out = {"step": run.step, **evaluate(run)}
            ranks.say("held out: " + ", ".join(f"{k} {v:.4g}" for k, v in held_out.items() if v is not None))
            with ranks.together():
                if ranks.main:
                    append_line(eval_path, held_out)
        if saving:
            save_checkpoint(run)
        if stop and run.step < total:
            ranks.say(f"SIGTERM: saved at step {run.step} of {total}; go on with --resume --out {o.out}")
            return 143  # 128 + SIGTERM, as the shell has it
    bar.close()
    look(run, surgery_path)
    export_model(run)
    ranks.say(f"done: {o.out}/model\n" + write_report(ranks, [o.out], os.path.join(o.out, "report.html")))
    return 0


def begin_or_resume(run):
    """Load the last whole checkpoint where --resume asks for it, score the reference, note the options."""
    o, ranks = run.o, run.ranks
    with ranks.together():
        config_path = os.path.join(o.out, "config.json")
        if o.resume and os.path.exists(config_path):
            check_hashes(run, qwen.read_json(config_path).get("hashes"), o.out)
        saved = whole_checkpoints(o.out) if o.resume else []
        if saved:
            load_checkpoint(run, saved[-1])
            ranks.say(f"resumed from {saved[-1]}: step {run.step} of {total_steps(run)}")
        elif o.resume:
            ranks.say("no whole checkpoint yet: starting from step 0")
    reference_pass(run)
    with ranks.together():  # not before: until here the same command may simply be given again
        if ranks.main and not os.path.exists(config_path):
            qwen.write_json(config_path, {"options": asdict(o), "hashes": run.hashes,
                                          "model": asdict(run.config)})


def export_model(run):
    """The trained weights as a Hugging Face folder, OUT/model."""
    o, ranks = run.o, run.ranks
    final = os.path.join(o.out, "model")
    with ranks.together():
        if ranks.main:
            remove(final + ".tmp")
    with ranks.together():
        qwen.export(run.policy, final + ".tmp", run.folder, getattr(torch, o.save_dtype),
                    main=ranks.main)
        if ranks.main:
            remove(final + ".old")
            if os.path.lexists(final):  # a name is given only to a whole one, whenever a kill comes
                os.rename(final, final + ".old")
            os.rename(final + ".tmp", final)
            remove(final + ".old")


def write_report(ranks, runs, path, note="") -> str:
    """The report by the main rank; what to say of it. Where it fails the run is whole without it."""
    try:
        if ranks.main:
            evaluation.report(runs, path, note)
    except Exception as e:  # whatever it is: hours of training are not lost for a page
        return f"the report {path} could not be written: {str(e) or type(e).__name__}"
    return f"curves, and where one pair's updates gather: {path}"


def keep_steps_before(path, step):
    """Drop the lines of a log that a resumed run will write again."""
    if os.path.exists(path):
        rows = [row for _, row in data.read_lines(path) if isinstance(row, dict)]
        kept = [row for row in rows if isinstance(row.get("step"), int) and row["step"] < step]
        with qwen.writing(path), open(path + ".tmp", "w") as f:
            f.writelines(json.dumps(row) + "\n" for row in kept)
        os.replace(path + ".tmp", path)


def append_line(path, row):
    """Add one JSON line to a log."""
    with qwen.writing(path), open(path, "a") as f:
        f.write(json.dumps(row) + "\n")


# --- the toy story: the whole method on a bare machine ---------------------------------------------

TOY = {  # every number of it; a change of any makes a new folder
    "shape": {"hidden_size": 96, "intermediate_size": 256, "num_hidden_layers": 3, "num_attention_heads": 3,
              "num_key_value_heads": 1, "head_dim": 32},
    "corpus": {"rows": 9600, "share": 1 / 3, "doubt": 0.8},
    "base": {"epochs": 2, "batch_size": 32, "lr": 3e-3},
    # beta is 1, not 0.1: a reward cannot grow beyond -beta log pi_ref(y+), here some 3 nats times beta (the
    # paper's answers have a thousand tokens, these have 30, of which the base doubts one to three). At 0.1
    # lambda would stay near 1/2, and there would be no tether to see.
    "surgery": {"epochs": 1, "batch_size": 32, "beta": 1.0},
    "rates": [6e-5, 9e-5, 1.35e-4, 2e-4],
    "questions": 800, "dev": 100, "test": 250,  # the first of the target skill alone, the others of each
    "max_fall": 1.0,  # points that a learning rate may cost the other skills on the development questions
}
TOY_METHODS = {"sft": "SFT+", "spot-bce": "SPoT"}
TOY_SAMPLING = evaluation.Sampling(max_tokens=64)


@dataclass
class Toy:
    """What the functions of the story share: a record, no behaviour."""

    root: str
    seed: int
    ranks: Ranks
    questions: dict  # {"train", "dev" or "test": {skill: [question, ...]}}, all different


def story(o: Options, ranks: Ranks) -> int:
    """The whole method from nothing: a world, a base model that errs in one skill, its own wrong answers,
    their corrections, SFT+ and SPoT on the same pairs, a table. Returns the exit code.

    Base and pairs are made once, a killed story goes on where it stopped, a finished one trains anew.
    """
    began, root = time.perf_counter(), os.path.join(o.out, sha256(json.dumps([TOY, o.seed]))[:10])
    target, *others = data.TOY_SKILLS
    asked = {s: data.toy_questions(s, o.seed, TOY["test"], TOY["dev"], TOY["questions"] if s == target else 0)
             for s in data.TOY_SKILLS}
    toy = Toy(root, o.seed, ranks, {split: {skill: lists[i] for skill, lists in asked.items()}
                                    for i, split in enumerate(("test", "dev", "train"))})
    base, results = os.path.join(root, "base/model"), os.path.join(root, "results.json")
    ranks.say(f"""The toy story of Surgical Post-Training, in {root}

1  A base model. A newborn Qwen3 learns {target}, {', '.join(others)} from a corpus whose
   authors get a third of the addition facts wrong: it will be systematically wrong in {target}.""")
    with ranks.together():
        if ranks.main:
            toy_birth(root, o.seed)
            if os.path.exists(results):
                remove(f"{root}/trained.old")
                if os.path.isdir(f"{root}/trained"):
                    os.rename(f"{root}/trained", f"{root}/trained.old")
                os.remove(results)
                remove(f"{root}/trained.old")
    go_on(toy, f"{root}/base", model=f"{root}/birth", pairs=f"{root}/corpus.jsonl", loss="sft", **TOY["base"])
    ranks.say(f"""
2  Its errors. The base answers {TOY['questions']} new questions of {target}; its wrong answers are kept: y-.
3  Corrections. The Oracle, here a program, mends the first wrong step and what follows from it, and
   keeps the rest: y+.""")
    pairs = toy_pairs(toy, base)
    ranks.say(toy_example(pairs))
    ranks.say(f"""
4  Training on these pairs, with cross-entropy on y+ (SFT+) and with SPoT. Each takes the learning rate
   that does best at {target} on development questions, {TOY['dev']} a skill, among those that cost the other
   skills at most {TOY['max_fall']:g} point there (the smaller one in a tie).""")
    grades, chosen = toy_train(toy, base, pairs)
    ranks.say(f"""
5  The result, on {TOY['test']} test questions a skill that played no part so far: right answers in %. Others:
   the mean but for {target}. KL*1000: from the base, in 1/1000 nat a token, on true answers to the others'
   questions. On the training pairs: r+ and r-, the rewards of y+ and y-, and lambda+, the tether: 1/2 at
   the start, it falls as a pair is learned. SFT+ has none; the figure is what it would be.
""")
    rows = {"base": {**toy_grades(toy, base, "test"), **toy_distance(toy, base, base, pairs)}}
    for objective, name in TOY_METHODS.items():
        model = f"{root}/trained/{objective}-{chosen[name]:g}/model"
        rows[name] = {"lr": chosen[name], **toy_grades(toy, model, "test"),
                      **toy_distance(toy, base, model, pairs)}
    seconds = time.perf_counter() - began
    with ranks.together():
        if ranks.main:
            qwen.write_json(results, {"settings": TOY, "seed": o.seed, "ranks": ranks.world,
                                      "seconds": seconds, "dev": grades, "test": rows})
    said = write_report(ranks, [f"{root}/trained/{objective}-{chosen[name]:g}" for objective, name in
                                TOY_METHODS.items()], f"{root}/report.html", toy_table(rows))
    ranks.say(f"{toy_table(rows)}\n{seconds:.0f} s with {ranks.world} rank(s); all figures are in {results}\n"
              + said)
    return 0


def go_on(toy, out, **more):
    """The real `train`, unless it was done before; a run that was killed goes on. Leaves on SIGTERM."""
    if os.path.isdir(os.path.join(out, "model")):
        return
    o = Options(out=out, seed=toy.seed, dtype="float32", checkpointing="none", tokens_per_pack=4096,
                save_dtype="float32",  # bf16 weights would lose what steps of 1e-4 change
                resume=os.path.exists(os.path.join(out, "config.json")), **more)
    code = train(o, replace(toy.ranks, quiet=True))
    if code:
        close_ranks()
        sys.exit(code)


def toy_birth(root, seed):
    """The newborn model and the corpus that will teach it, unless they are there."""
    if not os.path.isdir(f"{root}/birth"):
        shutil.rmtree(f"{root}/birth.tmp", ignore_errors=True)
        data.write_toy_checkpoint(f"{root}/birth.tmp", TOY["shape"], seed)
        os.rename(f"{root}/birth.tmp", f"{root}/birth")
    if not os.path.exists(f"{root}/corpus.jsonl"):
        evaluation.write_rows(f"{root}/corpus.jsonl", data.toy_corpus(**TOY["corpus"], seed=seed))


def toy_train(toy, base, pairs):
    """Both methods at all rates; returns {run: grades on the development questions} and {method: rate}."""
    def note(title, grade):
        toy.ranks.say(f"   {title:<14}{target} {grade[target]:5.1f} %   others {grade['others']:5.1f} %")

    target, reference, grades, chosen = data.TOY_SKILLS[0], None, {"base": toy_grades(toy, base, "dev")}, {}
    note("base", grades["base"])
    for objective, name in TOY_METHODS.items():
        for lr in TOY["rates"]:
            out = f"{toy.root}/trained/{objective}-{lr:g}"
            if reference and toy.ranks.main and not os.path.exists(out):
                os.makedirs(out)  # the reference log-probs of the same base and pairs: scored once
                shutil.copy(reference, f"{out}/reference.tmp")
                os.rename(f"{out}/reference.tmp", f"{out}/reference.safetensors")
            go_on(toy, out, model=base, pairs=pairs, loss=objective, lr=lr, **TOY["surgery"])
            reference = f"{out}/reference.safetensors"
            grades[f"{name} {lr:g}"] = toy_grades(toy, f"{out}/model", "dev")
            note(f"{name} {lr:g}", grades[f"{name} {lr:g}"])
        chosen[name] = choose_rate({lr: grades[f"{name} {lr:g}"] for lr in TOY["rates"]}, grades["base"])
    return grades, chosen


def toy_item(name, question):
    """A question as oracle.py and the grader take it."""
    return oracle.Item(name, question, evaluation.extract_answer(data.toy_answer(question)))


def toy_pairs(toy, base):
    """Error elicitation and rectification by the real oracle.py; returns the path of the pair file."""
    quiet = replace(toy.ranks, quiet=True)
    own = evaluation.open_own(base, torch.float32, toy.ranks.device, batch_size=64)
    items = [toy_item(str(i), q) for i, q in enumerate(toy.questions["train"][data.TOY_SKILLS[0]])]
    oracle.elicit(items, f"{toy.root}/errors", own, TOY_SAMPLING, quiet, seed=toy.seed)
    errors, _ = oracle.read_errors(f"{toy.root}/errors/errors.jsonl")
    oracle.rectify(errors, f"{toy.root}/pairs", lambda item: oracle.toy_oracle(item.question, item.answer),
                   own.chat.encode, quiet)
    return f"{toy.root}/pairs/pairs.jsonl"


def toy_grades(toy, folder, split) -> dict:
    """{skill: right answers in %} on the questions of a split, and "others": the mean without the target."""
    own = evaluation.open_own(folder, torch.float32, toy.ranks.device, batch_size=64)
    items = {f"{skill}/{i}": toy_item(f"{skill}/{i}", question)
             for skill, some in toy.questions[split].items() for i, question in enumerate(some)}
    requests = [evaluation.request_for(name, item.messages, toy.seed) for name, item in items.items()]
    records = evaluation.sample(own, requests, f"{os.path.dirname(folder)}/answers-{split}", TOY_SAMPLING,
                                toy.ranks, split)
    found = [evaluation.extract_answer(records[r.key]["text"]) or "" for r in requests]
    right = Counter(name.split("/")[0] for answer, (name, item) in zip(found, items.items())
                    if evaluation.answers_match(answer, item.gold))
    grades = {skill: 100 * right[skill] / len(some) for skill, some in toy.questions[split].items()}
    return {**grades, "others": sum(list(grades.values())[1:]) / (len(grades) - 1)}


def choose_rate(grades: dict, base: dict) -> float:
    """The rule of the story, on {learning rate: grades}; where no rate keeps it, the one that costs least."""
    kept = {lr: g for lr, g in grades.items() if g["others"] >= base["others"] - TOY["max_fall"]}
    if not kept:
        return max(sorted(grades), key=lambda lr: grades[lr]["others"])
    return max(sorted(kept), key=lambda lr: kept[lr][data.TOY_SKILLS[0]])


@torch.no_grad()
def toy_distance(toy, base, folder, pairs) -> dict:
    """How far a model went from the base: "kl", KL(base || model) in nats a token on true answers to the
    other skills' questions, and r+, r-, lambda+ on the training pairs."""
    ranks = toy.ranks
    models = [qwen.load_model(f, device=ranks.device) for f in (base, folder)]
    chat, texts = data.load_chat(base, models[0].config.vocab_size), []
    for skill in data.TOY_SKILLS[1:]:
        for question in toy.questions["test"][skill][:100]:
            prompt = chat.prompt([{"role": "user", "content": question}])
            texts.append((prompt + chat.encode(data.toy_answer(question)), len(prompt)))
    kl, _ = evaluation.retention(models[1], models[0], texts, ranks)["kl"]
    forks, _ = data.load_forks(pairs, chat, Options.max_length, Options.max_change_ratio, True)
    total = torch.zeros(len(loss.SUMS), dtype=torch.float64)
    for i in range(ranks.rank, len(forks), ranks.world):
        pack = data.make_pack(forks, [i]).to(ranks.device)
        p, q = (m(pack.tokens, pack.positions, pack.forks, pack.rows, pack.targets) for m in models)
        _, stats = loss.row_coefficients("spot-bce", q, pack.lengths, loss.sequence_logps(p, pack.lengths),
                                         TOY["surgery"]["beta"])
        total += torch.stack(list(stats.values())).cpu()
    means = loss.average(dict(zip(loss.SUMS, ranks.reduce(total).tolist())), "spot-bce")
    return {"kl": kl, **{k: means[k] for k in ("reward_chosen", "reward_rejected", "tether_chosen")}}


def toy_example(pairs) -> str:
    """One pair as text, and how many there are."""
    rows = [row for _, row in data.read_lines(pairs)]
    question, wrong, right = (rows[0][k].replace("\n", "  ") for k in
                              ("question", "original_answer", "gemini_corrected_answer"))
    return f"   {len(rows)} pairs. One of them:\n     x   {question}\n     y-  {wrong}\n     y+  {right}"


def toy_table(rows) -> str:
    """The figures side by side, as text."""
    head = [*data.TOY_SKILLS, "others", "KL*1000", "r+", "r-", "lambda+"]
    lines = [" " * 21 + "".join(f"{name:>9}" for name in head)]
    for name, row in rows.items():
        title = name + (f" (lr {row['lr']:g})" if "lr" in row else "")
        cells = [f"{row[k]:.1f}" for k in (*data.TOY_SKILLS, "others")] + [f"{1000 * row['kl']:.2f}"]
        cells += [f"{row[k]:.2f}" for k in ("reward_chosen", "reward_rejected", "tether_chosen")]
        lines.append(f"   {title:<18}" + "".join(f"{cell:>9}" for cell in cells))
    return "\n".join(lines)


def main() -> int:
    """Command line to exit code: 0 done, 1 failed, 2 options that do not work, 143 stopped by SIGTERM."""
    o, ranks = begin(parse_options, lambda o: open_ranks(o.timeout, toy=not o.model))
    signal.signal(signal.SIGTERM, lambda *_: STOP.update(asked=True))
    if o.plan:
        with ranks.together():
            ranks.say(plan(o))
        close_ranks()
        return 0
    code = train(o, ranks) if o.model else story(o, ranks)
    close_ranks()
    return code


if __name__ == "__main__":
    qwen.leave(main)
