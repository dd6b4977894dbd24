"""Exact tables on chains: laws of selection by symbols, increments, proposals and gains against their definitions."""

import itertools
import math

import pytest
import torch
from helpers import F64, enumerated_soft_law, law, random_law, vector

from tiltlib import autoregressive, categorical, markov, selection, smc, stepwise, verify

STEPS = markov.MarkovChain(torch.stack([law(0.7, 0.3, 0), law(0.2, 0.8, 0), law(0.6, 0.4, 0)]), "ab|")


STEP_REWARDS = torch.stack([vector(0, 1, 0), vector(-0.5, 0.7, 0), vector(0.3, 0, 0)])


REF = STEPS
REWARDS = torch.stack([vector(1, 3, 1), vector(0.5, 4, 1), vector(1, 1, 1)]).log()
NONE = torch.zeros(3, 3, dtype=F64)
BINARY = torch.tensor([[0, 0], [0, 1], [1, 0], [1, 1]])


def close(a, b, tolerance=1e-12):
    torch.testing.assert_close(torch.as_tensor(a, dtype=F64), torch.as_tensor(b, dtype=F64), rtol=0, atol=tolerance)


def random_instance(rng, v=3, order=2, length=5):
    ref = markov.MarkovChain(torch.stack([random_law(v, rng) for _ in range(v**order)]), "abc"[: v - 1] + " ")
    return ref, torch.randn(v**order, v, generator=rng, dtype=F64), length


def stepped_chain(rng, v=3, length=4):
    tables = torch.stack([torch.stack([random_law(v, rng) for _ in range(v)]) for _ in range(length)])
    return markov.MarkovChain(tables, "abc"[: v - 1] + " ")


def test_symbolwise_selection_on_the_instance_of_the_book():
    tilted = STEPS.tilt(STEP_REWARDS, 1.0, 2)
    torch.testing.assert_close(
        tilted.logps(BINARY).exp(), vector(0.295230, 0.343936, 0.025268, 0.335566), rtol=0, atol=1e-6
    )
    blind = torch.zeros(3, 3, dtype=F64)
    far = stepwise.soft_best_of_n_chain(STEPS, STEP_REWARDS, 1.0, blind, 10**9).logps(BINARY).exp()
    torch.testing.assert_close(far, vector(0.309194, 0.360204, 0.023151, 0.307451), rtol=0, atol=1e-6)
    values = STEPS.soft_values(STEP_REWARDS, 1.0, 2)
    four = stepwise.soft_best_of_n_chain(STEPS, STEP_REWARDS, 1.0, values, 4).logps(BINARY).exp()
    assert (four - tilted.logps(BINARY).exp()).abs().sum().item() / 2 == pytest.approx(0.051442, abs=1e-6)
    one = stepwise.soft_best_of_n_chain(STEPS, STEP_REWARDS, 1.0, values, 1)
    torch.testing.assert_close(one.logps(BINARY), STEPS.logps(BINARY))


def test_symbolwise_selection_is_what_selecting_symbols_does(rng):
    """Draw candidates for each symbol and keep one: the strings follow the exact law, not the tilt."""
    values, n = STEPS.soft_values(STEP_REWARDS, 0.5, 2), 3
    law_of = stepwise.soft_best_of_n_chain(STEPS, STEP_REWARDS, 0.5, values, n).logps(BINARY)
    tilted = STEPS.tilt(STEP_REWARDS, 0.5, 2).logps(BINARY)
    m = verify.plan(law_of, tilted)
    context, strings = torch.full((m,), 2), []
    for t in range(2):
        shown = categorical.sample(STEPS.table(t)[context], n, generator=rng)
        scores = STEP_REWARDS[context[:, None], shown] / 0.5 + values[t + 1][shown]
        kept = selection.soft_best_of_n(scores, 1.0, generator=rng)
        context = shown.gather(-1, kept[:, None])[:, 0]
        strings.append(context)
    outcome = strings[0] * 2 + strings[1]
    assert verify.match(outcome, law_of, claim="symbols", versus=[tilted])
    assert verify.match(outcome, tilted, claim="symbols!tilt", versus=[law_of]).decision == "REJECT"


