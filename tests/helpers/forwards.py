"""Forwards whose loss is compared with the loop's loss plus the terms, added by hand with their graph."""

import collections
import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fvae_kernels as fk
from tests.helpers.gradients import OPTIONS, assert_same, grads, params
from tests.helpers.padded_batches import padded, sequences
from tests.helpers.total_loss import by_hand

Loss = Callable[[], Tensor]
LABELS = torch.tensor([0, 1, 2])
CHECKPOINTS = pytest.mark.parametrize("reentrant", [None, True, False], ids=["plain", "reentrant", "non-reentrant"])


def by_terms(model: nn.Module, loss: Loss, weight: float = 1.0) -> tuple[Tensor, list[Tensor]]:
    """Value and gradient of ``weight * (loss + terms)``, by hand."""
    model.zero_grad()
    with by_hand(model) as terms:
        total = loss() + 0.0
    total = total + torch.stack(terms).sum()
    (weight * total).backward()
    expected = grads(model)
    model.zero_grad()
    return total.detach(), expected


def check(model: nn.Module, loss: Loss, weight: float = 0.25) -> None:
    """`attach_aux_loss` on the loss gives the value and the gradient of the total loss."""
    value, expected = by_terms(model, loss, weight)
    check_against(model, loss, value, expected, weight)


def check_against(model: nn.Module, loss: Loss, value: Tensor, expected: list[Tensor], weight: float = 0.25) -> None:
    total = fk.attach_aux_loss(model, loss())
    torch.testing.assert_close(total.detach(), value, rtol=1e-9, atol=0, check_dtype=False)
    (weight * total).backward()
    assert_same(model, expected, 1e-6)


def inputs(kind: str = "bert") -> dict[str, Tensor]:
    rows = padded(sequences(kind))
    rows.pop("labels")
    return rows


class Branches(nn.Module):
    """A layer outside the graph of the loss, a layer that is called twice, and any form of output."""

    def __init__(self, form: Callable[[Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.form, self.twice, self.unused, self.head = form, nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor, labels: Tensor) -> Any:
        x = self.twice(self.twice(x).tanh())
        self.unused(x)
        logits = self.head(x)
        return self.form(F.cross_entropy(logits, labels), logits)


Named = collections.namedtuple("Named", "logits loss")


@dataclasses.dataclass(frozen=True)
class Output:
    loss: Tensor
    logits: Tensor


FORMS: dict[str, tuple[Callable[[Tensor, Tensor], Any], Callable[[Any], Tensor]]] = {
    "mapping": (lambda loss, logits: {"loss": loss, "logits": logits}, lambda o: o["loss"]),
    "named tuple": (lambda loss, logits: Named(logits, loss), lambda o: o.loss),
    "dataclass": (lambda loss, logits: Output(loss, logits), lambda o: o.loss),
    "loss first": (lambda loss, logits: (loss, logits), lambda o: o[0]),
    "loss last": (lambda loss, logits: (logits, loss), lambda o: o[1]),
    "list": (lambda loss, logits: [loss, logits], lambda o: o[0]),
    "alone": (lambda loss, logits: loss, lambda o: o),
    "shape [1]": (lambda loss, logits: {"loss": loss[None]}, lambda o: o["loss"].sum()),
    "shape [1], tuple": (lambda loss, logits: (loss[None], logits), lambda o: o[0].sum()),
}


SEEN = torch.randn(3, 6, generator=torch.Generator().manual_seed(0)).double()


def branches(form: str) -> tuple[nn.Module, Callable[[], Any]]:
    torch.manual_seed(0)
    model = Branches(FORMS[form][0]).double()
    fk.replace_linears(model, fk.FVAEConfig(rank=3, **OPTIONS), ["twice", "unused"])
    with torch.no_grad():
        for p in params(model):
            p.add_(0.1 * torch.randn_like(p))
    return model, lambda: model(SEEN, labels=LABELS)


def trained(model: nn.Module) -> list[str]:
    return [name for name, p in model.named_parameters() if p.requires_grad]


def assert_unused_or_same(model: nn.Module, expected: list[Tensor]) -> None:
    for name, g, e in zip(
        [n for n, p in model.named_parameters() if p.requires_grad], grads(model), expected, strict=True
    ):
        assert (g - e).norm() <= 1e-9 * max(float(e.norm()), 1e-12), name
