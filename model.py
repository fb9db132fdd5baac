"""Qwen3 by hand: network, attention over forks, generation, checkpoints; and processes.

Comes in:  a checkpoint folder in Hugging Face layout, token ids laid out as forks (data.py).
Goes out:  the log-probability of every scored row, or sampled continuations of prompts.

Parameter names are HF's without the leading "model.", so that a reader can hold both side by side
(transformers/models/qwen3/modeling_qwen3.py). Shapes: T tokens of a pack, D hidden width, H query
heads, K key heads, d head width, R scored rows, V vocabulary. There is no batch dimension and no
padding: several sequences lie one after the other in T, and attention keeps them apart.
"""

import argparse
import contextlib
import functools
import importlib
import io
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
from safetensors.torch import save_file
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn.attention.bias import causal_lower_right
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

from data import UserError, listed, read_json, write_json, writing
from loss import linear_logps

# On a CPU torch hands these functions to MKL, which picks a function's kernel on its first call in
# a process. Where several threads make that call, one of them may get a low-accuracy kernel for its
# share: no error, up to 1.5e-4 off (pytorch/pytorch issue 188792). Hence a first call that is too
# small for two threads. This can go once torch comes with MKL 2025, which no longer does it.
for _dtype in (torch.float32, torch.float64):
    for _function in (torch.cos, torch.sin, torch.exp, torch.log):
        _function(torch.ones(8, dtype=_dtype))


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


# Keys that change no forward pass, or that read_config checks by itself.
HARMLESS = {
    "architectures", "bos_token_id", "eos_token_id", "pad_token_id", "torch_dtype", "dtype",
    "transformers_version", "use_cache", "initializer_range", "max_window_layers",
    "sliding_window", "max_position_embeddings", "output_attentions", "output_hidden_states",
    "return_dict", "id2label", "label2id", "chunk_size_feed_forward", "gradient_checkpointing",
    "do_sample", "temperature", "top_k", "top_p", "repetition_penalty", "max_length", "min_p",
    "max_new_tokens", "num_beams", "num_return_sequences", "length_penalty", "typical_p",
    "num_labels", "model_max_length", "seq_length", "original_max_position_embeddings",
    "pretraining_tp", "base_model_tp_plan", "torchscript", "router_aux_loss_coef",
    "rope_parameters", "rope_scaling", "layer_types",
}
TOOLS = ("_", "transformers", "unsloth", "axolotl", "llamafactory", "llama_factory", "swift", "trl",
         "peft", "mergekit", "vllm", "sglang", "mlx", "deepspeed", "megatron", "nemo", "verl")
# Keys that would change it, with the only values this file computes.
ONLY = {
    "model_type": ("qwen3",), "hidden_act": ("silu", None), "attention_bias": (False, None),
    "attention_dropout": (0, None), "use_sliding_window": (False, None), "is_causal": (True, None),
    "quantization_config": (None,),
}
EXPECTED = {int: "a whole number above 0", float: "a number above 0", bool: "true or false"}


