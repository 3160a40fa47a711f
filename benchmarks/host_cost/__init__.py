"""Host time of a training step of one adapted layer, measured without a GPU: ``make host-cost``.

On a GPU an eager step is as slow as the slower of two: the device that computes, and the host that launches. Here only
the host is timed. Triton compiles our kernels for sm_90, and its own launchers start them over a CUDA driver that does
nothing (fake_libcuda.c). Everything from the module down to the call of the driver runs as on a GPU.

python -m benchmarks.host_cost               print it
python -m benchmarks.host_cost --full        more tokens, and the other precisions; Triton compiles for minutes
python -m benchmarks.host_cost --write       into benchmarks/results/host_cost.json, docs/roofline.md and the README

Missing, for every side: the driver's own launch (2 to 4 us a kernel). Too much, for every side: PyTorch's operators
compute on one token of few features, where the host of a GPU would launch.
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
    """The stored measurement."""
    found: dict[str, Any] = json.loads(FOUND.read_text())
    return found


def compiler() -> str | None:
    """The C compiler that builds the fake driver, if any."""
    return os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")


def possible() -> bool:
    """True if the host cost can be measured here."""
    return sys.platform == "linux" and compiler() is not None and importlib.util.find_spec("triton") is not None


def run(quick: bool = False) -> dict[str, Any]:
    """Measure in a new process, where no other CUDA driver is loaded.

    Raises:
        RuntimeError: it failed; with the last line of its output.
    """
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "found.json"
        command = [sys.executable, "-m", "benchmarks.host_cost", "--out", str(out), *(["--quick"] * quick)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise RuntimeError(f"host cost was not measured: {(done.stderr.strip().splitlines() or ['no output'])[-1]}")
        found: dict[str, Any] = json.loads(out.read_text())
        return found
