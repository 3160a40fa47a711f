"""export_for_inference: the parts of an adapter that serving needs, in a file of their own."""

import copy
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft import get_peft_model_state_dict

from ..nn.linear import FusedFVAELinear
from ..nn.parameters import is_served
from ..serving.folders import CONTAINER, WEIGHTS, folder_of, write_folder
from ..serving.heads import base_class
from ..serving.layers import check_model, peft_config
from ..serving.reports import ExportedLayer
from .config import FVAELoraConfig
from .trimmed_export import trim_export


@dataclass(frozen=True)
class ExportReport:
    """Result of `export_for_inference`: sizes of the adapter's own tensors, in bytes."""

    folder: str
    full_bytes: int
    served_bytes: int
    layers: tuple[ExportedLayer, ...] = ()  # of a trimmed export

    def __str__(self) -> str:
        summary = (
            f"{self.folder}: {self.served_bytes / 1e3:,.1f} kB instead of {self.full_bytes / 1e3:,.1f} kB, "
            f"{self.full_bytes / self.served_bytes:.1f} times smaller"
        )
        return "\n".join((summary, *map(str, self.layers)))


def export_for_inference(
    model: Any,
    folder: str | Path,
    adapter_name: str = "default",
    *,
    tolerance: float | None = None,
    calibration: Iterable[Any] | None = None,
) -> ExportReport:
    """Save the parts of an adapter that serving needs: encoder 1's mean path, B, and the modules_to_save.

    `PeftModel.from_pretrained` loads the folder. The adapter then has the outputs of the full one in eval mode, and
    cannot be trained.

    With a `tolerance` each layer is trimmed to the smallest rank that keeps its update within it: of all updates of
    that rank the one that loses least on the calibration data. Hidden units that fire for no calibration token are
    dropped. Without data the inputs of a linear encoder count as white, and z_1 of another as its prior has it.

    Args:
        model: a PeftModel.
        folder: where ``adapter_config.json`` and ``adapter_model.safetensors`` go.
        adapter_name: the adapter to export.
        tolerance: share of a layer's update energy ``sum |s B mean_1|^2`` that may be lost, from 0 to below 1; 0 drops
            what changes nothing. None trims nothing.
        calibration: batches of inputs like those to be served: mappings or tuples of arguments, or single arguments.
            One example in eight stays aside, and the report's losses are measured on it.

    Returns:
        An ExportReport; ``print`` it to see how much smaller the export is, for a trimmed one layer by layer.

    Raises:
        ValueError: if the model has no such FVAE-LoRA adapter, or it samples at inference; calibration data without a
            tolerance; a tolerance out of range; data that does not reach every layer. Nothing is written then.
        TypeError: calibration data that is no iterable of batches.
    """
    check_model(model)
    path, config = folder_of(folder), peft_config(model, adapter_name)
    if not isinstance(config, FVAELoraConfig):
        known = sorted(getattr(model, "peft_config", {}))
        plain = any(isinstance(module, FusedFVAELinear) for module in model.modules())
        advice = (
            ". Layers of replace_linears are exported by export_as_lora, or saved by save_adapters" if plain else ""
        )
        raise ValueError(f"the model has no FVAE-LoRA adapter {adapter_name!r}; its adapters are {known}{advice}")
    config = copy.deepcopy(config)
    if config.sample_at_inference:
        raise ValueError("sample_at_inference=True needs encoder 1's logvar too: save the whole adapter instead")
    config.inference_only = config.inference_mode = True
    state = get_peft_model_state_dict(model, adapter_name=adapter_name)
    method = config.to_fvae_config()
    own = {key: key.rpartition(f"{CONTAINER}.")[2] for key in state if f".{CONTAINER}." in key}
    served = {key: t for key, t in state.items() if key not in own or is_served(own[key], method)}
    rows: tuple[ExportedLayer, ...] = ()
    if tolerance is not None or calibration is not None:
        rows = trim_export(model, config, served, tolerance, calibration, adapter_name)
    write_folder(path, {WEIGHTS: served})
    config.save_pretrained(str(folder), auto_mapping_dict=base_class(model) if config.task_type is None else None)
    full, left = (sum(tensors[key].nbytes for key in own if key in tensors) for tensors in (state, served))
    return ExportReport(str(folder), full, left, rows)
