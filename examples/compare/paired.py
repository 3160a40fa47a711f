"""Runs of two methods on a task, paired by seed."""

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from itertools import product
from typing import Any

from examples.report import interval

from . import records, search
from .methods import METHODS
from .records import Setting

Row = Mapping[str, Any]
Runs = Mapping[int, Row]  # by seed
Name = tuple[str, float | None]  # method and its own weight
Tables = Mapping[Setting, Mapping[Name, Runs]]


def by_setting(rows: Iterable[Row]) -> Tables:
    """Setting -> (method, own weight) -> seed -> run; of runs with scores, and none of a search.

    Setting, name and seed are all of a run's cell, so runs of different cells are never under one name.
    """
    out: dict[Any, Any] = defaultdict(lambda: defaultdict(dict))
    for row in rows:
        if records.scored(row) and not row.get("search"):
            out[records.setting(row)][row["method"], row.get("weight")][row["seed"]] = row
    return {setting: dict(methods) for setting, methods in out.items()}


def at_one_rate(rows: Iterable[Row], task: str, first: str, second: str) -> tuple[Runs, Runs]:
    """The runs of both at the setting at which they share most seeds, without weights of their own."""
    tables = [methods for setting, methods in by_setting(rows).items() if setting.task == task]
    pairs = [(methods.get((first, None), {}), methods.get((second, None), {})) for methods in tables]
    shared = [pair for pair in pairs if pair[0].keys() & pair[1].keys()]
    return max(shared, key=lambda pair: len(pair[0].keys() & pair[1].keys()), default=({}, {}))


def at_searched_rates(
    rows: Iterable[Row], task: str, first: str, second: str, early_stopping: bool = False
) -> tuple[Runs, Runs]:
    """The runs of both, each at the rate and weight that its search found; none without finished searches.

    Both searches have the same budget, the largest that both have finished, and are judged as the runs will be: at the
    last step, or where validation was best.
    """
    rows = list(rows)
    tables = by_setting(rows)
    tried = dict.fromkeys(records.setting(row)._replace(lr=None) for row in rows if row.get("search"))
    budgets = range(min(len(METHODS[method].search.rates) for method in (first, second)), 1, -1)
    for budget, setting in product(budgets, [setting for setting in tried if setting.task == task]):
        one, other = (_at_searched_rate(rows, tables, setting, m, budget, early_stopping) for m in (first, second))
        if one and other:
            return one, other
    return {}, {}


def _at_searched_rate(
    rows: Sequence[Row], tables: Tables, setting: Setting, method: str, budget: int, early_stopping: bool
) -> Runs:
    """The runs of a method at the rate and weight that its search with this budget found."""
    candidates = METHODS[method].search.candidates(budget)
    tried = records.cells(setting, method, search.SEED, candidates, search=True)
    found = search.chosen(rows, tried, early_stopping)
    if found is None:
        return {}
    lr, weight = found
    return tables.get(setting._replace(lr=lr), {}).get((method, weight), {})


def differences(runs: Runs, baseline: Runs, score: str, early_stopping: bool = False) -> list[float]:
    """Test score of run minus baseline, for each seed that both have; infinite where one has diverged."""
    pairs = [(runs[seed], baseline[seed]) for seed in sorted(runs.keys() & baseline.keys())]
    if early_stopping:  # of runs that looked for it
        pairs = [pair for pair in pairs if all("curve" in run for run in pair)]
    return [value(one, score, early_stopping) - value(other, score, early_stopping) for one, other in pairs]


def shown(values: Sequence[float]) -> str:
    """The mean of differences and its 95 % t interval; a single one alone."""
    mean, low, high = interval(values)
    return f"{mean:+.3f}" + (f" [{low:+.3f}, {high:+.3f}]" if len(values) > 1 else "")


def value(run: Row, score: str, early_stopping: bool = False) -> float:
    """A test score at the last step, or where validation was best; infinite where a diverged run has none."""
    found = (run.get("test_best") if early_stopping else None) or run["test"]
    return math.inf if found[score] is None else float(found[score])
