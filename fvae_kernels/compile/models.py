"""Adapted models without data: from a model's config, or from the sizes of layers."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..config import FVAEConfig
from ..nn.linear import FusedFVAELinear
from ..presets import PRESETS

SIZES = r"(\d+)x(\d+)"
FILE = "adapter_config.json"


def from_sizes(sizes: Sequence[str], config: FVAEConfig, dtype: torch.dtype) -> nn.Module:
    """Adapted linear layers of these sizes, for example "768x3072": inputs, then outputs."""
    pairs = [tuple(map(int, re.fullmatch(SIZES, size).groups())) for size in sizes]  # type: ignore[union-attr]
    with torch.device("meta"):
        return nn.ModuleList(FusedFVAELinear(nn.Linear(D, M, dtype=dtype), config) for D, M in pairs)


def from_model(name: str, config: Any, dtype: torch.dtype) -> nn.Module:
    """The model of this folder or hub name, without weights, adapted by PEFT.

    Raises:
        OSError: there is no config of that name.
        ValueError: PEFT cannot adapt it as `config` says.
    """
    import transformers
    from peft import get_peft_model

    about = transformers.AutoConfig.from_pretrained(name)
    classes = [getattr(transformers, kind, None) for kind in about.architectures or ()]
    with torch.device("meta"):
        made = classes[0](about) if classes and classes[0] else transformers.AutoModel.from_config(about)
        return get_peft_model(made.to(dtype), config)


def config_of(adapter: str, rank: int | None, targets: Sequence[str] | None, needs_peft: bool) -> Any:
    """The adapter's config: an FVAELoraConfig, or an FVAEConfig if PEFT is not needed.

    Args:
        adapter: name of a preset, or path of an adapter_config.json or of its folder.

    Raises:
        ValueError: it is neither, or cannot train.
    """
    chosen = {} if targets is None else {"target_modules": _targets(targets)}
    if adapter in PRESETS:
        size = {} if rank is None else {"r" if needs_peft else "rank": rank}
        if not needs_peft:
            return FVAEConfig.preset(adapter, **size)
        from ..peft import FVAELoraConfig

        return FVAELoraConfig.preset(adapter, **size, **chosen)
    path = Path(adapter)
    folder = path.parent if path.name == FILE else path
    if not (folder / FILE).is_file():
        raise ValueError(
            f"there is no adapter {adapter!r}: expected one of {', '.join(map(repr, PRESETS))}, or the path of an "
            f"{FILE} or of its folder"
        )
    if rank is not None:
        raise ValueError(f"the rank is that of {folder / FILE}; leave out --rank")
    from ..peft import FVAELoraConfig

    config = FVAELoraConfig.from_pretrained(str(folder))
    if config.inference_only:
        raise ValueError(f"{folder} holds an adapter that was exported for inference, which launches no kernels")
    config.inference_mode = False
    config.__dict__.pop("_saved", None)  # its weights do not matter
    for key, value in chosen.items():
        setattr(config, key, value if isinstance(value, str) else set(value))
    return config if needs_peft else config.to_fvae_config()


def _targets(names: Sequence[str]) -> str | list[str]:
    """As PEFT takes them: "all-linear" and a regular expression as a string, names in a list."""
    alone = len(names) == 1 and (names[0] == "all-linear" or re.fullmatch(r"[\w.]+", names[0]) is None)
    return names[0] if alone else list(names)
