"""Models that the library has never seen: by their four methods alone."""

import itertools
import math

import torch
from helpers import F64, random_law
from torch import Tensor

from tiltlib.autoregressive import AutoregressiveModel


class Prefixes(AutoregressiveModel[Tensor]):
    """A law on strings of which each token may depend on everything before it: one random row per prefix."""

    def __init__(self, v: int, length: int, rng: torch.Generator, *, zeros: bool = False):
        self.v, self.length = v, length
        self.tables = [torch.stack([random_law(v, rng) for _ in range(v**t)]) for t in range(length)]
        if zeros:  # the last token can always come
            for table in self.tables:
                table[:, 0][torch.rand(len(table), generator=rng) < 0.3] = -math.inf
                table -= table.logsumexp(-1, keepdim=True)

    def begin(self, n: int) -> Tensor:
        return torch.zeros(n, 0, dtype=torch.int64)

    def number(self, tokens: Tensor) -> Tensor:
        place = self.v ** torch.arange(tokens.shape[-1] - 1, -1, -1)
        return (tokens * place).sum(-1)

    def next_logps(self, state: Tensor) -> Tensor:
        return self.tables[state.shape[-1]][self.number(state)]

    def append(self, state: Tensor, tokens: Tensor) -> Tensor:
        return torch.cat([state, tokens[:, None]], -1)

    def take(self, state: Tensor, index: Tensor) -> Tensor:
        return state[index]

    def strings(self) -> Tensor:
        return torch.tensor(list(itertools.product(range(self.v), repeat=self.length)))

    def law(self) -> Tensor:
        """Log-probability of every string, from the tables alone."""
        rows = [table[self.number(self.strings()[:, :t])] for t, table in enumerate(self.tables)]
        terms = [row.gather(-1, token[:, None])[:, 0] for row, token in zip(rows, self.strings().T, strict=True)]
        return torch.stack(terms).sum(0)


def tilted(law: Tensor, log_weights: Tensor) -> Tensor:
    return torch.log_softmax(law + log_weights, -1)


def soft_values(model: Prefixes, log_weights: Tensor) -> list[Tensor]:
    """Log-expectation of exp(log weight) from every prefix of every length, by summing up the strings."""
    values = [log_weights]
    for table in reversed(model.tables):
        values.append(torch.logsumexp(table + values[-1].view(-1, model.v), -1))
    return values[::-1]


class Caching(Prefixes):
    """Writes into one buffer that all states share, as a network with a cache of keys and values might."""

    def begin(self, n):
        memory = torch.zeros(n, self.length, dtype=torch.int64)
        return [memory, 0, [0]]  # the buffer, the length of these strings, how much of the buffer is written

    def next_logps(self, state):
        memory, length, written = state
        if written[0] != length:
            raise ValueError("state was continued already: its memory has moved")
        return self.tables[length][self.number(memory[:, :length])]

    def append(self, state, tokens):
        memory, length, written = state
        self.next_logps(state)
        memory[:, length] = tokens
        written[0] += 1
        return [memory, length + 1, written]

    def take(self, state, index):
        memory, length, _ = state
        return [memory[index], length, [length]]


class Rude(Caching):
    """Reads whatever is in the buffer."""

    def next_logps(self, state):
        memory, length, _ = state
        return self.tables[length][self.number(memory[:, :length])]

    def append(self, state, tokens):
        memory, length, written = state
        memory[:, length] = tokens
        memory[:, 0] = (memory[:, 0] + 1) % self.v  # as if it kept no copy
        return [memory, length + 1, written]


BROKEN = {
    "not-normalised": ("next_logps", lambda self, state: Prefixes.next_logps(self, state) + 0.1),
    "one-row": ("next_logps", lambda self, state: Prefixes.next_logps(self, state)[0]),
    "no-tensor": ("next_logps", lambda self, state: Prefixes.next_logps(self, state).tolist()),
    "whole-batch": (
        "next_logps",
        lambda self, state: (
            Prefixes.next_logps(self, state).roll(1, 0) if state.shape[1] else self.tables[0].repeat(len(state), 1)
        ),
    ),
    "last-token-only": (
        "append",
        lambda self, state, tokens: (
            torch.cat([state * 0, tokens[:, None]], -1) if len(state) % 2 else torch.cat([state, tokens[:, None]], -1)
        ),
    ),
    "take-ignores-order": ("take", lambda self, state, index: state[index.sort().values]),
    "take-nothing": (
        "take",
        lambda self, state, index: state[: len(index)] if len(index) <= len(state) else state[index * 0],
    ),
    "greedy-draws": ("draw", lambda self, state, generator: Prefixes.next_logps(self, state).argmax(-1)),
    "uniform-draws": ("draw", lambda self, state, generator: torch.randint(self.v, (len(state),), generator=generator)),
    "float-draws": ("draw", lambda self, state, generator: torch.zeros(len(state), dtype=F64)),
    "logps-of-the-first": ("logps", lambda self, tokens: self.tables[0][0][tokens[:, 0]]),
    "logps-per-token": ("logps", lambda self, tokens: tokens.double()),
}
