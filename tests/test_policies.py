import copy
import itertools
import math

import numpy as np
import pytest
import torch
from helpers import (
    F64,
    S0,
    S0_REWARDS,
    assert_same_under_default_dtype,
    check_sampler,
    draws_from,
    law,
    random_law,
    vector,
    without,
)

from tiltlib import categorical, losses, policies
from tiltlib.categorical import kl, tilt
from tiltlib.markov import MarkovChain
from tiltlib.policies import TabularPolicy, TransformerPolicy, natural_step


def close(a, b, tolerance=1e-12):
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def all_strings(v, length):
    return torch.tensor(list(itertools.product(range(v), repeat=length)))


def string_number(tokens, v):
    return (tokens * v ** torch.arange(tokens.shape[-1]).flip(0)).sum(-1)


# --- tabular ---------------------------------------------------------------------------------------------------------

LOGITS = vector(0.3, -0.2, 0.1)


def test_tabular_starts_at_its_logits():
    policy = TabularPolicy(LOGITS)
    close(policy.law(), LOGITS - LOGITS.logsumexp(0))
    close(TabularPolicy(S0).law(), S0)
    outcomes = torch.tensor([[2, 0], [1, 1]], dtype=torch.int32)
    close(policy.logps(outcomes), policy.law()[outcomes.long()])
    assert policy.logps(torch.tensor(2)).shape == ()
    assert policy.law().exp().sum().item() == pytest.approx(1)


def test_tabular_copies_its_logits():
    logits = LOGITS.clone().requires_grad_()
    policy = TabularPolicy(logits)
    with torch.no_grad():
        policy.logits += 1
    assert torch.equal(logits, LOGITS)
    assert [name for name, _ in policy.named_parameters()] == ["logits"] and policy.logits.is_leaf


DTYPES = [torch.bfloat16, torch.float16, torch.float32, F64]


@pytest.mark.parametrize("dtype", DTYPES)
def test_tabular_keeps_the_dtype(dtype, rng):
    """Law and gradient are those of float64 at the rounded logits, rounded once more."""
    logits = LOGITS.to(dtype)
    policy, wide = TabularPolicy(logits), TabularPolicy(logits.double())
    outcomes = torch.tensor([2, 0, 2])
    assert policy.law().dtype == policy.logps(outcomes).dtype == dtype
    assert torch.equal(policy.law(), wide.law().to(dtype))
    assert torch.equal(policy.logps(outcomes), wide.logps(outcomes).to(dtype))
    for p in (policy, wide):
        p.logps(outcomes).sum().backward()
    assert torch.equal(policy.logits.grad, wide.logits.grad.to(dtype))
    state = rng.get_state()
    drawn = policy.sample(1000, generator=rng)
    rng.set_state(state)
    assert torch.equal(drawn, wide.sample(1000, generator=rng))


@pytest.mark.parametrize("dtype", DTYPES)
def test_tabular_on_a_large_vocabulary(dtype, rng):
    """In half precision the rounded law of 151,936 outcomes does not sum to one; draws come from the exact one."""
    policy = TabularPolicy(torch.zeros(151_936, dtype=dtype))
    assert policy.law()[0].item() == torch.tensor(-math.log(151_936), dtype=F64).to(dtype).item()
    drawn = policy.sample(1000, generator=rng)
    assert drawn.min() < 15_000 and drawn.max() > 137_000


def test_tabular_gradient():
    # d log pi(2) / d theta = (0, 0, 1) - pi.
    policy = TabularPolicy(LOGITS)
    policy.logps(torch.tensor(2)).backward()
    close(policy.logits.grad, vector(0, 0, 1) - torch.softmax(LOGITS, 0))


def test_tabular_draws_follow_its_law(rng):
    policy = TabularPolicy(LOGITS)
    target = policy.law().detach()
    state = rng.get_state()
    drawn = policy.sample(50, generator=rng)
    rng.set_state(state)
    assert torch.equal(drawn, categorical.sample(target, 50, generator=rng))
    assert drawn.dtype == torch.int64 and drawn.shape == (50,)
    wrong = {
        "another-law": (draws_from(S0), S0),
        "never-the-last": (draws_from(without(target, 2)), without(target, 2)),
    }
    check_sampler(lambda n, g: policy.sample(n, generator=g), target, wrong, rng)


def test_tabular_excluded_outcomes(rng):
    policy = TabularPolicy(vector(0, -math.inf, 1))
    assert policy.sample(1000, generator=rng).unique().tolist() == [0, 2]
    policy.logps(torch.tensor([0, 2, 2])).sum().backward()
    assert bool(policy.logits.grad.isfinite().all()) and policy.logits.grad[1] == 0
    assert policy.logps(torch.tensor(1)).item() == -math.inf


@pytest.mark.parametrize(
    ("logits", "error", "text"),
    [
        ([0.0], TypeError, "logits must be a floating-point torch.Tensor, got list"),
        (torch.tensor([1]), TypeError, "logits must be .* got a torch.int64 tensor"),
        (vector(0, math.nan), ValueError, "logits must be finite or -inf .* got NaN or [+]inf"),
        (vector(0, math.inf), ValueError, "logits must be finite or -inf .* got NaN or [+]inf"),
        (vector(-math.inf, -math.inf), ValueError, "logits must leave at least one outcome of positive mass"),
        (torch.zeros(2, 3), ValueError, r"logits must have shape \(K,\), got \(2, 3\)"),
        (torch.tensor(0.0), ValueError, "logits must have a last dimension of size >= 1"),
    ],
)
def test_bad_logits(logits, error, text):
    with pytest.raises(error, match=text):
        TabularPolicy(logits)


