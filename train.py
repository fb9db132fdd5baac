"""The training loop of Surgical Post-Training, from one CPU core to nodes of GPUs.

Comes in: --model, a Qwen3 checkpoint folder, and --pairs, a JSONL file of surgical pairs.
Goes out: a run folder: logs (*.jsonl), config.json, reference.safetensors, checkpoints/,
report.html, and model/, the trained checkpoint in Hugging Face layout.

    torchrun --nproc_per_node=8 train.py --model Qwen3-8B --pairs pairs.jsonl --out runs/first
    torchrun --nproc_per_node=8 train.py --resume --out runs/first
    torchrun --nproc_per_node=2 train.py         # nothing given: the toy story, in minutes

SIGTERM saves at the next step (exit code 143). --resume goes on, with any number of ranks, and also
begins a run. On several nodes start this on each, and again on one that died; all must see --out:
    TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 torchrun --nnodes=2 --nproc_per_node=8 --max_restarts=3 \\
        --rdzv_backend=c10d --rdzv_id=spot --rdzv_endpoint=HOST:29500 train.py ... --resume
"""

import argparse
import contextlib
import fcntl
import glob
import hashlib
import json
import math
import os
import random
import re
import shutil
import signal
import sys
import threading
import time
from dataclasses import asdict, dataclass, field, replace
from itertools import zip_longest

import numpy as np
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


@dataclass
class Options:
    """Defaults are the paper's (Qwen3-8B), but for the loss."""
    model: str = option("", "Qwen3 checkpoint folder (required)")
    pairs: str = option("", "pair file, .jsonl or .jsonl.gz (required)")
    out: str = option("", "run folder to write (required)")
    eval_pairs: str = option("", "held-out pair file, scored after each epoch")
    loss: str = option("spot-bce", "objective", loss.OBJECTIVES)
    beta: float = option(0.1, "reward scale: r+ < -beta log pi_ref(y+). Raise if lambda+ stays up")
    delta: str = option("ema", "mean of spot-bco: moving (0.9) or of all", ("ema", "cumulative"))
    lr: float = option(1e-6, "peak rate; too high where r- falls much faster than r+ rises")
    epochs: int = option(2, "passes over the pairs; they change little once lambda+ is near 0")
    max_steps: int = option(0, "optimizer steps at most, schedule included; 0: all")
    batch_size: int = option(32, "pairs per optimizer step, over all ranks")
    warmup: float = option(0.05, "share of the steps with rising rate; a cosine to 0 follows")
    weight_decay: float = option(0.01, "AdamW's, on all weights but norms")
    clip: float = option(1.0, "largest gradient norm")
    max_length: int = option(8192, "tokens of prompt + one answer; longer pairs are dropped")
    max_change_ratio: float = option(0.6, "drop pairs with 1 - LCS(y-, y+)/|y+| above it (gamma)")
    skip_malformed: bool = option(False, "drop and count malformed rows")
    template: str = option("", "chat template, whatever the file says", ("", "hybrid", "instruct"))
    seed: int = option(0, "order of the pairs")
    dtype: str = option("bfloat16", "of the computation", ("float32", "bfloat16"))
    checkpointing: str = option("full", "recompute blocks in backward", ("none", "full"))
    tokens_per_pack: int = option(16384, "tokens of a micro-batch: costs memory alone")
    shard_size: int = option(0, "ranks that share one copy of the model; 0: all")
    save_dtype: str = option("bfloat16", "of OUT/model", ("float32", "bfloat16"))
    save_every: int = option(50, "steps between checkpoints; 0: only the last, and on SIGTERM")
    keep: int = option(1, "checkpoints to keep")
    timeout: int = option(1800, "seconds until a stalled rank ends the run")
    resume: bool = option(False, "go on from the last checkpoint in OUT")
    plan: bool = option(False, "train nothing: say what memory a step takes")
    gpus: int = option(8, "with --plan: how many GPUs")


# What may differ on --resume (of files, the path): the curve changes by rounding alone.
FREE = ("model", "pairs", "eval_pairs", "out", "tokens_per_pack", "checkpointing", "shard_size",
        "save_every", "save_dtype", "keep", "timeout", "resume", "plan", "gpus")


