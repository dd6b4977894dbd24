"""One tilt on many processes: what the ranks of a `torch.distributed` group tell each other, and no more.

All ranks call the same function, each with its own share. First they exchange one page of fixed size: what has to be
the same on all of them, or that one has failed. So all raise together, and a shape that differs is an error and not a
hang. Then the state goes around once, every rank computes the same decision from it, and only what was decided moves.

    best_of_n       three numbers per row, then the winner                   kept of the candidates of all ranks
    weight_stats    three numbers per row                                    log mean, effective sample size
    systematic      two numbers per row, then two integers                   only particles whose host changes move
    add_counts      the counts                                               evidence: add counts, judge once
    tv_upper_bound  one number, 54 times                                     a certificate: wealths multiply

Without `init_process_group`, a group of None is this process alone, and each function is its single-process form.
Start the ranks with `torchrun --nproc-per-node 4 script.py`, whose first line of work is
`torch.distributed.init_process_group()`; the timeout of the group is the deadline for a rank that never comes. Sums are
float64. Nothing here is differentiable. The theory is in the book, "Scaling".
"""

import hashlib
import json
import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Generator, Tensor

from tiltlib import _checks, _numerics, selection, verify
from tiltlib.autoregressive import AutoregressiveModel, Gain
from tiltlib.particles import Particles
from tiltlib.selection import Streamed

__all__ = [
    "Averaged",
    "RankFailed",
    "Resampled",
    "Shard",
    "Weights",
    "add_counts",
    "average_curves",
    "best_of_n",
    "beta_for_ess",
    "shards",
    "systematic",
    "together",
    "tv_upper_bound",
    "twisted_smc",
    "weight_stats",
]

Group = dist.ProcessGroup | None
Chunk = tuple[Tensor, Tensor, Generator]

RULES = ("hard", "soft", "exponential")
_PAGE = 2048  # bytes that a rank may say of its arguments, or of what went wrong
_HALF = 30  # bits of the lower word of a weight


class RankFailed(RuntimeError):
    """A rank failed; raised on all of them, with its number and its message. On that rank the cause is attached."""


class Weights(NamedTuple):
    """What `weight_stats` returns.

    Attributes:
        log_mean: Log of the mean weight over all candidates, float64, shape (...).
        ess: Effective sample size, float64, shape (...).
        n: Number of candidates per row, of all ranks.
    """

    log_mean: Tensor
    ess: Tensor
    n: int


class Resampled(NamedTuple):
    """What `systematic` returns.

    Attributes:
        ancestors: Place, counted over all ranks, of the parent of each place of this rank, int64, shape (..., m).
        particles: The particles at these places, in the shapes and dtypes that came in.
        arrived: How many of them, in all rows together, came from another rank.
    """

    ancestors: Tensor
    particles: tuple[Tensor, ...]
    arrived: int


class Averaged(NamedTuple):
    """What `average_curves` returns, all float64, shape (n,), but for the count.

    Attributes:
        mean: Average of the curves.
        error: Standard error of the average, for these prompts: from the errors of the single curves.
        spread: Standard error over prompts: from how the curves differ; NaN for a single one.
        prompts: Number of curves, of all ranks.
    """

    mean: Tensor
    error: Tensor
    spread: Tensor
    prompts: int


class Shard(NamedTuple):
    """A part of the work that draws the same whoever does it.

    Attributes:
        number: Number of the shard, from 0.
        n: Number of its candidates.
        generator: Its stream, on the CPU; on another device seed one by `generator.initial_seed()`.
    """

    number: int
    n: int
    generator: Generator


# --- one page from each rank: all go on, or all raise ----------------------------------------------------------------


def _place(group: Group) -> tuple[int, int]:
    """Give the rank of this process and the number of ranks."""
    if not (dist.is_available() and dist.is_initialized()):
        return 0, 1
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    if rank < 0:
        raise ValueError("group must hold this process, got a group of others")
    return rank, size


def _devices(group: Group) -> list[str]:
    """Name the kinds of device that the backend of a group can send from."""
    return [pair.split(":")[0] for pair in str(dist.get_backend_config(group)).split(",")]


def _gather(x: Tensor, group: Group) -> Tensor:
    """Stack a small tensor of every rank, (P, *shape): the same bits everywhere."""
    parts = x.detach().new_empty((_place(group)[1], *x.shape))
    if len(parts) == 1 or not x.numel():
        return parts.copy_(x.detach())
    dist.all_gather(list(parts.unbind(0)), x.detach().contiguous(), group=group)
    return parts


@contextmanager
def together(group: Group = None) -> Iterator[dict[str, Any]]:
    """Do local work on every rank, so that all ranks raise if one fails.

        with together() as said:
            rewards = reward_model(candidates)          # may fail on one rank
            said["reward model"] = reward_model.name    # has to be the same on all

    At the end of the block the ranks exchange one page of 2048 bytes. An exception in one block makes all ranks raise
    within the time of that exchange, instead of waiting for the next collective until the group times out. Collectives
    inside of the block belong to no rank alone: leave them out. The functions of this module do this by themselves.

    Args:
        group: Process group; None is the default group, or this process alone.

    Returns:
        A context manager that gives a dict. What is put there, numbers, words or lists of them, has to be equal on all
        ranks that put something else than None; after the block it holds what they agreed on.

    Raises:
        ValueError: an entry of the dict that differs between ranks, on all ranks; a group without this process.
        RankFailed: a block that raised, on all ranks; with one process its own exception.
    """
    said: dict[str, Any] = {}
    error: Exception | None = None
    try:
        yield said
    except Exception as raised:
        error = raised
    said.update(_meet(said, error, group))


