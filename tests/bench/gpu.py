"""Correctness, then speed, on one CUDA GPU: one call, at most 9 minutes, nothing is downloaded.

    python tests/bench/gpu.py                           # or --parts model,head
    python tests/bench/gpu.py --small                   # toy sizes on the CPU, about a minute

    model         log-probs and gradients against fp64 on the CPU; attention's kernels
    training      step 0 of train.py in bf16; a run stopped and resumed
    narrow        an optimizer step of Qwen3-0.6B: tokens/s, MFU, memory; its kernels on stderr
    wide          the same at Qwen3-8B's width, 12 layers of 36, which take some 110 GB
    transformers  the same step as a user of transformers writes it, on padded pairs
    head          linear_logps against full logits
    generation    greedy answers against full forwards on the CPU; tokens/s

All weights are random. Each part is a process of its own: an error or a timeout costs that part
alone. Each figure is a row of a Markdown table on stdout; all else goes to stderr. The exit code is
1 where a part failed or a figure is beyond its limit. Needs requirements-dev.txt.
"""

import argparse
import copy
import functools
import gc
import math
import multiprocessing
import os
import sys
import tempfile
import time
from collections import namedtuple
from dataclasses import asdict, replace

import numpy as np
import torch
from safetensors.torch import load_file
from torch.profiler import profile

import common
import loss
import tiny
from common import data, qwen, train
from parts import full_logits

BF16, FP32, FP64 = torch.bfloat16, torch.float32, torch.float64
PEAKS = {"H100": 989e12, "H200": 989e12, "H800": 989e12, "A100": 312e12, "A800": 312e12,
         "B200": 2250e12}
Sizes = namedtuple("Sizes", "device narrow wide length pairs")  # length: tokens of an answer
GPU = Sizes("cuda", qwen.Config(151936, 1024, 3072, 28, 16, 8, 128, 1e-6, 1e6, True),
            qwen.Config(151936, 4096, 12288, 12, 32, 8, 128, 1e-6, 1e6, False), 1500, 16)
TOY = qwen.Config(512, 64, 128, 2, 4, 2, 16, 1e-6, 1e6, True)
SMALL = Sizes("cpu", TOY, replace(TOY, tie_word_embeddings=False), 60, 4)


def seconds(run, *arguments) -> float:
    """Of one call, with the device waited for."""
    wait = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    wait()
    start = time.perf_counter()
    run(*arguments)
    wait()
    return time.perf_counter() - start


def measure(step, batches):
    """(result of the first batch, mean seconds of the others, their peak GB; 0 on a CPU)."""
    first = step(batches[0])
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    took = [seconds(step, batch) for batch in batches[1:]]
    return first, sum(took) / len(took), torch.cuda.max_memory_allocated() / 1e9


def recorded(run, *arguments):
    """The profiler's sums by operator over one call."""
    with profile() as recorder:
        seconds(run, *arguments)
    return recorder.key_averages()


# --- correctness ----------------------------------------------------------------------------------


def error(found, wanted) -> float:
    """The largest difference over the largest wanted number."""
    difference = found.detach().to(wanted.device, FP64) - wanted.detach()
    return float(difference.abs().max() / wanted.detach().abs().max())


def model(sizes, report):
    rng = np.random.default_rng(0)
    reference = qwen.Qwen3(qwen.Config(512, 256, 512, 4, 8, 2, 128, 1e-6, 1e6, True))
    common.fill(reference)
    reference.to(BF16)
    forks = [common.make_pair(rng, 512, prompt, n, share=0.5)
             for prompt, n in ((18, 90), (32, 160), (200, 230), (1, 2))]
    forks[1] = replace(forks[1], rejected=forks[1].rejected[:0])
    pack = data.make_pack(forks, range(4))
    grad = torch.randn(len(pack.rows))

    def run(device, dtype):
        own, p = copy.deepcopy(reference).to(device, dtype), pack.to(torch.device(device))
        rows = own(p.tokens, p.positions, p.spans, p.rows, p.targets)
        rows.backward(grad.to(rows))
        return rows, *(p.grad for p in own.parameters())
    wanted = run("cpu", FP64)
    for device, dtype, limit in (("cpu", FP32, 1e-5), (sizes.device, FP32, 1e-4),
                                 (sizes.device, BF16, 5e-2)):
        output, *gradients = map(error, run(device, dtype), wanted)
        report(f"{device}, {dtype}: relative error of the log-probs", output, "", limit)
        report(f"{device}, {dtype}: of the gradients", max(gradients), "", limit)
    calls = {e.key.removeprefix("aten::"): e.count for e in recorded(run, sizes.device, BF16)}
    used = ", ".join(f"{op} {n}" for op, n in sorted(calls.items()) if "attention" in op)
    report("operators in bf16 and their calls", used)
    if sizes.device == "cuda":  # a CPU computes in fp32, with masks
        flash = ("_flash_attention_forward", "_flash_attention_backward")
        report("flash operators that did not run", sum(op not in calls for op in flash), "", 0)
        report("masks made", calls.get("tril", 0), "", 0)


