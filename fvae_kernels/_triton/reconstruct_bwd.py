"""Backward of reconstruct. With r = (x_hat - x) / t, computed again, and s = grad_nll / kept tokens:

    grad_x = -s r / t        grad_g = s r (O / t)        grad_O = s / t (r^T g)        grad_o = s / t (column sums of r)

Matrix products are of r and O / t, which are in the range of float16 whatever s is. There are two kernels because
grad_g sums over features and grad_O over tokens. Each runs only if one of its gradients is needed.
"""

# mypy: allow-untyped-defs

import triton
import triton.language as tl
from torch import Tensor

from ..ops._raw import wide_dtype
from ._common import Table, counting, kept_tokens, product, reduced, share, strides, tile
from .reconstruct import chunks_of, options_for, residual

BY_TOKENS: Table = {  # wide blocks of hidden entries, because each of them computes r again
    (2, True): {"BLOCK_N": 32, "BLOCK_D": 64, "BLOCK_H": 128, "num_warps": 4, "num_stages": 2},
    (2, False): {"BLOCK_N": 64, "BLOCK_D": 32, "BLOCK_H": 128, "num_warps": 4, "num_stages": 2},
    (4, True): {"BLOCK_N": 32, "BLOCK_D": 32, "BLOCK_H": 64, "num_warps": 4, "num_stages": 2},
    (4, False): {"BLOCK_N": 64, "BLOCK_D": 32, "BLOCK_H": 64, "num_warps": 8, "num_stages": 2},
    (8, True): {"BLOCK_N": 16, "BLOCK_D": 16, "BLOCK_H": 32, "num_warps": 4, "num_stages": 2},
    (8, False): {"BLOCK_N": 32, "BLOCK_D": 16, "BLOCK_H": 32, "num_warps": 4, "num_stages": 2},
}
BY_FEATURES: Table = BY_TOKENS | {
    (2, False): {"BLOCK_N": 32, "BLOCK_D": 64, "BLOCK_H": 128, "num_warps": 4, "num_stages": 2},
}


