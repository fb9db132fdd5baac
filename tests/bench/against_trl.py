"""The same checkpoint, pairs and loss: this repository beside TRL's DPOTrainer, in alternation.

    python tests/bench/against_trl.py --model DIR --pairs FILE [--epochs 2] [--repeats 3]

Prints a Markdown table of pairs/s and tokens/s (reference pass included on both sides, loading and saving
left out; a pair's tokens are those of both whole sequences), of the share of the rate of a 2,048^3 product in
the same process, and of peak memory; with --losses also the losses of both side by side at equal settings.
The share counts the products that the pairs need with shared prefixes and without recomputation, the same
number for both: what TRL does twice or pads is its own affair. TRL runs with gradient checkpointing on and
off. Its losses are given twice: tokenised by itself, and with our tokens, so that what differs is named.
Needs requirements-dev.txt. FILE holds rows of the official kind whose pairs all pass the filters.
"""

import argparse
import json
import math
import os
import statistics
import tempfile
import time

import common

TRL_BATCH = 4  # pairs a forward; a step accumulates as many as it needs


def run_ours(a, checkpointing):
    """One process, all of train.py but the saving."""
    import train

    out = tempfile.mkdtemp()
    train.save_checkpoint = train.qwen.export = lambda *_, **__: None
    train.os.rename = lambda *_: None  # nothing was exported, so there is nothing to rename
    spent, flops, reference_pass, count_flops = [], [], train.reference_pass, train.count_flops

    def timed(run):
        start = time.perf_counter()
        reference_pass(run)
        spent.append(time.perf_counter() - start)

    def counted(config, pack):
        flops.append(count_flops(config, pack))
        return flops[-1]
    train.reference_pass, train.count_flops = timed, counted
    o = train.parse_options(["--model", a.model, "--pairs", a.pairs, "--out", out, "--dtype", a.dtype, "--lr",
                             str(a.lr), "--warmup", "0", "--batch_size", str(a.batch_size), "--epochs",
                             str(a.epochs), "--checkpointing", checkpointing, "--max_change_ratio", "1",
                             "--tokens_per_pack", str(a.tokens_per_pack)])
    train.train(o, train.open_ranks(600))
    rows = [json.loads(line) for line in open(os.path.join(out, "metrics.jsonl"))]
    spent += [row["tokens"] / row["tokens_per_s"] for row in rows]
    forks, _ = train.data.load_forks(a.pairs, train.data.load_chat(a.model, 10**9), 8192, 1.0, True)
    return {"seconds": sum(spent), "losses": [row["loss"] for row in rows],
            "flops": sum(flops) * (1 + 1 / (3 * a.epochs)),  # the reference pass is one epoch's forward
            "tokens": a.epochs * sum(len(f) + len(f.trunk) for f in forks)}


def run_trl(a, checkpointing, our_tokens):
    """DPOTrainer as a user would call it; it scores the reference in its constructor."""
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import DPOConfig, DPOTrainer

    tokenizer = AutoTokenizer.from_pretrained(a.model)
    if our_tokens:  # one <|im_end|> and nothing behind it
        # '\n' inside {{ }}: the jinja settings in use eat a newline behind a tag
        tokenizer.chat_template = (
            r"{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}"
            r"{{ '<think>\n\n</think>\n\n' }}{% endif %}{{ m.content + '<|im_end|>' }}"
            r"{% if m.role != 'assistant' %}{{ '\n' }}{% endif %}{% endfor %}"
            r"{% if add_generation_prompt %}"
            r"{{ '<|im_start|>assistant\n<think>\n\n</think>\n\n' }}{% endif %}")
    dtype = getattr(torch, a.dtype)
    model = AutoModelForCausalLM.from_pretrained(a.model, dtype=torch.float32, attn_implementation="sdpa")
    rows = [json.loads(line) for line in open(a.pairs)]
    rows = [{"prompt": [{"role": "user", "content": r["question"]}],
             "chosen": [{"role": "assistant", "content": r["gemini_corrected_answer"]}],
             "rejected": [{"role": "assistant", "content": r["original_answer"]}]} for r in rows]
    steps = math.ceil(len(rows) / a.batch_size) * a.epochs
    config = DPOConfig(
        output_dir=tempfile.mkdtemp(), per_device_train_batch_size=TRL_BATCH, num_train_epochs=a.epochs,
        gradient_accumulation_steps=a.batch_size // TRL_BATCH, loss_type=["bco_pair"], beta=0.1,
        learning_rate=a.lr, lr_scheduler_type="cosine", warmup_steps=0, max_length=8192,
        precompute_ref_log_probs=True, precompute_ref_batch_size=TRL_BATCH, bf16=dtype == torch.bfloat16,
        use_cpu=not torch.cuda.is_available(), gradient_checkpointing=checkpointing == "full",
        logging_steps=1, report_to="none", save_strategy="no", max_grad_norm=1.0, adam_beta2=0.95,
        weight_decay=0.01, seed=0)
    start = time.perf_counter()
    trainer = DPOTrainer(model=model, args=config, train_dataset=Dataset.from_list(rows),
                         processing_class=tokenizer)
    trainer.train()
    seconds = time.perf_counter() - start
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert len(losses) == steps
    return {"seconds": seconds, "losses": losses}


