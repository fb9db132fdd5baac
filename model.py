"""Qwen3 by hand: configuration, blocks, attention over forks, generation, safetensors in and out.

Comes in:  a checkpoint folder in Hugging Face layout, token ids laid out as forks (data.py makes them).
Goes out:  hidden states, or the log-probability of every scored row (loss.linear_logps inside `forward`),
           or sampled continuations of prompts (`generate`).

Parameter names are HF's without the leading "model.", so that a reader can hold both side by side
(transformers/models/qwen3/modeling_qwen3.py). Shapes: T tokens of a pack, D hidden width, H query heads,
K key heads, d head width, R scored rows, V vocabulary. There is no batch dimension and no padding:
several sequences lie one after the other in T, and attention keeps them apart.
"""

import functools
import importlib
import json
import math
import os
import shutil
from collections import deque
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import nn
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

from loss import linear_logps


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
    "label2id", "problem_type", "chunk_size_feed_forward", "is_encoder_decoder", "unsloth_fixed",
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
        raise UserError(f'{path}: "rope_parameters": an object expected, found {rope!r}')
    if rope.get("rope_type", "default") != "default" or rope.get("partial_rotary_factor", 1.0) != 1.0:
        problems.append(f'"rope_parameters" is {rope!r}; only "rope_type": "default" is supported')
    elif set(rope) - {"rope_type", "rope_theta", "partial_rotary_factor"}:
        problems.append(f'"rope_parameters" holds {sorted(rope)}; only rope_type, rope_theta are supported')
    if "rope_theta" in rope:
        if raw.get("rope_theta", rope["rope_theta"]) != rope["rope_theta"]:
            problems.append('"rope_theta" and "rope_parameters" contradict each other')
        raw["rope_theta"] = rope["rope_theta"]
    layer_types = raw.pop("layer_types", None) or []
    if set(layer_types) - {"full_attention"}:
        problems.append(f'"layer_types" holds {sorted(set(layer_types))}; only "full_attention" is supported')
    raw.setdefault("head_dim", 128)  # HF's default; published files name it
    raw.setdefault("tie_word_embeddings", False)
    values = {}
    for name, kind in Config.__annotations__.items():
        value = raw.pop(name, None)
        number_or_flag = (int, float) if kind is float else kind
        fits = isinstance(value, number_or_flag) and isinstance(value, bool) == (kind is bool)
        if not fits or (kind is not bool and not 0 < value < 1e12):
            problems.append(f'"{name}": a {kind.__name__} above 0 expected, found {value!r}'
                            if kind is not bool else f'"{name}": true or false expected, found {value!r}')
        values[name] = value
    for name, value in raw.items():
        if name in ONLY and value not in ONLY[name]:
            problems.append(f'"{name}" is {value!r}; only {ONLY[name][0]!r} is supported')
        elif name not in ONLY and name not in HARMLESS and value not in (None, False, [], {}):
            problems.append(f'"{name}": {value!r} is not known here and might change the computation')
    if not problems:
        heads, groups = values["num_attention_heads"], values["num_key_value_heads"]
        if heads % groups or values["head_dim"] % 2:
            problems.append(f"{heads} query heads on {groups} key heads of width {values['head_dim']}: "
                            "a multiple and an even width expected")
    if problems:
        raise UserError(f"{path} is not a configuration this program computes:\n  " + "\n  ".join(problems))
    return Config(**values)


