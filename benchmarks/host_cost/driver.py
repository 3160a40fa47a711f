"""Triton over a CUDA driver that does nothing. Call `load` before torch is imported: that may load a real driver."""

import ctypes
import os
import subprocess
from pathlib import Path
from typing import Any

from . import compiler

SOURCE = Path(__file__).parent / "fake_libcuda.c"
NAME = "libcuda.so.1"

compiled: list[str] = []  # kernels that Triton compiled, not finding them in its cache on disk


def load(folder: Path) -> ctypes.CDLL:
    """Build the driver in the folder and load it under the name of the real one.

    Raises:
        RuntimeError: there is no C compiler, or the library does not build.
    """
    with_compiler = compiler()
    if with_compiler is None:
        raise RuntimeError("the fake CUDA driver is built from C, and there is no compiler: install gcc or set CC")
    folder.mkdir(parents=True, exist_ok=True)
    library, fresh = folder / NAME, folder / f"{NAME}.{os.getpid()}"
    command = [with_compiler, "-shared", "-fPIC", "-O1", f"-Wl,-soname,{NAME}", str(SOURCE), "-o", str(fresh)]
    built = subprocess.run(command, capture_output=True, text=True, check=False)
    if built.returncode != 0:
        raise RuntimeError(f"{' '.join(command)} failed: {built.stderr.strip()}")
    fresh.replace(library)  # another process may be reading it
    os.environ["TRITON_LIBCUDA_PATH"] = str(folder)
    return ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)


def activate() -> type:
    """Make Triton compile for sm_90 and launch through the fake driver, with CPU tensors; returns its launcher."""
    import torch
    import triton.backends.nvidia.driver as nvidia
    from triton import knobs
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    class Launcher(nvidia.CudaLauncher):
        """Triton's own launcher, with the name of its kernel."""

        def __init__(self, source: Any, metadata: Any) -> None:
            super().__init__(source, metadata)
            self.name = metadata.name

    class FakeDriver(nvidia.CudaDriver):
        def __init__(self) -> None:
            super().__init__()
            self.launcher_cls = Launcher
            self.get_current_device = lambda: 0
            self.get_current_stream = lambda device=0: 0
            self.get_device_capability = lambda device=0: (9, 0)

        def get_current_target(self) -> Any:
            return GPUTarget("cuda", 90, 32)

        def get_active_torch_device(self) -> torch.device:
            return torch.device("cpu")

    def note(*, metadata: Any, cache_hit: bool, **_: Any) -> None:
        if not cache_hit:
            compiled.append(metadata["name"])

    knobs.compilation.listener = note
    driver.set_active(FakeDriver())
    return Launcher
