import itertools
import math
import re

import numpy as np
import pytest
import torch
from helpers import (
    F64,
    S0,
    S0_REWARDS,
    assert_same_under_default_dtype,
    candidates,
    check_sampler,
    enumerated_best_law,
    enumerated_exponential_law,
    enumerated_joint_law,
    enumerated_soft_law,
    instances,
    law,
    random_law,
    relative_error,
    vector,
    without,
)
from hypothesis import given
from hypothesis import strategies as st

from tiltlib import selection, verify
from tiltlib.categorical import chi_square, kl, sample, tilt, total_variation
from tiltlib.selection import (
    best_of_n,
    best_of_n_law,
    exponential_best_of_n,
    exponential_best_of_n_law,
    exponential_best_of_n_stream,
    soft_best_of_n,
    soft_best_of_n_law,
    soft_best_of_n_stream,
)
from tiltlib.weights import beta_for_ess, log_mean, normalize

STREAMS = [soft_best_of_n_stream, exponential_best_of_n_stream]
TIED = law(0.5, 0.3, 0.2)
TIED_REWARDS = vector(0, 1, 1)
UNIFORM = law(1 / 3, 1 / 3, 1 / 3)


def close(a, b, tolerance=1e-12):
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


# --- the enumeration itself, against a walk over all sequences of candidates ----------------------------------------


def test_enumeration_agrees_with_all_sequences():
    r, n, beta = TIED_REWARDS, 3, 0.7
    best, first, soft = torch.zeros(3, dtype=F64), torch.zeros(3, dtype=F64), torch.zeros(3, dtype=F64)
    noisy, joint = torch.zeros(3, dtype=F64), torch.zeros(3, 3, dtype=F64)
    for drawn in itertools.product(range(3), repeat=n):
        chance = TIED[list(drawn)].sum().exp()
        rewards = r[list(drawn)]
        tied = [y for y in drawn if r[y] == rewards.max()]
        for y in tied:
            best[y] += chance / len(tied)
        first[tied[0]] += chance
        weight = torch.softmax(rewards / beta, 0)
        for y, w in zip(drawn, weight, strict=True):
            soft[y] += chance * w
            for y2, w2 in zip(drawn, weight, strict=True):
                joint[y, y2] += chance * w * w2
        for y, stop in zip(drawn, permute_and_flip(rewards / beta), strict=True):
            noisy[y] += chance * stop
    close(enumerated_best_law(TIED, r, n).exp(), best)
    close(first, best)  # the first maximal draw has the same law
    close(enumerated_soft_law(TIED, r, n, beta).exp(), soft)
    close(enumerated_joint_law(TIED, r, n, beta).exp(), joint)
    close(enumerated_exponential_law(TIED, r, n, beta).exp(), noisy)


def permute_and_flip(log_w, orders=None):
    """Run through a pool in a random order, stop at i with probability w_i / max w: where one stops."""
    stop = torch.zeros_like(log_w)
    orders = orders or list(itertools.permutations(range(len(log_w))))
    for order in orders:
        going_on = 1.0
        for i in order:
            here = (log_w[i] - log_w.max()).exp().item()
            stop[i] += going_on * here / len(orders)
            going_on *= 1 - here
    return stop


# --- rung b: exact laws ----------------------------------------------------------------------------------------------


def exact_instances():
    for k, n in [(1, 5), (2, 2), (2, 3), (2, 40), (3, 4), (3, 40), (4, 25), (6, 12)]:
        for spread in (0.0, 1.0, 8.0, 50.0):
            yield k, n, spread
    yield 6, 40, 50.0


@pytest.mark.parametrize(("k", "n", "spread"), list(exact_instances()))
@pytest.mark.slow
def test_laws_equal_their_enumeration(k, n, spread, rng):
    ref = random_law(k, rng, sharpness=6)
    rewards = spread * torch.rand(k, generator=rng, dtype=F64)
    if k > 2:
        rewards[1] = rewards[0]  # a tie
        rewards[-1], rewards[2] = spread, 0  # the full range
    assert relative_error(soft_best_of_n_law(ref, rewards, 1.0, n), enumerated_soft_law(ref, rewards, n, 1.0)) <= 1e-12
    assert relative_error(best_of_n_law(ref, rewards, n), enumerated_best_law(ref, rewards, n)) <= 1e-12
    noisy = exponential_best_of_n_law(ref, rewards, 1.0, n)
    assert relative_error(noisy, enumerated_exponential_law(ref, rewards, n, 1.0)) <= 1e-12


@pytest.mark.slow
@given(instances(max_k=4), st.integers(1, 9))
def test_laws_equal_their_enumeration_for_every_input(instance, n):
    ref, rewards, beta = instance
    assert (
        relative_error(soft_best_of_n_law(ref, rewards, beta, n), enumerated_soft_law(ref, rewards, n, beta)) <= 1e-12
    )
    assert relative_error(best_of_n_law(ref, rewards, n), enumerated_best_law(ref, rewards, n)) <= 1e-12
    noisy = exponential_best_of_n_law(ref, rewards, beta, n)
    assert relative_error(noisy, enumerated_exponential_law(ref, rewards, n, beta)) <= 1e-12


@pytest.mark.parametrize("n", [2, 7, 10**3, 10**6, 10**9, 10**12])
@pytest.mark.parametrize(("k", "spread"), [(3, 1.0), (64, 50.0), (4096, 300.0)])
def test_laws_sum_to_one(k, spread, n, rng):
    ref = random_law(k, rng, sharpness=10)
    rewards = spread * torch.rand(k, generator=rng, dtype=F64)
    for function in LAWS.values():
        # All at temperature 0.3, so `spread` is the range of rewards / beta.
        assert abs(math.fsum(function(ref, 0.3 * rewards, n).exp().tolist()) - 1) <= 1e-13


@pytest.mark.parametrize(
    ("rare", "n"), [(1e-13, 2), (1e-9, 40), (1e-3, 40), (1e-6, 10**6), (1e-10, 10**9), (1e-13, 10**12)]
)
def test_best_of_n_law_keeps_its_digits(rare, n):
    # p = (.3, .7 - rare, rare), rewards 0, 1, 2. The top outcome has 1 - (1 - rare)^N; the others share the rest:
    # (1 - rare)^N - .3^N and .3^N, written with log1p(-rare) so that the expected value has all its digits.
    ref = torch.log_softmax(torch.cat([law(0.3, 0.7 - rare), vector(rare).log()]), -1)
    none = n * math.log1p(-ref[2].exp().item())
    low = n * ref[0].item()
    expected = vector(low, none + math.log(-math.expm1(low - none)), math.log(-math.expm1(none)))
    logps = best_of_n_law(ref, S0_REWARDS, n)
    assert (logps - expected)[1:].abs().max().item() <= 1e-12
    assert (logps - expected)[0].abs().item() <= 1e-15 * abs(low) + 1e-12


@pytest.mark.parametrize("spread", [i / 4 for i in range(20)])
def test_soft_law_integrates_far_enough(spread):
    # A likely outcome of low weight is the last to be settled as s grows; its integral must not end too early.
    ref, rewards = law(0.99, 0.01), vector(0, spread)
    assert relative_error(soft_best_of_n_law(ref, rewards, 1.0, 2), enumerated_soft_law(ref, rewards, 2, 1.0)) <= 1e-14


@pytest.mark.parametrize("n", [2, 3, 5])
@pytest.mark.parametrize("spread", [5, 10, 20])
def test_soft_law_keeps_the_draws_that_are_all_rare(spread, n):
    # With probability 1e-6^N all candidates are the rare outcome, which is then kept, however small its weight.
    ref, rewards = law(1 - 1e-6, 1e-6), vector(spread, 0)
    assert relative_error(soft_best_of_n_law(ref, rewards, 1.0, n), enumerated_soft_law(ref, rewards, n, 1.0)) <= 1e-13


def test_laws_of_an_outcome_too_rare_for_float64():
    # p = e^-800: N p w / (sum of w) = 5 e^-800 e / (e + 4) for the soft choice, p N F^(N-1) with F = 1 for the best.
    ref = vector(0, -800)
    close(best_of_n_law(ref, vector(0, 1), 5)[1].item(), -800 + math.log(5))
    close(best_of_n_law(ref, vector(1, 0), 5)[1].item(), -4000.0, 1e-9)
    between = vector(math.log(0.5), -800, math.log(0.5))  # the limit N p F^(N-1) where F is a half
    close(best_of_n_law(between, S0_REWARDS, 5)[1].item(), -800 + math.log(5) + 4 * math.log(0.5))
    close(soft_best_of_n_law(ref, vector(0, 1), 1.0, 5)[1].item(), -800 + math.log(5 * math.e / (math.e + 4)))


def test_soft_law_at_large_n_follows_its_expansion():
    # P_N / pi* = 1 + a/N + b/N^2 + O(N^-3), x = w/Z - 1, CV2 = E x^2, m3 = E x^3, a = CV2 - x,
    # b = x^2 - CV2 - 3 x CV2 - m3 + 3 CV2^2: at N = 1e6 the remainder is far below rounding.
    p, target = S0.exp(), tilt(S0, S0_REWARDS, 1.0)
    x = (target - S0).exp() - 1
    cv2, m3 = (p * x**2).sum(), (p * x**3).sum()
    a = cv2 - x
    b = x**2 - cv2 - 3 * x * cv2 - m3 + 3 * cv2**2
    close(a, vector(1.389689, 0.774544, -0.897593), 5e-7)
    close(b, vector(2.023211, 0.231956, -0.812528), 5e-7)
    for n in (10**5, 10**7, 10**9, 10**12):
        expected = target + torch.log1p(a / n + b / float(n) ** 2)
        assert relative_error(soft_best_of_n_law(S0, S0_REWARDS, 1.0, n), expected) <= 1e-13


