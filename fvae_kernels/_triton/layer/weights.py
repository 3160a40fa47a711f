"""The programs of layer_grads_kernel that make the gradients of small weights: G^T h, over a chunk of tokens."""

# mypy: allow-untyped-defs, disable-error-code="assignment, misc, var-annotated"
# ruff: noqa: RUF005  (Triton adds tuples; it cannot unpack them)

import triton
import triton.language as tl

from .._common import product, tile
from .networks import (
    add_grad_products,
    decode,
    grad_activate,
    grad_linear,
    inputs_of,
    load_columns,
    samples,
    sliced,
    width_of,
)


@triton.jit
def rows_of(block, N, BLOCK_N: tl.constexpr):
    rows = tl.cast(block, tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    return rows, rows < N


@triton.jit
def store_sums(parts_ptr, sums, rows, first, cols, ROWS, COLS, stride):
    """The tile [rows, cols] of the sums of a parameter with rows of `stride` entries; its columns start at `first`."""
    inside = (rows < ROWS)[:, None] & (cols < COLS)[None, :]
    tl.store(tile(parts_ptr, rows, first + cols, (stride, 1)), sums, mask=inside)


@triton.jit
def later_sums(
    program,
    P: tl.constexpr,
    grad_state_ptr,
    state_ptr,
    parts_ptr,
    to,
    N,
    LATER: tl.constexpr,
    WIDTH: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    T: tl.constexpr,
):
    """A tile of a layer of an encoder that does not read x, or of the bias of one that does: G^T h."""
    # 1. Which
    start, out, outs, at, inputs, to_w, to_b = program, 0, 0, 0, 0, 0, 0
    for i in tl.static_range(len(LATER)):
        here = program >= LATER[i][0]
        start = tl.where(here, program - LATER[i][0], start)
        out, outs = tl.where(here, LATER[i][1], out), tl.where(here, LATER[i][2], outs)
        at, inputs = tl.where(here, LATER[i][3], at), tl.where(here, LATER[i][4], inputs)
        to_w, to_b = tl.where(here, to[i][0], to_w), tl.where(here, to[i][1], to_b)
    across = tl.maximum(tl.cdiv(inputs, T), 1)
    rows_out, cols_in = start // across * T + tl.arange(0, T), start % across * T + tl.arange(0, T)
    # 2. Its sums
    sums, grad_bias = tl.zeros((T, T), ACC), tl.zeros((T,), ACC)
    for block in range(tl.program_id(1), tl.cdiv(N, BLOCK_N), tl.num_programs(1)):
        rows, inside = rows_of(block, N, BLOCK_N)
        in_grad, in_h = inside[:, None] & (rows_out < outs)[None, :], inside[:, None] & (cols_in < inputs)[None, :]
        grad = tl.load(tile(grad_state_ptr, rows, out + rows_out, (WIDTH, 1)), mask=in_grad, other=0)
        h = tl.load(tile(state_ptr, rows, at + cols_in, (WIDTH, 1)), mask=in_h, other=0)
        sums = product(tl.trans(grad.to(P)), h.to(P), sums, PRECISION)
        grad_bias += tl.sum(grad, 0)
    store_sums(parts_ptr + to_w, sums, rows_out, 0, cols_in, outs, inputs, inputs)
    has_bias = tl.where(start % across == 0, to_b, -1) >= 0
    tl.store(parts_ptr + to_b + rows_out, grad_bias, mask=rows_out < tl.where(has_bias, outs, 0))


@triton.jit
def hidden_sums(
    layer,
    number: tl.constexpr,
    first,
    state_ptr,
    grad_hidden_ptr,
    parts_ptr,
    to,
    c,
    N,
    WIDTH: tl.constexpr,
    AVERAGE: tl.constexpr,
    ENCODER: tl.constexpr,
    DECODER: tl.constexpr,
    R: tl.constexpr,
    THRESHOLD: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    T: tl.constexpr,
):
    """T rows, from `first` on, of the weight of the decoder's hidden layer `number`."""
    decoder = layer.decoder
    P: tl.constexpr = decoder[number][0].dtype.element_ty
    LAST: tl.constexpr = len(DECODER) - 1
    SIZE: tl.constexpr = inputs_of(DECODER, number, R)
    PARTS: tl.constexpr = 1 if number > 0 or AVERAGE else 2
    outs, ins = first + tl.arange(0, T), tl.arange(0, width_of(SIZE))
    sums, grad_bias = (), tl.zeros((T,), ACC)
    for _i in tl.static_range(PARTS):
        sums = sums + (tl.zeros((T, width_of(SIZE)), ACC),)
    # what does not change with the block is not made before the loop, where it would fill registers
    for block in tl.range(tl.program_id(1), tl.cdiv(N, BLOCK_N), tl.num_programs(1), disable_licm=True):
        # 1. The decoder up to its last hidden layer, whose gradient is there
        rows, inside = rows_of(block, N, BLOCK_N)
        z1, z2 = samples(state_ptr, layer.noise, layer.noise_strides, layer.seed, rows, inside, WIDTH, ENCODER, R, ACC)
        h = decode(
            z1, z2, decoder, layer.seed, rows, LAST, len(ENCODER), AVERAGE, DECODER, R, THRESHOLD, PRECISION, BLOCK_K
        )
        # 2. Back to this layer
        if number == LAST:
            in_grad = inside[:, None] & (outs < DECODER[number])[None, :]
            grad = tl.load(tile(grad_hidden_ptr, rows, outs, (DECODER[number], 1)), mask=in_grad, other=0)
        else:
            activated = sliced(h[number], first, T)  # now, for the whole of h would fill registers till it is used
            of_layer = load_columns(grad_hidden_ptr, DECODER[LAST], rows, inside, 0, DECODER[LAST])
            for i in tl.static_range(LAST, number + 1, -1):
                of_layer = grad_linear(of_layer, decoder[i], 0, DECODER[i - 1], DECODER[i], PRECISION, BLOCK_K)
                of_layer = grad_activate(of_layer, h[i - 1], THRESHOLD)
            inside_layer, after = outs < DECODER[number], decoder[number + 1]
            grad = tl.zeros((BLOCK_N, T), ACC)
            grad = add_grad_products(grad, of_layer, after, outs, inside_layer, DECODER[number + 1], PRECISION, BLOCK_K)
            grad = grad_activate(grad, activated, THRESHOLD)
        # 3. G^T h
        if number > 0:
            inputs = (h[number - 1],)
        else:
            tl.debug_barrier()  # the latents once more: kept, they would fill registers till here
            z1, z2 = samples(
                state_ptr, layer.noise, layer.noise_strides, layer.seed, rows, inside, WIDTH, ENCODER, R, ACC
            )
            inputs = ((z1 + z2) / 2,) if AVERAGE else (z1, z2)
        added = ()
        for i in tl.static_range(PARTS):
            added = added + (product(tl.trans(grad.to(P)), inputs[i].to(P), sums[i], PRECISION),)
        sums = added
        grad_bias += tl.sum(tl.where(inside[:, None], grad, 0.0), 0)
    for i in tl.static_range(PARTS):
        store_sums(parts_ptr + to[0], c * sums[i], outs, i * SIZE, ins, DECODER[number], SIZE, PARTS * SIZE)
    if decoder[number][1] is not None:
        tl.store(parts_ptr + to[1] + outs, c * grad_bias, mask=outs < DECODER[number])
