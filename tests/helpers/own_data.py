"""Small data as a user may have it: tables, pictures and recordings by class."""

import json
import math
import wave
from pathlib import Path
from typing import Any

import torch

from tests.helpers.texts import words


def rows(count: int = 40, labels: tuple[str, ...] = ("bad", "good"), sources: int = 2) -> list[dict[str, Any]]:
    """Texts whose first word tells the label; a third of each label's are from the source of another."""
    found = []
    for i in range(count):
        y = i % len(labels)
        source = f"s{(y + (i // len(labels) % 3 == 0)) % sources}"
        found.append({"text": f"{words(7 * y, 2)} {words(i, 3)} n{i}", "label": labels[y], "group": source})
    return found


def write(path: Path, found: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(exist_ok=True, parents=True)
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in found))
    else:
        lines = [",".join(found[0]), *(",".join(f'"{value}"' for value in row.values()) for row in found)]
        path.write_text("\n".join(lines) + "\n")
    return path


def pictures(folder: Path, counts: dict[str, int]) -> Path:
    from PIL import Image

    for y, (name, count) in enumerate(counts.items()):
        (folder / name).mkdir(parents=True)
        for i in range(count):
            Image.new("RGB", (12, 10), (200 * y, i, 40)).save(folder / name / f"{i}.png")
    return folder


def recordings(folder: Path, count: int = 8, rate: int = 800) -> Path:
    for y, name in enumerate(("low", "high")):
        (folder / name).mkdir(parents=True)
        for i in range(count):
            tone = torch.sin(torch.arange(160 + 8 * i) * 2 * math.pi * (20 + 80 * y) / rate)
            with wave.open(str(folder / name / f"{i}.wav"), "wb") as file:
                file.setparams((1, 2, rate, 0, "NONE", ""))
                file.writeframes((tone * 20000).to(torch.int16).numpy().tobytes())
    return folder
