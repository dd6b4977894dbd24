"""Conformance of models: right ones pass, each way of being wrong is named."""

import pytest
import torch
from models import BROKEN, Caching, Prefixes, RudeAppend, RudeTake

from tiltlib import markov, policies, testing
from tiltlib.autoregressive import Stopped


def models(rng):
    yield Prefixes(3, 3, rng)
    yield Prefixes(2, 5, rng, zeros=True)
    yield Caching(3, 3, rng)
    yield Stopped(Prefixes(3, 3, rng), 1)
    chain = markov.MarkovChain.fit(["ab", "abba", "b"], torch.ones(3), 2, alphabet="ab ")
    yield chain
    yield chain.stopped(4)
    yield chain.tilt(torch.tensor([0.0, 1.0, -1.0]), 0.5, 3)
    policy = policies.TransformerPolicy(chain, 3, generator=rng, width=16, heads=2)
    with torch.no_grad():
        policy.head.weight.normal_(generator=rng)
    yield policy


@pytest.mark.slow
def test_the_models_of_the_library_and_others_pass(rng):
    for model in models(rng):
        testing.check_model(model, 3, generator=rng)


def test_a_single_token_and_a_state_that_refuses(rng):
    testing.check_model(Prefixes(3, 1, rng), 1, generator=rng, draws=100)
    testing.check_model(Caching(2, 2, rng), 2, generator=rng, n=2, draws=100)


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_model_is_told_what_is_wrong(name, rng):
    methods, rule = BROKEN[name]
    model = type("Broken", (Prefixes,), methods)(3, 3, rng)
    with pytest.raises(AssertionError, match=rule):
        testing.check_model(model, 3, generator=rng)


@pytest.mark.parametrize(("kind", "what"), [(RudeAppend, "append"), (RudeTake, "take")])
def test_memory_that_moves_without_a_word_is_found(kind, what, rng):
    rule = (
        f"^a state that {what} has moved must give its old rows or be refused, got numbers that differ by .*, after 1"
    )
    with pytest.raises(AssertionError, match=rule):
        testing.check_model(kind(3, 3, rng), 3, generator=rng)


def test_last_digits_are_no_difference_and_others_are(rng):
    """Float32 rows that depend on the batch in the last digits pass; at a thousandth they do not."""
    for size, passes in ((1e-6, True), (1e-3, False)):
        jitter = lambda self, state, size=size: torch.log_softmax(  # noqa: E731
            Prefixes.next_logps(self, state) + size * len(state) * torch.arange(3), -1
        )
        model = type("Jitter", (Prefixes,), {"next_logps": jitter})(3, 2, rng)
        if passes:
            testing.check_model(model, 2, generator=rng)
        else:
            with pytest.raises(AssertionError, match="got numbers that differ by"):
                testing.check_model(model, 2, generator=rng)


def test_a_model_may_refuse_strings_that_are_longer_than_asked_for(rng):
    def append(self, state, tokens):
        assert state.shape[1] < 2
        return Prefixes.append(self, state, tokens)

    testing.check_model(type("Strict", (Prefixes,), {"append": append})(3, 3, rng), 3, generator=rng)


def test_draws_are_looked_at_after_one_token_too(rng):
    late = type(
        "Late",
        (Prefixes,),
        {
            "draw": lambda self, state, generator: (
                Prefixes.draw(self, state, generator=generator)
                if state.shape[1] == 0 or len(state) < 100
                else torch.arange(len(state)) % 3
            )
        },
    )
    with pytest.raises(AssertionError, match="^draws must follow next_logps, got evidence 1e.*, after 1 tokens$"):
        testing.check_model(late(3, 2, rng), 2, generator=rng)


def test_log_probabilities_of_long_strings_are_compared_by_their_digits(rng):
    chain = markov.MarkovChain(torch.full((2, 2), 0.5).log(), "a ")
    for off, passes in ((1e-4, True), (1e-3, False)):
        logps = lambda self, tokens, off=off: (1 + off) * markov.MarkovChain.logps(self, tokens)  # noqa: E731
        model = type("Off", (markov.MarkovChain,), {"logps": logps})(chain.table(0), "a ")
        if passes:
            testing.check_model(model, 40, generator=rng, n=2)
        else:
            with pytest.raises(
                AssertionError, match="^logps must be the sum of the rows along the string, got numbers"
            ):
                testing.check_model(model, 40, generator=rng, n=2)


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"model": 3}, TypeError, "model must be an AutoregressiveModel, got int"),
        ({"length": 0}, ValueError, "length must be an integer >= 1, got 0"),
        ({"n": 1}, ValueError, "^n must be at least 2, to see whether strings are mixed up, got 1"),
        ({"draws": 1.0}, TypeError, "^draws must be an int, got float"),
        ({"n": 2.0}, TypeError, "^n must be an int, got float"),
        ({"generator": None}, TypeError, "generator must be a torch.Generator, got NoneType"),
    ],
)
def test_bad_input(change, error, text, rng):
    with pytest.raises(error, match=text):
        testing.check_model(**{"model": Prefixes(2, 2, rng), "length": 2, "generator": rng, **change})
