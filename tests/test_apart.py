"""What check cells do stays with them: see book/_ext/apart.py."""

from types import SimpleNamespace

import apart
import numpy as np
import pytest
import torch


@pytest.fixture(autouse=True)
def afresh():
    apart.of_checks.clear()


def check_cell(names, source):
    apart.before(names)
    exec(source, names)
    apart.after(names)


def main_flow():
    names = {
        "g": torch.Generator().manual_seed(1),
        "x": torch.zeros(3),
        "a": np.zeros(3),
        "steps": [1, 2],
        "nested": {"losses": [[1.0], [2.0]], "parts": (torch.zeros(2),)},
        "net": torch.nn.Linear(2, 2),
        "box": SimpleNamespace(n=1, seen=[]),
        "kinds": {1},
        "n": 5,
    }
    names["alias"] = names["g"]
    return names


def seen(names):
    return {name for name in names if not name.startswith("__")}


@pytest.mark.parametrize(
    ("source", "lost"),
    [
        ("y = x + 1", ()),
        ("n = 6", ("n",)),
        ("n = 5", ()),
        ("def x(): pass", ("x",)),
        ("import torch; torch.rand(1, generator=g)", ("g", "alias")),
        ("x[0] = 1", ("x",)),
        ("a[0] = 1", ("a",)),
        ("steps.append(3)", ("steps",)),
        ("nested['losses'].append(3)", ("nested",)),
        ("nested['parts'][0].add_(1)", ("nested",)),
        ("import torch; torch.nn.init.zeros_(net.weight)", ("net",)),
        ("box.n = 2", ("box",)),
        ("box.seen.append(2)", ("box",)),
        ("kinds.add(2)", ("kinds",)),
        ("z = [x.sum(), len(steps), net(x[:2]), nested['losses'][0]]", ()),
    ],
)
def test_the_main_flow_does_not_see_what_a_check_cell_bound_or_changed(source, lost):
    names = main_flow()
    before = seen(names)
    check_cell(names, source)
    assert seen(names) == before - set(lost)


def test_check_cells_see_each_other_and_what_the_main_flow_bound_last():
    names = {"n": 1}
    check_cell(names, "m = n + 1; n = 7")
    assert seen(names) == set()
    check_cell(names, "assert (m, n) == (2, 7); m += 1")
    names["m"] = 10  # bound by the main flow
    check_cell(names, "assert (m, n) == (10, 7)")
    assert names["m"] == 10 and seen(names) == {"m"}
    check_cell(names, "del m")
    assert "m" not in names


@pytest.mark.parametrize("draw", ["torch.rand(1)", "np.random.rand()", "random.random()"])
def test_global_random_numbers_are_left_alone(draw):
    names = {}
    exec("import random, torch\nimport numpy as np", names)
    with pytest.raises(RuntimeError, match="global random numbers"):
        check_cell(names, draw)