def training(sizes, report):
    ranks = qwen.open_ranks(600)
    with tempfile.TemporaryDirectory() as folder:
        given = ["--model", tiny.write_checkpoint(f"{folder}/model"), "--template", "hybrid",
                 "--pairs", tiny.write_pairs(f"{folder}/pairs.jsonl"), "--lr", "1e-4",
                 "--batch_size", "8",
                 "--max_change_ratio", "1", "--epochs", "9", "--max_steps", "25"]
        outs = [f"{folder}/{name}" for name in ("undisturbed", "repeated", "stopped")]
        train.STOP.set()  # as SIGTERM does: the first step is the last one
        stopped = train.train(train.parse_options([*given, "--out", outs[2]]), ranks)
        train.STOP.clear()
        report("exit code of a stopped run, to 143", abs(stopped - 143), "", 0)
        for out in outs:
            train.train(train.parse_options([*given, "--out", out, "--resume"]), ranks)
        first = data.read_log(f"{outs[0]}/metrics.jsonl")[0]
        report("step 0: mean r+", abs(first["reward_chosen"]), "", 0)
        report("step 0: loss - 2 ln 2", abs(first["loss"] - 2 * math.log(2)), "nats", 1e-9)
        base, *others = (load_file(f"{train.whole_checkpoints(out)[-1]}/shard_0.safetensors")
                         for out in outs)
    limit = None
    for name, other in zip(("repeated", "stopped and resumed"), others):
        largest = max(float((base[key] - other[key]).abs().max()) for key in base)
        report(f"{name}: difference of a weight or moment (0: to the bit)", largest, "", limit)
        limit = 10 * largest  # a GPU's atomics add in any order: as much is no fault of resuming
    qwen.close_ranks()


# --- speed ----------------------------------------------------------------------------------------