@pytest.mark.parametrize(
    ("values", "n", "text"),
    [
        (torch.zeros(3, 2, dtype=F64), 2, r"log_values must have shape \(L \+ 1, 3\), got \(3, 2\)"),
        (torch.full((3, 3), -math.inf, dtype=F64), 2, "log_values must be finite where the reference can go, got -inf"),
        (torch.zeros(3, 3, dtype=F64), 0, "n must be an integer >= 1, got 0"),
    ],
)
def test_bad_symbolwise_selection(values, n, text):
    with pytest.raises(ValueError, match=text):
        stepwise.soft_best_of_n_chain(STEPS, STEP_REWARDS, 1.0, values, n)


def test_symbolwise_selection_on_a_float32_chain():
    rows = torch.log_softmax(torch.arange(9, dtype=torch.float32).view(3, 3).sin() * 5, -1)
    assert not torch.equal(rows.double().logsumexp(-1), torch.zeros(3, dtype=F64))
    ref, rewards = markov.MarkovChain(rows, "abc"), vector(0, 1, 2)
    exact = markov.MarkovChain(torch.log_softmax(rows.double(), -1), "abc")
    blind = torch.zeros(3, 3)
    kept = stepwise.soft_best_of_n_chain(ref, rewards.float(), 0.5, blind, 4)
    strings = torch.cartesian_prod(torch.arange(3), torch.arange(3))
    close(kept.logps(strings), stepwise.soft_best_of_n_chain(exact, rewards, 0.5, blind, 4).logps(strings), 1e-6)
    # Ties at the top of a huge reward: r / beta overflows, the differences do not.
    level = stepwise.soft_best_of_n_chain(exact, vector(1, 1, 1), 1e-320, blind, 4)
    close(level.logps(strings), exact.logps(strings))
    # The top is that of each context, among the symbols that may follow.
    apart = torch.stack([vector(1, 1, 9), vector(2, 2, 9), vector(3, 3, 9)])
    close(stepwise.soft_best_of_n_chain(STEPS, apart, 1e-320, blind, 4).logps(BINARY), STEPS.logps(BINARY))


def test_symbolwise_selection_with_one_table_per_step(rng):
    tables = torch.stack([torch.stack([random_law(3, rng) for _ in range(3)]) for _ in range(4)])
    ref = markov.MarkovChain(tables, "ab ")
    rewards, values = torch.randn(3, 3, generator=rng, dtype=F64), torch.randn(5, 3, generator=rng, dtype=F64)
    out = stepwise.soft_best_of_n_chain(ref, rewards, 0.7, values, 3)
    for t, context in itertools.product(range(4), range(3)):
        # With order 1 the context after a symbol is the symbol. Strings start in the last context and reach no other.
        scores = rewards[context] / 0.7 + values[t + 1]
        expected = enumerated_soft_law(tables[t, context], scores, 3, 1.0) if t or context == 2 else tables[t, context]
        close(out.table(t)[context], expected)


def test_beta_divides_the_rewards(rng):
    ref, rewards, length = random_instance(rng)
    zeros = torch.zeros(length + 1, 9, dtype=F64)
    got = stepwise.log_increments(ref, rewards, 0.5, zeros)
    close(got, (2 * rewards).expand(length, 9, 3))


@pytest.mark.parametrize("beta", [5e-324, 1e-300, 1e-40, 1e-17, 1e17, 1e300])
@pytest.mark.parametrize("dtype", [F64, torch.float32])
def test_the_proposal_at_every_beta(beta, dtype, rng):
    """Without twists: p(a | c) exp(r / beta), and for small beta p on the largest rewards."""
    ref, _, length = random_instance(rng)
    rewards = torch.randint(3, (9, 3), generator=rng).to(dtype)
    q = stepwise.twisted_proposal(ref, rewards, beta, torch.zeros(length + 1, 9, dtype=dtype))
    right = torch.log_softmax(ref.table(0) + (rewards.double() - rewards.double().amax(-1, keepdim=True)) / beta, -1)
    for t in range(length):
        close(q.table(t).exp(), right.exp())
    shifted = stepwise.twisted_proposal(ref, 1e30 * rewards.double(), 1e-300, torch.zeros(length + 1, 9, dtype=F64))
    best = rewards == rewards.amax(-1, keepdim=True)
    close(shifted.table(0).exp(), torch.log_softmax(torch.where(best, ref.table(0), -math.inf), -1).exp())


