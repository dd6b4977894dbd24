import itertools
import math

import numpy as np
import pytest
import torch
from helpers import F64, S0, S0_REWARDS, law, random_law, vector
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import brentq

from tiltlib import categorical, losses
from tiltlib.categorical import tilt
from tiltlib.selection import soft_best_of_n_law


def close(a, b, tolerance=1e-12):
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def is_zero(gradient, tolerance=1e-12):
    return gradient.abs().max().item() <= tolerance


# --- exact expected gradients: every group of draws with its probability --------------------------------------------


def all_groups(k, size):
    return torch.cartesian_prod(*[torch.arange(k)] * size).view(-1, size)


def softmax_law(theta):
    return torch.log_softmax(theta, -1)


def two_tokens(theta):
    """Token log-probabilities of the strings 00, 01, 10, 11 from three binary logit pairs: first, after 0, after 1."""
    first, after = torch.log_softmax(theta.view(3, 2), -1).split([1, 2])
    return torch.stack([first[0].repeat_interleave(2), after.flatten()], -1)


def expected_gradient(loss, theta, size, policy=softmax_law):
    """Mean gradient of a loss at groups of fresh draws. `loss` takes log-probabilities and outcomes of all groups."""
    theta = theta.clone().requires_grad_()
    logps = policy(theta)
    groups = all_groups(len(logps), size)
    chance = logps.detach().view(len(logps), -1).sum(-1)[groups].sum(-1).exp()
    return torch.autograd.grad((chance * loss(logps[groups], groups)).sum(), theta)[0]


def objective_gradient(theta, ref, rewards, beta):
    """Gradient of J = E r - beta KL(pi || p), by autograd."""
    theta = theta.clone().requires_grad_()
    logps = softmax_law(theta)
    return torch.autograd.grad(categorical.expectation(logps, rewards) - beta * categorical.kl(logps, ref), theta)[0]


def grpo_sequence(beta=1.0, ref=S0, rewards=S0_REWARDS, **flags):
    """GRPO with one token per sequence, as a loss for `expected_gradient`."""
    return lambda logps, y: losses.grpo(logps[..., None], ref[y][..., None], rewards[y], beta, **flags)


THETA = vector(0.3, -0.2, 0.1)
GRAD_J = vector(-0.280688, 0.077136, 0.203552)
PRINTED = 5e-7  # the theory notes print six digits


def k3_fixed_point(ref, rewards, beta):
    """The law beta p / (mu - r), with mu above the largest reward such that it sums to one."""
    p, r = ref.exp(), rewards
    top = r.max().item()
    mu = brentq(lambda m: (beta * p / (m - r)).sum().item() - 1, top + 1e-9, top + beta + 1e-9, xtol=1e-15)
    return (beta * p / (mu - r)).log(), mu


def test_gradient_of_the_objective_is_that_of_the_theory():
    close(objective_gradient(THETA, S0, S0_REWARDS, 1.0), GRAD_J, PRINTED)
    assert is_zero(objective_gradient(tilt(S0, S0_REWARDS, 0.7), S0, S0_REWARDS, 0.7))


# --- policy_gradient and rloo ----------------------------------------------------------------------------------------


def test_policy_gradient_by_hand():
    # pi = 1/4, p = 1/2: log(pi / p) = -log 2. Bracket: 3 + 2 log 2 - 1. Loss: log 4 (2 + 2 log 2).
    out = losses.policy_gradient(law(0.25), law(0.5), vector(3), 2.0, baseline=1.0)
    close(out, vector(math.log(4) * (2 + 2 * math.log(2))))


def test_rloo_by_hand():
    # pi = 1/4, 1/2, 1/4 and p = 1/4: log(pi / p) = 0, log 2, 0, so R = 1, 6 - 2 log 2, 5 at beta = 2.
    # Minus the mean of the others: 1 - (11 - 2 log 2)/2, 6 - 2 log 2 - 3, 5 - (7 - 2 log 2)/2.
    a = vector(1 - (11 - 2 * math.log(2)) / 2, 3 - 2 * math.log(2), 5 - (7 - 2 * math.log(2)) / 2)
    logps = law(0.25, 0.5, 0.25)
    out = losses.rloo(logps, law(0.25, 0.25, 0.25), vector(1, 6, 5), 2.0)
    close(out, -(logps * a).sum() / 3)


@pytest.mark.parametrize("beta", [1.0, 0.4])
@pytest.mark.parametrize("baseline", [0.0, 3.0])
def test_policy_gradient_is_the_gradient_of_the_objective(beta, baseline):
    def loss(logps, y):
        return losses.policy_gradient(logps, S0[y], S0_REWARDS[y], beta, baseline=baseline).mean(-1)

    close(expected_gradient(loss, THETA, 1), -objective_gradient(THETA, S0, S0_REWARDS, beta))


@pytest.mark.parametrize("beta", [1.0, 0.4])
@pytest.mark.parametrize("size", [2, 3, 4])
def test_rloo_is_the_gradient_of_the_objective(size, beta):
    def loss(logps, y):
        return losses.rloo(logps, S0[y], S0_REWARDS[y], beta)

    close(expected_gradient(loss, THETA, size), -objective_gradient(THETA, S0, S0_REWARDS, beta))
    if beta == 1.0:
        close(-expected_gradient(loss, THETA, size), GRAD_J, PRINTED)


def test_at_the_tilt_every_single_gradient_vanishes():
    logps = tilt(S0, S0_REWARDS, 0.7).requires_grad_()
    y = all_groups(3, 4)
    out = losses.rloo(logps[y], S0[y], S0_REWARDS[y], 0.7)
    for one in out:
        assert is_zero(torch.autograd.grad(one, logps, retain_graph=True)[0])
    # With the constant value of the bracket, beta log Z, as baseline the same holds draw by draw.
    constant = 0.7 * categorical.log_partition(S0, S0_REWARDS, 0.7)
    assert is_zero(losses.policy_gradient(logps, S0, S0_REWARDS, 0.7, baseline=constant))
    assert not is_zero(losses.policy_gradient(logps, S0, S0_REWARDS, 0.77, baseline=constant), 1e-2)


def test_baseline_broadcasts(rng):
    logps, ref = (-torch.rand(2, 3, generator=rng, dtype=F64) for _ in range(2))
    rewards, baseline = (torch.rand(size, generator=rng, dtype=F64) for size in ((2, 3), (2, 1)))
    out = losses.policy_gradient(logps, ref, rewards, 0.5, baseline=baseline)
    for i in range(2):
        close(out[i], losses.policy_gradient(logps[i], ref[i], rewards[i], 0.5, baseline=baseline[i].item()))


def test_gradient_flows_through_the_likelihood_alone(rng):
    """The bracket is a constant: derivative -A per log-probability, none in the reference, reward or baseline."""
    logps, ref = (-torch.rand(4, generator=rng, dtype=F64) for _ in range(2))
    rewards, baseline = torch.rand(4, generator=rng, dtype=F64), torch.rand(4, generator=rng, dtype=F64)
    for x in (logps, ref, rewards, baseline):
        x.requires_grad_()
    returns = (rewards - 0.7 * (logps - ref)).detach()
    out = losses.policy_gradient(logps, ref, rewards, 0.7, baseline=baseline).sum()
    found = torch.autograd.grad(out, (logps, ref, rewards, baseline), allow_unused=True)
    close(found[0], baseline.detach() - returns)
    assert found[1:] == (None, None, None)
    found = torch.autograd.grad(losses.rloo(logps, ref, rewards, 0.7), (logps, ref, rewards), allow_unused=True)
    others = vector(*[returns[torch.arange(4) != i].mean() for i in range(4)])
    close(found[0], (others - returns) / 4)
    assert found[1:] == (None, None)


# --- KL estimators ---------------------------------------------------------------------------------------------------


def test_kl_estimators_by_hand():
    # pi = 1/4, p = 1/2: rho = 2.
    k1, k2, k3 = losses.kl_estimators(law(0.25), law(0.5))
    close(k1, vector(-math.log(2)))
    close(k2, vector(math.log(2) ** 2 / 2))
    close(k3, vector(2 - 1 - math.log(2)))


def test_kl_estimators_have_the_moments_of_the_theory():
    logps = softmax_law(THETA)
    estimates = losses.kl_estimators(logps, S0)
    mean = [categorical.expectation(logps, k).item() for k in estimates]
    spread = [categorical.expectation(logps, k**2).item() - m**2 for k, m in zip(estimates, mean, strict=True)]
    assert mean == pytest.approx([0.051724, 0.058061, 0.051724], abs=PRINTED)
    assert spread == pytest.approx([0.113447, 0.003178, 0.002103], abs=PRINTED)
    assert mean[0] == pytest.approx(categorical.kl(logps, S0).item(), abs=1e-14)
    swapped = categorical.expectation(logps, losses.kl_estimators(S0, logps).k3).item()
    assert swapped == pytest.approx(0.066601, abs=PRINTED)
    assert swapped == pytest.approx((categorical.chi_square(logps, S0) - categorical.kl(logps, S0)).item(), abs=1e-14)


def test_pathwise_gradients_of_kl_estimators():
    def pathwise(name):
        return expected_gradient(lambda logps, y: getattr(losses.kl_estimators(logps, S0[y]), name).mean(-1), THETA, 1)

    def gradient(divergence):
        theta = THETA.clone().requires_grad_()
        return torch.autograd.grad(divergence(softmax_law(theta)), theta)[0]

    assert is_zero(pathwise("k1"))
    close(pathwise("k2"), vector(-0.100820, -0.058443, 0.159264), PRINTED)
    close(pathwise("k2"), gradient(lambda logps: categorical.kl(logps, S0)))
    close(pathwise("k3"), vector(-0.087673, -0.049911, 0.137585), PRINTED)
    close(pathwise("k3"), gradient(lambda logps: categorical.kl(S0, logps)))


def test_k3_is_precise_near_zero_and_never_negative(rng):
    logps, ref = (-10 * torch.rand(1000, generator=rng, dtype=F64) for _ in range(2))
    assert bool((losses.kl_estimators(logps, ref).k3 >= 0).all())
    # At a small log rho = x it is x^2 / 2, which is lost in the rounding of exp(x) - 1 - x.
    logps = -0.5 - torch.rand(1000, generator=rng)
    ref = logps + 1e-3 * torch.rand(1000, generator=rng)
    x = (ref - logps).double()
    assert ((losses.kl_estimators(logps, ref).k3 - (torch.expm1(x) - x)).abs() <= 1e-7 * x).all()


# --- grpo: the definition --------------------------------------------------------------------------------------------


def slow_grpo(logps, ref, rewards, beta, kl, baseline, scale, mask, old, clip):
    """The definition, number by number, for one group; floats are constants, tensors are differentiated."""
    g, length = logps.shape
    keep = torch.ones(g, length, dtype=torch.bool) if mask is None else mask
    returns = rewards.tolist()
    if kl == "reward":
        for i, t in itertools.product(range(g), range(length)):
            returns[i] -= beta * (logps[i, t] - ref[i, t]).item() * keep[i, t].item()
    mean = sum(returns) / g
    sd = math.sqrt(sum((x - mean) ** 2 for x in returns) / g)
    total = 0.0
    for i in range(g):
        others = [returns[j] for j in range(g) if j != i]
        a = returns[i] - (mean if baseline == "group" else sum(others) / (g - 1))
        a = a / sd if scale == "group" else a
        for t in range(length):
            if not keep[i, t]:
                continue
            ratio = torch.exp(logps[i, t] - (logps if old is None else old)[i, t].item())
            low, high = ratio * a, min(max(ratio.item(), 1 - clip), 1 + clip) * a
            gain = low if low.item() <= high else high
            log_rho = ref[i, t] - logps[i, t]
            penalty = {"k1": -log_rho, "k2": log_rho**2 / 2, "k3": log_rho.exp() - 1 - log_rho}.get(kl, 0.0)
            total = total - (gain - beta * penalty)
    return total / g


def grpo_inputs(rng, g=4, length=3, spread=0.3):
    logps = -1 - torch.rand(g, length, generator=rng, dtype=F64)
    ref = logps + spread * torch.randn(g, length, generator=rng, dtype=F64)
    old = logps + spread * torch.randn(g, length, generator=rng, dtype=F64)
    mask = torch.rand(g, length, generator=rng) < 0.6
    mask[:, 0] = True
    return logps.requires_grad_(), ref.clamp(max=-0.01), 3 * torch.randn(g, generator=rng, dtype=F64), mask, old


@pytest.mark.parametrize("drawn", ["now", "before"])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("scale", ["group", "none"])
@pytest.mark.parametrize("baseline", ["group", "leave-one-out"])
@pytest.mark.parametrize("kl", ["reward", "k1", "k2", "k3"])
def test_grpo_equals_its_definition(kl, baseline, scale, masked, drawn, rng):
    logps, ref, rewards, mask, old = grpo_inputs(rng)
    mask, old = mask if masked else None, old.clamp(max=-0.01) if drawn == "before" else None
    out = losses.grpo(
        logps, ref, rewards, 0.6, kl=kl, baseline=baseline, scale=scale, mask=mask, old_logps=old, clip=0.15
    )
    expected = slow_grpo(logps, ref, rewards, 0.6, kl, baseline, scale, mask, old, 0.15)
    close(out, expected)
    close(torch.autograd.grad(out, logps)[0], torch.autograd.grad(expected, logps)[0])


def test_grpo_defaults_are_those_of_the_paper(rng):
    logps, ref, rewards, _, old = grpo_inputs(rng)
    close(
        losses.grpo(logps, ref, rewards, 0.6, old_logps=old.clamp(max=-0.01)),
        slow_grpo(logps, ref, rewards, 0.6, "k3", "group", "group", None, old.clamp(max=-0.01), 0.2),
    )


def test_every_flag_of_grpo_changes_the_gradient(rng):
    logps, ref, rewards, mask, old = grpo_inputs(rng)
    changes = [
        {},
        *({"kl": kl} for kl in ("reward", "k1", "k2")),
        {"baseline": "leave-one-out"},
        {"scale": "none"},
        {"mask": mask},
        {"old_logps": old.clamp(max=-0.01)},
        {"old_logps": old.clamp(max=-0.01), "clip": 0.05},
        {"beta": 1.1},
    ]
    found = [
        torch.autograd.grad(losses.grpo(logps, ref, rewards, **{"beta": 1.0, **change}), logps)[0] for change in changes
    ]
    for a, b in itertools.combinations(found, 2):
        assert not is_zero(a - b, 1e-3)


def test_advantages_and_old_policy_are_constants(rng):
    logps, ref, rewards, _, old = grpo_inputs(rng)
    old = old.clamp(max=-0.01)
    for x in (ref, rewards, old):
        x.requires_grad_()
    out = losses.grpo(logps, ref, rewards, 0.6, kl="reward", old_logps=old)
    found = torch.autograd.grad(out, (logps, ref, rewards, old), allow_unused=True)
    assert not is_zero(found[0], 1e-3) and found[1:] == (None, None, None)


# Ratio of one token, sign of its advantage, and whether its gradient survives the clip at 1 - .2 and 1 + .2.
CLIPS = [(1.5, 1, False), (1.5, -1, True), (0.5, 1, True), (0.5, -1, False), (1.1, 1, True), (0.9, -1, True)]


@pytest.mark.parametrize(("ratio", "sign", "passes"), CLIPS)
def test_clipping_stops_what_has_gone_far_enough(ratio, sign, passes):
    old = law(0.4, 0.4)[:, None]
    logps = torch.stack([old[0] + math.log(ratio), old[1]]).requires_grad_()
    out = losses.grpo(logps, old, vector(sign, -sign), 1.0, kl="reward", scale="none", old_logps=old)
    # R = r - log(pi / p): (sign - log ratio, -sign), so the advantages are +-a with a = sign - log(ratio) / 2.
    a = sign - math.log(ratio) / 2
    assert a * sign > 0
    found = torch.autograd.grad(out, logps)[0].flatten()
    close(found, vector(-ratio * a / 2 if passes else 0, a / 2))
    clipped = min(max(ratio, 0.8), 1.2)
    close(out, -vector(min(ratio * a, clipped * a) - a).squeeze() / 2)


