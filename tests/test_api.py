"""Rules that every module keeps: names, docstrings, randomness, direction of imports."""

import ast
import inspect
import re
import sys
import tomllib
from importlib import import_module
from pathlib import Path

import pytest
import torch
from calls import PUBLIC
from helpers import S0, S0_REWARDS

import tiltlib
from tiltlib import (
    losses,
    markov,
    mcmc,
    mixtures,
    policies,
    smc,
    verify,
)

PACKAGE = Path(tiltlib.__file__).parent
SOURCES = {path.stem: ast.parse(path.read_text(encoding="utf-8")) for path in sorted(PACKAGE.glob("*.py"))}

# Modules that any other may use, and no user.
PRIVATE = {"_checks", "_numerics"}
# What an import is called where the package has another name.
IMPORTED_AS = {"scikit-learn": "sklearn"}


def table_of_modules():
    """Read the table in the docstring of the package: each module with the optional packages that it needs."""
    rows = re.findall(r"^(\w+)  +\S.*?(?:  +(\S[^\n]*))?$", tiltlib.__doc__.split("=\nmodule")[1], flags=re.MULTILINE)
    return {name: {IMPORTED_AS.get(p, p) for p in needs.split(", ") if p} for name, needs in rows}


MODULES = table_of_modules()

RANDOM = set("bernoulli binomial multinomial normal poisson rand randint randn randperm".split())
RANDOM_METHODS = {
    "bernoulli_",
    "cauchy_",
    "exponential_",
    "geometric_",
    "log_normal_",
    "normal_",
    "random_",
    "uniform_",
}

# Modules and initialisers of torch.nn. A constructor draws its first weights from the global generator, so layers with
# weights to draw are made by skip_init and filled by an initialiser that takes the generator.
LAYERS_WITH_RANDOM_WEIGHTS = set("Linear Bilinear Embedding Conv1d Conv2d RNN LSTM GRU MultiheadAttention".split())
FIXED_INITIALISERS = set("zeros_ ones_ constant_ eye_ dirac_ calculate_gain".split())

FUNCTIONS = {name: value for name, value in PUBLIC.items() if inspect.isfunction(value)}


def functions_of(tree):
    """Each function of a module with the name of the outermost function or class around it."""
    for top in tree.body:
        if isinstance(top, ast.FunctionDef | ast.ClassDef):
            yield top.name, top


def torch_calls(node):
    """Calls of the form torch.name(...) inside a node."""
    for call in ast.walk(node):
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute):
            if isinstance(call.func.value, ast.Name) and call.func.value.id == "torch":
                yield call.func.attr, call


def dotted(node):
    """The name that an attribute is written as: "nn.init.zeros_", or "" for other expressions."""
    if isinstance(node, ast.Name):
        return node.id
    return f"{dotted(node.value)}.{node.attr}" if isinstance(node, ast.Attribute) else ""


def nn_calls(node):
    """Calls of the form nn.a.b(...) or torch.nn.a.b(...) inside a node, by their name behind "nn."."""
    for call in ast.walk(node):
        if isinstance(call, ast.Call):
            name = dotted(call.func).removeprefix("torch.")
            if name.startswith("nn."):
                yield name.removeprefix("nn."), call


def unseeded_layers(tree):
    """Initialisers without a generator, and constructors that would draw weights from the global one."""
    for where, node in functions_of(tree):
        for name, call in nn_calls(node):
            last = name.split(".")[-1]
            draws = name.startswith("init.") and last not in FIXED_INITIALISERS
            if draws and "generator" not in {k.arg for k in call.keywords} or last in LAYERS_WITH_RANDOM_WEIGHTS:
                yield where, f"nn.{name} on line {call.lineno}"


# --- names -----------------------------------------------------------------------------------------------------------


def test_the_package_exports_its_modules():
    shipped = {name for name in SOURCES if not name.startswith("_")}
    assert set(tiltlib.__all__) == shipped and sorted(tiltlib.__all__) == tiltlib.__all__
    assert set(dir(tiltlib)) == {*tiltlib.__all__, "__version__"}
    assert all(inspect.ismodule(getattr(tiltlib, name)) for name in tiltlib.__all__)
    assert re.fullmatch(r"\d+\.\d+\.\d+", tiltlib.__version__)
    with pytest.raises(AttributeError, match="module 'tiltlib' has no attribute 'nothing'"):
        tiltlib.nothing  # noqa: B018


