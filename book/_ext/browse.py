"""Serve a folder to a browser on this machine, and find the browser."""

from __future__ import annotations

import functools
import http.server
import os
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# To be evaluated in a page that was opened: returns when its fonts are loaded and its maths is set.
SETTLED = "async () => { await document.fonts.ready; await window.MathJax?.startup?.promise; }"
LACKING = "no browser: install chromium or google-chrome, or let $CHROMIUM name one"


def browser() -> str | None:
    """Path of a Chromium or Chrome, or None."""
    names = (os.environ.get("CHROMIUM"), "chromium", "chromium-browser", "google-chrome")
    return next(filter(None, (shutil.which(name) for name in names if name)), None)


@contextmanager
def served(folder: Path) -> Iterator[str]:
    """Serve a folder as long as the context lasts, at the address given."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=folder)) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/"
        finally:
            server.shutdown()
            thread.join()
