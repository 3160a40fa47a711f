"""Modules that are trained beside the adapters."""

from typing import Any

from torch import Tensor

from ..nn.adapter import FVAEAdapter
from .folders import CONTAINER, PREFIX
from .layers import peft_config

LOADED = "_fvae_loaded_modules"  # on a model: modules whose values came with an adapter folder


def trained_heads(model: Any, adapter_name: str) -> tuple[dict[str, Tensor], list[str] | None]:
    """Tensors beside the adapter as PEFT's files have them, and the modules_to_save; None if there are none.

    Without PEFT these are the modules that are trained beside the adapted layers, or were loaded with them.

    Raises:
        ValueError: a trained parameter that belongs to the model itself, or to a module with adapted layers in it.
    """
    config = peft_config(model, adapter_name)
    if config is not None:
        from peft import get_peft_model_state_dict

        state = get_peft_model_state_dict(model, adapter_name=adapter_name)
        others = {key: t for key, t in state.items() if f".{CONTAINER}." not in key}
        return {_prefixed(key): t for key, t in others.items()}, config.modules_to_save or None
    adapters = tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, FVAEAdapter))
    trained = [name for name, p in model.named_parameters() if p.requires_grad and not name.startswith(adapters)]
    owners = sorted({name.rpartition(".")[0] for name in trained} | set(vars(model).get(LOADED, ())))
    around = [owner for owner in owners if not owner or any(name.startswith(f"{owner}.") for name in adapters)]
    if around:
        raise ValueError(
            f"{[name for name in trained if name.rpartition('.')[0] in around]} are trained, and their module has "
            "adapted layers in it, but files hold whole modules: freeze them, or move them into a module of their own"
        )
    heads = {
        f"{PREFIX}{owner}.{name}": tensor
        for owner in owners
        for name, tensor in model.get_submodule(owner).state_dict().items()
    }
    return heads, owners or None


def base_class(model: Any) -> dict[str, str]:
    """Class of the base model, as PEFT's files have it for models without a task type."""
    base = type(model.get_base_model()) if hasattr(model, "get_base_model") else type(model)
    return {"base_model_class": base.__name__, "parent_library": base.__module__}


def _prefixed(key: str) -> str:
    return key if key.startswith("base_model.") else PREFIX + key
