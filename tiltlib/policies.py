"""Policies: laws with parameters, which training moves and which can say the probability of what they drew.

`TabularPolicy` has one free logit per outcome: every law on K outcomes is in its class, and every divergence is a sum.
`TransformerPolicy` writes strings symbol by symbol. Its logits are those of a reference Markov chain plus a network
whose last layer starts at zero: training starts exactly at the reference, and what the network learns is the tilt. For
an additive reward the target is `MarkovChain.tilt`, whose log-probabilities are exact. So the divergence of the policy
from it is `losses.kl_estimators(policy.logps(y), tilted.logps(y)).k3.mean()` over draws y of the policy, unbiased and
with a variance that vanishes at the target.
"""

import dataclasses
import math

import torch
from torch import Tensor, nn

from tiltlib import _checks, categorical
from tiltlib.autoregressive import AutoregressiveModel
from tiltlib.markov import MarkovChain, State

__all__ = ["TabularPolicy", "TransformerPolicy", "natural_step"]


def _not_diverged(broken: Tensor) -> None:
    rule = "logits must be finite, got NaN or inf: training has diverged, lower the learning rate"
    _checks.holds(~broken, lambda: ValueError(rule))


class TabularPolicy(nn.Module):
    """A law on K outcomes with one free logit each, pi(y) proportional to exp(logits(y)).

    Args:
        logits: Where to start, shape (K,), floating; copied. Log-probabilities of the reference will do. -inf excludes
            an outcome for good.

    Raises:
        TypeError: `logits` is not a floating tensor.
        ValueError: `logits` with NaN or +inf, all -inf, or not of shape (K,).
    """

    def __init__(self, logits: Tensor) -> None:
        with _checks.together():
            _checks.rewards("logits", logits)
            if logits.ndim != 1:
                raise ValueError(f"logits must have shape (K,), got {tuple(logits.shape)}")
            _checks.some_left("logits", logits.amax(-1))
        super().__init__()
        self.logits = nn.Parameter(logits.detach().clone())

    def _law(self) -> Tensor:
        """Compute the law in float64, normalised as no narrower dtype could hold it."""
        logps = torch.log_softmax(self.logits.double(), -1)
        _not_diverged(logps.isnan())
        return logps

    def law(self) -> Tensor:
        """Compute the whole law, differentiable in the logits: log-probabilities, shape (K,), dtype of the logits."""
        return self._law().to(self.logits.dtype)

    def logps(self, outcomes: Tensor) -> Tensor:
        """Compute the log-probability of outcomes, differentiable in the logits.

        Args:
            outcomes: Outcome indices in 0..K-1, integer tensor of any shape.

        Returns:
            Log-probabilities, shape of `outcomes`, dtype of the logits.

        Raises:
            TypeError: `outcomes` is not an integer tensor.
            ValueError: `outcomes` outside 0..K-1 or empty.
        """
        with _checks.together():
            law, outcomes = self.law(), _checks.indices("outcomes", outcomes, len(self.logits))
        return law[outcomes]

    def sample(self, n: int, *, generator: torch.Generator) -> Tensor:
        """Draw independent outcomes; see `categorical.sample`.

        Args:
            n: Number of draws, >= 1.
            generator: Source of randomness, on the device of the logits.

        Returns:
            Outcome indices, int64, shape (n,).

        Raises:
            TypeError: `n` is not an int, or `generator` not a generator.
            ValueError: `n` < 1.
        """
        with _checks.together():
            return categorical.sample(self._law().detach(), n, generator=generator)


