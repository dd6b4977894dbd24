"""Guidance: a change of the score, or of one step, of a sampler in `diffusion`.

The tilt of p by w multiplies the density at each level s by the value h(y, s) = E[w(x_0) | x_0 + s eps = y], up to Z.
So its score is that of p plus grad log h. Four changes of the score, each a score function (y, s) again:

    exact_value          score + grad log h: the score of the tilt, for Gaussian mixtures
    classifier_free      s_u + g (s_c - s_u): h = p(c | y), and its gradient times g
    plug_in              grad log h replaced by the gradient of r(D(y, s)) / beta, D = E[x_0 | y]: any score and reward
    plug_in_quadratic    the same in closed form, for a Gaussian mixture and a quadratic reward
    that one, damped     its gradient times (I + A C / beta)^-1, C = Cov[x_0 | y]: exact for one Gaussian

One change of the step, from values alone: `soft_best_of_n_step` draws candidates for the next point and keeps one. And
one correction of whatever the score gets wrong: `particles` weights and resamples points that follow any score. Guided
points have to start from the guided law at the first level, not from that of the reference. A strength of guidance is a
number, or a function of the level: `lambda s: 2.0 if 0.3 < s < 5 else 1.0` guides in an interval.

Points have shape (n, ...), as in `diffusion`; where a Gaussian mixture is asked for, they are vectors (n, D).

What is a difference of two scores or two log densities is computed in float64, and comes back in the dtype of y.
"""

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Generator, Tensor

from tiltlib import _checks, _numerics, diffusion, resampling, selection
from tiltlib.diffusion import Score, Step, Transition
from tiltlib.mixtures import GaussianMixture, Tilted
from tiltlib.particles import Particles, Scheme, grow

__all__ = [
    "classifier_free",
    "exact_value",
    "log_values",
    "particles",
    "plug_in",
    "plug_in_quadratic",
    "soft_best_of_n_step",
    "value_gradient",
]

# log_values(y, s): one number per point.
LogValues = Callable[[Tensor, float], Tensor]
# kernel(score, y, s, s_next): `diffusion.transition` or `posterior_transition`.
Kernel = Callable[[Score, Tensor, float, float], Transition]
# A number, or a function of the level that gives one.
Scale = float | Callable[[float], float]


def _at_level(name: str, value: Scale) -> Callable[[float], float]:
    """Make a strength a function of the level. What a function gives is looked at when it is asked."""
    if callable(value):
        return lambda s: _checks.finite_number(f"{name}(s)", value(s))
    constant = _checks.finite_number(name, value)
    return lambda s: constant


def _per_point(name: str, value: Tensor, y: Tensor) -> Tensor:
    """Require one number per point; return them in float64."""
    value = _checks.floating(name, value, "return")
    if value.shape != y.shape[:1]:
        raise ValueError(
            f"{name} must return shape {tuple(y.shape[:1])}, one number per point, got {tuple(value.shape)}"
        )
    return value.double()


def classifier_free(conditional: Score, unconditional: Score, guidance_scale: Scale) -> Score:
    """Extrapolate from the unconditional score through the conditional one.

        s_u(y, s) + g(s) (s_c(y, s) - s_u(y, s))

    The difference is the gradient of log p(c | y) at level s. For g other than 0 and 1 the sum is in general not the
    score of any one law at all levels, and the samplers of `diffusion` end at different laws. Differentiable.

    Args:
        conditional: Score function s_c.
        unconditional: Score function s_u.
        guidance_scale: g, finite: a number or a function of the level; 0 is unconditional, 1 conditional, above 1
            guided.

    Returns:
        The guided score function. It refuses a score of another shape than its argument, so that a single row is not
        taken for a score of every point, and returns the dtype of its argument.

    Raises:
        TypeError: `guidance_scale` is, or returns, a tensor.
        ValueError: `guidance_scale` is not finite, or does not return a finite number.

    Source: [ho2022cfg]; book, `cfg-is-value-guidance` and `cfg-is-not-a-tilt`.
    """
    scale = _at_level("guidance_scale", guidance_scale)

    def score(y: Tensor, s: float) -> Tensor:
        with _checks.together():
            _checks.tensor("y", y)
            start = diffusion.evaluate(unconditional, y, s, "unconditional")
            toward = diffusion.evaluate(conditional, y, s, "conditional").double()
            return (start + scale(s) * (toward - start)).to(y.dtype)

    return score


