"""Timing in turns, ratios of pairs, and their intervals.

Two sides that are timed one after the other run on a changed machine: clocks, caches and neighbours change times by
more than the difference of interest. So every round runs every side once, a ratio is taken within a round, and the
median over rounds gets an interval that assumes no distribution.
"""

import gc
import math
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

Run = Callable[[], object]
Clock = Callable[[], float]
Seconds = dict[str, list[float]]
SWEEP = 2.0  # seconds between garbage collections; none runs while the clock runs


@dataclass(frozen=True)
class Estimate:
    """A median, and the interval that holds the true median with probability `coverage`."""

    value: float
    low: float
    high: float
    coverage: float

    def __str__(self) -> str:
        return f"{self.value:.2f} [{self.low:.2f}, {self.high:.2f}]"


def timed(run: Run, calls: int = 1, clock: Clock = time.perf_counter) -> float:
    """Seconds of one call by the clock (the wall's), the mean of `calls` in a row."""
    start = clock()
    for _ in range(calls):
        run()
    return (clock() - start) / calls


def warm_up(run: Run) -> float:
    """Warm up; return seconds of a second call, or of the first if that was slow."""
    first = timed(run)
    return first if first > 2.0 else min(first, timed(run))


def interleave(
    runs: Mapping[str, Run],
    seconds: float,
    minimum: int = 5,
    maximum: int = 200,
    call_seconds: float = 0.01,
    clock: Clock = time.perf_counter,
) -> Seconds:
    """Time every side once in each round, in a new random order, until `seconds` are over.

    In a fixed order a side would always run on the caches of the same neighbour. Each side runs before the first
    round, twice if it is quick; this decides how many calls fill `call_seconds`. With `time.process_time` as the clock,
    the time in which others have the cores does not count.
    """
    warm = {name: warm_up(run) for name, run in runs.items()}
    calls = {name: max(1, math.ceil(call_seconds / max(one, 1e-7))) for name, one in warm.items()}
    names, order = list(runs), random.Random(0)
    found: Seconds = {name: [] for name in runs}
    start, done, swept = time.perf_counter(), 0, 0.0
    while done < minimum or (done < maximum and time.perf_counter() - start < seconds):
        if time.perf_counter() - swept > SWEEP:
            gc.collect()
            swept = time.perf_counter()
        gc.disable()
        try:
            for name in order.sample(names, len(names)):
                found[name].append(timed(runs[name], calls[name], clock))
        finally:
            gc.enable()
        done += 1
    return found


def median(values: Sequence[float]) -> float:
    """The middle value, or the mean of the two in the middle."""
    ordered, half = sorted(values), len(values) // 2
    return ordered[half] if len(ordered) % 2 else (ordered[half - 1] + ordered[half]) / 2


def estimate(values: Sequence[float], confidence: float = 0.95) -> Estimate:
    """The median and its interval from order statistics; the whole range if there are too few values.

    The k-th smallest and the k-th largest of n values enclose the true median with probability
    ``1 - 2 P(Binomial(n, 1/2) < k)``, whatever their distribution.
    """
    n, ordered = len(values), sorted(values)
    if n == 0:
        raise ValueError("no values to estimate a median from")
    tail, k = 2.0**-n, 1
    while k < (n + 1) // 2 and 2 * (tail + math.comb(n, k) * 2.0**-n) <= 1 - confidence:
        tail += math.comb(n, k) * 2.0**-n
        k += 1
    return Estimate(median(ordered), ordered[k - 1], ordered[n - k], max(0.0, 1 - 2 * tail))


def ratio(
    seconds: Mapping[str, Sequence[float]],
    side: str,
    baseline: str,
    beyond: str | None = None,
    confidence: float = 0.95,
) -> Estimate:
    """Time of `side` / time of `baseline`, paired by round; the time of side `beyond` is subtracted from both."""
    rounds = zip(
        seconds[side], seconds[baseline], seconds[beyond] if beyond else [0.0] * len(seconds[side]), strict=True
    )
    return estimate([(a - c) / (b - c) if b > c else math.inf for a, b, c in rounds], confidence)


def power_law(sizes: Sequence[float], costs: Sequence[float]) -> tuple[float, float]:
    """Exponent and its standard error in ``cost = c size^exponent``, by least squares on logarithms."""
    points = [(math.log(s), math.log(c)) for s, c in zip(sizes, costs, strict=True) if c > 0]
    n = len(points)
    if n < 2:
        return math.nan, math.nan
    mean_x, mean_y = sum(x for x, _ in points) / n, sum(y for _, y in points) / n
    spread = sum((x - mean_x) ** 2 for x, _ in points)
    slope = sum((x - mean_x) * (y - mean_y) for x, y in points) / spread
    residual = sum((y - mean_y - slope * (x - mean_x)) ** 2 for x, y in points)
    return slope, math.sqrt(residual / (n - 2) / spread) if n > 2 else math.nan
