"""The head alone: `linear_logps` beside full logits, forward and backward, time and memory.

    python tests/bench/head.py [--rows 8192 --vocab 151936 --width 512 --dtype float32]

Each side in a process of its own; memory is the rise of the process's peak above its state with inputs,
weight and both gradients allocated. Full logits: (hidden @ weight.T).float().log_softmax(-1).gather, as most
trainers have it. Prints a Markdown table.
"""

import json
import statistics
import time

import torch

import common
import loss


def measure(rows, vocab, width, dtype, repeats, who):
    torch.set_num_threads(len(common.os.sched_getaffinity(0)))
    torch.manual_seed(0)
    dtype = getattr(torch, dtype)
    hidden = torch.randn(rows, width).to(dtype).requires_grad_()
    weight = (torch.randn(vocab, width) * width**-0.5).to(dtype).requires_grad_()
    targets, times = torch.randint(vocab, (rows,)), []
    hidden.grad, weight.grad = torch.zeros_like(hidden), torch.zeros_like(weight)
    weight.grad += 1  # touched, so that it is resident
    rate = common.gemm_rate(dtype)
    # A gradient accumulated into .grad is made beside it first: that one is counted on both sides.
    before = common.peak_gb(anew=True)
    for _ in range(repeats):
        start = time.perf_counter()
        if who == "ours":
            logps = loss.linear_logps(hidden, weight, targets)
        else:
            logits = (hidden @ weight.T).float()
            logps = logits.log_softmax(-1).gather(1, targets[:, None])
        logps.sum().backward()
        times.append(time.perf_counter() - start)
    return {"seconds": statistics.median(times), "gb": common.peak_gb() - before, "rate": rate}


def main():
    p = common.parser(__doc__)
    p.add_argument("--rows", type=int, default=8192, help="scored tokens [8192]")
    p.add_argument("--vocab", type=int, default=151936, help="[151936]")
    p.add_argument("--width", type=int, default=512, help="of the hidden state [512]")
    p.add_argument("--repeats", type=int, default=3, help="[3]")
    p.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"), help="[float32]")
    a = p.parse_args()
    if a.settings:
        return print(json.dumps(measure(**json.loads(a.settings))))
    given = {k: v for k, v in vars(a).items() if k != "settings"}
    flops, rows = 6 * a.rows * a.vocab * a.width, []
    for who in ("ours", "full logits"):
        r = common.child(__file__, who=who, **given)
        rows.append([who, a.dtype, f"{a.rows} x {a.vocab} x {a.width}", r["seconds"], r["gb"],
                     f"{flops * (4 / 3 if who == 'ours' else 1) / r['seconds'] / r['rate']:.0%}"])
    common.table(["", "dtype", "rows x vocabulary x width", "s", "GB extra", "of the GEMM rate"], rows)


if __name__ == "__main__":
    main()