@pytest.mark.parametrize(
    ("outcomes", "error", "text"),
    [
        (vector(0, 1), TypeError, "outcomes must be an integer torch.Tensor, got a torch.float64 tensor"),
        ([0, 1], TypeError, "outcomes must be an integer torch.Tensor, got list"),
        (torch.tensor([0, 3]), ValueError, "outcomes must lie in 0..2, got values from 0 to 3"),
        (torch.tensor([-1, 2]), ValueError, "outcomes must lie in 0..2, got values from -1 to 2"),
        (torch.zeros(0, dtype=torch.int64), ValueError, "outcomes must hold at least one number"),
    ],
)
def test_bad_outcomes(outcomes, error, text):
    with pytest.raises(error, match=text):
        TabularPolicy(LOGITS).logps(outcomes)
    with pytest.raises(error, match=text):
        natural_step(LOGITS, outcomes, S0, S0_REWARDS, 1.0, 0.1)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_tabular_says_that_training_has_diverged(bad, rng):
    policy = TabularPolicy(LOGITS)
    with torch.no_grad():
        policy.logits[1] = bad
    text = "logits must be finite, got NaN or inf: training has diverged, lower the learning rate"
    for call in (policy.law, lambda: policy.logps(torch.tensor(0)), lambda: policy.sample(1, generator=rng)):
        with pytest.raises(ValueError, match=text):
            call()


@pytest.mark.parametrize(
    ("n", "error", "text"), [(0, ValueError, "n must be an integer >= 1"), (2.0, TypeError, "n must be an int")]
)
def test_bad_numbers_of_draws(n, error, text, rng):
    for policy in (TabularPolicy(LOGITS), TransformerPolicy(random_chain(2, 1, rng), 2, generator=rng, width=8)):
        with pytest.raises(error, match=text):
            policy.sample(n, generator=rng)


# --- the natural gradient step ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("beta", [1.0, 0.5])
def test_natural_step_is_the_natural_gradient(beta):
    """theta + h F^+ grad J with the Fisher matrix F = diag(pi) - pi pi', up to a constant."""
    theta = LOGITS.clone().requires_grad_()
    logps = torch.log_softmax(theta, -1)
    gradient = torch.autograd.grad(categorical.expectation(logps, S0_REWARDS) - beta * kl(logps, S0), theta)[0]
    pi = logps.detach().exp()
    expected = LOGITS + 0.3 * torch.linalg.pinv(torch.diag(pi) - torch.outer(pi, pi)) @ gradient
    moved = natural_step(LOGITS, torch.arange(3), S0, S0_REWARDS, beta, 0.3)
    close(moved - moved.mean(), expected - expected.mean())


def test_natural_step_by_hand():
    # theta(2) = .1 and log p(2) = log .2: .1 + .5 (2 - .8 (.1 - log .2)); the others stay.
    moved = natural_step(LOGITS, torch.tensor([2]), S0, S0_REWARDS, 0.8, 0.5)
    close(moved, vector(0.3, -0.2, 0.1 + 0.5 * (2 - 0.8 * (0.1 - math.log(0.2)))))


def test_natural_step_counts_an_outcome_once_and_leaves_the_rest():
    before = LOGITS.clone()
    once = natural_step(LOGITS, torch.tensor([2, 0]), S0, S0_REWARDS, 1.0, 0.3)
    often = natural_step(LOGITS, torch.tensor([[0, 2, 2], [2, 0, 2]], dtype=torch.int32), S0, S0_REWARDS, 1.0, 0.3)
    assert torch.equal(once, often) and once[1] == LOGITS[1] and bool((once != LOGITS)[[0, 2]].all())
    assert torch.equal(LOGITS, before)
    # Rewards of outcomes that were not drawn play no part.
    other = natural_step(LOGITS, torch.tensor([2, 0]), S0, vector(0, 99, 2), 1.0, 0.3)
    assert torch.equal(once, other)


def test_natural_steps_stay_on_the_tilt_path():
    # From p with step h, after k steps: the tilt at inverse temperature (1 - (1 - h beta)^k) / beta.
    theta = S0
    for k in range(1, 14):
        theta = natural_step(theta, torch.arange(3), S0, S0_REWARDS, 0.5, 0.1)
        eta = (1 - (1 - 0.1 * 0.5) ** k) / 0.5
        close(torch.log_softmax(theta, 0), tilt(S0, S0_REWARDS, 1 / eta))
    assert eta == pytest.approx(0.973316, abs=5e-7)
    close(torch.softmax(theta, 0), vector(0.185527, 0.294622, 0.519851), 5e-7)
    at_once = natural_step(LOGITS, torch.arange(3), S0, S0_REWARDS, 0.5, 2.0)
    close(torch.log_softmax(at_once, 0), tilt(S0, S0_REWARDS, 0.5))


@pytest.mark.parametrize("step", [0.0, -0.1, 4.0, 5.0, math.nan, math.inf])
def test_natural_step_refuses_steps_that_diverge(step):
    with pytest.raises(ValueError, match=r"step must lie in \(0, 2 / beta\) = \(0, 4\), got"):
        natural_step(LOGITS, torch.arange(3), S0, S0_REWARDS, 0.5, step)
    natural_step(LOGITS, torch.arange(3), S0, S0_REWARDS, 0.5, 3.999)


