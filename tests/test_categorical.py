import math
from fractions import Fraction

import mpmath
import numpy as np
import pytest
import torch
from helpers import (
    F64,
    S0,
    S0_REWARDS,
    assert_same_under_default_dtype,
    check_sampler,
    instances,
    law,
    laws,
    vector,
    without,
)
from hypothesis import given
from hypothesis import strategies as st

from tiltlib import categorical
from tiltlib.categorical import chi_square, expectation, kl, log_partition, tilt, total_variation

S0_TILT = vector(0.179000, 0.291944, 0.529056)


def close(a, b, tolerance=1e-12):
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


# --- tilt ------------------------------------------------------------------------------------------------------------


def test_tilt_on_the_instance_of_the_book():
    # w = (1, e, e^2), Z = .5 + .3 e + .2 e^2
    weight = vector(0.5, 0.3 * math.e, 0.2 * math.e**2)
    close(tilt(S0, S0_REWARDS, 1.0).exp(), weight / weight.sum())
    close(log_partition(S0, S0_REWARDS, 1.0).exp(), weight.sum())
    close(tilt(S0, S0_REWARDS, 1.0).exp(), S0_TILT, 5e-7)
    assert log_partition(S0, S0_REWARDS, 1.0).exp().item() == pytest.approx(2.793296, abs=5e-7)


def test_tilt_limits():
    greedy = tilt(S0, vector(0, 2, 2), 1e-300)  # r / beta overflows, the law does not
    close(greedy.exp(), vector(0, 0.6, 0.4))
    close(tilt(S0, S0_REWARDS, 1e300), S0)
    close(tilt(S0, vector(5, 5, 5), 1e-9), S0)
    assert tilt(law(1), vector(-3), 0.1).item() == 0
    close(tilt(law(0.5, 0.5, 0), vector(0, 1, 99), 1.0).exp()[2], vector(0).squeeze())
    close(tilt(S0, vector(0, -math.inf, 0), 1.0).exp(), vector(5 / 7, 0, 2 / 7))


def test_log_partition_limits():
    assert log_partition(S0, vector(3, 3, 3), 2.0).item() == pytest.approx(1.5, rel=1e-14)
    assert log_partition(S0, S0_REWARDS * 1000, 1.0).item() == pytest.approx(2000 + math.log(0.2), rel=1e-14)
    # beta log Z lies between the mean and the maximum of the reward, and reaches them in the limits.
    assert (1e8 * log_partition(S0, S0_REWARDS, 1e8)).item() == pytest.approx(0.7, rel=1e-6)
    assert (1e-8 * log_partition(S0, S0_REWARDS, 1e-8)).item() == pytest.approx(2, rel=1e-6)


@given(instances(), st.floats(-9, 9), st.floats(0.1, 10))
def test_tilt_depends_on_reward_over_beta_up_to_a_constant(instance, shift, scale):
    ref, r, beta = instance
    close(tilt(ref, r + shift, beta), tilt(ref, r, beta), 1e-11)
    close(tilt(ref, r * scale, beta * scale), tilt(ref, r, beta), 1e-11)
    close(log_partition(ref, r + shift, beta), log_partition(ref, r, beta) + shift / beta, 1e-11)


@given(instances(), st.floats(0.25, 8))
def test_tilts_compose(instance, other_beta):
    ref, r, beta = instance
    other = r.flip(0) ** 2 / 8
    one_step = tilt(ref, r / beta + other / other_beta, 1.0)
    close(tilt(tilt(ref, r, beta), other, other_beta), one_step, 1e-11)


def test_temperatures_do_not_add():
    twice = tilt(tilt(S0, S0_REWARDS, 2.0), S0_REWARDS, 2.0)
    close(twice, tilt(S0, S0_REWARDS, 1.0))
    near_miss = tilt(S0, S0_REWARDS, 4.0).exp()
    close(near_miss, vector(0.411539, 0.317056, 0.271405), 5e-7)


@given(st.integers(1, 6).flatmap(lambda k: st.tuples(instances(max_k=k), st.data())))
def test_gibbs_gap(drawn):
    (ref, r, beta), data = drawn
    other = data.draw(laws(len(ref), zeros=False))
    pi = torch.log_softmax(torch.where(ref > -math.inf, other, -math.inf), -1)  # a law dominated by the reference
    best = tilt(ref, r, beta)

    def objective(logps):
        return expectation(logps, r) - beta * kl(logps, ref)

    close(objective(best), beta * log_partition(ref, r, beta), 1e-10)
    close(objective(best) - objective(pi), beta * kl(pi, best), 1e-10)


def test_gibbs_gap_on_the_instance_of_the_book():
    best, uniform = tilt(S0, S0_REWARDS, 1.0), law(1 / 3, 1 / 3, 1 / 3)
    assert (expectation(best, S0_REWARDS) - kl(best, S0)).item() == pytest.approx(1.027222, abs=5e-7)
    assert kl(uniform, best).item() == pytest.approx(0.097463, abs=5e-7)
    assert kl(best, uniform).item() == pytest.approx(0.094398, abs=5e-7)  # the other direction is another number


