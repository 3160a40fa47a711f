"""Predicted milliseconds beyond the base layer on this device, from the results of part `machine`."""

from typing import Any

import torch

from .. import roofline
from . import results
from .case import Found, Plan


def layer(plan: Plan, shape: Any, precision: str) -> Found:
    """Predictions by side: ours, PEFT's LoRA, plain PyTorch."""
    _, found = results.read(plan.folder / results.NAME)
    machine = {key.removeprefix("machine: "): one.get("found") for key, one in found.items()}
    if not all(machine.get(name) for name in ("launch", "bandwidth", "products")):
        raise RuntimeError("part machine has not found what this device reaches; run it as well")
    rates = {getattr(torch, name): rate for name, rate in machine["products"]["flop_per_second"].items()}
    device = roofline.Device("here", machine["bandwidth"]["bytes_per_second"], rates, machine["launch"]["seconds"])
    where = roofline.Shape(*shape)
    return {side: 1e3 * roofline.beyond_base(side, where, precision, device) for side in roofline.SIDES}
