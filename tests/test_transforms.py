"""Public calls under torch.compile, torch.func.vmap and torch.autocast: the same values, or a reason why not."""

import functools
import inspect

import pytest
import torch
from calls import CALLS, Inputs, leaves, same
from torch import Tensor

from tiltlib import _checks, losses

pytestmark = pytest.mark.slow  # every public call, three times more


def matches(key: str, listed: dict[str, str]) -> bool:
    return any(key == name or key.startswith((f"{name} ", f"{name}.")) for name in listed)


@functools.cache
def draws(key: str) -> bool:
    m = Inputs()
    CALLS[key](m)
    return m.draws


# What these modules do is not arithmetic on tensors: they judge, test, read text, search a pool, or send.
NOT_ARITHMETIC = {"verify": "numpy", "testing": "raises or not", "language": "a network and text", "pool": "searches"}
NOT_ARITHMETIC |= {"distributed": "ranks talk to each other"}
# A sampler reads its generator, which is a state outside of the graph.
ARITHMETIC = [key for key in CALLS if not matches(key, NOT_ARITHMETIC) and not draws(key)]


# --- torch.compile ---------------------------------------------------------------------------------------------------

READS_RANGE = "decides from the range of its numbers whether float32 will do, once, when it is made"
READS_LEVELS = "its levels are numbers, which a loop on the host reads"
NOT_COMPILED = {
    "weights.beta_for_ess": "iterates until it has converged",
    "markov.MarkovChain.fit": "counts words",
    "markov.MarkovChain.decode": "makes text",
    "markov.MarkovChain.reward_law": "its size depends on the rewards",
    "selection.soft_best_of_n_law": "its number of nodes depends on the weights",
    "stepwise.soft_best_of_n_chain": "uses `soft_best_of_n_law`",
    "stepwise.gain": "looks whether a value is 0",
    "mcmc.lengths": "refuses tokens after the end",
    "policies.TabularPolicy": "is a module with parameters of its own",
    "losses.fit_bradley_terry": "iterates until it has converged",
    "mixtures.GaussianMixture.fit": "its size depends on the labels",
    "mixtures.GaussianMixture.tilt": READS_RANGE,
    "mixtures.GaussianMixture.project": READS_RANGE,
    "mixtures.GaussianMixture.class_logps": "its size depends on the classes",
    "mixtures.GaussianMixture.of_class": "its size depends on the classes",
    "mixtures.GaussianMixture.quantile": "halves until it has converged",
    **{f"mixtures.GaussianMixture {kind}": READS_RANGE for kind in "one isotropic shared-diagonal diagonal".split()},
    **{f"mixtures.GaussianMixture {kind}": READS_RANGE for kind in ("shared-full", "full")},
    "diffusion.karras": READS_LEVELS,
    "diffusion.geometric": READS_LEVELS,
    "diffusion.of_network": READS_LEVELS,
    "diffusion.sample": READS_LEVELS,
    "guidance.plug_in": "calls autograd",
    "guidance.soft_best_of_n_step": "draws",
}


# Go back by products of matrices where numbers show that these stay in range; compiled, by logarithms.
BY_LOGARITHMS = ("markov.MarkovChain.tilt", "markov.MarkovChain.soft_values")


def compiled(key: str) -> dict[str, object]:
    torch._dynamo.reset()
    return leaves(torch.compile(CALLS[key](Inputs()).result, fullgraph=True, backend="eager")())


def of_each_function(keys: list[str]) -> list[str]:
    """The first example of each function: another one takes another branch of the same code. Of a loss all of them."""
    first = {key.split()[0]: key for key in reversed(keys)}
    return [key for key in keys if key.startswith("losses.") or first[key.split()[0]] == key]


@pytest.mark.parametrize("key", [key for key in of_each_function(ARITHMETIC) if not matches(key, NOT_COMPILED)])
def test_a_call_is_one_graph(key):
    expected = leaves(CALLS[key](Inputs()).result())
    got = compiled(key)
    tensors = {place: value for place, value in expected.items() if isinstance(value, Tensor)}
    if matches(key, BY_LOGARITHMS):
        torch.testing.assert_close({place: got[place] for place in tensors}, tensors, rtol=1e-14, atol=1e-14)
    else:
        assert all(same(value, got[place]) for place, value in tensors.items())


@pytest.mark.parametrize("name", NOT_COMPILED)
def test_what_is_not_compiled_could_not_be(name):
    keys = [key for key in ARITHMETIC if matches(key, {name: ""})]
    assert keys or name == "guidance.soft_best_of_n_step"
    for key in keys[:1]:
        with pytest.raises(Exception, match=r"."):  # dynamo has many errors
            compiled(key)


def test_every_loss_is_compiled():
    names = {key.split()[0] for key in ARITHMETIC if not matches(key, NOT_COMPILED)}
    of_losses = {f"losses.{name}" for name in losses.__all__ if inspect.isfunction(getattr(losses, name))}
    assert of_losses - names == {"losses.fit_bradley_terry"}


