"""What the book's source says: its pages, its statements, and the verdict lines stored in its notebooks.

Pure functions on text. The claims page (bookext.py) and the tests (checks.py) read the book only through this file.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import yaml

STATEMENTS = ("theorem", "proposition", "lemma", "corollary")
STATUSES = ("proved here", "cited", "open")

_VERDICT = re.compile(r"(PASS|REJECT|INCONCLUSIVE) +(match|mean|within|exact|bound) +(\S+)(.*)")
_FENCE = re.compile(r"^ *(`{3,}|~{3,}|:{3,})\{([\w:-]+)\} *(.*?) *$")
_STATUS = re.compile(r"\{status\}`([^`]*)`")


class Verdict(NamedTuple):
    """One verdict line. `id` is `label`, `label.part`, or either of them followed by `!slug` for a falsifier."""

    decision: str
    kind: str
    id: str
    fields: dict[str, str]
    expected: bool  # carries "[falsifier, expected]"

    @property
    def claim(self) -> str:
        return self.id.split("!")[0]

    @property
    def slug(self) -> str:
        return self.id.partition("!")[2]

    @property
    def label(self) -> str:
        return self.claim.split(".")[0]

    def number(self, name: str, default: float = float("nan")) -> float:
        """Value of a field as a number; the power `1-1e-06` is read as its miss probability, 1e-06."""
        return float(self.fields.get(name, str(default)).removeprefix("1-"))


class Cell(NamedTuple):
    kind: str  # "markdown" or "code"
    source: str
    tags: tuple[str, ...] = ()
    output: str = ""  # all text it printed, as stored


class Page(NamedTuple):
    name: str  # Sphinx document name, such as book/01_tilting
    cells: tuple[Cell, ...]

    @property
    def prose(self) -> str:
        return "\n\n".join(c.source for c in self.cells if c.kind == "markdown")

    @property
    def title(self) -> str:
        found = re.search(r"^# +(.+?) *$", self.prose, re.M)
        return found[1] if found else self.name

    @property
    def verdicts(self) -> list[Verdict]:
        lines = (line for cell in self.cells for line in cell.output.splitlines())
        return [v for v in map(parse_verdict, lines) if v]

    @property
    def labels(self) -> set[str]:
        """Labels of all prf blocks, definitions and remarks included."""
        return {b.options["label"] for b in blocks(self.prose) if b.name.startswith("prf:") and "label" in b.options}

    @property
    def statements(self) -> list[Statement]:
        return [
            Statement(
                b.options.get("label", ""),
                b.name.removeprefix("prf:"),
                b.argument,
                status(b.body),
                self.name,
                _STATUS.sub("", b.body).strip(),
            )
            for b in blocks(self.prose)
            if b.name.removeprefix("prf:") in STATEMENTS and b.name.startswith("prf:")
        ]


class Block(NamedTuple):
    """A fenced MyST directive."""

    name: str
    argument: str
    options: dict[str, str]
    body: str


class Statement(NamedTuple):
    label: str
    kind: str
    title: str
    status: str
    page: str
    text: str = ""  # MyST source, without the status


def parse_verdict(line: str) -> Verdict | None:
    """Read one printed line; None if it is not a verdict."""
    found = _VERDICT.fullmatch(line.strip())
    if not found:
        return None
    decision, kind, name, rest = found.groups()
    return Verdict(
        decision,
        kind,
        name,
        dict(re.findall(r"(\w+)=(\S+)", rest)),
        "[falsifier, expected]" in rest,
    )


def blocks(text: str) -> Iterator[Block]:
    """Yield every fenced directive, nested ones included."""
    lines = text.splitlines()
    for start, line in enumerate(lines):
        opened = _FENCE.match(line)
        if not opened:
            continue
        fence, name, argument = opened.groups()
        closing = re.compile(rf" *{fence[0]}{{{len(fence)},}} *")
        inside = []
        for inner in lines[start + 1 :]:
            if closing.fullmatch(inner):
                break
            inside.append(inner)
        options = {}
        while inside and (option := re.fullmatch(r" *:([\w-]+): *(.*?) *", inside[0])):
            options[option[1]] = option[2]
            inside.pop(0)
        yield Block(name, argument, options, "\n".join(inside))


def status(body: str) -> str:
    found = _STATUS.search(body)
    return found[1] if found else ""


def text_of(outputs: list[dict]) -> str:
    """Join the text of a cell's stored outputs (notebooks store text as a string or as a list of lines)."""
    texts = [o.get("text", o.get("data", {}).get("text/plain", "")) for o in outputs]
    return "\n".join(t if isinstance(t, str) else "".join(t) for t in texts)


def parse_page(name: str, text: str, notebook: bool) -> Page:
    if not notebook:
        return Page(name, (Cell("markdown", text),))
    cells = json.loads(text)["cells"]
    return Page(
        name,
        tuple(
            Cell(
                c["cell_type"],
                "".join(c["source"]),
                tuple(c["metadata"].get("tags", ())),
                text_of(c.get("outputs", [])),
            )
            for c in cells
        ),
    )


