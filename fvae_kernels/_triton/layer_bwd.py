"""layer, backward.   Mathematics: reference.layer

    c           = grad_loss table[loss] + grad_nll [nll] + grad_kl table[kl] + grad_gamma table[gamma], over tokens
    grad_z1     = s grad_y B + c[nll] (decoder) + 2 c[sampled] z1       grad_mean = grad_z + 2 c[squares] mean ...
    grad_logvar = grad_z noise std / 2 + c[var] var + c[logvar]         inside of the clamp, 0 outside
    grad_x      = what the encoders give - c[nll] r / t                 r = (x_hat - x) / t

The kernel here walks over tokens: it makes the decoder and r once more, and leaves of each token what is small: the
gradients of the encoders' layers, the decoder's last hidden layer, and that layer's gradient. Gradients that pass the
decoder lack c[nll] until the end, which keeps them in the range of float16. The kernel of layer_grads walks over
features, and makes grad_x and the parameters' gradients of these.
"""

# mypy: allow-untyped-defs

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from .._library import wide_dtype
from ._common import Table, clamp_passes, counting, kept_tokens, product, reduced, strides, tile
from ._layer_common import (
    NLL,
    SAMPLED,
    SQUARES,
    add_grad_products,
    coefficient,
    decode,
    decoded,
    grad_activate,
    grad_linear,
    hidden_column,
    inputs_of,
    latents,
    load_columns,
    residual,
    sliced,
    store_columns,
    width_of,
)
from ._layer_host import Arguments, Gradients, Parameter, Shapes, later_layers, options_for, split
from .layer_grads import PROGRAMS, layer_grads_kernel
from .layer_grads import TABLE as TABLE_GRADS

TABLE: Table = {
    (2, True): {"BLOCK_N": 16, "BLOCK_D": 32, "BLOCK_K": 64, "num_warps": 4, "num_stages": 1},
    (2, False): {"BLOCK_N": 32, "BLOCK_D": 32, "BLOCK_K": 64, "num_warps": 8, "num_stages": 1},
    (4, True): {"BLOCK_N": 16, "BLOCK_D": 32, "BLOCK_K": 16, "num_warps": 4, "num_stages": 2},
    (4, False): {"BLOCK_N": 32, "BLOCK_D": 32, "BLOCK_K": 16, "num_warps": 8, "num_stages": 2},
    (8, True): {"BLOCK_N": 16, "BLOCK_D": 16, "BLOCK_K": 16, "num_warps": 4, "num_stages": 1},
    (8, False): {"BLOCK_N": 32, "BLOCK_D": 16, "BLOCK_K": 16, "num_warps": 8, "num_stages": 1},
}


@triton.jit
def add_decoded_gradient(
    sums, r, output, scale, cols, first, D, SIZE: tl.constexpr, PRECISION: tl.constexpr, BLOCK_K: tl.constexpr
):
    """sums + r (O / t) for SIZE inputs of the output layer from `first` on; r is of the features `cols`."""
    K: tl.constexpr = min(BLOCK_K, r.shape[1])
    ins = tl.arange(0, sums.shape[1])
    for start in range(0, r.shape[1], K):
        outs = cols + start + tl.arange(0, K)
        inside = (outs < D)[:, None] & (ins < SIZE)[None, :]
        w = tl.load(tile(output[0], outs, first + ins, output[2]), mask=inside, other=0)
        inverse = 1 / tl.load(scale[0] + outs * scale[1][0], mask=outs < D, other=1).to(r.dtype)
        scaled = (w.to(r.dtype) * inverse[:, None]).to(w.dtype)
        sums = product(sliced(r, start, K).to(w.dtype), scaled, sums, PRECISION)
    return sums


