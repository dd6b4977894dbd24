"""Argument checks with uniform messages: each names the argument, the legal range and what was received.

Types, shapes and Python's numbers are judged at once. What depends on the entries of a tensor passes through `require`,
which looks at its least and its largest entry. Numbers of the CPU are judged at once. For those of an accelerator the
host has to wait, so a function with several checks puts them into one block, `with together():`, which waits once, at
its end, and raises what fails first. Between a check and the end of its block the arguments may be illegal: arithmetic
and a score may go on, since they take any numbers; a loop that needs legal ones, an index and any other function of the
caller may not.

Under torch.compile and vmap there are no entries to read, and `require` passes.
"""

import itertools
import math
import sys
import threading
from collections.abc import Callable
from functools import partial
from numbers import Integral, Real
from types import TracebackType

import torch
from torch import Tensor

INTEGERS = (
    *(torch.int64, torch.int32, torch.int16, torch.int8),
    *(torch.uint64, torch.uint32, torch.uint16, torch.uint8),
)


LARGEST = sys.float_info.max
HALF_THE_DIGITS = {
    dtype: math.sqrt(torch.finfo(dtype).eps) for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16)
}
Error = Callable[[float, float], Exception]
Check = tuple[Tensor, Tensor, float, float, Error]


class _Waiting(threading.local):
    checks: list[Check] | None = None  # None outside of a block
    trusting: bool = False


_waiting = _Waiting()


def require(value: Tensor, least: float, most: float, error: Error) -> None:
    """Require entries from `least` to `most`; else raise what `error` makes of their least and largest.

    Both are NaN if any entry is, and so not within the range.
    """
    if torch.compiler.is_compiling() or _waiting.trusting or not value.numel():
        return
    if value.requires_grad:
        value = value.detach()
    if value.is_cpu and _passes(value, least, most):
        return
    low, high = value.aminmax()
    if _waiting.checks is None or value.is_cpu:
        _read([(low, high, least, most, error)])
    else:
        _waiting.checks.append((low, high, least, most, error))


def _passes(value: Tensor, least: float, most: float) -> bool:
    """Whether one cheap number shows that all is well; if not, both ends have to be looked at.

    A sum is finite only if all entries are, and one that is not may have overflowed. Both take less time than the ends.
    """
    try:
        if least == -math.inf:
            return value.max().item() <= most
        return least == -LARGEST and most == LARGEST and math.isfinite(value.sum().item())
    except RuntimeError as error:
        return of_several(error)


def holds(condition: Tensor, error: Callable[[], Exception]) -> None:
    """Require that a condition holds everywhere."""
    require(condition, 1, 1, lambda low, high: error())


class together:
    """Read what the checks in this block ask for at its end, all at once; a block within a block leaves it to that."""

    def __enter__(self) -> None:
        self.outermost = not torch.compiler.is_compiling() and _waiting.checks is None
        if self.outermost:
            _waiting.checks = []

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if not self.outermost:
            return
        checks, _waiting.checks = _waiting.checks, None
        # If something was raised, a check that came before may say why.
        if checks and (kind is None or issubclass(kind, Exception)):
            _read(checks)


class trusted:
    """Look at no entries in this block: its numbers were made here, from ones that were looked at."""

    def __enter__(self) -> None:
        self.before = torch.compiler.is_compiling() or _waiting.trusting
        if not self.before:
            _waiting.trusting = True

    def __exit__(self, *error: object) -> None:
        if not self.before:
            _waiting.trusting = False


def _read(checks: list[Check]) -> None:
    """Wait for the numbers that checks ask for, once, and judge them in turn."""
    ends = [x for low, high, *_ in checks for x in (low, high)]
    if not ends[0].is_cpu:
        ends = list(torch.stack([x.double() for x in ends]).cpu())
    try:
        numbers = [x.item() for x in ends]
    except RuntimeError as error:
        if of_several(error):
            return
    for (_, _, least, most, make), low, high in zip(checks, numbers[::2], numbers[1::2], strict=True):
        if not (least <= low and high <= most):
            raise make(low, high) from None


