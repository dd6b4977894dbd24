"""What `test_distributed.py` runs on 1, 2 and 4 ranks: `torchrun --nproc-per-node 4 tests/ranks.py FILE`.

Every rank does its share of `work`, and tries `mistakes`, each of which some rank makes. FILE gets what all ranks
returned. In one process `work` runs without a group.
"""

import math
import sys
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from tiltlib import distributed, smc, stepwise, verify
from tiltlib.autoregressive import Gain
from tiltlib.markov import MarkovChain

F64 = torch.float64
P = torch.tensor([0.5, 0.3, 0.15, 0.05], dtype=F64).log()
REWARDS = torch.tensor([0.0, 1.0, 2.0, 2.0], dtype=F64)
BETA, N, SHARDS, ROWS = 0.7, 12, 4, 20_000
POOL = torch.tensor([0.0, 1.0, 1.0, -1.0, 1.0, 0.5, 1.0, 1.0], dtype=F64)  # ties on every rank of 2 and of 4


def place() -> tuple[int, int]:
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def mine(x: Tensor, dim: int = -1) -> Tensor:
    """The part of a tensor that this rank holds."""
    rank, size = place()
    return x.chunk(size, dim)[rank]


def drawn(n: int, generator: torch.Generator) -> Tensor:
    return torch.multinomial(P.exp().expand(ROWS, -1), n, replacement=True, generator=generator)


def by_shard(claim: str):
    for shard in distributed.shards(claim, SHARDS, N):
        y = drawn(shard.n, shard.generator)
        yield y, REWARDS[y], shard.generator


