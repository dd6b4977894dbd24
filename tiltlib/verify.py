"""Evidence that samples follow a law, and that wrong laws are told apart from it.

A check returns a `Verdict`; `report` prints it as one line and raises unless it passed; `falsify` runs the same check
on a wrong law and raises unless that was rejected. Five kinds of check:

    match    samples follow the target law          E-value on counts; false alarm <= alpha by Markov's inequality
    mean     bounded values have the stated mean    E-value of bets on the values; the same error probabilities
    within   the sampler's law is within eps in TV  confidence bound; false pass <= delta
    exact    computed numbers agree                 no sampling, so no error probability
    bound    an inequality holds on all instances   no sampling

`plan` and `plan_mean` say how many samples make the rejection of a declared wrong law or mean certain up to a stated
probability. The theory is in book chapter "Verifying".
"""

import dataclasses
import hashlib
import math
import sys
from collections.abc import Callable, Sequence
from typing import Any

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
    "mean",
    "plan",
    "plan_mean",
    "report",
    "rng",
    "tv_upper_bound",
    "within",
]

Floats = NDArray[np.float64]
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

    `decision` is PASS, REJECT or INCONCLUSIVE (too few samples for the stated power, or a bound that straddles eps);
    the verdict is true only for PASS. Fields that a kind of check does not have are None.
    """

    claim: str
    kind: str
    decision: str
    n: int
    plan: int | None = None
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
        return self.decision == "PASS"

    def line(self) -> str:
        """Format the verdict as one line of fields that are the same on every machine."""
        fields = [f"n={self.n}"]
        expected = "!" in self.claim
        if self.kind in ("match", "mean"):
            assert self.log10_e is not None and self.alpha is not None
            evidence = f"log10E={_floor(self.log10_e)}", f"reject_at={math.ceil(-math.log10(self.alpha) - 1e-9)}"
            planned = [] if self.plan is None else [f"plan={self.plan}"]
            power = [] if self.plan is None else [f"power=1-{self.miss:.0e}"]
            fields += evidence if expected else [*planned, *evidence, *power, f"alpha={self.alpha:.0e}"]
        elif self.kind == "within":
            assert self.tv_lo is not None and self.tv_hi is not None
            low, high = _two_digits(self.tv_lo, up=False), _two_digits(self.tv_hi, up=True)
            fields += [f"tv_lo={low}" if expected else f"plan={self.plan}  tv_hi={high}"]
            fields += [f"eps={self.eps:g}", f"delta={self.delta:.0e}", f"tier={self.method}"]
        elif self.kind == "exact":
            error = [f"error={self.error:.1e}"] if expected else []
            fields += [*error, f"eps={self.eps:.0e}"]
        elif expected:
            fields += [f"excess={self.error:.1e}"]
        line = "  ".join([f"{self.decision:<6} {self.kind:<6}  {self.claim}", *fields])
        return line + ("  [falsifier, expected]" if expected and self.decision == "REJECT" else "")


def _floor(x: float) -> str:
    return str(math.floor(x)) if math.isfinite(x) else "inf"


def _two_digits(x: float, *, up: bool) -> str:
    """Round up (or down) to two significant digits, so that a printed bound stays a bound."""
    if x <= 0:
        return "0"
    digits = 1 - math.floor(math.log10(x))
    rounded = (math.ceil if up else math.floor)(x * 10**digits - (1e-9 if up else -1e-9)) / 10**digits
    return f"{rounded:.{max(digits, 0)}f}"


# --- laws and counts ------------------------------------------------------------------------------------------------


def _law(name: str, logps: Tensor) -> Floats:
    """Check one law over K outcomes and return its log-probabilities as float64, normalised to rounding."""
    _checks.logps(name, logps)
    if logps.ndim != 1:
        raise ValueError(f"{name} must be one law of shape (K,), got shape {tuple(logps.shape)}")
    values: Floats = torch.log_softmax(logps.detach().double(), -1).cpu().numpy()
    return values


def _counts(samples: Tensor, k: int) -> NDArray[np.int64]:
    """Check outcome indices and count them."""
    _checks.indices("samples", samples, k)
    counts: NDArray[np.int64] = torch.bincount(samples.flatten().cpu(), minlength=k).numpy()
    return counts


def _probability(name: str, value: float) -> None:
    if not 0 < value < 1:
        raise ValueError(f"{name} must lie strictly between 0 and 1, got {value}")


# --- match ----------------------------------------------------------------------------------------------------------


def log_e_value(counts: ArrayLike, target: Tensor, versus: Sequence[Tensor] = ()) -> float:
    """Compute the log E-value of outcome counts against a target law.

        E = (1/2) mean_j DM(c; k_j p) / prod_y p_y^{c_y}  +  (1/2) mean_i prod_y (q_i(y) / p_y)^{c_y}

    The first part is a mixture of Dirichlet-multinomial likelihood ratios with concentrations k_j = n * {1/64, 1/16,
    1/4, 1, 4, 16, 64, 256}: it has power against every law. The second is the likelihood ratio of the declared wrong
    laws q_i; without any, E is the first part alone. Under the target E has mean at most 1 for every n and K (exactly 1
    where no q_i leaves the support of p), so P(E >= 1/alpha) <= alpha.

    Args:
        counts: How often each outcome occurred, shape (K,), whole numbers >= 0, not all 0.
        target: Log-probabilities p of the claimed law, shape (K,), normalised.
        versus: Log-probabilities of declared wrong laws, each of shape (K,), fixed before the data were seen.

    Returns:
        log E; +inf when an outcome of target probability 0 occurred.

    Raises:
        TypeError: a law that is not a floating tensor.
        ValueError: a law not normalised or of another size, or counts that are negative, not whole, or all 0.

    Source: [good1967] for the mixture; [grunwald2024] for E-values; book chapter "Verifying", `e-value-validity`.
    """
    log_p = _law("target", target)
    c = np.asarray(counts, dtype=np.float64)
    whole = np.isfinite(c) & (c >= 0) & (c == np.floor(c))
    if c.shape != log_p.shape or not whole.all() or c.sum() == 0:
        raise ValueError(f"counts must be {len(log_p)} whole numbers >= 0 with a positive sum, got {counts!r}")
    wrong = [_law(f"versus[{i}]", q) for i, q in enumerate(versus)]
    for i, q in enumerate(wrong):
        if q.shape != log_p.shape:
            raise ValueError(f"versus[{i}] must have {len(log_p)} outcomes as target does, got {len(q)}")
    seen = c > 0
    c, log_p = c[seen], log_p[seen]
    if np.isneginf(log_p).any():
        return math.inf
    n = c.sum()
    k = n * _GRID
    a = k[:, None] * np.exp(log_p)
    parts = (gammaln(a + c) - gammaln(a) - c * log_p).sum(1) + gammaln(k) - gammaln(k + n)
    log_mixture = float(np.logaddexp.reduce(parts)) - math.log(len(_GRID))
    if not wrong:
        return log_mixture
    ratios = [float((c * (q[seen] - log_p)).sum()) for q in wrong]
    log_directed = float(np.logaddexp.reduce(ratios)) - math.log(len(ratios))
    return float(np.logaddexp(log_mixture, log_directed)) - math.log(2)


def match(
    samples: Tensor,
    target: Tensor,
    *,
    claim: str,
    versus: Sequence[Tensor] = (),
    alpha: float = 1e-8,
    miss: float = 1e-6,
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
        TypeError: `samples` not integer, or a law that is not a floating tensor.
        ValueError: indices outside 0..K-1, n = 0, a law not normalised or of another size, `alpha` or `miss` outside
            (0, 1), or a malformed claim id.

    Source: book chapter "Verifying", `e-value-validity` and `directed-plan`.
    """
    _claim_id(claim)
    _probability("alpha", alpha)
    _probability("miss", miss)
    log_p = _law("target", target)
    c = _counts(samples, len(log_p))
    log_e = log_e_value(c, target, versus)
    need = max((plan(target, q, alpha=alpha, miss=miss, declared=len(versus)) for q in versus), default=None)
    return _e_verdict(claim, "match", int(c.sum()), log_e, need, alpha, miss)


