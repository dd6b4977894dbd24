import itertools
import math

import numpy as np
import pytest
import torch
from helpers import F64, check_sampler, draws_from, law, random_law, vector, without

from tiltlib import categorical, stepwise, verify
from tiltlib.markov import LETTERS_AND_SPACE, MarkovChain, State


def close(a, b, tolerance=1e-12):
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def random_chain(v, order, rng):
    return MarkovChain(torch.stack([random_law(v, rng) for _ in range(v**order)]), "abcdef"[: v - 1] + " ")


def all_strings(v, length):
    return torch.tensor(list(itertools.product(range(v), repeat=length)))


def string_number(tokens, v):
    number = torch.zeros(tokens.shape[:-1], dtype=torch.int64)
    for symbol in tokens.unbind(-1):
        number = number * v + symbol
    return number


def walked(chain, tokens, rewards=None):
    """Log-probability and total reward of one string, symbol by symbol, with the context kept as text would be."""
    v, logp, total = len(chain.alphabet), 0.0, 0.0
    past = [v - 1] * chain.order
    for symbol in tokens:
        context = sum(s * v**i for i, s in enumerate(reversed(past)))
        logp += chain.table(0)[context, symbol].item()
        if rewards is not None:
            total += (rewards[context, symbol] if rewards.ndim == 2 else rewards[symbol]).item()
        past = [*past[1:], symbol]
    return logp, total


CASES = [(v, order, length) for v, order in [(2, 1), (2, 2), (2, 3), (3, 1), (3, 2)] for length in (1, 2, 5)]


def reward_tables(v, order, rng):
    """Rewards per symbol, per context, and with excluded symbols that leave dead ends."""
    per_symbol = torch.randint(-1, 3, (v,), generator=rng).double()
    per_context = torch.randint(-1, 3, (v**order, v), generator=rng).double()
    excluded = per_context.clone()
    excluded[0] = -math.inf  # the context of all-first symbols is a dead end, unless the string ends there
    excluded[-1, 0] = -math.inf
    return {"symbol": per_symbol, "context": per_context, "excluded": excluded}


# --- fit -------------------------------------------------------------------------------------------------------------


def fitted(order):
    # Words ab (weight 2), b (1), ba (1) over the alphabet a, b, space.
    return MarkovChain.fit(["ab", "b", "ba"], vector(2, 1, 1), order, alphabet="ab ")


def row(chain, context):
    code = {symbol: i for i, symbol in enumerate(chain.alphabet)}
    number = 0
    for symbol in context:
        number = number * len(chain.alphabet) + code[symbol]
    return chain.table(0)[number].exp()


def test_fit_by_hand_order_1():
    chain = fitted(1)
    close(row(chain, " "), vector(2, 2, 0) / 4)  # first letters: a (2); b (1 + 1)
    close(row(chain, "a"), vector(0, 2, 1) / 3)  # after a: b in ab (2); space in ba (1)
    close(row(chain, "b"), vector(1, 0, 3) / 4)  # after b: space in ab (2) and b (1); a in ba (1)
    assert chain.order == 1 and chain.start == 2 and chain.alphabet == "ab "


def test_fit_by_hand_order_2():
    chain = fitted(2)
    close(row(chain, "  "), vector(2, 2, 0) / 4)
    close(row(chain, " a"), vector(0, 2, 0) / 2)  # a begins a word: ab only
    close(row(chain, " b"), vector(1, 0, 1) / 2)  # b begins a word: ba (1), b alone (1)
    close(row(chain, "ab"), vector(0, 0, 2) / 2)
    close(row(chain, "ba"), vector(0, 0, 1) / 1)


def test_fit_backs_off_to_the_longest_suffix_that_a_word_shows():
    chain, short = fitted(2), fitted(1)
    close(row(chain, "aa"), row(short, "a"))  # aa occurs nowhere
    close(row(chain, "bb"), row(short, "b"))
    # After a separator nothing before it counts: "b " is never a context inside a word, " " is.
    close(row(chain, "a "), row(chain, "  "))
    close(row(chain, "b "), row(chain, "  "))
    deep = fitted(3)
    close(row(deep, "b a"), row(chain, " a"))
    close(row(deep, "aab"), row(chain, "ab"))
    close(row(deep, "aaa"), row(short, "a"))
    # A symbol that no word uses has no row of its own: it takes that of the empty context, all symbols together:
    # a: 2 + 1, b: 2 + 1 + 1, space: 2 + 1 + 1, of 11.
    close(row(MarkovChain.fit(["ab", "b", "ba"], vector(2, 1, 1), 1, alphabet="abc "), "c"), vector(3, 4, 0, 4) / 11)


def test_fit_ignores_the_unit_and_words_of_weight_zero():
    chain = fitted(2)
    close(MarkovChain.fit(["ab", "b", "ba"], vector(2, 1, 1) / 7, 2, alphabet="ab ").table(0), chain.table(0))
    more = MarkovChain.fit(["ab", "b", "ba", "aa"], vector(2, 1, 1, 0), 2, alphabet="ab ")
    close(more.table(0), chain.table(0))
    weights = vector(2, 1, 1)
    MarkovChain.fit(["ab", "b", "ba"], weights.float(), 2, alphabet="ab ")
    assert torch.equal(weights, vector(2, 1, 1))


@pytest.mark.parametrize("order", [1, 2, 3])
def test_fitted_rows_are_laws(order):
    chain = fitted(order)
    assert chain.table(0).shape == (3**order, 3) and chain.table(0).dtype == F64
    close(chain.table(0).exp().sum(-1), torch.ones(3**order, dtype=F64))


def test_a_word_has_the_probability_that_it_was_given():
    # Order 2 separates the three words completely: log p("ab ") = log 2/4, log p("b ") = log p("ba ") = log 1/4.
    chain = fitted(2)
    close(chain.logps(chain.encode(["ab ", "ba "])), law(2 / 4, 1 / 4))
    close(chain.logps(chain.encode(["b "])), law(1 / 4))


# --- strings ---------------------------------------------------------------------------------------------------------


def test_encode_and_decode():
    chain = fitted(1)
    assert chain.encode(["ab ", "bba"]).tolist() == [[0, 1, 2], [1, 1, 0]]
    assert chain.decode(chain.encode(["ab ", "bba"])) == ["ab ", "bba"]
    assert LETTERS_AND_SPACE == "abcdefghijklmnopqrstuvwxyz "


@pytest.mark.parametrize(("v", "order", "length"), CASES)
def test_logps_and_rewards_of_all_strings(v, order, length, rng):
    chain = random_chain(v, order, rng)
    strings = all_strings(v, length)
    close(chain.logps(strings).logsumexp(0), vector(0).squeeze())
    for rewards in reward_tables(v, order, rng).values():
        expected = torch.tensor([walked(chain, s.tolist(), rewards) for s in strings], dtype=F64)
        close(chain.logps(strings), expected[:, 0])
        close(chain.total_reward(strings, rewards), expected[:, 1])
    batched = strings.view(v, -1, length)
    assert torch.equal(chain.logps(batched).flatten(), chain.logps(strings))


# --- the exact tilt --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("v", "order", "length"), CASES)
@pytest.mark.parametrize("kind", ["symbol", "context", "excluded"])
def test_tilt_equals_enumeration(v, order, length, kind, rng):
    chain, beta = random_chain(v, order, rng), 0.7
    rewards = reward_tables(v, order, rng)[kind]
    before = rewards.clone()
    strings = all_strings(v, length)
    total = chain.total_reward(strings, rewards)
    tilted = chain.tilt(rewards, beta, length)
    close(tilted.log_partition, categorical.log_partition(chain.logps(strings), total, beta))
    close(tilted.logps(strings), categorical.tilt(chain.logps(strings), total, beta))
    assert torch.equal(rewards, before)

    # V_t(c): log E exp(rest / beta) over all continuations of length L - t, for every context.
    values = chain.soft_values(rewards, beta, length)
    assert values.shape == (length + 1, v**order)
    table = rewards.expand(v**order, v)
    for t in range(length):
        for c in range(v**order):
            terms = []
            for rest in all_strings(v, length - t).tolist():
                context, exponent = c, 0.0
                for symbol in rest:
                    exponent += (chain.table(0)[context, symbol] + table[context, symbol] / beta).item()
                    context = (context * v + symbol) % v**order
                terms.append(exponent)
            close(values[t, c], vector(*terms).logsumexp(0))
    assert not bool(values[-1].any())

    # Rows are laws, in every context from which some string is left.
    for t in range(length):
        close(tilted.table(t).exp().sum(-1), torch.ones(v**order, dtype=F64))
        reachable = values[t] > -math.inf
        assert not bool((tilted.table(t) > -math.inf)[reachable][(table == -math.inf)[reachable]].any())


