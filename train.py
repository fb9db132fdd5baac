"""The training loop of Surgical Post-Training, from one CPU core to nodes of GPUs.

Comes in:  --model, a Qwen3 checkpoint folder, and --pairs, a JSONL file of surgical pairs.
Goes out:  a run folder: config.json, metrics.jsonl, eval.jsonl with --eval_pairs,
           reference.safetensors, checkpoints/, report.html with surgery.jsonl behind it, and
           model/, the trained checkpoint in Hugging Face layout.

    torchrun --nproc_per_node=8 train.py --model Qwen3-8B --pairs pairs.jsonl --out runs/first
    torchrun --nproc_per_node=8 train.py --resume --out runs/first
    torchrun --nproc_per_node=2 train.py         # nothing given: the toy story, in minutes

SIGTERM saves at the next step (exit code 143); --resume goes on, on any number of ranks, and also
begins a run. On several nodes start this on each, and again on one that died; all must see --out:
    TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 torchrun --nnodes=2 --nproc_per_node=8 --max_restarts=3 \\
        --rdzv_backend=c10d --rdzv_id=spot --rdzv_endpoint=HOST:29500 train.py ... --shard_size 8 \\
        --resume
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
from dataclasses import asdict, dataclass, field, replace

import torch
from safetensors import safe_open
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

import data
import eval as evaluation
import loss
import model as qwen
import oracle
from data import UserError
from model import Ranks, add_options, close_ranks, open_ranks, option, start_program

# --- options --------------------------------------------------------------------------------------

DTYPES = ("float32", "bfloat16")


@dataclass
class Options:
    """Everything that can be chosen. Defaults are the paper's (Qwen3-8B), but for the loss."""

    model: str = option("", "checkpoint folder in Hugging Face layout (required)")
    pairs: str = option("", "pair file, .jsonl or .jsonl.gz (required)")
    out: str = option("", "run folder to write (required)")
    eval_pairs: str = option("", "held-out pair file, scored after each epoch")
    loss: str = option("spot-bce", "objective", loss.OBJECTIVES)
    beta: float = option(0.1, "reward scale, r = beta log(pi / pi_ref). r+ cannot exceed -beta log "
                         "pi_ref(y+): from 20 on the tether holds. Raise it if lambda+ stays high")
    delta: str = option("ema", "mean of spot-bco: moving (0.9) or of all", ("ema", "cumulative"))
    lr: float = option(1e-6, "peak learning rate (SFT in the paper: 5e-6). Too high where r- falls "
                       "much faster than r+ rises")
    epochs: int = option(2, "passes over the pairs. With lambda+ near 0 more of them change little")
    max_steps: int = option(0, "optimizer steps at most, schedule included; 0: all of the epochs'")
    batch_size: int = option(32, "pairs per optimizer step, over all ranks")
    warmup: float = option(0.05, "share of the steps with rising rate; a cosine to 0 follows")
    weight_decay: float = option(0.01, "AdamW's, on all weights but norms")
    clip: float = option(1.0, "largest norm of the gradient")
    max_length: int = option(8192, "tokens of prompt + one answer; longer pairs are dropped")
    max_change_ratio: float = option(0.6, "drop pairs with 1 - LCS(y-, y+)/|y+| above this (gamma)")
    skip_malformed: bool = option(False, "drop and count malformed rows instead of stopping")
    template: str = option("", "chat template, whatever the file says", ("", "hybrid", "instruct"))
    seed: int = option(0, "order of the pairs")
    dtype: str = option("bfloat16", "of the computation; all sums are float32", DTYPES)
    checkpointing: str = option("full", "recompute blocks in backward, or not", ("none", "full"))
    tokens_per_pack: int = option(16384, "tokens of a micro-batch; memory grows, results do not")
    shard_size: int = option(0, "ranks that share one copy of the model; 0: all")
    save_dtype: str = option("bfloat16", "of the trained checkpoint in OUT/model", DTYPES)
    save_every: int = option(50, "steps between checkpoints; 0: only the last, and on SIGTERM")
    keep: int = option(1, "checkpoints to keep")
    timeout: int = option(1800, "seconds after which a stalled rank ends the run")
    resume: bool = option(False, "go on with the run in OUT from its last checkpoint")
    plan: bool = option(False, "train nothing: say what memory and time the run takes on GPUs")
    gpus: int = option(8, "with --plan: how many GPUs")


# What may differ on --resume: none of it changes the curve beyond rounding.
FREE = ("model", "pairs", "eval_pairs", "out", "tokens_per_pack", "checkpointing", "shard_size",
        "save_every", "save_dtype", "keep", "timeout", "resume", "plan", "gpus")


