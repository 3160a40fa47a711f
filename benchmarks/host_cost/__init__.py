"""What a training step of one adapted layer costs the host, measured without a GPU: ``make host-cost``.

On a GPU an eager step runs at the pace of the slower of two: the device that computes, and the host that launches. Here
the host alone is timed. Triton compiles our kernels for sm_90 and its own launchers start them, over a CUDA driver that
does nothing (fake_libcuda.c); everything from the module to the driver's door runs as it does on a GPU.

python -m benchmarks.host_cost               print it
python -m benchmarks.host_cost --full        more tokens, and the other precisions; Triton compiles for minutes
python -m benchmarks.host_cost --write       into benchmarks/results/host_cost.json and docs/roofline.md

What is missing: the driver's own launch, of every side (2 to 4 us a kernel). What is too much: PyTorch's operators, of
every side, compute on one token of few features where a GPU's host would launch.
"""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent.parent
FOUND = ROOT / "benchmarks" / "results" / "host_cost.json"


def stored() -> dict[str, Any]:
    """What was measured and written last."""
    found: dict[str, Any] = json.loads(FOUND.read_text())
    return found


def compiler() -> str | None:
    """What builds the fake driver."""
    return os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")


def possible() -> bool:
    """Whether it can be measured here."""
    return sys.platform == "linux" and compiler() is not None and importlib.util.find_spec("triton") is not None


def run(quick: bool = False) -> dict[str, Any]:
    """Measure, in a process of its own, where no other CUDA driver is loaded.

    Raises:
        RuntimeError: it failed, with the last line of what it said.
    """
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "found.json"
        command = [sys.executable, "-m", "benchmarks.host_cost", "--out", str(out), *(["--quick"] * quick)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise RuntimeError(f"host cost was not measured: {(done.stderr.strip().splitlines() or ['no output'])[-1]}")
        found: dict[str, Any] = json.loads(out.read_text())
        return found
