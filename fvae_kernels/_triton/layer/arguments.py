"""What the kernels of the layer are handed: `Layer` at run time, `Sizes` when they are compiled.

`Networks` and `Objective` are those of ops._layer_inputs. Weights are contiguous, so that their strides follow from
their sizes. Nothing in `Layer` is None, which Triton 3.6 loses inside of tuples: what is not there is a pointer to
zeros, as a missing bias, or is never read, as `Sizes` says.
"""

# mypy: allow-untyped-defs

from typing import Any, NamedTuple

import triton


class Layer(NamedTuple):
    """Inputs of the layer. Rows of x may lie apart; everything else is contiguous."""

    x: Any  # [N, D]
    x_stride: Any  # from row to row
    networks: Any  # Networks of pointers
    noise1: Any  # [N, R], where `given_noise`
    noise2: Any
    mask: Any  # bool [N], where `masked`
    kept: Any  # int64 [], how many tokens the mask keeps
    seed: Any  # int64 []


class Sizes(NamedTuple):
    """What kernels are compiled for."""

    encoder: tuple[int, ...]  # units of the hidden layers of an encoder
    decoder: tuple[int, ...]
    R: int
    average: bool  # the decoder reads (z_1 + z_2) / 2, not [z_1, z_2]
    given_noise: bool  # else it is made from the seed
    masked: bool
    threshold: int | None  # an activation is kept where 16 random bits are below this; None: nothing is dropped
    acc: Any  # dtype of sums
    precision: str  # of products


@triton.constexpr_function
def width_of(size):
    """Of a tensor in registers that holds `size` entries."""
    return max(triton.next_power_of_2(size), 16)  # as tables.padded


# The state that forward leaves [N, state_width]: outputs of the encoders' hidden layers, encoder 1 | 2 of each, then
# mean1 | logvar1 | mean2 | logvar2.


@triton.constexpr_function
def state_width(S):
    return 2 * sum(S.encoder) + 4 * S.R


@triton.constexpr_function
def hidden_column(S, layer, side):
    """First column in the state of an encoder's hidden layer."""
    return 2 * sum(S.encoder[:layer]) + side * S.encoder[layer]


@triton.constexpr_function
def mean_column(S, side):
    """The columns of logvar follow R further."""
    return 2 * sum(S.encoder) + 2 * side * S.R


@triton.constexpr_function
def first_units(S):
    """Outputs of a layer that reads x: the first hidden layer of an encoder, or a head."""
    return S.encoder[0] if S.encoder else S.R


@triton.constexpr_function
def latent_size(S):
    """Inputs of the decoder."""
    return S.R if S.average else 2 * S.R


@triton.constexpr_function
def decoder_inputs(S, layer):
    """Inputs of a hidden layer of the decoder, or of its output layer, whose number is that of the hidden layers."""
    return S.decoder[layer - 1] if layer > 0 else (S.R if S.average else 2 * S.R)