@pytest.mark.parametrize("dtype", DTYPES)
def test_natural_step_rounds_once(dtype):
    ref = S0.to(dtype)
    arguments = LOGITS.to(dtype), ref, S0_REWARDS.to(dtype)
    moved = natural_step(arguments[0], torch.arange(3), *arguments[1:], 0.7, 0.3)
    theta, log_p, r = (x.double() for x in arguments)
    assert moved.dtype == dtype and torch.equal(moved, (theta + 0.3 * (r - 0.7 * (theta - log_p))).to(dtype))


@pytest.mark.parametrize("beta", [1e-300, 1e-5, 1e5, 1e300])
def test_natural_step_at_any_temperature(beta):
    """Half of the way to log p + r / beta, which is log p where beta is large."""
    rewards = beta * S0_REWARDS
    moved = natural_step(LOGITS, torch.arange(3), S0, rewards, beta, 0.5 / beta)
    close(moved, (LOGITS + S0 + S0_REWARDS) / 2)


def test_natural_step_of_numpy_numbers():
    expected = natural_step(LOGITS, torch.arange(3), S0, S0_REWARDS, 0.5, 0.25)
    for kind in (np.float32, np.float64):
        assert torch.equal(natural_step(LOGITS, torch.arange(3), S0, S0_REWARDS, kind(0.5), kind(0.25)), expected)


@pytest.mark.parametrize("step", [torch.tensor(0.5), "0.5", None, [0.5], True])
def test_steps_that_are_no_numbers(step):
    with pytest.raises(TypeError, match="^step must be a number, got"):
        natural_step(LOGITS, torch.arange(3), S0, S0_REWARDS, 1.0, step)


def test_steps_that_the_dtype_cannot_hold():
    with pytest.raises(ValueError, match="^the new logits must be finite, got 1 of 3"):
        natural_step(LOGITS.half(), torch.arange(3), S0.half(), vector(0, 1, 6e4).half(), 0.1, 15.0)


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"logits": [0.0]}, TypeError, "logits must be a floating-point torch.Tensor"),
        ({"logits": vector(0, 1, -math.inf)}, ValueError, "logits must be finite, got 1 of 3"),
        ({"rewards": vector(0, 1, math.nan)}, ValueError, "rewards must be finite, got 1 of 3"),
        ({"rewards": torch.arange(3)}, TypeError, "rewards must be a floating-point torch.Tensor"),
        ({"ref_logps": LOGITS}, ValueError, "ref_logps must be log-probabilities that sum to 1"),
        ({"ref_logps": law(0.5, 0.5, 0)}, ValueError, "ref_logps must be finite, got 1 of 3"),
        ({"rewards": vector(0, 1)}, ValueError, "logits and ref_logps and rewards must have one shape"),
        ({"ref_logps": law(0.5, 0.5)}, ValueError, "logits and ref_logps and rewards must have one shape"),
        ({"beta": 0.0}, ValueError, "beta must be finite and > 0, got 0.0"),
        ({"beta": math.nan}, ValueError, "beta must be finite and > 0, got nan"),
        ({"beta": torch.tensor(1.0)}, TypeError, "beta must be a number, got a torch.float32 tensor"),
    ],
)
def test_bad_natural_steps(change, error, text):
    arguments = {"logits": LOGITS, "ref_logps": S0, "rewards": S0_REWARDS, "beta": 1.0, **change}
    with pytest.raises(error, match=text):
        natural_step(outcomes=torch.arange(3), step=0.1, **arguments)


# --- transformer: its law --------------------------------------------------------------------------------------------


def random_chain(v, order, rng):
    return MarkovChain(torch.stack([random_law(v, rng) for _ in range(v**order)]), "abcdef"[: v - 1] + " ")


def perturbed(policy, rng, size=0.5):
    """A policy that has learned something, no matter what: every parameter moves, none stays at its first value."""
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter += size * torch.randn(parameter.shape, generator=rng) / math.sqrt(parameter.shape[-1])
        policy.head.weight += size * torch.randn(policy.head.weight.shape, generator=rng)
    return policy


def small_policy(ref, length, rng, **options):
    return TransformerPolicy(ref, length, generator=rng, **{"layers": 2, "width": 16, "heads": 2, **options})


REFERENCES = {
    "order 1": lambda rng: random_chain(3, 1, rng),
    "order 2": lambda rng: random_chain(3, 2, rng),
    "tilted": lambda rng: random_chain(3, 2, rng).tilt(torch.randn(9, 3, generator=rng, dtype=F64), 0.7, 4),
}


@pytest.mark.parametrize("kind", REFERENCES)
def test_transformer_starts_at_the_reference(kind, rng):
    ref = REFERENCES[kind](rng)
    policy = small_policy(ref, 4, rng)
    strings = all_strings(3, 4)
    close(policy.logps(strings), ref.logps(strings))
    assert policy.logps(strings).dtype == F64 and {p.dtype for p in policy.parameters()} == {torch.float32}
    # It can leave: the first gradient is not zero, and it is all in the last layer.
    policy.logps(strings[5]).backward()
    assert policy.head.weight.grad.abs().max() > 1e-3 and policy.head.bias.grad.abs().max() > 1e-3
    # Equal logits is what the head starts with, not what it is forced to.
    assert not torch.allclose(perturbed(policy, rng).logps(strings), ref.logps(strings), atol=0.05)