def test_clip_has_no_effect_on_fresh_draws(rng):
    logps, ref, rewards, _, _ = grpo_inputs(rng)
    wide, narrow = (losses.grpo(logps, ref, rewards, 0.6, clip=c) for c in (10.0, 1e-9))
    close(wide, narrow)
    close(torch.autograd.grad(wide, logps)[0], torch.autograd.grad(narrow, logps)[0])
    same = losses.grpo(logps, ref, rewards, 0.6, old_logps=logps.detach())
    close(torch.autograd.grad(same, logps)[0], torch.autograd.grad(losses.grpo(logps, ref, rewards, 0.6), logps)[0])


@pytest.mark.parametrize("kl", ["reward", "k1", "k2", "k3"])
def test_masked_tokens_change_nothing(kl, rng):
    logps, ref, rewards, mask, old = grpo_inputs(rng)
    old = old.clamp(max=-0.01)
    out = losses.grpo(logps, ref, rewards, 0.6, kl=kl, mask=mask, old_logps=old)
    gradient = torch.autograd.grad(out, logps)[0]
    assert not bool(gradient[~mask].any())
    noise = [torch.where(mask, x.detach(), -3 * torch.rand(4, 3, generator=rng, dtype=F64)) for x in (logps, ref, old)]
    noise[0].requires_grad_()
    other = losses.grpo(noise[0], noise[1], rewards, 0.6, kl=kl, mask=mask, old_logps=noise[2])
    close(other, out)
    close(torch.autograd.grad(other, noise[0])[0], gradient)
    # A sequence that is cut by the mask is a shorter sequence.
    prefix = torch.tensor([True, True, False]).expand(4, 3)
    close(
        losses.grpo(logps, ref, rewards, 0.6, kl=kl, mask=prefix),
        losses.grpo(logps[:, :2], ref[:, :2], rewards, 0.6, kl=kl),
    )


@pytest.mark.parametrize("kl", ["reward", "k1", "k2", "k3"])
def test_padding_may_be_as_unlikely_as_it_likes(kl):
    # log rho = 1000 at the masked tokens: its exponential is infinite, and 0 times that is no number.
    logps = torch.stack([vector(-1, -1000), vector(-2, -1000)]).requires_grad_()
    ref, mask = vector(-1, 0).expand(2, 2), torch.tensor([True, False]).expand(2, 2)
    for old in (None, torch.stack([vector(-1, -2000), vector(-2, -2000)])):
        out = losses.grpo(logps, ref, vector(0, 1), 0.6, kl=kl, mask=mask, old_logps=old)
        short = losses.grpo(
            logps[:, :1], ref[:, :1], vector(0, 1), 0.6, kl=kl, old_logps=None if old is None else old[:, :1]
        )
        close(out, short)
        close(torch.autograd.grad(out, logps, retain_graph=True)[0], torch.autograd.grad(short, logps)[0])


@pytest.mark.parametrize("baseline", ["group", "leave-one-out"])
@pytest.mark.parametrize("reward", [0.0, 1.0, 0.1, 0.7, 1e6 + 0.1, -1 / 3])
@pytest.mark.parametrize("size", [3, 7])
def test_equal_rewards_have_no_advantage(reward, size, baseline):
    """Without a difference there is nothing to scale; the rounding of the mean is not a difference."""
    for dtype in (F64, torch.float32):
        logps = torch.full((size, 1), -1.0, dtype=dtype, requires_grad=True)
        rewards = torch.full((size,), reward, dtype=dtype)
        out = losses.grpo(logps, logps.detach(), rewards, 1.0, kl="k2", baseline=baseline)
        assert is_zero(torch.autograd.grad(out, logps)[0])


# --- grpo: where its expected gradient vanishes ----------------------------------------------------------------------


@pytest.mark.parametrize("size", [2, 3, 4])
def test_grpo_with_the_mean_of_the_whole_group_shrinks_the_gradient(size):
    flags = {"kl": "reward", "scale": "none"}
    shrunk = expected_gradient(grpo_sequence(baseline="group", **flags), THETA, size)
    close(shrunk, -(1 - 1 / size) * objective_gradient(THETA, S0, S0_REWARDS, 1.0))
    full = expected_gradient(grpo_sequence(baseline="leave-one-out", **flags), THETA, size)
    close(full, -objective_gradient(THETA, S0, S0_REWARDS, 1.0))


def test_grpo_values_of_the_theory():
    mean_of_all = -expected_gradient(grpo_sequence(kl="reward", scale="none"), THETA, 2)
    close(mean_of_all, vector(-0.140344, 0.038568, 0.101776), PRINTED)
    scaled = -expected_gradient(grpo_sequence(kl="reward"), THETA, 2)
    close(scaled, vector(-0.242313, 0.018692, 0.223622), 1e-6)
    assert torch.cosine_similarity(scaled, GRAD_J, 0).item() < 0.985  # not parallel to the gradient of J


@pytest.mark.parametrize("size", [2, 3])
def test_k2_on_the_sequence_ratio_aims_at_the_tilt(size):
    loss = grpo_sequence(kl="k2", scale="none", baseline="leave-one-out", beta=0.6)
    close(expected_gradient(loss, THETA, size), -objective_gradient(THETA, S0, S0_REWARDS, 0.6))
    assert is_zero(expected_gradient(loss, tilt(S0, S0_REWARDS, 0.6), size))
    assert not is_zero(expected_gradient(loss, tilt(S0, S0_REWARDS, 0.66), size), 1e-2)
    # With the mean of the whole group the reward counts (1 - 1/G), so the temperature is beta G / (G - 1).
    loss = grpo_sequence(kl="k2", scale="none", beta=0.6)
    assert is_zero(expected_gradient(loss, tilt(S0, S0_REWARDS, 0.6 * size / (size - 1)), size))


@pytest.mark.parametrize("size", [2, 3])
def test_k3_on_the_sequence_ratio_aims_elsewhere(size):
    stationary, mu = k3_fixed_point(S0, S0_REWARDS, 1.0)
    assert mu == pytest.approx(2.353429, abs=PRINTED)
    close(stationary.exp(), vector(0.212456, 0.221659, 0.565885), PRINTED)
    target = tilt(S0, S0_REWARDS, 1.0)
    assert categorical.total_variation(stationary, target).item() == pytest.approx(0.070284, abs=PRINTED)
    loss = grpo_sequence(kl="k3", scale="none", baseline="leave-one-out")
    assert is_zero(expected_gradient(loss, stationary, size))
    assert not is_zero(expected_gradient(loss, target, size), 1e-2)
    loss = grpo_sequence(kl="k3", scale="none")
    assert is_zero(expected_gradient(loss, k3_fixed_point(S0, S0_REWARDS, size / (size - 1))[0], size))


def test_k1_in_the_loss_does_not_hold_the_policy_back():
    with_k1 = expected_gradient(grpo_sequence(kl="k1", scale="none", baseline="leave-one-out"), THETA, 2)
    theta = THETA.clone().requires_grad_()
    reward_alone = torch.autograd.grad(categorical.expectation(softmax_law(theta), S0_REWARDS), theta)[0]
    close(with_k1, -reward_alone)


@pytest.mark.parametrize("scale", ["group", "none"])
@pytest.mark.parametrize("baseline", ["group", "leave-one-out"])
@pytest.mark.parametrize("size", [2, 3, 4])
def test_normalised_together_the_tilt_stays(size, baseline, scale):
    loss = grpo_sequence(kl="reward", baseline=baseline, scale=scale)
    assert is_zero(expected_gradient(loss, tilt(S0, S0_REWARDS, 1.0), size))
    assert not is_zero(expected_gradient(loss, tilt(S0, S0_REWARDS, 1.1), size), 1e-3)
    # Also where every return is 0 but for rounding: a reward shifted by beta log Z.
    shifted = S0_REWARDS - categorical.log_partition(S0, S0_REWARDS, 1.0)
    loss = grpo_sequence(kl="reward", baseline=baseline, scale=scale, rewards=shifted)
    assert is_zero(expected_gradient(loss, tilt(S0, shifted, 1.0), size))


S1_REF = torch.stack([law(0.6, 0.4).repeat_interleave(2), torch.cat([law(0.7, 0.3), law(0.2, 0.8)])], -1)
S1_REWARDS = vector(0, 1, 2, 0.5)  # of 00, 01, 10, 11


def s1_tilt():
    return tilt(S1_REF.sum(-1), S1_REWARDS, 1.0)


def s1_token_law(step):
    """Fixed point of a token-wise KL term, backwards: each token as if Q, the mean reward after it, were its reward."""
    second = [step(law(*p), S1_REWARDS[2 * i : 2 * i + 2]) for i, p in enumerate([(0.7, 0.3), (0.2, 0.8)])]
    q = torch.stack([categorical.expectation(s, S1_REWARDS[2 * i : 2 * i + 2]) for i, s in enumerate(second)])
    first = step(law(0.6, 0.4), q)
    return torch.cat([first, *second])


TOKEN_LAWS = {
    "k2": (lambda p, q: tilt(p, q, 1.0), (0.191050, 0.222569, 0.309842, 0.276540)),
    "k3": (lambda p, q: k3_fixed_point(p, q, 1.0)[0], (0.183632, 0.222384, 0.337415, 0.256570)),
}


@pytest.mark.parametrize("kl", TOKEN_LAWS)
def test_token_level_kl_has_another_fixed_point(kl):
    step, printed = TOKEN_LAWS[kl]
    theta = s1_token_law(step)
    close(two_tokens(theta).sum(-1).exp(), vector(*printed), PRINTED)

    def loss(logps, y):
        return losses.grpo(logps, S1_REF[y], S1_REWARDS[y], 1.0, kl=kl, baseline="leave-one-out", scale="none")

    target = s1_tilt()
    close(target.exp(), vector(0.207100, 0.241267, 0.291481, 0.260152), PRINTED)
    first = target.view(2, 2).logsumexp(-1)
    theta_target = torch.cat([first, (target.view(2, 2) - first[:, None]).flatten()])
    close(two_tokens(theta_target).sum(-1), target)
    for size in (2, 3):
        assert is_zero(expected_gradient(loss, theta, size, two_tokens))
        assert not is_zero(expected_gradient(loss, theta_target, size, two_tokens), 1e-2)


def test_kl_in_the_reward_is_that_of_the_sequence():
    target = s1_tilt()
    first = target.view(2, 2).logsumexp(-1)
    theta = torch.cat([first, (target.view(2, 2) - first[:, None]).flatten()])

    def loss(logps, y):
        return losses.grpo(logps, S1_REF[y], S1_REWARDS[y], 1.0, kl="reward", baseline="leave-one-out", scale="none")

    assert is_zero(expected_gradient(loss, theta, 2, two_tokens))
    # At any policy it is RLOO on whole sequences, times nothing.
    theta = vector(0.3, -0.2, 0.1, 0.5, -0.4, 0)
    whole = expected_gradient(
        lambda logps, y: losses.rloo(logps.sum(-1), S1_REF.sum(-1)[y], S1_REWARDS[y], 1.0), theta, 2, two_tokens
    )
    close(expected_gradient(loss, theta, 2, two_tokens), whole)


def binary_force(q, size):
    """D_G(q) = E sqrt(X (1 - X)) / (q (1 - q)) with G X binomial."""
    shares = [k / size for k in range(size + 1)]
    chance = [math.comb(size, k) * q**k * (1 - q) ** (size - k) for k in range(size + 1)]
    return sum(c * math.sqrt(x * (1 - x)) for c, x in zip(chance, shares, strict=True)) / (q * (1 - q))


@pytest.mark.parametrize(("size", "printed"), [(2, 0.731059), (4, 0.841600), (8, 0.914236)])
def test_scaled_binary_rewards_have_the_fixed_point_of_the_theory(size, printed):
    q = brentq(lambda q: math.log(q / (1 - q)) - binary_force(q, size), 0.55, 0.9999, xtol=1e-14)
    assert q == pytest.approx(printed, abs=PRINTED)
    loss = grpo_sequence(ref=law(0.5, 0.5), rewards=vector(0, 1), kl="k2")
    assert is_zero(expected_gradient(loss, law(1 - q, q), size))
    if size > 2:  # with two draws the scaled reward is a rank, and of a binary reward the rank is the reward itself
        assert not is_zero(expected_gradient(loss, tilt(law(0.5, 0.5), vector(0, 1), 1.0), size), 1e-2)


# --- comparisons -----------------------------------------------------------------------------------------------------


def test_bradley_terry_by_hand():
    # d = log 3: sigma(d) = 3/4, so -log(3/4), -log(1/4), and half of each.
    d = math.log(3)
    close(losses.bradley_terry(vector(d, 1), vector(0, 1)), -law(3 / 4, 1 / 2))
    close(losses.bradley_terry(vector(d), vector(0), 0.0), -law(1 / 4))
    close(losses.bradley_terry(vector(d), vector(0), 0.5), -(law(3 / 4) + law(1 / 4)) / 2)
    close(losses.bradley_terry(vector(d), vector(0), 1), -law(3 / 4))  # an int is a number too
    # A certain comparison costs its margin, not infinity.
    close(losses.bradley_terry(vector(-1e4, 1e4), vector(0, 0)), vector(1e4, 0))


def test_bradley_terry_gradient(rng):
    chosen, rejected = (torch.randn(5, generator=rng, dtype=F64, requires_grad=True) for _ in range(2))
    labels = torch.rand(5, generator=rng, dtype=F64)
    found = torch.autograd.grad(losses.bradley_terry(chosen, rejected, labels).sum(), (chosen, rejected))
    expected = (torch.sigmoid(chosen - rejected) - labels).detach()  # d/dd [-l log sigma(d) - (1-l) log sigma(-d)]
    close(found[0], expected)
    close(found[1], -expected)


def test_dpo_by_hand():
    # pi = (1/2, 1/4), p = (1/4, 1/2), beta = 2: d = 2 log 2 - 2 log(1/2) = 4 log 2 = log 16, sigma(d) = 16/17.
    out = losses.dpo(law(0.5), law(0.25), law(0.25), law(0.5), 2.0)
    close(out, -law(16 / 17))
    # At the reference the margin is 0 whatever the pair: log 2.
    close(losses.dpo(law(0.5, 0.2), law(0.2, 0.5), law(0.5, 0.2), law(0.2, 0.5), 0.3), vector(2, 2).log())


@pytest.mark.parametrize("labels", ["none", "number", "tensor"])
def test_dpo_is_bradley_terry_with_implied_rewards(labels, rng):
    chosen, rejected, ref_chosen, ref_rejected = (-3 * torch.rand(6, generator=rng, dtype=F64) for _ in range(4))
    for x in (chosen, rejected):
        x.requires_grad_()
    extra = {"none": (), "number": (0.3,), "tensor": (torch.rand(6, generator=rng, dtype=F64),)}[labels]
    out = losses.dpo(chosen, rejected, ref_chosen, ref_rejected, 0.7, *extra)
    implied = losses.bradley_terry(0.7 * (chosen - ref_chosen), 0.7 * (rejected - ref_rejected), *extra)
    close(out, implied)
    found, expected = (torch.autograd.grad(x.sum(), (chosen, rejected)) for x in (out, implied))
    close(torch.stack(found), torch.stack(expected))
    # Turning the pair around is turning the label around.
    label = extra[0] if extra else 1.0
    close(out, losses.dpo(rejected, chosen, ref_rejected, ref_chosen, 0.7, 1 - label))


@pytest.mark.parametrize("label", [0.0, 0.2, 0.5, 1.0])
def test_soft_label_is_a_mixture_of_hard_ones(label, rng):
    d = torch.randn(4, generator=rng, dtype=F64)
    hard = [losses.bradley_terry(d, torch.zeros_like(d), x) for x in (1.0, 0.0)]
    close(losses.bradley_terry(d, torch.zeros_like(d), label), label * hard[0] + (1 - label) * hard[1])
    close(losses.bradley_terry(d, torch.zeros_like(d), vector(label)), label * hard[0] + (1 - label) * hard[1])