def test_laws_on_the_instances_of_the_book():
    close(soft_best_of_n_law(S0, S0_REWARDS, 1.0, 4).exp(), vector(0.261558, 0.337851, 0.400590), 1e-6)
    close(soft_best_of_n_law(S0, S0_REWARDS, 1.0, 2).exp(), vector(0.354523, 0.341591, 0.303886), 1e-6)
    target, soft_law = tilt(S0, S0_REWARDS, 1.0), soft_best_of_n_law(S0, S0_REWARDS, 1.0, 4)
    distances = torch.stack([kl(target, soft_law), kl(soft_law, target), total_variation(soft_law, target)])
    close(distances, vector(0.036633, 0.037117, 0.128466), 1e-6)
    close(best_of_n_law(TIED, TIED_REWARDS, 3).exp(), vector(0.125, 0.525, 0.35))
    # Near misses, so that nobody mistakes them for the law: ties over distinct outcomes, ties to the lowest index.
    close(enumerated_best_law(TIED, TIED_REWARDS, 3, "distinct").exp(), vector(0.125, 0.522, 0.353))
    close(enumerated_best_law(TIED, TIED_REWARDS, 3, "lowest").exp(), vector(0.125, 0.657, 0.218))
    # N = 2 cannot tell the uniform choice over distinct outcomes apart.
    close(enumerated_best_law(TIED, TIED_REWARDS, 2, "distinct"), best_of_n_law(TIED, TIED_REWARDS, 2))
    # KL(BoN || p) for p = (.9, .1), N = 10
    assert kl(best_of_n_law(law(0.9, 0.1), vector(0, 1), 10), law(0.9, 0.1)).item() == pytest.approx(0.889836, abs=5e-7)


def test_exponential_law_on_the_instance_of_the_book():
    target = tilt(S0, S0_REWARDS, 1.0)
    four = exponential_best_of_n_law(S0, S0_REWARDS, 1.0, 4)
    close(four.exp(), vector(0.215279, 0.334838, 0.449884), 1e-6)
    close(exponential_best_of_n_law(S0, S0_REWARDS, 0.5, 4).exp(), vector(0.111864, 0.341058, 0.547077), 1e-6)
    assert kl(four, S0).item() == pytest.approx(0.220085, abs=5e-7)
    distances = [
        total_variation(exponential_best_of_n_law(S0, S0_REWARDS, 1.0, n), target).item() for n in (2, 4, 8, 16)
    ]
    assert distances == pytest.approx([0.204663, 0.079173, 0.011848, 0.000265], abs=5e-7)
    # One outcome alone has w / Z > 1, so the bound by E (1 - Z/w)_+^N is attained.
    lost = (1 - (S0 - target).exp()).clamp(min=0)
    assert distances == pytest.approx([(target.exp() @ lost**n).item() for n in (2, 4, 8, 16)], rel=1e-12)
    none = 1 - (S0 - target).exp()[2].item()  # probability that a candidate is refused by rejection
    assert none**4 == pytest.approx(0.149649, abs=5e-7)


@pytest.mark.parametrize(
    ("m", "tv", "exponential", "soft", "any_rule"),
    [(10, 0.1, 15, 24, 10), (10, 0.01, 70, 305, 35), (10, 0.001, 167, 3157, 44), (20, 0.001, 2500, 29267, 946)],
)
def test_candidates_needed_for_strings(m, tv, exponential, soft, any_rule):
    """Strings of m fair bits, rewarded by their sum: the least N for a total variation from the tilt."""
    ones = torch.arange(m + 1, dtype=F64)
    ref = torch.log_softmax(torch.tensor([math.log(math.comb(m, k)) for k in range(m + 1)], dtype=F64), -1)
    target = tilt(ref, ones, 1.0)
    distances = {
        exponential: lambda n: total_variation(exponential_best_of_n_law(ref, ones, 1.0, n), target),
        soft: lambda n: total_variation(soft_best_of_n_law(ref, ones, 1.0, n), target),
        any_rule: lambda n: target.exp() @ (1 - n * (ref - target).exp()).clamp(min=0),
    }
    for least, distance in distances.items():
        assert distance(least) <= tv < distance(least - 1)


def test_exponential_law_at_any_range_and_rarity():
    # Two outcomes; the better one has weight 1, so u = 1 - (a w + b) v up to v = 1 and a (1 - w v) from there.
    def expected(low, log_w, n):
        """log-probability of the worse outcome, p = (a, 1 - a), a = e^low."""
        z = math.exp(low + log_w) - math.expm1(low)
        start = -math.expm1(n * math.log1p(-z)) / z if z < 1 else 1.0
        # N a w int_1^{1/w} (a (1 - w v))^(N-1) dv = (a (1 - w))^N
        first, rest = low + log_w + math.log(start), n * (low + math.log(-math.expm1(log_w)))
        return max(first, rest) + math.log1p(math.exp(-abs(first - rest)))

    for low, log_w, n in itertools.product((-800, -30, -1, -0.01), (-1e-9, -1, -50, -700, -1e5, -1e300), (1, 2, 5, 40)):
        ref = vector(low, math.log(-math.expm1(low)))
        got = exponential_best_of_n_law(ref, vector(log_w, 0), 1.0, n)[0].item()
        assert got == pytest.approx(expected(low, log_w, n), rel=1e-14, abs=1e-13), (low, log_w, n)
    # A rare best: N p w int_0^{1/w} (1 - w_0 v)^(N-1) dv, w_0 = w / e.
    got = exponential_best_of_n_law(vector(0, -800), vector(0, 1), 1.0, 5)[1].item()
    close(got, -800 + 1 + math.log(1 - (1 - math.exp(-1)) ** 5))


@pytest.mark.parametrize(
    ("rare", "n"), [(1e-18, 4), (1e-13, 2), (1e-9, 40), (1e-3, 40), (1e-6, 10**6), (1e-10, 10**9), (1e-13, 10**12)]
)
def test_exponential_law_keeps_a_rare_best(rare, n):
    # Far above the others it is kept whenever it was drawn. If not, the rest follows the law without it.
    ref = torch.log_softmax(torch.cat([law(0.3, 0.7 - rare), vector(rare).log()]), -1)
    logps = exponential_best_of_n_law(ref, vector(0, 1, 300), 1.0, n)
    assert logps[2].item() == pytest.approx(math.log(-math.expm1(n * math.log1p(-rare))), rel=1e-14)
    rest = torch.log_softmax(ref[:2], -1)
    if n <= 40:
        expected = enumerated_exponential_law(rest, vector(0, 1), n, 1.0)
    else:  # what is left of the distance to the tilt is below .2^N
        expected = tilt(rest, vector(0, 1), 1.0)
    close(logps[:2], expected + n * math.log1p(-rare), 1e-12)


# --- rung a: limits without noise ------------------------------------------------------------------------------------


@given(instances())
def test_one_candidate_is_the_reference(instance):
    ref, rewards, beta = instance
    for out in (
        soft_best_of_n_law(ref, rewards, beta, 1),
        exponential_best_of_n_law(ref, rewards, beta, 1),
        best_of_n_law(ref, rewards, 1),
    ):
        close(out, ref)


@pytest.mark.parametrize("n", [2, 5, 10**6])
def test_limits_of_the_laws(n):
    for function in (soft_best_of_n_law, exponential_best_of_n_law):
        close(function(S0, S0_REWARDS, 1e300, n), S0)  # beta to infinity: no selection
        close(function(S0, vector(3, 3, 3), 1e-9, n), S0)  # equal rewards
        close(function(law(1), vector(-3), 0.1, n), law(1))  # one-point support
    close(best_of_n_law(S0, vector(3, 3, 3), n), S0)
    close(best_of_n_law(law(1), vector(-3), n), law(1))
    unsupported = law(0.5, 0.3, 0.2, 0)  # an outcome of probability 0 stays there, whatever its reward
    for reward in (-9.0, 0.5, 1.0, 99.0, -math.inf):
        rewards = torch.cat([S0_REWARDS, vector(reward)])
        for function in LAWS.values():
            close(function(unsupported, rewards, n)[:3], function(S0, S0_REWARDS, n))
            assert function(unsupported, rewards, n)[3].item() == -math.inf


def test_soft_law_tends_to_the_best_of_n_law():
    # beta to 0 at fixed N; a soft choice of weight ratio e^-1/beta differs from the greedy one by as little.
    close(soft_best_of_n_law(S0, S0_REWARDS, 1 / 299, 4).exp(), best_of_n_law(S0, S0_REWARDS, 4).exp())
    close(soft_best_of_n_law(TIED, TIED_REWARDS, 1 / 500, 3).exp(), best_of_n_law(TIED, TIED_REWARDS, 3).exp())


@given(instances(), st.integers(1, 10**6))
@pytest.mark.slow
def test_exponential_law_tends_to_the_best_of_n_law(instance, n):
    ref, rewards, _ = instance
    for beta in (5e-324, 1e-300, 1e-20):
        cold = exponential_best_of_n_law(ref, rewards, beta, n)
        gap = rewards.unique().diff().min().item() / beta if len(rewards.unique()) > 1 else math.inf
        if gap > 10**4:  # a weight ratio of e^-gap, times N at most
            hard = best_of_n_law(ref, rewards, n)
            on = ref > -math.inf
            # Both are N times a logarithm, which is rounded: a hundred roundings of the product are left for that.
            assert ((cold - hard)[on].abs() <= 100 * 2.0**-53 * (n + hard[on].abs())).all()


def test_best_of_n_law_for_unbounded_n_is_the_reference_on_the_maximum():
    close(best_of_n_law(TIED, TIED_REWARDS, 10**12).exp(), vector(0, 0.6, 0.4))


# --- laws that hold for every input ----------------------------------------------------------------------------------

sizes = st.one_of(st.integers(2, 40), st.integers(41, 10**12))


@given(instances(), sizes)
def test_soft_law_is_near_the_tilt(instance, n):
    ref, rewards, beta = instance
    logps, target = soft_best_of_n_law(ref, rewards, beta, n), tilt(ref, rewards, beta)
    on = ref > -math.inf
    assert logps.exp().sum().item() == pytest.approx(1, abs=1e-13)
    ratio = (target - ref)[on].exp()  # w / Z
    # Pointwise P_N / pi* >= N / (N - 1 + w/Z), and what follows from it.
    assert bool(((logps - target)[on] >= -torch.log1p((ratio - 1) / n) - 1e-12).all())
    cv2 = chi_square(target, ref).item()
    assert kl(target, logps).item() <= math.log1p(cv2 / n) + 1e-12
    assert total_variation(logps, target).item() <= (cv2 + 0.25) / n + 1e-12


