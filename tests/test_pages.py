"""Every page of the built book, as a reader without network sees it: light, dark and on a phone.

See `browser.py` for what they need. Some faults only looking shows: `make shots` takes pictures.
"""

import os
import re
from collections import Counter
from html import unescape
from pathlib import Path
from urllib.parse import unquote, urldefrag

import pdf
import pytest
import verdicts
from browser import HTML, VIEWS

ROOT = Path(__file__).parents[1]
TOC = verdicts.toc_names_of(ROOT)
PAGES = verdicts.read_book(ROOT)
CHAPTERS = [page for page in PAGES if page.statements]
# Ids that the theme repeats on its search page, and sphinx-exercise in each exercise: nothing refers to them.
REPEATED = {"search-input", "exercise-content", "solution-content"}


def test_the_claims_pages_show_every_claim(files):
    for page, entries in verdicts.entries(PAGES):
        path = verdicts.claims_page(page.name) + ".html"
        shown = unescape(re.sub(r"<[^>]+>", "", (HTML / path).read_text(encoding="utf-8")))
        assert {f"claim-{s.label}" for s in page.statements} <= set(files[path].ids)
        assert [v.id for e in entries for v in e.verdicts if (v.slug or v.id) not in shown] == []


# --- without a browser ---------------------------------------------------------------------------------------------


def test_every_internal_link_leads_somewhere(files):
    broken = []
    for name, page in files.items():
        for link in page.links + page.loads:
            if re.match(r"[a-z]+:|//", link):
                continue
            path, fragment = urldefrag(unquote(link))
            path = path.split("?")[0]
            target = os.path.normpath(Path(name).parent / path).replace(os.sep, "/") if path else name
            if not (HTML / target).is_file():
                broken.append(f"{name}: {link}")
            elif fragment and target in files and fragment not in files[target].ids:
                broken.append(f"{name}: {link} (no such id)")
    assert not broken


def test_the_statements_of_each_page_count_from_one(files):
    """On a page without a chapter number too, where Sphinx would count on from the page before it."""
    for page in CHAPTERS:
        shown = (HTML / f"{page.name}.html").read_text(encoding="utf-8")
        kinds = "Theorem|Proposition|Lemma|Corollary|Definition|Remark"  # one counter, see _config.yml
        numbers = re.findall(rf'caption-number">(?:{kinds}) ([\d.]+) ', shown)
        assert len(numbers) >= len(page.statements), page.name
        assert [int(number.split(".")[-1]) for number in numbers] == [*range(1, len(numbers) + 1)], page.name


def test_nothing_is_loaded_from_elsewhere(files):
    assert not [(name, url) for name, page in files.items() for url in page.loads if re.match("https?:|//", url)]


def test_ids_are_unique(files):
    repeated = {name: {i for i, n in Counter(page.ids).items() if n > 1} - REPEATED for name, page in files.items()}
    assert not {name: ids for name, ids in repeated.items() if ids}


# --- in the browser ------------------------------------------------------------------------------------------------


# How long a chapter is as it opens, and how much of that is code and printed output, in CSS pixels. Folded parts count
# with the line that opens them, figures and tables not at all.
SIZE = """() => {
  // What a closed box holds, such as a solution, is there but not seen.
  const seen = (e) => e.checkVisibility({opacityProperty: true, visibilityProperty: true});
  const height = (e) => (seen(e) ? e.getBoundingClientRect().height : 0);
  const code = [...document.querySelectorAll(".cell_input, .cell_output div.highlight, .cell_output > pre")];
  const shown = code.filter((e) => !e.closest("details:not([open]) > :not(summary)") && !e.closest("figure"));
  return [document.documentElement.scrollHeight, shown.map(height).reduce((a, b) => a + b, 0)];
}"""
LONGEST = 15_000
MOST_CODE = 0.2
SITTINGS = [page.name for page in CHAPTERS] + ["book/at_work"]
FIRST = """() => document.querySelector("article :is(.bk-fig, .bk-explorable, .bk-samples, .bk-flow)")
    .getBoundingClientRect().top"""
EVIDENCE = """() => [...document.querySelectorAll(".evidence")].map((e) =>
    [(e.querySelector("summary") ?? e).textContent, e.open ?? false])"""
