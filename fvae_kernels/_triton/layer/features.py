"""layer, backward, over features: grad_x and the gradients of all parameters.   Mathematics: reference.layer

    grad_O = c / t (r^T g)      grad_t = c / t sum of (1 - r^2)      grad_x = G W - c r / t
    grad_W = G^T x              grad_B = s grad_y^T z_1

where G are the gradients of the encoders' first layers. One launch of four kinds of programs, each of which walks over
a chunk of the tokens and owns its sums: tiles of the features of x; tiles of those of y, for B; tiles of the encoders'
later layers; tiles of the decoder's hidden layers, which make their inputs and gradients once more. A last launch adds
the chunks, in a fixed order.
"""

# mypy: allow-untyped-defs, disable-error-code="assignment, misc, var-annotated"
# ruff: noqa: RUF005  (Triton adds tuples; it cannot unpack them)

import triton
import triton.language as tl

from .._common import Table, counting, product, tile
from .networks import (
    NLL,
    add_bias,
    add_grad_products,
    add_products,
    coefficient,
    load_columns,
    residual,
    samples,
    width_of,
)
from .weights import hidden_sums, later_sums, rows_of, store_sums

BLOCK_L = 128  # gradients that a program of the last launch adds up

PROGRAMS = 264  # about as many: the chunks of tokens are as many as that leaves

TABLE: Table = {
    (2, True): {"BLOCK_N": 16, "BLOCK_D": 32, "BLOCK_K": 32, "num_warps": 8, "num_stages": 1},
    (2, False): {"BLOCK_N": 16, "BLOCK_D": 32, "BLOCK_K": 32, "num_warps": 8, "num_stages": 1},
    (4, True): {"BLOCK_N": 16, "BLOCK_D": 32, "BLOCK_K": 16, "num_warps": 8, "num_stages": 2},
    (4, False): {"BLOCK_N": 16, "BLOCK_D": 32, "BLOCK_K": 16, "num_warps": 8, "num_stages": 2},
    (8, True): {"BLOCK_N": 16, "BLOCK_D": 16, "BLOCK_K": 16, "num_warps": 4, "num_stages": 1},
    (8, False): {"BLOCK_N": 16, "BLOCK_D": 16, "BLOCK_K": 16, "num_warps": 4, "num_stages": 1},
    (2, None): {"BLOCK_N": 16, "BLOCK_D": 16, "BLOCK_K": 16, "num_warps": 8, "num_stages": 1},
    (4, None): {"BLOCK_N": 8, "BLOCK_D": 16, "BLOCK_K": 16, "num_warps": 8, "num_stages": 1},
    (8, None): {"BLOCK_N": 8, "BLOCK_D": 16, "BLOCK_K": 16, "num_warps": 8, "num_stages": 1},
}

