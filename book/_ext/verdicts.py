"""What the book's source says: its pages, its statements, and the verdict lines stored in its notebooks.

Pure functions on text. The claims page (bookext.py) and the tests (checks.py) read the book only through this file.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import yaml

STATEMENTS = ("theorem", "proposition", "lemma", "corollary")
STATUSES = ("proved here", "cited", "open")
# How a part of a statement is supported -> in words. The first four name the verdicts that do it. Besides these, `also`
# names verdicts that show the statement at work, in a training run say, and would not notice if it were wrong.
SUPPORT = {
    "exact": "exact",
    "sampled": "sampled",
    "certified": "certified",
    "observed": "observed",
    "proof": "by proof alone",
    "open": "open",
}

ALSO = "Also, the statement at work; no evidence for it"

# Folder of the pages that show the evidence, one per chapter.
CLAIMS = "book/claims/"

# Tags of cells. A check cell says why one may believe a statement: it is folded behind the statement's proof, and what
# one reads runs without it. A lesson is a check that is left open and talked through, one in a chapter at most.
CHECK = "check"
LESSON = "lesson"
EXERCISE = "exercise"

_VERDICT = re.compile(r"(PASS|REJECT|INCONCLUSIVE|NOTE) +(match|mean|within|exact|bound|observed) +(\S+)(.*)")
_FENCE = re.compile(r"^ *(`{3,}|~{3,}|:{3,})\{([\w:-]+)\} *(.*?) *$")
_STATUS = re.compile(r"\{status\}`([^`]*)`")
_SUPPORT = re.compile(r"\{support\}`([^`]*)`")
_REF = re.compile(r"\{prf:ref\}`([^`<]*<)?([\w-]+)>?`")
_PART = re.compile(r"^ *(\d+)\. ", re.M)


class Verdict(NamedTuple):
    """One verdict line. `id` is `label`, `label.part`, or either of them followed by `!slug` for a falsifier."""

    decision: str
    kind: str
    id: str
    fields: dict[str, str]
    expected: bool  # carries "[expected]"

    @property
    def claim(self) -> str:
        return self.id.split("!")[0]

    @property
    def slug(self) -> str:
        return self.id.partition("!")[2]

    @property
    def label(self) -> str:
        return self.claim.split(".")[0]

    @property
    def name(self) -> str:
        """The claim without the label of its statement; the label itself where nothing follows it."""
        return self.claim.partition(".")[2] or self.label

    @property
    def support(self) -> str:
        """The word for what this verdict does for its statement."""
        if self.kind == "bound":
            return "certified" if "delta" in self.fields else "exact"
        return {"match": "sampled", "mean": "sampled", "within": "certified"}.get(self.kind, self.kind)

    def number(self, name: str, default: float = float("nan")) -> float:
        """Value of a field as a number; the power `1-1e-06` is read as its miss probability, 1e-06."""
        return float(self.fields.get(name, str(default)).removeprefix("1-"))


class Cell(NamedTuple):
    kind: str  # "markdown" or "code"
    source: str
    tags: tuple[str, ...] = ()
    output: str = ""  # all text it printed, as stored

    @property
    def verdicts(self) -> list[Verdict]:
        return [v for v in map(parse_verdict, self.output.splitlines()) if v]


class Page(NamedTuple):
    name: str  # Sphinx document name, such as book/tilting
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
        return [v for cell in self.cells for v in cell.verdicts]

    @property
    def shown_under(self) -> list[tuple[str, list[Verdict]]]:
        """The verdicts of the page by the statement that they are printed under: the nearest one above."""
        found: list[tuple[str, list[Verdict]]] = [("", [])]
        for cell in self.cells:
            if cell.kind == "markdown":
                found += [(label, []) for label in statement_labels(cell.source)]
            found[-1][1].extend(cell.verdicts)
        return found

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
                _SUPPORT.sub("", _STATUS.sub("", b.body)).strip(),
                support(b.body),
            )
            for b in statement_blocks(self.prose)
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
    text: str = ""  # MyST source, without the roles `status` and `support`
    support: str = ""  # argument of the role `support`

    @property
    def parts(self) -> list[str]:
        """Numbers of the parts, as a list in the text numbers them."""
        return _PART.findall(self.text)


class Support(NamedTuple):
    """How one part of a statement is supported; `part` is empty for a statement without parts."""

    part: str
    word: str  # a key of SUPPORT, or "also"
    names: tuple[str, ...] = ()  # of the verdicts, without the label of the statement


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
        "[expected]" in rest,
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


def statement_blocks(text: str) -> list[Block]:
    return [b for b in blocks(text) if b.name in {f"prf:{kind}" for kind in STATEMENTS}]


def statement_labels(text: str) -> list[str]:
    return [b.options.get("label", "") for b in statement_blocks(text)]


def status(body: str) -> str:
    found = _STATUS.search(body)
    return found[1] if found else ""


def support(body: str) -> str:
    return " ".join(found[1].split()) if (found := _SUPPORT.search(body)) else ""


def parse_support(text: str) -> list[Support]:
    """Read the argument of the role `support`.

    Parts are separated by `;`. Each has its number, if parts are numbered, and one or more words, separated by `,`,
    each followed by names of verdicts in parentheses: `1 exact (gap, value), sampled (draws); 2 proof; also (run)`.
    """
    found = []
    for entry in text.split(";"):
        number, words = re.fullmatch(r"\s*(\d*)\s*(.*?)\s*", entry, re.S).groups()
        for word in re.split(r",(?![^(]*\))", words):
            read = re.fullmatch(r"\s*(\w+)\s*(?:\(([^()]*)\))?\s*", word)
            if not read or read[1] not in (*SUPPORT, "also"):
                raise ValueError(f"cannot read {word.strip()!r}: expected one of {', '.join(SUPPORT)}, also")
            found.append(Support(number, read[1], tuple(re.findall(r"[^\s,]+", read[2] or ""))))
    return found


def support_in_words(text: str) -> str:
    """`1 exact (gap); 2 exact (path); 3 proof` -> "parts 1 and 2: exact; part 3: by proof alone"."""
    parts: dict[str, list[str]] = {}
    for s in parse_support(text):
        if s.word != "also":
            parts.setdefault(s.part, []).append(SUPPORT[s.word])
    alike: dict[str, list[str]] = {}
    for part, words in parts.items():
        alike.setdefault(" and ".join(words), []).append(part)
    return "; ".join(f"{_parts(numbers)}{words}" for words, numbers in alike.items())


def _parts(numbers: list[str]) -> str:
    """Name parts: "", "part 2: ", "parts 1, 3 and 4: "."""
    if numbers == [""]:
        return ""
    if len(numbers) == 1:
        return f"part {numbers[0]}: "
    return f"parts {', '.join(numbers[:-1])} and {numbers[-1]}: "


def text_of(outputs: list[dict]) -> str:
    """Join the text of a cell's stored outputs (notebooks store text as a string or as a list of lines)."""

    def text(output: dict) -> str | list[str]:
        if output.get("output_type") == "error":
            return f"{output['ename']}: {output['evalue']}"
        return output.get("text", output.get("data", {}).get("text/plain", ""))

    return "\n".join(t if isinstance(t, str) else "".join(t) for t in map(text, outputs))


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


