"""Other programs: the tests of the kernels; NVIDIA's sanitizer and profiler, if they are installed."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys

from .case import Found, Plan
from .results import ROOT

COUNTERS = ("Duration", "DRAM Throughput", "Compute (SM) Throughput", "Registers Per Thread", "Achieved Occupancy")
SMALL = [sys.executable, "-m", "benchmarks.gpu.small"]


def tests(plan: Plan, name: str) -> Found:
    """The Triton cases of a test file, with few examples from hypothesis."""
    if importlib.util.find_spec("pytest") is None or importlib.util.find_spec("hypothesis") is None:
        return {"skipped": "pytest or hypothesis is not installed"}
    select = "triton and standard_normal" if plan.dry else "triton"
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-k",
        select,
        "-p",
        "no:cacheprovider",
        f"tests/ops/test_{name}.py",
    ]
    done = _run(command, {"HYPOTHESIS_PROFILE": "few"})
    counts = {kind: int(number) for number, kind in re.findall(r"(\d+) (passed|failed|skipped|error)", done.stdout)}
    if done.returncode != 0 or not counts.get("passed"):
        failed = re.findall(r"^(?:FAILED|ERROR) (\S+)", done.stdout, re.MULTILINE)
        raise AssertionError(f"pytest ended with {done.returncode}, {counts}: {', '.join(failed[:20])}")
    return counts


def memcheck(plan: Plan) -> Found:
    """Accesses outside buffers, in one small layer."""
    return _sanitized("memcheck")


def racecheck(plan: Plan) -> Found:
    """Races in shared memory, in the same layer."""
    return _sanitized("racecheck")


def _sanitized(tool: str) -> Found:
    if shutil.which("compute-sanitizer") is None:
        return {"skipped": "compute-sanitizer is not installed"}
    # Without PyTorch's cache every tensor is its own allocation, and the sanitizer knows where it ends.
    command = ["compute-sanitizer", "--tool", tool, "--kernel-name", "kns=layer_", *SMALL]
    done = _run(command, {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"})
    summary = re.findall(r"=+ ((?:ERROR|RACECHECK) SUMMARY: .*)", done.stdout)
    if done.returncode != 0 or not summary or not re.search(r": 0 (errors|hazards)", summary[-1]):
        raise AssertionError(f"{tool}: {summary[-1] if summary else done.stdout[-500:]} (see log.txt)")
    return {"said": summary[-1]}


def ncu(plan: Plan) -> Found:
    """The profiler's numbers for the layer's kernels; its full output goes to ncu.txt."""
    if shutil.which("ncu") is None:
        return {"skipped": "ncu is not installed"}
    sections = [part for name in ("SpeedOfLight", "Occupancy", "LaunchStats") for part in ("--section", name)]
    command = ["ncu", *sections, "--clock-control", "none", "--kernel-name", "regex:layer_", "--launch-count", "8"]
    done = _run([*command, *SMALL, "1576", "768"], {})
    (plan.folder / "ncu.txt").write_text(done.stdout)
    kernels: list[Found] = []
    for line in done.stdout.splitlines():
        if (name := re.match(r"\s+(layer_\w+)", line)) is not None:
            kernels.append({"kernel": name[1]})
        elif kernels and (value := re.match(rf"\s+({'|'.join(map(re.escape, COUNTERS))})\s+(\S+)\s+(\S+)", line)):
            kernels[-1].setdefault(value[1], f"{value[3]} {value[2]}")
    if not kernels:
        raise AssertionError(f"ncu ended with {done.returncode} and told of no kernel: {done.stdout[-500:]}")
    return {"kernels": kernels}


def _run(command: list[str], variables: dict[str, str]) -> "subprocess.CompletedProcess[str]":
    done = subprocess.run(
        command,
        cwd=ROOT,
        env=os.environ | variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    print(done.stdout)
    return done
