"""One cell: train a method on a task with one seed, score it on validation and test."""

import statistics
import time
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F

import fvae_kernels as fk
from examples.data import batches
from examples.train import linear_schedule
from fvae_kernels import diagnostics
from fvae_kernels.callbacks.observe import active_adapter
from fvae_kernels.training.aux_loss import AuxLossLayer

from .methods import Method
from .tasks import Recipe, Splits, Task

Scores = dict[str, Any]


def run(task: Task, method: Method, seed: int, splits: Splits, recipe: Recipe) -> dict[str, Any]:
    """The results of a run for its JSON line, apart from the cell's settings."""
    steps = recipe.epochs * (len(splits.train) // recipe.batch_size)
    model = method.adapt(task.model(seed), task, steps)
    start, cpu = time.perf_counter(), time.process_time()
    losses = train(task, model, splits.train, recipe, seed, method.trim_to)
    took, cpu_took = time.perf_counter() - start, time.process_time() - cpu
    third = max(1, len(losses) // 3)
    return {
        "test": score(task, model, splits.test),
        "validation": score(task, model, splits.validation),
        "task_loss": [round(statistics.mean(losses[i * third : (i + 1) * third]), 4) for i in range(3)],
        "anatomy": anatomy(task, model, splits.validation),
        "parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "steps": len(losses),
        "seconds": round(took, 1),
        "cpu_seconds": round(cpu_took, 1),
    }


def train(
    task: Task, model: Any, examples: Sequence[Any], recipe: Recipe, seed: int, trim_to: int | None = None
) -> list[float]:
    """Train; return the task loss of every step. A step's noise depends only on seed and step, as in the demo.

    With `trim_to` the adapters are trimmed to this rank after half of the steps, and a new optimiser goes on.
    """
    steps = recipe.epochs * (len(examples) // recipe.batch_size)
    parameters, optimizer, schedule = _optimizer(model, recipe, steps, 0)
    losses = []
    for index, batch in enumerate(batches(examples, recipe.batch_size, steps, seed)):
        torch.manual_seed(seed * 1_000_003 + index)
        if trim_to is not None and index == steps // 2:
            fk.trim(model, trim_to, [dict(task.batch(examples[i : i + 64])[0]) for i in range(0, len(examples), 64)])
            parameters, optimizer, schedule = _optimizer(model, recipe, steps, index)
        inputs, labels = task.batch(batch)
        out = model(**inputs, labels=labels)  # in training its loss includes the objective of the adapters
        out["loss"].backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        if hasattr(model.base_model, "update_and_allocate"):  # AdaLoRA's ranks
            model.base_model.update_and_allocate(index)
        optimizer.zero_grad()
        schedule.step()
        losses.append(F.cross_entropy(out["logits"].detach(), labels).item())
    return losses


def _optimizer(model: Any, recipe: Recipe, steps: int, done: int) -> tuple[list[Any], Any, Any]:
    """AdamW for what is trained, and its schedule from the step `done` on."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=recipe.lr)
    schedule = linear_schedule(steps)
    return parameters, optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: schedule(step + done))


@torch.no_grad()
def score(task: Task, model: Any, examples: Sequence[Any]) -> Scores:
    """Accuracy by group: mean, worst, and mean of the two groups that are rare in training."""
    model.eval()
    right: dict[tuple[int, int], list[bool]] = {}
    order = sorted(examples, key=lambda e: len(getattr(e, "text", "")))  # batches of similar length
    for start in range(0, len(order), 64):
        part = order[start : start + 64]
        inputs, labels = task.batch(part)
        hits = model(**inputs)["logits"].argmax(-1) == labels
        for example, hit in zip(part, hits.tolist(), strict=True):
            right.setdefault(tuple(example.group), []).append(hit)
    groups = {f"{y}{a}": sum(hits) / len(hits) for (y, a), hits in sorted(right.items())}
    rare = [groups[f"{y}{a}"] for y, a in task.minority]
    return {
        "average": round(statistics.mean(groups.values()), 6),
        "worst": round(min(groups.values()), 6),
        "minority": round(statistics.mean(rare), 6),
        "groups": {name: round(value, 6) for name, value in groups.items()},
    }


@torch.no_grad()
def anatomy(task: Task, model: Any, examples: Sequence[Any]) -> dict[str, float]:
    """Diagnostics of the latents on a batch, averaged over the FVAE layers; empty for other methods."""
    adapted = {m: active_adapter(m) for m in model.modules() if isinstance(m, AuxLossLayer)}
    seen: list[dict[str, float]] = []

    def look(module: Any, args: Any) -> None:
        adapter = adapted[module]
        assert adapter is not None
        mean1, logvar1, _, logvar2 = diagnostics.posteriors(adapter, args[0])
        seen.append(
            {
                "noise1": float((logvar1 / 2).exp().mean()),
                "noise2": float((logvar2 / 2).exp().mean()),
                "signal_to_noise": diagnostics.signal_to_noise(mean1, logvar1),
                "effective_rank": diagnostics.effective_rank(mean1, adapter.B),
                "token_independent": diagnostics.token_independent_share(mean1, adapter.B),
                "active_units": diagnostics.active_units(mean1),
            }
        )

    handles = [module.register_forward_pre_hook(look) for module in adapted]
    model(**task.batch(examples[:: max(1, len(examples) // 64)])[0])
    for handle in handles:
        handle.remove()
    return {name: round(statistics.mean(s[name] for s in seen), 4) for name in seen[0]} if seen else {}
