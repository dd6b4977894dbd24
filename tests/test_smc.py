"""Particles: E exp(log_partition) by enumeration of whole particle systems, ancestry, laws of draws, refusals."""

import itertools
import math

import numpy as np
import pytest
import torch
from helpers import F64, law, random_law, vector

from tiltlib import markov, resampling, smc, stepwise, verify, weights

# Two binary symbols after a start: p1 = (.6, .4), p2 = ((.7, .3), (.2, .8)), weights ((1, 3), (.5, 4)) at the end.
REF = markov.MarkovChain(torch.stack([law(0.7, 0.3, 0), law(0.2, 0.8, 0), law(0.6, 0.4, 0)]), "ab|")
REWARDS = torch.stack([vector(1, 3, 1), vector(0.5, 4, 1), vector(1, 1, 1)]).log()
# Z = .42 * 1 + .18 * 3 + .08 * .5 + .32 * 4
Z = 2.28
TWISTS = torch.stack([vector(1, 1, 1), vector(1, 3, 1), vector(1, 1, 1)]).log()
NONE = torch.zeros(3, 3, dtype=F64)
SCHEMES = [resampling.multinomial, resampling.residual, resampling.stratified, resampling.systematic]
N = 3


def twisted_smc(ref, rewards, beta, log_values, n, **options):
    """The sampler with twists from a table."""
    gain = stepwise.gain(ref, rewards, beta, log_values, options.get("proposal"))
    return smc.twisted_smc(ref, gain, len(log_values) - 1, n, **options)


def close(a, b, tolerance=1e-12):
    torch.testing.assert_close(torch.as_tensor(a, dtype=F64), torch.as_tensor(b, dtype=F64), rtol=0, atol=tolerance)


class Prescribed(markov.MarkovChain):
    """The reference, except that its draws are given beforehand."""

    def __init__(self, symbols):
        super().__init__(REF.table(0), REF.alphabet)
        self.symbols = symbols

    def draw(self, state, *, generator):
        return self.symbols[state.step].flatten()


def every_system(twists, threshold, ancestors_law=None, wrong=None):
    """Run the code on every outcome of N particles and multinomial resampling; return E exp(log_partition)."""
    pick = list(itertools.product(range(2), repeat=N))
    parents = list(itertools.product(range(N), repeat=N))
    cases = list(itertools.product(pick, parents, pick))
    first, chosen, second = (torch.tensor([case[i] for case in cases]) for i in range(3))
    out = twisted_smc(
        REF,
        REWARDS,
        1.0,
        twists,
        N,
        generator=torch.Generator(),
        proposal=Prescribed([first, second]),
        threshold=threshold,
        scheme=lambda log_weights, n, generator: chosen,
        runs=len(cases),
    )
    # The weights after the first symbol, from the definition: r = 0 there, so exp(V_1(a) - V_0).
    w = (twists[1] - twists[0, 2]).exp()[first]
    share = w / w.sum(-1, keepdim=True)
    uneven = w.sum(-1) ** 2 / (w**2).sum(-1) < threshold * N - 1e-9
    law_of_parents = ancestors_law(w, chosen) if ancestors_law else share.gather(-1, chosen).prod(-1)
    # A system that does not resample has no parents to draw: each of the N^N cases takes its share.
    mass = torch.where(uneven, law_of_parents, 1 / N**N)
    mass = mass * REF.table(0)[2].exp()[first].prod(-1)
    started = torch.where(uneven[:, None], first.gather(-1, chosen), first)
    mass = mass * REF.table(1).exp()[started, second].prod(-1)
    close(mass.sum(), 1.0)
    assert torch.equal(out.particles, torch.stack([started, second], -1))
    z = out.log_partition.exp()
    if wrong == "dropped":  # count the mean of the first weights, and forget them, where nothing was resampled
        g = REWARDS.exp()[first, second] / twists[1].exp()[first]
        z = torch.where(uneven, z, w.mean(-1) * g.mean(-1))
    return (mass * z).sum()


