"""Encoders and decoder in registers.

The activations of a tile of tokens are one tensor [BLOCK_N, W], W a power of two. Products take slices of it, so that
slices and weight blocks need few registers.
"""

# mypy: allow-untyped-defs, disable-error-code="assignment, misc, var-annotated"
# ruff: noqa: RUF005  (Triton adds tuples; it cannot unpack them)

import triton
import triton.language as tl

from .._common import product as product_in
from .._common import tile
from .._random import not_dropped
from .arguments import decoder_inputs, width_of


@triton.jit
def product(a, b, sums, S: tl.constexpr):
    """sums + a b"""
    return product_in(a, b, sums, tl.constexpr(S.precision))


@triton.jit
def sliced(h, first, K: tl.constexpr):
    """Columns first, ..., first + K - 1 of h."""
    if h.shape[1] <= K:
        return h
    columns = first + tl.arange(0, K)
    return tl.gather(h, tl.broadcast_to(columns[None, :], h.shape[0], K), 1)


@triton.jit
def load_columns(ptr, stride, rows, keep, first, SIZE: tl.constexpr):
    """Load SIZE columns from `first` on, from a matrix with `stride` entries a row."""
    cols = tl.arange(0, width_of(SIZE))
    return tl.load(tile(ptr, rows, first + cols, (stride, 1)), mask=keep[:, None] & (cols < SIZE)[None, :], other=0)


@triton.jit
def store_columns(ptr, stride, rows, keep, first, h, SIZE: tl.constexpr):
    cols = tl.arange(0, width_of(SIZE))
    to = tile(ptr, rows, first + cols, (stride, 1))
    tl.store(to, h.to(ptr.dtype.element_ty), mask=keep[:, None] & (cols < SIZE)[None, :])


# h W^T + b


@triton.jit
def load_transposed(weight, inputs, ins, outs, in_ins, in_outs):
    """Load the block [ins, outs] of W^T, where W is [.., inputs]."""
    return tl.load(tile(weight, ins, outs, (1, inputs)), mask=in_ins[:, None] & in_outs[None, :], other=0)


@triton.jit
def add_products(sums, h, weight, inputs, outs, in_outs, SIZE: tl.constexpr, S: tl.constexpr, BLOCK_K: tl.constexpr):
    """sums + h W^T for the outputs `outs`; h holds the first SIZE inputs of W [.., inputs]."""
    K: tl.constexpr = min(BLOCK_K, width_of(SIZE))
    for start in range(0, SIZE, K):
        ins = start + tl.arange(0, K)
        w = load_transposed(weight, inputs, ins, outs, ins < SIZE, in_outs)
        sums = product(sliced(h, start, K).to(w.dtype), w, sums, S)
    return sums


@triton.jit
def add_bias(sums, bias, outs, in_outs):
    return sums + tl.load(bias + outs, mask=in_outs, other=0).to(sums.dtype)[None, :]


@triton.jit
def apply_linear(h, linear, SIZE: tl.constexpr, OUT: tl.constexpr, S: tl.constexpr, BLOCK_K: tl.constexpr):
    """h W^T + b for SIZE inputs and OUT outputs."""
    outs = tl.arange(0, width_of(OUT))
    sums = tl.zeros((h.shape[0], width_of(OUT)), h.dtype)
    sums = add_products(sums, h, linear.weight, SIZE, outs, outs < OUT, SIZE, S, BLOCK_K)
    return add_bias(sums, linear.bias, outs, outs < OUT)


# its gradient


@triton.jit
def add_grad_products(
    sums, grads, weight, inputs, ins, in_ins, OUT: tl.constexpr, S: tl.constexpr, BLOCK_K: tl.constexpr
):
    """sums + grads W for the inputs `ins` of W [OUT, inputs]."""
    K: tl.constexpr = min(BLOCK_K, width_of(OUT))
    for start in range(0, OUT, K):
        outs = start + tl.arange(0, K)
        inside = (outs < OUT)[:, None] & in_ins[None, :]
        w = tl.load(tile(weight, outs, ins, (inputs, 1)), mask=inside, other=0)
        sums = product(sliced(grads, start, K).to(w.dtype), w, sums, S)
    return sums