@given(instances(), st.floats(0, 4))
def test_tilt_stability(instance, height):
    ref, r, beta = instance
    other = r + height * torch.sin(3 * r + torch.arange(len(r)))
    change = ((other - r) / beta)[ref > -math.inf]
    oscillation = (change.max() - change.min()).item()
    distance = total_variation(tilt(ref, r, beta), tilt(ref, other, beta)).item()
    assert distance <= math.tanh(oscillation / 4) + 1e-12


def test_tilt_stability_is_attained():
    # Two points, mass 1 / (1 + e^{R/2}) on the better one: TV = tanh(R / 4); a constant below 1/4 fails here.
    q = 1 / (1 + math.exp(0.5))
    ref = law(1 - q, q)
    distance = total_variation(ref, tilt(ref, vector(0, 1), 1.0)).item()
    assert distance == pytest.approx(math.tanh(0.25), rel=1e-12)


def test_tilt_and_log_partition_are_differentiable():
    # Against the definition, with one excluded and one unsupported outcome: d log Z / dr = pi* / beta,
    # d log pi*(0) / dr = (delta_0 - pi*) / beta, and the same without beta for the reference.
    ref = law(0.5, 0.3, 0.2, 0).requires_grad_()
    rewards = vector(0.4, -math.inf, 1, 2).requires_grad_()
    weight = vector(0.5 * math.exp(0.4 / 0.7), 0, 0.2 * math.exp(1 / 0.7), 0)
    probs, first = weight / weight.sum(), vector(1, 0, 0, 0)
    by_ref, by_reward = torch.autograd.grad(log_partition(ref, rewards, 0.7), (ref, rewards))
    close(by_ref, probs)
    close(by_reward, probs / 0.7)
    by_ref, by_reward = torch.autograd.grad(tilt(ref, rewards, 0.7)[0], (ref, rewards))
    close(by_ref, first - probs)
    close(by_reward, (first - probs) / 0.7)


# --- frontier and divergences ----------------------------------------------------------------------------------------


def test_frontier_on_the_instance_of_the_book():
    curve = categorical.frontier(S0, S0_REWARDS, [1e6, 1.0, 1e-3])
    close(curve.kl[1], vector(0.322834).squeeze(), 5e-7)
    close(curve.reward[1], vector(1.350056).squeeze(), 5e-7)
    close(curve.kl[[0, 2]], vector(0, -math.log(0.2)), 1e-9)  # beyond -log p(argmax) the frontier is flat
    close(curve.reward[[0, 2]], vector(0.7, 2), 1e-5)


@given(instances())
def test_frontier_slope_is_beta(instance):
    ref, r, beta = instance
    curve = categorical.frontier(ref, r, [2 * beta, beta, beta / 2])
    pays, earns = curve.kl.diff(), curve.reward.diff()
    assert bool((pays >= -1e-12).all()) and bool((earns >= -1e-12).all())
    # The frontier is concave with slope beta, so each chord has a slope between the temperatures at its ends.
    above, below = vector(2, 1) * beta, vector(1, 0.5) * beta
    assert bool((earns <= above * pays + 1e-10).all()) and bool((earns >= below * pays - 1e-10).all())


def test_divergences_by_hand():
    p, q = law(0.5, 0.5, 0), law(0.25, 0.5, 0.25)
    assert kl(p, q).item() == pytest.approx(0.5 * math.log(2), rel=1e-14)
    assert kl(q, p).item() == math.inf
    assert total_variation(p, q).item() == pytest.approx(0.25, rel=1e-14)
    # (.25)^2 / .25 + 0 + (.25)^2 / .25
    assert chi_square(p, q).item() == pytest.approx(0.5, rel=1e-14)
    assert chi_square(q, p).item() == math.inf
    assert total_variation(law(1, 0), law(0, 1)).item() == 1


@pytest.mark.parametrize("log_q", [-50.0, -400.0, -800.0])
def test_chi_square_of_a_nearly_missing_outcome(log_q):
    # (1/2 - q)^2 / q + (1/2 - (1 - q))^2 / (1 - q) = 1 / (4 q) up to relative e^-50: representable until e^709
    value = chi_square(law(0.5, 0.5), torch.log_softmax(vector(0, log_q), -1)).item()
    assert value == (pytest.approx(math.exp(-log_q) / 4, rel=1e-12) if log_q > -700 else math.inf)


@given(st.integers(1, 6).flatmap(lambda k: st.tuples(laws(k), laws(k))))
def test_divergences_are_ordered(pair):
    p, q = pair
    tv, divergence, chi2 = total_variation(p, q).item(), kl(p, q).item(), chi_square(p, q).item()
    assert 0 <= tv <= 1 + 1e-12
    assert 2 * tv**2 <= divergence + 1e-12  # Pinsker
    assert divergence <= math.log1p(chi2) + 1e-12
    assert kl(p, p).item() == total_variation(p, p).item() == chi_square(p, p).item() == 0
    assert total_variation(p, q).item() == total_variation(q, p).item()