@pytest.mark.parametrize("threshold", [0.0, 0.5, 0.8, 1.0])
@pytest.mark.parametrize("twists", [NONE, TWISTS, REF.soft_values(REWARDS, 1.0, 2)], ids=["none", "some", "exact"])
def test_the_estimate_of_z_is_unbiased(twists, threshold):
    close(every_system(twists, threshold), Z)


def test_wrong_estimates_are_seen():
    close(every_system(TWISTS, 0.8, wrong="dropped"), 2.344)

    def keeps_the_better_half(w, chosen):
        """The top two of three, by weight, and of those the first again: no unbiased scheme."""
        order = torch.sort(w, dim=-1, descending=True, stable=True).indices
        return (chosen == torch.stack([order[:, 0], order[:, 1], order[:, 0]], -1)).all(-1).double()

    off = every_system(TWISTS, 0.8, keeps_the_better_half)
    assert abs(off.item() - Z) > 0.02  # exact, against an error of 1e-12 for unbiased schemes


@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda f: f.__name__)
@pytest.mark.slow
def test_draws_and_z_together_for_every_scheme(scheme, rng):
    """A weighted draw of one string, kept with probability Z_hat / bound, is a draw of the tilt."""
    n, bound = 4, 9.0  # the first weights are at most 3, the second ones too
    # Outcomes: the four strings, or not kept. P(kept, y) = E[Z_hat W_y] / bound = p(y) w(y) / bound.
    joint = vector(0.42, 0.54, 0.04, 1.28) / bound
    target, off = (torch.cat([q, 1 - q.sum(0, keepdim=True)]).log() for q in (joint, joint * 2.344 / Z))
    runs = verify.plan(target, off)
    out = twisted_smc(REF, REWARDS, 1.0, TWISTS, n, generator=rng, scheme=scheme, threshold=0.9, runs=runs)
    z = out.log_partition.exp()
    assert z.max() <= bound
    kept = torch.rand(runs, generator=rng, dtype=F64) * bound < z
    picked = resampling.multinomial(out.log_weights, 1, generator=rng)[:, 0]
    strings = out.particles[torch.arange(runs), picked]
    outcome = torch.where(kept, strings @ torch.tensor([2, 1]), 4)
    verdict = verify.match(outcome, target, claim="smc", versus=[off])
    assert verdict, verdict.line()
    shifted = out.particles[torch.arange(runs), (picked + 1) % n] @ torch.tensor([2, 1])
    assert verify.match(torch.where(kept, shifted, 4), target, claim="smc!shifted").decision == "REJECT"


def random_instance(rng, v=3, order=2, length=5):
    ref = markov.MarkovChain(torch.stack([random_law(v, rng) for _ in range(v**order)]), "abc"[: v - 1] + " ")
    return ref, torch.randn(v**order, v, generator=rng, dtype=F64), length


def test_exact_values_and_their_proposal_leave_nothing_to_chance(rng):
    ref, rewards, length = random_instance(rng)
    values = ref.soft_values(rewards, 0.7, length)
    proposal = stepwise.twisted_proposal(ref, rewards, 0.7, values)
    tilted = ref.tilt(rewards, 0.7, length)
    close(proposal.kl(tilted, length), 0.0)
    # Multinomial resampling would show: systematic resampling of equal weights changes nothing.
    out = twisted_smc(
        ref,
        rewards,
        0.7,
        values,
        7,
        generator=rng,
        proposal=proposal,
        threshold=1.0,
        scheme=resampling.multinomial,
        runs=50,
    )
    close(out.log_partition, values[0, ref.start].expand(50), 1e-10)
    close(out.log_weights, torch.zeros(50, 7), 1e-10)
    close(out.ess, torch.full((50, length), 7.0), 1e-8)
    assert (out.ancestors == torch.arange(7)).all()
    # With proposals from the reference the weights differ: exp(V_t - V_{t-1}).
    assert twisted_smc(ref, rewards, 0.7, values, 7, generator=rng, threshold=0).log_weights.std() > 0.1


