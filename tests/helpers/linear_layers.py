"""A small FusedFVAELinear whose every path has an effect."""

from typing import Any

import torch
from torch import nn

import fvae_kernels as fk
from tests.helpers.recipe import SMALL_NETWORKS

SMALL = {**SMALL_NETWORKS, "rank": 3}


def config(**options: Any) -> fk.FVAEConfig:
    return fk.FVAEConfig(**{**SMALL, **options})


def randomised(layer: nn.Module, seed: int = 0) -> Any:
    """Heads start at zero: change all parameters, so that every path has an effect."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in layer.adapter.parameters():  # type: ignore[union-attr]
            p.add_(0.2 * torch.randn(p.shape, generator=generator).to(p))
    return layer


def make(base: nn.Module | None = None, **options: Any) -> fk.FusedFVAELinear:
    torch.manual_seed(0)
    base = nn.Linear(12, 10) if base is None else base
    return randomised(fk.FusedFVAELinear.from_linear(base, config(**options)))