def _meet(said: dict[str, Any], error: Exception | None, group: Group) -> dict[str, Any]:
    """Exchange pages; return what was agreed on. What begins with _ may differ, and comes back as a list by rank."""
    rank, size = _place(group)
    if size == 1:
        if error is not None:
            raise error
        return {key: [value] if key[0] == "_" else value for key, value in said.items()}
    text = json.dumps(said) if error is None else f"!{type(error).__name__}: {error}"
    data = text.encode()
    if error is None and len(data) > _PAGE:
        data = f"!ValueError: arguments must fit a page of {_PAGE} bytes, got {len(data)} bytes".encode()
    page = torch.frombuffer(bytearray(data[:_PAGE].ljust(_PAGE, b"\0")), dtype=torch.uint8)
    devices = _devices(group)
    pages = _gather(page.to("cpu" if "cpu" in devices else devices[0]), group).cpu()
    return _agreed([bytes(p.tolist()).rstrip(b"\0").decode(errors="ignore") for p in pages], error)


def _agreed(pages: list[str], error: Exception | None = None) -> dict[str, Any]:
    """Decide from the pages of all ranks: raise, or return what they agree on."""
    failed = [f"rank {r} of {len(pages)}: {page[1:]}" for r, page in enumerate(pages) if page[:1] == "!"]
    if failed:
        raise RankFailed("; ".join(failed)) from error
    heard: list[dict[str, Any]] = [json.loads(page) for page in pages]
    found: dict[str, Any] = {}
    for key in {key: None for said in heard for key in said}:
        values = [said.get(key) for said in heard]
        told = [(rank, value) for rank, value in enumerate(values) if value is not None]
        others = [(rank, value) for rank, value in told if value != told[0][1]]
        if key[0] != "_" and others:
            got = " and ".join(f"{value} on rank {rank}" for rank, value in (told[0], others[0]))
            raise ValueError(f"{key} must be the same on all ranks, got {got}")
        found[key] = values if key[0] == "_" else told[0][1] if told else None
    streams = [stream for stream in found.get("_stream", []) if stream is not None]
    if len(set(streams)) < len(streams):
        raise ValueError("generator must be another stream on each rank, got one state on several: see `shards`")
    return found


def _stream(generator: Generator) -> str:
    return hashlib.blake2b(generator.get_state().numpy().tobytes(), digest_size=8).hexdigest()


def _told(value: float | Tensor) -> str:
    """Describe a number, or a tensor of numbers down to its last bit."""
    if not isinstance(value, Tensor):
        return repr(float(value))
    bits = hashlib.blake2b(value.detach().double().contiguous().cpu().numpy().tobytes(), digest_size=4).hexdigest()
    return f"a tensor of shape {tuple(value.shape)} with hash {bits}"


def _form(x: Tensor) -> list[Any]:
    return [str(x.dtype).removeprefix("torch."), list(x.shape)]


def _on_backend(name: str, x: Tensor, group: Group) -> None:
    if _place(group)[1] > 1 and x.device.type not in _devices(group):
        raise ValueError(
            f"{name} must be on a device that the backend of the group can send from, {' or '.join(_devices(group))}, "
            f"got {x.device}"
        )


# --- selection -------------------------------------------------------------------------------------------------------


class _Kept(NamedTuple):
    """What is kept of some candidates: the winner; largest reward, and relative to it key and log sum, (3, ...)."""

    winner: Tensor
    state: Tensor


