"""Runs of two methods on a task, paired by seed."""

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from examples.report import interval

from . import records
from .methods import METHODS

Row = Mapping[str, Any]
Runs = Mapping[int, Row]  # by seed
Name = tuple[str, float | None]  # method and its own weight
Tables = Mapping[tuple[Any, ...], Mapping[Name, Runs]]
Setting = tuple[int, float, float | None]  # epochs, learning rate, own weight


def by_setting(rows: Iterable[Row]) -> Tables:
    """(task, epochs, lr) -> (method, own weight) -> seed -> run; of runs with scores, and none of a search."""
    out: dict[Any, Any] = defaultdict(lambda: defaultdict(dict))
    for row in rows:
        if records.scored(row) and not row.get("search"):
            name = row["method"], row.get("weight")
            out[row["task"], row["epochs"], row["lr"]][name][row["seed"]] = row
    return out


def settings(rows: Iterable[Row], task: str, method: str) -> dict[Setting, Runs]:
    """The runs of one method on one task, by setting."""
    return {
        (epochs, lr, weight): runs
        for (of, epochs, lr), methods in by_setting(rows).items()
        for (name, weight), runs in methods.items()
        if (of, name) == (task, method)
    }


def at_one_rate(rows: Iterable[Row], task: str, first: str, second: str) -> tuple[Runs, Runs]:
    """The runs of both at the setting at which they share most seeds, without weights of their own."""
    rows = list(rows)
    one, other = settings(rows, task, first), settings(rows, task, second)
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
    return settings(rows, task, method).get((best["epochs"], best["lr"], best.get("weight")), {})


def differences(runs: Runs, baseline: Runs, score: str) -> list[float]:
    """Test score of run minus baseline, for each seed that both have; infinite where one has diverged."""
    shared = sorted(runs.keys() & baseline.keys())
    return [value(runs[seed], score) - value(baseline[seed], score) for seed in shared]


def shown(values: Sequence[float]) -> str:
    """The mean of differences and its 95 % t interval; a single one alone."""
    mean, low, high = interval(values)
    return f"{mean:+.3f}" + (f" [{low:+.3f}, {high:+.3f}]" if len(values) > 1 else "")


def value(run: Row, score: str) -> float:
    """A test score; infinite where a diverged run has none."""
    found = run["test"][score]
    return math.inf if found is None else float(found)
