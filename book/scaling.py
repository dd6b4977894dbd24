"""Select, resample and judge on any number of ranks; the verdicts are those of one process.

python scaling.py
torchrun --nproc-per-node 4 scaling.py
"""

import math
import os
import sys

import torch
import torch.distributed as dist
from tiltlib import categorical, distributed, resampling, selection, verify, weights

P = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64).log()
REWARDS = torch.tensor([0.0, 1.0, 2.0], dtype=torch.float64)
BETA, N, SHARDS, ROWS = 1.0, 12, 4, 210_000
LAWS = {
    "soft": selection.soft_best_of_n_law,
    "exponential": selection.exponential_best_of_n_law,
}


def candidates(claim, same=False):
    """This rank's share of N answers to each of ROWS prompts."""
    for shard in distributed.shards(claim, SHARDS, N):
        stream = verify.rng(claim) if same else shard.generator
        y = categorical.sample(P.expand(ROWS, -1), shard.n, generator=stream)
        yield y, REWARDS[y], shard.generator


def careless(claim, reward_of_shard):
    """Choose softly in each shard, then between shards by something else."""
    for y, rewards, g in candidates(claim):
        index = selection.soft_best_of_n(rewards, BETA, generator=g)
        yield y.gather(-1, index[:, None]), reward_of_shard(rewards)[:, None], g


def tied(claim, fair):
    """Seven of eight candidates tie, in shards of 4, 2, 1 and 1; keep an index."""
    for shard in distributed.shards(claim, 4, 4):
        index = torch.tensor([[0, 1, 2, 3], [4, 5], [6], [7]][shard.number])
        rewards = (index > 0).double().expand(ROWS, -1)
        if fair:
            yield index.expand(ROWS, -1), rewards, shard.generator
        else:  # the shard breaks its ties, and forgets by which number
            own = selection.best_of_n(rewards, generator=shard.generator)
            yield index[own][:, None], rewards[:, -1:], shard.generator


def share(x, dim=-1):
    """What this rank holds of something that all of them know."""
    if not dist.is_initialized():
        return x
    return x.chunk(dist.get_world_size(), dim)[dist.get_rank()]


def judged(winner, law, claim, wrong):
    """Count a share of the rows on each rank, add the counts, judge once."""
    counts = share(winner).bincount(minlength=len(law))
    counts = distributed.add_counts(counts)
    return verify.match_counts(counts, law, claim=claim, versus=[wrong])


def select(rule):
    claim = f"merged-selection.{rule}-ranks"
    law = LAWS[rule](P, REWARDS, BETA, N)
    off = LAWS[rule](P, REWARDS, 1.05 * BETA, N)
    kept = distributed.best_of_n(candidates(claim), BETA, rule=rule).winner
    verify.report(judged(kept, law, claim, off))
    verify.falsify(
        lambda q: judged(kept, q, claim, law), off, claim=f"{claim}!beta*1.05"
    )
    one = distributed.best_of_n(candidates(claim, same=True), BETA, rule=rule)
    uniform = distributed.best_of_n(
        careless(claim, lambda r: torch.zeros(ROWS)), BETA
    )
    largest = distributed.best_of_n(
        careless(claim, lambda r: r.logsumexp(-1)), BETA, rule="hard"
    )
    for slug, wrong in {
        "one-stream": one,
        "uniform-shard": uniform,
        "largest-sum": largest,
    }.items():
        verify.falsify(
            lambda x: judged(x, law, claim, off),
            wrong.winner,
            claim=f"{claim}!{slug}",
        )


def ties():
    claim = "merged-selection.ties-ranks"
    law = torch.tensor([0.0] + 7 * [1 / 7], dtype=torch.float64).log()
    lost = torch.tensor(
        [0] + 3 * [1 / 12] + 2 * [1 / 8] + 2 * [1 / 4], dtype=torch.float64
    ).log()
    off = (law + 0.05 * torch.arange(8)).log_softmax(-1)
    keep = lambda fair: distributed.best_of_n(tied(claim, fair), BETA, rule="hard")
    kept = keep(True).winner
    verify.report(judged(kept, law, claim, lost))
    verify.falsify(
        lambda x: judged(x, law, claim, lost),
        keep(False).winner,
        claim=f"{claim}!lost-tie-key",
    )
    verify.falsify(
        lambda q: judged(kept, q, claim, lost),
        off,
        claim=f"{claim}!5-percent-by-place",
    )