def best_of_n(chunks: Iterable[Chunk], beta: float | Tensor, *, rule: str = "soft", group: Group = None) -> Streamed:
    """Keep one of the candidates of all ranks, in one pass over those of each, in constant memory.

        soft           argmax_c log S_c + G_c,    S_c the sum of exp(r / beta) over chunk c, G_c Gumbel noise
        exponential    argmax_i r_i + beta E_i,   E_i standard exponential noise
        hard           argmax_i (r_i, U_i),       a uniform number for each candidate, so that ties are fair

    The law is that of `selection.soft_best_of_n`, `exponential_best_of_n` or `best_of_n` over all candidates, however
    they are split. The generator of a chunk draws its noise: with a generator for each chunk, as from `shards`, every
    number of ranks keeps the same candidate, but for keys that agree to 15 digits. Not differentiable.

    Args:
        chunks: Triples `(candidates, rewards, generator)`. `rewards` has shape (..., C), floating, -inf excludes; C may
            differ, and be 0. `candidates` has shape (..., C) or (..., C, L), any dtype. The generator is on the device
            of the rewards. A rank may have none, or only excluded ones, as long as each row has one somewhere.
        beta: Temperature in reward units, > 0, the same on all ranks. A tensor broadcasts to the batch dimensions. Of
            the hard rule it only scales `log_mean_weight`.
        rule: "soft", "exponential" or "hard".
        group: Process group; None is the default group, or this process alone.

    Returns:
        `Streamed(winner, log_mean_weight, n)`, as from `selection.soft_best_of_n_stream`; the same on all ranks.

    Raises:
        TypeError: rewards that are not a floating tensor, candidates that are none, or no generator.
        ValueError: no candidate on any rank, a row without any finite reward, rewards with NaN or +inf, chunks of
            different shapes or dtypes, `beta` not finite and > 0, another `rule`; ranks that differ in `beta`, `rule`,
            shapes or dtypes, or draw from one stream; tensors that the backend cannot send.
        RankFailed: one of the errors above, or of what makes the chunks, on another rank.

    Example:
        >>> def candidates():
        ...     for shard in shards("distributed-example", 4, 1000):
        ...         y = torch.randn(3, shard.n, generator=shard.generator)
        ...         yield y, y, shard.generator  # candidates that are their own rewards
        >>> best = best_of_n(candidates(), 0.5)
        >>> best.winner.shape, best.n
        (torch.Size([3]), 1000)

    Source: book, `merged-selection`.
    """
    with together(group) as said:
        _checks.one_of("rule", rule, RULES)
        _checks.positive_per_row("beta", beta, torch.Size())
        beta = beta.detach() if isinstance(beta, Tensor) else beta
        kept, said["_n"], said["_stream"] = _fold(chunks, beta, rule, group)
        said |= {"function": "best_of_n", "rule": rule, "beta": _told(beta), "candidates": None, "rewards": None}
        if kept is not None:
            said["candidates"] = [*_form(kept.winner), kept.winner.device.type]
            said["rewards"] = list(kept.state.shape[1:])
    if said["candidates"] is None:
        raise ValueError("chunks must hold at least one candidate on some rank, got none")
    if kept is None:
        dtype, shape, device = said["candidates"]
        state = torch.full((3, *said["rewards"]), -math.inf, dtype=torch.float64, device=device)
        kept = _Kept(torch.zeros(shape, dtype=getattr(torch, dtype), device=device), state)
    owner, (top, _, log_total) = _merged(_gather(kept.state, group).movedim(0, -1), beta, rule)
    _checks.some_left("rewards", top)
    n = sum(said["_n"])
    log_mean = log_total + top / _numerics.double(beta) - math.log(n)
    return Streamed(_from_owner(kept.winner, owner, group), log_mean, n)


def _fold(
    chunks: Iterable[Chunk], beta: float | Tensor, rule: str, group: Group
) -> tuple[_Kept | None, int, str | None]:
    """Keep one of the candidates of this rank; count them, and name the stream that the first chunk draws from."""
    kept, n, stream = None, 0, None
    for candidates, rewards, generator in chunks:
        _checks.generator("generator", generator)
        if not isinstance(candidates, Tensor):
            raise TypeError(f"candidates must be a torch.Tensor, got {_checks.described(candidates)}")
        if isinstance(rewards, Tensor) and rewards.ndim and not rewards.shape[-1]:
            continue
        _checks.tensor("rewards", rewards)
        _on_backend("rewards", rewards, group)
        _checks.rewards("rewards", rewards)
        if candidates.shape[: rewards.ndim] != rewards.shape:
            raise ValueError(
                f"candidates must have the shape of rewards, then any event dimensions, "
                f"got {tuple(candidates.shape)} and {tuple(rewards.shape)}"
            )
        if isinstance(beta, Tensor):
            _checks.fits("beta", beta, rewards[..., 0])
        stream = stream or _stream(generator)
        new = _of_chunk(candidates.detach(), rewards.detach(), generator, beta, rule)
        if kept is not None:
            now, before = (_form(x.winner) + _form(x.state)[1:] for x in (new, kept))
            if now != before:
                raise ValueError(f"chunks must have one batch shape, event shape and dtype, got {before} and {now}")
            owner, state = _merged(torch.stack([kept.state, new.state], -1), beta, rule)
            later = owner.bool().reshape(owner.shape + (1,) * (new.winner.ndim - owner.ndim))
            new = _Kept(torch.where(later, new.winner, kept.winner), state)
        kept, n = new, n + rewards.shape[-1]
    return kept, n, stream


def _of_chunk(candidates: Tensor, rewards: Tensor, generator: Generator, beta: float | Tensor, rule: str) -> _Kept:
    top = rewards.amax(-1, keepdim=True)
    dead = top == -math.inf
    x = _numerics.over(rewards, torch.where(dead, 0, top), beta)
    log_total = x.logsumexp(-1)
    if rule == "soft":
        index = selection.soft_best_of_n(torch.where(dead, 0, rewards), beta, generator=generator)
        key = log_total - _exponential(log_total, generator).log()
    else:
        noise = _exponential(x, generator)
        key, index = (x + noise if rule == "exponential" else torch.where(rewards == top, noise, -math.inf)).max(-1)
    where = index.reshape(index.shape + (1,) * (candidates.ndim - index.ndim))
    winner = torch.take_along_dim(candidates, where, index.ndim).squeeze(index.ndim)
    return _Kept(winner, torch.stack([top.squeeze(-1).double(), key, log_total]))


def _exponential(like: Tensor, generator: Generator) -> Tensor:
    u = torch.rand(like.shape, generator=generator, device=like.device, dtype=torch.float64)
    return -torch.log1p(-u.clamp_(min=2.0**-54))  # positive, so that its log is finite


def _merged(states: Tensor, beta: float | Tensor, rule: str) -> tuple[Tensor, Tensor]:
    """Merge what was kept of P parts, (3, ..., P): whose winner is kept, shape (...), and the state of the whole.

    A key is relative to the largest reward of its part. Of the hard rule, the limit beta to 0, only those of the
    largest reward of all count.
    """
    tops, keys, log_totals = states
    top = tops.amax(-1, keepdim=True)
    shift = _numerics.over(tops, torch.where(top > -math.inf, top, 0), beta)
    moved = torch.where(tops == top, keys, -math.inf) if rule == "hard" else keys + shift
    key, owner = moved.max(-1)
    return owner, torch.stack([top.squeeze(-1), key, (log_totals + shift).logsumexp(-1)])


