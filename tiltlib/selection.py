"""Best-of-N, hard, soft and with exponential noise: the draw, and the exact law of what it returns, for every N.

Draw N candidates from a reference law p and keep one: the best (`best_of_n`), one with probability proportional to
w = exp(r / beta) (`soft_best_of_n`), or the best after each reward has received exponential noise of mean beta
(`exponential_best_of_n`). The `_law` functions give the law of the kept candidate without sampling; the `_stream`
functions keep one of arbitrarily many candidates in constant memory; `candidate_counts` replaces N draws by one
multinomial count vector.

All is computed in float64, whatever the dtype of the input. A temperature that is a tensor broadcasts against the batch
dimensions, one per row, as `weights.beta_for_ess` returns it.
"""

import math
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tiltlib import _checks, _numerics
from tiltlib.autoregressive import AutoregressiveModel, Gain

__all__ = [
    "Blockwise",
    "Streamed",
    "best_of_n",
    "best_of_n_law",
    "candidate_counts",
    "exponential_best_of_n",
    "exponential_best_of_n_law",
    "exponential_best_of_n_stream",
    "soft_best_of_n",
    "soft_best_of_n_blocks",
    "soft_best_of_n_draw",
    "soft_best_of_n_law",
    "soft_best_of_n_stream",
]

# exp(-s w) has underflowed past every digit of the answer once log(s w) exceeds log 43: e^-43 < 2^-53 / 100.
_LOG_43 = math.log(43.0)
# exp(-38) < 2^-53 / 2: what the integral over log s leaves out on the left, relative to the whole.
_LEFT_TAIL = 38.0


class Streamed(NamedTuple):
    """What `soft_best_of_n_stream` and `exponential_best_of_n_stream` return.

    Attributes:
        winner: The kept candidate, shape (...) or (..., L).
        log_mean_weight: Log of the mean of exp(reward / beta) over all candidates, shape (...). Its exponential is
            unbiased for Z, so itself it is below log Z on average. float64.
        n: Number of candidates per row.
    """

    winner: Tensor
    log_mean_weight: Tensor
    n: int


def _candidate_rewards(rewards: Tensor) -> Tensor:
    """Check rewards of candidates and return the largest of each row, kept as a dimension."""
    with _checks.together():
        _checks.rewards("rewards", rewards)
        top = rewards.amax(-1, keepdim=True)
        _checks.some_left("rewards", top)
        return top


def best_of_n(rewards: Tensor, *, generator: torch.Generator) -> Tensor:
    """Pick the candidate of the largest reward, ties broken uniformly over the tied candidates.

    Not differentiable. Cost O(N) per row.

    Args:
        rewards: Reward of each candidate, shape (..., N), floating; -inf excludes a candidate.
        generator: Source of randomness, on the device of `rewards`.

    Returns:
        Index of the chosen candidate, int64, shape (...).

    Raises:
        TypeError: `rewards` is not a floating tensor, or `generator` not a torch.Generator.
        ValueError: `rewards` has NaN, +inf, or a row that is all -inf.

    Source: [beirami2024]; book, `bon-law`.
    """
    with _checks.together():
        top = _candidate_rewards(rewards)
        _checks.generator("generator", generator)
        u = torch.rand(rewards.shape, generator=generator, device=rewards.device, dtype=torch.float64)
        return torch.where(rewards == top, u, -1.0).argmax(-1)


def soft_best_of_n(rewards: Tensor, beta: float | Tensor, *, generator: torch.Generator) -> Tensor:
    """Pick one candidate with probability proportional to exp(reward / beta).

        P(i) = exp(r_i / beta) / sum_j exp(r_j / beta)

    `weights.normalize(rewards / beta)` gives these probabilities. Not differentiable through the index. Cost O(N) per
    row.

    Args:
        rewards: Reward of each candidate, shape (..., N), floating; -inf excludes a candidate.
        beta: Temperature in reward units, > 0; small is greedy, large is uniform. A tensor broadcasts against the batch
            dimensions; several temperatures for one row choose from the same candidates.
        generator: Source of randomness, on the device of `rewards`.

    Returns:
        Index of the chosen candidate, int64, shape (...).

    Raises:
        TypeError: `rewards` is not a floating tensor, or `generator` not a torch.Generator.
        ValueError: `rewards` has NaN, +inf, or a row that is all -inf, or `beta` is not finite and > 0 or does not fit.

    Source: [verdun2025]; book, `soft-bon-law`.
    """
    with _checks.together():
        top = _candidate_rewards(rewards)
        _checks.positive_per_row("beta", beta, rewards.shape[:-1])
        _checks.generator("generator", generator)
        return _pick(_numerics.over(rewards.detach(), top.detach(), beta).exp_(), generator)[0]


