"""The tests of the Triton kernels where there is no GPU: in a process in which Triton interprets its kernels.

Interpreted or not is decided when a kernel is decorated, hence the process. On a GPU the tests of each op run there.
"""

import importlib.util
import os
import subprocess
import sys

import pytest

from fvae_kernels.ops._backend import interpreting
from tests import ROOT

pytestmark = [
    pytest.mark.skipif(interpreting(), reason="this is the process that it would start"),
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton"),
]


OPS = ["encode", "divergence", "geometry", "reconstruct", "layer", "layer_base", "layer_dropout", "layer_edges"]
OTHERS = ["ops/test_contract", "ops/test_no_waiting", "triton/test_checks", "triton/test_layer", "triton/test_traffic"]


@pytest.mark.parametrize("name", [*(f"ops/test_{op}" for op in OPS), *OTHERS])
def test_interpreted(name):
    command = [sys.executable, "-m", "pytest", "-q", "-k", "triton", "-p", "no:cacheprovider", f"tests/{name}.py"]
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " passed" in done.stdout
