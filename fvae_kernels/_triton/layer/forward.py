"""layer, forward: y = base + s B z_1 and the terms of the objective.   Mathematics: reference.layer

    mean_i, logvar_i = encoder_i(x),   z_i = mean_i + exp(logvar_i / 2) noise_i,   y = base + s B z_1
    x_hat = decoder(z_1, z_2),   nll = sum over features of  q_d / 2 + log |t_d| + log(2 pi) / 2
    term  = table[term] . statistics                  every objective is linear in a few means over tokens

One kernel does a tile of tokens from x to y and leaves sums; a small one makes the terms of them. What the decoder
computes exists in registers alone; backward makes it once more.
"""

# mypy: allow-untyped-defs, disable-error-code="assignment, misc, var-annotated"
# ruff: noqa: RUF005  (Triton adds tuples; it cannot unpack them)

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...ops._raw import wide_dtype
from .._common import Table, by_vendor, clamped, counting, kept_tokens, product, strides, tile
from .host import Arguments, Parameter, Shapes, options_for, split
from .mean import OPTIONS, layer_mean_kernel
from .networks import (
    NLL,
    SAMPLED,
    SQUARES,
    activate,
    add_bias,
    add_products,
    decode,
    decoded,
    hidden_column,
    linear,
    load_transposed,
    noises,
    residual,
    standard_deviation,
    store_columns,
    width_of,
)

TABLE: Table = {
    (2, True): {"BLOCK_N": 16, "BLOCK_D": 64, "BLOCK_K": 64, "num_warps": 4, "num_stages": 2},
    (2, False): {"BLOCK_N": 64, "BLOCK_D": 64, "BLOCK_K": 64, "num_warps": 8, "num_stages": 2},
    (4, True): {"BLOCK_N": 16, "BLOCK_D": 32, "BLOCK_K": 16, "num_warps": 4, "num_stages": 2},
    (4, False): {"BLOCK_N": 32, "BLOCK_D": 32, "BLOCK_K": 32, "num_warps": 8, "num_stages": 2},
    (8, True): {"BLOCK_N": 16, "BLOCK_D": 16, "BLOCK_K": 16, "num_warps": 4, "num_stages": 1},
    (8, False): {"BLOCK_N": 32, "BLOCK_D": 16, "BLOCK_K": 16, "num_warps": 8, "num_stages": 1},
    (2, None): {"BLOCK_N": 16, "BLOCK_D": 16, "BLOCK_K": 32, "num_warps": 8, "num_stages": 1},
    (4, None): {"BLOCK_N": 8, "BLOCK_D": 16, "BLOCK_K": 16, "num_warps": 8, "num_stages": 1},
    (8, None): {"BLOCK_N": 8, "BLOCK_D": 16, "BLOCK_K": 16, "num_warps": 8, "num_stages": 1},
}

