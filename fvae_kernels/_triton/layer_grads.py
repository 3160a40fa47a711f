"""layer, backward, over features: grad_x and the gradients of all parameters.   Mathematics: reference.layer

    grad_O = c / t (r^T g)      grad_x = G W - c r / t      grad_W = G^T x      grad_B = s grad_y^T z_1

where G are the gradients of the encoders' first layers. One launch of four kinds of programs, each of which walks over
a chunk of the tokens and owns its sums: tiles of the features of x; tiles of those of y, for B; tiles of the encoders'
later layers; tiles of the decoder's hidden layers, which make their inputs and gradients once more. A last launch adds
the chunks, in a fixed order.
"""

# mypy: allow-untyped-defs

import triton
import triton.language as tl

from ._common import Table, counting, product, tile, tokens
from ._layer_common import (
    NLL,
    add_bias,
    add_grad_products,
    add_products,
    coefficient,
    decode,
    grad_activate,
    grad_linear,
    inputs_of,
    latents,
    load_columns,
    residual,
    sliced,
    width_of,
)

PROGRAMS = 264  # about as many: the chunks of tokens are as many as that leaves

TABLE: Table = {
    (2, True): {"BLOCK_N": 16, "BLOCK_D": 32, "BLOCK_K": 32, "num_warps": 8, "num_stages": 1},
    (2, False): {"BLOCK_N": 16, "BLOCK_D": 32, "BLOCK_K": 32, "num_warps": 8, "num_stages": 1},
    (4, True): {"BLOCK_N": 16, "BLOCK_D": 32, "BLOCK_K": 16, "num_warps": 8, "num_stages": 2},
    (4, False): {"BLOCK_N": 16, "BLOCK_D": 32, "BLOCK_K": 16, "num_warps": 8, "num_stages": 2},
    (8, True): {"BLOCK_N": 16, "BLOCK_D": 16, "BLOCK_K": 16, "num_warps": 4, "num_stages": 1},
    (8, False): {"BLOCK_N": 16, "BLOCK_D": 16, "BLOCK_K": 16, "num_warps": 4, "num_stages": 1},
}


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
def feature_sums(
    layer,
    grad_state_ptr,
    g_ptr,
    grad_x_ptr,
    parts_ptr,
    to,
    c,
    cols,
    N,
    D,
    G: tl.constexpr,
    FIRST: tl.constexpr,
    NEEDS: tl.constexpr,
    THROUGH_TARGET: tl.constexpr,
    WIDTH: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """A tile of the features of x: their grad_x, and the gradients of the weights that read or make them."""
    decoder, encoders, scale = layer.decoder, layer.encoders, layer.scale
    output = decoder[len(decoder) - 1]
    P: tl.constexpr = output[0].dtype.element_ty
    LAYERS: tl.constexpr = len(to[0]) // 2
    outs, ins = tl.arange(0, width_of(FIRST)), tl.arange(0, width_of(G))
    grad_out, grad_bias = tl.zeros((cols.shape[0], width_of(G)), ACC), tl.zeros((cols.shape[0],), ACC)
    grad_firsts = ()
    for i in tl.static_range(len(to[0])):
        grad_firsts = grad_firsts + (tl.zeros((width_of(FIRST), cols.shape[0]), ACC),)
    for block in range(tl.program_id(1), tl.cdiv(N, BLOCK_N), tl.num_programs(1)):
        rows, inside = rows_of(block, N, BLOCK_N)
        keep = counting(layer.mask, layer.mask_strides, rows, N)
        in_x, counts = inside[:, None] & (cols < D)[None, :], keep[:, None] & (cols < D)[None, :]
        x = tl.load(tile(layer.x, rows, cols, layer.x_strides), mask=in_x, other=0)
        grad_x = tl.zeros((BLOCK_N, cols.shape[0]), ACC)
        if g_ptr is not None:
            # 1. r of this block, once more
            g = load_columns(g_ptr, G, rows, inside, 0, G)
            x_hat = add_products(grad_x, g, output, 0, cols, cols < D, G, PRECISION, BLOCK_K)
            r, inverse = residual(add_bias(x_hat, output, cols, cols < D), x.to(ACC), scale, cols, counts, D)
            if NEEDS[2]:
                grad_out = product(tl.trans(r.to(P)), g.to(P), grad_out, PRECISION)
                grad_bias += tl.sum(r, 0)
            if THROUGH_TARGET:
                grad_x -= c * r * inverse[None, :]
        # 2. What reads x
        added = ()
        for i in tl.static_range(len(to[0])):
            first = encoders[i // LAYERS][i % LAYERS]
            grad = load_columns(grad_state_ptr, WIDTH, rows, inside, i * FIRST, FIRST)
            of_weight = grad_firsts[i]
            if NEEDS[1]:
                of_weight = product(tl.trans(grad.to(P)), x.to(P), of_weight, PRECISION)
            added = added + (of_weight,)
            if NEEDS[0]:
                grad_x = add_grad_products(grad_x, grad, first, cols, cols < D, FIRST, PRECISION, BLOCK_K)
        grad_firsts = added
        if NEEDS[0]:
            tl.store(tile(grad_x_ptr, rows, cols, (D, 1)), grad_x.to(grad_x_ptr.dtype.element_ty), mask=in_x)
    # 3. Store
    if NEEDS[1]:
        for i in tl.static_range(len(to[0])):
            store_sums(parts_ptr + to[0][i], grad_firsts[i], outs, 0, cols, FIRST, D, D)
    if NEEDS[2]:
        factor = c / tl.load(scale[0] + cols * scale[1][0], mask=cols < D, other=1).to(ACC)
        to_w, to_b = to[1][len(decoder) - 1]
        store_sums(parts_ptr + to_w, grad_out * factor[:, None], cols, 0, ins, D, G, G)
        if output[1] is not None:
            tl.store(parts_ptr + to_b + cols, grad_bias * factor, mask=cols < D)


@triton.jit
def up_sums(
    layer,
    grad_y_ptr,
    grad_y_strides,
    state_ptr,
    parts_ptr,
    scaling,
    cols,
    N,
    M,
    WIDTH: tl.constexpr,
    ENCODER: tl.constexpr,
    R: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """A tile of the features of y: the gradient of B."""
    P: tl.constexpr = layer.up[0].dtype.element_ty
    ins = tl.arange(0, width_of(R))
    sums = tl.zeros((cols.shape[0], width_of(R)), ACC)
    for block in range(tl.program_id(1), tl.cdiv(N, BLOCK_N), tl.num_programs(1)):
        rows, inside = rows_of(block, N, BLOCK_N)
        latent1, latent2 = latents(
            state_ptr, layer.noise, layer.noise_strides, layer.seed, rows, inside, WIDTH, ENCODER, R, ACC
        )
        in_y = inside[:, None] & (cols < M)[None, :]
        grad_y = tl.load(tile(grad_y_ptr, rows, cols, grad_y_strides), mask=in_y, other=0)
        sums = product(tl.trans(grad_y.to(P)), latent1[4].to(P), sums, PRECISION)
    store_sums(parts_ptr, tl.full((), scaling, ACC) * sums, cols, 0, ins, M, R, R)


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
    l: tl.constexpr,
    first,
    state_ptr,
    grad_hidden_ptr,
    parts_ptr,
    to_w,
    to_b,
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
    """T rows, from `first` on, of the weight of the decoder's l-th hidden layer."""
    decoder = layer.decoder
    P: tl.constexpr = decoder[l][0].dtype.element_ty
    LAST: tl.constexpr = len(DECODER) - 1
    SIZE: tl.constexpr = inputs_of(DECODER, l, R)
    PARTS: tl.constexpr = 1 if l > 0 or AVERAGE else 2
    outs, ins = first + tl.arange(0, T), tl.arange(0, width_of(SIZE))
    sums, grad_bias = (), tl.zeros((T,), ACC)
    for i in tl.static_range(PARTS):
        sums = sums + (tl.zeros((T, width_of(SIZE)), ACC),)
    for block in range(tl.program_id(1), tl.cdiv(N, BLOCK_N), tl.num_programs(1)):
        # 1. The decoder up to its last hidden layer, whose gradient is there
        rows, inside = rows_of(block, N, BLOCK_N)
        latent1, latent2 = latents(
            state_ptr, layer.noise, layer.noise_strides, layer.seed, rows, inside, WIDTH, ENCODER, R, ACC
        )
        z1, z2 = latent1[4], latent2[4]
        h = decode(
            z1, z2, decoder, layer.seed, rows, LAST, len(ENCODER), AVERAGE, DECODER, R, THRESHOLD, PRECISION, BLOCK_K
        )
        # 2. Back to this layer
        if l == LAST:
            in_grad = inside[:, None] & (outs < DECODER[l])[None, :]
            grad = tl.load(tile(grad_hidden_ptr, rows, outs, (DECODER[l], 1)), mask=in_grad, other=0)
        else:
            of_layer = load_columns(grad_hidden_ptr, DECODER[LAST], rows, inside, 0, DECODER[LAST])
            for i in tl.static_range(LAST, l + 1, -1):
                of_layer = grad_linear(of_layer, decoder[i], 0, DECODER[i - 1], DECODER[i], PRECISION, BLOCK_K)
                of_layer = grad_activate(of_layer, h[i - 1], THRESHOLD)
            grad = tl.zeros((BLOCK_N, T), ACC)
            grad = add_grad_products(
                grad, of_layer, decoder[l + 1], outs, outs < DECODER[l], DECODER[l + 1], PRECISION, BLOCK_K
            )
            grad = grad_activate(grad, sliced(h[l], first, T), THRESHOLD)
        # 3. G^T h
        inputs = (h[l - 1],) if l > 0 else (((z1 + z2) / 2,) if AVERAGE else (z1, z2))
        added = ()
        for i in tl.static_range(PARTS):
            added = added + (product(tl.trans(grad.to(P)), inputs[i].to(P), sums[i], PRECISION),)
        sums = added
        grad_bias += tl.sum(tl.where(inside[:, None], grad, 0.0), 0)
    for i in tl.static_range(PARTS):
        store_sums(parts_ptr + to_w, c * sums[i], outs, i * SIZE, ins, DECODER[l], SIZE, PARTS * SIZE)
    if decoder[l][1] is not None:
        tl.store(parts_ptr + to_b + outs, c * grad_bias, mask=outs < DECODER[l])


@triton.jit
def layer_grads_kernel(
    grad_y_ptr,  # [N, M] or None
    grad_y_strides,
    grads,  # pointers to those of loss, nll, kl and gamma, [] or None
    table,  # the weights of the statistics in loss, kl and gamma
    layer,  # from x to the seed as in layer_fwd_kernel
    kept_ptr,  # int64 [] or None
    state_ptr,  # [N, WIDTH], as the one that follows
    grad_state_ptr,
    g_ptr,  # [N, G] or None, as the one that follows
    grad_hidden_ptr,  # [N, last hidden layer]
    unit_grad_scale_ptr,  # [D]
    grad_x_ptr,  # [N, D] or None
    parts_ptr,  # [chunks, length]: sums of the gradients of all parameters that need one
    to,  # where in them those of the layers that read x, of the decoder, scale, B and the encoders' later layers are
    counts,  # of the four kinds of programs
    length,
    scaling: tl.float64,
    N,
    D,
    M,
    G: tl.constexpr,
    FIRST: tl.constexpr,  # outputs of a layer that reads x
    LATER: tl.constexpr,  # of each later layer of an encoder: first program, columns and inputs in the state
    NEEDS: tl.constexpr,
    THROUGH_TARGET: tl.constexpr,
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
    program = tl.program_id(0)
    parts_ptr += tl.program_id(1).to(tl.int64) * length
    c = coefficient(grads, table, kept_ptr, N, NLL, ACC)
    if program < counts[0]:
        cols = program * BLOCK_D + tl.arange(0, BLOCK_D)
        if NEEDS[0] or NEEDS[1] or NEEDS[2]:
            feature_sums(
                layer, grad_state_ptr, g_ptr, grad_x_ptr, parts_ptr, to, c, cols, N, D, G, FIRST, NEEDS,
                THROUGH_TARGET, WIDTH, ACC, PRECISION, BLOCK_N, BLOCK_K,
            )  # fmt: skip
        if NEEDS[3]:
            unit = tl.load(unit_grad_scale_ptr + cols, mask=cols < D, other=0).to(ACC)
            of_scale = tl.where(tl.program_id(1) == 0, unit * c * tl.maximum(tokens(kept_ptr, N, ACC), 1.0), 0.0)
            tl.store(parts_ptr + to[2] + cols, of_scale, mask=cols < D)
    elif program < counts[0] + counts[1]:
        if NEEDS[4]:
            cols = (program - counts[0]) * BLOCK_D + tl.arange(0, BLOCK_D)
            up_sums(
                layer, grad_y_ptr, grad_y_strides, state_ptr, parts_ptr + to[3], scaling, cols, N, M, WIDTH, ENCODER,
                R, ACC, PRECISION, BLOCK_N,
            )  # fmt: skip
    elif program < counts[0] + counts[1] + counts[2]:
        if NEEDS[1]:
            later_sums(
                program - counts[0] - counts[1], layer.up[0].dtype.element_ty, grad_state_ptr, state_ptr, parts_ptr,
                to[4], N, LATER, WIDTH, ACC, PRECISION, BLOCK_N, BLOCK_D,
            )  # fmt: skip
    else:
        first = (program - counts[0] - counts[1] - counts[2]) * BLOCK_D
        if NEEDS[2]:
            for l in tl.static_range(len(DECODER)):
                if (first >= 0) & (first < tl.cdiv(DECODER[l], BLOCK_D) * BLOCK_D):
                    hidden_sums(
                        layer, l, first, state_ptr, grad_hidden_ptr, parts_ptr, to[1][l][0], to[1][l][1], c, N, WIDTH,
                        AVERAGE, ENCODER, DECODER, R, THRESHOLD, ACC, PRECISION, BLOCK_N, BLOCK_K, BLOCK_D,
                    )  # fmt: skip
                first -= tl.cdiv(DECODER[l], BLOCK_D) * BLOCK_D

