"""The share of the task loss in the total loss (6), for a log."""

from torch import Tensor


class LossMeter:
    """Sums of the task losses and of the total losses of forwards, on their device."""

    def __init__(self) -> None:
        self.sums: list[Tensor] = []

    def add(self, task: Tensor, total: Tensor) -> None:
        """Add the losses of one forward."""
        new = [task.detach().sum().float(), total.detach().sum().float()]
        self.sums = [old + value for old, value in zip(self.sums, new, strict=True)] if self.sums else new

    def split(self, logged: float) -> dict[str, float]:
        """Split a logged total loss by the sums since the last call; empty if nothing was added."""
        sums, self.sums = self.sums, []
        if not sums or float(sums[1]) == 0:
            return {}
        task = logged * float(sums[0]) / float(sums[1])
        return {"task_loss": task, "objective": logged - task}
