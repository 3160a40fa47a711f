"""export_as_lora: linear encoders exactly, others by the best linear fit; served without this package."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import fvae_kernels as fk
from tests import ROOT
from tests.helpers.calibration import batches, recorded
from tests.helpers.peft_models import (
    CONFIG,
    LINEAR,
    SMALL,
    WEIGHTS,
    adapted,
    config_for,
    layers,
    logits,
    served,
    unlabelled,
)
from tests.helpers.tiny_models import TARGETS, assert_state, build, state_of

pytestmark = [
    pytest.mark.compat("PEFT", "export as stock LoRA"),
    pytest.mark.filterwarnings("ignore::UserWarning:peft"),
]


def assert_serves(model: nn.Module, folder: Path, kind: str) -> None:
    expected, loaded = logits(model, kind), served(folder, kind)
    torch.testing.assert_close(logits(loaded, kind), expected, rtol=1e-5, atol=1e-6)
    assert (logits(build(kind).eval(), kind) - expected).abs().max() > 1e-4
    torch.testing.assert_close(logits(loaded.merge_and_unload(), kind), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("bert", {"alpha": 5.0, "rslora": True}),
        ("gpt2", {}),
        ("llama", {"rank_pattern": {"layers.1.*": 2}, "alpha_pattern": {"v_proj": 3.0}}),
        ("vit", {"modules_to_save": ["classifier"]}),
    ],
)
def test_a_linear_encoder_is_lora(kind: str, options: dict[str, Any], tmp_path: Path) -> None:
    model = adapted(kind, **LINEAR, **options).eval()
    if "modules_to_save" in options:
        nn.init.normal_(model.base_model.model.classifier.modules_to_save["default"].weight)
    before = state_of(model)
    report = fk.export_as_lora(model, tmp_path)
    assert_state(model, before)
    assert [layer.lost for layer in report.layers] == [0.0] * len(layers(model))
    assert_serves(model, tmp_path, kind)


def test_the_factors_are_kept_bit_for_bit(tmp_path: Path) -> None:
    model = adapted("bert", **LINEAR, alpha=5.0, rslora=True)
    fk.export_as_lora(model, tmp_path)
    state = load_file(tmp_path / WEIGHTS)
    for name, layer in layers(model).items():
        adapter = layer.fvae_adapter["default"]
        assert torch.equal(state[f"base_model.model.{name}.lora_A.weight"], adapter.encoder1_mean_weight)
        assert torch.equal(state[f"base_model.model.{name}.lora_B.weight"], adapter.B)


def test_a_present_scale_is_exported(tmp_path: Path) -> None:
    model = adapted("llama", **LINEAR).eval()
    for layer in layers(model).values():
        layer.set_scale("default", 0.5)
    fk.export_as_lora(model, tmp_path)
    assert_serves(model, tmp_path, "llama")


def test_a_process_without_this_package_serves_it(tmp_path: Path) -> None:
    linear, hidden = adapted("llama", **LINEAR).eval(), adapted("llama").eval()
    build("llama").save_pretrained(tmp_path / "base")
    torch.save(unlabelled("llama"), tmp_path / "inputs")
    fk.export_as_lora(linear, tmp_path / "exact")
    fk.export_as_lora(hidden, tmp_path / "fitted", batches("llama"), tolerance=0.05)
    arguments = [str(tmp_path / name) for name in ("base", "inputs", "exact", "fitted")]
    child = [sys.executable, str(ROOT / "tests/helpers/serve_child.py"), *arguments]
    done = subprocess.run(child, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    for name, expected in (
        ("exact", logits(linear, "llama")),
        ("fitted", logits(served(tmp_path / "fitted", "llama"), "llama")),
    ):
        found = torch.load(tmp_path / f"{name}.pt")
        for outputs in found.values():
            torch.testing.assert_close(outputs, expected, rtol=1e-5, atol=1e-6)


def test_the_folder_has_the_form_of_a_lora_of_peft(tmp_path: Path) -> None:
    model = adapted("llama", **LINEAR)
    fk.export_as_lora(model, tmp_path / "ours")
    lora = peft.get_peft_model(
        build("llama"), peft.LoraConfig(r=3, target_modules=TARGETS["llama"], task_type="CAUSAL_LM")
    )
    lora.save_pretrained(tmp_path / "theirs")
    ours, theirs = (load_file(tmp_path / name / WEIGHTS) for name in ("ours", "theirs"))
    assert {key: (t.shape, t.dtype) for key, t in ours.items()} == {k: (t.shape, t.dtype) for k, t in theirs.items()}
    written, expected = (json.loads((tmp_path / name / CONFIG).read_text()) for name in ("ours", "theirs"))
    assert set(written) <= set(expected)
    read = peft.PeftConfig.from_pretrained(tmp_path / "ours")
    assert isinstance(read, peft.LoraConfig)
    assert read.target_modules == set(TARGETS["llama"])
    assert (read.task_type, read.inference_mode, read.use_rslora) == ("CAUSAL_LM", True, False)
    # vLLM's PEFTHelper: declared types, and values it refuses
    assert (type(written["r"]), type(written["lora_alpha"]), type(written["target_modules"])) == (int, int, list)
    assert (written["bias"], bool(written["modules_to_save"]), written["use_dora"]) == ("none", False, False)
    # the converter of llama.cpp: every tensor is an A or a B, and lora_alpha / its rank is the scale
    assert all(key.endswith((".lora_A.weight", ".lora_B.weight")) for key in ours)
    assert {len(t) for key, t in ours.items() if "lora_A" in key} == {written["r"]}
    conversion = pytest.importorskip("peft.tuners.lora.conversion")
    with pytest.warns(UserWarning, match="already a LoRA adapter"):
        _, smaller = conversion.convert_to_lora(served(tmp_path / "ours", "llama"), rank=1)
    assert {len(t) for key, t in smaller.items() if "lora_A" in key} == {1}


def test_unequal_ranks_are_padded_or_in_patterns(tmp_path: Path) -> None:
    model = adapted("llama", **LINEAR).eval()
    ranks = {"layers.0.self_attn.q_proj": 1, "v_proj": 2}
    for name, uniform in (("padded", True), ("patterns", False)):
        report = fk.export_as_lora(model, tmp_path / name, rank=ranks, uniform_rank=uniform)
        assert [layer.rank for layer in report.layers] == [1, 2, 3, 2]
        assert report.layers[0].lost > 0
    written = json.loads((tmp_path / "padded" / CONFIG).read_text())
    assert (written["r"], written["rank_pattern"]) == (3, {})
    outputs = [logits(served(tmp_path / name, "llama"), "llama") for name in ("padded", "patterns")]
    torch.testing.assert_close(*outputs, rtol=1e-6, atol=1e-7)
    sizes = [(tmp_path / name / WEIGHTS).stat().st_size for name in ("padded", "patterns")]
    assert sizes[1] < sizes[0]


def test_layers_with_names_that_end_alike(tmp_path: Path) -> None:
    """The pattern of one layer matches no other: "0" is also the end of "2.0"."""
    net = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Sequential(nn.Linear(4, 4)))
    options = {**SMALL, **LINEAR, "init_weights": False, "target_modules": ["0", "2.0"]}
    model = peft.get_peft_model(net, fk.FVAELoraConfig(**options)).eval()
    fk.export_as_lora(model, tmp_path, rank={"^0": 1}, uniform_rank=False)
    found = peft.PeftModel.from_pretrained(model.unload(), tmp_path).base_model.model
    assert [len(layer.lora_A["default"].weight) for layer in (found[0], found[2][0])] == [1, 3]


def test_hidden_layers_become_the_best_linear_map(tmp_path: Path) -> None:
    """Against least squares on the same tokens; nothing that is near loses less."""
    model, data = adapted("bert").eval(), batches(size=33)
    report = fk.export_as_lora(model, tmp_path, data, ridge=1e-4)
    name, layer = next(iter(layers(model).items()))
    adapter, state = layer.fvae_adapter["default"], load_file(tmp_path / WEIGHTS)
    x = torch.cat([recorded(model, layer, [b]).view(33, -1, 24) for b in data])
    aside = torch.arange(len(x)) % 8 == 1
    fitted, tested = x[~aside].flatten(0, 1).double(), x[aside].flatten(0, 1).double()
    adapter.double()
    with torch.no_grad():
        penalty = (1e-4 * fitted.square().sum() / 24).sqrt() * torch.eye(24, dtype=torch.float64)
        targets = torch.cat((adapter._mean(1, fitted), torch.zeros(24, 3, dtype=torch.float64)))
        expected = torch.linalg.lstsq(torch.cat((fitted, penalty)), targets).solution @ adapter.B.T
        update = adapter._mean(1, tested) @ adapter.B.T
    A, B = (state[f"base_model.model.{name}.lora_{part}.weight"].double() for part in "AB")
    torch.testing.assert_close(A.T @ B.T, expected, rtol=1e-4, atol=1e-5)
    lost = (update - tested @ A.T @ B.T).square().sum() / update.square().sum()
    assert report.layers[0].lost == pytest.approx(float(lost), rel=1e-4)
    assert 0 < report.layers[0].lost < 0.3


@pytest.mark.parametrize("options", [{}, LINEAR])
def test_truncation_loses_least_on_the_inputs(options: dict[str, Any], tmp_path: Path) -> None:
    """It loses less than truncating the matrix, and less than maps beside it."""
    model, data = adapted("bert", **options).eval(), batches()
    name, layer = next(iter(layers(model).items()))
    x = recorded(model, layer, data).double()
    products = []
    for rank in (3, 1):
        fk.export_as_lora(model, tmp_path, data, rank=rank, ridge=1e-6)
        state = load_file(tmp_path / WEIGHTS)
        A, B = (state[f"base_model.model.{name}.lora_{part}.weight"].double() for part in "AB")
        products.append(B @ A)
    full, one = products

    def lost(matrix: torch.Tensor) -> float:
        return float((x @ (full - matrix).T).square().sum())

    U, S, V = torch.linalg.svd(full)
    assert lost(one) < lost(S[0] * torch.outer(U[:, 0], V[0])) * (1 + 1e-6)
    assert torch.linalg.matrix_rank(one, rtol=1e-6) == 1
    a, b = V[0] @ one.T @ one, one @ V[0]
    a = a / a.norm()
    for seed in range(5):
        noise = torch.randn(2, 24, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        near = torch.outer(b, one.T @ b / b.square().sum()) + torch.outer(
            b, 0.02 * one.norm() / b.norm() * noise[0] / 5
        )
        tilted = one + 0.02 * torch.outer(noise[1] * b.norm() / 5, one.T @ b / b.square().sum())
        assert min(lost(near), lost(tilted)) > lost(one) * 0.999


def test_a_bias_loses_less(tmp_path: Path) -> None:
    model, data = adapted("bert").eval(), batches()
    without = fk.export_as_lora(model, tmp_path / "a", data)
    affine = fk.export_as_lora(model, tmp_path / "b", data, bias=True)
    assert sum(layer.lost for layer in affine.layers) < sum(layer.lost for layer in without.layers)
    loaded = served(tmp_path / "b")
    expected = logits(loaded)
    torch.testing.assert_close(logits(loaded.merge_and_unload()), expected, rtol=1e-5, atol=1e-6)
    distance = [(logits(served(tmp_path / name)) - logits(model)).abs().max() for name in "ab"]
    assert distance[1] < distance[0]


def test_a_bias_beside_linear_layers(tmp_path: Path) -> None:
    model = adapted("bert", encoder_hidden_pattern={"query": ()}).eval()
    fk.export_as_lora(model, tmp_path, batches(), bias=True)
    state = load_file(tmp_path / WEIGHTS)
    biases = {key: bool(t.any()) for key, t in state.items() if key.endswith("lora_B.bias")}
    assert [biases[key] for key in sorted(biases)] == [False, True] * 2
    served(tmp_path)


def test_the_metric_is_of_what_is_served(tmp_path: Path) -> None:
    model, data = adapted("bert").train(), batches()

    def metric(m: nn.Module) -> float:
        assert not m.training
        return float(logits(m).square().mean())

    report = fk.export_as_lora(model, tmp_path, data, tolerance=0.5, metric=metric)
    assert model.training
    assert report.metric_before == metric(model.eval())
    assert report.metric_after == pytest.approx(metric(served(tmp_path)), rel=1e-5)
    assert report.metric_before != report.metric_after
    assert f"metric: {report.metric_before:.6g} -> {report.metric_after:.6g}" in str(report)


def test_padding_stays_out_of_the_calibration(tmp_path: Path) -> None:
    model, data = adapted("bert").eval(), batches(count=1)
    (plain,) = data
    padded = {**plain, "attention_mask": torch.ones_like(plain["input_ids"])}
    padded = {name: nn.functional.pad(t, (0, 5)) for name, t in padded.items()}
    states = []
    for given in (plain, padded):
        fk.export_as_lora(model, tmp_path, [given], ridge=1e-2)
        states.append(load_file(tmp_path / WEIGHTS))
    for key, tensor in states[0].items():
        torch.testing.assert_close(states[1][key].abs(), tensor.abs(), rtol=1e-3, atol=1e-4)


def test_without_peft(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model of replace_linears is exported with the modules that are trained beside its layers."""
    model = build("bert")
    config = fk.FVAEConfig(rank=3, alpha=5.0, start="authors")
    fk.replace_linears(model, config, ["query", "value"])
    model.classifier.requires_grad_(True)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "peft", None)
        fk.export_as_lora(model, tmp_path)
    assert json.loads((tmp_path / CONFIG).read_text())["modules_to_save"] == ["classifier"]
    assert_serves(model.eval(), tmp_path, "bert")
    model.bert.embeddings.word_embeddings.requires_grad_(True)
    model.extra = nn.Parameter(torch.zeros(1))
    with pytest.raises(ValueError, match=r"'extra'.*files hold whole modules"):
        fk.export_as_lora(model, tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_pefts_own_conversion_keeps_working() -> None:
    convert_to_lora = pytest.importorskip("peft.tuners.lora.conversion").convert_to_lora
    model = adapted("bert", **LINEAR).eval()
    config, state = convert_to_lora(model, rank=3)
    lora = peft.get_peft_model(build("bert"), config)
    peft.set_peft_model_state_dict(lora, state)
    torch.testing.assert_close(logits(lora.eval()), logits(model), rtol=1e-5, atol=1e-6)
    with pytest.raises(TypeError, match="do not support LoRA conversion"):
        convert_to_lora(adapted("bert"), rank=3)


def test_the_parts_of_a_peft_model(tmp_path: Path) -> None:
    model = adapted("bert", **LINEAR).eval()
    with pytest.raises(ValueError, match="FVAELoraModel is the inside of a PeftModel: pass the PeftModel"):
        fk.export_as_lora(model.base_model, tmp_path / "x")
    fk.export_as_lora(model.base_model.model, tmp_path)
    assert_serves(model, tmp_path, "bert")


BAD: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "hidden layers without data": ({}, {}, "hidden layers.*pass calibration data"),
    "a sampled output": ({**LINEAR, "sample_at_inference": True}, {}, "sample_at_inference=True"),
    "another adapter": (LINEAR, {"adapter_name": "x"}, r"no FVAE-LoRA adapter 'x'.*\['default'\]"),
    "rank 0": (LINEAR, {"rank": 0}, "rank=0 is not allowed.*from 1 to 3"),
    "a large rank": (LINEAR, {"rank": {"query": 4}}, "rank=4 is not allowed"),
    "a pattern without layers": (LINEAR, {"rank": {"key": 2}}, r"match no adapted layer: \['key'\]"),
    "a tolerance of all": (LINEAR, {"tolerance": 1.0}, "tolerance=1.0 is not allowed"),
    "a negative ridge": ({}, {"calibration": [], "ridge": -1.0}, "ridge=-1.0 is not allowed"),
    "no batches": ({}, {"calibration": []}, "0 examples; expected at least 2"),
    "a linear encoder's bias": (LINEAR, {"bias": True}, "a linear encoder has no bias"),
}


