"""The explicit training loop of Surgical Post-Training, from one CPU core to nodes of GPUs.

Comes in:  --model, a Qwen3 checkpoint folder, and --pairs, a JSONL file of surgical pairs.
Goes out:  a run folder: config.json, metrics.jsonl, eval.jsonl with --eval_pairs,
           reference.safetensors, checkpoints/, report.html with surgery.jsonl behind it, and
           model/, the trained checkpoint in Hugging Face layout.

    torchrun --nproc_per_node=8 train.py --model Qwen3-8B --pairs pairs.jsonl --out runs/first
    torchrun --nproc_per_node=8 train.py --resume --out runs/first
    torchrun --nproc_per_node=2 train.py         # nothing given: the toy story, in minutes

One optimizer step is `train_step`: for each pack the policy gives one log-prob a scored row,
loss.py gives one coefficient a row, and `row_logps.backward(coefficients)` is the backward pass.
Which pairs form a step does not depend on the number of ranks; each rank computes its share of the
tokens, and gradients are summed. Without --model and --pairs `story`, the last section, makes a
small world with a base model, its errors and their corrections, trains on them, and prints what
came of it.

SIGTERM saves at the next step (exit code 143); --resume goes on, on any number of ranks, and also
begins a run. On several nodes start on each, with an --out that all of them see:
    TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 torchrun --nnodes=2 --nproc_per_node=8 --max_restarts=3 \\
        --rdzv_backend=c10d --rdzv_id=spot --rdzv_endpoint=HOST:29500 train.py ... --shard_size 8 \\
        --resume
A dead node's command is started again, and all go on (without the variable torch's agents wait for
each other in different stores).
"""

import argparse
import contextlib
import fcntl
import hashlib
import json
import math
import os
import random
import re
import resource
import shutil
import signal
import sys
import threading
import time
from collections import Counter
from dataclasses import asdict, dataclass, field, fields, replace

import torch
from safetensors import SafetensorError, safe_open
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from tqdm import tqdm

import data
import eval as evaluation
import loss
import model as qwen
import oracle
from data import UserError
from model import Ranks, add_options, begin, close_ranks, open_ranks, option

# Dense bf16 peaks in FLOP/s, for mfu. Any other device: a product's rate, measured at the start.
PEAKS = {"H100": 989e12, "H200": 989e12, "H800": 989e12, "A100": 312e12, "A800": 312e12,
         "B200": 2250e12}


# --- options --------------------------------------------------------------------------------------


@dataclass
class Options:
    """Everything that can be chosen. Defaults are the paper's (Qwen3-8B), but for the loss."""

    model: str = option("", "checkpoint folder in Hugging Face layout (required)")
    pairs: str = option("", "pair file, .jsonl or .jsonl.gz (required)")
    out: str = option("", "run folder to write (required)")
    loss: str = option("spot-bce", "objective", loss.OBJECTIVES)
    beta: float = option(0.1, "reward scale: r = beta * (log pi - log pi_ref). r+ cannot exceed "
                         "-beta log pi_ref(y+): raise it where lambda+ settles above 0.05")
    delta: str = option("ema", "running mean of spot-bco: moving (0.9) or of all",
                        ("ema", "cumulative"))
    lr: float = option(1e-6, "peak learning rate (SFT in the paper: 5e-6)")
    epochs: int = option(2, "passes over the pairs")
    max_steps: int = option(0, "optimizer steps at most, schedule included; 0: all of the epochs'")
    batch_size: int = option(32, "pairs per optimizer step, over all ranks")
    warmup: float = option(0.05, "share of the steps with rising rate; a cosine to 0 follows")
    weight_decay: float = option(0.01, "AdamW's, on all weights but norms")
    clip: float = option(1.0, "largest norm of the gradient")
    max_length: int = option(8192, "tokens of prompt + one answer; longer pairs are dropped")
    max_change_ratio: float = option(0.6, "drop pairs with 1 - LCS(y-, y+)/|y+| above this (gamma)")
    skip_malformed: bool = option(False, "drop and count malformed rows instead of stopping")
    template: str = option("", "compute this chat template, whatever the checkpoint's file says",
                           ("", "hybrid", "instruct"))
    eval_pairs: str = option("", "held-out pair file, scored after each epoch")
    seed: int = option(0, "order of the pairs")
    dtype: str = option("bfloat16", "of the computation; weights, moments and sums stay float32",
                        ("float32", "bfloat16"))
    checkpointing: str = option("full", "recompute each block in backward (less memory), or not",
                                ("none", "full"))
    tokens_per_pack: int = option(16384, "tokens of a micro-batch; memory grows, results do not")
    shard_size: int = option(0, "ranks that share one copy of the model; 0: all")
    save_dtype: str = option("bfloat16", "of the trained checkpoint in OUT/model",
                             ("float32", "bfloat16"))
    save_every: int = option(50, "steps between checkpoints; 0: only at the end and on SIGTERM")
    keep: int = option(1, "checkpoints to keep")
    timeout: int = option(1800, "seconds after which a stalled rank ends the run")
    resume: bool = option(False, "go on with the run in OUT from its last checkpoint")
    plan: bool = option(False, "train nothing: say what memory and time the run would take on GPUs")
    gpus: int = option(8, "with --plan: how many GPUs")
    gpu_memory: float = option(80.0, "with --plan: memory of each, in GB")


# Options that may differ when a run is resumed: none changes the curve beyond rounding. Files may
# move: a hash tells whether their content is the same.
FREE = ("resume", "keep", "save_every", "save_dtype", "timeout", "tokens_per_pack",
        "checkpointing", "shard_size", "model", "pairs", "eval_pairs", "out", "plan", "gpus",
        "gpu_memory")


