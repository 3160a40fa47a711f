"""Everything that depends on the package's internals: where launchers are registered, and where parts begin."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch

Function = Callable[..., Any]
Wrap = Callable[[str, Function], Function]

OUTSIDE = "outside: the base layer, PyTorch's engine, gradients of leaves"
LAYER = "PEFT layer and auxiliary loss"
ADAPTER = "adapter"
CHECKS = "whether the plan fits"
NODE = "node of autograd"
LAUNCHER = "our launchers"
JIT = "Triton's JITFunction.run"
LAUNCH = "Triton's launches"
PARTS = (OUTSIDE, LAYER, ADAPTER, CHECKS, NODE, LAUNCHER, JIT, LAUNCH)


@contextlib.contextmanager
def pretending(wrap: Wrap = lambda part, function: function) -> Iterator[None]:
    """In this context our Triton launchers take CPU tensors, each wrapped as the part `LAUNCHER`."""
    from fvae_kernels._triton import launchers
    from fvae_kernels.ops import _backend, _raw

    library = torch.library.Library(_raw.NAMESPACES["triton"], "IMPL")
    for name, launcher in launchers.LAUNCHERS.items():
        library.impl(name, wrap(LAUNCHER, launchers._on_its_device(launcher)), "CPU")
    missing, _backend._triton_missing = _backend._triton_missing, lambda: None
    _forget(_backend)
    try:
        yield
    finally:
        library._destroy()
        _backend._triton_missing = missing
        _forget(_backend)


def _forget(backend: Any) -> None:
    backend.why_missing.cache_clear()
    backend._obstacle.cache_clear()


def entrances(launcher: type) -> Iterator[tuple[str, Any, str]]:
    """Part, owner and attribute of every function where a part begins; `launcher` is the fake driver's."""
    from triton.runtime.jit import JITFunction

    from fvae_kernels._triton.layer import plan as steps
    from fvae_kernels.nn import adapter
    from fvae_kernels.ops import _layer_plan as plan
    from fvae_kernels.peft.layer import FVAELoraLinear
    from fvae_kernels.training import aux_loss

    yield OUTSIDE, torch.nn.Linear, "forward"
    yield LAYER, FVAELoraLinear, "forward"
    yield LAYER, aux_loss.InjectAuxLoss, "backward"
    yield ADAPTER, adapter.FVAEAdapter, "planned"
    yield CHECKS, plan.Plans, "fitting"
    yield NODE, plan, "run_step"
    yield NODE, plan.Step, "forward"
    yield NODE, plan.Step, "backward"
    yield LAUNCHER, steps.TritonSteps, "forward"
    yield LAUNCHER, steps.TritonSteps, "backward"
    yield JIT, JITFunction, "run"
    yield LAUNCH, launcher, "__call__"
