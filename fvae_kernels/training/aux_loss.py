"""The auxiliary loss of every layer enters the gradient exactly once, in any training loop.

The total loss (6) is ``task_loss + sum over layers lambda_l loss_l``. Only the training loop knows what it will do with
the task loss: divide it by accumulation steps, multiply it by a loss scale, weigh it. So the terms are added to the
task loss itself, with their graph, where the model returns it (`hooks`) or the loop hands it over (`attach_aux_loss`).
Then all that happens to that loss happens to them. Two kinds of terms cannot be added; they are injected into the
backward of their layer's output (`InjectAuxLoss`):

- terms without a loss in the backward: they get weight 1 and a warning;
- terms inside a reentrant checkpoint: their graph is made in the backward. The same backward reaches the total loss
  (`TotalLoss`) first, which notes the weight d(root) / d(task loss) for them.
"""

import warnings
from typing import Any

import torch
from torch import Tensor, nn

from ..config import FVAEConfig
from ..reference import Terms
from .forward import PENDING, Call, Forward, Term, current, local, reached
from .padding import stated_flags
from .recompute import generator_state, in_backward, inside_checkpoint, noise_of, region, repeated_call

KEPT = 1000  # at most so many values of forwards without a graph wait for a loss
Values = list[tuple[Any, float, Tensor]]
_graphless: Values = []
_inside: dict[int, tuple[set[int], Tensor]] = {}  # by backward: layers, weight of their forwards inside it


class InjectAuxLoss(torch.autograd.Function):
    """Identity on `out`. Its backward sends the call's gradient into `loss`."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, loss: Tensor, call: Call) -> Tensor:
        """The same memory, not as a view: the next module may write to it in place (relu_), even with hooks."""
        ctx.call, ctx.like = call, (loss.dtype, loss.device)
        return torch.ops.aten._unsafe_view(out, out.shape)

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor, Tensor | None, None]:
        """The gradient of `loss` is `Call.gradient`."""
        return grad_out, ctx.call.gradient(*ctx.like), None


class Keep(torch.autograd.Function):
    """Identity with a node of its own. It can own what the node of `out` cannot (`Forward.own`)."""

    @staticmethod
    def forward(ctx: Any, out: Tensor) -> Tensor:
        """The same memory, not as a view."""
        return torch.ops.aten._unsafe_view(out, out.shape)

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> Tensor:
        """Pass the gradient on."""
        return grad_out


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


class LayerKey:
    """Identity of a layer, shared by its replicas. A copy of the layer gets another."""

    def __init__(self, name: str = "") -> None:
        self.name = name


class AuxLossLayer:
    """Mixin of the adapted layers: the steps around a layer's forward in training."""

    training: bool
    aux_key: LayerKey
    last_terms: Terms | None  # detached; summed over the calls in its last forward
    last_forward: int

    def _init_aux_loss(self) -> None:
        self.aux_key, self.last_terms, self.last_forward = LayerKey(), None, 0

    def train_call(self, adapter: Any, x: Tensor, base: Tensor, loss_weight: float) -> Tensor:
        """The output of `adapter` added to `base` in training. The objective will enter the gradient."""
        repeats = repeated_call(self.aux_key, x.device)
        if repeats is not None:
            with noise_of(repeats, x.device):
                y, terms = adapter.planned(x, base, repeats.mask, None) or adapter(x, mask=repeats.mask, base=base)
        else:
            call = Call(self.aux_key, loss_weight, self.token_mask(x, adapter.config))
            forward = current()
            if torch.compiler.is_compiling():
                if forward is not None:
                    forward.compiled = True
            elif _will_be_recomputed(forward):
                call.checkpointed, call.noise = True, generator_state(x.device)
            # the layer's own backward asks for the gradient, unless the output must own the forward
            call.asked = torch.is_grad_enabled() and forward is not None
            gradient = call.gradient if call.asked else None
            general = torch.compiler.is_compiling() or transformed() or _in_traced_checkpoint()
            planned = None if general else adapter.planned(x, base, call.mask, gradient)
            call.asked = call.asked and planned is not None
            y, terms = planned or adapter(x, mask=call.mask, base=base)
            local.call = call
        local.repeats = repeats
        return self.inject(y, terms, loss_weight)

    def infer_call(self, adapter: Any, x: Tensor, base: Tensor) -> Tensor:
        """The output of `adapter` added to `base` at inference. Warns once if the adapter is trained."""
        y: Tensor = adapter(x, base=base, infer=True)
        unsaid = not (_eval_warned or self.training or torch.compiler.is_compiling())
        if unsaid and torch.is_grad_enabled() and y.requires_grad and adapter.trained():
            y.register_hook(_warn_eval)
        return y

    def token_mask(self, x: Tensor, config: FVAEConfig) -> Tensor | None:
        """Which tokens of x ``[..., D]`` enter the objective; None: all."""
        if not config.mask_padding:
            return None
        if local.masks:
            return stated_flags(local.masks[-1], x, self.aux_key)
        forward = current()
        if forward is None and _in_traced_checkpoint():
            forward = Forward(grad=True)
            forward.scopes.extend(local.traced)
        return None if forward is None else forward.token_mask(self.aux_key, x)

    def inject(self, out: Tensor, terms: Terms, loss_weight: float) -> Tensor:
        """`out`. The gradient of ``loss_weight * terms.loss`` will enter in the backward of a loss."""
        forward, grad = current(), torch.is_grad_enabled()
        if torch.compiler.is_compiling():
            return _compiled(forward, out, loss_weight * terms.loss) if grad else out
        call, repeats, local.call, local.repeats = local.call, local.repeats, None, None
        if repeats is not None:
            return _injected_again(out, terms.loss, repeats) if grad else out
        if call is None:  # `inject` without `train_call`
            call = Call(self.aux_key, loss_weight, None)
        self._note(terms, forward, grad)
        if not grad:
            call.traced = False
            if forward is None:
                keep_values([(self.aux_key, loss_weight, terms.loss.detach())])
            else:
                forward.values.append((self.aux_key, loss_weight, terms.loss.detach()))
                forward.calls.append(call)
                forward.recomputed = forward.recomputed or forward.grad
            return out
        return _injected(forward, out, terms.loss, call)

    def _note(self, terms: Terms, forward: Forward | None, grad: bool) -> None:
        """Keep the values for the log, summed over the calls of a forward."""
        if not (grad or (forward is not None and forward.grad)):
            return
        values = Terms(*(term.detach() for term in terms))
        number = 0 if forward is None else forward.number
        if number and self.last_forward == number and self.last_terms is not None:
            values = Terms(*(old + new for old, new in zip(self.last_terms, values, strict=True)))
        self.last_terms, self.last_forward = values, number


