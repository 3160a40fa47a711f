"""What tests of calls that the compiled library makes share."""

import pytest

from fvae_kernels.ops import _host


@pytest.fixture
def compiled_library():
    """The compiled library; without it the test is skipped."""
    library = _host.compiled()
    if library is None:
        pytest.skip("the compiled library is not built")
    return library


@pytest.fixture(params=["compiled", "PyTorch's"])
def _way(request, monkeypatch):
    """Calls go by the compiled library, or by PyTorch's from Python."""
    if request.param == "compiled":
        request.getfixturevalue("compiled_library")
    else:
        monkeypatch.setattr(_host, "compiled", lambda: None)
