"""What the book's pages compute is what tiltlib computes, and what they show is what they compute."""

import itertools
import math
import re

import pytest
import torch
from browser import page_with

CASES = [([0.5, 0.3, 0.2], [0, 1, 2], n, beta) for n in (1, 2, 4, 1000, 10**6) for beta in (0.05, 1, 10)]
CASES += [([0.7, 0.1, 0.1, 0.1], [-3, 5, 5, 0], 7, 0.3), ([1.0], [2], 5, 1)]


def laws_of(logps, rewards, n, beta):
    """Soft, exponential and hard selection, as the page orders them."""
    from tiltlib import selection

    soft = selection.soft_best_of_n_law(logps, rewards, beta, n)
    noise = selection.exponential_best_of_n_law(logps, rewards, beta, n)
    return torch.stack([soft, noise, selection.best_of_n_law(logps, rewards, n)])


def test_the_page_computes_the_laws_that_tiltlib_computes(visit):
    from tiltlib.categorical import tilt, total_variation

    page = visit("search.html")  # the numbers are on every page, and this one is light
    for p, rewards, n, beta in CASES:
        logps, r = torch.tensor(p, dtype=torch.float64).log(), torch.tensor(rewards, dtype=torch.float64)
        laws, goal = laws_of(logps, r, n, beta), tilt(logps, r, beta)
        ours, our_goal, tv = page.evaluate(
            """([p, r, n, beta]) => {
              const soft = bookjs.softBestOfN(p, r, n, beta), goal = bookjs.tilt(p, r, beta);
              const others = [bookjs.exponentialBestOfN(p, r, n, beta), bookjs.bestOfN(p, r, n)];
              return [[soft, ...others], goal, bookjs.totalVariation(soft, goal)];
            }""",
            [p, rewards, n, beta],
        )
        torch.testing.assert_close(torch.tensor(ours, dtype=torch.float64), laws.exp(), rtol=1e-9, atol=1e-15)
        torch.testing.assert_close(torch.tensor(our_goal, dtype=torch.float64), goal.exp(), rtol=1e-12, atol=1e-15)
        assert tv == pytest.approx(total_variation(laws[0], goal).item(), rel=1e-6, abs=1e-13)


def churned_variance(A, B, g, c):
    """The integral of `churn`, by another rule."""
    from scipy.integrate import quad

    power = (1 + c**2) * (g - 1)
    return A * (quad(lambda q: ((A + (B - A) * q**c**-2) / B) ** power, 0, 1)[0] if c else (A / B) ** (g - 1))


def test_the_page_computes_the_variances_that_the_book_proves(visit):
    from scipy.stats import norm

    page, A, B = visit(page_with("churn")), 1.0, 2.0
    for g, c in itertools.product((1, 1.5, 3, 10), (0, 0.1, 0.5, 1, 2, 10)):
        ours, goal, tv = page.evaluate(
            """([A, B, g, c]) => {
              const v = bookjs.churnVariance(A, B, g, c), goal = bookjs.tiltVariance(A, B, g);
              return [v, goal, bookjs.normalDistance(v, goal)];
            }""",
            [A, B, g, c],
        )
        assert ours == pytest.approx(churned_variance(A, B, g, c), rel=1e-8)
        assert goal == pytest.approx(1 / (g / A + (1 - g) / B), rel=1e-12)
        if g > 1:  # the densities cross at one distance from 0
            crossing = math.sqrt(math.log(ours / goal) / (1 / goal - 1 / ours))
            exact = 2 * abs(norm.cdf(crossing / ours**0.5) - norm.cdf(crossing / goal**0.5))
            assert tv == pytest.approx(exact, abs=1e-5)


def test_the_page_shows_what_it_computes(visit):
    from tiltlib.categorical import kl, tilt, total_variation

    box = visit(page_with("soft-best-of-n")).query_selector('.bk-explorable[data-name="soft-best-of-n"]')
    options = box.evaluate("e => JSON.parse(e.dataset.options)")
    n, beta = (float(s.get_attribute("aria-valuetext").split(" = ")[1]) for s in box.query_selector_all("input"))
    logps = torch.tensor(options.get("p", [0.5, 0.3, 0.2]), dtype=torch.float64).log()
    r = torch.tensor(options.get("rewards", [0, 1, 2]), dtype=torch.float64)
    laws, goal = laws_of(logps, r, int(n), beta), tilt(logps, r, beta)

    bars = box.query_selector_all(".bk-panels > :first-child rect")
    heights = [float(bar.get_attribute("height")) for bar in bars]
    drawn = torch.tensor(heights).double().view(-1, 3).T  # outcome by outcome, a bar for each rule
    torch.testing.assert_close(drawn / drawn.sum(1, keepdim=True), laws.exp(), rtol=1e-5, atol=1e-7)
    found = re.findall(r"(?:soft|noise|best) ([\d.]+)(?:·10−(\d+))?", box.query_selector("output").inner_text())
    shown = [float(digits) * 10 ** -int(power or 0) for digits, power in found]
    exact = [total_variation(goal, law).item() for law in laws] + [kl(goal, law).item() for law in laws[:2]]
    assert shown == pytest.approx(exact, rel=5e-3)


