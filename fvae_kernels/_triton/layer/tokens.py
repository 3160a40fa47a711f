"""layer, backward by tokens.   Mathematics: reference.layer

    c           = gradients of a token's statistics, from those of the terms
    grad_z1     = s grad_y B + c.nll (decoder) + 2 c.sampled z1           grad_mean = grad_z + 2 c.squares mean ...
    grad_logvar = grad_z noise std / 2 + c.var var + c.logvar             inside of the clamp, 0 outside

The kernel recomputes the decoder and r = (x_hat - x) / t. For each token it stores three small things: the gradients of
the encoders' layers, the inputs of the decoder's output layer, and the gradient of its last hidden layer. Gradients
through the decoder get their factor c.nll at the end, which keeps them in float16's range. `features` does the rest.
"""

# mypy: allow-untyped-defs, disable-error-code="assignment, misc, var-annotated"
# ruff: noqa: RUF005  (Triton adds tuples; it cannot unpack them)

import triton
import triton.language as tl

from .._common import tile
from .arguments import decoder_inputs, hidden_column, mean_column, state_width, width_of
from .networks import (
    add_grad_products,
    decode,
    decoded,
    grad_activate,
    grad_linear,
    load_columns,
    product,
    residual,
    sliced,
    store_columns,
)
from .objective import (
    bounds_of,
    clamp_passes,
    coefficients,
    counting,
    latent,
    nll_coefficient,
    samples,
    token_share,
)


@triton.jit
def add_output_gradient(
    sums, r, decoder, first, at, inputs, D, SIZE: tl.constexpr, S: tl.constexpr, BLOCK_K: tl.constexpr
):
    """sums + r (O / t) for SIZE inputs of O [D, inputs] from `at` on; r holds the features from `first` on."""
    K: tl.constexpr = min(BLOCK_K, r.shape[1])
    ins = tl.arange(0, sums.shape[1])
    for start in range(0, r.shape[1], K):
        outs = first + start + tl.arange(0, K)
        inside = (outs < D)[:, None] & (ins < SIZE)[None, :]
        w = tl.load(tile(decoder.output.weight, outs, at + ins, (inputs, 1)), mask=inside, other=0)
        inverse = 1 / tl.load(decoder.scale + outs, mask=outs < D, other=1).to(r.dtype)
        scaled = (w.to(r.dtype) * inverse[:, None]).to(w.dtype)
        sums = product(sliced(r, start, K).to(w.dtype), scaled, sums, S)
    return sums


