"""Hooks on an adapted model: begin and end its forwards, and turn the task loss it returns into the total loss (6).

They sit on the model, on the modules inside it that take masks, and on its blocks. The inner ones serve callers that
bypass the model's own call: feature extraction, `model.forward(...)`, a head that calls the trunk.
"""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..ops._host import renewed
from .attach import attach_forward, weighted_sum
from .aux_loss import AuxLossLayer, aux_loss_layers
from .cached import inherit, keep_values, take_values
from .forward import Forward, local, region
from .inject import InjectAuxLossOnce, InjectInTransform, transformed
from .outputs import given, replaced, task_loss, tensors
from .padding import ARGUMENTS, PaddingRules, Stated, mask_argument
from .recompute import in_backward
from .token_share import observe_items, token_share


class AuxLossHooks:
    """All hooks of a model.

    They sit on the base model: PeftModel.forward calls it directly if no task type is set, and adapters that were
    injected in place have no PeftModel.
    """

    def __init__(self, model: nn.Module) -> None:
        self.external = False  # the caller attaches the loss
        self.meter: Any = None  # LossMeter of a log; gets the task loss and the total loss of each forward
        self.scopes: list[Scope] = []
        self.slowed: list[Any] = []  # nn.TransformerEncoders: their fast path would bypass the layers
        self.refresh(model)

    def refresh(self, model: nn.Module) -> None:
        """Find the layers again; they change when adapters are added."""
        self.remove()
        layers = {name: module for name, module in model.named_modules() if isinstance(module, AuxLossLayer)}
        self.layers = list(layers.values())
        for name, layer in layers.items():
            layer.aux_key.name = name
        self.scopes = [Scope(self, model, "", layers)]
        for name in inner_scopes(model, list(layers)):
            self.scopes.append(Scope(self, model.get_submodule(name), name, layers))
        for module in model.modules():
            if isinstance(module, nn.TransformerEncoder) and module.use_nested_tensor and aux_loss_layers(module):
                module.use_nested_tensor = False
                self.slowed.append(module)

    def remove(self) -> None:
        """Take the hooks off."""
        for scope in self.scopes:
            scope.remove()
        for module in self.slowed:
            module.use_nested_tensor = True
        self.scopes, self.slowed = [], []

    def trains(self) -> bool:
        """True if an adapter is in training. The model's own mode does not tell: with PEFT it may be eval."""
        return any(layer.training for layer in self.layers)


