"""Samplers of diffusion: steps against published formulas, orders on exact affine maps, laws of chains, refusals."""

import itertools
import math
from functools import partial

import elsewhere
import numpy as np
import pytest
import torch
from helpers import F64, assert_same_under_default_dtype, check_sampler, vector
from hypothesis import given
from hypothesis import strategies as st
from scipy.integrate import quad

from tiltlib import diffusion, guidance
from tiltlib.mixtures import GaussianMixture

METHODS = ["euler", "heun", "dpmpp_2m", "ab3", "abm3", "maruyama", "ancestral"]
ODES = METHODS[:5]
MEAN, VARIANCE = 1.0, 0.25
MIXTURE = GaussianMixture(
    vector(0.2, 0.3, 0.3, 0.2).log(), vector(-2, -0.5, 1, 2.5)[:, None], vector(0.1, 0.4, 0.2, 0.3) ** 2
)


def close(a, b, tolerance=1e-12):
    torch.testing.assert_close(torch.as_tensor(a, dtype=F64), torch.as_tensor(b, dtype=F64), rtol=0, atol=tolerance)


def gaussian(y, s, mean=MEAN, variance=VARIANCE):
    """Score of N(mean, variance) at level s."""
    return (mean - y) / (variance + s**2)


def read_off(step):
    """Slope and offset of an affine map of the line."""
    at_0, at_1 = step(vector(0, 1)[:, None])[:, 0].tolist()
    return at_1 - at_0, at_0


def affine(score, levels, method):
    return read_off(lambda y: diffusion.sample(score, y, levels, method=method))


def chain_law(score, levels, kernel, mean, variance):
    """Mean and variance at the last level of a chain with affine score, from those at the first."""
    for s, s_next in itertools.pairwise(levels.tolist()):
        slope, offset = read_off(lambda y, s=s, t=s_next: kernel(score, y, s, t).mean)
        mean = slope * mean + offset
        variance = slope**2 * variance + kernel(score, vector(0)[:, None], s, s_next).std ** 2
    return mean, variance


# --- levels ----------------------------------------------------------------------------------------------------------


def test_levels_by_hand():
    close(diffusion.karras(2, 1.0, 9.0, rho=2.0), vector(9, 4, 1))  # (3, 2, 1)^2
    close(diffusion.karras(2, 1.0, 9.0, rho=1.0), vector(9, 5, 1))
    close(diffusion.karras(2, 1.0, 3.0**7), vector(3**7, 2**7, 1), 1e-9)  # rho = 7
    close(diffusion.geometric(3, 1.0, 8.0), vector(8, 4, 2, 1))
    # e^(2t) = 16, 4, 1
    close(diffusion.variance_preserving(2, math.log(4)), vector(15, 3, 0).sqrt())
    # alpha y has variance 1 for x_0 and eps of variance 1, at even times
    alpha = (-3 * (1 - torch.arange(8) / 7).double()).exp()
    close(alpha**2 * (1 + diffusion.variance_preserving(7, 3.0) ** 2), torch.ones(8), 1e-6)


@given(st.integers(1, 300), st.floats(1e-4, 1), st.floats(1.01, 1e4), st.floats(0.5, 20))
def test_levels_decrease_from_end_to_end(n, low, ratio, rho):
    high = low * ratio
    for levels in (diffusion.karras(n, low, high, rho), diffusion.geometric(n, low, high)):
        assert levels.shape == (n + 1,) and levels.dtype == F64 and (levels.diff() < 0).all()
        assert levels[0] == high and levels[-1] == low
    levels = diffusion.variance_preserving(n, ratio**0.5)
    assert levels.shape == (n + 1,) and (levels.diff() < 0).all() and levels[-1] == 0


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda: diffusion.karras(0, 1, 2), ValueError, "n must be an integer >= 1, got 0"),
        (lambda: diffusion.geometric(2.0, 1, 2), TypeError, "n must be an int, got float"),
        (lambda: diffusion.karras(4, 2, 1), ValueError, r"low must lie in \(0, high\), got low = 2 and high = 1"),
        (lambda: diffusion.geometric(4, 0, 1), ValueError, r"low must lie in \(0, high\), got low = 0 and high = 1"),
        (lambda: diffusion.geometric(4, 1, math.inf), ValueError, "high must be finite and > 0, got inf"),
        (lambda: diffusion.karras(4, 1, 2, rho=0), ValueError, "rho must be finite and > 0, got 0"),
        (
            lambda: diffusion.karras(4, 1, 2, rho=1e-4),
            ValueError,
            r"rho must be above log\(high\) / 700, .* got 0.0001",
        ),
        (lambda: diffusion.karras(4, 1, 2, rho=1e20), ValueError, "low and high must leave room for n levels .* n = 4"),
        (lambda: diffusion.geometric(4, 1e-300, 1e300), ValueError, "low and high must leave room for n levels"),
        (lambda: diffusion.karras(4, 1, 1 + 4e-16), ValueError, "low and high must leave room for n levels"),
        (lambda: diffusion.karras(4, torch.tensor(1.0), 2), TypeError, "low must be a number, got a torch.float32"),
        (lambda: diffusion.karras(4, "1", 2), TypeError, "low must be a number, got str"),
        (lambda: diffusion.variance_preserving(4, -1.0), ValueError, "time must be finite and > 0, got -1.0"),
        (lambda: diffusion.variance_preserving(4, 400.0), ValueError, "time must lie below 350, got 400.0"),
    ],
)
def test_bad_levels(call, error, text):
    with pytest.raises(error, match=text):
        call()


# --- scores and means ------------------------------------------------------------------------------------------------


def test_score_and_mean_of_a_mixture(rng):
    score = diffusion.of_mixture(MIXTURE)
    y = (4 * torch.rand(20, 1, generator=rng, dtype=F64) - 2).requires_grad_()
    for s in (0.0, 0.3, 2.0):
        gradient = torch.autograd.grad(MIXTURE.noised(1.0, s).logps(y).sum(), y)[0]
        close(score(y, s).detach(), gradient)
    close(diffusion.denoised(score, y, 0.3).detach(), MIXTURE.denoise(y, 1.0, 0.3).detach())
    close(diffusion.denoised(gaussian, vector(3)[:, None], 0.5), [[2.0]])  # equal variances: half way to the mean


# --- single steps ----------------------------------------------------------------------------------------------------


def test_transitions_by_hand():
    # s = 2, s' = 1, score -1: s^2 - s'^2 = 3, D = 5 - 4
    y, score = vector(5)[:, None], lambda y, s: torch.full_like(y, -1.0)
    mean, std = diffusion.transition(score, y, 2.0, 1.0)
    close(mean, [[2.0]])
    close(std, math.sqrt(3))
    mean, std = diffusion.transition(score, y, 2.0, 1.0, churn=0.5)
    close(mean, [[5 - 0.625 * 3]])
    close(std, math.sqrt(3) / 2)
    mean, std = diffusion.transition(score, y, 2.0, 1.0, churn=0.0)
    close(mean, [[3.5]])
    assert std == 0
    mean, std = diffusion.posterior_transition(score, y, 2.0, 1.0)
    close(mean, [[2.0]])  # 1 + 4/4
    close(std, math.sqrt(3) / 2)
    mean, std = diffusion.posterior_transition(score, y, 2.0, 0.0)
    close(mean, [[1.0]])
    assert std == 0


def published_step(method, d, levels, i, y):
    """Step i as the sources write it, for D given as a function (y, s) and its values so far."""
    s, t = levels[i], levels[i + 1]
    h = math.log(s / t)
    if method == "euler":  # Karras et al. 2022, algorithm 1 without correction
        return y + (t - s) * (y - d[i]) / s
    r = math.log(levels[i - 1] / s) / h
    if method == "dpmpp_2m":  # Lu et al. 2022, algorithm 2
        return t / s * y - math.expm1(-h) * ((1 + 1 / (2 * r)) * d[i] - d[i - 1] / (2 * r))
    return by_polynomial({levels[k]: d[k] for k in (i, i - 1, i - 2)}, s, t, y)


