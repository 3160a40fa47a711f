"""export_for_inference with a tolerance: ranks and units that are used."""

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import nn

import fvae_kernels as fk
from tests.helpers.calibration import batches, recorded
from tests.helpers.peft_models import CONFIG, LINEAR, adapted, layers, logits, served
from tests.helpers.tiny_models import assert_state, state_of

pytestmark = [
    pytest.mark.compat("PEFT", "export for serving at the ranks that are used"),
    pytest.mark.filterwarnings("ignore::UserWarning:peft"),
]


@torch.no_grad()
def starve(model: Any, rank: int) -> None:
    """Make the latents of a linear encoder depend on `rank` of them."""
    for layer in layers(model).values():
        adapter = layer.fvae_adapter["default"]
        adapter.encoder1_mean_weight[rank:] = adapter.encoder1_mean_weight[:1] * 2


@pytest.mark.parametrize("options", [{}, {"rslora": True, "alpha_pattern": {"query": 3.0}}])
def test_what_changes_nothing_is_dropped(options: dict[str, Any], tmp_path: Path) -> None:
    model = adapted("bert", **LINEAR, **options).eval()
    starve(model, 1)
    before, expected = state_of(model), logits(model)
    report = fk.export_for_inference(model, tmp_path, tolerance=0.0)
    assert_state(model, before)
    assert [(layer.rank_before, layer.rank) for layer in report.layers] == [(3, 1)] * 4
    assert all(layer.lost < 1e-12 for layer in report.layers)
    assert report.served_bytes == sum(layer.bytes for layer in report.layers) == 4 * (24 + 24) * 4
    loaded = served(tmp_path)
    torch.testing.assert_close(logits(loaded), expected, rtol=1e-5, atol=1e-7)
    assert {layer.fvae_adapter["default"].config.rank for layer in layers(loaded).values()} == {1}
    assert "rank 3 -> 1" in str(report)
    whole = fk.export_for_inference(model, tmp_path / "whole")
    assert whole.served_bytes == 3 * report.served_bytes
    assert whole.layers == ()


def test_the_tolerance_holds_on_the_data(tmp_path: Path) -> None:
    """The ranks are the smallest that keep it, and the reported losses are those of the layers as loaded."""
    model, data = adapted("bert", r=6).eval(), batches(size=33)
    report = fk.export_for_inference(model, tmp_path, tolerance=0.02, calibration=data)
    loaded = served(tmp_path)
    assert any(layer.rank < 6 for layer in report.layers)
    for row, (name, layer), small in zip(report.layers, layers(model).items(), layers(loaded).values(), strict=True):
        x = torch.cat([recorded(model, layer, [b]).view(33, -1, 24) for b in data])
        aside = torch.arange(len(x)) % 8 == 1
        adapter, trimmed = layer.fvae_adapter["default"], small.fvae_adapter["default"]
        assert (row.name, row.rank, row.hidden) == (name, trimmed.config.rank, trimmed.config.encoder_hidden)

        def lost(x: torch.Tensor, adapter: Any = adapter, trimmed: Any = trimmed) -> float:
            with torch.no_grad():
                update = adapter.infer(x)
                return float((trimmed.infer(x) - update).square().sum() / update.square().sum())

        assert row.lost == pytest.approx(lost(x[aside]), rel=1e-3, abs=1e-9)
        assert lost(x[~aside]) <= 0.02 * (1 + 1e-4)
        with torch.no_grad():  # one direction less would not do
            updates = adapter.infer(x[~aside]).flatten(0, 1).double()
        energies = torch.linalg.svdvals(updates).square()
        assert energies[row.rank - 1 :].sum() > 0.02 * energies.sum()


