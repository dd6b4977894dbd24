"""One table of example calls, of every public function, class and method, for the rules that all of them keep.

Each entry makes the arguments of one call from `Inputs`, so that a test decides where the tensors lie, what dtype they
have, and what is wrong with them. A key is the name of what is called; behind a space stands which of its paths the
call takes: each value of an option, each optional argument and each kind of covariance is another one.

    for key, call in CALLS.items():
        result = call(Inputs()).result()

`data` and `figures` are left out: they work on the CPU by contract.
"""

import inspect
import itertools
import math
import tempfile
from collections.abc import Callable
from functools import partial
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

import tiltlib
from tiltlib import diffusion, distributed, guidance, language, mixtures, policies, resampling, stepwise, verify
from tiltlib.autoregressive import AutoregressiveModel, Gain, Stopped
from tiltlib.markov import MarkovChain
from tiltlib.mixtures import GaussianMixture

F64 = torch.float64


def public() -> dict[str, Any]:
    """Every public function, class and method, by its dotted name."""
    found = {}
    for module in (import_module(f"tiltlib.{name}") for name in tiltlib.__all__):
        prefix = module.__name__.removeprefix("tiltlib.")
        for name in module.__all__:
            value = getattr(module, name)
            if not (inspect.isfunction(value) or inspect.isclass(value)):
                continue  # a constant
            found[f"{prefix}.{name}"] = value
            if inspect.isclass(value):
                for key, member in vars(value).items():
                    member = member.__func__ if isinstance(member, classmethod | staticmethod) else member
                    own = inspect.isfunction(member) and member.__module__ == module.__name__
                    if getattr(member, "__isabstractmethod__", False):
                        continue  # what a model gives, not what the library does
                    if own and not key.startswith("_") and "__mutmut_" not in key:  # a mutant lies beside its original
                        found[f"{prefix}.{name}.{key}"] = member
    return found


PUBLIC = public()


class Inputs:
    """Makes the arguments of an example call.

    A floating tensor begins as a leaf of numbers, float64; `form` turns these into a legal argument, such as a law.

        leaf -> change_leaf -> form -> dtype -> change -> put

    `change_leaf` and `change` get the tensor, its number in the call, and whether its first dimension is a batch;
    `change` gets those that are not floating as well.
    """

    def __init__(
        self,
        *,
        dtype: torch.dtype = F64,
        put: Callable[[Tensor], Tensor] = lambda x: x,
        change_leaf: Callable[[Tensor, int, bool], Tensor] = lambda x, i, rows: x,
        change: Callable[[Tensor, int, bool], Tensor] = lambda x, i, rows: x,
        generator: Callable[[int], Any] = lambda seed: torch.Generator().manual_seed(seed),
        seed: int = 0,
    ):
        self.dtype, self.put, self.change_leaf, self.change = dtype, put, change_leaf, change
        self.made: list[Tensor] = []  # as the call gets them
        self.leaves: list[Tensor | None] = []  # None for those that are not floating
        self.batch: list[bool] = []
        self.laws: list[bool] = []
        self.draws = False  # whether a generator was asked for
        self._generator, self._seeds = generator, itertools.count(seed)

    def __call__(self, x: Tensor, *, rows=False, form=lambda x: x, dtype=None, host=False, law=False) -> Tensor:
        """Make a tensor. `rows`: its first dimension is a batch. `host`: it stays on the CPU, as levels do."""
        i, leaf = len(self.made), None
        if x.is_floating_point():
            # A clone: what one call does to its arguments must not reach the next.
            leaf = self.change_leaf(x.clone(), i, rows)
            x = form(leaf).to(dtype or self.dtype)
        x = self.change(x.clone() if leaf is None else x, i, rows)
        x = x if host else self.put(x)
        self.made.append(x)
        self.leaves.append(leaf)
        self.batch.append(rows)
        self.laws.append(law)
        return x

    def law(self, logits: Tensor, *, rows=False) -> Tensor:
        return self(logits, rows=rows, form=lambda x: torch.log_softmax(x, -1), law=True)

    def exact(self, x: Tensor, **options) -> Tensor:
        """Make a tensor that is float64 whatever the dtype of the call."""
        return self(x, dtype=F64, **options)

    def generator(self) -> torch.Generator:
        self.draws = True
        return self._generator(next(self._seeds))


class Call:
    """A function and its arguments; `then` makes tensors of a result that is a function."""

    def __init__(self, key: str, args, then, kwargs):
        self.function, self.then = PUBLIC[key.split()[0]], then
        self.bound = inspect.signature(self.function).bind(*args, **kwargs)

    def result(self) -> Any:
        result = self.function(*self.bound.args, **self.bound.kwargs)
        return result if self.then is None else self.then(result)


def leaves(value: Any, path: str = "") -> dict[str, Any]:
    """All tensors and numbers that a result is made of, by their place in it; also those an object keeps inside."""
    if isinstance(value, Tensor):
        return {path: value}
    if isinstance(value, nn.Module):
        parts = {**value.state_dict(keep_vars=True), "ref": getattr(value, "ref", None)}
    elif isinstance(value, tuple) and hasattr(value, "_fields"):
        parts = value._asdict()
    elif isinstance(value, list | tuple):
        parts = dict(enumerate(value))
    elif isinstance(value, MarkovChain | GaussianMixture | verify.Verdict):
        parts = vars(value)
        if isinstance(value, GaussianMixture):
            parts = {**parts, **{name: getattr(value, name) for name in ("prior_logps", "means", "covariances")}}
    elif isinstance(value, language.Begun):
        parts = {"tokens": value.tokens, "ended": value.ended, "law": value.law}
    else:
        return {path: value}
    return {k: v for name, part in parts.items() for k, v in leaves(part, f"{path}.{name}").items()}


