"""Correctness, then speed, on one CUDA GPU: one call, at most 9 minutes, nothing is downloaded.

    python tests/bench/gpu.py                           # or --parts attention,head
    python tests/bench/gpu.py --small                   # toy sizes on the CPU, about a minute

    attention     fork_attention against fp64 on the CPU; its kernels; lengths never seen before
    model         the same for log-probs and gradients of a whole model
    training      step 0 of train.py in bf16; a run stopped by SIGTERM and resumed
    narrow        an optimizer step of Qwen3-0.6B: tokens/s, MFU, memory, where the time goes
    wide          the same at Qwen3-8B's width, 12 layers of 36, which take some 110 GB
    transformers  the same step as a user of transformers writes it, on padded pairs
    head          linear_logps against full logits
    generation    greedy answers against full forwards on the CPU; tokens/s

All weights are random. Each part is a process of its own: an error or a timeout costs that part
alone. Figures are printed as they come, and in one Markdown table at the end. The exit code is 1
where a part failed or a figure is beyond its limit. GB are 1e9 bytes. Needs requirements-dev.txt.
"""

import argparse
import copy
import functools
import gc
import math
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter, namedtuple
from dataclasses import asdict, replace

import numpy as np
import torch
from safetensors.torch import load_file
from torch.profiler import profile

import common
import loss
import tiny
from common import ROOT, data, qwen, train

BF16, FP32, FP64 = torch.bfloat16, torch.float32, torch.float64
Sizes = namedtuple("Sizes", "device narrow wide length pairs")  # length: tokens of an answer
GPU = Sizes("cuda", qwen.Config(151936, 1024, 3072, 28, 16, 8, 128, 1e-6, 1e6, True),
            qwen.Config(151936, 4096, 12288, 12, 32, 8, 128, 1e-6, 1e6, False), 1500, 16)
TOY = qwen.Config(512, 64, 128, 2, 4, 2, 16, 1e-6, 1e6, True)
SMALL = Sizes("cpu", TOY, replace(TOY, tie_word_embeddings=False), 60, 4)


def seconds(run, *arguments) -> float:
    """Of one call, with the device waited for."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    run(*arguments)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def measure(step, batches):
    """(result of the first batch, mean seconds of the others, their peak GB; 0 on a CPU)."""
    first = step(batches[0])
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    took = [seconds(step, batch) for batch in batches[1:]]
    return first, sum(took) / len(took), torch.cuda.max_memory_allocated() / 1e9


def recorded(run, *arguments):
    """The profiler's events of one call."""
    with profile() as recorder:
        seconds(run, *arguments)
    return recorder.events()


# --- correctness ----------------------------------------------------------------------------------


def error(found, wanted) -> float:
    """The largest difference over the largest wanted number."""
    difference = found.detach().to(wanted.device, FP64) - wanted.detach()
    return float(difference.abs().max() / wanted.detach().abs().max())


def compare(device, report, run):
    """[output, *gradients] of run(device, dtype) against those in fp64 on the CPU."""
    wanted = run("cpu", FP64)
    for place, dtype, limit in (("cpu", FP32, 1e-5), (device, FP32, 1e-4), (device, BF16, 5e-2)):
        output, *gradients = map(error, run(place, dtype), wanted)
        report(f"{place}, {dtype}: relative error of the output", output, "", limit)
        report(f"{place}, {dtype}: of the gradients", max(gradients), "", limit)


def attention(sizes, report):
    # Branches of unequal lengths; without y-, one plain sequence; a trunk of one token.
    mixed = [(0, 300, 430, 517), (517, 900, 900, 900), (900, 901, 940, 1000)]
    numbers = [torch.randn(heads, 1000, 128).to(BF16) for heads in (8, 2, 2, 8)]

    def run(device, dtype, forks=mixed):
        *leaves, grad = (t.to(device, dtype) for t in numbers)
        leaves = [t.requires_grad_() for t in leaves]
        out = qwen.fork_attention(*leaves, forks)
        out.backward(grad)
        return out, *(t.grad for t in leaves)
    compare(sizes.device, report, run)
    ops = Counter(e.name.removeprefix("aten::") for e in recorded(run, sizes.device, BF16))
    used = ", ".join(f"{op} {n}" for op, n in sorted(ops.items()) if "attention" in op)
    report("operators in bf16 and their calls", used)
    if sizes.device == "cuda":  # a CPU computes in fp32, with masks
        flash = ("_flash_attention_forward", "_flash_attention_backward")
        report("flash operators that did not run", sum(op not in ops for op in flash), "", 0)
        report("masks made", ops["tril"], "", 0)
    # cuDNN's attention, which torch may prefer, builds a plan for each new length.
    for allowed in (True, False):
        torch.backends.cuda.enable_cudnn_sdp(allowed)
        took = sum(seconds(run, sizes.device, BF16, [(0, n, n + 9, 1000)]) for n in range(500, 510))
        report(f"a fork of a new length, cuDNN {allowed}", 1e2 * took, "ms")


