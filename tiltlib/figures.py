"""Figures and interactives for the book: display only, no mathematics.

Everything returns an object that a notebook shows as HTML and stores as one line of text, so that a figure never
makes a notebook differ from its last run. Pictures are inline SVG: black becomes the colour of the surrounding text,
so one picture serves the light and the dark theme and print, and it stays sharp at any width.

    fig, ax = figures.figure()
    ax.plot(n, tv, label="soft best-of-N")
    figures.show(fig, "Total variation falls as 1/N.")

Text is drawn as outlines. A page that names a font is at the mercy of the reader's machine: where the font is missing
the labels get other widths and run into each other. The price, text that cannot be selected, is paid by `alt`.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = [
    "BLUE",
    "COLORS",
    "GREEN",
    "GREY",
    "ORANGE",
    "PURPLE",
    "Html",
    "explorable",
    "figure",
    "progress",
    "samples",
    "show",
    "slider",
    "table",
]

# Contrast of each at least 3.3 on white and 4.6 on #121212, the dark page: enough for lines, bars and large text.
BLUE, ORANGE, GREEN, PURPLE = COLORS = ("#3b82c4", "#d9722e", "#2e9e6b", "#b45fc4")
GREY = "#7a7a7a"
DASHES = ("-", (0, (5, 2)), (0, (1, 1.5)), (0, (6, 2, 1, 2)))

# A figure is drawn at this fraction of its shown size and then enlarged. Matplotlib's 10 pt text becomes 13 pt, which
# a phone at half the width still shows legibly, and lines thicken alike. So the artists that a chapter adds later obey
# too, with no global setting changed.
SCALE = 0.75

SHORT = 12  # characters: three columns of such strings fit a phone
MAX_FRAMES = 15  # every frame is in the page: 15 light ones are about 250 kB

T = TypeVar("T")

_shown: Counter[str] = Counter()


@dataclass(frozen=True, repr=False)
class Html:
    """HTML for a notebook or book page, with a plain-text stand-in.

    Attributes:
        html: What a browser shows.
        text: What is printed, stored in the notebook and compared by its test.
    """

    html: str
    text: str

    def __repr__(self) -> str:
        return self.text

    def _repr_mimebundle_(self, include: object = None, exclude: object = None) -> dict[str, str]:
        return {"text/html": self.html, "text/plain": self.text}


def figure(
    nrows: int = 1, ncols: int = 1, *, width: float = 5.1, height: float = 3.2, **subplots_kw: Any
) -> tuple[Figure, Any]:
    """Make a figure and its axes in the style of the book.

    Text and axes are black, which `show` turns into the colour of the page's text. Lines cycle through `COLORS`
    together with a dash pattern, so that colour is never the only cue.

    Args:
        nrows: Number of rows of axes, >= 1.
        ncols: Number of columns of axes, >= 1.
        width: Largest shown width in inches, > 0; the book's text column is about 7 wide. At 5.1 the labels are large
            enough on a phone.
        height: Shown height in inches at that width, > 0.
        **subplots_kw: Passed on to `matplotlib.figure.Figure.subplots`, for example `sharey=True`.

    Returns:
        The figure, which pyplot does not know, and its axes: one, or a numpy array of them.

    Raises:
        ValueError: A size or a count out of range.
        ImportError: matplotlib is not installed.
    """
    for name, count in (("nrows", nrows), ("ncols", ncols)):
        if count < 1:
            raise ValueError(f"{name} must be >= 1, got {count}")
    for name, inches in (("width", width), ("height", height)):
        if not 0 < inches < float("inf"):
            raise ValueError(f"{name} must be positive and finite, got {inches}")
    _need_matplotlib()
    from matplotlib.figure import Figure
    from matplotlib.pyplot import cycler

    fig = Figure(figsize=(SCALE * width, SCALE * height), layout="constrained")
    axes = fig.subplots(nrows, ncols, **subplots_kw)
    for ax in fig.axes:
        ax.set_prop_cycle(cycler(color=COLORS) + cycler(linestyle=DASHES))
        ax.spines[["top", "right"]].set_visible(False)
        ax.spines[["left", "bottom"]].set_color("#000000")
        ax.tick_params(color="#000000", labelcolor="#000000", labelsize=9)
        ax.grid(axis="y", color="#000000", alpha=0.12, linewidth=0.8)
        ax.set_axisbelow(True)
    return fig, axes


def show(fig: Figure, alt: str, caption: str | None = None) -> Html:
    """Show a matplotlib figure as inline SVG that follows the theme of the page.

    Not a function of the figure alone: the same picture shown again gets other ids, since ids must differ in a page.

    Args:
        fig: Figure to draw, from `figure` or any other source.
        alt: What the picture says, in words, for a reader who cannot see it; plain text, not empty.
        caption: Plain text below the picture, or None.

    Returns:
        The picture; printed, it is `[figure]` and `alt`.

    Raises:
        ValueError: `alt` is empty.
        ImportError: matplotlib is not installed.
    """
    alt = _alt(alt)
    # The label sits on the picture, not on the <figure>: role "img" hides what is inside it, here the caption.
    return Html(f'<figure class="bk-fig">{_svg(fig, alt)}{_caption(caption)}</figure>', f"[figure] {alt}")


def slider(
    figs: Iterable[Figure], labels: Sequence[str], alt: str, caption: str | None = None, *, start: int = 0
) -> Html:
    """Show one figure of several, chosen with a slider.

    Works without any library, in the book and in a notebook. The frame it starts at is what print and a browser
    without scripts show, so let it carry the message. Give all frames one size and the same axis limits.

    Args:
        figs: The frames, 1 to 15 figures.
        labels: What the slider says at each frame, for example `"N = 4"`.
        alt: What the frames say together; plain text, not empty.
        caption: Plain text below the picture, or None.
        start: Index of the frame to start at, from 0.

    Returns:
        The slider; printed, it is `[slider]` and `alt`.

    Raises:
        ValueError: `alt` is empty, no frame or more than 15, not one label per frame, or no frame `start`.
        ImportError: matplotlib is not installed.
    """
    alt, figs = _alt(alt), list(figs)
    if not 1 <= len(figs) <= MAX_FRAMES:
        raise ValueError(f"figs must hold 1 to {MAX_FRAMES} figures, got {len(figs)}")
    if len(labels) != len(figs):
        raise ValueError(f"labels must hold one label per figure ({len(figs)}), got {len(labels)}")
    if not 0 <= start < len(figs):
        raise ValueError(f"start must be the index of a figure, 0 to {len(figs) - 1}, got {start}")
    labelled = zip(figs, labels, strict=True)
    frames = [
        f'<div class="bk-frame"{"" if i == start else " hidden"}>{_svg(fig, f"{alt} ({label})")}</div>'
        for i, (fig, label) in enumerate(labelled)
    ]
    name = _unique("".join(frames))
    first, texts = escape(labels[start]), json.dumps(list(labels)).replace("<", r"\u003c")
    html = f"""<figure class="bk-fig bk-slider" id="{name}">{"".join(frames)}
