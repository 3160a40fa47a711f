"""What the layer kernels share: networks in registers, and the objective.

The activations of a tile of tokens are one tensor [BLOCK_N, W] in registers, W a power of two. Products take slices of
it, so that neither the slices nor the weights that they meet need many registers. A linear layer is (weight, bias,
strides of both).
"""

# mypy: allow-untyped-defs, disable-error-code="assignment, misc, var-annotated"
# ruff: noqa: RUF005  (Triton adds tuples; it cannot unpack them)

import triton
import triton.language as tl

from .._common import clamped, product, share, tile
from .._random import noises, not_dropped

STATISTICS, NLL = tl.constexpr(12), tl.constexpr(1)  # of the objective's table, in the order of ops._layer_support
SQUARES, VAR, SAMPLED = tl.constexpr(2), tl.constexpr(4), tl.constexpr(10)


@triton.constexpr_function
def width_of(size):
    """Of a tensor that holds `size` entries."""
    return max(triton.next_power_of_2(size), 16)


@triton.constexpr_function
def hidden_column(encoder, layer, side):
    """In the state, of the first unit of an encoder's hidden layer."""
    return 2 * sum(encoder[:layer]) + (side * encoder[layer] if layer < len(encoder) else 0)


@triton.constexpr_function
def inputs_of(sizes, layer, first):
    """Of a layer of a network: the size of the one before, or of the network's input."""
    return sizes[layer - 1] if layer > 0 else first


# networks


@triton.jit
def sliced(h, first, K: tl.constexpr):
    """The columns first, ..., first + K - 1."""
    if h.shape[1] <= K:
        return h
    columns = first + tl.arange(0, K)
    return tl.gather(h, tl.broadcast_to(columns[None, :], h.shape[0], K), 1)


@triton.jit
def load_transposed(layer, ins, outs, in_ins, in_outs):
    """The block [ins, outs] of W^T."""
    to = tile(layer[0], ins, outs, (layer[2][1], layer[2][0]))
    return tl.load(to, mask=in_ins[:, None] & in_outs[None, :], other=0)


@triton.jit
def add_products(
    sums, h, layer, first, outs, in_outs, SIZE: tl.constexpr, PRECISION: tl.constexpr, BLOCK_K: tl.constexpr
):
    """sums + h W^T for the outputs `outs`, where h are the SIZE inputs from `first` on."""
    K: tl.constexpr = min(BLOCK_K, width_of(SIZE))
    for start in range(0, SIZE, K):
        ins = start + tl.arange(0, K)
        w = load_transposed(layer, first + ins, outs, ins < SIZE, in_outs)
        sums = product(sliced(h, start, K).to(w.dtype), w, sums, PRECISION)
    return sums


@triton.jit
def add_bias(sums, layer, outs, in_outs):
    if layer[1] is not None:
        sums += tl.load(layer[1] + outs * layer[3][0], mask=in_outs, other=0).to(sums.dtype)[None, :]
    return sums


@triton.jit
def linear(h, layer, SIZE: tl.constexpr, OUT: tl.constexpr, PRECISION: tl.constexpr, BLOCK_K: tl.constexpr):
    """h W^T + b"""
    outs = tl.arange(0, width_of(OUT))
    sums = tl.zeros((h.shape[0], width_of(OUT)), h.dtype)
    sums = add_products(sums, h, layer, 0, outs, outs < OUT, SIZE, PRECISION, BLOCK_K)
    return add_bias(sums, layer, outs, outs < OUT)


@triton.jit
def add_grad_products(
    sums, grads, layer, ins, in_ins, OUT: tl.constexpr, PRECISION: tl.constexpr, BLOCK_K: tl.constexpr
):
    """sums + grads W for the inputs `ins`."""
    K: tl.constexpr = min(BLOCK_K, width_of(OUT))
    for start in range(0, OUT, K):
        outs = start + tl.arange(0, K)
        inside = (outs < OUT)[:, None] & in_ins[None, :]
        w = tl.load(tile(layer[0], outs, ins, layer[2]), mask=inside, other=0)
        sums = product(sliced(grads, start, K).to(w.dtype), w, sums, PRECISION)
    return sums


