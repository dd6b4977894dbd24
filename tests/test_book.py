"""The book's source keeps its promises; and each check fails on a book that does not."""

import inspect
import json
import re
import subprocess
from pathlib import Path

import checks
import nbnorm
import pytest
import verdicts
import yaml
from bookext import functions_that_take, rst_docstring, takes
from calls import CALLS, PUBLIC, Inputs
from torch import nn
from verdicts import Cell, Page

from tiltlib.autoregressive import AutoregressiveModel
from tiltlib.mixtures import GaussianMixture, Tilted

ROOT = Path(__file__).parents[1]
PAGES = verdicts.read_book(ROOT)
KEYS = verdicts.bib_keys((ROOT / "book/references.bib").read_text(encoding="utf-8"))
LABELS = set().union(*(page.labels for page in PAGES))
NOTEBOOKS = sorted((ROOT / "book").glob("*.ipynb"))

PASS = "PASS   exact   a-label  n=12  eps=1e-12"
REJECT = "REJECT exact   a-label!near  n=12  error=0.031  eps=1e-12  [expected]"
MATCH = "PASS   match   a-label  n=200  plan=100  declared=1  log10E=-4  reject_at=8  power=1-1e-08  alpha=1e-08"
MEAN = MATCH.replace("match", "mean ")
MISSED = "REJECT match   a-label!beta*1.05  n=200  log10E=29  reject_at=8  [expected]"
MISSED_TOO = MISSED.replace("beta*1.05", "not-declared")
BOUND = "PASS   bound   a-label  n=2  delta=1e-08"
NOTE = "NOTE   observed  a-label.seen  n=2  limit=0.6"
WITHIN = "PASS   within  a-label  n=200  plan=100  tv_hi=0.02  eps=0.03  delta=1e-08  tier=ratio"
STATEMENT = (
    "```{prf:theorem} Title\n:label: a-label\n\n{status}`proved here` It holds.\n\n{support}`exact (a-label)`\n```"
)
PARTS = STATEMENT.replace("It holds.", "We have\n\n1. this,\n2. that.")


# Statements without a right-hand side that could be 5 % off, and why.
NO_CLOSED_FORM: dict[str, str] = {}


def book(prose=STATEMENT, output=f"{PASS}\n{REJECT}", source="check()", tags=()):
    return [Page("book/name", (Cell("markdown", prose), Cell("code", source, tuple(tags), output)))]


def nothing(found):
    assert not found, "\n" + "\n".join(found)


# --- this book -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "check",
    [
        checks.statements,
        checks.claims,
        checks.support,
        lambda pages: checks.near_misses(pages, NO_CLOSED_FORM),
        checks.claims_page,
        checks.verdict_cells,
        checks.cell_lengths,
        checks.layers,
        checks.exercises,
        checks.pictures,
        checks.captions,
        lambda pages: checks.citations(pages, KEYS),
    ],
)
def test_this_book(check):
    assert PAGES
    nothing(check(PAGES))


def test_docstrings_of_tiltlib_name_sources_that_exist():
    sources = [(p.name, p.read_text(encoding="utf-8")) for p in sorted((ROOT / "tiltlib").glob("*.py"))]
    nothing(checks.docstring_sources(sources, KEYS, LABELS))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_notebook_is_stored_normalised_and_with_outputs(path):
    nothing(nbnorm.problems(path.name, path.read_text(encoding="utf-8")))


def test_every_notebook_of_the_folder_is_in_the_table_of_contents():
    listed = {Path(page.name).name for page in PAGES}
    written = {path.stem for path in [*NOTEBOOKS, *(ROOT / "book").glob("*.md")]}
    assert written <= listed


def test_the_decision_flow_leads_to_each_recipe_and_each_recipe_to_its_chapter():
    page = next(page for page in PAGES if page.name == "book/at_work")
    text = "\n".join(cell.source for cell in page.cells if cell.kind == "markdown")
    recipes = {
        found[1]: found[2] for found in re.finditer(r"^\(recipe-(\w+)\)=\n(.*?)(?=^\(recipe-|\Z)", text, re.M | re.S)
    }
    flow = re.findall(r'href="#recipe-(\w+)"', (ROOT / "book/_static/at_work.html").read_text(encoding="utf-8"))
    lists = {"needs", "findings"}
    assert flow == [name for name in recipes if name not in lists]
    assert lists == set(re.findall(r"\]\(recipe-(\w+)\)", text))
    for name in flow:
        advice = re.findall(r"^- \*\*If (.*)", recipes[name], re.M)
        assert 1 <= len(advice) <= 4, name
        assert "](" in recipes[name].rsplit("hapter", 1)[-1], f"{name} links to no chapter"
    _, *findings = re.split(r"^- ", recipes["findings"].split("## Where next")[0], flags=re.M)
    assert len(findings) > 10
    assert [found for found in findings if not re.search(r"\{prf:ref\}|\]\(", found)] == []