def parse_options(argv=None) -> Options:
    """With --resume, what is not given comes from OUT/config.json. Raises UserError."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser, Options)
    given, kept, problems = vars(parser.parse_args(argv)), {}, []
    config_path = f"{given.get('out', '')}/config.json"
    if given.get("resume") and os.path.exists(config_path):
        kept = data.read_json(config_path).get("options")
        if not kept:  # perhaps a checkpoint's
            raise UserError(f"{config_path} belongs to no run: choose another --out")
    for name, value in given.items():
        if name not in FREE and kept.get(name, value) != value:
            problems.append(f"--{name} is {value!r}, the run in {given['out']} has {kept[name]!r}")
    o = Options(**{**kept, **given})
    if given.keys() <= {"out", "seed"}:  # the toy story
        o.out = o.out or "runs/toy"
        if os.path.exists(config_path):
            problems.append(f"{config_path} exists: add --resume, or choose another --out")
    else:
        required = ["model", "pairs"] if o.plan else ["model", "pairs", "out"]
        problems += [f"--{name} is required" for name in required if not getattr(o, name)]
    for name in ("beta", "lr", "epochs", "batch_size", "clip", "keep", "gpus"):
        if not getattr(o, name) > 0:
            problems.append(f"--{name} is {getattr(o, name)}, above 0 expected")
    if not 0 <= o.warmup <= 1:
        problems.append(f"--warmup is {o.warmup}, 0 to 1 expected")
    if o.delta != "ema" and o.loss != "spot-bco":
        problems.append(f"--delta {o.delta} goes with --loss spot-bco, found --loss {o.loss}")
    if problems:
        raise UserError("these options do not work:" + data.listed(problems))
    return o


# --- the sharded policy and its optimizer ---------------------------------------------------------

def build_policy(folder, config, o: Options, ranks: Ranks):
    """The policy with fp32 weights, sharded block by block; each rank reads its own rows."""
    shards = o.shard_size or ranks.world
    shape, names = (shards,), ("shard",)
    if ranks.world % shards:
        raise UserError(f"--shard_size {shards} does not divide the {ranks.world} ranks")
    if shards < ranks.world:
        shape, names = (ranks.world // shards, shards), ("replicate", "shard")
    mesh = init_device_mesh(ranks.device.type, shape, mesh_dim_names=names)
    precision = MixedPrecisionPolicy(getattr(torch, o.dtype), reduce_dtype=torch.float32)
    with torch.device("meta"):
        policy = qwen.Qwen3(config, checkpointing=o.checkpointing == "full")
    units = list(policy.layers)
    if not config.tie_word_embeddings:  # two big tables: a buffer for each
        units += [policy.embed_tokens, policy.lm_head]
    for unit in units:
        fully_shard(unit, mesh=mesh, mp_policy=precision)
    fully_shard(policy, mesh=mesh, mp_policy=precision, reshard_after_forward=False)
    if ranks.world > 1:  # sum gradients, train_step divides; one rank would copy them
        for unit in [*units, policy]:
            unit.set_gradient_divide_factor(1.0)
            unit.set_force_sum_reduction_for_comms(True)  # without it gloo dies on the factor
    qwen.load_weights(policy, folder, ranks.device)
    return policy


def make_optimizer(policy, o: Options):
    """AdamW as in the paper (betas 0.9, 0.95), no decay on norms (the only 1-D weights)."""
    groups = [{"params": [p for p in policy.parameters() if p.ndim > 1]},
              {"params": [p for p in policy.parameters() if p.ndim == 1], "weight_decay": 0.0}]
    adamw = torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=o.weight_decay, fused=True)
    for p in policy.parameters():  # now, so that resume can load into it
        adamw.state[p] = {"step": torch.zeros((), device=p.device),
                          "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
    return adamw


def learning_rate(step: int, total: int, o: Options) -> float:
    """(k+1)/W of the peak in warm-up step k of W (HF: k/W), then a cosine."""
    warm = math.ceil(o.warmup * total)
    if step < warm:
        return o.lr * (step + 1) / warm
    return o.lr * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, total - warm)))


def plan_memory(policy, o: Options, tokens: int) -> dict:
    """Peak bytes of a GPU in a step, by part, without fragments, CUDA, NCCL; `tokens` a pack."""
    c, size = policy.config, getattr(torch, o.dtype).itemsize
    weights, block = (sum(p.numel() for p in m.parameters()) for m in (policy, policy.layers[0]))
    query, key = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
    # Kept of a token in a block: two norms' input, normed, scaled; q, k projected, normed, rotated;
    # v; k, v of branch and trunk; attention's output, twice; gate, up, silu(gate), product.
    kept = 6 * c.hidden_size + 3 * (query + key) + 5 * key + 2 * query + 4 * c.intermediate_size
    recomputed = 0
    if o.checkpointing == "full":
        kept, recomputed = c.hidden_size, kept
    # A tied table waits with its gradient; that of an untied head is summed in fp32.
    table = c.vocab_size * c.hidden_size * (2 * size if c.tie_word_embeddings else 4)
    return {
        "weights, gradients, moments in fp32": 16 * weights // (o.shard_size or o.gpus),
        "three gathered blocks, the head's gradient": 3 * block * size + table,
        "activations kept for backward": tokens * c.num_hidden_layers * kept * size,
        "one block in backward": tokens * (2 * c.intermediate_size + recomputed) * size}


def plan(o: Options) -> str:
    """Memory of a step on each of --gpus GPUs, by part."""
    config, (forks, *_), log = read_inputs(o)
    if o.gpus % (o.shard_size or o.gpus):
        raise UserError(f"--shard_size {o.shard_size} does not divide --gpus {o.gpus}")
    with torch.device("meta"):
        policy = qwen.Qwen3(config)
    lengths, packs = [len(fork) for fork in forks], []
    for batch in epoch_batches(len(forks), o.batch_size, o.seed, 0):
        for micro_batch in split_batch(batch, lengths, o.gpus, o.tokens_per_pack):
            packs += micro_batch
    largest = max(sum(lengths[i] for i in pack) for pack in packs)
    parts = plan_memory(policy, o, largest)
    parts["in all"] = sum(parts.values())
    lines = [f"  {value / 1e9:8.2f} GB  {name}" for name, value in parts.items()]
    return "\n".join([log, f"Each of {o.gpus} GPUs, packs of at most {largest} tokens:", *lines])


# --- the run and its step -------------------------------------------------------------------------

STOP = threading.Event()  # set by SIGTERM; a step's all-reduce makes all ranks stop together


@dataclass
class ForkSet:
    """Pairs, and the batches (of indices) in which they are scored without gradients."""
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
    train_set: ForkSet  # batches of epoch 0: step 0 has the same packs, and so is exact
    held_out: ForkSet  # perhaps of no pair
    watched: ForkSet  # of one pair, for the report; scored alone: bf16 depends on the pack
    step: int = 0  # how many are done
    delta: float = 0.0  # the running mean of spot-bco
    rejected_nats: float = math.inf  # median of -log pi_ref(y-)
    warned: set = field(default_factory=set)  # names of warnings
    lock: object = None  # an open file: no other run writes in the folder

    def packs(self, fork_set: ForkSet, batch):
        """This rank's micro-batches of a global batch, on the device."""
        lengths, ranks = [len(fork) for fork in fork_set.forks], self.ranks
        for micro_batch in split_batch(batch, lengths, ranks.world, self.o.tokens_per_pack):
            pack = data.make_pack(fork_set.forks, micro_batch[ranks.rank], fork_set.reference)
            yield pack.to(ranks.device)

    def coefficients(self, pack, row_logps):
        """(R,) dL/d row_logps, L the summed loss; (len(SUMS),) sums."""
        return loss.row_coefficients(self.o.loss, row_logps, pack.lengths, pack.reference,
                                     self.o.beta, self.delta)


