"""generate_features: the decoder as a generator, against the reference."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fvae_kernels as fk
from tests.helpers.peft_models import adapted, config_for, layers

NETWORKS: list[dict[str, Any]] = [
    {"encoder_hidden": (5,), "decoder_hidden": (7,), "logvar1_held": False, "logvar1_start": 0.0},
    {"encoder_hidden": (5,), "separate_hidden": True, "fusion": "average", "prior2_std": 0.5},
    {},
]


def layer_of(options: dict[str, Any]) -> fk.FusedFVAELinear:
    torch.manual_seed(0)
    config = fk.FVAEConfig(rank=3, start="authors", loss_weight=0.1, **options)
    layer = fk.FusedFVAELinear.from_linear(nn.Linear(6, 4), config).double()
    with torch.no_grad():
        for p in layer.adapter.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return layer


@pytest.mark.parametrize("options", NETWORKS)
@pytest.mark.parametrize("exchanged", [True, False])
def test_it_is_the_reference(options: dict[str, Any], exchanged: bool) -> None:
    layer = layer_of(options)
    adapter, config = layer.adapter, layer.config
    x, other = torch.randn(2, 8, 6).double(), torch.randn(2, 8, 6).double()
    generator = torch.Generator().manual_seed(1)
    found = fk.generate_features(layer, x, other if exchanged else None, noise=True, generator=generator)
    generator.manual_seed(1)

    def draws(size: int) -> Tensor:
        return torch.randn(2, 8, size, generator=generator, dtype=torch.float64)

    z1 = fk.reference.posterior(x, adapter._encoder(1), draws(3), bounds=config.logvar1_bounds)[2]
    z2 = fk.reference.posterior(other, adapter._encoder(2), draws(3))[2] if exchanged else None
    z2 = config.prior2_mean + config.prior2_std * draws(3) if z2 is None else z2
    latent = torch.cat((z1, z2), -1) if config.fusion == "concat" else (z1 + z2) / 2
    decoder = adapter._decoder()
    noise = draws(6)
    torch.testing.assert_close(
        found,
        torch.nn.functional.linear(fk.reference.mlp(latent, decoder.hidden), decoder.w_out, decoder.b_out)
        + decoder.scale.abs() * noise,
    )
    nll = fk.reference.reconstruct(found, latent, *decoder)  # the density of what was drawn is that of the noise
    expected = (0.5 * noise.square() + decoder.scale.abs().log() + 0.5 * torch.log(torch.tensor(2 * torch.pi))).sum(-1)
    torch.testing.assert_close(nll, expected.mean().to(nll))


def test_means_need_no_random_numbers_and_no_gradient() -> None:
    layer = layer_of({"decoder_hidden": (7,), "dropout": 0.5}).train()
    x = torch.randn(9, 6).double()
    first = fk.generate_features(layer, x, x, sample=False)
    assert torch.equal(first, fk.generate_features(layer.eval(), x, x, sample=False))
    assert not first.requires_grad
    mean1, mean2 = layer.posterior_means(x)
    D = layer.adapter._decoder()
    expected = torch.nn.functional.linear(fk.reference.mlp(torch.cat((mean1, mean2), -1), D.hidden), D.w_out, D.b_out)
    torch.testing.assert_close(first, expected)
    prior = fk.generate_features(layer, x, sample=False)
    latent = torch.cat((mean1, torch.full_like(mean2, 1.5)), -1)
    torch.testing.assert_close(prior, torch.nn.functional.linear(fk.reference.mlp(latent, D.hidden), D.w_out, D.b_out))
    torch.manual_seed(0)
    one = fk.generate_features(layer, x)
    torch.manual_seed(0)
    assert torch.equal(one, fk.generate_features(layer, x))


def test_layers_of_peft() -> None:
    model = adapted("bert")
    model.add_adapter("other", config_for("bert", r=2))
    layer = next(iter(layers(model).values()))
    x = torch.randn(2, 3, 24)
    for name in (None, "other"):
        found = fk.generate_features(layer, x, sample=False, adapter_name=name)
        adapter = layer.fvae_adapter[name or "default"]
        assert torch.equal(found, fk.generate_features(adapter, x, sample=False))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((nn.Linear(6, 4), torch.zeros(2, 6)), TypeError, "Linear is no adapted layer.*get_submodule"),
        ((None, torch.zeros(2, 5)), ValueError, r"x has shape \(2, 5\); expected \[\.\.\., 6\]"),
        ((None, torch.zeros(2, 6), torch.zeros(3, 6)), ValueError, r"other has shape \(3, 6\); expected that of x"),
        ((None, torch.zeros(2, 6, dtype=torch.long)), TypeError, "expected a floating-point tensor"),
    ],
)
def test_what_is_refused(arguments: tuple[Any, ...], error: type[Exception], message: str) -> None:
    layer, *rest = arguments
    with pytest.raises(error, match=message):
        fk.generate_features(layer_of({}) if layer is None else layer, *rest)


def test_adapters_that_cannot_generate() -> None:
    layer = next(iter(layers(adapted("bert")).values()))
    with pytest.raises(ValueError, match=r"no FVAE-LoRA adapter 'x'; its adapters are \['default'\]"):
        fk.generate_features(layer, torch.zeros(2, 24), adapter_name="x")
    layer.fvae_adapter["default"].inference_only = True
    with pytest.raises(ValueError, match="exported for inference"):
        fk.generate_features(layer, torch.zeros(2, 24))
