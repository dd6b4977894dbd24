"""Curves of best-of-N for every N, unbiased, from the rewards of one pool of M answers, and how far to trust them.

A pool is M independent answers to one prompt, with their rewards. Every N of them are a pool that best-of-N could have
drawn, so the mean over all subsets of size N,

    U_N(f) = (1 / C(M, N)) sum over |S| = N of sum_{i in S} f_i P(i is kept of S),

is unbiased for what best-of-N returns on average, E f, whatever the law of the answers and for every N <= M. Three
rules keep one answer of S, all of them ready for ties:

    hard         the largest reward
    soft         i with probability w_i / sum_S w, w = exp(r / beta)
    exponential  the largest r + beta E, with E standard exponential noise, independent for every answer

The number f is the reward unless `values` are given: true rewards where `rewards` are a proxy, 0 and 1 for correct.
Nothing says what more than M answers would do: U_M of the soft rule is the self-normalised estimate, with the bias of
soft best-of-M. The temperature at which a wanted share of the pool counts is `weights.beta_for_ess`.

The theory is in the book, "One scored pool": `pool-curve`, `pool-curve-rules` and what follows from them.

From the command line: `python -m tiltlib.pool FILE` reads answers, one a line, prints a table and draws the curve.

    {"prompt": "a", "reward": 0.7}                                JSON lines, or CSV with these columns
    {"prompt": "a", "reward": 0.2, "value": 1, "logratio": -0.1}  of which prompt, value and logratio are optional

Where lines have a `value`, the curve is that of the value of the answer kept by its reward.
"""

import argparse
import csv
import json
import math
import sys
import time
from array import array
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.polynomial import legendre
from numpy.typing import NDArray
from scipy.optimize import brentq
from torch import Tensor

from tiltlib import _checks, _numerics, categorical, selection, weights

__all__ = [
    "Needed",
    "curve",
    "divergence",
    "doubts",
    "interval",
    "mean_interval",
    "needed_beta",
    "needed_n",
    "pass_at_k",
    "standard_errors",
]

Floats = NDArray[np.float64]

RULES = ("hard", "soft", "exponential")

# Step of the trapezoid rule in log s, cut on the right where e^-43 < 2^-53 / 100, as in `selection.soft_best_of_n_law`.
_STEP, _LOG_43 = 0.25, math.log(43.0)
# For s <= 1 / n the polynomial through 14 Gauss nodes misses D_N by at most 14! / 28! = 3e-19 of its value for |f| at
# 0, which changes U_N by 5e-19 of its value for |f| (book, `pool-curve-quadrature`, part 3).
_FLAT = 14
# On a panel [a, 1.5 a] every mean of products of 1 - w v with w <= 1 / a is a polynomial that stays below 1 on an
# ellipse of radius 5.8, and 5.8^-22 < 2^-53 / 7: so many nodes represent it, whatever its degree.
_PANEL, _NODES = 1.5, 22
# Numbers in one block of nodes, so that it stays in the cache.
_BLOCK = 2**17


class Needed(NamedTuple):
    """What a target needs, and how sure that is.

    Attributes:
        best: The number at which the curve itself reaches the target.
        low: The same where the curve is raised by so many standard errors as were asked for.
        high: The same where the curve is lowered by them; infinite where the pool cannot say.
    """

    best: float
    low: float
    high: float


class _Pool(NamedTuple):
    """A checked pool in float64, sorted by weight: log weights whose largest is 0, values, and p / s over its mean."""

    log_w: Tensor
    f: Tensor
    ratios: Tensor
    mean_ratio: float
    offset: float


# --- curves ----------------------------------------------------------------------------------------------------------


def curve(
    rewards: Tensor,
    beta: float | Tensor,
    n: int,
    *,
    rule: str = "soft",
    values: Tensor | None = None,
    log_ratios: Tensor | None = None,
) -> Tensor:
    """Estimate E f of the kept answer for N = 1, ..., n, without bias, from one pool.

        U_N = int_0^inf D_N ds,    E_0 = 1, D_0 = 0, and for each answer m = 1, ..., M and k = N, ..., 1
        E_k <- (1 - k/m) E_k + (k/m) x E_{k-1}
        D_k <- (1 - k/m) D_k + (k/m) (x D_{k-1} + v E_{k-1})

    E_k and D_k are means over subsets of size k of prod x and of sum_i v_i prod_{j != i} x_j. Soft: x = exp(-s w) and
    v = f w x, by the trapezoid rule in log s, of relative error 1.8e-16 for f >= 0. Exponential:
    x = 1 - w s and v = f w while s < 1 / w, by Gauss' rule on pieces. Hard: a sum, sum_i f_i (N / i) C(i, N) / C(M, N)
    over answers in ascending order. All terms are convex combinations, so nothing cancels.

    Answers may come from a draft s, with `log_ratios` = log p - log s: then the curve is that of p, unbiased, with a
    variance that grows like (1 + chi2(p || s))^N. To ask what selection from the draft with weights w p / s returns,
    pass rewards + beta * log_ratios as `rewards`, and `values`. Not differentiable: the result carries no graph. Cost
    O(M n) per node: 4 (log n + R) + 30 nodes for soft, R the range of rewards / beta, about 55 R + n / 2 for
    exponential, one for hard.

    Args:
        rewards: Reward of each answer, shape (..., M), M >= 2, finite.
        beta: Temperature in reward units, > 0; unused by the hard rule. The range of rewards / beta must not exceed
            600. A tensor broadcasts against the batch dimensions.
        n: Largest N, 1 <= n <= M.
        rule: "hard", "soft" or "exponential".
        values: The number f of each answer, finite; None for the rewards. Its shape broadcasts to that of `rewards`.
        log_ratios: log p - log s of each answer where they were drawn from s, finite or -inf; its shape broadcasts to
            that of `rewards`. None if they were drawn from p. Not for the hard rule.

    Returns:
        U_1, ..., U_n, shape (..., n), in the dtype of `rewards`. U_1 is the mean of f.

    Raises:
        TypeError: a tensor is not floating, or `n` not an int.
        ValueError: fewer than two answers, `n` < 1 or > M, numbers not finite, shapes that do not fit, a `beta` not
            finite and > 0 or too small, an unknown `rule`, `log_ratios` that are all -inf or come with the hard rule.

    Example:
        >>> rewards = torch.tensor([0.0, 1.0, 1.0, 2.0, 3.0, 5.0], dtype=torch.float64)
        >>> [round(u, 4) for u in curve(rewards, 1.0, 4).tolist()]
        [2.0, 2.8827, 3.4532, 3.8827]

    Source: book, `pool-curve`, `pool-curve-quadrature`, `pool-curve-rules`; `pool-curve-interval` for a draft.
        [verdun2025] and [beirami2024] for what is estimated.
    """
    pools, shape = _pools(rewards, beta, n, rule, values, log_ratios)
    out = torch.empty(*shape, n, dtype=torch.float64, device=rewards.device).view(-1, n)
    for row, pool in zip(out, pools, strict=True):
        row[:] = _curve(pool, n, rule)
    return out.view(*shape, n).to(rewards.dtype)