def _in_traced_checkpoint() -> bool:
    """True if a checkpoint of a compiled forward is recomputed in eager mode: it must repeat the compiled one."""
    return bool(local.traced) and in_backward()


def _will_be_recomputed(forward: Forward | None) -> bool:
    """True if this call is inside a checkpoint, as far as can be seen."""
    if torch.is_grad_enabled():
        return inside_checkpoint()
    return forward is not None and forward.grad


def _injected(forward: Forward | None, out: Tensor, loss: Tensor, call: Call) -> Tensor:
    call.armed, alone = True, forward is None
    if forward is None:
        forward = Forward(grad=True)
        forward.inherited = inherited([call.key])
    call.fixed, call.state = forward.inherited, forward.state
    forward.calls.append(call)
    forward.recomputed = forward.recomputed or call.checkpointed
    forward.pending.append(Term(call, call.loss_weight, loss))
    if transformed():
        return InjectInTransform.apply(out, loss, call.loss_weight) if alone else out
    if not call.asked:
        out = InjectAuxLoss.apply(out, loss, call)
    if alone:
        forward.own([out])
        forward.recall([out])
    return out


def _injected_again(out: Tensor, loss: Tensor, repeats: Call) -> Tensor:
    """`out` of a recomputed call. A non-reentrant checkpoint drops the graph of its recomputation."""
    found = region()
    if repeats.traced or found is None:
        return out
    forward, call = found[0], Call(repeats.key, repeats.loss_weight, None)
    task = torch._C._current_graph_task_id()
    call.fixed = forward.weights.get(task, forward.inherited)
    call.armed = call.fixed is not None or not forward.state.entered
    if call.fixed is None and call.armed:  # not attached: weight 1, in the first backward only
        if repeats.task not in (None, task):
            return out
        if repeats.task is None:
            _warn_unprobed()
        repeats.task, forward.state.injected, call.fixed = task, True, loss.new_ones(())
    return InjectAuxLoss.apply(out, loss, call)


def _compiled(forward: Forward | None, out: Tensor, loss: Tensor) -> Tensor:
    if forward is None:
        return InjectAuxLossOnce.apply(out, loss)
    forward.pending.append(Term(None, 1.0, loss))
    return out


def aux_loss_layers(model: nn.Module) -> list[Any]:
    """The adapted layers of a model, in its own order."""
    return [module for module in model.modules() if isinstance(module, AuxLossLayer)]


def attach_aux_loss(model: nn.Module, loss: Tensor, weight: Tensor | float = 1.0) -> Tensor:
    """`loss` plus `weight` times the auxiliary loss of the forwards that `loss` depends on.

    For a loss that the model did not compute; a model called with labels does not need it. Call it once per loss, in
    training, before the loop scales, divides and back-propagates the loss:

        logits = model(inputs)
        loss = fk.attach_aux_loss(model, criterion(logits, labels))
        (loss / accumulation_steps).backward()

    It also works if the loop ran the model without a graph and runs it again inside the backward of `loss` (GradCache).

    Args:
        model: the model that holds the adapted layers.
        loss: the task loss, a scalar.
        weight: weight of the auxiliary loss, relative to `loss`.

    Returns:
        The total loss (6), in the dtype of `loss`.

    Raises:
        ValueError: if `loss` is not a scalar, or no adapted layer of the model has run since the last call.
    """
    if loss.numel() != 1:
        raise ValueError(f"the loss has shape {tuple(loss.shape)}; expected a scalar: reduce it (mean or sum) first")
    total = attached(model, loss, weight)
    if total is None:
        raise ValueError(
            f"{type(model).__name__} has {len(aux_loss_layers(model))} FVAE layer(s) and none ran in training mode "
            "since the last call: call attach_aux_loss once after each forward in training, and not for a loss that the"
            " model computed itself. With torch.compile, run the forward inside "
            "`with fvae_kernels.external_loss(model):`"
        )
    return total


