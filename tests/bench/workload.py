"""The two workloads of MEASURED.md: a random checkpoint with its tokenizer, and pairs beside it.

    python tests/bench/workload.py --out OUT                                  # A
    python tests/bench/workload.py --out OUT --tokenizer DIR --pairs FILE     # B

A: 8 layers of 512, fp32, a vocabulary of 16,384 of made-up words; the pairs' answers part after 10
to 90 % of their words. B: 4 layers of 512, bf16, with the tokenizer files of a Qwen3 checkpoint DIR
and the first 32 rows of FILE. OUT is then a --model for the other benchmarks and for train.py,
OUT/pairs.jsonl its --pairs. All is made from fixed seeds. Needs requirements-dev.txt.
"""

import itertools
import json
import os
import random
import shutil
import string
from dataclasses import asdict

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

import common
import tiny
from common import data, qwen

PAIRS = 32
# Of one turn it writes the same as Qwen3's in non-thinking mode; the block stands in answers, too,
# as TRL needs it.
TEMPLATE = (tiny.TEMPLATES / "qwen3_training.jinja").read_text(encoding="utf-8")


rng = random.Random(7)
WORDS = ["".join(rng.choice(string.ascii_lowercase) for _ in range(rng.randint(2, 9)))
         for _ in range(6000)]


def text(rng, count):
    return " ".join(rng.choice(WORDS) for _ in range(count))


def make_pair(rng, index):
    """Two answers of 75 to 250 words that part after 10 to 90 % of them."""
    length = rng.randint(150, 500) // 2
    shared = int(length * rng.uniform(0.1, 0.9))
    start, rejected, chosen = (text(rng, n) for n in (shared, length - shared, length - shared))
    return {"question": text(rng, rng.randint(20, 60)), "original_answer": f"{start} {rejected}",
            "gemini_corrected_answer": f"{start} {chosen}", "index": index}


def train_tokenizer(rng, vocab):
    """Byte-level BPE, like Qwen3's, of 400 made-up texts."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=vocab, special_tokens=tiny.SPECIAL,
                                  show_progress=False,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator((text(rng, 200) for _ in range(400)), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>",
                                   pad_token="<|endoftext|>", chat_template=TEMPLATE)


def write_model(folder, layers, vocab, dtype):
    """Random weights as transformers starts them, for the tokenizer that lies in the folder."""
    token = data.load_chat(folder, vocab, "hybrid").tokenizer.token_to_id
    torch.manual_seed(0)
    config = Qwen3Config(**asdict(common.config(layers=layers, vocab=vocab)), bos_token_id=None,
                         eos_token_id=token("<|im_end|>"), pad_token_id=token("<|endoftext|>"))
    Qwen3ForCausalLM(config).to(dtype).save_pretrained(folder)


def main():
    a = common.options(__doc__, ("out",), tokenizer="", pairs="")
    os.makedirs(a.out)  # nothing is overwritten
    if a.tokenizer:
        with open(a.pairs) as f:
            rows = [json.loads(line) for line in itertools.islice(f, PAIRS)]
        for file in qwen.SIDE_FILES:
            if os.path.exists(os.path.join(a.tokenizer, file)):
                shutil.copyfile(os.path.join(a.tokenizer, file), os.path.join(a.out, file))
        write_model(a.out, layers=4, vocab=151936, dtype=torch.bfloat16)
    else:
        rng = random.Random(0)  # one stream for tokenizer and pairs
        train_tokenizer(rng, 16384).save_pretrained(a.out)
        rows = [make_pair(rng, i) for i in range(PAIRS)]
        write_model(a.out, layers=8, vocab=16384, dtype=torch.float32)
    with open(os.path.join(a.out, "pairs.jsonl"), "w") as f:
        f.writelines(json.dumps(row) + "\n" for row in rows)


if __name__ == "__main__":
    main()
