"""Diffusion in one coordinate: levels of noise, samplers that differ in one step, and the loss that a score minimises.

A noised sample is x_t = alpha x_0 + sigma eps. In y = x_t / alpha, with the level of noise s = sigma / alpha, every
schedule is the same process, y = x_0 + s eps, so a score is a function `score(y, s)`: the gradient in y of the log
density of x_0 + s eps, for n points y and a number s. A point may be a vector, an image or anything else: y has shape
(n, ...), such as (n, D) or (n, C, H, W). What a schedule chooses is the levels that a sampler visits, from the largest
down; a run in x is a run in y, scaled by alpha at its two ends. `of_network` makes a score of a network that was
trained in x, to predict the noise, x_0 or v.

With D = y + s^2 score(y, s), the mean of x_0 given y, and lambda = -log s, the samplers of `sample` are

    method        one step, from level s to s'                                        calls  noise  order  also known as
    "euler"       D + (s'/s) (y - D)                                                    1     no     1     DDIM
    "heun"        trapezoid rule for dy/ds = -s score, first guess by "euler"           2     no     2     EDM
    "dpmpp_2m"    "euler" with D extrapolated linearly to lambda + h/2                  1     no     2     DPM++(2M)
    "ab3"         exact integral of the parabola in lambda through the last three D     1     no     3     DEIS
    "abm3"        "ab3", then again with the parabola through its D and the last two    1     no     3     UniPC
    "maruyama"    y + (1 + c^2)/2 (s^2 - s'^2) score + c sqrt(s^2 - s'^2) eps           1     yes    1     reverse SDE
    "ancestral"   D + (s'/s)^2 (y - D) + s' sqrt(1 - s'^2/s^2) eps                      1     yes    1     DDPM

where order is that of the Wasserstein distance in 1/n, for a smooth target on levels that stay above 0. "maruyama" has
the noise factor c = `churn`: at 1 it is the reverse SDE, at 0 the probability-flow ODE in the clock s^2. A sampler has
to start from the law at its first level; started elsewhere, an ODE keeps the error. The first step of "ab3" is "euler":
it leaves an error of order 2, times the squared ratio of the spread of x_0 to the first level, which is small. "abm3"
corrects each step but the last with the D at its end, which the next step needs anyway, and leaves no such error.

Points come back in the dtype that came in, whatever dtype the score returns; half precision is carried in float32, so
that small steps are not lost, and the score sees the dtype that came in. No points (n = 0) are no points.
"""

import itertools
import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Generator, Tensor

from tiltlib import _checks, _numerics
from tiltlib.mixtures import GaussianMixture

__all__ = [
    "NetworkScore",
    "Transition",
    "denoised",
    "denoising_loss",
    "draw",
    "evaluate",
    "geometric",
    "karras",
    "of_mixture",
    "of_network",
    "posterior_transition",
    "sample",
    "transition",
    "variance_preserving",
]

# score(y, s): gradient in y of the log density of x_0 + s eps. Only `denoising_loss` may pass a tensor of levels.
Level = Any
Score = Callable[[Tensor, Level], Tensor]
# network(x, t): what it predicts, in the shape of x, for the time index t of each point.
Network = Callable[[Tensor, Tensor], Tensor]
# step(score, y, s, s_next, generator): the points at the next level.
Step = Callable[[Score, Tensor, float, float, Generator | None], Tensor]

_ORDERS = {"euler": 1, "dpmpp_2m": 2, "ab3": 3, "abm3": 3}
_METHODS = ("euler", "heun", "dpmpp_2m", "ab3", "abm3", "maruyama", "ancestral")
# A parabola multiplies errors of D by 11/3 on a fine even grid, by up to 7 where steps are long, by more where they
# grow: past 5 for a growth of 1.2 per step. Below 16 steps of `karras` it helps on some targets and harms on others.
# A line does so by 1 + h / h1, which has no bound where the last level is tiny: past 5, a step 4 times the one before,
# D is not extrapolated at all, as for a last level of 0.
_LIMIT = 5.0
_FEW = 16
# A level is a trained one if its time index is this near to a whole number: levels in float32 are, by a wide margin,
# where neighbours differ by more than 0.1 percent.
_NEAR = 1e-4


class Transition(NamedTuple):
    """A step with Gaussian noise: N(mean, std^2 I).

    Attributes:
        mean: Mean of each next point, shape (n, ...).
        std: Standard deviation of each coordinate; 0 where the step draws no noise.
    """

    mean: Tensor
    std: float


