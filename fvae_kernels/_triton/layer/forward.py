"""layer, forward: y = base + s B z_1 and the terms of the objective.   Mathematics: reference.layer

    mean_i, logvar_i = encoder_i(x),   z_i = mean_i + exp(logvar_i / 2) noise_i,   y = base + s B z_1
    x_hat = decoder(z_1, z_2),   nll = sum over features of  q_d / 2 + log |t_d| + log(2 pi) / 2
    term  = objective[term] . statistics              every objective is linear in a few means over tokens

`layer_fwd_kernel` takes a tile of tokens from x to y and stores its sums; `layer_mean_kernel` turns these into the
terms. The decoder's values stay in registers; backward recomputes them.
"""

# mypy: allow-untyped-defs, disable-error-code="assignment, misc, var-annotated"
# ruff: noqa: RUF005  (Triton adds tuples; it cannot unpack them)

import triton
import triton.language as tl

from .._common import tile
from ..reconstruct import HALF_LOG_2_PI
from .arguments import first_units, hidden_column, mean_column, state_width, width_of
from .networks import (
    activate,
    add_bias,
    add_products,
    apply_linear,
    decode,
    decoded,
    load_transposed,
    product,
    residual,
    store_columns,
)
from .objective import (
    NLL,
    POSTERIOR1,
    POSTERIOR2,
    VAR,
    Latent,
    bounds_of,
    counting,
    noises,
    standard_deviation,
    statistics_of,
    tokens,
)


@triton.jit
def reading(networks, S: tl.constexpr):
    """The layers that read x, in the order of their outputs in the state."""
    encoder1, encoder2 = networks.encoder1, networks.encoder2
    if len(S.encoder) > 0:
        return encoder1.hidden[0], encoder2.hidden[0]
    else:  # noqa: RET505  (only one branch is compiled)
        return encoder1.mean, encoder1.logvar, encoder2.mean, encoder2.logvar


@triton.jit
def read_x(layer, rows, N, D, S: tl.constexpr, BLOCK_D: tl.constexpr):
    """x W^T + b of every layer that reads x, in one pass over x."""
    linears = reading(layer.networks, S)
    UNITS: tl.constexpr = first_units(S)
    outs = tl.arange(0, width_of(UNITS))
    sums = ()
    for _i in tl.static_range(len(linears)):
        sums = sums + (tl.zeros((rows.shape[0], width_of(UNITS)), S.acc),)
    for first in range(0, D, BLOCK_D):
        cols = first + tl.arange(0, BLOCK_D)
        in_x = (rows < N)[:, None] & (cols < D)[None, :]
        x = tl.load(tile(layer.x, rows, cols, (layer.x_stride, 1)), mask=in_x, other=0)
        added = ()
        for i in tl.static_range(len(linears)):
            w = load_transposed(linears[i].weight, D, cols, outs, cols < D, outs < UNITS)
            added = added + (product(x.to(w.dtype), w, sums[i], S),)
        sums = added
    biased = ()
    for i in tl.static_range(len(linears)):
        biased = biased + (add_bias(sums[i], linears[i].bias, outs, outs < UNITS),)
    return biased


@triton.jit
def encode(
    read, encoder, seed_ptr, state_ptr, rows, inside, side: tl.constexpr, S: tl.constexpr, BLOCK_K: tl.constexpr
):
    """mean and logvar of one encoder, from the outputs of the layers that read x. Stores the state for backward."""
    WIDTH: tl.constexpr = state_width(S)
    if len(S.encoder) == 0:
        mean, logvar = read[2 * side], read[2 * side + 1]
    else:
        h = read[side]
        for i in tl.static_range(len(S.encoder)):
            if i > 0:
                h = apply_linear(h, encoder.hidden[i], S.encoder[i - 1], S.encoder[i], S, BLOCK_K)
            h = activate(h, i, side * S.encoder[i], seed_ptr, rows, 2 * S.encoder[i], S)
            store_columns(state_ptr, WIDTH, rows, inside, hidden_column(S, i, side), h, S.encoder[i])
        mean = apply_linear(h, encoder.mean, S.encoder[len(S.encoder) - 1], S.R, S, BLOCK_K)
        logvar = apply_linear(h, encoder.logvar, S.encoder[len(S.encoder) - 1], S.R, S, BLOCK_K)
    store_columns(state_ptr, WIDTH, rows, inside, mean_column(S, side), mean, S.R)
    store_columns(state_ptr, WIDTH, rows, inside, mean_column(S, side) + S.R, logvar, S.R)
    return mean, logvar