FIRST, SECOND, SHARE = torch.tensor([0, 1]), torch.tensor([1, 2]), vector(0.9, 0.1)


def population_dpo_gradient(theta, beta, ref=S0):
    theta = theta.clone().requires_grad_()
    logps = softmax_law(theta)
    labels = torch.sigmoid(S0_REWARDS[FIRST] - S0_REWARDS[SECOND])
    out = losses.dpo(logps[FIRST], logps[SECOND], ref[FIRST], ref[SECOND], beta, labels)
    return torch.autograd.grad((SHARE * out).sum(), theta)[0]


def test_dpo_is_least_at_the_tilt_whatever_the_pairs():
    target = tilt(S0, S0_REWARDS, 0.5)
    close(target.exp(), vector(0.036667, 0.162559, 0.800774), PRINTED)
    assert is_zero(population_dpo_gradient(target, 0.5))
    assert not is_zero(population_dpo_gradient(tilt(S0, S0_REWARDS, 1.0), 0.5), 1e-3)
    assert not is_zero(population_dpo_gradient(target, 0.55), 1e-3)
    # From the reference, the first step raises what wins: the gradient of the loss is negative at the best outcome.
    start = population_dpo_gradient(S0, 0.5)
    assert start[2] < 0 < start[0]


def test_count_wins_by_hand():
    first, second = torch.tensor([0, 0, 1, 2, 2]), torch.tensor([1, 1, 0, 1, 0], dtype=torch.int32)
    expected = torch.tensor([[0, 1, 1], [2, 0, 0], [0, 1, 0]], dtype=F64)
    # 0 beats 1; 1 beats 0; 1 beats 0; 2 beats 1; 0 beats 2.
    for labels in (torch.tensor([1, 0, 1, 1, 0]), vector(1, 0, 1, 1, 0), torch.tensor([1, 0, 1, 1, 0]).bool()):
        table = losses.count_wins(first, second, labels, 3)
        assert table.dtype == F64 and torch.equal(table, expected)
    assert losses.count_wins(first, second, torch.ones(5), 5).shape == (5, 5)
    assert losses.count_wins(first, second, torch.ones(5), 3).sum() == 5


def expected_wins(rewards, games):
    return games * torch.sigmoid(rewards[:, None] - rewards)


def test_fit_on_the_tree_of_the_theory():
    # 0 beats 1 three to one and 1 beats 2 two to one: log-odds log 3 and log 2, law (6, 2, 1) / 9.
    wins = torch.tensor([[0, 3, 0], [1, 0, 2], [0, 1, 0]], dtype=F64)
    rewards = losses.fit_bradley_terry(wins)
    close(rewards.diff(), -vector(math.log(3), math.log(2)))
    close(rewards.diff(), -vector(1.098612, 0.693147), PRINTED)
    close(torch.softmax(rewards, 0), vector(6, 2, 1) / 9)
    assert abs(rewards.sum().item()) <= 1e-12 and rewards.dtype == F64
    assert not torch.allclose(rewards.diff()[0], vector(-0.5), atol=0.1)  # not the gap of the win rates, 3/4 - 1/4


@st.composite
def tournaments(draw):
    """Rewards and a connected graph of games: a tree, and some more pairs."""
    k = draw(st.integers(2, 7))
    rewards = vector(*draw(st.lists(st.floats(-4, 4), min_size=k, max_size=k)))
    games = torch.zeros(k, k, dtype=F64)
    for i in range(1, k):
        games[i, draw(st.integers(0, i - 1))] = draw(st.sampled_from([0.01, 1.0, 30.0]))
    for i, j in draw(st.lists(st.tuples(st.integers(0, k - 1), st.integers(0, k - 1)), max_size=6)):
        games[i, j] += 1.0
    return rewards - rewards.mean(), games + games.T, draw(st.permutations(range(k)))


@pytest.mark.slow
@given(tournaments())
def test_fit_recovers_the_rewards_from_expected_wins(tournament):
    rewards, games, order = tournament
    wins = expected_wins(rewards, games)
    before = wins.clone()
    close(losses.fit_bradley_terry(wins), rewards, 1e-8)
    assert torch.equal(wins, before)
    close(losses.fit_bradley_terry(wins[order][:, order]), rewards[order], 1e-8)  # names do not matter
    close(losses.fit_bradley_terry(1e3 * wins), rewards, 1e-8)  # nor does the number of games


def test_fit_solves_the_score_equations(rng):
    """Real counts: each item wins as often as the fitted model says, and no other rewards are more likely."""
    wins = torch.randint(1, 9, (5, 5), generator=rng).double()
    rewards = losses.fit_bradley_terry(wins)
    games = (wins + wins.T).fill_diagonal_(0)
    close(expected_wins(rewards, games).sum(1), wins.clone().fill_diagonal_(0).sum(1), 1e-9)

    def likelihood(r):
        return (wins * torch.nn.functional.logsigmoid(r[:, None] - r)).sum()

    for _ in range(20):
        assert likelihood(rewards) > likelihood(rewards + 0.1 * torch.randn(5, generator=rng, dtype=F64))


def test_fit_of_counted_comparisons(rng):
    truth = vector(1, 0, -1)
    pairs = torch.tensor([[0, 1], [1, 2], [2, 0]]).repeat(4000, 1)
    won = torch.rand(len(pairs), generator=rng, dtype=F64) < torch.sigmoid(truth[pairs[:, 0]] - truth[pairs[:, 1]])
    rewards = losses.fit_bradley_terry(losses.count_wins(pairs[:, 0], pairs[:, 1], won, 3))
    # Fisher information of one reward gap is at least 4000 s (1 - s) at s = sigma(2): sd below .05. Six of them.
    close(rewards, truth, 0.3)
    assert rewards[0] > rewards[1] > rewards[2]


def test_fit_ignores_the_diagonal_and_takes_float32():
    wins = torch.tensor([[9, 3, 0], [1, 7, 2], [0, 1, 5]])
    clean = losses.fit_bradley_terry(wins.double().fill_diagonal_(0))
    assert torch.equal(losses.fit_bradley_terry(wins.double()), clean)
    out = losses.fit_bradley_terry(wins.float().requires_grad_())
    assert out.dtype == F64 and not out.requires_grad and torch.equal(out, clean)


@pytest.mark.parametrize(("often", "rarely"), [(1e6, 1e-6), (1e6, 1.0), (1.0, 1e-6)])
def test_fit_of_extreme_tables(often, rarely):
    """A path of items, each far better or far worse than the next: all gaps are +-log(often / rarely)."""
    gap = math.log(often / rarely)
    for signs in ([1], [1, 1, 1], [1, -1, 1]):
        k = len(signs) + 1
        wins = torch.zeros(k, k, dtype=F64)
        for i, sign in enumerate(signs):
            wins[i, i + 1], wins[i + 1, i] = (often, rarely) if sign > 0 else (rarely, often)
        close(losses.fit_bradley_terry(wins).diff(), -gap * vector(*signs), 1e-8)
    # One pair compared very often and one almost never.
    wins = torch.tensor([[0, often, 0], [often, 0, 2 * rarely], [0, rarely, 0]], dtype=F64)
    close(losses.fit_bradley_terry(wins).diff(), vector(0, -math.log(2)), 1e-8)


# Powers of ten of the number of wins, None for no game. Full Newton steps diverge on each of these but the last, where
# steps half as long again go to and fro.
# Groups that hardly ever meet, with the rewards in 120-digit arithmetic.
STRANGERS = [
    ([[0, 2, 0, 0], [1, 0, 1e-18, 0], [0, 1e-18, 0, 2], [0, 0, 1, 0]], [math.log(2), 0, 0, -math.log(2)]),
    ([[0, 2, 0, 0], [1, 0, 3e-18, 0], [0, 1e-18, 0, 2], [0, 0, 1, 0]], [1.242453, 0.549306, -0.549306, -1.242453]),
    ([[0, 2, 0, 0], [1, 0, 3e-15, 0], [0, 1e-15, 0, 2], [0, 0, 1, 0]], [1.242453, 0.549306, -0.549306, -1.242453]),
    (
        [[0, 0, 0, 1.2364e-2], [1.3659e-18, 0, 0, 0], [1.2874e-6, 1.7871e-3, 0, 6.1154e8], [0, 0, 399.89, 0]],
        [10.390278, -21.921697, 12.885860, -1.354441],
    ),
]


@pytest.mark.parametrize(("wins", "expected"), STRANGERS)
def test_groups_that_hardly_ever_met_are_told_apart(wins, expected):
    wins = torch.tensor(wins, dtype=F64)
    rewards = losses.fit_bradley_terry(wins)
    torch.testing.assert_close(rewards, vector(*expected), rtol=0, atol=1e-6)
    torch.testing.assert_close(losses.fit_bradley_terry(wins.flip(0, 1)), rewards.flip(0), rtol=0, atol=1e-12)


LOPSIDED = [
    [[None, -5, None, None], [1, None, 3, None], [None, None, None, 3], [-2, None, None, None]],
    [[None, -5, None, 2], [6, None, 1, 3], [-4, None, None, -4], [-5, None, -3, None]],
    [[None, 5, None, None], [None, None, -3, -4], [None, 2, None, 3], [-2, None, -4, None]],
    [[None, 4, -5, None], [None, None, 4, None], [-6, None, None, -5], [-4, None, 1, None]],
    [[None, 1, None, 2], [-2, None, -2, None], [None, -1, None, 0], [0, None, 2, None]],
]


@pytest.mark.parametrize("powers", LOPSIDED)
def test_fit_of_lopsided_tables(powers):
    """At the maximum each item beats expectations as much as it falls short of them."""
    wins = torch.tensor([[0 if x is None else 10**x for x in row] for row in powers], dtype=F64)
    rewards = losses.fit_bradley_terry(wins)
    surprise = wins * torch.sigmoid(rewards - rewards[:, None])  # wins of i against j that the model did not expect
    torch.testing.assert_close(surprise.sum(0), surprise.sum(1), rtol=1e-9, atol=0)


@pytest.mark.parametrize("chunk", [2, 9])
def test_fit_names_the_items_that_were_never_compared(chunk):
    wins = torch.zeros(chunk + 2, chunk + 2, dtype=F64)
    wins[:chunk, :chunk] = 1
    wins[chunk:, chunk:] = 1
    group = r"items \[0, 1\]" if chunk == 2 else r"items \[0, 1, 2, 3, 4, 5, 6, 7\] and 1 more"
    with pytest.raises(ValueError, match=f"wins must connect all items, got 2 groups .* one group is {group}$"):
        losses.fit_bradley_terry(wins)


@pytest.mark.parametrize(
    ("table", "unbeaten"),
    [
        ([[0, 3], [0, 0]], "[0]"),
        ([[0, 0], [3, 0]], "[1]"),
        ([[0, 2, 0], [0, 0, 1], [0, 1, 0]], "[0]"),  # 0 beat 1; 1 and 2 beat each other
        ([[0, 1, 1], [1, 0, 1], [0, 0, 0]], "[0, 1]"),  # 2 never won, so 0 and 1 never lost to the rest
        ([[0, 1, 0], [0, 0, 1], [0, 0, 0]], "[0]"),
    ],
)
def test_fit_names_the_items_that_never_lost(table, unbeaten):
    with pytest.raises(ValueError, match="wins must let every group of items lose .* reward is infinite") as caught:
        losses.fit_bradley_terry(torch.tensor(table, dtype=F64))
    assert f"got items {unbeaten} unbeaten" in str(caught.value)


# --- self-certainty --------------------------------------------------------------------------------------------------


def test_self_certainty_by_hand():
    # One position (3/4, 1/4): KL to uniform log 2 - H, KL from uniform -log 2 - (log 3/4 + log 1/4) / 2.
    conditionals = law(3 / 4, 1 / 4)[None]
    entropy = -(3 / 4 * math.log(3 / 4) + 1 / 4 * math.log(1 / 4))
    close(losses.self_certainty(conditionals).item(), math.log(2) - entropy)
    close(
        losses.self_certainty(conditionals, direction="uniform").item(),
        -math.log(2) - (math.log(3 / 4) + math.log(1 / 4)) / 2,
    )


@pytest.mark.parametrize("direction", ["policy", "uniform"])
def test_self_certainty_is_the_mean_divergence(direction, rng):
    logits = (2 * torch.randn(5, 3, 4, generator=rng, dtype=F64)).requires_grad_()
    conditionals = torch.log_softmax(logits, -1)
    flat = torch.full((4,), -math.log(4), dtype=F64)
    pair = (conditionals, flat) if direction == "policy" else (flat.expand_as(conditionals), conditionals)
    expected = categorical.kl(*pair).mean(-1)
    out = losses.self_certainty(conditionals, direction=direction)
    close(out, expected)
    found, wanted = (torch.autograd.grad(x.sum(), logits, retain_graph=True)[0] for x in (out, expected))
    close(found, wanted)


def test_self_certainty_directions_differ_and_default_to_the_policy_first():
    conditionals = law(0.9, 0.1).expand(2, 2)
    policy, uniform = (losses.self_certainty(conditionals, direction=d) for d in ("policy", "uniform"))
    assert torch.equal(losses.self_certainty(conditionals), policy) and uniform - policy > 0.1
    flat = torch.full((3, 5), -math.log(5), dtype=F64)
    for direction in ("policy", "uniform"):
        assert losses.self_certainty(flat, direction=direction).abs().item() <= 1e-15


def test_self_certainty_is_log_v_minus_mean_entropy():
    # First token (.7, .3), then (.9, .1) or (.4, .6): mean over strings of the mean over positions.
    first, after = law(0.7, 0.3), torch.stack([law(0.9, 0.1), law(0.4, 0.6)])
    strings = torch.stack([torch.stack([first, after[a]]) for a in (0, 0, 1, 1)])
    logps = (first[:, None] + after).flatten()
    u = losses.self_certainty(strings)
    entropy = -categorical.expectation(logps, logps)
    assert entropy.item() == pytest.approx(1.040326, abs=PRINTED)
    close(categorical.expectation(logps, u), math.log(2) - entropy / 2)
    assert categorical.expectation(logps, u).item() == pytest.approx(0.172984, abs=PRINTED)


@pytest.mark.parametrize("direction", ["policy", "uniform"])
def test_self_certainty_counts_unmasked_positions(direction, rng):
    conditionals = torch.log_softmax(torch.randn(4, 5, 3, generator=rng, dtype=F64), -1).requires_grad_()
    mask = torch.arange(5) < torch.tensor([1, 2, 4, 5])[:, None]
    out = losses.self_certainty(conditionals, direction=direction, mask=mask)
    for i, length in enumerate((1, 2, 4, 5)):
        close(out[i], losses.self_certainty(conditionals[i, :length], direction=direction))
    assert not bool(torch.autograd.grad(out.sum(), conditionals)[0][~mask].any())
    full = torch.ones(4, 5, dtype=torch.bool)
    close(
        losses.self_certainty(conditionals, direction=direction, mask=full),
        losses.self_certainty(conditionals, direction=direction),
    )


def test_self_certainty_where_a_symbol_is_excluded():
    logits = torch.stack([vector(0.3, -math.inf, 1), vector(0, 1, 2)]).requires_grad_()
    conditionals = torch.log_softmax(logits, -1)
    out = losses.self_certainty(conditionals)
    p = torch.softmax(vector(0.3, 1), 0)
    flat = -math.log(3)
    by_hand = (p * (p.log() - flat)).sum() + categorical.kl(conditionals[1], torch.full((3,), flat, dtype=F64))
    close(out, by_hand / 2)
    assert bool(torch.autograd.grad(out, logits)[0].isfinite().all())
    # From uniform it is infinite, unless the position does not count.
    conditionals = conditionals.detach()
    assert losses.self_certainty(conditionals, direction="uniform").item() == math.inf
    counted = losses.self_certainty(conditionals, direction="uniform", mask=torch.tensor([False, True]))
    close(counted, losses.self_certainty(conditionals[1:], direction="uniform"))


