"""Scores of a model on a task: accuracy by group, or nats a token; and the anatomy of its latents."""

import math
import statistics
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fvae_kernels import diagnostics
from fvae_kernels.callbacks.observe import active_adapter

from .adapt import fvae_layers
from .tasks import Task

Scores = dict[str, Any]


def score(task: Task, model: Any, examples: Sequence[Any]) -> Scores:
    """Accuracy ("average" over groups, "worst", "minority", "groups"), or of a language model "nats" a token.

    The model is left in eval mode. No random number is drawn.
    """
    return _accuracy(task, model, examples) if task.classes else _nats(task, model, examples)


def better(scores: Scores, other: Scores | None) -> bool:
    """True if the first scores are better than the others."""
    if other is None:
        return True
    if "average" in scores:
        return bool(scores["average"] > other["average"])
    return scores["nats"] is not None and (other["nats"] is None or scores["nats"] < other["nats"])


def task_loss(task: Task, logits: Tensor, labels: Tensor) -> Tensor:
    """The loss without what adapters add to it; mean over examples, or over the tokens that are predicted."""
    return F.cross_entropy(logits, labels) if task.classes else F.cross_entropy(*_tokens(logits, labels))


def entropy(labels: Iterable[int]) -> float:
    """Mean loss of a guesser who knows how often each label comes: ln of the number of classes if all are equal."""
    counts = Counter(labels).values()
    return -sum(n / sum(counts) * math.log(n / sum(counts)) for n in counts)


def _batches(task: Task, model: Any, examples: Sequence[Any]) -> Iterator[tuple[Sequence[Any], Tensor, Tensor]]:
    """Examples, logits and labels, in batches of similar length; smaller ones where logits are over a vocabulary."""
    model.eval()
    size = 64 if task.classes else task.recipe.batch_size
    order = sorted(examples, key=lambda e: len(getattr(e, "text", "")))
    for start in range(0, len(order), size):
        part = order[start : start + size]
        inputs, labels = task.batch(part)
        yield part, model(**inputs)["logits"], labels


@torch.no_grad()
def _accuracy(task: Task, model: Any, examples: Sequence[Any]) -> Scores:
    right: dict[tuple[int, int], list[bool]] = {}
    for part, logits, labels in _batches(task, model, examples):
        for example, hit in zip(part, (logits.argmax(-1) == labels).tolist(), strict=True):
            right.setdefault(tuple(example.group), []).append(hit)
    groups = {group: sum(hits) / len(hits) for group, hits in sorted(right.items())}
    scores = {"average": statistics.mean(groups.values()), "worst": min(groups.values())}
    if rare := [groups[group] for group in task.minority if group in groups]:
        scores["minority"] = statistics.mean(rare)
    return _rounded(scores, groups)


@torch.no_grad()
def _nats(task: Task, model: Any, examples: Sequence[Any]) -> Scores:
    """Of all tokens, and of each group's where examples have groups; "worst" is the group with most."""
    sums: dict[Any, list[float]] = {}
    for part, logits, labels in _batches(task, model, examples):
        losses = F.cross_entropy(*_tokens(logits, labels), reduction="none").view(len(part), -1).double().sum(1)
        counts = (labels[:, 1:] != -100).sum(1)
        for example, loss, count in zip(part, losses.tolist(), counts.tolist(), strict=True):
            total = sums.setdefault(getattr(example, "group", None), [0.0, 0])
            total[0] += loss
            total[1] += count
    scores = {"nats": sum(loss for loss, _ in sums.values()) / sum(count for _, count in sums.values())}
    if None in sums:
        return _rounded(scores, {})
    groups = {group: loss / count for group, (loss, count) in sorted(sums.items())}
    return _rounded({**scores, "worst": max(groups.values())}, groups)


def _tokens(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Logits and the token that each predicts, flat; without those of a trained prompt, which come first."""
    logits = logits[:, -labels.shape[1] :]
    return logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten()


def _rounded(scores: dict[str, float], groups: dict[Any, float]) -> Scores:
    """Six digits; None for what is not a number."""

    def rounded(value: float) -> float | None:
        return round(value, 6) if math.isfinite(value) else None

    named = {_name(group): rounded(value) for group, value in groups.items()}
    return {**{name: rounded(value) for name, value in scores.items()}, **({"groups": named} if named else {})}


def _name(group: Sequence[Any]) -> str:
    """Label and attribute, for example "01"; with a comma where one has more than one character."""
    parts = [str(part) for part in group]
    return ("" if all(len(part) == 1 for part in parts) else ",").join(parts)


@torch.no_grad()
def anatomy(task: Task, model: Any, examples: Sequence[Any]) -> dict[str, float]:
    """Diagnostics of the latents on a batch, averaged over the FVAE layers; empty for other methods."""
    adapted = {module: active_adapter(module) for module in fvae_layers(model)}
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

    if not adapted:
        return {}
    handles = [module.register_forward_pre_hook(look) for module in adapted]
    model(**task.batch(examples[:: max(1, len(examples) // 64)])[0])
    for handle in handles:
        handle.remove()
    return {name: round(statistics.mean(s[name] for s in seen), 4) for name in seen[0]} if seen else {}