AMD: Table = {  # 8 warps leave each 256 registers, which is not enough; 4 leave 512
    (4, True): {"BLOCK_N": 16, "BLOCK_D": 32, "BLOCK_K": 16, "num_warps": 4, "num_stages": 1},
    (4, False): {"BLOCK_N": 16, "BLOCK_D": 32, "BLOCK_K": 16, "num_warps": 4, "num_stages": 1},
    (2, None): {"BLOCK_N": 16, "BLOCK_D": 16, "BLOCK_K": 16, "num_warps": 4, "num_stages": 1},
    (4, None): {"BLOCK_N": 16, "BLOCK_D": 16, "BLOCK_K": 16, "num_warps": 4, "num_stages": 1},
}


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
    """A tile of the features of x: their grad_x, and the gradients of the weights that read or make them, as needed."""
    decoder, encoders, scale = layer.decoder, layer.encoders, layer.scale
    output = decoder[len(decoder) - 1]
    P: tl.constexpr = output[0].dtype.element_ty
    LAYERS: tl.constexpr = len(to[0]) // 2
    outs, ins = tl.arange(0, width_of(FIRST)), tl.arange(0, width_of(G))
    grad_out = tl.zeros((cols.shape[0], width_of(G)), ACC)
    grad_bias, grad_scale = tl.zeros((BLOCK_N, cols.shape[0]), ACC), tl.zeros((BLOCK_N, cols.shape[0]), ACC)
    grad_firsts = ()
    for _i in tl.static_range(len(to[0])):
        grad_firsts = grad_firsts + (tl.zeros((width_of(FIRST), cols.shape[0]), ACC),)
    for block in range(tl.program_id(1), tl.cdiv(N, BLOCK_N), tl.num_programs(1)):
        rows, inside = rows_of(block, N, BLOCK_N)
        keep = counting(layer.mask, layer.mask_strides, rows, N)
        in_x, counts = inside[:, None] & (cols < D)[None, :], keep[:, None] & (cols < D)[None, :]
        x = tl.load(tile(layer.x, rows, cols, layer.x_strides), mask=in_x, other=0)
        grad_x = tl.zeros((BLOCK_N, cols.shape[0]), ACC)
        if NEEDS[2] or NEEDS[3] or (NEEDS[0] and THROUGH_TARGET):
            # 1. r of this block, once more
            g = load_columns(g_ptr, G, rows, inside, 0, G)
            x_hat = add_products(grad_x, g, output, 0, cols, cols < D, G, PRECISION, BLOCK_K)
            r, inverse = residual(add_bias(x_hat, output, cols, cols < D), x.to(ACC), scale, cols, counts, D)
            if NEEDS[2]:
                grad_out = product(tl.trans(r.to(P)), g.to(P), grad_out, PRECISION)
                grad_bias += r
            if NEEDS[3]:
                grad_scale += tl.where(counts, 1 - r * r, 0.0)
            if NEEDS[0] and THROUGH_TARGET:
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
    if NEEDS[2] or NEEDS[3]:
        factor = c / tl.load(scale[0] + cols * scale[1][0], mask=cols < D, other=1).to(ACC)
    if NEEDS[2]:
        to_w, to_b = to[1][len(decoder) - 1]
        store_sums(parts_ptr + to_w, grad_out * factor[:, None], cols, 0, ins, D, G, G)
        if output[1] is not None:
            tl.store(parts_ptr + to_b + cols, tl.sum(grad_bias, 0) * factor, mask=cols < D)
    if NEEDS[3]:
        tl.store(parts_ptr + to[2] + cols, tl.sum(grad_scale, 0) * factor, mask=cols < D)


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
        z1, _z2 = samples(state_ptr, layer.noise, layer.noise_strides, layer.seed, rows, inside, WIDTH, ENCODER, R, ACC)
        in_y = inside[:, None] & (cols < M)[None, :]
        grad_y = tl.load(tile(grad_y_ptr, rows, cols, grad_y_strides), mask=in_y, other=0)
        sums = product(tl.trans(grad_y.to(P)), z1.to(P), sums, PRECISION)
    store_sums(parts_ptr, tl.full((), scaling, ACC) * sums, cols, 0, ins, M, R, R)


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
    MAKES: tl.constexpr,  # of each kind of the programs over features of x: which gradients it makes
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
        for i in tl.static_range(len(MAKES)):
            if program % len(MAKES) == i:
                cols = program // len(MAKES) * BLOCK_D + tl.arange(0, BLOCK_D)
                feature_sums(
                    layer, grad_state_ptr, g_ptr, grad_x_ptr, parts_ptr, to, c, cols, N, D, G, FIRST, MAKES[i],
                    THROUGH_TARGET, WIDTH, ACC, PRECISION, BLOCK_N, BLOCK_K,
                )  # fmt: skip
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
            for number in tl.static_range(len(DECODER)):
                if (first >= 0) & (first < tl.cdiv(DECODER[number], BLOCK_D) * BLOCK_D):
                    hidden_sums(
                        layer, number, first, state_ptr, grad_hidden_ptr, parts_ptr, to[1][number], c, N, WIDTH,
                        AVERAGE, ENCODER, DECODER, R, THRESHOLD, ACC, PRECISION, BLOCK_N, BLOCK_K,
                        min(BLOCK_D, width_of(DECODER[number])),
                    )  # fmt: skip
                first -= tl.cdiv(DECODER[number], BLOCK_D) * BLOCK_D


@triton.jit
def layer_reduce_kernel(
    parts_ptr,  # [P, length]
    gradients,  # pointers to the gradients, contiguous
    places,  # of each: where it is in the parts, and how many entries it has
    P,
    length,
    ACC: tl.constexpr,
    BLOCK_L: tl.constexpr,
):
    """Sums over the first dimension, always in the same order."""
    program = tl.program_id(0)
    for i in tl.static_range(len(gradients)):
        if (program >= 0) & (program < tl.cdiv(places[i][1], BLOCK_L)):
            entries = program * BLOCK_L + tl.arange(0, BLOCK_L)
            inside = entries < places[i][1]
            sums = tl.zeros((BLOCK_L,), ACC)
            for part in range(P):
                at = tl.cast(part, tl.int64) * length + places[i][0]
                sums += tl.load(parts_ptr + at + entries, mask=inside, other=0)
            tl.store(gradients[i] + entries, sums.to(gradients[i].dtype.element_ty), mask=inside)
        program -= tl.cdiv(places[i][1], BLOCK_L)
