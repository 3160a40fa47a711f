"""layer, forward: the terms of the objective, of the sums that each program of layer_fwd_kernel left.

nll  = q / 2 + sum over features of  log |t_d| + log(2 pi) / 2,   q = mean over tokens of the sum over features of r^2
term = table[term] . statistics

One program, which waits for each of its reads: hence few, of many rows each.
"""

# mypy: allow-untyped-defs

import triton
import triton.language as tl

from .._common import tile, tokens
from ..reconstruct import HALF_LOG_2_PI
from .networks import NLL, STATISTICS, VAR, weight

OPTIONS = {"BLOCK_P": 1024, "BLOCK_D": 1024, "num_warps": 16}


@triton.jit
def layer_mean_kernel(
    statistics_ptr,  # [P, 16]: sums over tokens, in the order of the objective's table; r^2 where nll is, var - 1
    scale,  # pointer and strides of t [D]
    table,  # the weights of the statistics in loss, kl and gamma
    kept_ptr,  # int64 [] or None
    terms,  # pointers to loss, nll, kl and gamma
    P,
    N,
    D,
    R,
    BLOCK_P: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    # 1. The part of nll that no token changes
    scale_ptr, scale_strides = scale
    of_scale = tl.zeros((BLOCK_D,), tl.float64)
    for first in range(0, D, BLOCK_D):
        cols = first + tl.arange(0, BLOCK_D)
        t = tl.load(scale_ptr + cols * scale_strides[0], mask=cols < D, other=1).to(tl.float64)
        of_scale += tl.where(cols < D, tl.log(tl.abs(t)) + HALF_LOG_2_PI, 0)
    # 2. The statistics
    count, lanes = tokens(kept_ptr, N, tl.float64), tl.arange(0, 16)
    sums = tl.zeros((BLOCK_P, 16), tl.float64)
    for part in range(0, P, BLOCK_P):
        rows = part + tl.arange(0, BLOCK_P)
        here = (rows < P)[:, None] & (lanes >= 0)[None, :]
        sums += tl.load(tile(statistics_ptr, rows, lanes, (16, 1)), mask=here, other=0).to(tl.float64)
    means = tl.sum(sums, 0) / tl.maximum(count, 1.0)
    means = tl.where(lanes == 0, 1.0, means)
    nll = tl.sum(tl.where(lanes == NLL, means, 0)) / 2 + tl.sum(of_scale)
    means = tl.where(lanes == NLL, nll, means)
    means = tl.where((lanes == VAR) | (lanes == VAR + 4), means + R, means)  # they are of var - 1
    # 3. The terms, all 0 where no token counts; NaN counts only where it has a weight
    tl.store(terms[1], tl.where(count > 0, nll, 0).to(terms[1].dtype.element_ty))
    for term in tl.static_range(3):
        weights = tl.zeros((16,), tl.float64)
        for i in tl.static_range(STATISTICS):
            weights = tl.where(lanes == i, weight(table, term * STATISTICS + i, tl.float64), weights)
        value = tl.sum(tl.where(weights != 0, weights * means, 0))
        to = terms[term + (term > 0)]
        tl.store(to, tl.where(count > 0, value, 0).to(to.dtype.element_ty))
