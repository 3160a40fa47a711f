"""Triton kernels and their launchers; importing this registers them.

They run on CUDA tensors, which ROCm's are too. If Triton interprets its kernels (TRITON_INTERPRET=1, read when this is
imported), they also run on CPU tensors.
"""

import functools
import sys
from collections.abc import Callable
from typing import Any

import torch

from ..ops import _raw
from ..ops._backend import interpreting
from . import divergence, encode, geometry, reconstruct, reconstruct_bwd
from .layer import steps

DEVICES = ("cpu", "cuda") if interpreting() else ("cuda",)

LAUNCHERS: dict[str, Callable[..., Any]] = {
    "encode_fwd": encode.encode_fwd,
    "encode_bwd": encode.encode_bwd,
    "divergence_fwd": divergence.divergence_fwd,
    "divergence_bwd": divergence.divergence_bwd,
    "geometry_fwd": geometry.geometry_fwd,
    "reconstruct_fwd": reconstruct.reconstruct_fwd,
    "reconstruct_bwd": reconstruct_bwd.reconstruct_bwd,
    "layer_fwd": steps.layer_fwd,
    "layer_bwd": steps.layer_bwd,
}


FIXED = (
    "divergence_mean",
    "layer_mean",
    "layer_reduce",
    "reconstruct_mean",
    "reduce",
)  # one shape for all


def tuned() -> dict[str, list[str]]:
    """Kernels that take their blocks from a table, with the names of the blocks."""
    package = __name__.rpartition(".")[0]
    modules = [module for name, module in sorted(sys.modules.items()) if name.startswith(f"{package}.")]
    found = {name: kernel for module in modules for name, kernel in vars(module).items() if name.endswith("_kernel")}
    names = {name.removesuffix("_kernel"): kernel.arg_names for name, kernel in found.items()}
    return {n: [a for a in names[n] if a.startswith("BLOCK_")] for n in sorted(names) if n not in FIXED}


def _on_its_device(launcher: Callable[..., Any]) -> Callable[..., Any]:
    """Make the device of the tensors the current one, on which Triton launches."""

    @functools.wraps(launcher)
    def run(*args: Any) -> Any:
        with torch.cuda.device_of(next(a for a in args if isinstance(a, torch.Tensor))):
            return launcher(*args)

    return run


for _name, _launcher in LAUNCHERS.items():
    torch.library.impl(f"{_raw.NAMESPACES['triton']}::{_name}", DEVICES, _on_its_device(_launcher))
