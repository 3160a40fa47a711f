"""Precisions of a training step, and tiny models in them."""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import peft
import torch
from torch import Tensor, nn

import fvae_kernels as fk
from fvae_kernels.nn.adapter import FVAEAdapter
from tests.helpers.recipe import SMALL_NETWORKS
from tests.helpers.tiny_models import TARGETS, batch, build

OPTIONS = {**SMALL_NETWORKS, "kl_weight": 2.0, "loss_weight": 0.05}
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16


@dataclass(frozen=True)
class Setting:
    """Dtypes of the base model, its adapters and autocast, and the first loss scale."""

    base: torch.dtype = F32
    adapter: torch.dtype = F32
    autocast: torch.dtype | None = None
    scale: float | None = None

    def precision(self) -> AbstractContextManager[None]:
        return nullcontext() if self.autocast is None else torch.autocast("cpu", self.autocast)


def adapted(style: str, setting: Setting) -> nn.Module:
    """A tiny BERT through PEFT, or a tiny ViT without it, with random adapters that change the output."""
    torch.manual_seed(0)
    if style == "peft":
        config = fk.FVAELoraConfig(task_type="SEQ_CLS", r=3, target_modules=TARGETS["bert"], **OPTIONS)
        model = peft.get_peft_model(build("bert").to(setting.base), config)
    else:
        model = build("vit").to(setting.base)
        names = [n for n in TARGETS["vit"] if any(name.endswith(f".{n}") for name, _ in model.named_modules())]
        fk.replace_linears(model, fk.FVAEConfig(rank=3, **OPTIONS), target_modules=names)
    for adapter in (module for module in model.modules() if isinstance(module, FVAEAdapter)):
        for name, parameter in adapter.named_parameters():
            nn.init.normal_(parameter, std=0.2) if name != "decoder_scale" else nn.init.ones_(parameter)
        adapter.to(setting.adapter)
    return model.train()


def inputs_for(style: str, dtype: torch.dtype) -> dict[str, Tensor]:
    return batch("bert" if style == "peft" else "vit", dtype=dtype)