def test_a_start_from_which_nothing_goes_on_leaves_the_strings_of_one_symbol():
    # At first only a may follow, and after a nothing: "a" is a string, and there is no longer one.
    rewards = torch.tensor([[-math.inf, -math.inf], [0, -math.inf]], dtype=F64)
    chain = MarkovChain(law(0.5, 0.5).expand(2, 2), "ab")
    close(chain.tilt(rewards, 1.0, 1).logps(torch.tensor([[0], [1]])), law(1, 0))
    for length in (2, 3):
        with pytest.raises(ValueError, match="^rewards must leave at least one outcome of positive mass"):
            chain.tilt(rewards, 1.0, length)


def test_tilt_limits(rng):
    chain = random_chain(3, 2, rng)
    strings = all_strings(3, 4)
    rewards = torch.randint(3, (9, 3), generator=rng).double()
    total = chain.total_reward(strings, rewards)
    close(chain.tilt(rewards, 1e300, 4).logps(strings), chain.logps(strings))
    close(chain.tilt(torch.full((3,), 5.0, dtype=F64), 0.1, 4).logps(strings), chain.logps(strings))
    assert chain.tilt(torch.full((3,), 5.0, dtype=F64), 0.1, 4).log_partition.item() == pytest.approx(4 * 5 / 0.1)
    greedy = chain.tilt(rewards, 1e-3, 4).logps(strings)
    close(greedy.exp()[total < total.max()].sum(), vector(0).squeeze())


def test_tilts_compose(rng):
    chain, strings = random_chain(2, 2, rng), all_strings(2, 5)
    r1, r2 = torch.rand(4, 2, generator=rng, dtype=F64), torch.rand(2, generator=rng, dtype=F64)
    once = chain.tilt(r1 / 0.5 + r2 / 0.8, 1.0, 5)
    twice = chain.tilt(r1, 0.5, 5).tilt(r2, 0.8, 5)
    close(twice.logps(strings), once.logps(strings))
    close(twice.log_partition + chain.tilt(r1, 0.5, 5).log_partition, once.log_partition)


def test_shorter_strings_under_a_tilt_are_its_prefixes(rng):
    tilted = random_chain(2, 1, rng).tilt(vector(0, 1), 0.5, 5)
    prefixes, strings = all_strings(2, 3), all_strings(2, 5)
    margin = tilted.logps(strings).view(8, 4).logsumexp(1)
    close(tilted.logps(prefixes), margin)


def test_float32_chain_stays_close(rng):
    chain = random_chain(3, 2, rng)
    small = MarkovChain(chain.table(0).float(), chain.alphabet)
    rewards = torch.randint(3, (9, 3), generator=rng).double()
    strings = all_strings(3, 4)
    tilted = small.tilt(rewards.float(), 0.7, 4)
    torch.testing.assert_close(tilted.logps(strings), chain.tilt(rewards, 0.7, 4).logps(strings), rtol=1e-5, atol=1e-5)
    assert small.reward_law(rewards.float(), 4).logps.dtype == F64


@pytest.mark.parametrize(("v", "order", "length"), CASES)
@pytest.mark.parametrize("kind", ["symbol", "context"])
def test_reward_law_equals_enumeration(v, order, length, kind, rng):
    chain = random_chain(v, order, rng)
    rewards = reward_tables(v, order, rng)[kind]
    strings = all_strings(v, length)
    total = chain.total_reward(strings, rewards)
    for source in (chain, chain.tilt(rewards, 0.7, length)):
        values, logps = source.reward_law(rewards, length)
        assert values.tolist() == [
            float(x) for x in range(length * int(rewards.min()), length * int(rewards.max()) + 1)
        ]
        expected = torch.stack([source.logps(strings).exp()[total == value].sum() for value in values])
        close(logps.exp(), expected)
        close(logps.exp().sum(), vector(1).squeeze())


def test_reward_law_of_the_tilt_is_the_tilt_of_the_reward_law(rng):
    # Long strings: 3^60 of them, out of reach of any enumeration.
    chain = random_chain(3, 2, rng)
    rewards = vector(0, 1, 3)
    values, logps = chain.reward_law(rewards, 60)
    tilted = chain.tilt(rewards, 2.0, 60)
    close(tilted.reward_law(rewards, 60).logps.exp(), categorical.tilt(logps, values, 2.0).exp())
    close(tilted.log_partition, categorical.log_partition(logps, values, 2.0))


def test_reward_law_of_a_constant(rng):
    values, logps = random_chain(2, 1, rng).reward_law(vector(-2, -2), 5)
    assert values.tolist() == [-10] and logps.tolist() == [0]


# --- draws -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tilted", [False, True])
def test_sample_follows_the_law_of_strings(tilted, rng):
    v, length, beta = 2, 4, 0.8
    chain, strings = random_chain(v, 2, rng), all_strings(2, 4)
    rewards = 4 * torch.rand(4, 2, generator=rng, dtype=F64)
    hot = chain.tilt(rewards, 1.05 * beta, length)
    source = chain.tilt(rewards, beta, length) if tilted else chain
    target = source.logps(strings)

    def draw(chain):
        return lambda n, generator: string_number(chain.sample(n, length, generator=generator), v)

    uniform = MarkovChain(torch.log_softmax(torch.zeros(4, 2, dtype=F64), -1), chain.alphabet)
    forgetful = MarkovChain(chain.table(0)[chain.start].expand(4, 2), chain.alphabet)
    wrong = {
        "beta*1.05": (draw(hot), hot.logps(strings)),
        "uniform": (draw(uniform), uniform.logps(strings)),
        "context-ignored": (draw(forgetful), forgetful.logps(strings)),
        "string-missing": (draws_from(without(target, 5)), without(target, 5)),
    }
    if tilted:
        unweighted = uniform.tilt(rewards, beta, length)
        wrong["reference-dropped"] = draw(unweighted), unweighted.logps(strings)
    check_sampler(draw(source), target, wrong, rng)


def test_sample_never_draws_what_is_excluded(rng):
    # No "b" anywhere, although it is likely: strings of a and space only.
    chain = MarkovChain(law(0.01, 0.98, 0.01).expand(3, 3), "ab ")
    tokens = chain.tilt(vector(0, -math.inf, 0), 1.0, 6).sample(2000, 6, generator=rng)
    assert tokens.shape == (2000, 6) and tokens.dtype == torch.int64
    assert tokens.unique().tolist() == [0, 2]


def test_sample_at_the_edges_of_the_uniform(monkeypatch):
    chain = MarkovChain(law(0, 0.5, 0.5).expand(3, 3), "ab ")
    monkeypatch.setattr(torch, "rand", lambda *size, **kwargs: vector(0, 0.5, 1 - 2**-53)[:, None])
    assert chain.sample(3, 1, generator=torch.Generator()).flatten().tolist() == [1, 2, 2]


def test_sample_avoids_dead_ends(rng):
    # After a nothing may follow: the tilt puts a at the end or nowhere. Strings: bbb, bba.
    rewards = torch.tensor([[-math.inf] * 2, [0, 0]], dtype=F64)
    chain = MarkovChain(law(0.5, 0.5).expand(2, 2), "ab")
    drawn = chain.tilt(rewards, 1.0, 3).sample(200, 3, generator=rng)
    assert set(chain.decode(drawn)) == {"bbb", "bba"}