@given(instances())
def test_chi_square_of_a_tilt_is_the_variation_of_its_weights(instance):
    ref, r, beta = instance
    ratio = torch.where(ref > -math.inf, tilt(ref, r, beta) - ref, 0).exp()
    close(chi_square(tilt(ref, r, beta), ref), (ref.exp() * (ratio - 1) ** 2).sum(), 1e-10)


def test_expectation_ignores_what_never_happens():
    assert expectation(law(0.25, 0.75, 0), vector(4, 8, math.nan)).item() == pytest.approx(7)


# --- batches, dtypes, inputs -----------------------------------------------------------------------------------------

PAIRS = {
    "tilt": lambda p, r: tilt(p, r, 0.7),
    "log_partition": lambda p, r: log_partition(p, r, 0.7),
    "expectation": expectation,
    "frontier": lambda p, r: categorical.frontier(p, r, [0.5, 2.0]).kl,
    "kl": lambda p, r: kl(torch.log_softmax(r, -1), p),
    "total_variation": lambda p, r: total_variation(torch.log_softmax(r, -1), p),
    "chi_square": lambda p, r: chi_square(torch.log_softmax(r, -1), p),
}


@pytest.mark.parametrize("name", PAIRS)
def test_batch_dtype_permutation_and_inputs(name, rng):
    function = PAIRS[name]
    p = torch.log_softmax(torch.rand(3, 1, 5, generator=rng, dtype=F64), -1)
    r = torch.rand(2, 5, generator=rng, dtype=F64)
    before = p.clone(), r.clone()
    out = function(p, r)
    close(out, torch.stack([torch.stack([function(p[i, 0], r[j]) for j in range(2)]) for i in range(3)]), 1e-13)
    assert torch.equal(p, before[0]) and torch.equal(r, before[1])
    small = function(p.float(), r.float())
    assert small.dtype == torch.float32
    close(small.double(), out, 2e-6)
    order = torch.randperm(5, generator=rng)
    shuffled = function(p[..., order], r[..., order])
    close(shuffled, out[..., order] if name == "tilt" else out, 1e-13)


def test_beta_may_be_a_tensor_over_the_batch():
    beta = vector(0.5, 1, 2)
    close(tilt(S0, S0_REWARDS, beta), torch.stack([tilt(S0, S0_REWARDS, b) for b in beta.tolist()]))
    close(log_partition(S0, S0_REWARDS, beta), torch.stack([log_partition(S0, S0_REWARDS, b) for b in beta.tolist()]))
    close(tilt(S0, S0_REWARDS, beta[1]), tilt(S0, S0_REWARDS, 1.0))


# --- draws -----------------------------------------------------------------------------------------------------------


def uniform(k):
    return law(*[1 / k] * k)


def test_draws_follow_the_law(rng):
    target = tilt(S0, S0_REWARDS, 1.0)

    def draws(logps):
        return lambda n, generator: categorical.sample(logps, n, generator=generator)

    hot = tilt(S0, S0_REWARDS, 1.05)
    unweighted = tilt(uniform(3), S0_REWARDS, 1.0)
    wrong = {
        "beta*1.05": (draws(hot), hot),
        "reference-dropped": (draws(unweighted), unweighted),
        "outcome-missing": (draws(without(target, 1)), without(target, 1)),
        "uniform": (lambda n, generator: torch.randint(3, (n,), generator=generator), uniform(3)),
    }
    check_sampler(draws(target), target, wrong, rng)


def test_sample_inverts_the_cdf(monkeypatch):
    # Uniforms just below and just above each jump of the cdf, and 0: an outcome of probability 0 is never drawn.
    u = vector(0, 0.25 - 1e-15, 0.25, 0.75 - 1e-15, 0.75, 1 - 2**-53)
    monkeypatch.setattr(torch, "rand", lambda *size, **kwargs: u)
    generator = torch.Generator()
    drawn = categorical.sample(law(0, 0.25, 0, 0.5, 0.25, 0), len(u), generator=generator)
    assert drawn.tolist() == [1, 1, 3, 3, 4, 4]


def test_sample_from_float32_uses_float64():
    # In float32 the cdf of 2^20 equal outcomes stands still near 1; every outcome must keep a positive width.
    k = 2**20
    logps = torch.log_softmax(torch.zeros(k), -1)
    generator = torch.Generator().manual_seed(0)
    u = torch.rand(1000, generator=generator, dtype=F64)
    drawn = categorical.sample(logps, 1000, generator=generator.manual_seed(0))
    assert torch.equal(drawn, (u * k).long())


def test_sample_draws_each_row_of_a_batch(rng):
    logps = torch.stack([law(1, 0, 0), law(0, 0, 1)]).view(2, 1, 3)
    drawn = categorical.sample(logps, 5, generator=rng)
    assert drawn.shape == (2, 1, 5) and drawn.dtype == torch.int64
    assert drawn.flatten().tolist() == [0] * 5 + [2] * 5


# --- errors ----------------------------------------------------------------------------------------------------------

P, R = S0, S0_REWARDS
G = torch.Generator()
UNNORMALISED = P + 1e-3


