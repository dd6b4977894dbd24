"""The built book in a browser, for the tests of pages and of explorables.

Needs `_build/html` (make book) and a Chromium or Chrome, see `browse.py`; under CI=true their absence fails, elsewhere
it skips.
"""

import os
from html.parser import HTMLParser
from pathlib import Path

import browse
import pytest

HTML = Path(__file__).parents[1] / "_build/html"
VIEWS = {"wide": 1280, "phone": 390}
PATIENCE = 600_000  # milliseconds: a busy machine is no fault of a page
FLAGS = (
    "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
).split()
# The reader has no network. (Playwright's own way, a route that aborts, would turn the browser's cache off.)
FLAGS.append("--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1")


class Page(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.ids, self.links, self.loads = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.ids += [attrs["id"]] if "id" in attrs else []
        if tag in ("a", "area"):
            self.links += [attrs["href"]] if "href" in attrs else []
        elif tag not in ("use", "image") and attrs.get("rel") not in ("canonical", "license"):
            self.loads += [attrs[name] for name in ("src", "href") if attrs.get(name)]


def missing(what):
    (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)(what)


@pytest.fixture(scope="session")
def files():
    """Each page that Sphinx wrote, read once: path below `_build/html` -> Page."""
    if not (HTML / "index.html").exists():
        missing("there is no _build/html to test: run `make book` first")
    paths = [path for path in HTML.rglob("*.html") if "_static" not in path.parts]
    return {path.relative_to(HTML).as_posix(): Page(path.read_text(encoding="utf-8")) for path in paths}


@pytest.fixture(scope="session")
def base(files):
    with browse.served(HTML) as address:
        yield address.rstrip("/")


@pytest.fixture(scope="session")
def browser():
    if (path := browse.browser()) is None:
        missing(browse.LACKING)
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture(scope="session")
def contexts(browser):
    """One browser profile per view, so that scripts and fonts are fetched once."""
    made = {}
    for view, width in VIEWS.items():
        made[view] = browser.new_context(viewport={"width": width, "height": 900})
        made[view].set_default_timeout(PATIENCE)
        made[view].add_init_script("localStorage.setItem('mode', 'light'); localStorage.setItem('theme', 'light')")
    return made


@pytest.fixture
def visit(contexts, base):
    """Open a page in a view and wait for its maths; what went wrong is in `page.trouble`."""
    pages = []

    def open_page(name, view="wide"):
        page, trouble = contexts[view].new_page(), []
        pages.append(page)
        page.trouble = trouble
        local = (f"{base}/", "data:", "blob:")

        def complain(text, url):
            if url != f"{base}/favicon.ico":  # which the browser asks for by itself, and the book does not name
                trouble.append(f"console: {text} {url}")

        page.on("request", lambda r: r.url.startswith(local) or trouble.append(f"asks the network for {r.url}"))
        page.on("response", lambda r: r.status >= 400 and trouble.append(f"{r.status} for {r.url}"))
        page.on("pageerror", lambda error: trouble.append(f"error in a script: {error}"))
        page.on("console", lambda m: m.type == "error" and complain(m.text, m.location["url"]))
        page.goto(f"{base}/{name}")
        page.evaluate(browse.SETTLED)
        return page

    yield open_page
    for page in pages:
        page.close()


def page_with(name):
    """The page that holds an explorable, and so its script."""
    found = [path for path in HTML.rglob("*.html") if f'data-name="{name}"' in path.read_text("utf-8")]
    assert found, f"no page holds the explorable {name}"
    return found[0].relative_to(HTML).as_posix()
