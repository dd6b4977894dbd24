"""Sequential Monte Carlo: strings grown together, symbol by symbol, and resampled when their weights become uneven.

The target is the tilt of a Markov chain by an additive reward. A twist says how much the rest of a string is expected
to be worth; it steers which prefixes are kept, and cancels from the weight of a finished string. With

    G_t = exp(r(c, a) / beta + V_{t+1}(c a) - V_t(c)),    V_L = 0
    g_t(c, a) = G_t p(a | c) / q_t(a | c)

the product of the g_t along a string is w(y) p(y) / q(y), divided by exp(V_0). `log_partition` is V_0 plus the logs of
the mean weights, one for each resampling and one at the end. `log_weights` belong to the finished strings. So

    E exp(log_partition) = Z    for any twists V
    sum_i w_i f(y_i) / sum_i w_i    estimates E_{pi*} f

No twists: zeros of shape (L + 1, V^order). Exact: `ref.soft_values(rewards, beta, L)`. Learned: the soft values of a
chain that was fitted to samples. With exact values and `twisted_proposal` all weights are equal and every string is a
draw of the tilt. Weights are carried from step to step until a resampling spends them; dropping them is a bias.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from tiltlib import _checks, resampling, weights
from tiltlib.markov import MarkovChain, TiltedChain

__all__ = ["Particles", "log_increments", "trace", "twisted_proposal", "twisted_smc"]


# A resampling scheme: scheme(log_weights, n, generator=g) gives ancestors.
Scheme = Callable[..., Tensor]


class Particles(NamedTuple):
    """What `twisted_smc` returns.

    Attributes:
        tokens: Finished strings, int64, shape (runs, n, L).
        log_weights: Their unnormalised log weights since the last resampling, shape (runs, n).
        log_partition: Estimate of log Z per run, shape (runs,); exp of it is unbiased for Z. -inf where all particles
            died.
        ancestors: Particle that each particle continues at each step, int64, shape (runs, L, n); itself where nothing
            was resampled, and always at step 0.
        ess: Effective sample size after each step, shape (runs, L); 0 where all particles had died.
    """

    tokens: Tensor
    log_weights: Tensor
    log_partition: Tensor
    ancestors: Tensor
    ess: Tensor


class _Target(NamedTuple):
    """The tilt, where it can be at each step, log p(a | c), r(c, a), and V_{t+1}(c a) for each step; all float64."""

    tilted: TiltedChain
    reached: Tensor
    tables: Tensor
    rewards: Tensor
    ahead: Tensor


def _target(ref: MarkovChain, rewards: Tensor, beta: float, log_values: Tensor) -> _Target:
    gain = ref.reward_table(rewards)
    length = _checks.value_per_context("log_values", log_values, len(gain))
    if bool((log_values[-1] != 0).any()):
        raise ValueError("log_values must be 0 after the last step, since the rewards are the whole weight of a string")
    tilted = ref.tilt(rewards, beta, length)
    reached = tilted.contexts(length) > 0
    _checks.finite_where("log_values", log_values, reached, "wherever the target has mass")
    tables = torch.stack([ref.table(t) for t in range(length)])
    ahead = torch.stack([ref.lookahead(values) for values in log_values[1:].double()])
    return _Target(tilted, reached, tables, gain, ahead)


def twisted_proposal(ref: MarkovChain, rewards: Tensor, beta: float, log_values: Tensor) -> MarkovChain:
    """Let the twists choose the symbols: the proposal of least weight variance, one step ahead.

        q_t(a | c) = p(a | c) exp(r(c, a) / beta + V_{t+1}(c a)) / sum over a

    With the exact values this is the tilt itself. Differentiable.

    Args:
        ref: Reference chain p.
        rewards: As for `log_increments`.
        beta: As for `log_increments`.
        log_values: As for `log_increments`.

    Returns:
        The proposal, float64, with one table per step. A context that leads nowhere keeps the row of the reference.

    Raises:
        TypeError: `rewards` or `log_values` is not a floating tensor.
        ValueError: as for `log_increments`.

    Source: [guarniero2017]; book, `soft-value`.
    """
    _, _, tables, gain, ahead = _target(ref, rewards, beta, log_values)
    possible = (tables > -math.inf) & (gain > -math.inf) & (ahead > -math.inf)
    somewhere = possible.any(-1, keepdim=True)
    # Shift before dividing: r / beta may overflow, (r - max r) / beta only goes to weight 0.
    top = torch.where(possible, gain, -math.inf).detach().amax(-1, keepdim=True)
    joint = torch.where(possible, tables + (gain - top) / float(beta) + ahead, -math.inf)
    # The softmax of a context that leads nowhere would be NaN, in the gradient even where it is masked.
    rows = torch.log_softmax(torch.where(somewhere, joint, 0.0), -1)
    return MarkovChain(torch.where(somewhere, rows, tables), ref.alphabet)


def log_increments(
    ref: MarkovChain, rewards: Tensor, beta: float, log_values: Tensor, proposal: MarkovChain | None = None
) -> Tensor:
    """Compute the log weight that each symbol adds, for every step and context.

        log g_t(c, a) = log p(a | c) + r(c, a) / beta + V_{t+1}(c a) - V_t(c) - log q_t(a | c)

    Differentiable. Cost O(L V^{order+1}).

    Args:
        ref: Reference chain p.
        rewards: Reward of each symbol, shape (V,), or of each symbol after each context, shape (V^order, V); -inf
            excludes.
        beta: Temperature in reward units, > 0.
        log_values: V, shape (L + 1, V^order), the last row 0; -inf only where the target has no mass.
        proposal: Chain q that symbols are drawn from. Default: the reference.

    Returns:
        Log increments, float64, shape (L, V^order, V); -inf where the weight is 0 or the proposal never goes.

    Raises:
        TypeError: `rewards` or `log_values` is not a floating tensor, or `proposal` no chain.
        ValueError: `log_values` of another shape, not 0 after the last step, with NaN or +inf, or -inf where the target
            has mass; a proposal that is 0 there, or of another order or alphabet; `rewards` or `beta` as for
            `MarkovChain.soft_values`, or `beta` so small that an increment leaves float64.

    Source: [guarniero2017]; book, `smc-unbiased`.
    """
    proposal = ref if proposal is None else proposal
    ref.check_alike("proposal", proposal)
    tilted, reached, tables, gain, ahead = _target(ref, rewards, beta, log_values)
    steps = []
    for t, numerator in enumerate(tables + gain / float(beta) + ahead):
        q = proposal.table(t)
        missed = reached[t][:, None] & (tilted.table(t) > -math.inf) & (q == -math.inf)
        if bool(missed.any()):
            context, symbol = missed.nonzero()[0].tolist()
            raise ValueError(
                f"proposal must be positive wherever the target has mass, "
                f"got 0 at step {t} in context {context} for symbol {symbol}"
            )
        # A prefix whose twist is 0 has weight 0 for good; a symbol that is never proposed needs no weight.
        here = log_values[t].double()[:, None]
        steps.append(torch.where((here > -math.inf) & (q > -math.inf), numerator - here - q, -math.inf))
    increments = torch.stack(steps)
    if not bool((increments < math.inf).all()):
        raise ValueError(f"beta must be so large that rewards / beta and log_values stay within float64, got {beta!r}")
    return increments


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
    _checks.sequences("tokens", tokens)
    _checks.same_shape(tokens=tokens, ancestors=parents)
    if tokens.ndim < 2 or tokens.shape[-2] == 0:
        raise ValueError(f"tokens must have shape (..., L, n) with L >= 1, got {tuple(tokens.shape)}")
    if parents.numel():  # no particle systems have no ancestors to check
        _checks.indices("ancestors", parents, tokens.shape[-1])
    particle = torch.arange(tokens.shape[-1], device=tokens.device).expand(tokens[..., 0, :].shape)
    strings = []
    for t in reversed(range(tokens.shape[-2])):
        strings.append(tokens[..., t, :].gather(-1, particle))
        particle = parents[..., t, :].gather(-1, particle)
    return torch.stack(strings[::-1], -1)


@torch.no_grad()
def twisted_smc(
    ref: MarkovChain,
    rewards: Tensor,
    beta: float,
    log_values: Tensor,
    n: int,
    *,
    generator: torch.Generator,
    proposal: MarkovChain | None = None,
    threshold: float = 0.5,
    scheme: Scheme = resampling.systematic,
    runs: int = 1,
) -> Particles:
    """Grow n strings together, `runs` times over, each time resampling when the weights are uneven.

        resample before a step iff ESS < threshold n
        then log_partition += log of the mean weight, and all weights are 1

    Independent runs are computed together; each decides on its own when to resample. A run in which every particle has
    weight 0 estimates Z by 0, and goes on without resampling. All is computed in float64. Not differentiable.

    Args:
        ref: Reference chain p.
        rewards: As for `log_increments`.
        beta: As for `log_increments`.
        log_values: As for `log_increments`; L is the length of the strings. See the module for the usual choices.
        n: Particles per run, >= 1.
        generator: Source of randomness, on the device of the chain.
        proposal: Chain that symbols are drawn from, positive wherever the target is. Default: the reference.
        threshold: Resample when ESS / n falls below it, in [0, 1]: 0 is never, 1 whenever weights differ.
        scheme: One of `resampling.multinomial`, `residual`, `stratified`, `systematic`.
        runs: Independent particle systems, >= 1.

    Returns:
        `Particles(tokens, log_weights, log_partition, ancestors, ess)`.

    Raises:
        TypeError: `rewards` or `log_values` is not a floating tensor, `n` or `runs` not an int, `threshold` no number,
            or `generator` no generator.
        ValueError: as for `log_increments`; `n` < 1, `runs` < 1, or `threshold` outside [0, 1].

    Example:
        >>> words = MarkovChain.fit(["aba", "abba", "ab"], torch.ones(3), order=1)
        >>> reward = torch.tensor([0.0 if symbol == "a" else 1.0 for symbol in words.alphabet])
        >>> values = words.soft_values(reward, 1.0, 8)  # exact; a guess of them will do
        >>> found = twisted_smc(words, reward, 1.0, values, 100, generator=torch.Generator().manual_seed(0))
        >>> abs(found.log_partition - words.tilt(reward, 1.0, 8).log_partition).item() < 0.5
        True

    Source: [delmoral2006], [guarniero2017]; book, `smc-unbiased` and `particle-law`.
    """
    _checks.generator("generator", generator)
    _checks.count("n", n)
    _checks.count("runs", runs)
    _checks.fraction("threshold", threshold, zero=True)
    increments = log_increments(ref, rewards, beta, log_values, proposal)
    proposal = ref if proposal is None else proposal
    device = increments.device
    itself = torch.arange(n, device=device).expand(runs, n)
    context = torch.full((runs, n), ref.start, device=device)
    log_weights = torch.zeros(runs, n, dtype=torch.float64, device=device)
    log_partition = log_values[0, ref.start].double().expand(runs)
    # Equal weights may differ in their last digits; that is no reason to resample.
    enough = threshold * n * (1 - 1e-9)
    symbols, ancestors, sizes = [], [], [torch.full((runs,), float(n), dtype=torch.float64, device=device)]
    for t, log_g in enumerate(increments):
        uneven = ((0 < sizes[-1]) & (sizes[-1] < enough))[:, None]
        parents = itself
        if bool(uneven.any()):
            spent = torch.where(uneven, log_weights, 0.0)
            parents = torch.where(uneven, scheme(spent, n, generator=generator), itself)
            log_partition = log_partition + weights.log_mean(spent)
            log_weights = torch.where(uneven, 0.0, log_weights)
        context = context.gather(-1, parents)
        symbol = proposal.draw(t, context, generator=generator)
        log_weights = log_weights + log_g[context, symbol]
        context = ref.append(context, symbol)
        symbols.append(symbol)
        ancestors.append(parents)
        alive = (log_weights > -math.inf).any(-1)
        sizes.append(torch.where(alive, weights.ess(torch.where(alive[:, None], log_weights, 0.0)), 0.0))
    history = torch.stack(ancestors, 1)
    return Particles(
        trace(torch.stack(symbols, 1), history),
        log_weights,
        log_partition + log_weights.logsumexp(-1) - math.log(n),
        history,
        torch.stack(sizes[1:], -1),
    )
