"""What must hold in the book's source. Each check is a pure function that returns the list of what it found wrong."""

from __future__ import annotations

import ast
import itertools
import re
from collections import Counter
from collections.abc import Collection, Iterable

import verdicts
from verdicts import Cell, Page, Verdict

ALPHA = 1e-8  # false alarm of one match or mean claim
MISS = 1e-8  # chance that such a claim misses a declared wrong version
DELTA = 1e-8  # chance that the confidence bounds of one claim are false
FAMILY = 1e-6  # chance of any false alarm in the whole book, and of any false pass
CLEAR_MISS = 100  # a near-miss of an exact claim is off by this many tolerances
NEAR = re.compile(r"1\.05|0\.95|5-percent")  # in the name of a falsifier whose right-hand side is 5 % off
CELL_LINES = 12
RAISES = "raises-exception"
UNSEEN = {"hide-input", "hide-cell", "remove-input", "remove-cell", "setup", verdicts.CHECK, verdicts.EXERCISE}
UNCOMPARED = {"nbval-ignore-output", "nbval-skip", "remove-cell", "remove-output"}
_CITE = re.compile(r"\{cite(?::\w+)?\}`([^`]+)`")


def statements(pages: list[Page]) -> list[str]:
    """Each statement has a label and a status; claims belong to what is proved or cited, and only to that."""
    found = []
    claimed = {v.label for p in pages for v in p.verdicts if v.decision == "PASS" and not v.slug}
    listed = [s for p in pages for s in p.statements]
    for s in listed:
        name = f"{s.page}: {s.kind} {s.label or s.title}"
        if not s.label:
            found.append(f"{name}: has no label")
        if "." in s.label or "!" in s.label:
            found.append(f"{name}: a label has no `.` and no `!`")
        if s.status not in verdicts.STATUSES:
            found.append(f"{name}: status is {s.status!r}, expected one of {', '.join(verdicts.STATUSES)}")
        if s.status != "open" and s.label not in claimed:
            found.append(f"{name}: no claim passed for it")
        if s.status == "open" and s.label in claimed:
            found.append(f"{name}: an open question carries no claim")
    twice = [label for label, times in Counter(s.label for s in listed if s.label).items() if times > 1]
    return found + [f"label {label} is used twice" for label in twice]


def claims(pages: list[Page]) -> list[str]:
    """Each verdict line is well formed, belongs to a statement, is as strong as promised, and can fail."""
    found = []
    labels = {s.label for p in pages for s in p.statements}
    for page in pages:
        for line in (line for cell in page.cells for line in cell.output.splitlines()):
            if re.match(r"\s*(PASS|REJECT|INCONCLUSIVE|NOTE)\b", line) and verdicts.parse_verdict(line) is None:
                found.append(f"{page.name}: cannot read the verdict line {line!r}")
    printed = [v for p in pages for v in p.verdicts]
    found += [f"{name}: printed {n} times" for name, n in Counter(v.id for v in printed).items() if n > 1]
    rejected = Counter(v.claim for v in printed if v.slug and v.decision == "REJECT" and v.expected)
    for v in printed:
        if v.label not in labels:
            found.append(f"{v.id}: no statement is labelled {v.label}")
        if v.slug:
            if v.decision != "REJECT" or not v.expected:
                found.append(f"{v.id}: a falsifier must be rejected, and expected to be")
            if v.kind == "exact" and not v.number("error") >= CLEAR_MISS * v.number("eps"):
                found.append(f"{v.id}: misses by less than {CLEAR_MISS} eps")
            continue
        if v.kind == "observed":
            if v.decision != "NOTE":
                found.append(f"{v.id}: {v.decision}")
            continue
        if v.decision != "PASS":
            found.append(f"{v.id}: {v.decision}")
        if not rejected[v.claim]:
            found.append(f"{v.id}: no falsifier of it was rejected")
        if v.kind in ("match", "mean", "within") and not v.number("n") >= v.number("plan"):
            found.append(f"{v.id}: n={v.fields.get('n')} is below plan={v.fields.get('plan')}")
        if v.kind in ("match", "mean") and not v.number("power") <= MISS * (1 + 1e-9):
            found.append(f"{v.id}: power is {v.fields.get('power')}, less than 1-{MISS:.0e}")
        if v.kind in ("match", "mean") and not v.number("alpha") <= ALPHA * (1 + 1e-9):
            found.append(f"{v.id}: alpha is {v.fields.get('alpha')}, more than {ALPHA:.0e}")
        # Each declared wrong law has one falsifier, so one more is a law that nobody had told the check about.
        if v.kind == "match" and not rejected[v.claim] > v.number("declared"):
            found.append(f"{v.id}: no wrong version was rejected that was not declared to it")
        if (v.kind == "within" or "delta" in v.fields) and not v.number("delta") <= DELTA * (1 + 1e-9):
            found.append(f"{v.id}: delta is {v.fields.get('delta')}, more than {DELTA:.0e}")
        if v.kind == "within" and not v.number("tv_hi") <= v.number("eps"):
            found.append(f"{v.id}: tv_hi={v.fields.get('tv_hi')} is above eps={v.fields.get('eps')}")
    sums = {"false alarm": verdicts.false_alarms(pages), "false pass": verdicts.false_passes(pages)}
    found += [f"chance of any {name}: {x:.1e}, more than {FAMILY:.0e}" for name, x in sums.items() if not x <= FAMILY]
    return found