# --- weighted likelihood ---------------------------------------------------------------------------------------------


def test_weighted_likelihood_by_hand():
    # Weights 1, 3, 0: normalised 1/4, 3/4, 0; over N = 3 they are 1/3, 1, 0.
    logps, log_weights = law(0.5, 0.25, 0.125), law(1, 3, 0)
    close(losses.weighted_likelihood(logps, log_weights), vector(math.log(2) / 4 + 3 * math.log(4) / 4).squeeze())
    out = losses.weighted_likelihood(logps, log_weights, self_normalized=False)
    close(out, vector(math.log(2) / 3 + math.log(4)).squeeze())


@pytest.mark.parametrize("self_normalized", [True, False])
def test_weighted_likelihood_gradient(self_normalized, rng):
    logps = (-torch.rand(2, 4, generator=rng, dtype=F64)).requires_grad_()
    log_weights = torch.randn(2, 4, generator=rng, dtype=F64, requires_grad=True)
    out = losses.weighted_likelihood(logps, log_weights, self_normalized=self_normalized).sum()
    found = torch.autograd.grad(out, (logps, log_weights), allow_unused=True)
    w = log_weights.detach().exp()
    close(found[0], -(w / w.sum(-1, keepdim=True) if self_normalized else w / 4))
    assert found[1] is None


def test_weights_beyond_float64_are_normalised_in_log_space():
    logps = law(0.5, 0.25)
    for shift in (-2000.0, 2000.0):
        close(losses.weighted_likelihood(logps, law(1, 3) + shift), losses.weighted_likelihood(logps, law(1, 3)))


def pool_gradient(theta, n, self_normalized, beta=1.0):
    """Mean gradient at fresh pools of N draws of the reference."""
    theta = theta.clone().requires_grad_()
    pools = all_groups(3, n)
    out = losses.weighted_likelihood(
        softmax_law(theta)[pools], (S0_REWARDS / beta)[pools], self_normalized=self_normalized
    )
    return torch.autograd.grad((S0[pools].sum(-1).exp() * out).sum(), theta)[0]


@pytest.mark.parametrize("n", [2, 3])
def test_what_weighted_likelihood_is_least_at(n):
    target, selected = tilt(S0, S0_REWARDS, 1.0), soft_best_of_n_law(S0, S0_REWARDS, 1.0, n)
    if n == 2:
        close(selected.exp(), vector(0.354523, 0.341591, 0.303886), PRINTED)
    assert is_zero(pool_gradient(target, n, False))
    assert not is_zero(pool_gradient(selected, n, False), 1e-2)
    assert is_zero(pool_gradient(selected, n, True))
    assert not is_zero(pool_gradient(target, n, True), 1e-2)
    assert not is_zero(pool_gradient(target, n, False, beta=1.1), 1e-2)


# --- every loss: batches, dtypes, inputs -----------------------------------------------------------------------------

LABELS = vector(0, 0.25, 0.5, 1, 0.75)  # every dtype holds these
MASK = torch.tensor([[True, True, False], [True, False, False], [True] * 3, [False, True, True]])

# Name: a call, and the shapes of its arguments behind the batch dimension. "l" is a log-probability, "x" any number,
# "c" conditionals.
CALLS = {
    "kl_estimators": (lambda a, b: torch.stack(losses.kl_estimators(a, b), -1), "l5 l5"),
    "policy_gradient": (lambda a, b, r: losses.policy_gradient(a, b, r, 0.7, baseline=0.2), "l5 l5 x5"),
    "rloo": (lambda a, b, r: losses.rloo(a, b, r, 0.7), "l5 l5 x5"),
    "grpo": (lambda a, b, r: losses.grpo(a, b, r, 0.7), "l4,3 l4,3 x4"),
    "grpo, other flags": (
        lambda a, b, r, old: losses.grpo(
            a,
            b,
            r,
            0.7,
            kl="reward",
            baseline="leave-one-out",
            scale="none",
            mask=MASK.expand(a.shape),
            old_logps=old,
        ),
        "l4,3 l4,3 x4 l4,3",
    ),
    "bradley_terry": (lambda a, b: losses.bradley_terry(a, b, LABELS.to(a.dtype)), "x5 x5"),
    "dpo": (lambda a, b, c, d: losses.dpo(a, b, c, d, 0.7, LABELS.to(a.dtype)), "l5 l5 l5 l5"),
    "self_certainty": (lambda c: losses.self_certainty(c), "c3,4"),
    "self_certainty, other flags": (
        lambda c: losses.self_certainty(c, direction="uniform", mask=MASK[0].expand(c.shape[:-1])),
        "c3,4",
    ),
    "weighted_likelihood": (lambda a, w: losses.weighted_likelihood(a, w), "l5 x5"),
    "weighted_likelihood, other flags": (
        lambda a, w: losses.weighted_likelihood(a, w, self_normalized=False),
        "l5 x5",
    ),
}


def arguments(shapes, batch, rng):
    made = []
    for kind, *shape in ([s[0], *map(int, s[1:].split(","))] for s in shapes.split()):
        x = torch.randn(*batch, *shape, generator=rng, dtype=F64)
        made.append({"l": -x.abs(), "x": x, "c": torch.log_softmax(x, -1)}[kind])
    return made


@pytest.mark.parametrize("name", CALLS)
def test_batch_equals_loop(name, rng):
    call, shapes = CALLS[name]
    inputs = arguments(shapes, (2, 3), rng)
    before = [x.clone() for x in inputs]
    out = call(*inputs)
    assert all(torch.equal(x, y) for x, y in zip(inputs, before, strict=True))
    for i, j in itertools.product(range(2), range(3)):
        close(out[i, j], call(*(x[i, j] for x in inputs)), 1e-14)


