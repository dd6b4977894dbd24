"""A law on finitely many outcomes: its exponential tilt, its truncation, its divergences, and exact draws.

A law is a tensor of normalised natural-log probabilities; the last dimension runs over outcomes, every dimension
before it is a batch. An outcome of probability 0 has log-probability -inf.

A law may come in any floating dtype and is checked at the tolerance of that dtype. Then it is normalised anew in
float64, where all is computed; the result has the dtype of what came in, the longer one if two tensors differ.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from tiltlib import _checks, _numerics

__all__ = [
    "Frontier",
    "Truncated",
    "chi_square",
    "expectation",
    "frontier",
    "kl",
    "log_partition",
    "sample",
    "tilt",
    "total_variation",
    "truncate",
]

_LOG_LARGEST = math.log(torch.finfo(torch.float64).max)


class Frontier(NamedTuple):
    """Points of the reward-KL frontier, one per temperature.

    Attributes:
        kl: KL of each tilt from the reference in nats, shape (..., number of temperatures).
        reward: Mean reward under each tilt, same shape.
    """

    kl: Tensor
    reward: Tensor


class Truncated(NamedTuple):
    """What `truncate` returns.

    Attributes:
        logps: Log-probabilities of the truncated law, shape (..., K), -inf outside.
        kept_mass: Probability that the law had on what is kept, in (0, 1], float64, shape (...).
    """

    logps: Tensor
    kept_mass: Tensor


def _log_tilt_weights(ref_logps: Tensor, rewards: Tensor, beta: float | Tensor) -> tuple[Tensor, Tensor]:
    """Return log(p w) shifted by the largest log w of the support, and that shift, in float64."""
    with _checks.together():
        ref = _checks.law("ref_logps", ref_logps)
        _checks.rewards("rewards", rewards)
        _checks.same_outcomes("ref_logps", ref_logps, "rewards", rewards)
        _checks.positive_per_row("beta", beta, torch.broadcast_shapes(ref_logps.shape, rewards.shape)[:-1])
        supported = torch.where(ref > -math.inf, rewards.double(), -math.inf)
        # The shift cancels, so it is a constant to the gradient.
        top = supported.detach().amax(-1, keepdim=True)
        _checks.some_left("rewards", top)
        # Mask before the division: the gradient of -inf / beta in beta would be NaN.
        possible = supported > -math.inf
        log_w = torch.where(possible, _numerics.over(torch.where(possible, supported, top), top, beta), -math.inf)
        return ref + log_w, top.squeeze(-1) / _numerics.double(beta)


def tilt(ref_logps: Tensor, rewards: Tensor, beta: float | Tensor) -> Tensor:
    """Tilt a reference law by exp(reward / beta).

        log pi*(y) = log p(y) + r(y) / beta - log Z,    Z = sum_y p(y) exp(r(y) / beta)

    Differentiable in `ref_logps`, `rewards` and `beta`. Cost O(K) per row.

    Args:
        ref_logps: Reference log-probabilities, shape (..., K), normalised.
        rewards: Reward of each outcome, shape (..., K), floating; -inf excludes an outcome.
        beta: Temperature in reward units, > 0; small is greedy, large stays at the reference. A tensor broadcasts
            against the batch dimensions; its dtype does not matter.

    Returns:
        Log-probabilities of the tilted law, shape (..., K).

    Raises:
        TypeError: `ref_logps` or `rewards` is not a floating tensor.
        ValueError: `ref_logps` not normalised, `rewards` with NaN or +inf or excluding the whole support, `beta` not
            finite and > 0, or shapes that do not fit.

    Source: [jiao2025]; book, `gibbs-principle`.
    """
    log_weights, _ = _log_tilt_weights(ref_logps, rewards, beta)
    return torch.log_softmax(log_weights, -1).to(torch.promote_types(ref_logps.dtype, rewards.dtype))


def log_partition(ref_logps: Tensor, rewards: Tensor, beta: float | Tensor) -> Tensor:
    """Compute the log normaliser of the tilt.

        log Z = log sum_y p(y) exp(r(y) / beta)

    beta log Z is the largest value of E r - beta KL(pi || p). Differentiable. Cost O(K) per row.

    Args:
        ref_logps: Reference log-probabilities, shape (..., K), normalised.
        rewards: Reward of each outcome, shape (..., K), floating; -inf excludes an outcome.
        beta: Temperature in reward units, > 0. A tensor broadcasts against the batch dimensions.

    Returns:
        log Z, shape (...); infinite where it leaves the range of the dtype.

    Raises:
        TypeError: `ref_logps` or `rewards` is not a floating tensor.
        ValueError: as for `tilt`.

    Source: [jiao2025]; book, `gibbs-principle`.
    """
    log_weights, shift = _log_tilt_weights(ref_logps, rewards, beta)
    log_z = torch.logsumexp(log_weights, -1) + shift
    return log_z.to(torch.promote_types(ref_logps.dtype, rewards.dtype))


def truncate(
    logps: Tensor, *, top_k: int | None = None, top_p: float | None = None, min_p: float | None = None
) -> Truncated:
    """Keep the likely outcomes of a law and normalise anew: the law that a truncating decoder samples from.

        top_k    keep y if fewer than top_k outcomes are more likely than y
        top_p    keep y if the outcomes that are more likely than y have mass below top_p
        min_p    keep y if p(y) >= min_p max p

    Each rule looks at the law that came in, and what is kept passes all rules that are given; none given keeps all.
    Outcomes of equal log-probability share their fate: a tie at the edge is kept whole, so top_k may keep more than
    top_k outcomes. (Decoders that apply one rule to the result of another, or break ties by position, may keep less.)
    A mass that reaches top_p, or a ratio that reaches min_p, up to a relative 1e-12 counts as equal to it, where the
    error of the mass is measured against 1 - top_p. An outcome of probability 0 stays there.

    Differentiable on the kept outcomes; which ones are kept is a constant. Cost O(K log K) per row.

    Args:
        logps: Log-probabilities, shape (..., K), normalised.
        top_k: Number of outcomes to keep, >= 1; K or more keeps all.
        top_p: Mass to reach, in (0, 1]; 1 keeps all.
        min_p: Least probability relative to that of the most likely outcome, in [0, 1]; 0 keeps all.

    Returns:
        `Truncated(logps, kept_mass)`: the truncated law, normalised, -inf outside, in the dtype of `logps`; and the
        mass of the kept outcomes before, float64, shape (...).

    Raises:
        TypeError: `logps` is not a floating tensor, `top_k` not an int, or `top_p` or `min_p` not a number.
        ValueError: `logps` not normalised, or a number out of its range.

    Example:
        >>> p = torch.tensor([0.5, 0.3, 0.15, 0.05], dtype=torch.float64).log()
        >>> kept = truncate(p, top_p=0.7)
        >>> kept.logps.exp()
        tensor([0.6250, 0.3750, 0.0000, 0.0000], dtype=torch.float64)
        >>> round(kept.kept_mass.item(), 4)
        0.8

    Source: the documentation of Hugging Face transformers, where the rules are TopKLogitsWarper, TopPLogitsWarper and
        MinPLogitsWarper.
    """
    law = _checks.law("logps", logps)
    exact = logps.detach().double()
    kept = exact > -math.inf
    if top_k is not None:
        _checks.count("top_k", top_k)
        kept = kept & (exact >= exact.topk(min(int(top_k), logps.shape[-1]), -1).values[..., -1:])
    if top_p is not None:
        _checks.fraction("top_p", top_p, zero=False)
    if top_p is not None and top_p < 1:
        ascending = exact.sort(-1).values
        # Summed from the rare end, where 1 - top_p and so the digits are. What lies behind an outcome, the outcome
        # itself included, must exceed 1 - top_p; of tied outcomes the last counts, and then all are kept.
        behind = torch.log_softmax(ascending, -1).exp().cumsum(-1)
        within = (behind > (1 - float(top_p)) * (1 + 1e-12)) | (behind == behind[..., -1:])
        kept = kept & (exact >= torch.where(within, ascending, math.inf).amin(-1, keepdim=True))
    if min_p is not None:
        _checks.fraction("min_p", min_p, zero=True)
        least = math.log(min_p) - 1e-12 if min_p > 0 else -math.inf
        kept = kept & (exact - exact.amax(-1, keepdim=True) >= least)
    chosen = torch.where(kept, law, -math.inf)
    mass = torch.logsumexp(chosen, -1) - torch.logsumexp(law, -1)
    return Truncated(torch.log_softmax(chosen, -1).to(logps.dtype), mass.exp().clamp(max=1))


def expectation(logps: Tensor, values: Tensor) -> Tensor:
    """Average a function over a law.

        E f = sum_y p(y) f(y),    outcomes of probability 0 do not count, whatever f says there

    Differentiable; an infinite value on the support has gradient 0.

    Args:
        logps: Log-probabilities, shape (..., K), normalised.
        values: Values of the function, shape (..., K), floating; where `logps` has mass not NaN, and infinite with one
            sign only.

    Returns:
        The mean, shape (...).

    Raises:
        TypeError: an argument is not a floating tensor.
        ValueError: `logps` not normalised, `values` NaN or infinite with both signs where it has mass, or shapes that
            do not fit.
    """
    with _checks.together():
        law = _checks.law("logps", logps)
        _checks.tensor("values", values)
        _checks.same_outcomes("logps", logps, "values", values)
        supported = torch.where(law > -math.inf, values.double(), 0)
        infinite = supported.isinf()
        # Mask before the product: a masked product of 0 and inf would still have gradient NaN.
        mean = (law.exp() * torch.where(infinite, 0, supported)).sum(-1)
        mean = mean + torch.where(infinite, supported.detach(), 0).sum(-1)
        rule = "values must not be NaN, nor infinite with both signs, where logps has mass, got such a row"
        _checks.holds(~mean.isnan(), lambda: ValueError(rule))
        return mean.to(torch.promote_types(logps.dtype, values.dtype))


def frontier(ref_logps: Tensor, rewards: Tensor, betas: Sequence[float]) -> Frontier:
    """Trace the reward-KL frontier: what reward the tilt earns and what KL from the reference it pays.

        kl(beta) = KL(pi*_beta || p),    reward(beta) = E_{pi*_beta} r

    Differentiable.

    Args:
        ref_logps: Reference log-probabilities, shape (..., K), normalised.
        rewards: Reward of each outcome, shape (..., K), floating; -inf excludes an outcome.
        betas: Temperatures, each > 0, or a tensor of them that broadcasts against the batch dimensions.

    Returns:
        `Frontier(kl, reward)`, each of shape (..., len(betas)).

    Raises:
        TypeError: `ref_logps` or `rewards` is not a floating tensor.
        ValueError: as for `tilt`, or `betas` is empty.

    Source: book, `tilt-path`.
    """
    with _checks.together():
        if len(betas) == 0:
            raise ValueError("betas must hold at least one temperature, got none")
        ref = _checks.law("ref_logps", ref_logps)
        _checks.rewards("rewards", rewards)
        dtype = torch.promote_types(ref_logps.dtype, rewards.dtype)
        laws = [tilt(ref, rewards, beta) for beta in betas]
        return Frontier(
            torch.stack([kl(law, ref) for law in laws], -1).to(dtype),
            torch.stack([expectation(law, rewards) for law in laws], -1).to(dtype),
        )


def _pair(logps_p: Tensor, logps_q: Tensor) -> tuple[Tensor, Tensor, torch.dtype]:
    """Check two laws; return them in float64, and the dtype of the answer."""
    with _checks.together():
        p, q = _checks.law("logps_p", logps_p), _checks.law("logps_q", logps_q)
        _checks.same_outcomes("logps_p", logps_p, "logps_q", logps_q)
        return p, q, torch.promote_types(logps_p.dtype, logps_q.dtype)


def kl(logps_p: Tensor, logps_q: Tensor) -> Tensor:
    """Compute the Kullback-Leibler divergence in nats.

        KL(p || q) = sum_y p(y) log(p(y) / q(y)),    0 log 0 = 0;  +inf if p has mass where q has none

    Differentiable; a term that is +inf has gradient 0.

    Args:
        logps_p: Log-probabilities of p, shape (..., K), normalised.
        logps_q: Log-probabilities of q, shape (..., K), normalised.

    Returns:
        KL(p || q) in nats, shape (...), >= 0 up to rounding.

    Raises:
        TypeError: an argument is not a floating tensor.
        ValueError: a law that is not normalised, or shapes that do not fit.
    """
    p, q, dtype = _pair(logps_p, logps_q)
    # Mask before the product: a masked product of 0 and inf would still have gradient NaN.
    escaped = (p > -math.inf) & (q == -math.inf)
    log_ratio = torch.where((p > -math.inf) & ~escaped, p - q, 0)
    return torch.where(escaped, math.inf, p.exp() * log_ratio).sum(-1).to(dtype)


def total_variation(logps_p: Tensor, logps_q: Tensor) -> Tensor:
    """Compute the total variation distance: the largest difference that any event can show.

        TV(p, q) = (1/2) sum_y |p(y) - q(y)|,    between 0 and 1

    Differentiable where p(y) and q(y) differ; where they are equal the gradient counts as 0.

    Args:
        logps_p: Log-probabilities of p, shape (..., K), normalised.
        logps_q: Log-probabilities of q, shape (..., K), normalised.

    Returns:
        TV(p, q), shape (...).

    Raises:
        TypeError: an argument is not a floating tensor.
        ValueError: a law that is not normalised, or shapes that do not fit.
    """
    p, q, dtype = _pair(logps_p, logps_q)
    return ((p.exp() - q.exp()).abs().sum(-1) / 2).to(dtype)


def chi_square(logps_p: Tensor, logps_q: Tensor) -> Tensor:
    """Compute the chi-square divergence.

        chi2(p || q) = sum_y (p(y) - q(y))^2 / q(y),    +inf if p has mass where q has none

    For p the tilt of q it is the squared coefficient of variation of the tilt weights. Differentiable; a term that is
    +inf has gradient 0.

    Args:
        logps_p: Log-probabilities of p, shape (..., K), normalised.
        logps_q: Log-probabilities of q, shape (..., K), normalised.

    Returns:
        chi2(p || q), shape (...), >= 0.

    Raises:
        TypeError: an argument is not a floating tensor.
        ValueError: a law that is not normalised, or shapes that do not fit.
    """
    p, q, dtype = _pair(logps_p, logps_q)
    # What is infinite, or leaves float64, and what neither law has is masked at the input: its gradient would be NaN.
    escaped = 2 * p - q > _LOG_LARGEST
    inside = (q > -math.inf) & ~escaped
    p, q = torch.where(inside, p, 0), torch.where(inside, q, 0)
    log_ratio = p - q
    half = q / 2
    # (p - q) / sqrt(q): expm1 keeps the digits of nearby laws, the plain difference does not overflow for distant ones.
    near = half.exp() * torch.expm1(log_ratio.clamp(max=1))
    scaled = torch.where(log_ratio < 1, near, (p - half).exp() - half.exp())
    return torch.where(escaped, math.inf, scaled**2).sum(-1).to(dtype)


def sample(logps: Tensor, n: int, *, generator: torch.Generator) -> Tensor:
    """Draw independent outcomes by inverting the cumulative distribution.

        Y = the first y with cdf(y) > U,    U uniform on [0, 1)

    The CDF and the uniforms are float64 whatever the input, so an outcome of probability 0 is never drawn. From the
    same uniforms processors draw the same, but where U lies within the rounding of the CDF, about 1e-16 a term: its
    sums are added in another order on each, on a GPU perhaps on each run. Generators of two kinds of device give
    different uniforms. Cost O(K + n log K) per row.

    Args:
        logps: Log-probabilities, shape (..., K), normalised.
        n: Number of draws per row, >= 1.
        generator: Source of randomness, on the device of `logps`.

    Returns:
        Outcome indices, int64, shape (..., n).

    Raises:
        TypeError: `logps` is not a floating tensor, `n` not an int, or `generator` not a torch.Generator.
        ValueError: `logps` not normalised, or `n` < 1.
    """
    _checks.logps("logps", logps)
    _checks.count("n", n)
    _checks.generator("generator", generator)
    u = torch.rand((*logps.shape[:-1], int(n)), generator=generator, device=logps.device, dtype=torch.float64)
    return _numerics.search(_numerics.cdf(logps), u)
