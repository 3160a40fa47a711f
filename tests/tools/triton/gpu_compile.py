"""Compile the Triton kernels for GPUs and inspect the result; no GPU and no driver is needed, nothing runs.

Within `compiling` every launch is a compilation for the target, with the arguments of the launch, as
Triton's own specialisation sees them: strides of 1, pointers and sizes divisible by 16, None.
"""

import contextlib
import os
import re
import subprocess
import tempfile
from collections.abc import Iterator
from typing import Any

os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # the default that Triton 3.9 announces to change

import triton

from fvae_kernels._triton import ahead

TARGETS = {
    name: ahead.target_of(target)
    for name, target in {"sm_80": "cuda:80", "sm_90": "cuda:90", "sm_100": "cuda:100", "gfx942": "hip:gfx942"}.items()
}

NVIDIA_TOOLS = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin")


@contextlib.contextmanager
def compiling(target: str) -> Iterator[list[Any]]:
    """Launches in the block do not run; at its end the list that it yields holds them, compiled for `target`."""
    compiled: list[Any] = []
    with ahead.active(TARGETS[target]):
        with ahead.recording() as launched:
            yield compiled
        compiled.extend(one.compile() for one in launched)


def metrics(kernel: Any) -> dict[str, Any]:
    """Registers, memory and instructions of a compiled kernel; the same names for both vendors."""
    about = kernel.metadata
    found = _nvidia(kernel) if about.target.backend == "cuda" else _amd(kernel)
    share = found["loads_128"] / found["loads"] if found["loads"] else 1.0
    return {"kernel": about.name, "warps": about.num_warps, "shared": about.shared, "share_128": share} | found


def _nvidia(kernel: Any) -> dict[str, Any]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage = _output(f"{NVIDIA_TOOLS}/cuobjdump", "--dump-resource-usage", file.name)
        sass = _output(f"{NVIDIA_TOOLS}/nvdisasm", "-c", file.name)
    registers = int(re.search(r"REG:(\d+)", usage)[1])
    return {
        "registers": registers,
        "spills": _spilled_bytes(kernel.asm["ptx"], kernel.metadata.target.arch),
        "lanes": 0,
        "stack": int(re.search(r"STACK:(\d+)", usage)[1]),
        "tensor_core": _count(r"\b(HMMA|DMMA|HGMMA|UT[CQ]\w*MMA)", sass),
        "loads": _count(r"\bLDG\.|\bLDGSTS", sass),
        "loads_128": _count(r"\bLDG\.E(\.\w+)*\.128|\bLDGSTS(\.\w+)*\.128", sass),
        "stores": _count(r"\bSTG\.", sass),
        "stores_128": _count(r"\bSTG\.E(\.\w+)*\.128", sass),
        "atomics": _count(r"\bREDG?\.|\bATOMG?\.", sass),
        "occupancy": _nvidia_occupancy(registers, kernel.metadata.shared, kernel.metadata.num_warps),
    }


def _spilled_bytes(ptx: str, arch: int) -> int:
    """From ptxas, because the resource usage of a cubin does not separate spills from local arrays."""
    from triton.backends.nvidia.compiler import get_ptxas

    target = re.search(r"\.target (\w+)", ptx)[1]
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        said = _output(get_ptxas(arch).path, "-v", f"--gpu-name={target}", file.name, "-o", os.devnull)
    stores, loads = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", said).groups()
    return int(stores) + int(loads)


def _nvidia_occupancy(registers: int, shared: int, warps: int) -> float:
    """Share of 64 warps: a warp gets registers in units of 256, a block reserves 1 KiB of shared memory."""
    of_a_warp = -(-registers * 32 // 256) * 256
    blocks = min((65536 // of_a_warp) // warps, (228 * 1024) // (shared + 1024), 64 // warps, 32)
    return blocks * warps / 64


def _amd(kernel: Any) -> dict[str, Any]:
    code = kernel.asm["amdgcn"]

    def number(name: str) -> int:
        return int(re.search(rf"\.{name}:\s+(\d+)", code)[1])

    registers, warps, shared = number("vgpr_count"), kernel.metadata.num_warps, kernel.metadata.shared
    waves = min(8, 512 // (-(-max(registers, 1) // 8) * 8)) * 4  # of 4 SIMD
    blocks = min(waves // warps, 65536 // max(shared, 1))
    return {
        "registers": registers,
        "spills": number("vgpr_spill_count") + number("sgpr_spill_count"),
        "lanes": number("sgpr_spill_count"),  # of the spills: to lanes of vector registers, not to memory
        "stack": number("private_segment_fixed_size"),
        "tensor_core": _count(r"\bv_mfma", code),
        "loads": _count(r"\b(global|buffer|flat)_load", code),
        "loads_128": _count(r"\b(global|buffer)_load_dwordx4", code),
        "stores": _count(r"\b(global|buffer|flat)_store", code),
        "stores_128": _count(r"\b(global|buffer)_store_dwordx4", code),
        "atomics": _count(r"_atomic_", code),
        "occupancy": blocks * warps / 32,
    }


def _output(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return done.stdout + done.stderr


def _count(pattern: str, text: str) -> int:
    return len(re.findall(pattern, text))
