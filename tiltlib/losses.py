"""Losses for training a policy toward the tilt, and for showing where other losses lead.

Pure functions of log-probabilities and rewards. Each returns one number per sample, pair or group, not their mean, so
that a caller can average it, or sum it over every outcome with its probability and get the exact expected gradient.
Minimise `loss(...).mean()`. Rewards and log-ratios inside an advantage are constants; what is differentiated is said in
the first line of each formula. `sg` is "stop gradient".

Everything is computed in float64 and returned in the dtype of the first argument, so that rewards and log-probabilities
in half precision cost only the rounding they came with. A result that its dtype cannot hold is infinite.

Which one aims at pi* proportional to p exp(r / beta):

    policy_gradient, rloo        on fresh draws of the policy: the exact gradient of E r - beta KL(pi || p)
    dpo, bradley_terry           on any pairs that connect the outcomes, with Bradley-Terry labels
    weighted_likelihood          on draws of the reference, with weights exp(r / beta)
    grpo                         only with scale="none", and kl="reward" or, on whole-sequence ratios with
                                 baseline="leave-one-out", kl="k2"
"""

import math
from collections.abc import Callable
from numbers import Real
from typing import Literal, NamedTuple

import numpy as np
import torch
from scipy.sparse.csgraph import connected_components
from torch import Tensor

from tiltlib import _checks, _numerics

__all__ = [
    "KLEstimates",
    "bradley_terry",
    "count_wins",
    "dpo",
    "fit_bradley_terry",
    "grpo",
    "kl_estimators",
    "policy_gradient",
    "rloo",
    "self_certainty",
    "weighted_likelihood",
]


class KLEstimates(NamedTuple):
    """Three estimates of KL(pi || p) from draws of pi, per draw.

    Attributes:
        k1: -log rho, unbiased; its pathwise gradient has mean 0.
        k2: (log rho)^2 / 2, biased; its pathwise gradient has mean grad KL(pi || p).
        k3: rho - 1 - log rho, unbiased if p << pi, never negative; its pathwise gradient has mean grad KL(p || pi).
    """

    k1: Tensor
    k2: Tensor
    k3: Tensor


def kl_estimators(logps: Tensor, ref_logps: Tensor) -> KLEstimates:
    """Estimate KL(pi || p) at draws of pi in three ways.

        k1 = -log rho,   k2 = (log rho)^2 / 2,   k3 = rho - 1 - log rho,        rho = p(y) / pi(y),  y ~ pi

    Differentiable in both arguments. Swapping them makes the mean of k3 chi2(pi || p) - KL(pi || p). Where the dtype
    cannot hold rho (log rho above 709 in float64, 88 in float32 and bfloat16, 11 in float16), k3 is +inf, its gradient
    -inf in `logps` and +inf in `ref_logps`.

    Args:
        logps: log pi(y) of outcomes drawn from pi, any shape.
        ref_logps: log p(y) of the same outcomes, same shape.

    Returns:
        `KLEstimates(k1, k2, k3)`, each of the shape and dtype of `logps`.

    Raises:
        TypeError: an argument is not a floating tensor.
        ValueError: values not finite or above 0, or shapes that differ.

    Source: [schulman2020]; book, `kl-estimators`.
    """
    with _checks.together():
        _checks.draws(logps=logps, ref_logps=ref_logps)
        log_rho = ref_logps.double() - logps.double()
        _checks.finite_result("log rho", log_rho, logps=logps, ref_logps=ref_logps)
    return KLEstimates(*(k.to(logps.dtype) for k in _estimates(log_rho)))


def _estimates(log_rho: Tensor) -> KLEstimates:
    return KLEstimates(-log_rho, log_rho**2 / 2, torch.expm1(log_rho) - log_rho)


def _temperature(beta: float | Tensor, batch: torch.Size, dims: int = 0) -> float | Tensor:
    """Check a temperature, or one per row of a batch; append dimensions that run within a row."""
    _checks.positive_per_row("beta", beta, batch)
    temperature = _numerics.double(beta)
    if not isinstance(temperature, Tensor):
        return temperature
    if not _checks.broadcasts_to(temperature.shape, batch):
        raise ValueError(
            f"beta must broadcast to the batch dimensions {tuple(batch)}, got shape {tuple(temperature.shape)}"
        )
    return temperature[(..., *[None] * dims)]


def _returns(logps: Tensor, ref_logps: Tensor, rewards: Tensor, beta: float | Tensor, dims: int = 0) -> Tensor:
    """Check the arguments and compute r - beta log(pi / p), in float64; the last `dims` dimensions lie within a row."""
    _checks.draws(logps=logps, ref_logps=ref_logps)
    _checks.floating("rewards", rewards)  # its entries are looked at with the advantages
    _checks.same_shape(logps=logps, rewards=rewards)
    beta = _temperature(beta, logps.shape[: logps.ndim - dims], dims)
    return rewards.double() - beta * (logps.double() - ref_logps.double())


def _constant(advantages: Tensor, **arguments: Tensor) -> Tensor:
    """Detach advantages, after requiring that no argument is infinite and no difference of enormous ones is."""
    advantages = advantages.detach()
    _checks.finite_result("advantages from rewards", advantages, **arguments)
    return advantages


