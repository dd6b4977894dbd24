"""Sphinx extension of this book: the claims page, status badges, docstrings, and a lighter offline site."""

from __future__ import annotations

import inspect
import os
import re
import shutil
import subprocess
import sys
import zlib
from html import escape
from importlib import import_module
from pathlib import Path

from docutils import nodes
from docutils.statemachine import StringList
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.transforms.post_transforms import SphinxPostTransform
from sphinx.util import logging
from sphinx.util.docutils import SphinxDirective, SphinxRole
from sphinx_exercise.nodes import is_exercise_node

# Sphinx loads this file by its name, and tiltlib may not be installed.
sys.path.insert(0, str(Path(__file__).parents[2]))
sys.path.insert(0, str(Path(__file__).parent))

import nbformat
import tiltlib

import lacking
import verdicts

logger = logging.getLogger(__name__)


# --- status badges -------------------------------------------------------------------------------------------------


class status_node(nodes.General, nodes.Inline, nodes.Element):
    """Placeholder: the label of the enclosing statement is known only once the page is parsed."""


def badge(status: str) -> nodes.inline:
    return nodes.inline("", status, classes=["status", f"status-{nodes.make_id(status)}"])


class StatusRole(SphinxRole):
    def run(self):
        if self.text not in verdicts.STATUSES:
            logger.warning(
                "status %r is none of %s",
                self.text,
                verdicts.STATUSES,
                location=self.get_location(),
            )
        return [status_node(status=self.text, location=self.get_location())], []


class SupportRole(SphinxRole):
    """How each part of a statement is supported; the line of evidence says it in words, the claims page by what."""

    def run(self):
        try:
            verdicts.support_in_words(self.text)
        except ValueError as error:
            logger.warning("support: %s", error, location=self.get_location())
        return [status_node(status="", location=self.get_location())], []


class ResolveStatus(SphinxPostTransform):
    """Link each badge to the claims page; an open question has no claim to link to."""

    default_priority = 5

    def run(self, **kwargs):
        for node in list(self.document.findall(status_node)):
            block = node.parent
            while block is not None and "realtype" not in block.attributes:  # set by sphinx-proof on its blocks
                block = block.parent
            if block is None:
                logger.warning("a status or support outside of a prf block", location=node["location"])
            if not node["status"]:  # support: said on the line of evidence
                node.parent.parent.remove(node.parent)
                continue
            shown = badge(node["status"])
            if block is not None and node["status"] != "open":
                link = claim_link(self, block["label"])
                link += shown
                shown = link
            own = (
                nodes.reference("", "#", internal=True, refuri=f"#{block['label']}", classes=["permalink"])
                if block
                else ""
            )
            node.replace_self([shown, own] if own else shown)


def claim_link(transform: SphinxPostTransform, label: str, *text: nodes.Node) -> nodes.reference:
    page = verdicts.claims_page(transform.env.book_entries[label].statement.page)
    page = transform.app.builder.get_relative_uri(transform.env.docname, page)
    return nodes.reference("", "", *text, internal=True, refuri=f"{page}#claim-{label}", reftitle="Show the evidence")


class Setup(SphinxPostTransform):
    """Move the setup cells of a chapter into its box of goals, which is folded below the opening."""

    default_priority = 4
    formats = ("html",)

    def run(self, **kwargs):
        boxes = [n for n in self.document.findall(nodes.admonition) if "start" in n["classes"]]
        for cell in list(self.document.findall(nodes.container)):
            if "tag_setup" in cell["classes"]:
                if not boxes:
                    logger.warning("a setup cell, but no box `:class: dropdown start` to hold it", location=cell)
                    return
                cell.parent.remove(cell)
                boxes[0] += cell


# --- the line of evidence ------------------------------------------------------------------------------------------


