"""Evidence that samples follow a law, and that wrong laws are told apart from it.

A check returns a `Verdict`; `report` prints it as one line and raises unless it passed; `falsify` runs the same check
on a wrong law and raises unless that was rejected. Five kinds of check, and a note:

    match     samples follow the target law          E-value on counts; false alarm <= alpha by Markov's inequality
    mean      bounded values have the stated mean    E-value of bets on the values; the same error probabilities
    within    the sampler's law is within eps in TV  confidence bound; false pass <= delta
    exact     computed numbers agree                 no sampling, so no error probability
    bound     an inequality holds on all instances   computed numbers; delta if a confidence bound is among them
    observed  a number stayed below a limit          a limit set after looking: reported, never counted as a claim

`plan` and `plan_mean` say how many samples make the rejection of a declared wrong law or mean certain up to a stated
probability. The theory is in the book, "Verifying".
"""

import dataclasses
import hashlib
import math
import sys
from collections.abc import Callable, Sequence
from numbers import Real
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import brentq, minimize_scalar
from scipy.special import betaincinv, gammaln
from scipy.stats import ncx2
from torch import Tensor

from tiltlib import _checks

__all__ = [
    "ClaimFailed",
    "Verdict",
    "bound",
    "exact",
    "falsify",
    "log_e_value",
    "match",
    "match_counts",
    "mean",
    "observed",
    "plan",
    "plan_mean",
    "report",
    "rng",
    "tv_upper_bound",
    "within",
]

Floats = NDArray[np.float64]
_Declared = TypeVar("_Declared", float, Tensor)
LogLaw = Tensor | Callable[[Tensor], Tensor]

# Concentrations of the Dirichlet mixture in units of n: from "nearly any other law" to "a law very near the target".
_GRID = np.array([1 / 64, 1 / 16, 1 / 4, 1, 4, 16, 64, 256])
# A wrong value counts as a near miss that was really told apart only when it misses by this many tolerances.
_CLEAR_MISS = 100

# Claim id -> where it was reported, and in which run of a notebook cell.
_reported: dict[str, tuple[str, int, int | None]] = {}


class ClaimFailed(AssertionError):
    """A claim was not confirmed, or a falsifier was not rejected."""


@dataclasses.dataclass(frozen=True)
class Verdict:
    """Outcome of one check.

    `decision` is PASS, REJECT or INCONCLUSIVE (too few samples for the stated power, or a bound that straddles eps),
    or NOTE for an observation that came out as described. The verdict is true only for PASS and NOTE. `declared` counts
    the wrong laws or means of `versus`, `delta` is the chance that a confidence bound is false. Fields that a kind of
    check does not have are None.
    """

    claim: str
    kind: str
    decision: str
    n: int
    plan: int | None = None
    declared: int | None = None
    alpha: float | None = None
    miss: float | None = None
    log10_e: float | None = None
    tv_lo: float | None = None
    tv_hi: float | None = None
    eps: float | None = None
    delta: float | None = None
    error: float | None = None
    method: str = ""

    def __bool__(self) -> bool:
        return self.decision in ("PASS", "NOTE")

    def line(self) -> str:
        """Format the verdict as one line of fields that are the same on every machine."""
        fields = [f"n={self.n}"]
        expected = "!" in self.claim
        if self.kind in ("match", "mean"):
            assert self.log10_e is not None and self.alpha is not None
            evidence = f"log10E={_floor(self.log10_e)}", f"reject_at={math.ceil(-math.log10(self.alpha) - 1e-9)}"
            planned = [] if self.plan is None else [f"plan={self.plan}"]
            planned += [] if not self.declared else [f"declared={self.declared}"]
            power = [] if self.plan is None else [f"power=1-{_digit(self.miss)}"]
            fields += evidence if expected else [*planned, *evidence, *power, f"alpha={_digit(self.alpha)}"]
        elif self.kind == "within":
            assert self.tv_lo is not None and self.tv_hi is not None
            low, high = _two_digits(self.tv_lo, up=False), _two_digits(self.tv_hi, up=True)
            fields += [f"tv_lo={low}" if expected else f"plan={self.plan}  tv_hi={high}"]
            fields += [f"eps={self.eps:g}", f"delta={_digit(self.delta)}", f"tier={self.method}"]
        elif self.kind == "exact":
            error = [f"error={self.error:.1e}"] if expected else []
            fields += [*error, f"eps={_digit(self.eps)}"]
        elif expected:
            fields += [f"excess={self.error:.1e}"]
        elif self.kind == "observed":
            fields += [] if self.eps is None else [f"limit={self.eps:g}"]
        elif self.delta is not None:
            fields += [f"delta={_digit(self.delta)}"]
        line = "  ".join([f"{self.decision:<6} {self.kind:<6}  {self.claim}", *fields])
        return line + ("  [expected]" if expected and self.decision == "REJECT" else "")


def _floor(x: float) -> str:
    return str(math.floor(x)) if math.isfinite(x) else str(x)


def _digit(x: float | None) -> str:
    """Round up to one significant digit, so that a printed chance of error is not less than the chance."""
    assert x is not None
    digit, exponent = f"{x:.0e}".split("e")
    below = float(f"{digit}e{exponent}") < x * (1 - 1e-12)
    return f"{int(digit) + below}e{exponent}"


def _two_digits(x: float, *, up: bool) -> str:
    """Round up (or down) to two significant digits, so that a printed bound stays a bound."""
    if x <= 0:
        return "0"
    digits = 1 - math.floor(math.log10(x))
    rounded = (math.ceil if up else math.floor)(x * 10**digits - (1e-9 if up else -1e-9)) / 10**digits
    return f"{rounded:.{max(digits, 0)}f}"


# --- laws and counts ------------------------------------------------------------------------------------------------


class _Law(NamedTuple):
    """A law over K outcomes, normalised: log-probabilities and probabilities, and the logs as they came."""

    logs: Floats
    probs: Floats
    given: Floats


def _law(name: str, logps: Tensor) -> _Law:
    _checks.logps(name, logps)
    if logps.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"{name} must be float32 or float64, got {logps.dtype}: rounded to that, it is another law")
    if logps.ndim != 1:
        raise ValueError(f"{name} must be one law of shape (K,), got shape {tuple(logps.shape)}")
    given = logps.detach().double().cpu()
    logs = torch.log_softmax(given, -1)
    return _Law(logs.numpy(), logs.exp().numpy(), given.numpy())


def _named(versus: Sequence[_Declared]) -> list[tuple[str, _Declared]]:
    """Require several declared laws or means, and name each by its place; one alone would be taken for its entries."""
    if not isinstance(versus, list | tuple):
        raise TypeError(f"versus must be a list or tuple, got {_checks.described(versus)}")
    return [(f"versus[{i}]", value) for i, value in enumerate(versus)]


def _laws(target: Tensor, others: Sequence[tuple[str, Tensor]]) -> tuple[_Law, list[_Law]]:
    """Check laws over the same outcomes."""
    p, laws = _law("target", target), [_law(name, q) for name, q in others]
    for (name, _), q in zip(others, laws, strict=True):
        if q.logs.shape != p.logs.shape:
            raise ValueError(f"{name} must have {len(p.logs)} outcomes as target does, got {len(q.logs)}")
    return p, laws


