"""Adapters are saved and loaded by PEFT, by its Auto classes, and by transformers itself."""

from pathlib import Path

import peft
import pytest
import torch
from torch import nn

import fvae_kernels as fk
from tests.helpers.peft_models import (
    AUTO,
    KINDS,
    LAYERS,
    NATIVE,
    adapted,
    config_for,
    layers,
    logits,
    saved_base_and_adapter,
    train_step,
)
from tests.helpers.tiny_models import DIM, batch, build

pytestmark = [
    pytest.mark.compat(
        "PEFT",
        "save and load, also to train on and with `low_cpu_mem_usage`; Auto classes; `add_adapter` of transformers",
    ),
    pytest.mark.filterwarnings("ignore:FVAE. the auxiliary loss entered:UserWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning:peft"),
]


@pytest.mark.compat("Models", "BERT, ViT, Llama, GPT-2 (Conv1D), T5, Wav2Vec2, Whisper: trained, saved, loaded")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["default", "bert", "a"])  # "bert" is a module's name too
def test_save_and_load(kind: str, name: str, tmp_path: Path) -> None:
    model = adapted(kind)
    train_step(model, kind)
    expected = logits(model.eval(), kind)
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(build(kind), tmp_path, adapter_name=name)
    assert not loaded.training
    assert torch.equal(logits(loaded, kind), expected)
    assert not any(p.requires_grad for p in loaded.parameters())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("options", [{"is_trainable": True}, {"low_cpu_mem_usage": True}])
def test_load_to_train_and_with_little_memory(kind: str, options: dict[str, bool], tmp_path: Path) -> None:
    model = adapted(kind).eval()
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(build(kind), tmp_path, **options)
    assert all(p.device.type == "cpu" for p in loaded.parameters())
    assert torch.equal(logits(loaded.eval(), kind), logits(model, kind))
    trained = {n for n, p in loaded.named_parameters() if p.requires_grad}
    if "is_trainable" in options:
        assert trained == {n for n, p in model.named_parameters() if p.requires_grad}
        train_step(loaded, kind)
        assert not torch.equal(logits(loaded.eval(), kind), logits(model, kind))
    else:
        assert trained == set()


@pytest.mark.skipif(
    tuple(map(int, peft.__version__.split(".")[:2])) < (0, 20),
    reason="before 0.20 PEFT writes the tensors of all adapters into the file of each, and we refuse to read them",
)
def test_two_saved_adapters_keep_apart(tmp_path: Path) -> None:
    model = adapted("bert").eval()
    model.add_adapter("other", config_for("bert"))
    expected = {}
    for name in ("default", "other"):
        model.set_adapter(name)
        expected[name] = logits(model, "bert")
    model.save_pretrained(tmp_path)
    assert sorted(p.name for p in (tmp_path / "other").iterdir() if p.suffix != ".md") == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    loaded = peft.PeftModel.from_pretrained(build("bert"), tmp_path / "other", adapter_name="x")
    assert torch.equal(logits(loaded, "bert"), expected["other"])
    loaded.load_adapter(tmp_path, "y")
    assert torch.equal(logits(loaded, "bert"), expected["other"])
    loaded.set_adapter("y")
    assert torch.equal(logits(loaded, "bert"), expected["default"])
    assert not torch.equal(expected["default"], expected["other"])


def test_weights_loaded_into_an_adapter_that_is_there(tmp_path: Path) -> None:
    first, second = adapted("bert").eval(), adapted("bert").eval()
    train_step(first, "bert")
    first.save_pretrained(tmp_path)
    second.load_adapter(tmp_path, "default", is_trainable=True)
    assert torch.equal(logits(second.eval(), "bert"), logits(first.eval(), "bert"))


