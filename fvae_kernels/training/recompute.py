"""Activation checkpointing: a layer that is recomputed in a backward repeats its own call of the forward.

The outputs of a forward, and of each block in it, lead a backward to the calls that may be recomputed from there
(`Region`). A layer takes its own call from these, with its mask and its generator state. So the noise is the same with
``preserve_rng_state=False`` too.
"""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

from . import warn
from .calls import Call, LayerKey
from .forward import region

RECOMPUTED_TWICE = (
    "a layer that a forward calls more than once is recomputed with another state of the random number "
    "generator (preserve_rng_state=False), and nothing tells which of its calls this is: its noise, and so its "
    "gradient, may be another call's. Leave preserve_rng_state=True, or use_reentrant=False."
)


def in_backward() -> bool:
    """True if the autograd engine runs on this thread."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def inside_checkpoint() -> bool:
    """True if saved-tensor hooks are active now, as in a non-reentrant checkpoint."""
    return torch._C._autograd._top_saved_tensors_default_hooks(True) is not None


def generator_state(device: torch.device) -> Tensor | None:
    """The state of torch's generator on `device`; None while a CUDA graph is captured."""
    if device.type == "cpu":
        return torch.get_rng_state()
    if device.type != "cuda" or torch.cuda.is_current_stream_capturing():
        return None
    return torch.cuda.get_rng_state(device)


def repeated_call(key: LayerKey, device: torch.device) -> Call | None:
    """The call of the layer `key` that is being recomputed; None if this is a new call."""
    if not in_backward():
        return None
    found = region()
    if found is None:
        return None
    forward, start, end = found
    calls = [call for call in forward.calls[start:end] if call.key is key and call.checkpointed]
    if len(calls) > 1:
        now = generator_state(device)
        same = [call for call in calls if now is not None and call.noise is not None and torch.equal(now, call.noise)]
        if not same:
            warn.once("recomputed twice", RECOMPUTED_TWICE)
        calls = same or calls
    return calls[0] if calls else None


@contextlib.contextmanager
def noise_of(call: Call, device: torch.device) -> Iterator[None]:
    """In this context the generator has its state of that call; afterwards, its present one."""
    now = generator_state(device)
    if now is None or call.noise is None or torch.equal(now, call.noise):
        yield
        return
    restore = torch.set_rng_state if device.type == "cpu" else lambda state: torch.cuda.set_rng_state(state, device)
    restore(call.noise)
    try:
        yield
    finally:
        restore(now)