def support(pages: list[Page]) -> list[str]:
    """Each statement says how it is supported, part by part, and the verdicts that it names do exist and do that."""
    found = []
    printed: dict[str, dict[str, Verdict]] = {}
    for v in (v for p in pages for v in p.verdicts if not v.slug):
        printed.setdefault(v.label, {})[v.name] = v
    for s in (s for p in pages for s in p.statements):
        if s.status == "open" and not s.support:
            continue
        try:
            said = verdicts.parse_support(s.support)
        except ValueError as error:
            found.append(f"{s.label}: {error}")
            continue
        parts, told = s.parts or [""], list(dict.fromkeys(x.part for x in said if x.word != "also"))
        if told != parts:
            found.append(f"{s.label}: says how parts {told} are supported, has parts {parts}")
        lines = printed.get(s.label, {})
        for x in said:
            if bool(x.names) != (x.word not in ("proof", "open")):
                found.append(f"{s.label}: {x.word} {'names' if x.names else 'must name'} verdicts")
            for name in x.names:
                if name not in lines:
                    found.append(f"{s.label}: no verdict is named {name}")
                elif x.word not in (lines[name].support, "also"):
                    found.append(f"{s.label}: {name} is {lines[name].support}, not {x.word}")
        named = {name for x in said for name in x.names}
        found += [f"{s.label}: {name} is printed but supports no part" for name in lines if name not in named]
    return found


def near_misses(pages: list[Page], formless: Collection[str]) -> list[str]:
    """Each statement with a closed form rejects it when it is 5 % off; `formless` are the labels without one."""
    near = {v.label for p in pages for v in p.verdicts if v.slug and v.decision == "REJECT" and NEAR.search(v.slug)}
    listed = [s for p in pages for s in p.statements if s.status != "open"]
    found = [f"{s.label}: no falsifier is 5 % off" for s in listed if s.label not in near and s.label not in formless]
    found += [
        f"{label}: said to have no closed form, but a falsifier is 5 % off" for label in formless if label in near
    ]
    return found + [f"{label}: no such statement" for label in formless if label not in {s.label for s in listed}]


def claims_page(pages: list[Page]) -> list[str]:
    """Every labelled statement, and every verdict line of it, is on the generated claims page."""
    shown = [e for _, group in verdicts.entries(pages) for e in group]
    labels = {e.statement.label for e in shown}
    ids = {v.id for e in shown for v in e.verdicts}
    missing = [s.label for p in pages for s in p.statements if s.label and s.label not in labels]
    missing += [v.id for p in pages for v in p.verdicts if v.id not in ids]
    return [f"{name}: not on the claims page" for name in missing]


