"""Exponential tilting of a reference law: closed forms, samplers, and the evidence that one follows the other.

Everything here concerns one law, pi*(y) proportional to pi_ref(y) exp(r(y) / beta). Functions are pure, take
`torch` tensors, keep their device, and take an explicit `generator` where they draw. The last dimension runs over
outcomes or candidates; every dimension before it is a batch.

One rule for dtypes. Statistics of a batch, normalisations and laws are computed in float64, whatever comes in. What is
returned has the dtype of the input, rounded once; where that dtype cannot hold the result (a count in half precision)
or the object is float64 by nature (a Markov chain, evidence), the docstring says so. Half precision is welcome as
input: its results are those of float64 on the same numbers, to the digits that it has.

A module imports only from the rows above it, and from `_checks` and `_numerics`. A module that needs more than torch,
numpy and scipy is imported by no other.

==============  ======================================================  ================================================
module          holds                                                   needs
==============  ======================================================  ================================================
weights         log weights: mean, effective sample size
categorical     laws on finitely many outcomes: tilt, divergences
mixtures        Gaussian mixtures: densities, scores, noise, tilts
autoregressive  models of strings that samplers take, by four methods
markov          Markov chains on strings, exactly tilted by rewards
language        a causal language model as such a model, and its tree   transformers
selection       rules that keep one of N, and their exact laws
pool            unbiased curves of best-of-N from one scored pool       matplotlib
resampling      schemes that turn weights into copies
particles       the engine of particle methods: grow, weigh, resample
stepwise        exact tables on Markov chains, step by step
smc             twisted sequential Monte Carlo on strings
mcmc            Metropolis-Hastings on strings, toward a power
policies        policies to train: logits, a small transformer
losses          losses of feedback: policy gradient, DPO, GRPO
diffusion       noise levels, samplers, from any score or network
guidance        changes of a score or of a step that aim at a tilt
verify          evidence: E-values, certificates, plans, verdict lines
distributed     ranks of a process group: select, resample, judge
testing         whether a model of yours keeps the rules
figures         figures, tables and explorables of the book             matplotlib
data            digits, word frequencies, a small language model        scikit-learn, tokenizers, transformers, wordfreq
==============  ======================================================  ================================================
"""

from importlib import import_module
from types import ModuleType

__version__ = "0.1.0"
__all__ = [
    "autoregressive",
    "categorical",
    "data",
    "diffusion",
    "distributed",
    "figures",
    "guidance",
    "language",
    "losses",
    "markov",
    "mcmc",
    "mixtures",
    "particles",
    "policies",
    "pool",
    "resampling",
    "selection",
    "smc",
    "stepwise",
    "testing",
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