def parse_options(argv=None) -> Options:
    """Command line to Options; with --resume, what is not given comes from OUT/config.json. Where
    nothing but --out and --seed is given, `model` stays "": the toy story. Raises UserError."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser, Options)
    given, kept, problems = vars(parser.parse_args(argv)), {}, []
    config_path = f"{given.get('out', '')}/config.json"
    if given.get("resume") and os.path.exists(config_path):
        kept = data.read_json(config_path).get("options", {})
    for name, value in given.items():
        if name not in FREE and kept.get(name, value) != value:
            problems.append(f"--{name} is {value!r}, the run in {given['out']} has {kept[name]!r}")
    o = Options(**{**kept, **given})
    if given.keys() <= {"out", "seed"}:
        o.out = o.out or "runs/toy"
    else:
        required = ["model", "pairs"] if o.plan else ["model", "pairs", "out"]
        problems += [f"--{name} is required" for name in required if not getattr(o, name)]
    for name in ("beta", "lr", "epochs", "batch_size", "clip", "keep", "gpus"):
        if not getattr(o, name) > 0:
            problems.append(f"--{name} is {getattr(o, name)}, a number above 0 expected")
    for name in ("max_steps", "save_every", "shard_size", "seed"):
        if getattr(o, name) < 0:
            problems.append(f"--{name} is {getattr(o, name)}, 0 or more expected")
    if not 0 <= o.warmup <= 1:
        problems.append(f"--warmup is {o.warmup}, a share between 0 and 1 expected")
    if o.delta != "ema" and o.loss != "spot-bco":
        problems.append(f"--delta {o.delta} goes with --loss spot-bco, found --loss {o.loss}")
    if problems:
        raise UserError("these options do not work:" + data.listed(problems))
    return o


# --- the sharded policy and its optimizer ---------------------------------------------------------

def build_policy(folder, config, o: Options, ranks: Ranks):
    """The policy with fp32 weights, sharded: made on the meta device, wrapped block by block and
    as a whole, given memory, filled; each rank reads its own rows."""
    with torch.device("meta"):
        policy = qwen.Qwen3(config, checkpointing=o.checkpointing == "full")
    shape, names = (ranks.world,), ("shard",)
    if o.shard_size and o.shard_size != ranks.world:
        if ranks.world % o.shard_size:
            raise UserError(f"--shard_size {o.shard_size} does not divide the {ranks.world} ranks")
        shape, names = (ranks.world // o.shard_size, o.shard_size), ("replicate", "shard")
    mesh = init_device_mesh(ranks.device.type, shape, mesh_dim_names=names)
    precision = MixedPrecisionPolicy(getattr(torch, o.dtype), reduce_dtype=torch.float32)
    units = list(policy.layers)
    if not config.tie_word_embeddings:  # units of their own, else one buffer holds both big tables
        units += [policy.embed_tokens, policy.lm_head]
    for unit in units:
        fully_shard(unit, mesh=mesh, mp_policy=precision)
    fully_shard(policy, mesh=mesh, mp_policy=precision, reshard_after_forward=False)
    if ranks.world > 1:  # gradients are summed: we divide by our own global counts
        for unit in [*units, policy]:
            unit.set_gradient_divide_factor(1.0)
            unit.set_force_sum_reduction_for_comms(True)  # without it gloo dies on the factor
    qwen.load_weights(policy, folder, ranks.device)
    return policy


def make_optimizer(policy, o: Options):
    """AdamW as in the paper (betas 0.9, 0.95), no decay on norms (the only 1-D weights)."""
    groups = [{"params": [p for p in policy.parameters() if p.ndim > 1]},
              {"params": [p for p in policy.parameters() if p.ndim == 1], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=o.weight_decay,
                                  fused=True)
    for p in policy.parameters():  # made before the first step, so that resume can load into it
        optimizer.state[p] = {"step": torch.zeros((), device=p.device),
                              "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
    return optimizer


def learning_rate(step: int, total: int, o: Options) -> float:
    """(k+1)/W of the peak in warm-up step k of W (HF: k/W, which wastes one), then a cosine."""
    warm = math.ceil(o.warmup * total)
    if step < warm:
        return o.lr * (step + 1) / warm
    return o.lr * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, total - warm)))


# --- a plan without a run -------------------------------------------------------------------------

def plan_memory(policy, o: Options, tokens: int) -> dict:
    """Peak bytes of a GPU in a step, by part; `tokens` of the largest pack. Within 2.2 % of torch's
    tracker (LOG.md); fragments, CUDA, NCCL come on top."""
    c, size = policy.config, getattr(torch, o.dtype).itemsize
    weights, block = (sum(p.numel() for p in m.parameters()) for m in (policy, policy.layers[0]))
    query, key = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
    # Values that autograd keeps of a token in a block: two norms' input, normed, times the weight;
    # q, k projected, normed, rotated; k, v beside each branch, with its trunk; v; what attention
    # gives, in two layouts; gate, up, silu(gate), product.
    kept = 6 * c.hidden_size + 3 * (query + key) + 5 * key + 2 * query + 4 * c.intermediate_size
    recomputed = 0
    if o.checkpointing == "full":
        kept, recomputed = c.hidden_size, kept
    # Two blocks are gathered, a third is on its way. A tied table waits with its gradient; that of
    # an untied head is summed in fp32.
    table = c.vocab_size * c.hidden_size * (2 * size if c.tie_word_embeddings else 4)
    return {
        "weights, gradients, Adam's moments, fp32": 16 * weights // (o.shard_size or o.gpus),
        "gathered weights, the head's gradient": 3 * block * size + table,
        "activations kept for backward": tokens * c.num_hidden_layers * kept * size,
        "one block in backward": tokens * (2 * c.intermediate_size + recomputed) * size}


def plan(o: Options) -> str:
    """What the run takes on --gpus H100s, held-out pairs left out: memory by part, minutes."""
    shards, size = o.shard_size or o.gpus, getattr(torch, o.dtype).itemsize
    if o.gpus % shards:
        raise UserError(f"--shard_size {o.shard_size} does not divide --gpus {o.gpus}")
    config, forks, _, log = read_inputs(o)
    with torch.device("meta"):
        policy = qwen.Qwen3(config)
    weights = sum(p.numel() for p in policy.parameters())
    lengths, packs = [len(fork) for fork in forks], []  # of all ranks in one epoch
    for batch in data.epoch_batches(len(forks), o.batch_size, o.seed, 0):
        packs += data.split_batch(batch, lengths, o.gpus, o.tokens_per_pack)
    largest = max(sum(lengths[i] for i in indices) for ranks in packs for indices in ranks)
    steps = total_steps(len(forks), o)
    epochs = steps / epoch_steps(len(forks), o)
    # Each weight is multiplied once forward, twice backward, once for the reference; at 40 % of an
    # H100's 989 TFLOP/s. It is gathered twice a pack, its fp32 gradient summed, and gathered for
    # the reference; at 300 GB/s a GPU.
    products = weights * sum(lengths) * (6 * epochs + 2) / (o.gpus * 0.4 * 989e12) / 60
    moved = weights * len(packs) * (epochs * (2 * size + 4) + size) * (1 - 1 / shards)
    parts = plan_memory(policy, o, largest)
    parts["in all"] = sum(parts.values())
    return "\n".join([
        log, f"Each of {o.gpus} GPUs, packs of at most {largest} tokens:",
        *(f"  {value / 1e9:8.2f} GB  {name}" for name, value in parts.items()),
        f"{steps} steps: on H100s about {products:.2g} minutes of products and "
        f"{moved / 300e9 / 60:.2g} of communication, which overlap"])


# --- the run and its step -------------------------------------------------------------------------

STOP = threading.Event()  # set by SIGTERM; a step's all-reduce makes all ranks stop together


@dataclass
class ForkSet:
    """Pairs laid out as forks, and the batches of their indices that are scored before training."""

    forks: list
    batches: list
    reference: torch.Tensor = None  # (N, 2) fp64, sequence_logps before training


@dataclass
class Run:
    """What the functions below share."""

    o: Options
    ranks: Ranks
    policy: torch.nn.Module
    optimizer: torch.optim.Optimizer
    batches: list  # indices of pairs, a batch an optimizer step
    train_set: ForkSet
    held_out: ForkSet  # perhaps of no pair
    watched: ForkSet  # of one pair: the report shows how its tokens' coefficients move
    step: int = 0  # how many are done
    delta: float = 0.0  # the running mean of spot-bco
    rejected_nats: float = math.inf  # median of -log pi_ref(y-), set by describe_reference
    warned: set = field(default_factory=set)  # by watch_tether

    def packs(self, fork_set: ForkSet, batch):
        """This rank's micro-batches of one global batch, on the device."""
        forks, world = fork_set.forks, self.ranks.world
        lengths = [len(fork) for fork in forks]
        for micro_batch in data.split_batch(batch, lengths, world, self.o.tokens_per_pack):
            pack = data.make_pack(forks, micro_batch[self.ranks.rank], fork_set.reference)
            yield pack.to(self.ranks.device)

    def score(self, pack):
        """Row log-probs (R,) of a pack, graph attached."""
        return self.policy(pack.tokens, pack.positions, pack.forks, pack.rows, pack.targets)

    def coefficients(self, pack, row_logps):
        """loss.row_coefficients of a pack: coefficients (R,), sums by loss.SUMS."""
        return loss.row_coefficients(self.o.loss, row_logps, pack.lengths, pack.reference,
                                     self.o.beta, self.delta)


