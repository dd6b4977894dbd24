"""Run each notebook once: `pytest --nbval` tests it, and the same run becomes the page of the book.

nbval executes the notebooks and compares their text outputs with the stored ones. What each cell printed or drew is
written to _build/run/, then to the cache that jupyter-book reads (`execute_notebooks: cache` in _config.yml), so that
the book build starts no kernel. Without --nbval or --nbval-lax this file does nothing.
"""

from __future__ import annotations

import copy
import re
import sys
from pathlib import Path

import pytest

EXT = str(Path(__file__).parent / "book/_ext")
sys.path.append(EXT)  # pytest puts it there later
import lacking  # noqa: E402
from verdicts import CHECK  # noqa: E402

ROOT = Path(__file__).parent
RUNS = ROOT / "_build/run"
CACHE = ROOT / "_build/.jupyter_cache"
RICH = ("text/html", "image/svg+xml", "application/javascript", "text/latex")
WARNING = re.compile(r"\b\w*Warning: ")
STDERR = "what the cell wrote to stderr"
# Under a name with underscores, which no notebook uses and which is not looked at.
APART = f"__import__('sys').path.append({EXT!r}); import apart as __apart__"


def pytest_configure(config):
    if config.getoption("nbval", False) or config.getoption("nbval_lax", False):
        config.pluginmanager.register(NotebookRuns(worker=hasattr(config, "workerinput")), "notebook-runs")


class NotebookRuns:
    """With pytest-xdist each worker writes the notebooks it ran; only the controller fills the cache (SQLite)."""

    def __init__(self, worker: bool):
        self.worker = worker
        self.cells: dict[pytest.File, list] = {}
        self.seconds: dict[str, float] = {}
        self.noise: list[tuple[str, str]] = []
        self.stored: set[pytest.File] = set()

        from nbval.kernel import RunningKernel

        # nbval runs cells without history, where IPython ignores a trailing `;` and prints what the book should not.
        RunningKernel.execute_cell_input = lambda kernel, code, allow_stdin=None: kernel.kc.execute(
            code, allow_stdin=allow_stdin, stop_on_error=False, store_history=True
        )

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items):
        for file in {item.parent for item in items if type(item).__name__ == "IPyNbCell"}:
            # Stored notebooks hold text only, and nothing from stderr: `pytest_runtest_makereport` judges that.
            file.skip_compare += (*RICH, "stderr")
        for item in items:
            if type(item).__name__ == "IPyNbCell" and (packages := lacking.lacking(item.path.stem)):
                self.stored.add(item.parent)
                item.add_marker(pytest.mark.skip(reason=f"not installed: {', '.join(packages)}"))

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self, item):
        if type(item).__name__ != "IPyNbCell" or CHECK not in item.cell.metadata.get("tags", []):
            return (yield)
        run_aside(item.parent.kernel, f"{APART}; __apart__.before(globals())")
        try:
            return (yield)
        finally:
            run_aside(item.parent.kernel, "__apart__.after(globals())")

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item, call):
        report = yield
        if report.when == "call" and type(item).__name__ == "IPyNbCell":
            self.cells.setdefault(item.parent, []).append(item)
            if text := stderr_of(item):
                report.sections.append((STDERR, text))
                # The kernel writes there too, on a slow machine ("IOStream.flush timed out"). Only a warning is ours.
                if report.passed and WARNING.search(text):
                    report.outcome, report.longrepr = "failed", f"The cell warns:\n{text}"
        return report

    def pytest_runtest_logreport(self, report):
        name = report.nodeid.split("::")[0]
        if name.endswith(".ipynb"):
            self.seconds[name] = self.seconds.get(name, 0.0) + report.duration
            self.noise += [(report.nodeid, text) for title, text in report.sections if title == STDERR]

    def pytest_terminal_summary(self, terminalreporter):
        for name, seconds in sorted(self.seconds.items()):
            terminalreporter.write_line(f"{name}: {seconds:.1f} s")
        for cell, text in self.noise:
            terminalreporter.write_line(f"{cell} wrote to stderr: {text.rstrip()}")

    def pytest_sessionfinish(self):
        for file, items in self.cells.items():
            store_run(file, items)
        for file in self.stored:
            write_run(file.path, copy.deepcopy(file.nb), [cell.outputs for cell in code_cells(file.nb)])
        if not self.worker:
            fill_cache()


def run_aside(kernel, code: str) -> None:
    """Run code in the kernel of a notebook that is no part of it."""
    asked, reply = kernel.kc.execute(code, silent=True, store_history=False), None
    while reply is None or reply["parent_header"].get("msg_id") != asked:
        reply = kernel.kc.get_shell_msg(timeout=60)
    if reply["content"]["status"] == "error":
        pytest.fail("\n".join([reply["content"]["evalue"], *reply["content"]["traceback"]]), pytrace=False)


def stderr_of(item) -> str:
    return "".join(o.text for o in item.test_outputs or [] if o.output_type == "stream" and o.name == "stderr")


def store_run(file, items) -> None:
    """Write the executed notebook; a partial or broken run is removed, it must never be shown.

    A run whose outputs merely differ from the stored ones is kept: it is what `make accept` takes.
    """
    outputs = [item.test_outputs or [] for item in items]
    raised = any(
        o.output_type == "error" and not item.options["check_exception"]
        for item, shown in zip(items, outputs, strict=True)
        for o in shown
    )
    if raised or len(items) != len(code_cells(file.nb)) or any(item.test_outputs is None for item in items):
        (RUNS / file.path.relative_to(ROOT)).unlink(missing_ok=True)
        return
    write_run(file.path, copy.deepcopy(file.nb), outputs)


def code_cells(notebook) -> list:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def write_run(source: Path, notebook, outputs) -> None:
    import nbformat

    path = RUNS / source.relative_to(ROOT)
    for count, (cell, shown) in enumerate(zip(code_cells(notebook), outputs, strict=True), 1):
        cell.execution_count = count
        cell.outputs = [nbformat.from_dict(o) for o in shown if o.get("name") != "stderr"]
        for o in cell.outputs:
            if o.output_type == "execute_result":
                o.execution_count = count
            if o.output_type == "error":  # on purpose, as any other leaves no run: a reader needs what it says
                o.traceback = [f"{o.ename}: {o.evalue}"]
    nbformat.validate(notebook)
    text = nbformat.writes(notebook)
    if not path.exists() or path.read_text(encoding="utf-8") != text:  # an unchanged run keeps its page
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")


def fill_cache() -> None:
    """Make the cache hold exactly the stored runs: an older entry could show numbers of an older library."""
    import nbformat
    from jupyter_cache import get_cache
    from jupyter_cache.base import CacheBundleIn

    cache = get_cache(str(CACHE))
    if CACHE.exists():
        cache.clear_cache()
    for path in sorted(RUNS.rglob("*.ipynb")):
        source = ROOT / path.relative_to(RUNS)
        if source.exists():
            bundle = CacheBundleIn(nbformat.read(path, as_version=4), str(source))
            cache.cache_notebook_bundle(bundle, check_validity=False, overwrite=True)
