import hashlib
import itertools
import math
import sys
from contextlib import nullcontext
from fractions import Fraction
from types import SimpleNamespace

import mpmath
import numpy as np
import pytest
import scipy.optimize
import scipy.special
import scipy.stats
import torch
from helpers import F64, S0, S0_REWARDS, compositions, law, log_multinomial, random_law, vector, without

from tiltlib import selection, verify
from tiltlib.categorical import sample, tilt, total_variation
from tiltlib.verify import ClaimFailed, Verdict, bound, exact, falsify, log_e_value, match, plan, report, within

UNIFORM8 = law(*[1 / 8] * 8)
# Every measured frequency below is compared with an exact binomial quantile: a correct program crosses it with this
# probability, and the seeds are fixed.
RARE = 1e-9


@pytest.fixture(autouse=True)
def _no_claims_yet(monkeypatch):
    monkeypatch.setattr(verify, "_reported", {})


# --- the E-value, by enumeration of all count vectors ----------------------------------------------------------------

HOT, FLAT = tilt(S0, S0_REWARDS, 0.5), law(1 / 3, 1 / 3, 1 / 3)
VERSUS = {"none": [], "one": [HOT], "two": [HOT, FLAT], "narrower": [law(0.5, 0.5, 0)]}


def all_e_values(versus):
    counts = compositions(3, 20)
    probs = log_multinomial(counts, S0).exp()
    assert probs.sum().item() == pytest.approx(1, abs=1e-13)
    return counts, probs, torch.tensor([log_e_value(c.numpy(), S0, versus) for c in counts], dtype=F64).exp()


@pytest.mark.parametrize("versus", VERSUS)
def test_e_value_has_mean_one_and_obeys_markov(versus):
    counts, probs, e = all_e_values(VERSUS[versus])
    assert (probs * e).sum().item() == pytest.approx(1, abs=1e-12)
    for alpha in (0.5, 0.1, 0.01):
        assert 0 < probs[e >= 1 / alpha].sum().item() <= alpha  # not 0: the bound is not kept by never rejecting
    # The enumeration is no rubber stamp: a likelihood that is one part in a thousand too large shows.
    assert (probs * e * 1.001 ** counts[:, 0]).sum().item() > 1.005


def test_e_value_has_mean_one_on_a_single_draw_and_with_zeros():
    for target in (S0, law(0.5, 0.5, 0), law(1, 0, 0)):
        e = [math.exp(log_e_value(np.eye(3)[y], target, [HOT])) for y in range(3) if target[y] > -math.inf]
        seen = target[target > -math.inf].exp().tolist()
        # Mass that a declared law puts where the target has none is not part of the mean under the target.
        lost = 0.5 * HOT[target == -math.inf].exp().sum().item()
        assert math.fsum(p * x for p, x in zip(seen, e, strict=True)) == pytest.approx(1 - lost, abs=1e-13)


def test_e_value_by_hand():
    # n = 1, outcome of probability p: each Dirichlet-multinomial ratio is (k p / k) / p = 1; the directed one is q / p.
    assert log_e_value([0, 0, 1], S0) == pytest.approx(0, abs=1e-13)
    expected = 0.5 + 0.5 * HOT[2].exp().item() / 0.2
    assert math.exp(log_e_value([0, 0, 1], S0, [HOT])) == pytest.approx(expected, rel=1e-13)
    assert log_e_value([1, 0, 1], law(0.5, 0.5, 0)) == math.inf


def test_e_value_of_two_draws_by_hand():
    # n = 2, counts (2, 0), p = (1/2, 1/2): DM_k / p^2 = (k/2)(k/2 + 1) / (k (k + 1)) * 4 = (k + 2) / (k + 1)
    grid = [2 * g for g in (1 / 64, 1 / 16, 1 / 4, 1, 4, 16, 64, 256)]
    expected = sum((k + 2) / (k + 1) for k in grid) / 8
    assert math.exp(log_e_value([2, 0], law(0.5, 0.5))) == pytest.approx(expected, rel=1e-13)


# --- the E-value, beside sixty digits --------------------------------------------------------------------------------


def log_law(logps):
    """Normalise a law in sixty digits."""
    logs = [mpmath.mpf(x) for x in logps.tolist()]
    total = mpmath.log(mpmath.fsum(mpmath.exp(x) for x in logs))
    return [x - total for x in logs]


def reference(counts, target, versus=()):
    """The formula of the docstring, with (1 - c) log p for log p - c log p: sixty digits are few at log p = -1e300."""
    n, log_p, seen = sum(counts), log_law(target), [y for y, c in enumerate(counts) if c]
    logs = []
    for g in (mpmath.mpf(4) ** j for j in range(-3, 5)):
        k = g * n
        logs.append(mpmath.loggamma(k) - mpmath.loggamma(k + n))
        for y in seen:
            a, c = k * mpmath.exp(log_p[y]), counts[y]
            logs[-1] += mpmath.log(k) + (1 - c) * log_p[y] + mpmath.loggamma(a + c) - mpmath.loggamma(a + 1)
    log_e = log_mean(logs)
    if versus:
        laws = map(log_law, versus)
        log_e = log_mean([log_e, log_mean([mpmath.fsum(counts[y] * (q[y] - log_p[y]) for y in seen) for q in laws])])
    return log_e


def log_mean(logs):
    top = max(logs)
    return top if mpmath.isinf(top) else top + mpmath.log(mpmath.fsum(mpmath.exp(x - top) for x in logs) / len(logs))


def relative_error(got, want):
    if abs(want) > mpmath.mpf(10) ** 308:  # no float is that large
        return 0.0 if got == math.copysign(math.inf, want) else math.inf
    return float(abs(mpmath.mpf(got) - want) / max(1, abs(want)))


# A long double that is a double cannot do better at 1e15 counts, see `_excess_counts`.
PRECISION = 1e-9 if np.finfo(np.longdouble).eps < 1e-18 else 1e-7


def reference_laws(rng):
    def gaussian(k, scale):
        return torch.rand(k, generator=rng, dtype=F64) * scale

    yield "one outcome", law(1)
    yield "uniform", torch.log_softmax(torch.zeros(4, dtype=F64), -1)
    yield "ordinary", torch.log_softmax(gaussian(12, 4), -1)
    yield "wide", torch.log_softmax(-gaussian(12, 60), -1)
    yield "underflow", torch.log_softmax(torch.cat([gaussian(5, 3), vector(-800, -1e4)]), -1)
    yield "huge", torch.log_softmax(torch.cat([gaussian(5, 3), vector(-1e300)]), -1)
    yield "with a zero", torch.log_softmax(torch.cat([gaussian(5, 3), vector(-math.inf)]), -1)
    yield "float32", torch.log_softmax(gaussian(12, 4), -1).float()


def reference_counts(p, n, rng):
    """Typical counts, counts one in a thousand off, all on one outcome, and a few draws of the rarest."""
    probs = p.double().exp().numpy()
    for noise in (np.sqrt(n * probs), 1e-3 * n * probs):
        u = torch.rand(len(p), generator=rng, dtype=F64).numpy() * 4 - 2
        yield np.maximum(np.rint(n * probs + noise * u), 0)
    yield np.where(np.arange(len(p)) == n % len(p), n, 0)
    yield np.where(probs == probs.min(), 3, np.rint(n * probs))


@pytest.mark.parametrize("n", [1, 30, 1000, 10**6, 2**30 - 1, 2**30, 10**10, 10**12, 10**14, 10**15])
def test_log_e_value_in_sixty_digits(n, rng):
    with mpmath.workdps(60):
        for name, p in reference_laws(rng):
            distance = 10.0 ** -(9 * torch.rand(1, generator=rng, dtype=F64).item())
            near = p.double() + distance * torch.rand(len(p), generator=rng, dtype=F64)
            versus = [torch.log_softmax(near, -1), torch.log_softmax(torch.arange(len(p)).double(), -1)]
            for counts in reference_counts(p, n, rng):
                c = [int(x) for x in counts]
                if not sum(c):
                    continue
                if any(c[y] and p[y] == -math.inf for y in range(len(p))):
                    assert log_e_value(c, p, versus) == math.inf
                    continue
                for wrong in ([], versus[:1], versus):
                    error = relative_error(log_e_value(c, p, wrong), reference(c, p, wrong))
                    assert error <= PRECISION, (name, c, len(wrong), error)


