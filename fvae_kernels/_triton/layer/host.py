"""What the launchers of the layer kernels share: the arguments of their kernels, and what the kernels can hold."""

import ctypes
import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...ops._raw import padded
from .._common import Table, accumulator, blocks_for, precision, strides

NARROW = 16, 128, 384  # the most units of an encoder's layer, of a decoder's, and of all hidden ones of the decoder

Parameter = Tensor | None  # of a list weight, bias or None, weight, ...: the input's layer first


class Shapes(NamedTuple):
    """Sizes of the hidden layers of an encoder and of the decoder, and of the latent."""

    encoder: tuple[int, ...]
    decoder: tuple[int, ...]
    R: int

    @classmethod
    def of(cls, encoder: Sequence[Parameter], decoder: Sequence[Parameter]) -> "Shapes":
        sizes = [[w.shape[0] for w in weights[::2] if w is not None] for weights in (encoder, decoder)]
        return cls(tuple(sizes[0][:-2]), tuple(sizes[1][:-1]), sizes[0][-1])

    @property
    def width(self) -> int:
        """Of the state: the outputs of all hidden layers of both encoders, mean1 | logvar1 | mean2 | logvar2."""
        return 2 * sum(self.encoder) + 4 * self.R

    @property
    def wide(self) -> bool:
        """Whether it has more units than the recipe, which all but fills the registers where blocks are large."""
        encoder, decoder = [*map(padded, self.encoder), padded(self.R)], [*map(padded, self.decoder)]
        sizes = max(encoder), max(decoder, default=0), sum(decoder)
        return any(size > most for size, most in zip(sizes, NARROW, strict=True))


def linears(parameters: Sequence[Parameter]) -> tuple[Any, ...]:
    """(weight, bias or None, strides of both) of each layer."""
    return tuple((w, b, strides(w), strides(b)) for w, b in zip(parameters[::2], parameters[1::2], strict=True))


def threshold(dropout: float) -> int | None:
    """An activation is kept where 16 random bits are below this; None where nothing is dropped."""
    return min(max(round((1 - dropout) * 2**16), 1), 2**16) if dropout > 0 else None


