"""How an adapter starts, what of it is trained, the bounds of its noise, and lambda where none is given."""

import copy
import math
from typing import Any

import peft
import pytest
import torch
from torch import nn

import fvae_kernels as fk
from fvae_kernels.nn.adapter import FVAEAdapter
from tests.helpers.linear_layers import config
from tests.helpers.peft_models import adapted, config_for
from tests.helpers.tiny_models import batch, build

HELD = {"logvar1_start": -4.0, "logvar1_held": True}
SHAPES: list[dict[str, Any]] = [
    {"encoder_hidden": (), "decoder_hidden": ()},
    {"encoder_hidden": (5,)},
    {"encoder_hidden": (5, 4), "separate_hidden": True},
]


def start(**options: Any) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return dict(FVAEAdapter(200, 90, config(rank=32, **options)).named_parameters())


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_authors(shape: dict[str, Any]) -> None:
    found = start(start="authors", **shape)
    assert not found["encoder1_mean_weight"].any()
    assert found["B"].std().item() == pytest.approx(0.02, rel=0.1)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_lora(shape: dict[str, Any]) -> None:
    """As PEFT starts LoRA: A uniform in +-1 / sqrt(inputs), B zero. What else there is starts as the authors'."""
    found = start(start="lora", **shape)
    assert not found["B"].any()
    head = found["encoder1_mean_weight"]
    lora = peft.get_peft_model(nn.Sequential(nn.Linear(head.shape[1], 9)), peft.LoraConfig(r=32, target_modules=["0"]))
    (A,) = [p for name, p in lora.named_parameters() if "lora_A" in name]
    assert A.shape == head.shape
    assert head.abs().max() <= 1 / math.sqrt(head.shape[1])
    assert head.std().item() == pytest.approx(A.std().item(), rel=0.1)
    zeros = [name for name in found if not found[name].any()]
    assert zeros == [
        name
        for name in found
        if name.endswith(("mean_bias", "1_logvar_weight", "2_logvar_weight", "logvar_bias"))
        or name in ("encoder2_mean_weight", "B")
    ]