def test_log_e_value_of_rare_outcomes_by_hand():
    # Outcomes so rare that their probability underflows used to count as evidence for the target.
    half = math.log(0.5)
    assert log_e_value([0, 0, 10], vector(half, half, -800)) == pytest.approx(7197.7904, abs=1e-4)
    assert log_e_value([0, 0, 1], vector(half, half, -1e300)) < 3  # one draw alone is no evidence, whatever its p
    assert log_e_value([0, 0, 2], vector(half, half, -1e300)) == pytest.approx(1e300)
    assert log_e_value([0, 0, 10**10], vector(half, half, -1e300)) == math.inf  # beyond the largest float
    # n/4 of each of four: every term is of order n log n, what is left is not.
    for n in (10**4, 10**12, 10**14, 4 * 10**15):
        assert log_e_value([n // 4] * 4, law(0.25, 0.25, 0.25, 0.25)) == pytest.approx(-0.6785, abs=1e-4)


def test_a_sampler_that_never_tilted_is_rejected(rng):
    target = tilt(law(1 / 3, 1 / 3, 1 / 3), vector(0, 1, 2), 0.001)
    drawn = sample(law(1 / 3, 1 / 3, 1 / 3), 10_000, generator=rng)
    assert match(drawn, target, claim="c").decision == "REJECT"
    assert match(torch.full((10_000,), 2), target, claim="c")


def test_a_law_may_hold_many_outcomes(rng):
    # More than fit in one block of columns: the sum over blocks is the sum over all.
    k = 30_000
    target, counts = random_law(k, rng), torch.zeros(k, dtype=torch.int64)
    counts[::2] = 7
    concentration = counts.sum().item() * verify._GRID
    a = concentration[:, None] * target.exp().numpy()
    terms = scipy.special.gammaln(a + counts.numpy()) - scipy.special.gammaln(a) - (counts * target).numpy()
    rest = scipy.special.gammaln(concentration) - scipy.special.gammaln(concentration + counts.sum().item())
    expected = scipy.special.logsumexp(terms.sum(1) + rest) - math.log(8)
    assert log_e_value(counts, target) == pytest.approx(expected, rel=1e-9)


# --- the plan, beside sixty digits -----------------------------------------------------------------------------------


@pytest.mark.parametrize("change", [1e-1, 1e-3, 1e-5, 1e-7, 1e-9, 1e-12])
def test_plan_for_laws_that_are_close(change, rng):
    target = random_law(1000, rng)
    sign = torch.randint(0, 2, (1000,), generator=rng) * 2 - 1
    wrong = torch.log_softmax(target + torch.log1p(change * sign), -1)
    with mpmath.workdps(60):
        log_p, log_q = log_law(target), log_law(wrong)
        ratios = [q - p for p, q in zip(log_p, log_q, strict=True)]
        chi2 = mpmath.fsum(mpmath.exp(p) * mpmath.expm1(x) ** 2 for p, x in zip(log_p, ratios, strict=True))
        square = mpmath.fsum(mpmath.exp(p) * x**2 for p, x in zip(log_p, ratios, strict=True))

        def samples_at(s):
            affinity = mpmath.fsum(mpmath.exp(p + (1 - s) * x) for p, x in zip(log_p, ratios, strict=True))
            return (mpmath.log(1e8) + s * mpmath.log(2e8)) / -mpmath.log(affinity)

        # The minimum over s of the numerator over s (1 - s) / 2 is at s = (sqrt(A (A + B)) - A) / B.
        big, more = mpmath.log(1e8), mpmath.log(2e8)
        s = (mpmath.sqrt(big * (big + more)) - big) / more
        second_order = (big + s * more) / (s * (1 - s) / 2)
        assert plan(target, wrong) >= samples_at(s) * (1 - 1e-4)  # the best s, up to terms of third order
        assert plan(target, wrong) <= samples_at(s) * (1 + 3 * change + 1e-4)
        if change < 0.01:
            assert plan(target, wrong) >= second_order / min(chi2, square) * (1 - 1e-9)
    few, many = plan(target, wrong, declared=None) * float(chi2), plan(UNIFORM8, law(*[0.126] * 4, *[0.124] * 4))
    assert few == pytest.approx(680.093, abs=1e-3 + change)  # the noncentrality for 1000 outcomes
    assert many > 0


@pytest.mark.parametrize("change", [3.0, 1e-3, 1e-7, 1e-12])
def test_outcomes_that_no_law_has_change_nothing(change, rng):
    target = random_law(50, rng)
    wrong = torch.log_softmax(target + change * torch.rand(50, generator=rng, dtype=F64), -1)
    none = torch.full((3,), -math.inf, dtype=F64)
    wide, wide_wrong = torch.cat([target, none]), torch.cat([wrong, none])
    assert plan(wide, wide_wrong) == pytest.approx(plan(target, wrong), rel=1e-9)
    if change < 1:  # far laws are told apart by so few samples that they have to be declared
        assert plan(wide, wide_wrong, declared=None) == pytest.approx(plan(target, wrong, declared=None), rel=1e-9)
    counts = np.rint(1e15 * wrong.exp().numpy())
    expected = log_e_value(counts, target, [wrong])
    assert log_e_value(np.append(counts, [0, 0, 0]), wide, [wide_wrong]) == pytest.approx(expected, rel=1e-9, abs=1e-9)


@pytest.mark.parametrize(
    ("p", "q"),
    [
        ([0.5, 0.2999, 0.2, 1e-4], [0.5001, 0.3, 0.1, 0.0999]),  # some outcomes close, some far
        ([0.9, 0.1, 0.0], [0.9, 0.0, 0.1]),
        ([0.9, 0.1], [0.905, 0.095]),
        ([1.0, 1e-300], [1e-300, 1.0]),  # nearly disjoint
        ([1e-3, 1 - 1e-3], [1 - 1e-9, 1e-9]),
        ([1e-300, 1.0], [0.3, 0.7]),
    ],
)
def test_plan_for_laws_that_are_far(p, q):
    target, wrong = law(*p), law(*q)
    with mpmath.workdps(60):
        log_p, log_q = log_law(target), log_law(wrong)
        pairs = [(a, b) for a, b in zip(log_p, log_q, strict=True) if mpmath.isfinite(a) and mpmath.isfinite(b)]

        def samples_at(s):
            affinity = mpmath.fsum(mpmath.exp(s * a + (1 - s) * b) for a, b in pairs)
            return (mpmath.log(1e8) + s * mpmath.log(2e8)) / -mpmath.log(affinity)

        # On a fine grid of s; between its points the bound is flat.
        least = min(samples_at(mpmath.mpf(i) / 2000) for i in range(1, 2000))
        ends = [samples_at(mpmath.mpf(10) ** -6), samples_at(1 - mpmath.mpf(10) ** -6)]
    assert plan(target, wrong) == pytest.approx(float(min([least, *ends])), rel=1e-4, abs=1)


def test_plan_counts_what_underflows():
    # All the difference is where p = e^-800: half of q is there.
    target, wrong = vector(0, -800), vector(math.log(0.5), math.log(0.5))
    assert plan(target, wrong, miss=2**-20) in (20, 21)  # as for p = 0
    with pytest.raises(ValueError, match="wrong must be declared here"):
        plan(target, wrong, declared=None)
    with pytest.raises(ValueError, match="wrong must differ from target where there is mass"):
        plan(vector(0, -800), vector(0, -810))


# --- false alarms and power, measured --------------------------------------------------------------------------------


def binomial_range(runs, chance):
    return scipy.stats.binom.ppf([RARE, 1 - RARE], runs, chance)


def drawn_counts(logps, n, runs, rng):
    return selection.candidate_counts(logps.expand(runs, -1), n, generator=rng).numpy()


@pytest.mark.slow
@pytest.mark.parametrize("versus", [False, True])
def test_false_alarms_stay_within_the_markov_bound(versus, rng):
    runs, alpha = 2000, 0.1
    target = random_law(8, rng)
    wrong = [tilt(target, torch.arange(8).double(), 20.0)] if versus else []
    alarms = sum(log_e_value(c, target, wrong) >= -math.log(alpha) for c in drawn_counts(target, 300, runs, rng))
    assert alarms <= scipy.stats.binom.ppf(1 - RARE, runs, alpha)


@pytest.mark.parametrize("k", [8, 64])
def test_planned_power_for_a_declared_law_is_reached(k, rng):
    runs, miss, alpha = 400, 0.1, 1e-8
    target = random_law(k, rng)
    wrong = tilt(target, torch.rand(k, generator=rng, dtype=F64), 2.0)
    other = tilt(target, torch.rand(k, generator=rng, dtype=F64), 2.0)
    n = plan(target, wrong, alpha=alpha, miss=miss, declared=2)
    counts = drawn_counts(wrong, n, runs, rng)
    hits = sum(log_e_value(c, target, [wrong, other]) >= -math.log(alpha) for c in counts)
    assert hits >= binomial_range(runs, 1 - miss)[0]
    # Chernoff's bound is not exact, but nothing is wasted either: half as many samples do not do it.
    few = drawn_counts(wrong, n // 2, runs, rng)
    hits = sum(log_e_value(c, target, [wrong, other]) >= -math.log(alpha) for c in few)
    assert hits < binomial_range(runs, 1 - miss)[0]


@pytest.mark.parametrize(("k", "miss"), [(8, 0.001), (8, 0.5), (64, 0.001), (64, 0.5)])
def test_planned_power_for_an_undeclared_law_agrees(k, miss, rng):
    runs, alpha = 400, 1e-8
    target = random_law(k, rng)
    wrong = tilt(target, torch.rand(k, generator=rng, dtype=F64), 2.0)
    n = plan(target, wrong, alpha=alpha, miss=miss, declared=None)
    hits = sum(log_e_value(c, target) >= -math.log(alpha) for c in drawn_counts(wrong, n, runs, rng))
    low, high = binomial_range(runs, 1 - miss)
    assert low <= hits <= high


def test_plan_for_a_declared_law_by_hand():
    # Bernoulli(1/2) against Bernoulli(3/4) and back: the smallest bound over s, on a fine grid of s.
    alpha, miss, m = 1e-8, 1e-6, 3
    p, q = np.array([0.5, 0.5]), np.array([0.75, 0.25])
    grid = [
        (-math.log(miss) + s * math.log(2 * m / alpha)) / -math.log((p**s * q ** (1 - s)).sum())
        for s in np.linspace(0.001, 0.999, 9981)
    ]
    assert plan(law(*p), law(*q), alpha=alpha, miss=miss, declared=m) == math.ceil(min(grid))


def test_plan_grows_as_the_laws_come_closer():
    sizes = [plan(S0, tilt(S0, S0_REWARDS, beta)) for beta in (1.0, 2.0, 4.0, 8.0)]
    assert sizes == sorted(sizes)
    assert plan(S0, HOT, miss=1e-6) > plan(S0, HOT, miss=1e-2)
    assert plan(S0, HOT, alpha=1e-8) > plan(S0, HOT, alpha=1e-2)
    assert plan(S0, HOT, declared=5) > plan(S0, HOT)
    assert plan(law(1, 0), law(0, 1)) == 1
    # A wrong law that puts half its mass where the target has none is found by E = inf: miss = (1/2)^n
    assert plan(law(1, 0), law(0.5, 0.5), miss=2**-20) in (20, 21)  # the infimum over s > 0 is 20


def chi_square_p_on_seen_cells(counts, probs):
    """The usual recipe: cells that were seen, target renormalised over them."""
    seen = counts > 0
    expected = probs[seen] / probs[seen].sum() * counts.sum()
    return scipy.stats.chisquare(counts[seen], expected).pvalue


def test_a_missing_outcome_is_rejected_where_chi_square_on_seen_cells_passes(rng):
    drawn = sample(without(UNIFORM8, 3), 10_000, generator=rng)
    counts = torch.bincount(drawn, minlength=8).numpy()
    assert counts[3] == 0
    assert chi_square_p_on_seen_cells(counts, UNIFORM8.exp().numpy()) > 1e-3  # the recipe sees nothing
    assert match(drawn, UNIFORM8, claim="sampler").decision == "REJECT"
    assert match(sample(UNIFORM8, 10_000, generator=rng), UNIFORM8, claim="sampler")


# --- match -----------------------------------------------------------------------------------------------------------


def test_match_decisions(rng):
    n = plan(S0, HOT)
    good, bad = sample(S0, n, generator=rng), sample(HOT, n, generator=rng)
    assert match(good, S0, claim="c", versus=[HOT]).decision == "PASS"
    assert match(bad, S0, claim="c", versus=[HOT]).decision == "REJECT"
    few = match(good[: n - 1], S0, claim="c", versus=[HOT])
    assert few.decision == "INCONCLUSIVE" and not few and few.plan == n and few.n == n - 1
    # Enough evidence against the law counts whatever the plan says.
    assert match(torch.full((60,), 2), S0, claim="c", versus=[tilt(S0, S0_REWARDS, 50.0)]).decision == "REJECT"
    # The plan is for the hardest of the declared laws, and for their number.
    near = tilt(S0, S0_REWARDS, 20.0)
    both = match(good, S0, claim="c", versus=[HOT, near])
    assert both.plan == max(plan(S0, HOT, declared=2), plan(S0, near, declared=2)) and not both
    verdict = match(good.view(1, -1), S0, claim="c")
    assert verdict and verdict.plan is None and verdict.alpha == 1e-8
    assert verdict.log10_e == pytest.approx(log_e_value(torch.bincount(good).numpy(), S0) / math.log(10))


def test_match_rejects_exactly_from_one_over_alpha():
    drawn = torch.tensor([0] * 12)
    e = math.exp(log_e_value([12, 0], law(0.5, 0.5)))
    assert match(drawn, law(0.5, 0.5), claim="c", alpha=1.0001 / e).decision == "REJECT"
    assert match(drawn, law(0.5, 0.5), claim="c", alpha=0.9999 / e).decision == "PASS"


def test_an_impossible_outcome_is_rejected_not_an_error():
    verdict = match(torch.tensor([0, 1, 2]), law(0.5, 0.5, 0), claim="c!impossible", versus=[S0])
    assert verdict.decision == "REJECT" and verdict.log10_e == math.inf
    assert "log10E=inf" in verdict.line()


INTEGERS = [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint64, torch.uint32, torch.uint16, torch.uint8]


@pytest.mark.parametrize("dtype", INTEGERS)
def test_samples_of_any_integer_type(dtype, rng):
    # A uint8 index is a mask to PyTorch; K = n lets such a mask pass for an index.
    target = random_law(100, rng)
    wrong = tilt(target, torch.rand(100, generator=rng, dtype=F64), 1.0)
    drawn, cells = sample(wrong, 100, generator=rng), torch.arange(100) % 7
    small, small_cells = drawn.to(dtype), cells.to(dtype)
    assert match(small, target.float(), claim="c") == match(drawn, target.float(), claim="c")
    for more, fewer in [({"log_q": wrong}, {"log_q": wrong}), ({}, {}), ({"cells": cells}, {"cells": small_cells})]:
        assert within(small, target, 0.5, claim="c", **fewer) == within(drawn, target, 0.5, claim="c", **more)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_law_in_half_precision_is_refused_by_name(dtype):
    flat = torch.full((4,), -math.log(4), dtype=F64)
    text = f"target must be float32 or float64, got {dtype}: rounded to that, it is another law"
    for check in (match, lambda y, p, claim: within(y, p, 0.5, claim=claim)):
        with pytest.raises(TypeError, match=text):
            check(Y, flat.to(dtype), claim="c")
    with pytest.raises(TypeError, match=r"versus\[0\] must be float32 or float64"):
        match(Y, flat, claim="c", versus=[torch.log_softmax(torch.arange(4.0), -1).to(dtype)])


@pytest.mark.parametrize("convert", [lambda x: x, list, np.asarray, torch.tensor, lambda x: torch.tensor(x).bfloat16()])
def test_numbers_may_be_lists_arrays_and_tensors(convert):
    x = [0.5, 0.25, 1.0]
    values = convert(x)
    assert exact(values, x, claim="c") and bound(values, x, claim="c") and verify.observed(values, x, claim="c")
    assert verify.mean(values, 0.5, low=0, high=1, claim="c") == verify.mean(x, 0.5, low=0, high=1, claim="c")
    assert verify.tv_upper_bound(values) == verify.tv_upper_bound(x)
    counts = convert([2.0, 3.0, 0.0])
    assert log_e_value(counts, S0) == log_e_value([2, 3, 0], S0)


# --- within ----------------------------------------------------------------------------------------------------------


def test_tv_upper_bound_of_zeros_and_ones():
    for n, delta in [(10**3, 1e-8), (10**4, 1e-2), (10**5, 1e-8)]:
        assert verify.tv_upper_bound(np.zeros(n), delta=delta) == pytest.approx(-math.log(delta) / (0.75 * n), rel=0.05)
    assert verify.tv_upper_bound(np.ones(100)) == pytest.approx(1)
    assert verify.tv_upper_bound([0.0]) == pytest.approx(1)
    assert verify.tv_upper_bound(torch.zeros(10**4)) < 0.01


def test_tv_upper_bound_wealth_by_hand():
    # One value 0, delta = 1/2. The bet sqrt(2 ln 2 / (1/4)) = 2.355 is capped at .75 / (1 - m): the wealth
    # 1 + .75 m / (1 - m) reaches 2 at m = 4/7, where the cap is 1.75 < 2.355.
    assert verify.tv_upper_bound([0.0], delta=0.5) == pytest.approx(4 / 7, rel=1e-12)
    # One value 1/2: 1 - l (1/2 - m) with l = min(2.355, .75 / (1 - m)) reaches 2 where (m - 1/2) 2.355 = 1 (m = .925)
    assert verify.tv_upper_bound([0.5], delta=0.5) == pytest.approx(0.5 + 1 / math.sqrt(8 * math.log(2)), rel=1e-12)


@pytest.mark.parametrize("kind", ["bernoulli", "uniform"])
@pytest.mark.parametrize("n", [5, 200])
def test_tv_upper_bound_covers_the_mean(kind, n, rng):
    runs, delta = 800, 0.1
    u = torch.rand(runs, n, generator=rng, dtype=F64)
    x, mean = ((u < 0.2).double(), 0.2) if kind == "bernoulli" else (u, 0.5)
    misses = sum(verify.tv_upper_bound(row, delta=delta) < mean for row in x.numpy())
    assert misses <= scipy.stats.binom.ppf(1 - RARE, runs, delta)


def test_tv_upper_bound_is_monotone(rng):
    x = torch.rand(300, generator=rng, dtype=F64).numpy() / 10
    bounds = [verify.tv_upper_bound(x, delta=delta) for delta in (0.5, 1e-2, 1e-8)]
    assert x.mean() < bounds[0] < bounds[1] < bounds[2]
    assert verify.tv_upper_bound(np.tile(x, 10)) < verify.tv_upper_bound(x)
    assert verify.tv_upper_bound(x) < verify.tv_upper_bound(x + 0.1)


def test_within_by_density_ratio(rng):
    q = tilt(S0, S0_REWARDS, 30.0)
    distance = total_variation(S0, q).item()
    drawn = sample(q, 40_000, generator=rng)
    verdict = within(drawn, S0, 2 * distance, claim="c", log_q=q)
    assert verdict and verdict.method == "ratio" and verdict.tv_lo <= distance <= verdict.tv_hi
    # The same numbers from callables, for laws that nobody can list.
    called = within(drawn, lambda y: S0[y], 2 * distance, claim="c", log_q=lambda y: q[y])
    assert called == verdict
    assert within(drawn, S0, distance / 2, claim="c", log_q=q).decision == "REJECT"
    assert within(drawn, S0, verdict.tv_hi * 0.999, claim="c", log_q=q).decision == "INCONCLUSIVE"
    # n = 2 ln(1/delta) / (.75 eps), so that the bound of a perfect sampler is eps / 2
    assert verdict.plan == math.ceil(2 * math.log(1e8) / (0.75 * 2 * distance))
    perfect = sample(S0, within(drawn, S0, 0.01, claim="c", log_q=S0).plan, generator=rng)
    assert within(perfect, S0, 0.01, claim="c", log_q=S0).tv_hi == pytest.approx(0.005, rel=0.02)
    # Where the target has more mass than the sampler, by whatever factor, nothing is missing.
    assert within(drawn, lambda y: S0[y] + 1e4, 0.5, claim="c", log_q=S0).tv_lo == 0
    # Outcomes that the target never has count in full.
    assert within(torch.tensor([1] * 500), law(1, 0), 0.5, claim="c", log_q=law(0, 1)).tv_lo > 0.9


def test_within_by_counts(rng):
    drawn = sample(S0, 100_000, generator=rng)
    verdict = within(drawn, S0, 0.02, claim="c")
    assert verdict and verdict.method == "counts" and verdict.tv_lo == 0
    far = within(drawn, HOT, 0.1, claim="c")
    assert far.decision == "REJECT" and far.tv_lo <= total_variation(S0, HOT).item() <= far.tv_hi
    assert far.tv_lo > 0.8 * total_variation(S0, HOT).item()
    assert within(drawn[:1000], S0, 0.02, claim="c").decision == "INCONCLUSIVE"
    assert within(drawn[:1], S0, 0.5, claim="c").tv_lo == 0
    # The radii by hand, K = 3, n = 100000, delta = 1e-8:
    # Weissman sqrt(ln((2^3 - 2) / delta) / 2n) = .010053;
    # McDiarmid sqrt(2 / n) / 2 + sqrt(ln(1 / delta) / 2n) = .011833
    distance = (torch.bincount(drawn).double() / 100_000 - S0.exp()).abs().sum().item() / 2
    assert verdict.tv_hi == pytest.approx(distance + math.sqrt(math.log(6e8) / 2e5), rel=1e-12)
    # For many outcomes McDiarmid's is smaller: K = 1024 gives sqrt(1023 / n) / 2 + sqrt(ln(1 / delta) / 2n).
    k, n = 1024, 10**5
    wide = sample(torch.full((k,), -math.log(k), dtype=F64), n, generator=rng)
    counts = np.bincount(wide.numpy(), minlength=k)
    radius = math.sqrt((k - 1) / n) / 2 + math.sqrt(math.log(1e8) / (2 * n))
    verdict = within(wide, torch.full((k,), -math.log(k), dtype=F64), 0.9, claim="c")
    assert verdict.tv_hi == pytest.approx(np.abs(counts / n - 1 / k).sum() / 2 + radius, rel=1e-9)


def test_within_plans_half_of_eps(rng):
    n = within(torch.tensor([0]), S0, 0.05, claim="c").plan
    drawn = sample(S0, n, generator=rng)
    distance = (torch.bincount(drawn, minlength=3).double() / n - S0.exp()).abs().sum().item() / 2
    assert within(drawn, S0, 0.05, claim="c").tv_hi - distance == pytest.approx(0.025, rel=1e-3)


def test_within_by_cells(rng):
    k = 5000
    target = random_law(k, rng)
    cells = torch.arange(k) % 4
    drawn = sample(target, 100_000, generator=rng)
    verdict = within(drawn, target, 0.05, claim="c", cells=cells)
    assert verdict and verdict.method == "cells(4)"
    margin = torch.stack([target[cells == i].logsumexp(0) for i in range(4)])
    assert verdict.tv_hi == pytest.approx(within(cells[drawn], margin, 0.05, claim="c").tv_hi, rel=1e-9)
    shifted = (drawn // 4 * 4).clamp(max=k - 1)  # everything falls into cell 0
    assert within(shifted, target, 0.05, claim="c", cells=cells).decision == "REJECT"


@pytest.mark.parametrize("tier", ["counts", "ratio"])
def test_within_rarely_errs_in_either_direction(tier, rng):
    # delta bounds the chance that tv_hi is below the truth, and the chance that tv_lo is above it.
    runs, delta = 400, 0.1
    q = tilt(S0, S0_REWARDS, 4.0)
    distance = total_variation(q, S0).item()
    too_low = too_high = 0
    for _ in range(runs):
        log_q = q if tier == "ratio" else None
        verdict = within(sample(q, 100, generator=rng), S0, 0.5, claim="c", delta=delta, log_q=log_q)
        too_low += verdict.tv_hi < distance
        too_high += verdict.tv_lo > distance
    assert max(too_low, too_high) <= scipy.stats.binom.ppf(1 - RARE, runs, delta)


def test_within_does_not_mistake_noise_for_a_distance(rng):
    # 200 outcomes, 200 samples of the very target: every event that looks too frequent was learnt from noise.
    runs, delta = 100, 0.1
    target = random_law(200, rng)
    alarms = sum(
        within(sample(target, 200, generator=rng), target, 0.5, claim="c", delta=delta).tv_lo > 0 for _ in range(runs)
    )
    assert alarms <= scipy.stats.binom.ppf(1 - RARE, runs, delta)


# --- exact and bound -------------------------------------------------------------------------------------------------


def test_exact():
    assert exact(vector(1, 2), vector(1, 2 + 1e-13), claim="c")
    assert exact(1.0, 1.0 + 0.9e-3, 1e-3, claim="c")
    assert not exact(1.0, 1.0 + 1.1e-3, 1e-3, claim="c")
    assert exact(vector(0, -math.inf), vector(0, -math.inf), claim="c").error == 0
    assert exact(vector(0, math.inf), vector(0, -math.inf), claim="c").error == math.inf
    assert exact(math.nan, math.nan, claim="c").decision == "REJECT"
    assert exact(vector(1, math.nan), 1.0, claim="c").decision == "REJECT"
    assert exact(vector(3, 3, 3), 3, claim="c").n == 3
    assert exact(vector(1).requires_grad_(), [1], claim="c")
    assert exact([1.0, 5.0], [1.0, 2.0], claim="c").error == 3


def test_exact_compares_integers_and_complex_numbers_as_they_are():
    for big in (2**53, 2**62, 10**400):
        assert exact(big + 1, big + 1, claim="c") and exact(big + 1, big, claim="c").decision == "REJECT"
    assert exact(torch.tensor([2**53 + 1]), [2**53], claim="c").error == 1
    assert exact(2**60, float(2**60), claim="c")  # fits into a float
    assert exact(3 + 4j, 0, claim="c").error == 5
    assert exact(torch.tensor([1 + 1e-3j]), [1], claim="c").decision == "REJECT"
    assert exact(complex(1, math.nan), complex(1, math.nan), claim="c").decision == "REJECT"
    assert exact([True, False], [1, 0], claim="c")
    assert exact([vector(1)[0], 2.0], vector(1, 2), claim="c")


def test_an_observation_is_noted_and_never_a_claim(capsys):
    verdict = verify.observed([0.1, 0.5], 0.6, claim="c")
    assert verdict and verdict.decision == "NOTE" and verdict.n == 2 and verdict.eps == 0.6
    report(verdict)
    assert capsys.readouterr().out == "NOTE   observed  c  n=2  limit=0.6\n"
    missed = verify.observed([0.1, 0.7], 0.6, claim="d")
    assert not missed
    with pytest.raises(ClaimFailed, match="REJECT observed  d"):
        report(missed)
    assert not verify.observed(math.nan, 1.0, claim="c") and not verify.observed(0.0, math.nan, claim="c")
    assert verify.observed([0.1, 0.5], [0.2, 0.6], claim="c").line() == "NOTE   observed  c  n=2"
    with pytest.raises(ValueError, match="check must test a claim, got the observation 'c!x'"):
        falsify(lambda x: verify.observed(x, 0.6, claim="c"), 0.9, claim="c!x")


def test_a_bound_carries_the_chance_that_its_certificates_are_false():
    assert bound(1, 2, claim="c").delta is None
    verdict = bound(1, 2, claim="c", delta=1e-8)
    assert verdict and verdict.delta == 1e-8 and verdict.line() == "PASS   bound   c  n=1  delta=1e-08"


def test_bound():
    verdict = bound(vector(1, 2, 3), vector(1, 2.5, 3), claim="c")
    assert verdict and verdict.n == 3 and verdict.error == 0
    assert bound(1 + 1e-13, 1, claim="c") and not bound(1 + 1e-11, 1, claim="c")
    assert bound(1e6 + 1e-7, 1e6, claim="c") and not bound(1e6 + 1e-5, 1e6, claim="c")
    assert bound(vector(1, 2), 2, claim="c") and not bound(vector(1, 3), 2, claim="c")
    assert bound(math.inf, math.inf, claim="c") and bound(-math.inf, 0, claim="c") and bound(0, math.inf, claim="c")
    assert not bound(math.inf, 0, claim="c") and not bound(math.nan, 0, claim="c") and not bound(0, math.nan, claim="c")
    assert bound([3.0, 1.0], [1.0, 1.0], claim="c").error == 2


# --- mean ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("versus", [[], [0.9], [0.2, 1.3]])
def test_e_value_of_a_mean_has_mean_one(versus):
    # Three values in [-1, 3] with mean .5, every count vector of 12 of them.
    values, probs = np.array([-1.0, 0.5, 3.0]), vector(0.25, 0.6, 0.15)
    counts = compositions(3, 12)
    chance = log_multinomial(counts, probs.log()).exp().numpy()
    assert values @ probs.numpy() == pytest.approx(0.5)

    def e_values(expected):
        verdicts = [
            verify.mean(np.repeat(values, c), expected, low=-1, high=3, claim="c", versus=versus) for c in counts
        ]
        return np.array([10**v.log10_e for v in verdicts])

    e = e_values(0.5)
    assert chance @ e == pytest.approx(1, abs=1e-12)
    for alpha in (0.5, 0.2):
        assert 0 < chance[e >= 1 / alpha].sum() <= alpha
    assert abs(chance @ e_values(0.52) - 1) > 1e-3  # a mean that is off shows


def test_e_value_of_a_mean_by_hand():
    # n = 1, x = 1, m = 1/4: bets 4 f and -4/3 f win 3/4 of themselves, f = 1/2, ..., 2^-12 with mean (1 - 2^-12) / 12.
    f = (1 - 2**-12) / 12
    fixed = ((1 + 3 * f) + (1 - f)) / 2
    assert 10 ** verify.mean([7.0], 4.0, low=3, high=7, claim="c").log10_e == pytest.approx(fixed, rel=1e-12)
    # A declared mean of 1/2 bets (1/2 - 1/4) / (3/16) = 4/3 and wins 1.
    one = verify.mean([7.0], 4.0, low=3, high=7, claim="c", versus=[5.0])
    assert 10**one.log10_e == pytest.approx(fixed / 2 + (1 + 1) / 2, rel=1e-12)


@pytest.mark.parametrize("scale", [1e-290, 1.0, 1e300])
@pytest.mark.parametrize("expected", [1e-15, 1e-3, 0.3, 1 - 2**-40, 1 - 2**-53])
def test_e_value_of_a_mean_in_sixty_digits(expected, scale, rng):
    values = np.concatenate([[0.0, 1.0], torch.rand(20, generator=rng, dtype=F64).numpy(), np.full(30, expected)])
    versus = [0.5, expected * (1 - 1e-9), 1 - 2**-53 if expected < 0.9 else 2**-53]
    got = verify.mean(
        values * scale, expected * scale, low=0, high=scale, claim="c", versus=[q * scale for q in versus]
    )
    with mpmath.workdps(60):
        x, m = [mpmath.mpf(v) * scale for v in values.tolist()], mpmath.mpf(expected * scale) / scale
        x = [mpmath.mpf(float(v)) / scale for v in x]  # as rounded by the product with the scale
        bets = [f / m for f in (mpmath.mpf(2) ** -j for j in range(1, 13))]
        bets += [-f / (1 - m) for f in (mpmath.mpf(2) ** -j for j in range(1, 13))]
        fixed = log_mean([mpmath.fsum(mpmath.log(1 + b * (v - m)) for v in x) for b in bets])
        wrong = [mpmath.mpf(q * scale) / scale for q in versus]
        directed = [mpmath.fsum(mpmath.log(v * q / m + (1 - v) * (1 - q) / (1 - m)) for v in x) for q in wrong]
        want = log_mean([fixed, log_mean(directed)])
        assert relative_error(got.log10_e * math.log(10), want) < 1e-9


def test_a_mean_may_be_a_float_away_from_an_end():
    # (v - mean) / (high - mean) is beyond the largest float: log E is about 600 log 10, not infinite and not NaN.
    verdict = verify.mean([-1e300] + [0.0] * 10, -1e-300, low=-1e300, high=0, claim="c")
    # All but one bet of each size win nothing: log E = log mean_j (bet_j 1e600 (1 - bet_j)^10) / 2, bet_j = 2^-j.
    bets = [2.0**-j * (1 - 2.0**-j) ** 10 for j in range(1, 13)]
    assert verdict.log10_e == pytest.approx(600 + math.log10(sum(bets) / 24), rel=1e-12)


def test_a_mean_that_rounds_to_an_end_is_judged():
    # 1 - m is 0 in floats: bets of size 1 / (1 - m) used to give NaN, and NaN passed.
    check = lambda values: verify.mean(values, 1 - 1e-14, low=-1000, high=1, claim="c")  # noqa: E731
    verdict = check([1.0] * 2500 + [-1000.0] * 2500)
    assert verdict.decision == "REJECT" and verdict.log10_e > 1000
    assert check([1.0] * 5000)


@pytest.mark.parametrize("log_e", [math.nan, math.inf])
def test_no_verdict_passes_on_nan(log_e):
    verdict = verify._e_verdict("c", "match", 5, log_e, None, 0, 1e-8, 1e-8)
    assert verdict.decision == "REJECT" and f"log10E={log_e}" in verdict.line()
    nothing = verify._e_verdict("c", "match", 5, -math.inf, None, 0, 1e-8, 1e-8)
    assert nothing.decision == "PASS" and "log10E=-inf" in nothing.line()


@pytest.mark.slow
@pytest.mark.parametrize("hardest", [True, False])
def test_planned_power_for_a_wrong_mean_is_reached(hardest, rng):
    runs, miss, alpha, low, high = 400, 0.1, 1e-8, 0.0, 2.0
    n = verify.plan_mean(1.0, 1.2, low=low, high=high, alpha=alpha, miss=miss, declared=2)
    assert n == plan(law(0.5, 0.5), law(0.4, 0.6), alpha=alpha, miss=miss, declared=2)

    def hits(n):
        u = torch.rand(runs, n, generator=rng, dtype=F64)
        x = high * (u < 0.6) if hardest else 0.4 + 1.6 * u  # both have mean 1.2
        checks = (verify.mean(row, 1.0, low=low, high=high, claim="c", versus=[1.2, 0.7], alpha=alpha) for row in x)
        return sum(v.decision == "REJECT" for v in checks)

    assert hits(n) >= binomial_range(runs, 1 - miss)[0]
    if hardest:
        assert hits(n // 2) < binomial_range(runs, 1 - miss)[0]


def test_a_true_mean_passes_and_small_errors_are_found(rng):
    x = 1 + torch.rand(25_000, generator=rng, dtype=F64)
    check = lambda values: verify.mean(values, 1.5, low=0, high=9, claim="c", versus=[1.6])  # noqa: E731
    assert check(x).decision == "INCONCLUSIVE"  # the plan is for every law on [0, 9]
    assert verify.mean(x, 1.5, low=1, high=2, claim="c", versus=[1.55])
    # Values that vary little: an error of 2 per cent, which no plan for [0, 9] would promise.
    assert check(x * 1.02).decision == "REJECT" and check(x * 0.98).decision == "REJECT"


# --- lines -----------------------------------------------------------------------------------------------------------

LINES = {
    "PASS   match   soft-bon-law  n=131072  plan=120000  log10E=-42  reject_at=8  power=1-1e-06  alpha=1e-08": Verdict(
        "soft-bon-law", "match", "PASS", 131072, plan=120000, alpha=1e-8, miss=1e-6, log10_e=-41.2
    ),
    "PASS   match   a  n=5  plan=4  declared=2  log10E=0  reject_at=8  power=1-1e-08  alpha=1e-08": Verdict(
        "a", "match", "PASS", 5, plan=4, declared=2, alpha=1e-8, miss=1e-8, log10_e=0.9
    ),
    "PASS   match   a  n=5  log10E=0  reject_at=8  alpha=1e-08": Verdict(
        "a", "match", "PASS", 5, alpha=1e-8, miss=1e-6, log10_e=0.9
    ),
    "INCONCLUSIVE match   a  n=5  plan=6  log10E=-1  reject_at=8  power=1-1e-06  alpha=1e-08": Verdict(
        "a", "match", "INCONCLUSIVE", 5, plan=6, alpha=1e-8, miss=1e-6, log10_e=-0.1
    ),
    "REJECT match   a!beta*1.05  n=5  log10E=29  reject_at=8  [expected]": Verdict(
        "a!beta*1.05", "match", "REJECT", 5, plan=6, alpha=1e-8, miss=1e-6, log10_e=29.9
    ),
    "PASS   mean    a  n=5  plan=4  log10E=0  reject_at=8  power=1-1e-06  alpha=1e-08": Verdict(
        "a", "mean", "PASS", 5, plan=4, alpha=1e-8, miss=1e-6, log10_e=0.9
    ),
    "REJECT mean    a!x  n=5  log10E=9  reject_at=8  [expected]": Verdict(
        "a!x", "mean", "REJECT", 5, plan=4, alpha=1e-8, miss=1e-6, log10_e=9.9
    ),
    "PASS   within  a  n=9  plan=8  tv_hi=0.021  eps=0.03  delta=1e-08  tier=ratio": Verdict(
        "a", "within", "PASS", 9, plan=8, tv_lo=0.0, tv_hi=0.02001, eps=0.03, delta=1e-8, method="ratio"
    ),
    "REJECT within  a!x  n=9  tv_lo=0.049  eps=0.03  delta=1e-08  tier=counts  [expected]": Verdict(
        "a!x", "within", "REJECT", 9, plan=8, tv_lo=0.04999, tv_hi=1.0, eps=0.03, delta=1e-8, method="counts"
    ),
    "PASS   exact   a  n=3  eps=1e-12": Verdict("a", "exact", "PASS", 3, eps=1e-12, error=3.1e-17),
    "REJECT exact   a!x  n=3  error=3.1e-02  eps=1e-12  [expected]": Verdict(
        "a!x", "exact", "REJECT", 3, eps=1e-12, error=0.0312
    ),
    "PASS   bound   a  n=7": Verdict("a", "bound", "PASS", 7, error=-0.3),
    "REJECT bound   a!x  n=7  excess=3.0e-01  [expected]": Verdict("a!x", "bound", "REJECT", 7, error=0.3),
}


@pytest.mark.parametrize("line", LINES)
def test_lines(line):
    assert LINES[line].line() == line


def test_a_verdict_is_true_only_for_pass_and_note():
    decisions = ("PASS", "NOTE", "REJECT", "INCONCLUSIVE")
    assert [bool(Verdict("a", "exact", d, 1)) for d in decisions] == [True, True, False, False]


@pytest.mark.parametrize("x", [0.02, 0.02001, 0.0999, 0.1, 0.995, 1.0, 3.3e-7, 1 - 1e-12])
def test_printed_bounds_stay_bounds(x):
    def printed(claim, **tv):
        line = Verdict(claim, "within", "PASS", 1, plan=1, eps=0.5, delta=1e-8, method="ratio", **tv).line()
        return float(line.split("tv_")[1].split("  ")[0].split("=")[1])

    # Up or down to two digits; a value that has two digits already is printed as it is.
    high, low = printed("a", tv_lo=0.0, tv_hi=x), printed("a!x", tv_lo=x, tv_hi=1.0)
    assert x * (1 - 1e-9) <= high <= x * 1.1 + 1e-15
    assert x / 1.1 - 1e-15 <= low <= x * (1 + 1e-9)
    if x == 0.02:
        assert high == low == 0.02


# --- report and falsify ----------------------------------------------------------------------------------------------


def passing(claim="c"):
    return exact(1.0, 1.0, claim=claim)


def test_report_prints_the_line(capsys):
    report(passing())
    assert capsys.readouterr().out == passing().line() + "\n"


@pytest.mark.parametrize("decision", ["REJECT", "INCONCLUSIVE"])
def test_report_raises_unless_passed(decision, capsys):
    verdict = Verdict("c", "match", decision, 5, plan=6, alpha=1e-8, miss=1e-6, log10_e=9.0)
    with pytest.raises(ClaimFailed) as failed:
        report(verdict)
    assert str(failed.value) == verdict.line() and issubclass(ClaimFailed, AssertionError)
    assert capsys.readouterr().out == ""


def test_report_refuses_falsifiers():
    with pytest.raises(ValueError, match="claim must not contain '!', .* got 'c!x'"):
        report(passing("c!x"))


def test_a_claim_id_is_used_once():
    with pytest.raises(ValueError, match="claim must be a new id, got 'loop', already reported"):
        for _ in range(2):
            report(passing("loop"))
    report(passing("first"))
    with pytest.raises(ValueError, match="claim must be a new id, got 'first', already reported"):
        report(passing("first"))
    falsify(lambda x: exact(x, 1.0, claim="first"), 2.0, claim="first!two")
    with pytest.raises(ValueError, match="claim must be a new id, got 'first!two'"):
        falsify(lambda x: exact(x, 1.0, claim="first"), 2.0, claim="first!two")
    with pytest.raises(ClaimFailed):  # a failed claim leaves its id free
        report(exact(1.0, 2.0, claim="failed"))
    report(passing("failed"))


def own_frames(frame):
    """The frames from here outward, without those that mutmut puts between a caller and the function it calls."""
    while frame is not None:
        if not frame.f_globals["__name__"].startswith("mutmut."):
            yield frame
        frame = frame.f_back


def test_a_notebook_cell_may_run_again_but_not_report_twice(monkeypatch):
    monkeypatch.setattr(sys, "_getframe", lambda depth, now=sys._getframe: list(own_frames(now(1)))[depth])
    # Notebook cells: every one starts at line 1, of a file of its own; each run has a number.
    program = "from tiltlib import verify as v; v.report(v.exact(1, 1, claim='cell'))"
    for run, file in ((1, "<cell 1>"), (2, "<cell 1>"), (7, "<cell 1>")):
        monkeypatch.setattr(verify, "_cell_run", lambda run=run: run)
        exec(compile(program, file, "exec"))
    with pytest.raises(ValueError, match="claim must be a new id, got 'cell'"):  # the same run: a loop
        exec(compile(program, "<cell 1>", "exec"))
    monkeypatch.setattr(verify, "_cell_run", lambda: 8)
    with pytest.raises(ValueError, match="claim must be a new id, got 'cell'"):  # another cell
        exec(compile(program, "<cell 2>", "exec"))


def test_falsify_prints_the_rejection(capsys):
    # Nothing is returned: a cell may end in it without showing a repr.
    assert falsify(lambda x: exact(x, 1.0, claim="c"), 1.5, claim="c!half") is None
    assert capsys.readouterr().out == "REJECT exact   c!half  n=1  error=5.0e-01  eps=1e-12  [expected]\n"


def test_falsify_raises_when_not_rejected(rng):
    with pytest.raises(ClaimFailed, match="falsifier was not rejected: PASS"):
        falsify(lambda x: exact(x, 1.0, claim="c"), 1.0, claim="c!same")
    few = sample(S0, 10, generator=rng)
    with pytest.raises(ClaimFailed, match="falsifier was not rejected: INCONCLUSIVE"):
        falsify(lambda x: match(x, S0, claim="c", versus=[HOT]), few, claim="c!few")


def test_falsify_wants_a_clear_miss():
    def check(x):
        return exact(x, 1.0, 1e-6, claim="c")

    with pytest.raises(ClaimFailed, match="falsifier misses by less than 100 eps"):
        falsify(check, 1 + 99e-6, claim="c!near")
    falsify(check, 1 + 101e-6, claim="c!far")
    falsify(lambda x: bound(x, 1.0, claim="c"), 1 + 1e-6, claim="c!bound")  # an inequality is violated or it is not


@pytest.mark.parametrize("claim", ["c", "!x", "c!", "c", "!"])
def test_falsify_wants_a_falsifier_id(claim):
    with pytest.raises(ValueError, match="claim must be of the form id!name, got"):
        falsify(lambda x: exact(x, 1.0, claim="c"), 2.0, claim=claim)


# --- rng -------------------------------------------------------------------------------------------------------------


def test_rng_is_seeded_by_the_name():
    digest = hashlib.sha256(b"gibbs-principle|").hexdigest()
    seed = int(digest[:16], 16) // 2  # the first 64 bits, without the last
    generator = verify.rng("gibbs-principle")
    assert generator.initial_seed() == seed == 3378659224067533519
    assert generator.device.type == "cpu"
    assert torch.equal(torch.rand(3, generator=generator), torch.rand(3, generator=verify.rng("gibbs-principle")))
    others = [verify.rng("gibbs-principle", salt="1"), verify.rng("gibbs-principle", salt="2"), verify.rng("tilt-path")]
    seeds = {seed, *(g.initial_seed() for g in others)}
    assert len(seeds) == 4


# --- errors ----------------------------------------------------------------------------------------------------------

Y = torch.tensor([0, 1, 2, 2])


@pytest.mark.parametrize("claim", ["", "two words", "tab\t", None, 3])
@pytest.mark.parametrize(
    "call",
    [
        lambda claim: match(Y, S0, claim=claim),
        lambda claim: within(Y, S0, 0.1, claim=claim),
        lambda claim: exact(1, 1, claim=claim),
        lambda claim: bound(1, 1, claim=claim),
        lambda claim: falsify(passing, "c", claim=claim),
        lambda claim: verify.rng(claim),
    ],
)
def test_malformed_ids(call, claim):
    with pytest.raises(ValueError, match="claim must be a non-empty id without spaces, got"):
        call(claim)


@pytest.mark.parametrize(
    "check", [lambda y, p: match(y, p, claim="c"), lambda y, p: within(y, p, 0.1, claim="c")], ids=["match", "within"]
)
@pytest.mark.parametrize(
    ("samples", "target", "error", "text"),
    [
        (Y.double(), S0, TypeError, "samples must be an integer torch.Tensor, got a torch.float64 tensor"),
        ([0, 1], S0, TypeError, "samples must be an integer torch.Tensor, got list"),
        (Y[:0], S0, ValueError, "samples must hold at least one number, got shape"),
        (Y + 1, S0, ValueError, r"samples must lie in 0\.\.2, got values from 1 to 3"),
        (Y - 1, S0, ValueError, r"samples must lie in 0\.\.2, got values from -1 to 1"),
        (Y, S0 + 0.01, ValueError, "target must be log-probabilities that sum to 1"),
        (Y, [0.0], TypeError, "target must be a floating-point torch.Tensor"),
        (Y, S0.view(1, 3), ValueError, r"target must be one law of shape \(K,\), got shape \(1, 3\)"),
    ],
)
def test_bad_samples(check, samples, target, error, text):
    with pytest.raises(error, match=text):
        check(samples, target)


@pytest.mark.parametrize("bad", [0.0, 1.0, -0.1, math.nan])
@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("alpha", lambda x: match(Y, S0, claim="c", alpha=x)),
        ("miss", lambda x: match(Y, S0, claim="c", miss=x)),
        ("miss", lambda x: match(Y, S0, claim="c", versus=[HOT], miss=x)),
        ("alpha", lambda x: plan(S0, HOT, alpha=x)),
        ("alpha", lambda x: verify.mean([0.5], 0.5, low=0, high=1, claim="c", alpha=x)),
        ("miss", lambda x: verify.mean([0.5], 0.5, low=0, high=1, claim="c", miss=x)),
        ("miss", lambda x: verify.plan_mean(0.5, 0.4, low=0, high=1, miss=x)),
        ("miss", lambda x: plan(S0, HOT, miss=x)),
        ("delta", lambda x: verify.tv_upper_bound([0.5], delta=x)),
        ("delta", lambda x: within(Y, S0, 0.1, claim="c", delta=x)),
        ("eps", lambda x: within(Y, S0, x, claim="c")),
        ("delta", lambda x: bound(1, 2, claim="c", delta=x)),
    ],
)
def test_bad_probabilities(name, call, bad):
    with pytest.raises(ValueError, match=f"{name} must lie strictly between 0 and 1, got {bad}"):
        call(bad)


def unit_mean(values, expected=0.5, *, high=1.0, **more):
    return verify.mean(values, expected, low=0, high=high, claim="c", **more)


WIDE = torch.full((2000,), -math.log(2000), dtype=F64)


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda: log_e_value([1, 2], S0), ValueError, "counts must be 3 whole numbers >= 0 with a positive sum"),
        (lambda: log_e_value([1, 2, -1], S0), ValueError, "counts must be 3 whole numbers >= 0"),
        (lambda: log_e_value([1, 2, 0.5], S0), ValueError, "counts must be 3 whole numbers >= 0"),
        (lambda: log_e_value([1, 2, math.nan], S0), ValueError, "counts must be 3 whole numbers >= 0"),
        (lambda: log_e_value([1, 2, math.inf], S0), ValueError, "counts must be 3 whole numbers >= 0"),
        (lambda: log_e_value([1, 2, 2**53 + 2], S0), ValueError, r"counts must be .* none above 2\^53"),
        (lambda: log_e_value(["1", "2", "3"], S0), TypeError, "counts must hold numbers, got str"),
        (lambda: log_e_value([0, 0, 0], S0), ValueError, "counts must be 3 .* with a positive sum"),
        (lambda: log_e_value([1, 2, 3], S0 + 1), ValueError, "target must be log-probabilities that sum to 1"),
        (lambda: log_e_value([1, 2, 3], S0, [S0 + 1]), ValueError, r"versus\[0\] must be log-probabilities"),
        (lambda: log_e_value([1, 2, 3], S0, [HOT, [0.0]]), TypeError, r"versus\[1\] must be a floating-point"),
        (lambda: log_e_value([1, 2, 3], S0, [UNIFORM8]), ValueError, r"versus\[0\] must have 3 outcomes .* got 8"),
        (lambda: match(Y, S0, claim="c", versus=[UNIFORM8]), ValueError, r"versus\[0\] must have 3 outcomes"),
        (
            lambda: match(Y, S0, claim="c", versus=[S0]),
            ValueError,
            r"versus\[0\] must differ from target, got the same",
        ),
        (lambda: plan(S0, S0), ValueError, "wrong must differ from target, got the same law"),
        (lambda: plan(S0, UNIFORM8), ValueError, "wrong must have 3 outcomes as target does, got 8"),
        (lambda: plan([0.0], S0), TypeError, "target must be a floating-point torch.Tensor"),
        (lambda: plan(S0, [0.0]), TypeError, "wrong must be a floating-point torch.Tensor"),
        (lambda: plan(S0 + 1, S0), ValueError, "target must be log-probabilities"),
        (lambda: plan(S0, S0 + 1), ValueError, "wrong must be log-probabilities"),
        (lambda: plan(S0, HOT, declared=0), ValueError, "declared must be an integer >= 1, got 0"),
        (lambda: plan(law(1, 0), law(0.5, 0.5), declared=None), ValueError, "wrong must have its support in that of"),
        (
            lambda: plan(law(0.999, 0.001), law(0.5, 0.5), declared=None),
            ValueError,
            "wrong must be declared here: .* below the 5",
        ),
        (lambda: unit_mean([]), ValueError, "values must hold at least one number, got none"),
        (lambda: unit_mean([0.5, 1.5]), ValueError, r"values must lie in \[0, 1\], got values from 0.5 to 1.5"),
        (lambda: unit_mean([math.nan]), ValueError, r"values must lie in \[0, 1\], got values from nan"),
        (lambda: unit_mean([0.5], 1.0), ValueError, "expected must lie strictly between low = 0 and high = 1, got 1.0"),
        (lambda: unit_mean([0.5], versus=[0.0]), ValueError, r"versus\[0\] must lie strictly between low = 0 and high"),
        (lambda: unit_mean([0.5], versus=[0.5]), ValueError, r"versus\[0\] must differ from expected, got 0.5 twice"),
        (
            lambda: unit_mean([0.5], high=math.inf),
            ValueError,
            "low and high must be finite with low < high, got 0 and inf",
        ),
        (lambda: unit_mean([0.5], high=-1), ValueError, "low and high must be finite with low < high, got 0 and -1"),
        (lambda: verify.plan_mean(0.5, 2.0, low=0, high=1), ValueError, "wrong must lie strictly between"),
        (lambda: verify.tv_upper_bound([]), ValueError, r"x must hold at least one value, each in \[0, 1\], got none"),
        (lambda: verify.tv_upper_bound([0.5, 1.1]), ValueError, r"x must hold at least one value, each in \[0, 1\]"),
        (lambda: verify.tv_upper_bound([-0.1]), ValueError, "x must hold at least one value"),
        (lambda: verify.tv_upper_bound([math.nan]), ValueError, "x must hold at least one value"),
        (lambda: within(Y, WIDE, 0.1, claim="c"), ValueError, "target must have at most 1024 outcomes .* got 2000"),
        (lambda: within(Y, lambda y: S0[y], 0.1, claim="c"), ValueError, "target must be .* got a function"),
        (
            lambda: within(Y, S0, 0.1, claim="c", cells=Y),
            ValueError,
            r"cells must be .* of shape \(3,\)",
        ),
        (lambda: within(Y, S0, 0.1, claim="c", cells=S0), TypeError, "cells must be an integer torch.Tensor"),
        (
            lambda: within(Y, S0, 0.1, claim="c", cells=Y, log_q=S0),
            ValueError,
            "cells must be None when log_q is given",
        ),
        (lambda: bound([1.0, 2.0], [1.0, 2.0, 3.0], claim="c"), ValueError, r"lhs and rhs must broadcast, got .*2,"),
        (
            lambda: within(Y, WIDE, 0.1, claim="c", cells=torch.arange(2000)),
            ValueError,
            r"cells must be numbers in 0\.\.1023",
        ),
        (lambda: within(Y + 1, S0, 0.1, claim="c", log_q=S0), ValueError, r"samples must lie in 0\.\.2"),
        (lambda: within(Y, S0, 0.1, claim="c", log_q=S0 + 1), ValueError, "log_q must be log-probabilities"),
        (lambda: within(Y, S0, 0.1, claim="c", log_q=law(0.5, 0.5, 0)), ValueError, "samples must have finite log_q"),
        (
            lambda: within(Y, lambda y: S0[y[:1]], 0.1, claim="c", log_q=S0),
            ValueError,
            "target must give one number per sample",
        ),
        (lambda: exact([1, 2], [1, 2, 3], claim="c"), ValueError, r"same shape, got \(2,\) and \(3,\)"),
        (lambda: exact([], 1, claim="c"), ValueError, "value must hold at least one number, got none"),
        (lambda: exact(1, [], claim="c"), ValueError, "expected must hold at least one number, got none"),
        (lambda: exact(1, 1, 0.0, claim="c"), ValueError, "eps must be finite and > 0, got 0.0"),
        (lambda: exact(1, 1, math.inf, claim="c"), ValueError, "eps must be finite and > 0"),
        (lambda: exact("1.0", 1.0, claim="c"), TypeError, "value must hold numbers, got str"),
        (lambda: exact(1.0, None, claim="c"), TypeError, "expected must hold numbers, got NoneType"),
        (lambda: exact([[1], [1, 2]], 1, claim="c"), ValueError, "value must hold numbers of one shape"),
        (lambda: exact(2**53 + 1, 0.5, claim="c"), ValueError, "value must hold integers that a float64 holds"),
        (lambda: bound(1j, 1, claim="c"), TypeError, "lhs must hold real numbers, got complex128"),
        (lambda: verify.observed([], 1, claim="c"), ValueError, "lhs must hold at least one number, got none"),
        (lambda: unit_mean([0.5], "x"), TypeError, "expected must be a number, got str"),
        (lambda: unit_mean([0.5], vector(0.5)[0]), TypeError, "expected must be a number, got a torch.float64 tensor"),
        (lambda: unit_mean([1j]), TypeError, "values must hold real numbers"),
        (lambda: match(Y, S0, claim="c", alpha="x"), ValueError, "alpha must lie strictly between 0 and 1, got 'x'"),
        (lambda: match(Y.numpy(), S0, claim="c"), TypeError, "samples must be an integer torch.Tensor, got ndarray"),
        (
            lambda: match(Y, S0.numpy(), claim="c"),
            TypeError,
            "target must be a floating-point torch.Tensor, got ndarray",
        ),
        (lambda: match(Y > 0, S0, claim="c"), TypeError, "samples must be an integer torch.Tensor, got a torch.bool"),
        (lambda: within(Y, S0, 0.1, claim="c", log_q=UNIFORM8), ValueError, "log_q must have 3 outcomes .* got 8"),
        (
            lambda: within(Y, lambda y: S0[y] + math.inf, 0.1, claim="c", log_q=S0),
            ValueError,
            "samples must have finite",
        ),
        (
            lambda: within(Y, lambda y: S0[y] + math.nan, 0.1, claim="c", log_q=S0),
            ValueError,
            "samples must have finite",
        ),
        (lambda: bound([], 1, claim="c"), ValueError, "lhs must hold at least one number, got none"),
        (lambda: bound(1, [], claim="c"), ValueError, "rhs must hold at least one number, got none"),
    ],
)
def test_bad_inputs(call, error, text):
    with pytest.raises(error, match=text):
        call()


