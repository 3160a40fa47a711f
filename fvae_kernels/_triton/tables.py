"""Block shapes, warps and stages of the layer's Triton kernels, and the sizes that fit registers: numbers only.

Neither torch nor Triton is imported here. A row is chosen by the bytes of a parameter's entry and by one of three
sizes: few tokens (small blocks, so that every multiprocessor gets one), many tokens, or a wide layer.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

FEW_TOKENS = 8192  # below this, tokens are few
FEW, MANY, WIDE = "few", "many", "wide"

# The most units that fit the registers with large blocks: of an encoder's layer or latent, of a decoder's hidden layer,
# and of all decoder hidden layers together. Layers with more are wide.
NARROW = (16, 128, 384)
# The most units of any layer, and of all hidden layers of the decoder together, each rounded up to a power of two. More
# would spill registers to memory on every GPU.
WIDEST, WIDEST_DECODER = 256, 768

PROGRAMS = 264  # programs of layer_grads, about; this sets the number of chunks of tokens
BLOCK_L = 128  # gradient entries that a program of layer_reduce sums
MEAN = {"BLOCK_P": 1024, "BLOCK_D": 1024, "num_warps": 16}  # of layer_mean, one program

OVERRIDES: dict[str, dict[str, int]] = {}  # by kernel name: entries that replace those of its table
_changes = 0


def override(kernel: str, options: Mapping[str, int] | None) -> None:
    """Replace entries of a kernel's table; None undoes it."""
    global _changes
    _changes += 1
    if options:
        OVERRIDES[kernel] = dict(options)
    else:
        OVERRIDES.pop(kernel, None)


def changes() -> int:
    """Number of overrides so far; what was made from the tables before the last one is out of date."""
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
    (4, WIDE): Row(N=16, D=16, K=16, warps=8, stages=1),
    (8, FEW): Row(N=16, D=16, K=16, warps=4, stages=1),
    (8, MANY): Row(N=16, D=16, K=16, warps=4, stages=1),
    (8, WIDE): Row(N=16, D=16, K=16, warps=8, stages=1),
}  # it sums over tokens: before Triton 3.9 products need 16 inner entries or more in every dtype
# On AMD: in place of rows above that spill registers. A thread has 256 registers with 8 warps there, 512 with 4.
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
    """Width in registers for `size` entries: a power of two, at least the 16 of a matrix instruction."""
    return max(1 << (size - 1).bit_length(), 16)


def is_wide(encoder: Sequence[int], decoder: Sequence[int], rank: int) -> bool:
    """True if wider than the paper's recipe, which nearly fills the registers. Hidden layers come as their units."""
    encoder_sizes, decoder_sizes = [*map(padded, encoder), padded(rank)], [*map(padded, decoder)]
    sizes = max(encoder_sizes), max(decoder_sizes, default=0), sum(decoder_sizes)
    return any(size > most for size, most in zip(sizes, NARROW, strict=True))


def size_of(wide: bool, many_tokens: bool) -> str:
    """Which of the three sizes of a table fits the layer."""
    return WIDE if wide else MANY if many_tokens else FEW


def layer_row(kernel: str, entry_size: int, size: str, amd: bool) -> Row:
    """The row of a layer kernel, for parameters of `entry_size` bytes an entry."""
    key = entry_size, size
    return AMD[kernel].get(key, LAYER[kernel][key]) if amd else LAYER[kernel][key]
