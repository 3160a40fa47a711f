"""Runs cases in worker processes, within their time limits; passes each result on at once."""

import contextlib
import json
import os
import selectors
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from .case import Case, Found
from .results import ROOT

Add = Callable[[str, Found], None]


class Worker:
    """One process and its current case."""

    def __init__(self, command: list[str], environment: dict[str, str], log: Path) -> None:
        self.log, self.started = log, 0.0
        self.case: Any = None
        with log.open("a") as file:
            self.process = subprocess.Popen(
                command,
                cwd=ROOT,
                env=environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=file,
                text=True,
                start_new_session=True,
            )

    def give(self, case: Case) -> None:
        """Start a case; the process may still be starting."""
        self.case, self.started = case, time.monotonic()
        with contextlib.suppress(BrokenPipeError):  # it died; reading the answer will tell
            self.process.stdin.write(case.key + "\n")
            self.process.stdin.flush()

    def answer(self) -> Found:
        """The result of the case, or how the process ended."""
        line = self.process.stdout.readline()
        if line:
            return json.loads(line)
        words = [line for line in self.log.read_text(errors="replace").splitlines() if line.strip()]
        last = words[-1][:500] if words else "no output"
        return {"error": f"the process ended with {self.process.wait()}: {last}", "broken": True}

    def end(self) -> None:
        """Kill the process and all that it started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout):
            with contextlib.suppress(BrokenPipeError):
                stream.close()


class Supervisor:
    """Starts workers for the cases of `module`, and keeps the idle ones."""

    def __init__(self, module: str, folder: Path, dry: bool, add: Add) -> None:
        self._command = [sys.executable, "-m", "benchmarks.gpu.worker", module, "--out", str(folder)]
        self._command += ["--dry-run"] * dry
        self._environment = os.environ | ({"TRITON_INTERPRET": "1"} if dry else {}) | {"PYTHONUNBUFFERED": "1"}
        self._log, self._add = folder / "log.txt", add
        self._idle: list[Worker] = []
        self._busy: list[Worker] = []

    def run(self, cases: Iterable[Case], deadline: float, workers: int = 1) -> None:
        """Run cases, `workers` at a time, until they are done or `time.monotonic()` passes `deadline`.

        A case running at the deadline is stopped and has no result. One that exceeds its limit has an error.
        """
        waiting = deque(cases)
        with selectors.DefaultSelector() as ready:
            while (waiting or self._busy) and time.monotonic() < deadline:
                while waiting and len(self._busy) < workers:
                    worker = self._idle.pop() if self._idle else self._start()
                    worker.give(waiting.popleft())
                    self._busy.append(worker)
                    ready.register(worker.process.stdout, selectors.EVENT_READ, worker)
                until = min(deadline, *(w.started + w.case.seconds for w in self._busy))
                for key, _ in ready.select(max(0.0, until - time.monotonic())):
                    ready.unregister(key.fileobj)
                    self._finish(key.data, key.data.answer())
                for worker in [w for w in self._busy if time.monotonic() > w.started + w.case.seconds]:
                    ready.unregister(worker.process.stdout)
                    self._finish(worker, {"error": f"took longer than {worker.case.seconds:g} s", "broken": True})
            for worker in self._busy:
                worker.end()
            self._busy.clear()
        while len(self._idle) > 1:  # idle workers only hold memory
            self._idle.pop().end()

    def end(self) -> None:
        """End all workers."""
        for worker in (*self._busy, *self._idle):
            worker.end()
        self._busy, self._idle = [], []

    def _start(self) -> Worker:
        return Worker(self._command, self._environment, self._log)

    def _finish(self, worker: Worker, answer: Found) -> None:
        self._busy.remove(worker)
        if answer.pop("broken", False):
            worker.end()
        else:
            self._idle.append(worker)
        self._add(worker.case.key, {**answer, "seconds": round(time.monotonic() - worker.started, 2)})