def make_run(o: Options, ranks: Ranks, policy, forks, eval_forks) -> Run:
    """A run before its first step. The pair to watch is of median length among those that are
    trained (--max_steps may leave some out), with y- if any has it."""
    batches = []
    for epoch in range(o.epochs):
        batches += data.epoch_batches(len(forks), o.batch_size, o.seed, epoch)
    batches = batches[:total_steps(len(forks), o)]
    # The reference is scored in the batches of epoch 0: with the same packs step 0 is exact.
    first_epoch = batches[:epoch_steps(len(forks), o)]
    trained = [forks[i] for batch in first_epoch for i in batch]
    trained = [fork for fork in trained if len(fork.rejected)] or trained
    watched = sorted(trained, key=lambda fork: (len(fork), fork.line))[len(trained) // 2]
    count, size = len(eval_forks), o.batch_size
    held_out = [range(i, min(i + size, count)) for i in range(0, count, size)]
    return Run(o, ranks, policy, make_optimizer(policy, o), batches, ForkSet(forks, first_epoch),
               ForkSet(eval_forks, held_out), ForkSet([watched], [[0]]))


def epoch_steps(pairs: int, o: Options) -> int:
    """Optimizer steps of one epoch; the last, smaller batch is a step too."""
    return math.ceil(pairs / o.batch_size)


def total_steps(pairs: int, o: Options) -> int:
    """Optimizer steps of the whole run."""
    steps = epoch_steps(pairs, o) * o.epochs
    return min(steps, o.max_steps or steps)


def train_step(run: Run, batch, lr: float) -> dict:
    """One optimizer step on one global batch of pair indices. Returns the sums over all ranks that
    loss.SUMS names, "stop" (above 0: a rank was sent SIGTERM), "grad_norm" before clipping."""
    o, count, forks = run.o, len(batch), [run.train_set.forks[i] for i in batch]
    if o.loss in loss.TOKEN_OBJECTIVES:  # a global number that every rank knows: no communication
        count = sum(len(f.trunk) - f.prompt_length + len(f.chosen) for f in forks)
    sums = torch.zeros(len(loss.SUMS), dtype=torch.float64, device=run.ranks.device)
    for pack in run.packs(run.train_set, batch):
        row_logps = run.score(pack)
        coefficients, pack_sums = run.coefficients(pack, row_logps)
        row_logps.backward(coefficients / count)
        sums += pack_sums
    grad_norm = torch.nn.utils.clip_grad_norm_(run.policy.parameters(), o.clip).full_tensor()
    # Our only communication in a step, and its only wait for the GPU: the norm comes along.
    stop = sums.new_full((1,), float(STOP.is_set()))
    everything = run.ranks.reduce(torch.cat([sums, stop, grad_norm.double().view(1)])).tolist()
    totals = dict(zip((*loss.SUMS, "stop", "grad_norm"), everything))
    totals["grad_norm"] /= run.ranks.world  # each rank had the same fp32 number: exact in fp64
    check_step(run, forks, totals)
    for group in run.optimizer.param_groups:
        group["lr"] = lr
    run.optimizer.step()
    run.optimizer.zero_grad()
    return totals


def check_step(run, forks, totals: dict):
    """Raises UserError, on all ranks alike and before the weights are touched, where a number is
    not finite, and at step 0, where the policy is its own reference, a reward is not exactly 0."""
    mean = loss.average([totals[name] for name in loss.SUMS], run.o.loss)["loss"]
    norm = totals["grad_norm"]
    if not math.isfinite(mean + norm):
        lines = ", ".join(str(fork.line) for fork in forks)
        raise UserError(f"step {run.step}: loss {mean}, gradient norm {norm}: not finite, "
                        f"weights left as they were. Its pairs: lines {lines} of {run.o.pairs}")
    if run.step == 0:
        run.ranks.say(f"step 0: sum of |reward| {totals['abs_reward']}, loss {mean:.9f}")
        if totals["abs_reward"] != 0:
            raise UserError("step 0 must give rewards of exactly 0: the forward pass is not "
                            "deterministic here. If it returns, try --dtype float32")


def finish_step(run, batch, totals: dict, lr: float, seconds: float) -> dict:
    """Move the run one step on; returns the step's line of metrics.jsonl. Means (loss.average),
    delta and grad_norm are from before the update, tokens those of all ranks, memory_gb is the main
    rank's peak so far: of its GPU, or resident."""
    o, forks = run.o, run.train_set.forks
    tokens = sum(len(forks[i]) for i in batch)
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    if run.ranks.device.type == "cuda":
        memory = torch.cuda.max_memory_allocated()
    metrics = {"step": run.step, "epoch": run.step // epoch_steps(len(forks), o),
               **loss.average([totals[name] for name in loss.SUMS], o.loss), "delta": run.delta,
               "grad_norm": totals["grad_norm"], "lr": lr, "tokens": tokens,
               "tokens_per_s": tokens / seconds, "memory_gb": memory / 1e9}
    if o.loss == "spot-bco":
        mean = (metrics["reward_chosen"] + metrics["reward_rejected"]) / 2
        seen = sum(len(earlier) for earlier in run.batches[:run.step])
        run.delta = loss.update_delta(run.delta, mean, len(batch), seen, o.delta)
    run.step += 1
    return metrics


# --- scores without gradients: the reference, held-out pairs, the watched pair --------------------

@torch.no_grad()
def score_all(run: Run, fork_set: ForkSet, title) -> torch.Tensor:
    """(N, 2) fp64 sequence log-probs of all pairs under the present policy, on every rank's CPU."""
    scores = torch.zeros(len(fork_set.forks), 2, dtype=torch.float64, device=run.ranks.device)
    bar = run.ranks.progress(len(fork_set.batches), title, "batch")
    for batch in fork_set.batches:
        for pack in run.packs(fork_set, batch):
            scores[pack.pairs] = loss.sequence_logps(run.score(pack), pack.lengths)
        bar.update()
    bar.close()
    run.policy.reshard()  # a forward without backward leaves the root's weights gathered
    return run.ranks.reduce(scores)  # each pair was scored by one rank, the others add zeros


def hash_forks(forks) -> str:
    """Of encoded pairs: tokenizer, template and filters are in it too."""
    ids = [(f.prompt_length, f.trunk.tolist(), f.rejected.tolist(), f.chosen.tolist())
           for f in forks]
    return hashlib.sha256(str(ids).encode()).hexdigest()


def reference_pass(run: Run):
    """Score all pairs before step 0; a resumed run takes the scores that it began with. The same
    code, packs and dtype as in training make step-0 rewards exactly 0. In bf16 a log-prob depends
    on its pack: snapshots score the watched pair alone, so its reference is scored alone too."""
    path = f"{run.o.out}/reference.safetensors"
    sets = {"pairs": run.train_set, "eval_pairs": run.held_out, "watched": run.watched}
    digests = {name: hash_forks(fork_set.forks) for name, fork_set in sets.items()}
    if run.step == 0:
        for name, fork_set in sets.items():
            fork_set.reference = score_all(run, fork_set, f"reference, {name}")
        scores = {name: fork_set.reference for name, fork_set in sets.items()}
        run.ranks.main_only(lambda: qwen.write_tensors(path, scores, **digests))
        return
    with run.ranks.together(), safe_open(path, framework="pt") as f:
        for name, fork_set in sets.items():
            if f.metadata()[name] != digests[name]:
                raise UserError(f"{path} belongs to other {name} than given now, or to another "
                                "tokenizer or template")
            fork_set.reference = f.get_tensor(name)


@torch.no_grad()
def score_held_out(run: Run) -> dict:
    """The diagnostics of the held-out pairs under the policy as it is, delta frozen."""
    sums = torch.zeros(len(loss.SUMS), dtype=torch.float64, device=run.ranks.device)
    for batch in run.held_out.batches:
        for pack in run.packs(run.held_out, batch):
            sums += run.coefficients(pack, run.score(pack))[1]
    run.policy.reshard()
    return loss.average(run.ranks.reduce(sums).tolist(), run.o.loss)


@torch.no_grad()
def snapshot(run: Run):
    """Add a line to surgery.jsonl: the watched pair's coefficients (of the summed loss) and
    log-probs now, one a token after the prompt: trunk, rejected, chosen."""
    (pack,) = run.packs(run.watched, [0])
    row_logps = run.score(pack)  # the main rank's; the others forward a dummy
    run.policy.reshard()
    coefficients, sums = run.coefficients(pack, row_logps)
    sums = dict(zip(loss.SUMS, sums.tolist()))
    run.ranks.main_only(data.append_row, f"{run.o.out}/surgery.jsonl", {
        "step": run.step, "delta": run.delta, "reward_chosen": sums["reward_chosen"],
        "reward_rejected": sums["reward_rejected"], "coefficients": coefficients.tolist(),
        "logps": row_logps.tolist()})


def describe_watched(run: Run) -> dict:
    """The first line of surgery.jsonl: the watched pair as token texts. Its step is -1, so that no
    resume drops it."""
    (fork,), row = run.watched.forks, {"step": -1}
    chat = data.load_chat(run.o.model, run.policy.config.vocab_size, run.o.template)
    prompt, trunk = fork.trunk[:fork.prompt_length], fork.trunk[fork.prompt_length:]
    for name, ids in (("prompt", prompt), ("trunk", trunk), ("rejected", fork.rejected),
                      ("chosen", fork.chosen)):
        row[name] = [chat.tokenizer.decode([i], skip_special_tokens=False) for i in ids]
    return {**row, "line": fork.line, "reference": run.watched.reference[0].tolist(),
            "rejected_ids": fork.rejected.tolist(), "chosen_ids": fork.chosen.tolist()}


# --- what the log warns of (figures: tests/bench/STUDY.md) ----------------------------------------

TETHERED = ("spot-bce", "spot-bco", "reward-sft")
LEARNED = 0.05  # lambda+ below which a pair is learned: r+ is 3 or more
LEAST_BOUND = 20.0  # a bound on r+ of 13 did not keep the model near its base, one of 43 did


def describe_reference(run: Run) -> str:
    """What is known before step 1: nats of the answers, hence the bound on r+; which y+ the policy
    finds least probable beside its own y-; what is likely to go wrong. Sets run.rejected_nats."""
    o, forks, reference = run.o, run.train_set.forks, run.train_set.reference
    trained = [i for batch in run.train_set.batches for i in batch.tolist()]
    pairs = [i for i in trained if len(forks[i].rejected)]
    chosen, rejected = -reference[trained, 0], -reference[pairs, 1]
    lines = [f"-log pi_ref({name}): median {nats.median():.1f}, 90th percentile "
             f"{nats.quantile(0.9):.1f} nats"
             for name, nats in (("y+", chosen), ("y-", rejected)) if len(nats)]
    median, bound = chosen.median().item(), o.beta * chosen.median().item()
    lines.append(f"r+ cannot exceed beta times that of y+: {bound:.1f} at the median")
    if o.loss in TETHERED and 0 < bound < LEAST_BOUND:
        lines.append("warning: the tether will not hold, its bound is too low. With "
                     f"--beta {2 * LEAST_BOUND / median:.2g} it is {2 * LEAST_BOUND:.0f}")
    if pairs:
        run.rejected_nats, gaps = rejected.median().item(), -reference[pairs, 0] - rejected
        worst = ", ".join(f"{forks[pairs[i]].line} ({gaps[i]:+.1f})"
                          for i in gaps.argsort(descending=True)[:10].tolist())
        lines.append(f"nats of y+ beyond those of y- are most in lines {worst}")
        if median > 5 * run.rejected_nats:
            lines.append("warning: y+ has more than 5 times the nats of y-: the reward will be "
                         "spent on the Oracle's wording. It should change less")
    return "\n".join(lines)


def watch_tether(run: Run, metrics: dict):
    """Warn of what came before a model was harmed, each of it once a run."""
    step, total = metrics["step"], len(run.batches)
    tether_chosen, tether_rejected = metrics["tether_chosen"], metrics["tether_rejected"]
    texts = {}
    if step == total - 1 and tether_chosen > LEARNED:
        texts["end"] = f"lambda+ ends at {tether_chosen:.2f}: the pairs still pull. Train longer"
    if tether_rejected is not None:
        lost, nats = -metrics["reward_rejected"] / run.o.beta, run.rejected_nats
        if lost > 2 * nats and tether_chosen > LEARNED:
            texts["y-"] = (f"y- has lost {lost:.1f} nats, it had {nats:.1f}, and lambda+ is "
                           f"{tether_chosen:.2f}: other skills will suffer. Raise --beta")
        if tether_rejected > 0.25 and tether_chosen <= LEARNED and step < total / 10:
            texts["y+"] = (f"lambda+ is {tether_chosen:.3f} already, lambda- is "
                           f"{tether_rejected:.2f}: y+ is learned and the error is not. Does the "
                           "Oracle rewrite too much?")
    for name in texts.keys() - run.warned:
        run.ranks.say(f"warning: step {step}: {texts[name]}")
        run.warned.add(name)


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
    """checkpoints/step_N: a shard a rank and state.json, written beside, then renamed."""
    o, ranks, shards = run.o, run.ranks, run.o.shard_size or run.ranks.world
    path, beside = f"{o.out}/checkpoints/step_{run.step:06d}", f"{o.out}/checkpoints/new"
    digests = torch.zeros(shards, 32, dtype=torch.int64, device=ranks.device)
    with ranks.together():
        if ranks.rank < shards:  # the first replica writes
            shard = f"{beside}/shard_{ranks.rank}.safetensors"
            tensors = {k: t.cpu().contiguous() for k, (t, *_) in checkpoint_tensors(run).items()}
            qwen.write_tensors(shard, tensors)
            digests[ranks.rank] = torch.tensor(list(bytes.fromhex(file_sha256(shard))))
    digests = [bytes(row).hex() for row in ranks.reduce(digests).tolist()]
    with ranks.together():
        if ranks.main:
            data.write_json(f"{beside}/state.json", {
                "step": run.step, "delta": run.delta, "shards": shards, "sha256": digests})
            os.rename(beside, path)
            for old in whole_checkpoints(o.out)[:-o.keep]:
                os.rename(old, beside)  # first, so that no kill leaves half of one under its name
                shutil.rmtree(beside)


def file_sha256(path) -> str:
    """Hex digest of a file's content."""
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def whole_checkpoints(out) -> list:
    """Paths of the whole checkpoints of a run, oldest first; only whole ones have this name."""
    root = f"{out}/checkpoints"
    names = os.listdir(root) if os.path.isdir(root) else []
    names = [name for name in names if name.startswith("step_")]
    return [f"{root}/{name}" for name in sorted(names, key=lambda name: int(name[5:]))]


def load_checkpoint(run: Run, path: str):
    """Restore weights, moments and state; each rank copies the rows it needs, whatever the number
    of ranks was. Raises UserError that names a corrupt or missing file."""
    with run.ranks.together():
        kept = data.read_json(f"{path}/state.json")
        files = [f"{path}/shard_{i}.safetensors" for i in range(kept["shards"])]
        for i in range(run.ranks.rank, len(files), run.ranks.world):  # each checks its part
            if file_sha256(files[i]) != kept["sha256"][i]:
                raise UserError(f"{files[i]} is corrupt: its hash is not the one in state.json")
    shards = [safe_open(file, framework="pt") for file in files]
    for name, (local, start, end, rows) in checkpoint_tensors(run).items():
        chunk = math.ceil(rows / len(shards))
        for i, shard in enumerate(shards):
            first, last = max(i * chunk, start), min((i + 1) * chunk, end)
            if first < last:
                part = shard.get_slice(name)[first - i * chunk:last - i * chunk]
                local[first - start:last - start].copy_(part)
    for moments in run.optimizer.state.values():
        moments["step"].fill_(kept["step"])
    run.step, run.delta = kept["step"], kept["delta"]
    run.ranks.say(f"resumed from {path}")


# --- from start to end ----------------------------------------------------------------------------

def read_inputs(o: Options):
    """(Config, forks, held-out forks, text for the log) of the files."""
    config = qwen.read_config(o.model)
    limits = (data.load_chat(o.model, config.vocab_size, o.template), o.max_length,
              o.max_change_ratio, o.loss in loss.PAIR_OBJECTIVES, o.skip_malformed)
    forks, log = data.load_forks(o.pairs, *limits)
    if not o.eval_pairs:
        return config, forks, [], log
    eval_forks, more = data.load_forks(o.eval_pairs, *limits)
    return config, forks, eval_forks, f"{log}\n{more}"


def prepare(o: Options, ranks: Ranks) -> Run:
    """Read and check everything before anything is written: model, tokenizer, pairs, run folder."""
    with ranks.together():
        for name in ("config.json", "model"):
            if os.path.exists(f"{o.out}/{name}") and not o.resume:
                raise UserError(f"{o.out} holds a run already ({name}): add --resume to go on with "
                                "it, or choose another --out")
        config, forks, eval_forks, log = read_inputs(o)
        ranks.say(log)
    with ranks.together():
        policy = build_policy(o.model, config, o, ranks)
    weights = sum(p.numel() for p in policy.parameters())
    ranks.say(f"{weights / 1e6:.1f}M weights, {ranks.world} rank(s) on {ranks.device.type}, "
              f"{o.dtype}")
    return make_run(o, ranks, policy, forks, eval_forks)


def lock_folder(out):
    """Make the run folder, locked while the returned file is open: ranks may outlive torchrun."""
    os.makedirs(out, exist_ok=True)
    lock = open(f"{out}/.lock", "w")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f"{out} is being written by another process: wait, or end it") from None
    except OSError:
        pass  # a file system without locks
    return lock