@pytest.mark.parametrize("name", CALLS)
def test_dtype_follows_the_inputs(name, rng):
    call, shapes = CALLS[name]
    inputs = arguments(shapes, (), rng)
    out, small = call(*inputs), call(*(x.float() for x in inputs))
    assert out.dtype == F64 and small.dtype == torch.float32
    torch.testing.assert_close(small.double(), out, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", CALLS)
def test_a_narrow_dtype_costs_its_own_rounding_and_no_more(name, dtype, rng):
    """Values and gradients are those of float64 at the rounded inputs, rounded once more."""
    call, shapes = CALLS[name]
    narrow = [x.to(dtype).requires_grad_() for x in arguments(shapes, (), rng)]
    wide = [x.detach().double().requires_grad_() for x in narrow]
    found = call(*narrow)
    # Rounded conditionals sum to one only at the tolerance of their dtype; they are normalised again in float64.
    expected = call(*(x - x.detach().logsumexp(-1, keepdim=True) if "c" in shapes else x for x in wide))
    assert found.dtype == dtype
    torch.testing.assert_close(found, expected.to(dtype), rtol=torch.finfo(dtype).eps, atol=1e-15)
    gradients = [torch.autograd.grad(out.sum(), x, allow_unused=True) for out, x in ((found, narrow), (expected, wide))]
    for a, b in zip(*gradients, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b.to(dtype), rtol=torch.finfo(dtype).eps, atol=1e-15)


@pytest.fixture(params=[torch.float16, torch.bfloat16, F64])
def default_dtype(request):
    before = torch.get_default_dtype()
    torch.set_default_dtype(request.param)
    yield
    torch.set_default_dtype(before)


@pytest.mark.usefixtures("default_dtype")
@pytest.mark.parametrize("name", CALLS)
def test_the_default_dtype_plays_no_part(name):
    call, shapes = CALLS[name]
    inputs = arguments(shapes, (), torch.Generator().manual_seed(1))
    out = call(*inputs)
    torch.set_default_dtype(torch.float32)
    assert out.dtype == F64 and torch.equal(out, call(*inputs))


@pytest.mark.usefixtures("default_dtype")
def test_comparisons_do_not_depend_on_the_default_dtype():
    first, second = torch.tensor([0, 1, 1, 2]), torch.tensor([1, 0, 2, 1])
    wins = losses.count_wins(first, second, torch.ones(4), 3)
    assert wins.dtype == F64 and wins.sum() == 4
    close(losses.fit_bradley_terry(torch.tensor([[0, 3], [1, 0]]).float()).diff(), -vector(math.log(3)))
    close(losses.bradley_terry(vector(math.log(3)), vector(0), 1 / 3), -(law(3 / 4) + 2 * law(1 / 4)) / 3)


@pytest.mark.parametrize("name", CALLS)
def test_an_empty_batch_gives_an_empty_result(name, rng):
    call, shapes = CALLS[name]
    for batch in ((0,), (2, 0)):
        for dtype in (F64, torch.float16):
            inputs = [x.to(dtype) for x in arguments(shapes, batch, rng)]
            full = call(*(x.to(dtype) for x in arguments(shapes, (1,), rng)))
            out = call(*inputs)
            assert out.shape == (*batch, *full.shape[1:]) and out.dtype == dtype


# --- numbers that are too large, too small or not there --------------------------------------------------------------

# Mean 3.125 and standard deviation sqrt(.078125): advantages -.4472, .4472, 1.3416, -1.3416.
NARROW = (3, 3.25, 3.5, 2.75)
SCALED = (vector(*NARROW) - 3.125) / math.sqrt(0.078125)
DTYPES = [torch.bfloat16, torch.float16, torch.float32, F64]


def advantages(loss, rewards, dtype=F64):
    """What a loss makes of the rewards of a group, from its gradient at draws of probability e^-1 under both laws."""
    logps = torch.full((len(rewards),), -1.0, dtype=dtype, requires_grad=True)
    out = loss(logps, logps.detach(), rewards.to(dtype))
    assert out.dtype == dtype
    return -len(rewards) * torch.autograd.grad(out, logps)[0].double()


def grpo_of(**flags):
    return lambda logps, ref, rewards: losses.grpo(logps[:, None], ref[:, None], rewards, 1.0, **flags)


def rloo_of(logps, ref, rewards):
    return losses.rloo(logps, ref, rewards, 1.0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_statistics_of_narrow_rewards(dtype):
    eps = torch.finfo(dtype).eps
    rewards, centred = vector(*NARROW), vector(*NARROW) - 3.125
    for kl in ("reward", "k1", "k2", "k3"):
        extra = 1.0 if kl == "k1" else 0.0  # its own gradient
        close(advantages(grpo_of(kl=kl), rewards, dtype), SCALED - extra, 2 * eps)
        of_others = advantages(grpo_of(kl=kl, baseline="leave-one-out"), rewards, dtype)
        close(of_others, SCALED * 4 / 3 - extra, 2 * eps)
        close(advantages(grpo_of(kl=kl, scale="none"), rewards, dtype), centred - extra, 2 * eps)
    close(advantages(rloo_of, rewards, dtype), centred * 4 / 3, 2 * eps)
    close(advantages(grpo_of(), rewards, dtype), vector(-0.447, 0.447, 1.342, -1.342), 1e-3 + 2 * eps)


@pytest.mark.parametrize("kl", ["reward", "k2"])
@pytest.mark.parametrize("level", [0.0, 1.0, -1e6, 1e15])
@pytest.mark.parametrize("size", [1e-300, 1e-100, 1.0, 1e100, 1e300])
def test_advantages_know_neither_level_nor_scale(size, level, kl):
    if level and size != 1.0:
        return  # differences that float64 does not hold
    rewards = level + size * vector(0, 1, 3, 0)
    close(advantages(grpo_of(kl=kl), rewards), vector(-1, 0, 2, -1) / math.sqrt(1.5), 1e-12)
    close(advantages(rloo_of, rewards) / size, vector(-4, 0, 8, -4) / 3, 1e-12)


@pytest.mark.parametrize("reward", [0.1, 1e6 + 0.1, -1 / 3, 1e300])
@pytest.mark.parametrize("size", [3, 7])
def test_equal_rewards_have_no_advantage_over_the_others(size, reward):
    for dtype in (torch.float32, F64):
        if reward < 1e300 or dtype == F64:
            assert not bool(advantages(rloo_of, torch.full((size,), reward, dtype=F64), dtype).any())


def test_a_large_group_of_half_precision_rewards():
    # The sum of the rewards, 1.3e7, is more than float16 holds.
    rewards = torch.where(torch.arange(2**16) % 2 == 0, 100.0, 300.0).half()
    signs = torch.where(torch.arange(2**16) % 2 == 0, -1.0, 1.0)
    logps = torch.full((2**16,), -1.0, requires_grad=True, dtype=torch.float32)
    out = losses.grpo(logps[:, None], logps.detach()[:, None], rewards, 1.0)
    close(-(2**16) * torch.autograd.grad(out, logps)[0], signs, 1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
def test_long_sequences_do_not_drown_the_rewards(dtype):
    """With kl "reward", where the policy is still the reference, the rewards decide, however long the text."""
    logps = torch.full((4, 3000), -8.0, dtype=dtype, requires_grad=True)
    rewards = vector(*NARROW).to(dtype)
    out = losses.grpo(logps, logps.detach(), rewards, 0.5, kl="reward")
    close(-4 * torch.autograd.grad(out, logps)[0][:, 0].double(), SCALED, 2 * torch.finfo(dtype).eps)


def test_rounding_of_returns_is_no_advantage(rng):
    """At the tilt the returns agree but for the rounding of r - beta log(pi / p)."""
    for _ in range(20):
        ref, rewards = random_law(5, rng), torch.randn(5, generator=rng, dtype=F64)
        logps = tilt(ref, rewards, 0.7).requires_grad_()
        out = losses.grpo(logps[:, None], ref[:, None], rewards, 0.7, kl="reward")
        assert is_zero(torch.autograd.grad(out, logps)[0])


def test_rewards_whose_differences_overflow_are_refused():
    rewards = vector(1.7e308, -1.7e308, 0)
    logps = law(0.2, 0.3, 0.5)
    text = "advantages from rewards must be finite, got . of 3"
    with pytest.raises(ValueError, match=text):
        losses.rloo(logps, logps, rewards, 1.0)
    for scale in ("group", "none"):
        with pytest.raises(ValueError, match=text):
            losses.grpo(logps[:, None], logps[:, None], rewards, 1.0, scale=scale)
    with pytest.raises(ValueError, match=text):
        losses.policy_gradient(logps, logps, rewards, 1.0, baseline=1.7e308)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("far", [20.0, 100.0, 1000.0, 1e4])
def test_far_beyond_the_clip(far, dtype):
    """A token that has gone far enough is a constant; one that has gone astray costs what its ratio says."""
    far = torch.tensor(far, dtype=dtype).item()
    logps = torch.tensor([[-1.0], [-1.0], [-1.0]], dtype=dtype, requires_grad=True)
    old = torch.tensor([[-1 - far], [-1.0], [-1.0]], dtype=dtype)
    far = (logps[0] - old[0]).item()

    def of(*rewards):
        rewards = torch.tensor(rewards, dtype=dtype)
        out = losses.grpo(logps, logps.detach(), rewards, 1.0, scale="none", old_logps=old, kl="reward")
        return out.double(), torch.autograd.grad(out, logps)[0].flatten().double()

    eps = torch.finfo(dtype).eps
    out, gradient = of(2, -1, -1)  # the first is better than the others: 1.2 * 2 in place of e^far * 2
    close(out, vector(-(2.4 - 2) / 3).squeeze(), 2 * eps)
    close(gradient, vector(0, 1, 1) / 3, 2 * eps)
    out, gradient = of(0, 1, -1)  # neither better nor worse
    close(out, vector(0).squeeze(), 2 * eps)
    close(gradient, vector(0, -1, 1) / 3, 2 * eps)
    out, gradient = of(-2, 1, 1)  # worse
    ratio = math.exp(far) if far < 700 else math.inf
    expected = vector((2 * ratio - 2) / 3).to(dtype).double().squeeze()
    close(out, expected, 2 * eps)
    close(gradient, vector(2 * ratio / 3, -1 / 3, -1 / 3).to(dtype).double(), 2 * eps)
    assert not bool(gradient.isnan().any())


def test_a_clip_above_one_has_no_lower_end():
    old = law(0.4, 0.4)[:, None]
    logps = torch.stack([old[0] - 9, old[1]]).requires_grad_()
    for clip, expected in ((0.999, 0.0), (1.0, math.exp(-9)), (3.0, math.exp(-9))):
        out = losses.grpo(logps, old, vector(-1, 1), 1.0, kl="k2", scale="none", old_logps=old, clip=clip)
        # The advantage is -1, and k2 adds beta (log rho) d log rho: gradient of the loss (ratio - 9) / 2.
        close(torch.autograd.grad(out, logps)[0][0], vector((expected - 9) / 2))


@pytest.mark.parametrize(
    ("dtype", "fits"), [(torch.float16, 10), (torch.bfloat16, 88), (torch.float32, 88), (F64, 709)]
)
def test_k3_is_infinite_where_it_does_not_fit(dtype, fits):
    for far in (fits, 2 * fits):
        logps = torch.tensor([-1.0 - far, -0.5], dtype=dtype, requires_grad=True)
        ref = torch.tensor([-1.0, -0.5], dtype=dtype, requires_grad=True)
        k1, k2, k3 = losses.kl_estimators(logps, ref)
        found = torch.autograd.grad(k3.sum(), (logps, ref))
        for x in (k1, k2):
            assert bool(x.isfinite().all())
            assert all(bool(g.isfinite().all()) for g in torch.autograd.grad(x.sum(), (logps, ref), retain_graph=True))
        log_rho = (ref - logps)[0].double().item()
        size = math.exp(log_rho) if far == fits else math.inf
        assert k3[0].item() == pytest.approx(size - 1 - log_rho, rel=torch.finfo(dtype).eps)
        for g, sign in zip(found, (-1, 1), strict=True):
            assert g[0].item() == pytest.approx(sign * (size - 1), rel=torch.finfo(dtype).eps) and g[1] == 0
        out = losses.grpo(logps[:, None], ref[:, None], ref.detach(), 1.0)
        assert out.item() > 0 and math.isinf(out.item()) == (far > fits)
        assert not bool(torch.autograd.grad(out, logps)[0].isnan().any())


def test_k2_keeps_its_gradient_where_it_does_not_fit():
    logps = torch.tensor([-500.0], dtype=torch.float16, requires_grad=True)
    k2 = losses.kl_estimators(logps, torch.zeros_like(logps)).k2
    assert k2.item() == math.inf and torch.autograd.grad(k2, logps)[0].item() == -500


@pytest.mark.parametrize("junk", [math.nan, math.inf, -math.inf, 1.0, 1e30])
@pytest.mark.parametrize("kl", ["reward", "k1", "k2", "k3"])
def test_masked_tokens_may_hold_anything(kl, junk, rng):
    logps, ref, rewards, mask, old = grpo_inputs(rng)
    old = old.clamp(max=-0.01)
    clean = losses.grpo(logps, ref, rewards, 0.6, kl=kl, mask=mask, old_logps=old)
    expected = torch.autograd.grad(clean, logps)[0]
    dirty = [torch.where(mask, x.detach(), junk) for x in (logps, ref, old)]
    for x in dirty:
        x.requires_grad_()
    out = losses.grpo(*dirty[:2], rewards, 0.6, kl=kl, mask=mask, old_logps=dirty[2])
    found = torch.autograd.grad(out, dirty, allow_unused=True)
    assert torch.equal(out, clean) and torch.equal(found[0], expected) and found[2] is None
    assert found[1] is None or not bool(found[1][~mask].any())
    # What counts is still looked at.
    for i, name in enumerate(("logps", "ref_logps", "old_logps")):
        spoilt = [x.detach() for x in (logps, ref, old)]
        spoilt[i] = spoilt[i].index_fill(1, torch.tensor([0]), junk)
        with pytest.raises(ValueError, match=f"^{name} must be"):
            losses.grpo(*spoilt[:2], rewards, 0.6, kl=kl, mask=mask, old_logps=spoilt[2])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("junk", [math.nan, math.inf, -math.inf, 1.0])
@pytest.mark.parametrize("direction", ["policy", "uniform"])
def test_masked_positions_may_hold_anything(direction, junk, dtype, rng):
    conditionals = torch.log_softmax(torch.randn(4, 3, 5, generator=rng, dtype=F64), -1).to(dtype).requires_grad_()
    clean = losses.self_certainty(conditionals, direction=direction, mask=MASK)
    expected = torch.autograd.grad(clean.sum(), conditionals)[0]
    dirty = torch.where(MASK[..., None], conditionals.detach(), junk).requires_grad_()
    out = losses.self_certainty(dirty, direction=direction, mask=MASK)
    assert torch.equal(out, clean) and torch.equal(torch.autograd.grad(out.sum(), dirty)[0], expected)
    with pytest.raises(ValueError, match="^conditionals must be log-probabilities that sum to 1"):
        losses.self_certainty(dirty, direction=direction)


@pytest.mark.parametrize("junk", [math.nan, math.inf, -math.inf, 1.0])
@pytest.mark.parametrize("self_normalized", [True, False])
def test_a_dropped_sample_may_hold_anything(self_normalized, junk):
    log_weights = law(1, 0, 3)
    clean = vector(-1, -2, -3).requires_grad_()
    dirty = vector(-1, junk, -3).requires_grad_()
    outs = [losses.weighted_likelihood(x, log_weights, self_normalized=self_normalized) for x in (clean, dirty)]
    found, expected = (torch.autograd.grad(out, x)[0] for out, x in zip(outs[::-1], (dirty, clean), strict=True))
    assert torch.equal(*outs) and torch.equal(found, expected) and found[1] == 0
    with pytest.raises(ValueError, match="^logps must be"):
        losses.weighted_likelihood(dirty, law(1, 1, 3), self_normalized=self_normalized)


def test_weights_that_float64_cannot_hold():
    logps = law(0.5, 0.25)
    with pytest.raises(ValueError, match=r"^exp\(log_weights\) must be finite, got 1 of 2"):
        losses.weighted_likelihood(logps, vector(0, 800), self_normalized=False)
    # In half precision 100,000 samples of weight 1 have a mean, and so have weights above 65504.
    half = torch.full((100_000,), -2.0).half()
    for self_normalized in (True, False):
        assert losses.weighted_likelihood(half, torch.zeros_like(half), self_normalized=self_normalized).item() == 2
    out = losses.weighted_likelihood(half[:2] / 2**15, torch.full((2,), 12.0).half(), self_normalized=False)
    assert out.item() == pytest.approx(math.exp(12) / 2**14, rel=1e-3)


@pytest.mark.parametrize("direction", ["policy", "uniform"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_self_certainty_of_a_large_vocabulary(dtype, direction):
    """Uniform over 151,936 symbols: certainty 0, though the logarithm itself is rounded."""
    flat = torch.full((2, 151_936), -math.log(151_936), dtype=dtype)
    out = losses.self_certainty(flat, direction=direction)
    assert out.dtype == dtype and abs(out.item()) <= 1e-10


@pytest.mark.parametrize("dtype", DTYPES)
def test_margins_beyond_the_dtype(dtype):
    big = torch.tensor([4e4, -4e4], dtype=dtype)
    chosen, rejected = big.clone().requires_grad_(), (-big).requires_grad_()
    expected = torch.stack([torch.zeros((), dtype=dtype), (-2 * big[1].double()).to(dtype)])
    for labels, wanted, slope in (
        (1.0, expected, (0, -1)),
        (0, expected.flip(0), (1, 0)),
        (big * 0 + 1, expected, (0, -1)),
    ):
        out = losses.bradley_terry(chosen, rejected, labels)
        assert torch.equal(out, wanted)
        found = torch.autograd.grad(out.sum(), (chosen, rejected))
        assert found[0].tolist() == list(slope) and found[1].tolist() == [-x for x in slope]
    logps = torch.tensor([-0.5], dtype=dtype)
    out = losses.dpo(logps, logps - 4, logps - 4, logps, 1e4)  # d = 8e4
    assert out.item() == 0
    assert losses.dpo(logps - 4, logps, logps, logps - 4, 1e4).item() == torch.tensor(8e4).to(dtype).item()


def test_margins_that_overflow_are_refused():
    with pytest.raises(ValueError, match="the margin d must be finite, got 1 of 1"):
        losses.bradley_terry(vector(1.7e308), vector(-1.7e308))
    with pytest.raises(ValueError, match="the margin d must be finite, got 1 of 1"):
        losses.dpo(vector(-1), vector(-9), vector(-9), vector(-1), 1e308)


@pytest.mark.parametrize("size", [5e-324, 1e-300, 1e-150, 1e150, 1e300, 1.7e308])
def test_fit_at_any_scale(size):
    close(losses.fit_bradley_terry(torch.tensor([[0, size], [size, 0]], dtype=F64)), vector(0, 0))
    if size > 1e-300:
        wins = torch.tensor([[0, size, 0], [size / 3, 0, size], [0, size / 2, 0]], dtype=F64)
        close(losses.fit_bradley_terry(wins).diff(), -vector(math.log(3), math.log(2)), 1e-11)


def test_fit_of_entries_that_are_too_far_apart():
    rewards = losses.fit_bradley_terry(torch.tensor([[0, 1e150], [1e-149, 0]], dtype=F64))
    close(rewards.diff(), -vector(299 * math.log(10)), 1e-10)
    with pytest.raises(
        ValueError, match="wins must be 0 or within a factor 1e300 of each other, got 1e-200 and 1e.200"
    ):
        losses.fit_bradley_terry(torch.tensor([[0, 1e200], [1e-200, 0]], dtype=F64))


@pytest.mark.parametrize("dtype", DTYPES)
def test_fit_takes_every_dtype(dtype):
    wins = torch.tensor([[0, 3, 0], [1, 0, 2], [0, 1, 0]], dtype=dtype)
    close(losses.fit_bradley_terry(wins).diff(), -vector(math.log(3), math.log(2)))


# --- grpo without a reference ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kl", ["reward", "k1", "k2", "k3"])
def test_grpo_without_kl_needs_no_reference(kl, rng):
    logps, ref, rewards, mask, old = grpo_inputs(rng)
    old = old.clamp(max=-0.01)
    flags = {"kl": kl, "mask": mask, "old_logps": old}
    out = losses.grpo(logps, None, rewards, 0, **flags)
    expected = slow_grpo(logps, logps.detach(), rewards, 0.0, kl, "group", "group", mask, old, 0.2)
    close(out, expected)
    gradient = torch.autograd.grad(out, logps, retain_graph=True)[0]
    close(gradient, torch.autograd.grad(expected, logps)[0])
    # A reference that is given plays no part, also where k3 overflows.
    for unused in (ref, ref - 1e4, logps.detach() - 1e4):
        other = losses.grpo(logps, unused, rewards, 0.0, **flags)
        assert torch.equal(other, out) and torch.equal(torch.autograd.grad(other, logps)[0], gradient)
    far = (logps.detach() - 1e4).requires_grad_()
    assert bool(torch.autograd.grad(losses.grpo(far, ref, rewards, 0.0, kl=kl), far)[0].isfinite().all())
    # It is where the loss goes as beta goes to 0.
    close(losses.grpo(logps, ref, rewards, 1e-14, **flags), out, 1e-10)
    with pytest.raises(TypeError, match="^ref_logps must be a floating-point torch.Tensor, got NoneType"):
        losses.grpo(logps, None, rewards, 1e-300, **flags)
    with pytest.raises(ValueError, match="^ref_logps must be finite"):
        losses.grpo(logps, ref - math.inf, rewards, 0.0, **flags)


@pytest.mark.parametrize("kl", ["reward", "k1", "k2", "k3"])
def test_without_kl_no_square_of_a_log_probability_overflows(kl):
    far, near = (vector(logp, -1)[:, None].requires_grad_() for logp in (-1.7e308, -2))
    out, expected = (losses.grpo(x, None, vector(1, 0), 0, kl=kl) for x in (far, near))
    assert torch.equal(out, expected)
    assert torch.equal(torch.autograd.grad(out, far)[0], torch.autograd.grad(expected, near)[0])


# --- numbers, lists and arrays ---------------------------------------------------------------------------------------


def test_numbers_of_numpy_are_numbers():
    logps, ref, rewards = law(0.2, 0.3, 0.5), law(0.3, 0.3, 0.4), vector(0, 1, 2)
    for number in (np.float32(0.5), np.float64(0.5)):
        close(losses.policy_gradient(logps, ref, rewards, number), losses.policy_gradient(logps, ref, rewards, 0.5))
        close(
            losses.policy_gradient(logps, ref, rewards, 1.0, baseline=number),
            losses.policy_gradient(logps, ref, rewards, 1.0, baseline=0.5),
        )
        close(losses.rloo(logps, ref, rewards, number), losses.rloo(logps, ref, rewards, 0.5))
        tokens = logps[:, None], ref[:, None]
        close(
            losses.grpo(*tokens, rewards, number, old_logps=tokens[1], clip=number),
            losses.grpo(*tokens, rewards, 0.5, old_logps=tokens[1], clip=0.5),
        )
        pairs = logps, ref, ref, logps
        close(losses.dpo(*pairs, number, number), losses.dpo(*pairs, 0.5, 0.5))
    close(losses.rloo(logps, ref, rewards, np.int64(2)), losses.rloo(logps, ref, rewards, 2))
    close(losses.bradley_terry(rewards, logps, np.int64(1)), losses.bradley_terry(rewards, logps))
    first = torch.tensor([0, 1])
    assert losses.count_wins(first, 1 - first, first, np.int8(12)).shape == (12, 12)  # 144 is more than int8 holds
    assert torch.equal(
        losses.count_wins(first, 1 - first, first, np.int64(3)), losses.count_wins(first, 1 - first, first, 3)
    )


@pytest.mark.parametrize("value", [[1.0, 0.0, 1.0], (1.0, 0.0, 1.0), np.ones(3), np.ones(1), "1", None])
def test_lists_and_arrays_are_refused_by_name(value):
    kind = type(value).__name__
    logps, rewards = law(0.2, 0.3, 0.5), vector(0, 1, 2)
    either = f"must be a number or a torch.Tensor, got {kind}"
    with pytest.raises(TypeError, match=f"^labels {either}"):
        losses.bradley_terry(rewards, logps, value)
    with pytest.raises(TypeError, match=f"^labels {either}"):
        losses.dpo(logps, logps, logps, logps, 1.0, value)
    with pytest.raises(TypeError, match=f"^baseline {either}"):
        losses.policy_gradient(logps, logps, rewards, 1.0, baseline=value)
    with pytest.raises(TypeError, match=f"^labels must be a torch.Tensor, got {kind}"):
        losses.count_wins(torch.arange(3), torch.arange(3).flip(0), value, 3)
    if value is not None:
        mask = f"^mask must be a boolean torch.Tensor, got {kind}"
        with pytest.raises(TypeError, match=mask):
            losses.grpo(logps[:, None], logps[:, None], rewards, 1.0, mask=value)
        with pytest.raises(TypeError, match=mask):
            losses.self_certainty(logps.expand(3, 3), mask=value)


def test_no_tokens_and_no_samples_are_refused():
    none = torch.zeros(3, 0, dtype=F64)
    with pytest.raises(ValueError, match=r"^logps must have a last dimension of size >= 1, got shape \(3, 0\)"):
        losses.grpo(none, none, vector(0, 1, 2), 1.0)
    with pytest.raises(ValueError, match=r"^logps must have a last dimension of size >= 1, got shape \(3, 0\)"):
        losses.weighted_likelihood(none, none)


# --- errors ----------------------------------------------------------------------------------------------------------

L3 = law(0.2, 0.3, 0.5)
R3 = vector(0, 1, 2)
TOKENS = L3[:, None]
WORD = torch.tensor([1, 2, 3])


@pytest.mark.parametrize(
    "call",
    [
        lambda a, b: losses.kl_estimators(a, b),
        lambda a, b: losses.policy_gradient(a, b, R3, 1.0),
        lambda a, b: losses.rloo(a, b, R3, 1.0),
        lambda a, b: losses.grpo(
            a[:, None] if isinstance(a, torch.Tensor) else a, b[:, None] if isinstance(b, torch.Tensor) else b, R3, 1.0
        ),
    ],
    ids=["kl", "policy_gradient", "rloo", "grpo"],
)
@pytest.mark.parametrize("swap", [False, True])
@pytest.mark.parametrize(
    ("bad", "error", "text"),
    [
        (WORD, TypeError, "must be a floating-point torch.Tensor, got a torch.int64 tensor"),
        ([0.0], TypeError, "must be a floating-point torch.Tensor, got list"),
        (vector(-1, math.nan, -1), ValueError, "must be finite, got 1 of 3 entries NaN or infinite"),
        (vector(-1, -math.inf, -math.inf), ValueError, "must be finite, got 2 of 3 entries"),
        (vector(-1, 0.5, -1), ValueError, "must be log-probabilities, <= 0, got 0.5"),
        (L3[:2], ValueError, r"must have one shape, got logps \("),
    ],
)
def test_bad_log_probabilities(call, swap, bad, error, text):
    name = "" if "shape" in text else "^ref_logps " if swap else "^logps "
    with pytest.raises(error, match=name + text):
        call(*((L3, bad) if swap else (bad, L3)))


@pytest.mark.parametrize("beta", [0.0, -1.0, math.inf, math.nan, "1", True])
@pytest.mark.parametrize(
    "call",
    [
        lambda beta: losses.policy_gradient(L3, L3, R3, beta),
        lambda beta: losses.rloo(L3, L3, R3, beta),
        lambda beta: losses.dpo(L3, L3, L3, L3, beta),
    ],
    ids=["policy_gradient", "rloo", "dpo"],
)
def test_bad_temperatures(call, beta):
    with pytest.raises(ValueError, match="^beta must be finite and > 0, got"):
        call(beta)
    with pytest.raises(ValueError, match=r"^beta must broadcast .* got shape \(2,\)"):
        call(vector(0.5, 0.5))
    with pytest.raises(TypeError, match=r"^beta must be a number or a tensor of real numbers, got a torch.bool tensor"):
        call(torch.tensor(True))


@pytest.mark.parametrize("beta", [-1.0, math.inf, math.nan, "1", True])
def test_bad_temperatures_of_grpo(beta):
    with pytest.raises(ValueError, match="^beta must be finite and >= 0, got"):
        losses.grpo(TOKENS, TOKENS, R3, beta)
    with pytest.raises(ValueError, match="^beta must be finite and > 0, got"):
        losses.grpo(TOKENS, TOKENS, R3, torch.tensor(0.0, dtype=F64))
    with pytest.raises(ValueError, match=r"^beta must broadcast .* got shape \(2,\)"):
        losses.grpo(TOKENS, TOKENS, R3, vector(0.5, 0.5))
    with pytest.raises(TypeError, match=r"^clip must be a number, got a torch.float64 tensor"):
        losses.grpo(TOKENS, TOKENS, R3, 1.0, clip=torch.tensor(0.5, dtype=F64))


@pytest.mark.parametrize(
    "call",
    [
        lambda r: losses.policy_gradient(L3, L3, r, 1.0),
        lambda r: losses.rloo(L3, L3, r, 1.0),
        lambda r: losses.grpo(TOKENS, TOKENS, r, 1.0),
    ],
    ids=["policy_gradient", "rloo", "grpo"],
)
@pytest.mark.parametrize(
    ("rewards", "error", "text"),
    [
        (WORD, TypeError, "^rewards must be a floating-point torch.Tensor, got a torch.int64 tensor"),
        (vector(0, 1, math.inf), ValueError, "^rewards must be finite, got 1 of 3 entries"),
        (vector(0, 1, -math.inf), ValueError, "^rewards must be finite, got 1 of 3 entries"),
        (vector(0, 1), ValueError, r"rewards.* must have (one )?shape.* got .*\(2,\)"),
    ],
)
def test_bad_rewards(call, rewards, error, text):
    with pytest.raises(error, match=text):
        call(rewards)


def grpo_with(**flags):
    return lambda: losses.grpo(TOKENS, TOKENS, R3, 1.0, **flags)


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda: losses.rloo(L3[:1], L3[:1], R3[:1], 1.0), ValueError, r"logps must hold groups of at least 2 .* \(1,"),
        (
            lambda: losses.rloo(L3.sum(), L3.sum(), R3.sum(), 1.0),
            ValueError,
            r"logps must hold groups of at least 2 draws, got shape \(\)",
        ),
        (lambda: losses.grpo(L3, L3, R3, 1.0), ValueError, r"logps must hold groups of at least 2 draws, got shape"),
        (
            lambda: losses.grpo(TOKENS[:1], TOKENS[:1], R3[:1], 1.0),
            ValueError,
            r"logps must hold groups of at least 2 draws, got shape \(1, 1\)",
        ),
        (
            lambda: losses.grpo(TOKENS, TOKENS, R3[:, None], 1.0),
            ValueError,
            r"rewards must have shape \(3,\), got \(3, 1\)",
        ),
        (
            lambda: losses.grpo(TOKENS.expand(2, 3, 1), TOKENS.expand(2, 3, 1), R3, 1.0),
            ValueError,
            r"rewards must have shape \(2, 3\), got \(3,\)",
        ),
        (grpo_with(kl="k4"), ValueError, "kl must be one of 'reward', 'k1', 'k2', 'k3', got 'k4'"),
        (grpo_with(baseline="mean"), ValueError, "baseline must be one of 'group', 'leave-one-out', got 'mean'"),
        (grpo_with(scale="std"), ValueError, "scale must be one of 'group', 'none', got 'std'"),
        (grpo_with(clip=0.0), ValueError, "clip must be finite and > 0, got 0.0"),
        (grpo_with(clip=math.nan), ValueError, "clip must be finite and > 0, got nan"),
        (grpo_with(mask=torch.ones(3, 1)), TypeError, "mask must be a boolean torch.Tensor, got a torch.float32"),
        (
            grpo_with(mask=torch.ones(3, dtype=torch.bool)),
            ValueError,
            r"mask must have shape \(3, 1\), one entry per token, got \(3,\)",
        ),
        (
            grpo_with(mask=torch.tensor([[True], [False], [False]])),
            ValueError,
            "mask must keep at least one token per sequence, got 2 sequences with none",
        ),
        (grpo_with(old_logps=TOKENS[:2]), ValueError, "logps and old_logps must have one shape"),
        (grpo_with(old_logps=-TOKENS), ValueError, "old_logps must be log-probabilities, <= 0, got 1.6"),
        (grpo_with(old_logps=TOKENS - math.inf), ValueError, "old_logps must be finite, got 3 of 3"),
        (grpo_with(old_logps=WORD[:, None]), TypeError, "old_logps must be a floating-point torch.Tensor"),
    ],
)
def test_bad_groups(call, error, text):
    with pytest.raises(error, match=text):
        call()


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda: losses.bradley_terry(WORD, R3), TypeError, "chosen must be a floating-point torch.Tensor"),
        (lambda: losses.bradley_terry(R3, WORD), TypeError, "rejected must be a floating-point torch.Tensor"),
        (lambda: losses.bradley_terry(R3, R3 / 0), ValueError, "rejected must be finite, got 3 of 3"),
        (lambda: losses.bradley_terry(R3, R3[:2]), ValueError, r"chosen and rejected must have one shape, got chosen"),
        (lambda: losses.bradley_terry(R3, R3, 1.5), ValueError, r"labels must lie in \[0, 1\], got 1.5"),
        (lambda: losses.bradley_terry(R3, R3, -0.5), ValueError, r"labels must lie in \[0, 1\], got -0.5"),
        (lambda: losses.bradley_terry(R3, R3, R3 / 1.5), ValueError, r"labels must lie in \[0, 1\], got 1.33333"),
        (lambda: losses.bradley_terry(R3, R3, math.nan), ValueError, r"labels must lie in \[0, 1\], got nan"),
        (lambda: losses.bradley_terry(R3, R3, WORD), TypeError, "labels must be a floating-point torch.Tensor"),
        (lambda: losses.dpo(R3, L3, L3, L3, 1.0), ValueError, "^chosen_logps must be log-probabilities, <= 0, got 1"),
        (lambda: losses.dpo(L3, R3, L3, L3, 1.0), ValueError, "^rejected_logps must be log-probabilities"),
        (lambda: losses.dpo(L3, L3, R3, L3, 1.0), ValueError, "^ref_chosen_logps must be log-probabilities"),
        (lambda: losses.dpo(L3, L3, L3, R3, 1.0), ValueError, "^ref_rejected_logps must be log-probabilities"),
        (lambda: losses.dpo(L3, L3, L3[:2], L3, 1.0), ValueError, r"must have one shape, .*ref_chosen_logps \(2,\)"),
        (lambda: losses.dpo(L3, L3, L3, L3 - math.inf, 1.0), ValueError, "ref_rejected_logps must be finite"),
        (lambda: losses.dpo(L3, L3, L3, L3, 1.0, 2.0), ValueError, r"labels must lie in \[0, 1\], got 2"),
    ],
)
def test_bad_comparisons(call, error, text):
    with pytest.raises(error, match=text):
        call()


