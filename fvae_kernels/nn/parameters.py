"""The parameters of an adapter: their names, shapes and start."""

import math
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from ..config import FVAEConfig


def parameter_order(config: FVAEConfig) -> tuple[str | None, ...]:
    """Parameter names in the order of `Networks.flat`; None for a missing bias."""
    hidden, decoder = range(len(config.encoder_hidden)), range(len(config.decoder_hidden))
    layers = [f"{stem}_{part}" for stem in ("encoder1", "encoder2") for part in (*_hidden(hidden), "mean", "logvar")]
    layers += [f"decoder_{part}" for part in (*_hidden(decoder), "out")]
    names = [f"{layer}_{kind}" for layer in layers for kind in ("weight", "bias")]
    missing = {"encoder1_mean_bias"} if not config.encoder_hidden else set()
    return (*(None if name in missing else name for name in names), "decoder_scale", "B")


def _hidden(numbers: range) -> list[str]:
    return [f"hidden{i}" for i in numbers]


def is_served(name: str, config: FVAEConfig) -> bool:
    """True if inference needs this parameter: encoder 1 (only its mean path, unless z_1 is sampled) and B."""
    return (
        name.startswith("encoder1_" if config.sample_at_inference else ("encoder1_hidden", "encoder1_mean"))
        or name == "B"
    )


def parameter_shapes(D: int, M: int, config: FVAEConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Name and shape of every parameter of an adapter, as in its state dict."""

    def linear(name: str, fan_in: int, fan_out: int, bias: bool = True) -> Iterator[tuple[str, tuple[int, ...]]]:
        yield f"{name}_weight", (fan_out, fan_in)
        if bias:
            yield f"{name}_bias", (fan_out,)

    def hidden(stem: str, fan_in: int, sizes: tuple[int, ...]) -> Iterator[tuple[str, tuple[int, ...]]]:
        for i, (last, size) in enumerate(zip((fan_in, *sizes), sizes, strict=False)):
            yield from linear(f"{stem}_hidden{i}", last, size)

    R, sizes = config.rank, config.encoder_hidden
    top = sizes[-1] if sizes else D
    for stem in ("encoder1", "encoder2"):
        yield from hidden(stem, D, sizes)
        if config.separate_hidden:
            yield from hidden(f"{stem}_logvar", D, sizes)
        # a linear encoder's mean path has no bias: it is LoRA's A, and s B M_1 is the whole update
        yield from linear(f"{stem}_mean", top, R, bias=bool(sizes) or stem == "encoder2")
        yield from linear(f"{stem}_logvar", top, R)
    fused = 2 * R if config.fusion == "concat" else R
    yield from hidden("decoder", fused, config.decoder_hidden)
    yield from linear("decoder_out", config.decoder_hidden[-1] if config.decoder_hidden else fused, D)
    yield "decoder_scale", (D,)
    yield "B", (M, R)


@torch.no_grad()
def start(parameters: Mapping[str, Tensor], config: FVAEConfig) -> None:
    """Set parameters by name to the start that the config names. See `FVAEAdapter.reset_parameters`."""
    lora = config.start == "lora"
    for name, parameter in parameters.items():
        if name == "B":
            nn.init.zeros_(parameter) if lora else nn.init.normal_(parameter, std=0.02)
        elif name == "decoder_scale":
            nn.init.ones_(parameter)
        elif name == "encoder1_logvar_bias":
            nn.init.constant_(parameter, config.logvar1_start)
        elif name == "encoder1_mean_weight" and lora:
            nn.init.kaiming_uniform_(parameter, a=math.sqrt(5))
        elif "_mean_" in name or name.endswith(("1_logvar_weight", "2_logvar_weight", "_logvar_bias")):
            nn.init.zeros_(parameter)
        elif name.endswith("_weight"):
            nn.init.kaiming_uniform_(parameter, a=math.sqrt(5))
        else:
            fan_in = parameters[name.removesuffix("bias") + "weight"].shape[1]
            nn.init.uniform_(parameter, -1 / math.sqrt(fan_in), 1 / math.sqrt(fan_in))
