"""Guidance: closed forms of guided samplers, gradients of values, laws of selection, particles by quadrature."""

import itertools
import math
from functools import partial

import numpy as np
import pytest
import torch
from helpers import F64, assert_same_under_default_dtype, check_sampler, vector

from tiltlib import diffusion, guidance, resampling, verify
from tiltlib.mixtures import GaussianMixture

# r = -(x - 1)^2 / 2 + 1/2 on two Gaussians, and r / beta = -2 (x - 2)^2 + 8 on one.
TWO = GaussianMixture(vector(0.5, 0.5).log(), vector(-1, 1)[:, None], vector(0.25))
TWO_TILTED = TWO.tilt(vector(1)[None], vector(1), 1.0)
ONE = GaussianMixture(vector(0), vector(0)[None], vector(1))
KAPPA, TOWARD = vector(4)[None], vector(8)
# Two dimensions, full covariances, and a reward that is concave in one direction only.
PLANE = GaussianMixture(
    vector(0.3, 0.7).log(),
    torch.stack([vector(-1, 0.5), vector(1, 0)]),
    torch.stack(
        [torch.stack([vector(0.5, 0.2), vector(0.2, 0.3)]), torch.stack([vector(0.4, -0.1), vector(-0.1, 0.6)])]
    ),
)
SADDLE, SLOPE = torch.stack([vector(1, 0.5), vector(0.5, -0.6)]), vector(0.3, -0.7)


def close(a, b, tolerance=1e-12):
    torch.testing.assert_close(torch.as_tensor(a, dtype=F64), torch.as_tensor(b, dtype=F64), rtol=0, atol=tolerance)


def normal(variance, mean=0.0):
    """Score of N(mean, variance)."""
    return lambda y, s: (mean - y) / (variance + s**2)


def points(n, d, generator, scale=4.0):
    return scale * (torch.rand(n, d, generator=generator, dtype=F64) - 0.5)


def read_off(step):
    """Slope and offset of an affine map of the line."""
    at_0, at_1 = step(vector(0, 1)[:, None])[:, 0].tolist()
    return at_1 - at_0, at_0


def ode_law(score, start, high, mean=0.0):
    """Mean and variance to which the ODE takes N(mean, start)."""
    levels = diffusion.geometric(400, 1e-4, high)
    slope, offset = read_off(lambda y: diffusion.sample(score, y, levels, method="ab3"))
    return slope * mean + offset, slope**2 * start


def chain_law(score, levels, start, mean=0.0, churn=1.0):
    """Mean and variance to which the chain of `transition` takes N(mean, start)."""
    law = vector(mean, start)
    for s, s_next in itertools.pairwise(levels.tolist()):
        slope, offset = read_off(lambda y, s=s, t=s_next: diffusion.transition(score, y, s, t, churn).mean)
        std = diffusion.transition(score, vector(0)[:, None], s, s_next, churn).std
        law = vector(slope * law[0] + offset, slope**2 * law[1] + std**2)
    return law


def sde_law(score, start, high, churn=1.0, n=500):
    """Mean and variance of the continuous process: the error of a chain is of order 1, so extrapolate."""
    once, twice = (chain_law(score, diffusion.geometric(k, 1e-3, high), start, churn=churn) for k in (n, 2 * n))
    return 2 * twice - once


# --- classifier-free -------------------------------------------------------------------------------------------------


def test_classifier_free_by_hand():
    score = guidance.classifier_free(lambda y, s: y + s, lambda y, s: -y, 3.0)
    close(score(vector(2)[None], 1.0), [[13.0]])  # -2 + 3 (3 + 2)
    y = vector(1, -2, 0.5)[:, None]
    for g, same in ((0.0, normal(2.0)), (1.0, normal(1.0))):
        close(guidance.classifier_free(normal(1.0), normal(2.0), g)(y, 0.7), same(y, 0.7))


# p(x | c) = N(0, A), p(x) = N(0, B), A = 1, B = 2, from p_S(. | c). The ODE ends at (2 (1 + S) / (2 + S))^(1 - g); as S
# goes to infinity that is A^g B^(1 - g), and the SDE ends at (AB - A^2g B^(2 - 2g)) / ((2g - 1) (B - A)).
@pytest.mark.parametrize(
    ("g", "start", "ode", "sde"),
    [
        (3.0, 10.0, 0.297521, 0.388734),
        (3.0, 100.0, 0.254975, 0.387512),
        (3.0, 1e8, 0.25, 0.3875),
        (2.0, 1e8, 0.5, 0.583333),
        (1.0, 1e8, 1.0, 1.0),
        (0.0, 1e8, 2.0, 2.0),
    ],
)
@pytest.mark.slow
def test_guided_gaussians_end_at_their_closed_forms(g, start, ode, sde):
    guided = guidance.classifier_free(normal(1.0), normal(2.0), g)
    close(ode_law(guided, 1 + start, math.sqrt(start)), (0.0, ode), 3e-5)
    close(sde_law(guided, 1 + start, math.sqrt(start)), (0.0, sde), 1e-3)
    if g > 1:  # neither is the power law, nor the other one
        assert min(abs(ode - sde), abs(sde - 1 / (g - (g - 1) / 2))) > 0.05
        off_by_one = guidance.classifier_free(normal(1.0), normal(2.0), g - 1)
        flipped = guidance.classifier_free(normal(1.0), normal(2.0), 2 - g)
        for wrong in (off_by_one, flipped):
            assert abs(sde_law(wrong, 1 + start, math.sqrt(start))[1] - sde) > 0.1


@pytest.mark.parametrize(("churn", "variance"), [(0.5, 0.342857), (2.0, 0.429129), (4.0, 0.459541), (16.0, 0.488723)])
@pytest.mark.slow
def test_churn_joins_ode_and_power_law(churn, variance):
    guided = guidance.classifier_free(normal(1.0), normal(2.0), 3.0)
    close(sde_law(guided, 1e8, 1e4, math.sqrt(churn), n=1000), (0.0, variance), 1e-4)


# --- values ----------------------------------------------------------------------------------------------------------


def test_value_of_the_instance():
    y = vector(0.3)[None]
    close(diffusion.of_mixture(TWO)(y, 1.0), [[-0.051603]], 1e-6)
    close(guidance.exact_value(TWO_TILTED)(y, 1.0), [[0.383118]], 1e-6)
    close(guidance.value_gradient(TWO, TWO_TILTED, y, 1.0), [[0.434721]], 1e-6)
    # h = E[w(x_0) | y] by quadrature, not w(E[x_0 | y]).
    x = torch.linspace(-9, 9, 4001, dtype=F64)
    joint = TWO.logps(x[:, None]) - (y[0] - x) ** 2 / 2
    value = (joint.softmax(-1) * (x - x**2 / 2).exp()).sum().log()
    close(guidance.log_values(TWO, TWO_TILTED)(y, 1.0), value[None])
    at_mean = TWO.denoise(y, 1.0, 1.0)[0]
    assert (at_mean - at_mean**2 / 2 - value).abs() > 0.1


@pytest.mark.parametrize("beta", [1.0, 2.5])
def test_value_and_gradient_agree(beta, rng):
    tilted = PLANE.tilt(SADDLE, SLOPE, beta)
    log_value = guidance.log_values(PLANE, tilted)
    y = points(20, 2, rng).requires_grad_()
    for s in (0.1, 1.0, 5.0):
        gradient = torch.autograd.grad(log_value(y, s).sum(), y)[0]
        close(guidance.value_gradient(PLANE, tilted, y, s).detach(), gradient, 1e-10)
    x = y.detach()
    close(log_value(x, 0.0), (x @ SLOPE - ((x @ SADDLE) * x).sum(-1) / 2) / beta)
    close(guidance.exact_value(tilted)(x, 0.4), diffusion.of_mixture(tilted.mixture)(x, 0.4))


