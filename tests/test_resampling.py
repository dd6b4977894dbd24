"""Resampling schemes: their definition place by place, their exact laws, their counts, and what they refuse."""

import itertools
import math

import numpy as np
import pytest
import torch
from helpers import F64, S0, S0_REWARDS, assert_same_under_default_dtype, law, random_law, vector
from hypothesis import given
from hypothesis import strategies as st

from tiltlib import categorical, resampling, verify

SCHEMES = {name: getattr(resampling, name) for name in ("multinomial", "residual", "stratified", "systematic")}
W = law(0.5, 0.3, 0.2)


def counts_of(ancestors, k):
    return torch.nn.functional.one_hot(ancestors, k).sum(-2)


def follows(samples, target, wrong):
    """A correct sample passes; the check has the power to see the wrong law."""
    verdict = verify.match(samples, target, claim="resampling", versus=[wrong])
    assert verdict, verdict.line()


def rows(log_weights, b):
    return log_weights.expand(b, -1)


# --- definition and exact laws ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2, 7, 100, 1000])
@pytest.mark.parametrize("name", ["systematic", "stratified"])
def test_it_is_the_search_it_replaces(name, n, rng):
    log_weights = 4 * torch.randn(50, 37, generator=rng, dtype=F64)
    state = rng.get_state()
    ancestors = SCHEMES[name](log_weights, n, generator=rng)
    rng.set_state(state)
    u = torch.rand(50, 1 if name == "systematic" else n, generator=rng, dtype=F64)
    cdf = torch.softmax(log_weights, -1).cumsum(-1)
    searched = torch.searchsorted(cdf / cdf[:, -1:], (torch.arange(n) + u) / n, right=True)
    assert torch.equal(ancestors, searched)


# Law of the two places (a, b), as a 3 x 3 table, for W = (.5, .3, .2) and n = 2.
PAIRS = {
    # Independent places.
    "multinomial": torch.outer(W.exp(), W.exp()),
    # n W = (1, .6, .4): one certain copy of 0, and one draw from (0, .6, .4).
    "residual": torch.tensor([[0, 0.6, 0.4], [0, 0, 0], [0, 0, 0]], dtype=F64),
    # The first stratum [0, .5) belongs to 0; in the second, [.5, .8) to 1 and [.8, 1) to 2.
    "stratified": torch.tensor([[0, 0.6, 0.4], [0, 0, 0], [0, 0, 0]], dtype=F64),
    # U / 2 < .5 is 0; (1 + U) / 2 < .8 iff U < .6.
    "systematic": torch.tensor([[0, 0.6, 0.4], [0, 0, 0], [0, 0, 0]], dtype=F64),
}


@pytest.mark.parametrize("name", SCHEMES)
def test_law_of_two_places(name, rng):
    target = PAIRS[name].flatten().log()
    off = torch.log_softmax(target * 1.1, -1)
    n = verify.plan(target, off)
    places = SCHEMES[name](rows(W, n), 2, generator=rng)
    follows(places[:, 0] * 3 + places[:, 1], target, off)


def test_three_places_tell_the_schemes_apart(rng):
    # n W = (1.5, .9, .6). Systematic, by U: [0, .4) gives 0 0 1, [.4, .5) gives 0 0 2, [.5, 1) gives 0 1 2.
    # Stratified: place 0 is 0; place 1 is 0 or 1, half each; place 2 is 1 if U < .4, else 2.
    tables = {
        "systematic": {(0, 0, 1): 0.4, (0, 0, 2): 0.1, (0, 1, 2): 0.5},
        "stratified": {(0, 0, 1): 0.2, (0, 1, 1): 0.2, (0, 0, 2): 0.3, (0, 1, 2): 0.3},
    }
    for name, table in tables.items():
        target = torch.zeros(27, dtype=F64)
        for (a, b, c), mass in table.items():
            target[9 * a + 3 * b + c] = mass
        off = torch.log_softmax(target.log() * 1.1, -1)
        places = SCHEMES[name](rows(W, verify.plan(target.log(), off)), 3, generator=rng)
        follows(places @ torch.tensor([9, 3, 1]), target.log(), off)


@pytest.mark.parametrize("name", SCHEMES)
def test_a_random_place_has_the_weights_as_its_law(name, rng):
    target = random_law(16, rng)
    hotter = torch.log_softmax(target / 1.05, -1)
    b = verify.plan(target, hotter)
    ancestors = SCHEMES[name](rows(target + 3.0, b), 5, generator=rng)
    place = torch.randint(5, (b, 1), generator=rng)
    follows(ancestors.gather(-1, place), target, hotter)


