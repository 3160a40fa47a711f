"""export_for_inference with a tolerance: ranks and hidden layers as small as it allows."""

import math
from collections.abc import Iterable
from typing import Any

from torch import Tensor

from ..serving.calibration import Statistics, calibrate
from ..serving.folders import CONTAINER
from ..serving.layers import AdaptedLayer, adapted_layers, exact_pattern
from ..serving.options import check_tolerance
from ..serving.reports import ExportedLayer
from ..serving.saved import plain_name
from ..serving.trimmed import TrimmedPath, trim_path


def trim_export(
    model: Any,
    config: Any,
    served: dict[str, Tensor],
    tolerance: float | None,
    calibration: Iterable[Any] | None,
    adapter_name: str,
) -> tuple[ExportedLayer, ...]:
    """Trim an export: its tensors `served` and its config, in place. Returns a row for each layer."""
    if tolerance is None:
        raise ValueError("calibration data needs a tolerance: the share of each update's energy that may be lost")
    check_tolerance(tolerance)
    layers = adapted_layers(model, adapter_name)
    sums: dict[str, Statistics] = {}
    if calibration is not None:
        sums = calibrate(model, layers, calibration, adapter_name)
    paths = {layer.name: trim_path(layer, sums.get(layer.name), tolerance) for layer in layers}
    prefixes = {
        plain_name(key.partition(f".{CONTAINER}.")[0]): key.rpartition(".")[0]
        for key in served
        if f".{CONTAINER}." in key
    }
    for name, path in paths.items():
        for parameter, tensor in path.tensors.items():
            served[f"{prefixes[name]}.{parameter}"] = tensor
    config.rank_pattern = {exact_pattern(name): path.rank for name, path in paths.items()}
    config.alpha_pattern = {exact_pattern(layer.name): _alpha(layer, paths[layer.name].rank) for layer in layers}
    if config.encoder_hidden or config.encoder_hidden_pattern:
        config.encoder_hidden_pattern = {exact_pattern(name): path.hidden for name, path in paths.items()}
    return tuple(_row(layer, paths[layer.name]) for layer in layers)


def _alpha(layer: AdaptedLayer, rank: int) -> float:
    """alpha with which the scale of the update stays as it was configured."""
    config = layer.adapter.config
    share = rank / config.rank
    return layer.adapter.alpha * (math.sqrt(share) if config.rslora else share)


def _row(layer: AdaptedLayer, path: TrimmedPath) -> ExportedLayer:
    before = sum(p.nbytes for p in layer.adapter.parameters())
    after = sum(t.nbytes for t in path.tensors.values())
    return ExportedLayer(layer.name, layer.adapter.config.rank, path.rank, path.lost, before, after, path.hidden)
