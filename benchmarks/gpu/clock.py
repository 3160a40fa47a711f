"""Three times of a call: eager, device only (replayed as a CUDA graph), and host only."""

import time
from collections.abc import Callable
from typing import Any

import torch

from ..stats import median
from .case import Found, Plan

Run = Callable[[], Any]


def milliseconds(plan: Plan, run: Run) -> float:
    """Median on the GPU, the L2 cache cleared before each call. A dry run calls once and says 1."""
    if plan.dry:
        run()
        return 1.0
    from triton.testing import do_bench

    return float(do_bench(run, return_mode="median"))


def times(plan: Plan, run: Run) -> Found:
    """``ms`` of the call, ``graph_ms`` of its replay, ``host_ms`` until it returns, ``peak_mb`` of extra memory.

    A call that cannot be captured has ``graph_error`` instead of ``graph_ms``.
    """
    found: Found = {"ms": milliseconds(plan, run), "host_ms": _host(plan, run), "peak_mb": _peak(plan, run)}
    try:
        found["graph_ms"] = milliseconds(plan, captured(plan, run))
    except Exception as error:
        found["graph_error"] = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    return found


def captured(plan: Plan, run: Run) -> Run:
    """The replay of `run` as a CUDA graph; `run` itself in a dry run."""
    if plan.dry:
        return run
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def _host(plan: Plan, run: Run) -> float:
    if plan.dry:
        return 1.0
    found = []
    for _ in range(20):
        torch.cuda.synchronize()  # empty the queue; one call does not fill it
        start = time.perf_counter()
        run()
        found.append(1e3 * (time.perf_counter() - start))
    torch.cuda.synchronize()
    return median(found)


def _peak(plan: Plan, run: Run) -> float:
    if plan.dry:
        return 1.0
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 1e6