def by_polynomial(d, s, t, y):
    """From level s to t with D the polynomial in lambda through its values, {level: D}, integrated numerically."""
    total = 0.0
    for level, value in d.items():
        node, others = -math.log(level), [-math.log(other) for other in d if other != level]

        def basis(x, node=node, others=others):
            return math.exp(x) * math.prod((x - other) / (node - other) for other in others)

        total = total + quad(basis, -math.log(s), -math.log(t), epsabs=0, epsrel=1e-13)[0] * value
    return t / s * y + t * total


@pytest.mark.parametrize("method", ["euler", "dpmpp_2m", "ab3"])
@pytest.mark.parametrize("grid", [diffusion.karras, diffusion.geometric])
def test_steps_are_the_published_ones(method, grid):
    score, levels = diffusion.of_mixture(MIXTURE), grid(20, 0.05, 5.0)
    numbers = levels.tolist()
    start = y = 5 * vector(-1, -0.2, 0.5, 1.5)[:, None]
    d = []
    for i in range(20):
        d.append(diffusion.denoised(score, y, numbers[i]))
        y = published_step(
            method if i >= ["euler", "dpmpp_2m", "ab3"].index(method) else ["euler", "dpmpp_2m"][i], d, numbers, i, y
        )
    close(diffusion.sample(score, start, levels, method=method), y, 1e-11)


@pytest.mark.parametrize("n", [10, 20])
@pytest.mark.parametrize("grid", [diffusion.karras, diffusion.geometric])
def test_abm3_predicts_and_corrects(grid, n):
    score, levels = diffusion.of_mixture(MIXTURE), grid(n, 0.05, 5.0)
    start = y = 5 * vector(-1, -0.2, 0.5, 1.5)[:, None]
    numbers, calls = levels.tolist(), []
    d = [diffusion.denoised(score, y, numbers[0])]
    for i, (s, t) in enumerate(itertools.pairwise(numbers)):
        known = {numbers[k]: d[k] for k in range(i, max(i - (3 if n >= 16 else 2), -1), -1)}
        guess = by_polynomial(known, s, t, y)
        if i == 1 or (n < 16 and i > 0):
            guess = published_step("dpmpp_2m", d, numbers, i, y)
        if i == n - 1:
            y = guess
            break
        d.append(diffusion.denoised(score, guess, t))
        y = by_polynomial({numbers[k]: d[k] for k in range(i + 1, max(i - 2, -1), -1)}, s, t, y)
    counted = lambda x, s: calls.append(s) or score(x, s)  # noqa: E731
    close(diffusion.sample(counted, start, levels, method="abm3"), y, 1e-11)
    assert calls == numbers[:-1]  # one call a step


def test_abm3_corrects_by_a_line_after_a_step_much_shorter():
    score, y = diffusion.of_mixture(MIXTURE), 5 * vector(-1, -0.2, 0.5, 1.5)[:, None]
    levels = [5.0, 4.99, 2.0, 1.0]
    first = diffusion.sample(score, y, vector(*levels[:2], 4.98), method="abm3")
    d = [diffusion.denoised(score, y, 5.0)]
    d.append(diffusion.denoised(score, by_polynomial({5.0: d[0]}, 5.0, 4.99, y), 4.99))
    y = by_polynomial({5.0: d[0], 4.99: d[1]}, 5.0, 4.99, y)
    assert not torch.equal(first, y)
    d.append(diffusion.denoised(score, by_polynomial({4.99: d[1]}, 4.99, 2.0, y), 2.0))  # "euler" before it corrects
    z = by_polynomial({4.99: d[1], 2.0: d[2]}, 4.99, 2.0, y)
    got = diffusion.sample(score, 5 * vector(-1, -0.2, 0.5, 1.5)[:, None], vector(*levels), method="abm3")
    close(got, published_step("dpmpp_2m", d, levels, 2, z), 1e-11)


def test_heun_is_the_published_one():
    score, y = diffusion.of_mixture(MIXTURE), 5 * vector(-1, -0.2, 0.5, 1.5)[:, None]
    s, t, u = 5.0, 3.0, 0.0
    # Karras et al. 2022, algorithm 1; the last step, to 0, has no correction.
    slope = (y - diffusion.denoised(score, y, s)) / s
    guess = y + (t - s) * slope
    new = y + (t - s) * (slope / 2 + (guess - diffusion.denoised(score, guess, t)) / t / 2)
    close(diffusion.sample(score, y, vector(s, t), method="heun"), new)
    close(diffusion.sample(score, y, vector(s, t, u), method="heun"), diffusion.denoised(score, new, t))


def test_ab3_takes_no_parabola_where_it_would_not_pay():
    score, y = diffusion.of_mixture(MIXTURE), 5 * vector(-1, -0.2, 0.5, 1.5)[:, None]
    run = partial(diffusion.sample, score, y)
    few, enough = diffusion.geometric(15, 0.05, 5.0), diffusion.geometric(16, 0.05, 5.0)
    assert torch.equal(run(few, method="ab3"), run(few, method="dpmpp_2m"))
    assert not torch.equal(run(enough, method="ab3"), run(enough, method="dpmpp_2m"))
    growing = torch.cat([(-(1.5 ** torch.arange(20, dtype=F64)) / 400).exp(), vector(0)])
    assert torch.equal(run(growing, method="ab3"), run(growing, method="dpmpp_2m"))
    # One long step into an even grid: the parabola is back two steps later.
    uneven = torch.cat([vector(40), enough])
    assert not torch.equal(run(uneven, method="ab3"), run(uneven, method="dpmpp_2m"))


def test_a_last_step_to_0_is_the_mean():
    score, y = diffusion.of_mixture(MIXTURE), 5 * vector(-1, -0.2, 0.5, 1.5)[:, None]
    levels = diffusion.variance_preserving(24, 3.0)
    for method in ODES:
        before = diffusion.sample(score, y, levels[:-1], method=method)
        close(diffusion.sample(score, y, levels, method=method), diffusion.denoised(score, before, levels[-2].item()))


def test_churn_0_is_euler_in_the_squared_level():
    score, y = diffusion.of_mixture(MIXTURE), 5 * vector(-1, -0.2, 0.5, 1.5)[:, None]
    levels = diffusion.geometric(9, 0.05, 5.0)
    expected = y
    for s, s_next in itertools.pairwise(levels.tolist()):
        expected = expected + (s_next**2 - s**2) * -score(expected, s) / 2
    close(diffusion.sample(score, y, levels, method="maruyama", churn=0.0), expected)


def test_a_step_of_ones_own():
    score, y = diffusion.of_mixture(MIXTURE), 5 * vector(-1, -0.2, 0.5, 1.5)[:, None]
    levels = diffusion.geometric(9, 0.05, 5.0)

    def step(score, y, s, s_next, generator):
        mean, std = diffusion.posterior_transition(score, y, s, s_next)
        u = torch.rand(mean.shape, generator=generator, dtype=F64)
        return mean + std * torch.special.ndtri(u)

    runs = [
        diffusion.sample(score, y, levels, method=method, generator=torch.Generator().manual_seed(1))
        for method in ("ancestral", step)
    ]
    close(*runs)


# --- orders and limits -----------------------------------------------------------------------------------------------


def w2_error(method, n, score=gaussian, low=0.01, high=80.0, grid=diffusion.karras):
    """Distance of the law at the last level from the exact one, started from the exact law: all of them normal."""
    levels = grid(n, low, high)
    first, last = math.sqrt(VARIANCE + high**2), math.sqrt(VARIANCE + low**2)
    if method in ODES:
        slope, offset = affine(score, levels, method)
        mean, deviation = slope * MEAN + offset, abs(slope) * first
    else:
        kernel = diffusion.transition if method == "maruyama" else diffusion.posterior_transition
        mean, variance = chain_law(score, levels, kernel, MEAN, first**2)
        deviation = math.sqrt(variance)
    return math.hypot(mean - MEAN, deviation - last)


