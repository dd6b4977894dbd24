"""The engine of particle methods: bookkeeping against a loop by hand, dead particles, gradients, refusals."""

import math

import pytest
import torch
from helpers import F64, vector

from tiltlib import particles, resampling

RUNS, N, STEPS = 4, 5, 6


def close(a, b, tolerance=1e-12):
    torch.testing.assert_close(torch.as_tensor(a, dtype=F64), torch.as_tensor(b, dtype=F64), rtol=0, atol=tolerance)


def grow(gains, start=None, **options):
    """Particles are the numbers of the first particle that they come from; step t gains gains[t]."""
    runs, n = gains.shape[1:]
    begun = torch.arange(runs * n)
    return particles.grow(
        begun,
        lambda t, state: (state, gains[t].flatten()),
        lambda state, index: state[index],
        len(gains),
        torch.zeros(runs, n, dtype=F64) if start is None else start,
        **{"generator": torch.Generator().manual_seed(0), **options},
    )


def by_hand(gains, start, threshold, scheme, generator):
    """One run at a time, in plain numbers; the scheme is asked for all runs at once, as the engine does."""
    runs, n = gains.shape[1:]
    w, log_z = start.clone(), torch.zeros(runs, dtype=F64)
    who = torch.arange(runs * n).view(runs, n)
    ancestors, sizes = [], []
    ess = lambda row: row.exp().sum() ** 2 / (2 * row).exp().sum()  # noqa: E731
    for gain in gains:
        uneven = torch.stack([ess(row) < threshold * n - 1e-9 for row in w])
        parents = torch.arange(n).repeat(runs, 1)
        if uneven.any():
            drawn = scheme(torch.where(uneven[:, None], w, 0.0), n, generator=generator)
            for i in range(runs):
                if uneven[i]:
                    log_z[i] += w[i].exp().mean().log()
                    w[i], parents[i], who[i] = 0, drawn[i], who[i][drawn[i]]
        w = w + gain
        ancestors.append(parents)
        sizes.append(torch.stack([ess(row) for row in w]))
    return who.flatten(), w, log_z + w.exp().mean(-1).log(), torch.stack(ancestors, 1), torch.stack(sizes, -1)


@pytest.mark.parametrize("threshold", [0.0, 0.3, 0.8, 1.0])
@pytest.mark.parametrize("scheme", [resampling.multinomial, resampling.systematic])
def test_the_books_are_kept_as_by_hand(threshold, scheme, rng):
    gains, start = torch.randn(STEPS, RUNS, N, generator=rng, dtype=F64), torch.randn(RUNS, N, generator=rng, dtype=F64)
    out = grow(gains, start, threshold=threshold, scheme=scheme)
    expected = by_hand(gains, start, threshold, scheme, torch.Generator().manual_seed(0))
    for found, wanted in zip(out, expected, strict=True):
        assert torch.equal(found, wanted) if found.dtype == torch.int64 else close(found, wanted) is None
    resampled = (out.ancestors != torch.arange(N)).any(-1)
    assert not resampled.all() or threshold == 1.0
    assert bool(resampled.any()) == (threshold > 0.5) or threshold == 0.3


def test_equal_weights_are_left_alone(rng):
    third = torch.full((3, 1, 3), 1 / 3, dtype=F64)
    third[1, 0, 0] += 1e-15
    out = grow(third, threshold=1.0, scheme=resampling.multinomial)
    assert torch.equal(out.particles, torch.arange(3)) and torch.equal(out.ancestors, torch.arange(3).expand(1, 3, 3))
    close(out.log_partition, vector(1.0))
    # A difference that is no rounding is a reason.
    third[1, 0, 0] += 1e-3
    out = grow(third, threshold=1.0, scheme=lambda log_weights, n, generator: torch.full((1, 3), 2))
    assert torch.equal(out.particles, torch.full((3,), 2))