@pytest.mark.parametrize("name", tiltlib.__all__)
def test_all_is_complete(name):
    module = import_module(f"tiltlib.{name}")
    defined = {
        key
        for key, value in vars(module).items()
        if (inspect.isfunction(value) or inspect.isclass(value))
        and value.__module__ == module.__name__
        and not key.startswith("_")
    }
    assert defined <= set(module.__all__), f"missing from __all__ of {name}"
    assert all(hasattr(module, key) for key in module.__all__)
    assert len(set(module.__all__)) == len(module.__all__)
    assert module.__doc__ and module.__doc__.splitlines()[0].endswith(".")


def test_tiltlib_is_typed():
    assert (PACKAGE / "py.typed").exists()


# --- docstrings ------------------------------------------------------------------------------------------------------


def sections(doc):
    """Split a docstring at its Google section headings."""
    parts = re.split(r"^(Args|Returns|Raises|Example|Source):", inspect.cleandoc(doc), flags=re.MULTILINE)
    return parts[0], dict(zip(parts[1::2], parts[2::2], strict=True))


@pytest.mark.parametrize("name", PUBLIC)
def test_first_line_of_docstring(name):
    doc = PUBLIC[name].__doc__
    assert doc, f"{name} has no docstring"
    first, *rest = doc.splitlines()
    assert first[:1].isupper() and first.rstrip().endswith("."), f"{name}: {first!r} is not one sentence on one line"
    assert not rest or not rest[0].strip(), f"{name}: the first line stands alone"
    if name in FUNCTIONS:
        verb = first.split()[0].rstrip(",")
        assert not re.fullmatch(r"[A-Z][a-z]*[^s]s", verb), f"{name}: imperative, so not {verb!r}"  # "Pass" is one


@pytest.mark.parametrize("name", [name for name in PUBLIC if name.count(".") == 1 and name in FUNCTIONS])
def test_docstring_sections_of_functions(name):
    function = FUNCTIONS[name]
    signature = inspect.signature(function)
    _, found = sections(function.__doc__)
    if signature.parameters:
        listed = re.findall(r"^ {4}(\*{0,2}\w+):", found.get("Args", ""), flags=re.MULTILINE)
        assert [n.lstrip("*") for n in listed] == list(signature.parameters), f"{name}: Args"
    if signature.return_annotation not in (None, "None"):
        assert found.get("Returns", "").strip(), f"{name}: Returns"
    raised = re.findall(r"^ {4}(\w+):", found.get("Raises", ""), flags=re.MULTILINE)
    if not name.startswith("figures."):
        assert raised, f"{name}: Raises"
    assert set(raised) <= {"TypeError", "ValueError", "ImportError", "ClaimFailed", "AssertionError", "RankFailed"}, (
        f"{name}: Raises {raised}"
    )


@pytest.mark.parametrize("name", [name for name in PUBLIC if name.count(".") == 2])
def test_docstring_arguments_of_methods(name):
    parameters = [p for p in inspect.signature(PUBLIC[name]).parameters if p not in ("self", "cls")]
    _, found = sections(PUBLIC[name].__doc__)
    assert re.findall(r"^ {4}(\w+):", found.get("Args", ""), flags=re.MULTILINE) == parameters, f"{name}: Args"


# --- randomness ------------------------------------------------------------------------------------------------------

# `generator` has the default None, which is refused where noise is drawn.
DRAWS_ONLY_IN_SOME_METHODS = {"diffusion.sample"}


def parameters_of_call(value):
    return inspect.signature(value.__init__ if inspect.isclass(value) else value).parameters


def drawing_functions():
    return [name for name, value in PUBLIC.items() if "generator" in parameters_of_call(value)]


@pytest.mark.parametrize("name", drawing_functions())
def test_a_generator_has_to_be_given_by_name(name):
    parameter = parameters_of_call(PUBLIC[name])["generator"]
    assert parameter.kind is inspect.Parameter.KEYWORD_ONLY
    assert (parameter.default is inspect.Parameter.empty) == (name not in DRAWS_ONLY_IN_SOME_METHODS)