class Scope:
    """Hooks on one module, before and after each of its calls."""

    def __init__(self, hooks: AuxLossHooks, module: nn.Module, name: str, layers: dict[str, Any]) -> None:
        self.hooks, self.root = hooks, not name
        self.rules = PaddingRules(module, root=self.root)
        prefix = f"{name}." if name else ""
        self.arguments = {
            layer.aux_key: mask_argument(module, path.removeprefix(prefix))
            for path, layer in layers.items()
            if path.startswith(prefix) and path
        }
        self.handles = (
            module.register_forward_pre_hook(self.before, with_kwargs=True),
            module.register_forward_hook(self.after, with_kwargs=True, always_call=True),
        )

    def remove(self) -> None:
        """Take the hooks off."""
        for handle in self.handles:
            handle.remove()

    def before(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        """Begin a forward or join the running one, and note the masks."""
        forward = self._begin()
        local.stack.append((forward, len(forward.calls)) if isinstance(forward, Forward) else forward)
        if not isinstance(forward, Forward):
            return None
        outer = forward.scopes[-1][1] if forward.scopes else None
        forward.scopes.append((self.arguments, self.rules.note(args, kwargs, outer)))
        return (args, observe_items(kwargs)) if self.root and "num_items_in_batch" in kwargs else None

    def _begin(self) -> Any:
        """The running Forward or a new one; or the hooks, if nothing is trained here or calls are recomputed."""
        if local.stack:
            running = local.stack[-1]
            if isinstance(running, tuple) or running is self.hooks:
                return running[0] if isinstance(running, tuple) else running
        if not self.hooks.trains() or (in_backward() and region() is not None):
            return self.hooks
        forward = Forward(torch.is_grad_enabled())
        inherit(forward, self.arguments)
        return forward

    def after(self, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
        """Replace the task loss by the total loss, if the module returned one."""
        entry = local.stack.pop()
        if not isinstance(entry, tuple):
            return None
        forward, start = entry
        scope = forward.scopes.pop()
        if output is None:  # it raised, or it has no output to tie the forward to
            if not forward.scopes:
                forward.pending = []
            return None
        compiling, outermost = torch.compiler.is_compiling(), not forward.scopes
        if outermost:
            local.traced.clear()
            if compiling or forward.compiled:
                local.traced.append(scope)
        if forward.recomputed and not compiling:
            forward.recall(tensors(output), start)
        if not (outermost or self.root):
            return None
        if self.hooks.external:
            return self._leave(forward, output) if outermost else None
        named = given(args, kwargs, self.rules.positional) if forward.grad else {}
        loss = task_loss(output, named) if forward.grad else None
        if loss is None:
            return self._leave(forward, output) if outermost else None
        if not (forward.pending or forward.values):
            return None
        total = attach_forward(forward, loss, token_share(module, named), forward.pending, forward.values)
        if self.hooks.meter is not None and not compiling:
            self.hooks.meter.add(loss, total)
        return replaced(output, loss, total)

    def _leave(self, forward: Forward, output: Any) -> Any:
        """End a forward that returned no loss."""
        if not forward.grad:
            keep_values(forward.values)
            return None
        compiled = [term for term in forward.pending if term.call is None]
        if self.hooks.external and compiled:
            local.compiled.append(weighted_sum(compiled, []))
        if compiled:
            forward.pending = [term for term in forward.pending if term.call is not None]
        if not (torch.compiler.is_compiling() or transformed()) and (forward.pending or forward.values):
            nodes = {term.loss.grad_fn for term in forward.pending}
            for tensor in [t for t in tensors(output, 1) if t.grad_fn in nodes]:  # output of a layer itself
                output = replaced(output, tensor, renewed(tensor))
            forward.own(tensors(output))
        inject = compiled and not self.hooks.external
        if transformed() and forward.pending:
            compiled, inject = forward.pending, True
        carrier = next((t for t in tensors(output, 1) if t.is_floating_point()), None) if inject else None
        if carrier is None:
            return output
        loss = weighted_sum(compiled, [])
        injected = InjectInTransform.apply(carrier, loss, 1.0) if transformed() else _once(carrier, loss)
        return replaced(output, carrier, injected)


def _once(carrier: Tensor, loss: Tensor) -> Tensor:
    """Inject the losses that compiled code recorded, with weight 1, as eager mode does without a loss."""
    return InjectAuxLossOnce.apply(carrier, loss)


def inner_scopes(model: nn.Module, layers: list[str]) -> list[str]:
    """Modules above an adapted layer that take a mask, down to its block (an entry of a module list)."""
    found: dict[str, None] = {}
    for layer in layers:
        parts = layer.split(".")
        for i in range(1, len(parts)):
            name = ".".join(parts[:i])
            module, parent = model.get_submodule(name), model.get_submodule(".".join(parts[: i - 1]))
            block = isinstance(parent, nn.ModuleList) or isinstance(
                module, (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)
            )
            if block or takes_mask(module):
                found[name] = None
            if block:
                break
    return list(found)


def takes_mask(module: nn.Module) -> bool:
    """True if its forward has an argument that takes a mask."""
    return not isinstance(module, AuxLossLayer) and any(
        name in ARGUMENTS for name in inspect.signature(module.forward).parameters
    )


def install_hooks(model: nn.Module) -> None:
    """Put the hooks on `model`, or let existing ones find new layers."""
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


def hooks_of(model: nn.Module) -> list[AuxLossHooks]:
    """The hooks on the model and on models inside it."""
    found: list[Any] = [getattr(module, "_fvae_hooks", None) for module in model.modules()]
    return [hooks for hooks in found if hooks is not None]


@contextmanager
def token_mask(mask: Tensor | None = None, **arguments: Tensor) -> Iterator[None]:
    """In this context `mask` says which tokens enter the objective, in place of the masks among the arguments.

    For masks that the package cannot find: packed sequences, tokens ``[T, B]``, a decoder masked by its labels, a mask
    under another name.

        with fk.token_mask(keep):
            loss = model(inputs, labels)
        with fk.token_mask(decoder_attention_mask=labels != -100):
            loss = model(input_ids, attention_mask=attention_mask, labels=labels).loss

    It holds for this thread: replicas of DataParallel do not see it.

    Args:
        mask: one entry for each token ``[...]`` of the adapted layers' inputs, True or non-zero if it counts; None
            counts all. A layer with other tokens takes its mask among the arguments; if there is none, all of its
            tokens count, and a warning says so once.
        arguments: masks by the name of an argument, as if the model had got them, for the objective alone; for the
            layers that this argument masks: attention_mask, decoder_attention_mask or encoder_attention_mask.

    Raises:
        TypeError: for another argument, or both kinds of masks.
    """
    unknown = sorted(set(arguments) - set(ARGUMENTS))
    if unknown or (arguments and mask is not None):
        what = f"an argument {unknown[0]!r}" if unknown else "a mask for all layers and masks by argument"
        raise TypeError(f"token_mask got {what}; expected a mask, or masks by name, of {list(ARGUMENTS)}")
    flags = {name: value.ne(0) for name, value in arguments.items()}
    local.masks.append(Stated(None if mask is None else mask.ne(0), flags))
    try:
        yield
    finally:
        local.masks.pop()


@contextmanager
def external_loss(model: nn.Module) -> Iterator[None]:
    """In this context the hooks add nothing, in any number of forwards. The caller calls `attach_aux_loss` once."""
    roots = hooks_of(model)
    local.compiled = []
    take_values([layer.aux_key for layer in aux_loss_layers(model)])
    for hooks in roots:
        hooks.external = True
    try:
        yield
    finally:
        for hooks in roots:
            hooks.external = False


@contextmanager
def masks_noted() -> Iterator[None]:
    """In this context adapted layers can ask for the mask of their tokens in eval mode too."""
    local.stack.append((Forward(grad=False), 0))
    try:
        yield
    finally:
        local.stack.pop()
