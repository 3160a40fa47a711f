"""Adapters without PEFT: restored, saved, loaded; and folders from one road on the other."""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import fvae_kernels as fk
from tests.helpers.bad_folders import BAD_FOLDERS
from tests.helpers.peft_models import CONFIG, LINEAR, WEIGHTS, adapted, config_for, layers, logits
from tests.helpers.recipe import SMALL_NETWORKS
from tests.helpers.tiny_models import TARGETS, assert_state, batch, build, state_of

pytestmark = [
    pytest.mark.compat("Without PEFT", "`restore_linears`, `save_adapters`, `load_adapters`; folders of PEFT's too"),
    pytest.mark.filterwarnings("ignore::UserWarning:peft"),
    pytest.mark.filterwarnings("ignore:kl_weight:UserWarning"),
]


def replaced(kind: str = "bert", targets: Any = None, **options: Any) -> nn.Module:
    """A model of replace_linears whose adapters change its output."""
    torch.manual_seed(3)
    model = build(kind)
    config = fk.FVAEConfig(**{**SMALL_NETWORKS, "rank": 3, "loss_weight": 0.01, **options})
    fk.replace_linears(model, config, targets or TARGETS[kind])
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


@pytest.mark.parametrize(("kind", "options"), [("bert", {}), ("gpt2", LINEAR)])
def test_save_and_load_on_both_roads(kind: str, options: dict[str, Any], tmp_path: Path) -> None:
    model = replaced(kind, gamma_weight=(1.0, 0.5), kl_weight=2.0, **options)
    before = state_of(model)
    fk.save_adapters(model, tmp_path)
    assert_state(model, before)
    for trainable in (False, True):
        plain = build(kind).eval()
        names = fk.load_adapters(plain, tmp_path, trainable)
        assert torch.equal(logits(plain, kind), logits(model, kind))
        assert {n for n, p in plain.named_parameters() if p.requires_grad} == (
            {n for n, p in model.named_parameters() if p.requires_grad} if trainable else set()
        )
    with_peft = peft.PeftModel.from_pretrained(build(kind), tmp_path).eval()
    assert torch.equal(logits(with_peft, kind), logits(model, kind))
    assert list(layers(with_peft)) == names
    loss = plain.train()(**batch(kind)).loss
    loss.backward()
    torch.manual_seed(0)
    again = peft.PeftModel.from_pretrained(build(kind), tmp_path, is_trainable=True).train()
    again(**batch(kind)).loss.backward()
    assert fk.collect_terms(plain).keys() == {n.removeprefix("base_model.model.") for n in fk.collect_terms(again)}


def test_a_folder_of_peft_loads_without_it(tmp_path: Path) -> None:
    options: dict[str, Any] = {
        "rank_pattern": {"layer.1.*query": 2},
        "alpha_pattern": {"value": 3.0},
        "exclude_modules": [r"bert.encoder.layer.0.attention.self.value"],
        "loss_weight": {"query": 0.1, ".*": 0.2},
    }
    model = adapted("bert", **options).eval()
    nn.init.normal_(model.base_model.model.classifier.modules_to_save["default"].weight)
    model.save_pretrained(tmp_path)
    plain = build("bert").eval()
    assert fk.load_adapters(plain, tmp_path) == list(layers(model))
    assert torch.equal(logits(plain), logits(model))
    assert [m.loss_weight for m in plain.modules() if isinstance(m, fk.FusedFVAELinear)] == [0.1, 0.1, 0.2]
    fk.save_adapters(plain, tmp_path / "again")
    loaded = peft.PeftModel.from_pretrained(build("bert"), tmp_path / "again").eval()
    assert torch.equal(logits(loaded), logits(model)), "the head goes along, trained or not"


@pytest.mark.parametrize("blocks", [[1], 0])
def test_blocks_by_index(blocks: Any, tmp_path: Path) -> None:
    model = adapted("llama", layers_to_transform=blocks).eval()
    model.save_pretrained(tmp_path)
    plain = build("llama").eval()
    fk.load_adapters(plain, tmp_path)
    assert torch.equal(logits(plain, "llama"), logits(model, "llama"))