def of_several(error: RuntimeError) -> bool:
    """Whether a number could not be read because it stands for several, under vmap; anything else is raised again."""
    if "vmap" in str(error):  # the public way to tell
        return True
    raise error


def described(value: object) -> str:
    return f"a {value.dtype} tensor" if isinstance(value, Tensor) else type(value).__name__


def floating(name: str, value: object, verb: str = "be") -> Tensor:
    """Require a tensor of floating-point numbers."""
    if not isinstance(value, Tensor) or not value.is_floating_point():
        raise TypeError(f"{name} must {verb} a floating-point torch.Tensor, got {described(value)}")
    return value


def tensor(name: str, value: object) -> None:
    """Require a floating tensor with at least one dimension and one outcome."""
    value = floating(name, value)
    if value.ndim == 0 or value.shape[-1] == 0:
        raise ValueError(f"{name} must have a last dimension of size >= 1, got shape {tuple(value.shape)}")


def integers(name: str, value: object) -> Tensor:
    """Require a non-empty tensor of an integer dtype; return it as int64, since a uint8 index is taken for a mask."""
    if not isinstance(value, Tensor) or value.dtype not in INTEGERS:
        raise TypeError(f"{name} must be an integer torch.Tensor, got {described(value)}")
    if value.numel() == 0:
        raise ValueError(f"{name} must hold at least one number, got shape {tuple(value.shape)}")
    return value.long()


def sequences(name: str, value: object) -> Tensor:
    """Require integers whose last dimension, the positions, is not empty; return them as int64."""
    if isinstance(value, Tensor) and value.dtype in INTEGERS:
        if value.ndim == 0:
            raise ValueError(f"{name} must have a last dimension, the positions of a string, got a single number")
        if value.shape[-1] > 0:  # no strings is a batch like any other
            return value.long()
    return integers(name, value)


def indices(name: str, value: object, k: int) -> Tensor:
    """Require a non-empty integer tensor with entries in 0..k-1; return it as int64."""
    index = integers(name, value)
    require(
        index,
        0,
        k - 1,
        lambda low, high: ValueError(f"{name} must lie in 0..{k - 1}, got values from {int(low)} to {int(high)}"),
    )
    return index


def logps(name: str, value: Tensor) -> None:
    """Require normalised log-probabilities along the last dimension."""
    tensor(name, value)
    # In float64: half precision loses more over a long row than the tolerance allows.
    total = torch.logsumexp(value.detach().double(), -1)
    # Half of the digits of the dtype: rounding over any realistic support stays far below, a lost factor far above.
    tolerance = HALF_THE_DIGITS[value.dtype]
    require(
        total,
        -tolerance,
        tolerance,
        lambda low, high: ValueError(
            f"{name} must be log-probabilities that sum to 1 over the last dimension, "
            f"got logsumexp = {low if -low > high else high:.6g}"
        ),
    )


def law(name: str, value: Tensor) -> Tensor:
    """Require a law at the tolerance of its dtype; return it in float64, normalised anew if it was not float64."""
    logps(name, value)
    return value if value.dtype == torch.float64 else torch.log_softmax(value.double(), -1)


def rewards(name: str, value: Tensor) -> None:
    """Require rewards that are finite or -inf, which excludes."""
    tensor(name, value)
    not_above(name, value)


def not_above(name: str, value: Tensor) -> None:
    """Require numbers of any shape that are finite or -inf."""
    require(
        value,
        -math.inf,
        LARGEST,
        lambda low, high: ValueError(f"{name} must be finite or -inf (excluded), got NaN or +inf"),
    )


def log_weights(name: str, value: Tensor) -> None:
    """Require log weights of which at least one in each row is finite."""
    tensor(name, value)
    largest = value.detach().amax(-1)  # NaN where the row has one
    with together():
        not_above(name, largest)
        some_left(name, largest)


