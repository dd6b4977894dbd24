"""Speed, memory and accuracy beside naive code and other libraries: `make bench`.

A gate bounds a ratio of times taken in turn in this process, an error or a number of bytes, never a time. Times are
processor time of one thread, which other load on the machine changes least. Add a row with `faster` (of a generator,
return what to time: ours, then others, the fastest of which counts) or `at_most` (return a number).
Ratios differ between processors, so far by up to two: a gate holds on each of the three tried, but for the share of the
checks in a small call, which is .44 to .54 on an EPYC with AVX2 and .37 to .44 on a Xeon of 2.8 GHz.
`python tests/bench.py WORD` runs only the rows whose name holds the word.
"""

import ctypes
import importlib.util
import itertools
import math
import multiprocessing
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import cache, partial
from inspect import isfunction
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import torch
from scipy.optimize import minimize_scalar
from scipy.special import gammaln
from torch import Generator, Tensor

from tiltlib import (
    _checks,
    categorical,
    diffusion,
    losses,
    markov,
    mixtures,
    policies,
    pool,
    resampling,
    selection,
    smc,
    stepwise,
    verify,
    weights,
)

torch.set_num_threads(1)  # after the imports, any of which may reset it
LINUX = sys.platform == "linux"
if LINUX:
    # Whether glibc gives freed memory back to the system depends on what was freed before, and fetching it again takes
    # longer than resampling. Keep it (M_TRIM_THRESHOLD; M_MMAP_THRESHOLD at its largest), whoever freed it.
    ctypes.CDLL(None).mallopt(-1, 2**30)
    ctypes.CDLL(None).mallopt(-3, 2**25)

# Candidates per chunk of a stream: shorter chunks pay for calls (0.4 ms per chunk), longer ones for page faults.
CHUNK = 2**17
Call = Callable[[], object]
Cells = tuple[str, str, str, str, str]  # ours, other, ratio, gate, ok
MARK = {True: "yes", False: "NO"}
ROWS: dict[str, Callable[[Generator], Cells]] = {}


def faster(what: str, times: float, calls: Callable[[Generator], tuple[Call, ...]], *, peer: str = "") -> None:
    """Add a row: ours must be so many times faster than the fastest other. Without the module `peer`: SKIP."""

    def row(g: Generator) -> Cells:
        if peer and importlib.util.find_spec(peer) is None:
            return "-", "-", "-", "-", "SKIP"
        ours, *others = medians(calls(g))
        other, ok = min(others), min(others) / ours >= times
        return f"{ours * 1e3:.1f} ms", f"{other * 1e3:.0f} ms", f"{other / ours:.1f}", f">= {times:g}", MARK[ok]

    ROWS[what] = row


def at_most(what: str, limit: float, number: Callable[[Generator], float], *, peer: str = "") -> None:
    """Add a row: a number that must not exceed a limit. Without the module `peer`: SKIP."""

    def row(g: Generator) -> Cells:
        if peer and importlib.util.find_spec(peer) is None:
            return "-", "-", "-", "-", "SKIP"
        got = number(g)
        return f"{got:.2g}", "-", "-", f"<= {limit:g}", MARK[got <= limit]

    ROWS[what] = row


def arrives(what: str, limit: float, method: str) -> None:
    """Add a row: draws until a method has reached KL <= 1e-3 (must not exceed a limit), and its steps per second."""

    def row(g: Generator) -> Cells:
        draws, rate = trained(method)
        return f"{draws:.1e}", f"{rate:.0f}/s", "-", f"<= {limit:g}", MARK[draws <= limit]

    ROWS[what] = row


def medians(calls: tuple[Call, ...]) -> list[float]:
    """Time calls in turn, A B A B, so that what slows the machine down for a while slows all of them."""
    begin, rounds = time.process_time(), []
    while len(rounds) < 6 or (time.process_time() - begin < 1 and len(rounds) < 100):
        marks = [time.process_time()]
        for call in calls:
            call()
            marks.append(time.process_time())
        rounds.append(np.diff(marks))
    return np.median(rounds[1:], axis=0).tolist()  # the first round warms up


def instance(k: int, spread: float, g: Generator) -> tuple[Tensor, Tensor]:
    """Draw a reference law on k outcomes, and rewards that span exactly `spread`."""
    r = torch.rand(k, generator=g, dtype=torch.float64)
    ref_logps = torch.randn(k, generator=g, dtype=torch.float64).log_softmax(-1)
    return ref_logps, (r - r.min()) * (spread / (r.max() - r.min()))


def naive(ref_logps: Tensor, rewards: Tensor, m: int, n: int, g: Generator) -> tuple[Call, Call]:
    """Soft best-of-N as one writes it, in float64 and in float32: m x n draws, a softmax, one pick per row."""

    def run(probs: Tensor, rewards: Tensor) -> Tensor:
        candidates = torch.multinomial(probs, m * n, replacement=True, generator=g).view(m, n)
        pick = torch.multinomial(torch.softmax(rewards.take(candidates), -1), 1, generator=g)
        return candidates.gather(-1, pick).squeeze(-1)

    probs = ref_logps.exp()
    return partial(run, probs, rewards), partial(run, probs.float(), rewards.float())