def test_sample_of_a_long_string_has_the_right_reward(rng):
    # Strings of 40 symbols: their reward follows the law that the recursion computes.
    chain = random_chain(3, 2, rng)
    rewards = vector(0, 1, 0)
    target = chain.reward_law(rewards, 40).logps
    wrong = chain.tilt(rewards, 8.0, 40).reward_law(rewards, 40).logps
    n = verify.plan(target, wrong)
    drawn = chain.total_reward(chain.sample(n, 40, generator=rng), rewards).long()
    assert verify.match(drawn, target, claim="reward", versus=[wrong])


# --- errors ----------------------------------------------------------------------------------------------------------

CHAIN = fitted(1)
G = torch.Generator()
HALF = law(0.5, 0.5)


@pytest.mark.parametrize(
    ("logps", "alphabet", "error", "text"),
    [
        ([[0.0]], "ab", TypeError, "logps must be a floating-point torch.Tensor"),
        (HALF.expand(2, 2) + 1, "ab", ValueError, "logps must be log-probabilities that sum to 1"),
        (HALF.expand(3, 2), "ab", ValueError, r"logps must have shape .* with V = 2, .* got \(3, 2\)"),
        (HALF.expand(1, 2), "ab", ValueError, r"logps must have shape .* got \(1, 2\)"),
        (HALF, "ab", ValueError, r"logps must have shape .* got \(2,\)"),
        (HALF.expand(2, 3, 2), "ab", ValueError, r"logps must have shape .* got \(2, 3, 2\)"),
        (HALF.expand(1, 2, 2, 2), "ab", ValueError, r"logps must have shape .* got \(1, 2, 2, 2\)"),
        (HALF.expand(2, 2), "abc", ValueError, r"logps must have shape .* with V = 3"),
        (HALF.expand(2, 2), "aa", ValueError, "alphabet must hold at least 2 distinct symbols, got 'aa'"),
        (law(1).expand(1, 1), "a", ValueError, "alphabet must hold at least 2 distinct symbols, got 'a'"),
    ],
)
def test_bad_chains(logps, alphabet, error, text):
    with pytest.raises(error, match=text):
        MarkovChain(logps, alphabet)


@pytest.mark.parametrize(
    ("words", "weights", "order", "alphabet", "error", "text"),
    [
        (["a"], [1.0], 1, "ab ", TypeError, "weights must be a floating-point torch.Tensor"),
        (["a"], vector(1), 1.0, "ab ", TypeError, "order must be an int, got float"),
        (["a"], vector(1), 0, "ab ", ValueError, "order must be an integer >= 1, got 0"),
        ([], torch.zeros(0), 1, "ab ", ValueError, "words must hold at least one word, got none"),
        (["a"], vector(1, 2), 1, "ab ", ValueError, "weights must have shape .*one per word, got"),
        (
            ["a"],
            vector(-1),
            1,
            "ab ",
            ValueError,
            "weights must be finite and >= 0 with a positive sum, got values from",
        ),
        (
            ["a"],
            vector(0),
            1,
            "ab ",
            ValueError,
            "weights must be finite and >= 0 with a positive sum, got values from",
        ),
        (
            ["a"],
            vector(math.nan),
            1,
            "ab ",
            ValueError,
            "weights must be finite and >= 0 with a positive sum, got values from",
        ),
        (["a", "ax"], vector(1, 1), 1, "ab ", ValueError, "words must be non-empty strings over 'ab', got 'ax'"),
        (["a b"], vector(1), 1, "ab ", ValueError, "words must be non-empty strings over 'ab', got 'a b'"),
        ([""], vector(1), 1, "ab ", ValueError, "words must be non-empty strings over 'ab', got ''"),
        (["a"], vector(1), 1, "aa ", ValueError, "alphabet must hold at least 2 distinct symbols, got 'aa '"),
    ],
)
def test_bad_fits(words, weights, order, alphabet, error, text):
    with pytest.raises(error, match=text):
        MarkovChain.fit(words, weights, order, alphabet=alphabet)


RIGHT = torch.zeros(3, dtype=F64)


@pytest.mark.parametrize(
    ("rewards", "beta", "length", "error", "text"),
    [
        ([0.0], 1.0, 3, TypeError, "rewards must be a floating-point torch.Tensor"),
        (RIGHT.long(), 1.0, 3, TypeError, "rewards must be .* got a torch.int64 tensor"),
        (RIGHT[:2], 1.0, 3, ValueError, r"rewards must have shape \(3,\) or \(3, 3\), got \(2,\)"),
        (RIGHT.expand(2, 3), 1.0, 3, ValueError, r"rewards must have shape \(3,\) or \(3, 3\), got \(2, 3\)"),
        (RIGHT * math.nan, 1.0, 3, ValueError, "rewards must be finite or -inf"),
        (RIGHT + math.inf, 1.0, 3, ValueError, "rewards must be finite or -inf"),
        (RIGHT - math.inf, 1.0, 3, ValueError, "rewards must leave at least one outcome of positive mass"),
        (RIGHT, 0.0, 3, ValueError, "beta must be finite and > 0, got 0.0"),
        (RIGHT, math.nan, 3, ValueError, "beta must be finite and > 0"),
        (RIGHT, 1.0, 0, ValueError, "length must be an integer >= 1, got 0"),
        (RIGHT, 1.0, 3.0, TypeError, "length must be an int, got float"),
    ],
)
@pytest.mark.parametrize("method", ["soft_values", "tilt"])
def test_bad_tilts(method, rewards, beta, length, error, text):
    with pytest.raises(error, match=text):
        getattr(CHAIN, method)(rewards, beta, length)


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda: CHAIN.encode([]), ValueError, "texts must be a list of non-empty strings of one length"),
        (lambda: CHAIN.encode([""]), ValueError, "texts must be a list of non-empty strings of one length"),
        (lambda: CHAIN.encode(["a", "ab"]), ValueError, "texts must be a list of non-empty strings of one length"),
        (lambda: CHAIN.encode(["ax"]), ValueError, r"texts must use the alphabet 'ab ' only, got \['x'\]"),
        (
            lambda: CHAIN.logps(torch.tensor([True])),
            TypeError,
            "tokens must be an integer torch.Tensor, got a torch.bool",
        ),
        (lambda: CHAIN.logps("ab"), TypeError, "tokens must be an integer torch.Tensor, got str"),
        (lambda: CHAIN.logps([[0, 1]]), TypeError, "tokens must be an integer torch.Tensor, got list"),
        (lambda: CHAIN.logps(np.zeros((2, 2))), TypeError, "tokens must be an integer torch.Tensor, got ndarray"),
        (lambda: CHAIN.logps(torch.zeros(2, 0).long()), ValueError, r"tokens must hold .* got shape \(2, 0\)"),
        (lambda: CHAIN.kl(HALF, 2), TypeError, "other must be a MarkovChain, got a torch.float64 tensor"),
        (lambda: CHAIN.sample(3, 3, generator=None), TypeError, "generator must be a torch.Generator, got NoneType"),
        (lambda: CHAIN.tilt(RIGHT, torch.tensor(1.0), 3), TypeError, "beta must be a number, got a torch.float32"),
        (lambda: CHAIN.logps(torch.tensor(0)), ValueError, "tokens must have a last dimension"),
        (lambda: CHAIN.decode(torch.tensor([0, 1])), ValueError, r"tokens must have shape \(n, L\), got \(2,\)"),
        (lambda: CHAIN.encode("ab"), ValueError, "texts must be a list of .*, got one string"),
        (
            lambda: CHAIN.logps(torch.tensor([0.0])),
            TypeError,
            "tokens must be an integer torch.Tensor, got a torch.float32 tensor",
        ),
        (
            lambda: CHAIN.logps(torch.zeros(0, dtype=torch.int64)),
            ValueError,
            "tokens must hold at least one number, got shape",
        ),
        (lambda: CHAIN.logps(torch.tensor([0, 3])), ValueError, r"tokens must lie in 0\.\.2, got 0 to 3"),
        (lambda: CHAIN.logps(torch.tensor([-1, 1])), ValueError, r"tokens must lie in 0\.\.2, got -1 to 1"),
        (lambda: CHAIN.total_reward(torch.tensor([3]), RIGHT), ValueError, r"tokens must lie in 0\.\.2"),
        (lambda: CHAIN.total_reward(torch.tensor([0]), RIGHT[:1]), ValueError, r"rewards must have shape \(3,\) or"),
        (lambda: CHAIN.sample(0, 3, generator=G), ValueError, "n must be an integer >= 1, got 0"),
        (lambda: CHAIN.sample(3, 0, generator=G), ValueError, "length must be an integer >= 1, got 0"),
        (lambda: CHAIN.sample(3.0, 3, generator=G), TypeError, "n must be an int, got float"),
        (lambda: CHAIN.sample(3, 3.0, generator=G), TypeError, "length must be an int, got float"),
        (lambda: CHAIN.reward_law([0.0], 3), TypeError, "rewards must be a floating-point torch.Tensor"),
        (lambda: CHAIN.reward_law(RIGHT[:1], 3), ValueError, r"rewards must have shape \(3,\) or"),
        (lambda: CHAIN.reward_law(RIGHT + 0.5, 3), ValueError, "rewards must be finite whole numbers"),
        (lambda: CHAIN.reward_law(vector(0, -math.inf, 1), 3), ValueError, "rewards must be finite whole numbers"),
        (lambda: CHAIN.reward_law(RIGHT, 0), ValueError, "length must be an integer >= 1"),
        (lambda: CHAIN.reward_law(RIGHT, 3.0), TypeError, "length must be an int"),
        (lambda: CHAIN.tilt(RIGHT, 1.0, 3).table(3), ValueError, r"step must lie in 0\.\.2"),
        (lambda: CHAIN.tilt(RIGHT, 1.0, 3).table(-1), ValueError, r"step must lie in 0\.\.2"),
        (lambda: CHAIN.tilt(RIGHT, 1.0, 3).sample(2, 4, generator=G), ValueError, r"step must lie in 0\.\.2"),
        (lambda: CHAIN.rows(0, [0]), TypeError, "^contexts must be an integer torch.Tensor, got list"),
        (lambda: CHAIN.rows(0, RIGHT[:0]), TypeError, "^contexts must be an integer torch.Tensor, got a torch.float64"),
        (lambda: CHAIN.rows(0, torch.tensor([0, 3])), ValueError, r"^contexts must lie in 0\.\.2, got .* 0 to 3"),
        (
            lambda: CHAIN.next_contexts(torch.tensor(0), torch.tensor(-1)),
            ValueError,
            r"^tokens must lie in 0\.\.2, got .* -1",
        ),
        (lambda: CHAIN.stopped(0), ValueError, "^length must be an integer >= 1, got 0"),
        (lambda: CHAIN.lookahead([0.0]), TypeError, "^values must be a floating-point torch.Tensor, got list"),
        (lambda: fitted(2).lookahead(RIGHT), ValueError, r"^values must have shape \(9,\), got \(3,\)"),
    ],
)
def test_bad_inputs(call, error, text):
    with pytest.raises(error, match=text):
        call()