def _number_or_tensor(
    name: str,
    value: object,
    like: Tensor,
    number: Callable[[str, float], object],
    tensor: Callable[[str, Tensor], None],
) -> float | Tensor:
    """Check a number or a tensor, each in its way; a list or an array is neither."""
    if isinstance(value, Tensor):
        tensor(name, value)
        _checks.fits(name, value, like)
        return value.double()
    if not isinstance(value, (float, Real)):  # float first: an abstract class takes longer to ask
        raise TypeError(f"{name} must be a number or a torch.Tensor, got {_checks.described(value)}")
    number(name, float(value))
    return float(value)


def policy_gradient(
    logps: Tensor, ref_logps: Tensor, rewards: Tensor, beta: float | Tensor, *, baseline: float | Tensor = 0.0
) -> Tensor:
    """Compute the REINFORCE loss of E r - beta KL(pi || p), at draws of the policy.

        loss = -log pi(y) sg[r - beta log(pi(y) / p(y)) - b]

    Its gradient has mean -grad (E r - beta KL), for any baseline b that does not depend on y. At pi = pi* the bracket
    is a constant: with that constant as baseline the gradient of every single draw vanishes there. Differentiable in
    `logps`, with what `sg` encloses held constant.

    Args:
        logps: log pi(y) of fresh draws, any shape; for sequences the sum over tokens.
        ref_logps: log p(y) of the same draws, same shape.
        rewards: r(y), same shape, finite.
        beta: KL coefficient in reward units, > 0: a number, or a tensor that broadcasts against `rewards`.
        baseline: Number or tensor that broadcasts against `rewards`; not a function of the same draw.

    Returns:
        Loss per draw, shape and dtype of `logps`.

    Raises:
        TypeError: a tensor that is not floating, or `beta` or `baseline` not a number.
        ValueError: values or advantages not finite, log-probabilities above 0, shapes that do not fit, or `beta` not
            finite and > 0.

    Source: [williams1992]; book, `policy-gradient-tilt`.
    """
    with _checks.together():
        returns = _returns(logps, ref_logps, rewards, beta)
        level = _number_or_tensor("baseline", baseline, logps, _checks.finite_number, _checks.finite)
        advantages = _constant(returns - level, logps=logps, ref_logps=ref_logps, rewards=rewards)
        return (-logps.double() * advantages).to(logps.dtype)


def rloo(logps: Tensor, ref_logps: Tensor, rewards: Tensor, beta: float | Tensor) -> Tensor:
    """Compute the leave-one-out policy gradient loss of E r - beta KL(pi || p), at groups of draws.

        loss = -(1/G) sum_i log pi(y_i) sg[R_i - (1/(G-1)) sum_{j != i} R_j],    R = r - beta log(pi / p)

    The others' mean does not depend on y_i, so the gradient is exactly unbiased. At pi* all R_i agree and it vanishes.
    Differentiable in `logps`, with what `sg` encloses held constant.

    Args:
        logps: log pi(y) of fresh draws, shape (..., G), G >= 2; for sequences the sum over tokens.
        ref_logps: log p(y) of the same draws, same shape.
        rewards: r(y), same shape, finite.
        beta: KL coefficient in reward units, > 0: a number, or a tensor that broadcasts against the batch dimensions,
            one per group.

    Returns:
        Loss per group, shape (...), dtype of `logps`.

    Raises:
        TypeError: a tensor that is not floating, or `beta` not a number.
        ValueError: a group of fewer than 2, or as for `policy_gradient`.

    Source: [kool2019], [ahmadian2024]; book, `policy-gradient-tilt`.
    """
    with _checks.together():
        returns = _returns(logps, ref_logps, rewards, beta, dims=1)
        _group("logps", logps, -1)
        advantages = _leave_one_out(_centred(returns), returns.shape[-1])
        advantages = _constant(advantages, logps=logps, ref_logps=ref_logps, rewards=rewards)
        return -(logps.double() * advantages).mean(-1).to(logps.dtype)


def _group(name: str, value: Tensor, dim: int) -> None:
    if value.ndim < -dim or value.shape[dim] < 2:
        raise ValueError(f"{name} must hold groups of at least 2 draws, got shape {tuple(value.shape)}")


def _centred(values: Tensor, counted: Tensor | None = None) -> Tensor:
    """Subtract the mean of the row, or of the entries that count; the others become 0."""
    if counted is None:
        counted = torch.ones_like(values, dtype=torch.bool)
    n = counted.sum(-1, keepdim=True)
    # A common level goes first: then the mean is rounded as the differences are, and equal values are exactly 0.
    level = values.gather(-1, counted.int().argmax(-1, keepdim=True))
    values = torch.where(counted, values - level, 0)
    return torch.where(counted, values - values.sum(-1, keepdim=True) / n, 0)


def _leave_one_out(centred: Tensor, n: int | Tensor) -> Tensor:
    """Turn deviations from the mean of n values into deviations from the mean of the others."""
    return centred * (n / (n - 1))


