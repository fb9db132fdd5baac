"""Qwen3 by hand: configuration, blocks, attention over forks, generation, safetensors in and out.

Comes in:  a checkpoint folder in Hugging Face layout, token ids laid out as forks (data.py makes them).
Goes out:  hidden states, or the log-probability of every scored row (loss.linear_logps inside `forward`),
           or sampled continuations of prompts (`generate`).

Parameter names are HF's without the leading "model.", so that a reader can hold both side by side
(transformers/models/qwen3/modeling_qwen3.py). Shapes: T tokens of a pack, D hidden width, H query heads,
K key heads, d head width, R scored rows, V vocabulary. There is no batch dimension and no padding:
several sequences lie one after the other in T, and attention keeps them apart.
"""

import argparse
import contextlib
import functools
import importlib
import io
import json
import math
import os
import re
import shutil
import sys
import time
from collections import deque
from dataclasses import dataclass, field, fields
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import nn
from torch.nn.attention.bias import causal_lower_right
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

from loss import linear_logps


# On a CPU torch hands these functions to MKL, which picks a function's kernel on its first call in a process.
# Where several threads make that call, one of them may get a low-accuracy kernel for its share: no error, up
# to 1.5e-4 off (pytorch/pytorch issue 188792). Hence a first call that is too small for two threads. This can
# go once torch comes with MKL 2025, which no longer does it.
for _dtype in (torch.float32, torch.float64):
    for _function in (torch.cos, torch.sin, torch.exp, torch.log):
        _function(torch.ones(8, dtype=_dtype))


class UserError(Exception):
    """Something the user can mend: the message names file, place, what was found, what was expected."""


# --- configuration --------------------------------------------------------------------------------


@dataclass
class Config:
    """The numbers of a dense Qwen3 that change the computation (names as in config.json)."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    tie_word_embeddings: bool


# Keys that do not change the forward pass. What is neither here nor in Config is refused by name.
HARMLESS = {
    "architectures", "model_type", "bos_token_id", "eos_token_id", "pad_token_id", "torch_dtype", "dtype",
    "transformers_version", "use_cache", "initializer_range", "max_window_layers", "max_position_embeddings",
    "sliding_window", "_name_or_path", "output_attentions", "output_hidden_states", "return_dict", "id2label",
    "label2id", "chunk_size_feed_forward", "unsloth_fixed",
}
# Keys that would change it, with the only values this file computes.
ONLY = {
    "model_type": ("qwen3",), "hidden_act": ("silu",), "attention_bias": (False,),
    "attention_dropout": (0, None), "use_sliding_window": (False, None), "rope_scaling": (None,),
    "quantization_config": (None,),
}


def read_config(folder: str) -> Config:
    """Read folder/config.json in either layout (rope_theta at the top, or inside rope_parameters).

    Raises UserError that lists every key that is missing, of a wrong type, or not supported.
    """
    path = os.path.join(folder, "config.json")
    raw = read_json(path)
    problems = []
    if "model_type" not in raw:
        problems.append('"model_type" is missing, "qwen3" expected')
    rope = raw.pop("rope_parameters", None) or {}
    if not isinstance(rope, dict):
        raise UserError(f'{path}: "rope_parameters": an object expected, found {rope!r:.60}')
    if rope.get("rope_type", "default") != "default" or rope.get("partial_rotary_factor", 1.0) != 1.0:
        problems.append(f'"rope_parameters" is {rope!r:.200}; only "rope_type": "default" is supported')
    elif set(rope) - {"rope_type", "rope_theta", "partial_rotary_factor"}:
        problems.append(f'"rope_parameters" holds {sorted(rope)}; only rope_type, rope_theta are supported')
    if "rope_theta" in rope:
        if raw.get("rope_theta", rope["rope_theta"]) != rope["rope_theta"]:
            problems.append('"rope_theta" and "rope_parameters" contradict each other')
        raw["rope_theta"] = rope["rope_theta"]
    layer_types = raw.pop("layer_types", None) or []
    if not isinstance(layer_types, list) or any(kind != "full_attention" for kind in layer_types):
        problems.append(f'"layer_types" is {layer_types!r:.80}; only "full_attention" is supported')
    elif layer_types and len(layer_types) != raw.get("num_hidden_layers"):
        problems.append(f'"layer_types" names {len(layer_types)} layers, "num_hidden_layers" is '
                        f'{raw.get("num_hidden_layers")!r:.20}')
    raw.setdefault("head_dim", 128)  # HF's default; published files name it
    raw.setdefault("tie_word_embeddings", False)
    values = {}
    for name, kind in Config.__annotations__.items():
        value = raw.pop(name, None)
        number_or_flag = (int, float) if kind is float else kind
        fits = isinstance(value, number_or_flag) and isinstance(value, bool) == (kind is bool)
        largest = 1e3 if name == "num_hidden_layers" else 1e12 if kind is float else 2**22
        if not fits or (kind is not bool and not 0 < value <= largest):
            expected = "true or false" if kind is bool else f"a {kind.__name__} above 0 (to {largest:g})"
            problems.append(f'"{name}": {expected} expected, found {value!r:.60}')
        values[name] = value
    for name, value in raw.items():
        if name in ONLY and value not in ONLY[name]:
            problems.append(f'"{name}" is {value!r:.60}; only {ONLY[name][0]!r} is supported')
        elif name not in ONLY and name not in HARMLESS and value not in (None, False, [], {}):
            problems.append(f'"{name}": {value!r:.60} is not known here and might change the computation')
    if not problems:
        heads, groups = values["num_attention_heads"], values["num_key_value_heads"]
        if heads % groups or values["head_dim"] % 2 or heads * values["head_dim"] > 2**22:
            problems.append(f"{heads} query heads on {groups} key heads of width {values['head_dim']}: "
                            "a multiple and an even width expected")
    if problems:
        raise UserError(f"{path} is not a configuration this program computes:\n  " + "\n  ".join(problems))
    return Config(**values)


def unique(pairs: list) -> dict:
    """For json's object_pairs_hook: of a key that is there twice the last one would win silently."""
    found = dict(pairs)
    if len(found) < len(pairs):
        first = set()
        twice = next(key for key, _ in pairs if key in first or first.add(key))
        raise ValueError(f"the object holds {twice!r:.60} twice")
    return found


