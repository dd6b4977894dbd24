"""Whether a model keeps the rules that samplers rely on: for your own models, in your own tests.

    def test_my_model():
        check_model(MyModel(...), length=5, generator=torch.Generator().manual_seed(0))

Samplers grow many strings at a time, drop some and copy others. A model that mixes up its rows, keeps a cache that was
not copied, or normalises over the wrong dimension still runs, and gives a wrong law. `check_model` finds out.
"""

import math
from typing import Any

import torch
from torch import Tensor

from tiltlib import _checks, verify
from tiltlib.autoregressive import AutoregressiveModel

__all__ = ["check_model"]


def check_model(
    model: AutoregressiveModel[Any], length: int, *, generator: torch.Generator, n: int = 6, draws: int = 20_000
) -> None:
    """Check that a model of strings keeps the rules of `AutoregressiveModel`.

    On n strings that the model draws itself, before each token:

        rows      next_logps has shape (n, V), rows sum to 1, and those of empty strings are equal
        reading   next_logps and draw leave a state as it was
        order     a row depends on its own string, and on neither the others nor its place among them
        take      copies, drops and reorders strings, and so does what is appended afterwards
        moved     a state that was continued gives the rows that it gave, or is refused
        logps     the sum of the rows along the string
        draws     follow the rows: an E-value (`verify.match`), false alarm below 1e-8 each for first and last tokens

    Numbers are compared to half of the digits of float32, or of a narrower dtype of theirs: the last digits of a
    network depend on the size of a batch.

    Args:
        model: The model.
        length: Number of tokens L of the strings, >= 1.
        generator: Source of randomness, on the device of the model.
        n: Number of strings, >= 2.
        draws: Number of tokens to draw for each of the two tests of draws, >= 1; a model with a large cache may need
            fewer.

    Raises:
        TypeError: `model` is no `AutoregressiveModel`, `length`, `n` or `draws` not an int, or `generator` none.
        ValueError: `length` < 1, `n` < 2, or `draws` < 1.
        AssertionError: The model breaks a rule; the message says which one, and after how many tokens.
    """
    _checks.instance("model", model, AutoregressiveModel)
    for name, value in (("length", length), ("n", n), ("draws", draws)):
        _checks.count(name, value)
    if n < 2:
        raise ValueError(f"n must be at least 2, to see whether strings are mixed up, got {n}")
    _checks.generator("generator", generator)
    strings, rows = _write_and_read(model, int(length), int(n), generator)
    for t in range(length):
        _check_order_and_take(model, strings, t, rows[t : t + 2], generator)
    terms = torch.stack([_of_tokens(row, token) for row, token in zip(rows, strings.T, strict=True)])
    _same(model.logps(strings), terms.sum(0), "logps must be the sum of the rows along the string", length)
    _check_draws(model, model.begin(draws), rows[0][0], 0, generator)
    if length > 1:
        copies = torch.zeros(draws, dtype=torch.int64, device=strings.device)
        state = model.take(_begun(model, strings[:, :-1]), copies)
        _check_draws(model, state, rows[-1][0], length - 1, generator)


def _write_and_read(
    model: AutoregressiveModel[Any], length: int, n: int, generator: torch.Generator
) -> tuple[Tensor, list[Tensor]]:
    """Draw n strings, looking at each state twice; return them and the rows before each token."""
    state = model.begin(n)
    tokens: list[Tensor] = []
    rows: list[Tensor] = []
    for t in range(length):
        row = model.next_logps(state)
        _require(isinstance(row, Tensor) and row.is_floating_point(), "next_logps must return a floating tensor", t)
        shape = (n, row.shape[-1] if t == 0 else rows[0].shape[-1])
        _require(tuple(row.shape) == shape, f"next_logps must return shape {(n, 'V')}, got {tuple(row.shape)}", t)
        try:
            _checks.logps("next_logps", row)
        except ValueError as error:
            raise AssertionError(f"{error}, after {t} tokens") from None
        if t == 0:
            _same(row, row[:1].expand_as(row), "next_logps must give equal rows to empty strings", t)
        kept = row.clone()
        token = model.draw(state, generator=generator)
        described = f"{token.dtype} of shape {tuple(token.shape)}"
        _require(
            token.dtype == torch.int64 and tuple(token.shape) == (n,),
            f"draw must return int64 of shape ({n},), got {described}",
            t,
        )
        v = shape[1]
        _require(bool(((token >= 0) & (token < v)).all()), f"draw must return tokens in 0..{v - 1}", t)
        _require(bool((_of_tokens(row, token) > -math.inf).all()), "draw must not return what is excluded", t)
        _same(model.next_logps(state), kept, "reading must leave a state as it was", t)
        rows.append(kept)
        tokens.append(token)
        if t < length - 1:
            old, state = state, model.append(state, token)
            _same_or_refused(model, old, kept, "a state that append has moved", t)
    return torch.stack(tokens, -1), rows


