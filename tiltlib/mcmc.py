"""Metropolis-Hastings on strings: sharpen a model to a power of itself by rewriting the ends of its strings.

The target is p^a, normalised over strings. Each move cuts a string x at a uniform place, draws a new end from p, and
keeps the new string x' with a probability that leaves p^a invariant:

    accept with probability min(1, (p(x') / p(x))^(a-1) |x| / |x'|)

|x| counts the places where x can be cut: its symbols, the end symbol included. Strings of one length cancel it. With
different lengths it must stay: without it the moves target |x| p(x)^a. The end may come from another law q
that is positive wherever p is: then p(x')^a / q(x') over p(x)^a / q(x) stands in place of the power a - 1.
"""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tiltlib import _checks
from tiltlib.autoregressive import AutoregressiveModel
from tiltlib.markov import MarkovChain

__all__ = ["Rewritten", "lengths", "log_accept", "power_mh", "power_mh_law"]


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
    _checks.symbol("end", end)
    ended = (tokens == end).cummax(-1).values
    broken = int((ended & (tokens != end)).any(-1).sum())
    if broken:
        raise ValueError(f"tokens must hold only {end} after the first {end}, got {broken} strings with other symbols")
    return (~ended).sum(-1).add(1).clamp(max=tokens.shape[-1])


def log_accept(
    logps: Tensor,
    new_logps: Tensor,
    power: float,
    sizes: Tensor,
    new_sizes: Tensor,
    *,
    proposal_logps: Tensor | None = None,
    new_proposal_logps: Tensor | None = None,
) -> Tensor:
    """Compute the log-probability of accepting a string whose end was drawn anew after a uniform cut.

        log min(1, (p(x') / p(x))^a (q(x) / q(x')) |x| / |x'|),    q = p unless given

    x and x' agree up to the cut, so q of the whole strings and q of their ends given what they share have one ratio.

    Differentiable in both log-probabilities.

    Args:
        logps: Log-probability of the current strings under p, floating, any shape, finite.
        new_logps: Of the proposed strings, floating, same shape, finite or -inf, which is never accepted.
        power: Exponent a of the target p^a, finite and > 0.
        sizes: Number of places where each current string can be cut, its length with the end symbol, integers, same
            shape.
        new_sizes: The same of the proposed strings.
        proposal_logps: Log-probability of the current strings, or of their ends given the rest, under the law q that
            proposes, floating, same shape, finite or -inf: what q could not have drawn is never left. Default: q is p.
        new_proposal_logps: Of the proposed strings, floating, same shape, finite; given with `proposal_logps` alone.

    Returns:
        Log acceptance probabilities, <= 0, same shape, in the widest dtype of the log-probabilities, computed in
        float64.

    Raises:
        TypeError: log-probabilities that are not floating tensors, sizes that are not integer tensors, or one of
            `proposal_logps` and `new_proposal_logps` without the other.
        ValueError: `power` not finite and > 0, `logps` or `new_proposal_logps` not finite, `new_logps` or
            `proposal_logps` with NaN or +inf, sizes below 1, or shapes that differ.

    Source: [hastings1970]; book, `power-mh`.
    """
    with _checks.together():
        _checks.positive("power", power)
        _checks.finite("logps", logps)
        _finite_or_excluded("new_logps", new_logps)
        for name, value in (("sizes", sizes), ("new_sizes", new_sizes)):
            if not isinstance(value, Tensor) or value.dtype not in _checks.INTEGERS:
                raise TypeError(f"{name} must be an integer torch.Tensor, got {_checks.described(value)}")
        _checks.same_shape(logps=logps, new_logps=new_logps, sizes=sizes, new_sizes=new_sizes)
        smaller = torch.minimum(sizes.long(), new_sizes.long())
        _checks.require(
            smaller, 1, math.inf, lambda low, high: ValueError(f"sizes and new_sizes must be >= 1, got {int(low)}")
        )
        possible, dtype = new_logps > -math.inf, torch.promote_types(logps.dtype, new_logps.dtype)
        # Mask before the product: a power of 1 times -inf would be NaN, in the gradient too.
        difference = torch.where(possible, new_logps, logps).double() - logps.double()
        ratio = (float(power) - 1) * difference + sizes.double().log() - new_sizes.double().log()
        if proposal_logps is not None or new_proposal_logps is not None:
            _finite_or_excluded("proposal_logps", proposal_logps)
            _checks.finite("new_proposal_logps", new_proposal_logps)
            assert proposal_logps is not None and new_proposal_logps is not None
            _checks.same_shape(logps=logps, proposal_logps=proposal_logps, new_proposal_logps=new_proposal_logps)
            for value in (proposal_logps, new_proposal_logps):
                dtype = torch.promote_types(dtype, value.dtype)
            ratio = ratio + (difference - (new_proposal_logps.double() - proposal_logps.double()))
        return torch.where(possible, ratio.clamp(max=0.0), -math.inf).to(dtype)


