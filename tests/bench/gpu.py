"""Correctness and speed on one CUDA GPU, in Markdown tables; nothing is read or downloaded.

    python tests/bench/gpu.py                     # all parts, under 9 minutes on an H100
    python tests/bench/gpu.py --parts head,speed --minutes 5
    python tests/bench/gpu.py --small             # the same code on a CPU at toy sizes, about 2 minutes

    machine       what it is, and its rates: products, copies
    head          linear_logps against full logits
    correctness   GPU against CPU and against fp64, step-0 zeros, SIGKILL and --resume, loss curves, generate
    speed         train.train_step at Qwen3's shapes, lengths 1k-8k, shared and unshared; a profile
    transformers  the same step as a user of transformers would write it, padded
    generate      model.generate against transformers'

All weights are random, made from the shapes. A part is a process of its own: a crash or a timeout costs that
part alone, and the exit code is 1 then or where a check fails. What the time does not suffice for is skipped,
with a line that says so; a part skipped whole counts as failed. Needs requirements-dev.txt (transformers).
Times are medians after warm-up, with the device waited for. GB are 1e9 bytes.
"""

import argparse
import contextlib
import dataclasses
import functools
import gc
import glob
import io
import math
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
import zlib
from collections import Counter
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors.torch import load_file

BENCH = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(os.path.dirname(BENCH))
sys.path[:0] = [ROOT, os.path.dirname(BENCH)]

import data  # noqa: E402
import loss  # noqa: E402
import model as qwen  # noqa: E402
import tiny  # noqa: E402
import train  # noqa: E402

NOMINAL = 989e12  # FLOP/s, dense bf16, of H100 and H200
TABLE = {"heads": (), "broken": False}  # the one being printed
FAILED = []  # what went wrong in this process
WEIGHTS = {"machine": 1, "head": 1, "correctness": 8, "speed": 8, "transformers": 6, "generate": 3}  # of time
BF16, FP32 = torch.bfloat16, torch.float32

# hidden, layers (0: as many as fit), query heads, FFN, tied; the largest first: it carries the target.
QWEN3 = {"8B width": (4096, 0, 32, 12288, False), "0.6B": (1024, 28, 16, 3072, True),
         "1.7B": (2048, 28, 16, 6144, True), "4B": (2560, 36, 32, 9728, True)}
TOY = {"toy, untied": (64, 0, 4, 128, False), "toy, tied": (32, 2, 4, 96, True)}
FULL = {"shapes": QWEN3, "vocab": 151936, "groups": 8, "head_dim": 128, "pack": 16384, "small_pack": 4096,
        "lengths": (1024, 2048, 4096, 8192), "compared": ("1.7B", "8B width"), "pairs": 16, "longest": 3072,
        "gemm": 8192, "copy": 2**30, "head": (8192, 151936, 4096), "exact_head": (2048, 151936, 1024),
        "micro": (16, 8, 4, 2, 1), "steps": 60, "generate": ("0.6B", 128, 64, 256), "repeats": 3}
SMALL = {"shapes": TOY, "vocab": 512, "groups": 2, "head_dim": 16, "pack": 1024, "small_pack": 256,
         "lengths": (64, 128), "compared": ("toy, tied",), "pairs": 4, "longest": 256,
         "gemm": 512, "copy": 2**22, "head": (256, 4096, 64), "exact_head": (128, 4096, 64),
         "micro": (4, 1), "steps": 60, "generate": ("toy, tied", 8, 4, 16), "repeats": 3}


# --- tables, time, memory -------------------------------------------------------------------------


def row(*cells):
    """One line of a table, at once: what a crash cuts off stays readable."""
    if TABLE["broken"]:
        table("(continued)", *TABLE["heads"])
    show = ["-" if c != c else f"{c:.4g}" if isinstance(c, float) else str(c) for c in cells]  # NaN: none
    print("| " + " | ".join(show) + " |", flush=True)


def table(title, *heads):
    note(title)
    TABLE.update(heads=heads, broken=False)
    row(*heads)
    print("|" + "---|" * len(heads), flush=True)


def note(text):
    """A line between tables: one that comes inside a table has its head printed again behind it."""
    print(f"\n{text}\n", flush=True)
    TABLE["broken"] = True


def check(what, found, limit):
    """A row of a table of errors; NaN fails too."""
    found = float(torch.as_tensor(found).detach())
    good = found <= limit
    row(what, found, float(limit), "ok" if good else "**WRONG**")
    if not good:
        FAILED.append(what)


@contextlib.contextmanager
def attempt(what):
    """What fails inside is printed and remembered, and the next thing is tried."""
    try:
        yield
    except (Exception, SystemExit) as e:
        FAILED.append(what)
        note(f"**{what} failed**: {type(e).__name__}: {str(e)[:2000]}")
        traceback.print_exc()
    free()


@contextlib.contextmanager
def one_rank():
    """A process group of one, gone afterwards whatever happens."""
    try:
        yield qwen.open_ranks(600)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def late(a, need, what):
    """Whether too little time is left for something that takes so many seconds."""
    left = a.until - time.time()
    if left < need:
        note(f"skipped for want of time ({max(0, left):.0f} s left): {what}")
    return left < need


def free():
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def sync(device):
    if device.type == "cuda":
        torch.cuda.synchronize()