def exact_value(tilted: Tilted) -> Score:
    """Guide by the exact value: the score of the tilted mixture.

        grad log p_s + grad log h = grad log p*_s

    Differentiable.

    Args:
        tilted: Tilt of the reference, from `GaussianMixture.tilt`.

    Returns:
        The guided score function.

    Raises:
        TypeError: `tilted` is not a `Tilted`.

    Source: book, `tilted-score`.
    """
    _checks.instance("tilted", tilted, Tilted, "GaussianMixture.tilt")
    return diffusion.of_mixture(tilted.mixture)


def value_gradient(ref: GaussianMixture, tilted: Tilted, y: Tensor, s: float) -> Tensor:
    """Compute the gradient of the log value: what exact guidance adds to the score of the reference.

        grad log h(y, s) = grad log p*_s(y) - grad log p_s(y)

    Differentiable.

    Args:
        ref: Reference law p.
        tilted: Its tilt, from `ref.tilt`.
        y: Points at level s, shape (n, D).
        s: Level of noise, >= 0.

    Returns:
        The gradient, shape (n, D), in the dtype of `y`; computed in float64.

    Raises:
        TypeError: `ref` is not a `GaussianMixture`, `tilted` not a `Tilted`, or `y` not a floating tensor in the dtype
            of `ref`.
        ValueError: `y` not (n, D) or not finite, or `s` negative or not finite.

    Source: book, `tilted-score`.
    """
    _checks.instance("ref", ref, GaussianMixture)
    _checks.instance("tilted", tilted, Tilted, "GaussianMixture.tilt")
    with _checks.together():
        ref.check_points("y", y)
        wide = y.double()
        law, start = (mixture.to(torch.float64).noised(1.0, s) for mixture in (tilted.mixture, ref))
        return (law.score(wide) - start.score(wide)).to(y.dtype)


def log_values(ref: GaussianMixture, tilted: Tilted) -> LogValues:
    """Make the exact log value of a tilt, for `soft_best_of_n_step` and as the twist of `particles`.

        log h(y, s) = log E[w(x_0) | x_0 + s eps = y] = log Z + log p*_s(y) - log p_s(y)

    Differentiable.

    Args:
        ref: Reference law p.
        tilted: Its tilt, from `ref.tilt`.

    Returns:
        The function `log_values(y, s)`, shape (n,), in the dtype of y; at s = 0 it is r(y) / beta.

    Raises:
        TypeError: `ref` is not a `GaussianMixture`, or `tilted` not a `Tilted`.

    Source: book, `tilted-score`.
    """
    _checks.instance("ref", ref, GaussianMixture)
    _checks.instance("tilted", tilted, Tilted, "GaussianMixture.tilt")
    law, start, log_z = tilted.mixture.to(torch.float64), ref.to(torch.float64), tilted.log_partition.double()

    def value(y: Tensor, s: float) -> Tensor:
        with _checks.together():
            ref.check_points("y", y)
            wide = y.double()
            return (log_z + law.noised(1.0, s).logps(wide) - start.noised(1.0, s).logps(wide)).to(y.dtype)

    return value