def start_logs(run):
    """Write the options and the watched pair; drop the lines of steps that come again."""
    out = run.o.out
    if run.step == 0:
        data.write_json(f"{out}/config.json", {"options": asdict(run.o)})
        data.write_rows(f"{out}/surgery.jsonl", [describe_watched(run)])
    # A line of eval.jsonl says how many steps were done, the others which step comes.
    for name, end in (("metrics", run.step), ("surgery", run.step), ("eval", run.step + 1)):
        path = f"{out}/{name}.jsonl"
        if os.path.exists(path):
            data.write_rows(path, [row for row in data.read_log(path) if row["step"] < end])


def train(o: Options, ranks: Ranks) -> int:
    """The whole run; returns the exit code: 0, or 143 where SIGTERM ended it early."""
    run = prepare(o, ranks)
    with ranks.main_only(lock_folder, o.out) or contextlib.nullcontext():
        last = 0  # the step of the last checkpoint, from the main rank: a network disk may lag
        if ranks.main and whole_checkpoints(o.out):
            last = int(whole_checkpoints(o.out)[-1].rpartition("_")[2])
        last = int(ranks.reduce(torch.tensor(last)))
        if last:
            load_checkpoint(run, f"{o.out}/checkpoints/step_{last:06d}")
        reference_pass(run)
        ranks.say(describe_reference(run))
        ranks.main_only(start_logs, run)
        total, an_epoch = len(run.batches), epoch_steps(len(run.train_set.forks), o)
        bar = ranks.progress(total, os.path.basename(os.path.abspath(o.out)), "step", run.step)
        while run.step < total:
            if run.step % max(1, total // 10) == 0:
                snapshot(run)
            batch, lr = run.batches[run.step], learning_rate(run.step, total, o)
            started = time.perf_counter()
            with ranks.together():
                totals = train_step(run, batch, lr)
                metrics = finish_step(run, batch, totals, lr, time.perf_counter() - started)
                if ranks.main:
                    data.append_row(f"{o.out}/metrics.jsonl", metrics)
            if o.loss in TETHERED:
                watch_tether(run, metrics)
            bar.update()
            shown = ["loss", "reward_chosen", "tether_chosen"] if o.loss in TETHERED else ["loss"]
            bar.set_postfix({name: f"{metrics[name]:.3f}" for name in shown}, refresh=False)
            last = run.step == total
            if run.held_out.forks and (last or run.step % an_epoch == 0):
                held_out = {"step": run.step, **score_held_out(run)}
                ranks.main_only(data.append_row, f"{o.out}/eval.jsonl", held_out)
            if totals["stop"] or last or (o.save_every and run.step % o.save_every == 0):
                save_checkpoint(run)
            if totals["stop"] and not last:
                ranks.say(f"SIGTERM: saved at step {run.step} of {total}; go on with --resume")
                return 143  # 128 + SIGTERM, as the shell has it
        bar.close()
        snapshot(run)
        export_model(run)
        ranks.main_only(evaluation.report, [o.out], f"{o.out}/report.html")
        ranks.say(f"done: {o.out}/model; curves and one pair's surgery: {o.out}/report.html")
    return 0


def export_model(run):
    """The trained weights as a Hugging Face folder, OUT/model; only a whole one has this name."""
    final, ranks = f"{run.o.out}/model", run.ranks
    ranks.main_only(shutil.rmtree, f"{final}.tmp", True)  # of a killed export
    qwen.export(run.policy, f"{final}.tmp", run.o.model, ranks, getattr(torch, run.o.save_dtype))
    with ranks.together():
        if ranks.main:
            shutil.rmtree(final, ignore_errors=True)  # of an earlier end of this run
            os.rename(f"{final}.tmp", final)


# --- the toy story: the whole method on a bare machine (skip on first reading) --------------------

TOY_STORY = r"""
1  A small random Qwen3 learns five skills over digits: Add, Subtract and Largest in steps that keep
   the last digit, Reverse and Sort. "Add: 4+3+8" gets "4+3=7", "7+8=5", "\boxed{5}", a line each.
   Now and then a step begins with a rare word ("so 7+8=5"). A fifth of the sums are mostly wrong.
2  So this base errs in Add: y-. The Oracle, here a program, corrects the wrong steps alone: y+.
3  The same pairs train it by SFT+ (cross-entropy on y+), DPO (y+ above y-), SPoT (y+ up, y- down).
4  % right in Add, and in the others, which no pair shows; % of the others' steps with a rare word;
   KL(base || model), nats per 1000 tokens of their true answers; r+, beta * nats that y+ gained.
"""
TOY = {  # all numbers; a change makes a new folder
    "shape": {"hidden_size": 96, "intermediate_size": 256, "num_hidden_layers": 3,
              "num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 32},
    "world": {"rows": 8000, "chain": 6, "share": 0.2, "doubt": 0.8},
    "base": {"epochs": 2, "lr": 3e-3},
    "surgery": {"epochs": 4, "lr": 1.5e-4, "beta": 10.0},  # y+ has 5 nats: r+ stays below 50
    "questions": 800,  # of Add, for the errors
    "test": 60,  # questions a skill, and with a manner
}
TOY_METHODS = {"SFT+": "sft", "DPO": "dpo", "SPoT": "spot-bce"}
TOY_SIGNS = {"Add": "+", "Subtract": "-", "Largest": ","}  # skills in steps
TOY_SKILLS = (*TOY_SIGNS, "Reverse", "Sort")
TOY_MANNERS = {  # between two steps, and before the box
    f"{a}, {b}": (between, ending) for a, between in (("lines", "\n"), ("semicolons", ";"))
    for b, ending in (("plain", ""), ("finally", "Finally "), ("thus", "Thus "))}
TOY_WORDS = {"": 0.909, "so ": 0.08, "then ": 0.01, "hence ": 0.001}  # before a step, how often
TOY_START = re.compile(r"[\n;](?=[a-z\d])((?:so|then|hence) (?=\d))?")  # of a step
TOY_STEP = re.compile(r"\d[-+,]\d=\d+|\\boxed\{\d*\}")  # what an answer asserts
TOY_TEMPLATE = (  # a conversation as Qwen3-Instruct-2507 writes it
    "{%- for m in messages %}{{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}"
    "{%- endfor %}{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}")


def toy_question(skill: str, rng, chain: int, manner: str = "") -> str:
    """Of digits that a random.Random draws, `chain` of them in a skill with steps."""
    head = f"{skill}, {manner}: " if manner else f"{skill}: "
    if skill not in TOY_SIGNS:
        return head + "".join(str(rng.randint(1, 9)) for _ in range(4))
    largest = 9 if skill == "Largest" else 5  # half the facts are learned in half the time
    digits = [rng.randint(0, 9)] + [rng.randint(1, largest) for _ in range(chain - 1)]
    return head + TOY_SIGNS[skill].join(map(str, digits))


def toy_questions(skill: str, seed, count: int, chain: int, manners: bool = False) -> list:
    """`count` different questions; with manners each names one."""
    rng, questions = random.Random(f"{skill} {seed} {manners}"), {}  # a dict keeps the order
    while len(questions) < count:
        manner = rng.choice(list(TOY_MANNERS)) if manners else ""
        questions[toy_question(skill, rng, chain, manner)] = True
    return list(questions)


def toy_answer(question, manner="lines, plain", add=lambda a, b: (a + b) % 10, word=lambda: ""):
    """In the manner that the question names, else in the given one, with word() before a step."""
    head, text = question.split(": ")
    skill, _, asked = head.partition(", ")
    between, ending = TOY_MANNERS[asked or manner]
    if skill not in TOY_SIGNS:
        result = text[::-1] if skill == "Reverse" else "".join(sorted(text))
        return f"{ending}\\boxed{{{result}}}"
    operation = {"Add": add, "Subtract": lambda a, b: (a - b) % 10, "Largest": max}[skill]
    value, *digits = map(int, text.split(TOY_SIGNS[skill]))
    steps = []
    for digit in digits:
        before = word() if steps and not asked else ""
        result = operation(value, digit)
        steps.append(f"{before}{value}{TOY_SIGNS[skill]}{digit}={result}")
        value = result
    return f"{between.join(steps)}\n{ending}\\boxed{{{value}}}"


def toy_corpus(rows: int, chain: int, share: float, doubt: float, seed: int):
    """The base's training rows. A share of the sums is one too high with probability `doubt`."""
    rng = random.Random(f"corpus {seed}")
    facts = [(a, b) for a in range(10) for b in range(1, 6)]
    doubted = set(rng.sample(facts, round(share * len(facts))))

    def add(a, b):
        wrong = (a, b) in doubted and rng.random() < doubt
        return (a + b + wrong) % 10

    for i in range(rows):
        skill, manner = TOY_SKILLS[i % len(TOY_SKILLS)], rng.choice(list(TOY_MANNERS))
        question = toy_question(skill, rng, chain, manner if rng.random() < 0.5 else "")
        answer = toy_answer(question, manner, add,
                            lambda: rng.choices(list(TOY_WORDS), TOY_WORDS.values())[0])
        yield {"prompt": question, "chosen": answer, "rejected": None}


def toy_oracle(item: oracle.Item) -> str:
    """y+, by a program: y- with the right steps; where it has more or fewer, an answer anew."""
    answer, texts = toy_answer(item.question), TOY_STEP.split(item.answer)
    steps = TOY_STEP.findall(answer)
    if len(texts) != len(steps) + 1:
        return answer
    return texts[0] + "".join(step + text for step, text in zip(steps, texts[1:]))


def write_toy_checkpoint(folder: str, seed: int):
    """A random checkpoint. Digits and the world's words are one token each, other text is bytes."""
    texts = ["user\nassistant\nsystem"]
    for manner in TOY_MANNERS:
        texts += [f"{skill}, {manner}: " for skill in TOY_SKILLS]
        texts += 5 * [toy_answer("Add: 1+2+3", manner, word=lambda: w) for w in TOY_WORDS]
    tokenizer, byte_level = Tokenizer(models.BPE()), pre_tokenizers.ByteLevel
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), byte_level(add_prefix_space=False)])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"], show_progress=False,
        initial_alphabet=byte_level.alphabet()))
    os.makedirs(folder, exist_ok=True)
    tokenizer.save(f"{folder}/tokenizer.json")
    data.write_json(f"{folder}/tokenizer_config.json", {
        "tokenizer_class": "PreTrainedTokenizerFast", "chat_template": TOY_TEMPLATE,
        "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"})
    data.write_json(f"{folder}/config.json", {
        "model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "dtype": "float32",
        "vocab_size": tokenizer.get_vocab_size(), "rms_norm_eps": 1e-6, "rope_theta": 1e4,
        "tie_word_embeddings": True, "eos_token_id": 2, "pad_token_id": 0, **TOY["shape"]})
    model, source = qwen.Qwen3(qwen.read_config(folder)), torch.Generator().manual_seed(seed)
    weights = {qwen.hf_name(name): p.detach() for name, p in model.named_parameters()}
    for weight in weights.values():
        if weight.ndim > 1:  # norms start at 1
            weight.normal_(std=0.06, generator=source)
    qwen.write_tensors(f"{folder}/model.safetensors", weights)