class NetworkScore(NamedTuple):
    """What `of_network` returns.

    Attributes:
        score: The score function (y, s), at any level from the last of `levels` above 0 to the first.
        levels: The levels that the network was trained at, strictly decreasing, float64, shape (T,): `levels[-1 - t]`
            is that of time index t.
    """

    score: Score
    levels: Tensor


def _fractions(n: int) -> Tensor:
    """Cut [0, 1] into n steps. Levels are numbers that the host loops over, so they live on the CPU."""
    _checks.count("n", n)
    return torch.linspace(0, 1, int(n) + 1, dtype=torch.float64)


def _range(low: float, high: float) -> tuple[float, float]:
    _checks.positive("high", high)
    _checks.number("low", low)
    if not 0 < low < high:
        raise ValueError(f"low must lie in (0, high), got low = {low!r} and high = {high!r}")
    # A numpy scalar would turn the levels into an array.
    return float(low), float(high)


def karras(n: int, low: float, high: float, rho: float = 7.0) -> Tensor:
    """Space levels evenly in s^(1/rho): the larger rho, the more steps at small noise.

        s_i = (high^(1/rho) + (i/n) (low^(1/rho) - high^(1/rho)))^rho

    Args:
        n: Number of steps, >= 1.
        low: Last level, > 0 and below `high`.
        high: First level.
        rho: Exponent, > 0; 1 is even in s, large nears even in log s.

    Returns:
        Levels, strictly decreasing, float64, shape (n + 1,).

    Raises:
        TypeError: `n` is not an int, or a bound is a tensor.
        ValueError: `n` < 1, not 0 < `low` < `high`, a number that is not finite and > 0, `rho` so small that
            high^(1/rho) overflows, or levels that float64 cannot tell apart.

    Source: [karras2022].
    """
    fractions = _fractions(n)
    low, high = _range(low, high)
    _checks.positive("rho", rho)
    rho = float(rho)
    if math.log(high) > 700 * rho:
        raise ValueError(f"rho must be above log(high) / 700, where high^(1/rho) overflows, got {rho!r}")
    top, bottom = high ** (1 / rho), low ** (1 / rho)
    return _ends((top + fractions * (bottom - top)) ** rho, low, high)


def geometric(n: int, low: float, high: float) -> Tensor:
    """Space levels evenly in log s.

        s_i = high (low / high)^(i/n)

    Args:
        n: Number of steps, >= 1.
        low: Last level, > 0 and below `high`.
        high: First level.

    Returns:
        Levels, strictly decreasing, float64, shape (n + 1,).

    Raises:
        TypeError: `n` is not an int, or a bound is a tensor.
        ValueError: `n` < 1, not 0 < `low` < `high`, a number that is not finite and > 0, or levels that float64 cannot
            tell apart.

    Source: [song2021sde].
    """
    fractions = _fractions(n)
    low, high = _range(low, high)
    return _ends(high * (low / high) ** fractions, low, high)


def _ends(levels: Tensor, low: float, high: float) -> Tensor:
    levels[0], levels[-1] = high, low  # to the last digit: a start drawn at `high` is a start at the first level
    if not bool((levels.diff() < 0).all()):
        steps = len(levels) - 1
        raise ValueError(
            f"low and high must leave room for n levels that float64 can tell apart, "
            f"got low = {low!r} and high = {high!r} for n = {steps}"
        )
    return levels


def variance_preserving(n: int, time: float) -> Tensor:
    """Take the levels of an Ornstein-Uhlenbeck process at even times, from `time` down to 0.

        s_i = sqrt(exp(2 t_i) - 1),    t_i = time (1 - i/n);   alpha_i = exp(-t_i),  x = alpha y

    The last level above 0 is about sqrt(2 time / n), and the step from there to 0 limits every method to order 1.

    Args:
        n: Number of steps, >= 1.
        time: Time at which sampling starts, > 0; the law there is normal up to an error of about exp(-time).

    Returns:
        Levels, strictly decreasing, the last one 0, float64, shape (n + 1,).

    Raises:
        TypeError: `n` is not an int.
        ValueError: `n` < 1, or `time` not in (0, 350).

    Source: [song2021sde].
    """
    fractions = _fractions(n)
    _checks.positive("time", time)
    if time >= 350:  # exp(2 time) would overflow
        raise ValueError(f"time must lie below 350, got {time!r}")
    return torch.expm1(2 * float(time) * (1 - fractions)).sqrt()


