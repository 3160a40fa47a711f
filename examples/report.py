"""Scores with their uncertainty, and the demo's table."""

import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from rich import box
from rich.table import Table
from torch import Tensor

from examples.data import Group, Snippet, group_name

RARE = tuple(group_name(group) for group in ((0, 0), (1, 1)))
# 97.5 % quantiles of Student's t with 1, 2, ... degrees of freedom
STUDENT = (
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228),
    *(2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086),
)


@dataclass(frozen=True)
class Share:
    """A share of correct answers."""

    right: int
    total: int

    @property
    def value(self) -> float:
        return self.right / self.total

    @property
    def interval(self) -> tuple[float, float]:
        return wilson(self.right, self.total)

    def __str__(self) -> str:
        low, high = self.interval
        return f"{self.value:.3f} [{low:.3f}, {high:.3f}]"


@dataclass(frozen=True)
class Result:
    """All numbers of the table for one method."""

    method: str
    title: str
    validation: float
    validation_worst: float
    groups: dict[str, Share]
    trainable: int
    served: int
    adapter_bytes: int
    seconds_per_step: float
    time_ratio: float | None  # time / LoRA's, the median over steps on equal batches

    @property
    def overall(self) -> Share:
        return Share(sum(s.right for s in self.groups.values()), sum(s.total for s in self.groups.values()))

    @property
    def rare(self) -> Share:
        """The groups that are rare in training: source and label disagree."""
        chosen = [self.groups[name] for name in RARE if name in self.groups]
        return Share(sum(s.right for s in chosen), sum(s.total for s in chosen))

    @property
    def worst(self) -> str:
        return min(self.groups, key=lambda name: self.groups[name].value)


def wilson(right: int, total: int, z: float = 1.959964) -> tuple[float, float]:
    """Wilson's score interval of a share; 95 % by default."""
    if not 0 <= right <= total or total == 0:
        raise ValueError(f"{right} of {total} is not a share")
    p, zz = right / total, z * z / total
    centre, half = p + zz / 2, z * math.sqrt(p * (1 - p) / total + zz / (4 * total))
    return max(0.0, (centre - half) / (1 + zz)), min(1.0, (centre + half) / (1 + zz))


def interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Mean, and the bounds of its 95 % t interval; infinite for a single value."""
    mean = statistics.mean(values)
    if len(values) < 2:
        return mean, -math.inf, math.inf
    half = STUDENT[min(len(values) - 1, len(STUDENT)) - 1] * statistics.stdev(values) / math.sqrt(len(values))
    return mean, mean - half, mean + half


def by_group(logits: Tensor, snippets: Sequence[Snippet]) -> dict[str, Share]:
    """Correct answers in each (label, source) group."""
    right: dict[Group, list[bool]] = {}
    for guess, snippet in zip(logits.argmax(-1).tolist(), snippets, strict=True):
        right.setdefault(snippet.group, []).append(guess == snippet.label)
    return {group_name(group): Share(sum(hits), len(hits)) for group, hits in sorted(right.items())}


def time_ratio(seconds: Sequence[float], baseline: Sequence[float]) -> float:
    """Median over steps of the ratio of two times on one batch; a busy machine changes it little."""
    return statistics.median(mine / theirs for mine, theirs in zip(seconds, baseline, strict=True))


def table(results: Sequence[Result]) -> Table:
    """One column for each method; fits 80 characters, also in plain text."""
    out = Table(
        box=box.ASCII2, title=f"Test: {results[0].overall.total} snippets in {len(results[0].groups)} equal groups"
    )
    out.add_column("")
    for result in results:
        out.add_column(result.title, justify="right")

    def row(title: str, *cells: str, end: bool = False) -> None:
        out.add_row(title, *cells, end_section=end)

    row("accuracy [95 %]", *(str(r.overall) for r in results))
    row("worst group [95 %]", *(str(r.groups[r.worst]) for r in results))
    row("  which is", *(r.worst for r in results))
    row("two rare groups [95 %]", *(str(r.rare) for r in results), end=True)
    for name in results[0].groups:
        row(name, *(str(r.groups[name]) for r in results), end=name == list(results[0].groups)[-1])
    row("trainable parameters", *(f"{r.trainable:,}" for r in results))
    row("parameters to serve", *(f"{r.served:,}" for r in results))
    row("saved adapter, KB", *(f"{r.adapter_bytes / 1000:,.0f}" for r in results))
    row("seconds per step, median", *(f"{r.seconds_per_step:.3f}" for r in results))
    row("  of LoRA's", *("-" if r.time_ratio is None else f"{r.time_ratio:.2f}" for r in results))
    return out


def verdict(results: Sequence[Result]) -> str:
    """What one seed shows: the difference of two methods, and if it exceeds the test set's noise."""
    if len(results) != 2:
        return ""
    base, ours = results
    difference = ours.overall.value - base.overall.value
    spread = math.sqrt(sum(s.value * (1 - s.value) / s.total for s in (base.overall, ours.overall)))
    half = 1.959964 * spread
    apart = "that is more than" if abs(difference) > half else "within"
    return (
        f"{ours.title} - {base.title}: accuracy {difference:+.3f}, {apart} the noise of the test set ({half:.3f}); "
        f"rare groups {ours.rare.value - base.rare.value:+.3f}. One seed: --seeds 5 gives an interval."
    )


def paired(per_seed: Sequence[Sequence[Result]]) -> list[str]:
    """Differences of two methods over seeds, with 95 % t intervals of their mean."""
    if len(per_seed) < 2 or len(per_seed[0]) != 2:
        return []
    scores = {
        "accuracy": lambda r: r.overall.value,
        "worst group": lambda r: r.groups[r.worst].value,
        "two rare groups": lambda r: r.rare.value,
    }
    lines = [f"{per_seed[0][1].title} - {per_seed[0][0].title}, paired by seed, 95 % t interval:"]
    for name, score in scores.items():
        mean, low, high = interval([score(ours) - score(base) for base, ours in per_seed])
        lines.append(f"  {name}: {mean:+.3f} [{low:+.3f}, {high:+.3f}]")
    return lines


def seeds_table(per_seed: Sequence[Sequence[Result]]) -> Table:
    """Mean and standard deviation over seeds."""
    out = Table(box=box.ASCII2, title=f"Mean and standard deviation over {len(per_seed)} seeds")
    for column in ("", "accuracy", "worst group", "two rare groups"):
        out.add_column(column, justify="right" if column else "left")
    for runs in zip(*per_seed, strict=True):
        scores = (
            [r.overall.value for r in runs],
            [r.groups[r.worst].value for r in runs],
            [r.rare.value for r in runs],
        )
        out.add_row(runs[0].title, *(f"{statistics.mean(s):.3f} +- {statistics.stdev(s):.3f}" for s in scores))
    return out


def save(results: Sequence[Result], settings: object, path: Path) -> None:
    """The table's numbers as JSON, with the settings that made them."""
    content = {"settings": asdict(settings), "results": [asdict(r) | {"worst": r.worst} for r in results]}  # type: ignore[call-overload]
    path.write_text(json.dumps(content, indent=1) + "\n")
