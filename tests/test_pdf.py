"""The book as one PDF: outline, page numbers, links that stay inside. That nothing is cut is for `test_pages.py`."""

import pdf
import pytest
from browser import HTML
from pypdf import PdfReader

pytestmark = pytest.mark.xdist_group("pdf")  # one process, which prints the book once
CHAPTERS = {"book/intro": "One tilt, many roads", "book/length": "Length and memory", "book/references": "References"}


@pytest.fixture(scope="module")
def book(files, browser, tmp_path_factory):
    out = tmp_path_factory.mktemp("pdf") / "book.pdf"
    pdf.make(browser, HTML, CHAPTERS, out)
    return PdfReader(out)


def test_the_outline_leads_to_each_page(book):
    places = [(item.title, book.get_destination_page_number(item)) for item in book.outline]
    assert [title for title, _ in places] == list(CHAPTERS.values())
    for title, number in places:
        assert title in book.pages[number].extract_text()


def test_each_page_has_its_number(book):
    for number, page in enumerate(book.pages, 1):
        assert page.extract_text().rstrip().endswith(str(number))


def test_links_stay_in_the_book(book):
    numbers = {page.indirect_reference.idnum: i for i, page in enumerate(book.pages)}
    starts = [book.get_destination_page_number(item) for item in book.outline]
    links = [(i, link.get_object()) for i, page in enumerate(book.pages) for link in page.get("/Annots", ())]
    assert not [link for _, link in links if "127.0.0.1" in str(link.get("/A", ""))]
    inside = [(i, numbers[link["/Dest"][0].idnum]) for i, link in links if "/Dest" in link]
    assert any(i < starts[1] <= j < starts[2] for i, j in inside)  # from the first page to a chapter
    assert any(starts[1] <= i < starts[2] <= j for i, j in inside)  # from the chapter to a reference
    assert any("arxiv.org" in str(link.get("/A", "")) for _, link in links)


def test_proofs_are_open_and_evidence_is_closed(visit):
    page = visit("book/length.html")
    seen = """(what) => [...document.querySelectorAll(what)].map((e) =>
        e.checkVisibility({opacityProperty: true, visibilityProperty: true}))"""
    assert not any(page.evaluate(seen, "div.proof.dropdown > p:not(.admonition-title)"))
    pdf.prepare(page)
    for what in (
        "div.proof.dropdown > p:not(.admonition-title)",
        ".solution p:not(.admonition-title)",
        "details.evidence",
    ):
        assert page.evaluate(seen, what) and all(page.evaluate(seen, what)), what
    for what in ("details.evidence pre", "details.answer pre", ".bd-sidebar-primary"):
        assert page.evaluate(seen, what) and not any(page.evaluate(seen, what)), what