def read_json(path: str) -> dict:
    """A JSON object from a file, or a UserError naming the file and the place."""
    if os.path.exists(path) and not os.path.isfile(path):
        raise UserError(f"{path}: a file expected")  # opening a pipe would wait for a writer
    try:
        with open(path, encoding="utf-8") as f:
            value = json.load(f, object_pairs_hook=unique)
    except FileNotFoundError:
        raise UserError(f"{path} is missing") from None
    except (OSError, ValueError, RecursionError) as e:
        raise UserError(f"{path}: {e}") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: a JSON object expected, found {type(value).__name__}")
    return value


# --- the network ----------------------------------------------------------------------------------


class Qwen3(nn.Module):
    """The whole network. `forward` goes from token ids to the log-probability of every scored row."""

    def __init__(self, config: Config, checkpointing: bool = False):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, checkpointing) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        # Tied models have no parameter here: the embedding serves twice, inside the root's forward, where
        # FSDP has it gathered. Untied, the head is a unit of its own.
        self.lm_head = Head(config)

    def forward(self, tokens, positions, forks, rows, targets):
        """tokens, positions (T,) int64; forks as in `layout`; rows (R,) indices into T; targets (R,) ids.

        Returns (R,) fp32: log p(targets[i] | everything that token rows[i] sees). R = 0 is allowed.
        """
        # Only scored rows reach the norm and the head. index_select: h[rows] is 5-7x slower on CPU.
        hidden = self.norm(self.trunk(tokens, positions, forks).index_select(0, rows))
        return self.lm_head(hidden, targets, self.tied_weight())

    def trunk(self, tokens, positions, forks):
        """(T,) ids to the (T, D) output of the last block, before the final norm."""
        return self.blocks(tokens, positions, lambda q, k, v, layer: fork_attention(q, k, v, forks))

    def blocks(self, tokens, positions, attend):
        """Through all blocks, before the final norm. `attend(q, k, v, layer)` is the attention."""
        x = self.embed_tokens(tokens)
        cos, sin = rope_table(positions, self.config, x.dtype)
        for layer, block in enumerate(self.layers):
            x = block(x, cos, sin, functools.partial(attend, layer=layer))
        return x

    def logits(self, tokens):
        """(T, V) logits of one plain sequence (T,), in the compute dtype: for tests and small inputs."""
        forks = [(0, len(tokens), len(tokens), len(tokens))]
        hidden = self.norm(self.trunk(tokens, torch.arange(len(tokens), device=tokens.device), forks))
        return hidden @ self.head_weight().T

    def tied_weight(self):
        return self.embed_tokens.weight if self.config.tie_word_embeddings else None

    def head_weight(self):
        return self.lm_head.weight if self.tied_weight() is None else self.tied_weight()