def uses(pages: list[Page]) -> list[tuple[Statement, list[str]]]:
    """The statements of the book in reading order, each with the labels of those that it or its proof names."""
    found: list[tuple[Statement, list[str]]] = []
    known = {s.label: s for page in pages for s in page.statements}
    for page in pages:
        for b in blocks(page.prose):
            if b.name in {f"prf:{kind}" for kind in STATEMENTS}:
                found.append((known[b.options.get("label", "")], []))
            elif b.name != "prf:proof" or not found or found[-1][0].page != page.name:
                continue
            statement, used = found[-1]
            named = (label for _, label in _REF.findall(b.body))
            used += [x for x in dict.fromkeys(named) if x in known and x not in (*used, statement.label)]
    return found


def claims_page(chapter: str) -> str:
    return CLAIMS + chapter.split("/")[-1]


def bib_keys(text: str) -> set[str]:
    return set(re.findall(r"^ *@\w+\{ *([^,\s]+)", text, re.M))


class Entry(NamedTuple):
    """One statement on the claims page, with every verdict line that belongs to its label."""

    statement: Statement
    verdicts: list[Verdict]

    @property
    def by_part(self) -> list[tuple[str, list[Verdict]]]:
        """Say for each part how it is supported, and its verdict lines; each stands under the first part to name it."""
        parts: dict[str, list[Support]] = {}
        for s in parse_support(self.statement.support) if self.statement.support else []:
            parts.setdefault(ALSO if s.word == "also" else s.part, []).append(s)
        left, groups = list(self.verdicts), []
        for part, said in parts.items():
            names = {name for s in said for name in s.names}
            words = (f"Part {part}: " if part else "") + " and ".join(SUPPORT.get(s.word, "") for s in said)
            groups.append((ALSO if part == ALSO else words, [v for v in left if v.name in names]))
            left = [v for v in left if v.name not in names]
        return groups + ([("", left)] if left else [])


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
    """Say in words what a claim compared with what, and how closely they agree."""
    f = {name: _readable(value) for name, value in v.fields.items()}
    n, plan = f.get("n", "?"), f" ({f['plan']} planned)" if "plan" in f else ""
    if v.kind in ("match", "mean"):
        said = (
            f"{n} draws{plan} follow the stated law" if v.kind == "match" else f"{n} values{plan} have the stated mean"
        )
        return (
            f"{said}: log10 E = {f.get('log10E')}, rejected at {f.get('reject_at')}. Chance of a false alarm at most "
            f"{f.get('alpha')}, to catch the declared wrong version at least {f.get('power', '?')}."
        )
    if v.kind == "within":
        tier = f" (by {f['tier']})" if "tier" in f else ""
        return (
            f"{n} draws{plan} are within total variation {f.get('tv_hi')} of the stated law{tier}, less than "
            f"{f.get('eps')}. Chance that this bound is false: at most {f.get('delta')}."
        )
    if v.kind == "exact":
        return f"{n} computed value{' is' if n == '1' else 's are'} within {f.get('eps')} of the stated."
    if v.kind == "observed":
        limit = f"at most {f['limit']}" if "limit" in f else "below their limits"
        return (
            f"{n} number{' was' if n == '1' else 's were'} seen {limit}. The limit was set after looking: not a claim."
        )
    chance = f" Chance that a confidence bound among them is false: at most {f['delta']}." if "delta" in f else ""
    return f"The stated inequality holds on {n} instance{'' if n == '1' else 's'}.{chance}"