def read_json(path: str) -> dict:
    """A JSON object from a file, or a UserError naming the file and the place."""
    try:
        with open(path, encoding="utf-8") as f:
            value = json.load(f)
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
        x = self.embed_tokens(tokens)
        return self.blocks(x, positions, [layout(forks, x)] * len(self.layers))

    def blocks(self, x, positions, wheres):
        """(T, D) embeddings through all blocks, before the final norm; wheres: for each block an `attend`'s."""
        cos, sin = rope_table(positions, self.config, x.dtype)
        for block, where in zip(self.layers, wheres):
            x = block(x, cos, sin, where)
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

    def forward(self, x, cos, sin, where):
        # Checkpointing sits inside the block's forward, hence inside FSDP's hooks: the recomputation
        # finds the weights that backward has gathered already. Nothing here is random.
        if self.checkpointing and torch.is_grad_enabled():
            return checkpoint(self.run, x, cos, sin, where, use_reentrant=False, preserve_rng_state=False)
        return self.run(x, cos, sin, where)

    def run(self, x, cos, sin, where):
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, where)
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

    def forward(self, x, cos, sin, where):
        heads = (len(x), -1, self.head_dim)
        q = self.q_norm(self.q_proj(x).view(heads)).transpose(0, 1)  # (H, T, d), normed before RoPE
        k = self.k_norm(self.k_proj(x).view(heads)).transpose(0, 1)  # (K, T, d)
        v = self.v_proj(x).view(heads).transpose(0, 1)
        out = attend(rotate(q, cos, sin), rotate(k, cos, sin), v, where)
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
        # HF's order: statistics in fp32, back to x's dtype, then the weight. The other order differs in a
        # quarter of all bf16 outputs.
        wide = x.float() if x.dtype != torch.float64 else x
        normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * normed.to(x.dtype)


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


# --- attention over forks: one function, two bodies -----------------------------------------------


def layout(forks, x):
    """What `attend` needs to know of a pack, made once for all layers.

    forks: list of (start, trunk_end, rejected_end, chosen_end), in tokens, one after the other; what lies
    behind the last one is filling. A query sees a key iff it is of the same fork, not later in the row, and
    the key is in the trunk or in the query's own branch.
    On CPU: the list, with one additive (b, trunk + b) mask a branch. On CUDA: a FlexAttention BlockMask.
    """
    if x.is_cuda:
        return block_mask(forks, len(x), x.device)
    where = []
    for start, *ends in forks:
        if ends[0] == ends[1]:  # no rejected branch: one plain sequence, one causal call
            ends[0] = ends[1] = ends[2]
        trunk = ends[0] - start
        masks = []
        for begin, end in zip(ends, ends[1:]):
            mask = torch.zeros(end - begin, trunk + end - begin, dtype=x.dtype)
            later = torch.ones_like(mask, dtype=torch.bool).triu_(trunk + 1)
            masks.append(mask.masked_fill_(later, -math.inf))
        where.append((start, *ends, masks))
    return where


def attend(q, k, v, where):
    """Softmax attention inside forks. q (H, T, d), k and v (K, T, d), `where` from `layout`; (H, T, d).

    `where` may also be a function of q, k, v: generation's way to a cache.
    """
    if callable(where):
        return where(q, k, v)
    q, k, v = q[None], k[None], v[None]
    if not isinstance(where, list):
        return _compiled_flex()(q, k, v, block_mask=where, enable_gqa=True)[0]
    # Three calls a fork: no [T, T] mask and no masked-out work between forks (3.4-4.6x one masked call).
    # Cut with split, whose backward is one cat; each slice's backward would fill and add a whole (H, T, d).
    sizes = [n for start, trunk, rejected, chosen, _ in where
             for n in (trunk - start, rejected - trunk, chosen - rejected)]
    queries, keys, values = (t.split([*sizes, q.shape[2] - sum(sizes)], 2) for t in (q, k, v))
    pieces = []
    for trunk, (*_, masks) in zip(range(0, len(sizes), 3), where):
        pieces.append(F.scaled_dot_product_attention(
            queries[trunk], keys[trunk], values[trunk], is_causal=True, enable_gqa=True))
        for branch, mask in ((trunk + 1, masks[0]), (trunk + 2, masks[1])):
            if sizes[branch]:
                seen = (torch.cat([t[trunk], t[branch]], 2) for t in (keys, values))
                pieces.append(F.scaled_dot_product_attention(
                    queries[branch], *seen, attn_mask=mask, enable_gqa=True))
    pieces.append(torch.zeros_like(queries[-1]))  # filling sees nothing
    return torch.cat(pieces, 2)[0]


