"""One engine for all particle methods: grow, weigh, and resample when the weights are uneven.

A particle system is a state of runs x n particles, which one function moves and weighs, and another one copies.
`smc` grows strings with it, `guidance` points of a diffusion. Weights are carried from step to step until a resampling
spends them; dropping them is a bias. With Z the product of what the weights average to,

    E exp(log_partition) = Z    whatever the threshold, the scheme and the number of particles

Independent runs are computed together; each decides on its own when to resample.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from tiltlib import _checks, resampling, weights

__all__ = ["Particles", "Scheme", "grow"]

State = TypeVar("State")

# A resampling scheme: scheme(log_weights, n, generator=g) gives ancestors.
Scheme = Callable[..., Tensor]


class Particles(NamedTuple):
    """A finished particle system.

    Attributes:
        particles: The particles themselves: tokens (runs, n, L) of `smc.twisted_smc`, points (runs, n, ...) of
            `guidance.particles`, the last state of `grow`.
        log_weights: Their unnormalised log weights since the last resampling, float64, shape (runs, n).
        log_partition: Estimate of log Z per run, float64, shape (runs,); exp of it is unbiased for Z. -inf where all
            particles died.
        ancestors: Particle that each particle continues at each step, int64, shape (runs, steps, n); itself where
            nothing was resampled.
        ess: Effective sample size after each step, float64, shape (runs, steps); 0 where all particles had died.
    """

    particles: Any
    log_weights: Tensor
    log_partition: Tensor
    ancestors: Tensor
    ess: Tensor


def grow(
    state: State,
    step: Callable[[int, State], tuple[State, Tensor]],
    take: Callable[[State, Tensor], State],
    steps: int,
    log_weights: Tensor,
    *,
    generator: torch.Generator,
    threshold: float = 0.5,
    scheme: Scheme = resampling.systematic,
    on_step: Callable[[int, Particles], None] | None = None,
) -> Particles:
    """Move particles step by step, each time resampling first when the weights are uneven.

        resample before a step iff 0 < ESS < threshold n
        then log_partition += log of the mean weight, and all weights are 1

    A run in which every particle has weight 0 estimates Z by 0, and goes on without resampling. Differentiable in
    `log_weights` and in what the functions depend on, with the resampled indices held constant.

    Args:
        state: State of runs * n particles, those of one run beside each other.
        step: Function (number of the step, state) that moves the particles: it returns their state and the log weight
            that each gained, floating, shape (runs * n,); -inf kills a particle.
        take: Function (state, index) that continues some of them, with `index` int64, shape (runs * n,).
        steps: Number of steps, >= 1.
        log_weights: Log weights to begin with, floating, shape (runs, n), finite.
        generator: Source of randomness for resampling, on the device of `log_weights`.
        threshold: Resample when ESS / n falls below it, in [0, 1]: 0 is never, 1 whenever weights differ.
        scheme: One of `resampling.multinomial`, `residual`, `stratified`, `systematic`.
        on_step: Function (number of the step, particles) that is called after each step with what would be returned if
            it were the last. It must not change the tensors. What it raises ends the run.

    Returns:
        `Particles(particles, log_weights, log_partition, ancestors, ess)`, the weights in float64.

    Raises:
        TypeError: `steps` is not an int, `log_weights` or the gains no floating tensors, `threshold` no number, or
            `generator` no generator.
        ValueError: `steps` < 1, `log_weights` not (runs, n) or not finite, `threshold` outside [0, 1], or gains of
            another shape, with NaN or +inf, or on another device.

    Source: [delmoral2006]; book, `smc-unbiased`.
    """
    _checks.generator("generator", generator)
    _checks.count("steps", steps)
    _checks.fraction("threshold", threshold, zero=True)
    _checks.finite("log_weights", log_weights)
    if log_weights.ndim != 2 or not log_weights.shape[1]:
        raise ValueError(f"log_weights must have shape (runs, n) with n >= 1, got {tuple(log_weights.shape)}")
    log_weights, (runs, n) = log_weights.double(), log_weights.shape
    device = log_weights.device
    itself = torch.arange(n, device=device).expand(runs, n)
    first = n * torch.arange(runs, device=device)[:, None]
    log_partition = torch.zeros(runs, dtype=torch.float64, device=device)
    # Equal weights may differ in their last digits; that is no reason to resample.
    enough = threshold * n * (1 - 1e-9)
    ancestors = torch.empty(runs, int(steps), n, dtype=torch.int64, device=device)
    sizes = [_ess(log_weights)]

    def so_far() -> Particles:
        return Particles(
            state,
            log_weights,
            log_partition + log_weights.logsumexp(-1) - math.log(n),
            ancestors[:, : len(sizes) - 1],
            torch.stack(sizes[1:], -1),
        )

    for t in range(steps):
        uneven = ((0 < sizes[-1]) & (sizes[-1] < enough))[:, None]
        parents = itself
        if bool(uneven.any()):
            spent = torch.where(uneven, log_weights, 0.0)
            parents = torch.where(uneven, scheme(spent, n, generator=generator), itself)
            with _checks.trusted():
                log_partition = log_partition + weights.log_mean(spent)
            log_weights = torch.where(uneven, 0.0, log_weights)
            state = take(state, (first + parents).flatten())
        state, gained = step(t, state)
        gained = _checks.returned("step", gained, runs * n, device)
        log_weights = log_weights + gained.view(runs, n)
        ancestors[:, t] = parents
        sizes.append(_ess(log_weights))
        if on_step is not None:
            on_step(t, so_far())
    return so_far()


def _ess(log_weights: Tensor) -> Tensor:
    alive = (log_weights > -math.inf).any(-1)
    with _checks.trusted():
        return torch.where(alive, weights.ess(torch.where(alive[:, None], log_weights, 0.0)), 0.0)