SMALL = """() => [...document.querySelectorAll("svg[data-font]")].filter((e) => e.clientWidth).map((e) =>
    [e.dataset.font * e.clientWidth / e.viewBox.baseVal.width, e.getAttribute("aria-label").slice(0, 60)])"""


def is_one_sitting(page, name, record):
    """Complain of a chapter as it opens: too long, too much code, a late picture, a statement without its evidence."""
    height, code = page.evaluate(SIZE)
    record("page", (name, height, code / height))
    bad = []
    if height > LONGEST:
        bad.append(f"{height} px high, more than {LONGEST}")
    if code > MOST_CODE * height:
        bad.append(f"code takes {code / height:.0%} of the page, more than {MOST_CODE:.0%}")
    if (first := page.evaluate(FIRST)) > 1500:
        bad.append(f"the first picture comes after {first:.0f} px, more than 1500")
    lines = page.evaluate(EVIDENCE)
    claimed = [s for chapter in CHAPTERS if chapter.name == name for s in chapter.statements if s.status != "open"]
    if len(lines) != len(claimed):
        bad.append(f"{len(lines)} lines of evidence for {len(claimed)} statements")
    bad += [f"evidence opens by itself: {text}" for text, opened in lines if opened]
    return bad + [f"not evidence: {text}" for text, _ in lines if not re.match(r"Checked: .*rejected\.", text, re.S)]


def is_small_on_a_phone(page):
    return [f"letters of {size:.1f} px: {label}" for size, label in page.evaluate(SMALL) if size < 11]


# Folded proofs and cells have no size: they are opened before a page is looked over.
OPEN = r"""async () => {
  document.querySelectorAll("details").forEach((d) => { d.open = true; });
  document.querySelectorAll(".toggle-hidden").forEach((d) => d.classList.remove("toggle-hidden"));
  for (let i = 0; i < 3; i++) await new Promise(requestAnimationFrame); // the page's own scripts see the new sizes
}"""
# What holds on every page, as a list of complaints.
LOOK = r"""(width) => {
  const bad = [], all = (s) => [...document.querySelectorAll(s)], short = (e) => e.textContent.trim().slice(0, 60);
  const seen = (e) => e.checkVisibility({ visibilityProperty: true }) && e.getBoundingClientRect().width > 0;

  for (const e of all(".math")) if (!e.querySelector("mjx-container")) bad.push("maths not rendered: " + short(e));
  for (const e of all("mjx-merror, [data-mjx-error]")) bad.push("maths error: " + short(e));
  const text = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (text.nextNode()) {
    const node = text.currentNode;
    const inCode = node.parentElement.closest("pre, code, script, style, noscript, mjx-container");
    if (/\$|\\\(|\\\[/.test(node.data) && !inCode) bad.push("raw maths: " + node.data.trim().slice(0, 60));
  }

  for (const e of all("div.math, .bk-table, .pst-scrollable-table-container, div.highlight pre"))
    if (e.scrollWidth > e.offsetWidth + 2 && getComputedStyle(e).borderRightStyle !== "dotted")
      bad.push("goes on beyond the edge, and does not say so: " + short(e));
  const over = document.documentElement.scrollWidth - width;
  if (over > 0) bad.push(`the page is ${over} px wider than the window`);
  if (width >= 1280) // on a phone an equation or a table may scroll; here it would be cut in print
    for (const e of all("div.math, mjx-container[display], .bk-table, .pst-scrollable-table-container"))
      if (e.scrollWidth > e.clientWidth + 1) bad.push(`${e.scrollWidth} px in ${e.clientWidth}: ${short(e)}`);
  for (const e of all("span.math")) { // the glyphs, as a box may be narrower than what it holds
    const right = Math.max(...[...e.querySelectorAll("mjx-c")].map((c) => c.getBoundingClientRect().right));
    const past = right - e.closest("p, li, dt, dd, td, th, h1, h2, h3").getBoundingClientRect().right;
    if (seen(e) && past > 1) bad.push(`a formula runs ${Math.round(past)} px past its column: ${short(e)}`);
    const loose = /^[,.;:?!)]/.test(e.nextSibling?.data ?? "") && !e.parentElement.matches(".joined");
    if (loose) bad.push("a line may begin with the mark after " + short(e));
  }

  const named = (words) => words && !/\.(png|jpe?g|svg)$/.test(words); // a file name says nothing
  for (const e of all("img")) if (!named(e.alt)) bad.push("image without words: " + e.src);
  for (const e of all("svg[role]:not([aria-hidden]), [class^=bk-][role=group]"))
    if (!named(e.getAttribute("aria-label"))) bad.push("picture without words: " + e.outerHTML.slice(0, 60));
  for (const e of all(".bk-explorable")) if (!e.querySelector("svg")) bad.push("not drawn: " + e.dataset.name);
  const fields = all("input[type=search], .search-button-field").filter(seen).length;
  if (width >= 1280 && fields !== 1) bad.push(`${fields} search fields`);

  return bad;
}"""