def open_run(sizes, config, count):
    """(train.Run in bf16, `count` batches of indices), with pairs of ever new lengths."""
    rng, pairs, forks = np.random.default_rng(0), sizes.pairs, []
    for _ in range(count * pairs):
        length = int(sizes.length * rng.uniform(0.5, 1.5))
        forks.append(common.make_pair(rng, config.vocab_size, length // 5, length, share=2 / 3))
    run = common.open_run(config, forks, qwen.open_ranks(600), dtype="bfloat16", batch_size=pairs)
    # Rewards of about N(0, 1): at 0 the trunk's gradients are 0, and products of zeros are faster.
    run.train_set.reference += 10 * torch.randn(len(forks), 2)
    return run, [list(range(i, i + pairs)) for i in range(0, len(forks), pairs)]


def peak_flops(device):
    """Dense bf16 peak of this GPU in FLOP/s; infinite where it is not known."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return next((peak for card, peak in PEAKS.items() if card in name), math.inf)


def narrow(sizes, report):
    """train.train_step on lengths never seen before, without and with recomputation."""
    run, batches = open_run(sizes, sizes.narrow, 8)
    peak = peak_flops(run.ranks.device)
    train_step = functools.partial(train.train_step, run, lr=1e-6)
    report("parameters", sum(p.numel() for p in run.policy.parameters()) / 1e9, "billions")
    for name, part in (("none", batches[:4]), ("full", batches[4:])):
        for block in run.policy.layers:
            block.checkpointing = name == "full"
        _, took, memory = measure(train_step, part)
        packs = [pack for batch in part[1:] for pack in run.packs(run.train_set, batch)]
        tokens = [len(pack.tokens) for pack in packs]
        flops = sum(common.count_flops(sizes.narrow, pack) for pack in packs) / 3
        options = replace(run.o, checkpointing=name, gpus=1)
        planned = train.plan_memory(run.policy, options, max(tokens))
        name = f"checkpointing {name}"
        report(f"{name}: a step of {sizes.pairs} pairs", 1e3 * took, "ms")
        report(f"{name}: speed", sum(tokens) / 3 / took, "tokens/s")
        report(f"{name}: MFU", 100 * flops / took / peak, f"% of {peak / 1e12:.3g} TFLOP/s")
        report(f"{name}: peak memory", memory, "GB")
        report(f"{name}: planned memory", sum(planned.values()) / 1e9, "GB")
        longest = f"self_{sizes.device}_time_total"
        print(recorded(train_step, part[-1]).table(longest, row_limit=25), file=sys.stderr)
    qwen.close_ranks()


def wide(sizes, report):
    narrow(sizes._replace(narrow=sizes.wide), report)


def transformers(sizes, report):
    from transformers import AutoModelForCausalLM, Qwen3Config

    run, batches = open_run(sizes, sizes.narrow, 5)
    forks, reference = run.train_set.forks, run.train_set.reference.to(sizes.device)
    weights = {qwen.hf_name(name): p.detach().full_tensor().cpu()
               for name, p in run.policy.named_parameters()}
    train_step = functools.partial(train.train_step, run, lr=1e-6)
    totals, ours, memory = measure(train_step, batches)
    expected = loss.average(totals.values(), "spot-bce")["loss"]
    report("ours: a step", 1e3 * ours, "ms")
    report("ours: peak memory", memory, "GB")
    del run, train_step
    gc.collect()
    torch.cuda.empty_cache()
    shape = Qwen3Config(**asdict(sizes.narrow))
    hf = AutoModelForCausalLM.from_config(shape, dtype=FP32, attn_implementation="sdpa")
    hf.load_state_dict(weights, strict=False)  # but for the tied head, which is the embedding
    hf.to(sizes.device).train()
    optimizer = torch.optim.AdamW(hf.parameters(), lr=1e-6, betas=(0.9, 0.95), fused=True)
    first, theirs, memory = measure(lambda batch: padded_step(
        hf, optimizer, [forks[i] for i in batch], reference[batch]), batches)
    report("transformers: first loss, to ours", abs(first - expected), "nats", 0.1)
    report("transformers: a step", 1e3 * theirs, "ms")
    report("transformers: peak memory", memory, "GB")
    report("transformers: time, to ours", theirs / ours, "times")
    qwen.close_ranks()


def padded_step(hf, optimizer, forks, reference, micro=4):
    """SPoT-BCE in bf16 autocast, `micro` pairs at a time; the mean loss."""
    total = 0.0
    for i in range(0, len(forks), micro):
        logps = padded_logps(hf, forks[i:i + micro])
        rewards = 0.1 * (logps - reference[i:i + micro])
        mean = loss.spot_bce(*rewards.T).sum() / len(forks)
        mean.backward()
        total += mean.item()
    torch.nn.utils.clip_grad_norm_(hf.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    return total


def padded_logps(hf, forks):
    """(pairs, 2) log-probs of the chosen and the rejected answers: padded on the right, full
    logits, log_softmax, gather."""
    rows = [torch.from_numpy(np.concatenate([f.trunk, branch])).long()
            for f in forks for branch in (f.chosen, f.rejected)]
    lengths = torch.tensor([[len(row)] for row in rows], device=hf.device)
    prompts = torch.tensor([[f.prompt_length] for f in forks for _ in range(2)], device=hf.device)
    tokens = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True).to(hf.device)
    place = torch.arange(tokens.shape[1], device=hf.device)
    mask = (place < lengths).long()
    with torch.autocast(hf.device.type, BF16):
        logits = hf(input_ids=tokens, attention_mask=mask, use_cache=False).logits[:, :-1]
    logps = logits.float().log_softmax(-1).gather(2, tokens[:, 1:, None]).squeeze(2)
    return (logps * (mask * (place >= prompts))[:, 1:]).sum(1).view(-1, 2)


def head(sizes, report):
    rows, vocab, width = 8192, sizes.wide.vocab_size, sizes.wide.hidden_size
    device, gradients = sizes.device, []
    hidden = torch.randn(rows, width, device=device, dtype=BF16, requires_grad=True)
    weight = (torch.randn(vocab, width, device=device, dtype=BF16) * width**-0.5).requires_grad_()
    targets = torch.randint(vocab, (rows,), device=device)

    def run(logps):
        hidden.grad = weight.grad = None
        logps(hidden, weight, targets).sum().backward()
    for logps in (full_logits, loss.linear_logps):
        _, took, memory = measure(run, [logps] * 6)
        report(f"{logps.__name__}, {rows} x {vocab} x {width}", 1e3 * took, "ms")
        report(f"{logps.__name__}: peak memory with inputs and gradients", memory, "GB")
        gradients.append((hidden.grad.cpu(), weight.grad[:4096].cpu()))
    report("relative error of the gradients", max(map(error, *gradients)), "", 2e-2)


def generation(sizes, report):
    rng, count, longest, wrong = np.random.default_rng(0), sizes.pairs, 4 * sizes.pairs, 0
    with tempfile.TemporaryDirectory() as folder:
        tiny.write_checkpoint(folder)
        on_cpu, own = (qwen.load_model(folder, FP32, place) for place in ("cpu", sizes.device))
    prompts = [rng.integers(265, size=n).tolist() for n in rng.integers(5, 200, size=count)]
    answers = tiny.generate(own, prompts, range(count), max_tokens=longest, temperature=0)
    for prompt, (ids, _) in zip(prompts, answers):
        with torch.no_grad():
            best = tiny.logits(on_cpu, torch.tensor(prompt + ids)).argmax(-1)
        wrong += best[len(prompt) - 1:-1].tolist() != ids
    report("greedy answers in fp32 unlike a full forward's on the CPU", wrong, f"of {count}", 0)

    own = qwen.Qwen3(sizes.narrow).to(sizes.device, BF16)
    common.fill(own)
    generate = functools.partial(tiny.generate, own, prompts, max_tokens=longest)
    generate(range(count))
    took = seconds(generate, range(count))
    report(f"{count} answers of {longest} tokens", count * longest / took, "tokens/s")


# --- one process a part ---------------------------------------------------------------------------

PARTS = {part.__name__: part for part in (model, training, narrow, wide, transformers, head,
                                          generation)}


def run_part(name, sizes):
    """Print a part's figures as rows of a Markdown table; exit code 1 where one is wrong."""
    wrong = []

    def report(what, value, unit="", limit=None):
        verdict = ""
        if limit is not None:
            verdict = f"at most {limit:g}: ok"
            if not value <= limit:
                verdict = f"at most {limit:g}: WRONG"
                wrong.append(what)
        shown = f"{value:.4g}" if isinstance(value, float) else value
        print(f"| {name} | {what} | {shown} | {unit} | {verdict} |", flush=True)
    torch.manual_seed(0)
    PARTS[name](sizes, report)
    sys.exit(bool(wrong))


def main() -> int:
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--parts", default=",".join(PARTS), help="which, separated by commas [all]")
    p.add_argument("--small", action="store_true", help="toy sizes on the CPU")
    a = p.parse_args()
    if a.small:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    elif not torch.cuda.is_available():
        p.error("no CUDA GPU here; --small runs the same code on the CPU at toy sizes")
    print("| part | what | value | unit | limit |\n|---|---|---|---|---|", flush=True)
    spawn, end, failed = multiprocessing.get_context("spawn"), time.time() + 530, []
    for name in a.parts.split(","):
        start = time.time()
        process = spawn.Process(target=run_part, args=(name, SMALL if a.small else GPU))
        process.start()
        process.join(max(1, min(150, end - start)))
        process.kill()
        process.join()
        if process.exitcode:
            failed.append(name)
        print(f"{name}: {time.time() - start:.0f} s", file=sys.stderr)
    card = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    print(f"\n{time.strftime('%Y-%m-%d')}, {card}, torch {torch.__version__}, CUDA "
          f"{torch.version.cuda}; failed parts: {', '.join(failed) or 'none'}")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
