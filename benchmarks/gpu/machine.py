"""The device and its measured peaks: seconds of a launch, bandwidth of a copy, rates of products."""

import torch

from .. import machine
from .case import Found, Plan
from .clock import milliseconds


def software(plan: Plan) -> Found:
    """Versions, commit, processor and GPU."""
    found = machine.describe() | {"cuda": torch.version.cuda, "hip": torch.version.hip}
    if not plan.dry:
        gpu = torch.cuda.get_device_properties(0)
        found |= {"gpu": gpu.name, "multiprocessors": gpu.multi_processor_count, "memory": gpu.total_memory}
    return found


def launch(plan: Plan) -> Found:
    """Seconds of one operator on one number; mean of a hundred in a row."""
    one = torch.ones(1, device=plan.device)
    return {"seconds": milliseconds(plan, lambda: [one.add_(1) for _ in range(100)]) / 1e3 / 100}


def bandwidth(plan: Plan) -> Found:
    """Bytes per second, read and written, of a copy of 2 GB."""
    source = torch.randn((1 if plan.dry else 512) << 20, device=plan.device)
    target = torch.empty_like(source)
    return {"bytes_per_second": 2 * 4 * source.numel() / (milliseconds(plan, lambda: target.copy_(source)) / 1e3)}


def products(plan: Plan) -> Found:
    """FLOP per second of a square product. Random numbers, since zeros draw less power."""
    size, rates = 16 if plan.dry else 8192, {}
    for dtype in (torch.float32, torch.bfloat16):
        a, b = (torch.randn(size, size, device=plan.device).to(dtype) for _ in range(2))
        rates[str(dtype)[6:]] = 2 * size**3 / (milliseconds(plan, lambda a=a, b=b: a @ b) / 1e3)
    return {"flop_per_second": rates}