def _points(name: str, value: Tensor) -> None:
    _checks.tensor(name, value)
    if value.ndim < 2 or 0 in value.shape[1:]:
        raise ValueError(f"{name} must have shape (n, ...), n points that are not empty, got {tuple(value.shape)}")
    _checks.finite(name, value)


def _level_per_point(s: Tensor, y: Tensor) -> None:
    shape = (len(y), *[1] * (y.ndim - 1))
    if s.shape != shape:
        raise ValueError(f"s must have shape {shape}, got {tuple(s.shape)}")
    _checks.positive_per_row("s", s, y.shape)


def evaluate(score: Score, y: Tensor, s: Level, name: str = "score") -> Tensor:
    """Evaluate a score, and refuse a result that would broadcast, or spread NaN, without a word.

    Differentiable if the score is.

    Args:
        score: Score function (y, s).
        y: Points at level s, shape (n, ...).
        s: Level of noise, as the score takes it.
        name: What to call the score in an error.

    Returns:
        The score at each point, shape (n, ...), in the dtype of `y`; the score may return another.

    Raises:
        TypeError: the score returns no floating tensor.
        ValueError: the score returns another shape than that of `y`, or numbers that are not finite.
    """
    value = _checks.floating(name, score(y, s), "return")
    if value.shape != y.shape:
        raise ValueError(f"{name} must return shape {tuple(y.shape)}, as its argument, got {tuple(value.shape)}")
    _checks.require(
        value,
        -_checks.LARGEST,
        _checks.LARGEST,
        lambda low, high: _checks.not_finite(f"{name} must return finite numbers", value),
    )
    return value.to(y.dtype)


def _step_between(y: Tensor, s: float, s_next: float) -> tuple[float, float]:
    _points("y", y)
    s = _checks.level("s", s)
    _checks.nonnegative("s_next", s_next)
    if not s_next < s:
        raise ValueError(f"s_next must lie in [0, s), got s_next = {s_next!r} and s = {s!r}")
    return s, float(s_next)


def draw(step: Transition, *, generator: Generator | None) -> Tensor:
    """Draw the points at the next level.

        y' = mean + std eps

    Differentiable in the mean.

    Args:
        step: Law of each next point.
        generator: Source of randomness, on the device of the points; None will do where `std` is 0.

    Returns:
        Points, shape (n, ...), in the dtype of the mean.

    Raises:
        TypeError: `generator` is not a `torch.Generator`, and there is noise to draw.
        ValueError: a mean or a standard deviation that is not finite, or the latter below 0.
    """
    mean, std = step
    _checks.finite("mean", mean)
    _checks.nonnegative("std", std)
    if std == 0:
        return mean
    _checks.generator("generator", generator)
    assert generator is not None
    return mean + std * _numerics.normal(mean, generator).to(mean.dtype)


def of_mixture(mixture: GaussianMixture) -> Score:
    """Make the score function of a Gaussian mixture.

        score(y, s) = gradient in y of log sum_k prior_k N(y; mean_k, covariance_k + s^2 I)

    Differentiable.

    Args:
        mixture: Law of x_0.

    Returns:
        The function `score(y, s)`, exact at every level s >= 0.

    Raises:
        TypeError: `mixture` is not a `GaussianMixture`.
    """
    _checks.instance("mixture", mixture, GaussianMixture)
    return lambda y, s: mixture.noised(1.0, s).score(y)