def test_a_proposal_keeps_the_row_of_a_context_that_leads_nowhere():
    rewards = torch.stack([vector(-math.inf, -math.inf, -math.inf), vector(0, 1, 0), vector(1, 2, 0)])
    q = stepwise.twisted_proposal(REF, rewards, 0.7, NONE)
    assert torch.equal(q.table(0)[0], REF.table(0)[0])
    twists = NONE.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(stepwise.twisted_proposal(REF, rewards, 0.7, twists).table(0)[2, 1], twists)
    close(gradient.sum(), 0.0)
    assert gradient.isfinite().all() and gradient.abs().max() > 0.1


def test_every_step_has_its_own_table(rng):
    ref, proposal = stepped_chain(rng), stepped_chain(rng)
    rewards, twists = torch.randn(3, 3, generator=rng, dtype=F64), torch.randn(5, 3, generator=rng, dtype=F64)
    twists[-1] = 0
    increments = stepwise.log_increments(ref, rewards, 0.7, twists, proposal)
    chosen = stepwise.twisted_proposal(ref, rewards, 0.7, twists)
    for t in range(4):
        # With order 1 the context after a symbol is the symbol: the columns of V_{t+1}.
        joint = ref.table(t) + rewards / 0.7 + twists[t + 1]
        close(increments[t], joint - twists[t][:, None] - proposal.table(t), 1e-10)
        close(chosen.table(t), torch.log_softmax(joint, -1), 1e-10)


def test_the_proposal_is_measured_against_the_target_of_each_step():
    never_b, always = law(1, 0, 0), law(0.5, 0.5, 0)
    first = markov.MarkovChain(torch.stack([never_b.expand(3, 3), always.expand(3, 3)]), "ab|")
    last = markov.MarkovChain(torch.stack([always.expand(3, 3), never_b.expand(3, 3)]), "ab|")
    for ref, proposal, step, context in ((first, last, 1, 0), (last, first, 0, 2)):
        stepwise.log_increments(ref, NONE, 1.0, NONE, ref)
        message = f"got 0 at step {step} in context {context} for symbol 1"
        with pytest.raises(ValueError, match=message):
            stepwise.log_increments(ref, NONE, 1.0, NONE, proposal)


def test_a_reward_that_no_string_can_collect_does_not_count():
    """At small beta the proposal takes the best symbol of those that lead somewhere, with no better one in the way."""
    never_b = law(0.5, 0, 0.5).expand(3, 3)
    dead_a = torch.stack([torch.full((3,), -math.inf, dtype=F64), vector(0, 1, 0), vector(0, 0, 0)])
    lost_a = NONE.clone()
    lost_a[:2, 0] = -math.inf
    for table, rewards, twists, best in (
        (never_b, vector(0, 5, 1), NONE, [2, 2, 2]),
        (REF.table(0), dead_a + vector(9, 0, 0), lost_a, [None, 1, 1]),
    ):
        chosen = stepwise.twisted_proposal(markov.MarkovChain(table, "ab|"), rewards, 1e-320, twists).table(0)
        for context, symbol in enumerate(best):
            expected = table[context] if symbol is None else law(*(float(a == symbol) for a in range(3)))
            assert torch.equal(chosen[context], expected)


