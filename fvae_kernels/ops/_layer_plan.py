"""Plans: all that stays the same from step to step of one adapted layer, made once and checked cheaply.

Each step compares with the last one: the parameters (identity, shapes, strides, dtypes), the kind of x, base and mask,
and what else decides the path (config, backend, autocast). If nothing changed, the layer runs without checks, tables
and dispatch; on a GPU it launches the compiled kernels directly. Otherwise a new plan is made. Inputs that no plan
serves go through `layer` itself, with the same results.
"""

import functools
import itertools
import operator
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch._C._functorch import unwrap_if_dead

from ..config import FVAEConfig
from . import _backend
from ._checks import rows, token_flags
from ._host import kind_of, look_as, looks_of, run_step
from ._layer_inputs import Arriving, Needs, Options, Tensors
from ._layer_path import autocast_products
from ._once import differentiable_once
from ._raw import RAW, triton_part, wide_dtype_of

Parameters = Sequence[Tensor | None]
PLAIN = Tensor, nn.Parameter  # subclasses get no plan
# The gradient of a layer's loss beside the one from the graph; None if there is none. It is handed what makes a number
# a tensor: `Plan.constant`
LossGradient = Callable[[Callable[[float], Tensor]], Tensor | None]


class Steps(Protocol):
    """Forward and backward of a backend, as a plan runs them, for tokens [...]. Results may share memory, but no
    result is a view: autograd adds gradients of x in place only if the tensor owns its memory.
    """

    options: Options

    def forward(self, base: Tensor, tensors: Tensors) -> tuple[Tensor, Tensor, Tensor, Any]:
        """y [..., M], the terms [4], the state for backward, and `kept` for backward, which holds no tensors."""

    def backward(
        self, arriving: Arriving, tensors: Tensors, state: Tensor, needs: Needs, kept: Any
    ) -> tuple[Tensor, Sequence[Tensor]]:
        """grad_x [..., D], and the gradients of the parameters that exist and need one."""


class CppSteps:
    """The raw C++ operators, called without overload resolution."""

    def __init__(self, parameters: Parameters, options: Options, detach_target: bool) -> None:
        self.options, self.detach_target = options, detach_target
        there = [p is not None for p in parameters]
        self._flags = functools.cache(lambda needs: needs.flags(there, options.encoder_hidden))
        self._forward, self._backward = RAW["cpp"].layer_fwd.default, RAW["cpp"].layer_bwd.default

    def forward(self, base: Tensor, tensors: Tensors) -> tuple[Tensor, Tensor, Tensor, Any]:
        """See `Steps`."""
        y, terms, state = self._forward(rows(base), *tensors.rows(), *self.options)
        return _shaped(y, base), terms, state, None

    def backward(
        self, arriving: Arriving, tensors: Tensors, state: Tensor, needs: Needs, kept: Any
    ) -> tuple[Tensor, Sequence[Tensor]]:
        """See `Steps`."""
        grad_y, *grad_terms = arriving
        arrives = None if grad_y is None else rows(grad_y), *grad_terms
        grad_x, grads = self._backward(*arrives, *tensors.rows(), *self.options, state, self.detach_target, needs)
        grad_x = _shaped(grad_x, tensors.x) if needs.x else grad_x
        return grad_x, list(itertools.compress(grads, self._flags(needs)))


def _shaped(t: Tensor, like: Tensor) -> Tensor:
    """t [N, ...] in the shape of `like`, not as a view."""
    return t if like.dim() == 2 else torch.ops.aten._unsafe_view(t, like.shape)


class Asked(NamedTuple):
    """What a backward computes and returns."""

    needs: Needs
    places: tuple[int, ...]  # of `Gradients`


