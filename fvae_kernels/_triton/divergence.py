"""divergence: KL(q_1 || p_1) and Gamma = E log p_2(z_2) - E log p_1(z_1), in nats.   Mathematics: reference.divergence

kl    = 1/2 sum( mean1^2 + var1 - 1 - logvar1 )
gamma = 1/2 sum( mean1^2 + var1 - ((mean2 - mu)^2 + var2) / tau^2 ) - R log tau
"""

# mypy: allow-untyped-defs

import math
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from ..ops._raw import wide_dtype
from ._common import (
    Table,
    accumulator,
    blocks,
    clamp_passes,
    clamped,
    counting,
    kept_tokens,
    share,
    strides,
    tile,
    tokens,
)

PROGRAMS = 1024  # most programs of the forward; each leaves a partial sum

TABLE: Table = {
    (2, True): {"BLOCK_N": 32, "BLOCK_R": 64, "num_warps": 4},
    (2, False): {"BLOCK_N": 64, "BLOCK_R": 64, "num_warps": 4},
    (4, True): {"BLOCK_N": 32, "BLOCK_R": 32, "num_warps": 4},
    (4, False): {"BLOCK_N": 64, "BLOCK_R": 32, "num_warps": 4},
    (8, True): {"BLOCK_N": 32, "BLOCK_R": 16, "num_warps": 4},
    (8, False): {"BLOCK_N": 64, "BLOCK_R": 16, "num_warps": 4},
}


@triton.jit
def posterior(posteriors, posterior_strides, FIRST: tl.constexpr, rows, cols, counts, ACC: tl.constexpr):
    """Mean and clamped logvar of a block. FIRST is 0 for q_1, 2 for q_2."""
    mean = tile(posteriors[FIRST], rows, cols, posterior_strides[FIRST])
    logvar = tile(posteriors[FIRST + 1], rows, cols, posterior_strides[FIRST + 1])
    return (
        tl.load(mean, mask=counts, other=0).to(ACC),
        clamped(tl.load(logvar, mask=counts, other=0).to(ACC)),
    )


