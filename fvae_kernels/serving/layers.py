"""The adapted layers of a model, with PEFT and without it."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..nn.adapter import FVAEAdapter
from ..nn.linear import FusedFVAELinear
from ..nn.parameters import is_served
from ..training.aux_loss import AuxLossLayer
from .folders import PREFIX


@dataclass(frozen=True)
class AdaptedLayer:
    """An adapted layer, and one of its adapters."""

    name: str  # in the base model
    module: Any  # FusedFVAELinear, or PEFT's FVAELoraLinear
    adapter: FVAEAdapter

    @property
    def transposed(self) -> bool:
        """True if the base layer stores its weight as ``[D, M]``."""
        return bool(getattr(self.module, "transposed", False) or getattr(self.module, "fan_in_fan_out", False))

    def serves(self, adapter_name: str) -> bool:
        """True if the layer's output has the adapter's update in it."""
        if isinstance(self.module, FusedFVAELinear):
            return not self.module.merged
        return (
            not self.module.merged
            and list(self.module.active_adapters) == [adapter_name]
            and not self.module.disable_adapters
        )


def adapted_layers(model: nn.Module, adapter_name: str = "default") -> list[AdaptedLayer]:
    """The layers of `model` that have this adapter. Without PEFT a layer has one adapter, called "default".

    Raises:
        TypeError: `model` is no module.
        ValueError: there are none, `model` is PEFT's tuner, or an adapter's served parameters are not finite.
    """
    check_model(model)
    found, names = [], set()
    for name, module in model.named_modules():
        if not isinstance(module, AuxLossLayer):
            continue
        adapters = {own or "default": adapter for own, adapter in module.adapters().items()}
        names |= set(adapters)
        if adapter_name in adapters:
            found.append(AdaptedLayer(name.removeprefix(PREFIX), module, adapters[adapter_name]))
    if not found:
        raise ValueError(
            f"{type(model).__name__} has no FVAE-LoRA adapter {adapter_name!r}; its adapters are {sorted(names)}"
        )
    for layer in found:
        for parameter, values in layer.adapter.named_parameters():
            if is_served(parameter, layer.adapter.config) and not torch.isfinite(values).all():
                raise ValueError(
                    f"{parameter} of the adapter of {layer.name!r} has values that are not finite: it is broken"
                )
    return found


def check_model(model: Any) -> None:
    """Raise unless it is a module whose layers have the names that a file has.

    Raises:
        TypeError: no module.
        ValueError: PEFT's tuner.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"the model is a {type(model).__name__}; expected a torch.nn.Module with adapted layers")
    if hasattr(type(model), "tuner_layer_cls"):
        raise ValueError(
            f"{type(model).__name__} is the inside of a PeftModel: pass the PeftModel, or the model itself"
        )


def check_served(layers: list[AdaptedLayer], adapter_name: str, what: str) -> None:
    """Raise unless a forward of the model serves this adapter alone.

    Raises:
        ValueError: another adapter is active, or adapters are merged or disabled.
    """
    if not all(layer.serves(adapter_name) for layer in layers):
        raise ValueError(
            f"{what} runs the model, so the adapter {adapter_name!r} must be its only active one: call "
            f"model.set_adapter({adapter_name!r}), outside of disable_adapter(), and unmerge what is merged"
        )


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode, without gradients. Afterwards every module has its own mode again."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training


def peft_config(model: Any, adapter_name: str) -> Any:
    """The adapter's config in PEFT, or None if the model's layers are without it."""
    return getattr(model, "peft_config", {}).get(adapter_name)


def exact_pattern(name: str) -> str:
    """A pattern for rank_pattern and alpha_pattern that matches this module alone."""
    return f"^{name}".replace(".", r"\.")