AMD: Table = {  # no spills
    (2, False): TABLE[2, True],
    (4, False): {"BLOCK_N": 32, "BLOCK_D": 32, "BLOCK_K": 16, "num_warps": 4, "num_stages": 2},
    (2, None): {"BLOCK_N": 16, "BLOCK_D": 16, "BLOCK_K": 16, "num_warps": 4, "num_stages": 1},
    (4, None): {"BLOCK_N": 16, "BLOCK_D": 16, "BLOCK_K": 16, "num_warps": 4, "num_stages": 1},
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
):
    """x W^T + b of everything that reads x, in one walk over x: the layers of encoder 1, then of encoder 2."""
    outs = tl.arange(0, width_of(OUT))
    sums = ()
    for _i in tl.static_range(2 * LAYERS):
        sums = sums + (tl.zeros((rows.shape[0], width_of(OUT)), ACC),)
    for first in range(0, D, BLOCK_D):
        cols = first + tl.arange(0, BLOCK_D)
        in_x = (rows < N)[:, None] & (cols < D)[None, :]
        x = tl.load(tile(x_ptr, rows, cols, x_strides), mask=in_x, other=0)
        added = ()
        for i in tl.static_range(2 * LAYERS):
            w = load_transposed(encoders[i // LAYERS][i % LAYERS], cols, outs, cols < D, outs < OUT)
            added = added + (product(x.to(w.dtype), w, sums[i], PRECISION),)
        sums = added
    biased = ()
    for i in tl.static_range(2 * LAYERS):
        biased = biased + (add_bias(sums[i], encoders[i // LAYERS][i % LAYERS], outs, outs < OUT),)
    return biased


@triton.jit
def encode_side(
    firsts,
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
    BLOCK_K: tl.constexpr,
):
    """mean and logvar of one encoder from what its first layers made of x; all that backward needs is stored."""
    if len(ENCODER) == 0:
        mean, logvar = firsts[2 * side], firsts[2 * side + 1]
    else:
        h = firsts[side]
        for i in tl.static_range(len(ENCODER)):
            if i > 0:
                h = linear(h, encoder[i], ENCODER[i - 1], ENCODER[i], PRECISION, BLOCK_K)
            h = activate(h, i, side * ENCODER[i], seed_ptr, rows, 2 * ENCODER[i], THRESHOLD)
            store_columns(state_ptr, WIDTH, rows, inside, hidden_column(ENCODER, i, side), h, ENCODER[i])
        mean = linear(h, encoder[len(ENCODER)], ENCODER[len(ENCODER) - 1], R, PRECISION, BLOCK_K)
        logvar = linear(h, encoder[len(ENCODER) + 1], ENCODER[len(ENCODER) - 1], R, PRECISION, BLOCK_K)
    heads: tl.constexpr = hidden_column(ENCODER, len(ENCODER), 0) + 2 * side * R
    store_columns(state_ptr, WIDTH, rows, inside, heads, mean, R)
    store_columns(state_ptr, WIDTH, rows, inside, heads + R, logvar, R)
    return mean, logvar


@triton.jit
def statistics_of(mean, logvar, std, z, counts, mu, side: tl.constexpr):
    """Sums over the latent entries that count, each at its place in the objective's table.

    Of var - 1 in place of var, so that KL is not lost in a sum near R: `layer_mean_kernel` adds R again, in float64.
    """
    from_center = z - (mu if side == 1 else 0.0)
    values = (mean * mean, (mean - mu) * (mean - mu), std * std - 1, clamped(logvar), from_center * from_center)
    lanes, sums = tl.arange(0, 16), tl.zeros((16,), z.dtype)
    for i in tl.static_range(5):
        place = SQUARES + 4 * side + i if i < 4 else SAMPLED + side
        sums += tl.where(lanes == place, tl.sum(tl.where(counts, values[i], 0.0)), 0.0)
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
    BLOCK_K: tl.constexpr,
):
    # 1. This program's tokens: both encoders
    program = tl.program_id(0).to(tl.int64)
    rows = program * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = rows < N
    keep = counting(mask_ptr, mask_strides, rows, N)
    FIRST: tl.constexpr = ENCODER[0] if len(ENCODER) > 0 else R
    LAYERS: tl.constexpr = 1 if len(ENCODER) > 0 else 2
    firsts = first_layers(x_ptr, x_strides, encoders, rows, N, D, FIRST, LAYERS, ACC, PRECISION, BLOCK_D)
    mean1, logvar1 = encode_side(
        firsts, encoders[0], 0, seed_ptr, state_ptr, rows, inside, WIDTH, ENCODER, R, THRESHOLD, PRECISION, BLOCK_K
    )
    mean2, logvar2 = encode_side(
        firsts, encoders[1], 1, seed_ptr, state_ptr, rows, inside, WIDTH, ENCODER, R, THRESHOLD, PRECISION, BLOCK_K
    )
    # 2. Samples, and the statistics of the objective
    latent = tl.arange(0, width_of(R))
    in_latent = (latent < R)[None, :]
    eps1, eps2 = noises(noise, noise_strides, seed_ptr, rows, latent, inside[:, None] & in_latent, R, ACC)
    std1, std2 = standard_deviation(logvar1), standard_deviation(logvar2)
    z1, z2 = mean1 + std1 * eps1, mean2 + std2 * eps2
    mu = tl.full((), prior2_mean, ACC)
    statistics = statistics_of(mean1, logvar1, std1, z1, keep[:, None] & in_latent, mu, 0)
    statistics += statistics_of(mean2, logvar2, std2, z2, keep[:, None] & in_latent, mu, 1)
    lanes = tl.arange(0, 16)  # stored now, for registers are short later; r^2 comes last
    tl.store(statistics_ptr + 16 * program + lanes, statistics, mask=lanes != NLL)
    # 3. y = base + s B z_1
    for first in range(0, M, BLOCK_D):
        cols = first + tl.arange(0, BLOCK_D)
        in_y = inside[:, None] & (cols < M)[None, :]
        y = tl.zeros((BLOCK_N, BLOCK_D), ACC)
        y = tl.full((), scaling, ACC) * add_products(y, z1, up, 0, cols, cols < M, R, PRECISION, BLOCK_K)
        if base_ptr is not None:
            y += tl.load(tile(base_ptr, rows, cols, base_strides), mask=in_y, other=0).to(ACC)
        tl.store(tile(y_ptr, rows, cols, (M, 1)), y.to(y_ptr.dtype.element_ty), mask=in_y)
    # 4. The sum of r^2, r = (x_hat - x) / t
    g = decode(
        z1, z2, decoder, seed_ptr, rows, len(DECODER), len(ENCODER), AVERAGE, DECODER, R, THRESHOLD, PRECISION, BLOCK_K
    )
    squares = tl.zeros((BLOCK_N,), ACC)
    for first in range(0, D, BLOCK_D):
        cols = first + tl.arange(0, BLOCK_D)
        counts = keep[:, None] & (cols < D)[None, :]
        x_hat = decoded(g, decoder[len(DECODER)], z1, z2, cols, cols < D, AVERAGE, DECODER, R, PRECISION, BLOCK_K)
        x = tl.load(tile(x_ptr, rows, cols, x_strides), mask=counts, other=0).to(ACC)
        r, _ = residual(x_hat, x, scale, cols, counts, D)
        squares += tl.sum(r * r, 1)
    tl.store(statistics_ptr + 16 * program + NLL, tl.sum(squares))


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
    products: torch.dtype | None,
) -> tuple[Tensor, ...]:
    (N, D), M, shapes = x.shape, B.shape[0], Shapes.of(encoder1, decoder)
    wide = wide_dtype(B)
    y = x.new_empty((N, M), dtype=B.dtype if base is None else base.dtype)
    state = x.new_empty((N, shapes.width), dtype=wide)
    if N == 0:
        return y, *(x.new_zeros((), dtype=wide) for _ in range(4)), state
    dropout = dropout if seed is not None else 0.0
    options = options_for(layer_fwd_kernel, by_vendor(TABLE, AMD), shapes, N, max(D, M), B, dropout, products)
    programs = triton.cdiv(N, options["BLOCK_N"])
    statistics = x.new_empty((programs, 16), dtype=wide)
    layer_fwd_kernel[(programs,)](
        base,
        strides(base),
        *Arguments.of(x, encoder1, encoder2, decoder, scale, B, noise1, noise2, mask, seed),
        y,
        state,
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
    terms = tuple(x.new_empty((), dtype=wide) for _ in range(4))
    layer_mean_kernel[(1,)](
        statistics,
        (scale, scale.stride()),
        split(objective),
        kept_tokens(mask),
        terms,
        programs,
        N,
        D,
        shapes.R,
        **OPTIONS,
    )
    return y, *terms, state
