"""FusedFVAELinear: a drop-in for nn.Linear, without PEFT."""

import copy
from typing import Any

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

import fvae_kernels as fk
from fvae_kernels import reference
from tests.helpers.linear_layers import config, make

pytestmark = pytest.mark.filterwarnings("ignore:FVAE. the auxiliary loss entered:UserWarning")


@pytest.mark.parametrize("hidden", [(), (5,), (5, 4)])
@pytest.mark.parametrize("shape", [(4,), (1, 4), (2, 3, 4), (), (0,), (2, 0)])
def test_forward_is_the_equation_for_any_leading_shape(hidden: tuple[int, ...], shape: tuple[int, ...]) -> None:
    layer = make(nn.Linear(12, 10).double(), encoder_hidden=hidden)
    x = torch.randn(*shape, 12, dtype=torch.float64)
    a = layer.adapter
    h = x
    for i in range(len(hidden)):
        h = torch.relu(h @ getattr(a, f"encoder1_hidden{i}_weight").T + getattr(a, f"encoder1_hidden{i}_bias"))
    mean = h @ a.encoder1_mean_weight.T + (a.encoder1_mean_bias if hidden else 0)
    logvar = h @ a.encoder1_logvar_weight.T + a.encoder1_logvar_bias
    base = x @ layer.weight.T + layer.bias
    s = layer.config.alpha / layer.config.rank
    torch.testing.assert_close(layer.eval()(x), base + s * mean @ a.B.T, rtol=1e-12, atol=1e-12)
    torch.manual_seed(5)
    y = layer.train()(x)
    torch.manual_seed(5)
    noise = torch.randn(*shape, 3, dtype=torch.float64)
    torch.testing.assert_close(y, base + s * (mean + (logvar / 2).exp() * noise) @ a.B.T, rtol=1e-12, atol=1e-12)


def test_a_new_layer_in_eval_is_the_base_layer_bit_for_bit() -> None:
    base = nn.Linear(12, 10)
    x = torch.randn(6, 12)
    expected = base(x)
    layer = fk.FusedFVAELinear.from_linear(base.eval(), config())
    assert not layer.training
    assert torch.equal(layer(x), expected)


def test_train_samples_and_eval_does_not() -> None:
    layer, x = make(), torch.randn(6, 12)
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    assert torch.equal(layer(x), layer(x))
    sampled = make(sample_at_inference=True).eval()
    assert not torch.equal(sampled(x), sampled(x))


def test_forward_with_terms_agrees_with_the_reference() -> None:
    layer = make(nn.Linear(12, 10).double(), kl_weight=0.3, recon_weight=0.7, gamma_weight=0.2)
    x = torch.randn(2, 4, 12, dtype=torch.float64, requires_grad=True)
    noise = (torch.randn(2, 4, 3).double(), torch.randn(2, 4, 3).double())
    y, terms = layer.forward_with_terms(x, noise=noise)
    a = layer.adapter
    delta, expected = reference.layer(x, a._encoder(1), a._encoder(2), a._decoder(), a.B, layer.config, noise)
    torch.testing.assert_close(y, layer.base_layer(x) + delta)
    torch.testing.assert_close(terms, expected)
    torch.testing.assert_close(terms.loss, 0.7 * terms.nll + 0.3 * terms.kl - 0.2 * terms.gamma)
    assert all(t.dim() == 0 for t in terms)
    assert torch.autograd.grad(terms.loss, x)[0].abs().sum() > 0


def test_a_mask_leaves_tokens_out_of_the_terms() -> None:
    layer = make(nn.Linear(12, 10).double())
    x, mask = torch.randn(2, 4, 12).double(), torch.tensor([[1, 1, 0, 1], [0, 1, 0, 0]])
    noise = (torch.randn(2, 4, 3).double(), torch.randn(2, 4, 3).double())
    masked = layer.forward_with_terms(x, noise, mask)[1]
    keep = mask.bool()
    kept = layer.forward_with_terms(x[keep], (noise[0][keep], noise[1][keep]))[1]
    torch.testing.assert_close(masked, kept)
    nothing = layer.forward_with_terms(x, noise, torch.zeros_like(mask))[1]
    assert [float(t.detach()) for t in nothing] == [0.0] * 4


def test_no_tokens_give_zero_terms_and_zero_gradients() -> None:
    layer = make()
    y, terms = layer.forward_with_terms(torch.randn(0, 12))
    (y.sum() + terms.loss).backward()
    assert y.shape == (0, 10)
    assert all(float(p.grad.abs().sum()) == 0 for p in layer.adapter.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("everything", [False, True], ids=["float32-adapter", "pure"])
def test_low_precision(dtype: torch.dtype, everything: bool) -> None:
    exact = make(nn.Linear(12, 10).double())
    layer = copy.deepcopy(exact).to(dtype)
    if not everything:
        layer.adapter.float()
    x = torch.randn(64, 12, dtype=torch.float64)
    noise = (torch.randn(64, 3).double(), torch.randn(64, 3).double())
    y, terms = layer.forward_with_terms(x.to(dtype), noise)
    expected, exact_terms = exact.forward_with_terms(x, noise)
    eps = torch.finfo(dtype).eps
    assert y.dtype == dtype
    assert float((y.double() - expected).norm() / expected.norm()) < 4 * eps
    for term, value in zip(terms, exact_terms, strict=True):
        assert term.dtype == torch.float32
        assert abs(float(term.detach()) / float(value.detach()) - 1) < 8 * eps
    (y.float().sum() + terms.loss).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in layer.adapter.parameters())


