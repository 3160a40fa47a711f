"""The search before the reported runs: rates and at most one weight of its own for each method, under one budget.

Searched runs use a seed and so training examples of their own, and are judged on validation alone.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice, product
from typing import Any

from . import records

SEED = 1000  # not among the reported ones
BUDGET = 4  # runs of each method

# Each list begins with what a small budget should try. All have the same length, so that no method gets more.
RATES = (1e-3, 5e-3, 2e-3, 5e-4, 1e-2, 2e-4, 2e-2, 1e-4)
FULL_RATES = (5e-5, 2e-4, 1e-4, 2e-5, 5e-4, 1e-5, 1e-3, 5e-6)  # all weights move
PROMPT_RATES = (1e-2, 5e-2, 3e-2, 3e-3, 1e-1, 1e-3, 3e-1, 5e-4)  # a few vectors move

Candidate = tuple[float, float | None]  # learning rate, own weight (None: the method's default)


@dataclass(frozen=True)
class Search:
    """What a method is searched over.

    Args:
        rates: learning rates.
        option: name of the method's own weight, if it has one.
        values: its values beside the method's default.
    """

    rates: Sequence[float] = RATES
    option: str | None = None
    values: Sequence[float] = ()

    def candidates(self, budget: int = BUDGET) -> list[Candidate]:
        """Exactly `budget` pairs: of 4, four rates, or two rates by two values of the own weight.

        Raises:
            ValueError: if the budget is none, or more than there are rates.
        """
        if not 1 <= budget <= len(self.rates):
            raise ValueError(f"a budget of {budget} runs is not allowed: expected 1 to {len(self.rates)}, the rates")
        weights = (None, *self.values)[: math.isqrt(budget)]
        rates = self.rates[: math.ceil(budget / len(weights))]
        return list(islice(product(rates, weights), budget))


def value(row: Mapping[str, Any], early_stopping: bool = True) -> float:
    """Validation of a run, where it was best if that is known, higher is better; minus infinity if the run failed."""
    scores = (row.get("validation_best") if early_stopping else None) or row.get("validation")
    if not scores or row.get("failed"):
        return -math.inf
    return float(scores["average"]) if "average" in scores else -float(scores["nats"])


def chosen(
    rows: Iterable[Mapping[str, Any]], cells: Sequence[Mapping[str, Any]], early_stopping: bool = True
) -> Candidate | None:
    """The candidate among these cells of a search that is best on validation; None while one has not been run.

    Of equals it is the first one. If every run has failed it is the first one too. Runs are judged where validation was
    best if that is known, or without `early_stopping` at the last step.
    """
    by_cell = {records.cell(row): row for row in rows}
    found = [by_cell.get(records.cell(cell)) for cell in cells]
    if not all(found):
        return None
    best = max(filter(None, found), key=lambda row: value(row, early_stopping))
    return best["lr"], best["weight"]