@triton.jit(do_not_specialize=["N"])
def reconstruct_bwd_tokens_kernel(
    grad_nll_ptr,  # []
    inputs,  # as in residual
    input_strides,
    mask_ptr,  # bool [N] or None
    mask_strides,
    kept_ptr,  # int64 [] or None
    grad_x_ptr,  # [N, D] contiguous, or None if not needed, like the next
    grad_g_ptr,  # [N, H]
    N,
    D,
    H,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_H: tl.constexpr,
    H_BLOCKS: tl.constexpr,
):
    # 1. Tokens and hidden entries of this program
    rows = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    hidden = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    keep = counting(mask_ptr, mask_strides, rows, N)
    s = share(grad_nll_ptr, kept_ptr, N, ACC)
    grad_g = tl.zeros((BLOCK_N, BLOCK_H), ACC)
    for first in range(0, D, BLOCK_D):
        # 2. r of a block of features
        cols = first + tl.arange(0, BLOCK_D)
        r, inverse = residual(inputs, input_strides, rows, cols, keep, D, H, ACC, PRECISION, BLOCK_H, H_BLOCKS)
        # 3. grad_x = -s r / t
        if grad_x_ptr is not None and tl.program_id(1) == 0:
            inside = (rows < N)[:, None] & (cols < D)[None, :]
            grad_x = -s * r * inverse[None, :]
            tl.store(tile(grad_x_ptr, rows, cols, (D, 1)), grad_x.to(grad_x_ptr.dtype.element_ty), mask=inside)
        # 4. grad_g = s r (O / t)
        if grad_g_ptr is not None:
            in_w = (cols < D)[:, None] & (hidden < H)[None, :]
            w = tl.load(tile(inputs[2], cols, hidden, input_strides[2]), mask=in_w, other=0)
            dtype: tl.constexpr = w.dtype
            grad_g = product(r.to(dtype), (w.to(ACC) * inverse[:, None]).to(dtype), grad_g, PRECISION)
    if grad_g_ptr is not None:
        inside = (rows < N)[:, None] & (hidden < H)[None, :]
        tl.store(tile(grad_g_ptr, rows, hidden, (H, 1)), (s * grad_g).to(grad_g_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["N"])
def reconstruct_bwd_features_kernel(
    grad_nll_ptr,  # []
    inputs,  # as in residual
    input_strides,
    mask_ptr,  # bool [N] or None
    mask_strides,
    kept_ptr,  # int64 [] or None
    parts_w_ptr,  # [chunks, D, H], or None if not needed, like the next
    parts_b_ptr,  # [chunks, D]
    N,
    D,
    H,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_H: tl.constexpr,
    H_BLOCKS: tl.constexpr,
):
    # 1. Features and hidden entries of this program, and its tokens: every chunks-th block
    cols = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    hidden = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    chunk, chunks = tl.program_id(2), tl.num_programs(2)
    grad_w = tl.zeros((BLOCK_D, BLOCK_H), ACC)
    grad_b = tl.zeros((BLOCK_D,), ACC)
    for block in range(chunk, tl.cdiv(N, BLOCK_N), chunks):
        # 2. r of a block of tokens
        rows = tl.cast(block, tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
        keep = counting(mask_ptr, mask_strides, rows, N)
        r, _ = residual(inputs, input_strides, rows, cols, keep, D, H, ACC, PRECISION, BLOCK_H, H_BLOCKS)
        # 3. r^T g and column sums of r
        if parts_w_ptr is not None:
            in_g = keep[:, None] & (hidden < H)[None, :]
            g = tl.load(tile(inputs[1], rows, hidden, input_strides[1]), mask=in_g, other=0)
            grad_w = product(tl.trans(r.to(g.dtype)), g, grad_w, PRECISION)
        if parts_b_ptr is not None:
            grad_b += tl.sum(r, 0)
    # 4. Times s / t
    scale = tl.load(inputs[4] + cols * input_strides[4][0], mask=cols < D, other=0).to(ACC)
    factor = share(grad_nll_ptr, kept_ptr, N, ACC) / tl.where(cols < D, scale, 1)
    part = chunk.to(tl.int64) * D + cols
    if parts_w_ptr is not None:
        inside = (cols < D)[:, None] & (hidden < H)[None, :]
        tl.store(tile(parts_w_ptr, part, hidden, (H, 1)), grad_w * factor[:, None], mask=inside)
    if parts_b_ptr is not None and tl.program_id(1) == 0:
        tl.store(parts_b_ptr + part, grad_b * factor, mask=cols < D)


def reconstruct_bwd(
    grad_nll: Tensor,
    x: Tensor,
    g: Tensor,
    w_out: Tensor,
    b_out: Tensor | None,
    scale: Tensor,
    mask: Tensor | None,
    needs: list[bool],
) -> tuple[Tensor, ...]:
    (N, D), H = x.shape, g.shape[1]
    need_x, need_g, need_w, need_b = needs
    inputs, kept = (x, g, w_out, b_out, scale), kept_tokens(mask)
    arguments = (grad_nll, inputs, tuple(map(strides, inputs)), mask, strides(mask), kept)
    grad_x, grad_g = x.new_empty(x.shape if need_x else 0), g.new_empty(g.shape if need_g else 0)
    grad_w, grad_b = x.new_empty(0), x.new_empty(0)

    if (need_x or need_g) and N > 0:
        options = options_for(reconstruct_bwd_tokens_kernel, BY_TOKENS, x, g)
        hidden = options["H_BLOCKS"] if need_g else 1
        reconstruct_bwd_tokens_kernel[(triton.cdiv(N, options["BLOCK_N"]), max(hidden, 1))](
            *arguments, grad_x if need_x else None, grad_g if need_g else None, N, D, H, **options
        )
    if need_w or need_b:
        options = options_for(reconstruct_bwd_features_kernel, BY_FEATURES, x, g)
        features, hidden = triton.cdiv(D, options["BLOCK_D"]), max(options["H_BLOCKS"], 1) if need_w else 1
        chunks = chunks_of(N, options["BLOCK_N"], features * hidden)
        parts_w = x.new_empty((chunks, D, H), dtype=wide_dtype(x)) if need_w else None
        parts_b = x.new_empty((chunks, D), dtype=wide_dtype(x)) if need_b else None
        reconstruct_bwd_features_kernel[(features, hidden, chunks)](*arguments, parts_w, parts_b, N, D, H, **options)
        grad_w = grad_w if parts_w is None else reduced(parts_w, x.dtype)
        grad_b = grad_b if parts_b is None else reduced(parts_b, x.dtype)
    return grad_x, grad_g, grad_w, grad_b
