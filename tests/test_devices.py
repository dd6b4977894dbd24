"""Every public call on another device: the same values, all results there, and nothing is mixed on the way."""

import math
from collections.abc import Callable

import elsewhere
import pytest
import torch
from calls import CALLS, Inputs, leaves, same
from test_every_call import NAN_PASSES
from torch import Tensor
from waits import called, on_page, table, waits

from tiltlib import _checks, categorical, losses, weights

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
    got, _ = called(key)
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


# --- how often the host waits ----------------------------------------------------------------------------------------

BY_STEP = "each step reads what it was given, since the next one indexes with it or would spread it"
BY_CHUNK = "each chunk is read before its winner is taken, and the sum of all at the end"
SEVERAL = "calls public functions one after the other, each of which reads what it is given"
BY_RANK = "each rank reads its own share, and then what all have together"
ON_THE_HOST = "judges on the host, in numpy: every argument is brought there"
# Functions that wait more than once for the checks of their arguments.
MORE_CHECKS = {
    "policies.TransformerPolicy.append": "tokens are read before they are indices, and what the network gives",
    "policies.TransformerPolicy.conditionals": "tokens are read before they are indices, and what the network gives",
    "policies.TransformerPolicy.token_logps": "tokens are read before they are indices, and what the network gives",
    "policies.TransformerPolicy.logps": "tokens are read before they are indices, and what the network gives",
    "policies.TransformerPolicy.sample": BY_STEP,
    "language.LanguageModel.tree": BY_STEP,
    "language.LanguageModel.sample": BY_STEP,
    "language.generate": BY_STEP,
    "autoregressive.AutoregressiveModel.sample": BY_STEP,
    "autoregressive.AutoregressiveModel.logps": BY_STEP,
    "selection.exponential_best_of_n_stream": BY_CHUNK,
    "selection.soft_best_of_n_stream": BY_CHUNK,
    "selection.soft_best_of_n_blocks": BY_STEP,
    "stepwise.soft_best_of_n_chain": "each step is a call of `soft_best_of_n_law`",
    "stepwise.gain": "the example also calls the functions of the gain",
    "autoregressive.Gain": "the example also calls the functions of the gain",
    "smc.by_value": "the example also calls the functions of the gain",
    "smc.twisted_smc": BY_STEP,
    "particles.grow": BY_STEP,
    "mcmc.power_mh": BY_STEP,
    "pool.needed_n": "a search, each step of which is a curve",
    "pool.needed_beta": "a search, each step of which is a curve",
    "pool.divergence": SEVERAL,
    "pool.doubts": SEVERAL,
    "testing.check_model": SEVERAL,
    "mixtures.GaussianMixture.fit": "the mixture that is made reads its covariances",
    "diffusion.of_network": "the example also calls the score",
    "diffusion.sample": BY_STEP,
    "guidance.plug_in_quadratic": "the example also calls the score",
    "guidance.particles": BY_STEP,
    "distributed.best_of_n": BY_RANK,
    "distributed.weight_stats": BY_RANK,
    "distributed.beta_for_ess": BY_RANK,
    "distributed.average_curves": BY_RANK,
    "distributed.systematic": BY_RANK,
    "distributed.twisted_smc": BY_STEP,
    "verify.log_e_value": ON_THE_HOST,
    "verify.match": ON_THE_HOST,
    "verify.match_counts": ON_THE_HOST,
    "verify.plan": ON_THE_HOST,
    "verify.within": ON_THE_HOST,
}
# Of these nothing but a check may wait: how they go on does not depend on a number.
NO_OTHER_WAIT = ("losses", "weights", "categorical", "policies", "resampling")
OTHER_WAITS = {
    "losses.count_wins": "counts",
    "losses.fit_bradley_terry": "iterates until it has converged",
    "weights.beta_for_ess": "iterates until it has converged",
}


@pytest.mark.parametrize("key", CALLS)
def test_the_checks_of_a_call_wait_once(key):
    assert waits(key).checks <= 1 or key.split()[0] in MORE_CHECKS


@pytest.mark.parametrize("key", [key for key in CALLS if key.startswith(NO_OTHER_WAIT)])
def test_nothing_else_waits_in_a_loss_or_a_law(key):
    assert not waits(key).others or key.split()[0] in OTHER_WAITS


def test_every_exception_is_needed():
    most = {name: [waits(key) for key in CALLS if key.split()[0] == name] for name in MORE_CHECKS | OTHER_WAITS}
    assert not {name for name in MORE_CHECKS if max(now.checks for now in most[name]) <= 1}
    assert not {name for name in OTHER_WAITS if not any(now.others for now in most[name])}


def test_the_page_has_the_waits_of_today():
    assert on_page() == table(), "python tests/waits.py writes them"


def test_a_second_read_and_a_read_in_a_loss_are_seen(monkeypatch):
    key, constant = "losses.policy_gradient", losses._constant
    assert called.__wrapped__(key)[1] == (1, 0)
    monkeypatch.setattr(losses, "_constant", lambda x, **r: constant(x, **r) if x.sum() > 0 else x)
    assert called.__wrapped__(key)[1] == (1, 1)
    monkeypatch.setattr(losses, "_constant", lambda x, **r: _checks._read([(*x.aminmax(), 0, 0, None)]) or x)
    with pytest.raises(TypeError):  # out of range, and no error to raise
        called.__wrapped__(key)[1]
    monkeypatch.undo()
    monkeypatch.setattr(_checks.together, "__enter__", lambda self: setattr(self, "outermost", False))
    assert called.__wrapped__(key)[1].checks > 1


# Where checks of an accelerator wait until the end of their block: there must be no index in between.
BLOCKS = (
    "losses",
    "weights",
    "categorical",
    "resampling",
    "selection",
    "policies.TabularPolicy",
    "policies.natural_step",
)
FIRST_EXAMPLES = {key.split()[0]: key for key in reversed(CALLS) if key.startswith(BLOCKS)}


@pytest.mark.parametrize("key", FIRST_EXAMPLES.values())
def test_what_the_cpu_refuses_is_refused_alike(key):
    m = Inputs()
    CALLS[key](m).result()
    for i in range(len(m.made)):

        def poison(x: Tensor, j: int, rows: bool, i: int = i) -> Tensor:
            bad = math.nan if x.is_floating_point() else 10**6
            return x.flatten().index_fill(0, torch.tensor(0), bad).view(x.shape) if i == j else x

        if (key, i, None) in NAN_PASSES:
            continue
        with pytest.raises(ValueError) as here:
            CALLS[key](Inputs(change=poison)).result()
        with elsewhere.Pretend() as device:
            put = Inputs(change=poison, put=lambda x: x.to(elsewhere.DEVICE), generator=device.generator)
            with pytest.raises(ValueError) as there:
                CALLS[key](put).result()
            assert str(there.value).replace("elsewhere: ", "") == str(here.value), i
        assert not device.broken, i


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
