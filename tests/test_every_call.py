"""Rules that every public call keeps, each over the whole table of example calls."""

import ast
import inspect
import itertools
import math
import re
from pathlib import Path

import pytest
import torch
from calls import CALLS, F64, PUBLIC, Inputs, leaves, same
from torch import Tensor

import tiltlib
from tiltlib import _checks

PACKAGE = Path(tiltlib.__file__).parent


def name_of(key: str) -> str:
    return key.split()[0]


# --- the table is complete -------------------------------------------------------------------------------------------


def test_every_public_callable_is_called():
    called = {name_of(key) for key in CALLS}
    made = {type(value) for value in parts(CALLS[key](Inputs()).result() for key in CALLS)}
    left = {name for name, value in PUBLIC.items() if name not in called and value not in made}
    abstract = {name for name in left if inspect.isabstract(PUBLIC[name])}
    assert left == {"verify.ClaimFailed", "distributed.RankFailed"} | abstract | {
        name for name in PUBLIC if name.split(".")[0] in ("data", "figures")
    }


def parts(values):
    for value in values:
        yield value
        if isinstance(value, tuple):
            yield from parts(value)


def test_every_optional_argument_is_given():
    given = {(name_of(key), argument) for key, call in CALLS.items() for argument in call(Inputs()).bound.arguments}
    for name, value in PUBLIC.items():
        if any(name_of(key) == name for key in CALLS):
            missing = {p for p in inspect.signature(value).parameters if (name, p) not in given}
            assert not missing - {"self", "cls"} or name in ("verify.Verdict",), (name, missing)


def test_every_word_of_every_option_is_given(monkeypatch):
    check, given, allowed = _checks.one_of, set(), {}

    def one_of(name, value, words):
        where = inspect.currentframe().f_back.f_code.co_name
        given.add((where, name, value))
        allowed[where, name] = words
        check(name, value, words)

    monkeypatch.setattr(_checks, "one_of", one_of)
    for call in CALLS.values():
        call(Inputs()).result()
    assert {(*option, word) for option, words in allowed.items() for word in words} <= given
    sources = [ast.parse(path.read_text(encoding="utf-8")) for path in PACKAGE.glob("*.py")]
    asked = [node for tree in sources for node in ast.walk(tree) if isinstance(node, ast.Call)]
    assert len(allowed) == sum(isinstance(n.func, ast.Attribute) and n.func.attr == "one_of" for n in asked) > 5


# --- randomness ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", CALLS)
def test_draws_come_from_the_generator_alone(key):
    before = torch.random.get_rng_state()
    m = Inputs()
    first = leaves(CALLS[key](m).result())
    again = leaves(CALLS[key](Inputs()).result())
    assert torch.equal(torch.random.get_rng_state(), before)  # the global generator stands still
    assert all(same(value, again[place]) for place, value in first.items())
    passes = name_of(key) == "testing.check_model"  # and returns nothing
    if "generator" in inspect.signature(PUBLIC[name_of(key)]).parameters and m.draws and not passes:
        other = leaves(CALLS[key](Inputs(seed=1)).result())
        assert not all(same(value, other[place]) for place, value in first.items())


def test_every_function_that_takes_a_generator_draws_in_some_call():
    drawing = {name_of(key) for key, call in CALLS.items() if "generator" in call(Inputs()).bound.arguments}
    names = {name_of(key) for key in CALLS}
    assert drawing == {name for name in names if "generator" in inspect.signature(PUBLIC[name]).parameters}


@pytest.mark.parametrize("key", CALLS)
def test_no_generator_is_refused(key):
    m = Inputs(generator=lambda seed: None)
    try:
        CALLS[key](m).result()
    except TypeError as error:
        assert "generator must be a torch.Generator, got NoneType" in str(error)
    else:
        assert not m.draws


# --- arguments are only read -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", CALLS)
def test_no_argument_is_changed(key):
    made, before = [], []

    def seen(x: Tensor, i: int, rows: bool) -> Tensor:
        made.append(x)
        before.append(x.clone())
        return x

    CALLS[key](Inputs(change=seen)).result()
    assert all(same(x, y) for x, y in zip(made, before, strict=True))


# --- dtypes ----------------------------------------------------------------------------------------------------------

