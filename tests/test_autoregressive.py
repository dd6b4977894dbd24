"""Models by their four methods: what follows from them, strings that end, gains, and what is refused."""

import itertools
import math

import pytest
import torch
from helpers import F64, check_sampler, draws_from, law, vector, without
from models import Caching, Prefixes, soft_values

from tiltlib import autoregressive, markov, mcmc, resampling, selection, smc, verify

V, L = 3, 3


def close(a, b, tolerance=1e-12):
    torch.testing.assert_close(torch.as_tensor(a, dtype=F64), torch.as_tensor(b, dtype=F64), rtol=0, atol=tolerance)


@pytest.mark.parametrize("zeros", [False, True])
def test_log_probabilities_are_those_of_the_tables(zeros, rng):
    model = Prefixes(V, L, rng, zeros=zeros)
    close(model.logps(model.strings()), model.law())
    assert zeros == bool((model.law() == -math.inf).any())
    close(model.law().exp().sum(), 1.0)
    assert model.logps(model.strings()[:0]).shape == (0,)
    assert model.logps(model.strings()[:, :1].int()).dtype == F64


def test_samples_follow_the_law(rng):
    model = Prefixes(V, L, rng)
    target = model.law()
    forgetful = Prefixes(V, L, rng)
    forgetful.tables = [model.tables[0], *(table[:1].expand(len(table), V) for table in model.tables[1:])]
    draw = lambda m: lambda n, g: m.number(m.sample(n, L, generator=g))  # noqa: E731
    wrong = {
        "prefix-ignored": (draw(forgetful), forgetful.law()),
        "string-missing": (draws_from(without(target, 5)), without(target, 5)),
    }
    check_sampler(draw(model), target, wrong, rng)


