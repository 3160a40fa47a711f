"""The options of one layer, where rank_pattern, alpha_pattern and encoder_hidden_pattern give it its own."""

import warnings
from collections.abc import Iterable
from typing import Any

from peft.utils.other import get_pattern_key

from ..config import FVAEConfig
from ..serving.settings import BY_LAYER
from .config import FVAELoraConfig

OF_PEFT = r"The following (rank|alpha)_pattern keys"  # its warning, which knows no experts


def layer_config(config: FVAELoraConfig, name: str) -> FVAEConfig:
    """The options of the layer called `name`; an expert's are also found by its parameter's name, as in LoRA."""
    rank, alpha, hidden = (_found(getattr(config, table), name) for table in BY_LAYER)
    return config.to_fvae_config(
        rank=config.r if rank is None else rank, alpha=config.alpha if alpha is None else alpha, hidden=hidden
    )


def warn_unmatched(config: FVAELoraConfig, names: Iterable[str]) -> None:
    """Warn of patterns that match none of these layers."""
    every = [n for name in names for n in _names(name)]
    for table in BY_LAYER:
        keys = getattr(config, table) or {}
        unmatched = [key for key in keys if not any(_matches(key, name) for name in every)]
        if unmatched:
            warnings.warn(
                f"{table} has keys that match no adapted layer and are ignored: {unmatched}",
                RuntimeWarning,
                stacklevel=5,
            )


def _found(table: dict[str, Any] | None, name: str) -> Any:
    table = table or {}
    return next((table[key] for n in _names(name) if (key := get_pattern_key(list(table), n)) in table), None)


def _names(name: str) -> tuple[str, ...]:
    parameter, _, index = name.rpartition(".")
    return (name, parameter) if index.isdigit() else (name,)


def _matches(key: str, name: str) -> bool:
    return get_pattern_key([key], name) == key
