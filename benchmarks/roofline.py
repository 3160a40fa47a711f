"""Predicted time of an adapted layer, forward and backward beyond its base layer: ``make tables``.

A prediction, never a measurement. An eager step is as slow as the slower of device and host. On the device a launch
takes the longer of two times: moving its bytes at peak bandwidth, or computing its FLOPs at peak rate. The host takes
what `host_cost` measured (docs/roofline.md):

    seconds = max(host, sum over launches of max(bytes / bandwidth, FLOPs / rate))
"""

import functools
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from . import fused, host_cost, sides
from .cost import Cost, Launch
from .pages import replace_block, row

PAGE = Path(__file__).parent.parent / "docs" / "roofline.md"


@dataclass(frozen=True)
class Device:
    """Peak numbers of a data sheet: bytes/s, dense FLOP/s by dtype; seconds that a launch adds, if measured."""

    name: str
    bandwidth: float
    rates: dict[torch.dtype, float]
    launch: float = 0.0


DEVICES = {
    "A100": Device("A100 SXM 80 GB", 2.039e12, {torch.float32: 19.5e12, torch.bfloat16: 312e12}),
    "H100": Device("H100 SXM 80 GB", 3.35e12, {torch.float32: 67e12, torch.bfloat16: 989.4e12}),
    "MI300X": Device("MI300X", 5.3e12, {torch.float32: 163.4e12, torch.bfloat16: 1307.4e12}),
}


@dataclass(frozen=True)
class Shape:
    """Tokens N of a batch, input features D and output features M of one adapted layer."""

    title: str
    N: int
    D: int
    M: int


SHAPES = (
    Shape("ViT-B/16, 64 images", 64 * 197, 768, 768),
    Shape("RoBERTa-base, 32 x 128", 32 * 128, 768, 768),
    Shape("Llama-3-8B q, 4 x 2048", 4 * 2048, 4096, 4096),
    Shape("Llama-3-8B v, 4 x 2048", 4 * 2048, 4096, 1024),
    Shape("Wav2Vec2-large, 16 x 10 s", 16 * 499, 1024, 1024),
)

# dtype of the base layer and its activations, dtype of the adapter, dtype of autocast
PRECISIONS = {
    "float32": (torch.float32, torch.float32, None),
    "bf16, adapter float32": (torch.bfloat16, torch.float32, None),
    "bf16, adapter float32, autocast": (torch.bfloat16, torch.float32, torch.bfloat16),
    "bf16": (torch.bfloat16, torch.bfloat16, None),
}


SIDES = ("triton", "lora", "plain")


def predicted(launches: Sequence[Launch], device: Device) -> float:
    """Seconds of these launches on the device, one after the other, by the formula of docs/roofline.md."""
    return sum(
        device.launch + max(one.bytes / device.bandwidth, one.flops / device.rates[one.dtype]) for one in launches
    )


def dispatched(side: str, shape: Shape, precision: str = "float32") -> list[Launch]:
    """Operators of a side's forward and backward with the base layer, counted on tensors without memory."""
    base, adapter, autocast = PRECISIONS[precision]
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with fake:
            x, grad_y = torch.empty(shape.N, shape.D, dtype=base), torch.empty(shape.N, shape.M, dtype=base)
        model = sides.OneLinear(shape.D, shape.M, base)
        built = sides.layer_side(side, model, x.requires_grad_(), grad_y, adapter=adapter, autocast=autocast)
        for module in built.module.modules():
            for name, p in module.named_parameters(recurse=False):
                setattr(module, name, nn.Parameter(fake.from_tensor(p.detach()), p.requires_grad))
        with fake, Cost() as cost:
            built.run()
    return cost.operators


def fused_launches(shape: Shape, precision: str = "float32") -> list[Launch]:
    """The launches of our Triton layer, beyond the base layer."""
    base, adapter, autocast = PRECISIONS[precision]
    layer = fused.Layer(shape.N, shape.D, shape.M, x_bytes=base.itemsize, p_bytes=adapter.itemsize)
    return [replace(one, dtype=autocast or one.dtype) for one in fused.launches(layer)]


def beyond_base(side: str, shape: Shape, precision: str, device: Device) -> float:
    """Predicted seconds of a side on the device, minus those of the base layer; `triton` is ours."""
    if side == "triton":
        return predicted(fused_launches(shape, precision), device)
    with_base, alone = (predicted(_dispatched(name, shape, precision), device) for name in (side, "base"))
    return with_base - alone


_dispatched = functools.cache(dispatched)


def host(side: str, precision: str) -> float:
    """Measured host seconds of a side beyond the base layer; those of float32 if no other was measured."""
    steps = host_cost.stored()["steps"]
    us = steps.get(precision, steps["float32"])
    return float(us[side] - us["base"]) / 1e6


def pace(on_host: float, on_device: float) -> str:
    """Microseconds of the slower of host and device, and which one it is."""
    return f"{1e6 * max(on_host, on_device):,.0f} {'host' if on_host > on_device else 'device'}"


def devices_table() -> list[str]:
    """The numbers of the devices."""
    lines = [row(["device", "bandwidth, TB/s", "float32, TFLOP/s", "bf16, TFLOP/s"])]
    lines.append(row(["---"] * 4))
    for device in DEVICES.values():
        rates = [f"{device.rates[dtype] / 1e12:g}" for dtype in (torch.float32, torch.bfloat16)]
        lines.append(row([device.name, f"{device.bandwidth / 1e12:g}", *rates]))
    return lines


def table() -> list[str]:
    """Predicted microseconds of every shape, precision and device for three sides, and what decides."""
    names = [f"{device}: {sides.TITLES[side]}" for device in DEVICES for side in SIDES]
    lines = [row(["layer (N, D, M)", "precision", *names]), row(["---"] * (2 + len(names)))]
    for shape in SHAPES:
        for precision in PRECISIONS:
            cells = [
                pace(host(side, precision), beyond_base(side, shape, precision, device))
                for device in DEVICES.values()
                for side in SIDES
            ]
            lines.append(row([f"{shape.title} ({shape.N}, {shape.D}, {shape.M})", precision, *cells]))
    return lines


def write() -> list[list[str]]:
    """Write the tables into the page, and return them."""
    tables = {"devices": devices_table(), "predictions": table()}
    for mark, lines in tables.items():
        replace_block(PAGE, mark, lines)
    return list(tables.values())


def main() -> None:
    """Write the tables into the page, and print them."""
    for lines in write():
        print(*lines, "", sep="\n")


if __name__ == "__main__":
    main()
