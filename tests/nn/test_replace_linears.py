"""replace_linears: which layers of a model are adapted, in place, and what is refused."""

import math
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fvae_kernels as fk
from fvae_kernels import reference
from tests.helpers.linear_layers import config, make
from tests.helpers.tiny_models import batch, build, gpt2, mlp

pytestmark = [
    pytest.mark.filterwarnings("ignore:FVAE. the auxiliary loss entered:UserWarning"),
    pytest.mark.compat("Without PEFT", "`replace_linears` in any module"),
]


@pytest.mark.parametrize(
    ("kind", "targets"),
    [
        ("bert", ["query", "value"]),
        ("vit", ["q_proj", "v_proj"]),
        ("llama", ["q_proj", "v_proj"]),
        ("gpt2", ["c_attn"]),
    ],
)
def test_replace_linears_in_real_architectures(kind: str, targets: list[str]) -> None:
    model = build(kind).eval()
    inputs = batch(kind)
    expected = model(**inputs).logits
    names = fk.replace_linears(model, config(), target_modules=targets)
    assert len(names) == 2 * len(targets)
    assert all(n.rpartition(".")[2] in targets for n in names)
    assert torch.equal(model(**inputs).logits, expected)
    trainable = [n for n, p in model.named_parameters() if p.requires_grad]
    assert trainable
    assert all(".adapter." in n for n in trainable)


def test_targets_by_regex_suffix_and_all_linear() -> None:
    assert fk.replace_linears(mlp(), config(), "0|4") == ["0", "4"]
    assert fk.replace_linears(mlp(), config(), ["2"]) == ["2"]
    assert fk.replace_linears(mlp(), config()) == ["0", "2", "4"]
    names = fk.replace_linears(gpt2(), config(), "all-linear")
    assert "lm_head" not in names
    assert "transformer.h.0.attn.c_attn" in names


def test_a_layer_that_is_never_called_is_left_out() -> None:
    model = nn.TransformerEncoderLayer(8, 2, 16)
    assert fk.replace_linears(model, config()) == ["linear1", "linear2"]
    with pytest.raises(ValueError, match="match no linear layer"):
        fk.replace_linears(nn.TransformerEncoderLayer(8, 2, 16), config(), ["out_proj"])


def test_freeze_can_be_left_to_the_caller() -> None:
    model = mlp()
    fk.replace_linears(model, config(), ["0"], freeze=False)
    assert model[2].weight.requires_grad
    assert not model[0].weight.requires_grad


def test_loss_weight_by_pattern() -> None:
    model = mlp()
    fk.replace_linears(model, config(loss_weight={"0": 0.5, ".*": 0.25}))
    assert [model[i].loss_weight for i in (0, 2, 4)] == [0.5, 0.25, 0.25]


def test_a_layer_that_stands_in_two_places_stays_one() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(4, 4)
            self.b = self.a

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x))

    model = Twice()
    assert fk.replace_linears(model, config()) == ["a", "b"]
    assert model.a is model.b


# Errors leave everything as it was


@pytest.mark.parametrize(
    ("options", "targets", "text"),
    [
        ({}, ["0", "nope"], r"\['nope'\] match no linear layer of Sequential; it has \['0', '2', '4'\]"),
        ({}, "nope.*", "match no linear layer"),
        ({}, ["1"], "match no linear layer"),
        ({"loss_weight": {"0": 0.5}}, "all-linear", "no pattern for layer '2'"),
        ({"loss_weight": {".*": 0.5, "head": 1.0}}, "all-linear", r"match no adapted layer: \['head'\]"),
    ],
)
def test_bad_targets_leave_the_model_alone(options: dict[str, Any], targets: Any, text: str) -> None:
    model = mlp()
    with pytest.raises(ValueError, match=text):
        fk.replace_linears(model, config(**options), targets)
    assert [type(m) for m in model] == [nn.Linear, nn.ReLU, nn.Linear, nn.ReLU, nn.Linear]
    assert all(p.requires_grad for p in model.parameters())
    assert not hasattr(model, "_fvae_hooks")


@pytest.mark.parametrize("weights", [(1.0, 1.0), (0.5, 1.0), (0.0, 0.1)])
def test_weights_that_leave_the_variance_without_bound_warn(weights: tuple[float, float]) -> None:
    kl_weight, gamma_weight = weights
    with pytest.warns(UserWarning, match=f"kl_weight={kl_weight:g} is not above gamma_weight={gamma_weight:g}"):
        make(kl_weight=kl_weight, gamma_weight=gamma_weight)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make(kl_weight=10.0)
        make(kl_weight=0.0, gamma_weight=0.0)
        make(objective="vae2lat")


def test_where_the_variance_is_held_the_mean_alone_can_grow() -> None:
    held = {"logvar1_start": -4.0, "logvar1_held": True, "gamma_weight": 1.0}
    with pytest.warns(UserWarning, match="kl_weight=0.5 is not above .* its mean can grow without end"):
        make(kl_weight=0.5, **held)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make(kl_weight=1.0, **held)


def test_the_latent_terms_are_least_where_the_warning_says() -> None:
    logvar = torch.zeros(1, 1, requires_grad=True)
    mean, beta, delta = torch.zeros(1, 1), 4.0, 1.0
    (beta * reference.gaussian_kl(mean, logvar) + delta * reference.expected_log_prior(mean, logvar)).backward()
    assert logvar.grad is not None
    assert float(logvar.grad) < 0  # at var = 1 it still wants to grow
    at = torch.full((1, 1), math.log(beta / (beta - delta)), requires_grad=True)
    (beta * reference.gaussian_kl(mean, at) + delta * reference.expected_log_prior(mean, at)).backward()
    assert at.grad is not None
    assert float(at.grad) == pytest.approx(0.0, abs=1e-6)