@given(instances(), sizes)
def test_exponential_law_for_every_input(instance, n):
    """It lies between soft best-of-N and the tilt, in the order of w, and so does every divergence from the tilt."""
    ref, rewards, beta = instance
    target, logps = tilt(ref, rewards, beta), exponential_best_of_n_law(ref, rewards, beta, n)
    assert logps.exp().sum().item() == pytest.approx(1, abs=1e-13)
    on = ref > -math.inf
    soft_law, more = soft_best_of_n_law(ref, rewards, beta, n), exponential_best_of_n_law(ref, rewards, beta, n + 1)
    order = rewards[on].argsort()
    ref, target, logps, soft_law, more = (x[on][order] for x in (ref, target, logps, soft_law, more))
    at_most = torch.stack([x.exp().cumsum(-1) for x in (ref, soft_law, logps, more, target)])
    assert bool((at_most.diff(dim=0) <= 1e-12).all())
    assert bool(((logps - ref).diff() >= -1e-12).all()) and bool(((logps - target).diff() <= 1e-12).all())
    # X_N / pi* is at least 1 - (1 - 1/w)^N for w = w / Z, and 1 - u0^N, u0 = P(one candidate is refused by rejection).
    ratio = (target - ref).exp()
    lost, none = (1 - 1 / ratio).clamp(min=0) ** float(n), (1 - 1 / ratio.max()) ** float(n)
    assert bool((torch.expm1(logps - target) >= -lost - 1e-12).all())
    assert bool((lost <= none + 1e-12).all())
    assert total_variation(logps, target).item() <= (target.exp() @ lost).item() + 1e-12
    assert kl(target, logps).item() <= -math.log1p(-none) + 1e-12 if none < 1 else True
    for divergence in DIVERGENCES.values():
        near, nearer, far = (divergence(x, target) for x in (logps, more, soft_law))
        assert nearer <= near + 1e-12 and near <= far * (1 + 1e-9) + 1e-12


DIVERGENCES = {
    "total variation": lambda q, target: total_variation(q, target).item(),
    "KL": lambda q, target: kl(q, target).item(),
    "KL backward": lambda q, target: kl(target, q).item(),
    "chi-square": lambda q, target: chi_square(q, target).item(),
    "chi-square backward": lambda q, target: chi_square(target, q).item(),
}


@given(instances(), st.integers(1, 60))
def test_soft_law_is_monotone(instance, n):
    """Divergences from the tilt fall in N; those from the reference rise in N and 1 / beta, up to those of others."""
    ref, rewards, beta = instance
    target, best = tilt(ref, rewards, beta), best_of_n_law(ref, rewards, n)
    now, more = (soft_best_of_n_law(ref, rewards, beta, m) for m in (n, n + 1))
    colder = soft_best_of_n_law(ref, rewards, 0.8 * beta, n)
    order = rewards.argsort()
    for low, high in ((ref, now), (now, more), (now, target), (now, best), (now, colder)):
        assert bool((high[order].exp().cumsum(-1) <= low[order].exp().cumsum(-1) + 1e-12).all())
    for divergence in DIVERGENCES.values():
        assert divergence(more, target) <= divergence(now, target) * (1 + 1e-9) + 1e-12
        for further in (more, colder, best, target):
            assert divergence(now, ref) <= divergence(further, ref) * (1 + 1e-9) + 1e-12


def test_soft_law_is_monotone_only_toward_its_own_target():
    law_of = {n: soft_best_of_n_law(S0, S0_REWARDS, 1.0, n) for n in (1, 2, 3, 4, 8)}
    other = [total_variation(q, tilt(S0, S0_REWARDS, 2.0)).item() for q in law_of.values()]
    assert other == pytest.approx([0.174960, 0.049534, 0.031732, 0.063482, 0.111175], abs=5e-7)
    middle = [q[1].exp().item() for q in law_of.values()]
    assert middle == pytest.approx([0.3, 0.341591, 0.343186, 0.337852, 0.319435], abs=5e-7)
    for n, soft_kl, best_kl in ((2, 0.049578, 0.140638), (4, 0.148927, 0.559751), (16, 0.276644, 1.469645)):
        assert kl(soft_best_of_n_law(S0, S0_REWARDS, 1.0, n), S0).item() == pytest.approx(soft_kl, abs=5e-7)
        assert kl(best_of_n_law(S0, S0_REWARDS, n), S0).item() == pytest.approx(best_kl, abs=5e-7)


@given(instances(), sizes)
def test_best_of_n_law_for_every_input(instance, n):
    ref, rewards, _ = instance
    logps = best_of_n_law(ref, rewards, n)
    assert logps.exp().sum().item() == pytest.approx(1, abs=1e-13)
    # Selection prefers what is better: P / p grows with the reward, and grows in the top level with N.
    gain = (logps - ref)[ref > -math.inf]
    order = rewards[ref > -math.inf].argsort()
    assert bool((gain[order].diff() >= -1e-12).all())
    assert kl(logps, ref).item() <= math.log(n) - (n - 1) / n + 1e-12


@given(instances(), st.integers(1, 60), st.floats(-9, 9), st.floats(0.1, 10))
def test_laws_ignore_the_zero_and_the_unit_of_the_reward(instance, n, shift, scale):
    ref, rewards, beta = instance
    for function in (soft_best_of_n_law, exponential_best_of_n_law):
        close(function(ref, rewards * scale, beta * scale, n), function(ref, rewards, beta, n), 1e-11)
        close(function(ref, rewards + shift, beta, n), function(ref, rewards, beta, n), 1e-11)
    squeezed = rewards.unique(return_inverse=True)[1].double() ** 3  # another increasing function of the reward
    close(best_of_n_law(ref, squeezed, n), best_of_n_law(ref, rewards, n), 1e-12)


LAWS = {
    "soft": lambda p, r, n: soft_best_of_n_law(p, r, 0.3, n),
    "exponential": lambda p, r, n: exponential_best_of_n_law(p, r, 0.3, n),
    "best": best_of_n_law,
}


@pytest.mark.parametrize("n", [1, 7, 10**6])
@pytest.mark.parametrize("name", LAWS)
def test_batch_dtype_permutation_and_inputs(name, n, rng):
    function = LAWS[name]
    p = torch.log_softmax(torch.rand(3, 1, 5, generator=rng, dtype=F64), -1)
    r = torch.randint(4, (2, 5), generator=rng).double()
    before = p.clone(), r.clone()
    out = function(p, r, n)
    close(out, torch.stack([torch.stack([function(p[i, 0], r[j], n) for j in range(2)]) for i in range(3)]), 1e-13)
    assert torch.equal(p, before[0]) and torch.equal(r, before[1])
    order = torch.randperm(5, generator=rng)
    close(function(p[..., order], r[..., order], n), out[..., order], 1e-13)
    # float32 in, float32 out, but computed in float64: the same as from the same numbers in float64, rounded once.
    small = function(p.float(), r.float(), n)
    assert small.dtype == torch.float32
    exact = function(torch.log_softmax(p.float().double(), -1), r, n)
    torch.testing.assert_close(small.double(), exact, rtol=2**-23, atol=2**-23)


# --- rungs c and d: draws --------------------------------------------------------------------------------------------


def pooled(pick, ref, rewards, n):
    """Outcomes kept by a selection rule over fresh pools of n candidates, one per pool."""

    def draw(rows, generator):
        pool = candidates(ref, rows, n, generator)
        return pool.gather(1, pick(rewards[pool], generator)[:, None]).squeeze(1)

    return draw


def soft(beta):
    return lambda rewards, generator: soft_best_of_n(rewards, beta, generator=generator)


def best(rewards, generator):
    return best_of_n(rewards, generator=generator)


def lowest_index(ref, rewards, n):
    def draw(rows, generator):
        pool = candidates(ref, rows, n, generator)
        top = rewards[pool].amax(1, keepdim=True)
        return torch.where(rewards[pool] == top, pool, len(ref)).amin(1)

    return draw


def uniform_over_distinct(ref, rewards, n):
    def draw(rows, generator):
        pool = candidates(ref, rows, n, generator)
        tied = rewards[pool] == rewards[pool].amax(1, keepdim=True)
        present = torch.stack([(tied & (pool == y)).any(1) for y in range(len(ref))], 1)
        return best_of_n(present.double(), generator=generator)

    return draw


def emits_less(logps, outcome):
    bad = without(logps, outcome)
    return lambda n, generator: sample(bad, n, generator=generator), bad


def test_best_of_n_follows_its_law(rng):
    # A rare outcome tied with a frequent one shows how ties are broken.
    ref, rewards, n = law(0.2, 0.7, 0.1), vector(0, 1, 1), 4
    target = best_of_n_law(ref, rewards, n)
    wrong = {
        "N-1": (pooled(best, ref, rewards, n - 1), enumerated_best_law(ref, rewards, n - 1)),
        "reference-dropped": (pooled(best, UNIFORM, rewards, n), enumerated_best_law(UNIFORM, rewards, n)),
        "lowest-index": (lowest_index(ref, rewards, n), enumerated_best_law(ref, rewards, n, "lowest")),
        "distinct-ties": (
            uniform_over_distinct(ref, rewards, n),
            enumerated_best_law(ref, rewards, n, "distinct"),
        ),
        "outcome-missing": emits_less(target, 0),
    }
    check_sampler(pooled(best, ref, rewards, n), target, wrong, rng)


def bad_soft_samplers(n, beta):
    target = soft_best_of_n_law(S0, S0_REWARDS, beta, n)
    return target, {
        "beta*1.05": (
            pooled(soft(beta * 1.05), S0, S0_REWARDS, n),
            enumerated_soft_law(S0, S0_REWARDS, n, beta * 1.05),
        ),
        "N-1": (pooled(soft(beta), S0, S0_REWARDS, n - 1), enumerated_soft_law(S0, S0_REWARDS, n - 1, beta)),
        "reference-dropped": (
            pooled(soft(beta), UNIFORM, S0_REWARDS, n),
            enumerated_soft_law(UNIFORM, S0_REWARDS, n, beta),
        ),
        "outcome-missing": emits_less(target, 0),
    }


def test_soft_best_of_n_follows_its_law(rng):
    check_sampler(pooled(soft(0.7), S0, S0_REWARDS, 4), *bad_soft_samplers(4, 0.7), rng)


def test_soft_best_of_n_draw_follows_its_law(rng):
    def draw(n, generator):
        return selection.soft_best_of_n_draw(S0.expand(n, 3), S0_REWARDS, 0.7, 4, generator=generator)

    check_sampler(draw, *bad_soft_samplers(4, 0.7), rng)


