"""What a training step of one adapted layer costs the host, measured without a GPU: ``make host-cost``.

On a GPU an eager step runs at the pace of the slower of two: the device that computes, and the host that launches. Here
the host alone is timed. Triton compiles our kernels for sm_90 and its own launchers start them, over a CUDA driver that
does nothing (fake_libcuda.c); everything from the module to the driver's door runs as it does on a GPU.

python -m benchmarks.host_cost               print it
python -m benchmarks.host_cost --full        more tokens, and the other precisions; Triton compiles for minutes
python -m benchmarks.host_cost --write       with --full, into benchmarks/results/host_cost.json and docs/roofline.md

What is missing: the driver's own launch, of every side (2 to 4 us a kernel). What is too much: PyTorch's operators, of
every side, compute on one token of few features where a GPU's host would launch.
"""

import json
from pathlib import Path
from typing import Any

FOUND = Path(__file__).parent.parent / "results" / "host_cost.json"


def stored() -> dict[str, Any]:
    """What was measured and written last."""
    found: dict[str, Any] = json.loads(FOUND.read_text())
    return found