def test_the_map_names_every_chapter_by_its_title():
    svg = (ROOT / "book/_static/map.svg").read_text(encoding="utf-8")
    links = re.findall(r'<a href="(\w+)\.html">(.*?)</a>', svg, re.S)
    named = {page: " ".join(re.findall(r"<text[^>]*>([^<]*)</text>", words)) for page, words in links}
    parts = yaml.safe_load((ROOT / "_toc.yml").read_text(encoding="utf-8"))["parts"]
    files = [chapter["file"] for part in parts if part.get("numbered") for chapter in part["chapters"]]
    titles = {page.name: page.title for page in PAGES}
    assert len(links) == len(named) and named == {Path(file).name: titles[file] for file in files}


def test_a_link_to_a_statement_without_chapter_number_names_its_page():
    """Such a page counts from 1, so that "Theorem 1" alone would be read as one of the page that has the link."""
    parts = yaml.safe_load((ROOT / "_toc.yml").read_text(encoding="utf-8"))["parts"]
    numbered = {chapter["file"] for part in parts if part.get("numbered") for chapter in part["chapters"]}
    title_of = {s.label: page.title for page in PAGES if page.name not in numbered for s in page.statements}
    own = {page.name: {s.label for s in page.statements} for page in PAGES}
    assert title_of
    bare = []
    for page in PAGES:
        for link in re.finditer(r".{0,30}\{prf:ref\}`([\w-]+)`.{0,30}", page.prose):
            label = link[1]
            if label in title_of and label not in own[page.name] and title_of[label] not in link[0]:
                bare.append(f"{page.name}: {link[0]}")
    nothing(bare)


def test_launch_and_edit_links_lead_to_files_in_git():
    config = yaml.safe_load((ROOT / "_config.yml").read_text(encoding="utf-8"))
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout.split()
    paths = [verdicts.source_of(ROOT, page.name).relative_to(ROOT).as_posix() for page in PAGES]
    assert not set(paths) - set(tracked), "pages that git does not have"
    nothing(checks.links(config, set(tracked), paths))


def test_the_example_of_the_readme_prints_what_the_readme_says(capsys):
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    program, shown = (re.search(rf"```{kind}\n(.*?)```", readme, re.S)[1] for kind in ("python", "text"))
    exec(compile(program, "README.md", "exec"), {})
    assert capsys.readouterr().out == shown


# --- the checks can fail -------------------------------------------------------------------------------------------


def test_a_good_book_passes_every_check():
    pages = book()
    for check in (checks.statements, checks.claims, checks.claims_page, checks.verdict_cells, checks.exercises):
        assert check(pages) == []
    assert checks.claims(book(output=f"{MATCH}\n{MISSED}\n{MISSED_TOO}")) == []
    assert checks.claims(book(output=f"{MEAN}\n{MISSED.replace('match', 'mean ')}")) == []
    assert checks.claims(book(output=f"{PASS}\n{REJECT}\n{NOTE}")) == []  # an observation needs no falsifier
    assert checks.support(pages) == []


@pytest.mark.parametrize(
    ("prose", "problem"),
    [
        (STATEMENT.replace(":label: a-label\n", ""), "has no label"),
        (STATEMENT.replace("a-label", "a.label"), "no `.`"),
        (STATEMENT.replace("{status}`proved here` ", ""), "status is ''"),
        (STATEMENT.replace("proved here", "obvious"), "status is 'obvious'"),
        (STATEMENT.replace("a-label", "other-label"), "no claim passed for it"),
        (STATEMENT.replace("proved here", "open"), "an open question carries no claim"),
        (STATEMENT + "\n\n" + STATEMENT.replace("theorem", "lemma"), "label a-label is used twice"),
    ],
)
def test_statements_finds(prose, problem):
    assert problem in " ".join(checks.statements(book(prose)))


