"""The list of surviving mutants says what the library says, and the tool that compares it with a run does its work."""

import json
import re
from pathlib import Path

import mutants
import pytest
from mutants import ROOT, Change, Outcome

MODULES = {path.stem: path for path in sorted((ROOT / "tiltlib").glob("*.py")) if path.stem != "__init__"}
SOURCE = """
def f(x, n=3):
    '''Say what it does.'''
    _checks.tensor("x", x)
    if n < 1:
        raise ValueError(f"n must be >= 1, got {n!r}")  # a reason
    for _ in range(n):
        x = x.sum(-1)
        x = x.sum(-1)
    return named("mean", x)
"""


def function(source: str) -> mutants.Function:
    return dict(mutants.functions(source))["f"]


def changed(old: str, new: str) -> tuple[mutants.Function, mutants.Function]:
    assert old in SOURCE
    return function(SOURCE), function(SOURCE.replace(old, new, 1))


def test_every_module_has_tests_that_judge_it():
    assert mutants.MODULES == list(MODULES)
    for module in mutants.MODULES:
        assert all((ROOT / name).is_file() for name in [*mutants.own_tests(module), *mutants.RULES])


def test_the_weekly_job_runs_every_module(capsys):
    assert mutants.main(["--list"]) == 0
    assert json.loads(capsys.readouterr().out) == list(MODULES)
    assert "tests/mutants.py --list" in (ROOT / ".github/workflows/weekly.yml").read_text(encoding="utf-8")


def test_the_tools_run_the_tests_with_the_packages_of_the_book():
    ours, book = (
        dict(re.findall(r"^([\w.-]+)==(\S+)", (ROOT / name).read_text(encoding="utf-8"), re.MULTILINE))
        for name in ("requirements-mutants.txt", "requirements.txt")
    )
    assert {name for name in ours.keys() & book if ours[name] != book[name]} == {"pytest"}
    assert ours.keys() >= {"torch", "numpy", "scipy", "hypothesis", "mutmut"}


def test_every_list_belongs_to_a_module():
    assert {path.stem for path in mutants.LISTS.iterdir()} <= set(MODULES)


@pytest.mark.parametrize("module", MODULES)
def test_listed_survivors_are_changes_of_the_present_source(module):
    code = dict(mutants.functions(MODULES[module].read_text(encoding="utf-8")))
    for change, reason in mutants.listed(module).items():
        assert change.function in code, f"no such function: {change.function}"
        assert mutants.stands_in(change.old, code[change.function]), f"not in the source, or not once:\n{change}"
        assert change.old != change.new
        assert reason in mutants.REASONS
        assert reason != "look" or module == "figures" or (module, change.function) == ("pool", "_picture")


def test_a_change_is_the_statement_without_layout_and_comments():
    assert mutants.change("f", *changed("n < 1", "n <= 1")) == Change("f", "if n < 1:", "if n <= 1:")
    assert mutants.change("f", *changed("n=3", "n=4")) == Change("f", "def f(x, n=3):", "def f(x, n=4):")
    moved = function(SOURCE.replace("  # a reason", "").replace("range(n)", "range(\n        n\n    )"))
    longer = function(SOURCE.replace("range(n)", "range(n + 1)"))
    assert mutants.change("f", moved, longer) == Change("f", "for _ in range(n):", "for _ in range(n + 1):")


def test_a_statement_that_stands_twice_says_which():
    first, second = "x = x.sum(-1)\n        x = x.sum(-1)", "x = x.sum(-1)\n        x = x.sum(+1)"
    change = mutants.change("f", *changed(first, second))
    assert change == Change("f", "x = x.sum(-1) # 2", "x = x.sum(+1)")
    f = function(SOURCE)
    assert mutants.stands_in("x = x.sum(-1) # 1", f) and mutants.stands_in("x = x.sum(-1) # 2", f)
    assert not mutants.stands_in("x = x.sum(-1)", f) and not mutants.stands_in("x = x.sum(-1) # 3", f)
    assert mutants.stands_in("if n < 1:", f) and not mutants.stands_in("if n < 1: # 1", f)
    assert mutants.stands_in("x = x.sum(-1)\nx = x.sum(-1)", f) and not mutants.stands_in("if n <= 1:", f)


