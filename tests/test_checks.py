"""Each check accepts the edge of its range, refuses what lies beyond, and says which argument, which range and what."""

import math
import re

import elsewhere
import numpy as np
import pytest
import torch
from helpers import F64, S0, law, vector

from tiltlib import _checks

INTEGER_DTYPES = [
    *(torch.int64, torch.int32, torch.int16, torch.int8),
    *(torch.uint64, torch.uint32, torch.uint16, torch.uint8),
]
EPS = math.sqrt(torch.finfo(F64).eps)


def refused(error: type[Exception], message: str, check, *args, **kwargs) -> None:
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        check(*args, **kwargs)


def test_described():
    assert _checks.described(vector(1)) == "a torch.float64 tensor"
    assert _checks.described([1]) == "list" and _checks.described(None) == "NoneType"


def test_tensor():
    for value in (vector(1), torch.ones(2, 0, 1), torch.ones(3).half()):
        _checks.tensor("x", value)
    for value, got in (
        ([1.0], "list"),
        (torch.tensor([1]), "a torch.int64 tensor"),
        (torch.ones(1, dtype=torch.complex64), "a torch.complex64 tensor"),
    ):
        refused(TypeError, f"x must be a floating-point torch.Tensor, got {got}", _checks.tensor, "x", value)
    for value in (torch.tensor(1.0), torch.ones(2, 0)):
        message = f"x must have a last dimension of size >= 1, got shape {tuple(value.shape)}"
        refused(ValueError, message, _checks.tensor, "x", value)


@pytest.mark.parametrize("dtype", INTEGER_DTYPES)
def test_integers_of_every_type_become_int64(dtype):
    value = torch.tensor([3, 0, 1]).to(dtype)
    for got in (_checks.integers("x", value), _checks.sequences("x", value), _checks.indices("x", value, 4)):
        assert got.dtype == torch.int64 and got.tolist() == [3, 0, 1]


def test_integers():
    assert _checks.integers("x", torch.tensor(2)) == 2
    for value, got in (
        (vector(1), "a torch.float64 tensor"),
        (torch.tensor([True]), "a torch.bool tensor"),
        ([1], "list"),
    ):
        for check in (_checks.integers, _checks.sequences):
            refused(TypeError, f"x must be an integer torch.Tensor, got {got}", check, "x", value)
    for check in (_checks.integers, _checks.sequences):
        refused(ValueError, "x must hold at least one number, got shape (2, 0)", check, "x", torch.ones(2, 0).long())
    refused(
        ValueError, "x must hold at least one number, got shape (0, 2)", _checks.integers, "x", torch.ones(0, 2).long()
    )


def test_sequences():
    for length in (1, 2):
        assert _checks.sequences("x", torch.ones(0, length).int()).shape == (0, length)
    assert _checks.sequences("x", torch.ones(3, 1).int()).dtype == torch.int64
    message = "x must have a last dimension, the positions of a string, got a single number"
    refused(ValueError, message, _checks.sequences, "x", torch.tensor(2))


def test_indices():
    assert _checks.indices("x", torch.tensor([[0, 3]]), 4).tolist() == [[0, 3]]
    for values, k in (([0, 4], 4), ([-1, 3], 4), ([2, 1], 2)):
        message = f"x must lie in 0..{k - 1}, got values from {min(values)} to {max(values)}"
        refused(ValueError, message, _checks.indices, "x", torch.tensor(values), k)
    refused(TypeError, "x must be an integer torch.Tensor, got list", _checks.indices, "x", [0], 4)