def _finite_or_excluded(name: str, value: object) -> None:
    number = _checks.floating(name, value)

    def error(low: float, high: float) -> ValueError:
        bad = int((~(number < math.inf)).sum())
        return ValueError(f"{name} must be finite or -inf, got {bad} of {number.numel()} entries NaN or +inf")

    _checks.require(number, -math.inf, _checks.LARGEST, error)


@torch.no_grad()
def power_mh(
    model: AutoregressiveModel[Any],
    tokens: Tensor,
    power: float,
    steps: int,
    *,
    generator: torch.Generator,
    end: int | None = None,
    proposal: AutoregressiveModel[Any] | None = None,
) -> Rewritten:
    """Move strings toward p^a, each on its own, by drawing their ends anew.

        cut k uniform on 0..|x|-1;    x' = x_<k, then drawn from q;    accept by `log_accept`

    Strings of one length target p^a over strings of that length. With `end`, strings end at their first end token and
    are padded with it; the model has to be one that stops there, such as `MarkovChain.stopped` or
    `autoregressive.Stopped`. Not differentiable. Cost O(n L) draws per move.

    A proposal q other than p has to be positive wherever p is. A token that q never writes is in no string that a move
    leads to, and a string that holds it is never left: p^a would be invariant, but not where the strings go. Of two
    Markov chains this is proved from their tables; of other models it is taken on trust.

    Args:
        model: Model p.
        tokens: Strings to start from, of positive probability, integer tensor, shape (n, L); n may be 0. Each moves on
            its own: started at draws of p^a, they stay draws of p^a.
        power: Exponent a, finite and > 0; 1 is the model itself.
        steps: Number of moves per string, >= 1.
        generator: Source of randomness, on the device of the model.
        end: Number of the token that ends a string, such as `MarkovChain.end`. Default: none, all have length L.
        proposal: Model q that draws the ends, over the same tokens; with `end` it has to stop there too. Default: p.

    Returns:
        `Rewritten(tokens, acceptance)`.

    Raises:
        TypeError: `model` or `proposal` is no `AutoregressiveModel`, `tokens` no integer tensor, `steps` not an int, or
            `generator` no generator.
        ValueError: `tokens` out of range, not of shape (n, L), or of probability 0; `power` not finite and > 0; `steps`
            < 1; `end` not the number of a token; a model that goes on after `end`; a proposal over another number of
            tokens; or of two chains a proposal of another order or alphabet, too short, or 0 where p is not.

    Source: [karan2025] for strings of one length; book, `power-mh`.
    """
    _checks.instance("model", model, AutoregressiveModel)
    _checks.generator("generator", generator)
    _checks.positive("power", power)
    _checks.count("steps", steps)
    logps = model.logps(tokens).double()
    if tokens.ndim != 2:
        raise ValueError(f"tokens must have shape (n, L), got {tuple(tokens.shape)}")
    impossible = int((logps == -math.inf).sum())
    if impossible:
        raise ValueError(f"tokens must have positive probability, got {impossible} strings of probability 0")
    tokens, (n, length) = tokens.long(), tokens.shape
    if end is not None:
        _checks.symbol("end", end, model.next_logps(model.begin(1)).shape[-1])
    if proposal is not None:
        _covers(model, proposal, length)

    def sizes_of(strings: Tensor) -> Tensor:
        if end is None:
            return torch.full((n,), length, device=strings.device)
        return lengths(strings, end)

    source_logps = None if proposal is None else proposal.logps(tokens).double()
    sizes, accepted = sizes_of(tokens), torch.zeros(n, dtype=torch.float64, device=tokens.device)
    for _ in range(steps if n else 0):
        u = torch.rand(2, n, generator=generator, device=tokens.device, dtype=torch.float64)
        cut = (u[0] * sizes).long()  # u < 1, so cut < sizes
        proposed = _redrawn(model if proposal is None else proposal, tokens, cut, generator)
        new_logps, new_sizes = model.logps(proposed).double(), sizes_of(proposed)
        new_source_logps = None
        if proposal is not None:
            new_source_logps = proposal.logps(proposed).double()
            # What is kept of a string may hold a token that the proposal never writes: no move then.
            possible = new_source_logps > -math.inf
            new_logps = torch.where(possible, new_logps, -math.inf)
            new_source_logps = torch.where(possible, new_source_logps, 0.0)
        between = {"proposal_logps": source_logps, "new_proposal_logps": new_source_logps}
        accept = u[1].log() < log_accept(logps, new_logps, power, sizes, new_sizes, **between)
        tokens = torch.where(accept[:, None], proposed, tokens)
        logps, sizes = torch.where(accept, new_logps, logps), torch.where(accept, new_sizes, sizes)
        if source_logps is not None and new_source_logps is not None:
            source_logps = torch.where(accept, new_source_logps, source_logps)
        accepted += accept
    return Rewritten(tokens, accepted / steps)