def test_without_resampling_weights_are_those_of_the_strings(rng):
    ref, rewards, length = random_instance(rng)
    twists = torch.randn(length + 1, 9, generator=rng, dtype=F64)
    twists[-1] = 0
    proposal = markov.MarkovChain(torch.stack([random_law(3, rng) for _ in range(9)]), ref.alphabet)
    out = twisted_smc(ref, rewards, 0.7, twists, 9, generator=rng, proposal=proposal, threshold=0, runs=4)
    y = out.particles
    w = ref.logps(y) + ref.total_reward(y, rewards) / 0.7 - proposal.logps(y)
    close(out.log_weights + twists[0, ref.start], w, 1e-10)
    close(out.log_partition, weights.log_mean(w), 1e-10)
    close(out.ess[:, -1], weights.ess(w), 1e-8)


def test_trace_follows_parents():
    # Particle 0 ends with parents 1 and then 2; particle 1 with 0 and 0; particle 2 with 1 and 2.
    symbols = torch.tensor([[5, 6, 7], [8, 9, 10], [11, 12, 13]])
    ancestors = torch.tensor([[0, 1, 2], [0, 2, 1], [1, 0, 1]])
    assert smc.trace(symbols, ancestors).tolist() == [[7, 9, 11], [5, 8, 12], [7, 9, 13]]
    assert torch.equal(smc.trace(symbols.expand(4, 3, 3), ancestors.expand(4, 3, 3))[2], smc.trace(symbols, ancestors))


def test_strings_keep_their_own_past(rng):
    """Each string must be one the chain can write: symbols from different parents would not be."""
    table = torch.full((3, 3), -math.inf, dtype=F64)
    table[2, :2] = math.log(0.5)
    table[0, 0] = table[1, 1] = 0  # aaaa or bbbb
    ref = markov.MarkovChain(table, "ab|")
    out = twisted_smc(ref, vector(0, 0.3, 0), 1.0, torch.zeros(7, 3, dtype=F64), 6, generator=rng, threshold=1, runs=80)
    assert (out.particles == out.particles[..., :1]).all()
    assert (out.ancestors[:, 1:] != torch.arange(6)).any()


def test_dead_particles_estimate_zero(rng):
    rewards = vector(-math.inf, 0, 0)  # only "bb" is left, of mass .4 * .8
    out = twisted_smc(REF, rewards, 1.0, NONE, 2, generator=rng, threshold=1, runs=4000)
    dead = out.log_partition == -math.inf
    assert dead.any() and not dead.all()
    assert (out.ess[dead, -1] == 0).all() and (out.log_weights[dead] == -math.inf).all()
    alive = out.log_weights > -math.inf
    assert (out.particles[alive] == 1).all()
    # Z_hat = (k / 2)(j / 2) with resampling between; P(Z_hat > 0) = P(k >= 1) (1 - .2^2), k ~ Bin(2, .4).
    target = vector(0.64 * 0.96, 1 - 0.64 * 0.96).log()
    assert verify.match(dead.long(), target, claim="dead").decision != "REJECT"


def test_weights_are_those_since_the_last_resampling(rng):
    ref, rewards, length = random_instance(rng)
    zeros = torch.zeros(length + 1, 9, dtype=F64)
    out = twisted_smc(ref, rewards, 1.0, zeros, 5, generator=rng, runs=3)
    assert (
        out.particles.shape == (3, 5, length) and out.ancestors.shape == (3, length, 5) and out.ess.shape == (3, length)
    )
    for i in range(3):
        y = out.particles[i]
        # Weights since the last resampling, along the strings that survived.
        last = max(t for t in range(length) if t == 0 or out.ess[i, t - 1] < 0.5 * 5)
        per_symbol = rewards[ref.contexts_before(y), y]
        close(out.log_weights[i], per_symbol[:, last:].sum(-1), 1e-10)


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"threshold": 1.1}, ValueError, r"threshold must lie in \[0, 1\], got 1.1"),
        ({"threshold": math.nan}, ValueError, r"threshold must lie in \[0, 1\], got nan"),
        ({"threshold": None}, TypeError, "threshold must be a number, got NoneType"),
        ({"generator": None}, TypeError, "generator must be a torch.Generator, got NoneType"),
        ({"n": 0}, ValueError, "n must be an integer >= 1, got 0"),
        ({"runs": 1.0}, TypeError, "runs must be an int, got float"),
    ],
)
def test_bad_input(change, error, text):
    with pytest.raises(error, match=text):
        twisted_smc(REF, REWARDS, 1.0, NONE, **{"n": 3, "generator": torch.Generator(), **change})