def _check_order_and_take(
    model: AutoregressiveModel[Any], strings: Tensor, t: int, rows: list[Tensor], generator: torch.Generator
) -> None:
    """Check the rows after t tokens, and one more, for strings in another order, each alone, and copied ones."""
    n = len(strings)
    order = torch.randperm(n, generator=generator, device=strings.device)
    for index in (order, *order.split(1)):
        row = model.next_logps(_begun(model, strings[index, :t]))
        _same(row, rows[0][index], "a row must not depend on other strings, nor on its place among them", t)
    # More strings than there are, so that some occur twice; the last one never.
    index = torch.randint(n - 1, (n + 1,), generator=generator, device=strings.device)
    state = _begun(model, strings[:, :t])
    taken = model.take(state, index)
    _same(model.next_logps(taken), rows[0][index], "take must continue the strings that it is asked for", t)
    _same_or_refused(model, state, rows[0], "a state that take has moved", t)
    if len(rows) > 1:
        longer = model.append(model.take(_begun(model, strings[:, :t]), index), strings[index, t])
        _same(model.next_logps(longer), rows[1][index], "append after take must know what each string holds", t)


def _check_draws(model: AutoregressiveModel[Any], state: Any, row: Tensor, t: int, generator: torch.Generator) -> None:
    law = torch.log_softmax(row.double(), -1)
    verdict = verify.match(model.draw(state, generator=generator), law, claim="draws")
    _require(verdict.decision != "REJECT", f"draws must follow next_logps, got evidence 1e{verdict.log10_e:.0f}", t)


def _of_tokens(row: Tensor, token: Tensor) -> Tensor:
    return row.gather(1, token[:, None])[:, 0].double()


def _begun(model: AutoregressiveModel[Any], tokens: Tensor) -> Any:
    state = model.begin(len(tokens))
    for token in tokens.T:
        state = model.append(state, token)
    return state


def _require(condition: bool, rule: str, t: int) -> None:
    if not condition:
        raise AssertionError(f"{rule}, after {t} tokens")


def _same(found: Tensor, expected: Tensor, rule: str, t: int) -> None:
    """Require the same numbers to half of the digits of float32 or less, and -inf at the same places."""
    _require(found.shape == expected.shape, f"{rule}, got shape {tuple(found.shape)} for {tuple(expected.shape)}", t)
    tolerance = max(math.sqrt(torch.finfo(dtype).eps) for dtype in (found.dtype, expected.dtype, torch.float32))
    found, expected = found.double(), expected.double()
    excluded = expected == -math.inf
    _require(bool(((found == -math.inf) == excluded).all()), f"{rule}, got -inf at other places", t)
    gap = torch.where(excluded, 0.0, (found - expected).abs() / expected.abs().clamp(min=1)).max().item()
    _require(gap <= tolerance, f"{rule}, got numbers that differ by {gap:.2g}", t)


def _same_or_refused(model: AutoregressiveModel[Any], state: Any, expected: Tensor, which: str, t: int) -> None:
    try:
        row = model.next_logps(state)
    except Exception:  # whatever it says: it does not go on with wrong numbers
        return
    _same(row, expected, f"{which} must give its old rows or be refused", t)
