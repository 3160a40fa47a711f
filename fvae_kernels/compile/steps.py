"""The kinds of training steps that an adapted layer may take, and the launches of each."""

import itertools
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..config import FVAEConfig
from ..nn.adapter import FVAEAdapter
from ..nn.quantised import stored_weight
from ..ops._layer_inputs import Arriving, Needs, Options, Tensors
from ..ops._layer_path import uncovered
from ..ops._raw import triton_part

tables: Any = triton_part("tables")
FEW_AND_MANY = (1024, tables.FEW_TOKENS)
META = torch.device("meta")


@dataclass(frozen=True)
class Layer:
    """All that matters of an adapted layer: sizes, config, dtypes of the adapter and of the base layer."""

    D: int
    M: int
    config: FVAEConfig
    dtype: torch.dtype
    base: torch.dtype


@dataclass(frozen=True)
class Step:
    """One kind of step of a layer: with its data, all that decides which kernels it launches."""

    layer: Layer
    x: torch.dtype
    base: torch.dtype  # of the base layer's output
    products: torch.dtype | None  # autocast's dtype
    tokens: int
    masked: bool
    needs_x: bool  # in a model's first layers x may need no gradient

    def __str__(self) -> str:
        size = "few" if self.tokens < tables.FEW_TOKENS else "many"
        masked = ", masked" if self.masked else ""
        dtypes = f"adapter {_short(self.layer.dtype)}, x {_short(self.x)}, base {_short(self.base)}"
        gradient = "" if self.needs_x else ", no gradient of x"
        return f"{self.layer.D} -> {self.layer.M}, {dtypes}, {size} tokens{masked}{gradient}"


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def layers_of(model: nn.Module) -> list[Layer]:
    """The different adapted layers of a model.

    Raises:
        ValueError: there are none.
    """
    found: dict[Layer, None] = {}
    for module in model.modules():
        base = getattr(module, "base_layer", None)
        if base is None:
            continue
        for adapter in module.modules():
            if isinstance(adapter, FVAEAdapter) and not adapter.inference_only:
                sizes = adapter.in_features, adapter.out_features
                found[Layer(*sizes, adapter.config, adapter.B.dtype, _dtype_of(base))] = None
    if not found:
        raise ValueError(
            f"{type(model).__name__} holds no FVAE adapter that can train; expected a FusedFVAELinear, or a model that "
            "replace_linears or PEFT adapted"
        )
    return list(found)


def _dtype_of(base: nn.Module) -> torch.dtype:
    """Of the base layer's output; a quantised one computes in bfloat16."""
    dtype = stored_weight(base).dtype
    return dtype if dtype.is_floating_point and dtype.itemsize > 1 else torch.bfloat16


def steps_of(
    layers: Sequence[Layer], autocast: torch.dtype | None, tokens: Sequence[int], masked: Sequence[bool]
) -> tuple[list[Step], list[str]]:
    """Every step that these layers may take; and of each layer that the fused kernels do not cover, why not."""
    steps, missing = [], []
    for layer in layers:
        named = dict(_adapter(layer).named_parameters())
        whys = {
            d: uncovered(layer.config, {"x": _empty(0, dtype=d[0]), **named}, (), "triton")
            for d in _dtypes(layer, autocast)
        }
        for dtypes, why in whys.items():
            if why is None:
                cases = itertools.product(tokens, masked, (True, False))
                steps += [Step(layer, *dtypes, *case) for case in cases]
        if None not in whys.values():
            missing.append(
                f"{layer.D} -> {layer.M}: the fused kernels do not cover {' or '.join(map(str, whys.values()))}"
            )
    return steps, missing


def _dtypes(layer: Layer, autocast: torch.dtype | None) -> list[tuple[torch.dtype, torch.dtype, torch.dtype | None]]:
    """Dtypes of x, of the base layer's output, of products. Under autocast x comes from a norm or from a product."""
    if autocast is None:
        return [(layer.base, layer.base, None)]
    products = autocast if layer.dtype == torch.float32 else None
    return [(x, autocast, products) for x in (torch.float32, autocast)]


def _adapter(layer: Layer) -> FVAEAdapter:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the weights of the objective do not matter here
        return FVAEAdapter(layer.D, layer.M, layer.config, device=META, dtype=layer.dtype)


def _empty(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=META)


def run(step: Step) -> None:
    """Forward and backward of the step, on tensors that have no data."""
    layer, config, N = step.layer, step.layer.config, step.tokens
    adapter = _adapter(layer)
    parameters: list[Tensor | None] = [None if name is None else adapter._parameters[name] for name in adapter._order]
    x, base = _empty(N, layer.D, dtype=step.x), _empty(N, layer.M, dtype=step.base)
    mask = _empty(N, dtype=torch.bool) if step.masked else None
    tensors = Tensors(x, parameters, None, None, mask, _empty(dtype=torch.int64))
    options = Options.of(config, config.dropout, step.products)
    steps = triton_part("layer.plan").TritonSteps(parameters, options, config.detach_target)
    _, terms, state, kept = steps.forward(base, tensors)
    arriving = Arriving(torch.empty_like(base), torch.empty_like(terms[0]), None, None, None)
    needs = Needs.of(step.needs_x, [p is not None for p in parameters], options.encoder_hidden, arriving)
    steps.backward(arriving, tensors, state, needs, kept)


def launches(steps: Sequence[Step]) -> Iterator[tuple[str, Any]]:
    """The different launches of these steps, for the driver that is active, each with the step that first needs it."""
    ahead, seen = triton_part("ahead"), set()
    for step in steps:
        with ahead.recording() as found:
            run(step)
        for launched in found:
            key = launched.key()
            if key not in seen:
                seen.add(key)
                yield f"{launched.kernel.__name__.removesuffix('_kernel')}: {step}", launched
