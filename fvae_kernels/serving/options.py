"""Arguments that several functions take, checked."""

import math
from collections.abc import Mapping
from typing import Any

from ..config import check_table, matches
from .layers import AdaptedLayer


def is_number(value: Any) -> bool:
    """Whether it is a finite number; a switch is none."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def check_tolerance(tolerance: Any, name: str = "tolerance") -> None:
    """Raise unless it is a share of energy.

    Raises:
        ValueError: below 0, or 1 and above.
    """
    if not (is_number(tolerance) and 0 <= tolerance < 1):
        raise ValueError(
            f"{name}={tolerance!r} is not allowed: expected a share of the update's energy, from 0 to below 1"
        )


def check_number(name: str, value: Any, expected: str, low: float, above: bool = False) -> None:
    """Raise unless `value` is None, or a finite number of at least `low`, or above it.

    Raises:
        ValueError: with what was `expected`.
    """
    if value is not None and not (is_number(value) and (value > low if above else value >= low)):
        raise ValueError(f"{name}={value!r} is not allowed: expected {expected}, or None")


def check_switches(**switches: Any) -> None:
    """Raise unless all are True or False.

    Raises:
        ValueError: with the first that is not.
    """
    for name, value in switches.items():
        if not isinstance(value, bool):
            raise ValueError(f"{name}={value!r} is not allowed: expected True or False")


def rank_of(rank: int | Mapping[str, int] | None, layer: AdaptedLayer) -> int | None:
    """The rank that is asked of a layer; None if none is.

    Raises:
        ValueError: no whole number, below 1, or above the adapter's.
    """
    if isinstance(rank, Mapping):
        rank = next((value for pattern, value in rank.items() if matches(pattern, layer.name)), None)
    if rank is None:
        return None
    highest = min(layer.adapter.config.rank, layer.adapter.out_features)
    if isinstance(rank, bool) or not isinstance(rank, int) or not 1 <= rank <= highest:
        raise ValueError(
            f"rank={rank!r} is not allowed for {layer.name!r}: expected a whole number from 1 to {highest}"
        )
    return rank


def check_patterns(ranks: Mapping[str, int], layers: list[AdaptedLayer]) -> None:
    """Raise unless every pattern has a layer.

    Raises:
        ValueError: with the patterns that have none, or are no regular expressions.
    """
    check_table("ranks", ranks)
    unused = [pattern for pattern in ranks if not any(matches(pattern, layer.name) for layer in layers)]
    if unused:
        raise ValueError(
            f"the ranks have patterns that match no adapted layer: {unused}; the layers are "
            f"{[layer.name for layer in layers]}"
        )
