"""layer: the base layer's output, inputs of half precision, and noise drawn by the op; for every backend."""

import pytest
import torch

from fvae_kernels import testing
from tests.helpers.layer_inputs import assert_layer_no_worse, layer_inputs, plain, run_layer

OP = "layer"

not_interpreted = pytest.mark.not_interpreted


@pytest.mark.parametrize("stride", testing.STRIDES)
@pytest.mark.parametrize("lead", [(9,), (2, 3), (0,)])
def test_base_is_added(backend, device, lead, stride):
    inputs = layer_inputs(lead, mask=True, device=device)
    inputs["base"] = testing.Random(5, torch.float64, device)(*lead, 6)
    actual = testing.run(run_layer, testing.restride(inputs, stride), backend=backend)
    testing.assert_same(actual, testing.run(plain, inputs))
    assert "grad_base" in actual


def test_base_is_left_as_it_was(backend, device):
    inputs = layer_inputs(device=device)
    base = torch.randn(5, 6, dtype=torch.float64, device=device)
    before = base.clone()
    y, *_ = run_layer(**inputs, base=base, backend=backend)
    assert torch.equal(base, before)
    y.relu_().sum().backward()  # y is no view: the next layer may write to it
    assert inputs["B"].grad is not None


@pytest.mark.parametrize("x_dtype", [pytest.param(torch.float32, marks=not_interpreted), torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "base_dtype", [torch.bfloat16, *(pytest.param(d, marks=not_interpreted) for d in (torch.float32, torch.float16))]
)
def test_half_precision_around_a_float32_adapter(backend, device, many, x_dtype, base_dtype):
    tokens, seeds = (200, 4) if many(200) == 200 else (12, 8)

    def inputs(seed):
        given = layer_inputs((tokens,), 40, 30, dtype=torch.float32, device=device, seed=seed)
        base = testing.Random(seed, torch.float32, device)(tokens, 30)
        halves = {"x": given["x"].to(x_dtype), "base": base.to(base_dtype)}
        return given | {name: t.detach().requires_grad_() for name, t in halves.items()}

    actual = testing.run(run_layer, inputs(0), backend=backend)
    assert (actual["grad_x"].dtype, actual["grad_B"].dtype) == (x_dtype, torch.float32)
    assert_layer_no_worse(inputs, lambda x, **rest: plain(x.float(), **rest), backend, seeds)


@pytest.mark.parametrize("dropout", [pytest.param(0.0, marks=not_interpreted), 0.3])
def test_noise_is_drawn_from_torchs_generator(backend, device, dropout):
    inputs = layer_inputs((7,), device=device) | {"noise": None}

    def run(seed):
        torch.manual_seed(seed)
        return testing.run(run_layer, inputs, dropout=dropout, backend=backend)

    first, again, other = run(3), run(3), run(4)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not any(torch.equal(first[name], other[name]) for name in ("out0", "grad_B"))