@triton.jit
def grad_linear(
    grads, layer, first, SIZE: tl.constexpr, OUT: tl.constexpr, PRECISION: tl.constexpr, BLOCK_K: tl.constexpr
):
    """grads W: the gradient of the SIZE inputs from `first` on."""
    ins = tl.arange(0, width_of(SIZE))
    sums = tl.zeros((grads.shape[0], width_of(SIZE)), grads.dtype)
    return add_grad_products(sums, grads, layer, first + ins, ins < SIZE, OUT, PRECISION, BLOCK_K)


@triton.jit
def activate(v, number, first, seed_ptr, rows, UNITS: tl.constexpr, THRESHOLD: tl.constexpr):
    """dropout(relu(v)) of units from `first` on, of the UNITS of the `number`-th layer; NaN stays NaN."""
    v = tl.where(v < 0, 0.0, v)
    if THRESHOLD is not None:
        units = first + tl.arange(0, v.shape[1])
        passed = not_dropped(seed_ptr, number, rows, units, UNITS, THRESHOLD)
        v = tl.where(passed, v, v * 0.0) * tl.full((), 65536 / THRESHOLD, v.dtype)
    return v


@triton.jit
def grad_activate(grad, activated, THRESHOLD: tl.constexpr):
    """The gradient before relu and dropout: what came out as 0 was cut by one or the other."""
    grad = tl.where(activated <= 0, 0.0, grad)
    if THRESHOLD is not None:
        grad *= tl.full((), 65536 / THRESHOLD, grad.dtype)
    return grad


