"""With a torch or a Triton that is too old everything runs as plain PyTorch, and one sentence says why."""

import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import fvae_kernels as fk
from fvae_kernels import testing
from fvae_kernels.ops import _backend, _raw, _versions
from tests import ROOT


@pytest.fixture(autouse=True)
def _undo() -> Iterator[None]:
    cached = (_backend.why_missing, _backend._obstacle, _backend._say_once, _raw.load)
    for function in cached:
        function.cache_clear()
    yield
    for function in cached:
        function.cache_clear()


def test_versions_are_compared_as_numbers() -> None:
    assert _versions.parsed("2.11.0+cu130") == (2, 11) > _versions.parsed("2.9.1")
    assert _versions.parsed("3.10.0.dev20260101") == (3, 10)


def test_an_old_torch_runs_as_plain_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "__version__", "2.8.0+cpu")
    assert fk.available_backends() == ("reference",)
    text = r"plain PyTorch.*: torch 2\.8\.0\+cpu is older than 2\.11, the oldest that they run with; upgrade torch"
    with pytest.warns(RuntimeWarning, match=text):
        fk.encode(**testing.encode_inputs())
    with pytest.raises(fk.BackendUnavailable, match=r"torch 2\.8\.0\+cpu is older than 2\.11"):
        fk.encode(**testing.encode_inputs(), backend="cpp")


@pytest.mark.parametrize(
    ("triton_version", "interpreting", "text"),
    [
        ("3.6.0", False, None),
        ("3.7.0", True, None),
        ("3.10.0", True, None),
        ("3.4.0", False, "Triton 3.4.0 is older than 3.6, the oldest that compiles the kernels; upgrade torch"),
        ("3.6.0", True, "Triton 3.6.0 compiles the kernels, but does not interpret them; install a Triton from 3.7"),
    ],
)
def test_tritons(monkeypatch: pytest.MonkeyPatch, triton_version: str, interpreting: bool, text: str | None) -> None:
    monkeypatch.setattr(pytest.importorskip("triton"), "__version__", triton_version)
    found = _versions.triton_obstacle(interpreting)
    assert found is None if text is None else found is not None and found.startswith(text)


@pytest.mark.parametrize("error", [ImportError("libtriton.so"), RuntimeError("an old\ndriver")], ids=repr)
def test_a_triton_that_does_not_import(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    class Broken:
        def find_spec(self, name: str, *_: Any) -> None:
            if name == "triton":
                raise error

    monkeypatch.setattr("sys.meta_path", [Broken()])
    for name in [name for name in sys.modules if name.partition(".")[0] == "triton"]:
        monkeypatch.delitem(sys.modules, name)
    assert str(error) in (_versions.triton_obstacle(False) or "")


def test_kernels_that_do_not_load(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever their module raises: an older Triton lacks what kernels are decorated with."""

    def fail(name: str) -> None:
        raise AttributeError(f"module {name} has no attribute 'gather'")

    monkeypatch.setattr(_versions, "TORCH", (0, 0))  # this test is not about torch, which may be older
    monkeypatch.setattr(_raw.importlib, "import_module", fail)
    assert _raw.load("triton") == f"AttributeError: module {_raw.MODULES['triton']} has no attribute 'gather'"
    assert fk.available_backends() == ("reference",)
    with pytest.raises(fk.BackendUnavailable, match="has no attribute 'gather'"):
        fk.use_backend("cpp")


def test_the_package_declares_what_the_kernels_need() -> None:
    page = (ROOT / "pyproject.toml").read_text()
    torch_, triton_ = (".".join(map(str, version)) for version in (_versions.TORCH, _versions.TRITON))
    assert f'dependencies = ["torch>={torch_}"]' in page
    assert f'requires = ["setuptools>=77", "torch>={torch_}"]' in page
    assert f'triton = ["triton>={triton_};' in page
