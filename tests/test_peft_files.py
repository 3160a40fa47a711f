"""Adapter files: the export for serving, and files and configs that do not fit. A refused call changes nothing."""

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import DIM, TARGETS, assert_state, batch, build, state_of
from torch import Tensor, nn

import fvae_kernels as fk
from fvae_kernels.peft import ExportReport, FVAELoraLinear

pytestmark = [
    pytest.mark.filterwarnings("ignore:FVAE. the auxiliary loss entered:UserWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning:peft"),
]

SMALL: dict[str, Any] = {"r": 3, "encoder_hidden": (5,), "decoder_hidden": (7,), "dropout": 0.0, "loss_weight": 0.01}
CONFIG, WEIGHTS, PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
STEM = "base_model.model.bert.encoder.layer.0.attention.self.query.fvae_adapter."


def config_for(kind: str = "bert", **options: Any) -> fk.FVAELoraConfig:
    task = {"bert": "SEQ_CLS", "llama": "CAUSAL_LM"}.get(kind)
    placed = {"task_type": task, "target_modules": TARGETS[kind], "init_weights": False}
    return fk.FVAELoraConfig(**{**SMALL, **placed, **options})


def adapted(kind: str = "bert", **options: Any) -> Any:
    torch.manual_seed(7)
    return peft.get_peft_model(build(kind), config_for(kind, **options))


def logits(model: nn.Module, kind: str = "bert") -> Tensor:
    inputs = batch(kind)
    inputs.pop("labels")
    with torch.no_grad():
        return model(**inputs).logits


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A good adapter folder of the tiny BERT."""
    folder = tmp_path / "adapter"
    adapted().save_pretrained(folder)
    return folder


# The export for serving


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
    monkeypatch.setattr("peft.auto.check_file_exists_on_hf_hub", lambda *_, **__: False)  # of a tokenizer
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


# Bad files. Each function spoils a good folder; the message names the fault.


def truncated(folder: Path) -> None:
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(data[:-100])


def header_truncated(folder: Path) -> None:
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(data[:60])


def garbage(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes(bytes(range(256)) * 20)


def empty(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes(b"")


def no_weights(folder: Path) -> None:
    (folder / WEIGHTS).unlink()


class Hostile:
    """Unpickling it creates a file."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self.path,)