def test_within_a_law_on_one_outcome_or_one_cell():
    drawn = torch.zeros(10**4, dtype=torch.int64)
    assert within(drawn, law(1), 0.1, claim="c").tv_lo == 0
    assert within(Y, S0, 0.1, claim="c", cells=torch.zeros(3, dtype=torch.int64)).tv_lo == 0


def test_checks_leave_their_inputs_alone():
    drawn, target, wrong = Y.clone(), S0.clone(), HOT.clone()
    match(drawn, target, claim="c", versus=[wrong])
    within(drawn, target, 0.1, claim="c")
    within(drawn, target, 0.1, claim="c", log_q=wrong)
    plan(target, wrong)
    for value, before in itertools.zip_longest((drawn, target, wrong), (Y, S0, HOT)):
        assert torch.equal(value, before)


@pytest.mark.parametrize("one", [law(0.2, 0.3, 0.5), 0.25, np.array([0.25]), iter([0.25])])
def test_declared_ones_come_in_a_list(one):
    calls = [
        lambda: match(torch.tensor([0, 1]), law(0.5, 0.3, 0.2), claim="a", versus=one),
        lambda: log_e_value([1, 1, 0], law(0.5, 0.3, 0.2), one),
        lambda: verify.mean([0.5, 0.25], 0.5, low=0, high=1, claim="a", versus=one),
    ]
    for call in calls:
        with pytest.raises(TypeError, match="^versus must be a list or tuple, got "):
            call()


