"""Ranks that `torchrun` starts, 2 and 4 of them, against one process, exact laws and the careless versions."""

import math
import os
import subprocess
import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import ranks
import torch
from helpers import F64, random_law
from ranks import BETA, CHAIN, LENGTH, POOL, REWARDS, SYMBOLS, P
from torch import Tensor

from tiltlib import distributed, pool, resampling, selection, smc, verify, weights
from tiltlib.distributed import RULES, RankFailed

HERE = Path(__file__).parent
SIZES = [2, 4]


@cache
def started(size: int) -> list[dict[str, Any]]:
    """What each rank returned: one start for all tests, since a start takes seconds."""
    path = HERE.parent / f".ranks-{os.getpid()}-{size}.pt"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={size}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE.parent)}
    try:
        # A rank that waits for another that has raised would wait for half an hour.
        done = subprocess.run(
            [*command, str(HERE / "ranks.py"), str(path)], env=environment, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stderr
        found: list[dict[str, Any]] = torch.load(path, weights_only=False)
        return found
    finally:
        path.unlink(missing_ok=True)


@cache
def alone() -> dict[str, Any]:
    return ranks.work()


def work(size: int) -> list[dict[str, Any]]:
    return [rank["work"] for rank in started(size)] if size > 1 else [alone()]


def joined(size: int, key: str, field: str, dim: int) -> Tensor:
    """Put the shares of all ranks side by side."""
    return torch.cat([getattr(found[key], field) for found in work(size)], dim)


def assert_everywhere(size: int, key: str) -> Any:
    first, *others = (found[key] for found in work(size))
    for other in others:
        for a, b in zip(first, other, strict=True):
            assert torch.equal(a, b) if isinstance(a, Tensor) else a == b
    return first


# --- selection -------------------------------------------------------------------------------------------------------

LAWS = {
    "soft": lambda n: selection.soft_best_of_n_law(P, REWARDS, BETA, n),
    "exponential": lambda n: selection.exponential_best_of_n_law(P, REWARDS, BETA, n),
    "hard": lambda n: selection.best_of_n_law(P, REWARDS, n),
}


def follows(winner: Tensor, law: Tensor, other: Tensor) -> verify.Verdict:
    return verify.match(winner, law, claim="ranks", versus=[other])


@pytest.mark.slow
@pytest.mark.parametrize("size", [1, *SIZES])
@pytest.mark.parametrize("rule", RULES)
def test_the_law_is_that_of_all_candidates(rule, size):
    law = LAWS[rule](ranks.N)
    for key in ("shards", "ranks"):
        kept = assert_everywhere(size, f"{key} {rule}")
        assert kept.n == ranks.N
        assert follows(kept.winner, law, LAWS[rule](ranks.N // 2)).decision == "PASS"
        assert follows(kept.winner, LAWS[rule](ranks.N // 2), law).decision == "REJECT"


@pytest.mark.slow
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("rule", RULES)
def test_shards_keep_the_same_candidate_on_any_number_of_ranks(rule, size):
    one, many = alone()[f"shards {rule}"], work(size)[0][f"shards {rule}"]
    assert torch.equal(many.winner, one.winner)
    torch.testing.assert_close(many.log_mean_weight, one.log_mean_weight, rtol=1e-14, atol=1e-14)


@pytest.mark.slow
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", ["uniform rank", "largest sum", "one stream"])
def test_careless_merges_are_rejected(name, size):
    law = LAWS["soft"](ranks.N)
    assert verify.match(work(size)[0][name], law, claim="ranks").decision == "REJECT"


@pytest.mark.slow
@pytest.mark.parametrize("size", [1, *SIZES])
def test_ties_are_fair_over_ranks(size):
    tied = (POOL == POOL.max()).double()
    law = (tied / tied.sum()).log()
    assert verify.match(work(size)[0]["ties"], law, claim="ranks").decision == "PASS"
    if size > 1:
        assert verify.match(work(size)[0]["lost tie key"], law, claim="ranks").decision == "REJECT"


@pytest.mark.slow
@pytest.mark.parametrize("size", SIZES)
def test_the_winner_arrives_bit_by_bit(size):
    """The rank before the last has the best of the even rows, the others of the odd ones; the last has nothing."""
    dtypes = [torch.int64, torch.bool, torch.bfloat16, torch.complex128, torch.uint8, torch.float32, torch.int64]
    for i, dtype in enumerate(dtypes):
        kept = assert_everywhere_bits(size, f"kept {i}")
        assert kept.dtype == dtype
    x = torch.arange(5 * 3 * 2).view(5, 3, 2)[:, 1] + 100 * torch.tensor([[size - 2, 0, size - 2, 0, size - 2]]).T
    assert torch.equal(work(size)[0]["kept 0"].winner, x)
    assert torch.equal(work(size)[0]["kept 3"].winner, x.to(torch.complex128))
    assert math.copysign(1, work(size)[0]["kept 5"].winner[0].item()) == -1


def assert_everywhere_bits(size: int, key: str) -> Tensor:
    first, *others = (found[key].winner for found in work(size))
    for other in others:
        assert first.dtype == other.dtype and first.shape == other.shape
        if first.numel():
            assert torch.equal(first.unsqueeze(-1).view(torch.uint8), other.unsqueeze(-1).view(torch.uint8))
    return first


def states(rewards: Tensor, beta: float) -> Tensor:
    """Exact states of parts, (parts, N): largest reward, log sum relative to it twice, as key without noise."""
    top = rewards.amax(-1, keepdim=True)
    total = ((rewards - top) / beta).logsumexp(-1)
    return torch.stack([top[:, 0], total, total])


@pytest.mark.parametrize("beta", [1e-3, 1.0, 1e300])
def test_the_merged_sum_is_the_sum(beta, rng):
    rewards = torch.randn(4, 5, generator=rng, dtype=F64) + 1e5
    rewards[1] = -math.inf
    rewards[2, 1:] = -math.inf
    _, (top, _, total) = distributed._merged(states(rewards, beta).nan_to_num(nan=-math.inf), beta, "soft")
    expected = ((rewards - rewards.max()) / beta).flatten().logsumexp(0)
    assert top == rewards.max() and abs(total - expected) < 1e-13


def test_the_hard_rule_is_the_limit_of_cold_noise():
    tops, keys = torch.tensor([1.0, 2.0, 2.0, -math.inf], dtype=F64), torch.tensor([0.9, 0.1, 0.3, 0.8], dtype=F64)
    parts = torch.stack([tops, keys, torch.zeros(4, dtype=F64)])
    assert distributed._merged(parts, 1.0, "hard")[0] == 2
    assert distributed._merged(parts, 1e-300, "exponential")[0] == 2
    assert distributed._merged(parts, 10.0, "exponential")[0] == 0  # .9 - .1 is the largest


def test_extreme_rewards_are_merged_relative_to_the_largest():
    """At r / beta of 1e300 the noise has no digits left in the sum, but has them relative to the largest reward."""
    owners = []
    for i in range(400):
        chunks = [
            (torch.tensor([[c, c]]), torch.full((1, 2), 1.0, dtype=F64), verify.rng("extreme", salt=f"{i} {c}"))
            for c in range(4)
        ]
        owners.append(distributed.best_of_n(chunks, 1e-300, rule="exponential" if i % 2 else "soft").winner)
    assert verify.match(torch.cat(owners), torch.full((4,), 0.25, dtype=F64).log(), claim="ranks").decision == "PASS"


# --- weights, curves, counts -----------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("size", [1, *SIZES])
def test_weight_statistics_are_those_of_all(size):
    w = ranks.weights_of_all()
    found = assert_everywhere(size, "stats")
    assert found.n == 4000
    torch.testing.assert_close(found.log_mean, weights.log_mean(w), rtol=1e-14, atol=1e-14)
    torch.testing.assert_close(found.ess, weights.ess(w), rtol=1e-13, atol=0)
    beta = torch.stack([found["beta"] for found in work(size)])
    assert bool((beta == beta[0]).all())
    torch.testing.assert_close(beta[0], weights.beta_for_ess(w[[0, 1, 3]], 0.4), rtol=1e-12, atol=0)


@pytest.mark.slow
def test_some_ranks_among_themselves():
    pair = [found["pair"] for found in work(4)]
    assert pair[1].n == 4 and pair[1].log_mean.item() == pytest.approx(math.log((math.e + math.e**3) / 2), rel=1e-14)
    assert torch.equal(pair[3].log_mean, pair[1].log_mean)
    assert pair[0] == pair[2] == "group must hold this process, got a group of others"


@pytest.mark.slow
@pytest.mark.parametrize("size", [1, *SIZES])
def test_curves_are_averaged_with_counts(size):
    found = assert_everywhere(size, "curves")
    curves = torch.rand(7, 4, generator=verify.rng("ranks-curves"), dtype=F64)
    assert found.prompts == 7
    torch.testing.assert_close(found.mean, curves.mean(0), rtol=1e-14, atol=0)
    torch.testing.assert_close(found.error, curves.square().square().sum(0).sqrt() / 7, rtol=1e-14, atol=0)
    torch.testing.assert_close(found.spread, curves.std(0) / math.sqrt(7), rtol=1e-13, atol=0)


def test_the_average_of_pools_is_that_of_the_command_line(rng):
    rewards = torch.randn(5, 12, generator=rng, dtype=F64)
    points, errors = pool.curve(rewards, 1.0, 4), pool.standard_errors(rewards, 1.0, 4)
    found = distributed.average_curves(points, errors)
    torch.testing.assert_close(found.mean, points.mean(0))
    torch.testing.assert_close(found.error, errors.square().mean(0).sqrt() / math.sqrt(5))
    assert distributed.average_curves(points[:1], errors[:1]).spread.isnan().all()


@pytest.mark.slow
@pytest.mark.parametrize("size", SIZES)
def test_counts_add_exactly(size):
    total = sum((2**60 + rank) // size for rank in range(size))
    assert [found["counts"].tolist() for found in work(size)] == size * [[total, 0, 3 // size * size]]


def log_wealth(shards: Sequence[Tensor], mean: float, delta: float) -> float:
    """The product of the wealths of gamblers who each see one shard, bet by bet."""
    log_wealth, n = 0.0, sum(len(shard) for shard in shards)
    for shard in shards:
        total, squares, variance = 0.0, 0.0, 0.25
        for t, value in enumerate(shard.tolist(), 1):
            bet = min(math.sqrt(2 * math.log(1 / delta) / (n * variance)), 0.75 / (1 - mean))
            log_wealth += math.log1p(-bet * (value - mean))
            total += value
            squares += (value - (0.5 + total) / (t + 1)) ** 2
            variance = (0.25 + squares) / (t + 1)
    return log_wealth


@pytest.mark.slow
@pytest.mark.parametrize("size", [1, *SIZES])
def test_wealths_multiply_over_shards_on_any_number_of_ranks(size):
    x, (first, *others) = ranks.certified(), [found["certificate"] for found in work(size)]
    assert log_wealth(x, first, 1e-3) == pytest.approx(math.log(1e3), rel=1e-9)
    assert all(other == first for other in others)


@pytest.mark.slow
@pytest.mark.parametrize("size", SIZES)
def test_a_certificate_where_ranks_hold_unequal_shares(size):
    """The first has 7 values, the last all others, and of four ranks two have none."""
    first, *others = (found["uneven certificate"] for found in work(size))
    x = ranks.certified()[0]
    assert log_wealth([x[:7], x[7:]], first, 1e-8) == pytest.approx(math.log(1e8), rel=1e-9)
    assert all(other == first for other in others)


def test_a_certificate_of_one_shard_is_that_of_verify(rng):
    for x in (torch.rand(300, generator=rng), torch.zeros(50), torch.ones(3), torch.tensor(0.25)):
        assert distributed.tv_upper_bound(x) == pytest.approx(verify.tv_upper_bound(x), rel=1e-12)


@pytest.mark.parametrize("mean", [0.2, 0.5, 0.9])
def test_the_joined_bet_is_fair_whatever_the_shards(mean):
    """The expected wealth at the true mean is 1, over all values that shards of 3, 1 and 4 can hold."""
    x = torch.cartesian_prod(*8 * [torch.tensor([0.0, 1.0], dtype=F64)])
    probability = (mean * x + (1 - mean) * (1 - x)).prod(-1)
    shards = x.split([3, 1, 4], -1)
    bet = [distributed._numerics.bets(shard, 8, 0.3) for shard in shards]
    at = torch.full((len(x),), mean, dtype=F64)
    log_wealth = sum(distributed._numerics.log_wealth(*each, at) for each in zip(shards, bet, strict=True))
    assert (probability * log_wealth.exp()).sum().item() == pytest.approx(1, abs=1e-12)


def test_joined_wealth_certifies_more_than_joined_bounds(rng):
    """A twentieth of values are 1: the margin of all, and of the average of eight bounds that share one delta."""
    x = (torch.rand(8, 2000, generator=rng) < 0.05).double()
    whole = distributed.tv_upper_bound(x) - x.mean().item()
    average = sum(distributed.tv_upper_bound(shard, delta=1e-8 / 8) for shard in x) / 8 - x.mean().item()
    one = verify.tv_upper_bound(x.flatten()) - x.mean().item()
    assert one <= whole < 1.1 * one  # that each gambler learns the spread by himself costs little
    assert average > math.sqrt(8) * one


def test_added_e_values_lose_evidence(rng):
    """The same draws, of a law 10 % off, judged by their counts and by the E-values of four shards."""
    p, wrong = torch.tensor([0.5, 0.3, 0.2]).double().log(), torch.tensor([0.45, 0.33, 0.22]).double().log()
    counts = torch.bincount(torch.multinomial(wrong.exp(), 40_000, True, generator=rng), minlength=3)
    parts = [torch.bincount(torch.multinomial(wrong.exp(), 10_000, True, generator=rng), minlength=3) for _ in range(4)]
    together = verify.log_e_value(sum(parts), p)
    each = torch.tensor([verify.log_e_value(part, p) for part in parts], dtype=F64)
    assert each.logsumexp(0) - math.log(4) < 0.5 * together  # the average of E-values is an E-value
    assert each.sum() < together  # and so is their product
    assert verify.match_counts(counts, p, claim="ranks").decision == "REJECT"


def test_match_counts_is_match():
    p = random_law(4, verify.rng("ranks"))
    draws = torch.tensor([0, 3, 3, 1, 3, 2])
    assert verify.match_counts(draws.bincount(), p, claim="ranks") == verify.match(draws, p, claim="ranks")


# --- streams ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2, 3, 4, 9])
def test_shards_are_the_same_work_for_every_number_of_ranks(size, monkeypatch):
    def of(rank: int, of_size: int) -> list:
        monkeypatch.setattr(distributed, "_place", lambda group: (rank, of_size))
        monkeypatch.setattr(distributed, "_meet", lambda said, error, group: said)
        drawn = [(s.number, s.n, torch.rand(2, generator=s.generator)) for s in distributed.shards("ranks", 7, 23)]
        return drawn

    whole, parts = of(0, 1), [of(rank, size) for rank in range(size)]
    assert [number for number, _, _ in whole] == list(range(7)) and sum(n for _, n, _ in whole) == 23
    assert {n for _, n, _ in whole} == {3, 4}
    assert len({u[0].item() for _, _, u in whole}) == 7
    for rank, part in enumerate(parts):
        assert [number for number, _, _ in part] == list(range(rank, 7, size))
        assert all(n == whole[number][1] and torch.equal(u, whole[number][2]) for number, n, u in part)


# --- resampling ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("size", SIZES)
def test_ancestors_are_those_of_one_process(size):
    one = alone()["systematic"].ancestors
    ancestors = joined(size, "systematic", "ancestors", -1)
    assert torch.equal(ancestors, one)
    number, half, even, pair, nothing = (
        torch.cat([found["systematic"].particles[i] for found in work(size)], 1) for i in range(5)
    )
    expected = ancestors + 4000 * torch.arange(5)[:, None]
    events = torch.stack([expected, -expected], -1)
    assert torch.equal(number, expected) and torch.equal(half, events.half()) and torch.equal(even, expected % 2 == 0)
    assert torch.equal(pair, events.to(torch.complex64)) and nothing.shape == (5, 4000, 0)
    assert torch.equal(joined(size, "even", "ancestors", -1), torch.arange(12)[None])
    host = torch.arange(4000) // (4000 // size)
    moved = [(ancestors // (4000 // size) != host)[:, host == rank].sum().item() for rank in range(size)]
    assert [found["systematic"].arrived for found in work(size)] == moved and sum(moved) > 0
    assert all(found["even"].arrived == 0 for found in work(size))


def test_one_process_is_systematic_resampling():
    w = ranks.weights_of_all()
    plain = resampling.systematic(w, w.shape[-1], generator=verify.rng("ranks-systematic"))
    assert torch.equal(alone()["systematic"].ancestors, plain)


@pytest.mark.parametrize("n", [1, 2, 7, 1000])
def test_integer_sums_do_not_depend_on_the_split(n, rng):
    """Ancestors follow from sums of integers, so a split at any place changes nothing."""
    w = torch.rand(3, n, generator=rng, dtype=F64) ** 20
    w[:, 0], w[0] = 1.0, 2.0**-40  # all of one size, and far below the unit of a sum of floats
    u = torch.tensor([0.0, 1 - 2**-53, 0.5], dtype=F64)
    words = distributed._words(w)
    whole = distributed._through(words, words[..., -1], u, n)
    for cut in {1, n // 3, n // 2} & set(range(1, n)):
        left, right = distributed._words(w[:, :cut]), distributed._words(w[:, cut:])
        right = right + left[..., -1:]
        assert torch.equal(torch.cat([left, right], -1).diff(dim=-1), words.diff(dim=-1))
        parts = [distributed._through(part, right[..., -1], u, n) for part in (left, right)]
        assert torch.equal(torch.cat(parts, -1), whole)
    assert bool((whole.diff(dim=-1) >= 0).all()) and bool((whole[:, -1] == n).all())
    expected = n * w / w.sum(-1, keepdim=True)
    assert bool(((whole.diff(dim=-1, prepend=torch.zeros(3, 1).long()) - expected).abs() < 1 + 1e-9).all())


# --- strings ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("key", ["smc model", "smc proposal"])
def test_strings_whose_draws_are_those_of_one_process_are_the_same(key, size):
    one = alone()[key]
    assert torch.equal(joined(size, key, "particles", 1), one.particles)
    assert torch.equal(joined(size, key, "ancestors", 2), one.ancestors)
    assert bool((one.ancestors != torch.arange(24)).any())
    torch.testing.assert_close(joined(size, key, "log_weights", 1), one.log_weights, rtol=0, atol=1e-13)
    for field in ("log_partition", "ess"):
        for found in work(size):
            torch.testing.assert_close(getattr(found[key], field), getattr(one, field), rtol=1e-13, atol=1e-13)


def test_one_process_is_twisted_smc():
    g = verify.rng("ranks-one"), verify.rng("ranks-one")
    for proposal in (None, ranks.OTHER):
        options = {"threshold": 0.9, "runs": 3, "proposal": proposal}
        one = smc.twisted_smc(CHAIN, ranks.gain(), LENGTH, 24, generator=g[0], **options)
        same = distributed.twisted_smc(CHAIN, ranks.gain(), LENGTH, 24, generator=g[1], **options)
        for a, b in zip(same, one, strict=True):
            torch.testing.assert_close(a, b.to(a.dtype), rtol=1e-13, atol=1e-13)


@pytest.mark.slow
@pytest.mark.parametrize("size", [1, *SIZES])
def test_exact_values_leave_no_variance(size):
    z = CHAIN.tilt(SYMBOLS, 1.0, LENGTH).log_partition
    for found in work(size):
        torch.testing.assert_close(found["smc exact"].log_partition, z.expand(2), rtol=1e-13, atol=1e-13)


# --- mistakes --------------------------------------------------------------------------------------------------------

# What is raised, and what the message says. {last} is the number of the last rank, which makes the mistake.
MISTAKES = {
    "beta": (ValueError, "beta must be the same on all ranks, got 0.8 on rank 0 and 0.7 on rank {last}"),
    "beta tensor": (ValueError, "beta must be the same on all ranks, got a tensor of shape (2,) with hash"),
    "bad beta": (RankFailed, "rank {last} of {size}: ValueError: beta must be finite and > 0, got -1.0"),
    "rule": (ValueError, "rule must be the same on all ranks, got soft on rank 0 and hard on rank {last}"),
    "dtype": (ValueError, "candidates must be the same on all ranks, got ['float64', [2], 'cpu'] on rank 0"),
    "rows": (ValueError, "['float64', [1], 'cpu'] on rank {last}"),
    "event": (ValueError, "['float64', [2, 1], 'cpu'] on rank {last}"),
    "nan": (RankFailed, "rank {last} of {size}: ValueError: rewards must be finite or -inf"),
    "no generator": (RankFailed, "rank {last} of {size}: TypeError: generator must be a torch.Generator, got NoneType"),
    "one stream": (ValueError, "generator must be another stream on each rank"),
    "no candidates": (ValueError, "chunks must hold at least one candidate on some rank, got none"),
    "all excluded": (ValueError, "rewards must leave at least one outcome of positive mass per row"),
    "reward model": (RankFailed, "rank {last} of {size}: RuntimeError: the reward model has no memory left"),
    "device": (RankFailed, "rank {last} of {size}: ValueError: rewards must be on a device that the backend"),
    "weights elsewhere": (RankFailed, "log_weights must be on a device that the backend of the group can send from"),
    "another function": (ValueError, "got best_of_n on rank 0 and weight_stats on rank {last}"),
    "block": (RankFailed, "rank {last} of {size}: OSError: no file"),
    "said": (ValueError, "prompts must be the same on all ranks, got 8 on rank 0 and 7 on rank {last}"),
    "weights rows": (ValueError, "batch of log_weights must be the same on all ranks, got [2] on rank 0 and [1]"),
    "weights excluded": (ValueError, "log_weights must leave at least one outcome of positive mass per row"),
    "fraction": (ValueError, "fraction must be the same on all ranks, got 0.5 on rank 0 and 0.75 on rank {last}"),
    "fraction out of reach": (ValueError, "fraction must lie strictly between 1.0"),
    "curves": (ValueError, "n of curves must be the same on all ranks, got 3 on rank 0 and 2 on rank {last}"),
    "no curves": (ValueError, "curves must hold at least one curve on some rank, got none"),
    "counts": (ValueError, "shape of counts must be the same on all ranks, got [3] on rank 0 and [2] on rank {last}"),
    "negative": (RankFailed, "rank {last} of {size}: ValueError: counts must be >= 0, got -1"),
    "delta": (ValueError, "delta must be the same on all ranks, got 0.01 on rank 0 and 0.001 on rank {last}"),
    "delta of 1": (RankFailed, "rank {last} of {size}: ValueError: delta must lie strictly between 0 and 1, got 1.0"),
    "value": (RankFailed, "rank {last} of {size}: ValueError: x must lie in [0, 1], got -0.1"),
    "values elsewhere": (RankFailed, "x must be on a device that the backend of the group can send from"),
    "no values": (ValueError, "x must hold at least one value on some rank, got none"),
    "shards": (RankFailed, "number must be at most the number of candidates, 4, got 5 shards"),
    "shards differ": (ValueError, "n must be the same on all ranks, got 4 on rank 0 and 5 on rank {last}"),
    "places": (ValueError, "shape of log_weights must be the same on all ranks, got [2, 3] on rank 0 and [2, 2]"),
    "particle": (ValueError, "particles must be the same on all ranks, got [['float64', [2, 3]]] on rank 0"),
    "particle shape": (RankFailed, "particles must begin with the shape of log_weights, (2, 3), on cpu, got shape (1,"),
    "no weight": (ValueError, "log_weights must leave at least one outcome of positive mass per row"),
    "length": (ValueError, "length must be the same on all ranks, got 3 on rank 0 and 4 on rank {last}"),
    "gain": (RankFailed, "rank {last} of {size}: ValueError: log_values must return numbers that are finite or -inf"),
    "threshold": (ValueError, "threshold must be the same on all ranks, got 0.5 on rank 0 and 0.75 on rank {last}"),
    "proposal": (ValueError, "proposal must be the same on all ranks, got False on rank 0 and True on rank {last}"),
    "one stream of strings": (ValueError, "generator must be another stream on each rank"),
    "long": (RankFailed, "rank {last} of {size}: ValueError: ééééé"),
}


@pytest.mark.slow
@pytest.mark.parametrize("size", SIZES)
def test_every_mistake_is_raised_on_every_rank(size):
    everywhere = [rank["mistakes"] for rank in started(size)]
    assert everywhere[0].keys() == MISTAKES.keys() | {"and all is well"}
    for name, (kind, text) in MISTAKES.items():
        text = text.format(last=size - 1, size=size)
        for rank, found in enumerate(everywhere):
            raised, message, cause = found[name]
            assert raised == kind.__name__ and text in message, (name, rank, message)
            own = kind is RankFailed and f"rank {rank} of {size}" in message
            assert (cause != "NoneType") == own, (name, rank)  # the failing rank shows where
    assert all(found["and all is well"] == 3 * size for found in everywhere)


def test_pages_are_judged_without_processes():
    assert distributed._agreed(['{"n": 3, "_n": 1}', '{"n": null}', '{"n": 3, "_n": 4}']) == {
        "n": 3,
        "_n": [1, None, 4],
    }
    with pytest.raises(ValueError, match="n must be the same on all ranks, got 3 on rank 1 and 4 on rank 2"):
        distributed._agreed(['{"n": null}', '{"n": 3}', '{"n": 4}'])
    with pytest.raises(RankFailed, match="rank 0 of 3: a; rank 2 of 3: b"):
        distributed._agreed(["!a", "{}", "!b"])
    with pytest.raises(ValueError, match="generator must be another stream on each rank"):
        distributed._agreed(['{"_stream": "x"}', '{"_stream": null}', '{"_stream": "x"}'])


def test_alone_an_error_is_itself():
    with pytest.raises(KeyError, match="lost"), distributed.together():
        raise KeyError("lost")
    with distributed.together() as said:
        said["n"] = 3
    assert said == {"n": 3}


def test_chunks_that_do_not_fit():
    y, g = torch.zeros(2, 3, dtype=F64), verify.rng("chunks")
    for chunks in ([(y, y, g), (y.float(), y, g)], [(y, y, g), (y[:1], y[:1], g)], [(y, y, g), (y[..., None], y, g)]):
        with pytest.raises(ValueError, match="chunks must have one batch shape, event shape and dtype"):
            distributed.best_of_n(chunks, 1.0)
    with pytest.raises(ValueError, match="candidates must have the shape of rewards"):
        distributed.best_of_n([(y[:, :2], y, g)], 1.0)
    with pytest.raises(ValueError, match="beta must broadcast to shape"):
        distributed.best_of_n([(y, y, g)], torch.ones(3))
    kept = distributed.best_of_n([(y[:, :0], y[:, :0], g), (y, y, g), (y[:, :0], y[:, :0], g)], 1.0)
    assert kept.n == 3


@pytest.mark.parametrize("beta", [2.0, 7.0])  # warm: at a cold one the part of the largest reward always wins
def test_keys_of_parts_are_compared_on_one_scale(beta):
    """Relative to the largest reward of its part a key is small; the parts are judged by what it is in full."""
    g = torch.Generator().manual_seed(0)
    tops = 3 * torch.randn(50, 4, generator=g, dtype=torch.float64)
    keys, log_totals = torch.rand(2, 50, 4, generator=g, dtype=torch.float64)
    whole = tops / beta + keys
    for rule in ("soft", "exponential"):
        owner, (top, key, log_total) = distributed._merged(torch.stack([tops, keys, log_totals]), beta, rule)
        assert torch.equal(owner, whole.argmax(-1))
        torch.testing.assert_close(top / beta + key, whole.amax(-1), rtol=1e-13, atol=1e-13)
        torch.testing.assert_close(top / beta + log_total, (tops / beta + log_totals).logsumexp(-1))