def parse_options(argv=None) -> Options:
    """Command line to Options. With --resume what is not given comes from OUT/config.json, and what
    is given must agree with it. Only --out and --seed, or nothing, asks for the toy story: `model`
    stays empty. Raises UserError that lists every problem."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser, Options)
    given = vars(parser.parse_args(argv))
    problems = []
    config_path = os.path.join(given.get("out", ""), "config.json")
    if given.get("resume") and os.path.exists(config_path):
        names = {f.name for f in fields(Options)}
        kept = data.read_json(config_path).get("options", {})
        kept = {name: value for name, value in kept.items() if name in names}
        for name, value in given.items():
            if name in kept and name not in FREE and kept[name] != value:
                problems.append(f"--{name} is {value!r}, the run in {given['out']} has "
                                f"{kept[name]!r}")
        given = {**kept, **given}
    o = Options(**given)
    wants_story = set(given) <= {"out", "seed"}
    if wants_story:
        o.out = o.out or "runs/toy"
    else:
        required = ["model", "pairs"] if o.plan else ["model", "pairs", "out"]
        problems += [f"--{name} is required" for name in required if not getattr(o, name)]
    problems += check_options(o)
    if problems:
        raise UserError("these options do not work:" + data.listed(problems))
    return o


def check_options(o: Options) -> list:
    """What is wrong with the numbers, as text."""
    problems = []
    for name in ("beta", "lr", "epochs", "batch_size", "clip", "max_length", "tokens_per_pack",
                 "keep", "timeout", "gpus", "gpu_memory"):
        value = getattr(o, name)
        if not 0 < value < 1e9:  # a time-out in seconds has no room for more
            problems.append(f"--{name} is {value}, a number above 0 (and below 1e9) expected")
    for name in ("max_steps", "save_every", "shard_size", "weight_decay", "seed",
                 "max_change_ratio"):
        value = getattr(o, name)
        if not 0 <= value < math.inf:
            problems.append(f"--{name} is {value}, a number of 0 or more expected")
    if not 0 <= o.warmup <= 1:
        problems.append(f"--warmup is {o.warmup}, a share between 0 and 1 expected")
    if o.delta != "ema" and o.loss != "spot-bco":
        problems.append(f"--delta {o.delta} goes with --loss spot-bco, found --loss {o.loss}")
    return problems


# --- the sharded policy ---------------------------------------------------------------------------


def build_policy(folder, config, o: Options, ranks: Ranks):
    """(policy, mesh): meta device -> shard each block -> root -> memory -> each rank reads its own
    rows. fp32 shards."""
    with torch.device("meta"):
        policy = qwen.Qwen3(config, checkpointing=o.checkpointing == "full")
    shape, names = (ranks.world,), ("shard",)
    if o.shard_size and o.shard_size != ranks.world:
        if ranks.world % o.shard_size:
            raise UserError(f"--shard_size {o.shard_size} does not divide the {ranks.world} ranks")
        shape, names = (ranks.world // o.shard_size, o.shard_size), ("replicate", "shard")
    mesh = init_device_mesh(ranks.device.type, shape, mesh_dim_names=names)
    precision = MixedPrecisionPolicy(getattr(torch, o.dtype), reduce_dtype=torch.float32)
    for block in policy.layers:
        fully_shard(block, mesh=mesh, mp_policy=precision)
    if not config.tie_word_embeddings:  # units of their own, else one buffer holds both big tables
        fully_shard(policy.embed_tokens, mesh=mesh, mp_policy=precision)
        fully_shard(policy.lm_head, mesh=mesh, mp_policy=precision)
    fully_shard(policy, mesh=mesh, mp_policy=precision, reshard_after_forward=False)
    for unit in policy.modules():
        # Gradients are summed: we divide by our own global counts. A rank alone would divide by 1.
        if isinstance(unit, FSDPModule) and ranks.world > 1:
            unit.set_gradient_divide_factor(1.0)
            unit.set_force_sum_reduction_for_comms(True)  # without it gloo dies on the factor
    qwen.load_weights(policy, folder, ranks.device)
    return policy, mesh


def make_optimizer(policy, o: Options):
    """AdamW as in the paper (betas 0.9, 0.95), no decay on norms (the only 1-D weights)."""
    weights = [p for p in policy.parameters() if p.ndim > 1]
    norms = [p for p in policy.parameters() if p.ndim == 1]
    groups = [{"params": weights, "weight_decay": o.weight_decay},
              {"params": norms, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=o.lr, betas=(0.9, 0.95), fused=True)
    for p in policy.parameters():  # made before the first step, so that resume can load into it
        optimizer.state[p] = {"step": torch.zeros((), device=p.device),
                              "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
    return optimizer


def learning_rate(step: int, total: int, o: Options) -> float:
    """(k+1)/W of the peak in step k of W warm-up steps (HF starts at 0, a wasted step), then a
    cosine to 0."""
    warm = math.ceil(o.warmup * total)
    if step < warm:
        return o.lr * (step + 1) / warm
    return o.lr * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, total - warm)))


def count_flops(config, pack) -> float:
    """FLOPs of forward + backward of one pack: products only, recomputation left out."""
    heads, groups = config.num_attention_heads, config.num_key_value_heads
    width = config.hidden_size
    layer = width * (config.head_dim * 2 * (heads + groups) + 3 * config.intermediate_size)
    visible = 0  # pairs of a query and a key that it sees
    for start, trunk_end, rejected_end, chosen_end in pack.forks:
        trunk = trunk_end - start
        for length in (trunk, rejected_end - trunk_end, chosen_end - rejected_end):
            visible += length * (length + 1) // 2
        visible += (chosen_end - trunk_end) * trunk
    attention = 2 * heads * config.head_dim * visible
    head = config.vocab_size * width * len(pack.rows)
    return 6.0 * (config.num_hidden_layers * (layer * len(pack.tokens) + attention) + head)


def peak_flops(device, dtype) -> float:
    """FLOP/s of this rank: a known GPU's published peak, else a 512^3 product's measured rate."""
    if device.type == "cuda" and dtype == torch.bfloat16:
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


def memory_gb(ranks) -> float:
    """Peak so far: of this rank's GPU, or resident of this process."""
    if ranks.device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


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
        "one block in backward":
            tokens * (2 * c.intermediate_size + (kept if full else 0)) * size,
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
    steps = total_steps(len(forks), o)
    epoch = data.epoch_batches(len(forks), o.batch_size, o.seed, 0)
    held_out = fixed_batches(eval_forks, o)
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


# --- the run and its step -------------------------------------------------------------------------

STOP = threading.Event()  # set by SIGTERM; a step's all-reduce makes all ranks stop together


@dataclass
class State:
    """What a checkpoint holds beside weights and moments."""

    step: int = 0
    delta: float = 0.0
    seen: int = 0  # pairs that went into delta


@dataclass
class Run:
    """What the functions below share."""

    o: Options
    ranks: Ranks
    config: qwen.Config
    folder: str  # of the checkpoint we start from
    forks: list
    eval_forks: list  # held out; perhaps none
    hashes: dict  # of weights and pairs
    policy: torch.nn.Module
    mesh: object
    optimizer: torch.optim.Optimizer
    state: State = field(default_factory=State)
    reference: torch.Tensor = None  # (N, 2) fp64, sequence_logps before training
    eval_reference: torch.Tensor = None
    peak_flops: float = math.nan  # of one rank, FLOP/s

    def packs(self, forks, batch, reference=None):
        """This rank's micro-batches of one global batch, on the device."""
        plan = data.split_batch(batch, list(map(len, forks)), self.ranks.world,
                                self.o.tokens_per_pack)
        for micro_batch in plan:
            pack = data.make_pack(forks, micro_batch[self.ranks.rank], reference)
            yield pack.to(self.ranks.device)

    def score(self, pack):
        """Row log-probs (R,) of a pack, graph attached."""
        return self.policy(pack.tokens, pack.positions, pack.forks, pack.rows, pack.targets)


@dataclass
class Totals:
    """A step's numbers over all ranks."""

    sums: list  # by loss.SUMS
    flops: float
    stop: bool  # SIGTERM has come to a rank
    grad_norm: float  # before clipping


def steps_per_epoch(count: int, o: Options) -> int:
    """Optimizer steps of one pass over `count` pairs; the last, smaller batch is a step too."""
    return math.ceil(count / o.batch_size)


def total_steps(count: int, o: Options) -> int:
    """Optimizer steps of the whole run: --epochs, cut by --max_steps."""
    steps = steps_per_epoch(count, o) * o.epochs
    return min(steps, o.max_steps) if o.max_steps else steps


def train_step(run: Run, batch, lr: float) -> Totals:
    """One optimizer step on one global batch of pair indices. Raises UserError on NaN or infinity,
    on all ranks alike and before the weights are touched."""
    o, ranks = run.o, run.ranks
    count = len(batch)
    if o.loss in loss.TOKEN_OBJECTIVES:  # a global number that every rank knows: no communication
        forks = [run.forks[i] for i in batch]
        count = sum(len(f.trunk) - f.prompt_length + len(f.chosen) for f in forks)
    sums = torch.zeros(len(loss.SUMS), dtype=torch.float64, device=ranks.device)
    flops = 0.0
    for pack in run.packs(run.forks, batch, run.reference):
        row_logps = run.score(pack)
        coefficients, pack_sums = loss.row_coefficients(
            o.loss, row_logps, pack.lengths, pack.reference, o.beta, run.state.delta)
        row_logps.backward(coefficients / count)
        sums += pack_sums
        flops += count_flops(run.config, pack)
    grad_norm = torch.nn.utils.clip_grad_norm_(run.policy.parameters(), o.clip)
    totals = share_totals(ranks, sums, flops, grad_norm.full_tensor())
    check_step(run, batch, totals, count)
    for group in run.optimizer.param_groups:
        group["lr"] = lr
    run.optimizer.step()
    run.optimizer.zero_grad()
    return totals