CHAINS = [(1, 0.3, [0.5, 0.5]), (2, 0.6, [0.7, 0.8]), (2, 0.6, [0.5, 0.9]), (3, 0.95, [0.05, 0.9]), (3, 0.5, [1, 0.4])]


def test_the_page_sharpens_as_tiltlib_does(visit):
    from tiltlib import markov

    page = visit(page_with("power-and-temperature"))
    for (length, first, stay), a in itertools.product(CHAINS, (0.25, 1, 2, 50)):
        rows = [[stay[0], 1 - stay[0], 0], [1 - stay[1], stay[1], 0], [first, 1 - first, 0]]
        chain = markov.MarkovChain(torch.tensor(rows, dtype=torch.float64).log(), "ab|")
        sharp = markov.MarkovChain((a * chain.table(0)).log_softmax(-1), "ab|")
        strings = torch.tensor(list(itertools.product(range(2), repeat=length)))
        power_law = (a * chain.logps(strings)).softmax(-1)
        if a > 1:
            tilted = chain.tilt(chain.table(0).clamp(min=-1e300), 1 / (a - 1), length)
            torch.testing.assert_close(power_law, tilted.logps(strings).exp())
        ours = page.evaluate(
            "([length, first, stay, a]) => [bookjs.powerLaw, bookjs.tokenLaw].map((f) => f(length, first, stay, a))",
            [length, first, stay, a],
        )
        exact = torch.stack([power_law, sharp.logps(strings).exp()])
        torch.testing.assert_close(torch.tensor(ours, dtype=torch.float64), exact, rtol=1e-10, atol=1e-15)


def test_the_page_shows_both_ways_to_sharpen(visit):
    box = visit(page_with("power-and-temperature")).query_selector('[data-name="power-and-temperature"]')
    options = box.evaluate("e => JSON.parse(e.dataset.options)")
    bars = box.query_selector_all(".bk-panels > :first-child rect")
    drawn = torch.tensor([float(bar.get_attribute("height")) for bar in bars]).double().view(-1, 2).T
    drawn = drawn / drawn.sum(1, keepdim=True)
    p = torch.tensor([0.6 * 0.5, 0.6 * 0.5, 0.4 * 0.1, 0.4 * 0.9], dtype=torch.float64)
    assert options == {"length": 2, "first": 0.6, "stay": [0.5, 0.9], "a": 4}
    torch.testing.assert_close(drawn[0], p**4 / (p**4).sum(), rtol=1e-5, atol=1e-7)
    tv = (drawn[0] - drawn[1]).abs().sum().item() / 2
    assert re.search(r"TV = ([\d.]+)", box.query_selector("output").inner_text())[1] == f"{tv:.3g}"


def system_of_particles():
    """The chain, the rewards and the strings of `particles.js`."""
    from tiltlib import markov

    rows = torch.tensor([[0.7, 0.3, 0], [0.2, 0.8, 0], [0.6, 0.4, 0]], dtype=torch.float64)
    worth = torch.tensor([[1, 3, 1], [0.5, 4, 1], [1, 1, 1]], dtype=torch.float64)
    return markov.MarkovChain(rows.log(), "ab|"), worth.log()


def every_pair(twist, threshold, carried):
    """Run tiltlib's sampler on every outcome of two particles: law of the picked string, and mean of Z_hat / Z."""
    from tiltlib import markov, smc, stepwise, weights

    chain, rewards = system_of_particles()
    symbols, parents = (list(itertools.product(range(2), repeat=2)) for _ in range(2))
    cases = torch.tensor(list(itertools.product(symbols, symbols, symbols, parents, parents))).unbind(1)
    mass = (
        torch.ones(len(cases[0]), 3, dtype=torch.float64) / 4
    )  # where nobody is drawn, four ancestries share the chance
    mass[:, 0] = 1.0

    class Prescribed(markov.MarkovChain):
        step = 0

        def draw(self, state, *, generator):
            self.step = state.step + 1
            return cases[state.step].flatten()

    def scheme(log_weights, n, *, generator):  # of rows that are not to be resampled, tiltlib hands over zeros
        chosen, t = cases[2 + script.step], script.step
        uneven = (log_weights != 0).any(-1) if carried else weights.ess(log_weights) < threshold * n * (1 - 1e-9)
        mass[uneven, t] = log_weights.softmax(-1).gather(-1, chosen).prod(-1)[uneven]
        return torch.where(uneven[:, None], chosen, torch.arange(n))

    script = Prescribed(chain.table(0), "ab|")
    gain = stepwise.gain(chain, rewards, 1.0, twist * chain.soft_values(rewards, 1.0, 3))
    level = threshold if carried else 1.0  # at 1 the sampler hands over all uneven weights, and then forgets them
    out = smc.twisted_smc(
        script, gain, 3, 2, generator=torch.Generator(), threshold=level, scheme=scheme, runs=len(mass)
    )
    chance = mass.prod(-1) * chain.table(0)[2].exp()[cases[0]].prod(-1)
    for t in (1, 2):
        before = cases[t - 1].gather(-1, out.ancestors[:, t])
        chance = chance * chain.table(0).exp()[before, cases[t]].prod(-1)
    torch.testing.assert_close(chance.sum(), torch.ones_like(chance[0]))
    law = torch.zeros(8, dtype=torch.float64)
    share = chance[:, None] * out.log_weights.softmax(-1)
    law.index_add_(0, (out.particles @ torch.tensor([4, 2, 1])).flatten(), share.flatten())
    z = (out.log_partition - chain.tilt(rewards, 1.0, 3).log_partition).exp()
    return law, (chance * z).sum().item()


