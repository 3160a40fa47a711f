"""Every kernel, at every entry of its table, for every target; prints a table of what the compiler made of it.

python -m tests.triton_tools.compile_all [target ...]
"""

import itertools
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


def layer_calls(
    N: int, dtype: torch.dtype, D: int = 768, R: int = 16, H: int = 128, bare: bool = False, x_dtype: Any = None
) -> Iterator[tuple[str, tuple[Any, ...]]]:
    """The same for the whole layer; `bare` is with linear encoders, averaged latents, and noise that is given."""

    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=dtype)

    def chain(*sizes: int) -> list[Tensor | None]:
        pairs = [(empty(b, a), None if bare else empty(b)) for a, b in itertools.pairwise(sizes)]
        return [t for pair in pairs for t in pair]

    wide = torch.float64 if dtype == torch.float64 else torch.float32
    x, base = (torch.empty(N, n, dtype=x_dtype or dtype) for n in (D, D))
    encoder = [*chain(D, R), *chain(D, R)] if bare else [*chain(D, 16), *chain(16, R), *chain(16, R)]
    decoder = chain(R if bare else 2 * R, *(() if bare else (H, H, H)), D)
    noise = [empty(N, R) if bare else None for _ in range(2)]
    mask = torch.empty(N, dtype=torch.bool) if bare else None
    inputs = (x, encoder, encoder, decoder, empty(D), empty(D, R), *noise, mask, torch.empty((), dtype=torch.int64))
    inputs = (*inputs, 0.0 if bare else 0.1, bare, 1.0, 1.5, [0.5] * 36)
    loss, width = torch.empty((), dtype=wide), 4 * R if bare else 32 + 4 * R
    saved = (torch.empty(N, width, dtype=wide), torch.empty(D, dtype=wide))
    yield "layer_fwd", (None if bare else base, *inputs)
    yield "layer_bwd", (base, loss, *(None,) * 3, *inputs, *saved, bare, [not bare, True, True, not bare, True])


def compiled(target: str, size: str, dtype: torch.dtype, calls: Any = calls) -> Iterator[dict[str, Any]]:
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
                for row in itertools.chain(*(compiled(target, size, dtype, of) for of in (calls, layer_calls))):
                    start = f"{row['kernel']:34}{target:8}{str(dtype)[6:]:9}{size:6}"
                    print(start + "".join(f"{row[name]:12.4g}" for name in COLUMNS), flush=True)


if __name__ == "__main__":
    main()
