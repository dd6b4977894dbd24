"""What the book's pages compute is what tiltlib computes, and what they show is what they compute."""

import ast
import itertools
import math
import re
from pathlib import Path

import nbformat
import pytest
import torch
from browser import page_with

from tiltlib import categorical

ROOT = Path(__file__).parents[1]

CASES = [([0.5, 0.3, 0.2], [0, 1, 2], n, beta) for n in (1, 2, 4, 1000, 10**6) for beta in (0.05, 1, 10)]
CASES += [([0.7, 0.1, 0.1, 0.1], [-3, 5, 5, 0], 7, 0.3), ([1.0], [2], 5, 1)]
CASES += [([0.5, 0.5 - 2**-50, 2**-50], [0, 1, 40], 10**12, 0.5)]  # a good answer so rare that 1 - M has 12 zeros


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


# --- what GRPO converges to ----------------------------------------------------------------------------------------


def functions_of(chapter, *names, **known):
    """Functions that the main text of a notebook defines; `known` are the names of its own that they use."""
    cells = (
        cell for cell in nbformat.read(ROOT / f"book/{chapter}.ipynb", as_version=4).cells if cell.cell_type == "code"
    )
    found = [node for cell in cells for node in ast.parse(cell.source).body if getattr(node, "name", "") in names]
    space = {"torch": torch, "math": math, "categorical": categorical, **known}
    exec(compile(ast.Module(found, []), chapter, "exec"), space)
    return [space[name] for name in names]


def numbers(found):
    return torch.tensor(found, dtype=torch.float64)


GRPO = [
    ([0.5, 0.3, 0.2], [0, 1, 2]),
    ([0.2, 0.3, 0.5], [5, 5, 0]),
    ([0.3, 0.6, 0.1], [1, 1, 1]),
    ([0.98, 0.01, 0.01], [0, -1, 1]),
]


def test_the_page_computes_the_laws_of_the_chapter_on_grpo(visit):
    page = visit(page_with("grpo"))
    names = ("group_counts", "effective_reward", "scaled_fixed_point", "pole_law")
    theirs = [functions_of("grpo", *names, p=numbers(p).log())[1:] for p, _ in GRPO]
    pairs = list(zip(GRPO, theirs, strict=True))
    settings = [(2, 0.2), (2, 5), (3, 1), (16, 0.2), (16, 5)]
    for ((p, r), (effective, divided, pole)), (G, beta) in itertools.product(pairs, settings):
        logps, rewards = numbers(p).log(), numbers(r)
        ours, with_k3, f, polar = page.evaluate(
            """([p, r, G, beta]) => [bookjs.dividedLaw(p, r, G, beta)[0],
              bookjs.dividedLaw(p, r, G, beta, bookjs.onlyPole)[0],
              bookjs.effectiveReward(p.map(Math.log), bookjs.groups(r, G)), bookjs.pole(p, r, beta)[0]]""",
            [p, r, G, beta],
        )
        torch.testing.assert_close(numbers(polar), pole(logps, rewards, beta).exp(), rtol=1e-10, atol=0)
        torch.testing.assert_close(numbers(f), effective(logps, rewards, G), rtol=1e-9, atol=1e-11)
        # The step is damped: a round leaves about .8 of the distance.
        torch.testing.assert_close(numbers(ours), divided(rewards, G, beta).exp(), rtol=1e-7, atol=1e-12)
        theirs_k3 = divided(rewards, G, beta, pole, rounds=110).exp()
        torch.testing.assert_close(numbers(with_k3), theirs_k3, rtol=1e-7, atol=1e-12)


OPTIONS = {  # of losses.grpo, by the name of the loss on the page
    "k₂, leave-one-out": {"kl": "k2", "scale": "none", "baseline": "leave-one-out"},
    "k₂, group mean": {"kl": "k2", "scale": "none"},
    "k₃, leave-one-out": {"kl": "k3", "scale": "none", "baseline": "leave-one-out"},
    "k₃, group mean": {"kl": "k3", "scale": "none"},
    "k₂, divided by sd": {"kl": "k2"},
    "k₃, divided by sd": {"kl": "k3"},
}


