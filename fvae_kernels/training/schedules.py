"""Schedules of lambda, beta and the bound of the noise, by the optimizer step; a resumed run continues them.

A schedule is a number, a table ``{step: value}`` (linear in between, constant outside), or a function of the step.
"""

import bisect
import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from torch import nn

from .aux_loss import aux_loss_layers

Schedule = float | Mapping[int, float] | Callable[[int], float]


def warmup(steps: int, start: float = 0.0, end: float = 1.0) -> dict[int, float]:
    """Linear from `start` to `end` over `steps` steps, then `end`."""
    return {0: start, _positive("steps", steps): end}


def anneal(steps: int, start: float = 1.0, end: float = 0.0) -> Callable[[int], float]:
    """Half a cosine from `start` to `end` over `steps` steps, then `end`."""
    _positive("steps", steps)
    return lambda step: end + (start - end) * (1 + math.cos(math.pi * min(max(step, 0) / steps, 1.0))) / 2


def cycles(period: int, ramp: float = 0.5) -> Callable[[int], float]:
    """Cyclical annealing (Fu et al., arXiv 1903.10145): 0 to 1 over the first `ramp` of each period, then 1."""
    _positive("period", period)
    if not 0 < ramp <= 1:
        raise ValueError(f"ramp={ramp!r} is not allowed: expected a share of the period, above 0 and at most 1")
    return lambda step: min(step % period / (ramp * period), 1.0)


class ObjectiveSchedule:
    """Sets lambda and beta of every adapted layer of a model, and the bound of the noise, by the optimizer step.

        schedule = fk.ObjectiveSchedule(model, loss_weight=fk.schedules.warmup(1000), kl_weight={0: 0.5, 500: 1.0})
        for step, batch in enumerate(batches):
            schedule.step(step)
            ...

    With transformers.Trainer: ``trainer.add_callback(fk.FVAEScheduleCallback(schedule))``. It uses the trainer's own
    step, so a resumed run continues. A loop of your own keeps `state_dict` in its checkpoint.

    Args:
        model: a model with adapted layers; the layers of all adapters are set.
        loss_weight: a factor of each layer's lambda, `FVAEConfig.loss_weight`.
        kl_weight: a factor of beta, `FVAEConfig.kl_weight`.
        noise_bound: the bound of z_1's log-variance, see `FVAEAdapter.bound_noise`; None does not set it.

    Raises:
        ValueError: if the model has no adapted layer, or a schedule is no number, table or function. In `step`: if a
            value is not finite, or below zero.
    """

    def __init__(
        self,
        model: nn.Module,
        loss_weight: Schedule = 1.0,
        kl_weight: Schedule = 1.0,
        noise_bound: Schedule | None = None,
    ) -> None:
        self.layers = aux_loss_layers(model)
        if not self.layers:
            raise ValueError(f"{type(model).__name__} has no FVAE layer to schedule: adapt it first")
        self.adapters = [adapter for layer in self.layers for adapter in layer.adapters().values()]
        self.loss_weight, self.kl_weight = _function("loss_weight", loss_weight), _function("kl_weight", kl_weight)
        self.noise_bound = None if noise_bound is None else _function("noise_bound", noise_bound)
        self.full = [layer.loss_weights() for layer in self.layers]
        self.last_step = 0

    def step(self, step: int) -> dict[str, float]:
        """Set the values of this optimizer step, counted from 0, and return them."""
        values = {"loss_weight": self.loss_weight(step), "kl_weight": self.kl_weight(step)}
        for name, value in values.items():
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"the schedule of {name} is {value!r} at step {step}; expected a number of at least 0")
        if self.noise_bound is not None:
            values["noise_bound"] = self.noise_bound(step)
        for layer, full in zip(self.layers, self.full, strict=True):
            layer.set_loss_weights({name: values["loss_weight"] * weight for name, weight in full.items()})
        for adapter in self.adapters:
            if "noise_bound" in values:
                adapter.bound_noise(values["noise_bound"])
            beta = adapter.config.kl_weight * values["kl_weight"]
            if adapter.training_config.kl_weight != beta:
                adapter.training_config = replace(adapter.training_config, kl_weight=beta)
        self.last_step = step
        return values

    def state_dict(self) -> dict[str, int]:
        """The step; everything else follows from it."""
        return {"step": self.last_step}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Continue from a saved step."""
        self.step(int(state["step"]))


def _function(name: str, schedule: Any) -> Callable[[int], float]:
    if callable(schedule):
        return lambda step: float(schedule(step))
    if isinstance(schedule, Mapping) and schedule and all(isinstance(step, int) for step in schedule):
        return _Table(schedule)
    if isinstance(schedule, (int, float)) and not isinstance(schedule, bool):
        return lambda _: float(schedule)
    raise ValueError(
        f"{name}={schedule!r} is not allowed: expected a number, a table {{step: value}}, or a function of the step"
    )


class _Table:
    """Linear between the steps of a table, constant before and after."""

    def __init__(self, table: Mapping[int, float]) -> None:
        self.steps = sorted(table)
        self.values = [float(table[step]) for step in self.steps]

    def __call__(self, step: int) -> float:
        i = bisect.bisect_right(self.steps, step)
        if i in (0, len(self.steps)):
            return self.values[max(i - 1, 0)]
        (left, right), (low, high) = self.steps[i - 1 : i + 1], self.values[i - 1 : i + 1]
        return low + (high - low) * (step - left) / (right - left)


def _positive(name: str, value: int) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name}={value!r} is not allowed: expected a whole number of at least 1")
    return value
