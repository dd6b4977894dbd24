"""Change the library in one place at a time, and see that a test notices each change.

`make mutants` runs mutmut on every module, `make mutants MODULE=weights` on one. A mutant that
no test notices is a survivor. It gets a test, or an entry in tests/survivors/<module>.toml that says why it needs none:

    [[beta_for_ess]]                    the function, or "Class.method"
    old = "for _ in range(100):"        the changed statement, as `ast.unparse` writes it
    new = "for _ in range(101):"        the same in the mutant, or a list: several mutants with one reason
    speed = "one halving more of an interval that is below one ulp"

The reason is one of REASONS. The run fails on a survivor without an entry and on an entry without its survivor.
mutmut numbers the mutants of a function; an entry names a statement instead, so that it outlives edits elsewhere.
"""

import ast
import copy
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from difflib import SequenceMatcher
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent
LISTS = ROOT / "tests/survivors"
WORK = ROOT / "_build/mutants"

# Each module is judged by its own tests, and a mutant that survives them by the rules that every call keeps: these are
# many, and collecting them for each mutant would take longer than everything else.
MODULES = sorted(path.stem for path in (ROOT / "tiltlib").glob("*.py") if path.stem != "__init__")
RULES = ["tests/test_devices.py", "tests/test_every_call.py"]
NO_RULES = {"data", "figures"}  # they work on the CPU by contract
# They read the source, of which each mutant is a part, and the names of functions, which mutmut changes.
NOT_HERE = [
    "--deselect=tests/test_every_call.py::test_every_word_of_every_option_is_given",
    "--deselect=tests/test_devices.py::test_waits_are_counted_where_they_happen",
]
SLOW_APART = ["-m", "not slow"]  # the slow tests of `distributed` start processes, which takes seconds for each mutant


def own_tests(module: str) -> list[str]:
    return [f"tests/test_{module.lstrip('_')}.py"]


REASONS = {
    "equivalent": "no caller can tell it from the original: say why",
    "message": "only the wording of an error changes",
    "tolerance": "the result moves by less than a stated tolerance: say which",
    "speed": "only time or memory changes",
    "look": "only the look of a figure changes, which eyes judge, and page tests if it is in the book",
}

# What mutmut stores for a mutant: the exit code of pytest, or of a process that it stopped, which counts as noticed.
KILLED = {1, 3}
STOPPED = {36, 24, -24, 152, 255, -9, -11}

Function = ast.FunctionDef | ast.AsyncFunctionDef


class Change(NamedTuple):
    """What a mutant is, whatever its number: in a function, one statement became another."""

    function: str
    old: str
    new: str

    def __str__(self) -> str:
        return "\n".join((f"  {self.function}", *prefixed("-", self.old), *prefixed("+", self.new)))


def prefixed(sign: str, text: str) -> list[str]:
    return [f"    {sign} {line}" for line in text.split("\n")]


# --- source code -----------------------------------------------------------------------------------------------------


def functions(source: str) -> Iterator[tuple[str, Function]]:
    """Top-level functions and methods, which is where mutmut mutates, by name or "Class.method"."""
    for node in ast.parse(source).body:
        if isinstance(node, Function):
            yield node.name, node
        elif isinstance(node, ast.ClassDef):
            yield from ((f"{node.name}.{child.name}", child) for child in node.body if isinstance(child, Function))


def statements(function: Function) -> list[str]:
    """The lines of a function without layout, comments and docstring: one per simple statement, one per header."""
    bare = copy.copy(function)
    bare.body = function.body[1:] if ast.get_docstring(function) is not None else function.body
    bare.body, bare.decorator_list = bare.body or [ast.Pass()], []
    return [line.strip() for line in ast.unparse(bare).split("\n")]


def places(block: list[str], lines: list[str]) -> list[int]:
    return [i for i in range(len(lines)) if lines[i : i + len(block)] == block]


def stands_in(old: str, function: Function) -> bool:
    """Whether a function has the old statement of an entry. One that stands there twice must say which is meant."""
    text, _, number = re.fullmatch(r"(.*?)( # (\d+))?", old, re.DOTALL).groups()
    count = len(places(text.split("\n"), statements(function)))
    return count == 1 if number is None else 1 <= int(number) <= count > 1