def _miss(v: Verdict) -> tuple[float, str]:
    """By how much a wrong version missed, to compare those of one claim, and in words."""
    f = {name: _readable(value) for name, value in v.fields.items()}
    if v.kind in ("match", "mean"):
        return v.number("log10E"), f"log10 E = {f.get('log10E')}"
    if v.kind == "within":
        return v.number("tv_lo"), f"total variation at least {f.get('tv_lo')}"
    if v.kind == "exact":
        return v.number("error"), f"off by {f.get('error')}"
    return v.number("excess"), f"violated by {f.get('excess')}"


def rejected(found: list[Verdict]) -> str:
    """Name the wrong versions of one claim that were rejected, the one that came closest first."""
    if not found:
        return ""
    closest, *others = sorted(found, key=lambda v: _miss(v)[0])
    listed = f"Wrong versions rejected: `{closest.slug}` ({_miss(closest)[1]})"
    return ", ".join([listed, *(f"`{v.slug}`" for v in others)]) + "."


def counts(found: list[Verdict]) -> str:
    """Count verdict lines by what they do: "4 exact, 1 sampled, 1 observed; 6 wrong versions rejected"."""
    said = [v.support for v in found if not v.slug]
    wrong = sum(bool(v.slug) for v in found)
    listed = ", ".join(f"{said.count(word)} {word}" for word in SUPPORT if word in said)
    return f"{listed}; {wrong} wrong version{'' if wrong == 1 else 's'} rejected"