def share_totals(ranks, sums, flops, grad_norm) -> Totals:
    """A step's numbers over all ranks: our only communication in it, its only wait for the GPU."""
    own = torch.tensor([flops, float(STOP.is_set())], dtype=torch.float64)
    everything = torch.cat([sums, data.to_device(own, ranks.device), grad_norm.double().view(1)])
    *all_sums, all_flops, stops, norms = ranks.reduce(everything).tolist()
    # The norm is the same fp32 number on every rank and only rides along: the division in fp64
    # gives it back exactly.
    return Totals(all_sums, all_flops, stops > 0, norms / ranks.world)


def check_step(run, batch, totals: Totals, count: int):
    """Step 0's canary, and no number that is not finite. Raises UserError."""
    sums = dict(zip(loss.SUMS, totals.sums))
    mean_loss = sums["loss"] / count
    if run.state.step == 0:
        canary(run, sums["abs_reward"], mean_loss)
    if not math.isfinite(mean_loss) or not math.isfinite(totals.grad_norm):
        lines = ", ".join(str(run.forks[i].line) for i in batch)
        raise UserError(f"step {run.state.step}: loss {mean_loss}, gradient norm "
                        f"{totals.grad_norm}: not finite, weights left as they were. The step's "
                        f"pairs: lines {lines} of {run.o.pairs}")


def canary(run, abs_reward, mean_loss):
    """Step 0: the policy is its own reference, so every reward is 0 and the tether 1/2, exactly."""
    expected = {"spot-bce": 2 * math.log(2), "spot-bco": 2 * math.log(2), "dpo": math.log(2),
                "reward-sft": math.log(2)}.get(run.o.loss)
    text, same = f"step 0: sum of |reward| {abs_reward}, loss {mean_loss:.9f}", True
    if expected is not None:
        text += f", expected {expected:.9f}"
        same = torch.tensor(mean_loss).float() == torch.tensor(expected).float()
    run.ranks.say(text)
    if abs_reward != 0 or not same:
        raise UserError("step 0 must give rewards of exactly 0. Delete reference.safetensors, "
                        "which may be of another model, and start again with --resume --out "
                        f"{run.o.out}. If it returns, the forward pass is not deterministic here: "
                        "try --dtype float32, another torch, or another machine")


def finish_step(run, batch, totals: Totals, lr: float, seconds: float) -> dict:
    """Move the state one step on; returns the step's line of metrics.jsonl.

    step, epoch   from 0; the keys of loss.average are means before this step's update
    delta         of this step (spot-bco); grad_norm: before clipping; lr: of this step
    tokens        computed in this step (trunks once), all ranks; tokens_per_s likewise
    mfu           counted FLOPs (products of forward and backward, no recomputation) over the peak
                  of all ranks; see peak_flops
    memory_gb     peak of the main rank so far: its GPU's memory, or its resident memory
    """
    o, state, ranks = run.o, run.state, run.ranks
    tokens = sum(len(run.forks[i]) for i in batch)
    metrics = {"step": state.step, "epoch": state.step // steps_per_epoch(len(run.forks), o),
               **loss.average(totals.sums, o.loss), "delta": state.delta,
               "grad_norm": totals.grad_norm, "lr": lr, "tokens": tokens,
               "tokens_per_s": tokens / seconds,
               "mfu": totals.flops / seconds / (run.peak_flops * ranks.world),
               "memory_gb": memory_gb(ranks)}
    if o.loss == "spot-bco":
        mean = (metrics["reward_chosen"] + metrics["reward_rejected"]) / 2
        state.delta = loss.update_delta(state.delta, mean, len(batch), state.seen, o.delta)
        state.seen += len(batch)
    state.step += 1
    return metrics


def score_all(run: Run, forks, batches, title) -> torch.Tensor:
    """(N, 2) fp64 sequence log-probs of all forks under the present policy, on every rank's CPU."""
    scores = torch.zeros(len(forks), 2, dtype=torch.float64, device=run.ranks.device)
    with torch.no_grad():
        for batch in tqdm(batches, desc=title, disable=not run.ranks.main, unit="batch"):
            for pack in run.packs(forks, batch):
                scores[pack.pairs] = loss.sequence_logps(run.score(pack), pack.lengths)
    run.policy.reshard()  # a forward without backward leaves the root's weights gathered
    return run.ranks.reduce(scores)  # each pair was scored by one rank, the others add zeros


def evaluate(run: Run) -> dict:
    """The diagnostics of the held-out pairs under the policy as it is, delta frozen."""
    sums = torch.zeros(len(loss.SUMS), dtype=torch.float64, device=run.ranks.device)
    with torch.no_grad():
        for batch in fixed_batches(run.eval_forks, run.o):
            for pack in run.packs(run.eval_forks, batch, run.eval_reference):
                _, pack_sums = loss.row_coefficients(
                    run.o.loss, run.score(pack), pack.lengths, pack.reference, run.o.beta,
                    run.state.delta)
                sums += pack_sums
    run.policy.reshard()
    return loss.average(run.ranks.reduce(sums).tolist(), run.o.loss)


def fixed_batches(forks, o) -> list:
    """Held-out pairs in file order, in batches of --batch_size: ranges of indices."""
    return [range(i, min(i + o.batch_size, len(forks))) for i in range(0, len(forks), o.batch_size)]


# --- the watched pair: how the coefficients of one pair's tokens move -----------------------------

LOOKS = 10  # about so many are taken, and one after the last step


