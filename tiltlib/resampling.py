"""Resampling: turn weights into indices, with or without replacement, and accept or reject by weight.

Four schemes with replacement share one signature, `scheme(log_weights, n, generator=g)`, and return `ancestors`, the
index that each of n places takes. All are unbiased: index i is expected n W_i times, W the normalised weights.

    multinomial    n independent draws: the law of the places is exactly W, each on its own
    residual       floor(n W_i) copies for sure, the rest multinomial
    stratified     one uniform in each of n equal strata: index i gets n W_i copies, give or take less than 2
    systematic     one uniform for all strata: index i gets floor(n W_i) or ceil(n W_i) copies; least noise, fastest

`gumbel_top_k` draws without replacement. Its first item has law W; its set has no law proportional to a tilt.
`rejection` keeps each sample on its own, with exactly the tilted law if the bound on the reward holds.

All is computed in float64, whatever the dtype of the weights. A batch dimension of size 0 gives an empty result. Cost
O(N + n) per row, without a search and without a loop over rows: the cumulative offspring counts are marked on the
places, and a running sum of the marks is the ancestor of each place.
"""

import math

import torch
from torch import Tensor

from tiltlib import _checks, _numerics, categorical

__all__ = ["gumbel_top_k", "multinomial", "rejection", "residual", "stratified", "systematic"]


def _checked(log_weights: Tensor, n: int, generator: torch.Generator) -> Tensor:
    """Check the arguments that all share; return the log weights in float64, before anything is added up."""
    _checks.generator("generator", generator)
    _checks.count("n", n)
    _checks.log_weights("log_weights", log_weights)
    return log_weights.detach().double()


def _cumulative(probs: Tensor) -> Tensor:
    """Turn probabilities, in place, into sums that end at 1.

    The last index with weight and all after it get 1 whatever rounding says. In place, since for a million weights
    fetching new memory takes longer than the arithmetic.
    """
    cdf = probs.cumsum_(-1)
    return cdf.div_(cdf[..., -1:].clone())


def _ancestors(through: Tensor, n: int) -> Tensor:
    """Turn cumulative offspring counts into ancestors: place k belongs to the number of counts that are <= k."""
    marks = torch.zeros((*through.shape[:-1], n + 1), dtype=torch.int64, device=through.device)
    ends = through[..., :-1]
    marks.scatter_add_(-1, ends, marks.new_ones(()).expand(ends.shape))
    return marks.cumsum_(-1)[..., :n]


def systematic(log_weights: Tensor, n: int, *, generator: torch.Generator) -> Tensor:
    """Resample with one uniform per row.

        place k takes the first i with cdf(i) > (k + U) / n,    U uniform on [0, 1)

    Ancestors ascend, so places are not exchangeable: shuffle them if their order matters. Not differentiable.

    Args:
        log_weights: Unnormalised natural-log weights, shape (..., N), floating; -inf excludes an index.
        n: Number of places per row, >= 1.
        generator: Source of randomness, on the device of `log_weights`.

    Returns:
        Ancestors, indices in 0..N-1, int64, shape (..., n), ascending.

    Raises:
        TypeError: `log_weights` is not a floating tensor, `n` is not an int, or `generator` is no generator.
        ValueError: `log_weights` has NaN, +inf, or a row that is all -inf, or `n` < 1.

    Source: [carpenter1999], [douc2005]; book, `resampling-law` and `diversity`.
    """
    cdf = _cumulative(torch.softmax(_checked(log_weights, n, generator), -1))
    u = torch.rand((*cdf.shape[:-1], 1), generator=generator, device=cdf.device, dtype=torch.float64)
    # n - u must not round to n - 1: the last place would go past the last index with weight.
    u.clamp_(max=n - math.nextafter(n - 1, n))
    # Places below n cdf(i) - U belong to an index up to i.
    through = cdf.mul_(n).sub_(u).ceil_().clamp_(0, n).long()
    return _ancestors(through, n)