def test_exact_guidance_reaches_the_tilt():
    u = (torch.arange(400, dtype=F64) + 0.5) / 400
    start, target = TWO_TILTED.mixture.noised(1.0, 20.0), TWO_TILTED.mixture.noised(1.0, 0.01)
    run = partial(diffusion.sample, levels=diffusion.karras(100, 0.01, 20.0), method="ab3")
    error = lambda y: (y[:, 0] - target.quantile(u)).square().mean().sqrt()  # noqa: E731
    exact = guidance.exact_value(TWO_TILTED)
    assert error(run(exact, start.quantile(u)[:, None])) < 1e-3
    # Started from the reference, or led by the reward at the noised point, it does not.
    assert error(run(exact, TWO.noised(1.0, 20.0).quantile(u)[:, None])) > 1e-2
    in_data_space = lambda y, s: diffusion.of_mixture(TWO)(y, s) + (1 - y)  # noqa: E731
    assert error(run(in_data_space, start.quantile(u)[:, None])) > 0.2


# --- plug-in ---------------------------------------------------------------------------------------------------------


# r / beta = -(kappa / 2) (x - m)^2 on N(0, 1), m = 2. ODE: m sqrt(2 kappa) Dawson(sqrt(kappa / 2)), exp(-kappa).
# SDE: m (1 - exp(-kappa)), (1 - exp(-2 kappa)) / (2 kappa). Exact: m kappa / (1 + kappa), 1 / (1 + kappa).
@pytest.mark.parametrize(
    ("kappa", "beta", "ode", "sde"),
    [
        (4.0, 0.5, (2.559952, 0.018316), (1.963369, 0.124958)),
        (1.0, 1.0, (1.449557, 0.367879), (1.264241, 0.432332)),
    ],
)
@pytest.mark.slow
def test_plug_in_ends_at_its_closed_forms(kappa, beta, ode, sde):
    a, b = beta * kappa * vector(1)[None], beta * 2 * kappa * vector(1)
    guided = guidance.plug_in_quadratic(ONE, a, b, beta)
    close(ode_law(guided, 1e8, 1e4), ode, 5e-4)
    close(sde_law(guided, 1e8, 1e4), sde, 2e-3)
    damped = guidance.plug_in_quadratic(ONE, a, b, beta, damped=True)
    exact = (2 * kappa / (1 + kappa), 1 / (1 + kappa))
    close(ode_law(damped, 1e8, 1e4), exact, 5e-4)
    assert (vector(*exact) - vector(*sde)).abs().min() > 0.05


@pytest.mark.parametrize("beta", [1.0, 0.5])
def test_plug_in_is_the_gradient_of_the_reward_of_the_mean(beta, rng):
    y = points(20, 2, rng).requires_grad_()
    for a, b in ((SADDLE, SLOPE), (SADDLE, None), (None, SLOPE), (None, None)):
        tilted = PLANE.tilt(a, b, beta)
        guided, exact = guidance.plug_in_quadratic(PLANE, a, b, beta), guidance.exact_value(tilted)
        for s in (0.3, 0.8, 3.0):
            d = PLANE.denoise(y, 1.0, s)
            reward = 0 if a is None else -((d @ a) * d).sum() / 2
            reward = reward if b is None else reward + (d @ b).sum()
            gradient = torch.autograd.grad(reward / beta, y)[0] if a is not None or b is not None else 0 * y
            got = guided(y.detach(), s) - diffusion.of_mixture(PLANE)(y, s).detach()
            close(got, gradient.detach(), 1e-10)
            if a is not None or b is not None:
                assert (guided(y.detach(), s) - exact(y.detach(), s)).abs().max() > 1e-3
    # Without A there is nothing to damp.
    undamped, damped = (guidance.plug_in_quadratic(PLANE, None, SLOPE, beta, damped=value) for value in (False, True))
    assert torch.equal(undamped(y.detach(), 0.8), damped(y.detach(), 0.8))


@pytest.mark.parametrize("beta", [1.0, 2.5])
def test_damping_is_exact_for_one_gaussian_only(beta, rng):
    single = GaussianMixture(vector(0), PLANE.means[:1], PLANE.covariances[:1])
    y = points(20, 2, rng)
    for ref, right in ((single, True), (PLANE, False)):
        exact = guidance.exact_value(ref.tilt(SADDLE, SLOPE, beta))
        for s in (0.3, 2.0):
            damped = guidance.plug_in_quadratic(ref, SADDLE, SLOPE, beta, damped=True)(y, s)
            error = (damped - exact(y, s)).abs().max()
            assert error < 1e-10 if right else error > 1e-3
    # A linear reward needs no damping on one Gaussian.
    exact = guidance.exact_value(single.tilt(None, SLOPE, beta))
    close(guidance.plug_in_quadratic(single, None, SLOPE, beta)(y, 0.7), exact(y, 0.7), 1e-10)


# --- selection, step by step -----------------------------------------------------------------------------------------

# p(x) = N(0, 2); the value is p_s(c | y) up to a factor, for p(x | c) = N(0, 1).
REF = normal(2.0)


def log_class(y, s):
    return (-(y**2) / (1 + s**2) + y**2 / (2 + s**2))[:, 0] / 2


def selected(n, power, levels, *, value=log_class, width=9.0, nodes=400):
    """Exact law of chains that keep one of n in {1, 2}: nodes and their masses at the last level, from exact p_s."""
    z = torch.linspace(-width, width, nodes, dtype=F64)
    numbers = levels.tolist()
    x = z * math.sqrt(2 + numbers[0] ** 2)
    mass = torch.softmax(-(z**2) / 2, 0)
    for s, s_next in itertools.pairwise(numbers):
        # The grid follows the spread of the points, at most that of the reference.
        ahead = z * math.sqrt(2 + s_next**2)
        mean, std = diffusion.transition(REF, x[:, None], s, s_next)
        law = torch.softmax(-(((ahead - mean) / std) ** 2) / 2, -1)
        if n == 2:
            w = power * value(ahead[:, None], s_next)
            law = 2 * law * (law @ torch.sigmoid(w[:, None] - w).mT)
        x, mass = ahead, mass @ law
    return x, mass


FEW = diffusion.geometric(6, 0.3, 4.0)


def test_selection_follows_its_exact_law(rng):
    edges = vector(-2, -1.4, -1, -0.7, -0.4, -0.2, 0, 0.2, 0.4, 0.7, 1, 1.4, 2)

    def law(n, power, value=log_class):
        x, mass = selected(n, power, FEW, value=value, nodes=500)
        below = torch.stack([mass[x < edge].sum() + mass[x == edge].sum() / 2 for edge in edges])
        # Between nodes the mass is spread evenly: half a node at each edge.
        cumulative = torch.cat([vector(0), mass.cumsum(0) - mass / 2, vector(1)])
        at = torch.cat([vector(-1e9), x, vector(1e9)])
        right = torch.searchsorted(at, edges)
        share = (edges - at[right - 1]) / (at[right] - at[right - 1])
        below = cumulative[right - 1] + share * (cumulative[right] - cumulative[right - 1])
        return torch.cat([below[:1], below.diff(), 1 - below[-1:]]).log()

    make = guidance.soft_best_of_n_step

    def draw(n, generator, step=None):
        step = step or make(log_class, 6.0, 2)
        z = torch.special.ndtri(torch.rand(n, 1, generator=generator, dtype=F64))
        y = diffusion.sample(REF, math.sqrt(18) * z, FEW, method=step, generator=generator)
        return torch.searchsorted(edges, y[:, 0].contiguous())

    late = lambda y, s: log_class(y, 1.3 * s)  # noqa: E731
    wrong = {
        "power": (partial(draw, step=make(log_class, 5.0, 2)), law(2, 5.0)),
        "sign": (partial(draw, step=make(log_class, -1.0, 2)), law(2, -1.0)),
        "level": (partial(draw, step=make(late, 6.0, 2)), law(2, 6.0, late)),
        "single": (partial(draw, step=make(log_class, 6.0, 1)), law(1, 6.0)),
    }
    check_sampler(draw, law(2, 6.0), wrong, rng)


@pytest.mark.slow
def test_two_candidates_guide_at_half_the_power():
    """N fixed, many steps: the guided SDE at scale power (1 - 1/2)."""
    low, high = 0.3, 20.0

    def extrapolated(variance):
        """Drop the terms of order 1 and 2."""
        a, b, c = (variance(diffusion.geometric(n, low, high)) for n in (32, 64, 128))
        return (a - 6 * b + 8 * c) / 3

    def by_selection(power, levels):
        x, mass = selected(2, power, levels, width=6.0)
        return (mass @ x**2).item()

    for power in (3.0, 6.0):
        values = extrapolated(partial(by_selection, power))
        for scale in (power / 2, power):
            guided = guidance.classifier_free(normal(1.0), REF, scale)
            limit = extrapolated(lambda levels, guided=guided: chain_law(guided, levels, 2 + high**2)[1].item())
            assert abs(values - limit) < 0.01 if scale == power / 2 else abs(values - limit) > 0.1