def _log_ratio(p: _Law, q: _Law) -> Floats:
    """Compute log(q / p), precisely also where the laws are close; 0 where both are 0, +inf or -inf where one is."""
    with np.errstate(invalid="ignore"):
        raw = q.given - p.given
    raw[np.isneginf(p.given) & np.isneginf(q.given)] = 0  # counts nowhere, and says nothing of how close the laws are
    if np.abs(raw).max() < 0.5:  # differences of close numbers are exact, and so the normaliser can be
        return raw - math.log1p(float((p.probs * np.expm1(raw)).sum()))
    return np.subtract(q.logs, p.logs, where=np.isfinite(p.given) & np.isfinite(q.given), out=raw)


def _indices(name: str, samples: Tensor, k: int) -> Tensor:
    """Check outcome indices; return them flat, as int64 on the CPU."""
    return _checks.indices(name, samples, k).flatten().cpu()


def _counts(samples: Tensor, k: int) -> NDArray[np.int64]:
    counts: NDArray[np.int64] = torch.bincount(_indices("samples", samples, k), minlength=k).numpy()
    return counts


def _probability(name: str, value: object) -> None:
    if not isinstance(value, Real) or not 0 < float(value) < 1:
        raise ValueError(f"{name} must lie strictly between 0 and 1, got {value!r}")


# --- match ----------------------------------------------------------------------------------------------------------


def log_e_value(counts: ArrayLike, target: Tensor, versus: Sequence[Tensor] = ()) -> float:
    """Compute the log E-value of outcome counts against a target law.

        E = (1/2) mean_j DM(c; k_j p) / prod_y p_y^{c_y}  +  (1/2) mean_i prod_y (q_i(y) / p_y)^{c_y}

    The first part is a mixture of Dirichlet-multinomial likelihood ratios with concentrations k_j = n * {1/64, 1/16,
    1/4, 1, 4, 16, 64, 256}: it has power against every law. The second is the likelihood ratio of the declared wrong
    laws q_i; without any, E is the first part alone. Under the target E has mean at most 1 for every n and K (exactly 1
    where no q_i leaves the support of p), so P(E >= 1/alpha) <= alpha.

    Args:
        counts: How often each outcome occurred, shape (K,), whole numbers from 0 to 2^53, not all 0.
        target: Log-probabilities p of the claimed law, shape (K,), normalised.
        versus: Log-probabilities of declared wrong laws, each of shape (K,), fixed before the data were seen.

    Returns:
        log E, to 1e-9 max(1, |log E|) for every n and p; +inf when an outcome of target probability 0 occurred.

    Raises:
        TypeError: a law that is not a float32 or float64 tensor, or counts that are not numbers.
        ValueError: a law not normalised or of another size, or counts that are negative, not whole, above 2^53, or all
            0.

    Source: [good1967] for the mixture; [grunwald2024] for E-values; the book, "Verifying", `e-value-validity`.
    """
    p, wrong = _laws(target, _named(versus))
    return _log_e(_whole_counts(counts, len(p.logs)), p, [(q, _log_ratio(p, q)) for q in wrong])


def _whole_counts(counts: ArrayLike | Tensor, k: int) -> Floats:
    c = _numbers("counts", _fractions("counts", _array("counts", counts)))
    whole = (c >= 0) & (c <= 2**53) & (c == np.floor(c))  # beyond it a float skips numbers
    if c.shape != (k,) or not whole.all() or c.sum() == 0:
        raise ValueError(f"counts must be {k} whole numbers >= 0 with a positive sum, none above 2^53, got {counts!r}")
    return c


def _log_e(c: Floats, p: _Law, wrong: Sequence[tuple[_Law, Floats]]) -> float:
    """Compute log E; each wrong law comes with its log(q / p)."""
    if p.logs[c > 0].min() == -math.inf:
        return math.inf
    excess = _excess_counts(c, p)
    with np.errstate(over="ignore"):  # log E beyond the range of a float is infinite
        log_e = _log_average(_log_dirichlet_ratios(c, p, excess))
        if wrong:
            log_e = _log_average([log_e, _log_average([_log_likelihood_ratio(c, p, *q, excess) for q in wrong])])
    return log_e


def _excess_counts(c: Floats, p: _Law) -> Floats:
    """Compute c - n p, with p in extended precision where n is large: its rounding would be what is left.

    Machines whose long double is a double lose this: at 1e15 counts log E is then good to 1e-7 instead of 1e-9.
    """
    n = c.sum()
    if n < 2**30:
        return c - n * p.probs
    logs = p.given.astype(np.longdouble)  # 64 bits of mantissa or more on most machines
    weights = np.exp(logs - logs.max())
    return (c - c.sum(dtype=np.longdouble) * (weights / weights.sum())).astype(np.float64)


def _log_dirichlet_ratios(c: Floats, p: _Law, excess: Floats) -> Floats:
    """Compute log DM(c; k p) - sum_y c_y log p_y for k = n g and each g of the grid, without leaving log space.

    Written with log-gammas it is a difference of numbers of size n log n. By Stirling's formula, with the remainder S,

        log Gamma(x) = (x - 1/2) log x - x + (1/2) log 2 pi + S(x),

    these cancel on paper. With a = k p, k + n = n (1 + g) and d = (c - n p) / ((k + n) p) what is left is

        (1/2) log(1 + 1/g) + S(k) - S(k + n)
        + sum_y [ (k + n) p ((1 + d) log(1 + d) - d) - (1/2) log(1 + c / a) + S(a + c) - S(a) ],

    where sum_y (c - n p) = 0 was used. An outcome that is rare under k p (a small), possibly so rare that p underflows,
    has the same bracket in terms of log p; what has not occurred adds n p (1 - g log(1 + 1/g)).
    """
    n, seen = c.sum(), c > 0
    more = np.log1p(1 / _GRID)
    of_k, of_k_and_n = _stirling_remainder(n * np.stack([_GRID, 1 + _GRID]))
    total = more / 2 + of_k - of_k_and_n + n * p.probs[~seen].sum() * (1 - _GRID * more)
    c, logs, probs, excess = c[seen], p.logs[seen], p.probs[seen], excess[seen]
    for start in range(0, len(c), 2**13):  # a block at a time, so that eight rows of it stay in the cache
        block = slice(start, start + 2**13)
        total += _brackets(c[block], n * probs[block], logs[block] + math.log(n), excess[block])
    return total


def _brackets(c: Floats, expected: Floats, log_expected: Floats, excess: Floats) -> Floats:
    """Sum the bracket of `_log_dirichlet_ratios` over outcomes, for each g of the grid."""
    large = _GRID[:, None] * expected >= _STIRLING
    if large.all():
        return _bracket_of_large(_GRID[:, None], c, expected, excess).sum(1)
    terms = np.empty(large.shape)
    for part, bracket, more in ((large, _bracket_of_large, excess), (~large, _bracket_of_small, log_expected)):
        row, column = np.nonzero(part)
        terms[row, column] = bracket(_GRID[row], c[column], expected[column], more[column])
    return terms.sum(1)