@triton.jit
def decode(
    z1,
    z2,
    decoder,
    seed_ptr,
    rows,
    COUNT: tl.constexpr,
    FIRST: tl.constexpr,  # layers that drop units and come before the decoder's
    AVERAGE: tl.constexpr,
    DECODER: tl.constexpr,
    R: tl.constexpr,
    THRESHOLD: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """The outputs of the first COUNT hidden layers of the decoder."""
    outputs = ()
    for i in tl.static_range(COUNT):
        outs = tl.arange(0, width_of(DECODER[i]))
        v = tl.zeros((z1.shape[0], width_of(DECODER[i])), z1.dtype)
        if i == 0:
            v = add_latent_products(v, z1, z2, decoder[0], outs, outs < DECODER[0], AVERAGE, R, PRECISION, BLOCK_K)
        else:
            v = add_products(
                v, outputs[i - 1], decoder[i], 0, outs, outs < DECODER[i], DECODER[i - 1], PRECISION, BLOCK_K
            )
        v = add_bias(v, decoder[i], outs, outs < DECODER[i])
        outputs = outputs + (activate(v, FIRST + i, 0, seed_ptr, rows, DECODER[i], THRESHOLD),)
    return outputs


@triton.jit
def add_latent_products(
    sums,
    z1,
    z2,
    layer,
    outs,
    in_outs,
    AVERAGE: tl.constexpr,
    R: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """sums + g W^T, where the decoder's input g is [z_1, z_2] or their average."""
    if AVERAGE:
        return add_products(sums, (z1 + z2) / 2, layer, 0, outs, in_outs, R, PRECISION, BLOCK_K)
    sums = add_products(sums, z1, layer, 0, outs, in_outs, R, PRECISION, BLOCK_K)
    return add_products(sums, z2, layer, R, outs, in_outs, R, PRECISION, BLOCK_K)


@triton.jit
def decoded(
    g,
    output,
    z1,
    z2,
    cols,
    in_cols,
    AVERAGE: tl.constexpr,
    DECODER: tl.constexpr,
    R: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """x_hat of a block of features, from the outputs g of the decoder's hidden layers, or from the latent."""
    x_hat = tl.zeros((z1.shape[0], cols.shape[0]), z1.dtype)
    if len(DECODER) > 0:
        SIZE: tl.constexpr = inputs_of(DECODER, len(DECODER), R)
        x_hat = add_products(x_hat, g[len(DECODER) - 1], output, 0, cols, in_cols, SIZE, PRECISION, BLOCK_K)
    else:
        x_hat = add_latent_products(x_hat, z1, z2, output, cols, in_cols, AVERAGE, R, PRECISION, BLOCK_K)
    return add_bias(x_hat, output, cols, in_cols)


@triton.jit
def residual(x_hat, x, scale, cols, counts, D):
    """r = (x_hat - x) / t, 0 where it does not count; and 1 / t."""
    inverse = 1 / tl.load(scale[0] + cols * scale[1][0], mask=cols < D, other=1).to(x_hat.dtype)
    return tl.where(counts, (x_hat - x) * inverse[None, :], 0.0), inverse


@triton.jit
def load_columns(ptr, stride, rows, keep, first, SIZE: tl.constexpr):
    """The SIZE columns from `first` on of a matrix with rows of `stride` entries."""
    cols = tl.arange(0, width_of(SIZE))
    return tl.load(tile(ptr, rows, first + cols, (stride, 1)), mask=keep[:, None] & (cols < SIZE)[None, :], other=0)


@triton.jit
def store_columns(ptr, stride, rows, keep, first, h, SIZE: tl.constexpr):
    cols = tl.arange(0, width_of(SIZE))
    to = tile(ptr, rows, first + cols, (stride, 1))
    tl.store(to, h.to(ptr.dtype.element_ty), mask=keep[:, None] & (cols < SIZE)[None, :])


# the objective


@triton.jit
def weight(table, i: tl.constexpr, ACC: tl.constexpr):
    """An entry of the objective's table, which comes as two tuples of float32."""
    return tl.full((), table[0][i], ACC) + tl.full((), table[1][i], ACC)


@triton.jit
def coefficient(grads, table, kept_ptr, N, i: tl.constexpr, ACC: tl.constexpr):
    """The gradient of a token's i-th statistic, from those of loss, nll, kl and gamma."""
    c = share(grads[0], kept_ptr, N, ACC) * weight(table, i, ACC)
    c += share(grads[2], kept_ptr, N, ACC) * weight(table, STATISTICS + i, ACC)
    c += share(grads[3], kept_ptr, N, ACC) * weight(table, 2 * STATISTICS + i, ACC)
    if i == NLL:
        c += share(grads[1], kept_ptr, N, ACC)
    return c


@triton.jit
def standard_deviation(logvar):
    return tl.exp(0.5 * clamped(logvar))


@triton.jit
def latent(
    state_ptr,
    noise,
    noise_strides,
    seed_ptr,
    rows,
    inside,
    side: tl.constexpr,
    WIDTH: tl.constexpr,
    ENCODER: tl.constexpr,
    R: tl.constexpr,
    ACC: tl.constexpr,
):
    """mean, logvar, noise, standard deviation and sample of one latent, from the state that forward left."""
    HEADS: tl.constexpr = hidden_column(ENCODER, len(ENCODER), 0)
    entries = tl.arange(0, width_of(R))
    given = inside[:, None] & (entries < R)[None, :]
    eps = noises(noise, noise_strides, seed_ptr, rows, entries, given, R, ACC)[side]
    mean = load_columns(state_ptr, WIDTH, rows, inside, HEADS + 2 * side * R, R)
    logvar = load_columns(state_ptr, WIDTH, rows, inside, HEADS + (2 * side + 1) * R, R)
    std = standard_deviation(logvar)
    return mean, logvar, eps, std, mean + std * eps


@triton.jit
def samples(
    state_ptr,
    noise,
    noise_strides,
    seed_ptr,
    rows,
    inside,
    WIDTH: tl.constexpr,
    ENCODER: tl.constexpr,
    R: tl.constexpr,
    ACC: tl.constexpr,
):
    """z_1 and z_2, from the state that forward left."""
    latent1 = latent(state_ptr, noise, noise_strides, seed_ptr, rows, inside, 0, WIDTH, ENCODER, R, ACC)
    latent2 = latent(state_ptr, noise, noise_strides, seed_ptr, rows, inside, 1, WIDTH, ENCODER, R, ACC)
    return latent1[4], latent2[4]
