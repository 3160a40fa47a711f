"""Validation along a training: its curve, and the trained state where it was best."""

import math
import statistics
import time
from collections.abc import Sequence
from typing import Any

import torch

from .scoring import Scores, better, score
from .tasks import Splits, Task

EVALUATIONS = 10  # of validation in a run, at most
FEWEST = 5  # if there are as many epochs, even where they cost more than a tenth of the training


class Watch:
    """Validation along the training: its curve, and what was trained where it was best (the first of equals)."""

    def __init__(self, task: Task, model: Any, splits: Splits, epochs: int) -> None:
        self.task, self.model, self.examples, self.epochs = task, model, splits.validation, epochs
        self.every = math.ceil(epochs / evaluations(epochs, len(splits.train), len(splits.validation)))
        self.curve: list[Scores] = []
        self.seconds = self.cpu_seconds = 0.0
        self.restart()

    def restart(self) -> None:
        """Forget the best state, for a model whose parameters have changed shape."""
        self.best: Scores | None = None
        self.epoch = 0
        self.state: dict[str, torch.Tensor] = {}

    def __call__(self, epoch: int) -> None:
        """Evaluate after this epoch, if it is its turn."""
        if epoch % self.every and epoch != self.epochs:
            return
        start, cpu = time.perf_counter(), time.process_time()
        scores = score(self.task, self.model, self.examples)
        self.model.train()
        self.curve.append({"epoch": epoch, **{name: value for name, value in scores.items() if name != "groups"}})
        self._last = scores
        if better(scores, self.best):
            self.best, self.epoch = scores, epoch
            self.state = {name: value.detach().clone() for name, value in _trained(self.model)}
        self.seconds += time.perf_counter() - start
        self.cpu_seconds += time.process_time() - cpu

    def note(self, losses: Sequence[float], steps: int) -> None:
        """Add to each point of the curve the mean task loss since the one before; an epoch has so many `steps`."""
        before = 0
        for point in self.curve:
            after = point["epoch"] * steps
            point["task_loss"] = round(statistics.mean(losses[before:after]), 4)
            before = after

    def at(self, epoch: int) -> Scores | None:
        """The scores after this epoch, if it was the last one that was evaluated."""
        return self._last if self.curve and self.curve[-1]["epoch"] == epoch else None

    @torch.no_grad()
    def load_best(self) -> Any:
        """The model, put where it was best."""
        for name, value in _trained(self.model):
            value.copy_(self.state[name])
        return self.model


def _trained(model: Any) -> list[tuple[str, torch.Tensor]]:
    """What a run changes: trained parameters and buffers."""
    return [*((n, p) for n, p in model.named_parameters() if p.requires_grad), *model.named_buffers()]


def evaluations(epochs: int, train: int, validation: int) -> int:
    """How often a run is evaluated: about a tenth of its cost, where a step costs three forwards of its examples."""
    affordable = int(0.1 * 3 * epochs * train / max(1, validation))
    return min(epochs, EVALUATIONS, max(FEWEST, affordable))
