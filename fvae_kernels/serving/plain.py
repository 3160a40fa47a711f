"""Adapters without PEFT: taken out of a model, saved, loaded."""

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..nn.adapter import FVAEAdapter
from ..nn.linear import FusedFVAELinear, linear_shape
from ..nn.parameters import is_served, parameter_shapes
from ..nn.quantised import refuse_merge
from ..training.hooks import install_hooks, remove_hooks
from .folders import CONFIG, CONTAINER, PREFIX, WEIGHTS, folder_of, write_folder
from .heads import LOADED, base_class, trained_heads
from .layers import AdaptedLayer, adapted_layers, check_model
from .lora_files import target_modules
from .saved import Beside, SavedAdapter, check_fits, plain_name, read_adapter
from .settings import Settings, config_of


def restore_linears(model: nn.Module, merge: bool = False) -> list[str]:
    """Undo `replace_linears`, in place: every adapted layer becomes its base layer again, and the hooks are gone.

    Parameters stay frozen as `replace_linears` left them.

    Args:
        model: a model with layers of `replace_linears`.
        merge: add each adapter to its base weight first; needs linear encoders and base layers that are not quantised.
            False gives back the base weights, of merged layers too.

    Returns:
        The names of the layers that were restored.

    Raises:
        ValueError: there are none, `model` itself is one, or an adapter cannot be merged. The model is unchanged then.
    """
    check_model(model)
    named = dict(model.named_modules(remove_duplicate=False))
    found = {name: module for name, module in named.items() if isinstance(module, FusedFVAELinear)}
    if not found or "" in found:
        what = "is an adapted layer itself: take its base_layer" if found else "has no layer of replace_linears"
        raise ValueError(f"{type(model).__name__} {what} (layers of PEFT's are removed by model.unload())")
    layers = {id(module): module for module in found.values()}.values()
    if merge:
        for layer in layers:
            layer.adapter.delta_weight()  # raises
            refuse_merge(layer.base_layer)
    for layer in layers:
        if layer.merged != merge:
            layer.merge() if merge else layer.unmerge()
    for name, layer in found.items():
        parent, _, child = name.rpartition(".")
        setattr(named[parent], child, layer.base_layer)
    for module in list(model.modules()):
        if hasattr(module, "_fvae_hooks"):
            remove_hooks(module)
    model.__dict__.pop(LOADED, None)
    return list(found)


def save_adapters(model: nn.Module, folder: str | Path) -> None:
    """Write the adapters of `replace_linears` as an adapter folder, safetensors and JSON.

    `load_adapters` loads it into the base model, and so does ``peft.PeftModel.from_pretrained`` where `fvae_kernels` is
    imported. Modules that are trained beside the adapters, such as a head, are saved too.

    Args:
        model: a model with layers of `replace_linears`.
        folder: where ``adapter_config.json`` and ``adapter_model.safetensors`` go.

    Raises:
        ValueError: no such layers (PEFT's models have save_pretrained); layers that differ in an option that has no
            pattern; a trained parameter that belongs to the model itself. Nothing is written then.
        ImportError: safetensors is not installed.
    """
    path, layers = folder_of(folder), _plain_layers(model)
    heads, modules_to_save = trained_heads(model, "default")
    config = {
        **config_of(layers),
        "target_modules": target_modules(model, [layer.name for layer in layers]),
        "modules_to_save": modules_to_save,
        "inference_mode": True,
        "inference_only": layers[0].adapter.inference_only,
        "task_type": None,
        "auto_mapping": base_class(model),
        "base_model_name_or_path": getattr(model, "name_or_path", None),
    }
    state = {
        f"{PREFIX}{layer.name}.{CONTAINER}.{name}": p
        for layer in layers
        for name, p in layer.adapter.named_parameters()
    }
    write_folder(path, {WEIGHTS: {**state, **heads}, CONFIG: json.dumps(config, indent=2, sort_keys=True)})


