"""What torch.compile needs of torch 2.11, as docs/versions.md says it."""

import contextlib
from contextlib import AbstractContextManager

import torch

from fvae_kernels.ops._versions import parsed

TORCH = parsed(torch.__version__)


def with_checkpointing() -> AbstractContextManager[object]:
    """To compile and run a model with activation checkpointing; before 2.12 it raises CheckpointError without this."""
    if TORCH >= (2, 12):
        return contextlib.nullcontext()
    # not by monkeypatch: once that has undone it, 2.11 says that the setting does not exist
    return torch._dynamo.config.patch(skip_fwd_side_effects_in_bwd_under_checkpoint=True)