def natural_step(
    logits: Tensor, outcomes: Tensor, ref_logps: Tensor, rewards: Tensor, beta: float, step: float
) -> Tensor:
    """Take one natural gradient step on E r - beta KL(pi || p) at the outcomes that were drawn.

        theta(y) <- theta(y) + step (r(y) - beta (theta(y) - log p(y)))    for each distinct drawn y

    With every outcome drawn this is the exact natural gradient step, up to a constant that the softmax ignores. A drawn
    entry moves toward log p + r / beta by the factor 1 - step beta, free of noise, so a constant step converges.
    Differentiable.

    Args:
        logits: Logits theta of the policy, shape (K,).
        outcomes: Outcomes drawn from it, integer tensor of any shape; a repeated one counts once.
        ref_logps: Reference log-probabilities, shape (K,), normalised.
        rewards: Finite reward of each outcome, shape (K,). Only those of drawn outcomes are used.
        beta: KL coefficient in reward units, > 0.
        step: Step size h with 0 < h < 2 / beta; h = 1 / beta moves a drawn entry all the way.

    Returns:
        New logits, shape (K,), dtype of `logits`; computed in float64.

    Raises:
        TypeError: a tensor of the wrong dtype, or `beta` or `step` not a number.
        ValueError: tensors not finite, not of one shape or indices outside 0..K-1; `beta` not finite and > 0; `step`
            outside (0, 2 / beta); or new logits that the dtype cannot hold.

    Source: book, `natural-gradient-path`; book, `policy-gradient-tilt`.
    """
    with _checks.together():
        _checks.finite("logits", logits)
        _checks.finite("rewards", rewards)
        _checks.logps("ref_logps", ref_logps)
        _checks.finite("ref_logps", ref_logps)
        _checks.same_shape(logits=logits, ref_logps=ref_logps, rewards=rewards)
        if logits.ndim != 1 or not logits.dtype == ref_logps.dtype == rewards.dtype:
            raise ValueError(
                f"logits, ref_logps and rewards must have shape (K,) and one dtype, got shape {tuple(logits.shape)} "
                f"and {logits.dtype}, {ref_logps.dtype}, {rewards.dtype}"
            )
        outcomes = _checks.indices("outcomes", outcomes, logits.shape[-1])
        _checks.positive("beta", beta)
        _checks.number("step", step)
        beta, step = float(beta), float(step)
        if not 0 < step < 2 / beta:
            raise ValueError(f"step must lie in (0, 2 / beta) = (0, {2 / beta:g}), got {step!r}")
        y = outcomes.flatten().clamp(0, len(logits) - 1)  # others are refused at the end of the block
        theta, log_p, r = (x[y].double() for x in (logits, ref_logps, rewards))
        moved = (theta + step * (r - beta * (theta - log_p))).to(logits.dtype)
        _checks.finite("the new logits", moved)
        return logits.index_copy(0, y, moved)  # a repeated outcome is written twice with one value