@pytest.mark.parametrize("n", [1, 1000, 10**12])
def test_soft_best_of_n_draw_for_any_n(n, rng):
    target = soft_best_of_n_law(S0, S0_REWARDS, 1.0, n)
    wrong = tilt(target, S0_REWARDS, 10.0)
    rows = verify.plan(target, wrong)
    drawn = selection.soft_best_of_n_draw(S0.expand(rows, 3), S0_REWARDS, 1.0, n, generator=rng)
    assert verify.match(drawn, target, claim="sampler", versus=[wrong])


def in_chunks(chunks, excluded, rows, generator):
    """Candidates and their rewards; if asked for, every other chunk is followed by one that is excluded as a whole."""
    for i, c in enumerate(chunks):
        pool = candidates(S0, rows, c, generator)
        yield pool, S0_REWARDS[pool]
        if excluded and i % 2 == 0:
            yield pool, torch.full(pool.shape, -math.inf, dtype=F64)


@pytest.mark.parametrize("chunks", [[1, 1, 1, 1], [3, 1], [1, 2, 1], [4]])
@pytest.mark.parametrize("excluded", [False, True])
@pytest.mark.slow
def test_stream_follows_the_law_whatever_the_chunks(chunks, excluded, rng):
    """Streaming is soft best-of-N; chunks that are excluded as a whole, at any place, change nothing."""

    def draw(rows, generator):
        pieces = in_chunks(chunks, excluded, rows, generator)
        return soft_best_of_n_stream(pieces, 0.7, generator=generator).winner

    check_sampler(draw, *bad_soft_samplers(4, 0.7), rng)


def noisy(beta):
    return lambda rewards, generator: exponential_best_of_n(rewards, beta, generator=generator)


def one_noise_per_answer(beta, n):
    def draw(rows, generator):
        pool = candidates(S0, rows, n, generator)
        e = -torch.log1p(-torch.rand(rows, 3, generator=generator, dtype=F64))
        return pool.gather(1, (S0_REWARDS[pool] + beta * e.gather(1, pool)).argmax(1)[:, None]).squeeze(1)

    return draw, enumerated_exponential_law(S0, S0_REWARDS, n, beta, "outcome")


def run_through(beta, n, *, top="pool", ascending=False):
    """Go through the pool, stop at i with probability w_i / w_top, else at the last: a sampler, and its law."""
    log_w = S0_REWARDS / beta
    law_of = torch.zeros(3, dtype=F64)
    for drawn in itertools.product(range(3), repeat=n):
        going_on, chance = 1.0, S0[list(drawn)].sum().exp()
        passed = sorted(drawn) if ascending else drawn
        best_of_pool = log_w[list(drawn)].max() if top == "pool" else log_w.max()
        for y in passed:
            here = (log_w[y] - best_of_pool).exp().item()
            law_of[y] += chance * going_on * here
            going_on *= 1 - here
        law_of[passed[-1]] += chance * going_on

    def draw(rows, generator):
        pool = candidates(S0, rows, n, generator)
        pool = pool.sort(1).values if ascending else pool
        best_of_pool = log_w[pool].amax(1, keepdim=True) if top == "pool" else log_w.max()
        stops = torch.rand(rows, n, generator=generator, dtype=F64) < (log_w[pool] - best_of_pool).exp()
        place = torch.where(stops.any(1), stops.long().argmax(1), n - 1)
        return pool.gather(1, place[:, None]).squeeze(1)

    return draw, law_of.log()


def exponential_near_misses(n, beta):
    """What is near the rule, with the laws of each: at beta = 1 the noise scale cannot be told from its inverse."""
    found = {
        "soft": (pooled(soft(beta), S0, S0_REWARDS, n), enumerated_soft_law(S0, S0_REWARDS, n, beta)),
        "N-1": (pooled(noisy(beta), S0, S0_REWARDS, n - 1), enumerated_exponential_law(S0, S0_REWARDS, n - 1, beta)),
        "beta*1.05": (
            pooled(noisy(1.05 * beta), S0, S0_REWARDS, n),
            enumerated_exponential_law(S0, S0_REWARDS, n, 1.05 * beta),
        ),
        "one-noise-per-answer": one_noise_per_answer(beta, n),
        "known-maximum": run_through(beta, n, top="known"),
        "ascending": run_through(beta, n, ascending=True),
        "reference-dropped": (
            pooled(noisy(beta), UNIFORM, S0_REWARDS, n),
            enumerated_exponential_law(UNIFORM, S0_REWARDS, n, beta),
        ),
        "outcome-missing": emits_less(exponential_best_of_n_law(S0, S0_REWARDS, beta, n), 0),
    }
    if beta != 1:
        found["1/beta"] = (
            pooled(noisy(1 / beta), S0, S0_REWARDS, n),
            enumerated_exponential_law(S0, S0_REWARDS, n, 1 / beta),
        )
    return found


def test_near_misses_of_exponential_noise():
    at_one, at_half = (exponential_near_misses(4, beta) for beta in (1.0, 0.5))
    for (table, name), expected in {
        (True, "soft"): vector(0.261558, 0.337852, 0.400590),
        (True, "one-noise-per-answer"): vector(0.158138, 0.357688, 0.484174),
        (True, "known-maximum"): vector(0.256234, 0.293882, 0.449884),
        (True, "ascending"): vector(0.397980, 0.295190, 0.306830),
        (False, "soft"): vector(0.138396, 0.342577, 0.519027),
        (False, "1/beta"): vector(0.332094, 0.327036, 0.340870),
    }.items():
        close((at_one if table else at_half)[name][1].exp(), expected, 2e-6)
    # One noise per distinct answer cannot be told apart by pools of two.
    close(one_noise_per_answer(1.0, 2)[1], exponential_best_of_n_law(S0, S0_REWARDS, 1.0, 2))
    # In draw order, with the maximum of the pool, it is the rule itself.
    close(run_through(1.0, 4)[1], exponential_best_of_n_law(S0, S0_REWARDS, 1.0, 4))


@pytest.mark.parametrize("beta", [0.5, 1.0])
@pytest.mark.slow
def test_exponential_best_of_n_follows_its_law(beta, rng):
    target = exponential_best_of_n_law(S0, S0_REWARDS, beta, 4)
    check_sampler(pooled(noisy(beta), S0, S0_REWARDS, 4), target, exponential_near_misses(4, beta), rng)


@pytest.mark.parametrize("chunks", [[1, 1, 1, 1], [3, 1], [4]])
@pytest.mark.parametrize("excluded", [False, True])
def test_exponential_stream_follows_the_law_whatever_the_chunks(chunks, excluded, rng):
    def draw(rows, generator):
        pieces = in_chunks(chunks, excluded, rows, generator)
        return exponential_best_of_n_stream(pieces, 0.5, generator=generator).winner

    near = exponential_near_misses(4, 0.5)
    wrong = {name: near[name] for name in ("soft", "N-1", "1/beta", "outcome-missing")}
    check_sampler(draw, exponential_best_of_n_law(S0, S0_REWARDS, 0.5, 4), wrong, rng)


def test_two_choices_from_one_pool_are_dependent(rng):
    # The pitfall of a shared pool: the pair follows the joint law, not the product of its margins.
    n = 4
    joint = enumerated_joint_law(S0, S0_REWARDS, n, 1.0)
    assert joint.diagonal().exp().sum().item() == pytest.approx(0.602324, abs=5e-7)
    margin = soft_best_of_n_law(S0, S0_REWARDS, 1.0, n)
    close(joint.logsumexp(1), margin)
    independent = (margin[:, None] + margin).flatten()

    def draw(rows, generator):
        pool = candidates(S0, rows, n, generator)
        first, second = (
            pool.gather(1, soft_best_of_n(S0_REWARDS[pool], 1.0, generator=generator)[:, None]) for _ in range(2)
        )
        return 3 * first + second

    def fresh(rows, generator):
        pick = pooled(soft(1.0), S0, S0_REWARDS, n)
        return 3 * pick(rows, generator) + pick(rows, generator)

    check_sampler(draw, joint.flatten(), {"independent": (fresh, independent)}, rng)


# --- what a draw computes, without noise -----------------------------------------------------------------------------


def test_draw_limits(rng):
    rewards = vector(0, 3, -math.inf, 3, 1).expand(500, 5)
    greedy = (
        best_of_n(rewards, generator=rng),
        soft_best_of_n(rewards, 1e-300, generator=rng),
        exponential_best_of_n(rewards, 1e-300, generator=rng),
    )
    for drawn in greedy:
        assert drawn.unique().tolist() == [1, 3]  # both maximal candidates, missed with probability 2^-499
    for rule in (soft_best_of_n, exponential_best_of_n):
        assert rule(rewards, 1e300, generator=rng).unique().tolist() == [0, 1, 3, 4]  # never the excluded one
        assert rule(vector(-7), 1.0, generator=rng).item() == 0
    assert best_of_n(vector(-7), generator=rng).item() == 0


def queued(monkeypatch, u):
    """Let uniforms come from a list, in order."""
    queue = iter(u.tolist())

    def rand(*size, **kwargs):
        shape = torch.Size(size[0] if isinstance(size[0], torch.Size) else size)
        return vector(*(next(queue) for _ in range(shape.numel()))).view(shape)

    monkeypatch.setattr(torch, "rand", rand)


@pytest.mark.parametrize("beta", [0.25, 3.0])
def test_exponential_noise_decides_at_the_difference_of_rewards(beta, monkeypatch):
    # r + beta E with E = -log(1 - u): the worse candidate wins once beta (E - E') exceeds what it lacks.
    lacking = 1.75
    for excess in (-1e-9, 1e-9):
        noise = vector(0.3 + (lacking + excess) / beta, 0.3)
        queued(monkeypatch, -torch.expm1(-noise).repeat(2))
        rewards = vector(5, 5 + lacking)
        assert exponential_best_of_n(rewards, beta, generator=G).item() == (excess < 0)
        chunks = [(torch.tensor([i]), rewards[i : i + 1]) for i in range(2)]
        assert exponential_best_of_n_stream(chunks, beta, generator=G).winner.item() == (excess < 0)