class Evidence(SphinxPostTransform):
    """Gather the check cells below a statement in one fold behind its proof; its line says what they showed.

    A check cell belongs to the nearest statement above it. Verdicts about another statement are linked to that one.
    """

    default_priority = 4
    formats = ("html",)

    def run(self, **kwargs):
        places: list[tuple[nodes.Element, nodes.Element, list[nodes.Element]]] = []  # statement, what to follow, cells
        for node in list(self.document.findall(nodes.Element)):
            if node.get("realtype") in verdicts.STATEMENTS:
                places.append((node, node, []))
            elif isinstance(node, nodes.admonition) and "proof" in node["classes"] and places:
                statement, follow, cells = places[-1]
                places[-1] = (statement, node if follow is statement else follow, cells)
            elif f"tag_{verdicts.CHECK}" in node.get("classes", []):
                if places:
                    places[-1][2].append(node)
                else:
                    logger.warning("a check cell without a statement above it", location=node)
        for statement, follow, cells in places:
            for cell in cells:
                cell.parent.remove(cell)
            entry = self.env.book_entries.get(statement["label"])
            if entry and entry.verdicts:
                at = follow.parent.index(follow) + 1
                follow.parent[at:at] = self.line(entry, cells)

    def line(self, entry: verdicts.Entry, cells: list[nodes.Element]) -> list[nodes.Node]:
        label, text = entry.statement.label, verdicts.evidence_line(entry)
        links = nodes.paragraph("", "", claim_link(self, label, nodes.Text("Line by line")), classes=["evidence-links"])
        places = [(page, owner, {v.label for v in found}) for page, owner, found in self.env.book_places]
        others = [(page, owner) for page, owner, about in places if label in about and owner != label]
        about = sorted(set().union(*(about for _, owner, about in places if owner == label)) - {label})
        self.refer(links, " · some of it below ", others)
        self.refer(links, " · also here, about ", [(self.env.book_entries[x].statement.page, x) for x in about])
        if not cells:
            return [nodes.paragraph("", f"{text} ", *links.children, classes=["evidence"])]
        opening = nodes.raw("", f'<details class="evidence"><summary>{escape(text)}</summary>', format="html")
        body = nodes.container("", links, *cells, classes=["evidence-body"], is_div=True)
        return [opening, body, nodes.raw("", "</details>", format="html")]

    def refer(self, line: nodes.paragraph, words: str, targets: list[tuple[str, str]]) -> None:
        for n, (page, label) in enumerate(targets):
            line += nodes.Text(", " if n else words)
            title = self.env.book_entries[label].statement.title if label else "the setting"
            uri = self.app.builder.get_relative_uri(self.env.docname, page) + (f"#{label}" if label else "")
            line += nodes.reference("", title, internal=True, refuri=uri)


# --- exercises -----------------------------------------------------------------------------------------------------


class Exercise(SphinxPostTransform):
    """Fold the cells between an exercise and its solution: where the reader answers, and what checks the answer."""

    default_priority = 4
    formats = ("html",)

    def run(self, **kwargs):
        for exercise in list(self.document.findall(is_exercise_node)):
            inside = exercise.parent
            at = inside.index(exercise) + 1
            end = at
            while end < len(inside) and f"tag_{verdicts.EXERCISE}" in inside[end].get("classes", []):
                end += 1
            if end > at:
                cells = inside[at:end]
                body = nodes.container("", *cells, classes=["answer-body"], is_div=True)
                opening = nodes.raw("", f'<details class="answer"><summary>{ANSWER}</summary>', format="html")
                inside[at:end] = [opening, body, nodes.raw("", "</details>", format="html")]


ANSWER = "Answer in the notebook: a cell to fill, and its check."


# --- proofs --------------------------------------------------------------------------------------------------------


class Proof(SphinxDirective):
    """A proof with a title of its own, by which it opens: Sphinx-proof's has none, and cannot be folded."""

    has_content = True

    def run(self):
        box = nodes.admonition(
            "",
            nodes.title("", "Proof"),
            classes=["proof", "dropdown"],
        )
        self.state.nested_parse(self.content, self.content_offset, box)
        return [box]


class DropRepeatedIds(SphinxPostTransform):
    """Keep ids unique: sphinx-proof gives all its blocks one id, each `eval-rst` block numbers citations from 1."""

    default_priority = 5

    def run(self, **kwargs):
        seen = set()
        for node in self.document.findall(nodes.Element):
            numbered = {i for i in node["ids"] if re.fullmatch(r"id\d+", i)}
            drop = {"proof-content"} | (numbered & seen)
            node["ids"] = [i for i in node["ids"] if i not in drop]
            seen |= numbered


# --- formulas ------------------------------------------------------------------------------------------------------


