"""layer, forward: y = base + s B z_1 and the terms of the objective.   Mathematics: reference.layer

    mean_i, logvar_i = encoder_i(x),   z_i = mean_i + exp(logvar_i / 2) noise_i,   y = base + s B z_1
    x_hat = decoder(z_1, z_2),   nll = sum over features of  q_d / 2 + log |t_d| + log(2 pi) / 2
    term  = table[term] . statistics                  every objective is linear in a few means over tokens

One kernel does a tile of tokens from x to y and leaves sums; a small one makes the terms of them. What the decoder
computes exists in registers alone; backward makes it once more.
"""

# mypy: allow-untyped-defs

from collections.abc import Sequence
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from .._library import wide_dtype
from ._common import Table, clamped, counting, kept_tokens, product, strides, tile, tokens
from ._layer_common import (
    activate,
    add_bias,
    add_products,
    blocks_of,
    columns,
    decode,
    fused,
    hidden_column,
    inputs_of,
    linear,
    noises,
    residual,
    standard_deviation,
    store_blocks,
    width_of,
)
from ._layer_host import Parameter, Shapes, arguments, options_for, split
from .reconstruct import HALF_LOG_2_PI

PROGRAMS = 264  # of the forward, at most: as many partial sums
STATISTICS = tl.constexpr(12)  # their order is that of ops._layer_support

TABLE: Table = {
    (2, True): {"BLOCK_N": 16, "BLOCK_D": 64, "BLOCK_H": 64, "num_warps": 4, "num_stages": 2},
    (2, False): {"BLOCK_N": 64, "BLOCK_D": 64, "BLOCK_H": 64, "num_warps": 8, "num_stages": 2},
    (4, True): {"BLOCK_N": 16, "BLOCK_D": 64, "BLOCK_H": 64, "num_warps": 4, "num_stages": 2},
    (4, False): {"BLOCK_N": 32, "BLOCK_D": 64, "BLOCK_H": 64, "num_warps": 8, "num_stages": 2},
    (8, True): {"BLOCK_N": 16, "BLOCK_D": 16, "BLOCK_H": 32, "num_warps": 4, "num_stages": 1},
    (8, False): {"BLOCK_N": 32, "BLOCK_D": 16, "BLOCK_H": 32, "num_warps": 8, "num_stages": 1},
}


