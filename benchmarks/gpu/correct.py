"""Values and gradients of the kernels on the device, against plain PyTorch in float64 on the same inputs."""

from typing import Any

import torch

import fvae_kernels as fk
from fvae_kernels import testing
from tests.helpers.layer_inputs import layer_inputs, plain, run_layer

from .. import gate
from .case import Found, Plan

TOKENS = 960  # whole blocks, as with the 96 of the gate: the same compiled kernels
RECIPE = {"rank": 16, "encoder_hidden": (16,), "decoder_hidden": (128, 128, 128)}
TINY = {"rank": 4, "encoder_hidden": (5,), "decoder_hidden": (6,)}


def op(plan: Plan, name: str, size: dict[str, Any], dtype: str) -> Found:
    """An op: its error against float64 is no larger than plain PyTorch in the same dtype explains."""
    tokens = 24 if plan.dry else TOKENS
    inputs = testing.INPUTS[name]((tokens,), dtype=getattr(torch, dtype), device=plan.device, **size)
    gate.check_op(name, getattr(fk, name), inputs, backend="triton")
    return {}


def layer(plan: Plan, name: str, masked: bool) -> Found:
    """The layer at the recipe's sizes: five results and all gradients. `name` is a dtype or "autocast"."""
    tokens, D, M, options = (20, 12, 10, TINY) if plan.dry else (TOKENS, 768, 768, RECIPE)
    autocast = name == "autocast"
    dtype = torch.float32 if autocast else getattr(torch, name)
    floor = gate.FLOOR + gate.half_roundings(torch.bfloat16 if autocast else dtype)
    for seed in range(1 if plan.dry else 2):
        inputs = layer_inputs((tokens,), D, M, mask=masked, dtype=dtype, device=plan.device, seed=seed, **options)
        with torch.autocast(plan.device, torch.bfloat16, enabled=autocast):
            actual = testing.run(run_layer, inputs, backend="triton")
            rounded = testing.run(plain, inputs)
        exact = testing.run(plain, testing.convert(inputs, torch.float64))
        gate.no_worse("layer", *map(_named, (actual, rounded, exact)), floor)
    return {}


def _named(found: testing.Results) -> testing.Results:
    """Rename results for the gate."""
    names = dict(zip((f"out{i}" for i in range(5)), ("y", *gate.NATS), strict=True))
    return {names.get(name, name): value for name, value in found.items()}


def dropout(plan: Plan) -> Found:
    """Equal seeds drop equal activations, another seed drops others; gradients are finite."""
    D, options = (12, TINY) if plan.dry else (768, RECIPE)
    torch.manual_seed(0)
    config = fk.FVAEConfig(**options, dropout=0.1, kl_weight=2.0)
    linear = torch.nn.Linear(D, D, device=plan.device)
    layer = fk.FusedFVAELinear.from_linear(linear, config).to(plan.device)
    x = torch.randn(24 if plan.dry else TOKENS, D, device=plan.device)

    def loss(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        with fk.use_backend("triton"):
            return layer.forward_with_terms(x)[1].loss

    first = loss(1)
    if not torch.equal(first, loss(1)):
        raise AssertionError("the same seed gave another loss")
    if torch.equal(first, loss(2)):
        raise AssertionError("another seed gave the same loss")
    first.backward()
    bad = [name for name, p in layer.named_parameters() if p.grad is not None and not p.grad.isfinite().all()]
    if bad:
        raise AssertionError(f"gradients are not finite: {', '.join(bad)}")
    return {}