@pytest.mark.parametrize(
    ("output", "problem"),
    [
        (f"{PASS}\n{REJECT}\nPASS a-label n=12", "cannot read the verdict line"),
        (f"{PASS}\n{PASS}\n{REJECT}", "a-label: printed 2 times"),
        (f"{PASS}\n{REJECT}".replace("a-label", "unknown"), "no statement is labelled unknown"),
        (PASS, "no falsifier of it was rejected"),
        (f"{PASS.replace('a-label', 'a-label.part')}\n{REJECT}", "a-label.part: no falsifier"),
        (f"{PASS}\n{REJECT.replace('  [expected]', '')}", "must be rejected, and expected"),
        (f"{PASS}\n{REJECT.replace('REJECT', 'PASS  ')}", "must be rejected, and expected"),
        (f"{PASS}\n{REJECT.replace('0.031', '5e-12')}", "misses by less than 100 eps"),
        (f"{PASS.replace('PASS  ', 'REJECT')}\n{REJECT}", "a-label: REJECT"),
        (f"{MATCH.replace('PASS', 'INCONCLUSIVE')}\n{MISSED}", "a-label: INCONCLUSIVE"),
        (f"{MATCH.replace('n=200', 'n=99')}\n{MISSED}", "n=99 is below plan=100"),
        (f"{MATCH.replace('plan=100  ', '')}\n{MISSED}", "below plan=None"),
        (f"{MATCH.replace('1-1e-08', '1-1e-06')}\n{MISSED}", "power is 1-1e-06"),
        (f"{MATCH.replace('power=1-1e-08  ', '')}\n{MISSED}", "power is None"),
        (f"{MATCH}\n{MISSED}", "a-label: no wrong version was rejected that was not declared to it"),
        (f"{MATCH.replace('declared=1  ', '')}\n{MISSED}\n{MISSED_TOO}", "no wrong version was rejected that was not"),
        (f"{MATCH.replace('alpha=1e-08', 'alpha=1e-06')}\n{MISSED}", "alpha is 1e-06"),
        (WITHIN.replace("1e-08", "1e-06"), "delta is 1e-06"),
        (WITHIN.replace("tv_hi=0.02", "tv_hi=0.04"), "tv_hi=0.04 is above eps=0.03"),
        (WITHIN.replace("n=200", "n=9"), "n=9 is below plan=100"),
        *[
            ("\n".join(line.replace("a-label", f"a-label.{i}") for i in range(101)), f"chance of any {error}: 1.0e-06")
            for line in (MATCH, MEAN, BOUND, WITHIN)
            for error in ("false alarm", "false pass")
        ],
        (f"{MEAN.replace('n=200', 'n=99')}\n{MISSED}", "n=99 is below plan=100"),
        (f"{MEAN.replace('1-1e-08', '1-1e-06')}\n{MISSED}", "power is 1-1e-06"),
        (BOUND.replace("1e-08", "1e-07"), "delta is 1e-07"),
        (NOTE.replace("NOTE  ", "REJECT"), "a-label.seen: REJECT"),
        (NOTE.replace("observed", "noted"), "cannot read the verdict line"),
        (f"{MEAN.replace('alpha=1e-08', 'alpha=1e-06')}\n{MISSED}", "alpha is 1e-06"),
    ],
)
def test_claims_finds(output, problem):
    assert problem in " ".join(checks.claims(book(output=output)))


@pytest.mark.parametrize(
    ("said", "problem"),
    [
        ("", "cannot read ''"),
        ("1 exact (a-label)", "says how parts ['1'] are supported, has parts ['1', '2']"),
        ("1 exact (a-label); 2 proof; 3 proof", "says how parts ['1', '2', '3'] are supported"),
        ("exact (a-label)", "says how parts [''] are supported"),
        ("1 exact (a-label); 2 obvious", "cannot read 'obvious'"),
        ("1 exact; 2 proof", "exact must name verdicts"),
        ("1 exact (a-label); 2 proof (a-label)", "proof names verdicts"),
        ("1 exact (a-label); 2 exact (other)", "no verdict is named other"),
        ("1 sampled (a-label); 2 proof", "a-label is exact, not sampled"),
        ("1 proof; 2 open", "a-label is printed but supports no part"),
    ],
)
def test_support_finds(said, problem):
    assert problem in " ".join(checks.support(book(PARTS.replace("exact (a-label)", said))))


@pytest.mark.parametrize(
    ("line", "word"),
    [(PASS, "exact"), (BOUND, "certified"), (WITHIN, "certified"), (MATCH, "sampled"), (MEAN, "sampled")]
    + [(BOUND.replace("  delta=1e-08", ""), "exact"), (NOTE.replace("a-label.seen", "a-label"), "observed")],
)
def test_support_knows_what_each_kind_shows(line, word):
    for said in verdicts.SUPPORT:
        if said not in ("proof", "open"):
            pages = book(STATEMENT.replace("exact (a-label)", f"{said} (a-label)"), line)
            assert (checks.support(pages) == []) == (said == word)


def test_what_is_also_shown_supports_no_part():
    said = PARTS.replace("exact (a-label)", "1 exact (a-label); 2 proof; also (seen)")
    pages = book(said, f"{PASS}\n{REJECT}\n{NOTE}")
    assert checks.support(pages) == []
    (_, [entry]), *_ = verdicts.entries(pages)
    assert [(head, [v.id for v in found]) for head, found in entry.by_part] == [
        ("Part 1: exact", ["a-label", "a-label!near"]),
        ("Part 2: by proof alone", []),
        (verdicts.ALSO, ["a-label.seen"]),
    ]
    assert verdicts.support_in_words(pages[0].statements[0].support) == "part 1: exact; part 2: by proof alone"
    only = book(STATEMENT.replace("exact (a-label)", "also (a-label)"))
    assert "says how parts [] are supported, has parts ['']" in " ".join(checks.support(only))
    single = book(STATEMENT.replace("exact (a-label)", "exact (a-label); also (seen)"), f"{PASS}\n{REJECT}\n{NOTE}")
    assert checks.support(single) == []
    (_, [entry]), *_ = verdicts.entries(single)
    assert [head for head, _ in entry.by_part] == ["exact", verdicts.ALSO]