def verdict_cells(pages: list[Page]) -> list[str]:
    """A cell that prints a verdict is compared by nbval and visible to the reader."""
    found = []
    for page in pages:
        for cell in page.cells:
            if any(map(verdicts.parse_verdict, cell.output.splitlines())):
                found += [f"{page.name}: a verdict cell is tagged {t}" for t in cell.tags if t in UNCOMPARED]
                if re.search(
                    r"^ *# *(NBVAL_IGNORE_OUTPUT|NBVAL_SKIP|PYTEST_VALIDATE_IGNORE)",
                    cell.source,
                    re.M,
                ):
                    found.append(f"{page.name}: a verdict cell is marked to be ignored")
    return found


def cell_lengths(pages: list[Page]) -> list[str]:
    """No cell shows more code than a reader takes in at once."""
    found = []
    for page in pages:
        for cell in page.cells:
            lines = [line for line in cell.source.splitlines() if line.strip()]
            if cell.kind == "code" and not UNSEEN & set(cell.tags) and len(lines) > CELL_LINES:
                found.append(
                    f"{page.name}: a cell shows {len(lines)} lines of code, more than {CELL_LINES}: {lines[0]}"
                )
    return found


def exercises(pages: list[Page]) -> list[str]:
    """Every exercise has a label, a solution that opens on a click, and a check that a mistake does not pass."""
    found = []
    for page in pages:
        blocks = list(verdicts.blocks(page.prose))
        solved = {b.argument: b for b in blocks if b.name in ("solution", "solution-start")}
        cells = exercise_cells(page)
        for b in blocks:
            if b.name not in ("exercise", "exercise-start"):
                continue
            label = b.options.get("label", "")
            if label not in solved:
                found.append(f"{page.name}: exercise {label or b.argument!r} has no solution")
            elif "dropdown" not in solved[label].options.get("class", ""):
                found.append(f"{page.name}: the solution of {label} is not a dropdown")
            found += [f"{page.name}: {label}: {problem}" for problem in self_check(*cells.get(label, ([], [])))]
        found += [f"{page.name}: in no exercise: `{cell.source}`" for cell in sum(cells.get("", ([], [])), [])]
    return found


def exercise_cells(page: Page) -> dict[str, tuple[list[Cell], list[Cell]]]:
    """By the label of each exercise, its code cells: those for the reader, and those in the solution."""
    found: dict[str, tuple[list[Cell], list[Cell]]] = {}
    label, solving = "", 0
    for cell in page.cells:
        if cell.kind == "code" and verdicts.EXERCISE in cell.tags:
            found.setdefault(label, ([], []))[solving].append(cell)
            continue
        for b in verdicts.blocks(cell.source) if cell.kind == "markdown" else ():
            if b.name in ("exercise", "exercise-start"):
                label, solving = b.options.get("label", ""), 0
            elif b.name == "solution-start":
                label, solving = b.argument, 1
            elif b.name in ("solution", "solution-end"):
                label = ""
    return found


def self_check(reader: list[Cell], solution: list[Cell]) -> list[str]:
    """What an exercise lacks: a cell to fill, a check that passes for the solution and one that fails for a mistake."""
    found = []
    if not any("..." in cell.source and RAISES in cell.tags for cell in reader):
        found.append(f"no cell to fill, with `...` for the answer, tagged {verdicts.EXERCISE} and {RAISES}")
    mistakes = [cell for cell in solution if RAISES in cell.tags]
    if not any(cell.output.startswith("Right") for cell in solution if cell not in mistakes):
        found.append("no cell of the solution prints that the answer is right")
    if not mistakes:
        found.append(f"no cell of the solution shows a common mistake, tagged {RAISES}")
    for cell in mistakes:
        if "Error" not in cell.output:
            found.append(f"a mistake passes: `{cell.source}`")
        elif not re.match(r"AssertionError: (\S+\s+){3}", cell.output):
            found.append(f"a mistake fails without a hint: `{cell.source}` says {cell.output!r}")
    return found


def pictures(pages: list[Page]) -> list[str]:
    """Every theorem has a picture above it in its section, or below it before the next statement."""
    found = []
    for page in pages:
        events = list(outline(page))
        for i, (kind, label) in enumerate(events):
            if kind != "theorem":
                continue
            above = [x for x, _ in events[:i]]
            if above.count("section") > 1:  # what opens the chapter belongs to its first section
                above = above[len(above) - above[::-1].index("section") :]
            below = list(itertools.takewhile(lambda x: x == "picture", (x for x, _ in events[i + 1 :])))
            if "picture" not in above + below:
                found.append(f"{page.name}: {label} has no picture above it in its section or right below it")
    return found