def of_network(network: Network, alphas_cumprod: Tensor, prediction: str) -> NetworkScore:
    """Make a score function of a network that was trained on noised points x_t, and the levels of its time indices.

        x_t = a x_0 + b eps,    a = sqrt(alphas_cumprod[t]),    b = sqrt(1 - alphas_cumprod[t])
        y = x_t / a = x_0 + s eps,    s = b / a,    so that a = 1 / sqrt(1 + s^2) and b = s a
        score(y, s) = -E[eps | y] / s = (E[x_0 | y] - y) / s^2

    The best prediction is a mean given x_t. For v = a eps - b x_0 it gives x_0 = a x_t - b v and eps = b x_t + a v. So

        prediction    score(y, s), of what the network gives at (a y, t)
        "eps"         -eps / s
        "v"           -a (a y + v / s)
        "x0"          (x_0 - y) / s^2

    Differentiable in the points and in what `network` depends on.

    Between two trained levels t is interpolated linearly in log s, and a and b are those of s itself. So do the
    schedulers of diffusers that visit such levels, and networks take it that embed t by sines and cosines; one that
    looks t up in a table refuses it, as there t is floating. Outside of the trained levels nothing is known, and the
    score refuses them.

    Args:
        network: Function (x, t) of noised points, shape (n, ...), in the dtype of y, and the time index of each, shape
            (n,): int64 where all levels are trained ones, up to 1e-4 of an index, floating otherwise. It returns the
            prediction, in the shape of x.
        alphas_cumprod: Share of the signal in the variance of x_t at each time index, in (0, 1] and at least 1e-300,
            strictly decreasing, shape (T,), at least two of them below 1. An entry 1 is level 0, which a sampler may
            go to, and the score refuses.
        prediction: What the network predicts: "eps", "v" or "x0".

    Returns:
        `NetworkScore(score, levels)`. The score takes a number s or a tensor of shape (n, 1, ..., 1), as
        `denoising_loss` gives it, and returns the dtype of its points. `levels[k::m]` are levels for `sample`, to which
        one may append 0.

    Raises:
        TypeError: `alphas_cumprod`, or what `network` returns, is not a floating tensor.
        ValueError: an unknown `prediction`; `alphas_cumprod` not in (0, 1], not strictly decreasing or of another
            shape. From the score: s outside of the trained levels, y not (n, ...), or a prediction of another shape or
            not finite.

    Example:
        >>> alphas_cumprod = torch.tensor([0.9, 0.5, 0.1], dtype=torch.float64)
        >>> network = lambda x, t: x * (1 - alphas_cumprod[t]).sqrt()[:, None]  # E[eps | x_t] for x_0 of law N(0, 1)
        >>> score, levels = of_network(network, alphas_cumprod, "eps")
        >>> [round(s, 3) for s in levels.tolist()]
        [3.0, 1.0, 0.333]
        >>> round(score(torch.ones(1, 1, dtype=torch.float64), 3.0).item(), 3)  # -y / (1 + s^2)
        -0.1

    Source: [ho2020], [salimans2022], [karras2022]; book, `network-score`.
    """
    _checks.one_of("prediction", prediction, ("eps", "v", "x0"))
    with _checks.together():
        rising = _trained_levels(alphas_cumprod)
        first = int(rising[0] == 0)
        logs = rising[first:].log()

        def error() -> ValueError:
            return ValueError(
                f"alphas_cumprod must give at least two levels above 0, that float64 can tell apart, "
                f"got {len(rising)} levels from {rising[0].item():g} to {rising[-1].item():g}"
            )

        if len(logs) < 2:
            raise error()
        _checks.holds(logs.diff() > 0, error)

    def time_index(s: Tensor, dtype: torch.dtype) -> Tensor:
        at, table = s.log(), logs.to(s.device)
        right = torch.searchsorted(table, at).clamp(1, len(logs) - 1)
        low, high = table[right - 1], table[right]
        t = right - 1 + (at - low) / (high - low)
        outside = (t < -_NEAR) | (t > len(logs) - 1 + _NEAR)
        _checks.holds(
            ~outside,
            lambda: ValueError(
                f"s must lie in [{rising[first].item():g}, {rising[-1].item():g}], between the levels that the network "
                f"was trained at, got {s[outside][0].item():g}"
            ),
        )
        nearest = t.round()
        trained = bool(((t - nearest).abs() <= _NEAR).all())
        return first + (nearest.long() if trained else t.clamp(0, len(logs) - 1).to(dtype))

    def score(y: Tensor, s: Level) -> Tensor:
        with _checks.together():
            _points("y", y)
            if isinstance(s, Tensor):
                _level_per_point(s, y)
            else:
                s = _checks.level("s", s)
            s = torch.as_tensor(s, dtype=torch.float64, device=y.device).detach()
            wide = y.to(torch.promote_types(y.dtype, torch.float32))
            a = (1 + s**2).rsqrt()
            t = time_index(s.flatten(), wide.dtype).expand(len(y)).contiguous()
            out = evaluate(network, (a * wide).to(y.dtype), t, "network").to(wide.dtype)
            if prediction == "eps":
                value = -out / s
            elif prediction == "v":
                value = -a * (a * wide + out / s)
            else:
                value = (out - wide) / s**2
            return value.to(y.dtype)

    return NetworkScore(score, rising.flip(0))


