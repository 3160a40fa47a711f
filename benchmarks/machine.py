"""Machine, commit and threads: a time means nothing without them."""

import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

from .cost import versions

ROOT = Path(__file__).parent.parent
FLAGS = ("avx2", "fma", "avx512f", "avx512_bf16", "avx512_fp16", "amx_bf16")


def describe() -> dict[str, Any]:
    """Commit, hardware, threads, versions."""
    return {
        "commit": commit(),
        "cpu": _cpuinfo("model name") or platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "flags": [flag for flag in FLAGS if flag in _cpuinfo("flags").split()],
        "capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else None,
        "versions": versions(),
    }


def commit() -> str:
    """The short hash, with a mark if tracked files differ from it."""
    head = _git("rev-parse", "--short", "HEAD")
    return "unknown" if not head else head + ("+" if _git("status", "--porcelain", "--untracked-files=no") else "")


def _git(*arguments: str) -> str:
    try:
        found = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return found.stdout.strip() if found.returncode == 0 else ""


def _cpuinfo(key: str) -> str:
    """The first value of this key in Linux's cpuinfo, if any."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(key)), "")
