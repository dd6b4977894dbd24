"""Buttons of a repository: none in a local build, all from one variable where the public workflow builds the site."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import colab
import pytest

bookext = pytest.importorskip("bookext")  # needs Sphinx
ROOT = Path(__file__).parents[1]
URL = "https://github.com/someone/some-book"


def configured(monkeypatch, **environment):
    for name in ("BOOK_REPOSITORY", "BOOK_BRANCH"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    theme = {"repository_url": "", "repository_branch": "main", "launch_buttons": {"colab_url": "https://colab"}}
    config = SimpleNamespace(html_theme_options=theme)
    bookext.configure(SimpleNamespace(srcdir=str(ROOT)), config)
    return theme


USED = ["use_source_button", "use_repository_button", "use_issues_button", "use_edit_page_button"]


def test_a_local_build_has_no_buttons(monkeypatch):
    theme = configured(monkeypatch)
    assert not any(theme[name] for name in USED) and theme["launch_buttons"] == {}
    assert not any(theme[name] for name in USED for theme in [configured(monkeypatch, BOOK_REPOSITORY="")])


def test_the_workflow_names_the_repository(monkeypatch):
    theme = configured(monkeypatch, BOOK_REPOSITORY=URL, BOOK_BRANCH="trunk")
    assert all(theme[name] for name in USED) and theme["launch_buttons"]
    assert theme["repository_url"] == URL and theme["repository_branch"] == "trunk"
    workflow = (ROOT / ".github/workflows/book.yml").read_text(encoding="utf-8")
    assert "BOOK_REPOSITORY: " in workflow and f"git push --force origin {bookext.NOTEBOOKS}" in workflow


def test_launch_buttons_open_the_branch_of_notebooks():
    app = SimpleNamespace(config=SimpleNamespace(html_theme_options={"repository_branch": "main"}))
    colab_url = "https://colab/github/someone/some-book/blob/{}/book/tilting.ipynb"
    edit = {"text": "Edit", "url": f"{URL}/edit/main/book/tilting.ipynb"}
    context = {
        "header_buttons": [{"buttons": [{"text": "Colab", "url": colab_url.format("main")}]}, {"buttons": [edit]}, {}]
    }
    bookext.launch_notebooks(app, "book/tilting", "page.html", context, None)
    assert context["header_buttons"][0]["buttons"][0]["url"] == colab_url.format(bookext.NOTEBOOKS)
    assert edit["url"] == f"{URL}/edit/main/book/tilting.ipynb"
    bookext.launch_notebooks(app, "search", "search.html", {}, None)


def test_notebooks_for_launching_begin_with_a_cell_that_installs(tmp_path):
    colab.main(str(tmp_path), f"{URL}/", "abc123")
    names = {path.name for path in (ROOT / "book").glob("*.ipynb")}
    written = {path.name: json.loads(path.read_text(encoding="utf-8")) for path in (tmp_path / "book").glob("*.ipynb")}
    assert set(written) == names
    for name, notebook in written.items():
        first, *rest = notebook["cells"]
        assert f" @ git+{URL}@abc123" in first["source"] and first["source"].startswith("%pip install ")
        assert rest == json.loads((ROOT / "book" / name).read_text(encoding="utf-8"))["cells"]
    weights = "https://raw.githubusercontent.com/someone/some-book/abc123/requirements-language.txt"
    assert {name for name, nb in written.items() if weights in nb["cells"][0]["source"]} == {"language_model.ipynb"}


MINIMAL = """\
format: jb-book
root: book/index
chapters:
  - file: book/small
"""


@pytest.mark.slow
@pytest.mark.parametrize("url", ["", URL])
def test_a_built_page(tmp_path, monkeypatch, url):
    """The theme and the extension together, on a book of two pages."""
    monkeypatch.setenv("BOOK_REPOSITORY", url)
    shutil.copytree(ROOT / "book/_ext", tmp_path / "book/_ext", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "book/_static", tmp_path / "book/_static")
    shutil.copy(ROOT / "book/references.bib", tmp_path / "book")
    shutil.copy(ROOT / "_config.yml", tmp_path)
    (tmp_path / "tiltlib").symlink_to(ROOT / "tiltlib")
    (tmp_path / "_toc.yml").write_text(MINIMAL)
    (tmp_path / "book/index.md").write_text("# Index\n")
    cells = [{"cell_type": "markdown", "id": "a", "metadata": {}, "source": "# Small"}]
    kernel = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}
    small = {"cells": cells, "metadata": kernel, "nbformat": 4, "nbformat_minor": 5}
    (tmp_path / "book/small.ipynb").write_text(json.dumps(small))
    program = [Path(sys.executable).with_name("jupyter-book"), "build", tmp_path]
    done = subprocess.run(program, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    page = (tmp_path / "_build/html/book/small.html").read_text(encoding="utf-8")
    links = [
        f"{URL}/edit/main/book/small.ipynb",
        f"{URL}/issues/new",
        "https://colab.research.google.com/github/someone/some-book/blob/notebooks/book/small.ipynb",
    ]
    assert [link in page for link in links] == [bool(url)] * 3
    assert bool(url) or "github.com" not in page
