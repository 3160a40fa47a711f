"""The auxiliary loss under torch.compile: whole models, models in pieces, layers in eager models."""

import shutil

import pytest
import torch
from torch import Tensor, nn

import fvae_kernels as fk
from fvae_kernels.training.aux_loss import aux_loss_layers
from tests.helpers.compiled import TORCH, with_checkpointing
from tests.helpers.gradients import adapted, assert_same, checkpoint_activations, direct, own_criterion
from tests.helpers.tiny_models import batch

pytestmark = [
    pytest.mark.usefixtures("fixed_noise"),
    pytest.mark.filterwarnings("ignore:FVAE. the auxiliary loss entered:UserWarning"),
    pytest.mark.compat("Training loops", "`torch.compile` of models and of layers, fullgraph"),
]


def loss_of(criterion: str, model: nn.Module, called: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """The model's own loss, or a loss computed outside the model, with or without the auxiliary loss attached."""
    if criterion == "inside":
        return called(**inputs).loss
    if criterion == "outside":
        return own_criterion(called, inputs)
    with fk.external_loss(model):
        task = own_criterion(called, inputs)
    return fk.attach_aux_loss(model, task)


@pytest.mark.parametrize("criterion", ["inside", "outside", "attached"])
def test_compiled_model(criterion: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = adapted("bert"), batch("bert")
    expected = direct(model, [(inputs, 0.5, 0.5 if criterion != "outside" else 1.0)])
    compiled = torch.compile(model, backend="aot_eager", fullgraph=False)
    (0.5 * loss_of(criterion, model, compiled, inputs)).backward()
    assert_same(model, expected)
    torch._dynamo.reset()


def test_compiled_with_checkpointing() -> None:
    model, inputs = adapted("bert"), batch("bert")
    expected = direct(model, [(inputs, 1.0, 1.0)])
    checkpoint_activations(model, False)
    with with_checkpointing():
        torch.compile(model, backend="aot_eager")(**inputs).loss.backward()
    assert_same(model, expected)
    torch._dynamo.reset()


@pytest.mark.skipif(TORCH < (2, 12), reason="inductor's attention in float64 fails, also without an adapter")
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler on the CPU")
def test_compiled_by_inductor_as_one_graph() -> None:
    model, inputs = adapted("bert"), batch("bert")
    expected = direct(model, [(inputs, 0.5, 0.5)])
    (0.5 * torch.compile(model, fullgraph=True)(**inputs).loss).backward()
    assert_same(model, expected)
    torch._dynamo.reset()


@pytest.mark.parametrize("criterion", ["inside", "outside", "attached"])
def test_compiled_layers_in_an_eager_model(criterion: str) -> None:
    model, inputs = adapted("bert"), batch("bert")
    expected = direct(model, [(inputs, 0.5, 0.5 if criterion != "outside" else 1.0)])
    for layer in aux_loss_layers(model):
        layer.compile(backend="aot_eager")
    for _ in range(2):  # a second step is like the first
        model.zero_grad()
        (0.5 * loss_of(criterion, model, model, inputs)).backward()
        assert_same(model, expected)
    torch._dynamo.reset()


def test_a_compiled_layer_called_without_its_model() -> None:
    model = adapted("bert")
    layer, x = aux_loss_layers(model)[0], torch.randn(2, 5, 24).double()
    layer(x).square().sum().backward()
    expected = [p.grad.clone() for p in layer.fvae_adapter.parameters()]
    compiled = torch.compile(layer, backend="aot_eager")
    for _ in range(2):
        model.zero_grad()
        compiled(x).square().sum().backward()
        for p, e in zip(layer.fvae_adapter.parameters(), expected, strict=True):
            torch.testing.assert_close(p.grad, e, rtol=1e-9, atol=1e-12)
    torch._dynamo.reset()