def enumerated_law(ref_logps: Tensor, rewards: Tensor, n: int) -> Tensor:
    """Sum over every vector of counts: P(y) = sum_c Multinomial(c; n, p) c_y w_y / sum_k c_k w_k."""
    k = len(ref_logps)
    # Stars and bars: k - 1 bars among n + k - 1 places; the gaps between the bars are the counts.
    bars = itertools.chain.from_iterable(itertools.combinations(range(n + k - 1), k - 1))
    places = np.fromiter(bars, np.int64).reshape(-1, k - 1)
    counts = torch.from_numpy(np.diff(places, axis=1, prepend=-1, append=n + k - 1) - 1)
    # A product of binomial coefficients, each exact in float64; lgamma would lose two digits.
    choose = torch.tensor([[math.comb(a, b) for b in range(n + 1)] for a in range(n + 1)], dtype=torch.float64)
    left = n - (counts.cumsum(-1) - counts)
    mass = (choose[left, counts] * ref_logps.exp() ** counts).prod(-1, keepdim=True)
    weight = counts * (rewards - rewards.max()).exp()
    return (mass * weight / weight.sum(-1, keepdim=True)).sum(0)


def law_error(g: Generator) -> float:
    errors = []
    for k, n, spread in [(2, 2, 3), (2, 40, 50), (3, 40, 1), (4, 40, 50), (5, 7, 20), (6, 20, 6), (6, 40, 50)]:
        ref_logps, rewards = instance(k, spread, g)
        law = selection.soft_best_of_n_law(ref_logps, rewards, 1.0, n).exp()
        errors.append((law / enumerated_law(ref_logps, rewards, n) - 1).abs().max().item())
    return max(errors)


def law_sum(g: Generator) -> float:
    cases = itertools.product([2, 32, 4096], [100, 10**6, 10**12], [6, 300])
    laws = [selection.soft_best_of_n_law(*instance(k, spread, g), 1.0, n).exp() for k, n, spread in cases]
    return max(abs(math.fsum(law.tolist()) - 1) for law in laws)


def law_drift(g: Generator) -> float:
    """P_N = pi* (1 + c/N + d/N^2 + ...), c = E_{pi*} w - w, E_p w = 1: N |N (P_N/pi* - 1) - c| settles at |d|."""
    ref_logps, rewards = instance(32, 6, g)
    tilted = categorical.tilt(ref_logps, rewards, 1.0)
    w = (tilted - ref_logps).exp()
    c = (tilted.exp() * w).sum() - w
    laws = {n: selection.soft_best_of_n_law(ref_logps, rewards, 1.0, n) for n in (1000, 3000, 10_000, 30_000, 100_000)}
    d = [n * (n * torch.expm1(law - tilted) - c).abs().max().item() for n, law in laws.items()]
    return max(d) / min(d) - 1


def law(spread: float, g: Generator) -> tuple[Call, ...]:
    inputs = instance(4096, spread, g)
    return partial(selection.soft_best_of_n_law, *inputs, 1.0, 10**6), *naive(*inputs, 1, 10**6, g)


def law_draws(n: int, g: Generator) -> tuple[Call, ...]:
    ref_logps, rewards = instance(32, 6, g)
    exact = selection.soft_best_of_n_law(ref_logps, rewards, 1.0, n)
    return partial(categorical.sample, exact, 10_000, generator=g), *naive(ref_logps, rewards, 10_000, n, g)


def counts(g: Generator) -> tuple[Call, ...]:
    ref_logps, rewards = instance(32, 6, g)
    ours = partial(selection.soft_best_of_n_draw, ref_logps.expand(10_000, -1), rewards, 1.0, 1000, generator=g)
    return ours, *naive(ref_logps, rewards, 10_000, 1000, g)


def stream(k: int, m: int, n: int, g: Generator, chunk: int = CHUNK) -> tuple[Call, ...]:
    ref_logps, rewards = instance(k, 6, g)

    def chunks() -> Iterator[tuple[Tensor, Tensor]]:
        for start in range(0, n, chunk // m):
            size = min(chunk // m, n - start)
            candidates = categorical.sample(ref_logps, m * size, generator=g).view(m, size)
            yield candidates, rewards.take(candidates)

    return lambda: selection.soft_best_of_n_stream(chunks(), 1.0, generator=g), *naive(ref_logps, rewards, m, n, g)


def noise(m: int, n: int, g: Generator) -> float:
    """A logarithm per candidate for the noise, where a soft choice has one exponential and one number per row."""
    rewards = torch.randn(m, n, generator=g, dtype=torch.float64)
    rules = selection.exponential_best_of_n, selection.soft_best_of_n
    noisy, soft = medians(tuple(partial(rule, rewards, 1.0, generator=g) for rule in rules))
    return noisy / soft


def noise_law_sum(g: Generator) -> float:
    cases = itertools.product([2, 32, 4096], [2, 100, 10**6, 10**12], [6, 300])
    laws = [selection.exponential_best_of_n_law(*instance(k, spread, g), 1.0, n).exp() for k, n, spread in cases]
    return max(abs(math.fsum(law.tolist()) - 1) for law in laws)


def curve_of_a_pool(rule: str, g: Generator) -> tuple[Call, ...]:
    """All N up to 64 at once, and one exact law of the pool for each N, which is biased besides."""
    uniform, rewards = torch.full((2048,), -math.log(2048), dtype=torch.float64), instance(2048, 15, g)[1]

    def laws() -> list[Tensor]:
        return [selection.soft_best_of_n_law(uniform, rewards, 1.0, n) for n in range(1, 65)]

    return partial(pool.curve, rewards, 1.0, 64, rule=rule), laws


def errors_of_a_pool(g: Generator) -> float:
    rewards = instance(2048, 15, g)[1]
    errors, points = medians((partial(pool.standard_errors, rewards, 1.0, 64), partial(pool.curve, rewards, 1.0, 64)))
    return errors / points


def peak_memory() -> float:
    """Read the peak resident memory in MB. Not from getrusage: a child inherits that peak from its parent."""
    return int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0]) / 1024


