"""What is measured, in pieces that are run, limited and written one by one. Imports nothing that takes long."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Found = dict[str, Any]


@dataclass(frozen=True)
class Plan:
    """Where the run is: its folder, and whether it is a dry run (interpreted on the CPU, tiny, without a clock)."""

    folder: Path
    dry: bool = False

    @property
    def device(self) -> str:
        """That the cases run on."""
        return "cpu" if self.dry else "cuda"


@dataclass(frozen=True)
class Case:
    """One result: plain numbers that `run` returns, or the error that it raises, within so many seconds."""

    part: str
    name: str
    run: Callable[[Plan], Found]
    seconds: float = 60.0

    @property
    def key(self) -> str:
        """Its name among all cases."""
        return f"{self.part}: {self.name}"


@dataclass(frozen=True)
class Part:
    """Cases of one kind: the share of ``--minutes`` that a first pass gives them, and how many run at a time."""

    name: str
    title: str
    share: float
    workers: int = 1