def test_tokens_of_every_integer_type_are_understood():
    wide = CHAIN.encode(["ab", "ba"])
    for dtype in (torch.int32, torch.int16, torch.uint8):
        assert torch.equal(CHAIN.logps(wide.to(dtype)), CHAIN.logps(wide))


# --- one table per step, refitted chains, divergences ----------------------------------------------------------------


def stepped_chain(v, order, length, rng):
    rows = [[random_law(v, rng) for _ in range(v**order)] for _ in range(length)]
    return MarkovChain(torch.stack([torch.stack(row) for row in rows]), "abcdef"[: v - 1] + " ")


@pytest.mark.parametrize(("v", "order", "length"), [(2, 1, 4), (2, 2, 3), (3, 2, 3)])
def test_a_chain_with_one_table_per_step_by_enumeration(v, order, length, rng):
    chain, rewards = stepped_chain(v, order, length, rng), torch.randn(v**order, v, generator=rng, dtype=F64)
    assert chain.length == length and random_chain(v, order, rng).length is None
    strings = all_strings(v, length)
    logps, totals = chain.logps(strings), chain.total_reward(strings, rewards)
    expected = []
    for string in strings.tolist():
        past, logp = [v - 1] * order, 0.0
        for t, symbol in enumerate(string):
            logp += chain.table(t)[sum(s * v**i for i, s in enumerate(reversed(past))), symbol].item()
            past = [*past[1:], symbol]
        expected.append(logp)
    close(logps, torch.tensor(expected, dtype=F64))
    tilted = chain.tilt(rewards, 0.7, length)
    close(tilted.log_partition, torch.logsumexp(logps + totals / 0.7, 0))
    close(tilted.logps(strings), torch.log_softmax(logps + totals / 0.7, 0))
    close(tilted.kl(chain, length), (tilted.logps(strings).exp() * (tilted.logps(strings) - logps)).sum())
    close(chain.kl(tilted, length), (logps.exp() * (logps - tilted.logps(strings))).sum())
    last = chain.next_contexts(chain.contexts_before(strings)[:, -1], strings[:, -1])
    after = torch.zeros(v**order, dtype=F64).index_add(0, last, logps.exp())
    close(chain.contexts(length)[-1], after)
    close(
        chain.contexts(length)[0].log(), torch.full_like(after, -math.inf).index_fill(0, torch.tensor(chain.start), 0)
    )


def test_a_chain_with_one_table_per_step_is_drawn_from(rng):
    chain = stepped_chain(3, 1, 2, rng)
    target = chain.logps(all_strings(3, 2))
    wrong = MarkovChain(chain.table(0), chain.alphabet).logps(all_strings(3, 2))
    draw = lambda n, g: string_number(chain.sample(n, 2, generator=g), 3)  # noqa: E731
    check_sampler(draw, target, {"first-table": (draws_from(wrong), wrong)}, rng)


def test_the_divergence_of_excluded_strings(rng):
    chain = random_chain(3, 1, rng)
    tilted = chain.tilt(vector(0, -math.inf, 1), 1.0, 3)
    assert chain.kl(tilted, 3).item() == math.inf and 0 < tilted.kl(chain, 3) < math.inf
    close(chain.kl(chain, 5), torch.zeros((), dtype=F64))


def test_a_refit_counts(rng):
    chain = random_chain(3, 1, rng)
    # Strings ab, ac (weights 3, 1): at step 0 always a; after a, b with 3/4.
    tokens, log_weights = torch.tensor([[0, 1], [0, 2], [1, 1]]), vector(3, 1, 0).log()
    steps = chain.refit(tokens, log_weights + 5, per_step=True)
    close(steps.table(0)[2].exp(), vector(1, 0, 0))
    close(steps.table(1)[0].exp(), vector(0, 0.75, 0.25))
    close(steps.table(1)[1], chain.table(1)[1])  # b is never a context of positive weight
    assert steps.length == 2
    # Over all steps: the separator stands before a in both strings; nothing changes here, since contexts differ.
    pooled = chain.refit(torch.tensor([[0, 0], [0, 1]]), per_step=False)
    close(pooled.table(0)[0].exp(), vector(0.5, 0.5, 0))
    assert pooled.length is None


