"""The way of the objective by its first address, which scripts outside import. The code is in `training`."""

from .training.attach import attach_aux_loss
from .training.aux_loss import AuxLossLayer, aux_loss_layers

__all__ = ["AuxLossLayer", "attach_aux_loss", "aux_loss_layers"]
