"""The same checkpoint, pairs and loss: this repository beside TRL's DPOTrainer, in alternation.

    python tests/bench/against_trl.py --model DIR --pairs FILE [--epochs 2] [--repeats 3]
    python tests/bench/against_trl.py --model DIR --pairs FILE --repeats 0 --losses 4

A Markdown table of pairs/s, tokens/s (of both whole sequences; reference pass included, loading and
saving left out), peak memory, and the share of the rate of a 2,048^3 product, of the products that
the pairs need with shared prefixes and without recomputation. With --losses also the losses of so
many steps, all pairs a batch: ours, TRL's on our tokens, and TRL's on its own. FILE holds rows of
the official kind whose pairs all pass the filters. Needs requirements-dev.txt.
"""

import argparse
import json
import statistics
import tempfile
import time

import torch

import common
from common import data, qwen, train

TRL_BATCH = 4  # pairs a forward; a step accumulates as many as it needs
# One <|im_end|> and nothing behind it. '\n' stands inside {{ }}: the jinja settings in use eat a
# newline behind a tag.
OUR_TEMPLATE = (
    r"{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}"
    r"{{ '<think>\n\n</think>\n\n' }}{% endif %}{{ m.content + '<|im_end|>' }}"
    r"{% if m.role != 'assistant' %}{{ '\n' }}{% endif %}{% endfor %}"
    r"{% if add_generation_prompt %}"
    r"{{ '<|im_start|>assistant\n<think>\n\n</think>\n\n' }}{% endif %}")


def run_ours(a, checkpointing):
    """(seconds, losses): all of train.py but the saving."""
    spent, reference_pass = [], train.reference_pass

    def timed(run):
        start = time.perf_counter()
        reference_pass(run)
        spent.append(time.perf_counter() - start)
    train.reference_pass = timed
    train.save_checkpoint = lambda run: None
    out = tempfile.mkdtemp()
    o = train.parse_options([
        "--model", a.model, "--pairs", a.pairs, "--out", out, "--dtype", a.dtype, "--lr", str(a.lr),
        "--warmup", "0", "--batch_size", str(a.batch_size), "--epochs", str(a.epochs),
        "--checkpointing", checkpointing, "--max_change_ratio", "1", "--tokens_per_pack", "4096",
        "--template", "hybrid"])
    train.train(o, train.open_ranks(600))
    rows = data.read_log(f"{out}/metrics.jsonl")
    spent += [row["tokens"] / row["tokens_per_s"] for row in rows]
    return sum(spent), [row["loss"] for row in rows]


def run_trl(a, checkpointing, template=None):
    """(seconds, losses): DPOTrainer as a user would call it; it scores the reference in its
    constructor."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import DPOConfig, DPOTrainer

    tokenizer = AutoTokenizer.from_pretrained(a.model)
    if template:
        tokenizer.chat_template = template
    model = AutoModelForCausalLM.from_pretrained(a.model, dtype=torch.float32,
                                                 attn_implementation="sdpa")
    rows = [json.loads(line) for line in open(a.pairs)]
    rows = [{"prompt": [{"role": "user", "content": r["question"]}],
             "chosen": [{"role": "assistant", "content": r["gemini_corrected_answer"]}],
             "rejected": [{"role": "assistant", "content": r["original_answer"]}]} for r in rows]
    config = DPOConfig(
        output_dir=tempfile.mkdtemp(), per_device_train_batch_size=TRL_BATCH,
        gradient_accumulation_steps=a.batch_size // TRL_BATCH, num_train_epochs=a.epochs,
        loss_type=["bco_pair"], beta=0.1, learning_rate=a.lr, lr_scheduler_type="cosine",
        warmup_steps=0, max_length=8192, precompute_ref_log_probs=True,
        precompute_ref_batch_size=TRL_BATCH, bf16=a.dtype == "bfloat16",
        use_cpu=not torch.cuda.is_available(), gradient_checkpointing=checkpointing == "full",
        logging_steps=1, report_to="none", save_strategy="no", max_grad_norm=1.0, adam_beta2=0.95,
        weight_decay=0.01, seed=0)
    start = time.perf_counter()
    trainer = DPOTrainer(model=model, args=config, train_dataset=Dataset.from_list(rows),
                         processing_class=tokenizer)
    trainer.train()
    seconds = time.perf_counter() - start
    return seconds, [row["loss"] for row in trainer.state.log_history if "loss" in row]


def measure(run, a, *args):
    """(seconds, peak GB, FLOP/s of a product, losses)."""
    seconds, losses = run(a, *args)
    return seconds, common.peak_gb(), common.gemm_rate(getattr(torch, a.dtype)), losses


def speed_table(a, forks):
    results = {(name, checkpointing): [] for name in ("ours", "TRL")
               for checkpointing in ("none", "full")}
    for _ in range(a.repeats):
        for (name, checkpointing), runs in results.items():
            run = run_ours if name == "ours" else run_trl
            runs.append(common.own_process(measure, run, a, checkpointing))
    medians = {kind: [statistics.median(run[i] for run in runs) for i in range(3)]
               for kind, runs in results.items()}
    best = min(medians["TRL", "none"][0], medians["TRL", "full"][0])
    # Tokens of both whole sequences; the reference pass is one epoch's forward, a third of it.
    tokens = a.epochs * sum(len(f) + len(f.trunk) for f in forks)
    config = qwen.read_config(a.model)
    flops = sum(common.count_flops(config, data.make_pack([fork], [0])) for fork in forks)
    flops *= a.epochs + 1 / 3
    rows = []
    for kind, (seconds, gb, rate) in medians.items():
        rows.append([*kind, f"{len(forks) * a.epochs / seconds:.3f}", f"{tokens / seconds:.0f}",
                     f"{best / seconds:.2f}", f"{rate / 1e9:.0f}", f"{flops / seconds / rate:.0%}",
                     f"{gb:.2f}"])
    common.table([a.dtype, "activation checkpointing", "pairs/s", "tokens/s", "to TRL's best",
                  "GEMM GFLOP/s", "share of it", "peak memory GB"], rows)
    print()


def main():
    a = common.options(__doc__, ("model", "pairs"), epochs=2, batch_size=8, lr=1e-5,
                       dtype="float32", repeats=3, losses=0)
    chat = data.load_chat(a.model, 10**9, "hybrid")
    forks, _ = data.load_forks(a.pairs, chat, 8192, 1.0, True)
    if a.repeats:
        speed_table(a, forks)
    if a.losses:  # whole-file batches, so that the order of the pairs does not matter
        equal = argparse.Namespace(**{**vars(a), "batch_size": len(forks), "epochs": a.losses,
                                      "lr": 1e-4})
        sides = ((run_ours, "none"), (run_trl, "none", OUR_TEMPLATE), (run_trl, "none"))
        losses = [common.own_process(measure, run, equal, *args)[3] for run, *args in sides]
        common.table(["step", "ours", "TRL, our tokens", "TRL, its own tokens"],
                     [[step, *(f"{x:.6f}" for x in row)]
                      for step, row in enumerate(zip(*losses))])


if __name__ == "__main__":
    main()
