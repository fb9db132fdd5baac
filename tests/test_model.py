"""model.py against transformers' Qwen3, and against brute-force masks."""

import json
import os
import runpy
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.profiler import profile

import data
import model as qwen
import tiny
from data import UserError

# heads, key heads, head_dim, hidden, tied, layout of config.json, largest shard
SHAPES = [
    (4, 4, 16, 64, True, "new", "5GB"), (4, 2, 16, 32, False, "new", "5GB"),
    (8, 1, 8, 32, True, "old", "5GB"), (2, 1, 64, 48, False, "old", "20KB"),
    (6, 2, 32, 40, True, "new", "20KB"), (3, 3, 24, 56, True, "old", "30KB"),
    (4, 1, 32, 64, False, "new", "5GB"), (8, 4, 16, 96, True, "old", "5GB"),
]


def hf_pair(folder, shape, dtype=torch.float32):
    """The same random checkpoint opened by transformers and by us."""
    from transformers import AutoModelForCausalLM

    heads, groups, head_dim, hidden, tied, kind, shard = shape
    folder.mkdir(exist_ok=True)
    tiny.write_checkpoint(folder, tied, 131, SHAPES.index(shape), shard, hidden_size=hidden,
                          num_hidden_layers=3, num_attention_heads=heads, head_dim=head_dim,
                          num_key_value_heads=groups, pad_token_id=None)
    if kind == "old":  # as published checkpoints have it
        raw = json.load(open(folder / "config.json"))
        raw.pop("rope_parameters"), raw.pop("layer_types", None)
        raw |= {"rope_theta": 1000000, "rope_scaling": None, "torch_dtype": raw.pop("dtype")}
        json.dump(raw, open(folder / "config.json", "w"))
    assert (folder / "model.safetensors.index.json").exists() == (shard != "5GB")
    hf = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="sdpa")
    return hf, qwen.load_model(str(folder), dtype)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@torch.no_grad()
def test_logits_equal_transformers(tmp_path, shape):
    hf, ours = hf_pair(tmp_path, shape)
    tokens = torch.randint(0, 131, (4300 if shape == SHAPES[1] else 200,))
    wanted = hf(tokens[None]).logits[0]
    worst = float((tiny.logits(ours, tokens) - wanted).abs().max() / wanted.abs().max())
    print(shape, f"largest difference over scale {worst:.1e}")
    assert worst <= 1e-5


@torch.no_grad()
def test_bf16_is_within_bf16_rounding(tmp_path):
    exact, _ = hf_pair(tmp_path / "a", SHAPES[1])
    hf, ours = hf_pair(tmp_path / "b", SHAPES[1], torch.bfloat16)
    tokens = torch.randint(0, 131, (40,))
    truth = exact.to(torch.bfloat16).float()(tokens[None]).logits[0]
    theirs = hf(tokens[None]).logits[0].float() - truth
    found = tiny.logits(ours, tokens).float() - truth
    assert theirs.square().mean() > 0
    assert found.square().mean() <= 1.2 * theirs.square().mean()


# --- attention ------------------------------------------------------------------------------------

FORKS = [(0, 5, 9, 12), (12, 13, 14, 15), (15, 40, 40, 47), (47, 130, 131, 200)]


def dense_mask(forks, length):
    """The rule of fork_attention, token by token."""
    fork, branch = list(range(-1, -1 - length, -1)), [0] * length
    for n, (start, trunk, rejected, chosen) in enumerate(forks):
        for i in range(start, chosen):
            fork[i], branch[i] = n, (i >= trunk) + (i >= rejected)
    return torch.tensor([[fork[q] == fork[k] and k <= q and branch[k] in (0, branch[q])
                          for k in range(length)] for q in range(length)])


