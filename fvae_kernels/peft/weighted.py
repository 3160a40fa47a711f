"""add_weighted_adapter: a weighted sum of adapters with linear encoders as one adapter."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor

from ..nn.experts import ExpertLinear
from ..serving.factors import directions, wide
from ..serving.layers import exact_pattern
from ..serving.options import is_number

COMBINATIONS = ("svd", "cat")


def check_weighted(
    model: Any, adapters: Sequence[str], weights: Sequence[float], name: str, kind: str, svd_rank: int | None
) -> None:
    """Raise unless these adapters of `model`, an FVAELoraModel, can be added up.

    Raises:
        ValueError: see `FVAELoraModel.add_weighted_adapter`.
    """
    if kind not in COMBINATIONS:
        raise ValueError(
            f"combination_type={kind!r} is not allowed: expected 'cat', which is exact, or 'svd'. The others of LoRA "
            "combine A and B apart from each other"
        )
    if not isinstance(name, str) or not name or "." in name:
        raise ValueError(f"adapter_name={name!r} is not allowed: expected a name without a dot")
    if name in model.peft_config:
        raise ValueError(f"there is an adapter {name!r} already: choose another name, or delete it first")
    if (
        isinstance(adapters, str)
        or weights is None
        or not adapters
        or len(set(adapters)) != len(adapters)
        or len(adapters) != len(weights)
    ):
        raise ValueError(f"expected adapters, each once, with one weight each; got {adapters!r} and {weights!r}")
    if not all(map(is_number, weights)):
        raise ValueError(f"weights={list(weights)} are not allowed: expected finite numbers")
    whole = isinstance(svd_rank, int) and not isinstance(svd_rank, bool)
    if svd_rank is not None and (kind != "svd" or not whole or svd_rank < 1):
        raise ValueError(
            f"svd_rank={svd_rank!r} is not allowed: expected a rank of at least 1, with combination_type='svd'"
        )
    for adapter in adapters:
        if adapter not in model.peft_config:
            raise ValueError(f"there is no adapter {adapter!r}; the adapters are {sorted(model.peft_config)}")
        for layer in model._layers():
            if adapter in layer.fvae_adapter and not layer.fvae_adapter[adapter].config.mergeable:
                raise ValueError(
                    f"the adapter {adapter!r} has an encoder with hidden layers, or it samples, so its update is no "
                    "matrix and no single adapter is its sum with others. model.base_model.set_adapter([...]) makes "
                    "several adapters active, whose updates are added up"
                )
    _check_beside(model, adapters)


def _check_beside(model: Any, adapters: Sequence[str]) -> None:
    """Nothing but the adapters may differ: other trained values cannot be added up."""
    biased = [adapter for adapter in adapters if model.peft_config[adapter].bias != "none"]
    if biased:
        raise ValueError(
            f"the adapter {biased[0]!r} trains biases of the base model, which belong to no single adapter"
        )
    wrappers = [module for module in model.modules() if isinstance(module, AuxiliaryTrainingWrapper)]
    for adapter in adapters:
        own = [type(w.original_module).__name__ for w in wrappers if adapter in _values(w)]
        if own:
            raise ValueError(
                f"the adapter {adapter!r} has values of its own for {own[0]} (modules_to_save, "
                "trainable_token_indices), which belong to no weighted sum"
            )


def _values(wrapper: Any) -> Any:
    found = getattr(wrapper, "modules_to_save", None)
    return wrapper.token_adapter.trainable_tokens_delta if found is None else found


def weighted_factors(
    model: Any, adapters: Sequence[str], weights: Sequence[float], kind: str, svd_rank: int | None
) -> dict[str, tuple[Tensor, Tensor]]:
    """M_1 ``[R, D]`` and B ``[M, R]`` of each layer that has one of the adapters, with scale and weight in B."""
    highest = svd_rank or max(max(r for r in _ranks(model, adapter)) for adapter in adapters)
    found = {}
    for name, layer in model.model.named_modules():
        own = getattr(layer, "fvae_adapter", {})
        parts = [(own[adapter], weight) for adapter, weight in zip(adapters, weights, strict=True) if adapter in own]
        if not parts:
            continue
        A = torch.cat([wide(p.encoder1_mean_weight.detach()) for p, _ in parts])
        B = torch.cat([w * p.config.scaling * wide(p.B.detach()) for p, w in parts], 1)
        if kind == "svd":
            best = directions(B, A @ A.T)
            A, B = best.into[:highest] @ A, best.out[:, :highest]
        found[name] = A, B
    return found


def _ranks(model: Any, adapter: str) -> list[int]:
    return [layer.fvae_adapter[adapter].config.rank for layer in model._layers() if adapter in layer.fvae_adapter]


def weighted_config(model: Any, first: str, factors: dict[str, tuple[Tensor, Tensor]]) -> Any:
    """The config of the sum: served alone, at a scale of 1."""
    ranks = {exact_pattern(name): len(A) for name, (A, _) in factors.items()}
    experts = [name for name in factors if isinstance(model.model.get_submodule(name).base_layer, ExpertLinear)]
    highest = max(ranks.values())
    return replace(
        model.peft_config[first],
        r=highest,
        alpha=float(highest),
        rslora=False,
        encoder_hidden=(),
        separate_hidden=False,
        rank_pattern=ranks,
        alpha_pattern={pattern: float(rank) for pattern, rank in ranks.items()},
        encoder_hidden_pattern={},
        loss_weight=None,
        target_modules=sorted(set(factors) - set(experts)),
        target_parameters=sorted({name.rpartition(".")[0] for name in experts}) or None,
        exclude_modules=None,
        layers_to_transform=None,
        layers_pattern=None,
        inference_only=True,
        inference_mode=True,
    )
