"""The same checkpoint, prompts and settings: our `generate` beside transformers', in alternation.

    python tests/bench/generate.py --model DIR [--prompts 64] [--batch_size 16] [--repeats 3]

Random prompts of 20 to 200 tokens, answers of at most 256, temperature 0.7, top-p 0.8, top-k 20. A random
model hardly ever ends by itself, so every 64th id of the vocabulary ends an answer, on both sides.
transformers takes the prompts batch_size at a time, padded on the left. Counted are the tokens sampled up to
and with the end token; loading is left out. Prints a Markdown table of medians, then where our time goes next
to the floor: the products of one step at full batch, by themselves. Needs requirements-dev.txt.
"""

import argparse
import os
import random
import statistics
import sys
import time
from unittest import mock

import torch

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
sys.path.insert(0, ROOT)
SETTINGS = {"temperature": 0.7, "top_p": 0.8, "top_k": 20}


def run_ours(model, prompts, end, a, seed):
    import model as qwen

    seeds = [seed * len(prompts) + i for i in range(len(prompts))]
    with mock.patch.object(qwen, "sample", wraps=qwen.sample) as steps:
        done = qwen.generate(model, prompts, seeds, max_tokens=a.max_tokens, end=end,
                             batch_size=a.batch_size, **SETTINGS)
    return [len(ids) + ended for ids, ended in done], steps.call_count


def run_transformers(hf, prompts, end, a, seed):
    torch.manual_seed(seed)
    lengths, steps = [], 0
    for start in range(0, len(prompts), a.batch_size):
        part = prompts[start:start + a.batch_size]
        width = max(map(len, part))
        tokens = torch.tensor([[0] * (width - len(p)) + p for p in part], device=hf.device)
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in part], device=hf.device)
        out = hf.generate(tokens, attention_mask=mask, max_new_tokens=a.max_tokens, do_sample=True,
                          eos_token_id=sorted(end), pad_token_id=0, **SETTINGS)[:, width:].tolist()
        for row in out:
            lengths.append(next((i + 1 for i, token in enumerate(row) if token in end), len(row)))
        steps += len(out[0])
    return lengths, steps


@torch.no_grad()
def floor(model, rows):
    """Seconds of one step's matrix products alone: (blocks, head), each the best of 10."""
    weights = [p for p in model.layers.parameters() if p.ndim == 2]
    head = model.head_weight()
    inputs = {w.shape[1]: torch.randn(rows, w.shape[1]).to(w) for w in [*weights, head]}
    best = []
    for some in (weights, [head]):
        times = []
        for _ in range(10):
            start = time.perf_counter()
            for w in some:
                w @ inputs[w.shape[1]].T
            if w.is_cuda:
                torch.cuda.synchronize()
            times.append(time.perf_counter() - start)
        best.append(min(times))
    return best


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="checkpoint folder")
    parser.add_argument("--prompts", type=int, default=64, help="how many [64]")
    parser.add_argument("--batch_size", type=int, default=16, help="samples at a time [16]")
    parser.add_argument("--max_tokens", type=int, default=256, help="longest answer [256]")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each side [3]")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"), help="[float32]")
    parser.add_argument("--device", default="cpu", help="[cpu]")
    a = parser.parse_args()

    import transformers

    import model as qwen

    dtype = getattr(torch, a.dtype)
    ours = qwen.load_model(a.model, dtype, a.device)
    hf = transformers.AutoModelForCausalLM.from_pretrained(a.model, dtype=dtype).to(a.device).eval()
    rng = random.Random(0)
    vocab = ours.config.vocab_size
    prompts = [[rng.randrange(vocab) for _ in range(rng.randint(20, 200))] for _ in range(a.prompts)]
    end = set(range(0, vocab, 64))
    sides = {"ours": (run_ours, ours), f"transformers {transformers.__version__}": (run_transformers, hf)}
    for run, model in sides.values():  # warm-up
        run(model, prompts[:a.batch_size], end, argparse.Namespace(**{**vars(a), "max_tokens": 8}), 0)
    results = {side: [] for side in sides}
    for repeat in range(a.repeats):
        for side, (run, model) in sides.items():
            start = time.perf_counter()
            lengths, steps = run(model, prompts, end, a, repeat)
            results[side].append((time.perf_counter() - start, sum(lengths), steps))
    rates = {side: statistics.median(n / s for s, n, _ in runs) for side, runs in results.items()}
    print("| | tokens/s | to transformers | mean tokens an answer | steps | ms a step |")
    print("|---|---|---|---|---|---|")
    for side, runs in results.items():
        seconds, tokens, steps = (statistics.median(x) for x in zip(*runs))
        print(f"| {side} | {rates[side]:.1f} | {rates[side] / rates[list(sides)[1]]:.2f} "
              f"| {tokens / a.prompts:.1f} | {steps:.0f} | {1e3 * seconds / steps:.1f} |")
    blocks, head = floor(ours, a.batch_size)
    print(f"\nproducts of one step of {a.batch_size} rows alone: blocks {1e3 * blocks:.1f} ms, "
          f"head {1e3 * head:.1f} ms")


if __name__ == "__main__":
    main()
