"""A LoRA folder as stock PEFT writes it, and as vLLM and the converter of llama.cpp read it."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from .folders import CONFIG, PREFIX, WEIGHTS, write_folder
from .heads import base_class, trained_heads
from .layers import AdaptedLayer, exact_pattern, peft_config
from .lora_experts import by_parameter, is_expert, stacked, stem, target_parameters


def write_lora(
    model: nn.Module,
    folder: Path,
    layers: list[AdaptedLayer],
    factors: Mapping[str, Any],
    uniform_rank: bool,
    adapter_name: str,
) -> None:
    """Write `factors` and the trained heads of `model` as a LoRA adapter."""
    highest = max(len(f.A) for f in factors.values())
    scales = {layer.name: layer.adapter.config.scaling for layer in layers}
    scale = next(iter(scales.values())) if len(set(scales.values())) == 1 else None  # else it is folded into B
    served = factors if scale is not None else {n: _scaled(found, scales[n]) for n, found in factors.items()}
    plain, groups = [layer.name for layer in layers if not is_expert(layer)], by_parameter(layers)
    sizes = {name: len(served[name].A) for name in plain}  # rank by module or parameter
    sizes |= {name: max(len(served[layer.name].A) for layer in group) for name, group in groups.items()}
    written = dict.fromkeys(sizes, highest) if uniform_rank else sizes
    state = _state(plain, served, written)
    for name, group in groups.items():
        A, B = stacked([served[layer.name] for layer in group], written[name])
        key = f"{PREFIX}{stem(name, groups)}.lora_"
        state |= {f"{key}A.weight": A, f"{key}B.weight": B}
    alpha = (1.0 if scale is None else scale) * highest
    ranks = {exact_pattern(name): rank for name, rank in written.items() if rank != highest}
    heads, modules_to_save = trained_heads(model, adapter_name)
    config = {
        **_identity(model, adapter_name),
        **_fixed(),
        **_beside(model, adapter_name),
        "r": highest,
        "lora_alpha": _whole(alpha),
        "rank_pattern": ranks,
        "alpha_pattern": {pattern: _whole(alpha / highest * rank) for pattern, rank in ranks.items()},
        "target_modules": target_modules(model, plain),
        **({"target_parameters": target_parameters(model, list(groups))} if groups else {}),
        "modules_to_save": modules_to_save,
        "fan_in_fan_out": any(layer.transposed for layer in layers),
        "lora_bias": any(found.bias is not None for found in factors.values()),
    }
    write_folder(folder, {WEIGHTS: {**state, **heads}, CONFIG: json.dumps(config, indent=2, sort_keys=True)})


def _state(names: list[str], factors: Mapping[str, Any], ranks: Mapping[str, int]) -> dict[str, Tensor]:
    """Tensors of linear layers, padded with zeros to these ranks."""
    biased = any(found.bias is not None for found in factors.values())
    state: dict[str, Tensor] = {}
    for name in names:
        found, key = factors[name], f"{PREFIX}{name}.lora_"
        missing = ranks[name] - len(found.A)
        state[f"{key}A.weight"] = F.pad(found.A, (0, 0, 0, missing))
        state[f"{key}B.weight"] = F.pad(found.B, (0, missing))
        if biased:  # PEFT gives every layer a bias then
            state[f"{key}B.bias"] = found.B.new_zeros(len(found.B)) if found.bias is None else found.bias
    return state


def _scaled(found: Any, scale: float) -> Any:
    return replace(found, B=scale * found.B, bias=None if found.bias is None else scale * found.bias)


def _fixed() -> dict[str, Any]:
    options = {"lora_dropout": 0.0, "use_rslora": False, "use_dora": False, "init_lora_weights": True}
    return {"peft_type": "LORA", "inference_mode": True, **options}


def _identity(model: nn.Module, adapter_name: str) -> dict[str, Any]:
    """What the adapter was made for."""
    config = peft_config(model, adapter_name)
    if config is None:
        found = {"base_model_name_or_path": getattr(model, "name_or_path", None), "task_type": None, "revision": None}
        return {**found, "auto_mapping": base_class(model)}
    names = ("base_model_name_or_path", "task_type", "revision")
    found = {name: getattr(config, name, None) for name in names}
    found["task_type"] = getattr(found["task_type"], "value", found["task_type"])
    return {**found, "auto_mapping": base_class(model) if config.task_type is None else None}


def _beside(model: nn.Module, adapter_name: str) -> dict[str, Any]:
    """What the adapter trained beside its layers, by LoRA's names."""
    config = peft_config(model, adapter_name)
    bias, tokens = getattr(config, "bias", "none"), getattr(config, "trainable_token_indices", None)
    found = {"bias": "lora_only" if bias.endswith("_only") else bias}
    return found if tokens is None else {**found, "trainable_token_indices": tokens}


def _whole(number: float) -> int | float:
    """An int where it is one: vLLM declares lora_alpha as such."""
    return round(number) if abs(number - round(number)) < 1e-9 * max(1.0, abs(number)) else number


def target_modules(model: nn.Module, names: list[str]) -> list[str]:
    """The last parts of the names, where they name these modules and no others; else the whole names."""
    ends = {name.rpartition(".")[2] for name in names}
    plain = {name.removeprefix(PREFIX) for name, _ in model.named_modules() if ".base_layer" not in name}
    named = {name for name in plain if name.rpartition(".")[2] in ends}
    return sorted(ends if named == set(names) else names)
