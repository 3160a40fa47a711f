"""Shared by the kernels: block shapes, addresses, masked tokens, matrix products, sums in a fixed order."""

# mypy: allow-untyped-defs

import os
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime import driver

from .. import reference
from ..ops._backend import interpreting
from .tables import FEW_TOKENS, OVERRIDES, padded

INTERPRET = tl.constexpr(interpreting())
LOGVAR_LIMIT = tl.constexpr(reference.LOGVAR_LIMIT)

# (bytes of an entry, few tokens): blocks, num_warps, num_stages
Table = dict[tuple[int, bool], dict[str, int]]


def blocks(kernel: Any, table: Table, t: Tensor, **limits: int) -> dict[str, Any]:
    """Launch options of `kernel` for rows of t [N, ...]: no block wider than what it covers, as in BLOCK_D=D."""
    options = table[t.element_size(), t.shape[0] < FEW_TOKENS] | OVERRIDES.get(kernel.__name__, {})
    return options | {name: min(options[name], padded(size)) for name, size in limits.items()}


_targets: dict[Any, str] = {}  # by active driver, which takes long to tell


def target() -> str:
    """What kernels are compiled for: "cuda" or "hip"; "" if they are interpreted."""
    if INTERPRET.value:
        return ""
    active = driver.active
    found = _targets.get(active)
    if found is None:
        found = _targets[active] = active.get_current_target().backend
    return found


def triton_dtype(wide: torch.dtype) -> tl.dtype:
    """Of sums, which are taken in float32 at least."""
    return tl.float64 if wide == torch.float64 else tl.float32


def accumulator(t: Tensor) -> tl.dtype:
    """What sums over t are taken in."""
    return triton_dtype(t.dtype)


def precision(dtype: torch.dtype, products: torch.dtype | None = None) -> str:
    """Of products of float32: in another dtype where that is asked for, else as PyTorch's own are set."""
    if products is not None:
        return str(products).removeprefix("torch.")
    return "tf32" if dtype == torch.float32 and allows_tf32() else "ieee"


def allows_tf32() -> bool:
    """True if PyTorch's own float32 matrix products on a GPU may use TF32, whichever way that was set.

    ``torch.backends.cuda.matmul.fp32_precision``, read here where it is kept, is what PyTorch derives from the new
    settings, from the old ones and from their order. The old ``allow_tf32`` raises once a new setting was used
    (PyTorch 2.9 and newer).
    """
    return torch._C._get_fp32_precision_getter("cuda", "matmul") == "tf32"


def kept_tokens(mask: Tensor | None) -> Tensor | None:
    """Number of tokens that the mask keeps, 0-dim, on its device; None if there is no mask."""
    return None if mask is None else mask.sum()


def strides(t: Tensor | None) -> tuple[int, ...] | None:
    return None if t is None else t.stride()


@triton.jit
def tile(ptr, rows, cols, strides):
    """Addresses of the entries [rows, cols], in int64: there may be more than 2^31."""
    return ptr + rows.to(tl.int64)[:, None] * strides[0] + cols.to(tl.int64)[None, :] * strides[1]


@triton.jit
def counting(mask_ptr, mask_strides, rows, N):
    """True for rows that are tokens and that the mask keeps."""
    keep = rows < N
    if mask_ptr is not None:
        keep = keep & (tl.load(mask_ptr + rows.to(tl.int64) * mask_strides[0], mask=keep, other=0) != 0)
    return keep


@triton.jit
def tokens(kept_ptr, N, ACC: tl.constexpr):
    """Number of tokens in a mean."""
    if kept_ptr is None:  # noqa: SIM108  (only one branch is compiled)
        count = tl.full((), N, ACC)
    else:
        count = tl.load(kept_ptr).to(ACC)
    return count


@triton.jit
def share(grad_ptr, kept_ptr, N, ACC: tl.constexpr):
    """Gradient of one token, from the gradient of a mean over tokens."""
    if grad_ptr is None:
        of_one = tl.full((), 0.0, ACC)
    else:
        of_one = tl.load(grad_ptr).to(ACC) / tl.maximum(tokens(kept_ptr, N, ACC), 1.0)
    return of_one


@triton.jit
def clamped(logvar):
    """NaN stays NaN."""
    low = tl.where(logvar < -LOGVAR_LIMIT, -LOGVAR_LIMIT, logvar)
    return tl.where(low > LOGVAR_LIMIT, LOGVAR_LIMIT, low)


@triton.jit
def clamp_passes(logvar):
    return (logvar >= -LOGVAR_LIMIT) & (logvar <= LOGVAR_LIMIT)


@triton.jit
def product(a, b, sums, PRECISION: tl.constexpr):
    """sums + a b. a and b are rounded first if PRECISION is a 16-bit dtype."""
    if PRECISION == "bfloat16":
        a, b = a.to(tl.bfloat16), b.to(tl.bfloat16)
    elif PRECISION == "float16":
        a, b = a.to(tl.float16), b.to(tl.float16)
    if INTERPRET:  # the interpreter would multiply the bits of bfloat16
        a, b = a.to(sums.dtype), b.to(sums.dtype)
    of_float32: tl.constexpr = "tf32" if PRECISION == "tf32" else "ieee"
    return tl.dot(a, b, sums, input_precision=of_float32, out_dtype=sums.dtype)


@triton.jit(do_not_specialize=["P"])
def reduce_kernel(
    parts_ptr,  # [P, L]
    total_ptr,  # [L]
    P,
    L,
    ACC: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_L: tl.constexpr,
):
    cols = tl.program_id(0).to(tl.int64) * BLOCK_L + tl.arange(0, BLOCK_L)
    sums = tl.zeros((BLOCK_P, BLOCK_L), ACC)
    for first in range(0, P, BLOCK_P):
        rows = first + tl.arange(0, BLOCK_P)
        inside = (rows < P)[:, None] & (cols < L)[None, :]
        sums += tl.load(tile(parts_ptr, rows, cols, (L, 1)), mask=inside, other=0).to(ACC)
    tl.store(total_ptr + cols, tl.sum(sums, 0).to(total_ptr.dtype.element_ty), mask=cols < L)


def reduced(parts: Tensor, dtype: torch.dtype) -> Tensor:
    """Sum over the first dimension, always in the same order."""
    total = parts.new_empty(parts.shape[1:], dtype=dtype)
    P, L = parts.shape[0], total.numel()
    if L > 0:
        reduce_kernel[(triton.cdiv(L, 64),)](
            parts, total, P, L, accumulator(parts), BLOCK_P=32, BLOCK_L=64, num_warps=4
        )
    return total


os.register_at_fork(after_in_child=_targets.clear)
