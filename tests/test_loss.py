"""loss.py against TRL's own code, closed forms and brute force."""

import math
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

import loss

BETA, DELTA = 0.1, 0.37


def random_rows(forks=5, seed=0, one_branch=False):
    """Log-probs, lengths, reference sums of random forks; the first has an empty trunk response."""
    g = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 6, (forks, 3), generator=g)
    lengths[0, 0] = 0
    if one_branch:
        lengths[1, :2] = 0
    rows = -2 * torch.rand(int(lengths.sum()), generator=g, dtype=torch.float64)
    noise = torch.randn(forks, 2, generator=g, dtype=torch.float64)
    return rows, lengths, loss.sequence_logps(rows, lengths) + 20 * noise


def summed_loss(objective, rows, lengths, reference):
    """The definition, fork by fork in Python floats."""
    total, at = 0.0, 0
    for (t, j, c), ref in zip(lengths.tolist(), reference.tolist()):
        trunk, bad, good = rows[at:at + t], rows[at + t:at + t + j], rows[at + t + j:at + t + j + c]
        at += t + j + c
        up = BETA * (sum(trunk) + sum(good) - ref[0])
        down = BETA * (sum(trunk) + sum(bad) - ref[1])

        def nls(x):
            return math.log1p(math.exp(-x))
        total += {"spot-bce": lambda: nls(up) + nls(-down),
                  "spot-bco": lambda: nls(up - DELTA) + nls(DELTA - down),
                  "dpo": lambda: nls(up - down), "reward-sft": lambda: nls(up),
                  "sft": lambda: -sum(trunk) - sum(good),
                  "dft": lambda: -sum(math.exp(x) * x for x in trunk + good)}[objective]()
    return total


def named(sums):
    return dict(zip(loss.SUMS, sums.tolist(), strict=True))


# --- the head -------------------------------------------------------------------------------------

