"""One cell: train a method on a task with one seed, score it at the last step and where validation was best."""

import math
import statistics
import time
from collections.abc import Sequence
from typing import Any

import torch

import fvae_kernels as fk
from examples.data import batches
from examples.train import linear_schedule

from .adapt import Method
from .scoring import anatomy, entropy, score, task_loss
from .tasks import Recipe, Splits, Task
from .watch import Watch

AT_CHANCE = 0.95  # of a guesser's loss: a run whose last third is above has failed
PLAIN = Method("what requires a gradient, by AdamW")


def run(
    task: Task,
    method: Method,
    seed: int,
    splits: Splits,
    recipe: Recipe,
    *,
    weight: float | None = None,
    early_stopping: bool = True,
    search: bool = False,
) -> dict[str, Any]:
    """The results of a run for its JSON line, apart from the cell's settings.

    Args:
        task: the task.
        method: the method.
        seed: of the model's head, the order of the examples, the noise.
        splits: the task's examples for this seed.
        recipe: epochs, learning rate, batch size.
        weight: the method's own; None is its default.
        early_stopping: evaluate along the training, and score the best state too.
        search: a run of the search, which does not look at the test examples.

    Raises:
        DoesNotApply: if the method has no place in the task's model.
        ValueError: if there are fewer training examples than a batch holds.
    """
    if len(splits.train) < recipe.batch_size:
        raise ValueError(f"{len(splits.train)} training examples do not fill a batch of {recipe.batch_size}")
    steps = recipe.epochs * (len(splits.train) // recipe.batch_size)
    model = method.adapt(task.model(seed), task, steps, weight)
    chance = guessing(task, seed, splits)
    watch = Watch(task, model, splits, recipe.epochs) if early_stopping else None
    start, cpu = time.perf_counter(), time.process_time()
    losses = train(task, model, splits.train, recipe, seed, method=method, weight=weight, watch=watch)
    took, cpu_took = time.perf_counter() - start, time.process_time() - cpu
    if watch:
        took, cpu_took = took - watch.seconds, cpu_took - watch.cpu_seconds
        watch.note(losses, steps // recipe.epochs)
    return {
        **_scores(task, model, splits, watch, recipe.epochs, search),
        **_losses(losses, chance, AT_CHANCE if task.classes else 1.0),
        "parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "steps": len(losses),
        "seconds": round(took, 1),
        "cpu_seconds": round(cpu_took, 1),
        "cpu_seconds_per_step": round(cpu_took / len(losses), 4),
    }


def guessing(task: Task, seed: int, splits: Splits) -> float:
    """Task loss of a guesser who knows how often each label comes in training; of a language model that is not trained.

    For classes of equal size this is ln of their number.
    """
    if not task.classes:
        return float(score(task, task.model(seed), splits.validation)["nats"])
    return entropy(example.label for example in splits.train)


def _scores(task: Task, model: Any, splits: Splits, watch: Watch | None, epochs: int, search: bool) -> dict[str, Any]:
    """Scores at the last step; then the model is put where validation was best, and scored again."""
    last = watch.at(epochs) if watch else None
    out: dict[str, Any] = {"metric": "accuracy" if task.classes else "nats"}
    if not search:
        out["test"] = score(task, model, splits.test)
    out["validation"] = last or score(task, model, splits.validation)
    if not search:
        out["anatomy"] = anatomy(task, model, splits.validation)
    if watch is None:
        return out
    if watch.best is None:  # it diverged before
        return {**out, "curve": watch.curve}
    if not search:
        same = last is not None and watch.epoch == epochs
        out["test_best"] = out["test"] if same else score(task, watch.load_best(), splits.test)
    return {**out, "validation_best": watch.best, "best_epoch": watch.epoch, "curve": watch.curve}


def _losses(losses: Sequence[float], chance: float, share: float) -> dict[str, Any]:
    """Task loss by thirds, and whether the run failed: loss at a `share` of chance in the end, or not a number."""
    finite = [loss for loss in losses if math.isfinite(loss)]
    third = max(1, len(finite) // 3)
    parts = [finite[i * third : (i + 1) * third] for i in range(3)]
    thirds = [round(statistics.mean(part), 4) for part in parts if part]
    diverged = len(finite) < len(losses)
    failed = diverged or thirds[-1] >= share * chance
    return {"task_loss": thirds, "chance": round(chance, 6), "diverged": diverged, "failed": failed}


def train(
    task: Task,
    model: Any,
    examples: Sequence[Any],
    recipe: Recipe,
    seed: int,
    *,
    method: Method = PLAIN,
    weight: float | None = None,
    watch: Watch | None = None,
) -> list[float]:
    """Train; return the task loss of every step. A step's noise depends only on seed and step, as in the demo.

    Where the method trims, the adapters are trimmed after half of the steps, and a new optimiser goes on. A loss
    that is not finite ends the training, and is the last one.
    """
    epoch = len(examples) // recipe.batch_size
    steps = recipe.epochs * epoch
    optimizer, schedule = _optimizer(method, model, recipe, weight, steps, 0)
    losses: list[float] = []
    for index, batch in enumerate(batches(examples, recipe.batch_size, steps, seed)):
        torch.manual_seed(seed * 1_000_003 + index)
        if method.trim_to is not None and index == steps // 2:
            data = [dict(task.batch(examples[i : i + 64])[0]) for i in range(0, len(examples), 64)]
            fk.trim(model, method.trim_to, data)
            optimizer, schedule = _optimizer(method, model, recipe, weight, steps, index)
            if watch:
                watch.restart()
        losses.append(_step(task, model, batch, optimizer, index))
        if not math.isfinite(losses[-1]):
            break
        schedule.step()
        if watch and (index + 1) % epoch == 0:
            watch((index + 1) // epoch)
    return losses


def _step(task: Task, model: Any, batch: Sequence[Any], optimizer: torch.optim.Optimizer, index: int) -> float:
    """One step; its task loss, or not a number if the loss is none."""
    inputs, labels = task.batch(batch)
    out = model(**inputs, labels=labels)  # in training its loss includes the objective of the adapters
    if not out["loss"].isfinite():
        return math.nan
    out["loss"].backward()
    torch.nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], 1.0)
    optimizer.step()
    allocate = getattr(getattr(model, "base_model", None), "update_and_allocate", None)  # AdaLoRA's ranks
    if allocate is not None:
        allocate(index)
    optimizer.zero_grad()
    return task_loss(task, out["logits"].detach(), labels).item()


def _optimizer(
    method: Method, model: Any, recipe: Recipe, weight: float | None, steps: int, done: int
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LambdaLR]:
    """The method's optimizer, and its schedule from the step `done` on."""
    optimizer = method.optimizer(model, recipe.lr, weight)
    schedule = linear_schedule(steps)
    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: schedule(step + done))