def test_a_refit_to_the_whole_law_is_the_tilt_or_its_projection(rng):
    chain, rewards, length = random_chain(3, 1, rng), torch.randn(3, 3, generator=rng, dtype=F64), 4
    strings = all_strings(3, length)
    log_weights = chain.logps(strings) + chain.total_reward(strings, rewards) / 0.6
    tilted = chain.tilt(rewards, 0.6, length)
    close(tilted.kl(chain.refit(strings, log_weights, per_step=True), length), torch.zeros((), dtype=F64))
    projection = chain.refit(strings, log_weights, per_step=False)
    best = tilted.kl(projection, length)
    assert best > 1e-3
    for _ in range(20):  # no chain with one table for all steps is nearer
        moved = torch.log_softmax(projection.table(0) + 0.05 * torch.randn(3, 3, generator=rng, dtype=F64), -1)
        assert tilted.kl(MarkovChain(moved, chain.alphabet), length) > best
    wrong = chain.refit(strings, chain.logps(strings) + chain.total_reward(strings, rewards), per_step=True)
    assert tilted.kl(wrong, length) > 1e-2  # r in place of r / beta


def test_a_stopped_chain_is_the_law_of_a_word(rng):
    chain = random_chain(3, 2, rng)
    stopped = chain.stopped(4)
    strings = all_strings(3, 4)
    ended = (strings == 2).cumsum(-1) - (strings == 2).long() > 0  # strictly after the first separator
    written = ~(ended & (strings != 2)).any(-1)
    logps = stopped.logps(strings)
    assert torch.equal(logps > -math.inf, written)
    close(torch.logsumexp(logps, 0), torch.zeros((), dtype=F64))
    for string, logp in zip(strings[written].tolist(), logps[written], strict=True):
        word = string[: string.index(2) + 1] if 2 in string else string
        close(logp, torch.tensor(walked(chain, word)[0], dtype=F64))


STEPPED = MarkovChain(HALF.expand(3, 2, 2), "ab")


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda: STEPPED.sample(2, 4, generator=G), ValueError, r"step must lie in 0\.\.2, got 3"),
        (lambda: STEPPED.contexts(4), ValueError, r"step must lie in 0\.\.2, got 3"),
        (lambda: STEPPED.contexts(0), ValueError, "length must be an integer >= 1, got 0"),
        (lambda: STEPPED.stopped(4), ValueError, r"step must lie in 0\.\.2, got 3"),
        (lambda: STEPPED.kl(CHAIN, 2), ValueError, "other must have order 1 over 'ab', got order 1 over"),
        (lambda: STEPPED.refit(torch.zeros(2).long(), per_step=True), ValueError, r"tokens must have shape \(n, L\)"),
        (
            lambda: STEPPED.refit(torch.zeros(0, 2).long(), per_step=True),
            ValueError,
            r"tokens must have shape \(n, L\) with n >= 1, got \(0, 2\)",
        ),
        (
            lambda: STEPPED.refit(torch.zeros(1, 2).long(), [0.0], per_step=True),
            TypeError,
            "log_weights must be a floating-point torch.Tensor, got list",
        ),
        (
            lambda: STEPPED.refit(torch.zeros(2, 2).long(), vector(0), per_step=True),
            ValueError,
            r"log_weights must have shape \(2,\), one per string, got \(1,\)",
        ),
        (
            lambda: STEPPED.refit(torch.zeros(1, 2).long(), vector(-math.inf), per_step=True),
            ValueError,
            "log_weights must leave at least one outcome",
        ),
    ],
)
def test_bad_calls_of_stepped_chains(call, error, text):
    with pytest.raises(error, match=text):
        call()


# --- numerics --------------------------------------------------------------------------------------------------------

SMALL = [torch.float32, torch.bfloat16, torch.float16]


def rounded(chain, dtype):
    """The chain made of a table in another dtype, and the chain that this table means: normalised in float64."""
    table = chain.table(0).to(dtype)
    return MarkovChain(table, chain.alphabet), MarkovChain(torch.log_softmax(table.double(), -1), chain.alphabet)


@pytest.mark.parametrize("dtype", SMALL)
def test_a_chain_that_was_accepted_is_never_refused(dtype, rng):
    for _ in range(5):
        chain, meant = rounded(random_chain(3, 2, rng), dtype)
        rewards, values = torch.randn(9, 3, generator=rng).to(dtype), torch.zeros(4, 9, dtype=dtype)
        tokens = torch.tensor([[0, 1, 2]])
        calls = (
            lambda c, r=rewards, v=values: stepwise.soft_best_of_n_chain(c, r, 0.7, v, 3),
            lambda c, t=tokens: c.refit(t, per_step=True),
            lambda c, t=tokens: c.refit(t, per_step=False),
            lambda c, r=rewards, v=values: stepwise.twisted_proposal(c, r, 0.7, v),
            lambda c, r=rewards: c.tilt(r.double(), 0.7, 3),
            lambda c: c.stopped(3),
        )
        for call in calls:
            got, expected = call(chain), call(meant)
            for t in range(3):
                close(got.table(t), expected.table(t), 1e-14)
                close(got.table(t).logsumexp(-1), torch.zeros(9, dtype=F64), 1e-14)
        close(chain.kl(meant, 3), vector(0).squeeze())
        close(chain.contexts(3), meant.contexts(3))
        close(chain.reward_law(vector(0, 1, 1).to(dtype), 3).logps, meant.reward_law(vector(0, 1, 1), 3).logps)


@pytest.mark.parametrize("dtype", SMALL)
def test_the_rows_of_every_step_are_normalised_in_float64(dtype, rng):
    chain = stepped_chain(3, 1, 4, rng)
    tables = torch.stack([chain.table(t) for t in range(4)]).to(dtype)
    small = MarkovChain(tables, chain.alphabet)
    for t in range(4):
        close(small.table(t), torch.log_softmax(tables[t].double(), -1), 1e-14)