def outline(page: Page) -> Iterable[tuple[str, str]]:
    """Sections, statements and pictures of a page in reading order, as ("section", title) and so on."""
    for cell in page.cells:
        if cell.kind == "code":
            if verdicts.CHECK not in cell.tags and re.search(
                r"\bfigures\.(show|slider|explorable|samples)\(", cell.source
            ):
                yield "picture", cell.output
            continue
        for found in re.finditer(
            r"^## +(.+)|^`{3,} *\{prf:(\w+)\}[^\n]*\n(?::label: *(\S+))?|(\{figure\})", cell.source, re.M
        ):
            title, kind, label, figure = found.groups()
            yield ("section", title) if title else ("picture", "") if figure else (kind, label)


WORDS = 6  # of a caption, at least


def captions(pages: list[Page]) -> list[str]:
    """Every picture has a caption that says something: the finding, or what to try."""
    found = []
    for page in pages:
        for cell in (c for c in page.cells if c.kind == "code" and "figures." in c.source):
            for call in (n for n in ast.walk(ast.parse(cell.source)) if isinstance(n, ast.Call)):
                place = CAPTION.get(ast.unparse(call.func))
                if place is None:
                    continue
                given = [k.value for k in call.keywords if k.arg == "caption"] + call.args[place : place + 1]
                words = [
                    w for g in given for n in ast.walk(g) if isinstance(n, ast.Constant) for w in str(n.value).split()
                ]
                if len(words) < WORDS:
                    found.append(f"{page.name}: a caption of {len(words)} words: {ast.unparse(call)[:90]}")
    return found


CAPTION = {"figures.show": 2, "figures.slider": 3, "figures.explorable": 2}  # which argument it is


def citations(pages: list[Page], keys: set[str]) -> list[str]:
    """Every key that a page cites is in the bibliography."""
    cited = ((p.name, key.strip()) for p in pages for group in _CITE.findall(p.prose) for key in group.split(","))
    return [f"{name}: cites {key}, which is not in references.bib" for name, key in cited if key not in keys]


def docstring_sources(sources: Iterable[tuple[str, str]], keys: set[str], labels: set[str]) -> list[str]:
    """In each `Source:` of a docstring, `[key]` is in the bibliography and every backquoted name is a label."""
    found = []
    for name, text in sources:
        documented = (ast.Module, ast.ClassDef, ast.FunctionDef)
        for node in (n for n in ast.walk(ast.parse(text)) if isinstance(n, documented)):
            place = f"{name}: {getattr(node, 'name', 'module')}"
            for source in re.findall(r"^Source:(.*?)(?:\n\n|\Z)", ast.get_docstring(node) or "", re.M | re.S):
                found += [
                    f"{place}: [{k}] is not in references.bib"
                    for k in re.findall(r"\[([^\]]+)\]", source)
                    if k not in keys
                ]
                found += [
                    f"{place}: {n} is no label of the book" for n in re.findall(r"`([^`]+)`", source) if n not in labels
                ]
    return found


def links(config: dict, tracked: set[str], paths: list[str]) -> list[str]:
    """Once a repository is named, its launch and edit links lead to files that are there, on branch main."""
    repository = config.get("repository", {})
    if not repository.get("url"):
        return []
    found = [f"{path}: linked, but not in git" for path in paths if path not in tracked]
    if repository.get("branch") != "main":
        found.append(f"_config.yml: branch is {repository.get('branch')!r}, not 'main'")
    if repository.get("path_to_book"):
        found.append("_config.yml: path_to_book must be empty, pages lie below the root of the repository")
    return found


# --- two layers: what one reads, and why one may believe it ----------------------------------------------------------