def test_support_is_said_by_every_statement_but_an_open_one():
    assert checks.support(book(STATEMENT.replace("{support}`exact (a-label)`", "")))
    bare = STATEMENT.replace("{support}`exact (a-label)`", "").replace("proved here", "open")
    assert checks.support(book(bare, "")) == []
    pages = book(PARTS.replace("exact (a-label)", "1 exact (a-label), proof; 2 exact (a-label)"))
    assert checks.support(pages) == []
    assert (
        verdicts.support_in_words(pages[0].statements[0].support) == "part 1: exact and by proof alone; part 2: exact"
    )
    assert verdicts.support_in_words("1 exact (a); 2 proof; 3 exact (b); 4 exact (a)") == (
        "parts 1, 3 and 4: exact; part 2: by proof alone"
    )


def test_near_misses_finds_a_formula_that_was_never_wrong_by_a_little():
    (problem,) = checks.near_misses(book(), {})
    assert problem == "a-label: no falsifier is 5 % off"
    for slug in ("beta*1.05", "rhs*0.95", "5-percent"):
        assert checks.near_misses(book(output=REJECT.replace("near", slug)), {}) == []
    assert checks.near_misses(book(), {"a-label": "it says that something exists"}) == []
    assert "said to have no closed form" in checks.near_misses(book(output=MISSED), {"a-label": "none"})[0]
    assert checks.near_misses(book(output=MISSED), {"gone": "none"}) == ["gone: no such statement"]


def test_the_chances_of_error_add_up():
    lines = [MATCH, MEAN.replace("a-label", "b"), BOUND.replace("a-label", "c"), WITHIN.replace("a-label", "d")]
    pages = book(
        output="\n".join([*lines, MISSED, NOTE, PASS.replace("a-label", "e"), WITHIN.replace("a-label", "d!x")])
    )
    assert verdicts.false_alarms(pages) == pytest.approx(4e-8) and verdicts.false_passes(pages) == pytest.approx(4e-8)
    weaker = book(output=MATCH.replace("alpha=1e-08", "alpha=3e-08").replace("power=1-1e-08", "power=1-2e-07"))
    assert verdicts.false_alarms(weaker) == pytest.approx(3e-8)
    assert verdicts.false_passes(weaker) == pytest.approx(2e-7)
    assert "any true claim is rejected: at most 4e-8; that" in verdicts.summary(pages)
    assert (
        "any true claim is rejected: at most 3e-8; that a declared wrong version or a false bound passes: at most 2e-7."
        in verdicts.summary(weaker)
    )


def test_the_summary_of_this_book_adds_up_its_verdict_lines():
    # Again from the text of the notebooks, without the parser.
    lines = [line for p in PAGES for c in p.cells for line in c.output.splitlines() if line.startswith("PASS ")]
    assert lines
    lines = [line for line in lines if "!" not in line]
    numbers = {
        name: sum(float(x) for line in lines for x in re.findall(rf" {name}=(?:1-)?(\S+)", line))
        for name in ("alpha", "power", "delta")
    }
    alarms, passes = numbers["alpha"] + numbers["delta"], numbers["power"] + numbers["delta"]
    said = re.search(
        r"rejected: at most (\S+); that a declared wrong version or a false bound passes: at most (\S+)\.\*",
        verdicts.summary(PAGES),
    )
    assert [float(x) for x in said.groups()] == [pytest.approx(alarms, rel=0.1), pytest.approx(passes, rel=0.1)]
    assert alarms <= float(said[1]) * (1 + 1e-9) <= 1e-6 and passes <= float(said[2]) * (1 + 1e-9) <= 1e-6


def test_claims_page_finds_what_is_not_shown():
    assert checks.claims_page(book(output=PASS.replace("a-label", "lost"))) == ["lost: not on the claims page"]


def test_verdict_cells_finds_ignored_output():
    assert checks.verdict_cells(book(tags=["nbval-ignore-output"]))
    assert checks.verdict_cells(book(tags=["remove-output"]))
    assert checks.verdict_cells(book(source="# NBVAL_IGNORE_OUTPUT\ncheck()"))


def test_cell_lengths_finds_a_wall_of_code():
    wall = "\n".join(["x = 1"] * 13)
    assert checks.cell_lengths(book(source=wall))
    for tag in ("hide-input", "check", "setup"):
        assert checks.cell_lengths(book(source=wall, tags=[tag])) == []