def resample():
    claim, n = "resampling-over-ranks.ranks", 4096
    log_w = 2 * torch.randn(3, n, generator=verify.rng(claim)).double()

    def ancestors(log_w):
        g = verify.rng(claim, salt="u")
        got = distributed.systematic(share(log_w), generator=g).ancestors
        everywhere = torch.zeros(3, n, dtype=torch.int64)
        share(everywhere)[:] = got
        return distributed.add_counts(everywhere)

    g = verify.rng(claim, salt="u")
    one = resampling.systematic(log_w, n, generator=g)
    blocks = log_w.view(12, n // 4)
    alone = resampling.systematic(blocks, n // 4, generator=verify.rng(claim))
    alone = alone.view(3, 4, -1) + n // 4 * torch.arange(4)[:, None]
    check = lambda x: verify.exact(x, one, claim=claim)
    verify.report(check(ancestors(log_w)))
    for slug, wrong in {
        "log-weights*1.05": ancestors(1.05 * log_w),
        "each-shard-alone": alone.flatten(1),
    }.items():
        verify.falsify(check, wrong, claim=f"{claim}!{slug}")


def add_up():
    claim = "merged-sums.ranks"
    log_w = 2 * torch.randn(3, 4096, generator=verify.rng(claim)).double()
    stats = distributed.weight_stats(share(log_w))
    temperature = distributed.beta_for_ess(share(log_w), 0.5)
    got = torch.stack([stats.log_mean, stats.ess, temperature])
    one = torch.stack(
        [
            weights.log_mean(log_w),
            weights.ess(log_w),
            weights.beta_for_ess(log_w, 0.5),
        ]
    )
    check = lambda x: verify.exact(x, one, 1e-9, claim=claim)
    verify.report(check(got))
    verify.falsify(check, 1.05 * got, claim=f"{claim}!statistics*1.05")


def log_wealth(shards, u, delta):
    """Each shard has a gambler of its own; their wealths multiply."""
    total, n = 0.0, shards.numel()
    for x in shards:
        t = torch.arange(2, len(x) + 2)
        mean = (0.5 + x.cumsum(0)) / t
        spread = (0.25 + (x - mean).square().cumsum(0)) / t
        earlier = torch.cat([x.new_tensor([0.25]), spread[:-1]])
        bets = (2 * math.log(1 / delta) / (n * earlier)).sqrt()
        total += (-bets.clamp(max=0.75 / (1 - u)) * (x - u)).log1p().sum()
    return total


def certify():
    claim, delta = "merged-certificate.ranks", 1e-8
    q = torch.tensor([0.48, 0.31, 0.21], dtype=torch.float64).log()
    g = verify.rng(claim)
    y = categorical.sample(q.expand(SHARDS, -1), 20_000, generator=g)
    x = (1 - (P - q).exp()).clamp(min=0)[y]
    bound = distributed.tv_upper_bound(share(x, 0), delta=delta)
    alone = [verify.tv_upper_bound(row, delta=delta / SHARDS) for row in x]
    check = lambda u: verify.exact(
        log_wealth(x, u, delta), math.log(1 / delta), 1e-9, claim=claim
    )
    verify.report(check(bound))
    for slug, wrong in {
        "bound*1.05": 1.05 * bound,
        "average-of-bounds": sum(alone) / SHARDS,
        "smallest-bound": min(alone),
    }.items():
        verify.falsify(check, wrong, claim=f"{claim}!{slug}")


if __name__ == "__main__":
    torch.set_num_threads(1)
    if "RANK" in os.environ:  # torchrun has started this process
        dist.init_process_group("gloo")
        if dist.get_rank():
            sys.stdout = open(os.devnull, "w")  # all judge, one prints
    select("soft")
    select("exponential")
    ties()
    resample()
    add_up()
    certify()
    if dist.is_initialized():
        dist.destroy_process_group()