def stream_peak(n: int) -> float:
    # Small chunks, so that also the smaller N goes through several and what grows afterwards grows with N.
    stream(4096, 1, n, verify.rng("bench", "memory"), chunk=2**14)[0]()
    return peak_memory()


def stream_growth(g: Generator) -> float:
    with multiprocessing.get_context("spawn").Pool(1) as fresh:  # in this process the naive code has set the peak
        before, after = fresh.map(stream_peak, [10**5, 10**8], chunksize=2)
    return after - before


def curve_peak(rule: str) -> float:
    rewards = instance(2048, 15, verify.rng("bench", "pool"))[1]
    pool.standard_errors(rewards[:128], 1.0, 64, rule="soft")
    before = peak_memory()
    pool.curve(rewards, 1.0, 64, rule=rule)
    pool.standard_errors(rewards, 1.0, 64, rule="soft")
    return peak_memory() - before


def curve_growth(g: Generator) -> float:
    with multiprocessing.get_context("spawn").Pool(1) as fresh:
        return max(fresh.map(curve_peak, pool.RULES))


@cache
def trained(method: str, k: int = 4096, batch: int = 1024) -> tuple[float, float]:
    """Train a table to KL <= 1e-3 from the tilt; return the draws taken and the steps per second of processor time."""
    g = verify.rng("bench", "training")
    ref = torch.randn(k, generator=g, dtype=torch.float64).log_softmax(-1)
    r = torch.randn(k, generator=g, dtype=torch.float64)
    tilted, policy = categorical.tilt(ref, r, 1.0), policies.TabularPolicy(ref)
    optimizer = torch.optim.Adam(policy.parameters(), lr=0.05)

    def loss() -> Tensor:
        if method == "policy gradient":
            y = policy.sample(batch, generator=g)
            return losses.rloo(policy.logps(y), ref[y], r[y], 1.0)
        y, z = categorical.sample(ref, 2 * batch, generator=g).view(2, batch)
        law = policy.law()
        return losses.dpo(law[y], law[z], ref[y], ref[z], 1.0, torch.sigmoid(r[y] - r[z])).mean()

    def step() -> None:
        if method == "natural gradient":
            y = policy.sample(batch, generator=g)
            with torch.no_grad():
                policy.logits.copy_(policies.natural_step(policy.logits, y, ref, r, 1.0, 0.5))
            return
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()

    seconds = 0.0
    for steps in range(1, 5001):
        begin = time.process_time()
        step()
        seconds += time.process_time() - begin
        if float(categorical.kl(policy.law().detach(), tilted)) <= 1e-3:
            return steps * batch * (2 if method == "DPO" else 1), steps / seconds
    return math.inf, 5000 / seconds


def laws_by_row(b: int, k: int, n: int, g: Generator) -> tuple[Call, Call]:
    ref_logps = torch.randn(b, k, generator=g, dtype=torch.float64).log_softmax(-1)
    rewards = 6 * torch.rand(b, k, generator=g, dtype=torch.float64)

    def one_by_one() -> Tensor:
        pairs = zip(ref_logps, rewards, strict=True)
        return torch.stack([selection.soft_best_of_n_law(p, r, 1.0, n) for p, r in pairs])

    return alike(lambda: selection.soft_best_of_n_law(ref_logps, rewards, 1.0, n), one_by_one)


def temperature(n: int, g: Generator) -> tuple[Call, Call]:
    """The temperature for half of the sample, and a bisection of a hundred effective sample sizes."""
    rewards = torch.randn(n, generator=g, dtype=torch.float64)

    def bisection() -> Tensor:
        low, high = -80.0, 80.0
        for _ in range(100):
            middle = (low + high) / 2
            enough = float(weights.ess(rewards / math.exp(middle))) > n / 2
            low, high = (low, middle) if enough else (middle, high)
        return torch.tensor(math.exp(high), dtype=torch.float64)

    return alike(lambda: weights.beta_for_ess(rewards, 0.5), bisection)