def test_logps():
    for value in (
        S0,
        law(1, 0),
        torch.stack([S0, law(1, 0, 0)]),
        torch.ones(0, 3),
        S0.half(),
        vector(EPS),
        vector(3e-4).float(),
    ):
        _checks.logps("p", value)
    message = "p must be log-probabilities that sum to 1 over the last dimension, got logsumexp = "
    lost = torch.stack([S0, S0 - 0.25, S0 + 0.125])  # the worst row is reported
    refused(ValueError, message + "-0.25", _checks.logps, "p", lost)
    refused(ValueError, message + "-0.25", _checks.logps, "p", lost.float())
    refused(ValueError, message + "0.25", _checks.logps, "p", torch.stack([S0, S0 + 0.25, S0 - 0.125]))
    refused(ValueError, message + "nan", _checks.logps, "p", torch.stack([S0 - 0.5, S0 * math.nan]))
    refused(ValueError, message + f"{1.01 * EPS:.6g}", _checks.logps, "p", vector(1.01 * EPS))
    refused(ValueError, message + "0.000976562", _checks.logps, "p", vector(2**-10).float())
    refused(TypeError, "p must be a floating-point torch.Tensor, got list", _checks.logps, "p", [0.0])
    # Half precision over a long row: the sum is taken in float64, since float16 would lose more than it tolerates.
    _checks.logps("p", torch.full((40_000,), -math.log(40_000)).half())


def test_rewards():
    for value in (vector(1, -math.inf), vector(-math.inf), torch.ones(0, 2), vector(torch.finfo(F64).max)):
        _checks.rewards("r", value)
    message = "r must be finite or -inf (excluded), got NaN or +inf"
    for bad in (math.inf, math.nan):
        refused(ValueError, message, _checks.rewards, "r", torch.stack([vector(1, 2), vector(1, bad)]))
    refused(TypeError, "r must be a floating-point torch.Tensor, got int", _checks.rewards, "r", 1)


def test_log_weights():
    refused(TypeError, "w must be a floating-point torch.Tensor, got list", _checks.log_weights, "w", [0.0])
    # Every row has a finite entry; along other dimensions there are only -inf.
    rows = torch.tensor([[-math.inf, 0], [-math.inf, 0]])
    _checks.log_weights("w", torch.stack([rows, rows.flip(1)]))
    message = "w must leave at least one outcome of positive mass per row, got a row that is all -inf"
    refused(ValueError, message, _checks.log_weights, "w", torch.stack([vector(0, 0), vector(-math.inf, -math.inf)]))
    refused(
        ValueError, "w must be finite or -inf (excluded), got NaN or +inf", _checks.log_weights, "w", vector(math.nan)
    )


def test_some_left():
    _checks.some_left("w", vector(0, -1e308))
    message = "w must leave at least one outcome of positive mass per row, got a row that is all -inf"
    refused(ValueError, message, _checks.some_left, "w", vector(0, -math.inf))


def test_same_outcomes():
    for a, b in (((3,), (3,)), ((2, 1, 3), (4, 3)), ((1, 3), (2, 3)), ((2, 3), (1, 3))):
        _checks.same_outcomes("x", torch.ones(a), "y", torch.ones(b))
    for a, b in (((3,), (4,)), ((2, 3), (4, 3)), ((3,), (1,)), ((2, 1), (2, 3)), ((3, 3), (2, 3))):
        rule = "must agree in the last dimension and broadcast in the others"
        message = f"x and y {rule}, got shapes {a} and {b}"
        refused(ValueError, message, _checks.same_outcomes, "x", torch.ones(a), "y", torch.ones(b))


NOT_NUMBERS = [
    (True, "bool"),
    ("1", "str"),
    (None, "NoneType"),
    (1j, "complex"),
    (torch.tensor(1.0), "a torch.float32 tensor"),
]


def test_number():
    for value in (1, -0.5, np.float32(2), np.int64(3), math.nan):
        _checks.number("x", value)
    for value, got in NOT_NUMBERS:
        refused(TypeError, f"x must be a number, got {got}", _checks.number, "x", value)


def test_finite_number():
    for value in (1, -1.7e308, np.float32(2)):
        got = _checks.finite_number("x", value)
        assert type(got) is float and got == value
    for value in (math.inf, -math.inf, math.nan):
        refused(ValueError, f"x must be finite, got {value!r}", _checks.finite_number, "x", value)
    for value, got in NOT_NUMBERS:
        refused(TypeError, f"x must be a number, got {got}", _checks.finite_number, "x", value)


