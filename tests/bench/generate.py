"""The same checkpoint, prompts and settings: our `generate` beside transformers', in alternation.

    python tests/bench/generate.py --model DIR [--prompts 64] [--batch_size 16] [--repeats 3]

Random prompts of 20 to 200 tokens, answers of at most 256, fp32 on the CPU. Every 64th id of the
vocabulary ends an answer, as a random model hardly ever does. transformers takes the prompts
batch_size at a time, padded on the left. Counted are the tokens up to and with the end token;
loading is left out. Prints a Markdown table of medians. Needs requirements-dev.txt.
"""

import random
import statistics
import time
from unittest import mock

import torch
import transformers

import common
from common import qwen

SAMPLING = {"temperature": 0.7, "top_p": 0.8, "top_k": 20}


def run_ours(model, prompts, end, a, seed):
    """(tokens, steps)."""
    seeds = [seed * len(prompts) + i for i in range(len(prompts))]
    with mock.patch.object(qwen, "sample", wraps=qwen.sample) as sample:
        sampling = qwen.Sampling(max_tokens=a.max_tokens, **SAMPLING)
        answers = list(qwen.generate(model, prompts, seeds, sampling, end, a.batch_size))
    return sum(len(ids) + ended for _, ids, ended in answers), sample.call_count


def run_transformers(hf, prompts, end, a, seed):
    """(tokens, steps)."""
    torch.manual_seed(seed)
    count, steps = 0, 0
    for start in range(0, len(prompts), a.batch_size):
        part = prompts[start:start + a.batch_size]
        width = max(map(len, part))
        tokens = torch.tensor([[0] * (width - len(p)) + p for p in part])
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in part])
        out = hf.generate(tokens, attention_mask=mask, max_new_tokens=a.max_tokens, do_sample=True,
                          eos_token_id=sorted(end), pad_token_id=0, **SAMPLING)[:, width:].tolist()
        for row in out:
            count += next((i + 1 for i, token in enumerate(row) if token in end), len(row))
        steps += len(out[0])
    return count, steps


def main():
    a = common.options(__doc__, ("model",), prompts=64, batch_size=16, max_tokens=256, repeats=3)
    ours = qwen.load_model(a.model, torch.float32)
    hf = transformers.AutoModelForCausalLM.from_pretrained(a.model, dtype=torch.float32).eval()
    rng, vocab = random.Random(0), ours.config.vocab_size
    prompts = [[rng.randrange(vocab) for _ in range(rng.randint(20, 200))]
               for _ in range(a.prompts)]
    end = set(range(0, vocab, 64))
    sides = {"ours": (run_ours, ours), "transformers": (run_transformers, hf)}
    for run, model in sides.values():  # warm-up: any token ends an answer
        run(model, prompts[:a.batch_size], set(range(vocab)), a, 0)
    runs = {side: [] for side in sides}
    for seed in range(a.repeats):
        for side, (run, model) in sides.items():
            start = time.perf_counter()
            tokens, steps = run(model, prompts, end, a, seed)
            runs[side].append((tokens, steps, time.perf_counter() - start))
    rates = {side: statistics.median(n / s for n, _, s in runs[side]) for side in sides}
    rows = []
    for side in sides:
        tokens, steps, seconds = map(statistics.median, zip(*runs[side]))
        rows.append([side, rates[side], rates[side] / rates["transformers"], tokens / a.prompts,
                     steps, 1e3 * seconds / steps])
    common.table(["", "tokens/s", "to transformers", "mean tokens an answer", "steps",
                  "ms a step"], rows)


if __name__ == "__main__":
    main()