def test_shifted_ancestors_are_rejected(rng):
    """Sorted, but off by one: the check of the test above has to see it."""
    target = random_law(16, rng)
    hotter = torch.log_softmax(target / 1.05, -1)
    b = verify.plan(target, hotter)
    ancestors = resampling.systematic(rows(target, b), 5, generator=rng)
    place = torch.randint(5, (b, 1), generator=rng)
    wrong = (ancestors + 1).clamp(max=15).gather(-1, place)
    assert verify.match(wrong, target, claim="resampling!shifted", versus=[hotter]).decision == "REJECT"


# --- counts ----------------------------------------------------------------------------------------------------------


@given(st.data())
def test_counts_stay_near_the_expected_ones(data):
    k, n = data.draw(st.integers(1, 9)), data.draw(st.integers(1, 40))
    log_weights = vector(*data.draw(st.lists(st.floats(-8, 8), min_size=k, max_size=k)))
    g = verify.rng("counts", salt=str(data.draw(st.integers(0, 10**6))))
    expected = n * torch.softmax(log_weights, -1)
    drawn = {name: counts_of(f(log_weights, n, generator=g), k).double() for name, f in SCHEMES.items()}
    assert all(c.sum() == n for c in drawn.values())
    slack = 1e-9 * (1 + expected)
    assert ((drawn["systematic"] - expected).abs() < 1 + slack).all()
    assert ((drawn["stratified"] - expected).abs() < 2 + slack).all()
    assert (drawn["residual"] >= (expected - slack).floor()).all()


@pytest.mark.parametrize("name", ["residual", "stratified", "systematic"])
@pytest.mark.parametrize("k", [1, 3, 7, 10, 49, 1000])
def test_equal_weights_keep_everyone_once(name, k, rng):
    ancestors = SCHEMES[name](torch.full((k,), -2.5, dtype=F64), k, generator=rng)
    assert torch.equal(ancestors.sort().values, torch.arange(k))


@pytest.mark.parametrize("name", SCHEMES)
def test_limits(name, rng):
    alone = vector(-math.inf, 2.0, -math.inf)
    assert (SCHEMES[name](alone, 20, generator=rng) == 1).all()
    some = vector(-math.inf, 0.0, -math.inf, 0.7, -math.inf)
    drawn = SCHEMES[name](rows(some, 500), 11, generator=rng)
    assert set(drawn.unique().tolist()) == {1, 3}
    assert SCHEMES[name](vector(3.0), 4, generator=rng).tolist() == [0, 0, 0, 0]


@pytest.mark.parametrize("name", SCHEMES)
def test_a_constant_changes_nothing_and_inputs_stay(name, rng):
    log_weights = torch.randn(4, 9, generator=rng, dtype=F64)
    before, state = log_weights.clone(), rng.get_state()
    first = SCHEMES[name](log_weights, 6, generator=rng)
    rng.set_state(state)
    assert torch.equal(first, SCHEMES[name](log_weights + 700, 6, generator=rng))
    assert torch.equal(log_weights, before) and first.dtype == torch.int64


@pytest.mark.parametrize("name", ["multinomial", "stratified", "systematic"])
def test_a_batch_is_a_loop(name, rng):
    log_weights = torch.randn(2, 3, 9, generator=rng, dtype=F64)
    state = rng.get_state()
    together = SCHEMES[name](log_weights, 6, generator=rng)
    rng.set_state(state)
    one_by_one = [SCHEMES[name](row, 6, generator=rng) for row in log_weights.view(6, 9)]
    assert torch.equal(together.view(6, 6), torch.stack(one_by_one))


@pytest.mark.parametrize("name", SCHEMES)
def test_float32_weights(name, rng):
    ancestors = SCHEMES[name](torch.randn(3, 50, generator=rng), 20, generator=rng)
    assert ancestors.shape == (3, 20) and 0 <= int(ancestors.min()) <= int(ancestors.max()) < 50


# --- without replacement, and one by one -----------------------------------------------------------------------------


def plackett_luce(probs, n):
    """Probability of each ordered selection, shape (K,) * n."""
    table = torch.zeros((len(probs),) * n, dtype=F64)
    for order in itertools.permutations(range(len(probs)), n):
        left, chance = 1.0, 1.0
        for i in order:
            chance *= probs[i] / left
            left -= probs[i]
        table[order] = chance
    return table