@pytest.mark.parametrize(
    ("method", "order", "n", "grid", "low"),
    [
        ("euler", 1, 128, diffusion.karras, 0.01),
        ("heun", 2, 64, diffusion.karras, 0.01),
        ("dpmpp_2m", 2, 64, diffusion.karras, 0.01),
        ("dpmpp_2m", 2, 64, diffusion.geometric, 0.1),
        ("ab3", 3, 64, diffusion.karras, 0.01),
        ("ab3", 3, 256, diffusion.geometric, 0.1),
        ("maruyama", 1, 128, diffusion.geometric, 0.1),
        ("ancestral", 1, 128, diffusion.geometric, 0.1),
    ],
)
def test_order(method, order, n, grid, low):
    errors = [w2_error(method, k, grid=grid, low=low) for k in (n, 2 * n, 4 * n)]
    slopes = [math.log2(a / b) for a, b in itertools.pairwise(errors)]
    assert all(abs(slope - order) < 0.15 for slope in slopes), slopes
    # With a score that is off by a factor, or of the wrong sign, more steps do not help.
    assert errors[-1] < 5e-3
    assert w2_error(method, 4 * n, lambda y, s: 1.05 * gaussian(y, s), grid=grid, low=low) > 1e-2
    assert w2_error(method, 4 * n, lambda y, s: -gaussian(y, s), grid=grid, low=low) > 1


@pytest.mark.parametrize(("method", "order"), [("ab3", 2), ("abm3", 3)])
def test_a_low_first_level_shows_the_error_of_the_first_step(method, order):
    errors = [w2_error(method, k, grid=diffusion.geometric, low=0.1, high=1.0) for k in (256, 512, 1024)]
    slopes = [math.log2(a / b) for a, b in itertools.pairwise(errors)]
    assert all(abs(slope - order) < 0.1 for slope in slopes), slopes


def test_a_point_mass_is_exact():
    # D = m whatever y is, so the ancestral chain has the exact law N(m, s^2) at every level, and ODEs are exact.
    score, levels = lambda y, s: (3 - y) / s**2, diffusion.karras(7, 0.2, 9.0)
    mean, variance = chain_law(score, levels, diffusion.posterior_transition, 3.0, 81.0)
    close((mean, variance), (3.0, 0.04))
    _, variance = chain_law(score, levels, diffusion.transition, 3.0, 81.0)
    assert abs(variance - 0.04) > 0.01
    for method in ("euler", "dpmpp_2m", "ab3"):
        close(affine(score, levels, method), (0.2 / 9, 3 * (1 - 0.2 / 9)))
    for method in ["ancestral", *ODES]:
        to_zero = torch.cat([levels, vector(0)])
        out = diffusion.sample(score, vector(-5, 9)[:, None], to_zero, method=method, generator=torch.Generator())
        close(out, [[3.0], [3.0]])


U = (torch.arange(500, dtype=F64) + 0.5) / 500


def quantile_error(method, n, score=None):
    """Distance in the mean square of quantiles carried from level 20 to .02 from the exact ones."""
    y = MIXTURE.noised(1.0, 20.0).quantile(U)[:, None]
    score = score or diffusion.of_mixture(MIXTURE)
    out = diffusion.sample(score, y, diffusion.karras(n, 0.02, 20.0), method=method)[:, 0]
    return (out - MIXTURE.noised(1.0, 0.02).quantile(U)).square().mean().sqrt().item()


@pytest.mark.slow
def test_odes_map_quantiles_to_quantiles():
    errors = {method: quantile_error(method, 128) for method in ODES}
    assert errors["euler"] < 4e-2 and errors["heun"] < 3e-3 and errors["dpmpp_2m"] < 1e-3 and errors["ab3"] < 1e-4
    exact = diffusion.of_mixture(MIXTURE)
    for method in ODES:
        assert quantile_error(method, 128, lambda y, s: exact(y, 1.1 * s)) > 5e-2
        assert quantile_error(method, 128, lambda y, s: 2 * exact(y, s)) > 0.1


# --- draws -----------------------------------------------------------------------------------------------------------

LEVELS = diffusion.karras(6, 0.3, 4.0)
EDGES = torch.special.ndtri(torch.arange(1, 8, dtype=F64) / 8)
CHURNED = partial(diffusion.transition, churn=0.5)


def cells(y, mean, variance):
    """Cell of each coordinate among eight that are equally likely under N(mean, variance), both as one number."""
    z = (y - mean) / math.sqrt(variance)
    return torch.searchsorted(EDGES, z[:, 0].contiguous()) * 8 + torch.searchsorted(EDGES, z[:, 1].contiguous())


def cell_law(mean, variance, of_mean, of_variance):
    """Log-probabilities of these cells if the coordinates are independent N(mean, variance)."""
    edges = of_mean + math.sqrt(of_variance) * EDGES
    below = torch.special.ndtr((edges - mean) / math.sqrt(variance))
    mass = torch.cat([below, vector(1)]) - torch.cat([vector(0), below])
    return (mass[:, None] * mass).flatten().log()


@pytest.mark.parametrize(
    ("method", "churn", "kernel", "wrong"),
    [
        ("maruyama", 1.0, diffusion.transition, diffusion.posterior_transition),
        ("maruyama", 0.5, CHURNED, diffusion.transition),
        ("ancestral", 1.0, diffusion.posterior_transition, diffusion.transition),
    ],
)
def test_draws_follow_the_law_of_the_chain(method, churn, kernel, wrong, rng):
    mean, variance = chain_law(gaussian, LEVELS, kernel, MEAN, VARIANCE + 16.0)

    def draw(n, generator, **change):
        start = torch.special.ndtri(torch.rand(n, 2, generator=generator, dtype=F64))
        y = MEAN + math.sqrt(VARIANCE + 16.0) * start
        options = {"method": method, "churn": churn, **change}
        return cells(diffusion.sample(gaussian, y, LEVELS, generator=generator, **options), mean, variance)

    def other_kernel(n, generator):
        step = lambda score, y, s, t, g: diffusion.draw(wrong(score, y, s, t), generator=g)  # noqa: E731
        return draw(n, generator, method=step, churn=1.0)

    def copied(n, generator):
        """The same noise in both coordinates."""
        first = draw(n, generator) // 8
        return first * 9

    other = cell_law(*chain_law(gaussian, LEVELS, wrong, MEAN, VARIANCE + 16.0), mean, variance)
    diagonal = torch.full((64,), -math.inf, dtype=F64)
    diagonal[::9] = -math.log(8)
    bad = {"other": (other_kernel, other), "copied": (copied, diagonal)}
    check_sampler(draw, cell_law(mean, variance, mean, variance), bad, rng)


# --- conventions -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_dtype_inputs_and_rows(method, rng):
    score = diffusion.of_mixture(MIXTURE)
    y = 5 * (torch.rand(6, 1, generator=rng, dtype=F64) - 0.5)
    levels = diffusion.karras(20, 0.05, 5.0)
    kept = y.clone(), levels.clone()
    run = lambda points: diffusion.sample(score, points, levels, method=method, generator=torch.Generator())  # noqa: E731
    whole = run(y)
    assert torch.equal(y, kept[0]) and torch.equal(levels, kept[1]) and whole.dtype == F64
    single = GaussianMixture(
        MIXTURE.prior_logps.float(), MIXTURE.means.float(), (vector(0.1, 0.4, 0.2, 0.3) ** 2).float()
    )
    out = diffusion.sample(
        diffusion.of_mixture(single), y.float(), levels.float(), method=method, generator=torch.Generator()
    )
    assert out.dtype == torch.float32
    torch.testing.assert_close(out.double(), whole, rtol=0, atol=2e-3)
    if method in ODES:
        close(torch.cat([run(row[None]) for row in y]), whole)


