"""Block shapes, warps and stages of the layer's Triton kernels, and what their registers hold: numbers alone.

Neither torch nor Triton is imported here. A row is chosen by the bytes of a parameter and by a size: few tokens, whose
blocks are small so that every multiprocessor has one, many, or a wide layer with any number of tokens.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

FEW_TOKENS = 8192  # fewer are few
FEW, MANY, WIDE = "few", "many", "wide"

# The most units of an encoder's layer or latent, of a decoder's hidden layer, and of all of those together, that fill
# the registers where blocks are large; layers with more are wide.
NARROW = (16, 128, 384)
# The most units of any layer, and of all hidden layers of the decoder together, each rounded up to a power of two. More
# would spill to memory, on every GPU.
WIDEST, WIDEST_DECODER = 256, 768

PROGRAMS = 264  # of layer_grads, about: the chunks of tokens are as many as that leaves
BLOCK_L = 128  # gradients that a program of layer_reduce adds up
MEAN = {"BLOCK_P": 1024, "BLOCK_D": 1024, "num_warps": 16}  # of layer_mean, one program

OVERRIDES: dict[str, dict[str, int]] = {}  # by the name of a kernel on the device: what replaces entries of its table
_changes = 0


def override(kernel: str, options: Mapping[str, int] | None) -> None:
    """Set or take away what replaces entries of a kernel's table."""
    global _changes
    _changes += 1
    if options:
        OVERRIDES[kernel] = dict(options)
    else:
        OVERRIDES.pop(kernel, None)


def changes() -> int:
    """Grows with every override: what was made from the tables before is out of date."""
    return _changes


class Row(NamedTuple):
    """Launch options under short names: blocks of tokens, features and inner dimension, num_warps, num_stages."""

    N: int
    D: int
    K: int
    warps: int
    stages: int


Table = Mapping[tuple[int, str], Row]

LAYER_FWD: Table = {
    (2, FEW): Row(N=16, D=64, K=64, warps=4, stages=2),
    (2, MANY): Row(N=64, D=64, K=64, warps=8, stages=2),
    (2, WIDE): Row(N=16, D=16, K=32, warps=8, stages=1),
    (4, FEW): Row(N=16, D=32, K=16, warps=4, stages=2),
    (4, MANY): Row(N=32, D=32, K=32, warps=8, stages=2),
    (4, WIDE): Row(N=8, D=16, K=16, warps=8, stages=1),
    (8, FEW): Row(N=16, D=16, K=16, warps=4, stages=1),
    (8, MANY): Row(N=32, D=16, K=16, warps=8, stages=1),
    (8, WIDE): Row(N=8, D=16, K=16, warps=8, stages=1),
}
LAYER_BWD: Table = {
    (2, FEW): Row(N=16, D=32, K=64, warps=8, stages=1),
    (2, MANY): Row(N=32, D=32, K=64, warps=8, stages=1),
    (2, WIDE): Row(N=16, D=32, K=32, warps=8, stages=1),
    (4, FEW): Row(N=16, D=32, K=16, warps=4, stages=1),
    (4, MANY): Row(N=32, D=32, K=16, warps=8, stages=2),
    (4, WIDE): Row(N=16, D=16, K=16, warps=8, stages=1),
    (8, FEW): Row(N=16, D=16, K=16, warps=4, stages=1),
    (8, MANY): Row(N=32, D=16, K=16, warps=8, stages=1),
    (8, WIDE): Row(N=16, D=16, K=16, warps=8, stages=1),
}
LAYER_GRADS: Table = {
    (2, FEW): Row(N=16, D=32, K=32, warps=8, stages=1),
    (2, MANY): Row(N=16, D=32, K=32, warps=8, stages=1),
    (2, WIDE): Row(N=16, D=16, K=16, warps=8, stages=1),
    (4, FEW): Row(N=16, D=32, K=16, warps=8, stages=2),
    (4, MANY): Row(N=16, D=32, K=16, warps=8, stages=2),
    (4, WIDE): Row(N=8, D=16, K=16, warps=8, stages=1),
    (8, FEW): Row(N=16, D=16, K=16, warps=4, stages=1),
    (8, MANY): Row(N=16, D=16, K=16, warps=4, stages=1),
    (8, WIDE): Row(N=8, D=16, K=16, warps=8, stages=1),
}
# On AMD: rows in which the registers of the ones above spill. 8 warps leave each 256 registers there, 4 leave 512.
AMD: Mapping[str, Table] = {
    "layer_fwd": {
        (2, MANY): LAYER_FWD[2, FEW],
        (2, WIDE): Row(N=16, D=16, K=16, warps=4, stages=1),
        (4, MANY): Row(N=32, D=32, K=16, warps=4, stages=2),
        (4, WIDE): Row(N=16, D=16, K=16, warps=4, stages=1),
    },
    "layer_bwd": {
        (2, MANY): LAYER_BWD[2, FEW],
        (2, WIDE): Row(N=16, D=16, K=16, warps=4, stages=1),
        (4, FEW): Row(N=16, D=32, K=32, warps=8, stages=1),
        (4, MANY): Row(N=16, D=32, K=32, warps=8, stages=1),
        (4, WIDE): Row(N=16, D=16, K=16, warps=4, stages=1),
    },
    "layer_grads": {
        (2, WIDE): Row(N=16, D=16, K=16, warps=4, stages=1),
        (4, FEW): Row(N=16, D=32, K=16, warps=4, stages=1),
        (4, MANY): Row(N=16, D=32, K=16, warps=4, stages=1),
        (4, WIDE): Row(N=16, D=16, K=16, warps=4, stages=1),
    },
}
LAYER: Mapping[str, Table] = {"layer_fwd": LAYER_FWD, "layer_bwd": LAYER_BWD, "layer_grads": LAYER_GRADS}


def padded(size: int) -> int:
    """What registers hold for so many entries: a power of two, at least the 16 of a matrix instruction."""
    return max(1 << (size - 1).bit_length(), 16)


def is_wide(encoder: Sequence[int], decoder: Sequence[int], rank: int) -> bool:
    """True if wider than the paper's recipe, which nearly fills the registers. Hidden layers come as their units."""
    encoder_sizes, decoder_sizes = [*map(padded, encoder), padded(rank)], [*map(padded, decoder)]
    sizes = max(encoder_sizes), max(decoder_sizes, default=0), sum(decoder_sizes)
    return any(size > most for size, most in zip(sizes, NARROW, strict=True))


def size_of(wide: bool, many_tokens: bool) -> str:
    """Which of the three sizes a layer has."""
    return WIDE if wide else MANY if many_tokens else FEW


def layer_row(kernel: str, entry_size: int, size: str, amd: bool) -> Row:
    """The row of a kernel of the layer, for parameters of so many bytes."""
    key = entry_size, size
    return AMD[kernel].get(key, LAYER[kernel][key]) if amd else LAYER[kernel][key]
