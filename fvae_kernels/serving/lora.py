"""export_as_lora: an adapter as stock LoRA."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .calibration import Statistics, calibrate
from .factors import Directions, directions, lost_energy, ridge_fit, wide
from .folders import folder_of
from .layers import AdaptedLayer, adapted_layers, check_served, evaluating
from .lora_experts import is_expert
from .lora_files import write_lora
from .options import check_number, check_patterns, check_switches, check_tolerance, rank_of
from .reports import ExportedLayer, LoraReport

RIDGES = (1e-8, 1e-6, 1e-4, 1e-2, 1e-1, 1.0)  # relative penalties, of which the best is taken


@dataclass(frozen=True)
class Factors:
    """One layer as LoRA: the update is ``s (B A x + bias)``, with s the layer's scale."""

    A: Tensor  # [k, D]
    B: Tensor  # [M, k]
    bias: Tensor | None  # [M]
    lost: float


@torch.no_grad()
def export_as_lora(
    model: nn.Module,
    folder: str | Path,
    calibration: Iterable[Any] | None = None,
    *,
    rank: int | Mapping[str, int] | None = None,
    tolerance: float = 0.0,
    bias: bool = False,
    ridge: float | None = None,
    metric: Callable[[nn.Module], float] | None = None,
    uniform_rank: bool = True,
    adapter_name: str = "default",
) -> LoraReport:
    """Write an adapter as a LoRA adapter of stock PEFT, for everything that serves LoRA; this package is not needed.

    A linear encoder is LoRA: the folder holds ``A = M_1`` and B, bit for bit, with the scale as lora_alpha. An encoder
    with hidden layers is not linear in x. Then A is the ridge regression of mean_1 on the layer's calibration inputs,
    and the report says which share of the update's energy ``sum |s B mean_1|^2`` is lost, measured on tokens that are
    kept out of the fit (one example of eight, up to 2048 tokens of each layer).

    A smaller `rank` truncates the fitted update in the metric of the inputs' covariance (reduced-rank regression). That
    loses less than truncating its matrix, as `peft.convert_to_lora` does. Without `calibration` only a linear encoder
    can be exported or truncated, and its inputs count as white.

        report = fk.export_as_lora(model, "runs/lora", calibration=batches, tolerance=1e-3)
        peft.PeftModel.from_pretrained(base_model, "runs/lora").merge_and_unload()

    vLLM and llama.cpp know one rank or one lora_alpha for all layers, so smaller ranks are padded with zeros. vLLM
    takes no modules_to_save, and the converter of llama.cpp no tensors but A and B: for them, export adapters that have
    no trained head beside them, and leave `bias` off.

    Args:
        model: a PeftModel, or any model with adapted layers. A trained head of a PeftModel (modules_to_save), and
            modules that are trained beside the layers of `replace_linears`, are written too.
        folder: where ``adapter_config.json`` and ``adapter_model.safetensors`` go.
        calibration: batches of inputs like those to be served: mappings or tuples of arguments, or single arguments.
        rank: rank for all layers, or by module name pattern; at most the adapter's. None keeps the adapter's, or
            chooses by `tolerance`.
        tolerance: share of the energy that truncation may lose in each layer, on top of what the linear fit loses.
        bias: fit a constant too, as PEFT's lora_bias. PEFT merges it where the base layer has a bias.
        ridge: penalty of the regression, relative to the inputs' mean square. None takes the one of 1e-8 ... 1 that
            loses least on the tokens kept aside.
        metric: called with the model in eval mode, as adapted and then as exported; the report has both numbers.
        uniform_rank: False writes each layer at its own rank, with rank_pattern and alpha_pattern. It is smaller, and
            PEFT reads it right.
        adapter_name: the adapter.

    Returns:
        A LoraReport; ``print`` it for a line per layer.

    Raises:
        ValueError: no such adapter; it samples at inference; hidden layers without calibration data; a rank above the
            adapter's; one rank and a tolerance; a value out of range; `bias` where a base layer has none, or with a
            linear encoder; a folder that is a file. Nothing is written then.
        TypeError: calibration data that is no iterable of batches; a metric that gives no number; no model or path.
    """
    path, layers = folder_of(folder), adapted_layers(model, adapter_name)
    check_tolerance(tolerance)
    check_switches(bias=bias, uniform_rank=uniform_rank)
    check_number("ridge", ridge, "a relative penalty above 0", low=0, above=True)
    if isinstance(rank, int) and tolerance > 0:
        raise ValueError(f"rank={rank} and tolerance={tolerance} both say where to truncate: leave one of them out")
    if isinstance(rank, Mapping):
        check_patterns(rank, layers)
    ranks = {layer.name: rank_of(rank, layer) for layer in layers}
    _check(layers, calibration, bias)
    if metric is not None:
        if not callable(metric):
            raise TypeError(f"metric is a {type(metric).__name__}; expected a function of the model")
        check_served(layers, adapter_name, "the metric")
    needed = [layer for layer in layers if _is_hidden(layer) or ranks[layer.name] is not None or tolerance > 0]
    sums: dict[str, Statistics] = {}
    if calibration is not None and needed:
        sums = calibrate(model, needed, calibration, adapter_name, inputs=_is_hidden)
    factors = {
        layer.name: _factors(layer, sums.get(layer.name), ranks[layer.name], tolerance, bias, ridge) for layer in layers
    }
    before, after = (None, None) if metric is None else _measure(model, layers, factors, metric)
    write_lora(model, path, layers, factors, uniform_rank, adapter_name)
    rows = tuple(_row(layer, factors[layer.name]) for layer in layers)
    return LoraReport(str(folder), rows, before, after)


