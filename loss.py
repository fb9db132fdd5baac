"""The mathematics of Surgical Post-Training (SPoT): from log-probs to one coefficient per token.

The method in four lines (Lin & Han, arXiv 2603.01683; sigma is the logistic function):
    r      = beta * (log pi_theta(y|x) - log pi_ref(y|x))       the implicit reward
    L      = -log sigma(r+ - delta) - log sigma(-(r- - delta))  delta = 0: SPoT-BCE
    lambda = 1 - sigma(r+ - delta)                              the elastic tether
    dL/d log pi(y+) = -beta * lambda                            fades as a pair is learned
y+ is the chosen answer, y- the rejected one. The six objectives differ in the coefficient
c = dL/d log pi that a sequence (sft, dft: a token) gets, and in nothing else:

    objective            c+ (chosen)                     c- (rejected)
    spot-bce, spot-bco   -beta (1 - sigma(r+ - delta))   beta sigma(r- - delta)
    dpo                  -beta (1 - sigma(r+ - r-))      -c+
    reward-sft           -beta (1 - sigma(r+))           0
    sft; dft             -1; -pi(token)                  0
Rows of the shared trunk belong to both and get c+ + c-: 0 under spot-bce at r+ = r- = 0, always 0
under dpo. A new objective is a function beside `dpo`, its name in OBJECTIVES (and the two tuples
there), and a branch in row_coefficients: --loss then knows it.

Shapes: R scored rows (tokens whose log-prob counts), F forks (a pair of answers as a shared trunk
and two branches), V vocabulary, D hidden width.
"""

import math

import torch
import torch.nn.functional as F

LOGITS_AT_ONCE = 2**21  # elements of the head's largest temporary: 8 MiB, a CPU's cache
GPU_FACTOR = 16  # times as many on a GPU


# --- log-probabilities of rows and of sequences ---------------------------------------------------

class _LinearLogps(torch.autograd.Function):
    """Both passes walk over blocks of the vocabulary, not of the rows: each block of the weight is
    read once, and its gradient is one product over all rows."""

    @staticmethod
    def forward(ctx, hidden, weight, targets):
        wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        # An online logsumexp: the running maximum of a row, the sum of exp(logit - top) so far.
        top = torch.full(targets.shape, -math.inf, dtype=wide, device=hidden.device)
        total = torch.zeros_like(top)
        picked = torch.zeros_like(top)  # the target's logit, from the same GEMM as the normaliser
        for start, end, inside, column in _vocabulary_blocks(weight, targets):
            logits = (hidden @ weight[start:end].T).to(wide)
            picked = torch.where(inside, logits.gather(1, column).squeeze(1), picked)
            new_top = torch.maximum(top, logits.amax(1))
            total = total * (top - new_top).exp_() + logits.sub_(new_top[:, None]).exp_().sum(1)
            top = new_top
            del logits  # else it lives on while the next block is computed, and doubles the peak
        logsumexp = top + total.log()
        ctx.save_for_backward(hidden, weight, targets, logsumexp)
        return picked - logsumexp

    @staticmethod
    def backward(ctx, grad):
        hidden, weight, targets, logsumexp = ctx.saved_tensors
        grad_hidden = torch.zeros_like(hidden, dtype=logsumexp.dtype)
        grad_weight = torch.empty_like(weight)
        for start, end, inside, column in _vocabulary_blocks(weight, targets):
            logits = (hidden @ weight[start:end].T).to(logsumexp.dtype)
            grad_logits = logits.sub_(logsumexp[:, None]).exp_().mul_(-grad[:, None])
            # So far -g * softmax; g is added in the target's column.
            at_target = grad_logits.gather(1, column) + torch.where(inside, grad, 0.0)[:, None]
            grad_logits.scatter_(1, column, at_target)  # one entry a row: no atomics, deterministic
            grad_logits = grad_logits.to(hidden.dtype)
            torch.mm(grad_logits.T, hidden, out=grad_weight[start:end])
            if grad_hidden.dtype == hidden.dtype:
                grad_hidden.addmm_(grad_logits, weight[start:end])
            else:  # summed over blocks in fp32 even where the products are bf16
                grad_hidden += grad_logits @ weight[start:end]
            del logits, grad_logits
        return grad_hidden.to(hidden.dtype), grad_weight, None


