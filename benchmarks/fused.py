"""The launches of the fused Triton layer in closed form: distinct bytes that each reads and writes, and its FLOPs.

One launch each, in this order; `tests/test_roofline.py` holds it against what the meter counts.

    seed          one number of torch's generator
    forward       token tiles: reads base, x, parameters; writes y, the state of the encoders, partial sums
    terms         adds the partial sums up
    tokens        backward, token tiles: reads grad_y, x, state, parameters; writes the small tensors of a token
    features      backward, feature tiles: reads x, grad_y, the small tensors, parameters; writes grad_x, partial sums
    gradients     adds the partial sums up
"""

from dataclasses import dataclass

import torch

from fvae_kernels import FVAEConfig
from fvae_kernels.adapter import parameter_shapes

from .cost import Launch

RECIPE = FVAEConfig(rank=16, kl_weight=2.0)
STATISTICS = 12  # sums over the latents of a tile of tokens


@dataclass(frozen=True)
class Layer:
    """Sizes of a layer, bytes of an entry of its activations and of its parameters, and how its work is cut.

    `tiles` programs of the forward and `chunks` token chunks of the last backward kernel write partial sums.
    """

    N: int
    D: int
    M: int
    config: FVAEConfig = RECIPE
    x_bytes: int = 4
    p_bytes: int = 4
    wide: int = 4
    tiles: int = 64
    chunks: int = 8

    @property
    def weights(self) -> dict[str, int]:
        """Entries by part: both encoders' first layers, the rest of the encoders, B, decoder's output and the rest."""
        found = dict.fromkeys(("input", "encoders", "B", "output", "hidden", "vectors"), 0)
        top = "hidden0" if self.config.encoder_hidden else "mean"
        for name, shape in parameter_shapes(self.D, self.M, self.config):
            if len(shape) == 1:
                part = "vectors"
            elif name == "B":
                part = "B"
            elif name.startswith("decoder"):
                part = "output" if name.startswith("decoder_out") else "hidden"
            else:
                reads_x = top in name or (top == "mean" and "logvar" in name)
                part = "input" if reads_x else "encoders"
            found[part] += torch.Size(shape).numel()
        return found

    @property
    def parameters(self) -> int:
        """Entries of all of them."""
        return sum(self.weights.values())

    @property
    def state(self) -> int:
        """Entries per token that backward needs: hidden outputs of both encoders, means and log-variances."""
        return 2 * (sum(self.config.encoder_hidden) + 2 * self.config.rank)

    @property
    def small(self) -> int:
        """Entries per token between the two backward kernels: the decoder's, and gradients of the encoders'."""
        decoder = (2 if self.config.fusion == "concat" else 1) * self.config.rank + 2 * sum(self.config.decoder_hidden)
        return decoder + self.state


def launches(layer: Layer) -> list[Launch]:
    """Forward and backward, beyond the base layer."""
    N, D, M, w = layer.N, layer.D, layer.M, layer.weights
    x, y = N * D * layer.x_bytes, N * M * layer.x_bytes
    parameters, state, small = (
        layer.parameters * layer.p_bytes,
        N * layer.state * layer.wide,
        N * layer.small * layer.wide,
    )
    sums = layer.tiles * (D + STATISTICS) * layer.wide
    partial = layer.chunks * layer.parameters * layer.wide
    chain = w["input"] + w["encoders"] + w["hidden"] + w["output"]
    dtype = torch.bfloat16 if layer.p_bytes == 2 else torch.float32
    found = {
        "seed": (8, 0),
        "forward": (y + x + parameters + y + state + sums, chain + w["B"]),
        "terms": (sums + (4 + D) * layer.wide, 0),
        # the decoder once more, then its gradient, that of z_1 and those of the encoders
        "tokens": (y + x + state + parameters + small, 2 * (w["hidden"] + w["output"]) + w["B"] + w["encoders"]),
        # x_hat of the slice once more, weight gradients, and the slice of grad_x
        "features": (
            x + y + small + parameters + x + partial,
            2 * w["output"] + 2 * w["input"] + w["B"] + w["hidden"] + w["encoders"],
        ),
        "gradients": (partial + layer.parameters * layer.p_bytes, 0),
    }
    return [Launch(name, moved, 2 * N * products, dtype) for name, (moved, products) in found.items()]


def saved(layer: Layer) -> int:
    """Bytes kept for backward beyond x and the parameters: the state, the seed, the unit gradient of the scale."""
    return layer.N * layer.state * layer.wide + 8 + layer.D * layer.wide
