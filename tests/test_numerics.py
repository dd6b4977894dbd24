"""What several modules share: numbers of 64 bits, a division that keeps its digits, CDFs, draws, wider dtypes."""

import mpmath
import numpy as np
import pytest
import torch
from helpers import F64, assert_same_under_default_dtype, law, vector
from scipy.stats import norm

from tiltlib import _numerics


@pytest.mark.parametrize(
    "beta", [2.0, 0.3, 1e-300, vector(2, 0.7), torch.stack([vector(2, 0.7), vector(1e-300, 1e300)])]
)
def test_rewards_over_beta_to_the_last_digits(beta):
    # Beside the largest numbers r - max r overflows, half of it does not; for the smallest beta the quotient is -inf.
    rewards = torch.stack([vector(-1.7e308, 1.7e308, 3), vector(0.1, 0.2, 0.3)]).repeat(2, 1, 1)
    top = rewards.amax(-1, keepdim=True)
    got = _numerics.over(rewards, top, beta)
    with mpmath.workprec(200):
        for i, j, k in np.ndindex(2, 2, 3):
            b = torch.as_tensor(beta, dtype=F64).expand(2, 2)[i, j].item()
            expected = (mpmath.mpf(rewards[i, j, k].item()) - mpmath.mpf(top[i, j].item())) / b
            assert got[i, j, k].item() == pytest.approx(float(expected), rel=1e-15)


def test_a_cdf_ends_at_1_and_stands_still_where_there_is_no_mass():
    got = _numerics.cdf(torch.stack([law(0, 0.25, 0, 0.75), law(0.1, 0.2, 0.3, 0.4)]).float())
    assert got.dtype == F64 and got[:, -1].tolist() == [1, 1]
    torch.testing.assert_close(got, vector([0, 0.25, 0.25, 1], [0.1, 0.3, 0.6, 1]), rtol=0, atol=1e-7)
    assert got[0, 0] == 0 and got[0, 1] == got[0, 2]
    # Ten probabilities .1 add up to 1 - 1e-16.
    assert _numerics.cdf(torch.full((10,), 0.1, dtype=F64).log())[-1] == 1