def test_chance():
    for value in (5e-324, 0.5, np.float64(1 - 1e-16)):
        _checks.chance("x", value)
    for value in (0, 1, -0.5, 1.5, math.nan):
        refused(ValueError, f"x must lie strictly between 0 and 1, got {value!r}", _checks.chance, "x", value)
    for value, got in NOT_NUMBERS:
        refused(TypeError, f"x must be a number, got {got}", _checks.chance, "x", value)


@pytest.mark.parametrize("check, edge", [(_checks.positive, 5e-324), (_checks.nonnegative, 0)])
def test_positive_and_nonnegative(check, edge):
    relation = ">" if check is _checks.positive else ">="
    for value in (edge, 1, np.float32(0.5), np.int64(2), 1.7e308):
        check("x", value)
    for value in (edge - 5e-324, -1.0, math.inf, math.nan, True, "1", None):
        refused(ValueError, f"x must be finite and {relation} 0, got {value!r}", check, "x", value)
    refused(TypeError, "x must be a number, got a torch.float32 tensor", check, "x", torch.tensor(1.0))


def test_fraction():
    for value in (1, 5e-324, 0.5, np.float64(1)):
        _checks.fraction("x", value, zero=False)
        _checks.fraction("x", value, zero=True)
    _checks.fraction("x", 0, zero=True)
    for value in (0, -5e-324, 1 + 1e-15, math.nan):
        refused(ValueError, f"x must lie in (0, 1], got {value!r}", _checks.fraction, "x", value, zero=False)
        if value != 0:
            refused(ValueError, f"x must lie in [0, 1], got {value!r}", _checks.fraction, "x", value, zero=True)
    for value, got in NOT_NUMBERS:
        refused(TypeError, f"x must be a number, got {got}", _checks.fraction, "x", value, zero=True)


def test_positive_per_row():
    batch = torch.Size((2, 3))
    for value in (
        1,
        5e-324,
        torch.tensor(2),
        torch.ones(3),
        torch.ones(2, 1),
        torch.ones(2, 3).int(),
        torch.ones(4, 1, 1),
        vector(5e-324),
    ):
        _checks.positive_per_row("beta", value, batch)
    refused(ValueError, "beta must be finite and > 0, got 0", _checks.positive_per_row, "beta", 0, batch)
    for value in (torch.tensor(True), torch.ones(3, dtype=torch.complex64)):
        message = f"beta must be a number or a tensor of real numbers, got a {value.dtype} tensor"
        refused(TypeError, message, _checks.positive_per_row, "beta", value, batch)
    message = "beta must be finite and > 0, got a tensor with 3 illegal entries of 4"
    refused(ValueError, message, _checks.positive_per_row, "beta", vector(1, 0, math.inf, math.nan), batch)
    refused(
        ValueError,
        "beta must be finite and > 0, got tensor([-1.])",
        _checks.positive_per_row,
        "beta",
        torch.tensor([-1.0]),
        batch,
    )
    message = "beta must be finite and > 0, got a tensor with 1 illegal entries of 2"
    refused(ValueError, message, _checks.positive_per_row, "beta", vector(1, 0), batch)
    message = "beta must broadcast against the batch dimensions (2, 3), got shape (2,)"
    refused(ValueError, message, _checks.positive_per_row, "beta", torch.ones(2), batch)


def test_count():
    for value in (1, 7, np.int64(1)):
        _checks.count("n", value)
    for value, got in ((1.0, "float"), (True, "bool"), (torch.tensor(1), "a torch.int64 tensor"), ("1", "str")):
        refused(TypeError, f"n must be an int, got {got}", _checks.count, "n", value)
    for value in (0, -3):
        refused(ValueError, f"n must be an integer >= 1, got {value}", _checks.count, "n", value)


def test_finite():
    for value in (torch.tensor(1.0), vector(-1.7e308, 0), torch.ones(0)):
        _checks.finite("x", value)
    refused(TypeError, "x must be a floating-point torch.Tensor, got float", _checks.finite, "x", 1.0)
    refused(
        TypeError,
        "x must be a floating-point torch.Tensor, got a torch.int64 tensor",
        _checks.finite,
        "x",
        torch.tensor(1),
    )
    value = vector(1, math.nan, math.inf, -math.inf)
    refused(ValueError, "x must be finite, got 3 of 4 entries NaN or infinite", _checks.finite, "x", value)
    refused(
        ValueError, "x must be finite, got 1 of 1 entries NaN or infinite", _checks.finite, "x", torch.tensor(math.nan)
    )


