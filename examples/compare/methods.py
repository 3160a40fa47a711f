"""Methods by name: a PEFT config for a task."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import peft
import torch
from torch import nn

import fvae_kernels as fk
from fvae_kernels.training.aux_loss import AuxLossLayer

from .tasks import Task

RANK, ALPHA = 16, 16.0


@dataclass(frozen=True)
class Method:
    """How a task's model is adapted, and what happens to the adapter while it trains."""

    title: str
    config: Callable[..., peft.PeftConfig]
    options: Mapping[str, Any] = field(default_factory=dict)
    exchange: float = 0.0  # share of the examples whose z_2 is exchanged for another's, see `exchange_second`
    trim_to: int | None = None  # rank to which the adapter is trimmed after half of the steps

    def adapt(self, model: nn.Module, task: Task, steps: int = 0) -> Any:
        """`model` with adapters, in training mode, for so many `steps`. In place."""
        placement = {"target_modules": targets(model, task), **task.placement.options}
        config = self.config(**placement, **self.options)
        if isinstance(
            config, peft.AdaLoraConfig
        ):  # a tenth of the steps at the first rank, the last half at the last one
            config.total_step, config.tinit, config.tfinal = max(steps, 3), max(steps, 3) // 10, max(steps, 3) // 2
        adapted = peft.get_peft_model(model, config).train()
        if self.exchange:
            exchange_second(adapted, self.exchange)
        return adapted


def exchange_second(model: nn.Module, share: float) -> None:
    """In training, some inputs of each adapted layer get the z_2 of another example of their batch.

    What the decoder makes of an input's own z_2 is replaced by what it makes of the other's; all that the decoder does
    not reconstruct stays. So the label must be learned from what z_2 does not hold.
    """

    def exchanged(layer: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
        x, *rest = args
        if not layer.training or len(x) < 2:
            return args
        chosen = (torch.rand(len(x)) < share).reshape(-1, *[1] * (x.dim() - 1)).to(x.device)
        other = x[torch.randperm(len(x)).to(x.device)]
        before, after = (fk.generate_features(layer, x, z2_of, sample=False) for z2_of in (x, other))
        return x + chosen * (after - before).to(x.dtype), *rest

    for module in model.modules():
        if isinstance(module, AuxLossLayer):
            module.register_forward_pre_hook(exchanged)  # type: ignore[attr-defined]


def targets(model: nn.Module, task: Task) -> list[str]:
    """The task's targets that this model has. Names differ between versions of transformers."""
    present = {name.rpartition(".")[2] for name, _ in model.named_modules()}
    return [name for name in task.placement.target_modules if name in present]


def _lora(rank: int = RANK, **options: Any) -> peft.PeftConfig:
    return peft.LoraConfig(r=rank, lora_alpha=rank * ALPHA / RANK, **options)


def _adalora(rank: int, **options: Any) -> peft.PeftConfig:
    """AdaLoRA from half as much rank again down to `rank` on average; its own total_step is set when it is placed."""
    budget = {"init_r": rank * 3 // 2, "target_r": rank, "lora_alpha": rank * 3 // 2, "total_step": 3, "tfinal": 1}
    return peft.AdaLoraConfig(**budget, tinit=0, deltaT=1, **options)


def _fvae(name: str = "default", **options: Any) -> peft.PeftConfig:
    return fk.FVAELoraConfig.preset(name, r=RANK, alpha=ALPHA, **options)


METHODS = {
    "lora": Method("LoRA", _lora),
    "lora-dropout": Method("LoRA, dropout 0.1", _lora, {"lora_dropout": 0.1}),
    "lora-4": Method("LoRA, rank 4", _lora, {"rank": 4}),
    "adalora-4": Method("AdaLoRA, rank 4 on average", _adalora, {"rank": 4}),
    "fvae": Method("FVAE-LoRA, the default", _fvae),
    "fvae-free": Method("FVAE-LoRA, log-variance of z₁ learned from -4", _fvae, {"logvar1_held": False}),
    "fvae-64": Method("FVAE-LoRA, decoder (64,)", _fvae, {"decoder_hidden": (64,)}),
    "fvae-128": Method("FVAE-LoRA, decoder (128, 128, 128)", _fvae, {"decoder_hidden": (128, 128, 128)}),
    "fvae-trimmed-4": Method("FVAE-LoRA, trimmed to rank 4 after half of the steps", _fvae, trim_to=4),
    "fvae-exchange": Method("FVAE-LoRA, z₂ exchanged for half of the examples", _fvae, exchange=0.5),
    "fvae-paper": Method("FVAE-LoRA, the paper's recipe", _fvae, {"name": "paper"}),
    "fvae-authors": Method("FVAE-LoRA, the authors' code", _fvae, {"name": "authors"}),
}
