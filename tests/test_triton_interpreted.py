"""The tests of the Triton kernels where there is no GPU: in a process in which Triton interprets its kernels.

Interpreted or not is decided when a kernel is decorated, hence the process. On a GPU the tests of each op run there.
"""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fvae_kernels._backend import interpreting

ROOT = Path(__file__).parent.parent

pytestmark = [
    pytest.mark.skipif(interpreting(), reason="this is the process that it would start"),
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton"),
]


LAYER = ["layer", "layer_base", "layer_dropout", "layer_edges", "triton_layer", "triton_traffic"]
OTHERS = ["encode", "divergence", "geometry", "reconstruct", "contract", "no_waiting", "triton_checks"]


@pytest.mark.parametrize("name", [*LAYER, *OTHERS])
def test_interpreted(name):
    command = [sys.executable, "-m", "pytest", "-q", "-k", "triton", "-p", "no:cacheprovider", f"tests/test_{name}.py"]
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " passed" in done.stdout