def model(sizes, report):
    rng = np.random.default_rng(0)
    reference = qwen.Qwen3(qwen.Config(512, 256, 512, 4, 8, 2, 64, 1e-6, 1e6, True))
    common.fill(reference)
    reference.to(BF16)
    forks = [common.make_pair(rng, 512, n // 5, n, share=0.5) for n in (90, 160, 230)]
    forks[1] = replace(forks[1], rejected=forks[1].rejected[:0])
    pack = data.make_pack(forks, [0, 1, 2])
    grad = torch.randn(len(pack.rows))

    def run(device, dtype):
        own, p = copy.deepcopy(reference).to(device, dtype), pack.to(torch.device(device))
        rows = own(p.tokens, p.positions, p.forks, p.rows, p.targets)
        rows.backward(grad.to(rows))
        return rows, *(p.grad for p in own.parameters())
    compare(sizes.device, report, run)


def training(sizes, report):
    ranks, steps = qwen.open_ranks(600), 25
    with tempfile.TemporaryDirectory() as folder:
        given = ["--model", tiny.write_checkpoint(os.path.join(folder, "model")),
                 "--pairs", tiny.write_pairs(os.path.join(folder, "pairs.jsonl")),
                 "--batch_size", "8", "--lr", "1e-4", "--max_change_ratio", "1", "--epochs", "99",
                 "--max_steps", str(steps)]
        outs = [os.path.join(folder, name) for name in ("undisturbed", "repeated", "stopped")]
        for out in outs[:2]:
            train.train(train.parse_options([*given, "--out", out]), ranks)
        first = data.read_log(f"{outs[0]}/metrics.jsonl")[0]
        report("step 0: mean r+", abs(first["reward_chosen"]), "", 0)
        report("step 0: loss - 2 ln 2", abs(first["loss"] - 2 * math.log(2)), "nats", 1e-9)
        stopped = stop_a_run([*given, "--out", outs[2]], f"{outs[2]}/metrics.jsonl")
        report("steps until SIGTERM", stopped, f"of {steps}", steps - 1)
        train.train(train.parse_options([*given, "--out", outs[2], "--resume"]), ranks)
        base, *others = (load_file(os.path.join(train.whole_checkpoints(out)[-1],
                                                "shard_0.safetensors")) for out in outs)
    limit = None
    for name, other in zip(("repeated", "stopped and resumed"), others):
        largest = max(float((base[key] - other[key]).abs().max()) for key in base)
        report(f"{name}: difference of a weight or moment (0: to the bit)", largest, "", limit)
        limit = 10 * largest  # a GPU's atomics add in any order: as much is no fault of resuming
    qwen.close_ranks()


def stop_a_run(argv, log):
    """Start train.py, send SIGTERM once 5 lines are in its log; returns how many there are then."""
    process = subprocess.Popen([sys.executable, os.path.join(ROOT, "train.py"), *argv])
    while process.poll() is None and (not os.path.exists(log) or len(list(open(log))) < 5):
        time.sleep(0.005)
    process.send_signal(signal.SIGTERM)
    if process.wait() != 143:
        raise RuntimeError(f"exit code 143 expected after SIGTERM, found {process.returncode}")
    return len(list(open(log)))


# --- speed ----------------------------------------------------------------------------------------

# The first pattern that fits an operator, or one that it runs in, names the kind of its kernels.
KINDS = {"head": "_LinearLogps", "FSDP": "FSDP|c10d|nccl", "attention": "scaled_?dot|attention",
         "optimizer and clip": r"optimizer\.|_foreach|vector_norm",
         "products": r"aten::(mm|addmm|bmm)\b",
         "copies": r"aten::(copy_|cat|fill_|zero_|index_select)\b",
         "elementwise and sums": ""}


def open_run(sizes, config, count):
    """(train.Run in bf16, `count` batches of indices), with pairs of ever new lengths."""
    rng, pairs, forks = np.random.default_rng(0), sizes.pairs, []
    for _ in range(count * pairs):
        length = int(sizes.length * rng.uniform(0.5, 1.5))
        forks.append(common.make_pair(rng, config.vocab_size, length // 5, length, share=2 / 3))
    run = common.open_run(config, forks, qwen.open_ranks(600), dtype="bfloat16", batch_size=pairs)
    # Rewards of about N(0, 1): at 0 the trunk's gradients are 0, and products of zeros are faster.
    run.reference += 10 * torch.randn(len(forks), 2)
    return run, [list(range(i, i + pairs)) for i in range(0, len(forks), pairs)]


def narrow(sizes, report):
    """train.train_step on lengths never seen before, without and with recomputation."""
    config = sizes.narrow
    run, batches = open_run(sizes, config, 8)
    peak = train.peak_flops(run.ranks.device)
    train_step = functools.partial(train.train_step, run, lr=1e-6)
    count = sum(p.numel() for p in run.policy.parameters())
    report(f"parameters, {config.num_hidden_layers} layers", count / 1e9, "billions")
    for name, part in (("none", batches[:4]), ("full", batches[4:])):
        for block in run.policy.layers:
            block.checkpointing = name == "full"
        _, took, memory = measure(train_step, part)
        packs = [pack for batch in part[1:] for pack in run.packs(run.forks, batch)]
        tokens = [len(pack.tokens) for pack in packs]
        flops = sum(train.count_flops(config, pack) for pack in packs) / 3
        options = replace(run.o, checkpointing=name, gpus=1)
        planned = train.plan_memory(run.policy, options, max(tokens))
        name = f"checkpointing {name}"
        report(f"{name}: a step of {sizes.pairs} pairs", 1e3 * took, "ms")
        report(f"{name}: on lengths seen before", 1e3 * seconds(train_step, part[-1]), "ms")
        report(f"{name}: speed", sum(tokens) / 3 / took, "tokens/s")
        report(f"{name}: MFU", 100 * flops / took / peak, f"% of {peak / 1e12:.3g} TFLOP/s")
        report(f"{name}: peak memory", memory, "GB")
        report(f"{name}: planned memory", sum(planned.values()) / 1e9, "GB")
        for kind, spent in time_by_kind(recorded(train_step, part[-1])):
            report(f"{name}: {kind}", spent, "ms")
    qwen.close_ranks()


def wide(sizes, report):
    narrow(sizes._replace(narrow=sizes.wide), report)


def time_by_kind(events):
    """[(kind, ms)]: kernels by the operator that starts them; on a CPU operators."""
    times = Counter()
    for event in events:
        path, parent = event.name, event.cpu_parent
        while parent is not None:
            path, parent = f"{parent.name} {path}", parent.cpu_parent
        kind = next(k for k, pattern in KINDS.items() if re.search(pattern, path, re.IGNORECASE))
        spent = event.self_cpu_time_total
        if torch.cuda.is_available():  # a range of record_function is no kernel
            spent = sum(k.duration for k in event.kernels if k.name != event.name)
        times[kind] += spent / 1e3
    return times.most_common()


def transformers(sizes, report):
    from transformers import AutoModelForCausalLM, Qwen3Config

    run, batches = open_run(sizes, sizes.narrow, 5)
    forks, reference = run.forks, run.reference.to(sizes.device)
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
    """SPoT-BCE in bf16 autocast, `micro` pairs at a time, each side a forward; the mean loss."""
    total = 0.0
    for i in range(0, len(forks), micro):
        r = [0.1 * (padded_logps(hf, forks[i:i + micro], side) - given)
             for side, given in zip(("chosen", "rejected"), reference[i:i + micro].T)]
        mean = loss.spot_bce(*r).sum() / len(forks)
        mean.backward()
        total += mean.item()
    torch.nn.utils.clip_grad_norm_(hf.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    return total


def padded_logps(hf, forks, side):
    """Log-probs of one answer a pair: padded on the right, full logits, log_softmax, gather."""
    rows = [torch.from_numpy(np.concatenate([f.trunk, getattr(f, side)])).long() for f in forks]
    lengths = torch.tensor([[len(row)] for row in rows], device=hf.device)
    prompts = torch.tensor([[fork.prompt_length] for fork in forks], device=hf.device)
    tokens = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True).to(hf.device)
    place = torch.arange(tokens.shape[1], device=hf.device)
    mask = (place < lengths).long()
    with torch.autocast(hf.device.type, BF16):
        logits = hf(input_ids=tokens, attention_mask=mask, use_cache=False).logits[:, :-1]
    logps = logits.float().log_softmax(-1).gather(2, tokens[:, 1:, None]).squeeze(2)
    return (logps * (mask * (place >= prompts))[:, 1:]).sum(1)


def head(sizes, report):
    rows, vocab, width = 8192, sizes.wide.vocab_size, sizes.wide.hidden_size
    device, gradients = sizes.device, []
    hidden = torch.randn(rows, width, device=device, dtype=BF16, requires_grad=True)
    weight = (torch.randn(vocab, width, device=device, dtype=BF16) * width**-0.5).requires_grad_()
    targets = torch.randint(vocab, (rows,), device=device)

    def full_logits(hidden, weight, targets):
        return (hidden @ weight.T).float().log_softmax(-1).gather(1, targets[:, None])[:, 0]

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
    answers = qwen.generate(own, prompts, range(count), max_tokens=longest, temperature=0)
    for prompt, (ids, _) in zip(prompts, answers):
        with torch.no_grad():
            best = on_cpu.logits(torch.tensor(prompt + ids)).argmax(-1)
        wrong += best[len(prompt) - 1:-1].tolist() != ids
    report("greedy answers in fp32 unlike a full forward's on the CPU", wrong, f"of {count}", 0)

    own = qwen.Qwen3(sizes.narrow).to(sizes.device, BF16)
    common.fill(own)
    generate = functools.partial(qwen.generate, own, prompts, max_tokens=longest)
    generate(range(count))
    took = seconds(generate, range(count))
    report(f"{count} answers of {longest} tokens", count * longest / took, "tokens/s")


def report_line(part, what, value, unit="", limit=None):
    """Print a figure as a line of a Markdown table."""
    verdict = ""
    if limit is not None:
        verdict = f"at most {limit:g}: " + ("ok" if value <= limit else "WRONG")
    shown = f"{value:.4g}" if isinstance(value, float) else value
    print(f"| {part} | {what} | {shown} | {unit} | {verdict} |", flush=True)


def main() -> int:
    parts = {part.__name__: part for part in (attention, model, training, narrow, wide,
                                              transformers, head, generation)}
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--parts", default=",".join(parts), help="which, separated by commas [all]")
    p.add_argument("--small", action="store_true", help="toy sizes on the CPU")
    p.add_argument("--part", choices=parts, help=argparse.SUPPRESS)  # how this starts itself
    a = p.parse_args()
    if a.part:
        torch.manual_seed(0)
        parts[a.part](SMALL if a.small else GPU, functools.partial(report_line, a.part))
        return 0
    if a.small:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    elif not torch.cuda.is_available():
        p.error("no CUDA GPU here; --small runs the same code on the CPU at toy sizes")
    stop, lines, failed = time.time() + 530, [], []
    for name in a.parts.split(","):
        start = time.time()
        command = ["timeout", "-s", "KILL", f"{max(1, min(150, stop - start)):.0f}",
                   sys.executable, os.path.abspath(__file__), "--part", name]
        if a.small:
            command.append("--small")
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        for line in process.stdout:
            print(line, end="", flush=True)
            lines.append(line)
        if process.wait():
            failed.append(f"{name} (exit code {process.returncode})")
        print(f"{name}: {time.time() - start:.0f} s", flush=True)
    text = "".join(lines)
    card = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    print(f"\n{time.strftime('%Y-%m-%d')}, {card}, torch {torch.__version__}, CUDA "
          f"{torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}\n\n"
          f"| part | what | value | unit | limit |\n|---|---|---|---|---|\n{text}\n"
          f"failed parts: {', '.join(failed) or 'none'}; wrong figures: {text.count('WRONG')}")
    return int(bool(failed) or "WRONG" in text)


if __name__ == "__main__":
    qwen.leave(main)
