"""Metropolis-Hastings on strings: sharpen a chain to a power of itself by rewriting the ends of its strings.

The target is p^a, normalised over strings. Each move cuts a string x at a uniform place, draws a new end from p, and
keeps the new string x' with a probability that leaves p^a invariant:

    accept with probability min(1, (p(x') / p(x))^(a-1) |x| / |x'|)

|x| counts the places where x can be cut: its symbols, the end symbol included. Strings of one length cancel it. With
different lengths it must stay: without it the chain of strings targets |x| p(x)^a.
"""

import math
from numbers import Integral
from typing import NamedTuple

import torch
from torch import Tensor

from tiltlib import _checks
from tiltlib.markov import MarkovChain

__all__ = ["Rewritten", "lengths", "log_accept", "power_mh"]


class Rewritten(NamedTuple):
    """What `power_mh` returns.

    Attributes:
        tokens: Strings after the last move, int64, shape (n, L).
        acceptance: Fraction of the moves of each string that were accepted, float64, shape (n,).
    """

    tokens: Tensor
    acceptance: Tensor


def lengths(tokens: Tensor, end: int) -> Tensor:
    """Count the symbols of strings that are padded with an end symbol: up to the first one, which counts.

    Args:
        tokens: Symbol numbers, integer tensor, shape (..., L) with L >= 1.
        end: Number of the end symbol. A string without it has length L.

    Returns:
        Lengths in 1..L, int64, shape (...).

    Raises:
        TypeError: `tokens` is not an integer tensor, or `end` not an int.
        ValueError: strings of length 0, or with symbols other than `end` after the first `end`.
    """
    tokens = _checks.sequences("tokens", tokens)
    symbol: object = end
    if isinstance(symbol, bool) or not isinstance(symbol, Integral):
        raise TypeError(f"end must be an int, got {_checks.described(end)}")
    ended = (tokens == end).cummax(-1).values
    broken = int((ended & (tokens != end)).any(-1).sum())
    if broken:
        raise ValueError(f"tokens must hold only {end} after the first {end}, got {broken} strings with other symbols")
    return (~ended).sum(-1).add(1).clamp(max=tokens.shape[-1])


def log_accept(logps: Tensor, new_logps: Tensor, power: float, sizes: Tensor, new_sizes: Tensor) -> Tensor:
    """Compute the log-probability of accepting a string whose end was drawn anew after a uniform cut.

        log min(1, (p(x') / p(x))^(a-1) |x| / |x'|)

    Differentiable in both log-probabilities.

    Args:
        logps: Log-probability of the current strings under the law that proposes, floating, any shape, finite.
        new_logps: Of the proposed strings, floating, same shape, finite or -inf, which is never accepted.
        power: Exponent a of the target p^a, finite and > 0.
        sizes: Number of places where each current string can be cut, its length with the end symbol, integers, same
            shape.
        new_sizes: The same of the proposed strings.

    Returns:
        Log acceptance probabilities, <= 0, same shape, in the wider dtype of the two log-probabilities, computed in
        float64.

    Raises:
        TypeError: `logps` or `new_logps` is not a floating tensor, or sizes are not integer tensors.
        ValueError: `power` not finite and > 0, `logps` not finite, `new_logps` with NaN or +inf, sizes below 1, or
            shapes that differ.

    Source: [hastings1970]; book chapter 7, `power-mh`.
    """
    _checks.positive("power", power)
    _checks.finite("logps", logps)
    if not isinstance(new_logps, Tensor) or not new_logps.is_floating_point():
        raise TypeError(f"new_logps must be a floating-point torch.Tensor, got {_checks.described(new_logps)}")
    bad = int((~(new_logps < math.inf)).sum())
    if bad:
        raise ValueError(f"new_logps must be finite or -inf, got {bad} of {new_logps.numel()} entries NaN or +inf")
    for name, value in (("sizes", sizes), ("new_sizes", new_sizes)):
        if not isinstance(value, Tensor) or value.dtype not in _checks._INTEGERS:
            raise TypeError(f"{name} must be an integer torch.Tensor, got {_checks.described(value)}")
    _checks.same_shape(logps=logps, new_logps=new_logps, sizes=sizes, new_sizes=new_sizes)
    smaller = torch.minimum(sizes.long(), new_sizes.long())
    if bool((smaller < 1).any()):
        raise ValueError(f"sizes and new_sizes must be >= 1, got {int(smaller.min())}")
    possible = new_logps > -math.inf
    # Mask before the product: a power of 1 times -inf would be NaN, in the gradient too.
    difference = torch.where(possible, new_logps, logps).double() - logps.double()
    ratio = (float(power) - 1) * difference + sizes.double().log() - new_sizes.double().log()
    accept = torch.where(possible, ratio.clamp(max=0.0), -math.inf)
    return accept.to(torch.promote_types(logps.dtype, new_logps.dtype))