def _e_verdict(claim: str, kind: str, n: int, log_e: float, need: int | None, alpha: float, miss: float) -> Verdict:
    """Decide by an E-value: reject at 1 / alpha, and pass only with the planned number of samples."""
    if log_e >= -math.log(alpha):
        decision = "REJECT"
    else:
        decision = "PASS" if need is None or n >= need else "INCONCLUSIVE"
    return Verdict(
        claim, kind, decision, n, plan=need, alpha=alpha, miss=miss, log10_e=log_e / math.log(10), method="e-value"
    )


def plan(target: Tensor, wrong: Tensor, *, alpha: float = 1e-8, miss: float = 1e-6, declared: int | None = 1) -> int:
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
        TypeError: a law that is not a floating tensor.
        ValueError: laws not normalised, of different sizes, or equal; `alpha` or `miss` outside (0, 1); or, for an
            undeclared law, an expected count below 5 where the chi-square approximation is not to be trusted.

    Source: [chernoff1952]; book chapter "Verifying", `directed-plan`.
    """
    _probability("alpha", alpha)
    _probability("miss", miss)
    p, q = _law("target", target), _law("wrong", wrong)
    if p.shape != q.shape:
        raise ValueError(f"wrong must have {len(p)} outcomes as target does, got {len(q)}")
    if np.array_equal(p, q):
        raise ValueError("wrong must differ from target, got the same law: no number of samples tells them apart")
    if declared is not None:
        return _declared_plan(p, q, alpha, miss, declared)
    support = np.isfinite(p)
    if np.isfinite(q[~support]).any():
        raise ValueError("wrong must have its support in that of target when not declared, got an outcome outside it")
    k = int(support.sum())
    chi2 = float((np.exp(p[support]) * np.expm1(q[support] - p[support]) ** 2).sum())
    cut = ((1 + _GRID) * (2 * math.log(len(_GRID) / alpha) + (k - 1) * np.log1p(1 / _GRID))).min()
    noncentrality = brentq(lambda x: ncx2.cdf(cut, k - 1, x) - miss, 1e-9, 1e7)
    n = math.ceil(float(noncentrality) / chi2)
    rarest = n * math.exp(p[support].min())
    if rarest < 5:
        raise ValueError(
            f"wrong must be declared here: n = {n} expects only {rarest:.3g} samples of the rarest outcome, "
            "below the 5 that the chi-square approximation needs"
        )
    return n


def _declared_plan(p: Floats, q: Floats, alpha: float, miss: float, declared: int) -> int:
    """Minimise Chernoff's bound over its parameter s, for log-probabilities p and q."""
    _checks.count("declared", declared)
    common = np.isfinite(p) & np.isfinite(q)
    if not common.any():
        return 1
    threshold = math.log(2 * declared / alpha)

    def samples_at(s: float) -> float:
        log_affinity = float(np.logaddexp.reduce(s * p[common] + (1 - s) * q[common]))
        # An affinity that rounds to 1 near s = 0 or 1 would ask for infinitely many.
        return (-math.log(miss) + s * threshold) / max(-log_affinity, 1e-300)

    best = minimize_scalar(samples_at, bounds=(1e-6, 1 - 1e-6), method="bounded", options={"xatol": 1e-6})
    return math.ceil(float(best.fun))


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
    miss: float = 1e-6,
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

    Source: [waudbysmith2024]; book chapter "Verifying", `mean-e-value`.
    """
    _claim_id(claim)
    _probability("miss", miss)
    _probability("alpha", alpha)
    m = _scaled_mean("expected", expected, low, high)
    wrong = [_scaled_mean(f"versus[{i}]", value, low, high) for i, value in enumerate(versus)]
    v = _numbers("values", values).ravel()
    if not ((v >= low) & (v <= high)).all():
        raise ValueError(f"values must lie in [{low:g}, {high:g}], got values from {v.min():g} to {v.max():g}")
    gains = (v - low) / (high - low) - m

    def log_wealth(bets: ArrayLike) -> float:
        wealths = [float(np.log1p(bet * gains).sum()) for bet in np.ravel(bets)]
        return float(np.logaddexp.reduce(wealths)) - math.log(len(wealths))

    log_e = log_wealth(np.concatenate([_BETS / m, -_BETS / (1 - m)]))
    if wrong:
        directed = log_wealth([(q - m) / (m * (1 - m)) for q in wrong])
        log_e = float(np.logaddexp(log_e, directed)) - math.log(2)
    plans = (plan_mean(expected, q, low=low, high=high, alpha=alpha, miss=miss, declared=len(versus)) for q in versus)
    return _e_verdict(claim, "mean", len(v), log_e, max(plans, default=None), alpha, miss)


def plan_mean(
    expected: float,
    wrong: float,
    *,
    low: float,
    high: float,
    alpha: float = 1e-8,
    miss: float = 1e-6,
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

    Source: [chernoff1952]; book chapter "Verifying", `mean-e-value`.
    """
    _probability("alpha", alpha)
    _probability("miss", miss)
    m, q = _scaled_mean("expected", expected, low, high), _scaled_mean("wrong", wrong, low, high)
    if m == q:
        raise ValueError(f"wrong must differ from expected, got {wrong!r} and {expected!r}")
    return _declared_plan(np.log([1 - m, m]), np.log([1 - q, q]), alpha, miss, declared)


