"""loss.py against TRL's own code, closed forms, finite differences and brute force."""

import math
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import loss

BETA, DELTA = 0.1, 0.37


def random_rows(forks=5, seed=0, one_branch=False):
    """Log-probs, lengths and reference sums of random forks; the first has an empty trunk response."""
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
                  "sft": lambda: -sum(trunk) - sum(good), "dft": lambda: -sum(
                      math.exp(x) * x for x in trunk + good)}[objective]()
    return total


def named(sums):
    """{name: value} of diagnose's sums."""
    return dict(zip(loss.SUMS, sums.tolist(), strict=True))


# --- the head -------------------------------------------------------------------------------------


@pytest.mark.parametrize("at_once", [2**25, 40, 7])
def test_linear_logps_passes_gradcheck(monkeypatch, at_once):
    monkeypatch.setattr(loss, "LOGITS_AT_ONCE", at_once)  # 7 / 5 rows: one vocabulary entry a block
    torch.manual_seed(0)
    h, w = (torch.randn(n, 4, dtype=torch.float64, requires_grad=True) for n in (5, 11))
    targets = torch.tensor([0, 10, 3, 3, 7])
    assert torch.autograd.gradcheck(lambda h, w: loss.linear_logps(h, w, targets), (h, w))


@pytest.mark.parametrize("dtype,tolerance", [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("at_once", [2**25, 1000])
def test_linear_logps_equals_log_softmax_in_value_and_both_gradients(monkeypatch, dtype, tolerance, at_once):
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
    assert out.dtype == torch.float32
    # bf16 logits of size 10 have a grid of 1/16 before softmax: the value's tolerance is absolute there
    assert (out - expected).abs().max() <= (1e-5 if dtype == torch.float32 else 0.1)
    for found, wanted in ((a.grad, x.grad), (b.grad, y.grad)):
        assert (found - wanted).abs().max() <= tolerance * 5 * wanted.abs().max()


def test_linear_logps_corners():
    h, w = torch.zeros(0, 8, requires_grad=True), torch.randn(9, 8, requires_grad=True)
    out = loss.linear_logps(h, w, torch.zeros(0, dtype=torch.int64))
    out.backward(torch.zeros(0))
    assert out.shape == (0,) and h.grad.shape == (0, 8) and w.grad.shape == (9, 8) and not w.grad.any()
    sure = loss.linear_logps(1e4 * torch.eye(8), torch.eye(8), torch.arange(8))  # a perfect predictor
    assert torch.equal(sure, torch.zeros(8))
    assert loss.linear_logps(1e4 * torch.eye(8), torch.eye(8), torch.arange(8).flip(0)).tolist() == [-1e4] * 8
    for bad in ((torch.randn(3, 7), torch.arange(3)), (torch.randn(3, 8).half(), torch.arange(3)),
                (torch.randn(3, 8), torch.arange(4)), (torch.randn(3, 8), torch.arange(3).int())):
        with pytest.raises(ValueError):
            loss.linear_logps(bad[0], w, bad[1])


def test_linear_logps_bf16_is_as_exact_as_rounded_logits_allow():
    torch.manual_seed(2)
    h, w, t = torch.randn(9, 16).bfloat16(), torch.randn(23, 16).bfloat16(), torch.randint(0, 23, (9,))
    logits = h.double() @ w.double().T
    exact = logits.log_softmax(-1).gather(1, t[:, None])[:, 0]
    # rounding moves a logit by at most 2^-8 of itself; the logp by at most twice the largest such move
    assert ((loss.linear_logps(h, w, t) - exact).abs() <= 2 * 2**-8 * logits.abs().amax(1)).all()


def test_linear_logps_extremes_are_finite_with_finite_gradients(monkeypatch):
    monkeypatch.setattr(loss, "LOGITS_AT_ONCE", 12)  # so that the running maximum has to move by 1e4
    w = torch.eye(8).requires_grad_()
    for scale in (1e4, -1e4):
        h = (scale * torch.eye(4, 8)).requires_grad_()
        out = loss.linear_logps(h, w, torch.tensor([0, 7, 2, 5]))
        expected = (h.double() @ w.double().T).log_softmax(-1).gather(1, torch.tensor([[0], [7], [2], [5]]))
        assert torch.allclose(out.double(), expected[:, 0], rtol=1e-6, atol=1e-6)
        for found, wanted in zip(*(torch.autograd.grad(x.sum(), (h, w)) for x in (out, expected))):
            assert found.isfinite().all() and torch.allclose(found, wanted, rtol=1e-5, atol=1e-5)


def test_linear_logps_where_every_logit_is_far_below_0():
    out = loss.linear_logps(torch.full((2, 1), -1e4), torch.ones(8, 1), torch.tensor([0, 7]))
    assert out.tolist() == pytest.approx([-math.log(8)] * 2, abs=2e-3)  # fp32's grid at 1e4 is 1e-3


# The warm-up is tiny, so that the peak before is what is held before; a warm-up on the full weight would
# raise that baseline by weights which are freed again, and hide as much of the head's own temporaries.
MEMORY = """
import resource, sys, torch, loss
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
R, V, D = map(int, sys.argv[1:])
a, b = torch.randn(64, D, requires_grad=True), torch.randn(64, D, requires_grad=True)
loss.linear_logps(a, b, torch.arange(64)).sum().backward()
h, t = torch.randn(R, D).requires_grad_(), torch.randint(0, V, (R,))
w = torch.randn(V, D).div_(D**0.5).requires_grad_()  # larger logits: all is denormal, and slow
start = peak()
loss.linear_logps(h, w, t).sum().backward()
print(peak() - start - 4 * (h.numel() + w.numel()))  # the two gradients are results, not temporaries
"""


@pytest.mark.slow
def test_head_memory_is_ten_times_below_full_logits():
    rows, vocab, width = 8192, 151936, 512
    done = subprocess.run([sys.executable, "-c", MEMORY, str(rows), str(vocab), str(width)],
                          capture_output=True, text=True, check=True, cwd=Path(loss.__file__).parent)
    extra, full = int(done.stdout), rows * vocab * 4
    print(f"peak beyond gradients: {extra / 1e6:.0f} MB, full fp32 logits: {full / 1e6:.0f} MB")
    assert 0 < extra and extra * 10 <= full  # below 0 the measure itself would be broken


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


def test_sequence_logps_refuses_what_does_not_add_up():
    with pytest.raises(ValueError, match="add up to 6, found 5"):
        loss.sequence_logps(torch.zeros(5), torch.tensor([[1, 2, 3]]))
    with pytest.raises(ValueError, match="shape"):
        loss.sequence_logps(torch.zeros(5), torch.tensor([2, 3]))


def test_tether():
    r = torch.tensor([-3.0, 0.0, 10.0, 50.0], dtype=torch.float64)
    assert loss.tether(r).tolist() == pytest.approx([1 / (1 + math.exp(x)) for x in r.tolist()])
    assert loss.tether(r)[1] == 0.5
    assert loss.tether(r)[2] == pytest.approx(4.54e-5, rel=1e-2)
    # 1 - sigmoid would give 0; abs=0, since approx's own 1e-12 would let 0 pass
    assert loss.tether(r)[3].item() == pytest.approx(math.exp(-50), rel=1e-12, abs=0)
    assert torch.equal(loss.tether_rejected(r, DELTA), torch.sigmoid(r - DELTA))


# --- objectives and coefficients ------------------------------------------------------------------


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
    outputs = SimpleNamespace(log_probs=logps, entropy=nothing, mean_logits=nothing, is_top1=nothing.bool())
    same = SimpleNamespace(device=torch.device("cpu"), gather=lambda x: x, gather_for_metrics=lambda x: x)
    fake = SimpleNamespace(
        model=SimpleNamespace(training=True), accelerator=same, aux_loss_enabled=False, ld_alpha=None,
        precompute_ref_logps=True, f_divergence_type="reverse_kl", loss_types=[kind], loss_weights=[1.0],
        use_weighting=False, beta=BETA, label_smoothing=0.0, _total_train_tokens=0, _tp_size=1,
        _metrics=defaultdict(lambda: defaultdict(list)))
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
    assert named(sums)["loss"] / len(lengths) == pytest.approx(value, rel=1e-6)  # TRL sums the loss in fp32
    assert (coefficients / len(lengths) - expected).abs().max() <= 1e-7 * expected.abs().max()


@pytest.mark.parametrize("ours,trls", [("spot-bce", "bco_pair"), ("dpo", "sigmoid")])
def test_each_examples_loss_equals_trls_own_code(ours, trls):
    rows, lengths, reference = random_rows()
    up, down = loss.rewards(loss.sequence_logps(rows, lengths), reference, BETA).unbind(1)
    found = {"spot-bce": loss.spot_bce, "dpo": loss.dpo}[ours](up, down)
    ends = lengths.sum(1).cumsum(0).tolist()
    for i, (start, end) in enumerate(zip([0, *ends], ends)):  # one fork a call: TRL's mean is its loss
        value, _ = trl_loss_and_gradients(trls, rows[start:end], lengths[i:i + 1], reference[i:i + 1])
        assert found[i].item() == pytest.approx(value, rel=1e-6)


def test_dft_equals_trls_own_code():
    """TRL's own SFTTrainer.compute_loss on a fake model; its outputs are zero on ignored positions."""
    trainer = pytest.importorskip("trl").SFTTrainer
    rows = (-2 * torch.rand(6, dtype=torch.float64)).requires_grad_()
    nothing = torch.zeros(6)
    outputs = SimpleNamespace(log_probs=rows, entropy=nothing, is_top1=nothing.bool(), aux_loss=None,
                              label_mask=torch.ones(6, dtype=torch.int64))
    same = SimpleNamespace(device=torch.device("cpu"), num_processes=1, parallelism_config=None,
                           gather_for_metrics=lambda x: x)
    fake = SimpleNamespace(
        model=SimpleNamespace(training=True), accelerator=same, aux_loss_enabled=False, label_smoother=None,
        compute_loss_func=None, args=SimpleNamespace(loss_type="dft", average_tokens_across_devices=False),
        _total_train_tokens=0, _tp_size=1, get_tp_size=lambda: 1, _metrics=defaultdict(
            lambda: defaultdict(list)))
    ids = torch.ones(1, 6, dtype=torch.int64)
    inputs = {"input_ids": ids, "labels": ids, "attention_mask": ids}
    value = trainer.compute_loss(fake, lambda **_: outputs, inputs)
    (expected,) = torch.autograd.grad(value, rows)
    mine = loss.dft(rows)
    assert mine.mean().item() == pytest.approx(value.item(), rel=1e-12)
    assert torch.allclose(torch.autograd.grad(mine.mean(), rows)[0], expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("objective", ["reward-sft", "sft", "dft"])
def test_chosen_only_forks_equal_closed_forms(objective):
    lengths = torch.tensor([[2, 0, 1], [0, 0, 3]])
    rows = torch.tensor([-0.1, -0.5, -2.0, -0.3, -1.0, -0.2], dtype=torch.float64)
    reference = torch.tensor([[-4.6, -1.0], [-0.5, 0.0]], dtype=torch.float64)
    found, sums = loss.row_coefficients(objective, rows, lengths, reference, BETA)
    up = [0.1 * (-2.6 + 4.6), 0.1 * (-1.5 + 0.5)]
    tied = [-BETA / (1 + math.exp(r)) for r in up]
    expected = {"reward-sft": [tied[0]] * 3 + [tied[1]] * 3, "sft": [-1.0] * 6,
                "dft": [-math.exp(x) for x in rows.tolist()]}[objective]
    assert found.tolist() == pytest.approx(expected, rel=1e-12)
    mean = loss.average(sums.tolist(), objective)
    by_hand = {"reward-sft": sum(math.log1p(math.exp(-r)) for r in up) / 2, "sft": 4.1 / 6,
               "dft": sum(-math.exp(x) * x for x in rows.tolist()) / 6}[objective]
    assert mean["loss"] == pytest.approx(by_hand, rel=1e-12)
    assert all(mean[k] is None for k in ("reward_rejected", "margin", "accuracy", "tether_rejected"))
    assert named(sums)["pairs"] == 0


@pytest.mark.parametrize("objective", loss.OBJECTIVES)
def test_coefficients_equal_closed_forms_and_finite_differences(objective):
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
        "reward-sft": (-BETA * (1 - sigma(up)), 0 * up)}.get(objective, (-torch.ones_like(up), 0 * up))
    closed = torch.stack([plus + minus, minus, plus], 1).flatten().repeat_interleave(lengths.flatten())
    if objective == "dft":
        closed = closed * rows.exp()
    assert (found - closed).abs().max() <= 1e-12
    if objective == "dft":  # its weight is a stop-gradient: by differences of SFT, weighted at the centre
        objective, found = "sft", found / rows.exp()
    for i in range(len(rows)):
        two = []
        for step in (1e-4, -1e-4):
            moved = rows.clone()
            moved[i] += step
            two.append(summed_loss(objective, moved.tolist(), lengths, reference))
        assert found[i].item() == pytest.approx((two[0] - two[1]) / 2e-4, abs=1e-7)


def test_step_0_is_exact():
    rows, lengths, _ = random_rows(forks=32)
    rows = rows.float()
    reference = loss.sequence_logps(rows, lengths)
    for objective in ("spot-bce", "spot-bco", "dpo"):
        coefficients, sums = loss.row_coefficients(objective, rows, lengths, reference, BETA)
        mean = loss.average(sums.tolist(), objective)
        assert named(sums)["abs_reward"] == 0 and mean["trunk_coef"] == 0
        assert mean["tether_chosen"] == mean["tether_rejected"] == 0.5
        expected = math.log(2) * (1 if objective == "dpo" else 2)
        assert torch.tensor(mean["loss"]).float() == torch.tensor(expected).float()
        assert set(coefficients.tolist()) == {0.0, *torch.tensor([0.05, -0.05]).tolist()}


def test_small_tensors_need_no_model():
    r = torch.zeros(2)
    assert torch.equal(loss.spot_bce(r, r), torch.full((2,), 2 * math.log(2)))
    assert torch.equal(loss.dpo(r, r), torch.full((2,), math.log(2)))
    assert loss.spot_bce(torch.tensor([-1e4]), torch.tensor([1e4])).item() == 2e4  # no overflow


def test_wrong_objectives_are_refused():
    rows, lengths, reference = random_rows(one_branch=True)
    with pytest.raises(ValueError, match="one of spot-bce"):
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
    with pytest.raises(ValueError, match="cumulative"):
        loss.update_delta(0.0, 0.0, 1, 0, "mean")


def test_diagnose_and_average_by_hand():
    lengths = torch.tensor([[1, 1, 2], [2, 0, 1]])  # the second fork has no y-: its 9.0 must not count
    r = torch.tensor([[1.0, -3.0], [-2.0, 9.0]], dtype=torch.float64)
    coefficients = torch.tensor([-0.5, 7.0, 7.0, 7.0, 0.25, 0.75, 7.0])
    sums = loss.diagnose(torch.tensor(3.0), r, 0.0, coefficients, lengths)

    def sigma(x):
        return 1 / (1 + math.exp(-x))
    expected = dict(
        loss=3.0, reward_chosen=-1.0, reward_rejected=-3.0, margin=4.0, accuracy=1.0,
        tether_chosen=sigma(-1) + sigma(2), tether_rejected=sigma(-3), trunk_coef=1.5, abs_reward=6.0,
        examples=2.0, pairs=1.0, chosen_tokens=6.0, trunk_rows=3.0)
    assert named(sums) == pytest.approx(expected, rel=1e-12)
    mean = loss.average(sums.tolist(), "reward-sft")
    assert mean == pytest.approx(dict(
        loss=1.5, reward_chosen=-0.5, reward_rejected=-3.0, margin=4.0, accuracy=1.0,
        tether_chosen=(sigma(-1) + sigma(2)) / 2, tether_rejected=sigma(-3), trunk_coef=0.5), rel=1e-12)
    assert loss.average(sums.tolist(), "sft")["loss"] == 0.5  # over tokens of y+


def test_diagnostics_by_brute_force_and_additive():
    rows, lengths, reference = random_rows(one_branch=True)
    coefficients, whole = loss.row_coefficients("reward-sft", rows, lengths, reference, BETA)
    up, down = (BETA * (loss.sequence_logps(rows, lengths) - reference)).T.tolist()
    pairs = [i for i in range(5) if lengths[i, 1]]
    mean = loss.average(whole.tolist(), "reward-sft")

    def over(values, count):
        return pytest.approx(sum(values) / count)
    assert len(pairs) == 4
    assert mean["reward_chosen"] == over(up, 5)
    assert mean["reward_rejected"] == over([down[i] for i in pairs], 4)
    assert mean["margin"] == over([up[i] - down[i] for i in pairs], 4)
    assert mean["accuracy"] == sum(up[i] > down[i] for i in pairs) / 4
    assert mean["tether_chosen"] == over([1 / (1 + math.exp(x)) for x in up], 5)
    assert mean["tether_rejected"] == over([1 / (1 + math.exp(-down[i])) for i in pairs], 4)
    trunk, at = [], 0
    for t, j, c in lengths.tolist():
        trunk += coefficients[at:at + t].abs().tolist()
        at += t + j + c
    assert mean["trunk_coef"] == over(trunk, len(trunk))
    assert named(whole)["chosen_tokens"] == lengths[:, [0, 2]].sum()
    cut = int(lengths[:2].sum())
    parts = [loss.row_coefficients("reward-sft", rows[s], lengths[f], reference[f], BETA)[1]
             for s, f in ((slice(cut), slice(2)), (slice(cut, None), slice(2, None)))]
    assert (parts[0] + parts[1]).tolist() == pytest.approx(whole.tolist())
