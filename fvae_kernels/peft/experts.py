"""UnfusedExperts: fused experts that run one by one, with adapters beside their projections."""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..nn.experts import PROJECTIONS, ExpertLinear, expert_bias, expert_weight
from ..training.hooks import token_mask
from .layer import FVAELoraLayer


class UnfusedExperts(nn.Module):
    """Fused experts of transformers, in whose place it runs each expert on its own tokens.

    Every adapted projection becomes a list of layers, one for each expert, which are adapted as any linear layer. LoRA
    has A and B for each expert too. If no adapter is active, or all are merged, the fused experts run as they are.

    Args:
        experts: a module that `find_experts` found.
    """

    def __init__(self, experts: nn.Module) -> None:
        super().__init__()
        self.base_layer = experts
        self.training = experts.training

    def unfuse(self, parameter: str) -> nn.ModuleList:
        """The layers of this projection, one for each expert; made if they are not there yet."""
        if parameter not in self._modules:
            experts = len(getattr(self.base_layer, parameter))
            layers = nn.ModuleList(ExpertLinear(self.base_layer, parameter, i) for i in range(experts))
            self.add_module(parameter, layers.train(self.training))
        return self._modules[parameter]  # type: ignore[return-value]

    def layers(self) -> Iterator[Any]:
        """The adapted layers."""
        lists = [self._modules[name] for name in PROJECTIONS if name in self._modules]
        return (layer for found in lists for layer in found if isinstance(layer, FVAELoraLayer))  # type: ignore[union-attr]

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """As the experts'.

        Args:
            hidden_states: tokens ``[n, D]``.
            top_k_index: the k experts of each token ``[n, k]``; numbers beyond the last expert are skipped.
            top_k_weights: how much each of them counts, ``[n, k]``.
        """
        if getattr(self, "_is_replica", False):
            raise RuntimeError("experts with FVAE adapters do not run in nn.DataParallel: use DistributedDataParallel")
        active = [layer for layer in self.layers() if _acts(layer)]
        if not active:
            return self.base_layer(hidden_states, top_k_index, top_k_weights)
        flags = _token_flags(active[0], hidden_states)
        out = torch.zeros_like(hidden_states)
        base: Any = self.base_layer
        count = len(base.down_proj)
        for expert in top_k_index.unique().tolist():
            if expert < count:
                token, place = torch.where(top_k_index == expert)
                with token_mask(None if flags is None else flags[token]):
                    y = self._expert(expert, hidden_states[token])
                out.index_add_(0, token, (y * top_k_weights[token, place, None]).to(out.dtype))
        return out

    def _expert(self, expert: int, x: Tensor) -> Tensor:
        """One expert on its tokens: up, gate, down."""
        base: Any = self.base_layer
        if base.has_gate:
            h = base._apply_gate(self._project("gate_up_proj", expert, x))
        else:
            h = base.act_fn(self._project("up_proj", expert, x))
        y = self._project("down_proj", expert, h)
        return base.post_expert_norm(y) if getattr(base, "has_post_expert_norm", False) else y

    def _project(self, parameter: str, expert: int, x: Tensor) -> Tensor:
        layers: Any = self._modules.get(parameter)
        if layers is not None:
            return layers[expert](x)
        base = self.base_layer
        return F.linear(x, expert_weight(base, parameter, expert), expert_bias(base, parameter, expert))

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool = False, adapter_names: list[str] | None = None
    ) -> nn.Module:
        """The experts themselves, with the adapters in their weights if `merge`; PEFT calls it."""
        for layer in self.layers() if merge else ():
            layer.merge(safe_merge=safe_merge, adapter_names=adapter_names)
        return self.base_layer


def _acts(layer: Any) -> bool:
    """Whether a layer does more than its base layer: it adds an update, or takes a merged one out."""
    return layer.disable_adapters == layer.merged and any(name in layer.fvae_adapter for name in layer.active_adapters)


def _token_flags(layer: Any, tokens: Tensor) -> Tensor | None:
    """Which of the tokens ``[n, D]`` enter the objective; None: all. A model's mask fits them only before routing."""
    configs = [adapter.config for adapter in layer.fvae_adapter.values()]
    config = next((config for config in configs if config.mask_padding), None)
    return None if config is None else layer.token_mask(tokens, config)


def unfused(parent: nn.Module, name: str, experts: nn.Module) -> UnfusedExperts:
    """The experts called `name` in `parent`, unfused in place."""
    if isinstance(parent, UnfusedExperts):  # for another adapter
        return parent
    if not isinstance(experts, UnfusedExperts):
        experts = UnfusedExperts(experts)
        setattr(parent, name, experts)
    return experts
