"""Pictures of the runs: groups, learning curves, ladders of beta and noise, cost."""

import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from examples.report import interval

from .claims import SEEDS
from .methods import ABLATIONS, METHODS
from .paired import Runs, by_setting, value

Rows = Sequence[Mapping[str, Any]]
Panel = Callable[[Axes], None]
Panels = Callable[[Rows], Iterable[Panel]]
SHOWN = ("lora", "lora-dropout", "dora", "fvae", "fvae-free", "fvae-paper")
COLOURS = dict(zip(SHOWN, ("#7f7f7f", "#bcbd22", "#2ca02c", "#1f77b4", "#17becf", "#d62728"), strict=True))
TASKS = ("images", "images-long", "text", "audio")
BETAS = {"fvae-paper-beta-0.1": 0.1, "fvae-paper-beta-1": 1.0, "fvae-paper": 3.0, "fvae-paper-beta-10": 10.0}
NOISE = {"fvae-sd-0.05": 0.05, "fvae": 0.14, "fvae-sd-0.37": 0.37, "fvae-sd-1": 1.0}
SCORES = {"average": "o-", "minority": "s--"}


def draw(rows: Rows, folder: Path) -> list[Path]:
    """Write the pictures into the folder; those that these runs allow."""
    folder.mkdir(parents=True, exist_ok=True)
    found = [_picture(rows, folder / f"{name}.png", parts) for name, parts in PICTURES.items()]
    return [path for path in found if path is not None]


def _picture(rows: Rows, path: Path, parts: Panels) -> Path | None:
    panels = list(parts(rows))
    if not panels:
        return None
    figure, axes = plt.subplots(
        *(1, len(panels)), figsize=(4.6 * len(panels), 3.8), layout="constrained", squeeze=False
    )
    for axis, panel in zip(axes[0], panels, strict=True):
        panel(axis)
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=90)
    plt.close(figure)
    return path


def _mean(values: Sequence[float]) -> tuple[float, float]:
    """Mean, and half of its 95 % t interval; 0 for a single value."""
    mean, low, _ = interval(values)
    return mean, mean - low if len(values) > 1 else 0.0


def _shares(rows: Rows, task: str, methods: Iterable[str], least: int = SEEDS) -> dict[str, Runs]:
    """The methods that have runs enough, all at one setting: that at which most of them have."""
    tables = [table for setting, table in by_setting(rows).items() if setting.task == task]
    found = [{m: table[m, None] for m in methods if len(table.get((m, None), ())) >= least} for table in tables]
    return max(found, key=len, default={})


def _groups(rows: Rows) -> Iterator[Panel]:
    """Worst group against average."""
    for task in TASKS:
        methods = {
            m: runs for m, runs in _shares(rows, task, SHOWN).items() if "worst" in next(iter(runs.values()))["test"]
        }
        if len(methods) > 1:
            yield partial(_against, task=task, methods=methods)


def _against(axis: Axes, task: str, methods: Mapping[str, Runs]) -> None:
    for method, runs in methods.items():
        (x, dx), (y, dy) = (_mean([value(run, score) for run in runs.values()]) for score in ("average", "worst"))
        label = f"{METHODS[method].title} ({len(runs)})"
        axis.errorbar(x, y, dy, dx, fmt="o", color=COLOURS[method], label=label, capsize=2, alpha=0.85)
    axis.set(title=task, xlabel="average accuracy", ylabel="worst group")
    axis.margins(y=0.35)  # room for the legend
    axis.legend(fontsize=6)


def _curves(rows: Rows) -> Iterator[Panel]:
    """Validation along the training."""
    for task in TASKS:
        methods = _shares(rows, task, SHOWN)
        curves = {m: [r["curve"] for r in runs.values() if len(r.get("curve", ())) > 1] for m, runs in methods.items()}
        curves = {method: found for method, found in curves.items() if len(found) > 2 and "average" in found[0][0]}
        if len(curves) > 1:
            yield partial(_along, task=task, curves=curves)


def _along(axis: Axes, task: str, curves: Mapping[str, Sequence[Sequence[Mapping[str, float]]]]) -> None:
    for method, found in curves.items():
        epochs = [point["epoch"] for point in found[0]]
        means = [_mean([curve[i]["average"] for curve in found]) for i in range(len(epochs))]
        label = f"{METHODS[method].title} ({len(found)})"
        axis.plot(epochs, [mean for mean, _ in means], color=COLOURS[method], label=label)
        low, high = [m - half for m, half in means], [m + half for m, half in means]
        axis.fill_between(epochs, low, high, color=COLOURS[method], alpha=0.12)
    axis.set(title=task, xlabel="epoch", ylabel="validation, average")
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.legend(fontsize=6)


def _ladders(rows: Rows) -> Iterator[Panel]:
    """Beta of the paper's recipe, and the noise of z_1 of the default, on the images."""
    for title, steps in (("β, the paper's recipe", BETAS), ("standard deviation of z₁ held, the default", NOISE)):
        methods = _shares(rows, "images", steps)
        if len(methods) > 1:
            yield partial(_ladder, title=title, steps=steps, methods=methods)


def _ladder(axis: Axes, title: str, steps: Mapping[str, float], methods: Mapping[str, Runs]) -> None:
    for score, form in SCORES.items():
        means = [_mean([value(run, score) for run in runs.values()]) for runs in methods.values()]
        axis.errorbar(
            *([steps[m] for m in methods], [m for m, _ in means], [half for _, half in means]),
            fmt=form, capsize=2, label=score,
        )  # fmt: skip
    axis.set(xscale="log", xlabel=title, ylabel="images, test")
    axis.legend(fontsize=7)


def _cost(rows: Rows) -> Iterator[Panel]:
    """Time of the training beside LoRA's, and quality."""
    for task in TASKS:
        methods = _shares(rows, task, [method for method in METHODS if method not in ABLATIONS])
        if "lora" in methods and len(methods) > 2 and "average" in next(iter(methods["lora"].values()))["test"]:
            yield partial(_costs, task=task, methods=methods)


def _costs(axis: Axes, task: str, methods: Mapping[str, Runs]) -> None:
    for method, runs in methods.items():
        shared = runs.keys() & methods["lora"].keys()
        if not shared:
            continue
        x = statistics.median(runs[seed]["cpu_seconds"] / methods["lora"][seed]["cpu_seconds"] for seed in shared)
        y, half = _mean([value(run, "average") for run in runs.values()])
        axis.errorbar(x, y, half, fmt="o", color=COLOURS.get(method, "#cccccc"), capsize=2)
        axis.annotate(method, (x, y), fontsize=6, xytext=(3, 2), textcoords="offset points")
    axis.set(title=task, xlabel="CPU time of training / LoRA's", ylabel="average accuracy")
    axis.margins(x=0.25)


PICTURES: Mapping[str, Panels] = {
    "groups": _groups,
    "curves": _curves,
    "ladders": _ladders,
    "cost": _cost,
}
