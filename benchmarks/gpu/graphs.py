"""Captured steps: new noise at each replay, no allocations, and a host that never waits for the device."""

from typing import Any

import torch

import fvae_kernels as fk

from .. import sides
from .case import Found, Plan
from .clock import captured, milliseconds, times

TOKENS, D = 1576, 768


def _side(plan: Plan, name: str) -> sides.Side:
    tokens, size = (24, 12) if plan.dry else (TOKENS, D)
    return sides.layer_sides((name,), tokens, size, device=plan.device)[name]


def noise(plan: Plan) -> Found:
    """Each replay draws new noise, and a seed set before a replay repeats it."""
    side = _side(plan, "triton")
    outputs: list[torch.Tensor] = []

    def forward() -> None:
        outputs[:] = [side.forward()]

    replay = captured(plan, forward)

    def drawn(seed: int | None = None) -> torch.Tensor:
        if seed is not None:
            torch.manual_seed(seed)
        replay()
        return outputs[0].detach().clone()

    for parameter in side.module.parameters():
        parameter.data.normal_(std=0.1)  # B starts at zero, which would hide the noise
    found = {
        "new at each replay": not torch.equal(drawn(), drawn()),
        "follows the seed": torch.equal(drawn(1), drawn(1)),
    }
    if not all(found.values()):
        raise AssertionError(f"noise under capture: {found}")
    return found


def step(plan: Plan) -> Found:
    """Forward, backward and AdamW as one graph: parameters change at each replay and stay finite."""
    side = _side(plan, "triton")
    trained = [p for p in side.module.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3, capturable=not plan.dry)

    def run() -> None:
        side.run()
        optimizer.step()

    replay = captured(plan, run)
    before = [p.detach().clone() for p in trained]
    replay()
    after = [p.detach().clone() for p in trained]
    moved = sum(not torch.equal(a, b) for a, b in zip(before, after, strict=True))
    if moved == 0 or not all(p.isfinite().all() for p in after):
        raise AssertionError(f"a replayed step moved {moved} of {len(trained)} parameters, or they are not finite")
    return {"moved": moved, "of": len(trained), "ms": milliseconds(plan, replay)}


def allocations(plan: Plan) -> Found:
    """Allocations of a step, and memory that steps leave allocated, for ours and LoRA."""
    found: Found = {}
    for name in ("triton", "lora"):
        side = _side(plan, name)
        for _ in range(1 if plan.dry else 3):
            side.run()
        before = _memory(plan)
        for _ in range(1 if plan.dry else 10):
            side.run()
        after = _memory(plan)
        found[name] = {key: (after[key] - before[key]) / 10 for key in before}
    if found["triton"]["bytes left"] > 0:
        raise AssertionError(f"steps leave memory behind: {found}")
    return found


def _memory(plan: Plan) -> dict[str, int]:
    if plan.dry:
        return {"allocations": 0, "device allocations": 0, "bytes left": 0}
    found = torch.cuda.memory_stats()
    return {
        "allocations": found["allocation.all.allocated"],
        "device allocations": found["segment.all.allocated"],
        "bytes left": found["allocated_bytes.all.current"],
    }


def waits(plan: Plan) -> Found:
    """A step in which PyTorch raises if the host waits for the device."""
    side = _side(plan, "triton")
    side.run()
    if plan.dry:
        return {}
    torch.cuda.set_sync_debug_mode("error")
    try:
        side.run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return {}


def reduce_overhead(plan: Plan) -> Found:
    """``torch.compile(mode="reduce-overhead")`` of the layer with our kernels, forward and backward."""
    side = _side(plan, "triton")
    torch._dynamo.reset()
    how: dict[str, Any] = {"backend": "eager"} if plan.dry else {"mode": "reduce-overhead"}
    compiled = torch.compile(side.module, **how)
    x = side.inputs[0]

    def run() -> None:
        torch.compiler.cudagraph_mark_step_begin()
        with fk.use_backend("triton"):
            compiled(x).float().square().sum().backward()
        for p in (x, *side.module.parameters()):
            p.grad = None

    found = times(plan, run)
    found.pop("graph_ms", None)
    found.pop("graph_error", None)  # this mode captures graphs itself
    return found
