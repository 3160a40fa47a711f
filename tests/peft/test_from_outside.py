"""What users of PEFT rely on: a signature, a dict like its file, scaling of adapters, tied weights."""

import inspect
import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import fvae_kernels as fk
from tests.helpers.peft_models import CONFIG, WEIGHTS, adapted, config_for, layers, logits, train_step
from tests.helpers.tiny_models import build

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:peft")
LINEAR: dict[str, Any] = {"encoder_hidden": (), "kl_weight": 10.0}


def test_the_signature_names_the_options() -> None:
    names = set(inspect.signature(fk.FVAELoraConfig).parameters)
    assert {"r", "alpha", "kl_weight", "target_modules", "task_type"} <= names
    assert not {"self", "args", "kwargs"} & names
    assert inspect.signature(fk.FVAELoraConfig).parameters["r"].default == fk.FVAELoraConfig().r


def test_the_dict_of_a_config_is_its_file(tmp_path: Path) -> None:
    config = config_for(loss_weight={"query": 1.0, ".*": 0.5}, gamma_weight=(1.0, 0.5))
    config.save_pretrained(tmp_path)
    assert config.to_dict() == json.loads((tmp_path / CONFIG).read_text())
    assert type(config)(**config.to_dict()) == config


def test_options_of_a_newer_version_are_dropped_from_a_file_by_name(tmp_path: Path) -> None:
    model = adapted().eval()
    model.save_pretrained(tmp_path)
    written = json.loads((tmp_path / CONFIG).read_text())
    (tmp_path / CONFIG).write_text(json.dumps(written | {"annealed": True, "z_3": 1}))
    with pytest.warns(UserWarning, match=r"\['annealed', 'z_3'\].*ignored"):
        found = peft.PeftModel.from_pretrained(build("bert"), tmp_path).eval()
    assert torch.equal(logits(found), logits(model))
    with pytest.raises(TypeError, match=r"no option \['annealed'\]"):
        fk.FVAELoraConfig(**{**written, "annealed": True})  # in code it is a typo


def test_a_newer_file_whose_weights_do_not_fit_is_refused(tmp_path: Path) -> None:
    adapted().save_pretrained(tmp_path)
    written = json.loads((tmp_path / CONFIG).read_text())
    (tmp_path / CONFIG).write_text(json.dumps(written | {"z_3": 1}))
    state = load_file(tmp_path / WEIGHTS)
    name = next(name for name in state if name.endswith("decoder_out_weight"))
    save_file({**state, name.replace("decoder_out", "encoder3_mean"): state[name].clone()}, tmp_path / WEIGHTS)
    base = build("bert")
    with (
        pytest.warns(UserWarning, match=r"\['z_3'\].*ignored"),
        pytest.raises(ValueError, match=r"does not fit .* encoder3_mean_weight is"),
    ):
        peft.PeftModel.from_pretrained(base, tmp_path)
    assert not any("fvae" in name for name, _ in base.named_modules())


def test_a_pickle_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    model, folder = adapted(), tmp_path / "new"
    with pytest.raises(ValueError, match="safe_serialization=False would write the adapter 'default' as a pickle"):
        model.save_pretrained(folder, safe_serialization=False)
    assert not folder.exists()
    lora = peft.get_peft_model(build("bert"), peft.LoraConfig(target_modules=["query"]))
    lora.save_pretrained(folder, safe_serialization=False)  # other methods may still write pickles
    assert (folder / "adapter_model.bin").exists()


def test_scaling_of_an_adapter() -> None:
    model = adapted().eval()
    layer = next(iter(layers(model).values()))
    x = torch.randn(3, layer.in_features)
    nn.init.normal_(layer.fvae_adapter["default"].encoder1_mean_weight)
    base, full = layer.base_layer(x), layer(x)

    def share() -> float:
        return float((layer(x) - base).norm() / (full - base).norm())

    for call, expected in (
        (lambda: layer.set_scale("default", 0.5), 0.5),
        (lambda: layer.set_scale("unknown", 7.0), 0.5),
        (lambda: layer.scale_layer(3.0), 1.5),
        (lambda: layer.unscale_layer(2.0), 0.75),
        (lambda: layer.unscale_layer(), 1.0),
    ):
        call()
        assert share() == pytest.approx(expected, rel=1e-4)
    assert torch.equal(layer(x), full)


def test_a_merged_adapter_is_not_scaled() -> None:
    model = adapted(**LINEAR).eval()
    model.merge_adapter()
    layer = next(iter(layers(model).values()))
    with pytest.raises(RuntimeError, match=r"cannot scale \['default'\] while merged"):
        layer.set_scale("default", 0.5)


@pytest.mark.parametrize("how", ["peft", "replaced"])
def test_merging_leaves_a_tied_weight_alone(how: str) -> None:
    model: Any = build("llama", tie_word_embeddings=True).eval()
    embeddings = model.get_input_embeddings().weight
    before = embeddings.clone()
    if how == "peft":
        config = fk.FVAELoraConfig(r=3, target_modules=["lm_head"], init_weights=False, decoder_hidden=(7,), **LINEAR)
        model = peft.get_peft_model(model, config).eval()
    else:
        fk.replace_linears(model, fk.FVAEConfig(rank=3, decoder_hidden=(7,), **LINEAR), ["lm_head"])
        nn.init.normal_(model.lm_head.adapter.encoder1_mean_weight)
        nn.init.normal_(model.lm_head.adapter.B)
        model.eval()
    expected = logits(model, "llama")
    (model.merge_adapter if how == "peft" else model.lm_head.merge)()
    assert torch.equal(embeddings, before)
    torch.testing.assert_close(logits(model, "llama"), expected, rtol=1e-4, atol=1e-4)
    (model.unmerge_adapter if how == "peft" else model.lm_head.unmerge)()
    torch.testing.assert_close(logits(model, "llama"), expected, rtol=1e-4, atol=1e-4)
    if how == "replaced":
        assert model.lm_head.base_layer.weight is embeddings


def test_the_state_of_a_merged_layer_holds_the_adapter_once() -> None:
    layer = fk.FusedFVAELinear.from_linear(nn.Linear(6, 5), fk.FVAEConfig(rank=2, **LINEAR)).eval()
    nn.init.normal_(layer.adapter.encoder1_mean_weight)
    nn.init.normal_(layer.adapter.B)
    x, state = torch.randn(3, 6), {name: value.clone() for name, value in layer.state_dict().items()}
    expected = layer(x)
    layer.merge()
    merged = layer.state_dict()
    assert all(torch.equal(merged[name], value) for name, value in state.items())
    fresh = fk.FusedFVAELinear.from_linear(nn.Linear(6, 5), fk.FVAEConfig(rank=2, **LINEAR)).eval()
    fresh.load_state_dict(merged)
    torch.testing.assert_close(fresh(x), expected)
    layer.load_state_dict(state)  # the layer is merged, and stays so
    assert layer.merged
    torch.testing.assert_close(layer(x), expected)


def test_an_adapter_trains_on_after_scaling() -> None:
    model = adapted()
    for layer in layers(model).values():
        layer.scale_layer(0.5)
    train_step(model, "bert")
