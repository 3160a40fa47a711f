"""One call of an adapted layer in training, and its term of the loss."""

from collections.abc import Callable

import torch
from torch import Tensor

from . import warn

CACHED_UNKNOWN = (
    "FVAE: a forward inside a backward (a cached loss, GradCache) found no weight for its auxiliary loss, because the "
    "loss whose backward this is never reached the package. Before its backward use `loss = "
    "fvae_kernels.attach_aux_loss(model, loss)`, or, for a trainer that computes its own loss, "
    "`fvae_kernels.prepare_trainer(trainer)`."
)


class LayerKey:
    """Identity of a layer, shared by its replicas. A copy of the layer gets another."""

    def __init__(self, name: str = "") -> None:
        self.name = name


class State:
    """What has happened to the terms of a forward. Holds no tensors, so a layer's own graph may hold it."""

    __slots__ = ("entered", "injected", "inside")

    def __init__(self) -> None:
        self.entered = False  # a backward reached the loss that they were added to
        self.injected = False  # a backward reached a layer first, and they entered without a loss
        self.inside = False  # the forward began inside a backward

    def enter_alone(self) -> None:
        """A term enters with weight 1, without a loss. Said once; refused if its forward began in a backward."""
        if self.inside:
            raise RuntimeError(CACHED_UNKNOWN)
        self.injected = True
        warn.unprobed()


class Call:
    """One call of an adapted layer in training: the weight of its term, and the state that a recomputation repeats."""

    __slots__ = (
        *("armed", "asked", "attached", "checkpointed", "fixed", "key", "loss_weight", "mask", "noise"),
        *("state", "task", "traced"),
    )

    def __init__(self, key: LayerKey, loss_weight: float, mask: Tensor | None) -> None:
        self.key, self.loss_weight, self.mask = key, loss_weight, mask
        self.checkpointed = False  # this call will be recomputed
        self.noise: Tensor | None = None  # generator state before the call, if it will be recomputed
        self.traced = True  # False inside a reentrant checkpoint: its recomputation makes the graph
        self.asked = False  # the layer's own backward calls `gradient`; else an `InjectAuxLoss` does
        self.armed = False  # `gradient` is in use for this call
        self.attached = False  # the graph leads from a loss to the term
        self.state = State()  # shared by its forward
        self.fixed: Tensor | None = None  # d(root) / d(task loss), if known before the backward begins
        self.task: int | None = None  # the backward in which the term entered without a loss

    def gradient(self, constant: Callable[[float], Tensor]) -> Tensor | None:
        """The addition to the gradient of the layer's loss in its backward; None if the graph brings it.

        A term whose loss is not used enters with weight 1 in the first backward that reaches it, and in no other.

        Args:
            constant: makes a number a 0-dim tensor of the loss's dtype and device. It is not written to.

        Raises:
            RuntimeError: its forward ran inside the backward of a loss that nothing is known of (GradCache): weight 1
                would be wrong for any loss that is divided, scaled or weighted.
        """
        if not self.armed or (self.attached and self.state.entered):
            return None
        task = torch._C._current_graph_task_id()
        if self.task not in (None, task):
            return None
        if self.fixed is not None:
            self.task = task
            weight = constant(self.loss_weight)
            return self.fixed.to(weight) * weight
        if self.task is None:
            self.state.enter_alone()
            self.task = task
        return constant(self.loss_weight)


class Term:
    """A layer's loss with its graph, waiting for a loss of its model. A compiled layer has no call."""

    __slots__ = ("__weakref__", "call", "loss", "weight")

    def __init__(self, call: Call | None, weight: float, loss: Tensor) -> None:
        self.call, self.weight, self.loss = call, weight, loss

    def waits(self, wanted: set[int]) -> bool:
        """True if it belongs to a layer in `wanted` and has not entered any gradient."""
        call = self.call
        return call is None or (id(call.key) in wanted and not call.attached and call.task is None)
