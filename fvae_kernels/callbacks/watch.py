"""Silent failures: noise that drowns z_1, an update of one direction, a task loss that stays at chance."""

import math
import statistics
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

DROWNED = 0.25  # signal to noise of z_1
ONE_DIRECTION = 1.1  # effective rank
AT_CHANCE = 0.95  # task loss / entropy of the labels
LOGS = 3  # a judgement of the task loss needs so many logs


class Watch:
    """Warns of each of the three once, with advice, after the warm-up of the learning rate."""

    def __init__(self, rank: int = 2) -> None:
        self.rank = rank  # largest rank of the adapters; an update of rank 1 always has one direction
        self.said: set[str] = set()
        self.losses: list[float] = []
        self.labels: Counter[int] = Counter()

    def note_task(self, output: Any, labels: Any) -> None:
        """Compute the task loss of a classifier from logits and labels of a forward; other models have none."""
        logits = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)
        if not isinstance(logits, Tensor) or not isinstance(labels, Tensor):
            return
        if logits.dim() == 2 and labels.dim() == 1 and not labels.is_floating_point() and logits.shape[1] > 1:
            kept = labels >= 0
            if not kept.any():
                return
            self.losses.append(float(F.cross_entropy(logits.detach().float()[kept], labels[kept])))
            self.labels.update(labels[kept].tolist())

    def look(self, layers: Mapping[str, Mapping[str, float]], settled: bool) -> None:
        """Judge the values of one log. Before the run has `settled`, it says nothing and drops the losses."""
        if not settled:
            self.losses.clear()
            return
        noise = _middle(values.get("signal_to_noise") for values in layers.values())
        if noise is not None and noise < DROWNED:
            self._say(
                "noise",
                f"the noise of z_1 drowns its mean: signal to noise {noise:.2f}, the median over {len(layers)} layers. "
                "Hold its log-variance (logvar1_start=-4.0, logvar1_held=True), bound it (logvar1_max), or lower "
                "loss_weight, which pulls it to beta / (beta - delta)",
            )
        rank = _middle(values.get("effective_rank") for values in layers.values())
        if rank is not None and 0 < rank < ONE_DIRECTION and self.rank > 1:
            self._say(
                "rank",
                f"the update moves all tokens along one direction: effective rank {rank:.2f}, the median over "
                f"{len(layers)} layers. start='lora' begins with all of them",
            )
        if len(self.losses) >= LOGS:
            loss, chance = statistics.mean(self.losses[-LOGS:]), _entropy(self.labels)
            if loss > AT_CHANCE * chance > 0:
                self._say(
                    "chance",
                    f"the task loss is at chance after the warm-up: {loss:.3f} in the last {LOGS} logs, and "
                    f"{chance:.3f} for guessing by the labels' frequencies. Lower the learning rate; with "
                    "start='authors' try start='lora', with a large loss_weight a smaller one",
                )

    def _say(self, what: str, text: str) -> None:
        if what not in self.said:
            self.said.add(what)
            warnings.warn(f"FVAE: {text} (docs/recipes.md)", stacklevel=4)


def has_settled(args: Any, state: Any) -> bool:
    """True after the warm-up of the learning rate and a tenth of the steps."""
    return bool(state.global_step > max(args.get_warmup_steps(state.max_steps), state.max_steps // 10))


def _middle(values: Iterable[float | None]) -> float | None:
    found = [value for value in values if value is not None and math.isfinite(value)]
    return statistics.median(found) if found else None


def _entropy(counts: Counter[int]) -> float:
    shares = torch.tensor(list(counts.values()), dtype=torch.float64)
    shares = shares / shares.sum()
    return float(-(shares * shares.log()).sum())