def _vocabulary_blocks(weight, targets):
    """(start, end, which targets lie inside (R,), their columns in the block (R, 1)) of blocks."""
    step = max(1, LOGITS_AT_ONCE * (GPU_FACTOR if weight.is_cuda else 1) // max(1, len(targets)))
    if step > 128:  # products of ragged width are slower, by 5-8 % on a CPU
        step = step // 128 * 128
    for start in range(0, len(weight), step):
        end = min(start + step, len(weight))
        inside = (targets >= start) & (targets < end)
        yield start, end, inside, (targets - start).clamp(0, end - start - 1)[:, None]


def linear_logps(hidden, weight, targets):
    """log softmax(hidden @ weight.T) at `targets`, without ever holding the (R, V) logits.

    hidden  (R, D) fp32, bf16, fp16 or fp64; R = 0 is allowed
    weight  (V, D) same dtype; products are in it, sums in fp32
    targets (R,)   int64 in 0..V-1, not checked: a GPU would have to be waited for
    returns (R,)   log-probs in nats, fp32 (fp64 for fp64), differentiable in both factors
    """
    return _LinearLogps.apply(hidden, weight, targets)


def sequence_logps(row_logps, lengths):
    """log pi(y|x) of both answers of every fork.

    row_logps (R,)   in nats, fork by fork, each in the order trunk, rejected, chosen
    lengths   (F, 3) int64, how many rows each of the three has
    returns   (F, 2) fp64, chosen and rejected; without y- the second means nothing

    Summed in fp64, in a fixed order, without atomics: at step 0 rewards are exactly 0.
    """
    sums = row_logps.double()
    if len(lengths):
        sums = torch.segment_reduce(sums, "sum", lengths=lengths.flatten(), unsafe=lengths.is_cuda)
    trunk, rejected, chosen = sums.view(-1, 3).unbind(1)
    return torch.stack([trunk + chosen, trunk + rejected], 1)


# --- the objectives: tensors to losses in nats, elementwise ---------------------------------------

def tether(rewards, delta=0.0):
    """lambda of rewards r+: 1/2 where r+ = delta, to 0 as r+ grows."""
    return torch.sigmoid(delta - rewards)  # no cancellation: r = 50 gives 1.9e-22, not 0


def spot_bce(chosen, rejected):
    """SPoT-BCE, the default. At r = 0: 2 ln 2."""
    return -F.logsigmoid(chosen) - F.logsigmoid(-rejected)


def spot_bco(chosen, rejected, delta):
    """SPoT-BCO; delta: see update_delta."""
    return -F.logsigmoid(chosen - delta) - F.logsigmoid(delta - rejected)


def dpo(chosen, rejected):
    """DPO (arXiv 2305.18290, eq. 7)."""
    return -F.logsigmoid(chosen - rejected)


def reward_sft(chosen):
    """Reward-SFT: SPoT without y-."""
    return -F.logsigmoid(chosen)


def sft(logps):
    """SFT on y+ ("SFT+" on rectified answers)."""
    return -logps


def dft(logps):
    """DFT (arXiv 2508.05629); its weight pi has no gradient."""
    return -logps.detach().exp() * logps


OBJECTIVES = ("spot-bce", "spot-bco", "dpo", "reward-sft", "sft", "dft")
PAIR_OBJECTIVES = ("spot-bce", "spot-bco", "dpo")  # these need a rejected answer
TOKEN_OBJECTIVES = ("sft", "dft")  # these divide by tokens of y+, the others by examples


def row_coefficients(objective, row_logps, lengths, reference, beta, delta=0.0):
    """One coefficient a scored row, dL/d row_logps, L the sum of all losses. The backward pass then
    is `row_logps.backward(coefficients / count)`, count: examples (or y+ tokens) of all ranks.

    row_logps, lengths  as for sequence_logps; the graph, if any, is not touched
    reference (F, 2)    fp64: sequence_logps before training
    beta, delta         reward scale; the running mean, 0 but for spot-bco
    returns             coefficients (R,), dtype of row_logps, and `diagnose`'s sums

    Raises ValueError: unknown objective, y- missing (on a GPU not checked).
    """
    if objective in PAIR_OBJECTIVES and not lengths.is_cuda and (lengths[:, 1] == 0).any():
        raise ValueError(f"{objective} needs a rejected answer in every fork")
    leaf = row_logps.detach().requires_grad_()
    with torch.enable_grad():
        r = beta * (sequence_logps(leaf, lengths) - reference)
        chosen, rejected = r.unbind(1)
        if objective == "spot-bce":
            losses = spot_bce(chosen, rejected)
        elif objective == "spot-bco":
            losses = spot_bco(chosen, rejected, delta)
        elif objective == "dpo":
            losses = dpo(chosen, rejected)
        elif objective == "reward-sft":
            losses = reward_sft(chosen)
        elif objective in TOKEN_OBJECTIVES:  # where a row is of y-, log p = 0: no loss
            logps = torch.where(row_parts(lengths, len(leaf)) == 1, 0.0, leaf.double())
            losses = sft(logps) if objective == "sft" else dft(logps)
        else:
            raise ValueError(f"objective: one of {OBJECTIVES} expected, found {objective!r}")
        loss = losses.sum()
        (coefficients,) = torch.autograd.grad(loss, leaf)
    return coefficients, diagnose(loss.detach(), r.detach(), delta, coefficients, lengths)


def row_parts(lengths, rows: int):
    """(rows,) int64: 0 for rows of the trunk, 1 of the rejected branch, 2 of the chosen one."""
    parts = torch.arange(3 * len(lengths), device=lengths.device) % 3
    return parts.repeat_interleave(lengths.flatten(), output_size=rows)  # a GPU need not wait


# --- the running mean delta, and diagnostics ------------------------------------------------------

def update_delta(delta, batch_mean, batch_pairs, seen_pairs, kind="ema") -> float:
    """delta for the next step, from this step's global batch. Step 0 has 0, the true mean there.

    batch_mean  mean of (r+ + r-)/2 over the batch; seen_pairs: pairs of all steps before it
    kind        "ema": the paper's; "cumulative": the mean of all pairs so far, as in TRL 0.20
    """
    if kind == "ema":
        return 0.9 * delta + 0.1 * batch_mean
    return (delta * seen_pairs + batch_mean * batch_pairs) / (seen_pairs + batch_pairs)


COUNT_OF = {  # what each sum is divided by; pairs are the examples with y-
    "loss": "examples", "reward_chosen": "examples", "reward_rejected": "pairs", "margin": "pairs",
    "accuracy": "pairs", "tether_chosen": "examples", "tether_rejected": "pairs",
    "trunk_coef": "trunk_rows"}
SUMS = (*COUNT_OF, "abs_reward", "examples", "pairs", "chosen_tokens", "trunk_rows")


def diagnose(loss, r, delta, coefficients, lengths):
    """(len(SUMS),) fp64 sums over the forks of a pack, in the order of SUMS; r (F, 2) rewards."""
    chosen, rejected = r.unbind(1)
    pair = lengths[:, 1] > 0  # has y-, which ends in <|im_end|>; r[pair] would wait for a GPU
    on_trunk = row_parts(lengths, len(coefficients)) == 0
    sums = {
        "loss": loss,
        "reward_chosen": chosen.sum(),
        "reward_rejected": (rejected * pair).sum(),
        "margin": ((chosen - rejected) * pair).sum(),
        "accuracy": ((chosen > rejected) & pair).sum(),
        "tether_chosen": tether(chosen, delta).sum(),
        "tether_rejected": (torch.sigmoid(rejected - delta) * pair).sum(),
        "trunk_coef": (coefficients.double().abs() * on_trunk).sum(),
        "abs_reward": chosen.abs().sum() + (rejected.abs() * pair).sum(),
        "examples": r.new_full((), len(r)),
        "pairs": pair.sum(),
        "chosen_tokens": lengths.sum() - lengths[:, 1].sum(),
        "trunk_rows": on_trunk.sum(),
    }
    return torch.stack([sums[name].double() for name in SUMS])


def average(sums, objective: str) -> dict:
    """A step's metrics from its global sums in the order of SUMS; None where the count is 0.

    loss is in nats per example (sft, dft: per y+ token), margin r+ - r-, accuracy the share of
    pairs where that is above 0, tether_rejected sigma(r- - delta), trunk_coef the mean
    |coefficient| of a trunk row before the division by the batch.
    """
    sums, metrics = dict(zip(SUMS, sums)), {}
    for name, count in COUNT_OF.items():
        metrics[name] = sums[name] / sums[count] if sums[count] else None
    if objective in TOKEN_OBJECTIVES:
        metrics["loss"] = sums["loss"] / sums["chosen_tokens"]
    return metrics