class OnePreview(SphinxPostTransform):
    """Drop what a browser would show of a citation by itself: its preview says it with names and links."""

    default_priority = 900  # after citations have become references
    formats = ("html",)

    def run(self, **kwargs):
        for node in self.document.findall(nodes.reference):
            if node.get("reftitle") and "references#id" in node.get("refuri", "").replace(".html", ""):
                del node["reftitle"]


class KeepPunctuation(SphinxPostTransform):
    """Join a formula with the punctuation around it: a browser would begin a line with the comma after it."""

    default_priority = 5

    def run(self, **kwargs):
        for math in list(self.document.findall(nodes.math)):
            parent, i = math.parent, math.parent.index(math)
            before, after = (parent[k] if 0 <= k < len(parent) else None for k in (i - 1, i + 1))
            joined = nodes.inline("", "", math.deepcopy(), classes=["joined"])
            if isinstance(after, nodes.Text) and after[0] in ",.;:?!)":
                rest = after.lstrip(",.;:?!)")
                joined += nodes.Text(after[: len(after) - len(rest)])
                parent[i + 1] = nodes.Text(rest)
            if isinstance(before, nodes.Text) and before.endswith("("):
                joined.insert(0, nodes.Text("("))
                parent[i - 1] = nodes.Text(before[:-1])
            if len(joined) > 1:
                parent[i] = joined


# --- the claims page -----------------------------------------------------------------------------------------------


class Claims(SphinxDirective):
    """Generate what was checked: of one chapter, named by the argument, part by part; without argument, of the book."""

    optional_arguments = 1

    def run(self):
        root = Path(self.env.srcdir)
        for name in verdicts.toc_names_of(root):
            if not name.startswith(verdicts.CLAIMS):
                self.env.note_dependency(str(verdicts.source_of(root, name)))
        pages = verdicts.read_book(root)
        found = verdicts.entries(pages)
        if self.arguments:
            chapter = next((es for page, es in found if Path(page.name).name == self.arguments[0]), [])
            if not chapter:
                logger.warning("no chapter %r has a statement", self.arguments[0], location=self.get_location())
            return [self.entry(e) for e in chapter]
        return [self.paragraph(verdicts.summary(pages), "claims-summary"), *(self.chapter(*c) for c in found)]

    def inline(self, text: str) -> list[nodes.Node]:
        return self.state.inline_text(text, self.lineno)[0]

    def paragraph(self, text: str, *classes: str) -> nodes.paragraph:
        return nodes.paragraph("", "", *self.inline(text), classes=list(classes))

    def chapter(self, page: verdicts.Page, found: list[verdicts.Entry]) -> nodes.section:
        """One line per statement of a chapter, which leads to its evidence."""
        section = nodes.section(ids=[nodes.make_id(f"claims-{Path(page.name).name}")])
        section += nodes.title("", "", *self.inline(page.title))
        target = self.env.app.builder.get_relative_uri(self.env.docname, verdicts.claims_page(page.name))
        lines = nodes.bullet_list(classes=["claims-list"])
        for e in found:
            words = verdicts.counts(e.verdicts) if e.verdicts else "a question, not a claim"
            line = nodes.paragraph("", "", *self.inline(e.statement.title), nodes.Text(": "))
            line += nodes.reference("", words, internal=True, refuri=f"{target}#claim-{e.statement.label}")
            lines += nodes.list_item("", line)
        section += lines
        return section

    def entry(self, entry: verdicts.Entry) -> nodes.container:
        label, title = entry.statement.label, entry.statement.title
        head = self.paragraph(f"{{prf:ref}}`{label}` {title} ", "claim-head")
        head += badge(entry.statement.status or "no status")
        box = nodes.container("", head, ids=[f"claim-{label}"], classes=["claim"], is_div=True)
        fence = "`" * 6  # longer than any fence inside a statement
        folded = f"{fence}{{dropdown}} Statement\n{entry.statement.text}\n{fence}"
        self.state.nested_parse(StringList(folded.splitlines()), self.content_offset, box)
        if not entry.verdicts:
            box += self.paragraph(
                "No verdict: a question, not a claim." if entry.statement.status == "open" else "**No verdict.**"
            )
        for said, found in entry.by_part:
            said = said[:1].upper() + said[1:]
            box += nodes.paragraph("", "", nodes.strong("", said or "Besides"), classes=["claim-part"])
            for v in (v for v in found if not v.slug):
                wrong = [w for w in found if w.slug and w.claim == v.claim]
                words = f"`{v.id}` {verdicts.evidence(v)} {verdicts.rejected(wrong)}"
                passed = "" if v.decision in ("PASS", "NOTE") else f"**{v.decision}** "
                box += self.paragraph(passed + words, "verdict", f"verdict-{v.decision.lower()}")
        return box


