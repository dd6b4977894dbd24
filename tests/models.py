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


class RudeAppend(Caching):
    """Reads whatever is in the buffer, which `append` shifts."""

    def next_logps(self, state):
        memory, length, _ = state
        return self.tables[length][self.number(memory[:, :length])]

    def append(self, state, tokens):
        memory, length, written = state
        kept = memory.clone()
        kept[:, length] = tokens
        memory[:] = (memory + 1) % self.v
        return [kept, length + 1, written]


class RudeTake(RudeAppend):
    """The same, with a `take` that shifts."""

    append = Caching.append

    def take(self, state, index):
        memory, length, _ = state
        kept = memory[index]
        memory[:] = (memory + 1) % self.v
        return [kept, length, [length]]


def _later(method, change, least=1):
    """The right method, changed once strings have some tokens."""
    return lambda self, state, *rest, **named: (
        change(self, method(self, state, *rest, **named))
        if state.shape[1] >= least
        else method(self, state, *rest, **named)
    )


def _forgetful(self, state):
    """Gives another answer when it is asked again."""
    self.asked = getattr(self, "asked", 0) + 1
    return Prefixes.next_logps(self, state).roll(int(self.asked > 2), -1)


def _elsewhere(self, state):
    """Excludes a token for strings in odd places."""
    rows = Prefixes.next_logps(self, state).clone()
    if state.shape[1]:
        rows[1::2, 0] = -math.inf
    return rows.log_softmax(-1)


AFTER_1 = ", after 1 tokens$"
BROKEN = {
    "not-normalised": (
        {"next_logps": lambda self, state: Prefixes.next_logps(self, state) + 0.1},
        "^next_logps must be log-probabilities that sum to 1 .* got logsumexp = 0.1, after 0 tokens$",
    ),
    "one-row": (
        {"next_logps": lambda self, state: Prefixes.next_logps(self, state)[0]},
        r"^next_logps must return shape \(6, 'V'\), got \(3,\), after 0 tokens$",
    ),
    "fewer-rows": (
        {"next_logps": _later(Prefixes.next_logps, lambda self, rows: rows[:2])},
        r"^next_logps must return shape \(6, 'V'\), got \(2, 3\)" + AFTER_1,
    ),
    "fewer-tokens": (
        {"next_logps": _later(Prefixes.next_logps, lambda self, rows: rows[:, :2].log_softmax(-1))},
        r"^next_logps must return shape \(6, 'V'\), got \(6, 2\)" + AFTER_1,
    ),
    "no-tensor": (
        {"next_logps": _later(Prefixes.next_logps, lambda self, rows: rows.tolist())},
        "^next_logps must return a floating tensor" + AFTER_1,
    ),
    "whole-numbers": (
        {"next_logps": _later(Prefixes.next_logps, lambda self, rows: rows.long())},
        "^next_logps must return a floating tensor" + AFTER_1,
    ),
    "places": (
        {"next_logps": lambda self, state: self.tables[1][torch.arange(len(state)) % 3]},
        "^next_logps must give equal rows to empty strings, got numbers that differ by .*, after 0 tokens$",
    ),
    "reading-counts": (
        {"next_logps": _forgetful},
        "^reading must leave a state as it was, got numbers that differ by .*, after 0",
    ),
    "excluded-elsewhere": (
        {"next_logps": _elsewhere},
        "^append after take must know what each string holds, got -inf at other places, after 0 tokens$",
    ),
    "whole-batch": (
        {
            "next_logps": lambda self, state: (
                Prefixes.next_logps(self, state).roll(1, 0) if state.shape[1] else self.tables[0].repeat(len(state), 1)
            )
        },
        "^append after take must know what each string holds, got numbers that differ by .*, after 0 tokens$",
    ),
    "last-token-only": (
        {
            "append": lambda self, state, tokens: torch.cat([state * (len(state) % 2 == 0), tokens[:, None]], -1),
        },
        "^append after take must know|^a row must not depend on other strings, .*, after 2 tokens$",
    ),
    "take-ignores-order": (
        {"take": lambda self, state, index: state[index.sort().values]},
        "^take must continue the strings that it is asked for, got numbers that differ by .*" + AFTER_1,
    ),
    "take-drops": (
        {"take": lambda self, state, index: state[index.unique()]},
        r"^take must continue the strings that it is asked for, got shape \(.*\) for \(7, 3\), after 0 tokens$",
    ),
    "greedy-draws": (
        {"draw": lambda self, state, generator: Prefixes.next_logps(self, state).argmax(-1)},
        "^draws must follow next_logps, got evidence 1e.*, after 0 tokens$",
    ),
    "uniform-draws": (
        {"draw": _later(Prefixes.draw, lambda self, token: torch.arange(len(token)) % self.v, 2)},
        "^draws must follow next_logps, got evidence 1e.*, after 2 tokens$",
    ),
    "float-draws": (
        {"draw": lambda self, state, generator: torch.zeros(len(state), dtype=F64)},
        r"^draw must return int64 of shape \(6,\), got torch.float64 of shape \(6,\), after 0 tokens$",
    ),
    "columns": (
        {"draw": _later(Prefixes.draw, lambda self, token: token[:, None])},
        r"^draw must return int64 of shape \(6,\), got torch.int64 of shape \(6, 1\)" + AFTER_1,
    ),
    "negative-draws": (
        {"draw": _later(Prefixes.draw, lambda self, token: token - self.v)},
        r"^draw must return tokens in 0\.\.2" + AFTER_1,
    ),
    "draws-from-1": (
        {"draw": _later(Prefixes.draw, lambda self, token: token * 0 + self.v)},
        r"^draw must return tokens in 0\.\.2" + AFTER_1,
    ),
    "logps-of-the-first": (
        {"logps": lambda self, tokens: self.tables[0][0][tokens[:, 0]]},
        "^logps must be the sum of the rows along the string, got numbers that differ by .*, after 3 tokens$",
    ),
    "logps-per-token": (
        {"logps": lambda self, tokens: tokens.double()},
        r"^logps must be the sum of the rows along the string, got shape \(6, 3\) for \(6,\), after 3 tokens$",
    ),
    "draws-what-is-excluded": (
        {
            "next_logps": _later(
                Prefixes.next_logps, lambda self, rows: torch.tensor([0.0, -math.inf, -math.inf]).expand(len(rows), 3)
            ),
            "draw": _later(Prefixes.draw, lambda self, token: token * 0 + 1),
        },
        "^draw must not return what is excluded" + AFTER_1,
    ),
}