@triton.jit
def through_decoder(
    x_ptr,
    x_strides,
    z1,
    z2,
    decoder,
    scale,
    seed_ptr,
    rows,
    inside,
    keep,
    g_ptr,
    grad_hidden_ptr,
    D,
    FIRST: tl.constexpr,
    AVERAGE: tl.constexpr,
    DECODER: tl.constexpr,
    R: tl.constexpr,
    THRESHOLD: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """The unit gradients of z_1 and z_2 through r, which still lack c[nll]."""
    ACC: tl.constexpr = z1.dtype
    # 1. The decoder once more
    HIDDEN: tl.constexpr = len(DECODER)
    h = decode(z1, z2, decoder, seed_ptr, rows, HIDDEN, FIRST, AVERAGE, DECODER, R, THRESHOLD, PRECISION, BLOCK_K)
    # 2. r, and the gradient of what the output layer reads: the last hidden layer, or both latents
    SIZE: tl.constexpr = inputs_of(DECODER, HIDDEN, R)
    PARTS: tl.constexpr = 1 if HIDDEN > 0 or AVERAGE else 2
    grads = ()
    for i in tl.static_range(PARTS):
        grads = grads + (tl.zeros((rows.shape[0], width_of(SIZE)), ACC),)
    for first in range(0, D, BLOCK_D):
        cols = first + tl.arange(0, BLOCK_D)
        counts = keep[:, None] & (cols < D)[None, :]
        x_hat = decoded(h, decoder[HIDDEN], z1, z2, cols, cols < D, AVERAGE, DECODER, R, PRECISION, BLOCK_K)
        x = tl.load(tile(x_ptr, rows, cols, x_strides), mask=counts, other=0).to(ACC)
        r, _ = residual(x_hat, x, scale, cols, counts, D)
        added = ()
        for i in tl.static_range(PARTS):
            added = added + (
                add_decoded_gradient(grads[i], r, decoder[HIDDEN], scale, first, i * SIZE, D, SIZE, PRECISION, BLOCK_K),
            )
        grads = added
    # 3. Back through the hidden layers
    if HIDDEN > 0:
        grad = grad_activate(grads[0], h[HIDDEN - 1], THRESHOLD)
        if grad_hidden_ptr is not None:
            store_columns(grad_hidden_ptr, SIZE, rows, inside, 0, grad, SIZE)
        for i in tl.static_range(HIDDEN - 1, 0, -1):
            grad = grad_linear(grad, decoder[i], 0, DECODER[i - 1], DECODER[i], PRECISION, BLOCK_K)
            grad = grad_activate(grad, h[i - 1], THRESHOLD)
        grads = ()
        for i in tl.static_range(1 if AVERAGE else 2):
            grads = grads + (grad_linear(grad, decoder[0], i * R, R, DECODER[0], PRECISION, BLOCK_K),)
    if g_ptr is not None:
        if HIDDEN > 0:
            store_columns(g_ptr, SIZE, rows, inside, 0, h[HIDDEN - 1], SIZE)
        elif AVERAGE:
            store_columns(g_ptr, R, rows, inside, 0, (z1 + z2) / 2, R)
        else:
            store_columns(g_ptr, 2 * R, rows, inside, 0, z1, R)
            store_columns(g_ptr, 2 * R, rows, inside, R, z2, R)
    if AVERAGE:
        return 0.5 * grads[0], 0.5 * grads[0]
    return grads[0], grads[1]


@triton.jit
def grad_head(grads, table, kept_ptr, N, latent, grad_z, keep, mu, side: tl.constexpr):
    """The gradients of mean and logvar of one latent, from that of its sample."""
    mean, logvar, eps, std, z = latent
    ACC: tl.constexpr = z.dtype
    first: tl.constexpr = SQUARES + 4 * side
    squares = 2 * coefficient(grads, table, kept_ptr, N, first, ACC)
    from_mu = 2 * coefficient(grads, table, kept_ptr, N, first + 1, ACC)
    var = coefficient(grads, table, kept_ptr, N, first + 2, ACC)
    of_logvar = coefficient(grads, table, kept_ptr, N, first + 3, ACC)
    sampled = 2 * coefficient(grads, table, kept_ptr, N, SAMPLED + side, ACC)
    center = mu if side == 1 else 0.0
    grad_z += tl.where(keep[:, None], sampled * (z - center), 0.0)
    grad_mean = grad_z + tl.where(keep[:, None], squares * mean + from_mu * (mean - mu), 0.0)
    grad_logvar = grad_z * eps * std / 2 + tl.where(keep[:, None], var * std * std + of_logvar, 0.0)
    return grad_mean, tl.where(clamp_passes(logvar), grad_logvar, 0.0)


@triton.jit
def through_encoder(
    grad_mean,
    grad_logvar,
    encoder,
    state_ptr,
    grad_state_ptr,
    rows,
    inside,
    side: tl.constexpr,
    WIDTH: tl.constexpr,
    ENCODER: tl.constexpr,
    R: tl.constexpr,
    THRESHOLD: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Store the gradients of what each layer of one encoder gives, before it is activated."""
    HEADS: tl.constexpr = hidden_column(ENCODER, len(ENCODER), 0) + 2 * side * R
    store_columns(grad_state_ptr, WIDTH, rows, inside, HEADS, grad_mean, R)
    store_columns(grad_state_ptr, WIDTH, rows, inside, HEADS + R, grad_logvar, R)
    if len(ENCODER) > 0:
        LAST: tl.constexpr = ENCODER[len(ENCODER) - 1]
        ins = tl.arange(0, width_of(LAST))
        grad = grad_linear(grad_mean, encoder[len(ENCODER)], 0, LAST, R, PRECISION, BLOCK_K)
        grad = add_grad_products(
            grad, grad_logvar, encoder[len(ENCODER) + 1], ins, ins < LAST, R, PRECISION, BLOCK_K
        )
        for i in tl.static_range(len(ENCODER) - 1, -1, -1):
            at = hidden_column(ENCODER, i, side)
            h = load_columns(state_ptr, WIDTH, rows, inside, at, ENCODER[i])
            grad = grad_activate(grad, h, THRESHOLD)
            store_columns(grad_state_ptr, WIDTH, rows, inside, at, grad, ENCODER[i])
            if i > 0:
                grad = grad_linear(grad, encoder[i], 0, ENCODER[i - 1], ENCODER[i], PRECISION, BLOCK_K)


@triton.jit
def layer_bwd_kernel(
    grad_y_ptr,  # [N, M] or None
    grad_y_strides,
    grads,  # pointers to those of loss, nll, kl and gamma, [] or None
    table,  # the weights of the statistics in loss, kl and gamma
    x_ptr,  # from here to the seed as in layer_fwd_kernel
    x_strides,
    encoders,
    decoder,
    scale,
    up,
    noise,
    noise_strides,
    mask_ptr,
    mask_strides,
    seed_ptr,
    kept_ptr,  # int64 [] or None
    state_ptr,  # [N, WIDTH]
    grad_state_ptr,  # [N, WIDTH], or None where neither x nor the encoders need a gradient
    g_ptr,  # [N, inputs of the output layer], or None where not needed, as the one that follows
    grad_hidden_ptr,  # [N, last hidden layer]: less c[nll]
    scaling: tl.float64,
    prior2_mean: tl.float64,
    N,
    D,
    M,
    DECODE: tl.constexpr,  # whether anything arrives through r
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
    # 1. This program's tokens, and their latents
    rows = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = rows < N
    keep = counting(mask_ptr, mask_strides, rows, N)
    latent1, latent2 = latents(
        state_ptr, noise, noise_strides, seed_ptr, rows, inside, WIDTH, ENCODER, R, ACC
    )
    z1, z2 = latent1[4], latent2[4]
    grad_z1, grad_z2 = tl.zeros(z1.shape, ACC), tl.zeros(z2.shape, ACC)
    # 2. Through r
    if DECODE:
        unit1, unit2 = through_decoder(
            x_ptr, x_strides, z1, z2, decoder, scale, seed_ptr, rows, inside, keep, g_ptr, grad_hidden_ptr, D,
            len(ENCODER), AVERAGE, DECODER, R, THRESHOLD, PRECISION, BLOCK_D, BLOCK_K,
        )  # fmt: skip
        c = coefficient(grads, table, kept_ptr, N, NLL, ACC)
        grad_z1, grad_z2 = c * unit1, c * unit2
    if grad_state_ptr is not None:
        # 3. Through y = base + s B z_1
        if grad_y_ptr is not None:
            in_latent = tl.arange(0, width_of(R))
            through_y = tl.zeros(z1.shape, ACC)
            for first in range(0, M, BLOCK_K):
                cols = first + tl.arange(0, BLOCK_K)
                in_y, in_B = inside[:, None] & (cols < M)[None, :], (cols < M)[:, None] & (in_latent < R)[None, :]
                grad_y = tl.load(tile(grad_y_ptr, rows, cols, grad_y_strides), mask=in_y, other=0)
                B = tl.load(tile(up[0], cols, in_latent, up[2]), mask=in_B, other=0)
                through_y = product(grad_y.to(B.dtype), B, through_y, PRECISION)
            grad_z1 += tl.full((), scaling, ACC) * through_y
        # 4. Through the posteriors and their encoders
        mu = tl.full((), prior2_mean, ACC)
        grad_mean, grad_logvar = grad_head(grads, table, kept_ptr, N, latent1, grad_z1, keep, mu, 0)
        through_encoder(
            grad_mean, grad_logvar, encoders[0], state_ptr, grad_state_ptr, rows, inside, 0, WIDTH, ENCODER, R,
            THRESHOLD, PRECISION, BLOCK_K,
        )  # fmt: skip
        grad_mean, grad_logvar = grad_head(grads, table, kept_ptr, N, latent2, grad_z2, keep, mu, 1)
        through_encoder(
            grad_mean, grad_logvar, encoders[1], state_ptr, grad_state_ptr, rows, inside, 1, WIDTH, ENCODER, R,
            THRESHOLD, PRECISION, BLOCK_K,
        )  # fmt: skip


def layer_bwd(
    grad_y: Tensor | None,
    grad_loss: Tensor | None,
    grad_nll: Tensor | None,
    grad_kl: Tensor | None,
    grad_gamma: Tensor | None,
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
    state: Tensor,
    unit_grad_scale: Tensor,
    detach_target: bool,
    needs: Sequence[bool],
) -> tuple[Tensor, list[Tensor]]:
    (N, D), M, shapes, wide = x.shape, B.shape[0], Shapes.of(encoder1, decoder), wide_dtype(B)
    groups = (encoder1, encoder2, decoder, [scale], [B])
    through_r = grad_loss is not None or grad_nll is not None
    asked = [needs[0], needs[1], needs[2] and through_r, needs[3] and through_r, needs[4] and grad_y is not None]
    gradients = Gradients.of(groups, [needs[1], *needs[1:]])
    grad_x = x.new_empty(x.shape if needs[0] else 0)
    if N == 0 or not any(asked):
        return grad_x.zero_(), gradients.views(B.new_zeros(gradients.length), groups)

    latents_needed, hidden = needs[0] or needs[1], shapes.decoder
    target = through_r and needs[0] and not detach_target
    G = hidden[-1] if hidden else shapes.R * (1 if average else 2)
    grad_state = x.new_empty((N, shapes.width), dtype=wide) if latents_needed else None
    g = x.new_empty((N, G), dtype=wide) if asked[2] or target else None
    grad_hidden = x.new_empty((N, G), dtype=wide) if asked[2] and hidden else None
    grads, kept = (grad_loss, grad_nll, grad_kl, grad_gamma), kept_tokens(mask)
    arrives = (grad_y, strides(grad_y), grads, split(objective))
    layer = Arguments.of(x, encoder1, encoder2, decoder, scale, B, noise1, noise2, mask, seed)
    dropout = dropout if seed is not None else 0.0

    if latents_needed or asked[2]:
        options = options_for(layer_bwd_kernel, TABLE, shapes, N, max(D, M), B, dropout)
        layer_bwd_kernel[(triton.cdiv(N, options["BLOCK_N"]),)](
            *arrives,
            *layer,
            kept,
            state,
            grad_state,
            g,
            grad_hidden,
            scaling,
            prior2_mean,
            N,
            D,
            M,
            DECODE=through_r,
            WIDTH=shapes.width,
            AVERAGE=average,
            **options,
        )
    options = options_for(layer_grads_kernel, TABLE_GRADS, shapes, N, max(D, M), B, dropout)
    T = options["BLOCK_D"]
    which, later, later_programs = later_layers(shapes, T)
    counts = (
        triton.cdiv(D, T) if latents_needed or asked[2] or asked[3] else 0,
        triton.cdiv(M, T) if asked[4] else 0,
        later_programs if asked[1] else 0,
        sum(triton.cdiv(size, T) for size in hidden) if asked[2] else 0,
    )
    chunks = max(min(triton.cdiv(N, options["BLOCK_N"]), PROGRAMS // sum(counts)), 1)
    parts = (x.new_empty if needs[1:] == asked[1:] else x.new_zeros)((chunks, gradients.length), dtype=wide)
    layer_grads_kernel[(sum(counts), chunks)](
        *arrives,
        layer,
        kept,
        state,
        grad_state,
        g,
        grad_hidden,
        unit_grad_scale,
        grad_x if needs[0] else None,
        parts,
        gradients.to(shapes, which) if latents_needed else ((), *gradients.to(shapes, which)[1:]),
        counts,
        gradients.length,
        scaling,
        N,
        D,
        M,
        G=G,
        FIRST=(*shapes.encoder, shapes.R)[0],
        LATER=later,
        NEEDS=tuple(asked),
        THROUGH_TARGET=target,
        WIDTH=shapes.width,
        AVERAGE=average,
        **options,
    )
    flat = parts[0] if chunks == 1 and wide == B.dtype else reduced(parts, B.dtype)
    return grad_x, gradients.views(flat, groups)