@pytest.mark.parametrize("kind", REFERENCES)
def test_transformer_is_a_law(kind, rng):
    ref = REFERENCES[kind](rng)
    policy = perturbed(small_policy(ref, 4, rng), rng)
    strings = all_strings(3, 4)
    conditionals = policy.conditionals(strings)
    assert conditionals.shape == (81, 4, 3) and conditionals.dtype == F64
    close(conditionals.logsumexp(-1), torch.zeros(81, 4, dtype=F64))
    close(policy.logps(strings).logsumexp(0).item(), 0.0, 1e-6)  # conditionals of one prefix agree to float32
    tokens = policy.token_logps(strings)
    close(tokens, conditionals.gather(-1, strings[..., None])[..., 0])
    close(tokens.sum(-1), policy.logps(strings))


@pytest.mark.parametrize("kind", REFERENCES)
def test_network_is_added_to_the_logits_of_the_reference(kind, rng):
    """log pi - log p is the output of the network minus a constant per position, whatever the reference."""
    ref = REFERENCES[kind](rng)
    policy = perturbed(small_policy(ref, 4, rng), rng)
    strings = all_strings(3, 4)
    flat = TransformerPolicy(
        MarkovChain(law(1 / 3, 1 / 3, 1 / 3).expand(3, 3), "ab "), 4, generator=rng, layers=2, width=16, heads=2
    )
    flat.load_state_dict(policy.state_dict())
    of_ref = torch.stack([ref.table(t)[c] for t, c in enumerate(ref.contexts_before(strings).unbind(-1))], 1)
    expected = torch.log_softmax(of_ref + flat.conditionals(strings), -1)
    close(policy.conditionals(strings), expected, 1e-6)


def test_transformer_is_causal_and_looks_at_the_whole_prefix(rng):
    """Changing symbol s changes the conditionals after it, all of them, and none up to it."""
    policy = perturbed(small_policy(random_chain(3, 1, rng), 5, rng), rng)
    strings = all_strings(3, 5)[::7]
    before = policy.conditionals(strings)
    for s in range(5):
        other = strings.clone()
        other[:, s] = (other[:, s] + 1) % 3
        change = (policy.conditionals(other) - before).abs().amax((0, 2))
        assert change[: s + 1].max().item() <= 1e-6
        assert s == 4 or change[s + 1 :].min().item() >= 1e-3


def test_transformer_knows_where_it_is(rng):
    """The same symbols at every position, so that only the places differ; without them all positions agree."""
    policy = perturbed(small_policy(MarkovChain(law(0.2, 0.8).expand(2, 2), "a "), 4, rng), rng)
    with torch.no_grad():
        policy.symbols[:] = policy.symbols[0]
    string = torch.zeros(4, dtype=torch.int64)
    rows = policy.conditionals(string)
    assert (rows[1:] - rows[:-1]).abs().amax(-1).min().item() >= 1e-3
    with torch.no_grad():
        policy.places[:] = 0
    rows = policy.conditionals(string)
    close(rows, rows[:1].expand(4, 2), 1e-5)


def test_blocks_add_to_what_comes_in(rng):
    """With nothing to add, the network sees the last symbol and the place alone."""
    policy = perturbed(small_policy(random_chain(3, 1, rng), 4, rng), rng)
    strings = all_strings(3, 4)
    with torch.no_grad():
        for block in policy.blocks:
            for layer in (block.out, block.down):
                layer.weight[:] = 0
                layer.bias[:] = 0
        last = torch.nn.functional.pad(strings[:, :-1], (1, 0), value=3)
        added = policy.head(policy.last(policy.symbols[last] + policy.places))
    expected = torch.log_softmax(policy.ref.table(0)[last.clamp(max=2)] + added, -1)
    close(policy.conditionals(strings), expected, 1e-6)


def test_every_parameter_is_used(rng):
    policy = perturbed(small_policy(random_chain(3, 1, rng), 4, rng), rng)
    policy.logps(all_strings(3, 4)).square().sum().backward()
    for name, parameter in policy.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 1e-5, name
    assert bool((policy.places.grad.abs().amax(-1) > 1e-4).all())  # one row per position
    assert bool((policy.symbols.grad.abs().amax(-1) > 1e-4).all())  # one per symbol, and one for the start
    assert policy.symbols.shape == (4, 16) and policy.places.shape == (4, 16)


def test_sizes_are_what_they_say(rng):
    policy = TransformerPolicy(random_chain(3, 1, rng), 7, generator=rng, layers=3, width=12, heads=4)
    assert len(policy.blocks) == 3 and policy.symbols.shape == (4, 12) and policy.places.shape == (7, 12)
    default = TransformerPolicy(random_chain(3, 1, rng), 2, generator=rng)
    assert len(default.blocks) == 2 and default.symbols.shape == (4, 64)
    # With one symbol seen twice, the number of heads changes the attention: same weights, other law.
    one, two = (perturbed(small_policy(random_chain(3, 1, rng), 4, rng, heads=h), rng) for h in (1, 2))
    two.ref = one.ref
    two.load_state_dict(one.state_dict())
    strings = all_strings(3, 4)
    assert not torch.allclose(one.logps(strings), two.logps(strings), atol=1e-3)


