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
