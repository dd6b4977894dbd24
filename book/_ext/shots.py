"""Take pictures of the built pages, as they open: light and dark, and light on a phone.

    python book/_ext/shots.py [PAGE ...]     after `make book`; a page is a name such as book/intro, by default all

They go to _build/screenshots. A long page has several. Needs a Chromium or Chrome, see `browse.py`.
"""

from __future__ import annotations

import sys
from pathlib import Path

import browse
import pdf
import verdicts

ROOT = Path(__file__).resolve().parents[2]
OUT = ROOT / "_build/screenshots"
VIEWS = {"light": (1280, "light"), "dark": (1280, "dark"), "phone": (390, "light")}
TALLEST = 32_000  # the browser leaves out what lies lower in one picture


def take(page, name: str) -> None:
    """Take pictures of what a page shows now, from its top to its end."""
    width, height = page.evaluate("[document.documentElement.clientWidth, document.documentElement.scrollHeight]")
    for part, top in enumerate(range(0, height, TALLEST), 1):
        clip = {"x": 0, "y": top, "width": width, "height": min(TALLEST, height - top)}
        page.screenshot(path=OUT / f"{name}-{part}.jpg", type="jpeg", quality=80, full_page=True, clip=clip)


def make(browser, html: Path, names: list[str]) -> None:
    OUT.mkdir(parents=True, exist_ok=True)
    with browse.served(html) as base:
        for view, (width, theme) in VIEWS.items():
            context = browser.new_context(viewport={"width": width, "height": 900})
            context.set_default_timeout(pdf.PATIENCE)
            context.add_init_script(f"for (const key of ['mode', 'theme']) localStorage.setItem(key, '{theme}')")
            for name in names:
                page = context.new_page()
                page.goto(f"{base}{name}.html")
                page.evaluate(browse.SETTLED)
                take(page, f"{name.rpartition('/')[2]}-{view}")
                page.close()


if __name__ == "__main__":
    pages = verdicts.toc_names_of(ROOT)
    if unknown := sorted(set(sys.argv[1:]) - set(pages)):
        sys.exit(f"no such page: {', '.join(unknown)}; there are {', '.join(pages)}")
    with pdf.chromium() as browser:
        make(browser, ROOT / "_build/html", sys.argv[1:] or pages)
    print(OUT)
