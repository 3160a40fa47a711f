"""The served path of a layer at a smaller rank, without units that never fire."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..reference import mlp
from .calibration import Statistics
from .factors import directions, lost_energy, wide
from .layers import AdaptedLayer


@dataclass(frozen=True)
class TrimmedPath:
    """What serves a layer: ``s B mean_1``.

    Attributes:
        tensors: by parameter name.
        rank: of the update.
        hidden: sizes of the encoder's hidden layers.
        lost: share of the update's energy that it lacks.
    """

    tensors: dict[str, Tensor]
    rank: int
    hidden: tuple[int, ...]
    lost: float


@torch.no_grad()
def trim_path(layer: AdaptedLayer, sums: Statistics | None, tolerance: float) -> TrimmedPath:
    """Encoder 1's mean path and B, at the smallest rank that keeps the update within the tolerance.

    Of all updates of that rank ``B' (P mean_1)`` loses least on the data. Without data, the inputs of a linear encoder
    count as white, and z_1 of another as its prior has it; no unit is dropped then.
    """
    adapter = layer.adapter
    tensors = {
        n: p.detach() for n, p in adapter.named_parameters() if n.startswith(("encoder1_hidden", "encoder1_mean"))
    }
    M1, B = tensors["encoder1_mean_weight"], adapter.B.detach()
    if sums is not None:
        moment = sums.latents / sums.tokens
    elif adapter.config.encoder_hidden:
        moment = torch.eye(adapter.config.rank, dtype=torch.float64, device=wide(B).device)
    else:
        moment = wide(M1) @ wide(M1).T
    found = directions(B, moment)
    rank = found.rank(tolerance, B.dtype)
    tensors["B"] = B
    if rank < adapter.config.rank:
        tensors["B"] = found.out[:, :rank].to(B)
        for name in ("encoder1_mean_weight", "encoder1_mean_bias"):
            if name in tensors:
                tensors[name] = (found.into[:rank] @ wide(tensors[name])).to(B)
    hidden = _drop_dead_units(tensors, sums)
    if sums is None:
        total = found.energies.sum()
        lost = float(found.energies[rank:].sum() / total) if total > 0 and rank < adapter.config.rank else 0.0
    else:
        lost = _lost(tensors, B, hidden, sums)
    return TrimmedPath(tensors, rank, hidden, lost)


def _drop_dead_units(tensors: dict[str, Tensor], sums: Statistics | None) -> tuple[int, ...]:
    """Remove units that fired for no token, in place; their weights change nothing there. Returns the sizes left."""
    fired = [] if sums is None else sums.fired
    for i, counts in enumerate(fired):
        live = (counts > 0).nonzero().flatten()
        live = (live if len(live) else counts.new_zeros(1, dtype=torch.int64)).to(tensors["B"].device)
        following = f"encoder1_hidden{i + 1}_weight" if i + 1 < len(fired) else "encoder1_mean_weight"
        for name in (f"encoder1_hidden{i}_weight", f"encoder1_hidden{i}_bias"):
            tensors[name] = tensors[name][live]
        tensors[following] = tensors[following][:, live]
    count = sum(name.startswith("encoder1_hidden") for name in tensors) // 2  # a weight and a bias each
    return tuple(len(tensors[f"encoder1_hidden{i}_bias"]) for i in range(count))


def _lost(tensors: dict[str, Tensor], B: Tensor, hidden: tuple[int, ...], sums: Statistics) -> float:
    """The share of the energy that these tensors lose on the tokens kept aside."""
    x, m = sums.kept_aside()
    found = {name: wide(t) for name, t in tensors.items()}
    layers = [(found[f"encoder1_hidden{i}_weight"], found[f"encoder1_hidden{i}_bias"]) for i, _ in enumerate(hidden)]
    served = torch.nn.functional.linear(mlp(x, layers), found["encoder1_mean_weight"], found.get("encoder1_mean_bias"))
    return lost_energy(m @ wide(B).T, served @ found["B"].T)