class Block(nn.Module):
    def __init__(self, config, checkpointing):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)
        self.checkpointing = checkpointing

    def forward(self, x, cos, sin, attend):
        # Checkpointing sits inside the block's forward, hence inside FSDP's hooks: the recomputation
        # finds the weights that backward has gathered already. Nothing here is random.
        if self.checkpointing and torch.is_grad_enabled():
            return checkpoint(self.run, x, cos, sin, attend, use_reentrant=False, preserve_rng_state=False)
        return self.run(x, cos, sin, attend)

    def run(self, x, cos, sin, attend):
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, attend)
        return x + self.mlp(self.post_attention_layernorm(x))


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.head_dim = config.head_dim  # explicit: H * d differs from D in 0.6B, 4B and 32B
        wide, narrow = config.num_attention_heads * self.head_dim, config.num_key_value_heads * self.head_dim
        self.q_proj = nn.Linear(config.hidden_size, wide, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, narrow, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, narrow, bias=False)
        self.o_proj = nn.Linear(wide, config.hidden_size, bias=False)
        self.q_norm = RMSNorm(self.head_dim, config.rms_norm_eps)
        self.k_norm = RMSNorm(self.head_dim, config.rms_norm_eps)

    def forward(self, x, cos, sin, attend):
        heads = (len(x), -1, self.head_dim)
        q = self.q_norm(self.q_proj(x).view(heads)).transpose(0, 1)  # (H, T, d), normed before RoPE
        k = self.k_norm(self.k_proj(x).view(heads)).transpose(0, 1)  # (K, T, d)
        v = self.v_proj(x).view(heads).transpose(0, 1)
        out = attend(rotate(q, cos, sin), rotate(k, cos, sin), v)
        return self.o_proj(out.transpose(0, 1).reshape(len(x), -1))


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class RMSNorm(nn.Module):
    def __init__(self, width, eps):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(width)), eps

    def forward(self, x):
        # HF's order: statistics in fp32, back to x's dtype, then the weight. F.rms_norm's own weight
        # argument rounds once only: a quarter of all bf16 outputs differ. On CUDA it is one kernel.
        return self.weight * F.rms_norm(x, x.shape[-1:], eps=self.eps)


class Head(nn.Module):
    def __init__(self, config):
        super().__init__()
        if not config.tie_word_embeddings:
            self.weight = nn.Parameter(torch.empty(config.vocab_size, config.hidden_size))

    def forward(self, hidden, targets, tied_weight=None):
        return linear_logps(hidden, self.weight if tied_weight is None else tied_weight, targets)


def rope_table(positions, config, dtype):
    """(T,) positions to cos and sin (T, d), computed in fp32, cast to the activations' dtype (as HF).

    Made anew for each pack: a buffer would have to be rebuilt after meta-device construction, and
    forgetting that raises no error.
    """
    index = torch.arange(0, config.head_dim, 2, device=positions.device).float()
    frequencies = 1.0 / config.rope_theta ** (index / config.head_dim)
    angles = positions[:, None].float() * frequencies
    angles = torch.cat([angles, angles], -1)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x, cos, sin):
    """Rotary position embedding of x (heads, T, d), halves rotated together as in HF's rotate_half."""
    left, right = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-right, left], -1) * sin


# --- attention over forks -------------------------------------------------------------------------


def fork_attention(q, k, v, forks):
    """Softmax attention inside forks: q (H, T, d), k and v (K, T, d) to (H, T, d). One body for CPU and GPU.

    forks: list of (start, trunk_end, rejected_end, chosen_end) in tokens, one after the other. A query
    sees a key if and only if the key is of the same fork, not later in the row, and in the trunk or in
    the query's own branch. So a fork takes three calls: its trunk over itself, and each branch over trunk
    + itself, aligned at the bottom right. There is no [T, T] mask and no masked-out work between forks.

    On CUDA in 16 bit these are flash kernels, which take grouped heads and this alignment by themselves
    (torch/nn/attention/bias.py). In fp32, and on a CPU, a (branch, trunk + branch) mask is made.
    """
    dtype = q.dtype
    if not q.is_cuda and dtype != torch.float64:
        q, k, v = q.float(), k.float(), v.float()  # the CPU's 16-bit backward takes twice as long
    sizes = []
    for start, trunk_end, rejected_end, chosen_end in forks:
        sizes += [trunk_end - start, rejected_end - trunk_end, chosen_end - rejected_end]
    # split, because its backward is one cat; the backward of each slice would fill a whole (H, T, d).
    queries, keys, values = (t[None].split(sizes, 2) for t in (q, k, v))
    pieces = []
    for trunk in range(0, len(sizes), 3):
        pieces.append(F.scaled_dot_product_attention(
            queries[trunk], keys[trunk], values[trunk], is_causal=True, enable_gqa=True))
        for branch in (trunk + 1, trunk + 2):
            if sizes[branch] == 0:
                continue
            key = torch.cat([keys[trunk], keys[branch]], 2)
            value = torch.cat([values[trunk], values[branch]], 2)
            mask = causal_lower_right(sizes[branch], sizes[trunk] + sizes[branch])
            pieces.append(F.scaled_dot_product_attention(
                queries[branch], key, value, attn_mask=mask, enable_gqa=True))
    return torch.cat(pieces, 2)[0].to(dtype)