def read_config(folder: str) -> Config:
    """Read folder/config.json in either layout (rope_theta at the top, or inside rope_parameters).

    Raises UserError that lists every key that is missing, of a wrong type, or not supported; so is
    every unknown key but bookkeeping: texts, token ids, keys of tools, and what is switched off.
    """
    path = os.path.join(folder, "config.json")
    raw = {"head_dim": 128, "tie_word_embeddings": False, **read_json(path)}  # HF's defaults
    problems = []
    for key, supported in ONLY.items():
        value = raw.pop(key, None)
        if value not in supported:
            problems.append(f'"{key}" is {value!r:.60}; only {supported[0]!r} is supported')
    rope = raw.get("rope_scaling") or raw.get("rope_parameters") or {}  # transformers' order
    if not isinstance(rope, dict) or (
            {k for k in rope if rope[k] not in ("default", None)} - {"rope_theta"}):
        problems.append(f'"rope_scaling" or "rope_parameters" is {rope!r:.200}; only the '
                        '"rope_type" "default" and "rope_theta" are supported')
    elif "rope_theta" in rope:
        if raw.get("rope_theta") not in (None, rope["rope_theta"]):
            problems.append('"rope_theta" and "rope_parameters" contradict each other')
        raw["rope_theta"] = rope["rope_theta"]
    values = {}
    for f in fields(Config):
        value = values[f.name] = raw.pop(f.name, None)
        types = (int, float) if f.type is float else (f.type,)
        if type(value) not in types or (f.type is not bool and not 0 < value < math.inf):
            problems.append(f'"{f.name}": {EXPECTED[f.type]} expected, found {value!r:.60}')
    for key, value in raw.items():
        if key in HARMLESS or key.startswith(TOOLS) or key.endswith("_token_id"):
            continue
        if not isinstance(value, str) and value not in (None, False, [], {}):
            problems.append(f'"{key}": {value!r:.60} is unknown and might change the computation')
    if problems:
        raise UserError(f"{path} is not a configuration this program computes:{listed(problems)}")
    config = Config(**values)
    heads, groups = config.num_attention_heads, config.num_key_value_heads
    layers, layer_types = config.num_hidden_layers, raw.get("layer_types") or []
    if heads % groups or config.head_dim % 2:
        raise UserError(f"{path}: {heads} query heads on {groups} key heads of width "
                        f"{config.head_dim}: a multiple and an even width expected")
    all_full = isinstance(layer_types, list) and set(map(str, layer_types)) <= {"full_attention"}
    if not all_full or len(layer_types) not in (0, layers):
        raise UserError(f'{path}: "layer_types" is {layer_types!r:.80}; "full_attention" expected, '
                        f'"num_hidden_layers" ({layers}) times')
    return config


# --- the network ----------------------------------------------------------------------------------


class Qwen3(nn.Module):
    """The whole network; `forward` goes from ids to the log-probability of every scored row."""

    def __init__(self, config: Config, checkpointing: bool = False):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        blocks = [Block(config, checkpointing) for _ in range(config.num_hidden_layers)]
        self.layers = nn.ModuleList(blocks)
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        # Tied models have no parameter here: the embedding serves twice, inside the root's forward,
        # where FSDP has it gathered. Untied, the head is a unit of its own.
        self.lm_head = Head(config)

    def forward(self, tokens, positions, forks, rows, targets):
        """tokens, positions (T,); forks as in fork_attention; rows (R,) of T; targets (R,) ids.
        Returns (R,) fp32: log p(targets[i] | all that token rows[i] sees). R may be 0."""
        # Only scored rows reach the norm and the head. index_select: h[rows] is 5-7x slower on CPU.
        hidden = self.norm(self.hidden_states(tokens, positions, forks).index_select(0, rows))
        tied_weight = self.embed_tokens.weight if self.config.tie_word_embeddings else None
        return self.lm_head(hidden, targets, tied_weight)

    def hidden_states(self, tokens, positions, forks):
        """(T,) ids to the (T, D) output of the last block, before the final norm."""
        return self.blocks(tokens, positions, lambda q, k, v, layer: fork_attention(q, k, v, forks))

    def blocks(self, tokens, positions, attend):
        """As `trunk`, with attend(q, k, v, layer) as the attention."""
        x = self.embed_tokens(tokens)
        cos, sin = rope_table(positions, self.config, x.dtype)
        for layer, block in enumerate(self.layers):
            x = block(x, cos, sin, functools.partial(attend, layer=layer))
        return x

    def logits(self, tokens):
        """(T, V) logits of one plain sequence (T,), in the compute dtype: for small inputs."""
        length = len(tokens)
        positions = torch.arange(length, device=tokens.device)
        hidden = self.hidden_states(tokens, positions, [(0, length, length, length)])
        return self.norm(hidden) @ self.head_weight().T

    def head_weight(self):
        tied = self.config.tie_word_embeddings
        return self.embed_tokens.weight if tied else self.lm_head.weight


