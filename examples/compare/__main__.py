"""python -m examples.compare: run the cells that are not yet in the file, seed by seed."""

import argparse
import os
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from . import records


def seeds(text: str) -> list[int]:
    """The seeds in a text, for example "0-4,7"."""
    out: list[int] = []
    for part in text.split(","):
        low, _, high = part.partition("-")
        out += range(int(low), int(high or low) + 1)
    return out


def main(argv: Sequence[str] | None = None) -> None:
    """Run the cells, and print each one when it is finished."""
    options = argparse.ArgumentParser(prog="examples.compare", description=__doc__)
    options.add_argument("--tasks", default="text,images", help="comma-separated (text,images)")
    options.add_argument("--methods", required=True, help="comma-separated names of examples/compare/methods.py")
    options.add_argument("--seeds", type=seeds, default=seeds("0-9"), help="as 0-4,7 (0-9)")
    options.add_argument("--epochs", type=int, help="instead of the task's own")
    options.add_argument("--lr", type=float, help="instead of the task's own")
    options.add_argument("--out", type=Path, default=records.FILE, help="JSON lines (benchmarks/results/runs.jsonl)")
    args = options.parse_args(argv)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # model and data are local files
    from . import tasks, training
    from .methods import METHODS

    methods = args.methods.split(",")
    if unknown := sorted(set(methods) - set(METHODS)):
        options.error(f"there is no method {unknown}; there are {list(METHODS)}")
    found = [tasks.find(name) for name in args.tasks.split(",")]
    for seed in args.seeds:
        for task in found:
            recipe = replace(task.recipe, epochs=args.epochs or task.recipe.epochs, lr=args.lr or task.recipe.lr)
            cell = {"task": task.name, "seed": seed, "epochs": recipe.epochs, "lr": recipe.lr, "weight": None}
            done = {records.cell(row) for row in records.read(args.out)}
            todo = [row for row in ({**cell, "method": m} for m in methods) if records.cell(row) not in done]
            splits = task.splits(seed) if todo else None
            for row in todo:
                assert splits is not None
                result = training.run(task, METHODS[row["method"]], seed, splits, recipe)
                records.append(args.out, {**row, **result, "at": time.strftime("%Y-%m-%dT%H:%M:%S")})
                test = result["test"]
                print(f"{row}: average {test['average']:.3f}, worst group {test['worst']:.3f}", flush=True)


if __name__ == "__main__":
    main()
