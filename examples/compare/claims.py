"""The paper's claims, the comparisons that test them here, and verdicts.

A comparison is one difference between two methods on a task, paired by seed. An advantage is confirmed if its whole
95 % interval is above zero, and not confirmed if the interval leaves no room for an advantage of one point. A claim is
confirmed if all of its comparisons are, and not confirmed if one is not confirmed. Else: cannot tell. What has no runs
decides nothing, and is not on the page.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from examples.report import interval

from .methods import METHODS
from .paired import at_one_rate, at_searched_rates, differences, shown

CONFIRMED, NOT_CONFIRMED, CANNOT_TELL = "confirmed", "not confirmed", "cannot tell"
POINT = 0.01  # of accuracy, or nats: a smaller advantage is none
MARGIN = 0.02  # a good default may be so much behind
SEEDS = 5  # fewer decide nothing


@dataclass(frozen=True)
class Comparison:
    """`better` is said to have a better `score` than `worse` on `task`."""

    task: str
    better: str
    worse: str = "lora"
    score: str = "average"
    searched: bool = False  # each at the rate (and weight) that its own search found; else both at one rate
    early_stopping: bool = False  # each where validation was best; else at the last step
    allowed: float = 0.0  # above 0: the claim is only that `better` is not so much behind


@dataclass(frozen=True)
class Claim:
    """A sentence of the paper, where it is, and the comparisons that test it."""

    says: str
    source: str
    comparisons: Sequence[Comparison]


@dataclass(frozen=True)
class Measured:
    """A comparison with its differences, one for each seed; those of nats are turned, so that more is better."""

    comparison: Comparison
    values: Sequence[float]
    rates: Sequence[str] = ()  # of both, with weights that were searched

    @property
    def verdict(self) -> str:
        """See the module's text."""
        if len(self.values) < SEEDS:
            return CANNOT_TELL
        _, low, high = interval(self.values)
        allowed = self.comparison.allowed
        if low > -allowed:
            return CONFIRMED
        return NOT_CONFIRMED if high < (-allowed or POINT) else CANNOT_TELL


def measure(comparison: Comparison, rows: Iterable[Mapping[str, Any]]) -> Measured:
    """The comparison on these runs."""
    what = comparison.task, comparison.better, comparison.worse
    stopped = comparison.early_stopping
    pair = at_searched_rates(rows, *what, stopped) if comparison.searched else at_one_rate(rows, *what)
    found = differences(*pair, comparison.score, stopped)
    if comparison.score == "nats":
        found = [-value for value in found]
    return Measured(comparison, found, [_rate(next(iter(runs.values()))) for runs in pair] if found else ())


def _rate(row: Mapping[str, Any]) -> str:
    """Learning rate, and own weight, of a run."""
    own = "" if row.get("weight") is None else f" ({METHODS[row['method']].search.option} {row['weight']:g})"
    return f"{row['lr']:g}{own}"


def verdict(measured: Sequence[Measured]) -> str:
    """The verdict of a claim."""
    found = {one.verdict for one in measured}
    if NOT_CONFIRMED in found:
        return NOT_CONFIRMED
    return CONFIRMED if found == {CONFIRMED} else CANNOT_TELL


def lines(rows: Iterable[Mapping[str, Any]], claims: Sequence[Claim]) -> Iterator[str]:
    """The claims as a Markdown table, a line for each comparison that has runs."""
    rows = list(rows)
    yield "| claim | task | difference | of | rate | n | mean [95 %] | verdict |"
    yield "|" + "---|" * 8
    for claim in claims:
        measured = [measure(comparison, rows) for comparison in claim.comparisons]
        if found := [_line(one) for one in measured if one.values]:
            yield f"| **{claim.says}** ({claim.source}) | | | | | | | **{verdict(measured)}** |"
            yield from found


def _line(measured: Measured) -> str:
    one, values = measured.comparison, measured.values
    titles = f"{METHODS[one.better].title} - {METHODS[one.worse].title}"
    of = one.score + ", early stopping" * one.early_stopping + (f"; not {one.allowed:g} behind" if one.allowed else "")
    rates = ", ".join(dict.fromkeys(measured.rates)) if not one.searched else f"searched: {', '.join(measured.rates)}"
    cells = one.task, titles, of, rates, str(len(values)), shown(values), measured.verdict
    return f"| | {' | '.join(cells)} |"
