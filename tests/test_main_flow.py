"""What one reads of a chapter runs without its checks, and prints the same."""

from pathlib import Path

import lacking
import nbformat
import pytest
import verdicts
from nbclient import NotebookClient

ROOT = Path(__file__).parents[1]


def tags(cell):
    return cell.metadata.get("tags", [])


def lines(outputs):
    return [line for line in verdicts.text_of(outputs).splitlines() if line]  # a stream may come in pieces


def chapters():
    books = {path: nbformat.read(path, as_version=4) for path in sorted((ROOT / "book").glob("*.ipynb"))}
    return {path: book for path, book in books.items() if any(verdicts.CHECK in tags(cell) for cell in book.cells)}


@pytest.mark.slow
@pytest.mark.parametrize("path", chapters(), ids=lambda path: path.name)
def test_the_main_flow_runs_without_the_check_cells(path):
    if packages := lacking.lacking(path.stem):
        pytest.skip(f"not installed: {', '.join(packages)}")
    book = nbformat.read(path, as_version=4)
    book.cells = [cell for cell in book.cells if cell.cell_type == "code" and verdicts.CHECK not in tags(cell)]
    stored = [lines(cell.outputs) for cell in book.cells]
    NotebookClient(
        book, timeout=1200, kernel_name="python3", resources={"metadata": {"path": str(path.parent)}}
    ).execute()
    for cell, before in zip(book.cells, stored, strict=True):
        if "nbval-ignore-output" not in tags(cell):
            assert lines(cell.outputs) == before, f"{path.name}: `{cell.source.splitlines()[0]}` prints otherwise"