def standard_errors(
    rewards: Tensor,
    beta: float | Tensor,
    n: int,
    *,
    rule: str = "soft",
    values: Tensor | None = None,
    log_ratios: Tensor | None = None,
) -> Tensor:
    """Estimate the standard error of each point of `curve`, by the jackknife.

        se_N^2 = sum_i (U_N without answer i - U_N)^2

    Its mean is at least the variance of U_N, so it errs on the safe side on average. On a single pool it can fail: a
    pool without the rare best answer does not know of it, and says 0. Not differentiable: the result carries no graph.
    Cost: for N <= M / 2 the hard and soft rules take all answers out at once, at about the cost of `curve` or three
    times that; otherwise M curves.

    Args:
        rewards: Reward of each answer, shape (..., M), M >= 2, finite.
        beta: Temperature in reward units, > 0, as for `curve`.
        n: Largest N, 1 <= n <= M.
        rule: "hard", "soft" or "exponential".
        values: As for `curve`.
        log_ratios: As for `curve`.

    Returns:
        Standard errors for N = 1, ..., n, shape (..., n), in the dtype of `rewards`; infinite at N = M, where one pool
        cannot say.

    Raises:
        TypeError: as for `curve`.
        ValueError: as for `curve`.

    Source: book, `pool-curve-variance`.
    """
    pools, shape = _pools(rewards, beta, n, rule, values, log_ratios)
    m = rewards.shape[-1]
    out = torch.full((*shape, n), math.inf, dtype=torch.float64, device=rewards.device).view(-1, n)
    for row, pool in zip(out, pools, strict=True):
        known = min(n, m - 1)  # without an answer there are no M left
        without = _without_each(pool, known, rule)
        row[:known] = (without - _curve(pool, known, rule)[:, None]).square().sum(1).sqrt()
    return out.view(*shape, n).to(rewards.dtype)


def pass_at_k(correct: Tensor, n: int) -> Tensor:
    """Estimate, without bias, the chance that at least one of k answers is correct, for k = 1, ..., n.

        1 - C(M - c, k) / C(M, k),    c of M answers correct

    The hard curve of 0 and 1; `curve` itself is asked. Not differentiable.

    Args:
        correct: 1 for a correct answer and 0 for a wrong one, shape (..., M), floating or bool.
        n: Largest k, 1 <= n <= M.

    Returns:
        Pass rates for k = 1, ..., n, shape (..., n), in the dtype of `correct`; float64 for bool.

    Raises:
        TypeError: `correct` is neither a floating nor a bool tensor, or `n` not an int.
        ValueError: numbers other than 0 and 1, fewer than two answers, or `n` < 1 or > M.

    Example:
        >>> pass_at_k(torch.tensor([1.0, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0], dtype=torch.float64), 4)[3].item()
        0.9285714285714286

    Source: [chen2021]; book, `pool-curve-rules`.
    """
    if isinstance(correct, Tensor) and correct.dtype == torch.bool:
        correct = correct.double()
    _checks.tensor("correct", correct)
    wrong = correct[(correct != 0) & (correct != 1)]
    if len(wrong):
        raise ValueError(f"correct must be 0 or 1, got {wrong[0].item():g}")
    return curve(correct, 1.0, n, rule="hard")


def _pools(
    rewards: Tensor,
    beta: float | Tensor,
    n: int,
    rule: str,
    values: Tensor | None,
    log_ratios: Tensor | None,
) -> tuple[list[_Pool], torch.Size]:
    """Check the arguments of a curve; return one pool per row, and the batch shape."""
    with _checks.together():
        _checks.tensor("rewards", rewards)
        _checks.one_of("rule", rule, RULES)
        _checks.finite(
            "rewards", rewards
        )  # an excluded answer is no answer: leave it out, and p is the law of the others
        m = rewards.shape[-1]
        if m < 2:
            raise ValueError("rewards must hold at least 2 answers in the last dimension, got 1: one answer is no pool")
        _checks.count("n", n)
        if n > m:
            raise ValueError(f"n must be at most {m}, the number of answers in the pool, got {n}")
        _checks.positive_per_row("beta", beta, rewards.shape[:-1])
        if isinstance(beta, Tensor):
            beta = beta.detach()
        if values is not None:
            _checks.finite("values", values)
            _checks.fits("values", values, rewards)
        if log_ratios is not None:
            _checks.rewards("log_ratios", log_ratios)
            _checks.fits("log_ratios", log_ratios, rewards)
            _checks.some_left("log_ratios", log_ratios.amax(-1))
            if rule == "hard":
                raise ValueError(
                    "log_ratios must be None for the hard rule, got a tensor; the soft and exponential take it"
                )
        r = rewards.detach().double()
        # The hard rule asks for the order alone, and rewards that differ must not be rounded to a tie.
        log_w = r if rule == "hard" else _numerics.over(r, r.amax(-1, keepdim=True), beta)
        log_w, f = torch.broadcast_tensors(log_w, r if values is None else values.detach().double())
        if rule != "hard":  # exp(-700) leaves float64
            _checks.require(
                log_w,
                -600,
                math.inf,
                lambda low, high: ValueError(
                    f"beta must be at least (max reward - min reward) / 600, got rewards / beta that span "
                    f"{-low:.6g}; the hard rule is the limit beta to 0"
                ),
            )
    ratios = torch.zeros_like(f) if log_ratios is None else log_ratios.detach().double().expand_as(f)
    rows = [x.reshape(math.prod(f.shape[:-1]), m) for x in (log_w, f, ratios)]
    return [_pool(a, b, c, log_ratios is None) for a, b, c in zip(*rows, strict=True)], f.shape[:-1]