def change(name: str, old: Function, new: Function) -> Change:
    """The statements that differ. Where the old one stands several times, ` # 2` says that the second was changed."""
    before, after = statements(old), statements(new)
    edits = [edit for edit in SequenceMatcher(None, before, after, autojunk=False).get_opcodes() if edit[0] != "equal"]
    low, high, start, end = edits[0][1], edits[-1][2], edits[0][3], edits[-1][4]
    found = places(before[low:high], before)
    number = f" # {found.index(low) + 1}" if len(found) > 1 else ""
    return Change(name, "\n".join(before[low:high]) + number, "\n".join(after[start:end]))


class _WithoutMessages(ast.NodeTransformer):
    """Empties the text of errors: the strings that a `raise` formats, and the argument's name in a call of a check."""

    def visit_Raise(self, node: ast.Raise) -> ast.AST:
        for argument in node.exc.args if isinstance(node.exc, ast.Call) else []:
            for part in argument.values if isinstance(argument, ast.JoinedStr) else [argument]:
                if isinstance(part, ast.Constant) and isinstance(part.value, str):
                    part.value = ""
        return node

    def visit_Call(self, node: ast.Call) -> ast.AST:
        self.generic_visit(node)
        name = node.args[0] if node.args else None
        check = isinstance(node.func, ast.Attribute) and ast.unparse(node.func.value) == "_checks"
        if check and isinstance(name, ast.Constant) and isinstance(name.value, str):
            name.value = ""
        return node


def rewords_an_error(old: Function, new: Function) -> bool:
    """The rule for mutants that are not listed one by one: the functions differ in the text of an error alone.

    The type of the error, the condition under which it is raised and the values that it reports are not text.
    """
    old, new = (ast.dump(_WithoutMessages().visit(copy.deepcopy(function))) for function in (old, new))
    return old == new


# --- the list --------------------------------------------------------------------------------------------------------


def listed(module: str) -> dict[Change, str]:
    """The listed survivors of a module, each with its reason."""
    path = LISTS / f"{module}.toml"
    entries = tomllib.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    found: dict[Change, str] = {}
    for function, changes in entries.items():
        for entry in changes:
            (reason,) = entry.keys() - {"old", "new"}
            assert entry[reason], f"{function}: {entry['new']} needs a reason in words"
            for new in [entry["new"]] if isinstance(entry["new"], str) else entry["new"]:
                assert Change(function, entry["old"], new) not in found, f"{function}: {new} is listed twice"
                found[Change(function, entry["old"], new)] = reason
    return found


# --- the run ---------------------------------------------------------------------------------------------------------


class Outcome(NamedTuple):
    """What became of the mutants of a module."""

    killed: int
    timeouts: list[Change]
    reworded: int
    survivors: list[Change]

    @property
    def mutants(self) -> int:
        return self.killed + len(self.timeouts) + self.reworded + len(self.survivors)


def run(module: str) -> Path:
    """Run mutmut on a module in a copy of the repository, and return where it left its mutants."""
    work = WORK / module
    shutil.rmtree(work, ignore_errors=True)
    (work / "mutants").mkdir(parents=True)
    for name in ("tiltlib", "tests", "book"):
        shutil.copytree(ROOT / name, work / name, ignore=shutil.ignore_patterns("__pycache__", "survivors"))
    for name in ("conftest.py", "pyproject.toml", "_toc.yml", "_config.yml"):
        shutil.copy2(ROOT / name, work)
    mutated = work / "mutants/tiltlib" / f"{module}.py"
    judge(work, module, own_tests(module))
    survivors = [key for key, exit_code in exit_codes(mutated).items() if exit_code not in KILLED | STOPPED]
    if survivors and module not in NO_RULES:
        # Which test runs which function is another question now.
        (work / "mutants/mutmut-stats.json").unlink(missing_ok=True)
        judge(work, module, RULES, survivors)
    return mutated


