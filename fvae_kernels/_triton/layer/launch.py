"""Two ways to launch a kernel.

The general way is Triton's: it looks at every argument, and finds or compiles the kernel. That costs the host some
100 us for a kernel of the layer. The direct way hands the arguments to a kernel that was compiled before, for arguments
that Triton specialises alike, and costs 10 us.
"""

from collections.abc import Hashable
from typing import Any, NamedTuple

from torch import Tensor
from triton import knobs
from triton.runtime import driver

from ...ops._host import pointers
from .._common import INTERPRET, target

Constants = dict[str, Any]


class Fixed(NamedTuple):
    """A nested argument that stays from step to step, in two forms: `plain` costs a direct launch less."""

    named: Any  # as kernels read it
    plain: Any  # plain tuples, and addresses for tensors: in a kernel the same, but only a direct launch takes it

    @classmethod
    def of(cls, named: Any) -> "Fixed":
        """Of a nested named tuple of numbers and tensors. The addresses hold as long as the tensors."""
        return cls(named, _plain(named))

    def form(self, direct: bool) -> Any:
        """For a launch of this kind."""
        return self.plain if direct else self.named


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(map(_plain, value))
    return value.data_ptr() if isinstance(value, Tensor) else value


class Launch:
    """A kernel with its compile-time constants, and its compiled forms by the key of their arguments."""

    def __init__(self, kernel: Any, constants: Constants, num_warps: int, num_stages: int) -> None:
        self.kernel, self.constants = kernel, constants
        self.values = tuple(constants.values())  # in the order of the kernel's arguments; they come last
        self.options = {"num_warps": num_warps, "num_stages": num_stages}
        self.compiled: dict[Hashable, tuple[Any, Any, Any]] = {}

    def __call__(self, grid: tuple[int, int], arguments: tuple[Any, ...], key: Hashable, stream: int | None) -> None:
        """Launch. Arguments that Triton specialises differently have another `key`. No stream: the general way.

        With a stream, arguments with one key must be specialised alike.
        """
        known = None if stream is None else self.compiled.get(key)
        if known is not None:
            run, function, metadata = known
            run(grid[0], grid[1], 1, stream, function, metadata, None, None, None, *pointers(arguments), *self.values)
            return
        compiled = self.kernel[grid](*arguments, **self.constants, **self.options)
        if stream is not None:
            self.compiled[key] = compiled.run, compiled.function, compiled.packed_metadata


def why_general() -> str | None:
    """None if launches may go directly to compiled kernels, else the feature that needs Triton's own launcher."""
    if INTERPRET.value:
        return "Triton interprets its kernels"
    runtime = knobs.runtime
    for hook in (runtime.launch_enter_hook, runtime.launch_exit_hook):
        if hook is not None and getattr(hook, "calls", True):
            return "a launch hook is set, as profilers do"
    if runtime.debug or knobs.compilation.instrumentation_mode:
        return "Triton's debugging is on"
    if (found := target()) != "cuda":
        return f"the target is {found}"
    return None


def stream_of(device: int) -> int | None:
    """The current stream of a device; None if another device is current, since Triton launches on that one."""
    active = driver.active
    return active.get_current_stream(device) if active.get_current_device() == device else None