@torch.no_grad()
def power_mh_law(logps: Tensor, length: int, power: float, steps: int, *, start: Tensor | None = None) -> Tensor:
    """Compute the law of strings of one length after some moves of `power_mh`, exactly.

        mu'(x') = mean over cuts t of  c_t(x') sum_x mu(x) min(1, w(x') / w(x)) + mu(x') (1 - a_t(x')),    w = p^(a-1)

    The sum is over the strings x with the first t tokens of x', c_t is p given these tokens, and a_t(x) is the chance
    that a move from x with this cut is accepted. Sorted by w within each beginning, the sums are running sums: cost
    O(L K log K) once and O(L K) per move for K strings, where a matrix would take K^2. Not differentiable.

    Args:
        logps: Log-probabilities of all strings of L tokens, those with the same beginning side by side, normalised,
            shape (V^L,): string i has the digits of i in base V, as in `language.Tree`.
        length: Number of tokens L, >= 1.
        power: Exponent a, finite and > 0.
        steps: Number of moves, >= 0.
        start: Log-probabilities of the strings before the first move, normalised, shape (V^L,), -inf where `logps` is.
            Default: `logps`.

    Returns:
        Log-probabilities after the moves, dtype of `logps`, computed in float64, shape (V^L,).

    Raises:
        TypeError: `logps` or `start` is not a floating tensor, or `length` or `steps` not an int.
        ValueError: `logps` or `start` not normalised or not of such a shape; `length` < 1, `steps` < 0, `power` not
            finite and > 0; or a start at a string of probability 0.

    Source: [hastings1970] for the moves; book, `rewriting-law`.
    """
    _checks.count("length", length)
    _checks.positive("power", power)
    if isinstance(steps, bool) or not isinstance(steps, int):
        raise TypeError(f"steps must be an int, got {_checks.described(steps)}")
    if steps < 0:
        raise ValueError(f"steps must be an integer >= 0, got {steps}")
    with _checks.together():
        p = _checks.law("logps", logps)
        v = round(len(p) ** (1 / length)) if p.ndim == 1 else 0
        if v < 1 or v**length != len(p):
            raise ValueError(f"logps must have shape (V^L,) with L = {length}, got {tuple(p.shape)}")
        mu = p if start is None else _checks.law("start", start)
        if mu.shape != p.shape:
            raise ValueError(f"start must have the shape of logps, {tuple(p.shape)}, got {tuple(mu.shape)}")
        possible = p > -math.inf
        _checks.holds(
            possible | (mu == -math.inf),
            lambda: ValueError("start must be -inf where logps is, got mass on a string of probability 0"),
        )
    log_w = torch.where(possible, (float(power) - 1) * p, 0.0)
    cuts = []
    for t in range(length):
        of_each = p.view(v**t, -1)
        w, order = log_w.view(v**t, -1).sort(-1)
        c = of_each - of_each.logsumexp(-1, keepdim=True).clamp(min=-torch.finfo(torch.float64).max)
        c = c.gather(-1, order)
        # a: what lies at or above x in weight is accepted, what lies below it by the ratio of weights.
        above = c.exp().flip(-1).cumsum(-1).flip(-1)
        below = torch.cat([torch.zeros_like(c[:, :1]), (torch.logcumsumexp(c + w, -1)[:, :-1] - w[:, 1:]).exp()], -1)
        cuts.append((w, order, c, (above + below).clamp(max=1.0)))
    for _ in range(steps):
        moved = torch.zeros_like(p)
        for w, order, c, accepted in cuts:
            here = mu.view(len(w), -1).gather(-1, order)
            lighter = here.exp().cumsum(-1)
            heavier = torch.logcumsumexp((here - w).flip(-1), -1).flip(-1)[:, 1:] + w[:, :-1]
            heavier = torch.cat([heavier.exp(), torch.zeros_like(c[:, :1])], -1)
            new = c.exp() * (lighter + heavier) + here.exp() * (1 - accepted)
            moved += torch.empty_like(new).scatter(-1, order, new).flatten() / length
        mu = (moved / moved.sum()).log()
    return mu.to(logps.dtype)


def _redrawn(source: AutoregressiveModel[Any], tokens: Tensor, cut: Tensor, generator: torch.Generator) -> Tensor:
    """Draw the ends of strings anew, each from its own cut on."""
    state, drawn = source.begin(len(tokens)), []
    for t, old in enumerate(tokens.unbind(-1)):
        drawn.append(torch.where(t < cut, old, source.draw(state, generator=generator)))
        if t < tokens.shape[-1] - 1:
            state = source.append(state, drawn[-1])
    return torch.stack(drawn, -1)


def _covers(model: AutoregressiveModel[Any], proposal: AutoregressiveModel[Any], length: int) -> None:
    """Require a proposal that can write every string that the model can, as far as tables say."""
    _checks.instance("proposal", proposal, AutoregressiveModel)
    of_model, of_proposal = (m.next_logps(m.begin(1)).shape[-1] for m in (model, proposal))
    if of_proposal != of_model:
        raise ValueError(f"proposal must be over the {of_model} tokens of model, got {of_proposal}")
    if not (isinstance(model, MarkovChain) and isinstance(proposal, MarkovChain)):
        return
    model.check_alike("proposal", proposal)
    if proposal.length is not None and proposal.length < length:
        raise ValueError(f"proposal must have tables for {length} steps, got {proposal.length}")
    if not bool(model.kl(proposal, length).isfinite()):
        raise ValueError("proposal must be positive wherever model is, got a string that only model can write")