def test_selection_limits(rng):
    y = points(9, 2, rng)
    seen = []

    def record(z, s):
        seen.append((z, s))
        return -z.square().sum(-1)

    g = lambda: torch.Generator().manual_seed(3)  # noqa: E731
    out = guidance.soft_best_of_n_step(record, 1e6, 5)(normal(1.0), y, 2.0, 1.5, g())
    pool, s = seen[0]
    assert s == 1.5 and pool.shape == (45, 2)
    # A large power keeps the best of each row's own five candidates, from the law of the step.
    best = pool.view(9, 5, 2)[torch.arange(9), pool.square().sum(-1).view(9, 5).argmin(-1)]
    assert torch.equal(out, best)
    mean, std = diffusion.transition(normal(1.0), y, 2.0, 1.5)
    z = torch.special.ndtri(torch.rand(45, 2, generator=g(), dtype=F64))
    close(pool, mean.repeat_interleave(5, 0) + std * z)
    # One candidate, or power 0: the plain step with another kernel, and a last step without noise.
    kernel = diffusion.posterior_transition
    one = guidance.soft_best_of_n_step(record, 7.0, 1, kernel=kernel)
    levels = vector(2, 1, 0)
    close(
        diffusion.sample(normal(1.0), y, levels, method=one, generator=g())[0],
        diffusion.denoised(normal(1.0), seen[1][0], 1.0)[0],
    )
    # A value of -inf excludes a candidate.
    half = guidance.soft_best_of_n_step(lambda z, s: (z[:, 0] > 0).double().log(), 1.0, 40)
    assert (half(normal(1.0), y, 2.0, 1.5, g())[:, 0] > 0).all()


# --- particles -------------------------------------------------------------------------------------------------------

SHORT = vector(1.6, 1.1, 0.7)
STARTS = (-0.3, 0.8)


def log_tilt(y):
    """A small pull toward 1, so that quadrature with few nodes is exact to many digits."""
    return -0.15 * (y[:, 0] - 1) ** 2


def log_values(y, s):
    return 0.1 * y[:, 0] / (1 + s)


def expected(f, kernel=diffusion.transition, start=None):
    """E[w f] under the reference chain from each start, by quadrature over its Gaussian law."""
    nodes, mass = (torch.from_numpy(a) for a in np.polynomial.hermite_e.hermegauss(60))
    total = 0.0
    for y in STARTS if start is None else start:
        mean, variance = y, 0.0
        for s, s_next in itertools.pairwise(SHORT.tolist()):
            slope, offset = read_off(lambda z, s=s, t=s_next: kernel(normal(1.0), z, s, t).mean)
            std = kernel(normal(1.0), vector(0)[:, None], s, s_next).std
            mean, variance = slope * mean + offset, slope**2 * variance + std**2
        x = (mean + math.sqrt(variance) * nodes)[:, None]
        total += (mass @ (log_tilt(x).exp() * f(x[:, 0]))).item() / math.sqrt(2 * math.pi) / len(STARTS)
    return total


def every_system(
    monkeypatch, f, *, threshold=1.0, proposal=None, twist=log_values, kernel=diffusion.transition, size=11
):
    """Run two particles on every noise of a quadrature rule and every outcome of resampling.

    Returns E[Z_hat sum_i W_i f_i], the same with equal weights, and E[Z_hat].
    """
    nodes, mass = (torch.from_numpy(a) for a in np.polynomial.hermite_e.hermegauss(size))
    parents = torch.tensor(list(itertools.product(range(2), repeat=2)))
    shape = (size,) * 4 + (4, 4)
    index = torch.stack([i.flatten() for i in torch.meshgrid(*map(torch.arange, shape), indexing="ij")])
    noise = iter([nodes[index[:2]].T.reshape(-1, 1), nodes[index[2:4]].T.reshape(-1, 1)])
    chosen = iter([parents[index[4]], parents[index[5]]])
    weight = (mass[index[:4]] / math.sqrt(2 * math.pi)).prod(0)
    rounds = []

    def scheme(log_weights, n, generator):
        rounds.append(log_weights)
        pick = next(chosen)
        weight.mul_(log_weights.softmax(-1).gather(-1, pick).prod(-1))
        return pick

    monkeypatch.setattr(guidance._numerics, "normal", lambda like, generator: next(noise))
    ref = normal(1.0)
    out = guidance.particles(
        ref,
        proposal or ref,
        vector(*STARTS)[:, None].expand(len(weight), 2, 1),
        SHORT,
        log_tilt,
        twist,
        generator=torch.Generator(),
        kernel=kernel,
        threshold=threshold,
        scheme=scheme,
    )
    weight /= 4.0 ** (2 - len(rounds))  # parents that were never asked for
    close(weight.sum(), 1.0, 1e-10)
    z, values = out.log_partition.exp(), f(out.particles[..., 0])
    shares = out.log_weights.softmax(-1)
    return [(weight * z * v).sum().item() for v in ((shares * values).sum(-1), values.mean(-1), torch.ones_like(z))]


@pytest.mark.parametrize("threshold", [0.0, 0.97, 1.0])
@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("kernel", [diffusion.transition, diffusion.posterior_transition])
@pytest.mark.slow
def test_particles_are_unbiased(monkeypatch, threshold, guided, kernel):
    # The proposal is guided by a score that no value has: any will do.
    proposal = (lambda y, s: normal(1.0)(y, s) + 0.2 * torch.cos(y)) if guided else None
    run = partial(every_system, monkeypatch, threshold=threshold, proposal=proposal, kernel=kernel)
    for f in (lambda x: x, lambda x: x**2):
        weighted, dropped, z = run(f)
        close(z, expected(lambda x: 1, kernel), 1e-6)
        close(weighted, expected(f, kernel), 1e-6)
        assert abs(dropped - weighted) > 1e-3  # the points without their weights


def test_twists_that_are_off_cancel(monkeypatch):
    for twist in (None, lambda y, s: 0.3 * torch.sin(y[:, 0]) - 0.1 * s):
        close(every_system(monkeypatch, lambda x: x, twist=twist)[2], expected(lambda x: 1), 1e-6)


@pytest.mark.slow
def test_particles_and_z_together(rng):
    """A weighted draw of one point, kept with probability Z_hat / bound, is a draw of the tilt."""
    levels, bound = vector(2, 1.2, 0.5), math.exp(1.2)
    # w <= 1, and twists within .2: start .2, one step .4, the last step .2 + 0, so log Z_hat <= .8 < 1.2.
    tilt = lambda y: -2 * (y[:, 0] - 1) ** 2  # noqa: E731
    twist = lambda y, s: 0.2 * torch.tanh(3 * (y[:, 0] - 1))  # noqa: E731
    mean, variance = chain_law(normal(1.0), levels, 1 + 4.0).tolist()

    def law(kappa):
        """Cells of the tilt of N(0, variance), and the rest: not kept."""
        tilted = GaussianMixture(vector(0), vector(mean)[None], vector(variance)).tilt(
            vector(kappa)[None], vector(kappa), 1.0
        )
        z = (tilted.log_partition - kappa / 2).exp() / bound
        below = tilted.mixture.cdf(edges)
        cells = torch.cat([below[:1], below.diff(), 1 - below[-1:]])
        return torch.cat([z * cells, 1 - z[None]]).log()

    edges = vector(0.3, 0.6, 0.8, 1, 1.2, 1.5)
    target, off = law(4.0), law(3.6)
    runs = verify.plan(target, off)

    def draw(pick):
        y = math.sqrt(5) * torch.special.ndtri(torch.rand(runs, 4, 1, generator=rng, dtype=F64))
        out = guidance.particles(normal(1.0), normal(1.0), y, levels, tilt, twist, generator=rng, threshold=0.999)
        assert (out.ess[:, 0] < 4).any() and out.log_partition.max() < 1.2
        kept = torch.rand(runs, generator=rng, dtype=F64) * bound < out.log_partition.exp()
        point = out.particles[torch.arange(runs), pick(out), 0]
        return torch.where(kept, torch.searchsorted(edges, point), 7)

    verdict = verify.match(
        draw(lambda out: resampling.multinomial(out.log_weights, 1, generator=rng)[:, 0]),
        target,
        claim="particles",
        versus=[off],
    )
    assert verdict, verdict.line()
    dropped = draw(lambda out: torch.zeros(runs, dtype=torch.int64))
    assert verify.match(dropped, target, claim="particles!dropped").decision == "REJECT"


