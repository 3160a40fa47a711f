"""The one thing that pyproject.toml cannot say: the C++ extension, compiled where a compiler is found."""

from setuptools import setup
from torch.utils.cpp_extension import BuildExtension, CppExtension

kernels = CppExtension(
    "fvae_kernels._C",
    sources=["csrc/module.cpp", "csrc/divergence.cpp"],
    depends=["csrc/common.h"],
    extra_compile_args=["-O3", "-std=c++17", "-fvisibility=hidden", "-g0"],
    optional=True,  # without a compiler the package installs and says that "cpp" is missing
)

# optional=True is honoured by setuptools' own build steps alone, not by ninja's.
setup(ext_modules=[kernels], cmdclass={"build_ext": BuildExtension.with_options(use_ninja=False)})