@pytest.mark.parametrize("dtype", [F64, *SMALL])
def test_what_comes_out_is_float64(dtype, rng):
    chain, meant = rounded(random_chain(3, 1, rng), dtype)
    strings, rewards = all_strings(3, 6), torch.randn(3, generator=rng).to(dtype)
    assert chain.table(0).dtype == chain.kl(meant, 2).dtype == chain.contexts(2).dtype == F64
    for got, exact in (
        (chain.logps(strings), meant.logps(strings)),
        (chain.total_reward(strings, rewards), meant.total_reward(strings, rewards.double())),
        (chain.soft_values(rewards, 0.7, 6), meant.soft_values(rewards.double(), 0.7, 6)),
        (chain.tilt(rewards, 0.7, 6).log_values, meant.soft_values(rewards.double(), 0.7, 6)),
        (chain.tilt(rewards, 0.7, 6).log_partition, meant.tilt(rewards.double(), 0.7, 6).log_partition),
        (chain.tilt(rewards, 0.7, 6).logps(strings), meant.tilt(rewards.double(), 0.7, 6).logps(strings)),
        (chain.stopped(6).logps(strings), meant.stopped(6).logps(strings)),
    ):
        assert got.dtype == F64
        torch.testing.assert_close(got, exact, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("beta", [5e-324, 1e-300, 1e-60, 1e-38, 1e-17, 1e-3, 1.0, 1e17, 1e300])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
def test_every_beta_gives_the_tilt(dtype, beta, rng):
    """Whole-numbered rewards with ties, in every scale; the limit of small beta is p on the strings of most reward."""
    chain, meant = rounded(random_chain(3, 2, rng), dtype)
    strings = all_strings(3, 4)
    for rewards in (torch.randint(-2, 3, (9, 3), generator=rng), torch.randint(2, (3,), generator=rng)):
        total = meant.total_reward(strings, rewards.double())
        expected = torch.log_softmax(meant.logps(strings) + (total - total.max()) / beta, -1)
        tilted = chain.tilt(rewards.to(dtype), beta, 4)
        logps = torch.stack([tilted.rows(t, c) for t, c in enumerate(tilted.contexts_before(strings).unbind(-1))], 1)
        logps = logps.gather(-1, strings[..., None]).sum((1, 2))
        close(logps.exp(), expected.exp())
        for t in range(4):
            close(tilted.table(t).exp().sum(-1), torch.ones(9, dtype=F64))
        values = chain.soft_values(rewards.to(dtype), beta, 4)
        log_z = torch.logsumexp(meant.logps(strings) + (total - total.max()) / beta, 0) + total.max() / beta
        assert not values.isnan().any()
        torch.testing.assert_close(tilted.log_partition, log_z, rtol=1e-15, atol=1e-15)
        assert torch.equal(tilted.log_values, values)


def test_rewards_of_every_scale(rng):
    chain, strings = random_chain(3, 1, rng), all_strings(3, 1)
    for scale in (1e-300, 1e-60, 1.0, 1e60, 4e307):
        rewards = scale * vector(1, -1, 0.5)
        for ratio in (0.3, 3.0):
            close(
                chain.tilt(rewards, ratio * scale, 1).logps(strings),
                chain.tilt(rewards / scale, ratio, 1).logps(strings),
            )
    for call in (
        lambda: chain.tilt(vector(1.7e308, -1.7e308, 0), 1.0, 2),
        lambda: chain.soft_values(vector(1.7e308, -1.7e308, 0), 1.0, 2),
        lambda: chain.reward_law(vector(1.7e308, -1.7e308, 0), 2),
        lambda: chain.total_reward(torch.zeros(1, 2).long(), vector(1.7e308, -1.7e308, -math.inf)),
    ):
        with pytest.raises(
            ValueError, match=r"rewards must be so small that totals of 2 symbols .* got 1\.7e\+308 in size"
        ):
            call()


def test_the_reward_of_a_symbol_that_is_never_written_does_not_count(rng):
    table = torch.stack([law(0.5, 0, 0.5), law(0.2, 0.3, 0.5), law(0.4, 0, 0.6)])
    chain = MarkovChain(table, "ab ")
    small = chain.tilt(vector(1, 0, 2), 1e-10, 4)
    for high in (1e300, -1e300, -math.inf):
        tilted = chain.tilt(vector(1, high, 2), 1e-10, 4)
        assert torch.equal(tilted.logps(all_strings(3, 4)), small.logps(all_strings(3, 4)))
        assert not any(tilted.table(t).isnan().any() for t in range(4))


def differences(f, x, h=1e-6):
    """Central differences of a scalar function, where x is finite."""
    gradient = torch.zeros_like(x)
    for i in x.isfinite().nonzero():
        step = torch.zeros_like(x)
        step[tuple(i)] = h
        gradient[tuple(i)] = (f(x + step) - f(x - step)) / (2 * h)
    return gradient


def gradient_of(f, x):
    x = x.clone().requires_grad_()
    return torch.autograd.grad(f(x), x)[0]


# Context a is never reached, and there the second chain excludes what the first one writes.
LOGITS = torch.tensor([[0.3, 1, 0.2], [-math.inf, 0.4, 0.1], [-math.inf, 0.9, -0.5]], dtype=F64)
OTHER = torch.tensor([[0.3, -math.inf, 0.2], [-math.inf, 1.4, 0.1], [0.3, 0.1, 0.5]], dtype=F64)


def test_gradients_of_the_divergence_where_a_probability_is_0():
    def chain(logits):
        return MarkovChain(torch.log_softmax(logits, -1), "ab ")

    for f, x in (
        (lambda x: chain(x).kl(chain(OTHER), 4), LOGITS),
        (lambda x: chain(LOGITS).kl(chain(x), 4), OTHER),
        (lambda x: chain(x).tilt(vector(0, 1, 0.5), 0.7, 4).kl(chain(OTHER), 4), LOGITS),
        (lambda x: chain(LOGITS).kl(chain(LOGITS).tilt(x, 0.7, 4), 4), vector(0, 1, 0.5)),
        (lambda x: chain(x).contexts(4)[-1, 1], LOGITS),
        (lambda x: chain(x).reward_law(vector(0, 3, 0), 4).logps[3], LOGITS),
    ):
        assert f(x).isfinite()
        close(gradient_of(f, x), differences(f, x), 1e-8)
    assert chain(OTHER).kl(chain(LOGITS), 4).item() == math.inf


def test_gradients_of_the_tilt_with_dead_ends(rng):
    chain = random_chain(3, 2, rng)
    rewards = reward_tables(3, 2, rng)["excluded"]
    strings = torch.tensor([[1, 2, 1, 0], [2, 2, 1, 1]])

    def log_z(r):
        return chain.tilt(r, 0.7, 4).log_partition

    for f in (
        log_z,
        lambda r: (v := chain.soft_values(r, 0.7, 4)[1])[v > -math.inf].sum(),
        lambda r: chain.tilt(r, 0.7, 4).logps(strings).sum(),
    ):
        close(gradient_of(f, rewards), differences(f, rewards), 1e-7)
    # d log Z / d r(c, a) is how often a follows c, over beta.
    tilted = chain.tilt(rewards, 0.7, 4)
    often = sum(tilted.contexts(4)[t][:, None] * tilted.table(t).exp() for t in range(4))
    close(gradient_of(log_z, rewards), often / 0.7)


def test_a_chain_keeps_its_own_tables(rng):
    for dtype in (F64, torch.float32):
        table = torch.log_softmax(torch.randn(3, 3, generator=rng), -1).to(dtype)
        table = torch.log_softmax(table, -1)
        rewards = torch.randn(3, generator=rng).to(dtype)
        chain = MarkovChain(table, "ab ")
        tilted = chain.tilt(rewards, 0.7, 3)
        before = [chain.table(0), tilted.table(0), tilted.table(2)]
        table.zero_()
        rewards.zero_()
        chain.table(0).zero_()
        tilted.table(0).zero_()
        assert all(map(torch.equal, [chain.table(0), tilted.table(0), tilted.table(2)], before))
    assert not hasattr(tilted, "_tables")  # it makes its own when asked, and keeps none of its reference


def test_no_strings_are_a_batch():
    none = torch.zeros(0, 3).long()
    assert CHAIN.logps(none).shape == (0,) and CHAIN.logps(none).dtype == F64
    assert CHAIN.logps(none.view(2, 0, 3)).shape == (2, 0)
    assert CHAIN.total_reward(none, RIGHT.float()).dtype == F64
    assert CHAIN.total_reward(none, RIGHT).shape == (0,) and CHAIN.decode(none) == []


def test_numbers_of_numpy(rng):
    three, beta = np.int64(3), np.float32(0.5)
    tilted = CHAIN.tilt(RIGHT + 1, beta, three)
    assert tilted.log_partition.item() == 6 and tilted.log_partition.dtype == F64
    assert tilted.sample(three, three, generator=rng).shape == (3, 3)
    assert CHAIN.kl(tilted, three).item() == pytest.approx(0, abs=1e-15) and CHAIN.stopped(three).length == 3
    assert CHAIN.reward_law(RIGHT + 1, three).values.tolist() == [3]
    assert MarkovChain.fit(["ab"], vector(1), np.int32(2), alphabet="ab ").order == 2


def test_weights_of_words_of_every_scale():
    expected = fitted(2).table(0)
    for scale in (5e-324, 1e-300, 1.0, 2.0**1022):
        close(MarkovChain.fit(["ab", "b", "ba"], scale * vector(2, 1, 1), 2, alphabet="ab ").table(0), expected)
    for dtype, scale in ((torch.float16, 2.0**14), (torch.bfloat16, 2.0**120), (torch.float32, 2.0**126)):
        weights = (scale * vector(2, 1, 1)).to(dtype)
        assert torch.equal(MarkovChain.fit(["ab", "b", "ba"], weights, 2, alphabet="ab ").table(0), expected)


@pytest.mark.parametrize("default", [torch.float64, torch.float16])
def test_nothing_depends_on_the_default_dtype(default, rng):
    def everything():
        chain = MarkovChain(LOGITS.float().log_softmax(-1), "ab ")
        g = torch.Generator().manual_seed(1)
        tilted = chain.tilt(vector(0, 1, 0.5).float(), 0.7, 3)
        refit = chain.refit(tilted.sample(50, 3, generator=g), per_step=True)
        kept = MarkovChain.fit(["ab"], vector(1), 1, alphabet="ab ").table(0)
        return tilted.log_values, tilted.table(1), refit.table(1), chain.kl(tilted, 3), chain.stopped(3).table(1), kept

    expected = everything()
    torch.set_default_dtype(default)
    try:
        got = everything()
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(expected, got, strict=True))