LESSON = Cell("code", "verify.report(lesson())", ("lesson",))


def layered(*cells):
    """A page with a statement, then cells as (source, *tags), then a lesson."""
    code = [Cell("code", source, tags) for source, *tags in cells]
    return [Page("book/name", (Cell("markdown", STATEMENT), *code, Cell("markdown", "Now"), LESSON))]


def test_layers_pass_where_each_cell_knows_its_own():
    assert checks.layers(layered(("x = 1",), ("y = x + 1", "check"), ("print(x)",), ("z = [y for y in [x]]",))) == []
    assert checks.layers([Page("book/intro", (Cell("markdown", "No statement, no lesson."),))]) == []


@pytest.mark.parametrize(
    "use",
    "print(y)\ny += 1\ndef f(x=y): ...\nf = lambda x: x + y\n[x for x in y]\n[y + x for x in []]\n{x: y for x in []}\n"
    "y = y + 1\nfor y in y: ...\nf'{y:.3f}'\ny.sort()\ny[0] = 1\nprint(*y)\n[x for x in [] for z in y]".split("\n")
    + ["def f():\n    return y", "def f():\n    def g():\n        return y", "with y as x:\n    pass"],
)
def test_layers_find_a_name_from_a_check_cell(use):
    (problem,) = checks.layers(layered(("y = 1", "check"), (use,)))
    assert problem == f"book/name: the cell `{use.splitlines()[0]}` uses y, which a check cell defines"


@pytest.mark.parametrize(
    "use",
    "y = 2; print(y)\nfor y in [1]: print(y)\nf = lambda y: y + 1\n[y for y in []]\nfrom math import pi as y; y\nx.y\n"
    "f(y=1)\n{y: 1 for y in []}\nimport y.z; y".split("\n")
    + ["def f():\n    y = 1\n    return y", "def f(*y):\n    return y", "def y():\n    return 1\ny()"],
)
def test_layers_let_a_main_cell_define_the_name_itself(use):
    assert checks.layers(layered(("x = f = 1",), ("y = 1", "check"), (use,))) == []


def test_layers_know_that_a_check_may_change_what_a_main_cell_defined():
    assert checks.layers(layered(("y = 1",), ("y = 2", "check"), ("print(y)",)))
    assert checks.layers(layered(("y = 2", "check"), ("y = 1",), ("print(y)",))) == []
    for definition in ("def y(): ...", "import y", "for y in []: ...", "y, z = 1, 2", "with x as y: ...", "(y := 1)"):
        assert checks.layers(layered(("x = 1",), (definition, "check"), ("print(y)",))), definition


def test_layers_find_a_check_without_statement_and_a_verdict_in_the_main_flow():
    lost = [Page("book/name", (Cell("code", "\ncheck()\n", ("check",)), Cell("markdown", STATEMENT), LESSON))]
    assert checks.layers(lost) == ["book/name: no statement above the check cell `check()`"]
    said = "book/name: the cell `verify.report(verify.exact(1, 1))` verifies, but is tagged neither check nor lesson"
    assert checks.layers(layered(("verify.report(verify.exact(1, 1))",))) == [said]
    printed = layered()[0]._replace(cells=(*layered()[0].cells, Cell("code", "f()", (), PASS)))
    assert "`f()` verifies" in checks.layers([printed])[0]


def test_layers_allow_one_lesson():
    page = layered()[0]
    assert checks.layers([page._replace(cells=(*page.cells, LESSON))]) == []  # one lesson in two cells
    assert checks.layers([page._replace(cells=page.cells[:-1])]) == []
    (problem,) = checks.layers([page._replace(cells=(*page.cells, Cell("markdown", "And"), LESSON))])
    assert problem == "book/name: 2 lessons; a chapter leaves one check open at most"


THEOREM = Cell("markdown", "```{prf:theorem} A\n:label: a\n```")
LEMMA = Cell("markdown", "```{prf:lemma} B\n:label: b\n```")
SECTION = Cell("markdown", "## Next")
SHOWN = Cell("code", 'figures.show(fig, "alt", "Each of these six words counts.")', (), "[figure] alt")


def test_a_theorem_without_a_picture_is_found():
    for cells in ((SHOWN, SECTION, THEOREM), (SECTION, THEOREM, SHOWN), (SECTION, SHOWN, LEMMA, THEOREM)):
        assert checks.pictures([Page("book/name", cells)]) == []
    for cells in (
        (THEOREM,),
        (THEOREM, LEMMA, SHOWN),
        (THEOREM, SECTION, SHOWN),
        (SECTION, SHOWN, SECTION, THEOREM),
    ):
        (problem,) = checks.pictures([Page("book/name", cells)])
        assert problem.startswith("book/name: a has no picture")
    hidden = SHOWN._replace(tags=("check",))  # folded behind a proof
    assert len(checks.pictures([Page("book/name", (hidden, THEOREM))])) == 1