def make_run(o: Options, ranks: Ranks, policy, forks, eval_forks=()) -> Run:
    """A run before its first step. The watched pair is of median length, with y- if any has one."""
    batches = []
    for epoch in range(o.epochs):
        batches += epoch_batches(len(forks), o.batch_size, o.seed, epoch)
    first_epoch = batches[:len(batches) // o.epochs]
    if o.max_steps > 0:
        batches, first_epoch = batches[:o.max_steps], first_epoch[:o.max_steps]
    trained = [forks[i] for batch in first_epoch for i in batch]
    trained = [fork for fork in trained if len(fork.rejected)] or trained
    watched = sorted(trained, key=lambda fork: (len(fork), fork.line))[len(trained) // 2]
    order = range(len(eval_forks))
    held_out = [order[i:i + o.batch_size] for i in order[::o.batch_size]]
    return Run(o, ranks, policy, make_optimizer(policy, o), batches, ForkSet(forks, first_epoch),
               ForkSet(eval_forks, held_out), ForkSet([watched], [[0]]))


def epoch_batches(count: int, batch_size: int, seed: int, epoch: int) -> list:
    """Arrays of pair indices, one an optimizer step, the last smaller. Ranks play no part."""
    order = np.random.Generator(np.random.PCG64([seed, epoch])).permutation(count)
    return [order[i:i + batch_size] for i in range(0, count, batch_size)]


def split_batch(batch, lengths, ranks: int, tokens_per_pack: int) -> list:
    """Cut one batch into micro-batches: result[m][rank] is a list of pair indices, perhaps empty.
    Longest first to the least loaded rank, then first fit into packs; a longer fork is a pack by
    itself. A pure function of lengths: all ranks know the whole plan without communication."""
    loads, packs = [0] * ranks, [[] for _ in range(ranks)]
    for i in sorted(map(int, batch), key=lambda i: (-lengths[i], i)):
        rank = loads.index(min(loads))
        loads[rank] += lengths[i]
        for pack in packs[rank]:
            if sum(lengths[j] for j in pack) + lengths[i] <= tokens_per_pack:
                pack.append(i)
                break
        else:
            packs[rank].append([i])
    return list(zip_longest(*packs, fillvalue=[]))


def train_step(run: Run, batch, lr: float) -> dict:
    """One optimizer step on a global batch of pair indices. Returns loss.SUMS over all ranks, with
    "stop" (above 0: a rank was sent SIGTERM) and "grad_norm" before clipping."""
    o, count, forks = run.o, len(batch), [run.train_set.forks[i] for i in batch]
    if o.loss in loss.TOKEN_OBJECTIVES:  # a global number, known without communication
        count = sum(len(f.trunk) - f.prompt_length + len(f.chosen) for f in forks)
    sums = torch.zeros(len(loss.SUMS), dtype=torch.float64, device=run.ranks.device)
    for pack in run.packs(run.train_set, batch):
        row_logps = run.policy(pack.tokens, pack.positions, pack.spans, pack.rows, pack.targets)
        coefficients, pack_sums = run.coefficients(pack, row_logps)
        row_logps.backward(coefficients / count)
        sums += pack_sums
    grad_norm = torch.nn.utils.clip_grad_norm_(run.policy.parameters(), o.clip).full_tensor()
    # One reduce for all numbers, the step's only wait for the GPU; each rank adds its norm.
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
    """Raises UserError, before the weights change, for numbers that are not finite and, at step 0,
    where the policy is its own reference, for rewards that are not exactly 0."""
    mean = loss.average([totals[name] for name in loss.SUMS], run.o.loss)["loss"]
    if not math.isfinite(mean + totals["grad_norm"]):
        lines = ", ".join(str(fork.line) for fork in forks)
        raise UserError(f"step {run.step}: loss {mean}, gradient norm {totals['grad_norm']}: not "
                        f"finite, weights left as they were. Is --lr too high? Lines {lines} of "
                        f"{run.o.pairs}")
    if run.step == 0:
        run.ranks.say(f"step 0: sum of |reward| {totals['abs_reward']}, loss {mean:.9f}")
        if totals["abs_reward"] != 0:
            raise UserError("step 0 must give rewards of exactly 0: the forward pass is not "
                            "deterministic here. Try --dtype float32")


def finish_step(run, batch, totals: dict, lr: float, seconds: float) -> dict:
    """Move the run one step on; returns that step's line of metrics.jsonl."""
    o, tokens = run.o, sum(len(run.train_set.forks[i]) for i in batch)
    metrics = {"step": run.step, "epoch": run.step // len(run.train_set.batches),
               **loss.average([totals[name] for name in loss.SUMS], o.loss), "delta": run.delta,
               "grad_norm": totals["grad_norm"], "lr": lr, "tokens": tokens,
               "tokens_per_s": tokens / seconds,
               "memory_gb": torch.cuda.max_memory_allocated() / 1e9}
    if o.loss == "spot-bco":
        mean = (metrics["reward_chosen"] + metrics["reward_rejected"]) / 2
        seen = sum(len(earlier) for earlier in run.batches[:run.step])
        run.delta = loss.update_delta(run.delta, mean, len(batch), seen, o.delta)
    run.step += 1
    return metrics


# --- scores without gradients: the reference, held-out pairs, the watched pair --------------------

@torch.no_grad()
def scored_packs(run: Run, fork_set: ForkSet, title=""):
    """(pack, row log-probs) of this rank's packs; with a title there is a progress bar."""
    bar = run.ranks.progress(len(fork_set.batches) if title else 0, title, "batch")
    for batch in fork_set.batches:
        for p in run.packs(fork_set, batch):
            yield p, run.policy(p.tokens, p.positions, p.spans, p.rows, p.targets)
        bar.update()
    bar.close()
    run.policy.reshard()  # else the root's weights stay gathered


def score_all(run: Run, fork_set: ForkSet, title) -> torch.Tensor:
    """(N, 2) fp64 sequence log-probs of all pairs, on every rank's CPU."""
    scores = torch.zeros(len(fork_set.forks), 2, dtype=torch.float64, device=run.ranks.device)
    for pack, row_logps in scored_packs(run, fork_set, title):
        scores[pack.pairs] = loss.sequence_logps(row_logps, pack.lengths)
    return run.ranks.reduce(scores)  # other ranks add zeros


def score_held_out(run: Run) -> dict:
    """The held-out pairs' metrics, delta frozen."""
    sums = torch.zeros(len(loss.SUMS), dtype=torch.float64, device=run.ranks.device)
    for pack, row_logps in scored_packs(run, run.held_out):
        sums += run.coefficients(pack, row_logps)[1]
    return loss.average(run.ranks.reduce(sums).tolist(), run.o.loss)


def reference_pass(run: Run):
    """Score all pairs before step 0, where the same packs make rewards exactly 0; a resumed run
    reads these scores."""
    path, digests, scores = f"{run.o.out}/reference.safetensors", {}, {}
    sets = {"pairs": run.train_set, "eval_pairs": run.held_out, "watched": run.watched}
    for name, fork_set in sets.items():  # ids depend on tokenizer and template too
        ids = [(f.prompt_length, f.trunk.tolist(), f.rejected.tolist(), f.chosen.tolist())
               for f in fork_set.forks]
        digests[name] = hashlib.sha256(str(ids).encode()).hexdigest()
    if run.step == 0:
        for name, fork_set in sets.items():
            scores[name] = fork_set.reference = score_all(run, fork_set, f"reference, {name}")
        run.ranks.main_only(lambda: qwen.write_tensors(path, scores, **digests))
        return
    with run.ranks.together(), safe_open(path, framework="pt") as f:
        for name, fork_set in sets.items():
            if f.metadata()[name] != digests[name]:
                raise UserError(f"{path} belongs to other {name} than given, or another tokenizer:"
                                " choose another --out")
            fork_set.reference = f.get_tensor(name)


def snapshot(run: Run):
    """Log the watched pair's coefficients (of the summed loss) and log-probs of trunk, y-, y+."""
    for pack, row_logps in scored_packs(run, run.watched):  # on other ranks than 0 a dummy
        coefficients, _ = run.coefficients(pack, row_logps)
        run.ranks.main_only(data.append_row, f"{run.o.out}/surgery.jsonl", {
            "step": run.step, "coefficients": coefficients.tolist(), "logps": row_logps.tolist()})


# --- what the log warns of (figures: tests/bench/STUDY.md) ----------------------------------------

TETHERED = ("spot-bce", "spot-bco", "reward-sft")
LEARNED = 0.05  # lambda+ below which a pair is learned: r+ is 3 or more
LEAST_BOUND = 20.0  # a bound on r+ of 13 did not keep the model near its base, one of 43 did


def describe_reference(run: Run) -> str:
    """What is known before step 0, for the log. Sets run.rejected_nats."""
    o, forks, nats = run.o, run.train_set.forks, -run.train_set.reference
    trained = [i for batch in run.train_set.batches for i in batch]
    pairs = [i for i in trained if len(forks[i].rejected)]
    median = nats[trained, 0].median().item()
    bound = o.beta * median
    lines = [f"-log pi_ref(y+): median {median:.1f} nats; beta times it is r+'s bound: {bound:.1f}"]
    if o.loss in TETHERED and 0 < bound < LEAST_BOUND:
        lines.append("warning: the tether will not hold. With "
                     f"--beta {2 * LEAST_BOUND / median:.2g} the bound is {2 * LEAST_BOUND:.0f}")
    if pairs:
        run.rejected_nats = nats[pairs, 1].median().item()
        gaps = (nats[:, 0] - nats[:, 1]).tolist()
        worst = sorted(pairs, key=lambda i: gaps[i], reverse=True)[:10]
        worst = ", ".join(f"{forks[i].line} ({gaps[i]:+.1f})" for i in worst)
        lines.append(f"-log pi_ref(y-): median {run.rejected_nats:.1f} nats; y+ has most nats "
                     f"beyond its y- in lines {worst}")
        if median > 5 * run.rejected_nats:
            lines.append("warning: y+ has more than 5 times the nats of y-: the Oracle rewrites")
    return "\n".join(lines)


def watch_tether(run: Run, metrics: dict):
    """Warn of each sign that the model will be harmed, once a start."""
    step, total, nats, texts = metrics["step"], len(run.batches), run.rejected_nats, {}
    chosen, rejected = metrics["tether_chosen"], metrics["tether_rejected"] or 0.0
    lost = -(metrics["reward_rejected"] or 0.0) / run.o.beta
    if lost > 2 * nats and chosen > LEARNED:
        texts["y-"] = (f"y- has lost {lost:.1f} nats, it had {nats:.1f}, and lambda+ is "
                       f"{chosen:.2f}: other skills will suffer. Raise --beta")
    if rejected > 0.25 and chosen <= LEARNED and step < total / 10:
        texts["y+"] = (f"lambda+ is {chosen:.3f} already, lambda- is {rejected:.2f}: y+ is learned "
                       "and the error is not. Does the Oracle rewrite too much?")
    if step == total - 1 and chosen > LEARNED:
        texts["end"] = f"lambda+ ends at {chosen:.2f}: pairs still pull. Raise --beta or train on"
    for name in texts.keys() - run.warned:
        run.ranks.say(f"warning: step {step}: {texts[name]}")
        run.warned.add(name)


# --- checkpoints ----------------------------------------------------------------------------------

def checkpoint_tensors(run: Run) -> dict:
    """{name: tensor} of weights and both moments."""
    tensors = {}
    for name, p in run.policy.named_parameters():
        moments = run.optimizer.state[p]
        tensors |= {name: p, f"{name}.exp_avg": moments["exp_avg"],
                    f"{name}.exp_avg_sq": moments["exp_avg_sq"]}
    return tensors


def save_checkpoint(run: Run):
    """checkpoints/step_N: a shard a rank and state.json, written beside, then renamed."""
    o, ranks, shards = run.o, run.ranks, run.o.shard_size or run.ranks.world
    beside, digests = f"{o.out}/checkpoints/new", torch.zeros(shards, 32, dtype=torch.int64)
    ranks.main_only(shutil.rmtree, beside, True)  # of a kill
    with ranks.together():
        if ranks.rank < shards:  # the first replica writes
            shard = f"{beside}/shard_{ranks.rank}.safetensors"
            qwen.write_tensors(shard, {name: qwen.rows_here(t)[0].cpu().contiguous()
                                       for name, t in checkpoint_tensors(run).items()})
            digests[ranks.rank] = torch.tensor(list(bytes.fromhex(file_sha256(shard))))
    digests = [bytes(row).hex() for row in ranks.reduce(digests).tolist()]
    with ranks.together():
        if ranks.main:
            data.write_json(f"{beside}/state.json", {
                "step": run.step, "delta": run.delta, "shards": shards, "sha256": digests})
            os.rename(beside, f"{o.out}/checkpoints/step_{run.step:06d}")
            for old in whole_checkpoints(o.out)[:-o.keep]:
                os.rename(old, beside)  # no kill leaves half of one under its name
                shutil.rmtree(beside)


def file_sha256(path) -> str:
    """Hex digest of a file."""
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def whole_checkpoints(out) -> list:
    """Paths of a run's checkpoints, oldest first; only whole ones have this name."""
    return sorted(glob.glob(f"{glob.escape(out)}/checkpoints/step_*[0-9]"))


def load_checkpoint(run: Run, path: str):
    """Restore what any number of ranks saved. Raises UserError for a corrupt file."""
    with run.ranks.together():
        kept = data.read_json(f"{path}/state.json")
        files = [f"{path}/shard_{i}.safetensors" for i in range(kept["shards"])]
        for i in range(run.ranks.rank, len(files), run.ranks.world):  # each checks its part
            if file_sha256(files[i]) != kept["sha256"][i]:
                raise UserError(f"{files[i]} is corrupt: its hash is not that in state.json")
    shards = [safe_open(file, framework="pt") for file in files]
    for name, tensor in checkpoint_tensors(run).items():
        local, start, end = qwen.rows_here(tensor)
        chunk = math.ceil(len(tensor) / len(shards))
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
    """(Config, [forks, held-out forks if any], text for the log)."""
    config = qwen.read_config(o.model)
    limits = (data.load_chat(o.model, config.vocab_size, o.template), o.max_length,
              o.max_change_ratio, o.loss in loss.PAIR_OBJECTIVES, o.skip_malformed)
    loaded = [data.load_forks(path, *limits) for path in (o.pairs, o.eval_pairs) if path]
    return config, [forks for forks, _ in loaded], "\n".join(log for _, log in loaded)


def prepare(o: Options, ranks: Ranks) -> Run:
    """Read and check everything before anything is written."""
    with ranks.together():
        for name in ("config.json", "model"):
            if os.path.exists(f"{o.out}/{name}") and not o.resume:
                raise UserError(f"{o.out}/{name} exists: add --resume, or choose another --out")
        config, fork_lists, log = read_inputs(o)
        ranks.say(f"{log}\n{ranks.world} rank(s) on {ranks.device.type}, {o.dtype}")
        policy = build_policy(o.model, config, o, ranks)
    return make_run(o, ranks, policy, *fork_lists)


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
    o, (fork,) = run.o, run.watched.forks
    if run.step == 0:
        data.write_json(f"{o.out}/config.json", {"options": asdict(o)})
        chat = data.load_chat(o.model, run.policy.config.vocab_size, o.template)
        row, n = {"step": -1, "line": fork.line}, fork.prompt_length
        parts = fork.trunk[:n], fork.trunk[n:], fork.rejected, fork.chosen
        for name, ids in zip(("prompt", "trunk", "rejected", "chosen"), parts):
            row[name] = [chat.tokenizer.decode([i], skip_special_tokens=False) for i in ids]
        data.write_rows(f"{o.out}/surgery.jsonl", [row])
    for name, end in (("metrics", run.step), ("surgery", run.step), ("eval", run.step + 1)):
        path = f"{o.out}/{name}.jsonl"
        if os.path.exists(path):
            data.write_rows(path, [row for row in data.read_log(path) if row["step"] < end])


def train(o: Options, ranks: Ranks) -> int:
    """The whole run; returns the exit code: 0, or 143 where SIGTERM ended it early."""
    run = prepare(o, ranks)
    run.lock = ranks.main_only(lock_folder, o.out)
    last = max([int(p.rpartition("_")[2]) for p in whole_checkpoints(o.out)], default=0)
    # The same one on all ranks: a network disk may lag.
    last = int(ranks.reduce(torch.tensor(last), torch.distributed.ReduceOp.MAX))
    if last:
        load_checkpoint(run, f"{o.out}/checkpoints/step_{last:06d}")
    reference_pass(run)
    ranks.say(describe_reference(run))
    ranks.main_only(start_logs, run)
    total = len(run.batches)
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
        bar.set_postfix(loss=metrics["loss"], tether_chosen=metrics["tether_chosen"], refresh=False)
        done = run.step == total
        if run.held_out.forks and (done or run.step % len(run.train_set.batches) == 0):
            # Steps that are done; in the other logs "step" is the one that comes.
            held_out = {"step": run.step, **score_held_out(run)}
            ranks.main_only(data.append_row, f"{o.out}/eval.jsonl", held_out)
        if totals["stop"] or done or (o.save_every > 0 and run.step % o.save_every == 0):
            save_checkpoint(run)
        if totals["stop"] and not done:
            ranks.say(f"SIGTERM: saved at step {run.step} of {total}; go on with --resume")
            return 143  # 128 + SIGTERM
    bar.close()
    snapshot(run)
    ranks.main_only(shutil.rmtree, f"{o.out}/model.tmp", True)  # of a killed export
    qwen.export(run.policy, f"{o.out}/model.tmp", o.model, ranks, getattr(torch, o.save_dtype))
    ranks.main_only(shutil.rmtree, f"{o.out}/model", True)  # of an earlier end
    ranks.main_only(os.rename, f"{o.out}/model.tmp", f"{o.out}/model")
    ranks.main_only(evaluation.report, [o.out], f"{o.out}/report.html")
    ranks.say(f"done: {o.out}/model; curves and one pair: {o.out}/report.html")
    return 0


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
        return (a + b + int(wrong)) % 10

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
        last_epoch = log[-(len(log) // TOY["surgery"]["epochs"]):]
        for key in ("reward_chosen", "tether_chosen"):
            figures[name][key] = sum(row[key] for row in last_epoch) / len(last_epoch)
    result = toy_result(figures)
    ranks.main_only(data.write_json, f"{root}/results.json", figures)
    ranks.main_only(evaluation.report, runs, f"{root}/report.html", TOY_STORY + result)
    say(f"{result}\n\nCurves, and where one pair's updates fall: {root}/report.html")
    return 0


def toy_train(ranks, out, **options):
    """`train`, unless that is done; a killed run goes on. Exits on SIGTERM."""
    if not os.path.isdir(f"{out}/model"):
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
    policy = qwen.open_local_model(f"{base}/model", torch.float32, ranks.device, 64)
    questions = toy_questions("Add", seed, TOY["questions"], TOY["world"]["chain"])
    items = [oracle.Item(str(i), q, evaluation.extract_answer(toy_answer(q)))
             for i, q in enumerate(questions)]
    sampling = qwen.Sampling(max_tokens=120)
    oracle.elicit(items, f"{root}/errors", policy, sampling, ranks, seed=seed)
    errors, _ = oracle.read_errors(f"{root}/errors/errors.jsonl")
    oracle.rectify(errors, f"{root}/pairs", toy_oracle, policy.chat.encode, ranks)
    return f"{root}/pairs/pairs.jsonl"


def toy_figures(out, root, seed, ranks) -> dict:
    """The table's row of the model in OUT; KL of all its checkpoints goes to OUT/kl.jsonl."""
    policy = qwen.open_local_model(f"{out}/model", torch.float32, ranks.device, 64)
    tests = [q for skill in TOY_SKILLS for manners in (False, True) for q in toy_questions(
             skill, f"test {seed}", TOY["test"], TOY["world"]["chain"], manners)]
    plain = [q for q in tests if q.startswith(("Subtract: ", "Largest: "))]
    texts, sequences, rows = {}, [], [{"step": 0, "kl_1000": 0.0}]
    for name, questions, temperature in (("tests", tests, 0), ("sampled", plain, 1)):
        requests = [evaluation.request_for(f"sampled {i}", [{"role": "user", "content": q}], seed)
                    for i, q in enumerate(questions)]
        sampling = qwen.Sampling(temperature, top_p=1, top_k=0, max_tokens=120)
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