def test_gumbel_top_k_is_plackett_luce(rng):
    target = plackett_luce(W.exp().tolist(), 2).flatten().log()
    off = plackett_luce(torch.softmax(W / 1.05, -1).tolist(), 2).flatten().log()
    first = resampling.gumbel_top_k(rows(W - 5, verify.plan(target, off)), 2, generator=rng)
    follows(first[:, 0] * 3 + first[:, 1], target, off)
    # Inclusion probabilities .839286, .675, .485714.
    table = target.exp().view(3, 3)
    torch.testing.assert_close(table.sum(0) + table.sum(1), vector(0.839286, 0.675, 0.485714), atol=1e-6, rtol=0)


def test_gumbel_top_k_of_everyone_is_a_permutation(rng):
    drawn = resampling.gumbel_top_k(torch.randn(20, 8, generator=rng, dtype=F64), 8, generator=rng)
    assert torch.equal(drawn.sort(-1).values, torch.arange(8).expand(20, 8))
    some = vector(0.0, -math.inf, 1.0)
    assert set(resampling.gumbel_top_k(some, 2, generator=rng).tolist()) == {0, 2}


@pytest.mark.parametrize("max_reward", [2.0, 3.0, 1.0])
def test_rejection_keeps_draws_of_the_clipped_tilt(max_reward, rng):
    clipped = S0_REWARDS.clamp(max=max_reward)
    beta = 0.7  # not 1, where a forgotten beta would not show
    target, off = categorical.tilt(S0, clipped, beta), categorical.tilt(S0, clipped, 1.1 * beta)
    acceptance = categorical.expectation(S0, torch.exp((clipped - max_reward) / beta)).item()
    y = categorical.sample(S0, math.ceil(1.2 * verify.plan(target, off) / acceptance), generator=rng)
    kept = resampling.rejection(S0_REWARDS[y], beta, max_reward, generator=rng)
    follows(y[kept], target, off)
    coin = vector(acceptance, 1 - acceptance).log()
    verdict = verify.match((~kept).long(), coin, claim="acceptance")
    assert verdict, verdict.line()


def test_rejection_instances_of_the_theory(rng):
    # Acceptance .378031 at the true maximum; the tilt by min(r, 1) is (.268941, .438635, .292423).
    assert math.isclose(categorical.expectation(S0, torch.exp(S0_REWARDS - 2)).item(), 0.378031, abs_tol=1e-6)
    clipped = categorical.tilt(S0, S0_REWARDS.clamp(max=1), 1.0).exp()
    torch.testing.assert_close(clipped, vector(0.268941, 0.438635, 0.292423), atol=1e-6, rtol=0)
    never = resampling.rejection(torch.full((1000,), -math.inf, dtype=F64), 1.0, 0.0, generator=rng)
    assert not never.any()
    assert resampling.rejection(torch.zeros(1000, dtype=F64), 1.0, 0.0, generator=rng).all()


# --- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", [*SCHEMES.values(), resampling.gumbel_top_k])
@pytest.mark.parametrize(
    ("log_weights", "n", "error", "text"),
    [
        (vector(-math.inf, -math.inf), 1, ValueError, "log_weights must leave at least one outcome"),
        (vector(0.0, math.nan), 1, ValueError, "log_weights must be finite or -inf"),
        (vector(0.0, math.inf), 1, ValueError, "log_weights must be finite or -inf"),
        (torch.tensor([1, 2]), 1, TypeError, "log_weights must be a floating-point"),
        (vector(0.0, 1.0), 0, ValueError, "n must be an integer >= 1, got 0"),
        (vector(0.0, 1.0), -2, ValueError, "n must be an integer >= 1, got -2"),
        (vector(0.0, 1.0), 1.5, TypeError, "n must be an int, got float"),
        (vector(0.0, 1.0), torch.tensor(1), TypeError, "n must be an int, got a torch.int64 tensor"),
        (np.zeros(2), 1, TypeError, "log_weights must be a floating-point torch.Tensor, got ndarray"),
        ([0.0, 1.0], 1, TypeError, "log_weights must be a floating-point torch.Tensor, got list"),
        (torch.zeros(3, 0), 1, ValueError, r"log_weights must have a last dimension of size >= 1, got shape \(3, 0\)"),
    ],
)
def test_bad_weights(scheme, log_weights, n, error, text, rng):
    with pytest.raises(error, match=text):
        scheme(log_weights, n, generator=rng)


