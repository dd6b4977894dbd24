import builtins
import math
import re

import pytest
import torch

from tiltlib import data
from tiltlib.markov import LETTERS_AND_SPACE, MarkovChain
from tiltlib.mixtures import GaussianMixture

wordfreq = pytest.importorskip("wordfreq")
datasets = pytest.importorskip("sklearn.datasets")


def test_digits_are_the_listed_images():
    images, labels = data.digits()
    assert images.shape == (1797, 64) and images.dtype == torch.float64 and labels.dtype == torch.int64
    assert images.min() == -1 and images.max() == 1
    assert labels.bincount().tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
    # The first image is a 0: a ring of ink around paper, written row by row.
    assert labels[:10].tolist() == list(range(10))
    assert (8 * images[0] + 8).view(8, 8)[:2].tolist() == [[0, 0, 5, 13, 9, 1, 0, 0], [0, 0, 13, 15, 10, 15, 5, 0]]
    listed = torch.from_numpy(datasets.load_digits().images)
    assert torch.equal(8 * images.view(-1, 8, 8) + 8, listed)


def test_digits_make_a_mixture():
    images, labels = data.digits()
    model = GaussianMixture.fit(images, labels, 0.02)
    assert (model.components, model.dimension) == (10, 64)
    torch.testing.assert_close(model.mean(), images.mean(0), rtol=0, atol=1e-12)
    # Nearly every image is recognised, which a transposed image or a shuffled label would not be.
    right = model.posterior(images).argmax(-1) == labels
    assert right.double().mean() > 0.98


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


@pytest.mark.parametrize(
    ("module", "package", "call"),
    [("wordfreq", "wordfreq", lambda: data.english_words(1)), ("sklearn", "scikit-learn", data.digits)],
)
def test_a_missing_package_is_named(module, package, call, monkeypatch):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name.split(".")[0] == module:
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=f"needs the {package} package: pip install {package}"):
        call()


def test_as_many_words_as_the_list_holds():
    with pytest.raises(ValueError, match="^n must be at most ") as refused:
        data.english_words(10**9)
    most = int(re.search(r"at most (\d+),", str(refused.value))[1])
    assert len(data.english_words(most)[0]) == most
    with pytest.raises(ValueError, match=rf"^n must be at most {most}, .*, got {most + 1}$"):
        data.english_words(most + 1)
