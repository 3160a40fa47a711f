"""Runs compiled Triton kernels on the CPU, before and after the compiler chose layouts and matrix instructions.

    with executed("sm_90", "ttgir") as ran: op(...)

compiles every launch in the block for the target and executes the intermediate representation of that stage on the
CPU tensors: "ttir" is the kernel as written, "ttgir" the last stage before machine code, pipelined and with matrix
instructions of the target. Unlike the interpreter, this computes bfloat16 as a GPU does. An access outside a buffer
raises. Approximate divisions are executed as exact ones. Built on ttsem 0.1.0, for NVIDIA's targets only.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from triton.runtime import driver
from triton.runtime.jit import JITFunction

try:
    from ttsem import harness, mlir
except ImportError as error:
    raise ImportError(
        "executing compiled kernels needs ttsem; it asks for newer versions than it needs, so no extra can name it: "
        "pip install --no-deps --ignore-requires-python ttsem==0.1.0"
    ) from error

from fvae_kernels._triton.ahead import TargetDriver
from tests.tools.triton.gpu_compile import TARGETS
from tests.tools.triton.strict import patch

_CODES: dict[tuple[Any, ...], str] = {}  # compiled before


@contextlib.contextmanager
def executed(target: str, stage: str) -> Iterator[dict[str, str]]:
    """Yields the code of the kernels that ran, by name."""
    ran: dict[str, str] = {}

    def launch(old: Any) -> Any:
        def run(kernel: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
            nothing_runs = lambda *_, **__: None  # noqa: E731
            record = harness.record_launch(kernel, args, options, grid, nothing_runs, "kernels").record
            code = _code(record, stage, target).replace('"tt.approx_divf"', '"arith.divf"')
            done = harness.execute(record, code, raise_faults=True)
            if done.failure is not None or done.unsupported:
                raise RuntimeError(f"{kernel.__name__} did not run on {target}: {done.failure or done.unsupported}")
            _write_back(record, done)
            ran[kernel.__name__] = code

        return run

    with contextlib.ExitStack() as stack:
        patch(stack, driver, "_active", lambda _: TargetDriver(TARGETS[target]))
        patch(stack, JITFunction, "run", launch)
        yield ran


def _code(record: Any, stage: str, target: str) -> str:
    """The code of a compilation that ends at `stage`; `harness.ir_for_launch` would compile to machine code."""
    specialised = harness._specialize(record.fn, record.args, record.kwargs, TARGETS[target])
    key = record.fn, stage, target, str(specialised)
    if key not in _CODES:
        mlir.enable_generic_printing()
        _CODES[key] = mlir.to_generic(harness._stage_text(record, stage, TARGETS[target]), None)
    return _CODES[key]


def _write_back(record: Any, done: Any) -> None:
    """Copy the memory after the launch into the storages of its tensors."""
    for name, value in ((leaf, v) for outer, arg in record.bound.items() for leaf, v in harness._flat_args(outer, arg)):
        memory = done.buffer(record, name) if name in record.ptrs else None
        if memory is not None and isinstance(value, torch.Tensor):
            storage = torch.empty(0, dtype=torch.uint8).set_(value.untyped_storage())
            found = torch.from_numpy(np.ascontiguousarray(memory).view(np.uint8).reshape(-1).copy())
            storage[: found.numel()].copy_(found)