class _Block(nn.Module):
    """Causal self-attention and a feed-forward layer, each on normalised input and added to it."""

    def __init__(self, width: int, heads: int, device: torch.device, generator: torch.Generator) -> None:
        super().__init__()
        self.heads = heads
        self.before_attention = nn.LayerNorm(width, device=device, dtype=torch.float32)
        self.qkv = _linear(width, 3 * width, device, generator)
        self.out = _linear(width, width, device, generator)
        self.before_mlp = nn.LayerNorm(width, device=device, dtype=torch.float32)
        self.up = _linear(width, 4 * width, device, generator)
        self.down = _linear(4 * width, width, device, generator)

    def forward(self, x: Tensor, past: tuple[Tensor, Tensor] | None) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        q, k, v = self.qkv(self.before_attention(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        if past is not None:  # one new position, which may look at everything before it
            k, v = torch.cat([past[0], k], 2), torch.cat([past[1], v], 2)
        seen = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=past is None)
        x = x + self.out(seen.transpose(1, 2).flatten(2))
        return x + self.down(nn.functional.gelu(self.up(self.before_mlp(x)))), (k, v)


def _linear(inputs: int, outputs: int, device: torch.device, generator: torch.Generator) -> nn.Linear:
    """Make a linear layer from the given generator; the constructor itself would use the global one."""
    layer = nn.utils.skip_init(nn.Linear, inputs, outputs, device=device, dtype=torch.float32)
    nn.init.xavier_uniform_(layer.weight, generator=generator)
    nn.init.zeros_(layer.bias)
    return layer


def _embedding(entries: int, width: int, device: torch.device, generator: torch.Generator) -> nn.Parameter:
    drawn = torch.randn(entries, width, generator=generator, device=device, dtype=torch.float32)
    return nn.Parameter(drawn / math.sqrt(width))


_Past = list[tuple[Tensor, Tensor] | None]


@dataclasses.dataclass
class _Begun:
    """Begun strings: last symbol of each, their contexts under the reference, keys and values of the earlier symbols.

    `seen` is what the network makes of the last symbol: the law of the next one, and keys and values that include it.
    It is computed when it is first asked for.
    """

    symbols: Tensor
    at: State
    past: _Past
    seen: tuple[Tensor, _Past] | None = None


class TransformerPolicy(nn.Module, AutoregressiveModel[_Begun]):
    """A small autoregressive transformer that starts at a reference chain.

        pi(y_t | y_<t) = softmax(log p(y_t | context) + f(y_<t))(y_t),    f = 0 before training

    The network is float32, whatever the default dtype; sums and normalisations are float64; log-probabilities have the
    dtype of the reference. Symbols that the reference excludes stay excluded.

    Args:
        ref: Reference chain, with V symbols. Its rows are fixed; only the network has parameters.
        length: Longest string, >= 1: the context of the network.
        generator: Source of the first weights, on the device of the chain.
        layers: Number of transformer blocks, >= 1.
        width: Size of the hidden state, >= 1, a multiple of `heads`.
        heads: Number of attention heads, >= 1.

    Raises:
        TypeError: a size that is not an int, or `generator` not a generator.
        ValueError: a size below 1, `width` no multiple of `heads`, or a reference shorter than `length`.

    Source: [vaswani2017]; book, `policy-gradient-tilt`.
    """

    def __init__(
        self,
        ref: MarkovChain,
        length: int,
        *,
        generator: torch.Generator,
        layers: int = 2,
        width: int = 64,
        heads: int = 4,
    ) -> None:
        for name, value in (("length", length), ("layers", layers), ("width", width), ("heads", heads)):
            _checks.count(name, value)
        _checks.generator("generator", generator)
        length, layers, width, heads = int(length), int(layers), int(width), int(heads)
        if ref.length is not None and ref.length < length:
            raise ValueError(f"length must be at most {ref.length}, the length of the reference, got {length}")
        if width % heads:
            raise ValueError(f"width must be a multiple of heads = {heads}, got {width}")
        super().__init__()
        self.ref, self.length = ref, length
        device, v = ref.device, len(ref.alphabet)
        # Entry V stands for "no symbol yet".
        self.symbols = _embedding(v + 1, width, device, generator)
        self.places = _embedding(length, width, device, generator)
        self.blocks = nn.ModuleList(_Block(width, heads, device, generator) for _ in range(layers))
        self.last = nn.LayerNorm(width, device=device, dtype=torch.float32)
        self.head = nn.utils.skip_init(nn.Linear, width, v, device=device, dtype=torch.float32)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def _network(self, previous: Tensor, start: int, past: _Past) -> tuple[Tensor, _Past]:
        """Compute what the network adds to the reference, for the symbols before positions start, start + 1, ..."""
        x = self.symbols[previous] + self.places[start : start + previous.shape[-1]]
        now: _Past = []
        for block, before in zip(self.blocks, past, strict=True):
            x, keys_values = block(x, before)
            now.append(keys_values)
        added = self.head(self.last(x))
        _not_diverged(~added.isfinite())
        return added, now

    def conditionals(self, tokens: Tensor) -> Tensor:
        """Compute the law of every symbol given those before it, in one pass. Differentiable.

        Args:
            tokens: Symbol numbers in 0..V-1, integer tensor, shape (..., L) with L at most `length`.

        Returns:
            Log-probabilities, shape (..., L, V); entry (t, a) is log pi(a | y_<t).

        Raises:
            TypeError: `tokens` is not an integer tensor.
            ValueError: `tokens` outside 0..V-1, of length 0, or longer than the context of the policy; or parameters
                that are no longer finite.
        """
        contexts = self.ref.contexts_before(tokens)  # each in range, as the tokens are
        if tokens.shape[-1] > self.length:
            raise ValueError(f"tokens must have at most {self.length} positions, got shape {tuple(tokens.shape)}")
        flat = tokens.reshape(-1, tokens.shape[-1]).long()
        none_yet = torch.full_like(flat[:, :1], len(self.ref.alphabet))
        added, _ = self._network(torch.cat([none_yet, flat[:, :-1]], -1), 0, [None] * len(self.blocks))
        with _checks.trusted():
            rows = [self.ref.rows(t, context) for t, context in enumerate(contexts.unbind(-1))]
        return torch.log_softmax(torch.stack(rows, -2) + added.view(*tokens.shape, len(self.ref.alphabet)), -1)

    def token_logps(self, tokens: Tensor) -> Tensor:
        """Compute log pi(y_t | y_<t) of each symbol. Differentiable.

        Args:
            tokens: As for `conditionals`.

        Returns:
            Log-probabilities, shape (..., L).

        Raises:
            TypeError: as for `conditionals`.
            ValueError: as for `conditionals`.
        """
        return self.conditionals(tokens).gather(-1, tokens.long().unsqueeze(-1)).squeeze(-1)

    def logps(self, tokens: Tensor) -> Tensor:
        """Compute log pi(y), the sum of `token_logps`. Differentiable.

        Args:
            tokens: As for `conditionals`.

        Returns:
            Log-probabilities, shape (...).

        Raises:
            TypeError: as for `conditionals`.
            ValueError: as for `conditionals`.
        """
        return self.token_logps(tokens).sum(-1)

    def begin(self, n: int) -> _Begun:
        """Begin n strings; see `AutoregressiveModel.begin`.

        Args:
            n: Number of strings, >= 1.

        Returns:
            The state of n empty strings.

        Raises:
            TypeError: `n` is not an int.
            ValueError: `n` < 1.
        """
        at = self.ref.begin(n)
        return _Begun(torch.full_like(at.contexts, len(self.ref.alphabet)), at, [None] * len(self.blocks))

    @torch.no_grad()
    def _look(self, state: _Begun) -> tuple[Tensor, _Past]:
        if state.seen is None:
            if state.at.step >= self.length:
                raise ValueError(f"state must hold strings of fewer than {self.length} symbols, got {state.at.step}")
            added, now = self._network(state.symbols[:, None], state.at.step, state.past)
            state.seen = torch.log_softmax(self.ref.next_logps(state.at) + added[:, 0], -1), list(now)
        return state.seen

    def next_logps(self, state: _Begun) -> Tensor:
        """Compute the law of the next symbol of each string.

        Keys and values of earlier symbols are kept, so a string costs one pass of the network, not one per symbol. Not
        differentiable: `conditionals` is.

        Args:
            state: State of n strings.

        Returns:
            Log-probabilities, dtype of the reference, shape (n, V).

        Raises:
            ValueError: strings of full length, or parameters that are no longer finite.
        """
        return self._look(state)[0]

    def append(self, state: _Begun, tokens: Tensor) -> _Begun:
        """Write one more symbol to each string; see `AutoregressiveModel.append`.

        Args:
            state: State of n strings.
            tokens: Symbol numbers in 0..V-1, integer tensor, shape (n,).

        Returns:
            The state of the longer strings.

        Raises:
            TypeError: `tokens` is not an integer tensor.
            ValueError: `tokens` out of range, or not one for each string; or strings of full length.
        """
        at = self.ref.append(state.at, tokens)
        return _Begun(tokens.long(), at, self._look(state)[1])

    def take(self, state: _Begun, index: Tensor) -> _Begun:
        """Continue some of the strings; see `AutoregressiveModel.take`.

        Args:
            state: State of n strings.
            index: Numbers of strings in 0..n-1, integer tensor, shape (m,).

        Returns:
            The state of these m strings.

        Raises:
            TypeError: `index` is not an integer tensor.
            ValueError: `index` out of range.
        """
        at = self.ref.take(state.at, index)

        def taken(past: _Past) -> _Past:
            return [None if kv is None else (kv[0][index], kv[1][index]) for kv in past]

        seen = None if state.seen is None else (state.seen[0][index], taken(state.seen[1]))
        return _Begun(state.symbols[index], at, taken(state.past), seen)

    def sample(self, n: int, length: int | None = None, *, generator: torch.Generator) -> Tensor:
        """Draw independent strings by inverting each conditional CDF in float64.

        Args:
            n: Number of strings, >= 1.
            length: Number of symbols, in 1..`length` of the policy. Default: all of them.
            generator: Source of randomness, on the device of the policy.

        Returns:
            Symbol numbers, int64, shape (n, length).

        Raises:
            TypeError: `n` or `length` is not an int, or `generator` not a generator.
            ValueError: `n` or `length` out of range, or parameters that are no longer finite.
        """
        return super().sample(n, self.length if length is None else length, generator=generator)
