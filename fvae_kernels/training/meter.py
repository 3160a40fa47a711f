"""What share of the total loss (6) is the task's, for a log."""

from torch import Tensor


class LossMeter:
    """Adds up the task losses of forwards and their total losses, on their device."""

    def __init__(self) -> None:
        self.sums: list[Tensor] = []

    def add(self, task: Tensor, total: Tensor) -> None:
        """Take one forward's."""
        new = [task.detach().sum().float(), total.detach().sum().float()]
        self.sums = [old + value for old, value in zip(self.sums, new, strict=True)] if self.sums else new

    def split(self, logged: float) -> dict[str, float]:
        """The parts of a logged total loss, by the sums since the last call; empty where nothing was added."""
        sums, self.sums = self.sums, []
        if not sums or float(sums[1]) == 0:
            return {}
        task = logged * float(sums[0]) / float(sums[1])
        return {"task_loss": task, "objective": logged - task}