def test_too_few_for_top_k(rng):
    with pytest.raises(ValueError, match="n must be at most the number of indices with positive weight, 1, got 2"):
        resampling.gumbel_top_k(vector(0.0, -math.inf, -math.inf), 2, generator=rng)


@pytest.mark.parametrize(
    ("rewards", "beta", "max_reward", "error", "text"),
    [
        (vector(math.nan), 1.0, 0.0, ValueError, "rewards must be finite or -inf"),
        (torch.tensor([1]), 1.0, 0.0, TypeError, "rewards must be a floating-point"),
        (vector(0.0), 0.0, 0.0, ValueError, "beta must be finite and > 0, got 0.0"),
        (vector(0.0), 1.0, math.inf, ValueError, "max_reward must be finite, got inf"),
        (vector(0.0), 1.0, math.nan, ValueError, "max_reward must be finite, got nan"),
        (vector(math.inf), 1.0, 0.0, ValueError, "rewards must be finite or -inf"),
        ([0.0], 1.0, 0.0, TypeError, "rewards must be a floating-point torch.Tensor, got list"),
        (vector(0.0), 1.0, torch.tensor(0.0), TypeError, "max_reward must be a number, got a torch.float32 tensor"),
    ],
)
def test_bad_rejection(rewards, beta, max_reward, error, text, rng):
    with pytest.raises(error, match=text):
        resampling.rejection(rewards, beta, max_reward, generator=rng)


@pytest.mark.parametrize("scheme", [*SCHEMES.values(), resampling.gumbel_top_k])
def test_a_generator_is_required(scheme):
    with pytest.raises(TypeError, match="generator must be a torch.Generator, got NoneType"):
        scheme(vector(0.0, 1.0), 1, generator=None)


def test_rejection_requires_a_generator():
    with pytest.raises(TypeError, match="generator must be a torch.Generator, got NoneType"):
        resampling.rejection(vector(0.0), 1.0, 0.0, generator=None)


# --- numerics --------------------------------------------------------------------------------------------------------

ALL = [*SCHEMES.values(), resampling.gumbel_top_k]
SMALL = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("n", [1, 2, 5, 1000, 10**6])
@pytest.mark.parametrize("name", SCHEMES)
def test_the_largest_uniform_takes_no_excluded_index(name, n, monkeypatch):
    """n - u rounds to n - 1 for u = 1 - 2^-53: the last place is still that of the last index with weight."""
    u = 1 - 2.0**-53
    monkeypatch.setattr(torch, "rand", lambda size, **kwargs: torch.full(size, u, dtype=F64))
    for log_weights in (
        vector(0, 0, -math.inf),
        vector(-math.inf, 0.7, 0.2, -math.inf, -math.inf),
        vector(0, -math.inf),
    ):
        ancestors = SCHEMES[name](log_weights, n, generator=torch.Generator())
        last = int((log_weights > -math.inf).nonzero().max())
        assert ancestors[-1] == last and (log_weights[ancestors] > -math.inf).all()


@pytest.mark.parametrize("u", [0.0, 2.0**-53, 1 - 2.0**-53])
def test_gumbel_top_k_at_the_edges_of_the_uniform(u, monkeypatch):
    monkeypatch.setattr(torch, "rand", lambda size, **kwargs: torch.full(size, u, dtype=F64))
    drawn = resampling.gumbel_top_k(vector(-math.inf, 0, -math.inf, 1, -math.inf), 2, generator=torch.Generator())
    assert set(drawn.tolist()) == {1, 3}


@pytest.mark.parametrize("dtype", SMALL)
@pytest.mark.parametrize("scheme", ALL)
def test_a_smaller_dtype_has_the_law_of_its_numbers(scheme, dtype, rng):
    """Rounded inputs are what they are; nothing is rounded again on the way to the draw."""
    log_weights = (3 * torch.randn(3000, 9, generator=rng)).to(dtype)
    state = rng.get_state()
    drawn = scheme(log_weights, 9, generator=rng)
    rng.set_state(state)
    assert torch.equal(drawn, scheme(log_weights.double(), 9, generator=rng))


