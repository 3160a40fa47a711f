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

from typing import Any

import torch
from torch import Tensor, nn

from ..config import FVAEConfig
from ..ops._host import renewed
from ..ops._layer_plan import PlannedTerms
from ..reference import Terms
from . import warn
from .cached import inherit, keep_values
from .calls import Call, LayerKey, Term
from .forward import Forward, current, local, region
from .inject import InjectAuxLoss, InjectAuxLossOnce, InjectInTransform, transformed
from .recompute import generator_state, in_backward, inside_checkpoint, noise_of, repeated_call


class AuxLossLayer:
    """Mixin of the adapted layers: the steps around a layer's forward in training."""

    training: bool
    aux_key: LayerKey
    last_values: Tensor | None  # the terms [4] without a graph, summed over the calls in its last forward
    last_forward: int

    def _init_aux_loss(self) -> None:
        self.aux_key, self.last_values, self.last_forward = LayerKey(), None, 0

    @property
    def last_terms(self) -> Terms | None:
        """The terms of its last forward in training, without a graph; None if there was none."""
        return None if self.last_values is None else Terms(*self.last_values.unbind())

    def adapters(self) -> dict[str, Any]:
        """The layer's adapters by name."""
        raise NotImplementedError

    def loss_weights(self) -> dict[str, float]:
        """The weight of each adapter's loss, by the adapter's name."""
        raise NotImplementedError

    def set_loss_weights(self, weights: dict[str, float]) -> None:
        """Set the weights of these adapters; others are left out."""
        raise NotImplementedError

    def train_call(self, adapter: Any, x: Tensor, base: Tensor, loss_weight: float) -> Tensor:
        """The output of `adapter` added to `base` in training. The objective will enter the gradient."""
        if torch.compiler.is_compiling():
            return self._compiled_call(adapter, x, base, loss_weight)
        repeats = repeated_call(self.aux_key, x.device)
        if repeats is not None:
            return _repeated_call(repeats, adapter, x, base)
        grad = torch.is_grad_enabled()
        call = Call(self.aux_key, loss_weight, self.token_mask(x, adapter.config))
        if inside_checkpoint() if grad else _inside_reentrant_checkpoint():
            call.checkpointed, call.noise = True, generator_state(x.device)
        general = transformed() or _in_traced_checkpoint()
        planned = None if general else adapter.planned(x, base, call.mask, call.gradient if grad else None)
        call.asked = grad and planned is not None  # the layer's own backward asks for the gradient
        y, terms = planned or adapter(x, mask=call.mask, base=base)
        local.call = call
        return self.inject(y, terms, loss_weight)

    def _compiled_call(self, adapter: Any, x: Tensor, base: Tensor, loss_weight: float) -> Tensor:
        """The same while torch.compile traces: the loss of the model, or the layer's own node, gets the term."""
        forward = current()
        if forward is not None:
            forward.compiled = True
        y, terms = adapter(x, mask=self.token_mask(x, adapter.config), base=base)
        if not torch.is_grad_enabled():
            return y
        loss = loss_weight * terms.loss
        if forward is None:
            return InjectAuxLossOnce.apply(y, loss)
        forward.pending.append(Term(None, 1.0, loss))
        return y

    def infer_call(self, adapter: Any, x: Tensor, base: Tensor) -> Tensor:
        """The output of `adapter` added to `base` at inference. Warns once if the adapter is trained."""
        y: Tensor = adapter(x, base=base, infer=True)
        unsaid = not ("eval" in warn.said or self.training or torch.compiler.is_compiling())
        if unsaid and torch.is_grad_enabled() and y.requires_grad and adapter.trained():
            y.register_hook(warn.in_eval)
        return y

    def token_mask(self, x: Tensor, config: FVAEConfig) -> Tensor | None:
        """Which tokens of x ``[..., D]`` enter the objective; None: all."""
        if not config.mask_padding:
            return None
        forward = current()
        if forward is None and (local.masks or _in_traced_checkpoint()):
            forward = Forward(grad=True)
            forward.scopes.extend(local.traced if _in_traced_checkpoint() else [])
        return None if forward is None else forward.token_mask(self.aux_key, x)

    def inject(self, out: Tensor, terms: Any, loss_weight: float) -> Tensor:
        """`out`. The gradient of ``loss_weight * terms.loss`` will enter in the backward of a loss."""
        call, local.call = local.call or Call(self.aux_key, loss_weight, None), None
        forward, grad = current(), torch.is_grad_enabled()
        self._note(terms, forward, grad)
        if grad:
            return _injected(forward, out, terms.loss, call)
        _without_graph(forward, terms.loss, call)
        return out

    def _note(self, terms: Any, forward: Forward | None, grad: bool) -> None:
        """Keep the values for the log, summed over the calls of a forward."""
        if not (grad or (forward is not None and forward.grad)):
            return
        values = terms.values if isinstance(terms, PlannedTerms) else torch.stack([term.detach() for term in terms])
        number = 0 if forward is None else forward.number
        if number and self.last_forward == number and self.last_values is not None:
            values = self.last_values + values
        # by __dict__: nn.Module.__setattr__ takes longer, since it looks for parameters first
        self.__dict__.update(last_values=values, last_forward=number)


def _in_traced_checkpoint() -> bool:
    """True if a checkpoint of a compiled forward is recomputed in eager mode: it must repeat the compiled one."""
    return bool(local.traced) and in_backward()


def _inside_reentrant_checkpoint() -> bool:
    """True if autograd is off inside a forward with autograd, as far as can be seen."""
    forward = current()
    return forward is not None and forward.grad


def _injected(forward: Forward | None, out: Tensor, loss: Tensor, call: Call) -> Tensor:
    """`out` of a call with a graph."""
    alone = forward is None
    if forward is None:
        forward = Forward(grad=True)
        inherit(forward, [call.key])
    call.armed, call.fixed, call.state = True, forward.inherited, forward.state
    forward.calls.append(call)
    forward.recomputed = forward.recomputed or call.checkpointed
    forward.pending.append(Term(call, call.loss_weight, loss))
    if transformed():
        return InjectInTransform.apply(out, loss, call.loss_weight) if alone else out
    if not call.asked:
        out = InjectAuxLoss.apply(out, loss, call)
    elif alone:
        out = renewed(out)  # a node of its own can own what the node of `out` cannot (`Forward.own`)
    if alone:
        forward.own([out])
        forward.recall([out])
    return out


def _without_graph(forward: Forward | None, loss: Tensor, call: Call) -> None:
    """Keep the value of a call without a graph: a recomputation will make it."""
    call.traced = False
    value = call.key, call.loss_weight, loss.detach()
    if forward is None:
        keep_values([value])
    else:
        forward.values.append(value)
        forward.calls.append(call)
        forward.recomputed = forward.recomputed or forward.grad


def _repeated_call(repeats: Call, adapter: Any, x: Tensor, base: Tensor) -> Tensor:
    """The output of a call that is recomputed, with its mask and its noise."""
    with noise_of(repeats, x.device):
        y, terms = adapter.planned(x, base, repeats.mask, None) or adapter(x, mask=repeats.mask, base=base)
    return _injected_again(y, terms.loss, repeats) if torch.is_grad_enabled() else y


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
            forward.state.enter_alone()
        repeats.task, call.fixed = task, loss.new_ones(())
    return InjectAuxLoss.apply(out, loss, call)


def aux_loss_layers(model: nn.Module) -> list[Any]:
    """The adapted layers of a model, in its own order."""
    return [module for module in model.modules() if isinstance(module, AuxLossLayer)]
