"""The Triton kernels compiled for GPUs that need not be there: what the compiler made of them.

Here each kernel is compiled once or twice for each target; ``python -m tests.triton_tools.compile_all`` prints every
entry of the tables.
"""

import os

import pytest
import torch

from fvae_kernels._backend import interpreting

pytest.importorskip("triton")
if interpreting():
    pytest.skip("interpreted kernels do not compile", allow_module_level=True)
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

from triton_tools.compile_all import calls, compiled, layer_calls
from triton_tools.gpu_compile import TARGETS, compiling, metrics

from fvae_kernels._triton import LAUNCHERS

LAYER = {"layer_fwd_kernel", "layer_bwd_kernel", "layer_grads_kernel"}
PRODUCTS = {
    *("encode_fwd", "reconstruct_fwd", "reconstruct_bwd_tokens", "reconstruct_bwd_features"),
    *(name.removesuffix("_kernel") for name in LAYER),
}


CASES = [
    *((target, "many", torch.bfloat16) for target in TARGETS),
    ("sm_90", "few", torch.float32),
    ("gfx942", "few", torch.float32),
]


@pytest.mark.parametrize(("target", "size", "dtype"), CASES, ids=str)
def test_what_the_compiler_made(target, size, dtype):
    kernels = list(compiled(target, size, dtype))
    assert len({k["kernel"] for k in kernels}) == 10
    assert_good(kernels, target, dtype)


@pytest.mark.parametrize(("target", "dtype"), [("sm_90", torch.float32), ("sm_80", torch.bfloat16)], ids=str)
def test_what_the_compiler_made_of_the_layer(target, dtype):
    kernels = list(compiled(target, "few", dtype, layer_calls))
    assert {k["kernel"] for k in kernels} == {*LAYER, "layer_mean_kernel", "layer_reduce_kernel"}
    assert_good(kernels, target, dtype)


def assert_good(kernels, target, dtype):
    for kernel in kernels:
        name = kernel["kernel"].removesuffix("_kernel")
        assert kernel["spills"] == 0, kernel
        assert kernel["atomics"] == 0, kernel
        assert kernel["shared"] <= (64 if target == "gfx942" else 99) * 1024, kernel
        assert kernel["occupancy"] >= 0.125, kernel
        if name in PRODUCTS:
            wide = 5 if kernel["kernel"] in LAYER else 3  # the layer's tiles of 16 bits are narrow: all fits registers
            assert wide * kernel["loads_128"] >= kernel["loads"], kernel
            assert kernel["tensor_core"] > 0 or dtype == torch.float32, kernel


@pytest.mark.parametrize(
    ("N", "D", "R", "H", "bare"), [(1, 1, 1, 1, True), (33, 17, 3, 300, True), (1, 1, 1, 1, False)]
)
def test_awkward_sizes_compile(N, D, R, H, bare):
    """Sizes and strides of 1 become constants, and None too: other code than that of common sizes."""
    with compiling("sm_90") as kernels:
        for name, arguments in calls(N, torch.float16, D, R, H, bare):
            LAUNCHERS[name](*arguments)
    assert len(kernels) == (10 if bare else 11)


def test_a_bare_layer_compiles():
    """Linear encoders, no bias, no hidden layer, no base, noise that is given."""
    with compiling("sm_90") as kernels:
        for name, arguments in layer_calls(33, torch.float16, 17, 3, bare=True):
            LAUNCHERS[name](*arguments)
    assert [k.metadata.name for k in kernels] == [
        *("layer_fwd_kernel", "layer_mean_kernel", "layer_bwd_kernel", "layer_grads_kernel", "layer_reduce_kernel")
    ]


@pytest.fixture
def _tf32():
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


@pytest.mark.usefixtures("_tf32")
def test_tf32_is_used_where_pytorch_allows_it():
    name, arguments = next(calls(1576, torch.float32))
    with compiling("sm_90") as kernels:
        LAUNCHERS[name](*arguments)
    assert metrics(kernels[0])["tensor_core"] > 0