def test_at_the_laws_of_the_page_the_mean_gradient_of_the_loss_vanishes(visit):
    from tiltlib import losses

    page = visit(page_with("grpo"))
    all_groups, expected_gradient = functions_of("grpo", "all_groups", "expected_gradient")
    assert page.evaluate("Object.keys(bookjs.grpoLosses)") == list(OPTIONS)
    for (name, options), (p, r), G in itertools.product(OPTIONS.items(), GRPO, (2, 4)):
        ours = page.evaluate("([name, p, r, G]) => bookjs.grpoLosses[name](p, r, 0.7, G)[0]", [name, p, r, G])
        ref, rewards = numbers(p).log(), numbers(r)

        def slope(law, ref=ref, rewards=rewards, G=G, options=options):
            loss = lambda x, y: losses.grpo(x[..., None], ref[y][..., None], rewards[y], 0.7, **options)  # noqa: E731
            return expected_gradient(loss, law.log(), all_groups(3, G)).abs().max()

        assert slope(numbers(ours)) < 1e-10, name
        if len(set(r)) > 1:  # else all losses rest at p
            assert slope((numbers(ours) + 0.05 * numbers(p)) / 1.05) > 1e-5, name


def test_the_explorable_of_grpo_follows_its_controls(visit):
    page = visit(page_with("grpo"))
    box = page.query_selector('.bk-explorable[data-name="grpo"]')
    said = lambda: box.query_selector("output").inner_text()  # noqa: E731
    seen, chosen = [said()], lambda: box.query_selector("input:checked").evaluate("e => e.labels[0].textContent.trim()")
    assert chosen() == "k₃, leave-one-out" and "μ" in said()  # the loss of the run above
    for key in ["ArrowDown"] * 5:  # the arrow keys go through the losses
        box.query_selector("input[type=radio]:checked").press(key)
        seen.append(said())
    assert len(set(seen)) == 6 and chosen() == "k₂, group mean"
    for key in ["ArrowDown"] * 2:
        box.query_selector("input[type=radio]:checked").press(key)
    assert chosen() == "k₃, group mean"
    before = said()
    for slider in box.query_selector_all("input[type=range]"):
        slider.press("ArrowRight")
        assert said() != before
        before = said()
    heights = [float(bar.get_attribute("height")) for bar in box.query_selector_all(".bk-panels > :first-child rect")]
    G, beta = 12, 1.3
    (pole,) = functions_of("grpo", "pole_law")
    law = pole(numbers([0.5, 0.3, 0.2]).log(), numbers([0, 1, 2]), beta / (1 - 1 / G)).exp()
    torch.testing.assert_close(numbers(heights) / sum(heights), law, rtol=1e-6, atol=1e-8)
    assert f"G = {G}, β = {beta}" in said() and f"best outcome {law[2]:.3f}" in said()
    assert page.trouble == []


# --- the triangle of self-certainty --------------------------------------------------------------------------------


TRIANGLES = [[0.5, 0.3, 0.2], [0.4, 0.4, 0.2], [0.01, 0.01, 0.98], [1 / 3, 1 / 3, 1 / 3]]


def internal(law, ref, b):
    """The objective of internal feedback, for one symbol."""
    from tiltlib import losses

    return losses.self_certainty(law.log()[..., None, :]) - b * categorical.kl(law.log(), ref.log())


def test_the_triangle_has_the_best_and_the_worst_law_in_it(visit):
    page = visit(page_with("certainty-triangle"))
    inside = torch.cartesian_prod(*[torch.arange(1, 60).double()] * 2) / 60
    grid = torch.cat([1 - inside.sum(1, keepdim=True), inside], 1)[inside.sum(1) < 0.999]
    for p, b in itertools.product(TRIANGLES, (0, 0.1, 0.5, 0.9, 1, 1.1, 2, 3)):
        ref = numbers(p)
        best, q, value = page.evaluate(
            """([p, b]) => [bookjs.best(p, b), b === 1 ? null : bookjs.sharpened(p, b),
              bookjs.internal([0.2, 0.3, 0.5], p, b)]""",
            [p, b],
        )
        assert value == pytest.approx(internal(numbers([0.2, 0.3, 0.5]), ref, b).item(), abs=1e-12)
        values = internal(grid, ref, b)
        assert values.max() <= internal(numbers(best), ref, b).min() + 1e-12
        if b > 1:
            assert len(best) == 1
            tilted = categorical.tilt(ref.log(), ref.log(), b - 1).exp()
            torch.testing.assert_close(numbers(best[0]), tilted, rtol=1e-10, atol=1e-300)
        else:
            top = torch.ones(3, dtype=torch.bool) if b == 0 else ref == ref.max()
            torch.testing.assert_close(numbers(best), torch.eye(3, dtype=torch.float64)[top])
        if b < 1:
            assert values.min() >= internal(numbers(q), ref, b) - 1e-12


