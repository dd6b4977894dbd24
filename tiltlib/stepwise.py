"""Exact tables on Markov chains for methods that go step by step: gains, best proposals, laws of selection by symbols.

The target is the tilt of a chain by an additive reward; a twist V says how much the rest of a string is expected to be
worth. With

    G_t = exp(r(c, a) / beta + V_{t+1}(c a) - V_t(c)),    V_L = 0
    g_t(c, a) = G_t p(a | c) / q_t(a | c)

the product of the g_t along a string is w(y) p(y) / q(y), divided by exp(V_0). `gain` hands a twist to samplers that
take any model; the other functions tabulate what such samplers do.

No twists: zeros of shape (L + 1, V^order). Exact: `ref.soft_values(rewards, beta, L)`. Learned: the soft values of a
chain that was fitted to samples. With exact values and `twisted_proposal` all weights are equal and every string is a
draw of the tilt.
"""

import math
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from tiltlib import _checks, _numerics, selection
from tiltlib.autoregressive import Gain
from tiltlib.markov import MarkovChain, TiltedChain

__all__ = ["gain", "log_increments", "soft_best_of_n_chain", "twisted_proposal"]


class _Target(NamedTuple):
    """The tilt, where it can be at each step, log p(a | c), r(c, a), and V_{t+1}(c a) for each step; all float64."""

    tilted: TiltedChain
    reached: Tensor
    tables: Tensor
    rewards: Tensor
    ahead: Tensor


def _ends_at_zero(log_values: Tensor) -> None:
    rule = "log_values must be 0 after the last step, since the rewards are the whole weight of a string"
    _checks.holds(log_values[-1] == 0, lambda: ValueError(rule))


def _target(ref: MarkovChain, rewards: Tensor, beta: float, log_values: Tensor) -> _Target:
    table = ref.reward_table(rewards)
    length = _checks.value_per_context("log_values", log_values, len(table))
    _ends_at_zero(log_values)
    tilted = ref.tilt(rewards, beta, length)
    reached = tilted.contexts(length) > 0
    _checks.finite_where("log_values", log_values, reached, "wherever the target has mass")
    tables = torch.stack([ref.table(t) for t in range(length)])
    ahead = torch.stack([ref.lookahead(values) for values in log_values[1:].double()])
    return _Target(tilted, reached, tables, table, ahead)


def gain(
    ref: MarkovChain, rewards: Tensor, beta: float, log_values: Tensor, proposal: MarkovChain | None = None
) -> Gain:
    """Hand an additive reward and a table of twists to samplers that take any model.

        log_tilt = r(c, a) / beta,    log_values = V_t(c)

    What can only be proved on tables is proved here, once: that the twists and the proposal are positive wherever the
    target is. Without a zero among the twists, and without a proposal, there is nothing to prove. Not differentiable:
    the gain keeps copies of the numbers.

    Args:
        ref: Reference chain p, the model that the sampler is given.
        rewards: As for `log_increments`.
        beta: As for `log_increments`.
        log_values: As for `log_increments`; L is the length of the strings.
        proposal: Chain that the sampler will draw from, to be checked. Default: the reference.

    Returns:
        The gain, for strings of length L.

    Raises:
        TypeError: as for `log_increments`.
        ValueError: as for `log_increments`.

    Source: [guarniero2017]; book, `smc-unbiased`.
    """
    with _checks.together():
        if proposal is not None or (isinstance(log_values, Tensor) and bool((log_values == -math.inf).any())):
            log_increments(ref, rewards, beta, log_values, proposal)
        length = _checks.value_per_context("log_values", log_values, len(ref.alphabet) ** ref.order)
        _ends_at_zero(log_values)
        _checks.positive("beta", beta)
        values = log_values.detach().double().clone()
        log_tilt = ref.reward_table(rewards, length).detach() / float(beta)
        rule = f"beta must be so large that rewards / beta stays within float64, got {beta!r}"
        _checks.holds(log_tilt < math.inf, lambda: ValueError(rule))
        return Gain(
            lambda state: values[state.step, state.contexts],
            lambda state, tokens: log_tilt[state.contexts, tokens],
            length,
        )


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
    with _checks.together():
        _, _, tables, earned, ahead = _target(ref, rewards, beta, log_values)
        possible = (tables > -math.inf) & (earned > -math.inf) & (ahead > -math.inf)
        somewhere = possible.any(-1, keepdim=True)
        # Shift before dividing: r / beta may overflow, (r - max r) / beta only goes to weight 0.
        top = torch.where(possible, earned, -math.inf).detach().amax(-1, keepdim=True)
        joint = torch.where(possible, tables + (earned - top) / float(beta) + ahead, -math.inf)
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
    with _checks.together():
        proposal = ref if proposal is None else proposal
        ref.check_alike("proposal", proposal)
        tilted, reached, tables, earned, ahead = _target(ref, rewards, beta, log_values)
        steps = []
        for t, numerator in enumerate(tables + earned / float(beta) + ahead):
            q = proposal.table(t)
            missed = reached[t][:, None] & (tilted.table(t) > -math.inf) & (q == -math.inf)
            _checks.holds(~missed, partial(_uncovered, t, missed))
            # A prefix whose twist is 0 has weight 0 for good; a symbol that is never proposed needs no weight.
            here = log_values[t].double()[:, None]
            steps.append(torch.where((here > -math.inf) & (q > -math.inf), numerator - here - q, -math.inf))
        increments = torch.stack(steps)
        rule = f"beta must be so large that rewards / beta and log_values stay within float64, got {beta!r}"
        _checks.holds(increments < math.inf, lambda: ValueError(rule))
        return increments


