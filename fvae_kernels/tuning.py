"""Override block shapes, warps and stages of the Triton kernels.

    fk.tuning.kernels()                                        # names and options
    fk.tuning.override("encode_fwd", BLOCK_N=32, num_warps=8)  # from here on
    with fk.tuning.override("encode_fwd", BLOCK_N=32): ...     # for the block
    fk.tuning.override("encode_fwd")                           # back to the table

Without an override a table chooses by dtype, number of tokens and, for the whole layer, its width; ``make gpu-compile``
compiles every entry. An override holds for every dtype and size and was not compiled before: a block that is too large
raises in Triton, at the first launch.
"""

import contextlib
from types import TracebackType

from ._triton import tables
from .ops import _backend, _raw

_WARPS = (1, 2, 4, 8, 16, 32)


def kernels() -> dict[str, tuple[str, ...]]:
    """Kernels that have a table, and their options: blocks (powers of two, at least 16), num_warps, num_stages.

    Raises:
        BackendUnavailable: Triton is not installed.
    """
    error = _raw.load("triton")
    if error is not None:
        raise _backend.BackendUnavailable(f"the Triton kernels do not load: {error}")
    from ._triton import launchers

    return {name: (*blocks, "num_warps", "num_stages") for name, blocks in launchers.tuned().items()}


class override(contextlib.AbstractContextManager[None]):  # noqa: N801  (reads as the function that it also is)
    """Launch `kernel` with these options instead of its table's. Without options, the table holds again.

    Raises:
        ValueError: no such kernel or option, or an invalid number.
        BackendUnavailable: Triton is not installed.
    """

    def __init__(self, kernel: str, **options: int) -> None:
        known = kernels()
        if kernel not in known:
            raise ValueError(f"there is no kernel {kernel!r} with a table; expected one of {', '.join(sorted(known))}")
        for name, value in options.items():
            if name not in known[kernel]:
                raise ValueError(f"{kernel} has no option {name!r}; expected one of {', '.join(known[kernel])}")
            _check(kernel, name, value)
        self._name = f"{kernel}_kernel"
        self._before = tables.OVERRIDES.get(self._name)
        tables.override(self._name, options)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        tables.override(self._name, self._before)


def _check(kernel: str, name: str, value: int) -> None:
    whole = isinstance(value, int) and not isinstance(value, bool)
    if name == "num_warps":
        fits, expected = whole and value in _WARPS, f"one of {', '.join(map(str, _WARPS))}"
    elif name == "num_stages":
        fits, expected = whole and value >= 1, "a whole number, at least 1"
    else:
        fits, expected = whole and value >= 16 and value & (value - 1) == 0, "a power of two, at least 16"
    if not fits:
        raise ValueError(f"{kernel}: {name}={value!r}; expected {expected}")
