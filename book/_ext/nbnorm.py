"""Store notebooks in one form: source, tags and text outputs. Figures are drawn again by every build.

python book/_ext/nbnorm.py [files]            normalise (default: all notebooks of the book)
python book/_ext/nbnorm.py --check [files]    fail if a notebook is not in this form, or was stored without outputs
python book/_ext/nbnorm.py --accept [files]   take the outputs of the last `pytest --nbval` run, then normalise
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import nbformat

ROOT = Path(__file__).resolve().parents[2]
RUNS = ROOT / "_build/run"  # written by conftest.py
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python", "pygments_lexer": "ipython3"},
}


def text_output(output: dict) -> dict | None:
    """Keep what a diff can show; None for an output without any text."""
    kind = output["output_type"]
    if kind == "stream":
        return {"output_type": kind, "name": output["name"], "text": output["text"]}
    if kind == "error":  # of a cell that shows an error on purpose; its traceback holds paths
        return {
            "output_type": kind,
            "ename": output["ename"],
            "evalue": output["evalue"],
            "traceback": [],
        }
    data = {k: v for k, v in output["data"].items() if k == "text/plain"}
    return {"output_type": kind, "data": data, "metadata": {}} if data else None


def normalise(text: str) -> str:
    old = nbformat.reads(text, as_version=4)
    cells, count = [], 0
    for number, cell in enumerate(old.cells):
        new = {
            "cell_type": cell.cell_type,
            "id": f"c{number:03d}",
            "metadata": {k: cell.metadata[k] for k in ("tags", "mystnb") if cell.metadata.get(k)},
            "source": cell.source.strip("\n"),
        }
        if cell.cell_type == "code":
            # Consecutive counts, never null: nbval compares nothing in a cell that was not run.
            count += 1
            outputs = [o for o in map(text_output, cell.outputs) if o]
            for output in outputs:
                if output["output_type"] == "execute_result":
                    output["execution_count"] = count
            new |= {"execution_count": count, "outputs": outputs}
        cells.append(new)
    book = {k: v for k, v in old.metadata.items() if k == "mystnb"}
    notebook = nbformat.from_dict(
        {
            "cells": cells,
            "metadata": METADATA | book,
            "nbformat": 4,
            "nbformat_minor": 5,
        }
    )
    nbformat.validate(notebook)
    return nbformat.writes(notebook) + "\n"


def problems(name: str, text: str) -> list[str]:
    """List what is wrong with a stored notebook."""
    found = []
    if text != normalise(text):
        found.append(f"{name}: not normalised, run `python book/_ext/nbnorm.py {name}`")
    code = [c for c in nbformat.reads(text, as_version=4).cells if c.cell_type == "code"]
    if code and not any(c.outputs for c in code):
        found.append(f"{name}: stored without outputs, run `make accept`")
    return found


def accept(text: str, run: str) -> str:
    """Put the outputs of an executed copy into a notebook with the same code."""
    new, ran = nbformat.reads(text, as_version=4), nbformat.reads(run, as_version=4)
    pairs = [[c for c in nb.cells if c.cell_type == "code"] for nb in (new, ran)]
    if [c.source for c in pairs[0]] != [c.source for c in pairs[1]]:
        raise ValueError("its code has changed since the last run")
    for cell, executed in zip(*pairs, strict=True):
        cell.outputs = executed.outputs
    return normalise(nbformat.writes(new))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--check", action="store_true")
    mode.add_argument("--accept", action="store_true")
    parser.add_argument("files", nargs="*", type=Path)
    options = parser.parse_args(arguments)
    failed = False
    for path in options.files or sorted((ROOT / "book").glob("*.ipynb")):
        text = path.read_text(encoding="utf-8")
        if options.check:
            for problem in problems(str(path), text):
                print(problem)
                failed = True
            continue
        try:
            run = RUNS / path.resolve().relative_to(ROOT)
            new = accept(text, run.read_text(encoding="utf-8")) if options.accept else normalise(text)
        except (OSError, ValueError) as error:
            print(f"{path}: cannot accept: {error}")
            failed = True
            continue
        if new != text:
            path.write_text(new, encoding="utf-8")
            print(f"{path}: rewritten")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