@pytest.mark.parametrize("function", [tilt, log_partition, lambda p, r, b: categorical.frontier(p, r, [b])])
@pytest.mark.parametrize(
    ("ref", "rewards", "beta", "error", "text"),
    [
        ([0.0], R, 1.0, TypeError, "ref_logps must be a floating-point torch.Tensor, got list"),
        (P, R.long(), 1.0, TypeError, "rewards must be .* got a torch.int64 tensor"),
        (UNNORMALISED, R, 1.0, ValueError, r"ref_logps must be log-probabilities that sum to 1 .* logsumexp = 0\.001"),
        (P * math.nan, R, 1.0, ValueError, "ref_logps must be log-probabilities .* nan"),
        (torch.full((3,), -math.inf), R, 1.0, ValueError, "ref_logps must be log-probabilities .* -inf"),
        (torch.zeros(0), torch.zeros(0), 1.0, ValueError, "ref_logps must have a last dimension of size >= 1"),
        (P, R * math.nan, 1.0, ValueError, "rewards must be finite or -inf"),
        (P, vector(0, 1, math.inf), 1.0, ValueError, "rewards must be finite or -inf"),
        (P, torch.full((3,), -math.inf), 1.0, ValueError, "rewards must leave at least one outcome of positive mass"),
        (law(1, 0), vector(-math.inf, 0), 1.0, ValueError, "rewards must leave at least one outcome"),
        (P, R[:2], 1.0, ValueError, r"ref_logps and rewards must agree .* got shapes \(3,\) and \(2,\)"),
        (P.expand(2, 3), R.expand(4, 3), 1.0, ValueError, "ref_logps and rewards must agree .* and broadcast"),
        (P, R, 0.0, ValueError, "beta must be finite and > 0, got 0.0"),
        (P, R, -1.0, ValueError, "beta must be finite and > 0"),
        (P, R, math.inf, ValueError, "beta must be finite and > 0"),
        (P, R, math.nan, ValueError, "beta must be finite and > 0"),
        (P, R, "1", ValueError, "beta must be finite and > 0, got '1'"),
        (P, R, True, ValueError, "beta must be finite and > 0"),
        (P, R, vector(1, 0), ValueError, "beta must be finite and > 0"),
    ],
)
def test_bad_tilts(function, ref, rewards, beta, error, text):
    with pytest.raises(error, match=text):
        function(ref, rewards, beta)


def test_bad_beta_shape():
    with pytest.raises(ValueError, match="beta"):
        tilt(P.expand(3, 3), R, vector(1, 2))


def test_bad_frontier():
    with pytest.raises(ValueError, match="betas must hold at least one temperature"):
        categorical.frontier(P, R, [])


@pytest.mark.parametrize("function", [kl, total_variation, chi_square])
@pytest.mark.parametrize(
    ("p", "q", "error", "text"),
    [
        ([0.0], P, TypeError, "logps_p must be a floating-point torch.Tensor"),
        (P, [0.0], TypeError, "logps_q must be a floating-point torch.Tensor"),
        (UNNORMALISED, P, ValueError, "logps_p must be log-probabilities that sum to 1"),
        (P, UNNORMALISED, ValueError, "logps_q must be log-probabilities that sum to 1"),
        (P, law(0.5, 0.5), ValueError, r"logps_p and logps_q must agree .* got shapes \(3,\) and \(2,\)"),
    ],
)
def test_bad_divergences(function, p, q, error, text):
    with pytest.raises(error, match=text):
        function(p, q)


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda: expectation(UNNORMALISED, R), ValueError, "logps must be log-probabilities that sum to 1"),
        (lambda: expectation(P, [1.0]), TypeError, "values must be a floating-point torch.Tensor"),
        (lambda: expectation([1.0], R), TypeError, "logps must be a floating-point torch.Tensor"),
        (lambda: expectation(P, R[:2]), ValueError, "logps and values must agree in the last dimension"),
        (lambda: categorical.sample([0.0], 1, generator=G), TypeError, "logps must be a floating-point torch.Tensor"),
        (lambda: categorical.sample(UNNORMALISED, 1, generator=G), ValueError, "logps must be log-probabilities"),
        (lambda: categorical.sample(P, 1.0, generator=G), TypeError, "n must be an int, got float"),
        (lambda: categorical.sample(P, True, generator=G), TypeError, "n must be an int, got bool"),
        (lambda: categorical.sample(P, 0, generator=G), ValueError, "n must be an integer >= 1, got 0"),
    ],
)
def test_bad_inputs(call, error, text):
    with pytest.raises(error, match=text):
        call()


def test_gradients_stay_finite_at_an_excluded_outcome():
    rewards = torch.tensor([0.0, 1.0, -math.inf], dtype=torch.float64, requires_grad=True)
    ref = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64).log()
    law = categorical.tilt(ref, rewards, 1.0)
    for value in (categorical.expectation(law, rewards), categorical.kl(law, ref)):
        (gradient,) = torch.autograd.grad(value, rewards, retain_graph=True)
        assert gradient[:2].isfinite().all() and gradient[2] == 0


# --- dtypes, scales, gradients, empty batches ------------------------------------------------------------------------

