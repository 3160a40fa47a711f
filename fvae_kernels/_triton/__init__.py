"""Triton kernels and their launchers; importing this registers them.

They run on CUDA tensors, ROCm's included. Where Triton interprets its kernels (TRITON_INTERPRET=1, read when this is
imported), they run on CPU tensors as well.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch

from .. import _library
from .._backend import interpreting
from . import divergence, encode, layer, layer_bwd, reconstruct, reconstruct_bwd

DEVICES = ("cpu", "cuda") if interpreting() else ("cuda",)

LAUNCHERS: dict[str, Callable[..., Any]] = {
    "encode_fwd": encode.encode_fwd,
    "encode_bwd": encode.encode_bwd,
    "divergence_fwd": divergence.divergence_fwd,
    "divergence_bwd": divergence.divergence_bwd,
    "reconstruct_fwd": reconstruct.reconstruct_fwd,
    "reconstruct_bwd": reconstruct_bwd.reconstruct_bwd,
    "layer_fwd": layer.layer_fwd,
    "layer_bwd": layer_bwd.layer_bwd,
}


def _on_its_device(launcher: Callable[..., Any]) -> Callable[..., Any]:
    """Triton launches on the current device; this makes that the one of the tensors."""

    @functools.wraps(launcher)
    def run(*args: Any) -> Any:
        with torch.cuda.device_of(next(a for a in args if isinstance(a, torch.Tensor))):
            return launcher(*args)

    return run


for _name, _launcher in LAUNCHERS.items():
    torch.library.impl(f"{_library.NAMESPACES['triton']}::{_name}", DEVICES, _on_its_device(_launcher))
