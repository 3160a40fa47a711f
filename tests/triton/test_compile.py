"""The Triton kernels compiled for GPUs, none of which is needed: registers, spills, instructions.

Here each kernel is compiled once or twice for each target; ``python -m tests.tools.triton.compile_all`` prints every
entry of the tables.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fvae_kernels.ops import _versions
from fvae_kernels.ops._backend import interpreting
from tests import ROOT

pytest.importorskip("triton")
if interpreting():
    pytest.skip("interpreted kernels do not compile", allow_module_level=True)
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

from fvae_kernels._triton.launchers import FIXED, LAUNCHERS, tuned
from tests.tools.triton import compile_all
from tests.tools.triton.compile_all import calls, compiled, layer_calls
from tests.tools.triton.gpu_compile import TARGETS, compiling, metrics

LAYER = {"layer_fwd", "layer_bwd", "layer_grads", "layer_mean", "layer_reduce"}
PRODUCTS = {
    *("encode_fwd", "reconstruct_fwd", "reconstruct_bwd_tokens", "reconstruct_bwd_features"),
    *("layer_fwd", "layer_bwd", "layer_grads"),
}


CASES = [
    *((target, "many", torch.bfloat16) for target in TARGETS),
    ("sm_90", "few", torch.float32),
    ("gfx942", "few", torch.float32),
]


LAYER_CASES = [
    *(("sm_90", size, torch.float32) for size in ("few", "many")),
    *((target, "few", torch.bfloat16) for target in ("sm_80", "gfx942")),
    ("sm_90", "linear", torch.float32),
    ("gfx942", "linear", torch.bfloat16),
]


@pytest.mark.parametrize(("target", "size", "dtype"), CASES, ids=str)
def test_what_the_compiler_made(target, size, dtype):
    kernels = list(compiled(target, size, dtype))
    assert {k["kernel"].removesuffix("_kernel") for k in kernels} == {*tuned(), *FIXED} - LAYER
    assert_good(kernels, target, dtype)


@pytest.mark.parametrize(("target", "size", "dtype"), LAYER_CASES, ids=str)
def test_what_the_compiler_made_of_the_layer(target, size, dtype):
    kernels = list(compiled(target, size, dtype, layer_calls))
    assert {k["kernel"].removesuffix("_kernel") for k in kernels} == LAYER
    assert_good(kernels, target, dtype)


def assert_good(kernels, target, dtype):
    for kernel in kernels:
        name = kernel["kernel"].removesuffix("_kernel")
        # scalar registers of the layer's many arguments may go to lanes of vector registers; nothing goes to memory
        assert kernel["spills"] == (kernel["lanes"] if name in LAYER else 0), kernel
        assert kernel["stack"] == 0 or kernel["lanes"] == 0, kernel
        assert kernel["atomics"] == 0, kernel
        assert kernel["shared"] <= (64 if target == "gfx942" else 99) * 1024, kernel
        assert kernel["occupancy"] >= 0.125, kernel
        if name in PRODUCTS:
            # the layer's tiles of 16 bits are narrow: all fits registers
            assert kernel["share_128"] >= (1 / 5 if name in LAYER else 1 / 3), kernel
            assert kernel["tensor_core"] > 0 or dtype == torch.float32, kernel


@pytest.mark.parametrize(
    ("N", "D", "R", "H", "bare"), [(1, 1, 1, 1, True), (33, 17, 3, 300, True), (1, 1, 1, 1, False)]
)
def test_awkward_sizes_compile(N, D, R, H, bare):
    """Triton compiles sizes and strides of 1, and None, as constants: other code than for common sizes."""
    with compiling("sm_90") as kernels:
        for name, arguments in calls(N, torch.float16, D, R, H, bare):
            LAUNCHERS[name](*arguments)
    assert len({kernel.metadata.name for kernel in kernels}) == len({*tuned(), *FIXED} - LAYER)


def test_a_bare_layer_compiles():
    """Linear encoders, no bias, no hidden layer, no base, given noise."""
    with compiling("sm_90") as kernels:
        for name, arguments in layer_calls(33, torch.float16, 17, 3, bare=True):
            LAUNCHERS[name](*arguments)
    assert [k.metadata.name for k in kernels] == [
        *("layer_fwd_kernel", "layer_mean_kernel", "layer_bwd_kernel", "layer_grads_kernel", "layer_reduce_kernel")
    ]


@pytest.fixture
def _tf32():
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    yield
    torch.backends.cuda.matmul.fp32_precision = before


@pytest.mark.usefixtures("_tf32")
def test_tf32_is_used_where_pytorch_allows_it():
    name, arguments = next(calls(1576, torch.float32))
    with compiling("sm_90") as kernels:
        LAUNCHERS[name](*arguments)
    assert metrics(kernels[0])["tensor_core"] > 0


def test_the_table_is_written_and_spills_fail(tmp_path, monkeypatch, capsys):
    def rows(target, size, dtype, of):
        spills = 8 if (size, dtype, of) == ("few", torch.float32, calls) else 0
        yield dict.fromkeys(compile_all.COLUMNS, 0.125) | {"kernel": "encode_fwd_kernel", "spills": spills}

    monkeypatch.setattr(compile_all, "compiled", rows)
    out = tmp_path / "new" / "table.md"
    assert compile_all.main(["sm_80", "sm_90", "--out", str(out)]) == 1
    lines = out.read_text().splitlines()
    assert len(lines) == 2 + 2 * (3 * 2 * 2 + 2 + 2 + 1), (
        "targets, dtypes, sizes, with and without the layer, wide ones"
    )
    for column in ("registers", "shared", "spills", "occupancy", "tensor_core", "share_128"):
        assert f" {column} |" in lines[0]
    printed = capsys.readouterr().out
    assert printed.startswith(out.read_text())
    assert "\n2 kernels spill registers to memory" in printed
    with pytest.raises(SystemExit):
        compile_all.main(["sm_70"])


def test_another_triton_compiles_in_a_process_of_its_own(tmp_path, monkeypatch):
    ran = []

    def run(command, env, check):
        ran.append((command[3:], env["PYTHONPATH"].split(os.pathsep)[0]))
        return compile_all.subprocess.CompletedProcess(command, 1)

    monkeypatch.setattr(compile_all.subprocess, "run", run)
    arguments = ["sm_90", "--triton", str(tmp_path), "--dtypes", "bfloat16"]
    with pytest.raises(SystemExit, match="there is no Triton in"):
        compile_all.main(arguments)
    (tmp_path / "triton").mkdir()
    assert compile_all.main(arguments) == 1
    assert ran == [(["sm_90", "--dtypes", "bfloat16"], str(tmp_path))]


OLDEST = Path(sys.prefix) / "oldest"  # as `make` unpacks it


@pytest.mark.skipif(not (OLDEST / "triton").is_dir(), reason="the oldest Triton is not unpacked beside: make test")
def test_the_oldest_triton_compiles_a_sample():
    path = os.pathsep.join([str(OLDEST), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", "tests.tools.triton.sample"]
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert {_versions.parsed(kernel["triton"]) for kernel in found} == {_versions.TRITON}
    compiled = [(kernel["of"], kernel["kernel"].removesuffix("_kernel")) for kernel in found]
    names = ["layer_fwd", "layer_mean", "layer_bwd", "layer_grads", "layer_reduce"]
    assert compiled == [("recipe", name) for name in names[:2]] + [("bare", name) for name in names]
    assert all(kernel["spills"] == 0 for kernel in found)
    assert all(kernel["tensor_core"] > 0 for kernel in found if kernel["kernel"] == "layer_fwd_kernel")