def watched_pair(run) -> int:
    """Index of the pair of median length (in tokens) among those that the run trains on, with y-
    where there are such."""
    batches = data.epoch_batches(len(run.forks), run.o.batch_size, run.o.seed, 0)
    trained = [int(i) for batch in batches[:total_steps(len(run.forks), run.o)] for i in batch]
    candidates = [i for i in trained if len(run.forks[i].rejected)] or trained
    return sorted(candidates, key=lambda i: (len(run.forks[i]), i))[len(candidates) // 2]


def look(run: Run, path: str):
    """Add a line to surgery.jsonl: the watched pair's coefficients (of the summed loss) and
    log-probs under the present policy, one a token after the prompt: trunk, rejected, chosen."""
    o, index = run.o, watched_pair(run)
    with torch.no_grad():
        (pack,) = run.packs(run.forks, [index])  # the main rank's; the others forward a dummy
        row_logps = run.score(pack)
    run.policy.reshard()

    def write():
        rows = data.read_log(path)
        if not rows:
            rows = [describe_pair(run, index, loss.sequence_logps(row_logps, pack.lengths))]
            data.append_row(path, rows[0])
        # Its own reference, not reference.safetensors': there it was scored in a pack with others,
        # and in bf16 another pack gives another sum. So step 0 is exact.
        reference = torch.tensor([rows[0]["reference"]], dtype=torch.float64)
        coefficients, sums = loss.row_coefficients(
            o.loss, row_logps, pack.lengths, reference.to(row_logps.device), o.beta,
            run.state.delta)
        sums = dict(zip(loss.SUMS, sums.tolist()))
        data.append_row(path, {
            "step": run.state.step, "delta": run.state.delta,
            "reward_chosen": sums["reward_chosen"], "reward_rejected": sums["reward_rejected"],
            "coefficients": coefficients.tolist(), "logps": row_logps.tolist()})

    run.ranks.main_only(write)


def describe_pair(run, index, sums) -> dict:
    """The first line of surgery.jsonl: the watched pair as token texts, and its reference
    log-probs. Its "step" is -1, so that no resume drops it."""
    fork, prompt = run.forks[index], run.forks[index].prompt_length
    if run.state.step:  # the first line was lost
        sums = run.reference[[index]]
    tokenizer = data.load_chat(run.folder, run.config.vocab_size, run.o.template).tokenizer
    parts = {"prompt": fork.trunk[:prompt], "trunk": fork.trunk[prompt:], "rejected": fork.rejected,
             "chosen": fork.chosen}
    texts = {name: [tokenizer.decode([i], skip_special_tokens=False) for i in ids]
             for name, ids in parts.items()}
    return {"step": -1, "line": fork.line, "reference": sums[0].tolist(), **texts,
            "rejected_ids": fork.rejected.tolist(), "chosen_ids": fork.chosen.tolist()}


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


def hash_inputs(folder, forks, eval_forks) -> dict:
    """Hashes of the encoded pairs (which hold tokenizer and template too), and of the weights: each
    tensor's name, type, shape and first row. All bytes of 8B would take minutes, and step 0 finds
    what this misses."""
    weights = []
    for name, (_, tensor) in sorted(qwen.open_tensors(folder).items()):
        first_row = tensor[:1].view(torch.uint8).numpy()
        weights += [name, tensor.get_dtype(), tensor.get_shape(), memoryview(first_row)]

    def ids(forks):
        bounds = [(f.prompt_length, len(f.trunk), len(f.rejected)) for f in forks]
        return sha256(bounds, *(memoryview(part) for f in forks
                                for part in (f.trunk, f.rejected, f.chosen)))

    return {"weights": sha256(*weights), "pairs": ids(forks), "eval_pairs": ids(eval_forks)}


def reference_pass(run: Run):
    """Score the pairs with the policy as it is, in the packs of epoch 0, or take the kept scores.

    The same code path, packs and dtype as in training make step-0 rewards exactly 0. The key holds
    all that can change a bit of them, the plan included: bf16 log-probs depend on the pack.
    """
    o, ranks = run.o, run.ranks
    path = os.path.join(o.out, "reference.safetensors")
    batches = data.epoch_batches(len(run.forks), o.batch_size, o.seed, 0)
    batches = batches[:total_steps(len(run.forks), o)]  # --max_steps may leave pairs out
    key = sha256(json.dumps([run.hashes, o.dtype, o.seed, o.batch_size, len(batches),
                             o.tokens_per_pack, o.shard_size, ranks.world, ranks.device.type,
                             torch.get_num_threads(), torch.__version__]))
    with ranks.together():
        kept = read_reference(run, path, key)  # every rank sees the run folder
    found = torch.full((), int(kept is not None), device=ranks.device)
    if int(ranks.reduce(found)) == ranks.world:  # all ranks take the same way
        ranks.say(f"reference log-probs taken from {path}")
        run.reference, run.eval_reference = kept["pairs"], kept["eval_pairs"]
        return
    run.reference = score_all(run, run.forks, batches, "reference")
    run.eval_reference = score_all(run, run.eval_forks, fixed_batches(run.eval_forks, o),
                                   "reference, held out")
    with ranks.together():
        bad = (~run.reference.isfinite()).any(1).nonzero().flatten().tolist()
        if bad:
            raise UserError(f"the model gives log-probs that are not finite, first at line "
                            f"{run.forks[bad[0]].line} of {o.pairs}: are its weights sound?")

    scores = {"pairs": run.reference, "eval_pairs": run.eval_reference}

    def write():
        qwen.write_tensors(path + ".tmp", scores, key=key, hashes=json.dumps(run.hashes))
        os.replace(path + ".tmp", path)

    ranks.main_only(write)


def read_reference(run: Run, path: str, key: str) -> dict | None:
    """The kept scores, or None where they do not fit. A resumed run needs those it began with,
    whatever the plan is now: raises UserError."""
    try:
        with safe_open(path, framework="pt") as f:
            metadata = f.metadata() or {}
            tensors = {name: f.get_tensor(name) for name in ("pairs", "eval_pairs")}
        problem = "is of other weights or pairs than this run's checkpoint"
    except (OSError, SafetensorError) as e:
        metadata, problem = {}, f"is missing or corrupt ({e})"
    if run.state.step == 0:
        return tensors if metadata.get("key") == key else None
    if metadata.get("hashes") != json.dumps(run.hashes):
        raise UserError(f"{path} {problem}")
    return tensors


# --- checkpoints ----------------------------------------------------------------------------------


def checkpoint_tensors(run: Run) -> dict:
    """{name: (local tensor, first row, end row, rows in all)} of fp32 weights and both moments."""
    tensors = {}
    for name, p in run.policy.named_parameters():
        moments = run.optimizer.state[p]
        for suffix, t in (("", p), (".exp_avg", moments["exp_avg"]),
                          (".exp_avg_sq", moments["exp_avg_sq"])):
            tensors[name + suffix] = (*qwen.rows_here(t), t.shape[0])
    return tensors


def save_checkpoint(run: Run):
    """checkpoints/step_N: one shard a rank and state.json, written beside, made durable, renamed.
    Older checkpoints are deleted only after that."""
    o, ranks = run.o, run.ranks
    root = os.path.join(o.out, "checkpoints")
    name = f"step_{run.state.step:06d}"
    final, beside = os.path.join(root, name), os.path.join(root, "tmp_" + name)
    shard = run.mesh.get_local_rank("shard")
    shards = run.mesh.size(run.mesh.mesh_dim_names.index("shard"))
    ranks.main_only(clear_leftovers, root, beside)
    digests = torch.zeros(shards, 32, dtype=torch.int64, device=ranks.device)
    with ranks.together():
        if ranks.rank < shards:  # the first replica writes
            path = os.path.join(beside, f"shard_{shard}.safetensors")
            tensors = {k: t.cpu().contiguous() for k, (t, *_) in checkpoint_tensors(run).items()}
            qwen.write_tensors(path, tensors)
            digests[shard] = torch.tensor(list(bytes.fromhex(file_sha256(path))))
    digests = [bytes(row).hex() for row in ranks.reduce(digests).tolist()]

    def finish():
        data.write_json(os.path.join(beside, "state.json"), {
            **asdict(run.state), "shards": shards, "world": ranks.world,
            "threads": torch.get_num_threads(), "hashes": run.hashes, "sha256": digests})
        fsync(beside)
        if os.path.isdir(final):  # of before a resume that repeats it
            discard(final)
        os.rename(beside, final)
        fsync(root)
        for old in whole_checkpoints(o.out)[:-o.keep]:
            discard(old)

    ranks.main_only(finish)


def clear_leftovers(root, beside):
    """Make the folder to write to; what a killed run left goes."""
    os.makedirs(root, exist_ok=True)
    for name in os.listdir(root):
        if re.fullmatch(r"tmp_(step_)?\d{6,}", name):
            remove(os.path.join(root, name))
    os.makedirs(beside)


def discard(checkpoint):
    """Delete a checkpoint; its name goes first, so that no kill leaves half of one under it."""
    root, name = os.path.split(checkpoint)
    hidden = os.path.join(root, "tmp_" + name)
    os.rename(checkpoint, hidden)
    remove(hidden)


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
    """Paths of the whole checkpoints of a run, oldest first; only whole ones have this name."""
    root = os.path.join(out, "checkpoints")
    names = os.listdir(root) if os.path.isdir(root) else []
    names = [n for n in names if re.fullmatch(r"step_\d{6,}", n)]
    return [os.path.join(root, n) for n in sorted(names, key=lambda n: int(n[5:]))]


def check_hashes(run: Run, kept: dict, path: str):
    """Raises UserError where a run began with other weights or pairs than those given now."""
    differ = [name for name in run.hashes if kept.get(name) != run.hashes[name]]
    if differ:
        raise UserError(f"{path} belongs to other {' and '.join(differ)} than given now")


def load_checkpoint(run: Run, path: str):
    """Restore weights, moments and state; each rank copies the rows it needs, so that another
    number of ranks works. Raises UserError that names a corrupt or missing file."""
    ranks = run.ranks
    with ranks.together():
        kept = data.read_json(os.path.join(path, "state.json"))
        check_hashes(run, kept["hashes"], path)
        files = [os.path.join(path, f"shard_{i}.safetensors") for i in range(kept["shards"])]
        for i, file in enumerate(files):  # each rank checks its part
            if i % ranks.world == ranks.rank and file_sha256(file) != kept["sha256"][i]:
                raise UserError(f"{file} is corrupt: its hash is not the one in state.json")
    with ranks.together():
        shards = [open_shard(file) for file in files]
        for name, (local, start, end, rows) in checkpoint_tensors(run).items():
            chunk = math.ceil(rows / len(shards))
            for i, shard in enumerate(shards):
                first = max(i * chunk, start)
                last = min((i + 1) * chunk, rows, end)
                if first < last:
                    part = shard[name][first - i * chunk:last - i * chunk]
                    local[first - start:last - start].copy_(part)
    for moments in run.optimizer.state.values():
        moments["step"].fill_(kept["step"])
    run.state = State(kept["step"], kept["delta"], kept["seen"])
    before, now = (kept["world"], kept["threads"]), (ranks.world, torch.get_num_threads())
    if before != now:
        ranks.say(f"saved by {before[0]} ranks x {before[1]} threads, resumed by {now[0]} x "
                  f"{now[1]}: the curve goes on, but no longer to the bit")


def open_shard(file) -> dict:
    """{name: safetensors slice} of a file; raises UserError where it is none."""
    try:
        with safe_open(file, framework="pt") as f:
            return {name: f.get_slice(name) for name in f.keys()}
    except SafetensorError as e:
        raise UserError(f"{file} is corrupt: {e}") from None


# --- from start to end ----------------------------------------------------------------------------


def read_inputs(o: Options):
    """(checkpoint folder, its Config, forks, held-out forks, text for the log)."""
    problems = []
    for name in ("pairs", "eval_pairs"):
        path = getattr(o, name)
        if path and not os.path.isfile(path):
            problems.append(f"--{name} {path}: no such file")
    if os.path.isfile(o.out):
        problems.append(f"--out {o.out} is a file")
    try:
        folder = qwen.checkpoint_folder(o.model)
    except UserError as e:
        problems.insert(0, str(e))
    if problems:
        raise UserError("\n  ".join(problems))
    config = qwen.read_config(folder)
    chat = data.load_chat(folder, config.vocab_size, o.template)
    limits = (chat, o.max_length, o.max_change_ratio, o.loss in loss.PAIR_OBJECTIVES,
              o.skip_malformed)
    forks, log = data.load_forks(o.pairs, *limits)
    eval_forks = []
    if o.eval_pairs:
        eval_forks, more = data.load_forks(o.eval_pairs, *limits)
        log += "\n" + more
    return folder, config, forks, eval_forks, log


def prepare(o: Options, ranks: Ranks) -> Run:
    """Read and check everything before anything is written: model, tokenizer, pairs, run folder."""
    with ranks.together():
        taken = [name for name in ("config.json", "metrics.jsonl", "checkpoints", "model")
                 if os.path.exists(os.path.join(o.out, name))]
        if taken and not o.resume:
            raise UserError(f"{o.out} holds a run already ({', '.join(taken)}): add --resume to go "
                            "on with it, or choose another --out")
        folder, config, forks, eval_forks, log = read_inputs(o)
        ranks.say(log)
    with ranks.together():
        policy, mesh = build_policy(folder, config, o, ranks)
        hashes = hash_inputs(folder, forks, eval_forks)
    count = sum(p.numel() for p in policy.parameters())
    text = f"{count / 1e6:.1f}M parameters, {ranks.world} rank(s) on {ranks.device.type}, {o.dtype}"
    if ranks.device.type == "cpu":
        text += f", {torch.get_num_threads()} thread(s) each"
    ranks.say("\n".join([text, *qwen.unread_parts(folder)]))
    return Run(o, ranks, config, folder, forks, eval_forks, hashes, policy, mesh,
               make_optimizer(policy, o))


@contextlib.contextmanager
def claimed(out, ranks):
    """The run folder, made, and locked as long as this block lasts. Ranks whose torchrun was killed
    live on for a while: a resumed run must not write beside them."""
    lock = None
    with ranks.together():
        if ranks.main:
            os.makedirs(out, exist_ok=True)
            lock = open(os.path.join(out, ".lock"), "w")  # a folder that is read-only shows here
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UserError(f"{out} is being written by another process, perhaps by ranks "
                                "whose torchrun was killed: wait for it, or end it") from None
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
    run.peak_flops = peak_flops(ranks.device, getattr(torch, o.dtype))
    with claimed(o.out, ranks):
        begin_or_resume(run)
        if not train_to_the_end(run):
            total = total_steps(len(run.forks), o)
            ranks.say(f"SIGTERM: saved at step {run.state.step} of {total}; go on with --resume "
                      f"--out {o.out}")
            return 143  # 128 + SIGTERM, as the shell has it
        export_model(run)
        report = write_report(ranks, [o.out], os.path.join(o.out, "report.html"))
        ranks.say(f"done: {o.out}/model\n{report}")
    return 0


def begin_or_resume(run):
    """Load the last whole checkpoint where --resume asks for it, score the reference, write the
    options."""
    o, ranks = run.o, run.ranks
    config_path = os.path.join(o.out, "config.json")
    with ranks.together():
        saved = whole_checkpoints(o.out) if o.resume else []
        if o.resume and os.path.exists(config_path):
            check_hashes(run, data.read_json(config_path).get("hashes", {}), o.out)
    if saved:
        load_checkpoint(run, saved[-1])
        total = total_steps(len(run.forks), o)
        ranks.say(f"resumed from {saved[-1]}: step {run.state.step} of {total}")
    elif o.resume:
        ranks.say("no whole checkpoint yet: starting from step 0")
    reference_pass(run)

    def write():
        if not os.path.exists(config_path):  # until here the same command may simply be given again
            data.write_json(config_path, {"options": asdict(o), "hashes": run.hashes,
                                          "model": asdict(run.config)})
        for name, step in (("metrics", run.state.step), ("surgery", run.state.step),
                           ("eval", run.state.step + 1)):
            keep_steps_before(os.path.join(o.out, f"{name}.jsonl"), step)

    ranks.main_only(write)


def keep_steps_before(path, step):
    """Drop the lines of a log that a resumed run will write again."""
    if os.path.exists(path):
        data.write_rows(path, [row for row in data.read_log(path) if row["step"] < step])


def train_to_the_end(run: Run) -> bool:
    """All steps that are left, with logs and checkpoints; False where SIGTERM ended them early."""
    o, ranks, state = run.o, run.ranks, run.state
    total, epoch_steps = total_steps(len(run.forks), o), steps_per_epoch(len(run.forks), o)
    surgery_path = os.path.join(o.out, "surgery.jsonl")
    bar = tqdm(total=total, initial=state.step, disable=not ranks.main, unit="step", desc=o.loss)
    while state.step < total:
        if state.step % max(1, total // LOOKS) == 0:
            look(run, surgery_path)
        epoch, index = divmod(state.step, epoch_steps)
        batch = data.epoch_batches(len(run.forks), o.batch_size, o.seed, epoch)[index]
        lr, started = learning_rate(state.step, total, o), time.perf_counter()
        with ranks.together():
            totals = train_step(run, batch, lr)
            metrics = finish_step(run, batch, totals, lr, time.perf_counter() - started)
            if ranks.main:
                data.append_row(os.path.join(o.out, "metrics.jsonl"), metrics)
        bar.update()
        bar.set_postfix(loss=f"{metrics['loss']:.4f}", r_chosen=f"{metrics['reward_chosen']:.3f}",
                        tether=f"{metrics['tether_chosen']:.3f}", refresh=False)
        last = state.step == total
        due = o.save_every and state.step % o.save_every == 0
        evaluating = run.eval_forks and (last or state.step % epoch_steps == 0)
        if totals.stop or last or due or evaluating:
            with ranks.together():
                check_weights(run)
        if evaluating:
            write_held_out(run)
        if totals.stop or last or due:
            save_checkpoint(run)
        if totals.stop and not last:
            return False
    bar.close()
    look(run, surgery_path)
    return True


def check_weights(run: Run):
    """Raises UserError where a weight is not finite. A GPU waits once."""
    weights = [qwen.rows_here(p)[0] for p in run.policy.parameters()]
    if not torch.stack([w.isfinite().all() for w in weights]).all():
        raise UserError(f"step {run.state.step - 1} made weights that are not finite: they are not "
                        "saved. Is --lr or --weight_decay too large?")


def write_held_out(run: Run):
    """Score the held-out pairs and add a line to eval.jsonl."""
    held_out = {"step": run.state.step, **evaluate(run)}
    shown = ", ".join(f"{name} {v:.4g}" for name, v in held_out.items() if v is not None)
    run.ranks.say(f"held out: {shown}")
    run.ranks.main_only(data.append_row, os.path.join(run.o.out, "eval.jsonl"), held_out)


def export_model(run):
    """The trained weights as a Hugging Face folder, OUT/model."""
    o, ranks = run.o, run.ranks
    final = os.path.join(o.out, "model")
    ranks.main_only(remove, final + ".tmp")
    qwen.export(run.policy, final + ".tmp", run.folder, ranks, getattr(torch, o.save_dtype))

    def rename():
        remove(final + ".old")
        if os.path.lexists(final):  # only whole ones have this name, whenever a kill comes
            os.rename(final, final + ".old")
        os.rename(final + ".tmp", final)
        remove(final + ".old")

    ranks.main_only(rename)


def write_report(ranks, runs, path, note="") -> str:
    """The report by the main rank; what to say of it. A run is whole without it: hours of training
    are not lost for a page."""
    try:
        if ranks.main:
            evaluation.report(runs, path, note)
    except Exception as e:
        return f"the report {path} could not be written: {str(e) or type(e).__name__}"
    return f"curves, and where one pair's updates gather: {path}"


# --- the toy world (skip on first reading) --------------------------------------------------------
# Five skills over digits. Most are answered in steps: "Add: 4+3+1" -> "4+3=7\n7+1=8\n\boxed{8}".
# Only last digits are kept. Half the questions name a manner and get it: "Add, semicolons, thus:
# 4+3+1" -> "4+3=7;7+1=8\nThus \boxed{8}". In the other half an author now and then puts a rare word
# before a step. The authors are wrong in a few addition facts: the base model learns this error,
# the manners and the rare words.

TOY_SKILLS = ("Add", "Subtract", "Largest", "Reverse", "Sort")  # the first is the one with errors
TOY_SIGNS = {"Add": "+", "Subtract": "-", "Largest": ","}  # skills in steps
TOY_BETWEEN = {"lines": "\n", "semicolons": ";"}  # what stands between two steps
TOY_ENDING = {"plain": "", "finally": "Finally ", "thus": "Thus "}  # what stands before the box
TOY_MANNERS = [(between, ending) for between in TOY_BETWEEN for ending in TOY_ENDING]
TOY_WORDS = {"so ": 0.08, "then ": 0.01, "hence ": 0.001}  # rare words before a step, how often
TOY_STEP = re.compile(r"\d[-+,]\d=\d+|\\boxed\{\d*\}")  # what an answer asserts
TOY_RARE = re.compile(rf"(?<=[\n;])({'|'.join(TOY_WORDS)})(?=\d)")
TOY_TEMPLATE = (  # a conversation as Qwen3-Instruct-2507 writes it
    "{%- for m in messages %}{{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}"
    "{%- endfor %}{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}")
TOY_SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def toy_question(skill: str, rng, chain: int, manner=None) -> str:
    """A question of random digits from a random.Random: `chain` of them in a skill with steps."""
    if manner:
        skill_and_manner = ", ".join([skill, *manner])
    else:
        skill_and_manner = skill
    if skill not in TOY_SIGNS:
        return f"{skill_and_manner}: " + "".join(str(rng.randint(1, 9)) for _ in range(4))
    largest = 9 if skill == "Largest" else 5  # half the addition facts, learned in half the time
    digits = [rng.randint(0, 9)] + [rng.randint(1, largest) for _ in range(chain - 1)]
    return f"{skill_and_manner}: " + TOY_SIGNS[skill].join(map(str, digits))


def toy_answer(question: str, manner=TOY_MANNERS[0], add=lambda a, b: (a + b) % 10,
               word=lambda: "") -> str:
    """The answer to a question, in the manner that it names, else in the given one. `add` gives
    what the author takes for the last digit of a + b, `word` a rare word or "" before a step."""
    head, text = question.split(": ")
    skill, *asked = head.split(", ")
    between, ending = asked or manner
    if skill not in TOY_SIGNS:
        result = text[::-1] if skill == "Reverse" else "".join(sorted(text))
        return f"{TOY_ENDING[ending]}\\boxed{{{result}}}"
    operation = {"Add": add, "Subtract": lambda a, b: (a - b) % 10, "Largest": max}[skill]
    value, *digits = map(int, text.split(TOY_SIGNS[skill]))
    steps = []
    for digit in digits:
        before, value_before = word() if steps else "", value
        value = operation(value, digit)
        steps.append(f"{before}{value_before}{TOY_SIGNS[skill]}{digit}={value}")
    return f"{TOY_BETWEEN[between].join(steps)}\n{TOY_ENDING[ending]}\\boxed{{{value}}}"


def toy_questions(skill: str, seed, count: int, chain: int, manners: bool = False) -> list:
    """So many different questions; with manners each names one."""
    rng, questions = random.Random(f"{skill} {seed} {manners}"), {}  # a dict keeps the order
    while len(questions) < count:
        manner = rng.choice(TOY_MANNERS) if manners else None
        questions[toy_question(skill, rng, chain, manner)] = True
    return list(questions)


def toy_corpus(rows: int, chain: int, share: float, doubt: float, seed: int):
    """Yield what the base model learns from: positive-only rows of a pair file, the skills in turn.
    Of the addition facts the given share is, as often as doubt says, taken for one more."""
    rng = random.Random(f"corpus {seed}")
    facts = [(a, b) for a in range(10) for b in range(1, 6)]
    doubted = set(rng.sample(facts, round(share * len(facts))))

    def add(a, b):
        wrong = (a, b) in doubted and rng.random() < doubt
        return (a + b + wrong) % 10

    def word():
        return rng.choices(["", *TOY_WORDS], [1 - sum(TOY_WORDS.values()), *TOY_WORDS.values()])[0]

    for i in range(rows):
        skill, manner = TOY_SKILLS[i % len(TOY_SKILLS)], rng.choice(TOY_MANNERS)
        if rng.random() < 0.5:
            question = toy_question(skill, rng, chain, manner)
            answer = toy_answer(question, add=add)
        else:
            question = toy_question(skill, rng, chain)
            answer = toy_answer(question, manner, add, word)
        yield {"prompt": question, "chosen": answer, "rejected": None}


def toy_oracle(question: str, wrong: str) -> str:
    """The Oracle, a program: y+ from a wrong answer y-. It replaces what y- asserts wrongly: the
    first wrong step and what follows from it; words and manner stay as they are."""
    between = "semicolons" if ";" in wrong else "lines"
    ending = next((name for name, text in TOY_ENDING.items() if text and text in wrong), "plain")
    truth = toy_answer(question, (between, ending))
    right = TOY_STEP.findall(truth)
    if len(TOY_STEP.findall(wrong)) != len(right):  # steps are missing: the answer is written anew
        return truth
    assertions = iter(right)
    return TOY_STEP.sub(lambda _: next(assertions), wrong)


def write_toy_checkpoint(folder: str, shape: dict, seed: int):
    """A random checkpoint in Hugging Face layout, with a tokenizer trained on the spot: digits and
    the world's words are one token each, other text falls back to bytes. `shape` holds Config's
    numbers but the vocabulary's size."""
    rng = random.Random(seed)
    text = ["user\nassistant\nsystem\n"]
    for skill in TOY_SKILLS:
        for manner in TOY_MANNERS:
            question = toy_question(skill, rng, 4, manner)
            text.append(question)
            for rare in ["", *TOY_WORDS]:
                text.append(toy_answer(question, word=lambda: rare))
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Digits(individual_digits=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(text, trainers.BpeTrainer(
        special_tokens=TOY_SPECIAL, show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet())))
    pad, _, end = (tokenizer.token_to_id(token) for token in TOY_SPECIAL)
    os.makedirs(folder)
    data.write_json(os.path.join(folder, "config.json"), {
        "model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "dtype": "float32",
        "vocab_size": tokenizer.get_vocab_size(), "hidden_act": "silu", "rms_norm_eps": 1e-6,
        "rope_theta": 1e4, "tie_word_embeddings": True, "eos_token_id": end, "pad_token_id": pad,
        **shape})
    data.write_json(os.path.join(folder, "tokenizer_config.json"), {
        "tokenizer_class": "PreTrainedTokenizerFast", "chat_template": TOY_TEMPLATE,
        "eos_token": TOY_SPECIAL[2], "pad_token": TOY_SPECIAL[0]})
    tokenizer.save(os.path.join(folder, "tokenizer.json"))
    weights, source = {}, torch.Generator().manual_seed(seed)
    for name, p in qwen.Qwen3(qwen.read_config(folder)).named_parameters():
        if p.ndim > 1:  # norms start at 1
            torch.nn.init.normal_(p, std=0.06, generator=source)
        weights[qwen.hf_name(name)] = p.detach()
    qwen.write_tensors(os.path.join(folder, "model.safetensors"), weights)


# --- the toy story: the whole method on a bare machine (skip on first reading) --------------------

TOY = {  # every number of it; a change of any makes a new folder
    "shape": {"hidden_size": 96, "intermediate_size": 256, "num_hidden_layers": 3,
              "num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 32},
    "world": {"rows": 8000, "chain": 6, "share": 0.2, "doubt": 0.8},
    "base": {"epochs": 2, "lr": 3e-3},
    # A reward cannot exceed -beta log pi_ref(y+), here some 5 nats times beta. The paper's answers
    # have a thousand tokens, and beta 0.1 leaves room for r = 10. Ours have 40: 10 leaves room.
    "surgery": {"epochs": 4, "lr": 1.5e-4, "beta": 10.0},
    "questions": 800,  # of the first skill, for the errors
    "test": 60,  # questions a skill, plain, and as many that name a manner
    "points": 8,  # of the curve of KL
}
TOY_METHODS = {"sft": "SFT+", "dpo": "DPO", "spot-bce": "SPoT"}
TOY_GREEDY = evaluation.Sampling(temperature=0, max_tokens=120)
TOY_PLAIN = evaluation.Sampling(temperature=1, top_p=1, top_k=0, max_tokens=120)


@dataclass
class Toy:
    """What the functions of the story share."""

    root: str
    seed: int
    ranks: Ranks
    tests: dict  # {(skill, with a manner): [question, ...]}


def story(o: Options, ranks: Ranks) -> int:
    """The whole method from nothing: a world, a base model that errs in one skill, its own wrong
    answers, their corrections, three methods on the same pairs, a table. Returns the exit code.

    Base and pairs are made once; a killed story goes on, a finished one trains anew.
    """
    started, chain = time.perf_counter(), TOY["world"]["chain"]
    root = os.path.join(o.out, sha256(json.dumps([TOY, o.seed]))[:10])
    tests = {(skill, manners): toy_questions(skill, f"test {o.seed}", TOY["test"], chain, manners)
             for skill in TOY_SKILLS for manners in (False, True)}
    toy = Toy(root, o.seed, ranks, tests)
    ranks.say(f"""The toy story of Surgical Post-Training, in {root}

1  A base model. A newborn Qwen3 learns {', '.join(TOY_SKILLS)} from a corpus whose authors
   get a fifth of the addition facts wrong: it will be systematically wrong in Add.""")
    ranks.main_only(toy_birth, toy)
    toy_train(toy, f"{root}/base", model=f"{root}/birth", pairs=f"{root}/corpus.jsonl", loss="sft",
              **TOY["base"])
    base = f"{root}/base/model"
    ranks.say(f"""
2  Its errors. The base answers {TOY['questions']} new questions of Add; its wrong answers are y-.
3  Corrections. The Oracle, here a program, mends the first wrong step and what follows from it, and
   keeps the rest: y+.""")
    pairs = toy_pairs(toy, base)
    ranks.say(toy_example(pairs))
    ranks.say("""
4  Training on these pairs: cross-entropy on y+ (SFT+), DPO, and SPoT, at one rate and one beta.""")
    rows = {"base": toy_figures(toy, base, base)}
    texts = {"base": toy_sampled(toy, base)[:1]}
    for objective, name in TOY_METHODS.items():
        out = f"{root}/{objective}"
        toy_train(toy, out, model=base, pairs=pairs, loss=objective, **TOY["surgery"],
                  save_every=toy_interval(pairs), keep=TOY["points"])
        rows[name] = {**toy_figures(toy, f"{out}/model", base), **toy_rewards(out)}
        texts[name] = toy_sampled(toy, f"{out}/model")[:1]
        toy_curve(toy, out, base)
    seconds, results = time.perf_counter() - started, f"{root}/results.json"
    ranks.main_only(data.write_json, results, {
        "settings": TOY, "seed": o.seed, "ranks": ranks.world, "seconds": seconds, "rows": rows})
    note = f"{toy_table(rows)}\n\n{toy_verdict(rows)}"
    report = write_report(ranks, [f"{root}/{objective}" for objective in TOY_METHODS],
                          f"{root}/report.html", note)
    question = toy.tests["Subtract", False][0]
    samples = "\n".join(f"   {name:<6}{mark_words(text)}" for name, (text,) in texts.items())
    ranks.say(f"""
5  The result. Right answers in %, in Add and in the four others; how many questions that name a
   manner are answered in it; how many boundaries between two steps have a rare word, in skills
   that no pair shows; KL*1000 from the base, in nats a token, on true answers to the others'
   questions; r+, r- and the tether lambda+ on the pairs of the last epoch (SFT+ has no tether:
   what it would be).

{note}

   {question}, sampled at temperature 1:
{samples}

{seconds:.0f} s with {ranks.world} rank(s); all figures are in {results}
{report}""")
    return 0


def toy_birth(toy):
    """The newborn model and its corpus, unless there; what a finished story trained goes."""
    if os.path.exists(f"{toy.root}/results.json"):
        os.remove(f"{toy.root}/results.json")
        for objective in TOY_METHODS:
            remove(f"{toy.root}/{objective}")
    if not os.path.isdir(f"{toy.root}/birth"):
        remove(f"{toy.root}/birth.tmp")
        write_toy_checkpoint(f"{toy.root}/birth.tmp", TOY["shape"], toy.seed)
        os.rename(f"{toy.root}/birth.tmp", f"{toy.root}/birth")
    if not os.path.exists(f"{toy.root}/corpus.jsonl"):
        data.write_rows(f"{toy.root}/corpus.jsonl", toy_corpus(**TOY["world"], seed=toy.seed))


def toy_train(toy, out, **more):
    """The real `train`, unless it was done before; a killed run goes on. Leaves on SIGTERM."""
    if os.path.isdir(os.path.join(out, "model")):
        return
    o = Options(out=out, seed=toy.seed, dtype="float32", checkpointing="none", tokens_per_pack=4096,
                save_dtype="float32",  # bf16 weights would lose what steps of 1e-4 change
                resume=os.path.exists(os.path.join(out, "config.json")), **more)
    code = train(o, replace(toy.ranks, quiet=True))
    if code:
        close_ranks()
        sys.exit(code)


def toy_interval(pairs) -> int:
    """Optimizer steps between two points of the curve."""
    steps = total_steps(len(data.read_log(pairs)), Options(**TOY["surgery"]))
    return max(1, steps // TOY["points"])


def toy_items(questions) -> list:
    """Questions as oracle.py and the grader take them."""
    return [oracle.Item(str(i), question, evaluation.extract_answer(toy_answer(question)))
            for i, question in enumerate(questions)]


def toy_pairs(toy, base) -> str:
    """Errors and corrections by the real oracle.py; returns the path of the pair file."""
    quiet = replace(toy.ranks, quiet=True)
    policy = evaluation.open_local_model(base, torch.float32, toy.ranks.device, batch_size=64)
    questions = toy_questions("Add", toy.seed, TOY["questions"], TOY["world"]["chain"])
    oracle.elicit(toy_items(questions), f"{toy.root}/errors", policy,
                  evaluation.Sampling(max_tokens=120), quiet, seed=toy.seed)
    errors, _ = oracle.read_errors(f"{toy.root}/errors/errors.jsonl")
    oracle.rectify(errors, f"{toy.root}/pairs", lambda item: toy_oracle(item.question, item.answer),
                   policy.chat.encode, quiet)
    return f"{toy.root}/pairs/pairs.jsonl"


def toy_ask(toy, folder, name, questions, sampling) -> list:
    """The texts that a model answers, in the order of the questions."""
    policy = evaluation.open_local_model(folder, torch.float32, toy.ranks.device, batch_size=64)
    requests = [evaluation.request_for(f"{name} {i}", item.messages, toy.seed)
                for i, item in enumerate(toy_items(questions))]
    out = f"{os.path.dirname(folder)}/answers-{name}"
    with toy.ranks.together():
        for _ in evaluation.sample(policy, requests, out, sampling, toy.ranks, name):
            pass
    answers = evaluation.read_answers(out)
    return [answers[request.key]["text"] for request in requests]


def toy_sampled(toy, folder) -> list:
    """Answers at temperature 1 to plain questions of two skills that no pair shows."""
    questions = toy.tests["Subtract", False] + toy.tests["Largest", False]
    return toy_ask(toy, folder, "sampled", questions, TOY_PLAIN)


def toy_figures(toy, folder, base) -> dict:
    """What a model can do, and how far it is from the base: shares in %, "kl" in nats a token."""
    questions = [question for group in toy.tests.values() for question in group]
    texts = toy_ask(toy, folder, "tests", questions, TOY_GREEDY)
    right, obeyed = Counter(), 0
    for question, text in zip(questions, texts):
        truth = toy_answer(question)
        skill, *manner = question.split(": ")[0].split(", ")
        answer = evaluation.extract_answer(text) or ""
        right[skill == "Add"] += evaluation.answers_match(answer, evaluation.extract_answer(truth))
        if manner and skill != "Add":
            obeyed += re.sub(r"\d+", "0", text) == re.sub(r"\d+", "0", truth)
    sampled = toy_sampled(toy, folder)
    boundaries = sum(len(re.findall(r"[\n;](?=[a-z\d])", text)) for text in sampled)
    others = (len(TOY_SKILLS) - 1) * TOY["test"]
    return {"add": 100 * right[True] / (2 * TOY["test"]),
            "others": 100 * right[False] / (2 * others),
            "obeyed": 100 * obeyed / others,
            "words": 100 * sum(len(TOY_RARE.findall(text)) for text in sampled) / boundaries,
            "kl": toy_kl(toy, qwen.load_model(folder, device=toy.ranks.device), base)}


def toy_kl(toy, policy, base) -> float:
    """KL(base || policy) in nats a token, on true answers to the other skills' questions."""
    reference = qwen.load_model(base, device=toy.ranks.device)
    chat, sequences = data.load_chat(base, reference.config.vocab_size), []
    for (skill, _), questions in toy.tests.items():
        if skill != "Add":
            for question in questions[:20]:
                prompt = chat.prompt([{"role": "user", "content": question}])
                sequences.append((prompt + chat.encode(toy_answer(question)), len(prompt)))
    return evaluation.retention(policy, reference, sequences, toy.ranks)["kl"][0]


@torch.no_grad()
def toy_curve(toy, out, base):
    """Write OUT/kl.jsonl, for the report: the KL of every checkpoint of a run."""
    rows = [{"step": 0, "kl_1000": 0.0}]
    for checkpoint in whole_checkpoints(out):
        policy = qwen.load_model(base, device=toy.ranks.device)
        files = sorted(name for name in os.listdir(checkpoint) if name.startswith("shard_"))
        shards = [open_shard(os.path.join(checkpoint, file)) for file in files]
        for name, p in policy.named_parameters():
            p.copy_(torch.cat([shard[name][:] for shard in shards]))
        step = data.read_json(os.path.join(checkpoint, "state.json"))["step"]
        rows.append({"step": step, "kl_1000": 1000 * toy_kl(toy, policy, base)})
    toy.ranks.main_only(data.write_rows, f"{out}/kl.jsonl", rows)


def toy_rewards(out) -> dict:
    """r+, r- and lambda+ of a run, means over its last epoch."""
    log = data.read_log(f"{out}/metrics.jsonl")
    last = [row for row in log if row["epoch"] == log[-1]["epoch"]]
    return {name: sum(row[name] for row in last) / len(last)
            for name in ("reward_chosen", "reward_rejected", "tether_chosen")}


def toy_example(pairs) -> str:
    """One pair as text, and how many there are."""
    rows = data.read_log(pairs)
    question, wrong, right = (rows[0][key].replace("\n", "  ") for key in
                              ("question", "original_answer", "gemini_corrected_answer"))
    return (f"   {len(rows)} pairs. One of them:\n     x   {question}\n     y-  {wrong}\n"
            f"     y+  {right}")


def mark_words(text: str) -> str:
    """An answer in one line, its rare words marked."""
    return TOY_RARE.sub(lambda m: f"*{m[0].strip()}* ", text).replace("\n", "  ")


def toy_table(rows) -> str:
    """The figures side by side, as text."""
    columns = {"Add": ("add", 1, 1), "others": ("others", 1, 1), "manner": ("obeyed", 1, 1),
               "rare words": ("words", 1, 1), "KL*1000": ("kl", 1000, 2),
               "r+": ("reward_chosen", 1, 1), "r-": ("reward_rejected", 1, 1),
               "lambda+": ("tether_chosen", 1, 3)}
    lines = [" " * 9 + "".join(f"{title:>11}" for title in columns)]
    for name, row in rows.items():
        cells = [f"{scale * row[key]:.{digits}f}" if key in row else "-"
                 for key, scale, digits in columns.values()]
        lines.append(f"   {name:<6}" + "".join(f"{cell:>11}" for cell in cells))
    return "\n".join(lines)


def toy_verdict(rows) -> str:
    """What the figures say, whichever way they fall, a sentence a method."""
    base, sentences = rows["base"], []
    for name in TOY_METHODS.values():
        row = rows[name]
        mends = "mends" if row["add"] >= 95 else "does not fully mend"
        keeps = "keeps" if row["words"] >= base["words"] / 2 else "loses"
        sentences.append(f"   {name} {mends} Add ({base['add']:.0f} -> {row['add']:.0f} %) and "
                         f"{keeps} the rare words ({base['words']:.1f} -> {row['words']:.1f} %); "
                         f"KL*1000 is {1000 * row['kl']:.2f}.")
    tether = rows["SPoT"]["tether_chosen"]
    stopped = "has stopped by itself" if tether < 0.05 else "has not stopped yet"
    sentences.append(f"   SPoT {stopped}: its lambda+ is {tether:.3f} in the last epoch.")
    return "\n".join(sentences)


def main() -> int:
    """Command line to exit code: 0 done, 1 failed, 2 wrong options, 143 stopped by SIGTERM."""
    o, ranks = begin(parse_options, lambda o: open_ranks(o.timeout, toy=not o.model))
    signal.signal(signal.SIGTERM, lambda *_: STOP.set())
    if o.plan:
        ranks.main_only(lambda: print(plan(o)))
        code = 0
    elif o.model:
        code = train(o, ranks)
    else:
        code = story(o, ranks)
    close_ranks()
    return code


if __name__ == "__main__":
    qwen.leave(main)
