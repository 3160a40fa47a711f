"""Adapter files: what is in them is checked before a model is touched, and the inference path is exported alone."""

import copy
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

CONTAINER = "fvae_adapter"
WEIGHTS, PICKLE = "adapter_model.safetensors", "adapter_model.bin"

Shapes = dict[str, dict[str, tuple[int, ...]]]  # module -> parameter -> shape


def find_weights(folder: str) -> str | None:
    """The safetensors file of a local adapter folder; None for a hub's name. A pickle can run code and is refused."""
    path = os.path.join(folder, WEIGHTS)
    if os.path.isfile(path):
        return path
    if os.path.isfile(os.path.join(folder, PICKLE)):
        raise ValueError(
            f"{folder} holds {PICKLE}, a pickle, which can run code when it is loaded. FVAE-LoRA adapters are read from "
            f"{WEIGHTS} only: save them again with save_pretrained(..., safe_serialization=True), the default"
        )
    return None


def read_shapes(path: str) -> Shapes:
    """Shapes of the adapter's parameters by layer, from the header alone."""
    from safetensors import SafetensorError, safe_open

    shapes: Shapes = {}
    try:
        with safe_open(path, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118 - not a mapping
                module, found, parameter = key.rpartition(f".{CONTAINER}.")
                if found:
                    shapes.setdefault(module, {})[parameter] = tuple(file.get_slice(key).get_shape())
    except (SafetensorError, OSError, ValueError) as error:
        raise ValueError(
            f"{path} cannot be read: {error}. It is truncated or not a safetensors file: copy it again"
        ) from error
    if not shapes:
        raise ValueError(f"{path} holds no FVAE-LoRA weights: no key has {CONTAINER!r} in it")
    return shapes


def check_fits(saved: Shapes, expected: Shapes, model: nn.Module) -> None:
    """Raise unless a saved adapter has just the layers and shapes that `model` would give it.

    Raises:
        ValueError: with the first layer or parameter that does not fit.
    """
    advice = "it was saved from another base model or with another config"
    remaining = dict(saved)
    for name, parameters in expected.items():
        key = next((k for k in remaining if k == name or k.endswith(f".{name}")), None)
        if key is None:
            raise ValueError(f"the saved adapter has no weights for {name!r} of {type(model).__name__}: {advice}")
        found = remaining.pop(key)
        if found != parameters:
            at = next(p for p in sorted({*found, *parameters}) if found.get(p) != parameters.get(p))
            raise ValueError(
                f"the saved adapter does not fit {name!r} of {type(model).__name__}: {at} is {found.get(at, 'missing')} in "
                f"the file and {parameters.get(at, 'unknown')} in the model; {advice}"
            )
    if remaining:
        raise ValueError(
            f"the saved adapter has weights for {sorted(remaining)[0]!r}, which is not adapted here: {advice}"
        )


@dataclass(frozen=True)
class ExportReport:
    """What `export_for_inference` wrote: sizes of the adapter's own tensors, in bytes."""

    folder: str
    full_bytes: int
    served_bytes: int

    def __str__(self) -> str:
        return (
            f"{self.folder}: {self.served_bytes / 1e3:,.1f} kB instead of {self.full_bytes / 1e3:,.1f} kB, "
            f"{self.full_bytes / self.served_bytes:.1f} times smaller"
        )


def export_for_inference(model: Any, folder: str | Path, adapter_name: str = "default") -> ExportReport:
    """Save what serving needs of an adapter: encoder 1's mean path and B, and the modules_to_save.

    `PeftModel.from_pretrained` loads the folder; the adapter then gives the outputs of the full one in eval mode and
    cannot be trained.

    Args:
        model: a PeftModel.
        folder: where ``adapter_config.json`` and ``adapter_model.safetensors`` go.
        adapter_name: the adapter to export.

    Returns:
        An ExportReport; ``print`` it to see how much smaller the export is.

    Raises:
        ValueError: if the model has no such FVAE-LoRA adapter, or it samples at inference.
    """
    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file

    from ..adapter import is_served
    from .config import FVAELoraConfig

    config = getattr(model, "peft_config", {}).get(adapter_name)
    if not isinstance(config, FVAELoraConfig):
        known = sorted(getattr(model, "peft_config", {}))
        raise ValueError(f"the model has no FVAE-LoRA adapter {adapter_name!r}; its adapters are {known}")
    config = copy.deepcopy(config)
    if config.sample_at_inference:
        raise ValueError("sample_at_inference=True needs encoder 1's logvar too: save the whole adapter instead")
    config.inference_only = config.inference_mode = True
    state = get_peft_model_state_dict(model, adapter_name=adapter_name)
    method = config.to_fvae_config()
    own = {key: key.rpartition(f"{CONTAINER}.")[2] for key in state if f".{CONTAINER}." in key}
    served = {
        key: t.detach().cpu().contiguous() for key, t in state.items() if key not in own or is_served(own[key], method)
    }
    os.makedirs(folder, exist_ok=True)
    save_file(served, os.path.join(folder, WEIGHTS), metadata={"format": "pt"})
    config.save_pretrained(str(folder))
    sizes = {key: state[key].numel() * state[key].element_size() for key in own}
    return ExportReport(str(folder), sum(sizes.values()), sum(size for key, size in sizes.items() if key in served))