def test_a_graph_that_breaks_is_seen(monkeypatch):
    check = losses._constant
    monkeypatch.setattr(losses, "_constant", lambda x, **r: check(x, **r) if x.sum() > 0 else x)
    with pytest.raises(Exception, match="[Dd]ata-dependent"):
        compiled("losses.policy_gradient")


# --- torch.func.vmap -------------------------------------------------------------------------------------------------

# A fixed mixture, network or score takes batches of points: its own parameters are not mapped over.
POINTS_ONLY = {"mixtures": "", "diffusion": "", "guidance": ""}
NOT_MAPPED = {
    "weights.beta_for_ess": "iterates until it has converged",
    "markov.MarkovChain.fit": "counts words",
    "markov.MarkovChain.reward_law": "its size depends on the rewards, which are whole numbers",
    "selection.soft_best_of_n_law": "its number of nodes depends on the weights",
    "stepwise.soft_best_of_n_chain": "uses `soft_best_of_n_law`",
    "stepwise.gain": "looks whether a value is 0",
    "autoregressive.Gain.check_length": "is made by `stepwise.gain`",
    "autoregressive.Gain.values": "is made by `stepwise.gain`",
    "losses.count_wins": "labels are 0 or 1",
    "losses.fit_bradley_terry": "iterates until it has converged",
    "mixtures.GaussianMixture.quantile": "halves until it has converged",
}


def mapped_over(key: str, m: Inputs) -> list[int]:
    points_only = matches(key, POINTS_ONLY)
    return [i for i, leaf in enumerate(m.leaves) if leaf is not None and (m.batch[i] or not points_only)]


def tensors(value: object) -> dict[str, Tensor]:
    return {place: part for place, part in leaves(value).items() if isinstance(part, Tensor) and "._" not in place}


def mapped(key: str) -> tuple[dict[str, Tensor], list[dict[str, Tensor]]]:
    """What a call gives when it is mapped over two versions of its tensors, and what it gives for each of them."""
    points_only, made, expected = matches(key, POINTS_ONLY), [], []
    for share in (1.0, 0.97):

        def version(x: Tensor, i: int, rows: bool, share: float = share) -> Tensor:
            return torch.where(x.isfinite(), x * share, x) if rows or not points_only else x

        m = Inputs(change_leaf=version)
        call = CALLS[key](m)
        numbers = mapped_over(key, m)
        made.append([m.made[i] for i in numbers])
        expected.append(tensors(call.result()))

    def function(*versions: Tensor) -> dict[str, Tensor]:
        at = dict(zip(numbers, versions, strict=True))
        return tensors(CALLS[key](Inputs(change=lambda x, i, rows: at.get(i, x))).result())

    return torch.func.vmap(function)(*map(torch.stack, zip(*made, strict=True))), expected


def has_something_to_map(key: str) -> bool:
    m = Inputs()
    CALLS[key](m)
    return bool(mapped_over(key, m))


MAPPED = [key for key in ARITHMETIC if has_something_to_map(key)]


@pytest.mark.parametrize("key", [key for key in MAPPED if not matches(key, NOT_MAPPED)])
def test_a_call_is_mapped_over_tensors(key):
    got, expected = mapped(key)
    for place, value in got.items():
        for part, alone in zip(value, expected, strict=True):
            # Sums of a few numbers in another order.
            torch.testing.assert_close(part, alone[place], rtol=1e-12, atol=1e-13, equal_nan=True)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("name", NOT_MAPPED)
def test_what_is_not_mapped_could_not_be(name):
    keys = [key for key in MAPPED if matches(key, {name: ""})]
    with pytest.raises((RuntimeError, ValueError), match="vmap|storage|whole numbers|0 or 1"):
        mapped(keys[0])


def test_shapes_are_checked_where_entries_cannot_be():
    x = torch.zeros(3, 2, dtype=torch.float64)
    with pytest.raises(ValueError, match="must have one shape"):
        torch.func.vmap(losses.kl_estimators)(x, x[:, :1])
    assert torch.func.vmap(losses.kl_estimators)(x + 1, x).k1.shape == (3, 2)  # above 0, which nobody sees
    with pytest.raises(ValueError, match="<= 0, got 1"):
        losses.kl_estimators(x + 1, x)
    with pytest.raises(ValueError, match="must be finite"):
        _checks.finite("x", x / 0)


# --- torch.autocast --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("key", [key for key in CALLS if not matches(key, {"verify": "", "testing": ""})])
def test_a_call_under_autocast(key, dtype):
    expected = leaves(CALLS[key](Inputs(dtype=dtype)).result())
    with torch.autocast("cpu", torch.bfloat16):
        got = leaves(CALLS[key](Inputs(dtype=dtype)).result())
    assert all(same(value, got[place]) for place, value in expected.items())