class _Names(ast.NodeVisitor):
    """Walk code in the order in which it runs; `load(name)` and `store(name)` hear of each name of the module."""

    def __init__(self, load, store):
        self.load, self.store, self.local = load, store, []

    def visit_Name(self, node: ast.Name) -> None:
        if not any(node.id in names for names in self.local):
            (self.load if isinstance(node.ctx, ast.Load) else self.store)(node.id)

    def visit_Assign(self, node: ast.Assign) -> None:
        for part in (node.value, *node.targets):
            self.visit(part)

    def visit_AugAssign(self, node: ast.AugAssign) -> None:
        self.visit(node.value)
        if isinstance(node.target, ast.Name) and not any(node.target.id in names for names in self.local):
            self.load(node.target.id)
        self.visit(node.target)

    def visit_For(self, node: ast.For) -> None:
        for part in (node.iter, node.target, *node.body, *node.orelse):
            self.visit(part)

    def comprehension(self, node) -> None:
        self.visit(node.generators[0].iter)
        self.local.append({n.id for g in node.generators for n in ast.walk(g.target) if isinstance(n, ast.Name)})
        for g in node.generators:
            for part in [*g.ifs, *([g.iter] if g is not node.generators[0] else [])]:
                self.visit(part)
        for part in (node.key, node.value) if isinstance(node, ast.DictComp) else (node.elt,):
            self.visit(part)
        self.local.pop()

    visit_ListComp = visit_SetComp = visit_DictComp = visit_GeneratorExp = comprehension

    def function(self, node) -> None:
        a = node.args
        for part in [*a.defaults, *filter(None, a.kw_defaults), *getattr(node, "decorator_list", [])]:
            self.visit(part)
        arguments = {x.arg for x in [*a.posonlyargs, *a.args, *a.kwonlyargs, *filter(None, (a.vararg, a.kwarg))]}
        body = node.body if isinstance(node.body, list) else [node.body]
        inside = [n for statement in body for n in ast.walk(statement)]
        stored = {n.id for n in inside if isinstance(n, ast.Name) and not isinstance(n.ctx, ast.Load)}
        stored |= {n.name for n in inside if isinstance(n, ast.FunctionDef)}
        self.local.append(arguments | stored)
        for statement in body:
            self.visit(statement)
        self.local.pop()
        if isinstance(node, ast.FunctionDef) and not any(node.name in names for names in self.local):
            self.store(node.name)

    visit_FunctionDef = visit_Lambda = function

    def visit_Import(self, node) -> None:
        for alias in node.names:
            self.store((alias.asname or alias.name).split(".")[0])

    visit_ImportFrom = visit_Import


def uses_of_check_names(cells: Iterable[tuple[bool, str]]) -> list[tuple[int, str]]:
    """Find the names that a main cell takes from a check cell: (cell, name). `cells` are (is it a check, code)."""
    from_check: set[str] = set()
    found: list[tuple[int, str]] = []
    for number, (check, code) in enumerate(cells):

        def load(name: str, number=number, check=check) -> None:
            if not check and name in from_check and (number, name) not in found:
                found.append((number, name))

        def store(name: str, check=check) -> None:
            (from_check.add if check else from_check.discard)(name)

        _Names(load, store).visit(ast.parse(code))
    return found


def layers(pages: list[Page]) -> list[str]:
    """What one reads runs without the checks; each check stands below a statement; a chapter may leave one open."""
    found = []
    for page in pages:
        code = [c for c in page.cells if c.kind == "code"]
        first = {id(c): next(filter(str.strip, c.source.splitlines()), "") for c in code}
        for number, name in uses_of_check_names([(verdicts.CHECK in c.tags, c.source) for c in code]):
            found.append(f"{page.name}: the cell `{first[id(code[number])]}` uses {name}, which a check cell defines")
        above, lessons = "", 0
        for i, cell in enumerate(page.cells):
            if cell.kind == "markdown":
                above = ([above, *verdicts.statement_labels(cell.source)])[-1]
                continue
            if verdicts.CHECK in cell.tags:
                if not above:
                    found.append(f"{page.name}: no statement above the check cell `{first[id(cell)]}`")
            elif verdicts.LESSON in cell.tags:
                lessons += verdicts.LESSON not in page.cells[i - 1].tags
            elif cell.verdicts or re.search(r"\bverify\.(?!report\b)\w+\(", cell.source):
                found.append(
                    f"{page.name}: the cell `{first[id(cell)]}` verifies, but is tagged neither check nor lesson"
                )
        if lessons > 1:
            found.append(f"{page.name}: {lessons} lessons; a chapter leaves one check open at most")
    return found