@pytest.mark.parametrize("begin", ["authors", "lora"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_either_start_is_the_base_layer_in_eval(begin: str, shape: dict[str, Any]) -> None:
    base, x = nn.Linear(12, 10), torch.randn(6, 12)
    layer = fk.FusedFVAELinear.from_linear(base.eval(), config(start=begin, **shape))
    assert torch.equal(layer(x), base(x))


@pytest.mark.parametrize("begin", ["authors", "lora"])
def test_the_gradient_of_the_first_step(begin: str) -> None:
    """With "lora" B alone moves, by what M_1 tells of x; with "authors" M_1 moves too, through a B of 0.02."""
    torch.manual_seed(0)
    layer = fk.FusedFVAELinear(nn.Linear(12, 10), config(start=begin, encoder_hidden=(), loss_weight=0.0, **HELD))
    x, noise = torch.randn(400, 12), (torch.randn(400, 3), torch.randn(400, 3))
    layer.forward_with_terms(x, noise)[0].square().mean().backward()
    grads = {name: p.grad.norm().item() for name, p in layer.adapter.named_parameters() if p.grad is not None}
    assert grads["B"] > 0
    assert (grads["encoder1_mean_weight"] > 0) == (begin == "authors")


@pytest.mark.parametrize("value", [-4.0, 0.0, 1.5])
def test_the_log_variance_starts_where_it_is_asked_to(value: float) -> None:
    adapter = FVAEAdapter(12, 10, config(logvar1_start=value))
    _, logvar1, _, logvar2 = fk.diagnostics.posteriors(adapter, torch.randn(7, 12))
    assert torch.equal(logvar1, torch.full_like(logvar1, value))
    assert not logvar2.any()


class TestHeld:
    def test_its_parameters_are_not_trained(self) -> None:
        adapter = FVAEAdapter(12, 10, config(encoder_hidden=(5,), separate_hidden=True, **HELD))
        frozen = {name for name, p in adapter.named_parameters() if not p.requires_grad}
        assert frozen == {name for name, _ in adapter.named_parameters() if name.startswith("encoder1_logvar_")}
        assert {p.requires_grad for p in adapter.requires_grad_(False).parameters()} == {False}
        adapter.requires_grad_(True)
        assert frozen == {name for name, p in adapter.named_parameters() if not p.requires_grad}

    def test_peft_does_not_switch_them_on(self) -> None:
        model = adapted("bert", **HELD)
        model.add_adapter("other", config_for("bert", **HELD))
        model.set_adapter("other")
        trained = [name for name, p in model.named_parameters() if p.requires_grad and "other" in name]
        assert trained
        assert not [name for name in trained if "encoder1_logvar" in name]

    def test_it_stays_through_training(self) -> None:
        torch.manual_seed(0)
        layer = fk.FusedFVAELinear(nn.Linear(12, 10), config(**HELD))
        optimizer = torch.optim.AdamW((p for p in layer.parameters() if p.requires_grad), lr=0.1)
        for _ in range(5):
            layer.forward_with_terms(torch.randn(9, 12))[0].square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        logvar1 = fk.diagnostics.posteriors(layer.adapter, torch.randn(3, 12))[1]
        assert logvar1.unique().tolist() == [-4.0]

    def test_samples_have_this_noise(self) -> None:
        layer = fk.FusedFVAELinear(nn.Linear(12, 10), config(rank=4, sample_at_inference=True, **HELD)).eval()
        nn.init.eye_(layer.adapter.B)
        x = torch.randn(1, 12).expand(20_000, 12)
        with torch.no_grad():
            z = (layer(x) - layer.base_layer(x))[:, :4] / layer.config.scaling
        assert z.std(0).tolist() == pytest.approx([math.exp(-2)] * 4, rel=0.05)


class TestBoundNoise:
    def test_the_smaller_bound_counts(self) -> None:
        model = nn.Sequential(nn.Linear(12, 10), nn.Linear(10, 10))
        fk.replace_linears(model, config(logvar1_start=-3.0, logvar1_max=-1.0))
        adapters: list[Any] = [layer.adapter for layer in model]
        for asked, bound in ((-5.0, -5.0), (-2.0, -2.0), (3.0, -1.0), (None, -1.0)):
            fk.bound_noise(model, asked)
            assert {a.training_config.logvar1_bounds for a in adapters} == {(-20.0, bound)}
            assert {a.config.logvar1_bounds for a in adapters} == {(-20.0, -1.0)}

    def test_training_samples_within_it(self) -> None:
        layer = fk.FusedFVAELinear(nn.Linear(12, 10), config(logvar1_start=0.0))
        x, noise = torch.randn(9, 12), (torch.randn(9, 3), torch.randn(9, 3))
        loud = layer.forward_with_terms(x, noise)[0] - layer.base_layer(x)
        fk.bound_noise(layer, -4.0)
        quiet = layer.forward_with_terms(x, noise)[0] - layer.base_layer(x)
        torch.testing.assert_close(quiet, loud * math.exp(-2), rtol=1e-4, atol=1e-6)

    def test_refused_with_the_model_as_it_was(self) -> None:
        layers = [fk.FusedFVAELinear(nn.Linear(4, 4), config(**more)) for more in ({}, HELD)]
        model = nn.Sequential(*layers)
        with pytest.raises(ValueError, match=r"held at -4\.0 .*logvar1_held=False"):
            fk.bound_noise(model, -1.0)
        assert layers[0].adapter.training_config == layers[0].adapter.config
        with pytest.raises(ValueError, match=r"logvar=21\.0 is not allowed"):
            fk.bound_noise(layers[0], 21.0)
        with pytest.raises(ValueError, match="Linear has no FVAE adapter"):
            fk.bound_noise(nn.Linear(2, 2), 0.0)

    def test_deepcopy_keeps_it(self) -> None:
        layer = fk.FusedFVAELinear(nn.Linear(4, 4), config())
        fk.bound_noise(layer, -2.0)
        assert copy.deepcopy(layer).adapter.training_config.logvar1_bounds[1] == -2.0


class TestLossWeightOfNone:
    """1 / (1000 * adapted layers), the authors'."""

    def test_a_layer_alone(self) -> None:
        assert fk.FusedFVAELinear(nn.Linear(4, 4), config(loss_weight=None)).loss_weight == 1 / 1000

    def test_replace_linears(self) -> None:
        shared = nn.Linear(4, 4)
        model = nn.ModuleDict({"a": shared, "b": nn.Linear(4, 4), "c": nn.Linear(4, 4), "again": shared})
        fk.replace_linears(model, config(loss_weight=None))
        assert {layer.loss_weight for layer in model.values()} == {1 / 3000}

    def test_peft_counts_each_adapters_layers(self) -> None:
        model = adapted("bert", loss_weight=None)
        model.add_adapter("other", config_for("bert", loss_weight=None, target_modules=["query"]))
        weights = [m.fvae_loss_weight for m in model.modules() if hasattr(m, "fvae_loss_weight")]
        assert {w["default"] for w in weights} == {1 / 4000}
        assert {w["other"] for w in weights if "other" in w} == {1 / 2000}

    def test_it_reaches_the_loss(self) -> None:
        losses = {}
        for weight in (None, 1 / 4000):
            torch.manual_seed(3)
            losses[weight] = adapted("bert", loss_weight=weight).train()(**batch("bert")).loss.item()
        assert losses[None] == losses[1 / 4000]

    def test_a_file_keeps_none(self, tmp_path: Any) -> None:
        adapted("bert", loss_weight=None).save_pretrained(tmp_path)
        assert fk.FVAELoraConfig.from_pretrained(str(tmp_path)).loss_weight is None
        loaded = peft.PeftModel.from_pretrained(build("bert"), tmp_path)
        weights = [m.fvae_loss_weight["default"] for m in loaded.modules() if hasattr(m, "fvae_loss_weight")]
        assert set(weights) == {1 / 4000}
