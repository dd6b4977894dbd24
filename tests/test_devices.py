"""Every public call on another device: the same values, all results there, and nothing is mixed on the way."""

from collections.abc import Callable

import elsewhere
import pytest
import torch
from calls import CALLS, Inputs, leaves, same
from torch import Tensor

from tiltlib import categorical, weights

pytestmark = pytest.mark.slow  # every public call, once more

# Results that lie on the CPU, whatever the device of the points.
ON_THE_CPU = {
    "diffusion.karras": "levels are numbers that a loop on the host reads",
    "diffusion.geometric": "levels are numbers that a loop on the host reads",
    "diffusion.variance_preserving": "levels are numbers that a loop on the host reads",
    "language.encode": "a text lies nowhere else",
}


def results(key: str, m: Inputs) -> dict[str, object]:
    return leaves(CALLS[key](m).result())


def assert_all_there(key: str, got: dict[str, object], there: Callable[[Tensor], bool]) -> None:
    for place, value in got.items():
        if isinstance(value, Tensor):
            assert there(value) == (key.split()[0] not in ON_THE_CPU), place


@pytest.mark.parametrize("key", CALLS)
def test_a_call_elsewhere(key):
    expected = results(key, Inputs())
    with elsewhere.Pretend() as device:
        got = results(key, Inputs(put=lambda x: x.to(elsewhere.DEVICE), generator=device.generator))
    assert list(got) == list(expected)
    assert_all_there(key, got, lambda x: isinstance(x, elsewhere.Tensor))
    for place, value in got.items():
        assert same(value.inner if isinstance(value, elsewhere.Tensor) else value, expected[place]), place


# Draws of a real accelerator are other draws: only what is computed is compared.
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("key", CALLS if torch.cuda.is_available() else ["none"])
def test_a_call_on_a_gpu(key):
    m = Inputs(put=torch.Tensor.cuda, generator=lambda seed: torch.Generator("cuda").manual_seed(seed))
    expected, got = results(key, Inputs()), results(key, m)
    assert list(got) == list(expected)
    assert_all_there(key, got, lambda x: x.is_cuda)
    for place, value in got.items():
        if isinstance(value, Tensor) and not m.draws:
            # Sums of a few float64 numbers in another order, through at most one solve or decomposition.
            digits = 1e-10 if value.dtype == torch.float64 else 1e-5
            torch.testing.assert_close(value.cpu(), expected[place], rtol=digits, atol=digits, equal_nan=True)


# --- the pretended device sees what it looks for ---------------------------------------------------------------------

HERE = torch.tensor([1.0, 2.0, 3.0])

MISTAKES = {
    "mixed": lambda x, g: x + HERE,
    "index on the CPU": lambda x, g: x[torch.tensor([0, 1])],
    "mask on the CPU": lambda x, g: x[HERE > 1],
    "stacked": lambda x, g: torch.stack([x, HERE]),
    "written": lambda x, g: x.index_put_((torch.tensor([0]),), x[:1]),
    "generator of the CPU": lambda x, g: torch.rand(3, generator=torch.Generator(), device=x.device),
    "generator of the device": lambda x, g: torch.rand(3, generator=g),
    "global generator": lambda x, g: torch.rand(3, device=x.device),
    "noise of the global generator": lambda x, g: torch.bernoulli(x / 3),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_refused(name):
    with elsewhere.Pretend() as device:
        x = HERE.to(elsewhere.DEVICE)
        with pytest.raises(elsewhere.DeviceMistake):
            MISTAKES[name](x, device.generator(0))


def test_numpy_needs_the_cpu():
    with elsewhere.Pretend():
        x = HERE.to(elsewhere.DEVICE)
        with pytest.raises(TypeError, match="use cpu\\(\\) first"):
            x.numpy()
        assert x.cpu().numpy().tolist() == x.tolist() == [1, 2, 3]


def test_the_device_computes_what_the_cpu_does():
    with elsewhere.Pretend() as device:
        x = HERE.to(elsewhere.DEVICE).requires_grad_()
        (x.exp() * torch.tensor(2.0)).sum().backward()  # a number from the CPU is no mistake
        y = torch.tensor([1.0], device=x.device)
        y += x.detach()[1]
        assert isinstance(x.grad, elsewhere.Tensor) and torch.equal(x.grad.cpu(), 2 * HERE.exp())
        assert isinstance(y, elsewhere.Tensor) and y.tolist() == [3]
        draw = torch.rand(3, generator=device.generator(0), device=x.device)
    assert torch.equal(draw.inner, torch.rand(3, generator=torch.Generator().manual_seed(0)))


def test_waits_are_counted_where_they_happen():
    with elsewhere.Pretend() as device:
        x = HERE.to(elsewhere.DEVICE)
        _ = x.sum() + x.max()  # nothing is read
        assert not device.waits
        bool((x > 0).all())
        x[x > 1]
        x.cpu()
        assert device.waits == {("_local_scalar_dense", ""): 1, ("index", ""): 1, ("_to_copy", ""): 1}
        weights.normalize(x)
        categorical.kl(x.log_softmax(-1), x.log_softmax(-1))
    by_function = [place for _, place in device.waits.elements()]
    # What is read by a check belongs to the function that asked for it.
    assert set(by_function) == {"", "weights.normalize", "categorical._pair"}