def test_config_goes_through_its_file(tmp_path: Path) -> None:
    tables = {"rank_pattern": {"value": 1, "query": 2}, "alpha_pattern": {"value": 4.0, ".*": 2.0}}
    options = {"gamma_weight": (1.0, 0.5), "separate_hidden": True, "loss_weight": {"query": 0.5, ".*": 1.0}}
    config = config_for("bert", **tables, **options)
    config.save_pretrained(tmp_path)
    for cls in (peft.PeftConfig, fk.FVAELoraConfig):
        loaded = cls.from_pretrained(tmp_path)
        assert type(loaded) is fk.FVAELoraConfig
        assert loaded == config
        for name in ("loss_weight", "rank_pattern", "alpha_pattern"):
            assert list(getattr(loaded, name)) == list(getattr(config, name)), "the first pattern that matches counts"


def test_a_config_alone_starts_a_fresh_adapter(tmp_path: Path) -> None:
    config_for("bert").save_pretrained(tmp_path)
    model = peft.get_peft_model(build("bert"), fk.FVAELoraConfig.from_pretrained(tmp_path))
    train_step(model, "bert")


def test_the_config_of_a_saved_adapter_fits_another_size_of_model(tmp_path: Path) -> None:
    adapted("bert").save_pretrained(tmp_path)
    config = fk.FVAELoraConfig.from_pretrained(tmp_path)
    larger = build("bert")
    larger.bert.encoder.layer[0].attention.self.query = nn.Linear(DIM, 2 * DIM)
    with pytest.raises(ValueError, match=r"dataclasses\.replace"):
        peft.get_peft_model(larger, config)
    from dataclasses import replace

    fresh = peft.get_peft_model(larger, replace(config, inference_mode=False))
    assert any(p.requires_grad for p in fresh.parameters())


AUTO_PEFT = {"bert": peft.AutoPeftModelForSequenceClassification, "llama": peft.AutoPeftModelForCausalLM}


@pytest.mark.parametrize("kind", list(AUTO_PEFT))
def test_auto_peft_model(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("peft.auto.check_file_exists_on_hf_hub", lambda *_, **__: False)  # for the tokenizer
    model = saved_base_and_adapter(kind, tmp_path)
    loaded = AUTO_PEFT[kind].from_pretrained(str(tmp_path / "adapter"))
    assert torch.equal(logits(loaded.eval(), kind), logits(model, kind))


# transformers' own adapters, without a PeftModel


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "wav2vec2"])  # its load_adapter does something else
def test_auto_model_from_an_adapter_folder(kind: str, tmp_path: Path) -> None:
    model = saved_base_and_adapter(kind, tmp_path)
    loaded = AUTO[kind].from_pretrained(tmp_path / "adapter")
    assert len(layers(loaded)) == LAYERS[kind]
    assert torch.equal(logits(loaded.eval(), kind), logits(model, kind))


@NATIVE
def test_native_adapters(tmp_path: Path) -> None:
    model = build("bert").eval()
    base = logits(model, "bert")
    model.add_adapter(config_for("bert"), "a")
    model.eval()
    first = logits(model, "bert")
    model.add_adapter(config_for("bert"), "b")
    assert torch.equal(logits(model, "bert"), logits(model, "bert")), "an adapter that joins must not sample"
    second = logits(model, "bert")
    assert not torch.equal(first, second)
    model.set_adapter("a")
    assert torch.equal(logits(model, "bert"), first)
    model.disable_adapters()
    assert torch.equal(logits(model, "bert"), base)
    model.enable_adapters()
    model.save_pretrained(tmp_path)
    loaded = build("bert")
    loaded.load_adapter(str(tmp_path), "c")
    assert torch.equal(logits(loaded, "bert"), first), "loaded for inference: eval mode, no sampling"
    model.delete_adapter("a")
    model.set_adapter("b")
    assert torch.equal(logits(model, "bert"), second)
    assert not any(".a." in key for key in model.state_dict())


@NATIVE
def test_native_adapter_trains_with_the_auxiliary_loss() -> None:
    model = build("bert")
    model.add_adapter(config_for("bert", loss_weight=0.5))
    model.train()
    loss = model(**batch("bert")).loss
    terms = [term["loss"] for term in fk.collect_terms(model).values()]
    assert loss.item() > 0.5 * sum(terms) > 0
    loss.backward()
    assert all(p.grad.abs().sum() > 0 for n, p in model.named_parameters() if "decoder" in n)