def _trained_levels(alphas_cumprod: Tensor) -> Tensor:
    """Check the shares of the signal, and give the level of each time index."""
    _checks.finite("alphas_cumprod", alphas_cumprod)
    if alphas_cumprod.ndim != 1 or len(alphas_cumprod) < 2:
        raise ValueError(f"alphas_cumprod must have shape (T,) with T >= 2, got {tuple(alphas_cumprod.shape)}")
    shares = alphas_cumprod.detach().double()
    numbers = shares.tolist()
    for t, share in enumerate(numbers):
        if not 1e-300 <= share <= 1:
            raise ValueError(f"alphas_cumprod must lie in (0, 1], at least 1e-300, got {share!r} at index {t}")
        if t and not share < numbers[t - 1]:
            raise ValueError(
                f"alphas_cumprod must decrease strictly, got {share!r} after {numbers[t - 1]!r} at index {t}"
            )
    return ((1 - shares) / shares).sqrt()


def denoised(score: Score, y: Tensor, s: float) -> Tensor:
    """Compute the mean of x_0 given its noised value, by Tweedie's formula.

        D = E[x_0 | x_0 + s eps = y] = y + s^2 score(y, s)

    Differentiable in `y` and in what `score` depends on.

    Args:
        score: Score function (y, s).
        y: Noised points, shape (n, ...).
        s: Level of noise, > 0.

    Returns:
        D, shape (n, ...), in the dtype of `y`.

    Raises:
        TypeError: `y`, or what `score` returns, is not a floating tensor.
        ValueError: `y` not (n, ...) or not finite, `s` not in (0, 1e150], or a score of another shape or not finite.

    Source: [efron2011]; book, `noised-mixture`.
    """
    with _checks.together():
        _points("y", y)
        s = _checks.level("s", s)
        inner, wide = _numerics.widened(score, y)
        return (wide + s**2 * evaluate(inner, wide, s)).to(y.dtype)


def transition(score: Score, y: Tensor, s: float, s_next: float, churn: float = 1.0) -> Transition:
    """Compute the Euler-Maruyama step of the reverse process, whose clock is s^2.

        mean = y + (1 + c^2)/2 (s^2 - s'^2) score(y, s),    std = c sqrt(s^2 - s'^2)

    Differentiable in `y` and in what `score` depends on.

    Args:
        score: Score function (y, s).
        y: Points at level s, shape (n, ...).
        s: Level of the points, > 0.
        s_next: Level s' to go to, in [0, s).
        churn: Noise factor c >= 0; 0 is the probability-flow ODE, 1 the reverse SDE.

    Returns:
        `Transition(mean, std)`.

    Raises:
        TypeError: `y`, or what `score` returns, is not a floating tensor.
        ValueError: `y` not (n, ...) or not finite, not 0 <= `s_next` < `s` <= 1e150, `churn` not in [0, 1e150], or a
            score of another shape or not finite.

    Source: [song2021sde], [karras2022]; book, `reverse-process`.
    """
    with _checks.together():
        s, s_next = _step_between(y, s, s_next)
        _checks.nonnegative("churn", churn)
        churn, elapsed = _checks.squarable("churn", churn), (s - s_next) * (s + s_next)
        inner, wide = _numerics.widened(score, y)
        mean = wide + (1 + churn**2) / 2 * elapsed * evaluate(inner, wide, s)
        return Transition(mean.to(y.dtype), churn * math.sqrt(elapsed))


def posterior_transition(score: Score, y: Tensor, s: float, s_next: float) -> Transition:
    """Compute the ancestral step: the exact reverse step if x_0 were known to be its mean D.

        mean = D + (s'/s)^2 (y - D),    std = s' sqrt(1 - s'^2/s^2)

    Differentiable in `y` and in what `score` depends on.

    Args:
        score: Score function (y, s).
        y: Points at level s, shape (n, ...).
        s: Level of the points, > 0.
        s_next: Level s' to go to, in [0, s); at 0 the step draws no noise.

    Returns:
        `Transition(mean, std)`.

    Raises:
        TypeError: `y`, or what `score` returns, is not a floating tensor.
        ValueError: `y` not (n, ...) or not finite, not 0 <= `s_next` < `s` <= 1e150, or a score of another
            shape or not finite.

    Source: [ho2020]; book, `gaussian-chain`.
    """
    with _checks.together():
        s, s_next = _step_between(y, s, s_next)
        inner, wide = _numerics.widened(score, y)
        mean, kept = denoised(inner, wide, s), (s_next / s) ** 2
        return Transition((mean + kept * (wide - mean)).to(y.dtype), s_next * math.sqrt(1 - kept))


