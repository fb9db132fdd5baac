"""How time and memory grow with pairs, length, vocabulary and layers, one at a time.

    python tests/bench/growth.py [--factors 1,4,16]

The real training step on random weights in fp32, from a base of 2 layers of 256, vocabulary 8,192,
16 pairs of 256 tokens an answer, half of it shared; batches of 8, packs of 4,096 tokens. Each in a
process of its own. The column before the last two should stay near 1: time over counted FLOPs, to
the base's; the last one is what `train.py --plan` foresees of a GPU, with the process before the
model was made. Prints a Markdown table.
"""

import time

import numpy as np

import common
from common import data, train

BASE = {"pairs": 16, "length": 256, "vocab": 8192, "layers": 2}


def measure(pairs, length, vocab, layers):
    """(seconds and counted FLOPs of an epoch, peak GB, planned GB)."""
    shape = common.config(256, layers, vocab)
    rng = np.random.default_rng(0)
    forks = [common.make_pair(rng, vocab, length // 8, length, 0.5) for _ in range(pairs)]
    ranks, before = train.open_ranks(600), common.peak_gb()
    run = common.open_run(shape, forks, ranks, batch_size=8, tokens_per_pack=4096, gpus=1)
    times = []
    for epoch in range(3):
        start = time.perf_counter()
        for batch in data.epoch_batches(pairs, 8, 0, epoch):
            train.train_step(run, batch, 1e-5)
        times.append(time.perf_counter() - start)
    packs = [pack for batch in data.epoch_batches(pairs, 8, 0, 0)
             for pack in run.packs(forks, batch)]
    planned = train.plan_memory(run.policy, run.o, max(len(pack.tokens) for pack in packs))
    flops, gb = sum(train.count_flops(shape, pack) for pack in packs), common.peak_gb()
    train.close_ranks()
    return min(times), flops, gb, before + sum(planned.values()) / 1e9


def main():
    a = common.options(__doc__, factors="1,4,16")
    base_seconds, base_flops, *_ = common.own_process(measure, *BASE.values())
    rows = []
    for name, value in BASE.items():
        for factor in map(int, a.factors.split(",")):
            settings = {**BASE, name: factor * value}
            seconds, flops, gb, planned = common.own_process(measure, *settings.values())
            longer = seconds / base_seconds
            rows.append([name, factor * value, seconds, flops / 1e9, longer,
                         longer / (flops / base_flops), gb, planned])
    common.table(["grows", "to", "s an epoch", "GFLOP", "time to base", "time/FLOP to base",
                  "peak GB", "planned GB"], rows)


if __name__ == "__main__":
    main()