# --- edges -----------------------------------------------------------------------------------------------------------

LEVELS = {"alpha": 1e-3, "miss": 1e-2}


def test_every_field_of_every_verdict():
    samples, other = torch.tensor([0, 0, 1, 2, 0, 1]), law(0.1, 0.6, 0.3)
    log10_e = log_e_value([3, 2, 1], S0, [HOT, other]) / math.log(10)
    need = max(plan(S0, q, **LEVELS, declared=2) for q in (HOT, other))
    fields = {"plan": need, "declared": 2, **LEVELS, "log10_e": log10_e, "method": "e-value"}
    got = match(samples, S0, claim="c", versus=[HOT, other], **LEVELS)
    assert got == Verdict("c", "match", "INCONCLUSIVE", 6, **fields)

    ends = {"low": -1.0, "high": 4.0}
    got = verify.mean([0.0, 1.0, 2.0, 2.5], 1.5, **ends, claim="c", versus=[1.0, 2.5], **LEVELS)
    fields["plan"] = max(verify.plan_mean(1.5, q, **ends, **LEVELS, declared=2) for q in (1.0, 2.5))
    assert got == Verdict("c", "mean", "INCONCLUSIVE", 4, **{**fields, "log10_e": got.log10_e})

    computed = {"error": 0.5, "method": "computed"}
    assert exact([1, 1.5], 1.0, 0.25, claim="c") == Verdict("c", "exact", "REJECT", 2, eps=0.25, **computed)
    assert bound([1, 3], [2, 2.5], claim="c", delta=1e-9) == Verdict("c", "bound", "REJECT", 2, delta=1e-9, **computed)
    seen = Verdict("c", "observed", "REJECT", 2, eps=2.5, error=0.5, method="observed")
    assert verify.observed([1, 3], 2.5, claim="c") == seen


