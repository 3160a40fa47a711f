"""The auxiliary loss without PEFT: layers in any module, with a model that computes a loss or without."""

import pytest
import torch
from torch import nn

import fvae_kernels as fk
from tests.helpers.gradients import OPTIONS, assert_same, grads, params
from tests.helpers.tiny_models import Regressor
from tests.helpers.total_loss import by_hand

pytestmark = [
    pytest.mark.usefixtures("fixed_noise"),
    pytest.mark.filterwarnings("ignore:FVAE. the auxiliary loss entered:UserWarning"),
]


def replaced() -> Regressor:
    torch.manual_seed(0)
    model = Regressor().double()
    fk.replace_linears(model, fk.FVAEConfig(rank=3, **OPTIONS))
    with torch.no_grad():
        for p in params(model):
            p.add_(torch.randn_like(p) * 0.1)
    return model


def test_replaced_linears_in_a_model_that_computes_its_loss() -> None:
    model, x, labels = replaced(), torch.randn(5, 24).double(), torch.randn(5, 3).double()
    with by_hand(model) as terms:
        task = model(x, labels)["loss"]
    (8 * (task + torch.stack(terms).sum())).backward()
    expected = grads(model)
    model.zero_grad()
    (8 * model(x, labels=labels)["loss"]).backward()
    assert_same(model, expected)


@pytest.mark.parametrize("compiled", [False, True])
def test_a_bare_layer_delivers_with_weight_one(compiled: bool) -> None:
    torch.manual_seed(0)
    layer = fk.FusedFVAELinear.from_linear(nn.Linear(24, 4).double(), fk.FVAEConfig(rank=3, **OPTIONS))
    x = torch.randn(2, 5, 24).double()
    y, terms = layer.forward_with_terms(x)
    (3 * y.square().sum() + OPTIONS["loss_weight"] * terms.loss).backward()
    expected = grads(layer)
    layer.zero_grad()
    called = torch.compile(layer, backend="aot_eager", fullgraph=True) if compiled else layer
    for _ in range(2):  # a second step is like the first
        layer.zero_grad()
        (3 * called(x).square().sum()).backward()
        assert_same(layer, expected)
    torch._dynamo.reset()


def test_a_bare_layer_with_attach_has_no_memory_of_earlier_steps() -> None:
    torch.manual_seed(0)
    layer = fk.FusedFVAELinear.from_linear(nn.Linear(24, 4).double(), fk.FVAEConfig(rank=3, **OPTIONS))
    x = torch.randn(5, 24).double()
    y, terms = layer.forward_with_terms(x)
    total = y.square().sum() + OPTIONS["loss_weight"] * terms.loss
    (7 * total).backward()
    expected = grads(layer)
    for _ in range(3):
        layer.zero_grad()
        loss = fk.attach_aux_loss(layer, layer(x).square().sum())
        torch.testing.assert_close(loss, total)
        (7 * loss).backward()
        assert_same(layer, expected)
    layer.zero_grad()
    layer(x).square().sum().backward()  # not attached: weight 1, not 7 as in the step before
    layer.zero_grad()
    loss = fk.attach_aux_loss(layer, layer(x).square().sum())
    torch.testing.assert_close(loss, total)
