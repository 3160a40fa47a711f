"""JSON lines, one for each finished run, and the cells they belong to."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from examples.assets import ROOT

FILE = ROOT / "benchmarks" / "results" / "runs.jsonl"
CELL = ("task", "method", "seed", "epochs", "lr", "weight")


def cell(row: Mapping[str, Any]) -> tuple[Any, ...]:
    """The key of a run: runs with equal keys are the same cell."""
    return tuple(row.get(name) for name in CELL)


def read(path: Path = FILE) -> Iterator[dict[str, Any]]:
    """The runs of a file, the last one of each cell; none if the file is missing."""
    if not path.is_file():
        return
    rows = [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
    yield from {cell(row): row for row in rows}.values()


def append(path: Path, row: Mapping[str, Any]) -> None:
    """Append a run; a killed process leaves only whole lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write(json.dumps(row) + "\n")