@pytest.mark.parametrize("tier", ["ratio", "counts", "cells(2)"])
def test_every_field_of_a_distance(tier, rng):
    q, eps, delta = law(0.4, 0.4, 0.2), 0.9, 1e-3
    draws = sample(q, 3000, generator=rng)
    x = (1 - (S0 - q).exp()).clamp(min=0)[draws]
    options = {"ratio": {"log_q": q}, "counts": {}, "cells(2)": {"cells": torch.tensor([0, 1, 1])}}[tier]
    got = within(draws, S0, eps, claim="c", delta=delta, **options)
    if tier == "ratio":
        ends = {"tv_lo": 1 - verify.tv_upper_bound(1 - x, delta=delta), "tv_hi": verify.tv_upper_bound(x, delta=delta)}
        need = math.ceil(-2 * math.log(delta) / (0.75 * eps))
    else:
        k = 3 if tier == "counts" else 2
        laws, indices = (S0.exp(), draws) if k == 3 else (vector(0.5, 0.5), draws.clamp(max=1))
        counts = torch.bincount(indices, minlength=k).double()
        radius = weissman_and_mcdiarmid(k, 3000, delta)
        ends = {"tv_hi": (counts / 3000 - laws).abs().sum().item() / 2 + radius, "tv_lo": got.tv_lo}
        need = next(m for m in itertools.count(1) if weissman_and_mcdiarmid(k, m, delta) <= eps / 2)
        assert got.tv_hi == pytest.approx(ends["tv_hi"], rel=1e-12)
        ends["tv_hi"] = got.tv_hi
    assert got == Verdict("c", "within", "PASS", 3000, plan=need, eps=eps, delta=delta, method=tier, **ends)
    # The ends are included: eps = tv_hi passes, eps = tv_lo is not rejected.
    assert 0 < got.tv_lo < got.tv_hi < 1
    assert within(draws, S0, got.tv_hi, claim="c", delta=delta, **options).decision == "PASS"
    assert within(draws, S0, got.tv_lo, claim="c", delta=delta, **options).decision == "INCONCLUSIVE"