class Block(nn.Module):
    def __init__(self, config, checkpointing):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)
        self.checkpointing = checkpointing

    def forward(self, x, cos, sin, attend):
        # Checkpointing sits inside the block's forward, hence inside FSDP's hooks: recomputation
        # finds the weights that backward has gathered already. Nothing here is random.
        if self.checkpointing and torch.is_grad_enabled():
            return checkpoint(self.run, x, cos, sin, attend, use_reentrant=False,
                              preserve_rng_state=False)
        return self.run(x, cos, sin, attend)

    def run(self, x, cos, sin, attend):
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, attend)
        return x + self.mlp(self.post_attention_layernorm(x))


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.head_dim = config.head_dim  # explicit: H * d differs from D in 0.6B, 4B and 32B
        wide = config.num_attention_heads * self.head_dim
        narrow = config.num_key_value_heads * self.head_dim
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
        # HF's order: statistics in fp32, back to x's dtype, then the weight. With its own weight
        # argument F.rms_norm rounds once only: a quarter of all bf16 outputs differ. On CUDA it is
        # one kernel.
        return self.weight * F.rms_norm(x, x.shape[-1:], eps=self.eps)


class Head(nn.Module):
    def __init__(self, config):
        super().__init__()
        if not config.tie_word_embeddings:
            self.weight = nn.Parameter(torch.empty(config.vocab_size, config.hidden_size))

    def forward(self, hidden, targets, tied_weight=None):
        return linear_logps(hidden, self.weight if tied_weight is None else tied_weight, targets)


def rope_table(positions, config, dtype):
    """(T,) positions to cos and sin (T, d), computed in fp32, cast to the activations' dtype as HF.

    Made anew for each pack: a buffer would have to be rebuilt after meta-device construction, and
    forgetting that raises no error.
    """
    index = torch.arange(0, config.head_dim, 2, device=positions.device).float()
    frequencies = 1.0 / config.rope_theta ** (index / config.head_dim)
    angles = positions[:, None].float() * frequencies
    angles = torch.cat([angles, angles], -1)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x, cos, sin):
    """Rotary position embedding of x (heads, T, d), in halves as HF's rotate_half."""
    left, right = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-right, left], -1) * sin


# --- attention over forks -------------------------------------------------------------------------


def fork_attention(q, k, v, forks):
    """Softmax attention inside forks: q (H, T, d), k and v (K, T, d) to (H, T, d).

    forks: list of (start, trunk_end, rejected_end, chosen_end) in tokens, one after the other. A
    query sees a key if and only if the key is of the same fork, not later in the row, and in the
    trunk or in the query's own branch. So a fork takes three calls: its trunk over itself, and each
    branch over trunk + itself, aligned at the bottom right. No [T, T] mask, no masked-out work.

    On CUDA in 16 bit these are flash kernels, which take grouped heads and this alignment as they
    are (torch/nn/attention/bias.py). In fp32, and on a CPU, a mask of one branch is made.
    """
    dtype = q.dtype
    if not q.is_cuda and dtype != torch.float64:
        q, k, v = q.float(), k.float(), v.float()  # the CPU's 16-bit backward takes twice as long
    sizes = []
    for start, trunk_end, rejected_end, chosen_end in forks:
        sizes += [trunk_end - start, rejected_end - trunk_end, chosen_end - rejected_end]
    # split, because its backward is one cat; that of each slice would fill a whole (H, T, d).
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
CPU_ROWS = 16  # MKL rounds products of fewer rows differently: on a CPU, rows are filled up to it


@dataclass
class Row:
    """A sample under way."""

    index: int  # of its prompt
    random: np.random.Generator
    cache: torch.Tensor  # (layers, 2, K, cells, d): keys and values
    length: int  # cells that are in use: the prompt and all ids but the last
    ids: list = field(default_factory=list)  # sampled so far