def _bracket_of_large(g: Floats, c: Floats, expected: Floats, excess: Floats) -> Floats:
    a, e = g * expected, (1 + g) * expected
    rest = _stirling_series(a + c) - _stirling_series(a) - np.log1p(c / a) / 2
    return e * _log_tail(excess / e) + rest


def _bracket_of_small(g: Floats, c: Floats, expected: Floats, log_expected: Floats) -> Floats:
    a, more = g * expected, np.log1p(1 / g)
    # (1 - c) log p + ..., not log p - c log p: one draw of an outcome of log p = -1e300 is no evidence by itself.
    tail = (1 - c) * (log_expected + np.log1p(g))
    return tail + gammaln(a + c) - gammaln(a + 1) + expected - (1 + a) * more


# From here on Stirling's series, cut after x^-9, is exact to rounding.
_STIRLING = 16.0


def _stirling_series(x: Floats) -> Floats:
    y = 1 / (x * x)
    return (1 / 12 - y * (1 / 360 - y * (1 / 1260 - y * (1 / 1680 - y / 1188)))) / x


def _stirling_remainder(x: Floats) -> Floats:
    """Compute S(x) = log Gamma(x) - (x - 1/2) log x + x - (1/2) log 2 pi for any x > 0."""
    if x.min() >= _STIRLING:
        return _stirling_series(x)
    direct = gammaln(x) - (x - 0.5) * np.log(x) + x - math.log(2 * math.pi) / 2
    return np.where(x < _STIRLING, direct, _stirling_series(np.maximum(x, _STIRLING)))


def _log_tail(d: Floats) -> Floats:
    """Compute (1 + d) log(1 + d) - d >= 0 for d > -1; near 0 by its series, where the terms cancel."""
    x = np.clip(d, -0.01, 0.01)
    series = x * x * (1 / 2 - x * (1 / 6 - x * (1 / 12 - x * (1 / 20 - x * (1 / 30 - x * (1 / 42 - x / 56))))))
    return np.where(x == d, series, (1 + d) * np.log1p(d) - d)


def _exp_tail(x: Floats) -> Floats:
    """Compute exp(x) - 1 - x >= 0; near 0 by its series, where the terms cancel."""
    y = np.clip(x, -0.01, 0.01)
    series = y * y * (1 / 2 + y * (1 / 6 + y * (1 / 24 + y * (1 / 120 + y * (1 / 720 + y * (1 / 5040 + y / 40320))))))
    return np.where(y == x, series, np.expm1(x) - x)


def _log_likelihood_ratio(c: Floats, p: _Law, q: _Law, ratio: Floats, excess: Floats) -> float:
    """Compute sum_y c_y log(q_y / p_y) as sum_y [c_y log(q_y / p_y) - n (q_y - p_y)], where nothing large cancels."""
    n = c.sum()
    if ratio[c > 0].min() == -math.inf:
        return -math.inf
    terms = np.multiply(c, ratio, where=c > 0, out=np.zeros_like(c)) - n * (q.probs - p.probs)
    near = np.abs(ratio) < 0.5
    close = ratio[near]
    terms[near] = excess[near] * close - n * p.probs[near] * _exp_tail(close)
    return float(terms.sum())


def match(
    samples: Tensor,
    target: Tensor,
    *,
    claim: str,
    versus: Sequence[Tensor] = (),
    alpha: float = 1e-8,
    miss: float = 1e-8,
) -> Verdict:
    """Check that independent samples follow a target law.

        REJECT iff E >= 1 / alpha,    E from `log_e_value`

    A correct sampler is rejected with probability at most `alpha`; a sampler whose law is one of `versus` is missed
    with probability at most `miss`, or the verdict is INCONCLUSIVE because n is below `plan`. Without `versus` a PASS
    has no stated power. The samples must be independent: one per pool of candidates, one per chain. Cost O(n + K).

    Args:
        samples: Outcome indices in 0..K-1, integer tensor of any shape, n entries.
        target: Log-probabilities of the claimed law, shape (K,), normalised.
        claim: Claim id: the label of the theorem, or label.part.
        versus: Log-probabilities of declared wrong laws, each of shape (K,), fixed before the data were seen.
        alpha: Largest probability of a false alarm, in (0, 1).
        miss: Largest probability of missing a declared wrong law, in (0, 1).

    Returns:
        Verdict of kind "match". An outcome of target probability 0 gives REJECT with E = inf.

    Raises:
        TypeError: `samples` not an integer tensor, or a law that is not a float32 or float64 tensor.
        ValueError: indices outside 0..K-1, n = 0, a law not normalised or of another size, `alpha` or `miss` outside
            (0, 1), or a malformed claim id.

    Example:
        >>> p = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64).log()
        >>> wrong = torch.tensor([0.55, 0.25, 0.2], dtype=torch.float64).log()
        >>> draws = torch.multinomial(p.exp(), 20_000, replacement=True, generator=rng("example"))
        >>> verdict = match(draws, p, claim="example", versus=[wrong])
        >>> verdict.decision, match(draws, wrong, claim="example").decision
        ('PASS', 'REJECT')

    Source: the book, "Verifying", `e-value-validity` and `directed-plan`.
    """
    return _match(lambda k: _counts(samples, k).astype(np.float64), target, claim, versus, alpha, miss)


def match_counts(
    counts: ArrayLike | Tensor,
    target: Tensor,
    *,
    claim: str,
    versus: Sequence[Tensor] = (),
    alpha: float = 1e-8,
    miss: float = 1e-8,
) -> Verdict:
    """Check that independent samples follow a target law, by how often each outcome occurred.

    The verdict of `match` on samples with these counts. Counts of several processes add: see `distributed.add_counts`.

    Args:
        counts: How often each outcome occurred, shape (K,), whole numbers from 0 to 2^53, not all 0.
        target: Log-probabilities of the claimed law, shape (K,), normalised.
        claim: Claim id: the label of the theorem, or label.part.
        versus: Log-probabilities of declared wrong laws, each of shape (K,), fixed before the data were seen.
        alpha: Largest probability of a false alarm, in (0, 1).
        miss: Largest probability of missing a declared wrong law, in (0, 1).

    Returns:
        Verdict of kind "match".

    Raises:
        TypeError: counts that are not numbers, or a law that is not a float32 or float64 tensor.
        ValueError: counts negative, not whole, above 2^53 or all 0, a law not normalised or of another size, `alpha` or
            `miss` outside (0, 1), or a malformed claim id.

    Source: the book, "Verifying", `e-value-validity` and `directed-plan`.
    """
    return _match(lambda k: _whole_counts(counts, k), target, claim, versus, alpha, miss)