PARTICLES = "([n, twist, threshold, carried]) => bookjs.particleLaw(n, twist, threshold, carried)"


def test_the_page_enumerates_particles_as_tiltlib_runs_them(visit):
    page = visit(page_with("particles"))
    for twist, threshold, carried in itertools.product((0, 0.5, 1, 2), (0, 0.7, 0.95, 1), (True, False)):
        law, ratio = every_pair(twist, threshold, carried)
        ours = page.evaluate(PARTICLES, [2, twist, threshold, carried])
        torch.testing.assert_close(torch.tensor(ours["law"], dtype=torch.float64), law, rtol=0, atol=1e-12)
        assert ours["ratio"] == pytest.approx(ratio, abs=1e-12)
        assert not carried or ratio == pytest.approx(1, abs=1e-12)


def test_without_resampling_the_page_shows_soft_best_of_n(visit):
    from tiltlib import selection

    chain, rewards = system_of_particles()
    strings = torch.tensor(list(itertools.product(range(2), repeat=3)))
    page = visit(page_with("particles"))
    for n in (1, 2, 6):
        exact = selection.soft_best_of_n_law(chain.logps(strings), chain.total_reward(strings, rewards), 1.0, n).exp()
        ours = page.evaluate(PARTICLES, [n, 1, 0, True])
        torch.testing.assert_close(torch.tensor(ours["law"], dtype=torch.float64), exact, rtol=0, atol=1e-10)
        assert ours["resampled"] == 0


def test_six_particles_on_the_page_follow_tiltlib(visit, rng):
    """Of the start: runs of tiltlib that carry weights, and systems of the page that drop them."""
    from tiltlib import resampling, smc, stepwise, verify

    chain, rewards = system_of_particles()
    page = visit(page_with("particles"))
    carried, dropped = (page.evaluate(PARTICLES, [6, 1, 0.8, c])["law"] for c in (True, False))
    law, wrong = (torch.tensor(x, dtype=torch.float64).log() for x in (carried, dropped))
    runs = max(verify.plan(law, wrong), verify.plan(wrong, law))
    gain = stepwise.gain(chain, rewards, 1.0, chain.soft_values(rewards, 1.0, 3))
    scheme = resampling.multinomial
    out = smc.twisted_smc(chain, gain, 3, 6, generator=rng, threshold=0.8, scheme=scheme, runs=runs)
    picked = resampling.multinomial(out.log_weights, 1, generator=rng)[:, 0]
    strings = out.particles[torch.arange(runs), picked] @ torch.tensor([4, 2, 1])
    verdict = verify.match(strings, law, claim="particles", versus=[wrong])
    assert verdict, verdict.line()
    systems = f"Array.from({{length: {runs}}}, (_, seed) => bookjs.oneSystem(6, 1, 0.8, false, seed + 1))"
    drawn = page.evaluate(f"{systems}.map(({{steps, picked}}) => steps[2].strings[picked])")
    assert verify.match(torch.tensor(drawn), law, claim="particles!dropped").decision == "REJECT"
    assert verify.match(torch.tensor(drawn), wrong, claim="particles-dropped", versus=[law])


def test_the_page_shows_the_law_of_the_picked_particle(visit):
    page = visit(page_with("particles"))
    box = page.query_selector('.bk-explorable[data-name="particles"]')
    for weights in ("dropped", "carried"):
        box.query_selector(f'input[value="{weights}"]').check()
        law = torch.tensor(page.evaluate(PARTICLES, [6, 1, 0.8, weights == "carried"])["law"], dtype=torch.float64)
        bars = box.query_selector_all(".bk-panels > :last-child rect")
        drawn = torch.tensor([float(bar.get_attribute("height")) for bar in bars]).double()
        torch.testing.assert_close(drawn / drawn.sum(), law, rtol=1e-5, atol=1e-7)
        said = box.query_selector("output").inner_text()
        assert f"weights {weights}" in said and "mean of Ẑ/Z 1.000" in said  # the twist is exact