def test_the_limit_is_the_tilt_of_the_chain_not_of_the_law(rng):
    """p = N(0, 1), kappa = 4, m = 2, guided proposals with exact twists: few steps have a limit of their own."""
    levels, kappa = diffusion.karras(20, 0.05, 20.0), 4.0
    mean, v = chain_law(normal(1.0), levels, 1 + 400.0).tolist()
    close(mean, 0.0)
    limit = vector(2 * kappa * v / (1 + kappa * v), v / (1 + kappa * v))
    z = math.exp(-2 * kappa / (1 + kappa * v)) / math.sqrt(1 + kappa * v)
    tilted = ONE.tilt(KAPPA, TOWARD, 1.0)
    n = 20_000
    y = math.sqrt(401) * torch.special.ndtri(torch.rand(1, n, 1, generator=rng, dtype=F64))
    out = guidance.particles(
        normal(1.0),
        guidance.plug_in_quadratic(ONE, KAPPA, TOWARD, 1.0, damped=True),
        y,
        levels,
        lambda x: -2 * (x[:, 0] - 2) ** 2,
        guidance.log_values(ONE, tilted),
        generator=rng,
    )
    shares, x = out.log_weights[0].softmax(-1), out.particles[0, :, 0]
    got = torch.stack([shares @ x, shares @ x**2 - (shares @ x) ** 2])
    # Standard errors by the normal law; the continuous tilt, N(1.6, .2), is far outside.
    errors = torch.stack([(limit[1] / n).sqrt(), limit[1] * math.sqrt(2 / n)]) * 1.5
    assert ((got - limit).abs() < 5 * errors).all(), (got, limit)
    assert ((got - vector(1.6, 0.2)).abs() > 5 * errors).any(), (got, limit)
    assert abs(out.log_partition.item() - math.log(z)) < 0.1
    assert out.ess.shape == (1, 20) and (out.ess > 0.9 * n / 2).all()


def test_exact_ingredients_leave_nothing_to_chance(rng):
    """Twists that are the values of the chain itself, and a proposal led by them: every weight is Z."""
    # One step, y' ~ N(m(y), v), w = exp(b y'): V(y, s) = b m(y) + b^2 v / 2, and the proposal moves the mean by b v.
    b, levels = 0.7, vector(2, 1)
    v = 3.0
    mean = lambda y: y - 3 * y / 5  # noqa: E731
    value = lambda y, s: (b * mean(y) + b**2 * v / 2)[:, 0]  # noqa: E731
    moved = lambda y, s: normal(1.0)(y, s) + b  # noqa: E731
    y = points(12, 1, rng).view(3, 4, 1)
    run = partial(guidance.particles, normal(1.0), generator=rng, threshold=0)
    out = run(moved, y, levels, lambda x: b * x[:, 0], value)
    close(out.log_weights, value(y.view(-1, 1), 2.0).view(3, 4))
    # The other way round: from the reference, or with the step of the other sign, they differ.
    for wrong in (normal(1.0), lambda y, s: normal(1.0)(y, s) - b):
        assert run(wrong, y, levels, lambda x: b * x[:, 0], value).log_weights.sub(out.log_weights).abs().max() > 0.1


def test_start_from_another_law(rng):
    """Weights of the start count like any other."""
    y, levels = points(12, 1, rng).view(3, 4, 1), vector(2, 1)
    log_start = torch.rand(3, 4, generator=rng, dtype=F64)
    g = lambda: torch.Generator().manual_seed(5)  # noqa: E731
    run = partial(guidance.particles, normal(1.0), normal(1.0), y, levels, log_tilt, threshold=0)
    plain, weighted = run(generator=g()), run(generator=g(), start_log_weights=log_start)
    close(weighted.log_weights, plain.log_weights + log_start)
    close(weighted.log_partition, weighted.log_weights.logsumexp(-1) - math.log(4))


def test_dead_particles(rng):
    y, levels = points(80, 1, rng).view(40, 2, 1), vector(2, 1)
    out = guidance.particles(normal(1.0), normal(1.0), y, levels, lambda x: (x[:, 0] > 0).double().log(), generator=rng)
    dead = (out.particles[..., 0] <= 0).all(-1)
    assert dead.any() and not dead.all()
    assert (out.log_partition[dead] == -math.inf).all() and (out.ess[dead, -1] == 0).all()
    close(out.log_partition[~dead].exp(), (out.particles[~dead, :, 0] > 0).double().mean(-1))


def test_particles_keep_dtype_and_inputs(rng):
    y = points(12, 2, rng).view(3, 4, 2)
    kept = y.clone()
    run = lambda y: guidance.particles(  # noqa: E731
        normal(1.0), normal(2.0), y, SHORT, log_tilt, log_values, generator=torch.Generator(), threshold=0
    )
    double, single = run(y), run(y.float())
    assert torch.equal(y, kept) and double.particles.dtype == F64
    assert single.particles.dtype == torch.float32 and single.log_weights.dtype == F64
    torch.testing.assert_close(single.particles.double(), double.particles, rtol=0, atol=1e-4)
    close(single.log_partition, double.log_partition, 1e-4)
    # Each system on its own: another order of the systems gives the same weights per point.
    assert double.particles.shape == (3, 4, 2) and double.ess.shape == (3, 2) and double.log_partition.shape == (3,)


# --- numbers ---------------------------------------------------------------------------------------------------------

DTYPES = [F64, torch.float32, torch.float16, torch.bfloat16]


