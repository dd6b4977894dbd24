import builtins
import math

import pytest
import torch

from tiltlib import data
from tiltlib.markov import LETTERS_AND_SPACE, MarkovChain

wordfreq = pytest.importorskip("wordfreq")


def test_english_words_are_what_the_frozen_list_says():
    words, weights = data.english_words(10)
    assert words == ["the", "to", "and", "of", "a", "in", "i", "is", "for", "that"]
    assert weights.dtype == torch.float64 and weights.shape == (10,)
    listed = wordfreq.get_frequency_dict("en")
    expected = torch.tensor([listed[word] for word in words], dtype=torch.float64)
    torch.testing.assert_close(weights, expected / expected.sum(), rtol=1e-14, atol=0)
    assert listed["the"] == pytest.approx(10**-1.27)  # the list is in whole centibels: "the" is at -127


def test_english_words_are_plain_sorted_and_distinct():
    words, weights = data.english_words(20000)
    assert len(set(words)) == 20000 and all(set(word) <= set(LETTERS_AND_SPACE[:-1]) for word in words)
    assert bool((weights.diff() <= 0).all()) and bool((weights > 0).all())
    assert math.fsum(weights.tolist()) == pytest.approx(1, abs=1e-14)
    # Equal frequencies are ordered by spelling, and fewer words are a prefix of more.
    tied = (weights.diff() == 0).nonzero().flatten().tolist()
    assert tied and all(words[i] < words[i + 1] for i in tied)
    assert data.english_words(500)[0] == words[:500]


def test_english_words_fit_a_chain():
    words, weights = data.english_words(300)
    chain = MarkovChain.fit(words, weights, 3)
    # "the" is by far the most frequent word: t is the most likely first letter, and after " th" comes e.
    first = chain.table(0)[chain.start]
    assert chain.alphabet[int(first.argmax())] == "t"
    context = int(chain.encode([" th"]) @ torch.tensor([27**2, 27, 1]))
    assert chain.alphabet[int(chain.table(0)[context].argmax())] == "e"


@pytest.mark.parametrize(
    ("n", "error", "text"),
    [
        (0, ValueError, "n must be an integer >= 1, got 0"),
        (1.0, TypeError, "n must be an int, got float"),
        (10**9, ValueError, r"n must be at most \d+, the number of such words in the list, got 1000000000"),
    ],
)
def test_bad_n(n, error, text):
    with pytest.raises(error, match=text):
        data.english_words(n)


def test_missing_wordfreq_is_named(monkeypatch):
    real = builtins.__import__

    def no_wordfreq(name, *args, **kwargs):
        if name == "wordfreq":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", no_wordfreq)
    with pytest.raises(ImportError, match="needs the wordfreq package: pip install wordfreq"):
        data.english_words(1)
