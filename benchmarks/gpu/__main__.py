"""Test and time everything on this machine's GPU, and write one report.

python3 -m benchmarks.gpu                        all of it; about an hour
python3 -m benchmarks.gpu --minutes 9            what fits into nine minutes, the most important first; repeat for more
python3 -m benchmarks.gpu --only layer steps     some parts
python3 -m benchmarks.gpu --dry-run              anywhere: the same flow, interpreted, tiny, without a clock

It may be stopped at any moment: the report holds the results so far, and the next call in the same folder continues
from there. A case that fails is named in the report, the others continue, and the exit status is 1.
"""

import argparse
import importlib
import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from . import report
from .case import Case, Found, Part, Plan
from .results import ROOT, Results, fingerprint
from .supervise import Supervisor

CASES = "benchmarks.gpu.cases"
RESERVE = 5.0  # seconds of --minutes that are kept for the end
NO_LIMIT = 24 * 60.0


def parser(parts: Sequence[Part]) -> argparse.ArgumentParser:
    """The options."""
    out = argparse.ArgumentParser(
        prog="benchmarks.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    out.add_argument("--minutes", type=float, default=NO_LIMIT, help="stop after so many (no limit)")
    out.add_argument("--only", nargs="+", choices=[part.name for part in parts], help="these parts")
    out.add_argument("--dry-run", action="store_true", help="no GPU: interpreted, tiny, and no number is a measurement")
    out.add_argument("--out", type=Path, metavar="FOLDER", help="where everything goes (benchmarks/results/gpu)")
    return out


def run(module: Any, options: argparse.Namespace, start: float) -> bool:
    """Run all parts twice: within their shares of the time, then in the time left. True if nothing failed."""
    default = ROOT / ("runs/gpu-dry-run" if options.dry_run else "benchmarks/results/gpu")
    plan = Plan((options.out or default).resolve(), options.dry_run)
    plan.folder.mkdir(parents=True, exist_ok=True)
    parts = [part for part in module.PARTS if not options.only or part.name in options.only]
    cases = [case for case in module.cases(plan) if case.part in {part.name for part in parts}]
    results = Results(plan.folder, module.identity(plan) | {"sources": fingerprint(), "dry": plan.dry})

    def write(state: str) -> None:
        report.write(module, plan, results.cases, [case.key for case in cases], state)

    def add(key: str, one: Found) -> None:
        results.add(key, one)
        print(f"{time.monotonic() - start:5.0f} s  {key}{': ' + one['error'] if 'error' in one else ''}", flush=True)
        write("running, or was killed")

    supervisor, state = Supervisor(module.__name__, plan.folder, plan.dry, add), "was stopped"
    end = start + 60 * options.minutes - RESERVE
    write("running, or was killed")
    try:
        for first in (True, False):
            for part in parts:
                now = time.monotonic()
                until = min(end, now + 60 * options.minutes * part.share) if first else end
                supervisor.run(_left(cases, part, results), until, part.workers)
        state = "ran to its end" if all(case.key in results.cases for case in cases) else "ran out of its time"
    finally:
        supervisor.end()
        write(state)
    return not report.failures(results.cases)


def _left(cases: Sequence[Case], part: Part, results: Results) -> list[Case]:
    return [case for case in cases if case.part == part.name and case.key not in results.cases]


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: 0 if nothing failed, 1 if a case failed, 2 without a GPU, or where kernels cannot run."""
    start = time.monotonic()
    module = importlib.import_module(os.environ.get("BENCHMARKS_GPU_CASES", CASES))  # tests have cases of their own
    options = parser(module.PARTS).parse_args(arguments)
    if (reason := module.missing(options.dry_run)) is not None:
        print(reason, file=sys.stderr)
        return 2
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    return int(not run(module, options, start))


if __name__ == "__main__":
    sys.exit(main())