def test_classifier_free_refuses_scores_that_would_broadcast():
    y = points(4, 2, torch.Generator().manual_seed(1))
    row, scalar, table = y[:1], y[0, 0], torch.zeros(3, 4, 2, dtype=F64)
    for wrong in (row, y[:, :1], scalar, table):
        got = str(tuple(wrong.shape)).replace("(", r"\(").replace(")", r"\)")
        with pytest.raises(ValueError, match=rf"conditional must return shape \(4, 2\), as its argument, got {got}"):
            guidance.classifier_free(lambda y, s, w=wrong: w, normal(1.0), 2.0)(y, 1.0)
        with pytest.raises(ValueError, match=rf"unconditional must return shape \(4, 2\), as its argument, got {got}"):
            guidance.classifier_free(normal(1.0), lambda y, s, w=wrong: w, 2.0)(y, 1.0)
    with pytest.raises(TypeError, match="conditional must return a floating-point torch.Tensor, got float"):
        guidance.classifier_free(lambda y, s: 0.0, normal(1.0), 2.0)(y, 1.0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_comes_back_has_the_dtype_of_the_points(dtype, rng):
    ref = PLANE.to(dtype)
    tilted = ref.tilt(SADDLE.float(), SLOPE, 2.0)
    bend = SADDLE.float()  # A in another dtype than the mixture means the same
    exact = PLANE.tilt(bend.double(), SLOPE, 2.0)
    y = points(6, 2, rng).to(dtype)
    wide = y.double()
    eps = torch.finfo(dtype).eps
    for s in (0.5, 3.0, 1000.0):
        for got, right in (
            (guidance.value_gradient(ref, tilted, y, s), guidance.value_gradient(PLANE, exact, wide, s)),
            (
                guidance.plug_in_quadratic(ref, SADDLE.float(), SLOPE, 2.0)(y, s),
                guidance.plug_in_quadratic(PLANE, bend.double(), SLOPE, 2.0)(wide, s),
            ),
            (
                guidance.plug_in_quadratic(ref, SADDLE, SLOPE.half(), 2.0, damped=True)(y, s),
                guidance.plug_in_quadratic(PLANE, SADDLE, SLOPE.half().double(), 2.0, damped=True)(wide, s),
            ),
            (guidance.exact_value(tilted)(y, s), guidance.exact_value(exact)(wide, s)),
        ):
            assert got.dtype == dtype
            torch.testing.assert_close(got.double(), right, rtol=4 * eps + 1e-6, atol=4 * eps * 0.1 + 1e-7)
        # log Z itself is in the dtype of the mixture.
        got = guidance.log_values(ref, tilted)(y, s)
        assert got.dtype == dtype
        torch.testing.assert_close(got.double(), guidance.log_values(PLANE, exact)(wide, s), rtol=4 * eps, atol=4 * eps)
    for other in DTYPES:
        mixed = guidance.classifier_free(lambda y, s, d=other: -y.to(d), lambda y, s: 0 * y.double(), 2.0)(y, 1.0)
        assert mixed.dtype == dtype
        torch.testing.assert_close(mixed.double(), -2 * wide, rtol=2 * torch.finfo(torch.bfloat16).eps, atol=0)


def test_a_gradient_of_the_value_has_its_own_digits():
    # Far out, scores of p and of its tilt are 10^4 and differ by 1/2: in float32 each is rounded to 10^-3.
    ref = GaussianMixture(vector(0), vector(0)[None], vector(1)).to(torch.float32)
    tilted = ref.tilt(None, vector(0.5), 1.0)
    y = torch.tensor([[1e4], [-33333.3]])
    torch.testing.assert_close(guidance.value_gradient(ref, tilted, y, 0.0), torch.full_like(y, 0.5), rtol=1e-6, atol=0)
    value = guidance.log_values(ref, tilted)(y, 0.0)
    torch.testing.assert_close(value.double(), 0.5 * y[:, 0].double(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("beta", [1e-300, 1e-30, 1.0, 1e30, 1e300])
def test_plug_in_at_any_temperature(beta, rng):
    y = points(6, 2, rng)
    a = SADDLE @ SADDLE
    damped = guidance.plug_in_quadratic(PLANE, a, SLOPE, beta, damped=True)(y, 0.7)
    assert damped.isfinite().all() and guidance.plug_in_quadratic(PLANE, a, SLOPE, beta)(y, 0.7).isfinite().all()
    limit = diffusion.of_mixture(PLANE)(y, 0.7)
    if beta >= 1e30:
        close(damped, limit)
    if beta <= 1e-30:  # (C / s^2) (A C)^-1 (b - A D)
        d, c = PLANE.denoise(y, 1.0, 0.7), PLANE.denoise_covariance(y, 1.0, 0.7)
        slope = torch.linalg.solve(a @ c, (SLOPE - d @ a)[..., None])
        close(damped, limit + (c @ slope)[..., 0] / 0.49, 1e-8)


def test_what_would_overflow_is_refused_by_name():
    y = vector(1)[None]
    for call, text in (
        (
            lambda: guidance.plug_in_quadratic(ONE, None, TOWARD, 1e-320),
            "beta must keep linear / beta within the range of float64",
        ),
        (
            lambda: guidance.plug_in_quadratic(ONE, KAPPA, None, 1e-320),
            "beta must keep quadratic / beta within the range",
        ),
        (lambda: guidance.plug_in_quadratic(ONE, KAPPA, None, 1.0)(y, 1e-200), "s must be at least 1e-150"),
        (lambda: guidance.plug_in_quadratic(ONE, KAPPA, None, 1.0)(y, 1e200), r"s must be at most 1e\+150"),
        (lambda: guidance.value_gradient(ONE, ONE.tilt(None, TOWARD, 1.0), y * math.nan, 1.0), "y must be finite"),
        (lambda: guidance.log_values(ONE, ONE.tilt(None, TOWARD, 1.0))(y * math.nan, 1.0), "^y must be finite"),
        (lambda: guidance.log_values(ONE, ONE.tilt(None, TOWARD, 1.0))(y, 1e200), "alpha = 1 and sigma = 1e.200 must"),
    ):
        with pytest.raises(ValueError, match=text):
            call()
    with pytest.raises(TypeError, match="y must have the dtype of the mixture, torch.float64, got torch.float32"):
        guidance.plug_in_quadratic(ONE, KAPPA, None, 1.0)(y.float(), 1.0)
    with pytest.raises(TypeError, match="guidance_scale must be a number, got a torch.float32 tensor"):
        guidance.classifier_free(REF, REF, torch.tensor(1.0))


@pytest.mark.parametrize("power", [-2.0, 0.0, 1.0, 3.0])
def test_an_excluded_candidate_is_never_kept(power):
    # Half of the candidates, those below 0, have the value -inf: 0 (-inf) and -2 (-inf) are no reasons to keep one.
    value = lambda y, s: torch.where(y[:, 0] > 0, y[:, 0], -math.inf)  # noqa: E731
    step = guidance.soft_best_of_n_step(value, power, 40)
    out = step(normal(1.0), torch.zeros(50, 1, dtype=F64), 2.0, 1.0, torch.Generator().manual_seed(1))
    assert (out > 0).all()


def test_values_are_refused_by_their_own_name():
    y, g = torch.zeros(2, 1, dtype=F64), torch.Generator()
    for value, power, text in (
        (lambda y, s: y[:, 0] * math.nan, 1.0, "log_values must be finite or -inf"),
        (lambda y, s: y[:, 0] * 0 + math.inf, 1.0, "log_values must be finite or -inf"),
        (lambda y, s: y[:, 0] * 0 - math.inf, 1.0, "log_values must leave at least one outcome"),
        (lambda y, s: y[:, 0] * 0 + 1e300, 1e300, "power times log_values must be finite or -inf"),
    ):
        with pytest.raises(ValueError, match=text):
            guidance.soft_best_of_n_step(value, power, 3)(REF, y, 2.0, 1.0, g)
    # A float32 value times a large power does not overflow.
    step = guidance.soft_best_of_n_step(lambda y, s: y[:, 0].float() * 0 + 1e30, 1e30, 3)
    assert step(REF, y, 2.0, 1.0, g).isfinite().all()


def test_no_points(rng):
    empty = torch.zeros(0, 2, dtype=F64)
    tilted = PLANE.tilt(SADDLE, SLOPE, 2.0)
    assert guidance.classifier_free(REF, REF, 2.0)(empty, 1.0).shape == (0, 2)
    assert guidance.value_gradient(PLANE, tilted, empty, 1.0).shape == (0, 2)
    assert guidance.log_values(PLANE, tilted)(empty, 1.0).shape == (0,)
    assert guidance.plug_in_quadratic(PLANE, SADDLE, SLOPE, 2.0, damped=True)(empty, 1.0).shape == (0, 2)
    step = guidance.soft_best_of_n_step(log_class, 2.0, 3)
    assert step(REF, empty, 2.0, 1.0, rng).shape == (0, 2)
    out = guidance.particles(
        REF, normal(1.0), torch.zeros(0, 4, 1, dtype=torch.float32), SHORT, log_tilt, log_values, generator=rng
    )
    assert out.particles.shape == (0, 4, 1) and out.particles.dtype == torch.float32
    assert out.log_weights.shape == (0, 4) and out.log_partition.shape == (0,) and out.ess.shape == (0, 2)


def noting_dtypes():
    """A set, and a wrapper of functions of points that adds the dtype they get to it."""
    seen = set()

    def see(f):
        def seeing(y, *rest):
            seen.add(y.dtype)
            return f(y, *rest)

        return seeing

    return seen, see


@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_particles_in_small_dtypes(dtype):
    """Weights are ratios of kernels at the points that were drawn: rounding of the points does not enter them."""
    seen, see = noting_dtypes()
    y, levels = points(400, 1, torch.Generator().manual_seed(1)).view(1, 400, 1), diffusion.geometric(100, 0.5, 3.0)
    y = y.to(dtype)
    run = lambda y: guidance.particles(  # noqa: E731
        see(normal(1.0)), see(lambda z, s: normal(1.0)(z, s) + 0.5), y, levels, see(log_tilt), see(log_values),
        generator=torch.Generator().manual_seed(2), threshold=0,
    )  # fmt: skip
    low = run(y)
    assert seen == {dtype} and low.particles.dtype == dtype and low.log_weights.dtype == F64
    high = run(y.double())
    close(low.log_partition, high.log_partition, 20 * torch.finfo(dtype).eps)


def test_nothing_depends_on_the_default_dtype():
    tilted = PLANE.tilt(SADDLE, SLOPE, 2.0)

    def results():
        g, y = torch.Generator().manual_seed(1), vector(1, -2)[None]
        yield guidance.plug_in_quadratic(PLANE, SADDLE, SLOPE, 2.0, damped=True)(y, 1.0)
        yield guidance.value_gradient(PLANE, tilted, y, 1.0)
        yield guidance.soft_best_of_n_step(log_class, 2.0, 3)(REF, y.float(), 2.0, 1.0, g)
        start = torch.ones(2, 5, 1, dtype=torch.float32)
        yield from guidance.particles(REF, normal(1.0), start, SHORT, log_tilt, log_values, generator=g)

    assert_same_under_default_dtype(results, F64)


# --- refusals --------------------------------------------------------------------------------------------------------

NO_TILT = "tilted must be a Tilted, from GaussianMixture.tilt, got GaussianMixture$"


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda: guidance.classifier_free(REF, REF, math.nan), ValueError, "guidance_scale must be finite, got nan"),
        (lambda: guidance.classifier_free(REF, REF, 2.0)([1.0], 1.0), TypeError, "y must be .* got list"),
        (lambda: guidance.exact_value(TWO), TypeError, NO_TILT),
        (lambda: guidance.log_values(TWO, TWO), TypeError, NO_TILT),
        (lambda: guidance.value_gradient(TWO, TWO, vector(1)[None], 1.0), TypeError, NO_TILT),
        (lambda: guidance.log_values(REF, TWO_TILTED), TypeError, "ref must be a GaussianMixture, got function"),
        (
            lambda: guidance.value_gradient(REF, TWO_TILTED, vector(1)[None], 1.0),
            TypeError,
            "ref must be a GaussianMixture, got function",
        ),
        (
            lambda: guidance.plug_in_quadratic(REF, None, None, 1.0),
            TypeError,
            "ref must be a GaussianMixture, got function",
        ),
        (lambda: guidance.plug_in_quadratic(TWO, None, None, 0.0), ValueError, "beta must be finite and > 0, got 0.0"),
        (
            lambda: guidance.plug_in_quadratic(TWO, SADDLE, None, 1.0),
            ValueError,
            r"quadratic must have shape \(1, 1\), got \(2, 2\)",
        ),
        (
            lambda: guidance.plug_in_quadratic(TWO, None, SLOPE, 1.0),
            ValueError,
            r"linear must have shape \(1,\), got \(2,\)",
        ),
        (lambda: guidance.plug_in_quadratic(TWO, None, vector(math.inf), 1.0), ValueError, "linear must be finite"),
        (
            lambda: guidance.plug_in_quadratic(PLANE, SADDLE + torch.stack([SLOPE, SLOPE]), None, 1.0),
            ValueError,
            "quadratic must be symmetric",
        ),
        (
            lambda: guidance.plug_in_quadratic(TWO, None, None, 1.0)(vector(1)[None], 0.0),
            ValueError,
            "s must be finite and > 0, got 0.0",
        ),
        (lambda: guidance.soft_best_of_n_step(log_class, 1.0, 0), ValueError, "n must be an integer >= 1, got 0"),
        (lambda: guidance.soft_best_of_n_step(log_class, math.inf, 2), ValueError, "power must be finite, got inf"),
        (
            lambda: guidance.soft_best_of_n_step(lambda y, s: y, 1.0, 2)(REF, vector(1)[None], 2, 1, torch.Generator()),
            ValueError,
            r"log_values must return shape \(2,\), one number per point, got \(2, 1\)",
        ),
        (
            lambda: diffusion.sample(
                REF, vector(1)[None], SHORT, method=guidance.soft_best_of_n_step(log_class, 6.0, 2)
            ),
            TypeError,
            "generator must be a torch.Generator, got NoneType",
        ),
        (
            lambda: diffusion.sample(
                REF, vector(1)[None], SHORT, method=guidance.soft_best_of_n_step(log_class, 1.0, 2, kernel=NOISELESS)
            ),
            TypeError,
            "generator must be a torch.Generator, got NoneType",
        ),
    ],
)
def test_bad_input(call, error, text):
    with pytest.raises(error, match=text):
        call()


