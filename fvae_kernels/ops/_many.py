"""Calls on many tensors at once: one of the compiled library's where it is built, else one of PyTorch's for each."""

import functools
import importlib
import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import _backend, _raw

LOOKS = operator.attrgetter("dtype", "device", "shape")


def looks_of(tensors: Sequence[Tensor]) -> Any:
    """What tells a tensor's layout: dtype, device, shape, and strides unless it is contiguous. To compare."""
    library = compiled()
    if library is not None:
        return library.looks_of(tensors)
    return [(*LOOKS(t), t.is_contiguous() or t.stride()) for t in tensors]


def empties_like(tensors: Sequence[Tensor]) -> list[Tensor]:
    """torch.empty_like of each."""
    library = compiled()
    made: list[Tensor] = list(map(torch.empty_like, tensors)) if library is None else library.empties_like(tensors)
    return made


@functools.cache
def compiled() -> Any:
    """The compiled library; None if it is missing, or of another version."""
    if _backend.why_missing("cpp") is not None:
        return None
    library = importlib.import_module(_raw.MODULES["cpp"])
    return library if hasattr(library, "empties_like") else None