@pytest.mark.parametrize("k", [1, 2, 6, 8, 27])
@pytest.mark.parametrize("n", [100, 5000])
def test_a_search_in_rows_of_a_table_finds_what_one_in_copies_does(k, n):
    g = torch.Generator().manual_seed(k)
    logits = 3 * torch.randn(9, k, generator=g, dtype=F64)
    logits[::2, : k // 2] = -torch.inf  # sums of 0 at the start, sums that repeat
    logits[1::2, k - k // 2 :] = -torch.inf  # sums of 1 before the last
    cdf = _numerics.cdf(logits.log_softmax(-1))
    rows, u = torch.randint(9, (n,), generator=g), torch.rand(n, generator=g, dtype=F64)
    u[:50] = cdf[rows[:50], k // 2].clamp(max=1 - 2**-53)  # on a sum
    u[50], u[51] = 0, 1 - 2**-53
    expected = torch.searchsorted(cdf[rows], u[:, None], right=True)[:, 0]
    assert torch.equal(_numerics.search_rows(cdf, rows, u), expected)


@pytest.mark.parametrize("k", [32, 100, 2**16, 2**16 + 7])
def test_a_search_for_many_numbers_finds_what_a_bisection_does(k, monkeypatch):
    g = torch.Generator().manual_seed(0)
    uneven = 30 * torch.randn(k, generator=g, dtype=F64)  # thousands of sums lie in one part, and next to 1
    even = torch.randn(k, generator=g, dtype=F64).masked_fill_(torch.rand(k, generator=g) < 0.3, -torch.inf)
    cdf = _numerics.cdf(torch.stack([uneven, even, even.flip(0)]).log_softmax(-1))
    n = max(k, 2**12)
    u = torch.rand(3, n, generator=g, dtype=F64)
    u[:, : k // 4] = cdf[:, : k // 4].clamp(max=1 - 2.0**-53)  # a number that is a sum belongs to the next outcome
    u[:, -2:] = vector(0, 1 - 2.0**-53)
    expected, asked = torch.searchsorted(cdf, u, right=True), []
    search = torch.searchsorted
    monkeypatch.setattr(torch, "searchsorted", lambda c, x, **o: asked.append(x.numel()) or search(c, x, **o))
    assert torch.equal(_numerics.search(cdf, u), expected)
    assert 0 < sum(asked) < n  # only what the table did not settle


def test_a_number_on_a_sum_or_just_below_it_is_found_by_the_table_and_without_it():
    # Multiples of 7/243: a table whose number of parts is no power of two would round some products to a whole number.
    sums = vector(*[7 * i / 243 for i in range(1, 32)], 1)
    on = sums[:-1]
    for u, found in ((on, range(1, 32)), (torch.nextafter(on, vector(0)), range(31))):
        for times in (1, 200):
            assert _numerics.search(sums, u.repeat(times)).tolist() == [*found] * times


def test_products_stay_in_the_dtype_of_what_is_multiplied():
    x = torch.ones(2, 2)
    with torch.autocast("cpu", torch.bfloat16):
        assert (x @ x).dtype == torch.bfloat16
        with _numerics.as_written(x.device):
            assert (x @ x).dtype == torch.float32
        assert (x @ x).dtype == torch.bfloat16
    assert not torch.is_autocast_enabled("cpu")
    for device in (x.device, torch.device("meta")):  # for "meta" there is no autocast
        with _numerics.as_written(device):
            assert (x @ x).dtype == torch.float32


def test_a_condition_is_shown_where_there_is_something_to_see(monkeypatch):
    def f(x):
        return x * (2 if _numerics.shown(x.sum() > 0) else 3)

    assert f(vector(1)) == 2 and f(vector(-1)) == -3
    assert torch.vmap(f)(vector(1, -1)).tolist() == [3, -3]
    with pytest.raises(RuntimeError, match="ambiguous"):
        _numerics.shown(vector(1, 2) > 0)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert f(vector(1)) == 3


def test_normal_numbers_invert_their_cdf(monkeypatch):
    u = vector(0, 2.0**-54, 0.25, 0.5, 1 - 2.0**-53)
    monkeypatch.setattr(torch, "rand", lambda shape, **options: u.clone().view(shape))
    got = _numerics.normal(torch.zeros(5, 1), torch.Generator())
    assert got.dtype == F64 and got.shape == (5, 1)
    expected = norm.ppf(u.clamp(min=2.0**-54).numpy())[:, None]
    np.testing.assert_allclose(got.numpy(), expected, rtol=1e-14, atol=1e-16)


def test_normal_numbers_come_from_the_generator():
    draw = lambda seed: _numerics.normal(torch.zeros(3), torch.Generator().manual_seed(seed))  # noqa: E731
    assert torch.equal(draw(1), draw(1)) and not torch.equal(draw(1), draw(2))
    assert_same_under_default_dtype(lambda: [draw(1)], F64)


def test_normal_numbers_lie_where_the_tensor_does():
    assert _numerics.normal(torch.zeros(3, device="meta"), torch.Generator()).device.type == "meta"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, F64])
def test_points_are_widened_and_the_function_sees_what_came_in(dtype):
    seen = []

    def score(y, s):
        seen.append((y.dtype, s))
        return y

    for options, wide in (({}, torch.promote_types(dtype, torch.float32)), ({"least": F64}, F64)):
        y = torch.tensor([[0.1]], dtype=dtype)
        function, points = _numerics.widened(score, y, **options)
        assert points.dtype == wide and points.item() == y.item()
        function(points, 0.5)
        assert seen.pop() == (dtype, 0.5)
        assert (function is score) == (wide == dtype)


@pytest.mark.parametrize("value", [2, 0.3, np.float32(0.5), torch.tensor(0.3), torch.tensor([1, 2]).bfloat16()])
def test_a_number_or_one_per_row_gets_64_bits(value):
    got = _numerics.double(value)
    assert got.dtype == F64 if isinstance(value, torch.Tensor) else type(got) is float
    assert np.array_equal(np.asarray(got), np.asarray(value.double() if isinstance(value, torch.Tensor) else value))


def test_the_gradient_passes_through_64_bits():
    beta = torch.tensor([1.0, 2.0], requires_grad=True)
    (_numerics.double(beta) ** 2).sum().backward()
    assert beta.grad.tolist() == [2, 4] and beta.grad.dtype == torch.float32


def test_shares_whose_products_may_be_subnormal_are_put_to_0():
    for dtype, least in ((torch.float32, 1e-31), (F64, 1e-292)):
        shares = torch.tensor([1.0, least * 1.1, least / 11, least * 1e-10, 0.0], dtype=dtype, requires_grad=True)
        got = _numerics.flushed(shares)
        assert got.tolist() == [*shares.tolist()[:2], 0, 0, 0]
        assert (least / 11 * torch.finfo(dtype).eps) < torch.finfo(dtype).tiny  # which a product with such a share is
        (slope,) = torch.autograd.grad(got.sum(), shares)
        assert slope.tolist() == [1, 1, 0, 0, 0]
