"""What backward of the layer does to a tile of tokens: through the decoder, a posterior, an encoder."""

# mypy: allow-untyped-defs, disable-error-code="assignment, misc, var-annotated"
# ruff: noqa: RUF005  (Triton adds tuples; it cannot unpack them)

import triton
import triton.language as tl

from .._common import clamp_passes, product, tile
from .networks import (
    SAMPLED,
    SQUARES,
    add_grad_products,
    coefficient,
    decoded,
    grad_activate,
    grad_linear,
    hidden_column,
    inputs_of,
    load_columns,
    residual,
    sliced,
    store_columns,
    width_of,
)


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
def store_inputs(g_ptr, h, z1, z2, rows, inside, AVERAGE: tl.constexpr, DECODER: tl.constexpr, R: tl.constexpr):
    """Store what the decoder's output layer reads: the last hidden layer, or both latents, or their average."""
    if len(DECODER) > 0:
        SIZE: tl.constexpr = inputs_of(DECODER, len(DECODER), R)
        store_columns(g_ptr, SIZE, rows, inside, 0, h[len(DECODER) - 1], SIZE)
    elif AVERAGE:
        store_columns(g_ptr, R, rows, inside, 0, (z1 + z2) / 2, R)
    else:
        store_columns(g_ptr, 2 * R, rows, inside, 0, z1, R)
        store_columns(g_ptr, 2 * R, rows, inside, R, z2, R)


@triton.jit
def through_decoder(
    x_ptr,
    x_strides,
    h,
    z1,
    z2,
    decoder,
    scale,
    rows,
    inside,
    keep,
    grad_hidden_ptr,
    D,
    AVERAGE: tl.constexpr,
    DECODER: tl.constexpr,
    R: tl.constexpr,
    THRESHOLD: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """The unit gradients of z_1 and z_2 through r, which still lack c[nll]; h are the decoder's hidden layers."""
    ACC: tl.constexpr = z1.dtype
    HIDDEN: tl.constexpr = len(DECODER)
    # 1. r, and the gradient of what the output layer reads: the last hidden layer, or both latents
    SIZE: tl.constexpr = inputs_of(DECODER, HIDDEN, R)
    PARTS: tl.constexpr = 1 if HIDDEN > 0 or AVERAGE else 2
    grads = ()
    for _i in tl.static_range(PARTS):
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
    # 2. Back through the hidden layers
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
    half: tl.constexpr = 0.5 if AVERAGE else 1.0
    return half * grads[0], half * grads[len(grads) - 1]


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
        grad = add_grad_products(grad, grad_logvar, encoder[len(ENCODER) + 1], ins, ins < LAST, R, PRECISION, BLOCK_K)
        for i in tl.static_range(len(ENCODER) - 1, -1, -1):
            at = hidden_column(ENCODER, i, side)
            h = load_columns(state_ptr, WIDTH, rows, inside, at, ENCODER[i])
            grad = grad_activate(grad, h, THRESHOLD)
            store_columns(grad_state_ptr, WIDTH, rows, inside, at, grad, ENCODER[i])
            if i > 0:
                grad = grad_linear(grad, encoder[i], 0, ENCODER[i - 1], ENCODER[i], PRECISION, BLOCK_K)
