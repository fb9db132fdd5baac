"""Qwen3 by hand: network, attention over forks, generation, checkpoints; and processes.

Comes in:  a checkpoint folder in Hugging Face layout, token ids laid out as forks (data.py).
Goes out:  the log-probability of every scored row, or sampled continuations of prompts.

Parameter names are those of transformers' modeling_qwen3.py without "model.". Shapes: T tokens of a
pack (no batch, no padding: sequences one after the other, which attention keeps apart), D hidden
width, H query heads, K key heads, d head width, R scored rows, V vocabulary.
"""

import argparse
import contextlib
import functools
import math
import os
import shutil
import sys
import time
import traceback
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

from data import Chat, UserError, listed, load_chat, read_json, write_json
from loss import linear_logps

# MKL picks a function's kernel on its first call; two threads at once may get one that is up to
# 1.5e-4 off (pytorch issue 188792, until MKL 2025). Hence first calls on one thread.
for _dtype in (torch.float32, torch.float64):
    for _function in (torch.cos, torch.sin, torch.exp, torch.log):
        _function(torch.ones(8, dtype=_dtype))


# --- configuration, network, attention over forks -------------------------------------------------

@dataclass
class Config:
    """What varies between dense Qwen3 models, named as in config.json."""
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


# Starts of keys that change no forward pass, or that read_config reads by itself.
HARMLESS = ("_", "architectures", "initializer_range", "max_position_", "max_window_", "use_cache",
            "rope_parameters", "rope_scaling", "sliding_window", "transformers", "unsloth_")
# What this file computes where a key could ask for something else.
SUPPORTED = {"model_type": "qwen3", "hidden_act": "silu", "is_causal": True,
             "rope_type": "default", "type": "default", "layer_types": ["full_attention"]}


def read_config(folder: str) -> Config:
    """folder/config.json of transformers 4 or 5. UserError lists all wrong keys. A key unknown
    here passes if HARMLESS, a text, a token id, empty or off."""
    path = f"{folder}/config.json"
    if not os.path.isdir(folder):
        raise UserError(f"{folder} is no folder: a folder with config.json and weights expected; "
                        f"hf download {folder} --local-dir {os.path.basename(folder)} gets one")
    if os.path.exists(f"{folder}/adapter_config.json"):
        raise UserError(f"{folder} holds a LoRA adapter (adapter_config.json): merge it first")
    raw = {**SUPPORTED, "head_dim": 128, "tie_word_embeddings": False, **read_json(path)}
    raw |= raw.get("rope_scaling") or raw.get("rope_parameters") or {}  # as in transformers
    raw["layer_types"] = sorted(set(raw["layer_types"] or ["full_attention"]))
    config, problems = Config(**{f.name: raw.pop(f.name, None) for f in fields(Config)}), []
    for f in fields(Config):
        value = getattr(config, f.name)
        if f.type is not bool and not (isinstance(value, (f.type, int)) and value > 0):
            problems.append(f'"{f.name}" is {value!r:.60}: {f.type.__name__} above 0 expected')
    for key, value in raw.items():
        harmless = key.startswith(HARMLESS) or key.endswith("_token_id") or isinstance(value, str)
        if key in SUPPORTED and value != SUPPORTED[key]:
            problems.append(f'"{key}" is {value!r:.60}: only {SUPPORTED[key]!r} is supported')
        elif key not in SUPPORTED and not harmless and value not in (None, False, [], {}):
            problems.append(f'"{key}" is {value!r:.60}: unknown, remove it if it changes no logits')
    if problems:
        raise UserError(f"{path} is no Qwen3 that this program computes:{listed(problems)}")
    return config


