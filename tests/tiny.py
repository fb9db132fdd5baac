"""A tiny Qwen3 checkpoint in HF layout with a tokenizer of its own, pairs for it, plain logits."""

import importlib.util
import json
import os
import random
from collections import Counter, namedtuple
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

import data
import model as qwen

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>"]
TRL = importlib.util.find_spec("trl")  # gpu.py does without: it names its template by an option
TEMPLATE, INSTRUCT = "", ""
if TRL:
    TEMPLATES = Path(TRL.origin).parent / "chat_templates"  # as published
    TEMPLATE = (TEMPLATES / "qwen3.jinja").read_text(encoding="utf-8")
    INSTRUCT = (TEMPLATES / "qwen3_instruct_2507.jinja").read_text(encoding="utf-8")
SHARED = Path(__file__).parents[2] / "shared" / "data"  # public files, in no repository
needs_data = pytest.mark.skipif(not SHARED.is_dir(), reason="the public data sets are not here")


def write_tokenizer(folder):
    """Byte-level, no merges: 256 bytes and the special tokens, 261 ids."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(SPECIAL)
    tokenizer.save(os.path.join(folder, "tokenizer.json"))
    with open(os.path.join(folder, "tokenizer_config.json"), "w") as f:
        json.dump({"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": TEMPLATE,
                   "eos_token": "<|im_end|>"}, f)


def write_checkpoint(folder, tied=True, vocab=265, seed=0, shard="5GB", **changes):
    """A random checkpoint by transformers, norms random too. 265 does not divide by 3."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(seed)
    shape = dict(vocab_size=vocab, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
                 num_key_value_heads=2, head_dim=16, intermediate_size=64, tie_word_embeddings=tied,
                 rope_theta=1e6, eos_token_id=258, pad_token_id=256, bos_token_id=None)
    hf = Qwen3ForCausalLM(Qwen3Config(**{**shape, **changes}))
    with torch.no_grad():
        for p in hf.parameters():
            p.copy_(1 + 0.3 * torch.randn_like(p) if p.ndim == 1 else 0.2 * torch.randn_like(p))
    hf.save_pretrained(folder, max_shard_size=shard)
    write_tokenizer(folder)
    return str(folder)


def logits(model, tokens):
    """(T, V) logits of our model for one plain sequence (T,)."""
    length = len(tokens)
    positions = torch.arange(length, device=tokens.device)
    hidden = model.hidden_states(tokens, positions, [(0, length, length, length)])
    return model.norm(hidden) @ model.head_weight().T


def generate(model, prompts, seeds, *, end=(), batch_size=32, **sampling):
    """[(ids, ended), ...] of qwen.generate, in the order of the prompts."""
    finished = qwen.generate(model, prompts, seeds, qwen.Sampling(**sampling), end, batch_size)
    return [(ids, ended) for _, ids, ended in sorted(finished)]


def write_pairs(path, count=24, seed=0):
    """Rows of the official kind; every answer shares a start with its correction."""
    rng = random.Random(seed)

    def words(n):
        return " ".join("".join(rng.choices("abcdefgh", k=rng.randint(1, 5))) for _ in range(n))
    with open(path, "w") as f:
        for _ in range(count):
            shared, tail = words(rng.randint(0, 12)), words(3)
            row = {"question": words(5),
                   "original_answer": f"x {shared} {words(rng.randint(1, 3))} {tail}",
                   "gemini_corrected_answer": f"x {shared} {words(rng.randint(1, 3))} {tail}"}
            f.write(json.dumps(row) + "\n")
    return str(path)


Pair = namedtuple("Pair", "messages chosen rejected line")


def read_pairs(path, skip_malformed=False):
    """(Pairs as text, Counter of dropped rows, Counter of what was noticed) of a pair file."""
    notes = Counter()
    pairs, dropped = data.read_rows(
        path, lambda row, line: Pair(*data.parse_pair(row, notes), line), skip_malformed)
    return pairs, dropped, notes


def write_rows(path, rows):
    """A JSONL file; returns its path."""
    data.write_rows(str(path), rows)
    return str(path)


def gpqa_row(i):
    """A question of the hub's GPQA."""
    return {"Question": f"q{i}", "Correct Answer": f"a{i}",
            **{f"Incorrect Answer {k}": text for k, text in enumerate("bcd", 1)}}