def test_gradient_of_the_transformer_is_that_of_its_law(rng):
    """Sum of pi = 1: the mean of the score over all strings is zero. And a step along a gradient raises the value."""
    policy = perturbed(small_policy(random_chain(3, 1, rng), 3, rng), rng)
    strings = all_strings(3, 3)
    logps = policy.logps(strings)
    score = torch.autograd.grad((logps.detach().exp() * logps).sum(), list(policy.parameters()))
    assert max(g.abs().max().item() for g in score) <= 1e-6
    gradient = torch.autograd.grad(policy.logps(strings[5]), list(policy.parameters()))
    with torch.no_grad():
        before = policy.logps(strings[5])
        for parameter, g in zip(policy.parameters(), gradient, strict=True):
            parameter += 1e-5 * g
        gain = (policy.logps(strings[5]) - before).item()
    assert gain == pytest.approx(1e-5 * sum(g.square().sum().item() for g in gradient), rel=0.02)


def test_float32_reference(rng):
    ref = random_chain(3, 2, rng)
    small = MarkovChain(ref.table(0).float(), ref.alphabet)
    policy = perturbed(small_policy(ref, 3, rng), rng)
    other = small_policy(small, 3, rng)
    other.load_state_dict(policy.state_dict())
    strings = all_strings(3, 3)
    assert other.logps(strings).dtype == F64
    torch.testing.assert_close(other.logps(strings), policy.logps(strings), rtol=1e-5, atol=1e-5)
    assert other.sample(5, generator=rng).shape == (5, 3)


@pytest.mark.parametrize("dtype", DTYPES)
def test_reference_of_any_dtype(dtype, rng):
    """Everything is computed in float64, from the rows of the chain."""
    ref = random_chain(3, 2, rng)
    narrow = MarkovChain(ref.table(0).to(dtype), ref.alphabet)
    wide = MarkovChain(torch.log_softmax(narrow.table(0).double(), -1), ref.alphabet)
    policy, other = (small_policy(r, 3, rng) for r in (narrow, wide))
    other.load_state_dict(perturbed(policy, rng).state_dict())
    strings = all_strings(3, 3)
    for name in ("conditionals", "token_logps", "logps"):
        out, expected = getattr(policy, name)(strings), getattr(other, name)(strings)
        assert out.dtype == F64 and torch.equal(out, expected)
    state = rng.get_state()
    drawn = policy.sample(300, generator=rng)
    rng.set_state(state)
    assert torch.equal(drawn, other.sample(300, generator=rng))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, F64])
def test_the_default_dtype_plays_no_part(dtype):
    def made():
        rng = torch.Generator().manual_seed(1)
        policy = small_policy(random_chain(3, 1, rng), 3, rng)
        assert {p.dtype for p in policy.parameters()} == {torch.float32}
        moved = natural_step(LOGITS, torch.arange(3), S0, S0_REWARDS, 0.5, 0.3)
        return [
            *policy.parameters(),
            policy.logps(all_strings(3, 3)),
            policy.sample(9, generator=rng),
            TabularPolicy(LOGITS).law(),
            moved,
        ]

    assert_same_under_default_dtype(made, dtype)


def test_batch_shapes_and_prefixes(rng):
    policy = perturbed(small_policy(random_chain(3, 2, rng), 4, rng), rng)
    strings = torch.randint(3, (2, 5, 4), generator=rng)
    before = strings.clone()
    conditionals, tokens, whole = (f(strings) for f in (policy.conditionals, policy.token_logps, policy.logps))
    assert conditionals.shape == (2, 5, 4, 3) and tokens.shape == (2, 5, 4) and whole.shape == (2, 5)
    for i, j in itertools.product(range(2), range(5)):
        close(policy.conditionals(strings[i, j]), conditionals[i, j], 1e-5)
        close(policy.logps(strings[i, j]), whole[i, j], 1e-5)
    for length in (1, 2, 3):
        close(policy.conditionals(strings[..., :length]), conditionals[:, :, :length], 1e-5)
        close(policy.logps(strings[..., :length]), tokens[..., :length].sum(-1), 1e-5)
    for dtype in (torch.uint8, torch.int32):
        close(policy.logps(strings.to(dtype)), whole, 1e-6)
    close(policy.logps(strings.transpose(0, 1)), whole.transpose(0, 1), 1e-5)
    assert torch.equal(strings, before)


def test_excluded_symbols_stay_excluded(rng):
    # After b never b, and a string never starts with the separator: 27 strings lose some.
    ref = MarkovChain(torch.stack([law(0.2, 0.5, 0.3), law(0.6, 0, 0.4), law(0.5, 0.5, 0)]), "ab ")
    policy = perturbed(small_policy(ref, 3, rng), rng, 0.2)
    strings = all_strings(3, 3)
    gone = ref.logps(strings) == -math.inf
    assert 0 < int(gone.sum()) < 27
    logps = policy.logps(strings)
    assert torch.equal(logps == -math.inf, gone)
    close(logps[~gone].logsumexp(0).item(), 0.0, 1e-6)
    drawn = policy.sample(3000, generator=rng)
    assert not bool(gone[string_number(drawn, 3)].any())
    assert len(string_number(drawn, 3).unique()) == int((~gone).sum())
    logps[~gone].sum().backward()
    for parameter in policy.parameters():
        assert bool(parameter.grad.isfinite().all())
    policy.zero_grad()
    losses.self_certainty(policy.conditionals(drawn)).mean().backward()
    assert all(bool(p.grad.isfinite().all()) for p in policy.parameters())


