"""The gradient of a kernel is not differentiable: whoever differentiates it hears so."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

Backward = Callable[..., tuple[Tensor | None, ...]]


def differentiable_once(backward: Backward) -> Backward:
    """`once_differentiable` for every incoming gradient.

    PyTorch's own marks the results only where an incoming gradient requires grad. After ``torch.autograd.grad(nll, x,
    create_graph=True)`` it is a constant 1, and a penalty on the result would silently have no gradient.
    """
    once = once_differentiable(backward)

    @functools.wraps(backward)
    def checked(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():  # grad mode is on under create_graph=True
            grads = tuple(g if g is None or g.requires_grad else g.detach().requires_grad_() for g in grads)
        return once(ctx, *grads)

    return checked