def tilted_chain(v: int, order: int, length: int, g: Generator) -> tuple[Call, Call]:
    """The exact tilt, and its recursion as this library wrote it first, in arrays of the size of the table."""
    chain = markov.MarkovChain(torch.randn(v**order, v, generator=g, dtype=torch.float64).log_softmax(-1))
    rewards = torch.randn(v, generator=g, dtype=torch.float64)
    everywhere = torch.arange(v**order)

    def written_first() -> Tensor:
        table = rewards.expand(v**order, v)
        best = rest = torch.zeros(v**order, dtype=torch.float64)
        for _ in range(length):
            logps = chain.rows(0, everywhere)
            ahead = torch.where(logps > -math.inf, table + chain.lookahead(best), -math.inf)
            top = ahead.amax(-1)
            shifted = torch.where(top[:, None] > -math.inf, ahead - top[:, None], 0.0)
            rest = torch.logsumexp(logps + shifted + chain.lookahead(rest), -1)
            best = top
        return (best + rest)[chain.start]

    return alike(lambda: chain.tilt(rewards, 1.0, length).log_partition, written_first)


def independent_draws(n: int, g: Generator) -> tuple[Call, Call]:
    """Resampling by independent draws, and the same by a bisection per place."""
    log_weights = torch.randn(n, generator=g, dtype=torch.float64)

    def searched() -> Tensor:
        cdf = log_weights.softmax(-1).cumsum(-1)
        return torch.searchsorted(cdf, torch.rand(n, generator=g, dtype=torch.float64), right=True)

    return partial(resampling.multinomial, log_weights, n, generator=g), searched


def particles_peak(n: int, length: int) -> float:
    g = verify.rng("bench", "particles")
    chain = markov.MarkovChain(torch.randn(27, 27, generator=g, dtype=torch.float64).log_softmax(-1))
    rewards = torch.randn(27, generator=g, dtype=torch.float64)
    gain = stepwise.gain(chain, rewards, 1.0, chain.soft_values(rewards, 1.0, length))
    smc.twisted_smc(chain, gain, length, 10, generator=g)
    before = peak_memory()
    smc.twisted_smc(chain, gain, length, n, generator=g)
    return peak_memory() - before


def particles_memory(g: Generator) -> float:
    n, length = 10**5, 200
    with multiprocessing.get_context("spawn").Pool(1) as fresh:
        return fresh.apply(particles_peak, (n, length)) / (8 * n * length / 2**20)


def gaussians(d: int, j: int, full: bool, n: int, g: Generator) -> tuple[mixtures.GaussianMixture, Tensor]:
    """Draw a mixture in float32, with variances around 1, and n points to take its score at."""
    logps = torch.randn(j, generator=g).log_softmax(-1)
    means, roots = torch.randn(j, d, generator=g), torch.randn(j, d, d, generator=g)
    covariances = roots @ roots.mT / d + 0.3 * torch.eye(d) if full else roots[:, 0, 0].square() + 0.5
    return mixtures.GaussianMixture(logps, means, covariances), torch.randn(n, d, generator=g)


def alike(ours: Call, other: Call) -> tuple[Call, Call]:
    """Two ways to one result, in one dtype."""
    torch.testing.assert_close(ours(), other(), rtol=1e-3, atol=1e-3)
    return ours, other


def score_by_broadcasting(d: int, j: int, n: int, g: Generator) -> tuple[Call, Call]:
    mixture, x = gaussians(d, j, False, n, g)
    priors, means, v = mixture.prior_logps, mixture.means, mixture.covariances[:, 0, 0].contiguous()

    def broadcast() -> Tensor:
        away = means - x[:, None]
        joint = priors - (away**2).sum(-1) / (2 * v) - d / 2 * (2 * math.pi * v).log()
        return ((joint - joint.logsumexp(-1, keepdim=True)).exp()[..., None] * away / v[:, None]).sum(1)

    return alike(partial(mixture.score, x), broadcast)


def score_by_autograd(d: int, j: int, n: int, g: Generator) -> tuple[Call, Call]:
    mixture, x = gaussians(d, j, True, n, g)
    components = torch.distributions.MultivariateNormal(mixture.means, mixture.covariances)

    def autograd() -> Tensor:
        leaf = x.clone().requires_grad_()
        joint = mixture.prior_logps + components.log_prob(leaf[:, None])
        return torch.autograd.grad(joint.logsumexp(-1).sum(), leaf)[0]

    return alike(partial(mixture.score, x), autograd)


def score_by_point(d: int, j: int, n: int, g: Generator) -> tuple[Call, Call]:
    """Many points at once, and one by one, which fetches the tables from memory for each."""
    mixture, x = gaussians(d, j, True, n, g)
    return alike(partial(mixture.score, x), lambda: torch.cat([mixture.score(part) for part in x.split(1)]))


LAST, FIRST = 0.005, 20.0
TARGET = mixtures.GaussianMixture(
    torch.tensor([0.2, 0.3, 0.3, 0.2], dtype=torch.float64).log(),
    torch.tensor([[-2], [-0.5], [1], [2.5]], dtype=torch.float64),
    torch.tensor([0.1, 0.4, 0.2, 0.3], dtype=torch.float64) ** 2,
)