def main():
    parser = common.parser(__doc__)
    parser.add_argument("--model", help="checkpoint folder (required)")
    parser.add_argument("--pairs", help="pair file (required)")
    parser.add_argument("--epochs", type=int, default=2, help="of the timed runs [2]")
    parser.add_argument("--batch_size", type=int, default=8, help="pairs a step, of the timed runs [8]")
    parser.add_argument("--lr", type=float, default=1e-5, help="peak of the cosine [1e-5]")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"), help="[float32]")
    parser.add_argument("--tokens_per_pack", type=int, default=4096, help="of ours [4096]")
    parser.add_argument("--repeats", type=int, default=3, help="of the timed runs; 0: none [3]")
    parser.add_argument("--losses", action="store_true", help="compare the losses, too")
    a = parser.parse_args()
    if a.settings:
        a = argparse.Namespace(**json.loads(a.settings))
        who, checkpointing = a.child.split()
        result = (run_ours(a, checkpointing) if who == "ours" else
                  run_trl(a, checkpointing, our_tokens=who == "trl-our-tokens"))
        import torch
        result |= {"gb": common.peak_gb(), "rate": common.gemm_rate(getattr(torch, a.dtype))}
        print(json.dumps(result))
        return

    def child(who, checkpointing, **changes):
        return common.child(__file__, **{**vars(a), **changes, "child": f"{who} {checkpointing}"})

    if not a.model or not a.pairs:
        parser.error("--model and --pairs are required")
    count = sum(1 for _ in open(a.pairs))
    if a.batch_size % TRL_BATCH or a.losses and count % TRL_BATCH:
        parser.error("--batch_size, and with --losses the number of pairs, must be multiples of "
                     f"{TRL_BATCH}: TRL takes them so many at a time")
    kinds = [(who, checkpointing) for who in ("ours", "trl") for checkpointing in ("none", "full")]
    results = {kind: [] for kind in kinds}
    for _ in range(a.repeats):
        for kind in kinds:
            results[kind].append(child(*kind))
    if a.repeats:
        seconds = {k: statistics.median(r["seconds"] for r in v) for k, v in results.items()}
        best = min(seconds["trl", c] for c in ("none", "full"))
        work, rows = results["ours", "none"][0], []
        for kind, r in results.items():
            rate = statistics.median(x["rate"] for x in r)
            spent = seconds[kind]
            rows.append([*kind, f"{count * a.epochs / spent:.3f}", f"{work['tokens'] / spent:.0f}",
                         f"{best / spent:.2f}", f"{rate / 1e9:.0f}", f"{work['flops'] / spent / rate:.0%}",
                         f"{max(x['gb'] for x in r):.2f}"])
        common.table([a.dtype, "activation checkpointing", "pairs/s", "tokens/s", "to TRL's best",
                      "GEMM GFLOP/s", "share of it", "peak memory GB"], rows)
    if a.losses:  # whole-file batches, so that the order of the pairs does not matter
        equal = {"batch_size": count, "epochs": 4, "lr": 1e-4}
        losses = [child(who, "none", **equal)["losses"] for who in ("ours", "trl-our-tokens", "trl")]
        print()
        common.table(["step", "ours", "TRL, our tokens", "TRL, its own tokens"],
                     [[step, *(f"{x:.6f}" for x in row)] for step, row in enumerate(zip(*losses))])


if __name__ == "__main__":
    main()
