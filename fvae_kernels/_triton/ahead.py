"""Compile launches instead of running them, for a GPU that need not be there."""

# mypy: allow-untyped-defs

import contextlib
from collections.abc import Hashable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

WARP = {"cuda": 32, "hip": 64}  # threads


class TargetDriver:
    """Stands for a GPU of this kind: Triton compiles for it, and nothing can run."""

    def __init__(self, target: GPUTarget) -> None:
        self.target = target

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> str:
        return str(self.target.arch)

    def get_current_stream(self, device: Any = None) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


class Launched(NamedTuple):
    """A launch as Triton gets it."""

    kernel: Any
    arguments: tuple[Any, ...]
    options: dict[str, Any]  # compile-time constants, warps and stages

    def compile(self) -> Any:
        """The compiled kernel for the active driver's target, also kept in Triton's cache on disk."""
        return self.kernel.warmup(*self.arguments, grid=(1,), **self.options)

    def key(self) -> Hashable:
        """Launches with one key run one compiled kernel."""
        return self.kernel.__name__, *map(_kind, self.arguments), repr(sorted(self.options.items()))


def _kind(argument: Any) -> Hashable:
    """What Triton's specialisation sees of an argument."""
    if isinstance(argument, tuple):
        return tuple(map(_kind, argument))
    if isinstance(argument, Tensor):
        return argument.dtype, argument.data_ptr() % 16 == 0
    if isinstance(argument, int):
        return argument == 1, argument % 16 == 0, argument.bit_length() > 31
    return type(argument).__name__


def target_of(name: str) -> GPUTarget:
    """The target called "cuda:90" (compute capability 9.0) or "hip:gfx942".

    Raises:
        ValueError: for any other name.
    """
    backend, _, arch = name.partition(":")
    if backend not in WARP or not arch or (backend == "cuda") != arch.isdigit():
        raise ValueError(
            f"there is no target {name!r}; expected cuda: and the compute capability without its point, as cuda:90, or "
            "hip: and the architecture, as hip:gfx942"
        )
    return GPUTarget(backend, int(arch) if backend == "cuda" else arch, WARP[backend])


def present_target() -> str:
    """The name of this machine's GPU, as `target_of` takes it.

    Raises:
        RuntimeError: there is none.
    """
    try:
        found = driver.active.get_current_target()
    except Exception as error:  # Triton has several for this
        raise RuntimeError(
            "there is no GPU to compile for; name one with a target, as cuda:90 (H100), cuda:80 (A100) or hip:gfx942"
        ) from error
    return f"{found.backend}:{found.arch}"


@contextlib.contextmanager
def active(target: GPUTarget) -> Iterator[None]:
    """In this context Triton compiles for `target`."""
    before = driver._active
    driver.set_active(TargetDriver(target))
    try:
        yield
    finally:
        driver._active = before


@contextlib.contextmanager
def recording() -> Iterator[list[Launched]]:
    """In this context kernels are neither compiled nor run; yields the list of their launches."""
    found: list[Launched] = []
    run = JITFunction.run

    def record(self: Any, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> None:
        found.append(Launched(self, arguments, options))

    JITFunction.run = record
    try:
        yield found
    finally:
        JITFunction.run = run
