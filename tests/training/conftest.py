"""Fixtures of the tests of training; a module or a test asks for them by `usefixtures`."""

import pytest

from fvae_kernels.training import warn
from tests.helpers.total_loss import fix_noise


@pytest.fixture
def fixed_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    """Noise that depends only on the position in the batch."""
    fix_noise(monkeypatch)


@pytest.fixture
def nothing_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """Warnings that are said once have not been said yet."""
    monkeypatch.setattr(warn, "said", set())
