"""A law on finitely many outcomes: its exponential tilt, its divergences, and exact draws.

A law is a tensor of normalised natural-log probabilities; the last dimension runs over outcomes, every dimension
before it is a batch. An outcome of probability 0 has log-probability -inf.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from tiltlib import _checks

__all__ = [
    "AliasTable",
    "Frontier",
    "alias_table",
    "chi_square",
    "expectation",
    "frontier",
    "kl",
    "log_partition",
    "sample",
    "sample_alias",
    "tilt",
    "total_variation",
]


class Frontier(NamedTuple):
    """Points of the reward-KL frontier, one per temperature.

    Attributes:
        kl: KL of each tilt from the reference in nats, shape (..., number of temperatures).
        reward: Mean reward under each tilt, same shape.
    """

    kl: Tensor
    reward: Tensor


class AliasTable(NamedTuple):
    """Walker's alias table: column k holds outcome k up to a threshold and another outcome above it.

    Attributes:
        threshold: Share of column k that belongs to outcome k, in [0, 1], float64, shape (K,).
        other: Outcome that has the rest of column k, int64, shape (K,).
    """

    threshold: Tensor
    other: Tensor


def _log_tilt_weights(ref_logps: Tensor, rewards: Tensor, beta: float | Tensor) -> tuple[Tensor, Tensor]:
    """Return log(p w) shifted by the largest log w of the support, and that shift."""
    _checks.logps("ref_logps", ref_logps)
    _checks.rewards("rewards", rewards)
    _checks.same_outcomes("ref_logps", ref_logps, "rewards", rewards)
    _checks.positive_per_row("beta", beta, torch.broadcast_shapes(ref_logps.shape, rewards.shape)[:-1])
    temperature = beta.unsqueeze(-1) if isinstance(beta, Tensor) else beta
    supported = torch.where(ref_logps > -math.inf, rewards, -math.inf)
    top = supported.amax(-1, keepdim=True)
    _checks.some_left("rewards", top)
    # Shift before dividing: r / beta may overflow for small beta, (r - max r) / beta only underflows to weight 0.
    return ref_logps + (supported - top) / temperature, (top / temperature).squeeze(-1)


def tilt(ref_logps: Tensor, rewards: Tensor, beta: float | Tensor) -> Tensor:
    """Tilt a reference law by exp(reward / beta).

        log pi*(y) = log p(y) + r(y) / beta - log Z,    Z = sum_y p(y) exp(r(y) / beta)

    Differentiable in `ref_logps` and `rewards`. Cost O(K) per row.

    Args:
        ref_logps: Reference log-probabilities, shape (..., K), normalised.
        rewards: Reward of each outcome, shape (..., K), floating; -inf excludes an outcome.
        beta: Temperature in reward units, > 0; small is greedy, large stays at the reference. A tensor broadcasts
            against the batch dimensions.

    Returns:
        Log-probabilities of the tilted law, shape (..., K).

    Raises:
        TypeError: `ref_logps` or `rewards` is not a floating tensor.
        ValueError: `ref_logps` not normalised, `rewards` with NaN or +inf or excluding the whole support, `beta` not
            finite and > 0, or shapes that do not fit.

    Source: [jiao2025]; book chapter 1, `gibbs-principle`.
    """
    return torch.log_softmax(_log_tilt_weights(ref_logps, rewards, beta)[0], -1)


def log_partition(ref_logps: Tensor, rewards: Tensor, beta: float | Tensor) -> Tensor:
    """Compute the log normaliser of the tilt.

        log Z = log sum_y p(y) exp(r(y) / beta)

    beta log Z is the largest value of E r - beta KL(pi || p). Differentiable. Cost O(K) per row.

    Args:
        ref_logps: Reference log-probabilities, shape (..., K), normalised.
        rewards: Reward of each outcome, shape (..., K), floating; -inf excludes an outcome.
        beta: Temperature in reward units, > 0. A tensor broadcasts against the batch dimensions.

    Returns:
        log Z, shape (...).

    Raises:
        TypeError: `ref_logps` or `rewards` is not a floating tensor.
        ValueError: as for `tilt`.

    Source: [jiao2025]; book chapter 1, `gibbs-principle`.
    """
    log_weights, shift = _log_tilt_weights(ref_logps, rewards, beta)
    return torch.logsumexp(log_weights, -1) + shift


def expectation(logps: Tensor, values: Tensor) -> Tensor:
    """Average a function over a law.

        E f = sum_y p(y) f(y),    outcomes of probability 0 do not count, whatever f says there

    Differentiable.

    Args:
        logps: Log-probabilities, shape (..., K), normalised.
        values: Values of the function, shape (..., K), floating.

    Returns:
        The mean, shape (...).

    Raises:
        TypeError: an argument is not a floating tensor.
        ValueError: `logps` not normalised, or shapes that do not fit.
    """
    _checks.logps("logps", logps)
    _checks.tensor("values", values)
    _checks.same_outcomes("logps", logps, "values", values)
    # Mask before the product: a masked product of 0 and inf would still have gradient NaN.
    return (logps.exp() * torch.where(logps > -math.inf, values, 0)).sum(-1)


def frontier(ref_logps: Tensor, rewards: Tensor, betas: Sequence[float]) -> Frontier:
    """Trace the reward-KL frontier: what reward the tilt earns and what KL from the reference it pays.

        kl(beta) = KL(pi*_beta || p),    reward(beta) = E_{pi*_beta} r

    Args:
        ref_logps: Reference log-probabilities, shape (..., K), normalised.
        rewards: Reward of each outcome, shape (..., K), floating; -inf excludes an outcome.
        betas: Temperatures, each > 0.

    Returns:
        `Frontier(kl, reward)`, each of shape (..., len(betas)).

    Raises:
        TypeError: `ref_logps` or `rewards` is not a floating tensor.
        ValueError: as for `tilt`, or `betas` is empty.

    Source: book chapter 1, `tilt-path`.
    """
    if len(betas) == 0:
        raise ValueError("betas must hold at least one temperature, got none")
    laws = [tilt(ref_logps, rewards, beta) for beta in betas]
    return Frontier(
        torch.stack([kl(law, ref_logps) for law in laws], -1),
        torch.stack([expectation(law, rewards) for law in laws], -1),
    )


def _pair(logps_p: Tensor, logps_q: Tensor) -> None:
    _checks.logps("logps_p", logps_p)
    _checks.logps("logps_q", logps_q)
    _checks.same_outcomes("logps_p", logps_p, "logps_q", logps_q)


def kl(logps_p: Tensor, logps_q: Tensor) -> Tensor:
    """Compute the Kullback-Leibler divergence in nats.

        KL(p || q) = sum_y p(y) log(p(y) / q(y)),    0 log 0 = 0;  +inf if p has mass where q has none

    Differentiable.

    Args:
        logps_p: Log-probabilities of p, shape (..., K), normalised.
        logps_q: Log-probabilities of q, shape (..., K), normalised.

    Returns:
        KL(p || q) in nats, shape (...), >= 0 up to rounding.

    Raises:
        TypeError: an argument is not a floating tensor.
        ValueError: a law that is not normalised, or shapes that do not fit.
    """
    _pair(logps_p, logps_q)
    # Mask before the product: a masked product of 0 and inf would still have gradient NaN.
    return (logps_p.exp() * torch.where(logps_p > -math.inf, logps_p - logps_q, 0)).sum(-1)


def total_variation(logps_p: Tensor, logps_q: Tensor) -> Tensor:
    """Compute the total variation distance: the largest difference that any event can show.

        TV(p, q) = (1/2) sum_y |p(y) - q(y)|,    between 0 and 1

    Args:
        logps_p: Log-probabilities of p, shape (..., K), normalised.
        logps_q: Log-probabilities of q, shape (..., K), normalised.

    Returns:
        TV(p, q), shape (...).

    Raises:
        TypeError: an argument is not a floating tensor.
        ValueError: a law that is not normalised, or shapes that do not fit.
    """
    _pair(logps_p, logps_q)
    return (logps_p.exp() - logps_q.exp()).abs().sum(-1) / 2


def chi_square(logps_p: Tensor, logps_q: Tensor) -> Tensor:
    """Compute the chi-square divergence.

        chi2(p || q) = sum_y (p(y) - q(y))^2 / q(y),    +inf if p has mass where q has none

    For p the tilt of q it is the squared coefficient of variation of the tilt weights.

    Args:
        logps_p: Log-probabilities of p, shape (..., K), normalised.
        logps_q: Log-probabilities of q, shape (..., K), normalised.

    Returns:
        chi2(p || q), shape (...), >= 0.

    Raises:
        TypeError: an argument is not a floating tensor.
        ValueError: a law that is not normalised, or shapes that do not fit.
    """
    _pair(logps_p, logps_q)
    log_ratio = logps_p - logps_q
    half = logps_q / 2
    # (p - q) / sqrt(q): expm1 keeps the digits of nearby laws, the plain difference does not overflow for distant ones.
    near = half.exp() * torch.expm1(log_ratio.clamp(max=1))
    scaled = torch.where(log_ratio < 1, near, (logps_p - half).exp() - half.exp())
    escaped = (logps_q == -math.inf) & (logps_p > -math.inf)
    return torch.where(logps_q > -math.inf, scaled**2, torch.where(escaped, math.inf, 0)).sum(-1)


def sample(logps: Tensor, n: int, *, generator: torch.Generator) -> Tensor:
    """Draw independent outcomes by inverting the cumulative distribution.

        Y = the first y with cdf(y) > U,    U uniform on [0, 1)

    The CDF and the uniforms are float64 whatever the input, so an outcome of probability 0 is never drawn and the
    draws are the same on every processor. Cost O(K + n log K) per row.

    Args:
        logps: Log-probabilities, shape (..., K), normalised.
        n: Number of draws per row, >= 1.
        generator: Source of randomness, on the device of `logps`.

    Returns:
        Outcome indices, int64, shape (..., n).

    Raises:
        TypeError: `logps` is not a floating tensor, or `n` is not an int.
        ValueError: `logps` not normalised, or `n` < 1.
    """
    _checks.logps("logps", logps)
    _checks.count("n", n)
    cdf = logps.double().exp().cumsum(-1)
    cdf = cdf / cdf[..., -1:]
    u = torch.rand((*logps.shape[:-1], n), generator=generator, device=logps.device, dtype=torch.float64)
    return torch.searchsorted(cdf, u, right=True)


def alias_table(logps: Tensor) -> AliasTable:
    """Build Walker's alias table of one law, for many fast draws with `sample_alias`.

    K columns of equal width 1/K; column k holds outcome k up to `threshold[k]` and outcome `other[k]` above it.
    Cost O(K), once.

    Args:
        logps: Log-probabilities, shape (K,), normalised.

    Returns:
        `AliasTable(threshold, other)`: float64 and int64, shape (K,), on the device of `logps`.

    Raises:
        TypeError: `logps` is not a floating tensor.
        ValueError: `logps` not normalised or not one-dimensional.

    Source: [walker1977].
    """
    _checks.logps("logps", logps)
    if logps.ndim != 1:
        raise ValueError(f"logps must have shape (K,), got {tuple(logps.shape)}")
    probs = logps.double().exp()
    k = len(probs)
    threshold = (probs * (k / probs.sum())).tolist()
    other = list(range(k))
    small = [i for i in range(k) if threshold[i] < 1]
    large = [i for i in range(k) if threshold[i] >= 1]
    while small and large:
        short, long = small.pop(), large[-1]
        other[short] = long
        threshold[long] -= 1 - threshold[short]
        if threshold[long] < 1:
            small.append(large.pop())
    # The columns left add up to their number, so each differs from a full one by rounding only.
    for i in small + large:
        threshold[i] = 1.0
    return AliasTable(
        torch.tensor(threshold, dtype=torch.float64, device=logps.device), torch.tensor(other, device=logps.device)
    )


def sample_alias(table: AliasTable, n: int, *, generator: torch.Generator) -> Tensor:
    """Draw independent outcomes from an alias table: one uniform and two look-ups each.

        k = floor(K U),    Y = k if frac(K U) < threshold[k] else other[k]

    Args:
        table: From `alias_table`.
        n: Number of draws, >= 1.
        generator: Source of randomness, on the device of the table.

    Returns:
        Outcome indices, int64, shape (n,).

    Raises:
        TypeError: `n` is not an int.
        ValueError: `n` < 1.

    Source: [walker1977].
    """
    _checks.count("n", n)
    k = len(table.threshold)
    u = torch.rand(n, generator=generator, device=table.threshold.device, dtype=torch.float64).mul_(k)
    column = u.int()
    moved = u.frac_() >= table.threshold.index_select(0, column)
    # One look-up in (own outcomes, other outcomes): torch.where on a random mask costs several times as much.
    outcomes = torch.cat([torch.arange(k, device=u.device), table.other])
    return outcomes.index_select(0, column.add_(moved, alpha=k))
