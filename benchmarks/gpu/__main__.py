"""``make gpu``: the suite, the timings and the roofline of this machine's GPU, in one report.

python -m benchmarks.gpu                  on a GPU; about an hour
python -m benchmarks.gpu --dry-run        anywhere, in a minute: the same flow, interpreted, tiny, without a clock

A part that fails is named in the report, the others go on, and the exit status is 1.
"""

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from fvae_kernels.ops._backend import interpreting

from ..machine import ROOT
from . import report
from .parts import INTERPRETED, PARTS, plan, run_part

ON_THE_DEVICE = {"about": 10, "ops": 40, "layer": 90}  # in processes of their own, which may take so many minutes


def parser() -> argparse.ArgumentParser:
    """The options."""
    out = argparse.ArgumentParser(prog="benchmarks.gpu", description="Test and time everything on this machine's GPU.")
    out.add_argument("--dry-run", action="store_true", help="no GPU: interpreted, tiny, and no number is a measurement")
    out.add_argument("--only", nargs="+", choices=list(PARTS), help="these parts, the others as they were found before")
    out.add_argument("--out", type=Path, metavar="FOLDER", help="where report and logs go (benchmarks/results/gpu)")
    out.add_argument("--part", choices=list(PARTS), help=argparse.SUPPRESS)
    return out


def missing() -> str | None:
    """Why nothing can be measured here, and what to do; None where there is a GPU."""
    if interpreting():
        return "TRITON_INTERPRET is set, so kernels would be interpreted: unset it, or ask for --dry-run"
    if torch.cuda.is_available():
        return None
    built = (
        f"CUDA {torch.version.cuda}"
        if torch.version.cuda
        else f"ROCm {torch.version.hip}"
        if torch.version.hip
        else "CPUs"
    )
    return (
        f"torch {torch.__version__}, built for {built}, sees no GPU. If `nvidia-smi` or `rocm-smi` lists one, its "
        "driver is older than this build needs: install a build of torch 2.13 or newer for that driver into .venv. "
        'Without a GPU: make gpu ARGS="--dry-run"'
    )


def run(name: str, folder: Path, dry: bool) -> str | None:
    """One part, its output in a log. None, or how it failed."""
    (folder / f"{name}.json").unlink(missing_ok=True)
    if name not in ON_THE_DEVICE:
        try:
            run_part(name, plan(folder, dry))
        except Exception as error:
            return f"{type(error).__name__}: {error}"
        return None
    command = [sys.executable, "-m", "benchmarks.gpu", "--part", name, "--out", str(folder), *(["--dry-run"] * dry)]
    environment = os.environ | (INTERPRETED if dry else {})
    with (folder / f"{name}.log").open("w") as log:
        try:
            done = subprocess.run(
                command,
                cwd=ROOT,
                env=environment,
                stdout=log,
                stderr=log,
                timeout=60 * ON_THE_DEVICE[name],
                check=False,
            )
        except subprocess.TimeoutExpired:
            return f"took longer than {ON_THE_DEVICE[name]} minutes"
    if done.returncode == 0:
        return None
    lines = (folder / f"{name}.log").read_text().strip().splitlines()
    return f"ended with {done.returncode}: {lines[-1] if lines else 'no output'}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the parts, write the report after each; 0 where nothing failed."""
    options = parser().parse_args(arguments)
    default = ROOT / ("runs/gpu-dry-run" if options.dry_run else "benchmarks/results/gpu")
    folder = (options.out or default).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    if options.part:
        run_part(options.part, plan(folder, options.dry_run))
        return 0
    if not options.dry_run and (reason := missing()) is not None:
        print(reason, file=sys.stderr)
        return 2
    failures: dict[str, str] = {}
    start = time.perf_counter()
    for name in options.only or PARTS:
        print(f"{time.perf_counter() - start:5.0f} s  {name}", flush=True)
        failure = run(name, folder, options.dry_run)
        if failure is not None:
            failures[name] = failure
            print(f"         failed: {failure}", flush=True)
        failed = report.write(folder, failures, options.dry_run)
    print(folder / report.NAME)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