class Plan:
    """What a layer's forward and backward need, for fixed parameters, config and backend."""

    def __init__(self, backend: str, steps: Steps, parameters: Parameters, config: FVAEConfig) -> None:
        self.backend, self.steps, self.parameters, self.config = backend, steps, parameters, config
        self.there = [p for p in parameters if p is not None]
        self.looks = looks_of(self.there)
        B = parameters[-1]
        assert B is not None
        self.device, self.wide = B.device, wide_dtype_of(B.dtype)
        self._asked: dict[Any, Asked] = {}
        self._constant: tuple[float, Tensor] | None = None

    def constant(self, value: float) -> Tensor:
        """A number as a 0-dim tensor of the terms' dtype. It is kept, so it must not be written to."""
        if self.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            return self._new_constant(value)  # its memory is the graph's, and replays may outlive this plan
        last = self._constant
        if last is None or last[0] != value:
            last = self._constant = value, self._new_constant(value)
        return last[1]

    def _new_constant(self, value: float) -> Tensor:
        return torch.full((), value, dtype=self.wide, device=self.device)

    def asked(self, x: bool, flags: tuple[bool, ...], arriving: Arriving) -> Asked:
        """For the gradients that autograd asks for: of x, and of the parameters by `flags`."""
        key = x, flags, arriving.grad_y is None, arriving.grad_loss is None
        found = self._asked.get(key)
        if found is None:
            hidden = self.steps.options.encoder_hidden
            needs = Needs.of(x, flags, hidden, arriving)
            made = needs.flags([p is not None for p in self.parameters], hidden)
            places = itertools.count(1)
            numbered = [next(places) if flag else 0 for flag in made]
            wanted = tuple(place if flag else 0 for place, flag in zip(numbered, flags, strict=True))
            found = self._asked[key] = Asked(needs, wanted)
        return found


class Plans:
    """The plan of one adapter. Copies and files do not carry it."""

    def __init__(self) -> None:
        self.plan: Plan | None = None
        self.key: tuple[Any, ...] = ()

    def fitting(
        self, parameters: Parameters, x: Tensor, config: FVAEConfig, dropout: float, mask: Tensor | None, base: Tensor
    ) -> Plan | None:
        """The plan of the last step, if nothing that it depends on has changed."""
        plan = self.plan
        if (
            plan is None
            or plan.config is not config
            or not (type(x) in PLAIN and type(base) in PLAIN)
            or not all(map(operator.is_, parameters, plan.parameters))
            or self.key != key_of(x, dropout, base)
            or not look_as(plan.there, plan.looks)
            or torch._C._len_torch_dispatch_stack() > 0
            or (mask is not None and (mask.shape != x.shape[:-1] or mask.device != plan.device))
        ):
            return None
        return plan

    def keep(self, plan: Plan, x: Tensor, dropout: float, base: Tensor) -> None:
        """Serve later steps of the same kind with this plan."""
        self.plan, self.key = plan, key_of(x, dropout, base)

    def forget(self) -> None:
        """Drop the plan."""
        self.plan = None

    def __deepcopy__(self, memo: dict[int, Any]) -> "Plans":
        return Plans()

    def __reduce__(self) -> tuple[type["Plans"], tuple[()]]:
        return Plans, ()


def key_of(x: Tensor, dropout: float, base: Tensor) -> tuple[Any, ...]:
    """What else decides the path, cheap to compare."""
    return dropout, _backend._selected, kind_of(x, base)


def plannable(parameters: Parameters, x: Tensor, base: Tensor | None) -> bool:
    """True if a plan can serve: plain tensors, contiguous parameters, no compilation, transform or dispatch mode."""
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return False
    if torch._C._len_torch_dispatch_stack() > 0 or type(x) not in PLAIN or type(base) not in PLAIN:
        return False
    return all(p is None or (type(p) in PLAIN and p.is_contiguous()) for p in parameters)


def make_plan(parameters: Parameters, config: FVAEConfig, dropout: float, backend: str) -> Plan:
    """A plan for a layer that `backend` covers. Its inputs must have been checked."""
    B = parameters[-1]
    assert B is not None
    options = Options.of(config, dropout, autocast_products(B, backend))
    steps: Steps
    if backend == "triton":
        steps = triton_part("layer.plan").TritonSteps(parameters, options, config.detach_target)
    else:
        steps = CppSteps(parameters, options, config.detach_target)
    return Plan(backend, steps, parameters, config)


class PlannedTerms:
    """`Terms` of a planned step. Only the loss has a graph; the others are taken apart when they are read."""

    __slots__ = ("loss", "values")

    def __init__(self, loss: Tensor, values: Tensor) -> None:
        self.loss = loss
        self.values = values  # all four [4], without a graph

    def __iter__(self) -> Iterator[Tensor]:
        yield self.loss
        yield from self.values.unbind()[1:]