def plug_in(ref: Score, reward: Callable[[Tensor], Tensor], beta: float, *, guidance_scale: Scale = 1.0) -> Score:
    """Guide by the reward of the denoised point, in place of the value.

        score(y, s) + g(s) grad r(D(y, s)) / beta,    D = y + s^2 score(y, s) = E[x_0 | y]

    The gradient is taken in y, by autograd through the score: with J the derivative of D, which is Cov[x_0 | y] / s^2,
    it is J' times the gradient of r at D. It would be that of log h if the mean could be taken through the exponential,
    and is not in general. Not differentiable: the result carries no graph. Cost one call of the score and one backward
    pass through it, also inside of `torch.no_grad` or `torch.inference_mode`.

    Args:
        ref: Score function of the reference, differentiable by autograd.
        reward: Function of denoised points, shape (n, ...), in the dtype of y, that gives r of each, shape (n,). It is
            differentiable by autograd, and takes each point by itself.
        beta: Temperature in reward units, > 0.
        guidance_scale: g, finite: a number or a function of the level; 1 is plug-in guidance.

    Returns:
        The guided score function, of points of any shape, for levels s in (0, 1e150]. It computes in float32 at least
        and returns the dtype of its points.

    Raises:
        TypeError: `guidance_scale` is, or returns, a tensor. From the score: y, or what `reward` returns, is not a
            floating tensor.
        ValueError: `beta` not finite and > 0, or `guidance_scale` not finite. From the score: `reward` returns another
            shape, numbers that are not finite or without a graph, or has a gradient that is not finite.

    Example:
        >>> score = lambda y, s: -y / (1 + s**2)  # of the law N(0, 1)
        >>> guided = plug_in(score, lambda x: 3 * x.flatten(1).sum(1), 1.0)
        >>> guided(torch.zeros(1, 1, 2, 2), 1.0).flatten().tolist()  # J is 1 / (1 + s^2)
        [1.5, 1.5, 1.5, 1.5]

    Source: [chung2023]; book, `plug-in-bias`.
    """
    _checks.positive("beta", beta)
    beta, scale = float(beta), _at_level("guidance_scale", guidance_scale)

    def guided(y: Tensor, s: float) -> Tensor:
        with _checks.together():
            s = _checks.level("s", s)
            _checks.finite("y", y)
            score, wide = _numerics.widened(ref, y)
            with torch.inference_mode(False), torch.enable_grad():
                leaf = wide.detach().clone().requires_grad_()
                value = diffusion.evaluate(score, leaf, s, "ref")
                rewards = _per_point("reward", reward((leaf + s**2 * value).to(y.dtype)), y)
                _checks.finite("reward", rewards)
                slope = None
                if rewards.requires_grad:
                    (slope,) = torch.autograd.grad(rewards.sum(), leaf, allow_unused=True)
            if slope is None:
                raise ValueError("reward must be differentiable in its points, got numbers that carry no graph to them")
            slope = slope.double() / beta
            _checks.require(
                slope,
                -_checks.LARGEST,
                _checks.LARGEST,
                lambda low, high: _checks.not_finite("reward / beta must have a finite gradient", slope),
            )
            return (value.detach() + scale(s) * slope).to(y.dtype)

    return guided