class Dependencies(SphinxDirective):
    """Draw the statements in reading order, with an arc from each to those that it or its proof names."""

    LINE, WIDTH, TEXT, LONGEST = 19, 360, 262, 42  # pixels: from line to line, whole and text; letters of a title

    def run(self):
        root = Path(self.env.srcdir)
        pages = verdicts.read_book(root)
        drawn, at, y = [], {}, 0
        used = verdicts.uses(pages)
        for page in (page for page in pages if page.statements):
            self.env.note_dependency(str(verdicts.source_of(root, page.name)))
            url = self.env.app.builder.get_relative_uri(self.env.docname, page.name)
            y += self.LINE
            drawn.append(self.line(0, y, page.title, url, "chapter"))
            for statement in page.statements:
                y += self.LINE
                at[statement.label] = y - 4
                drawn.append(
                    self.line(12, y, statement.title, f"{url}#{statement.label}", "statement", statement.label)
                )
        titles = {statement.label: statement.title for statement, _ in used}
        pairs = [(s.label, label) for s, labels in used for label in labels]
        arcs = [
            self.arc(at[one], at[other], f"{titles[one]} uses {titles[other]}", f"{one} {other}", y)
            for one, other in pairs
        ]
        words = f"{len(used)} statements in reading order; {len(arcs)} arcs join each to those that it uses."
        svg = f'<svg class="bk-uses" viewBox="0 0 {self.WIDTH} {y + self.LINE}" role="group" aria-label="{words}">'
        return [nodes.raw("", f"{svg}{''.join(arcs + drawn)}</svg>", format="html")]

    def line(self, x: int, y: int, title: str, url: str, kind: str, label: str = "") -> str:
        title = re.sub(r"[$\\]|\{[^}]*\}|`", "", title)
        shown = title if len(title) <= self.LONGEST else title[: self.LONGEST - 1] + "…"
        end = f' data-end="{label}"' if label else ""
        return f'<a href="{url}"{end}><text class="{kind}" x="{x}" y="{y}">{escape(shown)}</text></a>'

    def arc(self, y: int, z: int, words: str, ends: str, height: int) -> str:
        out = self.TEXT + 20 + (self.WIDTH - self.TEXT) * (abs(y - z) / height) ** 0.5
        path = f"M{self.TEXT} {y}C{out:.0f} {y} {out:.0f} {z} {self.TEXT} {z}"
        drawn = f'<path d="{path}" data-ends="{ends}"><title>{escape(words)}</title></path>'
        return f'{drawn}<circle cx="{self.TEXT}" cy="{z}" r="2.2"/>'


# --- the reference -------------------------------------------------------------------------------------------------


class Summary(SphinxDirective):
    """A table of what a module of tiltlib offers: each name, what it does in a line, and what it takes."""

    required_arguments = 1

    def run(self):
        module = import_module(f"tiltlib.{self.arguments[0]}")
        rows = [
            f"   * - :py:obj:`~{module.__name__}.{name}`\n     - {first_line(thing)}\n     - {takes(thing)}"
            for name in module.__all__
            if inspect.isclass(thing := getattr(module, name)) or inspect.isfunction(thing)
        ]
        head = ".. list-table::\n   :widths: 30 55 15\n   :class: summary\n\n"
        return self.parse_text_to_nodes(head + "\n".join(rows))


class Needs(SphinxDirective):
    """A table of the functions that need no more than what is named, module by module, as the reference marks them."""

    required_arguments = 1
    final_argument_whitespace = True
    option_spec = {"without": str.split}

    def run(self):
        rows = [
            f"   * - :doc:`{module} </book/reference/{module}>`\n     - "
            + ", ".join(f":py:obj:`~tiltlib.{module}.{name}`" for name in names)
            for module, names in functions_that_take(self.arguments[0]).items()
            if module not in self.options.get("without", ())
        ]
        return self.parse_text_to_nodes(".. list-table::\n   :widths: 20 80\n   :class: needs\n\n" + "\n".join(rows))


