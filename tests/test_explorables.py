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