DTYPES = [F64, torch.float32, torch.bfloat16, torch.float16]
HALF = [torch.bfloat16, torch.float16]


def slopes(function, x, step=1e-6):
    """Central differences; entries of -inf have none."""
    out = torch.zeros_like(x)
    for i in range(len(x)):
        if x[i] > -math.inf:
            e = torch.zeros_like(x).index_fill(0, torch.tensor(i), step)
            out[i] = (function(x + e) - function(x - e)) / (2 * step)
    return out


@pytest.mark.parametrize("dtype", DTYPES)
def test_draws_from_float64_are_those_of_the_first_version(dtype):
    # Fixed by the code before all was computed in float64.
    p = torch.log_softmax(torch.cos(torch.arange(24, dtype=F64) * 0.9).view(4, 6), -1)
    g = torch.Generator().manual_seed(13)
    if dtype != F64:
        assert categorical.sample(p.to(dtype), 5, generator=g).shape == (4, 5)
        return
    assert categorical.sample(p, 5, generator=g).tolist() == [
        [2, 1, 0, 4, 5],
        [2, 1, 1, 0, 2],
        [3, 1, 3, 1, 2],
        [2, 4, 4, 2, 4],
    ]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("beta", [1e-300, 1e-60, 1e-38, 1.0, 1e300])
def test_tilt_takes_every_beta_in_every_dtype(dtype, beta):
    out = tilt(law(0.5, 0.5).to(dtype), vector(10, 11).to(dtype), beta)
    expected = vector(0, 1) if beta < 1e-3 else vector(0.5, 0.5) if beta > 1e3 else torch.softmax(vector(0, 1), -1)
    assert out.dtype == dtype
    close(out.exp().double(), expected, 2 * torch.finfo(dtype).eps)
    same = tilt(law(0.5, 0.5).to(dtype), vector(11, 11).to(dtype), beta)
    close(same.exp().double(), vector(0.5, 0.5), torch.finfo(dtype).eps)


@pytest.mark.parametrize("scale", [1e-300, 1e-30, 1e30, 1e300, 1.7e308])
def test_tilt_takes_rewards_of_every_scale(scale):
    # (-1, 1) at 1.7e308: the range itself is no float64 number
    beta = scale * 0.7
    close(tilt(S0, scale * vector(-1, 0.5, 1), beta), tilt(S0, vector(-1, 0.5, 1), 0.7))
    close(log_partition(S0, scale * vector(-1, 0.5, 1), beta), log_partition(S0, vector(-1, 0.5, 1), 0.7))


def test_beta_of_each_row_does_not_change_the_dtype():
    beta = vector(0.5, 1, 2)
    out = tilt(S0.float(), S0_REWARDS.float(), beta)
    assert out.dtype == log_partition(S0.float(), S0_REWARDS.float(), beta).dtype == torch.float32
    close(out.double(), tilt(S0, S0_REWARDS, beta), 1e-6)
    close(tilt(S0, S0_REWARDS, torch.tensor([1, 2])), tilt(S0, S0_REWARDS, vector(1, 2)))


def test_log_partition_beyond_the_dtype_is_infinite():
    assert log_partition(S0, S0_REWARDS, 1e-308).item() == math.inf
    assert log_partition(S0, S0_REWARDS - 4, 1e-308).item() == -math.inf
    assert log_partition(S0.half(), S0_REWARDS.half(), 1e-6).item() == math.inf


@pytest.mark.parametrize("beta", [1e-300, 1e-9, 0.7, 1e9])
def test_gradients_of_log_partition_are_the_tilt_over_beta(beta):
    r = vector(0, 1, 2).requires_grad_()
    (gradient,) = torch.autograd.grad(log_partition(S0, r, beta), r)
    close(gradient * beta, tilt(S0, S0_REWARDS, beta).exp())


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("name", PAIRS)
def test_half_precision_is_computed_in_float64(name, dtype, rng):
    p = torch.log_softmax(torch.randn(151_936, generator=rng), -1).to(dtype)
    r = torch.randn(151_936, generator=rng).to(dtype)
    ref = torch.log_softmax(p.double(), -1)
    calls = {
        **PAIRS,
        "kl": lambda p, r: kl(p, q.to(p.dtype)),
        "total_variation": lambda p, r: total_variation(p, q.to(p.dtype)),
        "chi_square": lambda p, r: chi_square(p, q.to(p.dtype)),
    }
    q = torch.log_softmax(r.double(), -1).to(dtype)
    out = calls[name](p, r)
    assert out.dtype == dtype
    q = torch.log_softmax(q.double(), -1)
    close(out.double(), calls[name](ref, r.double()).to(dtype).double())