def test_methods_are_found_by_class():
    source = "class A:\n    def f(self): pass\n\nasync def g(): pass\n"
    assert [name for name, _ in mutants.functions(source)] == ["A.f", "g"]


def test_the_text_of_an_error_is_no_behaviour():
    assert mutants.rewords_an_error(*changed('f"n must', 'f"XXn must'))


def test_the_name_in_a_check_is_no_behaviour():
    assert mutants.rewords_an_error(*changed('tensor("x"', 'tensor("XXxXX"'))


@pytest.mark.parametrize(
    "old, new",
    [
        ("ValueError", "TypeError"),
        ('f"n must be >= 1, got {n!r}"', "None"),
        ("{n!r}", "{None!r}"),
        (", got {n!r}", ""),
        ("n < 1", "n <= 1"),
        ('tensor("x"', "tensor(None"),
        ('tensor("x", x)', 'tensor("x", None)'),
        ("_checks.tensor", "_checks.integers"),
        ('named("mean"', 'named("MEAN"'),
        ("Say what", "XXSay what"),
    ],
)
def test_all_else_about_an_error_is_behaviour(old, new):
    assert not mutants.rewords_an_error(*changed(old, new))


def entry(**fields: object) -> str:
    return "[[f]]\n" + "".join(f"{key} = {value!r}\n" for key, value in fields.items())


@pytest.fixture
def lists(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(mutants, "LISTS", tmp_path)
    return tmp_path


def test_a_run_fails_on_what_is_not_listed_and_on_what_is_listed_in_vain(lists, capsys):
    one, two, three = (Change("f", "a", new) for new in ("b", "c", "d"))
    (lists / "m.toml").write_text(entry(old="a", new=["b", "c"], speed="why"))
    assert mutants.listed("m") == {one: "speed", two: "speed"} and mutants.listed("other") == {}
    assert mutants.report("m", Outcome(5, [], 2, [one, two]))
    assert "m: 9 mutants, 5 killed, 0 timeouts, 2 reworded errors, 2 listed survivors" in capsys.readouterr().out
    assert mutants.report("m", Outcome(5, [two], 0, [one]))  # a listed one may run into the limit on a busy machine
    assert not mutants.report("m", Outcome(5, [], 0, [one, two, three]))
    assert "unlisted survivor:\n  f\n    - a\n    + d\n" in capsys.readouterr().out
    assert not mutants.report("m", Outcome(5, [], 0, [one]))
    assert "listed but killed:\n  f\n    - a\n    + c\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    "wrong",
    [entry(old="a", new="b"), entry(old="a", new="b", speed="x", message="y"), 2 * entry(old="a", new="b", x="")],
)
def test_an_entry_has_one_reason_and_stands_once(lists, wrong):
    (lists / "m.toml").write_text(wrong)
    with pytest.raises((ValueError, AssertionError)):
        mutants.listed("m")


MUTATED = """
class A:
    def xǁAǁf__mutmut_orig(self): return a
    def xǁAǁf__mutmut_1(self): return b
    def xǁAǁf__mutmut_2(self): return c
    def xǁAǁf__mutmut_3(self): return d

def x_g__mutmut_orig(): raise ValueError("x", a)
def x_g__mutmut_1(): raise ValueError("x", b)
def x_g__mutmut_2(): raise ValueError("X", a)
def x_g__mutmut_3(): raise ValueError("x", a)
"""


def test_what_mutmut_left_is_read_by_statement(tmp_path):
    exits = {
        "xǁAǁf__mutmut_1": 1,
        "xǁAǁf__mutmut_2": 0,
        "xǁAǁf__mutmut_3": -24,
        "x_g__mutmut_1": 33,
        "x_g__mutmut_2": 0,
    }
    (tmp_path / "m.py").write_text(MUTATED, encoding="utf-8")
    meta = {"exit_code_by_key": {f"tiltlib.m.{key}": exit_code for key, exit_code in exits.items()}}
    (tmp_path / "m.py.meta").write_text(json.dumps(meta), encoding="utf-8")
    assert mutants.outcome(tmp_path / "m.py") == Outcome(
        killed=1,
        timeouts=[Change("A.f", "return a", "return d")],
        reworded=1,
        survivors=[
            Change("A.f", "return a", "return c"),
            Change("g", "raise ValueError('x', a)", "raise ValueError('x', b)"),
        ],
    )
