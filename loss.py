"""The mathematics of Surgical Post-Training (SPoT): from log-probs to one coefficient per token.

Comes in:  hidden states, log-probabilities, rewards: plain tensors. This file imports torch alone.
Goes out:  tensors. Import only this file to unit-test the method without a model.

The method in four lines (Lin & Han, arXiv 2603.01683; sigma is the logistic function):
    r      = beta * (log pi_theta(y|x) - log pi_ref(y|x))                    the implicit reward
    L      = -log sigma(r+ - delta) - log sigma(-(r- - delta))               delta = 0: SPoT-BCE
    lambda = 1 - sigma(r+ - delta)                                           the elastic tether
    dL/d log pi(y+) = -beta * lambda                                 it fades as a pair is learned
y+ is the chosen answer, y- the rejected one, r+ and r- are their rewards. All six objectives give
one coefficient c = dL/d log pi a sequence (sft, dft: a token), and differ in nothing else:

    objective            c+ (chosen)                        c- (rejected)
    spot-bce, spot-bco   -beta (1 - sigma(r+ - delta))      beta sigma(r- - delta)
    dpo                  -beta (1 - sigma(r+ - r-))         -c+
    reward-sft           -beta (1 - sigma(r+))              0
    sft, dft             -1, -pi(token)                     0
Rows of the shared trunk belong to both sequences and get c+ + c-: 0 under spot-bce at r+ = r- = 0,
always 0 under dpo.

Shapes: R scored rows (a row is one token whose log-prob counts), F forks (one fork is one pair of
answers laid out as a shared trunk and two branches), V vocabulary, D hidden width.
"""

import math

import torch
import torch.nn.functional as F

# Elements of the head's largest temporary. On a CPU: 8 MiB in fp32, which stay in cache; on a GPU
# GPU_FACTOR times as many, for fewer and larger products.
LOGITS_AT_ONCE = 2**21
GPU_FACTOR = 16


# --- log-probabilities without logits -------------------------------------------------------------


class _LinearLogps(torch.autograd.Function):
    """See linear_logps. Both passes walk over blocks of the *vocabulary*, not of the rows: each
    block of the weight is read once, and its gradient is one product over all rows."""

    @staticmethod
    def forward(ctx, hidden, weight, targets):
        wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        top = torch.full(targets.shape, -math.inf, dtype=wide, device=hidden.device)  # row maximum
        total = torch.zeros_like(top)  # sum of exp(logit - top) so far
        picked = torch.zeros_like(top)  # the target's logit, from the same GEMM as the normaliser
        for start, end in _vocabulary_blocks(weight, targets):
            logits = (hidden @ weight[start:end].T).to(wide)
            inside, column = _locate(targets, start, end)
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
        need_hidden, need_weight = ctx.needs_input_grad[:2]
        # A row's logits have the gradient g * (onehot(target) - softmax).
        grad_hidden = torch.zeros_like(hidden, dtype=logsumexp.dtype) if need_hidden else None
        grad_weight = torch.empty_like(weight) if need_weight else None
        for start, end in _vocabulary_blocks(weight, targets):
            logits = (hidden @ weight[start:end].T).to(logsumexp.dtype)
            grad_logits = logits.sub_(logsumexp[:, None]).exp_().mul_(-grad[:, None])
            inside, column = _locate(targets, start, end)
            at_target = grad_logits.gather(1, column) + torch.where(inside, grad, 0.0)[:, None]
            grad_logits.scatter_(1, column, at_target)  # one entry a row: no atomics, deterministic
            grad_logits = grad_logits.to(hidden.dtype)
            if need_weight:
                torch.mm(grad_logits.T, hidden, out=grad_weight[start:end])
            if need_hidden:  # summed over blocks in fp32 even where the products are bf16
                if grad_hidden.dtype == hidden.dtype:
                    grad_hidden.addmm_(grad_logits, weight[start:end])
                else:
                    grad_hidden += grad_logits @ weight[start:end]
            del logits, grad_logits
        if need_hidden:
            grad_hidden = grad_hidden.to(hidden.dtype)
        return grad_hidden, grad_weight, None


