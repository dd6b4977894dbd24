"""A causal language model as a law on strings of tokens: for every sampler here that takes an autoregressive model.

    net = AutoModelForCausalLM.from_pretrained(...).double().eval()
    prompt = language.encode(tokenizer, "The soup tasted")
    model = language.LanguageModel(net, prompt, 16, end=tokenizer.eos_token_id, top_k=20)
    tokens = model.sample(64, generator=generator)

One object is the law after one prompt. Several prompts are several objects over one network, so nothing is padded, and
`generate` draws a pool from each, and keeps on disk what is drawn.

The network is what Hugging Face `transformers` makes of a causal model; this module itself does not import that
package. Needed is `net(input_ids=, cache=, use_cache=True)`, with `logits` and `cache` in what it returns, and a cache
that has `batch_select_indices`. Older versions say `past_key_values` for `cache`; both are understood.

Precision. The same string computed in another batch gives other last digits. In float64 they do not matter (1e-13); in
float32 about 3 tokens in 1,000 that are drawn from the same uniform numbers come out different, from laws that differ
by 1e-4; in bfloat16 laws differ by up to .07 in total variation, so that what is drawn does not follow what is
computed. That is refused.
"""

import copy
import inspect
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tiltlib import _checks, _numerics
from tiltlib.autoregressive import AutoregressiveModel
from tiltlib.markov import MarkovChain

__all__ = ["Begun", "LanguageModel", "Pool", "Tree", "encode", "generate"]

_PROTOCOL = "model must take input_ids, cache (or past_key_values) and use_cache, and return logits and that cache"


def encode(tokenizer: Any, text: str) -> Tensor:
    """Turn a text into token numbers, and make sure that they stand for this text and nothing else.

    Some tokenizers put a token before the text, change its spaces or its case, or forget what they do not know. The law
    that follows is then that of another prompt. So the tokens are decoded again and have to give the text. Where a
    first token is wanted, write it into the text.

    Args:
        tokenizer: A tokenizer of `transformers` or of `tokenizers`.
        text: The text, not empty.

    Returns:
        Token numbers, int64, on the CPU, shape (S,).

    Raises:
        TypeError: `text` is no string.
        ValueError: `text` is empty, or is not what its tokens stand for.
    """
    _checks.instance("text", text, str)
    if not text:
        raise ValueError("text must hold at least one character, got ''")
    encoded = tokenizer.encode(text, add_special_tokens=False)
    numbers = list(getattr(encoded, "ids", encoded))
    back = tokenizer.decode(numbers, skip_special_tokens=False)
    if back != text:
        raise ValueError(f"text must be what its tokens stand for, got {back!r} from the tokens of {text!r}")
    return torch.tensor(numbers, device="cpu")


@dataclass
class Begun:
    """Begun strings of a language model. `tokens` may be read; the rest is for the model.

    Attributes:
        tokens: What is written so far, int64, shape (n, t).
        ended: Whether the end token is among it, shape (n,).
        cache: Keys and values of some rows; None once another state has gone on with them.
        index: Which of these rows each string continues, shape (n,); None if they are the rows.
        law: Token numbers and log-probabilities of what comes next, after each of the rows; None until it is asked for.
    """

    tokens: Tensor
    ended: Tensor
    cache: Any
    index: Tensor | None
    law: tuple[Tensor, Tensor] | None


