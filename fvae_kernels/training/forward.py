"""The state of one forward: its masks, the calls of its layers, and the terms that wait for a loss.

A forward begins with the outermost module that has hooks (`hooks`), or with a layer that is called outside any. The
layers find it on a stack of this thread. Afterwards the nodes of its outputs' graph own it, so it lives as long as that
graph. Then only the graph leads to it: from a loss that depends on it, or from a checkpoint's recomputation.
"""

import itertools
import threading
import weakref
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from .padding import Padding
from .recompute import Region

MARK = "fvae_kernels.forward"  # in the metadata of the graph nodes that made a forward's outputs


_numbers = itertools.count(1)


class State:
    """What has happened to the terms of a forward. Holds no tensors, so a layer's own graph may hold it."""

    __slots__ = ("entered", "injected")

    def __init__(self) -> None:
        self.entered = False  # a backward reached the loss that they were added to
        self.injected = False  # a backward reached a layer first, and they entered without a loss


class Call:
    """One call of an adapted layer in training: the weight of its term, and the state that a recomputation repeats."""

    __slots__ = (
        *("armed", "asked", "attached", "checkpointed", "fixed", "key", "loss_weight", "mask", "noise"),
        *("state", "task", "traced"),
    )

    def __init__(self, key: Any, loss_weight: float, mask: Tensor | None) -> None:
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

    def gradient(self, dtype: torch.dtype, device: torch.device) -> Tensor | None:
        """The addition to the gradient of the layer's loss in its backward; None if the graph brings it.

        A term whose loss is not used enters with weight 1 in the first backward that reaches it, and in no other.
        """
        if not self.armed or (self.attached and self.state.entered):
            return None
        task = torch._C._current_graph_task_id()
        if self.task not in (None, task):
            return None
        if self.fixed is not None:
            self.task = task
            return self.fixed.to(device=device, dtype=dtype) * self.loss_weight
        if self.task is None:
            self.task, self.state.injected = task, True
            from . import aux_loss

            aux_loss._warn_unprobed()
        return torch.full((), self.loss_weight, dtype=dtype, device=device)


class Term:
    """A layer's loss with its graph, waiting for a loss of its model. A compiled layer has no call."""

    __slots__ = ("__weakref__", "call", "loss", "weight")

    def __init__(self, call: Call | None, weight: float, loss: Tensor) -> None:
        self.call, self.weight, self.loss = call, weight, loss

    def waits(self, wanted: set[int]) -> bool:
        """True if it belongs to a layer in `wanted` and has not entered any gradient."""
        call = self.call
        return call is None or (id(call.key) in wanted and not call.attached and call.task is None)


class Forward:
    """One forward of a model, or of a layer that is called alone."""

    def __init__(self, grad: bool) -> None:
        self.number = 0 if torch.compiler.is_compiling() else next(_numbers)
        self.grad = grad  # autograd was on when it began
        self.scopes: list[tuple[Any, Padding]] = []  # for each running module: mask argument by layer, its masks
        self.calls: list[Call] = []
        self.pending: list[Term] = []  # terms, while it runs
        self.left: list[weakref.ref[Term]] = []  # terms, afterwards; the graph owns them
        self.values: list[tuple[Any, float, Tensor]] = []  # key, weight and loss of calls without a graph
        self.compiled = False  # some of its layers are compiled
        self.recomputed = False  # some of its calls are inside a checkpoint
        self.state = State()
        self.weights: dict[int, Tensor] = {}  # d(root) / d(task loss) in each backward, for recomputations
        self.inherited: Tensor | None = None  # the same, if it runs inside the backward of its loss

    def token_mask(self, key: Any, x: Tensor) -> Tensor | None:
        """The mask of x: from the module nearest to the layer that got one that fits."""
        problem = None
        for certain in (True, False):  # attention masks [batch, 1, tokens, tokens] come last
            for arguments, padding in reversed(self.scopes):
                argument = arguments.get(key)
                if argument is None or not padding.masks:
                    continue
                found = padding.find(argument, x) if certain else padding.find_in_attention(argument, x)
                if found.settled:
                    return found.flags
                problem = found.problem or problem
        if problem is not None:
            problem.warn(key)
        return None

    def held(self, keys: Iterable[Any]) -> list[Term]:
        """The terms of these layers that still wait for a loss."""
        wanted = set(map(id, keys))
        terms = (*self.pending, *(reference() for reference in self.left))
        return [term for term in terms if term is not None and term.waits(wanted)]

    def own(self, outputs: Iterable[Tensor]) -> None:
        """Tie this forward to the graph of these outputs: live as long as it, and be found from it.

        A node owns only terms that were made before it, since it is not part of their graph.
        """
        numbers = [_number(term.loss) for term in self.pending]
        for tensor in outputs:
            if tensor.grad_fn is not None:
                earlier = [t for t, number in zip(self.pending, numbers, strict=True) if number < _number(tensor)]
                tensor.grad_fn.metadata[MARK] = self, earlier  # type: ignore[index]
        self.left = [weakref.ref(term) for term in self.pending]
        self.pending = []
        PENDING.add(self)

    def recall(self, outputs: Iterable[Tensor], start: int = 0) -> None:
        """Note that a backward that reaches these outputs may recompute the calls from `start` on."""
        if self.recomputed and start < len(self.calls):
            region = Region(self, start, len(self.calls))
            for tensor in outputs:
                if tensor.grad_fn is not None:
                    tensor.grad_fn.register_prehook(region.enter)

    def __deepcopy__(self, memo: dict[int, Any]) -> "Forward":
        return Forward(self.grad)


def _number(tensor: Tensor) -> int:
    return tensor.grad_fn._sequence_nr() if tensor.grad_fn is not None else -1


PENDING: "weakref.WeakSet[Forward]" = weakref.WeakSet()  # forwards that wait for a loss


class Local(threading.local):
    """State of this thread: replicas of DataParallel run in their own threads."""

    def __init__(self) -> None:
        self.stack: list[Any] = []  # for each running module with hooks: its Forward and the calls so far, or None
        self.masks: list[Tensor | None] = []  # of `token_mask`
        self.compiled: list[Tensor] = []  # weighted losses of compiled forwards, inside `external_loss`
        self.traced: list[tuple[Any, Padding]] = []  # masks of the last forward, if a part of it was compiled
        self.call: Call | None = None  # of the running layer
        self.repeats: Call | None = None  # the call that it recomputes


local = Local()


def current() -> Forward | None:
    """The running forward, if any."""
    found = local.stack[-1] if local.stack else None
    return found[0] if isinstance(found, tuple) else None


def reached(loss: Tensor, forwards: list[Forward]) -> list[Forward]:
    """The forwards that the graph of the loss leads to; all of them if it leads to none."""
    if len(forwards) < 2 or loss.grad_fn is None:
        return forwards
    wanted, found = set(map(id, forwards)), {}
    for node in _nodes(loss.grad_fn):
        forward, _ = node.metadata.get(MARK, (None, None))
        if forward is not None and id(forward) in wanted:
            found[id(forward)] = forward
            if len(found) == len(wanted):
                break
    return [forward for forward in forwards if id(forward) in found] or forwards


def _nodes(root: Any) -> Iterator[Any]:
    seen, stack = {root}, [root]
    while stack:
        node = stack.pop()
        yield node
        for following, _ in node.next_functions:
            if following is not None and following not in seen:
                seen.add(following)
                stack.append(following)