@pytest.mark.parametrize("dtype", DTYPES)
def test_dtype_of_every_result(dtype):
    p, q, r = S0.to(dtype), law(0.25, 0.5, 0.25).to(dtype), S0_REWARDS.to(dtype)
    outs = [tilt(p, r, 1.0), log_partition(p, r, 1.0), expectation(p, r), *categorical.frontier(p, r, [1.0])]
    outs += [kl(p, q), total_variation(p, q), chi_square(p, q), categorical.truncate(p, top_k=2).logps]
    assert all(out.dtype == dtype for out in outs)
    longer = torch.promote_types(dtype, torch.float32)
    mixed = [tilt(p, r.float(), 1.0), log_partition(p, r.float(), 1.0), expectation(p, r.float())]
    q = torch.log_softmax(q.float(), -1)
    mixed += [kl(p, q), total_variation(p, q), chi_square(p, q)]
    assert all(out.dtype == longer for out in mixed)


@pytest.mark.parametrize("default", DTYPES)
def test_nothing_depends_on_the_default_dtype(default):
    p, q = law(0.5, 0.5, 0), law(0, 0.5, 0.5)

    def results():
        return (
            *(chi_square(p, q), chi_square(p, S0), kl(p, q), kl(p, S0), total_variation(p, q)),
            *(tilt(S0, S0_REWARDS, 0.7), log_partition(S0, S0_REWARDS, 0.7), expectation(p, S0_REWARDS)),
            *categorical.truncate(S0, top_k=2, top_p=0.6, min_p=0.1),
            categorical.sample(S0, 5, generator=torch.Generator().manual_seed(0)),
        )

    assert_same_under_default_dtype(results, default)


def test_divergences_of_an_outcome_too_rare_for_float64():
    # p = e^-800 underflows, but it is mass where q has none: +inf, not 0 times inf.
    p = torch.log_softmax(vector(0, -800), -1)
    assert kl(p, law(1, 0)).item() == chi_square(p, law(1, 0)).item() == math.inf
    assert expectation(p, vector(1, -math.inf)).item() == -math.inf


@pytest.mark.parametrize("divergence", [kl, chi_square, total_variation])
@pytest.mark.parametrize(
    ("p", "q"),
    [
        (law(0.5, 0.2, 0.3, 0), law(0.25, 0.3, 0.45, 0)),
        (law(0.5, 0.5, 0, 0), law(0.25, 0.35, 0.4, 0)),
        (law(0.1, 0.2, 0.3, 0.4), law(0.97, 0.01, 0.01, 0.01)),
    ],
)
def test_gradients_of_divergences_where_a_probability_is_zero(divergence, p, q):
    x, y = p.clone().requires_grad_(), q.clone().requires_grad_()
    by_p, by_q = torch.autograd.grad(
        divergence(torch.log_softmax(x, -1), torch.log_softmax(y, -1)), (x, y), allow_unused=False
    )
    close(by_p, slopes(lambda v: divergence(torch.log_softmax(v, -1), q), p), 1e-6)
    close(by_q, slopes(lambda v: divergence(p, torch.log_softmax(v, -1)), q), 1e-6)


@pytest.mark.parametrize("divergence", [kl, chi_square])
def test_gradients_of_infinite_divergences_are_those_of_the_finite_terms(divergence):
    for q in (law(0.5, 0.5, 0), torch.log_softmax(vector(0, 0, -1600), -1)):
        if divergence is kl and bool((q > -math.inf).all()):
            continue  # finite: 1600 nats
        x = law(0.25, 0.25, 0.5).requires_grad_()
        value = divergence(x, q)
        (gradient,) = torch.autograd.grad(value, x)
        assert value.item() == math.inf and bool(gradient.isfinite().all()) and gradient[2] == 0


def test_gradient_of_an_expectation_with_an_infinite_value():
    p, f = S0.clone().requires_grad_(), vector(1, 2, -math.inf).requires_grad_()
    value = expectation(p, f)
    by_p, by_f = torch.autograd.grad(value, (p, f))
    assert value.item() == -math.inf
    close(by_p, vector(0.5, 0.6, 0))
    close(by_f, vector(0.5, 0.3, 0))


@pytest.mark.parametrize("values", [vector(0, math.nan, 0), vector(math.inf, -math.inf, 0)])
def test_expectation_refuses_what_has_no_mean(values):
    with pytest.raises(ValueError, match="values must not be NaN, nor infinite with both signs, where logps has mass"):
        expectation(S0, values)


@pytest.mark.parametrize("dtype", DTYPES)
def test_empty_batches(dtype):
    p, r = torch.zeros(0, 3, dtype=dtype), torch.zeros(3, dtype=dtype)
    for name, function in PAIRS.items():
        out = function(p, r)
        assert out.dtype == dtype
        assert out.shape == ((0, 3) if name == "tilt" else (0, 2) if name == "frontier" else (0,))
    assert tilt(p, r, torch.ones(0)).shape == (0, 3)
    assert categorical.sample(p, 5, generator=G).shape == (0, 5)
    out = categorical.truncate(p, top_k=2, top_p=0.5, min_p=0.1)
    assert out.logps.shape == (0, 3) and out.logps.dtype == dtype and out.kept_mass.shape == (0,)