def functions_that_take(what: str) -> dict[str, list[str]]:
    """Find the functions that `takes` marks so, by their module; modules in the order of the package's table."""
    order = [name for name in re.findall(r"^(\w+)  ", tiltlib.__doc__ or "", re.MULTILINE) if name in tiltlib.__all__]
    found = {}
    for module in (import_module(f"tiltlib.{name}") for name in order):
        things = {name: getattr(module, name) for name in module.__all__}
        names = [name for name, thing in things.items() if inspect.isfunction(thing) and takes(thing) == what]
        if names:
            found[module.__name__.removeprefix("tiltlib.")] = names
    return found


def first_line(thing: object) -> str:
    return rst_prose((inspect.getdoc(thing) or "").split("\n")[0], set())


def takes(thing: object) -> str:
    """What one brings: a Markov chain, any model, a mixture, a function or module, or only tensors and numbers."""
    made = thing.__init__ if inspect.isclass(thing) else thing
    types = " ".join(str(p.annotation) for p in inspect.signature(made).parameters.values())
    if "MarkovChain" in types or "TiltedChain" in types:
        return "Markov chain"
    if re.search(r"GaussianMixture|\bTilted\b", types):
        return "mixture"
    return (
        "your model"
        if re.search(r"Callable|Module|Score|Policy|AutoregressiveModel|LanguageModel", types)
        else "tensors"
    )


# --- docstrings ----------------------------------------------------------------------------------------------------

_CODE = re.compile(r"(``.+?``|`[^`]+`)")
_SECTION = re.compile(r"(Args|Returns|Raises|Yields|Attributes|Examples?|Note|Source):(.*)")


def rst_prose(line: str, labels: set[str]) -> str:
    """Turn a line of docstring prose into reStructuredText: code and labels are marked, all else is plain text."""
    parts = _CODE.split(line)
    for i, part in enumerate(parts):
        if i % 2:
            name = part.strip("`")
            parts[i] = f":prf:ref:`{name}`" if name in labels else f"``{name}``"
        else:  # |x|, a * b and x_ are mathematics here; only *args at the start of a line is left to napoleon
            parts[i] = re.sub(r"(?<!\\)(\||\*|(?<=\w)_(?!\w))", r"\\\1", part)
            parts[i] = re.sub(r"(?<!\w)-(?=inf\b)", "\N{MINUS SIGN}", parts[i])  # a line may end after a hyphen
    parts[0] = re.sub(r"^( *)((?:\\\*)+)(?=\w)", lambda m: m[1] + m[2].replace("\\", ""), parts[0])
    return "".join(parts)


def rst_docstring(lines: list[str], labels: set[str], keys: set[str]) -> list[str]:
    """Turn a docstring into input for napoleon.

    Outside of sections, lines indented by four or more are a formula: they become a literal block. The Source section
    becomes a field beside the arguments; its `[key]` become citations.
    """
    out: list[str] = []
    # Outside of Source a name without a hyphen is that of an argument or a function: `churn`, `rejection`.
    hyphenated = {label for label in labels if "-" in label}
    section = ""
    formula = False
    for line in lines:
        indented = line.startswith("    ")
        if found := _SECTION.fullmatch(line):
            section, formula = found[1], False
            line = f":{line}" if section == "Source" else line
            out.append("")
        elif line and not indented:
            section = ""
        if not section and (indented or (formula and not line)):
            if not formula:
                out += ["", ".. code-block:: text", ""]
            formula = True
            out.append(line)
            continue
        if formula:
            formula = False
            out.append("")
        if not section.startswith("Example"):  # code
            line = rst_prose(line, labels if section == "Source" else hyphenated)
        if section == "Source":
            line = re.sub(
                r"\[([\w:-]+)\]",
                lambda m: f":cite:t:`{m[1]}`" if m[1] in keys else m[0],
                line,
            )
        out.append(line)
    return out


def process_docstring(app: Sphinx, what, name, obj, options, lines: list[str]) -> None:
    lines[:] = rst_docstring(lines, *app.env.book_names)