# --- edges -----------------------------------------------------------------------------------------------------------


def test_a_refit_keeps_the_row_of_the_same_step_where_no_string_was(rng):
    chain = stepped_chain(3, 1, 4, rng)
    tokens = torch.tensor([[0, 1, 1, 0], [0, 1, 0, 0]])
    steps = chain.refit(tokens, per_step=True)
    seen = [{2}, {0}, {1}, {0, 1}]  # the context is the symbol before, at first the separator
    for t in range(4):
        for context in range(3):
            kept = torch.equal(steps.table(t)[context], chain.table(t)[context])
            assert kept == (context not in seen[t])
    # Over all steps an unseen context keeps the row of the last step.
    ends_in = chain.refit(torch.tensor([[2, 2, 2, 1]]), per_step=False).table(0)
    assert torch.equal(ends_in[:2], chain.table(3)[:2])
    close(ends_in[2].exp(), vector(0, 0.25, 0.75))


@pytest.mark.parametrize(
    "n", [2, 50]
)  # fewer strings than contexts, and more: then the whole table is turned into CDFs
def test_sample_inverts_the_cdf_with_float64_uniforms(n, rng):
    chain = stepped_chain(3, 1, 3, rng)
    state = rng.get_state()
    drawn = chain.sample(n, 3, generator=rng)
    rng.set_state(state)
    context = torch.full((n,), 2)
    for t in range(3):
        u = torch.rand(n, 1, generator=rng, dtype=F64)
        context = (chain.table(t)[context].exp().cumsum(-1) <= u).sum(-1)
        assert torch.equal(drawn[:, t], context)


# --- the smallest temperatures, edges of ranges ----------------------------------------------------------------------


def test_dead_ends_and_unwritten_symbols_at_the_smallest_beta():
    """b is never written and nothing may follow a: of the strings with most reward, 2222 has .6 and 2220 has .4."""
    table = torch.stack([law(0.5, 0, 0.5), law(0.2, 0.3, 0.5), law(0.4, 0, 0.6)])
    rewards = torch.stack([vector(-math.inf, 5, -math.inf), vector(0, 9, 1), vector(1, 7, 1)])
    slope = torch.stack([vector(0, 0, 0), vector(0, 0, 0), vector(-0.4, 0, 0.4)])
    for beta in (1e-320, 1e-300, 0.5):
        x, logps = rewards.clone().requires_grad_(), table.clone().requires_grad_()
        tilted = MarkovChain(logps, "ab ").tilt(x, beta, 4)
        close(tilted.logps(torch.tensor([[2, 2, 2, 2], [2, 2, 2, 0], [2, 2, 1, 2]])).exp(), vector(0.6, 0.4, 0))
        values = MarkovChain(table, "ab ").soft_values(rewards, beta, 4)
        assert torch.equal(values == -math.inf, torch.tensor([[True, False, False]] * 4 + [[False] * 3]))
        for t in range(4):
            close(tilted.table(t).logsumexp(-1), torch.zeros(3, dtype=F64))
            assert torch.equal(tilted.table(t)[0], table[0])  # no string goes on from a
        by_rewards, by_table = torch.autograd.grad(tilted.logps(torch.tensor([2, 2, 2, 2])), (x, logps))
        close(by_table, slope)
        if beta > 1e-308:  # 1 / beta is a number
            close(by_rewards * beta, slope)


def test_totals_of_rewards_may_differ_by_the_largest_number(rng):
    chain = random_chain(3, 1, rng)
    largest = torch.finfo(F64).max / 4  # 2 symbols, and the difference of two totals
    assert chain.reward_table(vector(largest, -largest, -math.inf), 2).shape == (3, 3)
    with pytest.raises(ValueError, match="totals of 3 symbols differ by less than 1.8e308, got 4.49423e"):
        chain.reward_table(vector(largest, -largest, -math.inf), 3)


def test_rewards_without_a_length_are_those_of_one_symbol(rng):
    chain, largest = random_chain(2, 1, rng), torch.finfo(F64).max / 2
    assert torch.equal(chain.reward_table(vector(-largest, largest)), vector(-largest, largest).expand(2, 2))


def test_the_law_of_the_reward_sums_to_1_whatever_is_accepted_as_a_row(rng):
    """A float64 table is taken as it is: each row may be off by 1e-8, and a string by as many of these as symbols."""
    table = torch.stack([random_law(3, rng) for _ in range(3)]) + 1e-8
    logps = MarkovChain(table, "ab ").reward_law(vector(0, 1, 1), 50).logps
    close(logps.logsumexp(0), torch.zeros((), dtype=F64), 1e-14)


def test_the_smallest_weights_of_words():
    least = torch.full((3,), 5e-324, dtype=F64)
    expected = MarkovChain.fit(["ab", "b", "ba"], torch.ones_like(least), 2, alphabet="ab ")
    assert torch.equal(MarkovChain.fit(["ab", "b", "ba"], least, 2, alphabet="ab ").table(0), expected.table(0))


def test_gradients_of_what_is_fitted_where_a_context_is_not_seen(rng):
    """d log p / d w: what the string adds, less what every string adds to the weight of its contexts."""
    weights = vector(2, 1, 1, 0).requires_grad_()  # only a word of weight 0 shows the context aa
    chain = MarkovChain.fit(["ab", "b", "ba", "aa"], weights, 2, alphabet="ab ")
    (gradient,) = torch.autograd.grad(chain.logps(chain.encode(["ab "])).sum(), weights)
    close(gradient, vector(1 / 2 - 1 / 4, -1 / 4, -1 / 4, -1 / 4))
    log_weights = vector(3, 1, 0).log().requires_grad_()
    for per_step in (True, False):
        refit = chain.refit(torch.tensor([[0, 1], [0, 2], [1, 1]]), log_weights, per_step=per_step)
        (gradient,) = torch.autograd.grad(refit.logps(torch.tensor([0, 1])), log_weights)
        close(gradient, vector(1 / 4, -1 / 4, 0))


def test_strings_of_one_symbol_and_of_several_lengths():
    assert CHAIN.encode(["b", " "]).tolist() == [[1], [2]] and CHAIN.decode(torch.tensor([[1], [2]])) == ["b", " "]
    with pytest.raises(ValueError, match=r"got lengths \[1, 3\]$"):
        CHAIN.encode(["aba", "a", "b"])


@pytest.mark.parametrize("order", [1, 2])
def test_looking_ahead_is_reading_at_the_context_with_a_symbol_appended(order, rng):
    chain, values = random_chain(3, order, rng), torch.randn(3**order, generator=rng, dtype=F64)
    ahead = chain.lookahead(values)
    assert torch.equal(ahead, values[chain.next_contexts(torch.arange(3**order)[:, None], torch.arange(3))])
    before = values.clone()
    ahead.zero_()  # numbers of its own
    assert torch.equal(values, before)


def test_the_next_symbol_is_drawn_by_inverting_the_row_of_its_context(rng):
    chain = random_chain(3, 1, rng)
    for n in (1, 3, 4, 8):  # fewer numbers than contexts, and more
        contexts, state = torch.randint(3, (n,), generator=rng), rng.get_state()
        drawn = chain.draw(State(0, contexts), generator=rng)
        u = torch.rand(n, 1, generator=rng.set_state(state), dtype=F64)
        assert torch.equal(drawn, (chain.table(0)[contexts].exp().cumsum(-1) <= u).sum(-1))


@pytest.mark.parametrize(("bad", "low", "high"), [(-1, "-1", "1"), (math.inf, "1", "inf")])
def test_one_bad_weight_among_good_ones_is_refused(bad, low, high):
    with pytest.raises(ValueError, match=f"with a positive sum, got values from {low} to {high}"):
        MarkovChain.fit(["ab", "b"], vector(1, bad), 1, alphabet="ab ")


