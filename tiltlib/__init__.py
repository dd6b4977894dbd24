"""Exponential tilting of a reference law: closed forms, samplers, and the evidence that one follows the other.

Everything here concerns one law, pi*(y) proportional to pi_ref(y) exp(r(y) / beta). Functions are pure, take
`torch` tensors, keep their device and dtype, and take an explicit `generator` where they draw. The last dimension
runs over outcomes or candidates; every dimension before it is a batch.
"""

from importlib import import_module
from types import ModuleType

__version__ = "0.1.0"
__all__ = [
    "categorical",
    "data",
    "diffusion",
    "figures",
    "guidance",
    "losses",
    "markov",
    "mcmc",
    "mixtures",
    "policies",
    "resampling",
    "selection",
    "smc",
    "verify",
    "weights",
]


def __getattr__(name: str) -> ModuleType:
    # Modules load on first use, so that `figures` (matplotlib) and `data` (wordfreq, scikit-learn) stay
    # optional.
    if name in __all__:
        return import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
