"""All cores in one process, or shared out among 2, 4, ... ranks: `train.py` itself, in alternation.

    python tests/bench/ranks.py --model DIR --pairs FILE [--epochs 2] [--repeats 3]

On the CPU, also where there are GPUs. Timed are the optimizer steps, as metrics.jsonl has them; loading, the
reference pass and saving are left out. The ratio is what is left of one process's speed: gradients and
gathered weights pass from rank to rank, and the longest share of a batch is waited for. Prints a Markdown
table of medians over all epochs of all repeats.
"""

import os
import statistics
import subprocess
import sys
import tempfile
from collections import Counter

import common


def measure(a, ranks):
    """Seconds of each epoch of a run."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    options = {name: getattr(a, name) for name in ("model", "pairs", "epochs", "batch_size", "dtype")}
    options |= {"checkpointing": "none", "tokens_per_pack": 4096, "max_change_ratio": 1, "save_every": 0}
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, *(launcher if ranks > 1 else []), os.path.join(common.ROOT, "train.py"),
                   "--out", os.path.join(folder, "run")]
        command += [part for name, value in options.items() for part in (f"--{name}", str(value))]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            sys.exit(done.stderr)
        seconds = Counter()
        for row in common.data.read_log(os.path.join(folder, "run", "metrics.jsonl")):
            seconds[row["epoch"]] += row["tokens"] / row["tokens_per_s"]
    return list(seconds.values())


def main():
    p = common.parser(__doc__)
    p.add_argument("--model", required=True, help="checkpoint folder")
    p.add_argument("--pairs", required=True, help="pair file")
    p.add_argument("--epochs", type=int, default=2, help="of each run [2]")
    p.add_argument("--batch_size", type=int, default=8, help="pairs a step [8]")
    p.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"), help="[float32]")
    p.add_argument("--repeats", type=int, default=3, help="runs of each number of ranks [3]")
    a = p.parse_args()
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    cores = len(os.sched_getaffinity(0))
    times = {2**i: [] for i in range(cores.bit_length())}  # 1, 2, 4, ... up to the cores
    for _ in range(a.repeats):
        for ranks, seconds in times.items():
            seconds += measure(a, ranks)
    rows = [[ranks, cores // ranks, statistics.median(seconds), f"{min(seconds):.2f} to {max(seconds):.2f}",
             statistics.median(times[1]) / statistics.median(seconds)] for ranks, seconds in times.items()]
    common.table(["ranks", "threads each", "s an epoch", "from .. to", "speed to one process"], rows)


if __name__ == "__main__":
    main()
