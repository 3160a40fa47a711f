"""Which backend runs: a named one runs or raises, otherwise the documented order holds."""

import subprocess
import sys

import pytest
import torch

import fvae_kernels as fk
from fvae_kernels import testing
from fvae_kernels.ops import _backend
from fvae_kernels.ops._backend import BackendUnavailable, resolve

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
OPS = ("encode", "divergence", "reconstruct")


@pytest.fixture(autouse=True)
def _undo():
    yield
    fk.use_backend(None)
    for cached in (_backend.why_missing, _backend._obstacle, _backend._say_once):
        cached.cache_clear()


def pretend(monkeypatch, reasons):
    """Backends with a reason are missing; the others can run every op except "layer", on their own device."""
    devices = {"cpp": "cpu", "triton": "cuda"}
    monkeypatch.setattr(_backend, "why_missing", reasons.get)
    monkeypatch.setattr(
        _backend._raw,
        "implemented",
        lambda backend, device: [f"{op}_fwd" for op in OPS] if devices[backend] == device else [],
    )
    _backend._obstacle.cache_clear()


def test_reference_is_always_available():
    assert fk.available_backends()[-1] == "reference"
    assert set(fk.available_backends()) <= {"triton", "cpp", "reference"}


def test_unnamed_takes_the_kernel_of_the_device(monkeypatch):
    pretend(monkeypatch, {})
    assert [resolve("encode", device) for device in (CPU, CUDA)] == ["cpp", "triton"]
    assert [resolve("layer", device) for device in (CPU, CUDA)] == ["reference"] * 2
    assert resolve("encode", torch.device("meta")) == "reference"


def test_unnamed_takes_the_reference_where_there_is_no_kernel(monkeypatch):
    pretend(monkeypatch, {"cpp": "no compiler", "triton": "no GPU"})
    with pytest.warns(RuntimeWarning, match=r"plain PyTorch.*: no ") as said:
        assert [resolve(op, device) for op in OPS for device in (CPU, CUDA)] == ["reference"] * 6
    assert len(said) == 2  # once for each reason, not at every call


@pytest.mark.parametrize("op", OPS)
def test_named_reference_always_runs(op):
    assert resolve(op, CPU, "reference") == resolve("layer", CUDA, "reference") == "reference"


def test_named_and_missing_raises(monkeypatch):
    pretend(monkeypatch, {"cpp": "no compiler; get one"})
    text = r"backend 'cpp' was asked for to run encode, but cannot: no compiler; get one. Available here: .*'reference'"
    with pytest.raises(BackendUnavailable, match=text):
        resolve("encode", CPU, "cpp")


def test_named_without_a_kernel_for_the_op_raises(monkeypatch):
    pretend(monkeypatch, {})
    with pytest.raises(
        BackendUnavailable,
        match=r"'cpp' was asked for to run layer, but cannot: the installed kernels have no layer.*install.*again",
    ):
        resolve("layer", CPU, "cpp")


def test_named_on_the_wrong_device_raises(monkeypatch):
    pretend(monkeypatch, {})
    with pytest.raises(
        BackendUnavailable, match=r"runs on cpu tensors, these are on cuda; move them with .to\('cpu'\)"
    ):
        resolve("encode", CUDA, "cpp")


@pytest.mark.parametrize("call", [lambda: fk.use_backend("gpu"), lambda: resolve("encode", CPU, "gpu")])
def test_unknown_name_raises(call):
    with pytest.raises(ValueError, match="no backend 'gpu': expected one of 'triton', 'cpp', 'reference', or None"):
        call()


def test_use_backend_is_a_function_and_a_context_manager(monkeypatch):
    pretend(monkeypatch, {})
    fk.use_backend("reference")
    assert resolve("encode", CPU) == "reference"
    with fk.use_backend("cpp"):
        assert resolve("encode", CPU) == "cpp"
        assert resolve("encode", CPU, "reference") == "reference"
        with fk.use_backend(None):
            assert resolve("encode", CUDA) == "triton"
        with pytest.raises(BackendUnavailable):
            resolve("layer", CPU)
    assert resolve("encode", CPU) == "reference"


def test_use_backend_restores_after_an_error(monkeypatch):
    pretend(monkeypatch, {})
    with pytest.raises(KeyError), fk.use_backend("reference"):
        raise KeyError
    assert resolve("encode", CPU) == "cpp"


def test_use_backend_refuses_at_once(monkeypatch):
    pretend(monkeypatch, {"triton": "there is no GPU"})
    with pytest.raises(BackendUnavailable, match="'triton' was asked for, but cannot: there is no GPU"):
        fk.use_backend("triton")
    assert resolve("encode", CPU) == "cpp"


@pytest.mark.parametrize("op", OPS)
def test_ops_run_on_what_was_named(op):
    inputs = testing.INPUTS[op]()
    for backend in _backend.backends_for(op):
        with testing.Calls() as calls:
            getattr(fk, op)(**inputs, backend=backend)
        assert [n for n in calls.names if n.startswith("fvae_")] == (
            [] if backend == "reference" else [f"fvae_{backend}.{op}_fwd"]
        )


def test_compiled_code_follows_use_backend():
    inputs = testing.encode_inputs()
    compiled = torch.compile(lambda **args: fk.encode(**args), fullgraph=True, backend="eager")
    for backend in _backend.backends_for("encode"):
        with fk.use_backend(backend):
            compiled(**inputs)
            with torch.profiler.profile() as profile:
                compiled(**inputs)
        ran = {event.name for event in profile.events() if event.name.startswith("fvae_")}
        assert ran == (set() if backend == "reference" else {f"fvae_{backend}::encode_fwd"})


def test_imports_and_explains_without_the_compiled_library():
    code = """
import sys
sys.modules["fvae_kernels._C"] = None  # importing it raises ImportError
import fvae_kernels as fk, torch
from fvae_kernels import testing
assert "cpp" not in fk.available_backends()
fk.encode(**testing.encode_inputs())
try:
    fk.encode(**testing.encode_inputs(), backend="cpp")
except fk.BackendUnavailable as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "'cpp' was asked for to run encode, but cannot: the compiled library is missing" in done.stdout
    assert "install a C++ compiler and build it" in done.stdout


def test_import_leaves_the_compiler_alone():
    """torch._dynamo takes a second to import; training without torch.compile and PEFT does not need it."""
    code = "import sys; sys.modules['peft'] = None; import fvae_kernels; assert 'torch._dynamo' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