@pytest.mark.parametrize(
    ("rewards", "beta", "error", "text"),
    [
        (STEP_REWARDS, torch.tensor(1.0), TypeError, "beta must be a number, got a torch.float32 tensor"),
        (torch.full((3,), -math.inf), 1.0, ValueError, "rewards must be finite where the reference has mass, got -inf"),
        (
            STEP_REWARDS,
            1e-3,
            ValueError,
            r"rewards / beta \+ log_values must span at most 600 in .* got 1200",
        ),
    ],
)
def test_refusals_of_symbolwise_selection(rewards, beta, error, text):
    with pytest.raises(error, match=text):
        stepwise.soft_best_of_n_chain(STEPS, rewards, beta, NONE, 2)


def test_the_weights_of_a_symbol_may_span_600_and_no_more():
    chain = stepwise.soft_best_of_n_chain(STEPS, vector(0, 600, 0), 1.0, NONE, 2)
    close(chain.table(0)[2].exp(), vector(0.36, 0.64, 0))
    later = torch.stack([vector(0, 0, 0), vector(0, 0, 0), vector(0, 600.5, 0)])  # by the value of what comes next
    with pytest.raises(ValueError, match=r"in each context, got 600\.5 at step 1; beta must be larger"):
        stepwise.soft_best_of_n_chain(STEPS, vector(0, 0, 0), 1.0, later, 2)


def test_each_context_has_a_range_of_its_own():
    ref = markov.MarkovChain(law(0.4, 0.3, 0.3).expand(3, 3), "abc")
    rewards = torch.stack([vector(0, 0, 0), vector(-200, -600, 0), vector(0, 0, 0)])
    values = torch.stack([vector(0, 0, 0), vector(0, 0, 0), vector(0, 600, 300)])
    # Scores from 0 to 600 after a, from -200 to 300 after b: no context spans more than 600.
    chain = stepwise.soft_best_of_n_chain(ref, rewards, 1.0, values, 1)
    close(chain.table(1), ref.table(1))
    # What the reference cannot do is in no range.
    never_c = markov.MarkovChain(law(0.5, 0.5, 0).expand(3, 3), "abc")
    far = torch.stack([vector(0, 0, 0), vector(900, 900, 0)])
    close(stepwise.soft_best_of_n_chain(never_c, vector(0, 0, 0), 1.0, far, 2).table(0)[2].exp(), vector(0.5, 0.5, 0))


# --- gains -----------------------------------------------------------------------------------------------------------


def increments_of(gain, ref, strings):
    """Add up what a gain says along given strings."""
    state = ref.begin(len(strings))
    values = gain.values(state, len(strings))
    steps = []
    for symbol in strings.unbind(-1):
        earned = gain.earned(state, symbol)
        state = ref.append(state, symbol)
        gained, values = gain.step(values, earned, state)
        steps.append(gained)
    return torch.stack(steps, -1)


@pytest.mark.parametrize("stepped", [False, True])
def test_a_gain_is_the_table_of_increments_without_the_proposal(stepped, rng):
    ref, rewards, length = (stepped_chain(rng), *random_instance(rng, order=1)[1:]) if stepped else random_instance(rng)
    length = 4 if stepped else length
    values = torch.randn(length + 1, len(rewards), generator=rng, dtype=F64)
    values[-1] = 0
    table = stepwise.log_increments(ref, rewards, 0.7, values)
    strings = ref.sample(30, length, generator=rng)
    expected = torch.stack(
        [table[t, c, a] for t, (c, a) in enumerate(zip(ref.contexts_before(strings).T, strings.T, strict=True))], -1
    )
    gain = stepwise.gain(ref, rewards, 0.7, values)
    assert gain.length == length
    close(increments_of(gain, ref, strings), expected)
    # And the sum is the log weight, whatever the values.
    total = increments_of(gain, ref, strings).sum(-1) + values[0, ref.start]
    close(total, ref.total_reward(strings, rewards) / 0.7)


def test_a_gain_keeps_its_own_numbers(rng):
    ref, rewards, length = random_instance(rng)
    values = torch.zeros(length + 1, 9, dtype=F64)
    gain = stepwise.gain(ref, rewards, 0.7, values)
    before = increments_of(gain, ref, ref.sample(3, length, generator=torch.Generator().manual_seed(1)))
    values += 5
    rewards += 5
    after = increments_of(gain, ref, ref.sample(3, length, generator=torch.Generator().manual_seed(1)))
    assert torch.equal(before, after)


