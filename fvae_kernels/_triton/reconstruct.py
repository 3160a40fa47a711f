"""reconstruct: the decoder's output layer and its Gaussian likelihood, in nats.   Mathematics: reference.reconstruct

    x_hat = g O^T + o,   r = (x_hat - x) / t,   q_d = mean over tokens of r_d^2
    nll   = sum over features of  q_d / 2 + log |t_d| + log(2 pi) / 2

x_hat exists for one block of tokens and features at a time, in registers; each kernel computes it again.
"""

# mypy: allow-untyped-defs

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from ..ops._raw import wide_dtype
from ._common import Table, accumulator, blocks, counting, kept_tokens, precision, product, strides, tile, tokens

HALF_LOG_2_PI = tl.constexpr(0.91893853320467274178)
PROGRAMS = 512  # programs of a sum over tokens, about; each leaves a partial sum

TABLE: Table = {
    (2, True): {"BLOCK_N": 32, "BLOCK_D": 64, "BLOCK_H": 128, "num_warps": 4, "num_stages": 2},
    (2, False): {"BLOCK_N": 64, "BLOCK_D": 64, "BLOCK_H": 128, "num_warps": 8, "num_stages": 2},
    (4, True): {"BLOCK_N": 32, "BLOCK_D": 32, "BLOCK_H": 32, "num_warps": 4, "num_stages": 2},
    (4, False): {"BLOCK_N": 64, "BLOCK_D": 32, "BLOCK_H": 32, "num_warps": 4, "num_stages": 2},
    (8, True): {"BLOCK_N": 16, "BLOCK_D": 16, "BLOCK_H": 32, "num_warps": 4, "num_stages": 2},
    (8, False): {"BLOCK_N": 32, "BLOCK_D": 16, "BLOCK_H": 32, "num_warps": 4, "num_stages": 2},
}


@triton.jit
def residual(
    inputs,  # pointers to x [N, D], g [N, H], w_out [D, H], b_out [D] or None, scale [D]
    strides,  # of these
    rows,
    cols,
    keep,  # rows that the mask keeps
    D,
    H,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_H: tl.constexpr,
    H_BLOCKS: tl.constexpr,
):
    """r = (x_hat - x) / t of one block, 0 for tokens that the mask drops; and 1 / t."""
    x_ptr, g_ptr, w_ptr, b_ptr, scale_ptr = inputs
    x_strides, g_strides, w_strides, b_strides, scale_strides = strides
    x_hat = tl.zeros((rows.shape[0], cols.shape[0]), ACC)
    for block in range(H_BLOCKS):
        hidden = block * BLOCK_H + tl.arange(0, BLOCK_H)
        in_g, in_w = keep[:, None] & (hidden < H)[None, :], (cols < D)[:, None] & (hidden < H)[None, :]
        g = tl.load(tile(g_ptr, rows, hidden, g_strides), mask=in_g, other=0)
        w = tl.load(tile(w_ptr, cols, hidden, w_strides), mask=in_w, other=0)
        x_hat = product(g, tl.trans(w), x_hat, PRECISION)
    if b_ptr is not None:
        x_hat += tl.load(b_ptr + cols * b_strides[0], mask=cols < D, other=0).to(ACC)[None, :]
    counts = keep[:, None] & (cols < D)[None, :]
    x = tl.load(tile(x_ptr, rows, cols, x_strides), mask=counts, other=0).to(ACC)
    scale = tl.load(scale_ptr + cols * scale_strides[0], mask=cols < D, other=0).to(ACC)
    inverse = 1 / tl.where(cols < D, scale, 1)
    return tl.where(counts, (x_hat - x) * inverse[None, :], 0), inverse


