"""model.generate against transformers' generate and warpers, and itself in other batches."""

import math
import random
from dataclasses import asdict
from unittest import mock

import pytest
import torch

import model as qwen
import tiny
from data import UserError

# tied, heads, key heads, head_dim, hidden
SHAPES = [(True, 4, 2, 16, 32), (False, 8, 1, 8, 48), (True, 6, 2, 24, 40), (False, 4, 4, 32, 64)]
VOCAB = 265


def checkpoint(folder, shape, seed=0):
    tied, heads, groups, head_dim, hidden = shape
    return tiny.write_checkpoint(
        folder, tied, VOCAB, seed, num_attention_heads=heads, head_dim=head_dim,
        num_key_value_heads=groups, hidden_size=hidden)


def make_prompts(lengths, seed=0):
    rng = random.Random(seed)
    return [[rng.randrange(VOCAB) for _ in range(n)] for n in lengths]


@pytest.fixture(scope="module")
def ours(tmp_path_factory):
    return qwen.load_model(checkpoint(tmp_path_factory.mktemp("checkpoint"), SHAPES[0]))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_greedy_equals_transformers(tmp_path, monkeypatch, shape):
    from transformers import AutoModelForCausalLM

    folder = checkpoint(tmp_path, shape, seed=SHAPES.index(shape))
    hf = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ours = qwen.load_model(folder)
    prompts = make_prompts([7, 1, 40, 3, 21, 90])
    free = [hf.generate(torch.tensor([p]), attention_mask=torch.ones(1, len(p)), do_sample=False,
                        max_new_tokens=64, eos_token_id=-1, pad_token_id=0)[0, len(p):].tolist()
            for p in prompts]
    assert all(len(row) == 64 for row in free)
    settings = {"max_tokens": 64, "temperature": 0, "batch_size": 4}
    end = {free[0][10], free[1][30], free[2][0]}  # several end ids, one of them at once
    wanted = []
    for row in free:
        stop = next((i for i, token in enumerate(row) if token in end), None)
        wanted.append((row[:stop], stop is not None))
    assert {e for _, e in wanted} >= {True} and wanted[2] == ([], True)
    for cells in (256, 4):  # 4: caches grow again and again
        monkeypatch.setattr(qwen, "CELLS", cells)
        assert tiny.generate(ours, prompts, [0] * 6, **settings) == [(row, False) for row in free]
        assert tiny.generate(ours, prompts, [0] * 6, end=end, **settings) == wanted


@pytest.mark.parametrize("settings", [{}, {"temperature": 1.0, "top_p": 1, "top_k": 0},
                                      {"temperature": 1.3, "top_p": 0.9, "top_k": 0}], ids=str)
def test_a_sample_depends_on_its_seed_and_prompt_alone(ours, settings):
    prompts = make_prompts([7, 1, 40, 3, 250, 2, 130] * 2, seed=1)
    seeds = [*range(5, 11), 2**63, *range(11, 17), 2**64]
    more = {"max_tokens": 30, "end": set(range(6)), **settings}
    wanted = tiny.generate(ours, prompts, seeds, batch_size=1, **more)
    assert len({tuple(ids) for ids, _ in wanted}) == 14  # each prompt twice, with other seeds
    assert {e for _, e in wanted} == {True, False}
    for batch_size in (3, 16, 64):
        assert tiny.generate(ours, prompts, seeds, batch_size=batch_size, **more) == wanted
    order = list(range(14))
    random.Random(0).shuffle(order)
    part = order[:9]  # as another rank would have them
    found = tiny.generate(ours, [prompts[i] for i in part], [seeds[i] for i in part],
                          batch_size=5, **more)
    assert found == [wanted[i] for i in part]
    other = tiny.generate(ours, prompts, [s + 100 for s in seeds], batch_size=16, **more)
    assert sum(a != b for a, b in zip(other, wanted)) >= 13


def warped(logits, temperature, top_p, top_k):
    from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    scores = TemperatureLogitsWarper(temperature)(None, logits)
    if top_k:
        scores = TopKLogitsWarper(top_k)(None, scores)
    if top_p < 1:
        scores = TopPLogitsWarper(top_p)(None, scores)
    return scores.double().softmax(-1)