# --- generation -----------------------------------------------------------------------------------

CELLS = 256  # tokens that a new cache holds at least; it doubles when full
CPU_ROWS = 16  # MKL rounds products of fewer rows differently, so on a CPU rows are filled up to this number


@dataclass
class Row:
    """A sample under way."""

    index: int  # of its prompt
    random: np.random.Generator
    cache: torch.Tensor  # (layers, 2, K, cells, d): keys and values
    length: int  # cells that are in use: the prompt and all ids but the last
    ids: list = field(default_factory=list)  # sampled so far


@torch.no_grad()
def generate(model: Qwen3, prompts, seeds, *, max_tokens, temperature=0.7, top_p=0.8, top_k=20, end=(),
             batch_size=32, on_done=None, progress=None) -> list:
    """Continue every prompt by sampling; temperature 0 is greedy.

    model     plain (not sharded), on a CPU or a GPU, any dtype
    prompts   lists of token ids, of any lengths above 0
    seeds     one int >= 0 a prompt, all the chance there is
    top_k     so many most likely tokens stay, 0: all. Of tokens that tie for the last place some stay
              (transformers keeps them all)
    top_p     then the fewest most likely tokens stay whose probabilities sum to top_p or more; 1: all
    end       token ids that end a sample
    on_done   called as on_done(index, ids, ended) as soon as a sample is finished
    progress  called as progress(n) after every step, n the tokens sampled in it, end tokens included
    returns   (ids, ended) a prompt: ids without the end token; ended False: max_tokens cut it off

    At most batch_size samples run at a time; a finished one makes room for the next prompt at once. The
    device is waited for once a step. A token's keys and values are 2 * layers * K * d numbers; a row's
    cache holds CELLS tokens, or at most twice as many as the row has.

    A sample depends on prompt, seed and settings: its t-th token is drawn with the t-th number of a
    Philox generator of its own, so batch size, neighbours and rank change it through rounding alone. On a
    CPU in fp32 not even so (measured with MKL): prompts go through one by one, the blocks get CPU_ROWS
    rows or more, and each row attends to its own cache. Elsewhere rounding may decide a near tie.
    Raises UserError that lists all wrong arguments, or where logits are not finite.
    """
    check_generate(model, prompts, seeds, max_tokens, temperature, top_p, top_k, batch_size)
    end, results, waiting, rows = set(end), [None] * len(prompts), deque(range(len(prompts))), []
    while rows or waiting:
        hidden = [decode(model, rows)] if rows else []
        while waiting and len(rows) < batch_size:
            i = waiting.popleft()
            last, cache = prefill(model, prompts[i])
            hidden.append(last)
            rows.append(Row(i, np.random.Generator(np.random.Philox(seeds[i])), cache, len(prompts[i])))
        logits = next_logits(model, torch.cat(hidden))
        uniforms = torch.tensor([row.random.random() for row in rows], dtype=torch.float64)
        tokens = sample(logits, uniforms.to(logits.device), temperature, top_p, top_k)
        tokens = tokens.masked_fill(~logits.amax(-1).isfinite(), -1).tolist()  # waits for the device
        running = []
        for row, token in zip(rows, tokens):
            if token < 0:
                raise UserError(f"prompt {row.index}: logits of token {len(row.ids)} are not finite")
            if token not in end:
                row.ids.append(token)
            if token in end or len(row.ids) == max_tokens:
                results[row.index] = (row.ids, token in end)
                if on_done:
                    on_done(row.index, *results[row.index])
            else:
                running.append(row)
        rows = running
        if progress:
            progress(len(tokens))
    return results


def check_generate(model, prompts, seeds, max_tokens, temperature, top_p, top_k, batch_size):
    """Raises one UserError that lists every wrong argument of `generate`."""
    problems = [f"{name} {found}, {wanted} expected" for name, found, wanted, fits in (
        ("seeds:", len(seeds), f"{len(prompts)}, one a prompt,", len(seeds) == len(prompts)),
        ("max_tokens", max_tokens, "1 or more", max_tokens >= 1),
        ("temperature", temperature, "0 (greedy) or more, and finite,", 0 <= temperature < math.inf),
        ("top_p", top_p, "above 0 and at most 1", 0 < top_p <= 1),
        ("top_k", top_k, "0 (all) or more", top_k >= 0),
        ("batch_size", batch_size, "1 or more", batch_size >= 1),
        *((f"seed {i}:", seed, "0 or more", seed >= 0) for i, seed in enumerate(seeds)),
        *((f"prompt {i}: ids", f"{min(ids)} to {max(ids)}" if len(ids) else "none",
           f"at least one, 0 to {model.config.vocab_size - 1},",
           len(ids) and 0 <= min(ids) <= max(ids) < model.config.vocab_size)
          for i, ids in enumerate(prompts))) if not fits]
    if problems:
        more = [f"... and {len(problems) - 20} more"] * (len(problems) > 20)
        raise UserError("generate:\n  " + "\n  ".join(problems[:20] + more))


