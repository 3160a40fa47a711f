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

from .calls import Call, State, Term
from .padding import Padding, Stated

# In the metadata of a graph node, for each forward that made its tensor: its terms before, and the number of its values
MARK = "fvae_kernels.forward"
KEPT = 32  # regions kept for a thread: of nested backwards, and of some that have ended
Value = tuple[Any, float, Tensor]  # key, weight and loss of a call without a graph
_numbers = itertools.count(1)


class Forward:
    """One forward of a model, or of a layer that is called alone."""

    def __init__(self, grad: bool) -> None:
        self.number = 0 if torch.compiler.is_compiling() else next(_numbers)
        self.grad = grad  # autograd was on when it began
        self.scopes: list[tuple[Any, Padding]] = []  # for each running module: mask argument by layer, its masks
        self.calls: list[Call] = []
        self.pending: list[Term] = []  # terms, while it runs
        self.left: list[weakref.ref[Term]] = []  # terms, afterwards; the graph owns them
        self.values: list[Value] = []  # of calls without a graph: it will be made in a recomputation
        self.ends: dict[int, tuple[weakref.ref[Tensor], int]] = {}  # by output of a block: the values before it
        self.compiled = False  # some of its layers are compiled
        self.recomputed = False  # some of its calls are inside a checkpoint
        self.state = State()
        self.weights: dict[int, Tensor] = {}  # d(root) / d(task loss) in each backward, for recomputations
        self.inherited: Tensor | None = None  # the same, if it runs inside the backward of its loss

    def token_mask(self, key: Any, x: Tensor) -> Tensor | None:
        """The mask of x: one that the user stated, or from the module nearest to the layer that got one that fits."""
        problem = None
        if local.masks:
            argument = next((arguments[key] for arguments, _ in self.scopes if key in arguments), None)
            stated = local.masks[-1].find(argument, x)
            if stated.settled:
                return stated.flags
            problem = stated.problem
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
            node: Any = tensor.grad_fn  # a new object at each look, so one look
            if node is not None:
                end = node._sequence_nr()
                earlier = [t for t, number in zip(self.pending, numbers, strict=True) if number < end]
                node.metadata.setdefault(MARK, {})[self] = earlier, self._values_before(tensor)
        self.left = [weakref.ref(term) for term in self.pending]
        self.pending = []
        PENDING.add(self)

    def recall(self, outputs: Iterable[Tensor], start: int = 0) -> None:
        """Note that a backward that reaches these outputs may recompute the calls from `start` on."""
        if self.recomputed and start < len(self.calls):
            region = Region(self, start, len(self.calls))
            for tensor in outputs:
                self.ends[id(tensor)] = weakref.ref(tensor), self._values_before(tensor)
                if tensor.grad_fn is not None:
                    tensor.grad_fn.register_prehook(region.enter)

    def _values_before(self, output: Tensor) -> int:
        """How many values were made before this output: as noted for it, or by the order of the nodes."""
        if not self.values:
            return 0
        noted, end = self.ends.get(id(output), (None, 0))
        if noted is not None and noted() is output:
            return end
        number = _number(output)
        known = [(_number(t), count) for reference, count in self.ends.values() if (t := reference()) is not None]
        if number < 0:
            return len(self.values)
        return min((count for other, count in known if other > number), default=len(self.values))

    def __deepcopy__(self, memo: dict[int, Any]) -> "Forward":
        return Forward(self.grad)


def _number(tensor: Tensor) -> int:
    node = tensor.grad_fn
    return -1 if node is None else node._sequence_nr()


PENDING: "weakref.WeakSet[Forward]" = weakref.WeakSet()  # forwards that wait for a loss


class Region:
    """The calls `start` to `end` of a forward. A backward may recompute them once it has reached their output."""

    def __init__(self, forward: Forward, start: int, end: int) -> None:
        self.forward, self.start, self.end = forward, start, end

    def enter(self, *_: Any) -> None:
        """Hook on the output's node: a backward has reached it."""
        task, regions = torch._C._current_graph_task_id(), local.regions
        for over in [other for other in regions if other > task]:  # nested backwards that have ended
            del regions[over]
        regions.pop(task, None)
        regions[task] = weakref.ref(self.forward), self.start, self.end
        if len(regions) > KEPT:
            del regions[min(regions)]


class Local(threading.local):
    """State of this thread: replicas of DataParallel run in their own threads."""

    def __init__(self) -> None:
        self.stack: list[Any] = []  # for each running module with hooks: its Forward and the calls so far, or None
        self.masks: list[Stated] = []  # of `token_mask`
        self.compiled: list[Tensor] = []  # weighted losses of compiled forwards, inside `external_loss`
        self.traced: list[tuple[Any, Padding]] = []  # masks of the last forward, if a part of it was compiled
        self.regions: dict[int, tuple[Any, int, int]] = {}  # the last one that each backward has reached
        self.call: Call | None = None  # of the layer that is about to inject its term


local = Local()


def current() -> Forward | None:
    """The running forward, if any."""
    found = local.stack[-1] if local.stack else None
    return found[0] if isinstance(found, tuple) else None


def region() -> tuple[Forward, int, int] | None:
    """The region that this backward has reached, if any: a forward, and the first and the end of its calls."""
    found = local.regions.get(torch._C._current_graph_task_id())
    forward = None if found is None else found[0]()
    return None if found is None or forward is None else (forward, found[1], found[2])


def reached(loss: Tensor, waiting: dict[Forward, list[Term]]) -> list[tuple[Forward, list[Term], list[Value]]]:
    """What the graph of the loss leads to of these forwards and their terms: all of it if it leads to none.

    It leads to what was done before the outputs that the loss depends on, and to layers on its way. Layers that ran
    later take no part.
    """
    missing = {id(term) for terms in waiting.values() for term in terms}
    layers = {term.loss.grad_fn: term for terms in waiting.values() for term in terms}
    ends = dict.fromkeys(waiting, -1)  # how many of a forward's values are reached
    for node in _nodes(loss.grad_fn) if loss.grad_fn is not None else ():
        for forward, (terms, end) in node.metadata.get(MARK, {}).items():
            if forward in ends:
                ends[forward] = max(ends[forward], end)
                missing.difference_update(map(id, terms))
        if node in layers:
            missing.discard(id(layers[node]))
        if not missing and all(end == len(forward.values) for forward, end in ends.items()):
            break
    if max(ends.values(), default=-1) < 0:
        return [(forward, terms, forward.values) for forward, terms in waiting.items()]
    return [
        (forward, [term for term in waiting[forward] if id(term) not in missing], forward.values[:end])
        for forward, end in ends.items()
        if end >= 0
    ]


def _nodes(root: Any) -> Iterator[Any]:
    seen, stack = {root}, [root]
    while stack:
        node = stack.pop()
        yield node
        for following, _ in node.next_functions:
            if following is not None and following not in seen:
                seen.add(following)
                stack.append(following)
