"""Argument checks with uniform messages: each names the argument, the legal range and what was received."""

import math
from typing import TypeGuard

import torch
from torch import Tensor


def tensor(name: str, value: object) -> TypeGuard[Tensor]:
    """Require a floating tensor with at least one dimension and one outcome."""
    if not isinstance(value, Tensor) or not value.is_floating_point():
        got = f"a {value.dtype} tensor" if isinstance(value, Tensor) else type(value).__name__
        raise TypeError(f"{name} must be a floating-point torch.Tensor, got {got}")
    if value.ndim == 0 or value.shape[-1] == 0:
        raise ValueError(f"{name} must have a last dimension of size >= 1, got shape {tuple(value.shape)}")
    return True


def logps(name: str, value: Tensor) -> Tensor:
    """Require normalised log-probabilities along the last dimension and return them."""
    tensor(name, value)
    total = torch.logsumexp(value, -1)
    # Half of the digits of the dtype: rounding over any realistic support stays far below, a lost factor far above.
    tolerance = math.sqrt(torch.finfo(value.dtype).eps)
    if not bool((total.abs() <= tolerance).all()):
        worst = total.flatten()[total.abs().nan_to_num(nan=math.inf).argmax()].item()
        raise ValueError(
            f"{name} must be log-probabilities that sum to 1 over the last dimension, got logsumexp = {worst:.6g}"
        )
    return value


def rewards(name: str, value: Tensor, *, excluded: bool = True) -> Tensor:
    """Require rewards that are finite, or -inf where `excluded` allows it, and return them."""
    tensor(name, value)
    if bool(value.isnan().any()) or bool((value == math.inf).any()):
        raise ValueError(f"{name} must be finite or -inf (excluded), got NaN or +inf")
    if not excluded and bool((value == -math.inf).any()):
        raise ValueError(f"{name} must be finite, got -inf")
    return value


def same_outcomes(name: str, value: Tensor, other_name: str, other: Tensor) -> None:
    """Require the same number of outcomes and leading dimensions that broadcast."""
    if value.shape[-1] != other.shape[-1] or not _broadcast(value.shape, other.shape):
        raise ValueError(
            f"{name} and {other_name} must agree in the last dimension and broadcast in the others, "
            f"got shapes {tuple(value.shape)} and {tuple(other.shape)}"
        )


def positive(name: str, value: object) -> None:
    """Require a finite number > 0."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise ValueError(f"{name} must be finite and > 0, got {value!r}")


def positive_per_row(name: str, value: float | Tensor, batch: torch.Size) -> None:
    """Require a finite number > 0, or a tensor of such numbers that broadcasts against the batch dimensions."""
    if not isinstance(value, Tensor):
        positive(name, value)
        return
    if not bool((torch.isfinite(value) & (value > 0)).all()):
        raise ValueError(f"{name} must be finite and > 0, got {value!r}")
    if not _broadcast(value.shape, batch):
        raise ValueError(
            f"{name} must broadcast against the batch dimensions {tuple(batch)}, got shape {tuple(value.shape)}"
        )


def _broadcast(*shapes: torch.Size) -> bool:
    try:
        torch.broadcast_shapes(*shapes)
    except RuntimeError:
        return False
    return True


def count(name: str, value: int, *, least: int = 1) -> int:
    """Require an integer >= `least`."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {type(value).__name__}")
    if value < least:
        raise ValueError(f"{name} must be an integer >= {least}, got {value}")
    return value


def some_left(name: str, log_total: Tensor) -> None:
    """Require that no row has lost its whole support."""
    if bool((log_total == -math.inf).any()):
        raise ValueError(f"{name} must leave at least one outcome of positive mass per row, got a row that is all -inf")
