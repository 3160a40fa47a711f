"""What layers of the same sizes share from step to step: launches with their blocks, constants and offsets."""

import ctypes
import functools
import itertools
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...ops._layer_inputs import Encoder, Linear, Needs, Networks, Objective, Options
from ...ops._raw import wide_dtype_of
from .. import tables
from .._common import precision, target, triton_dtype
from .arguments import Sizes
from .features import EncoderTiles, Made, layer_grads_kernel
from .forward import layer_fwd_kernel, layer_mean_kernel
from .launch import Fixed, Launch
from .sums import layer_reduce_kernel
from .tokens import layer_bwd_kernel


class Case(NamedTuple):
    """Everything that decides a layer's launches; hashable."""

    encoder: tuple[int, ...]  # units of hidden layers
    decoder: tuple[int, ...]
    R: int
    D: int
    M: int
    dtype: torch.dtype  # of the parameters
    device: torch.device
    average: bool
    dropout: float  # 0 without a seed
    precision: str  # of products
    given_noise: bool
    masked: bool
    many_tokens: bool

    @classmethod
    def of(cls, networks: Networks, options: Options, given_noise: bool, masked: bool, seeded: bool, N: int) -> "Case":
        """The case of these parameters (tensors) and N tokens."""
        B, D = networks.B, networks.decoder.scale.shape[0]
        encoder, decoder = (
            tuple(layer.weight.shape[0] for layer in network.hidden)
            for network in (networks.encoder1, networks.decoder)
        )
        sizes, kind = (encoder, decoder, B.shape[1], D, B.shape[0]), (B.dtype, B.device, options.average)
        dropout = options.dropout if seeded else 0.0
        products = precision(B.dtype, options.products)
        return cls(*sizes, *kind, dropout, products, given_noise, masked, N >= tables.FEW_TOKENS)

    @property
    def latent(self) -> int:
        """Number of inputs of the decoder."""
        return self.R if self.average else 2 * self.R


class Numbers(NamedTuple):
    """Numbers that may change from step to step, as kernels take them.

    A float in a tuple is float32 in a kernel, so the second table holds the rounding errors of the first.
    """

    tables: Fixed  # of two Objectives
    recon_weight: float
    scaling: float
    prior2_mean: float
    logvar1_low: float
    logvar1_high: float


@functools.lru_cache(maxsize=512)
def numbers_of(options: Options) -> Numbers:
    """From the options of the raw operators."""
    table = options.objective
    high = tuple(ctypes.c_float(entry).value for entry in table)
    rest = tuple(entry - first for entry, first in zip(table, high, strict=True))
    others = Objective.of(table).loss.nll, options.scaling, options.prior2_mean
    return Numbers(
        Fixed.of((Objective.of(high), Objective.of(rest))), *others, options.logvar1_low, options.logvar1_high
    )


class Prepared:
    """The launches of a case. Blocks come from the tables, or from `tuning.override`."""

    def __init__(self, case: Case) -> None:
        self.case, self.wide = case, wide_dtype_of(case.dtype)
        self.no_flags, self.no_gradient = (zeros(dtype, case.device, 1) for dtype in (torch.int64, self.wide))
        self.size = tables.size_of(tables.is_wide(case.encoder, case.decoder, case.R), case.many_tokens)
        self.S = Sizes(
            case.encoder,
            case.decoder,
            case.R,
            case.average,
            case.given_noise,
            case.masked,
            threshold(case.dropout),
            triton_dtype(self.wide),
            case.precision,
        )
        self.state_width = 2 * sum(case.encoder) + 4 * case.R
        self.output_inputs = (case.latent, *case.decoder)[-1]
        self.fwd = self.launch("layer_fwd", layer_fwd_kernel, S=self.S)
        blocks = {"MASKED": case.masked, **{name: tables.MEAN[name] for name in ("BLOCK_P", "BLOCK_D")}}
        self.mean = Launch(layer_mean_kernel, blocks, tables.MEAN["num_warps"], 3)
        self.launched: set[Any] = set()  # keys of arguments with which both launches of forward can go directly
        self._backwards: dict[Any, Backward] = {}

    def launch(self, name: str, kernel: Any, **constants: Any) -> Launch:
        """A kernel of the layer with its row of the table; blocks of features are cut to the features there are."""
        # products of 16-bit factors need at least 16 inner entries, so wide layers take smaller blocks
        narrow = self.size == tables.WIDE and self.case.precision in ("bfloat16", "float16")
        row = tables.layer_row(name, 2 if narrow else self.case.dtype.itemsize, self.size, target() == "hip")
        chosen = {
            "BLOCK_N": row.N,
            "BLOCK_D": row.D,
            "BLOCK_K": row.K,
            "num_warps": row.warps,
            "num_stages": row.stages,
        }
        chosen |= tables.OVERRIDES.get(kernel.__name__, {})
        chosen["BLOCK_D"] = min(chosen["BLOCK_D"], tables.padded(max(self.case.D, self.case.M)))
        warps, stages = chosen.pop("num_warps"), chosen.pop("num_stages")
        return Launch(kernel, constants | chosen, warps, stages)

    def backward(self, needs: Needs, detach_target: bool, decode: bool, given: tuple[bool, ...]) -> "Backward":
        """Backward for these gradients. `decode`: if any passes the decoder; `given`: which parameters exist."""
        key = needs, detach_target, decode, given
        found = self._backwards.get(key)
        if found is None:
            found = self._backwards[key] = Backward(self, needs, detach_target, decode, given)
        return found