@pytest.mark.parametrize("name", SOURCES)
def test_every_random_call_is_given_a_generator(name):
    assert not list(unseeded_layers(SOURCES[name]))
    for where, node in functions_of(SOURCES[name]):
        for attribute, call in torch_calls(node):
            if attribute in RANDOM:
                assert "generator" in {k.arg for k in call.keywords}, f"{name}.{where}: torch.{attribute}"
            assert attribute not in {"seed", "get_rng_state", "set_rng_state"}, f"{name}.{where}: torch.{attribute}"
        for call in ast.walk(node):
            if isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute):
                assert call.func.attr not in RANDOM_METHODS, f"{name}.{where}: .{call.func.attr}"
                if call.func.attr == "manual_seed":
                    assert (name, where) == ("verify", "rng"), f"{name}.{where} seeds a generator"
    for node in ast.walk(SOURCES[name]):
        if isinstance(node, ast.Attribute) and node.attr == "random" and isinstance(node.value, ast.Name):
            assert node.value.id not in {"np", "numpy", "torch"}, f"{name} uses {node.value.id}.random"
        if isinstance(node, ast.Import):
            assert all(alias.name != "random" for alias in node.names), f"{name} imports random"


# --- printing, imports -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SOURCES)
def test_only_verify_and_the_command_line_of_pool_print(name):
    printed = {
        where
        for where, node in functions_of(SOURCES[name])
        for call in ast.walk(node)
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id == "print"
    }
    allowed = {"verify": {"report", "falsify"}, "pool": {"_main", "_table", "_print_needed"}}
    assert printed == allowed.get(name, set())


def imports(nodes):
    """The packages that import statements name, and the modules of tiltlib that they name."""
    packages, own = set(), set()
    for node in nodes:
        if isinstance(node, ast.ImportFrom):
            package, _, inner = (node.module or "").partition(".")
            if node.level or package == "tiltlib":
                own |= {inner} if inner else {alias.name for alias in node.names}
            else:
                packages.add(package)
        if isinstance(node, ast.Import):
            for alias in node.names:
                package, _, inner = alias.name.partition(".")
                own |= {inner} if package == "tiltlib" else set()
                packages |= {package} - {"tiltlib"}
    return packages, own


