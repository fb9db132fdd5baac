"""The head alone: `linear_logps` beside full logits, forward and backward, time and memory.

    python tests/bench/head.py [--rows 8192 --vocab 151936 --width 512 --dtype float32]

Each side in a process of its own; memory is the rise of the process's peak above its state with
inputs, weight and both gradients allocated. Full logits: (hidden @ weight.T).float()
.log_softmax(-1).gather, as most trainers have it. Prints a Markdown table.
"""

import os
import statistics
import time

import torch

import common
import loss


def full_logits(hidden, weight, targets):
    return (hidden @ weight.T).float().log_softmax(-1).gather(1, targets[:, None])[:, 0]


def measure(a, logps):
    """(median seconds, GB extra, FLOP/s of a product)."""
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    torch.manual_seed(0)
    dtype = getattr(torch, a.dtype)
    hidden = torch.randn(a.rows, a.width).to(dtype).requires_grad_()
    weight = (torch.randn(a.vocab, a.width) * a.width**-0.5).to(dtype).requires_grad_()
    targets, times = torch.randint(a.vocab, (a.rows,)), []
    hidden.grad, weight.grad = torch.zeros_like(hidden), torch.zeros_like(weight)
    weight.grad += 1  # touched, so that it is resident
    rate = common.gemm_rate(dtype)
    # A gradient accumulated into .grad is made beside it first: it is counted on both sides.
    before = common.peak_gb(anew=True)
    for _ in range(a.repeats):
        start = time.perf_counter()
        logps(hidden, weight, targets).sum().backward()
        times.append(time.perf_counter() - start)
    return statistics.median(times), common.peak_gb() - before, rate


def main():
    a = common.options(__doc__, rows=8192, vocab=151936, width=512, repeats=3, dtype="float32")
    products, rows = 2 * a.rows * a.vocab * a.width, []
    for name, logps, count in (("ours", loss.linear_logps, 4), ("full logits", full_logits, 3)):
        seconds, gb, rate = common.own_process(measure, a, logps)
        rows.append([name, a.dtype, seconds, gb, f"{count * products / seconds / rate:.0%}"])
    print(f"{a.rows} rows x {a.vocab} x {a.width}\n")
    common.table(["", "dtype", "s", "GB extra", "of the GEMM rate"], rows)


if __name__ == "__main__":
    main()
