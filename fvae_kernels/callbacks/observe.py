"""What the log observes of a layer beside its terms: the geometry of its latents and of its update."""

from typing import Any

import torch
from torch import Tensor

from ..diagnostics import (
    active_units,
    effective_rank,
    latent_geometry,
    posteriors,
    signal_to_noise,
    token_independent_share,
)
from ..nn.adapter import FVAEAdapter


def active_adapter(layer: Any) -> FVAEAdapter | None:
    """The adapter that a layer trains (PEFT: the first active one), if it has both encoders."""
    if isinstance(getattr(layer, "adapter", None), FVAEAdapter):
        return layer.adapter
    found = [layer.fvae_adapter[name] for name in layer.active_adapters if name in layer.fvae_adapter]
    return next((adapter for adapter in found if not adapter.inference_only), None)


@torch.no_grad()
def geometry(adapter: FVAEAdapter, x: Tensor, mask: Tensor | None = None) -> dict[str, Tensor | float]:
    """Geometry of both latents of x and of the update, over the tokens that `mask` keeps."""
    with torch.autocast(x.device.type, enabled=False):
        mean1, logvar1, mean2, logvar2 = posteriors(adapter, x.to(adapter.B.dtype))
    config = adapter.config
    return {
        **latent_geometry(mean1, logvar1, mean2, logvar2, config.prior2_mean, config.prior2_std, mask),
        "signal_to_noise": signal_to_noise(mean1, logvar1, mask),
        "effective_rank": effective_rank(mean1, adapter.B, mask),
        "token_independent": token_independent_share(mean1, adapter.B, mask),
        "active_units_z1": active_units(mean1, mask=mask),
        "active_units_z2": active_units(mean2, mask=mask),
    }
