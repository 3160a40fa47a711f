"""One picture of a run: training curves, group accuracies, and the latent space."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import torch
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from torch import Tensor

from examples.data import LABELS, SOURCES, Snippet
from examples.report import Result, verdict
from examples.train import METHODS, Run

METHOD_COLOURS = {"lora": "#7f7f7f", "fvae": "#1f77b4"}
LABEL_COLOURS = ("#d95f02", "#1b9e77")
SOURCE_MARKERS = ("o", "^")
TERMS = {"nll": "$-\\log p(x|z_1,z_2)$", "kl": "KL$(q_1\\,\\|\\,p_1)$", "gamma": "$\\Gamma$ (repulsion)"}


class Latents(NamedTuple):
    """Posterior means of one layer, a row a snippet, and accuracies of linear readouts of label and source."""

    layer: str
    means: tuple[Tensor, Tensor]
    readable: tuple[tuple[float, float], tuple[float, float]]  # of z1 and z2: label, source
    snippets: Sequence[Snippet]


def draw(runs: Sequence[Run], results: Sequence[Result], latents: Latents | None, path: Path) -> None:
    """Write the PNG."""
    has_fvae = latents is not None
    figure = plt.figure(figsize=(13, 8 if has_fvae else 4.2), layout="constrained")
    grid = figure.add_gridspec(2 if has_fvae else 1, 12)
    task_loss(figure.add_subplot(grid[0, :6] if has_fvae else grid[0, :7]), runs)
    groups(figure.add_subplot(grid[1, 8:] if has_fvae else grid[0, 7:]), results)
    if latents is not None:
        (run,) = [r for r in runs if r.method == "fvae"]
        for column, name in enumerate(TERMS):
            term(figure.add_subplot(grid[0, 6 + 2 * column : 8 + 2 * column]), name, run.history.terms[name])
        for index in (0, 1):
            scatter(figure.add_subplot(grid[1, 4 * index : 4 * index + 4]), index, latents)
    settings = runs[0].settings
    figure.suptitle(
        f"LoRA and FVAE-LoRA, rank {settings.rank}, on review sentiment; "
        f"in training the source agrees with the label in {settings.rho:.0%} of the snippets\n{verdict(results)}"
    )
    figure.savefig(path, dpi=110)
    plt.close(figure)


def smooth(values: Sequence[float], width: int) -> list[float]:
    """Mean over a centred window, shorter at both ends."""
    half = width // 2
    windows = (values[max(0, i - half) : i + half + 1] for i in range(len(values)))
    return [sum(window) / len(window) for window in windows]


def task_loss(axes: Axes, runs: Sequence[Run]) -> None:
    for run in runs:
        values, colour = run.history.task_loss, METHOD_COLOURS[run.method]
        steps = range(1, len(values) + 1)
        axes.plot(steps, values, color=colour, alpha=0.25, linewidth=0.8)
        axes.plot(
            steps, smooth(values, max(1, len(values) // 10)), color=colour, linewidth=2, label=METHODS[run.method]
        )
    axes.set(
        title="Task loss (smoothed over a tenth of the run)",
        xlabel="step",
        ylabel="cross-entropy, nats",
        ylim=(0, None),
    )
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)


def term(axes: Axes, name: str, values: Sequence[float]) -> None:
    axes.plot(range(1, len(values) + 1), values, color=METHOD_COLOURS["fvae"], linewidth=1.5)
    axes.set_title(TERMS[name], fontsize=10)
    axes.set(xlabel="step", ylabel="FVAE-LoRA: nats per token" if name == "nll" else "")
    axes.spines[["top", "right"]].set_visible(False)


def groups(axes: Axes, results: Sequence[Result]) -> None:
    """Bars with 95 % intervals."""
    width = 0.8 / len(results)
    for index, result in enumerate(results):
        values = [s.value for s in result.groups.values()]
        bounds = [s.interval for s in result.groups.values()]
        errors = [
            [v - b[0] for v, b in zip(values, bounds, strict=True)],
            [b[1] - v for v, b in zip(values, bounds, strict=True)],
        ]
        places = [i + (index - (len(results) - 1) / 2) * width for i in range(len(values))]
        axes.bar(
            places, values, width * 0.9, yerr=errors, color=METHOD_COLOURS[result.method], label=result.title, capsize=2
        )
    names = [name.replace(", ", "\n") for name in results[0].groups]
    axes.set_xticks(range(len(names)), names, fontsize=9)
    axes.axhline(0.5, color="black", linewidth=0.6, linestyle=":")
    axes.set(title="Test accuracy by group (95 % intervals)", ylim=(0, 1.12))
    axes.legend(frameon=False, ncols=len(results), loc="upper center")
    axes.spines[["top", "right"]].set_visible(False)


def scatter(axes: Axes, index: int, latents: Latents) -> None:
    """First two principal components of one latent; each point is a test snippet."""
    points, shares = principal_components(latents.means[index])
    for label, colour in enumerate(LABEL_COLOURS):
        for source, marker in enumerate(SOURCE_MARKERS):
            chosen = points[[i for i, s in enumerate(latents.snippets) if s.group == (label, source)]]
            axes.scatter(chosen[:, 0], chosen[:, 1], s=14, c=colour, marker=marker, alpha=0.55, linewidths=0)
    by_label, by_source = latents.readable[index]
    readout = f"read off linearly: the label {by_label:.0%} right, the source {by_source:.0%}"
    axes.set_title(f"$z_{index + 1}$ of {latents.layer}\n{readout}", fontsize=10)
    axes.set(xlabel=f"PC 1 ({shares[0]:.1%} of the variance)", ylabel=f"PC 2 ({shares[1]:.1%})")
    if index == 0:
        handles = [
            Line2D([], [], color=c, marker="s", linestyle="", label=n)
            for c, n in zip(LABEL_COLOURS, LABELS, strict=True)
        ]
        handles += [
            Line2D([], [], color="black", marker=m, linestyle="", label=n)
            for m, n in zip(SOURCE_MARKERS, SOURCES, strict=True)
        ]
        axes.legend(handles=handles, fontsize=8, ncols=2)
    axes.spines[["top", "right"]].set_visible(False)


def principal_components(points: Tensor) -> tuple[Tensor, list[float]]:
    """Scores on the first two components, and their shares of the variance. Signs: the largest loading is positive."""
    centred = points.double() - points.double().mean(0)
    _, sizes, directions = torch.linalg.svd(centred, full_matrices=False)
    first = directions[:2]
    first = first * first.gather(1, first.abs().argmax(1, keepdim=True)).sign()
    return centred @ first.T, (sizes.square() / sizes.square().sum().clamp(min=1e-300))[:2].tolist()