def prefill(model, prompt):
    """A prompt's last hidden state (1, D), and the cache of its row."""
    config, device = model.config, model.norm.weight.device
    cells = max(CELLS, 2 * len(prompt))
    cache = model.norm.weight.new_empty(
        config.num_hidden_layers, 2, config.num_key_value_heads, cells, config.head_dim)

    def attend(q, k, v, layer):
        cache[layer, 0, :, :len(prompt)] = k
        cache[layer, 1, :, :len(prompt)] = v
        return fork_attention(q, k, v, [(0, len(prompt), len(prompt), len(prompt))])

    tokens = torch.tensor(prompt, device=device)
    hidden = model.blocks(tokens, torch.arange(len(prompt), device=device), attend)
    return hidden[-1:], cache


def decode(model, rows):
    """The last token of every row through the blocks, (rows, D); each cache gets its key and value."""
    device = model.norm.weight.device
    fill = [0] * (CPU_ROWS - len(rows)) if device.type == "cpu" else []
    tokens = torch.tensor([row.ids[-1] for row in rows] + fill, device=device)
    positions = torch.tensor([row.length for row in rows] + fill, device=device)
    for row in rows:
        if row.length == row.cache.shape[3]:
            row.cache = F.pad(row.cache, (0, 0, 0, row.length))

    def attend(q, k, v, layer):
        out = torch.zeros_like(q)
        for i, row in enumerate(rows):
            cache = row.cache[layer, :, :, :row.length + 1]
            cache[0, :, -1] = k[:, i]
            cache[1, :, -1] = v[:, i]
            out[:, i:i + 1] = F.scaled_dot_product_attention(
                q[None, :, i:i + 1], cache[:1], cache[1:], enable_gqa=True)[0]
        return out

    hidden = model.blocks(tokens, positions, attend)
    for row in rows:
        row.length += 1
    return hidden[:len(rows)]


def next_logits(model, hidden):
    """(n, D) states before the final norm to (n, V) logits in the model's dtype."""
    fill = 0 if hidden.is_cuda else max(0, CPU_ROWS - len(hidden))
    # On a CPU this order is faster for few rows than hidden @ weight.T, the transposed copy included.
    logits = model.head_weight() @ F.pad(model.norm(hidden), (0, 0, 0, fill)).T
    return logits[:, :len(hidden)].T.contiguous()


def sample(logits, uniforms, temperature, top_p, top_k):
    """One id a row: logits (n, V), uniforms (n,) fp64 in [0, 1), the rest as in `generate`; (n,) int64."""
    if temperature == 0:
        return logits.argmax(-1)
    probs, ids = filtered(logits, temperature, top_p, top_k)
    cdf = probs.cumsum(-1)
    picked = (cdf <= uniforms[:, None] * cdf[:, -1:]).sum(-1)
    # The first bound is for u * total that was rounded up to total, the second for rows of NaN.
    picked = picked.minimum((probs > 0).sum(-1) - 1).clamp_(min=0)
    return ids.gather(1, picked[:, None]).squeeze(1)


def filtered(logits, temperature, top_p, top_k):
    """The filters in transformers' order: temperature, top-k, top-p.

    Returns weights (n, k) fp64, largest first and 0 where top_p drops the token (the rest sum to less than 1
    then), and their ids (n, k); k is V without top_k, at the cost of a sort of all logits.
    """
    values, ids = (logits.topk(top_k) if 0 < top_k < logits.shape[1] else logits.sort(-1, descending=True))
    probs = (values.double() / temperature).softmax(-1)
    if top_p < 1:
        probs = probs.masked_fill(probs.cumsum(-1) - probs >= top_p, 0)
    return probs, ids


# --- checkpoints in Hugging Face layout -----------------------------------------------------------

DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
SIDE_FILES = ("generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja",
              "vocab.json", "merges.txt", "special_tokens_map.json", "added_tokens.json")