# Figures take the colour of the text; a page that forgets its dark theme shows dark ink on dark paper, or the reverse.
INK = r"""() => {
  const light = (color) => { // from 0, black, to 1, white; null where the paper behind shines through
    const [r, g, b, a = 1] = color.match(/[\d.]+/g).map(Number);
    return a < 0.5 ? null : (r + g + b) / 765;
  };
  const bad = [];
  for (const e of document.querySelectorAll("p, .bk-fig, .bk-explorable, .bk-samples, .bk-map")) {
    const ink = light(getComputedStyle(e).color);
    let paper = null;
    for (let n = e; n && paper === null; n = n.parentElement) paper = light(getComputedStyle(n).backgroundColor);
    if (Math.abs(ink - (paper ?? 1)) < 0.3) bad.push("ink and paper are too alike: " + e.outerHTML.slice(0, 60));
  }
  const looks = (e) => [getComputedStyle(e).color, getComputedStyle(e).fontWeight].join(", weight ");
  for (const e of document.querySelectorAll(".bk-fig figcaption")) // it states the finding
    if (looks(e) !== looks(e.parentElement)) bad.push(`a caption fainter than its figure: ${looks(e)}`);
  return bad;
}"""


# What paper would cut: nobody can scroll there.
CUT = r"""() => {
  const edge = document.querySelector("article").getBoundingClientRect().right + 1, bad = [];
  for (const e of document.querySelectorAll("article :is(div.math, mjx-container, pre, table, svg, img)")) {
    if (!e.checkVisibility()) continue;
    const past = Math.max(e.getBoundingClientRect().right - edge, e.scrollWidth - e.clientWidth - 2, 0);
    if (past > 0) bad.push(`on paper ${Math.round(past)} px are cut: ${e.outerHTML.slice(0, 80)}`);
  }
  // A box that is not divided moves to the next sheet whole, or leaves its empty frame on this one.
  for (const e of document.querySelectorAll("article :is(.cell_input pre, .pst-scrollable-table-container table)")) {
    if (!e.checkVisibility() || e.closest(".proof, .exercise, figure")) continue;
    for (let n = e; n.tagName !== "ARTICLE"; n = n.parentElement) {
      const { display, overflowY, breakInside } = getComputedStyle(n);
      if (/flex|grid/.test(display) || overflowY !== "visible" || breakInside === "avoid")
        bad.push(`on paper not divided: ${n.className || n.tagName} around ${e.textContent.trim().slice(0, 40)}`);
    }
  }
  return bad;
}"""


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("name", TOC)
def test_page(name, view, visit, record_property):
    page = visit(f"{name}.html", view)
    bad = []
    if name in SITTINGS:
        bad = is_small_on_a_phone(page) if view == "phone" else is_one_sitting(page, name, record_property)
    page.evaluate(OPEN)
    bad += page.evaluate(LOOK, VIEWS[view]) + page.evaluate(INK)
    if view == "wide":
        page.evaluate("() => { document.documentElement.dataset.theme = 'dark'; }")  # as the theme's own switch does
        bad += page.evaluate(INK) + move_sliders(page)
        if not name.startswith(verdicts.CLAIMS):
            pdf.prepare(page)
            bad += page.evaluate(CUT)
    assert page.trouble + bad == []


def move_sliders(page):
    """Press a key on each slider; complain where it has no name or nothing is said to change."""
    state = """e => [e.closest(".bk-explorable, .bk-slider").querySelector("output").textContent,
                     e.getAttribute("aria-valuetext")]"""
    bad = []
    for slider in page.query_selector_all("input[type=range]"):
        before = slider.evaluate(state)
        slider.press(slider.evaluate("e => e.value === e.max ? 'ArrowLeft' : 'ArrowRight'"))
        after = slider.evaluate(state)
        if before[0] == after[0] or before[1] == after[1]:
            bad.append(f"slider changes nothing: {before}")
        if not slider.evaluate("e => e.labels[0]?.textContent.trim() || e.getAttribute('aria-label')"):
            bad.append(f"slider without a name: {before}")
    return bad