def _vocabulary_blocks(weight, targets):
    """[(start, end), ...] over the rows of the weight."""
    at_once = LOGITS_AT_ONCE * (GPU_FACTOR if weight.is_cuda else 1)
    step = max(1, at_once // max(1, len(targets)))
    if step > 128:  # products of ragged width are slower, by 5-8 % on a CPU
        step = step // 128 * 128
    return [(start, min(start + step, len(weight))) for start in range(0, len(weight), step)]


def _locate(targets, start, end):
    """Which targets lie in vocabulary rows start..end (R,), and their column there (R, 1)."""
    inside = (targets >= start) & (targets < end)
    return inside, (targets - start).clamp(0, end - start - 1)[:, None]


def linear_logps(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """log softmax(hidden @ weight.T) at `targets`, without ever holding the (R, V) logits.

    hidden  (R, D) final hidden states, fp32, bf16, fp16 or fp64; R = 0 is allowed
    weight  (V, D) the head's weight, same dtype
    targets (R,)   int64 token ids in 0..V-1, not checked: on a GPU that would wait for the device
    returns (R,)   log-probs in nats, fp32 (fp64 for fp64 input), differentiable in both factors

    Products are taken in the input's dtype (the tensor cores' fast path); logsumexp and target
    logit come from the same product in fp32. Only the (R,) logsumexp is kept for backward, which
    multiplies again. Raises ValueError where the shapes or dtypes do not fit.
    """
    if hidden.ndim != 2 or weight.ndim != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError("hidden (R, D) and weight (V, D) expected, found "
                         f"{tuple(hidden.shape)} and {tuple(weight.shape)}")
    if targets.shape != hidden.shape[:1] or targets.dtype != torch.int64:
        raise ValueError(f"targets: int64 of shape ({len(hidden)},) expected, found "
                         f"{targets.dtype} of shape {tuple(targets.shape)}")
    if hidden.dtype != weight.dtype:
        raise ValueError(f"hidden is {hidden.dtype}, weight is {weight.dtype}: one dtype expected")
    return _LinearLogps.apply(hidden, weight, targets)


# --- from rows to sequences to rewards ------------------------------------------------------------


def sequence_logps(row_logps: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """log pi(y|x) of both answers of every fork: trunk + chosen branch, trunk + rejected branch.

    row_logps (R,)   in nats, fork by fork, each fork's rows in the order trunk, rejected, chosen
    lengths   (F, 3) int64, how many rows each of the three has; lengths.sum() == R
    returns   (F, 2) fp64, columns chosen and rejected. Without y- the second column is the trunk
                     alone and means nothing: see `paired`.

    Summed in fp64 and in a fixed order (no atomics), so that equal inputs give equal sums: at step
    0 rewards are exactly 0. A sum of thousands of bf16 log-probs would move in steps of 1 nat.
    """
    if lengths.ndim != 2 or lengths.shape[1] != 3:
        raise ValueError(f"lengths: shape (F, 3) expected, found {tuple(lengths.shape)}")
    if not lengths.is_cuda and int(lengths.sum()) != len(row_logps):  # on a GPU it would wait
        raise ValueError(f"lengths add up to {int(lengths.sum())}, found {len(row_logps)} rows")
    sums = row_logps.double()
    if len(lengths):  # unsafe: the lengths are not checked once more
        sums = torch.segment_reduce(sums, "sum", lengths=lengths.flatten(), axis=0, unsafe=True)
    trunk, rejected, chosen = sums.view(-1, 3).unbind(1)
    return torch.stack([trunk + chosen, trunk + rejected], 1)


def paired(lengths: torch.Tensor) -> torch.Tensor:
    """(F,) bool: which forks have y-. It ends in <|im_end|>, so it has at least one row."""
    return lengths[:, 1] > 0


def rewards(policy: torch.Tensor, reference: torch.Tensor, beta: float) -> torch.Tensor:
    """The implicit reward r = beta * (log pi_theta(y|x) - log pi_ref(y|x)), elementwise."""
    return beta * (policy - reference)


def tether(rewards: torch.Tensor, delta: float = 0.0) -> torch.Tensor:
    """lambda+ = 1 - sigma(r+ - delta), elementwise: 1/2 where r+ = delta, to 0 as r+ grows.

    Computed as sigma(delta - r): no cancellation at large r (r = 50 gives 1.9e-22, not 0).
    """
    return torch.sigmoid(delta - rewards)


def tether_rejected(rewards: torch.Tensor, delta: float = 0.0) -> torch.Tensor:
    """lambda- = sigma(r- - delta), elementwise: 1/2 where r- = delta, to 0 as r- falls."""
    return torch.sigmoid(rewards - delta)


# --- the objectives: per-example losses -----------------------------------------------------------
# Each takes small tensors and returns losses of the same shape in nats; nothing is averaged here.
# Autograd gives the coefficients in the table at the top.


def spot_bce(chosen: torch.Tensor, rejected: torch.Tensor) -> torch.Tensor:
    """SPoT-BCE, the default: -log sigma(r+) - log sigma(-r-), (F,) rewards. At r = 0: 2 ln 2."""
    return -F.logsigmoid(chosen) - F.logsigmoid(-rejected)


def spot_bco(chosen: torch.Tensor, rejected: torch.Tensor, delta: float) -> torch.Tensor:
    """SPoT-BCO: -log sigma(r+ - delta) - log sigma(-(r- - delta)), (F,) rewards.

    delta is a running mean of rewards (update_delta), a constant here: not differentiated through.
    """
    return -F.logsigmoid(chosen - delta) - F.logsigmoid(delta - rejected)


def dpo(chosen: torch.Tensor, rejected: torch.Tensor) -> torch.Tensor:
    """DPO (arXiv 2305.18290, eq. 7): -log sigma(r+ - r-), (F,) rewards."""
    return -F.logsigmoid(chosen - rejected)


def reward_sft(chosen: torch.Tensor) -> torch.Tensor:
    """Reward-SFT: -log sigma(r+), (F,) rewards."""
    return -F.logsigmoid(chosen)


def sft(logps: torch.Tensor) -> torch.Tensor:
    """SFT on y+ ("SFT+" on rectified answers): -log pi of each token, (R,)."""
    return -logps


def dft(logps: torch.Tensor) -> torch.Tensor:
    """DFT (arXiv 2508.05629): -sg[pi] log pi of each token, (R,); sg is the stop-gradient."""
    return -logps.detach().exp() * logps


OBJECTIVES = ("spot-bce", "spot-bco", "dpo", "reward-sft", "sft", "dft")
PAIR_OBJECTIVES = ("spot-bce", "spot-bco", "dpo")  # these need a rejected answer
TOKEN_OBJECTIVES = ("sft", "dft")  # these divide by tokens of y+, the others by examples


def row_coefficients(objective: str, row_logps: torch.Tensor, lengths: torch.Tensor,
                     reference: torch.Tensor, beta: float, delta: float = 0.0):
    """One coefficient a scored row, dL/d row_logps.

    objective        one of OBJECTIVES
    row_logps (R,)   the policy's log-probs in nats; its graph, if any, is not touched
    lengths   (F, 3) rows of trunk, rejected, chosen (see sequence_logps)
    reference (F, 2) fp64, sequence_logps of the policy before training
    beta, delta      reward scale; the running mean (used by spot-bco alone)
    returns   (R,)   coefficients of the *summed* loss, dtype of row_logps, and `diagnose`'s sums.
                     Divide by the global number of pairs (or y+ tokens) of the step, then
                     `row_logps.backward(coefficients)` is the whole backward pass.

    The objective is differentiated on detached rewards or log-probs, so the model's graph sees
    nothing but this vector. Raises ValueError for an unknown objective, or for forks without y-
    under a pair objective.
    """
    if objective not in OBJECTIVES:
        raise ValueError(f"objective: one of {', '.join(OBJECTIVES)} expected, found {objective!r}")
    if objective in PAIR_OBJECTIVES and not lengths.is_cuda and not paired(lengths).all():
        raise ValueError(f"{objective} needs a rejected answer in every fork")
    if objective != "spot-bco":
        delta = 0.0
    leaf = row_logps.detach().requires_grad_()
    with torch.enable_grad():
        r = rewards(sequence_logps(leaf, lengths), reference, beta)
        chosen, rejected = r.unbind(1)
        if objective == "spot-bce":
            losses = spot_bce(chosen, rejected)
        elif objective == "spot-bco":
            losses = spot_bco(chosen, rejected, delta)
        elif objective == "dpo":
            losses = dpo(chosen, rejected)
        elif objective == "reward-sft":
            losses = reward_sft(chosen)
        else:
            losses = sft(leaf.double()) if objective == "sft" else dft(leaf.double())
            losses = torch.where(rows_of_chosen(lengths, len(leaf)), losses, 0.0)
        loss = losses.sum()
        (coefficients,) = torch.autograd.grad(loss, leaf)
    return coefficients, diagnose(loss.detach(), r.detach(), delta, coefficients, lengths)


def rows_of_chosen(lengths: torch.Tensor, rows: int) -> torch.Tensor:
    """(rows,) bool: which rows belong to y+, that is trunk and chosen branch."""
    is_chosen = torch.arange(3 * len(lengths), device=lengths.device) % 3 != 1
    return is_chosen.repeat_interleave(lengths.flatten(), output_size=rows)


# --- the running mean delta -----------------------------------------------------------------------


def update_delta(delta: float, batch_mean: float, batch_pairs: int, seen_pairs: int,
                 kind: str = "ema") -> float:
    """delta for the *next* optimizer step, from this step's global batch: delta lags by one step.

    batch_mean   mean of (r+ + r-)/2 over the global batch, in units of reward
    batch_pairs  pairs of this batch; seen_pairs: pairs of all the steps before it
    kind         "ema": 0.9 delta + 0.1 batch_mean (the paper's exponential moving average);
                 "cumulative": the mean over all pairs so far (TRL 0.20's running moments)

    Step 0 trains with delta = 0, the true mean there. The lag makes delta independent of how the
    batch is cut into micro-batches and ranks. Raises ValueError for another kind.
    """
    if kind == "ema":
        return 0.9 * delta + 0.1 * batch_mean
    if kind == "cumulative":
        return (delta * seen_pairs + batch_mean * batch_pairs) / (seen_pairs + batch_pairs)
    raise ValueError(f'kind: "ema" or "cumulative" expected, found {kind!r}')


# --- diagnostics ----------------------------------------------------------------------------------

SUMS = ("loss", "reward_chosen", "reward_rejected", "margin", "accuracy", "tether_chosen",
        "tether_rejected", "trunk_coef", "abs_reward", "examples", "pairs", "chosen_tokens",
        "trunk_rows")


def diagnose(loss, r, delta, coefficients, lengths) -> torch.Tensor:
    """(len(SUMS),) fp64: sums over forks by the names of SUMS, to be added up over packs and ranks.

    r (F, 2) rewards. Quantities of y-, margin and accuracy are summed over forks that have y-.
    """
    pair = paired(lengths)
    chosen, rejected = r.unbind(1)
    rejected = torch.where(pair, rejected, 0.0)
    # arange, and output_size: from a list, or with a size to find out, a GPU would wait.
    is_trunk = torch.arange(3 * len(lengths), device=r.device) % 3 == 0
    on_trunk = is_trunk.repeat_interleave(lengths.flatten(), output_size=len(coefficients))
    sums = {
        "loss": loss,
        "reward_chosen": chosen.sum(),
        "reward_rejected": rejected.sum(),
        "margin": ((chosen - rejected) * pair).sum(),
        "accuracy": ((chosen > rejected) & pair).sum(),
        "tether_chosen": tether(chosen, delta).sum(),
        "tether_rejected": (tether_rejected(rejected, delta) * pair).sum(),
        "trunk_coef": (coefficients.double().abs() * on_trunk).sum(),
        "abs_reward": (chosen.abs() + rejected.abs()).sum(),
        "examples": r.new_full((), len(r)),
        "pairs": pair.sum(),
        "chosen_tokens": lengths.sum() - lengths[:, 1].sum(),
        "trunk_rows": on_trunk.sum(),
    }
    return torch.stack([sums[name].double() for name in SUMS])


def average(sums, objective: str) -> dict:
    """A step's metrics from its global sums (in the order of SUMS): each over its own count.

    loss              nats per pair; per token of y+ for sft and dft
    reward_chosen     r+; reward_rejected: r-. A rising r- is pull-up: y+ lifts y-, which is alike
    margin, accuracy  r+ - r-, and the share of pairs where it is above 0
    tether_chosen     lambda+; tether_rejected: lambda-. 1/2 at the start (full pull), to 0 when
                      a pair is learned; for losses without a tether what it would be
    trunk_coef        mean |coefficient| of a shared-prefix row, before the division by the batch
    Quantities of y- are None where no example has one.
    """
    sums = dict(zip(SUMS, sums))
    counts = {"loss": "chosen_tokens" if objective in TOKEN_OBJECTIVES else "examples",
              "reward_chosen": "examples", "reward_rejected": "pairs", "margin": "pairs",
              "accuracy": "pairs", "tether_chosen": "examples", "tether_rejected": "pairs",
              "trunk_coef": "trunk_rows"}
    metrics = {}
    for name, count in counts.items():
        metrics[name] = sums[name] / sums[count] if sums[count] else None
    return metrics