@triton.jit(do_not_specialize=["N"])
def reconstruct_fwd_kernel(
    inputs,  # as in residual
    input_strides,
    mask_ptr,  # bool [N] or None
    mask_strides,
    parts_ptr,  # [chunks, D]: sums of r^2
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
    # 1. Features of this program, and its tokens: every chunks-th block
    cols = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    chunk, chunks = tl.program_id(1), tl.num_programs(1)
    squares = tl.zeros((BLOCK_N, BLOCK_D), ACC)
    for block in range(chunk, tl.cdiv(N, BLOCK_N), chunks):
        # 2. Squares of r
        rows = tl.cast(block, tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
        keep = counting(mask_ptr, mask_strides, rows, N)
        r, _ = residual(inputs, input_strides, rows, cols, keep, D, H, ACC, PRECISION, BLOCK_H, H_BLOCKS)
        squares += r * r
    # 3. Store one sum for each feature
    tl.store(parts_ptr + chunk.to(tl.int64) * D + cols, tl.sum(squares, 0), mask=cols < D)


@triton.jit(do_not_specialize=["P", "N"])
def reconstruct_mean_kernel(
    parts_ptr,  # [P, D]
    scale_ptr,  # [D]
    scale_strides,
    kept_ptr,  # int64 [] or None
    nll_ptr,  # [programs]: sums over their features
    unit_grad_scale_ptr,  # [D]
    P,
    N,
    D,
    BLOCK_P: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    # 1. q, the mean over tokens of r^2
    cols = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    squares = tl.zeros((BLOCK_P, BLOCK_D), tl.float64)
    for first in range(0, P, BLOCK_P):
        rows = first + tl.arange(0, BLOCK_P)
        inside = (rows < P)[:, None] & (cols < D)[None, :]
        squares += tl.load(tile(parts_ptr, rows, cols, (D, 1)), mask=inside, other=0).to(tl.float64)
    count = tokens(kept_ptr, N, tl.float64)
    q = tl.sum(squares, 0) / tl.maximum(count, 1.0)
    # 2. nll and its gradient (1 - q) / t; both are 0 if there is no token
    scale = tl.load(scale_ptr + cols * scale_strides[0], mask=cols < D, other=0).to(tl.float64)
    scale = tl.where(cols < D, scale, 1)
    counts = cols < tl.where(count > 0, D, 0)
    nll = tl.where(counts, q / 2 + tl.log(tl.abs(scale)) + HALF_LOG_2_PI, 0)
    tl.store(nll_ptr + tl.program_id(0), tl.sum(nll).to(nll_ptr.dtype.element_ty))
    unit_grad_scale = tl.where(counts, (1 - q) / scale, 0)
    tl.store(unit_grad_scale_ptr + cols, unit_grad_scale.to(unit_grad_scale_ptr.dtype.element_ty), mask=cols < D)


def options_for(kernel: Any, table: Table, x: Tensor, g: Tensor) -> dict[str, Any]:
    options = blocks(kernel, table, x, BLOCK_D=x.shape[1], BLOCK_H=g.shape[1])
    return options | {
        "H_BLOCKS": triton.cdiv(g.shape[1], options["BLOCK_H"]),
        "ACC": accumulator(x),
        "PRECISION": precision(x.dtype),
    }


def chunks_of(tokens: int, block: int, others: int) -> int:
    """Number of programs that share the tokens, if `others` programs read the same tokens for other features."""
    return max(min(triton.cdiv(tokens, block), PROGRAMS // max(others, 1)), 1)


def reconstruct_fwd(
    x: Tensor, g: Tensor, w_out: Tensor, b_out: Tensor | None, scale: Tensor, mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    (N, D), H = x.shape, g.shape[1]
    inputs = (x, g, w_out, b_out, scale)
    options = options_for(reconstruct_fwd_kernel, TABLE, x, g)
    features = max(triton.cdiv(D, options["BLOCK_D"]), 1)
    chunks = chunks_of(N, options["BLOCK_N"], features)
    parts = x.new_empty((chunks, D), dtype=wide_dtype(x))
    reconstruct_fwd_kernel[(features, chunks)](
        inputs, tuple(map(strides, inputs)), mask, strides(mask), parts, N, D, H, **options
    )
    sums, unit_grad_scale = parts.new_empty(max(triton.cdiv(D, 64), 1)), parts.new_empty(D)
    reconstruct_mean_kernel[sums.shape](
        parts, scale, scale.stride(), kept_tokens(mask), sums, unit_grad_scale, chunks, N, D, BLOCK_P=32, BLOCK_D=64
    )
    return sums.sum(), unit_grad_scale