def test_the_path_in_the_triangle_is_that_of_the_natural_gradient(visit):
    page, step = visit(page_with("certainty-triangle")), 1e-4
    (walk,) = functions_of("internal_feedback", "walk", p=None)
    for p, b, t in itertools.product(TRIANGLES[:3], (0, 0.5, 1, 2), (0.1, 3)):
        start = [0.3, 0.3, 0.4]
        flow = lambda t, p=p, b=b: numbers(page.evaluate("x => bookjs.flow(...x)", [[0.3, 0.3, 0.4], p, b, t]))  # noqa: E731
        at = flow(t).requires_grad_()
        (slope,) = torch.autograd.grad(internal(at, numbers(p), b), at)  # the natural gradient, up to a constant
        moved = (flow(t + step).log() - flow(t - step).log()) / (2 * step)
        torch.testing.assert_close(moved - moved[0], slope - slope[0], rtol=1e-4, atol=1e-5)
        many = walk(numbers(start).log(), b, t / 2000, 2000, numbers(p).log()).exp()
        torch.testing.assert_close(flow(t), many, rtol=0, atol=2e-2)
        torch.testing.assert_close(flow(0), numbers(start))


def test_the_points_of_the_triangle_move_by_pointer_and_by_keys(visit):
    page = visit(page_with("certainty-triangle"), "phone")
    box = page.query_selector('.bk-explorable[data-name="certainty-triangle"]')
    said = lambda: box.query_selector("output").inner_text()  # noqa: E731
    ref, start = box.query_selector_all("[role=slider]")
    assert all(h.get_attribute("aria-label") and h.evaluate("e => e.tabIndex") == 0 for h in (ref, start))
    ref.press("ArrowRight")
    ref.press("ArrowRight")
    assert "p = (0.4, 0.4, 0.2)" in said() and "or always" in said()  # two responses tie
    assert ref.get_attribute("aria-valuetext") == "reference p = 0.4, 0.4, 0.2"
    assert ref.evaluate("e => e === document.activeElement")
    for _ in range(30):
        ref.press("ArrowUp")
    law = [float(x) for x in ref.get_attribute("aria-valuetext").split(" = ")[1].split(",")]
    assert min(law) >= 0.01 and sum(law) == pytest.approx(1)
    before = said()
    start.scroll_into_view_if_needed()
    spot = start.bounding_box()
    x, y = spot["x"] + spot["width"] / 2, spot["y"] + spot["height"] / 2
    page.mouse.move(x, y)
    page.mouse.down()
    page.mouse.move(x + 300, y + 400, steps=5)  # far outside: it stays in the triangle
    page.mouse.up()
    law = [float(x) for x in start.get_attribute("aria-valuetext").split(" = ")[1].split(",")]
    assert said() != before and min(law) >= 0.01 and sum(law) == pytest.approx(1) and law[1] > 0.9
    box.query_selector("input[type=range]").press("ArrowRight")
    assert "b = 0.3" in said() and page.trouble == []


EVEN = [1 / 8] * 8
OFF = [(1.05 if y % 2 == 0 else 0.95) / 8 for y in range(8)]
EVIDENCE = [  # counts, claimed law, declared wrong laws
    ([1] + [0] * 7, EVEN, [OFF]),
    ([12_600, 12_400, 12_550, 12_450, 12_480, 12_520, 12_500, 12_500], EVEN, []),
    ([131, 119, 130, 118, 132, 121, 129, 120], EVEN, [OFF, OFF[::-1]]),
    ([0, 0, 40], [0.5, 0.5 - 1e-9, 1e-9], [[0.2, 0.3, 0.5]]),  # what hardly ever comes, came
    ([3, 2, 0], [0.6, 0.4, 0.0], [[0.0, 1.0, 0.0]]),  # the declared law does not give what came
    ([3, 2, 1], [0.6, 0.4, 0.0], []),  # nor does the claimed one
    ([7], [1.0], []),
    ([133_000, 67_000], [2 / 3, 1 / 3], [[0.66, 0.34]]),
]


def mulberry(seed, n):
    """The page's generator of uniform numbers."""
    numbers, low = [], 2**32 - 1
    for _ in range(n):
        seed = (seed + 0x6D2B79F5) & low
        t = (seed ^ seed >> 15) * (1 | seed) & low
        t ^= (t + ((t ^ t >> 7) * (61 | t) & low)) & low
        numbers.append((t ^ t >> 14) / 2**32)
    return torch.tensor(numbers, dtype=torch.float64)