def _from_owner(x: Tensor, owner: Tensor, group: Group) -> Tensor:
    """Give every rank the rows that their owners hold, exactly, whatever the dtype."""
    rank, size = _place(group)
    if size == 1 or not x.numel():
        return x
    mine = (owner == rank).reshape(owner.shape + (1,) * (x.ndim + 1 - owner.ndim))
    # One rank contributes each byte and all others 0: the sum moves bits, whatever they mean.
    bits = torch.where(mine, x.contiguous().unsqueeze(-1).view(torch.uint8), 0)
    dist.all_reduce(bits, group=group)
    return bits.view(x.dtype).squeeze(-1)


# --- weights, curves, counts, streams --------------------------------------------------------------------------------


def _some(name: str, x: Tensor, group: Group) -> Tensor:
    """Check numbers of this rank, finite or -inf, of which there may be none; none is one that is excluded."""
    if isinstance(x, Tensor) and x.is_floating_point() and x.ndim and not x.shape[-1]:
        x = torch.nn.functional.pad(x, (0, 1), value=-math.inf)
    _checks.tensor(name, x)
    _on_backend(name, x, group)
    _checks.rewards(name, x)
    return x.detach()


def weight_stats(log_weights: Tensor, *, group: Group = None) -> Weights:
    """Compute the log of the mean weight, and the effective sample size, over the candidates of all ranks.

        log mean = log (S_1 / N),    ESS = S_1^2 / S_2,    S_k = sum over all ranks of w^k

    `weights.log_mean` and `weights.ess` of all weights, to rounding. Three numbers per row go around. Not
    differentiable.

    Args:
        log_weights: Unnormalised natural-log weights of this rank, shape (..., n), floating; -inf excludes; n may
            differ between ranks, and be 0.
        group: Process group; None is the default group, or this process alone.

    Returns:
        `Weights(log_mean, ess, n)`, the same on all ranks.

    Raises:
        TypeError: `log_weights` is not a floating tensor.
        ValueError: `log_weights` with NaN or +inf, a row that is all -inf on all ranks, batch dimensions that differ
            between ranks, or a tensor that the backend cannot send.
        RankFailed: one of the errors above on another rank.

    Source: [kong1992]; book, `merged-sums`.
    """
    with together(group) as said:
        x = _some("log_weights", log_weights, group)
        said |= {"function": "weight_stats", "batch of log_weights": list(x.shape[:-1]), "_n": log_weights.shape[-1]}
    return _stats(x, sum(said["_n"]), group)


def _stats(log_weights: Tensor, n: int, group: Group, *, dead: bool = False) -> Weights:
    """Compute the statistics of checked weights; a row of no weight is refused, or has an ESS of 0."""
    top = log_weights.amax(-1, keepdim=True)
    x = _numerics.over(log_weights, torch.where(top > -math.inf, top, 0), 1.0)
    sent = torch.stack([top.squeeze(-1).double(), x.logsumexp(-1), (2 * x).logsumexp(-1)])
    top, s1, s2 = _log_sums(_gather(sent, group).movedim(0, -1))
    if not dead:
        _checks.some_left("log_weights", top)
    return Weights(s1 + top - math.log(n), torch.where(top > -math.inf, (2 * s1 - s2).exp(), 0.0), n)


def _log_sums(states: Tensor) -> Tensor:
    """Merge largest log weight, log sum of weights and of squares relative to it, of P parts, (3, ..., P)."""
    tops, s1, s2 = states
    top = tops.amax(-1, keepdim=True)
    shift = _numerics.over(tops, torch.where(top > -math.inf, top, 0), 1.0)
    return torch.stack([top.squeeze(-1), (s1 + shift).logsumexp(-1), (s2 + 2 * shift).logsumexp(-1)])


