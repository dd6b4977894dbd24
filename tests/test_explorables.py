"""What the book's pages compute is what tiltlib computes, and what they show is what they compute."""

import itertools
import math
import re

import pytest
import torch
from browser import page_with

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
        bound = [categorical.expectation(goal, (1 - n * (logps - goal).exp()).clamp(min=0)).item() for n in sizes]
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