def split(table: Sequence[float]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Two tuples whose sum is `table`: a kernel takes floats in a tuple as float32, and two of them hold a float64."""
    high = tuple(ctypes.c_float(entry).value for entry in table)
    return high, tuple(entry - first for entry, first in zip(table, high, strict=True))


def options_for(
    kernel: Any,
    table: Table,
    shapes: Shapes,
    N: int,
    widest: int,
    B: Tensor,
    dropout: float,
    products: torch.dtype | None,
) -> dict[str, Any]:
    """Launch options for N tokens of at most `widest` features; B stands for all parameters."""
    # products of 16 bits, which add up 16 numbers at least, take blocks that are made for them where those are smaller
    entry_size = 2 if shapes.wide and products is not None else B.element_size()
    options = blocks_for(kernel, table, entry_size, N, shapes.wide, BLOCK_D=widest)
    constants = {"ENCODER": shapes.encoder, "DECODER": shapes.decoder, "R": shapes.R, "THRESHOLD": threshold(dropout)}
    return options | constants | {"ACC": accumulator(B), "PRECISION": precision(B, products)}


class Arguments(NamedTuple):
    """What every layer kernel takes; strides follow their tensors."""

    x: Tensor
    x_strides: Any
    encoders: Any  # of both: (weight, bias, strides of both) of the hidden layers, of mean and of logvar
    decoder: Any  # the same of the hidden layers and of the output layer
    scale: Any  # t and its strides
    up: Any  # B as a layer, without a bias
    noise: Any  # of both sides, or None
    noise_strides: Any
    mask: Parameter
    mask_strides: Any
    seed: Parameter

    @classmethod
    def of(
        cls,
        x: Tensor,
        encoder1: Sequence[Parameter],
        encoder2: Sequence[Parameter],
        decoder: Sequence[Parameter],
        scale: Tensor,
        B: Tensor,
        noise1: Parameter,
        noise2: Parameter,
        mask: Parameter,
        seed: Parameter,
    ) -> "Arguments":
        encoders, scales, noise = (linears(encoder1), linears(encoder2)), (scale, scale.stride()), (noise1, noise2)
        up, noise_strides = linears((B, None))[0], (strides(noise1), strides(noise2))
        decoders = linears(decoder)
        return cls(x, x.stride(), encoders, decoders, scales, up, noise, noise_strides, mask, strides(mask), seed)


class Gradients(NamedTuple):
    """Where in one flat tensor the gradients of the parameters are; -1 where one is not needed or not there."""

    groups: list[list[int]]  # of encoder1, encoder2, decoder, scale, B
    length: int

    @classmethod
    def of(cls, groups: Sequence[Sequence[Parameter]], needed: Sequence[bool]) -> "Gradients":
        length, places = 0, list[list[int]]()
        for parameters, need in zip(groups, needed, strict=True):
            places.append([])
            for p in parameters:
                places[-1].append(length if need and p is not None else -1)
                length += -(-p.numel() // 16) * 16 if need and p is not None else 0
        return cls(places, length)

    def empty(self, groups: Sequence[Sequence[Parameter]], like: Tensor) -> list[Tensor]:
        """The gradients in the order of the parameters, [0] where one is not needed."""
        pairs = zip(itertools.chain(*self.groups), itertools.chain(*groups), strict=True)
        return [like.new_empty(0 if at < 0 or p is None else p.shape) for at, p in pairs]

    def places(self, grads: Sequence[Tensor]) -> tuple[tuple[Tensor, ...], tuple[tuple[int, int], ...]]:
        """Those that are needed, and where each is and how many entries it has."""
        pairs = [(grad, at) for grad, at in zip(grads, itertools.chain(*self.groups), strict=True) if at >= 0]
        return tuple(grad for grad, _ in pairs), tuple((at, grad.numel()) for grad, at in pairs)

    def to(self, shapes: Shapes, later: Sequence[tuple[int, int]]) -> tuple[Any, ...]:
        """As layer_grads_kernel takes it."""
        encoders, decoder, (scale,), (B,) = self.groups[:2], self.groups[2], *self.groups[3:]
        reading = 1 if shapes.encoder else 2
        firsts = tuple(encoder[2 * i] for encoder in encoders for i in range(reading))
        rest = tuple((encoders[side][2 * i], encoders[side][2 * i + 1]) for side, i in later)
        return firsts, tuple(zip(decoder[::2], decoder[1::2], strict=True)), scale, B, rest


def feature_programs(asked: Sequence[bool], wide: bool) -> tuple[tuple[bool, ...], ...]:
    """Which gradients (of x, the encoders, the decoder, scale) each kind of the programs over features of x makes.

    One makes all of them, reading x once, unless the sums of all would not fit its registers.
    """
    x, encoders, decoder, scale = asked[:4]
    apart = ((x, False, False, False), (False, encoders, False, False), (False, False, decoder, scale))
    return tuple(kind for kind in (apart if wide else (tuple(asked[:4]),)) if any(kind))


def later_layers(shapes: Shapes, T: int) -> tuple[list[tuple[int, int]], tuple[tuple[int, ...], ...], int]:
    """The encoders' layers that do not read x, and those that do for their biases, which are cut into tiles of T.

    Side and number of each; (first program, column of its outputs in the state, outputs, column of its inputs, inputs)
    of each; and how many programs they are. Inputs of x itself are none.
    """
    sizes, R, hidden = shapes.encoder, shapes.R, len(shapes.encoder)
    heads = 2 * sum(sizes)
    which, rows, programs = [], [], 0
    for side in range(2):
        for i in range(hidden + 2):
            outputs = sizes[i] if i < hidden else R
            column = 2 * sum(sizes[:i]) + side * outputs if i < hidden else heads + (2 * side + i - hidden) * R
            before = min(i, hidden) - 1  # the hidden layer that it reads
            inputs = sizes[before] if before >= 0 else 0
            which.append((side, i))
            rows.append((programs, column, outputs, 2 * sum(sizes[:before]) + side * inputs if inputs else 0, inputs))
            programs += -(-outputs // T) * max(-(-inputs // T), 1)
    return which, tuple(rows), programs
