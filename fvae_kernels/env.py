"""``python -m fvae_kernels.env`` prints versions, devices and backends: for bug reports."""

import os
import platform
from importlib.metadata import PackageNotFoundError, version

import torch

from . import __version__
from .ops._backend import BACKENDS, why_missing

PACKAGES = ("torch", "triton", "peft", "transformers", "accelerate", "safetensors", "numpy")
VARIABLES = ("TRITON_INTERPRET", "OMP_NUM_THREADS", "MKL_NUM_THREADS", "CUDA_VISIBLE_DEVICES")


def report() -> str:
    """Versions, devices, and each backend, with the reason if it is missing."""
    lines = [f"fvae_kernels  {__version__}", f"python        {platform.python_version()} on {platform.platform()}"]
    lines += [f"{name:<13} {_version(name)}" for name in PACKAGES]
    lines += ["", f"cpu           {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"]
    lines += [f"gpu {i:<9} {_gpu(i)}" for i in range(torch.cuda.device_count())] or ["gpu           none"]
    lines += [f"{name}={os.environ[name]}" for name in VARIABLES if name in os.environ]
    lines += [""]
    for backend in BACKENDS:
        reason = why_missing(backend)
        lines.append(f"{backend:<13} " + ("available" if reason is None else f"missing: {reason}"))
    return "\n".join(lines)


def _version(package: str) -> str:
    if package == "torch":
        return torch.__version__  # says what it was built for, which its package may not
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _gpu(index: int) -> str:
    found = torch.cuda.get_device_properties(index)
    return f"{found.name}, capability {found.major}.{found.minor}, {found.total_memory / 2**30:.0f} GiB"


if __name__ == "__main__":
    print(report())