def test_numbers_of_numpy():
    assert torch.equal(tilt(S0, S0_REWARDS, np.float32(0.5)), tilt(S0, S0_REWARDS, 0.5))
    assert torch.equal(log_partition(S0, S0_REWARDS, np.int64(2)), log_partition(S0, S0_REWARDS, 2))
    assert categorical.frontier(S0, S0_REWARDS, np.linspace(1, 2, 3)).kl.shape == (3,)
    assert categorical.sample(S0, np.int64(4), generator=G).shape == (4,)
    out = categorical.truncate(S0, top_k=np.int64(2), top_p=np.float32(0.9), min_p=np.float64(0.1))
    assert bool((out.logps[:2] > -math.inf).all())


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda: tilt(torch.tensor(0.0), R, 1.0), ValueError, "ref_logps must have a last dimension"),
        (lambda: tilt(P, R, torch.tensor(True)), TypeError, "beta must be a number or a tensor of real numbers"),
        (lambda: categorical.sample(P, torch.tensor(3), generator=G), TypeError, "n must be an int, got a torch.int64"),
        (lambda: categorical.sample(P, 3, generator=None), TypeError, "generator must be a torch.Generator, got None"),
    ],
)
def test_refusals_name_the_argument(call, error, text):
    with pytest.raises(error, match=text):
        call()


# --- truncation ------------------------------------------------------------------------------------------------------


def truncated_by_hand(probs, top_k=None, top_p=None, min_p=None):
    """The rules one outcome at a time, in exact fractions."""
    kept = []
    for p in probs:
        above = [q for q in probs if q > p]
        ok = p > 0
        ok &= top_k is None or len(above) < top_k
        ok &= top_p is None or top_p == 1 or sum(above) < top_p
        ok &= min_p is None or p >= min_p * max(probs)
        kept.append(ok)
    mass = sum(p for p, ok in zip(probs, kept, strict=True) if ok) / sum(probs)
    return kept, [p / sum(probs) / mass if ok else Fraction(0) for p, ok in zip(probs, kept, strict=True)], mass


rules = st.fixed_dictionaries(
    {},
    optional={
        "top_k": st.integers(1, 7),
        "top_p": st.integers(1, 20).map(lambda i: Fraction(i, 20)),
        "min_p": st.integers(0, 10).map(lambda i: Fraction(i, 10)),
    },
)
# Twentieths, so that ties, zeros and masses equal to top_p are frequent.
twentieths = st.lists(st.integers(0, 6), min_size=1, max_size=6).filter(any)


@given(twentieths, rules)
def test_truncate_by_enumeration(counts, given_rules):
    probs = [Fraction(c, sum(counts)) for c in counts]
    kept, expected, mass = truncated_by_hand(probs, **given_rules)
    logps = law(*[float(p) for p in probs])
    numbers = {k: v if k == "top_k" else float(v) for k, v in given_rules.items()}
    out = categorical.truncate(logps, **numbers)
    assert (out.logps > -math.inf).tolist() == kept
    close(out.logps.exp(), vector(*[float(p) for p in expected]))
    assert out.kept_mass.item() == pytest.approx(float(mass), rel=1e-12)


def test_truncate_on_the_instance_of_the_book():
    close(categorical.truncate(S0, top_k=2).logps.exp(), vector(0.625, 0.375, 0))
    # .5 + .3 reaches .8, so the third outcome falls; a hair more keeps it.
    close(categorical.truncate(S0, top_p=0.8).kept_mass, vector(0.8).squeeze())
    close(categorical.truncate(S0, top_p=0.800001).kept_mass, vector(1).squeeze())
    close(categorical.truncate(S0, min_p=0.6).kept_mass, vector(0.8).squeeze())  # .3 is .6 of .5
    close(categorical.truncate(S0, min_p=0.600001).kept_mass, vector(0.5).squeeze())
    # A tie at the edge is kept whole.
    tied = law(0.4, 0.3, 0.3)
    for rule in ({"top_k": 2}, {"top_p": 0.5}, {"min_p": 0.75}):
        close(categorical.truncate(tied, **rule).logps, tied)
    # Each rule looks at the law that came in: after top_k = 2 the first outcome has .625, and .6 would stop there.
    close(categorical.truncate(S0, top_k=2, top_p=0.6).logps.exp(), vector(0.625, 0.375, 0))
    close(categorical.truncate(S0).logps, S0)
    # An outcome too rare for float64 stays where everything is kept.
    rare = torch.log_softmax(vector(0, -800), -1)
    close(categorical.truncate(rare, top_p=1.0, top_k=9, min_p=0.0).logps, rare)


@pytest.mark.parametrize("dtype", DTYPES)
def test_truncate_normalises_in_every_dtype(dtype, rng):
    logps = torch.log_softmax(4 * torch.randn(3, 5000, generator=rng, dtype=F64), -1).to(dtype)
    out = categorical.truncate(logps, top_p=0.95)
    assert out.logps.dtype == dtype and out.kept_mass.dtype == F64
    assert bool((out.kept_mass >= 0.95).all()) and bool((out.kept_mass < 1).all())
    exact = torch.log_softmax(torch.where(out.logps > -math.inf, logps.double(), -math.inf), -1)
    assert torch.equal(out.logps, exact.to(dtype))
    assert torch.equal(out.logps[1], categorical.truncate(logps[1], top_p=0.95).logps)  # batch equals loop


