"""A process that runs cases: keys come by stdin, one a line, and results go to stdout.

A broken kernel leaves no usable CUDA context, so the parent process then starts another worker. When the parent is gone
or closes stdin, this process ends at once, with all that it started.
"""

import argparse
import importlib
import json
import os
import queue
import signal
import sys
import threading
import traceback
from pathlib import Path

from .case import Plan


def main() -> None:
    """Serve until stdin closes."""
    parser = argparse.ArgumentParser()
    parser.add_argument("module")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--dry-run", action="store_true")
    options = parser.parse_args()
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # output of the cases goes to the log
    asked: queue.Queue[str] = queue.Queue()
    threading.Thread(target=_listen, args=(asked,), daemon=True).start()
    module = importlib.import_module(options.module)
    plan, cases = Plan(options.out, options.dry_run), {}
    while True:
        key = asked.get()
        cases = cases or {case.key: case for case in module.cases(plan)}
        print(f"\n== {key}", flush=True)
        try:
            with module.around(plan):
                answer = {"found": cases[key].run(plan)}
        except Exception as error:
            traceback.print_exc()
            said = " ".join(str(error).split())[:800]
            answer = {"error": f"{type(error).__name__}: {said}", "broken": not module.healthy(plan)}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def _listen(asked: "queue.Queue[str]") -> None:
    for line in sys.stdin:
        asked.put(line.rstrip("\n"))
    os.killpg(0, signal.SIGKILL)  # kills its own process group only


if __name__ == "__main__":
    main()