def test_exponential_noise_at_the_edges(monkeypatch):
    # A uniform number of 0 is no noise; the largest one is finite noise, which brings no excluded candidate back.
    rewards = vector(-math.inf, 0, 1, -math.inf)
    for u in (0.0, 1 - 2**-53):
        queued(monkeypatch, vector(*[u] * 8))
        assert exponential_best_of_n(rewards, 1.0, generator=G).item() == 2
        assert exponential_best_of_n_stream([(torch.arange(4), rewards)], 1.0, generator=G).winner.item() == 2
    queued(monkeypatch, vector(1 - 2**-53, 0, 0, 0.9))
    assert exponential_best_of_n(rewards, 1.0, generator=G).item() == 2


@pytest.mark.parametrize("chunk", [1, 3, 7])
def test_exponential_stream_is_one_choice_among_all(chunk, monkeypatch, rng):
    """With the same noise it keeps what the plain form keeps, however large the rewards and wherever chunks end."""
    for shift, beta in itertools.product((-1e6, 0, 1e6), (0.5, 1e-3)):
        rewards = shift + 3 * torch.randn(20, 7, generator=rng, dtype=F64)
        rewards[0, :4] = -math.inf
        u = torch.rand(20, 7, generator=rng, dtype=F64)
        queued(monkeypatch, torch.cat([part.flatten() for part in u.split(chunk, -1)]))
        numbers = torch.arange(7).expand(20, 7)
        pieces = zip(numbers.split(chunk, -1), rewards.split(chunk, -1), strict=True)
        out = exponential_best_of_n_stream(pieces, beta, generator=G)
        queued(monkeypatch, u.flatten())
        assert torch.equal(out.winner, exponential_best_of_n(rewards, beta, generator=G))
        monkeypatch.undo()
        assert out.n == 7 and isinstance(out.n, int)
        torch.testing.assert_close(out.log_mean_weight, log_mean(rewards / beta), rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("n", [1, 5, 2**15])
def test_pick_probabilities_are_the_normalised_weights(n, dtype, rng, monkeypatch):
    """Uniforms placed a little below and above each boundary of the cdf must give the candidates on its two sides.

    A float32 cumulative sum over 2^15 candidates would move single boundaries by 1e-2 of a candidate's width.
    """
    rewards = torch.rand(n, generator=rng, dtype=F64).to(dtype)
    cdf = normalize(rewards.double()).exp().cumsum(-1)
    places = torch.linspace(0, n - 1, min(n, 200)).long().unique()
    step = 1e-5 / n
    for offset in (-step, step):
        u = (cdf[places] + offset).clamp(max=1 - 2**-53)
        monkeypatch.setattr(torch, "rand", lambda *size, u=u, **kwargs: u[:, None].clone())
        drawn = soft_best_of_n(rewards.expand(len(u), n), 1.0, generator=rng)
        assert torch.equal(drawn, (places + (offset > 0)).clamp(max=n - 1))
        one_chunk = torch.arange(n).expand(len(u), n), rewards.expand(len(u), n)
        assert torch.equal(soft_best_of_n_stream([one_chunk], 1.0, generator=rng).winner, drawn)


def test_pick_at_the_edges(monkeypatch):
    # Uniforms may be exactly 0: an excluded first candidate must not be chosen. On a boundary the next one is.
    rewards = vector(-math.inf, 0, -math.inf, 0, -math.inf)
    for u, expected in ((0.0, 1), (0.5, 3), (1 - 2**-53, 3)):
        monkeypatch.setattr(torch, "rand", lambda *size, u=u, **kwargs: vector(u))
        assert soft_best_of_n(rewards, 1.0, generator=torch.Generator()).item() == expected
    # A chunk of weight 0 replaces nothing, even by a uniform of 0.
    monkeypatch.setattr(torch, "rand", lambda *size, **kwargs: torch.zeros(size[0], dtype=F64))
    chunks = [(torch.tensor([i]), vector(r)) for i, r in enumerate((0, -math.inf))]
    assert soft_best_of_n_stream(chunks, 1.0, generator=torch.Generator()).winner.item() == 0


def test_stream_replaces_by_the_share_of_the_chunk(monkeypatch):
    # Weights 3 and 1, then 4, then 8: the winner is replaced with probability 4/8, then 8/16.
    chunks = [
        (torch.tensor([[0, 1]]), vector(3, 1).log()[None]),
        (torch.tensor([[2]]), vector(4).log()[None]),
        (torch.tensor([[3]]), vector(8).log()[None]),
    ]

    def winner(*uniforms):
        queue = iter(uniforms)  # pick; then pick and replace, per further chunk
        monkeypatch.setattr(torch, "rand", lambda *size, **kwargs: torch.full(size[0], next(queue), dtype=F64))
        return soft_best_of_n_stream(chunks, 1.0, generator=torch.Generator()).winner.item()

    below, above = 0.5 - 1e-12, 0.5 + 1e-12
    assert winner(0.75 - 1e-12, 0, above, 0, above) == 0
    assert winner(0.75 + 1e-12, 0, above, 0, above) == 1
    assert winner(0.1, 0, below, 0, above) == 2
    assert winner(0.1, 0, below, 0, below) == 3
    assert winner(0.1, 0, above, 0, below) == 3


@pytest.mark.parametrize("chunk", [1, 3, 7])
def test_stream_counts_and_averages(chunk, rng):
    rewards = 30 * torch.rand(2, 7, generator=rng, dtype=F64)
    rewards[0, :4] = -math.inf
    before = rewards.clone()
    pieces = [(part, part) for part in rewards.split(chunk, -1)]
    out = soft_best_of_n_stream(pieces, 1.5, generator=rng)
    assert out.n == 7 and isinstance(out.n, int)
    torch.testing.assert_close(out.log_mean_weight, log_mean(rewards / 1.5), rtol=1e-13, atol=1e-13)
    assert out.winner.shape == (2,) and bool((out.winner > -math.inf).all())
    assert torch.equal(rewards, before)


@pytest.mark.parametrize("stream", STREAMS)
def test_stream_keeps_weights_beyond_float64(stream, rng):
    # exp(r / beta) overflows and underflows; only differences may matter.
    for shift in (-1e6, 1e6):
        pieces = [(torch.tensor([1, 2]), vector(0, -math.inf) + shift), (torch.tensor([3]), vector(-900) + shift)]
        out = stream(pieces, 1.0, generator=rng)
        assert out.winner.item() == 1
        assert out.log_mean_weight.item() == pytest.approx(shift - math.log(3), rel=1e-15)


@pytest.mark.parametrize("stream", STREAMS)
def test_stream_of_strings(stream, rng):
    # Candidates with an event dimension: the winner is a whole row of it, the one that the same draws pick as a number.
    rewards = torch.rand(5, 8, generator=rng, dtype=F64)
    strings = torch.randint(27, (5, 8, 4), generator=rng)
    numbers = torch.arange(8).expand(5, 8)
    state = rng.get_state()
    out = stream(zip(strings.split(3, 1), rewards.split(3, 1), strict=True), 0.1, generator=rng)
    rng.set_state(state)
    index = stream(zip(numbers.split(3, 1), rewards.split(3, 1), strict=True), 0.1, generator=rng)
    assert out.winner.shape == (5, 4)
    assert torch.equal(out.winner, strings[torch.arange(5), index.winner])
    # Without a batch dimension
    single = stream([(strings[0], rewards[0])], 0.1, generator=rng)
    assert single.winner.shape == (4,) and single.log_mean_weight.shape == ()


@pytest.mark.parametrize("n", [1, 6, 10**6, 10**15])
def test_candidate_counts_add_up(n, rng):
    ref = torch.stack([law(0.2, 0, 0.5, 0.3), law(0, 1, 0, 0), law(0.5, 0.5, 0, 0)])
    counts = selection.candidate_counts(ref, n, generator=rng)
    assert counts.shape == ref.shape and counts.dtype == F64
    assert torch.equal(counts.sum(-1), torch.full((3,), float(n), dtype=F64))
    assert bool((counts >= 0).all()) and torch.equal(counts, counts.floor())
    assert not bool(counts[ref == -math.inf].any())


def test_candidate_counts_follow_the_multinomial_law(rng):
    k, n = 3, 3
    codes = torch.cartesian_prod(*[torch.arange(n + 1)] * k)
    codes = codes[codes.sum(1) == n]

    def multinomial(ref):
        return torch.stack(
            [math.log(math.factorial(n)) - sum(math.lgamma(c + 1) for c in row) + (row * ref).sum() for row in codes]
        )

    def draw(ref):
        def counts(rows, generator):
            c = selection.candidate_counts(ref.expand(rows, k), n, generator=generator)
            return (c[:, None] == codes).all(-1).long().argmax(1)

        return counts

    hot = tilt(S0, S0_REWARDS, 20.0)
    wrong = {"uniform": (draw(UNIFORM), multinomial(UNIFORM)), "tilted": (draw(hot), multinomial(hot))}
    check_sampler(draw(S0), multinomial(S0), wrong, rng)


# --- errors ----------------------------------------------------------------------------------------------------------

G = torch.Generator()
NOTHING_LEFT = "must leave at least one outcome of positive mass per row"


@pytest.mark.parametrize(
    "draw",
    [
        lambda r: best_of_n(r, generator=G),
        lambda r: soft_best_of_n(r, 1.0, generator=G),
        lambda r: exponential_best_of_n(r, 1.0, generator=G),
    ],
    ids=["best", "soft", "exponential"],
)
@pytest.mark.parametrize(
    ("rewards", "error", "text"),
    [
        ([1.0], TypeError, "rewards must be a floating-point torch.Tensor, got list"),
        (torch.tensor([1]), TypeError, "rewards must be .* got a torch.int64 tensor"),
        (vector(0, math.nan), ValueError, "rewards must be finite or -inf"),
        (vector(0, math.inf), ValueError, "rewards must be finite or -inf"),
        (torch.tensor([[0.0], [-math.inf]]), ValueError, f"rewards {NOTHING_LEFT}"),
        (torch.zeros(3, 0), ValueError, "rewards must have a last dimension of size >= 1"),
    ],
)
def test_bad_candidates(draw, rewards, error, text):
    with pytest.raises(error, match=text):
        draw(rewards)


LAW_CALLS = {
    "best": lambda p, r, n: best_of_n_law(p, r, n),
    "soft": lambda p, r, n: soft_best_of_n_law(p, r, 1.0, n),
    "exponential": lambda p, r, n: exponential_best_of_n_law(p, r, 1.0, n),
    "draw": lambda p, r, n: selection.soft_best_of_n_draw(p, r, 1.0, n, generator=G),
}


@pytest.mark.parametrize("name", LAW_CALLS)
@pytest.mark.parametrize(
    ("ref", "rewards", "n", "error", "text"),
    [
        ([0.0], S0_REWARDS, 2, TypeError, "ref_logps must be a floating-point torch.Tensor"),
        (S0, S0_REWARDS.long(), 2, TypeError, "rewards must be .* got a torch.int64 tensor"),
        (S0 + 1e-3, S0_REWARDS, 2, ValueError, "ref_logps must be log-probabilities that sum to 1"),
        (S0, vector(0, math.nan, 0), 2, ValueError, "rewards must be finite or -inf"),
        (S0, vector(0, -math.inf, 0), 2, ValueError, "rewards must be finite where the reference has mass, got -inf"),
        (S0, S0_REWARDS[:2], 2, ValueError, "ref_logps and rewards must agree in the last dimension"),
        (S0, S0_REWARDS, 0, ValueError, "n must be an integer >= 1, got 0"),
        (S0, S0_REWARDS, 2.0, TypeError, "n must be an int, got float"),
        (S0, S0_REWARDS, True, TypeError, "n must be an int, got bool"),
    ],
)
def test_bad_laws(name, ref, rewards, n, error, text):
    with pytest.raises(error, match=text):
        LAW_CALLS[name](ref, rewards, n)


@pytest.mark.parametrize("beta", [0.0, -1.0, math.inf, math.nan, "1"])
@pytest.mark.parametrize(
    "call",
    [
        lambda beta: soft_best_of_n_law(S0, S0_REWARDS, beta, 2),
        lambda beta: soft_best_of_n(S0_REWARDS, beta, generator=G),
        lambda beta: selection.soft_best_of_n_draw(S0, S0_REWARDS, beta, 2, generator=G),
        lambda beta: soft_best_of_n_stream([(S0_REWARDS, S0_REWARDS)], beta, generator=G),
        lambda beta: exponential_best_of_n_law(S0, S0_REWARDS, beta, 2),
        lambda beta: exponential_best_of_n(S0_REWARDS, beta, generator=G),
        lambda beta: exponential_best_of_n_stream([(S0_REWARDS, S0_REWARDS)], beta, generator=G),
    ],
)
def test_bad_temperatures(call, beta):
    with pytest.raises(ValueError, match="beta must be finite and > 0, got"):
        call(beta)


def test_soft_law_refuses_a_range_it_cannot_represent():
    with pytest.raises(ValueError, match=r"beta must be at least \(max reward - min reward\) / 600, got 0.003"):
        soft_best_of_n_law(S0, S0_REWARDS, 0.003, 2)
    # Only the support counts, and the draw has no such limit.
    soft_best_of_n_law(law(0.5, 0.5, 0), vector(0, 1, 1e9), 0.003, 2)
    selection.soft_best_of_n_draw(S0, S0_REWARDS, 0.003, 2, generator=G)


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda: selection.candidate_counts([0.0], 2, generator=G), TypeError, "ref_logps must be a floating-point"),
        (lambda: selection.candidate_counts(S0 + 1, 2, generator=G), ValueError, "ref_logps must be log-probabilities"),
        (lambda: selection.candidate_counts(S0, 2.0, generator=G), TypeError, "n must be an int"),
        (lambda: selection.candidate_counts(S0, 0, generator=G), ValueError, "n must be an integer >= 1"),
    ],
)
def test_bad_counts(call, error, text):
    with pytest.raises(error, match=text):
        call()