def _match(
    counts: Callable[[int], Floats],
    target: Tensor,
    claim: str,
    versus: Sequence[Tensor],
    alpha: float,
    miss: float,
) -> Verdict:
    """Judge the counts of K outcomes, which a function of K checks and gives."""
    _claim_id(claim)
    _probability("alpha", alpha)
    _probability("miss", miss)
    p, laws = _laws(target, _named(versus))
    for i, q in enumerate(laws):
        if np.array_equal(p.logs, q.logs):
            raise ValueError(
                f"versus[{i}] must differ from target, got the same law: no number of samples tells them apart"
            )
    wrong = [(q, _log_ratio(p, q)) for q in laws]
    c = counts(len(p.logs))
    log_e = _log_e(c, p, wrong)
    need = max((_plan(p, *q, alpha, miss, len(wrong)) for q in wrong), default=None)
    return _e_verdict(claim, "match", int(c.sum()), log_e, need, len(wrong), alpha, miss)


def _e_verdict(
    claim: str, kind: str, n: int, log_e: float, need: int | None, declared: int, alpha: float, miss: float
) -> Verdict:
    """Decide by an E-value: reject at 1 / alpha, and pass only with the planned number of samples."""
    if log_e < -math.log(alpha):  # in this direction, so that NaN does not pass
        decision = "PASS" if need is None or n >= need else "INCONCLUSIVE"
    else:
        decision = "REJECT"
    return Verdict(
        claim,
        kind,
        decision,
        n,
        plan=need,
        declared=declared,
        alpha=float(alpha),
        miss=float(miss),
        log10_e=log_e / math.log(10),
        method="e-value",
    )


def plan(target: Tensor, wrong: Tensor, *, alpha: float = 1e-8, miss: float = 1e-8, declared: int | None = 1) -> int:
    """Compute how many samples make `match` reject a wrong law, except with probability `miss`.

    For a declared law the number is proved at every n, by Chernoff's bound on the likelihood-ratio half of E with m
    declared laws:

        n = min over 0 < s < 1 of  (log(1/miss) + s log(2 m / alpha)) / -log sum_y p(y)^s q(y)^{1-s}

    For an undeclared law it is the asymptotic power of the Dirichlet half: n = lambda / chi2(q || p), where a
    noncentral chi-square with K - 1 degrees of freedom and noncentrality lambda exceeds the rejection threshold with
    probability 1 - miss.

    Args:
        target: Log-probabilities p of the claimed law, shape (K,), normalised.
        wrong: Log-probabilities q of the law to be rejected, shape (K,), normalised.
        alpha: False-alarm probability of the check, in (0, 1).
        miss: Probability of missing the wrong law, in (0, 1).
        declared: Number m of declared wrong laws of which `wrong` is one; None when it is not declared.

    Returns:
        Number of samples.

    Raises:
        TypeError: a law that is not a float32 or float64 tensor.
        ValueError: laws not normalised, of different sizes, equal, or different only where both have no mass to speak
            of; `alpha` or `miss` outside (0, 1); or, for an undeclared law, an expected count below 5 where the
            chi-square approximation is not to be trusted.

    Source: [chernoff1952]; the book, "Verifying", `directed-plan`.
    """
    _probability("alpha", alpha)
    _probability("miss", miss)
    if declared is not None:
        _checks.count("declared", declared)
    p, (q,) = _laws(target, [("wrong", wrong)])
    return _plan(p, q, _log_ratio(p, q), alpha, miss, declared)


def _plan(p: _Law, q: _Law, ratio: Floats, alpha: float, miss: float, declared: int | None) -> int:
    if np.array_equal(p.logs, q.logs):
        raise ValueError("wrong must differ from target, got the same law: no number of samples tells them apart")
    if declared is not None:
        return _declared_plan(p.logs, q.logs, ratio, alpha, miss, declared)
    support = np.isfinite(p.logs)
    if np.isfinite(q.logs[~support]).any():
        raise ValueError("wrong must have its support in that of target when not declared, got an outcome outside it")
    k, ratio = int(support.sum()), ratio[support]
    with np.errstate(divide="ignore", over="ignore"):  # p (q / p - 1)^2 in logs: q / p may be any number
        chi2 = float(np.exp(p.logs[support] + 2 * np.log(np.abs(np.expm1(ratio)))).sum())
    cut = ((1 + _GRID) * (2 * math.log(len(_GRID) / alpha) + (k - 1) * np.log1p(1 / _GRID))).min()
    noncentrality = 0.0
    if ncx2.cdf(cut, k - 1, 1e-9) > miss:  # else any sample will do
        noncentrality = float(brentq(lambda x: ncx2.cdf(cut, k - 1, x) - miss, 1e-9, 1e7))
    n = _whole_number(noncentrality / max(chi2, 1 / _TOO_MANY))
    rarest = n * float(p.probs[support].min())
    if rarest < 5:
        raise ValueError(
            f"wrong must be declared here: n = {n} expects only {rarest:.3g} samples of the rarest outcome, "
            "below the 5 that the chi-square approximation needs"
        )
    return n


def _declared_plan(log_p: Floats, log_q: Floats, ratio: Floats, alpha: float, miss: float, declared: int) -> int:
    """Minimise Chernoff's bound over its parameter s; `ratio` is log(q / p), which the two logs give less precisely.

    For laws that are close, sum_y p^s q^{1-s} rounds to 1. One minus it is a sum of terms that are never negative,

        s p + (1 - s) q - p^s q^{1-s} = p [(1 - s) (e^x - 1) - (e^{(1-s) x} - 1)],    x = log(q / p),

    and for small x the powers of x begin with the second: their sums over y are all that is needed.
    """
    p, q = np.exp(log_p), np.exp(log_q)
    size = np.abs(ratio)
    near = size < 0.01
    powers = range(2, 8) if near.any() else ()
    moments = [(j, float((p[near] * ratio[near] ** j).sum()) / math.factorial(j)) for j in powers]
    far_p, far_q = float(p[~near].sum()), float(q[~near].sum())
    common = np.isfinite(log_p) & np.isfinite(log_q)
    if not common.any():
        return 1
    both = common & ~near
    log_p_far, log_q_far = log_p[both], log_q[both]
    threshold = math.log(2 * declared / alpha)

    def samples_at(s: float) -> float:
        t = 1 - s
        gap = sum([(t - t**j) * moment for j, moment in moments])
        gap += s * far_p + t * far_q - float(np.exp(s * log_p_far + t * log_q_far).sum())
        if gap < 0.5:
            log_affinity = math.log1p(-gap)
        else:
            log_affinity = float(np.logaddexp.reduce(s * log_p[common] + t * log_q[common]))
        return (-math.log(miss) + s * threshold) / max(-log_affinity, 1 / _TOO_MANY)

    # Flat at its minimum: s off by 1e-4 costs 1e-8 of n. And any s is enough: the best only asks for the fewest.
    best = minimize_scalar(samples_at, bounds=(1e-6, 1 - 1e-6), method="bounded", options={"xatol": 1e-4})
    # Among close laws, never less than the expansion to second order asks for, in whichever of p and q it is written.
    return _whole_number(float(best.fun) * (1 + 2 * float(size.max()) if near.all() else 1))


# Laws that differ only where both have nearly no mass would ask for more samples than a float can count.
_TOO_MANY = 1e300


