"""What sharing the prefix saves: forks beside the same pairs as two plain sequences, same code.

    python tests/bench/prefix.py [--hidden 512 --layers 4 --vocab 16384 --length 512]

One step (forward, coefficients, backward) on 4 pairs in fp32, for shares of 0 to 90 % of an answer
and its prompt in common, in alternation, medians. Ideal is a time ratio equal to the token ratio:
attention grows a little faster than that, and the head sees no prompt. Prints a Markdown table.
"""

import os
import statistics
import time

import numpy as np
import torch

import common
import loss
from common import data, qwen


def unshared(fork):
    """The same two answers as two plain sequences."""
    prompt, rest = np.split(fork.trunk, [fork.prompt_length])
    return [data.Fork(len(prompt), prompt, prompt[:0], np.concatenate([rest, branch]), line=0)
            for branch in (fork.chosen, fork.rejected)]


def step_seconds(model, pack, objective):
    with torch.no_grad():
        scores = model(pack.tokens, pack.positions, pack.forks, pack.rows, pack.targets)
        reference = loss.sequence_logps(scores, pack.lengths)
    start = time.perf_counter()
    row_logps = model(pack.tokens, pack.positions, pack.forks, pack.rows, pack.targets)
    coefficients, _ = loss.row_coefficients(objective, row_logps, pack.lengths, reference, 0.1)
    row_logps.backward(coefficients)
    spent = time.perf_counter() - start
    model.zero_grad()
    return spent


def main():
    a = common.options(__doc__, hidden=512, layers=4, vocab=16384, length=512, repeats=3)
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    model = qwen.Qwen3(common.config(a.hidden, a.layers, a.vocab))
    common.fill(model)
    rows, rng = [], np.random.default_rng(0)
    for share in (0.0, 0.3, 0.5, 0.7, 0.9):
        forks = [common.make_pair(rng, a.vocab, max(1, a.length // 16), a.length, share)
                 for _ in range(4)]
        plain = [one for fork in forks for one in unshared(fork)]
        packs = [data.make_pack(part, list(range(len(part)))) for part in (forks, plain)]
        # reward-sft takes plain sequences, and costs what spot-bce does
        times = [(step_seconds(model, packs[0], "spot-bce"),
                  step_seconds(model, packs[1], "reward-sft")) for _ in range(a.repeats + 1)]
        shared, plain = (statistics.median(side) for side in zip(*times[1:]))
        tokens = len(packs[0].tokens) / len(packs[1].tokens)
        rows.append([f"{share:.0%}", tokens, shared / plain, shared / plain / tokens])
    common.table(["in common", "tokens to unshared", "time to unshared", "time to token ratio"],
                 rows)


if __name__ == "__main__":
    main()
