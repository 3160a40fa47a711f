"""Times of an op, a layer and a model's step. Each side's results are checked before it is timed."""

from dataclasses import replace
from typing import Any

import torch

from .. import experiments, gate, models, roofline, sides
from .case import Found, Plan
from .clock import Run, times

COMPILER = {True: "eager", False: "inductor"}  # backend of torch.compile; True: a dry run


def checked_layer(plan: Plan, shape: Any, precision: str, side: str) -> tuple[Run, Found]:
    """A side of an adapted layer, and the gate's error if it did not pass: wrong sides are timed too."""
    _, N, D, M = shape
    dtype, adapter, autocast = roofline.PRECISIONS[precision]
    where: dict[str, Any] = {"device": plan.device, "compiler": COMPILER[plan.dry]}
    where |= {"dtype": dtype, "adapter": adapter, "autocast": autocast}
    try:
        return experiments.checked_layer((side,), N, D, M, **where)[side].run, {}
    except gate.WrongKernel as error:
        return sides.layer_sides((side,), N, D, M, **where)[side].run, {"wrong": str(error)}


def compile_layer(plan: Plan, shape: Any, precision: str) -> Found:
    """Launch every kernel of the layer's cases once, to fill Triton's cache on disk."""
    run, _ = checked_layer(plan, shape, precision, "triton")
    run()
    return {}


def layer(plan: Plan, shape: Any, precision: str, side: str) -> Found:
    """Forward and backward of an adapted layer."""
    torch._dynamo.reset()
    run, wrong = checked_layer(plan, shape, precision, side)
    return times(plan, run) | wrong


def op(plan: Plan, name: str, size: dict[str, Any], dtype: str, tokens: int, side: str) -> Found:
    """Forward and backward of one op."""
    torch._dynamo.reset()
    run, _ = experiments.checked_op(name, side, tokens, size, getattr(torch, dtype), plan.device, COMPILER[plan.dry])
    return times(plan, run)


def compile_step(plan: Plan, model: str) -> Found:
    """As `compile_layer`, for a model's step."""
    checked_step(plan, model, "triton")[0]()
    return {}


def step(plan: Plan, model: str, side: str) -> Found:
    """A training step under autocast to bfloat16: forward, backward, AdamW. Random weights."""
    run, more = checked_step(plan, model, side)
    return times(plan, run) | more


def checked_step(plan: Plan, model: str, side: str) -> tuple[Run, Found]:
    """A step, the number of samples of its batch, and the gate's error if it did not pass."""
    case = (models.TINY if plan.dry else models.CASES)[model]
    if not plan.dry:
        batch = {"vit": lambda: models.images(64), "roberta": lambda: models.sentences(32, 128)}[model]
        case = replace(case, batch=batch)
    built, batch = models.build(case)
    built, batch = built.to(plan.device), {name: t.to(plan.device) for name, t in batch.items()}
    wrong: Found = {}
    try:
        found = experiments.checked_steps(built, batch, (side,))[side]
    except gate.WrongKernel as error:
        found, wrong = models.step_side(side, built, batch), {"wrong": str(error)}

    def run() -> None:
        with torch.autocast(plan.device, torch.bfloat16):
            found.run()

    return run, {"samples": len(next(iter(batch.values())))} | wrong