class Tree(NamedTuple):
    """Every string that a language model can write, with its exact law.

    Strings are numbered: number i has the ranks that are the digits of i in base k, the first token first. The rank of
    a token is its place, by token number, among the k that may follow.

    Attributes:
        chain: The same law as a Markov chain on ranks: symbols 0..k-1, and the symbol k, which is never written and
            stands before the first token. Its order is the longest context, max(1, L - 1).
        ids: For each place t the k tokens that may follow each of k^t beginnings, int64, shape (k^t, k).
        tokens: Every string, int64, shape (k^L, L).
        logps: Their log-probabilities, float64, shape (k^L,); -inf for strings that go on after their end token.
    """

    chain: MarkovChain
    ids: tuple[Tensor, ...]
    tokens: Tensor
    logps: Tensor

    @property
    def _k(self) -> int:
        return self.ids[0].shape[-1]

    def find(self, tokens: Tensor) -> Tensor:
        """Find the numbers of strings.

        Args:
            tokens: Strings, integer tensor, shape (n, L).

        Returns:
            Their numbers in 0..k^L - 1, int64, shape (n,).

        Raises:
            TypeError: `tokens` is not an integer tensor.
            ValueError: `tokens` of another shape, or a string that is not in the tree.
        """
        tokens = _checks.sequences("tokens", tokens)
        if tokens.ndim != 2 or tokens.shape[1] != len(self.ids):
            raise ValueError(f"tokens must have shape (n, {len(self.ids)}), got {tuple(tokens.shape)}")
        at = torch.zeros_like(tokens[:, 0])
        for t, (ids, token) in enumerate(zip(self.ids, tokens.unbind(1), strict=True)):
            hit = ids[at] == token[:, None]
            if not bool(hit.any(1).all()):
                row = int((~hit.any(1)).nonzero()[0])
                raise ValueError(
                    f"tokens must be strings of the tree, got token {int(token[row])} at place {t} of row {row}"
                )
            at = at * self._k + hit.byte().argmax(1)  # the first, should the end token stand in every column
        return at

    def ranks(self, index: Tensor) -> Tensor:
        """Write numbers of strings as strings of ranks: symbols of `chain`.

        Args:
            index: Numbers in 0..k^L - 1, integer tensor, shape (...).

        Returns:
            Ranks in 0..k-1, int64, shape (..., L).

        Raises:
            TypeError: `index` is not an integer tensor.
            ValueError: `index` out of range.
        """
        index = _numbers("index", index, len(self.tokens))
        return torch.stack([index // self._k**t % self._k for t in reversed(range(len(self.ids)))], -1)

    def number(self, ranks: Tensor) -> Tensor:
        """Number strings of ranks, such as draws of `chain`: the inverse of `ranks`.

        Args:
            ranks: Ranks in 0..k-1, integer tensor, shape (..., L).

        Returns:
            Numbers in 0..k^L - 1, int64, shape (...).

        Raises:
            TypeError: `ranks` is not an integer tensor.
            ValueError: `ranks` out of range, or not of L places.
        """
        ranks = _numbers("ranks", ranks, self._k)
        if ranks.ndim == 0 or ranks.shape[-1] != len(self.ids):
            raise ValueError(f"ranks must have shape (..., {len(self.ids)}), got {tuple(ranks.shape)}")
        at = torch.zeros_like(ranks[..., 0])
        for rank in ranks.unbind(-1):
            at = at * self._k + rank
        return at

    def rewards(self, rewards: Tensor) -> Tensor:
        """Write a reward of whole strings as an additive reward of `chain`: all of it on the last token.

        Differentiable in `rewards`.

        Args:
            rewards: Reward of every string, shape (k^L,); -inf excludes it.

        Returns:
            Reward of each symbol after each context, float64, shape ((k+1)^order, k+1): 0 before the last token.

        Raises:
            TypeError: `rewards` is not a floating tensor.
            ValueError: `rewards` of another shape, or with NaN or +inf.
        """
        _checks.rewards("rewards", rewards)
        if rewards.shape != self.logps.shape:
            raise ValueError(f"rewards must have shape {tuple(self.logps.shape)}, got {tuple(rewards.shape)}")
        k, length = self._k, len(self.ids)
        table = torch.zeros((k + 1) ** self.chain.order, k + 1, dtype=torch.float64, device=rewards.device)
        contexts = _contexts(k, length - 1, self.chain.order, rewards.device)
        return table.index_put(
            (contexts[:, None], torch.arange(k, device=rewards.device)), rewards.double().view(-1, k)
        )


def _numbers(name: str, value: object, k: int) -> Tensor:
    """Require numbers in 0..k-1; none at all is a batch like any."""
    empty = isinstance(value, Tensor) and value.dtype in _checks.INTEGERS and value.numel() == 0
    return value.long() if empty and isinstance(value, Tensor) else _checks.indices(name, value, k)


def _contexts(k: int, t: int, order: int, device: torch.device) -> Tensor:
    """Number the contexts of a tree's chain after t tokens, in the order of the strings: (k^t,)."""
    c = torch.zeros(1, dtype=torch.int64, device=device)
    for _ in range(order - t):
        c = c * (k + 1) + k
    for _ in range(min(t, order)):
        c = (c[:, None] * (k + 1) + torch.arange(k, device=device)).flatten()
    return c


class LanguageModel(AutoregressiveModel[Begun]):
    """The law of the next L tokens of a causal language model after a prompt.

        p(y_t | prompt, y_<t) = softmax over the k likeliest tokens of logits / temperature;    after `end` only `end`

    Laws are float64, whatever the network computes in. Of tokens that are equally likely at the k-th place those of
    lower number are kept. The prompt runs once for each `begin`, not once for each string; its keys and values are
    copied. A state of n strings holds keys and values of n strings: `sample`, `logps` and `tree` go through `chunk`
    strings at a time instead.

    The network must be in evaluation mode. Its parameters may change between calls; states begun before are then
    mixtures of old and new.

    Args:
        model: The network, as in the description of this module.
        prompt: Token numbers of the prompt, integer tensor, shape (S,), S >= 1; see `encode`.
        length: Number of tokens L of a finished string, >= 1.
        end: Number of the token that ends a string. None: strings do not end early.
        top_k: Number of tokens k that may follow, >= 1. None: all.
        temperature: What logits are divided by, > 0.
        chunk: Largest number of rows of logits to hold at a time in `sample`, `logps` and `tree`, >= 1.

    Raises:
        TypeError: `model` does not take or return what is needed; `prompt` is not an integer tensor; `length`, `end`,
            `top_k` or `chunk` is not an int, or `temperature` not a number.
        ValueError: `prompt` empty or of another shape; `length`, `top_k`, `temperature` or `chunk` out of range; `end`
            or `top_k` outside the vocabulary; `model` in training mode; or logits of half precision or with NaN.

    Source: [vaswani2017] for the network, [fan2018] for the k likeliest tokens; book, `language-tree`.
    """

    def __init__(
        self,
        model: Callable[..., Any],
        prompt: Tensor,
        length: int,
        *,
        end: int | None = None,
        top_k: int | None = None,
        temperature: float = 1.0,
        chunk: int = 128,
    ) -> None:
        prompt = _checks.integers("prompt", prompt)
        if prompt.ndim != 1:
            raise ValueError(f"prompt must have shape (S,), the token numbers of one prompt, got {tuple(prompt.shape)}")
        _checks.count("length", length)
        _checks.positive("temperature", temperature)
        _checks.count("chunk", chunk)
        self.model, self.prompt, self.length = model, prompt, int(length)
        self.temperature, self.chunk = float(temperature), int(chunk)
        forward = inspect.signature(getattr(model, "forward", model)) if callable(model) else None
        self._cache_name = "cache" if forward is not None and "cache" in forward.parameters else "past_key_values"
        with torch.no_grad():
            self.vocabulary = self._run(prompt[None], None)[0].shape[-1]
        if end is not None:
            _checks.symbol("end", end, self.vocabulary)
        if top_k is not None:
            _checks.count("top_k", top_k)
            if int(top_k) > self.vocabulary:
                raise ValueError(f"top_k must be at most {self.vocabulary}, the size of the vocabulary, got {top_k}")
        self.end = None if end is None else int(end)
        self.top_k = None if top_k is None else int(top_k)

    def _run(self, tokens: Tensor, cache: Any) -> tuple[Tensor, Any]:
        """Let the network read tokens; return its logits and the cache."""
        if getattr(self.model, "training", False):
            raise ValueError("model must be in evaluation mode, got training mode: call model.eval()")
        try:
            out = self.model(input_ids=tokens, use_cache=True, **{self._cache_name: cache})
        except TypeError as error:
            raise TypeError(f"{_PROTOCOL}, got {error}") from error
        logits, cache = getattr(out, "logits", None), getattr(out, self._cache_name, None)
        if not isinstance(logits, Tensor) or not hasattr(cache, "batch_select_indices"):
            raise TypeError(f"{_PROTOCOL} with batch_select_indices, got {type(logits)} and {type(cache)}")
        if logits.ndim != 3 or logits.shape[:2] != tokens.shape:
            raise ValueError(f"logits must have shape {(*tokens.shape, 'V')}, got {tuple(logits.shape)}")
        if logits.dtype not in (torch.float32, torch.float64):
            raise ValueError(
                f"logits must be float32 or float64, got {logits.dtype}: rounded so far, the law of a string depends "
                "on its batch; call model.float() or model.double()"
            )
        if not bool(logits.amax() < math.inf):  # NaN if any is
            raise ValueError("logits must be finite or -inf, got NaN or +inf")
        return logits, cache

    def _law(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Cut logits to the k likeliest tokens: their numbers in ascending order, and log-probabilities, (..., k)."""
        x = logits.double() / self.temperature
        v = self.vocabulary
        k = v if self.top_k is None else self.top_k
        if k == v:
            return torch.arange(v, device=x.device).expand(x.shape), torch.log_softmax(x, -1)
        top = x.detach().topk(k)
        ids = top.indices
        least = top.values.amin(-1, keepdim=True)
        if bool(((x >= least).sum(-1) > k).any()):  # a tie at the edge: which of them topk takes depends on the machine
            ids = torch.sort(x.detach(), descending=True, stable=True).indices[..., :k]
        ids = ids.sort(-1).values
        return ids, torch.log_softmax(x.gather(-1, ids), -1)

    def begin(self, n: int) -> Begun:
        """Begin n strings; see `AutoregressiveModel.begin`. Not differentiable.

        Args:
            n: Number of strings, >= 1.

        Returns:
            The state of n empty strings.

        Raises:
            TypeError: `n` is not an int.
            ValueError: `n` < 1.
        """
        _checks.count("n", n)
        with torch.no_grad():
            logits, cache = self._run(self.prompt[None], None)
        rows = torch.zeros(int(n), dtype=torch.int64, device=logits.device)
        return Begun(rows.new_empty(int(n), 0), rows.bool(), cache, rows, self._law(logits[:, -1]))

    def next_logps(self, state: Begun) -> Tensor:
        """Compute the law of the next token of each string. Not differentiable: `logps` is.

        Args:
            state: State of n strings.

        Returns:
            Log-probabilities, float64, shape (n, V); -inf outside the k likeliest, and but for `end` after it.

        Raises:
            ValueError: strings of full length, or a state that was continued already.
        """
        ids, logps = self._next(state)
        rows = torch.full((len(ids), self.vocabulary), -math.inf, dtype=torch.float64, device=ids.device)
        rows = rows.scatter(1, ids, logps)
        if self.end is not None:
            rows[state.ended] = -math.inf
            rows[state.ended, self.end] = 0.0
        return rows

    def _next(self, state: Begun) -> tuple[Tensor, Tensor]:
        """Token numbers and log-probabilities of what comes next, (n, k), for strings that have not ended."""
        if state.tokens.shape[1] >= self.length:
            raise ValueError(f"state must hold strings of fewer than {self.length} tokens, got {state.tokens.shape[1]}")
        if state.cache is None:
            raise ValueError("state was continued already: its keys and values have moved")
        if state.law is None:
            if state.index is not None:
                state.cache.batch_select_indices(state.index)
                state.index = None
            with torch.no_grad():
                logits, state.cache = self._run(state.tokens[:, -1:], state.cache)
            state.law = self._law(logits[:, -1])
        ids, logps = state.law
        return (ids, logps) if state.index is None else (ids[state.index], logps[state.index])

    def _pick(self, state: Begun, numbers: Tensor) -> tuple[Tensor, Tensor]:
        """Invert the CDF of the next token at numbers in [0, 1), (n,); return tokens and their log-probabilities."""
        ids, logps = self._next(state)
        column = torch.searchsorted(_numerics.cdf(logps), numbers[:, None], right=True)
        token, logp = ids.gather(1, column)[:, 0], logps.gather(1, column)[:, 0]
        if self.end is None:
            return token, logp
        return torch.where(state.ended, self.end, token), torch.where(state.ended, 0.0, logp)

    def draw(self, state: Begun, *, generator: torch.Generator) -> Tensor:
        """Draw the next token of each string, by inverting the CDF of the k that may come, in float64.

        Args:
            state: State of n strings, which it leaves as it is.
            generator: Source of randomness, on the device of the model.

        Returns:
            Token numbers, int64, shape (n,).

        Raises:
            TypeError: `generator` is no generator.
            ValueError: as for `next_logps`.
        """
        return self._pick(state, self._uniforms(len(state.ended), 1, generator)[0])[0]

    def append(self, state: Begun, tokens: Tensor) -> Begun:
        """Write one more token to each string; see `AutoregressiveModel.append`.

        Args:
            state: State of n strings, which is refused afterwards.
            tokens: Token numbers in 0..V-1, integer tensor, shape (n,).

        Returns:
            The state of the longer strings.

        Raises:
            TypeError: `tokens` is not an integer tensor.
            ValueError: `tokens` out of range, or not one for each string; strings of full length, or a state that was
                continued already.
        """
        tokens = _checks.indices("tokens", tokens, self.vocabulary)
        if tokens.shape != state.ended.shape:
            raise ValueError(f"tokens must have shape {tuple(state.ended.shape)}, got {tuple(tokens.shape)}")
        self._next(state)
        ended = state.ended if self.end is None else state.ended | (tokens == self.end)
        return self._moved(state, torch.cat([state.tokens, tokens[:, None]], 1), ended, state.index, None)

    def take(self, state: Begun, index: Tensor) -> Begun:
        """Continue some of the strings; see `AutoregressiveModel.take`.

        Args:
            state: State of n strings, which is refused afterwards.
            index: Numbers of strings in 0..n-1, integer tensor, shape (m,).

        Returns:
            The state of these m strings.

        Raises:
            TypeError: `index` is not an integer tensor.
            ValueError: `index` out of range, or not of shape (m,); or a state that was continued already.
        """
        index = _checks.indices("index", index, len(state.ended))
        if index.ndim != 1:
            raise ValueError(f"index must have shape (m,), got {tuple(index.shape)}")
        if state.cache is None:
            raise ValueError("state was continued already: its keys and values have moved")
        rows = index if state.index is None else state.index[index]
        return self._moved(state, state.tokens[index], state.ended[index], rows, state.law)

    @staticmethod
    def _moved(
        state: Begun, tokens: Tensor, ended: Tensor, index: Tensor | None, law: tuple[Tensor, Tensor] | None
    ) -> Begun:
        cache, state.cache, state.law = state.cache, None, None
        return Begun(tokens, ended, cache, index, law)

    def sample(self, n: int, length: int | None = None, *, generator: torch.Generator) -> Tensor:
        """Draw independent strings, token by token, `chunk` of them at a time.

        The uniform numbers are drawn first, so that the size of a chunk changes no draw, but for rounding.

        Args:
            n: Number of strings, >= 1.
            length: Number of tokens, in 1..L. Default: L.
            generator: Source of randomness, on the device of the model.

        Returns:
            Token numbers, int64, shape (n, length).

        Raises:
            TypeError: `n` or `length` is not an int, or `generator` not a generator.
            ValueError: `n` or `length` out of range.
        """
        u = self._uniforms(n, self.length if length is None else length, generator)
        return torch.cat([self._write(part)[0] for part in u.split(self.chunk, 1)])

    def _uniforms(self, n: int, length: int, generator: torch.Generator) -> Tensor:
        """The uniform numbers that `draw` would draw for n strings, token by token: (length, n)."""
        _checks.count("n", n)
        _checks.count("length", length)
        _checks.generator("generator", generator)
        if length > self.length:
            raise ValueError(f"length must be at most {self.length}, that of the model, got {length}")
        shape, device = (int(n), 1), self.prompt.device
        steps = [torch.rand(shape, generator=generator, device=device, dtype=torch.float64) for _ in range(length)]
        return torch.stack(steps)[..., 0]

    def _write(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """Write strings by given uniform numbers, (length, m); return them and their log-probabilities."""
        state = self.begin(u.shape[1])
        total = torch.zeros_like(u[0])
        for t, numbers in enumerate(u):
            token, logp = self._pick(state, numbers)
            total += logp
            if t + 1 < len(u):
                state = self.append(state, token)
        return torch.cat([state.tokens, token[:, None]], 1), total

    def logps(self, tokens: Tensor) -> Tensor:
        """Compute the log-probability of strings, each in one pass. Differentiable in the parameters of the network.

            log p(y) = sum_t log p(y_t | prompt, y_<t)

        Args:
            tokens: Token numbers in 0..V-1, integer tensor, shape (n, t) with t in 1..L.

        Returns:
            Log-probabilities, float64, shape (n,); -inf for a string with a token that could not come.

        Raises:
            TypeError: `tokens` is not an integer tensor.
            ValueError: `tokens` not of this shape, or out of range.
        """
        return self.token_logps(tokens).sum(1)

    def token_logps(self, tokens: Tensor) -> Tensor:
        """Compute log p(y_t | prompt, y_<t) of each token. Differentiable in the parameters of the network.

        Args:
            tokens: As for `logps`.

        Returns:
            Log-probabilities, float64, shape (n, t).

        Raises:
            TypeError: as for `logps`.
            ValueError: as for `logps`.
        """
        tokens = _checks.sequences("tokens", tokens)
        if tokens.ndim != 2 or tokens.shape[1] > self.length:
            raise ValueError(f"tokens must have shape (n, t), t in 1..{self.length}, got {tuple(tokens.shape)}")
        if not len(tokens):
            return torch.zeros(tokens.shape, dtype=torch.float64, device=tokens.device)
        tokens = _checks.indices("tokens", tokens, self.vocabulary)
        return torch.cat([self._read(part) for part in tokens.split(max(1, self.chunk // tokens.shape[1]))])

    def _read(self, tokens: Tensor) -> Tensor:
        first, cache = self._run(self.prompt[None], None)  # here, so that the gradient passes through the prompt too
        logits = first[:, -1:].expand(len(tokens), -1, -1)
        if tokens.shape[1] > 1:
            cache.batch_select_indices(torch.zeros(len(tokens), dtype=torch.int64, device=tokens.device))
            logits = torch.cat([logits, self._run(tokens[:, :-1], cache)[0]], 1)
        ids, logps = self._law(logits)
        hit = ids == tokens[..., None]
        terms = torch.where(hit.any(-1), torch.where(hit, logps, 0.0).sum(-1), -math.inf)
        if self.end is None:
            return terms
        is_end = tokens == self.end
        ended = is_end.cumsum(1) > is_end.long()  # before this token
        return torch.where(ended, torch.where(is_end, 0.0, -math.inf), terms)

    @torch.no_grad()
    def tree(self) -> Tree:
        """Compute the law of every string that can come: the exact law of the model, for short strings and small k.

        Not differentiable. Runs the network on k + k^2 + ... + k^(L-1) beginnings; memory for 8 L (k+1)^L bytes. With k
        = 32 and L = 3 these are 1,056 beginnings and 32,768 strings.

        Returns:
            The tree; see `Tree`.

        Raises:
            ValueError: more than 2^26 strings.
        """
        k = self.vocabulary if self.top_k is None else self.top_k
        if (k + 1) ** self.length > 2**26:
            raise ValueError(
                f"top_k must leave at most 2^26 strings, got (k + 1)^L = {k + 1}^{self.length}: cut to fewer tokens"
            )
        levels: list[list[tuple[Tensor, Tensor]]] = [[] for _ in range(self.length)]
        self._grow(self.begin(1), levels)
        rows = [tuple(torch.cat(parts) for parts in zip(*level, strict=True)) for level in levels]
        device, order = self.prompt.device, max(1, self.length - 1)
        tables = torch.full((self.length, (k + 1) ** order, k + 1), -math.inf, dtype=torch.float64, device=device)
        tables[:, :, 0] = 0.0  # contexts that never come: any law will do
        tokens = torch.empty(1, 0, dtype=torch.int64, device=device)
        total = torch.zeros(1, dtype=torch.float64, device=device)
        for t, (ids, logps) in enumerate(rows):
            tables[t, _contexts(k, t, order, device), :k] = logps
            tokens = torch.cat([tokens.repeat_interleave(k, 0), ids.reshape(-1, 1)], 1)
            total = (total[:, None] + logps).flatten()
        return Tree(MarkovChain(tables, k + 1), tuple(ids for ids, _ in rows), tokens, total)

    def _grow(self, state: Begun, levels: list[list[tuple[Tensor, Tensor]]]) -> None:
        """Look at beginnings and, chunk by chunk, at all that may come of them."""
        n, t = state.tokens.shape
        ids, logps = self._next(state)
        if self.end is not None:  # after the end token only the end token: in every column, certain in the first
            certain = torch.full_like(logps[:1], -math.inf)
            certain[:, 0] = 0.0
            ids = torch.where(state.ended[:, None], self.end, ids)
            logps = torch.where(state.ended[:, None], certain, logps)
        levels[t].append((ids, logps))
        if t + 1 == self.length:
            return
        k = ids.shape[1]
        parts = torch.arange(n, device=ids.device).split(max(1, self.chunk // k))
        for parents in parts:
            here = copy.deepcopy(state) if len(parts) > 1 else state
            children = self.take(here, parents.repeat_interleave(k))
            self._grow(self.append(children, ids[parents].flatten()), levels)


class Pool(NamedTuple):
    """Strings drawn from several models.

    Attributes:
        tokens: Token numbers, int64, shape (P, n, L).
        logps: Their log-probabilities, float64, shape (P, n).
    """

    tokens: Tensor
    logps: Tensor


def generate(
    models: Sequence[LanguageModel],
    n: int,
    path: str | Path,
    *,
    generator: torch.Generator,
    decode: Callable[[list[int]], str] | None = None,
) -> Pool:
    """Draw n strings after each of several prompts, and keep on disk what is drawn: a call that broke off goes on.

    Each string is a line of JSON, with `prompt` (the number of the model), `tokens`, `logp` and, if there is `decode`,
    `text`. Lines are written as soon as `chunk` strings are drawn. A later call with the same arguments takes the lines
    that are there and draws the others; the result is that of a call that went through. It draws the first lines again,
    looks at the log-probability of one string for each other prompt, and refuses a file that holds others. Not
    differentiable. A last line that was cut off is drawn again. A file keeps its n: for more strings later draw another
    file, from another seed. Add a `reward` to each line, and `python -m tiltlib.pool` reads the file.

    Args:
        models: P >= 1 models of one length L, one for each prompt.
        n: Number of strings for each prompt, >= 1.
        path: The file; it need not be there yet.
        generator: Source of randomness, on the device of the models, in the same state at each call.
        decode: Function that makes a text of token numbers, such as the `decode` of a tokenizer.

    Returns:
        The strings and their log-probabilities.

    Raises:
        TypeError: `models` holds something else, `n` is not an int, or `generator` not a generator.
        ValueError: `models` empty or of different lengths, `n` < 1, or a file that holds other lines than these.
    """
    for i, model in enumerate(models):
        _checks.instance(f"models[{i}]", model, LanguageModel)
    lengths = {model.length for model in models}
    if len(lengths) != 1:
        raise ValueError(f"models must be one or more of one length, got lengths {sorted(lengths)}")
    _checks.count("n", n)
    path, n, length = Path(path), int(n), lengths.pop()
    stored = _stored(path, len(models), n, length)
    with path.open("ab") as file:
        for i, model in enumerate(models):
            parts = model._uniforms(n, length, generator).split(model.chunk, 1)
            for start, u in zip(range(0, n, model.chunk), parts, strict=True):
                first = i * n + start
                have = stored[first : first + u.shape[1]]
                if len(have) == u.shape[1] and first:
                    if not start:
                        _same_law(model, *have[0], f"line {first + 1} of {path}")
                    continue
                tokens, logps = (x.tolist() for x in model._write(u))
                for j, (old, new) in enumerate(zip(have, tokens, strict=False)):
                    if old[0] != new:
                        raise ValueError(
                            f"path must hold what this call draws, got other tokens in line {first + j + 1} of {path}: "
                            "another model, prompt, option or n, a generator in another state (make it anew for each "
                            "call), or a machine that rounds differently"
                        )
                for string, logp in zip(tokens[len(have) :], logps[len(have) :], strict=True):
                    line: dict[str, object] = {"prompt": i, "tokens": string, "logp": logp}
                    if decode is not None:
                        line["text"] = decode(string)
                    file.write(json.dumps(line, ensure_ascii=False).encode() + b"\n")
                    stored.append((string, logp))
                file.flush()
    device = models[0].prompt.device
    drawn = torch.tensor([string for string, _ in stored], device=device)
    totals = torch.tensor([logp for _, logp in stored], dtype=torch.float64, device=device)
    return Pool(drawn.view(len(models), n, length), totals.view(len(models), n))


def _same_law(model: LanguageModel, tokens: list[int], logp: float, where: str) -> None:
    """Require that a string on disk came from a model, as far as its log-probability tells."""
    found = model.logps(torch.tensor([tokens], device=model.prompt.device)).item()
    if not abs(found - logp) <= 1e-3 * len(tokens):  # float32 moves the log-probability of a token by 1e-4
        raise ValueError(f"path must hold what this call draws, got log-probability {logp:g} for {found:g} in {where}")


_KEEPS_N = "the file was begun with another n; for more strings draw another file, from another seed"


def _stored(path: Path, prompts: int, n: int, length: int) -> list[tuple[list[int], float]]:
    """Read the strings that a file holds, and cut off a last line that is not whole."""
    if not path.exists():
        return []
    whole = path.read_bytes()
    kept = whole[: whole.rfind(b"\n") + 1]
    lines = kept.decode().split("\n")[:-1]
    if len(lines) > prompts * n:
        raise ValueError(f"path must hold at most {prompts * n} lines, got {len(lines)} in {path}: {_KEEPS_N}")
    found = []
    for number, line in enumerate(lines):
        try:
            record = json.loads(line)
            prompt, tokens, logp = record["prompt"], [int(token) for token in record["tokens"]], float(record["logp"])
        except (ValueError, TypeError, KeyError):
            prompt, tokens, logp = None, [], math.nan
        if prompt != number // n or len(tokens) != length or not math.isfinite(logp):
            raise ValueError(
                f"path must hold {length} tokens and logp of prompt {number // n} in line {number + 1}, "
                f"got {line[:60]!r} in {path}: a line was changed, or {_KEEPS_N}"
            )
        found.append((tokens, logp))
    if len(kept) < len(whole):
        with path.open("rb+") as file:
            file.truncate(len(kept))
    return found