def test_a_gain_is_minus_inf_where_the_reward_or_the_value_is():
    rewards, values = vector(-math.inf, 0, 0), NONE.clone()
    values[1, 0] = -math.inf
    for gain in (stepwise.gain(REF, rewards, 1.0, NONE), stepwise.gain(REF, rewards, 1.0, values)):
        steps = increments_of(gain, REF, BINARY)
        assert torch.equal(steps[0], vector(-math.inf, -math.inf))
        assert torch.equal(steps[1, :1], vector(-math.inf)) and torch.equal(steps[3], vector(0, 0))
    # A string that was given up stays so, even where a symbol would earn something.
    gain = autoregressive.Gain(lambda state: torch.where(state.contexts == 0, -math.inf, 0.0).double())
    assert torch.equal(increments_of(gain, REF, BINARY)[1], vector(-math.inf, -math.inf))


ZERO = NONE.clone()
ZERO[1, 1] = -math.inf
DEAD = markov.MarkovChain(torch.stack([law(1, 0, 0), law(0.2, 0.8, 0), law(0.6, 0.4, 0)]), "ab|")


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        (
            {"log_values": ZERO},
            ValueError,
            "^log_values must be finite wherever the target has mass, got -inf at step 1 in context 1$",
        ),
        ({"rewards": vector(0, 1e308, 0)}, ValueError, "rewards must be so small that totals of 2 symbols differ"),
        (
            {"proposal": DEAD},
            ValueError,
            "proposal must be positive wherever the target has mass, got 0 at step 1 in context 0 for symbol 1",
        ),
        (
            {"proposal": markov.MarkovChain(law(0.5, 0.5).expand(2, 2), "a|")},
            ValueError,
            r"proposal must have order 1 over 'ab\|'",
        ),
        ({"proposal": REF.table(0)}, TypeError, "proposal must be a MarkovChain, got a torch.float64 tensor"),
        ({"log_values": NONE + 1}, ValueError, "log_values must be 0 after the last step"),
        ({"log_values": NONE / 0}, ValueError, "log_values must be finite or -inf"),
        ({"log_values": NONE[:, :2]}, ValueError, r"log_values must have shape \(L \+ 1, 3\), got \(3, 2\)"),
        ({"log_values": NONE[:1]}, ValueError, r"log_values must have shape \(L \+ 1, 3\), got \(1, 3\)"),
        ({"log_values": NONE - math.inf}, ValueError, "log_values must"),
        ({"log_values": [[0.0]]}, TypeError, "log_values must be a floating-point torch.Tensor, got list"),
        ({"rewards": 1e100 * REWARDS, "beta": 1e-300}, ValueError, "beta must be so large that rewards / beta stays"),
        ({"rewards": vector(1, 2)}, ValueError, "rewards must have shape"),
        ({"beta": 0.0}, ValueError, "beta must be finite and > 0"),
    ],
)
def test_bad_gains(change, error, text):
    with pytest.raises(error, match=text):
        stepwise.gain(**{"ref": REF, "rewards": REWARDS, "beta": 1.0, "log_values": NONE, **change})


def test_a_gain_knows_its_length():
    gain = stepwise.gain(REF, REWARDS, 1.0, NONE)
    with pytest.raises(ValueError, match="length must be 2, that of the gain, got 3"):
        smc.twisted_smc(REF, gain, 3, 5, generator=torch.Generator())


def test_increments_that_leave_float64_are_refused():
    assert stepwise.log_increments(REF, 1e100 * REWARDS, 1.0, NONE).isneginf().any()
    with pytest.raises(
        ValueError, match="^beta must be so large that rewards / beta and log_values stay within float64"
    ):
        stepwise.log_increments(REF, 1e100 * REWARDS, 1e-300, NONE)