Y = torch.arange(3)


@pytest.mark.parametrize("stream", STREAMS)
@pytest.mark.parametrize(
    ("chunks", "error", "text"),
    [
        ([], ValueError, "chunks must hold at least one pair"),
        ([(Y, Y)], TypeError, "rewards must be a floating-point torch.Tensor, got a torch.int64 tensor"),
        ([(Y, [0.0])], TypeError, "rewards must be a floating-point torch.Tensor, got list"),
        ([(Y, vector(0, 1))], ValueError, r"candidates must have the shape of rewards, .* got \(3,\) and \(2,\)"),
        ([(Y, vector(0, 1, math.nan))], ValueError, "rewards must be finite or -inf .* got NaN or [+]inf"),
        ([(Y, vector(0, 1, math.inf))], ValueError, "rewards must be finite or -inf .* got NaN or [+]inf"),
        ([(Y, torch.full((3,), -math.inf))] * 2, ValueError, f"rewards {NOTHING_LEFT}"),
        (
            [(Y, S0_REWARDS), (Y.view(1, 3), S0_REWARDS.view(1, 3))],
            ValueError,
            r"rewards must keep the batch shape \(\)",
        ),
        ([(Y[:0], S0_REWARDS[:0])], ValueError, "rewards must have a last dimension of size >= 1"),
    ],
)
def test_bad_streams(stream, chunks, error, text):
    with pytest.raises(error, match=text):
        stream(chunks, 1.0, generator=G)


@pytest.mark.parametrize("stream", STREAMS)
@pytest.mark.parametrize("shapes", [((3, 1), (3, 4)), ((3, 2), (3, 4)), ((3,), (3, 4))])
def test_stream_refuses_candidates_whose_shape_changes(stream, rng, shapes):
    chunks = [(torch.zeros(shape), torch.zeros(3)) for shape in shapes]
    old, new = (re.escape(str(shape[1:])) for shape in shapes)
    with pytest.raises(ValueError, match=f"candidates must keep the event shape {old} of the first chunk, got {new}"):
        stream(chunks, 1.0, generator=rng)


# --- selection symbol by symbol --------------------------------------------------------------------------------------

# --- dtypes, scales, gradients, one temperature per row, empty batches -----------------------------------------------

DTYPES = [F64, torch.float32, torch.bfloat16, torch.float16]


def test_draws_from_float64_are_those_of_the_first_version():
    # Fixed by the code before rewards were shifted in float64: -inf, ties and zeros among them.
    g = torch.Generator()
    r = torch.sin(torch.arange(24, dtype=F64) * 1.7).view(4, 6)
    r[1, 2] = -math.inf
    r[2, 3] = r[2].max()
    p = torch.log_softmax(torch.cos(torch.arange(24, dtype=F64) * 0.9).view(4, 6), -1)
    finite = torch.where(r.isfinite(), r, 0)
    assert best_of_n(r[:, [0, 1, 2, 3, 3, 3]], generator=g.manual_seed(13)).tolist() == [1, 4, 4, 1]
    assert soft_best_of_n(r.expand(5, 4, 6), 0.7, generator=g.manual_seed(13)).tolist() == [
        [5, 3, 0, 5],
        [5, 3, 1, 1],
        [0, 3, 4, 1],
        [5, 3, 3, 2],
        [5, 5, 0, 5],
    ]
    assert selection.candidate_counts(p, 50, generator=g.manual_seed(13)).tolist() == [
        [22, 13, 3, 2, 2, 8],
        [16, 17, 10, 5, 1, 1],
        [2, 8, 15, 17, 7, 1],
        [4, 7, 14, 10, 11, 4],
    ]
    drawn = selection.soft_best_of_n_draw(p.expand(5, 4, 6), finite, 0.7, 9, generator=g.manual_seed(13))
    assert drawn.tolist() == [[5, 2, 3, 1], [5, 2, 0, 5], [1, 0, 3, 4], [1, 1, 1, 2], [1, 3, 3, 4]]
    chunks = [(torch.arange(6 * i, 6 * i + 6).expand(4, 6), r.roll(i, 1)) for i in range(5)]
    assert soft_best_of_n_stream(chunks, 0.4, generator=g.manual_seed(13)).winner.tolist() == [11, 3, 14, 24]


def test_one_column_of_noise_per_temperature(rng):
    # Several temperatures for one row choose from the same candidates, each with noise of its own.
    drawn = exponential_best_of_n(S0_REWARDS, torch.full((400, 1), 1.5, dtype=F64), generator=rng)
    assert drawn.shape == (400, 1) and drawn.unique().tolist() == [0, 1, 2]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("beta", [5e-324, 1e-300, 1e-60, 1e-38])
def test_small_temperatures_are_greedy_in_every_dtype(dtype, beta, rng):
    for rewards in (vector(10, 11), vector(-11, -10), vector(-math.inf, 6e4), vector(-1, 0)):
        rewards = rewards.to(dtype)
        assert soft_best_of_n(rewards, beta, generator=rng).item() == 1
        assert exponential_best_of_n(rewards, beta, generator=rng).item() == 1
        ref = law(0.5, 0.5).to(dtype)
        if bool(rewards.isfinite().all()):
            assert selection.soft_best_of_n_draw(ref, rewards, beta, 60, generator=rng).item() == 1
        for order in (rewards, rewards.flip(0)):
            chunks = [(r.view(1), r.view(1)) for r in order]
            for stream in STREAMS:
                assert stream(chunks, beta, generator=rng).winner == rewards[1]
    for stream in STREAMS:
        out = stream([(torch.arange(2), vector(0, -1).to(dtype))] * 2, beta, generator=rng)
        assert out.winner == 0 and out.log_mean_weight.dtype == F64
        assert out.log_mean_weight.item() == pytest.approx(-math.log(2), rel=1e-15)
        # Beyond float64 the mean weight is infinite; ties are still broken evenly.
        tied = [(torch.tensor([i]).expand(500, 1), torch.full((500, 1), 10.0, dtype=dtype)) for i in range(2)]
        out = stream(tied, 1e-310, generator=rng)
        assert out.winner.unique().tolist() == [0, 1] and bool((out.log_mean_weight == math.inf).all())


@pytest.mark.parametrize("scale", [1e-300, 1e30, 1e300, 1.7e308])
def test_rewards_of_every_scale(scale):
    r, g = vector(-1, 0.5, 1), torch.Generator()
    beta = scale * 0.7
    close(soft_best_of_n_law(S0, scale * r, beta, 4), soft_best_of_n_law(S0, r, 0.7, 4))
    close(exponential_best_of_n_law(S0, scale * r, beta, 4), exponential_best_of_n_law(S0, r, 0.7, 4))
    close(best_of_n_law(S0, scale * r, 4), best_of_n_law(S0, r, 4))
    rows = scale * r.expand(200, 3)
    picked = soft_best_of_n(rows, beta, generator=g.manual_seed(1))
    assert torch.equal(picked, soft_best_of_n(rows / scale, 0.7, generator=g.manual_seed(1)))
    picked = exponential_best_of_n(rows, beta, generator=g.manual_seed(1))
    assert torch.equal(picked, exponential_best_of_n(rows / scale, 0.7, generator=g.manual_seed(1)))
    for stream in STREAMS:
        streamed = stream([(rows, rows), (rows, rows)], beta, generator=g.manual_seed(1))
        assert streamed.log_mean_weight[0].item() == pytest.approx(log_mean(r / 0.7).item(), rel=1e-13)


