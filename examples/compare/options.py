"""The command line of examples.compare."""

import argparse
import sys
from pathlib import Path
from typing import NoReturn

from . import records, search

EPILOG = "docs/compare.md says how to read what it prints. Ctrl-C stops it; the same command goes on."


class Parser(argparse.ArgumentParser):
    """Says in one line what is wrong."""

    def error(self, message: str) -> NoReturn:
        """Print the line and end with status 2."""
        print(f"{self.prog}: {message}", file=sys.stderr)
        raise SystemExit(2)


def seeds(text: str) -> list[int]:
    """The seeds in a text, for example "0-4,7"."""
    out: list[int] = []
    try:
        for part in text.split(","):
            low, _, high = part.partition("-")
            out += range(int(low), int(high or low) + 1)
    except ValueError:
        out = []
    if not out:
        raise argparse.ArgumentTypeError(f"{text!r} are no seeds; expected for example 0-4 or 0,3,7-9")
    return list(dict.fromkeys(out))


def whole(text: str) -> int:
    """A whole number above zero."""
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above zero")
    return int(text)


def rate(text: str) -> float:
    """A learning rate."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a learning rate; expected a number above zero, as 5e-3")
    return value


def parser() -> Parser:
    """All options."""
    out = Parser(
        prog="examples.compare",
        usage="python -m examples.compare [options]",
        description="Compare methods: train each on each task with each seed, where that is not yet in the file.",
        epilog=EPILOG,
    )
    out.add_argument("--list", action="store_true", help="list methods and tasks, and end")
    _what(out.add_argument_group("what is compared"))
    _own(out.add_argument_group("your own data"))
    _how(out.add_argument_group("how"))
    return out


def _what(group: "argparse._ArgumentGroup") -> None:
    group.add_argument("--methods", help="comma-separated methods and groups (lora,fvae; with --quick: all)")
    group.add_argument("--baseline", help="the method that others are compared with (the first one)")
    group.add_argument("--tasks", help="comma-separated (text,images; with --quick: all)")
    group.add_argument("--seeds", type=seeds, help="as 0-4,7 (0-4; with --quick: 0)")
    group.add_argument("--epochs", type=whole, help="instead of the task's own")
    group.add_argument("--lr", type=rate, help="learning rate of every method, instead of the task's own")
    group.add_argument(
        "--search", action="store_true", help="choose rate and weight of each method on validation first"
    )
    group.add_argument("--budget", type=whole, default=search.BUDGET, help="runs of each method's search (4)")
    group.add_argument(
        "--no-early-stopping", dest="early_stopping", action="store_false", help="evaluate at the last step alone"
    )


def _own(group: "argparse._ArgumentGroup") -> None:
    group.add_argument("--data", type=Path, help="a CSV or JSONL, a folder of images or audio by class, or a text")
    group.add_argument("--model", help="folder or name of a pretrained model")
    group.add_argument("--kind", help="text, images, audio or language, where the path does not say it")
    group.add_argument("--text", help="column of the texts")
    group.add_argument("--label", help="column of the labels")
    group.add_argument("--group", help="column of the groups, for the worst group")
    group.add_argument("--max-tokens", type=whole, help="longer texts are cut")
    group.add_argument("--targets", help="comma-separated modules that get adapters (PEFT's choice for the model)")
    group.add_argument("--batch-size", type=whole, help="instead of the task's own")


def _how(group: "argparse._ArgumentGroup") -> None:
    group.add_argument("--out", type=Path, help=f"JSON lines ({records.FILE.name} in {records.FILE.parent.name})")
    group.add_argument("--jobs", type=whole, default=1, help="processes, one thread each (1)")
    group.add_argument("--dry-run", action="store_true", help="say how many cells are open, and end")
    group.add_argument(
        "--quick", action="store_true", help="a few steps on a few examples, into a temporary file: does it run?"
    )
