"""Processes that compile. All list the same launches; each compiles those that it is asked for."""

import base64
import json
import os
import pickle
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import Any

import torch

from ..ops._raw import triton_part
from .steps import Step, launches

COMMAND = [sys.executable, "-c", "from fvae_kernels.compile.workers import serve; serve()"]


@dataclass(frozen=True)
class Work:
    """What is compiled and for what; equal in all processes."""

    target: str
    steps: Sequence[Step]
    overrides: dict[str, dict[str, int]]  # of tuning.override
    matmul_precision: str  # of torch.backends.cuda.matmul

    @classmethod
    def of(cls, target: str, steps: Sequence[Step]) -> "Work":
        """With the settings of this process."""
        return cls(target, steps, dict(triton_part("tables").OVERRIDES), torch.backends.cuda.matmul.fp32_precision)


@dataclass(frozen=True)
class Compiled:
    """One compiled kernel: its name and the step that needs it, seconds, and the error if it did not compile."""

    name: str
    seconds: float
    error: str | None = None


def compile_all(work: Work, processes: int, report: Callable[[Compiled], None]) -> list[Compiled]:
    """Compile every launch of the steps, each in one of so many processes; `report` is told of each."""
    ahead = triton_part("ahead")
    with ahead.active(ahead.target_of(work.target)):
        names = [name for name, _ in launches(work.steps)]
    left: SimpleQueue[int] = SimpleQueue()
    for index in range(len(names)):
        left.put(index)
    found: list[Compiled] = []

    def take() -> None:
        for one in _worker(work, names, left):
            found.append(one)
            report(one)

    with ThreadPoolExecutor(max(processes, 1)) as pool:
        for done in [pool.submit(take) for _ in range(min(processes, len(names)))]:
            done.result()
    return found


def _worker(work: Work, names: Sequence[str], left: "SimpleQueue[int]") -> Iterator[Compiled]:
    path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(COMMAND, env=os.environ | {"PYTHONPATH": path}, **pipes) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(base64.b64encode(pickle.dumps(work)).decode() + "\n")
        while True:
            try:
                index = left.get_nowait()
            except Empty:
                process.stdin.close()
                return
            print(index, file=process.stdin, flush=True)
            answer = process.stdout.readline()
            if not answer:
                yield Compiled(names[index], 0.0, f"the process that compiled it ended with {process.wait()}")
                return
            yield Compiled(names[index], *json.loads(answer))


def serve() -> None:
    """Compile launches by their index, from stdin; the answer is the seconds, and null or the error."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what compilers print is no answer
    work: Work = pickle.loads(base64.b64decode(sys.stdin.readline()))
    ahead = triton_part("ahead")
    triton_part("tables").OVERRIDES.update(work.overrides)
    torch.backends.cuda.matmul.fp32_precision = work.matmul_precision
    with ahead.active(ahead.target_of(work.target)):
        listed = list(launches(work.steps))
        for line in sys.stdin:
            error, start = None, time.monotonic()
            try:
                listed[int(line)][1].compile()
            except Exception as raised:
                error = _said(raised)
            print(json.dumps([time.monotonic() - start, error]), file=answers, flush=True)


def _said(error: BaseException) -> str:
    """The innermost cause: Triton wraps it once for each function on the way, each time with the source."""
    while error.__cause__ is not None:
        error = error.__cause__
    text = " ".join(str(error).split())  # the source first, and what is wrong last
    return f"{type(error).__name__}: {text if len(text) < 500 else f'{text[:150]} ... {text[-350:]}'}"
