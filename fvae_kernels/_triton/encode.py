"""encode: mean = x Wm^T + bm,  logvar = x Wv^T + bv,  z = mean + exp(logvar / 2) noise.

Mathematics: reference.encode.
"""

# mypy: allow-untyped-defs

import triton
import triton.language as tl
from torch import Tensor

from ._common import Table, accumulator, blocks, clamp_passes, clamped, precision, product, strides, tile

TABLE: Table = {  # forward
    (2, True): {"BLOCK_N": 16, "BLOCK_D": 64, "BLOCK_R": 64, "num_warps": 4, "num_stages": 3},
    (2, False): {"BLOCK_N": 64, "BLOCK_D": 64, "BLOCK_R": 64, "num_warps": 4, "num_stages": 3},
    (4, True): {"BLOCK_N": 16, "BLOCK_D": 64, "BLOCK_R": 32, "num_warps": 4, "num_stages": 3},
    (4, False): {"BLOCK_N": 64, "BLOCK_D": 32, "BLOCK_R": 32, "num_warps": 4, "num_stages": 3},
    (8, True): {"BLOCK_N": 16, "BLOCK_D": 32, "BLOCK_R": 16, "num_warps": 4, "num_stages": 2},
    (8, False): {"BLOCK_N": 32, "BLOCK_D": 32, "BLOCK_R": 16, "num_warps": 4, "num_stages": 2},
}

TABLE_BWD: Table = {
    (2, True): {"BLOCK_N": 32, "BLOCK_R": 64, "num_warps": 4},
    (2, False): {"BLOCK_N": 64, "BLOCK_R": 64, "num_warps": 4},
    (4, True): {"BLOCK_N": 32, "BLOCK_R": 32, "num_warps": 4},
    (4, False): {"BLOCK_N": 64, "BLOCK_R": 32, "num_warps": 4},
    (8, True): {"BLOCK_N": 32, "BLOCK_R": 16, "num_warps": 4},
    (8, False): {"BLOCK_N": 64, "BLOCK_R": 16, "num_warps": 4},
}