@torch.no_grad()
def generate(model: Qwen3, prompts, seeds, *, max_tokens, temperature=0.7, top_p=0.8, top_k=20,
             end=(), batch_size=32, on_done=None, progress=None) -> list:
    """Continue every prompt by sampling; temperature 0 is greedy.

    model     plain (not sharded), on a CPU or a GPU, any dtype
    prompts   lists of token ids; seeds: one int >= 0 a prompt, all the chance there is
    top_k     so many most likely tokens stay, 0: all (of ties for the last place, as many as fit)
    top_p     then the fewest most likely tokens stay whose probabilities sum to top_p; 1: all
    end       token ids that end a sample
    on_done   called as on_done(index, ids, ended) as soon as a sample is finished
    progress  called as progress(n) after every step, n the tokens sampled in it, end tokens too
    returns   (ids, ended) a prompt: ids without the end token; ended False: max_tokens cut it off

    At most batch_size samples run at a time; a finished one makes room for the next prompt at once.
    A sample depends on prompt, seed and settings: its t-th token is drawn with the t-th number of a
    generator of its own, so batch size, neighbours and rank change it through rounding alone. On a
    CPU in fp32 not even so (measured with MKL): prompts go through one by one, the blocks get
    CPU_ROWS rows or more, and each row attends to its own cache. Elsewhere rounding may decide a
    near tie. Raises UserError that lists all wrong arguments, or where logits are not finite.
    """
    check_generate(model, prompts, seeds, max_tokens, temperature, top_p, top_k, batch_size)
    end, results, waiting, rows = set(end), [None] * len(prompts), deque(range(len(prompts))), []
    while rows or waiting:
        hidden = [decode(model, rows)] if rows else []
        while waiting and len(rows) < batch_size:
            i = waiting.popleft()
            last, cache = prefill(model, prompts[i])
            hidden.append(last)
            random = np.random.Generator(np.random.Philox(seeds[i]))
            rows.append(Row(i, random, cache, len(prompts[i])))
        logits = next_logits(model, torch.cat(hidden))
        uniforms = torch.tensor([row.random.random() for row in rows], dtype=torch.float64)
        tokens = sample(logits, uniforms.to(logits.device), temperature, top_p, top_k)
        tokens = tokens.masked_fill(~logits.amax(-1).isfinite(), -1).tolist()  # waits for the GPU
        running = []
        for row, token in zip(rows, tokens):
            if token < 0:
                token = len(row.ids)
                raise UserError(f"prompt {row.index}: logits of token {token} are not finite")
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
    problems = []
    if len(seeds) != len(prompts):
        problems.append(f"seeds: {len(seeds)}, {len(prompts)}, one a prompt, expected")
    if max_tokens < 1:
        problems.append(f"max_tokens {max_tokens}, 1 or more expected")
    if not 0 <= temperature < math.inf:
        problems.append(f"temperature {temperature}, 0 (greedy) or more, and finite, expected")
    if not 0 < top_p <= 1:
        problems.append(f"top_p {top_p}, above 0 and at most 1 expected")
    if top_k < 0:
        problems.append(f"top_k {top_k}, 0 (all) or more expected")
    if batch_size < 1:
        problems.append(f"batch_size {batch_size}, 1 or more expected")
    for i, (ids, seed) in enumerate(zip(prompts, seeds)):
        if seed < 0:
            problems.append(f"seed {i}: {seed}, 0 or more expected")
        if not ids or min(ids) < 0 or max(ids) >= model.config.vocab_size:
            problems.append(f"prompt {i}: one id or more, 0 to {model.config.vocab_size - 1}, "
                            f"expected, found {list(ids)!r:.60}")
    if problems:
        raise UserError(f"generate:{listed(problems)}")


def prefill(model, prompt):
    """A prompt's last hidden state (1, D), and the cache of its row."""
    config, device = model.config, model.norm.weight.device
    length = len(prompt)
    cells = max(CELLS, 2 * length)
    cache = model.norm.weight.new_empty(
        config.num_hidden_layers, 2, config.num_key_value_heads, cells, config.head_dim)

    def attend(q, k, v, layer):
        cache[layer, 0, :, :length] = k
        cache[layer, 1, :, :length] = v
        return fork_attention(q, k, v, [(0, length, length, length)])

    tokens = torch.tensor(prompt, device=device)
    hidden = model.blocks(tokens, torch.arange(length, device=device), attend)
    return hidden[-1:], cache


def decode(model, rows):
    """The last token of every row through the blocks, (rows, D); caches get its keys and values."""
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
    # On a CPU faster for few rows than hidden @ weight.T, the transposed copy included.
    logits = model.head_weight() @ F.pad(model.norm(hidden), (0, 0, 0, fill)).T
    return logits[:, :len(hidden)].T.contiguous()