def test_the_same_generator_draws_the_same_strings(rng):
    model = Prefixes(V, L, rng)
    first, second = (model.sample(50, L, generator=torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(first, second)


def test_a_draw_takes_one_number_for_each_string(rng):
    model = Prefixes(V, L, rng)
    state, before = model.append(model.begin(9), torch.arange(9) % V), rng.get_state()
    drawn, after = model.draw(state, generator=rng), rng.get_state()
    u = torch.rand(9, 1, generator=rng.set_state(before), dtype=F64)
    assert torch.equal(rng.get_state(), after)
    assert torch.equal(drawn, (model.next_logps(state).exp().cumsum(-1) <= u).sum(-1))


def test_a_model_is_only_called_as_far_as_its_strings_go(rng):
    """A table for L tokens is enough: nothing is appended to finished strings."""
    model = Prefixes(V, L, rng)

    class Counting(Prefixes):
        longest = 0

        def append(self, state, tokens):
            out = Prefixes.append(self, state, tokens)
            Counting.longest = max(Counting.longest, out.shape[-1])
            return out

    model.__class__ = Counting
    model.logps(model.sample(4, L, generator=rng))
    assert Counting.longest == L - 1


# --- strings that end ------------------------------------------------------------------------------------------------


def test_a_stopped_model_writes_only_the_end_after_it(rng):
    inner = Prefixes(V, L, rng)
    model = autoregressive.Stopped(inner, 1)
    strings = inner.strings()
    ended = (strings == 1).cummax(-1).values
    allowed = ~(ended[:, :-1] & (strings[:, 1:] != 1)).any(-1)
    law = model.logps(strings)
    assert torch.equal(law > -math.inf, allowed)
    close(law.exp().sum(), 1.0)
    # A string that ends at t has the probability of its first t tokens under the model.
    for y, logp in zip(strings[allowed], law[allowed], strict=True):
        size = int(mcmc.lengths(y[None], 1))
        close(logp, inner.logps(y[None, :size])[0])
    drawn = model.sample(2000, L, generator=rng)
    assert (mcmc.lengths(drawn, 1) <= L).all()


def test_a_stopped_chain_is_the_chain_that_stops(rng):
    rows = torch.stack([law(0.5, 0.1, 0.4), law(0.2, 0.6, 0.2), law(0.3, 0.3, 0.4)])
    chain = markov.MarkovChain(rows, "ab|")
    strings = Prefixes(V, L, rng).strings()
    close(autoregressive.Stopped(chain, 2).logps(strings).exp(), chain.stopped(L).logps(strings).exp())


# --- every sampler on a model that it never saw ----------------------------------------------------------------------


def instance(rng, zeros=False):
    model = Prefixes(V, L, rng, zeros=zeros)
    log_w = 1.5 * torch.randn(V**L, generator=rng, dtype=F64)
    return model, log_w, torch.log_softmax(model.law() + log_w, -1)


def value_of(tables):
    """A function of the state from one table of values per length."""

    def value(state):
        number = (state * V ** torch.arange(state.shape[-1] - 1, -1, -1)).sum(-1)
        return tables[state.shape[-1]][number]

    return value


def test_selection_on_an_unseen_model(rng):
    model, log_w, target = instance(rng)
    n = 3
    law_of = selection.soft_best_of_n_law(model.law(), log_w, 1.0, n)
    m = verify.plan(law_of, target)
    pool = model.number(model.sample(n * m, L, generator=rng)).view(m, n)
    kept = selection.soft_best_of_n(log_w[pool], 1.0, generator=rng)
    drawn = pool.gather(1, kept[:, None])[:, 0]
    assert verify.match(drawn, law_of, claim="unseen", versus=[target])
    assert verify.match(drawn, target, claim="unseen!tilt", versus=[law_of]).decision == "REJECT"


@pytest.mark.parametrize("block", [1, 2, 3])
def test_selection_by_blocks_on_an_unseen_model(block, rng):
    """The law by hand: at each block the law of soft best-of-n on what the block may be, by what it promises."""
    model, log_w, target = instance(rng)
    tables = soft_values(model, log_w)
    rough = [0.5 * table for table in tables[:-1]] + [tables[-1]]
    n = 2
    gain = smc.by_value(value_of(rough), model)
    law_of = torch.zeros(1, dtype=F64)  # of the prefixes, as blocks are added
    for done in range(0, L, block):
        size = min(block, L - done)
        of_block = torch.zeros(V**done, 1, dtype=F64)
        for t in range(done, done + size):
            of_block = (of_block[..., None] + model.tables[t].view(V**done, -1, V)).flatten(1)
        scores = rough[done + size].view(V**done, -1)
        law_of = (law_of[:, None] + selection.soft_best_of_n_law(of_block, scores, 1.0, n)).flatten()
    m = verify.plan(law_of, target)
    out = selection.soft_best_of_n_blocks(model, gain, L, n, generator=rng, block=block, strings=m)
    assert out.alive.all()
    assert verify.match(model.number(out.tokens), law_of, claim="blocks", versus=[target])
    assert verify.match(model.number(out.tokens), target, claim="blocks!", versus=[law_of]).decision == "REJECT"


@pytest.mark.parametrize("zeros", [False, True])
def test_particles_on_an_unseen_model(zeros, rng):
    """With the exact values and the twisted proposal every string is a draw of the tilt and Z is known exactly."""
    model, log_w, target = instance(rng, zeros)
    tables = soft_values(model, log_w)
    best = Prefixes(V, L, rng)
    best.tables = [
        torch.log_softmax(table + ahead.view(-1, V), -1) for table, ahead in zip(model.tables, tables[1:], strict=True)
    ]
    gain = smc.by_value(value_of(tables), model)
    out = smc.twisted_smc(model, gain, L, 4, generator=rng, proposal=best, runs=3000)
    close(out.log_partition, tables[0].expand(3000), 1e-10)
    close(out.log_weights, torch.zeros(3000, 4), 1e-10)
    drawn = model.number(out.particles[:, 0])
    assert verify.match(drawn, target, claim="unseen").decision != "REJECT"
    far = torch.log_softmax(model.law() + 2 * log_w, -1)
    assert verify.match(drawn, far, claim="unseen!", versus=[target]).decision == "REJECT"


@pytest.mark.slow
def test_the_estimate_of_z_is_unbiased_on_an_unseen_model(rng):
    model, log_w, target = instance(rng)
    tables = soft_values(model, log_w)
    rough = [0.5 * table for table in tables[:-1]] + [tables[-1]]
    # No weight is larger than the product of the largest gains.
    gains = [(ahead.view(-1, V) - here[:, None]).max() for here, ahead in itertools.pairwise(rough)]
    bound = (rough[0][0] + sum(gains)).exp()
    joint = (model.law() + log_w).exp() / bound
    stated, off = (torch.cat([q, 1 - q.sum(0, keepdim=True)]).log() for q in (joint, 1.05 * joint))
    runs = verify.plan(stated, off)
    out = smc.twisted_smc(model, smc.by_value(value_of(rough), model), L, 4, generator=rng, threshold=0.9, runs=runs)
    z = out.log_partition.exp()
    assert z.max() <= bound
    # Kept with probability Z_hat / bound, a weighted draw is a draw of the tilt: P(kept, y) = p w / bound.
    kept = torch.rand(runs, generator=rng, dtype=F64) * bound < z
    pick = resampling.multinomial(out.log_weights, 1, generator=rng)[:, 0]
    outcome = torch.where(kept, model.number(out.particles[torch.arange(runs), pick]), V**L)
    assert verify.match(outcome, stated, claim="z", versus=[off])
    first = torch.where(kept, model.number(out.particles[:, 0]), V**L)  # not weighted
    assert verify.match(first, stated, claim="z!first", versus=[off]).decision == "REJECT"


@pytest.mark.parametrize("proposal", [False, True])
def test_rewriting_on_an_unseen_model(proposal, rng):
    """Draws of p^a stay draws of p^a; started elsewhere they arrive."""
    model = Prefixes(V, L, rng)
    other = Prefixes(V, L, rng) if proposal else None
    power = 2.0
    target = torch.log_softmax(power * model.law(), -1)
    n = verify.plan(target, model.law())
    start = model.strings()[torch.zeros(n, dtype=torch.int64)]
    out = mcmc.power_mh(model, start, power, 60, generator=rng, proposal=other)
    assert verify.match(model.number(out.tokens), target, claim="mh", versus=[model.law()])
    once = mcmc.power_mh(model, start, power, 1, generator=rng, proposal=other)
    assert verify.match(model.number(once.tokens), target, claim="mh!", versus=[model.law()]).decision == "REJECT"


# --- gains -----------------------------------------------------------------------------------------------------------


def test_a_gain_adds_what_is_earned_and_gives_up_for_good(rng):
    model = Prefixes(V, L, rng)
    before = model.append(model.begin(3), torch.tensor([0, 1, 2]))
    token = torch.tensor([2, 2, 1])
    after = model.append(before, token)
    gain = autoregressive.Gain(
        lambda state: state.sum(-1).double() / 10,
        lambda state, tokens: state[:, -1].double() + 100.0 * tokens + 1000.0 * state.shape[-1],
        length=3,
    )
    here, earned = gain.values(before, 3), gain.earned(before, token)
    close(here, vector(0, 0.1, 0.2))
    gained, ahead = gain.step(here, earned, after)
    close(ahead, vector(0.2, 0.3, 0.3))
    close(gained, vector(1200.2, 1201.2, 1102.1))
    lost, _ = gain.step(vector(0, -math.inf, 0.2), earned, after)
    assert lost.tolist() == pytest.approx([1200.2, -math.inf, 1102.1])
    gain.check_length(3)
    with pytest.raises(ValueError, match="length must be 3, that of the gain, got 2"):
        gain.check_length(2)
    with pytest.raises(ValueError, match="values must be finite or -inf"):
        gain.step(vector(0, math.nan, 0), earned, after)
    with pytest.raises(ValueError, match="earned must be finite or -inf"):
        gain.step(here, vector(0, math.nan, 0), after)


# --- states are continued once ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("reward_reads", [False, True])
def test_samplers_use_each_state_once(reward_reads, rng):
    """A model that refuses a state whose memory has moved draws what one draws that keeps all of them."""
    plain = Prefixes(V, L, rng)
    moving = Caching(V, L, torch.Generator())
    moving.tables = plain.tables
    other, other_moving = Prefixes(V, L, rng), Caching(V, L, torch.Generator())
    other_moving.tables = other.tables

    def gain_on(model):
        # What a token earns may ask the model, and so may the value.
        tilt = (lambda state, tokens: -model.next_logps(state).amax(-1)) if reward_reads else None
        size = lambda state: state[1] if isinstance(state, list) else state.shape[1]  # noqa: E731
        value = lambda state: (  # noqa: E731
            model.next_logps(state)[:, 0] if 0 < size(state) < L else torch.zeros(count(state), dtype=F64)
        )
        return autoregressive.Gain(value, tilt)

    count = lambda state: len(state[0]) if isinstance(state, list) else len(state)  # noqa: E731
    seed = lambda: torch.Generator().manual_seed(5)  # noqa: E731
    for p, q in ((None, None), (other, other_moving)):
        found, again = (
            smc.twisted_smc(m, gain_on(m), L, 6, generator=seed(), proposal=o, threshold=1.0, runs=4)
            for m, o in ((plain, p), (moving, q))
        )
        assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))
        moved = [
            mcmc.power_mh(m, plain.strings(), 2.0, 3, generator=seed(), proposal=o)
            for m, o in ((plain, p), (moving, q))
        ]
        assert torch.equal(moved[0].tokens, moved[1].tokens)
    for block in (1, 2, 3):
        kept = [
            selection.soft_best_of_n_blocks(m, gain_on(m), L, 4, generator=seed(), block=block, strings=9)
            for m in (plain, moving)
        ]
        assert torch.equal(kept[0].tokens, kept[1].tokens)
    ends = [autoregressive.Stopped(m, 1).sample(20, L, generator=seed()) for m in (plain, moving)]
    assert torch.equal(*ends)
    assert torch.equal(plain.logps(plain.strings()), moving.logps(plain.strings()))


