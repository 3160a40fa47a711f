"""python -m fvae_kernels.env prints versions, devices and backends."""

import subprocess
import sys

import torch

from fvae_kernels import env
from fvae_kernels.ops import _backend


def test_runs_as_a_module():
    done = subprocess.run([sys.executable, "-m", "fvae_kernels.env"], capture_output=True, text=True, check=True)
    assert f"torch         {torch.__version__}" in done.stdout
    assert "reference     available" in done.stdout
    assert done.stderr == ""


def test_says_why_a_backend_is_missing(monkeypatch):
    monkeypatch.setattr(env, "why_missing", {"cpp": "the compiled library is missing"}.get)
    assert "cpp           missing: the compiled library is missing" in env.report()


def test_lists_every_backend_and_package():
    lines = env.report().splitlines()
    for name in (*_backend.BACKENDS, *env.PACKAGES, "python", "cpu"):
        assert any(line.startswith(name) for line in lines)


def test_missing_package_is_named():
    assert env._version("no-such-package-for-certain") == "not installed"