def skip_fields(app: Sphinx, what, name, obj, skip: bool, options) -> bool | None:
    """Leave out the fields of named tuples: the class docstring says what they hold, autodoc only their number."""
    return True if type(obj).__name__ == "_tuplegetter" else None


def read_names(app: Sphinx, env: BuildEnvironment, docnames: list[str] | None = None, *rest) -> list[str]:
    """Read what the book says; the API pages are stale when labels or citation keys that docstrings name change."""
    root = Path(app.srcdir)
    pages = verdicts.read_book(root)
    env.book_entries = {e.statement.label: e for _, found in verdicts.entries(pages) for e in found}
    env.book_places = [(page.name, label, found) for page in pages for label, found in page.shown_under]
    labels = set().union(*(page.labels for page in pages))
    names = (
        labels,
        verdicts.bib_keys((root / "book/references.bib").read_text(encoding="utf-8")),
    )
    stale = getattr(env, "book_names", names) != names
    env.book_names = names
    return [d for d in env.found_docs if d.startswith("book/reference/")] if stale else []


def number_from_one(app: Sphinx, env: BuildEnvironment) -> list[str]:
    """Start the numbers of a page without a chapter number at 1: Sphinx counts on from the page before it."""
    for kinds in env.toc_fignumbers.values():
        for kind, numbers in kinds.items():
            if all(len(number) == 1 for number in numbers.values()):
                kinds[kind] = {node: (i,) for i, node in enumerate(numbers, 1)}
    return []


# --- the site ------------------------------------------------------------------------------------------------------


NOTEBOOKS = "notebooks"  # the branch that launch buttons open: notebooks there begin with a cell that installs


def configure(app: Sphinx, config) -> None:
    """Say on each page of which version it is. Show buttons of a repository only where $BOOK_REPOSITORY names one."""
    git = ["git", "-C", app.srcdir, "describe", "--always", "--dirty", "--exclude=*"]
    commit = subprocess.run(git, capture_output=True, text=True).stdout.strip()
    version = f"Version {tiltlib.__version__}{f', commit {commit}' if commit else ''}."
    options = config.html_theme_options
    options["extra_footer"] = f"<p>{version}</p>{options.get('extra_footer', '')}"
    options["repository_url"] = os.environ.get("BOOK_REPOSITORY") or options.get("repository_url", "")
    options["repository_branch"] = os.environ.get("BOOK_BRANCH") or options.get("repository_branch", "main")
    for name in ("use_source_button", "use_repository_button", "use_issues_button", "use_edit_page_button"):
        options[name] = bool(options["repository_url"])
    if not options["repository_url"]:
        options["launch_buttons"] = {}


def launch_notebooks(app: Sphinx, pagename, template, context, doctree) -> None:
    """Let launch buttons open the branch of notebooks."""
    branch = app.config.html_theme_options["repository_branch"]
    for button in (b for group in context.get("header_buttons", ()) for b in group.get("buttons", ())):
        if button.get("text") == "Colab":
            button["url"] = button["url"].replace(f"/blob/{branch}/", f"/blob/{NOTEBOOKS}/")


def note_run(app: Sphinx, docname: str, source: list[str]) -> None:
    """Re-read a page when its notebook was run again: the source is the same, its figures may not be."""
    run = Path(app.srcdir, "_build/run", f"{docname}.ipynb")
    if run.exists():
        app.env.note_dependency(str(run))
    if packages := lacking.lacking(Path(docname).name):
        notebook = nbformat.reads(source[0], as_version=4)
        notebook.cells[0].source += f"\n\n:::{{note}}\n{lacking.note(packages)}\n:::"
        source[0] = nbformat.writes(notebook)


def load_explorables(app: Sphinx, pagename, template, context, doctree) -> None:
    """Give a page the scripts of what it lets a reader explore, and no others."""
    for name in sorted(set(re.findall(r'class="bk-explorable"[^>]* data-name="([^"]+)"', context.get("body", "")))):
        if not Path(app.srcdir, EXPLORABLES, f"{name}.js").exists():
            logger.warning("no script %s/%s.js", EXPLORABLES, name, location=pagename)
        app.add_js_file(f"explorables/{name}.js", priority=850)  # after numbers.js and drawing.js, at 800


EXPLORABLES = "book/_static/explorables"