def _is_hidden(layer: AdaptedLayer) -> bool:
    return bool(layer.adapter.config.encoder_hidden)


def _check(layers: list[AdaptedLayer], calibration: Any, bias: bool) -> None:
    if any(layer.adapter.config.sample_at_inference for layer in layers):
        raise ValueError(
            "sample_at_inference=True makes the update random; LoRA can serve the mean only: set it to False"
        )
    hidden = [layer.name for layer in layers if _is_hidden(layer)]
    if hidden and calibration is None:
        raise ValueError(
            f"the encoder of {hidden[0]!r} has hidden layers, so its update is no linear function of the input: pass "
            "calibration data, on which the best linear one is fitted"
        )
    if bias and not hidden:
        raise ValueError("bias=True is not allowed: a linear encoder has no bias, and LoRA is exact without one")
    without = [layer.name for layer in layers if _base_bias(layer) is None or is_expert(layer)]
    if bias and without:
        raise ValueError(f"bias=True is not allowed: the base layer {without[0]!r} has no bias of its own")


def _base_bias(layer: AdaptedLayer) -> Tensor | None:
    return getattr(layer.module.base_layer, "bias", None)


def _factors(
    layer: AdaptedLayer, sums: Statistics | None, rank: int | None, tolerance: float, bias: bool, ridge: float | None
) -> Factors:
    """The layer as LoRA of this rank, or of the rank that the tolerance allows."""
    adapter = layer.adapter
    B, M1 = adapter.B.detach(), adapter.encoder1_mean_weight.detach()
    if _is_hidden(layer):
        assert sums is not None
        return _fitted(B, sums, rank, tolerance, bias, ridge)
    if (rank is None or rank == adapter.config.rank) and tolerance == 0:
        return Factors(M1, B, None, 0.0)
    moment = wide(M1) @ wide(M1).T if sums is None else sums.latents / sums.tokens
    found = directions(B, moment)
    k = found.rank(tolerance, B.dtype) if rank is None else rank
    A, B_k = found.into[:k] @ wide(M1), found.out[:, :k]
    if sums is None:
        lost = float(found.energies[k:].sum() / found.energies.sum()) if found.energies.sum() > 0 else 0.0
    else:
        m = sums.kept_aside()[1]
        lost = lost_energy(m @ wide(B).T, m @ found.into[:k].T @ B_k.T)
    return Factors(A.to(M1), B_k.to(B), None, lost)


def _fitted(
    B: Tensor, sums: Statistics, rank: int | None, tolerance: float, bias: bool, ridge: float | None
) -> Factors:
    """Reduced-rank ridge regression, with the best penalty of `RIDGES` unless one is given."""
    assert sums.inputs is not None
    assert sums.products is not None
    full = wide(B)
    x, m = sums.kept_aside()
    update, best = m @ full.T, None
    for candidate in RIDGES if ridge is None else (ridge,):
        fit = ridge_fit(sums.inputs, sums.products, candidate, bias)
        lost = lost_energy(update, (x @ fit.W.T + fit.c) @ full.T)
        if best is None or lost < best[0]:
            best = lost, fit
    assert best is not None
    fit = best[1]
    found: Directions = directions(full, fit.moment)
    k = found.rank(tolerance, B.dtype) if rank is None else rank
    A, B_k = found.into[:k] @ fit.W, found.out[:, :k]
    constant = None
    if bias:  # the mean of the update, less what A adds to it
        mean_x = sums.inputs[-1, :-1] / sums.tokens
        constant = full @ (sums.products[-1] / sums.tokens) - B_k @ (A @ mean_x)
    served = x @ A.T @ B_k.T + (0 if constant is None else constant)
    return Factors(A.to(B), B_k.to(B), None if constant is None else constant.to(B), lost_energy(update, served))


def _measure(
    model: nn.Module, layers: list[AdaptedLayer], factors: Mapping[str, Factors], metric: Callable[[nn.Module], float]
) -> tuple[float, float]:
    with evaluating(model):
        before = _number(metric(model))
        with serving(layers, factors):
            return before, _number(metric(model))


def _number(value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"metric returned {value!r}; expected a number") from error


@contextmanager
def serving(layers: list[AdaptedLayer], factors: Mapping[str, Factors]) -> Iterator[None]:
    """In this context the adapters infer as their LoRA would."""

    def infer_of(layer: AdaptedLayer) -> Callable[..., Tensor]:
        found, scaling = factors[layer.name], layer.adapter.config.scaling

        def infer(x: Tensor, base: Tensor | None = None) -> Tensor:
            update = scaling * F.linear(F.linear(x, found.A), found.B, found.bias)
            return update if base is None else base + update.to(base.dtype)

        return infer

    try:
        for layer in layers:
            layer.adapter.__dict__["infer"] = infer_of(layer)
        yield
    finally:
        for layer in layers:
            layer.adapter.__dict__.pop("infer", None)


def _row(layer: AdaptedLayer, found: Factors) -> ExportedLayer:
    served = [t for t in (found.A, found.B, found.bias) if t is not None]
    before = sum(p.nbytes for p in layer.adapter.parameters())
    after = sum(t.nbytes for t in served)
    return ExportedLayer(layer.name, layer.adapter.config.rank, len(found.A), found.lost, before, after)