@triton.jit(do_not_specialize=["N"])
def encode_fwd_kernel(
    x_ptr,  # [N, D]
    w_mean_ptr,  # [R, D]
    b_mean_ptr,  # [R] or None
    w_logvar_ptr,  # [R, D]
    b_logvar_ptr,  # [R] or None
    noise_ptr,  # [N, R]
    mean_ptr,  # [N, R] contiguous, as logvar and z
    logvar_ptr,
    z_ptr,
    x_strides,
    w_mean_strides,
    b_mean_strides,
    w_logvar_strides,
    b_logvar_strides,
    noise_strides,
    N,
    D,
    R,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    # 1. Tokens and latent entries of this program
    rows = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    latent = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    # 2. Both heads, in one loop over features
    mean = tl.zeros((BLOCK_N, BLOCK_R), ACC)
    logvar = tl.zeros((BLOCK_N, BLOCK_R), ACC)
    for first in range(0, D, BLOCK_D):
        cols = first + tl.arange(0, BLOCK_D)
        in_x = (rows < N)[:, None] & (cols < D)[None, :]
        in_w = (latent < R)[:, None] & (cols < D)[None, :]
        x = tl.load(tile(x_ptr, rows, cols, x_strides), mask=in_x, other=0)
        w_mean = tl.load(tile(w_mean_ptr, latent, cols, w_mean_strides), mask=in_w, other=0)
        w_logvar = tl.load(tile(w_logvar_ptr, latent, cols, w_logvar_strides), mask=in_w, other=0)
        mean = product(x, tl.trans(w_mean), mean, PRECISION)
        logvar = product(x, tl.trans(w_logvar), logvar, PRECISION)
    if b_mean_ptr is not None:
        mean += tl.load(b_mean_ptr + latent * b_mean_strides[0], mask=latent < R, other=0).to(ACC)[None, :]
    if b_logvar_ptr is not None:
        logvar += tl.load(b_logvar_ptr + latent * b_logvar_strides[0], mask=latent < R, other=0).to(ACC)[None, :]
    # 3. Sample
    inside = (rows < N)[:, None] & (latent < R)[None, :]
    noise = tl.load(tile(noise_ptr, rows, latent, noise_strides), mask=inside, other=0).to(ACC)
    z = mean + tl.exp(0.5 * clamped(logvar)) * noise
    # 4. Store
    to = rows[:, None] * R + latent[None, :]
    dtype: tl.constexpr = mean_ptr.dtype.element_ty
    tl.store(mean_ptr + to, mean.to(dtype), mask=inside)
    tl.store(logvar_ptr + to, logvar.to(dtype), mask=inside)
    tl.store(z_ptr + to, z.to(dtype), mask=inside)


def encode_fwd(
    x: Tensor, w_mean: Tensor, b_mean: Tensor | None, w_logvar: Tensor, b_logvar: Tensor | None, noise: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    (N, D), R = x.shape, w_mean.shape[0]
    mean, logvar, z = (x.new_empty((N, R)) for _ in range(3))
    if mean.numel() == 0:
        return mean, logvar, z
    options = blocks(encode_fwd_kernel, TABLE, x, BLOCK_D=D, BLOCK_R=R)
    encode_fwd_kernel[(triton.cdiv(N, options["BLOCK_N"]), triton.cdiv(R, options["BLOCK_R"]))](
        x,
        w_mean,
        b_mean,
        w_logvar,
        b_logvar,
        noise,
        mean,
        logvar,
        z,
        x.stride(),
        w_mean.stride(),
        strides(b_mean),
        w_logvar.stride(),
        strides(b_logvar),
        noise.stride(),
        N,
        D,
        R,
        ACC=accumulator(x),
        PRECISION=precision(x.dtype),
        **options,
    )
    return mean, logvar, z


@triton.jit(do_not_specialize=["N"])
def encode_bwd_kernel(
    grad_mean_ptr,  # [N, R] or None, as grad_logvar and grad_z
    grad_logvar_ptr,
    grad_z_ptr,
    logvar_ptr,  # [N, R]
    noise_ptr,  # [N, R]
    grad_heads_ptr,  # [N, 2R] contiguous
    grad_mean_strides,
    grad_logvar_strides,
    grad_z_strides,
    logvar_strides,
    noise_strides,
    N,
    R,
    ACC: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    # 1. Entries of this program
    rows = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    latent = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    inside = (rows < N)[:, None] & (latent < R)[None, :]
    # 2. Gradients of the outputs mean and logvar
    grad_mean = tl.zeros((BLOCK_N, BLOCK_R), ACC)
    grad_logvar = tl.zeros((BLOCK_N, BLOCK_R), ACC)
    if grad_mean_ptr is not None:
        grad = tl.load(tile(grad_mean_ptr, rows, latent, grad_mean_strides), mask=inside, other=0)
        grad_mean += grad.to(ACC)
    if grad_logvar_ptr is not None:
        grad = tl.load(tile(grad_logvar_ptr, rows, latent, grad_logvar_strides), mask=inside, other=0)
        grad_logvar += grad.to(ACC)
    # 3. Gradients through z
    if grad_z_ptr is not None:
        grad_z = tl.load(tile(grad_z_ptr, rows, latent, grad_z_strides), mask=inside, other=0).to(ACC)
        logvar = tl.load(tile(logvar_ptr, rows, latent, logvar_strides), mask=inside, other=0).to(ACC)
        noise = tl.load(tile(noise_ptr, rows, latent, noise_strides), mask=inside, other=0).to(ACC)
        grad_mean += grad_z
        through_z = grad_z * noise * tl.exp(0.5 * clamped(logvar)) / 2
        grad_logvar += tl.where(clamp_passes(logvar), through_z, 0)
    # 4. Store both heads side by side
    to = grad_heads_ptr + rows[:, None] * 2 * R + latent[None, :]
    dtype: tl.constexpr = grad_heads_ptr.dtype.element_ty
    tl.store(to, grad_mean.to(dtype), mask=inside)
    tl.store(to + R, grad_logvar.to(dtype), mask=inside)


def encode_bwd(
    grad_mean: Tensor | None, grad_logvar: Tensor | None, grad_z: Tensor | None, logvar: Tensor, noise: Tensor
) -> Tensor:
    N, R = logvar.shape
    grad_heads = logvar.new_empty((N, 2 * R))
    if grad_heads.numel() == 0:
        return grad_heads
    options = blocks(encode_bwd_kernel, TABLE_BWD, logvar, BLOCK_R=R)
    inputs = (grad_mean, grad_logvar, grad_z, logvar, noise)
    encode_bwd_kernel[(triton.cdiv(N, options["BLOCK_N"]), triton.cdiv(R, options["BLOCK_R"]))](
        *inputs,
        grad_heads,
        *map(strides, inputs),
        N,
        R,
        ACC=accumulator(logvar),
        **options,
    )
    return grad_heads
