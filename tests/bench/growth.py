"""How time and memory grow with pairs, length, vocabulary and layers, one at a time.

    python tests/bench/growth.py [--dtype float32] [--only length]

The real training step on random weights, from a base of 2 layers of 256, vocabulary 8,192, 16 pairs of 256
tokens an answer, half of it shared; batches of 8, packs of 4,096 tokens. Each in a process of its own. The
column before the last should stay near 1: time over counted FLOPs, to the base's; the last one is what
`train.py --plan` foresees of a GPU, with the process before the model was made. Prints a Markdown table.
"""

import json
import time

import numpy as np

import common

BASE = {"pairs": 16, "length": 256, "vocab": 8192, "layers": 2}


def measure(pairs, length, vocab, layers, dtype):
    shape = common.config(256, layers, vocab)
    rng = np.random.default_rng(0)
    forks = [common.make_pair(rng, vocab, length // 8, length, 0.5) for _ in range(pairs)]
    ranks, before = common.train.open_ranks(600), common.peak_gb()
    run = common.open_run(shape, forks, ranks, dtype=dtype, batch_size=8, tokens_per_pack=4096,
                          gpus=1)
    best = float("inf")
    for epoch in range(3):
        start = time.perf_counter()
        for batch in common.data.epoch_batches(pairs, 8, 0, epoch):
            common.train.train_step(run, batch, 1e-5)
        best = min(best, time.perf_counter() - start)
    batches = common.data.epoch_batches(pairs, 8, 0, 0)
    packs = [pack for b in batches for pack in run.packs(forks, b)]
    largest = max(packs, key=lambda pack: len(pack.tokens))
    parts = common.train.plan_memory(run.policy, run.o, len(largest.tokens))
    return {"seconds": best, "flops": sum(common.train.count_flops(shape, pack) for pack in packs),
            "gb": common.peak_gb(), "planned": before + sum(parts.values()) / 1e9}


def main():
    p = common.parser(__doc__)
    p.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"), help="[float32]")
    p.add_argument("--only", choices=tuple(BASE), help="one of the four")
    a = p.parse_args()
    if a.settings:
        print(json.dumps(measure(**json.loads(a.settings))), flush=True)
        return common.qwen.leave(lambda: 0)
    base, rows = common.child(__file__, **BASE, dtype=a.dtype), []
    for what in [a.only] if a.only else BASE:
        for factor in (1, 4, 16):
            r = common.child(__file__, **{**BASE, what: factor * BASE[what]}, dtype=a.dtype)
            longer, more = (r[k] / base[k] for k in ("seconds", "flops"))
            rows.append([what, factor * BASE[what], r["seconds"], r["flops"] / 1e9, longer, longer / more,
                         r["gb"], r["planned"]])
    common.table(["grows", "to", "s an epoch", "GFLOP", "time to base", "time/FLOP to base", "peak GB",
                  "planned GB"], rows)


if __name__ == "__main__":
    main()
