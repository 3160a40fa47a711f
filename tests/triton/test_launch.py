"""The straight road of a launch: what it is given, and when Triton's own road is taken instead. Nothing runs."""

import pytest

from fvae_kernels.ops._backend import interpreting

pytest.importorskip("triton")
if interpreting():
    pytest.skip("interpreted kernels have one road", allow_module_level=True)

from triton import knobs

from fvae_kernels._triton.ahead import active
from fvae_kernels._triton.layer.launch import Launch, why_general
from tests.tools.triton.gpu_compile import TARGETS


class Kernel:
    """Stands for a kernel of Triton's, and for what it compiles to."""

    function, packed_metadata = "function", "metadata"

    def __init__(self):
        self.general, self.straight = [], []

    def __getitem__(self, grid):
        def call(*arguments, **options):
            self.general.append((grid, arguments, options))
            return self

        return call

    def run(self, *arguments):
        self.straight.append(arguments)


@pytest.fixture
def kernel():
    return Kernel()


@pytest.fixture
def launched(kernel):
    return Launch(kernel, {"S": "sizes", "BLOCK_N": 16}, num_warps=4, num_stages=2)


def test_the_first_call_compiles_and_the_next_goes_straight(kernel, launched):
    launched((3, 2), ("x", 1), "key", stream=7)
    launched((5, 2), ("y", 1), "key", stream=7)
    assert kernel.general == [((3, 2), ("x", 1), {"S": "sizes", "BLOCK_N": 16, "num_warps": 4, "num_stages": 2})]
    assert kernel.straight == [(5, 2, 1, 7, "function", "metadata", None, None, None, "y", 1, "sizes", 16)]


def test_another_key_compiles_anew(kernel, launched):
    for key in ("float32", "bfloat16", "float32"):
        launched((1, 1), ("x",), key, stream=0)
    assert (len(kernel.general), len(kernel.straight)) == (2, 1)


def test_without_a_stream_the_road_is_tritons_and_nothing_is_kept(kernel, launched):
    for _ in range(2):
        launched((1, 1), ("x",), "key", stream=None)
    assert (len(kernel.general), len(kernel.straight)) == (2, 0)
    assert launched.compiled == {}


@pytest.fixture
def _cuda():
    with active(TARGETS["sm_90"]):
        yield


@pytest.mark.usefixtures("_cuda")
def test_a_launch_hook_takes_tritons_road():
    assert why_general() is None

    def hook(_):
        pass

    for hooks in (knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook):
        hooks.add(hook)
        try:
            assert why_general() == "a launch hook is set, as profilers do"
        finally:
            hooks.remove(hook)
    assert why_general() is None


@pytest.mark.usefixtures("_cuda")
def test_debugging_takes_tritons_road(monkeypatch):
    monkeypatch.setattr(knobs.runtime, "debug", True)
    assert why_general() == "Triton's debugging is on"


def test_amd_takes_tritons_road():
    with active(TARGETS["gfx942"]):
        assert why_general() == "the target is hip"
