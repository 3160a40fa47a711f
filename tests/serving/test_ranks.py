"""suggest_ranks and trim: what a trained adapter uses of its rank, and the smaller adapter."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import nn

import fvae_kernels as fk
from tests.helpers.calibration import batches
from tests.helpers.peft_models import LINEAR, SMALL, adapted, layers, logits, train_step
from tests.helpers.tiny_models import assert_state, build, state_of

pytestmark = [
    pytest.mark.compat("PEFT", "ranks by use: suggested, and trained adapters trimmed to them"),
    pytest.mark.filterwarnings("ignore::UserWarning:peft"),
]


def starved(**options: Any) -> Any:
    """A model whose update lies in one direction of the latents, up to little."""
    model = adapted("bert", **options).eval()
    with torch.no_grad():
        for layer in layers(model).values():
            adapter = layer.fvae_adapter["default"]
            adapter.B[:] = adapter.B[:, :1] * torch.tensor([1.0, -2.0, 0.5]) + 1e-3 * adapter.B
    return model


def test_ranks_are_those_in_use() -> None:
    model, data = starved(), batches()
    before = state_of(model)
    ranks = fk.suggest_ranks(model, data, tolerance=0.01)
    assert_state(model, before)
    assert list(ranks.values()) == [1] * 4
    assert "rank 3 -> 1 (1 by energy, " in str(ranks)
    assert isinstance(fk.FVAELoraConfig(**SMALL, rank_pattern=ranks), fk.FVAELoraConfig)
    assert all(use.by_energy > 1 for use in fk.suggest_ranks(model, data, tolerance=0.0).layers)
    still = fk.suggest_ranks(model, data, tolerance=0.0, threshold=1e9)
    assert [(use.active, use.suggested) for use in still.layers] == [(0, 1)] * 4
    whole = fk.suggest_ranks(adapted("bert").eval(), data, tolerance=0.0)
    assert [(use.by_energy, use.suggested) for use in whole.layers] == [(3, 3)] * 4, "the energy alone decides"


@pytest.mark.parametrize("options", [{}, {**LINEAR, "rslora": True, "logvar1_held": True, "logvar1_start": -4.0}])
def test_a_trimmed_adapter_serves_and_trains_on(options: dict[str, Any], tmp_path: Path) -> None:
    model, data = starved(**options), batches()
    expected = logits(model)
    parameters = sum(p.numel() for layer in layers(model).values() for p in layer.fvae_adapter.parameters())
    rows = fk.trim(model, fk.suggest_ranks(model, data), data)
    assert [(row.rank_before, row.rank) for row in rows] == [(3, 1)] * 4
    assert all(0 < row.lost < 1e-4 for row in rows)
    torch.testing.assert_close(logits(model), expected, rtol=1e-3, atol=1e-4)
    assert sum(p.numel() for layer in layers(model).values() for p in layer.fvae_adapter.parameters()) < parameters
    fk.export_for_inference(starved(**options), tmp_path / "export", tolerance=0.01, calibration=data)
    other = peft.PeftModel.from_pretrained(build("bert"), tmp_path / "export")
    torch.testing.assert_close(logits(other.eval()), logits(model), rtol=1e-4, atol=1e-6)
    train_step(model, "bert")
    model.eval().save_pretrained(tmp_path / "saved")
    loaded = peft.PeftModel.from_pretrained(build("bert"), tmp_path / "saved").eval()
    assert torch.equal(logits(loaded), logits(model))
    held = [not p.requires_grad for n, p in model.named_parameters() if "encoder1_logvar" in n]
    assert all(held) == bool(options.get("logvar1_held"))


def only(adapter: Any, used: int) -> None:
    """Make update and decoder depend on the first `used` latents of each kind; the rest of z_1 is constant."""
    R = adapter.config.rank
    first = adapter.decoder_hidden0_weight if adapter.config.decoder_hidden else adapter.decoder_out_weight
    with torch.no_grad():
        for p in adapter.parameters():
            p.add_(0.3 * torch.randn_like(p))
        adapter.B[:, used:] = 0
        first[:, used:R] = 0
        adapter.encoder2_mean_weight[used:] = 0


@pytest.mark.parametrize("decoder", [(), (7,)])
def test_nothing_changes_where_the_rest_is_unused(decoder: tuple[int, ...]) -> None:
    """Update, reconstruction and KL of the latents that are left, against the adapter before; no projection is lost."""
    torch.manual_seed(0)
    config = fk.FVAEConfig(rank=4, encoder_hidden=(5,), decoder_hidden=decoder, start="authors", kl_weight=3.0)
    layer = fk.FusedFVAELinear.from_linear(nn.Linear(6, 8), config).double().eval()
    only(layer.adapter, 2)
    x, zero = torch.randn(64, 6).double(), torch.zeros(64, 4).double()
    y, terms = layer.forward_with_terms(x, noise=(zero, zero))
    mean = layer.adapter.posterior_means(x)[0][:, :2]
    fk.trim(layer, 2, [x])
    zero = zero[:, :2]
    smaller, trimmed = layer.forward_with_terms(x, noise=(zero, zero))
    torch.testing.assert_close(smaller, y)
    torch.testing.assert_close(trimmed.nll, terms.nll)
    variance = torch.tensor(-4.0).exp()
    kl = 0.5 * (mean.square() + variance - 1 + 4.0).sum(-1).mean()
    torch.testing.assert_close(trimmed.kl, kl.to(trimmed.kl))
    assert layer.config == layer.adapter.config
    assert layer.adapter.config.scaling == pytest.approx(4.0)


def test_a_learned_variance_follows_the_projection() -> None:
    """The log-variances of the entries that are left, if the directions are entries."""
    torch.manual_seed(0)
    config = fk.FVAEConfig(rank=3, start="authors", logvar1_held=False, logvar1_start=0.0)
    layer = fk.FusedFVAELinear.from_linear(nn.Linear(6, 8), config).double()
    adapter = layer.adapter
    with torch.no_grad():
        for p in adapter.parameters():
            p.add_(0.3 * torch.randn_like(p))
        adapter.B[:, :1] = 0
    x = torch.randn(64, 6).double()
    logvar = fk.diagnostics.posteriors(adapter, x)[1]
    fk.trim(layer, 2, [x])
    after = fk.diagnostics.posteriors(adapter, x)[1]
    torch.testing.assert_close(after.sum(1), logvar[:, 1:].sum(1))


@pytest.mark.parametrize("data", [False, True])
def test_what_is_dropped_is_replaced_by_its_mean(data: bool) -> None:
    torch.manual_seed(0)
    config = fk.FVAEConfig(rank=4, encoder_hidden=(5,), start="authors", prior2_mean=1.5)
    layer = fk.FusedFVAELinear.from_linear(nn.Linear(6, 8), config).double().eval()
    only(layer.adapter, 2)
    with torch.no_grad():  # the rest is constant, and the decoder reads it
        layer.adapter.decoder_out_weight[:, 2:4] = torch.randn(6, 2)
        layer.adapter.encoder1_mean_weight[2:] = 0
        if not data:  # as the priors have it
            layer.adapter.encoder1_mean_bias[2:] = 0
            layer.adapter.encoder2_mean_bias[2:] = 1.5
    x, zero = torch.randn(64, 6).double(), torch.zeros(64, 4).double()
    nll = layer.forward_with_terms(x, noise=(zero, zero))[1].nll
    fk.trim(layer, 2, [x] if data else None)
    torch.testing.assert_close(layer.forward_with_terms(x, noise=(zero[:, :2],) * 2)[1].nll, nll)


def merge(model: Any) -> None:
    model.merge_adapter()


BAD: dict[str, tuple[dict[str, Any], Callable[[Any], Any], Any, str]] = {
    "rank 0": ({}, lambda _: None, {"query": 0}, "rank=0 is not allowed.*from 1 to 3"),
    "a larger rank": ({}, lambda _: None, 4, "rank=4 is not allowed"),
    "a pattern without layers": ({}, lambda _: None, {"key": 1}, r"no adapted layer: \['key'\]"),
    "a merged layer": (LINEAR, merge, 1, "is merged: unmerge it"),
    "a sum of latents": ({"fusion": "average"}, lambda _: None, 1, "fusion='average'"),
}


@pytest.mark.parametrize("case", list(BAD))
def test_what_is_refused(case: str) -> None:
    options, change, ranks, message = BAD[case]
    model = adapted("bert", **options)
    change(model)
    before = state_of(model)
    with pytest.raises(ValueError, match=f"(?s){message}"):
        fk.trim(model, ranks)
    assert_state(model, before)
    with pytest.raises(ValueError, match="no FVAE-LoRA adapter"):
        fk.trim(build("bert"), 1)
    with pytest.raises(ValueError, match="threshold=-1 is not allowed"):
        fk.suggest_ranks(model, [], threshold=-1)


def test_other_layers_stay() -> None:
    model = adapted("bert")
    before = state_of(model)
    (row, *_), ranks = fk.trim(model, {"layer.0.*query": 2}), model.peft_config["default"].rank_pattern
    assert (row.rank, sorted(ranks.values())) == (2, [2, 3, 3, 3])
    changed = {n for n, t in model.state_dict().items() if t.shape != before["values"][n].shape}
    assert {name.partition(".fvae_adapter")[0] for name in changed} == {
        "base_model.model.bert.encoder.layer.0.attention.self.query"
    }