def test_an_export_for_serving_loads_without_peft(tmp_path: Path) -> None:
    model = adapted("bert").eval()
    fk.export_for_inference(model, tmp_path)
    plain = build("bert").eval()
    before = state_of(plain)
    with pytest.raises(ValueError, match="exported for inference and cannot be trained"):
        fk.load_adapters(plain, tmp_path, trainable=True)
    assert_state(plain, before)
    fk.load_adapters(plain, tmp_path)
    assert torch.equal(logits(plain), logits(model))
    assert torch.equal(logits(plain.train()), logits(model))
    fk.save_adapters(plain, tmp_path / "again")
    again = peft.PeftModel.from_pretrained(build("bert"), tmp_path / "again").eval()
    assert torch.equal(logits(again), logits(model))


def test_heads_go_along_and_peft_is_not_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = replaced()
    model.classifier.requires_grad_(True)
    nn.init.normal_(model.classifier.weight)
    monkeypatch.setitem(sys.modules, "peft", None)
    fk.save_adapters(model, tmp_path)
    assert json.loads((tmp_path / CONFIG).read_text())["modules_to_save"] == ["classifier"]
    plain = build("bert").eval()
    fk.load_adapters(plain, tmp_path, trainable=True)
    assert torch.equal(logits(plain), logits(model))
    assert plain.classifier.weight.requires_grad
    monkeypatch.undo()
    with_peft = peft.PeftModel.from_pretrained(build("bert"), tmp_path).eval()
    assert torch.equal(logits(with_peft), logits(model))


