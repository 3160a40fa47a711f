"""Calibration data for the tiny models, and what a layer does with it."""

from typing import Any

import torch
from torch import Tensor, nn

from tests.helpers.tiny_models import batch


def batches(kind: str = "bert", count: int = 4, size: int = 32) -> list[dict[str, Tensor]]:
    """Batches without labels."""
    found = [batch(kind, size=size, seed=100 + i) for i in range(count)]
    return [{name: t for name, t in b.items() if name != "labels"} for b in found]


def recorded(model: nn.Module, layer: nn.Module, data: list[Any]) -> Tensor:
    """All inputs ``[n, D]`` of a layer of the model."""
    found: list[Tensor] = []
    handle = layer.register_forward_pre_hook(lambda _, args: found.append(args[0].flatten(0, -2)))
    with torch.no_grad():
        for arguments in data:
            model(**arguments)
    handle.remove()
    return torch.cat(found)
