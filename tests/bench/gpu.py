"""Correctness, then speed, on one CUDA GPU: one call, at most 9 minutes, nothing is downloaded.

    python tests/bench/gpu.py                              # all parts
    python tests/bench/gpu.py --parts attention,head       # some of them
    python tests/bench/gpu.py --small                      # toy sizes on the CPU, about a minute

    attention     fork_attention against a dense masked softmax; its kernels; lengths seen first
    model         log-probs and gradients of a whole model against fp64 on the CPU
    training      step 0 of train.py in bf16; a run stopped by SIGTERM and resumed
    narrow        an optimizer step of Qwen3-0.6B: tokens/s, MFU, memory, where the time goes
    wide          the same at Qwen3-8B's width, with as many layers as fit (16 at most)
    transformers  the same step as a user of transformers writes it, on padded pairs
    head          linear_logps against full logits
    generation    greedy against full forwards on the CPU; tokens/s beside transformers

All weights are random. Each part is a process of its own: an error or a timeout costs that part
alone. Figures are printed as they come, and in one Markdown table at the end. The exit code is 1
where a part failed or a figure is beyond its limit. A relative error is the largest difference
over the largest number of the reference. GB are 1e9 bytes. Needs requirements-dev.txt.
"""

import argparse
import copy
import gc
import math
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter
from dataclasses import asdict, dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch.profiler import ProfilerActivity, profile

import common
import generate as generation_bench
from common import ROOT, data, qwen, train

sys.path.insert(0, os.path.join(ROOT, "tests"))

import loss  # noqa: E402
import tiny  # noqa: E402

BF16, FP32, FP64 = torch.bfloat16, torch.float32, torch.float64


@dataclass
class Sizes:
    device: str
    narrow: qwen.Config
    wide: qwen.Config
    exact: qwen.Config  # of the model that is compared with the CPU's
    pack: int  # tokens of one at most
    pairs: int  # of a step
    length: int  # tokens of prompt + one answer, on average
    steps: int  # timed
    product: int  # width of a square product
    head: tuple  # rows, vocabulary, width
    answers: tuple  # how many, tokens of one at most


GPU = Sizes("cuda", qwen.Config(151936, 1024, 3072, 28, 16, 8, 128, 1e-6, 1e6, True),
            qwen.Config(151936, 4096, 12288, 16, 32, 8, 128, 1e-6, 1e6, False),
            qwen.Config(8192, 512, 1024, 4, 8, 4, 128, 1e-6, 1e6, True), pack=16384, pairs=16,
            length=1500, steps=4, product=8192, head=(8192, 151936, 4096), answers=(32, 128))
TOY = qwen.Config(512, 64, 128, 2, 4, 2, 16, 1e-6, 1e6, True)
SMALL = Sizes("cpu", TOY, replace(TOY, tie_word_embeddings=False), TOY, pack=512, pairs=4,
              length=100, steps=2, product=512, head=(256, 4096, 64), answers=(8, 16))


# --- time, memory, errors, pairs ------------------------------------------------------------------


def seconds(run, *arguments) -> float:
    """Of one call, with the device waited for."""
    wait = torch.cuda.synchronize if torch.cuda.is_available() else int
    wait()
    start = time.perf_counter()
    run(*arguments)
    wait()
    return time.perf_counter() - start


def peak_gb(anew=False) -> float:
    """Peak memory of the GPU, else of the process, so far or since the last call with `anew`."""
    if not torch.cuda.is_available():
        return common.peak_gb(anew)
    if anew:
        torch.cuda.reset_peak_memory_stats()
    return torch.cuda.max_memory_allocated() / 1e9


def measure(step, batches):
    """(result of the first batch, mean seconds of the others, their peak memory in GB)."""
    first = step(batches[0])
    peak_gb(anew=True)
    return first, statistics.mean(seconds(step, batch) for batch in batches[1:]), peak_gb()


def error(found, wanted) -> float:
    """The relative error, see the top."""
    found, wanted = found.detach().cpu().double(), wanted.detach().cpu().double()
    return float((found - wanted).abs().max() / wanted.abs().max())