@torch.no_grad()
def power_mh(
    ref: MarkovChain,
    tokens: Tensor,
    power: float,
    steps: int,
    *,
    generator: torch.Generator,
    end: str | None = None,
) -> Rewritten:
    """Move strings toward p^a, each on its own, by drawing their ends anew.

        cut k uniform on 0..|x|-1;    x' = x_<k, then drawn from p;    accept by `log_accept`

    Strings of one length target p^a over strings of that length. With `end`, strings end at their first end symbol and
    are padded with it; the chain has to be one that stops there, such as `MarkovChain.stopped`. Not differentiable.
    Cost O(n L) draws per move.

    Args:
        ref: Chain p that proposes.
        tokens: Strings to start from, of positive probability, integer tensor, shape (n, L); n may be 0. They are
            independent chains: started at draws of p^a, they stay draws of p^a.
        power: Exponent a, finite and > 0; 1 is the reference.
        steps: Number of moves per string, >= 1.
        generator: Source of randomness, on the device of the chain.
        end: Symbol of the alphabet that ends a string. Default: none, all strings have length L.

    Returns:
        `Rewritten(tokens, acceptance)`.

    Raises:
        TypeError: `tokens` is not an integer tensor, `steps` not an int, or `generator` no generator.
        ValueError: `tokens` out of range, not of shape (n, L), or of probability 0; `power` not finite and > 0; `steps`
            < 1; `end` not one symbol of the alphabet; or a chain that goes on after `end`.

    Source: [karan2025] for strings of one length; book chapter 7, `power-mh`.
    """
    _checks.generator("generator", generator)
    _checks.positive("power", power)
    _checks.count("steps", steps)
    logps = ref._exact_logps(tokens)
    if tokens.ndim != 2:
        raise ValueError(f"tokens must have shape (n, L), got {tuple(tokens.shape)}")
    impossible = int((logps == -math.inf).sum())
    if impossible:
        raise ValueError(f"tokens must have positive probability, got {impossible} strings of probability 0")
    tokens, (n, length) = tokens.long(), tokens.shape
    if end is not None and end not in tuple(ref.alphabet):
        raise ValueError(f"end must be one symbol of {ref.alphabet!r}, got {end!r}")

    def sizes_of(strings: Tensor) -> Tensor:
        if end is None:
            return torch.full((n,), length, device=strings.device)
        return lengths(strings, ref.alphabet.index(end))

    sizes, accepted = sizes_of(tokens), torch.zeros(n, dtype=torch.float64, device=tokens.device)
    for _ in range(steps):
        u = torch.rand(2, n, generator=generator, device=tokens.device, dtype=torch.float64)
        cut = (u[0] * sizes).long()  # u < 1, so cut < sizes
        context, drawn = torch.full((n,), ref.start, device=tokens.device), []
        for t, old in enumerate(tokens.unbind(-1)):
            symbol = torch.where(t < cut, old, ref._draw(t, context, generator))
            drawn.append(symbol)
            context = ref._next(context, symbol)
        proposed = torch.stack(drawn, -1)
        new_logps, new_sizes = ref._exact_logps(proposed), sizes_of(proposed)
        accept = u[1].log() < log_accept(logps, new_logps, power, sizes, new_sizes)
        tokens = torch.where(accept[:, None], proposed, tokens)
        logps, sizes = torch.where(accept, new_logps, logps), torch.where(accept, new_sizes, sizes)
        accepted += accept
    return Rewritten(tokens, accepted / steps)
