"""Every kernel, at every entry of its table, for every target; prints a table of what the compiler made of it.

python -m tests.triton_tools.compile_all [target ...]
"""

import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fvae_kernels._triton import LAUNCHERS

from .gpu_compile import TARGETS, compiling, metrics

TOKENS = {"few": 1576, "many": 100_000}
COLUMNS = ("registers", "stack", "spills", "shared", "occupancy", "tensor_core", "loads", "loads_128", "stores_128")


def calls(
    N: int, dtype: torch.dtype, D: int = 768, R: int = 16, H: int = 128, bare: bool = False
) -> Iterator[tuple[str, tuple[Any, ...]]]:
    """Name and arguments of every launcher; `bare` is with a mask, and without whatever else may be None."""

    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=dtype)

    def optional(t: Tensor) -> Tensor | None:
        return None if bare else t

    mask = torch.empty(N, dtype=torch.bool) if bare else None
    x, latent, w, b = empty(N, D), empty(N, R), empty(R, D), optional(empty(R))
    decoder = (x, empty(N, H), empty(D, H), optional(empty(D)), empty(D), mask)
    posteriors = (latent, latent, latent, latent, 1.5, 1.0, mask)
    number = empty().to(torch.float64 if dtype == torch.float64 else torch.float32)
    yield "encode_fwd", (x, w, b, w, b, latent)
    yield "encode_bwd", (optional(latent), latent, optional(latent), latent, latent)
    yield "divergence_fwd", posteriors
    yield "divergence_bwd", (optional(number), number, *posteriors, [not bare, True, not bare, True])
    yield "reconstruct_fwd", decoder
    yield "reconstruct_bwd", (number, *decoder, [not bare, True, True, not bare])


def compiled(target: str, size: str, dtype: torch.dtype) -> Iterator[dict[str, Any]]:
    """Metrics of every launch."""
    for name, arguments in calls(TOKENS[size], dtype):
        with compiling(target) as kernels:
            LAUNCHERS[name](*arguments)
        for kernel in kernels:
            yield metrics(kernel)


def main() -> None:
    print(f"{'kernel':34}{'target':8}{'dtype':9}{'size':6}" + "".join(f"{name:>12}" for name in COLUMNS))
    for target in sys.argv[1:] or TARGETS:
        for dtype in (torch.bfloat16, torch.float32, torch.float64):
            for size in TOKENS:
                for row in compiled(target, size, dtype):
                    start = f"{row['kernel']:34}{target:8}{str(dtype)[6:]:9}{size:6}"
                    print(start + "".join(f"{row[name]:12.4g}" for name in COLUMNS), flush=True)


if __name__ == "__main__":
    main()