def _whole_number(n: float, wish: str = "wrong must differ from target where there is mass") -> int:
    if not n < _TOO_MANY:
        raise ValueError(f"{wish}, got what needs {n:.0e} samples")
    return max(1, math.ceil(n))


# --- mean -----------------------------------------------------------------------------------------------------------

# Bets as fractions of the largest that the bounds allow: half of it for values that hardly vary, 2^-12 for rare ones.
_BETS = 0.5 ** np.arange(1, 13)


def mean(
    values: ArrayLike | Tensor,
    expected: float,
    *,
    low: float,
    high: float,
    claim: str,
    versus: Sequence[float] = (),
    alpha: float = 1e-8,
    miss: float = 1e-8,
) -> Verdict:
    """Check that independent values in [low, high] have a stated mean, whatever else their law is.

        REJECT iff E >= 1 / alpha,
        E = (1/2) mean over fixed b of prod_t (1 + b (x_t - m))  +  (1/2) the same for b_i = (m_i - m) / (m (1 - m))

    Here x and m are the values and the expected mean, scaled to [0, 1]. The fixed bets lie between -1 / (1 - m) and
    1 / m; the others bet on the declared wrong means m_i. Without any, E is the first half alone. E has mean 1 if the
    values have mean m, so a true mean is rejected with probability at most `alpha`. Values whose mean is one of
    `versus` are missed with probability at most `miss`, or the verdict is INCONCLUSIVE because n is below `plan_mean`.

    Args:
        values: Independent values, any shape, n entries.
        expected: The claimed mean, strictly between `low` and `high`.
        low: Lower bound of the values, known beforehand.
        high: Upper bound of the values, known beforehand.
        claim: Claim id: the label of the theorem, or label.part.
        versus: Declared wrong means, strictly between `low` and `high`, fixed before the data were seen.
        alpha: Largest probability of a false alarm, in (0, 1).
        miss: Largest probability of missing a declared wrong mean, in (0, 1).

    Returns:
        Verdict of kind "mean".

    Raises:
        ValueError: no values, or values outside the bounds; bounds not finite; a mean not strictly between them; a
            declared mean equal to `expected`; `alpha` or `miss` outside (0, 1); or a malformed claim id.

    Source: [waudbysmith2024]; the book, "Verifying", `mean-e-value`.
    """
    _claim_id(claim)
    _probability("miss", miss)
    _probability("alpha", alpha)
    _between("expected", expected, low, high)
    for name, value in _named(versus):
        _between(name, value, low, high)
        if value == expected:
            raise ValueError(f"{name} must differ from expected, got {value!r} twice")
    v = _numbers("values", values).ravel()
    if not ((v >= low) & (v <= high)).all():
        raise ValueError(f"values must lie in [{low:g}, {high:g}], got values from {v.min():g} to {v.max():g}")
    gain, left, right = v - expected, expected - low, high - expected  # never 1 - m, which may round to 0
    up = _log_average([_log_wealth(bet, gain, left) for bet in _BETS])
    down = _log_average([_log_wealth(bet, -gain, right) for bet in _BETS])
    log_e = _log_average([up, down])
    if versus:
        directed = _log_average([_log_ratio_of_means(v, expected, q, low, high) for q in versus])
        log_e = _log_average([log_e, directed])
    plans = (plan_mean(expected, q, low=low, high=high, alpha=alpha, miss=miss, declared=len(versus)) for q in versus)
    return _e_verdict(claim, "mean", len(v), log_e, max(plans, default=None), len(versus), alpha, miss)


def plan_mean(
    expected: float,
    wrong: float,
    *,
    low: float,
    high: float,
    alpha: float = 1e-8,
    miss: float = 1e-8,
    declared: int = 1,
) -> int:
    """Compute how many values make `mean` reject a declared wrong mean, except with probability `miss`.

    Of all laws on [low, high] with the wrong mean, the one on the two ends is the hardest to tell. So this is the
    `plan` for two outcomes, and it holds for every law.

    Args:
        expected: The claimed mean, strictly between `low` and `high`.
        wrong: The mean to be rejected, strictly between `low` and `high`.
        low: Lower bound of the values.
        high: Upper bound of the values.
        alpha: False-alarm probability of the check, in (0, 1).
        miss: Probability of missing the wrong mean, in (0, 1).
        declared: Number of declared wrong means of which `wrong` is one, >= 1.

    Returns:
        Number of values.

    Raises:
        ValueError: bounds not finite, a mean not strictly between them, equal means, or `alpha` or `miss` outside
            (0, 1).

    Source: [chernoff1952]; the book, "Verifying", `mean-e-value`.
    """
    _probability("alpha", alpha)
    _probability("miss", miss)
    _between("expected", expected, low, high)
    _between("wrong", wrong, low, high)
    if wrong == expected:
        raise ValueError(f"wrong must differ from expected, got {wrong!r} and {expected!r}")
    # The law on the two ends that has the mean; logs of differences, since 1 - m may round to 0.
    log_p, log_q = (np.log([high - mean, mean - low]) - math.log(high - low) for mean in (expected, wrong))
    _checks.count("declared", declared)
    change = np.array([(expected - wrong) / (high - expected), (wrong - expected) / (expected - low)])
    ratio = np.where(np.abs(change) < 0.5, np.log1p(np.clip(change, -0.5, 0.5)), log_q - log_p)
    return _declared_plan(log_p, log_q, ratio, alpha, miss, declared)


def _between(name: str, value: float, low: float, high: float) -> None:
    """Check a mean against its bounds."""
    numbers: dict[str, object] = {name: value, "low": low, "high": high}
    for argument, number in numbers.items():
        if not isinstance(number, Real):
            raise TypeError(f"{argument} must be a number, got {_checks.described(number)}")
    if not (-math.inf < low < high < math.inf and high - low < math.inf):
        raise ValueError(f"low and high must be finite with low < high, got {low!r} and {high!r}")
    if not low < value < high:
        raise ValueError(f"{name} must lie strictly between low = {low:g} and high = {high:g}, got {value!r}")


def _log_wealth(bet: float, gain: Floats, unit: float) -> float:
    """Compute sum log(1 + bet gain / unit), also where gain / unit is beyond the range of a float."""
    with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
        ratio = bet * (gain / unit)
        logs = np.where(ratio < math.inf, np.log1p(ratio), math.log(bet) + np.log(gain) - math.log(unit))
    return float(logs.sum())


def _log_ratio_of_means(v: Floats, mean: float, other: float, low: float, high: float) -> float:
    """Compute sum log(x q / m + (1 - x) (1 - q) / (1 - m)), values and means scaled to [0, 1]."""
    with np.errstate(divide="ignore"):  # log 0 at the ends
        on_top = np.log(v - low) + math.log(other - low) - math.log(mean - low)
        below = np.log(high - v) + math.log(high - other) - math.log(high - mean)
    return float((np.logaddexp(on_top, below) - math.log(high - low)).sum())


def _log_average(logs: Sequence[float] | Floats) -> float:
    return float(np.logaddexp.reduce(logs)) - math.log(len(logs))