def test_a_twist_may_vanish_where_the_target_does(rng):
    rewards = vector(-math.inf, 0, 0)
    values = REF.soft_values(rewards, 1.0, 2)
    twists = NONE.clone()
    twists[1, 0] = -math.inf
    runs = 20_000
    for v in (values, twists):
        z = twisted_smc(REF, rewards, 1.0, v, 50, generator=rng, runs=runs).log_partition.exp()
        # Z = .4 * .8. Z_hat lies in [0, 1]: Hoeffding's bound on the error of its mean holds except with chance 1e-8.
        assert z.max() <= 1 + 1e-12
        assert abs(z.mean().item() - 0.32) < math.sqrt(math.log(2 / 1e-8) / (2 * runs))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.uint16, torch.uint32, torch.uint64])
def test_trace_of_any_integers(dtype):
    tokens = torch.tensor([[1, 2, 3], [4, 5, 6]])
    ancestors = torch.tensor([[0, 1, 2], [2, 0, 0]])
    found = smc.trace(tokens.to(dtype), ancestors.to(dtype))
    assert found.dtype == dtype and found.long().tolist() == smc.trace(tokens, ancestors).tolist() == [
        [3, 4],
        [1, 5],
        [1, 6],
    ]


def test_bad_traces():
    with pytest.raises(ValueError, match="tokens and ancestors must have one shape"):
        smc.trace(torch.zeros(2, 3).long(), torch.zeros(3, 2).long())
    with pytest.raises(ValueError, match=r"ancestors must lie in 0\.\.2, got values from 0 to 3"):
        smc.trace(torch.zeros(2, 3).long(), torch.tensor([[0, 1, 2], [0, 1, 3]]))
    for bad in ([[0]], np.zeros((2, 3))):
        with pytest.raises(TypeError, match="ancestors must be an integer torch.Tensor, got"):
            smc.trace(torch.zeros(2, 3).long(), bad)
        with pytest.raises(TypeError, match="tokens must be an integer torch.Tensor, got"):
            smc.trace(bad, torch.zeros(2, 3).long())
    with pytest.raises(ValueError, match=r"tokens must have shape \(\.\.\., L, n\) with L >= 1, got \(3,\)"):
        smc.trace(torch.zeros(3).long(), torch.zeros(3).long())
    with pytest.raises(ValueError, match=r"ancestors must hold at least one number, got shape \(2, 0\)"):
        smc.trace(torch.zeros(2, 0).long(), torch.zeros(2, 0).long())


def test_no_particle_systems_have_no_strings():
    none = torch.zeros(0, 2, 3).long()
    assert smc.trace(none, none).shape == (0, 3, 2) and smc.trace(none, none).dtype == torch.int64


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_particles_of_a_smaller_dtype_are_those_of_the_law_it_means(dtype, rng):
    ref, rewards, length = random_instance(rng)
    table, rewards = ref.table(0).to(dtype), rewards.to(dtype)
    small = markov.MarkovChain(table, ref.alphabet)
    meant = markov.MarkovChain(torch.log_softmax(table.double(), -1), ref.alphabet)
    twists, state = torch.randn(length + 1, 9, generator=rng).to(dtype), rng.get_state()
    twists[-1] = 0
    both = []
    for p, r, v in ((small, rewards, twists), (meant, rewards.double(), twists.double())):
        rng.set_state(state)
        q = stepwise.twisted_proposal(p, r, 0.7, v)
        both.append((*twisted_smc(p, r, 0.7, v, np.int64(9), generator=rng, proposal=q, runs=np.int64(4)), q.table(1)))
    assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(*both, strict=True))