def drop_thebe(app: Sphinx, pagename, template, context, doctree) -> None:
    """Remove thebe's scripts: unused here, and loaded twice they throw on every page."""

    def thebe(script) -> bool:
        body = (getattr(script, "attributes", None) or {}).get("body") or ""
        return "THEBE_JS_URL" in body or "sphinx-thebe.js" in str(getattr(script, "filename", script))

    context["script_files"] = [s for s in context.get("script_files", []) if not thebe(s)]


def copy_static(app: Sphinx, error: Exception | None) -> None:
    """Copy our style sheets and script also when no page has changed: Sphinx then copies nothing."""
    if not error:
        shutil.copytree(
            Path(app.srcdir, "book/_static"),
            Path(app.outdir, "_static"),
            dirs_exist_ok=True,
        )


def prune_mathjax(app: Sphinx, error: Exception | None) -> None:
    """Keep what the pages load, TeX input and CHTML output: 4 MB of 24."""
    mathjax = Path(app.outdir, "_static/mathjax")
    if error or not mathjax.exists():
        return
    for path in mathjax.iterdir():
        if path.is_file() and path.name != "tex-chtml.js":
            path.unlink()
    for folder in ("adaptors", "input/mml", "input/asciimath", "output/svg"):
        shutil.rmtree(mathjax / folder, ignore_errors=True)
    for name in (
        "output/svg.js",
        "input/mml.js",
        "input/asciimath.js",
        "input/tex-full.js",
    ):
        (mathjax / name).unlink(missing_ok=True)
    for path in (mathjax / "sre/mathmaps").glob("*.js*"):
        if path.stem not in ("en", "base"):
            path.unlink()


def set_drawings_aside(app: Sphinx, page: str, template: str, context: dict, doctree) -> None:
    """Keep drawings from the parser that looks for previews: they are most of a page, and no preview shows one."""
    context["drawn"] = context.get("body", "")
    context["body"] = re.sub(r"<svg\b.*?</svg>", "", context["drawn"], flags=re.DOTALL)


def put_drawings_back(app: Sphinx, page: str, template: str, context: dict, doctree) -> None:
    context["body"] = context.pop("drawn")


def setup(app: Sphinx) -> dict[str, bool]:
    app.setup_extension("sphinx_proof")  # has the directive that Proof replaces
    app.setup_extension("sphinx.ext.autodoc")  # has the docstring event
    app.add_node(status_node)
    app.add_role("status", StatusRole())
    app.add_role("support", SupportRole())
    app.add_directive("claims", Claims)
    app.add_directive("dependencies", Dependencies)
    app.add_directive("summary", Summary)
    app.add_directive("needs", Needs)
    app.add_directive_to_domain("prf", "proof", Proof, override=True)
    app.add_post_transform(ResolveStatus)
    app.add_post_transform(Setup)
    app.add_post_transform(Evidence)
    app.add_post_transform(Exercise)
    app.add_post_transform(DropRepeatedIds)
    app.add_post_transform(KeepPunctuation)
    app.add_post_transform(OnePreview)
    app.connect("config-inited", configure)
    app.connect("env-get-outdated", read_names)
    app.connect("env-get-updated", number_from_one, priority=600)  # after Sphinx has numbered, at 500
    app.connect("source-read", note_run)
    app.connect("autodoc-process-docstring", process_docstring, priority=400)  # before napoleon, at 500
    app.connect("autodoc-skip-member", skip_fields)
    app.connect("html-page-context", set_drawings_aside, priority=449)  # before sphinx-tippy, at 450
    app.connect("html-page-context", put_drawings_back, priority=451)
    app.connect("html-page-context", load_explorables)
    app.connect("html-page-context", launch_notebooks, priority=900)  # after the theme has added its buttons
    app.connect("html-page-context", drop_thebe, priority=900)  # after thebe has added its own
    app.connect("build-finished", copy_static)
    app.connect("build-finished", prune_mathjax, priority=900)  # after MathJax has been copied
    # Pages depend on this code: when it changes, Sphinx reads all of them again.
    code = b"".join(path.read_bytes() for path in sorted(Path(__file__).parent.glob("*.py")))
    return {"env_version": zlib.crc32(code), "parallel_read_safe": True, "parallel_write_safe": True}