# --- within ---------------------------------------------------------------------------------------------------------


def tv_upper_bound(x: ArrayLike | Tensor, *, delta: float = 1e-8) -> float:
    """Bound the mean of independent values in [0, 1] from above, with confidence 1 - delta at every n.

        U = inf { m : prod_t (1 - l_t(m) (x_t - m)) >= 1 / delta }

    A gambler who bets l_t against a mean of m or more multiplies his wealth by 1 - l_t (x_t - m); if the mean really
    were >= m he would reach 1/delta with probability at most delta. l_t depends on earlier values only. Applied to
    x = (1 - p/q)_+ at draws from q it bounds TV(p, q).

    Args:
        x: Independent values in [0, 1], shape (n,), n >= 1.
        delta: Probability that the bound is wrong, in (0, 1).

    Returns:
        Upper confidence bound on the mean, in (0, 1].

    Raises:
        ValueError: values outside [0, 1], n = 0, or `delta` outside (0, 1).

    Source: [waudbysmith2024]; the book, "Verifying", `tv-certificate`.
    """
    _probability("delta", delta)
    v = _numbers("x", x, empty=True).ravel()
    if len(v) == 0 or not ((v >= 0) & (v <= 1)).all():
        got = "none" if len(v) == 0 else f"values from {v.min():g} to {v.max():g}"
        raise ValueError(f"x must hold at least one value, each in [0, 1], got {got}")
    n, t = len(v), np.arange(1, len(v) + 1)
    mean = (0.5 + np.cumsum(v)) / (t + 1)
    variance = np.concatenate([[0.25], ((0.25 + np.cumsum((v - mean) ** 2)) / (t + 1))[:-1]])
    bet = np.sqrt(-2 * math.log(delta) / (n * variance))

    def log_wealth(m: float) -> float:
        # A bet of at most .75 / (1 - m) keeps every factor >= 1/4; at m = 1 any bet does.
        return float(np.log1p(-np.minimum(bet, 0.75 / max(1 - m, 1e-12)) * (v - m)).sum())

    low, high = float(v.mean()), 1.0
    for _ in range(50):  # wealth grows with m, so bisection; 2^-50 is below any printed digit
        middle = (low + high) / 2
        low, high = (low, middle) if log_wealth(middle) >= -math.log(delta) else (middle, high)
    return high


def within(
    samples: Tensor,
    target: LogLaw,
    eps: float,
    *,
    claim: str,
    log_q: LogLaw | None = None,
    cells: Tensor | None = None,
    delta: float = 1e-8,
) -> Verdict:
    """Check that the law of a sampler is within eps of a target law in total variation.

    Three tiers, by what is known of the sampler:

        ratio    its own log-probabilities `log_q`: TV = E_q[(1 - p/q)_+], no dependence on K; see `tv_upper_bound`
        counts   nothing, K <= 1024: TV(empirical law, p) + min(Weissman's radius, McDiarmid's radius)
        cells    nothing, K large: the same on a declared partition; the verdict is about the partition only

    For the ratio tier the samples must really come from `log_q`: pair it with `match(samples, log_q)`.

    Args:
        samples: Outcome indices, integer tensor, n entries; with callables, whatever they accept, n rows.
        target: Log-probabilities p of the claimed law, shape (K,); or, for the ratio tier, a function that maps samples
            to their log-probabilities.
        eps: Largest total variation distance claimed, in (0, 1).
        claim: Claim id: the label of the theorem, or label.part.
        log_q: Log-probabilities of the sampler itself, shape (K,), or a function as for `target`.
        cells: Cell of each outcome, integer tensor of shape (K,), values 0..cells-1 with at most 1024 cells.
        delta: Probability of a false PASS, in (0, 1), and likewise of a false REJECT.

    Returns:
        Verdict of kind "within": PASS if the upper bound is <= eps, REJECT if a lower bound is above eps, else
        INCONCLUSIVE.

    Raises:
        TypeError: `samples` not integer where outcomes are counted, or a law that is not a float32 or float64 tensor.
        ValueError: indices outside 0..K-1, n = 0, a law not normalised or of another size, `eps` or `delta` outside
            (0, 1) or so small that no number of samples shows it, K > 1024 with neither `log_q` nor `cells`, functions
            that do not give one number per sample, or a malformed claim id.

    Source: [weissman2003] and [mcdiarmid1989] for the radii; the book, "Verifying", `tv-certificate`.
    """
    _claim_id(claim)
    _probability("eps", eps)
    _probability("delta", delta)
    if log_q is not None:
        if cells is not None:
            raise ValueError("cells must be None when log_q is given: the ratio tier needs no partition")
        x = _ratio_terms(samples, target, log_q)
        n = len(x)
        upper, lower = tv_upper_bound(x, delta=delta), 1 - tv_upper_bound(1 - x, delta=delta)
        need = _whole_number(-2 * math.log(delta) / 0.75 / max(eps, 1 / _TOO_MANY), "eps must be larger")
        method = "ratio"
    else:
        if callable(target):
            raise ValueError("target must be log-probabilities of shape (K,) unless log_q is given, got a function")
        p = _law("target", target).probs
        indices = _indices("samples", samples, len(p))
        method = "counts"
        if cells is not None:
            cell = _checks.integers("cells", cells).cpu()
            if cell.shape != target.shape or int(cell.min()) < 0 or int(cell.max()) >= 1024:
                raise ValueError(
                    f"cells must be numbers in 0..1023 of shape {tuple(target.shape)}, one per outcome, "
                    f"got shape {tuple(cell.shape)} and values from {int(cell.min())} to {int(cell.max())}"
                )
            p = np.bincount(cell.numpy(), p).astype(np.float64)
            indices = cell[indices]
            method = f"cells({len(p)})"
        if len(p) > 1024:
            raise ValueError(f"target must have at most 1024 outcomes without log_q or cells, got {len(p)}")
        n = len(indices)
        frequencies = np.bincount(indices.numpy(), minlength=len(p)) / n
        upper = min(1.0, float(np.abs(frequencies - p).sum() / 2) + _tv_radius(len(p), n, delta))
        lower = _tv_lower(indices, p, delta)
        need = _whole_number((2 * _tv_radius(len(p), 1, delta) / max(eps, 1e-150)) ** 2, "eps must be larger")
    decision = "PASS" if upper <= eps else "REJECT" if lower > eps else "INCONCLUSIVE"
    return Verdict(
        claim,
        "within",
        decision,
        n,
        plan=need,
        tv_lo=lower,
        tv_hi=upper,
        eps=float(eps),
        delta=float(delta),
        method=method,
    )