def test_units_that_never_fire_are_dropped(tmp_path: Path) -> None:
    model, data = adapted("bert", encoder_hidden=(6, 5)).eval(), batches()
    found = list(layers(model).values())
    with torch.no_grad():
        for layer, dead in zip(found, (0, 1, 2, 6), strict=True):
            layer.fvae_adapter["default"].encoder1_hidden0_bias[:dead] = -100.0
            layer.fvae_adapter["default"].encoder1_hidden0_bias[dead:] = 100.0
            layer.fvae_adapter["default"].encoder1_hidden1_bias.fill_(100.0)
    expected = logits(model)
    report = fk.export_for_inference(model, tmp_path, tolerance=0.0, calibration=data)
    assert [layer.hidden for layer in report.layers] == [(6, 5), (5, 5), (4, 5), (1, 5)]
    loaded = served(tmp_path)
    torch.testing.assert_close(logits(loaded), expected, rtol=1e-5, atol=1e-6)
    again = peft.PeftConfig.from_pretrained(tmp_path)
    assert sorted(again.encoder_hidden_pattern.values()) == [(1, 5), (4, 5), (5, 5), (6, 5)]


def test_hidden_layers_by_pattern_alone(tmp_path: Path) -> None:
    model = adapted("bert", **LINEAR, encoder_hidden_pattern={"value": (4,)}).eval()
    report = fk.export_for_inference(model, tmp_path, tolerance=0.0, calibration=batches())
    assert [len(layer.hidden) for layer in report.layers] == [0, 1, 0, 1]
    torch.testing.assert_close(logits(served(tmp_path)), logits(model), rtol=1e-5, atol=1e-6)


def test_without_data_the_prior_counts(tmp_path: Path) -> None:
    model = adapted("bert").eval()
    with torch.no_grad():
        for layer in layers(model).values():
            layer.fvae_adapter["default"].B[:, 1:] *= 1e-4
    report = fk.export_for_inference(model, tmp_path, tolerance=1e-6)
    assert [layer.rank for layer in report.layers] == [1] * 4
    assert all(0 < layer.lost < 1e-6 for layer in report.layers)
    torch.testing.assert_close(logits(served(tmp_path)), logits(model), rtol=1e-3, atol=1e-5)


def test_heads_and_names_go_along(tmp_path: Path) -> None:
    model = adapted("vit", modules_to_save=["classifier"], **LINEAR).eval()
    nn.init.normal_(model.base_model.model.classifier.modules_to_save["default"].weight)
    starve(model, 2)
    fk.export_for_inference(model, tmp_path, tolerance=0.0)
    # in float64: the sums of a forward in float32 differ by more than the weights, which are stored in float32
    found = logits(served(tmp_path, "vit").double(), "vit", torch.float64)
    torch.testing.assert_close(found, logits(model.double(), "vit", torch.float64), rtol=1e-5, atol=1e-6)
    written = json.loads((tmp_path / CONFIG).read_text())
    assert (len(written["rank_pattern"]), written["inference_only"]) == (4, True)
    again = fk.export_for_inference(served(tmp_path, "vit"), tmp_path / "again", tolerance=0.0)
    assert [layer.rank for layer in again.layers] == [2] * 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"calibration": []}, "needs a tolerance"),
        ({"tolerance": 1}, "tolerance=1 is not allowed"),
        ({"tolerance": -0.1}, "from 0 to below 1"),
        ({"tolerance": "much"}, "tolerance='much' is not allowed"),
        ({"tolerance": 0.1, "calibration": []}, "0 examples; expected at least 2"),
    ],
)
def test_what_is_refused(arguments: dict[str, Any], message: str, tmp_path: Path) -> None:
    model = adapted("bert")
    with pytest.raises(ValueError, match=message):
        fk.export_for_inference(model, tmp_path / "x", **arguments)
    assert not (tmp_path / "x").exists()


def test_sizes_by_pattern_train_too() -> None:
    options: dict[str, Any] = {"encoder_hidden_pattern": {"layer.0.*": [7, 3], "query": (2,)}}
    model = adapted("bert", **options)
    assert [layer.fvae_adapter["default"].config.encoder_hidden for layer in layers(model).values()] == [
        *[(7, 3), (7, 3)],
        *[(2,), (5,)],
    ]
    with pytest.raises(ValueError, match="encoder_hidden=0 is not allowed"):
        adapted("bert", encoder_hidden_pattern={"query": (0,)})
