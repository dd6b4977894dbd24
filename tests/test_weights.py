import math

import numpy as np
import pytest
import torch
from helpers import F64, S0, S0_REWARDS, assert_same_under_default_dtype, vector
from hypothesis import assume, given
from hypothesis import strategies as st

from tiltlib import categorical, weights

log_weight_lists = st.lists(st.one_of(st.floats(-30, 30), st.just(-math.inf)), min_size=1, max_size=9).filter(
    lambda row: max(row) > -math.inf
)


@given(log_weight_lists, st.floats(-500, 500))
def test_normalize_sums_to_one_and_ignores_a_factor(row, shift):
    w = vector(*row)
    logps = weights.normalize(w)
    torch.testing.assert_close(logps.exp().sum(), vector(1).squeeze())
    torch.testing.assert_close(weights.normalize(w + shift), logps, rtol=1e-12, atol=1e-12)
    assert torch.equal(logps == -math.inf, w == -math.inf)


def test_normalize_by_hand():
    torch.testing.assert_close(weights.normalize(vector(1, 3, 4).log()).exp(), vector(1 / 8, 3 / 8, 4 / 8))


def test_log_mean_by_hand():
    # (1 + 3 + 4 + 0) / 4 = 2
    torch.testing.assert_close(weights.log_mean(vector(1, 3, 4, 0).log()), vector(2).log().squeeze())
    # Weights that overflow or vanish: the mean of e^1000 and 0 is e^1000 / 2.
    assert weights.log_mean(vector(1000, -1000)).item() == pytest.approx(1000 - math.log(2), rel=1e-15)


def test_ess_by_hand():
    # (1 + 2 + 3)^2 / (1 + 4 + 9) = 36 / 14
    assert weights.ess(vector(1, 2, 3).log()).item() == pytest.approx(36 / 14, rel=1e-14)


@pytest.mark.parametrize("shift", [0.0, 900.0, -900.0])
def test_ess_limits(shift):
    assert weights.ess(torch.zeros(7) + shift).item() == pytest.approx(7)
    assert weights.ess(vector(0, -math.inf, -math.inf) + shift).item() == 1
    assert weights.ess(vector(0, 0, -math.inf) + shift).item() == pytest.approx(2)


def test_ess_prices_the_chi_square_divergence():
    # With candidates in the proportions of p, ESS / N = 1 / (1 + CV^2), CV^2 = chi2(tilt || p) = .747689.
    pool = S0_REWARDS.repeat_interleave(torch.tensor([5, 3, 2]))
    cv2 = categorical.chi_square(categorical.tilt(S0, S0_REWARDS, 1.0), S0)
    assert cv2.item() == pytest.approx(0.747689, abs=5e-7)
    assert weights.ess(pool).item() / 10 == pytest.approx(1 / (1 + cv2.item()), rel=1e-13)


def test_beta_for_ess_on_the_instance_of_the_book():
    beta = weights.beta_for_ess(vector(0, 0.3, 0.5, 1, 2), 0.5)
    assert beta.item() == pytest.approx(0.836666, abs=5e-7)


@given(st.lists(st.floats(-50, 50), min_size=2, max_size=8), st.floats(0.01, 0.99))
def test_beta_for_ess_inverts_ess(row, position):
    r = vector(*row)
    assume(bool((r < r.max()).any()))  # all tied: no fraction is attainable
    low = (r == r.max()).double().mean().item()
    fraction = low + position * (1 - low)
    beta = weights.beta_for_ess(r, fraction)
    # r - max r is exact in more cases than r / beta, which may overflow when the gap is tiny.
    assert weights.ess((r - r.max()) / beta).item() / len(r) == pytest.approx(fraction, rel=1e-9)


