"""Curves against sums over all subsets and all pools, errors, intervals, what a target needs, and the command line."""

import csv
import itertools
import json
import math
import re
import subprocess
import sys

import pytest
import torch
from helpers import (
    F64,
    S0,
    S0_REWARDS,
    compositions,
    enumerated_best_law,
    enumerated_exponential_law,
    enumerated_soft_law,
    log_multinomial,
    vector,
)
from hypothesis import given
from hypothesis import strategies as st
from numpy.polynomial import legendre
from torch import Tensor

from tiltlib import categorical, pool, selection, verify

RULES = ("hard", "soft", "exponential")
POOL = vector(0, 1, 1, 2, 3, 5)
MARKED = vector(0, 1, 0, 0, 1, 0)  # not monotone in the reward


def kept(rewards: Tensor, beta: float, rule: str) -> Tensor:
    """The chance of each answer of a pool, the last dimension, to be kept, from the definition of the rule."""
    if rule == "soft":
        return torch.softmax(rewards / beta, -1)
    if rule == "hard":
        best = (rewards == rewards.amax(-1, keepdim=True)).double()
        return best / best.sum(-1, keepdim=True)
    # i wins at the level s of the largest noisy reward: w_i prod_{j != i} (1 - s w_j), for s up to 1 / max w.
    n = rewards.shape[-1]
    x, weight = (torch.tensor(a)[:, None] / 2 for a in legendre.leggauss(n // 2 + 1))
    w = ((rewards - rewards.amax(-1, keepdim=True)) / beta).exp()
    others = w[..., [[j for j in range(n) if j != i] for i in range(n)]]
    return w * (weight * (1 - (x + 0.5) * others.unsqueeze(-2)).prod(-1, keepdim=True)).sum((-2, -1))


def by_subsets(rewards, beta, n, rule, values=None, log_ratios=None):
    """The mean over all subsets of size N, one by one."""
    f = rewards if values is None else values
    s = torch.tensor(list(itertools.combinations(range(len(f)), n)))
    each = (kept(rewards[s], beta, rule) * f[s]).sum(-1)
    return (each if log_ratios is None else each * log_ratios[s].sum(-1).exp()).mean()


def example_pool(m: int, spread: float, claim: str) -> tuple[Tensor, Tensor]:
    g = verify.rng(claim)
    r = spread * torch.rand(m, generator=g, dtype=F64)
    r[m // 2] = r[0]  # a tie
    return r, torch.randn(m, generator=g, dtype=F64)


def every_pool(m: int, probs: Tensor = S0) -> tuple[Tensor, Tensor]:
    """Every multiset of m outcomes, as rows of sorted outcomes, and their probabilities."""
    counts = compositions(len(probs), m)
    rows = torch.stack([torch.repeat_interleave(torch.arange(len(probs)), c) for c in counts])
    return rows, log_multinomial(counts, probs).exp()


# --- limits ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", RULES)
def test_curve_at_its_limits(rule):
    r, f = example_pool(9, 3.0, "limits")
    c = pool.curve(r, 0.7, 9, rule=rule, values=f)
    torch.testing.assert_close(c[0], f.mean(), rtol=0, atol=1e-14)
    torch.testing.assert_close(c[8], (kept(r, 0.7, rule) * f).sum(), rtol=0, atol=1e-14)
    equal = pool.curve(torch.full((9,), 2.5, dtype=F64), 0.7, 9, rule=rule, values=f)
    torch.testing.assert_close(equal, f.mean().expand(9), rtol=0, atol=1e-14)
    constant = pool.curve(r, 0.7, 9, rule=rule, values=torch.full((9,), 0.1, dtype=F64))
    assert constant.tolist() == [0.1] * 9  # to the last digit
    if rule != "hard":
        pool.curve(vector(0, 600), 1.0, 2, rule=rule)  # as far apart as they may be
        hot, cold = (pool.curve(r, beta, 9, rule=rule, values=f) for beta in (1e13, 3 / 590))
        torch.testing.assert_close(hot, f.mean().expand(9), rtol=0, atol=1e-12)
        if rule == "soft":
            gap = r.unique().diff().min()
            bound = 2 * 8 * f.abs().max() * math.exp(-gap / (3 / 590))
            assert (cold - pool.curve(r, 1.0, 9, rule="hard", values=f)).abs().max() <= bound


def test_hard_rule_asks_for_the_order_alone():
    r = vector(-1e30, 0, 1e-30, 1)
    ranks = pool.curve(r, 1.0, 4, rule="hard", values=vector(1, 2, 3, 4))
    torch.testing.assert_close(ranks, pool.curve(vector(1, 2, 3, 4), 5e-324, 4, rule="hard"))
    assert pool.curve(r, 1.0, 4, rule="hard", values=vector(1, 0, 0, 0))[0] == 0.25


# --- enumeration -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("spread", [0.5, 4.0, 30.0, 590.0])
@pytest.mark.slow
def test_the_whole_of_a_large_pool(rule, spread):
    r, f = example_pool(90, spread, "whole")
    expected = (kept(r, 1.0, rule) * f).sum()
    torch.testing.assert_close(pool.curve(r, 1.0, 90, rule=rule, values=f)[89], expected, rtol=0, atol=1e-13)
    # Clustered below, so that many answers die together.
    c = r.sort().values
    c[:60] = c[0] + 1e-3 * r[:60] / spread
    expected = (kept(c, 1.0, rule) * f).sum()
    torch.testing.assert_close(pool.curve(c, 1.0, 90, rule=rule, values=f)[89], expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("m", [2, 3, 12])
@pytest.mark.parametrize("spread", [0.0, 0.3, 4.0, 50.0, 590.0])
def test_curve_is_the_mean_over_subsets(rule, m, spread):
    r, f = example_pool(m, spread, f"subsets-{m}")
    for values in (None, f):
        c = pool.curve(r, 1.0, m, rule=rule, values=values)
        expected = torch.stack([by_subsets(r, 1.0, n, rule, values) for n in range(1, m + 1)])
        scale = 1.0 if values is not None else max(spread, 1.0)
        torch.testing.assert_close(c, expected, rtol=0, atol=1e-12 * scale)


def test_numbers_worked_out_by_hand():
    """Six answers with a tie. The last column of each is not the mean of N draws with replacement, or one ratio."""
    digits = {"rtol": 0, "atol": 5e-7}
    soft = vector(2, 2.882651, 3.453228, 3.882674, 4.225723, 4.511395)
    torch.testing.assert_close(pool.curve(POOL, 1.0, 6), soft, **digits)
    torch.testing.assert_close(
        pool.curve(POOL, 1.0, 6, rule="exponential"),
        vector(2, 2.953299, 3.563897, 4.027119, 4.399069, 4.714587),
        **digits,
    )
    torch.testing.assert_close(
        pool.curve(POOL, 1.0, 6, rule="hard"), vector(2, 3.066667, 3.75, 4.266667, 4.666667, 5), **digits
    )
    torch.testing.assert_close(
        pool.curve(POOL, 2.0, 6), vector(2, 2.635553, 2.989502, 3.221841, 3.386418, 3.508947), **digits
    )
    torch.testing.assert_close(
        pool.curve(POOL, 1.0, 6, values=MARKED),
        vector(0.333333, 0.346775, 0.311802, 0.260638, 0.197355, 0.125073),
        **digits,
    )
    uniform = torch.full((6,), -math.log(6), dtype=F64)
    replaced = [(selection.soft_best_of_n_law(uniform, POOL, 1.0, n).exp() * POOL).sum().item() for n in range(1, 7)]
    assert replaced == pytest.approx([2, 2.735542, 3.165196, 3.453283, 3.659242, 3.812194], abs=5e-7)


@pytest.mark.parametrize("rule", ["hard", "soft"])
def test_mean_over_all_pools_is_that_of_the_exact_law(rule):
    rows, chance = every_pool(6)
    r, f = S0_REWARDS[rows], vector(3, -1, 2)[rows]
    mean = (chance[:, None] * pool.curve(r, 0.8, 6, rule=rule, values=f)).sum(0)
    for n in range(1, 7):
        law = enumerated_best_law(S0, S0_REWARDS, n) if rule == "hard" else enumerated_soft_law(S0, S0_REWARDS, n, 0.8)
        assert mean[n - 1].item() == pytest.approx((law.exp() * vector(3, -1, 2)).sum().item(), abs=1e-12)


@pytest.mark.parametrize(
    ("beta", "expected"), [(1.0, (0.215279, 0.334838, 0.449884)), (0.5, (0.111864, 0.341058, 0.547077))]
)
def test_mean_over_all_pools_of_the_exponential_rule(beta, expected):
    """Not the law of noise of scale 1 / beta, and not that of the soft rule."""
    rows, chance = every_pool(5)
    for y in range(3):
        points = pool.curve(S0_REWARDS[rows], beta, 4, rule="exponential", values=(rows == y).double())
        assert (chance * points[:, 3]).sum().item() == pytest.approx(expected[y], abs=5e-7)


@pytest.mark.parametrize("count", [1, 300, 4095])
def test_two_levels_have_a_closed_form(count):
    m, n = 4096, 64
    r = torch.zeros(m, dtype=F64)
    r[:count] = 1.0
    w = math.exp(1 / 0.5)
    chance, noisy, hard = pool.curve(r, 0.5, n), pool.curve(r, 0.5, n, rule="exponential"), pool.pass_at_k(r, n)
    x, weight = legendre.leggauss(n)
    u, weight = (1 + x) / 2, weight / 2
    for k in (1, 2, 17, 64):
        among = [math.comb(count, j) * math.comb(m - count, k - j) / math.comb(m, k) for j in range(k + 1)]
        soft = sum(a * j * w / (j * w + k - j) for j, a in enumerate(among))
        assert chance[k - 1].item() == pytest.approx(soft, abs=1e-12)
        assert hard[k - 1].item() == pytest.approx(1 - among[0], abs=1e-12)
        wins = [a * j * (weight * (1 - u) ** (j - 1) * (1 - u / w) ** (k - j)).sum() for j, a in enumerate(among) if j]
        assert noisy[k - 1].item() == pytest.approx(sum(wins), abs=1e-12)


@pytest.mark.parametrize("place", [0.02, 0.5, 0.98])
def test_many_answers_that_die_at_once(place):
    """One best, many alike, one worst: where on its panel the many die must not matter."""
    m, n, panel = 200, 64, math.log(pool._PANEL)
    r = torch.full((m,), -panel * (3 + place), dtype=F64)
    r[0], r[1] = 0.0, -8 * panel
    f = vector(3, -1, *[1.0] * (m - 2))
    expected = 0.0
    for best, worst in itertools.product((0, 1), (0, 1)):
        chance = math.comb(m - 2, n - best - worst) / math.comb(m, n)
        s = [*range(2, 2 + n - best - worst), *[0] * best, *[1] * worst]
        expected += chance * (kept(r[s], 1.0, "exponential") * f[s]).sum().item()
    assert pool.curve(r, 1.0, n, rule="exponential", values=f)[-1].item() == pytest.approx(expected, abs=1e-13)


def test_factors_of_the_dead_do_not_overflow():
    r = torch.full((500,), -3.1 * math.log(pool._PANEL), dtype=F64)
    r[0], r[1] = 0.0, -8 * math.log(pool._PANEL)
    c = pool.curve(r, 1.0, 450, rule="exponential")
    assert (c.diff() >= -1e-12).all() and (c <= pool.curve(r, 1.0, 450, rule="hard") + 1e-12).all()


def test_pass_at_k():
    correct = vector(1, 1, 1, 0, 0, 0, 0, 0)
    rates = pool.pass_at_k(correct, 8)
    assert rates[3].item() == pytest.approx(0.928571, abs=5e-7)
    assert abs(rates[3].item() - (1 - (1 - 3 / 8) ** 4)) > 0.08  # the plug-in
    assert rates[5:].tolist() == pytest.approx([1, 1, 1], abs=1e-15)
    assert torch.equal(pool.pass_at_k(correct > 0, 8), rates) and pool.pass_at_k(correct > 0, 8).dtype == F64
    assert pool.pass_at_k(0 * correct, 8).tolist() == [0] * 8 and pool.pass_at_k(0 * correct + 1, 8).tolist() == [1] * 8


# --- a draft ---------------------------------------------------------------------------------------------------------

DRAFT = vector(0.3, 0.3, 0.4).log()


@pytest.mark.parametrize("rule", ["soft", "exponential"])
def test_a_pool_of_a_draft_is_unbiased_for_the_reference(rule):
    rows, chance = every_pool(5, DRAFT)
    ratios = (S0 - DRAFT)[rows]
    points = pool.curve(S0_REWARDS[rows], 1.0, 5, rule=rule, log_ratios=ratios)
    own, own_chance = every_pool(5)
    expected = (own_chance[:, None] * pool.curve(S0_REWARDS[own], 1.0, 5, rule=rule)).sum(0)
    torch.testing.assert_close((chance[:, None] * points).sum(0), expected, rtol=0, atol=1e-12)
    if rule == "soft":
        assert expected[2].item() == pytest.approx(1.070198, abs=5e-7)
        # Ratios inside the weights ask for another law: selection from the draft.
        inside = pool.curve(S0_REWARDS[rows] + ratios, 1.0, 5, values=S0_REWARDS[rows])
        assert (chance * inside[:, 2]).sum().item() == pytest.approx(1.273108, abs=5e-7)


@pytest.mark.parametrize("rule", ["soft", "exponential"])
def test_ratios_of_one_change_nothing(rule):
    r, f = example_pool(400, 3.0, "ones")
    plain = pool.curve(r, 1.0, 150, rule=rule, values=f)
    ratios = pool.curve(r, 1.0, 150, rule=rule, values=f, log_ratios=0 * f)
    torch.testing.assert_close(ratios, plain, rtol=0, atol=1e-12)


@pytest.mark.parametrize("rule", ["soft", "exponential"])
def test_ratios_multiply_over_a_subset(rule):
    r, f = example_pool(7, 5.0, "ratios")
    ratios = torch.cat([f[1:] * 3, vector(-math.inf)])
    c = pool.curve(r, 1.0, 7, rule=rule, values=f, log_ratios=ratios)
    expected = torch.stack([by_subsets(r, 1.0, n, rule, f, ratios) for n in range(1, 8)])
    torch.testing.assert_close(c, expected, rtol=1e-12, atol=1e-12)
    huge = pool.curve(r, 1.0, 4, rule=rule, values=f, log_ratios=ratios + 150)
    torch.testing.assert_close(huge, c[:4] * torch.exp(150 * torch.arange(1, 5, dtype=F64)), rtol=1e-11, atol=0)
    errors = pool.standard_errors(r, 1.0, 6, rule=rule, values=f, log_ratios=ratios)
    torch.testing.assert_close(errors, jackknifed(r, 1.0, 6, rule, f, ratios), rtol=1e-11, atol=1e-11)
    one = torch.full((7,), -math.inf, dtype=F64).index_fill(0, torch.tensor(2), 0.0)
    alone = pool.standard_errors(r, 1.0, 2, rule=rule, values=f, log_ratios=one)
    torch.testing.assert_close(alone, jackknifed(r, 1.0, 2, rule, f, one))
    some = pool.standard_errors(r[:3], 1.0, 2, rule=rule, log_ratios=vector(-1e4, 0.0, -math.inf))
    torch.testing.assert_close(some, jackknifed(r[:3], 1.0, 2, rule, r[:3], vector(-1e4, 0.0, -math.inf)))


# --- draws -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", ["hard", "soft"])
def test_curves_of_drawn_pools_have_the_mean_of_the_law(rule):
    law = (
        selection.best_of_n_law(S0, S0_REWARDS, 4)
        if rule == "hard"
        else selection.soft_best_of_n_law(S0, S0_REWARDS, 1.0, 4)
    )
    expected = (law.exp() * S0_REWARDS).sum().item()
    # The wrong means: draws with replacement from the pool, one ratio of averages, one N off.
    rows, chance = every_pool(6)

    def plugin(r: Tensor) -> Tensor:
        uniform = torch.full((6,), -math.log(6), dtype=F64)
        laws = (
            selection.best_of_n_law(uniform.expand(len(r), -1), r, 4)
            if rule == "hard"
            else selection.soft_best_of_n_law(uniform.expand(len(r), -1), r, 1.0, 4)
        )
        return (laws.exp() * r).sum(-1)

    wrong = {
        "with replacement": plugin,
        "whole pool": lambda r: pool.curve(r, 1.0, 6, rule=rule)[:, 5],
        "N - 1": lambda r: pool.curve(r, 1.0, 6, rule=rule)[:, 2],
    }
    means = {name: (chance * bad(S0_REWARDS[rows])).sum().item() for name, bad in wrong.items()}
    if rule == "soft":
        assert (expected, means["with replacement"]) == pytest.approx((1.139032, 1.055349), abs=5e-7)
    n = max(verify.plan_mean(expected, m, low=0, high=2, declared=3, alpha=1e-8, miss=1e-8) for m in means.values())
    drawn = S0_REWARDS[categorical.sample(S0, 6 * n, generator=verify.rng(f"pool-curve.{rule}"))].view(n, 6)
    # A pool of this few outcomes is one of 28: compute each once.
    kinds, which = drawn.sort(-1).values.unique(dim=0, return_inverse=True)
    check = {"low": 0.0, "high": 2.0, "claim": f"pool-curve.{rule}", "versus": list(means.values())}
    assert verify.mean(pool.curve(kinds, 1.0, 4, rule=rule)[which, 3], expected, **check)
    for bad in wrong.values():
        assert verify.mean(bad(kinds)[which], expected, **check).decision == "REJECT"


# --- properties ------------------------------------------------------------------------------------------------------


@st.composite
def pools(draw: st.DrawFn, max_m: int = 10) -> tuple[Tensor, Tensor, float]:
    m = draw(st.integers(2, max_m))
    reward = st.one_of(st.integers(-2, 2).map(float), st.floats(-8, 8))
    r = vector(*draw(st.lists(reward, min_size=m, max_size=m)))
    f = vector(*draw(st.lists(st.floats(-5, 5), min_size=m, max_size=m)))
    return r, f, draw(st.floats(0.1, 10))


@given(pools())
@pytest.mark.slow
def test_properties_of_every_pool(drawn):
    r, f, beta = drawn
    m = len(r)
    curves = {rule: pool.curve(r, beta, m, rule=rule) for rule in RULES}
    for rule, c in curves.items():
        assert c.diff().min() >= -1e-12  # rises in N
        marked = pool.curve(r, beta, m, rule=rule, values=f)
        assert marked.min() >= f.min() - 1e-12 and marked.max() <= f.max() + 1e-12
        both = pool.curve(r, beta, m, rule=rule, values=2 * f - 3 * r)
        torch.testing.assert_close(both, 2 * marked - 3 * c, rtol=0, atol=1e-11)  # linear in f
        order = torch.arange(m).flip(0)
        turned = pool.curve(r[order], beta, m, rule=rule, values=f[order])
        torch.testing.assert_close(turned, marked, rtol=0, atol=1e-12)
    # The order of the rules, and of temperatures.
    assert (curves["soft"] <= curves["exponential"] + 1e-12).all()
    assert (curves["exponential"] <= curves["hard"] + 1e-12).all()
    assert (pool.curve(r, 2 * beta, m) <= curves["soft"] + 1e-12).all()


@given(pools(max_m=6))
@pytest.mark.slow
def test_errors_are_the_jackknife_of_every_pool(drawn):
    r, f, beta = drawn
    m = len(r)
    for rule in RULES:
        errors = pool.standard_errors(r, beta, m, rule=rule, values=f)
        torch.testing.assert_close(errors[: m - 1], jackknifed(r, beta, m - 1, rule, f), rtol=0, atol=1e-11)
        assert errors[m - 1] == math.inf


@given(pools(), st.integers(1, 10))
def test_divergence_is_below_its_bound(drawn, n):
    r, _, beta = drawn
    for rule in RULES:
        kl, bound = pool.divergence(r, beta, min(n, len(r)), rule=rule)
        assert 0 <= kl + 1e-12 and kl <= bound + 1e-12
    uniform = torch.full((len(r),), -math.log(len(r)), dtype=F64)
    for rule, law_of in {
        "exponential": selection.exponential_best_of_n_law,
        "soft": selection.soft_best_of_n_law,
    }.items():
        law = law_of(uniform, r, beta, min(n, len(r)))
        kl = pool.divergence(r, beta, min(n, len(r)), rule=rule)[0]
        torch.testing.assert_close(kl, categorical.kl(law, uniform), rtol=0, atol=1e-13)
    # Farther than one N less, and not farther than the hard rule.
    assert kl <= pool.divergence(r, beta, min(n, len(r)), rule="hard")[0] + 1e-12


def test_rows_are_pools_of_their_own():
    g = verify.rng("pool-rows")
    r, f = torch.randn(2, 3, 6, generator=g, dtype=F64), torch.randn(3, 6, generator=g, dtype=F64)
    betas = vector(0.5, 1.0, 3.0)
    for rule in RULES:
        for function in (pool.curve, pool.standard_errors):
            together = function(r, betas, 4, rule=rule, values=f)
            alone = [function(r[i, j], float(betas[j]), 4, rule=rule, values=f[j]) for i in (0, 1) for j in (0, 1, 2)]
            assert torch.equal(together, torch.stack(alone).view(2, 3, 4))


def test_several_temperatures_for_one_pool():
    together = pool.curve(POOL, vector(0.5, 1, 2), 4, values=MARKED)
    assert torch.equal(together, torch.stack([pool.curve(POOL, b, 4, values=MARKED) for b in (0.5, 1.0, 2.0)]))
    errors = pool.standard_errors(POOL, vector(0.5, 2), 3)
    assert torch.equal(errors[1], pool.standard_errors(POOL, 2.0, 3))


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.slow
def test_blocks_of_nodes_change_nothing(rule, monkeypatch):
    r, f = example_pool(30, 40.0, "blocks")
    results = [
        (pool.curve(r, 1.0, 15, rule=rule, values=f), pool.standard_errors(r, 1.0, 15, rule=rule, values=f))
        for monkeypatch_to in (2**19, 64)
        if monkeypatch.setattr(pool, "_BLOCK", monkeypatch_to) is None
    ]
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-13)


# --- errors ----------------------------------------------------------------------------------------------------------


def jackknifed(r, beta, n, rule, f, ratios=None):
    """The sum of squares over the pools without one answer, each computed anew from all of its subsets."""
    whole = torch.stack([by_subsets(r, beta, k, rule, f, ratios) for k in range(1, n + 1)])
    total = torch.zeros_like(whole)
    for i in range(len(r)):
        a, b = (torch.cat([x[:i], x[i + 1 :]]) for x in (r, f))
        c = None if ratios is None else torch.cat([ratios[:i], ratios[i + 1 :]])
        total += (torch.stack([by_subsets(a, beta, k, rule, b, c) for k in range(1, n + 1)]) - whole).square()
    return total.sqrt()


def test_errors_of_all_pools_are_at_least_the_variance():
    """The numbers of the running example: variance, its bounds, the mean of the jackknife."""
    rows, chance = every_pool(6)
    points = pool.curve(S0_REWARDS[rows], 1.0, 6)
    mean = (chance[:, None] * points).sum(0)
    variance = (chance[:, None] * (points - mean).square()).sum(0)
    squares = (chance[:, None] * pool.standard_errors(S0_REWARDS[rows], 1.0, 5).square()).sum(0)
    rows, chance = every_pool(5)
    fewer = (chance[:, None] * (pool.curve(S0_REWARDS[rows], 1.0, 5) - mean[:5]).square()).sum(0)
    assert (squares >= fewer - 1e-12).all() and (fewer >= variance[:5]).all()
    assert variance[3].item() == pytest.approx(0.176625, abs=5e-7)
    assert squares[3].item() == pytest.approx(0.246568, abs=5e-7)
    assert fewer[3].item() == pytest.approx(0.217720, abs=5e-7)
    assert squares[3] > 1.05 * fewer[3]  # so that a factor of (M - 1) / M would not go unnoticed at N = 1 alone
    torch.testing.assert_close(squares[0], fewer[0])


@pytest.mark.parametrize("spread", [0.1, 10.0, 500.0])
def test_taking_out_each_answer_is_safe_up_to_half_of_the_pool(spread):
    r, f = example_pool(40, spread, "taking-out")
    fast = pool.standard_errors(r, 1.0, 20, values=f)
    alone = [
        pool.curve(torch.cat([r[:i], r[i + 1 :]]), 1.0, 20, values=torch.cat([f[:i], f[i + 1 :]])) for i in range(40)
    ]
    slow = (torch.stack(alone) - pool.curve(r, 1.0, 20, values=f)).square().sum(0).sqrt()
    torch.testing.assert_close(fast, slow, rtol=1e-11, atol=1e-13)


def test_a_pool_without_the_rare_best_does_not_know_of_it():
    assert pool.standard_errors(torch.zeros(8, dtype=F64), 1.0, 4, rule="hard").tolist() == [0] * 4


# --- intervals -------------------------------------------------------------------------------------------------------


def test_interval_with_one_shuffle_places_the_bets_of_verify():
    few = vector(0.01, 0.0, 0.02, 0.0, 0.3, 0.0)  # where the largest bet is placed
    ends = pool.mean_interval(few, low=0, high=1, delta=0.1).tolist()
    assert ends[1] == pytest.approx(verify.tv_upper_bound(few, delta=0.05), abs=1e-12) and ends[1] < 0.9
    x = torch.rand(40, generator=verify.rng("interval"), dtype=F64)
    low, high = pool.mean_interval(x, low=0, high=1, delta=0.1).tolist()
    assert high == pytest.approx(verify.tv_upper_bound(x, delta=0.05), abs=1e-12)
    assert low == pytest.approx(1 - verify.tv_upper_bound(1 - x, delta=0.05), abs=1e-12)
    wide = pool.mean_interval(10 * x - 3, low=-3, high=7, delta=0.1)
    torch.testing.assert_close(wide, 10 * vector(low, high) - 3, rtol=0, atol=1e-11)


@pytest.mark.parametrize("rule", RULES)
def test_interval_is_of_disjoint_blocks(rule):
    r, f = example_pool(24, 2.0, "interval-of-blocks")
    r, f = r.round(), f.clamp(-1, 1)  # ties in every block
    got = pool.interval(
        r, 0.7, 3, low=-1, high=1, rule=rule, values=f, shuffles=1, delta=0.1, generator=verify.rng("blocks")
    )
    assert got.abs().max() < 1
    order = torch.rand(1, 24, generator=verify.rng("blocks"), dtype=F64).argsort(-1)[0].view(8, 3)
    # The pool is looked at in ascending order of the rewards.
    places = r.argsort(stable=True)[order]
    means = torch.stack([(kept(r[s], 0.7, rule) * f[s]).sum() for s in places])
    torch.testing.assert_close(got, pool.mean_interval(means, low=-1, high=1, delta=0.1), rtol=0, atol=1e-11)


def test_interval_covers_and_one_that_counts_all_subsets_does_not():
    expected = (selection.soft_best_of_n_law(S0, S0_REWARDS, 1.0, 4).exp() * S0_REWARDS).sum().item()
    g, runs, m, delta = verify.rng("pool-cover"), 300, 64, 0.1
    drawn = S0_REWARDS[categorical.sample(S0, m * runs, generator=g)].view(runs, m)
    ends = pool.interval(drawn, 1.0, 4, low=0, high=2, delta=delta, shuffles=4, generator=g)
    missed = ((ends[:, 0] > expected) | (ends[:, 1] < expected)).double()
    points = pool.curve(drawn, 1.0, 4)[:, 3]
    radius = 2 * math.sqrt(math.log(2 / delta) / (2 * math.comb(m, 4)))
    naive = ((points - expected).abs() > radius).double()

    def too_often(x: Tensor) -> bool:
        """Whether the miss rate is certainly above delta, with probability at most 1e-8 if it is not."""
        return pool.mean_interval(x, low=0, high=1, delta=2e-8)[0] > delta

    assert not too_often(missed) and too_often(naive)
    hoeffding = 2 * 2 * math.sqrt(math.log(2 / delta) / (2 * (m // 4)))
    assert ends.diff().median() < 0.9 * hoeffding


def test_more_shuffles_depend_less_on_the_generator():
    r, _ = example_pool(64, 1.0, "shuffles")
    spread = {
        s: torch.stack(
            [
                pool.interval(r, 0.5, 4, low=0, high=1, shuffles=s, generator=verify.rng("shuffles", str(i)))
                for i in range(8)
            ]
        ).std(0)
        for s in (1, 64)
    }
    assert (spread[64] < spread[1] / 2).all()


def test_wealth_is_averaged_over_shuffles():
    """One block is the whole pool, however it is shuffled: more shuffles are no more evidence."""
    ends = [
        pool.interval(POOL / 50, 1.0, 6, low=0, high=1, shuffles=s, delta=0.9, generator=verify.rng("one-block"))
        for s in (1, 9)
    ]
    assert ends[0][1] < 0.95
    torch.testing.assert_close(*ends, rtol=0, atol=1e-12)


def test_a_sorted_file_is_no_harm():
    """A sorted pool in blocks would look like one that hardly varies: it is shuffled first."""
    r = torch.arange(64, dtype=F64) / 63
    low, high = pool.interval(r, 1.0, 1, low=0, high=1, generator=verify.rng("sorted")).tolist()
    assert 0.3 < low < 0.5 < high < 0.7


# --- what a target needs ---------------------------------------------------------------------------------------------


def test_needed_n():
    c, e = pool.curve(POOL, 1.0, 5), pool.standard_errors(POOL, 1.0, 5)
    for target in (1.5, 2.0, 3.0, 3.9, 4.3):
        got = pool.needed_n(POOL, 1.0, target, 5, sigmas=0.5)
        for found, level in zip(got, (c, c + 0.5 * e, c - 0.5 * e), strict=True):
            reached = [n for n in range(1, 6) if level[n - 1] >= target]
            assert found == (reached[0] if reached else math.inf)
    assert pool.needed_n(POOL, 1.0, 4.4, 6, sigmas=0) == (6, 6, 6)  # the infinite error at N = M counts 0 times
    two = torch.stack([POOL, 2 * POOL])
    mean = pool.curve(two, 1.0, 5).mean(0)
    error = pool.standard_errors(two, 1.0, 5).square().sum(0).sqrt() / 2
    got = pool.needed_n(two, 1.0, 5.0, 5, sigmas=1)
    assert got.best == 1 + int((mean >= 5).long().argmax())
    assert got.low == 1 + int((mean + error >= 5).long().argmax())


@pytest.mark.parametrize("rule", ["soft", "exponential"])
def test_needed_beta(rule):
    got = pool.needed_beta(POOL, 3.3, 3, rule=rule, sigmas=0.2)
    shift = 0.2 * pool.standard_errors(POOL, got.best, 3, rule=rule)[2].item()
    for beta, level in zip(got, (3.3, 3.3 - shift, 3.3 + shift), strict=True):
        assert pool.curve(POOL, beta, 3, rule=rule)[2].item() == pytest.approx(level, abs=1e-9)
    assert got.high < got.best < got.low
    sure = pool.needed_beta(POOL, 3.3, 3, rule=rule, sigmas=5)
    assert (sure.low, sure.high) == (math.inf, 0) and sure.best == got.best
    two = torch.stack([POOL, POOL * 2])
    beta = pool.needed_beta(two, 5.0, 3, rule=rule, sigmas=0).best
    assert pool.curve(two, beta, 3, rule=rule)[:, 2].mean().item() == pytest.approx(5.0, abs=1e-9)


def test_a_target_next_to_the_best_of_n_asks_for_greed():
    near = vector(0, 1e-3, 1)  # so near that no temperature of the curves tells them apart
    greedy = pool.curve(near, 1.0, 2, rule="hard")[1].item()
    assert pool.needed_beta(near, greedy - 1e-6, 2, sigmas=0) == (0, 0, 0)
    assert pool.needed_beta(POOL, math.nextafter(2, 3), 2) == (math.inf, math.inf, math.inf)  # and next to the mean


def test_a_temperature_is_within_two_standard_errors_unless_said():
    r, _ = example_pool(60, 4.0, "two-errors")
    got = pool.needed_beta(r, 2.6, 3)
    shift = 2 * pool.standard_errors(r, got.best, 3)[2].item()
    for beta, level in zip(got, (2.6, 2.6 - shift, 2.6 + shift), strict=True):
        assert pool.curve(r, beta, 3)[2].item() == pytest.approx(level, abs=1e-9)
    whole = pool.needed_beta(POOL, 4.4, 6, sigmas=0)  # the infinite error at N = M counts 0 times
    assert whole == (whole.best,) * 3 and pool.curve(POOL, whole.best, 6)[5].item() == pytest.approx(4.4, abs=1e-9)


# --- divergence, doubts ----------------------------------------------------------------------------------------------


def test_divergence_of_the_whole_pool_is_that_of_repeated_draws():
    kl, bound = pool.divergence(POOL, 1.0, 4, rule="hard")
    law = enumerated_best_law(torch.full((6,), -math.log(6), dtype=F64), POOL, 4)
    assert kl.item() == pytest.approx((law.exp() * (law + math.log(6))).sum().item(), abs=1e-12)
    assert bound.item() == math.log(4) - 3 / 4
    assert pool.divergence(POOL, 1.0, 1)[0].item() == pytest.approx(0, abs=1e-14)
    assert pool.divergence(POOL, 1e-2, 4)[0].item() == pytest.approx(kl.item(), abs=1e-12)
    law = enumerated_exponential_law(torch.full((6,), -math.log(6), dtype=F64), POOL, 4, 2.0)
    noisy = pool.divergence(POOL, 2.0, 4, rule="exponential")[0].item()
    assert noisy == pytest.approx((law.exp() * (law + math.log(6))).sum().item(), abs=1e-12)


def test_doubts_say_what_is_wrong():
    many = torch.linspace(0, 1, 200, dtype=F64)
    assert pool.doubts(many, 1.0, 50) == [] and pool.doubts(many, 1.0, 100) == []
    assert pool.doubts(many, 1.0, 101) == ["N = 101 is more than half of the 200 answers: 1 disjoint pool of this size"]
    peaked = torch.cat([many, vector(50)])
    found = pool.doubts(peaked, 1.0, 100)
    assert len(found) == 2 and "as good as one of" in found[0] and "one answer is kept with chance 0.39" in found[1]
    few = pool.doubts(vector(*range(8)), 100.0, 2)
    assert few == ["the kept answer is as good as one of 8.0: too few to know their rewards' mean"]
    equal = pool.doubts(torch.full((50,), 2.0, dtype=F64), 1.0, 2)
    assert equal == ["all 50 rewards are 2: nothing is selected"]
    assert pool.doubts(vector(*range(40)), 1.0, 4, rule="hard") == []
    # At the limits there is no doubt: 10 answers count, a quarter is the share of one.
    ten, four = (pool.doubts(vector(*range(m)), 1.0, 1, rule="hard") for m in (10, 4))
    assert ten == [] and four == ["the kept answer is as good as one of 4.0: too few to know their rewards' mean"]
    # The rule that is asked for: the exponential one keeps the best more often than the soft one.
    one = torch.cat([torch.zeros(99, dtype=F64), vector(4)])
    found = [pool.doubts(one, 1.0, 50, rule=rule) for rule in ("soft", "exponential")]
    assert found == [[], ["one answer is kept with chance 0.27: the curve hangs on its reward"]]


# --- wrong arguments -------------------------------------------------------------------------------------------------

ALIVE = {"low": 0.0, "high": 5.0, "generator": torch.Generator()}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: pool.curve(POOL, 1.0, 7), "n must be at most 6, the number of answers in the pool, got 7"),
        (lambda: pool.curve(POOL, 1.0, 0), "n must be an integer >= 1, got 0"),
        (lambda: pool.curve(POOL[:0], 1.0, 1), "rewards must have a last dimension of size >= 1, got shape (0,)"),
        (lambda: pool.curve(POOL[:1], 1.0, 1), "rewards must hold at least 2 answers in the last dimension, got 1"),
        (lambda: pool.curve(POOL.log(), 1.0, 1), "rewards must be finite, got 1 of 6 entries NaN or infinite"),
        (lambda: pool.curve(POOL * math.nan, 1.0, 1), "rewards must be finite, got 6 of 6 entries NaN or infinite"),
        (lambda: pool.curve(POOL, 0.0, 1), "beta must be finite and > 0, got 0.0"),
        (lambda: pool.curve(POOL, 5 / 601, 1), "beta must be at least (max reward - min reward) / 600, got rewards"),
        (
            lambda: pool.curve(POOL.expand(3, 6), vector(1, 2), 1),
            "beta must broadcast against the batch dimensions (3,), got shape (2,)",
        ),
        (
            lambda: pool.curve(POOL, 1.0, 1, rule="best"),
            "rule must be one of 'hard', 'soft', 'exponential', got 'best'",
        ),
        (lambda: pool.curve(POOL, 1.0, 1, values=POOL[:5]), "values must broadcast to shape (6,), got (5,)"),
        (lambda: pool.curve(POOL, 1.0, 1, values=POOL.log()), "values must be finite, got 1 of 6 entries"),
        (lambda: pool.curve(POOL, 1.0, 1, log_ratios=POOL[:5]), "log_ratios must broadcast to shape (6,), got (5,)"),
        (lambda: pool.curve(POOL, 1.0, 1, log_ratios=-POOL.log()), "log_ratios must be finite or -inf (excluded)"),
        (
            lambda: pool.curve(POOL.expand(2, 6), 1.0, 1, log_ratios=torch.stack([POOL, POOL - math.inf])),
            "log_ratios must leave at least one outcome of positive mass per row",
        ),
        (
            lambda: pool.curve(POOL, 1.0, 1, rule="hard", log_ratios=POOL),
            "log_ratios must be None for the hard rule, got a tensor",
        ),
        (lambda: pool.standard_errors(POOL, 1.0, 7), "n must be at most 6"),
        (lambda: pool.pass_at_k(POOL, 2), "correct must be 0 or 1, got 2"),
        (lambda: pool.pass_at_k(vector(0, math.nan), 2), "correct must be 0 or 1, got nan"),
        (lambda: pool.interval(POOL, 1.0, 7, **ALIVE), "n must be at most 6"),
        (lambda: pool.interval(POOL, 1.0, 2, **ALIVE, shuffles=0), "shuffles must be an integer >= 1, got 0"),
        (
            lambda: pool.interval(POOL, 1.0, 2, **{**ALIVE, "high": 4}),
            "rewards must lie in [0, 4], got values from 0 to 5",
        ),
        (
            lambda: pool.interval(POOL, 1.0, 2, **{**ALIVE, "low": 1}, values=MARKED),
            "values must lie in [1, 5], got values from 0 to 1",
        ),
        (
            lambda: pool.interval(POOL, 1.0, 2, **{**ALIVE, "low": 5}),
            "low and high must be finite with low < high, got 5",
        ),
        (lambda: pool.interval(POOL, 1.0, 2, **ALIVE, delta=1.0), "delta must lie strictly between 0 and 1, got 1.0"),
        (lambda: pool.mean_interval(POOL, low=0, high=math.inf), "low and high must be finite with low < high"),
        (lambda: pool.mean_interval(POOL, low=-1e308, high=1e308), "low and high must be finite with low < high"),
        (lambda: pool.mean_interval(POOL, low=1, high=9), "x must lie in [1, 9], got values from 0 to 5"),
        (lambda: pool.needed_n(POOL, 1.0, math.nan, 2), "target must be finite, got nan"),
        (lambda: pool.needed_n(POOL, 1.0, 2.5, 2, sigmas=-1), "sigmas must be finite and >= 0, got -1"),
        (
            lambda: pool.needed_n(POOL.expand(2, 0, 6), 1.0, 2.5, 2),
            "rewards must hold at least one pool, got shape (2, 0)",
        ),
        (
            lambda: pool.needed_beta(POOL, 2.0, 3),
            "target must lie strictly between the mean reward 2 and the best of 3 3.75, got 2.0",
        ),
        (lambda: pool.needed_beta(POOL, 3.75, 3), "target must lie strictly between the mean reward 2"),
        (lambda: pool.needed_beta(0 * POOL, 0.0, 3), "the mean reward 0 and the best of 3 0, got 0.0"),
        (lambda: pool.needed_beta(POOL, 3.0, 3, rule="hard"), "rule must be one of 'soft', 'exponential', got 'hard'"),
        (lambda: pool.divergence(POOL, 1.0, 7), "n must be at most 6"),
        (lambda: pool.divergence(POOL, 1.0, 2, rule="best"), "rule must be one of 'hard', 'soft', 'exponential', got"),
        (lambda: pool.doubts(POOL.expand(2, 6), 1.0, 2), "rewards must be one pool of shape (M,), got shape (2, 6)"),
    ],
)
def test_wrong_values_are_named(call, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        call()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: pool.curve(POOL.long(), 1.0, 1), "rewards must be a floating-point torch.Tensor, got a torch.int64"),
        (lambda: pool.curve(POOL, 1.0, 2.0), "n must be an int, got float"),
        (lambda: pool.curve(POOL, 1.0, 2, values=[1.0]), "values must be a floating-point torch.Tensor, got list"),
        (
            lambda: pool.curve(POOL, 1.0, 2, log_ratios=1.0),
            "log_ratios must be a floating-point torch.Tensor, got float",
        ),
        (
            lambda: pool.pass_at_k((POOL > 1).long(), 2),
            "correct must be a floating-point torch.Tensor, got a torch.int64 tensor",
        ),
        (lambda: pool.interval(POOL, 1.0, 2, **{**ALIVE, "generator": None}), "generator must be a torch.Generator"),
        (lambda: pool.mean_interval(POOL, low="0", high=5), "low must be a number, got str"),
        (lambda: pool.mean_interval(POOL, low=0, high=None), "high must be a number, got NoneType"),
        (lambda: pool.mean_interval(POOL, low=0, high=5, delta="x"), "delta must be a number, got str"),
        (lambda: pool.needed_n(POOL, 1.0, "3", 2), "target must be a number, got str"),
    ],
)
def test_wrong_types_are_named(call, message):
    with pytest.raises(TypeError, match=re.escape(message)):
        call()


# --- command line ----------------------------------------------------------------------------------------------------


def lines(path, records):
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in records), encoding="utf-8")
    return path


