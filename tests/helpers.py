"""Laws by enumeration, the instances of the book, and the check that every sampler has to pass."""

import itertools
import math
from collections.abc import Callable, Iterable, Mapping

import numpy as np
import torch
from hypothesis import strategies as st
from torch import Generator, Tensor

from tiltlib import categorical, verify

F64 = torch.float64


def vector(*values: float) -> Tensor:
    return torch.tensor(values, dtype=F64)


def law(*probs: float) -> Tensor:
    return vector(*probs).log()


# The standard instance of the book.
S0 = law(0.5, 0.3, 0.2)
S0_REWARDS = vector(0, 1, 2)


def random_law(k: int, rng: Generator, *, sharpness: float = 3.0) -> Tensor:
    return torch.log_softmax(sharpness * torch.rand(k, generator=rng, dtype=F64), -1)


def relative_error(logps: Tensor, expected: Tensor) -> float:
    """Largest relative error of probabilities that are given as logarithms; where both are 0 there is none."""
    return torch.where(logps == expected, 0, torch.expm1(logps - expected)).abs().max().item()


def assert_same_under_default_dtype(results: Callable[[], Iterable[Tensor]], default: torch.dtype) -> None:
    """Check that nothing depends on the default dtype: same values, same dtypes."""
    expected, before = list(results()), torch.get_default_dtype()
    torch.set_default_dtype(default)
    try:
        got = list(results())
    finally:
        torch.set_default_dtype(before)
    assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(got, expected, strict=True))


# --- enumeration -----------------------------------------------------------------------------------------------------


def compositions(k: int, n: int) -> Tensor:
    """All count vectors of n candidates over k outcomes, one per row: stars and bars."""
    if k == 1:
        return torch.tensor([[n]])
    places = itertools.chain.from_iterable(itertools.combinations(range(n + k - 1), k - 1))
    bars = torch.from_numpy(np.fromiter(places, np.int64).reshape(-1, k - 1))
    edges = torch.nn.functional.pad(torch.nn.functional.pad(bars, (1, 0), value=-1), (0, 1), value=n + k - 1)
    return edges.diff(dim=1) - 1


def log_multinomial(counts: Tensor, ref_logps: Tensor) -> Tensor:
    """Log-probability of each count vector under the reference."""
    log_factorial = torch.tensor([math.log(math.factorial(i)) for i in range(int(counts.max()) + 1)], dtype=F64)
    n = int(counts[0].sum())
    terms = torch.where(counts > 0, counts * ref_logps, 0).sum(-1)
    return math.log(math.factorial(n)) - log_factorial[counts].sum(-1) + terms


def enumerated_soft_law(ref_logps: Tensor, rewards: Tensor, n: int, beta: float) -> Tensor:
    """Law of soft best-of-N by enumeration: P(y) = sum over counts c of P(c) c_y w_y / sum_k c_k w_k."""
    counts = compositions(len(ref_logps), n)
    log_cw = counts.double().log() + (rewards - rewards.max()) / beta
    chosen = log_cw - log_cw.logsumexp(-1, keepdim=True)
    return (log_multinomial(counts, ref_logps)[:, None] + chosen).logsumexp(0)


