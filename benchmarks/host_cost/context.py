"""Host time of what surrounds the adapters in training: hooks, masks, terms that wait for a loss. No kernels run.

`python -m benchmarks.host_cost.context` prints microseconds for each forward and for each adapted layer. The same model
runs with and without its context in turn; its adapters are stubs, so that all that differs is the context.
"""

import gc
import time
import types
from typing import Any

import peft
import torch
from torch import Tensor, nn

import fvae_kernels as fk
from fvae_kernels.peft import FVAELoraLinear
from fvae_kernels.reference import Terms
from fvae_kernels.training.hooks import remove_hooks

FEW, MANY = 4, 24  # blocks of two layers
SKIPPED, QUANTILE = 20, 5  # first steps; the fastest fifth counts, since others share the machine


class Both(torch.autograd.Function):
    """A layer's output and its loss, without computing them. The backward asks for the loss's gradient."""

    @staticmethod
    def forward(ctx: Any, base: Tensor, gradient: Any) -> tuple[Tensor, Tensor, Tensor]:
        """Copies of `base`, and zeros."""
        ctx.gradient = gradient
        ctx.set_materialize_grads(False)
        terms = base.new_zeros(4)
        ctx.mark_non_differentiable(terms)
        return base.clone(), terms[0].clone(), terms

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor, None]:
        """Pass the gradient on."""
        if ctx.gradient is not None:
            ctx.gradient(grad.new_tensor)
        return grad, None


class Stub(nn.Module):
    """In place of an FVAEAdapter."""

    def __init__(self, config: fk.FVAEConfig) -> None:
        super().__init__()
        self.config = config

    def trained(self) -> bool:
        """As a trained adapter."""
        return True

    def planned(self, x: Tensor, base: Tensor, mask: Tensor | None, gradient: Any) -> tuple[Tensor, Terms]:
        """As a planned step."""
        y, loss, terms = Both.apply(base, gradient)
        return y, Terms(loss, *terms.unbind()[1:])


class Block(nn.Module):
    """Two linear layers, and a mask as blocks of transformers get one."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.v = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return x + self.q(x) + self.v(x)


class Net(nn.Module):
    """Blocks, and a loss from labels."""

    def __init__(self, blocks: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(blocks))

    def forward(self, x: Tensor, attention_mask: Tensor, labels: Tensor) -> dict[str, Tensor]:
        for block in self.blocks:
            x = block(x, attention_mask)
        return {"loss": (x - labels).square().mean(), "logits": x}


def without_context(layer: Any, x: Tensor) -> Tensor:
    """The forward of a layer that calls its adapter and forgets the terms."""
    y: Tensor = layer.base_layer(x)
    for name in layer.active_adapters:
        y, _ = layer.fvae_adapter[name].planned(x, y, None, None)
    return y


def model_of(blocks: int, context: bool) -> nn.Module:
    """A model with stubs, with or without the context."""
    config = fk.FVAELoraConfig(target_modules=["q", "v"], r=2)
    model: Any = peft.get_peft_model(Net(blocks), config).train()
    for layer in model.modules():
        if isinstance(layer, FVAELoraLinear):
            layer.fvae_adapter["default"] = Stub(config.to_fvae_config())
            if not context:
                layer.forward = types.MethodType(without_context, layer)  # type: ignore[method-assign]
    if not context:
        remove_hooks(model.base_model.model)
    return model


def step(model: nn.Module) -> tuple[float, float]:
    """CPU time of this thread for a forward and a backward, in microseconds."""
    x, mask = torch.zeros(2, 3, 4, requires_grad=True), torch.ones(2, 3, dtype=torch.long)
    began = time.thread_time()
    loss = model(x, attention_mask=mask, labels=x.detach())["loss"]
    between = time.thread_time()
    loss.backward()
    return 1e6 * (between - began), 1e6 * (time.thread_time() - between)


def context_of(blocks: int, steps: int) -> list[float]:
    """Microseconds of the context in a forward and in a backward."""
    models = [model_of(blocks, context) for context in (True, False)]
    gc.collect()
    gc.disable()
    try:
        times = [[step(model) for model in models] for _ in range(steps + SKIPPED)][SKIPPED:]
    finally:
        gc.enable()

    def fast(which: int, part: int) -> float:
        return sorted(both[which][part] for both in times)[len(times) // QUANTILE]

    return [fast(0, part) - fast(1, part) for part in (0, 1)]


def measured(steps: int = 300) -> dict[str, dict[str, float]]:
    """Microseconds of a forward and of a backward: for each adapted layer, and once for each forward of the model."""
    few, many = context_of(FEW, steps), context_of(MANY, steps)
    found = {}
    for part, name in enumerate(("forward", "backward")):
        layer = (many[part] - few[part]) / (2 * (MANY - FEW))
        found[name] = {"a layer": layer, "once": few[part] - 2 * FEW * layer}
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    for name, values in measured().items():
        print(f"{name}: {values['a layer']:.1f} us for each adapted layer, {values['once']:.0f} us once")