def test_a_refit_ignores_the_unit_of_the_weights(rng):
    chain, tokens = random_chain(3, 1, rng), torch.tensor([[0, 1], [0, 2], [1, 2]])
    for shift in (-1e4, 0, 1e4):
        refit = chain.refit(tokens, vector(4, 1, 1).log() + shift, per_step=True)
        close(refit.table(0)[2].exp(), vector(5 / 6, 1 / 6, 0))
        close(refit.table(1)[:2].exp(), torch.stack([vector(0, 0.8, 0.2), vector(0, 0, 1)]))


def test_the_first_reward_that_is_no_whole_number_is_named():
    with pytest.raises(ValueError, match=r"rewards must be finite whole numbers here, got 0\.5$"):
        CHAIN.reward_law(vector(0.5, 1.5, 0), 2)
    one = torch.zeros(3, 3, dtype=F64)
    one[1, 2] = -math.inf
    with pytest.raises(ValueError, match="rewards must be finite whole numbers here, got -inf$"):
        CHAIN.reward_law(one, 2)


def test_rewards_of_strings_in_a_batch_of_any_shape(rng):
    chain, strings, rewards = random_chain(2, 1, rng), all_strings(2, 3), torch.randn(2, generator=rng, dtype=F64)
    expected = rewards[strings].sum(-1)
    close(chain.total_reward(strings.view(2, 4, 3), rewards), expected.view(2, 4))
    close(chain.total_reward(strings[5], rewards), expected[5])


# --- begun strings ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: CHAIN.begin(0), "^n must be an integer >= 1, got 0"),
        (lambda: CHAIN.append(CHAIN.begin(3), torch.zeros(2).long()), "^tokens and contexts must have one shape"),
        (lambda: CHAIN.append(CHAIN.begin(2), torch.tensor([0, 3])), r"^tokens must lie in 0\.\.2, got .* 0 to 3"),
        (
            lambda: CHAIN.take(CHAIN.begin(2), torch.tensor([0, 2])),
            r"^index must lie in 0\.\.1, got values from 0 to 2",
        ),
    ],
)
def test_begun_strings_refuse_what_does_not_fit(call, text):
    with pytest.raises(ValueError, match=text):
        call()


def test_a_number_of_symbols_is_an_alphabet(rng):
    table = torch.randn(9, 3, generator=rng, dtype=F64).log_softmax(-1)
    numbered, named = MarkovChain(table, 3), MarkovChain(table, "ab ")
    assert len(numbered.alphabet) == len(set(numbered.alphabet)) == 3 and numbered.order == 2
    tokens = torch.tensor([[0, 1, 2, 0], [2, 2, 1, 1]])
    assert torch.equal(numbered.logps(tokens), named.logps(tokens))
    assert torch.equal(numbered.encode(numbered.decode(tokens)), tokens)
    numbered.check_alike("other", MarkovChain(table, 3))  # two chains of one number of symbols are alike
    with pytest.raises(ValueError, match="alphabet must hold at least 2 distinct symbols"):
        MarkovChain(table, 1)
    with pytest.raises(ValueError, match="alphabet must be an integer >= 1, got 0"):
        MarkovChain(table, 0)
    with pytest.raises(TypeError, match="alphabet must be an int"):
        MarkovChain(table, 3.0)


@pytest.mark.parametrize("beta", [0.5, 1e-4])
def test_a_large_table_is_tilted_in_parts(beta, rng):
    v, order, length = 17, 3, 3  # 83,521 numbers: more than one part
    logps = torch.randn(v**order, v, generator=rng, dtype=F64).log_softmax(-1)
    logps[:, 0] = -math.inf  # never written
    rewards = torch.randn(v, generator=rng, dtype=F64)
    rewards[1] = -math.inf  # never kept
    rewards.requires_grad_()
    chain = MarkovChain(logps.log_softmax(-1), v)
    tilted = chain.tilt(rewards, beta, length)
    value = torch.zeros(v**order, dtype=F64)
    for _ in range(length):
        value = torch.logsumexp(chain.table(0) + rewards / beta + chain.lookahead(value), -1)
    torch.testing.assert_close(tilted.log_values[0], value, rtol=1e-12, atol=1e-12)
    (slope,) = torch.autograd.grad(tilted.log_partition, rewards)
    (expected,) = torch.autograd.grad(value[chain.start], rewards)
    torch.testing.assert_close(slope, expected, rtol=1e-9, atol=1e-12)


def test_a_context_that_leads_nowhere_leaves_the_others_alone():
    # After a 0 every symbol is excluded; after a 1, where strings start, one way avoids it.
    chain = MarkovChain(torch.tensor([[0.75, 0.25], [0.5, 0.5]], dtype=F64).log(), 2)
    rewards = torch.tensor([[-math.inf, -math.inf], [2.0, 1.0]], dtype=F64, requires_grad=True)
    tilted = chain.tilt(rewards, 1.0, 3)
    # Only 111 and 110 survive: .125 e^3 and .125 e^4.
    assert tilted.log_partition.item() == pytest.approx(math.log(0.125 * math.exp(3) + 0.125 * math.exp(4)), rel=1e-14)
    assert tilted.log_values[:3, 0].tolist() == [-math.inf] * 3 and tilted._rest.isfinite().all()
    (slope,) = torch.autograd.grad(tilted.log_partition, rewards)
    # d log Z / d r is how often the tilted law uses it: the last symbol is 0 with probability e / (1 + e).
    last = math.e / (1 + math.e)
    torch.testing.assert_close(slope, vector([0, 0], [last, 3 - last]))


@pytest.mark.parametrize("beta", [30.0, 1.0, 0.1, 0.02, 1e-3])
@pytest.mark.parametrize(("v", "order"), [(2, 1), (3, 2), (2, 3)])
def test_products_of_matrices_give_what_logarithms_give(v, order, beta, rng):
    """And say so where they would lose digits."""
    length, chain = 6, random_chain(v, order, rng)
    rare = MarkovChain((chain.table(0) * 30).log_softmax(-1), chain.alphabet)
    for ref in (chain, rare, chain.tilt(torch.randn(v, generator=rng, dtype=F64), 0.7, length)):
        for rewards in reward_tables(v, order, rng).values():
            table = ref.reward_table(rewards, length)
            table = table + 0.01 * torch.rand(table.shape, generator=rng, dtype=F64)
            values, slopes = [], []
            for road in (ref._by_products, ref._by_logarithms):
                x = table.clone().requires_grad_()
                best, rest, *in_range = road(x, beta, length)
                values.append((best / beta + rest).detach())
                alive = values[-1] > -math.inf
                slopes.append(torch.autograd.grad(torch.where(alive, rest, 0).sum(), x)[0])
                if in_range and not in_range[0]:
                    break
            else:
                torch.testing.assert_close(*values, rtol=1e-13, atol=1e-11)
                torch.testing.assert_close(*slopes, rtol=1e-10, atol=1e-10 / beta)
                continue
            assert beta < 0.1 or ref is rare


def test_products_that_leave_float64_are_noticed(rng):
    chain = random_chain(3, 2, rng)
    gap = torch.tensor([0.0, -1.0, -2.0], dtype=F64)
    for beta, length, legal in ((1.0, 20, True), (0.01, 1, True), (2.5e-3, 1, False), (1e-308, 1, False)):
        assert bool(chain._by_products(gap.expand(9, 3), beta, length)[2]) == legal
    # One step stays in range, what steps add up to does not: after "a", the one symbol left is worth 1 less.
    trap = torch.tensor([[0.0, -math.inf], [0.0, 0.0]], dtype=F64).log_softmax(-1)
    rewards = torch.tensor([[-1.0, 0.0], [0.0, 0.0]], dtype=F64)
    for length, legal in ((6, True), (8, False)):
        chain = MarkovChain(trap, "a ")
        assert bool(chain._by_products(rewards, 0.01, length)[2]) == legal
        want = torch.tensor([-100.0 * length, 0.0], dtype=F64)
        assert (chain.soft_values(rewards, 0.01, length)[0] - want)[0].abs() < 1e-9