def _pool(log_w: Tensor, f: Tensor, log_ratios: Tensor, plain: bool) -> _Pool:
    order = log_w.argsort(stable=True)
    # Where the ratios are 1 the curve of f - c is that of f, minus c: equal values keep all their digits.
    offset = float(f.amin()) if plain else 0.0
    # Over their mean, the means of products of k ratios are at most 1 (Maclaurin's inequality), for every k.
    log_mean = 0.0 if plain else float(log_ratios.logsumexp(-1)) - math.log(len(f))
    return _Pool(log_w[order], (f - offset)[order], (log_ratios - log_mean).exp()[order], math.exp(log_mean), offset)


def _curve(pool: _Pool, n: int, rule: str) -> Tensor:
    of_rule = {"hard": _hard, "soft": _soft, "exponential": _exponential}[rule]
    return of_rule(pool, n) * pool.mean_ratio ** _sizes(n, pool.f) + pool.offset


def _sizes(n: int, like: Tensor) -> Tensor:
    return torch.arange(1, n + 1, dtype=torch.float64, device=like.device)


def _within(m: int, n: int, like: Tensor) -> Tensor:
    """Compute C(i, N) / C(m, N), the share of N-subsets that lie among the first i of m; rows i = 0..m, columns N."""
    i = _sizes(m, like)[:, None]
    # From the top down by factors 1 - N / i; the factor at i = N is 0, and what lies below stays there.
    lower = (1 - _sizes(n, like) / i).flip(0).cumprod(0).flip(0)
    return torch.cat([lower, torch.ones_like(lower[:1])])


def _best_of(m: int, n: int, like: Tensor) -> Tensor:
    """Compute (N / i) C(i, N) / C(m, N), the chance that the i-th of m is the last in an N-subset; rows i = 1..m."""
    return _within(m, n, like)[1:] * (_sizes(n, like) / _sizes(m, like)[:, None])


def _levels(pool: _Pool) -> tuple[Tensor, Tensor, Tensor]:
    """Find the level of each answer, how many answers each level has, and the mean of f on it."""
    _, level, count = pool.log_w.unique_consecutive(return_inverse=True, return_counts=True)
    total = torch.zeros_like(count, dtype=torch.float64).index_add(0, level, pool.f)
    return level, count, total / count


def _hard(pool: _Pool, n: int) -> Tensor:
    # Tied answers are kept alike: each may stand for the mean of its level.
    level, _, mean = _levels(pool)
    return mean[level] @ _best_of(len(pool.f), n, pool.f)


def _forward(x: Tensor, v: Tensor, n: int, after: Callable[[int, Tensor], None] | None = None) -> Tensor:
    """Run the recursion over answers, whose factors are the rows of `x` and `v`, one column per node.

    Returns the state (E, D), shape (2, n + 1, nodes); `after` sees it after each answer.
    """
    k = _sizes(n, x)[:, None]
    state = torch.zeros(2, n + 1, x.shape[1], dtype=torch.float64, device=x.device)
    state[0, 0] = 1
    below, here, e = state[:, :-1], state[:, 1:], state[0, :-1]
    new = torch.empty_like(below)
    for m in range(len(x)):
        torch.mul(below, x[m], out=new)
        new[1].addcmul_(e, v[m])
        here.lerp_(new, k / (m + 1))  # k > m + 1 mixes 0 with 0
        if after is not None:
            after(m, state)
    return state


def _factors(pool: _Pool, s: Tensor) -> tuple[Tensor, Tensor]:
    """Compute x = exp(-s w) and v = f w x of the soft rule, shape (M, nodes)."""
    w = pool.log_w.exp()[:, None]
    x = torch.exp(-s * w).mul_(pool.ratios[:, None])
    return x, x * (pool.f[:, None] * w)