@cache
def quantiles(level: float) -> Tensor:
    u = (torch.arange(2000, dtype=torch.float64) + 0.5) / 2000
    return TARGET.noised(1.0, level).quantile(u)[:, None]


def wasserstein(run: Callable[[Tensor, Tensor], Tensor], n: int) -> float:
    """Carry exact quantiles down n steps: their distance in the mean square from the quantiles there, without draws."""
    levels = diffusion.karras(n, LAST, FIRST)
    return float((run(quantiles(FIRST), levels) - quantiles(LAST)).square().mean().sqrt())


def solver(method: str) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda y, levels: diffusion.sample(diffusion.of_mixture(TARGET), y, levels, method=method)


def calls_to_arrive(method: str) -> int:
    return next(n for n in range(16, 1000) if wasserstein(solver(method), n) <= 1e-3)


def parabola_saves(g: Generator) -> float:
    return calls_to_arrive("abm3") / calls_to_arrive("dpmpp_2m")


def solvers_against_diffusers(g: Generator) -> float:
    """Compare the error in the law, on the same score and levels; the scheduler is given the mean of x_0."""
    import diffusers

    score = diffusion.of_mixture(TARGET)

    def peer(name: str, options: dict[str, str], vp: bool, y: Tensor, levels: Tensor) -> Tensor:
        scheduler = getattr(diffusers, name)(prediction_type="sample", **options)
        scheduler.set_timesteps(len(levels) - 1)
        twice = name == "HeunDiscreteScheduler"  # visits each inner level two times, and corrects the last step
        visits = torch.cat([levels[:1], levels[1:-1].repeat_interleave(1 + twice), levels[-1:]])
        scheduler.sigmas, scheduler._step_index = visits, 0
        scheduler.timesteps = torch.arange(len(visits) - 1 + twice).double()
        scheduler.is_scale_input_called = True  # the score takes y as it is
        scale = [1 / math.sqrt(1 + s**2) if vp else 1.0 for s in visits.tolist()]
        x = scale[0] * y
        for i, s in enumerate(visits[: len(scheduler.timesteps)].tolist()):
            mean = diffusion.denoised(score, x / scale[i], s)
            x = scheduler.step(mean, scheduler.timesteps[i], x, return_dict=False)[0].double()
        return x / scale[-1]

    peers: dict[str, tuple[str, dict[str, str], bool]] = {
        "euler": ("EulerDiscreteScheduler", {"final_sigmas_type": "sigma_min"}, False),
        "heun": ("HeunDiscreteScheduler", {}, False),
        # Its points are those of a variance-preserving process.
        "dpmpp_2m": ("DPMSolverMultistepScheduler", {"final_sigmas_type": "sigma_min"}, True),
    }
    pairs = [
        (wasserstein(solver(method), n), wasserstein(partial(peer, *peers[method]), n))
        for method in peers
        for n in (20, 80)
    ]
    return max(abs(ours / other - 1) for ours, other in pairs)