def test_drawn_logps():
    for value in (torch.tensor(0.0), vector(-3, 0, EPS), torch.ones(0)):
        _checks.drawn_logps("x", value)
    message = "x must be log-probabilities, <= 0, got "
    refused(ValueError, message + "0.25", _checks.drawn_logps, "x", vector(-1, 0.25, 0.5))
    refused(ValueError, message + f"{2 * EPS:.6g}", _checks.drawn_logps, "x", vector(2 * EPS))
    most = torch.finfo(F64).max
    refused(ValueError, message + "0.5", _checks.drawn_logps, "x", vector(-most, EPS, 0.5))
    refused(ValueError, message + "1.79769e+308", _checks.drawn_logps, "x", vector(most))
    refused(TypeError, "x must be a floating-point torch.Tensor, got float", _checks.drawn_logps, "x", -1.0)
    refused(
        ValueError, "x must be finite, got 1 of 1 entries NaN or infinite", _checks.drawn_logps, "x", vector(-math.inf)
    )


def test_same_shape():
    _checks.same_shape(a=torch.ones(2), b=torch.zeros(2))
    _checks.same_shape(a=torch.ones(2))
    refused(
        ValueError,
        "a and b and c must have one shape, got a (2,), b (2,), c (1, 2)",
        *(_checks.same_shape,),
        **{"a": torch.ones(2), "b": torch.ones(2), "c": torch.ones(1, 2)},
    )


def test_fits():
    for shape in ((2, 3), (3,), (1, 3), (2, 1), ()):
        _checks.fits("x", torch.ones(shape), torch.ones(2, 3))
    for shape in ((2,), (1, 2, 3), (4, 2, 3)):
        message = f"x must broadcast to shape (2, 3), got {shape}"
        refused(ValueError, message, _checks.fits, "x", torch.ones(shape), torch.ones(2, 3))
    refused(
        ValueError,
        "x must broadcast to shape (1, 3), got (2, 3)",
        _checks.fits,
        "x",
        torch.ones(2, 3),
        torch.ones(1, 3),
    )


def test_probabilities():
    for value in (vector(0, 1), torch.tensor(0.5), torch.ones(0)):
        _checks.probabilities("x", value)
    for bad in (-5e-324, 1 + 1e-15, math.inf, math.nan):
        refused(ValueError, f"x must lie in [0, 1], got {bad:g}", _checks.probabilities, "x", vector(0.5, bad))
    refused(ValueError, "x must lie in [0, 1], got 2", _checks.probabilities, "x", vector(0, 1, 2, 3))
    for value, got in ((0.5, "float"), (torch.tensor(1), "a torch.int64 tensor")):
        refused(TypeError, f"x must be a floating-point torch.Tensor, got {got}", _checks.probabilities, "x", value)


def test_some_tokens():
    shape = torch.Size((3, 2))
    keep = torch.tensor([[True, False], [True, True], [False, True]])
    _checks.some_tokens(keep, shape)
    for mask, got in ((keep.int(), "a torch.int32 tensor"), (None, "NoneType")):
        refused(TypeError, f"mask must be a boolean torch.Tensor, got {got}", _checks.some_tokens, mask, shape)
    message = "mask must have shape (3, 2), one entry per token, got (2, 3)"
    refused(ValueError, message, _checks.some_tokens, keep.T, shape)
    message = "mask must keep at least one token per sequence, got 2 sequences with none"
    refused(ValueError, message, _checks.some_tokens, keep & keep.new_tensor([[False], [True], [False]]), shape)
    rows = torch.tensor([[[True, True], [False, False]], [[True, False], [False, True]]])
    message = "mask must keep at least one token per sequence, got 1 sequences with none"
    refused(ValueError, message, _checks.some_tokens, rows, rows.shape)


def test_one_of():
    _checks.one_of("x", "b", ("a", "b"))
    for value in ("c", None, "", 1):
        refused(ValueError, f"x must be one of 'a', 'b', got {value!r}", _checks.one_of, "x", value, ("a", "b"))