def block_mask(forks, length, device):
    """FlexAttention's mask of the rule in `layout`; filling tokens see themselves alone."""
    from torch.nn.attention.flex_attention import create_block_mask

    fork = -1 - torch.arange(length)  # filling: a fork of its own each
    branch = torch.zeros(length, dtype=torch.int64)
    for number, (start, trunk, rejected, chosen) in enumerate(forks):
        fork[start:chosen] = number
        branch[trunk:rejected] = 1
        branch[rejected:chosen] = 2
    fork, branch = fork.to(device), branch.to(device)

    def sees(_batch, _head, query, key):
        same = (fork[query] == fork[key]) & (key <= query)
        return same & ((branch[key] == 0) | (branch[key] == branch[query]))

    return create_block_mask(sees, None, None, length, length, device=device)


@functools.cache
def _compiled_flex():
    from torch.nn.attention.flex_attention import flex_attention

    if not torch.cuda.is_available():
        return flex_attention
    # Uncompiled it would hold [T, T]. Packs come in a few lengths only (data.make_pack), one graph each, with
    # and without gradient: more than the 8 after which the compiler gives up, silently unless fullgraph.
    torch._dynamo.config.recompile_limit = 64
    return torch.compile(flex_attention, dynamic=False, fullgraph=True)


# --- generation -----------------------------------------------------------------------------------

CELLS = 256  # tokens in the smallest cache of a row; a row that fills its cache moves to one of twice the size
BLOCK = 512  # keys that torch's CPU attention takes at a time; larger caches are multiples of it
CPU_ROWS = 16  # MKL rounds products of fewer rows differently, so on a CPU rows are filled up to this number


@dataclass
class Row:
    """A sample under way: `ids` so far, `length` tokens in its cache (prompt and all ids but the last)."""

    index: int
    ids: list
    length: int
    random: np.random.Generator
    done: bool = False


@dataclass
class Slab:
    """Rows with caches of one size. caches: a (2, slots, cells, K, d) tensor a layer, keys and values;
    rows[i] has slot i, the slots behind the last row are free."""

    rows: list
    caches: list