@pytest.mark.parametrize("case", list(BAD))
def test_what_is_refused(case: str, tmp_path: Path) -> None:
    options, arguments, message = BAD[case]
    model = adapted("bert", **options)
    before = state_of(model)
    with pytest.raises(ValueError, match=f"(?s){message}"):
        fk.export_as_lora(model, tmp_path / "x", **arguments)
    assert_state(model, before)
    assert not (tmp_path / "x").exists()


def test_calibration_needs_the_adapter_and_batches(tmp_path: Path) -> None:
    model, (data,) = adapted("bert"), batches(count=1)
    with pytest.raises(TypeError, match=r"expected batches, for example \[batch\]"):
        fk.export_as_lora(model, tmp_path / "x", data)
    model.add_adapter("other", config_for("bert"))
    before = state_of(model)
    with pytest.raises(ValueError, match="must be its only active one"):
        fk.export_as_lora(model, tmp_path / "x", [data], adapter_name="other")
    assert_state(model, before)
    with torch.no_grad():
        next(iter(layers(model).values())).fvae_adapter["default"].B.fill_(float("nan"))
    with pytest.raises(ValueError, match=r"B of the adapter of 'bert.*query' has values that are not finite"):
        fk.export_as_lora(model, tmp_path / "x", [data])
    assert not (tmp_path / "x").exists()