def enumerated_exponential_law(
    ref_logps: Tensor, rewards: Tensor, n: int, beta: float, noise_per: str = "draw"
) -> Tensor:
    """Law of best-of-N with exponential noise by enumeration. `noise_per`: each "draw" has its own, or each "outcome".

    From a pool with counts c, y is returned with probability c_y w_y int_0^{1/max w} prod_j (1 - w_j v)^(c_j - [j = y])
    dv: a polynomial in v, of which a Gauss rule gives the integral, by positive terms.
    """
    counts = compositions(len(ref_logps), n)
    noisy = counts if noise_per == "draw" else counts.clamp(max=1)
    log_w = torch.where(counts > 0, (rewards - rewards.max()) / beta, -math.inf)
    w = (log_w - log_w.amax(-1, keepdim=True)).exp()
    chosen = torch.zeros_like(w)
    for node, weight in zip(*np.polynomial.legendre.leggauss(n // 2 + 1), strict=True):
        rest = 1 - w * (1 + node) / 2
        chosen += weight / 2 * (rest**noisy).prod(-1, keepdim=True) / rest
    return (log_multinomial(counts, ref_logps)[:, None] + (noisy * w * chosen).log()).logsumexp(0)


def enumerated_joint_law(ref_logps: Tensor, rewards: Tensor, n: int, beta: float) -> Tensor:
    """Law of two soft choices from one pool of N candidates, shape (K, K)."""
    counts = compositions(len(ref_logps), n)
    log_cw = counts.double().log() + (rewards - rewards.max()) / beta
    chosen = log_cw - log_cw.logsumexp(-1, keepdim=True)
    log_pool = log_multinomial(counts, ref_logps)[:, None, None]
    return (log_pool + chosen[:, :, None] + chosen[:, None, :]).logsumexp(0)


def enumerated_best_law(ref_logps: Tensor, rewards: Tensor, n: int, ties: str = "draws") -> Tensor:
    """Law of best-of-N by enumeration. `ties`: uniform over tied "draws" or "distinct" outcomes, or "lowest"."""
    counts = compositions(len(ref_logps), n)
    drawn = torch.where(counts > 0, rewards, -math.inf)
    tied = counts * (drawn == drawn.amax(-1, keepdim=True))
    if ties == "distinct":
        tied = (tied > 0).long()
    elif ties == "lowest":
        tied = torch.nn.functional.one_hot((tied > 0).long().argmax(-1), len(ref_logps))
    chosen = tied.double().log() - tied.sum(-1, keepdim=True).double().log()
    return (log_multinomial(counts, ref_logps)[:, None] + chosen).logsumexp(0)


def without(logps: Tensor, outcome: int) -> Tensor:
    """The law of a sampler that never emits one outcome."""
    return torch.log_softmax(logps.index_fill(-1, torch.tensor(outcome), -math.inf), -1)


# --- samplers --------------------------------------------------------------------------------------------------------

Draw = Callable[[int, Generator], Tensor]


def draws_from(logps: Tensor) -> Draw:
    return lambda n, generator: categorical.sample(logps, n, generator=generator)


def candidates(ref_logps: Tensor, rows: int, n: int, generator: Generator) -> Tensor:
    """Outcomes of `rows` pools of n candidates."""
    return categorical.sample(ref_logps, rows * n, generator=generator).view(rows, n)


def check_sampler(draw: Draw, target: Tensor, wrong: Mapping[str, tuple[Draw, Tensor]], rng: Generator) -> None:
    """The sampler must match its exact law, and each known-bad sampler must be rejected by the very same check.

    `wrong` maps a name to a bad sampler and its law. The number of draws is the planned one: a bad sampler is missed
    with probability at most 1e-6, a good one is rejected with probability at most 1e-8.
    """
    versus = [bad for _, bad in wrong.values()]
    n = max(verify.plan(target, bad, declared=len(versus)) for bad in versus)
    verdict = verify.match(draw(n, rng), target, claim="sampler", versus=versus)
    assert verdict, verdict.line()
    for name, (bad_draw, _) in wrong.items():
        verdict = verify.match(bad_draw(n, rng), target, claim=f"sampler!{name}", versus=versus)
        assert verdict.decision == "REJECT", verdict.line()


# --- Hypothesis ------------------------------------------------------------------------------------------------------


@st.composite
def laws(draw: st.DrawFn, k: int, *, zeros: bool = True) -> Tensor:
    """Laws on k outcomes, some of probability 0."""
    logits = draw(st.lists(st.floats(-6, 6), min_size=k, max_size=k))
    if zeros:
        keep = draw(st.integers(0, k - 1))  # one outcome stays, so that the law exists
        gone = draw(st.lists(st.booleans(), min_size=k, max_size=k))
        logits = [-math.inf if g and i != keep else x for i, (x, g) in enumerate(zip(logits, gone, strict=True))]
    return torch.log_softmax(vector(*logits), -1)


@st.composite
def instances(draw: st.DrawFn, *, max_k: int = 6, zeros: bool = True) -> tuple[Tensor, Tensor, float]:
    """A reference law, rewards with frequent ties, and a temperature."""
    k = draw(st.integers(1, max_k))
    reward = st.one_of(st.integers(-2, 2).map(float), st.floats(-8, 8))
    rewards = vector(*draw(st.lists(reward, min_size=k, max_size=k)))
    return draw(laws(k, zeros=zeros)), rewards, draw(st.floats(0.25, 8))
