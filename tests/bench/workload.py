"""The two workloads of the README's tables: a random checkpoint with its tokenizer, and pairs beside it.

    python tests/bench/workload.py OUT                                  # A
    python tests/bench/workload.py OUT --tokenizer DIR --pairs FILE     # B

A: 8 layers of 512, fp32, with a vocabulary of 16,384 that is trained here, on made-up words; the pairs are of
the same words, the first error after 10 to 90 % of an answer. B: 4 layers of 512, bf16, with the tokenizer
files of a Qwen3 checkpoint DIR, its vocabulary of 151,936, and the first pairs of FILE. Embeddings are tied.
OUT is then a --model for the other benchmarks and for train.py, OUT/pairs.jsonl its --pairs. All is made from
fixed seeds: the same versions of torch, transformers and tokenizers write the same bytes. Needs
requirements-dev.txt. FILE holds rows of the official kind, as against_trl.py wants them.
"""

import argparse
import json
import os
import random
import shutil
import string
import sys
from dataclasses import asdict

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

import common
import tiny
from common import data, qwen

A = {"layers": 8, "vocab": 16384, "dtype": torch.float32}
B = {"layers": 4, "vocab": 151936, "dtype": torch.bfloat16}  # Qwen3's own vocabulary
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>"]
ANSWERS = ("original_answer", "gemini_corrected_answer")
# Of one turn it writes the same as Qwen3's in non-thinking mode; the block stands in answers, too, as TRL
# needs it.
TEMPLATE = (tiny.TEMPLATES / "qwen3_training.jinja").read_text(encoding="utf-8")


def made_up_words():
    """6,000 of 2 to 9 letters."""
    rng, letters = random.Random(7), string.ascii_lowercase
    return ["".join(rng.choice(letters) for _ in range(rng.randint(2, 9))) for _ in range(6000)]


WORDS = made_up_words()


def text(rng, count):
    return " ".join(rng.choice(WORDS) for _ in range(count))


def make_pair(rng, index):
    """Two answers of 75 to 250 words that part after 10 to 90 % of them."""
    length = rng.randint(150, 500) // 2
    shared = int(length * rng.uniform(0.1, 0.9))
    start, *rests = (text(rng, n) for n in (shared, length - shared, length - shared))
    answers = {name: f"{start} {rest}" for name, rest in zip(ANSWERS, rests)}
    return {"question": text(rng, rng.randint(20, 60)), **answers, "index": index}


def train_tokenizer(rng, vocab):
    """Byte-level BPE, like Qwen3's, of 400 made-up texts."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=vocab, special_tokens=SPECIAL, show_progress=False,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator((text(rng, 200) for _ in range(400)), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>",
                                   pad_token="<|endoftext|>", chat_template=TEMPLATE)


def first_pairs(path, count):
    """The first rows of a pair file, as they are; UserError where one is not of the official kind."""
    def parse(row, line):
        missing = [name for name in ("question", *ANSWERS) if not isinstance(row.get(name), str)]
        if missing:
            raise qwen.UserError(f"{missing[0]!r} with a text expected")
        return row

    rows = data.read_rows(path, parse)[0][:count]
    if len(rows) < count:
        raise qwen.UserError(f"{path}: {count} pairs expected, found {len(rows)}")
    return rows


def write_model(folder, layers, vocab, dtype):
    """Random weights as transformers starts them, for the tokenizer that lies in the folder."""
    token = data.load_chat(folder, vocab).tokenizer.token_to_id
    torch.manual_seed(0)
    config = Qwen3Config(**asdict(common.config(layers=layers, vocab=vocab)), bos_token_id=None,
                         eos_token_id=token("<|im_end|>"), pad_token_id=token("<|endoftext|>"))
    Qwen3ForCausalLM(config).to(dtype).save_pretrained(folder)


def write(a):
    """A, or B where a tokenizer is given. What is given is read before anything is written."""
    if os.path.exists(a.out):
        raise qwen.UserError(f"{a.out} exists already: nothing is overwritten")
    if a.tokenizer:
        data.load_chat(a.tokenizer, B["vocab"])
        rows = first_pairs(a.pairs, a.take)
        os.makedirs(a.out)
        for file in qwen.SIDE_FILES:
            if os.path.exists(os.path.join(a.tokenizer, file)):
                shutil.copyfile(os.path.join(a.tokenizer, file), os.path.join(a.out, file))
    else:
        rng = random.Random(0)  # one stream for tokenizer and pairs
        train_tokenizer(rng, A["vocab"]).save_pretrained(a.out)
        rows = [make_pair(rng, i) for i in range(a.take)]
    write_model(a.out, **B if a.tokenizer else A)
    with open(os.path.join(a.out, "pairs.jsonl"), "w") as f:
        f.writelines(json.dumps(row) + "\n" for row in rows)


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", metavar="OUT", help="folder to make")
    parser.add_argument("--tokenizer", metavar="DIR", help="Qwen3 checkpoint whose tokenizer to take")
    parser.add_argument("--pairs", metavar="FILE", help="pair file to take the first rows of")
    parser.add_argument("--take", type=int, default=32, help="pairs to make or to take [32]")
    a = parser.parse_args()
    if bool(a.tokenizer) != bool(a.pairs):
        sys.exit("error: --tokenizer and --pairs go together")
    if a.take < 1:
        sys.exit(f"error: --take is {a.take}, a number above 0 expected")
    try:
        write(a)
    except (qwen.UserError, OSError) as e:
        sys.exit(f"error: {e}")


if __name__ == "__main__":
    main()
