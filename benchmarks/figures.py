"""The two pictures of the report: ratio by model, and cost against N and D."""

import math
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import StrMethodFormatter

from .goals import Results, exponents
from .sides import TITLES
from .stats import Estimate, ratio

COLOURS = {
    "cpp": "#c1272d",
    "triton": "#e07b39",
    "cpp_default": "#e06c6f",
    "triton_default": "#f0b48a",
    "plain": "#7f7f7f",
    "compiled": "#b9b9b9",
    "lora": "#1b6ca8",
    "dora": "#5ba4cf",
    "hira": "#a3cfe8",
}
MARKERS = {"cpp": "o", "triton": "D", "plain": "s", "lora": "^", "dora": "v"}


def ratios(groups: list[dict[str, Any]], path: Path, note: str) -> None:
    """Bars of time / PEFT LoRA with intervals, one cluster for each model. They start at 1; up is slower."""
    order = [n for n in COLOURS if n != "lora" and any(n in g["seconds"] for g in groups)]
    figure, axes = plt.subplots(figsize=(10, 4.6), layout="constrained")
    axes.set_yscale("log")
    width = 0.8 / len(order)
    for k, name in enumerate(order):
        axes.bar(0, 0, 0, color=COLOURS[name], label=TITLES[name])
        for i, g in enumerate(groups):
            if name in g["seconds"]:
                _bar(axes, i - 0.4 + (k + 0.5) * width, width, ratio(g["seconds"], name, "lora"), COLOURS[name])
    axes.axhline(1.0, color=COLOURS["lora"], linewidth=1.5, label=TITLES["lora"])
    axes.set_xticks(range(len(groups)), [g["title"].replace(", ", "\n", 1) for g in groups])
    low, high = axes.get_ylim()
    low, high = min(low, 0.8), max(high, 1.5)
    ticks = [t for t in (0.1, 0.2, 0.5, 0.7, 1, 1.5, 2, 3, 5, 10, 20, 50, 100) if low <= t <= high * 1.1]
    axes.set_yticks(ticks, [f"{t:g}" for t in ticks])
    axes.minorticks_off()
    axes.set_ylim(low, high * 1.1)
    axes.set_xlim(-0.5, len(groups) - 0.5)
    axes.set_ylabel("time of a training step / PEFT LoRA's")
    axes.legend(ncols=4, loc="lower center", bbox_to_anchor=(0.5, 1.0), frameon=False)
    _finish(figure, path, note + "; medians of ratios by round, 95 % intervals (below 6 rounds: the range)")


def _bar(axes: Axes, x: float, width: float, found: Estimate, colour: str) -> None:
    errors = [[found.value - found.low], [found.high - found.value]]
    axes.bar(x, found.value - 1, width * 0.92, bottom=1, color=colour)
    axes.errorbar(x, found.value, errors, color="black", capsize=2, linewidth=0.9)
    axes.annotate(
        f"{found.value:.2f}", (x, max(found.high, 1)), (0, 2), textcoords="offset points", ha="center", fontsize=8
    )


def scaling(groups: list[dict[str, Any]], path: Path, note: str) -> None:
    """Milliseconds beyond the base layer against tokens and against features, on logarithmic axes, with fits."""
    figure, both = plt.subplots(1, 2, figsize=(10, 4.2), layout="constrained")
    for axes, axis, label in zip(both, "ND", ("N, tokens", "D, input features"), strict=True):
        for name in MARKERS:
            sizes, costs, slope, error = exponents(groups, name, axis)
            points = [(s, 1e3 * c) for s, c in zip(sizes, costs, strict=True) if c > 0]
            if not points:
                continue
            spread = "" if math.isnan(error) else f" ± {error:.2f}"
            text = TITLES[name] if math.isnan(slope) else f"{TITLES[name]}, exponent {slope:.2f}{spread}"
            axes.plot(*zip(*points, strict=True), color=COLOURS[name], marker=MARKERS[name], label=text)
        ticks = sorted({g["size"] for g in groups if g["axis"] == axis})
        axes.set_xscale("log", base=2)
        axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks], rotation=30 if len(ticks) > 6 else 0)
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.set_xlabel(label)
        axes.margins(y=0.05)
        axes.set_ylim(top=axes.get_ylim()[1] * 6)  # room for the legend
        axes.legend(frameon=False, fontsize=9, loc="upper left")
        axes.grid(True, which="major", linewidth=0.3)
    both[0].set_ylabel("forward and backward of a layer\nbeyond its base layer, ms")
    _finish(figure, path, note + "; medians over rounds")


def _finish(figure: Any, path: Path, note: str) -> None:
    for one in figure.axes:
        one.spines[["top", "right"]].set_visible(False)
    figure.supxlabel(note, fontsize=8, color="#555555")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def draw(results: Results, folder: Path, note: str) -> list[str]:
    """Draw both pictures, if their sections were measured; return the names of the files."""
    written = []
    if "steps" in results:
        ratios(results["steps"], folder / "ratios.png", note)
        written.append("ratios.png")
    if "curves" in results:
        scaling(results["curves"], folder / "scaling.png", note)
        written.append("scaling.png")
    return written
