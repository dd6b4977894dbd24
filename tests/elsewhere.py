"""A pretended accelerator: it finds device mistakes on a machine that has none.

A `Tensor` of this device says that it lies on `DEVICE`; its numbers are an ordinary tensor inside, computed on the CPU,
so results can be compared bit for bit. What a real device refuses is refused: an operation on tensors of both devices,
a generator of the other device, `numpy()` without `cpu()`. It works at the dispatcher, below autograd, so nothing has
to be listed: every operation of torch passes here.

    with elsewhere.Pretend() as device:
        y = categorical.sample(logps.to(elsewhere.DEVICE), 5, generator=device.generator(0))
    device.waits        how often the host waited for the device, by operation and by function of tiltlib
    device.checks       how many of these waits were reads of an argument check
    device.broken       operations that met an index out of range, which on a real device ends the process

`DEVICE` is called "meta", a name that torch accepts without a driver. While `Pretend` is on, nothing else is meta.
"""

import sys
from collections import Counter

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

DEVICE = torch.device("meta")

# Operations that a real device makes the host wait for: a value is read, or the shape of the result depends on values.
READS = set(
    """_local_scalar_dense is_nonzero equal nonzero masked_select bincount histc unique_dim unique_consecutive
_unique2 multinomial linalg_eigh _linalg_eigh _linalg_check_errors linalg_cholesky_ex""".split()
)
# They carry numbers from one device to the other.
COPIES = {"_to_copy", "copy_"}


class DeviceMistake(RuntimeError):
    """What a real device would have refused, or would have done on the wrong one."""


class Tensor(torch.Tensor):
    """A tensor that lies elsewhere."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(
            cls,
            inner.shape,
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=DEVICE,
        )

    def __init__(self, inner):
        self.inner = inner

    def __repr__(self):
        return f"elsewhere: {self.inner!r}"

    def tolist(self):
        return self.cpu().tolist()

    def __array__(self, *args, **options):
        raise TypeError("can't convert a tensor elsewhere to numpy, use cpu() first")

    numpy = __array__

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise DeviceMistake(f"{func} on a tensor elsewhere, while Pretend is not on")


class _FromNumbers(TorchFunctionMode):
    """Build torch.tensor(...) here and carry it over: it is made below the dispatcher, where nothing is seen."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func in (torch.tensor, torch.as_tensor, torch.asarray) and not isinstance(args[0], torch.Tensor):
            device = kwargs.pop("device", None)
            here = func(*args, **kwargs)
            return here if device is None else here.to(device)
        return func(*args, **kwargs)


class Pretend(TorchDispatchMode):
    """The mode in which the device exists."""

    def __init__(self):
        super().__init__()
        self.waits = Counter()
        self.checks = 0
        self.broken = []
        self._generators = []  # kept alive, so that no other gets the address of one of them

    def __enter__(self):
        self._numbers = _FromNumbers()
        self._numbers.__enter__()
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        self._numbers.__exit__(*error)

    def generator(self, seed):
        """Make a generator that lives on the device."""
        self._generators.append(torch.Generator().manual_seed(seed))
        return self._generators[-1]

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        name = func._schema.name.removeprefix("aten::")
        leaves = tree_leaves((args, kwargs))
        there = [x for x in leaves if isinstance(x, Tensor)]
        here = [x for x in leaves if isinstance(x, torch.Tensor) and not isinstance(x, Tensor)]
        if there and name not in COPIES:
            # A number on the CPU may take part in arithmetic. Indices on the CPU are legal too, but copied each time.
            pointwise = torch.Tag.pointwise in func.tags or name == "where"
            if not all(pointwise and x.ndim == 0 for x in here):
                shapes = [[tuple(x.shape) for x in group] for group in (here, there)]
                raise DeviceMistake(f"{name} of tensors on the CPU {shapes[0]} and elsewhere {shapes[1]}")
        device = kwargs.get("device")
        to_there = bool(there) if device is None else torch.device(device).type == DEVICE.type
        if name == "copy_":
            to_there = isinstance(args[0], Tensor)
        generators = [x for x in leaves if isinstance(x, torch.Generator)]
        for generator in generators:
            if any(generator._cdata == g._cdata for g in self._generators) != to_there:
                raise DeviceMistake(f"{name} {'elsewhere' if to_there else 'on the CPU'} with a generator of the other")
        if to_there and not generators and (name.startswith("rand") or _takes_a_generator(func)):
            if func._schema.is_mutable:
                return args[0]  # nn.utils.skip_init fills a layer on "meta" and counts on it that nothing is drawn
            raise DeviceMistake(f"{name} elsewhere draws from the global generator")
        if there and (name in READS or _masks(name, args) or name in COPIES and not to_there):
            self.waits[name, _place()] += 1
            self.checks += _in_a_check()
        if device is not None:
            kwargs["device"] = torch.device("cpu")
        try:
            out = func(*tree_map(_inner, args), **tree_map(_inner, kwargs))
        except (IndexError, RuntimeError) as error:
            self.broken += [name] if isinstance(error, IndexError) or "out of bounds" in str(error) else []
            raise
        if not to_there:
            return out
        known = {id(x.inner): x for x in there}  # an operation in place returns the tensor that it was given

        def outer(x):
            return x if not isinstance(x, torch.Tensor) else known[id(x)] if id(x) in known else Tensor(x)

        return tree_map(outer, out)


def _inner(x):
    return x.inner if isinstance(x, Tensor) else x


def _takes_a_generator(func):
    return any(argument.name == "generator" for argument in func._schema.arguments)


def _masks(name, args):
    """Say whether an index is a mask, whose number of entries has to be counted."""
    indices = tree_leaves(args[1:2]) if name.startswith("index") else []
    return any(isinstance(x, torch.Tensor) and x.dtype in (torch.bool, torch.uint8) for x in indices)


def _place():
    """Name the innermost function of tiltlib that is running, other than an argument check."""
    frame = sys._getframe(1)
    while frame:
        module = frame.f_globals.get("__name__", "")
        if module.startswith("tiltlib.") and module != "tiltlib._checks":
            return f"{module.removeprefix('tiltlib.')}.{frame.f_code.co_name}"
        frame = frame.f_back
    return ""


def _in_a_check():
    """Say whether the innermost function of tiltlib that is running is an argument check."""
    frame = sys._getframe(1)
    while frame:
        module = frame.f_globals.get("__name__", "")
        if module.startswith("tiltlib."):
            return module == "tiltlib._checks"
        frame = frame.f_back
    return False