# --- transformer: its draws ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", REFERENCES)
def test_draws_use_the_very_conditionals_of_a_full_pass(kind, rng, monkeypatch):
    """Keys and values kept from earlier steps must give the logits of a pass over the whole string, at every step."""
    policy = perturbed(small_policy(REFERENCES[kind](rng), 4, rng, layers=3), rng)
    used = []

    def spy(logps, n, *, generator):
        used.append(logps)
        return categorical_sample(logps, n, generator=generator)

    categorical_sample = categorical.sample
    monkeypatch.setattr(policies.categorical, "sample", spy)
    drawn = policy.sample(200, generator=rng)
    assert len(used) == 4 and not any(logps.requires_grad for logps in used)
    torch.testing.assert_close(torch.stack(used, 1), policy.conditionals(drawn), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", REFERENCES)
def test_draws_from_the_same_uniforms_are_the_same_strings(kind, rng):
    """Draw once more, with a full pass of the network at every step instead of what was kept."""
    policy = perturbed(small_policy(REFERENCES[kind](rng), 4, rng), rng)
    state = rng.get_state()
    drawn = policy.sample(300, generator=rng)
    rng.set_state(state)
    again = torch.zeros(300, 0, dtype=torch.int64)
    for t in range(4):
        padded = torch.cat([again, torch.zeros(300, 1, dtype=torch.int64)], 1)
        conditionals = policy.conditionals(padded)[:, t].detach()
        again = torch.cat([again, categorical.sample(conditionals, 1, generator=rng)], 1)
    assert torch.equal(again, drawn) and drawn.dtype == torch.int64 and not drawn.requires_grad


@pytest.mark.parametrize("kind", REFERENCES)
def test_draws_follow_the_law(kind, rng):
    ref = REFERENCES[kind](rng)
    policy = perturbed(small_policy(ref, 3 if kind != "tilted" else 4, rng), rng)
    strings = all_strings(3, policy.length)
    target = policy.logps(strings).detach().double()
    target = target - target.logsumexp(0)
    start = ref.logps(strings)

    def of_ref(n, generator):
        return string_number(ref.sample(n, policy.length, generator=generator), 3)

    wrong = {"reference": (of_ref, start - start.logsumexp(0))}
    check_sampler(lambda n, g: string_number(policy.sample(n, generator=g), 3), target, wrong, rng)


def test_a_copy_is_a_policy_of_its_own(rng):
    policy = perturbed(small_policy(random_chain(3, 1, rng), 3, rng), rng)
    frozen, strings = copy.deepcopy(policy), all_strings(3, 3)
    before = policy.logps(strings).detach()
    perturbed(policy, rng)
    assert torch.equal(frozen.logps(strings), before) and not torch.allclose(policy.logps(strings), before, atol=0.01)


# --- transformer: errors ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"length": 0}, ValueError, "length must be an integer >= 1, got 0"),
        ({"length": 2.0}, TypeError, "length must be an int, got float"),
        ({"layers": 0}, ValueError, "layers must be an integer >= 1, got 0"),
        ({"layers": True}, TypeError, "layers must be an int, got bool"),
        ({"width": 0}, ValueError, "width must be an integer >= 1, got 0"),
        ({"heads": 0}, ValueError, "heads must be an integer >= 1, got 0"),
        ({"width": 10, "heads": 4}, ValueError, "width must be a multiple of heads = 4, got 10"),
    ],
)
def test_bad_sizes(change, error, text, rng):
    with pytest.raises(error, match=text):
        TransformerPolicy(random_chain(2, 1, rng), **{"length": 2, "generator": rng, **change})


def test_sizes_of_numpy_are_sizes(rng):
    ref, state = random_chain(3, 1, rng), rng.get_state()
    policy = TransformerPolicy(
        ref, np.int64(3), generator=rng, layers=np.int32(1), width=np.int8(100), heads=np.int64(2)
    )
    drawn = policy.sample(np.int64(5), generator=rng)
    rng.set_state(state)
    other = TransformerPolicy(ref, 3, generator=rng, layers=1, width=100, heads=2)
    assert torch.equal(drawn, other.sample(5, generator=rng)) and drawn.shape == (5, 3)
    assert TabularPolicy(LOGITS).sample(np.int64(5), generator=rng).shape == (5,)


@pytest.mark.parametrize("generator", [None, 7])
def test_bad_generators(generator, rng):
    ref = random_chain(2, 1, rng)
    policy = small_policy(ref, 2, rng)
    for call in (
        lambda: TransformerPolicy(ref, 2, generator=generator),
        lambda: policy.sample(3, generator=generator),
        lambda: TabularPolicy(LOGITS).sample(3, generator=generator),
    ):
        with pytest.raises(TypeError, match=f"^generator must be a torch.Generator, got {type(generator).__name__}"):
            call()


