"""python -m examples.compare.report: means, and differences to LoRA paired by seed, as Markdown tables.

--write puts them into docs/claims.md, with verdicts and pictures, and those of the presets into docs/recipes.md.
"""

import argparse
import math
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from benchmarks.pages import replace_block
from examples.assets import ROOT

from . import claims, figures, records
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
    found = [s for s in SCORES if all(s in run["test"] for runs in methods.values() for run in runs.values())]
    scores = [f"{score} - {METHODS[baseline].title}'s" for score in found]
    yield f"| | n | {' | '.join(found)} | {' | '.join(scores)} | at chance |"
    yield "|" + "---|" * (2 * len(found) + 3)
    against = next((name for name in methods if name[0] == baseline), None)
    for name, runs in methods.items():
        means = [f"{statistics.mean(value(r, s) for r in runs.values()):.3f}" for s in found]
        paired = ["" if name == against else _paired(runs, methods.get(against, {}), s) for s in found]  # type: ignore[arg-type]
        failed = sum(r["failed"] if "failed" in r else r["task_loss"][-1] > CHANCE for r in runs.values())
        yield f"| {' | '.join(map(str, [title(name), len(runs), *means, *paired, failed]))} |"


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
    presets = [row for row in rows if row["method"] in PRESETS and row["task"] in PRESET_TASKS]
    return {
        (RECIPES, "evidence"): tables(presets),
        (CLAIMS, "claims"): ["", *claims.lines(rows, claims.PAPER), ""],
        (CLAIMS, "questions"): ["", *claims.lines(rows, claims.OURS), ""],
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
