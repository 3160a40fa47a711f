"""What PEFT expects of a method apart from training: status, names, switches, warnings, clear errors."""

import warnings
from pathlib import Path

import peft
import pytest
import torch
from peft.utils.hotswap import hotswap_adapter

from tests.helpers.peft_models import KINDS, LAYERS, adapted, config_for, train_step
from tests.helpers.tiny_models import assert_state, batch, build, state_of

pytestmark = [
    pytest.mark.filterwarnings("ignore:FVAE. the auxiliary loss entered:UserWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning:peft"),
]


@pytest.mark.parametrize("kind", KINDS)
def test_status_of_model_and_layers(kind: str) -> None:
    model = adapted(kind)
    status = model.get_model_status()
    assert (status.adapter_model_type, status.peft_types) == ("FVAELoraModel", {"default": "FVAE"})
    assert (status.enabled, status.active_adapters, status.merged_adapters) == (True, ["default"], [])
    found = [layer for layer in model.get_layer_status() if layer.module_type == "fvae.FVAELoraLinear"]
    assert len(found) == LAYERS[kind]
    assert all(layer.requires_grad == {"default": True} for layer in found)


def test_every_parameter_of_an_adapter_is_trained_and_nothing_else() -> None:
    model = adapted(task_type=None)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    train_step(model, "bert")
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]) == ("fvae_adapter" not in name), name


def test_requires_grad_of_one_adapter() -> None:
    model = adapted()
    model.add_adapter("other", config_for())
    model.set_requires_grad("default", requires_grad=False)
    model.set_requires_grad("other")
    trained = {name for name, p in model.named_parameters() if p.requires_grad and "fvae_adapter" in name}
    assert trained
    assert all(".other." in name for name in trained)


def test_repr_names_the_layers_and_their_adapters() -> None:
    model = adapted()
    model.add_adapter("other", config_for(r=2))
    text = repr(model)
    assert text.count("fvae.FVAELoraLinear(") == 2  # in one block; equal blocks are printed once
    assert "(default): FVAEAdapter(in_features=24, out_features=24, rank=3)" in text
    assert "(other): FVAEAdapter(in_features=24, out_features=24, rank=2)" in text


def test_the_config_tells_whether_it_is_for_inference(tmp_path: Path) -> None:
    model = adapted()
    assert not model.peft_config["default"].inference_mode
    model.save_pretrained(tmp_path)
    assert not model.peft_config["default"].inference_mode, "saving does not end the training"
    assert peft.PeftConfig.from_pretrained(tmp_path).inference_mode
    assert model.active_adapter == "default"
    assert model.active_adapters == ["default"]


def test_an_adapter_named_like_the_prefix_warns() -> None:
    with pytest.warns(UserWarning, match="'fvae' should not be contained in the prefix 'fvae_'"):
        peft.get_peft_model(build("bert"), config_for(), adapter_name="fvae")


def test_a_second_get_peft_model_warns() -> None:
    model = adapted()
    with pytest.warns(UserWarning, match="modify a model with PEFT for a second time"):
        peft.get_peft_model(model.base_model.model, config_for())


def test_an_ordinary_life_warns_of_nothing(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        warnings.filterwarnings("ignore", "Could not find a config file")  # older PEFT warns if the base has no file
        model = adapted(kl_weight=10.0)
        train_step(model, "bert")
        model.save_pretrained(tmp_path)
        peft.PeftModel.from_pretrained(build("bert"), tmp_path)


def test_hotswapping_is_refused(tmp_path: Path) -> None:
    model = adapted()
    model.save_pretrained(tmp_path)
    before = state_of(model)
    with pytest.raises(ValueError, match="Hotswapping only supports LORA but FVAE was passed"):
        hotswap_adapter(model, tmp_path, "default")
    assert_state(model, before)


def test_weighted_adapters_with_hidden_layers_are_refused() -> None:
    model = adapted()
    with pytest.raises(ValueError, match="its update is no matrix"):
        model.add_weighted_adapter(["default"], [1.0], "mixed")


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_with_embeddings_that_need_gradients(reentrant: bool) -> None:
    model = adapted("llama")
    model.base_model.model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    model.train()(**batch("llama")).loss.backward()
    assert all(p.grad is not None for name, p in model.named_parameters() if "fvae_adapter" in name)
