"""A character Markov chain: fitted to words or strings, drawn from, and tilted exactly by an additive reward.

The next symbol depends on the last `order` symbols, its context. A context is a number in base V, the most recent
symbol last, so appending symbol a to context c gives (c V + a) mod V^order: recursions over all contexts are reshapes,
not look-ups. Strings have a fixed length L and start after a separator. Nothing here enumerates the V^L strings, yet
the partition function, the tilted law and the law of the total reward are exact.

A chain is float64, whatever it is made of: a table of a smaller dtype is promoted and normalised again, and what a
chain returns is float64 too.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from tiltlib import _checks, _numerics
from tiltlib.autoregressive import AutoregressiveModel

__all__ = ["LETTERS_AND_SPACE", "MarkovChain", "RewardLaw", "State", "TiltedChain"]

LETTERS_AND_SPACE = "abcdefghijklmnopqrstuvwxyz "


class RewardLaw(NamedTuple):
    """Law of the total reward of a string.

    Attributes:
        values: Possible totals in ascending order, float64, shape (S,).
        logps: Their log-probabilities, shape (S,).
    """

    values: Tensor
    logps: Tensor


def _log(x: Tensor) -> Tensor:
    """Logarithm of numbers >= 0. Where it is -inf its gradient is 0, not 0 / 0."""
    return torch.where(x > 0, torch.where(x > 0, x, 1.0).log(), -math.inf)


def _symbols(alphabet: str | int) -> str:
    """Give V symbols: those of the caller, or V characters of an area that Unicode leaves to private use."""
    if isinstance(alphabet, str):
        return alphabet
    _checks.count("alphabet", alphabet)
    return "".join(map(chr, range(0xF0000, 0xF0000 + int(alphabet))))


def _alphabet_size(alphabet: str) -> int:
    if len(set(alphabet)) < len(alphabet) or len(alphabet) < 2:
        raise ValueError(f"alphabet must hold at least 2 distinct symbols, got {alphabet!r}")
    return len(alphabet)


class State(NamedTuple):
    """Begun strings of a chain: all that the next symbols depend on.

    Attributes:
        step: Number of symbols that they have.
        contexts: Context of each, int64, shape (n,).
    """

    step: int
    contexts: Tensor


class MarkovChain(AutoregressiveModel[State]):
    """A law on strings over an alphabet, given by next-symbol log-probabilities per context.

    One table serves every step, or each step has its own. In the second case the chain is the law of strings of at most
    that many symbols: `length` says how many; otherwise it is None. Differentiable in the table.

    Args:
        logps: Next-symbol log-probabilities, each row normalised. Shape (V^order, V), or (L, V^order, V) with one table
            per step. The chain keeps a copy.
        alphabet: V distinct symbols, or their number V if nobody reads them; the last one is the separator, and every
            string starts after separators.

    Raises:
        TypeError: `logps` is not a floating tensor, or `alphabet` neither str nor int.
        ValueError: rows not normalised, a shape that is no power of V, or a repeated symbol.
    """

    length: int | None

    def __init__(self, logps: Tensor, alphabet: str | int = LETTERS_AND_SPACE) -> None:
        _checks.logps("logps", logps)
        alphabet = _symbols(alphabet)
        v = _alphabet_size(alphabet)
        contexts = logps.shape[-2] if logps.ndim in (2, 3) else 1
        order = round(math.log(max(1, contexts), v))
        if order < 1 or logps.shape[-2:] != (v**order, v):
            raise ValueError(
                f"logps must have shape (V^order, V) or (L, V^order, V) with V = {v}, order >= 1, "
                f"got {tuple(logps.shape)}"
            )
        self.alphabet, self.order = alphabet, order
        self.length = logps.shape[0] if logps.ndim == 3 else None
        # A copy either way. What a smaller dtype is off by is no error of the caller: it is normalised away.
        self._tables = logps.clone() if logps.dtype == torch.float64 else torch.log_softmax(logps.double(), -1)
        self.device = logps.device
        self.start = v**order - 1  # `order` separators

    @classmethod
    def fit(
        cls, words: Sequence[str], weights: Tensor, order: int, *, alphabet: str = LETTERS_AND_SPACE
    ) -> "MarkovChain":
        """Fit the chain by maximum likelihood to a stream of independent words with a separator after each.

            P(a | context) = weight of a after the context / weight of the context

        Words are independent, so what stands before the last separator carries no information: a context is cut there,
        and a context that no word shows takes the row of its longest suffix that some word shows. Differentiable in
        `weights`.

        Args:
            words: Non-empty words over the alphabet without the separator.
            weights: Frequency of each word, shape (len(words),), floating, finite, >= 0, not all 0.
            order: Context length, >= 1.
            alphabet: V distinct symbols, the separator last.

        Returns:
            The fitted chain, float64, on the device of `weights`.

        Raises:
            TypeError: `weights` is not a floating tensor, or `order` is not an int.
            ValueError: no words, weights of the wrong shape or sign, `order` < 1, or a symbol outside the alphabet.

        Source: [shannon1948], section 3; book, `chain-tilt`.
        """
        _checks.count("order", order)
        if not words:
            raise ValueError("words must hold at least one word, got none")
        _checks.tensor("weights", weights)
        if weights.shape != (len(words),):
            raise ValueError(f"weights must have shape ({len(words)},), one per word, got {tuple(weights.shape)}")
        some = (weights.isfinite() & (weights >= 0)).all() & (weights > 0).any()
        _checks.holds(
            some,
            lambda: ValueError(
                f"weights must be finite and >= 0 with a positive sum, "
                f"got values from {weights.min().item():g} to {weights.max().item():g}"
            ),
        )
        v, separator = _alphabet_size(alphabet), alphabet[-1]
        code = {symbol: i for i, symbol in enumerate(alphabet)}
        contexts, symbols, owner = [], [], []
        for i, word in enumerate(words):
            if not word or separator in word or not set(word) <= code.keys():
                raise ValueError(f"words must be non-empty strings over {alphabet[:-1]!r}, got {word!r}")
            context = v**order - 1
            for symbol in (*word, separator):
                contexts.append(context)
                symbols.append(code[symbol])
                owner.append(i)
                context = (context * v + code[symbol]) % v**order
        context_ids = torch.tensor(contexts, device=weights.device)
        symbol_ids = torch.tensor(symbols, device=weights.device)
        # In units of a power of 2, which costs no digit, so that no sum of weights overflows.
        unit = 2.0 ** (math.frexp(weights.max().item())[1] - 1)
        mass = (weights.double() / unit)[torch.tensor(owner, device=weights.device)]
        table = torch.zeros(1, v, dtype=torch.float64, device=weights.device)
        for length in range(order + 1):
            cells = (context_ids % v**length) * v + symbol_ids
            counts = torch.zeros(v**length * v, dtype=torch.float64, device=weights.device)
            counts = counts.index_add(0, cells, mass).view(-1, v)
            total = counts.sum(-1, keepdim=True)
            # Contexts of length m are m-digit numbers; dropping the oldest symbol repeats the shorter table V times.
            shorter = table.repeat(len(counts) // len(table), 1)
            table = torch.where(total > 0, counts / torch.where(total > 0, total, 1.0), shorter)
        with _checks.trusted():
            return cls(_log(table), alphabet)

    def stopped(self, length: int) -> "MarkovChain":
        """Stop the chain at its first separator: after it only separators follow.

        So strings of one length stand for words of different lengths, cut off if they have not ended by then.
        Differentiable in the table.

        Args:
            length: Length L of the padded strings, >= 1.

        Returns:
            The stopped chain, with one table per step.

        Raises:
            TypeError: `length` is not an int.
            ValueError: `length` < 1, or longer than this chain.
        """
        _checks.count("length", length)
        tables = torch.stack([self.table(t) for t in range(length)])
        # Only the first context of a string ends in a separator without the string having ended.
        tables[1:, self._v - 1 :: self._v, :-1] = -math.inf
        tables[1:, self._v - 1 :: self._v, -1] = 0.0
        return MarkovChain(tables, self.alphabet)

    def refit(self, tokens: Tensor, log_weights: Tensor | None = None, *, per_step: bool) -> "MarkovChain":
        """Fit a chain of the same order to weighted strings by maximum likelihood.

            q(a | c) = weight of a after c / weight of c,    counted at each step alone, or over all steps

        This maximises sum_i w_i log q(y_i). With one table per step the class holds every tilt of this chain by an
        additive reward. A context that no string shows keeps the row of this chain; over all steps, that of the last.
        Differentiable in `log_weights`.

        Args:
            tokens: Strings y_i as symbol numbers, integer tensor, shape (n, L).
            log_weights: Unnormalised natural-log weight of each string, shape (n,); -inf excludes it. Default: all 0.
            per_step: Whether each step gets its own table.

        Returns:
            The fitted chain, float64; with one table per step, of length L.

        Raises:
            TypeError: `tokens` is not an integer tensor, or `log_weights` not a floating one.
            ValueError: `tokens` out of range or not of shape (n, L) with n >= 1; `log_weights` of another shape, with
                NaN or +inf, or all -inf; or strings longer than this chain.

        Source: [shannon1948], section 3, for the counts; book, `weighted-likelihood`.
        """
        with _checks.together():
            tokens = self._check_tokens(tokens)
            if tokens.ndim != 2 or len(tokens) == 0:
                raise ValueError(f"tokens must have shape (n, L) with n >= 1, got {tuple(tokens.shape)}")
            n, length = tokens.shape
            if log_weights is None:
                log_weights = torch.zeros(n, dtype=torch.float64, device=tokens.device)
            _checks.rewards("log_weights", log_weights)
            if log_weights.shape != (n,):
                raise ValueError(f"log_weights must have shape ({n},), one per string, got {tuple(log_weights.shape)}")
            _checks.some_left("log_weights", log_weights.amax())
        weights = (log_weights.double() - log_weights.amax()).exp()
        v, contexts = self._v, self._v**self.order
        with _checks.trusted():
            cells = self.contexts_before(tokens) * v + tokens
        tables = []
        counts = torch.zeros(contexts * v, dtype=torch.float64, device=tokens.device)
        for t in range(length):
            if per_step:
                counts = torch.zeros_like(counts)
            counts = counts.index_add(0, cells[:, t], weights)
            if per_step or t == length - 1:
                table = counts.view(contexts, v)
                total = table.sum(-1, keepdim=True)
                fitted = _log(table / torch.where(total > 0, total, 1.0))
                tables.append(torch.where(total > 0, fitted, self.table(t)))
        with _checks.trusted():
            return MarkovChain(torch.stack(tables) if per_step else tables[0], self.alphabet)

    @property
    def _v(self) -> int:
        return len(self.alphabet)

    @property
    def end(self) -> int:
        """Number of the separator, the last symbol, which ends a string of `stopped`."""
        return self._v - 1

    def table(self, step: int) -> Tensor:
        """Return the next-symbol log-probabilities at a step. Differentiable in the table that the chain was made of.

        Args:
            step: Position in the string, from 0; below `length` if the chain has one.

        Returns:
            Log-probabilities, float64 whatever the chain was made of, shape (V^order, V).

        Raises:
            ValueError: `step` outside 0..length-1 of a chain with one table per step.
        """
        return self._table(step).clone()

    def _table(self, step: int) -> Tensor:
        """Return the table of a step, not a copy where there is one."""
        self._check_step(step)
        return self._tables if self._tables.ndim == 2 else self._tables[step]

    def rows(self, step: int, contexts: Tensor) -> Tensor:
        """Return the next-symbol log-probabilities at a step in some contexts.

        Args:
            step: As for `table`.
            contexts: Context numbers in 0..V^order - 1, integer tensor, any shape.

        Returns:
            Log-probabilities, float64, shape (..., V).

        Raises:
            TypeError: `contexts` is not an integer tensor.
            ValueError: as for `table`, or `contexts` out of range.
        """
        self._check_step(step)
        contexts = self._check_contexts(contexts)
        return self._table(step)[contexts]

    def _check_step(self, step: int) -> None:
        if self.length is not None and not 0 <= step < self.length:
            raise ValueError(f"step must lie in 0..{self.length - 1}, got {step}")

    def _check_numbers(self, name: str, value: Tensor, k: int | None = None) -> Tensor:
        """Require numbers of symbols, or of k other things; return them as int64. None at all is a batch like any."""
        if isinstance(value, Tensor) and value.dtype in _checks.INTEGERS and value.numel() == 0:
            return value.long()
        return _checks.indices(name, value, k or self._v)

    def _check_contexts(self, contexts: Tensor) -> Tensor:
        return self._check_numbers("contexts", contexts, self._v**self.order)

    def check_alike(self, name: str, other: "MarkovChain") -> None:
        """Require a chain over the same contexts.

        Args:
            name: What to call the other chain in an error.
            other: The other chain.

        Raises:
            TypeError: `other` is not a `MarkovChain`.
            ValueError: another order or alphabet.
        """
        _checks.instance(name, other, MarkovChain)
        if (other.order, other.alphabet) != (self.order, self.alphabet):
            raise ValueError(
                f"{name} must have order {self.order} over {self.alphabet!r}, "
                f"got order {other.order} over {other.alphabet!r}"
            )

    def encode(self, texts: Sequence[str]) -> Tensor:
        """Turn strings of one length into symbol numbers.

        Args:
            texts: Strings of one length L >= 1 over the alphabet.

        Returns:
            Symbol numbers, int64, shape (len(texts), L).

        Raises:
            ValueError: no strings, different lengths, or a symbol outside the alphabet.
        """
        lengths = sorted({len(text) for text in texts})
        if isinstance(texts, str) or len(lengths) != 1 or lengths[0] == 0:
            got = "one string" if isinstance(texts, str) else f"lengths {lengths}"
            raise ValueError(f"texts must be a list of non-empty strings of one length, got {got}")
        code = {symbol: i for i, symbol in enumerate(self.alphabet)}
        unknown = {symbol for text in texts for symbol in text} - code.keys()
        if unknown:
            raise ValueError(f"texts must use the alphabet {self.alphabet!r} only, got {sorted(unknown)}")
        return torch.tensor([[code[symbol] for symbol in text] for text in texts], device=self.device)

    def decode(self, tokens: Tensor) -> list[str]:
        """Turn symbol numbers into strings.

        Args:
            tokens: Symbol numbers in 0..V-1, integer tensor, shape (n, L).

        Returns:
            n strings of length L.

        Raises:
            TypeError: `tokens` is not an integer tensor.
            ValueError: `tokens` outside 0..V-1, or not of shape (n, L) with L >= 1.
        """
        tokens = self._check_tokens(tokens)
        if tokens.ndim != 2:
            raise ValueError(f"tokens must have shape (n, L), got {tuple(tokens.shape)}")
        return ["".join(self.alphabet[i] for i in row) for row in tokens.tolist()]

    def contexts_before(self, tokens: Tensor) -> Tensor:
        """Return the context before each symbol of strings.

        Args:
            tokens: Symbol numbers, integer tensor, shape (..., L).

        Returns:
            Context numbers, int64, shape (..., L).

        Raises:
            TypeError: `tokens` is not an integer tensor.
            ValueError: `tokens` outside 0..V-1, or strings of length 0.
        """
        tokens = self._check_tokens(tokens)
        context = torch.full(tokens.shape[:-1], self.start, device=tokens.device)
        contexts = []
        with _checks.trusted():
            for symbol in tokens.unbind(-1):
                contexts.append(context)
                context = self.next_contexts(context, symbol)
        return torch.stack(contexts, -1)

    def _check_tokens(self, tokens: Tensor) -> Tensor:
        """Require strings over the alphabet; return them as int64."""
        tokens = _checks.sequences("tokens", tokens)
        most = self._v - 1
        _checks.require(
            tokens,
            0,
            most,
            lambda low, high: ValueError(f"tokens must lie in 0..{most}, got {int(low)} to {int(high)}"),
        )
        return tokens

    def logps(self, tokens: Tensor) -> Tensor:
        """Compute the log-probability of strings.

            log p(y) = sum_t log p(y_t | y_{t-order}, ..., y_{t-1})

        Differentiable in the table.

        Args:
            tokens: Symbol numbers, integer tensor, shape (..., L).

        Returns:
            Log-probabilities, float64, shape (...).

        Raises:
            TypeError: `tokens` is not an integer tensor.
            ValueError: `tokens` outside 0..V-1, or strings of length 0.
        """
        steps = zip(self.contexts_before(tokens).unbind(-1), tokens.long().unbind(-1), strict=True)
        with _checks.trusted():
            per_symbol = [
                self.rows(t, context).gather(-1, symbol[..., None]).squeeze(-1)
                for t, (context, symbol) in enumerate(steps)
            ]
        return torch.stack(per_symbol, -1).sum(-1)

    def total_reward(self, tokens: Tensor, rewards: Tensor) -> Tensor:
        """Sum an additive reward over strings. Differentiable in `rewards`.

        Args:
            tokens: Symbol numbers, integer tensor, shape (..., L).
            rewards: Reward of each symbol, shape (V,), or of each symbol after each context, shape (V^order, V).

        Returns:
            Total reward, float64, shape (...).

        Raises:
            TypeError: `tokens` is not an integer tensor, or `rewards` not a floating one.
            ValueError: `tokens` out of range, or `rewards` of another shape, with NaN or +inf, or so large that
                differences of totals may leave float64.
        """
        with _checks.together():
            tokens = self._check_tokens(tokens)
            table = self.reward_table(rewards, tokens.shape[-1])
        with _checks.trusted():
            steps = self.contexts_before(tokens)
        return table[steps, tokens.long()].sum(-1)

    def begin(self, n: int) -> State:
        """Begin n strings.

        Args:
            n: Number of strings, >= 1.

        Returns:
            The state of n empty strings.

        Raises:
            TypeError: `n` is not an int.
            ValueError: `n` < 1.
        """
        _checks.count("n", n)
        return State(0, torch.full((int(n),), self.start, device=self.device))

    def next_logps(self, state: State) -> Tensor:
        """Compute the law of the next symbol of each string: the rows of their contexts.

        Differentiable in the table that the chain was made of.

        Args:
            state: State of n strings.

        Returns:
            Log-probabilities, float64, shape (n, V).

        Raises:
            ValueError: strings that are as long as a chain with one table per step.
        """
        with _checks.trusted():  # a state is what `begin`, `append` and `take` made
            return self.rows(*state)

    def append(self, state: State, tokens: Tensor) -> State:
        """Write one more symbol to each string.

        Args:
            state: State of n strings.
            tokens: Symbol numbers in 0..V-1, integer tensor, shape (n,).

        Returns:
            The state of the longer strings.

        Raises:
            TypeError: `tokens` is not an integer tensor.
            ValueError: `tokens` out of range, or not one for each string.
        """
        _checks.same_shape(tokens=tokens, contexts=state.contexts)
        tokens = self._check_numbers("tokens", tokens)
        with _checks.trusted():  # a state is what `begin`, `append` and `take` made
            return State(state.step + 1, self.next_contexts(state.contexts, tokens))

    def take(self, state: State, index: Tensor) -> State:
        """Continue some of the strings.

        Args:
            state: State of n strings.
            index: Numbers of strings in 0..n-1, integer tensor, shape (m,).

        Returns:
            The state of these m strings.

        Raises:
            TypeError: `index` is not an integer tensor.
            ValueError: `index` out of range.
        """
        return State(state.step, state.contexts[_checks.indices("index", index, len(state.contexts))])

    def draw(self, state: State, *, generator: torch.Generator) -> Tensor:
        """Draw the next symbol of each string, by inverting its CDF in float64.

        Args:
            state: State of n strings.
            generator: Source of randomness, on the device of the chain.

        Returns:
            Symbol numbers, int64, shape (n,).

        Raises:
            TypeError: `generator` is no generator.
            ValueError: strings that are as long as a chain with one table per step.
        """
        _checks.generator("generator", generator)
        step, contexts = state
        # Many strings share a context: beyond one string per context, turn the whole table into CDFs once.
        whole = contexts.numel() > self._v**self.order
        with _checks.trusted():  # a state is what `begin`, `append` and `take` made
            cdf = _numerics.cdf(self.table(step) if whole else self.rows(step, contexts))
        u = torch.rand((*contexts.shape, 1), generator=generator, device=cdf.device, dtype=torch.float64)
        if whole:
            return _numerics.search_rows(cdf, contexts, u.squeeze(-1))
        return torch.searchsorted(cdf, u, right=True).squeeze(-1)

    def next_contexts(self, contexts: Tensor, tokens: Tensor) -> Tensor:
        """Append a symbol to each context: its oldest symbol leaves.

            (c V + a) mod V^order

        Args:
            contexts: Context numbers in 0..V^order - 1, integer tensor, any shape.
            tokens: Symbol numbers in 0..V-1, integer tensor, a shape that broadcasts.

        Returns:
            Context numbers, int64.

        Raises:
            TypeError: `contexts` or `tokens` is not an integer tensor.
            ValueError: `contexts` or `tokens` out of range.
        """
        with _checks.together():
            contexts, tokens = self._check_contexts(contexts), self._check_numbers("tokens", tokens)
        return (contexts * self._v + tokens) % self._v**self.order

    def contexts(self, length: int) -> Tensor:
        """Compute the law of the context before each step, by a forward recursion.

            P_0(start) = 1,    P_{t+1}(c') = sum over (c, a) that lead to c' of P_t(c) p(a | c)

        Cost O(L V^{order+1}). With it, the mean of any sum over steps is exact. Differentiable in the table.

        Args:
            length: Length L of the strings, >= 1.

        Returns:
            Probabilities, float64, shape (L + 1, V^order); the last row is the law of the context after the string.

        Raises:
            TypeError: `length` is not an int.
            ValueError: `length` < 1, or longer than the chain.
        """
        _checks.count("length", length)
        law = torch.zeros(self._v**self.order, dtype=torch.float64, device=self.device)
        law[self.start] = 1.0
        laws = [law]
        for t in range(length):
            # Context (x, m) and symbol a lead to (m, a): sum over the oldest symbol x.
            moved = laws[-1][:, None] * self.table(t).exp()
            laws.append(moved.view(self._v, -1).sum(0))
        return torch.stack(laws)

    def kl(self, other: "MarkovChain", length: int) -> Tensor:
        """Compute KL(self || other) between the laws of strings of one length, exactly.

            KL = sum_t sum_c P_t(c) KL(p_t(. | c) || q_t(. | c))        (chain rule)

        Differentiable in the tables of both chains where it is finite.

        Args:
            other: Chain of the same order over the same alphabet.
            length: Length L of the strings, >= 1.

        Returns:
            Divergence in nats, float64, shape (); inf where `other` excludes a string that this chain can write.

        Raises:
            TypeError: `other` is not a chain, or `length` not an int.
            ValueError: another order or alphabet, `length` < 1, or longer than one of the chains.

        Source: [cover2006], theorem 2.5.3.
        """
        self.check_alike("other", other)
        laws, total = self.contexts(length), torch.zeros((), dtype=torch.float64, device=self.device)
        for t in range(length):
            ours, theirs = self.table(t), other.table(t)
            # A context that is never reached counts nothing, even if the divergence there is infinite. Mask before the
            # product: a masked product of 0 and inf would still have gradient NaN.
            counted = (laws[t] > 0)[:, None] & (ours > -math.inf)
            log_ratio = torch.where(counted, ours, 0.0) - torch.where(counted, theirs, 0.0)
            total = total + (laws[t] * (ours.exp() * log_ratio).sum(-1)).sum()
        return total

    def reward_table(self, rewards: Tensor, length: int = 1) -> Tensor:
        """Write an additive reward as one number per context and symbol.

        Args:
            rewards: Reward of each symbol, shape (V,), or of each symbol after each context, shape (V^order, V);
                -inf excludes.
            length: Length of the strings whose totals have to stay within float64.

        Returns:
            Rewards, float64, shape (V^order, V).

        Raises:
            TypeError: `rewards` is not a floating tensor.
            ValueError: `rewards` of another shape, with NaN or +inf, or so large that differences of totals may leave
                float64.
        """
        with _checks.together():
            _checks.rewards("rewards", rewards)
            full = (self._v**self.order, self._v)
            if tuple(rewards.shape) not in ((self._v,), full):
                raise ValueError(f"rewards must have shape ({self._v},) or {full}, got {tuple(rewards.shape)}")
            table = rewards.double()
            largest = table.detach().nan_to_num(neginf=0.0).abs().max()
            _checks.require(
                2 * length * largest,
                0,
                _checks.LARGEST,
                lambda low, high: ValueError(
                    f"rewards must be so small that totals of {length} symbols differ by less than 1.8e308, "
                    f"got {largest.item():g} in size"
                ),
            )
            return table.expand(full)

    def lookahead(self, values: Tensor) -> Tensor:
        """Write numbers per context as numbers after each symbol: entry (c, a) is values[(c V + a) mod V^order].

        Copies, no look-up. Differentiable.

        Args:
            values: One number per context, shape (V^order,).

        Returns:
            The same numbers, float64, shape (V^order, V).

        Raises:
            TypeError: `values` is not a floating tensor.
            ValueError: `values` of another shape, or with NaN or +inf.
        """
        _checks.rewards("values", values)
        if values.shape != (self._v**self.order,):
            raise ValueError(f"values must have shape ({self._v**self.order},), got {tuple(values.shape)}")
        v = self._v
        return values.double().view(-1, v).repeat(v, 1)

    def soft_values(self, rewards: Tensor, beta: float, length: int) -> Tensor:
        """Compute by backward recursion what the rest of a string is worth.

            V_t(c) = log sum_a p(a | c) exp(r(c, a) / beta + V_{t+1}(c a)),    V_L = 0

        V_t(c) = log E[exp(sum of the rewards after step t / beta) | context c], so V_0(start) is log Z over all V^L
        strings. Differentiable in `rewards` and in the table. Cost O(L V^{order+1}).

        Args:
            rewards: Reward of each symbol, shape (V,), or of each symbol after each context, shape (V^order, V);
                -inf excludes.
            beta: Temperature in reward units, > 0.
            length: Length L of the strings, >= 1.

        Returns:
            Values, float64, shape (L + 1, V^order); -inf where every continuation is excluded, and inf or -inf where a
            value leaves float64, as r / beta for tiny beta.

        Raises:
            TypeError: `rewards` is not a floating tensor, or `length` is not an int.
            ValueError: `rewards` of another shape, with NaN or +inf, or so large that differences of totals may leave
                float64; `beta` not finite and > 0; `length` < 1; or every string excluded.

        Source: [todorov2009]; book, `chain-tilt`; book, `soft-value`.
        """
        with _checks.together():
            best, rest = self._split_soft_values(rewards, beta, length)
            return best / float(beta) + rest

    def _split_soft_values(self, rewards: Tensor, beta: float, length: int) -> tuple[Tensor, Tensor]:
        """Return the two parts of V = M / beta + S, float64: a total reward M near the largest, and what is left.

        S alone stays in range for every beta, and V alone has no digits left for it where beta is small.
        """
        _checks.count("length", length)
        table = self.reward_table(rewards, length)
        _checks.positive("beta", beta)
        best, rest, in_range = self._by_products(table, float(beta), length)
        if not _numerics.shown(in_range):
            best, rest = self._by_logarithms(table, float(beta), length)
        _checks.some_left("rewards", best[0, self.start])
        return best, rest

    def _by_products(self, table: Tensor, beta: float, length: int) -> tuple[Tensor, Tensor, Tensor]:
        """Go back by products of matrices, e^{V_t} = (p e^{r / beta}) e^{V_{t+1}}, in a fraction of the time.

        Here M is the largest reward times the steps that are left. Also say whether every product stayed within the
        range of float64, so that none lost a digit.
        """
        v, below, earlier = self._v, -690.0, None  # e^-690 is a normal number, and so is its inverse
        value = torch.ones_like(table[:, 0])  # e^S, with a largest entry of 1
        total, scale = value.new_zeros(()), value.new_zeros(())
        best, rest = [torch.zeros_like(value)], [torch.zeros_like(value)]
        lowest = []
        for t in reversed(range(length)):
            logps = self._table(t)
            if logps is not earlier:
                earlier = logps
                possible = torch.where(logps > -math.inf, table, -math.inf)
                largest = _finite(possible.detach().amax())
                exponents = (possible - largest).div_(beta).add_(logps)
                smallest = torch.where(possible > -math.inf, exponents, 0.0).detach().amin()
                # From context (oldest x, between m) symbol a leads to context (m, a); every step reads all of this.
                matrices = exponents.exp_().view(v, -1, v).permute(1, 2, 0).contiguous()
            positive = torch.where(value > 0, value, 1.0)
            lowest.append(smallest + positive.detach().amin().log())
            value = torch.bmm(value.view(-1, 1, v), matrices).squeeze(1).mT.reshape(-1)
            top = value.detach().amax()
            top = torch.where(top > 0, top, 1.0)
            value, total, scale = value / top, total + largest, scale + top.log()
            alive = value > 0
            best.append(torch.where(alive, total, -math.inf))
            rest.append(torch.where(alive, value, 1.0).log() + scale)
        return torch.stack(best[::-1]), torch.stack(rest[::-1]), torch.stack(lowest).amin() > below

    def _by_logarithms(self, table: Tensor, beta: float, length: int) -> tuple[Tensor, Tensor]:
        """Go back by sums of exponentials under a logarithm, which hold for every range; here M is the largest."""
        best = [torch.zeros_like(table[:, 0])]
        rest = best[:]
        earlier, parts = None, []
        for t in reversed(range(length)):
            logps = self._table(t)
            if logps is not earlier:
                earlier, parts = logps, self._parts(table, logps)
            ahead = [values[-1].view(-1, self._v).mT[:, None].contiguous() for values in (best, rest)]
            steps = [_backward_step(rewards, logps, *ahead, beta=beta) for rewards, logps in parts]
            best.append(torch.cat([top for top, _ in steps]))
            rest.append(torch.cat([left for _, left in steps]))
        return torch.stack(best[::-1]), torch.stack(rest[::-1])

    def _parts(self, rewards: Tensor, logps: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Cut two tables into parts that stay in a cache, as (next symbol a, oldest symbol x, what lies between).

        A large table is mostly memory to be fetched. In this order a sum over the next symbol adds long rows, and what
        follows, context (between, a), is the same for every x.
        """
        possible = torch.where(logps > -math.inf, rewards, -math.inf)
        cubes = (table.mT.reshape(self._v, self._v, -1) for table in (possible, logps))
        together = max(1, 2**16 * self._v // logps.numel())
        return [(r.contiguous(), p.contiguous()) for r, p in zip(*(c.split(together, 1) for c in cubes), strict=True)]

    def tilt(self, rewards: Tensor, beta: float, length: int) -> "TiltedChain":
        """Tilt the law of strings of one length by exp(total reward / beta), exactly.

            pi*(a | c, t) = p(a | c) exp(r(c, a) / beta + V_{t+1}(c a) - V_t(c))

        Differentiable in `rewards` and in the table.

        Args:
            rewards: As for `soft_values`.
            beta: Temperature in reward units, > 0.
            length: Length L of the strings, >= 1.

        Returns:
            The tilted chain, with `log_partition`; its conditionals depend on the step.

        Raises:
            TypeError: as for `soft_values`.
            ValueError: as for `soft_values`.

        Source: [todorov2009]; book, `chain-tilt`.
        """
        return TiltedChain(self, rewards, beta, length)

    def reward_law(self, rewards: Tensor, length: int) -> RewardLaw:
        """Compute the exact law of a whole-numbered additive reward, by a forward recursion over (context, sum).

            P_{t+1}(c', s + r(c, a)) = sum over (c, a) that lead to c' of P_t(c, s) p(a | c)

        Cost O(L V^{order+1} S) with S the number of possible sums, as small matrix products. Differentiable in the
        table only: the rewards are whole numbers.

        Args:
            rewards: As for `soft_values`, whole numbers only.
            length: Length L of the strings, >= 1.

        Returns:
            `RewardLaw(values, logps)`: every sum from L min r to L max r, and its log-probability.

        Raises:
            TypeError: `rewards` is not a floating tensor, or `length` is not an int.
            ValueError: `rewards` of another shape or not whole numbers, or `length` < 1.

        Source: book, `reward-reduction`.
        """
        _checks.count("length", length)
        with _checks.together():
            table = self.reward_table(rewards, length)
            broken = (table != table.floor()) | table.isinf()
            _checks.holds(
                ~broken,
                lambda: ValueError(f"rewards must be finite whole numbers here, got {table[broken][0].item():g}"),
            )
        v, low = self._v, int(table.min())
        distinct = [int(r) for r in table.unique().tolist()]
        size = length * (distinct[-1] - low) + 1
        mass = torch.zeros(v**self.order, size, dtype=torch.float64, device=self.device)
        mass[self.start, 0] = 1.0
        for t in range(length):
            probs = self.table(t).exp()
            # Context (x, m) moves to (m, a): the oldest symbol x is summed out, for every middle part m at once.
            oldest_last = mass.view(v, -1, size).transpose(0, 1)
            mass = torch.zeros_like(mass)
            for r in distinct:
                moves = (probs * (table == r)).view(v, -1, v).permute(1, 2, 0)
                moved = torch.bmm(moves, oldest_last).reshape(-1, size)
                mass[:, r - low :] += moved[:, : size - (r - low)]
        values = torch.arange(size, dtype=torch.float64, device=mass.device) + length * low
        law = mass.sum(0)
        return RewardLaw(values, _log(law / law.sum()))


def _backward_step(rewards: Tensor, logps: Tensor, best: Tensor, rest: Tensor, *, beta: float) -> tuple[Tensor, Tensor]:
    """Go back by one symbol, from numbers per context after it to numbers per context before it."""
    ahead = rewards + best
    top = ahead.detach().amax(0)
    # Shift before dividing: the differences may only underflow.
    ahead.sub_(_finite(top)).div_(beta).add_(logps).add_(rest)
    largest = _finite(ahead.detach().amax(0))
    # Where nothing is left the sum is 0, elsewhere at least 1: any finite number will do beside a `top` of -inf.
    total = ahead.sub_(largest).exp_().sum(0).clamp(min=0.5)
    return top.flatten(), (total.log() + largest).flatten()


def _finite(x: Tensor) -> Tensor:
    return torch.where(x > -math.inf, x, 0.0)


class TiltedChain(MarkovChain):
    """The exact tilt of a chain by an additive reward: the same contexts, conditionals that depend on the step.

    Made by `MarkovChain.tilt`.

    Attributes:
        ref: The chain that was tilted.
        length: Length L of its strings.
        log_values: Soft values V, float64, shape (L + 1, V^order).
        log_partition: log Z = V_0(start), shape ().

    Its tables are made from these when they are asked for.
    """

    length: int

    def __init__(self, ref: MarkovChain, rewards: Tensor, beta: float, length: int) -> None:
        with _checks.together():
            self._best, self._rest = ref._split_soft_values(rewards, beta, length)
        self.ref, self.alphabet, self.order, self.start = ref, ref.alphabet, ref.order, ref.start
        self.length, self._beta, self.device = length, float(beta), ref.device
        with _checks.trusted():
            self._rewards = ref.reward_table(rewards).clone()
        self.log_values = self._best / self._beta + self._rest
        self.log_partition = self.log_values[0, self.start]

    def _table(self, step: int) -> Tensor:
        with _checks.trusted():
            return self.rows(step, torch.arange(self._v**self.order, device=self.device))

    def rows(self, step: int, contexts: Tensor) -> Tensor:
        """Return the next-symbol log-probabilities at a step in some contexts, as `MarkovChain.rows` does.

        Differentiable in the rewards and in the table of the reference.

        Args:
            step: Position in the string, in 0..L-1.
            contexts: Context numbers in 0..V^order - 1, integer tensor, any shape.

        Returns:
            Log-probabilities, float64, shape (..., V).

        Raises:
            TypeError: `contexts` is not an integer tensor.
            ValueError: `step` outside 0..L-1, or `contexts` out of range.
        """
        self._check_step(step)
        contexts = self._check_contexts(contexts)
        with _checks.trusted():
            following = self.next_contexts(contexts[..., None], torch.arange(self._v, device=contexts.device))
            ref = self.ref.rows(step, contexts)
        best, rest = self._best[step, contexts].unsqueeze(-1), self._rest[step, contexts].unsqueeze(-1)
        gain = self._rewards[contexts] + self._best[step + 1, following] - best
        # A symbol that the reference never writes was left out of the largest total, and may lie above it.
        gain = torch.where(ref > -math.inf, gain, 0.0)
        tilted = ref + gain / self._beta + self._rest[step + 1, following] - rest
        # A context from which every continuation is excluded is never reached; it keeps the row of the reference.
        return torch.where(best > -math.inf, tilted, ref)