def _soft_nodes(pool: _Pool, n: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield blocks of nodes s = e^t and their weights h s.

    The nodes below s = 1 / n, infinitely many, see a polynomial: Gauss' nodes stand for them, with the weights that sum
    its values at all of them. The first 170 leave out e^-42.
    """
    count = math.ceil((_LOG_43 - float(pool.log_w[0]) + math.log(n)) / _STEP)
    many = np.exp(-_STEP * np.arange(170))  # in units of 1 / n
    x, _, dual = _gauss(_FLAT)
    at_many = legendre.legvander(2 * many - 1, _FLAT - 1) * (np.arange(_FLAT) + 0.5) @ dual
    above = np.exp(_STEP * np.arange(1, count + 1))
    s = np.concatenate([(1 + x) / 2, above]) / n
    weight = _STEP / n * np.concatenate([many @ at_many, above])
    size = max(1, _BLOCK // max(len(pool.f), n))
    yield from zip(*(torch.as_tensor(a, device=pool.f.device).split(size) for a in (s, weight)), strict=True)


def _soft(pool: _Pool, n: int) -> Tensor:
    out = torch.zeros(n, dtype=torch.float64, device=pool.f.device)
    for s, weight in _soft_nodes(pool, n):
        out += _forward(*_factors(pool, s), n)[1, 1:] @ weight
    return out


def _exponential(pool: _Pool, n: int) -> Tensor:
    """Integrate over s, the level that no noisy reward exceeds is -beta log s; an answer is alive while s < 1 / w.

    On a piece [1 / w_(m+1), 1 / w_m] the first m answers are alive, and D_N among them is a polynomial. It is known by
    its values on the nodes of a panel, which serve all pieces that lie there.
    """
    m, like = len(pool.f), pool.f
    w, share = pool.log_w.exp()[:, None], _within(m, n, like)
    x, weight = (torch.as_tensor(a, device=like.device) for a in _gauss(n // 2 + 1)[:2])
    out = torch.zeros(n, dtype=torch.float64, device=like.device)
    for s, h in zip(*(a.split(max(1, _BLOCK // max(m, n))) for a in ((1 + x) / 2, weight / 2)), strict=True):
        factor, value = (1 - w * s) * pool.ratios[:, None], (pool.f * pool.ratios)[:, None] * w.expand(-1, len(s))
        out += _forward(factor, value, n)[1, 1:] @ h
    panels = math.ceil(-float(pool.log_w[0]) / math.log(_PANEL))
    if panels == 0:  # one level: nothing lies beyond s = 1
        return out
    width = -float(pool.log_w[0]) / panels
    ends = -pool.log_w / width  # where each answer dies, counted in panels; the best at 0
    x, until = _interpolation(ends, width)
    for first in range(0, panels, 8):
        panel = torch.arange(first, min(first + 8, panels), dtype=torch.float64, device=like.device)
        left, size = (width * panel).exp()[:, None], math.expm1(width)
        s = (left * (1 + size * (1 + x) / 2)).flatten()
        here = int((ends > first).sum())  # the others are dead on all of these panels
        alive = (ends[:here, None] > panel).repeat_interleave(len(x), 1)
        factor = torch.where(alive, (1 - w[:here] * s) * pool.ratios[:here, None], 0)
        value = torch.where(alive, (pool.f * pool.ratios)[:here, None] * w[:here], 0)
        # Integrals of the interpolant from the left end of the panels to the end of each answer and the next.
        cell = ends[: here + 1].floor()[:, None, None]
        whole = torch.where(panel[:, None] < cell, until[-1], 0)
        part = torch.where(panel[:, None] == cell, until[: here + 1, None], whole)
        pieces = -(part * left * (size / 2)).flatten(1).diff(dim=0)

        def add(i: int, state: Tensor, pieces: Tensor = pieces) -> None:
            out.add_(share[i + 1] * (state[1, 1:] @ pieces[i]))

        _forward(factor, value, n, add)
    return out


def _gauss(count: int) -> tuple[Floats, Floats, Floats]:
    """Return Gauss' nodes and weights on [-1, 1], and what turns Legendre polynomials P_l into interpolation.

    The polynomial that is 1 at node j and 0 at the others is sum_l (l + 1/2) P_l dual_lj, dual_lj = weight_j P_l(x_j).
    """
    x, weight = legendre.leggauss(count)
    return x, weight, legendre.legvander(x, count - 1).T * weight


def _interpolation(ends: Tensor, width: float) -> tuple[Tensor, Tensor]:
    """Return the nodes of a panel, and integrals of the interpolating polynomials up to each end; the last, up to 1."""
    x, _, dual = _gauss(_NODES)
    e = ends.cpu().numpy()
    inside = np.expm1(width * (e - np.floor(e))) / math.expm1(width)
    y = np.append(2 * inside - 1, 1.0)
    # The integral of (2 l + 1) P_l from -1 is P_(l+1) - P_(l-1), with -1 for P_(-1).
    p = legendre.legvander(y, _NODES)
    gained = (p[:, 1:] - np.column_stack([-np.ones_like(y), p[:, : _NODES - 1]])) / 2
    return torch.as_tensor(x, device=ends.device), torch.as_tensor(gained @ dual, device=ends.device)


# --- standard errors -------------------------------------------------------------------------------------------------


def _without_each(pool: _Pool, n: int, rule: str) -> Tensor:
    """Compute the curve of the pool without answer i, for each i, shape (n, M), the offset left out."""
    m = len(pool.f)
    if n <= m // 2 and rule == "soft":
        return _soft_without_each(pool, n) * pool.mean_ratio ** _sizes(n, pool.f)[:, None] + pool.offset
    if rule == "hard":
        return _hard_without_each(pool, n) + pool.offset
    return torch.stack([_curve(_leave_out(pool, i), n, rule) for i in range(m)], 1)


def _leave_out(pool: _Pool, i: int) -> _Pool:
    log_w, f, ratios = (torch.cat([x[:i], x[i + 1 :]]) for x in pool[:3])
    return _Pool(log_w - log_w[-1], f, ratios, pool.mean_ratio, pool.offset)


def _soft_without_each(pool: _Pool, n: int) -> Tensor:
    """Undo the step of each answer i, as if it had come last, and integrate what is left.

        E_k = (1 - k/M) E_k' + (k/M) x_i E_{k-1}',    D_k = (1 - k/M) D_k' + (k/M) (x_i D_{k-1}' + v_i E_{k-1}')

    A subtraction, and yet safe for k <= M/2: an error in E_{k-1}' comes into E_k' times x_i k / (M - k) <= 1.

    Source: book, `pool-curve-variance`.
    """
    m = len(pool.f)
    out = torch.zeros(n, m, dtype=torch.float64, device=pool.f.device)
    for s, weight in _soft_nodes(pool, n):
        factors = _factors(pool, s)
        state = _forward(*factors, n)
        for few in torch.arange(len(s), device=s.device).split(max(1, 2**15 // m)):  # that stay in the cache
            x, v = (factor[:, few] for factor in factors)
            e, d = torch.ones_like(x), torch.zeros_like(x)
            for k, (e_all, d_all) in enumerate(state[:, 1:, few].transpose(0, 1), 1):
                share = k / (m - k)
                torch.addcmul(d_all * (1 + share), x, d, value=-share, out=d).addcmul_(v, e, value=-share)
                torch.addcmul(e_all * (1 + share), x, e, value=-share, out=e)
                out[k - 1] += d @ weight[few]
    return out


def _hard_without_each(pool: _Pool, n: int) -> Tensor:
    """Sum over the other answers: those below i keep their rank, those above move down by one."""
    level, count, mean = _levels(pool)
    chance = _best_of(len(pool.f) - 1, n, pool.f)
    zero = torch.zeros_like(chance[:1])
    f = mean[level][:, None]
    below = torch.cat([zero, (f[:-1] * chance).cumsum(0)])
    above = torch.cat([(f[1:] * chance).flip(0).cumsum(0).flip(0), zero])
    # The level of i has another mean without it, on the ranks that it still holds.
    others = (count - 1).clamp(min=1)[level]
    change = (mean[level] - pool.f) / others
    mass = torch.cat([zero, chance.cumsum(0)])
    last = count.cumsum(0)[level] - 1
    held = mass[last] - mass[last - count[level] + 1]
    return (below + above + change[:, None] * held).T


# --- intervals -------------------------------------------------------------------------------------------------------


def interval(
    rewards: Tensor,
    beta: float | Tensor,
    n: int,
    *,
    low: float,
    high: float,
    generator: torch.Generator,
    delta: float = 0.05,
    rule: str = "soft",
    values: Tensor | None = None,
    shuffles: int = 16,
) -> Tensor:
    """Enclose E f of the kept answer at one N, with confidence 1 - delta, whatever the law of the answers.

    A shuffled pool is cut into floor(M / N) blocks of N answers. What the rule keeps of them on average are
    independent values in [low, high], whose mean is the number wanted: bets are placed on them as in
    `verify.tv_upper_bound`, and the wealth is averaged over shuffles. Certain at every M, and wide: only disjoint
    blocks count. The curve does not always lie inside. Not differentiable.

    Args:
        rewards: Reward of each answer, shape (..., M), M >= 2, finite.
        beta: Temperature in reward units, > 0, as for `curve`.
        n: The N, 1 <= n <= M.
        low: Lower bound of the values, known beforehand.
        high: Upper bound of the values, known beforehand.
        generator: Source of the shuffles, on the device of `rewards`.
        delta: Chance that the interval is wrong, half of it on each side, in (0, 1).
        rule: "hard", "soft" or "exponential".
        values: As for `curve`.
        shuffles: Number of shuffles, >= 1: many make the interval depend less on the generator.

    Returns:
        Lower and upper end, shape (..., 2), in the dtype of `rewards`.

    Raises:
        TypeError: as for `curve`, or `generator` is not a torch.Generator.
        ValueError: as for `curve`; values outside of [low, high], bounds that are not finite with low < high, `delta`
            outside (0, 1), or `shuffles` < 1.

    Source: [waudbysmith2024]; book, `pool-curve-interval`.
    """
    pools, shape = _pools(rewards, beta, n, rule, values, None)
    _checks.count("shuffles", shuffles)
    _checks.generator("generator", generator)
    name, f = ("rewards", rewards) if values is None else ("values", values)
    _bounded(name, f.detach(), low, high)
    m = rewards.shape[-1]
    k = m // n
    means = torch.empty(len(pools), shuffles, k, dtype=torch.float64, device=rewards.device)
    for row, pool in zip(means, pools, strict=True):
        u = torch.rand(shuffles, m, generator=generator, device=rewards.device, dtype=torch.float64)
        blocks = u.argsort(-1)[:, : k * n].view(shuffles, k, n)
        row[:] = _kept_means(pool.log_w[blocks], pool.f[blocks], rule) + pool.offset
    return _enclosed(means, low, high, delta).view(*shape, 2).to(rewards.dtype)


def mean_interval(x: Tensor, *, low: float, high: float, delta: float = 0.05) -> Tensor:
    """Enclose the mean of independent values in [low, high], with confidence 1 - delta, whatever their law.

    The interval for many prompts: the points of `curve` at one N, one per prompt, are independent and unbiased for the
    mean over all prompts, and no factor N is paid. Bets are those of `verify.tv_upper_bound`, on both sides. Not
    differentiable.

    Args:
        x: Independent values, shape (..., k), k >= 1.
        low: Lower bound of the values, known beforehand.
        high: Upper bound of the values, known beforehand.
        delta: Chance that the interval is wrong, half of it on each side, in (0, 1).

    Returns:
        Lower and upper end, shape (..., 2), in the dtype of `x`.

    Raises:
        TypeError: `x` is not a floating tensor, or a bound not a number.
        ValueError: values outside of [low, high], bounds that are not finite with low < high, `delta` outside (0, 1).

    Source: [waudbysmith2024]; book, `pool-curve-interval`, `tv-certificate`.
    """
    _checks.tensor("x", x)
    _bounded("x", x.detach(), low, high)
    return _enclosed(x.detach().double().unsqueeze(-2), low, high, delta).to(x.dtype)


def _bounded(name: str, x: Tensor, low: float, high: float) -> None:
    _checks.number("low", low)
    _checks.number("high", high)
    if not (-math.inf < low < high < math.inf and high - low < math.inf):
        raise ValueError(f"low and high must be finite with low < high, got {low!r} and {high!r}")
    if not bool(((x >= low) & (x <= high)).all()):
        raise ValueError(
            f"{name} must lie in [{low:g}, {high:g}], got values from {x.min().item():g} to {x.max().item():g}"
        )


def _kept_means(log_w: Tensor, f: Tensor, rule: str) -> Tensor:
    """Compute the mean of what a rule keeps of each block of N answers, the last dimension."""
    if rule == "soft":
        return (torch.softmax(log_w, -1) * f).sum(-1)
    if rule == "hard":
        best = (log_w == log_w.amax(-1, keepdim=True)).double()
        return (best * f).sum(-1) / best.sum(-1)
    n = f.shape[-1]
    rows = zip(log_w.reshape(-1, n), f.reshape(-1, n), strict=True)
    blocks = (_pool(a - a.max(), b, torch.zeros_like(b), True) for a, b in rows)
    return torch.stack([_curve(block, n, rule)[-1] for block in blocks]).view(f.shape[:-1])


def _enclosed(x: Tensor, low: float, high: float, delta: float) -> Tensor:
    """Enclose the mean of values of shape (..., shuffles, k), all shuffles of the same ones."""
    _checks.chance("delta", delta)
    scaled = ((x - low) / (high - low)).clamp(0, 1)
    ends = torch.stack([1 - _upper(1 - scaled, delta / 2), _upper(scaled, delta / 2)], -1)
    return low + (high - low) * ends


def _upper(x: Tensor, delta: float) -> Tensor:
    """Bound the mean of values in [0, 1], shape (..., shuffles, k), from above."""
    bet = _numerics.bets(x, x.shape[-1], delta)
    below, above = torch.zeros_like(x[..., 0, 0]), torch.ones_like(x[..., 0, 0])
    for _ in range(54):  # wealth grows with the mean that is bet against
        middle = (below + above) / 2
        log_wealth = _numerics.log_wealth(x, bet, middle[..., None]).logsumexp(-1) - math.log(x.shape[-2])
        refuted = log_wealth >= math.log(1 / delta)
        below, above = torch.where(refuted, below, middle), torch.where(refuted, middle, above)
    return above


# --- what a target needs ---------------------------------------------------------------------------------------------


def _average(curves: Tensor) -> Tensor:
    """Average curves over pools, shape (..., n)."""
    return curves.reshape(-1, curves.shape[-1]).double().mean(0)


def _error_of_average(errors: Tensor) -> Tensor:
    """Standard errors of the average over independent pools, from those of the pools, shape (..., n)."""
    se = errors.reshape(-1, errors.shape[-1]).double()
    return se.square().sum(0).sqrt() / len(se)


def needed_n(
    rewards: Tensor,
    beta: float | Tensor,
    target: float,
    n: int,
    *,
    rule: str = "soft",
    values: Tensor | None = None,
    log_ratios: Tensor | None = None,
    sigmas: float = 2.0,
) -> Needed:
    """Find the smallest N at which the curve reaches a target, and how sure that is.

    Curves of several pools are averaged. Not differentiable. Cost of one `curve` and its `standard_errors`.

    Args:
        rewards: Reward of each answer, shape (..., M), M >= 2, finite.
        beta: Temperature in reward units, > 0, as for `curve`.
        target: Wanted mean of f.
        n: Largest N to consider, 1 <= n <= M.
        rule: "hard", "soft" or "exponential".
        values: As for `curve`.
        log_ratios: As for `curve`.
        sigmas: By how many standard errors the curve is raised and lowered, >= 0.

    Returns:
        `Needed(best, low, high)`: the smallest N <= n at which the curve, the raised and the lowered curve are at least
        the target; infinite where none is.

    Raises:
        TypeError: as for `curve`, or `target` is not a number.
        ValueError: as for `curve`; no pool; `target` not finite, or `sigmas` < 0.

    Example:
        >>> rewards = torch.tensor([0.0, 1.0, 1.0, 2.0, 3.0, 5.0], dtype=torch.float64)
        >>> needed_n(rewards, 1.0, 3.0, 5)
        Needed(best=3.0, low=1.0, high=inf)

    Source: book, `pool-curve`: the curve of the reward rises in N on every pool; `pool-curve-variance`.
    """
    options = {"rule": rule, "values": values, "log_ratios": log_ratios}
    points = curve(rewards, beta, n, **options)  # type: ignore[arg-type]
    _target(points, target, sigmas)
    mean, error = _average(points), _error_of_average(standard_errors(rewards, beta, n, **options))  # type: ignore[arg-type]
    return _first(mean, error, target, sigmas)


def _first(mean: Tensor, error: Tensor, target: float, sigmas: float) -> Needed:
    margin = sigmas * error if sigmas > 0 else torch.zeros_like(error)  # 0 sigmas of an infinite error are none

    def first(reached: Tensor) -> float:
        return float(reached.long().argmax()) + 1 if bool(reached.any()) else math.inf

    return Needed(first(mean >= target), first(mean + margin >= target), first(mean - margin >= target))


def _target(points: Tensor, target: float, sigmas: float) -> None:
    _checks.number("target", target)
    if not math.isfinite(target):
        raise ValueError(f"target must be finite, got {target!r}")
    _checks.nonnegative("sigmas", sigmas)
    if points.numel() == 0:
        raise ValueError(f"rewards must hold at least one pool, got shape {tuple(points.shape[:-1])} of pools")


def needed_beta(rewards: Tensor, target: float, n: int, *, rule: str = "soft", sigmas: float = 2.0) -> Needed:
    """Find the temperature at which the reward of the kept answer reaches a target at a given N, and how sure that is.

    On every pool the curve of the reward falls with the temperature, from the best of N to the mean. Curves of several
    pools are averaged, at one temperature for all. Not differentiable. Cost of some 30 curves.

    Args:
        rewards: Reward of each answer, shape (..., M), M >= 2, finite.
        target: Wanted mean reward, strictly between the mean of the rewards and the hard curve at N.
        n: The N, 2 <= n <= M.
        rule: "soft" or "exponential".
        sigmas: By how many standard errors the curve is raised and lowered, >= 0.

    Returns:
        `Needed(best, low, high)`: the temperatures at which the curve, the raised and the lowered curve are equal to
        the target, with the standard error at `best`. So `low` is the warmest; it is infinite where the raised curve is
        above the target everywhere, and `high` is 0 where the lowered one is below it everywhere.

    Raises:
        TypeError: as for `curve`, or `target` is not a number.
        ValueError: as for `curve`; no pool; `target` not between the mean reward and the best of N, as when all rewards
            of each pool are equal; or `sigmas` < 0.

    Source: book, `pool-curve`, `pool-curve-variance`; [verdun2025] for what is estimated.
    """
    _checks.one_of("rule", rule, ("soft", "exponential"))
    hard = curve(rewards, 1.0, n, rule="hard")
    _target(hard, target, sigmas)
    mean, best = float(_average(hard)[0]), float(_average(hard)[-1])
    if not mean < target < best:
        raise ValueError(
            f"target must lie strictly between the mean reward {mean:.6g} and the best of {n} {best:.6g}, "
            f"got {target!r}"
        )
    wide = rewards.detach().double()
    widest = float((wide.amax(-1) - wide.amin(-1)).max())
    coldest, warmest = math.log(widest / 599), math.log(widest) + 30

    def reward(log_beta: float) -> float:
        points = curve(wide, math.exp(log_beta), n, rule=rule)
        return float(_average(points)[-1])

    def reached(level: float) -> float:
        if level <= reward(warmest):
            return math.inf
        if level >= best:
            return 0.0
        # The colder, the more nodes a curve takes: go no further than needed.
        cold = math.log(widest)
        while reward(cold) < level:
            if cold == coldest:
                return 0.0
            cold = max(coldest, cold - 1)
        return math.exp(brentq(lambda t: reward(t) - level, cold, warmest, xtol=1e-12, rtol=1e-14))

    at = reached(target)
    if not 0 < at < math.inf:  # closer to an end than any temperature that the curves are computed at
        return Needed(at, at, at)
    errors = standard_errors(wide, at, n, rule=rule)
    shift = float(_error_of_average(errors)[-1])
    shift = sigmas * shift if sigmas > 0 else 0.0
    return Needed(at, reached(target - shift), reached(target + shift))


# --- divergence, doubts ----------------------------------------------------------------------------------------------


def _kept_law(rewards: Tensor, beta: float | Tensor, n: int, rule: str) -> Tensor:
    """Compute the exact law of what a rule keeps of N draws, with replacement, from the answers of the pool."""
    _pools(rewards, beta, n, rule, None, None)
    wide = rewards.detach().double()
    uniform = torch.full_like(wide, -math.log(wide.shape[-1]))
    if rule == "hard":
        return selection.best_of_n_law(uniform, wide, n)
    noisy = {"soft": selection.soft_best_of_n_law, "exponential": selection.exponential_best_of_n_law}
    return noisy[rule](uniform, wide, beta, n)


def divergence(rewards: Tensor, beta: float | Tensor, n: int, *, rule: str = "soft") -> tuple[Tensor, Tensor]:
    """Estimate how far best-of-N moves away from the law of the answers, KL(kept || p), and bound it.

        KL <= log N - (N - 1) / N

    The estimate is the exact KL for the law of the pool, which draws with replacement; no estimate is unbiased, and
    this one never exceeds the bound. The bound holds for every law p and for all three rules: each keeps the best of
    N by reward plus noise, and to forget the noise can only lower KL. Not differentiable.

    Args:
        rewards: Reward of each answer, shape (..., M), M >= 2, finite.
        beta: Temperature in reward units, > 0, as for `curve`.
        n: The N, 1 <= n <= M.
        rule: "hard", "soft" or "exponential".

    Returns:
        Estimate and bound in nats, each of shape (...), in the dtype of `rewards`.

    Raises:
        TypeError: `rewards` is not a floating tensor, or `n` not an int.
        ValueError: as for `curve`.

    Source: [beirami2024]; book, `bon-kl-bound`; `pool-curve-bias` for the law of the pool.
    """
    kl = _moved(_kept_law(rewards, beta, n, rule))
    bound = torch.full_like(kl, math.log(n) - (n - 1) / n)
    return kl.to(rewards.dtype), bound.to(rewards.dtype)


def _moved(law: Tensor) -> Tensor:
    """Compute KL(law || uniform)."""
    return categorical.kl(law, torch.full_like(law, -math.log(law.shape[-1])))


# From here on a pool is said to be doubtful: N above half of it, fewer answers that count, a larger share of one.
_HALF, _FEW, _SHARE = 0.5, 10.0, 0.25


def doubts(rewards: Tensor, beta: float, n: int, *, rule: str = "soft") -> list[str]:
    """Say in words where one pool cannot be trusted at N: N near M, few answers that count, one that carries the mass.

    The law looked at is that of the kept answer for the law of the pool. Its effective sample size is 1 / sum of its
    squares. The limits: N above M / 2, an effective sample size below 10, a share above 1/4. Not differentiable.

    Args:
        rewards: Reward of each answer, shape (M,), M >= 2, finite.
        beta: Temperature in reward units, > 0.
        n: The N, 1 <= n <= M.
        rule: "hard", "soft" or "exponential".

    Returns:
        A sentence for each doubt; an empty list if there is none.

    Raises:
        TypeError: `rewards` is not a floating tensor, or `n` not an int.
        ValueError: as for `curve`, or `rewards` of more than one pool.

    Example:
        >>> doubts(torch.tensor([0.0, 0.0, 0.0, 9.0], dtype=torch.float64), 1.0, 3)[0]
        'N = 3 is more than half of the 4 answers: 1 disjoint pool of this size'

    Source: [kong1992]; book, `effective-sample-size`.
    """
    law = _kept_law(rewards, beta, n, rule)
    if law.ndim != 1:
        raise ValueError(f"rewards must be one pool of shape (M,), got shape {tuple(law.shape)}")
    return _doubts(rewards.detach(), law, n)


def _doubts(rewards: Tensor, law: Tensor, n: int) -> list[str]:
    m = len(law)
    least = float(rewards.min())
    if least == float(rewards.max()):
        return [f"all {m} rewards are {least:g}: nothing is selected"]
    found = []
    if n > _HALF * m:
        found.append(f"N = {n} is more than half of the {m} answers: 1 disjoint pool of this size")
    size = float(weights.ess(law))
    if size < _FEW:
        found.append(f"the kept answer is as good as one of {size:.1f}: too few to know their rewards' mean")
    top = float(law.max().exp())
    if top > _SHARE:
        found.append(f"one answer is kept with chance {top:.2f}: the curve hangs on its reward")
    return found


# --- command line ----------------------------------------------------------------------------------------------------

_NUMBERS = ("reward", "value", "logratio")


class _Lines(NamedTuple):
    """What a file holds: answers by prompt, as flat rows of numbers; the names of these; and the lines left out."""

    prompts: "dict[str, array[float]]"
    names: tuple[str, ...]
    bad: list[str]


def _records(path: Path) -> Iterator[tuple[int, dict[str, object] | str]]:
    """Yield each line that is not blank with its number: the fields of the answer, or what is wrong with it."""
    # A broken byte spoils its line, not the file.
    with path.open(encoding="utf-8-sig", errors="replace", newline="") as file:
        if path.suffix.lower() != ".csv":
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                try:
                    record = json.loads(line)
                except ValueError as error:
                    yield number, f"is not JSON: {error}"
                    continue
                yield number, record if isinstance(record, dict) else "is not a JSON object with a reward"
            return
        rows = csv.reader(file)
        header = [name.strip() for name in next(rows, [])]
        if "reward" not in header or len(set(header)) < len(header):
            raise ValueError(f"line 1 of {path} must name different columns, one of them reward, got {header}")
        while True:
            try:
                row = next(rows, None)
            except csv.Error as error:
                yield rows.line_num, f"is not CSV: {error}"
                continue
            if row is None:
                return
            if len(row) not in (0, len(header)):
                yield rows.line_num, f"has {len(row)} columns where the header has {len(header)}"
            elif row:
                yield rows.line_num, dict(zip(header, row, strict=True))


def _number(record: dict[str, object], name: str) -> float:
    """Read a finite number; a log-ratio may be -inf."""
    given = record.get(name)
    if given is None or given == "":
        raise ValueError(f"has no {name}")
    try:
        number = math.nan if isinstance(given, bool) else float(given)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not (math.isfinite(number) or (name == "logratio" and number == -math.inf)):
        raise ValueError(f"has a {name} that is no finite number: {given!r}")
    return number


def _read(path: Path, progress: Callable[[int], None]) -> _Lines:
    """Read answers line by line; the first good line says which numbers all lines have."""
    prompts: dict[str, array[float]] = {}
    names: tuple[str, ...] = ()
    bad = []
    for number, record in _records(path):
        if number % 1024 == 0:
            progress(number)
        try:
            if isinstance(record, str):
                raise ValueError(record)
            names = names if prompts else tuple(n for n in _NUMBERS if n == "reward" or record.get(n) not in (None, ""))
            row = [_number(record, name) for name in names]
        except ValueError as error:
            bad.append(f"line {number} {error}")
        else:
            prompts.setdefault(str(record.get("prompt", "")), array("d")).extend(row)
    return _Lines(prompts, names, bad)


class _Scored(NamedTuple):
    """The answers of one prompt."""

    rewards: Tensor
    values: Tensor | None
    log_ratios: Tensor | None


def _scored(found: _Lines) -> tuple[list[_Scored], list[str]]:
    """Turn rows into pools; a prompt with one answer is no pool."""
    pools, left_out = [], []
    for prompt, numbers in found.prompts.items():
        columns = torch.frombuffer(numbers, dtype=torch.float64).view(-1, len(found.names)).T.contiguous()
        if columns.shape[1] < 2:
            left_out.append(f"prompt {prompt!r} has one answer, which is no pool")
            continue
        by_name = dict(zip(found.names, columns, strict=True))
        pools.append(_Scored(by_name["reward"], by_name.get("value"), by_name.get("logratio")))
    return pools, left_out


def _temperature(pools: list[_Scored], fraction: float) -> float:
    """Find the temperature, one for all, at which pools keep a fraction of their answers: the median over pools."""
    found = []
    for pool in pools:
        try:
            found.append(float(weights.beta_for_ess(pool.rewards, fraction)))
        except ValueError:  # ties: this pool keeps more than the fraction at any temperature
            continue
    if not found:
        raise ValueError(
            f"--ess {fraction:g} is attained by no pool, since too many rewards are tied; give a temperature, --beta"
        )
    return float(np.median(found))


def _picture(path: str, n: Tensor, mean: Tensor, error: Tensor, title: str) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    ax = figure.subplots()
    ax.fill_between(n, mean - 2 * error, mean + 2 * error, alpha=0.25, label="two standard errors")
    ax.plot(n, mean, marker="." if len(n) < 65 else "", label="unbiased curve")
    ax.set_xscale("log", base=2)
    ax.set(xlabel="N", ylabel="mean of what best-of-N keeps", title=title)
    ax.legend()
    figure.savefig(path)


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tiltlib.pool", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("file", type=Path, help="answers, one a line: .csv with a header, else JSON lines")
    parser.add_argument("--rule", choices=RULES, default="soft", help="how one of N answers is kept (soft)")
    parser.add_argument("--beta", type=float, help="temperature in reward units")
    parser.add_argument("--ess", type=float, default=0.5, help="else the temperature keeps this share of a pool (0.5)")
    parser.add_argument("--n", type=int, help="largest N (half of the smallest pool, at most 256)")
    parser.add_argument("--target", type=float, help="say which N and which temperature reach this mean")
    parser.add_argument("--picture", help="where the picture goes (FILE.svg)")
    return parser.parse_args(argv)


def _table(
    options: argparse.Namespace, pools: list[_Scored], names: tuple[str, ...], progress: Callable[[int, str], None]
) -> None:
    """Print the curve, averaged over pools, and what a target needs; write the picture."""
    smallest = min(len(pool.rewards) for pool in pools)
    n = min(smallest // 2, 256) if options.n is None else options.n
    if options.beta is not None or options.rule == "hard":
        beta = 1.0 if options.beta is None else options.beta
    else:
        beta = _temperature(pools, options.ess)
    answers = sum(len(pool.rewards) for pool in pools)
    prompts = "1 prompt" if len(pools) == 1 else f"{len(pools)} prompts, {smallest} or more each"
    print(f"{options.file}: {answers} answers to {prompts}")
    of = ", mean of value" if "value" in names else ""
    print(f"rule {options.rule}" + ("" if options.rule == "hard" else f", beta {beta:.6g}") + of)
    points, errors = [], []
    for i, pool in enumerate(pools):
        given = {"rule": options.rule, "values": pool.values, "log_ratios": pool.log_ratios}
        points.append(curve(pool.rewards, beta, n, **given))
        errors.append(standard_errors(pool.rewards, beta, n, **given))
        progress(i + 1, "pools done")
    each = torch.stack(points)
    mean, error = _average(each), _error_of_average(torch.stack(errors))
    sizes = sorted({2**i for i in range(n.bit_length())} | {n})
    print(f"{'N':>7}{'mean':>12}{'s.e.':>10}{'over prompts':>14}{'KL':>9}{'KL <=':>8}{'doubtful':>10}")
    for size in sizes:
        laws = [_kept_law(pool.rewards, beta, size, options.rule) for pool in pools]
        progress(size, "draws of the table done")
        kl = f"{sum(_moved(law).item() for law in laws) / len(laws):.4f}"
        kl = "-" if "logratio" in names else kl  # the pool of a draft says nothing simple about p
        doubtful = sum(bool(_doubts(pool.rewards, law, size)) for pool, law in zip(pools, laws, strict=True))
        over = "-" if len(pools) == 1 else f"{each[:, size - 1].std().item() / math.sqrt(len(pools)):.3g}"
        print(
            f"{size:>7}{mean[size - 1].item():>12.6g}{error[size - 1].item():>10.3g}{over:>14}{kl:>9}"
            f"{math.log(size) - (size - 1) / size:>8.4f}{f'{doubtful}/{len(pools)}':>10}"
        )
    if len(pools) == 1:
        for sentence in _doubts(pools[0].rewards, laws[0], n):
            print(f"doubt at N = {n}: {sentence}")
    if options.target is not None:
        _print_needed(options, pools, names, mean, error, n)
    picture = options.picture or f"{options.file}.svg"
    try:
        _picture(picture, torch.arange(1, n + 1), mean, error, f"{options.file.name}, {options.rule} best-of-N")
    except ImportError:
        print("no picture: it needs the matplotlib package, pip install matplotlib", file=sys.stderr)
    else:
        print(f"picture: {picture}")


def _print_needed(
    options: argparse.Namespace, pools: list[_Scored], names: tuple[str, ...], mean: Tensor, error: Tensor, n: int
) -> None:
    """Print which N reaches a target, and which temperature does at the largest N."""
    best, low, high = _first(mean, error, options.target, 2.0)
    print(f"target {options.target:g}: N = {best:g}, from {low:g} to {high:g} within two standard errors")
    alike = len({len(pool.rewards) for pool in pools}) == 1
    if options.rule == "hard" or names != ("reward",) or not alike or n < 2:
        return  # the temperature is found for rewards, and for pools of one size
    try:
        rewards = torch.stack([pool.rewards for pool in pools])
        best, low, high = needed_beta(rewards, options.target, n, rule=options.rule)
        print(f"at N = {n}: beta = {best:.4g}, from {high:.4g} to {low:.4g} within two standard errors")
    except ValueError as error_:
        print(f"at N = {n}: {error_}")


def _main(argv: list[str] | None = None) -> int:
    """Read scored answers, print the table of their curve and draw it; return the exit status.

    Lines that cannot be read are named and left out, all others are used, and the status is 1. It is 2 if nothing could
    be done. This and what it calls are the only places outside of `verify` that print.
    """
    options = _arguments(argv)
    start = last = time.monotonic()

    def progress(number: int, what: str = "lines read") -> None:
        nonlocal last
        if time.monotonic() - last > 5:
            last = time.monotonic()
            print(f"{number:,} {what}, {last - start:.0f} s", file=sys.stderr)

    try:
        found = _read(options.file, progress)
        pools, left_out = _scored(found)
        left_out = found.bad + left_out
        for line in left_out[:20]:
            print(f"{options.file}: {line}", file=sys.stderr)
        if len(left_out) > 20:
            print(f"{options.file}: and {len(left_out) - 20} more", file=sys.stderr)
        if not pools:
            raise ValueError(f"{options.file} holds no pool of at least two answers")
        _table(options, pools, found.names, progress)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 1 if left_out else 0


if __name__ == "__main__":
    sys.exit(_main())
