"""Fixtures of the kernel tests. In a module that sets ``OP``, `backend` is each backend that has this op."""

import contextlib
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import settings

from fvae_kernels import testing
from fvae_kernels.ops._backend import backends_for, interpreting, why_missing
from fvae_kernels.testing import device_of
from tests.helpers.interpreter import replace_language_once_a_launch

# On a machine with a GPU: matrix products of PyTorch are deterministic, so that nothing warns under `poisoned`, and
# Trainer stays on the CPU, as its tests expect. Kernels run on the device that `device_of` gives.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
os.environ.setdefault("ACCELERATE_USE_CPU", "true")

if TYPE_CHECKING:
    from examples.assets import Assets

os.environ.setdefault("PYTEST_TIMEOUT", "1800")  # seconds, for what hangs: a slow machine may take its time

LONGEST = tuple(
    f"tests/{name}.py"
    for name in ("triton/test_interpreted", "benchmarks/test_gpu_report", "triton/test_executed", "triton/test_compile")
)

if interpreting():
    replace_language_once_a_launch()
settings.register_profile("kernels", max_examples=25, deadline=None)
settings.register_profile("interpreted", max_examples=6, deadline=None)
settings.register_profile("few", max_examples=3, deadline=None)  # where each example is compiled for a GPU
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "interpreted" if interpreting() else "kernels"))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    op = getattr(metafunc.module, "OP", None)
    if op is not None and "backend" in metafunc.fixturenames:
        names = [name for name in ("triton", "cpp", "reference") if name in backends_for(op, device_of(name))]
        metafunc.parametrize("backend", names, scope="module")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--shard", metavar="I/N", help="run every N-th of the selected tests, from the I-th on, I = 1 ... N"
    )


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "not_interpreted: too slow if Triton interprets its kernels; other cases run")
    config.addinivalue_line("markers", "compat(group, row): proves a row of the table in docs/works_with.md")
    config.addinivalue_line("markers", "timeout(seconds): of pytest-timeout, which may be missing")


@pytest.fixture(autouse=True)
def _not_interpreted(request: pytest.FixtureRequest) -> None:
    marked = request.node.get_closest_marker("not_interpreted") and "backend" in request.fixturenames
    if marked and request.getfixturevalue("backend") == "triton" and interpreting():
        pytest.skip("too slow if Triton interprets its kernels")


@pytest.hookimpl(trylast=True)  # after -k has deselected
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        item.user_properties.extend(("compat", " / ".join(mark.args)) for mark in item.iter_markers("compat"))
    if (shard := config.getoption("--shard")) is not None:
        first, step = map(int, shard.split("/"))
        items[:] = items[first - 1 :: step]
    # Each of two workers gets one half of the list: the longest come first in both, so that none is left at the end.
    longest = [item for item in items if item.nodeid.startswith(LONGEST)]
    others = [item for item in items if not item.nodeid.startswith(LONGEST)]
    middle = max(len(items) // 2 - len(longest[::2]), 0)
    items[:] = [*longest[::2], *others[:middle], *longest[1::2], *others[middle:]]


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Rows of the compatibility table that no test proved in this run, because it failed or a package is missing."""
    rows = {
        outcome: {
            row
            for report in terminalreporter.stats.get(
                outcome, []
            )  # a module that was skipped as a whole has no properties
            for _, row in getattr(report, "user_properties", ())
        }
        for outcome in ("passed", "skipped", "failed")
    }
    for row in sorted(rows["skipped"] - rows["passed"] | rows["failed"]):
        terminalreporter.write_line(f"compatibility not proved in this run: {row}")


def pytest_report_header() -> list[str]:
    missing = {name: why_missing(name) for name in ("triton", "cpp")}
    return [f"backend {name} is not tested: {reason}" for name, reason in missing.items() if reason is not None]


@pytest.fixture(scope="module")
def device(backend: str) -> str:
    return device_of(backend)


@pytest.fixture
def many(backend: str) -> Callable[[int], int]:
    """A size of many blocks: the given one, or a smaller one if Triton interprets, whose blocks are smaller."""
    return lambda size: min(size, max(size // 16, 70)) if backend == "triton" and interpreting() else size


@pytest.fixture(autouse=True)
def seed() -> int:
    """Every test starts with the same random state."""
    torch.manual_seed(0)
    return 0


@pytest.fixture(autouse=True)
def _poison(request: pytest.FixtureRequest):
    """In tests with a `backend`, uninitialised memory holds NaN."""
    if "backend" not in request.fixturenames:
        yield
        return
    interpreted = request.getfixturevalue("backend") == "triton" and interpreting()
    with testing.poisoned(), _strict() if interpreted else contextlib.nullcontext():
        yield


def _strict() -> contextlib.AbstractContextManager[None]:
    """Interpreted kernels compute as on a GPU, and their programs run in reverse order."""
    from tests.tools.triton.strict import strict

    return strict(order="reverse")


@pytest.fixture(scope="session")
def files() -> "Assets":
    """The model and the data of the demo."""
    from examples import assets

    try:
        return assets.fetch()
    except assets.AssetError as error:
        pytest.skip(f"the model and the data of the demo cannot be had: {error}")