def same_outcomes(name: str, value: Tensor, other_name: str, other: Tensor) -> None:
    """Require the same number of outcomes and leading dimensions that broadcast."""
    if value.shape[-1] != other.shape[-1] or not _broadcast(value.shape, other.shape):
        raise ValueError(
            f"{name} and {other_name} must agree in the last dimension and broadcast in the others, "
            f"got shapes {tuple(value.shape)} and {tuple(other.shape)}"
        )


def number(name: str, value: object) -> None:
    """Require a real number; a tensor is none, not even one without dimensions."""
    # Real covers numpy's scalars; True is a number to Python and a mistake here.
    if isinstance(value, bool) or not isinstance(value, (float, Real)):
        raise TypeError(f"{name} must be a number, got {described(value)}")


def finite_number(name: str, value: object) -> float:
    """Require a number that is neither NaN nor infinite."""
    number(name, value)
    assert isinstance(value, (float, Real))
    if not math.isfinite(value):
        raise ValueError(f"{name} must be finite, got {value!r}")
    return float(value)


def positive(name: str, value: object) -> None:
    """Require a finite number > 0."""
    if isinstance(value, Tensor):
        number(name, value)
    if isinstance(value, bool) or not isinstance(value, (float, Real)) or not 0 < float(value) < math.inf:
        raise ValueError(f"{name} must be finite and > 0, got {_short(value)}")


def nonnegative(name: str, value: object) -> None:
    """Require a finite number >= 0."""
    if isinstance(value, Tensor):
        number(name, value)
    if isinstance(value, bool) or not isinstance(value, (float, Real)) or not 0 <= float(value) < math.inf:
        raise ValueError(f"{name} must be finite and >= 0, got {_short(value)}")


def fraction(name: str, value: object, *, zero: bool) -> None:
    """Require a number in [0, 1], or in (0, 1]."""
    number(name, value)
    assert isinstance(value, Real)
    if not (0 < float(value) <= 1 or (zero and float(value) == 0)):
        raise ValueError(f"{name} must lie in {'[' if zero else '('}0, 1], got {value!r}")


def chance(name: str, value: object) -> None:
    """Require a number strictly between 0 and 1."""
    number(name, value)
    assert isinstance(value, Real)
    if not 0 < float(value) < 1:
        raise ValueError(f"{name} must lie strictly between 0 and 1, got {value!r}")


def positive_per_row(name: str, value: float | Tensor, batch: torch.Size) -> None:
    """Require a finite number > 0, or a tensor of such numbers that broadcasts against the batch dimensions."""
    if not isinstance(value, Tensor):
        positive(name, value)
        return
    if value.dtype == torch.bool or value.is_complex():
        raise TypeError(f"{name} must be a number or a tensor of real numbers, got {described(value)}")
    require(
        value,
        math.ulp(0.0),
        LARGEST,
        lambda low, high: ValueError(f"{name} must be finite and > 0, got {_short(value)}"),
    )
    if not _broadcast(value.shape, batch):
        raise ValueError(
            f"{name} must broadcast against the batch dimensions {tuple(batch)}, got shape {tuple(value.shape)}"
        )


def _short(value: object) -> str:
    if isinstance(value, Tensor) and value.numel() > 1:
        return f"a tensor with {int((~(value > 0) | value.isinf()).sum())} illegal entries of {value.numel()}"
    return repr(value)


def _broadcast(a: torch.Size, b: torch.Size) -> bool:
    """Whether two shapes broadcast; torch.broadcast_shapes takes as long as ten sums of a few hundred numbers."""
    return all(i == j or i == 1 or j == 1 for i, j in zip(reversed(a), reversed(b), strict=False))


def count(name: str, value: object) -> None:
    """Require an integer >= 1."""
    # Integral covers numpy's integers; True is a number to Python and a mistake here.
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name} must be an int, got {described(value)}")
    if int(value) < 1:
        raise ValueError(f"{name} must be an integer >= 1, got {value}")


