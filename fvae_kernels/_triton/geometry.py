"""geometry: distance of the posteriors from the priors and from each other.   Mathematics: reference.geometry

Lambda = 1/2 sum( mean2^2 + var2 - ((mean2 - mu)^2 + var2) / tau^2 ) - R log tau
Delta  = 1/2 sum( mean1^2 + var1 - mean2^2 - var2 )
W2^2   = sum( (mean1 - mean2)^2 + (sd1 - sd2)^2 )
bound  = W2^2 / 2 + sqrt(sum( mean1^2 + var1 )) W2                                 of |Delta|
"""

# mypy: allow-untyped-defs

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._common import counting, kept_tokens
from .divergence import posterior, sums_of


@triton.jit(do_not_specialize=["N"])
def geometry_fwd_kernel(
    posteriors,  # mean1, logvar1, mean2, logvar2 [N, R]
    posterior_strides,
    mask_ptr,  # bool [N] or None
    mask_strides,
    parts_ptr,  # [programs, 4]: sums of Lambda without R log tau, Delta, W2^2, bound
    prior2_mean: tl.float64,
    precision2: tl.float64,  # 1 / tau^2
    N,
    R,
    ACC: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    # 1. Tokens of this program: every programs-th block
    program, programs = tl.program_id(0), tl.num_programs(0)
    mu, precision2 = tl.full((), prior2_mean, ACC), tl.full((), precision2, ACC)
    mismatches, discrepancies = tl.zeros((BLOCK_N,), ACC), tl.zeros((BLOCK_N,), ACC)
    distances, bounds = tl.zeros((BLOCK_N,), ACC), tl.zeros((BLOCK_N,), ACC)
    for block in range(program, tl.cdiv(N, BLOCK_N), programs):
        rows = tl.cast(block, tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
        keep = counting(mask_ptr, mask_strides, rows, N)
        norm1, distance = tl.zeros((BLOCK_N,), ACC), tl.zeros((BLOCK_N,), ACC)
        for first in range(0, R, BLOCK_R):
            # 2. Both posteriors
            cols = first + tl.arange(0, BLOCK_R)
            counts = keep[:, None] & (cols < R)[None, :]
            mean1, logvar1 = posterior(posteriors, posterior_strides, 0, rows, cols, counts, ACC)
            mean2, logvar2 = posterior(posteriors, posterior_strides, 2, rows, cols, counts, ACC)
            var1, var2 = tl.exp(logvar1), tl.exp(logvar2)
            # 3. Expected squares under both priors, and the distance of the posteriors
            squares1, squares2 = mean1 * mean1 + var1, mean2 * mean2 + var2
            from_prior2 = ((mean2 - mu) * (mean2 - mu) + var2) * precision2
            apart, wider = mean1 - mean2, tl.sqrt(var1) - tl.sqrt(var2)
            mismatches += 0.5 * tl.sum(tl.where(counts, squares2 - from_prior2, 0), 1)
            discrepancies += 0.5 * tl.sum(tl.where(counts, squares1 - squares2, 0), 1)
            distance += tl.sum(tl.where(counts, apart * apart + wider * wider, 0), 1)
            norm1 += tl.sum(tl.where(counts, squares1, 0), 1)
        distances += distance
        bounds += 0.5 * distance + tl.sqrt(norm1) * tl.sqrt(distance)
    # 4. Store the sums
    to = parts_ptr + 4 * program
    tl.store(to, tl.sum(mismatches))
    tl.store(to + 1, tl.sum(discrepancies))
    tl.store(to + 2, tl.sum(distances))
    tl.store(to + 3, tl.sum(bounds))


def geometry_fwd(
    mean1: Tensor,
    logvar1: Tensor,
    mean2: Tensor,
    logvar2: Tensor,
    prior2_mean: float,
    prior2_std: float,
    mask: Tensor | None,
) -> Tensor:
    N, R = mean1.shape
    parts = sums_of(geometry_fwd_kernel, 4, (mean1, logvar1, mean2, logvar2), prior2_mean, prior2_std, mask)
    kept = kept_tokens(mask)
    kept = torch.full((), N, device=mean1.device) if kept is None else kept
    means = parts.sum(0, dtype=torch.float64) / kept.clamp(min=1)
    means[0] -= R * math.log(prior2_std) * (kept > 0).to(means.dtype)
    return means.to(parts.dtype)
