"""Inference: the mean path, its cost, and that it changes nothing else."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fvae_kernels as fk
from benchmarks import sides
from tests.helpers.linear_layers import make

SHAPES = [(6, 12), (1, 12), (2, 3, 12), (12,), (0, 12), (2, 0, 12)]


@pytest.mark.parametrize("hidden", [(), (5,)])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_update_is_added_to_the_base_output_which_stays(shape: tuple[int, ...], hidden: tuple[int, ...]) -> None:
    adapter = make(nn.Linear(12, 10).double(), encoder_hidden=hidden).adapter
    x, base = torch.randn(shape).double(), torch.randn(*shape[:-1], 20).double()[..., ::2]
    before = base.clone()
    torch.testing.assert_close(adapter.infer(x, base), before + adapter.infer(x), rtol=1e-13, atol=1e-13)
    assert torch.equal(base, before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_the_sum_has_the_dtype_of_the_base_output(dtype: torch.dtype) -> None:
    adapter, x, base = make().adapter, torch.randn(6, 12), torch.randn(6, 10, dtype=dtype)
    assert torch.equal(adapter.infer(x, base), base + adapter.infer(x).to(dtype))


def test_gradients_pass_in_eval_mode() -> None:
    layer = make(nn.Linear(12, 10).double()).eval()
    assert torch.autograd.gradcheck(layer, torch.randn(2, 3, 12).double().requires_grad_())


@pytest.mark.parametrize("hidden", [(), (5,)])
def test_a_replica_that_holds_plain_tensors_computes_the_same(hidden: tuple[int, ...]) -> None:
    """DataParallel and FSDP replace the parameters of a module by plain tensors."""
    layer, x = make(encoder_hidden=hidden).eval(), torch.randn(6, 12)
    expected, means = layer(x), layer.posterior_means(x)
    for name, parameter in list(layer.adapter.named_parameters()):
        delattr(layer.adapter, name)
        setattr(layer.adapter, name, parameter.detach())
    assert torch.equal(layer(x), expected)
    assert all(torch.equal(a, b) for a, b in zip(layer.posterior_means(x), means, strict=True))


def test_a_replaced_parameter_is_seen_at_once() -> None:
    layer, x = make().eval(), torch.randn(6, 12)
    layer(x)
    layer.adapter.B = nn.Parameter(torch.zeros(10, 3))
    assert torch.equal(layer(x), layer.base_layer(x))


@pytest.mark.parametrize("merged", [False, True])
def test_hooks_of_the_base_layer_see_its_output_and_keep_it(merged: bool) -> None:
    layer, x = make(encoder_hidden=()).eval(), torch.randn(6, 12)
    if merged:
        layer.merge()
    seen: list[Tensor] = []
    layer.base_layer.register_forward_hook(lambda module, args, out: seen.append(out))
    with torch.no_grad():
        layer(x)
        assert torch.equal(seen[0], nn.functional.linear(x, layer.weight, layer.bias))


@pytest.mark.parametrize("tokens", [1, 128, 4096])
def test_costs_no_more_operators_and_bytes_than_lora(tokens: int) -> None:
    found: dict[str, Any] = {name: side.cost() for name, side in sides.inference_sides(tokens, 96).items()}
    for side in ("fvae", "fvae_linear"):
        for counted in ("launches", "bytes"):
            assert found[side][counted] <= found["lora"][counted], (side, counted)
    assert found["fvae_linear"]["launches"] < found["lora"]["launches"]
    assert found["merged"] == found["unloaded"] == found["base"]


def test_a_merged_layer_takes_what_its_base_layer_takes() -> None:
    layer = make(encoder_hidden=()).eval()
    layer.merge()
    assert torch.equal(layer(torch.ones(2, 12)), layer.base_layer(torch.ones(2, 12)))
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        layer(torch.ones(2, 13))
    layer.unmerge()
    with pytest.raises(ValueError, match=r"expected \[\.\.\., 12\]"):
        layer(torch.ones(2, 13))


def test_peft_eval_is_the_layer_without_peft() -> None:
    import peft

    model = sides.OneLinear(12, 10)
    config = fk.FVAELoraConfig(r=3, target_modules=["linear"], encoder_hidden=(5,), init_weights=False)
    inside: Any = peft.get_peft_model(model, config).eval().base_model.model.linear
    for shape in SHAPES:
        x = torch.randn(shape)
        expected = inside.base_layer(x) + inside.fvae_adapter["default"].infer(x)
        torch.testing.assert_close(inside(x), expected)
