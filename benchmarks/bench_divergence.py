"""divergence: KL and Gamma, forward and backward. PEFT has no such part."""

from typing import Any

import pytest
import torch

from .conftest import Measure
from .experiments import checked_op, op_names

OP = "divergence"
SIZES = [{"R": 16}, pytest.param({"R": 64}, marks=pytest.mark.full)]


@pytest.mark.parametrize("side", op_names(OP))
@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.full)], ids=str)
@pytest.mark.parametrize("N", [1576, pytest.param(65536, marks=pytest.mark.full)])
@pytest.mark.parametrize("size", SIZES, ids=str)
def bench_divergence(measure: Measure, size: dict[str, Any], N: int, dtype: torch.dtype, side: str) -> None:
    run, cost = checked_op(OP, side, N, size, dtype)
    measure(f"{OP} N={N} {size} {dtype}", run, cost)
