"""Adapter folders, checked before a model is touched."""

import os
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import nn

from .folders import CONTAINER, PICKLE, WEIGHTS

Shapes = dict[str, dict[str, tuple[int, ...]]]  # module -> parameter -> shape
TOKENS = ".token_adapter.trainable_tokens_delta"
PEFT_PREFIXES = ("base_model.model.", "base_model.")


@dataclass(frozen=True)
class SavedAdapter:
    """Contents of an adapter folder, from the header of its weights file; no tensor is loaded."""

    folder: str
    found: bool  # a weights file exists
    layers: Shapes
    others: dict[str, tuple[int, ...]]  # tensors of modules_to_save and resized embeddings


def find_weights(folder: str) -> str | None:
    """The safetensors file of a local adapter folder, or None. A pickle can run code and is refused."""
    path = os.path.join(folder, WEIGHTS)
    if os.path.isfile(path):
        return path
    if os.path.isfile(os.path.join(folder, PICKLE)):
        raise ValueError(
            f"{folder} holds {PICKLE}, a pickle, which can run code when it is loaded. FVAE-LoRA adapters are read "
            f"from {WEIGHTS} only: save them again with save_pretrained(..., safe_serialization=True), the default"
        )
    return None


def read_adapter(folder: str) -> SavedAdapter:
    """Names and shapes of the tensors in a local adapter folder.

    Raises:
        ValueError: if the weights are a pickle, truncated, or not an FVAE-LoRA adapter's.
    """
    from safetensors import SafetensorError, safe_open

    path = find_weights(folder)
    if path is None:
        return SavedAdapter(folder, False, {}, {})
    layers: Shapes = {}
    others: dict[str, tuple[int, ...]] = {}
    try:
        with safe_open(path, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118 - not a mapping
                shape = tuple(file.get_slice(key).get_shape())
                module, found, parameter = key.rpartition(f".{CONTAINER}.")
                if found:
                    layers.setdefault(plain_name(module), {})[parameter] = shape
                else:
                    others[plain_name(key)] = shape
    except (SafetensorError, OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read: {error}. It is truncated, or no safetensors file") from error
    if not layers:
        raise ValueError(f"{path} holds no FVAE-LoRA weights: no key has {CONTAINER!r} in it")
    return SavedAdapter(folder, True, layers, others)


@dataclass(frozen=True)
class Beside:
    """What an adapter trains beside its layers."""

    modules_to_save: tuple[str, ...] = ()
    bias: str = "none"  # "all", or one that ends with "_only": of the adapted layers
    token_counts: frozenset[int] | set[int] = frozenset()  # embeddings that are trained in a layer


def check_fits(saved: SavedAdapter, expected: Shapes, beside: Beside, model: nn.Module) -> None:
    """Raise unless a saved adapter has exactly the layers and shapes that it would have in `model`.

    Raises:
        ValueError: with the first layer or tensor that does not fit.
    """
    advice = (
        f"{saved.folder} was saved from another base model or with another config. (To start a fresh adapter with its "
        "config, pass dataclasses.replace(config, inference_mode=False).)"
    )
    where = type(model).__name__
    for name, parameters in expected.items():
        found = saved.layers.get(name)
        if found is None:
            raise ValueError(f"the saved adapter has no weights for the layer {name!r} of {where}: {advice}")
        _compare(found, parameters, f"layer {name!r} of {where}", advice)
    extra = sorted(set(saved.layers) - set(expected))
    if extra:
        raise ValueError(f"the saved adapter has weights for {extra[0]!r}, which is not adapted in {where}: {advice}")
    _check_others(saved, expected, beside, model, advice)


def _check_others(saved: SavedAdapter, layers: Iterable[str], beside: Beside, model: nn.Module, advice: str) -> None:
    """Check that modules_to_save, biases and tokens are complete, and that the model has the others (embeddings)."""
    targets, others = beside.modules_to_save, {_unwrapped(name): shape for name, shape in saved.others.items()}
    if beside.bias == "all":  # PEFT writes a head's biases twice
        others = {name: shape for name, shape in others.items() if ".modules_to_save." not in name}
    tensors = {name: t for name, t in model.state_dict().items() if ".modules_to_save." not in name}
    state = {_unwrapped(name): tuple(tensor.shape) for name, tensor in tensors.items()}
    modules = [name for name, _ in model.named_modules() if targets and name.endswith(targets)]
    for module in modules:
        needed = {name: shape for name, shape in state.items() if name.startswith(f"{module}.")}
        held = {name: shape for name, shape in others.items() if name.startswith(f"{module}.")}
        _compare(held, needed, f"{module!r} of modules_to_save", advice)
    for name, shape in _biases(state, layers, beside.bias).items():
        _compare({name: others[name]} if name in others else {}, {name: shape}, type(model).__name__, advice)
    tokens = {name: shape for name, shape in others.items() if name.endswith(TOKENS)}
    if bool(tokens) != bool(beside.token_counts):
        found = sorted(tokens) or "no trained tokens"
        raise ValueError(f"the saved adapter does not fit its config: the file has {found}; {advice}")
    for name, shape in tokens.items():
        embedding = state.get(f"{name.removesuffix(TOKENS)}.weight", ("unknown",))
        fitting = [(count, *embedding[1:]) for count in sorted(beside.token_counts)]
        if shape not in fitting:
            _compare({name: shape}, {name: fitting[0]}, type(model).__name__, advice)
    for name, shape in others.items():
        if name not in tokens and not any(f".{name}".find(f".{target}.") >= 0 for target in targets):
            _compare({name: shape}, {name: state[name]} if name in state else {}, type(model).__name__, advice)


def _biases(state: dict[str, Any], layers: Iterable[str], bias: str) -> dict[str, Any]:
    """The biases of the base model that are trained."""
    if bias == "all":
        return {name: shape for name, shape in state.items() if name == "bias" or name.endswith(".bias")}
    wanted = [] if bias == "none" else [f"{layer}.bias" for layer in layers]
    return {name: state[name] for name in wanted if name in state}


def _compare(found: dict[str, Any], expected: dict[str, Any], where: str, advice: str) -> None:
    for name in sorted({*found, *expected}):
        if found.get(name) != expected.get(name):
            raise ValueError(
                f"the saved adapter does not fit the {where}: {name} is {found.get(name, 'missing')} in the file and "
                f"{expected.get(name, 'unknown')} in the model; {advice}"
            )


def check_complete(loaded: dict[str, Any], state: dict[str, Any], adapter_name: str) -> None:
    """Raise unless `loaded` has exactly the adapter's tensors of the model's `state`, in their shapes.

    Raises:
        ValueError: before anything is copied.
    """
    advice = "nothing was loaded"
    expected = {key: tuple(t.shape) for key, t in state.items() if f".{CONTAINER}.{adapter_name}." in key}
    found = {key: tuple(t.shape) for key, t in loaded.items() if f".{CONTAINER}." in key}
    _compare(found, expected, f"adapter {adapter_name!r}", advice)


def plain_name(key: str) -> str:
    """A key without the prefix that PeftModel.save_pretrained puts before the model's own names."""
    return next((key[len(prefix) :] for prefix in PEFT_PREFIXES if key.startswith(prefix)), key)


def _unwrapped(key: str) -> str:
    """A key as before PEFT wrapped the module for another adapter."""
    return key.replace(".original_module.", ".").replace(".base_layer.", ".")
