"""suggest_ranks and trim: the ranks that a trained adapter uses."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..nn.linear import FusedFVAELinear
from .calibration import Statistics, calibrate
from .factors import Directions, directions, lost_energy, wide
from .layers import AdaptedLayer, adapted_layers, exact_pattern, peft_config
from .options import check_number, check_patterns, check_tolerance, rank_of
from .reports import ExportedLayer

ACTIVE = 1e-2  # variance of the mean of an active entry, as in `diagnostics.active_units`


@dataclass(frozen=True)
class Use:
    """What a layer uses of its rank.

    Attributes:
        name: in the base model.
        rank: as trained.
        suggested: the rank that it uses.
        by_energy: the smallest rank that loses at most the tolerance of the update's energy.
        active: entries of z_1 whose mean varies over tokens.
    """

    name: str
    rank: int
    suggested: int
    by_energy: int
    active: int


class RankSuggestion(dict[str, int]):
    """A rank_pattern, with one entry for each layer; `layers` says where the numbers are from."""

    layers: tuple[Use, ...] = ()

    def __str__(self) -> str:
        return "\n".join(
            f"{u.name}: rank {u.rank} -> {u.suggested} ({u.by_energy} by energy, {u.active} active)"
            for u in self.layers
        )


def suggest_ranks(
    model: nn.Module,
    data: Iterable[Any],
    *,
    tolerance: float = 0.01,
    threshold: float | None = None,
    adapter_name: str = "default",
) -> RankSuggestion:
    """The rank that each layer uses, as a rank_pattern: for `trim`, or for a config to train anew.

    It is the smallest rank that loses at most `tolerance` of the update's energy ``sum |s B mean_1|^2`` on the data.
    With a `threshold` it is also at most the number of active entries of z_1, and one more if there are others: these
    add little but a constant together. That may lose more than the tolerance, where B makes much of small differences.

        ranks = fk.suggest_ranks(model, batches)
        fk.trim(model, ranks, batches)

    Args:
        model: a PeftModel, or any model with adapted layers.
        data: batches: mappings or tuples of arguments, or single arguments. Padding does not count.
        tolerance: share of the energy, from 0 to below 1.
        threshold: variance over tokens above which the mean of an entry of z_1 is active; its prior's is 1. None lets
            the energy alone decide, and reports the entries above 0.01.
        adapter_name: the adapter.

    Returns:
        A dict; ``print`` it for what it is based on.

    Raises:
        ValueError: no such adapter, or it is not the only active one; a value out of range; data that does not reach
            every layer.
        TypeError: data that is no iterable of batches.
    """
    check_tolerance(tolerance)
    check_number("threshold", threshold, "a variance of at least 0", low=0)
    layers = adapted_layers(model, adapter_name)
    sums = calibrate(model, layers, data, adapter_name)
    suggestion = RankSuggestion()
    suggestion.layers = tuple(_use(layer, sums[layer.name], tolerance, threshold) for layer in layers)
    suggestion.update({exact_pattern(use.name): use.suggested for use in suggestion.layers})
    return suggestion


def _use(layer: AdaptedLayer, sums: Statistics, tolerance: float, threshold: float | None) -> Use:
    B, R = layer.adapter.B.detach(), layer.adapter.config.rank
    mean = sums.latent_sum / sums.tokens
    active = int(
        (sums.latents.diagonal() / sums.tokens - mean.square() > (ACTIVE if threshold is None else threshold)).sum()
    )
    by_energy = directions(B, sums.latents / sums.tokens).rank(tolerance, B.dtype)
    highest = R if threshold is None else active + (active < R)
    return Use(layer.name, R, min(by_energy, highest), by_energy, active)


@torch.no_grad()
def trim(
    model: nn.Module,
    ranks: int | Mapping[str, int],
    data: Iterable[Any] | None = None,
    *,
    adapter_name: str = "default",
) -> tuple[ExportedLayer, ...]:
    """Make the trained adapter one of smaller ranks, in place, that can be trained further.

    z_1 is projected on the directions that matter most for the update ``s B mean_1``. The projection is orthogonal, so
    z_1 keeps its prior, and a held log-variance stays as it is; a learned one becomes the mean of those that were
    projected, weighted by the squares of the projection. Of z_2 the entries whose means vary most are kept. The decoder
    reads what is left; what is dropped is replaced by its mean in the bias of its first layer.

    The parameters are new objects. Make a new optimiser: the state of the old one does not fit.

    Args:
        model: a PeftModel, or any model with adapted layers.
        ranks: for all layers, or by module name pattern, as from `suggest_ranks`. Layers without one stay.
        data: batches on which the directions are chosen. Without data the inputs of a linear encoder count as white,
            z_1 of another as its prior has it, and z_2's entries are chosen by their weights.
        adapter_name: the adapter.

    Returns:
        A row for each layer that has changed: ranks, share of the update's energy that is lost, bytes.

    Raises:
        ValueError: no such adapter; a rank that is no whole number from 1 to the adapter's; a pattern without layers; a
            merged layer; ``fusion="average"``, whose decoder cannot read two smaller latents. The model is unchanged
            then.
        TypeError: data that is no iterable of batches.
    """
    layers = adapted_layers(model, adapter_name)
    if ranks is None or isinstance(ranks, Mapping):
        check_patterns(ranks, layers)
    asked = {layer.name: rank_of(ranks, layer) for layer in layers}
    smaller = [
        layer for layer in layers if (asked[layer.name] or layer.adapter.config.rank) < layer.adapter.config.rank
    ]
    for layer in smaller:
        if layer.module.merged:
            raise ValueError(
                f"{layer.name!r} is merged: unmerge it before it is trimmed, or its weight keeps the old update"
            )
        if layer.adapter.config.fusion == "average":
            raise ValueError(
                f"{layer.name!r} has fusion='average': its decoder reads z_1 + z_2, which cannot be trimmed apart"
            )
    sums: dict[str, Statistics] = {}
    if data is not None and smaller:
        sums = calibrate(model, smaller, data, adapter_name, second=_trainable)
    done = [(layer, *_trimmed(layer, asked[layer.name] or 0, sums.get(layer.name))) for layer in smaller]
    rows = []
    for layer, tensors, lost in done:
        before, rank = _size(layer), layer.adapter.config.rank
        _put(layer, tensors)
        rows.append(ExportedLayer(layer.name, rank, layer.adapter.config.rank, lost, before, _size(layer)))
    config = peft_config(model, adapter_name)
    if config is not None:
        config.rank_pattern = {exact_pattern(layer.name): layer.adapter.config.rank for layer in layers}
        config.alpha_pattern = {exact_pattern(layer.name): layer.adapter.alpha for layer in layers}
    return tuple(rows)


def _trainable(layer: AdaptedLayer) -> bool:
    return not layer.adapter.inference_only


def _trimmed(layer: AdaptedLayer, rank: int, sums: Statistics | None) -> tuple[dict[str, Tensor], float]:
    """The layer's parameters at this rank, and the share of the energy that is lost."""
    adapter = layer.adapter
    own = {name: wide(p.detach()) for name, p in adapter.named_parameters()}
    M1 = own["encoder1_mean_weight"]
    moment = torch.eye(len(M1), dtype=M1.dtype, device=M1.device) if adapter.config.encoder_hidden else M1 @ M1.T
    found = directions(own["B"], moment if sums is None else sums.latents / sums.tokens)
    U, S, Vh = torch.linalg.svd(found.into[:rank], full_matrices=False)
    P = U @ Vh  # orthonormal rows; B' P is the best update of this rank
    new = dict(own)
    new["B"] = found.out[:, :rank] @ (U * S) @ U.T
    for name in ("encoder1_mean_weight", "encoder1_mean_bias"):
        if name in own:
            new[name] = P @ own[name]
    for name in ("encoder1_logvar_weight", "encoder1_logvar_bias"):
        if name in own:
            new[name] = P.square() @ own[name]
    if not adapter.inference_only:
        _trim_second(adapter.config, own, new, P, sums)
    return {name: t.to(adapter.B) for name, t in new.items()}, _lost(found, rank, P, own["B"], new["B"], sums)