def test_generator():
    _checks.generator("g", torch.Generator())
    refused(TypeError, "g must be a torch.Generator, got NoneType", _checks.generator, "g", None)
    refused(TypeError, "g must be a torch.Generator, got int", _checks.generator, "g", 3)


def test_law():
    assert _checks.law("p", S0) is S0
    rows = torch.stack([S0, law(1, 0, 0)]).expand(4, 2, 3)
    for dtype in (torch.float32, torch.float16):
        got = _checks.law("p", rows.to(dtype))
        assert got.dtype == F64 and got[3, 1].tolist() == [0, -math.inf, -math.inf]
        assert got[3, 0].tolist() == torch.log_softmax(S0.to(dtype).double(), -1).tolist()
    message = "p must be log-probabilities that sum to 1 over the last dimension, got logsumexp = -0.25"
    refused(ValueError, message, _checks.law, "p", S0 - 0.25)


def test_symbol():
    for value in (0, 3, np.int64(2)):
        _checks.symbol("end", value)
        _checks.symbol("end", value, 4)
    _checks.symbol("end", 10**9)
    _checks.symbol("end", 0, 1)
    for value in (-1, 4):
        refused(ValueError, f"end must lie in 0..3, got {value}", _checks.symbol, "end", value, 4)
    for value, got in ((1.0, "float"), (True, "bool"), (torch.tensor(1), "a torch.int64 tensor"), (None, "NoneType")):
        refused(TypeError, f"end must be an int, got {got}", _checks.symbol, "end", value)


def test_instance():
    _checks.instance("x", True, int)
    refused(TypeError, "x must be a dict, got list", _checks.instance, "x", [], dict)
    refused(TypeError, "x must be an OSError, got list", _checks.instance, "x", [], OSError)
    refused(TypeError, "x must be a X, got list", _checks.instance, "x", [], type("X", (), {}))
    message = "x must be a Generator, from torch, got a torch.float64 tensor"
    refused(TypeError, message, _checks.instance, "x", S0, torch.Generator, "torch")


def test_squarable_and_level():
    for check in (_checks.squarable, _checks.level):
        for value in (1e150, 3, np.float32(0.5), 5e-324):
            got = check("s", value)
            assert type(got) is float and got == value
        above = math.nextafter(1e150, math.inf)
        refused(ValueError, f"s must be at most 1e+150, got {above!r}", check, "s", above)
    assert _checks.squarable("s", 0) == 0
    refused(ValueError, "s must be finite and > 0, got 0", _checks.level, "s", 0)
    refused(TypeError, "s must be a number, got a torch.float64 tensor", _checks.level, "s", vector(1))


def test_levels():
    for numbers in ([1e150, 0.0], [3.0, 2.0, 1.0], [5e-324, 0.0]):
        assert _checks.levels("s", vector(*numbers)) == numbers
    assert _checks.levels("s", vector(2, 1).half()) == [2.0, 1.0]
    for value in (vector(1), torch.ones(3, 1), torch.tensor(1.0)):
        message = f"s must have shape (n + 1,) with n >= 1 steps, got {tuple(value.shape)}"
        refused(ValueError, message, _checks.levels, "s", value)
    refused(ValueError, "s must be >= 0, got -5e-324", _checks.levels, "s", vector(3, 4, -5e-324))
    message = "s must decrease strictly, got 2.0 after 2.0 at step 1"
    refused(ValueError, message, _checks.levels, "s", vector(3, 2, 2, 5, 0))
    refused(ValueError, "s must decrease strictly, got 4.0 after 3.0 at step 0", _checks.levels, "s", vector(3, 4, 1))
    refused(ValueError, "s must be at most 1e+150, got 2e+150", _checks.levels, "s", vector(2e150, 1))
    refused(
        ValueError, "s must be finite, got 1 of 2 entries NaN or infinite", _checks.levels, "s", vector(1, math.nan)
    )
    refused(TypeError, "s must be a floating-point torch.Tensor, got list", _checks.levels, "s", [1.0, 0.0])


