import os
from collections.abc import Iterator

import pytest
import torch
from browser import base, browser, contexts, files, visit  # noqa: F401  fixtures
from hypothesis import HealthCheck, settings

from tiltlib import verify

# Hypothesis picks the same examples in every run, like every other draw here: a red test is a finding, never a flake.
# A busy machine is no fault of a test.
slow = [HealthCheck.too_slow]
settings.register_profile("tiltlib", deadline=None, derandomize=True, max_examples=40, suppress_health_check=slow)
settings.load_profile("tiltlib")


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def rng(request: pytest.FixtureRequest) -> torch.Generator:
    """The generator of a test. Its seed follows from the name of the test; SALT=x in the environment tries another."""
    name = request.node.nodeid.split("/")[-1]
    return verify.rng("".join(c if not c.isspace() else "_" for c in name), salt=os.environ.get("SALT", ""))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print how long the pages are and how much of them is code, which `test_pages.py` measures."""
    reports = [r for found in terminalreporter.stats.values() for r in found if getattr(r, "when", "") == "call"]
    pages = sorted(value for r in reports for name, value in r.user_properties if name == "page")
    for page, height, code in pages:
        terminalreporter.write_line(f"{page:28} {height:7,.0f} px  code and output {code:4.0%}")
