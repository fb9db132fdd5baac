"""Three tables of parts of a step, on random weights:

    python tests/bench/parts.py --part head [--dtype bfloat16]
    python tests/bench/parts.py --part prefix
    python tests/bench/parts.py --part growth

head    linear_logps beside full logits, forward and backward. Memory is the rise of a process's
        peak above its state with inputs, weight and both gradients.
prefix  a step on 4 forks beside the same pairs as two plain sequences each, in fp32, for shares of
        0 to 90 % of an answer and its prompt in common. Ideal are equal ratios of time and tokens.
growth  time and memory of a step in fp32 as pairs, length, vocabulary and layers grow, one at a
        time, in processes of their own. Time over counted FLOPs, to the base's, should stay near 1;
        planned is what `train.py --plan` foresees, with the process before the model was made.
"""

import os
import statistics
import time

import numpy as np
import torch

import common
import loss
from common import data, qwen, train

ROWS, VOCAB, WIDTH = 8192, 151936, 512  # of the head
BASE = {"pairs": 16, "length": 256, "vocab": 8192, "layers": 2}


def full_logits(hidden, weight, targets):
    return (hidden @ weight.T).float().log_softmax(-1).gather(1, targets[:, None])[:, 0]


def measure_head(logps, dtype):
    """(median seconds, GB extra, FLOP/s of a product)."""
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    torch.manual_seed(0)
    hidden = torch.randn(ROWS, WIDTH).to(dtype).requires_grad_()
    weight = (torch.randn(VOCAB, WIDTH) * WIDTH**-0.5).to(dtype).requires_grad_()
    targets, times = torch.randint(VOCAB, (ROWS,)), []
    hidden.grad, weight.grad = torch.zeros_like(hidden), torch.zeros_like(weight)
    weight.grad += 1  # touched, so that it is resident
    rate = common.gemm_rate(dtype)
    # A gradient accumulated into .grad is made beside it first: it is counted on both sides.
    before = common.peak_gb(anew=True)
    for _ in range(3):
        start = time.perf_counter()
        logps(hidden, weight, targets).sum().backward()
        times.append(time.perf_counter() - start)
    return statistics.median(times), common.peak_gb() - before, rate


def head(dtype):
    products, rows = 2 * ROWS * VOCAB * WIDTH, []
    for name, logps, count in (("ours", loss.linear_logps, 4), ("full logits", full_logits, 3)):
        seconds, gb, rate = common.own_process(measure_head, logps, getattr(torch, dtype))
        rows.append([name, dtype, seconds, gb, f"{count * products / seconds / rate:.0%}"])
    common.table(["", "dtype", "s", "GB extra", "of the GEMM rate"], rows)


def unshared(fork):
    """The same two answers as two plain sequences."""
    prompt, rest = np.split(fork.trunk, [fork.prompt_length])
    return [data.Fork(len(prompt), prompt, prompt[:0], np.concatenate([rest, branch]), line=0)
            for branch in (fork.chosen, fork.rejected)]


def step_seconds(model, pack, objective):
    with torch.no_grad():
        scores = model(pack.tokens, pack.positions, pack.spans, pack.rows, pack.targets)
        reference = loss.sequence_logps(scores, pack.lengths)
    start = time.perf_counter()
    row_logps = model(pack.tokens, pack.positions, pack.spans, pack.rows, pack.targets)
    coefficients, _ = loss.row_coefficients(objective, row_logps, pack.lengths, reference, 0.1)
    row_logps.backward(coefficients)
    spent = time.perf_counter() - start
    model.zero_grad()
    return spent


def prefix():
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    model = qwen.Qwen3(common.config(512, 4, 16384))
    common.fill(model)
    rows, rng = [], np.random.default_rng(0)
    for share in (0.0, 0.3, 0.5, 0.7, 0.9):
        forks = [common.make_pair(rng, 16384, 32, 512, share) for _ in range(4)]
        plain = [one for fork in forks for one in unshared(fork)]
        packs = [data.make_pack(part, list(range(len(part)))) for part in (forks, plain)]
        # reward-sft takes plain sequences, and costs what spot-bce does
        times = [(step_seconds(model, packs[0], "spot-bce"),
                  step_seconds(model, packs[1], "reward-sft")) for _ in range(4)]
        shared, plain = (statistics.median(side) for side in zip(*times[1:]))
        tokens = len(packs[0].tokens) / len(packs[1].tokens)
        rows.append([f"{share:.0%}", tokens, shared / plain, shared / plain / tokens])
    common.table(["in common", "tokens to unshared", "time to unshared", "time to token ratio"],
                 rows)


def measure_epoch(pairs, length, vocab, layers):
    """(seconds and counted FLOPs of an epoch, peak GB, planned GB)."""
    shape = common.config(256, layers, vocab)
    rng = np.random.default_rng(0)
    forks = [common.make_pair(rng, vocab, length // 8, length, 0.5) for _ in range(pairs)]
    ranks, before = train.open_ranks(600), common.peak_gb()
    run = common.open_run(shape, forks, ranks, batch_size=8, tokens_per_pack=4096, gpus=1)
    times = []
    for epoch in range(3):
        start = time.perf_counter()
        for batch in train.epoch_batches(pairs, 8, 0, epoch):
            train.train_step(run, batch, 1e-5)
        times.append(time.perf_counter() - start)
    packs = [pack for batch in train.epoch_batches(pairs, 8, 0, 0)
             for pack in run.packs(run.train_set, batch)]
    planned = train.plan_memory(run.policy, run.o, max(len(pack.tokens) for pack in packs))
    flops, gb = sum(common.count_flops(shape, pack) for pack in packs), common.peak_gb()
    train.close_ranks()
    return min(times), flops, gb, before + sum(planned.values()) / 1e9


def growth():
    base_seconds, base_flops, *_ = common.own_process(measure_epoch, *BASE.values())
    rows = []
    for name, value in BASE.items():
        for grown in (value, 4 * value, 16 * value):
            settings = {**BASE, name: grown}
            seconds, flops, gb, planned = common.own_process(measure_epoch, *settings.values())
            longer = seconds / base_seconds
            rows.append([name, grown, seconds, flops / 1e9, longer, longer / (flops / base_flops),
                         gb, planned])
    common.table(["grows", "to", "s an epoch", "GFLOP", "time to base", "time/FLOP to base",
                  "peak GB", "planned GB"], rows)


if __name__ == "__main__":
    a = common.options(__doc__, ("part",), dtype="float32")
    if a.part == "head":
        head(a.dtype)
    elif a.part == "prefix":
        prefix()
    else:
        growth()
