"""The one thing that pyproject.toml cannot say: the C++ extension, compiled where a compiler is found."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from glob import glob

import setuptools
from setuptools import setup

if int(setuptools.__version__.partition(".")[0]) < 77:  # it would call pyproject.toml invalid, and not say why
    sys.exit(
        f"fvae_kernels builds with setuptools 77 or newer, and this is {setuptools.__version__}: "
        "pip install 'setuptools>=77'"
    )

from torch.utils.cpp_extension import BuildExtension, CppExtension

OPENMP = ["-fopenmp"] if sys.platform == "linux" else []  # at::parallel_for is a header: serial without it

kernels = CppExtension(
    "fvae_kernels._C",
    sources=sorted(glob("csrc/*.cpp")),
    depends=sorted(glob("csrc/*.h")),
    extra_compile_args=["-O3", "-fvisibility=hidden", "-fno-math-errno", "-fno-trapping-math", "-g0", *OPENMP],
    extra_link_args=OPENMP,
    optional=True,  # without a compiler the package installs and says that "cpp" is missing
)


class OptionalBuild(BuildExtension):
    """optional=True is honoured by setuptools' own build steps alone: not by ninja's, nor by torch's look at CXX."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.use_ninja = False  # as an option it is refused by setuptools 77

    def build_extensions(self):
        compile_all = self.compiler.compile

        def compile_in_parallel(sources, *args, **kwargs):
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                made = list(pool.map(lambda source: compile_all([source], *args, **kwargs), sources))
            return [file for files in made for file in files]

        self.compiler.compile = compile_in_parallel
        try:
            super().build_extensions()
        except (OSError, subprocess.SubprocessError) as error:
            self.warn(f"no C++ kernels, since the compiler does not run: {error}")


setup(ext_modules=[kernels], cmdclass={"build_ext": OptionalBuild})
