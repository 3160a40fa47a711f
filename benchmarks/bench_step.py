"""One training step of real architectures, random weights: forward, backward, AdamW on the adapter."""

from functools import lru_cache

import pytest
from torch import nn

from . import models
from .conftest import Measure
from .experiments import DEFAULT, checked_steps
from .models import CASES, Batch
from .sides import names


def sides_of(case: str) -> list[object]:
    """Names of the sides. Compiling a whole stack takes minutes: only with --full."""
    late = {} if case in DEFAULT.compiled_models else {"compiled": [pytest.mark.full]}
    return [pytest.param(case, name, marks=late.get(name, [])) for name in names()]


@lru_cache(maxsize=1)
def built(case: str) -> tuple[nn.Module, Batch]:
    return models.build(CASES[case])


@pytest.mark.timeout(1800)
@pytest.mark.parametrize(("case", "side"), [one for case in CASES for one in sides_of(case)])
def bench_step(measure: Measure, case: str, side: str) -> None:
    found = checked_steps(*built(case), (side,))[side]
    measure(f"step {CASES[case].title} float32", found.run, found.cost())