def project():
    return tomllib.loads((PACKAGE.parent / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def named(requirements):
    return {IMPORTED_AS.get(name, name) for r in requirements for name in re.findall(r"^[\w-]+", r)}


def test_the_table_of_modules_is_complete():
    assert set(MODULES) == set(tiltlib.__all__) and len(MODULES) > 10
    extras = {name: named(packages) for name, packages in project()["optional-dependencies"].items()}
    assert extras == {name: needs for name, needs in MODULES.items() if needs}
    index = (PACKAGE.parent / "book/api.md").read_text(encoding="utf-8")
    assert re.findall(r"^## \[(\w+)\]\(reference/\1\.md\)$", index, flags=re.MULTILINE) == list(MODULES)
    assert re.findall(r"^\.\. summary:: (\w+)$", index, flags=re.MULTILINE) == list(MODULES)
    pages = {path.stem: path.read_text("utf-8") for path in (PACKAGE.parent / "book/reference").glob("*.md")}
    assert set(pages) == set(MODULES)
    for name, page in pages.items():
        assert re.findall(r"^\.\. (summary|automodule):: (\S+)$", page, flags=re.MULTILINE) == [
            ("summary", name),
            ("automodule", f"tiltlib.{name}"),
        ]
    tested = {path.stem.removeprefix("test_") for path in (PACKAGE.parent / "tests").glob("test_*.py")}
    assert set(MODULES) <= tested


@pytest.mark.parametrize("name", [name for name in SOURCES if name != "__init__"])
def test_imports_point_upwards(name):
    _, used = imports(ast.walk(SOURCES[name]))
    if name in PRIVATE:
        assert used <= PRIVATE - {name}
        return
    rows = list(MODULES)
    above = {other for other in rows[: rows.index(name)] if not MODULES[other]}
    assert used <= above | PRIVATE, f"{name} imports {sorted(used - above - PRIVATE)}"


@pytest.mark.parametrize("name", [name for name in SOURCES if name != "__init__"])
def test_optional_packages_are_imported_late_and_where_the_table_says(name):
    always = sys.stdlib_module_names | named(project()["dependencies"])
    first, _ = imports(SOURCES[name].body)
    anywhere, _ = imports(ast.walk(SOURCES[name]))
    assert first <= always, f"{name} cannot be imported without {sorted(first - always)}"
    allowed = MODULES.get(name, set()) | ({"IPython"} if name == "figures" else set())  # only inside a notebook
    assert anywhere - always <= allowed, f"{name} needs {sorted(anywhere - always - allowed)}"


def private_names_of_others(tree):
    """Underscore names that a module reads and does not define."""
    own = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    stored = (node for node in ast.walk(tree) if isinstance(node, ast.Attribute | ast.Name))
    own |= {getattr(n, "attr", getattr(n, "id", "")) for n in stored if isinstance(n.ctx, ast.Store)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and re.match(r"_[^_]", node.attr) and node.attr not in own:
            yield f"{dotted(node)} on line {node.lineno}"
        if isinstance(node, ast.ImportFrom):
            for alias in node.names:
                if alias.name.startswith("_") and alias.name not in PRIVATE:
                    yield f"{alias.name} on line {node.lineno}"


@pytest.mark.parametrize("name", SOURCES)
def test_no_module_reads_underscore_names_of_another(name):
    found = [what for what in private_names_of_others(SOURCES[name]) if not what.startswith("sys._getframe")]
    assert not found


# --- the rules above can fail ----------------------------------------------------------------------------------------


def test_the_syntax_walks_see_what_they_look_for():
    bad = ast.parse("def f(x):\n    def g():\n        return torch.zeros(3)\n    return torch.rand(2, device=x.device)")
    calls = [attribute for _, node in functions_of(bad) for attribute, _ in torch_calls(node)]
    assert set(calls) == {"zeros", "rand"}
    bad = ast.parse(
        "def f(w):\n    nn.init.zeros_(w)\n    nn.init.normal_(w)\n    torch.nn.init.xavier_uniform_(w, generator=g)\n"
        "    torch.nn.Linear(2, 3)\n    nn.utils.skip_init(nn.Linear, 2, 3)\n    nn.LayerNorm(3, device=w.device)"
    )
    assert list(unseeded_layers(bad)) == [("f", "nn.init.normal_ on line 3"), ("f", "nn.Linear on line 5")]
    bad = ast.parse("from tiltlib import _checks, _other\nself._a = 1\nself._a + weights._b(x._a) + x.__doc__")
    assert list(private_names_of_others(bad)) == ["_other on line 1", "weights._b on line 3"]
    head, found = sections("Do it.\n\n    Args:\n        x: a\n        y: b\n\n    Returns:\n        c")
    assert head.strip() == "Do it." and list(found) == ["Args", "Returns"]


# --- indices -------------------------------------------------------------------------------------------------------

INTEGERS = [torch.int32, torch.int16, torch.int8, torch.uint64, torch.uint32, torch.uint16, torch.uint8]
# As many indices as there are places, so that a mask in place of an index would go unnoticed.
INDEX = torch.tensor([[2, 0, 1], [1, 0, 2], [0, 0, 1]])
CHAIN = markov.MarkovChain(torch.log_softmax(torch.arange(9.0, dtype=torch.float64).view(3, 3), -1), "abc")
POINTS = torch.tensor([[0.0], [1.0], [5.0]], dtype=torch.float64)
MIXTURE = mixtures.GaussianMixture(S0, POINTS, torch.eye(1, dtype=torch.float64).expand(3, 1, 1))

# What each function makes of an index tensor that the caller gives it.
BY_INDEX = {
    "TabularPolicy.logps": lambda i: policies.TabularPolicy(S0).logps(i),
    "natural_step": lambda i: policies.natural_step(S0, i[:, 0], S0, S0_REWARDS, beta=1.0, step=0.5),
    "count_wins": lambda i: losses.count_wins(i[:, 0], i[:, 1], torch.ones(3), 3),
    "trace": lambda i: smc.trace(INDEX, i),
    "lengths": lambda i: mcmc.lengths(i[:, :1], 0),
    "power_mh": lambda i: mcmc.power_mh(CHAIN, i, 2.0, 3, generator=verify.rng("index")).tokens,
    "MarkovChain.logps": lambda i: CHAIN.logps(i),
    "MarkovChain.total_reward": lambda i: CHAIN.total_reward(i, S0_REWARDS),
    "MarkovChain.refit": lambda i: CHAIN.refit(i, per_step=False).logps(INDEX),
    "MarkovChain.decode": lambda i: CHAIN.decode(i),
    "GaussianMixture.fit": lambda i: mixtures.GaussianMixture.fit(POINTS, i[0], 1.0).means,
    "GaussianMixture.class_logps": lambda i: MIXTURE.class_logps(POINTS, i[0]),
    "GaussianMixture.of_class": lambda i: MIXTURE.of_class(i[0], 2).means,
}


@pytest.mark.parametrize("dtype", INTEGERS)
@pytest.mark.parametrize("name", BY_INDEX)
def test_an_index_of_any_integer_type_means_the_same(name, dtype):
    expected, got = BY_INDEX[name](INDEX), BY_INDEX[name](INDEX.to(dtype))
    assert torch.equal(got, expected) if isinstance(got, torch.Tensor) else got == expected