def checkpoint_folder(name: str) -> str:
    """A local folder as it is; a hub id downloaded where that works; else a UserError with the command."""
    if os.path.isdir(name):
        return name
    advice = "a folder with config.json, tokenizer.json and *.safetensors expected"
    if name.count("/") == 1 and not name.startswith((".", "/")) and not name.endswith("/"):
        try:  # comes with tokenizers; not one of the five packages, hence no import at the top
            hub = importlib.import_module("huggingface_hub")
            return hub.snapshot_download(name, allow_patterns=["*.safetensors", "*.json", "*.txt", "*.jinja"])
        except Exception as e:  # offline, unknown id, gated: whatever the library raises, the advice is one
            advice += (f"; the hub could not be asked ({type(e).__name__}). Where there is a network:\n"
                       f"  hf download {name} --local-dir {name.split('/')[1]}")
    raise UserError(f"{name} is no folder: {advice}")


def hf_name(name: str) -> str:
    """Our parameter name to the one in HF checkpoints."""
    return name if name.startswith("lm_head.") else "model." + name


def open_tensors(folder: str) -> dict:
    """All tensors of a checkpoint: {HF name: (file path, safetensors slice)}; only headers are read.

    One model.safetensors, or the files that model.safetensors.index.json names. Raises UserError for
    missing, truncated or corrupt files, and for an index that points out of the folder or lies.
    """
    index_path = os.path.join(folder, "model.safetensors.index.json")
    single = os.path.join(folder, "model.safetensors")
    if os.path.exists(index_path):
        index = read_json(index_path).get("weight_map")
        if not isinstance(index, dict) or not all(isinstance(f, str) for f in index.values()):
            raise UserError(f'{index_path}: "weight_map", an object of file names, expected')
        files = sorted(set(index.values()))
        for f in files:
            fits = os.path.basename(f) == f and f.endswith(".safetensors") and f.isprintable()
            if not fits or len(f) > 255:
                raise UserError(f"{index_path}: file name {f!r:.60} is not a .safetensors file of this "
                                "folder")
    elif os.path.exists(single):
        index, files = None, ["model.safetensors"]
    else:
        raise UserError(f"{folder}: neither model.safetensors nor model.safetensors.index.json is there "
                        "(weights in pickle formats are not read)")
    found = {}
    for f in files:
        path = os.path.join(folder, f)
        if os.path.exists(path) and not os.path.isfile(path):
            raise UserError(f"{path}: a file expected")
        try:
            handle = safe_open(path, framework="pt")
            for name in handle.keys():
                found[name] = (path, handle.get_slice(name))
        except (OSError, SafetensorError) as e:
            raise UserError(f"{path} is missing, truncated or corrupt: {e}") from None
    wrong = [n for n, f in (index or {}).items() if n not in found or os.path.basename(found[n][0]) != f]
    if wrong:
        raise UserError(f"{index_path}: not in the file it names: {', '.join(sorted(wrong)[:8])}")
    return found


