"""Which tokens of each adapted layer enter its objective."""

from typing import Any

import torch
from torch import Tensor, nn

from fvae_kernels.training.aux_loss import AuxLossLayer


def forward_of(model: nn.Module, *args: Any, **inputs: Any) -> dict[str, tuple[Any, Tensor]]:
    """Each adapted layer by name, with its input in a forward."""
    seen: dict[str, tuple[Any, Tensor]] = {}
    layers = {name: module for name, module in model.named_modules() if isinstance(module, AuxLossLayer)}
    handles = [
        layer.register_forward_pre_hook(lambda module, given, name=name: seen.update({name: (module, given[0])}))
        for name, layer in layers.items()
    ]
    model(*args, **inputs)
    for handle in handles:
        handle.remove()
    assert seen
    return {name.removeprefix("base_model.model."): value for name, value in seen.items()}


def assert_counted(layer: Any, x: Tensor, flags: Tensor | None) -> None:
    """The layer's last terms are those of the tokens that `flags` keeps; None: all tokens."""
    adapter = layer.fvae_adapter["default"] if hasattr(layer, "fvae_adapter") else layer.adapter
    assert torch.allclose(adapter(x, mask=flags)[1].loss, layer.last_terms.loss, rtol=1e-10)
    if flags is not None:
        assert not torch.allclose(adapter(x)[1].loss, layer.last_terms.loss, rtol=1e-10)
