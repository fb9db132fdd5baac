"""What the benchmarks share: a run of the real training step on random weights and made-up pairs, a process
of its own for each measurement (so that peak memory is its own), the machine's rate of products, tables."""

import argparse
import json
import os
import subprocess
import sys
import time

import numpy as np
import torch

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
sys.path[:0] = [ROOT, os.path.join(ROOT, "tests")]

import data  # noqa: E402
import model as qwen  # noqa: E402
import train  # noqa: E402


def config(hidden=512, layers=8, vocab=16384, tied=True):
    """A Qwen3 shape in the proportions of the published ones, heads of 64."""
    return qwen.Config(vocab_size=vocab, hidden_size=hidden, intermediate_size=3 * hidden,
                       num_hidden_layers=layers, num_attention_heads=hidden // 64,
                       num_key_value_heads=max(1, hidden // 128), head_dim=64, rms_norm_eps=1e-6,
                       rope_theta=1e6, tie_word_embeddings=tied)


def make_pair(rng, vocab, prompt, length, share):
    """A fork of two answers, each `length` tokens with its prompt, of which the first `share` are common."""
    trunk = max(prompt, round(share * length))
    ids = [rng.integers(0, vocab, n) for n in (trunk, length - trunk, length - trunk)]
    return data.Fork(prompt, *ids, line=0)


def unshared(fork):
    """The same two answers as two plain sequences."""
    prompt, rest = np.split(fork.trunk, [fork.prompt_length])
    return [data.Fork(len(prompt), prompt, prompt[:0], np.concatenate([rest, branch]), line=0)
            for branch in (fork.chosen, fork.rejected)]


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
    run = train.Run(o, ranks, shape, "", forks, [], policy, train.make_optimizer(policy, o))
    batches = data.epoch_batches(len(forks), o.batch_size, 0, 0)
    run.reference = train.score_all(run, forks, batches, "reference")
    run.state.step = 1  # step 0 insists on rewards of 0
    return run


def gemm_rate(dtype, device="cpu", size=2048):
    """FLOP/s of a square product, the best of 10: what the hardware gives to the luckiest code."""
    a = torch.randn(size, size, device=device).to(dtype)
    best = float("inf")
    for _ in range(10):
        start = time.perf_counter()
        b = a @ a.T
        if b.is_cuda:
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def peak_gb(anew=False):
    """Largest resident memory of this process in GB, so far or since the last call with `anew`."""
    if anew:
        with open("/proc/self/clear_refs", "w") as f:
            f.write("5")
    with open("/proc/self/status") as f:
        return next(int(line.split()[1]) for line in f if line.startswith("VmHWM")) * 1024 / 1e9


def parser(doc):
    """An argument parser that shows the script's docstring; --settings is how `child` calls back."""
    p = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--settings", help=argparse.SUPPRESS)
    return p


def child(script, **settings):
    """Run `python script --settings JSON`, which prints its figures as one last line of JSON."""
    done = subprocess.run([sys.executable, os.path.abspath(script), "--settings", json.dumps(settings)],
                          capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def table(head, rows):
    """A Markdown table; floats with four figures."""
    cell = lambda x: f"{x:.4g}" if isinstance(x, float) else str(x)  # noqa: E731
    print("| " + " | ".join(head) + " |\n" + "|---" * len(head) + "|")
    for row in rows:
        print("| " + " | ".join(map(cell, row)) + " |", flush=True)


def markdown(head, rows):
    """A Markdown table as text, of cells that are shown as they are."""
    lines = ["| " + " | ".join(map(str, row)) + " |" for row in (head, *rows)]
    return "\n".join([lines[0], "|---" * len(head) + "|", *lines[1:]])