NOISELESS = partial(diffusion.transition, churn=0.0)


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        (
            {"kernel": NOISELESS},
            ValueError,
            "kernel must draw noise at every step, .* got std = 0.0 from level 1.6 to 1.1",
        ),
        (
            {"kernel": diffusion.posterior_transition, "levels": vector(2, 1, 0)},
            ValueError,
            "kernel must draw noise at every step, .* got std = 0.0 from level 1.0 to 0.0",
        ),
        (
            {"y": torch.zeros(4, 1)},
            ValueError,
            r"y must have shape \(runs, n, ...\) with n >= 1 points that are not empty, got \(4, 1\)",
        ),
        ({"y": torch.zeros(2, 0, 1)}, ValueError, r"y must have shape \(runs, n, ...\) with n >= 1"),
        ({"y": torch.full((2, 4, 1), math.inf)}, ValueError, "y must be finite, got 8 of 8"),
        ({"y": [[[0.0]]]}, TypeError, "y must be a floating-point torch.Tensor, got list"),
        ({"generator": None}, TypeError, "generator must be a torch.Generator, got NoneType"),
        (
            {"log_values": lambda y, s: 0.0},
            TypeError,
            "log_values must return a floating-point torch.Tensor, got float",
        ),
        ({"log_tilt": lambda y: y[:, 0] > 0}, TypeError, "log_tilt must return a floating-point .* got a torch.bool"),
        ({"threshold": math.nan}, ValueError, r"threshold must lie in \[0, 1\], got nan"),
        ({"levels": vector(1, 2)}, ValueError, "levels must decrease strictly"),
        ({"threshold": 1.1}, ValueError, r"threshold must lie in \[0, 1\], got 1.1"),
        ({"log_values": lambda y, s: y}, ValueError, r"log_values must return shape \(8,\), one number per point"),
        ({"log_values": lambda y, s: y[:, 0] / 0}, ValueError, "log_values must be finite"),
        ({"log_tilt": lambda y: y}, ValueError, r"log_tilt must return shape \(8,\), one number per point"),
        ({"log_tilt": lambda y: y[:, 0] * math.nan}, ValueError, "log_tilt must be finite or -inf"),
        ({"start_log_weights": torch.zeros(4)}, ValueError, r"start_log_weights must have shape \(2, 4\), got \(4,\)"),
        ({"start_log_weights": torch.zeros(2, 4).log()}, ValueError, "start_log_weights must be finite"),
    ],
)
def test_bad_particles(change, error, text):
    arguments = {
        "ref": REF,
        "proposal": REF,
        "y": torch.zeros(2, 4, 1),
        "levels": SHORT,
        "log_tilt": log_tilt,
        "generator": torch.Generator(),
        **change,
    }
    with pytest.raises(error, match=text):
        guidance.particles(**arguments)


# --- edges -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_a_difference_of_scores_may_overflow_the_dtype_of_the_points(dtype):
    y, top = torch.zeros(1, 1, dtype=dtype), 0.75 * torch.finfo(dtype).max
    score = guidance.classifier_free(lambda y, s: y + top, lambda y, s: y - top, 0.5)
    assert torch.equal(score(y, 1.0), y)


def test_plug_in_at_its_smallest_level(rng):
    # The mean of x_0 is y and C / s^2 is I: plain ascent of the reward.
    y = points(5, 2, rng)
    got = guidance.plug_in_quadratic(PLANE, SADDLE, SLOPE, 2.0)(y, 1e-150)
    close(got, PLANE.score(y) + (SLOPE - y @ SADDLE) / 2)


def test_values_are_asked_at_every_level_but_the_last(rng):
    seen, levels = [], vector(2, 1.7, 1.1, 0.4)

    def value(y, s):
        seen.append(s)
        return log_values(y, s)

    guidance.particles(REF, REF, points(12, 1, rng).view(3, 4, 1), levels, log_tilt, value, generator=rng)
    assert seen == levels[:-1].tolist()