def hostile_pickle(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    torch.save({"x": Hostile(str(folder.parent / "executed"))}, folder / PICKLE)


def harmless_pickle(folder: Path) -> None:
    torch.save(load_file(folder / WEIGHTS), folder / PICKLE)
    (folder / WEIGHTS).unlink()


def tensors(change: Callable[[dict[str, Tensor]], Any]) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        state = load_file(folder / WEIGHTS)
        change(state)
        save_file(state, folder / WEIGHTS, metadata={"format": "pt"})

    return spoil


def drop(*parts: str) -> Callable[[Path], None]:
    def change(state: dict[str, Tensor]) -> None:
        dropped = [key for key in state if all(part in key for part in parts)]
        assert dropped
        for key in dropped:
            del state[key]

    return tensors(change)


def put(key: str, *shape: int) -> Callable[[Path], None]:
    return tensors(lambda state: state.update({key: torch.zeros(shape)}))


def lora_weights(folder: Path) -> None:
    peft.get_peft_model(build("bert"), peft.LoraConfig(target_modules=["query", "value"])).save_pretrained(folder / "l")
    shutil.copy(folder / "l" / WEIGHTS, folder / WEIGHTS)
    shutil.rmtree(folder / "l")


def config(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        values = json.loads((folder / CONFIG).read_text())
        change(values)
        (folder / CONFIG).write_text(json.dumps(values))

    return spoil


def broken_json(folder: Path) -> None:
    (folder / CONFIG).write_text((folder / CONFIG).read_text()[:-20])


BAD_FOLDERS: dict[str, tuple[Callable[[Path], None], type[Exception], str]] = {
    "truncated": (truncated, ValueError, "cannot be read.*truncated"),
    "truncated in the header": (header_truncated, ValueError, "cannot be read"),
    "garbage": (garbage, ValueError, "cannot be read"),
    "empty": (empty, ValueError, "cannot be read"),
    "no weights": (no_weights, ValueError, "no adapter_model.safetensors"),
    "hostile pickle": (hostile_pickle, ValueError, "a pickle, which can run code"),
    "harmless pickle": (harmless_pickle, ValueError, "a pickle, which can run code"),
    "LoRA's weights": (lora_weights, ValueError, "holds no FVAE-LoRA weights"),
    "a missing tensor": (drop("layer.1", "query", "encoder2_mean_weight"), ValueError, "encoder2_mean_weight.*missing"),
    "a missing layer": (drop("layer.1", "value"), ValueError, r"no weights for.*layer\.1.*value"),
    "an extra layer": (put(f"{STEM.replace('query', 'key')}B", DIM, 3), ValueError, "key', which is not adapted"),
    "an extra tensor": (put(f"{STEM}encoder3_weight", 3), ValueError, "encoder3_weight.*unknown"),
    "an extra tensor of no adapter": (put("base_model.model.bert.nonsense", 3), ValueError, "nonsense.*unknown"),
    "a wrong shape": (put(f"{STEM}B", DIM, 4), ValueError, r"B is \(24, 4\) in the file and \(24, 3\)"),
    "embeddings of another size": (
        put("base_model.model.bert.embeddings.word_embeddings.weight", 50, DIM),
        ValueError,
        r"word_embeddings.*\(50, 24\) in the file and \(40, 24\)",
    ),
    "no head": (drop("classifier.weight"), ValueError, "classifier.weight is missing"),
    "another head": (put("base_model.model.classifier.weight", 9, DIM), ValueError, r"classifier.weight is \(9, 24\)"),
    "an unknown option": (config(lambda c: c.update(lora_dropout=0.1)), TypeError, r"no option \['lora_dropout'\]"),
    "a bad value": (config(lambda c: c.update(r=0)), ValueError, "rank=0 is not allowed"),
    "a bad type": (config(lambda c: c.update(dropout="much")), ValueError, "dropout='much' is not allowed"),
    "a bad pattern": (config(lambda c: c.update(loss_weight=[["(", 1.0]])), ValueError, "regular expression"),
    "a missing rank": (config(lambda c: c.pop("r")), ValueError, "does not fit"),
    "another rank": (config(lambda c: c.update(r=4)), ValueError, "does not fit"),
    "other targets": (config(lambda c: c.update(target_modules=["query"])), ValueError, "which is not adapted"),
    "broken JSON": (broken_json, ValueError, r"line \d+ column \d+"),
    "an unused pattern": (config(lambda c: c.update(loss_weight=[["key", 1.0], [".*", 1.0]])), ValueError, "'key'"),
}


@pytest.mark.parametrize("how", ["from_pretrained", "load_adapter"])
@pytest.mark.parametrize("fault", list(BAD_FOLDERS))
def test_a_bad_folder_is_refused_and_changes_nothing(fault: str, how: str, saved: Path) -> None:
    spoil, error, message = BAD_FOLDERS[fault]
    spoil(saved)
    files = contents(saved)
    model: Any = adapted() if how == "load_adapter" else build("bert")
    before = state_of(model)
    adapters = list(model.peft_config) if how == "load_adapter" else []
    load = peft.PeftModel.from_pretrained if how == "from_pretrained" else type(model).load_adapter
    with pytest.raises(error, match=rf"(?s){message}"):
        load(model, saved, "other")
    assert_state(model, before)
    assert contents(saved) == files
    assert not (saved.parent / "executed").exists()
    if how == "load_adapter":
        assert list(model.peft_config) == adapters
        model.train()(**batch("bert")).loss.backward()


def test_the_pickle_is_hostile(saved: Path) -> None:
    hostile_pickle(saved)
    with pytest.raises(pickle.UnpicklingError):
        torch.load(saved / PICKLE)
    torch.load(saved / PICKLE, weights_only=False)
    assert (saved.parent / "executed").exists()


OTHER_BASES = {
    "wider": ({"hidden_size": 32}, "does not fit"),
    "deeper": ({"num_hidden_layers": 3}, r"no weights for.*layer\.2"),
    "shallower": ({"num_hidden_layers": 1}, r"layer\.1.*is not adapted"),
}


def test_resized_embeddings_when_asked_for(saved: Path) -> None:
    BAD_FOLDERS["embeddings of another size"][0](saved)
    with pytest.warns(UserWarning, match="word_embeddings"):
        loaded = peft.PeftModel.from_pretrained(build("bert"), saved, ignore_mismatched_sizes=True)
    assert torch.equal(logits(loaded), logits(adapted().eval()))


@pytest.mark.parametrize("other", list(OTHER_BASES))
def test_the_adapter_of_another_base_model(other: str, saved: Path) -> None:
    size, message = OTHER_BASES[other]
    model = build("bert", **size)
    before = state_of(model)
    with pytest.raises(ValueError, match=message):
        peft.PeftModel.from_pretrained(model, saved)
    assert_state(model, before)


def test_a_model_without_the_prefix_is_another_base_model(saved: Path) -> None:
    model = build("bert").bert
    before = state_of(model)
    with pytest.raises(ValueError, match="no weights for"):
        peft.PeftModel.from_pretrained(model, saved)
    assert_state(model, before)


HAS_REMAP = hasattr(peft.tuners.tuners_utils.BaseTuner, "_remap_adapter_state_dict_for_load")


@pytest.mark.skipif(not HAS_REMAP, reason="before 0.21 PEFT asks its methods nothing when it loads tensors")
@pytest.mark.parametrize("fault", ["a missing tensor", "a wrong shape", "an extra tensor", "an extra layer"])
def test_tensors_that_do_not_fit_an_adapter_that_is_there(fault: str, saved: Path) -> None:
    BAD_FOLDERS[fault][0](saved)
    model = adapted()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1)
    before = state_of(model)
    with pytest.raises(ValueError, match="nothing was loaded"):
        model.load_adapter(saved, "default")
    with pytest.raises(ValueError, match="nothing was loaded"):
        peft.set_peft_model_state_dict(model, load_file(saved / WEIGHTS))
    assert_state(model, before)


def test_another_method_s_folder(tmp_path: Path) -> None:
    peft.get_peft_model(build("bert"), peft.LoraConfig(target_modules=["query"])).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="adapter of the method LORA, not of FVAE"):
        fk.FVAELoraConfig.from_pretrained(tmp_path)
    model = adapted()
    before = state_of(model)
    with pytest.raises(ValueError, match="different peft types"):
        model.load_adapter(tmp_path, "other")
    assert_state(model, before)


# Targets and configs that do not fit the model


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