@triton.jit(do_not_specialize=["N"])
def layer_fwd_kernel(
    layer,  # Layer
    base_ptr,  # [N, M] or None
    base_stride,
    y_ptr,  # [N, M]
    state_ptr,  # [N, state_width]
    statistics_ptr,  # [programs, 16]: sums over tokens in the order of Statistics; r^2 for nll, var - 1 for var
    scaling: tl.float64,
    prior2_mean: tl.float64,
    logvar1_low: tl.float64,
    logvar1_high: tl.float64,
    N,
    D,
    M,
    S: tl.constexpr,  # Sizes
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    # 1. This program's tokens: both encoders
    program = tl.program_id(0).to(tl.int64)
    rows = program * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = rows < N
    keep = counting(layer, rows, N, S)
    networks = layer.networks
    read = read_x(layer, rows, N, D, S, BLOCK_D)
    mean1, logvar1 = encode(read, networks.encoder1, layer.seed, state_ptr, rows, inside, 0, S, BLOCK_K)
    mean2, logvar2 = encode(read, networks.encoder2, layer.seed, state_ptr, rows, inside, 1, S, BLOCK_K)
    # 2. Samples, and the statistics of the objective
    bounds, mu = bounds_of(logvar1_low, logvar1_high, S), tl.full((), prior2_mean, S.acc)
    eps1, eps2 = noises(layer, rows, inside, S)
    std1, std2 = standard_deviation(logvar1, bounds, 0), standard_deviation(logvar2, bounds, 1)
    z1, z2 = mean1 + std1 * eps1, mean2 + std2 * eps2
    counts = keep[:, None] & (tl.arange(0, width_of(S.R)) < S.R)[None, :]
    statistics = statistics_of(Latent(mean1, logvar1, eps1, std1, z1), counts, mu, bounds, 0)
    statistics += statistics_of(Latent(mean2, logvar2, eps2, std2, z2), counts, mu, bounds, 1)
    places = tl.arange(0, 16)  # stored now to free registers; r^2 comes last
    tl.store(statistics_ptr + 16 * program + places, statistics, mask=places != NLL)
    # 3. y = base + s B z_1
    for first in range(0, M, BLOCK_D):
        cols = first + tl.arange(0, BLOCK_D)
        in_y = inside[:, None] & (cols < M)[None, :]
        y = add_products(tl.zeros((BLOCK_N, BLOCK_D), S.acc), z1, networks.B, S.R, cols, cols < M, S.R, S, BLOCK_K)
        y *= tl.full((), scaling, S.acc)
        if base_ptr is not None:
            y += tl.load(tile(base_ptr, rows, cols, (base_stride, 1)), mask=in_y, other=0).to(S.acc)
        tl.store(tile(y_ptr, rows, cols, (M, 1)), y.to(y_ptr.dtype.element_ty), mask=in_y)
    # 4. The sum of r^2, r = (x_hat - x) / t
    h = decode(z1, z2, layer, rows, len(S.decoder), S, BLOCK_K)
    squares = tl.zeros((BLOCK_N,), S.acc)
    for first in range(0, D, BLOCK_D):
        cols = first + tl.arange(0, BLOCK_D)
        in_sum = keep[:, None] & (cols < D)[None, :]
        x_hat = decoded(h, z1, z2, networks.decoder.output, cols, cols < D, S, BLOCK_K)
        x = tl.load(tile(layer.x, rows, cols, (layer.x_stride, 1)), mask=in_sum, other=0).to(S.acc)
        r, _ = residual(x_hat, x, networks.decoder.scale, cols, in_sum, D)
        squares += tl.sum(r * r, 1)
    tl.store(statistics_ptr + 16 * program + NLL, tl.sum(squares))


@triton.jit
def exact(weight, rest):
    return tl.full((), weight, tl.float64) + tl.full((), rest, tl.float64)


@triton.jit
def weighed(weights, rest, means, places):
    """One term. `weights` (float32) and `rest` (their rounding error) are Statistics. Weight 0 ignores NaN."""
    row = tl.zeros((16,), tl.float64)
    row = tl.where(places == 0, exact(weights.one, rest.one), row)
    row = tl.where(places == NLL, exact(weights.nll, rest.nll), row)
    for i in tl.static_range(5):
        of1 = exact(weights.posterior1[i], rest.posterior1[i])
        of2 = exact(weights.posterior2[i], rest.posterior2[i])
        row = tl.where(places == POSTERIOR1 + i, of1, tl.where(places == POSTERIOR2 + i, of2, row))
    return tl.sum(tl.where(row != 0, row * means, 0))


@triton.jit(do_not_specialize=["P", "N"])
def layer_mean_kernel(
    statistics_ptr,  # [P, 16], as layer_fwd_kernel leaves it
    scale_ptr,  # [D]
    objective,  # Objective of weights as float32
    rest,  # Objective of their rounding errors
    kept_ptr,  # int64 []; not read if MASKED is False
    terms_ptr,  # [4]: loss, nll, kl, gamma
    P,
    N,
    D,
    R,
    MASKED: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """The terms of the objective. One program: it waits for each read, so it reads few large blocks."""
    # 1. The part of nll that does not depend on tokens
    of_scale = tl.zeros((BLOCK_D,), tl.float64)
    for first in range(0, D, BLOCK_D):
        cols = first + tl.arange(0, BLOCK_D)
        t = tl.load(scale_ptr + cols, mask=cols < D, other=1).to(tl.float64)
        of_scale += tl.where(cols < D, tl.log(tl.abs(t)) + HALF_LOG_2_PI, 0)
    # 2. The statistics
    count, places = tokens(kept_ptr, N, MASKED, tl.float64), tl.arange(0, 16)
    sums = tl.zeros((BLOCK_P, 16), tl.float64)
    for part in range(0, P, BLOCK_P):
        rows = part + tl.arange(0, BLOCK_P)
        here = (rows < P)[:, None] & (places >= 0)[None, :]
        sums += tl.load(tile(statistics_ptr, rows, places, (16, 1)), mask=here, other=0).to(tl.float64)
    means = tl.sum(sums, 0) / tl.maximum(count, 1.0)
    means = tl.where(places == 0, 1.0, means)
    nll = tl.sum(tl.where(places == NLL, means, 0)) / 2 + tl.sum(of_scale)
    means = tl.where(places == NLL, nll, means)
    means = tl.where((places == POSTERIOR1 + VAR) | (places == POSTERIOR2 + VAR), means + R, means)  # of var - 1
    # 3. The terms; all 0 if no token counts
    loss = weighed(objective.loss, rest.loss, means, places)
    kl = weighed(objective.kl, rest.kl, means, places)
    gamma = weighed(objective.gamma, rest.gamma, means, places)
    dtype = terms_ptr.dtype.element_ty
    tl.store(terms_ptr, tl.where(count > 0, loss, 0).to(dtype))
    tl.store(terms_ptr + 1, tl.where(count > 0, nll, 0).to(dtype))
    tl.store(terms_ptr + 2, tl.where(count > 0, kl, 0).to(dtype))
    tl.store(terms_ptr + 3, tl.where(count > 0, gamma, 0).to(dtype))