def weissman_and_mcdiarmid(k, n, delta):
    weissman = math.sqrt((math.log(2**k - 2) - math.log(delta)) / (2 * n))
    return min(weissman, math.sqrt((k - 1) / n) / 2 + math.sqrt(-math.log(delta) / (2 * n)))


def test_within_plans_the_fewest_samples():
    assert within(torch.zeros(3).long(), law(1), 0.5, claim="c").plan == 1  # one outcome: nothing to learn
    need = within(torch.tensor([0, 1]), law(0.5, 0.5), 0.9, claim="c", delta=0.9).plan
    assert weissman_and_mcdiarmid(2, need, 0.9) <= 0.45 < weissman_and_mcdiarmid(2, need - 1, 0.9) and need == 2
    assert within(torch.tensor([0]), law(0.5, 0.5), 0.9, claim="c").tv_hi == 1  # no distance is larger


def test_within_takes_1024_outcomes():
    even = torch.full((1025,), -math.log(1025), dtype=F64)
    with pytest.raises(ValueError, match="target must have at most 1024 outcomes without log_q or cells, got 1025"):
        within(torch.tensor([0]), even, 0.5, claim="c")
    within(torch.tensor([0]), torch.log_softmax(even[:1024], -1), 0.5, claim="c")


@pytest.mark.parametrize(
    ("samples", "probs", "delta", "hits", "trials", "expected"),
    [
        # First half all 1, so the event is {1}: 5 of 5 in the second half, and the tail of the binomial is x^5.
        ([1] * 10, (0.9, 0.1), 0.01, 5, 5, 0.1),
        ([1] * 11, (0.9, 0.1), 0.01, 6, 6, 0.1),
        ([1, 1, 0], (0.99, 0.01), 0.5, 1, 2, 0.01),
        # Outcome 1 is as frequent as it should be, which says nothing: the event is {2}.
        ([0, 1, 2, 2, 2, 2, 1, 0], (0.5, 0.25, 0.25), 0.5, 2, 4, 0.25),
        ([0, 0, 0, 1], (0.9, 0.1), 0.5, 1, 2, 0.9),
    ],
)
def test_the_lower_bound_by_hand(samples, probs, delta, hits, trials, expected):
    # Clopper-Pearson: the p at which `hits` or more of `trials` have probability delta.
    lowest = scipy.optimize.brentq(lambda p: scipy.stats.binom.sf(hits - 1, trials, p) - delta, 1e-12, 1, xtol=1e-14)
    got = within(torch.tensor(samples), law(*probs), 0.99, claim="c", delta=delta).tv_lo
    assert got == pytest.approx(max(0, lowest - expected), abs=1e-9)


