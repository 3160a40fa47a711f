"""Presets: what each name stands for, in both configs, and that the default raises no warning of ours."""

import dataclasses
import warnings
from typing import Any

import peft
import pytest
import torch
from torch import nn

import fvae_kernels as fk
from fvae_kernels import interop
from fvae_kernels.presets import PRESETS

BOTH: list[tuple[Any, str]] = [(fk.FVAEConfig, "rank"), (fk.FVAELoraConfig, "r")]


def as_fvae(config: Any) -> fk.FVAEConfig:
    return config if isinstance(config, fk.FVAEConfig) else config.to_fvae_config()


@pytest.mark.parametrize(("kind", "rank"), BOTH)
def test_the_default_preset_is_the_default(kind: Any, rank: str) -> None:
    assert as_fvae(kind.preset("default")) == fk.FVAEConfig()


@pytest.mark.parametrize(("kind", "rank"), BOTH)
def test_the_paper(kind: Any, rank: str) -> None:
    config = as_fvae(kind.preset("paper"))
    assert (config.rank, config.encoder_hidden, config.decoder_hidden, config.dropout) == (16, (16,), (128,) * 3, 0.1)
    assert (config.start, config.logvar1_bounds, config.gamma_estimator) == ("authors", (-20, 20), "closed_form")
    assert 1 <= config.kl_weight <= 10
    assert config.gamma_weights == (1, 1)


@pytest.mark.parametrize(("kind", "rank"), BOTH)
@pytest.mark.parametrize("size", [16, 5])
def test_the_authors_code(kind: Any, rank: str, size: int) -> None:
    """Their settings, as interop reads them, but for lambda and the 1e-5 in their scale."""
    theirs = {"r": size, "lora_alpha": 16, "enc_layers": 1, "enc_hidden": 16, "dec_layers": 3, "dec_hidden": 128}
    theirs |= {"enc_dropout": 0.1, "dec_dropout": 0.1}
    expected = interop.config_from_official(theirs)
    config = as_fvae(kind.preset("authors", **{rank: size}))
    assert config.alpha == pytest.approx(expected.alpha, rel=1e-5)
    same = {"alpha": expected.alpha, "loss_weight": expected.loss_weight, "gamma_weight": expected.gamma_weight}
    assert config.gamma_weights == expected.gamma_weights
    assert dataclasses.replace(config, **same) == expected


@pytest.mark.parametrize(("kind", "rank"), BOTH)
def test_options_go_before_the_preset(kind: Any, rank: str) -> None:
    config = as_fvae(kind.preset("paper", **{rank: 4}, kl_weight=10.0))
    assert (config.rank, config.kl_weight, config.decoder_hidden) == (4, 10.0, (128,) * 3)


@pytest.mark.parametrize(("kind", "rank"), BOTH)
def test_an_unknown_name(kind: Any, rank: str) -> None:
    with pytest.raises(ValueError, match="no preset 'papers'; expected one of 'default', 'paper', 'authors'"):
        kind.preset("papers")


@pytest.mark.parametrize("name", PRESETS)
def test_no_preset_warns(name: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        fk.replace_linears(nn.Sequential(nn.Linear(4, 4)), fk.FVAEConfig.preset(name))
        model = peft.get_peft_model(
            nn.Sequential(nn.Linear(4, 4)), fk.FVAELoraConfig.preset(name, target_modules=["0"])
        )
        model.train()(torch.randn(3, 4))