def test_layers_of_several_ranks(tmp_path: Path) -> None:
    model = replaced(targets=["query"])
    fk.replace_linears(model, fk.FVAEConfig(**SMALL_NETWORKS, rank=2, loss_weight=0.01), ["value"], freeze=False)
    fk.save_adapters(model, tmp_path)
    plain = build("bert").eval()
    fk.load_adapters(plain, tmp_path)
    assert torch.equal(logits(plain), logits(model))
    other = build("bert")
    fk.replace_linears(other, fk.FVAEConfig(rank=2, loss_weight=0.01), ["query"])
    fk.replace_linears(other, fk.FVAEConfig(rank=2, loss_weight=0.02), ["value"])
    with pytest.raises(ValueError, match=r"loss_weight=0\.01 and .*value' has 0\.02"):
        fk.save_adapters(other, tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_values_into_layers_that_are_there(tmp_path: Path) -> None:
    model = replaced()
    fk.save_adapters(model, tmp_path)
    other = replaced(prior2_mean=1.5)
    with torch.no_grad():
        for parameter in other.parameters():
            if parameter.requires_grad:
                parameter.zero_()
    identities = [id(layer) for layer in other.modules()]
    fk.load_adapters(other, tmp_path)
    assert torch.equal(logits(other), logits(model))
    assert [id(layer) for layer in other.modules()] == identities
    different = replaced(alpha=3.0)
    before = state_of(different)
    with pytest.raises(ValueError, match=r"other options for .*restore_linears\(model\) first"):
        fk.load_adapters(different, tmp_path)
    assert_state(different, before)


def test_a_shared_layer_stays_one(tmp_path: Path) -> None:
    def twice() -> nn.Module:
        torch.manual_seed(0)
        shared = nn.Linear(4, 4)
        return nn.Sequential(shared, nn.ReLU(), shared)

    model, x = twice(), torch.randn(5, 4)
    fk.replace_linears(model, fk.FVAEConfig(rank=2, start="authors", loss_weight=0.1), ["0", "2"])
    nn.init.normal_(model[0].adapter.encoder1_mean_weight)
    fk.save_adapters(model.eval(), tmp_path)
    other = twice().eval()
    assert fk.load_adapters(other, tmp_path) == ["0"]
    assert other[0] is other[2]
    torch.testing.assert_close(other(x), model(x))
    assert fk.restore_linears(other) == ["0", "2"]
    assert other[0] is other[2]
    torch.testing.assert_close(other(x), twice()(x))


@pytest.mark.parametrize("merged", [False, True])
def test_restore_gives_the_base_model_back(merged: bool) -> None:
    base = build("bert").eval()
    logits(base)  # transformers sets hooks of its own at the first forward
    before = state_of(base)
    parameters = list(map(id, base.parameters()))
    names = fk.replace_linears(base, fk.FVAEConfig(rank=2, start="authors"), ["query", "value"])
    for module in base.modules():
        if isinstance(module, fk.FusedFVAELinear):
            nn.init.normal_(module.adapter.encoder1_mean_weight)
            if merged:
                module.merge()
    assert fk.restore_linears(base) == names
    before["trained"] = dict.fromkeys(before["trained"], False)
    assert_state(base, before)
    assert list(map(id, base.parameters())) == parameters
    assert not hasattr(base, "_fvae_hooks")


def test_restore_with_the_adapters_merged() -> None:
    model = replaced(**LINEAR)
    expected = logits(model)
    next(m for m in model.modules() if isinstance(m, fk.FusedFVAELinear)).merge()
    fk.restore_linears(model, merge=True)
    torch.testing.assert_close(logits(model), expected, rtol=1e-5, atol=1e-6)
    assert {type(m) for m in model.modules()} == {type(m) for m in build("bert").modules()}
    hidden = replaced()
    before = state_of(hidden)
    with pytest.raises(ValueError, match="cannot merge this FVAE adapter"):
        fk.restore_linears(hidden, merge=True)
    assert_state(hidden, before)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapter")
    adapted().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("fault", list(BAD_FOLDERS))
def test_a_bad_folder_is_refused_and_changes_nothing(fault: str, saved: Path, tmp_path: Path) -> None:
    spoil, error, message = BAD_FOLDERS[fault]
    folder = tmp_path / "adapter"
    shutil.copytree(saved, folder)
    spoil(folder)
    model = build("bert")
    before = state_of(model)
    with pytest.raises(error, match=rf"(?s){message}"):
        fk.load_adapters(model, folder)
    assert_state(model, before)
    assert not (tmp_path / "executed").exists()


def test_options_of_a_newer_version_are_dropped_by_name(saved: Path, tmp_path: Path) -> None:
    shutil.copytree(saved, tmp_path / "newer")
    written = json.loads((saved / CONFIG).read_text())
    (tmp_path / "newer" / CONFIG).write_text(json.dumps(written | {"z_3": 1}))
    model = build("bert").eval()
    with pytest.warns(UserWarning, match=r"does not know: \['z_3'\]"):
        fk.load_adapters(model, tmp_path / "newer")
    assert torch.equal(logits(model), logits(adapted().eval()))


def test_what_else_is_refused(saved: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="none of the layers"):
        fk.load_adapters(nn.Sequential(nn.Linear(3, 3)), saved)
    shutil.copytree(saved, tmp_path / "a")
    (tmp_path / "a" / CONFIG).unlink()
    with pytest.raises(ValueError, match=r"has no adapter_config\.json"):
        fk.load_adapters(build("bert"), tmp_path / "a")
    lora = peft.get_peft_model(build("bert"), peft.LoraConfig(target_modules=["query"]))
    lora.save_pretrained(tmp_path / "lora")
    with pytest.raises(ValueError, match="holds no FVAE-LoRA weights"):
        fk.load_adapters(build("bert"), tmp_path / "lora")
    with_peft = peft.get_peft_model(build("bert"), config_for("bert"))
    for call, message in (
        (lambda: fk.load_adapters(with_peft, saved), r"model\.load_adapter\(folder\)"),
        (lambda: fk.save_adapters(with_peft, tmp_path / "x"), r"model\.save_pretrained\(folder\)"),
        (lambda: fk.restore_linears(with_peft), r"no layer of replace_linears.*model\.unload"),
        (lambda: fk.save_adapters(build("bert"), tmp_path / "x"), "no FVAE-LoRA adapter"),
        (lambda: fk.restore_linears(fk.FusedFVAELinear(nn.Linear(3, 3), fk.FVAEConfig())), "take its base_layer"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    assert not (tmp_path / "x").exists()


def test_the_file_has_what_pefts_own_has(tmp_path: Path) -> None:
    """Names and shapes of the tensors, and a config that is read as the one of the same options."""
    fk.save_adapters(replaced(), tmp_path / "ours")
    model = peft.get_peft_model(build("bert"), config_for("bert", modules_to_save=[], task_type=None))
    model.save_pretrained(tmp_path / "theirs")
    ours, theirs = (load_file(tmp_path / name / WEIGHTS) for name in ("ours", "theirs"))
    assert {k: t.shape for k, t in ours.items()} == {k: t.shape for k, t in theirs.items()}
    read, expected = (peft.PeftConfig.from_pretrained(tmp_path / name).to_dict() for name in ("ours", "theirs"))
    different = {key for key in read if read[key] != expected[key]}
    assert different <= {"auto_mapping", "init_weights", "peft_version", "modules_to_save", "base_model_name_or_path"}