def plug_in_quadratic(
    ref: GaussianMixture,
    quadratic: Tensor | None,
    linear: Tensor | None,
    beta: float,
    *,
    damped: bool = False,
) -> Score:
    """Guide a mixture by a quadratic reward of the denoised point: `plug_in` in closed form.

        score(y, s) + (C / s^2) (b - A D) / beta,    r(x) = -x'Ax / 2 + b'x,  D = E[x_0 | y],  C = Cov[x_0 | y]

    C / s^2 is the derivative of D, so the second term is the gradient in y of r(D) / beta. `damped` multiplies the
    gradient at D by (I + A C / beta)^-1, which makes it exact where x_0 given y is normal: for one Gaussian, not for a
    mixture. Differentiable.

    Args:
        ref: Reference law p.
        quadratic: A, symmetric, shape (D, D); None is 0.
        linear: b, shape (D,); None is 0.
        beta: Temperature in reward units, > 0.
        damped: Whether to damp.

    Returns:
        The guided score function, for levels s in [1e-150, 1e150]. It takes points in the dtype of `ref`, whatever the
        dtypes of `quadratic` and `linear`, computes in float64 and returns the dtype of the points.

    Raises:
        TypeError: `ref` is not a `GaussianMixture`, or `quadratic` or `linear` not a floating tensor.
        ValueError: `quadratic` or `linear` not finite, of another shape or not symmetric, `beta` not finite and > 0, or
            so small that r / beta overflows.

    Source: [chung2023]; book, `plug-in-bias`.
    """
    _checks.instance("ref", ref, GaussianMixture)
    _checks.positive("beta", beta)
    with _checks.together():
        shapes = ("quadratic", quadratic, (ref.dimension,) * 2), ("linear", linear, (ref.dimension,))
        for name, value, shape in shapes:
            if value is not None:
                _checks.finite(name, value)
                if value.shape != shape:
                    raise ValueError(f"{name} must have shape {shape}, got {tuple(value.shape)}")
                rule = f"beta must keep {name} / beta within the range of float64, got {beta!r}"
                _checks.holds((value.double() / float(beta)).isfinite(), partial(ValueError, rule))
        if quadratic is not None:
            _checks.symmetric("quadratic", quadratic)

    law, beta = ref.to(torch.float64), float(beta)
    curve = None if quadratic is None else quadratic.double()
    rise = None if linear is None else linear.double() / beta
    score = diffusion.of_mixture(law)

    def guided(y: Tensor, s: float) -> Tensor:
        with _checks.together():
            s = _checks.level("s", s)
            if s < 1e-150:
                raise ValueError(f"s must be at least 1e-150, whose square is above 0, got {s!r}")
            ref.check_points("y", y)
            wide = y.double()
            covariance = law.denoise_covariance(wide, 1.0, s)
            slope = torch.zeros_like(wide) if rise is None else rise.expand_as(wide)
            if curve is not None:
                slope = slope - law.denoise(wide, 1.0, s) @ curve / beta
                if damped:
                    identity = torch.eye(law.dimension, dtype=torch.float64, device=y.device)
                    slope = torch.linalg.solve(identity + curve @ covariance / beta, slope)
            return (score(wide, s) + (covariance @ slope[..., None])[..., 0] / s**2).to(y.dtype)

    return guided


def soft_best_of_n_step(log_values: LogValues, power: Scale, n: int, *, kernel: Kernel = diffusion.transition) -> Step:
    """Make a step that draws n candidates for the next point and keeps one by its value.

        y'_1 ... y'_n from kernel(score, y, s, s'),    P(i) proportional to exp(power log_values(y'_i, s'))

    For `diffusion.sample(..., method=step)`. In the limit of many steps it guides like the reverse SDE with the score
    plus power (1 - 1/n) grad log_values, from values alone. Differentiable, with the choice held constant. Cost n
    values and one score per point.

    Args:
        log_values: Function (y, s) that gives the log value of each point, shape (n,); -inf excludes a candidate, for
            any `power`.
        power: Exponent of the value, finite: a number or a function of the level s' of the candidates.
        n: Number of candidates, >= 1; 1 leaves the sampler as it is.
        kernel: Law of the candidates: `diffusion.transition` (partial for another `churn`) or `posterior_transition`.

    Returns:
        The step, for the argument `method` of `diffusion.sample`.

    Raises:
        TypeError: `n` is not an int, or `power` is, or returns, a tensor.
        ValueError: `n` < 1, or `power` is not finite, or does not return a finite number.

    Source: [li2024svdd], [verdun2025]; book, `stepwise-soft-bon`.
    """
    _checks.count("n", n)
    n, exponent = int(n), _at_level("power", power)

    def step(score: Score, y: Tensor, s: float, s_next: float, generator: Generator | None) -> Tensor:
        _checks.generator("generator", generator)
        assert generator is not None
        with _checks.together():
            mean, std = kernel(score, y, s, s_next)
            pool = diffusion.draw(Transition(mean.repeat_interleave(n, 0), std), generator=generator)
            values = _per_point("log_values", log_values(pool, s_next), pool).view(len(y), n)
            _checks.log_weights("log_values", values)
            values = torch.where(values > -math.inf, exponent(s_next) * values, -math.inf)
            _checks.log_weights("power times log_values", values)
            chosen = selection.soft_best_of_n(values, 1.0, generator=generator)
        return pool[n * torch.arange(len(y), device=y.device) + chosen]

    return step


