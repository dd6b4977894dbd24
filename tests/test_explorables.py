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