def test_a_caption_that_says_little_is_found():
    assert checks.captions([Page("book/name", (SHOWN,))]) == []
    for call in (
        'figures.show(fig, "alt")',
        'figures.slider(figs, labels, "alt", "Too short.")',
        'figures.explorable("x", "y")',
    ):
        (problem,) = checks.captions([Page("book/name", (Cell("code", call),))])
        assert problem.startswith("book/name: a caption of ")
    long = 'figures.explorable("x", "y", caption=f"Push {n} to one: what happens to it then?")'
    assert checks.captions([Page("book/name", (Cell("code", long),))]) == []


EXERCISE = Cell("markdown", "```{exercise}\n:label: ex\nDo it.\n```")
SOLUTION = Cell("markdown", "```{solution-start} ex\n:class: dropdown\n```")
END = Cell("markdown", "```{solution-end}\n```")
FILL = Cell("code", "check(...)", ("exercise", "raises-exception"), "AssertionError: Fill in the answer.")
RIGHT = Cell("code", "check(2)", ("exercise",), "Right: it is two.")
MISTAKE = Cell("code", "check(3)", ("exercise", "raises-exception"), "AssertionError: That counts both ends.")
PASSES = MISTAKE._replace(output="Right: it is three.")
MUTE = MISTAKE._replace(output="AssertionError: ")


@pytest.mark.parametrize(
    ("cells", "problem"),
    [
        ((EXERCISE, FILL), "has no solution"),
        ((EXERCISE, FILL, SOLUTION._replace(source="```{solution} ex\nDone.\n```")), "not a dropdown"),
        ((EXERCISE, SOLUTION, RIGHT, MISTAKE, END), "no cell to fill"),
        ((EXERCISE, FILL, SOLUTION, MISTAKE, END), "no cell of the solution prints that the answer is right"),
        ((EXERCISE, FILL, SOLUTION, RIGHT, END), "no cell of the solution shows a common mistake"),
        ((EXERCISE, FILL, SOLUTION, RIGHT, PASSES, END), "a mistake passes: `check(3)`"),
        ((EXERCISE, FILL, SOLUTION, RIGHT, MUTE, END), "fails without a hint"),
        ((EXERCISE, FILL, SOLUTION, END, RIGHT, MISTAKE), "in no exercise: `check(2)`"),
    ],
)
def test_exercises_finds(cells, problem):
    assert problem in " ".join(checks.exercises([Page("book/name", cells)]))
    assert checks.exercises([Page("book/name", (EXERCISE, FILL, SOLUTION, RIGHT, MISTAKE, END))]) == []


def test_citations_finds_an_unknown_key():
    assert checks.citations(book("{cite:p}`known, unknown`"), {"known"}) == [
        "book/name: cites unknown, which is not in references.bib"
    ]


@pytest.mark.parametrize("source", ["Source: [unknown].", "Source:\n    Known [known]; chapter 2,\n    `unknown`."])
def test_docstring_sources_finds(source):
    code = f'def f():\n    """Do it.\n\n    {source.replace(chr(10), chr(10) + "    ")}\n    """\n'
    assert "unknown" in " ".join(checks.docstring_sources([("m.py", code)], {"known"}, {"a-label"}))
    assert checks.docstring_sources([("m.py", code)], {"known", "unknown"}, {"unknown"}) == []


def test_links_finds_dead_links():
    config = {"repository": {"url": "https://example.org/a/b", "branch": "master", "path_to_book": "book"}}
    found = " ".join(checks.links(config, {"book/a.md"}, ["book/a.md", "book/b.md"]))
    assert "book/b.md: linked, but not in git" in found and "'master'" in found and "path_to_book" in found
    assert checks.links({"repository": {"url": ""}}, set(), ["book/b.md"]) == []


# Numbers of chapters change when a chapter is split; titles and labels stay. "[key], chapter 3" is of another book.
NUMBERED = re.compile(r"(?i)(?<![\]`], )\bchapters?\s\d")


def test_no_text_counts_chapters():
    texts = {page.name: "\n".join(cell.source for cell in page.cells) for page in PAGES}
    paths = [*ROOT.glob("tiltlib/*.py"), *ROOT.glob("tests/*.py"), *ROOT.glob("book/_ext/*"), *ROOT.glob("*.md")]
    texts |= {path.name: path.read_text(encoding="utf-8") for path in paths if path.is_file()}
    texts.pop(Path(__file__).name)
    nothing([f"{name}: {text[m.start() :][:40]!r}" for name, text in texts.items() for m in NUMBERED.finditer(text)])


def test_counted_chapters_are_seen():
    assert NUMBERED.search("as in Chapter 3") and NUMBERED.search("(chapters 8 and 9)")
    assert not NUMBERED.search("Source: [a1999], chapter 3.") and not NUMBERED.search("{cite:t}`a1999`, chapter 11")