def test_symmetric():
    def skew(gap: float, scale: float = 1.0) -> torch.Tensor:
        return scale * torch.tensor([[0.0, 0.0, gap], [0.0, 1.0, 0.5], [0.0, 0.5, -1.0]], dtype=F64)

    for matrix in (skew(0), skew(EPS), skew(EPS / 2, 1e30), torch.zeros(2, 2), vector(3)[None], skew(3e-4).float()):
        _checks.symmetric("A", matrix)
    _checks.symmetric("A", torch.stack([skew(EPS), skew(0)]))
    for gap, scale in ((1.01 * EPS, 1.0), (-1.01 * EPS, 1.0), (0.25, 1e-200), (3.0, 1.0)):
        matrix = skew(gap, scale)
        message = f"A must be symmetric, got entries that differ by {abs(gap * scale):g}"
        refused(ValueError, message, _checks.symmetric, "A", matrix)
    refused(
        ValueError, "A must be symmetric, got entries that differ by 0.000976562", _checks.symmetric, "A", skew(2**-10)
    )
    # Each matrix is measured by its own entries; the first that is not symmetric is named.
    message = "A must be symmetric, got entries that differ by 2.5e-21 in component 1"
    refused(ValueError, message, _checks.symmetric, "A", torch.stack([skew(0, 1e9), skew(0.25, 1e-20), skew(0.5)]))


def test_value_per_context():
    for steps in (1, 3):
        assert _checks.value_per_context("v", torch.full((steps + 1, 2), -math.inf), 2) == steps
    for shape in ((1, 2), (2,), (2, 2, 2), (2, 3)):
        message = f"v must have shape (L + 1, 2), got {shape}"
        refused(ValueError, message, _checks.value_per_context, "v", torch.ones(shape), 2)
    message = "v must be finite or -inf (excluded), got NaN or +inf"
    refused(ValueError, message, _checks.value_per_context, "v", torch.full((2, 2), math.inf), 2)


def test_finite_where():
    values = torch.zeros(3, 2, dtype=F64)
    values[0, 0] = values[1, 1] = values[2, 0] = -math.inf
    reached = torch.tensor([[False, True], [True, False], [False, True]])
    _checks.finite_where("v", values, reached, "where it can go")
    for step, context in ((2, 0), (1, 1)):  # the first one is named
        reached[step, context] = True
        message = f"v must be finite where it can go, got -inf at step {step} in context {context}"
        refused(ValueError, message, _checks.finite_where, "v", values, reached, "where it can go")


# --- blocks of checks ------------------------------------------------------------------------------------------------


def on_device(*numbers: float) -> torch.Tensor:
    return vector(*numbers).to(elsewhere.DEVICE)


def test_a_block_waits_once_and_names_what_comes_first():
    with elsewhere.Pretend() as device:
        with _checks.together():
            _checks.finite("x", on_device(1, 2))
            with _checks.together():  # joins the outer one
                _checks.rewards("r", on_device(0, -math.inf))
            assert not device.checks
        assert device.checks == 1
        with pytest.raises(ValueError, match="^y must be finite"), _checks.together():
            _checks.finite("x", on_device(1))
            _checks.finite("y", on_device(math.nan))
            _checks.finite("z", on_device(math.nan))
        with pytest.raises(ValueError, match="^x must be finite"):  # nothing is left of that block
            _checks.finite("x", on_device(math.inf))


def test_a_check_that_came_before_what_was_raised_says_why():
    with elsewhere.Pretend():
        x, y = on_device(math.nan), on_device(1, 2)
        with pytest.raises(ValueError, match="^x must be finite") as error, _checks.together():
            _checks.finite("x", x)
            _checks.same_shape(x=x, y=y)
        assert error.value.__suppress_context__
        with pytest.raises(ValueError, match="must have one shape"), _checks.together():
            _checks.finite("y", y)
            _checks.same_shape(x=x, y=y)
        with pytest.raises(KeyboardInterrupt), _checks.together():
            _checks.finite("x", x)
            raise KeyboardInterrupt


def test_a_number_of_the_cpu_is_judged_at_once():
    after = []
    with pytest.raises(ValueError, match="^x must be finite"), _checks.together():
        _checks.finite("x", vector(math.nan))
        after.append("went on")
    assert not after


