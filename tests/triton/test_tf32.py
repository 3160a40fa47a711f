"""TF32: our float32 products follow PyTorch's setting, by whichever of its interfaces it was set."""

import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")

MATMUL = "torch.backends.cuda.matmul"
WAYS = {
    "pass": "ieee",
    f"{MATMUL}.allow_tf32 = True": "tf32",
    f"{MATMUL}.allow_tf32 = True; {MATMUL}.allow_tf32 = False": "ieee",
    "torch.set_float32_matmul_precision('high')": "tf32",
    f"{MATMUL}.fp32_precision = 'tf32'": "tf32",
    "torch.backends.fp32_precision = 'tf32'": "tf32",  # as enable_tf32 of transformers does; allow_tf32 then raises
    f"torch.backends.fp32_precision = 'tf32'; {MATMUL}.fp32_precision = 'ieee'": "ieee",
}
# Each way in a fork of its own: PyTorch has no way back from the new settings to the old.
SHOW = """
import os, sys
import torch
from fvae_kernels._triton._common import precision

for way in sys.argv[1:]:
    child = os.fork()
    if child == 0:
        exec(way)
        found = [precision(dtype) for dtype in (torch.float32, torch.bfloat16, torch.float64)]
        print(*found, precision(torch.float32, torch.bfloat16), flush=True)
        os._exit(0)
    os.waitpid(child, 0)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_products_follow_pytorchs_setting() -> None:
    done = subprocess.run([sys.executable, "-c", SHOW, *WAYS], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [f"{expected} ieee ieee bfloat16" for expected in WAYS.values()], done.stderr
