"""Rules that every public call keeps, each over the whole table of example calls."""

import ast
import inspect
from pathlib import Path

import pytest
import torch
from calls import CALLS, PUBLIC, Inputs, leaves, same

import tiltlib
from tiltlib import _checks

PACKAGE = Path(tiltlib.__file__).parent


def name_of(key: str) -> str:
    return key.split()[0]


# --- the table is complete -------------------------------------------------------------------------------------------


def test_every_public_callable_is_called():
    called = {name_of(key) for key in CALLS}
    made = {type(value) for value in parts(CALLS[key](Inputs()).result() for key in CALLS)}
    left = {name for name, value in PUBLIC.items() if name not in called and value not in made}
    assert left == {"verify.ClaimFailed"} | {name for name in PUBLIC if name.split(".")[0] in ("data", "figures")}


def parts(values):
    for value in values:
        yield value
        if isinstance(value, tuple):
            yield from parts(value)


def test_every_optional_argument_is_given():
    given = {(name_of(key), argument) for key, call in CALLS.items() for argument in call(Inputs()).bound.arguments}
    for name, value in PUBLIC.items():
        if any(name_of(key) == name for key in CALLS):
            missing = {p for p in inspect.signature(value).parameters if (name, p) not in given}
            assert not missing - {"self", "cls"} or name in ("verify.Verdict",), (name, missing)


def test_every_word_of_every_option_is_given(monkeypatch):
    check, given, allowed = _checks.one_of, set(), {}

    def one_of(name, value, words):
        where = inspect.currentframe().f_back.f_code.co_name
        given.add((where, name, value))
        allowed[where, name] = words
        check(name, value, words)

    monkeypatch.setattr(_checks, "one_of", one_of)
    for call in CALLS.values():
        call(Inputs()).result()
    assert {(*option, word) for option, words in allowed.items() for word in words} <= given
    sources = [ast.parse(path.read_text(encoding="utf-8")) for path in PACKAGE.glob("*.py")]
    asked = [node for tree in sources for node in ast.walk(tree) if isinstance(node, ast.Call)]
    assert len(allowed) == sum(isinstance(n.func, ast.Attribute) and n.func.attr == "one_of" for n in asked) > 5


# --- randomness ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", CALLS)
def test_draws_come_from_the_generator_alone(key):
    before = torch.random.get_rng_state()
    m = Inputs()
    first = leaves(CALLS[key](m).result())
    again = leaves(CALLS[key](Inputs()).result())
    assert torch.equal(torch.random.get_rng_state(), before)  # the global generator stands still
    assert all(same(value, again[place]) for place, value in first.items())
    if "generator" in inspect.signature(PUBLIC[name_of(key)]).parameters and m.draws:
        other = leaves(CALLS[key](Inputs(seed=1)).result())
        assert not all(same(value, other[place]) for place, value in first.items())


def test_every_function_that_takes_a_generator_draws_in_some_call():
    drawing = {name_of(key) for key, call in CALLS.items() if "generator" in call(Inputs()).bound.arguments}
    names = {name_of(key) for key in CALLS}
    assert drawing == {name for name in names if "generator" in inspect.signature(PUBLIC[name]).parameters}
