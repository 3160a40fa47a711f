"""`token_mask`: tokens that the user states, for masks that the package cannot find."""

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fvae_kernels as fk
from fvae_kernels.training.forward import local
from tests.helpers.counted import assert_counted, forward_of
from tests.helpers.gradients import OPTIONS, adapted, assert_same, checkpoint_activations, grads
from tests.helpers.padded_batches import forget_position, padded, sequences


@pytest.fixture(autouse=True)
def _draw(monkeypatch: pytest.MonkeyPatch) -> None:
    forget_position(monkeypatch)


@pytest.fixture(autouse=True)
def _errors() -> Any:
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="FVAE")
        yield


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8).double()

    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return self.linear(x)


def net() -> Net:
    model = Net()
    fk.replace_linears(model, fk.FVAEConfig(rank=3, **OPTIONS))
    return model


KEEP = torch.tensor([[1, 1, 0], [1, 0, 0], [1, 1, 1]])


@pytest.mark.parametrize(
    ("shape", "mask"),
    [
        ((3, 3), KEEP.T),  # tokens first, as many as samples
        ((1, 9), KEEP.view(1, 9)),  # packed
        ((9,), KEEP),  # flattened, with the mask of the batch
        ((9,), KEEP.bool().flatten()),
        ((3, 3), KEEP.view(1, 3, 3)),  # two choices would be [2, 3, 3]
        ((6, 3), torch.stack([KEEP, 1 - KEEP])),
    ],
)
def test_it_takes_the_place_of_the_arguments(shape: tuple[int, ...], mask: Tensor) -> None:
    model, x = net(), torch.randn(*shape, 8).double()
    others = torch.ones(shape, dtype=torch.long) if len(shape) == 2 else None
    with fk.token_mask(mask):
        ((layer, _),) = forward_of(model, x, attention_mask=others).values()
    assert_counted(layer, x, mask.reshape(shape).bool())
    with fk.token_mask(mask), fk.token_mask(None):  # the inner one holds
        forward_of(model, x, attention_mask=others)
    assert_counted(layer, x, None)
    with fk.token_mask(mask):
        layer(x)  # without its model
    assert_counted(layer, x, mask.reshape(shape).bool())
    assert not local.masks


def test_pooled_rows_have_no_mask() -> None:
    model, x = net(), torch.randn(3, 8).double()
    with fk.token_mask(KEEP):
        ((layer, _),) = forward_of(model, x).values()
    assert_counted(layer, x, None)


@pytest.mark.parametrize("wide", [True, False])
def test_a_layer_with_other_tokens_takes_the_arguments(wide: bool) -> None:
    model, x = net(), torch.randn(3, 3, 8).double()
    stated = KEEP[:, :2] if not wide else torch.ones(3, 4)
    with fk.token_mask(stated):
        ((layer, _),) = forward_of(model, x, attention_mask=KEEP).values()
    assert_counted(layer, x, KEEP.bool())
    with fk.token_mask(stated), pytest.warns(UserWarning, match=r"token_mask has shape .* tokens \(3, 3\) \(linear\)"):
        forward_of(model, x)
    assert_counted(layer, x, None)


@pytest.mark.parametrize("reentrant", [None, True, False], ids=["plain", "reentrant", "non-reentrant"])
def test_a_decoder_masked_by_its_labels(reentrant: bool | None) -> None:
    """As many tokens in both stacks: the mask goes by the argument that a layer's tokens have."""
    model, rows = adapted("t5"), padded(sequences("t5"))
    rows["labels"] = rows["labels"].where(rows["decoder_attention_mask"] > 0, -100)
    model(**rows).loss.backward()
    expected = grads(model)
    model.zero_grad()
    keep = rows.pop("decoder_attention_mask")
    if reentrant is not None:
        checkpoint_activations(model, reentrant)
    with fk.token_mask(decoder_attention_mask=rows["labels"] != -100):
        loss = model(**rows).loss
    loss.backward()
    assert_same(model, expected, 1e-6)
    with fk.token_mask(decoder_attention_mask=keep):
        for name, (layer, x) in forward_of(model, **rows).items():
            of_encoder = name.startswith("encoder.") or name.endswith("EncDecAttention.v")
            assert_counted(layer, x, (rows["attention_mask"] if of_encoder else keep).bool())


def test_cross_attention_reads_the_encoders_tokens() -> None:
    from transformers import BertConfig, BertLMHeadModel

    sizes = {"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    config = BertConfig(**sizes, vocab_size=40, is_decoder=True, add_cross_attention=True)
    model = BertLMHeadModel(config).double().train()
    fk.replace_linears(model, fk.FVAEConfig(rank=3, **OPTIONS), ["query", "key", "value"])
    mask = KEEP.flip(0)
    given = {"input_ids": torch.arange(9).view(3, 3), "attention_mask": KEEP, "encoder_attention_mask": mask}
    for name, (layer, x) in forward_of(model, encoder_hidden_states=torch.randn(3, 3, 24).double(), **given).items():
        reads = "crossattention" in name and not name.endswith("query")
        assert_counted(layer, x, (mask if reads else KEEP).bool())


def test_multiple_choice_needs_no_word() -> None:
    from transformers import BertConfig, BertForMultipleChoice

    sizes = {"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    model = BertForMultipleChoice(BertConfig(**sizes, vocab_size=40)).double().train()
    fk.replace_linears(model, fk.FVAEConfig(rank=3, **OPTIONS), ["query"])
    mask = torch.stack([KEEP, KEEP.flip(0)], 1)  # [samples, choices, tokens]
    given = {"input_ids": torch.randint(40, (3, 2, 3)), "attention_mask": mask}
    for layer, x in forward_of(model, **given).values():
        assert_counted(layer, x, mask.view(6, 3).bool())


@pytest.mark.parametrize(
    ("masks", "arguments", "says"),
    [
        ((), {"mask_decoder": KEEP}, "an argument 'mask_decoder'; expected a mask, or masks by name"),
        ((KEEP,), {"attention_mask": KEEP}, "a mask for all layers and masks by argument"),
    ],
)
def test_wrong_arguments(masks: Any, arguments: dict[str, Tensor], says: str) -> None:
    with pytest.raises(TypeError, match=says), fk.token_mask(*masks, **arguments):
        pass
    assert not local.masks