def _ratio_terms(samples: Tensor, target: LogLaw, log_q: LogLaw) -> Floats:
    """Compute (1 - p/q)_+ at the samples."""
    logs = []
    for name, law in (("target", target), ("log_q", log_q)):
        if callable(law):
            values = _numbers(name, law(samples), empty=True)
            if values.shape != (len(samples),):
                raise ValueError(f"{name} must give one number per sample, shape ({len(samples)},), got {values.shape}")
            logs.append(values)
        else:
            values = _law(name, law).logs
            logs.append(values[_indices("samples", samples, len(values)).numpy()])
    if isinstance(target, Tensor) and isinstance(log_q, Tensor) and target.shape != log_q.shape:
        raise ValueError(f"log_q must have {len(target)} outcomes as target does, got {len(log_q)}")
    log_p, log_q_at = logs
    legal = log_p.shape == log_q_at.shape and bool((log_p < math.inf).all() and np.isfinite(log_q_at).all())
    if len(log_p) == 0 or not legal:
        raise ValueError("samples must have finite log_q and a log-probability under target each, got some without")
    terms: Floats = np.clip(-np.expm1(np.minimum(log_p - log_q_at, 0)), 0, 1)
    return terms


def _tv_radius(k: int, n: float, delta: float) -> float:
    if k == 1:
        return 0.0
    weissman = math.sqrt(((k * math.log(2) + math.log1p(-(2.0 ** (1 - k)))) - math.log(delta)) / (2 * n))
    mcdiarmid = math.sqrt((k - 1) / n) / 2 + math.sqrt(-math.log(delta) / (2 * n))
    return min(weissman, mcdiarmid)


def _tv_lower(indices: Tensor, p: Floats, delta: float) -> float:
    """Bound TV from below: learn an event on the first half, measure it by Clopper-Pearson on the second."""
    half = len(indices) // 2
    if half == 0:
        return 0.0
    first = np.bincount(indices[:half].numpy(), minlength=len(p)) / half
    event = first > p
    rest = indices[half:].numpy()
    hits = int(event[rest].sum())
    if hits == 0:
        return 0.0
    return max(0.0, float(betaincinv(hits, len(rest) - hits + 1, delta)) - float(p[event].sum()))


# --- exact and bound ------------------------------------------------------------------------------------------------


def _array(name: str, value: Any) -> NDArray[Any]:
    """Convert a number, a tensor on any device, or a nested list of these; refuse what is not a number."""
    if isinstance(value, Tensor):
        try:
            value = value.detach().cpu()
            value = value.float() if value.dtype in (torch.bfloat16, torch.float16) else value
            return value.resolve_conj().resolve_neg().numpy()
        except (TypeError, RuntimeError, NotImplementedError):  # sparse, quantized, or of eight bits
            raise TypeError(f"{name} must be a dense tensor of numbers, got {_checks.described(value)}") from None
    if isinstance(value, list | tuple):
        parts = _without_rounding(name, [_array(name, v) for v in value])
        if len({part.shape for part in parts}) > 1:
            shapes = ", ".join(sorted({str(part.shape) for part in parts}))
            raise ValueError(f"{name} must hold numbers of one shape, got shapes {shapes}")
        return np.stack(parts) if parts else np.empty(0)
    array = np.asarray(value)
    whole = array.dtype == object and all(type(v) is int for v in array.flat)  # Python's integers have no limit
    if array.dtype.kind not in "biufc" and not whole:
        raise TypeError(f"{name} must hold numbers, got {type(value).__name__} of {array.dtype}")
    return array


_INTEGERS = "biuO"  # the kinds of dtype that hold whole numbers; "O" holds those of any size


def _without_rounding(name: str, parts: list[NDArray[Any]]) -> list[NDArray[Any]]:
    """Bring arrays to one dtype that holds all their numbers: numpy would round large integers beside other numbers."""
    if len({part.dtype for part in parts}) < 2:
        return parts
    if all(part.dtype.kind in _INTEGERS for part in parts):
        return [part.astype(object) for part in parts]
    return [_fractions(name, part) for part in parts]


def _fractions(name: str, array: NDArray[Any]) -> NDArray[Any]:
    """Convert integers to float64, which must hold them; leave other numbers as they are."""
    if array.dtype.kind not in _INTEGERS:
        return array
    large = array.size and max(int(array.max()), -int(array.min())) > 2**53
    if large and any(int(x) != _float(x) for x in array.flat):
        raise ValueError(f"{name} must hold integers that a float64 holds where there are fractions, got {array!r}")
    return array.astype(np.float64)


def _float(x: Any) -> float:
    try:
        return float(x)
    except OverflowError:
        return math.inf if x > 0 else -math.inf


def _numbers(name: str, value: Any, *, empty: bool = False) -> Floats:
    """Convert to float64; refuse complex numbers and, unless allowed, the absence of any number."""
    array = _array(name, value)
    if array.dtype.kind == "c":
        raise TypeError(f"{name} must hold real numbers, got {array.dtype}")
    if array.size == 0 and not empty:
        raise ValueError(f"{name} must hold at least one number, got none")
    if array.dtype.kind == "O":
        return np.array([_float(x) for x in array.flat]).reshape(array.shape)
    return array.astype(np.float64)


def _distance(a: NDArray[Any], b: NDArray[Any]) -> Floats:
    """Compute |a - b| entry by entry: complex as they are, integers without rounding; equal infinities agree."""
    if all(x.dtype.kind in _INTEGERS for x in (a, b)):
        pairs = np.broadcast(a, b)
        return np.array([min(abs(int(x) - int(y)), 10**300) for x, y in pairs], np.float64).reshape(pairs.shape)
    a, b = _fractions("value", a), _fractions("expected", b)
    kind = np.complex128 if "c" in (a.dtype.kind, b.dtype.kind) else np.float64
    a, b = np.broadcast_arrays(a.astype(kind), b.astype(kind))
    return np.abs(np.subtract(a, b, where=a != b, out=np.zeros(a.shape, kind)))


def exact(value: Any, expected: Any, eps: float = 1e-12, *, claim: str) -> Verdict:
    """Check that computed numbers agree.

        PASS iff max |value - expected| <= eps,    equal infinities agree, NaN never does

    Args:
        value: Number, list, array or tensor; complex numbers and integers of any size are compared as they are.
        expected: The same shape, or a scalar.
        eps: Largest absolute difference allowed, > 0.
        claim: Claim id: the label of the theorem, or label.part.

    Returns:
        Verdict of kind "exact"; `n` counts the numbers compared.

    Raises:
        TypeError: something that is not a number.
        ValueError: different shapes, nothing to compare, an integer of more than 53 bits beside fractions, `eps` not
            finite and > 0, or a malformed claim id.

    Source: the book, "Verifying".
    """
    _claim_id(claim)
    _checks.positive("eps", eps)
    a, b = _array("value", value), _array("expected", expected)
    for name, array in (("value", a), ("expected", b)):
        if array.size == 0:
            raise ValueError(f"{name} must hold at least one number, got none")
    if b.ndim and a.shape != b.shape:
        raise ValueError(f"value and expected must have the same shape, got {a.shape} and {b.shape}")
    difference = _distance(a, b)
    error = math.nan if np.isnan(difference).any() else float(difference.max())
    decision = "PASS" if error <= eps else "REJECT"
    return Verdict(claim, "exact", decision, a.size, eps=float(eps), error=error, method="computed")