class Qwen3(nn.Module):
    def __init__(self, config: Config, checkpointing: bool = False):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            Block(config, checkpointing) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        if not config.tie_word_embeddings:
            self.lm_head = Head(config.hidden_size, config.vocab_size, bias=False)

    def forward(self, tokens, positions, spans, rows, targets):
        """tokens, positions (T,); spans: see fork_attention; rows (R,) indices into T; targets (R,)
        ids. Returns (R,) fp32: log p(targets[i] | all that token rows[i] sees)."""
        # Only scored rows reach the norm and the head. index_select: h[rows] is 5-7x slower on CPU.
        hidden = self.norm(self.hidden_states(tokens, positions, spans).index_select(0, rows))
        if self.config.tie_word_embeddings:
            return linear_logps(hidden, self.embed_tokens.weight, targets)
        return self.lm_head(hidden, targets)  # called: so FSDP gathers it

    def hidden_states(self, tokens, positions, spans):
        """(T, D): the output of the last block, before the final norm."""
        return self.blocks(tokens, positions, lambda q, k, v, layer: fork_attention(q, k, v, spans))

    def blocks(self, tokens, positions, attend):
        """hidden_states with attend(q, k, v, layer) as attention; caches need the layer."""
        x = self.embed_tokens(tokens)
        cos, sin = rope_table(positions, self.config, x.dtype)
        for layer, block in enumerate(self.layers):
            x = block(x, cos, sin, functools.partial(attend, layer=layer))
        return x

    def head_weight(self):
        return (self.embed_tokens if self.config.tie_word_embeddings else self.lm_head).weight


class Block(nn.Module):
    def __init__(self, config, checkpointing):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)
        self.checkpointing = checkpointing

    def forward(self, x, cos, sin, attend):
        # Inside FSDP's hooks: recomputation finds the weights that backward has gathered already.
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
        hidden, self.head_dim = config.hidden_size, config.head_dim
        wide = config.num_attention_heads * self.head_dim  # unlike D in 0.6B, 4B and 32B
        narrow = config.num_key_value_heads * self.head_dim
        self.q_proj = nn.Linear(hidden, wide, bias=False)
        self.k_proj = nn.Linear(hidden, narrow, bias=False)
        self.v_proj = nn.Linear(hidden, narrow, bias=False)
        self.o_proj = nn.Linear(wide, hidden, bias=False)
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
        narrow, wide = config.hidden_size, config.intermediate_size
        self.gate_proj = nn.Linear(narrow, wide, bias=False)
        self.up_proj = nn.Linear(narrow, wide, bias=False)
        self.down_proj = nn.Linear(wide, narrow, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class RMSNorm(nn.RMSNorm):
    def forward(self, x):
        # As HF: round, then weight. F.rms_norm with the weight differs in a quarter of bf16.
        return self.weight * F.rms_norm(x, x.shape[-1:], eps=self.eps)


class Head(nn.Linear):
    def forward(self, hidden, targets):
        return linear_logps(hidden, self.weight, targets)


def rope_table(positions, config, dtype):
    """(T,) positions to cos and sin (T, d), cast from fp32 as HF. No buffer: meta would lose it."""
    index = torch.arange(0, config.head_dim, 2, device=positions.device).float()
    frequencies = 1.0 / config.rope_theta ** (index / config.head_dim)
    angles = positions[:, None].float() * frequencies
    angles = torch.cat([angles, angles], -1)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x, cos, sin):
    """Rotary position embedding of x (heads, T, d), in halves as HF."""
    left, right = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-right, left], -1) * sin


def fork_attention(q, k, v, spans):
    """Softmax attention inside forks: q (H, T, d), k and v (K, T, d) to (H, T, d).

    spans: (start, trunk_end, rejected_end, chosen_end) of forks, one after the other in T. A trunk
    sees itself, a branch its trunk and itself, causally.
    """
    dtype = q.dtype
    if not q.is_cuda and dtype != torch.float64:
        q, k, v = q.float(), k.float(), v.float()  # the CPU's 16-bit backward takes twice as long
    sizes = []
    for start, trunk_end, rejected_end, chosen_end in spans:
        sizes += [trunk_end - start, rejected_end - trunk_end, chosen_end - rejected_end]
    # split: its backward is one cat; that of a slice would fill a whole (H, T, d) each time.
    queries, keys, values = (t[None].split(sizes, 2) for t in (q, k, v))
    pieces = []
    for i, size in enumerate(sizes):
        if size == 0:
            continue
        key, value, part = keys[i], values[i], i % 3  # its trunk (part 0) is i - part
        if part > 0:
            key = torch.cat([keys[i - part], key], 2)
            value = torch.cat([values[i - part], value], 2)
        mask = causal_lower_right(size, key.shape[2])  # which flash kernels take as it is
        pieces.append(F.scaled_dot_product_attention(
            queries[i], key, value, attn_mask=mask, enable_gqa=True))
    return torch.cat(pieces, 2)[0].to(dtype)


