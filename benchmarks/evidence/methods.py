"""Methods by name: a PEFT config for a task."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import peft
from torch import nn

import fvae_kernels as fk

from .tasks import Task

RANK, ALPHA = 16, 16.0


@dataclass(frozen=True)
class Method:
    """How a task's model is adapted."""

    title: str
    config: Callable[..., peft.PeftConfig]
    options: Mapping[str, Any] = field(default_factory=dict)

    def adapt(self, model: nn.Module, task: Task) -> Any:
        """`model` with adapters, in training mode. In place."""
        placement = {"target_modules": targets(model, task), **task.placement.options}
        return peft.get_peft_model(model, self.config(**placement, **self.options)).train()


def targets(model: nn.Module, task: Task) -> list[str]:
    """The task's targets that this model has. Names differ between versions of transformers."""
    present = {name.rpartition(".")[2] for name, _ in model.named_modules()}
    return [name for name in task.placement.target_modules if name in present]


def _lora(**options: Any) -> peft.PeftConfig:
    return peft.LoraConfig(r=RANK, lora_alpha=ALPHA, **options)


def _fvae(name: str = "default", **options: Any) -> peft.PeftConfig:
    return fk.FVAELoraConfig.preset(name, r=RANK, alpha=ALPHA, **options)


_LINEAR = {"encoder_hidden": (), "start": "lora", "logvar1_start": -4.0, "kl_weight": 3.0, "loss_weight": None}
_DECODERS: dict[str, tuple[int, ...]] = {"0": (), "64": (64,), "128": (128, 128, 128)}

METHODS = {
    "lora": Method("LoRA", _lora),
    "lora-dropout": Method("LoRA, dropout 0.1", _lora, {"lora_dropout": 0.1}),
    "default": Method("FVAE-LoRA, the default", _fvae),
    "paper": Method("FVAE-LoRA, the paper's recipe", _fvae, {"name": "paper"}),
    "authors": Method("FVAE-LoRA, the authors' code", _fvae, {"name": "authors"}),
    **{
        f"{kind}-{size}": Method(
            f"linear encoder, LoRA's start, log-variance {words}, decoder {hidden}",
            _fvae,
            {**_LINEAR, "decoder_hidden": hidden, "logvar1_held": kind == "held"},
        )
        for kind, words in (("held", "held at -4"), ("free", "from -4"))
        for size, hidden in _DECODERS.items()
    },
}