def _draws(found: list[Verdict]) -> str:
    """Say on how many draws verdicts rest: "on 20,000 draws", "on 30,000 to 60,000 draws"."""
    sizes = sorted({int(v.number("n")) for v in found})
    return f"on {sizes[0]:,} draws" if len(sizes) == 1 else f"on {sizes[0]:,} to {sizes[-1]:,} draws"


def evidence_line(entry: Entry) -> str:
    """What was checked of a statement, in one line, from its verdict lines and its role `support`."""
    said = {word: [v for v in entry.verdicts if not v.slug and v.support == word] for word in SUPPORT}
    listed = [f"{len(found)} {_draws(found) if word == 'sampled' else word}" for word, found in said.items() if found]
    wrong = sum(bool(v.slug) for v in entry.verdicts)
    line = f"Checked: {', '.join(listed)}; {wrong} wrong version{'' if wrong == 1 else 's'} rejected."
    words = support_in_words(entry.statement.support) if entry.statement.parts else ""
    return f"{line} {words[:1].upper()}{words[1:]}." if words else line


def claimed(pages: list[Page]) -> list[Verdict]:
    """The verdicts that are claims: neither falsifiers nor observations."""
    return [v for p in pages for v in p.verdicts if not v.slug and v.kind != "observed"]


def false_alarms(pages: list[Page]) -> float:
    """Chance that any true claim is rejected: alpha of each test, delta of each confidence bound."""
    return math.fsum(v.number(name, 0) for v in claimed(pages) for name in ("alpha", "delta"))


def false_passes(pages: list[Page]) -> float:
    """Chance that any check passes what it should reject: a declared wrong law, or a bound that is false."""
    return math.fsum(v.number(name, 0) for v in claimed(pages) for name in ("power", "delta"))


def _chance(x: float) -> str:
    """Two digits, rounded up: 5.63e-07 -> 5.7e-7."""
    if x <= 0:
        return "0"
    power = math.floor(math.log10(x))
    return f"{math.ceil(x / 10 ** (power - 1) - 1e-6) / 10:g}e{power}"


def summary(pages: list[Page]) -> str:
    """One paragraph of counts, and the chance that any of it is luck."""
    claims, lines = claimed(pages), [v for p in pages for v in p.verdicts]
    kinds = ", ".join(
        f"{sum(v.kind == k for v in claims)} `{k}`" for k in ("match", "mean", "within", "exact", "bound")
    )
    falsifiers = [v for v in lines if v.slug]
    rejected = sum(v.decision == "REJECT" for v in falsifiers)
    return (
        f"{sum(len(found) for _, found in entries(pages))} statements, {len(claims)} claims: {kinds}. "
        f"{rejected} of {len(falsifiers)} wrong versions rejected. "
        f"{sum(v.kind == 'observed' for v in lines)} observations, which are not counted. "
        f"**Chance that any true claim is rejected: at most {_chance(false_alarms(pages))}; "
        f"that a declared wrong version or a false bound passes: at most {_chance(false_passes(pages))}.** "
        "These add up the error probabilities of all verdict lines, without assuming independence: `alpha` of each "
        "`match` and `mean` in the first, their chance to miss a declared wrong version in the second, `delta` of each "
        "confidence bound in both. All other claims are computed and have no such chance."
    )
