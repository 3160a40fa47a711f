"""Make Triton's interpreter compute as a GPU does, and stricter. Written for Triton 3.9.

bfloat16      computed and rounded as numbers; the interpreter works on their bits and truncates
masked lanes  of a load without ``other=`` are NaN; the interpreter makes them 0
overflow      of int32 raises; the interpreter wraps, as a GPU does
tl.dot        refuses an inner dimension below 16, of numbers of 32 bits below 8, of 64 below 4
order         of the programs may be reversed or shuffled; it is not defined on a GPU
corners       runs the first, middle and last programs of each axis of the grid, for grids that are too large
"""

import contextlib
import dataclasses
import itertools
import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import triton.language as tl
import triton.runtime.interpreter as interpreter
from triton.runtime.interpreter import GridExecutor, InterpreterBuilder, ReduceOps, TensorHandle


def patch(stack: contextlib.ExitStack, owner: Any, name: str, wrap: Callable[[Any], Any]) -> None:
    """Replace an attribute by `wrap(attribute)` until the stack closes."""
    old = getattr(owner, name)
    setattr(owner, name, wrap(old))
    stack.callback(setattr, owner, name, old)


@contextlib.contextmanager
def strict(order: str | int | None = None, corners: bool = False) -> Iterator[None]:
    """`order` is None, "reverse" or the seed of a shuffle."""
    with contextlib.ExitStack() as stack:
        _bfloat16_is_a_number(stack)
        patch(stack, InterpreterBuilder, "create_masked_load", _poison_masked_lanes)
        builder: Any = interpreter.interpreter_builder
        patch(stack, builder, "options", lambda options: dataclasses.replace(options, debug=True))
        minimum = {"min_dot_size": lambda left, right: (1, 1, 256 // left.scalar.primitive_bitwidth)}
        patch(stack, builder, "codegen_fns", lambda functions: {**functions, **minimum})
        if order is not None:
            patch(stack, InterpreterBuilder, "set_grid_idx", lambda set_index: _in_order(set_index, order))
        if corners:
            _corners_alone(stack)
        yield


def _is_bfloat16(handle: Any) -> bool:
    return handle.dtype.scalar == tl.bfloat16 and handle.data.dtype == np.uint16


def _decoded(handle: Any) -> Any:
    if not _is_bfloat16(handle):
        return handle.data
    return (np.ascontiguousarray(handle.data).astype(np.uint32) << np.uint32(16)).view(np.float32)


def _encoded(numbers: Any) -> Any:
    """Round to bfloat16 and return the bits: to nearest, ties to even."""
    bits = np.ascontiguousarray(numbers, dtype=np.float32).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(numbers), np.uint32(0x7FC0), rounded).astype(np.uint16)


def _handle(numbers: Any, dtype: Any) -> Any:
    return TensorHandle(numbers if numbers.dtype == np.bool_ else _encoded(numbers), dtype)


def _bfloat16_is_a_number(stack: contextlib.ExitStack) -> None:
    def binary(old: Any) -> Any:
        def op(self: Any, left: Any, right: Any, function: Any) -> Any:
            if not (_is_bfloat16(left) or _is_bfloat16(right)):
                return old(self, left, right, function)
            return _handle(function(_decoded(left), _decoded(right)), left.dtype.scalar)

        return op

    def unary(old: Any) -> Any:
        def op(self: Any, value: Any, function: Any) -> Any:
            if not _is_bfloat16(value):
                return old(self, value, function)
            return _handle(function(_decoded(value)), tl.bfloat16)

        return op

    def cast(old: Any) -> Any:
        def op(self: Any, value: Any, to: Any) -> Any:
            if to.scalar == tl.bfloat16 and not _is_bfloat16(value):
                return TensorHandle(_encoded(value.data.astype(np.float32)), tl.bfloat16)
            if _is_bfloat16(value) and to.scalar == tl.float32:
                return TensorHandle(_decoded(value), tl.float32)
            if _is_bfloat16(value) and to.scalar != tl.bfloat16:
                return old(self, TensorHandle(_decoded(value), tl.float32), to)
            return old(self, value, to)

        return op

    def dot(old: Any) -> Any:
        def op(self: Any, a: Any, b: Any, sums: Any, *options: Any) -> Any:
            if not (_is_bfloat16(a) or _is_bfloat16(b)):
                return old(self, a, b, sums, *options)
            return TensorHandle(_decoded(a) @ _decoded(b) + sums.data, sums.dtype.scalar)

        return op

    def no_sum(old: Any) -> Any:
        def op(self: Any, value: Any, *options: Any) -> Any:
            assert not _is_bfloat16(value.handle), "sums of bfloat16 lose digits: convert to float32 first"
            return old(self, value, *options)

        return op

    patch(stack, InterpreterBuilder, "binary_op", binary)
    patch(stack, InterpreterBuilder, "unary_op", unary)
    patch(stack, InterpreterBuilder, "cast_impl", cast)
    patch(stack, InterpreterBuilder, "create_dot", dot)
    patch(stack, ReduceOps, "sum", no_sum)


def _poison_masked_lanes(old: Any) -> Any:
    def load(self: Any, pointers: Any, mask: Any, other: Any, *options: Any) -> Any:
        if other is None:
            kind = pointers.get_element_ty()
            dtype = interpreter._get_np_dtype(kind)
            floating = np.issubdtype(dtype, np.floating)
            poison = np.nan if floating else np.frombuffer(b"\x7f" * np.dtype(dtype).itemsize, dtype)[0]
            other = TensorHandle(np.full(pointers.data.shape, poison, dtype), kind)
        return old(self, pointers, mask, other, *options)

    return load


def _in_order(set_index: Any, order: str | int) -> Any:
    def op(self: Any, x: int, y: int, z: int) -> None:
        width, height, depth = self.grid_dim
        if (x, y, z) == (0, 0, 0):
            self.order = list(range(width * height * depth))
            if order == "reverse":
                self.order.reverse()
            else:
                random.Random(order).shuffle(self.order)
        i = self.order[(x * height + y) * depth + z]
        set_index(self, i // (height * depth), i // depth % height, i % depth)

    return op


def _corners_alone(stack: contextlib.ExitStack) -> None:
    real: list[tuple[int, ...]] = [(1, 1, 1)]
    chosen: list[tuple[int, ...]] = []

    def call(old: Any) -> Any:
        def op(self: Any, *args: Any, **kwargs: Any) -> Any:
            real[0] = (*self.grid, 1, 1)[:3]
            chosen[:] = itertools.product(*(sorted({0, n // 2, n - 1}) for n in real[0]))
            self.grid = (len(chosen),)
            return old(self, *args, **kwargs)

        return op

    patch(stack, GridExecutor, "__call__", call)
    patch(stack, InterpreterBuilder, "set_grid_dim", lambda old: lambda self, *_: old(self, *real[0]))
    patch(stack, InterpreterBuilder, "set_grid_idx", lambda old: lambda self, x, *_: old(self, *chosen[x]))