# --- reading -------------------------------------------------------------------------------------------------------


def test_a_verdict_line_is_read_field_by_field():
    v = verdicts.parse_verdict(MISSED.replace("a-label", "a-label.k32"))
    assert (v.decision, v.kind, v.claim, v.slug, v.label) == ("REJECT", "match", "a-label.k32", "beta*1.05", "a-label")
    assert v.expected and v.fields == {"n": "200", "log10E": "29", "reject_at": "8"}
    assert verdicts.parse_verdict(MATCH).number("power") == 1e-8
    assert (v.name, verdicts.parse_verdict(MATCH).name) == ("k32", "a-label")
    assert verdicts.parse_verdict("PASS the salt") is None


def test_the_claims_page_says_what_each_line_shows():
    (_, [entry]), *_ = verdicts.entries(book(output=f"{MISSED}\n{MATCH}\n{MISSED_TOO.replace('=29', '=9')}"))
    claim, *falsifiers = entry.verdicts  # a falsifier follows its claim whatever was printed first
    assert "200 draws (100 planned)" in verdicts.evidence(claim) and "1 − 1e-8" in verdicts.evidence(claim)
    said = "Wrong versions rejected: `not-declared` (log10 E = 9), `beta*1.05`."  # the closest first
    assert verdicts.rejected(falsifiers) == said and verdicts.rejected([]) == ""
    assert "1 of 1 wrong versions rejected" in verdicts.summary(book())
    (_, [entry]), *_ = verdicts.entries(book(output=f"{MEAN}\n{MISSED.replace('match', 'mean ')}"))
    assert "200 values (100 planned) have the stated mean" in verdicts.evidence(entry.verdicts[0])
    for line, words in (
        (PASS, "12 computed values are within 1e-12 of the stated."),
        (PASS.replace("=12 ", "=1 "), "1 computed value is within 1e-12 of the stated."),
        (
            BOUND,
            "The stated inequality holds on 2 instances. Chance that a confidence bound among them is false: at most",
        ),
        (WITHIN, "within total variation 0.02 of the stated law (by ratio), less than 0.03. Chance that this bound is"),
        (NOTE, "2 numbers were seen at most 0.6. The limit was set after looking: not a claim."),
    ):
        assert words in verdicts.evidence(verdicts.parse_verdict(line))


def test_the_line_of_evidence_counts_what_was_checked():
    two = MATCH.replace("a-label", "a-label.b").replace("n=200", "n=300")
    lines = [PASS, REJECT, MATCH.replace("a-label", "a-label.c"), two, MISSED, NOTE]
    (_, [entry]), *_ = verdicts.entries(
        book(PARTS.replace("exact (a-label)", "1 exact (a-label); 2 proof"), "\n".join(lines))
    )
    line = verdicts.evidence_line(entry)
    assert line.startswith("Checked: 1 exact, 2 on 200 to 300 draws, 1 observed; 2 wrong versions rejected.")
    assert line.endswith("rejected. Part 1: exact; part 2: by proof alone.")
    (_, [entry]), *_ = verdicts.entries(book(output=f"{MATCH}\n{MISSED}"))
    assert verdicts.evidence_line(entry) == "Checked: 1 on 200 draws; 1 wrong version rejected."


def test_a_statement_uses_what_it_and_its_proof_name():
    lemma = STATEMENT.replace("theorem", "lemma").replace("a-label", "b-label")
    proof = (
        "```{prf:proof}\nBy {prf:ref}`a-label`, {prf:ref}`this <a-label>`, {prf:ref}`b-label` and {prf:ref}`gone`.\n```"
    )
    pages = [*book(f"{STATEMENT}\n\nSee {{prf:ref}}`b-label`."), *book(f"{lemma}\n\n{proof}")]
    assert [(s.label, used) for s, used in verdicts.uses(pages)] == [("a-label", []), ("b-label", ["a-label"])]
    used = verdicts.uses(PAGES)
    assert {s.label for s, _ in used} == {s.label for p in PAGES for s in p.statements}
    rests, left = {s.label: set(labels) for s, labels in used}, {s.label for s, _ in used}
    while ready := {label for label in left if not rests[label] & left}:
        left -= ready
    assert not left, f"these proofs go in a circle: {sorted(left)}"


def test_verdicts_are_shown_under_the_nearest_statement_above():
    (page,) = layered((PASS, "check"))
    page = page._replace(cells=(Cell("code", "", (), PASS), Cell("markdown", STATEMENT), Cell("code", "", (), MATCH)))
    assert [(label, [v.kind for v in found]) for label, found in page.shown_under] == [
        ("", ["exact"]),
        ("a-label", ["match"]),
    ]


