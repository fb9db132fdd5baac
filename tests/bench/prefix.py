"""What sharing the prefix saves: forks beside the same pairs as two plain sequences each, same code.

    python tests/bench/prefix.py [--hidden 512 --layers 4 --vocab 16384 --length 512 --dtype float32]

One step (forward, coefficients, backward) on 4 pairs, for shares of 0 to 90 % of an answer and its prompt in
common, in alternation, medians. Ideal is a time ratio equal to the token ratio: attention grows a little
faster than that, and the head sees no prompt. Prints a Markdown table.
"""

import statistics
import time

import numpy as np
import torch

import common
import loss
from common import data, qwen


def seconds(model, forks, objective):
    pack = data.make_pack(forks, list(range(len(forks))))
    with torch.no_grad():
        scores = model(pack.tokens, pack.positions, pack.forks, pack.rows, pack.targets)
        reference = loss.sequence_logps(scores, pack.lengths)
    start = time.perf_counter()
    row_logps = model(pack.tokens, pack.positions, pack.forks, pack.rows, pack.targets)
    coefficients, _ = loss.row_coefficients(objective, row_logps, pack.lengths, reference, 0.1)
    row_logps.backward(coefficients)
    spent = time.perf_counter() - start
    model.zero_grad()
    return spent, len(pack.tokens), len(pack.rows)


def main():
    p = common.parser(__doc__)
    p.add_argument("--hidden", type=int, default=512, help="[512]")
    p.add_argument("--layers", type=int, default=4, help="[4]")
    p.add_argument("--vocab", type=int, default=16384, help="[16384]")
    p.add_argument("--length", type=int, default=512, help="tokens of prompt and one answer [512]")
    p.add_argument("--pairs", type=int, default=4, help="in the step [4]")
    p.add_argument("--repeats", type=int, default=3, help="[3]")
    p.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"), help="[float32]")
    a = p.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(len(common.os.sched_getaffinity(0)))
    model = qwen.Qwen3(common.config(a.hidden, a.layers, a.vocab))
    common.fill(model)
    model.to(getattr(torch, a.dtype))
    rows, rng = [], np.random.default_rng(0)
    for share in (0.0, 0.3, 0.5, 0.7, 0.9):
        forks = [common.make_pair(rng, a.vocab, max(1, a.length // 16), a.length, share)
                 for _ in range(a.pairs)]
        plain = [one for fork in forks for one in common.unshared(fork)]
        # reward-sft takes plain sequences, and costs what spot-bce does
        times = [(seconds(model, forks, "spot-bce"), seconds(model, plain, "reward-sft"))
                 for _ in range(a.repeats + 1)][1:]
        shared, apart = (statistics.median(t[i][0] for t in times) for i in (0, 1))
        (_, tokens, scored), (_, tokens_apart, scored_apart) = times[0]
        ratio = tokens / tokens_apart
        rows.append([f"{share:.0%}", tokens, tokens_apart, ratio, scored / scored_apart, apart, shared,
                     shared / apart, shared / apart / ratio])
    common.table(["in common", "tokens shared", "unshared", "token ratio", "ratio of scored rows",
                  "s unshared", "s shared", "time ratio", "to token ratio"], rows)


if __name__ == "__main__":
    main()