@triton.jit
def grad_linear(grads, weight, inputs, SIZE: tl.constexpr, OUT: tl.constexpr, S: tl.constexpr, BLOCK_K: tl.constexpr):
    """grads W: the gradient of the first SIZE inputs of W [OUT, inputs]."""
    ins = tl.arange(0, width_of(SIZE))
    sums = tl.zeros((grads.shape[0], width_of(SIZE)), grads.dtype)
    return add_grad_products(sums, grads, weight, inputs, ins, ins < SIZE, OUT, S, BLOCK_K)


# dropout(relu(v)), and its gradient


@triton.jit
def activate(v, layer, first, seed_ptr, rows, UNITS: tl.constexpr, S: tl.constexpr):
    """dropout(relu(v)) of the units from `first` on, in layer number `layer` with UNITS units; NaN stays NaN."""
    v = tl.where(v < 0, 0.0, v)
    if S.threshold is not None:
        units = first + tl.arange(0, v.shape[1])
        passed = not_dropped(seed_ptr, layer, rows, units, UNITS, S.threshold)
        v = tl.where(passed, v, v * 0.0) * tl.full((), 65536 / S.threshold, v.dtype)
    return v


@triton.jit
def grad_activate(grad, activated, S: tl.constexpr):
    """The gradient before relu and dropout; an output of 0 passes none."""
    grad = tl.where(activated <= 0, 0.0, grad)
    if S.threshold is not None:
        grad *= tl.full((), 65536 / S.threshold, grad.dtype)
    return grad


# the decoder


@triton.jit
def decode(z1, z2, layer, rows, COUNT: tl.constexpr, S: tl.constexpr, BLOCK_K: tl.constexpr):
    """Outputs of the first COUNT hidden layers of the decoder."""
    hidden = layer.networks.decoder.hidden
    outputs = ()
    for i in tl.static_range(COUNT):
        outs = tl.arange(0, width_of(S.decoder[i]))
        v = tl.zeros((z1.shape[0], width_of(S.decoder[i])), z1.dtype)
        if i == 0:
            v = add_latent_products(v, z1, z2, hidden[0].weight, outs, outs < S.decoder[0], S, BLOCK_K)
        else:
            v = add_products(
                v,
                outputs[i - 1],
                hidden[i].weight,
                S.decoder[i - 1],
                outs,
                outs < S.decoder[i],
                S.decoder[i - 1],
                S,
                BLOCK_K,
            )
        v = add_bias(v, hidden[i].bias, outs, outs < S.decoder[i])
        outputs = outputs + (activate(v, len(S.encoder) + i, 0, layer.seed, rows, S.decoder[i], S),)
    return outputs


@triton.jit
def add_latent_products(sums, z1, z2, weight, outs, in_outs, S: tl.constexpr, BLOCK_K: tl.constexpr):
    """sums + g W^T, where the decoder's input g is [z_1, z_2] or their average."""
    if S.average:
        return add_products(sums, (z1 + z2) / 2, weight, S.R, outs, in_outs, S.R, S, BLOCK_K)
    sums = add_products(sums, z1, weight, 2 * S.R, outs, in_outs, S.R, S, BLOCK_K)
    return add_products(sums, z2, weight + S.R, 2 * S.R, outs, in_outs, S.R, S, BLOCK_K)


@triton.jit
def decoded(h, z1, z2, output, cols, in_cols, S: tl.constexpr, BLOCK_K: tl.constexpr):
    """x_hat of a block of features, from the outputs h of the decoder's hidden layers, or from the latents."""
    x_hat = tl.zeros((z1.shape[0], cols.shape[0]), z1.dtype)
    if len(S.decoder) > 0:
        SIZE: tl.constexpr = decoder_inputs(S, len(S.decoder))
        x_hat = add_products(x_hat, h[len(S.decoder) - 1], output.weight, SIZE, cols, in_cols, SIZE, S, BLOCK_K)
    else:
        x_hat = add_latent_products(x_hat, z1, z2, output.weight, cols, in_cols, S, BLOCK_K)
    return add_bias(x_hat, output.bias, cols, in_cols)


@triton.jit
def residual(x_hat, x, scale_ptr, cols, counts, D):
    """r = (x_hat - x) / t, 0 for tokens that do not count; and 1 / t."""
    inverse = 1 / tl.load(scale_ptr + cols, mask=cols < D, other=1).to(x_hat.dtype)
    return tl.where(counts, (x_hat - x) * inverse[None, :], 0.0), inverse
