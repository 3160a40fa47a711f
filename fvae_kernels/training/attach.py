"""Terms are added to a loss: to one that the loop hands over (`attach_aux_loss`), or to one that a model returns."""

import torch
from torch import Tensor, nn

from .aux_loss import aux_loss_layers
from .cached import InBackward, take_values
from .calls import LayerKey
from .forward import PENDING, Forward, Term, Value, local, reached
from .inject import TotalLoss, transformed


def attach_aux_loss(model: nn.Module, loss: Tensor, weight: Tensor | float = 1.0) -> Tensor:
    """`loss` plus `weight` times the auxiliary loss of the forwards that `loss` depends on.

    For a loss that the model did not compute; a model called with labels does not need it. Call it once per loss, in
    training, before the loop scales, divides and back-propagates the loss:

        logits = model(inputs)
        loss = fk.attach_aux_loss(model, criterion(logits, labels))
        (loss / accumulation_steps).backward()

    The loss takes the terms of the layers that ran before the outputs that it depends on. Keep the model's output until
    then: a forward of which nothing is left has no terms.

    It also works if the loop ran the model without a graph and runs it again inside the backward of `loss` (GradCache).

    Args:
        model: the model that holds the adapted layers.
        loss: the task loss, a scalar.
        weight: weight of the auxiliary loss, relative to `loss`.

    Returns:
        The total loss (6), in the dtype of `loss`.

    Raises:
        ValueError: if `loss` is not a scalar, or no adapted layer of the model has run since the last call.
    """
    if loss.numel() != 1:
        raise ValueError(f"the loss has shape {tuple(loss.shape)}; expected a scalar: reduce it (mean or sum) first")
    total = attached(model, loss, weight)
    if total is None:
        raise ValueError(
            f"{type(model).__name__} has {len(aux_loss_layers(model))} FVAE layer(s) and none ran in training mode "
            "since the last call, or nothing is left of their forward: call attach_aux_loss once after each forward in "
            "training, while its output is kept, and not for a loss that the model computed itself. With torch.compile,"
            " run the forward inside `with fvae_kernels.external_loss(model):`"
        )
    return total


def attached(model: nn.Module, loss: Tensor, weight: Tensor | float) -> Tensor | None:
    """As `attach_aux_loss`; None if no adapted layer took part."""
    keys = [layer.aux_key for layer in aux_loss_layers(model)]
    waiting = {forward: forward.held(keys) for forward in sorted(PENDING, key=lambda forward: forward.number)}
    waiting = {forward: terms for forward, terms in waiting.items() if terms or _of(forward.values, keys)}
    compiled, local.compiled = local.compiled, []
    values = take_values(keys)
    for forward, terms, own in reached(loss, waiting):
        loss = attach_forward(forward, loss, weight, terms, _of(own, keys))
    if compiled:
        loss = loss + (weight * torch.stack(compiled).sum()).to(loss)
    if waiting or compiled:
        return loss
    if not values:
        return None
    return TotalLoss.apply(loss, weighted_sum([], values), weight, InBackward(keys))


def attach_forward(
    forward: Forward, loss: Tensor, share: Tensor | float, terms: list[Term], values: list[Value]
) -> Tensor:
    """`loss` plus `share` times these terms and values of one forward."""
    if not (terms or values):
        return loss
    total = weighted_sum(terms, values)
    for term in terms:
        if term.call is not None:
            term.call.attached = True
    gone = set(map(id, (*terms, *values)))
    forward.pending = [term for term in forward.pending if id(term) not in gone]
    forward.left = [reference for reference in forward.left if id(reference()) not in gone]
    forward.values = [value for value in forward.values if id(value) not in gone]
    if torch.compiler.is_compiling() or transformed():
        forward.state.entered = True
        return loss + (share * total).to(loss)
    return TotalLoss.apply(loss, total, share, _Note(forward))


class _Note:
    """Notes the weight of a forward's terms. Terms that were injected before, without this loss, take no part."""

    def __init__(self, forward: Forward) -> None:
        self.state, self.weights = forward.state, forward.weights

    def __call__(self, task: int, weight: Tensor) -> bool:
        self.state.entered, self.weights[task] = True, weight
        return not self.state.injected


def weighted_sum(terms: list[Term], values: list[Value]) -> Tensor:
    """The sum of weighted 0-dim losses, on the first one's device. Those of equal weight are added before weighting."""
    weighted = [(term.weight, term.loss) for term in terms] + [(weight, loss) for _, weight, loss in values]
    device, dtype = weighted[0][1].device, weighted[0][1].dtype
    weights: dict[float, list[Tensor]] = {}
    for weight, loss in weighted:
        weights.setdefault(weight, []).append(loss.to(device=device, dtype=dtype))
    sums = [weight * torch.stack(same).sum() for weight, same in weights.items()]
    return sums[0] if len(sums) == 1 else torch.stack(sums).sum()


def _of(values: list[Value], keys: list[LayerKey]) -> list[Value]:
    return [value for value in values if value[0] in keys]
