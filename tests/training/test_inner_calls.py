"""Calls that bypass the model's own call: a trunk, a forward method, the stacks of an encoder-decoder."""

from typing import Any

import pytest
import torch.nn.functional as F
from torch import Tensor

import fvae_kernels as fk
from tests.helpers.forwards import CHECKPOINTS, LABELS, by_terms, check, check_against, inputs
from tests.helpers.gradients import adapted, assert_same, checkpoint_activations, params
from tests.helpers.padded_batches import padded, sequences

pytestmark = pytest.mark.usefixtures("fixed_noise", "nothing_said")


@CHECKPOINTS
def test_a_trunk_that_is_called_by_itself(reentrant: bool | None) -> None:
    model = adapted("bert")
    base, given = model.base_model.model, inputs()

    def loss() -> Tensor:
        return F.cross_entropy(base.classifier(base.bert(**given).pooler_output), LABELS)

    value, expected = by_terms(model, loss, 0.25)
    model(**inputs(), labels=LABELS).loss.backward()  # another forward, with other masks
    model.zero_grad()
    if reentrant is not None:
        checkpoint_activations(model, reentrant)
    check_against(model, loss, value, expected)


@CHECKPOINTS
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_forward_method_has_masks_of_attention_alone(side: str, reentrant: bool | None) -> None:
    """Without the hooks of the model, each block begins a forward; its mask is the attention mask."""
    model = adapted("llama")
    rows = padded(sequences("llama"), side)
    keep = rows["attention_mask"][..., None]

    def trunk(called: Any) -> Tensor:
        states = called(input_ids=rows["input_ids"], attention_mask=rows["attention_mask"]).last_hidden_state
        return (states * keep).square().mean()

    trunk_module = model.base_model.model.model
    value, expected = by_terms(model, lambda: trunk(trunk_module), 0.25)  # through the hooks, with the token mask
    if reentrant is not None:
        checkpoint_activations(model, reentrant)
    check_against(model, lambda: trunk(trunk_module.forward), value, expected)


def test_stacks_of_an_encoder_decoder_that_are_called_apart() -> None:
    model, rows = adapted("t5"), padded(sequences("t5"))
    base = model.base_model.model

    def loss() -> Tensor:
        memory = base.encoder(input_ids=rows["input_ids"], attention_mask=rows["attention_mask"]).last_hidden_state
        states = base.decoder(
            input_ids=rows["decoder_input_ids"],
            attention_mask=rows["decoder_attention_mask"],
            encoder_hidden_states=memory,
            encoder_attention_mask=rows["attention_mask"],
        ).last_hidden_state
        return (states * rows["decoder_attention_mask"][..., None]).square().mean()

    check(model, loss)
    rows["decoder_input_ids"] = rows["decoder_input_ids"].where(rows["decoder_attention_mask"] > 0, 7)
    before = [p.grad.clone() for p in params(model)]
    model.zero_grad()
    (0.25 * fk.attach_aux_loss(model, loss())).backward()
    assert_same(model, before, 1e-9)  # the content of padding changes nothing
