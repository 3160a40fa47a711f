"""layer, backward by features: grad_x and the gradients of all parameters.   Mathematics: reference.layer

    grad_O = c.nll / t (r^T g)      grad_t = c.nll / t sum of (1 - r^2)      grad_x = G W - c.nll r / t
    grad_W = G^T x                  grad_B = s grad_y^T z_1                  r = (x_hat - x) / t

where g is the input of the decoder's output layer, and G the gradients of the outputs of the layers that read x.
One launch runs four kinds of programs. Each program walks over one chunk of tokens and owns its sums:

    x_features       a tile of features of x: grad_x, the layers that read x, the output layer, t
    y_features       a tile of features of y: B
    encoder_tile     a weight tile of a later encoder layer, or the bias of a first one
    decoder_rows     rows of a decoder hidden layer, whose inputs and gradients are recomputed

`layer_reduce_kernel` (sums) adds the chunks up in a fixed order.
"""

# mypy: allow-untyped-defs, disable-error-code="assignment, misc, var-annotated"
# ruff: noqa: RUF005  (Triton adds tuples; it cannot unpack them)

from typing import NamedTuple

import triton
import triton.language as tl

from .._common import tile
from .arguments import decoder_inputs, first_units, state_width, width_of
from .forward import reading
from .networks import (
    add_bias,
    add_grad_products,
    add_products,
    decode,
    grad_activate,
    grad_linear,
    load_columns,
    product,
    residual,
    sliced,
)
from .objective import bounds_of, counting, nll_coefficient, samples, token_share
from .sums import add_to_sums, rows_of, store_sums, tiles_of


class Made(NamedTuple):
    """Gradients that a program over features of x computes: one kind computes all, or three kinds share them."""

    x: tuple[bool, ...]
    encoders: tuple[bool, ...]
    decoder: tuple[bool, ...]
    scale: tuple[bool, ...]


class EncoderTiles(NamedTuple):
    """For each layer of both encoders: its first program, and its operands. 0 inputs if the layer reads x."""

    first_program: tuple[int, ...]
    column: tuple[int, ...]  # of its outputs in the state
    outputs: tuple[int, ...]
    input_column: tuple[int, ...]
    inputs: tuple[int, ...]


@triton.jit
def encoder_linear(encoder, i: tl.constexpr, S: tl.constexpr):
    """The i-th layer of an encoder; mean and logvar follow the hidden layers."""
    if i < len(S.encoder):
        return encoder.hidden[i]
    elif i == len(S.encoder):  # noqa: RET505  (only one branch is compiled)
        return encoder.mean
    else:
        return encoder.logvar


