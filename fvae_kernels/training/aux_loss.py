"""How the auxiliary loss of every layer reaches the gradient, in any training loop, exactly once.

The total loss (6) is ``task_loss + sum over layers lambda_l loss_l``, and only the training loop knows what it will do
with the task loss: divide it by accumulation steps, multiply it by a loss scale, weigh it. So

- each layer injects the gradient of its own term into the backward of its own output (`InjectAuxLoss`), and
- a probe on the model's scalar loss (`ProbeLoss`), which the same backward reaches first, notes the weight
  d(root) / d(task loss), which then is the weight of every injected term.

Nothing is lost under activation checkpointing of either kind: a reentrant recomputation builds the only graph there is,
a non-reentrant one builds a graph that is dropped. While torch.compile traces, a backward can have no side effect;
layers then record their terms and a hook adds them to the model's loss.
"""

import warnings
from typing import Any

import torch
from torch import Tensor, nn

from ..config import FVAEConfig
from ..reference import Terms
from .padding import Padding


class Seed:
    """One per forward of a model, shared by its layers: the weight of their terms, once the backward has found it."""

    def __init__(self) -> None:
        self.terms: list[tuple[float, Tensor]] = []  # loss_weight and detached loss of each layer under this seed
        self.closed = False  # attached to a loss, or its backward has begun: the next forward needs another
        self.note(None)

    def note(self, weight: Tensor | None) -> None:
        """Take d(root) / d(task loss) from the probe."""
        self.weight = weight
        self._weights: dict[tuple[float, torch.dtype, torch.device], Tensor] = {}

    def weight_of(self, loss_weight: float, dtype: torch.dtype, device: torch.device) -> Tensor:
        """The weight of a layer's loss; computed once for all layers that share it."""
        key = loss_weight, dtype, device
        if key not in self._weights:
            if self.weight is None:
                self._weights[key] = torch.full((), loss_weight, dtype=dtype, device=device)
            else:
                self._weights[key] = self.weight.to(device=device, dtype=dtype) * loss_weight
        return self._weights[key]

    def add(self, loss_weight: float, loss: Tensor) -> None:
        """Note the loss of a layer. Forwards that no backward follows do not make the list long."""
        if len(self.terms) >= 1000:
            self.terms = [(1.0, self.total())]
        self.terms.append((loss_weight, loss))

    def total(self) -> Tensor:
        """The sum of the weighted losses, detached."""
        device, dtype = self.terms[0][1].device, self.terms[0][1].dtype
        weights: dict[float, list[Tensor]] = {}
        for loss_weight, loss in self.terms:
            weights.setdefault(loss_weight, []).append(loss.to(device=device, dtype=dtype))
        return torch.stack([weight * torch.stack(losses).sum() for weight, losses in weights.items()]).sum()

    def __deepcopy__(self, memo: dict[int, Any]) -> "Seed":
        return Seed()

    def __reduce__(self) -> tuple[type["Seed"], tuple[()]]:
        return Seed, ()


class InjectAuxLoss(torch.autograd.Function):
    """Identity on `out`, in place; its backward sends the seed's weight times `loss_weight` into `loss`."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, loss: Tensor, seed: Seed, loss_weight: float) -> Tensor:
        """Keep the seed; the weight is known in backward only."""
        ctx.seed, ctx.weight_of = seed, (loss_weight, loss.dtype, loss.device)
        ctx.mark_dirty(out)  # a view could not be written to by whatever comes next, as in relu_()
        return out

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor, Tensor, None, None]:
        """The weight is the probe's, or 1 where no probe was on the way."""
        ctx.seed.closed = True
        if ctx.seed.weight is None:
            _warn_unprobed()
        return grad_out, ctx.seed.weight_of(*ctx.weight_of), None, None


class InjectAuxLossOnce(torch.autograd.Function):
    """`InjectAuxLoss` with weight 1 and no side effect: what torch.compile can trace."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, loss: Tensor) -> Tensor:
        """Keep the loss, whose dtype and device the weight takes."""
        ctx.save_for_backward(loss)
        return out.clone()  # what comes next may write to it, as relu_() does

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor, Tensor]:
        """Weight 1."""
        return grad_out, torch.ones_like(ctx.saved_tensors[0])


class ProbeLoss(torch.autograd.Function):
    """Identity on the scalar loss; its backward precedes every layer's and notes their weight."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, seed: Seed, share: Tensor | float) -> Tensor:
        """`share` is the weight of the layers' terms relative to this loss."""
        ctx.seed, ctx.share = seed, share
        return loss.view_as(loss)

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor, None, None]:
        """Note d(root) / d(loss)."""
        ctx.seed.note(grad_loss.detach() * ctx.share)
        return grad_loss, None, None


