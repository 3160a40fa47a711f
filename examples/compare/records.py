"""JSON lines, one for each finished run, and the cells they belong to."""

import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from examples.assets import ROOT

FILE = ROOT / "benchmarks" / "results" / "runs.jsonl"
Key = tuple[Any, ...]


class Setting(NamedTuple):
    """What runs must share to be compared: one table has one setting."""

    task: str
    epochs: int
    lr: float | None  # None: every method at the rate that its search found
    batch_size: int | None  # None: the task's own
    quick: bool


def setting(row: Mapping[str, Any]) -> Setting:
    """The setting of a run."""
    return Setting(*(row.get(name) for name in Setting._fields[:-1]), quick=bool(row.get("quick")))  # type: ignore[arg-type]


def cell(row: Mapping[str, Any]) -> Key:
    """The key of a run, its setting and more: runs with equal keys are the same cell.

    A run of the search, a quick one, or one with a batch size other than the task's, is another cell.
    """
    return (*setting(row), row.get("method"), row.get("weight"), row.get("seed"), bool(row.get("search")))


def cells(
    of: Setting, method: str, seed: int, pairs: Iterable[tuple[float, float | None]], search: bool = False
) -> list[dict[str, Any]]:
    """Runs to come at these learning rates and own weights, in place of the setting's rate."""
    shared = {"task": of.task, "method": method, "seed": seed, "epochs": of.epochs, "search": search}
    more = {name: value for name, value in (("batch_size", of.batch_size), ("quick", of.quick)) if value}
    return [{**shared, "lr": lr, "weight": weight, **more} for lr, weight in pairs]


def read(path: Path = FILE) -> Iterator[dict[str, Any]]:
    """The runs of a file, the last one of each cell; none if the file is missing.

    Raises:
        ValueError: for a line that is no run; it says which.
    """
    if not path.is_file():
        return
    rows = []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        if not line.strip():
            continue
        try:
            rows.append(json.loads(line))
            cell(rows[-1])
        except (ValueError, AttributeError):
            raise ValueError(
                f"{path}, line {number} is no run: {line[:60]!r}. Remove it, or choose another file"
            ) from None
    yield from {cell(row): row for row in rows}.values()


def finished(row: Mapping[str, Any]) -> bool:
    """True unless the run was ended by an error; such a cell is run again."""
    return "error" not in row


def scored(row: Mapping[str, Any]) -> bool:
    """True for a run with test scores: none of the search, and none that did not apply or was ended by an error."""
    return "test" in row


def append(path: Path, row: Mapping[str, Any]) -> None:
    """Append a run, whole: in one write, so that several processes may append and a killed one leaves no half line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    line = (json.dumps(_finite(row), allow_nan=False) + "\n").encode()
    file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        if os.write(file, line) != len(line):
            raise OSError(f"{path}: the disk took part of a line; remove its last line and run again")
    finally:
        os.close(file)


def _finite(value: Any) -> Any:
    """The value with None for each number in it that is infinite or not a number, which JSON has no words for."""
    if isinstance(value, Mapping):
        return {name: _finite(each) for name, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
