"""Conformance of models: right ones pass, each way of being wrong is named."""

import pytest
import torch
from models import BROKEN, Caching, Prefixes, Rude

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


RULES = {
    "not-normalised": "next_logps must be log-probabilities that sum to 1 .*, after 0 tokens",
    "one-row": r"next_logps must return shape \(6, V\), after 0 tokens, got \(3,\)",
    "no-tensor": "next_logps must return a floating tensor",
    "whole-batch": "append after take must know what each string holds, after 0 tokens; got numbers",
    "last-token-only": "a row must not depend on other strings, nor on its place among them, after 2 tokens",
    "take-ignores-order": "take must continue the strings that it is asked for",
    "take-nothing": "take must continue the strings that it is asked for",
    "greedy-draws": "draws of empty strings must follow next_logps, got evidence 1e",
    "uniform-draws": "draws of empty strings must follow next_logps, got evidence 1e",
    "float-draws": "draw must return int64 tokens of shape",
    "logps-of-the-first": "logps must be the sum of the rows along the string; got numbers that differ",
    "logps-per-token": r"logps must have shape \(6,\), got \(6, 3\)",
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_model_is_told_what_is_wrong(name, rng):
    method, wrong = BROKEN[name]
    model = type("Broken", (Prefixes,), {method: wrong})(3, 3, rng)
    with pytest.raises(AssertionError, match=RULES[name]):
        testing.check_model(model, 3, generator=rng)


def test_memory_that_moves_without_a_word_is_found(rng):
    with pytest.raises(AssertionError, match="must give its old rows or be refused|must not depend|be refused"):
        testing.check_model(Rude(3, 3, rng), 3, generator=rng)


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"model": 3}, TypeError, "model must be an AutoregressiveModel, got int"),
        ({"length": 0}, ValueError, "length must be an integer >= 1, got 0"),
        ({"n": 1}, ValueError, "n must be at least 2"),
        ({"draws": 1.0}, TypeError, "draws must be an int, got float"),
        ({"generator": None}, TypeError, "generator must be a torch.Generator, got NoneType"),
    ],
)
def test_bad_input(change, error, text, rng):
    with pytest.raises(error, match=text):
        testing.check_model(**{"model": Prefixes(2, 2, rng), "length": 2, "generator": rng, **change})
