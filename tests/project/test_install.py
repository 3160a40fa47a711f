"""Without a compiler the package installs, warns, and runs as plain PyTorch."""

import os
import subprocess
import sys
from pathlib import Path

from tests import ROOT

USE = """
import sys
sys.meta_path = [f for f in sys.meta_path if "editable" not in f.__module__]  # which would find the checkout's kernels
import torch
import fvae_kernels as fk
layer = fk.FusedFVAELinear.from_linear(torch.nn.Linear(6, 5), fk.FVAEConfig(rank=2, kl_weight=2.0))
layer.forward_with_terms(torch.ones(3, 6))[1].loss.backward()
print(fk.__file__, "cpp" in fk.available_backends(), sep="\\n")
"""


def test_installs_and_runs_without_a_compiler(tmp_path: Path) -> None:
    built = tmp_path / "built"
    command = [sys.executable, "setup.py", "--quiet", "build", "--build-base", str(tmp_path), "--build-lib", str(built)]
    environment = os.environ | {"CXX": "/bin/false", "CC": "/bin/false"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    assert "no C++ kernels, since the compiler does not run" in done.stdout + done.stderr
    assert not list(built.glob("fvae_kernels/*.so"))

    used = subprocess.run([sys.executable, "-c", USE], cwd=built, capture_output=True, text=True, check=True)
    assert used.stdout.splitlines() == [str(built / "fvae_kernels" / "__init__.py"), "False"]
    assert used.stderr.count("runs as plain PyTorch") == 1
    assert "install a C++ compiler" in used.stderr


OLD = """
import runpy
import setuptools
setuptools.__version__ = "65.5.0"
runpy.run_path("setup.py")
"""


def test_an_old_setuptools_is_named() -> None:
    """It would only say that project.license is not valid."""
    done = subprocess.run([sys.executable, "-c", OLD], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.splitlines() == [
        "fvae_kernels builds with setuptools 77 or newer, and this is 65.5.0: pip install 'setuptools>=77'"
    ]