class AuxLossLayer:
    """Mixin of the adapted layers: holds what travels between a layer's forward, the model's loss and the log."""

    training: bool
    aux_seed: Seed
    aux_pending: Tensor | None  # with its graph; while compiling only
    aux_collected: bool  # a model's hooks are around this forward and collect what is pending
    aux_padding: Padding | None  # the masks of the forward that runs, or is recomputed
    aux_mask_argument: str | None  # which of them is for this layer's tokens
    aux_inside: bool  # a model's hooks are around this forward
    last_terms: Terms | None  # detached

    def _init_aux_loss(self) -> None:
        self.aux_seed, self.aux_pending, self.aux_collected, self.last_terms = Seed(), None, False, None
        self.aux_padding, self.aux_mask_argument, self.aux_inside = None, None, False

    def token_mask(self, x: Tensor, config: FVAEConfig) -> Tensor | None:
        """Which tokens of x ``[..., D]`` enter the objective; None for all of them."""
        if not config.mask_padding or self.aux_padding is None:
            return None
        if not (self.aux_inside or in_backward()):  # called alone: the masks are of some forward before
            return None
        return self.aux_padding.flags(self.aux_mask_argument, x)

    def inject(self, out: Tensor, terms: Terms, loss_weight: float) -> Tensor:
        """`out`, on whose backward the gradient of ``loss_weight * terms.loss`` arrives too."""
        if torch.compiler.is_compiling():
            loss = loss_weight * terms.loss
            if not torch.is_grad_enabled():
                return out
            if not self.aux_collected:
                return InjectAuxLossOnce.apply(out, loss)
            self.aux_pending = loss if self.aux_pending is None else self.aux_pending + loss
            return out
        if not in_backward():  # a recomputation reports nothing twice
            if self.aux_seed.closed:
                self.aux_seed = Seed()
            self.last_terms = Terms(*(term.detach() for term in terms))
            self.aux_seed.add(loss_weight, self.last_terms.loss)
        return InjectAuxLoss.apply(out, terms.loss, self.aux_seed, loss_weight) if torch.is_grad_enabled() else out


def aux_loss_layers(model: nn.Module) -> list[Any]:
    """The adapted layers of a model, in its own order."""
    return [module for module in model.modules() if isinstance(module, AuxLossLayer)]


def attach_aux_loss(model: nn.Module, loss: Tensor, weight: Tensor | float = 1.0) -> Tensor:
    """`loss` plus `weight` times the auxiliary loss of the model's last forward.

    For a loss that the model did not compute; a model called with labels needs none of this. Call it once per forward,
    in training, on the loss that the loop will scale, divide and back-propagate:

        logits = model(inputs)
        loss = fk.attach_aux_loss(model, criterion(logits, labels))
        (loss / accumulation_steps).backward()

    Args:
        model: the model that holds the adapted layers.
        loss: the task loss, a scalar.
        weight: of the auxiliary loss, relative to `loss`.

    Returns:
        The total loss (6), in the dtype of `loss`.

    Raises:
        ValueError: if `loss` is not a scalar, or no adapted layer of the model has run since the last call.
    """
    if loss.dim() != 0:
        raise ValueError(f"the loss has shape {tuple(loss.shape)}; expected a scalar: reduce it (mean or sum) first")
    layers = aux_loss_layers(model)
    pending = [layer.aux_pending for layer in layers if layer.aux_pending is not None]
    seeds = [seed for seed in {id(s): s for s in (layer.aux_seed for layer in layers)}.values() if seed.terms]
    if not pending and not seeds:
        raise ValueError(
            f"{type(model).__name__} has {len(layers)} FVAE layer(s) and none ran in training mode since the last "
            "call: call attach_aux_loss once after each forward in training, and not for a loss that the model computed"
            " itself. With torch.compile, run the forward inside `with fvae_kernels.external_loss(model):`"
        )
    if torch.is_grad_enabled():
        for seed in seeds:
            loss = ProbeLoss.apply(loss, seed, weight)
    for term in [*pending, *(seed.total() for seed in seeds)]:  # a seed's is a value: its gradient is injected
        loss = loss + (weight * term).to(loss)
    for layer in layers:
        layer.aux_pending = None
    for seed in seeds:  # the layers keep it: a recomputation in this loss's backward belongs to it
        seed.terms, seed.closed = [], True
    return loss


def in_backward() -> bool:
    """Whether the autograd engine runs on this thread, so that a forward now is a checkpoint's recomputation."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


_unprobed_warned = False


def _warn_unprobed() -> None:
    global _unprobed_warned
    if not _unprobed_warned:
        _unprobed_warned = True
        warnings.warn(
            "FVAE: the auxiliary loss entered the gradient with weight 1 for each forward, since the model did not "
            "compute the task loss. That is right for one forward and one unscaled backward per step; with accumulation"
            " or a GradScaler use `loss = fvae_kernels.attach_aux_loss(model, loss)`, or, for a trainer that computes "
            "its own loss, `fvae_kernels.prepare_trainer(trainer)`.",
            stacklevel=2,
        )