@pytest.mark.parametrize("dtype", [F64, *SMALL])
def test_the_last_of_a_thousand(dtype, monkeypatch):
    """P(last) of 1000 zeros and a 3 is e^3 / (1000 + e^3) = .01969; in bfloat16 it was .02001."""
    log_weights = torch.tensor([0] * 1000 + [3]).to(dtype)
    share = math.exp(3) / (1000 + math.exp(3))
    for u, last in ((1 - share - 1e-6, False), (1 - share + 1e-6, True)):
        monkeypatch.setattr(torch, "rand", lambda size, u=u, **kwargs: torch.full(size, u, dtype=F64))
        assert (resampling.multinomial(log_weights, 1, generator=torch.Generator()) == 1000).all() == last
    # The last key is the largest iff its exponential clock, at rate e^3, rings before that of the others.
    for factor, last in ((1 - 1e-4, True), (1 + 1e-4, False)):
        clock = torch.full((1001,), 0.01, dtype=F64)
        clock[-1] = factor * 0.01 * math.exp(3)
        monkeypatch.setattr(torch, "rand", lambda size, clock=clock, **kwargs: -torch.expm1(-clock))
        assert (resampling.gumbel_top_k(log_weights, 1, generator=torch.Generator()) == 1000).item() == last


@pytest.mark.parametrize("scheme", ALL)
def test_weights_of_every_scale(scheme, rng):
    for scale in (1e-300, 1.0, 1e300, 1.7e308):
        drawn = scheme(scale * vector(1, -1, 1, 0), 2, generator=rng)
        assert (drawn >= 0).all() and (drawn <= 3).all()
        if scale > 1:
            assert (drawn % 2 == 0).all()  # indices 0 and 2 hold all the weight


@pytest.mark.parametrize("dtype", [F64, *SMALL])
@pytest.mark.parametrize("scheme", ALL)
def test_a_batch_of_no_rows(scheme, dtype, rng):
    for shape in ((0, 5), (2, 0, 5), (0, 2, 5)):
        drawn = scheme(torch.zeros(shape, dtype=dtype), np.int64(3), generator=rng)
        assert drawn.shape == (*shape[:-1], 3) and drawn.dtype == torch.int64
    with pytest.raises(ValueError, match="n must be at most the number of indices with positive weight, 5, got 6"):
        resampling.gumbel_top_k(torch.zeros(0, 5), 6, generator=rng)


def test_rejection_of_any_shape(rng):
    for shape in ((), (0,), (3,), (0, 2), (2, 0), (2, 3)):
        kept = resampling.rejection(torch.zeros(shape), np.float32(1.0), np.float32(0.0), generator=rng)
        assert kept.shape == shape and kept.dtype == torch.bool and kept.all()


@pytest.mark.parametrize("dtype", [F64, *SMALL])
def test_rejection_at_every_scale(dtype, monkeypatch):
    rewards = vector(3, 2, 1, -math.inf).to(dtype)
    for beta in (5e-324, 1e-300, 1e-40, 1.0, 1e300):
        for u in (0.0, 0.3, 0.5, 1 - 2.0**-53):
            monkeypatch.setattr(torch, "rand", lambda size, u=u, **kwargs: torch.full(size, u, dtype=F64))
            kept = resampling.rejection(rewards, beta, 3.0, generator=torch.Generator())
            assert kept.tolist() == [u < math.exp((r - 3) / beta) for r in (3.0, 2.0, 1.0, -math.inf)]
    # exp(-2 * 1.7e308 / 1e308) = .0334
    for u, expected in ((0.033, [True, True]), (0.034, [True, False])):
        monkeypatch.setattr(torch, "rand", lambda size, u=u, **kwargs: torch.full(size, u, dtype=F64))
        kept = resampling.rejection(vector(1.7e308, -1.7e308), 1e308, 1.7e308, generator=torch.Generator())
        assert kept.tolist() == expected


def test_the_default_dtype_is_of_no_account(rng):
    log_weights, state = torch.randn(5, 9, generator=rng), rng.get_state()

    def everything():
        rng.set_state(state)
        return [scheme(log_weights, 4, generator=rng) for scheme in ALL]

    expected = everything()
    torch.set_default_dtype(torch.float16)
    try:
        got = everything()
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(map(torch.equal, expected, got))


# --- edges -----------------------------------------------------------------------------------------------------------


def drawings(log_weights, generator):
    return [scheme(log_weights, 4, generator=generator) for scheme in ALL] + [
        resampling.rejection(log_weights, 1.0, 0.5, generator=generator)
    ]


