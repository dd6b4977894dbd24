"""How often each public call waits for the device that it runs on: the table of book/machines.md.

`python tests/waits.py` writes the table anew. A wait belongs to the checks of arguments if `_checks` reads; the others
decide how the computation goes on, or hand numbers to Python.
"""

import re
import sys
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parent))

import elsewhere
from calls import CALLS, Inputs, leaves

PAGE = Path(__file__).parent.parent / "book/machines.md"
BEGIN, END = "<!-- waits: written by tests/waits.py -->\n", "<!-- end of waits -->\n"


class Waits(NamedTuple):
    checks: int
    others: int


@cache
def called(key: str) -> tuple[dict[str, Any], Waits]:
    """Make one example call on the pretended device; count its waits, without those that made its arguments."""
    with elsewhere.Pretend() as device:
        call = CALLS[key](Inputs(put=lambda x: x.to(elsewhere.DEVICE), generator=device.generator))
        device.waits.clear()
        device.checks = 0
        got = leaves(call.result())
    return got, Waits(device.checks, device.waits.total() - device.checks)


def waits(key: str) -> Waits:
    return called(key)[1]


def table() -> str:
    """One line for each function that waits for anything but one look at its arguments: the most of its examples."""
    most: dict[str, Waits] = {}
    for key in CALLS:
        name, now = key.split()[0], waits(key)
        most[name] = Waits(*map(max, now, most.get(name, now)))
    lines = [f"| `{name}` | {n.checks} | {n.others} |" for name, n in most.items() if n.checks > 1 or n.others]
    rest = len(most) - len(lines)
    head = (
        f"{len(CALLS)} calls of {len(most)} functions. The {rest} that are not listed wait once at most, for checks.\n"
    )
    return "\n".join([head, "| function | for checks | otherwise |", "|---|--:|--:|", *lines]) + "\n"


def on_page() -> str:
    return PAGE.read_text(encoding="utf-8").partition(BEGIN)[2].partition(END)[0].strip() + "\n"


if __name__ == "__main__":
    text = PAGE.read_text(encoding="utf-8")
    replaced = re.sub(f"(?s)(?<={re.escape(BEGIN)}).*(?={re.escape(END)})", lambda _: f"\n{table()}\n", text)
    PAGE.write_text(replaced, encoding="utf-8")