@triton.jit
def through_decoder(
    layer,
    h,
    z1,
    z2,
    rows,
    inside,
    keep,
    grad_hidden_ptr,
    D,
    S: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """The gradients of z_1 and z_2 through r, without the factor c.nll; h: outputs of the decoder's hidden layers."""
    decoder = layer.networks.decoder
    HIDDEN: tl.constexpr = len(S.decoder)
    # 1. r, and the gradient of the output layer's inputs: the last hidden layer, or the latents
    INPUTS: tl.constexpr = decoder_inputs(S, HIDDEN)
    PARTS: tl.constexpr = 1 if HIDDEN > 0 or S.average else 2
    SIZE: tl.constexpr = INPUTS // PARTS
    grads = ()
    for _i in tl.static_range(PARTS):
        grads = grads + (tl.zeros((rows.shape[0], width_of(SIZE)), S.acc),)
    for first in range(0, D, BLOCK_D):
        cols = first + tl.arange(0, BLOCK_D)
        counts = keep[:, None] & (cols < D)[None, :]
        x_hat = decoded(h, z1, z2, layer.networks.decoder.output, cols, cols < D, S, BLOCK_K)
        x = tl.load(tile(layer.x, rows, cols, (layer.x_stride, 1)), mask=counts, other=0).to(S.acc)
        r, _ = residual(x_hat, x, layer.networks.decoder.scale, cols, counts, D)
        added = ()
        for i in tl.static_range(PARTS):
            added = added + (
                add_output_gradient(grads[i], r, layer.networks.decoder, first, i * SIZE, INPUTS, D, SIZE, S, BLOCK_K),
            )
        grads = added
    # 2. Back through the hidden layers
    if HIDDEN > 0:
        grad = grad_activate(grads[0], h[HIDDEN - 1], S)
        if grad_hidden_ptr is not None:
            store_columns(grad_hidden_ptr, INPUTS, rows, inside, 0, grad, INPUTS)
        for i in tl.static_range(HIDDEN - 1, 0, -1):
            weight = decoder.hidden[i].weight
            grad = grad_linear(grad, weight, S.decoder[i - 1], S.decoder[i - 1], S.decoder[i], S, BLOCK_K)
            grad = grad_activate(grad, h[i - 1], S)
        first_weight = decoder.hidden[0].weight
        LATENT: tl.constexpr = decoder_inputs(S, 0)
        if S.average:
            grads = (grad_linear(grad, first_weight, LATENT, S.R, S.decoder[0], S, BLOCK_K),)
        else:
            grads = (
                grad_linear(grad, first_weight, LATENT, S.R, S.decoder[0], S, BLOCK_K),
                grad_linear(grad, first_weight + S.R, LATENT, S.R, S.decoder[0], S, BLOCK_K),
            )
    half: tl.constexpr = 0.5 if S.average else 1.0
    return half * grads[0], half * grads[len(grads) - 1]


@triton.jit
def store_output_inputs(to_ptr, h, z1, z2, rows, inside, S: tl.constexpr):
    """Store the inputs of the decoder's output layer: the last hidden layer, both latents, or their average."""
    SIZE: tl.constexpr = decoder_inputs(S, len(S.decoder))
    if len(S.decoder) > 0:
        store_columns(to_ptr, SIZE, rows, inside, 0, h[len(S.decoder) - 1], SIZE)
    elif S.average:
        store_columns(to_ptr, SIZE, rows, inside, 0, (z1 + z2) / 2, S.R)
    else:
        store_columns(to_ptr, SIZE, rows, inside, 0, z1, S.R)
        store_columns(to_ptr, SIZE, rows, inside, S.R, z2, S.R)


@triton.jit
def through_y(grad_y_ptr, grad_y_stride, B, rows, inside, M, S: tl.constexpr, BLOCK_K: tl.constexpr):
    """grad_y B"""
    R: tl.constexpr = S.R
    in_latent = tl.arange(0, width_of(R))
    sums = tl.zeros((rows.shape[0], width_of(R)), S.acc)
    for first in range(0, M, BLOCK_K):
        cols = first + tl.arange(0, BLOCK_K)
        in_y, in_B = inside[:, None] & (cols < M)[None, :], (cols < M)[:, None] & (in_latent < R)[None, :]
        grad_y = tl.load(tile(grad_y_ptr, rows, cols, (grad_y_stride, 1)), mask=in_y, other=0)
        b = tl.load(tile(B, cols, in_latent, (R, 1)), mask=in_B, other=0)
        sums = product(grad_y.to(b.dtype), b, sums, S)
    return sums


@triton.jit
def through_posterior(latent, grad_z, c, keep, mu, bounds, side: tl.constexpr):
    """The gradients of mean and logvar of one latent, from the gradient of its sample and the coefficients c."""
    center = mu if side == 1 else 0.0
    grad_z += tl.where(keep[:, None], 2 * c.sampled * (latent.z - center), 0.0)
    of_mean = 2 * c.squares * latent.mean + 2 * c.from_mu * (latent.mean - mu)
    of_logvar = c.var * latent.std * latent.std + c.logvar
    grad_mean = grad_z + tl.where(keep[:, None], of_mean, 0.0)
    grad_logvar = grad_z * latent.noise * latent.std / 2 + tl.where(keep[:, None], of_logvar, 0.0)
    return grad_mean, tl.where(clamp_passes(latent.logvar, bounds, side), grad_logvar, 0.0)


@triton.jit
def through_encoder(
    grad_mean, grad_logvar, encoder, state_ptr, grad_state_ptr, rows, inside, side: tl.constexpr, S: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Store the gradients of the outputs of each layer of one encoder, before the activation."""
    WIDTH: tl.constexpr = state_width(S)
    store_columns(grad_state_ptr, WIDTH, rows, inside, mean_column(S, side), grad_mean, S.R)
    store_columns(grad_state_ptr, WIDTH, rows, inside, mean_column(S, side) + S.R, grad_logvar, S.R)
    if len(S.encoder) > 0:
        LAST: tl.constexpr = S.encoder[len(S.encoder) - 1]
        ins = tl.arange(0, width_of(LAST))
        grad = grad_linear(grad_mean, encoder.mean.weight, LAST, LAST, S.R, S, BLOCK_K)
        grad = add_grad_products(grad, grad_logvar, encoder.logvar.weight, LAST, ins, ins < LAST, S.R, S, BLOCK_K)
        for i in tl.static_range(len(S.encoder) - 1, -1, -1):
            h = load_columns(state_ptr, WIDTH, rows, inside, hidden_column(S, i, side), S.encoder[i])
            grad = grad_activate(grad, h, S)
            store_columns(grad_state_ptr, WIDTH, rows, inside, hidden_column(S, i, side), grad, S.encoder[i])
            if i > 0:
                weight = encoder.hidden[i].weight
                grad = grad_linear(grad, weight, S.encoder[i - 1], S.encoder[i - 1], S.encoder[i], S, BLOCK_K)


@triton.jit(do_not_specialize=["N"])
def layer_bwd_kernel(
    layer,  # Layer
    grad_y_ptr,  # [N, M] or None
    grad_y_stride,
    term_grads,  # TermGrads of pointers
    objective,  # Objective of weights as float32
    rest,  # Objective of their rounding errors, None unless sums are taken in float64
    state_ptr,  # [N, state_width]
    grad_state_ptr,  # [N, state_width], or None if neither x nor the encoders need a gradient
    inputs_ptr,  # [N, inputs of the output layer], or None if not needed, as the next
    grad_hidden_ptr,  # [N, last hidden layer of the decoder], without the factor c.nll
    recon_weight: tl.float64,
    scaling: tl.float64,
    prior2_mean: tl.float64,
    logvar1_low: tl.float64,
    logvar1_high: tl.float64,
    N,
    D,
    M,
    S: tl.constexpr,  # Sizes
    DECODE: tl.constexpr,  # whether a gradient comes through r
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    # 1. This program's tokens, and their latents
    rows = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = rows < N
    keep = counting(layer, rows, N, S)
    bounds = bounds_of(logvar1_low, logvar1_high, S)
    WIDTH: tl.constexpr = state_width(S)
    z1, z2 = samples(state_ptr, layer, bounds, rows, inside, S, WIDTH)
    grad_z1, grad_z2 = tl.zeros(z1.shape, S.acc), tl.zeros(z2.shape, S.acc)
    # 2. Through r
    if DECODE:
        h = decode(z1, z2, layer, rows, len(S.decoder), S, BLOCK_K)
        if grad_state_ptr is not None or grad_hidden_ptr is not None:
            unit1, unit2 = through_decoder(
                layer, h, z1, z2, rows, inside, keep, grad_hidden_ptr, D, S, BLOCK_D, BLOCK_K
            )
            c_nll = nll_coefficient(token_share(term_grads, layer.kept, N, S), recon_weight)
            grad_z1, grad_z2 = c_nll * unit1, c_nll * unit2
        if inputs_ptr is not None:
            store_output_inputs(inputs_ptr, h, z1, z2, rows, inside, S)
    if grad_state_ptr is not None:
        # 3. Through y = base + s B z_1
        if grad_y_ptr is not None:
            of_y = through_y(grad_y_ptr, grad_y_stride, layer.networks.B, rows, inside, M, S, BLOCK_K)
            grad_z1 += tl.full((), scaling, S.acc) * of_y
        # 4. Through each posterior and its encoder. The latent is made again: kept, it would fill registers
        mu = tl.full((), prior2_mean, S.acc)
        for side in tl.static_range(2):
            tl.debug_barrier()
            posterior = latent(state_ptr, layer, bounds, rows, inside, side, S, WIDTH)
            c = coefficients(token_share(term_grads, layer.kept, N, S), objective, rest, side, S)
            grad_z = grad_z1 if side == 0 else grad_z2
            grad_mean, grad_logvar = through_posterior(posterior, grad_z, c, keep, mu, bounds, side)
            encoder = layer.networks.encoder1 if side == 0 else layer.networks.encoder2
            through_encoder(grad_mean, grad_logvar, encoder, state_ptr, grad_state_ptr, rows, inside, side, S, BLOCK_K)
