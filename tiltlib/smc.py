"""Sequential Monte Carlo: strings grown together, token by token, and resampled when their weights become uneven.

The target is the tilt of any autoregressive model by a weight w of finished strings. A gain splits log w into steps:
what a token earns, and a value V of what may still come. The value steers which prefixes are kept, and cancels from the
weight of a finished string. With

    G_t = exp(log_tilt + V(y_<=t) - V(y_<t)),    g_t = G_t p(y_t | y_<t) / q(y_t | y_<t)

the product of the g_t along a string is w(y) p(y) / q(y), divided by exp(V) of the empty string. `log_partition` is
that V plus the logs of the mean weights, one for each resampling and one at the end. `log_weights` belong to the
finished strings. So

    E exp(log_partition) = Z    for any values V
    sum_i w_i f(y_i) / sum_i w_i    estimates E_{pi*} f

Gains: `by_value` of any function of the state, `stepwise.gain` of tables on a Markov chain. `particles` is the engine.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tiltlib import _checks, particles, resampling
from tiltlib.autoregressive import AutoregressiveModel, Gain
from tiltlib.particles import Particles, Scheme

__all__ = ["by_value", "trace", "twisted_smc"]


def by_value(value: Callable[[Any], Tensor], model: AutoregressiveModel[Any]) -> Gain:
    """Let one function of the state be all: the value on the way, and the log weight of a finished string.

        log g_t = V(y_<=t) - V(y_<t)

    Differentiable in what `value` depends on.

    Args:
        value: Function of a state of n strings, shape (n,): at the end log w, before that any guess of the log of what
            w will be on average; -inf gives up a string for good.
        model: Model that the states belong to; the function is tried on one empty string.

    Returns:
        The gain.

    Raises:
        TypeError: `model` is no `AutoregressiveModel`, or `value` returns no floating tensor.
        ValueError: `value` returns another shape than (n,), NaN or +inf.

    Source: [delmoral2006], [guarniero2017]; book, `smc-unbiased`.
    """
    _checks.instance("model", model, AutoregressiveModel)
    gain = Gain(value)
    gain.values(model.begin(1), 1)
    return gain


def trace(tokens: Tensor, ancestors: Tensor) -> Tensor:
    """Follow each last particle back to its first symbol.

    Args:
        tokens: Symbol that each particle added at each step, integer tensor, shape (..., L, n) with L, n >= 1.
        ancestors: Particle of the step before that each particle continues, integer tensor in 0..n-1, same shape; those
            of step 0 are not used.

    Returns:
        Strings, shape (..., n, L).

    Raises:
        TypeError: `tokens` or `ancestors` is not an integer tensor.
        ValueError: `ancestors` outside 0..n-1, or shapes that differ or are not (..., L, n).
    """
    parents = _checks.sequences("ancestors", ancestors)
    symbols = _checks.sequences("tokens", tokens)
    _checks.same_shape(tokens=symbols, ancestors=parents)
    if tokens.ndim < 2 or tokens.shape[-2] == 0:
        raise ValueError(f"tokens must have shape (..., L, n) with L >= 1, got {tuple(tokens.shape)}")
    if parents.numel():  # no particle systems have no ancestors to check
        _checks.indices("ancestors", parents, tokens.shape[-1])
    return _traced(symbols, parents).to(tokens.dtype, memory_format=torch.contiguous_format)


def _traced(tokens: Tensor, ancestors: Tensor) -> Tensor:
    particle = torch.arange(tokens.shape[-1], device=tokens.device).expand(tokens[..., 0, :].shape)
    strings = torch.empty_like(tokens)
    for t in reversed(range(tokens.shape[-2])):
        strings[..., t, :] = tokens[..., t, :].gather(-1, particle)
        particle = ancestors[..., t, :].gather(-1, particle)
    return strings.mT


@torch.no_grad()
def twisted_smc(
    model: AutoregressiveModel[Any],
    gain: Gain,
    length: int,
    n: int,
    *,
    generator: torch.Generator,
    proposal: AutoregressiveModel[Any] | None = None,
    threshold: float = 0.5,
    scheme: Scheme = resampling.systematic,
    runs: int = 1,
) -> Particles:
    """Grow n strings together, `runs` times over, each time resampling when the weights are uneven.

        resample before a step iff ESS < threshold n
        then log_partition += log of the mean weight, and all weights are 1

    Independent runs are computed together; each decides on its own when to resample. A run in which every particle has
    weight 0 estimates Z by 0, and goes on without resampling. Weights are float64. Not differentiable.

    Args:
        model: Model p of the strings.
        gain: What the strings are worth, such as `by_value(...)` or `stepwise.gain(...)`.
        length: Number of tokens L, >= 1. Strings that end early: see `autoregressive.Stopped`.
        n: Particles per run, >= 1.
        generator: Source of randomness, on the device of the model.
        proposal: Model q that tokens are drawn from; it has to be positive wherever p w is, which `stepwise.gain`
            proves of a chain and nothing can prove of a model that is only called. Default: p.
        threshold: Resample when ESS / n falls below it, in [0, 1]: 0 is never, 1 whenever weights differ.
        scheme: One of `resampling.multinomial`, `residual`, `stratified`, `systematic`.
        runs: Independent particle systems, >= 1.

    Returns:
        `Particles(particles, log_weights, log_partition, ancestors, ess)`; the particles are tokens of strings, int64,
        shape (runs, n, L).

    Raises:
        TypeError: `model` or `proposal` is no `AutoregressiveModel`, `gain` no `Gain`, `length`, `n` or `runs` not an
            int, `threshold` no number, or `generator` no generator.
        ValueError: `length` < 1 or not that of the gain, `n` < 1, `runs` < 1, `threshold` outside [0, 1]; a gain that
            returns another shape, NaN or +inf, or -inf for the empty string; a proposal over another number of tokens.

    Example:
        >>> from tiltlib import stepwise
        >>> from tiltlib.markov import MarkovChain
        >>> words = MarkovChain.fit(["aba", "abba", "ab"], torch.ones(3), order=1)
        >>> reward = torch.tensor([0.0 if symbol == "a" else 1.0 for symbol in words.alphabet])
        >>> values = words.soft_values(reward, 1.0, 8)  # exact; a guess of them will do
        >>> gain = stepwise.gain(words, reward, 1.0, values)
        >>> found = twisted_smc(words, gain, 8, 100, generator=torch.Generator().manual_seed(0))
        >>> abs(found.log_partition - words.tilt(reward, 1.0, 8).log_partition).item() < 0.5
        True

    Source: [delmoral2006], [guarniero2017]; book, `smc-unbiased` and `particle-law`.
    """
    _checks.instance("model", model, AutoregressiveModel)
    _checks.instance("gain", gain, Gain)
    _checks.generator("generator", generator)
    for name, number in (("length", length), ("n", n), ("runs", runs)):
        _checks.count(name, number)
    gain.check_length(length)
    if proposal is not None:
        _checks.instance("proposal", proposal, AutoregressiveModel)
    n, runs = int(n), int(runs)
    begun = model.begin(n * runs)
    values = gain.values(begun, n * runs)
    if not bool((values > -math.inf).all()):
        raise ValueError("log_values must be finite for the empty string, got -inf")
    # The history of all particles is most of the memory: int32 holds every symbol.
    tokens = torch.empty(runs, int(length), n, dtype=torch.int32, device=values.device)

    def step(t: int, state: tuple[Any, Any, Tensor]) -> tuple[tuple[Any, Any, Tensor], Tensor]:
        p, q, values = state
        token = (model if proposal is None else proposal).draw(p if proposal is None else q, generator=generator)
        correction: float | Tensor = 0.0
        if proposal is not None:
            correction = _log_ratio(model.next_logps(p), proposal.next_logps(q), token)
            if t < length - 1:
                q = proposal.append(q, token)
        earned = gain.earned(p, token)
        p = model.append(p, token)
        gained, ahead = gain.step(values, earned, p)
        tokens[:, t] = token.view(runs, n)
        return (p, q, ahead), gained + correction

    def take(state: tuple[Any, Any, Tensor], index: Tensor) -> tuple[Any, Any, Tensor]:
        p, q, values = state
        return model.take(p, index), None if proposal is None else proposal.take(q, index), values[index]

    out = particles.grow(
        (begun, None if proposal is None else proposal.begin(n * runs), values),
        step,
        take,
        length,
        torch.zeros(runs, n, dtype=torch.float64, device=values.device),
        generator=generator,
        threshold=threshold,
        scheme=scheme,
    )
    _, log_weights, log_partition, ancestors, ess = out
    strings = _traced(tokens, ancestors).to(torch.int64, memory_format=torch.contiguous_format)
    return Particles(strings, log_weights, values[0] + log_partition, ancestors, ess)


def _log_ratio(model_rows: Tensor, proposal_rows: Tensor, token: Tensor) -> Tensor:
    """Compute log p - log q of the drawn tokens; -inf for one that the proposal cannot write."""
    if model_rows.shape != proposal_rows.shape:
        raise ValueError(
            f"proposal must give as many log-probabilities as model, "
            f"got shapes {tuple(proposal_rows.shape)} and {tuple(model_rows.shape)}"
        )
    p, q = (rows.gather(-1, token[:, None])[:, 0].double() for rows in (model_rows, proposal_rows))
    return torch.where(q > -math.inf, p - q, -math.inf)
