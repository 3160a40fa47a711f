"""FVAEScheduleCallback: schedules of lambda, beta and the noise under a transformers.Trainer."""

from typing import Any

from transformers import TrainerCallback

from ..training.schedules import ObjectiveSchedule


class FVAEScheduleCallback(TrainerCallback):
    """Sets an `ObjectiveSchedule` at every step of a transformers.Trainer.

        schedule = fk.ObjectiveSchedule(model, loss_weight=fk.schedules.warmup(1000))
        trainer.add_callback(fk.FVAEScheduleCallback(schedule))

    It uses the trainer's step, which every checkpoint holds, so a resumed run continues the schedule.
    """

    def __init__(self, schedule: ObjectiveSchedule) -> None:
        self.schedule = schedule

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Set the values of the step that begins."""
        self.schedule.step(state.global_step)
