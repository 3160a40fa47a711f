"""Runs of two methods on a task, paired by seed."""

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

from .methods import METHODS

Row = Mapping[str, Any]
Runs = Mapping[int, Row]  # by seed
Setting = tuple[int, float, float | None]  # epochs, learning rate, own weight


def by_setting(rows: Iterable[Row], task: str, method: str) -> dict[Setting, dict[int, Row]]:
    """The scored runs of a method, by setting and seed."""
    out: dict[Setting, dict[int, Row]] = defaultdict(dict)
    for row in rows:
        if (row["task"], row["method"]) == (task, method) and "test" in row and not row.get("search"):
            out[row["epochs"], row["lr"], row.get("weight")][row["seed"]] = row
    return out


def at_one_rate(rows: Iterable[Row], task: str, first: str, second: str) -> tuple[Runs, Runs]:
    """The runs of both at the setting at which they share most seeds, without weights of their own."""
    rows = list(rows)
    one, other = by_setting(rows, task, first), by_setting(rows, task, second)
    shared = [setting for setting in one if setting in other and setting[2] is None]
    best = max(shared, key=lambda setting: len(one[setting].keys() & other[setting].keys()), default=None)
    return ({}, {}) if best is None else (one[best], other[best])


def searched(rows: Iterable[Row], task: str, method: str) -> Runs:
    """The runs of a method at the setting that its search found best on validation; none without a search."""
    rows = list(rows)
    tried = [row for row in rows if row.get("search") and (row["task"], row["method"]) == (task, method)]
    if not tried:
        return {}
    best = METHODS[method].search.best(tried)
    return by_setting(rows, task, method).get((best["epochs"], best["lr"], best.get("weight")), {})


def differences(runs: Runs, baseline: Runs, score: str) -> list[float]:
    """Test score of run minus baseline, for each seed that both have; infinite where one has diverged."""
    shared = sorted(runs.keys() & baseline.keys())
    return [value(runs[seed], score) - value(baseline[seed], score) for seed in shared]


def value(run: Row, score: str) -> float:
    """A test score; infinite where a diverged run has none."""
    found = run["test"][score]
    return math.inf if found is None else float(found)