I3 = torch.arange(3)
ONES = torch.ones(3, 3)


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda: losses.count_wins(R3, I3, I3, 3), TypeError, "first must be an integer torch.Tensor"),
        (lambda: losses.count_wins(I3, R3, I3, 3), TypeError, "second must be an integer torch.Tensor"),
        (lambda: losses.count_wins(WORD, I3, R3, 3), ValueError, "first must lie in 0..2, got values from 1 to 3"),
        (lambda: losses.count_wins(I3, -I3, R3, 3), ValueError, "second must lie in 0..2, got values from -2 to 0"),
        (lambda: losses.count_wins(I3, I3, R3[:2], 3), ValueError, "first and second and labels must have one shape"),
        (lambda: losses.count_wins(I3, I3, vector(0, 1, 0.5), 3), ValueError, "labels must be 0 or 1, got 0.5"),
        (lambda: losses.count_wins(I3, I3, vector(0, 1, math.nan), 3), ValueError, "labels must be 0 or 1, got nan"),
        (lambda: losses.count_wins(I3, I3, -I3, 3), ValueError, "labels must be 0 or 1, got -1"),
        (lambda: losses.count_wins(I3, I3, I3, 3.0), TypeError, "k must be an int, got float"),
        (lambda: losses.count_wins(I3 * 0, I3 * 0, I3 * 0, 1), ValueError, "k must be .*2, got 1"),
        (lambda: losses.fit_bradley_terry(I3), TypeError, "wins must be a floating-point torch.Tensor"),
        (lambda: losses.fit_bradley_terry(ONES[:2]), ValueError, r"wins must have shape \(K, K\) .* got \(2, 3\)"),
        (lambda: losses.fit_bradley_terry(ONES[0]), ValueError, r"wins must have shape \(K, K\) .* got \(3,\)"),
        (lambda: losses.fit_bradley_terry(ONES[:1, :1]), ValueError, r"with K >= 2, got \(1, 1\)"),
        (lambda: losses.fit_bradley_terry(ONES - 1.5), ValueError, "wins must be >= 0, got -0.5"),
        (lambda: losses.fit_bradley_terry(ONES / 0), ValueError, "wins must be finite, got 9 of 9"),
        (lambda: losses.self_certainty(I3), TypeError, "conditionals must be a floating-point torch.Tensor"),
        (lambda: losses.self_certainty(L3), ValueError, r"conditionals must have shape \(..., L, V\), got \(3,\)"),
        (lambda: losses.self_certainty(L3[None] + 0.1), ValueError, "conditionals must be log-probabilities that sum"),
        (
            lambda: losses.self_certainty(L3[None], direction="policies"),
            ValueError,
            "direction must be one of 'policy', 'uniform', got 'policies'",
        ),
        (
            lambda: losses.self_certainty(L3.expand(2, 3), mask=torch.tensor([False, False])),
            ValueError,
            "mask must keep at least one token per sequence, got 1 sequences with none",
        ),
        (
            lambda: losses.self_certainty(L3.expand(2, 3), mask=torch.tensor([True])),
            ValueError,
            r"mask must have shape \(2,\), one entry per token, got \(1,\)",
        ),
        (
            lambda: losses.self_certainty(L3.expand(2, 3), mask=torch.tensor([1, 0])),
            TypeError,
            "mask must be a boolean torch.Tensor, got a torch.int64 tensor",
        ),
        (lambda: losses.weighted_likelihood(WORD, R3), TypeError, "^logps must be a floating-point torch.Tensor"),
        (lambda: losses.weighted_likelihood(L3, WORD), TypeError, "log_weights must be a floating-point torch.Tensor"),
        (lambda: losses.weighted_likelihood(R3, R3), ValueError, "^logps must be log-probabilities, <= 0, got 1"),
        (lambda: losses.weighted_likelihood(L3 - math.inf, R3), ValueError, "^logps must be finite, got 3 of 3"),
        (lambda: losses.weighted_likelihood(L3, R3 / 0), ValueError, "log_weights must be finite or -inf"),
        (lambda: losses.weighted_likelihood(L3, R3[:2]), ValueError, "logps and log_weights must have one shape"),
        (
            lambda: losses.weighted_likelihood(L3, R3 - math.inf),
            ValueError,
            "log_weights must leave at least one outcome of positive mass per row",
        ),
    ],
)
def test_bad_tables_and_weights(call, error, text):
    with pytest.raises(error, match=text):
        call()


def test_rounding_above_zero_is_no_error():
    for dtype in (torch.float32, F64):
        above = torch.tensor([torch.finfo(dtype).eps, -1.0], dtype=dtype)
        losses.kl_estimators(above, above)
        losses.weighted_likelihood(above, above)


# --- the definitions, drawn at random --------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [2, 4])
def test_rloo_on_random_laws(k, rng):
    for _ in range(5):
        ref, theta = random_law(k, rng), torch.randn(k, generator=rng, dtype=F64)
        rewards = torch.linspace(0, 1, k, dtype=F64) + torch.rand(k, generator=rng, dtype=F64) / 2

        def loss(logps, y, ref=ref, rewards=rewards):
            return losses.rloo(logps, ref[y], rewards[y], 0.8)

        close(expected_gradient(loss, theta, 3), -objective_gradient(theta, ref, rewards, 0.8))
        assert is_zero(expected_gradient(loss, tilt(ref, rewards, 0.8), 3))
        assert not is_zero(expected_gradient(loss, tilt(ref, rewards, 0.88), 3), 1e-4)


@pytest.mark.parametrize("labels", [torch.ones(3, dtype=F64), torch.ones(4, 2, dtype=F64)])
def test_labels_must_not_enlarge_the_loss(labels):
    with pytest.raises(ValueError, match=r"labels must broadcast to shape \(2,\), got"):
        losses.bradley_terry(vector(0.1, 0.2), vector(0.0, 0.0), labels)


@pytest.mark.parametrize(
    ("baseline", "text"),
    [
        (math.nan, "baseline must be finite"),
        (torch.zeros(3, dtype=F64), r"baseline must broadcast to shape \(2,\), got \(3,\)"),
        (torch.zeros(4, 2, dtype=F64), r"baseline must broadcast to shape \(2,\), got \(4, 2\)"),
    ],
)
def test_bad_baselines(baseline, text):
    logps = vector(-1.0, -2.0)
    with pytest.raises(ValueError, match=text):
        losses.policy_gradient(logps, logps, vector(0.0, 1.0), 1.0, baseline=baseline)


@pytest.mark.parametrize("odds", [2.0, 1e3, 1e6])
def test_fit_of_a_long_chain(odds):
    """Each item beats only the next one: 64 differences of log(odds), which add up to hundreds."""
    wins = torch.diag(torch.full((63,), odds, dtype=F64), 1) + torch.diag(torch.ones(63, dtype=F64), -1)
    differences = -losses.fit_bradley_terry(wins).diff()
    torch.testing.assert_close(differences, torch.full((63,), math.log(odds), dtype=F64), atol=1e-8, rtol=0)


# --- comparisons with a ridge ----------------------------------------------------------------------------------------


