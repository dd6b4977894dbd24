"""The examples in the docstrings of the library."""

import doctest
from importlib import import_module

import pytest
from test_api import MODULES

FINDER = doctest.DocTestFinder(exclude_empty=True)
EXAMPLES = {
    test.name: test for name in MODULES for test in FINDER.find(import_module(f"tiltlib.{name}"), name) if test.examples
}


def test_there_are_examples():
    assert len(EXAMPLES) >= 7


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_example_prints_what_it_says(name):
    said = []
    failed, _ = doctest.DocTestRunner().run(EXAMPLES[name], out=said.append)
    assert not failed, "".join(said)