def attached(model: nn.Module, loss: Tensor, weight: Tensor | float) -> Tensor | None:
    """As `attach_aux_loss`; None if no adapted layer took part."""
    keys = [layer.aux_key for layer in aux_loss_layers(model)]
    waiting = [forward for forward in PENDING if forward.held(keys) or _has(forward.values, keys)]
    forwards = reached(loss, sorted(waiting, key=lambda forward: forward.number))
    compiled, local.compiled = local.compiled, []
    values = take_values(keys)
    for forward in forwards:
        loss = attach_forward(forward, loss, weight, keys)
    if compiled:
        loss = loss + (weight * torch.stack(compiled).sum()).to(loss)
    if forwards or compiled:
        return loss
    if not values:
        return None
    return TotalLoss.apply(loss, weighted_sum([(w, value) for _, w, value in values]), weight, _InBackward(keys))


def attach_forward(forward: Forward, loss: Tensor, share: Tensor | float, keys: list[Any] | None = None) -> Tensor:
    """`loss` plus `share` times the terms of one forward, of the layers `keys` or of all layers."""
    held = forward.pending if keys is None else forward.held(keys)
    values = [(w, value) for key, w, value in forward.values if keys is None or key in keys]
    if not (held or values):
        return loss
    total = weighted_sum([(term.weight, term.loss) for term in held] + values)
    for term in held:
        if term.call is not None:
            term.call.attached = True
    gone = set(map(id, held))
    forward.pending = [term for term in forward.pending if id(term) not in gone]
    forward.left = [reference for reference in forward.left if id(reference()) not in gone]
    forward.values = [entry for entry in forward.values if keys is not None and entry[0] not in keys]
    if torch.compiler.is_compiling() or transformed():
        forward.state.entered = True
        return loss + (share * total).to(loss)
    return TotalLoss.apply(loss, total, share, _Note(forward))


class _Note:
    """Notes the weight of a forward's terms. Terms that were injected before, without this loss, take no part."""

    def __init__(self, forward: Forward) -> None:
        self.state, self.weights = forward.state, forward.weights

    def __call__(self, task: int, weight: Tensor) -> bool:
        self.state.entered, self.weights[task] = True, weight
        return not self.state.injected


def weighted_sum(terms: list[tuple[float, Tensor]]) -> Tensor:
    """The sum of weighted 0-dim terms, on the first one's device. Terms of equal weight are added before weighting."""
    device, dtype = terms[0][1].device, terms[0][1].dtype
    weights: dict[float, list[Tensor]] = {}
    for weight, term in terms:
        weights.setdefault(weight, []).append(term.to(device=device, dtype=dtype))
    sums = [weight * torch.stack(same).sum() for weight, same in weights.items()]
    return sums[0] if len(sums) == 1 else torch.stack(sums).sum()


def keep_values(values: Values) -> None:
    """Note the values of a forward without a graph. The list is bounded, in case no loss follows."""
    _graphless.extend(values)
    del _graphless[:-KEPT]


def take_values(keys: list[Any]) -> Values:
    """Remove and return the values of these layers."""
    taken = [entry for entry in _graphless if entry[0] in keys]
    _graphless[:] = [entry for entry in _graphless if entry[0] not in keys]
    return taken


def _has(values: Values, keys: list[Any]) -> bool:
    return any(key in keys for key, _, _ in values)


def _forget(task: int) -> None:
    _inside.pop(task, None)


class _InBackward:
    """Notes the weight for forwards of these layers that run inside a backward."""

    def __init__(self, keys: list[Any]) -> None:
        self.keys = set(map(id, keys))

    def __call__(self, task: int, weight: Tensor) -> bool:
        _inside[task] = self.keys, weight
        torch.autograd.Variable._execution_engine.queue_callback(lambda: _forget(task))
        return True


def inherited(keys: list[Any]) -> Tensor | None:
    """The weight of a forward of these layers that begins now, if the backward of their loss is running."""
    if not _inside or not in_backward():
        return None
    found = _inside.get(torch._C._current_graph_task_id())
    return found[1] if found is not None and any(id(key) in found[0] for key in keys) else None


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


_eval_warned = False


def _warn_eval(_: Tensor) -> None:
    global _eval_warned
    if not _eval_warned:
        _eval_warned = True
        warnings.warn(
            "FVAE: a backward came to an adapter in eval mode. There it takes its mean, draws no sample and has no "
            "objective, so the gradient is the task's alone. Call model.train() to train it.",
            stacklevel=3,
        )