# --- generation -----------------------------------------------------------------------------------

CELLS = 256  # tokens that a new cache holds at least; it doubles when full
LEAST_ROWS = 16  # MKL rounds products of fewer rows in another way: rows are filled up to it


@dataclass
class Row:
    """A sample under way."""
    index: int  # of its prompt
    random: np.random.Generator
    cache: torch.Tensor  # (layers, 2, K, cells, d): keys and values
    length: int  # cells in use: the prompt and all ids but the last
    ids: list = field(default_factory=list)  # sampled so far


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn; the defaults are the paper's. None: left to a server."""
    temperature: float = 0.7  # 0: greedy
    top_p: float = 0.8  # of the top_k tokens the fewest that sum to it stay
    top_k: int = 20  # so many most likely tokens stay; 0: all
    max_tokens: int = 32768


@torch.no_grad()
def generate(model: Qwen3, prompts, seeds, sampling: Sampling, end=(), batch_size=32):
    """Continue every prompt by sampling with a whole model.

    prompts  lists of token ids, none empty; seeds: an int >= 0 a prompt; end: ids that end a sample
    yields   (index of the prompt, ids, ended) of each sample that is finished: ids without the end
             token; ended False: max_tokens cut it off

    Each sample has a generator, a cache and a prefill of its own: batch size, neighbours and rank
    change it by rounding alone, on a CPU in fp32 not at all (MKL). Raises UserError.
    """
    rows, started = [], 0
    while rows or started < len(prompts):
        hidden = [decode(model, rows)] if rows else []
        while started < len(prompts) and len(rows) < batch_size:
            last, cache = prefill(model, prompts[started])
            hidden.append(last)
            random = np.random.Generator(np.random.Philox(seeds[started]))
            rows.append(Row(started, random, cache, len(prompts[started])))
            started += 1
        hidden = F.pad(model.norm(torch.cat(hidden)), (0, 0, 0, max(0, LEAST_ROWS - len(rows))))
        # Faster on a CPU, for few rows, than hidden @ weight.T.
        logits = (model.head_weight() @ hidden.T)[:, :len(rows)].T.contiguous()  # (rows, V)
        if not logits.amax(-1).isfinite().all():
            raise UserError("cannot sample: the model's logits are not finite")
        uniforms = torch.tensor([row.random.random() for row in rows], dtype=torch.float64)
        tokens = sample(logits, uniforms.to(logits.device), sampling.temperature, sampling.top_p,
                        sampling.top_k).tolist()
        unfinished = []
        for row, token in zip(rows, tokens):
            if token in end:
                yield row.index, row.ids, True
                continue
            row.ids.append(token)
            if len(row.ids) >= sampling.max_tokens:
                yield row.index, row.ids, False
            else:
                unfinished.append(row)
        rows = unfinished


def prefill(model, prompt):
    """A prompt's last hidden state (1, D) and its cache."""
    config, weight, length = model.config, model.norm.weight, len(prompt)
    cache = weight.new_empty(config.num_hidden_layers, 2, config.num_key_value_heads,
                             max(CELLS, 2 * length), config.head_dim)

    def attend(q, k, v, layer):
        cache[layer, 0, :, :length] = k
        cache[layer, 1, :, :length] = v
        return fork_attention(q, k, v, [(0, length, length, length)])

    tokens = torch.tensor(prompt, device=weight.device)
    return model.blocks(tokens, torch.arange(length, device=weight.device), attend)[-1:], cache


def decode(model, rows):
    """The last token of every row through the blocks: (rows, D). Caches get keys and values."""
    device, fill = model.norm.weight.device, [0] * (LEAST_ROWS - len(rows))
    tokens = torch.tensor([row.ids[-1] for row in rows] + fill, device=device)
    positions = torch.tensor([row.length for row in rows] + fill, device=device)
    for row in rows:
        if row.length == row.cache.shape[3]:
            row.cache = F.pad(row.cache, (0, 0, 0, row.length))
        row.length += 1

    def attend(q, k, v, layer):
        out = torch.zeros_like(q)
        for i, row in enumerate(rows):
            cache = row.cache[layer, :, :, :row.length]
            cache[0, :, -1] = k[:, i]
            cache[1, :, -1] = v[:, i]
            out[:, i:i + 1] = F.scaled_dot_product_attention(
                q[None, :, i:i + 1], cache[:1], cache[1:], enable_gqa=True)[0]
        return out

    return model.blocks(tokens, positions, attend)[:len(rows)]


