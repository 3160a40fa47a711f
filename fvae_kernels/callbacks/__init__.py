"""Callbacks for transformers.Trainer: a log of the layers, and schedules."""

from .log import FVAELoggingCallback
from .schedule import FVAEScheduleCallback

__all__ = ["FVAELoggingCallback", "FVAEScheduleCallback"]
