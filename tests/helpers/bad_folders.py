"""Adapter folders that must be refused: each function spoils a good one, and its message names the fault."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.helpers.peft_models import CONFIG, WEIGHTS
from tests.helpers.tiny_models import DIM, build

PICKLE = "adapter_model.bin"
STEM = "base_model.model.bert.encoder.layer.0.attention.self.query.fvae_adapter."


def truncated(folder: Path) -> None:
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(data[:-100])


def header_truncated(folder: Path) -> None:
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(data[:60])


def garbage(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes(bytes(range(256)) * 20)


def empty(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes(b"")


def no_weights(folder: Path) -> None:
    (folder / WEIGHTS).unlink()


class Hostile:
    """Unpickling it creates a file."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self.path,)


def hostile_pickle(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    torch.save({"x": Hostile(str(folder.parent / "executed"))}, folder / PICKLE)


def harmless_pickle(folder: Path) -> None:
    torch.save(load_file(folder / WEIGHTS), folder / PICKLE)
    (folder / WEIGHTS).unlink()


def tensors(change: Callable[[dict[str, Tensor]], Any]) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        state = load_file(folder / WEIGHTS)
        change(state)
        save_file(state, folder / WEIGHTS, metadata={"format": "pt"})

    return spoil


def drop(*parts: str) -> Callable[[Path], None]:
    def change(state: dict[str, Tensor]) -> None:
        dropped = [key for key in state if all(part in key for part in parts)]
        assert dropped
        for key in dropped:
            del state[key]

    return tensors(change)


def put(key: str, *shape: int) -> Callable[[Path], None]:
    return tensors(lambda state: state.update({key: torch.zeros(shape)}))


def lora_weights(folder: Path) -> None:
    peft.get_peft_model(build("bert"), peft.LoraConfig(target_modules=["query", "value"])).save_pretrained(folder / "l")
    shutil.copy(folder / "l" / WEIGHTS, folder / WEIGHTS)
    shutil.rmtree(folder / "l")


def config(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        values = json.loads((folder / CONFIG).read_text())
        change(values)
        (folder / CONFIG).write_text(json.dumps(values))

    return spoil


def broken_json(folder: Path) -> None:
    (folder / CONFIG).write_text((folder / CONFIG).read_text()[:-20])


BAD_FOLDERS: dict[str, tuple[Callable[[Path], None], type[Exception], str]] = {
    "truncated": (truncated, ValueError, "cannot be read.*truncated"),
    "truncated in the header": (header_truncated, ValueError, "cannot be read"),
    "garbage": (garbage, ValueError, "cannot be read"),
    "empty": (empty, ValueError, "cannot be read"),
    "no weights": (no_weights, ValueError, "no adapter_model.safetensors"),
    "hostile pickle": (hostile_pickle, ValueError, "a pickle, which can run code"),
    "harmless pickle": (harmless_pickle, ValueError, "a pickle, which can run code"),
    "LoRA's weights": (lora_weights, ValueError, "holds no FVAE-LoRA weights"),
    "a missing tensor": (drop("layer.1", "query", "encoder2_mean_weight"), ValueError, "encoder2_mean_weight.*missing"),
    "a missing layer": (drop("layer.1", "value"), ValueError, r"no weights for.*layer\.1.*value"),
    "an extra layer": (put(f"{STEM.replace('query', 'key')}B", DIM, 3), ValueError, "key', which is not adapted"),
    "an extra tensor": (put(f"{STEM}encoder3_weight", 3), ValueError, "encoder3_weight.*unknown"),
    "an extra tensor of no adapter": (put("base_model.model.bert.nonsense", 3), ValueError, "nonsense.*unknown"),
    "a wrong shape": (put(f"{STEM}B", DIM, 4), ValueError, r"B is \(24, 4\) in the file and \(24, 3\)"),
    "embeddings of another size": (
        put("base_model.model.bert.embeddings.word_embeddings.weight", 50, DIM),
        ValueError,
        r"word_embeddings.*\(50, 24\) in the file and \(40, 24\)",
    ),
    "no head": (drop("classifier.weight"), ValueError, "classifier.weight is missing"),
    "another head": (put("base_model.model.classifier.weight", 9, DIM), ValueError, r"classifier.weight is \(9, 24\)"),
    "a bad value": (config(lambda c: c.update(r=0)), ValueError, "rank=0 is not allowed"),
    "a bad type": (config(lambda c: c.update(dropout="much")), ValueError, "dropout='much' is not allowed"),
    "a bad pattern": (config(lambda c: c.update(loss_weight=[["(", 1.0]])), ValueError, "regular expression"),
    "a missing rank": (config(lambda c: c.pop("r")), ValueError, "does not fit"),
    "another rank": (config(lambda c: c.update(r=4)), ValueError, "does not fit"),
    "other targets": (config(lambda c: c.update(target_modules=["query"])), ValueError, "which is not adapted"),
    "broken JSON": (broken_json, ValueError, r"line \d+ column \d+"),
    "an unused pattern": (config(lambda c: c.update(loss_weight=[["key", 1.0], [".*", 1.0]])), ValueError, "'key'"),
}
