"""No operator of a training step waits for the device or moves data to or from it, so a CUDA graph can hold the step.

No GPU is needed: every operator of a step is inspected, for plain PyTorch on the meta device, for kernels on the CPU.
`collect_terms` waits, and is not in a step.
"""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import fvae_kernels as fk
from fvae_kernels import ops, testing
from fvae_kernels.ops._backend import backends_for
from tests.helpers.layer_inputs import layer_inputs, run_layer

OPS: dict[str, Any] = {name: getattr(ops, name) for name in testing.INPUTS} | {"layer": run_layer}
BACKENDS = [(op, name) for op in OPS for name in ("triton", "cpp", "reference") if name in backends_for(op, "cpu")]
# operators whose value or shape the host needs
WAITING = {
    *("aten._local_scalar_dense", "aten.item", "aten.is_nonzero", "aten.equal", "aten.nonzero", "aten.masked_select"),
    *("aten._unique2", "aten.unique_dim", "aten.unique_consecutive", "aten.repeat_interleave", "aten.bincount"),
}


class NoWaiting(TorchDispatchMode):
    """Raises at the first operator that waits, or whose result is on another device than its inputs."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func.overloadpacket)
        masks = [t for t in tree_leaves(args[1:]) if isinstance(t, Tensor) and t.dtype in (torch.bool, torch.uint8)]
        if name in WAITING or (name.startswith("aten.index") and masks):
            raise RuntimeError(f"{name} waits for the device")
        result = func(*args, **(kwargs or {}))
        before, after = ({t.device for t in tree_leaves(x) if isinstance(t, Tensor)} for x in ((args, kwargs), result))
        if before and not after <= before:
            raise RuntimeError(f"{name} moves data from {before} to {after}")
        return result


@pytest.mark.parametrize(("op", "backend"), BACKENDS)
def test_ops(op: str, backend: str) -> None:
    inputs = layer_inputs(mask=True) if op == "layer" else testing.INPUTS[op]()
    with NoWaiting():
        results = testing.run(OPS[op], inputs, backend=backend)
    assert any("grad" in name for name in results) == (op != "geometry"), "it alone has no backward"


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_training_steps(device: str) -> None:
    net = nn.Sequential(nn.Linear(24, 32, device=device), nn.ReLU(), nn.Linear(32, 3, device=device))
    fk.replace_linears(net, fk.FVAEConfig.preset("paper", rank=3), target_modules=["0", "2"])
    x, labels = torch.randn(5, 24, device=device), torch.randn(5, 3, device=device)
    with NoWaiting():
        for _ in range(2):
            loss = fk.attach_aux_loss(net, (net(x) - labels).square().mean())
            (loss / 2).backward()
    assert all(p.grad is not None for p in net.parameters() if p.requires_grad)


def waits(x: Tensor) -> Any:
    return x.sum().item()


def selects(x: Tensor) -> Any:
    return x[x > 0]


def sends(x: Tensor) -> Any:
    return x + torch.ones(3).to(x.device)


@pytest.mark.parametrize(
    ("how", "device"), [(waits, "cpu"), (selects, "cpu"), (waits, "meta"), (selects, "meta"), (sends, "meta")]
)
def test_waiting_is_seen(how: Any, device: str) -> None:
    with NoWaiting(), pytest.raises(RuntimeError, match=r"waits for the device|moves data"):
        how(torch.randn(3, device=device))