def test_the_page_computes_the_evidence_that_tiltlib_computes(visit):
    from tiltlib import verify

    page = visit(page_with("evidence"))
    logs = [torch.tensor(law, dtype=torch.float64).log() for law in (EVEN, OFF)]
    for counts, p, declared in EVIDENCE:
        ours = page.evaluate("(x) => bookjs.logEvidence(...x)", [counts, p, declared])
        target, *wrong = (torch.tensor(law, dtype=torch.float64).log() for law in (p, *declared))
        # The page takes differences of numbers of size n log n, and shows a tenth of a power of ten.
        assert ours == pytest.approx(verify.log_e_value(counts, target, wrong), rel=1e-9, abs=1e-6)
    for p, q in ((EVEN, OFF), ([0.5, 0.3, 0.2], [0.1, 0.1, 0.8]), ([0.9, 0.1], [0.5, 0.5])):
        ours = page.evaluate("(x) => bookjs.plannedDraws(...x)", [p, q])
        assert ours == verify.plan(*(torch.tensor(law, dtype=torch.float64).log() for law in (p, q)))

    # What is shown after 2,000 draws, of A by the law that is claimed and of B by the other one.
    said = [
        float(x.replace("−", "-")) for x in re.findall(r"<sup>(.*?)</sup>", page.inner_html(".bk-explorable output"))
    ]
    a, b = (
        torch.bucketize(mulberry(seed, 2000), torch.tensor(law, dtype=torch.float64).cumsum(0), right=True)
        for seed, law in ((2, EVEN), (3, OFF))
    )
    a, b = (torch.bincount(draws.clamp(max=7), minlength=8).numpy() for draws in (a, b))
    e = [
        verify.log_e_value(*case) / math.log(10)
        for case in ((a, logs[0], logs[1:]), (b, logs[0], logs[1:]), (b, logs[0]))
    ]
    assert said == pytest.approx(e, abs=0.051)
    # No sample of A comes to the level of rejection.
    ever = """(p) => Math.max(...[1, 2, 3, 4, 5, 6, 7, 8, 9, 10].map((no) =>
      bookjs.logEvidence(bookjs.countsAt([200000], p, bookjs.uniforms(2 * no, 200000))[0], p)))"""
    assert page.evaluate(ever, EVEN) < math.log(1e8) and page.trouble == []


# --- guidance-field --------------------------------------------------------------------------------------------------

LAWS = [
    {"means": [[-1.3, -0.5], [1.3, -0.5], [0, 1.5]], "v": 0.3, "centre": [-0.3, -0.2], "width": 1},
    {"means": [[2, 1]], "v": 2, "centre": [0, 0], "width": 0.1},
    {"means": [[0, 0], [0, 30]], "v": 0.01, "centre": [0, 40], "width": 5},
]


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("g", (1, 1.5, 3, 10))
def test_the_field_of_guidance_is_that_of_tiltlib(law, g, visit):
    from tiltlib import diffusion, guidance, mixtures

    means, centre = (torch.tensor(law[name], dtype=torch.float64) for name in ("means", "centre"))
    v, eye = torch.tensor([law["v"]], dtype=torch.float64), torch.eye(2, dtype=torch.float64)
    p = mixtures.GaussianMixture(torch.zeros(len(means), dtype=torch.float64).log_softmax(0), means, v)
    given, tilted = (p.tilt(k / law["width"] * eye, k / law["width"] * centre, 1.0) for k in (1, g))
    page = visit(page_with("guidance-field"))
    points = torch.tensor([[0, 0], [1, -2], [-0.3, 0.4], [50, 7], [-1e3, 1e3]], dtype=torch.float64)
    for s in (0.01, 0.5, 10):
        ours = page.evaluate(
            "([law, g, s, points]) => points.map((y) => bookjs.pushes(law, g, s, y))", [law, g, s, points.tolist()]
        )
        push, asked = torch.tensor(ours, dtype=torch.float64).unbind(1)
        scale = points.norm(dim=1).max().item() / s**2  # differences of scores lose digits
        for mine, exact in (
            (push, g * guidance.value_gradient(p, given, points, s)),
            (asked, guidance.value_gradient(p, tilted, points, s)),
        ):
            torch.testing.assert_close(mine, exact, rtol=1e-9, atol=1e-14 * g * scale)

    levels, n = [10, 5, 2, 1, 0.4, 0.1, 0.01], 20
    runs = page.evaluate("([law, g, levels, n]) => bookjs.guidedPoints(law, g, levels, n)", [law, g, levels, n])
    i = torch.arange(n, dtype=torch.float64)
    far, angle = (-2 * torch.log1p(-(i + 0.5) / n)).sqrt(), i * math.pi * (3 - 5**0.5)
    spiral = torch.stack([far * angle.cos(), far * angle.sin()], 1)
    score, scores = diffusion.of_mixture(p), [guidance.exact_value(t) for t in (given, tilted)]
    several = (given, guidance.classifier_free(scores[0], score, g)), (tilted, scores[1])
    for run, (start, b) in zip(torch.tensor(runs, dtype=torch.float64), several, strict=True):
        spread = (start.mixture.covariance().trace() / 2 + levels[0] ** 2).sqrt()
        y = start.mixture.mean() + spread * spiral
        torch.testing.assert_close(run[0], y, rtol=1e-12, atol=1e-12)
        for k in range(1, len(levels)):
            y = diffusion.sample(b, y, torch.tensor(levels[k - 1 : k + 1], dtype=torch.float64), method="heun")
            torch.testing.assert_close(run[k], y, rtol=1e-9, atol=1e-9 * g)
        part = page.evaluate("([points, means]) => bookjs.nearest(points, means)", [y.tolist(), law["means"]])
        near = torch.cdist(y, means).argmin(1).bincount(minlength=len(means)) / n
        assert part == pytest.approx(near.tolist())


