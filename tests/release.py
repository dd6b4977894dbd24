"""Whether the files that state a version agree on one, and what a release says: `make tag TAG=v0.1.0`.

Prints the notes of the release, which are the section of the changelog, or ends with what does not fit.
Needs no package.
"""

import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
NEWEST = re.compile(r"^## (\S+), (\S+)\n+(.*?)(?=^## |\Z)", re.M | re.S)


def field(pattern: str, text: str) -> str:
    found = re.search(pattern, text, re.M)
    return found[1].strip("\"'") if found else "nothing"


def versions(root: Path) -> dict[str, str]:
    """The version that each file states."""
    text = {name: (root / name).read_text(encoding="utf-8") for name in ("CHANGELOG.md", "CITATION.cff")}
    package = (root / "tiltlib/__init__.py").read_text(encoding="utf-8")
    return {
        "tiltlib/__init__.py": field(r"^__version__ = (\S+)$", package),
        "CHANGELOG.md": field(r"^## ([^\s,]+)", text["CHANGELOG.md"]),
        "CITATION.cff": field(r"^version: (\S+)$", text["CITATION.cff"]),
        ".zenodo.json": json.loads((root / ".zenodo.json").read_text(encoding="utf-8")).get("version", "nothing"),
    }


def problems(root: Path, tag: str) -> list[str]:
    """What keeps this commit from being released under a tag."""
    if not re.fullmatch(r"v\d+\.\d+\.\d+", tag):
        return [f"the tag must be v and three numbers, such as v0.1.0, got {tag!r}"]
    found = [f"{name} says {said}, the tag {tag}" for name, said in versions(root).items() if f"v{said}" != tag]
    newest = NEWEST.search((root / "CHANGELOG.md").read_text(encoding="utf-8"))
    date = newest[2] if newest else "nothing"
    if not re.fullmatch(r"\d{4}-\d\d-\d\d", date):
        found.append(f"CHANGELOG.md must give the day of the release, such as 2027-01-31, it says {date}")
    return found


def notes(root: Path) -> str:
    """The newest section of the changelog."""
    return NEWEST.search((root / "CHANGELOG.md").read_text(encoding="utf-8"))[3].strip()


if __name__ == "__main__":
    if found := problems(ROOT, sys.argv[1]):
        sys.exit("\n".join(found))
    print(notes(ROOT))