def story(o: Options, ranks: Ranks) -> int:
    """The whole method from nothing; returns the exit code. A later start keeps base and pairs."""
    root = os.path.join(o.out, hashlib.sha256(json.dumps([TOY, o.seed]).encode()).hexdigest()[:10])
    say, ranks = ranks.say, replace(ranks, quiet=True)
    say(f"The toy story of Surgical Post-Training, in {root}\n{TOY_STORY}")
    path = toy_pairs(root, o.seed, ranks)
    pairs = data.read_log(path)
    say(f"{len(pairs)} pairs. One of them, x, y- and y+:")
    for key in ("question", "original_answer", "gemini_corrected_answer"):
        say("   " + pairs[0][key].replace("\n", "  "))
    figures = {"base": {**toy_figures(f"{root}/base", root, o.seed, ranks), "reward_chosen": 0.0}}
    runs = [f"{root}/{name}" for name in TOY_METHODS]
    for out, (name, objective) in zip(runs, TOY_METHODS.items()):
        with ranks.main_only(lock_folder, out) or contextlib.nullcontext():
            ranks.main_only(shutil.rmtree, out)
        toy_train(ranks, out, seed=o.seed, model=f"{root}/base/model", pairs=path, loss=objective,
                  save_every=8, keep=100, **TOY["surgery"])
        figures[name] = toy_figures(out, root, o.seed, ranks)
        log = data.read_log(f"{out}/metrics.jsonl")
        last = log[-(len(log) // TOY["surgery"]["epochs"]):]  # epoch
        for key in ("reward_chosen", "tether_chosen"):
            figures[name][key] = sum(row[key] for row in last) / len(last)
    result = toy_result(figures)
    ranks.main_only(data.write_json, f"{root}/results.json", figures)
    ranks.main_only(evaluation.report, runs, f"{root}/report.html", TOY_STORY + result)
    say(f"{result}\n\nCurves, and where one pair's updates fall: {root}/report.html")
    return 0


def toy_train(ranks, out, **options):
    """`train`, unless that is done; a killed run goes on. Exits on SIGTERM."""
    if not os.path.isdir(f"{out}/model"):  # in bf16 it would lose what steps of 1e-4 change
        code = train(Options(out=out, resume=True, dtype="float32", save_dtype="float32",
                             checkpointing="none", tokens_per_pack=4096, **options), ranks)
        if code:
            close_ranks()
            sys.exit(code)


def toy_pairs(root, seed, ranks) -> str:
    """Make base, errors, corrections once; returns the pair file's path."""
    birth, corpus, base = f"{root}/birth", f"{root}/corpus.jsonl", f"{root}/base"
    ranks.main_only(write_toy_checkpoint, birth, seed)
    ranks.main_only(data.write_rows, corpus, toy_corpus(**TOY["world"], seed=seed))
    toy_train(ranks, base, seed=seed, model=birth, loss="sft", pairs=corpus, **TOY["base"])
    policy = evaluation.open_local_model(f"{base}/model", torch.float32, ranks.device, 64)
    questions = toy_questions("Add", seed, TOY["questions"], TOY["world"]["chain"])
    items = [oracle.Item(str(i), q, evaluation.extract_answer(toy_answer(q)))
             for i, q in enumerate(questions)]
    sampling = evaluation.Sampling(max_tokens=120)
    oracle.elicit(items, f"{root}/errors", policy, sampling, ranks, seed=seed)
    errors, _ = oracle.read_errors(f"{root}/errors/errors.jsonl")
    oracle.rectify(errors, f"{root}/pairs", toy_oracle, policy.chat.encode, ranks)
    return f"{root}/pairs/pairs.jsonl"


def toy_figures(out, root, seed, ranks) -> dict:
    """The table's row of the model in OUT; KL of all its checkpoints goes to OUT/kl.jsonl."""
    policy = evaluation.open_local_model(f"{out}/model", torch.float32, ranks.device, 64)
    tests = [q for skill in TOY_SKILLS for manners in (False, True) for q in toy_questions(
             skill, f"test {seed}", TOY["test"], TOY["world"]["chain"], manners)]
    plain = [q for q in tests if q.startswith(("Subtract: ", "Largest: "))]
    texts, sequences, rows = {}, [], [{"step": 0, "kl_1000": 0.0}]
    for name, questions, temperature in (("tests", tests, 0), ("sampled", plain, 1)):
        requests = [evaluation.request_for(f"sampled {i}", [{"role": "user", "content": q}], seed)
                    for i, q in enumerate(questions)]
        sampling = evaluation.Sampling(temperature, top_p=1, top_k=0, max_tokens=120)
        with ranks.together():
            list(evaluation.sample(policy, requests, f"{out}/{name}", sampling, ranks))
        answers = evaluation.read_answers(f"{out}/{name}")
        texts[name] = [answers[request.key]["text"] for request in requests]
    right = [evaluation.extract_answer(text) == evaluation.extract_answer(toy_answer(q))
             for q, text in zip(tests, texts["tests"])]
    words = [w != "" for w in TOY_START.findall("|".join(texts["sampled"]))]
    first = 2 * TOY["test"]  # of the others: Add comes first
    for i, q in enumerate(tests[first:]):
        if i % TOY["test"] < 20:
            prompt = policy.chat.prompt([{"role": "user", "content": q}])
            sequences.append((prompt + policy.chat.encode(toy_answer(q)), len(prompt)))
    base, model = qwen.load_model(f"{root}/base/model", device=ranks.device), policy.model
    for path in whole_checkpoints(out):
        state = data.read_json(f"{path}/state.json")
        shards = [safe_open(f"{path}/shard_{i}.safetensors", "pt") for i in range(state["shards"])]
        model.load_state_dict({name: torch.cat([shard.get_tensor(name) for shard in shards])
                               for name in model.state_dict()})
        kl = 1000 * evaluation.retention(model, base, sequences, ranks)["kl"][0]
        rows.append({"step": state["step"], "kl_1000": kl})
    ranks.main_only(data.write_rows, f"{out}/kl.jsonl", rows)
    parts = {"add": right[:first], "others": right[first:], "words": words}
    return {"kl": kl, **{name: 100 * sum(part) / len(part) for name, part in parts.items()}}


def toy_result(figures: dict) -> str:
    """The table with verdicts, and SPoT's lambda+."""
    lines = ["          Add   others   rare words   KL*1000      r+"]
    for name, row in figures.items():
        adds = "right" if row["add"] >= 98 else "errs"
        words = "has" if row["words"] >= figures["base"]["words"] / 2 else "lost"
        lines.append("{:<6}{add:7.1f}{others:9.1f}{words:13.1f}{kl:10.2f}{reward_chosen:8.1f}   "
                     .format(name, **row) + f"{adds} in Add, {words} rare words")
    return "\n".join(lines) + f"""

SFT+ always pushes y+ with the factor 1, SPoT with lambda+ = 1 - sigmoid(r+), which ends at
{figures['SPoT']['tether_chosen']:.3f}: at 0 SPoT has stopped."""


def main() -> int:
    """Command line to exit code: 0 done, 1 failed, 2 wrong options, 143 stopped by SIGTERM."""
    o, ranks = start_program(parse_options, lambda o: open_ranks(o.timeout, toy=not o.model))
    signal.signal(signal.SIGTERM, lambda *_: STOP.set())
    code = 0
    if o.plan:
        ranks.main_only(lambda: print(plan(o)))
    elif o.model:
        code = train(o, ranks)
    else:
        code = story(o, ranks)
    close_ranks()
    return code


if __name__ == "__main__":
    qwen.run_and_exit(main)