@pytest.mark.parametrize("delta", [1e-8, 0.3])
def test_tv_upper_bound_bets_by_what_it_has_seen(delta, rng):
    """The predictable plug-in bets of the source, value by value: a prior value of 1/2 and a prior variance of 1/4."""
    x = torch.rand(40, generator=rng, dtype=F64).tolist()

    def log_wealth(m):
        total, seen, squares, variance = 0.0, 0.0, 0.0, 0.25
        for t, value in enumerate(x, 1):
            bet = min(math.sqrt(-2 * math.log(delta) / (len(x) * variance)), 0.75 / (1 - m))
            total += math.log1p(-bet * (value - m))
            seen += value
            squares += (value - (0.5 + seen) / (t + 1)) ** 2
            variance = (0.25 + squares) / (t + 1)
        return total

    edge = scipy.optimize.brentq(lambda m: log_wealth(m) + math.log(delta), sum(x) / len(x), 1 - 1e-12, xtol=1e-15)
    assert verify.tv_upper_bound(x, delta=delta) == pytest.approx(edge, rel=1e-12)


@pytest.mark.parametrize("n", [2**30, 2**31 - 1, 10**12, 10**15])
def test_counts_in_excess_keep_their_digits(n, rng):
    """c - n p to a part in 10^18 of n: in double precision it would be one in 10^16."""
    target = random_law(7, rng)
    counts = np.floor(n * target.exp().numpy())
    counts[0] += n - counts.sum()
    got = verify._excess_counts(counts, verify._law("target", target))
    assert got.dtype == np.float64
    with mpmath.workdps(40):
        wanted = [float(c - n * mpmath.exp(x)) for c, x in zip(map(int, counts), log_law(target), strict=True)]
    assert np.abs(got - wanted).max() <= n * (1e-18 if np.finfo(np.longdouble).eps < 1e-18 else 1e-15)


def test_counts_up_to_2_to_the_53():
    even = law(0.5, 0.5)
    with mpmath.workdps(60):
        assert relative_error(log_e_value([2**53, 2**53], even), reference([2**53, 2**53], even)) <= PRECISION
    with pytest.raises(ValueError, match=r"counts must be 2 whole numbers .* none above 2\^53"):
        log_e_value([2**53 + 2, 0], even)


def test_series_next_to_what_they_replace():
    with mpmath.workdps(50):
        for x in (16.0, 17.5, 30.0, 1e3, 1e9):
            z = mpmath.mpf(x)
            remainder = mpmath.loggamma(z) - (z - 0.5) * mpmath.log(z) + z - mpmath.log(2 * mpmath.pi) / 2
            assert verify._stirling_series(x) == pytest.approx(float(remainder), rel=1e-13, abs=0)
        for size in (1e-300, 1e-12, 1e-6, 1e-3, 0.009, 0.01, 0.0101, 0.02, 0.3, 0.5, 3.0):
            for x in (size, -size):
                tail = float(mpmath.expm1(mpmath.mpf(x)) - mpmath.mpf(x)) if size > 1e-100 else 0.0
                digits = 1e-15 if size <= 0.01 else 1e-13  # beyond it exp(x) - 1 and x cancel in two digits
                assert float(verify._exp_tail(np.float64(x))) == pytest.approx(tail, rel=digits, abs=0)
                if size > 1e-100 and x > -1:
                    z = mpmath.mpf(x)
                    tail = float((1 + z) * mpmath.log1p(z) - z)
                    assert float(verify._log_tail(np.float64(x))) == pytest.approx(tail, rel=digits, abs=0)


def test_laws_that_are_not_quite_normalised_mean_what_they_are_after_it():
    counts, far = [100, 150, 750], law(0.1, 0.1, 0.8)  # so that the directed half of E counts
    expected = log_e_value(counts, S0, [far])
    assert log_e_value(counts, S0 + 1e-9, [far - 1e-9]) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("alpha", [1e-8, 0.05])
def test_an_e_value_of_exactly_one_over_alpha_rejects(alpha):
    edge = -math.log(alpha)
    for log_e, decision in ((edge, "REJECT"), (math.nextafter(edge, 0), "PASS")):
        assert verify._e_verdict("c", "match", 5, log_e, None, 0, alpha, 0.1).decision == decision


@pytest.mark.parametrize("noncentrality", [0.011, 0.5, 30.1])
def test_plan_for_an_undeclared_law_at_every_level(noncentrality):
    # Outcome 0 is equally likely under both. The noncentrality n chi2 brings the power at the cut to 1 - miss.
    p, q, alpha = law(0.5, 0.4, 0.1), law(0.5, 0.395, 0.105), 0.99
    chi2 = ((q.exp() - p.exp()) ** 2 / p.exp()).sum().item()
    cut = min((1 + g) * (2 * math.log(8 / alpha) + 2 * math.log1p(1 / g)) for g in (4.0**j for j in range(-3, 5)))
    miss = float(scipy.stats.ncx2.cdf(cut, 2, noncentrality))
    try:
        n = plan(p, q, alpha=alpha, miss=miss, declared=None)
    except ValueError as error:  # too few for chi-square, but this many
        n = int(str(error).split("n = ")[1].split()[0])
    assert n == math.ceil(noncentrality / chi2)


def test_an_outcome_as_likely_under_both_says_nothing_about_the_plan():
    n = plan(law(0.5, 0.4, 0.1), law(0.5, 0.1, 0.4), declared=None)  # log(q / p) is exactly 0 there: no warning
    assert n > 0


def test_plan_for_an_undeclared_law_expects_five_of_the_rarest():
    expected = []
    for change in np.linspace(0.05, 0.44, 70):
        target, wrong = law(0.5, 0.45, 0.05), law(0.5 + change, 0.45 - change, 0.05)
        try:
            expected.append(plan(target, wrong, alpha=0.3, miss=0.3, declared=None) * 0.05)
        except ValueError as error:
            assert "below the 5 that the chi-square approximation needs" in str(error)
    assert 0 < len(expected) < 70 and 5 <= min(expected) < 6


@pytest.mark.parametrize("change", [1e-13, 1e-9, 1e-3, 0.2])
@pytest.mark.parametrize(("low", "high", "position"), [(0.0, 1.0, 0.3), (-3.0, 5.0, 0.3), (2.0, 2.5, 0.9)])
def test_plan_of_a_mean_is_that_of_two_outcomes(low, high, position, change):
    expected = low + (high - low) * position
    wrong = expected + change * (high - low) * (1 - position)
    gap, left, right = (
        Fraction(wrong) - Fraction(expected),
        Fraction(expected) - Fraction(low),
        Fraction(high) - Fraction(expected),
    )
    with mpmath.workdps(50):
        a, b = mpmath.mpf(left.numerator) / left.denominator, mpmath.mpf(right.numerator) / right.denominator
        d = mpmath.mpf(gap.numerator) / gap.denominator
        p, q = (a / (a + b), b / (a + b)), ((a + d) / (a + b), (b - d) / (a + b))

        def samples_at(s):
            affinity = mpmath.fsum(x**s * y ** (1 - s) for x, y in zip(p, q, strict=True))
            return (mpmath.log(1e2) + s * mpmath.log(2e3)) / -mpmath.log(affinity)

        least = min(samples_at(mpmath.mpf(i) / 1000) for i in range(1, 1000))
    got = verify.plan_mean(expected, wrong, low=low, high=high, **LEVELS)
    # Close laws get a margin of twice the largest log-ratio.
    margin = float(2 * max(abs(mpmath.log(y / x)) for x, y in zip(p, q, strict=True))) if change <= 1e-3 else 0
    assert got == pytest.approx(math.ceil(float(least) * (1 + margin)), rel=1e-5, abs=1)
    assert got == verify.plan_mean(expected, wrong, low=low, high=high, **LEVELS, declared=1)


