"""Sums over tokens: each chunk of tokens stores its own, and `layer_reduce_kernel` adds the chunks up."""

# mypy: allow-untyped-defs, disable-error-code="assignment, misc, var-annotated"

import triton
import triton.language as tl

from .._common import tile


@triton.constexpr_function
def tiles_of(size, T):
    return -(-size // T)


@triton.jit
def rows_of(block, N, BLOCK_N: tl.constexpr):
    rows = tl.cast(block, tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    return rows, rows < N


@triton.jit
def store_sums(parts_ptr, sums, rows, first, cols, ROWS, COLS, stride):
    """Store a tile [rows, cols] of a parameter's sums, with `stride` entries a row and columns from `first` on."""
    inside = (rows < ROWS)[:, None] & (cols < COLS)[None, :]
    tl.store(tile(parts_ptr, rows, first + cols, (stride, 1)), sums, mask=inside)


@triton.jit
def add_to_sums(parts_ptr, sums, rows, first, cols, ROWS, COLS, stride, empty):
    """Add to a tile that only this program stores; `empty`: nothing is there yet."""
    inside = (rows < ROWS)[:, None] & (cols < COLS)[None, :]
    to = tile(parts_ptr, rows, first + cols, (stride, 1))
    before = tl.load(to, mask=inside & (not empty), other=0)
    tl.store(to, before + sums, mask=inside)


@triton.jit(do_not_specialize=["P"])
def layer_reduce_kernel(
    parts_ptr,  # [P, length]
    gradients,  # pointers to the requested gradients, contiguous
    starts,  # offset of each in a row of parts
    sizes,  # number of entries of each
    P,
    length,
    ACC: tl.constexpr,
    BLOCK_L: tl.constexpr,
):
    """Sum parts over the first dimension, always in the same order."""
    program = tl.program_id(0)
    for i in tl.static_range(len(gradients)):
        if (program >= 0) & (program < tl.cdiv(sizes[i], BLOCK_L)):
            entries = program * BLOCK_L + tl.arange(0, BLOCK_L)
            inside = entries < sizes[i]
            sums = tl.zeros((BLOCK_L,), ACC)
            for part in range(P):
                at = tl.cast(part, tl.int64) * length + starts[i]
                sums += tl.load(parts_ptr + at + entries, mask=inside, other=0)
            tl.store(gradients[i] + entries, sums.to(gradients[i].dtype.element_ty), mask=inside)
        program -= tl.cdiv(sizes[i], BLOCK_L)