def open_run(sizes, config, ranks, count):
    """(train.Run in bf16, its `count` batches of indices), with pairs of ever new lengths."""
    rng, pairs, forks = np.random.default_rng(0), sizes.pairs, []
    for _ in range(count * pairs):
        length = int(sizes.length * rng.uniform(0.5, 1.5))
        forks.append(common.make_pair(rng, config.vocab_size, length // 5, length, share=2 / 3))
    run = common.open_run(config, forks, ranks, dtype="bfloat16", batch_size=pairs,
                          tokens_per_pack=sizes.pack)
    # Rewards of about N(0, 1): at 0 the trunk's gradients are 0, and products of zeros are faster.
    run.reference += 10 * torch.randn(len(forks), 2)
    run.step = 1  # step 0 insists on rewards of 0
    return run, [list(range(i, i + pairs)) for i in range(0, len(forks), pairs)]


# --- correctness ----------------------------------------------------------------------------------


def dense_attention(q, k, v, forks):
    """The definition: softmax under one (T, T) mask, in the dtype of q."""
    sees = torch.zeros(q.shape[1], q.shape[1], dtype=torch.bool)
    for start, trunk_end, rejected_end, chosen_end in forks:
        sees[start:chosen_end, start:trunk_end] = True
        sees[trunk_end:rejected_end, trunk_end:rejected_end] = True
        sees[rejected_end:chosen_end, rejected_end:chosen_end] = True
    k, v = (t.repeat_interleave(len(q) // len(t), 0) for t in (k, v))
    scores = q @ k.transpose(1, 2) / math.sqrt(q.shape[2])
    return scores.masked_fill(~sees.tril(), -math.inf).softmax(-1) @ v


def attention(sizes, report):
    # Branches of unequal lengths; without y-, one plain sequence; a trunk of one token.
    forks = [(0, 300, 430, 517), (517, 900, 900, 900), (900, 901, 940, 1000)]
    numbers = [torch.randn(heads, 1000, 128).to(BF16) for heads in (8, 2, 2, 8)]

    def run(body, device, dtype, forks):
        *leaves, grad = (t.to(device, dtype) for t in numbers)
        leaves = [t.requires_grad_() for t in leaves]
        out = body(*leaves, forks)
        out.backward(grad)
        return out, *(t.grad for t in leaves)

    wanted = run(dense_attention, "cpu", FP64, forks)
    device = sizes.device
    for where, dtype, limit in (("cpu", FP32, 1e-5), (device, FP32, 1e-4), (device, BF16, 2e-2)):
        output, *grads = map(error, run(qwen.fork_attention, where, dtype, forks), wanted)
        report(f"{where}, {dtype}: output", output, "relative", limit)
        report(f"{where}, {dtype}: gradients", max(grads), "relative", limit)

    with profile(activities=activities()) as recorded:
        run(qwen.fork_attention, device, BF16, forks)
    ops = Counter(event.name.removeprefix("aten::") for event in recorded.events())
    used = ", ".join(f"{op} {n}" for op, n in sorted(ops.items()) if "attention" in op)
    report("operators in bf16 and their calls", used)
    limit = 0 if device == "cuda" else None  # a CPU computes in fp32, with masks
    flash = ("_flash_attention_forward", "_flash_attention_backward")
    report("flash operators that did not run", sum(op not in ops for op in flash), "", limit)
    report("masks made", ops["tril"], "", limit)

    # cuDNN's attention, which torch may prefer, builds a plan for each new length.
    for allowed in (True, False):
        torch.backends.cuda.enable_cudnn_sdp(allowed)
        times = [seconds(run, qwen.fork_attention, device, BF16, [(0, n, n + 100, 1000)])
                 for n in range(500, 506)]
        report(f"a fork of a new length, cuDNN {allowed}", 1e3 * statistics.median(times), "ms")


def model(sizes, report):
    rng, vocab = np.random.default_rng(0), sizes.exact.vocab_size
    reference = qwen.Qwen3(sizes.exact)
    common.fill(reference)
    reference.to(BF16)
    forks = [common.make_pair(rng, vocab, n // 5, n, share=0.5) for n in (90, 160, 230)]
    forks[1] = replace(forks[1], rejected=forks[1].rejected[:0])
    pack = data.make_pack(forks, [0, 1, 2])
    grad = torch.randn(len(pack.rows))

    def run(device, dtype):
        own, p = copy.deepcopy(reference).to(device, dtype), pack.to(torch.device(device))
        rows = own(p.tokens, p.positions, p.forks, p.rows, p.targets)
        rows.backward(grad.to(rows))
        return rows.detach().cpu().double(), [p.grad for p in own.parameters()]

    wanted, wanted_grads = run("cpu", FP64)
    for device, dtype, nats, limit in (("cpu", FP32, 1e-5, 1e-4), (sizes.device, FP32, 1e-4, 1e-3),
                                       (sizes.device, BF16, 0.05, 0.1)):
        rows, grads = run(device, dtype)
        report(f"{device}, {dtype}: log-probs", float((rows - wanted).abs().max()), "nats", nats)
        worst = max(map(error, grads, wanted_grads))
        report(f"{device}, {dtype}: gradients", worst, "relative", limit)


def training(sizes, report):
    ranks, steps = qwen.open_ranks(600), 40
    with tempfile.TemporaryDirectory() as folder:
        given = ["--model", tiny.write_checkpoint(os.path.join(folder, "model")),
                 "--pairs", tiny.write_pairs(os.path.join(folder, "pairs.jsonl")),
                 "--batch_size", "8", "--lr", "1e-4", "--max_change_ratio", "1", "--epochs", "99",
                 "--max_steps", str(steps)]
        outs = [os.path.join(folder, name) for name in ("undisturbed", "repeated", "stopped")]
        for out in outs[:2]:
            train.train(train.parse_options([*given, "--out", out]), ranks)
        first = next(data.read_lines(os.path.join(outs[0], "metrics.jsonl")))[1]
        rewards = abs(first["reward_chosen"]) + abs(first["reward_rejected"])
        report("step 0 in bf16: mean |r+| + |r-|", rewards, "", 0)
        report("step 0 in bf16: loss - 2 ln 2", abs(first["loss"] - 2 * math.log(2)), "nats", 1e-9)
        stopped = stop_a_run([*given, "--out", outs[2]], os.path.join(outs[2], "metrics.jsonl"))
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


def stop_a_run(argv, path):
    """Start train.py, send SIGTERM once 5 lines are in `path`; returns how many steps it did."""
    process = subprocess.Popen([sys.executable, os.path.join(ROOT, "train.py"), *argv])
    while process.poll() is None and (not os.path.exists(path) or len(list(open(path))) < 5):
        time.sleep(0.005)
    process.send_signal(signal.SIGTERM)
    if process.wait() != 143:
        raise RuntimeError(f"exit code 143 expected after SIGTERM, found {process.returncode}")
    return len(list(open(path)))


# --- speed of a step ------------------------------------------------------------------------------

# The first pattern that fits an operator, or one that it runs in, names the kind of its kernels.
KINDS = {"head": "_LinearLogps", "FSDP": "FSDP|c10d|nccl", "attention": "scaled_?dot|attention",
         "optimizer and clip": r"optimizer\.|_foreach|vector_norm",
         "products": r"aten::(mm|addmm|bmm)\b",
         "copies": r"aten::(copy_|cat|fill_|zero_|index_select)\b"}


def narrow(sizes, report):
    step(sizes, sizes.narrow, report)


def wide(sizes, report):
    config, o = sizes.wide, train.Options(checkpointing="none")
    if sizes.device == "cuda":
        room = 0.8 * torch.cuda.mem_get_info()[0] / 1e9
        while config.num_hidden_layers > 1 and planned_gb(config, o, sizes.pack) > room:
            config = replace(config, num_hidden_layers=config.num_hidden_layers - 1)
    step(sizes, config, report)


def planned_gb(config, o, tokens) -> float:
    """What --plan says of one GPU, all tokens being scored."""
    cuda = torch.cuda.is_available()
    return sum(train.plan_memory(config, o, 1, tokens, tokens, cuda).values()) / 1e9


def step(sizes, config, report):
    """train.train_step on batches of lengths never seen before, without and with recomputation."""
    ranks, count = qwen.open_ranks(600), sizes.steps + 1
    run, batches = open_run(sizes, config, ranks, 2 * count)
    parameters = sum(p.numel() for p in run.policy.parameters())
    report("layers", config.num_hidden_layers, f"of width {config.hidden_size}")
    report("parameters", parameters / 1e9, "billions")
    peak = train.peak_flops(ranks.device, BF16)
    report("published peak (CPU: measured)", peak / 1e12, "TFLOP/s")
    square = common.gemm_rate(BF16, ranks.device, sizes.product)
    report("product of random numbers", square / 1e12, "TFLOP/s")

    def train_step(batch):
        return train.train_step(run, batch, 1e-6)

    for checkpointing, part in (("none", batches[:count]), ("full", batches[count:])):
        for block in run.policy.layers:
            block.checkpointing = checkpointing == "full"
        _, took, memory = measure(train_step, part)
        packs = [pack for batch in part[1:] for pack in run.packs(batch, run.forks)]
        flops = sum(train.count_flops(config, pack) for pack in packs) / sizes.steps
        tokens = sum(len(pack.tokens) for pack in packs) / sizes.steps
        o, name = replace(run.o, checkpointing=checkpointing), f"checkpointing {checkpointing}"
        report(f"{name}: a step of {tokens:.0f} tokens", 1e3 * took, "ms")
        report(f"{name}: speed", tokens / took, "tokens/s")
        report(f"{name}: MFU", 100 * flops / took / peak, "%")
        again = seconds(train_step, part[-1])
        report(f"{name}: a step of lengths seen before", 1e3 * again, "ms")
        report(f"{name}: peak memory", memory, "GB")
        planned = planned_gb(config, o, max(len(pack.tokens) for pack in packs))
        report(f"{name}: planned memory", planned, "GB")
        report_kinds(train_step, part[-1], name, report)
    if sizes.device == "cuda":
        report_waits(train_step, part[-1], report)
    qwen.close_ranks()


def activities():
    return list(ProfilerActivity)[:2] if torch.cuda.is_available() else [ProfilerActivity.CPU]


def report_kinds(train_step, batch, name, report):
    """Where a step's time goes: kernels by the operator that starts them; on a CPU operators."""
    with profile(activities=activities()) as recorded:
        seconds(train_step, batch)
    times = Counter()
    for event in recorded.events():
        path, parent = event.name, event.cpu_parent
        while parent is not None:
            path, parent = f"{parent.name} {path}", parent.cpu_parent
        kinds = [kind for kind, pattern in KINDS.items() if re.search(pattern, path, re.I)]
        spent = event.self_cpu_time_total
        if torch.cuda.is_available():  # a range of record_function is no kernel
            spent = sum(k.duration for k in event.kernels if k.name != event.name)
        times[kinds[0] if kinds else "elementwise and sums"] += spent
    report(f"{name}: kernels of a step", times.total() / 1e3, "ms")
    for kind, spent in times.most_common():
        report(f"{name}: {kind}", 100 * spent / times.total(), "% of the kernels")


def report_waits(train_step, batch, report):
    """Where the host waits for the GPU inside a step, as torch's debug mode says."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        train_step(batch)
        torch.cuda.set_sync_debug_mode("default")
    places = Counter(f"{os.path.basename(w.filename)}:{w.lineno}" for w in caught
                     if "synchroniz" in str(w.message))
    report("the host waits at", ", ".join(f"{p} {n}" for p, n in places.most_common()), "times")


# --- the step in transformers ---------------------------------------------------------------------


def transformers(sizes, report):
    from transformers import AutoModelForCausalLM, Qwen3Config

    ranks, config = qwen.open_ranks(600), sizes.narrow
    run, batches = open_run(sizes, config, ranks, sizes.steps + 1)
    forks, reference = run.forks, run.reference
    weights = {qwen.hf_name(name): p.detach().full_tensor().cpu()
               for name, p in run.policy.named_parameters()}
    (metrics, _), ours, memory = measure(lambda batch: train.train_step(run, batch, 1e-6), batches)
    report("ours, fp32 weights", 1e3 * ours, "ms a step")
    report("ours, fp32 weights: peak memory", memory, "GB")
    del run
    for dtype in (FP32, BF16):
        gc.collect()
        torch.cuda.empty_cache()
        hf = AutoModelForCausalLM.from_config(Qwen3Config(**asdict(config)), dtype=dtype,
                                              attn_implementation="sdpa").to(ranks.device).train()
        hf.load_state_dict(weights, strict=False)  # but for the tied head, which is the embedding
        optimizer = torch.optim.AdamW(hf.parameters(), lr=1e-6, betas=(0.9, 0.95), fused=True)
        first, theirs, memory = measure(lambda batch: padded_step(
            hf, optimizer, [forks[i] for i in batch], reference[batch]), batches)
        name = f"transformers, {dtype} weights, bf16 autocast"
        report(f"{name}: first loss, to ours", abs(first - metrics["loss"]), "nats", 0.1)
        report(name, 1e3 * theirs, "ms a step")
        report(f"{name}: peak memory", memory, "GB")
        report(f"{name}: time, to ours", theirs / ours, "times")
        del hf, optimizer
    qwen.close_ranks()


def padded_step(hf, optimizer, forks, reference, micro=4):
    """SPoT-BCE, `micro` pairs at a time, one forward for y+ and one for y-; the mean loss."""
    total = 0.0
    for i in range(0, len(forks), micro):
        part, given = forks[i:i + micro], reference[i:i + micro].to(hf.device)
        r_chosen = 0.1 * (padded_logps(hf, part, "chosen") - given[:, 0])
        r_rejected = 0.1 * (padded_logps(hf, part, "rejected") - given[:, 1])
        mean = (-F.logsigmoid(r_chosen) - F.logsigmoid(-r_rejected)).sum() / len(forks)
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


# --- the head, generation -------------------------------------------------------------------------


def head(sizes, report):
    rows, vocab, width = sizes.head
    hidden = torch.randn(rows, width).to(sizes.device, BF16).requires_grad_()
    weight = (torch.randn(vocab, width) * width**-0.5).to(sizes.device, BF16).requires_grad_()
    targets = torch.randint(vocab, (rows,)).to(sizes.device)
    grad = torch.randn(rows).to(sizes.device)

    def full_logits(hidden, weight, targets):
        return (hidden @ weight.T).float().log_softmax(-1).gather(1, targets[:, None])[:, 0]

    def run(logps):
        hidden.grad = weight.grad = None
        out = logps(hidden, weight, targets)
        out.backward(grad)
        return out.detach(), hidden.grad, weight.grad

    results = []
    for logps in (full_logits, loss.linear_logps):
        first, took, memory = measure(run, [logps] * 6)
        results.append([t.cpu() for t in first])
        del first
        rate = 6 * rows * vocab * width / took / 1e12  # three products, none of them twice
        report(f"{logps.__name__}, {rows} x {vocab} x {width}", 1e3 * took, "ms")
        report(f"{logps.__name__}: products", rate, "TFLOP/s")
        report(f"{logps.__name__}: peak memory with inputs and gradients", memory, "GB")
    report("linear_logps to full logits", max(map(error, *results)), "relative", 2e-2)


def generation(sizes, report):
    from transformers import AutoModelForCausalLM, Qwen3Config

    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        tiny.write_checkpoint(folder)
        on_cpu, own = (qwen.load_model(folder, FP32, place) for place in ("cpu", sizes.device))
    prompts = [rng.integers(265, size=n).tolist() for n in range(5, 45, 5)]
    wanted = [list(prompt) for prompt in prompts]
    with torch.no_grad():
        for ids in wanted:
            for _ in range(24):
                ids.append(int(on_cpu.logits(torch.tensor(ids))[-1].argmax()))
    found = qwen.generate(own, prompts, range(8), max_tokens=24, temperature=0, batch_size=5)
    wrong = sum(p + ids != ids_wanted for p, (ids, _), ids_wanted in zip(prompts, found, wanted))
    report("greedy answers in fp32 unlike full forwards on the CPU", wrong, f"of {len(found)}", 0)

    config, (count, longest) = sizes.narrow, sizes.answers
    prompts = [rng.integers(config.vocab_size, size=n).tolist()
               for n in rng.integers(20, 200, size=count)]
    ends = set(range(0, config.vocab_size, 64))  # random weights hardly ever end an answer
    hf = AutoModelForCausalLM.from_config(Qwen3Config(**asdict(config)))
    short, long = (argparse.Namespace(max_tokens=n, batch_size=count) for n in (4, longest))
    for name, run, net in (("ours", generation_bench.run_ours, qwen.Qwen3(config)),
                           ("transformers", generation_bench.run_transformers, hf)):
        net.to(sizes.device, BF16).eval()
        common.fill(net)
        run(net, prompts, ends, short, 0)
        start = time.perf_counter()
        lengths, _ = run(net, prompts, ends, long, 1)
        rate = sum(lengths) / (time.perf_counter() - start)
        report(f"{name}: {count} answers of {longest} tokens at most", rate, "tokens/s")


# --- one process a part ---------------------------------------------------------------------------

PARTS = {f.__name__: f for f in (attention, model, training, narrow, wide, transformers, head,
                                 generation)}


def run_part(name, sizes, path):
    """One part in this process; its figures are printed, and added to the file `path`."""
    def report(what, value, unit="", limit=None):
        shown = f"{value:.4g}" if isinstance(value, float) else value
        verdict = ""
        if limit is not None:
            verdict = f"at most {limit:.3g}: " + ("ok" if value <= limit else "WRONG")
        line = f"| {name} | {what} | {shown} | {unit} | {verdict} |"
        print(line, flush=True)
        with open(path, "a") as f:
            f.write(line + "\n")

    torch.manual_seed(0)
    PARTS[name](sizes, report)
    return 0


def main() -> int:
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--parts", default=",".join(PARTS), help="which, separated by commas [all]")
    p.add_argument("--minutes", type=float, default=9, help="for everything [9]")
    p.add_argument("--small", action="store_true", help="toy sizes on the CPU")
    p.add_argument("--part", nargs=2, help=argparse.SUPPRESS)  # how this script starts itself
    a = p.parse_args()
    if a.part:
        return run_part(a.part[0], SMALL if a.small else GPU, a.part[1])
    if not a.small and not torch.cuda.is_available():
        p.error("no CUDA GPU here; --small runs the same code on the CPU at toy sizes")
    stop, failed = time.time() + 60 * a.minutes, []
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "rows")
        open(path, "w").close()
        for name in a.parts.split(","):
            command = [sys.executable, os.path.abspath(__file__), "--part", name, path]
            environment = dict(os.environ)
            if a.small:
                command.append("--small")
                environment["CUDA_VISIBLE_DEVICES"] = ""
            start = time.time()
            try:
                subprocess.run(command, env=environment, check=True,
                               timeout=min(180, max(0, stop - start)))
            except subprocess.SubprocessError as e:
                failed.append(name)
                print(f"{name} FAILED: {e}", file=sys.stderr)
            print(f"{name}: {time.time() - start:.0f} s", flush=True)
        lines = open(path).read()
    card = torch.cuda.get_device_name() if torch.cuda.is_available() and not a.small else "CPU"
    print(f"\n{time.strftime('%Y-%m-%d')}, {card}, torch {torch.__version__}, CUDA "
          f"{torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}\n\n"
          f"| part | what | value | unit | limit |\n|---|---|---|---|---|\n{lines}\n"
          f"failed parts: {', '.join(failed) or 'none'}; wrong figures: {lines.count('WRONG')}")
    return int(bool(failed) or "WRONG" in lines)


if __name__ == "__main__":
    qwen.leave(main)