def bisect(falling, low, high):
    """Root of a falling function, to the last digit."""
    while low < (middle := (low + high) / 2) < high:
        low, high = (middle, high) if falling(middle) > 0 else (low, middle)
    return low


@pytest.mark.parametrize("ridge", [1e-12, 1e-3, 1.0, 1e6])
@pytest.mark.parametrize(
    ("won", "lost"), [(1e9, 0), (1e-6, 0), (0, 1.0), (3, 1), (1e9, 1e-6), (5, 1e9), (2, 2), (0, 0)]
)
def test_ridge_of_two_items(won, lost, ridge):
    # With r = (d, -d) / 2 the penalty is ridge d^2 / 4: won sigma(-d) - lost sigma(d) = ridge d / 2.
    def slope(d):
        return won / (1 + math.exp(d)) - lost / (1 + math.exp(-d)) - ridge * d / 2

    gap = bisect(slope, -100.0, 100.0)
    rewards = losses.fit_bradley_terry(vector(0, won, lost, 0).view(2, 2), ridge=ridge)
    torch.testing.assert_close(rewards, vector(gap, -gap) / 2, rtol=1e-13, atol=1e-300)


def penalised_gradient(rewards, wins, ridge):
    rewards = rewards.clone().requires_grad_()
    likelihood = (wins * torch.nn.functional.logsigmoid(rewards[:, None] - rewards)).sum()
    penalty = ridge / 2 * (rewards - rewards.mean()).square().sum()
    return torch.autograd.grad(likelihood - penalty, rewards)[0]


def sparse_wins(k, rng):
    """Tables with wins from 1e-6 to 1e9, most of them 0: winless and unbeaten items, several groups."""
    return torch.where(
        torch.rand(k, k, generator=rng) < 0.4, 10.0 ** torch.randint(-6, 10, (k, k), generator=rng).double(), 0
    ).fill_diagonal_(0)


@pytest.mark.parametrize("ridge", [1e-12, 1e-6, 1e-2, 1.0, 1e6])
def test_at_the_ridge_maximum_the_gradient_vanishes(ridge, rng):
    for k in (2, 3, 5, 9, 30):
        wins = sparse_wins(k, rng)
        before = wins.clone()
        rewards = losses.fit_bradley_terry(wins, ridge=ridge)
        assert torch.equal(wins, before) and rewards.dtype == F64
        largest = rewards.abs().max()
        unexpected = wins * torch.sigmoid(rewards - rewards[:, None])
        tolerance = 1e-12 * ((unexpected + unexpected.T).sum(1) + ridge * largest)
        assert bool((penalised_gradient(rewards, wins, ridge).abs() <= tolerance).all())
        assert abs(rewards.sum().item()) <= 1e-14 * k * largest
        if largest > 0:
            assert bool((penalised_gradient(1.001 * rewards, wins, ridge).abs() > 100 * tolerance).any())
        order = torch.randperm(k, generator=rng)
        close(losses.fit_bradley_terry(wins[order][:, order], ridge=ridge), rewards[order], 1e-9)


def test_ridge_makes_every_table_a_fit():
    winless = torch.tensor([[0, 2, 1], [1, 0, 1], [0, 0, 0]], dtype=F64)
    for wins in (winless, winless.T):  # and an unbeaten one
        with pytest.raises(ValueError, match="infinite .ridge > 0 makes it finite"):
            losses.fit_bradley_terry(wins)
        for ridge in (1e-12, 0.1, 1e3):
            rewards = losses.fit_bradley_terry(wins, ridge=ridge)
            last = rewards[2] if wins is winless else -rewards[2]
            assert bool(rewards.isfinite().all()) and last < min(rewards[:2].min(), (-rewards)[:2].min())
    # Groups that never met are fitted alone, each with mean 0; an item that nobody met has reward 0.
    apart = torch.block_diag(winless, torch.zeros(1, 1), torch.tensor([[0.0, 3.0], [1.0, 0.0]])).double()
    with pytest.raises(ValueError, match="got 3 groups .*ridge > 0 sets them"):
        losses.fit_bradley_terry(apart)
    rewards = losses.fit_bradley_terry(apart, ridge=0.3)
    close(rewards[:3], losses.fit_bradley_terry(winless, ridge=0.3))
    assert rewards[3] == 0
    close(rewards[4:], losses.fit_bradley_terry(vector(0, 3, 1, 0).view(2, 2), ridge=0.3))
    for ridge in (5e-324, 1.0, 1.7e308):
        assert not bool(losses.fit_bradley_terry(torch.zeros(3, 3), ridge=ridge).any())


def test_ridge_between_maximum_likelihood_and_nothing(rng):
    wins = torch.randint(1, 9, (5, 5), generator=rng).double()
    free = losses.fit_bradley_terry(wins)
    assert torch.equal(losses.fit_bradley_terry(wins, ridge=0.0), free)
    assert torch.equal(losses.fit_bradley_terry(wins, ridge=0), free)
    close(losses.fit_bradley_terry(wins, ridge=1e-12), free, 1e-10)
    sizes = [losses.fit_bradley_terry(wins, ridge=x).norm().item() for x in (0, 0.01, 0.1, 1, 10, 100, 1000)]
    assert sizes == sorted(sizes, reverse=True) and sizes[-1] < sizes[0] / 10
    # A strong ridge: half the surplus of wins, over ridge.
    surplus = (wins - wins.T).sum(1) / 2
    close(1e13 * losses.fit_bradley_terry(wins, ridge=1e13), surplus, 1e-11)


@pytest.mark.parametrize("unit", [1e-300, 2.0**-40, 1.0, 2.0**40, 1e300])
def test_ridge_is_in_units_of_wins(unit):
    wins = torch.tensor([[0, 3, 0], [1, 0, 2], [0, 0, 0]], dtype=F64)
    close(losses.fit_bradley_terry(unit * wins, ridge=0.5 * unit), losses.fit_bradley_terry(wins, ridge=0.5), 1e-13)


@pytest.mark.parametrize("ridge", [1e-12, 1e-9, 1e-3])
def test_a_small_ridge_is_not_lost_beside_many_wins(ridge):
    """Two leagues of balanced games, 1e9 of them; each of one league has once beaten one of the other.

    By symmetry the members of a league are equal, at +-x, and sigma(-2 x) = ridge x. The games within a league are 1e21
    times the ridge that holds the leagues together, and rounding must not get from one to the other.
    """
    league = 1e9 * torch.tensor([[0, 0.1, 0.7], [0.6, 0, 0.3], [0.2, 0.8, 0]], dtype=F64)  # rows sum to columns
    wins = torch.block_diag(league, league)
    wins[[0, 1, 2], [3, 4, 5]] = 1.0
    x = bisect(lambda x: 1 / (1 + math.exp(2 * x)) - ridge * x, 0.0, 100.0)
    close(losses.fit_bradley_terry(wins, ridge=ridge), vector(x, x, x, -x, -x, -x), 1e-9)


def test_the_smallest_ridge_that_is_taken():
    gap = bisect(lambda d: 1 / (1 + math.exp(d)) - 1e-24 * d / 2, 0.0, 100.0)
    rewards = losses.fit_bradley_terry(vector(0, 1, 0, 0).view(2, 2), ridge=1e-24)
    torch.testing.assert_close(rewards, vector(gap, -gap) / 2, rtol=1e-13, atol=0)


def test_a_fit_that_left_float64_says_so(monkeypatch):
    monkeypatch.setattr(losses, "_solve_laplacian", lambda edges, ridge, right: right * math.nan)
    with pytest.raises(ArithmeticError, match="^the fit with entries up to 8 and ridge 2 left float64$"):
        losses.fit_bradley_terry(8 * ONES, ridge=2.0)


def test_rounding_of_balanced_wins_ends():
    tenths = torch.tensor([[0, 1, 2, 3], [3, 0, 1, 2], [2, 3, 0, 1], [1, 2, 3, 0]], dtype=F64) / 10
    for scale in (1.0, 1 / 3, 1e9 / 7):
        for ridge in (1e-3, 1e3):
            assert losses.fit_bradley_terry(scale * tenths, ridge=scale * ridge).abs().max() < 1e-12


@pytest.mark.parametrize("dtype", DTYPES)
def test_ridge_takes_every_dtype_and_numpy(dtype):
    wins = torch.tensor([[7, 3, 0], [1, 9, 2], [0, 0, 5]], dtype=dtype, requires_grad=True)
    expected = losses.fit_bradley_terry(wins.detach().double().fill_diagonal_(0), ridge=0.25)
    for number in (0.25, np.float32(0.25), np.float64(0.25)):
        found = losses.fit_bradley_terry(wins, ridge=number)
        assert torch.equal(found, expected) and found.dtype == F64 and not found.requires_grad


@pytest.mark.parametrize(
    ("ridge", "error", "text"),
    [
        (-1.0, ValueError, "^ridge must be finite and >= 0, got -1.0"),
        (math.nan, ValueError, "^ridge must be finite and >= 0, got nan"),
        (math.inf, ValueError, "^ridge must be finite and >= 0, got inf"),
        (torch.tensor(1.0), TypeError, "^ridge must be a number, got a torch.float32 tensor"),
        (1e-25, ValueError, "^ridge must be 0 or at least 1e-24 of the largest entry of wins, got 1e-25 and 1"),
    ],
)
def test_bad_ridges(ridge, error, text):
    with pytest.raises(error, match=text):
        losses.fit_bradley_terry(ONES, ridge=ridge)


# --- grpo: clip, lengths and draws that do not count -----------------------------------------------------------------


def slow_options(logps, ref, rewards, beta, kl, length_norm, mask, old, clip):
    """The definition for one group with its own mean and no scale: `slow_grpo`, token by token."""
    g, length = logps.shape
    sizes = mask.sum(-1).tolist()
    total = 0.0
    returns = rewards - beta * torch.where(mask, logps - ref, 0).sum(-1).detach() * (kl == "reward")
    for i, t in itertools.product(range(g), range(length)):
        if mask[i, t]:
            a = (returns[i] - returns.mean()).item()
            ratio = torch.exp(logps[i, t] - old[i, t])
            gain = torch.minimum(ratio * a, ratio.clamp(1 - clip[0], 1 + clip[1]) * a)
            log_rho = ref[i, t] - logps[i, t]
            penalty = {"k2": log_rho**2 / 2, "k3": log_rho.exp() - 1 - log_rho}.get(kl, 0.0)
            factor = {"none": 1, "sequence": 1 / sizes[i], "group": g / sum(sizes)}[length_norm]
            total = total - factor * (gain - beta * penalty) / g
    return total


@pytest.mark.parametrize("length_norm", ["none", "sequence", "group"])
@pytest.mark.parametrize("clip", [(0.1, 0.4), (0.4, 0.1), (1.5, 0.2)])
@pytest.mark.parametrize("kl", ["reward", "k2", "k3"])
def test_grpo_with_options_equals_its_definition(kl, clip, length_norm, rng):
    logps, ref, rewards, mask, old = grpo_inputs(rng, g=5)
    old = old.clamp(max=-0.01)
    flags = {"kl": kl, "scale": "none", "length_norm": length_norm, "mask": mask, "old_logps": old, "clip": clip}
    expected = slow_options(logps, ref, rewards, 0.6, kl, length_norm, mask, old, clip)
    out = losses.grpo(logps, ref, rewards, 0.6, **flags)
    close(out, expected)
    close(*(torch.autograd.grad(x, logps, retain_graph=True)[0] for x in (out, expected)))
    # Draws that do not count might as well not be there, whatever stands in their place; so with one draw alone.
    for junk in (math.nan, math.inf, -math.inf, 1.0):
        valid = torch.tensor([False, True, True, False, True])
        rows = [torch.where(valid[:, None], x.detach(), junk).requires_grad_() for x in (logps, ref, old)]
        padded = mask & valid[:, None] if junk == 1 else mask | ~valid[:, None]
        dirty = {**flags, "mask": padded, "old_logps": rows[2]}
        out = losses.grpo(*rows[:2], torch.where(valid, rewards, junk), 0.6, **dirty, valid=valid)
        kept = {**flags, "mask": mask[valid], "old_logps": old[valid]}
        close(out, losses.grpo(logps[valid], ref[valid], rewards[valid], 0.6, **kept))
        found = torch.autograd.grad(out, rows[:2], allow_unused=True)
        expected = torch.autograd.grad(losses.grpo(logps[valid], ref[valid], rewards[valid], 0.6, **kept), logps)[0]
        close(found[0], expected)
        assert not bool(found[0][~valid].any()) and (found[1] is None or not bool(found[1][~valid].any()))


@pytest.mark.parametrize("baseline", ["group", "leave-one-out"])
@pytest.mark.parametrize("scale", ["group", "none"])
def test_each_group_has_its_own_valid_draws(scale, baseline, rng):
    """Groups of 4, 3, 2, 1 and no valid draws: each is the group of these alone, and 0 below two."""
    logps, ref = (-torch.rand(5, 4, 2, generator=rng, dtype=F64) for _ in range(2))
    rewards = torch.randn(5, 4, generator=rng, dtype=F64)
    # A term that overflows in the single draw must not count either.
    logps[3, 2], ref[3, 2] = -2000, 0
    logps.requires_grad_()
    valid = torch.tensor([[1, 1, 1, 1], [0, 1, 1, 1], [1, 0, 0, 1], [0, 0, 1, 0], [0, 0, 0, 0]]).bool()
    for kl in ("reward", "k1", "k2", "k3"):
        flags = {"kl": kl, "scale": scale, "baseline": baseline}
        for length_norm in ("sequence", "group"):  # all lengths are 2
            normed = losses.grpo(logps, ref, rewards, 0.6, valid=valid, length_norm=length_norm, **flags)
            close(2 * normed, losses.grpo(logps, ref, rewards, 0.6, valid=valid, **flags))
        out = losses.grpo(logps, ref, rewards, 0.6, valid=valid, **flags)
        gradient = torch.autograd.grad(out.sum(), logps)[0]
        for i, keep in enumerate(valid):
            if keep.sum() < 2:
                assert out[i] == 0 and not bool(gradient[i].any())
                continue
            alone = losses.grpo(logps[i, keep], ref[i, keep], rewards[i, keep], 0.6, **flags)
            close(out[i], alone)
            close(gradient[i], torch.autograd.grad(alone, logps)[0][i])
        everyone = torch.ones_like(valid)
        full = losses.grpo(logps[:3], ref[:3], rewards[:3], 0.6, valid=everyone[:3], **flags)
        assert torch.equal(full, losses.grpo(logps[:3], ref[:3], rewards[:3], 0.6, **flags))


def test_a_pair_clips_each_side_by_its_own_range():
    old = law(0.4, 0.4)[:, None]
    for ratio, sign, passes in ((1.25, 1, True), (1.3, 1, False), (0.85, -1, True), (0.8, -1, False), (1.3, -1, True)):
        logps = torch.stack([old[0] + math.log(ratio), old[1]]).requires_grad_()
        out = losses.grpo(logps, None, vector(sign, -sign), 0, scale="none", old_logps=old, clip=(0.18, 0.28))
        close(torch.autograd.grad(out, logps)[0].flatten(), vector(-ratio * sign / 2 if passes else 0, sign / 2))
    for clip in (0.2, np.float64(0.2)):
        logps = torch.stack([old[0] + 0.3, old[1] - 0.3]).requires_grad_()
        same = [
            losses.grpo(logps, old, vector(1, 0), 1.0, old_logps=old, clip=c) for c in (clip, (clip, clip), [clip] * 2)
        ]
        assert torch.equal(same[0], same[1]) and torch.equal(same[0], same[2])


def test_one_mean_over_all_tokens_of_many_groups(rng):
    logps, ref = (-torch.rand(3, 4, 5, generator=rng, dtype=F64) for _ in range(2))
    rewards, mask = torch.randn(3, 4, generator=rng, dtype=F64), torch.rand(3, 4, 5, generator=rng) < 0.6
    mask[..., 0] = True
    by_group = losses.grpo(logps, ref, rewards, 0.3, mask=mask, length_norm="group")
    tokens = mask.sum((-1, -2))
    over_all = 4 * losses.grpo(logps, ref, rewards, 0.3, mask=mask).sum() / tokens.sum()
    close((by_group * tokens).sum() / tokens.sum(), over_all)