@pytest.mark.parametrize("dtype", DTYPES)
def test_laws_in_every_dtype(dtype, rng):
    # 151,936 tokens: half precision could not even add up the law.
    ref = torch.log_softmax(torch.randn(151_936, generator=rng, dtype=F64), -1).to(dtype)
    rewards = torch.randint(3, ref.shape, generator=rng).to(dtype)
    exact = torch.log_softmax(ref.double(), -1)
    for function in LAWS.values():
        out = function(ref, rewards, 4)
        assert out.dtype == dtype
        # Within one rounding: the same law may be normalised once or twice.
        eps = torch.finfo(dtype).eps
        torch.testing.assert_close(out.double(), function(exact, rewards.double(), 4), rtol=max(eps, 1e-13), atol=0)
    short, flat = torch.full((500,), -math.log(500), dtype=F64).to(dtype), torch.zeros(500, dtype=dtype)
    assert selection.candidate_counts(short, 10, generator=rng).sum().item() == 10
    assert selection.soft_best_of_n_draw(short, flat, 0.5, 10, generator=rng).shape == ()
    uniform = torch.full((151_936,), -math.log(151_936), dtype=F64).to(dtype)
    best = best_of_n_law(uniform, torch.zeros_like(uniform), 4)
    assert torch.equal(best, torch.log_softmax(uniform.double(), -1).to(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_half_precision_weights_are_computed_in_float64(dtype, rng):
    rewards = torch.rand(50, 4096, generator=rng).to(dtype)
    state = rng.get_state()
    drawn = soft_best_of_n(rewards, 0.1, generator=rng)
    rng.set_state(state)
    assert torch.equal(drawn, soft_best_of_n(rewards.double(), 0.1, generator=rng))
    rng.set_state(state)
    drawn = exponential_best_of_n(rewards, 0.1, generator=rng)
    rng.set_state(state)
    assert torch.equal(drawn, exponential_best_of_n(rewards.double(), 0.1, generator=rng))


@pytest.mark.parametrize("default", DTYPES)
def test_nothing_depends_on_the_default_dtype(default):
    def results():
        g = torch.Generator().manual_seed(0)
        streamed = soft_best_of_n_stream([(S0_REWARDS, S0_REWARDS)] * 2, 0.5, generator=g)
        return (
            best_of_n_law(S0, TIED_REWARDS, 5),
            soft_best_of_n_law(S0, S0_REWARDS, 0.5, 5),
            best_of_n(TIED_REWARDS, generator=g),
            soft_best_of_n(S0_REWARDS, 0.5, generator=g),
            exponential_best_of_n(S0_REWARDS, 0.5, generator=g),
            exponential_best_of_n_law(S0, S0_REWARDS, 0.5, 5),
            selection.candidate_counts(S0, 9, generator=g),
            selection.soft_best_of_n_draw(S0, S0_REWARDS, 0.5, 9, generator=g),
            streamed.winner,
            streamed.log_mean_weight,
        )

    assert_same_under_default_dtype(results, default)


def test_gradient_of_the_best_of_n_law_on_an_instance():
    logits = vector(0.1, 0.7, -0.3).requires_grad_()
    logps = best_of_n_law(torch.log_softmax(logits, -1), S0_REWARDS, 4)
    (gradient,) = torch.autograd.grad(logps[2], logits)
    close(gradient, vector(-0.2022, -0.3684, 0.5706), 5e-5)


@pytest.mark.parametrize("n", [1, 2, 4, 9])
@pytest.mark.parametrize(
    ("logits", "rewards"),
    [
        (vector(0.1, 0.7, -0.3), S0_REWARDS),
        (vector(0.1, 0.7, -0.3), TIED_REWARDS),
        (vector(0.1, 0.7, -0.3), vector(1, 1, 1)),
        (vector(0.1, -math.inf, 0.7, -0.3), vector(1, 0, 2, 2)),
        (vector(0.1, 0.7, -math.inf, -0.3), vector(2, 1, 1, 0)),
        (vector(0, -60, -30, -0.5), vector(0, 2, 1, 3)),
        (vector(0.4), vector(5)),
    ],
)
def test_gradient_of_the_best_of_n_law_against_its_enumeration(logits, rewards, n):
    """Autograd on both sides: the enumeration is a sum of products of probabilities, without a mask."""
    on = logits > -math.inf
    for y in range(len(logits)):
        if on[y]:
            x, z = logits.clone().requires_grad_(), logits[on].clone().requires_grad_()
            by_law = torch.autograd.grad(best_of_n_law(torch.log_softmax(x, -1), rewards, n)[y], x)[0]
            counted = enumerated_best_law(torch.log_softmax(z, -1), rewards[on], n)[int(on[:y].sum())]
            by_enumeration = torch.autograd.grad(counted, z)[0]
            close(by_law[on], by_enumeration, 1e-10)
            assert not bool(by_law[~on].any())


@pytest.mark.parametrize("n", [2, 10**6, 10**12])
def test_gradients_of_the_best_of_n_law_are_finite_at_the_extremes(n):
    logits = vector(0, -800, -1, -math.inf, -40, -300).requires_grad_()
    for rewards in (vector(0, 1, 2, 3, 4, 5), vector(5, 4, 3, 2, 1, 0), vector(0, 0, 1, 1, 2, 2)):
        logps = best_of_n_law(torch.log_softmax(logits, -1), rewards, n)
        for y in (0, 1, 2, 4, 5):
            with torch.autograd.set_detect_anomaly(True):  # no NaN on the way either
                (gradient,) = torch.autograd.grad(logps[y], logits, retain_graph=True)
            assert bool(gradient.isfinite().all()) and gradient[3] == 0
            assert abs(gradient.sum().item()) <= 1e-9 * gradient.abs().max().item() + 1e-12  # only differences count
        assert not torch.autograd.grad(logps[3], logits)[0].any()  # -inf, a constant


def test_what_is_not_differentiable_carries_no_graph(rng):
    p, r = S0.clone().requires_grad_(), S0_REWARDS.clone().requires_grad_()
    for n in (1, 4):
        assert not soft_best_of_n_law(p, r, 1.0, n).requires_grad
        assert not exponential_best_of_n_law(p, r, 1.0, n).requires_grad
    assert not selection.candidate_counts(p, 5, generator=rng).requires_grad
    assert not soft_best_of_n_stream([(Y, r), (Y, r)], 1.0, generator=rng).log_mean_weight.requires_grad
    assert not exponential_best_of_n_stream([(Y, r), (Y, r)], 1.0, generator=rng).log_mean_weight.requires_grad
    soft_best_of_n(r, 1.0, generator=rng)
    exponential_best_of_n(r, 1.0, generator=rng)
    selection.soft_best_of_n_draw(p, r, 1.0, 5, generator=rng)
    assert torch.autograd.grad(best_of_n_law(p, r, 4)[0], r, allow_unused=True)[0] is None


# One temperature per row: as a loop over rows would have it.
BETAS = vector(0.2, 1, 5)


def test_laws_with_a_temperature_per_row():
    rewards = torch.stack([S0_REWARDS, TIED_REWARDS, vector(0, 2, 1)])
    for function in (soft_best_of_n_law, exponential_best_of_n_law):
        looped = torch.stack([function(S0, r, b, 7) for r, b in zip(rewards, BETAS.tolist(), strict=True)])
        assert torch.equal(function(S0, rewards, BETAS, 7), looped)
        assert torch.equal(function(S0.float(), rewards.float(), BETAS.float(), 7).argmax(-1), looped.argmax(-1))
        for n in (1, 7):
            one = torch.stack([function(S0, S0_REWARDS, b, n) for b in BETAS.tolist()])
            assert torch.equal(function(S0, S0_REWARDS, BETAS, n), one)


def test_draws_with_the_temperatures_of_beta_for_ess(rng):
    # The temperatures of a batch in which one prompt has only ties go into every function as they are.
    rewards = torch.tensor([[0.0, 0, 1, 1, 0, 1, 0, 1], [1.0] * 8, [0.0, 0, 0, 0, 0, 0, 0, 1]])
    beta = beta_for_ess(rewards, 0.6, ties="clamp")
    ref = torch.full((8,), -math.log(8), dtype=F64)
    assert soft_best_of_n(rewards, beta, generator=rng).shape == (3,)
    assert tilt(ref, rewards, beta).shape == (3, 8)
    close(soft_best_of_n_law(ref, rewards.double(), beta, 5)[1], ref)
    assert selection.soft_best_of_n_draw(ref, rewards, beta, 5, generator=rng).shape == (3,)
    assert soft_best_of_n_stream([(rewards, rewards)] * 2, beta, generator=rng).winner.shape == (3,)
    close(exponential_best_of_n_law(ref, rewards.double(), beta, 5)[1], ref)
    assert exponential_best_of_n(rewards, beta, generator=rng).shape == (3,)
    assert exponential_best_of_n_stream([(rewards, rewards)] * 2, beta, generator=rng).winner.shape == (3,)


@pytest.mark.parametrize("name", ["soft", "draw", "soft stream", "exponential", "exponential stream"])
def test_samplers_with_a_temperature_per_row(name, rng):
    """Rows of one batch at two temperatures: each half follows its own law and not that of the other."""
    cold, warm, n = 0.4, 1.2, 3
    noise = "exponential" in name
    pick, law_of = (exponential_best_of_n, exponential_best_of_n_law) if noise else (soft_best_of_n, soft_best_of_n_law)
    targets = [law_of(S0, S0_REWARDS, beta, n) for beta in (cold, warm)]
    rows = max(verify.plan(targets[0], targets[1]), verify.plan(targets[1], targets[0]))
    beta = vector(cold, warm)[:, None]
    pool = candidates(S0, 2 * rows, n, rng).view(2, rows, n)
    if name in ("soft", "exponential"):
        index = pick(S0_REWARDS[pool], beta, generator=rng)
        drawn = pool.gather(-1, index[..., None]).squeeze(-1)
    elif name == "draw":
        drawn = selection.soft_best_of_n_draw(S0.expand(rows, 3), S0_REWARDS, beta, n, generator=rng)
    else:
        chunks = [(part, S0_REWARDS[part]) for part in pool.split(1, -1)]
        out = STREAMS[noise](chunks, beta, generator=rng)
        drawn = out.winner
        torch.testing.assert_close(out.log_mean_weight, log_mean(S0_REWARDS[pool] / beta[..., None]))
    assert drawn.shape == (2, rows)
    for i in range(2):
        assert verify.match(drawn[i], targets[i], claim="row", versus=[targets[1 - i]])
        verdict = verify.match(drawn[i], targets[1 - i], claim="row!other", versus=[targets[i]])
        assert verdict.decision == "REJECT"


def test_temperatures_of_a_batch_of_two_dimensions(rng):
    """A temperature per row of a (2, 3) batch does what the six rows, one after the other, do with theirs."""
    beta, rewards = torch.rand(2, 3, generator=rng, dtype=F64) + 0.1, torch.rand(2, 3, 5, generator=rng, dtype=F64)
    ref = torch.stack([random_law(5, rng) for _ in range(6)]).view(2, 3, 5)
    calls = [
        lambda p, r, b, g: soft_best_of_n_law(p, r, b, 4),
        lambda p, r, b, g: soft_best_of_n(r, b, generator=g),
        lambda p, r, b, g: selection.soft_best_of_n_draw(p, r, b, 4, generator=g),
        lambda p, r, b, g: exponential_best_of_n_law(p, r, b, 4),
        lambda p, r, b, g: exponential_best_of_n(r, b, generator=g),
    ]
    for call in calls:
        nested = call(ref, rewards, beta, torch.Generator().manual_seed(1))
        flat = call(ref.flatten(0, 1), rewards.flatten(0, 1), beta.flatten(), torch.Generator().manual_seed(1))
        assert torch.equal(nested.flatten(0, 1), flat)


def test_each_temperature_of_a_draw_has_candidates_of_its_own(rng):
    # A single candidate is kept at every temperature, however much better the outcomes are that were not drawn.
    drawn = selection.soft_best_of_n_draw(S0.expand(500, 3), S0_REWARDS, vector(1e-300, 1)[:, None], 1, generator=rng)
    assert drawn[0].unique().tolist() == drawn[1].unique().tolist() == [0, 1, 2]
    assert not torch.equal(drawn[0], drawn[1])  # 500 candidates agree with probability .38^500


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda b: soft_best_of_n(S0_REWARDS.expand(2, 3), b, generator=G), ValueError, r"beta must broadcast against"),
        (lambda b: soft_best_of_n_law(S0.expand(2, 3), S0_REWARDS, b, 2), ValueError, r"beta must broadcast against"),
        (
            lambda b: selection.soft_best_of_n_draw(S0.expand(2, 3), S0_REWARDS, b, 2, generator=G),
            ValueError,
            r"beta must broadcast against the batch dimensions \(2,\), got shape \(3,\)",
        ),
        (
            lambda b: soft_best_of_n_stream([(Y, S0_REWARDS)], b, generator=G),
            ValueError,
            r"beta must broadcast to shape \(\), got \(3,\)",
        ),
        (
            lambda b: exponential_best_of_n_stream([(Y, S0_REWARDS)], b, generator=G),
            ValueError,
            r"beta must broadcast to shape \(\), got \(3,\)",
        ),
        (
            lambda b: exponential_best_of_n(S0_REWARDS.expand(2, 3), b, generator=G),
            ValueError,
            r"beta must broadcast against the batch dimensions \(2,\), got shape \(3,\)",
        ),
        (
            lambda b: exponential_best_of_n_law(S0.expand(2, 3), S0_REWARDS, b, 2),
            ValueError,
            r"beta must broadcast against the batch dimensions \(2,\), got shape \(3,\)",
        ),
    ],
)
def test_bad_shapes_of_temperatures(call, error, text):
    with pytest.raises(error, match=text):
        call(torch.ones(3))
    with pytest.raises(ValueError, match="beta must be finite and > 0"):
        call(vector(0, 1, 1))