def symbol(name: str, value: object, v: int | None = None) -> None:
    """Require the number of a symbol, of an alphabet of v symbols if that is known."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name} must be an int, got {described(value)}")
    if v is not None and not 0 <= int(value) < v:
        raise ValueError(f"{name} must lie in 0..{v - 1}, got {value}")


def some_left(name: str, log_total: Tensor) -> None:
    """Require that no row has lost its whole support."""
    require(
        log_total,
        -LARGEST,
        math.inf,
        lambda low, high: ValueError(
            f"{name} must leave at least one outcome of positive mass per row, got a row that is all -inf"
        ),
    )


def finite(name: str, value: object) -> None:
    """Require a floating tensor of finite numbers; a single number is fine."""
    number = floating(name, value)
    require(number, -LARGEST, LARGEST, lambda low, high: not_finite(f"{name} must be finite", number))


def not_finite(what: str, value: Tensor) -> ValueError:
    return ValueError(f"{what}, got {int((~value.isfinite()).sum())} of {value.numel()} entries NaN or infinite")


def drawn_logps(name: str, value: object) -> None:
    """Require log-probabilities of outcomes that did occur: finite and <= 0, up to rounding."""
    number = floating(name, value)
    tolerance = HALF_THE_DIGITS[number.dtype]

    def error(low: float, high: float) -> ValueError:
        if not (-LARGEST <= low and high <= LARGEST):
            return not_finite(f"{name} must be finite", number)
        above = number[number > tolerance]
        return ValueError(f"{name} must be log-probabilities, <= 0, got {above[0].item():.6g}")

    require(number, -LARGEST, tolerance, error)


def draws(**logps: Tensor) -> None:
    """Require log-probabilities of outcomes that did occur, of one shape, but for -inf.

    What is computed from them is finite only if all of them are: the caller looks at that, by `finite_result`.
    """
    for name, value in logps.items():
        number = floating(name, value)
        require(number, -math.inf, HALF_THE_DIGITS[number.dtype], partial(_not_drawn, name, number))
    same_shape(**logps)


def _not_drawn(name: str, value: Tensor, low: float, high: float) -> Exception:
    drawn_logps(name, value)
    raise AssertionError(f"{name} is illegal")


def finite_result(what: str, result: Tensor, **arguments: Tensor) -> None:
    """Require finite numbers, which were computed from arguments; if one of those is not finite, it is named."""

    def error(low: float, high: float) -> ValueError:
        for name, value in arguments.items():
            finite(name, value)
        return not_finite(f"{what} must be finite", result)

    require(result, -LARGEST, LARGEST, error)


def same_shape(**values: Tensor) -> None:
    """Require tensors of one shape; the names of the arguments are the names in the message."""
    first, *others = values.values()
    shape = first.shape
    for value in others:
        if value.shape != shape:
            shapes = ", ".join(f"{name} {tuple(value.shape)}" for name, value in values.items())
            raise ValueError(f"{' and '.join(values)} must have one shape, got {shapes}")


def fits(name: str, value: Tensor, other: Tensor) -> None:
    """Require a tensor that broadcasts to the shape of another without enlarging it."""
    if not broadcasts_to(value.shape, other.shape):
        raise ValueError(f"{name} must broadcast to shape {tuple(other.shape)}, got {tuple(value.shape)}")


def broadcasts_to(shape: torch.Size, other: torch.Size) -> bool:
    """Whether a shape broadcasts to another without enlarging it."""
    pairs = zip(reversed(shape), reversed(other), strict=False)
    return len(shape) <= len(other) and all(i in (1, j) for i, j in pairs)


def probabilities(name: str, value: object) -> None:
    """Require a floating tensor with entries in [0, 1]."""
    number = floating(name, value)

    def error(low: float, high: float) -> ValueError:
        outside = number[~((number >= 0) & (number <= 1))]
        return ValueError(f"{name} must lie in [0, 1], got {outside[0].item():g}")

    require(number, 0, 1, error)


def some_tokens(mask: object, shape: torch.Size) -> None:
    """Require a boolean mask of the given shape that keeps at least one token per sequence."""
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        raise TypeError(f"mask must be a boolean torch.Tensor, got {described(mask)}")
    if mask.shape != shape:
        raise ValueError(f"mask must have shape {tuple(shape)}, one entry per token, got {tuple(mask.shape)}")
    kept = mask.any(-1)
    holds(
        kept,
        lambda: ValueError(
            f"mask must keep at least one token per sequence, got {int((~kept).sum())} sequences with none"
        ),
    )


def one_of(name: str, value: object, allowed: tuple[str, ...]) -> None:
    """Require one of a few words."""
    if not isinstance(value, str) or value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}")


def instance(name: str, value: object, kind: type, made_by: str = "") -> None:
    """Require an object of a class."""
    if not isinstance(value, kind):
        origin = f", from {made_by}" if made_by else ""
        article = "an" if kind.__name__[0] in "AEIOU" else "a"
        raise TypeError(f"{name} must be {article} {kind.__name__}{origin}, got {described(value)}")


def squarable(name: str, value: float) -> float:
    """Require a number whose square does not overflow."""
    if float(value) > 1e150:
        raise ValueError(f"{name} must be at most 1e+150, got {value!r}")
    return float(value)


def level(name: str, value: float) -> float:
    """Require a level of noise > 0."""
    positive(name, value)
    return squarable(name, value)


def levels(name: str, value: Tensor) -> list[float]:
    """Require levels of noise that decrease strictly, down to 0 at most; return them as numbers."""
    finite(name, value)
    if value.ndim != 1 or len(value) < 2:
        raise ValueError(f"{name} must have shape (n + 1,) with n >= 1 steps, got {tuple(value.shape)}")
    numbers: list[float] = value.tolist()
    if numbers[-1] < 0:
        raise ValueError(f"{name} must be >= 0, got {numbers[-1]!r}")
    for i, (s, s_next) in enumerate(itertools.pairwise(numbers)):
        if not s_next < s:
            raise ValueError(f"{name} must decrease strictly, got {s_next!r} after {s!r} at step {i}")
    squarable(name, numbers[0])
    return numbers


def symmetric(name: str, matrices: Tensor) -> None:
    """Require symmetric matrices, up to half of the digits of the dtype."""
    gap = (matrices - matrices.mT).abs().amax((-2, -1))
    bad = gap > HALF_THE_DIGITS[matrices.dtype] * matrices.abs().amax((-2, -1))

    def error() -> ValueError:
        k = int(bad.long().argmax())
        where = f" in component {k}" if matrices.ndim == 3 else ""
        return ValueError(f"{name} must be symmetric, got entries that differ by {gap.flatten()[k].item():g}{where}")

    holds(~bad, error)


def value_per_context(name: str, values: Tensor, contexts: int) -> int:
    """Require one log value per context before each step and after the last; return the number of steps."""
    rewards(name, values)
    if values.ndim != 2 or values.shape[0] < 2 or values.shape[1] != contexts:
        raise ValueError(f"{name} must have shape (L + 1, {contexts}), got {tuple(values.shape)}")
    return len(values) - 1


def finite_where(name: str, values: Tensor, reached: Tensor, where: str) -> None:
    """Require log values that are finite in every context that can be reached."""
    lost = reached & (values == -math.inf)

    def error() -> ValueError:
        step, context = lost.nonzero()[0].tolist()
        return ValueError(f"{name} must be finite {where}, got -inf at step {step} in context {context}")

    holds(~lost, error)


def generator(name: str, value: object) -> None:
    """Require a torch.Generator: None would fall back on the global generator without a word."""
    if not isinstance(value, torch.Generator):
        raise TypeError(f"{name} must be a torch.Generator, got {type(value).__name__}")


def returned(name: str, value: object, n: int, device: torch.device | None = None) -> Tensor:
    """Require what a function of the caller gave: one log weight or value for each string or particle, in float64."""
    value = floating(name, value, "return")
    if value.shape != (n,):
        raise ValueError(f"{name} must return shape ({n},), one number each, got {tuple(value.shape)}")
    if device is not None and value.device != device:
        raise ValueError(f"{name} must return numbers on {device}, got numbers on {value.device}")
    require(
        value,
        -math.inf,
        LARGEST,
        lambda low, high: ValueError(f"{name} must return numbers that are finite or -inf, got NaN or +inf"),
    )
    return value.double()
