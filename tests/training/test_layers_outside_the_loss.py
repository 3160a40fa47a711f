"""Layers that run after the outputs that a loss depends on: neither in the loss nor in the gradient.

With a loss that the model computes, every layer of the forward takes part (`test_outputs.py`).
"""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fvae_kernels as fk
from tests.helpers.forwards import CHECKPOINTS
from tests.helpers.gradients import adapted, assert_same, checkpoint_activations, grads
from tests.helpers.padded_batches import padded, sequences
from tests.helpers.total_loss import by_hand

pytestmark = pytest.mark.usefixtures("fixed_noise")


def trunk() -> tuple[nn.Module, dict[str, Tensor]]:
    rows = padded(sequences("bert"))
    rows.pop("labels")
    return adapted("bert", task=None, target_modules="all-linear"), rows


def first(model: nn.Module, rows: dict[str, Tensor], which: str) -> Tensor:
    """A loss on one block's output, as mean pooling has it."""
    output = model(**rows, output_hidden_states=True)
    states = output.hidden_states[1 if which == "first block" else -1]
    return (states * rows["attention_mask"][..., None]).square().mean()


@CHECKPOINTS
@pytest.mark.parametrize("kept", [True, False], ids=["output kept", "output dropped"])
@pytest.mark.parametrize("which", ["first block", "trunk"])
def test_terms_of_later_layers_stay_out(which: str, kept: bool, reentrant: bool | None) -> None:
    model, rows = trunk()
    layers = [name for name, module in model.named_modules() if hasattr(module, "aux_key")]
    before = [name for name in layers if (".layer.0." in name if which == "first block" else ".layer." in name)]
    assert 0 < len(before) < len(layers)
    outputs: list[Any] = []
    if kept:
        model.register_forward_hook(lambda module, args, output: outputs.append(output))
    with by_hand(model) as terms:
        task = first(model, rows, which)
    value = task + torch.stack(terms[: len(before)]).sum()
    (0.25 * value).backward()
    expected = grads(model)
    model.zero_grad()
    if reentrant is not None:
        checkpoint_activations(model, reentrant)
    total = fk.attach_aux_loss(model, first(model, rows, which))
    torch.testing.assert_close(total.detach(), value.detach(), rtol=1e-9, atol=0)
    (0.25 * total).backward()
    assert_same(model, expected, 1e-6)


def test_a_feature_that_is_no_output_brings_the_layers_on_its_way() -> None:
    """Taken by a hook between two outputs: its block is not before any output that the loss depends on."""
    model, rows = trunk()
    layers = [name for name, module in model.named_modules() if hasattr(module, "aux_key")]
    taken: list[Tensor] = []
    outputs: list[Any] = []  # whoever keeps no output of a forward keeps none of its terms
    block = model.get_submodule("base_model.model.bert.encoder.layer.1.attention.output.dense")
    block.register_forward_hook(lambda module, args, output: taken.append(output))

    def loss() -> Tensor:
        output = model(**rows, output_hidden_states=True)
        outputs.append(output)
        return taken.pop().square().mean() + 0.0 * output.hidden_states[0].sum()

    with by_hand(model) as terms:
        task = loss()
    before = layers.index("base_model.model.bert.encoder.layer.1.attention.output.dense")
    value = task + torch.stack(terms[: before + 1]).sum()
    value.backward()
    expected = grads(model)
    model.zero_grad()
    total = fk.attach_aux_loss(model, loss())
    torch.testing.assert_close(total.detach(), value.detach(), rtol=1e-9, atol=0)
    total.backward()
    assert_same(model, expected, 1e-6)


def test_a_feature_of_a_forward_whose_output_is_gone_is_refused() -> None:
    model, rows = trunk()
    taken: list[Tensor] = []
    block = model.get_submodule("base_model.model.bert.encoder.layer.1")
    block.register_forward_hook(lambda module, args, output: taken.append(output))
    model(**rows)
    with pytest.raises(ValueError, match="while its output is kept"):
        fk.attach_aux_loss(model, taken.pop().square().mean())