def toc_names(node: object) -> Iterator[str]:
    """Yield the document names of a table of contents in reading order."""
    if isinstance(node, dict):
        for key, value in node.items():
            if key in ("root", "file"):
                yield value.removesuffix(".md").removesuffix(".ipynb")
            else:
                yield from toc_names(value)
    elif isinstance(node, list):
        for item in node:
            yield from toc_names(item)


def toc_names_of(root: Path) -> list[str]:
    return list(toc_names(yaml.safe_load((root / "_toc.yml").read_text(encoding="utf-8"))))


def source_of(root: Path, name: str) -> Path:
    """Path of a page's source: the notebook if there is one, else the Markdown file."""
    notebook = root / f"{name}.ipynb"
    return notebook if notebook.exists() else root / f"{name}.md"


def read_book(root: Path) -> list[Page]:
    """Read all pages that _toc.yml lists."""
    paths = [(name, source_of(root, name)) for name in toc_names_of(root)]
    return [parse_page(name, path.read_text(encoding="utf-8"), path.suffix == ".ipynb") for name, path in paths]


def bib_keys(text: str) -> set[str]:
    return set(re.findall(r"^ *@\w+\{ *([^,\s]+)", text, re.M))


class Entry(NamedTuple):
    """One statement on the claims page, with every verdict line that belongs to its label."""

    statement: Statement
    verdicts: list[Verdict]


def entries(pages: list[Page]) -> list[tuple[Page, list[Entry]]]:
    """Group the labelled statements by page; a falsifier follows the claim that it tests."""
    printed: dict[str, list[Verdict]] = {}
    for verdict in (v for page in pages for v in page.verdicts):
        printed.setdefault(verdict.label, []).append(verdict)
    for found in printed.values():
        order = list(dict.fromkeys(v.claim for v in found))
        found.sort(key=lambda v: (order.index(v.claim), bool(v.slug)))
    grouped = [(p, [Entry(s, printed.get(s.label, [])) for s in p.statements if s.label]) for p in pages]
    return [(page, found) for page, found in grouped if found]


def _readable(value: str) -> str:
    """131072 -> 131,072; 1-1e-06 -> 1 − 1e-6."""
    return f"{int(value):,}" if value.isdigit() else re.sub(r"e-0", "e-", re.sub(r"^1-", "1 − ", value))


def evidence(v: Verdict) -> str:
    """Say in words what a verdict line shows."""
    f = {name: _readable(value) for name, value in v.fields.items()}
    n, plan = f.get("n", "?"), f" ({f['plan']} planned)" if "plan" in f else ""
    if v.slug:
        shown = {
            "match": f"log10 E = {f.get('log10E')}, at least {f.get('reject_at')}, after {n} draws",
            "mean": f"log10 E = {f.get('log10E')}, at least {f.get('reject_at')}, after {n} values",
            "within": f"total variation at least {f.get('tv_lo')}, above {f.get('eps')}, after {n} draws",
            "exact": f"off by {f.get('error')}, tolerance {f.get('eps')}",
            "bound": f"violated by {f.get('excess')}",
        }[v.kind]
        return f"Wrong variant, rejected: {shown}."
    if v.kind in ("match", "mean"):
        what, units = ("law", "draws") if v.kind == "match" else ("mean", "values")
        return (
            f"{n} {units}{plan}. Evidence against the {what}: log10 E = {f.get('log10E')}; it would be rejected at "
            f"{f.get('reject_at')}. Chance to reject a true {what}: at most {f.get('alpha')}; "
            f"to catch the wrong variant: at least {f.get('power', '?')}."
        )
    if v.kind == "within":
        tier = f" Method: {f['tier']}." if "tier" in f else ""
        return (
            f"{n} draws{plan}. Total variation at most {f.get('tv_hi')}, below {f.get('eps')}. "
            f"Chance that this bound is false: at most {f.get('delta')}.{tier}"
        )
    if v.kind == "exact":
        what = "1 value" if n == "1" else f"{n} values, each"
        return f"Computed {what} within {f.get('eps')} of the statement. No sampling, no chance of error."
    return f"The inequality holds on {n} of {n} instances. No chance of error on those."


def summary(pages: list[Page]) -> str:
    """One paragraph of counts, and the chance that any of it is luck."""
    listed = [e for _, found in entries(pages) for e in found]
    lines = [v for e in listed for v in e.verdicts]
    claims = [v for v in lines if not v.slug]
    kinds = {k: sum(v.kind == k for v in claims) for k in ("match", "mean", "within", "exact", "bound")}
    falsifiers = [v for v in lines if v.slug]
    rejected = sum(v.decision == "REJECT" for v in falsifiers)
    return (
        f"{len(listed)} statements, {len(claims)} claims: {kinds['match']} `match`, {kinds['mean']} `mean`, "
        f"{kinds['within']} `within`, {kinds['exact']} `exact`, {kinds['bound']} `bound`. "
        f"{rejected} of {len(falsifiers)} falsifiers rejected. "
        "Chance that any true `match` or `mean` claim is rejected: "
        f"at most {kinds['match'] + kinds['mean']} × 1e-8. "
        f"Chance that any `within` bound is false: at most {kinds['within']} × 1e-8. "
        "Both are union bounds and assume no independence."
    )