def sample(logits, uniforms, temperature, top_p, top_k):
    """(n,) ids from logits (n, V) and uniforms (n,) fp64; top-k, top-p in transformers' order."""
    if temperature == 0:
        return logits.argmax(-1)
    if 0 < top_k < logits.shape[1]:
        values, ids = logits.topk(top_k)
    else:
        values, ids = logits.sort(-1, descending=True)
    probs = (values.double() / temperature).softmax(-1)
    if top_p < 1:
        probs = probs.masked_fill(probs.cumsum(-1) - probs >= top_p, 0)
    cdf = probs.cumsum(-1)
    picked = (cdf <= uniforms[:, None] * cdf[:, -1:]).sum(-1)  # u < 1: u * total rounds below total
    return ids.gather(1, picked[:, None]).squeeze(1)


# --- checkpoints in Hugging Face layout -----------------------------------------------------------

SIDE_FILES = ("generation_config.json", "tokenizer.json", "tokenizer_config.json", "merges.txt",
              "chat_template.jinja", "vocab.json", "special_tokens_map.json", "added_tokens.json")


def hf_name(name: str) -> str:
    """Our parameter name to the one in HF checkpoints."""
    return name if name.startswith("lm_head.") else "model." + name


def open_tensors(folder: str) -> dict:
    """{HF name: safetensors slice} of a checkpoint; reads headers alone. Raises UserError."""
    files, index, tensors = ["model.safetensors"], f"{folder}/model.safetensors.index.json", {}
    if not os.path.exists(f"{folder}/model.safetensors") and os.path.exists(index):
        files = sorted(set(read_json(index)["weight_map"].values()))
    for file in files:
        path = f"{folder}/{file}"
        try:
            handle = safe_open(path, framework="pt")
            tensors |= {name: handle.get_slice(name) for name in handle.keys()}
        except (OSError, SafetensorError) as e:
            raise UserError(f"{path} is missing, truncated or corrupt (weights in pickle formats "
                            f"are not read): {e}") from None
    return tensors


def rows_here(p):
    """This rank's part of a parameter: (local tensor, first row, end row)."""
    if not isinstance(p, DTensor):
        return p.detach(), 0, p.shape[0]
    local, mesh = p.detach().to_local(), p.device_mesh  # FSDP shards over its last dimension
    chunk = math.ceil(p.shape[0] / mesh.shape[-1])  # the last ranks have fewer rows or none
    start = min(mesh.get_coordinate()[-1] * chunk, p.shape[0])
    return local, start, start + local.shape[0]


@torch.no_grad()
def load_weights(model: Qwen3, folder: str, device):
    """Give a model of the meta device, plain or sharded, memory on `device` and a checkpoint's
    weights; each rank reads its own rows. Raises UserError that lists all misfits."""
    tensors = open_tensors(folder)
    model.to_empty(device=device)
    wanted = {hf_name(name): p for name, p in model.named_parameters()}
    tied_head = model.config.tie_word_embeddings and "lm_head.weight" in tensors
    if tied_head:
        wanted["lm_head.weight"] = model.embed_tokens.weight
    expected = {name: tuple(p.shape) for name, p in wanted.items()}
    found = {name: tuple(tensor.get_shape()) for name, tensor in tensors.items()}
    problems = [f"{name}: shape {expected.get(name)} expected, found {found.get(name)}"
                for name in expected | found if expected.get(name) != found.get(name)]
    if problems:
        raise UserError(f"{folder}: weights do not fit config.json:{listed(problems)}")
    for name, p in wanted.items():
        local, start, end = rows_here(p)
        if not tied_head or name != "lm_head.weight":
            local.copy_(tensors[name][start:end])  # casts
        elif (tensors[name][start:end].to(local) != local).any():
            raise UserError(f"{folder}: {name} differs from model.embed_tokens.weight, so "
                            'config.json should say "tie_word_embeddings": false')


def load_model(folder: str, dtype=torch.float32, device="cpu") -> Qwen3:
    """A whole model from a folder, e.g. for evaluation."""
    with torch.device("meta"):
        model = Qwen3(read_config(folder)).to(dtype)
    load_weights(model, folder, device)
    return model


