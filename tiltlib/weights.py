"""Log-space weights: normalise, average, effective sample size, and the temperature for a wanted one.

Unnormalised log weights are the currency of this package. A weight of -inf is a candidate that is excluded.
All is computed in float64, whatever the dtype of the input, and rounded once at the end.
"""

import math

import torch
from torch import Tensor

from tiltlib import _checks

__all__ = ["beta_for_ess", "ess", "log_mean", "normalize"]


def _shifted(name: str, log_weights: Tensor) -> Tensor:
    """Check log weights and return them in float64, shifted so that the largest of each row is 0."""
    _checks.log_weights(name, log_weights)
    return log_weights.double() - log_weights.detach().amax(-1, keepdim=True).double()


def _count_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype for numbers that half precision could not hold, such as a count of 10^5."""
    return torch.promote_types(dtype, torch.float32)


def normalize(log_weights: Tensor) -> Tensor:
    """Turn unnormalised log weights into log-probabilities.

        log W_i = log w_i - log sum_j w_j

    Differentiable. Cost O(N) per row.

    Args:
        log_weights: Unnormalised natural-log weights, shape (..., N), floating; -inf excludes an entry.

    Returns:
        Normalised log weights, same shape and dtype; -inf too where they lie below the range of the dtype.

    Raises:
        TypeError: `log_weights` is not a floating tensor.
        ValueError: `log_weights` has NaN, +inf, or a row that is all -inf.
    """
    _checks.log_weights("log_weights", log_weights)
    return torch.log_softmax(log_weights.double(), -1).to(log_weights.dtype)


def log_mean(log_weights: Tensor) -> Tensor:
    """Average weights in log space: the importance-sampling estimate of a log partition function.

        log ((1/N) sum_i w_i)

    The mean of its exponential is the partition function; the mean of this logarithm is below it. Differentiable.

    Args:
        log_weights: Unnormalised natural-log weights, shape (..., N), floating; -inf counts as weight 0.

    Returns:
        Log of the mean weight, shape (...), same dtype.

    Raises:
        TypeError: `log_weights` is not a floating tensor.
        ValueError: `log_weights` has NaN, +inf, or a row that is all -inf.
    """
    _checks.log_weights("log_weights", log_weights)
    mean = torch.logsumexp(log_weights.double(), -1) - math.log(log_weights.shape[-1])
    return mean.to(log_weights.dtype)


def ess(log_weights: Tensor) -> Tensor:
    """Count how many equal weights would give the same estimator variance.

        ESS = (sum_i w_i)^2 / sum_i w_i^2        between 1 and N

    It prices the variance of a weighted mean, not the distance between laws (book, `effective-sample-size`).
    Differentiable.

    Args:
        log_weights: Unnormalised natural-log weights, shape (..., N), floating; -inf counts as weight 0.

    Returns:
        Effective sample size per row, shape (...), in [1, N] up to rounding; in the dtype of the input, but float32 for
        half precision, which cannot hold a count above 65504 or to the unit.

    Raises:
        TypeError: `log_weights` is not a floating tensor.
        ValueError: `log_weights` has NaN, +inf, or a row that is all -inf.

    Source: [kong1992]; book, `tilt-path`.
    """
    shifted = _shifted("log_weights", log_weights)
    size = torch.exp(2 * torch.logsumexp(shifted, -1) - torch.logsumexp(2 * shifted, -1))
    return size.to(_count_dtype(log_weights.dtype))


def beta_for_ess(rewards: Tensor, fraction: float, *, ties: str = "raise") -> Tensor:
    """Find the temperature at which the tilt weights keep a wanted fraction of the sample.

        ESS(exp(r / beta)) / N = fraction

    The left side grows with beta: with eta = 1/beta, d log ESS / d eta = 2 (mu(eta) - mu(2 eta)) <= 0, where mu is the
    weighted mean reward. So the solution is unique, and Newton's method, kept inside a bracket, finds it to the last
    bits. Not differentiable: the result carries no graph. Cost O(N) per step, about ten steps.

    Args:
        rewards: Reward of each sample, shape (..., N), floating; -inf excludes a sample.
        fraction: Wanted ESS / N, between 0 and 1. A row attains it if it lies strictly between (number of maximal
            rewards) / N, the limit for beta to 0, and (number of finite rewards) / N, the limit for beta to infinity.
        ties: What becomes of a row that does not attain it, as when all its rewards tie: "raise" refuses the batch,
            "clamp" gives that row the limit, the smallest normal number of the dtype of the result where the fraction
            is at or below the lower limit, else the largest number. Both are legal temperatures: greedy, and uniform.

    Returns:
        Temperature per row, shape (...), in reward units; in the dtype of the input, but float32 for half precision.

    Raises:
        TypeError: `rewards` is not a floating tensor, or `fraction` not a number.
        ValueError: `rewards` has NaN, +inf or a row that is all -inf; `fraction` is not strictly between 0 and 1, or,
            with `ties="raise"`, not attainable for some row; or `ties` is another word.

    Example:
        >>> rewards = torch.tensor([0.0, 0.3, 0.5, 1.0, 2.0], dtype=torch.float64)
        >>> beta = beta_for_ess(rewards, 0.5)  # half of the sample should be left
        >>> round(beta.item(), 4), round(ess(rewards / beta).item() / 5, 4)
        (0.8367, 0.5)

    Source: book, `tilt-path`; book, `diversity`.
    """
    with _checks.together():
        shifted = _shifted("rewards", rewards.detach() if isinstance(rewards, Tensor) else rewards)
        _checks.one_of("ties", ties, ("raise", "clamp"))
        _checks.number("fraction", fraction)
        n, fraction = shifted.shape[-1], float(fraction)
        low = (shifted == 0).sum(-1).double() / n
        high = (shifted > -math.inf).sum(-1).double() / n
        attained = (low < fraction) & (fraction < high)
        if ties == "raise":
            _checks.holds(
                attained,
                lambda: ValueError(
                    f"fraction must lie strictly between {low.max().item()!r} (only maximal rewards kept) and "
                    f"{high.min().item()!r} (all rewards kept), got {fraction!r}"
                ),
            )
    if not 0 < fraction < 1:
        raise ValueError(f"fraction must lie strictly between 0 and 1, got {fraction!r}")
    # In units of the largest gap, eta lies between e^-80, where all weights are equal to rounding, and e^80 over the
    # smallest gap, where all but the maximal ones have underflowed. A row whose rewards all tie has no gap.
    below = torch.where((shifted < 0) & (shifted > -math.inf), shifted, math.nan)
    gap = -below.nan_to_num(nan=0.0).amin(-1, keepdim=True)
    smallest = -below.nan_to_num(nan=-math.inf).amax(-1, keepdim=True)
    gap, smallest = torch.where(gap > 0, gap, 1), torch.where(gap > 0, smallest, 1)
    # Excluded samples get a distance that no temperature forgives, since -inf * 0 is NaN.
    scaled = (shifted / gap).clamp_(min=-1e300)
    wanted = torch.where(attained, (high / fraction).log(), math.nan)
    eta = _eta_for_loss(scaled, wanted, high.log() + math.log(n), 80.0 + (gap / smallest).log()[..., 0])
    beta = torch.where(attained, gap[..., 0] / eta, torch.where(low < fraction, math.inf, 0.0))
    dtype = _count_dtype(rewards.dtype)
    # Within the normal numbers of the dtype, so that what is returned is a legal temperature everywhere.
    return beta.clamp(torch.finfo(dtype).tiny, torch.finfo(dtype).max).to(dtype)


def _eta_for_loss(scaled: Tensor, wanted: Tensor, log_n: Tensor, upper: Tensor) -> Tensor:
    """Find the eta where log n - log ESS(exp(eta scaled)) is a wanted loss; rows that want NaN get anything.

    Newton's method on the logarithms of both: the loss is about eta^2 Var where it is small. A step that leaves the
    bracket, or is no shorter than half of the last one, gives way to bisection.
    """
    x, lower, moved = torch.zeros_like(upper), torch.full_like(upper, -80.0), torch.full_like(upper, math.inf)
    left, weight = wanted.isfinite(), torch.empty_like(scaled)
    while bool(left.any()):
        eta = x.exp()
        torch.mul(scaled, eta.unsqueeze(-1), out=weight).exp_()
        total, slope = weight.sum(-1), torch.linalg.vecdot(weight, scaled)
        weight.square_()
        squares = weight.sum(-1)
        loss = log_n - 2 * total.log() + squares.log()
        rate = 2 * eta * (torch.linalg.vecdot(weight, scaled) / squares - slope / total)
        lower, upper = torch.where(loss < wanted, x, lower), torch.where(loss < wanted, upper, x)
        step = (wanted / loss).log() * loss / rate
        newton = (lower <= x + step) & (x + step <= upper) & (2 * step.abs() <= moved)  # false for NaN
        step = torch.where(newton, step, (lower + upper) / 2 - x)
        x, moved = torch.where(left, x + step, x), step.abs()
        # The error after a step of Newton's is about the square of the step. A row that has arrived stays.
        rounding = 2.0**-50 * x.abs().clamp(min=1)
        left &= moved > torch.where(newton, 2.0**16 * rounding, rounding)
    return x.exp()
