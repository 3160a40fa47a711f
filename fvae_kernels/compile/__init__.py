"""Compile ahead: ``python -m fvae_kernels.compile MODEL`` or `compile_ahead`, so that a first step need not wait.

On a GPU, Triton compiles a kernel when it is first launched: one after the other, some 20 seconds of a processor for
one kind of layer. Here they are compiled before, in parallel, for the GPU of this machine or for one that is named.
Triton keeps them in its cache on disk, where the first step of a training finds them.
"""

import os
from collections.abc import Callable, Sequence

import torch
from torch import nn

from ..ops._backend import BackendUnavailable, interpreting
from ..ops._raw import load, triton_part
from ..ops._versions import triton_obstacle
from .steps import FEW_AND_MANY, layers_of, steps_of
from .workers import Compiled, Work, compile_all

__all__ = ["Compiled", "compile_ahead"]


def compile_ahead(
    model: nn.Module,
    autocast: torch.dtype | None = None,
    tokens: Sequence[int] = FEW_AND_MANY,
    masked: Sequence[bool] = (False, True),
    target: str | None = None,
    processes: int | None = None,
    report: Callable[[Compiled], None] = lambda _: None,
) -> list[Compiled]:
    """Compile the Triton kernels that training steps of an adapted model will launch. Nothing is run.

    The model may be on any device, "meta" too. Settings of this process count: tuning.override, TF32.

    Args:
        model: has a FusedFVAELinear or layers of PEFT's, or is one.
        autocast: bfloat16 or float16 if the steps run under autocast to it.
        tokens: tokens of a batch. Kernels differ only between fewer than 8192 and more, so two numbers cover all.
        masked: with padding tokens that stay out of the objective, and without.
        target: "cuda:90" is compute capability 9.0, "hip:gfx942" an MI300; None is the GPU of this machine.
        processes: that compile at the same time; None is the number of processors.
        report: called with each kernel when it is done.

    Returns:
        A `Compiled` for each kernel. Those that did not compile have an `error`.

    Raises:
        ValueError: no adapter in the model, one that the fused kernels do not cover, an unknown target, a number out of
            range.
        RuntimeError: no target was named and there is no GPU.
        BackendUnavailable: Triton is missing, too old, or interprets its kernels.
    """
    check_triton()
    if autocast not in (None, torch.bfloat16, torch.float16):
        raise ValueError(f"autocast={autocast} is not allowed: expected torch.bfloat16, torch.float16 or None")
    if not tokens or not all(isinstance(n, int) and n >= 1 for n in tokens):
        raise ValueError(f"tokens={tokens!r} is not allowed: expected whole numbers of at least 1")
    if processes is not None and processes < 1:
        raise ValueError(f"processes={processes} is not allowed: expected a whole number of at least 1")
    ahead = triton_part("ahead")
    target = target or ahead.present_target()
    ahead.target_of(target)
    steps, missing = steps_of(layers_of(model), autocast, tokens, masked)
    if missing:
        raise ValueError(f"nothing can be compiled ahead for some layers: {'; '.join(missing)}")
    return compile_all(Work.of(target, steps), processes or len(os.sched_getaffinity(0)), report)


def check_triton() -> None:
    """Raise unless Triton can compile here.

    Raises:
        BackendUnavailable: says why it cannot.
    """
    if interpreting():
        raise BackendUnavailable("TRITON_INTERPRET is set, so kernels are interpreted and never compiled: unset it")
    if (why := triton_obstacle(False) or load("triton")) is not None:
        raise BackendUnavailable(f"the Triton kernels cannot be compiled here: {why}")