@dataclass
class LocalModel:
    """A model in this process (under torchrun: a whole one in every process) with its tokenizer."""
    model: Qwen3
    chat: Chat
    end: set  # ids that end an answer
    batch_size: int = 32


def open_local_model(folder: str, dtype, device, batch_size: int = 32, template: str = ""):
    """A LocalModel of a checkpoint folder. <|im_end|> and generation_config.json end answers."""
    chat = load_chat(folder, read_config(folder).vocab_size, template)
    end, path = {chat.im_end}, f"{folder}/generation_config.json"
    if os.path.exists(path):
        ids = read_json(path).get("eos_token_id")
        end.update([ids] if isinstance(ids, int) else ids or [])
    return LocalModel(load_model(folder, dtype, device), chat, end, batch_size)


@torch.no_grad()
def export(model, folder, source, ranks, dtype=torch.bfloat16, shard_bytes=5 * 10**9):
    """Write `model` in HF layout, with the other files of `source`. All ranks call, main writes."""
    shards, room, weight_map = [], 0, {}
    for name, p in model.named_parameters():
        size = p.numel() * dtype.itemsize
        if size > room:
            shards.append({})
            room = shard_bytes
        shards[-1][hf_name(name)] = p
        room -= size
    for number, shard in enumerate(shards, 1):
        suffix = f"-{number:05d}-of-{len(shards):05d}" if len(shards) > 1 else ""
        file = f"model{suffix}.safetensors"
        weight_map |= dict.fromkeys(shard, file)
        tensors = {}
        for name, p in shard.items():
            tensor = p.detach().to(dtype)
            if isinstance(tensor, DTensor):
                tensor = tensor.full_tensor()
            if ranks.main:
                tensors[name] = tensor.cpu()
        ranks.main_only(write_tensors, f"{folder}/{file}", tensors)
    with ranks.together():
        if not ranks.main:
            return
        if len(shards) > 1:
            total = sum(p.numel() for p in model.parameters()) * dtype.itemsize
            write_json(f"{folder}/model.safetensors.index.json",
                       {"metadata": {"total_size": total}, "weight_map": weight_map})
        config = read_json(f"{source}/config.json")
        config["dtype" if "dtype" in config else "torch_dtype"] = str(dtype).removeprefix("torch.")
        write_json(f"{folder}/config.json", config)
        for file in sorted(set(SIDE_FILES) & set(os.listdir(source))):
            shutil.copyfile(f"{source}/{file}", f"{folder}/{file}")


def write_tensors(path: str, tensors: dict, **metadata: str):
    """A safetensors file, durable on return."""
    os.makedirs(os.path.dirname(path), exist_ok=True)
    save_file(tensors, path, metadata={"format": "pt", **metadata})
    os.chmod(path, 0o644)  # safetensors lets only the owner read it
    with open(path, "rb") as f:
        os.fsync(f.fileno())


# --- processes: ranks, exit codes, options --------------------------------------------------------

class PlainLines:  # stderr for tqdm where it is no terminal: each state of a bar becomes a line
    def write(self, text):
        if text.strip():
            print(text.strip(), file=sys.stderr)


@dataclass
class Ranks:
    """Where this process stands. "Main" is global rank 0: two nodes have two local zeros."""
    rank: int
    world: int
    device: torch.device
    quiet: bool = False  # nothing but errors, and bars on a terminal

    @property
    def main(self):
        return self.rank == 0

    def say(self, text):
        if self.main and not self.quiet:
            tqdm.write(text, file=sys.stderr)

    def progress(self, total, title, unit, done=0):
        """The main rank's progress bar; in a file a line at both ends and every 30 seconds."""
        terminal, options = sys.stderr.isatty(), {"leave": not self.quiet}
        if not self.main or total - done < 2 or self.quiet and not terminal:
            return tqdm(disable=True)
        if not terminal:
            line = "{desc}: {n_fmt} of {total_fmt} in {elapsed}, {rate_fmt}{postfix}"
            options = dict(file=PlainLines(), bar_format=line, mininterval=30, maxinterval=30)
        return tqdm(total=total, desc=title, unit=unit, initial=done, **options)

    def reduce(self, tensor, op=dist.ReduceOp.SUM):
        """All-reduced copy, on the CPU."""
        tensor = tensor.to(self.device, copy=True)
        dist.all_reduce(tensor, op)
        return tensor.cpu()

    @contextlib.contextmanager
    def together(self):
        """A UserError or file error inside, on any rank, ends all: one message, code 1."""
        error = None
        try:
            yield
        except (UserError, OSError, SafetensorError) as e:
            error = e
        # Each rank sends its number if it failed, else `world`: the lowest one speaks.
        own = torch.full((), self.rank if error else self.world, device=self.device)
        first_failed = int(self.reduce(own, dist.ReduceOp.MIN))
        if self.rank == first_failed:
            tqdm.write(f"error: {error}", file=sys.stderr)  # clears a progress bar
        if first_failed < self.world:
            close_ranks()  # a wait: torchrun kills the others once one exits
            sys.exit(1)

    def main_only(self, function, *args):
        """function(*args) on the main rank, inside `together`; None on the others, which wait."""
        with self.together():
            return function(*args) if self.main else None