def same(a: Any, b: Any) -> bool:
    """Whether two leaves are equal to the last bit; NaN equals NaN."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and bool(((a == b) | (a != a) & (b != b)).all())
    return type(a) is type(b) and (not isinstance(a, bool | float | int | str) or a == b)


# --- numbers ---------------------------------------------------------------------------------------------------------


def numbers(*shape: int) -> Tensor:
    """Numbers between -1 and 1 without a tie, and without a pattern from row to row."""
    k = torch.arange(1, math.prod(shape) + 1, dtype=F64).view(shape)
    return 2 * (k**2 * math.sqrt(2) % 1) - 1


LOGITS, REWARDS = numbers(2, 3), numbers(3, 3)[1:]
# Many rows where the draw is one number a row, so that two seeds cannot agree by chance.
POOL = numbers(40, 4)
WITH_EXCLUDED = POOL.index_put((torch.arange(5), torch.tensor([1, 2, 1, 2, 1])), torch.tensor(-math.inf, dtype=F64))
BETAS = 1.5 + numbers(40) / 2
OUTCOMES = torch.tensor([[0, 2, 1, 1], [2, 2, 0, 1]])
TOKENS = torch.tensor([[0, 1, 1, 2], [1, 2, 2, 0], [0, 0, 1, 1], [2, 1, 0, 2], [1, 1, 2, 1]])
SYMBOL_REWARDS = torch.tensor([0.5, -1.0, 0.25], dtype=F64)
WHOLE = torch.tensor([1.0, -1.0, 2.0], dtype=F64)
LENGTH = TOKENS.shape[1]
VALUES = torch.cat([numbers(LENGTH, 3) / 2, torch.zeros(1, 3, dtype=F64)])
POINTS = 2 * numbers(6, 2)
LEVELS = torch.tensor([2.0, 1.0, 0.5, 0.25], dtype=F64)
LABELS = torch.tensor([0, 1, 0, 1, 0, 1])
SLOPE = numbers(2)
QUADRATIC = torch.tensor([[0.5, 0.25], [0.25, 1.0]], dtype=F64)
BASES = torch.tensor([[[1.0, 0.25], [0.25, 2.0]], [[2.0, -0.5], [-0.5, 1.0]]], dtype=F64)
# Covariances: a number, one per coordinate, or matrices; each for all components together or for each its own.
COVARIANCES = {
    "one": torch.tensor([1.5], dtype=F64),
    "isotropic": torch.tensor([1.0, 2.0], dtype=F64),
    "shared-diagonal": torch.tensor([[1.0, 2.0]], dtype=F64),
    "diagonal": torch.tensor([[1.0, 2.0], [0.5, 1.5]], dtype=F64),
    "shared-full": BASES[:1],
    "full": BASES,
}
# Strings of which the reference writes some never: a symbol that is excluded after one context.
HOLES = numbers(3, 3).index_put((torch.tensor(1), torch.tensor(0)), torch.tensor(-math.inf, dtype=F64))


CHAIN = numbers(3, 3)


def chain(m: Inputs, logits: Tensor = CHAIN) -> MarkovChain:
    return MarkovChain(m.law(logits), "ab ")


def steps(m: Inputs) -> MarkovChain:
    return chain(m, numbers(LENGTH, 3, 3))


def values(m: Inputs) -> Tensor:
    """Log values of contexts, 0 after the last step."""
    return m(VALUES, form=lambda x: torch.cat([x[:-1], 0 * x[-1:]]))


def symmetric(x: Tensor) -> Tensor:
    return (x + x.mT) / 2


def quadratic(m: Inputs) -> Tensor:
    return m(QUADRATIC, form=symmetric)


def mixture(m: Inputs, kind: str = "diagonal") -> GaussianMixture:
    covariances = COVARIANCES[kind]
    form = symmetric if covariances.ndim == 3 else lambda x: x
    return GaussianMixture(m.law(numbers(2)), m(numbers(2, 2)), m(covariances, form=form))


def line(m: Inputs) -> GaussianMixture:
    return GaussianMixture(m.law(numbers(2)), m(numbers(2, 1)), m(COVARIANCES["isotropic"]))


def tilted(m: Inputs, ref: GaussianMixture) -> mixtures.Tilted:
    return ref.tilt(quadratic(m), m(SLOPE), 2.0)


def transformer(m: Inputs) -> policies.TransformerPolicy:
    return policies.TransformerPolicy(chain(m), LENGTH, generator=m.generator(), layers=1, width=8, heads=2)


def points(m: Inputs) -> Tensor:
    return m(POINTS, rows=True)


def pull(y: Tensor, s: Any) -> Tensor:
    return -y / (1 + s**2)


def push(y: Tensor, s: Any) -> Tensor:
    return (1 - y) / (2 + s**2)


def likelihoods(m: Inputs, *shape: int) -> Tensor:
    """Log-probabilities of outcomes that were drawn."""
    return m(numbers(*shape), rows=True, form=lambda x: x - 2)


claims = (f"calls.{i}" for i in itertools.count())


def next_claim() -> str:
    return next(claims)


# --- the table -------------------------------------------------------------------------------------------------------

CALLS: dict[str, Callable[[Inputs], Call]] = {}


def example(key: str, arguments: Callable[[Inputs, Callable[..., Call]], Call]) -> None:
    assert key not in CALLS

    def make(m: Inputs) -> Call:
        return arguments(m, lambda *args, then=None, **kwargs: Call(key, args, then, kwargs))

    CALLS[key] = make


# Each line reads: with inputs m, call with these arguments.
example("weights.normalize", lambda m, call: call(m(POOL, rows=True)))
example("weights.normalize excluded", lambda m, call: call(m(WITH_EXCLUDED, rows=True)))
example("weights.log_mean", lambda m, call: call(m(WITH_EXCLUDED, rows=True)))
example("weights.ess", lambda m, call: call(m(WITH_EXCLUDED, rows=True)))
example("weights.beta_for_ess ties=raise", lambda m, call: call(m(POOL, rows=True), 0.6, ties="raise"))
example("weights.beta_for_ess ties=clamp", lambda m, call: call(m(WITH_EXCLUDED, rows=True), 0.8, ties="clamp"))

example("categorical.tilt", lambda m, call: call(m.law(LOGITS, rows=True), m(REWARDS, rows=True), 0.7))
example(
    "categorical.tilt beta",
    lambda m, call: call(m.law(POOL, rows=True), m(WITH_EXCLUDED, rows=True), m(BETAS, rows=True)),
)
example("categorical.log_partition", lambda m, call: call(m.law(LOGITS, rows=True), m(REWARDS, rows=True), 0.7))
example(
    "categorical.log_partition beta",
    lambda m, call: call(m.law(POOL, rows=True), m(WITH_EXCLUDED, rows=True), m(BETAS, rows=True)),
)
example("categorical.truncate", lambda m, call: call(m.law(POOL, rows=True)))
example("categorical.truncate top_k", lambda m, call: call(m.law(POOL, rows=True), top_k=2))
example("categorical.truncate top_p", lambda m, call: call(m.law(POOL, rows=True), top_p=0.8))
example("categorical.truncate min_p", lambda m, call: call(m.law(POOL, rows=True), min_p=0.4))
example("categorical.expectation", lambda m, call: call(m.law(LOGITS, rows=True), m(REWARDS, rows=True)))
example("categorical.frontier", lambda m, call: call(m.law(LOGITS[0]), m(REWARDS[0]), [0.5, 2.0]))
example(
    "categorical.frontier betas",
    lambda m, call: call(m.law(LOGITS[0]), m(REWARDS[0]), m.exact(torch.tensor([0.5, 2.0], dtype=F64))),
)
example("categorical.kl", lambda m, call: call(m.law(LOGITS, rows=True), m.law(REWARDS, rows=True)))
example("categorical.total_variation", lambda m, call: call(m.law(LOGITS, rows=True), m.law(REWARDS, rows=True)))
example("categorical.chi_square", lambda m, call: call(m.law(LOGITS, rows=True), m.law(REWARDS, rows=True)))
example("categorical.sample", lambda m, call: call(m.law(LOGITS, rows=True), 50, generator=m.generator()))
example("markov.MarkovChain", lambda m, call: call(m.law(numbers(3, 3)), "ab "))
example("markov.MarkovChain letters", lambda m, call: call(m.law(numbers(27, 27))))
example("markov.MarkovChain steps", lambda m, call: call(m.law(numbers(LENGTH, 3, 3)), alphabet="ab "))
example(
    "markov.MarkovChain.fit",
    lambda m, call: call(MarkovChain, ["ab", "b", "aa"], m(numbers(3).abs()), 2, alphabet="ab "),
)
example("markov.MarkovChain.stopped", lambda m, call: call(chain(m), LENGTH))
example("markov.MarkovChain.refit per-step", lambda m, call: call(chain(m), m(TOKENS, rows=True), per_step=True))
example(
    "markov.MarkovChain.refit weights",
    lambda m, call: call(chain(m), m(TOKENS, rows=True), log_weights=m(numbers(5), rows=True), per_step=False),
)
example("markov.MarkovChain.table", lambda m, call: call(chain(m), 1))
example("markov.MarkovChain.table tilted", lambda m, call: call(chain(m).tilt(m(SYMBOL_REWARDS), 0.5, LENGTH), 1))
example("markov.MarkovChain.encode", lambda m, call: call(chain(m), ["ab", "b "]))
example("markov.MarkovChain.decode", lambda m, call: call(chain(m), m(TOKENS, rows=True)))
example("markov.MarkovChain.contexts", lambda m, call: call(chain(m), LENGTH))
example("markov.MarkovChain.kl", lambda m, call: call(chain(m), steps(m), LENGTH))
example("markov.MarkovChain.reward_law", lambda m, call: call(chain(m), m(WHOLE), LENGTH))


def begun(model, m: Inputs):
    """A state of five strings of one token."""
    return model.append(model.begin(5), m(TOKENS[:, 0]))


for name in ("begin", "next_logps", "append", "take"):
    example(
        f"autoregressive.Stopped.{name}",
        lambda m, call, name=name: call(
            Stopped(chain(m), 2),
            *(() if name == "begin" else (begun(Stopped(chain(m), 2), m),)),
            *{
                "begin": (5,),
                "next_logps": (),
                "append": (m(TOKENS[:, 1]),),
                "take": (m(torch.tensor([4, 0])),),
            }[name],
        ),
    )
    example(
        f"policies.TransformerPolicy.{name}",
        lambda m, call, name=name: call(
            transformer(m),
            *(() if name == "begin" else (begun(transformer(m), m),)),
            *{
                "begin": (5,),
                "next_logps": (),
                "append": (m(TOKENS[:, 1]),),
                "take": (m(torch.tensor([4, 0])),),
            }[name],
        ),
    )
example("autoregressive.Stopped", lambda m, call: call(chain(m), 2))


class Network:
    """What `transformers` makes of a causal model, as far as `LanguageModel` asks: here logits by the last token."""

    def __init__(self, logits: Tensor):
        self.logits = logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits

    def __call__(self, input_ids: Tensor, cache: Any, use_cache: bool) -> SimpleNamespace:
        cache = SimpleNamespace(batch_select_indices=lambda index: None)
        return SimpleNamespace(logits=self.logits[input_ids], cache=cache)


PROMPT = torch.tensor([2, 0])


def lm(m: Inputs, **options) -> language.LanguageModel:
    return language.LanguageModel(Network(m(CHAIN)), m(PROMPT), LENGTH, **options)


class Letters:
    """A tokenizer of which a token is a letter."""

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        return [ord(letter) for letter in text]

    def decode(self, numbers: list[int], skip_special_tokens: bool = False) -> str:
        return "".join(map(chr, numbers))


def file() -> Path:
    return Path(tempfile.mkdtemp(), "pool.jsonl")


example("language.encode", lambda m, call: call(Letters(), "ab"))
example("language.LanguageModel", lambda m, call: call(Network(m(CHAIN)), m(PROMPT), LENGTH))
example(
    "language.LanguageModel options",
    lambda m, call: call(Network(m(CHAIN)), m(PROMPT), LENGTH, end=2, top_k=2, temperature=0.7, chunk=3),
)
for kind, options in {"all": {}, "few": {"end": 2, "top_k": 2, "temperature": 0.7, "chunk": 3}}.items():
    for name, arguments in {
        "begin": lambda m, model: (5,),
        "next_logps": lambda m, model: (begun(model, m),),
        "append": lambda m, model: (begun(model, m), m(TOKENS[:, 1])),
        "take": lambda m, model: (begun(model, m), m(torch.tensor([4, 0]))),
        "logps": lambda m, model: (m(TOKENS, rows=True),),
        "token_logps": lambda m, model: (m(TOKENS, rows=True),),
        "tree": lambda m, model: (),
    }.items():
        example(
            f"language.LanguageModel.{name} {kind}",
            lambda m, call, arguments=arguments, options=options: call(
                lm(m, **options), *arguments(m, lm(m, **options))
            ),
        )
    example(
        f"language.LanguageModel.draw {kind}",
        lambda m, call, options=options: call(lm(m, **options), begun(lm(m, **options), m), generator=m.generator()),
    )
    example(
        f"language.LanguageModel.sample {kind}",
        lambda m, call, options=options: call(lm(m, **options), 20, LENGTH - 1, generator=m.generator()),
    )
    example(f"language.Tree.find {kind}", lambda m, call, options=options: call(lm(m).tree(), m(TOKENS, rows=True)))
    example(f"language.Tree.ranks {kind}", lambda m, call: call(lm(m).tree(), m(torch.tensor([7, 0, 80]), rows=True)))
    example(f"language.Tree.number {kind}", lambda m, call: call(lm(m).tree(), m(TOKENS, rows=True)))
    example(
        f"language.Tree.rewards {kind}",
        lambda m, call, options=options: call(lm(m, **options).tree(), m(numbers(16 if options else 81))),
    )
example(
    "language.generate",
    lambda m, call: call([lm(m), lm(m, top_k=2)], 5, file(), generator=m.generator(), decode=Letters().decode),
)
for kind, make in {
    "order-1": chain,
    "order-2": partial(chain, logits=numbers(9, 3)),
    "steps": steps,
    "tilted": lambda m: chain(m).tilt(m(SYMBOL_REWARDS), 0.5, LENGTH),
    "holes": partial(chain, logits=HOLES),
    "stopped": lambda m: chain(m).stopped(LENGTH),
}.items():
    example(f"markov.MarkovChain.logps {kind}", lambda m, call, make=make: call(make(m), m(TOKENS, rows=True)))
    example(
        f"autoregressive.AutoregressiveModel.sample {kind}",
        lambda m, call, make=make: call(make(m), 20, LENGTH, generator=m.generator()),
    )
    example(f"markov.MarkovChain.tilt {kind}", lambda m, call, make=make: call(make(m), m(SYMBOL_REWARDS), 0.5, LENGTH))
    example(
        f"markov.MarkovChain.soft_values {kind}",
        lambda m, call, make=make: call(make(m), m(SYMBOL_REWARDS), 0.5, LENGTH),
    )
    if kind != "tilted":  # has its own
        example(
            f"markov.MarkovChain.rows {kind}", lambda m, call, make=make: call(make(m), 1, m(TOKENS[:, 0], rows=True))
        )
    example(f"markov.MarkovChain.begin {kind}", lambda m, call, make=make: call(make(m), 5))
    example(f"markov.MarkovChain.next_logps {kind}", lambda m, call, make=make: call(make(m), begun(make(m), m)))
    example(
        f"markov.MarkovChain.append {kind}",
        lambda m, call, make=make: call(make(m), begun(make(m), m), m(TOKENS[:, 1])),
    )
    example(
        f"markov.MarkovChain.take {kind}",
        lambda m, call, make=make: call(make(m), begun(make(m), m), m(torch.tensor([4, 0, 0]))),
    )
    example(
        f"markov.MarkovChain.draw {kind}",
        lambda m, call, make=make: call(make(m), begun(make(m), m), generator=m.generator()),
    )
    example(
        f"markov.MarkovChain.next_contexts {kind}",
        lambda m, call, make=make: call(make(m), m(TOKENS[:, 0], rows=True), m(TOKENS[:, 1], rows=True)),
    )
    example(
        f"markov.MarkovChain.contexts_before {kind}", lambda m, call, make=make: call(make(m), m(TOKENS, rows=True))
    )
example("markov.TiltedChain.rows", lambda m, call: call(chain(m).tilt(m(SYMBOL_REWARDS), 0.5, LENGTH), 1, m(TOKENS)))
example("markov.MarkovChain.check_alike", lambda m, call: call(chain(m), "other", steps(m)))
example("markov.MarkovChain.reward_table", lambda m, call: call(chain(m), m(SYMBOL_REWARDS), length=LENGTH))
example("markov.MarkovChain.lookahead", lambda m, call: call(chain(m), m(VALUES[0])))
example("markov.MarkovChain.soft_values contexts", lambda m, call: call(chain(m), m(numbers(3, 3)), 0.5, LENGTH))
example("markov.MarkovChain.total_reward", lambda m, call: call(chain(m), m(TOKENS, rows=True), m(SYMBOL_REWARDS)))
example(
    "markov.MarkovChain.total_reward contexts", lambda m, call: call(chain(m), m(TOKENS, rows=True), m(numbers(3, 3)))
)

example("selection.best_of_n", lambda m, call: call(m(POOL.round(), rows=True), generator=m.generator()))
example("selection.best_of_n_law", lambda m, call: call(m.law(LOGITS, rows=True), m(REWARDS, rows=True), n=4))
example("selection.best_of_n_law ties", lambda m, call: call(m.law(POOL[:3], rows=True), m(POOL[0].round()), n=4))
example("selection.best_of_n_law n=1", lambda m, call: call(m.law(LOGITS, rows=True), m(REWARDS, rows=True), n=1))
example("selection.soft_best_of_n", lambda m, call: call(m(WITH_EXCLUDED, rows=True), 0.7, generator=m.generator()))
example(
    "selection.soft_best_of_n beta",
    lambda m, call: call(m(POOL, rows=True), m(BETAS, rows=True), generator=m.generator()),
)
example(
    "selection.soft_best_of_n_law", lambda m, call: call(m.law(LOGITS, rows=True), m(REWARDS, rows=True), beta=0.7, n=4)
)
example(
    "selection.soft_best_of_n_law beta",
    lambda m, call: call(m.law(POOL[:3], rows=True), m(POOL[0]), beta=m(BETAS[:3], rows=True), n=4),
)
example(
    "selection.soft_best_of_n_law n=1",
    lambda m, call: call(m.law(LOGITS, rows=True), m(REWARDS, rows=True), beta=0.7, n=1),
)
example(
    "selection.exponential_best_of_n",
    lambda m, call: call(m(WITH_EXCLUDED, rows=True), 0.7, generator=m.generator()),
)
example(
    "selection.exponential_best_of_n beta",
    lambda m, call: call(m(POOL, rows=True), m(BETAS, rows=True), generator=m.generator()),
)
example(
    "selection.exponential_best_of_n_law",
    lambda m, call: call(m.law(LOGITS, rows=True), m(REWARDS, rows=True), beta=0.7, n=4),
)
example(
    "selection.exponential_best_of_n_law beta",
    lambda m, call: call(m.law(POOL[:3], rows=True), m(POOL[0].round()), beta=m(BETAS[:3], rows=True), n=4),
)
example(
    "selection.exponential_best_of_n_stream",
    lambda m, call: call(
        [(m(POOL, rows=True), m(POOL, rows=True)), (m(-POOL, rows=True), m(WITH_EXCLUDED, rows=True))],
        0.7,
        generator=m.generator(),
    ),
)
example(
    "selection.exponential_best_of_n_stream beta",
    lambda m, call: call(
        [(m(torch.arange(320).view(40, 4, 2), rows=True), m(POOL, rows=True))] * 2,
        m(BETAS, rows=True),
        generator=m.generator(),
    ),
)
example(
    "stepwise.soft_best_of_n_chain",
    lambda m, call: call(chain(m), m(SYMBOL_REWARDS), 0.7, log_values=values(m), n=4),
)
example("selection.candidate_counts", lambda m, call: call(m.law(POOL, rows=True), 9, generator=m.generator()))
example(
    "selection.soft_best_of_n_draw",
    lambda m, call: call(m.law(POOL, rows=True), m(POOL[1]), beta=0.7, n=9, generator=m.generator()),
)
example(
    "selection.soft_best_of_n_draw beta",
    lambda m, call: call(m.law(POOL, rows=True), m(POOL[1]), beta=m(BETAS, rows=True), n=9, generator=m.generator()),
)
example(
    "selection.soft_best_of_n_stream",
    lambda m, call: call(
        [(m(POOL, rows=True), m(POOL, rows=True)), (m(-POOL, rows=True), m(WITH_EXCLUDED, rows=True))],
        0.7,
        generator=m.generator(),
    ),
)
example(
    "selection.soft_best_of_n_stream beta",
    lambda m, call: call(
        [(m(torch.arange(320).view(40, 4, 2), rows=True), m(POOL, rows=True))] * 2,
        m(BETAS, rows=True),
        generator=m.generator(),
    ),
)

for rule in ("hard", "soft", "exponential"):
    for name in ("curve", "standard_errors"):
        example(
            f"pool.{name} rule={rule}", lambda m, call, rule=rule: call(m(POOL[:3], rows=True), 0.7, n=2, rule=rule)
        )
    example(
        f"pool.interval rule={rule}",
        lambda m, call, rule=rule: call(
            *(m(numbers(2, 24), rows=True), 0.7, 2),
            low=-1.0,
            high=1.0,
            rule=rule,
            delta=0.1,
            values=m(numbers(2, 24) ** 2, rows=True),
            shuffles=3,
            generator=m.generator(),
        ),
    )
for name in ("curve", "standard_errors"):
    example(
        f"pool.{name} values",
        lambda m, call: call(m(POOL.round()[:3], rows=True), m(BETAS[:3], rows=True), 4, values=m(POOL[0])),
    )
    example(
        f"pool.{name} log_ratios",
        lambda m, call: call(m(POOL[:3], rows=True), 0.7, n=2, log_ratios=m(WITH_EXCLUDED[:3] / 4, rows=True)),
    )
    example(f"pool.{name} n=M", lambda m, call: call(m(POOL[:3], rows=True), 0.7, 4, log_ratios=m(POOL[1])))
example("pool.pass_at_k", lambda m, call: call(m(POOL[:3], rows=True, form=lambda x: (x > 0).double()), 3))
example("pool.pass_at_k bool", lambda m, call: call(m(POOL[:3] > 0, rows=True), 3))
example("pool.mean_interval", lambda m, call: call(m(POOL[:3], rows=True), low=-1, high=1.0, delta=0.1))
example(
    "pool.needed_n",
    lambda m, call: call(*(m(POOL), 0.7, 0.3, 2), rule="hard", values=m(numbers(4)), sigmas=1.0, log_ratios=None),
)
for rule in ("soft", "exponential"):
    example(
        f"pool.needed_beta rule={rule}",
        lambda m, call, rule=rule: call(m(POOL[:3]), 0.2, 2, rule=rule, sigmas=0.5),
    )
for rule in ("hard", "soft", "exponential"):
    example(f"pool.divergence rule={rule}", lambda m, call, rule=rule: call(m(POOL[:3], rows=True), 0.7, 3, rule=rule))
    example(f"pool.doubts rule={rule}", lambda m, call, rule=rule: call(m(POOL[0]), 0.7, 3, rule=rule))

SCHEMES = {name: getattr(resampling, name) for name in ("multinomial", "residual", "stratified", "systematic")}
for name in SCHEMES:
    example(f"resampling.{name}", lambda m, call: call(m(WITH_EXCLUDED, rows=True), 9, generator=m.generator()))
example("resampling.gumbel_top_k", lambda m, call: call(m(WITH_EXCLUDED, rows=True), 2, generator=m.generator()))
example("resampling.rejection", lambda m, call: call(m(WITH_EXCLUDED, rows=True), 0.7, 0.5, generator=m.generator()))

example("stepwise.twisted_proposal", lambda m, call: call(chain(m), m(SYMBOL_REWARDS), 0.7, values(m)))
example("stepwise.log_increments", lambda m, call: call(chain(m), m(SYMBOL_REWARDS), 0.7, values(m)))
example(
    "stepwise.log_increments proposal",
    lambda m, call: call(chain(m), m(SYMBOL_REWARDS), 0.7, values(m), proposal=steps(m)),
)
example("smc.trace", lambda m, call: call(m(TOKENS, rows=True).unsqueeze(-2), m(TOKENS % 3, rows=True).unsqueeze(-2)))


def gains(m: Inputs, proposal: MarkovChain | None = None):
    return stepwise.gain(chain(m), m(SYMBOL_REWARDS), 0.7, values(m), proposal)


def walked(gain, model: MarkovChain) -> list[Tensor]:
    """What a gain says of one token of each of five strings."""
    state = model.begin(5)
    token = torch.tensor([0, 1, 2, 1, 0], device=model.device)
    return list(gain.step(gain.values(state, 5), gain.earned(state, token), model.append(state, token)))


example(
    "stepwise.gain",
    lambda m, call: call(chain(m), m(SYMBOL_REWARDS), 0.7, values(m), then=lambda g: walked(g, chain(m))),
)
example(
    "stepwise.gain proposal",
    lambda m, call: call(
        chain(m), m(SYMBOL_REWARDS), 0.7, values(m), proposal=steps(m), then=lambda g: walked(g, chain(m))
    ),
)


def by_context(m: Inputs):
    values = m(VALUES[1])
    return lambda state: values[state.contexts]


def by_token(m: Inputs):
    rewards = m(SYMBOL_REWARDS)
    return lambda state, tokens: rewards[tokens]


FOUR = torch.tensor([0, 1, 2, 1])
example(
    "autoregressive.Gain",
    lambda m, call: call(by_context(m), by_token(m), LENGTH, then=lambda g: walked(g, chain(m))),
)
example("autoregressive.Gain.check_length", lambda m, call: call(gains(m), LENGTH))
example("autoregressive.Gain.values", lambda m, call: call(gains(m), chain(m).begin(4), 4))
example(
    "autoregressive.Gain.earned",
    lambda m, call: call(Gain(by_context, by_token(m)), chain(m).begin(4), m(FOUR)),
)
example(
    "autoregressive.Gain.step",
    lambda m, call: call(
        Gain(by_context(m)),
        m.exact(numbers(4)),
        m.exact(numbers(4) ** 2),
        chain(m).append(chain(m).begin(4), m(FOUR)),
    ),
)
example("smc.by_value", lambda m, call: call(by_context(m), chain(m), then=lambda g: walked(g, chain(m))))


def grown(m: Inputs, runs: int, n: int):
    """Particles that stay where they are and gain given numbers."""
    gained = m(numbers(4, runs * n))
    begun = torch.arange(runs * n, device=gained.device)
    return begun, lambda t, y: (y, gained[t]), lambda y, index: y[index], 4, m(numbers(runs, n))


example("smc.twisted_smc", lambda m, call: call(chain(m), gains(m), LENGTH, 9, generator=m.generator()))
for name, scheme in SCHEMES.items():
    example(
        f"smc.twisted_smc {name}",
        lambda m, call, scheme=scheme: call(
            *(chain(m), gains(m), LENGTH, 9),
            generator=m.generator(),
            proposal=steps(m),
            threshold=0.99,
            scheme=scheme,
            runs=3,
        ),
    )
    example(
        f"particles.grow {name}",
        lambda m, call, scheme=scheme: call(
            *grown(m, 2, 3),
            generator=m.generator(),
            threshold=0.99,
            scheme=scheme,
        ),
    )
example(
    "particles.grow on_step",
    lambda m, call: call(*grown(m, 2, 3), generator=m.generator(), on_step=lambda t, so_far: None),
)
PLACES = torch.arange(320).view(40, 4, 2)


def entered(block) -> dict[str, Any]:
    with block as said:
        said["n"] = 3
    return said


for rule in distributed.RULES:
    example(
        f"distributed.best_of_n {rule}",
        lambda m, call, rule=rule: call(
            [(m(PLACES, rows=True), m(x, rows=True), m.generator()) for x in (POOL, WITH_EXCLUDED)], 0.7, rule=rule
        ),
    )
example(
    "distributed.best_of_n beta",
    lambda m, call: call(
        [(m(PLACES[..., 0], rows=True), m(POOL, rows=True), m.generator())], m(BETAS, rows=True), group=None
    ),
)
example("distributed.together", lambda m, call: call(group=None, then=entered))
example("distributed.weight_stats", lambda m, call: call(m(WITH_EXCLUDED, rows=True), group=None))
example("distributed.beta_for_ess", lambda m, call: call(m(POOL, rows=True), 0.6, group=None))
example("distributed.average_curves", lambda m, call: call(m(numbers(5, 3)), m(numbers(5, 3)), group=None))
example("distributed.add_counts", lambda m, call: call(m(OUTCOMES), group=None))
example("distributed.tv_upper_bound", lambda m, call: call(m(numbers(3, 4).abs().clamp(max=1)), delta=1e-3, group=None))
example("distributed.shards", lambda m, call: call("a", 2, 5, group=None, then=tuple))
example(
    "distributed.systematic",
    lambda m, call: call(*(m(WITH_EXCLUDED, rows=True), m(PLACES, rows=True)), generator=m.generator(), group=None),
)
example("distributed.twisted_smc", lambda m, call: call(chain(m), gains(m), LENGTH, 9, generator=m.generator()))
example(
    "distributed.twisted_smc proposal",
    lambda m, call: call(
        *(chain(m), gains(m), LENGTH, 9),
        generator=m.generator(),
        proposal=steps(m),
        threshold=0.99,
        runs=3,
        group=None,
    ),
)
example(
    "selection.soft_best_of_n_blocks",
    lambda m, call: call(chain(m), gains(m), LENGTH, 3, generator=m.generator(), block=2, strings=4),
)


class Rows(AutoregressiveModel[Any]):
    """A chain by its four methods alone."""

    def __init__(self, chain: MarkovChain):
        self.begin, self.next_logps, self.append, self.take = chain.begin, chain.next_logps, chain.append, chain.take

    begin = next_logps = append = take = None  # type: ignore[assignment]


for kind, model in {
    "by-methods": lambda m: Rows(chain(m)),
    "ends": lambda m: Stopped(chain(m), 2),
}.items():
    example(
        f"autoregressive.AutoregressiveModel.draw {kind}",
        lambda m, call, model=model: call(model(m), model(m).begin(5), generator=m.generator()),
    )
    example(
        f"autoregressive.AutoregressiveModel.sample {kind}",
        lambda m, call, model=model: call(model(m), 5, LENGTH, generator=m.generator()),
    )
    example(
        f"autoregressive.AutoregressiveModel.logps {kind}",
        lambda m, call, model=model: call(model(m), m(TOKENS, rows=True)),
    )
    example(
        f"testing.check_model {kind}",
        lambda m, call, model=model: call(model(m), 3, generator=m.generator(), n=3, draws=50),
    )

example("mcmc.lengths", lambda m, call: call(m(torch.tensor([[0, 2, 2], [1, 1, 0]]), rows=True), 2))
example(
    "mcmc.log_accept",
    lambda m, call: call(
        m(numbers(5), rows=True),
        m(WITH_EXCLUDED[0, :1].expand(5), rows=True),
        2.0,
        m(TOKENS[:, 0] + 1, rows=True),
        m(TOKENS[:, 1] + 1, rows=True),
    ),
)
example(
    "mcmc.log_accept proposal",
    lambda m, call: call(
        *(m(numbers(5), rows=True), m(numbers(5) ** 2, rows=True), 2.0),
        *(m(TOKENS[:, 0] + 1, rows=True), m(TOKENS[:, 1] + 1, rows=True)),
        proposal_logps=m(numbers(5), rows=True),
        new_proposal_logps=m(numbers(5) ** 2, rows=True),
    ),
)
example(
    "mcmc.power_mh proposal",
    lambda m, call: call(chain(m), m(TOKENS, rows=True), 2.0, 3, generator=m.generator(), proposal=steps(m)),
)
example("mcmc.power_mh", lambda m, call: call(chain(m), m(TOKENS, rows=True), 2.0, 3, generator=m.generator()))
example("mcmc.power_mh_law", lambda m, call: call(m.law(numbers(9)), 2, 2.0, 3))
example(
    "mcmc.power_mh_law start",
    lambda m, call: call(m.law(numbers(9)), 2, 2.0, 3, start=m.law(numbers(9) ** 2)),
)
example(
    "mcmc.power_mh end",
    lambda m, call: call(
        chain(m).stopped(LENGTH), m(TOKENS.sort().values, rows=True), 2.0, 3, generator=m.generator(), end=2
    ),
)

example("policies.TabularPolicy", lambda m, call: call(m(LOGITS[0])))
example("policies.TabularPolicy.law", lambda m, call: call(policies.TabularPolicy(m(LOGITS[0]))))
example(
    "policies.TabularPolicy.logps",
    lambda m, call: call(policies.TabularPolicy(m(LOGITS[0])), m(OUTCOMES, rows=True)),
)
example(
    "policies.TabularPolicy.sample",
    lambda m, call: call(policies.TabularPolicy(m(LOGITS[0])), 50, generator=m.generator()),
)
example(
    "policies.natural_step",
    lambda m, call: call(m(LOGITS[0]), m(OUTCOMES[:, 0]), m.law(LOGITS[1]), m(REWARDS[0]), beta=0.7, step=0.5),
)
example(
    "policies.TransformerPolicy",
    lambda m, call: call(chain(m), LENGTH, generator=m.generator(), layers=1, width=8, heads=2),
)
example("policies.TransformerPolicy.conditionals", lambda m, call: call(transformer(m), m(TOKENS, rows=True)))
example("policies.TransformerPolicy.token_logps", lambda m, call: call(transformer(m), m(TOKENS, rows=True)))
example("policies.TransformerPolicy.logps", lambda m, call: call(transformer(m), m(TOKENS, rows=True)))
example("policies.TransformerPolicy.sample", lambda m, call: call(transformer(m), 20, generator=m.generator()))
example(
    "policies.TransformerPolicy.sample length",
    lambda m, call: call(transformer(m), 20, length=2, generator=m.generator()),
)

example("losses.kl_estimators", lambda m, call: call(likelihoods(m, 5), likelihoods(m, 5)))
example(
    "losses.policy_gradient",
    lambda m, call: call(likelihoods(m, 5), likelihoods(m, 5), m(numbers(5), rows=True), 0.7),
)
for kind, baseline in {"number": lambda m: 0.5, "tensor": lambda m: m(numbers(5), rows=True)}.items():
    example(
        f"losses.policy_gradient baseline-{kind}",
        lambda m, call, baseline=baseline: call(
            likelihoods(m, 5), likelihoods(m, 5), m(numbers(5), rows=True), 0.7, baseline=baseline(m)
        ),
    )
example(
    "losses.rloo", lambda m, call: call(likelihoods(m, 3, 4), likelihoods(m, 3, 4), m(numbers(3, 4), rows=True), 0.7)
)
for kl, baseline, scale in itertools.product(
    ("reward", "k1", "k2", "k3"), ("group", "leave-one-out"), ("group", "none")
):
    example(
        f"losses.grpo kl={kl} baseline={baseline} scale={scale}",
        lambda m, call, kl=kl, baseline=baseline, scale=scale: call(
            *(likelihoods(m, 2, 3, 4), likelihoods(m, 2, 3, 4), m(numbers(2, 3), rows=True), 0.7),
            kl=kl,
            baseline=baseline,
            scale=scale,
        ),
    )
example("losses.grpo beta=0", lambda m, call: call(likelihoods(m, 2, 3, 4), None, m(numbers(2, 3), rows=True), 0.0))
KEPT = torch.tensor([True, True, True, False])
example(
    "losses.grpo mask",
    lambda m, call: call(
        *(likelihoods(m, 2, 3, 4), likelihoods(m, 2, 3, 4), m(numbers(2, 3), rows=True), 0.7),
        mask=m(KEPT.expand(2, 3, 4), rows=True),
    ),
)
example(
    "losses.grpo clip",
    lambda m, call: call(
        *(likelihoods(m, 2, 3, 4), likelihoods(m, 2, 3, 4), m(numbers(2, 3), rows=True), 0.7),
        old_logps=m(numbers(2, 3, 4) ** 2 - 2, rows=True),
        clip=0.1,
    ),
)
example(
    "losses.grpo clip-pair",
    lambda m, call: call(
        *(likelihoods(m, 2, 3, 4), likelihoods(m, 2, 3, 4), m(numbers(2, 3), rows=True), 0.7),
        old_logps=m(numbers(2, 3, 4) ** 2 - 2, rows=True),
        clip=(0.1, 0.3),
    ),
)
for length_norm in ("sequence", "group"):
    example(
        f"losses.grpo length_norm={length_norm}",
        lambda m, call, length_norm=length_norm: call(
            *(likelihoods(m, 2, 3, 4), likelihoods(m, 2, 3, 4), m(numbers(2, 3), rows=True), 0.7),
            mask=m(KEPT.expand(2, 3, 4), rows=True),
            length_norm=length_norm,
        ),
    )
example(
    "losses.grpo valid",
    lambda m, call: call(
        *(likelihoods(m, 2, 3, 4), likelihoods(m, 2, 3, 4), m(numbers(2, 3), rows=True), 0.7),
        valid=m(torch.tensor([[True, True, False], [True, True, False]]), rows=True),
    ),
)
example("losses.bradley_terry", lambda m, call: call(m(numbers(5), rows=True), m(numbers(5) ** 2, rows=True)))
example("losses.dpo", lambda m, call: call(*(likelihoods(m, 5) for _ in range(4)), 0.7))
POSITIVE = numbers(3).exp()
example(
    "losses.dpo beta",
    lambda m, call: call(*(likelihoods(m, 3) for _ in range(4)), m(POSITIVE, rows=True)),
)
example(
    "losses.rloo beta",
    lambda m, call: call(
        likelihoods(m, 3, 4), likelihoods(m, 3, 4), m(numbers(3, 4), rows=True), m(POSITIVE, rows=True)
    ),
)
example(
    "losses.policy_gradient beta",
    lambda m, call: call(likelihoods(m, 3), likelihoods(m, 3), m(numbers(3), rows=True), m(POSITIVE, rows=True)),
)
example(
    "losses.grpo beta",
    lambda m, call: call(
        likelihoods(m, 3, 3, 4), likelihoods(m, 3, 3, 4), m(numbers(3, 3), rows=True), m(POSITIVE, rows=True)
    ),
)
example(
    "resampling.rejection beta",
    lambda m, call: call(m(numbers(3, 4), rows=True), m(POSITIVE[:, None], rows=True), 0.5, generator=m.generator()),
)
for kind, labels in {"number": lambda m: 0.8, "tensor": lambda m: m(numbers(5).abs(), rows=True)}.items():
    example(
        f"losses.bradley_terry labels-{kind}",
        lambda m, call, labels=labels: call(m(numbers(5), rows=True), m(numbers(5) ** 2, rows=True), labels=labels(m)),
    )
    example(
        f"losses.dpo labels-{kind}",
        lambda m, call, labels=labels: call(*(likelihoods(m, 5) for _ in range(4)), 0.7, labels=labels(m)),
    )
example(
    "losses.count_wins",
    lambda m, call: call(
        m(torch.tensor([0, 1, 2, 2]), rows=True),
        m(torch.tensor([1, 2, 0, 1]), rows=True),
        m(torch.tensor([1.0, 0.0, 1.0, 1.0], dtype=F64), rows=True),
        3,
    ),
)
example("losses.fit_bradley_terry", lambda m, call: call(m(2 + numbers(3, 3))))
example("losses.fit_bradley_terry ridge", lambda m, call: call(m(2 + numbers(3, 3)), ridge=0.5))
for direction in ("policy", "uniform"):
    example(
        f"losses.self_certainty direction={direction}",
        lambda m, call, direction=direction: call(m.law(numbers(2, 4, 3), rows=True), direction=direction),
    )
    example(
        f"losses.self_certainty direction={direction} mask",
        lambda m, call, direction=direction: call(
            m.law(numbers(2, 4, 3), rows=True), direction=direction, mask=m(KEPT.expand(2, 4), rows=True)
        ),
    )
example("losses.weighted_likelihood", lambda m, call: call(likelihoods(m, 40, 4), m(WITH_EXCLUDED, rows=True)))
example(
    "losses.weighted_likelihood unnormalized",
    lambda m, call: call(likelihoods(m, 40, 4), m(WITH_EXCLUDED, rows=True), self_normalized=False),
)

example("mixtures.GaussianMixture.fit", lambda m, call: call(GaussianMixture, m(POINTS), m(LABELS), 0.5))
for kind in COVARIANCES:
    make = partial(mixture, kind=kind)
    example(
        f"mixtures.GaussianMixture {kind}",
        lambda m, call, kind=kind: call(
            m.law(numbers(2)),
            m(numbers(2, 2)),
            m(COVARIANCES[kind], form=symmetric if COVARIANCES[kind].ndim == 3 else lambda x: x),
        ),
    )
    for method in ("component_logps", "logps", "posterior", "score", "uniforms"):
        example(f"mixtures.GaussianMixture.{method} {kind}", lambda m, call, make=make: call(make(m), points(m)))
    example(
        f"mixtures.GaussianMixture.sample {kind}",
        lambda m, call, make=make: call(make(m), 20, generator=m.generator()),
    )
    example(f"mixtures.GaussianMixture.noised {kind}", lambda m, call, make=make: call(make(m), 0.5, 0.7))
    for method in ("denoise", "denoise_covariance"):
        example(
            f"mixtures.GaussianMixture.{method} {kind}",
            lambda m, call, make=make: call(make(m), points(m), 0.5, 0.7),
        )
    example(
        f"mixtures.GaussianMixture.tilt {kind}",
        lambda m, call, make=make: call(make(m), quadratic(m), m(SLOPE), 2.0),
    )
    example(
        f"mixtures.GaussianMixture.class_logps {kind}",
        lambda m, call, make=make: call(make(m), points(m), m(torch.tensor([1, 0]))),
    )
    example(
        f"mixtures.GaussianMixture.of_class {kind}",
        lambda m, call, make=make: call(make(m), m(torch.tensor([1, 0])), 1),
    )
    example(f"mixtures.GaussianMixture.project {kind}", lambda m, call, make=make: call(make(m), m(SLOPE)))
    example(f"mixtures.GaussianMixture.check_points {kind}", lambda m, call, make=make: call(make(m), "x", points(m)))
    example(f"mixtures.GaussianMixture.to {kind}", lambda m, call, make=make: call(make(m), m.dtype))
    for method in ("mean", "covariance"):
        example(f"mixtures.GaussianMixture.{method} {kind}", lambda m, call, make=make: call(make(m)))
example("mixtures.GaussianMixture.tilt quadratic", lambda m, call: call(mixture(m), quadratic(m), None, 2.0))
example("mixtures.GaussianMixture.tilt linear", lambda m, call: call(mixture(m), None, m(SLOPE), 2.0))
example("mixtures.GaussianMixture.cdf", lambda m, call: call(line(m), points(m)))
example(
    "mixtures.GaussianMixture.quantile",
    lambda m, call: call(line(m), m(numbers(6), rows=True, form=lambda x: 0.5 + 0.45 * x)),
)

example("diffusion.karras", lambda m, call: call(3, 0.1, 2.0))
example("diffusion.karras rho", lambda m, call: call(3, 0.1, 2.0, rho=3.0))
example("diffusion.geometric", lambda m, call: call(3, 0.1, 2.0))
example("diffusion.variance_preserving", lambda m, call: call(3, 2.0))
for kind in COVARIANCES:
    example(
        f"diffusion.of_mixture {kind}",
        lambda m, call, kind=kind: call(mixture(m, kind), then=lambda score: score(points(m), 0.7)),
    )
SHARES = torch.tensor([0.9, 0.6, 0.3, 0.05], dtype=F64)  # of the signal at each time index of a network


def predict(x: Tensor, t: Tensor) -> Tensor:
    return (0.5 * x - 0.25) * (1 + t.to(x.dtype))[:, None]


for prediction in ("eps", "v", "x0"):
    example(
        f"diffusion.of_network {prediction}",
        lambda m, call, prediction=prediction: call(
            *(predict, m(SHARES), prediction), then=lambda made: made.score(points(m), 1.0)
        ),
    )
example(
    "diffusion.of_network levels",
    lambda m, call: call(
        predict, m(SHARES), "eps", then=lambda made: (made, made.score(m(POINTS[:4]), made.levels[:, None]))
    ),
)
example("diffusion.evaluate", lambda m, call: call(pull, points(m), 0.7, name="pull"))
example(
    "diffusion.draw",
    lambda m, call: call(diffusion.Transition(points(m), 0.5), generator=m.generator()),
)
example("diffusion.draw without-noise", lambda m, call: call(diffusion.Transition(points(m), 0.0), generator=None))
example("diffusion.denoised", lambda m, call: call(pull, points(m), 0.7))
example("diffusion.transition", lambda m, call: call(pull, points(m), 0.7, 0.5))
example("diffusion.transition churn", lambda m, call: call(pull, points(m), 0.7, 0.5, churn=0.5))
example("diffusion.posterior_transition", lambda m, call: call(pull, points(m), 0.7, 0.5))
for method in ("euler", "heun", "dpmpp_2m", "ab3", "abm3"):
    example(
        f"diffusion.sample method={method}",
        lambda m, call, method=method: call(pull, points(m), m.exact(LEVELS, host=True), method=method),
    )
for method in ("maruyama", "ancestral"):
    example(
        f"diffusion.sample method={method}",
        lambda m, call, method=method: call(
            pull, points(m), m.exact(LEVELS, host=True), method=method, generator=m.generator()
        ),
    )
for method in ("ab3", "abm3"):
    example(
        f"diffusion.sample long-{method}",
        lambda m, call, method=method: call(
            pull, points(m), m.exact(diffusion.geometric(20, 0.1, 2.0), host=True), method=method
        ),
    )
example(
    "diffusion.sample churn",
    lambda m, call: call(
        *(pull, points(m), m.exact(LEVELS, host=True)), method="maruyama", churn=0.5, generator=m.generator()
    ),
)
example(
    "diffusion.sample step",
    lambda m, call: call(
        *(pull, points(m), m.exact(LEVELS)),
        method=guidance.soft_best_of_n_step(lambda y, s: y[:, 0] / (1 + s), 2.0, 3),
        generator=m.generator(),
    ),
)
example("diffusion.denoising_loss", lambda m, call: call(pull, points(m), 0.7, points(m)))
example(
    "diffusion.denoising_loss levels",
    lambda m, call: call(pull, points(m), m(numbers(6, 1).abs(), rows=True), points(m)),
)

example("guidance.classifier_free", lambda m, call: call(pull, push, 2.0, then=lambda score: score(points(m), 0.7)))
example(
    "guidance.classifier_free levels",
    lambda m, call: call(pull, push, lambda s: 1 + s, then=lambda score: score(points(m), 0.7)),
)
example(
    "guidance.plug_in",
    lambda m, call: call(pull, lambda x: x[:, 0] ** 2, 2.0, then=lambda score: score(points(m), 0.7)),
)
example(
    "guidance.plug_in levels",
    lambda m, call: call(
        *(pull, lambda x: x[:, 0] ** 2, 2.0), guidance_scale=lambda s: 1 + s, then=lambda score: score(points(m), 0.7)
    ),
)
for kind in COVARIANCES:

    def both(m: Inputs, kind: str = kind) -> tuple[GaussianMixture, mixtures.Tilted]:
        ref = mixture(m, kind)
        return ref, tilted(m, ref)

    example(
        f"guidance.exact_value {kind}",
        lambda m, call, both=both: call(both(m)[1], then=lambda score: score(points(m), 0.7)),
    )
    example(f"guidance.value_gradient {kind}", lambda m, call, both=both: call(*both(m), points(m), 0.7))
    example(
        f"guidance.log_values {kind}",
        lambda m, call, both=both: call(*both(m), then=lambda value: value(points(m), 0.7)),
    )
    for damped in (False, True):
        example(
            f"guidance.plug_in_quadratic {kind} damped={damped}",
            lambda m, call, kind=kind, damped=damped: call(
                mixture(m, kind), quadratic(m), m(SLOPE), 2.0, damped=damped, then=lambda score: score(points(m), 0.7)
            ),
        )
example(
    "guidance.plug_in_quadratic linear",
    lambda m, call: call(mixture(m), None, m(SLOPE), 2.0, then=lambda score: score(points(m), 0.7)),
)
for kind, kernel in {"transition": diffusion.transition, "posterior": diffusion.posterior_transition}.items():
    example(
        f"guidance.soft_best_of_n_step {kind}",
        lambda m, call, kernel=kernel: call(
            *(lambda y, s: y[:, 0] / (1 + s), 2.0, 3),
            kernel=kernel,
            then=lambda step: step(pull, points(m), 0.7, 0.5, m.generator()),
        ),
    )


def clouds(m: Inputs) -> Tensor:
    return m(numbers(3, 8, 2), rows=True)


example(
    "guidance.particles",
    lambda m, call: call(pull, pull, clouds(m), m.exact(LEVELS, host=True), lambda y: y[:, 0], generator=m.generator()),
)
for name, scheme in SCHEMES.items():
    example(
        f"guidance.particles {name}",
        lambda m, call, scheme=scheme: call(
            *(pull, push, clouds(m), m.exact(LEVELS), lambda y: y[:, 0]),
            log_values=lambda y, s: y[:, 0] / (1 + s),
            generator=m.generator(),
            kernel=partial(diffusion.transition, churn=0.5),
            threshold=0.99,
            scheme=scheme,
            start_log_weights=m(numbers(3, 8), rows=True),
        ),
    )

example(
    "guidance.particles chunk on_step",
    lambda m, call: call(
        *(pull, push, clouds(m), m.exact(LEVELS), lambda y: y[:, 0]),
        log_values=lambda y, s: y[:, 0] / (1 + s),
        generator=m.generator(),
        chunk=5,
        on_step=lambda s, so_far: None,
    ),
)

LAWS = (lambda m: m.law(LOGITS[0]), lambda m: m.law(LOGITS[1]))
COUNTS = torch.tensor([3.0, 5.0, 1.0], dtype=F64)
example("verify.log_e_value", lambda m, call: call(m.exact(COUNTS), LAWS[0](m)))
example("verify.log_e_value versus", lambda m, call: call(m.exact(COUNTS), LAWS[0](m), versus=[LAWS[1](m)]))
example("verify.match", lambda m, call: call(m(OUTCOMES), LAWS[0](m), claim="a"))
example(
    "verify.match versus",
    lambda m, call: call(m(OUTCOMES), LAWS[0](m), claim="a", versus=[LAWS[1](m)], alpha=1e-3, miss=1e-3),
)
example("verify.match_counts", lambda m, call: call(m.exact(COUNTS), LAWS[0](m), claim="a"))
example(
    "verify.match_counts versus",
    lambda m, call: call(m.exact(COUNTS), LAWS[0](m), claim="a", versus=[LAWS[1](m)], alpha=1e-3, miss=1e-3),
)
example("verify.mean", lambda m, call: call(m(numbers(9)), 0.1, low=-1.0, high=1.0, claim="a"))
example(
    "verify.mean versus",
    lambda m, call: call(*(m(numbers(9)), 0.1), low=-1.0, high=1.0, claim="a", versus=[0.5], alpha=1e-3, miss=1e-3),
)
example("verify.plan", lambda m, call: call(LAWS[0](m), LAWS[1](m)))
example("verify.plan undeclared", lambda m, call: call(LAWS[0](m), LAWS[1](m), alpha=1e-3, miss=1e-3, declared=None))
example("verify.plan_mean", lambda m, call: call(0.1, 0.5, low=0.0, high=1.0, alpha=1e-3, miss=1e-3, declared=2))
example("verify.tv_upper_bound", lambda m, call: call(m(numbers(9).abs()), delta=1e-3))
example("verify.within", lambda m, call: call(m(OUTCOMES), LAWS[0](m), 0.5, claim="a", delta=1e-3))
example(
    "verify.within cells",
    lambda m, call: call(m(OUTCOMES), LAWS[0](m), 0.5, claim="a", cells=m(torch.tensor([0, 1, 1]))),
)
example("verify.within log_q", lambda m, call: call(m(OUTCOMES), LAWS[0](m), 0.5, claim="a", log_q=LAWS[1](m)))


def at(logps: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda samples: logps[samples]


example(
    "verify.within functions",
    lambda m, call: call(m(OUTCOMES.flatten()), at(LAWS[0](m)), 0.5, claim="a", log_q=at(LAWS[1](m))),
)
example("verify.exact", lambda m, call: call(m(numbers(4)), m(numbers(4)), claim="a"))
example("verify.exact list", lambda m, call: call([m(numbers(1)), [1.0]], [m(numbers(1)), [1.0]], eps=1e-9, claim="a"))
example("verify.bound", lambda m, call: call(m(numbers(4)), m(numbers(4) ** 2), claim="a", delta=1e-3))
example("verify.observed", lambda m, call: call(m(numbers(4)), m(numbers(1)[0]), claim="a"))
example("verify.observed number", lambda m, call: call(m(numbers(4)), 2.0, claim="a"))
example("verify.report", lambda m, call: call(verify.exact(m(numbers(4)), m(numbers(4)), claim=next_claim())))
example(
    "verify.falsify",
    lambda m, call: call(
        lambda wrong: verify.exact(m(numbers(4)), wrong, claim="a"), m(numbers(4) + 1), claim=f"{next_claim()}!wrong"
    ),
)
example("verify.Verdict", lambda m, call: call("a", "exact", "PASS", 1, eps=1e-9, error=0.0))
example("verify.Verdict.line", lambda m, call: call(verify.exact(m(numbers(4)), m(numbers(4)), claim="a")))
example("verify.rng", lambda m, call: call("a", salt="b", then=lambda g: g.initial_seed()))
