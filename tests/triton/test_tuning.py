"""fk.tuning: an override changes the launches of its kernel and of no other; invalid ones are refused."""

import os
import re

import pytest
import torch

import fvae_kernels as fk
from fvae_kernels import tuning
from fvae_kernels.ops._backend import interpreting

pytest.importorskip("triton")
if interpreting():
    pytest.skip("records launches of kernels that are not interpreted", allow_module_level=True)
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

from triton.runtime.jit import JITFunction

from fvae_kernels._triton import _common, tables
from fvae_kernels._triton.launchers import FIXED, LAUNCHERS
from tests import ROOT
from tests.tools.triton.compile_all import calls, layer_calls
from tests.tools.triton.gpu_compile import compiling


@pytest.fixture
def launched(monkeypatch):
    """A function that launches every kernel without running it, and returns the launch options."""

    def launch():
        found = {}

        def run(kernel, *args, grid, warmup, **options):
            found[kernel.__name__.removesuffix("_kernel")] = options

        with compiling("sm_90"), monkeypatch.context() as patch:
            patch.setattr(JITFunction, "run", run)
            for name, arguments in (*calls(100, torch.float32), *layer_calls(100, torch.float32)):
                LAUNCHERS[name](*arguments)
        return found

    yield launch
    _common.OVERRIDES.clear()


def test_every_kernel_with_a_table_can_be_told(launched):
    before = launched()
    assert set(before) == {*tuning.kernels(), *FIXED}
    for name, options in tuning.kernels().items():
        assert options[0].startswith("BLOCK_"), name
        block = next(o for o in options if o.startswith("BLOCK_"))
        with tuning.override(name, **{block: 16, "num_warps": 2, "num_stages": 5}):
            now = launched()
        assert now.pop(name) == before[name] | {block: 16, "num_warps": 2, "num_stages": 5}, name
        assert now == {other: before[other] for other in now}, name
    assert launched() == before


def test_every_product_has_16_inner_entries():
    """Triton before 3.9 asks for that many in every dtype. layer_grads sums over tokens, all others over features."""
    for kernel, table in (*tables.LAYER.items(), *tables.AMD.items()):
        for key, row in table.items():
            inner = (row.D, row.K, row.N) if kernel == "layer_grads" else (row.D, row.K)
            assert min(inner) >= 16, (kernel, key)


def test_an_override_stays_until_it_is_taken_back(launched):
    before = launched()
    fk.tuning.override("encode_fwd", num_warps=8)
    assert launched()["encode_fwd"] == before["encode_fwd"] | {"num_warps": 8}
    with fk.tuning.override("encode_fwd", num_warps=2):
        assert launched()["encode_fwd"]["num_warps"] == 2
        with fk.tuning.override("encode_fwd"):
            assert launched() == before
    assert launched()["encode_fwd"]["num_warps"] == 8
    fk.tuning.override("encode_fwd")
    assert launched() == before


def test_the_page_shows_how(launched, capsys):
    before = launched()
    page = (ROOT / "docs" / "gpu.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    exec(compile(code, "docs/gpu.md", "exec"), {})
    assert "'encode_fwd': ('BLOCK_N', 'BLOCK_D', 'BLOCK_R', 'num_warps', 'num_stages')" in capsys.readouterr().out
    assert launched() == before


@pytest.mark.parametrize(
    ("kernel", "options", "said"),
    [
        ("encode", {}, "there is no kernel 'encode' with a table; expected one of .*encode_fwd"),
        ("reduce", {"num_warps": 4}, "there is no kernel 'reduce' with a table"),
        ("encode_fwd", {"BLOCK_H": 16}, "encode_fwd has no option 'BLOCK_H'; expected one of BLOCK_N, BLOCK_D"),
        ("encode_fwd", {"BLOCK_N": 24}, "encode_fwd: BLOCK_N=24; expected a power of two, at least 16"),
        ("encode_fwd", {"BLOCK_N": 8}, "expected a power of two, at least 16"),
        ("encode_fwd", {"num_warps": 3}, "num_warps=3; expected one of 1, 2, 4"),
        ("encode_fwd", {"num_stages": 0}, "num_stages=0; expected a whole number, at least 1"),
        ("encode_fwd", {"num_stages": True}, "num_stages=True; expected"),
    ],
)
def test_what_cannot_be_is_refused(kernel, options, said):
    with pytest.raises(ValueError, match=said):
        tuning.override(kernel, **options)
    assert _common.OVERRIDES == {}


def test_without_triton_it_says_so(monkeypatch):
    monkeypatch.setattr(tuning._raw, "load", lambda backend: "No module named 'triton'")
    with pytest.raises(fk.BackendUnavailable, match="do not load: No module named 'triton'"):
        tuning.kernels()