def _uncovered(t: int, missed: Tensor) -> ValueError:
    context, symbol = missed.nonzero()[0].tolist()
    return ValueError(
        f"proposal must be positive wherever the target has mass, "
        f"got 0 at step {t} in context {context} for symbol {symbol}"
    )


def soft_best_of_n_chain(ref: MarkovChain, rewards: Tensor, beta: float, log_values: Tensor, n: int) -> MarkovChain:
    """Compute the law of strings of which every symbol is a soft best-of-N choice among n candidate symbols.

        n candidates a ~ p(. | c);    P(keep a) proportional to exp(r(c, a) / beta + V_{t+1}(c a))

    With V = 0 this looks at the reward of the symbol alone. With the exact values it tends to the tilt as n grows. Not
    differentiable: the result carries no graph.
    Cost of one `soft_best_of_n_law` per step and context that can be reached.

    Args:
        ref: Reference chain p.
        rewards: Reward of each symbol, shape (V,), or of each symbol after each context, shape (V^order, V); finite
            where the reference has mass.
        beta: Temperature in reward units, > 0.
        log_values: V, shape (L + 1, V^order), finite where the reference can go; L is the length of the strings.
        n: Number of candidates per symbol, >= 1.

    Returns:
        The exact law, a chain with one table per step, float64. A context that is never reached keeps the row of the
        reference.

    Raises:
        TypeError: `rewards` or `log_values` is not a floating tensor, or `n` is not an int.
        ValueError: `log_values` of another shape or not finite where the reference can go; rewards / beta + log_values
            that span more than 600 in one context; `rewards`, `beta` and `n` as for `soft_best_of_n_law`.

    Source: book, `blockwise-gap` and `values-break-the-wall`.
    """
    _checks.count("n", n)
    _checks.positive("beta", beta)
    table = ref.reward_table(rewards)
    length = _checks.value_per_context("log_values", log_values, len(table))
    reached, tables = ref.contexts(length) > 0, []
    _checks.finite_where("log_values", log_values, reached, "where the reference can go")
    for t in range(length):
        rows, here = ref.table(t).detach().clone(), reached[t]
        # Only what the reference can do counts: shifted before it is divided, whatever small beta makes of the rest.
        top = torch.where(rows > -math.inf, table, -math.inf).amax(-1, keepdim=True)
        scores = _numerics.over(table, torch.where(top > -math.inf, top, 0), beta)
        scores = torch.where(rows > -math.inf, scores + ref.lookahead(log_values[t + 1].double()), 0)
        possible = rows[here] > -math.inf
        if bool((possible & (scores[here] == -math.inf)).any()):
            raise ValueError(f"rewards must be finite where the reference has mass, got -inf at step {t}")
        high, low = (torch.where(possible, scores[here], end) for end in (-math.inf, math.inf))
        span = (high.amax(-1) - low.amin(-1)).max().item()
        if not span <= 600:
            raise ValueError(
                f"rewards / beta + log_values must span at most 600 in each context, got {span:.6g} at step {t}; "
                "beta must be larger"
            )
        rows[here] = selection.soft_best_of_n_law(rows[here], scores[here], 1.0, n)
        tables.append(rows)
    return MarkovChain(torch.stack(tables), ref.alphabet)
