"""python -m benchmarks.evidence.report: means, and differences to a baseline paired by seed, as a Markdown table."""

import argparse
import math
import statistics
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from examples.report import interval

from . import records
from .methods import METHODS

SCORES = ("average", "worst", "minority")
CHANCE = 0.95 * math.log(2)  # a task loss in the last third above this has stayed at chance

Runs = Mapping[int, Mapping[str, Any]]  # by seed


def by_setting(rows: Iterable[Mapping[str, Any]]) -> dict[tuple[Any, ...], dict[str, dict[int, Mapping[str, Any]]]]:
    """(task, epochs, lr) -> method -> seed -> run."""
    out: dict[Any, Any] = defaultdict(lambda: defaultdict(dict))
    for row in rows:
        out[row["task"], row["epochs"], row["lr"]][row["method"]][row["seed"]] = row
    return out


def differences(runs: Runs, baseline: Runs, score: str) -> list[float]:
    """Run minus baseline of each seed that both have."""
    shared = sorted(set(runs) & set(baseline))
    return [runs[seed]["test"][score] - baseline[seed]["test"][score] for seed in shared]


def lines(methods: Mapping[str, Runs], baseline: str) -> Iterator[str]:
    """The table of one setting."""
    scores = [f"{score} - {METHODS[baseline].title}'s" for score in SCORES]
    yield f"| | n | {' | '.join(SCORES)} | {' | '.join(scores)} | at chance | CPU s |"
    yield "|" + "---|" * (2 * len(SCORES) + 4)
    for name, runs in methods.items():
        means = [f"{statistics.mean(r['test'][s] for r in runs.values()):.3f}" for s in SCORES]
        paired = ["" if name == baseline else _paired(runs, methods.get(baseline, {}), s) for s in SCORES]
        failed = sum(r["task_loss"][-1] > CHANCE for r in runs.values())
        cpu = statistics.median(r["cpu_seconds"] for r in runs.values())
        cells = [METHODS[name].title, len(runs), *means, *paired, failed, f"{cpu:.0f}"]
        yield f"| {' | '.join(map(str, cells))} |"


def _paired(runs: Runs, baseline: Runs, score: str) -> str:
    found = differences(runs, baseline, score)
    if not found:
        return ""
    if len(found) == 1:
        return f"{found[0]:+.3f} (n = 1)"
    mean, low, high = interval(found)
    return f"{mean:+.3f} [{low:+.3f}, {high:+.3f}] (n = {len(found)})"


def main(argv: Sequence[str] | None = None) -> None:
    """Print one table a setting."""
    options = argparse.ArgumentParser(prog="benchmarks.evidence.report", description=__doc__)
    options.add_argument("--runs", type=Path, default=records.FILE, help="JSON lines (benchmarks/evidence/runs.jsonl)")
    options.add_argument("--baseline", default="lora", choices=sorted(METHODS))
    args = options.parse_args(argv)
    for (task, epochs, lr), methods in by_setting(records.read(args.runs)).items():
        print(f"\n{task}, {epochs} epochs, learning rate {lr:g}; 95 % t intervals, paired by seed\n")
        print("\n".join(lines(methods, args.baseline)))


if __name__ == "__main__":
    main()