def seconds(a, run, repeats=0, warm=1):
    """Median seconds of a call, after warm-up."""
    times = []
    for i in range(warm + (repeats or a.repeats)):
        sync(a.device)
        start = time.perf_counter()
        run()
        sync(a.device)
        times.append(time.perf_counter() - start)
    return statistics.median(times[warm:])


def held(device, peak=True):
    """GB of the device's memory, at the peak since `reset`, or now; NaN on a CPU."""
    if device.type != "cuda":
        return math.nan
    return (torch.cuda.max_memory_allocated() if peak else torch.cuda.memory_allocated()) / 1e9


def reset(device):
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()


def gemm_rate(a, dtype=BF16):
    """FLOP/s of a square product of random numbers (zeros are faster: they draw less power)."""
    n = a.gemm
    x, y = (torch.randn(n, n, device=a.device, dtype=dtype) for _ in range(2))
    return 2 * n**3 / seconds(a, lambda: x @ y, 20, warm=5)


def gap(found, wanted):
    """Largest difference, in units of the largest wanted number."""
    wanted = wanted.detach().cpu().double()
    return float((found.detach().cpu().double() - wanted).abs().max() / wanted.abs().max())


# --- models and pairs out of nothing --------------------------------------------------------------


def shape(a, name, layers=0):
    hidden, own, heads, ffn, tied = a.shapes[name]
    return qwen.Config(a.vocab, hidden, ffn, layers or own, heads, a.groups, a.head_dim, 1e-6, 1e6, tied)


@torch.no_grad()
def initialise(named):
    """Random weights that depend on HF's name, the seed of each, and on the device: ours = transformers'."""
    for name, p in named:
        local, *_ = qwen.rows_here(p)
        generator = torch.Generator(local.device).manual_seed(zlib.crc32(name.encode()))
        local.fill_(1) if p.ndim == 1 else local.normal_(0, 0.02, generator=generator)


def hf_named(model):
    return [(qwen.hf_name(n), p) for n, p in model.named_parameters()]


def plain_model(config, dtype, device):
    """Ours without FSDP."""
    with torch.device("meta"):
        model = qwen.Qwen3(config).to(dtype)
    model.to_empty(device=device)
    initialise(hf_named(model))
    return model


def hf_model(config, dtype, device):
    from transformers import AutoModelForCausalLM, Qwen3Config

    rope = {"rope_parameters": {"rope_theta": config.rope_theta, "rope_type": "default"}}
    own = {k: v for k, v in dataclasses.asdict(config).items() if k != "rope_theta"}
    with device:
        hf = AutoModelForCausalLM.from_config(Qwen3Config(**own, **rope, max_position_embeddings=40960),
                                              dtype=dtype, attn_implementation="sdpa")
    initialise(hf.named_parameters())
    return hf