@pytest.mark.parametrize(
    ("tokens", "error", "text"),
    [
        (torch.zeros(2, 4, dtype=torch.int64), ValueError, r"tokens must have at most 3 positions, got shape \(2, 4\)"),
        (torch.tensor([0, 3]), ValueError, "tokens must lie in 0..2, got 0 to 3"),
        (torch.tensor([-1, 0]), ValueError, "tokens must lie in 0..2, got -1 to 0"),
        (vector(0, 1), TypeError, "tokens must be an integer torch.Tensor, got a torch.float64 tensor"),
        ([0, 1], TypeError, "tokens must be an integer torch.Tensor, got list"),
        (torch.zeros(2, 0, dtype=torch.int64), ValueError, "tokens must hold at least one number"),
        (torch.tensor(0), ValueError, "tokens must have a last dimension, the positions of a string"),
    ],
)
@pytest.mark.parametrize("name", ["conditionals", "token_logps", "logps"])
def test_bad_tokens(name, tokens, error, text, rng):
    with pytest.raises(error, match=text):
        getattr(small_policy(random_chain(3, 1, rng), 3, rng), name)(tokens)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("where", ["symbols", "head.bias", "blocks.0.qkv.weight"])
def test_transformer_says_that_training_has_diverged(where, value, rng):
    policy = perturbed(small_policy(random_chain(3, 1, rng), 3, rng), rng)
    with torch.no_grad():
        dict(policy.named_parameters())[where].fill_(value)
    text = "logits must be finite, got NaN or inf: training has diverged, lower the learning rate"
    for call in (lambda: policy.conditionals(all_strings(3, 3)), lambda: policy.sample(2, generator=rng)):
        with pytest.raises(ValueError, match=text):
            call()


# --- training to the target ------------------------------------------------------------------------------------------
# Each run ends close to the tilt, and further than that from the tilt at a temperature that is 10 per cent off.

K, BETA = 64, 0.8


def arrives(logps, target, near_miss, tolerance):
    logps = logps.detach()
    assert kl(logps, target).item() <= tolerance
    assert min(kl(logps, wrong).item() for wrong in near_miss) > 2 * tolerance


def tabular_instance(rng):
    ref = torch.log_softmax(torch.randn(K, generator=rng, dtype=F64), -1)
    rewards = 1.6 * torch.randn(K, generator=rng, dtype=F64)
    return ref, rewards, tilt(ref, rewards, BETA), [tilt(ref, rewards, BETA * x) for x in (1.1, 1 / 1.1)]


def train(policy, loss, steps, lr):
    optimiser = torch.optim.Adam(policy.parameters(), lr=lr)
    for _ in range(steps):
        optimiser.zero_grad()
        loss().mean().backward()
        optimiser.step()


@pytest.mark.slow
def test_rloo_trains_to_the_tilt(rng):
    ref, rewards, target, near_miss = tabular_instance(rng)
    policy = TabularPolicy(ref)

    def loss():
        y = policy.sample(256, generator=rng).view(64, 4)
        return losses.rloo(policy.logps(y), ref[y], rewards[y], BETA)

    train(policy, loss, 500, 0.1)
    arrives(policy.law(), target, near_miss, 1e-3)


@pytest.mark.slow
def test_policy_gradient_trains_to_the_tilt(rng):
    ref, rewards, target, near_miss = tabular_instance(rng)
    policy = TabularPolicy(ref)
    level = BETA * categorical.log_partition(ref, rewards, BETA).item()  # the bracket's value at the tilt

    def loss():
        y = policy.sample(256, generator=rng)
        return losses.policy_gradient(policy.logps(y), ref[y], rewards[y], BETA, baseline=level)

    train(policy, loss, 500, 0.1)
    arrives(policy.law(), target, near_miss, 1e-3)


def test_dpo_trains_to_the_tilt(rng):
    ref, rewards, target, near_miss = tabular_instance(rng)
    policy = TabularPolicy(ref)

    def loss():
        a, b = torch.randint(K, (2, 256), generator=rng)
        labels = torch.sigmoid(rewards[a] - rewards[b])
        return losses.dpo(policy.logps(a), policy.logps(b), ref[a], ref[b], BETA, labels)

    train(policy, loss, 200, 0.3)
    arrives(policy.law(), target, near_miss, 1e-3)


def test_natural_steps_train_to_the_tilt(rng):
    ref, rewards, target, near_miss = tabular_instance(rng)
    theta = ref
    for _ in range(400):
        y = categorical.sample(torch.log_softmax(theta, -1), 64, generator=rng)
        theta = natural_step(theta, y, ref, rewards, BETA, 0.5 / BETA)
    arrives(torch.log_softmax(theta, -1), target, near_miss, 1e-3)


def test_weighted_likelihood_trains_to_the_tilt(rng):
    ref, rewards, target, near_miss = tabular_instance(rng)
    policy = TabularPolicy(ref)

    def loss():  # the pool of all outcomes, each with its mass, which is N p w / N
        return losses.weighted_likelihood(policy.law(), ref + rewards / BETA)

    train(policy, loss, 300, 0.3)
    arrives(policy.law(), target, near_miss, 1e-3)