@pytest.mark.parametrize("vocab, scale", [(151936, 3), (151936, 0.1), (265, 3), (3000, 8), (10, 2)])
@pytest.mark.parametrize("settings", [
    (0.7, 0.8, 20), (1.0, 1, 20), (1.0, 0.95, 0), (0.3, 0.5, 1), (1.7, 1e-6, 7), (2.0, 0.99, 200),
    (1.0, 1, 0)])
def test_sampling_inverts_transformers_distribution_function(vocab, scale, settings):
    torch.manual_seed(vocab)
    logits = scale * torch.randn(1, vocab)
    uniforms = torch.linspace(0, 1 - 2**-53, 33, dtype=torch.float64)
    ids = qwen.sample(logits.expand(33, -1), uniforms, *settings)
    probs = warped(logits, *settings)[0]
    # Its sums are fp32: a token at the very edge of top_p may fall either way, and weighs little.
    allowed = 2e-4 if settings[1] < 1 else 1e-5
    assert (probs[ids] > 0).all() or not 0 < settings[2] <= 20
    for u, p in zip(uniforms, probs[ids]):  # the more probable tokens come first
        assert probs[probs > p].sum() - allowed <= u <= probs[probs >= p].sum() + allowed


def test_the_largest_uniform_picks_the_last_token_that_stays():
    """Its product with the sum of weights is never rounded up to that sum."""
    torch.manual_seed(0)
    logits, top_p = torch.randn(500, 300), 0.8
    ids = qwen.sample(logits, torch.full((500,), 1 - 2**-53, dtype=torch.float64), 0.7, top_p, 20)
    for row, picked in zip((logits / 0.7).tolist(), ids.tolist()):
        order = sorted(range(300), key=lambda i: -row[i])[:20]
        weights, before = [math.exp(row[i]) for i in order], 0.0
        for i, weight in zip(order, weights):
            if before < top_p * sum(weights):
                last = i
            before += weight
        assert picked == last


@pytest.mark.parametrize("batch_size", [2, 6])
def test_a_long_sample_holds_up_nobody_and_memory_follows_the_rows(ours, monkeypatch, batch_size):
    """One row goes on for long; 30 shorter ones pass through the other slots meanwhile."""
    vacant, decode = [], qwen.decode

    def watched(model, rows):
        hidden = decode(model, rows)
        vacant.extend(row.cache.shape[3] > max(4, 2 * row.length) for row in rows)
        return hidden
    monkeypatch.setattr(qwen, "CELLS", 4)
    monkeypatch.setattr(qwen, "decode", watched)
    prompts = make_prompts([8] * 31)
    sampling = qwen.Sampling(max_tokens=2000, temperature=1, top_k=0, top_p=1)
    alone = tiny.generate(ours, prompts, range(31), end=set(range(9)), batch_size=31,
                          **asdict(sampling))
    first = max(range(31), key=lambda i: len(alone[i][0]))
    order = [first] + [i for i in range(31) if i != first]
    with mock.patch.object(qwen, "sample", wraps=qwen.sample) as sample:
        finished = list(qwen.generate(ours, [prompts[i] for i in order], order, sampling,
                                      set(range(9)), batch_size))
    found = [(ids, ended) for _, ids, ended in sorted(finished)]
    assert found == [alone[i] for i in order] and not any(vacant) and finished[0][0] != 0
    lengths = [len(ids) + ended for ids, ended in found]
    assert 100 < lengths[0] < 2000
    free = [0] * batch_size  # when each slot is free: the next prompt takes the first
    for n in lengths:
        free[free.index(min(free))] += n
    assert sample.call_count == max(free)


def test_logits_that_are_not_finite_are_no_text(tmp_path):
    model = qwen.load_model(checkpoint(tmp_path, SHAPES[0]))
    model.norm.weight.data[3] = float("nan")
    for temperature in (0, 0.7):
        with pytest.raises(UserError, match="logits are not finite"):
            tiny.generate(model, [[1, 2]], [0], max_tokens=3, temperature=temperature)
