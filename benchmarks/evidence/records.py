"""JSON lines: one finished run each, and which cells they hold."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

FILE = Path(__file__).with_name("runs.jsonl")
CELL = ("task", "method", "seed", "epochs", "lr")


def cell(row: Mapping[str, Any]) -> tuple[Any, ...]:
    """What makes two runs the same."""
    return tuple(row[name] for name in CELL)


def read(path: Path = FILE) -> Iterator[dict[str, Any]]:
    """The runs of a file, the last of those that are the same; none where it is missing."""
    if not path.is_file():
        return
    rows = [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
    yield from {cell(row): row for row in rows}.values()


def append(path: Path, row: Mapping[str, Any]) -> None:
    """Add a run at the end; a killed process leaves whole lines behind."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write(json.dumps(row) + "\n")
