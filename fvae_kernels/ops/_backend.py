"""Which implementation runs: "triton", "cpp" or "reference".

A backend that was named, as ``backend="cpp"`` or with `use_backend`, runs or raises `BackendUnavailable`. If none was
named, an op runs its Triton kernel on CUDA tensors, its C++ kernel on CPU tensors, and the reference if it has none.
"""

import functools
import importlib.util
import os
import warnings
from types import TracebackType
from typing import Any

import torch

from . import _raw
from ._versions import torch_obstacle, triton_obstacle

BACKENDS = ("triton", "cpp", "reference")

_PREFERRED = {"cuda": "triton", "cpu": "cpp"}  # by device type, if no backend was named
_selected: str | None = None  # by use_backend


class BackendUnavailable(RuntimeError):  # noqa: N818  (the name says what happened)
    """The backend that was asked for cannot run this op here."""


def available_backends() -> tuple[str, ...]:
    """Names of the backends that can run on this machine; "reference" is always one of them."""
    return tuple(name for name in BACKENDS if why_missing(name) is None)


def backends_for(op: str, device_type: str = "cpu") -> tuple[str, ...]:
    """Names of the backends that can run `op` on tensors of this device type."""
    return tuple(name for name in BACKENDS if _obstacle(name, op, device_type) is None)


class use_backend:  # noqa: N801  (reads as the function that it also is)
    """Select the backend of every op that is called without ``backend=``.

    ``use_backend("cpp")`` holds from here on. ``with use_backend("cpp"):`` holds for the block and then restores the
    selection before it. None goes back to the default order.

    Raises:
        ValueError: there is no backend of that name.
        BackendUnavailable: it cannot run on this machine.
    """

    def __init__(self, name: str | None) -> None:
        global _selected
        if name is not None and (reason := why_missing(_known(name))) is not None:
            raise BackendUnavailable(_refusal(name, reason))
        self._before, _selected = _selected, name

    def __enter__(self) -> None:
        return None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        global _selected
        _selected = self._before


def resolve(op: str, device: torch.device, backend: str | None = None) -> str:
    """The backend that runs `op` on tensors of `device`; `backend` is the one that the caller named, or None.

    Raises:
        ValueError: there is no backend of that name.
        BackendUnavailable: a backend was named, here or with `use_backend`, and cannot run.
    """
    return _resolve(op, device.type, _selected if backend is None else backend)


def _assume_constant(function: Any) -> Any:
    """torch.compile takes the result as a constant: what is installed does not change between two calls."""
    function._dynamo_marked_constant = True  # torch.compiler.assume_constant_result would import the compiler
    return function


@_assume_constant
def _resolve(op: str, device_type: str, name: str | None) -> str:
    if name is None:
        preferred = _PREFERRED.get(device_type, "reference")
        if _obstacle(preferred, op, device_type) is None:
            return preferred
        if (reason := why_missing(preferred)) is not None:
            _say_once(reason)
        return "reference"
    obstacle = _obstacle(_known(name), op, device_type)
    if obstacle is not None:
        raise BackendUnavailable(_refusal(name, obstacle, op))
    return name


@functools.cache
def _say_once(reason: str) -> None:
    warnings.warn(f"fvae_kernels runs as plain PyTorch, which is slower: {reason}", RuntimeWarning, stacklevel=4)


@functools.cache
def why_missing(backend: str) -> str | None:
    """None if `backend` can run on this machine, else the reason and what to do."""
    if backend == "cpp":
        return torch_obstacle() or _cpp_missing()
    if backend == "triton":
        return torch_obstacle() or _triton_missing()
    return None


def _cpp_missing() -> str | None:
    error = _raw.load("cpp")
    if error is None:
        return None
    return (
        f"the compiled library is missing ({error}); install a C++ compiler and build it with "
        "`pip install --no-build-isolation .`"
    )


def _triton_missing() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed; `pip install triton` brings it on Linux"
    if not interpreting() and not torch.cuda.is_available():
        return (
            "there is no GPU and TRITON_INTERPRET is not set; TRITON_INTERPRET=1 runs the kernels, slowly, on the CPU"
        )
    if (obstacle := triton_obstacle(interpreting())) is not None:
        return obstacle
    error = _raw.load("triton")
    if error is not None:
        return f"its kernels do not load ({error})"
    return None


def interpreting() -> bool:
    """Whether Triton interprets its kernels on the CPU."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")


@functools.cache
def _obstacle(backend: str, op: str, device_type: str) -> str | None:
    """None if `backend` can run `op` on such tensors, else the reason and what to do."""
    reason = why_missing(backend)
    if reason is not None or backend == "reference" or f"{op}_fwd" in _raw.implemented(backend, device_type):
        return reason
    for other in ("cpu", "cuda"):
        if f"{op}_fwd" in _raw.implemented(backend, other):
            return f"its {op} runs on {other} tensors, these are on {device_type}; move them with .to({other!r})"
    return f"the installed kernels have no {op}: they are of another version; install the package again"


def _known(name: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"there is no backend {name!r}: expected one of {', '.join(map(repr, BACKENDS))}, or None")
    return name


def _refusal(name: str, reason: str, op: str | None = None) -> str:
    what = f"backend {name!r} was asked for" + (f" to run {op}" if op else "")
    return f"{what}, but cannot: {reason}. Available here: {', '.join(map(repr, available_backends()))}."
