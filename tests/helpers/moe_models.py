"""Tiny mixtures of experts with random weights, and the objective of their experts computed by hand."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fvae_kernels import reference
from fvae_kernels.peft.experts import UnfusedExperts

DIM, VOCAB = 16, 30
PARAMETERS = ["experts.gate_up_proj", "experts.down_proj"]


def moe(kind: str = "mixtral", seed: int = 0) -> Any:
    """Mixtral, or gpt-oss, whose experts have biases, a gate of their own, and weights stored transposed."""
    import transformers

    sizes = {"hidden_size": DIM, "intermediate_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes |= {"num_key_value_heads": 1, "num_local_experts": 4, "num_experts_per_tok": 2, "vocab_size": VOCAB}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        if kind == "mixtral":
            model: nn.Module = transformers.MixtralForCausalLM(transformers.MixtralConfig(**sizes))
        else:
            model = transformers.GptOssForCausalLM(transformers.GptOssConfig(**sizes, head_dim=8))
        for name, parameter in model.named_parameters():
            if ".experts." in name:
                nn.init.normal_(parameter, std=0.3)
    return model


def tokens(padded: int = 0) -> dict[str, Tensor]:
    """A batch with labels; the second row ends with padding."""
    ids = torch.randint(1, VOCAB, (2, 5), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids)
    mask[1, 5 - padded :] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def run_by_hand(patch: pytest.MonkeyPatch, model: nn.Module, mask: Tensor) -> list[Tensor]:
    """Let the experts of `model` compute by `reference.layer`; their weighted losses are put into the list."""
    losses: list[Tensor] = []

    def project(module: Any, name: str, e: int, x: Tensor, flags: Tensor) -> Tensor:
        base, layer = module.base_layer, module.get_submodule(name)[e]
        weight, adapter = getattr(base, name)[e], layer.fvae_adapter["default"]
        y = x @ weight if base.is_transposed else x @ weight.T
        y = y + getattr(base, f"{name}_bias")[e] if base.has_bias else y
        noise = adapter.draw_noise(x), adapter.draw_noise(x)
        parts = adapter._encoder(1), adapter._encoder(2), adapter._decoder(), adapter.B
        update, terms = reference.layer(x, *parts, adapter.config, noise, mask=flags)
        losses.append(layer.fvae_loss_weight["default"] * terms.loss)
        return y + update

    def gate(base: Any, h: Tensor) -> Tensor:
        if not base.is_transposed:
            gates, up = h.chunk(2, -1)
            return F.silu(gates) * up
        gates, up = h[:, ::2].clamp(max=base.limit), h[:, 1::2].clamp(-base.limit, base.limit)
        return (up + 1) * gates * torch.sigmoid(base.alpha * gates)

    def forward(self: Any, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e in range(4):
            chosen = (index == e).any(-1)
            if chosen.any():
                flags = mask.reshape(-1)[chosen].bool()
                h = gate(self.base_layer, project(self, "gate_up_proj", e, x[chosen], flags))
                share = (weights * (index == e)).sum(-1)[chosen]
                out[chosen] += share.unsqueeze(-1) * project(self, "down_proj", e, h, flags)
        return out

    patch.setattr(UnfusedExperts, "forward", forward)
    return losses