def sample(logits, uniforms, temperature, top_p, top_k):
    """One id a row, (n,) int64, from logits (n, V) and uniforms (n,) fp64 in [0, 1)."""
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

    Returns weights (n, k) fp64, largest first and 0 where top_p drops the token (the rest sum to
    less than 1 then), and their ids (n, k). Without top_k, k is V, and all logits are sorted.
    """
    if 0 < top_k < logits.shape[1]:
        values, ids = logits.topk(top_k)
    else:
        values, ids = logits.sort(-1, descending=True)
    probs = (values.double() / temperature).softmax(-1)
    if top_p < 1:
        probs = probs.masked_fill(probs.cumsum(-1) - probs >= top_p, 0)
    return probs, ids


# --- checkpoints in Hugging Face layout -----------------------------------------------------------

DTYPES = ("F32", "BF16", "F16")  # as safetensors names them
SIDE_FILES = ("generation_config.json", "tokenizer.json", "tokenizer_config.json", "merges.txt",
              "chat_template.jinja", "vocab.json", "special_tokens_map.json", "added_tokens.json")


def checkpoint_folder(name: str) -> str:
    """A local folder as it is; a hub id is downloaded, or UserError gives the command for it."""
    folder = name
    if not os.path.isdir(name):
        advice = "a folder with config.json, tokenizer.json and *.safetensors expected"
        if not re.fullmatch(r"\w[\w.-]*/[\w.-]+", name):
            raise UserError(f"{name} is no folder: {advice}")
        try:  # comes with tokenizers; not one of the five packages, hence no import at the top
            hub = importlib.import_module("huggingface_hub")
            patterns = ["*.safetensors", "*.json", "*.txt", "*.jinja"]
            folder = hub.snapshot_download(name, allow_patterns=patterns)
        except Exception as e:  # offline, unknown id, gated: the advice is always the same
            raise UserError(f"{name} is no folder: {advice}; the hub could not be asked "
                            f"({type(e).__name__}). Where there is a network:\n"
                            f"  hf download {name} --local-dir {name.split('/')[1]}") from None
    if os.path.exists(os.path.join(folder, "adapter_config.json")):
        raise UserError(f"{folder} holds a LoRA adapter (adapter_config.json): merge it first "
                        "(peft's merge_and_unload), or remove that file if this is done")
    return folder


def unread_parts(folder: str) -> list:
    """What lies in a checkpoint and is not read, as lines for the log."""
    known = HARMLESS | ONLY.keys() | {f.name for f in fields(Config)}
    keys = sorted(read_json(os.path.join(folder, "config.json")).keys() - known)
    lines = []
    if keys:
        lines.append(f"{folder}/config.json: no part of the computation: {', '.join(keys)}")
    single = os.path.join(folder, "model.safetensors")
    if os.path.exists(single) and os.path.exists(single + ".index.json"):
        lines.append(f"{single} is read, not the shards of the index beside it")
    return lines


def hf_name(name: str) -> str:
    """Our parameter name to the one in HF checkpoints."""
    return name if name.startswith("lm_head.") else "model." + name


def open_tensors(folder: str) -> dict:
    """All tensors of a checkpoint: {HF name: (file path, safetensors slice)}; reads headers alone,
    of model.safetensors or else of the files that model.safetensors.index.json names. Raises
    UserError for missing, truncated or corrupt files."""
    files = ["model.safetensors"]
    index_path = os.path.join(folder, "model.safetensors.index.json")
    if not os.path.exists(os.path.join(folder, "model.safetensors")):
        if not os.path.exists(index_path):
            raise UserError(f"{folder}: neither model.safetensors nor model.safetensors.index.json "
                            "is there (weights in pickle formats are not read)")
        index = read_json(index_path).get("weight_map")
        if not isinstance(index, dict):
            raise UserError(f'{index_path}: "weight_map", an object of file names, expected')
        files = sorted({str(file) for file in index.values()})
    tensors = {}
    for file in files:
        path = os.path.join(folder, file)
        try:
            handle = safe_open(path, framework="pt")
            tensors |= {name: (path, handle.get_slice(name)) for name in handle.keys()}
        except (OSError, SafetensorError) as e:
            raise UserError(f"{path} is missing, truncated or corrupt: {e}") from None
    return tensors


def rows_here(p):
    """This rank's part of a parameter: (local tensor, first row, end row). FSDP2 shards dimension 0
    in equal chunks, the last ones shorter or empty."""
    if not isinstance(p, DTensor):
        return p.detach(), 0, p.shape[0]
    dim = next(i for i, placement in enumerate(p.placements) if placement.is_shard())
    chunk = -(-p.shape[0] // p.device_mesh.size(dim))
    start = min(p.device_mesh.get_local_rank(dim) * chunk, p.shape[0])
    return p.detach().to_local(), start, min(start + chunk, p.shape[0])


@torch.no_grad()
def load_weights(model: Qwen3, folder: str, device) -> None:
    """Give a model that was made on the meta device, plain or sharded, memory on `device`, and fill
    it from a checkpoint: every rank reads only its own rows.

    Strict, and checked before memory is taken: raises one UserError that lists all missing,
    unexpected, mis-shaped and mis-typed tensors; later another for the first that is not finite. A
    tied checkpoint may carry lm_head.weight if it is the embedding again.
    """
    found = open_tensors(folder)
    wanted = {hf_name(name): p for name, p in model.named_parameters()}
    head_twice = model.config.tie_word_embeddings and "lm_head.weight" in found
    if head_twice:
        wanted["lm_head.weight"] = model.embed_tokens.weight
    problems = [f"missing: {n} {tuple(p.shape)}" for n, p in wanted.items() if n not in found]
    for name, (_, tensor) in found.items():
        shape, dtype = tuple(tensor.get_shape()), tensor.get_dtype()
        if name not in wanted:
            problems.append(f"unexpected: {name} {shape}")
        elif shape != tuple(wanted[name].shape):
            problems.append(f"wrong shape: {name} is {shape}, config.json says "
                            f"{tuple(wanted[name].shape)}")
        elif dtype not in DTYPES:
            problems.append(f"wrong type: {name} is {dtype}, {'/'.join(DTYPES)} expected")
    if problems:
        raise UserError(f"{folder}: weights do not fit config.json:{listed(problems)}")
    model.to_empty(device=device)
    finite = torch.ones(len(wanted), dtype=torch.bool, device=device)
    for i, (name, p) in enumerate(model.named_parameters()):
        local, start, end = rows_here(p)
        if end > start:
            local.copy_(found[hf_name(name)][1][start:end])  # casts
            finite[i] = local.isfinite().all()
    for name, sound in zip(wanted, finite.tolist()):  # a GPU waits here, once
        if not sound:
            raise UserError(f"{found[name][0]}: {name} holds NaN or infinity")
    if head_twice:
        local, start, end = rows_here(model.embed_tokens.weight)
        if end > start and (found["lm_head.weight"][1][start:end].to(local) != local).any():
            raise UserError(f"{folder}: lm_head.weight differs from model.embed_tokens.weight, so "
                            'config.json should say "tie_word_embeddings": false')


def load_model(folder: str, dtype=torch.float32, device="cpu", checkpointing=False) -> Qwen3:
    """A whole, unsharded model from a folder, e.g. for evaluation."""
    with torch.device("meta"):
        model = Qwen3(read_config(folder), checkpointing).to(dtype)
    load_weights(model, folder, device)
    return model


@torch.no_grad()
def export(model: Qwen3, folder: str, source: str, dtype=torch.bfloat16, shard_bytes=5 * 10**9,
           main=True):
    """Write `model` to `folder` in HF layout; called on all ranks, written by the main one.

    The main rank's CPU memory holds one file of at most shard_bytes at a time, other ranks hold one
    whole tensor. Configuration, tokenizer and generation files come from `source`. Raises UserError
    or OSError on the main rank, after the last gather: the others wait in it.
    """
    shards, used = [{}], 0
    for name, p in model.named_parameters():
        used += p.numel() * dtype.itemsize
        if shards[-1] and used > shard_bytes:
            shards.append({})
            used = p.numel() * dtype.itemsize
        shards[-1][hf_name(name)] = p
    files = ["model.safetensors"]
    if len(shards) > 1:
        count = len(shards)
        files = [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
    error = None
    for file, shard in zip(files, shards):
        tensors = {}
        for name, p in shard.items():
            tensor = p.detach().to(dtype)
            if isinstance(tensor, DTensor):
                tensor = tensor.full_tensor()
            if main:
                tensors[name] = tensor.cpu()
        if main and not error:
            try:
                os.makedirs(folder, exist_ok=True)
                write_tensors(os.path.join(folder, file), tensors)
            except (UserError, OSError) as e:
                error = e
    if error:
        raise error
    if not main:
        return
    if len(shards) > 1:
        total = sum(p.numel() for p in model.parameters()) * dtype.itemsize
        weight_map = {name: file for file, shard in zip(files, shards) for name in shard}
        write_json(os.path.join(folder, "model.safetensors.index.json"),
                   {"metadata": {"total_size": total}, "weight_map": weight_map})
    config = read_json(os.path.join(source, "config.json"))
    config["dtype" if "dtype" in config else "torch_dtype"] = str(dtype).removeprefix("torch.")
    write_json(os.path.join(folder, "config.json"), config)
    for file in SIDE_FILES:
        if os.path.exists(os.path.join(source, file)):
            shutil.copyfile(os.path.join(source, file), os.path.join(folder, file))


def write_tensors(path: str, tensors: dict, **metadata: str):
    """A safetensors file, durable on return. Raises UserError or OSError that names the file."""
    try:
        save_file(tensors, path, metadata={"format": "pt", **metadata})
    except SafetensorError as e:
        raise UserError(f"{path}: {e}") from None
    with writing(path), open(path, "rb") as f:
        os.fsync(f.fileno())


# --- processes: ranks, exit codes, options --------------------------------------------------------


class PlainLines:
    """stderr for tqdm: each state of a bar is one line, written at once, without carriage returns."""

    def write(self, text):
        text = text.strip()
        if text:
            sys.stderr.write(text + "\n")

    def flush(self):
        sys.stderr.flush()


@dataclass
class Ranks:
    """Where this process stands. "Main" is global rank 0: two nodes have two local zeros."""

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

    def progress(self, total, title, unit, done=0):
        """The main rank's progress bar. Where stderr is no terminal: a plain line at the start, every
        30 seconds, and at the end (quiet: of long work). TQDM_DISABLE=1 leaves what is said."""
        options = {"total": total, "desc": title, "unit": unit, "initial": done}
        if not self.main or done == total:
            options["disable"] = True
        elif sys.stderr.isatty():
            options["leave"] = not self.quiet
        else:
            line = "{desc}: {n_fmt} of {total_fmt} in {elapsed}, {rate_fmt}{postfix}"
            options |= {"file": PlainLines(), "bar_format": line, "mininterval": 30,
                        "maxinterval": 30, "delay": 10 if self.quiet else 0}
        return tqdm(**options)

    def reduce(self, tensor, op=dist.ReduceOp.SUM):
        """All-reduced copy, on the CPU."""
        tensor = tensor.to(self.device, copy=True)
        dist.all_reduce(tensor, op)
        return tensor.cpu()

    @contextlib.contextmanager
    def together(self):
        """An error inside, on any rank, ends all ranks with one message and exit code 1."""
        error = None
        try:
            yield
        except (UserError, OSError, SafetensorError) as e:
            error = e
        # Each rank sends its number where it failed, else the number of ranks: the minimum is the
        # first that failed.
        own = torch.full((), self.rank if error else self.world, device=self.device)
        first_failed = int(self.reduce(own, dist.ReduceOp.MIN))
        if first_failed < self.world:
            if self.rank == first_failed:
                tqdm.write(f"error: {error}", file=sys.stderr)  # clears a progress bar
                sys.stderr.flush()
            dist.barrier()  # the first exit makes torchrun kill the others: the message comes first
            close_ranks()
            sys.exit(1)

    def main_only(self, function, *args):
        """function(*args) on the main rank, inside `together`; None on the others, which wait."""
        result = None
        with self.together():
            if self.main:
                result = function(*args)
        return result


def launched() -> bool:
    """Whether torchrun or the like started this process; raises UserError where it is unclear."""
    numbers = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    given = [name for name in numbers if name in os.environ]
    lacking = [name for name in numbers if not os.environ.get(name, "").isdigit()]
    lacking += [name for name in ("MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
    if given and lacking:
        raise UserError(f"half a launcher's environment: {', '.join(given)} set, but not a usable "
                        f"{', '.join(lacking)}: start with torchrun, or unset {', '.join(given)}")
    return bool(given)


def open_ranks(timeout: int, toy: bool = False) -> Ranks:
    """Join the process group that torchrun describes; without torchrun a group of one. Raises
    UserError where there are fewer GPUs than ranks; the toy story takes the CPU then."""
    from_launcher = launched()
    local = int(os.environ.get("LOCAL_RANK", 0))
    local_world = int(os.environ.get("LOCAL_WORLD_SIZE") or 1)
    count = torch.cuda.device_count()
    if 0 < count < local_world and not toy:
        raise UserError(f"{local_world} ranks on this machine, but {count} GPUs: start with "
                        f"--nproc_per_node={count}, or use the CPU with CUDA_VISIBLE_DEVICES= "
                        "(empty)")
    arguments = {"backend": "gloo", "timeout": timedelta(seconds=timeout)}
    if not from_launcher:
        arguments |= {"store": dist.HashStore(), "rank": 0, "world_size": 1}
    device = torch.device("cpu")
    if count >= local_world:
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
        # On new cards torch prefers cuDNN's attention, which plans anew, for half a second, for
        # each length that it has not met: here nearly every fork's.
        torch.backends.cuda.enable_cudnn_sdp(False)
        arguments |= {"backend": "nccl", "device_id": device}
    else:  # torchrun sets OMP_NUM_THREADS=1, which wastes cores where there are fewer ranks
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // local_world))
        torch.set_flush_denormal(True)  # most of a sharp softmax is denormal: slow numbers
    dist.init_process_group(**arguments)
    return Ranks(dist.get_rank(), dist.get_world_size(), device)


def close_ranks():
    """Leave the process group together: without the barrier gloo can abort at exit."""
    dist.barrier()
    dist.destroy_process_group()


def begin(parse, join=lambda o: open_ranks(o.timeout)):
    """(options, Ranks) of a program. On wrong options one rank a machine says what is wrong, and
    all exit with code 2."""
    speaks = not re.fullmatch(r"[1-9]\d*", os.environ.get("LOCAL_RANK", ""))
    out = sys.stdout if speaks else io.StringIO()  # argparse prints by itself
    err = sys.stderr if speaks else io.StringIO()
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            o = parse()
        return o, join(o)
    except SystemExit as e:
        code = e.code
    except UserError as e:
        code = 2
        if speaks:
            print(f"error: {e}", file=sys.stderr, flush=True)
    if code and not speaks:
        time.sleep(30)  # the first exit makes torchrun kill the others: the message comes first
    sys.exit(code)


def leave(main):
    """Run a program to its exit code and end the process at once: gloo's threads now and then abort
    the interpreter's own way out. A dead or stalled rank is reported in one line."""
    try:
        code = main()
    except RuntimeError as e:  # gloo's have no class of their own
        of_gloo = re.search("gloo|closed by peer|Timed out waiting", str(e))
        if not of_gloo and not isinstance(e, dist.DistError):
            raise
        tqdm.write("error: another rank has died or has not answered within --timeout: "
                   f"{str(e).splitlines()[0]:.200}", file=sys.stderr)
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def option(default, text, choices=None):
    """A field of an Options dataclass with its line for --help."""
    return field(default=default, metadata={"help": text, "choices": choices})


def add_options(parser, record):
    """A --flag for every `option` of a dataclass; the parsed result holds only those given."""
    for f in fields(record):
        if not f.metadata:
            continue
        text = f.metadata["help"]
        kind = {"action": "store_true"}
        if f.type is not bool:
            kind = {"type": f.type, "choices": f.metadata["choices"]}
            if f.default != "":
                text += f" [{f.default}]"
        text = text.replace("%", "%%")
        parser.add_argument(f"--{f.name}", default=argparse.SUPPRESS, help=text, **kind)
