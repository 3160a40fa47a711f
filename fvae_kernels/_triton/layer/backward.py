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

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...ops._raw import wide_dtype
from .._common import Table, accumulator, by_vendor, counting, kept_tokens, product, strides, tile
from .features import AMD as AMD_GRADS
from .features import BLOCK_L, PROGRAMS, layer_grads_kernel, layer_reduce_kernel
from .features import TABLE as TABLE_GRADS
from .host import Arguments, Gradients, Parameter, Shapes, feature_programs, later_layers, options_for, split
from .networks import NLL, coefficient, decode, latent, samples, width_of
from .through_tokens import grad_head, store_inputs, through_decoder, through_encoder

TABLE: Table = {
    (2, True): {"BLOCK_N": 16, "BLOCK_D": 32, "BLOCK_K": 64, "num_warps": 8, "num_stages": 1},
    (2, False): {"BLOCK_N": 32, "BLOCK_D": 32, "BLOCK_K": 64, "num_warps": 8, "num_stages": 1},
    (4, True): {"BLOCK_N": 16, "BLOCK_D": 32, "BLOCK_K": 16, "num_warps": 4, "num_stages": 1},
    (4, False): {"BLOCK_N": 32, "BLOCK_D": 32, "BLOCK_K": 16, "num_warps": 8, "num_stages": 2},
    (8, True): {"BLOCK_N": 16, "BLOCK_D": 16, "BLOCK_K": 16, "num_warps": 4, "num_stages": 1},
    (8, False): {"BLOCK_N": 32, "BLOCK_D": 16, "BLOCK_K": 16, "num_warps": 8, "num_stages": 1},
    (2, None): {"BLOCK_N": 16, "BLOCK_D": 32, "BLOCK_K": 32, "num_warps": 8, "num_stages": 1},
    (4, None): {"BLOCK_N": 16, "BLOCK_D": 16, "BLOCK_K": 16, "num_warps": 8, "num_stages": 1},
    (8, None): {"BLOCK_N": 16, "BLOCK_D": 16, "BLOCK_K": 16, "num_warps": 8, "num_stages": 1},
}

AMD: Table = {  # with more tokens at once, vector registers spill to memory
    (2, False): TABLE[2, True],
    (4, True): {"BLOCK_N": 16, "BLOCK_D": 32, "BLOCK_K": 32, "num_warps": 8, "num_stages": 1},
    (4, False): {"BLOCK_N": 16, "BLOCK_D": 32, "BLOCK_K": 32, "num_warps": 8, "num_stages": 1},
    (2, None): {"BLOCK_N": 16, "BLOCK_D": 16, "BLOCK_K": 16, "num_warps": 4, "num_stages": 1},
    (4, None): {"BLOCK_N": 16, "BLOCK_D": 16, "BLOCK_K": 16, "num_warps": 4, "num_stages": 1},
}


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
    z1, z2 = samples(state_ptr, noise, noise_strides, seed_ptr, rows, inside, WIDTH, ENCODER, R, ACC)
    grad_z1, grad_z2 = tl.zeros(z1.shape, ACC), tl.zeros(z2.shape, ACC)
    # 2. Through r
    if DECODE:
        h = decode(
            z1, z2, decoder, seed_ptr, rows, len(DECODER), len(ENCODER), AVERAGE, DECODER, R, THRESHOLD, PRECISION,
            BLOCK_K,
        )  # fmt: skip
        if grad_state_ptr is not None or grad_hidden_ptr is not None:
            unit1, unit2 = through_decoder(
                x_ptr, x_strides, h, z1, z2, decoder, scale, rows, inside, keep, grad_hidden_ptr, D, AVERAGE, DECODER,
                R, THRESHOLD, PRECISION, BLOCK_D, BLOCK_K,
            )  # fmt: skip
            c = coefficient(grads, table, kept_ptr, N, NLL, ACC)
            grad_z1, grad_z2 = c * unit1, c * unit2
        if g_ptr is not None:
            store_inputs(g_ptr, h, z1, z2, rows, inside, AVERAGE, DECODER, R)
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
        # 4. Through each posterior and its encoder. The latent is made again: kept, it would fill registers till here
        mu = tl.full((), prior2_mean, ACC)
        for side in tl.static_range(2):
            tl.debug_barrier()
            posterior = latent(state_ptr, noise, noise_strides, seed_ptr, rows, inside, side, WIDTH, ENCODER, R, ACC)
            grad_mean, grad_logvar = grad_head(
                grads, table, kept_ptr, N, posterior, (grad_z1, grad_z2)[side], keep, mu, side
            )
            through_encoder(
                grad_mean, grad_logvar, encoders[side], state_ptr, grad_state_ptr, rows, inside, side, WIDTH, ENCODER,
                R, THRESHOLD, PRECISION, BLOCK_K,
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
    products: torch.dtype | None,
    state: Tensor,
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
        return grad_x.zero_(), [grad.zero_() for grad in gradients.empty(groups, B)]

    latents_needed, hidden = needs[0] or needs[1], shapes.decoder
    target = through_r and needs[0] and not detach_target
    G = hidden[-1] if hidden else shapes.R * (1 if average else 2)
    grad_state = x.new_empty((N, shapes.width), dtype=wide) if latents_needed else None
    g = x.new_empty((N, G), dtype=wide) if asked[2] or asked[3] or target else None
    grad_hidden = x.new_empty((N, G), dtype=wide) if asked[2] and hidden else None
    grads, kept = (grad_loss, grad_nll, grad_kl, grad_gamma), kept_tokens(mask)
    arrives = (grad_y, strides(grad_y), grads, split(objective))
    layer = Arguments.of(x, encoder1, encoder2, decoder, scale, B, noise1, noise2, mask, seed)
    sizes = shapes, N, max(D, M), B, dropout if seed is not None else 0.0, products

    if grad_state is not None or g is not None:
        options = options_for(layer_bwd_kernel, by_vendor(TABLE, AMD), *sizes)
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
    options = options_for(layer_grads_kernel, by_vendor(TABLE_GRADS, AMD_GRADS), *sizes)
    T = options["BLOCK_D"]
    makes, (which, later, later_programs) = feature_programs(asked, shapes.wide), later_layers(shapes, T)
    counts = (
        triton.cdiv(D, T) * len(makes),
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
        MAKES=makes,
        NEEDS=tuple(asked),
        THROUGH_TARGET=target,
        WIDTH=shapes.width,
        AVERAGE=average,
        **options,
    )
    computed = gradients.empty(groups, B)
    needed, places = gradients.places(computed)
    if needed:
        programs = sum(triton.cdiv(size, BLOCK_L) for _, size in places)
        layer_reduce_kernel[(programs,)](
            parts, needed, places, chunks, gradients.length, accumulator(B), BLOCK_L=BLOCK_L, num_warps=4
        )
    return grad_x, computed
