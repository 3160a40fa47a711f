"""Lines of comparisons that nobody ran."""

from collections.abc import Sequence
from typing import Any


def rows(method: str, scores: Sequence[float], lr: float = 0.1, **more: Any) -> list[dict[str, Any]]:
    """Runs with these test scores, from seed 0 on."""
    shared = {"task": "t", "method": method, "epochs": 1, "lr": lr, "weight": None, "failed": False}
    return [{**shared, "seed": i, "test": {"average": score}, **more} for i, score in enumerate(scores)]


def tried(method: str, scores: dict[float, float], **more: Any) -> list[dict[str, Any]]:
    """Runs of a search, with their validation by rate."""
    shared = {"task": "t", "method": method, "epochs": 1, "weight": None, "seed": 1000, "search": True}
    return [{**shared, "lr": lr, "validation": {"average": score}, **more} for lr, score in scores.items()]
