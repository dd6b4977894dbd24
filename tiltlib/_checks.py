"""Argument checks with uniform messages: each names the argument, the legal range and what was received."""

import itertools
import math
from numbers import Integral, Real

import torch
from torch import Tensor

INTEGERS = (
    *(torch.int64, torch.int32, torch.int16, torch.int8),
    *(torch.uint64, torch.uint32, torch.uint16, torch.uint8),
)


def described(value: object) -> str:
    return f"a {value.dtype} tensor" if isinstance(value, Tensor) else type(value).__name__


def tensor(name: str, value: object) -> None:
    """Require a floating tensor with at least one dimension and one outcome."""
    if not isinstance(value, Tensor) or not value.is_floating_point():
        raise TypeError(f"{name} must be a floating-point torch.Tensor, got {described(value)}")
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
    low, high = int(index.min()), int(index.max())
    if low < 0 or high >= k:
        raise ValueError(f"{name} must lie in 0..{k - 1}, got values from {low} to {high}")
    return index


def logps(name: str, value: Tensor) -> None:
    """Require normalised log-probabilities along the last dimension."""
    tensor(name, value)
    # In float64: half precision loses more over a long row than the tolerance allows.
    total = torch.logsumexp(value.detach().double(), -1)
    # Half of the digits of the dtype: rounding over any realistic support stays far below, a lost factor far above.
    tolerance = math.sqrt(torch.finfo(value.dtype).eps)
    if not bool((total.abs() <= tolerance).all()):
        worst = total.flatten()[total.abs().nan_to_num(nan=math.inf).argmax()].item()
        raise ValueError(
            f"{name} must be log-probabilities that sum to 1 over the last dimension, got logsumexp = {worst:.6g}"
        )


def law(name: str, value: Tensor) -> Tensor:
    """Require a law at the tolerance of its dtype; return it in float64, normalised anew if it was not float64."""
    logps(name, value)
    return value if value.dtype == torch.float64 else torch.log_softmax(value.double(), -1)


def rewards(name: str, value: Tensor) -> None:
    """Require rewards that are finite or -inf, which excludes."""
    tensor(name, value)
    # One pass, and no mask of the size of the input: the largest entry is NaN if any entry is.
    if value.numel() and not bool(value.amax() < math.inf):
        raise ValueError(f"{name} must be finite or -inf (excluded), got NaN or +inf")


def log_weights(name: str, value: Tensor) -> None:
    """Require log weights of which at least one in each row is finite."""
    rewards(name, value)
    some_left(name, value.amax(-1))


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
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a number, got {described(value)}")


def positive(name: str, value: object) -> None:
    """Require a finite number > 0."""
    if isinstance(value, Tensor):
        number(name, value)
    if isinstance(value, bool) or not isinstance(value, Real) or not 0 < float(value) < math.inf:
        raise ValueError(f"{name} must be finite and > 0, got {_short(value)}")


def nonnegative(name: str, value: object) -> None:
    """Require a finite number >= 0."""
    if isinstance(value, Tensor):
        number(name, value)
    if isinstance(value, bool) or not isinstance(value, Real) or not 0 <= float(value) < math.inf:
        raise ValueError(f"{name} must be finite and >= 0, got {_short(value)}")


def fraction(name: str, value: object, *, zero: bool) -> None:
    """Require a number in [0, 1], or in (0, 1]."""
    number(name, value)
    assert isinstance(value, Real)
    if not (0 < float(value) <= 1 or (zero and float(value) == 0)):
        raise ValueError(f"{name} must lie in {'[' if zero else '('}0, 1], got {value!r}")


def positive_per_row(name: str, value: float | Tensor, batch: torch.Size) -> None:
    """Require a finite number > 0, or a tensor of such numbers that broadcasts against the batch dimensions."""
    if not isinstance(value, Tensor):
        positive(name, value)
        return
    if value.dtype == torch.bool or value.is_complex():
        raise TypeError(f"{name} must be a number or a tensor of real numbers, got {described(value)}")
    if not bool((torch.isfinite(value) & (value > 0)).all()):
        raise ValueError(f"{name} must be finite and > 0, got {_short(value)}")
    if not _broadcast(value.shape, batch):
        raise ValueError(
            f"{name} must broadcast against the batch dimensions {tuple(batch)}, got shape {tuple(value.shape)}"
        )


def _short(value: object) -> str:
    if isinstance(value, Tensor) and value.numel() > 1:
        return f"a tensor with {int((~(value > 0) | value.isinf()).sum())} illegal entries of {value.numel()}"
    return repr(value)


def _broadcast(*shapes: torch.Size) -> bool:
    try:
        torch.broadcast_shapes(*shapes)
    except RuntimeError:
        return False
    return True


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
    if bool((log_total == -math.inf).any()):
        raise ValueError(f"{name} must leave at least one outcome of positive mass per row, got a row that is all -inf")