def test_a_uniform_number_of_0_is_no_point_at_infinity(monkeypatch):
    monkeypatch.setattr(torch, "rand", lambda shape, **options: torch.zeros(shape, dtype=F64))
    out = diffusion.sample(gaussian, vector(1)[None], vector(2, 1), method="ancestral", generator=torch.Generator())
    assert out.isfinite().all() and out < -5  # 8.3 deviations below


BAD_SAMPLE = [
    ({"levels": vector(1)}, ValueError, r"levels must have shape \(n \+ 1,\) with n >= 1 steps, got \(1,\)"),
    ({"levels": vector(1, 0.5)[:, None]}, ValueError, r"levels must have shape \(n \+ 1,\)"),
    ({"levels": vector(2, 1, 1)}, ValueError, "levels must decrease strictly, got 1.0 after 1.0 at step 1"),
    ({"levels": vector(1, 2)}, ValueError, "levels must decrease strictly, got 2.0 after 1.0 at step 0"),
    ({"levels": vector(1, -1)}, ValueError, "levels must be >= 0, got -1.0"),
    ({"levels": vector(math.inf, 1)}, ValueError, "levels must be finite"),
    ({"levels": [2, 1]}, TypeError, "levels must be a floating-point torch.Tensor, got list"),
    ({"y": vector(1)}, ValueError, r"y must have shape \(n, ...\), n points that are not empty, got \(1,\)"),
    ({"y": torch.zeros(2, 0)}, ValueError, r"y must have a last dimension of size >= 1, got shape \(2, 0\)"),
    ({"y": torch.full((2, 1), math.nan)}, ValueError, "y must be finite, got 2 of 2 entries"),
    ({"levels": vector(1e200, 1)}, ValueError, r"levels must be at most 1e\+150, got 1e\+200"),
    ({"score": lambda y, s: [0.0]}, TypeError, "score must return a floating-point torch.Tensor, got list"),
    ({"generator": 5}, TypeError, "generator must be a torch.Generator, got int"),
    ({"method": None}, ValueError, "method must be one of 'euler', .* got None"),
    ({"y": torch.zeros(2, 1).long()}, TypeError, "y must be a floating-point torch.Tensor"),
    (
        {"score": lambda y, s: y[:, 0]},
        ValueError,
        r"score must return shape \(2, 1\), as its argument, got \(2,\)",
    ),
    (
        {"method": "rk4"},
        ValueError,
        "method must be one of 'euler', 'heun', 'dpmpp_2m', 'ab3', 'abm3', 'maruyama', 'ancestral', got 'rk4'",
    ),
    ({"churn": 0.5}, ValueError, "churn must be left at 1 unless method is 'maruyama', got 0.5 for 'euler'"),
    ({"method": "maruyama", "churn": -0.5}, ValueError, "churn must be finite and >= 0, got -0.5"),
    ({"method": "maruyama"}, TypeError, "generator must be a torch.Generator, got NoneType"),
    ({"method": "ancestral"}, TypeError, "generator must be a torch.Generator, got NoneType"),
]


@pytest.mark.parametrize(("change", "error", "text"), BAD_SAMPLE)
def test_bad_input(change, error, text):
    arguments = {"score": gaussian, "y": torch.zeros(2, 1), "levels": vector(2, 1, 0.5), **change}
    with pytest.raises(error, match=text):
        diffusion.sample(**arguments)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_looks_at_the_shape_of_the_score(method):
    with pytest.raises(ValueError, match="score must return shape"):
        diffusion.sample(
            lambda y, s: y[:1], torch.zeros(2, 1), vector(2, 1), method=method, generator=torch.Generator()
        )


def test_a_draw_names_the_part_of_the_step_that_is_wrong():
    for mean, std, text in ((vector(math.nan), 1.0, "^mean must"), (vector(0), -1.0, "^std must be finite and >= 0")):
        with pytest.raises(ValueError, match=text):
            diffusion.draw(diffusion.Transition(mean[:, None], std), generator=torch.Generator())


@pytest.mark.parametrize("kernel", [diffusion.transition, diffusion.posterior_transition])
def test_bad_steps(kernel):
    y = torch.zeros(2, 1)
    with pytest.raises(ValueError, match=r"s_next must lie in \[0, s\), got s_next = 2.0 and s = 1.0"):
        kernel(gaussian, y, 1.0, 2.0)
    with pytest.raises(ValueError, match="s must be finite and > 0, got 0.0"):
        kernel(gaussian, y, 0.0, 0.0)
    with pytest.raises(ValueError, match="^s_next must be finite and >= 0, got -1.0"):
        kernel(gaussian, y, 1.0, -1.0)
    with pytest.raises(ValueError, match=r"y must have shape \(n, ...\)"):
        kernel(gaussian, y[0], 1.0, 0.5)


def test_bad_scores_and_means():
    with pytest.raises(TypeError, match="mixture must be a GaussianMixture, got int"):
        diffusion.of_mixture(1)
    with pytest.raises(ValueError, match=r"^y must have shape \(n, ...\), n points that are not empty, got \(2,\)"):
        diffusion.denoised(gaussian, torch.zeros(2), 1.0)
    with pytest.raises(ValueError, match="s must be finite and > 0, got 0"):
        diffusion.denoised(gaussian, torch.zeros(2, 1), 0)
    with pytest.raises(ValueError, match="churn must be finite and >= 0, got nan"):
        diffusion.transition(gaussian, torch.zeros(2, 1), 1.0, 0.5, churn=math.nan)
    with pytest.raises(ValueError, match=r"s must be at most 1e\+150, got 1e\+200"):
        diffusion.denoised(gaussian, torch.zeros(2, 1), 1e200)
    with pytest.raises(ValueError, match=r"churn must be at most 1e\+150, got 1e\+200"):
        diffusion.transition(gaussian, torch.zeros(2, 1), 1.0, 0.5, churn=1e200)


# --- numbers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ODES)
@pytest.mark.parametrize("last", [1e-3, 1e-12, 1e-300, 5e-324])
def test_a_tiny_last_level_is_nearly_0(method, last):
    # N(0, 1) from 10 at level 10: the exact end is 10 / sqrt(101) = .995. A line drawn to log s = -27 ends at 1.486.
    for n, error in ((9, 0.13 if method == "euler" else 0.04), (90, 0.02 if method == "euler" else 6e-3)):
        levels = torch.cat([diffusion.karras(n, 0.1, 10.0), vector(last)])
        run = partial(diffusion.sample, partial(gaussian, mean=0.0, variance=1.0), vector(10)[:, None], method=method)
        to_zero = run(torch.cat([levels[:-1], vector(0)]))
        if method != "heun":  # whose correction is that of a step of finite length
            close(run(levels), to_zero, 2e-4 if last == 1e-3 else 1e-11)
        assert abs(run(levels).item() - 10 / math.sqrt(101)) < error


@given(st.lists(st.floats(-340, 100), min_size=2, max_size=30, unique=True), st.sampled_from(ODES))
def test_extrapolation_is_bounded_on_any_levels(logs, method):
    # D lies in [-1, 1] everywhere, and no sum of absolute weights is above 5. Each end is an average of y and D.
    levels = vector(*sorted(logs, reverse=True)).exp()
    if method == "heun" or not (levels.diff() < 0).all():
        return
    signs = itertools.cycle((1.0, -1.0))
    score = lambda y, s: (next(signs) - y) / s / s  # noqa: E731
    assert diffusion.sample(score, vector(5)[:, None], levels, method=method).abs() <= 5.01


def test_levels_next_to_each_other_are_levels():
    # The ratio of some neighbouring numbers rounds to 1, and its logarithm to 0.
    start = math.nextafter(2.0, 0.0)
    numbers = [start]
    for _ in range(18):
        numbers.append(math.nextafter(numbers[-1], 0.0))
    for method in ODES:
        out = diffusion.sample(gaussian, vector(5)[:, None], vector(*numbers), method=method)
        close(out, [[5.0]], 1e-13)