def test_errors_name_the_argument_first():
    ends = {"low": 0.0, "high": 1.0}
    for call, text in (
        (lambda: verify.plan_mean(0.5, 0.6, **ends, alpha=2), "alpha must lie"),
        (lambda: verify.plan_mean(2.0, 0.6, **ends), "expected must lie"),
        (lambda: verify.plan_mean(0.5, 0.6, low="0", high=1.0), "low must be a number"),
        (lambda: verify.plan_mean(0.5, 0.6, low=0.0, high="1"), "high must be a number"),
        (lambda: verify.plan_mean(0.5, 0.5, low=0.5, high=0.5), "low and high must be finite with low < high"),
        (lambda: verify.plan_mean(0.5, 0.6, low=-1.7e308, high=1.7e308), "low and high must be finite"),
        (lambda: verify.plan_mean(0.5, 0.6, **ends, declared=0), "declared must be an integer"),
        (lambda: verify.tv_upper_bound("x"), "x must hold numbers"),
        (
            lambda: verify.tv_upper_bound([0.5, 2]),
            "x must hold at least one value, each in .0, 1., got values from 0.5 to 2",
        ),
        (lambda: within(torch.tensor([0]), vector(0, 0), 0.5, claim="c", log_q=law(1, 0)), "target must be log-prob"),
        (lambda: within([0], lambda s: ["x"], 0.5, claim="c", log_q=lambda s: [0.0]), "target must hold numbers"),
        (lambda: within([], lambda s: [], 0.5, claim="c", log_q=lambda s: []), "samples must have finite log_q"),
    ):
        with pytest.raises((TypeError, ValueError), match=f"^{text}"):
            call()


def test_one_sample_has_a_density_ratio():
    got = within(torch.tensor([1]), S0, 0.5, claim="c", log_q=law(0.2, 0.6, 0.2))
    assert got.n == 1 and got.tv_hi == verify.tv_upper_bound([0.5])


def test_distances_of_integers_of_any_size():
    assert exact(10**30, 0, claim="c").error == 1e30
    assert exact(10**400, 0, claim="c").error == 1e300  # a float holds no more
    with pytest.raises(ValueError, match="value must hold integers that a float64 holds where there are"):
        exact(10**30 + 1, 0.5, claim="c")


def test_the_slack_of_each_comparison_is_attained():
    assert exact(1.25, 1.0, 0.25, claim="c") and not exact(math.nextafter(1.25, 2), 1.0, 0.25, claim="c")
    assert bound(1e-12, 0.0, claim="c") and not bound(1.5e-12, 0.0, claim="c")
    assert bound(-3.0 + 2e-12, -3.0, claim="c") and not bound(-3.0 + 4e-12, -3.0, claim="c")
    for check in (exact, bound):
        got = check([1.0, math.nan], [1.0, 2.0], claim="c")
        assert got.decision == "REJECT" and math.isnan(got.error)
    eps = 2.0**-20
    falsify(lambda x: exact(x, 1.0, eps, claim="c"), 1 + 100 * eps, claim="c!just")


def test_a_falsifier_id_begins_with_the_claim():
    with pytest.raises(ValueError, match="claim must be of the form id!name, got '!a!b'"):
        falsify(lambda x: exact(x, 1.0, claim="c"), 2.0, claim="!a!b")


def test_only_a_rejected_falsifier_was_expected():
    assert exact(1.0, 2.0, claim="c").line().endswith("eps=1e-12")
    assert exact(1.0, 1.0, claim="c!x").line().endswith("eps=1e-12")
    assert exact(1.0, 2.0, claim="c!x").line().endswith("eps=1e-12  [expected]")
    unseen = Verdict("c!x", "within", "INCONCLUSIVE", 1, tv_lo=0.0, tv_hi=1.0, eps=0.5, delta=1e-8, method="counts")
    assert unseen.line() == "INCONCLUSIVE within  c!x  n=1  tv_lo=0  eps=0.5  delta=1e-08  tier=counts"


class Shell:
    execution_count = 7


@pytest.mark.parametrize(("shell", "run"), [(Shell(), 7), (None, None)])
def test_the_run_of_a_cell_is_that_of_the_shell(shell, run, monkeypatch):
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: shell))
    assert verify._cell_run() == run
    monkeypatch.delitem(sys.modules, "IPython")
    assert verify._cell_run() is None


def test_the_place_of_a_claim_is_where_it_is_reported(monkeypatch):
    monkeypatch.setattr(sys, "_getframe", lambda depth, now=sys._getframe: list(own_frames(now(1)))[depth])
    # All cells are started from this one line; each is a file of its own.
    for run, (file, fresh) in enumerate([("<cell 1>", True), ("<cell 1>", True), ("<cell 2>", False)]):
        monkeypatch.setattr(verify, "_cell_run", lambda run=run: run)
        program = compile("verify.report(verify.exact(1, 1, claim='cell'))", file, "exec")
        with nullcontext() if fresh else pytest.raises(ValueError, match="claim must be a new id, got 'cell'"):
            exec(program)


# --- what a list may hold, and what a line may say ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ([2**70, 0.5], [2**70, 0.9]),
        ([2**63 + 1, 1], [2**63, 1]),
        ([np.uint64(2**63 + 1), np.int64(-1)], [2**63, -1]),
        ((torch.tensor(2**62 + 1), np.uint64(1)), (torch.tensor(2**62), np.uint64(1))),
        ([[True, 2**53 + 1]], [[True, 2**53]]),
    ],
)
def test_no_number_of_a_list_is_lost(value, expected):
    assert exact(value, expected, claim="a.b").decision == "REJECT"
    assert exact(value, value, claim="a.b").decision == "PASS"


@pytest.mark.parametrize(
    "value", [[2**53 + 1, 0.5], [2**53 + 1, 1j], [np.int64(2**62 + 1), math.nan], [0.5, -(2**53) - 1]]
)
def test_a_large_integer_beside_fractions_is_refused(value):
    with pytest.raises(ValueError, match="^value must hold integers that a float64 holds where there are fractions"):
        exact(value, value, claim="a.b")


def test_large_integers_beside_infinities():
    assert exact([2**70, -math.inf], [2**70, -math.inf], claim="a.b").decision == "PASS"
    assert exact([2**70, math.nan], [2**70, 1.0], claim="a.b").decision == "REJECT"
    assert bound(10**400, 1, claim="a.b").decision == "REJECT"
    assert bound(-(10**400), 1, claim="a.b").decision == "PASS"
    with pytest.raises(ValueError, match=r"^value must hold numbers of one shape, got shapes \(\), \(2,\)$"):
        exact([1, [2, 3]], 1, claim="a.b")


@pytest.mark.parametrize("tensor", [torch.eye(2).to_sparse(), torch.zeros(2).to(torch.float8_e4m3fn)])
def test_a_tensor_that_numpy_does_not_know_is_refused_by_name(tensor):
    with pytest.raises(TypeError, match=f"^value must be a dense tensor of numbers, got a {tensor.dtype} tensor$"):
        exact(tensor, tensor, claim="a.b")


def test_counts_that_a_float_would_round_are_refused():
    p = torch.tensor([0.5, 0.5], dtype=torch.float64).log()
    with pytest.raises(ValueError, match="^counts must"):
        log_e_value([2**53 + 1, 1], p)
    with pytest.raises(ValueError, match="^counts must hold integers that a float64 holds"):
        log_e_value([2**53 + 1, 1.0], p)


@pytest.mark.parametrize(
    ("chance", "printed"), [(1e-8, "1e-08"), (1.49e-8, "2e-08"), (9.2e-9, "10e-09"), (1.001e-8, "2e-08")]
)
def test_a_printed_chance_is_never_less_than_the_chance(chance, printed):
    p = torch.tensor([0.5, 0.5], dtype=torch.float64).log()
    wrong = torch.tensor([0.9, 0.1], dtype=torch.float64).log()
    samples = torch.arange(1000) % 2
    line = match(samples, p, claim="a.b", versus=[wrong], alpha=chance, miss=chance).line()
    assert f"alpha={printed}" in line and f"power=1-{printed}" in line
    assert bound(0, 1, claim="a.b", delta=chance).line().endswith(f"delta={printed}")
    assert f"delta={printed}" in within(samples, p, 0.2, claim="a.b", delta=chance).line()
    assert exact(1.0, 1.0, eps=chance, claim="a.b").line().endswith(f"eps={printed}")


def test_chances_of_any_kind_of_number_are_printed():
    p, q = (torch.tensor(x, dtype=torch.float64).log() for x in ([0.5, 0.5], [0.4, 0.6]))
    rare = Fraction(1, 10**8)
    line = match(torch.arange(4000) % 2, p, claim="a.b", versus=[q], alpha=rare, miss=rare).line()
    assert "power=1-1e-08" in line and line.endswith("alpha=1e-08")
    assert exact(1, 1, eps=rare, claim="a.b").line().endswith("eps=1e-08")


@pytest.mark.parametrize(
    "check",
    [
        lambda x: exact(x, 1.0, claim="q"),
        lambda x: bound(x, 1.0, claim="q"),
        lambda x: bound(1.0, x, claim="q"),
    ],
)
def test_a_falsifier_that_is_not_a_number_shows_nothing(check, capsys):
    assert check(math.nan).decision == "REJECT"
    with pytest.raises(ClaimFailed, match="^falsifier gave NaN"):
        falsify(check, math.nan, claim="q!nan")
    assert capsys.readouterr().out == ""


def test_a_law_gives_one_number_per_sample():
    samples = torch.zeros(50, 4)
    for given, shape in ((torch.zeros_like, r"\(50, 4\)"), (lambda x: 0.0, r"\(\)"), (lambda x: x[:7, 0], r"\(7,\)")):
        with pytest.raises(ValueError, match=rf"^target must give one number per sample, shape \(50,\), got {shape}$"):
            within(samples, given, 0.1, log_q=lambda x: x[:, 0], claim="a.b")
        with pytest.raises(ValueError, match="^log_q must give one number per sample"):
            within(samples, lambda x: x[:, 0], 0.1, log_q=given, claim="a.b")


def test_the_plan_of_counts_is_where_the_radius_is_half_of_eps():
    p = torch.full((7,), -math.log(7), dtype=torch.float64)
    for eps in (0.5, 1e-3, 1e-9):
        n = within(torch.tensor([1]), p, eps, claim="a.b").plan
        fewer = n - max(1, n // 10**9)
        assert verify._tv_radius(7, n, 1e-8) <= eps / 2 * (1 + 1e-12) < verify._tv_radius(7, fewer, 1e-8)
    for eps, more in ((1e-200, {}), (5e-324, {}), (5e-324, {"log_q": p})):
        with pytest.raises(ValueError, match="^eps must be larger"):
            within(torch.tensor([1]), p, eps, claim="a.b", **more)


def test_a_plan_where_nearly_all_may_be_missed():
    p, q = (torch.tensor(x, dtype=torch.float64).log() for x in ([0.5, 0.5], [0.4, 0.6]))
    with pytest.raises(ValueError, match="^wrong must be declared here: n = 1 expects"):
        plan(p, q, alpha=0.9, miss=0.999, declared=None)


def test_the_declared_law_that_equals_the_target_is_named():
    p, q = (torch.tensor(x, dtype=torch.float64).log() for x in ([0.5, 0.5], [0.4, 0.6]))
    with pytest.raises(ValueError, match=r"^versus\[1\] must differ from target"):
        match(torch.tensor([0, 1]), p, claim="a.b", versus=[q, p])
    with pytest.raises(ValueError, match=r"^versus\[1\] must differ from expected, got 0.5 twice$"):
        verify.mean([0.1], 0.5, low=0, high=1, claim="a.b", versus=[0.4, 0.5])


def test_cells_without_end_are_refused_before_they_are_counted():
    p = torch.tensor([0.5, 0.5], dtype=torch.float64).log()
    for most in (1024, 10**12, 2**62):
        with pytest.raises(ValueError, match=rf"^cells must be numbers in 0\.\.1023 .* values from 0 to {most}$"):
            within(torch.tensor([0, 1]), p, 0.1, cells=torch.tensor([0, most]), claim="a.b")
