"""Cases: each is run, limited and written by itself. Imports nothing slow."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Found = dict[str, Any]


@dataclass(frozen=True)
class Plan:
    """Settings of a run: its folder, and if it is a dry run (interpreted on the CPU, tiny, without a clock)."""

    folder: Path
    dry: bool = False

    @property
    def device(self) -> str:
        """The device that the cases run on."""
        return "cpu" if self.dry else "cuda"


@dataclass(frozen=True)
class Case:
    """One measurement: `run` returns plain numbers or raises, within a limit of seconds."""

    part: str
    name: str
    run: Callable[[Plan], Found]
    seconds: float = 60.0

    @property
    def key(self) -> str:
        """Name of the case among all cases."""
        return f"{self.part}: {self.name}"


@dataclass(frozen=True)
class Part:
    """Cases of one kind, their share of ``--minutes`` in the first pass, and how many run at a time."""

    name: str
    title: str
    share: float
    workers: int = 1