def test_blocks_are_found_inside_blocks():
    text = "::::{prf:lemma} Outer\n:label: outer\n\n```{math}\nx\n```\n::::\n\nAfter."
    outer, inner = verdicts.blocks(text)
    assert (outer.argument, outer.options, inner.name, inner.body) == ("Outer", {"label": "outer"}, "math", "x")
    assert "After" not in outer.body


def notebook(**cell):
    new = {"cell_type": "code", "metadata": {}, "source": "1 + 1", "execution_count": 7, "outputs": [], **cell}
    return json.dumps({"cells": [new], "metadata": {}, "nbformat": 4, "nbformat_minor": 4})


PRINTED = [{"output_type": "stream", "name": "stdout", "text": "2\n"}]
FIGURE = [{"output_type": "display_data", "metadata": {}, "data": {"image/png": "AAAA", "text/plain": "[figure]"}}]


def test_nbnorm_keeps_text_only_and_is_idempotent():
    stored = nbnorm.normalise(notebook(outputs=FIGURE, metadata={"tags": ["hide-input"], "collapsed": True}))
    cell = json.loads(stored)["cells"][0]
    assert cell["outputs"][0]["data"] == {"text/plain": ["[figure]"]}
    assert (cell["id"], cell["execution_count"], cell["metadata"]) == ("c000", 1, {"tags": ["hide-input"]})
    assert nbnorm.normalise(stored) == stored and nbnorm.problems("a.ipynb", stored) == []


def test_nbnorm_refuses_other_forms_and_cleared_outputs():
    assert "not normalised" in " ".join(nbnorm.problems("a.ipynb", notebook(outputs=PRINTED)))
    cleared = nbnorm.normalise(notebook(execution_count=None))
    assert "without outputs" in " ".join(nbnorm.problems("a.ipynb", cleared))


def test_nbnorm_accepts_only_a_run_of_the_same_code():
    ran = notebook(outputs=PRINTED)
    assert json.loads(nbnorm.accept(notebook(), ran))["cells"][0]["outputs"][0]["text"] == ["2\n"]
    with pytest.raises(ValueError, match="its code has changed"):
        nbnorm.accept(notebook(source="1 + 2"), ran)


# What one would have to bring: a model, a mixture, a chain, or a function of one's own.
BROUGHT = (AutoregressiveModel, GaussianMixture, Tilted, nn.Module)


def test_the_mark_of_a_function_says_what_its_example_calls_bring():
    """`tensors` is no promise of the annotations alone: no call hands over more, and of the others each call does."""
    brought = {}
    for key, make in CALLS.items():
        values = [(v, p.default) for v, p in arguments(make(Inputs()))]
        more = any(isinstance(v, BROUGHT) or (callable(v) and v is not default) for v, default in values)
        brought.setdefault(key.split()[0], []).append(more)
    functions = {name: thing for name, thing in PUBLIC.items() if inspect.isfunction(thing) and name.count(".") == 1}
    assert len(brought.keys() & functions.keys()) > 80
    for name in brought.keys() & functions.keys():
        plain = takes(functions[name]) == "tensors"
        assert any(brought[name]) != plain, f"{name} is marked {takes(functions[name])!r}"


def arguments(call):
    bound, parameters = call.bound, inspect.signature(call.function).parameters
    return [(value, parameters[name]) for name, value in bound.arguments.items()]


def test_each_function_has_one_mark_and_a_place_in_its_table():
    marks = ("tensors", "your model", "mixture", "Markov chain")
    tables = [functions_that_take(mark) for mark in marks]
    shown = [f"{module}.{name}" for table in tables for module, names in table.items() for name in names]
    wanted = [name for name, thing in PUBLIC.items() if inspect.isfunction(thing) and name.count(".") == 1]
    assert sorted(shown) == sorted(wanted)
    assert "pool.curve" in shown and list(tables[0])[:2] == ["weights", "categorical"]
    for name in ("guidance.exact_value", "guidance.log_values"):
        assert takes(PUBLIC[name]) == "mixture"


def test_docstrings_become_restructured_text():
    lines = [
        "Tilt |w|.",
        "    P_ = a * b",
        "",
        "Args:",
        "    x: Reward `r`.",
        "    y: As in `a-label`, `churn`, -inf.",
        "",
        "Source: [known], `a-label`.",
        "Source: `churn`.",
    ]
    text = "\n".join(rst_docstring(lines, {"a-label", "churn"}, {"known"}))
    assert "Tilt \\|w\\|.\n\n.. code-block:: text\n\n    P_ = a * b\n" in text
    assert "x: Reward ``r``." in text
    assert "y: As in :prf:ref:`a-label`, ``churn``, \N{MINUS SIGN}inf." in text
    assert ":Source: :cite:t:`known`, :prf:ref:`a-label`." in text
    assert ":Source: :prf:ref:`churn`." in text
