"""Convert layers and checkpoints of the authors' code to ours, and a layer back. `_official` has the mapping."""

import json
import re
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ._official import FIRST_BIAS, SCALE, SCALE_EPSILON, config_from_official, group, official_names, to_ours
from .config import FIELDS
from .nn.linear import FusedFVAELinear
from .serving.folders import CONTAINER, PREFIX, WEIGHTS
from .serving.saved import find_weights

_CARRIED = (
    *("task_type", "base_model_name_or_path", "revision", "inference_mode", "modules_to_save"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"),
)


def from_official(tensors: Mapping[str, Tensor], settings: Mapping[str, Any]) -> FusedFVAELinear:
    """Convert one layer of the authors' code: same outputs, objective and gradients. The result is in training mode.

    Args:
        tensors: by the authors' names: base_layer.weight, base_layer.bias if there is one, lora_A.<adapter>.views_...,
            lora_B.<adapter>; optionally lora_E and ranknum. They are copied and keep their dtype.
        settings: see `config_from_official`.

    Raises:
        ValueError: an unsupported setting, a missing or unexpected tensor, or a wrong shape.
    """
    config = config_from_official(settings)
    found, others = group(tensors)
    if "base_layer.weight" not in others:
        raise ValueError(
            f"base_layer.weight is missing: expected the frozen layer's weight; there are {sorted(tensors)}"
        )
    weight, bias = others.pop("base_layer.weight"), others.pop("base_layer.bias", None)
    if others or set(found) - {""}:
        raise ValueError(f"unexpected tensors {sorted({*others, *found} - {''})}: expected those of a single layer")
    M, D = weight.shape
    state = to_ours(found.get("", {}), config, D, M, "the layer")
    linear = nn.Linear(D, M, bias=bias is not None, device="meta")
    linear.weight = nn.Parameter(weight.detach().clone())
    linear.register_parameter("bias", None if bias is None else nn.Parameter(bias.detach().clone()))
    layer = FusedFVAELinear(linear, config, dtype=state["B"].dtype)
    layer.adapter.load_state_dict(state)
    return layer


def to_official(layer: FusedFVAELinear, gradients: bool = False) -> dict[str, Tensor]:
    """Copies of a layer's tensors by the authors' names: the inverse of `from_official`.

    Settings are not included. The authors' lora_alpha is ``config.alpha * (r + 1e-5) / r``.

    Args:
        layer: an unmerged layer that was not exported for inference.
        gradients: return the ``.grad`` of each trainable parameter instead.

    Raises:
        ValueError: the layer is merged or inference-only.
        RuntimeError: a trainable parameter has no gradient.
    """
    if layer.merged or layer.adapter.inference_only:
        raise ValueError("expected a whole adapter beside its base layer: call unmerge(), or load the full adapter")
    names, config = official_names(layer.in_features, layer.out_features, layer.config), layer.config
    parameters = {f"base_layer.{name}": p for name, p in layer.base_layer.named_parameters()}
    parameters |= {names[name]: p for name, p in layer.adapter.named_parameters()}
    if gradients:
        missing = [name for name, p in parameters.items() if p.requires_grad and p.grad is None]
        if missing:
            raise RuntimeError(f"no gradient has reached {missing}: call backward() on an output of the layer first")
        found = {name: p.grad.detach().clone() for name, p in parameters.items() if p.grad is not None}
    else:
        found = {name: p.detach().clone() for name, p in parameters.items()}
        found[names["decoder_scale"]] -= SCALE_EPSILON
        B = found["lora_B"]
        found["lora_E"], found["ranknum"] = B.new_zeros(config.rank, 1), B.new_full((1,), float(config.rank))
        found.setdefault(FIRST_BIAS, B.new_zeros(config.rank))  # a linear encoder 1 has no bias here
    if layer.transposed and "base_layer.weight" in found:
        found["base_layer.weight"] = found["base_layer.weight"].T
    return {re.sub(r"^(lora_A|lora_B|lora_E|ranknum)", r"\1.default", name): t for name, t in found.items()}


def convert_checkpoint(source_folder: str | Path, target_folder: str | Path, model: nn.Module | None = None) -> None:
    """Convert an adapter folder of the authors' code, for ``PeftModel.from_pretrained(base, target_folder)``.

    `loss_weight` becomes ``1 / (lambda_downstream * layers)``: the authors take the mean over layers, relative to the
    task loss. Tensors outside adapters, such as a trained classifier, are kept. Files are written only after everything
    was converted.

    Args:
        source_folder: adapter_config.json and adapter_model.safetensors of the authors' code.
        target_folder: another folder; created if it does not exist.
        model: the base model. Needed if its layers were renamed after the checkpoint was written, as transformers 5 did
            with ViT: the new names are looked up in transformers.

    Raises:
        ValueError: a pickle, an unsupported setting, a missing or unexpected tensor, a wrong shape, or a layer that
            `model` does not have.
    """
    from safetensors.torch import save_file

    from .peft.config import FVAELoraConfig

    source, target = Path(source_folder), Path(target_folder)
    if target.exists() and source.exists() and source.samefile(target):
        raise ValueError(
            f"target_folder={str(target)!r} is the source folder: expected another, so that theirs survives"
        )
    settings, layers, others = _read_checkpoint(source)
    method = config_from_official(settings)
    names = {module: _current_name(module, model) for module in layers}
    state = {key: tensor.contiguous() for key, tensor in others.items()}
    for module, tensors in layers.items():
        ours = to_ours(tensors, method, *_sides(tensors, module), module)
        state |= {f"{names[module]}.{CONTAINER}.{name}": tensor.contiguous() for name, tensor in ours.items()}
    options = {name: getattr(method, name) for name in FIELDS if name not in ("rank", "loss_weight")}
    options |= _placement(settings, names)
    weight: Any = method.loss_weight
    config = FVAELoraConfig(r=method.rank, loss_weight=weight / len(layers), **options)
    target.mkdir(parents=True, exist_ok=True)
    save_file(state, target / WEIGHTS, metadata={"format": "pt"})
    config.save_pretrained(str(target))


def peft_model_from_official(model: nn.Module, folder: str | Path, **kwargs: Any) -> Any:
    """``PeftModel.from_pretrained(model, ...)`` for a checkpoint of the authors' code, with the same options."""
    from peft import PeftModel

    with tempfile.TemporaryDirectory() as converted:
        convert_checkpoint(folder, converted, model)
        return PeftModel.from_pretrained(model, converted, **kwargs)


def _read_checkpoint(folder: Path) -> tuple[dict[str, Any], dict[str, dict[str, Tensor]], dict[str, Tensor]]:
    """Settings, adapter tensors by module, and other tensors of a checkpoint of the authors' code."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = find_weights(str(folder))
    if path is None or not (folder / "adapter_config.json").is_file():
        raise ValueError(f"{folder} is no adapter folder: expected adapter_config.json and {WEIGHTS} in it")
    settings = json.loads((folder / "adapter_config.json").read_text())
    if settings.get("peft_type") != "FVAEPEFT":
        raise ValueError(f"peft_type={settings.get('peft_type')!r} is not supported: expected 'FVAEPEFT', the authors'")
    if settings.get("bias", "none") != "none":
        raise ValueError(f"bias={settings['bias']!r} is not supported: expected 'none', base layers stay frozen here")
    try:
        layers, others = group(load_file(path))
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} cannot be read: {error}. It is truncated or not a safetensors file") from error
    if not layers:
        raise ValueError(f"{path} holds no FVAE-LoRA weights of the authors: no key has 'lora_B' in it")
    return settings, layers, others


def _placement(settings: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """The target modules: as in the authors' config, or by full names if the model's names changed."""
    options = {name: settings[name] for name in _CARRIED if settings.get(name) is not None}
    if any(old != new for old, new in names.items()):
        for name in ("exclude_modules", "layers_to_transform", "layers_pattern"):
            options.pop(name, None)
        options["target_modules"] = sorted(name.removeprefix(PREFIX) for name in names.values())
    return options


def _sides(tensors: Mapping[str, Tensor], module: str) -> tuple[int, int]:
    """in_features and out_features of a layer, from the shapes of its tensors."""
    if absent := [name for name in ("lora_B", SCALE) if name not in tensors]:
        raise ValueError(f"the tensors of {module} do not fit the settings: missing {absent}")
    return tensors[SCALE].shape[0], tensors["lora_B"].shape[0]


def _current_name(module: str, model: nn.Module | None) -> str:
    """The module's name in `model`: unchanged, or renamed as transformers renames it."""
    name = module.removeprefix(PREFIX)
    known = dict(model.named_modules()) if model is not None else {name: None}
    if name in known:
        return module
    renamed = f"{name}.weight"
    for renaming in _renamings(model):
        renamed = renaming.rename_source_key(renamed)[0]
    renamed = renamed.removesuffix(".weight")
    if renamed not in known:
        raise ValueError(
            f"{type(model).__name__} has no layer {name!r}: the checkpoint was made for another base model"
        )
    return PREFIX + renamed


def _renamings(model: Any) -> Iterator[Any]:
    try:
        from transformers import PreTrainedModel
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightRenaming
    except ImportError:
        return
    if isinstance(model, PreTrainedModel):
        yield from (entry for entry in get_model_conversion_mapping(model) if isinstance(entry, WeightRenaming))