@pytest.mark.parametrize("kind", ["rloo", "grpo"])
@pytest.mark.slow
def test_a_transformer_trains_to_the_tilt_of_its_chain(kind, rng):
    ref = MarkovChain(torch.stack([law(0.5, 0.3, 0.2), law(0.2, 0.5, 0.3), law(0.3, 0.3, 0.4)]), "ab ")
    rewards = torch.tensor([[0, 1, 2], [2, 0, 1], [1, 2, 0]], dtype=F64)
    strings = all_strings(3, 3)
    target, *near_miss = (ref.tilt(rewards, BETA * x, 3).logps(strings) for x in (1, 1.1, 1 / 1.1))
    policy = small_policy(ref, 3, rng, layers=1)

    def loss():
        y = policy.sample(128, generator=rng)
        r = ref.total_reward(y, rewards).view(-1, 4)
        if kind == "rloo":
            return losses.rloo(policy.logps(y).view(-1, 4), ref.logps(y).view(-1, 4), r, BETA)
        with torch.no_grad():
            of_ref = small_policy(ref, 3, torch.Generator()).token_logps(y)
        tokens = (x.view(-1, 4, 3) for x in (policy.token_logps(y), of_ref))
        return losses.grpo(*tokens, r, BETA, kl="reward", scale="none")

    assert kl(policy.logps(strings).detach(), target).item() > 0.1
    train(policy, loss, 200, 0.005)
    with torch.no_grad():
        logps = policy.logps(strings)
    arrives(logps - logps.logsumexp(0), target, near_miss, 1e-3)


def test_natural_step_wants_one_row_of_one_dtype():
    y = torch.tensor([0])
    with pytest.raises(ValueError, match=r"must have shape \(K,\) and one dtype, got shape \(2, 3\)"):
        natural_step(S0.expand(2, 3), y, S0.expand(2, 3), S0_REWARDS.expand(2, 3), 1.0, 0.5)
    with pytest.raises(ValueError, match="one dtype"):
        natural_step(S0.float(), y, S0, S0_REWARDS, 1.0, 0.5)


def test_a_tilted_reference_must_be_long_enough(rng):
    chain = MarkovChain(law(0.4, 0.3, 0.3).expand(3, 3), "ab ").tilt(vector(0, 1, 0), 1.0, 3)
    with pytest.raises(ValueError, match="length must be at most 3, the length of the reference, got 4"):
        TransformerPolicy(chain, 4, generator=rng, width=8, heads=2)


# --- edges -----------------------------------------------------------------------------------------------------------


def test_a_block_is_the_pre_norm_layer_of_pytorch(rng):
    ours = policies._Block(12, 3, torch.device("cpu"), rng)
    theirs = torch.nn.TransformerEncoderLayer(
        12, 3, 48, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
    )
    same = {
        "self_attn.in_proj": ours.qkv,
        "self_attn.out_proj": ours.out,
        "linear1": ours.up,
        "linear2": ours.down,
        "norm1": ours.before_attention,
        "norm2": ours.before_mlp,
    }
    with torch.no_grad():
        for name, layer in same.items():
            for kind in ("weight", "bias"):
                value = getattr(layer, kind)
                value += 0.3 * torch.randn(value.shape, generator=rng)
                joint = "_" if "in_proj" in name else "."
                theirs.get_parameter(f"{name}{joint}{kind}").copy_(value)
        x = torch.randn(2, 5, 12, generator=rng)
        mask = torch.nn.Transformer.generate_square_subsequent_mask(5)
        torch.testing.assert_close(ours(x, None)[0], theirs(x, src_mask=mask, is_causal=True), rtol=1e-4, atol=1e-5)


def test_embeddings_start_at_unit_length(rng):
    chain, state = random_chain(3, 1, rng), rng.get_state()
    policy = TransformerPolicy(chain, 3, generator=rng, width=16)
    rng.set_state(state)
    for entries in (policy.symbols, policy.places):
        assert torch.equal(entries, torch.randn(entries.shape, generator=rng, dtype=torch.float32) / 4)


# --- token by token --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seen", [False, True])
def test_strings_that_are_copied_go_on_as_they_were(seen, rng):
    """Rows of taken strings are those of `conditionals`, whether the state was read before or not."""
    chain = MarkovChain.fit(["ab", "abba", "b"], torch.ones(3), 2, alphabet="ab ")
    policy = policies.TransformerPolicy(chain, 4, generator=rng, width=16, heads=2)
    with torch.no_grad():
        policy.head.weight.normal_(generator=rng)
        policy.head.weight *= 2
    strings = chain.sample(5, 4, generator=rng)
    state = policy.begin(5)
    for t in range(4):
        if seen:
            policy.next_logps(state)
        index = torch.tensor([3, 3, 0, 4, 1, 2])
        copied = policy.take(state, index)
        rows = policy.conditionals(strings)[:, t].detach()
        torch.testing.assert_close(policy.next_logps(copied), rows[index], rtol=1e-4, atol=1e-4)
        if t < 3:
            longer = policy.append(copied, strings[index, t])
            after = policy.conditionals(strings)[index, t + 1].detach()
            torch.testing.assert_close(policy.next_logps(longer), after, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(policy.next_logps(state), rows, rtol=1e-4, atol=1e-4)
        state = policy.append(state, strings[:, t])
    with pytest.raises(ValueError, match="^state must hold strings of fewer than 4 symbols, got 4$"):
        policy.next_logps(state)


def test_strings_may_be_shorter_than_the_policy_can_write(rng):
    chain = MarkovChain.fit(["ab", "abba", "b"], torch.ones(3), 2, alphabet="ab ")
    policy = policies.TransformerPolicy(chain, 4, generator=rng, width=16, heads=2)
    long, short = (policy.sample(7, n, generator=torch.Generator().manual_seed(1)) for n in (None, 2))
    assert long.shape == (7, 4) and torch.equal(short, long[:, :2])
