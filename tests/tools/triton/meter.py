"""Count loads and stores of interpreted Triton kernels, and find races and accesses outside of buffers.

    with Meter() as meter: op(...)
    meter.launches[0].loaded, .stored       bytes of the lanes that are not masked
    meter.launches[0].distinct              bytes read and written at least once: the traffic if caches were perfect
    meter.launches[0].sectors               32-byte sectors touched by each instruction: traffic with coalescing
    meter.launches[0].flops                 two for each multiply and add of a tl.dot, masked lanes included
    meter.launches[0].outside, .races       errors; must be empty

Lanes outside of their buffer are recorded and not executed, so that the process survives.
"""

import bisect
import contextlib
from typing import Any, NamedTuple

import numpy as np
import torch
from triton.runtime.interpreter import GridExecutor, InterpreterBuilder, TensorHandle

from tests.tools.triton.strict import patch


class Buffer(NamedTuple):
    """A tensor of a launch, and the program that wrote and read each entry: -1 none, -2 several."""

    name: str
    first: int
    end: int
    size: int
    writers: Any
    readers: Any


class Launch:
    """`loaded` and `stored` bytes by name of the argument, and what went wrong."""

    def __init__(self, name: str, grid: tuple[int, ...], tensors: dict[str, torch.Tensor]) -> None:
        self.name, self.grid = name, (*grid, 1, 1)[:3]
        self.loaded: dict[str, int] = {}
        self.stored: dict[str, int] = {}
        self.sectors, self.flops = 0, 0
        self.outside: list[str] = []
        self.races: list[str] = []
        first = {t.data_ptr(): n for n, t in reversed(tensors.items()) if t.numel()}  # of a tensor with two names
        self.buffers = sorted((_buffer(n, tensors[n]) for n in first.values()), key=lambda b: b.first)

    @property
    def bytes(self) -> int:
        return sum(self.loaded.values()) + sum(self.stored.values())

    @property
    def distinct(self) -> int:
        return sum(int((b.readers != -1).sum() + (b.writers != -1).sum()) * b.size for b in self.buffers)

    def access(self, kind: str, pointers: Any, mask: Any, program: tuple[int, int, int]) -> Any:
        """Record one instruction of one program; returns the lanes that stay inside of their buffer."""
        pointers, mask = (np.ascontiguousarray(a) for a in np.broadcast_arrays(pointers, mask))
        wanted = pointers[mask].astype(np.int64)
        if wanted.size == 0:
            return mask
        owner = self._owner(int(np.median(wanted)))
        inside = (wanted >= owner.first) & (wanted + owner.size <= owner.end)
        if not inside.all():
            offset = (int(wanted[~inside][0]) - owner.first) // owner.size
            self.outside.append(f"{kind} {owner.name}[{offset}] by program {program}, {(~inside).sum()} lanes")
        wanted = wanted[inside]
        counter = self.loaded if kind == "load" else self.stored
        counter[owner.name] = counter.get(owner.name, 0) + wanted.size * owner.size
        self.sectors += np.unique(wanted >> 5).size
        self._watch(kind, owner, (wanted - owner.first) // owner.size, program)
        mask = mask.copy()
        mask[mask] = inside
        return mask

    def _owner(self, address: int) -> Buffer:
        """The buffer that holds the middle lane, or the nearest below it."""
        return self.buffers[max(bisect.bisect_right([b.first for b in self.buffers], address) - 1, 0)]

    def _watch(self, kind: str, owner: Buffer, entries: Any, program: tuple[int, int, int]) -> None:
        """Find races: no program may read or write an entry that another writes, nor write one twice at once."""
        mine = program[0] + self.grid[0] * (program[1] + self.grid[1] * program[2])
        written, read = owner.writers[entries], owner.readers[entries]
        foreign = (written != -1) & (written != mine)
        if kind == "store":
            foreign |= (read != -1) & (read != mine)
            if np.unique(entries).size != entries.size:
                self.races.append(f"two lanes of program {program} store to one entry of {owner.name}")
            owner.writers[entries] = mine
        else:
            owner.readers[entries] = np.where((read == -1) | (read == mine), mine, -2)
        if foreign.any():
            self.races.append(f"{kind} of {owner.name} by program {program}, shared with another program")


def _buffer(name: str, t: torch.Tensor) -> Buffer:
    span = sum((n - 1) * stride for n, stride in zip(t.shape, t.stride(), strict=True)) + 1
    nobody = [np.full(span, -1, np.int32) for _ in range(2)]
    return Buffer(name, t.data_ptr(), t.data_ptr() + span * t.element_size(), t.element_size(), *nobody)


def _tensors(arguments: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Tensors among the arguments; those in tuples have names such as ``layer.x`` or ``gradients[2]``."""
    found: dict[str, torch.Tensor] = {}
    for name, value in arguments.items():
        if isinstance(value, tuple):
            fields = [f".{field}" for field in getattr(value, "_fields", ())] or [f"[{i}]" for i in range(len(value))]
            found |= _tensors({f"{name}{field}": entry for field, entry in zip(fields, value, strict=True)})
        elif isinstance(value, torch.Tensor):
            found[name] = value
    return found


class Meter(contextlib.ExitStack):
    """Records every launch in its block, in `launches`."""

    def __init__(self) -> None:
        super().__init__()
        self.launches: list[Launch] = []

    def __enter__(self) -> "Meter":
        super().__enter__()

        def load(old: Any) -> Any:
            def op(builder: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
                return old(builder, pointers, self._access(builder, "load", pointers, mask), *rest)

            return op

        def store(old: Any) -> Any:
            def op(builder: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
                return old(builder, pointers, value, self._access(builder, "store", pointers, mask), *rest)

            return op

        def atomic(old: Any) -> Any:
            def op(*_: Any) -> Any:
                raise AssertionError("an atomic operation: its order is not fixed")

            return op

        def dot(old: Any) -> Any:
            def op(builder: Any, a: Any, b: Any, *rest: Any) -> Any:
                self.launches[-1].flops += 2 * a.data.shape[0] * a.data.shape[1] * b.data.shape[1]
                return old(builder, a, b, *rest)

            return op

        def call(old: Any) -> Any:
            def op(executor: Any, *args: Any, **kwargs: Any) -> Any:
                arguments = dict(zip(executor.arg_names, args, strict=False)) | kwargs
                self.launches.append(Launch(executor.fn.__name__, executor.grid, _tensors(arguments)))
                return old(executor, *args, **kwargs)

            return op

        patch(self, InterpreterBuilder, "create_masked_load", load)
        patch(self, InterpreterBuilder, "create_masked_store", store)
        patch(self, InterpreterBuilder, "create_atomic_rmw", atomic)
        patch(self, InterpreterBuilder, "create_dot", dot)
        patch(self, GridExecutor, "__call__", call)
        return self

    def _access(self, builder: Any, kind: str, pointers: Any, mask: Any) -> Any:
        kept = self.launches[-1].access(kind, pointers.data, mask.data, builder.grid_idx)
        return TensorHandle(kept, mask.dtype)