@pytest.mark.parametrize("dtype, allowed", [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_attention_over_forks_equals_a_dense_mask(dtype, allowed):
    torch.manual_seed(0)
    length = FORKS[-1][-1]
    q, k, v = (torch.randn(h, length, 16, dtype=dtype, requires_grad=True) for h in (4, 2, 2))
    g = torch.randn(4, length, 16, dtype=dtype)
    wanted = torch.nn.functional.scaled_dot_product_attention(
        q[None], k[None], v[None], dense_mask(FORKS, length), enable_gqa=True)[0]
    results = [(out, *torch.autograd.grad(out, (q, k, v), g))
               for out in (wanted, qwen.fork_attention(q, k, v, FORKS))]
    for a, b in zip(*results):
        assert (a - b).abs().max() <= allowed


# --- what is read and what is refused -------------------------------------------------------------

REFUSED = [
    {"model_type": "qwen3_moe"}, {"use_sliding_window": True}, {"is_causal": False},
    {"layer_types": ["full_attention", "sliding_attention"]},
    {"rope_scaling": {"type": "yarn", "factor": 4}}, {"rope_scaling": {"type": "dynamic"}},
    {"rope_scaling": {"rope_type": "default", "factor": 2}},
    {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "factor": 2}},
    {"rope_parameters": None}, {"quantization_config": {"bits": 4}}, {"num_experts": 8},
    {"auto_map": {"AutoModel": "x.py"}}, {"logit_scale": 0.5}, {"layer_scales": [1, 2]},
    {"hidden_size": "32"}, {"hidden_size": -1}, {"rms_norm_eps": float("nan")},
]
BOOKKEEPING = {
    "_name_or_path": "x", "_flag": True, "unsloth_fixed": True, "license": "mit", "sep_token_id": 3,
    "transformers.js_config": {"dtype": "q4"}, "torch_dtype": "bfloat16", "mlp_bias": False,
    "num_experts": None, "rope_scaling": None,
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return tiny.write_checkpoint(tmp_path_factory.mktemp("checkpoint"))


def with_config(checkpoint, folder, change):
    """A copy of the checkpoint with keys of its config.json changed."""
    shutil.copytree(checkpoint, folder)
    raw = json.load(open(folder / "config.json")) | change
    (folder / "config.json").write_text(json.dumps(raw))
    return str(folder)


@torch.no_grad()
def distance_from_transformers(folder):
    """Largest difference of the logits, both from this folder."""
    from transformers import AutoModelForCausalLM

    tokens = torch.arange(3, 40)
    hf = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, return_dict=True)
    wanted = hf(tokens[None]).logits[0]
    return float((tiny.logits(qwen.load_model(folder), tokens) - wanted).abs().max())


@pytest.mark.parametrize("change", REFUSED, ids=str)
def test_configs_that_change_the_computation_are_refused_by_name(checkpoint, tmp_path, change):
    folder = with_config(checkpoint, tmp_path / "model", change)
    (name, value), = change.items()
    if name.startswith("rope_"):  # its keys are read as if they stood outside
        name = list(value or ["rope_theta"])[-1]
    with pytest.raises(UserError, match=f'{folder}.*(?s:.*)"{name}" is'):
        qwen.read_config(folder)


def test_bookkeeping_of_a_config_is_ignored(checkpoint, tmp_path):
    assert distance_from_transformers(with_config(checkpoint, tmp_path / "m", BOOKKEEPING)) <= 1e-5


@pytest.mark.parametrize("rope", [
    {"rope_scaling": {"rope_type": "default"}, "rope_parameters": None, "rope_theta": 3e4},
    {"rope_parameters": {"rope_type": "default", "rope_theta": 3e4}, "rope_theta": 1e6}], ids=str)
def test_default_rope_in_either_spelling_equals_transformers(checkpoint, tmp_path, rope):
    folder = with_config(checkpoint, tmp_path / "model", rope)
    assert qwen.read_config(folder).rope_theta == 3e4
    assert distance_from_transformers(folder) <= 1e-5


def test_every_key_that_transformers_knows_is_computed_or_refused(checkpoint, tmp_path):
    """Another value for each key of its configuration: equal logits, or an error that names it."""
    from transformers import Qwen3Config

    known = Qwen3Config().to_dict() | json.load(open(os.path.join(checkpoint, "config.json")))
    refused = set()
    for key in sorted(known):
        other = {bool: not known[key], float: 0.25, str: "other", list: ["a"], dict: {"0": "a"}}
        other = other.get(type(known[key]), 3)
        folder = with_config(checkpoint, tmp_path / key, {key: other})
        try:
            qwen.load_model(folder)
        except UserError as e:
            name = key.replace("rope_parameters", "rope_theta")  # which is in there
            assert f'"{name}"' in str(e) or "do not fit config.json" in str(e)
            refused.add(key)
            continue
        assert distance_from_transformers(folder) <= 1e-5, key
    assert {"hidden_act", "hidden_size", "attention_bias", "num_hidden_layers"} <= refused
    assert not refused & {"rms_norm_eps", "use_cache", "eos_token_id", "max_position_embeddings"}


def test_weights_that_do_not_fit_are_listed_all_at_once(checkpoint, tmp_path):
    folder = with_config(checkpoint, tmp_path / "model", {})
    weights = load_file(f"{folder}/model.safetensors")
    del weights["model.norm.weight"]
    weights["model.extra.weight"] = torch.zeros(2)
    weights["model.layers.0.mlp.up_proj.weight"] = torch.zeros(3, 3)
    save_file(weights, f"{folder}/model.safetensors")
    with pytest.raises(UserError) as e:
        qwen.load_model(folder)
    for line in ("norm.weight: shape (32,) expected, found None",
                 "extra.weight: shape None expected, found (2,)",
                 "layers.0.mlp.up_proj.weight: shape (64, 32) expected, found (3, 3)"):
        assert f"\n  model.{line}" in str(e.value)


@pytest.mark.parametrize("change", ["the same", "other type", "one number", "wrong shape"])
def test_a_head_beside_tied_embeddings_must_be_the_embedding(checkpoint, tmp_path, change):
    folder = with_config(checkpoint, tmp_path / "model", {})
    weights = load_file(f"{folder}/model.safetensors")
    embedding = weights["model.embed_tokens.weight"]
    embedding.copy_(embedding.bfloat16())
    head = embedding.bfloat16() if change == "other type" else embedding.clone()
    if change == "one number":
        head[264, 31] += 0.5
    if change == "wrong shape":
        head = head[:-1].clone()
    save_file(weights | {"lm_head.weight": head}, f"{folder}/model.safetensors", {"format": "pt"})
    if change in ("the same", "other type"):
        assert distance_from_transformers(folder) <= 1e-5
    else:
        with pytest.raises(UserError, match="lm_head.weight"):
            qwen.load_model(folder)


def test_beside_an_index_a_single_file_is_read_as_in_transformers(checkpoint, tmp_path):
    folder = with_config(checkpoint, tmp_path / "model", {})
    other = {name: t + 1 for name, t in load_file(f"{folder}/model.safetensors").items()}
    save_file(other, f"{folder}/model-00001.safetensors", {"format": "pt"})
    data.write_json(f"{folder}/model.safetensors.index.json", {
        "metadata": {}, "weight_map": dict.fromkeys(other, "model-00001.safetensors")})
    assert distance_from_transformers(folder) <= 1e-5
    os.remove(f"{folder}/model.safetensors")
    assert distance_from_transformers(folder) <= 1e-4


def test_a_lora_folder_and_a_hub_id_say_what_to_do(tmp_path):
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    with pytest.raises(UserError, match="LoRA adapter .*: merge it first"):
        qwen.read_config(str(tmp_path))
    with pytest.raises(UserError, match="hf download Qwen/Qwen3-8B --local-dir Qwen3-8B"):
        qwen.read_config("Qwen/Qwen3-8B")


@torch.no_grad()
def test_export_in_shards_opens_everywhere(checkpoint, tmp_path):
    from transformers import AutoModelForCausalLM

    shutil.copytree(checkpoint, tmp_path / "source")
    (tmp_path / "source" / "generation_config.json").write_text('{"eos_token_id": [258]}')
    ours, ranks = qwen.load_model(checkpoint), qwen.open_ranks(60)
    qwen.export(ours, str(tmp_path / "out"), str(tmp_path / "source"), ranks, torch.float32, 40_000)
    qwen.close_ranks()
    files = sorted(f for f in os.listdir(tmp_path / "out") if f.endswith(".safetensors"))
    stats = [os.stat(tmp_path / "out" / file) for file in files]
    assert len(files) > 2 and all(stat.st_size < 42_000 for stat in stats)
    assert {stat.st_mode & 0o777 for stat in stats} == {0o644}  # others may read them
    again = qwen.load_model(str(tmp_path / "out"))
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), again.parameters()))
    hf = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    tokens = torch.randint(0, 131, (20,))
    assert (hf(tokens[None]).logits[0] - tiny.logits(ours, tokens)).abs().max() <= 1e-4
    assert (tmp_path / "out" / "generation_config.json").read_text() == '{"eos_token_id": [258]}'


# --- processes ------------------------------------------------------------------------------------

def test_importing_the_model_makes_the_first_call_of_every_mkl_function():
    with profile() as seen:
        runpy.run_path(qwen.__file__)
    called = [event.name for event in seen.events()]
    for name in ("cos", "sin", "exp", "log"):
        assert called.count(f"aten::{name}") == 2  # fp32 and fp64