def rows_here(p):
    """This rank's part of a parameter: (local tensor, first row, end row). FSDP2 shards dimension 0 in
    equal chunks, the last ones shorter or empty."""
    if not isinstance(p, DTensor):
        return p.detach(), 0, p.shape[0]
    dim = next(i for i, placement in enumerate(p.placements) if placement.is_shard())
    chunk = -(-p.shape[0] // p.device_mesh.size(dim))
    start = min(p.device_mesh.get_local_rank(dim) * chunk, p.shape[0])
    return p.detach().to_local(), start, min(start + chunk, p.shape[0])


@torch.no_grad()
def load_weights(model: Qwen3, folder: str, device) -> None:
    """Give a model that was made on the meta device, plain or sharded, memory on `device`, and fill it from a
    checkpoint: every rank reads only its own rows.

    Strict, and checked before memory is taken: raises one UserError that lists all missing, unexpected,
    mis-shaped and mis-typed tensors; later another for the first that is not finite. A tied checkpoint may
    carry lm_head.weight; it is the embedding again, and is not read.
    """
    found = open_tensors(folder)
    wanted = {hf_name(n): p for n, p in model.named_parameters()}
    problems = [f"missing: {n} {tuple(p.shape)}" for n, p in wanted.items() if n not in found]
    for name, (path, tensor) in found.items():
        if name not in wanted:
            if not (name == "lm_head.weight" and model.config.tie_word_embeddings):
                problems.append(f"unexpected: {name} {tuple(tensor.get_shape())}")
        elif tuple(tensor.get_shape()) != tuple(wanted[name].shape):
            problems.append(f"wrong shape: {name} is {tuple(tensor.get_shape())}, "
                            f"config.json says {tuple(wanted[name].shape)}")
        elif tensor.get_dtype() not in DTYPES:
            problems.append(f"wrong type: {name} is {tensor.get_dtype()}, {'/'.join(DTYPES)} expected")
    if problems:
        shown = problems[:20] + [f"... and {len(problems) - 20} more"] * (len(problems) > 20)
        raise UserError(f"{folder}: weights do not fit config.json:\n  " + "\n  ".join(shown))
    model.to_empty(device=device)
    for name, p in model.named_parameters():
        name, (local, start, end) = hf_name(name), rows_here(p)
        if end > start:
            local.copy_(found[name][1][start:end])  # casts
            if not local.isfinite().all():
                raise UserError(f"{found[name][0]}: {name} holds NaN or infinity")


def load_model(folder: str, dtype=torch.float32, device="cpu", checkpointing=False) -> Qwen3:
    """A whole, unsharded model from a folder, e.g. for evaluation."""
    with torch.device("meta"):
        model = Qwen3(read_config(folder), checkpointing).to(dtype)
    load_weights(model, folder, device)
    return model


@torch.no_grad()
def export(model: Qwen3, folder: str, source: str, dtype=torch.bfloat16, shard_bytes=5 * 10**9, main=True):
    """Write `model` to `folder` in HF layout; called on all ranks, written by the main one.

    Each tensor is cast, then gathered, then written before the next: no rank ever holds more than one full
    tensor (hence the format is written here: the library's writer wants a whole file in memory).
    Configuration, tokenizer and generation files come from `source`. Raises OSError as the disk does.
    """
    size = torch.empty((), dtype=dtype).element_size()
    shards = [[]]
    used = 0
    for name, p in model.named_parameters():
        if shards[-1] and used + p.numel() * size > shard_bytes:
            shards.append([])
            used = 0
        shards[-1].append((hf_name(name), p))
        used += p.numel() * size
    names = (["model.safetensors"] if len(shards) == 1 else
             [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)])
    failed = None
    for file, shard in zip(names, shards):
        whole = ((p.to(dtype).full_tensor() if isinstance(p, DTensor) else p.to(dtype)) for _, p in shard)
        if main and not failed:
            try:
                os.makedirs(folder, exist_ok=True)
                write_safetensors(os.path.join(folder, file), [(n, p.shape) for n, p in shard], dtype, whole)
            except OSError as e:
                failed = e
        for _ in whole:  # take part in gathering, on the main rank too: the others wait for it
            pass
    if failed:
        raise failed
    if not main:
        return
    if len(shards) > 1:
        total = sum(p.numel() * size for p in model.parameters())
        index = {"metadata": {"total_size": total},
                 "weight_map": {n: file for file, shard in zip(names, shards) for n, _ in shard}}
        write_json(os.path.join(folder, "model.safetensors.index.json"), index)
    config = read_json(os.path.join(source, "config.json"))
    config["dtype" if "dtype" in config else "torch_dtype"] = str(dtype).removeprefix("torch.")
    write_json(os.path.join(folder, "config.json"), config)
    for file in SIDE_FILES:
        if os.path.exists(os.path.join(source, file)):
            shutil.copyfile(os.path.join(source, file), os.path.join(folder, file))