def test_gradient_of_truncate():
    p = law(0.5, 0.3, 0.2)

    def chosen(x):
        return categorical.truncate(torch.log_softmax(x, -1), top_k=2).logps[0]

    x = p.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(chosen(x), x)
    close(gradient, slopes(chosen, p), 1e-8)
    assert gradient[2].abs().item() < 1e-15


@pytest.mark.parametrize(
    ("rule", "error", "text"),
    [
        ({"top_k": 0}, ValueError, "top_k must be an integer >= 1, got 0"),
        ({"top_k": 2.0}, TypeError, "top_k must be an int, got float"),
        ({"top_p": 0.0}, ValueError, r"top_p must lie in \(0, 1\], got 0.0"),
        ({"top_p": 1.1}, ValueError, r"top_p must lie in \(0, 1\], got 1.1"),
        ({"top_p": math.nan}, ValueError, r"top_p must lie in \(0, 1\], got nan"),
        ({"top_p": torch.tensor(0.5)}, TypeError, "top_p must be a number, got a torch.float32 tensor"),
        ({"min_p": -0.1}, ValueError, r"min_p must lie in \[0, 1\], got -0.1"),
        ({"min_p": "1"}, TypeError, "min_p must be a number, got str"),
    ],
)
def test_bad_truncations(rule, error, text):
    with pytest.raises(error, match=text):
        categorical.truncate(S0, **rule)


# --- edges -----------------------------------------------------------------------------------------------------------


def exact_chi_square(p, q):
    """From the rounded logarithms that the function gets, with 60 digits."""
    with mpmath.workdps(60):
        pairs = [
            (mpmath.exp(mpmath.mpf(a)), mpmath.exp(mpmath.mpf(b))) for a, b in zip(p.tolist(), q.tolist(), strict=True)
        ]
        return float(mpmath.fsum((a - b) ** 2 / b for a, b in pairs))


@pytest.mark.parametrize("step", [1e-13, 1e-10, 1e-6, 1e-3, 0.5, 1.0, 1.5, 1.99, 2.5, 20.0, 300.0])
def test_chi_square_keeps_its_digits_between_laws_near_and_far(step):
    # A difference of probabilities next to each other would keep no digit of a step of 1e-13.
    q = torch.log_softmax(vector(0, -step, 1), -1)
    p = torch.log_softmax(vector(0, 0, 1), -1)
    for a, b in ((p, q), (q, p)):
        assert chi_square(a, b).item() == pytest.approx(exact_chi_square(a, b), rel=1e-11, abs=0)


def test_chi_square_up_to_the_largest_number():
    # p = (1, 0), q = (exp(-x), 1 - exp(-x)): chi2 = exp(x) - 1.
    largest = math.log(torch.finfo(F64).max)
    for x, expected in ((largest, torch.finfo(F64).max), (math.nextafter(largest, math.inf), math.inf)):
        assert chi_square(law(1, 0), vector(-x, 0)).item() == pytest.approx(expected, rel=1e-12)
    # A rare outcome that is rarer still in q: its term, exp(2 * -100 + 950), is infinite and has no gradient.
    p, q = (torch.log_softmax(vector(0, x), -1).requires_grad_() for x in (-100, -950))
    value = chi_square(p, q)
    assert value.item() == math.inf
    assert all(bool(g.isfinite().all()) for g in torch.autograd.grad(value, [p, q]))


def test_an_infinite_value_concerns_its_row_alone():
    values = torch.stack([vector(1, 2, 3), vector(1, math.inf, 3), vector(1, 2, -math.inf)])
    close(expectation(S0.expand(3, 3), values), vector(0.5 + 0.6 + 0.6, math.inf, -math.inf))


def test_frontier_of_a_batch_at_several_temperatures():
    rewards, betas = torch.stack([S0_REWARDS, -S0_REWARDS]), [0.5, 1.0, 2.0]
    out = categorical.frontier(S0, rewards, betas)
    for row, rewards_of_row in enumerate(rewards):
        for column, beta in enumerate(betas):
            tilted = tilt(S0, rewards_of_row, beta)
            close(out.kl[row, column], kl(tilted, S0))
            close(out.reward[row, column], expectation(tilted, rewards_of_row))


def test_beta_is_measured_against_the_batch_of_both():
    for ref, rewards in ((S0, S0_REWARDS.expand(2, 3)), (S0.expand(2, 3), S0_REWARDS)):
        message = r"beta must broadcast against the batch dimensions \(2,\), got shape \(4,\)"
        with pytest.raises(ValueError, match=message):
            tilt(ref, rewards, torch.ones(4))


def test_the_kept_mass_is_relative_to_the_whole():
    expected = categorical.truncate(S0, top_k=2).kept_mass.item()
    for shift in (1e-9, -1e-9):  # float64 that is not quite normalised is taken as it is
        assert categorical.truncate(S0 + shift, top_k=2).kept_mass.item() == pytest.approx(expected, rel=1e-15)


def test_truncate_names_its_argument():
    with pytest.raises(ValueError, match="^logps must be log-probabilities"):
        categorical.truncate(vector(0, 0))