def stratified(log_weights: Tensor, n: int, *, generator: torch.Generator) -> Tensor:
    """Resample with one uniform per place, each in its own stratum.

        place k takes the first i with cdf(i) > (k + U_k) / n,    U_k independent, uniform on [0, 1)

    Ancestors ascend, so places are not exchangeable: shuffle them if their order matters. Not differentiable.

    Args:
        log_weights: Unnormalised natural-log weights, shape (..., N), floating; -inf excludes an index.
        n: Number of places per row, >= 1.
        generator: Source of randomness, on the device of `log_weights`.

    Returns:
        Ancestors, indices in 0..N-1, int64, shape (..., n), ascending.

    Raises:
        TypeError: `log_weights` is not a floating tensor, `n` is not an int, or `generator` is no generator.
        ValueError: `log_weights` has NaN, +inf, or a row that is all -inf, or `n` < 1.

    Source: [kitagawa1996], [douc2005]; book, `resampling-law`.
    """
    cdf = _cumulative(torch.softmax(_checked(log_weights, n, generator), -1))
    u = torch.rand((*cdf.shape[:-1], n), generator=generator, device=cdf.device, dtype=torch.float64)
    reach = n * cdf
    stratum = reach.floor().clamp(max=n)
    # All strata below are passed; the one that cdf(i) cuts is passed if its uniform lies below the cut.
    cut = u.gather(-1, stratum.long().clamp(max=n - 1)) < reach - stratum
    return _ancestors((stratum + cut).long().clamp(max=n), n)


def multinomial(log_weights: Tensor, n: int, *, generator: torch.Generator) -> Tensor:
    """Resample by independent draws: the noisiest scheme, and the only one whose places are independent.

        P(ancestor = i) = W_i    for each place on its own

    Not differentiable.

    Args:
        log_weights: Unnormalised natural-log weights, shape (..., N), floating; -inf excludes an index.
        n: Number of places per row, >= 1.
        generator: Source of randomness, on the device of `log_weights`.

    Returns:
        Ancestors, indices in 0..N-1, int64, shape (..., n), in random order.

    Raises:
        TypeError: `log_weights` is not a floating tensor, `n` is not an int, or `generator` is no generator.
        ValueError: `log_weights` has NaN, +inf, or a row that is all -inf, or `n` < 1.

    Source: [gordon1993]; book, `resampling-law` and `diversity`.
    """
    logps = torch.log_softmax(_checked(log_weights, n, generator), -1)
    with _checks.trusted():
        return categorical.sample(logps, n, generator=generator)


def residual(log_weights: Tensor, n: int, *, generator: torch.Generator) -> Tensor:
    """Resample with floor(n W_i) certain copies of each index, and independent draws for the places left.

        counts_i = floor(n W_i) + Multinomial(R, (n W_i - floor(n W_i)) / R),    R = n - sum_i floor(n W_i)

    Not differentiable.

    Args:
        log_weights: Unnormalised natural-log weights, shape (..., N), floating; -inf excludes an index.
        n: Number of places per row, >= 1.
        generator: Source of randomness, on the device of `log_weights`.

    Returns:
        Ancestors, indices in 0..N-1, int64, shape (..., n): the certain copies ascending, then the drawn ones.

    Raises:
        TypeError: `log_weights` is not a floating tensor, `n` is not an int, or `generator` is no generator.
        ValueError: `log_weights` has NaN, +inf, or a row that is all -inf, or `n` < 1.

    Source: [liu1998], [douc2005]; book, `resampling-law`.
    """
    probs = torch.softmax(_checked(log_weights, n, generator), -1)
    expected = n * probs
    # A product that should be whole may round to just below it: a billionth of a copy is none to draw for.
    sure = (expected + 1e-9 * (1 + expected)).floor()
    left = (expected - sure).clamp(min=0)
    through = sure.cumsum(-1).long()
    total = through[..., -1:]
    certain = _ancestors(through, n)
    # A row without anything left draws from its weights; those draws are not used.
    spare = torch.where((left.sum(-1, keepdim=True) > 0) & (total < n), left, probs)
    with _checks.trusted():
        drawn = categorical.sample(torch.log_softmax(spare.log(), -1), n, generator=generator)
    place = torch.arange(n, device=probs.device)
    return torch.where(place < total, certain, drawn)