<p class="bk-control"><input type="range" min="0" max="{len(figs) - 1}" step="1" value="{start}" autocomplete="off"
 aria-label="{escape(alt)}" aria-valuetext="{first}"> <output>{first}</output></p>{_caption(caption)}
<script>(() => {{
  const root = document.getElementById("{name}"), input = root.querySelector("input"), labels = {texts};
  input.oninput = () => {{
    root.querySelectorAll(".bk-frame").forEach((frame, i) => {{ frame.hidden = i !== +input.value; }});
    root.querySelector("output").textContent = labels[input.value];
    input.setAttribute("aria-valuetext", labels[input.value]);
  }};
}})();</script></figure>"""
    return Html(html, f"[slider] {alt}")


def explorable(name: str, alt: str, caption: str | None = None, **options: Any) -> Html:
    """Show an interactive that the page itself computes.

    The book's own script, `book/_static/explorables/NAME.js`, draws it; elsewhere the reader sees `alt`.

    Args:
        name: Which interactive, for example `"soft-best-of-n"` or `"tilt"`.
        alt: What there is to see and to change; plain text, not empty.
        caption: What to try, as plain text below the picture, or None.
        **options: Settings of the interactive, as JSON values.

    Returns:
        The interactive; printed, it is `[explorable]`, the name and `alt`.

    Raises:
        ValueError: `name` or `alt` is empty, or an option is no JSON value.
    """
    if not name:
        raise ValueError(f"name must not be empty, got {name!r}")
    alt = _alt(alt)
    try:
        data = json.dumps(options, sort_keys=True, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ValueError(f"options must be finite JSON values, got {options!r}") from error
    html = (
        f'<div class="bk-explorable" role="group" aria-label="{escape(alt)}" data-name="{escape(name)}" '
        f'data-options="{escape(data)}"><p><em>{escape(alt)} (Interactive in the online book, with scripts on.)</em>'
        "</p></div>"
    )
    if caption:
        html = f'<figure class="bk-fig">{html}{_caption(caption)}</figure>'
    return Html(html, f"[explorable] {name}: {alt}")


def samples(columns: Mapping[str, Sequence[str]], mark: str, alt: str) -> Html:
    """Show lists of strings side by side with chosen characters marked. Columns of short strings may be narrow.

    Args:
        columns: Title of each column and its strings, at least one column.
        mark: The characters to make bold and underlined, for example `"aeiou"`; none if empty.
        alt: What the lists show; plain text, not empty.

    Returns:
        The columns; printed, `[samples]` and `alt`, then every string below its column's title.

    Raises:
        ValueError: `alt` is empty, or there is no column.
    """
    alt = _alt(alt)
    if not columns:
        raise ValueError(f"columns must hold at least one list of strings, got {dict(columns)!r}")

    def marked(string: str) -> str:
        runs = re.split(f"([{re.escape(mark)}]+)", string) if mark else [string]
        return "".join(f"<u><b>{escape(run)}</b></u>" if i % 2 else escape(run) for i, run in enumerate(runs))

    html = "".join(
        f"<div><strong>{escape(title)}</strong><ul>"
        + "".join(f"<li><code>{marked(string)}</code></li>" for string in strings)
        + "</ul></div>"
        for title, strings in columns.items()
    )
    lines = [f"[samples] {alt}"]
    for title, strings in columns.items():
        lines += [f"{title}:", *(f"  {string}" for string in strings)]
    short = all(len(string) <= SHORT for strings in columns.values() for string in strings)
    style = "bk-samples bk-short" if short else "bk-samples"
    return Html(f'<figure class="{style}" aria-label="{escape(alt)}">{html}</figure>', "\n".join(lines))


def table(columns: Mapping[str, Sequence[str]], alt: str) -> Html:
    """Show a small table that on a narrow screen wraps, then scrolls in its own box.

    Args:
        columns: Heading of each column and its entries, already formatted; columns of one length.
        alt: What the table shows and what its headings mean, put below it; plain text, not empty.

    Returns:
        The table; printed, `[table]` and `alt`, then the rows in aligned columns.

    Raises:
        ValueError: `alt` is empty, there is no column, or the columns differ in length.
    """
    alt = _alt(alt)
    if not columns or len({len(entries) for entries in columns.values()}) != 1:
        raise ValueError(f"columns must hold at least one column, all of one length, got {dict(columns)!r}")
    rows = list(zip(*columns.values(), strict=True))
    cells = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    head = "".join(f'<th scope="col">{escape(title)}</th>' for title in columns)
    # <caption> is also the name of the table for a screen reader, so no label repeats it.
    html = (
        f'<table class="table"><caption>{escape(alt)}</caption>'
        f"<thead><tr>{head}</tr></thead><tbody>{cells}</tbody></table>"
    )
    widths = [max(map(len, (title, *entries))) for title, entries in columns.items()]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in (columns, *rows)]
    return Html(f'<div class="bk-table">{html}</div>', "\n".join([f"[table] {alt}", *map(str.rstrip, lines)]))


def progress(steps: Iterable[T], label: str) -> Iterator[T]:
    """Pass items through and show how far a long loop is, in a notebook.

    One line is updated in place about twice a second. What a notebook stores, and what it shows when the loop has
    ended, is the label alone, so it does not differ from its last run. Outside IPython nothing is shown.

    Args:
        steps: The items to pass through; without a length only their number so far is shown.
        label: What is going on, not empty, for example `"policy gradient"`.

    Returns:
        The items, one by one.

    Raises:
        ValueError: `label` is empty.
    """
    if not label.strip():
        raise ValueError(f"label must not be empty, got {label!r}")
    return _shown_progress(steps, label)


def _shown_progress(steps: Iterable[T], label: str) -> Iterator[T]:
    at_rest = Html(f'<p class="bk-progress">{escape(label)}</p>', f"[progress] {label}")
    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    if shell is None:
        yield from steps
        return
    from IPython.display import display

    handle = display(at_rest, display_id=True)
    total, last = (len(steps) if isinstance(steps, Sized) else None), time.monotonic()
    try:
        for count, item in enumerate(steps):
            if time.monotonic() - last > 0.5:
                last = time.monotonic()
                so_far = f"{label}: {count}" + ("" if total is None else f" of {total}")
                handle.update(Html(f'<p class="bk-progress">{escape(so_far)}</p>', so_far))
            yield item
    finally:
        handle.update(at_rest)


def _need_matplotlib() -> None:
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ImportError("tiltlib.figures draws with matplotlib: pip install matplotlib") from error


def _alt(alt: str) -> str:
    """Put the text on one line, since it is also what the notebook prints."""
    line = " ".join(alt.split())
    if not line:
        raise ValueError(f"alt must say in words what the picture shows, got {alt!r}")
    return line


def _caption(caption: str | None) -> str:
    return f"<figcaption>{escape(caption)}</figcaption>" if caption else ""


def _unique(content: str) -> str:
    """Name a piece of a page after its content; a repeated piece is numbered."""
    name = "bk" + hashlib.sha256(content.encode()).hexdigest()[:10]
    _shown[name] += 1
    return name if _shown[name] == 1 else f"{name}-{_shown[name]}"


def _svg(fig: Figure, alt: str) -> str:
    """Draw a figure as one <svg> element that can stand anywhere in any page."""
    _need_matplotlib()
    import matplotlib
    from matplotlib.text import Text

    for ax in fig.axes:
        if legend := ax.get_legend():
            legend.set_frame_on(False)  # its default frame is white, a glaring box on a dark page
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "path"}):
        fig.savefig(buffer, format="svg", transparent=True)
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    # Metadata holds the date, and a <style> inside an SVG would apply to the whole page.
    svg = re.sub(r"<metadata>.*?</metadata>|<style[ >].*?</style>|<!--.*?-->", "", svg, flags=re.DOTALL)
    svg = svg.replace("#000000", "currentColor")

    # Only ids that something refers to are kept, numbered in order: matplotlib's own are random.
    used = set(re.findall(r'(?:href="|url\()#([^")]+)', svg))
    ids = [name for name in re.findall(r' id="([^"]+)"', svg) if name in used]
    number = {name: f"{i}" for i, name in enumerate(dict.fromkeys(ids))}
    svg = re.sub(r' id="([^"]+)"', lambda m: f' id="@{number[m[1]]}"' if m[1] in used else "", svg)
    svg = re.sub(r'((?:href="|url\()#)([^")]+)', lambda m: f"{m[1]}@{number[m[2]]}", svg)
    svg = re.sub(r"\s*\n\s*", "\n", svg)
    prefix = _unique(svg)
    svg = re.sub(r'( id="|href="#|url\(#)@', rf"\g<1>{prefix}-", svg)

    width = fig.get_size_inches()[0] / SCALE * 96  # CSS pixels
    texts = [text for text in fig.findobj(Text) if text.get_visible() and text.get_text().strip()]
    smallest = min((text.get_fontsize() for text in texts), default=0.0)  # in units of the box, which are points
    head, body = svg.split(">", 1)
    box = re.search(r'viewBox="[^"]+"', head)
    assert box  # matplotlib states it
    # The joins and caps are those of the dropped <style>; fill covers the glyphs, whose black is left unsaid.
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" {box[0]} role="img" '
        f'aria-label="{escape(alt)}" data-font="{smallest:g}" '
        f'fill="currentColor" stroke-linejoin="round" stroke-linecap="butt" '
        f'style="width:100%;max-width:{width:.0f}px;height:auto">{body.strip()}'
    )