def finite(name: str, value: object) -> None:
    """Require a floating tensor of finite numbers; a single number is fine."""
    if not isinstance(value, Tensor) or not value.is_floating_point():
        raise TypeError(f"{name} must be a floating-point torch.Tensor, got {described(value)}")
    bad = int((~value.isfinite()).sum())
    if bad:
        raise ValueError(f"{name} must be finite, got {bad} of {value.numel()} entries NaN or infinite")


def drawn_logps(name: str, value: object) -> None:
    """Require log-probabilities of outcomes that did occur: finite and <= 0, up to rounding."""
    finite(name, value)
    assert isinstance(value, Tensor)
    above = value[value > math.sqrt(torch.finfo(value.dtype).eps)]
    if len(above):
        raise ValueError(f"{name} must be log-probabilities, <= 0, got {above[0].item():.6g}")


def same_shape(**values: Tensor) -> None:
    """Require tensors of one shape; the names of the arguments are the names in the message."""
    if len({tuple(value.shape) for value in values.values()}) > 1:
        shapes = ", ".join(f"{name} {tuple(value.shape)}" for name, value in values.items())
        raise ValueError(f"{' and '.join(values)} must have one shape, got {shapes}")


def fits(name: str, value: Tensor, other: Tensor) -> None:
    """Require a tensor that broadcasts to the shape of another without enlarging it."""
    if not _broadcast(value.shape, other.shape) or torch.broadcast_shapes(value.shape, other.shape) != other.shape:
        raise ValueError(f"{name} must broadcast to shape {tuple(other.shape)}, got {tuple(value.shape)}")


def probabilities(name: str, value: object) -> None:
    """Require a floating tensor with entries in [0, 1]."""
    if not isinstance(value, Tensor) or not value.is_floating_point():
        raise TypeError(f"{name} must be a floating-point torch.Tensor, got {described(value)}")
    outside = value[~((value >= 0) & (value <= 1))]
    if len(outside):
        raise ValueError(f"{name} must lie in [0, 1], got {outside[0].item():g}")


def some_tokens(mask: object, shape: torch.Size) -> None:
    """Require a boolean mask of the given shape that keeps at least one token per sequence."""
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        raise TypeError(f"mask must be a boolean torch.Tensor, got {described(mask)}")
    if mask.shape != shape:
        raise ValueError(f"mask must have shape {tuple(shape)}, one entry per token, got {tuple(mask.shape)}")
    empty = int((~mask.any(-1)).sum())
    if empty:
        raise ValueError(f"mask must keep at least one token per sequence, got {empty} sequences with none")


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
    bad = gap > math.sqrt(torch.finfo(matrices.dtype).eps) * matrices.abs().amax((-2, -1))
    if bool(bad.any()):
        k = int(bad.long().argmax())
        where = f" in component {k}" if matrices.ndim == 3 else ""
        raise ValueError(f"{name} must be symmetric, got entries that differ by {gap.flatten()[k].item():g}{where}")


def value_per_context(name: str, values: Tensor, contexts: int) -> int:
    """Require one log value per context before each step and after the last; return the number of steps."""
    rewards(name, values)
    if values.ndim != 2 or values.shape[0] < 2 or values.shape[1] != contexts:
        raise ValueError(f"{name} must have shape (L + 1, {contexts}), got {tuple(values.shape)}")
    return len(values) - 1


def finite_where(name: str, values: Tensor, reached: Tensor, where: str) -> None:
    """Require log values that are finite in every context that can be reached."""
    lost = reached & (values == -math.inf)
    if bool(lost.any()):
        step, context = lost.nonzero()[0].tolist()
        raise ValueError(f"{name} must be finite {where}, got -inf at step {step} in context {context}")


def generator(name: str, value: object) -> None:
    """Require a torch.Generator: None would fall back on the global generator without a word."""
    if not isinstance(value, torch.Generator):
        raise TypeError(f"{name} must be a torch.Generator, got {type(value).__name__}")


def returned(name: str, value: object, n: int, device: torch.device | None = None) -> Tensor:
    """Require what a function of the caller gave: one log weight or value for each string or particle, in float64."""
    if not isinstance(value, Tensor) or not value.is_floating_point():
        raise TypeError(f"{name} must return a floating-point torch.Tensor, got {described(value)}")
    if value.shape != (n,):
        raise ValueError(f"{name} must return shape ({n},), one number each, got {tuple(value.shape)}")
    if device is not None and value.device != device:
        raise ValueError(f"{name} must return numbers on {device}, got numbers on {value.device}")
    if n and not bool(value.amax() < math.inf):  # NaN if any is
        raise ValueError(f"{name} must return numbers that are finite or -inf, got NaN or +inf")
    return value.double()