def open_ranks(timeout: int, toy: bool = False) -> Ranks:
    """A process group: torchrun's, else of one rank. Raises UserError for few GPUs (toy: not)."""
    local = int(os.environ.get("LOCAL_RANK") or 0)
    local_world = int(os.environ.get("LOCAL_WORLD_SIZE") or 1)
    arguments = {"backend": "gloo", "timeout": timedelta(seconds=timeout)}
    if "RANK" not in os.environ:
        arguments |= {"store": dist.HashStore(), "rank": 0, "world_size": 1}
    device, gpus = torch.device("cpu"), torch.cuda.device_count()
    if gpus >= local_world:
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
        # cuDNN's attention, torch's choice on new cards, plans half a second for each new length.
        torch.backends.cuda.enable_cudnn_sdp(False)
        arguments |= {"backend": "nccl", "device_id": device}
    elif gpus and not toy:
        raise UserError(f"{local_world} ranks on this machine, but {gpus} GPUs: start with "
                        f"--nproc_per_node={gpus}, or on the CPU with CUDA_VISIBLE_DEVICES=")
    else:  # torchrun sets OMP_NUM_THREADS=1, which wastes cores where there are fewer ranks
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // local_world))
        torch.set_flush_denormal(True)  # most of a sharp softmax is denormal: slow numbers
    try:
        dist.init_process_group(**arguments)
    except ValueError as e:  # a variable is missing or is no number
        raise UserError(f"{e}: start with torchrun, or unset RANK") from None
    return Ranks(dist.get_rank(), dist.get_world_size(), device)


def close_ranks():
    """Leave the process group together: without the barrier gloo can abort at exit."""
    dist.barrier()
    dist.destroy_process_group()


def start_program(parse, join):
    """(options, Ranks) from parse() and join(options). One rank a machine says what is wrong with
    the options, and all exit with code 2."""
    silent = os.environ.get("LOCAL_RANK", "") not in ("", "0")
    with contextlib.redirect_stderr(open(os.devnull, "w") if silent else sys.stderr):
        try:
            o = parse()
            return o, join(o)
        except UserError as e:
            print(f"error: {e}", file=sys.stderr, flush=True)
        except SystemExit as e:  # argparse has said what is wrong
            if not e.code:
                raise  # --help
    if silent:
        time.sleep(30)  # the rank that speaks exits first, and torchrun ends this one
    sys.exit(2)


def run_and_exit(main):
    """Run a program and end the process at once: threads, gloo's too, may hold up a plain exit."""
    code = 1
    try:
        code = main()
    except SystemExit as e:
        code = e.code
    except Exception:  # also gloo's and NCCL's, where another rank has died
        traceback.print_exc()
    sys.stdout.flush()
    os._exit(code or 0)


def option(default, text, choices=None):
    """A field of an Options dataclass that holds its arguments for argparse."""
    text = text.replace("%", "%%")
    if default is False:
        return field(default=False, metadata={"action": "store_true", "help": text})
    if default != "":
        text += f" [{default}]"
    return field(default=default, metadata=dict(type=type(default), choices=choices, help=text))


def add_options(parser, record):
    """A --flag for every `option` of a dataclass; the parsed result holds only those given."""
    for f in fields(record):
        if f.metadata:
            parser.add_argument(f"--{f.name}", default=argparse.SUPPRESS, **f.metadata)