def _trim_second(
    config: Any, own: dict[str, Tensor], new: dict[str, Tensor], P: Tensor, sums: Statistics | None
) -> None:
    """Keep the entries of z_2 that vary most, and let the decoder read what is left."""
    rank, R = P.shape
    if sums is None or sums.latents2 is None:
        spread = own["encoder2_mean_weight"].square().sum(1)
        mean1, mean2 = torch.zeros_like(spread), torch.full_like(spread, config.prior2_mean)
    else:
        mean1, mean2 = sums.latent_sum / sums.tokens, sums.latents2[0] / sums.tokens
        spread = sums.latents2[1] / sums.tokens - mean2.square()
    kept = spread.argsort(descending=True)[:rank].sort().values
    for name in own:
        if name.startswith(("encoder2_mean", "encoder2_logvar_weight", "encoder2_logvar_bias")):
            new[name] = own[name][kept]
    first = "decoder_hidden0" if config.decoder_hidden else "decoder_out"
    D1, D2 = own[f"{first}_weight"].split(R, 1)
    new[f"{first}_weight"] = torch.cat((D1 @ P.T, D2[:, kept]), 1)
    rest = mean2.clone()
    rest[kept] = 0.0
    new[f"{first}_bias"] = own[f"{first}_bias"] + D1 @ (mean1 - P.T @ (P @ mean1)) + D2 @ rest


def _lost(found: Directions, rank: int, P: Tensor, B: Tensor, B_k: Tensor, sums: Statistics | None) -> float:
    if sums is None:
        total = found.energies.sum()
        return float(found.energies[rank:].sum() / total) if total > 0 else 0.0
    m = sums.kept_aside()[1]
    return lost_energy(m @ B.T, m @ P.T @ B_k.T)


def _put(layer: AdaptedLayer, tensors: dict[str, Tensor]) -> None:
    """Give the adapter these parameters, and the options that fit them: the update keeps its scale."""
    adapter, rank = layer.adapter, tensors["B"].shape[1]
    share = rank / adapter.config.rank
    share = math.sqrt(share) if adapter.config.rslora else share
    for name, parameter in list(adapter.named_parameters()):
        adapter.register_parameter(name, nn.Parameter(tensors[name], requires_grad=parameter.requires_grad))
    adapter.alpha *= share
    adapter.config = replace(adapter.config, rank=rank, alpha=adapter.config.alpha * share)
    adapter.training_config = replace(adapter.training_config, rank=rank, alpha=adapter.training_config.alpha * share)
    adapter.plans.forget()
    if isinstance(layer.module, FusedFVAELinear):
        layer.module.config = replace(layer.module.config, rank=rank, alpha=layer.module.config.alpha * share)


def _size(layer: AdaptedLayer) -> int:
    return sum(p.nbytes for p in layer.adapter.parameters())