def _in_chunks(score: Score, chunk: int) -> Score:
    """Call a score on at most so many points at once."""
    return lambda y, s: torch.cat([diffusion.evaluate(score, part, s) for part in y.split(chunk)])


def particles(
    ref: Score,
    proposal: Score,
    y: Tensor,
    levels: Tensor,
    log_tilt: Callable[[Tensor], Tensor],
    log_values: LogValues | None = None,
    *,
    generator: Generator,
    kernel: Kernel = diffusion.transition,
    threshold: float = 0.5,
    scheme: Scheme = resampling.systematic,
    start_log_weights: Tensor | None = None,
    chunk: int | None = None,
    on_step: Callable[[float, Particles], None] | None = None,
) -> Particles:
    """Correct guidance by particles: propose with one score, weight toward the other and toward the tilt, resample.

        y' from K(y' | y; proposal),    log g = log K(y' | y; ref) - log K(y' | y; proposal) + V(y', s') - V(y, s)
        V = log_values, at the last level V = log_tilt
        resample before a step iff ESS < threshold n;  then log_partition += log of the mean weight, all weights are 1

    With more particles the weighted points follow the tilt by w of the chain of K(.; ref) at these levels, whatever
    proposal and twist are; that of p itself only as steps grow too, or if K is the exact reverse kernel. Likewise Z is
    the mean of w under that chain. Weights are carried from step to step until a resampling spends them; dropping them
    is a bias. Points are carried in float64; each function sees, and the result has, the dtype of `y`. Differentiable
    in `y`, in `start_log_weights` and in what the functions depend on, with the resampled indices held constant: so a
    network whose parameters require gradients leaves the graph of all steps in the result. To draw, and no more, call
    this under `torch.no_grad`; `plug_in` takes its own gradient there too.

    Args:
        ref: Score function of the reference.
        proposal: Score function that points follow; `ref` itself for unguided proposals.
        y: Points at the first level from the reference law there, shape (runs, n, ...): independent systems of n
            points.
        levels: Levels of noise, >= 0 and strictly decreasing, shape (steps + 1,).
        log_tilt: Function that gives log w of finished points (m, ...), shape (m,); -inf excludes a point.
        log_values: Function (y, s) for points (m, ...) on the way, shape (m,), finite. The function `log_values`
            makes the exact one. Default: 0.
        generator: Source of randomness, on the device of `y`.
        kernel: Law K of a step: `diffusion.transition` (partial for another `churn`) or `posterior_transition`.
        threshold: Resample when ESS / n falls below it, in [0, 1]: 0 is never, 1 whenever weights differ.
        scheme: One of `resampling.multinomial`, `residual`, `stratified`, `systematic`.
        start_log_weights: For points from another law at the first level, log of reference density over theirs, shape
            (runs, n).
        chunk: Most points that a function of the caller gets at once, >= 1; default: all runs * n. The draws are the
            same. It saves memory where no graph is kept: under `torch.no_grad`.
        on_step: Function (s', particles) that is called after each step, with the level that it went to and with what
            would be returned if the run ended there, the weights in it those of log_values at s'. It must not change
            the tensors. What it raises ends the run; what it was given stays whole, and the last is the result.

    Returns:
        `Particles(particles, log_weights, log_partition, ancestors, ess)`; the particles are points at the last level,
        dtype of `y`, shape (runs, n, ...).

    Raises:
        TypeError: `y`, `levels` or what a function returns is not a floating tensor, `generator` is not a
            `torch.Generator`, or `chunk` not an int.
        ValueError: a kernel without noise, as an ODE has no ratio of densities; `levels` as for `diffusion.sample`; `y`
            not (runs, n, ...) or not finite; functions that return another shape, or values that are not finite;
            `threshold` outside [0, 1]; `chunk` < 1.

    Source: [delmoral2006], [wu2023]; book, `smc-guidance`.
    """
    _checks.generator("generator", generator)
    with _checks.together():
        numbers = _checks.levels("levels", levels)
        _checks.tensor("y", y)
        if y.ndim < 3 or 0 in y.shape[1:]:
            raise ValueError(
                f"y must have shape (runs, n, ...) with n >= 1 points that are not empty, got {tuple(y.shape)}"
            )
        _checks.finite("y", y)
    if chunk is not None:
        _checks.count("chunk", chunk)
    runs, n = y.shape[:2]
    size = runs * n if chunk is None else int(chunk)
    guided = proposal is not ref
    points = y.flatten(0, 1)
    (proposal, _), (ref, points) = (
        _numerics.widened(_in_chunks(score, size), points, torch.float64) for score in (proposal, ref)
    )

    def values_of(name: str, function: Callable[..., Tensor], points: Tensor, *level: float) -> Tensor:
        parts = points.to(y.dtype).split(size)
        return torch.cat([_per_point(name, function(part, *level), part) for part in parts])

    def twist(points: Tensor, s: float) -> Tensor:
        if log_values is None:
            return torch.zeros(runs * n, dtype=torch.float64, device=y.device)
        value = values_of("log_values", log_values, points, s)
        _checks.finite("log_values", value)
        return value

    def step(i: int, state: tuple[Tensor, Tensor]) -> tuple[tuple[Tensor, Tensor], Tensor]:
        points, values = state
        s, s_next = numbers[i : i + 2]
        mean, std = kernel(proposal, points, s, s_next)
        if not std > 0:
            raise ValueError(
                f"kernel must draw noise at every step, since weights are ratios of densities, "
                f"got std = {std!r} from level {s!r} to {s_next!r}"
            )
        noise = _numerics.normal(mean, generator)
        log_ratio: float | Tensor = 0.0
        if guided:
            # Both kernels have one std: log N(y'; ref) - log N(y'; proposal) with y' = mean + std noise.
            gap = (mean - kernel(ref, points, s, s_next).mean) / std
            log_ratio = -(gap * (gap / 2 + noise)).flatten(1).sum(-1)
        points = mean + std * noise
        if i < len(numbers) - 2:
            ahead = twist(points, s_next)
        else:
            ahead = values_of("log_tilt", log_tilt, points)
            _checks.rewards("log_tilt", ahead.view(runs, n))
        return (points, ahead), log_ratio + ahead - values

    values = twist(points, numbers[0])
    log_weights = values.view(runs, n)
    if start_log_weights is not None:
        _checks.finite("start_log_weights", start_log_weights)
        if start_log_weights.shape != (runs, n):
            raise ValueError(f"start_log_weights must have shape {(runs, n)}, got {tuple(start_log_weights.shape)}")
        log_weights = log_weights + start_log_weights.double()

    def of_points(out: Particles) -> Particles:
        (points, _), *rest = out
        return Particles(points.view(y.shape).to(y.dtype), *rest)

    def report(i: int, so_far: Particles) -> None:
        assert on_step is not None
        on_step(numbers[i + 1], of_points(so_far))

    out = grow(
        (points, values),
        step,
        lambda state, index: (state[0][index], state[1][index]),
        len(numbers) - 1,
        log_weights,
        generator=generator,
        threshold=threshold,
        scheme=scheme,
        on_step=None if on_step is None else report,
    )
    return of_points(out)
