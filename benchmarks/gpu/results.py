"""The results file: one JSON line for the run, then one for each case, written as soon as the case ends."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from .case import Found

NAME = "results.jsonl"
ROOT = Path(__file__).parent.parent.parent
SOURCES = ("fvae_kernels", "benchmarks", "tests/helpers")


def fingerprint(root: Path = ROOT) -> str:
    """Fingerprint of the sources that results depend on: results of other sources are not continued."""
    files = sorted(path for folder in SOURCES for path in (root / folder).rglob("*.py"))
    return hashlib.sha256(b"\0".join(path.read_bytes() for path in files)).hexdigest()[:16]


class Results:
    """Results so far, by case; the file is written after every change.

    Results of an earlier run in the same folder are kept if `identity` is equal; else their file is renamed.
    """

    def __init__(self, folder: Path, identity: Found) -> None:
        self.path, self.cases = folder / NAME, dict[str, Found]()
        before, cases = read(self.path)
        if before == identity:
            self.cases = {key: one for key, one in cases.items() if "error" not in one}
            _write(self.path, [identity, *({"case": key, **one} for key, one in self.cases.items())])
        else:
            if before is not None:
                os.replace(self.path, _free_name(self.path))
            _write(self.path, [identity])

    def add(self, key: str, one: Found) -> None:
        """Add a result or an error; it is on disk when this returns."""
        self.cases[key] = one
        with self.path.open("a") as file:
            file.write(json.dumps({"case": key, **one}) + "\n")
            file.flush()
            os.fsync(file.fileno())


def read(path: Path) -> tuple[Found | None, dict[str, Found]]:
    """The identity of a file's run, and its cases; an incomplete line is left out."""
    lines: list[Any] = []
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            lines.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    if not lines:
        return None, {}
    return lines[0], {one.pop("case"): one for one in lines[1:]}


def _write(path: Path, lines: list[Found]) -> None:
    replace_text(path, "".join(json.dumps(line) + "\n" for line in lines))


def replace_text(path: Path, text: str) -> None:
    """Write a file atomically: whole or not at all."""
    part = path.with_name(path.name + ".part")
    part.write_text(text)
    os.replace(part, path)


def _free_name(path: Path) -> Path:
    number = 1
    while (name := path.with_name(f"{path.stem}-{number}{path.suffix}")).exists():
        number += 1
    return name
