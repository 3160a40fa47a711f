"""Terms of forwards without a graph. Their loss may run them again inside its own backward (GradCache).

The values are added to the loss. Its backward notes the weight d(root) / d(task loss), and forwards of the same layers
that begin inside this backward inherit it.
"""

import functools
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from .forward import Forward, Value
from .recompute import in_backward

KEPT = 1000  # at most so many values wait for a loss
_graphless: list[Value] = []
_inside: dict[int, tuple[set[int], Tensor]] = {}  # by backward: layers, weight of their forwards inside it


def keep_values(values: list[Value]) -> None:
    """Note the values of a forward without a graph. The list is bounded, in case no loss follows."""
    _graphless.extend(values)
    del _graphless[:-KEPT]


def take_values(keys: list[Any]) -> list[Value]:
    """Remove and return the values of these layers."""
    taken = [entry for entry in _graphless if entry[0] in keys]
    _graphless[:] = [entry for entry in _graphless if entry[0] not in keys]
    return taken


class InBackward:
    """Notes the weight for forwards of these layers that run inside a backward."""

    def __init__(self, keys: list[Any]) -> None:
        self.keys = set(map(id, keys))

    def __call__(self, task: int, weight: Tensor) -> bool:
        _inside[task] = self.keys, weight
        torch.autograd.Variable._execution_engine.queue_callback(functools.partial(_forget, task))
        return True


def _forget(task: int) -> None:
    _inside.pop(task, None)


def inherit(forward: Forward, keys: Iterable[Any]) -> None:
    """Note if `forward`, of these layers, begins inside a backward; and its weight, if that is of their loss."""
    if not in_backward():
        return
    forward.state.inside = True
    found = _inside.get(torch._C._current_graph_task_id())
    if found is not None and any(id(key) in found[0] for key in keys):
        forward.inherited = found[1]