class Backward:
    """The programs that backward runs for the requested gradients, and the offsets of sums and gradients."""

    def __init__(
        self, prepared: Prepared, needs: Needs, detach_target: bool, decode: bool, given: tuple[bool, ...]
    ) -> None:
        case = prepared.case
        self.needs, self.latents = needs, needs.x or needs.encoders
        self.state_width, self.output_inputs, self.wide = prepared.state_width, prepared.output_inputs, prepared.wide
        self.target = needs.x and decode and not detach_target
        self.tokens = prepared.launch("layer_bwd", layer_bwd_kernel, S=prepared.S, DECODE=decode)
        self.inputs = needs.decoder or needs.scale or self.target  # store the inputs of the decoder's output layer
        self.hidden = needs.decoder and bool(case.decoder)
        made = needs[:4]
        apart = (needs.x, False, False, False), (False, needs.encoders, False, False), (False, False, *needs[2:4])
        kinds = [kind for kind in (apart if prepared.size == tables.WIDE else (made,)) if any(kind)]
        self.made = Made(*(tuple(kind[i] for kind in kinds) for i in range(4)))
        launch = prepared.launch("layer_grads", layer_grads_kernel)
        T = launch.constants["BLOCK_D"]
        tiles, encoder_programs = encoder_tiles(case.encoder, case.R, T)
        self.grads = prepared.launch(
            "layer_grads",
            layer_grads_kernel,
            S=prepared.S,
            NEEDS=needs,
            MADE=self.made,
            TILES=tiles,
            ENCODER_PROGRAMS=encoder_programs if needs.encoders else 0,
            THROUGH_TARGET=self.target,
        )
        self.programs = (
            -(-case.D // T) * len(kinds)
            + (-(-case.M // T) if needs.B else 0)
            + (encoder_programs if needs.encoders else 0)
            + (sum(-(-size // T) for size in case.decoder) if needs.decoder else 0)
        )
        self._place(prepared, given)
        acc = {"ACC": triton_dtype(prepared.wide), "BLOCK_L": tables.BLOCK_L}
        self.reduce = Launch(layer_reduce_kernel, acc, 4, 3)
        self.reduce_programs = sum(-(-size // tables.BLOCK_L) for size in self.entries)
        self.launched: set[Any] = set()  # keys of arguments with which every launch can go directly
        self._work: dict[int, tuple[int, Scratch]] = {}

    def _place(self, prepared: Prepared, given: tuple[bool, ...]) -> None:
        """Set the offsets: sums start at multiples of 16, gradients lie one after the other."""
        hidden, shapes = len(prepared.case.encoder), shapes_of(prepared.case)
        made, self.flags = self.needs.flags([True] * len(given), hidden), tuple(self.needs.flags(given, hidden))
        starts, self.length = [], 0
        for flag, shape in zip(made, shapes, strict=True):
            starts.append(self.length)
            self.length += -(-math.prod(shape) // 16) * 16 if flag else 0
        self.places = Fixed.of(Networks.of(starts, hidden))
        self.starts = tuple(start for flag, start in zip(self.flags, starts, strict=True) if flag)
        self.entries = tuple(math.prod(shape) for flag, shape in zip(self.flags, shapes, strict=True) if flag)

    def work(self, N: int) -> tuple[int, "Scratch"]:
        """For N tokens: the number of their chunks, for each of which the programs store sums; and the memory."""
        found = self._work.get(N)
        if found is None:
            chunks = max(min(-(-N // self.grads.constants["BLOCK_N"]), tables.PROGRAMS // max(self.programs, 1)), 1)
            state, inputs = (-(-N * width // 16) * 16 for width in (self.state_width, self.output_inputs))
            # there always are sums, since kernels read their dtype
            sizes = state * self.latents, inputs * self.inputs, inputs * self.hidden, chunks * max(self.length, 16)
            found = self._work[N] = chunks, Scratch(sizes, self.wide.itemsize)
        return found


class Scratch:
    """Memory of backward in one piece: gradient of the state, inputs of the output layer, their gradient, and sums.

    The sizes are multiples of 16 entries, so that each part is aligned as a tensor of its own would be.
    """

    def __init__(self, sizes: tuple[int, ...], itemsize: int) -> None:
        self.sizes, self.entries = sizes, sum(sizes)
        starts = itertools.accumulate((0, *sizes[:-1]))
        self.bytes = [start * itemsize if size else None for start, size in zip(starts, sizes, strict=True)]

    def parts(self, memory: Tensor, direct: bool) -> list[Any]:
        """The parts of `memory`, None if empty: tensors, or for direct launches addresses, which cost less."""
        if direct:
            first = memory.data_ptr()
            return [None if start is None else first + start for start in self.bytes]
        return [part if part.numel() else None for part in memory.split(self.sizes)]


def shapes_of(case: Case) -> list[tuple[int, ...]]:
    """Shapes of all parameters in the order of `Networks.flat`, missing biases included."""

    def linear(inputs: int, outputs: int) -> Linear:
        return Linear((outputs, inputs), (outputs,))

    def hidden(first: int, sizes: tuple[int, ...]) -> tuple[Linear, ...]:
        return tuple(linear(a, b) for a, b in zip((first, *sizes), sizes, strict=False))

    top = (case.D, *case.encoder)[-1]
    encoder = Encoder(hidden(case.D, case.encoder), linear(top, case.R), linear(top, case.R))
    output = linear((case.latent, *case.decoder)[-1], case.D)
    layers = (*encoder.hidden, encoder.mean, encoder.logvar) * 2 + (*hidden(case.latent, case.decoder), output)
    return [*(shape for layer in layers for shape in layer), (case.D,), (case.M, case.R)]


def encoder_tiles(sizes: tuple[int, ...], R: int, T: int) -> tuple[EncoderTiles, int]:
    """Tiles of T x T of each layer of encoder 1, then of encoder 2; and the number of programs for all."""
    hidden, heads = len(sizes), 2 * sum(sizes)
    found, programs = [], 0
    for side in range(2):
        for i in range(hidden + 2):
            outputs = sizes[i] if i < hidden else R
            column = 2 * sum(sizes[:i]) + side * outputs if i < hidden else heads + (2 * side + i - hidden) * R
            before = min(i, hidden) - 1  # the hidden layer that this one reads
            inputs = sizes[before] if before >= 0 else 0
            at = 2 * sum(sizes[:before]) + side * inputs if inputs else 0
            found.append((programs, column, outputs, at, inputs))
            programs += -(-outputs // T) * max(-(-inputs // T), 1)
    return EncoderTiles(*zip(*found, strict=True)), programs


def threshold(dropout: float) -> int | None:
    """Keep an activation if its 16 random bits are below this; None: no dropout."""
    return min(max(round((1 - dropout) * 2**16), 1), 2**16) if dropout > 0 else None


def prepared(case: Case) -> Prepared:
    """The `Prepared` of a case, shared by its layers; another target or an override of blocks makes a new one."""
    return _prepared(case, target(), tables.changes())


@functools.lru_cache(maxsize=512)
def _prepared(case: Case, target: str, changes: int) -> Prepared:
    return Prepared(case)


@functools.lru_cache(maxsize=64)
def zeros(dtype: torch.dtype, device: torch.device, size: int) -> Tensor:
    """Zeros in place of a missing tensor, for example a bias."""
    return torch.zeros(size, dtype=dtype, device=device)
