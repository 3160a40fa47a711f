"""The gate: a side is timed only after it was shown to compute what the reference computes."""

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

import fvae_kernels as fk
from fvae_kernels import testing
from fvae_kernels.testing import Results

from .sides import Side, adapters, backend_of, environment, without_dropout

# Errors against float64 may be FACTOR times those of plain PyTorch in the same dtype, plus FLOOR float32 roundings of
# the largest entry, in case plain PyTorch rounds luckily. Measured of our kernels: 1.5 times at most; 1.2 roundings for
# the kl of a layer, a small difference of large sums. torch.compile adds tokens one by one, plain PyTorch in pairs, so
# its error grows as the square root of their number: 1.9 roundings at 1576 tokens.
FACTOR, FLOOR, COMPILED = 2.0, 2.0, 0.1
TOKENS = 96  # for the check of an adapter
# Terms of the objective are small differences of large sums, whose roundings stay when the sums cancel: nll adds
# log(2 pi) / 2 = 0.9 for each feature, kl -1/2 for each latent entry, gamma half of (mean - 1.5)^2 + variance for each.
# At the sizes that are measured the summands are well over one nat together, so one nat in place of a smaller result is
# strict.
NATS = ("loss", "nll", "kl", "gamma")


class WrongKernel(AssertionError):  # noqa: N818  (the name says what happened)
    """A side computes something else than it should, so its time means nothing."""


def check_op(
    op: str, function: Callable[..., Any], inputs: Mapping[str, Any], compiled: bool = False, **options: Any
) -> None:
    """Compare outputs and gradients of `function` with ``reference.<op>``. Sums by torch.compile may be worse.

    Raises:
        WrongKernel: if errors against float64 are larger than plain PyTorch in the same dtype explains.
    """
    rounded, exact = testing.exact_and_rounded(op, inputs)
    tokens = next(iter(inputs.values())).shape[:-1].numel()
    floor = max(FLOOR, COMPILED * tokens**0.5) if compiled else FLOOR
    dtype = next(iter(testing.leaves(inputs).values())).dtype
    no_worse(op, testing.run(function, inputs, **options), rounded, exact, floor + half_roundings(dtype))


def check_adapter(adapter: Any, backend: str, tokens: int | None = None) -> None:
    """Compare update, terms and all gradients of an adapter with the reference; random parameters, no dropout.

    Raises:
        WrongKernel: as `check_op`.
    """
    twin, tokens = without_dropout(adapter), tokens or TOKENS
    exact = run_adapter(copy.deepcopy(twin).double(), "reference", tokens)
    rounded, floor = run_adapter(twin, "reference", tokens), FLOOR + half_roundings(adapter.B.dtype)
    no_worse("layer", run_adapter(twin, backend, tokens), rounded, exact, floor)


def run_adapter(adapter: Any, backend: str, tokens: int) -> Results:
    """Results of one forward and backward on fixed numbers, equal for every dtype."""
    random = testing.Random(1, adapter.B.dtype, adapter.B.device)
    R = adapter.config.rank
    x, noise = random(tokens, adapter.in_features), tuple(random(tokens, R, grad=False) for _ in range(2))
    weight = random(tokens, adapter.out_features, grad=False)
    adapter.train().requires_grad_()
    with torch.enable_grad(), fk.use_backend(backend):
        delta, terms = adapter(x, noise)
        leaves = {"x": x, **{name: p for name, p in adapter.named_parameters() if p.requires_grad}}
        loss = (delta * weight).sum() + 0.5 * terms.loss
        grads = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True, materialize_grads=True)
    named = {f"grad_{name}": grad for name, grad in zip(leaves, grads, strict=True)}
    return {"delta": delta.detach(), **{f: getattr(terms, f).detach() for f in terms._fields}, **named}


def check_sides(sides: Mapping[str, Side], evaluate: Callable[[nn.Module], Tensor], base: Tensor) -> None:
    """Check that every side starts as the base model in eval mode, and every FVAE adapter trains as the reference.

    Args:
        sides: by name, as built.
        evaluate: gives a module's output on a small batch.
        base: that output of the base model.

    Raises:
        WrongKernel: naming the side.
    """
    for name, side in sides.items():
        with torch.no_grad(), environment(name):
            training = side.module.training
            found = evaluate(side.module.eval())
            side.module.train(training)
        try:
            half = base.dtype in (torch.float16, torch.bfloat16)  # DoRA rounds its magnitudes there
            torch.testing.assert_close(found, base, rtol=2e-2 if half else 1e-3, atol=1e-2 if half else 1e-4)
        except AssertionError as error:
            raise WrongKernel(f"{name} does not start as the base model: {error}") from None
        backend = backend_of(name)
        if backend not in (None, "reference"):
            shapes = {(a.in_features, a.out_features): a for a in adapters(side.module)}
            for adapter in shapes.values():
                check_adapter(adapter, backend)


def half_roundings(dtype: torch.dtype) -> float:
    """A quarter rounding of a half dtype, in float32 roundings, in case a single number is right by luck; else 0."""
    half = dtype in (torch.float16, torch.bfloat16)
    return torch.finfo(dtype).eps / torch.finfo(torch.float32).eps / 4 if half else 0.0


def no_worse(what: str, actual: Results, rounded: Results, exact: Results, roundings: float) -> None:
    """Root mean square errors against float64: at most FACTOR times the baseline's plus `roundings` of the largest.

    For terms of the objective the largest is at least 1 nat: their roundings are those of their summands.
    """
    for name, truth in exact.items():
        if not truth.numel():
            continue
        ours, baseline = (float((found[name].double() - truth).square().mean().sqrt()) for found in (actual, rounded))
        largest = max(float(truth.abs().max()), 1.0 if name in NATS else 0.0)
        floor = roundings * torch.finfo(torch.float32).eps * largest
        if not ours <= FACTOR * baseline + floor:
            raise WrongKernel(
                f"{what} differs from the reference: {name}: error {ours:.1e}, plain PyTorch {baseline:.1e}"
            )
