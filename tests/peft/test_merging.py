"""Linear encoders merge into the base weight, others refuse; unloading restores the base model."""

import copy
from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
import transformers
from torch import nn

import fvae_kernels as fk
from tests.helpers.peft_models import KINDS, LINEAR, SMALL, adapted, config_for, layers, logits, train_step
from tests.helpers.tiny_models import DIM, assert_state, build, state_of

pytestmark = [
    pytest.mark.compat("PEFT", "merge, unmerge, unload (a linear encoder; others refuse)"),
    pytest.mark.filterwarnings("ignore:FVAE. the auxiliary loss entered:UserWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning:peft"),
]


def conv1d(bias: bool) -> nn.Module:
    module = transformers.pytorch_utils.Conv1D(32, DIM)
    if not bias:
        nn.init.zeros_(module.bias)
    return module


LINEAR_LAYERS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(DIM, 32),
    "linear, no bias": lambda: nn.Linear(DIM, 32, bias=False),
    "conv1d": lambda: conv1d(True),
    "conv1d, zero bias": lambda: conv1d(False),
}


@pytest.mark.parametrize("layer", list(LINEAR_LAYERS))
def test_merge_and_unmerge_one_layer(layer: str) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(LINEAR_LAYERS[layer](), nn.ReLU(), nn.Linear(32, 3))
    x = torch.randn(4, 5, DIM)
    before = copy.deepcopy(net)
    options = {**SMALL, **LINEAR, "init_weights": False}
    model = peft.get_peft_model(net, fk.FVAELoraConfig(target_modules=["0"], **options)).eval()
    expected, base = model(x), before(x)
    assert (expected - base).abs().max() > 1e-3
    model.merge_adapter()
    wrapped = model.base_model.model[0]
    assert wrapped.merged
    torch.testing.assert_close(model(x), expected, rtol=1e-6, atol=1e-6)
    assert torch.equal(model.train()(x), model(x)), "a merged layer does not sample"
    model.eval()
    model.unmerge_adapter()
    assert not wrapped.merged
    torch.testing.assert_close(wrapped.base_layer.weight, before[0].weight, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(model(x), expected, rtol=1e-6, atol=1e-6)
    merged = model.merge_and_unload(safe_merge=True)
    assert type(merged[0]) is type(before[0])
    torch.testing.assert_close(merged(x), expected, rtol=1e-6, atol=1e-6)
    assert merged.state_dict().keys() == before.state_dict().keys()


@pytest.mark.parametrize("kind", KINDS)
def test_merge_and_unload(kind: str) -> None:
    model = adapted(kind, **LINEAR)
    train_step(model, kind)
    expected = logits(model.eval(), kind)
    merged = model.merge_and_unload()
    torch.testing.assert_close(logits(merged, kind), expected, rtol=1e-5, atol=1e-6 * float(expected.abs().max() + 1))
    assert not layers(merged)
    hooks = state_of(build(kind))["hooks"]
    assert state_of(merged)["hooks"][""] == hooks[""]
    assert not hasattr(merged, "_fvae_hooks")
    again = peft.get_peft_model(merged, config_for(kind))
    train_step(again, kind)


def test_two_adapters_merge() -> None:
    model = adapted("llama", **LINEAR).eval()
    model.add_adapter("other", config_for("llama", r=2, **LINEAR))
    model.base_model.set_adapter(["default", "other"])
    expected = logits(model, "llama")
    model.merge_adapter()
    torch.testing.assert_close(logits(model, "llama"), expected, rtol=1e-5, atol=1e-6)
    with model.disable_adapter():
        base = logits(build("llama").eval(), "llama")
        torch.testing.assert_close(logits(model, "llama"), base, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("options", [{"encoder_hidden": (5,)}, {"sample_at_inference": True}])
@pytest.mark.parametrize("how", ["merge_adapter", "merge_and_unload", "by name"])
def test_what_is_no_matrix_is_not_merged(options: dict[str, Any], how: str) -> None:
    model = adapted("llama", target_modules=["q_proj"], **LINEAR)
    model.add_adapter("other", config_for("llama", **{**LINEAR, **options, "target_modules": ["v_proj"]}))
    if how != "by name":
        model.base_model.set_adapter(["default", "other"])
    before = state_of(model)
    options = {"adapter_names": ["default", "other"]} if how == "by name" else {}
    with pytest.raises(ValueError, match=r"(?s)cannot merge.*no weight matrix equals it"):
        getattr(model, "merge_and_unload" if how == "by name" else how)(**options)
    assert_state(model, before)
    assert not any(layer.merged for layer in layers(model).values())
    model.set_adapter("default")
    model.merge_and_unload(adapter_names=["default"])


def test_safe_merge_refuses_a_broken_adapter() -> None:
    model = adapted("bert", **LINEAR)
    layer = next(iter(layers(model).values()))
    nn.init.constant_(layer.fvae_adapter["default"].B, float("nan"))
    weight = layer.base_layer.weight.clone()
    with pytest.raises(ValueError, match="NaNs detected in the merged weights"):
        model.merge_adapter(safe_merge=True)
    assert torch.equal(layer.base_layer.weight, weight)


@pytest.mark.parametrize("kind", KINDS)
def test_unload_returns_the_base_model(kind: str) -> None:
    base = build(kind).eval()
    logits(base, kind)  # transformers sets hooks of its own at the first forward
    reference = state_of(base)
    model = peft.get_peft_model(base, config_for(kind, task_type=None))
    train_step(model, kind)
    restored = model.eval().unload()
    after = state_of(restored)
    for key in ("types", "hooks"):
        assert after[key] == reference[key]
    assert all(torch.equal(value, reference["values"][name]) for name, value in after["values"].items())
    assert after["values"].keys() == reference["values"].keys()
    assert not hasattr(restored, "_fvae_hooks")