def bound(lhs: Any, rhs: Any, *, claim: str, delta: float | None = None) -> Verdict:
    """Check that an inequality holds on every instance given.

        PASS iff lhs <= rhs + 1e-12 max(1, |rhs|) everywhere    (the slack is for rounding where equality is attained)

    Both sides are computed numbers, and then a PASS has no chance of error. Where some of them are confidence bounds,
    `delta` is the chance that any of these is false: m certificates, each false with probability at most delta / m.

    Args:
        lhs: Left sides, number, array or tensor.
        rhs: Right sides, of a shape that broadcasts.
        claim: Claim id: the label of the theorem, or label.part.
        delta: Chance that a confidence bound among the numbers is false, in (0, 1); None if all are computed.

    Returns:
        Verdict of kind "bound"; `n` counts the instances, `error` is the largest excess of lhs over rhs.

    Raises:
        ValueError: nothing to compare, `delta` outside (0, 1), or a malformed claim id.

    Source: the book, "Verifying".
    """
    if delta is not None:
        _probability("delta", delta)
    holds, worst, n = _excess(lhs, rhs, claim)
    decision = "PASS" if holds else "REJECT"
    return Verdict(
        claim, "bound", decision, n, error=worst, delta=None if delta is None else float(delta), method="computed"
    )


def observed(value: Any, limit: Any, *, claim: str) -> Verdict:
    """Note that numbers stayed below a limit that was set after looking at them.

        NOTE iff value <= limit + 1e-12 max(1, |limit|) everywhere

    For the outcome of a training run, say, which nothing predicts. `report` prints it, and raises once it is missed;
    but a limit that was placed where it holds is no evidence, so it needs no falsifier and counts as no claim.

    Args:
        value: What was seen, number, array or tensor.
        limit: What it stays below, of a shape that broadcasts.
        claim: Id: the label of the theorem, or label.part.

    Returns:
        Verdict of kind "observed"; `n` counts the numbers, `eps` is the limit if it is a single number.

    Raises:
        ValueError: nothing to compare, or a malformed claim id.

    Source: the book, "Verifying".
    """
    holds, worst, n = _excess(value, limit, claim)
    single = _numbers("limit", limit)
    eps = float(single) if single.ndim == 0 else None
    return Verdict(claim, "observed", "NOTE" if holds else "REJECT", n, eps=eps, error=worst, method="observed")


def _excess(lhs: Any, rhs: Any, claim: str) -> tuple[bool, float, int]:
    """Compare two sides: whether lhs <= rhs up to rounding, the largest excess, and the number of instances."""
    _claim_id(claim)
    left, right = _numbers("lhs", lhs), _numbers("rhs", rhs)
    try:
        a, b = np.broadcast_arrays(left, right)
    except ValueError:
        raise ValueError(f"lhs and rhs must broadcast, got shapes {left.shape} and {right.shape}") from None
    excess = np.where(a == b, 0.0, np.subtract(a, b, where=a != b, out=np.zeros(a.shape)))
    slack = 1e-12 * np.maximum(1, np.abs(np.where(np.isfinite(b), b, 1)))
    holds = bool((excess <= slack).all())  # NaN compares false
    worst = math.nan if np.isnan(excess).any() else float(excess.max())
    return holds, worst, a.size


# --- reporting ------------------------------------------------------------------------------------------------------


def _claim_id(claim: str) -> str:
    if not isinstance(claim, str) or not claim or any(c.isspace() for c in claim):
        raise ValueError(f"claim must be a non-empty id without spaces, got {claim!r}")
    return claim


def _cell_run() -> int | None:
    """Return the number of the notebook cell run that is going on, or None in a plain program."""
    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    return None if shell is None else int(shell.execution_count)


def _record(claim: str) -> None:
    """Refuse an id that was reported before, except by the same place in an earlier run of its notebook cell."""
    frame = sys._getframe(2)  # who called report or falsify
    file, line, run = frame.f_code.co_filename, frame.f_lineno, _cell_run()
    before = _reported.get(claim)
    if before is not None and (run is None or before[:2] != (file, line) or before[2] == run):
        raise ValueError(
            f"claim must be a new id, got {claim!r}, already reported; "
            "after editing a claim cell of a notebook, restart the kernel"
        )
    _reported[claim] = file, line, run


def report(verdict: Verdict) -> None:
    """Print the verdict line, or raise when the claim is not confirmed. The last line of a claim cell.

    Args:
        verdict: From `match`, `mean`, `within`, `exact`, `bound` or `observed`.

    Raises:
        ClaimFailed: the decision is neither PASS nor NOTE; the message is the verdict line.
        ValueError: the claim id was already reported, or is that of a falsifier. Running a notebook cell again is fine.
    """
    if "!" in verdict.claim:
        raise ValueError(f"claim must not contain '!', which marks falsifiers, got {verdict.claim!r}")
    if not verdict:
        raise ClaimFailed(verdict.line())
    _record(verdict.claim)
    print(verdict.line())


def falsify(check: Callable[[Any], Verdict], wrong: Any, *, claim: str) -> None:
    """Run a check on something wrong and print its rejection, or raise when it was not rejected.

    Args:
        check: Function of one argument that returns a verdict, the same check that the true claim passed.
        wrong: The wrong law, samples or number that it must reject.
        claim: Id of the falsifier: claim id, "!", a short name of what is wrong.

    Raises:
        ClaimFailed: the check did not reject, or it compared NaN, or (kind "exact") the wrong value misses by less than
            100 eps and is no clear miss.
        ValueError: the id has no "!", or was already used, or the check is an observation, which claims nothing.
            Running a notebook cell again is fine.
    """
    base, mark, slug = _claim_id(claim).partition("!")
    if not (base and mark and slug):
        raise ValueError(f"claim must be of the form id!name, got {claim!r}")
    verdict = dataclasses.replace(check(wrong), claim=claim)
    if verdict.kind == "observed":
        raise ValueError(f"check must test a claim, got the observation {claim!r}: it needs no falsifier")
    if verdict.decision != "REJECT":
        raise ClaimFailed(f"falsifier was not rejected: {verdict.line()}")
    if any(x is not None and math.isnan(x) for x in (verdict.error, verdict.log10_e)):
        raise ClaimFailed(f"falsifier gave NaN, which says nothing of the wrong version: {verdict.line()}")
    if verdict.kind == "exact":
        assert verdict.error is not None and verdict.eps is not None
        if verdict.error < _CLEAR_MISS * verdict.eps:
            raise ClaimFailed(f"falsifier misses by less than {_CLEAR_MISS} eps: {verdict.line()}")
    _record(claim)
    print(verdict.line())


def rng(claim: str, salt: str = "") -> torch.Generator:
    """Make the generator of a claim: a CPU generator seeded with 63 bits of sha256(claim|salt).

    The seed follows from the name, so nobody chooses it. A check that fails with this seed is a finding, not a reason
    to rename the claim.

    Args:
        claim: Claim id.
        salt: Another string gives an independent stream for the same claim.

    Returns:
        A seeded `torch.Generator` on the CPU.

    Raises:
        ValueError: a malformed claim id.
    """
    digest = hashlib.sha256(f"{_claim_id(claim)}|{salt}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
