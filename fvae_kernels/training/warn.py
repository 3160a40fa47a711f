"""Warnings of training, each said once."""

import warnings
from collections.abc import Hashable

said: set[Hashable] = set()


def once(kind: Hashable, text: str) -> None:
    """Warn with `text`, unless a warning of this kind has been said."""
    if kind not in said:
        said.add(kind)
        warnings.warn(f"FVAE: {text}", stacklevel=3)


def unprobed() -> None:
    """Say that terms entered without a loss."""
    once(
        "unprobed",
        "the auxiliary loss entered the gradient with weight 1 for each forward, since the model did not "
        "compute the task loss. That is right for one forward and one unscaled backward per step; with accumulation"
        " or a GradScaler use `loss = fvae_kernels.attach_aux_loss(model, loss)`, or, for a trainer that computes "
        "its own loss, `fvae_kernels.prepare_trainer(trainer)`.",
    )


def in_eval(*_: object) -> None:
    """Say that an adapter is trained in eval mode; a hook on the gradient of its output."""
    once(
        "eval",
        "a backward came to an adapter in eval mode. There it takes its mean, draws no sample and has no "
        "objective, so the gradient is the task's alone. Call model.train() to train it.",
    )
