"""The total loss (6) by hand: the task loss and the layers' terms, with their graphs."""

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fvae_kernels as fk
from fvae_kernels.nn.adapter import FVAEAdapter
from fvae_kernels.training.aux_loss import AuxLossLayer


def fix_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    """Noise that depends only on the position in the batch, so that two ways to compute a step get the same."""

    def draw(self: FVAEAdapter, x: Tensor) -> Tensor:
        shape = torch.Size((*x.shape[:-1], self.config.rank))
        return torch.arange(shape.numel()).to(self.B).sin().view(shape)

    monkeypatch.setattr(FVAEAdapter, "draw_noise", draw)


@contextlib.contextmanager
def by_hand(model: nn.Module) -> Iterator[list[Tensor]]:
    """In the block, layers append ``loss_weight * terms.loss`` with its graph to the list, and inject nothing."""
    collected: list[Tensor] = []

    def collect(self: AuxLossLayer, out: Tensor, terms: Any, loss_weight: float) -> Tensor:
        collected.append(loss_weight * terms.loss)
        return out

    with pytest.MonkeyPatch.context() as patch, fk.external_loss(model):
        patch.setattr(AuxLossLayer, "inject", collect)
        yield collected
