"""Outputs of a model: find the loss, find the tensors, replace one tensor."""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor

DEPTH = 5  # of nested containers
LABELS = ("label", "target", "start_positions")


def tensors(output: Any, depth: int = DEPTH) -> Iterator[Tensor]:
    """Every tensor in an output, nested containers included."""
    if isinstance(output, Tensor):
        yield output
    elif depth:
        for value in _values(output):
            yield from tensors(value, depth - 1)


def _values(output: Any) -> Iterable[Any]:
    if hasattr(output, "keys") and hasattr(output, "values"):
        return output.values()
    if isinstance(output, (tuple, list)):
        return output
    if dataclasses.is_dataclass(output) and not isinstance(output, type):
        return [getattr(output, field.name) for field in dataclasses.fields(output)]
    return ()


def task_loss(output: Any, given: Iterable[str]) -> Tensor | None:
    """The loss of a model's output: by name, as the whole output, or with labels the first scalar of a tuple."""
    if isinstance(output, Tensor):
        return output if output.dim() == 0 and output.requires_grad else None
    if hasattr(output, "keys"):
        return _scalar(output["loss"]) if "loss" in output.keys() else None  # noqa: SIM118  (not each is a mapping)
    if hasattr(output, "loss"):
        return _scalar(output.loss)
    if isinstance(output, (tuple, list)) and any(word in name for name in given for word in LABELS):
        found = [value for value in output if _scalar(value) is not None]
        return next((value for value in found if value.dim() == 0), found[0] if found else None)
    return None


def _scalar(value: Any) -> Tensor | None:
    return value if isinstance(value, Tensor) and value.numel() == 1 and value.requires_grad else None


def replaced(output: Any, old: Tensor, new: Tensor) -> Any:
    """The output with `new` in place of `old`, of the same type; changed in place if possible."""
    if output is old:
        return new
    if hasattr(output, "keys"):
        for key in list(output.keys()):
            if output[key] is old:
                output[key] = new
        return output
    if isinstance(output, (tuple, list)):
        values = [new if value is old else value for value in output]
        make: Callable[..., Any] = type(output)
        return make(*values) if hasattr(output, "_fields") else make(values)
    if dataclasses.is_dataclass(output) and not isinstance(output, type):
        names = [field.name for field in dataclasses.fields(output) if getattr(output, field.name) is old]
        return dataclasses.replace(output, **dict.fromkeys(names, new))
    for name, value in vars(output).items():
        if value is old:
            setattr(output, name, new)
    return output


def given(args: tuple[Any, ...], kwargs: Mapping[str, Any], positional: list[str]) -> dict[str, Any]:
    """Arguments of a forward by name, those that are not None; and the entries of a batch passed as one mapping."""
    named = {**dict(zip(positional, args, strict=False)), **kwargs}
    entries = {str(name): value for batch in args if isinstance(batch, Mapping) for name, value in batch.items()}
    return {name: value for name, value in {**entries, **named}.items() if value is not None}