DTYPES = [F64, torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("key", CALLS)
@pytest.mark.slow
def test_nothing_depends_on_the_default_dtype(key):
    expected, before = leaves(CALLS[key](Inputs()).result()), torch.get_default_dtype()
    for default in (F64, torch.bfloat16):
        torch.set_default_dtype(default)
        try:
            got = leaves(CALLS[key](Inputs()).result())
        finally:
            torch.set_default_dtype(before)
        assert all(same(value, expected[place]) for place, value in got.items()), default


# No tensor comes in, or a function that makes some does.
ON_THE_DEFAULT_DEVICE = set("diffusion.karras diffusion.geometric diffusion.variance_preserving verify.falsify".split())


@pytest.mark.parametrize("key", [key for key in CALLS if name_of(key) not in ON_THE_DEFAULT_DEVICE])
def test_nothing_depends_on_the_default_device(key):
    expected, call = leaves(CALLS[key](Inputs()).result()), CALLS[key](Inputs())
    with torch.device("meta"):  # a tensor there holds no numbers
        result = call.result()
    got = leaves(result)
    assert all(same(value, expected[place]) for place, value in got.items())


# Results whose dtype is not that of the arguments: function, or function and field, the dtype, the reason.
OTHER_DTYPES = {
    "categorical.truncate .kept_mass": (F64, "a mass near 1 tells what was cut only by its digits"),
    "selection.candidate_counts": (F64, "counts are whole numbers up to 2^53"),
    "selection.soft_best_of_n_stream .log_mean_weight": (F64, "an estimate over any number of candidates"),
    "selection.exponential_best_of_n_stream .log_mean_weight": (F64, "an estimate over any number of candidates"),
    "mcmc.power_mh .acceptance": (F64, "a fraction of many moves"),
    "policies.TransformerPolicy.conditionals": (F64, "the network adds to the rows of a chain, which are float64"),
    "policies.TransformerPolicy.next_logps": (F64, "the network adds to the rows of a chain, which are float64"),
    "policies.TransformerPolicy.token_logps": (F64, "the network adds to the rows of a chain, which are float64"),
    "policies.TransformerPolicy.logps": (F64, "the network adds to the rows of a chain, which are float64"),
    "policies.TransformerPolicy": (torch.float32, "the network is float32 by contract"),
    "losses.count_wins": (F64, "counts are whole numbers up to 2^53"),
    "losses.fit_bradley_terry": (F64, "what is fitted is computed to 1e-12"),
    "mixtures.GaussianMixture.uniforms": (F64, "uniforms near 1 have the digits of float64"),
    "diffusion.karras": (F64, "levels are made of numbers, no tensor comes in"),
    "diffusion.geometric": (F64, "levels are made of numbers, no tensor comes in"),
    "diffusion.variance_preserving": (F64, "levels are made of numbers, no tensor comes in"),
    "diffusion.of_network .0.levels": (F64, "levels are numbers, in whatever dtype the shares of the signal come"),
    "guidance.particles .log_weights": (F64, "particles are weighted in float64"),
    "guidance.particles .log_partition": (F64, "particles are weighted in float64"),
    "guidance.particles .ess": (F64, "particles are weighted in float64"),
    "pool.pass_at_k bool": (F64, "no floating tensor comes in"),
}
# Modules whose results are all float64, whatever comes in.
ALWAYS_WIDE = {
    "markov": "a chain is float64, whatever it is made of",
    "autoregressive": "strings are weighed in float64",
    "stepwise": "tables of a chain, and log weights",
    "smc": "particles are weighted in float64",
    "particles": "particles are weighted in float64",
    "distributed": "sums over ranks, and particles are weighted in float64",
    "language": "laws of a network are summed up in float64, and refused in half precision",
}
# Half precision cannot hold them: a count of 10^5, a temperature for rewards far apart.
NEVER_HALF = {"weights.ess", "weights.beta_for_ess"}
# A law that was rounded to half precision is another law, and a claim about it another claim.
ONLY_WIDE_LAWS = set("log_e_value match match_counts plan within".split())


def refuses(key: str, dtype: torch.dtype) -> bool:
    module, function = name_of(key).split(".")[:2]
    by_function = key == "verify.within functions"  # what a function gives is no law, and not looked at
    return module == "verify" and function in ONLY_WIDE_LAWS and dtype not in DTYPES[:2] and not by_function


def result_dtype(key: str, place: str, dtype: torch.dtype) -> torch.dtype:
    name = name_of(key)
    if name.split(".")[0] in ALWAYS_WIDE:
        return F64
    if name in NEVER_HALF:
        return torch.promote_types(dtype, torch.float32)
    found = [OTHER_DTYPES[of] for of in (key, f"{name} {place}", name) if of in OTHER_DTYPES]
    return found[0][0] if found else dtype


@pytest.mark.parametrize("key", CALLS)
@pytest.mark.slow
def test_results_have_the_dtype_of_the_arguments(key):
    for dtype in DTYPES:
        if refuses(key, dtype):
            with pytest.raises(TypeError, match="must be float32 or float64"):
                CALLS[key](Inputs(dtype=dtype)).result()
            continue
        for place, value in leaves(CALLS[key](Inputs(dtype=dtype)).result()).items():
            inside = "._" in place or ".ref" in place  # what an object keeps for itself
            if isinstance(value, Tensor) and value.is_floating_point() and not inside:
                assert value.dtype == result_dtype(key, place, dtype), (dtype, place)


def test_every_exception_is_needed():
    needed = set()
    for key in (key for key in CALLS if not refuses(key, torch.float16)):
        for place, value in leaves(CALLS[key](Inputs(dtype=torch.float16)).result()).items():
            if isinstance(value, Tensor) and value.is_floating_point() and value.dtype != torch.float16:
                needed |= {key, name_of(key), f"{name_of(key)} {place}"}
    assert OTHER_DTYPES.keys() | NEVER_HALF <= needed


# The error that a call may make beyond the rounding of its result, in units of the rounding of its arguments. Elsewhere
# it is that of float64 arithmetic on a few numbers of size 1.
CARRIED = {
    "the score is the caller's, and sees the dtype of the points: each step adds a few of its roundings": (
        DTYPES[1:],
        16,
        """diffusion.denoised diffusion.transition diffusion.posterior_transition diffusion.sample
        diffusion.of_network diffusion.denoising_loss guidance.classifier_free guidance.plug_in
        guidance.soft_best_of_n_step guidance.particles""",
    ),
    "a mixture computes at points in float32 in float32": (
        [torch.float32],
        16,
        """mixtures.GaussianMixture diffusion.of_mixture guidance.exact_value""",
    ),
    "log Z comes in, in the dtype of the tilt": (DTYPES[1:], 1, "guidance.log_values"),
    "the limits are those of the dtype": (DTYPES[1:], math.inf, "weights.beta_for_ess"),
}


def carried(key: str, dtype: torch.dtype) -> float:
    for dtypes, factor, names in CARRIED.values():
        if dtype in dtypes and any(f"{name_of(key)}.".startswith(f"{name}.") for name in names.split()):
            return factor * torch.finfo(dtype).eps
    return 1e-14


@pytest.mark.parametrize("key", CALLS)
@pytest.mark.slow
def test_a_result_in_a_smaller_dtype_is_that_of_the_same_numbers_in_float64(key):
    for dtype in (dtype for dtype in DTYPES[1:] if not refuses(key, dtype)):
        m = Inputs(dtype=dtype)
        got = leaves(CALLS[key](m).result())

        def promoted(x: Tensor, i: int, rows: bool, m: Inputs = m) -> Tensor:
            if not x.is_floating_point():
                return x
            # What rounding left of the sum is no error of the caller, and normalised away.
            return torch.log_softmax(m.made[i].double(), -1) if m.laws[i] else m.made[i].double()

        expected = leaves(CALLS[key](Inputs(change=promoted)).result())
        for place, value in got.items():
            if "._" in place or callable(value):
                continue
            if isinstance(value, Tensor) and value.is_floating_point():
                a, b = value.double(), expected[place].double()
                allowed = torch.finfo(value.dtype).eps * b.abs() + carried(key, dtype)
                assert bool(((a == b) | ((a - b).abs() <= allowed)).all()), (dtype, place)
            elif isinstance(value, float):
                assert value == pytest.approx(expected[place], rel=1e-9), (dtype, place)
            else:
                assert same(value, expected[place]), (dtype, place)


# --- no batch, no number ---------------------------------------------------------------------------------------------

# No strings, outcomes or comparisons: there is nothing to fit or to look up.
REFUSE_NOTHING = {"markov.MarkovChain.refit", "policies.TabularPolicy.logps", "losses.count_wins"}


@pytest.mark.parametrize("key", CALLS)
def test_a_batch_of_nothing_gives_nothing(key):
    full_inputs = Inputs()
    full = leaves(CALLS[key](full_inputs).result())
    if not any(full_inputs.batch):
        return
    empty = Inputs(change=lambda x, i, rows: x[:0] if rows else x)
    if name_of(key) in REFUSE_NOTHING:
        with pytest.raises(ValueError, match="must h"):
            CALLS[key](empty).result()
        return
    for place, value in leaves(CALLS[key](empty).result()).items():
        if isinstance(value, Tensor):
            assert value.shape == (0, *full[place].shape[1:]) and value.dtype == full[place].dtype, place
        else:
            assert same(value, full[place]) or value == [], place


ARGUMENTS = {
    name
    for value in PUBLIC.values()
    if not (inspect.isclass(value) and issubclass(value, Exception))
    for name in inspect.signature(value).parameters
}

# Where a NaN passes, by the number of the tensor in the call and which of its ends is NaN (None: either).
NAN_PASSES = {
    ("selection.soft_best_of_n_stream", 0, None): "a candidate may be anything, and is only handed on",
    ("selection.soft_best_of_n_stream", 2, None): "a candidate may be anything, and is only handed on",
    ("selection.exponential_best_of_n_stream", 0, None): "a candidate may be anything, and is only handed on",
    ("selection.exponential_best_of_n_stream", 2, None): "a candidate may be anything, and is only handed on",
    ("losses.grpo mask", 0, -1): "masked",
    ("losses.grpo mask", 1, -1): "masked",
    ("losses.grpo length_norm=sequence", 0, -1): "masked",
    ("losses.grpo length_norm=sequence", 1, -1): "masked",
    ("losses.grpo length_norm=group", 0, -1): "masked",
    ("losses.grpo length_norm=group", 1, -1): "masked",
    ("losses.grpo valid", 0, -1): "not valid",
    ("losses.grpo valid", 1, -1): "not valid",
    ("losses.grpo valid", 2, -1): "not valid",
    ("losses.self_certainty direction=policy mask", 0, -1): "masked",
    ("losses.self_certainty direction=uniform mask", 0, -1): "masked",
    ("diffusion.evaluate", 0, None): "the score sees the points; what it returns is refused",
    ("guidance.classifier_free", 0, None): "the two scores see the points, and refuse what they do not know",
}
# A NaN is a number that does not agree: the decision is REJECT.
DECIDES = {"verify.exact", "verify.bound", "verify.observed", "verify.Verdict.line", "verify.report", "verify.falsify"}


@pytest.mark.parametrize("key", [key for key in CALLS if name_of(key) not in DECIDES])
def test_nan_is_refused_by_name(key):
    m = Inputs()
    bound = CALLS[key](m)
    bound.result()  # makes what `then` asks for
    for i, end in itertools.product([i for i, leaf in enumerate(m.leaves) if leaf is not None], (0, -1)):
        if (key, i, None) in NAN_PASSES or (key, i, end) in NAN_PASSES:
            continue

        def poison(x: Tensor, j: int, rows: bool, i: int = i, end: int = end) -> Tensor:
            return x.flatten().index_fill(0, torch.tensor(end % x.numel()), math.nan).view(x.shape) if i == j else x

        own = [name for name, value in bound.bound.arguments.items() if value is m.made[i]]
        with pytest.raises(ValueError) as error:
            CALLS[key](Inputs(change=poison)).result()
        text = str(error.value)
        # Of `betas` one is called "beta". What lies inside of an object was an argument of whatever made that.
        assert own[0].removesuffix("s") in text if own else re.split(r"\W", text)[0] in ARGUMENTS, (i, text)


@pytest.mark.parametrize("key", [key for key in CALLS if name_of(key) in DECIDES - {"verify.report", "verify.falsify"}])
def test_nan_is_rejected(key):
    m = Inputs(change=lambda x, i, rows: x * math.nan if i == 0 else x)
    result = CALLS[key](m).result()
    assert "REJECT" in (result if isinstance(result, str) else result.decision)


# --- gradients -------------------------------------------------------------------------------------------------------

# Functions without a word on gradients: nothing they return has any, or nothing they take is a floating tensor.
NO_WORD = {"diffusion.karras", "diffusion.geometric", "diffusion.variance_preserving", "categorical.alias_table"}
NO_WORD |= {name for name in PUBLIC if name.startswith("verify.")}
NO_WORD |= {"policies.TabularPolicy", "policies.TransformerPolicy"}  # modules, whose parameters are what is trained
# The gradient is not the derivative of the value.
NO_DERIVATIVE = {
    "losses.policy_gradient": "what `sg` encloses is held constant",
    "losses.rloo": "what `sg` encloses is held constant",
    "losses.grpo": "what `sg` encloses is held constant",
    "policies.TabularPolicy.law": "the logits are parameters, copied from the argument",
    "policies.TabularPolicy.logps": "the logits are parameters, copied from the argument",
    "markov.MarkovChain.reward_law": "the rewards are whole numbers, which no difference quotient can move",
}


def word_on_gradients(name: str) -> str:
    """What the docstring of a function, or of the class of a method, says on gradients: "not differentiable in ..."."""
    docs = [inspect.getdoc(PUBLIC[name]) or ""]
    if name.count(".") == 2:
        docs.append(inspect.getdoc(PUBLIC[name.rsplit(".", 1)[0]]) or "")
    found = [re.search(r"(not\s)?differentiable[^.;:]*", " ".join(doc.split()), re.IGNORECASE) for doc in docs]
    return next((match[0].lower() for match in found if match), "")


def floats(m: Inputs) -> list[int]:
    return [i for i, leaf in enumerate(m.leaves) if leaf is not None]


def results_at(key: str, numbers: dict[int, Tensor]) -> tuple[tuple[Tensor, ...], Inputs, object]:
    """The finite numbers in float64 that a call gives where its leaves hold these, -inf left alone."""
    m = Inputs(change_leaf=lambda x, i, rows: torch.where(x.isfinite(), numbers[i], x))
    call = CALLS[key](m)
    # Of what an object keeps inside, the tables of a chain; parts that only add up to a result have other gradients.
    places = {k: v for k, v in leaves(call.result()).items() if "._" not in k or k.endswith("._tables")}
    kept = [v for v in places.values() if isinstance(v, Tensor) and v.dtype == F64]
    return tuple(v[v.isfinite()] for v in kept), m, call


@pytest.mark.parametrize("key", CALLS)
@pytest.mark.slow
def test_gradients_are_what_the_docstring_says(key):
    name, m = name_of(key), Inputs()
    CALLS[key](m).result()
    word = word_on_gradients(name)
    finite = {i: torch.where(m.leaves[i].isfinite(), m.leaves[i], 0).requires_grad_() for i in floats(m)}
    out, m, call = results_at(key, finite)
    floating = [x for x in out if x.numel()]
    if not finite or not floating or name in NO_WORD:
        return
    assert word, f"{name} says nothing on gradients"
    if word.startswith("not"):
        winner = name.endswith("best_of_n_stream")  # the candidate is handed on, with its graph
        assert winner or not any(x.requires_grad for x in floating)
        return
    named = set(re.findall(r"`(\w+)`", word.split(", not in")[0]))
    own = {i: a for i in finite for a, value in call.bound.arguments.items() if value is m.made[i]}
    constant = [i for i, a in own.items() if named and a not in named]
    graph = [x for x in floating if x.requires_grad]
    for i in constant:
        (gradient,) = torch.autograd.grad(sum(x.sum() for x in graph), finite[i], retain_graph=True, allow_unused=True)
        assert gradient is None or not gradient.any(), own[i]
    if name in NO_DERIVATIVE:
        return
    moving = [i for i in finite if i not in constant]

    def function(*numbers: Tensor) -> tuple[Tensor, ...]:
        at = {**finite, **dict(zip(moving, numbers, strict=True))}
        return tuple(x for x in results_at(key, at)[0] if x.numel() and x.requires_grad)

    assert torch.autograd.gradcheck(function, [finite[i] for i in moving], rtol=1e-4, fast_mode=True)
