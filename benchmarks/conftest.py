"""Options and fixtures of the benches."""

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from .cost import versions
from .stats import warm_up

Measure = Callable[[str, Callable[[], Any], dict[str, Any]], None]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--full", action="store_true", help="benches: more sizes, sides and rounds")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Cases marked `full` run only with --full."""
    if not config.getoption("--full"):
        skip = pytest.mark.skip(reason="runs with --full")
        for item in items:
            if any(mark.name == "full" for mark in item.iter_markers()):
                item.add_marker(skip)


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "full: a bench that runs with --full only")
    config.addinivalue_line("markers", "timeout(seconds): of pytest-timeout, which may be missing")


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    """A layer alone has no task loss; silence its warning about that."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="FVAE: the auxiliary loss")
        warnings.filterwarnings("ignore", category=FutureWarning)
        yield


@pytest.fixture
def measure(benchmark: Any, request: pytest.FixtureRequest) -> Measure:
    """Time `run` in `group` for as many rounds as fit the budget; note `extra`, versions and threads."""

    def timed(group: str, run: Callable[[], Any], extra: dict[str, Any]) -> None:
        benchmark.group = group
        benchmark.extra_info |= extra | {"threads": torch.get_num_threads(), "versions": versions()}
        budget = 10.0 if request.config.getoption("--full") else 1.0
        rounds = max(3, min(100, int(budget / max(warm_up(run), 1e-6))))
        benchmark.pedantic(run, rounds=rounds, iterations=1)

    return timed