def grpo(
    logps: Tensor,
    ref_logps: Tensor | None,
    rewards: Tensor,
    beta: float | Tensor,
    *,
    kl: Literal["reward", "k1", "k2", "k3"] = "k3",
    baseline: Literal["group", "leave-one-out"] = "group",
    scale: Literal["group", "none"] = "group",
    length_norm: Literal["none", "sequence", "group"] = "none",
    mask: Tensor | None = None,
    valid: Tensor | None = None,
    old_logps: Tensor | None = None,
    clip: float | tuple[float, float] = 0.2,
) -> Tensor:
    """Compute the group relative policy optimisation loss, with the choices that public trainers offer.

        loss = -(1/G) sum_i n_i sum_t [min(rho_it A_i, clip(rho_it, 1 - c, 1 + d) A_i) - beta k(y_it)]
        A_i = sg[(r_i - mean) / sd],   rho_it = pi(y_it) / sg[pi_old(y_it)],   k from `kl_estimators`

    The last dimension runs over tokens, and the KL term is one per token, as in public trainers. Pass whole-sequence
    log-probabilities with a last dimension of 1 for the term on the sequence ratio. The defaults are those of the
    paper, but for the factor 1/|y| (`length_norm`); their fixed point is not the tilt (book,
    `grpo-fixed-points`).

    Fixed points on fresh draws, where a(y) is the chance that a draw y is `valid`, R = r - beta log(pi / p) and
    sequences have lengths |y|:

    - `clip` plays no part: all ratios are 1.
    - With kl "reward" and a > 0 the tilt is the only one with the support of p, whatever the other options. Stationary
      is sum_z pi(z) m(y, z) (R(y) - R(z)) = c |y| / a(y) with a symmetric m > 0. Summed with weights pi(y) a(y) this is
      0 = c E|y|, and then at the largest R it says that all R agree. Where a = 0 there is no signal: the other y have
      the tilt among themselves, with any total mass.
    - With KL in the loss `length_norm` moves the fixed point unless all lengths agree. For "sequence" with "k2",
      "leave-one-out" and no scale it is pi(s | h) = p(s | h) exp((q - l) / w) for symbol s after prefix h, where
      q = E[(r - E r) / |y| | h, s], w = beta E[1 / |y| | h, s], and l makes the sum 1. "group" has no closed form.
    - With KL in the loss `valid` moves it unless a is constant. On the sequence ratio with "k2", "leave-one-out" and no
      scale it is proportional to p exp((r - c / a) / beta), c = -beta sum_y pi a log(pi / p).

    Differentiable in `logps` and `ref_logps`, with what `sg` encloses held constant; with kl "reward" in `logps` alone.
    A clipped term has gradient 0, however far its ratio is. The loss is +inf, and its gradient infinite, where the
    dtype cannot hold the ratio of a token with a negative advantage, or k3. Where it holds neither, the gradient has
    the sign of the larger.

    Args:
        logps: log pi of each token, shape (..., G, L), G >= 2, L >= 1.
        ref_logps: log p of each token, same shape; None only with `beta` = 0.
        rewards: Reward of each sequence, shape (..., G), finite.
        beta: KL coefficient in reward units, >= 0: a number, at 0 the reference plays no part; or a tensor of numbers
            > 0 that broadcasts against the batch dimensions, one per group.
        kl: Where KL enters. "k1", "k2", "k3": that term in the loss, differentiated. "reward": -beta log(pi / p) of the
            sequence is added to its reward before baseline and scale.
        baseline: "group": the mean over the group, the own draw included. "leave-one-out": the mean of the others.
        scale: "group": divide by the standard deviation over the group (over G, not G - 1), however small; where all
            rewards are equal, or with kl "reward" equal up to the rounding of that sum in float64, A = 0. "none": do
            not.
        length_norm: The factor n_i. "none": 1, a sum over tokens, as in Dr. GRPO but for its constant. "sequence":
            1 / |y_i|, the mean over tokens, as in GRPO. "group": G / sum_j |y_j|, one mean over all tokens of the
            group, as in DAPO. For one mean over all tokens of many groups divide the sum of the losses without it.
        mask: True at tokens that count, boolean, shape (..., G, L); None counts all. Log-probabilities of the others
            may be anything, NaN included.
        valid: True at draws that count, boolean, shape (..., G); None counts all. The loss is that of the group of
            these draws alone, and 0 if they are fewer than 2. Rewards, log-probabilities and mask of the others may be
            anything, NaN included.
        old_logps: log-probabilities under the policy that drew, shape (..., G, L); None when drawn just now.
        clip: Range of the clipped ratio: c = d > 0, or a pair (c, d) with a range of its own on either side. Without
            effect when `old_logps` is None.

    Returns:
        Loss per group, shape (...), dtype of `logps`.

    Raises:
        TypeError: a tensor of the wrong dtype, no reference where `beta` > 0, or `beta` or `clip` not a number.
        ValueError: values or advantages not finite, log-probabilities above 0, shapes that do not fit, a group of fewer
            than 2, a sequence with no token left by `mask`, `beta` not finite and >= 0, `clip` not finite and > 0 or
            not a pair, or an unknown option.

    Example:
        >>> logits = torch.zeros(2, 4, 3, requires_grad=True)  # 2 prompts, 4 answers each, 3 tokens long
        >>> logps, rewards = logits.sigmoid().log(), torch.tensor([[0.0, 1, 1, 0], [1.0, 0, 0, 0]])
        >>> mask = torch.ones(2, 4, 3, dtype=torch.bool)  # tokens that count
        >>> loss = grpo(logps, logps.detach(), rewards, beta=0.04, length_norm="sequence", mask=mask)
        >>> loss.sum().backward()  # ascends where the reward is above the mean of its prompt
        >>> bool((logits.grad[1, 0] < 0).all() and (logits.grad[1, 1:] > 0).all())
        True

    Source: [shao2024], [yu2025] for the pair and "group", [liu2025] for "none"; book, `grpo-fixed-points`,
        `grpo-binary-exact` and `token-level-kl`.
    """
    with _checks.together():
        _checks.tensor("logps", logps)
        if not isinstance(beta, Tensor):
            _checks.nonnegative("beta", beta)
        free = not isinstance(beta, Tensor) and beta == 0
        low, high = _clip_range(clip)
        _checks.one_of("kl", kl, ("reward", "k1", "k2", "k3"))
        _checks.one_of("baseline", baseline, ("group", "leave-one-out"))
        _checks.one_of("scale", scale, ("group", "none"))
        _checks.one_of("length_norm", length_norm, ("none", "sequence", "group"))
        _group("logps", logps, -2)
        weight = 0.0 if free else _temperature(beta, logps.shape[:-2], 2)
        draws, tokens = _counted(logps, valid, mask)
        now = _tokens("logps", logps, tokens)
        ref = now.detach() if ref_logps is None and free else _tokens("ref_logps", ref_logps, tokens)
        old = now.detach() if old_logps is None else _tokens("old_logps", old_logps, tokens).detach()
        _checks.tensor("rewards", rewards)
        if rewards.shape != logps.shape[:-1]:
            raise ValueError(f"rewards must have shape {tuple(logps.shape[:-1])}, got {tuple(rewards.shape)}")
        kept = torch.where(draws, rewards, 0)
        _checks.finite("rewards", kept)

        log_rho = now.detach() - now if free else ref - now  # 0 times an overflow is not 0
        change = weight * log_rho.detach() if kl == "reward" else None
        advantages = _advantages(kept.detach().double(), change, draws, baseline, scale).unsqueeze(-1)
        log_ratios = _clipped(now - old, advantages, low, high)
        if kl == "k3":
            ratio_larger, k3_larger = _both_overflow(log_ratios, advantages, log_rho, weight)
            log_ratios = torch.where(k3_larger, log_ratios.detach(), log_ratios)
            log_rho = torch.where(ratio_larger, ref - now.detach(), log_rho)
        per_token = torch.exp(log_ratios) * advantages
        if kl != "reward":
            per_token = per_token - weight * getattr(_estimates(log_rho), kl)
        return -_over_tokens(per_token, draws, tokens, length_norm).to(logps.dtype)