def _toward(mean: Tensor, y: Tensor, s: float, s_next: float) -> Tensor:
    """Go a step with D averaged over it."""
    return y * (s_next / s) + (1 - s_next / s) * mean


def _extrapolated(past: list[tuple[float, Tensor]], s_next: float, order: int) -> Tensor:
    """Average D over the step, from its last values, newest first: y' = (s'/s) y + (1 - s'/s) average.

    D is a polynomial in x = lambda - lambda_0 through these values. With h the length of the step and E = 1 - exp(-h),

        average of f = int_0^h exp(x - h) f(x) dx / E;    m1 = h/E - 1 for x,  m2 = h^2/E - 2 m1 for x^2
    """
    (s, d), *older = past
    if order == 1 or not older or s_next == 0:
        return d
    h, h1 = math.log(s / s_next), math.log(older[0][0] / s)
    if not h < (_LIMIT - 1) * h1:
        return d
    slope = (d - older[0][1]) / h1
    if order == 3 and len(older) == 2:
        h2 = math.log(older[1][0] / older[0][0])
        m1 = h / -math.expm1(-h) - 1
        bend = h**2 / -math.expm1(-h) - 2 * m1 + h1 * m1  # the average of x (x + h1)
        # The sum of the absolute weights of the three D.
        if 1 + 2 * m1 / h1 + 2 * bend / (h1 * h2) <= _LIMIT:
            change = (slope - (older[0][1] - older[1][1]) / h2) / (h1 + h2)
            return d + m1 * slope + bend * change
    return d + h / 2 * slope


def _interpolated(past: list[tuple[float, Tensor]], s_next: float, d_next: Tensor) -> Tensor:
    """Average D over the step as `_extrapolated` does, now that its value at the end is known."""
    (s, d), *older = past
    h = math.log(s / s_next)
    m1, slope = h / -math.expm1(-h) - 1, (d_next - d) / h
    if not older or not h < (_LIMIT - 1) * (h1 := math.log(older[0][0] / s)):
        return d + m1 * slope
    bend = h**2 / -math.expm1(-h) - 2 * m1 - h * m1  # the average of x (x - h)
    change = (slope - (d - older[0][1]) / h1) / (h + h1)
    return d + m1 * slope + bend * change