FAR = 1e-6  # a million times what counts as 0


# Strings e, ab and aa: one token or two. Logits of (e, a), then of (b, a) after a.
LENGTHS = torch.tensor([[True, False], [True, True], [True, True]])
WORDS_REF = law(0.5, 0.5, 0.7, 0.3)
WORDS_REWARDS = vector(1.0, 0.0, 2.0)


def words(theta):
    first, second = torch.log_softmax(theta[:2], -1), torch.log_softmax(theta[2:], -1)
    return torch.stack([torch.stack([first[0], 0 * first[0]]), *(torch.stack([first[1], x]) for x in second)])


def words_loss(**flags):
    ref = words(WORDS_REF)
    return lambda logps, y: losses.grpo(logps, ref[y], WORDS_REWARDS[y], 0.8, mask=LENGTHS[y], **flags)


def logits_of(logps):
    """Logits of the tokens from the law of the strings."""
    rest = logps[1:].logsumexp(-1)
    return torch.cat([torch.stack([logps[0], rest]), logps[1:] - rest])


def words_fixed_point(normalised):
    """Of k2 in the loss: after a the tilt by r; at the first token (q - l) / w as in the docstring, by bisection."""
    second = tilt(WORDS_REF[2:], WORDS_REWARDS[1:], 0.8)
    ahead = categorical.expectation(second, WORDS_REWARDS[1:]).item()
    halves = 0.5 if normalised else 1.0

    def surplus(x):  # of logit x = log(pi(e) / pi(a)): (q_e - w_e log ratio_e) - (q_a - w_a log ratio_a)
        log_e, log_a = -math.log1p(math.exp(-x)), -math.log1p(math.exp(x))
        mean = math.exp(log_e) * WORDS_REWARDS[0].item() + math.exp(log_a) * ahead
        of_e = WORDS_REWARDS[0].item() - mean - 0.8 * (log_e - math.log(0.5))
        return of_e - halves * (ahead - mean - 0.8 * (log_a - math.log(0.5)))

    x = bisect(surplus, -50.0, 50.0)
    return torch.cat([vector(x, 0), second])


@pytest.mark.parametrize("size", [2, 3])
def test_what_a_mean_over_tokens_does_to_the_fixed_point(size):
    target = logits_of(tilt(words(WORDS_REF).sum(-1), WORDS_REWARDS, 0.8))
    warmer = logits_of(tilt(words(WORDS_REF).sum(-1), WORDS_REWARDS, 0.84))
    laws = {"none": words_fixed_point(False), "sequence": words_fixed_point(True)}
    for length_norm in ("none", "sequence", "group"):
        # KL in the reward: the tilt, whatever the lengths.
        for baseline, scale in itertools.product(("group", "leave-one-out"), ("group", "none")):
            loss = words_loss(kl="reward", baseline=baseline, scale=scale, length_norm=length_norm)
            assert is_zero(expected_gradient(loss, target, size, words))
            assert not is_zero(expected_gradient(loss, warmer, size, words), FAR)
            assert not is_zero(expected_gradient(loss, laws["sequence"], size, words), FAR)
        # KL in the loss: each has its own law.
        loss = words_loss(kl="k2", baseline="leave-one-out", scale="none", length_norm=length_norm)
        for name, theta in laws.items():
            found = expected_gradient(loss, theta, size, words)
            assert is_zero(found) if name == length_norm else not is_zero(found, FAR)
        assert not is_zero(expected_gradient(loss, target, size, words), FAR)


def test_sequences_of_one_length_keep_their_fixed_point(rng):
    logps, ref, rewards, _, _ = grpo_inputs(rng)
    for kl in ("reward", "k2", "k3"):
        for length_norm in ("sequence", "group"):
            out = losses.grpo(logps, ref, rewards, 0.6, kl=kl, length_norm=length_norm)
            close(3 * out, losses.grpo(logps, ref, rewards, 0.6, kl=kl))


def counted_gradient(loss, theta, size, counts):
    """Mean gradient where a draw of y counts with probability counts[y], independently of all else."""
    theta = theta.clone().requires_grad_()
    logps = softmax_law(theta)
    k = len(logps)
    groups = all_groups(2 * k, size)  # outcome y + k means y, and it does not count
    y, valid = groups % k, groups < k
    chance = (logps.detach().exp()[y] * torch.where(valid, counts[y], 1 - counts[y])).prod(-1)
    return torch.autograd.grad((chance * loss(logps[y], y, valid)).sum(), theta)[0]


def valid_sequence(beta, **flags):
    return lambda logps, y, valid: losses.grpo(
        logps[..., None], S0[y][..., None], S0_REWARDS[y], beta, valid=valid, **flags
    )


@pytest.mark.parametrize("size", [2, 3])
def test_what_abstaining_does_with_kl_in_the_reward(size):
    target, warmer = (tilt(S0, S0_REWARDS, b) for b in (0.8, 0.84))
    # A string that never counts: the others keep the tilt among themselves, whatever they have together.
    rest = tilt(S0, S0_REWARDS + vector(0, 0, -math.inf), 0.8)
    partial = [torch.stack([rest[0] + math.log(m), rest[1] + math.log(m), vector(1 - m)[0].log()]) for m in (0.1, 0.7)]
    for baseline, scale in itertools.product(("group", "leave-one-out"), ("group", "none")):
        loss = valid_sequence(0.8, kl="reward", baseline=baseline, scale=scale)
        for counts in (vector(0.6, 0.6, 0.6), vector(0.9, 0.5, 0.2), vector(1, 0.01, 0.3)):
            assert is_zero(counted_gradient(loss, target, size, counts))
            assert not is_zero(counted_gradient(loss, warmer, size, counts), FAR)
            assert not is_zero(counted_gradient(loss, partial[0], size, counts), FAR)
        counts = vector(0.9, 0.5, 0)
        for theta in (target, *partial):
            assert is_zero(counted_gradient(loss, theta, size, counts))
        assert not is_zero(counted_gradient(loss, warmer, size, counts), FAR)
        # No signal on it, at any policy, but through the others: the logit of a string that never counts stays.
        assert is_zero(counted_gradient(loss, THETA, size, counts)[2])
        assert not is_zero(counted_gradient(loss, THETA, size, counts)[:2], FAR)


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("counts", [vector(0.9, 0.5, 0.2), vector(0.3, 1, 0.6), vector(0.4, 0.4, 0.4)])
def test_what_abstaining_does_with_k2_in_the_loss(counts, size):
    def law_of(c):
        return tilt(S0, S0_REWARDS - c / counts, 0.8)

    def surplus(c):
        logps = law_of(c)
        return -0.8 * (logps.exp() * counts * (logps - S0)).sum().item() - c

    stationary, target = law_of(brentq(surplus, -5, 5, xtol=1e-15)), tilt(S0, S0_REWARDS, 0.8)
    loss = valid_sequence(0.8, kl="k2", baseline="leave-one-out", scale="none")
    assert is_zero(counted_gradient(loss, stationary, size, counts))
    found = counted_gradient(loss, target, size, counts)
    assert is_zero(found) if bool((counts == counts[0]).all()) else not is_zero(found, FAR)


# How far the ratio and rho are, the advantage A, beta, and the sign of -(A e^past + beta e^ahead).
OVERFLOWS = [
    (1500, 1000, -1.0, 0.5, 1),
    (1000, 1500, -1.0, 0.5, -1),
    (1000, 1001, -1e9, 0.5, 1),
    (1001, 1000, -1e-9, 0.5, -1),
    (1000, 1000.2, -1.0, 0.5, 1),
    (1000.2, 1000, -1.0, 2.0, -1),
    (1000, 700, -1.0, 1e10, 1),  # rho fits, beta rho does not
    (700, 1000, -1e10, 1.0, -1),
]


@pytest.mark.parametrize(("past", "ahead", "advantage", "beta", "sign"), OVERFLOWS)
def test_where_neither_ratio_nor_k3_fits_the_larger_has_the_gradient(past, ahead, advantage, beta, sign):
    """The ratio pulls the log-probability down and k3 up, each beyond float64; together they are no NaN."""
    logps = vector(-2000, -1)[:, None].requires_grad_()
    old, ref = vector(-2000 - past, -1)[:, None], vector(-2000 + ahead, -1)[:, None].requires_grad_()
    out = losses.grpo(logps, ref, vector(2 * advantage, 0), beta, scale="none", old_logps=old)
    found, of_ref = torch.autograd.grad(out, (logps, ref))
    assert out.item() == math.inf and found[0].item() == sign * math.inf and bool(found[1].isfinite())
    assert of_ref[0].item() == math.inf or ahead < 709  # nothing pulls the reference the other way


def test_equal_rewards_of_valid_draws_have_no_advantage():
    valid = torch.tensor([False, True, True, False, True, True, True, True, True])
    for reward in (0.1, 1e6 + 0.1, -1 / 3):
        logps = torch.full((9, 1), -1.0, dtype=F64, requires_grad=True)
        rewards = torch.where(valid, torch.full((9,), reward, dtype=F64), 7.0)
        for scale in ("group", "none"):
            out = losses.grpo(logps, logps.detach(), rewards, 1.0, valid=valid, scale=scale)
            assert not bool(torch.autograd.grad(out, logps)[0].any())


@pytest.mark.parametrize(
    ("flags", "error", "text"),
    [
        ({"length_norm": "batch"}, ValueError, "length_norm must be one of 'none', 'sequence', 'group', got 'batch'"),
        ({"clip": (0.1, 0.0)}, ValueError, r"^clip\[1\] must be finite and > 0, got 0.0"),
        ({"clip": (math.nan, 0.1)}, ValueError, r"^clip\[0\] must be finite and > 0, got nan"),
        ({"clip": (0.1, torch.tensor(0.2))}, TypeError, r"^clip\[1\] must be a number"),
        ({"clip": (0.1, 0.2, 0.3)}, ValueError, r"^clip must be a number or a pair \(low, high\), got 3 numbers"),
        ({"clip": "0.2"}, ValueError, "^clip must be finite and > 0, got '0.2'"),
        ({"valid": [True, True, False]}, TypeError, "^valid must be a boolean torch.Tensor, got list"),
        ({"valid": torch.ones(3)}, TypeError, "^valid must be a boolean torch.Tensor, got a torch.float32"),
        (
            {"valid": torch.ones(3, 1).bool()},
            ValueError,
            r"^valid must have shape \(3,\), one entry per draw, got \(3, 1\)",
        ),
        (
            {"valid": torch.tensor([True, True, False]), "mask": torch.tensor([[True], [False], [False]])},
            ValueError,
            "mask must keep at least one token per sequence, got 1 sequences with none",
        ),
    ],
)
def test_bad_options_of_grpo(flags, error, text):
    with pytest.raises(error, match=text):
        losses.grpo(TOKENS, TOKENS, R3, 1.0, **flags)


def test_what_counts_is_still_looked_at():
    valid = torch.tensor([True, True, False])
    for bad in (math.nan, math.inf):
        with pytest.raises(ValueError, match="^rewards must be finite, got 1 of 3"):
            losses.grpo(TOKENS, TOKENS, vector(0, bad, 1), 1.0, valid=valid)
        with pytest.raises(ValueError, match="^logps must be finite, got 1 of 3"):
            losses.grpo(TOKENS + vector(0, bad, 1)[:, None], TOKENS, R3, 1.0, valid=valid)
    with pytest.raises(TypeError, match="^rewards must be a floating-point torch.Tensor, got list"):
        losses.grpo(TOKENS, TOKENS, [0.0, 1.0, 2.0], 1.0, valid=valid)


@pytest.mark.parametrize(
    "name", ["policy_gradient", "rloo", "dpo", *(f"grpo-{kl}" for kl in ("reward", "k1", "k2", "k3"))]
)
def test_a_temperature_per_row_is_that_of_the_row(name, rng):
    shape = (2, 3, 4, 5)  # batch, batch, draws, tokens
    logps, ref, more, other = (-torch.rand(shape, generator=rng, dtype=F64) for _ in range(4))
    rewards, beta = (
        torch.randn(shape[:3], generator=rng, dtype=F64),
        vector(0.3, 1.0, 4.0) + torch.rand(2, 1, generator=rng, dtype=F64),
    )
    function, _, kl = name.partition("-")

    def loss(i, b):
        if function == "grpo":
            return losses.grpo(logps[i], ref[i], rewards[i], b, kl=kl)
        if function == "dpo":
            return losses.dpo(logps[i], more[i], ref[i], other[i], b if isinstance(b, float) else b[..., None, None])
        b = b[..., None] if function == "policy_gradient" and isinstance(b, torch.Tensor) else b
        return getattr(losses, function)(logps[i].sum(-1), ref[i].sum(-1), rewards[i], b)

    together = loss(..., beta)
    assert together.dtype == F64
    for i in itertools.product(range(2), range(3)):
        close(together[i], loss(i, beta[i].item()), 1e-14)
    close(loss(..., beta[:, :1]), loss(..., beta[:, :1].expand(2, 3)))
    close(loss(..., beta.float()), loss(..., beta.float().double()))


# --- edges -----------------------------------------------------------------------------------------------------------


def test_the_guard_against_rounding_is_as_large_as_rounding():
    """Returns that differ by 1e-12 differ; sums of large terms that cancel do not. Each row of a batch on its own."""

    def gradient(now, ref, rewards):
        x = now.clone().requires_grad_()
        losses.grpo(x, ref, rewards, 1.0, kl="reward").sum().backward()
        return x.grad

    even = torch.full((2, 3), -1.0, dtype=F64)
    # log p - log pi of the two sequences: (-.5, 0, 0) twice, and (1e5, -1e5, 0), (1e5 + .1, -1e5, -.1).
    shift = vector(0.5, 0, 0).expand(2, 3)
    far = torch.stack([vector(0, 1e5, 0), vector(0, 1e5, 0.1)])
    back = torch.stack([vector(1e5, 0, 0), vector(1e5 + 0.1, 0, 0)])
    cases = [(even, even - shift, vector(1e-12, 0)), (even - back, even - far, vector(0, 0))]
    expected = [vector(-0.5, 0.5)[:, None].expand(2, 3), torch.zeros(2, 3, dtype=F64)]
    assert ((even - far) - (even - back)).sum(-1).unique().numel() == 2  # rounding is there
    for case, want in zip(cases, expected, strict=True):
        torch.testing.assert_close(gradient(*case), want, rtol=1e-9, atol=0)
    batch = [torch.stack(parts) for parts in zip(*cases, strict=True)]
    torch.testing.assert_close(gradient(*batch), torch.stack(expected), rtol=1e-9, atol=0)


def test_two_items_can_be_compared():
    table = losses.count_wins(torch.tensor([0, 1, 1]), torch.tensor([1, 0, 0]), torch.tensor([1, 1, 0]), 2)
    assert table.tolist() == [[0, 2], [1, 0]]
    close(losses.fit_bradley_terry(table), vector(1, -1) * math.log(2) / 2)
    with pytest.raises(ValueError, match="^k must be an integer >= 2, got 1$"):
        losses.count_wins(torch.zeros(1).long(), torch.zeros(1).long(), torch.zeros(1), 1)


def test_eight_items_are_all_named():
    wins = torch.block_diag(torch.ones(8, 8), torch.ones(2, 2)).double()
    with pytest.raises(ValueError, match=r"one group is items \[0, 1, 2, 3, 4, 5, 6, 7\]$"):
        losses.fit_bradley_terry(wins)


def test_policy_gradient_has_no_baseline_unless_given():
    logps, rewards = law(0.2, 0.3, 0.5), vector(0, 1, 2)
    close(losses.policy_gradient(logps, logps, rewards, 1.0), -logps * rewards)


def test_entries_a_factor_of_1e300_apart_are_fitted():
    close(losses.fit_bradley_terry(vector(0, 1, 1e-300, 0).view(2, 2)).diff(), vector(-300 * math.log(10)))
