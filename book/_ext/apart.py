"""Keep what check cells do to themselves: what one reads of a chapter runs without them, and prints the same.

In the run that tests a notebook, `before` and `after` are called in its kernel around every check cell. A name that a
check cell binds, or whose value it changes in place, is taken away after it and given back before the next check cell.
A cell of the main flow that reads it fails, as it would where the checks are left out.
"""

import random
from typing import Any

import numpy as np
import torch

Names = dict[str, Any]
OF_IPYTHON = {"In", "Out", "exit", "quit", "get_ipython", "open"}

of_checks: Names = {}  # what the main flow must not see
_before: dict[str, tuple[object, object]] = {}  # what it may see: value and state before the check cell
_random: list[object] = []


def before(names: Names) -> None:
    """Remember the main flow, and give back what check cells left, but for names that it has bound since."""
    _before.clear()
    _before.update({name: (value, state(value)) for name, value in _kept(names).items()})
    _random[:] = random_states()
    for name in of_checks.keys() & names.keys():
        del of_checks[name]
    names.update(of_checks)


def after(names: Names) -> None:
    """Take away what check cells bound or changed; raise if one drew from the global random numbers."""
    for name, value in _kept(names).items():
        was, state_was = _before.get(name, (None, None))
        if name not in _before or value is not was or state(value) != state_was:
            of_checks[name] = names.pop(name)
    if random_states() != _random:
        raise RuntimeError("a check cell draws from global random numbers, which the main flow may do too")


def _kept(names: Names) -> Names:
    return {name: value for name, value in names.items() if not name.startswith("_") and name not in OF_IPYTHON}


def random_states() -> list[object]:
    numbers: Any = np.random.get_state()  # noqa: NPY002 - the global ones
    return [torch.get_rng_state().tolist(), numbers[1].tolist(), numbers[2], random.getstate()]


def state(value: object, deep: int = 2) -> object:
    """Return what differs after a change in place, for the kinds of object that notebooks keep."""
    if isinstance(value, torch.Generator):
        return value.get_state().tolist()
    if isinstance(value, torch.Tensor):
        return id(value), value._version
    if isinstance(value, np.ndarray):
        return value.tobytes()
    if isinstance(value, torch.nn.Module):
        return [state(part) for part in (*value.parameters(), *value.buffers())]
    if deep and isinstance(value, dict):
        return [(id(key), state(part, deep - 1)) for key, part in value.items()]
    if deep and isinstance(value, (list, tuple)):
        return [state(part, deep - 1) for part in value]
    if isinstance(value, (set, frozenset)):
        return {id(part) for part in value}
    if deep and not callable(value) and type(value).__module__ in ("__main__", "types"):
        return state(getattr(value, "__dict__", None), deep)
    return id(value)