@pytest.mark.parametrize("number", [np.float64, np.float32, np.int64, int])
def test_levels_take_numbers_of_numpy(number):
    for grid in (diffusion.karras, diffusion.geometric):
        levels = grid(np.int64(4), number(1), number(8))
        assert isinstance(levels, torch.Tensor) and torch.equal(levels, grid(4, 1.0, 8.0))
    assert torch.equal(diffusion.karras(4, 1.0, 8.0, number(2)), diffusion.karras(4, 1.0, 8.0, 2.0))
    assert torch.equal(diffusion.variance_preserving(4, number(3)), diffusion.variance_preserving(4, 3.0))
    y = vector(3)[:, None]
    for kernel in (diffusion.transition, diffusion.posterior_transition):
        close(kernel(gaussian, y, number(2), number(1)).mean, kernel(gaussian, y, 2.0, 1.0).mean)
    close(diffusion.denoised(diffusion.of_mixture(MIXTURE), y, number(2)), MIXTURE.denoise(y, 1.0, 2.0))


HALVES = [torch.float16, torch.bfloat16]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, F64])
@pytest.mark.parametrize("other", [torch.float16, torch.float32, F64])
def test_what_comes_back_has_the_dtype_of_the_points(dtype, other):
    seen = set()

    def score(y, s):
        seen.add(y.dtype)
        return gaussian(y.double(), s).to(other)

    y, levels = torch.tensor([[3.0], [-1.0]], dtype=dtype), vector(2, 1, 0.5)
    for method in METHODS:
        out = diffusion.sample(score, y, levels, method=method, generator=torch.Generator().manual_seed(1))
        assert out.dtype == dtype, method
    own = lambda score, y, s, t, g: diffusion.posterior_transition(score, y, s, t).mean  # noqa: E731
    assert diffusion.sample(score, y, levels, method=own).dtype == dtype
    assert diffusion.denoised(score, y, 1.0).dtype == dtype
    assert diffusion.transition(score, y, 2.0, 1.0).mean.dtype == dtype
    assert diffusion.posterior_transition(score, y, 2.0, 1.0).mean.dtype == dtype
    assert diffusion.denoising_loss(score, y, 1.0, torch.ones_like(y)).dtype == dtype
    assert seen == {dtype}


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("method", METHODS)
def test_half_precision_loses_no_short_steps(method, dtype):
    # Steps of 1.7 % or less are lost in the rounding of bfloat16: points carried in it end 40 roundings off.
    levels, y = diffusion.geometric(400, 0.05, 50.0), vector(-60, -30, 20, 7)[:, None]
    run = partial(diffusion.sample, levels=levels, method=method, churn=0.0 if method == "maruyama" else 1.0)
    exact = diffusion.of_mixture(MIXTURE)
    in_half = lambda y, s: exact(y.double(), s).to(dtype)  # noqa: E731
    out, right = (
        run(score, points, generator=torch.Generator().manual_seed(3))
        for score, points in ((in_half, y.to(dtype)), (exact, y))
    )
    assert out.dtype == dtype
    close(out, right, 2 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("method", METHODS)
def test_no_points(method):
    empty = torch.zeros(0, 2, dtype=torch.float32)
    out = diffusion.sample(gaussian, empty, vector(2, 1, 0.5), method=method, generator=torch.Generator())
    assert out.shape == (0, 2) and out.dtype == torch.float32
    assert diffusion.denoised(gaussian, empty, 1.0).shape == (0, 2)
    for kernel in (diffusion.transition, diffusion.posterior_transition):
        assert kernel(gaussian, empty, 2.0, 1.0).mean.shape == (0, 2)
    assert diffusion.denoising_loss(gaussian, empty, 1.0, empty).shape == (0,)
    assert diffusion.denoising_loss(gaussian, empty, torch.zeros(0, 1), empty).shape == (0,)


def test_nothing_depends_on_the_default_dtype():
    def results():
        y = torch.tensor([[3.0], [-1.0]], dtype=torch.float32)
        g = torch.Generator().manual_seed(1)
        yield from (diffusion.karras(5, 0.1, 3), diffusion.geometric(5, 0.1, 3), diffusion.variance_preserving(5, 2))
        for method in METHODS:
            yield diffusion.sample(gaussian, y, vector(2, 1, 0), method=method, generator=g)
        yield diffusion.denoising_loss(gaussian, y, 1.0, torch.ones_like(y))

    assert_same_under_default_dtype(results, F64)


# --- the loss --------------------------------------------------------------------------------------------------------


def test_loss_by_hand():
    # y = (1, 2) + 2 (3, -1) = (7, 0); |2 (7 + 1, 0 + 1) + (3, -1)|^2 = 19^2 + 1^2
    loss = diffusion.denoising_loss(lambda y, s: y + 1, vector(1, 2)[None], 2.0, vector(3, -1)[None])
    close(loss, [362.0])


def test_loss_with_a_level_for_each_point(rng):
    x0, eps = (torch.rand(5, 3, generator=rng, dtype=F64) for _ in range(2))
    s = vector(0.1, 0.5, 1, 2, 9)[:, None]
    got = diffusion.denoising_loss(gaussian, x0, s, eps)
    one_by_one = [diffusion.denoising_loss(gaussian, x0[i : i + 1], s[i].item(), eps[i : i + 1]) for i in range(5)]
    close(got, torch.cat(one_by_one))


def test_the_loss_is_least_at_the_score_of_the_weighted_law():
    # x_0 ~ N(1, .25) with weights exp(b x_0): the tilt is N(1 + .25 b, .25). Means over x_0 and eps by quadrature.
    nodes, mass = (torch.from_numpy(a) for a in np.polynomial.hermite_e.hermegauss(60))
    x0, eps = (MEAN + 0.5 * nodes.repeat_interleave(60))[:, None], nodes.repeat(60)[:, None]
    mass = (mass[:, None] * mass).flatten() / (2 * math.pi)
    s = 0.7
    for b in (0.0, 1.0):
        weights = mass * (b * x0[:, 0]).exp()
        for tilted in (0.0, 1.0):
            parameters = vector(MEAN + VARIANCE * tilted, VARIANCE).requires_grad_()
            score = lambda y, s, p=parameters: gaussian(y, s, p[0], p[1])  # noqa: E731
            loss = (weights * diffusion.denoising_loss(score, x0, s, eps)).sum()
            gradient = torch.autograd.grad(loss, parameters)[0]
            assert (gradient.abs().max() < 1e-12) == (b == tilted), gradient
            assert (gradient.abs().max() > 0.1) == (b != tilted), gradient


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"eps": torch.zeros(2, 1)}, r"x0 and eps must have one shape, got x0 \(2, 3\), eps \(2, 1\)"),
        ({"x0": torch.zeros(3), "eps": torch.zeros(3)}, r"x0 must have shape \(n, ...\)"),
        ({"s": 0.0}, "s must be finite and > 0, got 0.0"),
        ({"s": torch.zeros(2, 1)}, "s must be finite and > 0"),
        ({"s": torch.ones(2)}, r"s must have shape \(2, 1\), got \(2,\)"),
        ({"s": 1e200}, r"s must be at most 1e\+150, got 1e\+200"),
        ({"x0": torch.full((2, 3), math.inf)}, "x0 must be finite"),
        ({"eps": torch.full((2, 3), math.nan)}, "eps must be finite"),
        ({"score": lambda y, s: y[0]}, "score must return shape"),
    ],
)
def test_bad_loss(change, text):
    arguments = {"score": gaussian, "x0": torch.zeros(2, 3), "s": 1.0, "eps": torch.zeros(2, 3), **change}
    with pytest.raises(ValueError, match=text):
        diffusion.denoising_loss(**arguments)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"eps": torch.zeros(2, 3, dtype=F64)}, "eps must have the dtype of x0, torch.float32, got torch.float64"),
        ({"x0": torch.zeros(2, 3, dtype=F64)}, "eps must have the dtype of x0, torch.float64, got torch.float32"),
        ({"s": torch.ones(2, 1, dtype=F64)}, "s must have the dtype of x0, torch.float32, got torch.float64"),
        ({"eps": [0.0]}, "eps must be a floating-point torch.Tensor, got list"),
        ({"score": lambda y, s: None}, "score must return a floating-point torch.Tensor, got NoneType"),
    ],
)
def test_the_loss_takes_one_dtype(change, text):
    arguments = {"score": gaussian, "x0": torch.zeros(2, 3), "s": 1.0, "eps": torch.zeros(2, 3), **change}
    with pytest.raises(TypeError, match=text):
        diffusion.denoising_loss(**arguments)


