"""Print the built book as one PDF.

    python book/_ext/pdf.py [OUT]            after `make book`; default _build/book.pdf

A browser prints each page of the table of contents, proofs and solutions open, evidence closed; the pages of evidence
stay out. Pypdf joins them, with an outline, and leads each link to a page of the book to its place in the PDF. Needs a
Chromium or Chrome, see `browse.py`.
"""

from __future__ import annotations

import io
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import unquote, urldefrag

from pypdf import PdfReader, PdfWriter
from pypdf.generic import ArrayObject, NameObject, NullObject

import browse
import verdicts

ROOT = Path(__file__).resolve().parents[2]
# Inches. What is 756 px wide on the page, a little more than the text column, fills the paper between its margins.
MARGIN = {"top": "0.8in", "bottom": "0.9in", "left": "0.8in", "right": "0.8in"}
PAPER, SCALE = {"width": "8.27in", "height": "11.69in"}, 0.85
WIDTH = 756
PATIENCE = 600_000  # milliseconds: a busy machine is no fault of a page

# What a reader of paper cannot open is opened, but for the evidence and the code of figures.
OPEN = """async () => {
  document.documentElement.dataset.theme = "light";
  document.querySelectorAll(".toggle-hidden").forEach((e) => e.classList.remove("toggle-hidden"));
  document.querySelectorAll("details.sd-sphinx-override, details.toggle-details").forEach((e) => { e.open = true; });
  await document.fonts.ready;
  await window.MathJax?.startup?.promise;
  for (let i = 0; i < 3; i++) await new Promise(requestAnimationFrame);
}"""


@contextmanager
def chromium() -> Iterator:
    from playwright.sync_api import sync_playwright

    if (path := browse.browser()) is None:
        sys.exit(browse.LACKING)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox", "--disable-gpu"])
        yield browser
        browser.close()


def prepare(page) -> None:
    """Bring an open page into the state that is printed."""
    page.emulate_media(media="print")
    page.set_viewport_size({"width": WIDTH, "height": 1000})
    page.evaluate(OPEN)


def printed(page) -> bytes:
    return page.pdf(**PAPER, margin=MARGIN, scale=SCALE, print_background=True)


def numbers(page, count: int) -> bytes:
    """Sheets with nothing but their numbers."""
    sheet = '<p style="height: 11.6in; margin: 0; break-after: page; position: relative"><span style="{}">{}</span></p>'
    place = "position: absolute; bottom: 0.45in; width: 100%; text-align: center; font: 10px sans-serif; color: #555"
    page.set_content("".join(sheet.format(place, i + 1) for i in range(count)))
    return page.pdf(**PAPER, margin=dict.fromkeys(MARGIN, "0in"))


def join(parts: list[tuple[str, str, bytes]], base: str) -> PdfWriter:
    """Join printed pages, given as (name, title, PDF), with an outline and links between them.

    A browser gives a place in a page a name of its own where the page itself leads there, as it does to its statements.
    """
    writer, first, places = PdfWriter(), {}, {}
    for name, title, pdf in parts:
        reader = PdfReader(io.BytesIO(pdf))
        start = first[name] = len(writer.pages)
        for place, target in reader.named_destinations.items():
            number = reader.get_destination_page_number(target)
            places[name, unquote(place.lstrip("/"))] = (start + number, target.top)
        writer.append(reader, import_outline=False)
        writer.add_outline_item(title=title, page_number=start)
    names = [name for name, _, _ in parts]
    for number, sheet in enumerate(writer.pages):
        here = max(names, key=lambda name: (first[name] <= number, first[name]))
        for annotation in (reference.get_object() for reference in sheet.get("/Annots", ())):
            uri, own = str(annotation.get("/A", {}).get("/URI", "")), annotation.get("/Dest")
            if isinstance(own, str):  # a place by its name, which other pages may have too
                name, fragment = here, own.lstrip("/")
            elif uri.startswith(base):
                path, fragment = urldefrag(uri.removeprefix(base))
                name = path.split("?")[0].removesuffix(".html")
                del annotation["/A"]  # a link to a page that is not printed leads nowhere
            else:
                continue
            if name in first:
                target, top = places.get((name, unquote(fragment)), (first[name], None))
                at = NullObject() if top is None else top
                place = [writer.pages[target].indirect_reference, NameObject("/XYZ"), NullObject(), at, NullObject()]
                annotation[NameObject("/Dest")] = ArrayObject(place)
    return writer


def titles(root: Path) -> dict[str, str]:
    """The pages of the PDF in order, with their titles: all of the table of contents but the pages of evidence."""
    pages = {page.name: page.title for page in verdicts.read_book(root)}
    return {name: pages[name] for name in verdicts.toc_names_of(root) if not name.startswith(verdicts.CLAIMS)}


def make(browser, html: Path, chapters: dict[str, str], out: Path) -> None:
    with browse.served(html) as base:
        parts = []
        for name, title in chapters.items():
            page = browser.new_page()
            page.set_default_timeout(PATIENCE)
            page.goto(f"{base}{name}.html")
            prepare(page)
            parts.append((name, title, printed(page)))
            page.close()
        writer = join(parts, base)
        over = PdfReader(io.BytesIO(numbers(browser.new_page(), len(writer.pages))))
    for sheet, number in zip(writer.pages, over.pages, strict=True):
        sheet.merge_page(number)
    writer.add_metadata({"/Title": "One tilt, many roads", "/Author": "The tiltlib authors"})
    writer.write(out)


if __name__ == "__main__":
    path = Path(sys.argv[1] if len(sys.argv) > 1 else ROOT / "_build/book.pdf")
    with chromium() as browser:
        make(browser, ROOT / "_build/html", titles(ROOT), path)
    print(path)
