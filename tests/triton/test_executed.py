"""The compiled 16-bit products, executed on the CPU. The interpreter has no bfloat16 and cannot test them.

The op runs as usual, gradients included, except that each kernel is compiled for the target and the code of the last
stage before machine code is executed.
"""

import pytest
import torch

import fvae_kernels as fk
from fvae_kernels import testing
from fvae_kernels.ops import _backend, _raw

pytest.importorskip("triton")
pytest.importorskip("ttsem")
if _backend.interpreting():
    pytest.skip("interpreted kernels do not compile", allow_module_level=True)

import triton
import triton.language as tl
from ttsem.memory import MemoryFault

from fvae_kernels._triton import _common, _random, tables
from fvae_kernels._triton.launchers import LAUNCHERS
from tests.helpers.layer_inputs import assert_layer_no_worse, layer_inputs, plain, run_layer
from tests.tools.triton.executed import executed

INPUTS = {
    "encode": lambda dtype: testing.encode_inputs((70,), 100, 17, dtype=dtype),
    "reconstruct": lambda dtype: testing.reconstruct_inputs((70,), 100, 16, (33,), mask=True, dtype=dtype),
}
PRODUCTS = {
    "encode": {"encode_fwd_kernel"},
    "reconstruct": {
        "reconstruct_fwd_kernel",
        "reconstruct_bwd_tokens_kernel",
        "reconstruct_bwd_features_kernel",
    },
    "layer": {"layer_fwd_kernel", "layer_bwd_kernel", "layer_grads_kernel"},
}


@pytest.fixture
def _triton_on_cpu(monkeypatch):
    """Every op runs the Triton launchers, on CPU tensors."""
    library = torch.library.Library(_raw.NAMESPACES["triton"], "IMPL")
    for name, launcher in LAUNCHERS.items():
        library.impl(name, launcher, "CPU")
    monkeypatch.setattr(_backend, "_resolve", lambda op, device, name: name or "triton")
    yield
    library._destroy()


CASES = [
    *((target, "ttgir", torch.bfloat16, "many") for target in ("sm_80", "sm_90", "sm_100")),
    ("sm_90", "ttgir", torch.float16, "few"),
]
LAYER_CASES = [("sm_80", torch.bfloat16, "many", "given"), ("sm_90", torch.float16, "few", "by position")]


@pytest.mark.usefixtures("_triton_on_cpu")
@pytest.mark.parametrize(("target", "stage", "dtype", "size"), CASES, ids=str)
@pytest.mark.parametrize("op", INPUTS)
def test_compiled_products_are_no_worse_than_pytorch(op, target, stage, dtype, size, monkeypatch):
    if size == "many":  # block shapes for large inputs, on small ones, which execute quickly
        monkeypatch.setattr(_common, "FEW_TOKENS", 0)
    inputs = INPUTS[op](dtype)
    rounded, exact = testing.exact_and_rounded(op, inputs)
    with executed(target, stage) as ran:
        testing.assert_no_worse(testing.run(getattr(fk, op), inputs), rounded, exact)
    assert_multiplied(ran, op)


def assert_multiplied(ran, op):
    """The kernels with matrix products ran, with matrix instructions."""
    assert PRODUCTS[op] <= set(ran)
    assert all("nvidia_mma" in ran[name] or "tensor_memory" in ran[name] for name in PRODUCTS[op])


@triton.jit
def draw_kernel(seed_ptr, first_ptr, second_ptr, R: tl.constexpr, BLOCK: tl.constexpr):
    rows, latent = tl.arange(0, BLOCK), tl.arange(0, R)
    first, second = _random.normals(seed_ptr, rows, latent, R, tl.float32)
    tl.store(first_ptr + rows[:, None] * R + latent[None, :], first)
    tl.store(second_ptr + rows[:, None] * R + latent[None, :], second)


@pytest.mark.usefixtures("_triton_on_cpu")
@pytest.mark.parametrize(("target", "dtype", "size", "noise"), LAYER_CASES, ids=str)
def test_the_compiled_layer_is_no_worse_than_pytorch(target, dtype, size, noise, monkeypatch):
    """With given noise, and with noise from a seed; PyTorch gets the same, rounded to its dtype."""
    N, R, given = 13, 8, noise == "given"
    if size == "many":
        monkeypatch.setattr(tables, "FEW_TOKENS", 0)

    def inputs(seed):
        made = layer_inputs((N,), 24, 20, mask=True, dtype=dtype, rank=R, seed=seed)
        if not given:
            torch.manual_seed(seed)
            draws = [torch.empty(16, R) for _ in range(2)]
            with executed(target, "ttir"):
                draw_kernel[(1,)](torch.randint(2**63 - 1, ()), *draws, R, 16)
            made["noise"] = tuple(draw[:N] for draw in draws)
            torch.manual_seed(seed)
        return made

    def actual(noise, **rest):
        return run_layer(noise=noise if given else None, **rest)

    def rounded(noise, **rest):
        return plain(noise=tuple(eps.to(dtype) for eps in noise), **rest)

    with executed(target, "ttgir") as ran:
        assert_layer_no_worse(inputs, rounded, "triton", 3, actual)
    assert_multiplied(ran, "layer")


@triton.jit
def planted_kernel(to_ptr, N, BLOCK: tl.constexpr):
    entries = tl.arange(0, BLOCK)
    tl.store(to_ptr + entries, entries.to(tl.bfloat16), mask=entries <= N)


@pytest.mark.parametrize("stage", ["ttir", "ttgir"])
def test_a_store_beyond_the_end_is_seen(stage):
    with executed("sm_90", stage), pytest.raises(MemoryFault, match="unmapped address"):
        planted_kernel[(1,)](torch.empty(10, dtype=torch.bfloat16), 10, 16)


def test_what_a_kernel_stores_arrives():
    kept = torch.zeros(20, dtype=torch.bfloat16)
    with executed("sm_90", "ttir"):
        planted_kernel[(1,)](kept[3:14], 10, 16)
    assert kept.tolist() == [0.0] * 3 + list(range(11)) + [0.0] * 6
