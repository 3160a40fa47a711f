"""Calls that a step makes often: those of the compiled library where it is built, else PyTorch's from Python.

Both do the same; the compiled ones take the host a fraction of the time, since they see many tensors at once.
"""

import functools
import importlib
import itertools
import operator
import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import _backend, _raw

LOOKS = operator.attrgetter("dtype", "device", "shape")


def looks_of(tensors: Sequence[Tensor]) -> Any:
    """What tells a tensor's layout: dtype, device, shape and strides. For `look_as`."""
    library = compiled()
    return [(*LOOKS(t), t.stride()) for t in tensors] if library is None else library.looks_of(tensors)


def look_as(tensors: Sequence[Tensor], looks: Any) -> bool:
    """True if `looks_of` gave these looks and would give them again."""
    library = compiled()
    same: bool = looks_of(tensors) == looks if library is None else library.look_as(tensors, looks)
    return same


def kind_of(x: Tensor, base: Tensor) -> Any:
    """What decides the path of x [..., D] and base [..., M], apart from the tokens; for comparison with another."""
    library = compiled()
    if library is not None:
        return library.kind_of(x, base)
    kind, features, rows = x.device.type, (x.shape[-1:], base.shape[-1:]), (x.shape[:-1], base.shape[:-1])
    autocast = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    dtype = torch.get_autocast_dtype(kind) if autocast else None
    return x.dtype, base.dtype, x.device, base.device, *features, rows[0] == rows[1], dtype


def draw_seed(device: torch.device) -> Tensor:
    """One int64 from torch's generator. It stays on the device, and the kernels read it there."""
    return torch.randint(2**63 - 1, (), dtype=torch.int64, device=device)


def seed_like(tensor: Tensor) -> Tensor:
    """`draw_seed` on the device of a tensor. Only where nothing is compiled."""
    library = compiled()
    made: Tensor = draw_seed(tensor.device) if library is None else library.seed_like(tensor)
    return made


def empties_like(tensors: Sequence[Tensor], flags: tuple[bool, ...]) -> Sequence[Tensor]:
    """torch.empty_like of those whose flag is True. They are dense and on one device.

    The compiled library makes them parts of one piece of memory, and no Python object of any until it is read.
    """
    library = compiled()
    made: Sequence[Tensor] = apart_like(tensors, flags) if library is None else library.empties_like(tensors, flags)
    return made


def apart_like(tensors: Sequence[Tensor], flags: tuple[bool, ...]) -> tuple[Tensor, ...]:
    """As `empties_like`, each in memory of its own, as raw operators must return them."""
    return tuple(map(torch.empty_like, itertools.compress(tensors, flags)))


def empties(like: Tensor, *kinds: Any) -> Sequence[Tensor]:
    """`like.new_empty` for each dtype and shape: ``empties(x, dtype, (N, D), dtype, (4,))``."""
    library = compiled()
    if library is None:
        return [like.new_empty(shape, dtype=dtype) for dtype, shape in zip(kinds[::2], kinds[1::2], strict=True)]
    made: Sequence[Tensor] = library.empties(like, *kinds)
    return made


def addresses_of(tensors: Sequence[Tensor]) -> Any:
    """data_ptr() of each. For `lie_at`."""
    library = compiled()
    return list(map(Tensor.data_ptr, tensors)) if library is None else library.addresses_of(tensors)


def lie_at(tensors: Sequence[Tensor], addresses: Any) -> bool:
    """True if `addresses_of` gave these addresses and would give them again."""
    library = compiled()
    same: bool = addresses_of(tensors) == addresses if library is None else library.lie_at(tensors, addresses)
    return same


def pointers(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """Arguments of a compiled kernel in the form that costs its launch least: addresses, and no named tuples.

    The tensors must outlive the launch. Without the compiled library they stay tensors, which a launch takes too.
    """
    library = compiled()
    found: tuple[Any, ...] = arguments if library is None else library.pointers(arguments)
    return found


def renewed(tensor: Tensor) -> Tensor:
    """The same memory in a tensor with a node of its own, which is no view: others may write to it in place."""
    library = compiled() if type(tensor) is Tensor else None
    view = torch.ops.aten._unsafe_view.default
    made: Tensor = view(tensor, tensor.shape) if library is None else library.renewed(tensor)
    return made


def run_step(function: type[torch.autograd.Function], step: Any, *tensors: Tensor | None) -> Sequence[Tensor]:
    """`function.apply`, or the compiled library's node of the same results, which takes the host less time.

    Compiled autograd can trace the backward of the first one only.
    """
    library = compiled()
    if library is not None and not _backward_is_compiled():
        made: Sequence[Tensor] = library.run_step(step, *tensors)
        return made
    # without `apply`'s own search for remains of torch.func in each argument: the caller looks where they can be
    return super(torch.autograd.Function, function).apply(step, *tensors)  # type: ignore[misc]


def _backward_is_compiled() -> bool:
    dynamo = sys.modules.get("torch._dynamo.compiled_autograd")
    return dynamo is not None and dynamo.compiled_autograd_enabled


@functools.cache
def compiled() -> Any:
    """The compiled library; None if it is missing, or of another version."""
    if _backend.why_missing("cpp") is not None:
        return None
    library = importlib.import_module(_raw.MODULES["cpp"])
    return library if hasattr(library, "run_step") else None