def beta_for_ess(rewards: Tensor, fraction: float, *, group: Group = None) -> Tensor:
    """Find the temperature at which the weights of all ranks together keep a wanted fraction of the sample.

        ESS(exp(r / beta)) / N = fraction

    As `weights.beta_for_ess`, by bisection: two numbers per row go around 64 times. Not differentiable.

    Args:
        rewards: Rewards of this rank, shape (..., n), floating; -inf excludes; n may differ between ranks, and be 0.
        fraction: Wanted ESS / N, strictly between (number of maximal rewards) / N and (number of finite rewards) / N.
        group: Process group; None is the default group, or this process alone.

    Returns:
        Temperature per row, float64, shape (...), the same on all ranks.

    Raises:
        TypeError: `rewards` is not a floating tensor, or `fraction` not a number.
        ValueError: `rewards` with NaN or +inf, a row that is all -inf on all ranks, a fraction that is not attainable,
            or differs between ranks, as do batch dimensions; a tensor that the backend cannot send.
        RankFailed: one of the errors above on another rank.

    Source: book, `tilt-path`.
    """
    with together(group) as said:
        _checks.number("fraction", fraction)
        r = _some("rewards", rewards, group)
        said |= {"function": "beta_for_ess", "fraction": float(fraction), "batch of rewards": list(r.shape[:-1])}
        said["_n"] = rewards.shape[-1]
    n, top = sum(said["_n"]), _gather(r.amax(-1).double(), group).amax(0)
    _checks.some_left("rewards", top)
    x = r.double() - top[..., None]
    below = (x < 0) & (x > -math.inf)
    ends = torch.stack([torch.where(below, -x, 0).amax(-1), -torch.where(below, -x, math.inf).amin(-1)])
    gap, smallest = _gather(ends, group).amax(0) * torch.tensor([1.0, -1.0], device=x.device).view(2, *[1] * top.ndim)
    best, finite = _gather(torch.stack([(x == 0).sum(-1), (x > -math.inf).sum(-1)]), group).sum(0) / n
    if not bool(((best < fraction) & (fraction < finite)).all()):
        raise ValueError(
            f"fraction must lie strictly between {best.max().item()!r} (only maximal rewards kept) and "
            f"{finite.min().item()!r} (all rewards kept), got {fraction!r}"
        )
    # In units of the largest gap, log(1 / beta) lies between -80, all weights equal, and 80 over the smallest gap.
    lower, upper = torch.full_like(gap, -80.0), 80.0 + (gap / smallest).log()
    for _ in range(64):
        middle = (lower + upper) / 2
        w = (x / gap[..., None] * middle.exp()[..., None]).exp()
        s1, s2 = _gather(torch.stack([w.sum(-1), w.square().sum(-1)]), group).sum(0)
        more = s1.square() / s2 > fraction * n
        lower, upper = torch.where(more, middle, lower), torch.where(more, upper, middle)
    return gap / upper.exp()


def average_curves(curves: Tensor, errors: Tensor, *, group: Group = None) -> Averaged:
    """Average the pool curves of the prompts of all ranks, each prompt counting once.

        mean = sum_k U_k / K,    error = sqrt(sum_k s_k^2) / K,    spread = sqrt(sum_k (U_k - mean)^2 / (K - 1) / K)

    Not differentiable.

    Args:
        curves: Curves of the prompts of this rank, as from `pool.curve`, shape (k, n), finite; k may differ, and be 0.
        errors: Their standard errors, as from `pool.standard_errors`, shape (k, n), finite.
        group: Process group; None is the default group, or this process alone.

    Returns:
        `Averaged(mean, error, spread, prompts)`, the same on all ranks.

    Raises:
        TypeError: `curves` or `errors` is not a floating tensor.
        ValueError: numbers that are not finite, shapes that differ or are not (k, n), an n that differs between ranks,
            no curve on any rank, or a tensor that the backend cannot send.
        RankFailed: one of the errors above on another rank.

    Source: book, `merged-sums`.
    """
    with together(group) as said:
        for name, x in (("curves", curves), ("errors", errors)):
            if isinstance(x, Tensor):
                _on_backend(name, x, group)
            _checks.finite(name, x)
        _checks.same_shape(curves=curves, errors=errors)
        if curves.ndim != 2:
            raise ValueError(f"curves must have shape (k, n), got {tuple(curves.shape)}")
        said |= {"function": "average_curves", "n of curves": curves.shape[1], "_k": curves.shape[0]}
    counts, u = said["_k"], curves.double()
    if not sum(counts):
        raise ValueError("curves must hold at least one curve on some rank, got none")
    mean = u.sum(0) / max(len(u), 1)
    sent = torch.stack([mean, (u - mean).square().sum(0), errors.double().square().sum(0)])
    return _averaged(torch.tensor(counts, dtype=torch.float64, device=u.device), _gather(sent, group))


def _averaged(counts: Tensor, states: Tensor) -> Averaged:
    """Merge P parts, (P, 3, n): means of curves, their squared deviations, and squared errors added up."""
    means, squares, variances = states.unbind(1)
    k = counts.sum()
    mean = (counts[:, None] * means).sum(0) / k
    deviations = (squares + counts[:, None] * (means - mean).square()).sum(0)
    return Averaged(mean, variances.sum(0).sqrt() / k, (deviations / (k - 1) / k).sqrt(), int(k))


def add_counts(counts: Tensor, *, group: Group = None) -> Tensor:
    """Add up how often each outcome occurred on the ranks, to be judged once, by `verify.match_counts`.

    E-values of the ranks are no substitute: they can be multiplied, which loses most of the evidence, or averaged,
    which loses more.

    Args:
        counts: Counts of this rank, integer tensor of any shape, >= 0; zeros where it has none.
        group: Process group; None is the default group, or this process alone.

    Returns:
        Sum over ranks, int64, same shape, the same on all ranks.

    Raises:
        TypeError: `counts` is not an integer tensor.
        ValueError: negative counts, shapes that differ between ranks, or a tensor that the backend cannot send.
        RankFailed: one of the errors above on another rank.

    Source: book, `counts-add`.
    """
    with together(group) as said:
        whole = _checks.integers("counts", counts)
        if bool((whole < 0).any()):
            raise ValueError(f"counts must be >= 0, got {int(whole.min())}")
        _on_backend("counts", whole, group)
        said |= {"function": "add_counts", "shape of counts": list(whole.shape)}
    return _gather(whole, group).sum(0)