def _clip_range(clip: object) -> tuple[float, float]:
    """Check the range of the ratio: a number for both sides, or a pair."""
    if not isinstance(clip, tuple | list):
        _checks.positive("clip", clip)
        clip = (clip, clip)
    if len(clip) != 2:
        raise ValueError(f"clip must be a number or a pair (low, high), got {len(clip)} numbers")
    for name, value in zip(("clip[0]", "clip[1]"), clip, strict=True):
        _checks.positive(name, value)
    low, high = clip
    return float(low), float(high)


def _counted(logps: Tensor, valid: Tensor | None, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Check the masks; return which draws count, and which of their tokens."""
    draws = torch.ones(logps.shape[:-1], dtype=torch.bool, device=logps.device)
    if valid is not None:
        _boolean("valid", valid, draws.shape, "draw")
        draws = valid & (valid.sum(-1, keepdim=True) >= 2)  # one draw alone has nothing to be compared with
    tokens = draws.unsqueeze(-1).expand(logps.shape)
    if mask is not None:
        _boolean("mask", mask, logps.shape, "token")
        _checks.some_tokens(mask | ~tokens, logps.shape)
        tokens = tokens & mask
    return draws, tokens


def _boolean(name: str, value: object, shape: torch.Size, each: str) -> None:
    if not isinstance(value, Tensor) or value.dtype != torch.bool:
        raise TypeError(f"{name} must be a boolean torch.Tensor, got {_checks.described(value)}")
    if value.shape != shape:
        raise ValueError(f"{name} must have shape {tuple(shape)}, one entry per {each}, got {tuple(value.shape)}")


def _advantages(rewards: Tensor, change: Tensor | None, draws: Tensor, baseline: str, scale: str) -> Tensor:
    """Compute r_i, with the change of each token added, less the baseline and over the scale; 0 at other draws."""
    n = draws.sum(-1, keepdim=True).double().clamp(min=2)
    returns = _centred(rewards, draws)
    rounding = torch.zeros_like(returns)
    if change is not None:
        rounding = 16 * torch.finfo(torch.float64).eps * (returns.abs() + change.abs().sum(-1))
        returns = _centred(returns + change.sum(-1), draws)
    advantages = _constant(returns, rewards=rewards)
    if scale == "group":
        # Equal returns may differ by the rounding of their sum; dividing that by itself would make it of size 1.
        largest = advantages.abs().amax(-1, keepdim=True)
        differ = largest > rounding.amax(-1, keepdim=True)
        # By the largest first: the squares of very small or large rewards are 0 or infinite.
        advantages = torch.where(differ, advantages / torch.where(differ, largest, 1), 0)
        sd = (advantages.square().sum(-1, keepdim=True) / n).sqrt()
        advantages = advantages / torch.where(differ, sd, 1)
    if baseline == "leave-one-out":
        advantages = _leave_one_out(advantages, n)
    return _constant(advantages, rewards=rewards)


def _clipped(log_ratios: Tensor, advantages: Tensor, low: float, high: float) -> Tensor:
    """Clip log-ratios to what min(rho A, clip(rho) A) makes of them."""
    # The logarithm is clipped: beyond the clip the ratio is a constant, whatever its own exponential would be.
    lowest = math.log1p(-low) if low < 1 else -math.inf
    return torch.where(advantages < 0, log_ratios.clamp(min=lowest), log_ratios.clamp(max=math.log1p(high)))


@torch.no_grad()
def _both_overflow(
    log_ratios: Tensor, advantages: Tensor, log_rho: Tensor, beta: float | Tensor
) -> tuple[Tensor, Tensor]:
    """Say where neither rho A nor beta k3 fits, and which is larger. Their gradients have opposite signs there."""
    both = (log_ratios.exp() * advantages).isinf() & (beta * log_rho.exp()).isinf()
    if isinstance(beta, Tensor):
        log_beta: float | Tensor = beta.log()
    else:
        log_beta = math.log(beta) if beta > 0 else -math.inf
    ratio_larger = log_ratios + advantages.abs().log() > log_rho + log_beta
    return both & ratio_larger, both & ~ratio_larger


def _over_tokens(per_token: Tensor, draws: Tensor, tokens: Tensor, length_norm: str) -> Tensor:
    """Sum over the tokens and average over the draws that count, or as `length_norm` of `grpo` says; 0 if none do."""
    per_draw = torch.where(tokens, per_token, 0).sum(-1)
    sizes = tokens.sum(-1)
    if length_norm == "group":
        return per_draw.sum(-1) / sizes.sum(-1).clamp(min=1)
    if length_norm == "sequence":
        per_draw = per_draw / sizes.clamp(min=1)
    return per_draw.sum(-1) / draws.sum(-1).clamp(min=1)


def _tokens(name: str, value: Tensor | None, tokens: Tensor) -> Tensor:
    """Check log-probabilities at the tokens that count; return them in float64, with 0 at the others."""
    _checks.tensor(name, value)
    assert value is not None
    _checks.same_shape(**{"logps": tokens, name: value})  # one entry per log-probability
    # Before the checks and any exponential: padding may hold anything, and infinity times 0 is not 0.
    kept = torch.where(tokens, value, 0)
    _checks.drawn_logps(name, kept)
    return kept.double()


def bradley_terry(chosen: Tensor, rejected: Tensor, labels: Tensor | float = 1.0) -> Tensor:
    """Compute the negative log-likelihood of comparisons under the Bradley-Terry model.

        loss = -l log sigma(d) - (1 - l) log sigma(-d),    d = r(chosen) - r(rejected)

    Differentiable. Label 1 says that `chosen` won, 0 that `rejected` did; a label between is a probability.

    Args:
        chosen: Rewards of the first item of each pair, any shape, finite.
        rejected: Rewards of the second item, same shape.
        labels: Probability that the first item wins, in [0, 1]: a number or a tensor that broadcasts.

    Returns:
        Loss per pair, shape and dtype of `chosen`.

    Raises:
        TypeError: a tensor that is not floating, or `labels` neither a number nor a tensor.
        ValueError: rewards or their differences not finite, shapes that do not fit, or a label outside [0, 1].

    Source: [bradley1952]; book, `bradley-terry`.
    """
    with _checks.together():
        _checks.floating("chosen", chosen)
        _checks.floating("rejected", rejected)
        _checks.same_shape(chosen=chosen, rejected=rejected)
        margin = chosen.double() - rejected.double()
        return _comparison_loss(margin, labels, chosen=chosen, rejected=rejected).to(chosen.dtype)


def _label(name: str, value: float) -> None:
    _checks.fraction(name, value, zero=True)


def _comparison_loss(margin: Tensor, labels: Tensor | float, **arguments: Tensor) -> Tensor:
    _checks.finite_result("the margin d", margin, **arguments)
    labels = _number_or_tensor("labels", labels, margin, _label, _checks.probabilities)
    log_win, log_loss = torch.nn.functional.logsigmoid(margin), torch.nn.functional.logsigmoid(-margin)
    return -labels * log_win - (1 - labels) * log_loss


def dpo(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    ref_chosen_logps: Tensor,
    ref_rejected_logps: Tensor,
    beta: float | Tensor,
    labels: Tensor | float = 1.0,
) -> Tensor:
    """Compute the direct preference optimisation loss: Bradley-Terry with the rewards that the policy implies.

        loss = -l log sigma(d) - (1 - l) log sigma(-d)
        d = beta log(pi(chosen) / p(chosen)) - beta log(pi(rejected) / p(rejected))

    Differentiable in the log-probabilities of the policy. With labels l = sigma(r(chosen) - r(rejected)) it is least at
    the tilt at temperature beta.

    Args:
        chosen_logps: log pi of the first item of each pair, any shape; for sequences the sum over tokens.
        rejected_logps: log pi of the second item, same shape.
        ref_chosen_logps: log p of the first item, same shape.
        ref_rejected_logps: log p of the second item, same shape.
        beta: Temperature of the tilt in reward units, > 0: a number, or a tensor that broadcasts, one per pair.
        labels: Probability that the first item wins, in [0, 1]: a number or a tensor that broadcasts.

    Returns:
        Loss per pair, shape and dtype of `chosen_logps`.

    Raises:
        TypeError: a tensor that is not floating, `beta` not a number, or `labels` neither a number nor a tensor.
        ValueError: log-probabilities not finite or above 0, d not finite, shapes that do not fit, `beta` not finite
            and > 0, or a label outside [0, 1].

    Source: [rafailov2023]; book, `dpo-optimum`.
    """
    with _checks.together():
        logps = {
            "chosen_logps": chosen_logps,
            "rejected_logps": rejected_logps,
            "ref_chosen_logps": ref_chosen_logps,
            "ref_rejected_logps": ref_rejected_logps,
        }
        _checks.draws(**logps)
        beta = _temperature(beta, chosen_logps.shape)
        chosen = beta * (chosen_logps.double() - ref_chosen_logps.double())
        rejected = beta * (rejected_logps.double() - ref_rejected_logps.double())
        return _comparison_loss(chosen - rejected, labels, **logps).to(chosen_logps.dtype)


def count_wins(first: Tensor, second: Tensor, labels: Tensor, k: int) -> Tensor:
    """Count who beat whom in a list of comparisons, for `fit_bradley_terry`.

        wins_ij = number of comparisons that i won against j

    Not differentiable.

    Args:
        first: First item of each comparison, indices in 0..k-1, integer tensor, shape (n,).
        second: Second item, same shape.
        labels: 1 where the first item won, 0 where the second did, shape (n,), any dtype.
        k: Number of items, >= 2.

    Returns:
        Table of counts, float64, shape (k, k).

    Raises:
        TypeError: indices that are not integers, `labels` not a tensor, or `k` not an int.
        ValueError: indices outside 0..k-1, shapes that differ, `k` < 2, or a label other than 0 and 1.
    """
    _checks.count("k", k)
    if k < 2:
        raise ValueError(f"k must be an integer >= 2, got {k}")
    k = int(k)
    with _checks.together():
        first, second = _checks.indices("first", first, k), _checks.indices("second", second, k)
        if not isinstance(labels, Tensor):
            raise TypeError(f"labels must be a torch.Tensor, got {_checks.described(labels)}")
        _checks.same_shape(first=first, second=second, labels=labels)
        legal = (labels == 0) | (labels == 1)
        _checks.holds(legal, lambda: ValueError(f"labels must be 0 or 1, got {labels[~legal][0].item()}"))
    winner, loser = torch.where(labels == 1, first, second), torch.where(labels == 1, second, first)
    cells = winner.flatten() * k + loser.flatten()
    return torch.bincount(cells, minlength=k * k).double().view(k, k)


def fit_bradley_terry(wins: Tensor, *, ridge: float = 0.0) -> Tensor:
    """Fit Bradley-Terry rewards to a table of comparisons by maximum likelihood, on request with a penalty.

        maximise sum_ij wins_ij log sigma(r_i - r_j) - (ridge / 2) sum_i r_i^2    subject to sum_i r_i = 0

    By Newton's method with steps of bounded length; the objective is concave. Without `ridge` the rewards are
    identified up to the constant fixed here iff the comparison graph is connected, and the maximiser exists iff the
    graph of "i beat j" is strongly connected. With it the objective is strictly concave and falls without bound in
    every direction, so any table has one maximiser, where unexpected wins exceed unexpected losses by ridge r_i:

        sum_j [wins_ij sigma(r_j - r_i) - wins_ji sigma(r_i - r_j)] = ridge r_i

    Summed over a group that was never compared with the rest this says that its mean is 0; an item without comparisons
    has reward 0. Not differentiable. Cost O(K^3) a step, and about one step per unit of the largest difference.

    Args:
        wins: How often i beat j, or the expected number, shape (K, K), finite, >= 0, K >= 2. The diagonal is ignored.
        ridge: Strength of the penalty in units of `wins`, >= 0: the precision of a centred normal law of rewards before
            any comparison. 0 is maximum likelihood.

    Returns:
        Rewards with mean 0, float64, shape (K,). With `ridge` the two sides of the equation above agree up to 1e-12 of
        the sum of its terms, each taken positive, and of ridge times the largest reward.

    Raises:
        TypeError: `wins` is not a floating tensor, or `ridge` is a tensor.
        ValueError: `wins` not square, or with negative or non-finite entries; `ridge` not finite and >= 0. Without
            `ridge`: entries > 0 that differ by a factor above 1e300, a comparison graph that is not connected, or a
            group of items that never lost to the rest, whose rewards would be infinite. With it: `ridge` below 1e-24
            of the largest entry, where rounding would decide.

    Source: [bradley1952], [ford1957]; book, `bradley-terry`.
    """
    with _checks.together():
        _checks.finite("wins", wins)
        _checks.nonnegative("ridge", ridge)
        if wins.ndim != 2 or wins.shape[0] != wins.shape[1] or len(wins) < 2:
            raise ValueError(f"wins must have shape (K, K) with K >= 2, got {tuple(wins.shape)}")
        _checks.require(wins, 0, math.inf, lambda low, high: ValueError(f"wins must be >= 0, got {low:g}"))
    table = wins.detach().double().clone().fill_diagonal_(0)
    if ridge == 0:
        _identified(table)
    return _most_likely(table, float(ridge))


def _most_likely(table: Tensor, ridge: float) -> Tensor:
    rarest, most = table[table > 0].min().item() if ridge == 0 else math.inf, table.max().item()
    if rarest < most / 1e300:
        raise ValueError(f"wins must be 0 or within a factor 1e300 of each other, got {rarest:g} and {most:g}")
    # An error of eps in a reward moves the sum of a group's gradient by eps^2 wins, against ridge times its level.
    if 0 < ridge < most * 1e-24:
        raise ValueError(f"ridge must be 0 or at least 1e-24 of the largest entry of wins, got {ridge:g} and {most:g}")
    # Sums of entries may overflow; a power of two does not round.
    unit = 2.0 ** (math.frexp(max(most, ridge))[1] - 1)
    table, ridge = table / unit, ridge / unit
    rewards = torch.zeros(len(table), dtype=torch.float64, device=table.device)
    settled = 0
    while settled < 2:
        lose = torch.sigmoid(rewards - rewards[:, None])
        surplus = table * lose
        # What i gains from j is exactly what j loses to i; a sum without rounding keeps that true of groups.
        flow = torch.cat([surplus - surplus.T, -ridge * rewards[:, None]], -1)
        gradient = torch.tensor([math.fsum(row) for row in flow.tolist()], dtype=torch.float64, device=table.device)
        direction = _solve_laplacian((table + table.T) * lose * lose.T, ridge, gradient)
        span = float(direction.max() - direction.min())
        if not math.isfinite(span):  # by proof it is finite; a loop that waits for NaN would never end
            raise ArithmeticError(f"the fit with entries up to {most:g} and ridge {ridge * unit:g} left float64")
        # A comparison's curvature changes by at most e^x when its margin changes by x. So along the step the curvature
        # is at most e^(t span) times that at its start, and the objective rises until t = log(1 + span) / span.
        rewards = rewards + (math.log1p(span) / span if span > 0 else 1.0) * direction
        rewards = rewards - rewards.mean()
        # Each comparison on a path of at most K is now off by at most span^2, so the rewards by K span^2. When that is
        # rounding beside 1, one more step makes it rounding beside rewards of any size.
        settled += len(table) * span**2 <= torch.finfo(torch.float64).eps
    return rewards


def _solve_laplacian(edges: Tensor, ridge: float, right: Tensor) -> Tensor:
    """Solve (Laplacian of the edges + ridge) x = right, however far the edges and the ridge are apart.

    Without a ridge x is known up to a constant, and its last entry is 0.
    """
    # Elimination on the edges and the excess of the diagonal over them: both stay >= 0 and nothing is subtracted. A
    # diagonal that holds their sum would have lost a small ridge to rounding. That of `edges` is never read.
    edges, right = edges.clone(), right.clone()
    excess = torch.full_like(right, ridge)
    pivots = []
    for k in range(len(right)):
        ahead = edges[k, k + 1 :]
        pivots.append(ahead.sum() + excess[k])
        if k == len(right) - 1 and ridge == 0:
            pivots[k] = torch.full_like(pivots[k], math.inf)
        share = ahead / pivots[k]
        right[k + 1 :] += share * right[k]
        excess[k + 1 :] += share * excess[k]
        edges[k + 1 :, k + 1 :] += share[:, None] * ahead
    for k in reversed(range(len(right))):
        right[k] = (right[k] + edges[k, k + 1 :] @ right[k + 1 :]) / pivots[k]
    return right


def _identified(table: Tensor) -> None:
    """Require that the comparisons determine every reward difference."""
    beat = (table > 0).cpu().numpy()
    parts, part = connected_components(beat)
    if parts > 1:
        raise ValueError(
            f"wins must connect all items, got {parts} groups that were never compared with each other: the reward is "
            f"identified only up to one constant per group (ridge > 0 sets them); one group is {_some(part == 0)}"
        )
    parts, part = connected_components(beat, connection="strong")
    if parts > 1:
        unbeaten = next(i for i in range(parts) if not beat[part != i][:, part == i].any())
        raise ValueError(
            f"wins must let every group of items lose to the rest at least once, got {_some(part == unbeaten)} "
            "unbeaten by the others: the maximum-likelihood reward is infinite (ridge > 0 makes it finite)"
        )


def _some(members: "np.ndarray[tuple[int, ...], np.dtype[np.bool_]]") -> str:
    listed = np.flatnonzero(members).tolist()
    return f"items {listed}" if len(listed) <= 8 else f"items {listed[:8]} and {len(listed) - 8} more"


def self_certainty(
    conditionals: Tensor, *, direction: Literal["policy", "uniform"] = "policy", mask: Tensor | None = None
) -> Tensor:
    """Compute the self-certainty of sequences: how far the policy is from uniform, on average over their positions.

        direction "policy":    u = (1/L) sum_t KL(pi(. | y_<t) || Unif(V)) = log V - mean entropy
        direction "uniform":   u = (1/L) sum_t KL(Unif(V) || pi(. | y_<t))

    Differentiable. Multiply by the number of tokens for the sum, which is the form that the theory uses.

    Args:
        conditionals: Log-probabilities of the next symbol at each position, shape (..., L, V), normalised.
        direction: "policy" puts the policy first, as in the paper this book accompanies; "uniform" puts the uniform law
            first, as in public RLIF code.
        mask: True at positions that count, boolean, shape (..., L); None counts all. What stands at the others may be
            anything, NaN included.

    Returns:
        Self-certainty in nats, shape (...), dtype of `conditionals`; +inf for direction "uniform" where a symbol has
        probability 0.

    Raises:
        TypeError: `conditionals` not floating, or `mask` not boolean.
        ValueError: `conditionals` not normalised, without a dimension for positions, a sequence with no position left
            by `mask`, or an unknown direction.

    Source: [jiao2025], [kang2025], [zhao2025]; book, `self-certainty` and `self-certainty-direction`.
    """
    with _checks.together():
        _checks.tensor("conditionals", conditionals)
        _checks.one_of("direction", direction, ("policy", "uniform"))
        if conditionals.ndim < 2:
            raise ValueError(f"conditionals must have shape (..., L, V), got {tuple(conditionals.shape)}")
        log_v = math.log(conditionals.shape[-1])
        laws = conditionals
        if mask is not None:
            _checks.some_tokens(mask, conditionals.shape[:-1])
            laws = torch.where(mask.unsqueeze(-1), conditionals, -log_v)
        _checks.logps("conditionals", laws)
        laws = laws.double()
        # A constant: the gradient is that of the formula, in every dtype.
        laws = laws - laws.detach().logsumexp(-1, keepdim=True)
        if direction == "policy":
            # Mask before the product: a masked product of 0 and inf would still have gradient NaN.
            per_token = log_v + (laws.exp() * torch.where(laws > -torch.inf, laws, 0)).sum(-1)
        else:
            per_token = -log_v - laws.mean(-1)
        if mask is None:
            return per_token.mean(-1).to(conditionals.dtype)
        return (torch.where(mask, per_token, 0).sum(-1) / mask.sum(-1)).to(conditionals.dtype)


def weighted_likelihood(logps: Tensor, log_weights: Tensor, *, self_normalized: bool = True) -> Tensor:
    """Compute the weighted negative log-likelihood of a pool of samples.

        loss = -sum_i W_i log q(y_i),    W_i = w_i / sum_j w_j    or, not self-normalised,  W_i = w_i / N

    Differentiable in `logps`. With w = exp(r / beta) at draws of p and fresh pools, unnormalised weights have the tilt
    as population optimum at every N; self-normalised ones have the law of soft best-of-N.

    Args:
        logps: log q(y_i) of the model to be fitted, shape (..., N).
        log_weights: log w_i, same shape; -inf drops a sample, whatever its log q(y_i), NaN included.
        self_normalized: Divide by the sum of the weights of the pool, or by N.

    Returns:
        Loss per pool, shape (...), dtype of `logps`.

    Raises:
        TypeError: a tensor that is not floating.
        ValueError: log-probabilities not finite or above 0, weights with NaN or +inf, weights that float64 cannot hold
            when they are not normalised, shapes that differ, or a pool whose weights are all 0.

    Source: [peters2007]; book, `weighted-likelihood` and `resampled-training`.
    """
    with _checks.together():
        _checks.tensor("logps", logps)
        _checks.rewards("log_weights", log_weights)
        _checks.same_shape(logps=logps, log_weights=log_weights)
        kept = torch.where(log_weights > -math.inf, logps, 0)
        _checks.drawn_logps("logps", kept)
        _checks.some_left("log_weights", log_weights.amax(-1))
        log_w = log_weights.detach().double()
        weights = torch.softmax(log_w, -1) if self_normalized else log_w.exp() / log_w.shape[-1]
        _checks.finite("exp(log_weights)", weights)
        return -(weights * kept.double()).sum(-1).to(logps.dtype)