def test_a_run_that_died_goes_on_and_estimates_zero():
    gains = torch.zeros(3, 2, 2, dtype=F64)
    gains[0, 0] = -math.inf
    gains[1, 1, 0] = -math.inf
    out = grow(gains, threshold=1.0)
    assert out.log_partition[0] == -math.inf and torch.equal(out.particles[:2], torch.arange(2))
    close(out.ess, torch.stack([vector(0, 0, 0), vector(2, 1, 2)]))
    close(out.log_partition[1], -math.log(2))
    assert torch.equal(out.particles[2:], torch.full((2,), 3))  # both continue the one that lives
    close(out.log_weights[1], vector(0, 0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_weights_are_float64_whatever_the_gains_are(dtype, rng):
    gains = torch.randn(STEPS, RUNS, N, generator=rng).to(dtype)
    small, double = grow(gains), grow(gains.double())
    assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(small, double, strict=True))
    assert small.log_weights.dtype == F64
    start = torch.randn(RUNS, N, generator=rng).to(dtype)
    assert torch.equal(grow(gains, start).log_partition, grow(gains.double(), start.double()).log_partition)


def test_gradients_with_the_indices_held(rng):
    gains = torch.randn(4, 2, 3, generator=rng, dtype=F64).requires_grad_()
    start = torch.randn(2, 3, generator=rng, dtype=F64).requires_grad_()
    run = lambda g, s: grow(g, s, threshold=0.9).log_partition  # noqa: E731
    assert (grow(gains, start, threshold=0.9).ancestors != torch.arange(3)).any()
    assert torch.autograd.gradcheck(run, (gains, start))


def test_each_step_tells_what_a_run_that_ended_there_would_return(rng):
    gains, told = torch.randn(4, 2, 3, generator=rng, dtype=F64), []
    out = grow(gains, threshold=1.0, on_step=lambda t, particles: told.append((t, particles)))
    assert [t for t, _ in told] == [0, 1, 2, 3] and (out.ancestors != torch.arange(3)).any()
    for t, got in told:
        short = grow(gains[: t + 1], threshold=1.0)
        assert all(torch.equal(a, b) for a, b in zip(got[1:], short[1:], strict=True))
    assert all(torch.equal(a, b) for a, b in zip(told[-1][1][1:], out[1:], strict=True))
    kept = []
    with pytest.raises(RuntimeError, match="enough"):
        grow(gains, threshold=1.0, on_step=lambda t, particles: kept.append(particles) if t < 2 else stop())
    assert len(kept) == 2 and torch.equal(kept[1].ess, out.ess[:, :2])


def stop():
    raise RuntimeError("enough")


def test_no_runs_and_one_particle(rng):
    none = grow(torch.zeros(2, 0, 3, dtype=F64))
    assert none.log_partition.shape == (0,) and none.ancestors.shape == (0, 2, 3) and none.ess.shape == (0, 2)
    gains = torch.randn(3, 2, 1, generator=rng, dtype=F64)
    one = grow(gains, threshold=1.0)
    close(one.log_partition, gains.sum(0)[:, 0])
    close(one.ess, torch.ones(2, 3))


GAINS = torch.zeros(2, 2, 3, dtype=F64)


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"threshold": 1.1}, ValueError, r"threshold must lie in \[0, 1\], got 1.1"),
        ({"generator": None}, TypeError, "generator must be a torch.Generator, got NoneType"),
        ({"gains": GAINS[:0]}, ValueError, "steps must be an integer >= 1, got 0"),
        (
            {"gains": GAINS[:, :1], "start": torch.zeros(2, 3)},
            ValueError,
            r"step must return shape \(6,\), one number each, got \(3,\)",
        ),
        ({"gains": GAINS.long()}, TypeError, "step must return a floating-point torch.Tensor, got a torch.int64"),
        ({"gains": GAINS.to("meta")}, ValueError, "step must return numbers on cpu, got numbers on meta"),
        ({"gains": GAINS / 0}, ValueError, "step must return numbers that are finite or -inf"),
        ({"gains": GAINS + math.inf}, ValueError, "step must return numbers that are finite or -inf"),
        ({"start": torch.zeros(6)}, ValueError, r"log_weights must have shape \(runs, n\) with n >= 1, got \(6,\)"),
        ({"start": torch.zeros(2, 0)}, ValueError, "log_weights must"),
        ({"start": torch.full((2, 3), -math.inf)}, ValueError, "log_weights must be finite"),
    ],
)
def test_bad_input(change, error, text):
    with pytest.raises(error, match=text):
        grow(**{"gains": GAINS, **change})
