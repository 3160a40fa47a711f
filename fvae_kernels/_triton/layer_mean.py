"""layer, forward: the terms of the objective, of the sums that each program of layer_fwd_kernel left.

nll  = sum over features of  q_d / 2 + log |t_d| + log(2 pi) / 2,   q_d = mean over tokens of r_d^2
term = table[term] . statistics
"""

# mypy: allow-untyped-defs

import triton
import triton.language as tl

from ._common import tile, tokens
from ._layer_common import NLL, STATISTICS, VAR, weight
from .reconstruct import HALF_LOG_2_PI


@triton.jit
def layer_mean_kernel(
    squares_ptr,  # [P, D]
    statistics_ptr,  # [P, 16]
    scale,  # pointer and strides of t [D]
    table,  # the weights of the statistics in loss, kl and gamma
    kept_ptr,  # int64 [] or None
    terms,  # pointers to loss, nll, kl and gamma
    unit_grad_scale_ptr,  # [D]
    P,
    N,
    D,
    R,
    BLOCK_P: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    count = tokens(kept_ptr, N, tl.float64)
    over = tl.maximum(count, 1.0)
    scale_ptr, scale_strides = scale
    nll = tl.zeros((BLOCK_D,), tl.float64)
    for first in range(0, D, BLOCK_D):
        # 1. q, the mean over tokens of r^2, and what becomes of it; all is 0 where no token counts
        cols = first + tl.arange(0, BLOCK_D)
        squares = tl.zeros((BLOCK_P, BLOCK_D), tl.float64)
        for part in range(0, P, BLOCK_P):
            rows = part + tl.arange(0, BLOCK_P)
            here = (rows < P)[:, None] & (cols < D)[None, :]
            squares += tl.load(tile(squares_ptr, rows, cols, (D, 1)), mask=here, other=0).to(tl.float64)
        q = tl.sum(squares, 0) / over
        t = tl.load(scale_ptr + cols * scale_strides[0], mask=cols < D, other=1).to(tl.float64)
        counts = cols < tl.where(count > 0, D, 0)
        nll += tl.where(counts, q / 2 + tl.log(tl.abs(t)) + HALF_LOG_2_PI, 0)
        unit_grad_scale = tl.where(counts, (1 - q) / t, 0).to(unit_grad_scale_ptr.dtype.element_ty)
        tl.store(unit_grad_scale_ptr + cols, unit_grad_scale, mask=cols < D)
    # 2. The other statistics
    lanes = tl.arange(0, 16)
    sums = tl.zeros((BLOCK_P, 16), tl.float64)
    for part in range(0, P, BLOCK_P):
        rows = part + tl.arange(0, BLOCK_P)
        here = (rows < P)[:, None] & (lanes >= 0)[None, :]
        sums += tl.load(tile(statistics_ptr, rows, lanes, (16, 1)), mask=here, other=0).to(tl.float64)
    means = tl.where(lanes == 0, 1.0, tl.sum(sums, 0) / over)
    means = tl.where(lanes == NLL, tl.sum(nll), means)
    means = tl.where((lanes == VAR) | (lanes == VAR + 4), means + R, means)  # they are of var - 1
    # 3. The terms; NaN counts only where it has a weight
    tl.store(terms[1], tl.sum(nll).to(terms[1].dtype.element_ty))
    for term in tl.static_range(3):
        value = tl.zeros((), tl.float64)
        for i in tl.static_range(STATISTICS):
            w = weight(table, term * STATISTICS + i, tl.float64)
            value += tl.where(w != 0, w * tl.sum(tl.where(lanes == i, means, 0)), 0)
        to = terms[term + (term > 0)]
        tl.store(to, tl.where(count > 0, value, 0).to(to.dtype.element_ty))