def judge(work: Path, module: str, tests: list[str], mutants: list[str] = []) -> None:  # noqa: B006
    """Run some tests on some mutants of a module, by default all."""
    settings = {
        "source_paths": ["tiltlib"],
        "only_mutate": [f"tiltlib/{module}.py"],
        "also_copy": ["book", "conftest.py", "_toc.yml", "_config.yml"],
        "pytest_add_cli_args": SLOW_APART if tests == own_tests("distributed") else NOT_HERE,
        "pytest_add_cli_args_test_selection": tests,
    }
    lines = [f"{key} =\n" + "".join(f"    {value}\n" for value in values) for key, values in settings.items()]
    for folder in (work, work / "mutants"):
        (folder / "setup.cfg").write_text("[mutmut]\n" + "".join(lines), encoding="utf-8")
    # One thread: mutmut forks, and a pool of threads does not survive that.
    env = {**os.environ, "PYTHONPATH": str(work / "mutants"), "OMP_NUM_THREADS": "1"}
    with (work / "log").open("a") as log:
        mutmut = Path(sys.executable).parent / "mutmut"
        exit_code = subprocess.run([mutmut, "run", *mutants], cwd=work, env=env, stdout=log, stderr=log).returncode
    if exit_code:
        sys.exit((work / "log").read_text().replace("\r", "\n"))


def exit_codes(mutated: Path) -> dict[str, int]:
    codes: dict[str, int] = json.loads(mutated.with_suffix(".py.meta").read_text("utf-8"))["exit_code_by_key"]
    return codes


def outcome(mutated: Path) -> Outcome:
    """Read what mutmut left: a file that holds each function as it was (`_orig`) and each of its mutants."""
    code = {node.name: node for _, node in functions(mutated.read_text(encoding="utf-8"))}
    found = Outcome(0, [], 0, [])
    for key, exit_code in exit_codes(mutated).items():
        mutant = key.rpartition(".")[2]  # x_f__mutmut_12, or xǁClassǁmethod__mutmut_12
        mangled, _, _ = mutant.partition("__mutmut_")
        old, new = code[f"{mangled}__mutmut_orig"], code[mutant]
        name = mangled[2:].replace("ǁ", ".")
        old.name = new.name = name.rpartition(".")[2]
        if statements(old) == statements(new):  # no mutant: 1e300 + 1 is 1e300
            continue
        changed = change(name, old, new)
        if exit_code in KILLED:
            found = found._replace(killed=found.killed + 1)
        elif exit_code in STOPPED:
            found.timeouts.append(changed)
        elif rewords_an_error(old, new):
            found = found._replace(reworded=found.reworded + 1)
        else:
            found.survivors.append(changed)
    return found


def report(module: str, found: Outcome) -> bool:
    """Print what became of the mutants of a module. True if each survivor is listed, and each listed one survives."""
    known = listed(module)
    unlisted = [change for change in found.survivors if change not in known]
    gone = [change for change in known if change not in found.survivors and change not in found.timeouts]
    counts = {
        "mutants": found.mutants,
        "killed": found.killed,
        "timeouts": len(found.timeouts),
        "reworded errors": found.reworded,
        "listed survivors": len(found.survivors) - len(unlisted),
        "unlisted survivors": len(unlisted),
        "listed but killed": len(gone),
    }
    print(f"\n{module}: " + ", ".join(f"{count} {name}" for name, count in counts.items()))
    for title, changes in (("timeout", found.timeouts), ("unlisted survivor", unlisted), ("listed but killed", gone)):
        for changed in changes:
            print(f"{title}:\n{changed}")
    return not unlisted and not gone


def main(modules: list[str]) -> int:
    if modules == ["--list"]:  # for the weekly job, which gives each module a machine
        print(json.dumps(MODULES))
        return 0
    if unknown := sorted(set(modules) - set(MODULES)):
        sys.exit(f"no such module: {', '.join(unknown)}; there are {', '.join(MODULES)}")
    outcomes = {module: outcome(run(module)) for module in modules or MODULES}
    return int(not all([report(module, found) for module, found in outcomes.items()]))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
