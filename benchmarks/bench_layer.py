"""One adapted layer: forward and backward of every side, and the inference path."""

import pytest
import torch

from .conftest import Measure
from .experiments import checked_layer
from .sides import inference_sides, names

SHAPES = [
    (1576, 768, 768),
    *(pytest.param((n, 768, 768), marks=pytest.mark.full) for n in (128, 1024, 8192, 65536)),
    *(pytest.param((512, d, 768), marks=pytest.mark.full) for d in (256, 1024, 4096, 8192)),
]
INFERENCE = ("base", "lora", "dora", "fvae", "fvae_linear", "merged", "unloaded")


@pytest.mark.timeout(900)
@pytest.mark.parametrize("side", ["base", *names()])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def bench_layer(measure: Measure, shape: tuple[int, int, int], side: str) -> None:
    found = checked_layer((side,), *shape)[side]
    N, D, M = shape
    measure(f"layer N={N} D={D} M={M} float32", found.run, found.cost())


@pytest.mark.parametrize("side", INFERENCE)
@pytest.mark.parametrize("N", [1, 128, 4096])
def bench_inference(measure: Measure, N: int, side: str) -> None:
    found = inference_sides(N, 768)
    torch.testing.assert_close(found[side].run(), found["base"].run(), rtol=1e-3, atol=1e-4)  # all start as the base
    measure(f"inference N={N} D=M=768 float32", found[side].run, found[side].cost())
