"""What the benchmarks share: options, a process of its own for each measurement (so that peak
memory is its own), a run of the real training step on random weights and made-up pairs, the
machine's rate of products, tables."""

import argparse
import multiprocessing
import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor

import torch

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
sys.path[:0] = [ROOT, os.path.join(ROOT, "tests")]

import data  # noqa: E402
import model as qwen  # noqa: E402
import train  # noqa: E402


def options(doc, required=(), **defaults):
    """The command line: --NAME for what is required and for each default, of the default's type."""
    p = argparse.ArgumentParser(description=doc,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in required:
        p.add_argument(f"--{name}", required=True)
    for name, default in defaults.items():
        p.add_argument(f"--{name}", type=type(default), default=default, help=f"[{default}]")
    return p.parse_args()


def own_process(function, *args):
    """function(*args) in a new interpreter, its output on stderr: stdout is for the table."""
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, spawn, initializer=os.dup2, initargs=(2, 1)) as pool:
        return pool.submit(function, *args).result()


def config(hidden=512, layers=8, vocab=16384):
    """A Qwen3 shape in the proportions of the published ones, heads of 64, embeddings tied."""
    return qwen.Config(vocab_size=vocab, hidden_size=hidden, intermediate_size=3 * hidden,
                       num_hidden_layers=layers, num_attention_heads=hidden // 64,
                       num_key_value_heads=max(1, hidden // 128), head_dim=64, rms_norm_eps=1e-6,
                       rope_theta=1e6, tie_word_embeddings=True)


def make_pair(rng, vocab, prompt, length, share):
    """A fork of two answers, each `length` tokens with its prompt; the first `share` is common."""
    trunk = max(prompt, round(share * length))
    ids = [rng.integers(0, vocab, n) for n in (trunk, length - trunk, length - trunk)]
    return data.Fork(prompt, *ids, line=0)


@torch.no_grad()
def fill(policy):
    """Random weights as of a newborn model, sharded or not."""
    torch.manual_seed(0)
    for p in policy.parameters():
        local = qwen.rows_here(p)[0]
        local.copy_(torch.randn(local.shape, device=local.device) * 0.02 if p.ndim > 1 else 1.0)


def open_run(shape, forks, ranks, **options):
    """A train.Run on random weights, reference log-probs scored."""
    load = qwen.load_weights
    qwen.load_weights = lambda policy, _, device: fill(policy.to_empty(device=device))
    try:
        o = train.Options(**{"dtype": "float32", "checkpointing": "none", **options})
        policy = train.build_policy("", shape, o, ranks)
    finally:
        qwen.load_weights = load
    run = train.make_run(o, ranks, policy, forks, [])
    run.train_set.reference = train.score_all(run, run.train_set, "reference")
    run.step = 1  # step 0 insists on rewards of 0
    return run


def count_flops(config, pack) -> float:
    """FLOPs of forward + backward of one pack: products only, recomputation left out."""
    heads, groups = config.num_attention_heads, config.num_key_value_heads
    width = config.hidden_size
    layer = width * (config.head_dim * 2 * (heads + groups) + 3 * config.intermediate_size)
    visible = 0  # pairs of a query and a key that it sees
    for start, trunk_end, rejected_end, chosen_end in pack.spans:
        trunk = trunk_end - start
        for length in (trunk, rejected_end - trunk_end, chosen_end - rejected_end):
            visible += length * (length + 1) // 2
        visible += (chosen_end - trunk_end) * trunk
    attention = 2 * heads * config.head_dim * visible
    head = config.vocab_size * width * len(pack.rows)
    return 6.0 * (config.num_hidden_layers * (layer * len(pack.tokens) + attention) + head)


def gemm_rate(dtype, size=2048):
    """FLOP/s of a square product, the best of 10: what the hardware gives to the luckiest code."""
    a = torch.randn(size, size).to(dtype)
    best = float("inf")
    for _ in range(10):
        start = time.perf_counter()
        a @ a.T
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def peak_gb(anew=False):
    """Largest resident memory of this process in GB, so far or since the last call with `anew`."""
    if anew:
        with open("/proc/self/clear_refs", "w") as f:
            f.write("5")
    with open("/proc/self/status") as f:
        return next(int(line.split()[1]) for line in f if line.startswith("VmHWM")) * 1024 / 1e9


def table(head, rows):
    """Print a Markdown table; floats with four figures."""
    shown = [[f"{x:.4g}" if isinstance(x, float) else x for x in row] for row in rows]
    print(markdown(head, shown), flush=True)


def markdown(head, rows):
    """A Markdown table as text, of cells that are shown as they are."""
    lines = ["| " + " | ".join(map(str, row)) + " |" for row in (head, *rows)]
    return "\n".join([lines[0], "|---" * len(head) + "|", *lines[1:]])
