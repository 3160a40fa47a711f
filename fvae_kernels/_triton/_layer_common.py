"""What the layer kernels share: networks in registers, and random numbers by position.

Activations of a tile of tokens are a tuple of blocks [BLOCK_N, W], so that products of wide layers are made of small
ones and no layer needs more registers than its blocks. A linear layer is (weight, bias, strides of both). Inputs that
consist of parts, as [z_1, z_2] does, have blocks of their own for each part.
"""

# mypy: allow-untyped-defs

import math

import triton
import triton.language as tl

from ._common import clamped, padded, product, tile

NOISE = tl.constexpr(1 << 31)  # third word of the counters of noise; dropout has the number of a layer there
TWO_PI = tl.constexpr(2 * math.pi)
TO_UNIT = tl.constexpr(2.0**-32)


@triton.constexpr_function
def width_of(size, limit):
    """Of the blocks that `size` entries are cut into."""
    return min(padded(size), limit)


@triton.constexpr_function
def blocks_of(size, width):
    """How many of them `size` entries are cut into."""
    return -(-size // width)


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
def columns(k: tl.constexpr, SIZE: tl.constexpr, W: tl.constexpr):
    """The columns of block k, where each part has SIZE of them, and which of them exist."""
    COUNT: tl.constexpr = blocks_of(SIZE, W)
    local = k % COUNT * W + tl.arange(0, W)
    return k // COUNT * SIZE + local, local < SIZE


@triton.jit
def add_products(sums, h, layer, outs, in_outs, SIZE: tl.constexpr, PRECISION: tl.constexpr):
    """sums + h W^T for the outputs `outs`."""
    w_ptr, _, w_strides, _ = layer
    for k in tl.static_range(len(h)):
        ins, in_ins = columns(k, SIZE, h[0].shape[1])
        to = tile(w_ptr, ins, outs, (w_strides[1], w_strides[0]))
        w = tl.load(to, mask=in_ins[:, None] & in_outs[None, :], other=0)
        sums = product(h[k].to(w.dtype), w, sums, PRECISION)
    return sums


@triton.jit
def add_bias(sums, layer, outs, in_outs):
    _, b_ptr, _, b_strides = layer
    if b_ptr is not None:
        sums += tl.load(b_ptr + outs * b_strides[0], mask=in_outs, other=0).to(sums.dtype)[None, :]
    return sums


@triton.jit
def linear(h, layer, SIZE: tl.constexpr, OUT: tl.constexpr, PRECISION: tl.constexpr, BLOCK_H: tl.constexpr):
    """h W^T + b, block after block."""
    result = ()
    for j in tl.static_range(blocks_of(OUT, width_of(OUT, BLOCK_H))):
        outs, in_outs = columns(j, OUT, width_of(OUT, BLOCK_H))
        sums = tl.zeros((h[0].shape[0], width_of(OUT, BLOCK_H)), h[0].dtype)
        sums = add_products(sums, h, layer, outs, in_outs, SIZE, PRECISION)
        result = result + (add_bias(sums, layer, outs, in_outs),)
    return result


@triton.jit
def add_grad_products(sums, grads, layer, ins, in_ins, OUT: tl.constexpr, PRECISION: tl.constexpr):
    """sums + grads W for the inputs `ins`."""
    w_ptr, _, w_strides, _ = layer
    for j in tl.static_range(len(grads)):
        outs, in_outs = columns(j, OUT, grads[0].shape[1])
        w = tl.load(tile(w_ptr, outs, ins, w_strides), mask=in_outs[:, None] & in_ins[None, :], other=0)
        sums = product(grads[j].to(w.dtype), w, sums, PRECISION)
    return sums


@triton.jit
def grad_linear(
    grads,
    layer,
    SIZE: tl.constexpr,
    COUNT: tl.constexpr,
    OUT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """grads W: the gradient of the input, COUNT blocks."""
    result = ()
    for k in tl.static_range(COUNT):
        ins, in_ins = columns(k, SIZE, width_of(SIZE, BLOCK_H))
        sums = tl.zeros((grads[0].shape[0], width_of(SIZE, BLOCK_H)), grads[0].dtype)
        result = result + (add_grad_products(sums, grads, layer, ins, in_ins, OUT, PRECISION),)
    return result


@triton.jit
def activate(
    blocks, number, first, seed_ptr, rows, SIZE: tl.constexpr, UNITS: tl.constexpr, THRESHOLD: tl.constexpr
):
    """dropout(relu(v)) of SIZE units from `first` on, of the UNITS of the `number`-th layer; NaN stays NaN."""
    result = ()
    for k in tl.static_range(len(blocks)):
        v = tl.where(blocks[k] < 0, 0.0, blocks[k])
        if THRESHOLD is not None:
            units, _ = columns(k, SIZE, v.shape[1])
            passed = not_dropped(seed_ptr, number, rows, first + units, UNITS, THRESHOLD)
            v = tl.where(passed, v, v * 0.0) * tl.full((), 65536 / THRESHOLD, v.dtype)
        result = result + (v,)
    return result


@triton.jit
def grad_activate(grads, activated, THRESHOLD: tl.constexpr):
    """The gradient before relu and dropout: what came out as 0 was cut by one or the other."""
    result = ()
    for k in tl.static_range(len(grads)):
        grad = tl.where(activated[k] <= 0, 0.0, grads[k])
        if THRESHOLD is not None:
            grad *= tl.full((), 65536 / THRESHOLD, grad.dtype)
        result = result + (grad,)
    return result


@triton.jit
def decode(
    latent,
    decoder,
    seed_ptr,
    rows,
    COUNT: tl.constexpr,
    FIRST: tl.constexpr,  # layers that drop units and come before the decoder's
    DECODER: tl.constexpr,
    R: tl.constexpr,
    THRESHOLD: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """The latent, and after it the outputs of the first COUNT hidden layers of the decoder."""
    outputs = (latent,)
    for i in tl.static_range(COUNT):
        v = linear(outputs[i], decoder[i], inputs_of(DECODER, i, R), DECODER[i], PRECISION, BLOCK_H)
        outputs = outputs + (activate(v, FIRST + i, 0, seed_ptr, rows, DECODER[i], DECODER[i], THRESHOLD),)
    return outputs


@triton.jit
def fused(z1, z2, AVERAGE: tl.constexpr):
    """The decoder's input: both latents, or their average."""
    result = z1 + z2
    if AVERAGE:
        result = ()
        for k in tl.static_range(len(z1)):
            result = result + ((z1[k] + z2[k]) / 2,)
    return result


@triton.jit
def residual(
    x_ptr,
    x_strides,
    g,
    output,
    scale,
    rows,
    cols,
    keep,
    D,
    SIZE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """r = (x_hat - x) / t of one block, 0 where it does not count; and 1 / t."""
    scale_ptr, scale_strides = scale
    inside = cols < D
    x_hat = tl.zeros((rows.shape[0], cols.shape[0]), g[0].dtype)
    x_hat = add_bias(add_products(x_hat, g, output, cols, inside, SIZE, PRECISION), output, cols, inside)
    counts = keep[:, None] & inside[None, :]
    x = tl.load(tile(x_ptr, rows, cols, x_strides), mask=counts, other=0).to(x_hat.dtype)
    inverse = 1 / tl.load(scale_ptr + cols * scale_strides[0], mask=inside, other=1).to(x_hat.dtype)
    return tl.where(counts, (x_hat - x) * inverse[None, :], 0.0), inverse


@triton.jit
def load_blocks(ptr, stride, rows, keep, first, SIZE: tl.constexpr, COUNT: tl.constexpr, BLOCK_H: tl.constexpr):
    """COUNT blocks of the columns from `first` on of a matrix with rows of `stride` entries."""
    result = ()
    for k in tl.static_range(COUNT):
        cols, inside = columns(k, SIZE, width_of(SIZE, BLOCK_H))
        entries = tl.load(tile(ptr, rows, first + cols, (stride, 1)), mask=keep[:, None] & inside[None, :], other=0)
        result = result + (entries,)
    return result


@triton.jit
def store_blocks(ptr, stride, rows, keep, first, h, SIZE: tl.constexpr):
    for k in tl.static_range(len(h)):
        cols, inside = columns(k, SIZE, h[0].shape[1])
        tl.store(tile(ptr, rows, first + cols, (stride, 1)), h[k], mask=keep[:, None] & inside[None, :])


# random numbers


@triton.jit
def philox(seed_ptr, position, stream):
    """128 bits for each position of a stream, as four words: Philox 4x32-10."""
    low, high = (position & 0xFFFFFFFF).to(tl.uint32), (position >> 32).to(tl.uint32)
    zero = tl.zeros_like(low)
    return tl.philox(tl.load(seed_ptr), low, high, zero + tl.cast(stream, tl.uint32), zero)


@triton.jit
def not_dropped(seed_ptr, layer, rows, units, UNITS: tl.constexpr, THRESHOLD: tl.constexpr):
    """Which units dropout keeps: each 128 bits decide for 8 units, one every eighth of a layer, by 16 bits."""
    BLOCKS: tl.constexpr = blocks_of(UNITS, 8)
    position = rows.to(tl.int64)[:, None] * BLOCKS + (units % BLOCKS)[None, :]
    first, second, third, fourth = philox(seed_ptr, position, layer)
    half = (units // BLOCKS)[None, :]
    word = tl.where(half < 2, first, tl.where(half < 4, second, tl.where(half < 6, third, fourth)))
    return ((word >> (16 * (half % 2)).to(tl.uint32)) & 0xFFFF) < THRESHOLD


@triton.jit
def sine_and_cosine(turns):
    """Of 2 pi times `turns` in [0, 1): power series in the eighth of a turn around the nearest axis."""
    quarter = tl.floor(4 * turns + 0.5)
    angle = (turns - 0.25 * quarter) * TWO_PI
    square = angle * angle
    sine = angle * (1 + square * (-1 / 6 + square * (1 / 120 + square * (-1 / 5040 + square * (1 / 362880)))))
    cosine = 1 + square * (
        -1 / 2 + square * (1 / 24 + square * (-1 / 720 + square * (1 / 40320 - square * (1 / 3628800))))
    )
    axis = quarter.to(tl.int32) % 4
    swap, minus = axis % 2 == 1, axis >= 2
    turned_sine, turned_cosine = tl.where(swap, cosine, sine), tl.where(swap, -sine, cosine)
    return tl.where(minus, -turned_sine, turned_sine), tl.where(minus, -turned_cosine, turned_cosine)


@triton.jit
def normals(seed_ptr, rows, latent, R: tl.constexpr, ACC: tl.constexpr):
    """Two independent standard normals for each token and latent entry (Box and Muller, 1958)."""
    first, second, _, _ = philox(seed_ptr, rows.to(tl.int64)[:, None] * R + latent[None, :], NOISE)
    radius = tl.sqrt(-2 * tl.log((first.to(ACC) + 0.5) * TO_UNIT))
    sine, cosine = sine_and_cosine(second.to(ACC) * TO_UNIT)
    return radius * cosine, radius * sine


@triton.jit
def noises(noise, noise_strides, seed_ptr, rows, latent, inside, R: tl.constexpr, ACC: tl.constexpr):
    """Of both sides: what was given, else made from the seed."""
    first_ptr, second_ptr = noise
    first_strides, second_strides = noise_strides
    if first_ptr is None or second_ptr is None:
        first, second = normals(seed_ptr, rows, latent, R, ACC)
    if first_ptr is not None:
        first = tl.load(tile(first_ptr, rows, latent, first_strides), mask=inside, other=0).to(ACC)
    if second_ptr is not None:
        second = tl.load(tile(second_ptr, rows, latent, second_strides), mask=inside, other=0).to(ACC)
    return first, second


@triton.jit
def standard_deviation(logvar):
    return tl.exp(0.5 * clamped(logvar))