@pytest.mark.parametrize("dtype", HALVES)
def test_the_loss_in_half_precision_rounds_once(dtype):
    # s times the score is 300.8 and eps is -299: in half precision 300.8 is 300.75 or 300.
    x0, slope = torch.zeros(1, 1, dtype=dtype), torch.tensor([[3.008]], dtype=dtype)
    eps = x0 - 299
    loss = diffusion.denoising_loss(lambda y, s: slope, x0, 100.0, eps)
    close(loss, [(100 * slope.item() + eps.item()) ** 2], torch.finfo(dtype).eps * 8)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_score_that_is_not_finite_spreads_no_further(bad):
    y, broken = torch.zeros(3, 2, dtype=F64), lambda y, s: torch.where(torch.arange(3)[:, None] == 1, bad, -y)
    text = "must return finite numbers, got 2 of 6 entries NaN or infinite"
    for call in (
        lambda: diffusion.denoised(broken, y, 1.0),
        lambda: diffusion.transition(broken, y, 1.0, 0.5),
        lambda: diffusion.posterior_transition(broken, y, 1.0, 0.5),
        lambda: diffusion.denoising_loss(broken, y, 1.0, y),
        *(
            lambda m=m: diffusion.sample(broken, y, vector(2, 1, 0), method=m, generator=torch.Generator())
            for m in diffusion._METHODS
        ),
        lambda: guidance.classifier_free(broken, lambda y, s: -y, 2.0)(y, 1.0),
    ):
        with pytest.raises(ValueError, match=text):
            call()


# --- edges -----------------------------------------------------------------------------------------------------------


def test_levels_at_the_edges_of_their_ranges():
    for grid in (diffusion.karras, diffusion.geometric):
        with pytest.raises(ValueError, match=r"low must lie in \(0, high\), got low = 2 and high = 2"):
            grid(4, 2, 2)
        assert grid(1, 0.5, 2).tolist() == [2, 0.5]
    with pytest.raises(ValueError, match="rho must be above"):
        diffusion.karras(4, 1, math.exp(7.005), rho=0.01)
    assert (diffusion.karras(4, 1, math.exp(6.995), rho=0.01).diff() < 0).all()
    with pytest.raises(ValueError, match="time must lie below 350, got 350"):
        diffusion.variance_preserving(4, 350)
    assert diffusion.variance_preserving(4, 349.9).isfinite().all()


@pytest.mark.parametrize("kernel", [diffusion.transition, diffusion.posterior_transition])
def test_a_step_goes_down(kernel):
    with pytest.raises(ValueError, match=r"s_next must lie in \[0, s\), got s_next = 1.0 and s = 1.0"):
        kernel(gaussian, torch.zeros(2, 1), 1.0, 1.0)


def weights_of_the_last(steps, order):
    """What a step of this length in log s, after steps of these lengths, takes of each D so far, newest first."""
    *before, h = steps
    levels = [1.0]
    for step in reversed(before):
        levels.append(levels[-1] * math.exp(step))
    past = list(zip(levels, torch.eye(len(levels), dtype=F64), strict=True))
    return diffusion._extrapolated(past, math.exp(-h), order)


@pytest.mark.parametrize(("before", "order"), [((0.3,), 2), ((0.3, 0.3), 3), ((0.2, 0.5), 3), ((0.6, 0.3), 3)])
def test_errors_of_the_mean_grow_five_fold_at_most(before, order):
    """A step so long that it would multiply them by more goes without the oldest D."""
    low, high = 1e-3, 10.0
    for _ in range(60):
        middle = (low + high) / 2
        used = weights_of_the_last((*before, middle), order)[-1] != 0
        low, high = (middle, high) if used else (low, middle)
    within, beyond = (weights_of_the_last((*before, h), order) for h in (low, high))
    close(within.sum(), 1.0)
    close(within.abs().sum(), 5.0, 1e-9)
    lower = weights_of_the_last((*before[1:], high), order - 1)
    close(beyond, torch.cat([lower, vector(0)]))


def test_four_times_as_far_is_too_far_for_a_line():
    score, y = diffusion.of_mixture(MIXTURE), 5 * vector(-1, -0.2, 0.5, 1.5)[:, None]
    for last, too_far in ((1 / 16, True), (1.01 / 16, False)):
        line, point = (diffusion.sample(score, y, vector(2, 1, last), method=m) for m in ("dpmpp_2m", "euler"))
        assert torch.equal(line, point) == too_far


def test_four_times_as_far_is_too_far_for_a_parabola_that_corrects():
    newest, older, at_the_end = torch.eye(3, dtype=F64)
    for times, used in ((3.9, True), (4.1, False)):
        past = [(1.0, newest), (math.exp(0.1), older)]
        got = diffusion._interpolated(past, math.exp(-0.1 * times), at_the_end)
        close(got.sum(), 1.0)
        assert bool(got[1]) == used


def test_levels_one_rounding_apart(rng):
    levels = torch.tensor([2 - i * 2.0**-52 for i in range(1, 20)], dtype=F64)
    y = torch.rand(5, 1, generator=rng, dtype=F64)
    for method in ODES:
        close(diffusion.sample(gaussian, y, levels, method=method), y)


# --- networks --------------------------------------------------------------------------------------------------------

# The schedule of DDPM: the first level is .01, the last 157.
BETAS = torch.linspace(1e-4, 0.02, 1000, dtype=F64)
ALPHAS = (1 - BETAS).cumprod(0)
IMAGES = GaussianMixture(
    vector(0.3, 0.7).log(), torch.stack([vector(*range(12)) / 12, -vector(*range(12)) / 6]), vector(0.2, 0.5)
)
SHAPE = (1, 3, 4)


def exact_network(mixture, prediction, alphas=ALPHAS, shape=SHAPE):
    """What a perfect network predicts, computed in x from the law of x_t, one time index for all points."""

    def network(x, t):
        assert t.shape == (len(x),) and not t.is_floating_point() and len(t.unique()) == 1
        a, b = alphas[t[0]].sqrt().item(), (1 - alphas[t[0]]).sqrt().item()
        flat = x.flatten(1).to(mixture.means.dtype)
        eps, x0 = -b * mixture.noised(a, b).score(flat), mixture.denoise(flat, a, b)
        return {"eps": eps, "v": a * eps - b * x0, "x0": x0}[prediction].view(-1, *shape).to(x.dtype)

    return network


def of_images(mixture):
    score = diffusion.of_mixture(mixture)
    return lambda y, s: score(y.flatten(1), s).view_as(y)


@pytest.mark.parametrize("prediction", ["eps", "v", "x0"])
@pytest.mark.parametrize("dtype", [F64, torch.float32])
def test_a_perfect_network_is_the_exact_score(prediction, dtype, rng):
    network = exact_network(IMAGES.to(dtype), prediction)
    score, levels = diffusion.of_network(network, ALPHAS.to(dtype), prediction)
    kept = ALPHAS.to(dtype).double()
    close(levels, ((1 - kept) / kept).sqrt().flip(0), 1e-10)
    worst = 0.0
    for i, s in enumerate(levels.tolist()):
        if i % 7 and 3 < i < 996:
            continue
        y = IMAGES.noised(1.0, s).sample(5, generator=rng).to(dtype).view(5, *SHAPE)
        got, right = score(y, s), of_images(IMAGES)(y.double(), s)
        assert got.dtype == dtype and got.shape == y.shape
        # In units of the noise. The mean of x_0 differs from y by about s, so that y / s digits cancel.
        digits = 1 if prediction != "x0" else max(1.0, y.abs().max().item() / s)
        worst = max(worst, s * (got.double() - right).abs().max().item() / digits)
    # In float32 half of the digits: the network is a mixture that computes in float32, and loses some by itself.
    assert worst < (1e-12 if dtype == F64 else math.sqrt(torch.finfo(dtype).eps))