def by_rank(claim: str, candidates: str):
    """One chunk per rank; what `candidates` says is drawn by whom."""
    rank, size = place()
    y = drawn(N // size, verify.rng(claim, salt=candidates.format(rank)))
    yield y, REWARDS[y], verify.rng(claim, salt=f"noise {rank}")


def wrong(name: str):
    """A careless merge."""
    right = distributed._merged
    noise = verify.rng("careless")

    def merged(states: Tensor, beta: Any, rule: str) -> tuple[Tensor, Tensor]:
        owner, state = right(states, beta, rule)
        tops, _, log_totals = states
        if name == "uniform rank":
            owner = torch.randint(states.shape[-1], owner.shape, generator=noise)
        if name == "largest sum":
            owner = (log_totals + (tops - tops.amax(-1, keepdim=True)) / beta).argmax(-1)
        if name == "lost tie key":
            owner = (tops == tops.amax(-1, keepdim=True)).long().argmax(-1)
        return owner, state

    return merged


def law_of(call, merge: str | None = None) -> Tensor:
    right = distributed._merged
    distributed._merged = wrong(merge) if merge else right
    try:
        return call().winner
    finally:
        distributed._merged = right


def of_pool(claim: str):
    rank, _ = place()
    part = mine(POOL).expand(ROWS, -1)
    yield mine(torch.arange(len(POOL))).expand(ROWS, -1), part, verify.rng(claim, salt=f"{rank}")


class Tabled(MarkovChain):
    """A chain whose draws depend on the place alone, so that no number of ranks changes them."""

    def __init__(self, chain: MarkovChain, uniforms: Tensor):
        super().__init__(chain.rows(0, torch.arange(len(chain.alphabet))), chain.alphabet)
        self.uniforms = iter(uniforms)

    def draw(self, state, *, generator):
        cdf = self.next_logps(state).exp().cumsum(-1)
        u = mine(next(self.uniforms)).reshape(-1, 1)
        return torch.searchsorted(cdf, u.clamp(max=0.999)).squeeze(-1)


CHAIN = MarkovChain(torch.log_softmax(torch.linspace(-1, 1, 9, dtype=F64).sin().view(3, 3) * 3, -1), "abc")
OTHER = MarkovChain(torch.log_softmax(torch.linspace(1, -1, 9, dtype=F64).cos().view(3, 3), -1), "abc")
SYMBOLS = torch.tensor([0.0, 1.0, 2.5], dtype=F64)
LENGTH = 6


def gain() -> Gain:
    return smc.by_value(lambda state: (state.contexts == 1).double() * math.log(4) - (state.contexts == 2) * 0.5, CHAIN)


def strings() -> dict[str, Any]:
    found, (rank, size) = {}, place()
    for name, proposal in (("model", None), ("proposal", OTHER)):
        uniforms = torch.rand(LENGTH, 3, 24, generator=verify.rng("ranks"), dtype=F64)
        models = (
            {"model": CHAIN, "proposal": Tabled(OTHER, uniforms)} if proposal else {"model": Tabled(CHAIN, uniforms)}
        )
        g = verify.rng("ranks-resample", salt="" if rank == 0 else f"{rank}")
        found[f"smc {name}"] = distributed.twisted_smc(
            models["model"],
            gain(),
            LENGTH,
            24 // size,
            generator=g,
            threshold=0.9,
            runs=3,
            proposal=models.get("proposal"),
        )
    tilt = CHAIN.tilt(SYMBOLS, 1.0, LENGTH)
    exact = stepwise.gain(CHAIN, SYMBOLS, 1.0, CHAIN.soft_values(SYMBOLS, 1.0, LENGTH), tilt)
    g = verify.rng("ranks-smc", salt=f"{rank}")
    found["smc exact"] = distributed.twisted_smc(CHAIN, exact, LENGTH, 8 // size, generator=g, runs=2, proposal=tilt)
    return found


def weights_of_all() -> Tensor:
    x = 3 * torch.randn(5, 4000, generator=verify.rng("ranks-weights"), dtype=F64)
    x[1, :2000] = -math.inf  # all of a rank of 2, and of two ranks of 4
    x[2] = -math.inf
    x[2, 1234] = 5.0  # one takes all places
    x[3] = torch.arange(4000) % 3 - 1000.0
    return x


def certified() -> Tensor:
    """Values in [0, 1] whose spread differs between shards."""
    x = torch.rand(4, 500, generator=verify.rng("ranks-certified"), dtype=F64)
    return x * torch.tensor([[0.1], [0.5], [1.0], [0.01]])


def work() -> dict[str, Any]:
    (rank, size), found = place(), {}
    for rule in distributed.RULES:
        found[f"shards {rule}"] = distributed.best_of_n(by_shard("ranks-shards"), BETA, rule=rule)
        found[f"ranks {rule}"] = distributed.best_of_n(by_rank(f"ranks-{rule}", "{}"), BETA, rule=rule)
    for merge in ("uniform rank", "largest sum"):
        found[merge] = law_of(lambda: distributed.best_of_n(by_rank("ranks-soft", "{}"), BETA), merge)
    found["one stream"] = law_of(lambda: distributed.best_of_n(by_rank("ranks-soft", "all"), BETA))
    found["ties"] = law_of(lambda: distributed.best_of_n(of_pool("ranks-ties"), BETA, rule="hard"))
    found["lost tie key"] = law_of(
        lambda: distributed.best_of_n(of_pool("ranks-ties"), BETA, rule="hard"), "lost tie key"
    )
    # What is kept moves exactly, whatever it is; the last rank has nothing, and the first row nothing on rank 0.
    for i, y in enumerate(candidates()):
        g = verify.rng("ranks-dtypes", salt=f"{rank}")
        rewards = torch.zeros(5, 3, dtype=F64)
        if rank in (0, size - 2):
            rewards[:, 1] = torch.tensor([7.0, 3, 7, 3, 7]) if rank == size - 2 else torch.tensor([0, 7.0, 0, 7, 0])
        if rank == 0 and size > 2:
            rewards[0] = -math.inf
        found[f"kept {i}"] = distributed.best_of_n([] if rank == size - 1 and size > 1 else [(y, rewards, g)], 0.001)
    w = weights_of_all()
    g = verify.rng("ranks-systematic") if rank == 0 else verify.rng("ranks-systematic", salt=f"{rank}")
    own = torch.arange(5 * 4000).view(5, 4000)
    events = torch.stack([own, -own], -1)
    found["systematic"] = distributed.systematic(
        mine(w),
        *(mine(x, 1) for x in (own, events.half(), own % 2 == 0, events.to(torch.complex64), events[..., :0])),
        generator=g,
    )
    found["even"] = distributed.systematic(torch.zeros(1, 12 // size), mine(torch.arange(12)[None]), generator=g)
    # Shares of different size; of 2 ranks one has no curve, of 4 one has no curve and one no weight.
    part = w.tensor_split([7, 1000, 1000][: size - 1], -1)[rank]
    found["stats"] = distributed.weight_stats(part)
    found["beta"] = distributed.beta_for_ess(part[[0, 1, 3]], 0.4)
    curves = torch.rand(7, 4, generator=verify.rng("ranks-curves"), dtype=F64)
    own = curves.tensor_split({1: [], 2: [7], 4: [2, 2, 3]}[size])[rank]
    found["curves"] = distributed.average_curves(own, own.square())
    found["counts"] = distributed.add_counts(torch.tensor([2**60 + rank, 0, 3]) // size)
    found["certificate"] = distributed.tv_upper_bound(mine(certified(), 0), delta=1e-3)
    found["uneven certificate"] = distributed.tv_upper_bound(certified()[0].tensor_split([7] * (size - 1))[rank])
    if size == 4:  # some ranks among themselves
        pair = dist.new_group([1, 3])
        try:
            found["pair"] = distributed.weight_stats(torch.full((2,), float(rank)), group=pair)
        except ValueError as error:
            found["pair"] = str(error)
    return {**found, **strings()}


def candidates() -> list[Tensor]:
    x = torch.arange(5 * 3 * 2).view(5, 3, 2) + 100 * place()[0]
    special = torch.tensor([math.nan, -0.0, math.inf]).expand(5, 3)
    return [x, x[..., 0] % 2 == 0, x.to(torch.bfloat16), x.to(torch.complex128), x.to(torch.uint8), special, x[..., :0]]


# --- mistakes --------------------------------------------------------------------------------------------------------


def failing():
    rank, size = place()
    y = torch.zeros(2, 3, dtype=F64)
    yield y, y, verify.rng("failing", salt=f"{rank}")
    if rank == size - 1:
        raise RuntimeError("the reward model has no memory left")


def mistakes() -> dict[str, Any]:
    rank, size = place()
    last = rank == size - 1
    g = verify.rng("mistakes", salt=f"{rank}")
    y = torch.zeros(2, 3, dtype=F64)
    far = torch.zeros(2, 3, device="meta")

    def one(beta=1.0, x=y, rule="soft", generator=g):
        return distributed.best_of_n([(x, x, generator)], beta, rule=rule)

    def block():
        with distributed.together():
            if last:
                raise OSError("no file")

    def said():
        with distributed.together() as agreed:
            agreed["prompts"] = 7 if last else 8

    tries = {
        "beta": lambda: one(0.7 if last else 0.8),
        "beta tensor": lambda: one(torch.tensor([1.0, 2.0 + last])),
        "bad beta": lambda: one(-1.0 if last else 1.0),
        "rule": lambda: one(rule="hard" if last else "soft"),
        "dtype": lambda: one(x=y.float() if last else y),
        "rows": lambda: one(x=y[:1] if last else y),
        "event": lambda: distributed.best_of_n([(y[..., None] if last else y, y, g)], 1.0),
        "nan": lambda: one(x=y * math.nan if last else y),
        "no generator": lambda: one(generator=None if last else g),
        "one stream": lambda: one(generator=verify.rng("mistakes")),
        "no candidates": lambda: distributed.best_of_n([], 1.0),
        "all excluded": lambda: one(x=y - math.inf),
        "reward model": lambda: distributed.best_of_n(failing(), 1.0),
        "device": lambda: one(x=far if last else y),
        "weights elsewhere": lambda: distributed.weight_stats(far if last else y),
        "another function": lambda: distributed.weight_stats(y) if last else one(),
        "block": block,
        "said": said,
        "weights rows": lambda: distributed.weight_stats(y[:1] if last else y),
        "weights excluded": lambda: distributed.weight_stats(y - math.inf),
        "fraction": lambda: distributed.beta_for_ess(y.cumsum(-1) + rank, 0.5 + last / 4),
        "fraction out of reach": lambda: distributed.beta_for_ess(y, 0.5),
        "curves": lambda: distributed.average_curves(y[:, :2] if last else y, y[:, :2] if last else y),
        "no curves": lambda: distributed.average_curves(y[:0], y[:0]),
        "counts": lambda: distributed.add_counts(torch.tensor([1, 2, 3][: 3 - last])),
        "negative": lambda: distributed.add_counts(torch.tensor([1, 2 - 3 * last])),
        "delta": lambda: distributed.tv_upper_bound(y, delta=1e-3 if last else 1e-2),
        "delta of 1": lambda: distributed.tv_upper_bound(y, delta=1.0 if last else 0.5),
        "value": lambda: distributed.tv_upper_bound(y - last * 0.1),
        "values elsewhere": lambda: distributed.tv_upper_bound(far if last else y),
        "no values": lambda: distributed.tv_upper_bound(y[:0]),
        "shards": lambda: distributed.shards("mistakes", 5, 4),
        "shards differ": lambda: distributed.shards("mistakes", 4, 4 + last),
        "places": lambda: distributed.systematic(y[:, : 3 - last], generator=g),
        "particle": lambda: distributed.systematic(y, y.float() if last else y, generator=g),
        "particle shape": lambda: distributed.systematic(y, y[:1] if last else y, generator=g),
        "no weight": lambda: distributed.systematic(y - math.inf, y, generator=g),
        "length": lambda: distributed.twisted_smc(CHAIN, gain(), 3 + last, 4, generator=g),
        "gain": lambda: distributed.twisted_smc(CHAIN, smc.by_value(loses, CHAIN), 3, 4, generator=g),
        "threshold": lambda: distributed.twisted_smc(CHAIN, gain(), 3, 4, generator=g, threshold=0.5 + last / 4),
        "proposal": lambda: distributed.twisted_smc(CHAIN, gain(), 3, 4, generator=g, proposal=OTHER if last else None),
        "one stream of strings": lambda: distributed.twisted_smc(CHAIN, gain(), 3, 4, generator=verify.rng("mistakes")),
        "long": lambda: long_words(last),
    }
    found: dict[str, Any] = {}
    for name, call in tries.items():
        try:
            call()
            found[name] = None
        except Exception as error:
            found[name] = (type(error).__name__, str(error), type(error.__cause__).__name__)
    found["and all is well"] = distributed.weight_stats(y).n
    return found


def loses(state) -> Tensor:
    late = state.step == 2 and place()[0] == place()[1] - 1
    return torch.zeros(len(state.contexts), dtype=F64) + (math.nan if late else 0.0)


def long_words(last: bool) -> None:
    with distributed.together():
        if last:
            raise ValueError("é" * 5000)


def main(path: str) -> None:
    dist.init_process_group("gloo")
    found = {"work": work(), "mistakes": mistakes()}
    everything: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everything, found)
    if dist.get_rank() == 0:
        torch.save(everything, path)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