@torch.no_grad()
def load_adapters(model: nn.Module, folder: str | Path, trainable: bool = False) -> list[str]:
    """Load an adapter folder into `model`, in place and without PEFT: of `save_adapters`, or of PEFT's save_pretrained.

    In a base model the layers are replaced as by `replace_linears`. A model that has them already gets their values, if
    the options are those of the folder. Other modules in the folder, such as a trained head, are loaded too.

    Args:
        model: the base model, or one with layers of `replace_linears`.
        folder: an adapter folder; one of `export_for_inference` serves and cannot be trained.
        trainable: train the adapters and the other modules in the folder. All else is frozen, and without it these too:
            frozen adapters serve in training mode as in eval mode.

    Returns:
        The names of the adapted layers.

    Raises:
        ValueError: a folder that is damaged, a pickle, another method's, or of another base model or other options; an
            inference-only adapter that is to be trained; a model with adapters of PEFT's.
        ImportError: safetensors is not installed. The model is unchanged in all these cases.
    """
    check_model(model)
    settings, saved = _read(Path(folder))
    if trainable and settings.inference_only:
        raise ValueError(f"{folder} was exported for inference and cannot be trained: load the full adapter")
    present = _present(model)
    names = [layer.name for layer in present] or settings.targets(model)
    _check(model, settings, saved, names, present)
    from safetensors.torch import load_file

    tensors = {plain_name(key): t for key, t in load_file(Path(folder) / WEIGHTS).items()}
    if not present:
        _replace(model, settings, names)
        present = adapted_layers(model)
    for layer in present:
        stem = f"{layer.name}.{CONTAINER}."
        own = {key.removeprefix(stem): t for key, t in tensors.items() if key.startswith(stem)}
        layer.adapter.load_state_dict(own)
    state = model.state_dict()
    heads = [name for name in tensors if f".{CONTAINER}." not in name]
    for name in heads:
        state[name].copy_(tensors[name])
    if heads:
        model.__dict__[LOADED] = sorted({name.rpartition(".")[0] for name in heads})
    model.requires_grad_(False)
    for layer in present:
        layer.adapter.requires_grad_(trainable)
    for name, parameter in model.named_parameters():
        if trainable and name in heads:
            parameter.requires_grad_(True)
    return [layer.name for layer in present]


def _plain_layers(model: nn.Module) -> list[AdaptedLayer]:
    layers = adapted_layers(model)
    if not all(isinstance(layer.module, FusedFVAELinear) for layer in layers):
        raise ValueError(f"{type(model).__name__} has adapters of PEFT's: save them with model.save_pretrained(folder)")
    return layers


def _present(model: nn.Module) -> list[AdaptedLayer]:
    """The layers of replace_linears, none in a base model."""
    inside: Any = [module for module in model.modules() if hasattr(module, CONTAINER)]
    if inside:
        raise ValueError(
            f"{type(model).__name__} has adapters of PEFT's: load beside them with model.load_adapter(folder)"
        )
    return _plain_layers(model) if any(isinstance(m, FusedFVAELinear) for m in model.modules()) else []


def _read(folder: Path) -> tuple[Settings, SavedAdapter]:
    try:
        saved = read_adapter(str(folder))
    except ImportError as error:
        raise ImportError("adapter files need safetensors, which is not installed: pip install safetensors") from error
    settings = Settings(folder)
    if not saved.found:
        raise ValueError(f"{folder} has a config and no {WEIGHTS}: no adapter to load")
    return settings, saved


def _check(
    model: nn.Module, settings: Settings, saved: SavedAdapter, names: list[str], present: list[AdaptedLayer]
) -> None:
    """Raise unless the folder fits the model."""
    settings.config.check_loss_weight_patterns(names)
    shapes = {}
    for name in names:
        module = model.get_submodule(name)
        config = settings.for_layer(name)
        linear = module.base_layer if isinstance(module, FusedFVAELinear) else module
        D, M, _ = linear_shape(linear)
        kept = parameter_shapes(D, M, config)
        shapes[name] = {n: s for n, s in kept if not settings.inference_only or is_served(n, config)}
    for layer in present:
        config, found = settings.for_layer(layer.name), layer.module.config
        if config != found or layer.adapter.inference_only != settings.inference_only:
            raise ValueError(
                f"{settings.folder} has other options for {layer.name!r} than the layer: {config} and {found}. Call "
                "restore_linears(model) first to get the folder's"
            )
    check_fits(saved, shapes, Beside(tuple(settings.values.get("modules_to_save") or ())), model)


def _replace(model: nn.Module, settings: Settings, names: list[str]) -> None:
    """Put adapters beside the layers, as `replace_linears` does."""
    named = dict(model.named_modules(remove_duplicate=False))
    wrappers: dict[int, FusedFVAELinear] = {}
    for name in names:
        old, config = named[name], settings.for_layer(name)
        new = FusedFVAELinear.from_linear(old, config, name=name, layers=len(names))
        if settings.inference_only:
            like: Any = {"device": new.adapter.B.device, "dtype": new.adapter.B.dtype}
            new.adapter = FVAEAdapter(new.in_features, new.out_features, config, True, **like).train(new.training)
        wrappers[id(old)] = new
    for name, old in named.items():  # a layer used in two places stays one layer
        if id(old) in wrappers:
            parent, _, child = name.rpartition(".")
            setattr(named[parent], child, wrappers[id(old)])
    install_hooks(model)