@pytest.mark.parametrize("numbers", [16, 64, 1000, 2**17])
@pytest.mark.parametrize("n", [2, 30, 10**9])
def test_rows_of_any_kind_do_not_change_each_other(numbers, n, rng, monkeypatch):
    """Rows of unlike ranges and numbers of levels go through the quadrature together, in parts of any size."""
    ref = torch.randn(5, 40, generator=rng, dtype=F64).mul_(3).log_softmax(-1)
    rewards = torch.rand(5, 40, generator=rng, dtype=F64) * vector(0, 1, 30, 300, 599)[:, None]
    rewards[2] = rewards[2].round()  # ties
    ref[3, ::2] = -math.inf
    ref[3] = ref[3].log_softmax(-1)
    alone = torch.stack([soft_best_of_n_law(p, r, 1.0, n) for p, r in zip(ref, rewards, strict=True)])
    monkeypatch.setattr(selection, "_NUMBERS", numbers)
    together = soft_best_of_n_law(ref, rewards, 1.0, n)
    assert torch.equal(together.isinf(), alone.isinf()) and bool(together[3, ::2].isinf().all())
    torch.testing.assert_close(together, alone, rtol=1e-13, atol=1e-13)


def test_the_range_of_each_row_counts():
    rewards = torch.stack([S0_REWARDS + 5000, 1000 * S0_REWARDS + 1, S0_REWARDS - 5000])
    assert soft_best_of_n_law(S0, rewards, vector(1, 1000, 1), 2).shape == (3, 3)
    with pytest.raises(ValueError, match=r"beta must be at least .* / 600, got 1\.5 for a range of 2000;"):
        soft_best_of_n_law(S0, rewards, vector(1000, 1.5, 1), 2)


@pytest.mark.parametrize("dtype", DTYPES)
def test_empty_batches(dtype):
    p, r, none = torch.zeros(0, 3, dtype=dtype), torch.zeros(3, dtype=dtype), torch.zeros(0, 3, dtype=dtype)
    for n in (1, 4):
        for out in (
            best_of_n_law(p, r, n),
            soft_best_of_n_law(p, r, 1.0, n),
            soft_best_of_n_law(p, r, none[:, 0], n),
            exponential_best_of_n_law(p, r, 1.0, n),
            exponential_best_of_n_law(p, r, none[:, 0], n),
        ):
            assert out.shape == (0, 3) and out.dtype == dtype
    for index in (
        best_of_n(none, generator=G),
        soft_best_of_n(none, 1.0, generator=G),
        exponential_best_of_n(none, 1.0, generator=G),
        selection.soft_best_of_n_draw(p, r, 1.0, 4, generator=G),
    ):
        assert index.shape == (0,) and index.dtype == torch.int64
    assert selection.candidate_counts(p, 4, generator=G).shape == (0, 3)
    for stream in STREAMS:
        out = stream([(none, none), (none, none)], 1.0, generator=G)
        assert out.winner.shape == (0,) and out.log_mean_weight.shape == (0,) and out.n == 6


def test_numbers_of_numpy():
    n, beta = np.int64(4), np.float32(0.5)
    assert torch.equal(best_of_n_law(S0, S0_REWARDS, n), best_of_n_law(S0, S0_REWARDS, 4))
    assert torch.equal(soft_best_of_n_law(S0, S0_REWARDS, beta, n), soft_best_of_n_law(S0, S0_REWARDS, 0.5, 4))
    law_of_four = exponential_best_of_n_law(S0, S0_REWARDS, 0.5, 4)
    assert torch.equal(exponential_best_of_n_law(S0, S0_REWARDS, beta, n), law_of_four)
    assert exponential_best_of_n(S0_REWARDS, np.float64(0.5), generator=G).shape == ()
    assert exponential_best_of_n_stream([(Y, S0_REWARDS)], beta, generator=G).winner.shape == ()
    assert selection.candidate_counts(S0, n, generator=G).sum() == 4
    assert selection.soft_best_of_n_draw(S0, S0_REWARDS, beta, n, generator=G).shape == ()
    assert soft_best_of_n(S0_REWARDS, np.float64(0.5), generator=G).shape == ()
    assert soft_best_of_n_stream([(Y, S0_REWARDS)], beta, generator=G).winner.shape == ()


@pytest.mark.parametrize(
    "call",
    [
        lambda: best_of_n(S0_REWARDS, generator=None),
        lambda: soft_best_of_n(S0_REWARDS, 1.0, generator=None),
        lambda: selection.candidate_counts(S0, 2, generator=None),
        lambda: selection.soft_best_of_n_draw(S0, S0_REWARDS, 1.0, 2, generator=None),
        lambda: soft_best_of_n_stream([(Y, S0_REWARDS)], 1.0, generator=None),
        lambda: exponential_best_of_n(S0_REWARDS, 1.0, generator=None),
        lambda: exponential_best_of_n_stream([(Y, S0_REWARDS)], 1.0, generator=None),
    ],
)
def test_a_generator_is_required(call):
    with pytest.raises(TypeError, match="generator must be a torch.Generator, got NoneType"):
        call()


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (
            lambda: best_of_n_law(S0, S0_REWARDS, torch.tensor(3)),
            TypeError,
            "n must be an int, got a torch.int64 tensor",
        ),
        (lambda: best_of_n(torch.tensor(1.0), generator=G), ValueError, "rewards must have a last dimension"),
        (
            lambda: soft_best_of_n_stream([([1, 2, 3], S0_REWARDS)], 1.0, generator=G),
            TypeError,
            "candidates must be a torch.Tensor, got list",
        ),
    ],
)
def test_refusals_name_the_argument(call, error, text):
    with pytest.raises(error, match=text):
        call()


# --- edges -----------------------------------------------------------------------------------------------------------


def test_weights_may_span_600_and_no_more():
    half = law(0.5, 0.5)
    close(soft_best_of_n_law(half, vector(0, 600), 1.0, 2).exp(), vector(0.25, 0.75))
    with pytest.raises(ValueError, match=r"got 1.0 for a range of 600\.5"):
        soft_best_of_n_law(half, vector(0, 600.5), 1.0, 2)
