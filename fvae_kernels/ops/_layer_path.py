"""Which implementation runs an adapted layer, decided once for the op, its plans and `explain`."""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..config import FVAEConfig
from . import _backend
from ._backend import BackendUnavailable, resolve
from ._raw import triton_part

tables: Any = triton_part("tables")  # what the registers of a GPU hold


class Path(NamedTuple):
    """`kind` is "fused", "composed" (of the smaller ops) or "reference"; `missing` says why not fused."""

    backend: str
    kind: str
    missing: str | None


def path_of(
    config: FVAEConfig,
    tensors: Mapping[str, Tensor | None],
    device: torch.device,
    backend: str | None = None,
    noise: Iterable[Tensor] = (),
) -> Path:
    """The path for these tensors, named as in `check_layer` or as the parameters of an adapter.

    Raises:
        BackendUnavailable: a backend was named, here or with `use_backend`, and cannot run or does not cover this.
    """
    named = _backend._selected if backend is None else backend
    backend = resolve("layer", device, backend)
    if backend == "reference":
        return Path(backend, "reference", None)
    missing = uncovered(config, tensors, noise, backend)
    if missing is None:
        return Path(backend, "fused", None)
    if named is not None:
        raise BackendUnavailable(
            f"backend {named!r} was asked for to run layer, but cannot: its kernel does not cover {missing}; leave "
            "the backend unnamed to run what there is, or name 'reference' to run plain PyTorch."
        )
    return Path(backend, "composed" if composable(tensors) else "reference", missing)


def uncovered(
    config: FVAEConfig, tensors: Mapping[str, Tensor | None], noise: Iterable[Tensor] = (), backend: str | None = None
) -> str | None:
    """What the fused kernel of `backend` does not cover; None if it covers all. No backend: what no kernel covers.

    Tensors are named as in `check_layer`, or as the parameters of an adapter.
    """
    if config.separate_hidden:
        return "separate_hidden=True"
    if any(eps.requires_grad for eps in noise):
        return "a gradient of the noise"
    first, *others = (name for name, t in tensors.items() if t is not None)
    dtypes = {name: t.dtype for name, t in tensors.items() if t is not None}
    if dtypes.get("B") == torch.float32 and dtypes.get("x") in (torch.bfloat16, torch.float16):
        first = "B"  # x is converted where it is read
    for name in others:
        if dtypes[name] != dtypes[first]:
            return f"more than one dtype ({first} is {dtypes[first]}, {name} is {dtypes[name]})"
    return _too_wide(config, tensors) if backend == "triton" else None


def _too_wide(config: FVAEConfig, tensors: Mapping[str, Tensor | None]) -> str | None:
    if config.rank > tables.WIDEST:
        return f"a rank above {tables.WIDEST} (it is {config.rank})"
    for name, t in tensors.items():
        if t is not None and "hidden" in name and name.endswith("weight") and t.shape[0] > tables.WIDEST:
            return f"a hidden layer of more than {tables.WIDEST} units ({name} is {list(t.shape)})"
    sizes = [
        t.shape[0]
        for name, t in tensors.items()
        if t is not None and name.startswith("decoder") and "hidden" in name and name.endswith("weight")
    ]
    if sum(map(tables.padded, sizes)) > tables.WIDEST_DECODER:
        return (
            f"hidden layers of the decoder of more than {tables.WIDEST_DECODER} units together, each rounded up to a "
            f"power of two (they have {', '.join(map(str, sizes))})"
        )
    return None


def autocast_products(B: Tensor, backend: str) -> torch.dtype | None:
    """The dtype to which autocast rounds the factors of products, as in PyTorch's own; None if it rounds none.

    Only products: sums, latents and the objective stay in float32, as the parameters. The C++ kernels have no 16-bit
    products and stay in float32.
    """
    device = B.device.type
    if backend != "triton" or B.dtype != torch.float32 or not torch.is_autocast_enabled(device):
        return None
    dtype = torch.get_autocast_dtype(device)
    return dtype if dtype in (torch.bfloat16, torch.float16) else None


def composable(tensors: Mapping[str, Tensor | None]) -> bool:
    """True if the smaller ops can run this: they need one dtype, with autocast or without."""
    dtypes = {t.dtype for name, t in tensors.items() if t is not None and name != "x"}
    return len(dtypes) == 1
