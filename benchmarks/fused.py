"""Launches of the fused Triton layer in closed form: distinct bytes that each reads and writes, and its FLOPs.

Launches in order; `tests/triton/test_traffic.py` compares these numbers with counted ones.

    seed          one number of torch's generator
    layer_fwd     tiles of tokens: reads base, x and the parameters; writes y, the state of the encoders, some sums
    layer_mean    computes the terms from these sums and t
    layer_bwd     tiles of tokens: reads grad_y, x, the state, parameters; writes gradients of the state, the decoder's
                  last hidden layer and its gradient
    layer_grads   tiles of features: reads all of these; writes grad_x, and partial sums of all parameters' gradients
    layer_reduce  adds the partial sums up
"""

import itertools
import math
from dataclasses import dataclass
from functools import cached_property

import torch

from fvae_kernels import FVAEConfig
from fvae_kernels._triton import tables
from fvae_kernels._triton.tables import padded
from fvae_kernels.nn.parameters import parameter_shapes

from .cost import Launch

RECIPE = FVAEConfig.preset("paper")
STATISTICS = 16  # sums that a program of the forward stores


@dataclass(frozen=True)
class Layer:
    """Sizes of a layer, and bytes of one entry of its activations, parameters and sums."""

    N: int
    D: int
    M: int
    config: FVAEConfig = RECIPE
    x_bytes: int = 4
    p_bytes: int = 4

    @property
    def wide(self) -> int:
        """Bytes of one entry of a sum."""
        return max(self.p_bytes, 4)

    @cached_property
    def entries(self) -> dict[str, int]:
        """Entries of the parameters, by part."""
        first = ("_hidden0_",) if self.config.encoder_hidden else ("_mean_", "_logvar_")
        found = dict.fromkeys(
            ("input", "encoders", "encoder biases", "B", "output", "hidden", "decoder biases", "t"), 0
        )
        for name, shape in parameter_shapes(self.D, self.M, self.config):
            found[_part(name, first)] += math.prod(shape)
        return found

    @property
    def parameters(self) -> int:
        """Entries of all parameters."""
        return sum(self.entries.values())

    @property
    def state(self) -> int:
        """Entries per token that backward needs: hidden outputs of both encoders, means and log-variances."""
        return 2 * (sum(self.config.encoder_hidden) + 2 * self.config.rank)

    @property
    def last(self) -> int:
        """Number of inputs of the decoder's output layer."""
        return (*self._latent, *self.config.decoder_hidden)[-1]

    @property
    def _latent(self) -> tuple[int]:
        return ((2 if self.config.fusion == "concat" else 1) * self.config.rank,)

    @property
    def many_units(self) -> bool:
        """True if registers cannot hold all sums at once: layer_grads then passes over the tokens three times."""
        return tables.is_wide(self.config.encoder_hidden, self.config.decoder_hidden, self.config.rank)

    @property
    def cuts(self) -> tuple[int, int, int]:
        """Block sizes: tokens of layer_fwd; tokens and features of layer_grads."""
        key = self.p_bytes, tables.size_of(self.many_units, self.N >= tables.FEW_TOKENS)
        grads = tables.LAYER_GRADS[key]
        return tables.LAYER_FWD[key].N, grads.N, grads.D

    @property
    def tiles(self) -> int:
        """Number of programs of layer_fwd."""
        return -(-self.N // self.cuts[0])

    @property
    def features(self) -> int:
        """Features of a block of layer_grads, and rows of its weight tiles."""
        return min(self.cuts[2], padded(max(self.D, self.M)))

    @property
    def later(self) -> int:
        """Number of tiles of later encoder layers, and of the biases of first ones."""
        hidden, R = self.config.encoder_hidden, self.config.rank
        sizes = [(size, before) for before, size in zip((0, *hidden), hidden, strict=False)]
        sizes += 2 * [(R, hidden[-1] if hidden else 0)]  # outputs and inputs
        return 2 * sum(self._blocks(outputs) * max(self._blocks(inputs), 1) for outputs, inputs in sizes)

    @property
    def chunks(self) -> int:
        """Number of chunks of tokens; layer_grads stores sums for each."""
        programs = sum(map(self._blocks, (self.D, self.M, *self.config.decoder_hidden))) + self.later
        programs += 2 * self._blocks(self.D) if self.many_units else 0
        return max(min(-(-self.N // self.cuts[1]), tables.PROGRAMS // programs), 1)

    def _blocks(self, size: int) -> int:
        return -(-size // self.features)


def _part(name: str, first: tuple[str, ...]) -> str:
    if name in ("B", "decoder_scale"):
        return "B" if name == "B" else "t"
    if name.endswith("_bias"):
        return "encoder biases" if name.startswith("encoder") else "decoder biases"
    if name.startswith("encoder"):
        return "input" if any(part in name for part in first) and "_logvar_hidden" not in name else "encoders"
    return "output" if name == "decoder_out_weight" else "hidden"


def launches(layer: Layer) -> list[Launch]:
    """All launches of forward and backward, beyond the base layer."""
    N, D, M, e, p, wide = layer.N, layer.D, layer.M, layer.entries, layer.p_bytes, layer.wide
    x, y, state, last = N * D * layer.x_bytes, N * M * layer.x_bytes, N * layer.state * wide, N * layer.last * wide
    deep = bool(layer.config.decoder_hidden)
    seed = 8
    decoder = e["output"] + e["hidden"] + e["decoder biases"] + e["t"]
    # the decoder's hidden layers but the last are recomputed for the gradients of all of them
    made = (0, *layer.config.decoder_hidden)[:-1]
    again = e["output"] + D + e["t"] + (e["hidden"] + sum(made) if len(made) > 1 else 0)
    sums = layer.tiles * STATISTICS * wide
    missing = 0 if layer.config.encoder_hidden else layer.config.rank  # a bias that is not there is read as zeros
    moved = {
        "seed": seed,
        "layer_fwd": y + x + (layer.parameters + missing) * p + seed + y + state + sums,
        "layer_mean": sums + D * p + 4 * wide,
        "layer_bwd": y + x + 2 * state + (decoder + e["encoders"] + e["B"]) * p + seed + 2 * wide + (1 + deep) * last,
        "layer_grads": x + y + 2 * state + (1 + deep) * last + (again + e["input"]) * p + seed + 2 * wide
        + x + layer.chunks * (layer.parameters + missing) * wide,
        "layer_reduce": layer.chunks * layer.parameters * wide + layer.parameters * p,
    }  # fmt: skip
    products = {
        "layer_fwd": e["input"] + e["encoders"] + e["B"] + e["hidden"] + e["output"],
        # the decoder recomputed, then back through decoder, B and encoders
        "layer_bwd": 2 * (e["hidden"] + e["output"]) + e["B"] + e["encoders"],
        # x_hat recomputed; gradients of O, of layers that read x, of x; later encoder layers in whole tiles
        "layer_grads": (3 if layer.many_units else 2) * e["output"]
        + 2 * e["input"]
        + e["B"]
        + layer.later * layer.features**2
        + _hidden_products(layer),
    }
    dtype = torch.bfloat16 if p == 2 else torch.float32
    return [Launch(name, count, 2 * N * products.get(name, 0), dtype) for name, count in moved.items()]


def _hidden_products(layer: Layer) -> int:
    """FLOPs of layer_grads for the decoder's hidden layers. Each tile of weight rows recomputes all layers but the
    last, and goes back to its own.
    """
    sizes = (*layer._latent, *layer.config.decoder_hidden)
    weights = [outputs * inputs for inputs, outputs in itertools.pairwise(sizes)]
    found = 0
    for i, weight in enumerate(weights):
        tiles = layer._blocks(sizes[i + 1])
        found += tiles * (sum(weights[:-1]) + sum(weights[i + 2 :])) + sum(weights[i + 1 : i + 2]) + weight
    return found


def saved(layer: Layer) -> int:
    """Bytes saved for backward apart from x and the parameters: the state and the seed."""
    return layer.N * layer.state * layer.wide + 8
