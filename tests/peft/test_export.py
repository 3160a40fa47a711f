"""The export for serving: only encoder 1's mean path and B."""

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import fvae_kernels as fk
from fvae_kernels.peft import ExportReport
from tests.helpers.peft_models import CONFIG, WEIGHTS, adapted, config_for, logits
from tests.helpers.tiny_models import assert_state, batch, build, state_of

pytestmark = [
    pytest.mark.compat("PEFT", "export for serving"),
    pytest.mark.filterwarnings("ignore:FVAE. the auxiliary loss entered:UserWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning:peft"),
]


@pytest.mark.parametrize("options", [{}, {"separate_hidden": True}, {"encoder_hidden": ()}, {"encoder_hidden": (6, 5)}])
@pytest.mark.parametrize("kind", ["bert", "gpt2"])
def test_export_serves_the_same_outputs(kind: str, options: dict[str, Any], tmp_path: Path) -> None:
    model = adapted(kind, **options)
    model.train()(**batch(kind)).loss.backward()
    expected = logits(model.eval(), kind)
    before = state_of(model)
    report = fk.export_for_inference(model, tmp_path / "served")
    assert_state(model, before)
    written = json.loads((tmp_path / "served" / CONFIG).read_text())
    assert (written["inference_only"], written["inference_mode"]) == (True, True)
    loaded = peft.PeftModel.from_pretrained(build(kind), tmp_path / "served")
    assert torch.equal(logits(loaded, kind), expected)
    names = {key.partition("fvae_adapter.")[2] for key in load_file(tmp_path / "served" / WEIGHTS)} - {""}
    assert "B" in names
    assert "encoder1_mean_weight" in names
    assert not any(name.startswith(("encoder2", "decoder")) or "logvar" in name for name in names)
    model.save_pretrained(tmp_path / "full")
    full, served = ((tmp_path / name / WEIGHTS).stat().st_size for name in ("full", "served"))
    assert served < full / 2
    assert isinstance(report, ExportReport)
    assert report.full_bytes > 2 * report.served_bytes > 0
    assert f"{report.full_bytes / report.served_bytes:.1f} times smaller" in str(report)
    assert f"{report.served_bytes / 1e3:,.1f} kB" in str(report)
    own = sum(t.numel() * 4 for key, t in load_file(tmp_path / "served" / WEIGHTS).items() if "fvae" in key)
    assert report.served_bytes == own


def test_export_of_a_named_adapter_carries_the_head(tmp_path: Path) -> None:
    model = adapted("vit", modules_to_save=["classifier"])
    model.add_adapter("other", config_for("vit", modules_to_save=["classifier"], r=2))
    model.set_adapter("other")
    nn.init.normal_(model.base_model.model.classifier.modules_to_save["other"].weight)
    fk.export_for_inference(model, str(tmp_path), adapter_name="other")
    loaded = peft.PeftModel.from_pretrained(build("vit"), tmp_path, adapter_name="x")
    assert torch.equal(logits(loaded, "vit"), logits(model.eval(), "vit"))
    assert model.peft_config["other"].inference_only is False


def test_an_export_loads_without_a_base_model_at_hand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("peft.auto.check_file_exists_on_hf_hub", lambda *_, **__: False)  # for the tokenizer
    build("vit").save_pretrained(tmp_path / "base")
    base = type(build("vit")).from_pretrained(tmp_path / "base")
    model = peft.get_peft_model(base, config_for("vit")).eval()
    fk.export_for_inference(model, tmp_path / "served")
    for cls in (peft.AutoPeftModel, type(base)):
        loaded = cls.from_pretrained(str(tmp_path / "served"))
        assert torch.equal(logits(loaded.eval(), "vit"), logits(model, "vit"))


def test_an_exported_adapter_cannot_be_trained(tmp_path: Path) -> None:
    fk.export_for_inference(adapted(), tmp_path)
    model = build("bert")
    before = state_of(model)
    with pytest.raises(ValueError, match="exported for inference and cannot be trained"):
        peft.PeftModel.from_pretrained(model, tmp_path, is_trainable=True)
    assert_state(model, before)
    loaded = peft.PeftModel.from_pretrained(model, tmp_path)
    expected = logits(loaded)
    assert torch.equal(logits(loaded.train()), expected), "frozen, it serves in train mode too: a head may be trained"
    loaded.set_adapter("default")
    with pytest.raises(RuntimeError, match="exported for inference"):
        loaded(**batch("bert"))


def test_what_cannot_be_exported(tmp_path: Path) -> None:
    model = adapted()
    with pytest.raises(ValueError, match=r"no FVAE-LoRA adapter 'nobody'.*\['default'\]"):
        fk.export_for_inference(model, tmp_path / "x", adapter_name="nobody")
    with pytest.raises(ValueError, match=r"no FVAE-LoRA adapter.*\[\]"):
        fk.export_for_inference(build("bert"), tmp_path / "x")
    lora = peft.get_peft_model(build("bert"), peft.LoraConfig(target_modules=["query"]))
    with pytest.raises(ValueError, match="no FVAE-LoRA adapter"):
        fk.export_for_inference(lora, tmp_path / "x")
    with pytest.raises(ValueError, match="sample_at_inference=True needs"):
        fk.export_for_inference(adapted(sample_at_inference=True), tmp_path / "x")
    assert not (tmp_path / "x").exists()
