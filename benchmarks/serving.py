"""The ways to serve a trained adapter: sizes, what is lost, speed.

    python -m benchmarks.serving --write

Trains the demo's task (MiniLM, review sentiment) with a linear encoder and with hidden layers, writes each adapter in
every form, loads each form on a fresh base model, and compares. Stock LoRA is loaded by PEFT alone. Times are of
the processor in forward passes in turns (benchmarks/stats.py), over the base model's.
"""

import argparse
import os
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import fvae_kernels as fk

from . import stats
from .pages import replace_block, row

ROOT = Path(__file__).resolve().parent.parent
README, PAGE = ROOT / "README.md", ROOT / "docs" / "serving.md"
METHODS = {"fvae": "linear encoder (the default)", "fvae-paper": "hidden layers (the paper's)"}  # of examples.compare
TOLERANCE = 1e-3
HEADER = (
    *("encoder", "served as", "needs", "adapter, KB", "rank", "energy lost", "accuracy", "same predictions"),
    *("ms", "of the base model's"),
)
SHORT = ("as it is", "stock LoRA", "merged")  # rows of the README


@dataclass
class Form:
    """One way to serve: the model that does, and what its files hold."""

    name: str
    needs: str
    model: nn.Module
    bytes: int
    rank: str
    lost: float


def forms(trained: Any, base: Callable[[], nn.Module], data: list[Any], folder: Path) -> Iterable[Form]:
    """The trained adapter in every form, loaded from its folder."""
    import peft

    linear = not trained.peft_config["default"].encoder_hidden
    R = str(trained.peft_config["default"].r)

    def loaded(name: str) -> nn.Module:
        return peft.PeftModel.from_pretrained(base(), folder / name).eval()

    trained.save_pretrained(folder / "full")
    report = fk.export_for_inference(trained, folder / "served")
    yield Form("as it is", "this package", loaded("full"), report.full_bytes, R, 0.0)
    yield Form("`export_for_inference`", "this package", loaded("served"), report.served_bytes, R, 0.0)
    report = fk.export_for_inference(trained, folder / "small", tolerance=TOLERANCE, calibration=data)
    name = f"`export_for_inference`, tolerance {TOLERANCE:g}"
    yield Form(name, "this package", loaded("small"), report.served_bytes, *_ranks(report.layers))
    lora = fk.export_as_lora(trained, folder / "lora", data)
    size = sum(layer.bytes for layer in lora.layers)
    yield Form("stock LoRA", "stock PEFT", loaded("lora"), size, *_ranks(lora.layers))
    lora = fk.export_as_lora(trained, folder / "smaller", data, tolerance=TOLERANCE, uniform_rank=False)
    size = sum(layer.bytes for layer in lora.layers)
    yield Form(f"stock LoRA, tolerance {TOLERANCE:g}", "stock PEFT", loaded("smaller"), size, *_ranks(lora.layers))
    if linear:
        yield Form("merged", "nothing", trained.merge_and_unload(), 0, "-", 0.0)


def _ranks(layers: Sequence[Any]) -> tuple[str, float]:
    ranks = [layer.rank for layer in layers]
    low, high = min(ranks), max(ranks)
    return (str(low) if low == high else f"{low}-{high}"), max(layer.lost for layer in layers)


@torch.no_grad()
def predictions(model: nn.Module, batches: list[Any]) -> tuple[Tensor, Tensor]:
    """Classes and labels of all examples."""
    model.eval()
    guesses = torch.cat([model(**inputs)["logits"].argmax(-1) for inputs, _ in batches])
    return guesses, torch.cat([labels for _, labels in batches])


def compare(name: str, task: Any, recipe: Any, seconds: float) -> list[list[str]]:
    """A row for each form of one method."""
    from examples.compare.methods import METHODS as ADAPTED
    from examples.compare.training import train

    splits = task.splits(0)
    trained = ADAPTED[name].adapt(task.model(0), task)
    train(task, trained, splits.train, recipe, 0)
    trained.eval()
    data = [dict(task.batch(splits.train[i : i + 64])[0]) for i in range(0, 512, 64)]
    tests = sorted(splits.test, key=lambda e: len(e.text))
    batches = [task.batch(tests[i : i + 64]) for i in range(0, len(tests), 64)]
    expected, labels = predictions(trained, batches)
    with tempfile.TemporaryDirectory() as folder:
        found = list(forms(trained, lambda: task.model(0), data, Path(folder)))
    timed = dict(task.batch(tests[len(tests) // 2 :][:32])[0])
    runs = {form.name: _forward(form.model, timed) for form in found}
    taken = stats.interleave(
        {"base": _forward(task.model(0).eval(), timed), **runs}, seconds, minimum=15, clock=time.process_time
    )
    rows = []
    for form in found:
        guesses, _ = predictions(form.model, batches)
        accuracy, same = (guesses == labels).double().mean(), (guesses == expected).double().mean()
        rows.append(
            [
                *(METHODS[name], form.name, form.needs, f"{form.bytes / 1e3:,.0f}" if form.bytes else "-", form.rank),
                *("0" if form.lost == 0 else f"{form.lost:.1e}", f"{accuracy:.3f}", f"{same:.1%}"),
                *(f"{1e3 * stats.median(taken[form.name]):.0f}", str(stats.ratio(taken, form.name, "base"))),
            ]
        )
        print(row(rows[-1]), flush=True)
    return rows


def _forward(model: nn.Module, batch: dict[str, Tensor]) -> Callable[[], Any]:
    def run() -> Any:
        with torch.no_grad():
            return model(**batch)

    return run


def table(rows: Sequence[Sequence[str]]) -> list[str]:
    """A markdown table."""
    return [row(HEADER), "|" + "---|" * len(HEADER), *map(row, rows)]


def main(argv: Sequence[str] | None = None) -> None:
    """Train, export, load, compare, print; and write the pages where asked to."""
    options = argparse.ArgumentParser(prog="benchmarks.serving", description=__doc__.partition("\n")[0])
    options.add_argument("--epochs", type=int, default=1, help="of training, 37 steps each (1)")
    options.add_argument("--seconds", type=float, default=60.0, help="of timing, for each method (60)")
    options.add_argument("--write", action="store_true", help="write the tables of README.md and docs/serving.md")
    args = options.parse_args(argv)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # model and data are local files
    from examples.compare import tasks

    task = tasks.find("text")
    recipe = replace(task.recipe, epochs=args.epochs)
    rows = [found for name in METHODS for found in compare(name, task, recipe, args.seconds)]
    if args.write:
        replace_block(README, "serving", table([r for r in rows if r[1] in SHORT]))
        replace_block(PAGE, "serving", table(rows))


if __name__ == "__main__":
    main()
