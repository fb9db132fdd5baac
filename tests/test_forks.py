"""A pair computed as a fork equals two ordinary sequences, in every log-prob and every gradient."""

import random

import pytest
import torch

import data
import loss
import model as qwen
import tiny

END = 96
CASES = {
    "one answer a prefix of the other": [([1, 2, 3], [4, 5], [4, 5, 6, 7])],
    "several forks": [([1, 2], [3, 4, 5], [3, 9]), ([8], [8, 8, 8], [8, 8]),
                      ([5, 6, 7, 8], [1], [2])],
    "one branch only": [([1, 2, 3], [4, 5], None), ([9, 8], [7, 7, 7], [7, 6])],
}
rng = random.Random(0)
for n in range(4):
    shared = [[rng.randrange(90) for _ in range(rng.randint(0, 30))] for _ in range(5)]
    CASES[f"random {n}"] = [
        ([rng.randrange(90) for _ in range(rng.randint(1, 9))],
         s + [91] + [rng.randrange(90) for _ in range(4)],
         s + [92] + [rng.randrange(90) for _ in range(rng.randint(1, 12))]) for s in shared]


def tiny_model(tied):
    torch.manual_seed(3)
    model = qwen.Qwen3(qwen.Config(97, 32, 48, 2, 4, 2, 16, 1e-6, 1e4, tied))
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(1 + 0.3 * torch.randn_like(p) if p.ndim == 1 else 0.25 * torch.randn_like(p))
    return model


def separate(model, prompt, answer):
    """Log-probs of an answer's tokens by one plain forward over the whole sequence."""
    logits = tiny.logits(model, torch.tensor(prompt + answer))[len(prompt) - 1:-1]
    return logits.log_softmax(-1).gather(1, torch.tensor(answer)[:, None])[:, 0]


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("case", CASES)
def test_fork_equals_two_sequences(case, tied):
    pairs = [(p, a + [END], b and b + [END]) for p, a, b in CASES[case]]
    model = tiny_model(tied)
    forks = [data.make_fork(p, a, b or []) for p, a, b in pairs]
    pack = data.make_pack(forks, list(range(len(forks))))
    with torch.no_grad():
        plain = [(separate(model, p, a), b and separate(model, p, b)) for p, a, b in pairs]
    objectives = [o for o in loss.OBJECTIVES
                  if all(b for *_, b in pairs) or o not in loss.PAIR_OBJECTIVES]
    torch.manual_seed(5)
    start = torch.stack([torch.stack([a.sum(), (a if b is None else b).sum()]) for a, b in plain])
    reference = start.detach().double() + 15 * torch.randn(len(pairs), 2, dtype=torch.float64)
    worst_value = worst_gradient = 0.0
    for objective in objectives:
        model.zero_grad()
        rows = model(pack.tokens, pack.positions, pack.spans, pack.rows, pack.targets)
        coefficients, sums = loss.row_coefficients(objective, rows, pack.lengths, reference, 0.1,
                                                   0.2)
        rows.backward(coefficients)
        ours = [p.grad.clone() for p in model.parameters()]
        model.zero_grad()
        total = 0.0
        for (p, a, b), ref in zip(pairs, reference):
            good, bad = separate(model, p, a), b and separate(model, p, b)
            up = 0.1 * (good.double().sum() - ref[0])
            down = None if bad is None else 0.1 * (bad.double().sum() - ref[1])
            total = total + {
                "spot-bce": lambda: loss.spot_bce(up, down),
                "spot-bco": lambda: loss.spot_bco(up, down, 0.2),
                "dpo": lambda: loss.dpo(up, down), "reward-sft": lambda: loss.reward_sft(up),
                "sft": lambda: loss.sft(good).sum(), "dft": lambda: loss.dft(good).sum(),
            }[objective]()
        total.backward()
        assert sums[loss.SUMS.index("loss")].item() == pytest.approx(total.item(), rel=1e-5)
        for a, p in zip(ours, model.parameters()):
            difference = (a - p.grad).abs().max() / p.grad.abs().max()
            worst_gradient = max(worst_gradient, float(difference))
    # the rows themselves, put together again as sequences
    at, rows = 0, rows.detach()
    for (t, j, c), (good, bad) in zip(pack.lengths.tolist(), plain):
        trunk, rejected, chosen = rows[at:at + t + j + c].split([t, j, c])
        at += t + j + c
        worst_value = max(worst_value, float((torch.cat([trunk, chosen]) - good).abs().max()))
        if bad is not None:
            worst_value = max(worst_value, float((torch.cat([trunk, rejected]) - bad).abs().max()))
    print(f"{case}, tied {tied}: log-probs {worst_value:.1e}, gradients {worst_gradient:.1e}")
    assert worst_value <= 1e-5 * max(float(good.abs().max()) for good, _ in plain)
    assert worst_gradient <= 1e-5


def test_trunk_is_computed_once():
    fork = data.make_fork([1, 2], [3, 4, 5, END], [3, 4, 6, 7, END])
    assert (fork.trunk.tolist(), fork.rejected.tolist(), fork.chosen.tolist()) == (
        [1, 2, 3, 4], [6, 7, END], [5, END])
    pack = data.make_pack([fork, fork], [1])
    assert pack.tokens.tolist() == [1, 2, 3, 4, 6, 7, END, 5, END]
    assert pack.positions.tolist() == [0, 1, 2, 3, 4, 5, 6, 4, 5]
    # trunk rows 3 and 4 from tokens 1 and 2; both branches start from the last trunk token, at 3
    assert pack.rows.tolist() == [1, 2, 3, 4, 5, 3, 7]
    assert pack.targets.tolist() == [3, 4, 6, 7, END, 5, END]
    assert pack.lengths.tolist() == [[2, 3, 2]]
    assert (pack.spans, pack.pairs.tolist()) == ([(0, 4, 7, 9)], [1])
    forks = [fork, data.make_fork([5, 6], [7, END], [])]
    pack = data.make_pack(forks, [1, 0])
    assert pack.spans == [(0, 4, 4, 4), (4, 8, 11, 13)]  # without y-: one plain sequence
    assert pack.positions.tolist() == [0, 1, 2, 3, 0, 1, 2, 3, 4, 5, 6, 4, 5]
    dummy = data.make_pack(forks, [])
    assert (len(dummy.tokens), len(dummy.rows), len(dummy.lengths)) == (1, 0, 0)