def test_nothing_that_was_drawn_has_a_gradient(rng):
    twists = TWISTS.clone().requires_grad_()
    out = twisted_smc(REF, REWARDS.clone().requires_grad_(), 1.0, twists, 5, generator=rng)
    assert not any(field.requires_grad for field in out)


# --- one table per step, several resamplings -------------------------------------------------------------------------


def stepped_chain(rng, v=3, length=4):
    tables = torch.stack([torch.stack([random_law(v, rng) for _ in range(v)]) for _ in range(length)])
    return markov.MarkovChain(tables, "abc"[: v - 1] + " ")


@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda f: f.__name__)
def test_z_counts_the_mean_weight_of_every_resampling(scheme, rng):
    ref, rewards = stepped_chain(rng, length=6), 2 * torch.randn(3, 3, generator=rng, dtype=F64)
    twists = torch.randn(7, 3, generator=rng, dtype=F64)
    twists[-1] = 0
    spent = []

    def noted(log_weights, n, *, generator):
        spent.append(log_weights)
        return scheme(log_weights, n, generator=generator)

    runs, n = 20, 5
    out = twisted_smc(ref, rewards, 1.0, twists, n, generator=rng, threshold=0.9, scheme=noted, runs=runs)
    # A run that does not resample passes zeros, whose mean weight is 1.
    resampled = torch.stack([(w != 0).any(-1) for w in spent]).sum(0)
    assert len(spent) > 1 and resampled.max() > 2 and resampled.unique().numel() > 1
    expected = twists[0, 2] + sum(w.exp().mean(-1).log() for w in spent) + out.log_weights.exp().mean(-1).log()
    close(out.log_partition, expected, 1e-10)


# --- the largest reward that counts ----------------------------------------------------------------------------------


# --- any gain and any proposal ---------------------------------------------------------------------------------------


def test_a_function_of_the_state_is_asked_once_for_each_state(rng):
    """And the last value is the log weight."""
    seen = []

    def value(state):
        seen.append(state.step)
        return torch.zeros(len(state.contexts)) if state.step < 2 else state.contexts.float()

    out = smc.twisted_smc(REF, smc.by_value(value, REF), 2, 9, generator=rng, threshold=0, runs=3)
    assert out.log_weights.dtype == F64 and seen == [0, 0, 1, 2]
    close(out.log_weights, out.particles[..., 1].double())


def test_what_the_proposal_cannot_write_has_weight_zero(rng):
    """A sampler that does not follow its own law is not believed."""
    stuck = markov.MarkovChain(law(0, 1, 0).expand(3, 3), "ab|")
    stuck.draw = lambda state, *, generator: torch.tensor([0, 1] * 4)
    out = smc.twisted_smc(
        REF, smc.by_value(lambda s: torch.zeros(len(s.contexts)), REF), 1, 8, generator=rng, proposal=stuck
    )
    assert (out.log_weights[0, ::2] == -math.inf).all()
    close(out.log_weights[0, 1::2], torch.full((4,), math.log(0.4), dtype=F64))


def test_refusals_of_models_and_proposals(rng):
    flat = smc.by_value(lambda s: torch.zeros(len(s.contexts)), REF)
    with pytest.raises(TypeError, match="^model must be an AutoregressiveModel, got int"):
        smc.by_value(lambda s: vector(0), 3)
    text = r"^proposal must give as many log-probabilities as model, got shapes \(4, 2\) and \(4, 3\)$"
    with pytest.raises(ValueError, match=text):
        smc.twisted_smc(REF, flat, 2, 4, generator=rng, proposal=markov.MarkovChain(law(0.5, 0.5).expand(2, 2), "a|"))
    with pytest.raises(ValueError, match="^log_values must be finite for the empty string, got -inf"):
        smc.twisted_smc(
            REF, smc.by_value(lambda s: torch.full((len(s.contexts),), -math.inf), REF), 2, 4, generator=rng
        )
