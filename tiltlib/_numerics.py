"""Arithmetic that several modules share: numbers of 64 bits, division after shifting, CDFs, normal draws, bets."""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Generator, Tensor

from tiltlib import _checks


def as_written(device: torch.device) -> AbstractContextManager[object]:
    """Compute a block in the dtypes of its tensors, where torch.autocast would turn products to half precision."""
    kind = device.type
    on = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    return torch.autocast(kind, enabled=False) if on else nullcontext()


def shown(condition: Tensor) -> bool:
    """Say whether a condition is seen to hold. Nothing is seen under torch.compile and vmap."""
    if torch.compiler.is_compiling():
        return False
    try:
        return bool(condition)
    except RuntimeError as error:
        return not _checks.of_several(error)


def double(value: float | Tensor) -> float | Tensor:
    """Give a number, or one per row, 64 bits."""
    return value.double() if isinstance(value, Tensor) else float(value)


def over(rewards: Tensor, top: Tensor, beta: float | Tensor) -> Tensor:
    """Compute (rewards - top) / beta in float64, one `beta` per row if it is a tensor.

    Shifted before it is divided: r / beta may overflow for small beta, (r - max r) / beta only goes to weight 0.
    """
    # Halves are exact, and a difference of halves does not overflow.
    shifted = (rewards.double() / 2).sub_(top.double() / 2)
    if isinstance(beta, Tensor):
        return shifted / (beta.double() / 2).clamp(min=5e-324).unsqueeze(-1)
    return shifted / max(float(beta) / 2, 5e-324)


def cdf(logps: Tensor) -> Tensor:
    """Add up the probabilities of a law along the last dimension, in float64; the last sum is 1 exactly."""
    sums = logps.double().exp().cumsum(-1)
    return sums / sums[..., -1:]


def flushed(shares: Tensor) -> Tensor:
    """Put 0 for shares so small that a product with one may be subnormal: some processors take far longer for those.

    Beside the largest share they are nothing.
    """
    kind = torch.finfo(shares.dtype)
    return torch.nn.functional.threshold(shares, kind.tiny / kind.eps, 0.0)


def search(cdf: Tensor, u: Tensor) -> Tensor:
    """Find the first sum that lies above each number of [0, 1): `torch.searchsorted(cdf, u, right=True)`.

    Each step of a bisection waits for memory, or for a turn that the processor guessed wrong, so where there are many
    numbers a table of where the parts of [0, 1) begin replaces most of them.

    Args:
        cdf: Sums that end at 1, float64, shape (..., K).
        u: Numbers in [0, 1), float64, shape (..., n).
    """
    k, n = cdf.shape[-1], u.shape[-1]
    if not cdf.is_cpu or k < 2**5 or n < max(2**12, k // 8):
        return torch.searchsorted(cdf, u, right=True)
    found = torch.empty_like(u, dtype=torch.int64)
    parts = 2 ** (k - 1).bit_length()  # a power of two, which no product below rounds
    for row, numbers, places in zip(cdf.view(-1, k), u.view(-1, n), found.view(-1, n), strict=True):
        ends = (row * parts).ceil_().long()
        begins = ends.new_zeros(parts + 1).scatter_add_(0, ends, ends.new_ones(()).expand(k)).cumsum_(0)
        for x, index in zip(numbers.split(2**14), places.split(2**14), strict=True):  # which stay in a cache
            torch.index_select(begins, 0, (x * parts).long(), out=index)
            for _ in range(3):  # a part holds one sum on average
                index += row.index_select(0, index) <= x
            late = row.index_select(0, index) <= x
            if bool(late.any()):
                index[late] = torch.searchsorted(row, x[late], right=True)
    return found


def search_rows(cdf: Tensor, rows: Tensor, u: Tensor) -> Tensor:
    """Find the first sum that lies above each number, each in its own row of a table.

    The same as `torch.searchsorted(cdf[rows], u[:, None], right=True)[:, 0]`. Many numbers are found by bisections
    of the table itself, as a copy of a row for each number would cost more than the search.

    Args:
        cdf: Sums that end at 1, float64, shape (R, K).
        rows: Row of each number, int64, shape (n,).
        u: Numbers in [0, 1), float64, shape (n,).
    """
    k = cdf.shape[-1]
    if rows.numel() < 2**12:
        return torch.searchsorted(cdf[rows], u.unsqueeze(-1), right=True).squeeze(-1)
    flat, begin = cdf.flatten(), rows * k - 1
    found = torch.zeros_like(rows)  # so many sums are known to be at most u
    for j in reversed(range(k.bit_length())):
        seen = flat.index_select(0, (found + 2**j).clamp_(max=k).add_(begin))
        found.add_(seen <= u, alpha=2**j)  # never past the last sum, which is 1
    return found


def bets(x: Tensor, n: int, delta: float) -> Tensor:
    """Choose the bets on values in [0, 1], shape (..., k), of n in all: each from the variance of those before it.

    They are those of `verify.tv_upper_bound`, which judges this library and so computes by itself.

    Source: [waudbysmith2024].
    """
    count = torch.arange(2, x.shape[-1] + 2, device=x.device)
    mean = (0.5 + x.cumsum(-1)) / count
    variance = (0.25 + (x - mean).square().cumsum(-1)) / count
    variance = torch.cat([torch.full_like(x[..., :1], 0.25), variance[..., :-1]], -1)
    return (2 * math.log(1 / delta) / (n * variance)).sqrt()


def log_wealth(x: Tensor, bet: Tensor, mean: Tensor) -> Tensor:
    """Add up the log wealth of who bets that values, shape (..., k), lie below a mean on average, shape (...)."""
    u = mean[..., None]
    # A bet of at most .75 / (1 - u) keeps every factor >= 1/4; at u = 1 any bet does.
    return torch.log1p(-torch.minimum(bet, 0.75 / (1 - u).clamp(min=1e-12)) * (x - u)).sum(-1)


def normal(like: Tensor, generator: Generator) -> Tensor:
    """Draw standard normal numbers of the shape and on the device of a tensor, by inverting their CDF in float64."""
    u = torch.rand(like.shape, generator=generator, device=like.device, dtype=torch.float64)
    # A uniform number may be 0, whose quantile is -inf.
    return torch.special.ndtri(u.clamp_(min=2.0**-54))


def widened(
    function: Callable[[Tensor, Any], Tensor], y: Tensor, least: torch.dtype = torch.float32
) -> tuple[Callable[[Tensor, Any], Tensor], Tensor]:
    """Take points in a dtype of enough digits, and the function of them that sees the dtype that came in."""
    narrow, wide = y.dtype, torch.promote_types(y.dtype, least)
    return (function, y) if wide == narrow else (lambda z, s: function(z.to(narrow), s), y.to(wide))