def test_systems_of_equal_weights_are_left_alone(rng):
    """At threshold 1, too, where weights differ in no more than their last digits; the other systems are resampled."""
    y = points(9, 1, rng).view(3, 3, 1)
    start = vector(0, 1, 1)[:, None] * torch.tensor([[0.0, 0.0, 0.0], [0.1, 0.1, 0.1 * (1 + 1e-15)], [0.0, 1.0, 2.0]])
    run = lambda threshold: guidance.particles(  # noqa: E731
        REF, REF, y, SHORT, lambda y: 0 * y[:, 0], generator=torch.Generator().manual_seed(1), threshold=threshold,
        scheme=lambda log_weights, n, generator: torch.full((3, n), 2), start_log_weights=start,
    )  # fmt: skip
    always, never = run(1.0), run(0.0)
    assert torch.equal(always.particles[:2], never.particles[:2]) and torch.equal(
        always.log_weights[:2], never.log_weights[:2]
    )
    assert not torch.equal(always.particles[2], never.particles[2]) and (always.log_weights[2] == 0).all()
    close(always.log_partition, never.log_partition)
    close(always.ess, torch.full((3, 2), 3.0))
    close(never.ess[2], (vector(1, math.e, math.e**2).sum() ** 2 / vector(1, math.e**2, math.e**4).sum()).expand(2))


# --- any score, any reward, any shape --------------------------------------------------------------------------------


def quadratic_reward(x):
    return x @ SLOPE.to(x.dtype) - ((x @ SADDLE.to(x.dtype)) * x).sum(-1) / 2


def linear_reward(x):
    return x @ SLOPE


@pytest.mark.parametrize("beta", [1.0, 0.3])
def test_autograd_plug_in_is_the_closed_form(beta, rng):
    y = points(20, 2, rng)
    score = diffusion.of_mixture(PLANE)
    for reward, a in ((quadratic_reward, SADDLE), (linear_reward, None)):
        guided, closed = guidance.plug_in(score, reward, beta), guidance.plug_in_quadratic(PLANE, a, SLOPE, beta)
        for s in (0.3, 0.8, 3.0):
            close(guided(y, s), closed(y, s), 1e-10)
            # Neither without the Jacobian of the denoiser, nor at the noised point, nor with another temperature.
            mean = diffusion.denoised(score, y, s)
            at = SLOPE - mean @ (0 * SADDLE if a is None else a)
            for wrong in (score(y, s) + at / beta, guidance.plug_in(score, reward, 1.05 * beta)(y, s)):
                assert (wrong - closed(y, s)).abs().max() > 1e-3


def test_plug_in_of_one_gaussian_and_a_linear_reward_is_the_tilt(rng):
    single = GaussianMixture(vector(0), PLANE.means[:1], PLANE.covariances[:1])
    y, guided = points(20, 2, rng), guidance.plug_in(diffusion.of_mixture(single), linear_reward, 0.7)
    close(guided(y, 0.9), guidance.exact_value(single.tilt(None, SLOPE, 0.7))(y, 0.9), 1e-10)


def test_plug_in_takes_points_of_any_shape(rng):
    flat = diffusion.of_mixture(PLANE)
    y = points(6, 2, rng)
    right = guidance.plug_in(flat, quadratic_reward, 0.5)(y, 0.8)
    for shape in ((1, 2, 1), (2, 1), (1, 1, 2)):
        image = guidance.plug_in(
            lambda y, s: flat(y.flatten(1), s).view_as(y), lambda x: quadratic_reward(x.flatten(1)), 0.5
        )
        close(image(y.view(6, *shape), 0.8).flatten(1), right)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_plug_in_keeps_no_graph_whatever_the_mode(mode, rng):
    y = points(6, 2, rng)
    slope = torch.nn.Parameter(vector(1.5))
    score = lambda y, s: -y / (slope + s**2)  # noqa: E731
    # D = slope y / (slope + s^2)
    share = 1.5 / (1.5 + 0.64)
    right = -y / (1.5 + 0.64) + share * (SLOPE - share * y @ SADDLE) / 0.5
    with mode():
        for start in (y, y.clone(), y.clone().requires_grad_()):
            got = guidance.plug_in(score, quadratic_reward, 0.5)(start, 0.8)
            assert not got.requires_grad and got.grad_fn is None
            close(got.clone(), right)
            assert start.grad is None and slope.grad is None
    assert not y.requires_grad


@pytest.mark.parametrize("dtype", [F64, torch.float32, torch.float16, torch.bfloat16])
def test_plug_in_sees_and_returns_the_dtype_of_the_points(dtype, rng):
    seen, see = noting_dtypes()
    y = points(6, 2, rng).to(dtype)
    wide = guidance.plug_in(lambda y, s: -y / (1 + s**2), quadratic_reward, 2.0)(y.double(), 0.8)
    got = guidance.plug_in(see(lambda y, s: -y / (1 + s**2)), see(quadratic_reward), 2.0)(y, 0.8)
    assert got.dtype == dtype and seen == {dtype}
    torch.testing.assert_close(got.double(), wide, rtol=0, atol=8 * torch.finfo(dtype).eps)


GUIDED = lambda y, s: -y / (1 + s**2)  # noqa: E731


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"beta": 0.0}, ValueError, "beta must be finite and > 0, got 0.0"),
        ({"guidance_scale": math.inf}, ValueError, "guidance_scale must be finite, got inf"),
        ({"guidance_scale": lambda s: math.nan}, ValueError, r"guidance_scale\(s\) must be finite, got nan"),
        (
            {"guidance_scale": lambda s: vector(1)},
            TypeError,
            r"guidance_scale\(s\) must be a number, got a torch.float64",
        ),
        ({"y": torch.ones(2, 2) * math.nan}, ValueError, "^y must be finite, got 4 of 4"),
        ({"y": [[1.0]]}, TypeError, "^y must be a floating-point torch.Tensor, got list"),
        ({"s": 0.0}, ValueError, "s must be finite and > 0, got 0.0"),
        ({"s": 1e200}, ValueError, r"s must be at most 1e\+150"),
        ({"ref": lambda y, s: y[:1]}, ValueError, r"ref must return shape \(2, 2\), as its argument, got \(1, 2\)"),
        ({"reward": lambda x: x}, ValueError, r"reward must return shape \(2,\), one number per point, got \(2, 2\)"),
        ({"reward": lambda x: 1.0}, TypeError, "reward must return a floating-point torch.Tensor, got float"),
        ({"reward": lambda x: x[:, 0] / 0}, ValueError, "reward must be finite, got 2 of 2"),
        ({"reward": lambda x: x.detach()[:, 0]}, ValueError, "reward must be differentiable in its points"),
        (
            {"reward": lambda x: torch.ones(2, requires_grad=True) + x.detach()[:, 0]},
            ValueError,
            "reward must be differentiable in its points, got numbers that carry no graph",
        ),
        (
            {"reward": lambda x: (0 * x[:, 0]).sqrt()},
            ValueError,
            r"reward / beta must have a finite gradient, got \d of 4 entries NaN or infinite",
        ),
        ({"beta": 1e-320}, ValueError, "reward / beta must have a finite gradient, got 4 of 4"),
    ],
)
def test_bad_plug_in(change, error, text):
    arguments = {"ref": GUIDED, "reward": lambda x: x.sum(1), "beta": 1.0, "y": torch.ones(2, 2), "s": 1.0, **change}
    y, s = arguments.pop("y"), arguments.pop("s")
    with pytest.raises(error, match=text):
        guidance.plug_in(**arguments)(y, s)


def test_a_scale_may_depend_on_the_level(rng):
    y, asked = points(5, 2, rng), []

    def scale(s):
        asked.append(s)
        return 3.0 if 0.5 < s < 2 else 1

    free = partial(guidance.classifier_free, normal(1.0), normal(2.0))
    plug = lambda g: guidance.plug_in(GUIDED, quadratic_reward, 2.0, guidance_scale=g)  # noqa: E731
    for make in (free, plug):
        for s, g in ((2.5, 1.0), (1.0, 3.0), (0.5, 1.0)):
            close(make(scale)(y, s), make(g)(y, s))
            assert asked.pop() == s and not asked
            assert (make(scale)(y, s) - make(4.0 - g)(y, s)).abs().max() > 1e-3
            asked.clear()
    # The gradient of the reward is what is scaled.
    close(plug(3.0)(y, 1.0) - GUIDED(y, 1.0), 3 * (plug(1.0)(y, 1.0) - GUIDED(y, 1.0)))
    close(plug(0.0)(y, 1.0), GUIDED(y, 1.0))
    with pytest.raises(ValueError, match=r"guidance_scale\(s\) must be finite, got inf"):
        free(lambda s: math.inf)(y, 1.0)
    with pytest.raises(TypeError, match=r"guidance_scale\(s\) must be a number, got a torch.float64 tensor"):
        free(lambda s: vector(1))(y, 1.0)