@triton.jit
def first_layers(
    x_ptr,
    x_strides,
    encoders,
    rows,
    N,
    D,
    OUT: tl.constexpr,
    LAYERS: tl.constexpr,  # of each encoder, that read x: its first hidden layer, or both heads
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """x W^T of everything that reads x, in one walk over x: blocks of the first layers of encoder 1, then 2."""
    W: tl.constexpr = width_of(OUT, BLOCK_H)
    BLOCKS: tl.constexpr = blocks_of(OUT, W)
    sums = ()
    for _ in tl.static_range(2 * LAYERS * BLOCKS):
        sums = sums + (tl.zeros((rows.shape[0], W), ACC),)
    for first in range(0, D, BLOCK_D):
        cols = first + tl.arange(0, BLOCK_D)
        in_x, in_cols = (rows < N)[:, None] & (cols < D)[None, :], cols < D
        x = tl.load(tile(x_ptr, rows, cols, x_strides), mask=in_x, other=0)
        added = ()
        for i in tl.static_range(2 * LAYERS * BLOCKS):
            w_ptr, _, w_strides, _ = encoders[i // (LAYERS * BLOCKS)][i // BLOCKS % LAYERS]
            outs, in_outs = columns(i % BLOCKS, OUT, W)
            to = tile(w_ptr, cols, outs, (w_strides[1], w_strides[0]))
            w = tl.load(to, mask=in_cols[:, None] & in_outs[None, :], other=0)
            added = added + (product(x.to(w.dtype), w, sums[i], PRECISION),)
        sums = added
    return sums


@triton.jit
def biased(blocks, first: tl.constexpr, count: tl.constexpr, layer, SIZE: tl.constexpr):
    """`count` of the blocks, with the bias of their layer."""
    result = ()
    for k in tl.static_range(count):
        outs, in_outs = columns(k, SIZE, blocks[0].shape[1])
        result = result + (add_bias(blocks[first + k], layer, outs, in_outs),)
    return result


@triton.jit
def encode_side(
    sums,
    encoder,
    side: tl.constexpr,
    seed_ptr,
    state_ptr,
    rows,
    inside,
    WIDTH: tl.constexpr,
    ENCODER: tl.constexpr,
    R: tl.constexpr,
    THRESHOLD: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """mean and logvar of one encoder from what its first layers made of x; the state of its hidden layers is stored."""
    if len(ENCODER) == 0:
        COUNT: tl.constexpr = len(sums) // 4
        mean = biased(sums, 2 * side * COUNT, COUNT, encoder[0], R)
        logvar = biased(sums, (2 * side + 1) * COUNT, COUNT, encoder[1], R)
    else:
        HALF: tl.constexpr = len(sums) // 2
        h = biased(sums, side * HALF, HALF, encoder[0], ENCODER[0])
        for i in tl.static_range(len(ENCODER)):
            if i > 0:
                h = linear(h, encoder[i], ENCODER[i - 1], ENCODER[i], PRECISION, BLOCK_H)
            h = activate(h, i, side * ENCODER[i], seed_ptr, rows, ENCODER[i], 2 * ENCODER[i], THRESHOLD)
            store_blocks(state_ptr, WIDTH, rows, inside, hidden_column(ENCODER, i, side), h, ENCODER[i])
        mean = linear(h, encoder[len(ENCODER)], ENCODER[len(ENCODER) - 1], R, PRECISION, BLOCK_H)
        logvar = linear(h, encoder[len(ENCODER) + 1], ENCODER[len(ENCODER) - 1], R, PRECISION, BLOCK_H)
    heads: tl.constexpr = hidden_column(ENCODER, len(ENCODER), 0) + 2 * side * R
    store_blocks(state_ptr, WIDTH, rows, inside, heads, mean, R)
    store_blocks(state_ptr, WIDTH, rows, inside, heads + R, logvar, R)
    return mean, logvar


@triton.jit
def total(values, counts):
    return tl.sum(tl.where(counts, values, 0.0))


@triton.jit
def add_statistics(sums, mean, logvar, std, z, counts, mu, side: tl.constexpr):
    """What one block of a latent adds to the sums of its statistics."""
    lanes = tl.arange(0, 16)
    center = mu if side == 1 else 0.0
    first = 4 * side + 2
    sums += tl.where(lanes == first, total(mean * mean, counts), 0.0)
    sums += tl.where(lanes == first + 1, total((mean - mu) * (mean - mu), counts), 0.0)
    sums += tl.where(lanes == first + 2, total(std * std, counts), 0.0)
    sums += tl.where(lanes == first + 3, total(clamped(logvar), counts), 0.0)
    sums += tl.where(lanes == 10 + side, total((z - center) * (z - center), counts), 0.0)
    return sums


@triton.jit
def layer_fwd_kernel(
    base_ptr,  # [N, M] or None
    base_strides,
    x_ptr,  # [N, D]
    x_strides,
    encoders,  # of both: (weight, bias, their strides) of the hidden layers, of mean and of logvar
    decoder,  # the same of the hidden layers and of the output layer
    scale,  # pointer and strides of t [D]
    up,  # B as a layer, [M, R] and no bias
    noise,  # two pointers to [N, R], or None
    noise_strides,
    mask_ptr,  # bool [N] or None
    mask_strides,
    seed_ptr,  # int64 [] or None
    y_ptr,  # [N, M]
    state_ptr,  # [N, WIDTH]: hidden layers, encoder 1 | 2 of each, then mean1 | logvar1 | mean2 | logvar2
    squares_ptr,  # [programs, D]: sums of r^2
    statistics_ptr,  # [programs, 16]: sums over tokens, in the order of the objective's table
    scaling: tl.float64,
    prior2_mean: tl.float64,
    N,
    D,
    M,
    WIDTH: tl.constexpr,
    AVERAGE: tl.constexpr,
    ENCODER: tl.constexpr,
    DECODER: tl.constexpr,
    R: tl.constexpr,
    THRESHOLD: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    program, programs = tl.program_id(0), tl.num_programs(0)
    s, mu = tl.full((), scaling, ACC), tl.full((), prior2_mean, ACC)
    statistics = tl.zeros((16,), ACC)
    W: tl.constexpr = width_of(R, BLOCK_H)
    FIRST: tl.constexpr = ENCODER[0] if len(ENCODER) > 0 else R
    for block in range(program, tl.cdiv(N, BLOCK_N), programs):
        # 1. This block of tokens: both encoders
        rows = tl.cast(block, tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
        inside = rows < N
        keep = counting(mask_ptr, mask_strides, rows, N)
        sums = first_layers(
            x_ptr, x_strides, encoders, rows, N, D, FIRST, 2 - min(len(ENCODER), 1), ACC, PRECISION, BLOCK_D, BLOCK_H
        )
        mean1, logvar1 = encode_side(
            sums, encoders[0], 0, seed_ptr, state_ptr, rows, inside, WIDTH, ENCODER, R, THRESHOLD, PRECISION, BLOCK_H
        )
        mean2, logvar2 = encode_side(
            sums, encoders[1], 1, seed_ptr, state_ptr, rows, inside, WIDTH, ENCODER, R, THRESHOLD, PRECISION, BLOCK_H
        )
        # 2. Samples
        z1, z2 = (), ()
        for k in tl.static_range(len(mean1)):
            latent, in_latent = columns(k, R, W)
            counts = keep[:, None] & in_latent[None, :]
            eps1, eps2 = noises(
                noise, noise_strides, seed_ptr, rows, latent, inside[:, None] & in_latent[None, :], R, ACC
            )
            std1, std2 = standard_deviation(logvar1[k]), standard_deviation(logvar2[k])
            z1, z2 = z1 + (mean1[k] + std1 * eps1,), z2 + (mean2[k] + std2 * eps2,)
            statistics = add_statistics(statistics, mean1[k], logvar1[k], std1, z1[k], counts, mu, 0)
            statistics = add_statistics(statistics, mean2[k], logvar2[k], std2, z2[k], counts, mu, 1)
        # 3. y = base + s B z_1
        for first in range(0, M, BLOCK_D):
            cols = first + tl.arange(0, BLOCK_D)
            in_y = inside[:, None] & (cols < M)[None, :]
            y = s * add_products(tl.zeros((BLOCK_N, BLOCK_D), ACC), z1, up, cols, cols < M, R, PRECISION)
            if base_ptr is not None:
                y += tl.load(tile(base_ptr, rows, cols, base_strides), mask=in_y, other=0).to(ACC)
            tl.store(tile(y_ptr, rows, cols, (M, 1)), y.to(y_ptr.dtype.element_ty), mask=in_y)
        # 4. Squares of r = (x_hat - x) / t
        outputs = decode(
            fused(z1, z2, AVERAGE), decoder, seed_ptr, rows, len(DECODER), len(ENCODER), DECODER, R, THRESHOLD,
            PRECISION, BLOCK_H,
        )  # fmt: skip
        for first in range(0, D, BLOCK_D):
            cols = first + tl.arange(0, BLOCK_D)
            r, _ = residual(
                x_ptr, x_strides, outputs[len(DECODER)], decoder[len(DECODER)], scale, rows, cols, keep, D,
                inputs_of(DECODER, len(DECODER), R), PRECISION,
            )  # fmt: skip
            squares, to = tl.sum(r * r, 0), squares_ptr + tl.cast(program, tl.int64) * D + cols
            if block >= programs:
                squares += tl.load(to, mask=cols < D, other=0)
            tl.store(to, squares, mask=cols < D)
        tl.debug_barrier()  # the next block of tokens adds to what other threads wrote
    tl.store(statistics_ptr + 16 * program + tl.arange(0, 16), statistics)


@triton.jit
def weight(table, i: tl.constexpr, ACC: tl.constexpr):
    """An entry of the objective's table, which comes as two tuples of float32."""
    return tl.full((), table[0][i], ACC) + tl.full((), table[1][i], ACC)


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
    means = tl.where(lanes == 1, tl.sum(nll), means)
    # 3. The terms; NaN counts only where it has a weight
    tl.store(terms[1], tl.sum(nll).to(terms[1].dtype.element_ty))
    for term in tl.static_range(3):
        value = tl.zeros((), tl.float64)
        for i in tl.static_range(STATISTICS):
            w = weight(table, term * STATISTICS + i, tl.float64)
            value += tl.where(w != 0, w * tl.sum(tl.where(lanes == i, means, 0)), 0)
        to = terms[term + (term > 0)]
        tl.store(to, tl.where(count > 0, value, 0).to(to.dtype.element_ty))


def layer_fwd(
    base: Tensor | None,
    x: Tensor,
    encoder1: Sequence[Parameter],
    encoder2: Sequence[Parameter],
    decoder: Sequence[Parameter],
    scale: Tensor,
    B: Tensor,
    noise1: Tensor | None,
    noise2: Tensor | None,
    mask: Tensor | None,
    seed: Tensor | None,
    dropout: float,
    average: bool,
    scaling: float,
    prior2_mean: float,
    objective: Sequence[float],
) -> tuple[Tensor, ...]:
    (N, D), M, shapes = x.shape, B.shape[0], Shapes.of(encoder1, decoder)
    wide = wide_dtype(B)
    y = x.new_empty((N, M), dtype=B.dtype if base is None else base.dtype)
    state = x.new_empty((N, shapes.width), dtype=wide)
    if N == 0:
        return y, *(x.new_zeros((), dtype=wide) for _ in range(4)), state, x.new_zeros(D, dtype=wide)
    options = options_for(layer_fwd_kernel, TABLE, shapes, N, max(D, M), B, dropout)
    programs = min(triton.cdiv(N, options["BLOCK_N"]), PROGRAMS)
    squares, statistics = (x.new_empty((programs, n), dtype=wide) for n in (D, 16))
    layer_fwd_kernel[(programs,)](
        base,
        strides(base),
        *arguments(x, encoder1, encoder2, decoder, scale, B, noise1, noise2, mask, seed),
        y,
        state,
        squares,
        statistics,
        scaling,
        prior2_mean,
        N,
        D,
        M,
        WIDTH=shapes.width,
        AVERAGE=average,
        **options,
    )
    terms, unit_grad_scale = tuple(x.new_empty((), dtype=wide) for _ in range(4)), x.new_empty(D, dtype=wide)
    layer_mean_kernel[(1,)](
        squares,
        statistics,
        (scale, scale.stride()),
        split(objective),
        kept_tokens(mask),
        terms,
        unit_grad_scale,
        programs,
        N,
        D,
        BLOCK_P=32,
        BLOCK_D=64,
        num_warps=8,
    )
    return y, *terms, state, unit_grad_scale
