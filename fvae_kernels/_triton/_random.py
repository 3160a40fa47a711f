"""Counter-based random numbers, for dropout and noise: backward computes those of forward again, nothing is stored.

A number is a function of the seed, which stays on the device, and of its layer or encoder, token and unit.
"""

# mypy: allow-untyped-defs

import math

import triton
import triton.language as tl

from ._common import tile

NOISE = tl.constexpr(1 << 31)  # third counter word for noise; for dropout it is the number of the layer
TWO_PI = tl.constexpr(2 * math.pi)
TO_UNIT = tl.constexpr(2.0**-32)


@triton.constexpr_function
def eighth_of(size):
    return -(-size // 8)


@triton.jit
def philox(seed_ptr, position, stream):
    """Philox 4x32-10: 128 bits for each position of a stream, as four words."""
    low, high = (position & 0xFFFFFFFF).to(tl.uint32), (position >> 32).to(tl.uint32)
    zero = tl.zeros_like(low)
    return tl.philox(tl.load(seed_ptr), low, high, zero + tl.cast(stream, tl.uint32), zero)


@triton.jit
def not_dropped(seed_ptr, layer, rows, units, UNITS: tl.constexpr, THRESHOLD: tl.constexpr):
    """True for units that dropout keeps. 128 bits decide for 8 units by 16 bits, one from each eighth of a layer."""
    BLOCKS: tl.constexpr = eighth_of(UNITS)
    PADDED: tl.constexpr = triton.next_power_of_2(BLOCKS)
    position = rows.to(tl.int64)[:, None] * BLOCKS + tl.arange(0, PADDED)[None, :]
    first, second, third, fourth = philox(seed_ptr, position, layer)
    words = tl.reshape(tl.join(tl.join(first, third), tl.join(second, fourth)), (rows.shape[0], 4 * PADDED))
    half = units // BLOCKS % 8
    at = units % BLOCKS * 4 + half // 2
    word = tl.gather(words, tl.broadcast_to(at[None, :], rows.shape[0], units.shape[0]), 1)
    return ((word >> (16 * (half % 2)).to(tl.uint32)[None, :]) & 0xFFFF) < THRESHOLD


@triton.jit
def sine_and_cosine(turns):
    """Sine and cosine of 2 pi turns, turns in [0, 1): power series within an eighth of a turn of the nearest axis."""
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
    """Noise of both encoders: the tensor that was given, else numbers from the seed."""
    first_ptr, second_ptr = noise
    first_strides, second_strides = noise_strides
    if first_ptr is None or second_ptr is None:
        first, second = normals(seed_ptr, rows, latent, R, ACC)
    if first_ptr is not None:
        first = tl.load(tile(first_ptr, rows, latent, first_strides), mask=inside, other=0).to(ACC)
    if second_ptr is not None:
        second = tl.load(tile(second_ptr, rows, latent, second_strides), mask=inside, other=0).to(ACC)
    return first, second