@torch.no_grad()
def generate(model: Qwen3, prompts, seeds, *, max_tokens, temperature=0.7, top_p=0.8, top_k=20, end=(),
             batch_size=32, on_done=None, progress=None) -> list:
    """Continue every prompt; greedy at temperature 0.

    model     plain (not sharded), on a CPU or a GPU, any dtype
    prompts   lists of token ids, of any lengths above 0
    seeds     one int >= 0 a prompt: its samples' only source of chance (unused at temperature 0)
    top_k     so many most likely tokens stay, 0: all. Of tokens that tie for the last place only some stay;
              transformers keeps them all
    top_p     then the fewest most likely tokens stay whose probabilities sum to top_p or more; 1: all
    end       ids that end a sample, a set for speed
    on_done   called as on_done(index, ids, ended) as soon as a sample is finished
    progress  called as progress(n) after every step with the number of tokens sampled in it, end tokens
              included (a tqdm bar's `update` fits)
    returns   (ids, ended) for every prompt: ids without the end token; ended False: max_tokens cut it off

    At most batch_size samples run at a time; a finished one makes room for the next prompt at once. One wait
    for the device a token. Memory: K and V take 2 * layers * K * d numbers a token; each running row has room
    for at most twice its length (256 at least), and slots that rows left behind are kept while their slab has
    a row: four times what the running rows' tokens need is the limit, whatever max_tokens is.

    A sample depends on its prompt, seed and settings. Its t-th token comes from the t-th number of its own
    Philox generator, so batch size, neighbours and rank touch it through rounding alone. On a CPU in fp32
    prompts go through one by one, rows are never fewer than CPU_ROWS, and the length that attention sees
    depends on the row itself: there the logits were equal to the bit for any batch (MKL). On a GPU, or in
    another dtype, products of another shape may round differently and now and then turn a near tie.
    Raises UserError that lists all wrong arguments, FloatingPointError where logits are not finite.
    """
    check_generate(model, prompts, seeds, max_tokens, temperature, top_p, top_k, batch_size)
    results, waiting, slabs = [None] * len(prompts), deque(range(len(prompts))), {}
    limit = BLOCK * -(-(max(map(len, prompts), default=0) + max_tokens) // BLOCK)  # no row needs more cells
    while True:
        rows = [row for slab in slabs.values() for row in slab.rows]
        hidden = [decode(model, slabs, rows)] if rows else []
        while waiting and len(rows) < batch_size:
            i = waiting.popleft()
            rows.append(Row(i, [], len(prompts[i]), np.random.Generator(np.random.Philox(seeds[i]))))
            last, keys_values = prefill(model, prompts[i])
            hidden.append(last)
            place(slabs, rows[-1], keys_values, limit)
        if not rows:
            return results
        logits = next_logits(model, torch.cat(hidden))
        uniforms = torch.tensor([row.random.random() for row in rows], dtype=torch.float64)
        tokens = sample(logits, uniforms.to(logits.device), temperature, top_p, top_k)
        tokens = tokens.masked_fill(~logits.amax(-1).isfinite(), -1).tolist()  # the one wait
        for row, token in zip(rows, tokens):
            if token < 0:
                raise FloatingPointError(f"prompt {row.index}: logits of token {len(row.ids)} are not finite")
            if token not in end:
                row.ids.append(token)
            row.done = token in end or len(row.ids) == max_tokens
            if row.done:
                results[row.index] = (row.ids, token in end)
                if on_done:
                    on_done(row.index, *results[row.index])
        settle(slabs, limit)
        if progress:
            progress(len(tokens))


def check_generate(model, prompts, seeds, max_tokens, temperature, top_p, top_k, batch_size):
    vocab = model.config.vocab_size
    problems = [f"{name} is {value}, {wanted} expected" for name, value, wanted, fits in (
        ("len(seeds)", len(seeds), f"{len(prompts)}, one a prompt,", len(seeds) == len(prompts)),
        ("max_tokens", max_tokens, "1 or more", max_tokens >= 1),
        ("temperature", temperature, "0 (greedy) or more, and finite,", 0 <= temperature < math.inf),
        ("top_p", top_p, "above 0 and at most 1", 0 < top_p <= 1),
        ("top_k", top_k, "0 (all) or more", top_k >= 0),
        ("batch_size", batch_size, "1 or more", batch_size >= 1)) if not fits]
    problems += [f"seed {i} is {s}, 0 or more expected" for i, s in enumerate(seeds) if s < 0]
    for i, prompt in enumerate(prompts):
        if len(prompt) == 0:
            problems.append(f"prompt {i} is empty, a token or more expected")
        elif not 0 <= min(prompt) <= max(prompt) < vocab:
            problems.append(f"prompt {i} has ids {min(prompt)} to {max(prompt)}, 0 to {vocab - 1} expected")
    if problems:
        more = [f"... and {len(problems) - 20} more"] * (len(problems) > 20)
        raise UserError("generate:\n  " + "\n  ".join(problems[:20] + more))


def prefill(model, prompt):
    """A prompt's last hidden state (1, D) and each layer's keys and values, a list of (2, T, K, d)."""
    tokens = torch.tensor(prompt, device=model.norm.weight.device)
    kept = []

    def keep(q, k, v):
        kept.append(torch.stack([k, v]).transpose(1, 2))
        # One fork without branches. The list serves on a GPU too, where each new length would otherwise
        # compile a FlexAttention.
        return attend(q, k, v, [(0, *[len(tokens)] * 3, (None, None))])
    x = model.embed_tokens(tokens)
    return model.blocks(x, torch.arange(len(x), device=x.device), [keep] * len(model.layers))[-1:], kept


def decode(model, slabs, rows):
    """The last token of every running row through the blocks: (rows, D). Fills one more cell of each cache."""
    device = model.norm.weight.device
    fill = [0] * (CPU_ROWS - len(rows)) if device.type == "cpu" else []
    tokens = torch.tensor([row.ids[-1] for row in rows] + fill, device=device)
    lengths = torch.tensor([row.length for row in rows] + fill, device=device)
    x = model.embed_tokens(tokens)
    groups, begin = [], 0
    for cells, slab in slabs.items():
        slots = torch.arange(len(slab.rows), device=device)
        own = lengths[begin:begin + len(slots)]
        mask = torch.zeros(len(slots), 1, 1, cells, dtype=x.dtype, device=device)
        mask.masked_fill_((torch.arange(cells, device=device) > own[:, None])[:, None, None], -math.inf)
        groups.append((slots, own, mask, slab.caches))
        begin += len(slots)
    for row in rows:
        row.length += 1
    wheres = [functools.partial(attend_caches, layer=i, groups=groups) for i in range(len(model.layers))]
    return model.blocks(x, lengths, wheres)[:len(rows)]


def attend_caches(q, k, v, layer, groups):
    """Attention of one new token a row to its cache, one call a slab. Shapes as in `attend`, T the rows."""
    q, new = q.unflatten(0, (len(k), -1)), torch.stack([k, v]).transpose(1, 2)  # (K, G, T, d), (2, T, K, d)
    pieces, begin = [], 0
    for slots, own, mask, caches in groups:
        part = slice(begin, begin + len(slots))
        caches[layer][:, slots, own] = new[:, part]
        keys, values = caches[layer][:, :len(slots)].transpose(2, 3)  # (slots, K, cells, d)
        # The G query heads of a key head stand where its queries would: nothing is repeated, no GQA needed.
        out = F.scaled_dot_product_attention(q[:, :, part].permute(2, 0, 1, 3), keys, values, attn_mask=mask)
        pieces.append(out.flatten(1, 2).transpose(0, 1))
        begin = part.stop
    pieces.append(torch.zeros_like(pieces[0][:, :1]).expand(-1, k.shape[1] - begin, -1))  # filling
    return torch.cat(pieces, 1)


def place(slabs, row, keys_values, limit):
    """Copy a row's keys and values, (2, length, K, d) a layer, to a free slot of the smallest fitting slab."""
    cells = CELLS
    while cells <= row.length:
        cells *= 2
    cells = min(cells, limit)
    if cells not in slabs:
        slabs[cells] = Slab([], [kv.new_zeros(2, 0, cells, *kv.shape[2:]) for kv in keys_values])
    slab = slabs[cells]
    slot = len(slab.rows)
    for layer, kv in enumerate(keys_values):
        if slot == slab.caches[layer].shape[1]:  # zeros: a masked cell has weight 0, and 0 * NaN is NaN
            slab.caches[layer] = F.pad(slab.caches[layer], (0, 0, 0, 0, 0, 0, 0, 4))
        slab.caches[layer][:, slot, :row.length] = kv
    slab.rows.append(row)


def settle(slabs, limit):
    """Free the slots of finished rows, and move rows whose cache is full to a larger one."""
    for cells, slab in list(slabs.items()):
        for slot in reversed(range(len(slab.rows))):
            row = slab.rows[slot]
            if not row.done and row.length < cells:
                continue
            if not row.done:
                place(slabs, row, [cache[:, slot] for cache in slab.caches], limit)
            slab.rows[slot] = slab.rows[-1]  # the last row closes the gap
            slab.rows.pop()
            for cache in slab.caches:
                cache[:, slot] = cache[:, len(slab.rows)]
        if not slab.rows:
            del slabs[cells]


def next_logits(model, hidden):
    """(n, D) states before the final norm to (n, V) logits in the model's dtype."""
    n = len(hidden)
    hidden = model.norm(hidden)
    if not hidden.is_cuda:
        hidden = F.pad(hidden, (0, 0, 0, max(0, CPU_ROWS - n)))
    # On a CPU this order is faster for few rows than hidden @ weight.T, the transposed copy included.
    return (model.head_weight() @ hidden.T).T[:n].contiguous()


def sample(logits, uniforms, temperature, top_p, top_k):
    """One id a row: logits (n, V), uniforms (n,) fp64 in [0, 1), the rest as in `generate`; (n,) int64."""
    if temperature == 0:
        return logits.argmax(-1)
    probs, ids = filtered(logits, temperature, top_p, top_k)
    cdf = probs.cumsum(-1)
    picked = (cdf <= uniforms[:, None] * cdf[:, -1:]).sum(-1)
    picked = picked.minimum((probs > 0).sum(-1) - 1)  # where u * total was rounded up to total
    return ids.gather(1, picked[:, None]).squeeze(1)


def filtered(logits, temperature, top_p, top_k):
    """The filters in transformers' order. Returns weights (n, k) fp64, largest first, 0 where top_p dropped
    the token (the rest is not normalised again), and ids (n, k); k is V without top_k."""
    if 0 < top_k < logits.shape[1]:
        values, ids = largest(logits, top_k)
    else:
        values, ids = logits.sort(-1, descending=True)
    probs = (values.double() / temperature).softmax(-1)
    if top_p < 1:
        probs = probs.masked_fill(probs.cumsum(-1) - probs >= top_p, 0)
    return probs, ids


def largest(logits, k, width=128):
    """logits.topk(k), sooner: only the k blocks of columns with the largest maxima can hold the k largest."""
    blocks = logits.shape[1] // width
    if blocks <= k:
        return logits.topk(k)
    maxima = logits[:, :blocks * width].unflatten(1, (blocks, width)).amax(-1)
    columns = torch.arange(logits.shape[1], device=logits.device)
    inside = columns[:blocks * width].view(blocks, width)[maxima.topk(k).indices].flatten(1)  # (n, k * width)
    columns = torch.cat([inside, columns[blocks * width:].expand(len(logits), -1)], 1)
    values, picked = logits.gather(1, columns).topk(k)
    return values, columns.gather(1, picked)


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
            if os.path.basename(f) != f or not f.endswith(".safetensors"):
                raise UserError(f"{index_path}: file name {f!r} is not a .safetensors file of this folder")
    elif os.path.exists(single):
        index, files = None, ["model.safetensors"]
    else:
        raise UserError(f"{folder}: neither model.safetensors nor model.safetensors.index.json is there "
                        "(weights in pickle formats are not read)")
    found = {}
    for f in files:
        path = os.path.join(folder, f)
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
def load_weights(model: Qwen3, folder: str) -> None:
    """Fill a model, plain or sharded, from a checkpoint: every rank reads only its own rows.

    Strict: raises one UserError that lists all missing, unexpected, mis-shaped and mis-typed tensors. A tied
    checkpoint may carry lm_head.weight; it is the embedding again, and is not read.
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
    for name, p in wanted.items():
        local, start, end = rows_here(p)
        if end > start:
            local.copy_(found[name][1][start:end])  # casts


def load_model(folder: str, dtype=torch.float32, device="cpu", checkpointing=False) -> Qwen3:
    """A whole, unsharded model from a folder, e.g. for evaluation."""
    with torch.device("meta"):
        model = Qwen3(read_config(folder), checkpointing).to(dtype)
    model.to_empty(device=device)
    load_weights(model, folder)
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
    if main:
        os.makedirs(folder)
    for file, shard in zip(names, shards):
        whole = ((p.to(dtype).full_tensor() if isinstance(p, DTensor) else p.to(dtype)) for _, p in shard)
        if main:
            write_safetensors(os.path.join(folder, file), [(n, p.shape) for n, p in shard], dtype, whole)
        else:
            for _ in whole:  # take part in gathering
                pass
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
    with open(path, "wb") as f:
        f.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors:
            f.write(tensor.contiguous().cpu().view(torch.uint8).numpy().data)
        f.flush()
        os.fsync(f.fileno())


def write_json(path, value):
    """Write JSON so that after a crash the file is whole or absent."""
    with open(path + ".tmp", "w", encoding="utf-8") as f:
        json.dump(value, f, indent=2, ensure_ascii=False)
        f.flush()
        os.fsync(f.fileno())
    os.replace(path + ".tmp", path)