@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
def test_beta_for_ess_follows_the_unit_of_the_reward_and_skips_excluded(scale):
    r = vector(0, 0.3, 0.5, 1, 2)
    expected = weights.beta_for_ess(r, 0.5)
    torch.testing.assert_close(weights.beta_for_ess(r * scale - 7 * scale, 0.5) / scale, expected, rtol=1e-9, atol=0)
    excluded = torch.cat([r, vector(-math.inf, -math.inf, -math.inf, -math.inf, -math.inf)])
    torch.testing.assert_close(weights.beta_for_ess(excluded, 0.25), expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("function", [weights.normalize, weights.log_mean, weights.ess])
def test_batch_dtype_permutation_and_inputs(function, rng):
    w = torch.rand(3, 4, 5, generator=rng, dtype=torch.float64) * 9
    w[0, 0, 1] = -math.inf
    before = w.clone()
    out = function(w)
    rows = torch.stack([torch.stack([function(row) for row in block]) for block in w])
    torch.testing.assert_close(out, rows, rtol=1e-14, atol=0)
    assert torch.equal(w, before)
    small = function(w.float())
    assert small.dtype == torch.float32 and out.dtype == torch.float64
    torch.testing.assert_close(small.double(), out, rtol=1e-5, atol=1e-5)
    order = torch.randperm(5, generator=rng)
    shuffled = function(w[..., order])
    torch.testing.assert_close(shuffled, out[..., order] if out.ndim == 3 else out, rtol=1e-13, atol=0)


def test_beta_for_ess_batch_and_dtype(rng):
    r = torch.rand(3, 6, generator=rng, dtype=torch.float64)
    before = r.clone()
    out = weights.beta_for_ess(r, 0.7)
    assert torch.equal(r, before)
    torch.testing.assert_close(out, torch.stack([weights.beta_for_ess(row, 0.7) for row in r]), rtol=1e-14, atol=0)
    small = weights.beta_for_ess(r.float(), 0.7)
    assert small.dtype == torch.float32
    torch.testing.assert_close(small.double(), out, rtol=1e-5, atol=0)


def test_log_mean_and_normalize_are_differentiable():
    w = vector(0.3, -1, 2).requires_grad_()
    (grad,) = torch.autograd.grad(weights.log_mean(w), w)
    torch.testing.assert_close(grad, weights.normalize(w).exp().detach())  # d log sum exp = softmax
    (grad,) = torch.autograd.grad(weights.normalize(w)[0], w)
    torch.testing.assert_close(grad, vector(1, 0, 0) - weights.normalize(w).exp().detach())


@pytest.mark.parametrize("function", [weights.normalize, weights.log_mean, weights.ess])
@pytest.mark.parametrize(
    ("bad", "error", "text"),
    [
        ([0.0], TypeError, "log_weights must be a floating-point torch.Tensor, got list"),
        (torch.tensor([1, 2]), TypeError, "log_weights must be .* got a torch.int64 tensor"),
        (vector(math.nan, 0), ValueError, "log_weights must be finite or -inf .* got NaN"),
        (vector(math.inf, 0), ValueError, "log_weights must be finite or -inf"),
        (vector(-math.inf, -math.inf), ValueError, "log_weights must leave at least one .* all -inf"),
        (torch.zeros(2, 0), ValueError, r"log_weights must have a last dimension .* got shape \(2, 0\)"),
        (torch.tensor(0.0), ValueError, "log_weights must have a last dimension of size >= 1"),
    ],
)
def test_bad_log_weights(function, bad, error, text):
    with pytest.raises(error, match=text):
        function(bad)


@pytest.mark.parametrize(
    ("rewards", "fraction", "error", "text"),
    [
        ([0.0], 0.5, TypeError, "rewards must be a floating-point torch.Tensor"),
        (vector(0, math.nan), 0.5, ValueError, "rewards must be finite or -inf"),
        (vector(0, math.inf), 0.5, ValueError, "rewards must be finite or -inf"),
        (vector(-math.inf, -math.inf), 0.5, ValueError, "all -inf"),
        (vector(0, 1), 0.5, ValueError, r"fraction must lie strictly between 0\.5 .* and 1\.0 .* got 0\.5"),
        (vector(0, 1), 1.0, ValueError, "fraction must lie strictly between"),
        (vector(0, 1), math.nan, ValueError, "fraction must lie strictly between"),
        (vector(0, 1, -math.inf, -math.inf), 0.5, ValueError, r"between 0\.25 .* and 0\.5"),
        (vector(3, 3), 0.7, ValueError, r"fraction must lie strictly between 1\.0 .* and 1\.0"),
        (torch.stack([vector(0, 1, 1), vector(0, 1, 2)]), 0.6, ValueError, r"between 0\.6666666666666666"),
    ],
)
def test_bad_inputs_of_beta_for_ess(rewards, fraction, error, text):
    with pytest.raises(error, match=text):
        weights.beta_for_ess(rewards, fraction)


def test_beta_for_ess_reaches_across_gaps_of_very_different_size():
    r = vector(0, -1e-30, -1e10)
    for fraction in (0.34, 0.5, 0.6, 0.9):
        assert weights.ess(r / weights.beta_for_ess(r, fraction)).item() / 3 == pytest.approx(fraction, rel=1e-9)


def test_beta_for_ess_takes_fractions_next_to_the_limits():
    r = vector(0, 0, 0, -1, -1, -2, -2, -3, -3, -4)
    assert weights.ess(r / weights.beta_for_ess(r, 0.3 + 1e-9)).item() / 10 == pytest.approx(0.3 + 1e-9, rel=1e-12)


def test_errors_of_beta_for_ess_name_its_own_argument():
    with pytest.raises(ValueError, match="rewards must leave at least one outcome"):
        weights.beta_for_ess(vector(-math.inf, -math.inf), 0.5)


# --- dtypes, scales, ties, empty batches -----------------------------------------------------------------------------

DTYPES = [F64, torch.float32, torch.bfloat16, torch.float16]
HALF = [torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", HALF)
def test_half_precision_does_not_accumulate_in_half(dtype):
    w = torch.zeros(100_000, dtype=dtype)
    size = weights.ess(w)
    assert size.item() == 1e5 and size.dtype == torch.float32  # half precision has no such number
    assert weights.log_mean(w).item() == 0 and weights.log_mean(w).dtype == dtype
    logps = weights.normalize(w)
    assert logps.dtype == dtype
    assert logps[0].item() == torch.tensor(-math.log(100_000), dtype=dtype).item()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [1.0, 300.0])
def test_every_dtype_gives_the_float64_result_rounded_once(dtype, scale, rng):
    w = (scale * torch.randn(4, 999, generator=rng, dtype=F64)).to(dtype)
    w[:, 5] = -math.inf
    for function in (weights.normalize, weights.log_mean):
        assert torch.equal(function(w), function(w.double()).to(dtype))
    counts = torch.promote_types(dtype, torch.float32)
    assert torch.equal(weights.ess(w), weights.ess(w.double()).to(counts))
    assert torch.equal(weights.beta_for_ess(w, 0.4), weights.beta_for_ess(w.double(), 0.4).to(counts))


@pytest.mark.parametrize("default", DTYPES)
def test_nothing_depends_on_the_default_dtype(default):
    w = vector(0, 1, 3, -math.inf)
    rows = torch.stack([w, torch.zeros_like(w)])

    def results():
        return (
            weights.normalize(w),
            weights.log_mean(w),
            weights.ess(w),
            weights.beta_for_ess(rows, 0.5, ties="clamp"),
        )

    assert_same_under_default_dtype(results, default)


@pytest.mark.parametrize("dtype", DTYPES)
def test_empty_batches(dtype):
    w = torch.zeros(0, 3, dtype=dtype)
    assert weights.normalize(w).shape == (0, 3) and weights.normalize(w).dtype == dtype
    for out in (weights.log_mean(w), weights.ess(w), weights.beta_for_ess(w, 0.5)):
        assert out.shape == (0,)


def test_ess_is_differentiable():
    w = vector(0.3, -1, 2, 0.3, -math.inf).requires_grad_()
    (grad,) = torch.autograd.grad(weights.ess(w), w)
    for i in range(4):
        step = torch.zeros(5, dtype=F64).index_fill(0, torch.tensor(i), 1e-6)
        with torch.no_grad():
            slope = (weights.ess(w + step) - weights.ess(w - step)) / 2e-6
        assert grad[i].item() == pytest.approx(slope.item(), abs=1e-8)
    assert grad[4] == 0


def test_beta_for_ess_carries_no_graph():
    r = vector(0, 0.3, 0.5, 1, 2).requires_grad_()
    assert not weights.beta_for_ess(r, 0.5).requires_grad


@pytest.mark.parametrize("dtype", DTYPES)
def test_beta_for_ess_clamps_rows_that_cannot_attain_the_fraction(dtype):
    # All tied; 3 of 4 maximal, 3/4 > .6; attainable; one of four left, 1/4 < .6: the largest.
    rows = [vector(1, 1, 1, 1), vector(0, 1, 1, 1), vector(0, 1, 2, 3), vector(0, 1, -math.inf, -math.inf)]
    r = torch.stack(rows).to(dtype)
    with pytest.raises(ValueError, match="fraction must lie strictly between 1.0 .* and 0.5"):
        weights.beta_for_ess(r, 0.6)
    out = weights.beta_for_ess(r, 0.6, ties="clamp")
    info = torch.finfo(out.dtype)
    assert out[:2].tolist() == [info.tiny, info.tiny] and out[3].item() == info.max
    assert torch.equal(out[2], weights.beta_for_ess(r[2], 0.6))
    # Legal wherever a temperature is: uniform over the best, and uniform over all that are left.
    logps = categorical.tilt(torch.full((4,), -math.log(4), dtype=F64), r.double(), out)
    for row, expected in ((0, vector(1, 1, 1, 1) / 4), (1, vector(0, 1, 1, 1) / 3), (3, vector(1, 1, 0, 0) / 2)):
        torch.testing.assert_close(logps[row].exp(), expected)


@pytest.mark.parametrize("rewards", [vector(0, 1e-40), vector(0, 5e-46), vector(0, 3e38)])
def test_beta_for_ess_stays_within_the_dtype(rewards):
    for fraction in (0.5 + 1e-9, 1 - 1e-9):
        beta = weights.beta_for_ess(rewards.float(), fraction, ties="clamp")
        assert 0 < beta.item() < math.inf and beta.dtype == torch.float32


@pytest.mark.parametrize(
    ("fraction", "ties", "error", "text"),
    [
        (torch.tensor(0.5), "raise", TypeError, "fraction must be a number, got a torch.float32 tensor"),
        ("0.5", "raise", TypeError, "fraction must be a number, got str"),
        (True, "raise", TypeError, "fraction must be a number, got bool"),
        (math.nan, "clamp", ValueError, "fraction must lie strictly between 0 and 1, got nan"),
        (0.0, "clamp", ValueError, "fraction must lie strictly between 0 and 1, got 0.0"),
        (1.0, "clamp", ValueError, "fraction must lie strictly between 0 and 1, got 1.0"),
        (0.5, "limit", ValueError, "ties must be one of 'raise', 'clamp', got 'limit'"),
    ],
)
def test_bad_fractions_and_ties(fraction, ties, error, text):
    with pytest.raises(error, match=text):
        weights.beta_for_ess(vector(0, 1, 2), fraction, ties=ties)


def test_numbers_of_numpy():
    r = vector(0, 1, 2)
    assert weights.beta_for_ess(r, np.float32(0.5)) == weights.beta_for_ess(r, 0.5)


# --- edges -----------------------------------------------------------------------------------------------------------


def test_beta_for_ess_of_rewards_next_to_each_other():
    expected = weights.beta_for_ess(vector(0, 1, 3), 0.5)
    for scale in (1e-300, 1e-30, 1e300):
        assert weights.beta_for_ess(vector(0, 1, 3) * scale, 0.5) / scale == pytest.approx(expected.item(), rel=1e-12)


def test_a_fraction_at_a_limit_gives_that_limit():
    # One maximal reward of two: 1/2 is the limit for beta to 0, 1 the limit for beta to infinity.
    limits = torch.finfo(F64)
    assert weights.beta_for_ess(vector(0, 1), 0.5, ties="clamp") == limits.tiny
    assert weights.beta_for_ess(vector(0, 1, -math.inf, -math.inf), 0.5, ties="clamp") == limits.max
    assert limits.tiny < weights.beta_for_ess(vector(0, 1), 0.5 + 1e-9) < limits.max


def test_a_temperature_takes_few_steps_whatever_else_is_in_the_batch(rng, monkeypatch):
    """Rows arrive at different steps; one that has arrived stays, and none falls back to halving an interval."""
    rewards = torch.randn(500, 64, generator=rng, dtype=F64) * torch.logspace(-5, 5, 500, dtype=F64)[:, None]
    rewards[::7, 10:] = -math.inf
    steps, vecdot = [], torch.linalg.vecdot
    monkeypatch.setattr(torch.linalg, "vecdot", lambda *a: steps.append(0) or vecdot(*a))
    for fraction in (0.03, 0.1, 0.15):
        steps.clear()
        got = weights.ess(rewards / weights.beta_for_ess(rewards, fraction)[:, None]) / 64
        torch.testing.assert_close(got, torch.full_like(got, fraction), rtol=1e-12, atol=0)
        assert len(steps) <= 2 * 25


def test_a_temperature_for_two_scales_of_rewards():
    # Between the three at 1e-8 below the best and the sixty at 1 the sample size stands still: a Newton step is lost.
    rewards = torch.cat([vector(0), torch.full((3,), -1e-8, dtype=F64), torch.full((60,), -1.0, dtype=F64)])
    for size in (1.5, 3.9, 3.9999, 4.0001, 5, 60):
        beta = weights.beta_for_ess(rewards, size / 64)
        assert weights.ess(rewards / beta).item() == pytest.approx(size, rel=1e-9)