@pytest.mark.parametrize("dtype,tolerance", [
    (torch.float64, 1e-15), (torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("at_once", [2**25, 1000, 37])  # 37: one vocabulary entry a block
def test_linear_logps_equals_log_softmax(monkeypatch, dtype, tolerance, at_once):
    monkeypatch.setattr(loss, "LOGITS_AT_ONCE", at_once)
    torch.manual_seed(1)
    h, w = torch.randn(37, 16).to(dtype), torch.randn(101, 16).to(dtype)
    targets, g = torch.randint(0, 101, (37,)), torch.randn(37)
    a, b = h.clone().requires_grad_(), w.clone().requires_grad_()
    out = loss.linear_logps(a, b, targets)
    out.backward(g)
    x, y = h.double().requires_grad_(), w.double().requires_grad_()
    expected = (x @ y.T).log_softmax(-1).gather(1, targets[:, None])[:, 0]
    expected.backward(g.double())
    assert out.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    # rounding moves a logit by at most eps of itself, the logp by at most twice the largest move
    largest = (h.double() @ w.double().T).abs().amax(1)
    assert ((out - expected).abs() <= 2 * torch.finfo(dtype).eps * largest).all()
    for found, wanted in ((a.grad, x.grad), (b.grad, y.grad)):
        assert (found - wanted).abs().max() <= tolerance * 5 * wanted.abs().max()


def test_linear_logps_corners(monkeypatch):
    h, w = torch.zeros(0, 8, requires_grad=True), torch.randn(9, 8, requires_grad=True)
    out = loss.linear_logps(h, w, torch.zeros(0, dtype=torch.int64))
    out.backward(torch.zeros(0))
    assert out.shape == (0,) and h.grad.shape == (0, 8) and not w.grad.any()
    monkeypatch.setattr(loss, "LOGITS_AT_ONCE", 12)  # so that the running maximum moves by 1e4
    w, t = torch.eye(8).requires_grad_(), torch.tensor([0, 7, 2, 5])
    for scale in (1e4, -1e4):
        h = (scale * torch.eye(4, 8)).requires_grad_()
        out = loss.linear_logps(h, w, t)
        expected = (h.double() @ w.double().T).log_softmax(-1).gather(1, t[:, None])[:, 0]
        assert torch.allclose(out.double(), expected, rtol=1e-6, atol=1e-6)
        for found, wanted in zip(*(torch.autograd.grad(x.sum(), (h, w)) for x in (out, expected))):
            assert found.isfinite().all() and torch.allclose(found, wanted, rtol=1e-5, atol=1e-5)


class Largest(TorchDispatchMode):
    """Keeps the number of elements of the largest tensor that an operation returns."""
    size = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor):
            self.size = max(self.size, out.numel())
        return out


def test_the_head_never_holds_full_logits(monkeypatch):
    monkeypatch.setattr(loss, "LOGITS_AT_ONCE", 20_000)
    h, w = torch.randn(100, 2, requires_grad=True), torch.randn(5000, 2, requires_grad=True)
    with Largest() as largest:
        loss.linear_logps(h, w, torch.arange(100)).sum().backward()
    assert largest.size <= 20_000  # full logits: 500,000


# --- sequences and rewards ------------------------------------------------------------------------

@settings(deadline=None, max_examples=50)
@given(st.lists(st.tuples(*[st.integers(0, 5)] * 3), max_size=6), st.integers(0, 99))
def test_sequence_logps_equals_python_sums(lengths, seed):
    shape = torch.tensor(lengths, dtype=torch.int64).view(-1, 3)
    rows = -torch.rand(int(shape.sum()), generator=torch.Generator().manual_seed(seed))
    found, left = loss.sequence_logps(rows, shape), rows.tolist()
    assert torch.equal(found, loss.sequence_logps(rows, shape))
    for (t, j, c), got in zip(lengths, found.tolist()):
        parts = [[left.pop(0) for _ in range(n)] for n in (t, j, c)]
        trunk, bad, good = map(math.fsum, parts)
        assert got == pytest.approx([trunk + good, trunk + bad], abs=1e-12)


def test_tether_and_loss_of_large_rewards():
    r = torch.tensor([-3.0, 0.0, 10.0, 50.0], dtype=torch.float64)
    assert loss.tether(r).tolist() == pytest.approx([1 / (1 + math.exp(x)) for x in r.tolist()])
    assert loss.spot_bce(torch.tensor([-1e4]), torch.tensor([1e4])).item() == 2e4  # no overflow
    # 1 - sigmoid would give 0; abs=0, since approx's own 1e-12 would let 0 pass
    assert loss.tether(r)[3].item() == pytest.approx(math.exp(-50), rel=1e-12, abs=0)


# --- objectives and coefficients ------------------------------------------------------------------

def fake_trainer(**more):
    """What TRL's methods read of a trainer of one process."""
    accelerator = SimpleNamespace(
        device=torch.device("cpu"), num_processes=1, parallelism_config=None,
        gather=lambda x: x, gather_for_metrics=lambda x: x)
    return SimpleNamespace(
        model=SimpleNamespace(training=True), accelerator=accelerator, aux_loss_enabled=False,
        _total_train_tokens=0, _tp_size=1, _metrics=defaultdict(lambda: defaultdict(list)), **more)


def trl_loss_and_gradients(kind, rows, lengths, reference):
    """TRL's own DPOTrainer._compute_loss on a fake model that returns our log-probs as its own."""
    trainer = pytest.importorskip("trl").DPOTrainer
    forks, longest = len(lengths), int(lengths.sum(1).max())
    logps = torch.zeros(2 * forks, longest, dtype=torch.float64)
    mask = torch.zeros(2 * forks, longest + 1, dtype=torch.int64)
    at = 0
    for i, (t, j, c) in enumerate(lengths.tolist()):
        trunk, bad, good = rows[at:at + t + j + c].split([t, j, c])
        at += t + j + c
        for k, answer in ((i, torch.cat([trunk, good])), (forks + i, torch.cat([trunk, bad]))):
            logps[k, :len(answer)] = answer
            mask[k, 1:len(answer) + 1] = 1
    logps.requires_grad_()
    nothing = torch.zeros(2 * forks, longest)
    outputs = SimpleNamespace(log_probs=logps, entropy=nothing, mean_logits=nothing,
                              is_top1=nothing.bool())
    fake = fake_trainer(ld_alpha=None, precompute_ref_logps=True, f_divergence_type="reverse_kl",
                        loss_types=[kind], loss_weights=[1.0], use_weighting=False, beta=BETA,
                        label_smoothing=0.0)
    inputs = {"completion_mask": mask, "input_ids": mask, "attention_mask": mask,
              "ref_chosen_logps": reference[:, 0], "ref_rejected_logps": reference[:, 1]}
    value = trainer._compute_loss(fake, lambda **_: outputs, inputs, False)
    value.backward()
    coefficients = []
    for i, (t, j, c) in enumerate(lengths.tolist()):
        good, bad = logps.grad[i], logps.grad[forks + i]
        coefficients += [good[:t] + bad[:t], bad[t:t + j], good[t:t + c]]
    return value.item(), torch.cat(coefficients)


@pytest.mark.parametrize("ours,trls", [("spot-bce", "bco_pair"), ("dpo", "sigmoid")])
def test_loss_and_coefficients_equal_trls_own_code(ours, trls):
    rows, lengths, reference = random_rows()
    value, expected = trl_loss_and_gradients(trls, rows, lengths, reference)
    coefficients, sums = loss.row_coefficients(ours, rows, lengths, reference, BETA)
    assert named(sums)["loss"] / len(lengths) == pytest.approx(value, rel=1e-6)  # TRL sums in fp32
    assert (coefficients / len(lengths) - expected).abs().max() <= 1e-7 * expected.abs().max()


def test_dft_equals_trls_own_code():
    """TRL's own SFTTrainer.compute_loss on a fake model."""
    trainer = pytest.importorskip("trl").SFTTrainer
    rows = (-2 * torch.rand(6, dtype=torch.float64)).requires_grad_()
    nothing = torch.zeros(6)
    outputs = SimpleNamespace(log_probs=rows, entropy=nothing, is_top1=nothing.bool(),
                              aux_loss=None, label_mask=torch.ones(6, dtype=torch.int64))
    fake = fake_trainer(label_smoother=None, compute_loss_func=None, get_tp_size=lambda: 1,
                        args=SimpleNamespace(loss_type="dft", average_tokens_across_devices=False))
    ids = torch.ones(1, 6, dtype=torch.int64)
    inputs = {"input_ids": ids, "labels": ids, "attention_mask": ids}
    value = trainer.compute_loss(fake, lambda **_: outputs, inputs)
    (expected,) = torch.autograd.grad(value, rows)
    mine = loss.dft(rows)
    assert mine.mean().item() == pytest.approx(value.item(), rel=1e-12)
    assert torch.allclose(torch.autograd.grad(mine.mean(), rows)[0], expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("objective", loss.OBJECTIVES)
def test_coefficients_and_loss_equal_closed_forms(objective):
    one_branch = objective not in loss.PAIR_OBJECTIVES
    rows, lengths, reference = random_rows(one_branch=one_branch)
    found, sums = loss.row_coefficients(objective, rows, lengths, reference, BETA, DELTA)
    expected = summed_loss(objective, rows.tolist(), lengths, reference)
    assert named(sums)["loss"] == pytest.approx(expected, rel=1e-12)
    up, down = (BETA * (loss.sequence_logps(rows, lengths) - reference)).unbind(1)
    sigma = torch.sigmoid
    plus, minus = {
        "spot-bce": (-BETA * (1 - sigma(up)), BETA * sigma(down)),
        "spot-bco": (-BETA * (1 - sigma(up - DELTA)), BETA * sigma(down - DELTA)),
        "dpo": (-BETA * (1 - sigma(up - down)), BETA * (1 - sigma(up - down))),
        "reward-sft": (-BETA * (1 - sigma(up)), 0 * up),
    }.get(objective, (-torch.ones_like(up), 0 * up))
    closed = torch.stack([plus + minus, minus, plus], 1).flatten()
    closed = closed.repeat_interleave(lengths.flatten())
    if objective == "dft":
        closed = closed * rows.exp()
    assert (found - closed).abs().max() <= 1e-12


def test_wrong_objectives_are_refused():
    rows, lengths, reference = random_rows(one_branch=True)
    with pytest.raises(ValueError, match="one of .*'spot-bce'.* found 'ppo'"):
        loss.row_coefficients("ppo", rows, lengths, reference, BETA)
    with pytest.raises(ValueError, match="dpo needs a rejected answer"):
        loss.row_coefficients("dpo", rows, lengths, reference, BETA)


# --- delta and diagnostics ------------------------------------------------------------------------

def test_delta_by_hand():
    assert loss.update_delta(0.0, 2.0, 8, 0) == pytest.approx(0.2)
    assert loss.update_delta(0.2, -1.0, 8, 8) == pytest.approx(0.08)
    values, delta, seen = [[1.0, 2.0, 6.0], [4.0], [-3.0, 5.0]], 0.0, 0
    for batch in values:
        delta = loss.update_delta(delta, sum(batch) / len(batch), len(batch), seen, "cumulative")
        seen += len(batch)
    assert delta == pytest.approx(sum(sum(values, [])) / 6)


def test_diagnose_and_average_by_hand():
    lengths = torch.tensor([[1, 1, 2], [2, 0, 1]])  # the second has no y-: its 9.0 must not count
    r = torch.tensor([[1.0, -3.0], [-2.0, 9.0]], dtype=torch.float64)
    coefficients = torch.tensor([-0.5, 7.0, 7.0, 7.0, 0.25, 0.75, 7.0])
    sums = loss.diagnose(torch.tensor(3.0), r, 0.0, coefficients, lengths)

    def sigma(x):
        return 1 / (1 + math.exp(-x))
    expected = dict(
        loss=3.0, reward_chosen=-1.0, reward_rejected=-3.0, margin=4.0, accuracy=1.0,
        tether_chosen=sigma(-1) + sigma(2), tether_rejected=sigma(-3), trunk_coef=1.5,
        abs_reward=6.0, examples=2.0, pairs=1.0, chosen_tokens=6.0, trunk_rows=3.0)
    assert named(sums) == pytest.approx(expected, rel=1e-12)
    mean = loss.average(sums.tolist(), "reward-sft")
    assert mean == pytest.approx(dict(
        loss=1.5, reward_chosen=-0.5, reward_rejected=-3.0, margin=4.0, accuracy=1.0,
        tether_chosen=(sigma(-1) + sigma(2)) / 2, tether_rejected=sigma(-3), trunk_coef=0.5))
    assert loss.average(sums.tolist(), "sft")["loss"] == 0.5  # over tokens of y+
    alone = loss.diagnose(torch.tensor(1.0), r[1:], 0.0, coefficients[4:], lengths[1:])
    for name in ("reward_rejected", "margin", "accuracy", "tether_rejected"):
        assert loss.average(alone.tolist(), "reward-sft")[name] is None