# --- refusals --------------------------------------------------------------------------------------------------------


class Bad(Prefixes):
    """Returns what it is told to."""

    def __init__(self, rows, rng):
        super().__init__(V, L, rng)
        self.rows = rows

    def next_logps(self, state):
        return self.rows


@pytest.mark.parametrize(
    ("rows", "error", "text"),
    [
        (torch.zeros(2, V), ValueError, "next_logps must be log-probabilities that sum to 1"),
        (torch.full((2, V), math.nan), ValueError, "next_logps must be log-probabilities that sum to 1"),
        (law(0.5, 0.5), ValueError, r"next_logps must return shape \(n, V\), got \(2,\)"),
        ([0.0], TypeError, "next_logps must be a floating-point torch.Tensor, got list"),
    ],
)
def test_rows_that_are_no_law_are_refused(rows, error, text, rng):
    model = Bad(rows, rng)
    for call in (
        lambda: model.sample(2, L, generator=rng),
        lambda: model.logps(torch.zeros(2, L, dtype=torch.int64)),
        lambda: model.draw(model.begin(2), generator=rng),
    ):
        with pytest.raises(error, match=text):
            call()


def gain_of(value):
    return autoregressive.Gain(lambda state: value)


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda m, g: m.sample(0, L, generator=g), ValueError, "n must be an integer >= 1, got 0"),
        (lambda m, g: m.sample(2, 0, generator=g), ValueError, "length must be an integer >= 1, got 0"),
        (lambda m, g: m.sample(2, L, generator=None), TypeError, "generator must be a torch.Generator, got NoneType"),
        (lambda m, g: m.logps(torch.zeros(3).long()), ValueError, r"tokens must have shape \(n, L\), got \(3,\)"),
        (lambda m, g: m.logps(torch.full((2, L), V)), ValueError, r"tokens must lie in 0\.\.2"),
        (lambda m, g: m.logps([[0]]), TypeError, "tokens must be an integer torch.Tensor, got list"),
        (lambda m, g: autoregressive.Stopped(3, 1), TypeError, "model must be an AutoregressiveModel, got int"),
        (lambda m, g: autoregressive.Stopped(m, "x"), TypeError, "end must be an int, got str"),
        (
            lambda m, g: autoregressive.Stopped(m, 3).sample(2, 2, generator=g),
            ValueError,
            r"end must lie in 0\.\.2, got 3",
        ),
        (lambda m, g: smc.by_value(lambda s: torch.zeros(2), m), ValueError, r"log_values must return shape \(1,\)"),
        (lambda m, g: smc.by_value(lambda s: 0.0, m), TypeError, "log_values must return a floating-point"),
        (
            lambda m, g: smc.by_value(lambda s: vector(math.nan), m),
            ValueError,
            "log_values must return numbers that are finite",
        ),
        (lambda m, g: smc.by_value(lambda s: vector(0), 3), TypeError, "model must be an AutoregressiveModel, got int"),
        (lambda m, g: smc.twisted_smc(m, 3, L, 2, generator=g), TypeError, "gain must be a Gain, got int"),
        (
            lambda m, g: smc.twisted_smc(3, gain_of(0), L, 2, generator=g),
            TypeError,
            "model must be an AutoregressiveModel",
        ),
        (
            lambda m, g: smc.twisted_smc(m, gain_of(vector(-math.inf, 0)), L, 2, generator=g),
            ValueError,
            "log_values must be finite for the empty string",
        ),
        (
            lambda m, g: smc.twisted_smc(m, gain_of(vector(0, 0)), L, 2, generator=g, proposal=Prefixes(2, L, g)),
            ValueError,
            r"proposal must give as many log-probabilities as model, got shapes \(2, 2\) and \(2, 3\)",
        ),
        (
            lambda m, g: smc.twisted_smc(m, gain_of(vector(0, 0)), L, 2, generator=g, proposal=3),
            TypeError,
            "proposal must be an AutoregressiveModel, got int",
        ),
        (lambda m, g: mcmc.power_mh(3, m.strings(), 2.0, 1, generator=g), TypeError, "model must be an Autoregressive"),
        (
            lambda m, g: mcmc.power_mh(m, m.strings(), 2.0, 9, generator=g, proposal=Prefixes(4, L, g)),
            ValueError,
            "^proposal must be over the 3 tokens of model, got 4$",
        ),
        (
            lambda m, g: selection.soft_best_of_n_blocks(m, gain_of(0), L, 2, generator=g, block=0),
            ValueError,
            "block must be an integer >= 1, got 0",
        ),
    ],
)
def test_bad_input(call, error, text, rng):
    with pytest.raises(error, match=text):
        call(Prefixes(V, L, rng), rng)


def test_a_block_with_nothing_left_keeps_some_string_and_says_so(rng):
    model = Prefixes(V, L, rng)
    never = autoregressive.Gain(
        lambda state: torch.zeros(len(state), dtype=F64),
        lambda state, tokens: torch.where((state[:, :1] == 0).any(-1), -math.inf, 0.0).double(),
    )
    out = selection.soft_best_of_n_blocks(model, never, L, 2, generator=rng, strings=500)
    assert out.tokens.shape == (500, L) and torch.equal(out.alive, out.tokens[:, 0] != 0)
    assert 0 < out.alive.sum() < 500