def test_a_half_base_gets_a_float32_adapter() -> None:
    layer = fk.FusedFVAELinear.from_linear(nn.Linear(12, 10).bfloat16(), config())
    assert {p.dtype for p in layer.adapter.parameters()} == {torch.float32}
    chosen = fk.FusedFVAELinear.from_linear(nn.Linear(12, 10), config(), dtype=torch.bfloat16)
    assert {p.dtype for p in chosen.adapter.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype: torch.dtype) -> None:
    layer, x = make(), torch.randn(32, 12)
    noise = (torch.randn(32, 3), torch.randn(32, 3))
    expected, exact_terms = layer.forward_with_terms(x, noise)
    with torch.autocast("cpu", dtype):
        y, terms = layer.forward_with_terms(x, noise)
        layer(x).float().sum().backward()
    assert y.dtype == dtype
    assert float((y.float() - expected).detach().norm() / expected.detach().norm()) < 8 * torch.finfo(dtype).eps
    assert terms.loss.dtype == torch.float32
    assert float(terms.loss.detach()) == pytest.approx(float(exact_terms.loss.detach()), rel=0.02)


@pytest.mark.parametrize("bias", [True, False])
def test_bias_and_conv1d(bias: bool) -> None:
    linear = nn.Linear(12, 10, bias=bias)
    conv = Conv1D(10, 12)
    with torch.no_grad():
        conv.weight.copy_(linear.weight.T)
        conv.bias.copy_(linear.bias if bias else torch.zeros(10))
    x = torch.randn(5, 12)
    one, two = make(linear, encoder_hidden=()).eval(), make(conv, encoder_hidden=()).eval()
    assert (one.in_features, one.out_features) == (two.in_features, two.out_features) == (12, 10)
    torch.testing.assert_close(one(x), two(x))
    assert (one.bias is None) == (not bias)


def test_weight_and_bias_are_the_frozen_base() -> None:
    layer = make()
    assert layer.weight is layer.base_layer.weight
    assert not layer.weight.requires_grad
    assert all(p.requires_grad for p in layer.adapter.parameters())
    layer(torch.randn(4, 12)).sum().backward()
    assert layer.weight.grad is None


# Merge


@pytest.mark.parametrize("base", [nn.Linear(12, 10), nn.Linear(12, 10, bias=False), Conv1D(10, 12)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_merge_is_exact_and_unmerge_restores_every_bit(base: nn.Module, dtype: torch.dtype) -> None:
    layer = make(copy.deepcopy(base).to(dtype), encoder_hidden=(), rslora=True).eval()
    x, before = torch.randn(7, 12, dtype=dtype), layer.weight.clone()
    expected = layer(x)
    layer.merge()
    assert layer.merged
    torch.testing.assert_close(layer(x), expected, rtol=20 * torch.finfo(dtype).eps, atol=20 * torch.finfo(dtype).eps)
    assert torch.equal(layer(x), layer.base_layer(x))
    with pytest.raises(RuntimeError, match="merged already"):
        layer.merge()
    with pytest.raises(RuntimeError, match="call unmerge"):
        layer.forward_with_terms(x)
    layer.unmerge()
    assert torch.equal(layer.weight, before)
    with pytest.raises(RuntimeError, match="not merged"):
        layer.unmerge()


@pytest.mark.parametrize(
    ("options", "why"), [({}, "non-linear function"), ({"encoder_hidden": (), "sample_at_inference": True}, "random")]
)
def test_merge_refuses_what_no_matrix_equals(options: dict[str, Any], why: str) -> None:
    layer = make(**options)
    before = layer.weight.clone()
    with pytest.raises(ValueError, match=why):
        layer.merge()
    assert torch.equal(layer.weight, before)
    assert not layer.merged


# State


def test_state_dict_round_trip_and_deepcopy_after_a_step() -> None:
    layer, x = make(), torch.randn(4, 12)
    layer(x).sum().backward()
    other = fk.FusedFVAELinear.from_linear(nn.Linear(12, 10), config())
    other.load_state_dict(layer.state_dict())
    twin = copy.deepcopy(layer)
    expected = layer.eval()(x)
    assert torch.equal(other.eval()(x), expected)
    assert torch.equal(twin.eval()(x), expected)


def test_bad_input_says_what_came_and_what_was_expected() -> None:
    layer = make()
    with pytest.raises(ValueError, match=r"shape \(4, 11\); expected \[..., 12\]"):
        layer(torch.randn(4, 11))
    with pytest.raises(ValueError, match=r"expected \[..., 12\]"):
        layer(torch.tensor(1.0))
    with pytest.raises(TypeError, match="int64; expected a floating-point tensor"):
        layer(torch.ones(4, 12, dtype=torch.long))
    with pytest.raises(ValueError, match=r"noise2 has shape \(4, 2\); expected \(4, 3\)"):
        layer.forward_with_terms(torch.randn(4, 12), noise=(torch.randn(4, 3), torch.randn(4, 2)))
    with pytest.raises(TypeError, match=r"cannot adapt Embedding: expected torch.nn.Linear"):
        fk.FusedFVAELinear.from_linear(nn.Embedding(3, 4), config())
    with pytest.raises(ValueError, match="mask"):
        layer.forward_with_terms(torch.randn(4, 12), mask=torch.ones(5))


def test_a_named_backend_that_does_not_cover_the_options_raises() -> None:
    layer = make()
    with fk.use_backend("reference"):
        layer(torch.randn(4, 12))
    if "cpp" in fk.available_backends():
        separate = make(separate_hidden=True)
        separate(torch.randn(4, 12))  # unnamed, what there is
        with fk.use_backend("cpp"), pytest.raises(fk.BackendUnavailable, match="does not cover separate_hidden=True"):
            separate(torch.randn(4, 12))