@triton.jit(do_not_specialize=["N"])
def divergence_fwd_kernel(
    posteriors,  # mean1, logvar1, mean2, logvar2 [N, R]
    posterior_strides,
    mask_ptr,  # bool [N] or None
    mask_strides,
    parts_ptr,  # [programs, 2]: sums of kl and of gamma, without R log tau
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
    kl = tl.zeros((BLOCK_N, BLOCK_R), ACC)
    gamma = tl.zeros((BLOCK_N, BLOCK_R), ACC)
    for block in range(program, tl.cdiv(N, BLOCK_N), programs):
        rows = tl.cast(block, tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
        keep = counting(mask_ptr, mask_strides, rows, N)
        for first in range(0, R, BLOCK_R):
            # 2. Both posteriors
            cols = first + tl.arange(0, BLOCK_R)
            counts = keep[:, None] & (cols < R)[None, :]
            mean1, logvar1 = posterior(posteriors, posterior_strides, 0, rows, cols, counts, ACC)
            mean2, logvar2 = posterior(posteriors, posterior_strides, 2, rows, cols, counts, ACC)
            # 3. Expected squares under both priors
            squares1 = mean1 * mean1 + tl.exp(logvar1)
            squares2 = ((mean2 - mu) * (mean2 - mu) + tl.exp(logvar2)) * precision2
            kl += tl.where(counts, squares1 - 1 - logvar1, 0)
            gamma += tl.where(counts, squares1 - squares2, 0)
    # 4. Store the sums
    tl.store(parts_ptr + 2 * program, 0.5 * tl.sum(kl))
    tl.store(parts_ptr + 2 * program + 1, 0.5 * tl.sum(gamma))


@triton.jit(do_not_specialize=["P", "N"])
def divergence_mean_kernel(
    parts_ptr,  # [P, 2]
    kept_ptr,  # int64 [] or None
    kl_ptr,  # []
    gamma_ptr,  # []
    log_tau: tl.float64,
    P,
    N,
    R,
    BLOCK_P: tl.constexpr,
):
    parts = tl.arange(0, BLOCK_P)
    kl = tl.sum(tl.load(parts_ptr + 2 * parts, mask=parts < P, other=0).to(tl.float64))
    gamma = tl.sum(tl.load(parts_ptr + 2 * parts + 1, mask=parts < P, other=0).to(tl.float64))
    count = tokens(kept_ptr, N, tl.float64)
    over = tl.maximum(count, 1.0)
    tl.store(kl_ptr, (kl / over).to(kl_ptr.dtype.element_ty))
    tl.store(gamma_ptr, ((gamma - count * R * log_tau) / over).to(gamma_ptr.dtype.element_ty))


def sums_of(
    kernel: Any, width: int, posteriors: tuple[Tensor, ...], prior2_mean: float, prior2_std: float, mask: Tensor | None
) -> Tensor:
    """Partial sums over tokens [programs, width], from a kernel with the arguments of divergence_fwd_kernel."""
    N, R = posteriors[0].shape
    options = blocks(kernel, TABLE, posteriors[0], BLOCK_R=R)
    programs = min(max(triton.cdiv(N, options["BLOCK_N"]), 1), PROGRAMS)
    parts = posteriors[0].new_empty((programs, width), dtype=wide_dtype(posteriors[0]))
    kernel[(programs,)](
        posteriors,
        tuple(map(strides, posteriors)),
        mask,
        strides(mask),
        parts,
        prior2_mean,
        prior2_std**-2,
        N,
        R,
        ACC=accumulator(posteriors[0]),
        **options,
    )
    return parts


def divergence_fwd(
    mean1: Tensor,
    logvar1: Tensor,
    mean2: Tensor,
    logvar2: Tensor,
    prior2_mean: float,
    prior2_std: float,
    mask: Tensor | None,
) -> tuple[Tensor, Tensor]:
    N, R = mean1.shape
    parts = sums_of(divergence_fwd_kernel, 2, (mean1, logvar1, mean2, logvar2), prior2_mean, prior2_std, mask)
    kl, gamma = parts.new_empty(()), parts.new_empty(())
    divergence_mean_kernel[(1,)](
        parts,
        kept_tokens(mask),
        kl,
        gamma,
        math.log(prior2_std),
        parts.shape[0],
        N,
        R,
        BLOCK_P=PROGRAMS,
        num_warps=4,
    )
    return kl, gamma


@triton.jit(do_not_specialize=["N"])
def divergence_bwd_kernel(
    grad_kl_ptr,  # [] or None, like grad_gamma
    grad_gamma_ptr,
    mean1_ptr,  # [N, R], like the next three
    logvar1_ptr,
    mean2_ptr,
    logvar2_ptr,
    mask_ptr,  # bool [N] or None
    kept_ptr,  # int64 [] or None
    grad_mean1_ptr,  # [N, R] contiguous, or None if not needed, like the next three
    grad_logvar1_ptr,
    grad_mean2_ptr,
    grad_logvar2_ptr,
    mean1_strides,
    logvar1_strides,
    mean2_strides,
    logvar2_strides,
    mask_strides,
    prior2_mean: tl.float64,
    precision2: tl.float64,  # 1 / tau^2
    N,
    R,
    ACC: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    # 1. Entries of this program
    rows = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    cols = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    inside = (rows < N)[:, None] & (cols < R)[None, :]
    counts = counting(mask_ptr, mask_strides, rows, N)[:, None] & (cols < R)[None, :]
    to = rows[:, None] * R + cols[None, :]
    # 2. Gradients of the means, for one token
    kl = share(grad_kl_ptr, kept_ptr, N, ACC)
    gamma = share(grad_gamma_ptr, kept_ptr, N, ACC)
    mu, precision2 = tl.full((), prior2_mean, ACC), tl.full((), precision2, ACC)
    # 3. The gradients that are needed; 0 for tokens that the mask drops
    dtype: tl.constexpr = mean1_ptr.dtype.element_ty
    if grad_mean1_ptr is not None:
        mean = tl.load(tile(mean1_ptr, rows, cols, mean1_strides), mask=counts, other=0).to(ACC)
        grad = tl.where(counts, (kl + gamma) * mean, 0)
        tl.store(grad_mean1_ptr + to, grad.to(dtype), mask=inside)
    if grad_logvar1_ptr is not None:
        logvar = tl.load(tile(logvar1_ptr, rows, cols, logvar1_strides), mask=counts, other=0).to(ACC)
        grad = ((kl + gamma) * tl.exp(clamped(logvar)) - kl) / 2
        tl.store(grad_logvar1_ptr + to, tl.where(counts & clamp_passes(logvar), grad, 0).to(dtype), mask=inside)
    if grad_mean2_ptr is not None:
        mean = tl.load(tile(mean2_ptr, rows, cols, mean2_strides), mask=counts, other=0).to(ACC)
        grad = tl.where(counts, -gamma * (mean - mu) * precision2, 0)
        tl.store(grad_mean2_ptr + to, grad.to(dtype), mask=inside)
    if grad_logvar2_ptr is not None:
        logvar = tl.load(tile(logvar2_ptr, rows, cols, logvar2_strides), mask=counts, other=0).to(ACC)
        grad = -gamma * tl.exp(clamped(logvar)) * precision2 / 2
        tl.store(grad_logvar2_ptr + to, tl.where(counts & clamp_passes(logvar), grad, 0).to(dtype), mask=inside)


def divergence_bwd(
    grad_kl: Tensor | None,
    grad_gamma: Tensor | None,
    mean1: Tensor,
    logvar1: Tensor,
    mean2: Tensor,
    logvar2: Tensor,
    prior2_mean: float,
    prior2_std: float,
    mask: Tensor | None,
    needs: list[bool],
) -> tuple[Tensor, ...]:
    N, R = mean1.shape
    grads = tuple(mean1.new_empty((N, R) if need else (0,)) for need in needs)
    if not any(needs) or mean1.numel() == 0:
        return grads
    options = blocks(divergence_bwd_kernel, TABLE, mean1, BLOCK_R=R)
    posteriors = (mean1, logvar1, mean2, logvar2)
    divergence_bwd_kernel[(triton.cdiv(N, options["BLOCK_N"]), triton.cdiv(R, options["BLOCK_R"]))](
        grad_kl,
        grad_gamma,
        *posteriors,
        mask,
        kept_tokens(mask),
        *(grad if need else None for need, grad in zip(needs, grads, strict=True)),
        *map(strides, posteriors),
        strides(mask),
        prior2_mean,
        prior2_std**-2,
        N,
        R,
        ACC=accumulator(mean1),
        **options,
    )
    return grads