class Gradients(NamedTuple):
    """What the backward of a step returns."""

    base: Tensor | None
    x: Tensor | None
    made: Sequence[Tensor | None]  # of the parameters that `Steps.backward` makes gradients of
    places: Sequence[int]  # of each parameter: which of `made` is its gradient, from 1; 0 for none

    def flat(self, size: int) -> tuple[Tensor | None, ...]:
        """Of base and the entries of `Tensors.flat`, `size` in all; what lies between x and the parameters has none."""
        of_parameters = (self.made[place - 1] if place else None for place in self.places)
        return self.base, self.x, *(None,) * (size - 2 - len(self.places)), *of_parameters


class Step:
    """One run of a plan: what a node of autograd does, `PlannedLayer` or the compiled library's own.

    In backward `loss_gradient` is added to the gradient of the loss.
    """

    __slots__ = ("kept", "loss_gradient", "plan")

    def __init__(self, plan: Plan, loss_gradient: LossGradient | None) -> None:
        self.plan, self.loss_gradient, self.kept = plan, loss_gradient, None

    def forward(self, base: Tensor, *entries: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """y, the terms [4] and the state, for `Tensors.flat`."""
        y, terms, state, self.kept = self.plan.steps.forward(base, Tensors.of(entries))
        return y, terms, state

    def backward(
        self, needed: Sequence[bool], saved: Sequence[Tensor | None], grad_y: Tensor | None, grad_loss: Tensor | None
    ) -> Gradients:
        """The gradients of base and entries that are `needed`; `saved` is the state and the entries."""
        asked = self, needed, saved
        if not torch.is_grad_enabled():
            return _gradients(asked, grad_y, grad_loss)
        base, x, *made = _gradients_once(asked, grad_y, grad_loss)
        return Gradients(base, x, made, range(1, len(made) + 1))


def _gradients(asked: Any, grad_y: Tensor | None, grad_loss: Tensor | None) -> Gradients:
    step, needed, (state, *entries) = asked
    injected = None if step.loss_gradient is None else step.loss_gradient(step.plan.constant)
    if injected is not None:
        grad_loss = injected if grad_loss is None else grad_loss + injected
    plan, tensors = step.plan, Tensors.of(entries)
    arriving = Arriving(grad_y, grad_loss, None, None, None)
    needs, places = plan.asked(needed[1], needed[-len(tensors.parameters) :], arriving)
    grad_x, grads = plan.steps.backward(arriving, tensors, state, needs, step.kept)
    return Gradients(grad_y if needed[0] else None, grad_x if needs.x else None, grads, places)


_gradients_once = differentiable_once(lambda asked, *grads: _gradients(asked, *grads).flat(len(asked[1])))


class PlannedLayer(torch.autograd.Function):
    """(step, base, *`Tensors.flat`) -> y, loss, terms [4]

    The terms are for the log and carry no graph.
    """

    @staticmethod
    def forward(ctx: Any, step: Step, base: Tensor, *entries: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        y, terms, state = step.forward(base, *entries)
        # the tensors that LayerFunction saves too: a checkpoint may run forward by one and recompute by the other
        ctx.save_for_backward(state, *entries)
        ctx.step = step
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(terms)
        return y, terms[0], terms

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor | None, grad_loss: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
        needed, saved = ctx.needs_input_grad[1:], ctx.saved_tensors
        return None, *ctx.step.backward(needed, saved, grad_y, grad_loss).flat(len(needed))


def run_plan(
    plan: Plan,
    parameters: Parameters,
    x: Tensor,
    base: Tensor,
    mask: Tensor | None,
    noise: tuple[Tensor, Tensor] | None,
    seed: Tensor | None,
    loss_gradient: LossGradient | None,
) -> tuple[Tensor, PlannedTerms]:
    """y and the terms."""
    noise1, noise2 = noise or (None, None)
    tensors = Tensors(unwrap_if_dead(x), parameters, noise1, noise2, token_flags(mask), seed)
    y, loss, terms = run_step(PlannedLayer, Step(plan, loss_gradient), unwrap_if_dead(base), *tensors.flat())
    return y, PlannedTerms(loss, terms)