def test_what_a_careless_author_would_write_is_not_the_score(rng):
    """At each level: points that are not scaled, a v of the other sign, a level without its root, another word."""
    perfect = {word: exact_network(IMAGES, word) for word in ("eps", "v", "x0")}
    for t in (100, 300, 500):
        level = ((1 - ALPHAS[t]) / ALPHAS[t]).sqrt().item()
        y = IMAGES.noised(1.0, level).sample(5, generator=rng).view(5, *SHAPE)
        right, at = of_images(IMAGES)(y, level), torch.full((5,), t)
        a = ALPHAS[t].sqrt()
        for word in perfect:
            close(diffusion.of_network(perfect[word], ALPHAS, word).score(y, level), right, 1e-11)
        for wrong in (
            -perfect["eps"](y, at) / level,
            -perfect["eps"](a * y, at) / (1 - ALPHAS[t]).sqrt(),
            -perfect["eps"](a * y, at) / level**2,
            -a * (a * y - perfect["v"](a * y, at) / level),
            (a * perfect["x0"](a * y, at) - y) / level**2,
            diffusion.of_network(perfect["v"], ALPHAS, "eps").score(y, level),
            diffusion.of_network(perfect["eps"], ALPHAS, "v").score(y, level),
            diffusion.of_network(perfect["x0"], ALPHAS, "v").score(y, level),
        ):
            assert (wrong - right).norm() > 0.02 * right.norm()


def recorder(seen):
    def network(x, t):
        seen.append((x, t))
        return torch.zeros_like(x)

    return network


def test_the_time_index_of_a_level():
    seen = []
    score, levels = diffusion.of_network(recorder(seen), ALPHAS, "eps")
    y = torch.ones(3, 2, dtype=F64)
    for t in (0, 1, 500, 998, 999):
        # A level in float32 is the same level, also at both ends.
        for s in (levels[-1 - t].item(), levels[-1 - t].float().item()):
            score(y, s)
            x, got = seen.pop()
            assert got.dtype == torch.int64 and got.tolist() == [t] * 3 and got.is_contiguous()
            close(x, y / math.sqrt(1 + s**2))
    # In between: linear in log s, with the scale of the level itself.
    for t, share in ((0, 0.25), (700, 0.5), (998, 0.9)):
        low, high = levels[-1 - t].item(), levels[-2 - t].item()
        s = low ** (1 - share) * high**share
        score(y, s)
        x, got = seen.pop()
        assert got.dtype == F64
        close(got, [t + share] * 3, 1e-8)
        close(x, y / math.sqrt(1 + s**2))
        score(y.float(), s)
        assert seen.pop()[1].dtype == torch.float32
        score(y.half(), s)
        x, got = seen.pop()
        assert x.dtype == torch.float16 and got.dtype == torch.float32  # half precision ends at whole numbers from 1024


def test_indices_are_those_of_the_k_diffusion_schedulers():
    """`_sigma_to_t` of diffusers 0.39, its arithmetic written out: float32 logs, weights clipped to [0, 1]."""
    seen = []
    score, levels = diffusion.of_network(recorder(seen), ALPHAS, "eps")
    logs = levels.flip(0).log().numpy()
    for s in diffusion.karras(12, 0.02, 150.0).tolist():
        distances = np.log(s) - logs
        low = min(int((distances >= 0).cumsum().argmax()), len(logs) - 2)
        w = np.clip((logs[low] - np.log(s)) / (logs[low] - logs[low + 1]), 0, 1)
        score(torch.ones(1, 1, dtype=F64), s)
        close(seen.pop()[1], [(1 - w) * low + w * (low + 1)], 1e-8)


def test_a_level_for_each_point(rng):
    """The denoising loss hands over a tensor of levels; trained ones give whole indices, and no graph to the level."""
    seen = []
    network = recorder(seen)
    for word in ("eps", "v", "x0"):
        score, levels = diffusion.of_network(lambda x, t: network(x, t) + x, ALPHAS, word)
        y = torch.rand(4, *SHAPE, generator=rng, dtype=F64)
        s = levels[[3, 500, 999, 20]].view(4, 1, 1, 1)
        got = score(y, s)
        assert seen.pop()[1].tolist() == [996, 499, 0, 979]
        close(got, torch.cat([score(y[i : i + 1], s[i].item()) for i in range(4)]))
        between = s.clone().requires_grad_()
        got = score(y, between * 1.001)
        assert seen.pop()[1].is_floating_point() and not got.requires_grad
    eps = torch.rand(4, *SHAPE, generator=rng, dtype=F64)
    loss = diffusion.denoising_loss(score, y, s, eps)
    # x_0 = x is predicted: |(x - y) / s + eps|^2 with x = y / sqrt(1 + s^2)
    z = y + s * eps
    close(loss, (((1 + s**2).rsqrt() - 1) * z / s + eps).square().sum((1, 2, 3)))
    close(
        loss, torch.cat([diffusion.denoising_loss(score, y[i : i + 1], s[i].item(), eps[i : i + 1]) for i in range(4)])
    )


def test_the_index_of_level_0_is_skipped():
    """A share of 1 is level 0: a sampler may end there, and the indices above stay what they are."""
    seen = []
    score, levels = diffusion.of_network(recorder(seen), vector(1, 0.8, 0.5, 0.2), "eps")
    close(levels, vector(2, 1, 0.5, 0))
    for t, s in ((3, 2.0), (2, 1.0), (1, 0.5), (1.5, math.sqrt(0.5))):
        score(torch.ones(1, 1, dtype=F64), s)
        close(seen.pop()[1], [float(t)], 1e-9)
    out = diffusion.sample(score, torch.ones(2, 1, 2, dtype=F64), levels)
    assert out.shape == (2, 1, 2) and [t[0].item() for _, t in seen] == [3, 2, 1]
    with pytest.raises(ValueError, match=r"s must lie in \[0.5, 2\], .* got 0.1"):
        score(torch.ones(1, 1, dtype=F64), 0.1)


def test_the_fewest_and_the_farthest_levels():
    seen, y = [], torch.ones(1, 1, dtype=F64)
    for shares in (vector(0.8, 0.2), vector(1, 0.8, 0.2), vector(0.5, 1e-300)):
        score, levels = diffusion.of_network(recorder(seen), shares, "eps")
        for t, s in ((len(shares) - 1, levels[0].item()), (len(shares) - 2, levels[1].item())):
            score(y, s)
            assert seen.pop()[1].tolist() == [t]


def test_a_level_that_rounding_moved_past_an_end_is_the_end():
    """Also beside one between two levels, where no index is made whole."""
    seen = []
    score, levels = diffusion.of_network(recorder(seen), ALPHAS, "eps")
    s = torch.stack([levels[0] * (1 + 1e-9), levels[-1] * (1 - 1e-9), (levels[3] * levels[4]).sqrt()])[:, None]
    score(torch.ones(3, 1, dtype=F64), s)
    t = seen.pop()[1]
    assert t.is_floating_point() and t[:2].tolist() == [999, 0]
    close(t[2], 995.5, 1e-8)


