"""python -m examples.compare.report: means, and differences to LoRA paired by seed, as Markdown tables.

--write puts them into docs/claims.md, with verdicts and pictures, and those of the presets into docs/recipes.md.
"""

import argparse
import math
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from benchmarks.pages import replace_block, row
from examples.assets import ROOT

from . import claims, figures, records, statements
from .methods import METHODS
from .paired import Name, Row, Runs, by_setting, differences, shown, value
from .records import Setting
from .training import AT_CHANCE

DOCS = ROOT / "docs"
CLAIMS, RECIPES, PICTURES = DOCS / "claims.md", DOCS / "recipes.md", DOCS / "claims"
PRESETS = ("lora", "lora-dropout", "fvae", "fvae-free", "fvae-paper", "fvae-authors")
PRESET_TASKS = ("text", "images", "images-long", "audio", "perplexity")
SCORES = ("average", "worst", "minority", "nats")  # those that every run of a table has
CHANCE = AT_CHANCE * math.log(2)  # of older runs, which do not say if they failed: all have two classes


def lines(methods: Mapping[Name, Runs], baseline: str) -> Iterator[str]:
    """The table of one setting."""
    every = [run for runs in methods.values() for run in runs.values()]
    found = [score for score in SCORES if all(score in run["test"] for run in every)]
    best = found[:1] if all("curve" in run for run in every) else []  # runs that looked at validation along the way
    titles = [f"{s} - {METHODS[baseline].title}'s" for s in found] + [f"{s}, early stopping" for s in best]
    yield row(["", "n", *found, *titles, "at chance"])
    yield "|" + "---|" * (len(found) + len(titles) + 3)
    against = next((name for name in methods if name[0] == baseline), None)
    for name, runs in methods.items():
        paired = ["" if name == against else _paired(runs, methods.get(against, {}), s) for s in found]  # type: ignore[arg-type]
        means = [_mean(runs, s) for s in found], [_mean(runs, s, early_stopping=True) for s in best]
        failed = sum(r["failed"] if "failed" in r else r["task_loss"][-1] > CHANCE for r in runs.values())
        yield row([title(name), str(len(runs)), *means[0], *paired, *means[1], str(failed)])


def _mean(runs: Runs, score: str, early_stopping: bool = False) -> str:
    return f"{statistics.mean(value(run, score, early_stopping) for run in runs.values()):.3f}"


def title(name: Name) -> str:
    """A method's title, with its own weight if that was searched."""
    method, weight = METHODS[name[0]], name[1]
    return method.title + ("" if weight is None else f", {method.search.option} {weight:g}")


def _paired(runs: Runs, baseline: Runs, score: str) -> str:
    found = differences(runs, baseline, score)
    return f"{shown(found)} (n = {len(found)})" if found else ""


def tables(rows: Iterable[Row], baseline: str = "lora") -> list[str]:
    """One table for each setting, in the order of the runs."""
    out: list[str] = []
    for setting, methods in by_setting(rows).items():
        out += ["", f"{heading(setting)}; 95 % t intervals, paired by seed", ""]
        out += lines(methods, baseline)
    return [*out, ""]


def heading(setting: Setting) -> str:
    """A setting in words."""
    rate = "learning rates searched" if setting.lr is None else f"learning rate {setting.lr:g}"
    size = f", batches of {setting.batch_size}" if setting.batch_size else ""
    return f"{setting.task}, {setting.epochs} epochs, {rate}{size}" + ", a quick run" * setting.quick


def blocks(rows: Sequence[Row]) -> dict[tuple[Path, str], list[str]]:
    """What the command writes: lines by page and mark."""
    presets = [run for run in rows if run["method"] in PRESETS and run["task"] in PRESET_TASKS]
    return {
        (RECIPES, "evidence"): tables(presets),
        (CLAIMS, "claims"): ["", *claims.lines(rows, statements.PAPER), ""],
        (CLAIMS, "long"): ["", *claims.lines(rows, statements.LONG), ""],
        (CLAIMS, "questions"): ["", *claims.lines(rows, statements.OURS), ""],
        (CLAIMS, "tables"): tables(rows),
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Print the tables, or write pages and pictures."""
    options = argparse.ArgumentParser(prog="examples.compare.report", description=__doc__)
    options.add_argument("--runs", type=Path, default=records.FILE, help="JSON lines (benchmarks/results/runs.jsonl)")
    options.add_argument("--baseline", default="lora", choices=sorted(METHODS))
    options.add_argument("--write", action="store_true", help="pages and pictures in docs, instead of printing")
    args = options.parse_args(argv)
    rows = list(records.read(args.runs))
    if not args.write:
        print("\n".join(tables(rows, args.baseline)))
        return
    for (page, mark), found in blocks(rows).items():
        replace_block(page, mark, found)
    for path in figures.draw(rows, PICTURES):
        print(path.relative_to(ROOT))


if __name__ == "__main__":
    main()
