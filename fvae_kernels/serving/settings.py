"""adapter_config.json of an FVAE-LoRA adapter, written and read without PEFT."""

import json
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from ..config import FIELDS, FVAEConfig, check_table, matches
from ..nn.linear import find_linears, is_named
from .folders import CONFIG
from .layers import AdaptedLayer, exact_pattern

METHOD = "FVAE"
TABLES = ("loss_weight", "rank_pattern", "alpha_pattern", "encoder_hidden_pattern")  # pairs in the file: order counts
BESIDE = ("bias", "trainable_token_indices", "target_parameters")
PLACED = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save")
BY_LAYER = {"rank_pattern": "rank", "alpha_pattern": "alpha", "encoder_hidden_pattern": "encoder_hidden"}
OF_PEFT = (
    *("peft_type", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision"),
    *("inference_mode", "inference_only", "init_weights"),
)


def config_of(layers: list[AdaptedLayer]) -> dict[str, Any]:
    """The options of layers without PEFT, as PEFT's file has them.

    Raises:
        ValueError: layers differ in an option that has no pattern.
    """
    first = layers[0].module.config
    for layer in layers:
        for name in FIELDS:
            if name not in BY_LAYER.values() and getattr(layer.module.config, name) != getattr(first, name):
                raise ValueError(
                    f"{layers[0].name!r} has {name}={getattr(first, name)!r} and {layer.name!r} has "
                    f"{getattr(layer.module.config, name)!r}: a folder holds one value of it. Save a model in which "
                    "they agree"
                )
    options = {name: getattr(first, name) for name in FIELDS if name != "rank"}
    for name, field in BY_LAYER.items():
        values = {layer.name: getattr(layer.module.config, field) for layer in layers}
        different = len(set(values.values())) > 1
        options[name] = {exact_pattern(n): value for n, value in values.items()} if different else {}
    pairs = {name: list(t.items()) for name, t in options.items() if isinstance(t, Mapping)}
    return {"peft_type": METHOD, "r": first.rank, "init_weights": True, **options, **pairs}


def table_of(value: Any) -> Any:
    """A table that a file holds as pairs; other values as they are."""
    pairs = isinstance(value, list) and all(isinstance(pair, (list, tuple)) and len(pair) == 2 for pair in value)
    return dict(value) if pairs else value


class Settings:
    """A folder's config, validated."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        path = folder / CONFIG
        if not path.is_file():
            raise ValueError(f"{folder} has no {CONFIG}: it is no adapter folder")
        try:
            values = json.loads(path.read_text())
        except ValueError as error:
            raise ValueError(f"{path} cannot be read: {error}. It is no JSON") from error
        if not isinstance(values, dict):
            raise ValueError(f"{path} holds a {type(values).__name__}; expected the options of an adapter, by name")
        if values.get("peft_type") != METHOD:
            raise ValueError(f"{folder} holds an adapter of the method {values.get('peft_type')}, not of {METHOD}")
        known = {*FIELDS, *TABLES, *PLACED, *BESIDE, *OF_PEFT, "r"} - {"rank"}
        unknown = sorted(set(values) - known)
        if unknown:
            warnings.warn(
                f"{path} has options that this version does not know: {unknown}. They are left out, as PEFT does with "
                "the file of a newer version; weights that do not fit without them are refused",
                stacklevel=4,
            )
            values = {name: value for name, value in values.items() if name in known}
        beside = {name: values[name] for name in BESIDE if values.get(name) not in (None, "none")}
        if beside:
            raise ValueError(
                f"{path} has {beside}, which only PEFT can load: peft.PeftModel.from_pretrained(model, folder)"
            )
        for name in TABLES:
            values[name] = table_of(values.get(name))
            if name != "loss_weight":
                check_table(name, values[name] or {})
        targets = values.get("target_modules")
        if not isinstance(targets, (str, list)) or not all(isinstance(target, str) for target in targets):
            raise ValueError(
                f"{path} has target_modules={targets!r}; expected a list of names, or a regular expression"
            )
        self.values = values
        self.inference_only = bool(values.get("inference_only"))
        self.config = self._config()

    def _config(self, **by_layer: Any) -> FVAEConfig:
        options = {name: self.values[name] for name in FIELDS if name in self.values}
        if "r" in self.values:
            options["rank"] = self.values["r"]
        return FVAEConfig(**{**options, **by_layer})

    def for_layer(self, name: str) -> FVAEConfig:
        """The options of one layer."""
        found = {}
        for table, field in BY_LAYER.items():
            patterns = self.values.get(table) or {}
            key = next((pattern for pattern in patterns if matches(pattern, name)), None)
            if key is not None:
                found[field] = patterns[key]
        return self._config(**found)

    def targets(self, model: nn.Module) -> list[str]:
        """The linear layers of `model` that the config names, as PEFT finds them; a shared one by its first name.

        Raises:
            ValueError: it names none.
        """
        named = dict(model.named_modules(remove_duplicate=False))
        targets, excluded = self.values.get("target_modules"), self.values.get("exclude_modules")
        linears = find_linears(model, named, ".*")
        if isinstance(targets, str):
            linears = find_linears(model, named, targets)
        else:
            linears = [name for name in linears if is_named(name, targets or ())]
        linears = [name for name in linears if not (excluded and is_named(name, excluded)) and self._in_blocks(name)]
        if not linears:
            raise ValueError(f"{type(model).__name__} has none of the layers that {self.folder} adapts: {targets}")
        first = {id(named[name]): name for name in reversed(linears)}
        return [name for name in linears if first[id(named[name])] == name]

    def _in_blocks(self, name: str) -> bool:
        wanted, patterns = self.values.get("layers_to_transform"), self.values.get("layers_pattern")
        if wanted is None:
            return True
        patterns = [patterns] if isinstance(patterns, str) else patterns or [r"[^.]*"]
        found = next((m for p in patterns if (m := re.match(rf".*\.{p}\.(\d+)\.", name))), None)
        return found is not None and int(found.group(1)) in ([wanted] if isinstance(wanted, int) else wanted)