def test_points_may_lie_elsewhere_than_the_shares_of_the_signal():
    with elsewhere.Pretend():
        y = torch.ones(3, 2, dtype=F64).to(elsewhere.DEVICE)
        score = diffusion.of_network(recorder(seen := []), ALPHAS, "eps").score
        assert isinstance(score(y, 1.0), elsewhere.Tensor)
        assert all(isinstance(value, elsewhere.Tensor) for value in seen[0])


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"prediction": "epsilon"}, ValueError, "prediction must be one of 'eps', 'v', 'x0', got 'epsilon'"),
        ({"alphas_cumprod": [0.9, 0.1]}, TypeError, "alphas_cumprod must be a floating-point torch.Tensor, got list"),
        ({"alphas_cumprod": vector(0.9, math.nan)}, ValueError, "alphas_cumprod must be finite, got 1 of 2"),
        ({"alphas_cumprod": vector(0.9)}, ValueError, r"alphas_cumprod must have shape \(T,\) with T >= 2, got \(1,\)"),
        ({"alphas_cumprod": vector(0.9, 0.1)[None]}, ValueError, r"must have shape \(T,\) with T >= 2, got \(1, 2\)"),
        (
            {"alphas_cumprod": vector(0.9, 0.5, 0.0)},
            ValueError,
            r"alphas_cumprod must lie in \(0, 1\], at least 1e-300, got 0.0 at index 2",
        ),
        ({"alphas_cumprod": vector(1.1, 0.5)}, ValueError, r"must lie in \(0, 1\], .* got 1.1 at index 0"),
        ({"alphas_cumprod": vector(0.5, 1e-301)}, ValueError, "at least 1e-300, got 1e-301 at index 1"),
        ({"alphas_cumprod": BETAS}, ValueError, r"decrease strictly, got 0.00011\d* after 0.0001 at index 1"),
        ({"alphas_cumprod": vector(0.9, 0.5, 0.5)}, ValueError, "decrease strictly, got 0.5 after 0.5 at index 2"),
        (
            {"alphas_cumprod": vector(1, 0.5)},
            ValueError,
            "must give at least two levels above 0, .* 2 levels from 0 to 1",
        ),
        (
            {"alphas_cumprod": vector(0.5, math.nextafter(0.5, 0), 0.1)},
            ValueError,
            "two levels above 0, that float64 can tell apart, got 3 levels from 1 to 3$",
        ),
    ],
)
def test_bad_networks(change, error, text):
    arguments = {"network": recorder([]), "alphas_cumprod": ALPHAS, "prediction": "eps", **change}
    with pytest.raises(error, match=text):
        diffusion.of_network(**arguments)


@pytest.mark.parametrize(
    ("network", "y", "s", "error", "text"),
    [
        (lambda x, t: [x], torch.ones(2, 3), 1.0, TypeError, "network must return a floating-point .*, got list"),
        (lambda x, t: x[:1], torch.ones(2, 3), 1.0, ValueError, r"network must return shape \(2, 3\), .* got \(1, 3\)"),
        (lambda x, t: x / 0, torch.ones(2, 3), 1.0, ValueError, "network must return finite numbers, got 6 of 6"),
        (
            None,
            torch.ones(2),
            1.0,
            ValueError,
            r"y must have shape \(n, ...\), n points that are not empty, got \(2,\)",
        ),
        (None, torch.ones(2, 0, 3), 1.0, ValueError, r"y must have shape \(n, ...\), .*, got \(2, 0, 3\)"),
        (None, torch.ones(2, 3) * math.inf, 1.0, ValueError, "y must be finite"),
        (None, torch.ones(2, 3), 158.0, ValueError, r"s must lie in \[0.0100005, 157.407\], .* got 158"),
        (None, torch.ones(2, 3), 0.0099, ValueError, r"s must lie in \[0.0100005, 157.407\], .* got 0.0099"),
        (None, torch.ones(2, 3), 0.0, ValueError, "s must be finite and > 0, got 0.0"),
        (None, torch.ones(2, 3), torch.ones(2), ValueError, r"s must have shape \(2, 1\), got \(2,\)"),
        (None, torch.ones(2, 3), torch.zeros(2, 1), ValueError, "s must be finite and > 0"),
        (None, torch.ones(2, 3), torch.tensor([[1.0], [200.0]]), ValueError, "s must lie in .* got 200"),
    ],
)
def test_bad_calls_of_networks(network, y, s, error, text):
    score = diffusion.of_network(network or recorder([]), ALPHAS, "eps").score
    with pytest.raises(error, match=text):
        score(y, s)


def test_a_table_of_indices_takes_trained_levels_only():
    table = torch.arange(1000.0)[:, None]
    network = lambda x, t: torch.nn.functional.embedding(t, table) * x  # noqa: E731
    score, levels = diffusion.of_network(network, ALPHAS, "eps")
    close(
        score(torch.ones(1, 1), levels[-1 - 7].item()).double(),
        [[-7 / math.sqrt(1 + levels[-8] ** 2) / levels[-8]]],
        1e-3,
    )
    with pytest.raises(RuntimeError, match="indices"):
        score(torch.ones(1, 1), 1.2345)


@pytest.mark.parametrize("prediction", ["eps", "v", "x0"])
@pytest.mark.parametrize("dtype", HALVES)
def test_a_network_in_half_precision_rounds_once(prediction, dtype):
    """What is computed of x and of the prediction has the digits of float32: the sum is rounded at the end."""
    score = diffusion.of_network(lambda x, t: 0.75 * x, ALPHAS, prediction).score
    y, s = torch.linspace(1.5, 3.5, 60, dtype=dtype)[:, None], 1.3
    a = 1 / math.sqrt(1 + s**2)
    x = (a * y.float()).to(dtype)
    out = (0.75 * x).double()
    right = {"eps": -out / s, "v": -a * (a * y.double() + out / s), "x0": (out - y.double()) / s**2}[prediction]
    got = score(y, s)
    assert got.dtype == dtype
    torch.testing.assert_close(got.double(), right, rtol=0.51 * torch.finfo(dtype).eps, atol=0)


@pytest.mark.parametrize("method", METHODS)
def test_images_are_points(method, rng):
    """Each shape behind the first dimension gives what the same numbers give as vectors."""
    flat, levels = diffusion.of_mixture(IMAGES), diffusion.karras(18, 0.05, 5.0)
    y = IMAGES.noised(1.0, 5.0).sample(4, generator=rng)
    run = lambda score, y: diffusion.sample(  # noqa: E731
        score, y, levels, method=method, generator=torch.Generator().manual_seed(1)
    )
    for shape in (SHAPE, (2, 6), (12, 1)):
        score = lambda y, s: flat(y.flatten(1), s).view_as(y)  # noqa: E731
        got = run(score, y.view(4, *shape))
        assert got.shape == (4, *shape)
        close(got.flatten(1), run(flat, y))
        x0, eps = y.view(4, *shape), torch.ones(4, *shape, dtype=F64)
        loss = diffusion.denoising_loss(score, x0, 0.7, eps)
        close(loss, diffusion.denoising_loss(flat, y, 0.7, torch.ones(4, 12, dtype=F64)))
        each = vector(0.5, 1, 2, 3).view(4, *[1] * len(shape))
        one_by_one = [
            diffusion.denoising_loss(gaussian, x0[i : i + 1], each[i].item(), eps[i : i + 1]) for i in range(4)
        ]
        close(diffusion.denoising_loss(gaussian, x0, each, eps), torch.cat(one_by_one))
        with pytest.raises(ValueError, match=r"s must have shape \(4, 1, 1"):
            diffusion.denoising_loss(score, x0, vector(1, 1, 1, 1)[:, None], eps)


def test_a_network_is_trained_through_its_score(rng):
    """eps = slope x with the best slope b for x_0 of law N(0, 1): there the gradient is 0, and nowhere near."""
    nodes, mass = (torch.from_numpy(a) for a in np.polynomial.hermite_e.hermegauss(20))
    x0, eps = nodes.repeat_interleave(20)[:, None], nodes.repeat(20)[:, None]
    mass = (mass[:, None] * mass).flatten() / (2 * math.pi)
    t = 400
    for factor in (1.0, 1.05):
        slope = (factor * (1 - ALPHAS[t]).sqrt()).requires_grad_()
        score, levels = diffusion.of_network(lambda x, t, slope=slope: slope * x, ALPHAS, "eps")
        loss = (mass * diffusion.denoising_loss(score, x0, levels[-1 - t].item(), eps)).sum()
        gradient = torch.autograd.grad(loss, slope)[0].abs()
        assert gradient < 1e-12 if factor == 1 else gradient > 1e-2