def test_uniforms_are_float64_and_come_from_the_generator_alone():
    # Float16 and float32 uniforms of one state agree to their last digits, float64 ones are others.
    log_weights, elsewhere = torch.randn(50, 9, generator=torch.Generator().manual_seed(1)), torch.get_rng_state()

    def results():
        return drawings(log_weights, torch.Generator().manual_seed(2))

    for default in (F64, torch.float16):
        assert_same_under_default_dtype(results, default)
    others = drawings(log_weights, torch.Generator().manual_seed(3))
    assert not any(map(torch.equal, results(), others))
    assert torch.equal(torch.get_rng_state(), elsewhere)


@pytest.mark.parametrize("n", [1, 2, 5, 1000])
@pytest.mark.parametrize("name", SCHEMES)
def test_the_smallest_uniform_takes_no_excluded_index(name, n, monkeypatch):
    monkeypatch.setattr(torch, "rand", lambda size, **kwargs: torch.zeros(size, dtype=F64))
    for log_weights in (
        vector(-math.inf, 0, 0),
        vector(-math.inf, -math.inf, 0.7, -math.inf, 0.2),
        vector(-math.inf, 0),
    ):
        ancestors = SCHEMES[name](log_weights, n, generator=torch.Generator())
        assert ancestors[0] == int((log_weights > -math.inf).nonzero().min())
        assert (log_weights[ancestors] > -math.inf).all()


@pytest.mark.parametrize("copies", [1, 1000, 10**5])
def test_residual_copies_a_whole_number_whatever_rounding_says(copies):
    # 49 copies * (1/49) rounds to just below 1 copy, by 1e-11 of a copy for 10^5: all copies are certain.
    ancestors = resampling.residual(torch.zeros(49), 49 * copies, generator=torch.Generator())
    assert torch.equal(ancestors, torch.arange(49).repeat_interleave(copies))
    # A share of a copy that is not rounding is drawn for: two of three places, 2/3 of a copy each.
    drawn = resampling.residual(torch.zeros(200, 3), 2, generator=torch.Generator().manual_seed(1))
    assert set(drawn.flatten().tolist()) == {0, 1, 2}


def test_residual_rows_with_and_without_places_left(rng):
    # Row 0 has 2 certain copies of each; row 1 has 3 of index 0 and one place left, for index 1 or 2.
    rows = torch.stack([vector(1, 1, 0), vector(0.75, 0.125, 0.125)]).log()
    drawn = resampling.residual(rows.repeat(100, 1), 4, generator=rng).view(100, 2, 4)
    assert torch.equal(drawn[:, 0], torch.tensor([0, 0, 1, 1]).expand(100, 4))
    assert torch.equal(drawn[:, 1, :3], torch.zeros(100, 3).long()) and set(drawn[:, 1, 3].tolist()) == {1, 2}


def test_top_k_needs_enough_in_every_row(rng):
    rows = torch.stack([vector(0, 1, 2), vector(0, -math.inf, -math.inf)])
    with pytest.raises(ValueError, match="n must be at most the number of indices with positive weight, 1, got 2"):
        resampling.gumbel_top_k(rows, 2, generator=rng)


@pytest.mark.parametrize("max_reward", [math.inf, -math.inf, math.nan])
def test_the_bound_of_rejection_is_finite(max_reward, rng):
    with pytest.raises(ValueError, match=f"max_reward must be finite, got {max_reward}"):
        resampling.rejection(vector(-1.0, -math.inf), 1.0, max_reward, generator=rng)


def test_rejection_takes_a_temperature_per_sample(monkeypatch):
    rewards, beta = vector(0, -1, -2)[:, None].expand(3, 2), vector(0.5, 2)
    for u in (0.1, 0.3, 0.5, 0.9):
        monkeypatch.setattr(torch, "rand", lambda size, u=u, **kwargs: torch.full(size, u, dtype=F64))
        both = resampling.rejection(rewards, beta, 0.0, generator=torch.Generator())
        each = [
            resampling.rejection(rewards[:, i], b, 0.0, generator=torch.Generator()) for i, b in enumerate((0.5, 2))
        ]
        assert torch.equal(both, torch.stack(each, -1))
    with pytest.raises(ValueError, match=r"^beta must broadcast .* got"):
        resampling.rejection(rewards[:, 0], beta, 0.0, generator=torch.Generator())