def tv_of(law, goal):
    from tiltlib.categorical import total_variation

    return total_variation(law, goal).item()


def test_the_page_computes_the_cutoff_in_length(visit):
    from tiltlib import categorical, selection

    page = visit(page_with("length"))
    for m, beta in itertools.product((1, 10, 160), (0.32, 1.0, 4.0)):
        ones = torch.arange(m + 1, dtype=torch.float64)
        logps = (-torch.lgamma(ones + 1) - torch.lgamma(m - ones + 1)).log_softmax(-1)
        goal = categorical.tilt(logps, ones, beta)
        # At 10^30 draws and 160 bits s is above 1 where M is still 1 in float64.
        sizes = [1, 2, 50, 10**6, 10**16, 10**30]
        p, tv, least = page.evaluate(
            """([m, beta, sizes]) => {
              const p = bookjs.bits(m), r = [...p.keys()], goal = bookjs.tilt(p, r, beta);
              const distance = bookjs.softDistance(p, r, beta, Math.max(...sizes));
              return [p, sizes.map(distance), sizes.map((n) => bookjs.leastDistance(p, goal, n))];
            }""",
            [m, beta, [float(n) for n in sizes]],
        )
        assert p == pytest.approx(logps.exp().tolist(), rel=1e-9)
        exact = [tv_of(selection.soft_best_of_n_law(logps, ones, beta, n), goal) for n in sizes]
        assert tv == pytest.approx(exact, rel=1e-7, abs=1e-12)
        bound = [
            categorical.expectation(goal, (1 - float(n) * (logps - goal).exp()).clamp(min=0)).item() for n in sizes
        ]
        assert least == pytest.approx(bound, rel=1e-9, abs=1e-12)
    z = torch.linspace(-4, 4, 33, dtype=torch.float64)
    tails = page.evaluate("z => z.map(bookjs.normalTail)", z.tolist())
    assert tails == pytest.approx(torch.special.ndtr(-z).tolist(), abs=1e-5)


def test_the_page_computes_what_a_wrong_judge_costs(visit):
    from tiltlib import categorical

    page = visit(page_with("proxy"))
    p, truth = [0.14, 0.3, 0.28, 0.15, 0.07, 0.035, 0.015, 0.007, 0.003], [0, 1, 2, 3, 4, 5, 6, 7, 0]
    logps, t = torch.tensor(p, dtype=torch.float64).log(), torch.tensor(truth, dtype=torch.float64)
    for error, beta in itertools.product((0, 4, 10, 20), (0.1, 1.3, 10)):
        ours = page.evaluate("a => bookjs.judged(...a)", [p, truth, error, beta])
        proxy = t.clone()
        proxy[-1] += error
        law, goal = categorical.tilt(logps, proxy, beta), categorical.tilt(logps, t, beta)
        assert ours["law"] == pytest.approx(law.exp().tolist(), rel=1e-9)
        assert ours["truth"] == pytest.approx(categorical.expectation(law, t).item(), rel=1e-9)
        assert ours["proxy"] == pytest.approx(categorical.expectation(law, proxy).item(), rel=1e-9)
        assert ours["tv"] == pytest.approx(tv_of(law, goal), rel=1e-9, abs=1e-12)
        assert ours["bound"] == pytest.approx(math.tanh(error / beta / 4), rel=1e-12)
        assert ours["tv"] <= ours["bound"] + 1e-12