def test_claims_can_be_filtered(visit):
    page = visit(verdicts.claims_page(CHAPTERS[0].name) + ".html")
    left = """() => [...document.querySelectorAll(".claim")].filter((e) => e.checkVisibility()).map((e) => e.id)"""
    assert len(page.evaluate(left)) == len(CHAPTERS[0].statements)
    label = CHAPTERS[0].statements[1].label
    page.fill(".bk-filter input", f"Wrong {label}".upper())
    shown = page.evaluate(left)
    assert f"claim-{label}" in shown and len(shown) < len(CHAPTERS[0].statements)
    assert page.inner_text(".bk-filter output") == f"{len(shown)} of {len(CHAPTERS[0].statements)}"
    page.fill(".bk-filter input", "")
    assert len(page.evaluate(left)) == len(CHAPTERS[0].statements) and page.trouble == []
    summary = visit("book/claims.html")
    summary.fill(".bk-filter input", "no such words")
    assert summary.evaluate("() => [...document.querySelectorAll('article h2')].every((e) => !e.checkVisibility())")


def test_a_name_lights_its_arcs(visit):
    page = visit("book/dependencies.html")
    lit = """() => [...document.querySelectorAll(".bk-uses path")]
        .filter((e) => e.style.stroke).map((e) => e.dataset.ends)"""
    one, other = page.evaluate("() => document.querySelector('.bk-uses path').dataset.ends.split(' ')")
    page.hover(f".bk-uses a[data-end='{other}']")
    assert f"{one} {other}" in (arcs := page.evaluate(lit)) and all(other in ends.split() for ends in arcs)
    name, before = page.locator(f".bk-uses a[data-end='{one}']"), page.url
    name.dispatch_event("pointerdown", {"pointerType": "touch"})
    name.dispatch_event("click")
    assert page.url == before and all(one in ends.split() for ends in page.evaluate(lit)) and page.trouble == []
    name.dispatch_event("pointerdown", {"pointerType": "touch"})
    name.dispatch_event("click")
    page.wait_for_url(f"**#{one}")  # the second tap follows


def test_every_page_says_its_version(files):
    import tiltlib

    for name in TOC:
        assert f"Version {tiltlib.__version__}" in (HTML / f"{name}.html").read_text(encoding="utf-8")


def test_a_statement_has_a_link_of_its_own(files):
    for page in PAGES:
        links = files[f"{page.name}.html"].links
        assert [s.label for s in page.statements if f"#{s.label}" not in links] == []


PREVIEWS = {
    "a statement here": ("best_of_n", 'a[href="#soft-bon-bias"]:not(.permalink)', ".proof mjx-container"),
    "a statement elsewhere": (
        "best_of_n",
        'a[href="exponential_noise.html#soft-bon-monotone"]',
        ".proof mjx-container",
    ),
    "an equation": ("guidance", 'a[href^="#equation-"]', ".math mjx-container"),
    "a source": ("best_of_n", 'a[href^="references.html#id"]', ".citation p"),
}


@pytest.mark.parametrize("link", PREVIEWS)
def test_a_link_shows_what_it_leads_to(link, visit):
    """By mouse and by keyboard; what a browser would show of itself is gone."""
    name, selector, shown = PREVIEWS[link]
    page = visit(f"book/{name}.html")
    page.wait_for_load_state("load")
    (first, *_) = [a for a in page.query_selector_all(f"article {selector}") if a.is_visible()]
    assert first.get_attribute("title") is None
    for show, hide in (
        (first.hover, lambda: page.mouse.move(0, 0)),
        (first.focus, lambda: first.evaluate("e => e.blur()")),
    ):
        show()
        page.wait_for_selector(f".tippy-box {shown}")
        hide()
        page.wait_for_selector(".tippy-box", state="detached")
    assert page.trouble == []


def test_search_finds_a_word(visit):
    page = visit("search.html?q=tilt")
    page.wait_for_selector("#search-results li a")
    assert page.trouble == []