@triton.jit
def x_features(
    layer, grad_state_ptr, inputs_ptr, grad_x_ptr, parts_ptr, places, c_nll, cols, N, D, MADE: tl.constexpr,
    KIND: tl.constexpr, THROUGH_TARGET: tl.constexpr, S: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """A tile of features of x: grad_x, and the gradients of the weights that read x or give x_hat, as MADE says."""
    linears, grad_places, output = reading(layer.networks, S), reading(places, S), layer.networks.decoder.output
    P: tl.constexpr = output.weight.dtype.element_ty
    UNITS: tl.constexpr = first_units(S)
    G: tl.constexpr = decoder_inputs(S, len(S.decoder))
    NEEDS_X: tl.constexpr = MADE.x[KIND]
    NEEDS_ENCODERS: tl.constexpr = MADE.encoders[KIND]
    NEEDS_DECODER: tl.constexpr = MADE.decoder[KIND]
    NEEDS_SCALE: tl.constexpr = MADE.scale[KIND]
    outs, ins = tl.arange(0, width_of(UNITS)), tl.arange(0, width_of(G))
    grad_out = tl.zeros((cols.shape[0], width_of(G)), S.acc)
    grad_bias, grad_scale = tl.zeros((BLOCK_N, cols.shape[0]), S.acc), tl.zeros((BLOCK_N, cols.shape[0]), S.acc)
    grad_reading = ()
    for _i in tl.static_range(len(linears)):
        grad_reading = grad_reading + (tl.zeros((width_of(UNITS), cols.shape[0]), S.acc),)
    for block in range(tl.program_id(1), tl.cdiv(N, BLOCK_N), tl.num_programs(1)):
        rows, inside = rows_of(block, N, BLOCK_N)
        keep = counting(layer, rows, N, S)
        in_x, counts = inside[:, None] & (cols < D)[None, :], keep[:, None] & (cols < D)[None, :]
        x = tl.load(tile(layer.x, rows, cols, (layer.x_stride, 1)), mask=in_x, other=0)
        grad_x = tl.zeros((BLOCK_N, cols.shape[0]), S.acc)
        if NEEDS_DECODER or NEEDS_SCALE or (NEEDS_X and THROUGH_TARGET):
            # 1. Recompute r of this block
            g = load_columns(inputs_ptr, G, rows, inside, 0, G)
            x_hat = add_products(grad_x, g, output.weight, G, cols, cols < D, G, S, BLOCK_K)
            x_hat = add_bias(x_hat, output.bias, cols, cols < D)
            r, inverse = residual(x_hat, x.to(S.acc), layer.networks.decoder.scale, cols, counts, D)
            if NEEDS_DECODER:
                grad_out = product(tl.trans(r.to(P)), g.to(P), grad_out, S)
                grad_bias += r
            if NEEDS_SCALE:
                grad_scale += tl.where(counts, 1 - r * r, 0.0)
            if NEEDS_X and THROUGH_TARGET:
                grad_x -= c_nll * r * inverse[None, :]
        # 2. The layers that read x
        if NEEDS_ENCODERS or NEEDS_X:
            added = ()
            for i in tl.static_range(len(linears)):
                grad = load_columns(grad_state_ptr, state_width(S), rows, inside, i * UNITS, UNITS)
                of_weight = grad_reading[i]
                if NEEDS_ENCODERS:
                    of_weight = product(tl.trans(grad.to(P)), x.to(P), of_weight, S)
                added = added + (of_weight,)
                if NEEDS_X:
                    grad_x = add_grad_products(grad_x, grad, linears[i].weight, D, cols, cols < D, UNITS, S, BLOCK_K)
            grad_reading = added
        if NEEDS_X:
            tl.store(tile(grad_x_ptr, rows, cols, (D, 1)), grad_x.to(grad_x_ptr.dtype.element_ty), mask=in_x)
    # 3. Store
    if NEEDS_ENCODERS:
        for i in tl.static_range(len(linears)):
            store_sums(parts_ptr + grad_places[i].weight, grad_reading[i], outs, 0, cols, UNITS, D, D)
    if NEEDS_DECODER or NEEDS_SCALE:
        factor = c_nll / tl.load(layer.networks.decoder.scale + cols, mask=cols < D, other=1).to(S.acc)
    if NEEDS_DECODER:
        to = places.decoder.output
        store_sums(parts_ptr + to.weight, grad_out * factor[:, None], cols, 0, ins, D, G, G)
        tl.store(parts_ptr + to.bias + cols, tl.sum(grad_bias, 0) * factor, mask=cols < D)
    if NEEDS_SCALE:
        tl.store(parts_ptr + places.decoder.scale + cols, tl.sum(grad_scale, 0) * factor, mask=cols < D)


@triton.jit
def y_features(
    layer, grad_y_ptr, grad_y_stride, state_ptr, parts_ptr, scaling, bounds, cols, N, M, S: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """A tile of features of y: the gradient of B."""
    P: tl.constexpr = layer.networks.B.dtype.element_ty
    ins = tl.arange(0, width_of(S.R))
    sums = tl.zeros((cols.shape[0], width_of(S.R)), S.acc)
    for block in range(tl.program_id(1), tl.cdiv(N, BLOCK_N), tl.num_programs(1)):
        rows, inside = rows_of(block, N, BLOCK_N)
        z1, _z2 = samples(state_ptr, layer, bounds, rows, inside, S, state_width(S))
        in_y = inside[:, None] & (cols < M)[None, :]
        grad_y = tl.load(tile(grad_y_ptr, rows, cols, (grad_y_stride, 1)), mask=in_y, other=0)
        sums = product(tl.trans(grad_y.to(P)), z1.to(P), sums, S)
    store_sums(parts_ptr, tl.full((), scaling, S.acc) * sums, cols, 0, ins, M, S.R, S.R)


@triton.jit
def encoder_tile(
    program, layer, grad_state_ptr, state_ptr, parts_ptr, places, N, TILES: tl.constexpr, S: tl.constexpr,
    BLOCK_N: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    """Weight-gradient tile G^T h of a later encoder layer, or the bias gradient of a first one."""
    P: tl.constexpr = layer.networks.B.dtype.element_ty
    WIDTH: tl.constexpr = state_width(S)
    # 1. The layer and the tile
    start, out, outs, at, inputs, to_w, to_b = program, 0, 0, 0, 0, 0, 0
    LAYERS: tl.constexpr = len(S.encoder) + 2
    for i in tl.static_range(2 * LAYERS):
        encoder = places.encoder1 if i < LAYERS else places.encoder2
        to = encoder_linear(encoder, i % LAYERS, S)
        here = program >= tl.constexpr(TILES.first_program[i])
        start = tl.where(here, program - tl.constexpr(TILES.first_program[i]), start)
        out = tl.where(here, tl.constexpr(TILES.column[i]), out)
        outs = tl.where(here, tl.constexpr(TILES.outputs[i]), outs)
        at = tl.where(here, tl.constexpr(TILES.input_column[i]), at)
        inputs = tl.where(here, tl.constexpr(TILES.inputs[i]), inputs)
        to_w, to_b = tl.where(here, to.weight, to_w), tl.where(here, to.bias, to_b)
    across = tl.maximum(tl.cdiv(inputs, T), 1)
    rows_out, cols_in = start // across * T + tl.arange(0, T), start % across * T + tl.arange(0, T)
    # 2. The sums over the chunk
    sums, grad_bias = tl.zeros((T, T), S.acc), tl.zeros((T,), S.acc)
    for block in range(tl.program_id(1), tl.cdiv(N, BLOCK_N), tl.num_programs(1)):
        rows, inside = rows_of(block, N, BLOCK_N)
        in_grad, in_h = inside[:, None] & (rows_out < outs)[None, :], inside[:, None] & (cols_in < inputs)[None, :]
        grad = tl.load(tile(grad_state_ptr, rows, out + rows_out, (WIDTH, 1)), mask=in_grad, other=0)
        h = tl.load(tile(state_ptr, rows, at + cols_in, (WIDTH, 1)), mask=in_h, other=0)
        sums = product(tl.trans(grad.to(P)), h.to(P), sums, S)
        grad_bias += tl.sum(grad, 0)
    store_sums(parts_ptr + to_w, sums, rows_out, 0, cols_in, outs, inputs, inputs)
    tl.store(parts_ptr + to_b + rows_out, grad_bias, mask=rows_out < tl.where(start % across == 0, outs, 0))


@triton.jit
def decoder_rows(
    layer, number: tl.constexpr, first, state_ptr, grad_hidden_ptr, parts_ptr, to, c_nll, bounds, N, S: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    """T rows, from `first` on, of the weight gradient G^T h of the decoder's hidden layer `number`."""
    P: tl.constexpr = layer.networks.B.dtype.element_ty
    LAST: tl.constexpr = len(S.decoder) - 1
    UNITS: tl.constexpr = S.decoder[number]
    INPUTS: tl.constexpr = decoder_inputs(S, number)
    PARTS: tl.constexpr = 1 if number > 0 or S.average else 2
    SIZE: tl.constexpr = INPUTS // PARTS
    outs, ins = first + tl.arange(0, T), tl.arange(0, width_of(SIZE))
    IN_MEMORY: tl.constexpr = PARTS == 2 and width_of(SIZE) > 128  # else the sums would fill registers
    sums, grad_bias = (), tl.zeros((T,), S.acc)
    for _i in tl.static_range(0 if IN_MEMORY else PARTS):
        sums = sums + (tl.zeros((T, width_of(SIZE)), S.acc),)
    # values that do not change with the block are not computed before the loop: they would fill registers
    for block in tl.range(tl.program_id(1), tl.cdiv(N, BLOCK_N), tl.num_programs(1), disable_licm=True):
        # 1. The decoder up to its last hidden layer, whose gradient is loaded
        rows, inside = rows_of(block, N, BLOCK_N)
        z1, z2 = samples(state_ptr, layer, bounds, rows, inside, S, state_width(S))
        h = decode(z1, z2, layer, rows, LAST, S, BLOCK_K)
        # 2. Back to this layer
        if number == LAST:
            in_grad = inside[:, None] & (outs < UNITS)[None, :]
            grad = tl.load(tile(grad_hidden_ptr, rows, outs, (UNITS, 1)), mask=in_grad, other=0)
        else:
            activated = sliced(h[number], first, T)  # taken now: all of h would fill registers until its use
            of_layer = load_columns(grad_hidden_ptr, S.decoder[LAST], rows, inside, 0, S.decoder[LAST])
            for i in tl.static_range(LAST, number + 1, -1):
                weight = layer.networks.decoder.hidden[i].weight
                of_layer = grad_linear(of_layer, weight, S.decoder[i - 1], S.decoder[i - 1], S.decoder[i], S, BLOCK_K)
                of_layer = grad_activate(of_layer, h[i - 1], S)
            after = layer.networks.decoder.hidden[number + 1].weight
            grad = tl.zeros((BLOCK_N, T), S.acc)
            grad = add_grad_products(
                grad, of_layer, after, UNITS, outs, outs < UNITS, S.decoder[number + 1], S, BLOCK_K
            )
            grad = grad_activate(grad, activated, S)
        # 3. G^T h
        if number > 0:
            inputs = (h[number - 1],)
        else:
            tl.debug_barrier()  # make the latents again: kept, they would fill registers
            z1, z2 = samples(state_ptr, layer, bounds, rows, inside, S, state_width(S))
            inputs = ((z1 + z2) / 2,) if S.average else (z1, z2)
        if IN_MEMORY:
            for i in tl.static_range(PARTS):
                of_block = product(tl.trans(grad.to(P)), inputs[i].to(P), tl.zeros((T, width_of(SIZE)), S.acc), S)
                add_to_sums(
                    parts_ptr + to.weight, c_nll * of_block, outs, i * SIZE, ins, UNITS, SIZE, INPUTS,
                    block == tl.program_id(1),
                )  # fmt: skip
        else:
            added = ()
            for i in tl.static_range(PARTS):
                added = added + (product(tl.trans(grad.to(P)), inputs[i].to(P), sums[i], S),)
            sums = added
        grad_bias += tl.sum(tl.where(inside[:, None], grad, 0.0), 0)
    for i in tl.static_range(0 if IN_MEMORY else PARTS):
        store_sums(parts_ptr + to.weight, c_nll * sums[i], outs, i * SIZE, ins, UNITS, SIZE, INPUTS)
    tl.store(parts_ptr + to.bias + outs, c_nll * grad_bias, mask=outs < UNITS)


@triton.jit(do_not_specialize=["N"])
def layer_grads_kernel(
    layer,  # Layer
    grad_y_ptr,  # [N, M] or None
    grad_y_stride,
    term_grads,  # TermGrads of pointers
    state_ptr,  # [N, state_width], as the next
    grad_state_ptr,
    inputs_ptr,  # [N, inputs of the output layer] or None, as the next
    grad_hidden_ptr,  # [N, last hidden layer of the decoder]
    grad_x_ptr,  # [N, D] or None
    parts_ptr,  # [chunks, length]: partial gradients of all parameters that need one
    places,  # Networks: offset of each parameter in a row of parts; a missing bias has an offset too
    length,
    recon_weight: tl.float64,
    scaling: tl.float64,
    logvar1_low: tl.float64,
    logvar1_high: tl.float64,
    N,
    D,
    M,
    S: tl.constexpr,  # Sizes
    NEEDS: tl.constexpr,  # Needs
    MADE: tl.constexpr,  # Made
    TILES: tl.constexpr,  # EncoderTiles
    ENCODER_PROGRAMS: tl.constexpr,
    THROUGH_TARGET: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    program = tl.program_id(0)
    parts_ptr += tl.program_id(1).to(tl.int64) * length
    bounds = bounds_of(logvar1_low, logvar1_high, S)
    c_nll = nll_coefficient(token_share(term_grads, layer.kept, N, S), recon_weight)
    first_y = tl.cdiv(D, BLOCK_D) * len(MADE.x)
    first_encoder = first_y + (tl.cdiv(M, BLOCK_D) if NEEDS.B else 0)
    first_decoder = first_encoder + ENCODER_PROGRAMS
    if program < first_y:
        for i in tl.static_range(len(MADE.x)):
            if program % len(MADE.x) == i:
                cols = program // len(MADE.x) * BLOCK_D + tl.arange(0, BLOCK_D)
                x_features(
                    layer, grad_state_ptr, inputs_ptr, grad_x_ptr, parts_ptr, places, c_nll, cols, N, D,
                    MADE, i, THROUGH_TARGET, S, BLOCK_N, BLOCK_K,
                )  # fmt: skip
    elif program < first_encoder:
        if NEEDS.B:
            cols = (program - first_y) * BLOCK_D + tl.arange(0, BLOCK_D)
            y_features(
                layer, grad_y_ptr, grad_y_stride, state_ptr, parts_ptr + places.B, scaling, bounds, cols, N, M, S,
                BLOCK_N,
            )  # fmt: skip
    elif program < first_decoder:
        if NEEDS.encoders:
            encoder_tile(
                program - first_encoder, layer, grad_state_ptr, state_ptr, parts_ptr, places, N, TILES, S, BLOCK_N,
                BLOCK_D,
            )  # fmt: skip
    else:
        first = (program - first_decoder) * BLOCK_D
        if NEEDS.decoder:
            for number in tl.static_range(len(S.decoder)):
                if (first >= 0) & (first < tiles_of(S.decoder[number], BLOCK_D) * BLOCK_D):
                    decoder_rows(
                        layer, number, first, state_ptr, grad_hidden_ptr, parts_ptr, places.decoder.hidden[number],
                        c_nll, bounds, N, S, BLOCK_N, BLOCK_K, min(BLOCK_D, width_of(S.decoder[number])),
                    )  # fmt: skip
                first -= tiles_of(S.decoder[number], BLOCK_D) * BLOCK_D
