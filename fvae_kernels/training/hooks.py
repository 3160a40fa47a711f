"""The hooks on an adapted model: they find the task loss it returns, and make it the total loss (6)."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .aux_loss import AuxLossLayer, InjectAuxLossOnce, Seed, attach_aux_loss, aux_loss_layers, in_backward
from .padding import PaddingRules, mask_argument
from .token_share import token_share


class AuxLossHooks:
    """The hooks on a model: a fresh seed before each forward, and the probe on the loss that the forward returns.

    They sit on the base model, since PeftModel.forward calls it directly where no task type is set, and so do models
    into which adapters were injected in place.
    """

    def __init__(self, model: nn.Module) -> None:
        self.handles = (
            model.register_forward_pre_hook(self.before, with_kwargs=True),
            model.register_forward_hook(self.after, with_kwargs=True),
        )
        self.external = False  # somebody else attaches the loss
        self.refresh(model)

    def refresh(self, model: nn.Module) -> None:
        """Look for the layers anew; they change when adapters are added."""
        self.layers = aux_loss_layers(model)
        self.padding_rules = PaddingRules(model)
        for name, module in model.named_modules():
            if isinstance(module, AuxLossLayer):
                module.aux_mask_argument = mask_argument(model, name)

    def remove(self) -> None:
        """Take the hooks off."""
        for handle in self.handles:
            handle.remove()

    def live(self) -> bool:
        """Whether this forward trains an adapter; the model's own mode does not tell, it may be eval with PEFT."""
        return torch.is_grad_enabled() and not in_backward() and any(layer.training for layer in self.layers)

    def before(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        """The masks and a new seed for the layers of this forward."""
        if not self.live():
            return
        padding = self.padding_rules.note(args, kwargs)
        for layer in self.layers:
            layer.aux_padding, layer.aux_inside = padding, True
        if self.external:
            return
        for layer in self.layers:
            layer.aux_pending, layer.aux_collected = None, True
        if not torch.compiler.is_compiling():
            seed = Seed()
            for layer in self.layers:
                layer.aux_seed = seed

    def after(self, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
        """The total loss in place of the task loss, where the forward returned one."""
        if not self.live():
            return None
        for layer in self.layers:
            layer.aux_inside = False
        if not torch.compiler.is_compiling():
            self._recall_in_backward(output)
        if self.external:
            return None
        for layer in self.layers:
            layer.aux_collected = False
        mapping = hasattr(output, "keys")
        first = isinstance(output, tuple) and kwargs.get("labels") is not None
        loss = output.get("loss") if mapping else output[0] if first else None
        if not (isinstance(loss, Tensor) and loss.dim() == 0 and loss.requires_grad):
            return self._without_loss(output)
        if not any(layer.aux_pending is not None or layer.aux_seed.terms for layer in self.layers):
            return None
        loss = attach_aux_loss(module, loss, token_share(module, kwargs))
        if mapping:
            output["loss"] = loss
            return output
        return (loss, *output[1:])

    def _recall_in_backward(self, output: Any) -> None:
        """A backward that comes to this forward's outputs restores its masks and seeds, for recomputations."""
        then = [(layer, layer.aux_padding, layer.aux_seed) for layer in self.layers]

        def recall(_: Tensor) -> None:
            for layer, padding, seed in then:
                layer.aux_padding, layer.aux_seed = padding, seed

        for value in _tensors(output):
            if value.grad_fn is not None:
                value.register_hook(recall)

    def _without_loss(self, output: Any) -> Any:
        """What compiled code recorded enters through the output, with weight 1, as in eager mode without a loss."""
        terms = [layer.aux_pending for layer in self.layers if layer.aux_pending is not None]
        carrier = _first_differentiable(output) if terms else None
        if carrier is None:
            return None
        for layer in self.layers:
            layer.aux_pending = None
        injected = InjectAuxLossOnce.apply(carrier, torch.stack(terms).sum())
        return _replace(output, carrier, injected)


def install_hooks(model: nn.Module) -> None:
    """Put the hooks on `model`, or have those that are there look for new layers."""
    hooks = getattr(model, "_fvae_hooks", None)
    if hooks is None:
        model._fvae_hooks = AuxLossHooks(model)  # type: ignore[assignment]
    else:
        hooks.refresh(model)


def remove_hooks(model: nn.Module) -> None:
    """Undo `install_hooks`."""
    hooks = getattr(model, "_fvae_hooks", None)
    if hooks is not None:
        hooks.remove()
        del model._fvae_hooks


@contextmanager
def external_loss(model: nn.Module) -> Iterator[None]:
    """Inside, the hooks stand back, whatever the number of forwards; the caller then calls `attach_aux_loss` once."""
    found: list[Any] = [getattr(module, "_fvae_hooks", None) for module in model.modules()]
    roots = [hooks for hooks in found if hooks is not None]
    seed = Seed()
    layers = aux_loss_layers(model)
    for layer in layers:
        layer.aux_pending, layer.aux_seed, layer.aux_collected = None, seed, True
    for hooks in roots:
        hooks.external = True
    try:
        yield
    finally:
        for layer in layers:
            layer.aux_collected = False
        for hooks in roots:
            hooks.external = False


def _tensors(output: Any) -> list[Tensor]:
    if isinstance(output, Tensor):
        output = (output,)
    values = output.values() if hasattr(output, "keys") else output if isinstance(output, (tuple, list)) else ()
    return [value for value in values if isinstance(value, Tensor)]


def _first_differentiable(output: Any) -> Tensor | None:
    return next((value for value in _tensors(output) if value.is_floating_point()), None)


def _replace(output: Any, old: Tensor, new: Tensor) -> Any:
    if hasattr(output, "keys"):
        for key in list(output.keys()):
            if output[key] is old:
                output[key] = new
        return output
    if isinstance(output, (tuple, list)):
        values = [new if value is old else value for value in output]
        return type(output)(*values) if hasattr(output, "_fields") else type(output)(values)
    return new
