"""Double backward through a kernel raises."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

Backward = Callable[..., tuple[Tensor | None, ...]]


def differentiable_once(backward: Backward) -> Backward:
    """`once_differentiable`, which here also raises if no incoming gradient requires grad.

    PyTorch's own marks results only if an incoming gradient requires grad. In ``torch.autograd.grad(nll, x,
    create_graph=True)`` that gradient is the constant 1, and a penalty on the result would silently have no gradient.
    """
    once = once_differentiable(backward)

    @functools.wraps(backward)
    def checked(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():  # grad mode is on under create_graph=True
            grads = tuple(g if g is None or g.requires_grad else g.detach().requires_grad_() for g in grads)
        return once(ctx, *grads)

    return checked