def tv_upper_bound(x: Tensor, *, delta: float = 1e-8, group: Group = None) -> float:
    """Bound the mean of the values of all ranks from above, with confidence 1 - delta.

        U = inf { u : sum_s log W_s(u) >= log(1 / delta) },    W_s(u) = prod_t (1 - l_st(u) (x_st - u))

    Each shard s, a row of `x`, has a gambler who sees its own values only; their wealths multiply, and all ranks share
    one error probability. The bets are those of `verify.tv_upper_bound`, which is the case of one shard. The number of
    ranks changes nothing but rounding, the number of shards a little: each gambler has to learn the variance. Applied
    to x = (1 - p/q)_+ at draws from q it bounds TV(p, q). One number goes around 54 times. Not differentiable.

    Args:
        x: Independent values of this rank in [0, 1], shape (..., k), floating, a shard in each row; the shape may
            differ between ranks, and hold none.
        delta: Probability that the bound is wrong, in (0, 1).
        group: Process group; None is the default group, or this process alone.

    Returns:
        Upper confidence bound on the mean, in (0, 1], the same on all ranks.

    Raises:
        TypeError: `x` is not a floating tensor, or `delta` not a number.
        ValueError: values outside [0, 1], no value on any rank, `delta` outside (0, 1) or different between ranks, or
            a tensor that the backend cannot send.
        RankFailed: one of the errors above on another rank.

    Source: [waudbysmith2024]; book, `merged-certificate`.
    """
    with together(group) as said:
        _checks.chance("delta", delta)
        _on_backend("x", _checks.floating("x", x), group)
        _checks.probabilities("x", x)
        v = torch.atleast_1d(x.detach().double())
        said |= {"function": "tv_upper_bound", "delta": float(delta), "_n": v.numel()}
    n = sum(said["_n"])
    if not n:
        raise ValueError("x must hold at least one value on some rank, got none")
    bet, zero = _numerics.bets(v, n, delta), v.new_zeros(())
    below, above = 0.0, 1.0
    for _ in range(54):  # wealth grows with the mean that is bet against
        middle = (below + above) / 2
        log_wealth = _gather(_numerics.log_wealth(v, bet, zero + middle).sum(), group).sum()
        refuted = bool(log_wealth >= -math.log(delta))
        below, above = (below, middle) if refuted else (middle, above)
    return above