def write_safetensors(path, shapes, dtype, tensors):
    """Stream tensors of one dtype to a safetensors file: 8 bytes of header length, JSON header, raw data."""
    size = torch.empty((), dtype=dtype).element_size()
    code = {v: k for k, v in DTYPES.items()}[dtype]
    header, offset = {"__metadata__": {"format": "pt"}}, 0
    for name, shape in shapes:
        end = offset + shape.numel() * size
        header[name] = {"dtype": code, "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # data starts 8-byte aligned
    with writing(path), open(path, "wb") as f:
        f.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors:
            f.write(tensor.contiguous().cpu().view(torch.uint8).numpy().data)
        f.flush()
        os.fsync(f.fileno())


@contextlib.contextmanager
def writing(path):
    """What fails in it names the file, which a full disk does not do by itself."""
    try:
        yield
    except OSError as e:
        raise e if e.filename else OSError(e.errno, e.strerror, str(path)) from None
    except SafetensorError as e:
        raise UserError(f"{path}: {e}") from None


def write_json(path, value):
    """Write JSON so that after a crash the file is whole or absent."""
    with writing(path), open(path + ".tmp", "w", encoding="utf-8") as f:
        json.dump(value, f, indent=2, ensure_ascii=False)
        f.flush()
        os.fsync(f.fileno())
    os.replace(path + ".tmp", path)


# --- ranks ----------------------------------------------------------------------------------------


@dataclass
class Ranks:
    """Where this process stands. "Main" is global rank 0: on two nodes there are two local zeros."""

    rank: int
    world: int
    device: torch.device
    quiet: bool = False  # nothing but errors and progress bars

    @property
    def main(self):
        return self.rank == 0

    def say(self, text):
        if self.main and not self.quiet:
            tqdm.write(text, file=sys.stderr)

    def reduce(self, tensor, op=dist.ReduceOp.SUM):
        """All-reduced copy, on the CPU."""
        tensor = tensor.to(self.device, copy=True)
        dist.all_reduce(tensor, op)
        return tensor.cpu()

    @contextlib.contextmanager
    def together(self):
        """What fails inside on any rank ends all ranks, with one message and a non-zero code, no hang."""
        error = None
        try:
            yield
        except (UserError, OSError, SafetensorError) as e:
            error = e
        first = int(self.reduce(torch.tensor(self.rank if error else self.world), dist.ReduceOp.MIN))
        if first < self.world:
            if self.rank == first:
                tqdm.write(f"error: {error}", file=sys.stderr)  # clears a progress bar that stands there
                sys.stderr.flush()
            dist.barrier()  # nobody leaves, and makes torchrun kill the others, before it is printed
            close_ranks()
            sys.exit(1)


def open_ranks(timeout: int, toy: bool = False) -> Ranks:
    """Join the process group that torchrun describes; without torchrun a group of one. The toy story takes
    the CPU where GPUs are too few for all ranks; anything else is told so (UserError)."""
    local, local_world = int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    cuda = torch.cuda.is_available()
    if cuda and local_world > torch.cuda.device_count():
        if not toy:
            count = torch.cuda.device_count()
            raise UserError(f"{local_world} ranks on this machine, but {count} GPUs: start with "
                            f"--nproc_per_node={count}, or use the CPU with CUDA_VISIBLE_DEVICES= (empty)")
        cuda = False
    device = torch.device("cuda", local) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    else:  # torchrun sets OMP_NUM_THREADS=1, which wastes cores where there are fewer ranks
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // local_world))
        torch.set_flush_denormal(True)  # most of a sharp softmax is denormal, and those numbers are slow
    backend = "nccl" if cuda else "gloo"
    how = {} if "RANK" in os.environ else {"store": dist.HashStore(), "rank": 0, "world_size": 1}
    how |= {"device_id": device} if cuda else {}
    dist.init_process_group(backend, timeout=timedelta(seconds=timeout), **how)
    return Ranks(dist.get_rank(), dist.get_world_size(), device)


def begin(parse, join=lambda o: open_ranks(o.timeout)):
    """(options, Ranks) of a program. What is wrong with the options is said once, by the main rank."""
    main = os.environ.get("RANK", "0") == "0"
    try:
        with contextlib.ExitStack() as stack:
            if not main:  # argparse speaks for itself
                stack.enter_context(contextlib.redirect_stderr(io.StringIO()))
                stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
            o = parse()
            return o, join(o)
    except (UserError, SystemExit) as e:
        code = e.code if isinstance(e, SystemExit) else 2
        if main and isinstance(e, UserError):
            print(f"error: {e}", file=sys.stderr, flush=True)
    if code and not main:
        time.sleep(30)  # torchrun ends all when one has ended: the main rank must speak first
    sys.exit(code)


def leave(main):
    """Run a program to its exit code and end the process at once: gloo's threads now and then abort the
    interpreter's own way out. What a dead or stalled rank does to the others is said in a line."""
    try:
        code = main()
    except RuntimeError as e:  # gloo's have no class of their own
        of_peers = isinstance(e, dist.DistError) or re.search("gloo|closed by peer|Timed out waiting", str(e))
        if not of_peers:
            raise
        tqdm.write("error: another rank has died or has not answered within --timeout: "
                   f"{str(e).splitlines()[0]:.200}", file=sys.stderr)
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def close_ranks():
    """Leave the process group together: without the barrier gloo can abort at exit."""
    dist.barrier()
    dist.destroy_process_group()


# --- options of the programs ----------------------------------------------------------------------


def option(default, text, choices=None):
    """A field of an Options dataclass with its line for --help."""
    return field(default=default, metadata={"help": text, "choices": choices})


def unfit(options: dict) -> list:
    """Problems of options that no JSON file can keep, or no file can have for a name."""
    texts = {k: v for k, v in options.items() if isinstance(v, str)}
    return [f"--{k} holds a NUL character" for k, v in texts.items() if "\0" in v] + [
        f"--{k} {v!r:.60} is not UTF-8 text" for k, v in texts.items()
        if v.encode(errors="replace").decode() != v]


def add_options(parser, record):
    """A --flag for every `option` of a dataclass; one that is not given is absent from the parsed result."""
    for f in (f for f in fields(record) if f.metadata):
        kind = {"action": "store_true"}
        if f.type is not bool:
            kind = {"type": f.type, "choices": f.metadata["choices"]}
            kind |= {} if kind["choices"] else {"metavar": f.type.__name__.upper()}
        text = f.metadata["help"] + ("" if f.default == "" or f.type is bool else f" [{f.default}]")
        parser.add_argument(f"--{f.name}", default=argparse.SUPPRESS, help=text.replace("%", "%%"), **kind)