def sample(
    score: Score,
    y: Tensor,
    levels: Tensor,
    *,
    method: str | Step = "euler",
    churn: float = 1.0,
    generator: Generator | None = None,
) -> Tensor:
    """Carry points from the first level down to the last, step by step.

    The table at the top of the module gives one step of each method. A step to level 0 is the "euler" step, y' = D, for
    every deterministic method. "ab3" starts with an "euler" and a "dpmpp_2m" step, and falls back to "dpmpp_2m"
    for runs of fewer than 16 steps and wherever levels are too uneven for a parabola. Both take an "euler" step where
    log s falls 4 times as far as in the step before, as to a last level next to 0. So does "abm3" before it corrects,
    by a straight line there and in the first step. Differentiable in `y` and in what `score` depends on.

    Args:
        score: Score function (y, s) of the law to sample.
        y: Points drawn from the law at the first level, shape (n, ...).
        levels: Levels of noise, >= 0 and strictly decreasing, shape (steps + 1,).
        method: One of "euler", "heun", "dpmpp_2m", "ab3", "abm3", "maruyama", "ancestral", or a function `step(score,
            y, s, s_next, generator)` that returns the points at the next level.
        churn: Noise factor of "maruyama", >= 0. Other methods have none.
        generator: Source of randomness, on the device of `y`; required where noise is drawn.

    Returns:
        Points at the last level, shape (n, ...), in the dtype of `y`.

    Raises:
        TypeError: `y`, `levels` or what `score` returns is not a floating tensor, or no `generator` for noise.
        ValueError: `levels` not in [0, 1e150] or not strictly decreasing; `y` not (n, ...) or not finite; a score of
            another shape or not finite; an unknown `method`; `churn` not in [0, 1e150], or given to another method.

    Example:
        >>> score = lambda y, s: -y / (1 + s**2)  # of the law N(0, 1), with noise of level s
        >>> levels = karras(50, 0.002, 80.0)
        >>> start = torch.full((1, 1), 80.0, dtype=torch.float64)
        >>> round(sample(score, start, levels, method="heun").item(), 2)  # 80 is the quantile of 1
        1.0

    Source: [song2021ddim], [karras2022], [lu2022dpmpp], [zhang2023deis], [zhao2023unipc], [ho2020]; book,
        `sampler-order`.
    """
    with _checks.together():
        numbers = _checks.levels("levels", levels)
        _points("y", y)
    if generator is not None:
        _checks.generator("generator", generator)
    if not callable(method):
        _checks.one_of("method", method, _METHODS)
    if churn != 1 and method != "maruyama":
        raise ValueError(f"churn must be left at 1 unless method is 'maruyama', got {churn!r} for {method!r}")
    dtype, past = y.dtype, list[tuple[float, Tensor]]()
    if isinstance(method, str):
        score, y = _numerics.widened(score, y)
    for s, s_next in itertools.pairwise(numbers):
        if not isinstance(method, str):
            y = method(score, y, s, s_next, generator)
            continue
        with _checks.together():  # one wait a step: a score that is not finite is refused before the next
            if method in _ORDERS:
                if method != "abm3" or not past:
                    past = [(s, denoised(score, y, s)), *past[:2]]
                order = 2 if len(numbers) - 1 < _FEW and _ORDERS[method] == 3 else _ORDERS[method]
                end = _toward(_extrapolated(past, s_next, order), y, s, s_next)
                if method == "abm3" and s_next != numbers[-1]:
                    d_next = denoised(score, end, s_next)
                    end = _toward(_interpolated(past, s_next, d_next), y, s, s_next)
                    past = [(s_next, d_next), *past[:2]]
                y = end
            elif method == "heun":
                slope = -s * evaluate(score, y, s)
                guess = y + (s_next - s) * slope
                y = guess if s_next == 0 else y + (s_next - s) / 2 * (slope - s_next * evaluate(score, guess, s_next))
            else:
                kernel = partial(transition, churn=churn) if method == "maruyama" else posterior_transition
                y = draw(kernel(score, y, s, s_next), generator=generator)
    return y.to(dtype)


def denoising_loss(score: Score, x0: Tensor, s: float | Tensor, eps: Tensor) -> Tensor:
    """Compute the denoising loss of a score, one value per point.

        |s score(x_0 + s eps, s) + eps|^2, summed over the coordinates of the point

    Over draws of x_0 and eps its mean is least for the score of the law of x_0; times weights w(x_0), for that of the
    tilt by w. Differentiable in `x0`, `s`, `eps` and what `score` depends on.

    Args:
        score: Score function (y, s).
        x0: Clean points, shape (n, ...).
        s: Level of noise, > 0: a number, or a tensor of shape (n, 1, ..., 1), of as many dimensions as `x0`, with a
            level for each point. The score gets it as it is. A tensor has the dtype of `x0`.
        eps: Standard normal noise, shape (n, ...), in the dtype of `x0`.

    Returns:
        Loss of each point, shape (n,), in the dtype of `x0`.

    Raises:
        TypeError: `x0`, `eps` or what `score` returns is not a floating tensor, or dtypes that differ.
        ValueError: `x0` not (n, ...), `eps` of another shape, one of them not finite, `s` not in (0, 1e150] or of
            another shape, or a score of another shape or not finite.

    Source: [hyvarinen2005], [vincent2011]; book, `weighted-score-matching`.
    """
    with _checks.together():
        _points("x0", x0)
        _checks.finite("eps", eps)
        _checks.same_shape(x0=x0, eps=eps)
        if isinstance(s, Tensor):
            _level_per_point(s, x0)
        else:
            s = _checks.level("s", s)
        for name, value in (("eps", eps), ("s", s)):
            if isinstance(value, Tensor) and value.dtype != x0.dtype:
                raise TypeError(f"{name} must have the dtype of x0, {x0.dtype}, got {value.dtype}")
        value = evaluate(score, x0 + eps * s, s)
        # Squares of numbers in half precision overflow from 256 on.
        wide = value.to(torch.promote_types(x0.dtype, torch.float32))
        return (wide * s + eps).square().flatten(1).sum(-1).to(x0.dtype)