def _pick(w: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Pick an index with probability proportional to float64 weights that are not all 0; also return their sum."""
    # In float32 the cumulative sum of a long row would distort single candidates by a relative 1e-2.
    cdf = w.cumsum(-1)
    total = cdf[..., -1:]
    u = torch.rand(total.shape, generator=generator, device=w.device, dtype=torch.float64)
    # u <= 1 - 2^-53, so u * total rounds to a number below total, and the search cannot run past the end.
    index = torch.searchsorted(cdf, u * total, right=True)
    return index.squeeze(-1), total.squeeze(-1)


def best_of_n_law(ref_logps: Tensor, rewards: Tensor, n: int) -> Tensor:
    """Compute the exact law of best-of-N, ties broken uniformly over the tied draws.

        P(y) = p(y) (F(y)^N - F-(y)^N) / (F(y) - F-(y)),    F = P_p(r <= r(y)), F- = P_p(r < r(y))

    Accurate to rounding for any N: powers are taken as exp(N log1p(-upper tail)). Differentiable in `ref_logps`, not in
    `rewards`. Cost O(K log K) per row.

    Args:
        ref_logps: Reference log-probabilities, shape (..., K), normalised.
        rewards: Finite reward of each outcome, shape (..., K).
        n: Number of candidates, >= 1.

    Returns:
        Log-probabilities of the kept candidate, shape (..., K), in the dtype of `ref_logps`.

    Raises:
        TypeError: a tensor is not floating, or `n` is not an int.
        ValueError: `ref_logps` not normalised, `rewards` not finite where the reference has mass, `n` < 1, or shapes
            that do not fit.

    Source: [beirami2024]; book, `bon-law`.
    """
    ref, supported = _finite_n_inputs(ref_logps, rewards, n)
    if n == 1:
        return ref.to(ref_logps.dtype)
    sorted_rewards, order = supported.detach().sort(-1)
    rises = sorted_rewards[..., 1:] > sorted_rewards[..., :-1]
    level = torch.cat([torch.zeros_like(order[..., :1]), rises.long().cumsum(-1)], -1)
    log_mass = _log_mass_per_level(ref.gather(-1, order), level)
    mass, log_below = log_mass.exp(), torch.logcumsumexp(log_mass, -1)
    # Sum from whichever end is nearer, so that log F keeps its digits near 1: N log F is what matters for large N.
    # Adding up what lies strictly above, not subtracting the level from a total, which would cancel.
    above = torch.cat([mass[..., 1:].flip(-1).cumsum(-1).flip(-1), torch.zeros_like(mass[..., :1])], -1)
    log_f = torch.where(above < 0.5, torch.log1p(-above.clamp(max=0.5)), log_below)
    share = (log_mass - log_below).exp()
    # log (F^N - F-^N) / (F - F-), with F- = F (1 - share); a share that underflows takes the limit N F^(N-1), and the
    # lowest level, whose share is 1, has F-^N = 0. Both are masked at the input too, where gradients would be NaN.
    many = float(n)  # whole numbers above 2^63 do not fit a tensor
    inner = torch.where((share > 1e-290) & (share < 1), share, 0.5)
    log_gain = torch.where(share < 1, torch.log(-torch.expm1(many * torch.log1p(-inner))), 0)
    log_ratio = many * log_f + log_gain - log_mass
    log_ratio = torch.where(share > 1e-290, log_ratio, math.log(n) + (many - 1) * log_f)
    per_outcome = torch.empty_like(ref).scatter(-1, order, log_ratio.gather(-1, level))
    law = torch.where(ref > -math.inf, ref + per_outcome, -math.inf)
    return law.to(ref_logps.dtype)


def _log_mass_per_level(logps: Tensor, level: Tensor) -> Tensor:
    """Sum probabilities over each level in log space, so that a level of e^-800 keeps its mass."""
    peak = torch.full_like(logps, -math.inf).scatter_reduce(-1, level, logps.detach(), "amax")
    sums = torch.zeros_like(logps).scatter_add(-1, level, (logps - peak.gather(-1, level)).exp())
    # Where a level has outcomes the sum is at least 1, the term of the peak. The others stay at -inf, without a log 0.
    return peak + sums.clamp(min=1).log()


def _finite_n_inputs(ref_logps: Tensor, rewards: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """Check the inputs of a finite-N law; return them broadcast, float64, unsupported rewards moved to the lowest."""
    with _checks.together():
        _checks.logps("ref_logps", ref_logps)
        _checks.rewards("rewards", rewards)
        _checks.same_outcomes("ref_logps", ref_logps, "rewards", rewards)
        _checks.count("n", n)
        ref, r = torch.broadcast_tensors(ref_logps.double(), rewards.double())
        on_support = ref > -math.inf
        _checks.holds(
            ~(on_support & (r == -math.inf)),
            lambda: ValueError(
                "rewards must be finite where the reference has mass, got -inf: all N candidates may be excluded at "
                "once, and then nothing is returned; condition the reference on the allowed outcomes instead"
            ),
        )
        lowest = torch.where(on_support, r, math.inf).amin(-1, keepdim=True)
        return torch.log_softmax(ref, -1), torch.where(on_support, r, lowest)


def soft_best_of_n_law(ref_logps: Tensor, rewards: Tensor, beta: float | Tensor, n: int) -> Tensor:
    """Compute the exact law of soft best-of-N, for any N.

        P_N(y) = N p(y) w(y) int_0^inf exp(-s w(y)) M(s)^(N-1) ds,    M(s) = sum_k p_k exp(-s w_k),  w = exp(r / beta)

    With s = e^t the trapezoid rule of step 1/4 has a relative quadrature error below 1e-15 for every N, p, w and y
    (book, `soft-bon-quadrature`); rounding adds about 1e-14. All terms are positive, so nothing cancels. Not
    differentiable: the result carries no graph. Cost at most 4 (log N + R + 42) exponentials per distinct reward, R the
    range of r / beta; far less for large N.

    Args:
        ref_logps: Reference log-probabilities, shape (..., K), normalised.
        rewards: Finite reward of each outcome, shape (..., K).
        beta: Temperature in reward units, > 0. The range of rewards / beta over the support must not exceed 600. A
            tensor broadcasts against the batch dimensions.
        n: Number of candidates, >= 1; checked up to 10^12.

    Returns:
        Log-probabilities of the kept candidate, shape (..., K), in the dtype of `ref_logps`.

    Raises:
        TypeError: a tensor is not floating, or `n` is not an int.
        ValueError: `ref_logps` not normalised, `rewards` not finite where the reference has mass, `n` < 1, `beta` not
            finite and > 0 or so small that rewards / beta spans more than 600, or shapes that do not fit.

    Source: [verdun2025] for the method; the exact law is derived in the book, `soft-bon-law`.
    """
    with _checks.together():
        ref, supported = _finite_n_inputs(ref_logps, rewards, n)
        _checks.positive_per_row("beta", beta, ref.shape[:-1])
        log_w = _log_w(supported, beta)
        spread = -log_w.amin(-1)

        def error(low: float, high: float) -> ValueError:
            worst = int(spread.argmax())
            widest = (supported.amax(-1) - supported.amin(-1)).expand(spread.shape).flatten()[worst].item()
            coldest = beta.expand(spread.shape).flatten()[worst].item() if isinstance(beta, Tensor) else beta
            return ValueError(
                f"beta must be at least (max reward - min reward) / 600, got {coldest} for a range of {widest:.6g}; "
                "use best_of_n_law for the limit beta to 0"
            )

        # exp(-700) leaves float64; the limit beta to 0 is `best_of_n_law`
        _checks.require(spread, -math.inf, 600, error)
    return _soft_law(ref, log_w, n).to(ref_logps.dtype)


def _log_w(supported: Tensor, beta: float | Tensor) -> Tensor:
    """Compute log weights whose largest of each row is 0."""
    return _numerics.over(supported, supported.amax(-1, keepdim=True), beta)


def _soft_law(ref: Tensor, log_w: Tensor, n: int) -> Tensor:
    """Compute the law for a normalised reference and log weights in [-600, 0], both float64, whose largest is 0."""
    ref, log_w = torch.broadcast_tensors(ref.detach(), log_w.detach())
    if n == 1 or not ref.numel():
        return ref.clone()
    rows = ref.reshape(-1, ref.shape[-1])
    # Outcomes of equal weight share one integral; adding their mass changes nothing else.
    ascending, order = log_w.reshape(rows.shape).sort(-1)
    level = torch.nn.functional.pad((ascending.diff(dim=-1) > 0).long().cumsum(-1), (1, 0))
    # Rows of fewer levels than others get levels of mass 0.
    levels = rows.new_zeros(len(rows), int(level.max()) + 1).scatter_(-1, level, ascending)
    level = torch.empty_like(level).scatter_(-1, order, level)
    mass = torch.zeros_like(levels).scatter_add_(-1, level, rows.exp())
    return (rows + _log_selection_ratio(mass, levels, n).gather(-1, level)).view(ref.shape)


# exp(-s w) is a polynomial of this degree to rounding where s w <= 1/16: 16^-10 / 10! is left out.
_SMALL, _DEGREE = 1 / 16, 9
# Numbers that an array of exponentials may hold to stay in a cache.
_NUMBERS = 2**17


def _log_selection_ratio(mass: Tensor, log_w: Tensor, n: int) -> Tensor:
    """Compute log(P_N / p) = log(N w int e^{-s w} M(s)^{N-1} ds) on weight levels (rows, K) whose largest is 0.

    Trapezoid rule in t = log s, on nodes that all rows share. Two savings change no digit: a block of nodes is skipped
    where N s M(s)^(N-1) is below e^-45 throughout (the whole integral is at least 1), and for s <= 1/16 moments of w
    replace exponentials.
    """
    h, log_n = 0.25, math.log(n)
    w, start = log_w.exp(), -log_n - _LEFT_TAIL
    count = math.ceil((-log_w.min().item() + _LOG_43 - start) / h)
    # start + h * integers, h a power of two: adding h repeatedly would accumulate rounding.
    t = start + h * torch.arange(count, device=w.device, dtype=torch.float64)
    few = min(count, math.floor((math.log(_SMALL) - start) / h) + 1)
    s = t[:few].exp()
    moments, term = [], mass
    for j in range(1, _DEGREE + 1):
        term = term * w / -j
        moments.append(term.sum(-1))
    powers = s ** torch.arange(_DEGREE + 1, device=w.device)[:, None]
    log_laplace = torch.log1p(torch.stack(moments, -1) @ powers[1:])
    log_node = t[:few] + (n - 1.0) * log_laplace
    peak = log_node.amax(-1, keepdim=True)
    # sum_i node_i e^{-s_i w} = sum_j (-w)^j / j! sum_i node_i s_i^j, by Horner's rule.
    sums = (log_node - peak).exp_() @ powers.T
    total = sums[:, _DEGREE:].expand_as(w)
    for j in range(_DEGREE, 0, -1):
        total = total * w / -j + sums[:, j - 1 : j]
    # M decreases: what it was at the last node that was computed bounds it from there on.
    highest = log_laplace[:, -1]
    size = min(max(_NUMBERS // w.numel(), 16), 64)
    for block in t[few:].split(size):
        active = (log_n + block[-1] + (n - 1.0) * highest > -45.0).nonzero()[:, 0]
        for rows in active.split(max(1, _NUMBERS // (size * w.shape[-1]))) if len(active) else ():
            row = peak[rows], total[rows]
            peak[rows], total[rows], highest[rows] = _with_nodes(block, mass[rows], w[rows], n, *row)
    return log_w + total.log() + peak + math.log(h * n)


def _with_nodes(
    t: Tensor, mass: Tensor, w: Tensor, n: int, peak: Tensor, total: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Add nodes to sums that are kept as exp(peak) total; return both, and log M at the last node."""
    for nodes in t.split(max(1, _NUMBERS // w.numel())):
        sw = nodes.exp()[:, None] * w[:, None]
        decay = torch.exp(-sw)
        laplace = (decay @ mass[..., None])[..., 0]
        log_laplace = laplace.log()
        if bool((near_one := laplace > 0.5).any()):  # there 1 - M carries the digits, and expm1 keeps them
            gap = (torch.expm1(sw.neg_()) @ mass[..., None])[..., 0]
            log_laplace = torch.where(near_one, torch.log1p(gap), log_laplace)
        log_node = nodes + (n - 1.0) * log_laplace
        top = torch.maximum(peak, log_node.amax(-1, keepdim=True))
        total = total * (peak - top).exp() + ((log_node - top).exp()[:, None] @ decay)[:, 0]
        peak = top
    return peak, total, log_laplace[:, -1]


class Blockwise(NamedTuple):
    """What `soft_best_of_n_blocks` returns.

    Attributes:
        tokens: Strings, int64, shape (strings, L).
        alive: Whether at each block some candidate was not excluded, bool, shape (strings,). Where none was left, one
            was kept by chance.
    """

    tokens: Tensor
    alive: Tensor


@torch.no_grad()
def soft_best_of_n_blocks(
    model: AutoregressiveModel[Any],
    gain: Gain,
    length: int,
    n: int,
    *,
    generator: torch.Generator,
    block: int = 1,
    strings: int = 1,
) -> Blockwise:
    """Write strings block by block: draw n candidates for the next block, keep one by what it earned and promises.

        P(keep i) proportional to exp(sum of log_tilt over the block + V after it)

    One block of L tokens is soft best-of-N of whole strings. Blocks of one token on a Markov chain follow
    `stepwise.soft_best_of_n_chain`. With the exact V the law tends to the tilt as n grows, whatever the block; with
    another V it tends to another law. Not differentiable. Cost n L tokens per string.

    Args:
        model: Model of the strings.
        gain: What the strings are worth, such as `smc.by_value(...)` or `stepwise.gain(...)`.
        length: Number of tokens L, >= 1.
        n: Number of candidates for each block, >= 1.
        generator: Source of randomness, on the device of the model.
        block: Number of tokens in a block, >= 1; the last block is what remains.
        strings: Number of strings to write, each with candidates of its own, >= 1.

    Returns:
        `Blockwise(tokens, alive)`.

    Raises:
        TypeError: `model` is no `AutoregressiveModel`, `gain` no `Gain`, a number that is not an int, or `generator` no
            generator.
        ValueError: a number below 1, `length` not that of the gain, or a gain that returns another shape, NaN or +inf.

    Source: [mudgal2024]; book, `blockwise-gap`.
    """
    _checks.instance("model", model, AutoregressiveModel)
    _checks.instance("gain", gain, Gain)
    _checks.generator("generator", generator)
    for name, number in (("length", length), ("n", n), ("block", block), ("strings", strings)):
        _checks.count(name, number)
    gain.check_length(length)
    n, strings = int(n), int(strings)
    state = model.begin(strings)
    values = gain.values(state, strings)
    alive = torch.ones_like(values, dtype=torch.bool)
    kept = torch.arange(strings, device=values.device)
    first, written = n * kept, []
    for done in range(0, length, block):
        candidates = kept.repeat_interleave(n)
        state, values = model.take(state, candidates), values[candidates]
        scores, drawn = torch.zeros_like(values), []
        for _ in range(min(block, length - done)):
            drawn.append(model.draw(state, generator=generator))
            earned = gain.earned(state, drawn[-1])
            state = model.append(state, drawn[-1])
            gained, values = gain.step(values, earned, state)
            scores = scores + gained
        of_each = scores.view(strings, n)
        possible = (of_each > -math.inf).any(-1)
        alive = alive & possible
        kept = first + soft_best_of_n(torch.where(possible[:, None], of_each, 0.0), 1.0, generator=generator)
        written.append(torch.stack(drawn, -1)[kept])
    return Blockwise(torch.cat(written, -1), alive)


def candidate_counts(ref_logps: Tensor, n: int, *, generator: torch.Generator) -> Tensor:
    """Draw how often each outcome occurs among N candidates, without drawing the candidates.

        counts ~ Multinomial(N, p), as c_k ~ Binomial(N - c_1 - ... - c_{k-1}, p_k / (p_k + ... + p_K))

    Selection looks at candidates only through their outcomes, so counts are all it needs. Cost O(K) binomials per row,
    whatever N: worth it for N well above K. Not differentiable.

    Args:
        ref_logps: Reference log-probabilities, shape (..., K), normalised. Expand it for several rows.
        n: Number of candidates per row, >= 1.
        generator: Source of randomness, on the device of `ref_logps`.

    Returns:
        Counts, float64, shape (..., K), each row summing to `n`; whole numbers up to 2^53, rounded above.

    Raises:
        TypeError: `ref_logps` is not a floating tensor, `n` not an int, or `generator` not a torch.Generator.
        ValueError: `ref_logps` not normalised, or `n` < 1.

    Source: [devroye1986], chapter 11.
    """
    _checks.logps("ref_logps", ref_logps)
    _checks.count("n", n)
    _checks.generator("generator", generator)
    return _counts(ref_logps, n, generator)


def _counts(ref_logps: Tensor, n: int, generator: torch.Generator) -> Tensor:
    probs = ref_logps.detach().double().exp()
    tail = probs.flip(-1).cumsum(-1).flip(-1)
    # Nothing lies behind the last outcome that has mass, so its share is exactly 1 and it takes what is left.
    share = torch.where(tail > 0, probs / tail, 0).unbind(-1)
    left = torch.full(probs.shape[:-1], float(n), dtype=torch.float64, device=probs.device)
    counts = []
    for p in share:
        c = torch.binomial(left, p.contiguous(), generator=generator)
        counts.append(c)
        left = left - c
    return torch.stack(counts, -1)


def soft_best_of_n_draw(
    ref_logps: Tensor, rewards: Tensor, beta: float | Tensor, n: int, *, generator: torch.Generator
) -> Tensor:
    """Draw one soft best-of-N outcome per row from a categorical reference, in time that does not grow with N.

        P(y | counts c) = c_y w_y / sum_k c_k w_k,    c = candidate_counts(p, N)

    The law of the outcome is `soft_best_of_n_law`.

    Args:
        ref_logps: Reference log-probabilities, shape (..., K), normalised. Expand it for several rows.
        rewards: Reward of each outcome, shape (..., K), finite where the reference has mass.
        beta: Temperature in reward units, > 0. A tensor broadcasts against the batch dimensions.
        n: Number of candidates, >= 1.
        generator: Source of randomness, on the device of the tensors.

    Returns:
        Outcome index, int64, shape (...).

    Raises:
        TypeError: a tensor is not floating, `n` not an int, or `generator` not a torch.Generator.
        ValueError: as for `soft_best_of_n_law`, except that any `beta` > 0 will do.

    Source: book, `soft-bon-law`.
    """
    with _checks.together():
        ref, supported = _finite_n_inputs(ref_logps, rewards, n)
        _checks.positive_per_row("beta", beta, ref.shape[:-1])
    _checks.generator("generator", generator)
    if isinstance(beta, Tensor):  # candidates of their own for each temperature
        ref = ref.expand(*torch.broadcast_shapes(ref.shape[:-1], beta.shape), -1)
    counts = _counts(ref, n, generator)
    drawn = torch.where(counts > 0, supported.detach(), -math.inf)
    return _pick(counts * _log_w(drawn, beta).exp(), generator)[0]


def soft_best_of_n_stream(
    chunks: Iterable[tuple[Tensor, Tensor]], beta: float | Tensor, *, generator: torch.Generator
) -> Streamed:
    """Keep one of arbitrarily many candidates by soft best-of-N, chunk by chunk, in constant memory.

    Per chunk one candidate is picked with probability proportional to w; it replaces the winner so far with probability
    (weight of the chunk) / (weight of all candidates so far). After every chunk the winner is a soft best-of-N choice
    among all candidates seen. Chunks of about 2^17 rewards, rows times columns, are fastest. Not differentiable in the
    rewards: what is carried from chunk to chunk has no graph.

    Args:
        chunks: Pairs `(candidates, rewards)`. `rewards` has shape (..., C), floating, -inf excludes; C may differ from
            chunk to chunk. `candidates` has shape (..., C) or (..., C, L), any dtype.
        beta: Temperature in reward units, > 0. A tensor broadcasts to the batch dimensions of the rewards.
        generator: Source of randomness, on the device of the tensors.

    Returns:
        `Streamed(winner, log_mean_weight, n)`: the kept candidate, shape (...) or (..., L); the log of the mean weight
        over all n candidates, an estimate of log Z, float64, shape (...), infinite where rewards / beta leaves float64;
        and n per row.

    Raises:
        TypeError: rewards that are not a floating tensor, or `generator` not a torch.Generator.
        ValueError: no chunk, shapes that do not fit, rewards with NaN or +inf, a row without any finite reward, or
            `beta` not finite and > 0.

    Example:
        >>> g = torch.Generator().manual_seed(0)
        >>> batches = (torch.randn(3, 1000, generator=g) for _ in range(50))  # of candidates that are their own rewards
        >>> best = soft_best_of_n_stream(((y, y) for y in batches), beta=0.5, generator=g)
        >>> best.winner.shape, best.n
        (torch.Size([3]), 50000)

    Source: [chao1982] for one-pass weighted choice; book, `soft-bon-law`.
    """
    if isinstance(beta, Tensor):
        beta = beta.detach()
    _checks.positive_per_row("beta", beta, torch.Size())  # its shape is judged with each chunk
    _checks.generator("generator", generator)
    # The winner, log of the sum of exp((reward - peak) / beta), and the peak, the largest reward, shape (..., 1).
    so_far: tuple[Tensor, Tensor, Tensor] | None = None
    n = 0
    for candidates, rewards in _checked_chunks(chunks, beta):
        top = rewards.amax(-1, keepdim=True).double()
        index, total = _pick(_below(rewards, top, beta).exp_(), generator)
        index = index % rewards.shape[-1]  # a chunk of weight 0 ends the search past its last entry
        picked, log_chunk = _take(candidates, index), total.log()
        if so_far is None:
            so_far = picked, log_chunk, top
        else:
            winner, log_total, peak = so_far
            higher = torch.maximum(peak, top)
            log_total = log_total + _below(peak, higher, beta).squeeze(-1)
            log_chunk = log_chunk + _below(top, higher, beta).squeeze(-1)
            both = torch.logaddexp(log_total, log_chunk)
            u = torch.rand(both.shape, generator=generator, device=both.device, dtype=torch.float64)
            replace = u < (log_chunk - both).exp()  # NaN where nothing has weight yet: False
            so_far = _replaced(winner, picked, replace), both, higher
        n += rewards.shape[-1]
    assert so_far is not None  # no chunk is refused
    return _streamed(*so_far, beta, n)


def _checked_chunks(chunks: Iterable[tuple[Tensor, Tensor]], beta: float | Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Check each chunk by itself and against the first; give its candidates, and its rewards without their graph."""
    first: tuple[torch.Size, torch.Size] | None = None
    for candidates, rewards in chunks:
        _checks.tensor("rewards", rewards)
        if not isinstance(candidates, Tensor):
            raise TypeError(f"candidates must be a torch.Tensor, got {_checks.described(candidates)}")
        if candidates.shape[: rewards.ndim] != rewards.shape:
            raise ValueError(
                f"candidates must have the shape of rewards, then any event dimensions, "
                f"got {tuple(candidates.shape)} and {tuple(rewards.shape)}"
            )
        batch, event = first = first or (rewards.shape[:-1], candidates.shape[rewards.ndim :])
        if rewards.shape[:-1] != batch:
            raise ValueError(
                f"rewards must keep the batch shape {tuple(batch)} of the first chunk, got shape {tuple(rewards.shape)}"
            )
        if candidates.shape[rewards.ndim :] != event:
            raise ValueError(
                f"candidates must keep the event shape {tuple(event)} of the first chunk, "
                f"got {tuple(candidates.shape[rewards.ndim :])}"
            )
        if isinstance(beta, Tensor):
            _checks.fits("beta", beta, rewards[..., 0])
        _checks.rewards("rewards", rewards)
        yield candidates, rewards.detach()
    if first is None:
        raise ValueError("chunks must hold at least one pair (candidates, rewards), got none")


def _below(rewards: Tensor, top: Tensor, beta: float | Tensor) -> Tensor:
    """Compute (rewards - top) / beta, which is -inf where all rewards so far are, top among them."""
    return _numerics.over(rewards, torch.where(top > -math.inf, top, 0), beta)


def _take(candidates: Tensor, index: Tensor) -> Tensor:
    """Take one candidate of each row, with its event dimensions."""
    where = index.reshape(index.shape + (1,) * (candidates.ndim - index.ndim))
    return torch.take_along_dim(candidates, where, index.ndim).squeeze(index.ndim)


def _replaced(winner: Tensor, picked: Tensor, replace: Tensor) -> Tensor:
    """Replace the winner in some rows."""
    return torch.where(replace.reshape(replace.shape + (1,) * (picked.ndim - replace.ndim)), picked, winner)


def _streamed(winner: Tensor, log_total: Tensor, peak: Tensor, beta: float | Tensor, n: int) -> Streamed:
    """Give the result of a stream whose weights, relative to the largest reward, have this sum."""
    _checks.some_left("rewards", log_total)
    return Streamed(winner, log_total + peak.squeeze(-1) / _numerics.double(beta) - math.log(n), n)


def exponential_best_of_n(rewards: Tensor, beta: float | Tensor, *, generator: torch.Generator) -> Tensor:
    """Pick the candidate whose reward is largest after exponential noise of mean beta was added to each.

        argmax_i r_i + beta E_i,    E_i ~ Exp(1), independent for every candidate, repeated answers included

    The law of the kept outcome is at least as near to the tilt as that of `soft_best_of_n`, at every N. If the rewards
    are bounded its total variation from the tilt falls exponentially in N, and the bound need not be known. (Gumbel
    noise in place of E is soft best-of-N.) Not differentiable. Cost O(N) per row.

    Args:
        rewards: Reward of each candidate, shape (..., N), floating; -inf excludes a candidate.
        beta: Temperature in reward units, > 0; small is greedy, large is uniform. A tensor broadcasts against the batch
            dimensions; several temperatures for one row choose from the same candidates, each with noise of its own.
        generator: Source of randomness, on the device of `rewards`.

    Returns:
        Index of the chosen candidate, int64, shape (...).

    Raises:
        TypeError: `rewards` is not a floating tensor, or `generator` not a torch.Generator.
        ValueError: `rewards` has NaN, +inf, or a row that is all -inf, or `beta` is not finite and > 0 or does not fit.

    Source: [mckenna2020] and [ding2021] for the rule; book, `exponential-noise` and `exponential-noise-nearer`.
    """
    with _checks.together():
        top = _candidate_rewards(rewards)
        _checks.positive_per_row("beta", beta, rewards.shape[:-1])
        _checks.generator("generator", generator)
        keys = _add_exponential(_numerics.over(rewards.detach(), top.detach(), beta), generator)
        return keys.max(-1).indices  # in half the time of argmax


def _add_exponential(keys: Tensor, generator: torch.Generator) -> Tensor:
    """Add Exp(1) noise to float64 keys, in place, by inverting its distribution function."""
    # 1 - u is exact and never 0, so the noise is finite, and an excluded candidate stays at -inf.
    u = torch.rand(keys.shape, generator=generator, device=keys.device, dtype=torch.float64)
    return keys.sub_(u.neg_().add_(1).log_())


def exponential_best_of_n_law(ref_logps: Tensor, rewards: Tensor, beta: float | Tensor, n: int) -> Tensor:
    """Compute the exact law of best-of-N with exponential noise, for any N.

        X_N(y) = N p(y) w(y) int_0^{1/w(y)} u(v)^(N-1) dv,    u(v) = sum_k p_k (1 - w_k v)_+,  w = exp(r / beta)

    On a finite set u is linear between the numbers 1 / w_k, so the integral is a sum of differences of u^N, all of one
    sign. Only ratios of weights enter, so no range of rewards / beta is too wide; the limit beta to 0 is
    `best_of_n_law`. Not differentiable: the result carries no graph. Cost O(K log K) per row, whatever N.

    Args:
        ref_logps: Reference log-probabilities, shape (..., K), normalised.
        rewards: Finite reward of each outcome, shape (..., K).
        beta: Temperature in reward units, > 0. A tensor broadcasts against the batch dimensions.
        n: Number of candidates, >= 1; checked up to 10^12.

    Returns:
        Log-probabilities of the kept candidate, shape (..., K), in the dtype of `ref_logps`.

    Raises:
        TypeError: a tensor is not floating, or `n` is not an int.
        ValueError: `ref_logps` not normalised, `rewards` not finite where the reference has mass, `n` < 1, `beta` not
            finite and > 0, or shapes that do not fit.

    Source: [ding2021] for the rule; the law over fresh candidates is derived in the book, `exponential-noise`.
    """
    with _checks.together():
        ref, supported = _finite_n_inputs(ref_logps, rewards, n)
        _checks.positive_per_row("beta", beta, ref.shape[:-1])
    r, order = supported.detach().sort(-1)
    # log (w_k / w_{k+1}), from the lowest reward to the highest.
    gaps = _numerics.over(r[..., :-1], r[..., 1:], beta).detach()
    order, p = (x.expand(*gaps.shape[:-1], -1) for x in (order, ref.detach().gather(-1, order)))
    # Segment k is 1 / w_{k+1} < v < 1 / w_k, and 0 < v < 1 / w_k for the highest. There u falls at the slope
    # sum_{j <= k} p_j w_j, written as w_k times the following; of equal rewards all but the last have length 0.
    log_slope = _carried(p, gaps)
    length = torch.cat([-torch.expm1(gaps), torch.ones_like(p[..., :1])], -1)
    log_fall = log_slope + length.log()
    # u at the left end of each segment, from whichever side is nearer: N log u needs the digits of 1 - u near 1, and
    # its own near 0. Both are sums of what lies on one side; a difference would lose a rare best.
    above = torch.cat([p[..., 1:].exp().flip(-1).cumsum(-1).flip(-1), torch.zeros_like(p[..., :1])], -1)
    gone = above + torch.cat([(log_slope[..., :-1] + gaps).exp(), torch.zeros_like(p[..., :1])], -1)
    log_u = torch.where(gone < 0.5, torch.log1p(-gone), _carried(log_fall, torch.zeros_like(gaps)))
    # w_k times N int u^(N-1) over segment k, which is (u^N at its left end - u^N at its right end) / slope.
    share = (log_fall - log_u).exp().clamp(max=1)
    many = float(n)  # whole numbers above 2^63 do not fit a tensor
    log_piece = many * log_u + torch.log(-torch.expm1(many * torch.log1p(-share))) - log_slope
    log_piece = torch.where(length > 0, log_piece, -math.inf)
    # w_k times the sum over all segments up to 1 / w_k.
    log_ratio = _carried(log_piece.flip(-1), gaps.flip(-1)).flip(-1)
    law = torch.empty_like(p).scatter(-1, order, p + log_ratio)
    return law.to(ref_logps.dtype)


def _carried(log_terms: Tensor, gaps: Tensor) -> Tensor:
    """Compute log sum_{j <= k} exp(log_terms_j + gaps_j + ... + gaps_{k-1}) for each k, by doubling, in log K steps."""
    step = 1
    while step < log_terms.shape[-1]:  # all terms up to `step` places away are in, and gaps reach as far
        from_below = log_terms[..., :-step] + gaps
        log_terms = torch.cat([log_terms[..., :step], torch.logaddexp(log_terms[..., step:], from_below)], -1)
        gaps = gaps[..., :-step] + gaps[..., step:]
        step *= 2
    return log_terms


def exponential_best_of_n_stream(
    chunks: Iterable[tuple[Tensor, Tensor]], beta: float | Tensor, *, generator: torch.Generator
) -> Streamed:
    """Keep one of arbitrarily many candidates by best-of-N with exponential noise, in one pass and constant memory.

    Each candidate gets the key r + beta E, E ~ Exp(1), once; the largest key so far is kept. After every chunk the
    winner is an `exponential_best_of_n` choice among all candidates seen. Chunks of about 2^17 rewards, rows times
    columns, are fastest. Not differentiable in the rewards: what is carried from chunk to chunk has no graph.

    Args:
        chunks: Pairs `(candidates, rewards)`. `rewards` has shape (..., C), floating, -inf excludes; C may differ from
            chunk to chunk. `candidates` has shape (..., C) or (..., C, L), any dtype.
        beta: Temperature in reward units, > 0. A tensor broadcasts to the batch dimensions of the rewards.
        generator: Source of randomness, on the device of the tensors.

    Returns:
        `Streamed(winner, log_mean_weight, n)`, as from `soft_best_of_n_stream`.

    Raises:
        TypeError: rewards that are not a floating tensor, or `generator` not a torch.Generator.
        ValueError: no chunk, shapes that do not fit, rewards with NaN or +inf, a row without any finite reward, or
            `beta` not finite and > 0.

    Source: [ding2021]; book, `exponential-noise`.
    """
    if isinstance(beta, Tensor):
        beta = beta.detach()
    _checks.positive_per_row("beta", beta, torch.Size())  # its shape is judged with each chunk
    _checks.generator("generator", generator)
    # The winner, log of the sum of exp((reward - peak) / beta), the peak, the largest reward, shape (..., 1), and the
    # key of the winner, (reward - peak) / beta + E.
    so_far: tuple[Tensor, Tensor, Tensor, Tensor] | None = None
    n = 0
    for candidates, rewards in _checked_chunks(chunks, beta):
        top = rewards.amax(-1, keepdim=True).double()
        log_w = _below(rewards, top, beta)
        log_chunk = log_w.logsumexp(-1)
        key, index = _add_exponential(log_w, generator).max(-1)
        picked = _take(candidates, index)
        if so_far is None:
            so_far = picked, log_chunk, top, key
        else:
            winner, log_total, peak, best = so_far
            higher = torch.maximum(peak, top)
            before, now = (_below(x, higher, beta).squeeze(-1) for x in (peak, top))
            log_total = torch.logaddexp(log_total + before, log_chunk + now)
            best, key = best + before, key + now
            so_far = _replaced(winner, picked, key > best), log_total, higher, torch.maximum(best, key)
        n += rewards.shape[-1]
    assert so_far is not None  # no chunk is refused
    return _streamed(*so_far[:3], beta, n)