def shards(claim: str, number: int, n: int, *, group: Group = None) -> Iterator[Shard]:
    """Split n candidates into shards, each with its own stream; this rank does number rank, rank + P, and so on.

    What a shard draws depends on the claim and its number alone: not on the number of ranks, and a shard that was lost
    can be done again.

    Args:
        claim: Claim id, which seeds the streams as in `verify.rng`.
        number: Number of shards, >= 1 and at most n; a multiple of the number of ranks keeps all equally busy.
        n: Number of candidates of all shards together, >= 1; they differ by at most one.
        group: Process group; None is the default group, or this process alone.

    Returns:
        An iterator over the shards of this rank, `Shard(number, n, generator)`.

    Raises:
        TypeError: `number` or `n` is not an int.
        ValueError: a malformed claim id, `number` or `n` < 1, more shards than candidates, or ranks that differ in
            any of these.
        RankFailed: one of the errors above on another rank.

    Source: book, `merged-selection`.
    """
    with together(group) as said:
        verify.rng(claim)
        _checks.count("number", number)
        _checks.count("n", n)
        if number > n:
            raise ValueError(f"number must be at most the number of candidates, {n}, got {number} shards")
        said |= {"function": "shards", "claim": claim, "number": int(number), "n": int(n)}
    rank, size = _place(group)
    return (
        Shard(s, n // number + (s < n % number), verify.rng(claim, salt=f"shard{s}")) for s in range(rank, number, size)
    )


# --- resampling ------------------------------------------------------------------------------------------------------


def systematic(log_weights: Tensor, *particles: Tensor, generator: Generator, group: Group = None) -> Resampled:
    """Resample the particles of all ranks with one uniform per row, and send each to the rank that hosts its place.

        place k takes the first i with C(i) / C(N) > (k + U) / N,    rank r hosts the places r m, ..., (r + 1) m - 1

    C adds weights as integer multiples of 2^-60 of the largest, in which no order of summation matters: the ancestors
    are the same for every number of ranks. Places are numbered through the ranks, ancestors ascend. A particle moves
    only if its rank does not host its place. Not differentiable.

    Args:
        log_weights: Unnormalised natural-log weights of this rank, shape (..., m), floating, the same m on all ranks;
            -inf excludes, on one rank all may be.
        particles: Tensors of shape (..., m) or (..., m, *event), any dtype, on the device of the weights.
        generator: Source of the uniforms, on that device. That of rank 0 counts; all of them advance.
        group: Process group; None is the default group, or this process alone.

    Returns:
        `Resampled(ancestors, particles, arrived)`.

    Raises:
        TypeError: `log_weights` is not a floating tensor, a particle no tensor, or `generator` no generator.
        ValueError: `log_weights` with NaN or +inf, a row that is all -inf on all ranks, shapes that do not fit, or
            shapes and dtypes that differ between ranks; a tensor that the backend cannot send.
        RankFailed: one of the errors above on another rank.

    Source: [carpenter1999], [douc2005]; book, `resampling-over-ranks`.
    """
    with together(group) as said:
        _checks.generator("generator", generator)
        _checks.tensor("log_weights", log_weights)
        _on_backend("log_weights", log_weights, group)
        _checks.rewards("log_weights", log_weights)
        for x in particles:
            if not isinstance(x, Tensor):
                raise TypeError(f"particles must be tensors, got {_checks.described(x)}")
            if x.shape[: log_weights.ndim] != log_weights.shape or x.device != log_weights.device:
                raise ValueError(
                    f"particles must begin with the shape of log_weights, {tuple(log_weights.shape)}, on "
                    f"{log_weights.device}, got shape {tuple(x.shape)} on {x.device}"
                )
        w = log_weights.detach().reshape(-1, log_weights.shape[-1])
        u = torch.rand(len(w), generator=generator, device=w.device, dtype=torch.float64)
        said |= {"function": "systematic", "shape of log_weights": list(log_weights.shape)}
        said["particles"] = [_form(x) for x in particles]
    (rank, size), (runs, m) = _place(group), w.shape
    tops, uniforms = _gather(torch.stack([w.amax(-1).double(), u]), group).unbind(1)
    _checks.some_left("log_weights", tops.amax(0))
    words = _words(_numerics.over(w, tops.amax(0)[:, None], 1.0).exp_())  # (2, runs, m)
    ends = _gather(words[..., -1].contiguous(), group).cumsum(0)  # (P, 2, runs)
    before = torch.nn.functional.pad(ends, (0, 0, 0, 0, 1, 0))[rank]
    through = _through(words + before[..., None], ends[-1], uniforms[0], m * size)
    bounds = _through(ends.permute(1, 2, 0), ends[-1], uniforms[0], m * size)  # (runs, P)
    low = torch.nn.functional.pad(bounds[:, :-1], (1, 0))
    offspring = through.diff(dim=-1, prepend=low[:, rank, None])
    rows = torch.arange(runs * m, device=w.device).repeat_interleave(offspring.flatten())
    hosts = m * torch.arange(size, device=w.device)
    out = _overlap(low[:, rank, None], bounds[:, rank, None], hosts, m)  # (runs, P destinations)
    into = _overlap(low, bounds, hosts[rank], m)  # (runs, P sources)
    # Offspring are ordered by run, then place; a message is ordered by destination, run, place.
    starts = (out.flatten().cumsum(0) - out.flatten()).view(out.shape)
    rows = rows[_ranges(starts, out)]
    first = (low - hosts[rank]).clamp(min=0) + m * torch.arange(runs, device=w.device)[:, None]
    place = _ranges(first, into)
    sends, receives = torch.stack([out.sum(0), into.sum(0)]).tolist()
    own = (torch.arange(m, device=w.device) + hosts[rank]).expand(runs, m)
    flat = [x.detach().reshape(runs * m, math.prod(x.shape[log_weights.ndim :])) for x in particles]
    bits = torch.cat([x.contiguous().view(torch.uint8) for x in (own.reshape(-1, 1), *flat)], -1)
    sent = got = bits[rows]
    if size > 1:
        got = bits.new_empty((sum(receives), bits.shape[1]))
        dist.all_to_all_single(got, sent, receives, sends, group=group)
    bits = bits.index_copy(0, place, got)
    ancestors, *moved = bits.split([8, *(x.shape[1] * x.element_size() for x in flat)], -1)
    return Resampled(
        _read(ancestors, own).reshape(log_weights.shape),
        tuple(_read(b, x).reshape(x.shape) for b, x in zip(moved, particles, strict=True)),
        sum(receives) - receives[rank],
    )


def _read(bits: Tensor, like: Tensor) -> Tensor:
    return bits.clone(memory_format=torch.contiguous_format).view(like.dtype) if bits.numel() else like


def _words(w: Tensor) -> Tensor:
    """Add up weights in [0, 1] in units of 2^-60, along the last dimension, as two integers: upper and lower half."""
    units = (w * 2.0 ** (2 * _HALF)).round_().long()
    return torch.stack([units >> _HALF, units & (2**_HALF - 1)]).cumsum(-1)


def _through(words: Tensor, total: Tensor, u: Tensor, n: int) -> Tensor:
    """Count the places below n C - U, for sums C as shares of the total: words (2, runs, k), total (2, runs)."""

    def whole(hi: Tensor, lo: Tensor) -> Tensor:
        return (hi + (lo >> _HALF)).double() * 2.0**_HALF + (lo & (2**_HALF - 1)).double()

    # n - u must not round to n - 1: the last place would go past the last particle with weight.
    u = u.clamp(max=n - math.nextafter(n - 1, n))
    share = whole(*words) / whole(*total)[:, None]
    return (share * n - u[:, None]).ceil().clamp(0, n).long()


def _overlap(low: Tensor, high: Tensor, host: Tensor, m: int) -> Tensor:
    """Count the places from low to high that lie among the m of a host."""
    return (torch.minimum(high, host + m) - torch.maximum(low, host)).clamp(min=0)


def _ranges(starts: Tensor, lengths: Tensor) -> Tensor:
    """List start, ..., start + length - 1 for each rank and run, both (runs, P)."""
    starts, lengths = starts.T.flatten(), lengths.T.flatten()
    ends = lengths.cumsum(0)
    steps = torch.arange(int(ends[-1]) if len(ends) else 0, device=ends.device)
    return steps + (starts - ends + lengths).repeat_interleave(lengths)


# --- particles -------------------------------------------------------------------------------------------------------


@torch.no_grad()
def twisted_smc(
    model: AutoregressiveModel[Any],
    gain: Gain,
    length: int,
    n: int,
    *,
    generator: Generator,
    proposal: AutoregressiveModel[Any] | None = None,
    threshold: float = 0.5,
    runs: int = 1,
    group: Group = None,
) -> Particles:
    """Grow n strings on each rank as one particle system of P n, resampled together when the weights are uneven.

        resample before a step iff 0 < ESS < threshold P n,    the ESS that of all ranks

    `smc.twisted_smc` with `systematic` over the ranks. A string moves as its tokens, and the rank that hosts it makes
    its state again from them, so any model will do. That costs as many calls of `append` as there are tokens, and only
    a resampling in which a string arrives. Not differentiable.

    Args:
        model: Model p of the strings, on each rank.
        gain: What the strings are worth, such as `smc.by_value(...)` or `stepwise.gain(...)`.
        length: Number of tokens L, >= 1.
        n: Particles per run on this rank, >= 1, the same on all ranks.
        generator: Source of randomness, on the device of the model, another stream on each rank.
        proposal: Model q that tokens are drawn from, positive wherever p w is. Default: p.
        threshold: Resample when ESS / (P n) falls below it, in [0, 1].
        runs: Independent particle systems, >= 1.
        group: Process group; None is the default group, or this process alone.

    Returns:
        `Particles(particles, log_weights, log_partition, ancestors, ess)`: tokens of the strings of this rank, int64,
        shape (runs, n, L), with their log weights; ancestors, numbered through the ranks; `log_partition` and `ess` are
        those of all ranks.

    Raises:
        TypeError: as for `smc.twisted_smc`.
        ValueError: as for `smc.twisted_smc`, ranks that differ in an argument, or draw from one stream.
        RankFailed: one of the errors above, or of the model or the gain, on another rank.

    Source: [delmoral2006], [guarniero2017]; book, `smc-unbiased` and `resampling-over-ranks`.
    """
    with together(group) as said:
        _checks.generator("generator", generator)
        for name, number in (("length", length), ("n", n), ("runs", runs)):
            _checks.count(name, number)
        _checks.fraction("threshold", threshold, zero=True)
        _checks.instance("gain", gain, Gain)
        gain.check_length(length)
        models = [("model", model)] if proposal is None else [("model", model), ("proposal", proposal)]
        for name, one in models:
            _checks.instance(name, one, AutoregressiveModel)
        states = [one.begin(n * runs) for _, one in models]
        values = gain.values(states[0], n * runs)
        if not bool((values > -math.inf).all()):
            raise ValueError("log_values must be finite for the empty string, got -inf")
        _on_backend("log_values", values, group)
        said |= {"function": "twisted_smc", "length": int(length), "n": int(n), "runs": int(runs)}
        said |= {"threshold": float(threshold), "proposal": proposal is not None, "_stream": _stream(generator)}
    (rank, size), device = _place(group), values.device
    tokens = torch.empty(runs, n, 0, dtype=torch.int64, device=device)
    log_weights = torch.zeros(runs, n, dtype=torch.float64, device=device)
    log_partition, places = values[0].expand(runs), torch.arange(n, device=device) + rank * n
    stats, ancestors, sizes = _stats(log_weights, n * size, group), [], []
    for _ in range(length):
        # Equal weights may differ in their last digits; that is no reason to resample.
        uneven = ((0 < stats.ess) & (stats.ess < threshold * n * size * (1 - 1e-9)))[:, None]
        parents = places.expand(runs, n)
        if bool(uneven.any()):
            spent = torch.where(uneven, log_weights, 0.0)
            new = systematic(spent, tokens, values.view(runs, n), generator=generator, group=group)
            parents = torch.where(uneven, new.ancestors, parents)
            tokens = torch.where(uneven[..., None], new.particles[0], tokens)
            values = torch.where(uneven, new.particles[1], values.view(runs, n)).flatten()
            log_partition = log_partition + torch.where(uneven[:, 0], stats.log_mean, 0.0)
            log_weights = torch.where(uneven, 0.0, log_weights)
        with together(group):
            if bool((parents != places).any()):
                states = _continued([one for _, one in models], states, tokens, parents - rank * n)
            drawn = models[-1][1].draw(states[-1], generator=generator)
            gained = gain.earned(states[0], drawn)
            if proposal is not None:
                of_p, of_q = (
                    one.next_logps(s).gather(-1, drawn[:, None])[:, 0].double()
                    for (_, one), s in zip(models, states, strict=True)
                )
                gained = torch.where(of_q > -math.inf, gained + of_p - of_q, -math.inf)
            states = [one.append(s, drawn) for (_, one), s in zip(models, states, strict=True)]
            gained, values = gain.step(values, gained, states[0])
        log_weights = log_weights + gained.view(runs, n)
        tokens = torch.cat([tokens, drawn.view(runs, n, 1)], -1)
        stats = _stats(log_weights, n * size, group, dead=True)
        ancestors.append(parents)
        sizes.append(stats.ess)
    log_partition = log_partition + stats.log_mean
    return Particles(tokens, log_weights, log_partition, torch.stack(ancestors, 1), torch.stack(sizes, -1))


def _continued(models: list[AutoregressiveModel[Any]], states: list[Any], tokens: Tensor, parents: Tensor) -> list[Any]:
    """Continue the strings of local parents, or begin all again from their tokens where some came from elsewhere."""
    runs, n, _ = tokens.shape
    if bool(((parents >= 0) & (parents < n)).all()):
        index = (parents + n * torch.arange(runs, device=parents.device)[:, None]).flatten()
        return [model.take(state, index) for model, state in zip(models, states, strict=True)]
    states = [model.begin(runs * n) for model in models]
    for token in tokens.flatten(0, 1).unbind(-1):
        states = [model.append(state, token) for model, state in zip(models, states, strict=True)]
    return states