@cache
def small_unet(dtype: torch.dtype) -> Any:
    """A UNet of diffusers on 8 x 8 images, with the weights that it begins with: any function of (x, t) will do."""
    import diffusers

    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = diffusers.UNet2DModel(
            sample_size=8,
            in_channels=1,
            out_channels=1,
            layers_per_block=1,
            block_out_channels=(16, 32),
            norm_num_groups=8,
            down_block_types=("DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        )
    torch.nn.Module.to(net, dtype)  # its own `to` warns of layers that it does not have
    return net.eval().requires_grad_(False)


PREDICTIONS = {"eps": "epsilon", "v": "v_prediction", "x0": "sample"}


def peer_scheduler(name: str, prediction: str) -> Any:
    import diffusers

    scheduler = getattr(diffusers, name)(prediction_type=PREDICTIONS[prediction], clip_sample=False)
    scheduler.set_timesteps(50)
    return scheduler


def as_score(scheduler: Any, prediction: str, dtype: torch.dtype) -> diffusion.NetworkScore:
    """The network as a score, and the levels that the scheduler visits, down to 0."""
    net = small_unet(dtype)
    made = diffusion.of_network(lambda x, t: net(x, t).sample, scheduler.alphas_cumprod, prediction)
    return made._replace(levels=torch.cat([made.levels[-1 - scheduler.timesteps], torch.zeros(1).double()]))


def sampled(made: diffusion.NetworkScore, x: Tensor) -> Tensor:
    """The deterministic sampler, between points of the variance-preserving process."""
    first = made.levels[0].item()
    return diffusion.sample(made.score, x * math.sqrt(1 + first**2), made.levels)


def by_scheduler(scheduler: Any, x: Tensor) -> Tensor:
    net = small_unet(x.dtype)
    for t in scheduler.timesteps:
        x = scheduler.step(net(x, t).sample, t, x, return_dict=False)[0]
    return x


def networks_against_diffusers(g: Generator) -> float:
    """Compare whole runs of DDIM, and steps of DDPM from the same noise, for each kind of network."""
    x, worst = torch.randn(4, 1, 8, 8, generator=g, dtype=torch.float64), 0.0
    for prediction in PREDICTIONS:
        scheduler = peer_scheduler("DDIMScheduler", prediction)
        scheduler.alphas_cumprod = scheduler.alphas_cumprod.double()
        theirs = by_scheduler(scheduler, x)
        off = sampled(as_score(scheduler, prediction, x.dtype), x) - theirs
        worst = max(worst, float(off.abs().max() / theirs.abs().max()))
        scheduler = peer_scheduler("DDPMScheduler", prediction)
        scheduler.set_timesteps(1000)
        scheduler.alphas_cumprod = scheduler.alphas_cumprod.double()
        score, levels = as_score(scheduler, prediction, x.dtype)
        for t in (999, 600, 250, 2):
            s, s_next = levels[999 - t : 1001 - t].tolist()
            net = small_unet(x.dtype)(x, t).sample
            theirs = scheduler.step(net, t, x, Generator().manual_seed(t), return_dict=False)[0]
            mean, std = diffusion.posterior_transition(score, x * math.sqrt(1 + s**2), s, s_next)
            noise = torch.randn(x.shape, generator=Generator().manual_seed(t), dtype=x.dtype)
            worst = max(worst, float(((mean + std * noise) / math.sqrt(1 + s_next**2) - theirs).abs().max()))
    return worst


def network_against_pipeline(g: Generator) -> float:
    """Compare images, from 0 to 1, with those of a pipeline that draws the same noise."""
    import diffusers

    scheduler = peer_scheduler("DDIMScheduler", "v")
    pipeline = diffusers.DDIMPipeline(small_unet(torch.float32), scheduler)
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline(4, Generator().manual_seed(0), num_inference_steps=50, output_type="numpy").images
    theirs = torch.from_numpy(images).movedim(-1, 1)
    noise = torch.randn(4, 1, 8, 8, generator=Generator().manual_seed(0))
    ours = (sampled(as_score(scheduler, "v", torch.float32), noise) / 2 + 0.5).clamp(0, 1)
    inside = ((theirs > 0) & (theirs < 1)).float().mean()
    return float((ours - theirs).abs().max()) if inside > 0.5 else math.inf


def network_run(g: Generator) -> tuple[Call, Call]:
    x, scheduler = torch.randn(16, 1, 8, 8, generator=g), peer_scheduler("DDIMScheduler", "v")
    made = as_score(scheduler, "v", x.dtype)
    return alike(partial(sampled, made, x), partial(by_scheduler, scheduler, x))


def match_by_gammas(samples: Tensor, target: Tensor, wrong: Tensor) -> tuple[float, float]:
    """Judge as this library did first, with log-gammas and logs of sums: wrong where terms underflow or cancel."""

    def laws() -> list[np.ndarray]:
        for name, logps in (("target", target), ("wrong", wrong)):
            _checks.logps(name, logps)
        return [torch.log_softmax(logps.detach().double(), -1).cpu().numpy() for logps in (target, wrong)]

    log_p, log_q = laws()
    _checks.indices("samples", samples, len(log_p))
    c = torch.bincount(samples, minlength=len(log_p)).numpy().astype(float)
    if not (np.isfinite(c) & (c >= 0) & (c == np.floor(c))).all():
        raise ValueError
    n, seen = c.sum(), c > 0
    k = n * 4.0 ** np.arange(-3, 5)
    a = k[:, None] * np.exp(log_p[seen])
    parts = (gammaln(a + c[seen]) - gammaln(a) - c[seen] * log_p[seen]).sum(1) + gammaln(k) - gammaln(k + n)
    log_e = np.logaddexp(np.logaddexp.reduce(parts) - math.log(8), (c * (log_q - log_p)).sum())
    log_p, log_q = laws()  # once more, for the plan
    common = np.isfinite(log_p) & np.isfinite(log_q)

    def samples_at(s: float) -> float:
        return (18.4 + s * 19.1) / -np.logaddexp.reduce(s * log_p[common] + (1 - s) * log_q[common])

    best = minimize_scalar(samples_at, bounds=(1e-6, 1 - 1e-6), method="bounded", options={"xatol": 1e-6})
    return log_e, best.fun


def judged(k: int, n: int, g: Generator) -> float:
    ref_logps, rewards = instance(k, 1, g)
    wrong = categorical.tilt(ref_logps, rewards, 5.0)
    samples = categorical.sample(ref_logps, n, generator=g)
    ours = partial(verify.match, samples, ref_logps, claim="bench", versus=[wrong])
    one, other = medians((ours, partial(match_by_gammas, samples, ref_logps, wrong)))
    return one / other


def resampled(b: int, n: int, g: Generator) -> tuple[Call, ...]:
    log_weights = torch.randn(b, n, generator=g, dtype=torch.float64)
    probs = log_weights.softmax(-1)
    places = (torch.arange(n) + 0.5) / n

    def search() -> Tensor:
        return torch.searchsorted(probs.cumsum(-1), places.expand(b, -1).contiguous(), right=True)

    return partial(resampling.systematic, log_weights, n, generator=g), search


def against_particles(b: int, n: int, g: Generator) -> tuple[Call, ...]:
    """Both start from log weights; particles turns them into weights first, and takes one row at a time."""
    from particles import resampling as peer

    log_weights = torch.randn(b, n, generator=g, dtype=torch.float64)
    rows = list(log_weights.numpy())
    ours = partial(resampling.systematic, log_weights, n, generator=g)
    return ours, lambda: [peer.systematic(peer.exp_and_normalise(row)) for row in rows]


def small_smc(g: Generator) -> tuple[Call, Call]:
    """Thirty-two particles on a chain of order 2 over 27 symbols: alone, and solving the exact problem first."""
    rows = torch.randn(27**2, 27, generator=g, dtype=torch.float64).log_softmax(-1)
    chain, rewards = markov.MarkovChain(rows), torch.randn(27, generator=g, dtype=torch.float64)
    blind = torch.zeros(25, 27**2, dtype=torch.float64)
    gain = stepwise.gain(chain, rewards, 1.0, blind)

    def grown() -> object:
        return smc.twisted_smc(chain, gain, 24, 32, generator=g)

    def solved() -> object:  # a proposal is measured against the exact target
        return stepwise.gain(chain, rewards, 1.0, blind, chain), grown()

    return grown, solved


def against_sum(g: Generator) -> float:
    """Summing the weights up is the step that no method can do without."""
    log_weights = torch.randn(10**6, generator=g, dtype=torch.float64)
    ours = partial(resampling.systematic, log_weights, 10**6, generator=g)
    whole, summed = medians((ours, partial(log_weights.cumsum, -1)))
    return whole / summed


def share_of_checks(name: str, g: Generator) -> float:
    """The part of a small call that its checks take: the same call, with the functions of `_checks` doing nothing."""
    logps = [-5 * torch.rand(8, 16, generator=g, dtype=torch.float64) for _ in range(4)]
    logps[0].requires_grad_()
    rewards = torch.rand(8, 16, generator=g, dtype=torch.float64)
    call = {
        "policy_gradient": partial(losses.policy_gradient, *logps[:2], rewards, 0.5),
        "dpo": partial(losses.dpo, *logps, 0.5),
        "kl_estimators": partial(losses.kl_estimators, *logps[:2]),
    }[name]
    nothing = {key: lambda *args, **kwargs: None for key, value in vars(_checks).items() if isfunction(value)}

    def often() -> None:
        for _ in range(100):
            call()

    def unchecked() -> None:
        with mock.patch.multiple(_checks, together=nullcontext, **nothing):
            often()

    whole, rest = medians((often, unchecked))
    return 1 - rest / whole


def natural_saves(g: Generator) -> float:
    return trained("natural gradient")[0] / trained("policy gradient")[0]


def dpo_against_trl(g: Generator) -> float:
    """Compare value and gradient with trl's own method, called with what it reads of its trainer."""
    from trl.trainer.dpo_trainer import DPOTrainer

    worst = 0.0
    for smoothing in (0.0, 0.1, 0.4):
        logps = -20 * torch.rand(4, 1000, generator=g)
        values, slopes = [], []
        trainer = SimpleNamespace(
            beta=0.1,
            label_smoothing=smoothing,
            reference_free=False,
            f_divergence_type="reverse_kl",
            accelerator=SimpleNamespace(device=torch.device("cpu")),
        )
        for compute in (
            lambda x: losses.dpo(*x, 0.1, 1 - smoothing),  # noqa: B023
            lambda x: DPOTrainer.dpo_loss(trainer, *x)[0],  # noqa: B023
        ):
            x = logps.clone().requires_grad_()
            value = compute(x)
            slopes.append(torch.autograd.grad(value.sum(), x)[0])
            values.append(value.detach())
        worst = max(worst, float((values[0] - values[1]).abs().max()), float((slopes[0] - slopes[1]).abs().max()))
    return worst


at_most("exact law, worst relative error: K <= 6, N <= 40, range <= 50", 1e-12, law_error)
at_most("exact law, |sum - 1|: K <= 4096, N <= 1e12, range <= 300", 1e-13, law_sum)
at_most("exact law, drift of N |N (P_N/pi* - 1) - c|: N = 1e3 to 1e5", 0.05, law_drift)
at_most("exact law, noise, |sum - 1|: K <= 4096, N <= 1e12, range <= 300", 1e-13, noise_law_sum)
at_most("exponential noise / soft best-of-N: 1e5 rows of 64", 1.8, partial(noise, 10**5, 64))
faster("exact law / ONE naive selection: K = 4096, N = 1e6, range 50", 2, partial(law, 50))
faster("exact law / ONE naive selection: K = 4096, N = 1e6, range 6", 10, partial(law, 6))
for rule, times in (("soft", 1.5), ("exponential", 0.4)):
    name = f"curve of one pool, {rule} / 64 laws: M = 2048, N <= 64"
    faster(name, times, partial(curve_of_a_pool, rule))
at_most("its standard errors / the curve: M = 2048, N <= 64", 6, errors_of_a_pool)
faster("draws from the exact law / naive: K = 32, M = 1e4, N = 100", 35, partial(law_draws, 100))
faster("draws from the exact law / naive: K = 32, M = 1e4, N = 1000", 350, partial(law_draws, 1000))
faster("counts / naive: K = 32, M = 1e4, N = 1000", 10, counts)
faster("stream / naive: K = 4096, M = 1000, N = 1000", 1.5, partial(stream, 4096, 1000, 1000))
faster("stream / naive: K = 4096, M = 1, N = 1e6", 1.7, partial(stream, 4096, 1, 10**6))
faster("stream / naive: K = 32, M = 1000, N = 1000", 1.1, partial(stream, 32, 1000, 1000))
faster("exact laws / one by one: 1000 rows of 32, N = 64", 10, partial(laws_by_row, 1000, 32, 64))
faster("temperature for an ESS / 100 sample sizes: 4e6 rewards", 8, partial(temperature, 4 * 10**6))
faster("exact tilt of a chain / its recursion, written plainly: 27^4, L = 10", 4, partial(tilted_chain, 27, 3, 10))
arrives("draws to KL <= 1e-3, steps/s: K = 4096, natural gradient", 4e5, "natural gradient")
arrives("draws to KL <= 1e-3, steps/s: K = 4096, policy gradient", 1.2e6, "policy gradient")
arrives("draws to KL <= 1e-3, steps/s: K = 4096, DPO, soft labels", 3e6, "DPO")
at_most("draws to KL <= 1e-3: natural gradient / policy gradient", 0.6, natural_saves)
at_most("DPO, largest difference from trl in value or gradient", 1e-6, dpo_against_trl, peer="trl")
at_most(
    "Euler, Heun, DPM++(2M): error in the law / that of diffusers - 1",
    1e-3,
    solvers_against_diffusers,
    peer="diffusers",
)
at_most(
    "DDIM and DDPM with eps, v, x0 networks: difference from diffusers",
    1e-10,
    networks_against_diffusers,
    peer="diffusers",
)
at_most(
    "images of a UNet: difference from DDIMPipeline, pixels 0 to 1", 1e-4, network_against_pipeline, peer="diffusers"
)
faster("50 steps of a UNet on 16 images / DDIMScheduler", 0.8, network_run, peer="diffusers")
at_most("score calls to W2 <= 1e-3 in one dimension: ABM3 / DPM++(2M)", 0.35, parabola_saves)
faster("systematic / a search, softmax excluded: 1000 rows of 1000", 1.5, partial(resampled, 1000, 1000))
faster("systematic / a search, softmax excluded: one row of 1e6", 1.5, partial(resampled, 1, 10**6))
for what, times, b, n in (
    ("one row of 1e5", 0.8, 1, 10**5),
    ("one row of 1e6", 1.1, 1, 10**6),
    ("1000 rows of 1000", 2.2, 1000, 1000),
):
    name = f"systematic from log weights / particles: {what}"
    faster(name, times, partial(against_particles, b, n), peer="particles")
faster("multinomial / a search: one row of 1e7", 2, partial(independent_draws, 10**7))
for name in ("policy_gradient", "dpo", "kl_estimators"):
    at_most(f"share of the checks in a call of {name}: 8 x 16", 0.4, partial(share_of_checks, name))
at_most("systematic from log weights / a running sum: one row of 1e6", 12, against_sum)
faster("32 particles / the exact problem first: order 2, L = 24", 2.8, small_smc)
faster("score of a mixture / broadcasting: D = 2, J = 64", 5, partial(score_by_broadcasting, 2, 64, 40_000))
faster("score of a mixture / broadcasting: D = 64, J = 64", 30, partial(score_by_broadcasting, 64, 64, 4000))
faster("score, full covariances / point by point: D = 100, J = 1000", 6, partial(score_by_point, 100, 1000, 256))
faster("score, full covariances / autograd: D = 16, J = 16", 1.4, partial(score_by_autograd, 16, 16, 4000))
faster("score, full covariances / autograd: D = 64, J = 8", 1.4, partial(score_by_autograd, 64, 8, 4000))
for k, n in ((4, 20_000), (64, 10**5), (4096, 10**6), (2**18, 10**6)):
    at_most(f"match / the same by log-gammas: K = {k}, n = {n:.0e}", 1.5, partial(judged, k, n))
if LINUX:
    at_most("curve of one pool, peak memory in MB: M = 2048, N <= 64", 200, curve_growth)
    at_most("particles, peak memory / that of their tokens: 1e5 strings of 200", 5, particles_memory)
    at_most("stream, growth of peak memory in MB: N = 1e5 to 1e8", 5, stream_growth)


if __name__ == "__main__":
    begin, missed = time.perf_counter(), []
    print(f"{'what':<64}{'ours':>9}{'other':>9}{'ratio':>8}{'gate':>12}  ok")
    for what in [what for what in ROWS if " ".join(sys.argv[1:]) in what]:
        ours, other, ratio, gate, ok = ROWS[what](verify.rng("bench", what))
        print(f"{what:<64}{ours:>9}{other:>9}{ratio:>8}{gate:>12}  {ok}", flush=True)
        missed += [what] if ok == "NO" else []
    print(f"{time.perf_counter() - begin:.0f} s" + (f", peak {peak_memory():.0f} MB" if LINUX else ""))
    sys.exit(f"missed: {'; '.join(missed)}" if missed else 0)