def test_a_power_may_depend_on_the_level_of_the_candidates(rng):
    y, g = points(9, 2, rng), lambda: torch.Generator().manual_seed(3)
    value, asked = lambda z, s: -z.square().sum(-1), []

    def power(s):
        asked.append(s)
        return 5.0 if s < 1.7 else -5.0

    make = partial(guidance.soft_best_of_n_step, value)
    for s_next, constant in ((1.5, 5.0), (1.8, -5.0)):
        got = make(power, 4)(normal(1.0), y, 2.0, s_next, g())
        assert asked.pop() == s_next and not asked
        assert torch.equal(got, make(constant, 4)(normal(1.0), y, 2.0, s_next, g()))
        assert not torch.equal(got, make(-constant, 4)(normal(1.0), y, 2.0, s_next, g()))
    with pytest.raises(ValueError, match=r"power\(s\) must be finite, got nan"):
        make(lambda s: math.nan, 4)(normal(1.0), y, 2.0, 1.5, g())


def test_selection_and_particles_of_images_are_those_of_vectors(rng):
    y, g = points(24, 4, rng), lambda: torch.Generator().manual_seed(3)
    first = lambda z: z.flatten(1)[:, 0]  # noqa: E731
    value = lambda z, s: -(first(z) ** 2) / (1 + s)  # noqa: E731
    push = lambda y, s: normal(1.0)(y, s) + 0.3 * torch.cos(y)  # noqa: E731
    step = guidance.soft_best_of_n_step(value, 2.0, 3)
    flat = step(push, y, 2.0, 1.5, g())
    run = lambda y: guidance.particles(  # noqa: E731
        normal(1.0), push, y, SHORT, lambda z: -first(z).square(), value, generator=g(), threshold=1.0
    )
    vectors = run(y.view(2, 12, 4))
    for shape in ((1, 2, 2), (2, 2), (4, 1)):
        assert torch.equal(step(push, y.view(24, *shape), 2.0, 1.5, g()).flatten(1), flat)
        images = run(y.view(2, 12, *shape))
        assert images.particles.shape == (2, 12, *shape)
        for a, b in zip(images, vectors, strict=True):
            close(a.double().flatten(), b.double().flatten())
    assert (vectors.ancestors != torch.arange(12)).any()


# --- particles, in parts and on the way ------------------------------------------------------------------------------


def particle_run(y, **options):
    g = torch.Generator().manual_seed(4)
    push = lambda y, s: normal(1.0)(y, s) + 0.5 * torch.cos(y)  # noqa: E731
    arguments = {"ref": normal(1.0), "proposal": push, "levels": SHORT, "threshold": 1.0, **options}
    return guidance.particles(
        y=y, log_tilt=arguments.pop("log_tilt", log_tilt), log_values=arguments.pop("log_values", log_values),
        generator=g, **arguments,
    )  # fmt: skip


@pytest.mark.parametrize("chunk", [1, 5, 11, 12, 24, 1000, np.int64(7)])
@pytest.mark.parametrize("dtype", [F64, torch.float32])
def test_chunks_change_no_result(chunk, dtype, rng):
    y, sizes = points(24, 1, rng).view(2, 12, 1).to(dtype), set()

    def see(f):
        def seeing(z, *rest):
            sizes.add(len(z))
            assert z.dtype == dtype
            return f(z, *rest)

        return seeing

    push = lambda y, s: normal(1.0)(y, s) + 0.5 * torch.cos(y)  # noqa: E731
    whole = particle_run(y)
    parts = particle_run(
        y, chunk=chunk, ref=see(normal(1.0)), proposal=see(push), log_tilt=see(log_tilt), log_values=see(log_values)
    )
    last = {24 % chunk} if 24 % chunk and chunk < 24 else set()
    assert sizes == {min(int(chunk), 24)} | last
    assert (whole.ancestors != torch.arange(12)).any()
    for a, b in zip(parts, whole, strict=True):
        close(a, b, 1e-12 if dtype == F64 else 1e-5)
    # Each function is asked on its own, so that unlike chunks show.
    for name, function in (
        ("ref", normal(1.0)),
        ("proposal", push),
        ("log_tilt", log_tilt),
        ("log_values", log_values),
    ):
        sizes.clear()
        particle_run(y, chunk=5, **{name: see(function)})
        assert sizes == {5, 4}, name


def test_chunks_of_no_points(rng):
    out = particle_run(torch.zeros(0, 4, 1, dtype=F64), chunk=3)
    assert out.particles.shape == (0, 4, 1) and out.log_weights.shape == (0, 4)


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"chunk": 0}, ValueError, "chunk must be an integer >= 1, got 0"),
        ({"chunk": 2.0}, TypeError, "chunk must be an int, got float"),
        ({"chunk": 5, "ref": lambda y, s: y[:, :0]}, ValueError, r"score must return shape \(5, 1\), .* got \(5, 0\)"),
        ({"chunk": 5, "proposal": lambda y, s: [y]}, TypeError, "score must return a floating-point .*, got list"),
        ({"chunk": 5, "log_tilt": lambda y: y}, ValueError, r"log_tilt must return shape \(5,\), one number per point"),
        (
            {"chunk": 5, "log_values": lambda y, s: 1.0},
            TypeError,
            "log_values must return a floating-point .* got float",
        ),
    ],
)
def test_bad_chunks(options, error, text, rng):
    with pytest.raises(error, match=text):
        particle_run(points(24, 1, rng).view(2, 12, 1), **options)


def test_each_step_tells_what_a_run_that_ended_there_would_return(rng):
    y, levels = points(24, 2, rng).view(2, 12, 2).float(), vector(2, 1.6, 1.1, 0.7)
    told = []
    out = particle_run(y, levels=levels, on_step=lambda s, particles: told.append((s, particles)))
    silent = particle_run(y, levels=levels)
    assert [s for s, _ in told] == levels[1:].tolist()
    for a, b, c in zip(told[-1][1], out, silent, strict=True):
        assert torch.equal(a, b) and torch.equal(a, c)
    for i, (s, got) in enumerate(told[:-1], 1):
        short = particle_run(y, levels=levels[: i + 1], log_tilt=partial(log_values, s=s))
        assert got.particles.dtype == torch.float32 and got.ess.shape == (2, i) and got.ancestors.shape == (2, i, 12)
        for a, b in zip(got, short, strict=True):
            assert torch.equal(a, b)
    assert (out.ancestors != torch.arange(12)).any()


def test_a_run_that_is_broken_off_can_go_on(rng):
    """What was told stays: the weights less the values begin a second run, and both log Z add up."""
    y, levels = points(24, 1, rng).view(2, 12, 1), vector(2, 1.6, 1.1, 0.7)
    kept = []

    def stop(s, particles):
        kept[:] = [particles]
        if s == 1.1:
            raise KeyboardInterrupt

    g = torch.Generator().manual_seed(4)
    run = partial(guidance.particles, normal(1.0), normal(0.8), log_tilt=log_tilt, log_values=log_values, threshold=1.0)
    whole = run(y, levels, generator=torch.Generator().manual_seed(4))
    with pytest.raises(KeyboardInterrupt):
        run(y, levels, generator=g, on_step=stop)
    (half,) = kept
    now = log_values(half.particles.flatten(0, 1), 1.1).view(2, 12)
    rest = run(half.particles, levels[2:], generator=g, start_log_weights=half.log_weights - now)
    spent = half.log_partition - (half.log_weights.logsumexp(-1) - math.log(12))
    close(rest.particles, whole.particles)
    close(rest.log_weights, whole.log_weights)
    close(spent + rest.log_partition, whole.log_partition)
