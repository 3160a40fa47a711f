"""python -m examples.compare.report: means, and differences to LoRA paired by seed, as Markdown tables.

--write puts them into docs/recipes.md.
"""

import argparse
import math
import statistics
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.pages import replace_block
from examples.assets import ROOT
from examples.report import interval

from . import records
from .methods import METHODS

PAGE, MARK = ROOT / "docs" / "recipes.md", "evidence"
SCORES = ("average", "worst", "minority", "nats")  # those that every run of a table has
CHANCE = 0.95 * math.log(2)  # a mean task loss above this in the last third: the run stayed at chance

Runs = Mapping[int, Mapping[str, Any]]  # by seed


def by_setting(rows: Iterable[Mapping[str, Any]]) -> dict[tuple[Any, ...], dict[str, dict[int, Mapping[str, Any]]]]:
    """(task, epochs, lr) -> method -> seed -> run."""
    out: dict[Any, Any] = defaultdict(lambda: defaultdict(dict))
    for row in rows:
        out[row["task"], row["epochs"], row["lr"]][row["method"]][row["seed"]] = row
    return out


def differences(runs: Runs, baseline: Runs, score: str) -> list[float]:
    """Run minus baseline, for each seed that both have."""
    shared = sorted(set(runs) & set(baseline))
    return [_value(runs[seed], score) - _value(baseline[seed], score) for seed in shared]


def _value(run: Mapping[str, Any], score: str) -> float:
    """A test score; infinite where a diverged run has none."""
    value = run["test"][score]
    return math.inf if value is None else value


def lines(methods: Mapping[str, Runs], baseline: str) -> Iterator[str]:
    """The table of one setting."""
    found = [s for s in SCORES if all(s in run["test"] for runs in methods.values() for run in runs.values())]
    scores = [f"{score} - {METHODS[baseline].title}'s" for score in found]
    yield f"| | n | {' | '.join(found)} | {' | '.join(scores)} | at chance |"
    yield "|" + "---|" * (2 * len(found) + 3)
    for name, runs in methods.items():
        means = [f"{statistics.mean(_value(r, s) for r in runs.values()):.3f}" for s in found]
        paired = ["" if name == baseline else _paired(runs, methods.get(baseline, {}), s) for s in found]
        failed = sum(r["failed"] if "failed" in r else r["task_loss"][-1] > CHANCE for r in runs.values())
        cells = [METHODS[name].title, len(runs), *means, *paired, failed]
        yield f"| {' | '.join(map(str, cells))} |"


def _paired(runs: Runs, baseline: Runs, score: str) -> str:
    found = differences(runs, baseline, score)
    if not found:
        return ""
    if len(found) == 1:
        return f"{found[0]:+.3f} (n = 1)"
    mean, low, high = interval(found)
    return f"{mean:+.3f} [{low:+.3f}, {high:+.3f}] (n = {len(found)})"


def tables(rows: Iterable[Mapping[str, Any]], baseline: str = "lora") -> list[str]:
    """One table for each setting, in the order of the runs."""
    out: list[str] = []
    for (task, epochs, lr), methods in by_setting(rows).items():
        rate = "learning rates searched" if lr is None else f"learning rate {lr:g}"
        out += ["", f"{task}, {epochs} epochs, {rate}; 95 % t intervals, paired by seed", ""]
        out += lines(methods, baseline)
    return [*out, ""]


def main(argv: Sequence[str] | None = None) -> None:
    """Print the tables, or write them into the page."""
    options = argparse.ArgumentParser(prog="examples.compare.report", description=__doc__)
    options.add_argument("--runs", type=Path, default=records.FILE, help="JSON lines (benchmarks/results/runs.jsonl)")
    options.add_argument("--baseline", default="lora", choices=sorted(METHODS))
    options.add_argument("--write", action="store_true", help=f"into {PAGE.name} instead of printing")
    args = options.parse_args(argv)
    found = tables(filter(records.scored, records.read(args.runs)), args.baseline)
    if args.write:
        replace_block(PAGE, MARK, found)
    else:
        print("\n".join(found))


if __name__ == "__main__":
    main()
