"""Real inputs that ship with pinned packages: no download, the same numbers on every machine."""

import torch
from torch import Tensor

from tiltlib import _checks

__all__ = ["digits", "english_words"]


def digits() -> tuple[Tensor, Tensor]:
    """Return 1797 handwritten digits of 8 x 8 pixels, and which digit each of them is.

        x = pixel / 8 - 1,    pixels 0..16, so that paper is -1 and full ink is 1

    They come with the `scikit-learn` package: the test set of a collection at UCI, written by 13 people.

    Returns:
        Images, row by row of pixels, float64, shape (1797, 64), in [-1, 1]; and digits 0..9, int64, shape (1797,).

    Raises:
        ImportError: the `scikit-learn` package is missing.

    Source: [alpaydin1998].
    """
    try:
        from sklearn import datasets
    except ImportError as error:
        raise ImportError("tiltlib.data.digits needs the scikit-learn package: pip install scikit-learn") from error
    pixels, labels = datasets.load_digits(return_X_y=True)
    return torch.from_numpy(pixels).double() / 8 - 1, torch.from_numpy(labels).long()


def english_words(n: int) -> tuple[list[str], Tensor]:
    """Return the n most frequent English words that are spelled with the letters a to z only, and their frequencies.

    The list comes from the `wordfreq` package: text of several kinds up to about 2021; its authors have frozen it.

    Args:
        n: Number of words, >= 1.

    Returns:
        The words, most frequent first, and their relative frequencies among these n, float64, shape (n,), sum 1.

    Raises:
        ImportError: the `wordfreq` package is missing.
        TypeError: `n` is not an int.
        ValueError: `n` < 1 or more words than the list holds.

    Source: [speer2022].
    """
    _checks.count("n", n)
    try:
        import wordfreq
    except ImportError as error:
        raise ImportError("tiltlib.data.english_words needs the wordfreq package: pip install wordfreq") from error
    frequencies = wordfreq.get_frequency_dict("en")
    # Ties in frequency are broken by spelling, so that the order never depends on a dictionary.
    words = sorted((w for w in frequencies if w.isascii() and w.isalpha()), key=lambda w: (-frequencies[w], w))
    if n > len(words):
        raise ValueError(f"n must be at most {len(words)}, the number of such words in the list, got {n}")
    mass = torch.tensor([frequencies[w] for w in words[:n]], dtype=torch.float64)
    return words[:n], mass / mass.sum()