def gumbel_top_k(log_weights: Tensor, n: int, *, generator: torch.Generator) -> Tensor:
    """Draw n different indices, one after the other, each with probability proportional to weight among those left.

        keep the n largest of log w_i - log(-log U_i),    U_i uniform on (0, 1)

    This is the Plackett-Luce law. Only the first index has the normalised weights as its law; taking all N of them is
    no selection at all. Not differentiable.

    Args:
        log_weights: Unnormalised natural-log weights, shape (..., N), floating; -inf excludes an index.
        n: Number of indices per row, >= 1 and at most the number of indices with positive weight.
        generator: Source of randomness, on the device of `log_weights`.

    Returns:
        Indices in the order drawn, int64, shape (..., n).

    Raises:
        TypeError: `log_weights` is not a floating tensor, `n` is not an int, or `generator` is no generator.
        ValueError: `log_weights` has NaN, +inf, or a row that is all -inf; `n` < 1; or fewer than `n` indices of
            positive weight.

    Source: [yellott1977], [kool2019b]; book, `without-replacement`.
    """
    with _checks.together():
        logps = torch.log_softmax(_checked(log_weights, n, generator), -1)
        possible = logps > -math.inf

        def error(fewest: float, most: float) -> ValueError:
            return ValueError(f"n must be at most the number of indices with positive weight, {int(fewest)}, got {n}")

        if n > possible.shape[-1] and not possible.numel():
            raise error(possible.shape[-1], 0)
        _checks.require(possible.sum(-1), n, math.inf, error)
        # u lies in (0, 1], so that no key is -inf but those of excluded indices; u = 1 gives +inf, there -inf + inf.
        u = 1 - torch.rand(logps.shape, generator=generator, device=logps.device, dtype=torch.float64)
        keys = torch.where(possible, logps - torch.log(-torch.log(u)), -math.inf)
        return torch.topk(keys, n, dim=-1).indices


def rejection(rewards: Tensor, beta: float | Tensor, max_reward: float, *, generator: torch.Generator) -> Tensor:
    """Decide for each sample of the reference, on its own, whether to keep it.

        P(keep y) = exp((min(r(y), max_reward) - max_reward) / beta)

    Kept samples are independent draws of the tilt iff `max_reward` is at least the essential supremum of the reward;
    otherwise of the tilt by min(r, max_reward). The mean number kept is Z exp(-max_reward / beta) per sample.

    Args:
        rewards: Reward of each sample, any shape, floating; -inf is never kept.
        beta: Temperature in reward units, > 0: a number, or a tensor that broadcasts to the shape of `rewards`.
        max_reward: Bound on the reward, finite.
        generator: Source of randomness, on the device of `rewards`.

    Returns:
        True where the sample is kept, boolean, shape of `rewards`.

    Raises:
        TypeError: `rewards` is not a floating tensor, `beta` or `max_reward` no number, or `generator` no generator.
        ValueError: `rewards` with NaN or +inf, `beta` not finite and > 0, or `max_reward` not finite.

    Source: [vonneumann1951]; book, `rejection`.
    """
    with _checks.together():
        _checks.generator("generator", generator)
        _checks.floating("rewards", rewards)
        _checks.not_above("rewards", rewards)
        _checks.positive_per_row("beta", beta, rewards.shape)
        if isinstance(beta, Tensor):
            _checks.fits("beta", beta, rewards)
        _checks.number("max_reward", max_reward)
        if not -math.inf < max_reward < math.inf:
            raise ValueError(f"max_reward must be finite, got {max_reward!r}")
        # Halves are exact, and their difference does not overflow.
        bound = max_reward / 2
        log_keep = (rewards.double() / 2).clamp(max=bound).sub(bound) / _numerics.double(beta) * 2
        return (
            torch.rand(rewards.shape, generator=generator, device=rewards.device, dtype=torch.float64) < log_keep.exp()
        )