def run(capsys, *arguments, clock=lambda: 0.0):
    """The status and what was printed. Nothing is said about progress, however busy the machine."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pool.time, "monotonic", clock)
        status = pool._main([str(a) for a in arguments])
    printed = capsys.readouterr()
    return status, printed.out, printed.err


def columns(out, *names):
    """The rows of the table, by the name of the column."""
    head, *rows = out[out.index("      N ") :].splitlines()
    places = {"N": 0, "mean": 1, "s.e.": 2, "over prompts": 3, "KL": 4, "KL <=": 5, "doubtful": 6}
    assert re.sub(r"\s+", "", head) == "".join(places).replace(" ", "")
    return [[row.split()[places[name]] for name in names] for row in rows if re.match(r" +\d+ ", row)]


def test_command_line_prints_the_curve_of_a_pool(capsys, tmp_path):
    r = torch.randn(40, generator=verify.rng("command"), dtype=F64)
    file = lines(tmp_path / "a.jsonl", [{"reward": x} for x in r.tolist()])
    status, out, err = run(capsys, file, "--beta", 0.5)
    assert status == 0 and err == "" and out.startswith(f"{file}: 40 answers to 1 prompt\nrule soft")
    c, e = pool.curve(r, 0.5, 20), pool.standard_errors(r, 0.5, 20)
    got = columns(out, "N", "mean", "s.e.", "over prompts", "KL", "KL <=")
    assert [row[0] for row in got] == ["1", "2", "4", "8", "16", "20"]
    for n, mean, error, over, kl, bound in got:
        k = int(n)
        assert mean == f"{c[k - 1].item():.6g}" and error == f"{e[k - 1].item():.3g}" and over == "-"
        estimate, limit = pool.divergence(r, 0.5, k)
        assert (kl, bound) == (f"{estimate.item():.4f}", f"{limit.item():.4f}")
    assert "<svg" in (tmp_path / "a.jsonl.svg").read_text(encoding="utf-8") and "picture: " in out
    assert "\nrule soft, beta 0.5\n" in out


def test_command_line_averages_over_prompts_and_takes_values(capsys, tmp_path):
    g = verify.rng("prompts")
    r, f = torch.randn(3, 10, generator=g, dtype=F64), (torch.rand(3, 10, generator=g, dtype=F64) > 0.5).double()
    path = tmp_path / "a.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["value", "prompt", "note", "reward"])
        for j, i in itertools.product(range(10), range(3)):  # prompts take turns
            writer.writerow([int(f[i, j]), f"a, {i}", "", r[i, j].item()])
    picture = tmp_path / "curve.png"
    status, out, err = run(capsys, path, "--beta", 1, "--rule", "hard", "--n", 6, "--picture", picture)
    assert status == 0 and err == "" and picture.stat().st_size > 1000 and "beta" not in out
    assert "\nrule hard, mean of value\n" in out
    each = pool.curve(r, 1.0, 6, rule="hard", values=f)
    errors = pool.standard_errors(r, 1.0, 6, rule="hard", values=f).square().sum(0).sqrt() / 3
    for n, mean, error, over, doubtful in columns(out, "N", "mean", "s.e.", "over prompts", "doubtful"):
        k = int(n) - 1
        assert mean == f"{each[:, k].mean().item():.6g}" and error == f"{errors[k].item():.3g}"
        assert over == f"{each[:, k].std().item() / math.sqrt(3):.3g}"
        assert doubtful == f"{sum(bool(pool.doubts(x, 1.0, k + 1, rule='hard')) for x in r)}/3"


def test_command_line_finds_a_temperature(capsys, tmp_path):
    r = torch.randn(2, 30, generator=verify.rng("ess"), dtype=F64)
    records = [{"prompt": "tied", "reward": 1.0}] * 5
    records += [{"prompt": i, "reward": x} for i in range(2) for x in r[i].tolist()]
    file = lines(tmp_path / "a.jsonl", records)
    status, out, _ = run(capsys, file, "--ess", 0.7, "--target", 0.9, "--n", 2)
    betas = [float(weights_for(x, 0.7)) for x in r]
    assert status == 0 and f"beta {sum(betas) / 2:.6g}\n" in out  # the median of two
    assert "target 0.9: N = " in out and "at N = 2" not in out  # pools of three sizes
    tied = lines(tmp_path / "b.jsonl", [{"reward": 1}] * 4)
    status, out, err = run(capsys, tied)
    assert status == 2 and "--ess 0.5 is attained by no pool, since too many rewards are tied; give" in err
    status, out, err = run(capsys, tied, "--beta", 1)
    assert status == 0 and "doubt at N = 2: all 4 rewards are 1: nothing is selected" in out


def weights_for(rewards, fraction):
    from tiltlib import weights

    return weights.beta_for_ess(rewards, fraction)


def test_command_line_says_what_a_target_needs(capsys, tmp_path):
    file = lines(tmp_path / "a.jsonl", [{"reward": x} for x in POOL.tolist()])
    _, out, _ = run(capsys, file, "--beta", 1, "--n", 5, "--target", 3.9)
    needed = pool.needed_n(POOL, 1.0, 3.9, 5)
    assert f"target 3.9: N = 5, from {needed.low:g} to inf within two standard errors\n" in out
    beta = pool.needed_beta(POOL, 3.9, 5)
    assert f"at N = 5: beta = {beta.best:.4g}, from {beta.high:.4g} to {beta.low:.4g} within two" in out
    _, out, _ = run(capsys, file, "--beta", 1, "--n", 5, "--target", 9, "--rule", "exponential")
    assert "N = inf" in out and "at N = 5: target must lie strictly between the mean reward 2 and the best of 5" in out
    noisy = [f"{pool.divergence(POOL, 1.0, n, rule='exponential')[0].item():.4f}" for n in (1, 2, 4, 5)]
    assert [row[0] for row in columns(out, "KL")] == noisy


def test_command_line_of_the_hard_rule_asks_for_no_temperature(capsys, tmp_path):
    i = torch.arange(514)
    r = torch.stack([i % 2, i % 3 > 0]).double()  # half of them or more are best: no temperature keeps fewer
    file = lines(tmp_path / "a.jsonl", [{"prompt": i, "reward": x} for i in (0, 1) for x in r[i].tolist()])
    status, out, _ = run(capsys, file, "--rule", "hard", "--target", 0.8)
    head = [f"{file}: 1028 answers to 2 prompts, 514 or more each", "rule hard"]
    assert status == 0 and out.splitlines()[:2] == head and columns(out, "N")[-1] == ["256"]
    assert "target 0.8: N = 2, from" in out and "at N" not in out


def test_command_line_finds_the_temperature_of_its_rule(capsys, tmp_path):
    r = torch.stack([POOL, POOL.sqrt()])
    file = lines(tmp_path / "a.jsonl", [{"prompt": i, "reward": x} for i in (0, 1) for x in r[i].tolist()])
    options = ("--beta", 1, "--target", 2, "--rule", "exponential", "--n")
    beta = pool.needed_beta(r, 2.0, 2, rule="exponential").best
    _, out, _ = run(capsys, file, *options, 2)
    assert f"at N = 2: beta = {beta:.4g}, from " in out
    spread = pool.curve(r, 1.0, 2, rule="exponential").std(0) / math.sqrt(2)
    kl = [pool.divergence(r, 1.0, n, rule="exponential")[0].mean().item() for n in (1, 2)]
    assert columns(out, "over prompts", "KL") == [[f"{spread[i].item():.3g}", f"{kl[i]:.4f}"] for i in (0, 1)]
    assert "at N" not in run(capsys, file, *options, 1)[1]  # one answer is kept at any temperature


def test_the_picture_is_the_curve_with_a_band_of_two_errors(capsys, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda figure, path: drawn.append((figure, path)))
    file = lines(tmp_path / "a.jsonl", [{"reward": x} for x in POOL.tolist()])
    run(capsys, file, "--beta", 1, "--n", 6)
    ((figure, path),) = drawn
    (ax,) = figure.axes
    ((line,), (band,)) = ax.lines, ax.collections
    c, e = pool.curve(POOL, 1.0, 6).numpy(), pool.standard_errors(POOL, 1.0, 6).numpy()
    assert path == f"{file}.svg" and ax.get_title() == "a.jsonl, soft best-of-N"
    assert line.get_xdata().tolist() == [*range(1, 7)] and line.get_ydata().tolist() == c.tolist()
    edge = band.get_paths()[0].vertices
    assert edge[:, 0].max() == 5  # all 6 answers say nothing about their error
    for n in range(1, 6):
        at = edge[edge[:, 0] == n, 1]
        assert (at.min(), at.max()) == pytest.approx((c[n - 1] - 2 * e[n - 1], c[n - 1] + 2 * e[n - 1]), abs=1e-12)
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["two standard errors", "unbiased curve"]
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("N", "mean of what best-of-N keeps")
    assert ax.get_xscale() == "log" and ax.xaxis.get_transform().base == 2


def test_command_line_of_a_draft(capsys, tmp_path):
    r, ratios = POOL, vector(0.1, -0.2, 0.3, 0.0, -0.4, -math.inf)
    records = [{"reward": a, "logratio": b} for a, b in zip(r.tolist(), ratios.tolist(), strict=True)]
    file = lines(tmp_path / "a.jsonl", records)
    status, out, _ = run(capsys, file, "--beta", 2, "--n", 3, "--target", 3)
    c = pool.curve(r, 2.0, 3, log_ratios=ratios)
    assert status == 0 and columns(out, "mean", "KL") == [[f"{c[k].item():.6g}", "-"] for k in (0, 1, 2)]
    assert "target 3: N = inf" in out and "at N = 3: beta" not in out
    status, _, err = run(capsys, file, "--rule", "hard")
    assert status == 2 and "log_ratios must be None for the hard rule" in err


BAD = {
    '{"reward": NaN}': "has a reward that is no finite number: nan",
    '{"reward": -Infinity, "value": 1}': "has a reward that is no finite number: -inf",
    '{"reward": true, "value": 1}': "has a reward that is no finite number: True",
    '{"reward": "high", "value": 1}': "has a reward that is no finite number: 'high'",
    '{"reward": [1], "value": 1}': "has a reward that is no finite number: [1]",
    '{"value": 1}': "has no reward",
    '{"reward": 1}': "has no value",
    "[1, 2]": "is not a JSON object with a reward",
    "nonsense": "is not JSON: Expecting value: line 1 column 1 (char 0)",
    '{"reward": 1, "val': "is not JSON: Invalid control character at",
}


def test_bad_lines_are_named_and_the_others_are_used(capsys, tmp_path):
    good = [{"reward": x, "value": x} for x in POOL.tolist()]
    file = lines(tmp_path / "a.jsonl", [good[0], "", *BAD, *good[1:]])
    status, out, err = run(capsys, file, "--beta", 1)
    assert status == 1
    named = err.splitlines()
    assert len(named) == len(BAD)
    for number, (line, what) in enumerate(zip(named, BAD.values(), strict=True), 3):
        assert line.startswith(f"{file}: line {number} {what}")
    clean = run(capsys, lines(tmp_path / "b.jsonl", good), "--beta", 1)[1]
    assert out.splitlines()[1:-1] == clean.splitlines()[1:-1]  # all but the two lines that name the file
    # A bad line does not say which numbers the others have.
    bad, reversed_values = ['{"reward": NaN}', '{"value": 1}'], [{**g, "value": -g["value"]} for g in good]
    status, out, _ = run(capsys, lines(tmp_path / "e.jsonl", [*bad, *reversed_values]), "--beta", 1)
    assert status == 1 and columns(out, "mean")[0] == ["-2"]
    for bad, more in ((20, []), (21, [f"{tmp_path / 'c.jsonl'}: and 1 more"])):
        many = lines(tmp_path / "c.jsonl", [*good, *["nonsense"] * bad])
        assert run(capsys, many, "--beta", 1)[2].splitlines()[20:] == more


def test_bad_lines_of_a_table_are_named(capsys, tmp_path):
    file = tmp_path / "a.csv"
    file.write_bytes(b"\xef\xbb\xbfreward,value\n1,0\n\n2\n3,0,1\n,1\n2,x\n3,\xff\n2,1\n")
    status, out, err = run(capsys, file, "--beta", 1)
    assert status == 1 and "2 answers to 1 prompt" in out
    expected = ["line 4 has 1 columns where the header has 2", "line 5 has 3 columns where the header has 2"]
    expected += ["line 6 has no reward", "line 7 has a value that is no finite number: 'x'"]
    expected += ["line 8 has a value that is no finite number: '\ufffd'"]
    assert err.splitlines() == [f"{file}: {line}" for line in expected]


def test_prompts_are_told_apart_to_the_letter_and_an_empty_column_is_none(capsys, tmp_path):
    file = tmp_path / "a.csv"
    file.write_bytes(b'prompt,reward,value\nalone,9,\n"a\nb",1,\n"a\r\nb",2,\n"a\nb",3,\n"a\r\nb",4,\n')
    status, out, err = run(capsys, file, "--beta", 1, "--n", 1)
    assert status == 1 and err == f"{file}: prompt 'alone' has one answer, which is no pool\n"
    assert "4 answers to 2 prompts, 2 or more each" in out and columns(out, "mean") == [["2.5"]]


HELP = {
    "-h, --help": "show this help message and exit",
    "--rule {hard,soft,exponential}": "how one of N answers is kept (soft)",
    "--beta BETA": "temperature in reward units",
    "--ess ESS": "else the temperature keeps this share of a pool (0.5)",
    "--n N": "largest N (half of the smallest pool, at most 256)",
    "--target TARGET": "say which N and which temperature reach this mean",
    "--picture PICTURE": "where the picture goes (FILE.svg)",
}


def test_help_says_what_each_option_does(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit):
        pool._main(["--help"])
    usage, what, file, options = capsys.readouterr().out.split("\n\n")
    assert usage.startswith("usage: python -m tiltlib.pool [-h]") and what == pool.__doc__.split("\n\n")[0]
    assert file.split("file", 1)[1].strip() == "answers, one a line: .csv with a header, else JSON lines"
    assert options.split()[1:] == " ".join(f"{option} {help}" for option, help in HELP.items()).split()
    with pytest.raises(SystemExit):
        pool._main(["a.jsonl", "--rule", "best"])
    assert "argument --rule: invalid choice: 'best'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.csv", "", "line 1 of {} must name different columns, one of them reward, got []"),
        ("a.csv", "score\n1\n", "must name different columns, one of them reward, got ['score']"),
        ("a.csv", "reward,reward\n1,1\n", "must name different columns"),
        ("a.jsonl", "", "{} holds no pool of at least two answers"),
        ("a.jsonl", '{"reward": 1}\n', "{}: prompt '' has one answer, which is no pool\nerror: {} holds no pool"),
        ("a.jsonl", '{"reward": 1}\n{"reward": 2}\n', "n must be at most 2, the number of answers in the pool, got 3"),
    ],
)
def test_a_file_without_pools_is_refused(capsys, tmp_path, name, text, message):
    file = tmp_path / name
    file.write_text(text, encoding="utf-8")
    status, _, err = run(capsys, file, "--beta", 1, "--n", 3)
    assert status == 2 and message.replace("{}", str(file)) in err and "error: " in err


def test_a_field_that_is_too_large_spoils_its_line(capsys, tmp_path, monkeypatch):
    file = tmp_path / "a.csv"
    file.write_text(f"reward,note\n1,a\n2,{'x' * 200}\n3,b\n", encoding="utf-8")
    before = csv.field_size_limit(100)
    try:
        status, out, err = run(capsys, file, "--beta", 1)
    finally:
        csv.field_size_limit(before)
    assert status == 1 and "line 3 is not CSV: field larger than field limit" in err and "2 answers" in out


def test_a_missing_file_is_named(capsys, tmp_path):
    status, _, err = run(capsys, tmp_path / "none.jsonl")
    assert status == 2 and "No such file" in err and "none.jsonl" in err


def test_nothing_is_lost_without_matplotlib(capsys, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    file = lines(tmp_path / "a.jsonl", [{"reward": x} for x in POOL.tolist()])
    status, out, err = run(capsys, file, "--beta", 1)
    assert status == 0 and len(columns(out, "N")) == 3
    assert err == "no picture: it needs the matplotlib package, pip install matplotlib\n"


def test_long_files_show_progress_when_more_than_5_seconds_have_passed(capsys, tmp_path):
    # At the start; 1,024 lines; 2,048 lines, and again to say so; the pool; the table, and again.
    clock = iter([100, 105, 105.75, 105.75, 110.75, 116, 116])
    file = lines(tmp_path / "a.jsonl", [{"reward": x} for x in range(2100)])
    _, _, err = run(capsys, file, "--beta", 1000, "--n", 1, clock=lambda: next(clock))
    assert err == "2,048 lines read, 6 s\n1 draws of the table done, 16 s\n"


@pytest.mark.slow
def test_the_module_runs_as_a_program(tmp_path):
    file = lines(tmp_path / "a.jsonl", [{"reward": x} for x in POOL.tolist()])
    command = [sys.executable, "-W", "error", "-m", "tiltlib.pool", str(file), "--beta", "1"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and columns(done.stdout, "mean")[2] == ["3.45323"], done.stderr


# --- options that reach where they should ----------------------------------------------------------------------------


def test_needed_n_passes_on_the_rule_the_values_and_the_ratios():
    r, f = example_pool(12, 2.0, "needed-n-options")
    ratios = 0.3 * torch.randn(12, generator=verify.rng("needed-n-ratios"), dtype=F64)
    for options in ({"rule": "hard"}, {"values": f}, {"log_ratios": ratios}, {"rule": "exponential", "values": f}):
        c, e = pool.curve(r, 0.7, 6, **options), pool.standard_errors(r, 0.7, 6, **options)
        target = (c[2] + c[3]).item() / 2
        got = pool.needed_n(r, 0.7, target, 6, **options)
        for found, level in zip(got, (c, c + 2 * e, c - 2 * e), strict=True):
            reached = [n for n in range(1, 7) if level[n - 1] >= target]
            assert found == (reached[0] if reached else math.inf), options
    # A curve that meets the target exactly has reached it.
    flat = torch.zeros(4, dtype=F64)
    assert pool.needed_n(POOL[:4], 1.0, 0.0, 3, values=flat) == (1, 1, 1)


@pytest.mark.parametrize("rule", RULES)
def test_one_block_of_the_whole_pool_is_one_bet(rule):
    r, f = example_pool(8, 2.0, "interval-of-one-block")
    r[3] = r.max()  # a tie at the top
    f = f.clamp(-1, 1) / 9 - 8 / 9  # so low that one value says something
    options = {"low": -1, "high": 1, "delta": 0.9}
    one = (kept(r, 0.7, rule) * f).sum()[None]
    expected = pool.mean_interval(one, **options)
    assert expected[1] < 0.9
    got = pool.interval(
        *(torch.stack([r, r]), 0.7, 8),
        rule=rule,
        values=torch.stack([f, -f]),
        shuffles=1,
        generator=verify.rng("one"),
        **options,
    )
    torch.testing.assert_close(got, torch.stack([expected, -expected.flip(0)]), rtol=0, atol=1e-12)


def test_an_interval_is_of_16_shuffles_at_05_unless_said():
    x = torch.rand(40, generator=verify.rng("unless-said"), dtype=F64)
    said = pool.mean_interval(x, low=0, high=1, delta=0.05)
    assert torch.equal(pool.mean_interval(x, low=0, high=1), said) and 0 < said[0] < said[1] < 1
    ends = [
        pool.interval(x, 1.0, 2, low=0, high=1, generator=verify.rng("unless-said"), **options)
        for options in ({}, {"delta": 0.05, "shuffles": 16})
    ]
    assert torch.equal(*ends) and 0 < ends[0][0] < ends[0][1] < 1


def test_intervals_of_rows():
    x = torch.rand(2, 3, 30, generator=verify.rng("interval-rows"), dtype=F64)
    alone = torch.stack([torch.stack([pool.mean_interval(x[i, j], low=0, high=1) for j in range(3)]) for i in (0, 1)])
    torch.testing.assert_close(pool.mean_interval(x, low=0, high=1), alone, rtol=0, atol=1e-12)


def test_an_interval_lies_within_the_bounds():
    assert pool.mean_interval(vector(0.5), low=-1, high=3).tolist() == [-1, 3]  # one value says nothing at .05


@pytest.mark.parametrize(("low", "high", "end"), [(0.0, 0.1, 0.1), (0.7, 1.0, 0.7)])
def test_a_value_at_a_bound_that_its_dtype_rounds_is_at_the_bound(low, high, end):
    """In bfloat16 .1 is more than .1 and .7 less than .7."""
    x = vector(end, *[1.0 if high == 1 else 0.0] * 30)
    got, expected = pool.mean_interval(x.bfloat16(), low=low, high=high), pool.mean_interval(x, low=low, high=high)
    assert torch.equal(got, expected.bfloat16()) and expected.diff() < (high - low) / 2
    options = {"low": low, "high": high, "generator": verify.rng("rounded-bound"), "shuffles": 1}
    assert torch.equal(pool.interval(x.bfloat16(), 1.0, 1, **options), expected.bfloat16())


@pytest.mark.parametrize("rule", ["soft", "exponential"])
def test_a_needed_temperature_has_the_unit_of_the_reward_and_no_zero(rule):
    plain = pool.needed_beta(POOL, 3.3, 3, rule=rule, sigmas=0.2)
    moved = pool.needed_beta(10 * POOL - 400, 33 - 400, 3, rule=rule, sigmas=0.2)
    assert torch.tensor(moved).tolist() == pytest.approx((10 * torch.tensor(plain)).tolist(), rel=1e-6)
    small = pool.needed_beta(POOL / 10, 0.33, 3, rule=rule, sigmas=0.2)
    assert small.low > small.best > small.high and small.best < 1 < moved.best  # below 1 as above
    cold = pool.needed_beta(POOL, 3.6, 3, rule=rule, sigmas=0).best
    apart = pool.needed_beta(torch.stack([POOL - 300, POOL + 300]), 3.6, 3, rule=rule, sigmas=0)
    assert apart.best == pytest.approx(cold, rel=1e-6) and cold < 1


def test_the_bounds_of_a_mean_are_finite():
    for low, high in ((-math.inf, 1.0), (0.0, math.inf)):
        with pytest.raises(ValueError, match="low"):
            pool.mean_interval(vector(0.2, 0.4), low=low, high=high)
    with pytest.raises(ValueError, match="delta must"):
        pool.mean_interval(vector(0.2, 0.4), low=0, high=1, delta=0.0)
    with pytest.raises(TypeError, match="^x must be a floating-point"):
        pool.mean_interval([0.2], low=0, high=1)
