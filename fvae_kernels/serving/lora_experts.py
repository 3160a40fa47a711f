"""Adapters of fused experts as PEFT's LoRA has them: one A and one B for all experts of a parameter."""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..nn.experts import ExpertLinear
from ..nn.linear import is_named
from .layers import AdaptedLayer


def is_expert(layer: AdaptedLayer) -> bool:
    """True if the layer is one expert of a fused parameter."""
    return isinstance(layer.module.base_layer, ExpertLinear)


def by_parameter(layers: list[AdaptedLayer]) -> dict[str, list[AdaptedLayer]]:
    """The layers of experts, in their order, by the full name of their parameter."""
    found: dict[str, list[AdaptedLayer]] = {}
    for layer in layers:
        if is_expert(layer):
            found.setdefault(layer.name.rpartition(".")[0], []).append(layer)
    return {name: sorted(group, key=lambda layer: layer.module.base_layer.index) for name, group in found.items()}


def stem(name: str, groups: Mapping[str, list[AdaptedLayer]]) -> str:
    """What stands before ``lora_A`` in a key: PEFT wraps experts once for each parameter, the first one innermost."""
    owner, _, parameter = name.rpartition(".")
    order = list(groups[name][0].module.base_layer._experts[0]._parameters)
    later = [other for other in order[order.index(parameter) + 1 :] if f"{owner}.{other}" in groups]
    return owner + ".base_layer" * len(later)


def stacked(factors: list[Any], rank: int) -> tuple[Tensor, Tensor]:
    """A ``[experts * rank, D]``, by experts, and B ``[M, rank * experts]``, by ranks; padded with zeros."""
    A = torch.stack([F.pad(found.A, (0, 0, 0, rank - len(found.A))) for found in factors])
    B = torch.stack([F.pad(found.B, (0, rank - len(found.A))) for found in factors])
    return A.flatten(0, 1).contiguous(), B.permute(1, 2, 0).flatten(1).contiguous()


def target_parameters(model: nn.Module, names: list[str]) -> list[str]:
    """The last two parts of the names where they name these parameters and no others; else the whole names."""
    ends = {".".join(name.rsplit(".", 2)[-2:]) for name in names}
    every = [name.replace(".base_layer.", ".") for name, _ in model.named_parameters()]
    named = [name for name in every if is_named(name, ends)]
    return sorted(ends if len(named) == len(names) else names)
