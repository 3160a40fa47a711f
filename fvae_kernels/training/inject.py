"""Autograd functions by which terms enter a gradient: through the loss, or through their layer's output."""

import functools
from typing import Any

import torch
from torch import Tensor

from .calls import Call


class InjectAuxLoss(torch.autograd.Function):
    """Identity on `out`. Its backward sends the call's gradient into `loss`."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, loss: Tensor, call: Call) -> Tensor:
        """The same memory, but no view: the next module may write to it in place (relu_)."""
        ctx.call = call
        ctx.constant = functools.partial(torch.full, (), dtype=loss.dtype, device=loss.device)
        return out.detach()

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor, Tensor | None, None]:
        """The gradient of `loss` is `Call.gradient`."""
        return grad_out, ctx.call.gradient(ctx.constant), None


class InjectAuxLossOnce(torch.autograd.Function):
    """`InjectAuxLoss` with weight 1 and no side effect, so that torch.compile can trace it."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, loss: Tensor) -> Tensor:
        """Keep the loss, whose dtype and device the weight takes."""
        ctx.save_for_backward(loss)
        return out.clone()  # the next module may write to it in place (relu_)

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor, Tensor]:
        """Weight 1."""
        return grad_out, torch.ones_like(ctx.saved_tensors[0])


class InjectInTransform(torch.autograd.Function):
    """`InjectAuxLoss` for torch.func: grad, vmap and others."""

    generate_vmap_rule = True

    @staticmethod
    def forward(out: Tensor, loss: Tensor, loss_weight: float) -> Tensor:
        """A copy, as in `InjectAuxLossOnce`."""
        return out.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        """Keep the loss, whose dtype and device the weight takes."""
        ctx.save_for_backward(inputs[1])
        ctx.loss_weight = inputs[2]

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor, Tensor, None]:
        """The layer's own weight."""
        return grad_out, torch.full_like(ctx.saved_tensors[0], ctx.loss_weight), None


def transformed() -> bool:
    """True while a transformation of torch.func runs."""
    return not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active()


class TotalLoss(torch.autograd.Function):
    """``loss + share * objective``. Its backward calls `note` with ``share * d(root) / d(task loss)``."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, objective: Tensor, share: Tensor | float, note: Any) -> Tensor:
        """`note` decides in backward if the objective takes part."""
        ctx.share, ctx.note, ctx.like = share, note, (objective.dtype, objective.device)
        return loss + (share * objective).to(loss)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None, None]:
        """Call `note`, with the id of the graph task as the name of this backward."""
        weight = (grad * ctx.share).sum()
        takes_part = ctx.note(torch._C._current_graph_task_id(), weight.detach())
        dtype, device = ctx.like
        return grad, weight.to(device=device, dtype=dtype) if takes_part else None, None, None
