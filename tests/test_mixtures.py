"""Gaussian mixtures: every closed form against its definition, by autograd, by quadrature or point by point."""

import math
import re

import mpmath
import numpy as np
import pytest
import torch
from helpers import F64, check_sampler, law, vector
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import ndtr
from torch.distributions import MultivariateNormal

from tiltlib import mixtures, verify
from tiltlib.mixtures import GaussianMixture

# Two components at -1 and 1, variance 1/4; the reward -(x - 1)^2 / 2 at beta = 1 is -x^2 / 2 + x - 1/2.
PAIR = GaussianMixture(law(0.5, 0.5), vector(-1, 1)[:, None], vector(0.25))
ONE = torch.eye(1, dtype=F64)

J, D = 3, 4
SHAPES = {
    "one variance": (1,),
    "variances": (J,),
    "one diagonal": (1, D),
    "diagonals": (J, D),
    "one full": (1, D, D),
    "full": (J, D, D),
}
KINDS = [*SHAPES, "one basis, many spectra"]


def close(a, b, tolerance=1e-12):
    torch.testing.assert_close(torch.as_tensor(a, dtype=F64), torch.as_tensor(b, dtype=F64), rtol=0, atol=tolerance)


def normal(shape, rng):
    return torch.randn(shape, generator=rng, dtype=F64)


def spd(shape, rng):
    """Symmetric matrices with eigenvalues from about .2 up, no two alike."""
    root = normal(shape, rng)
    return root @ root.mT / shape[-1] + 0.2 * torch.eye(shape[-1], dtype=F64)


def random_mixture(kind, rng, *, d=D, scale=1.0):
    priors = normal(J, rng).log_softmax(-1)
    means = scale * normal((J, d), rng)
    shape = tuple(d if size == D else size for size in SHAPES.get(kind, (J,)))
    covariances = spd(shape, rng) if len(shape) == 3 else 0.2 + normal(shape, rng).square()
    mixture = GaussianMixture(priors, means, covariances)
    # A multiple of I per component, bent in one and the same way, has one basis and several spectra.
    return mixture.tilt(spd((d, d), rng), None, 1.0).mixture if kind == KINDS[-1] else mixture


def definition(mixture, x, alpha=1.0, sigma=0.0):
    """Log of p_k N(x; alpha m_k, alpha^2 S_k + sigma^2 I) from torch's own Gaussian, shape (n, J)."""
    covariances = alpha**2 * mixture.covariances + sigma**2 * torch.eye(mixture.dimension, dtype=F64)
    return mixture.prior_logps + MultivariateNormal(alpha * mixture.means, covariances).log_prob(x[:, None])


def reward(x, quadratic, linear):
    return -((x @ quadratic) * x).sum(-1) / 2 + x @ linear


GRID = torch.linspace(-20, 20, 40001, dtype=F64)  # the trapezoid rule is exact to rounding for such smooth functions
STEP = 1e-3


# --- densities and scores --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_density_posterior_and_score_are_those_of_the_definition(kind, rng):
    mixture = random_mixture(kind, rng)
    if kind in SHAPES:
        assert mixture.covariances.shape == (J, D, D)
    x = (3 * normal((40, D), rng)).requires_grad_()
    joint = definition(mixture, x)
    (score,) = torch.autograd.grad(joint.logsumexp(-1).sum(), x)
    x = x.detach()
    close(mixture.component_logps(x), joint.detach(), 1e-10)
    close(mixture.logps(x), joint.detach().logsumexp(-1), 1e-10)
    close(mixture.posterior(x), joint.detach().log_softmax(-1), 1e-10)
    close(mixture.score(x), score, 1e-10)
    # The score is differentiable, as guidance needs it: its Jacobian is symmetric, being a Hessian.
    hessian = torch.autograd.functional.jacobian(lambda y: mixture.score(y[None])[0], x[0])
    close(hessian, hessian.mT, 1e-10)
    assert hessian.abs().max() > 0.01


def test_a_density_by_hand():
    # .5 N(0; -1, .25) + .5 N(0; 1, .25) = exp(-2) / sqrt(pi / 2)
    close(PAIR.logps(vector(0)[:, None]), [-2 - math.log(math.pi / 2) / 2])
    # The odds at 1/4 are exp(2 * 2 * 1/4 * 2) = e^2, the score is 4 (tanh(1) - 1/4).
    close(PAIR.posterior(vector(0.25)[:, None]), law(1 / (1 + math.e**2), 1 / (1 + math.e**-2))[None])
    close(PAIR.score(vector(0.25)[:, None]), [[4 * (math.tanh(1) - 0.25)]])
    close(PAIR.logps(GRID[:, None]).exp().sum() * STEP, 1)


@pytest.mark.parametrize("kind", KINDS)
def test_all_kinds_are_the_full_kind(kind, rng):
    mixture = random_mixture(kind, rng)
    full = GaussianMixture(mixture.prior_logps, mixture.means, mixture.covariances)
    x = 3 * normal((40, D), rng)
    for f in (
        lambda m: m.component_logps(x),
        lambda m: m.posterior(x),
        lambda m: m.score(x),
        lambda m: m.noised(0.8, 0.6).score(x),
        lambda m: m.denoise(x, 0.8, 0.6),
        lambda m: m.denoise_covariance(x, 0.8, 0.6),
        lambda m: m.uniforms(x),
        lambda m: m.project(x[0]).covariances,
        lambda m: m.covariance(),
        lambda m: m.of_class(torch.tensor([1, 0, 1]), 1).score(x),
        lambda m: m.tilt(spd((D, D), verify.rng("tilt")), x[0], 0.7).log_partition,
        lambda m: m.tilt(None, x[0], 0.7).mixture.score(x),
    ):
        close(f(mixture), f(full), 1e-10)


@pytest.mark.parametrize("kind", KINDS)
def test_scores_far_away_are_finite(kind, rng):
    mixture = random_mixture(kind, rng)
    x = 1e9 * normal((20, D), rng)
    k = mixture.component_logps(x).argmax(-1)
    expected = -torch.linalg.solve(mixture.covariances[k], (x - mixture.means[k])[..., None])[..., 0]
    torch.testing.assert_close(mixture.score(x), expected, rtol=1e-6, atol=0)
    assert mixture.denoise(x, 0.5, 2.0).isfinite().all() and mixture.uniforms(x).isfinite().all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("priors", [law(0.2, 0.3, 0.5), law(0.4, 0, 0.6)])
def test_data_far_from_zero_lose_no_digits(kind, priors, rng):
    mixture, x, far = random_mixture(kind, rng), normal((20, D), rng), 2.0**20 * vector(1, -1, 2, 0)
    here, moved = (
        GaussianMixture._of(priors, mixture.means + shift, mixture._spectrum, mixture._basis) for shift in (0, far)
    )
    # The sums x + 2^21 are themselves rounded to 2^-31 = 5e-10.
    close(moved.logps(x + far), here.logps(x), 1e-7)
    close(moved.score(x + far), here.score(x), 1e-7)


@pytest.mark.parametrize("covariances", [vector(2), vector(2, 2)[None], 2 * torch.eye(2, dtype=F64)[None]])
def test_what_components_share_does_not_drown_their_differences(covariances):
    # Means -1 and 1 on the first axis, a point far up the second one: |x|^2 / 4 has no digits left for the odds x_1.
    mixture = GaussianMixture(law(0.5, 0.5), vector(-1, 1)[:, None] * vector(1, 0), covariances)
    x = vector(0.3, 1e9)[None]
    close(mixture.posterior(x), law(1 / (1 + math.exp(0.3)), 1 / (1 + math.exp(-0.3)))[None])
    close(mixture.score(x)[0, 0], (math.tanh(0.15) - 0.3) / 2)