def _scaled_mean(name: str, value: float, low: float, high: float) -> float:
    """Check a mean against its bounds and scale it to (0, 1)."""
    if not -math.inf < low < high < math.inf:
        raise ValueError(f"low and high must be finite with low < high, got {low!r} and {high!r}")
    if not low < value < high:
        raise ValueError(f"{name} must lie strictly between low = {low:g} and high = {high:g}, got {value!r}")
    return (value - low) / (high - low)


# --- within ---------------------------------------------------------------------------------------------------------


def tv_upper_bound(x: ArrayLike, *, delta: float = 1e-8) -> float:
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

    Source: [waudbysmith2024]; book chapter "Verifying", `tv-certificate`.
    """
    _probability("delta", delta)
    v = np.asarray(x, dtype=np.float64).ravel()
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
        cells: Cell of each outcome, integer tensor of shape (K,), values 0..cells-1.
        delta: Probability of a false PASS, in (0, 1), and likewise of a false REJECT.

    Returns:
        Verdict of kind "within": PASS if the upper bound is <= eps, REJECT if a lower bound is above eps, else
        INCONCLUSIVE.

    Raises:
        TypeError: `samples` not integer where outcomes are counted.
        ValueError: indices outside 0..K-1, n = 0, a law not normalised, `eps` or `delta` outside (0, 1), K > 1024 with
            neither `log_q` nor `cells`, or a malformed claim id.

    Source: [weissman2003] and [mcdiarmid1989] for the radii; book chapter "Verifying", `tv-certificate`.
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
        need = math.ceil(-2 * math.log(delta) / (0.75 * eps))
        method = "ratio"
    else:
        if callable(target):
            raise ValueError("target must be log-probabilities of shape (K,) unless log_q is given, got a function")
        p = np.exp(_law("target", target))
        indices = samples
        method = "counts"
        if cells is not None:
            _counts(samples, len(p))
            _checks.integers("cells", cells)
            if cells.shape != target.shape or int(cells.min()) < 0:
                raise ValueError(
                    f"cells must be numbers >= 0 of shape {tuple(target.shape)}, one per outcome, "
                    f"got shape {tuple(cells.shape)} and least value {int(cells.min())}"
                )
            p = np.bincount(cells.cpu().numpy(), weights=p)
            indices = cells[samples]
            method = f"cells({len(p)})"
        if len(p) > 1024:
            raise ValueError(f"target must have at most 1024 outcomes without log_q or cells, got {len(p)}")
        c = _counts(indices, len(p))
        n = int(c.sum())
        upper = min(1.0, float(np.abs(c / n - p).sum() / 2) + _tv_radius(len(p), n, delta))
        lower = _tv_lower(indices.flatten(), p, delta)
        need = 1
        if _tv_radius(len(p), 1, delta) > eps / 2:
            need = math.ceil(brentq(lambda m: _tv_radius(len(p), m, delta) - eps / 2, 1, 1e18))
    decision = "PASS" if upper <= eps else "REJECT" if lower > eps else "INCONCLUSIVE"
    return Verdict(
        claim, "within", decision, n, plan=need, tv_lo=lower, tv_hi=upper, eps=eps, delta=delta, method=method
    )


def _ratio_terms(samples: Tensor, target: LogLaw, log_q: LogLaw) -> Floats:
    """Compute (1 - p/q)_+ at the samples."""
    logs = []
    for name, law in (("target", target), ("log_q", log_q)):
        if callable(law):
            value = law(samples)
        else:
            k = len(_law(name, law))
            _counts(samples, k)
            value = torch.log_softmax(law.double(), -1)[samples]
        logs.append(value.detach().double().cpu().numpy().ravel())
    log_p, log_q_at = logs
    if len(log_p) == 0 or log_p.shape != log_q_at.shape or np.isnan(log_p).any() or not np.isfinite(log_q_at).all():
        raise ValueError("samples must have finite log_q and a log-probability under target each, got some without")
    terms: Floats = np.clip(-np.expm1(log_p - log_q_at), 0, 1)
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
    first = np.bincount(indices[:half].cpu().numpy(), minlength=len(p)) / half
    event = first > p
    rest = indices[half:].cpu().numpy()
    hits = int(event[rest].sum())
    if hits == 0:
        return 0.0
    return max(0.0, float(betaincinv(hits, len(rest) - hits + 1, delta)) - float(p[event].sum()))


# --- exact and bound ------------------------------------------------------------------------------------------------


def _numbers(name: str, value: Any) -> Floats:
    array: Floats = np.asarray(value.detach().cpu() if isinstance(value, Tensor) else value, dtype=np.float64)
    if array.size == 0:
        raise ValueError(f"{name} must hold at least one number, got none")
    return array


def exact(value: Any, expected: Any, eps: float = 1e-12, *, claim: str) -> Verdict:
    """Check that computed numbers agree.

        PASS iff max |value - expected| <= eps,    equal infinities agree, NaN never does

    Args:
        value: Number, array or tensor.
        expected: The same shape, or a scalar.
        eps: Largest absolute difference allowed, > 0.
        claim: Claim id: the label of the theorem, or label.part.

    Returns:
        Verdict of kind "exact"; `n` counts the numbers compared.

    Raises:
        ValueError: different shapes, nothing to compare, `eps` not finite and > 0, or a malformed claim id.

    Source: book chapter "Verifying".
    """
    _claim_id(claim)
    _checks.positive("eps", eps)
    a, b = _numbers("value", value), _numbers("expected", expected)
    if b.ndim and a.shape != b.shape:
        raise ValueError(f"value and expected must have the same shape, got {a.shape} and {b.shape}")
    difference = np.where(a == b, 0.0, np.abs(np.subtract(a, b, where=a != b, out=np.zeros(a.shape))))
    error = math.inf if np.isnan(difference).any() else float(difference.max())
    decision = "PASS" if error <= eps else "REJECT"
    return Verdict(claim, "exact", decision, a.size, eps=eps, error=error, method="computed")


def bound(lhs: Any, rhs: Any, *, claim: str) -> Verdict:
    """Check that an inequality holds on every instance given.

        PASS iff lhs <= rhs + 1e-12 max(1, |rhs|) everywhere    (the slack is for rounding where equality is attained)

    Args:
        lhs: Left sides, number, array or tensor.
        rhs: Right sides, of a shape that broadcasts.
        claim: Claim id: the label of the theorem, or label.part.

    Returns:
        Verdict of kind "bound"; `n` counts the instances, `error` is the largest excess of lhs over rhs.

    Raises:
        ValueError: nothing to compare, or a malformed claim id.

    Source: book chapter "Verifying".
    """
    _claim_id(claim)
    left, right = _numbers("lhs", lhs), _numbers("rhs", rhs)
    try:
        a, b = np.broadcast_arrays(left, right)
    except ValueError:
        raise ValueError(f"lhs and rhs must broadcast, got shapes {left.shape} and {right.shape}") from None
    excess = np.where(a == b, 0.0, np.subtract(a, b, where=a != b, out=np.zeros(a.shape)))
    slack = 1e-12 * np.maximum(1, np.abs(np.where(np.isfinite(b), b, 1)))
    holds = bool((excess <= slack).all())  # NaN compares false
    worst = math.inf if np.isnan(excess).any() else float(excess.max())
    decision = "PASS" if holds else "REJECT"
    return Verdict(claim, "bound", decision, a.size, error=worst, method="computed")


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
        verdict: From `match`, `mean`, `within`, `exact` or `bound`.

    Raises:
        ClaimFailed: the decision is not PASS; the message is the verdict line.
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
        ClaimFailed: the check did not reject, or (kind "exact") the wrong value misses by less than 100 eps and is no
            clear miss.
        ValueError: the id has no "!", or was already used. Running a notebook cell again is fine.
    """
    base, mark, slug = _claim_id(claim).partition("!")
    if not (base and mark and slug):
        raise ValueError(f"claim must be of the form id!name, got {claim!r}")
    verdict = dataclasses.replace(check(wrong), claim=claim)
    if verdict.decision != "REJECT":
        raise ClaimFailed(f"falsifier was not rejected: {verdict.line()}")
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
