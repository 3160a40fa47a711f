"""Arguments of the layer's kernels: `Layer` at run time, `Sizes` at compile time.

`Networks` and `Objective` are those of ops._layer_inputs. Weights are contiguous, so their strides follow from their
sizes. Nothing in `Layer` is None, because Triton 3.6 loses None inside tuples. A missing bias is a pointer to zeros;
other missing inputs are never read, and `Sizes` says which.
"""

# mypy: allow-untyped-defs

from typing import Any, NamedTuple

import triton


class Layer(NamedTuple):
    """Inputs of the layer. Rows of x may lie apart; everything else is contiguous."""

    x: Any  # [N, D]
    x_stride: Any  # from row to row
    networks: Any  # Networks of pointers
    noise1: Any  # [N, R], read if `given_noise`
    noise2: Any
    mask: Any  # bool [N], read if `masked`
    kept: Any  # int64 [], how many tokens the mask keeps
    seed: Any  # int64 []


class Sizes(NamedTuple):
    """Compile-time constants of the kernels."""

    encoder: tuple[int, ...]  # units of the hidden layers of an encoder
    decoder: tuple[int, ...]
    R: int
    average: bool  # the decoder reads (z_1 + z_2) / 2, not [z_1, z_2]
    given_noise: bool  # False: made from the seed
    masked: bool
    threshold: int | None  # keep an activation if its 16 random bits are below this; None: no dropout
    acc: Any  # dtype of sums
    precision: str  # of products


@triton.constexpr_function
def width_of(size):
    """Width of a tensor in registers that holds `size` entries: a power of two, at least 16."""
    return max(triton.next_power_of_2(size), 16)  # as tables.padded


# The state [N, state_width] that forward saves for backward: outputs of the encoders' hidden layers, encoder 1 | 2 of
# each, then mean1 | logvar1 | mean2 | logvar2.


@triton.constexpr_function
def state_width(S):
    return 2 * sum(S.encoder) + 4 * S.R


@triton.constexpr_function
def hidden_column(S, layer, side):
    """First column of an encoder's hidden layer in the state."""
    return 2 * sum(S.encoder[:layer]) + side * S.encoder[layer]


@triton.constexpr_function
def mean_column(S, side):
    """First column of mean in the state; logvar starts R columns later."""
    return 2 * sum(S.encoder) + 2 * side * S.R


@triton.constexpr_function
def first_units(S):
    """Outputs of a layer that reads x: an encoder's first hidden layer, or a head if it has none."""
    return S.encoder[0] if S.encoder else S.R


@triton.constexpr_function
def decoder_inputs(S, layer):
    """Number of inputs of the decoder's layer `layer`; the output layer comes after the hidden layers."""
    return S.decoder[layer - 1] if layer > 0 else (S.R if S.average else 2 * S.R)