@pytest.mark.parametrize("kind", KINDS)
def test_blocks_of_rows_do_not_show(kind, rng):
    mixture = random_mixture(kind, rng)
    n = 2**20 // 8 // J // (D if mixture._own_bases() else 1) + 5
    x = normal((n, D), rng)
    some = torch.tensor([0, 1, n // 2, n - 6, n - 5, n - 1])
    for f in (mixture.score, lambda y: mixture.denoise(y, 0.8, 0.6)):
        whole = f(x)
        assert whole.shape == (n, D)
        close(whole[some], torch.cat([f(x[i : i + 1]) for i in some.tolist()]))
    assert mixture.score(x[:0]).shape == (0, D)


@pytest.mark.parametrize("kind", KINDS)
def test_single_precision(kind, rng):
    mixture = random_mixture(kind, rng)
    half = GaussianMixture(mixture.prior_logps.float(), mixture.means.float(), mixture.covariances.float())
    x = 2 * normal((40, D), rng)
    tilted = half.tilt(torch.eye(D), torch.ones(D), 1.0)
    for got, expected in (
        (half.logps(x.float()), mixture.logps(x)),
        (half.score(x.float()), mixture.score(x)),
        (half.denoise(x.float(), 0.8, 0.6), mixture.denoise(x, 0.8, 0.6)),
        (half.denoise_covariance(x.float(), 0.8, 0.6), mixture.denoise_covariance(x, 0.8, 0.6)),
        (tilted.log_partition, mixture.tilt(torch.eye(D, dtype=F64), torch.ones(D, dtype=F64), 1.0).log_partition),
        (half.mean(), mixture.mean()),
        (half.covariance(), mixture.covariance()),
    ):
        assert got.dtype == torch.float32
        torch.testing.assert_close(got.double(), expected, rtol=1e-4, atol=1e-4)
    assert half.sample(3, generator=rng).dtype == tilted.mixture.score(x.float()).dtype == torch.float32
    assert half.uniforms(x.float()).dtype == torch.float64  # for tests, which count in float64
    line = half.project(torch.ones(D))
    assert line.cdf(x.float()).dtype == line.quantile(torch.rand(3, generator=rng)).dtype == torch.float32


def test_small_variances_survive_single_precision(rng):
    q = torch.linalg.qr(normal((D, D), rng)).Q
    covariance = (q * vector(1, 1e-2, 1e-3, 1e-4) @ q.mT).float()
    single = GaussianMixture(law(1).float(), torch.zeros(1, D), ((covariance + covariance.mT) / 2)[None])
    expected = torch.linalg.eigvalsh(((covariance + covariance.mT) / 2).double())
    torch.testing.assert_close(single._spectrum[0].double(), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_a_component_that_is_switched_off_is_not_there(kind, rng):
    mixture = random_mixture(kind, rng)
    off = GaussianMixture._of(law(0.4, 0, 0.6), mixture.means, mixture._spectrum, mixture._basis)
    without = GaussianMixture(law(0.4, 0.6), mixture.means[[0, 2]], mixture.covariances[[0, 2]])
    x = normal((20, D), rng)
    close(off.logps(x), without.logps(x), 1e-10)
    close(off.score(x), without.score(x), 1e-10)
    close(off.uniforms(x), without.uniforms(x), 1e-10)
    close(off.denoise_covariance(x, 1.0, 1.0), without.denoise_covariance(x, 1.0, 1.0), 1e-10)
    close(off.tilt(None, x[0], 1.0).log_partition, without.tilt(None, x[0], 1.0).log_partition, 1e-10)
    u = torch.rand(9, generator=rng, dtype=F64)
    close(off.project(x[0]).quantile(u), without.project(x[0]).quantile(u), 1e-10)


# --- numbers ---------------------------------------------------------------------------------------------------------

DTYPES = [F64, torch.float32, torch.float16, torch.bfloat16]


def cast(mixture, dtype):
    return GaussianMixture(mixture.prior_logps.to(dtype), mixture.means.to(dtype), mixture.covariances.to(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_component_that_is_switched_off_takes_no_digits(dtype):
    # The same to the last bit, whatever the third mean is.
    far = 1e4 if dtype == torch.float16 else 1e6
    off = GaussianMixture(law(0.5, 0.5, 0).to(dtype), vector(-1, 1, far)[:, None].to(dtype), vector(1).to(dtype))
    pair = GaussianMixture(law(0.5, 0.5).to(dtype), vector(-1, 1)[:, None].to(dtype), vector(1).to(dtype))
    for x in (vector(0)[:, None].to(dtype), vector(0.2, -3)[:, None].to(dtype)):
        for f in (lambda m, x=x: m.logps(x), lambda m, x=x: m.score(x), lambda m, x=x: m.denoise(x, 0.5, 0.5)):
            assert torch.equal(f(off), f(pair))
        assert torch.equal(off.denoise_covariance(x, 1.0, 1.0), pair.denoise_covariance(x, 1.0, 1.0))
        assert torch.equal(off.posterior(x)[:, :2], pair.posterior(x))
    assert torch.equal(off.mean(), pair.mean()) and torch.equal(off.covariance(), pair.covariance())
    tilted, alone = (m.tilt(ONE, vector(1), 1.0) for m in (off, pair))
    assert torch.equal(tilted.log_partition, alone.log_partition)


def test_a_far_mean_that_is_switched_off_in_single_precision():
    off = GaussianMixture(law(0.5, 0.5, 0).float(), torch.tensor([[-1.0], [1.0], [1e6]]), torch.tensor([0.25]))
    # .5 N(.9; 1, 1/4) (1 + exp(-8 .9)): around the middle of all three means this came out as 16384.
    right = math.log(0.5 * (1 + math.exp(-7.2))) - 0.02 - math.log(2 * math.pi * 0.25) / 2
    assert f"{right:.3f}" == "-0.938"
    assert abs(off.logps(torch.tensor([[0.9]])).item() - right) < 1e-6


@pytest.mark.parametrize("mean", [1e200, -1e300, 1.7e308])
@pytest.mark.parametrize("shape", [(1,), (3,), (1, 2), (3, 2), (1, 2, 2), (3, 2, 2)])
def test_a_component_that_is_switched_off_may_be_anywhere(mean, shape, rng):
    eye = torch.eye(2, dtype=F64) if len(shape) == 3 else torch.ones((), dtype=F64)
    scale = vector(1, 0.5, 1e-250)[-shape[0] :] if shape[0] > 1 else vector(0.7)
    covariances = scale.view(-1, *[1] * (len(shape) - 1)) * eye.expand(shape)
    means = torch.cat([normal((2, 2), rng), torch.full((1, 2), mean, dtype=F64)])
    off = GaussianMixture(law(0.4, 0.6, 0), means, covariances)
    alone = GaussianMixture(law(0.4, 0.6), means[:2], covariances[:2])
    x = normal((9, 2), rng)
    for f in (
        lambda m: m.logps(x),
        lambda m: m.score(x),
        lambda m: m.denoise(x, 0.8, 0.6),
        lambda m: m.tilt(None, x[0], 1.0).log_partition,
        lambda m: m.tilt(spd((2, 2), verify.rng("off")), x[0], 1.0).log_partition,
        lambda m: m.tilt(spd((2, 2), verify.rng("off")), x[0], 1.0).mixture.score(x),
        lambda m: m.mean(),
        lambda m: m.uniforms(x),
        lambda m: m.project(vector(1, 0)).quantile(vector(1e-9, 0.3)),
    ):
        close(f(off), f(alone), 1e-10)


@pytest.mark.parametrize("dtype", DTYPES[2:])
def test_half_precision_at_any_level_of_noise(dtype):
    # sigma^2 = 10^6 is above 65504, the largest number of float16.
    noised = cast(PAIR, dtype).noised(1.0, 1000.0)
    x = vector(-3e4, -500, 0, 2, 1000)[:, None].to(dtype)
    exact = PAIR.noised(1.0, 1000.0)
    for f in (lambda m, x: m.score(x), lambda m, x: m.logps(x), lambda m, x: m.posterior(x)):
        got = f(noised, x)
        assert got.dtype == dtype
        torch.testing.assert_close(got.double(), f(exact, x.double()), rtol=torch.finfo(dtype).eps, atol=1e-7)
    got = cast(PAIR, dtype).denoise(x, 1.0, 1000.0)
    torch.testing.assert_close(got.double(), PAIR.denoise(x.double(), 1.0, 1000.0), rtol=0.01, atol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_comes_back_has_the_dtype_of_the_mixture(kind, dtype, rng):
    wide = random_mixture(kind, rng)
    exact = wide.to(dtype)
    x = (2 * normal((20, D), rng)).to(dtype)
    a, b = spd((D, D), rng).float(), normal(D, rng)
    g = lambda: torch.Generator().manual_seed(2)  # noqa: E731
    for f in (
        lambda m, x: m.logps(x),
        lambda m, x: m.component_logps(x),
        lambda m, x: m.posterior(x),
        lambda m, x: m.class_logps(x, torch.tensor([0, 1, 0])),
        lambda m, x: m.of_class(torch.tensor([0, 1, 0]), 0).score(x),
        lambda m, x: m.score(x),
        lambda m, x: m.denoise(x, 0.8, 0.6),
        lambda m, x: m.denoise_covariance(x, 0.8, 0.6),
        lambda m, x: m.tilt(a, b, 0.7).log_partition,
        lambda m, x: m.tilt(a, b, 0.7).mixture.means,
        lambda m, x: m.project(b).means,
        lambda m, x: m.mean(),
        lambda m, x: m.covariance(),
        lambda m, x: m.covariances,
        lambda m, x: m.sample(20, generator=g()),
    ):
        got, expected = f(exact, x), f(wide, x.double())
        assert got.dtype == dtype and not got.isnan().any()
        tolerance = 4 * max(torch.finfo(dtype).eps, 2e-6 if dtype != F64 else 0)
        torch.testing.assert_close(got.double(), expected, rtol=tolerance, atol=tolerance)
    # Drawn in float64 and rounded once, so draws in any dtype are those in float64.
    assert torch.equal(exact.sample(20, generator=g()), wide.sample(20, generator=g()).to(dtype))


def test_single_precision_keeps_its_digits_between_far_means():
    # |m|^2 / v = 10^8: products in float32 would leave errors of 10 in a log density.
    means = torch.tensor([[0.0], [1.0]])
    mixture = GaussianMixture(law(0.5, 0.5).float(), means, torch.tensor([1e-8]))
    x = torch.tensor([[0.0], [1.0], [0.5], [0.50001]])
    exact = GaussianMixture(mixture.prior_logps.double(), means.double(), torch.tensor([1e-8]).double())
    torch.testing.assert_close(mixture.logps(x).double(), exact.logps(x.double()), rtol=1e-6, atol=0)
    torch.testing.assert_close(mixture.score(x).double(), exact.score(x.double()), rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("variance", [1e-300, 1e-150, 1.0, 1e150, 1e300])
def test_variances_of_any_legal_size(variance, rng):
    unit = GaussianMixture(law(0.3, 0.7), vector(-1, 2)[:, None], vector(1))
    scale = math.sqrt(variance)
    mixture = GaussianMixture(law(0.3, 0.7), scale * vector(-1, 2)[:, None], vector(variance))
    x = normal((9, 1), rng)
    close(mixture.logps(scale * x), unit.logps(x) - math.log(scale), 1e-9)
    close(mixture.score(scale * x) * scale, unit.score(x), 1e-9)
    close(mixture.denoise(scale * x, 1.0, scale if scale < 1e150 else 0.0) / scale,
          unit.denoise(x, 1.0, 1.0 if scale < 1e150 else 0.0), 1e-9)  # fmt: skip
    close(mixture.cdf(scale * x[:, 0]), unit.cdf(x[:, 0]), 1e-9)
    close(mixture.quantile(vector(1e-9, 0.4)) / scale, unit.quantile(vector(1e-9, 0.4)), 1e-9)
    close(mixture.uniforms(scale * x), unit.uniforms(x), 1e-9)


def test_what_would_overflow_is_refused_by_name():
    for call, text in (
        (lambda: PAIR.noised(1e-200, 0), r"alpha = 1e-200 and sigma = 0 must give variances in \[1e-300, 1e\+300\]"),
        (lambda: PAIR.noised(1.0, 1e200), r"alpha = 1 and sigma = 1e\+200 must give variances in"),
        (lambda: PAIR.noised(1e200, 0.0), r"alpha = 1e\+200 and sigma = 0 must give variances in"),
        (lambda: PAIR.denoise(vector(1)[None], 1e-200, 0.0), "alpha = 1e-200 and sigma = 0 must give variances"),
        (
            lambda: GaussianMixture(law(1), vector(0)[None], vector(5e-324)),
            r"means and covariances must give variances in \[1e-300, 1e\+300\] .* got variances from 4.9\d*e-324",
        ),
        (lambda: GaussianMixture(law(1), vector(0)[None], vector(1e301)), "must give variances in"),
        (
            lambda: GaussianMixture(law(0.5, 0.5), vector(-1, 1)[:, None], vector(1e-300)).project(vector(1e155)),
            "direction must give variances in .* and means within",
        ),
        (
            lambda: GaussianMixture(law(0.5, 0.5), vector(-1, 1)[:, None] * 1e160, vector(1)),
            r"and means within 1e\+150 of the smallest standard deviation, got variances from 1 to 1 and 1e\+160",
        ),
        (lambda: PAIR.project(vector(1e-200)), "direction must give variances in"),
        (lambda: PAIR.logps(vector(1e200)[None]), r"x must lie within .*e\+152 of the centre of the means, .* 1e\+200"),
        (lambda: PAIR.score(vector(0, 1e200)[:, None]), "x must lie within"),
        (lambda: PAIR.denoise(vector(1e200)[None], 1.0, 1.0), "xt must lie within"),
        (lambda: PAIR.tilt(None, vector(1), 1e-320), "quadratic, linear and beta = .* must keep r / beta within"),
        (lambda: PAIR.tilt(ONE, vector(1), 1e-320), "quadratic, linear and beta = .* must keep r / beta within"),
        (lambda: PAIR.tilt(None, vector(1), 1e-170), "quadratic, linear and beta = 1e-170 must "),
        (lambda: PAIR.tilt(1e302 * ONE, None, 1.0), "quadratic, linear and beta = 1 must give variances in"),
        (
            lambda: GaussianMixture(law(0.5, 0.5), vector(-1, 1)[:, None], vector(0.2, 0.5)).tilt(
                None, vector(1e151), 1.0
            ),
            "quadratic, linear and beta = 1 must give .* and means within",
        ),
    ):
        with pytest.raises(ValueError, match=text):
            call()


def test_a_mixture_keeps_copies():
    priors, means, covariances = law(0.5, 0.5), vector(-1, 1)[:, None], vector(0.25, 0.5)
    x = vector(0.3, -2)[:, None]
    mixture = GaussianMixture(priors, means, covariances)
    before = mixture.logps(x), mixture.mean(), mixture.covariance(), mixture.noised(1.0, 1.0).score(x)
    for part in (priors, means, covariances, mixture.means, mixture.prior_logps, mixture.covariances):
        part += 100
    after = mixture.logps(x), mixture.mean(), mixture.covariance(), mixture.noised(1.0, 1.0).score(x)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    close(mixture.mean(), [0.0])


def test_quantiles_have_no_graph_and_cdfs_a_right_one():
    mixture = GaussianMixture(law(0.3, 0.7), vector(-1, 2)[:, None], vector(0.3, 0.8))
    u = vector(0.2, 0.5, 0.9).requires_grad_()
    assert not mixture.quantile(u).requires_grad
    # Nor through parameters.
    means = vector(-1, 2)[:, None].requires_grad_()
    free = GaussianMixture(law(0.3, 0.7), means, vector(0.3, 0.8))
    assert not free.quantile(vector(0.2)).requires_grad
    q = mixture.quantile(u.detach())
    # The documented derivative, by finite differences: 1 / pdf.
    slope = (mixture.quantile(u.detach() + 1e-6) - mixture.quantile(u.detach() - 1e-6)) / 2e-6
    torch.testing.assert_close(slope, 1 / mixture.logps(q[:, None]).exp(), rtol=1e-6, atol=0)
    assert torch.autograd.gradcheck(mixture.cdf, q.requires_grad_())


def test_gradients_reach_points_and_parameters():
    priors, x = vector(0.2, -0.3), vector(0.3, -2, 5)[:, None]
    means, variances = vector(-1, 1.5)[:, None], vector(0.25, 0.5)

    def f(logits, means, variances, x):
        mixture = GaussianMixture(logits.log_softmax(-1), means, variances).noised(0.8, 0.6)
        return mixture.logps(x), mixture.score(x), mixture.mean(), mixture.covariance()

    inputs = [part.clone().requires_grad_() for part in (priors, means, variances, x)]
    assert torch.autograd.gradcheck(f, inputs)
    # In half precision, too, they come back in the dtype of the points.
    half = x.half().requires_grad_()
    (gradient,) = torch.autograd.grad(cast(PAIR, torch.float16).logps(half).sum(), half)
    assert gradient.dtype == torch.float16
    torch.testing.assert_close(gradient.double(), PAIR.score(half.detach().double()), rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_no_points(kind, rng):
    mixture, x = random_mixture(kind, rng), torch.zeros(0, D, dtype=F64)
    classes = torch.tensor([0, 1, 0])
    for f, shape in (
        (mixture.logps, (0,)),
        (mixture.component_logps, (0, J)),
        (mixture.posterior, (0, J)),
        (mixture.score, (0, D)),
        (lambda x: mixture.class_logps(x, classes), (0, 2)),
        (lambda x: mixture.denoise(x, 1.0, 1.0), (0, D)),
        (lambda x: mixture.denoise_covariance(x, 1.0, 1.0), (0, D, D)),
        (mixture.uniforms, (0, D)),
        (mixture.project(torch.ones(D)).cdf, (0, D)),
    ):
        assert f(x).shape == shape and f(x).dtype == F64


def test_a_fit_in_half_precision_is_computed_in_float64(rng):
    # The sum of 2,000 numbers near 100 is above 65504, and bfloat16 has no two digits between them.
    x = (100 + normal((2000, 2), rng)).half()
    fitted = GaussianMixture.fit(x, torch.zeros(2000, dtype=torch.int64), 1e-3)
    exact = GaussianMixture.fit(x.double(), torch.zeros(2000, dtype=torch.int64), 1e-3)
    assert fitted.means.dtype == torch.float16
    assert torch.equal(fitted.means, exact.means.half()) and torch.equal(fitted.covariances, exact.covariances.half())
    # What is kept is not rounded: x - mean has its digits.
    torch.testing.assert_close(fitted.logps(x).double(), exact.logps(x.double()), rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("number", [np.float64, np.float32, np.int64])
def test_numbers_of_numpy(number):
    x = vector(0.3)[None]
    close(PAIR.noised(number(2), number(1)).score(x), PAIR.noised(2.0, 1.0).score(x))
    close(PAIR.denoise(x, number(2), number(1)), PAIR.denoise(x, 2.0, 1.0))
    close(PAIR.denoise_covariance(x, number(2), number(1)), PAIR.denoise_covariance(x, 2.0, 1.0))
    close(PAIR.tilt(ONE, vector(1), number(2)).log_partition, PAIR.tilt(ONE, vector(1), 2.0).log_partition)
    assert PAIR.tilt(ONE, vector(1), number(2)).mixture.score(x).dtype == F64


def test_nothing_depends_on_the_default_dtype(rng):
    def results():
        yield PAIR.noised(1.0, 2.0).score(vector(0.3)[None])
        yield cast(PAIR, torch.float32).score(torch.tensor([[0.3]], dtype=torch.float32))
        yield PAIR.tilt(ONE, vector(1), 1.0).log_partition
        yield PAIR.sample(3, generator=torch.Generator().manual_seed(1))
        yield PAIR.quantile(torch.tensor([0.3], dtype=torch.float32))
        yield GaussianMixture.fit(vector(1, 2, 5)[:, None], torch.tensor([0, 0, 1]), 0.1).covariances

    default, expected = torch.get_default_dtype(), list(results())
    try:
        for other in (F64, torch.float16):
            torch.set_default_dtype(other)
            for got, before in zip(results(), expected, strict=True):
                assert got.dtype == before.dtype and torch.equal(got, before)
    finally:
        torch.set_default_dtype(default)


# --- classes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_classes_follow_bayes(kind, rng):
    mixture, classes, x = random_mixture(kind, rng), torch.tensor([1, 0, 1]), normal((20, D), rng)
    logps = mixture.class_logps(x, classes)
    joint = definition(mixture, x).exp()
    close(logps[:, 0], (joint[:, 1] / joint.sum(-1)).log(), 1e-10)
    close(logps.exp().sum(-1), torch.ones(20))
    for c in range(2):
        part = mixture.of_class(classes, c)
        log_prior = mixture.prior_logps[classes == c].logsumexp(-1)
        close(part.prior_logps.logsumexp(-1), 0.0)
        # p(c | x) p(x) = p(c) p(x | c)
        close(logps[:, c] + mixture.logps(x), log_prior + part.logps(x), 1e-10)
    assert mixture.of_class(classes, 0).components == 1 and mixture.of_class(classes, 1).components == 2
    close(mixture.class_logps(x, 0 * classes), torch.zeros(20, 1))  # one class holds all


# --- noise -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_noise_changes_means_and_covariances(kind, rng):
    mixture, x = random_mixture(kind, rng), 2 * normal((20, D), rng)
    noised = mixture.noised(0.8, 0.6)
    close(noised.component_logps(x), definition(mixture, x, 0.8, 0.6), 1e-10)
    assert noised._spectrum.shape == mixture._spectrum.shape and noised._basis is mixture._basis
    # Twice noised: b (a x0 + s eps) + t eps' = a b x0 + sqrt(b^2 s^2 + t^2) eps.
    once, twice = mixture.noised(0.4, math.hypot(0.5 * 0.6, 0.7)), noised.noised(0.5, 0.7)
    close(twice.logps(x), once.logps(x), 1e-10)
    close(mixture.noised(1.0, 0.0).logps(x), mixture.logps(x), 1e-10)


def posterior_by_quadrature(mixture, xt, alpha, sigma):
    """Mean and variance of x0 given one noised number, straight from Bayes' rule."""
    log_joint = mixture.logps(GRID[:, None]) - (xt - alpha * GRID) ** 2 / (2 * sigma**2)
    w = torch.softmax(log_joint, 0)
    mean = (w * GRID).sum()
    return mean, (w * (GRID - mean) ** 2).sum()


@pytest.mark.parametrize(("alpha", "sigma"), [(1.0, 0.7), (0.8, 0.6), (0.3, 2.0), (0.05, 0.99)])
def test_posterior_of_the_clean_point_by_quadrature(alpha, sigma):
    mixture = GaussianMixture(law(0.3, 0.7), vector(-1, 2)[:, None], vector(0.3, 0.8))
    for xt in (-1.5, 0.2, 3.0):
        mean, variance = posterior_by_quadrature(mixture, xt, alpha, sigma)
        point = vector(xt)[:, None]
        close(mixture.denoise(point, alpha, sigma), mean.view(1, 1), 1e-9)
        close(mixture.denoise_covariance(point, alpha, sigma), variance.view(1, 1, 1), 1e-9)
        close(mean, (xt + sigma**2 * mixture.noised(alpha, sigma).score(point).item()) / alpha, 1e-9)
        if alpha < 1:  # the near-miss that forgets to divide by alpha
            assert abs(mean - xt - sigma**2 * mixture.noised(alpha, sigma).score(point).item()) > 1e-3


@pytest.mark.parametrize("kind", KINDS)
def test_tweedie_and_its_derivative(kind, rng):
    mixture, xt = random_mixture(kind, rng), 2 * normal((6, D), rng)
    mean = mixture.denoise(xt, 0.8, 0.6)
    close(mean, (xt + 0.6**2 * mixture.noised(0.8, 0.6).score(xt)) / 0.8, 1e-10)
    for i in range(len(xt)):
        slope = torch.autograd.functional.jacobian(lambda y: mixture.denoise(y[None], 0.8, 0.6)[0], xt[i])
        close(mixture.denoise_covariance(xt, 0.8, 0.6)[i], slope * 0.6**2 / 0.8, 1e-10)
    assert torch.linalg.eigvalsh(mixture.denoise_covariance(xt, 0.8, 0.6)).min() > 0
    # Without noise the point is known; under much noise only the law itself is.
    close(mixture.denoise(xt, 0.8, 0.0), xt / 0.8, 1e-10)
    close(mixture.denoise_covariance(xt, 0.8, 0.0), torch.zeros(6, D, D), 1e-10)
    close(mixture.denoise(xt, 0.8, 1e6), mixture.mean().expand(6, D), 1e-5)
    close(mixture.denoise_covariance(xt, 0.8, 1e6), mixture.covariance().expand(6, D, D), 1e-5)


# --- tilts -----------------------------------------------------------------------------------------------------------


def test_the_tilt_of_the_pair():
    tilted, log_partition = PAIR.tilt(ONE, vector(1), 1.0)
    # Both components have precision 4 + 1; one mean is (4 (-1) + 1) / 5, the other stays at 1.
    close(tilted.means, vector(-0.6, 1)[:, None])
    close(tilted.covariances, torch.full((2, 1, 1), 0.2, dtype=F64))
    # Z = sum of p_k sqrt(.25 / .2)^-1 exp(-(mu_k - 1)^2 / (2 (1 + .25))); the reward was stated without its -1/2.
    z = math.sqrt(0.8) * (0.5 * math.exp(-1.6) + 0.5)
    close(log_partition - 0.5, math.log(z))
    close(tilted.prior_logps.exp(), vector(math.exp(-1.6), 1) / (1 + math.exp(-1.6)))
    assert f"{z:.6f}" == "0.537504"
    assert [f"{w:.6f}" for w in tilted.prior_logps.exp()] == ["0.167982", "0.832018"]
    assert f"{tilted.mean().item():.6f}" == "0.731229"
    # Weights from the reward at the means alone, or no new weights, are far off.
    off = PAIR.prior_logps + reward(PAIR.means, ONE, vector(1))
    assert f"{(off.softmax(-1) @ tilted.means).item():.6f}" == "0.809275"
    assert f"{(PAIR.prior_logps.exp() @ tilted.means).item():.6f}" == "0.200000"


def test_a_tilt_by_quadrature():
    mixture = GaussianMixture(law(0.3, 0.7), vector(-1, 2)[:, None], vector(0.3, 0.8))
    for a, b, beta in ((2.0, 0.5, 0.7), (-0.5, 1.0, 1.0), (0.0, -1.0, 0.5)):
        w = mixture.logps(GRID[:, None]) + (-a * GRID**2 / 2 + b * GRID) / beta
        tilted, log_partition = mixture.tilt(a * ONE, vector(b), beta)
        close(log_partition, w.logsumexp(0) + math.log(STEP), 1e-10)
        close(tilted.mean(), (w.softmax(0) @ GRID)[None], 1e-10)


def test_an_indefinite_tilt_in_two_dimensions_by_quadrature():
    covariances = torch.tensor([[[0.5, 0.2], [0.2, 0.4]], [[0.3, -0.1], [-0.1, 0.6]]], dtype=F64)
    mixture = GaussianMixture(law(0.3, 0.7), torch.tensor([[-1, 0.5], [1, -0.2]], dtype=F64), covariances)
    quadratic = torch.tensor([[1, 1.3], [1.3, -0.5]], dtype=F64)  # of determinant < 0
    linear, beta = vector(0.4, -1), 1.2
    axis = torch.linspace(-14, 14, 701, dtype=F64)
    x = torch.cartesian_prod(axis, axis)
    log_w = mixture.logps(x) + reward(x, quadratic, linear) / beta
    tilted, log_partition = mixture.tilt(quadratic, linear, beta)
    close(log_partition, log_w.logsumexp(0) + 2 * math.log(0.04), 1e-9)
    w = log_w.softmax(0)
    close(tilted.mean(), w @ x, 1e-9)
    close(tilted.covariance(), ((x - w @ x).mT * w) @ (x - w @ x), 1e-8)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sign", [1, -1])
def test_a_tilt_point_by_point(kind, sign, rng):
    """Both sides are normalised, so log p* = log p + r / beta - log Z at every point says that Z is right, too."""
    mixture, x, linear = random_mixture(kind, rng), 2 * normal((40, D), rng), normal(D, rng)
    quadratic = sign * spd((D, D), rng)
    if sign < 0:  # half as far down as the least precise direction allows
        quadratic = quadratic / torch.linalg.eigvalsh(-quadratic).max()
        quadratic = quadratic * (0.5 * 0.7 / torch.linalg.eigvalsh(mixture.covariances).max())
    for a, b in ((quadratic, linear), (quadratic, None), (None, linear), (None, None)):
        tilted, log_partition = mixture.tilt(a, b, 0.7)
        r = reward(x, torch.zeros(D, D, dtype=F64) if a is None else a, torch.zeros(D, dtype=F64) if b is None else b)
        expected = mixture.logps(x) + r / 0.7 - log_partition
        close(tilted.logps(x), expected, 1e-9)
        close(definition(tilted, x).logsumexp(-1), expected, 1e-9)
        assert log_partition.shape == ()
        if a is None:
            assert tilted._spectrum.shape == mixture._spectrum.shape and tilted._basis is mixture._basis
        else:  # what components share they go on sharing
            assert len(tilted._spectrum) == len(mixture._spectrum)
            assert len(tilted._basis) == (1 if kind in ("one variance", "variances") else len(mixture._spectrum))
        assert a is b is None or (tilted.logps(x) - mixture.logps(x)).abs().max() > 0.1


@given(st.integers(0, 10**6), st.sampled_from(KINDS))
@pytest.mark.slow
def test_tilts_add_up(seed, kind):
    rng = verify.rng(f"tilts-{seed}")
    mixture, x = random_mixture(kind, rng), normal((5, D), rng)
    (a, b), (c, d) = ((spd((D, D), rng), normal(D, rng)) for _ in range(2))
    first = mixture.tilt(a, b, 0.5)
    second = first.mixture.tilt(c, d, 0.5)
    both = mixture.tilt(a + c, b + d, 0.5)
    close(first.log_partition + second.log_partition, both.log_partition, 1e-9)
    close(second.mixture.logps(x), both.mixture.logps(x), 1e-8)
    # Tilted back, it is what it was.
    back = first.mixture.tilt(-a, -b, 0.5)
    close(back.mixture.logps(x), mixture.logps(x), 1e-8)
    close(back.log_partition, -first.log_partition, 1e-8)


def test_where_a_tilt_exists():
    two = torch.eye(2, dtype=F64)
    unit = GaussianMixture(law(1), torch.zeros(1, 2, dtype=F64), vector(1))
    unit.tilt(-0.999 * two, None, 1.0)
    # I + S A / beta = -I has determinant 1: positive, and yet there is no tilt.
    text = r"quadratic must leave S_k\^-1 \+ A / beta positive definite for every component of positive weight"
    for scale, lowest in ((-2, "-1"), (-1, "0")):
        with pytest.raises(ValueError, match=f"{text}, got smallest eigenvalue {lowest} in component 0"):
            unit.tilt(scale * two, None, 1.0)
    # At the edge up to rounding, in directions that are no axes: rounding makes some of these eigenvalues positive.
    for seed in range(20):
        edge = spd((2, 2), verify.rng(f"edge-{seed}"))
        full = GaussianMixture(law(1), torch.zeros(1, 2, dtype=F64), torch.linalg.inv(edge)[None])
        with pytest.raises(ValueError, match="positive definite for every component of positive weight"):
            full.tilt(-edge, None, 1.0)
        full.tilt(-edge * (1 - 1e-9), None, 1.0)


@pytest.mark.parametrize("shape", [(3,), (3, 2), (3, 2, 2)])
def test_one_bad_component_spoils_a_tilt(shape):
    variances = torch.ones(3, dtype=F64).index_fill(0, torch.tensor(1), 4.0)
    covariances = variances.view(-1, *[1] * (len(shape) - 1)).expand(shape) * (
        torch.eye(2, dtype=F64) if len(shape) == 3 else 1
    )
    means = torch.zeros(3, 2, dtype=F64)
    rare = vector(0.5, 1e-9, 0.5 - 1e-9).log()
    with pytest.raises(ValueError, match="of positive weight, got smallest eigenvalue -0.25 in component 1"):
        GaussianMixture(rare, means, covariances).tilt(-0.5 * torch.eye(2, dtype=F64), None, 1.0)
    tilted = GaussianMixture(law(0.5, 0, 0.5), means, covariances).tilt(-0.5 * torch.eye(2, dtype=F64), None, 1.0)
    close(tilted.log_partition, math.log(2))  # 1 / sqrt(1 - 1/2) for each of two dimensions
    close(tilted.mixture.prior_logps.exp(), vector(0.5, 0, 0.5))


# --- lines, uniforms and moments -------------------------------------------------------------------------------------


def test_cdf_and_quantile():
    mixture = GaussianMixture(law(0.3, 0.7), vector(-1, 2)[:, None], vector(0.3, 0.8))
    # From 0 to 1, with the density as its derivative.
    x = GRID.clone().requires_grad_()
    (slope,) = torch.autograd.grad(mixture.cdf(x).sum(), x)
    close(slope, mixture.logps(GRID[:, None]).exp())
    close(mixture.cdf(vector(-1e3, 1e3)), [0, 1])
    # The left tail keeps its digits.
    tail = vector(-9, -7, -5, -3)
    parts = (torch.from_numpy(ndtr(z.numpy())) for z in ((tail + 1) / math.sqrt(0.3), (tail - 2) / math.sqrt(0.8)))
    expected = law(0.3, 0.7).exp() @ torch.stack(list(parts))
    torch.testing.assert_close(mixture.cdf(tail), expected, rtol=1e-11, atol=0)
    u = torch.cat([vector(1e-300, 1e-12, 1 - 1e-12), torch.linspace(0.001, 0.999, 97, dtype=F64)])
    torch.testing.assert_close(mixture.cdf(mixture.quantile(u)), u, rtol=1e-11, atol=0)
    assert mixture.quantile(u.view(10, 10)).shape == (10, 10) and mixture.quantile(u[:0]).shape == (0,)
    # Where one component is all there is, its quantiles are exact.
    single = GaussianMixture(law(1), vector(3)[None], vector(4))
    close(single.quantile(u[1:]), 3 + 2 * torch.special.ndtri(u[1:]), 1e-13)
    # To the last bits: no number within two roundings is nearer.
    u = torch.linspace(0.2, 0.8, 61, dtype=F64)
    q = mixture.quantile(u)
    assert ((mixture.cdf(q) - u).abs() / mixture.logps(q[:, None]).exp()).max() < 2e-15


@pytest.mark.parametrize("kind", KINDS)
def test_projections_are_marginals(kind, rng):
    mixture = random_mixture(kind, rng, d=2)
    # Along the first axis: integrate the second coordinate out.
    axis = torch.linspace(-30, 30, 6001, dtype=F64)
    x = vector(-0.7, 0.4)
    points = torch.stack([x[:, None].expand(2, 6001), axis.expand(2, 6001)], -1).view(-1, 2)
    marginal = mixture.logps(points).view(2, 6001).logsumexp(-1) + math.log(0.01)
    close(mixture.project(vector(1, 0)).logps(x[:, None]), marginal, 1e-9)
    v = normal(2, rng)
    line = mixture.project(v)
    assert line.dimension == 1
    close(line.mean()[0], mixture.mean() @ v, 1e-12)
    close(line.covariance()[0, 0], v @ mixture.covariance() @ v, 1e-12)
    close(line.covariances[:, 0, 0], torch.einsum("d,jde,e->j", v, mixture.covariances, v), 1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_uniforms_have_the_density_as_their_jacobian(kind, rng):
    """A triangular map onto the cube with determinant p(x) turns p into the uniform law."""
    mixture = random_mixture(kind, rng)
    x = mixture.sample(6, generator=rng)
    close(mixture.uniforms(x)[:, 0], mixture.project(torch.eye(D, dtype=F64)[0]).cdf(x[:, 0]), 1e-12)
    for point in x:
        jacobian = torch.autograd.functional.jacobian(lambda y: mixture.uniforms(y[None])[0], point)
        close(jacobian.triu(1), torch.zeros(D, D))
        assert (jacobian.diagonal() > 0).all()
        close(jacobian.diagonal().log().sum(), mixture.logps(point[None])[0], 1e-9)
        for d in range(D):
            ends = point.repeat(2, 1)
            ends[:, d] = vector(-1e4, 1e4)
            close(mixture.uniforms(ends)[:, d], [0, 1])


def test_moments(rng):
    mixture = random_mixture("full", rng)
    second = mixture.covariances + mixture.means[:, :, None] * mixture.means[:, None, :]
    p, m = mixture.prior_logps.exp(), mixture.mean()
    close(m, sum(p[k] * mixture.means[k] for k in range(J)))
    close(mixture.covariance(), sum(p[k] * second[k] for k in range(J)) - m[:, None] * m)


# --- draws -----------------------------------------------------------------------------------------------------------

CELLS = 8


def cells_of(mixture, direction):
    """Eight cells of equal mass along a line, and the law of any other mixture on them."""
    line = mixture.project(direction)
    edges = line.quantile(torch.arange(1, CELLS, dtype=F64) / CELLS)

    def law_of(other):
        return torch.cat([vector(0), other.project(direction).cdf(edges), vector(1)]).diff().log()

    return edges, law_of


def turned(mixture):
    """The mixture that a transposed basis would give."""
    basis, spectrum = mixture._basis, mixture._spectrum.expand(-1, D)
    return GaussianMixture(mixture.prior_logps, mixture.means, basis.mT * spectrum[:, None] @ basis)


@pytest.mark.parametrize("kind", KINDS)
def test_draws_follow_the_mixture_along_lines(kind, rng):
    mixture = random_mixture(kind, rng)
    wrong = {
        "priors": GaussianMixture(mixture.prior_logps.roll(1), mixture.means, mixture.covariances),
        "variances": GaussianMixture(mixture.prior_logps, mixture.means, 1.2 * mixture.covariances),
        "squared": GaussianMixture(mixture.prior_logps, mixture.means, mixture.covariances @ mixture.covariances),
    }
    if mixture._basis is not None:
        wrong["turned"] = turned(mixture)
    for direction in (*torch.eye(D, dtype=F64)[:2], normal(D, rng)):
        edges, law_of = cells_of(mixture, direction)
        bad = {name: other for name, other in wrong.items() if (law_of(other).exp() - 1 / CELLS).abs().max() > 0.01}
        assert len(bad) >= 2

        def draw(m, n, g, edges=edges, direction=direction):
            return torch.searchsorted(edges, m.sample(n, generator=g) @ direction)

        check_sampler(
            lambda n, g, draw=draw: draw(mixture, n, g),
            law_of(mixture),
            {
                name: ((lambda n, g, other=other, draw=draw: draw(other, n, g)), law_of(other))
                for name, other in bad.items()
            },
            rng,
        )


@pytest.mark.parametrize("kind", KINDS)
def test_draws_fill_the_cube_evenly(kind, rng):
    """All coordinates at once: uniforms in 3^D cells; the wrong laws are a wrong tilt and a wrong rotation."""
    mixture, n = random_mixture(kind, rng), 40_000
    target = torch.full((3**D,), -D * math.log(3), dtype=F64)

    def cells(x):
        return ((3 * mixture.uniforms(x)).long().clamp(max=2) * 3 ** torch.arange(D)).sum(-1)

    assert verify.match(cells(mixture.sample(n, generator=rng)), target, claim="cube").decision != "REJECT"
    wrong = mixture.tilt(0.3 * torch.eye(D, dtype=F64), None, 1.0).mixture
    # The same lines along the axes, other ties between them: covariances without their off-diagonal entries.
    diagonal = mixture.covariances.diagonal(dim1=-2, dim2=-1)
    others = [wrong] + [GaussianMixture(mixture.prior_logps, mixture.means, diagonal)] * (mixture._basis is not None)
    for other in others:
        assert verify.match(cells(other.sample(n, generator=rng)), target, claim="cube!other").decision == "REJECT"


@pytest.mark.parametrize("kind", KINDS)
def test_draws_do_not_depend_on_the_basis_that_a_processor_finds(kind, rng, monkeypatch):
    mixture, eigh = random_mixture(kind, rng), torch.linalg.eigh
    parts = mixture.prior_logps, mixture.means, mixture.covariances
    flip = torch.ones(D, dtype=F64)
    flip[0] = -1

    def draws():
        return GaussianMixture(*parts).sample(50, generator=torch.Generator().manual_seed(1))

    first = draws()
    monkeypatch.setattr(torch.linalg, "eigh", lambda matrix: (eigh(matrix)[0], eigh(matrix)[1] * flip))
    close(draws(), first)


def test_a_uniform_of_zero_is_a_finite_point(monkeypatch):
    monkeypatch.setattr(torch, "rand", lambda size, **options: torch.zeros(size, dtype=F64))
    x = PAIR.sample(3, generator=torch.Generator())
    assert x.isfinite().all() and (x < -4).all()


# --- fits ------------------------------------------------------------------------------------------------------------


def test_a_fit_by_hand():
    x = torch.tensor([[0, 0], [2, 0], [1, 3], [5, 1], [5, 3]], dtype=F64)
    fitted = GaussianMixture.fit(x, torch.tensor([0, 0, 0, 1, 1]), 0.5)
    close(fitted.prior_logps.exp(), vector(0.6, 0.4))
    close(fitted.means, [[1, 1], [5, 2]])
    # First label: deviations (-1,-1), (1,-1), (0,2), so squares 2/3 and 6/3, products 0.
    close(fitted.covariances, [[[2 / 3 + 0.5, 0], [0, 2.5]], [[0.5, 0], [0, 1.5]]])
    # The mean and covariance of the data are those of the mixture, but for the ridge.
    close(fitted.mean(), x.mean(0))
    close(fitted.covariance(), x.mT.cov(correction=0) + 0.5 * torch.eye(2))
    one = GaussianMixture.fit(x[:, :1], torch.tensor([0, 0, 0, 1, 1]), 0.5)
    close(one.covariances[:, 0, 0], vector(2 / 3 + 0.5, 0.5))


# --- refusals --------------------------------------------------------------------------------------------------------

MEANS = torch.tensor([[0, 0, 0], [1, 2, 3]], dtype=F64)
EYES = torch.eye(3, dtype=F64).expand(2, 3, 3)
SKEW = EYES.clone()
SKEW[1, 0, 2] = 0.1
FLAT = EYES.clone()
FLAT[1] = 1.0
FLOATS = torch.ones(2, dtype=F64)


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"logps": vector(0, 0)}, ValueError, "logps must be log-probabilities that sum to 1"),
        (
            {"logps": law(1)},
            ValueError,
            r"means must have shape \(J, D\) and logps shape \(J,\), got \(2, 3\) and \(1,",
        ),
        ({"means": MEANS[0]}, ValueError, r"means must have shape \(J, D\) .* got \(3,\)"),
        ({"means": MEANS[:, :0]}, ValueError, r"means must have shape \(J, D\) .* got \(2, 0\)"),
        ({"means": MEANS.float()}, TypeError, "must have one dtype, got torch.float64, torch.float32, torch.float64"),
        ({"means": MEANS.long()}, TypeError, "means must be a floating-point torch.Tensor, got a torch.int64"),
        ({"means": MEANS / 0}, ValueError, "means must be finite, got 6 of 6 entries"),
        ({"covariances": vector(1, math.nan)}, ValueError, "covariances must be finite, got 1 of 2 entries"),
        (
            {"covariances": EYES[0]},
            ValueError,
            r"covariances must have shape \(2,\), \(2, 3\) or \(2, 3, 3\), or 1 in place of 2, got \(3, 3\)",
        ),
        ({"covariances": torch.tensor(1.0, dtype=F64)}, ValueError, r"covariances must have shape .* got \(\)"),
        ({"covariances": vector(1, 0)}, ValueError, "positive definite, got smallest eigenvalue 0 in component 1"),
        ({"covariances": vector(-1)}, ValueError, "positive definite, got smallest eigenvalue -1 in component 0"),
        ({"covariances": -MEANS + 2.5}, ValueError, "got smallest eigenvalue -0.5 in component 1"),
        ({"covariances": FLAT}, ValueError, r"covariances must be positive definite, .* in component 1"),
        (
            {"covariances": SKEW},
            ValueError,
            "covariances must be symmetric, got entries that differ by 0.1 in component 1",
        ),
    ],
)
def test_bad_mixtures(change, error, text):
    arguments = {"logps": law(0.5, 0.5), "means": MEANS, "covariances": FLOATS, **change}
    with pytest.raises(error, match=text):
        GaussianMixture(**arguments)


def test_singular_up_to_rounding_is_singular():
    for seed in range(20):  # rounding makes some of the smallest eigenvalues positive
        root = normal((3, 2), verify.rng(f"singular-{seed}"))
        with pytest.raises(ValueError, match="covariances must be positive definite, .* in component 0"):
            GaussianMixture(law(1), MEANS[:1], (root @ root.mT)[None])


MIX = GaussianMixture(law(0.5, 0.5), MEANS, FLOATS)
CLASSES = torch.tensor([0, 1])


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda: MIX.logps(MEANS[0]), ValueError, r"x must have shape \(n, 3\), got \(3,\)"),
        (lambda: MIX.score(MEANS[:, :2]), ValueError, r"x must have shape \(n, 3\), got \(2, 2\)"),
        (
            lambda: MIX.score(MEANS.float()),
            TypeError,
            "x must have the dtype of the mixture, torch.float64, got torch.fl",
        ),
        (lambda: MIX.posterior(MEANS / 0), ValueError, "x must be finite, got"),
        (lambda: MIX.uniforms([1.0]), TypeError, "x must be a floating-point torch.Tensor, got list"),
        (lambda: MIX.denoise(MEANS[:, :1], 1.0, 1.0), ValueError, r"xt must have shape \(n, 3\), got \(2, 1\)"),
        (lambda: MIX.denoise_covariance(MEANS[0], 1.0, 1.0), ValueError, r"^xt must have shape \(n, 3\), got \(3,\)"),
        (lambda: MIX.class_logps(MEANS / 0, CLASSES), ValueError, "^x must be finite, got"),
        (lambda: MIX.project(MEANS[0] / 0), ValueError, "direction must be finite, got"),
        (lambda: GaussianMixture.fit(MEANS / 0, CLASSES, 1.0), ValueError, "x must be finite, got"),
        (lambda: MIX.noised(0.0, 1.0), ValueError, "alpha must be finite and > 0, got 0.0"),
        (lambda: MIX.noised(1.0, -1.0), ValueError, "sigma must be finite and >= 0, got -1.0"),
        (lambda: MIX.noised(1.0, math.inf), ValueError, "sigma must be finite and >= 0, got inf"),
        (lambda: MIX.noised(1.0, True), ValueError, "sigma must be finite and >= 0, got True"),
        (lambda: MIX.sample(0, generator=torch.Generator()), ValueError, "n must be an integer >= 1, got 0"),
        (lambda: MIX.sample(2, generator=None), TypeError, "generator must be a torch.Generator, got NoneType"),
        (lambda: MIX.tilt(EYES[0], None, 0.0), ValueError, "beta must be finite and > 0, got 0.0"),
        (lambda: MIX.tilt(EYES, None, 1.0), ValueError, r"quadratic must have shape \(3, 3\), got \(2, 3, 3\)"),
        (lambda: MIX.tilt(None, MEANS, 1.0), ValueError, r"linear must have shape \(3,\), got \(2, 3\)"),
        (lambda: MIX.tilt(None, [1.0], 1.0), TypeError, "linear must be a floating-point torch.Tensor, got list"),
        (
            lambda: MIX.tilt(SKEW[1], None, 1.0),
            ValueError,
            "quadratic must be symmetric, got entries that differ by 0.1$",
        ),
        (
            lambda: MIX.project(MEANS[1, :2]),
            ValueError,
            r"direction must be a vector of 3 numbers, .* got shape \(2,\)",
        ),
        (lambda: MIX.project(MEANS[0]), ValueError, "direction must be a vector of 3 numbers, not all 0, got only 0"),
        (lambda: MIX.cdf(MEANS[0]), ValueError, "the mixture must have dimension 1, got 3: project it first"),
        (lambda: MIX.quantile(FLOATS / 2), ValueError, "the mixture must have dimension 1, got 3: project it first"),
        (lambda: PAIR.cdf(vector(math.nan)), ValueError, "x must be finite"),
        (lambda: PAIR.quantile(vector(0.5, 1)), ValueError, "u must lie strictly between 0 and 1, got 1"),
        (lambda: PAIR.quantile(vector(0.5, -1)), ValueError, r"u must lie in \[0, 1\], got -1"),
        (lambda: MIX.class_logps(MEANS, vector(0, 1)), TypeError, "classes must be an integer torch.Tensor"),
        (lambda: MIX.class_logps(MEANS, CLASSES[:1]), ValueError, r"one number >= 0 for each of the 2 comp.* \(1,\)"),
        (lambda: MIX.class_logps(MEANS, CLASSES - 1), ValueError, "one number >= 0 for each .* smallest -1"),
        (lambda: MIX.class_logps(MEANS, 2 * CLASSES), ValueError, "positive probability, got 0 for class 1"),
        (
            lambda: GaussianMixture(law(1, 0), MEANS, FLOATS).of_class(CLASSES, 0),
            ValueError,
            "classes must each have positive probability, got 0 for class 1",
        ),
        (lambda: MIX.of_class(CLASSES, 2), ValueError, r"c must lie in 0\.\.1, got 2"),
        (lambda: GaussianMixture.fit(MEANS, CLASSES, -0.1), ValueError, "ridge must be finite and >= 0, got -0.1"),
        (lambda: GaussianMixture.fit(MEANS, CLASSES, 0.0), ValueError, "covariances must be positive definite"),
        (
            lambda: GaussianMixture.fit(MEANS, CLASSES[:1], 1.0),
            ValueError,
            r"labels shape \(n,\), got \(2, 3\) and \(1,",
        ),
        (lambda: GaussianMixture.fit(MEANS, 0 * CLASSES + 1, 1.0), ValueError, "every number from 0 to 1, got no 0"),
        (
            lambda: GaussianMixture.fit(MEANS, CLASSES + 9, 1.0),
            ValueError,
            r"labels must lie in 0\.\.1, got values from 9",
        ),
        (lambda: GaussianMixture.fit(MEANS, FLOATS, 1.0), TypeError, "labels must be an integer torch.Tensor"),
    ],
)
def test_bad_arguments(call, error, text):
    with pytest.raises(error, match=text):
        call()


def test_inputs_are_not_changed(rng):
    tensors = [law(0.2, 0.3, 0.5), normal((3, 2), rng), spd((3, 2, 2), rng), normal((5, 2), rng), spd((2, 2), rng)]
    copies = [t.clone() for t in tensors]
    priors, means, covariances, x, a = tensors
    mixture = GaussianMixture(priors, means, covariances)
    for result in (mixture, mixture.tilt(a, x[0], 1.0).mixture, mixture.noised(0.5, 0.5)):
        result.score(x)
        result.denoise(x, 0.5, 0.5)
        result.denoise_covariance(x, 0.5, 0.5)
        result.uniforms(x)
        result.sample(5, generator=rng)
        result.project(x[0]).quantile(x.abs() / 9)
    assert all(torch.equal(t, c) for t, c in zip(tensors, copies, strict=True))


def test_the_result_of_a_tilt_has_names():
    assert isinstance(PAIR.tilt(None, vector(1), 1.0), mixtures.Tilted)


@pytest.mark.parametrize("beta", [1.0, 1e-3, 1e-6, 1e-9, 1e-12, 1e-100, 1e-250])
@pytest.mark.parametrize("rise", [0.0, 0.5])
def test_a_tilt_of_any_temperature(beta, rise):
    """The reward prefers one point ever more; what each component holds of it has a limit, not seen beside r / beta."""
    p, m, v = [0.3, 0.7], [-1.0, 2.0], [0.5, 0.25]
    tilted, log_z = GaussianMixture(vector(*p).log(), vector(*m)[:, None], vector(*v)).tilt(
        vector(1.0)[:, None], vector(rise), beta
    )
    with mpmath.workdps(600):
        precisions = [1 / mpmath.mpf(s) + 1 / mpmath.mpf(beta) for s in v]
        pulls = [mpmath.mpf(a) / s + rise / mpmath.mpf(beta) for a, s in zip(m, v, strict=True)]
        logs = [
            mpmath.log(q) - mpmath.log(c * s) / 2 + h**2 / c / 2 - mpmath.mpf(a) ** 2 / s / 2
            for q, c, h, a, s in zip(p, precisions, pulls, m, v, strict=True)
        ]
        total = max(logs) + mpmath.log(sum(mpmath.exp(x - max(logs)) for x in logs))
        means = [float(h / c) for h, c in zip(pulls, precisions, strict=True)]
        priors = [float(x - total) for x in logs]
    torch.testing.assert_close(tilted.means[:, 0], vector(*means), rtol=1e-15, atol=0)
    torch.testing.assert_close(tilted.prior_logps, vector(*priors), rtol=1e-13, atol=1e-13)
    assert log_z.item() == pytest.approx(float(total), rel=1e-14)


# --- edges -----------------------------------------------------------------------------------------------------------


def test_two_components_have_their_own_noise(rng):
    # Far apart, so that each point tells its component: one narrow and one wide, both correlated.
    covariances = torch.stack([torch.stack([vector(2, 1), vector(1, 2)]), torch.stack([vector(20, -9), vector(-9, 5)])])
    mixture = GaussianMixture(law(0.5, 0.5), torch.stack([vector(0, 0), vector(1e6, 1e6)]), covariances)
    x = mixture.sample(40_000, generator=rng)
    first = x[:, 0] < 5e5
    for k, points in enumerate((x[first], x[~first])):
        # The relative error of a variance of n draws is sqrt(2 / n) = .01.
        torch.testing.assert_close(points.mT.cov(), covariances[k], rtol=0.1, atol=0.1 * covariances[k].amax().item())


def test_a_uniform_of_zero_counts_as_half_the_smallest_step(monkeypatch):
    monkeypatch.setattr(torch, "rand", lambda *size, **options: torch.zeros(*size, dtype=F64))
    x = GaussianMixture(law(1), vector(3)[None], vector(4)).sample(1, generator=torch.Generator())
    close(x, 3 + 2 * torch.special.ndtri(vector(2.0**-54))[None], 1e-15)


def test_refusals_name_the_argument():
    square, huge = torch.eye(2, dtype=F64), 1e150
    plane = GaussianMixture(law(0.5, 0.5), torch.stack([vector(0, huge), vector(0, -huge)]), vector(1e300))
    unlike = GaussianMixture(law(0.5, 0.5), vector(0, 0)[:, None], vector(1, 4))
    for call, text in (
        (lambda: GaussianMixture.fit([[0.0]], torch.tensor([0]), 1.0), "x must be a floating-point"),
        (lambda: PAIR.class_logps([0.0], torch.tensor([0, 1])), "x must be a floating-point"),
        (lambda: PAIR.denoise_covariance([0.0], 1.0, 1.0), "xt must be a floating-point"),
        (lambda: PAIR.project([0.0]), "direction must be a floating-point"),
        (lambda: plane.tilt(1e200 * square, None, 1e-200), ".* must keep r / beta within the range of float64, got an"),
        (lambda: PAIR.tilt(1e305 * ONE, None, 1.0), r"quadratic, linear and beta = 1 must give variances in"),
        (lambda: unlike.tilt(None, vector(1e152), 1.0), r"quadratic, linear and beta = 1 must give variances in"),
        (
            lambda: PAIR.tilt(-9 * ONE, None, 1.0),
            r"quadratic must leave S_k\^-1 \+ A / beta positive definite for every component of positive weight, got",
        ),
    ):
        with pytest.raises((TypeError, ValueError), match=f"^{text}"):
            call()


@pytest.mark.parametrize("quadratic", [None, torch.eye(2, dtype=F64)])
def test_a_tilt_leaves_a_component_that_is_switched_off_where_it_is(quadratic):
    means = torch.stack([vector(0, 1), vector(5, -5), vector(2, 2)])
    mixture = GaussianMixture(law(0.5, 0, 0.5), means, vector(1, 2, 3))
    tilted = mixture.tilt(quadratic, vector(1, 2), 0.5).mixture
    close(tilted.means[1], means[1])
    close(tilted.covariances[1], 2 * torch.eye(2, dtype=F64))


def test_symmetry_is_measured_against_the_entries_of_the_same_matrix():
    skew = torch.stack([vector(0, 1), vector(-1, 0)])
    eye = torch.eye(2, dtype=F64)
    for scale in (1e-4, 1.0, 1e4):
        GaussianMixture(law(1), torch.zeros(1, 2, dtype=F64), scale * (eye + 1e-9 * skew)[None])
        with pytest.raises(
            ValueError, match="covariances must be symmetric, got entries that differ by .* component 0"
        ):
            GaussianMixture(law(1), torch.zeros(1, 2, dtype=F64), scale * (eye + 1e-4 * skew)[None])
    with pytest.raises(ValueError, match="covariances must be symmetric, got entries that differ by .* in component 1"):
        GaussianMixture(law(0.5, 0.5), torch.zeros(2, 2, dtype=F64), torch.stack([1e6 * eye, eye + 1e-4 * skew]))


def test_float64_is_taken_as_it_is():
    logps = law(0.2, 0.8) + 1e-9
    assert torch.equal(GaussianMixture(logps, torch.zeros(2, 1, dtype=F64), vector(1)).prior_logps, logps)


def test_how_far_a_point_may_be_is_measured_from_the_means():
    far = torch.tensor([[1e18]])
    mixture = GaussianMixture(torch.zeros(1), far, torch.ones(1))
    assert mixture.logps(1.5 * far).item() == pytest.approx(-0.125e36, rel=1e-6)
    with pytest.raises(ValueError, match="x must lie within .* of the centre of the means"):
        mixture.logps(-1.5 * far)


def test_a_tilt_beyond_the_squares_of_float64():
    """The reward of a mean overflows, that of the tilted law does not."""
    far = GaussianMixture(law(0.25, 0.75), torch.stack([vector(0, 1e150), vector(0, -1e150)]), vector(1e300))
    tilted, log_z = far.tilt(1e200 * torch.eye(2, dtype=F64), None, 1.0)
    # det(I + S A / beta) = 1e1000; both means are one standard deviation away, and the new ones are 1e-500 of that.
    assert log_z.item() == pytest.approx(-0.5 - 500 * math.log(10), rel=1e-15)
    close(tilted.prior_logps, law(0.25, 0.75), 1e-12)  # logarithms of size 1152 cancel
    assert tilted.means.abs().max() <= 1e-300


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sigma", [1e-3, 1e-8, 1e-20, 1e-150])
def test_a_posterior_covariance_keeps_its_digits_under_little_noise(kind, sigma, rng):
    # sigma^2 / alpha^2 (I + sigma^2 / alpha^2 hessian of log p) up to order 6; differences of means near x are 1e-16.
    mixture, x = random_mixture(kind, rng), normal((3, D), rng)
    got = mixture.denoise_covariance(0.8 * x, 0.8, sigma) / (sigma / 0.8) ** 2
    hessian = torch.stack([torch.autograd.functional.jacobian(lambda y: mixture.score(y[None])[0], y) for y in x])
    close(got, torch.eye(D, dtype=F64) + (sigma / 0.8) ** 2 * hessian, 1e-9)


@pytest.mark.parametrize("shape", [(3,), (3, 2), (3, 2, 2)])
@pytest.mark.parametrize("variance", [1e-100, 1e16, 1e290])
def test_a_component_that_is_switched_off_may_have_any_variance(shape, variance):
    eye = torch.eye(2, dtype=F64) if len(shape) == 3 else torch.ones((), dtype=F64)
    covariances = vector(1, 0.5, variance).view(-1, *[1] * (len(shape) - 1)) * eye.expand(shape)
    means = vector(-1, 1, 3)[:, None] * vector(1, 0.5)
    off = GaussianMixture(law(0.4, 0.6, 0), means, covariances)
    alone = GaussianMixture(law(0.4, 0.6), means[:2], covariances[:2])
    for quadratic in (None, torch.eye(2, dtype=F64)):
        for linear in (None, 1e10 * vector(1, -0.1)):
            tilted, expected = (m.tilt(quadratic, linear, 1.0) for m in (off, alone))
            assert torch.equal(tilted.log_partition, expected.log_partition)
            assert torch.equal(tilted.mixture.prior_logps, torch.cat([expected.mixture.prior_logps, law(0)]))
            assert torch.equal(tilted.mixture.means[:2], expected.mixture.means)


@pytest.mark.parametrize(
    ("scale", "d", "variance", "work"),
    [
        (99.9, 1, 1.0, torch.float32),
        (100.0, 1, 1.0, F64),  # J |m|^2 / v = 10^4
        (49.9, 4, 1.0, torch.float32),
        (50.0, 4, 1.0, F64),
        (49.9, 1, 0.25, torch.float32),
        (50.0, 1, 0.25, F64),
        (199.9, 1, 4.0, torch.float32),
        (200.0, 1, 4.0, F64),
        (0.0, 1, 1e-8, F64),
        (0.0, 1, 1.01e-8, torch.float32),
        (0.0, 1, 1e16, F64),
        (0.0, 1, 0.99e16, torch.float32),
    ],
)
def test_where_single_precision_has_digits_and_range_to_spare(scale, d, variance, work):
    means = scale * vector(-1, 1)[:, None] * torch.ones(d, dtype=F64)
    wide = GaussianMixture(law(0.5, 0.5), means, vector(variance))
    assert wide._work == F64 and wide.to(torch.float32)._work == wide.to(torch.float16)._work == work


@pytest.mark.parametrize("d", [1, 3])
@pytest.mark.parametrize("variance", [0.01, 1.0, 100.0])
@pytest.mark.parametrize("dtype", DTYPES[:2])
def test_points_as_far_as_squares_do_not_overflow(d, variance, dtype):
    mixture = GaussianMixture(law(0.5, 0.5), vector(-1, 1)[:, None].expand(2, d), vector(variance)).to(dtype)
    # A 64th of the largest number for the sum of the squares, each over its variance if that is below 1.
    reach = math.sqrt(torch.finfo(dtype).max / 64 / d) * min(1.0, math.sqrt(variance))
    x = torch.full((1, d), reach, dtype=dtype)
    for sign in (-1, 1):
        assert mixture.logps(0.9999 * sign * x).isfinite().all() and mixture.score(0.9999 * sign * x).isfinite().all()
        with pytest.raises(ValueError, match="x must lie within " + re.escape(f"{reach:.3g} of the centre")):
            mixture.logps(1.0001 * sign * x)
    if dtype == F64:
        mixture.check_points("x", x)


def test_far_points_are_far_from_the_means():
    far = GaussianMixture(law(1), vector(1000)[None], vector(1e-300))
    assert far.logps(vector(1000)[None]).isfinite().all()
    with pytest.raises(ValueError, match="x must lie within"):
        far.logps(vector(-1000)[None])


def test_means_as_far_apart_as_allowed():
    far = GaussianMixture(law(0.5, 0.5), vector(-1e150, 1e150)[:, None], vector(1))
    close(far.project(vector(1)).prior_logps, law(0.5, 0.5))


@pytest.mark.parametrize(("quadratic", "linear"), [(None, vector(1)), (ONE, None), (0 * ONE, vector(1))])
def test_a_part_of_the_reward_that_overflows_is_refused(quadratic, linear):
    with pytest.raises(ValueError, match="beta = .* must keep r / beta within the range of float64"):
        PAIR.tilt(quadratic, linear, 1e-320)


def test_data_far_from_zero_in_one_coordinate_alone_lose_no_digits(rng):
    # Around the mean over components and coordinates, the squares of 1e8 would drown the differences.
    shift, means = vector(1e8, -1e8), normal((3, 2), rng)
    x = normal((7, 2), rng)
    near, far = (GaussianMixture(law(0.2, 0.3, 0.5), means + s, vector(0.5)) for s in (0 * shift, shift))
    close(far.logps(x + shift), near.logps(x), 1e-6)


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, "float64", None])
def test_points_have_a_floating_dtype(dtype):
    mixture = GaussianMixture(law(1.0), vector(0)[:, None], vector(1))
    with pytest.raises(TypeError, match=f"^dtype must be a floating-point torch.dtype, got {dtype!r}$"):
        mixture.to(dtype)
