"""Adapter folders, written whole or not at all."""

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

CONFIG, WEIGHTS, PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
CONTAINER = "fvae_adapter"  # in an adapted layer of PEFT's: its adapters
PREFIX = "base_model.model."  # in PEFT, before the name of a module of the base model


def folder_of(folder: Any) -> Path:
    """The path of a folder to write to, which need not be there.

    Raises:
        TypeError: no path.
        ValueError: it is a file, or inside of one.
    """
    if not isinstance(folder, (str, os.PathLike)):
        raise TypeError(f"the folder is a {type(folder).__name__}; expected a path")
    path = Path(folder)
    files = [found for found in (path, *path.parents) if found.is_file()]
    if files:
        raise ValueError(f"{files[0]} is a file; expected a folder, or the name of a new one")
    return path


def write_folder(folder: Path, files: Mapping[str, Any]) -> None:
    """Write safetensors (tensors by name) and texts. Files appear under their names when all have been written.

    Raises:
        ImportError: safetensors is not installed.
    """
    try:
        from safetensors.torch import save_file
    except ImportError as error:
        raise ImportError("adapter files need safetensors, which is not installed: pip install safetensors") from error
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as draft:
        for name, content in files.items():
            if isinstance(content, str):
                (Path(draft) / name).write_text(content)
            else:
                save_file(_plain(content), Path(draft) / name, metadata={"format": "pt"})
        for name in files:
            os.replace(Path(draft) / name, folder / name)


def _plain(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous copies on the CPU that share no memory, as safetensors wants them."""
    return {name: t.detach().cpu().contiguous().clone() for name, t in tensors.items()}
