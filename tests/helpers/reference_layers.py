"""A small adapter with random parameters, and `reference.layer` on it: for the tests of reference.py."""

import torch

from fvae_kernels import FVAEConfig, reference
from fvae_kernels.nn.adapter import FVAEAdapter
from tests.helpers.recipe import AUTHORS

D, M, R, N = 5, 4, 3, 7


def draw(*shape, scale=1.0, seed=0):
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def latents(shape=(2, N, R)):
    return [draw(*shape, scale=s, seed=i) for i, s in enumerate((1.0, 0.7, 2.0, 1.2))]


def equal(ours, theirs, tolerance=1e-12):
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


def make(dtype=torch.float64, seed=0, **options):
    """An adapter with random parameters, x and noise. FVAEAdapter only names and groups them here."""
    shape = {"rank": R, "alpha": 4.0, "encoder_hidden": (6,), "decoder_hidden": (7,), "dropout": 0.0}
    config = FVAEConfig(**{**AUTHORS, **shape, **options})
    adapter = FVAEAdapter(D, M, config, dtype=dtype)
    with torch.no_grad():
        for i, parameter in enumerate(adapter.parameters()):
            parameter.copy_(draw(*parameter.shape, scale=0.5, seed=100 * seed + i))
        adapter.decoder_scale.abs_().add_(0.3)
    return adapter, draw(2, N, D, seed=7).to(dtype), tuple(draw(2, N, R, seed=8 + i).to(dtype) for i in range(2))


def run(adapter, x, noise, **more):
    encoders = adapter._encoder(1), adapter._encoder(2)
    return reference.layer(x, *encoders, adapter._decoder(), adapter.B, adapter.config, noise, **more)
