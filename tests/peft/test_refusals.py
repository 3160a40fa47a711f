"""Targets, configs and inputs that do not fit. A refused call changes nothing."""

from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

import fvae_kernels as fk
from fvae_kernels.peft import FVAELoraLinear
from tests.helpers.peft_models import NATIVE, SMALL, config_for
from tests.helpers.tiny_models import assert_state, build, state_of

pytestmark = [
    pytest.mark.filterwarnings("ignore:FVAE. the auxiliary loss entered:UserWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning:peft"),
]


HAS_REMAP = hasattr(peft.tuners.tuners_utils.BaseTuner, "_remap_adapter_state_dict_for_load")


class Mixed(nn.Module):
    """Layers of several kinds."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.linear = nn.Embedding(10, 3 * 8 * 8), nn.Linear(8, 4)
        self.conv = nn.Conv2d(3, 2, 3, padding=1)
        self.blocks = nn.ModuleList([nn.Linear(4, 4)])
        self.attention = nn.MultiheadAttention(4, 1)

    def forward(self, ids: Tensor) -> Tensor:
        return self.blocks[0](self.linear(self.conv(self.embed(ids).view(-1, 3, 8, 8))))


BAD_TARGETS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "unknown": ({"target_modules": ["nowhere"]}, ValueError, "not found in the base model"),
    "unknown expression": ({"target_modules": "nowhere.*"}, ValueError, "not found in the base model"),
    "all excluded": ({"target_modules": ["linear"], "exclude_modules": ["linear"]}, ValueError, "(?i)exclude"),
    "embedding": ({"target_modules": ["linear", "embed"]}, TypeError, "cannot adapt Embedding"),
    "convolution": ({"target_modules": ["linear", "conv"]}, TypeError, "cannot adapt Conv2d"),
    "container": ({"target_modules": ["linear", "blocks"]}, TypeError, "cannot adapt ModuleList"),
    "saved container": ({"target_modules": ["linear"], "modules_to_save": ["blocks"]}, TypeError, "ModuleList"),
    "never called": ({"target_modules": "all-linear"}, TypeError, "exclude_modules=.'out_proj'"),
    "none": ({"target_modules": None}, ValueError, "specify `target_modules`"),
}


@pytest.mark.parametrize("how", ["get_peft_model", "inject", "add_adapter"])
@pytest.mark.parametrize("fault", list(BAD_TARGETS))
def test_bad_targets(fault: str, how: str) -> None:
    options, error, message = BAD_TARGETS[fault]
    if how == "add_adapter" and error is ValueError and not HAS_REMAP:
        pytest.skip("before 0.21 PEFT looks for the target modules of all adapters together")
    model: Any = Mixed().eval()
    if how == "add_adapter":
        model = peft.get_peft_model(model, fk.FVAELoraConfig(**SMALL, target_modules=["linear"]))
    before = state_of(model)
    bad = fk.FVAELoraConfig(**SMALL, **options)
    call = {
        "get_peft_model": lambda: peft.get_peft_model(model, bad),
        "inject": lambda: peft.inject_adapter_in_model(bad, model, "other"),
        "add_adapter": lambda: model.add_adapter("other", bad),
    }[how]
    with pytest.raises(error, match=message):
        call()
    assert_state(model, before)
    good = fk.FVAELoraConfig(**SMALL, target_modules=["linear", "0"])
    if how == "add_adapter":
        assert list(model.peft_config) == ["default"]
        model.add_adapter("other", good)
        model.set_adapter("other")
    else:
        model = peft.get_peft_model(model, good)
    model.train()(torch.arange(4)).sum().backward()


@NATIVE
def test_a_failed_native_adapter_can_be_tried_again() -> None:
    model = build("bert")
    before = state_of(model)
    with pytest.raises(ValueError, match="not found"):
        model.add_adapter(config_for(target_modules=["nowhere"]))
    assert_state(model, before)
    model.add_adapter(config_for())
    before = state_of(model)
    with pytest.raises(TypeError, match="cannot adapt Embedding"):
        model.add_adapter(config_for(target_modules=["query", "word_embeddings"]), "other")
    assert_state(model, before)
    model.add_adapter(config_for(), "other")
    assert sum(isinstance(m, FVAELoraLinear) for m in model.modules()) == 4


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"lora_alpha": 1}, TypeError, r"no option \['lora_alpha'\].*encoder_hidden"),
        ({"r": 0}, ValueError, "rank=0"),
        ({"rank_pattern": {"query": 0}}, ValueError, "rank=0"),
        ({"alpha_pattern": {"query": "big"}}, ValueError, "alpha='big'"),
        ({"inference_only": True, "sample_at_inference": True}, ValueError, "sample_at_inference"),
        ({"target_modules": "all-linear", "layers_to_transform": [0]}, ValueError, "layers_to_transform needs"),
        ({"target_modules": ["q"], "layers_pattern": "layer"}, ValueError, "layers_to_transform too"),
        ({"task_type": "DREAMING"}, ValueError, "Invalid task type"),
    ],
)
def test_bad_configs(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"(?s){message}"):
        fk.FVAELoraConfig(**options)


# Inputs


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        (torch.zeros(2, 5), ValueError, r"x has shape \(2, 5\); expected \[..., 8\]"),
        (torch.tensor(1.0), ValueError, r"x has shape \(\)"),
        (torch.zeros(2, 8, dtype=torch.long), TypeError, "x is torch.int64; expected a floating-point tensor"),
    ],
)
def test_bad_inputs(x: Tensor, error: type[Exception], message: str, train: bool) -> None:
    model = peft.get_peft_model(nn.Sequential(nn.Linear(8, 4)), fk.FVAELoraConfig(**SMALL, target_modules=["0"]))
    with pytest.raises(error, match=message):
        model.train(train)(x)
    assert model(torch.zeros(0, 8)).shape == (0, 4)
