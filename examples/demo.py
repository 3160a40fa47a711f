"""Fine-tune a pretrained sentence encoder with LoRA and with FVAE-LoRA, side by side, and compare them.

    python -m examples.demo --help

Model and data are real (examples/assets.py). In training the source of a review snippet predicts its sentiment; in the
test it does not (examples/data.py). Both methods see the same batches in the same order and start from the same
classifier.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from examples.train import Settings

QUICK = {"train_size": 32, "batch_size": 8, "steps": 3, "test_per_group": 8}


def number(kind: type, low: float, high: float = float("inf"), above: bool = False) -> Any:
    """An argparse type: a number within bounds, with an error that names them."""
    bounds = f"{'above' if above else 'at least'} {low}" + (f" and at most {high}" if high < float("inf") else "")

    def parse(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = float("nan")
        if not low <= value <= high or (above and value == low) or value in (float("inf"),):
            raise argparse.ArgumentTypeError(f"{text!r}: expected a {'whole ' * (kind is int)}number, {bounds}")
        return value

    return parse


def parser() -> argparse.ArgumentParser:
    """The options; None stands for the default of `Settings`."""
    out = argparse.ArgumentParser(
        prog="examples.demo",
        description="Fine-tune MiniLM on review sentiment with LoRA and FVAE-LoRA side by side, and compare them.",
        epilog="Through make: make demo ARGS='--rank 8 --seed 1'. The first run downloads 86 MB.",
    )
    count, weight = number(int, 1), number(float, 0)
    out.add_argument("--method", choices=("both", "lora", "fvae"), default="both", help="what to train (both)")
    out.add_argument("--rank", type=count, metavar="R", help="rank of the update, size of each latent space (16)")
    length = out.add_mutually_exclusive_group()
    length.add_argument("--epochs", type=count, metavar="N", help="passes over the training set (3)")
    length.add_argument("--steps", type=count, metavar="N", help="optimiser steps, instead of epochs")
    out.add_argument("--train-size", type=number(int, 32), metavar="N", help="training snippets (1200)")
    out.add_argument(
        "--rho",
        type=number(float, 0, 1),
        help="share of the training snippets whose source agrees with the label (0.8)",
    )
    out.add_argument(
        "--seed", type=number(int, 0), metavar="S", help="of everything random: sample, order, start, noise (0)"
    )
    out.add_argument("--seeds", type=count, default=1, metavar="N", help="repeat with N seeds, S, S + 1, ... (1)")
    out.add_argument("--lr", type=number(float, 0, above=True), help="learning rate (5e-3)")
    out.add_argument("--lr-fvae", type=number(float, 0, above=True), metavar="LR", help="another one for FVAE-LoRA")
    out.add_argument(
        "--preset", choices=("default", "paper"), help="networks, start and noise, see docs/recipes.md (default)"
    )
    out.add_argument(
        "--loss-weight",
        type=weight,
        metavar="W",
        help="lambda, of each layer's auxiliary loss (1 / (1000 * adapted layers))",
    )
    out.add_argument("--recon-weight", type=weight, metavar="W", help="alpha, of the reconstruction (1)")
    out.add_argument("--kl-weight", type=weight, metavar="W", help="beta, of KL(q_1 || p_1) (3)")
    out.add_argument("--gamma-weight", type=weight, metavar="W", help="delta, of Gamma (1)")
    out.add_argument("--out", type=Path, default=Path("runs/demo"), metavar="DIR", help="where results go (runs/demo)")
    out.add_argument("--quick", action="store_true", help="a few steps on little data, to see that everything works")
    return out


def settings_of(args: argparse.Namespace) -> "Settings":
    from examples.train import Settings

    given = {
        name: value for name, value in vars(args).items() if name in Settings.__dataclass_fields__ and value is not None
    }
    methods = ("lora", "fvae") if args.method == "both" else (args.method,)
    settings = {**(QUICK if args.quick else {}), **given, "methods": methods}
    if args.epochs:
        settings.pop("steps", None)
    return Settings(**settings)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo; 0 if it worked and the saved adapters load."""
    options = parser()
    args = options.parse_args(argv)
    if args.out.exists() and not args.out.is_dir():
        options.error(f"argument --out: {args.out} is not a folder")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # model and data are local files
    os.environ.setdefault(
        "OMP_WAIT_POLICY", "PASSIVE"
    )  # before torch loads: waiting threads leave a busy core to others
    from rich.console import Console

    from examples import assets, data, report

    try:
        files = assets.fetch()
    except assets.AssetError as error:
        print(error, file=sys.stderr)
        return 1
    from examples.one_seed import one_seed
    from examples.train import shrink

    console = Console(highlight=False)
    settings = settings_of(args)
    splits = shrink(settings, data.split(data.load(files.sdist)))
    try:
        samples = [data.training_set(splits.train, settings.train_size, settings.rho, s) for s in seeds(args, settings)]
    except ValueError as error:
        options.error(str(error))
    every, sound = [], True
    for seed, sample in zip(seeds(args, settings), samples, strict=True):
        out = args.out if args.seeds == 1 else args.out / f"seed-{seed}"
        results, good = one_seed(replace(settings, seed=seed), files.model, splits, sample, out, console)
        every.append(results)
        sound = sound and good
    if args.seeds > 1:
        console.print(report.seeds_table(every))
        for line in report.paired(every):
            console.print(line)
    return 0 if sound else 1


def seeds(args: argparse.Namespace, settings: "Settings") -> range:
    return range(settings.seed, settings.seed + args.seeds)


if __name__ == "__main__":
    sys.exit(main())
