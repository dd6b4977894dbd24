"""Autoregressive models: laws on strings of tokens, written token by token, many strings at a time.

Every sampler of strings takes such a model. It has four methods, and a state that stands for n begun strings:

    state = model.begin(n)                 n empty strings
    model.next_logps(state)                log-probabilities of the next token, shape (n, V)
    state = model.append(state, tokens)    the same strings, one token longer
    state = model.take(state, index)       continue these strings; one may occur often, or never

A state is continued once: `append` and `take` may reuse its memory, such as a cache of keys and values, and a model
that does so refuses the old state afterwards. Reading a state changes nothing.

From these follow draws, samples and log-probabilities. `tiltlib.testing.check_model` says whether a model keeps the
rules. Strings that end early: a model that puts all mass on its end token once that was written; `Stopped` makes one of
any model.

What a string is worth, in steps: a `Gain`. Its two functions of the state are the log weight that a token earns, and
the log value of what may still come.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor

from tiltlib import _checks, categorical

__all__ = ["AutoregressiveModel", "Gain", "Stopped"]

State = TypeVar("State")


class AutoregressiveModel(ABC, Generic[State]):
    """A law on strings of tokens in 0..V-1, written token by token. Subclasses give the first four methods."""

    @abstractmethod
    def begin(self, n: int) -> State:
        """Begin n strings.

        Args:
            n: Number of strings, >= 1.

        Returns:
            A state of n empty strings.
        """

    @abstractmethod
    def next_logps(self, state: State) -> Tensor:
        """Compute the law of the next token of each string.

        Args:
            state: State of n strings, which it leaves as it is.

        Returns:
            Log-probabilities, each row normalised, shape (n, V); -inf where a token cannot come.
        """

    @abstractmethod
    def append(self, state: State, tokens: Tensor) -> State:
        """Write one more token to each string.

        Args:
            state: State of n strings; not to be used again.
            tokens: Token numbers in 0..V-1, integer tensor, shape (n,).

        Returns:
            The state of the longer strings.
        """

    @abstractmethod
    def take(self, state: State, index: Tensor) -> State:
        """Continue some of the strings.

        Args:
            state: State of n strings; not to be used again.
            index: Numbers of strings in 0..n-1, int64, shape (m,), in any order; one may occur often, or never.

        Returns:
            The state of these m strings.
        """

    def draw(self, state: State, *, generator: torch.Generator) -> Tensor:
        """Draw the next token of each string, by inverting its CDF in float64.

        Args:
            state: State of n strings, which it leaves as it is.
            generator: Source of randomness, on the device of the model.

        Returns:
            Token numbers, int64, shape (n,).

        Raises:
            TypeError: `generator` is no generator, or `next_logps` returns no floating tensor.
            ValueError: `next_logps` returns another shape than (n, V), or rows that do not sum to 1.
        """
        rows = self._rows(state)
        with _checks.trusted():
            return categorical.sample(rows, 1, generator=generator)[:, 0]

    def sample(self, n: int, length: int, *, generator: torch.Generator) -> Tensor:
        """Draw independent strings of one length, token by token.

        Args:
            n: Number of strings, >= 1.
            length: Number of tokens L, >= 1.
            generator: Source of randomness, on the device of the model.

        Returns:
            Token numbers, int64, shape (n, L).

        Raises:
            TypeError: `n` or `length` is not an int, or `generator` no generator.
            ValueError: `n` < 1 or `length` < 1, or rows of the model as for `draw`.
        """
        _checks.generator("generator", generator)
        _checks.count("n", n)
        _checks.count("length", length)
        state, drawn = self.begin(int(n)), []
        for t in range(length):
            drawn.append(self.draw(state, generator=generator))
            if t < length - 1:
                state = self.append(state, drawn[-1])
        return torch.stack(drawn, -1)

    def logps(self, tokens: Tensor) -> Tensor:
        """Compute the log-probability of strings.

            log p(y) = sum_t log p(y_t | y_<t)

        Differentiable in what the rows depend on.

        Args:
            tokens: Token numbers in 0..V-1, integer tensor, shape (n, L).

        Returns:
            Log-probabilities, float64, shape (n,).

        Raises:
            TypeError: `tokens` is not an integer tensor.
            ValueError: `tokens` not of shape (n, L), or out of range; or rows of the model as for `draw`.
        """
        tokens = _checks.sequences("tokens", tokens)
        if tokens.ndim != 2:
            raise ValueError(f"tokens must have shape (n, L), got {tuple(tokens.shape)}")
        n, length = tokens.shape
        total = torch.zeros(n, dtype=torch.float64, device=tokens.device)
        if not n:
            return total
        state = self.begin(n)
        for t, token in enumerate(tokens.unbind(-1)):
            rows = self._rows(state)
            token = _checks.indices("tokens", token, rows.shape[-1])
            total = total + rows.gather(-1, token[:, None])[:, 0].double()
            if t < length - 1:
                state = self.append(state, token)
        return total

    def _rows(self, state: State) -> Tensor:
        rows = self.next_logps(state)
        _checks.logps("next_logps", rows)
        if rows.ndim != 2:
            raise ValueError(f"next_logps must return shape (n, V), got {tuple(rows.shape)}")
        return rows


class Gain(NamedTuple):
    """The log weight of a string, in steps: what each token earns, and what the rest is expected to be worth.

        log g_t = log_tilt(y_<t, y_t) + V(y_<=t) - V(y_<t)

    The sum of these along a finished string, with V of the empty string, is the sum of the log tilts plus V of the
    finished string: its log weight. So V may be any guess while more is to come; at the end it is part of the weight,
    and 0 where the tokens have earned all of it. Differentiable in what the functions depend on.

    Attributes:
        log_values: Function V of a state of n strings, shape (n,); -inf gives up a string for good.
        log_tilt: Function (state, tokens) that gives what each token earns if it is written next, shape (n,); -inf
            excludes. None: nothing on the way.
        length: Number of tokens of a finished string, where the functions know it.
    """

    log_values: Callable[[Any], Tensor]
    log_tilt: Callable[[Any, Tensor], Tensor] | None = None
    length: int | None = None

    def check_length(self, length: int) -> None:
        """Require strings of the length that the functions know.

        Args:
            length: Number of tokens of a finished string.

        Raises:
            ValueError: the gain is for strings of another length.
        """
        if self.length not in (None, length):
            raise ValueError(f"length must be {self.length}, that of the gain, got {length}")

    def values(self, state: Any, n: int) -> Tensor:
        """Compute the values of a state. Differentiable in what the functions depend on.

        Args:
            state: State of n strings.
            n: Number of strings.

        Returns:
            Values, float64, shape (n,).

        Raises:
            TypeError: `log_values` returns no floating tensor.
            ValueError: `log_values` returns another shape, NaN or +inf.
        """
        return _checks.returned("log_values", self.log_values(state), n)

    def earned(self, state: Any, tokens: Tensor) -> Tensor:
        """Compute what tokens earn that will be written next. Differentiable in what the function depends on.

        Args:
            state: State of n strings, before the tokens are appended.
            tokens: The tokens, shape (n,).

        Returns:
            Log weights, float64, shape (n,).

        Raises:
            TypeError: `log_tilt` returns no floating tensor.
            ValueError: `log_tilt` returns another shape, NaN or +inf.
        """
        if self.log_tilt is None:
            return torch.zeros(len(tokens), dtype=torch.float64, device=tokens.device)
        return _checks.returned("log_tilt", self.log_tilt(state, tokens), len(tokens))

    def step(self, values: Tensor, earned: Tensor, state: Any) -> tuple[Tensor, Tensor]:
        """Compute the log weight that one token adds to each string. Differentiable in what the functions depend on.

        Args:
            values: Values before the token, shape (n,).
            earned: What the token earned, shape (n,).
            state: State after it.

        Returns:
            Log increments and the values of the state, both float64, shape (n,).

        Raises:
            TypeError: `values`, `earned` or what `log_values` returns is no floating tensor.
            ValueError: `values` or `earned` with NaN or +inf, or a function that returns another shape, NaN or +inf.
        """
        with _checks.together():
            _checks.rewards("values", values)
            _checks.rewards("earned", earned)
            ahead = self.values(state, len(values))
        # What has value 0 has weight 0 for good, whatever follows.
        return torch.where(values > -math.inf, earned + ahead - values, -math.inf), ahead


class Stopped(AutoregressiveModel[tuple[State, Tensor]]):
    """A model of which every string ends at its first end token: after it only end tokens follow.

    So strings of one length stand for strings of different lengths, cut off if they have not ended by then.

    Args:
        model: The model.
        end: Number of the token that ends a string.

    Raises:
        TypeError: `model` is no `AutoregressiveModel`, or `end` not an int.
        ValueError: `end` < 0.
    """

    def __init__(self, model: AutoregressiveModel[State], end: int) -> None:
        _checks.instance("model", model, AutoregressiveModel)
        _checks.symbol("end", end)
        self.model, self.end = model, int(end)

    def begin(self, n: int) -> tuple[State, Tensor]:
        """Begin n strings.

        Args:
            n: Number of strings, >= 1.

        Returns:
            A state of n empty strings.
        """
        state = self.model.begin(n)
        return state, torch.zeros(n, dtype=torch.bool, device=self.model.next_logps(state).device)

    def next_logps(self, state: tuple[State, Tensor]) -> Tensor:
        """Compute the law of the next token: that of the model, or certainly the end token.

        Differentiable if the rows of the model are.

        Args:
            state: State of n strings.

        Returns:
            Log-probabilities, dtype of the model, shape (n, V).

        Raises:
            ValueError: `end` is not the number of a token of the model.
        """
        inner, ended = state
        rows = self.model.next_logps(inner)
        _checks.symbol("end", self.end, rows.shape[-1])
        certain = torch.full_like(rows[:1], -math.inf)
        certain[:, self.end] = 0.0
        return torch.where(ended[:, None], certain, rows)

    def append(self, state: tuple[State, Tensor], tokens: Tensor) -> tuple[State, Tensor]:
        """Write one more token to each string.

        Args:
            state: State of n strings; not to be used again.
            tokens: Token numbers in 0..V-1, integer tensor, shape (n,).

        Returns:
            The state of the longer strings.
        """
        inner, ended = state
        return self.model.append(inner, tokens), ended | (tokens == self.end)

    def take(self, state: tuple[State, Tensor], index: Tensor) -> tuple[State, Tensor]:
        """Continue some of the strings.

        Args:
            state: State of n strings; not to be used again.
            index: Numbers of strings in 0..n-1, int64, shape (m,).

        Returns:
            The state of these m strings.
        """
        inner, ended = state
        return self.model.take(inner, index), ended[index]