def random_fork(rng, vocab, length, shared):
    """A pair of two sequences of `length` tokens whose first `shared` are the same, prompt (1/8) included."""
    start, rejected, chosen = (rng.integers(vocab, size=n).tolist() for n in (shared, *[length - shared] * 2))
    rejected[0] = (chosen[0] + 1) % vocab
    prompt = max(1, length // 8)
    return data.make_fork(start[:prompt], start[prompt:] + chosen, start[prompt:] + rejected)


def unshared(fork):
    """The same tokens as two sequences without anything in common."""
    n, none = fork.prompt_length, fork.rejected[:0]
    return [data.Fork(n, fork.trunk[:n], none, np.concatenate([fork.trunk[n:], branch]), 0)
            for branch in (fork.rejected, fork.chosen)]


def synthetic_run(a, ranks, config, checkpointing, pack):
    """A train.Run with a sharded random policy, as train.prepare makes it of files."""
    o = train.Options(dtype="bfloat16" if a.device.type == "cuda" else "float32", tokens_per_pack=pack,
                      checkpointing=checkpointing, batch_size=10**6)
    with mock.patch.object(qwen, "load_weights", lambda policy, _, device: initialise(
            hf_named(policy.to_empty(device=device)))):
        policy, mesh = train.build_policy("", config, o, ranks)
    optimizer = train.make_optimizer(policy, o)
    return train.Run(o, ranks, config, "", [], policy, mesh, optimizer, {}, step=1)  # step 0 has a canary


def take(run, forks, seed=0):
    """Give a run its pairs, and a reference so far from the policy that rewards are about N(0, 1): with all
    rewards 0 the trunk's gradients were 0, and products of zeros are faster. Compiles what a step needs."""
    objective = "spot-bce" if len(forks[0].rejected) else "reward-sft"
    run.forks, run.o = forks, dataclasses.replace(run.o, loss=objective)
    run.reference = torch.randn(len(forks), 2, generator=torch.Generator().manual_seed(seed)).double() * 10
    for pack in run.packs(range(len(forks)), forks):
        pack = pack.to(run.ranks.device)
        rows = run.score(pack)
        run.reference[pack.pairs.cpu()] += loss.sequence_logps(rows.detach(), pack.lengths).cpu()
        rows.backward(torch.zeros_like(rows))
    run.optimizer.zero_grad()


def step(run):
    return train.train_step(run, range(len(run.forks)), 1e-6)[0]


def counted(run):
    """FLOPs of a step, and the tokens it computes, without filling."""
    packs = list(run.packs(range(len(run.forks)), run.forks))
    return sum(train.count_flops(run.config, p) for p in packs), sum(p.size for p in packs)


# --- the parts ------------------------------------------------------------------------------------


def machine(a):
    import transformers

    table("The machine", "device", "memory GB", "torch", "transformers", "date")
    name = f"CPU, {torch.get_num_threads()} thread(s)"
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if a.device.type == "cuda":
        name, memory = torch.cuda.get_device_name(), torch.cuda.get_device_properties(0).total_memory
    row(name, memory / 1e9, torch.__version__, transformers.__version__, time.strftime("%Y-%m-%d %H:%M"))
    x = torch.zeros(a.copy, dtype=torch.uint8, device=a.device)
    y = torch.empty_like(x)
    table("Rates", f"bf16 product of {a.gemm}³, TFLOP/s", "fp32, TFLOP/s", "copy, read + written, TB/s")
    copied = 2 * a.copy / seconds(a, lambda: y.copy_(x), 10)
    row(gemm_rate(a) / 1e12, gemm_rate(a, FP32) / 1e12, copied / 1e12)


def head(a):
    rows, vocab, width = a.head
    h = torch.randn(rows, width, device=a.device, dtype=BF16).requires_grad_()
    w = (torch.randn(vocab, width, device=a.device) * 0.02).to(BF16).requires_grad_()
    targets, grad = torch.randint(vocab, (rows,), device=a.device), torch.randn(rows, device=a.device)
    rate, flops = gemm_rate(a), 6 * rows * vocab * width

    def full(h, w, targets):
        return -F.cross_entropy(F.linear(h, w).float(), targets, reduction="none")

    def full_logsumexp(h, w, targets):
        logits = F.linear(h, w)
        return logits.gather(1, targets[:, None]).squeeze(1).float() - logits.float().logsumexp(1)

    def run(logps):
        h.grad = w.grad = None
        logps(h, w, targets).backward(grad)

    table(f"Head: {rows} rows × {vocab} × {width}, bf16, forward and backward. Extra: above inputs and "
          "gradients. FLOPs: three products, recomputation left out.",
          "", "ms", "of the bf16 product rate", "extra memory GB")
    for name, logps in {"linear_logps": loss.linear_logps, "full logits, fp32 cross_entropy": full,
                        "full logits, fp32 logsumexp": full_logsumexp}.items():
        with attempt(f"head, {name}"):
            took = seconds(a, functools.partial(run, logps), 5)
            reset(a.device)
            base = held(a.device, peak=False)  # holds both gradients of the run before
            run(logps)
            row(name, 1e3 * took, f"{flops / took / rate:.0%}", held(a.device) - base)


def correctness(a):
    table("Correctness. Errors are the largest difference over the largest number, unless a unit is named.",
          "", "largest error", "limit", "")
    for part in (exact_attention, exact_head, exact_model, exact_fsdp, exact_generate):
        if not late(a, 15, part.__name__):
            with attempt(part.__name__):
                part(a)
    with tempfile.TemporaryDirectory() as folder:
        world = {"model": tiny.write_checkpoint(os.path.join(folder, "model")),
                 "pairs": tiny.write_pairs(os.path.join(folder, "pairs.jsonl"))}
        for part, need in ((step_zero, 30), (kill_and_resume, 60)):
            if not late(a, need, part.__name__):
                with attempt(part.__name__):
                    part(a, world, folder)


def exact_attention(a):
    """FlexAttention on the device against the CPU's body. On a CPU it has no backward: forward alone."""
    heads, length = 2 * a.groups, 1024
    forks = [(0, 300, 430, 517), (517, 600, 600, 800), (800, 801, 870, 1000)]  # the rest is filling
    q, k, v, grad = (torch.randn(n, length, a.head_dim) for n in (heads, a.groups, a.groups, heads))
    grad[:, 1000:] = 0  # filling: anything may come out there
    backward = a.device.type == "cuda"

    def run(device, dtype, where):
        leaves = [t.to(device, dtype).requires_grad_(backward) for t in (q, k, v)]
        out = qwen.attend(*leaves, where)
        if backward:
            out.backward(grad.to(out))
        return [out[:, :1000]] + [t.grad for t in leaves if backward]

    mask = qwen.block_mask(forks, length, a.device)
    for dtype, limit in ((FP32, 3e-5), (BF16, 3e-2)):
        q, k, v, grad = (t.to(dtype).float() for t in (q, k, v, grad))  # the same numbers on both sides
        wanted = run(torch.device("cpu"), FP32, qwen.layout(forks, q[0]))
        for name, x, y in zip(("output", "dq", "dk", "dv"), run(a.device, dtype, mask), wanted):
            check(f"FlexAttention {dtype} on {a.device.type} to the fork list in fp32 on cpu: {name}",
                  gap(x, y), limit)


def exact_head(a):
    """Ours and full bf16 logits, both against fp64 from the same bf16 numbers."""
    rows, vocab, width = a.exact_head
    h = torch.randn(rows, width, device=a.device, dtype=BF16)
    w = (torch.randn(vocab, width, device=a.device) * 0.05).to(BF16)
    targets, grad = torch.randint(vocab, (rows,), device=a.device), torch.randn(rows, device=a.device)

    def full(h, w, targets):
        logits = h @ w.T
        logits = logits if logits.dtype == torch.float64 else logits.float()
        return logits.log_softmax(1).gather(1, targets[:, None]).squeeze(1)

    def run(logps, dtype):
        x, y = (t.to(dtype, copy=True).requires_grad_() for t in (h, w))
        out = logps(x, y, targets)
        out.backward(grad.to(out))
        return out, x.grad, y.grad

    wanted = run(full, torch.float64)
    for name, x, y, z in zip(("value", "gradient of hidden", "gradient of weight"),
                             run(loss.linear_logps, BF16), wanted, run(full, BF16)):
        check(f"linear_logps bf16 to fp64: {name} (full bf16 logits: {gap(z, y):.2g})", gap(x, y), 2e-2)


def exact_model(a):
    """A whole fp32 model on the device against the CPU: row log-probs and all gradients."""
    config = qwen.Config(4096, 256, 512, 4, 4, 2, 64, 1e-6, 1e6, True)
    models = [plain_model(config, FP32, torch.device("cpu"))]
    models.append(plain_model(config, FP32, a.device))
    models[1].load_state_dict(models[0].state_dict())  # generators differ between devices
    rng = np.random.default_rng(0)
    pack = data.make_pack([random_fork(rng, 4096, n, n // 2) for n in (200, 100, 150)], [0, 1, 2], 128)
    grad, rows = torch.randn(len(pack.rows)), []
    for model, device in zip(models, (torch.device("cpu"), a.device)):
        p = pack.to(device)
        rows.append(model(p.tokens, p.positions, p.forks, p.rows, p.targets))
        rows[-1].backward(grad.to(device))
    check(f"fp32 model, {a.device.type} to cpu: row log-probs, nats",
          (rows[1].cpu() - rows[0]).abs().max(), 1e-4)
    check("... gradients of all weights", max(gap(q.grad, p.grad) for p, q in
                                              zip(*(m.parameters() for m in models))), 1e-4)


def exact_fsdp(a):
    """FSDP2 on one rank against the plain model, on the same device, in packs of one size."""
    rng, config = np.random.default_rng(0), shape(a, list(a.shapes)[-1], layers=2)
    forks = [random_fork(rng, a.vocab, n, n // 2) for n in (90, 60)]
    with one_rank() as ranks:
        run = synthetic_run(a, ranks, config, "full", 256)
        plain = plain_model(config, FP32, a.device).to(getattr(torch, run.o.dtype))
        (pack,) = (p.to(a.device) for p in run.packs(range(2), forks))
        ours, wanted = (m(pack.tokens, pack.positions, pack.forks, pack.rows, pack.targets)
                        for m in (run.policy, plain))
        for rows in (ours, wanted):
            rows.backward(torch.ones_like(rows))
        check(f"FSDP2, 1 rank, {run.o.dtype}, to the plain model: row log-probs, nats (0 expected)",
              (ours - wanted).abs().max(), 0 if a.device.type == "cpu" else 0.05)
        check("... gradients", max(gap(p.grad.full_tensor(), q.grad) for p, q in
                                   zip(run.policy.parameters(), plain.parameters())), 1e-2)


def exact_generate(a):
    """Greedy, fp32, the tiny checkpoint: the device's tokens are the CPU's."""
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        models = [qwen.load_model(tiny.write_checkpoint(folder), FP32, d) for d in ("cpu", a.device)]
    prompts = [rng.integers(265, size=n).tolist() for n in range(5, 53, 3)]
    outs = [qwen.generate(m, prompts, list(range(16)), max_tokens=64, temperature=0, batch_size=n)
            for m, n in zip(models, (4, 16))]
    check(f"generate, greedy, fp32, {a.device.type} to cpu: samples of 16 that differ",
          sum(x != y for x, y in zip(*outs)), 0)


def flags(world, out, **more):
    """A command line of train.py, as a list."""
    options = {**world, "out": out, "dtype": "float32", "lr": 1e-4, "batch_size": 8, "max_change_ratio": 1,
               "epochs": 1000, **more}
    return [part for k, v in options.items() for part in (f"--{k}", str(v))]


def train_here(argv):
    """The real train.train in this process; what it said."""
    said = io.StringIO()
    try:
        with one_rank() as ranks, contextlib.redirect_stderr(said):
            train.train(train.parse_options(argv), ranks)
    except SystemExit:  # how Ranks.together ends a run
        raise RuntimeError(said.getvalue()[-1500:]) from None
    return said.getvalue()


def step_zero(a, world, folder):
    table("Step 0 of train.train, a tiny checkpoint: the policy is its own reference.",
          "dtype", "checkpointing", "largest absolute reward", "loss", "")
    for dtype in ("bfloat16", "float32"):
        for checkpointing in ("full", "none"):
            said = train_here(flags(world, os.path.join(folder, f"{dtype}-{checkpointing}"), dtype=dtype,
                                    checkpointing=checkpointing, max_steps=2))
            found = re.search(r"largest \|reward\| (\S+), loss (\S+), expected", said).groups()
            good = found == ("0.0", "1.386294361")
            row(dtype, checkpointing, *found, "ok" if good else "**WRONG**")
            FAILED.extend([] if good else [f"step 0, {dtype}"])


def kill_and_resume(a, world, folder):
    """Undisturbed twice, killed and resumed, and on the CPU: weights, moments and losses side by side."""
    outs = {k: os.path.join(folder, k) for k in ("undisturbed", "repeated", "killed and resumed", "cpu")}
    more = {"max_steps": a.steps, "save_every": 7}
    for k in ("undisturbed", "repeated"):
        train_here(flags(world, outs[k], **more))
    command, log = [sys.executable, os.path.join(ROOT, "train.py")], os.path.join(folder, "log")
    victim, path = outs["killed and resumed"], os.path.join(outs["killed and resumed"], "metrics.jsonl")
    with open(log, "w") as f:
        process = subprocess.Popen([*command, *flags(world, victim, **more)], stderr=f)
    while process.poll() is None and (not os.path.exists(path) or sum(1 for _ in open(path)) < 10):
        time.sleep(0.005)
    process.kill()
    if process.wait() != -signal.SIGKILL:
        raise RuntimeError(f"ended before it could be killed: {open(log).read()[-1500:]}")
    lines = sum(1 for _ in open(path))
    said = train_here([*flags(world, victim, **more), "--resume"])
    resumed = int(re.search(r"resumed from .*: step (\d+)", said).group(1))
    done = subprocess.run([*command, *flags(world, outs["cpu"], **more)], capture_output=True, text=True,
                          env={**os.environ, "CUDA_VISIBLE_DEVICES": ""})
    if done.returncode:
        raise RuntimeError(done.stderr[-1500:])
    losses, states = {}, {}
    for k, out in outs.items():
        losses[k] = [r["loss"] for r in data.read_log(os.path.join(out, "metrics.jsonl"))]
        (shard,) = glob.glob(os.path.join(train.whole_checkpoints(out)[-1], "*.safetensors"))
        states[k] = load_file(shard)
    table(f"{a.steps} steps in fp32 on {a.device.type}, against the undisturbed run. Killed by SIGKILL after "
          f"{lines} steps, resumed from step {resumed}.",
          "", "weights and moments equal to the bit", "largest difference of a weight", "of a loss", "")
    base = states["undisturbed"]
    for k in list(outs)[1:]:
        equal = all(torch.equal(base[n], states[k][n]) for n in base)
        weights = max(float((base[n] - states[k][n]).abs().max()) for n in base if ".exp_avg" not in n)
        losses_off = max(abs(x - y) for x, y in zip(losses["undisturbed"], losses[k], strict=True))
        # On a CPU bits are promised; on CUDA the attention's backward adds in no fixed order.
        good = equal if a.device.type == "cpu" else max(weights, losses_off) < 1e-3
        row(k, "yes" if equal else "no", weights, losses_off, "ok" if good else "**WRONG**")
        FAILED.extend([] if good else [k])
    table("Loss curve, fp32, 20 steps.", "step", f"{a.device.type}", "cpu")
    for i in (0, 1, 2, 5, 10, 15, 19):
        row(i, f"{losses['undisturbed'][i]:.9f}", f"{losses['cpu'][i]:.9f}")
    curve = max(abs(x - y) for x, y in zip(losses["undisturbed"][:20], losses["cpu"][:20]))
    note(f"largest difference in the first 20 steps: {curve:.3g}")


def fitting_layers(a, name):
    """Layers of a shape that fit: 16 bytes a parameter (fp32 weight, gradient, two moments), and 15 GB for
    gathered tables, one block's recomputation, reduction buffers and the mask; each layer keeps its input."""
    if a.device.type != "cuda":
        return 2
    with torch.device("meta"):
        one, two = (sum(p.numel() for p in qwen.Qwen3(shape(a, name, n)).parameters()) for n in (1, 2))
    room = 0.95 * torch.cuda.mem_get_info()[0] - 16 * (2 * one - two) - 15e9
    return int(min(36, room // (16 * (two - one) + 2 * a.pack * a.shapes[name][0])))


def speed(a):
    with one_rank() as ranks:
        speed_of(a, ranks)


def speed_of(a, ranks):
    rate = gemm_rate(a)
    note(f"bf16 products of {a.gemm}³ in this process: {rate / 1e12:.4g} TFLOP/s")
    layout_cost(a)
    ratios = []
    table("Training step (train.train_step: forward, coefficients, backward, clip, AdamW), one rank, bf16 "
          "with fp32 weights on a GPU. Length: prompt + one answer; half of it is shared. FLOPs: products of "
          "forward and backward, no recomputation.",
          "model", "layers", "parameters", "length", "pairs", "layout", "checkpointing", "ms", "tokens/s",
          "pairs/s", "TFLOP", "TFLOP/s", f"MFU of {NOMINAL / 1e12:.0f}", "of the product rate", "peak GB")
    layers = {name: a.shapes[name][1] or fitting_layers(a, name) for name in a.shapes}
    for name in a.shapes:
        groups = [("full", a.pack, a.lengths), ("none", a.pack, a.lengths[1:2]),
                  ("none", a.small_pack, a.lengths[:1])]
        fits = False
        for checkpointing, pack, lengths in groups:
            if fits and checkpointing == "none" and pack == a.small_pack:
                continue  # only where the large pack did not fit
            if late(a, 20, f"{name}, checkpointing {checkpointing}, packs of {pack}"):
                continue
            with attempt(f"speed, {name}, checkpointing {checkpointing}"):
                group = (checkpointing, pack, lengths, ratios)
                fits = speed_group(a, ranks, rate, name, layers[name], *group)
                while not fits and checkpointing == "full" and not a.shapes[name][1] and layers[name] > 3:
                    free()  # the guess was too high
                    layers[name] -= 3
                    fits = speed_group(a, ranks, rate, name, layers[name], *group)
    table("Shared prefix: what sharing half of each sequence gains (checkpointing full).", "model", "length",
          "tokens, shared to unshared", "time, shared to unshared", "time ratio to token ratio")
    for cells in ratios:
        row(*cells)
    if not late(a, 25, "the profile"):
        with attempt("profile"):
            name = next(iter(a.shapes))
            profile(a, ranks, name, layers[name])


def layout_cost(a):
    """The attention mask of one pack is made once a forward, out of a [T, T] table of bools."""
    forks = [(0, a.pack // 2, 3 * a.pack // 4, a.pack)]
    x = torch.zeros(a.pack, 1, device=a.device)
    took = seconds(a, lambda: qwen.layout(forks, x), 5)
    reset(a.device)
    base = held(a.device, peak=False)
    qwen.layout(forks, x)
    note(f"layout of a pack of {a.pack} tokens: {1e3 * took:.3g} ms, {held(a.device) - base:.3g} GB")


def speed_group(a, ranks, rate, name, layers, checkpointing, pack, lengths, ratios):
    """The rows of one policy; False where memory ran out."""
    where = (name, layers)
    try:
        run = synthetic_run(a, ranks, shape(a, name, layers), checkpointing, pack)
        count = f"{sum(p.numel() for p in run.policy.parameters()) / 1e9:.3g}B"
        for length in lengths:
            pairs = a.lengths[-1] // length if pack == a.pack else pack // (2 * length)
            rng = np.random.default_rng(length)
            forks = [random_fork(rng, a.vocab, length, length // 2) for _ in range(pairs)]
            took = {}
            # On CUDA both layouts are one pack each: two lengths, two compiled attentions, whatever `length`.
            for layout, some in (("shared", forks), ("unshared", [s for f in forks for s in unshared(f)])):
                if late(a, 10, f"{name}, {length} tokens, {layout}"):
                    continue
                where = (name, layers, count, length, pairs, layout, checkpointing)
                take(run, some)
                reset(a.device)
                t = took[layout] = seconds(a, lambda: step(run), warm=2)
                flops, tokens = counted(run)
                row(*where, 1e3 * t, f"{tokens / t:.0f}", pairs / t, flops / 1e12, flops / t / 1e12,
                    f"{flops / t / NOMINAL:.1%}", f"{flops / t / rate:.1%}", held(a.device))
            if len(took) == 2 and checkpointing == "full":
                shared = sum(map(len, forks)) / (2 * length * pairs)
                ratio = took["shared"] / took["unshared"]
                ratios.append((name, length, f"{shared:.3f}", f"{ratio:.3f}", f"{ratio / shared:.3f}"))
        return True
    except torch.OutOfMemoryError:
        row(*where, f"out of memory (checkpointing {checkpointing}, packs of {pack} tokens)")
        return False


KINDS = {"attention": r"flex|flash|fmha|sdpa|scaled_dot|triton_tem",
         "products": r"gemm|nvjet|cutlass|xmma|cublas|::mm$|addmm|::bmm",
         "optimizer, clip": r"adam|multi_tensor|foreach|_norm", "collectives": r"nccl|c10d",
         "copies, casts": r"copy|memcpy|memset|cat|fill|::to$|split"}


def profile(a, ranks, name, layers):
    """Where one step's time goes, by kernel and by kind."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as record

    cuda = a.device.type == "cuda"
    run = synthetic_run(a, ranks, shape(a, name, layers), "full", a.pack)
    rng, length = np.random.default_rng(0), a.lengths[1]
    take(run, [random_fork(rng, a.vocab, length, length // 2) for _ in range(a.lengths[-1] // length)])
    wall = seconds(a, lambda: step(run))
    with record(activities=[ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU]) as recorded:
        step(run)
        sync(a.device)
    kernels = [(e.key, (e.self_device_time_total if cuda else e.self_cpu_time_total) / 1e3, e.count)
               for e in recorded.key_averages()
               if (e.device_type == DeviceType.CUDA) == cuda and not getattr(e, "is_user_annotation", False)]
    kernels = sorted((k for k in kernels if not k[0].startswith("FSDP::")), key=lambda k: -k[1])
    total = sum(t for _, t, _ in kernels)
    kinds = dict.fromkeys([*KINDS, "the rest: norms, rotary, SiLU, sums"], 0.0)
    for key, t, _ in kernels:
        kinds[next((k for k, r in KINDS.items() if re.search(r, key.lower())), list(kinds)[-1])] += t
    title = (f"Profile of one step: {name}, {layers} layers, {length} tokens, shared, checkpointing full: "
             f"{1e3 * wall:.4g} ms without the profiler, kernels {total:.4g} ms.")
    table(title, "kind", "ms", "share")
    for kind, t in sorted(kinds.items(), key=lambda x: -x[1]):
        row(kind, t, f"{t / total:.1%}")
    table("The 15 longest", "kernel", "ms", "share", "calls")
    for key, t, calls in kernels[:15]:
        row(re.sub(r"[|\s]+", " ", key)[:90], t, f"{t / total:.1%}", calls)
    if cuda:
        waits(run)


def waits(run):
    """Where the host waits for the device inside a step, as PyTorch's own debug mode tells."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            step(run)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    places = Counter(f"{os.path.basename(w.filename)}:{w.lineno}" for w in said
                     if "synchroniz" in str(w.message))
    table(f"The host waits for the device {places.total()} times in one step of one pack", "place", "times")
    for place, times in places.most_common(15):
        row(place, times)


# --- transformers ---------------------------------------------------------------------------------


def padded_logps(hf, sequences, autocast):
    """Sequence log-probs as a user writes them: padded on the right, all logits, fp32 log_softmax, gather.

    sequences: (ids, prompt length) each.
    """
    device, width = hf.device, max(len(ids) for ids, _ in sequences)
    tokens = torch.zeros(len(sequences), width, dtype=torch.int64)
    mask, scored = torch.zeros_like(tokens), torch.zeros(len(sequences), width)
    for i, (ids, prompt) in enumerate(sequences):
        tokens[i, :len(ids)], mask[i, :len(ids)] = torch.from_numpy(ids), 1
        scored[i, prompt:len(ids)] = 1
    tokens, mask, scored = tokens.to(device), mask.to(device), scored.to(device)
    with torch.autocast(device.type, BF16, enabled=autocast):
        logits = hf(input_ids=tokens, attention_mask=mask, use_cache=False).logits[:, :-1]
    logps = logits.float().log_softmax(-1).gather(2, tokens[:, 1:, None]).squeeze(2)
    return (logps * scored[:, 1:]).sum(1)


def padded_step(hf, optimizer, forks, reference, micro, autocast):
    """SPoT-BCE on all pairs, `micro` at a time; returns the mean loss."""
    total = 0.0
    for i in range(0, len(forks), micro):
        part = forks[i:i + micro]
        sequences = [(np.concatenate([f.trunk, branch]), f.prompt_length) for k in ("chosen", "rejected")
                     for f in part for branch in [getattr(f, k)]]
        r = 0.1 * (padded_logps(hf, sequences, autocast) - reference[i:i + micro].T.flatten().to(hf.device))
        chosen, rejected = r.chunk(2)
        mean = (-F.logsigmoid(chosen) - F.logsigmoid(-rejected)).sum() / len(forks)
        mean.backward()
        total += mean.item()
    torch.nn.utils.clip_grad_norm_(hf.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    return total


def transformers(a):
    rng = np.random.default_rng(0)
    # Lengths as answers have them: most are short, few are long. The shared half varies by a quarter.
    lengths = [int(min(a.longest, max(32, a.longest / 4 * math.exp(0.6 * rng.standard_normal()))))
               for _ in range(a.pairs)]
    forks = [random_fork(rng, a.vocab, n, int(n * rng.uniform(0.25, 0.75))) for n in lengths]
    table(f"One step on the same {a.pairs} pairs of {min(lengths)} to {max(lengths)} tokens (prompt + one "
          f"answer; {statistics.mean(lengths):.0f} on average), SPoT-BCE, reference given, checkpointing on, "
          "AdamW fused. The loss is the first step's, of the same weights on both sides.",
          "model", "layers", "", "micro-batch", "ms", "pairs/s", "speed, ours to it", "peak GB",
          "memory, ours to it", "loss")
    for name in a.compared:
        if late(a, 45, f"transformers, {name}"):
            continue
        # Half of what fits us: transformers must have room for its logits.
        layers, ours = a.shapes[name][1] or max(1, fitting_layers(a, name) // 2), None
        with attempt(f"transformers, {name}, ours"), one_rank() as ranks:
            ours = compare_ours(a, ranks, name, layers, forks)
        for kind, dtype in (("fp32 weights, bf16 autocast", FP32), ("bf16 weights and moments", BF16)):
            with attempt(f"transformers, {name}, {kind}"):
                compare_hf(a, name, layers, forks, ours, kind, dtype)


def compare_ours(a, ranks, name, layers, forks):
    """Our row; returns (seconds, peak GB, reference)."""
    run = synthetic_run(a, ranks, shape(a, name, layers), "full", a.pack)
    take(run, forks)
    first = step(run)["loss"]
    reset(a.device)
    took = seconds(a, lambda: step(run))
    peak = held(a.device)
    row(name, layers, "ours, fp32 weights", f"packs of {a.pack} tokens", 1e3 * took, len(forks) / took, "1",
        peak, "1", f"{first:.4f}")
    return took, peak, run.reference


def compare_hf(a, name, layers, forks, ours, kind, dtype):
    """Rows of transformers: the largest micro-batch that fits, then smaller ones, which pad less."""
    hf = hf_model(shape(a, name, layers), dtype, a.device)
    hf.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    hf.train()
    optimizer = torch.optim.AdamW(hf.parameters(), lr=1e-6, betas=(0.9, 0.95), weight_decay=0.01, fused=True)
    took, peak, reference = ours
    hf_step = functools.partial(padded_step, hf, optimizer, forks, reference, autocast=dtype == FP32)
    tried, first = 0, math.nan
    for micro in a.micro:
        if tried == 2 or late(a, 15, f"transformers, {name}, {kind}, micro-batches of {micro}"):
            break
        try:
            reset(a.device)
            found = hf_step(micro=micro)
            first = found if tried == 0 else first
            t = seconds(a, lambda: hf_step(micro=micro), 2, warm=0)
        except torch.OutOfMemoryError:
            t = math.nan
        if math.isfinite(t):
            tried += 1
            row(name, layers, f"transformers, {kind}", f"{micro} pairs", 1e3 * t, len(forks) / t,
                f"{t / took:.2f}×", held(a.device), peak / held(a.device),
                f"{first:.4f}" if tried == 1 else "")
        else:
            row(name, layers, f"transformers, {kind}", f"{micro} pairs", "out of memory", "", "", "", "", "")
            optimizer.zero_grad()
            free()


# --- generation -----------------------------------------------------------------------------------


def generate(a):
    import generate as bench  # the file beside this one

    name, count, batch, longest = a.generate
    config, rng = shape(a, name), np.random.default_rng(0)
    prompts = [rng.integers(a.vocab, size=n).tolist() for n in rng.integers(20, 200, size=count)]
    settings, end = argparse.Namespace(max_tokens=longest, batch_size=batch), set(range(0, a.vocab, 64))
    table(f"Generation: {name}, bf16, {count} prompts of 20 to 200 tokens, {batch} at a time, at most "
          f"{longest} tokens; temperature 0.7, top-p 0.8, top-k 20, every 64th id ends an answer.",
          "", "tokens/s", "mean tokens an answer", "steps", "ms a step", "peak GB")
    rates = []
    for who, make, run in (("ours", plain_model, bench.run_ours),
                           ("transformers", hf_model, bench.run_transformers)):
        if late(a, 20, f"generate, {who}"):
            continue
        with attempt(f"generate, {who}"):
            model, results = make(config, BF16, a.device).eval(), []
            run(model, prompts[:batch], end, argparse.Namespace(max_tokens=8, batch_size=batch), 0)
            reset(a.device)
            for repeat in range(2):
                if repeat and late(a, 15, f"generate, {who}, second run"):
                    break
                sync(a.device)
                start = time.perf_counter()
                lengths, steps = run(model, prompts, end, settings, repeat)
                sync(a.device)
                results.append((time.perf_counter() - start, sum(lengths), steps))
            took, tokens, steps = (statistics.median(x) for x in zip(*results))
            rates.append(tokens / took)
            row(who, tokens / took, tokens / count, steps, 1e3 * took / steps, held(a.device))
            if who == "ours":
                blocks, last = bench.floor(model, batch)
            del model
    if len(rates) == 2:
        note(f"ours to transformers: {rates[0] / rates[1]:.2f}; products of one step of {batch} rows "
             f"alone: blocks {1e3 * blocks:.3g} ms, head {1e3 * last:.3g} ms")


# --- one process a part ---------------------------------------------------------------------------

PARTS = {f.__name__: f for f in (machine, head, correctness, speed, transformers, generate)}


def run_child(a):
    """One part in this process; returns the exit code."""
    a.device = torch.device("cpu" if a.small else "cuda")
    vars(a).update(SMALL if a.small else FULL)
    torch.manual_seed(0)
    with attempt(a.child):
        PARTS[a.child](a)
    if FAILED:
        note(f"**{a.child}: not well: {'; '.join(FAILED)}**")
    return bool(FAILED)


def run_part(a, part, stop, share):
    """A part in a process group of its own; returns whether all was well."""
    until = time.time() + (stop - time.time()) * share
    print(f"\n## {part}", flush=True)
    if stop - time.time() < 15:
        print("\nskipped for want of time", flush=True)
        return False  # nothing was seen of it
    command = [sys.executable, os.path.abspath(__file__), "--child", part, "--until", str(until)]
    env = {**os.environ, "PYTHONUNBUFFERED": "1", **({"CUDA_VISIBLE_DEVICES": ""} if a.small else {})}
    start = time.time()
    process = subprocess.Popen(command + ["--small"] * a.small, env=env, start_new_session=True)
    try:
        code = process.wait(min(until + 30, stop + 15) - start)
    except subprocess.TimeoutExpired:
        code = "a timeout"
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    print(f"\n{part}: {time.time() - start:.0f} s" + (f"; **ended with {code}**" if code else ""), flush=True)
    return not code


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default=",".join(PARTS), help="which, separated by commas [all]")
    parser.add_argument("--minutes", type=float, default=9, help="for everything [9]")
    parser.add_argument("--small", action="store_true", help="toy sizes on the CPU")
    parser.add_argument("--child", choices=PARTS, help=argparse.SUPPRESS)
    parser.add_argument("--until", type=float, help=argparse.SUPPRESS)
    a = parser.parse_args()
    if a.child:
        qwen.leave(lambda: run_child(a))  # gloo's threads can abort the interpreter's own way out
    parts = a.parts.split(",")
    if set(parts) - set(PARTS):
        parser.error(f"--parts: some of {', '.join(PARTS)} expected, found {a.parts}")
    if not a.small and not torch.cuda.is_available():
        parser.error("no CUDA GPU here; --small runs the same code on the CPU at toy sizes")
    stop, good = time.time() + 60 * a.minutes, True
    for i, part in enumerate(parts):
        good &= run_part(a, part, stop, WEIGHTS[part] / sum(WEIGHTS[p] for p in parts[i:]))
    sys.exit(not good)


if __name__ == "__main__":
    main()
