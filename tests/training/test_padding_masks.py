"""Which tokens of a layer count, for every way to pass padding to a model."""

import re
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fvae_kernels as fk
from fvae_kernels.training import padding, warn
from tests.helpers.counted import assert_counted, forward_of
from tests.helpers.gradients import OPTIONS, adapted
from tests.helpers.padded_batches import Batch, forget_position, padded, sequences
from tests.helpers.tiny_models import TARGETS, batch, build


@pytest.fixture(autouse=True)
def _draw(monkeypatch: pytest.MonkeyPatch) -> None:
    forget_position(monkeypatch)


def test_a_decoder_without_a_mask_has_no_padding() -> None:
    model, inputs = adapted("t5"), padded(sequences("t5"))
    inputs.pop("decoder_attention_mask")
    for name, (layer, x) in forward_of(model, **inputs).items():
        of_encoder = name.startswith("encoder.") or name.endswith("EncDecAttention.v")
        assert_counted(layer, x, inputs["attention_mask"] if of_encoder else None)


def test_it_can_be_switched_off() -> None:
    model, inputs = adapted("bert", mask_padding=False), padded(sequences("bert"))
    for layer, x in forward_of(model, **inputs).values():
        assert_counted(layer, x, None)


def test_embedded_inputs_with_a_prefix() -> None:
    model, inputs = adapted("llama"), padded(sequences("llama"))
    embedded = model.get_input_embeddings()(inputs.pop("input_ids"))
    prefix = torch.randn(3, 2, embedded.shape[-1]).double()
    mask = torch.cat([torch.ones(3, 2, dtype=torch.long), inputs["attention_mask"]], 1)
    called = {"inputs_embeds": torch.cat([prefix, embedded], 1), "attention_mask": mask}
    for layer, x in forward_of(model, **called).values():
        assert_counted(layer, x, mask)


class Wrapper(nn.Module):
    """A user's model around one of transformers; it takes its batch as one mapping."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = build("bert").double()

    def forward(self, batch: Batch) -> Tensor:
        return self.backbone(batch["input_ids"], attention_mask=batch["attention_mask"]).logits


def test_masks_by_position_and_inside_a_mapping() -> None:
    inputs = padded(sequences("bert"))
    model = adapted("bert")
    base = model.base_model.model
    for layer, x in forward_of(base, inputs["input_ids"], inputs["attention_mask"].bool()).values():
        assert_counted(layer, x, inputs["attention_mask"])
    wrapper = Wrapper().train()
    fk.replace_linears(wrapper, fk.FVAEConfig(rank=3, **OPTIONS), TARGETS["bert"])
    for layer, x in forward_of(wrapper, inputs).values():
        assert_counted(layer, x, inputs["attention_mask"])


def test_whisper_frames() -> None:
    model, inputs = adapted("whisper"), batch("whisper", dtype=torch.float64)
    mask = torch.ones(2, 12, dtype=torch.long)
    mask[1, 7:] = 0  # 7 frames of features, 4 after the convolution of stride 2
    encoded = torch.arange(6) < torch.tensor([[6], [4]])
    for name, (layer, x) in forward_of(model, attention_mask=mask, **inputs).items():
        of_encoder = ".encoder." in name or name.endswith("encoder_attn.v_proj")
        assert_counted(layer, x, encoded if of_encoder else None)


def test_flattened_tokens_pooled_rows_and_images() -> None:
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    masks = padding.Padding({"attention_mask": mask})
    assert torch.equal(masks.flags("attention_mask", torch.zeros(6, 4)), mask.flatten().bool())
    assert masks.flags("attention_mask", torch.zeros(2, 4)) is None
    assert masks.flags(None, torch.zeros(2, 3, 4)) is None
    assert masks.flags("decoder_attention_mask", torch.zeros(2, 3, 4)) is None
    assert not warn.said
    model = build("vit")
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    assert {padding.mask_argument(model, name) for name in names} == {None}


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(24, 4).double()

    def forward(self, x: Tensor, attention_mask: Any) -> Tensor:
        return self.linear(x)


@pytest.mark.parametrize(
    ("mask", "says"),
    [
        (lambda m: m[:, None, None, :].expand(3, 1, 7, 7).bool(), r"has shape \(3, 1, 7, 7\), and only a mask \[batch"),
        (lambda m: torch.cat([m, m], 1), r"has shape \(3, 14\), and an adapted layer's input has tokens \(3, 7\)"),
        (lambda m: {"full_attention": m}, "is a dict, and only"),
    ],
)
def test_a_mask_that_fits_no_tokens_warns_once_and_all_count(mask: Callable[[Tensor], Any], says: str) -> None:
    whole, block = padded(sequences("bert"))["attention_mask"], Block()
    fk.replace_linears(block, fk.FVAEConfig(rank=3, **OPTIONS))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            for layer, x in forward_of(block, torch.randn(3, 7, 24).double(), mask(whole)).values():
                assert_counted(layer, x, None)
    (warning,) = caught
    assert re.match(f"FVAE: attention_mask {says}.*mask_padding=False", str(warning.message))


def test_a_layer_called_alone_after_its_model_counts_all_tokens() -> None:
    model, inputs = adapted("bert"), padded(sequences("bert"))
    layer, x = next(iter(forward_of(model, **inputs).values()))
    layer(x)
    assert_counted(layer, x, None)
