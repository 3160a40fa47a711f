"""A UNet of diffusers with an adapter: the gradient is that of the total loss (6), and padded text stays out of it."""

from typing import Any

import pytest

pytest.importorskip("diffusers")

import peft
import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

import fvae_kernels as fk
from tests.helpers.gradients import assert_same, grads
from tests.helpers.peft_models import SMALL
from tests.helpers.total_loss import by_hand

BLOCKS: dict[str, Any] = {
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
}
SIZES = {"sample_size": 8, "block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 4}
TEXT = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]])


pytestmark = pytest.mark.usefixtures("fixed_noise")


def unet(how: str, targets: list[str]) -> nn.Module:
    torch.manual_seed(0)
    model = UNet2DConditionModel(**BLOCKS, **SIZES, cross_attention_dim=12, attention_head_dim=4).double()
    config = fk.FVAELoraConfig(target_modules=targets, init_weights=False, **SMALL)
    if how == "get_peft_model":
        model = peft.get_peft_model(model, config, autocast_adapter_dtype=False)
    else:
        model.add_adapter(config)
        model.double()
    for name, p in model.named_parameters():
        p.requires_grad_("fvae_" in name)
    return model.train()


def loss(model: nn.Module, text: Tensor) -> Tensor:
    """Mean squared error of the predicted noise."""
    generator = torch.Generator().manual_seed(1)
    images, noise = (torch.randn(2, 4, 8, 8, dtype=torch.float64, generator=generator) for _ in range(2))
    predicted = model(images, torch.tensor([3, 700]), text, encoder_attention_mask=TEXT).sample
    return F.mse_loss(predicted, noise)


def text(padding: float) -> Tensor:
    words = torch.randn(2, 5, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    return words.where(TEXT.bool()[..., None], torch.full_like(words, padding))


@pytest.mark.compat("Training loops", "diffusers' UNet: `add_adapter`, `encoder_attention_mask`, checkpointing")
@pytest.mark.parametrize(("how", "checkpointing"), [("get_peft_model", False), ("add_adapter", True)])
def test_gradient(how: str, checkpointing: bool) -> None:
    model = unet(how, ["to_q", "to_k", "to_v"])
    with by_hand(model) as terms:
        task = loss(model, text(0.0))
    total = task + torch.stack(terms).sum()
    (0.5 * total).backward()
    expected = grads(model)
    model.zero_grad()
    if checkpointing:
        model.enable_gradient_checkpointing()
    found = fk.attach_aux_loss(model, loss(model, text(0.0)))
    torch.testing.assert_close(found.detach(), total.detach(), rtol=1e-9, atol=0)
    (0.5 * found).backward()
    assert_same(model, expected)


def test_padded_text_stays_out() -> None:
    model = unet("get_peft_model", ["to_k", "to_v"])
    seen = []
    for padding in (0.0, 9.0):
        model.zero_grad()
        fk.attach_aux_loss(model, loss(model, text(padding))).backward()
        seen.append(grads(model))
    for p, (one, other) in zip(
        (p for p in model.parameters() if p.requires_grad), zip(*seen, strict=True), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12 * float(p.grad.norm()))