def test_what_was_made_here_is_not_looked_at():
    with _checks.trusted():
        with _checks.trusted():
            _checks.finite("x", vector(math.nan))
        _checks.finite("x", vector(math.nan))
        with pytest.raises(TypeError, match="floating-point"):
            _checks.finite("x", 1)
    with pytest.raises(ValueError, match="^x must be finite"):
        _checks.finite("x", vector(math.nan))


def test_draws_are_at_most_0_and_what_comes_of_them_finite():
    a, b = vector(-1, 0), vector(-2, -math.inf)
    _checks.draws(a=a, b=a.float())
    _checks.draws(a=a, b=b)
    for bad in (0.5, math.inf, math.nan):
        with pytest.raises(ValueError, match="^b must be"):
            _checks.draws(a=a, b=vector(-1, bad))
    refused(TypeError, "b must be a floating-point torch.Tensor, got int", _checks.draws, a=a, b=-1)
    refused(ValueError, "b must be log-probabilities, <= 0, got 0.5", _checks.draws, a=a, b=vector(-1, 0.5))
    refused(ValueError, "a and b must have one shape, got a (2,), b (1,)", _checks.draws, a=a, b=vector(-1))
    _checks.finite_result("a - b", a - a, a=a, b=a)
    refused(
        *(ValueError, "b must be finite, got 1 of 2 entries NaN or infinite"),
        *(_checks.finite_result, "a - b", a - b),
        **{"a": a, "b": b},
    )
    refused(
        *(ValueError, "a - b must be finite, got 1 of 1 entries NaN or infinite"),
        *(_checks.finite_result, "a - b", vector(2e308)),
        **{"a": vector(1e308), "b": vector(-1e308)},
    )


def test_numbers_whose_sum_overflows_are_finite_all_the_same():
    for dtype in (torch.float16, torch.float32, torch.float64):
        x = torch.full((4,), torch.finfo(dtype).max, dtype=dtype)
        _checks.finite("x", x)
        for bad in (math.inf, -math.inf, math.nan):
            x[1] = bad
            refused(ValueError, "x must be finite, got 1 of 4 entries NaN or infinite", _checks.finite, "x", x)


def test_broadcasts_to():
    for shape, other in (((), (2,)), ((1,), (2, 3)), ((2, 3), (2, 3)), ((2, 1), (2, 3)), ((1, 3), (0, 3))):
        assert _checks.broadcasts_to(torch.Size(shape), torch.Size(other))
    for shape, other in (((2,), ()), ((1, 3), (3,)), ((2,), (3,)), ((3,), (1,))):
        assert not _checks.broadcasts_to(torch.Size(shape), torch.Size(other))


def test_returned():
    cpu = torch.device("cpu")
    for value in (vector(1, -math.inf), torch.ones(2).half()):
        got = _checks.returned("v", value, 2, cpu)
        assert got.dtype == F64 and got.tolist() == value.tolist()
    refused(TypeError, "v must return a floating-point torch.Tensor, got list", _checks.returned, "v", [1.0], 1)
    for shape in ((3,), (2, 1), ()):
        message = f"v must return shape (2,), one number each, got {shape}"
        refused(ValueError, message, _checks.returned, "v", torch.ones(shape), 2)
    for bad in (math.inf, math.nan):
        message = "v must return numbers that are finite or -inf, got NaN or +inf"
        refused(ValueError, message, _checks.returned, "v", vector(0, bad), 2)
    message = "v must return numbers on meta, got numbers on cpu"
    refused(ValueError, message, _checks.returned, "v", vector(0, 1), 2, torch.device("meta"))


def test_under_vmap_entries_are_not_looked_at():
    def checked(x):
        _checks.finite("x", x)
        _checks.rewards("x", x)
        _checks.indices("x", x.long(), 1)
        return x

    x = vector(math.nan, 2)[:, None]
    assert torch.equal(torch.vmap(checked)(x).isnan(), x.isnan())
    error = RuntimeError("no memory left")
    with pytest.raises(RuntimeError) as caught:
        _checks.of_several(error)
    assert caught.value is error
