"""layer: z_1's log-variance bounded above or held, under every objective, on every backend."""

import pytest
import torch

from fvae_kernels import testing
from tests.helpers.layer_inputs import layer_inputs, plain, replaced, run_layer

OP = "layer"

not_interpreted = pytest.mark.not_interpreted

BOUNDED = {"logvar1_start": -0.3, "logvar1_max": -0.3}
HELD = {"logvar1_start": -1.0, "logvar1_held": True}
OPTIONS = [
    BOUNDED,
    HELD,
    BOUNDED | {"gamma_estimator": "monte_carlo", "encoder_hidden": ()},
    HELD | {"gamma_estimator": "monte_carlo", "encoder_hidden": (), "decoder_hidden": ()},
    BOUNDED | {"objective": "symmetric", "kl_weight": 1.5},
    HELD | {"objective": "beta_vae2lat", "kl_weight": 3.0, "fusion": "average"},
]


@not_interpreted
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_gradcheck(backend, device, options, dropout):
    inputs = layer_inputs((4,), D=5, M=4, mask=True, device=device, **options)
    names = list(testing.leaves(inputs))

    def function(*tensors):
        torch.manual_seed(7)  # the same activations are dropped at every call
        return run_layer(**replaced(inputs, dict(zip(names, tensors, strict=True))), dropout=dropout, backend=backend)

    assert torch.autograd.gradcheck(function, tuple(testing.leaves(inputs).values()), fast_mode=True)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_matches_reference(backend, device, options):
    inputs = layer_inputs((9,), mask=True, device=device, **options)
    testing.assert_same(testing.run(run_layer, inputs, backend=backend), testing.run(plain, inputs))


@pytest.mark.parametrize("options", [BOUNDED, HELD], ids=str)
def test_the_bounds_matter(device, options):
    """Results with and without bounds differ, so a kernel that ignores them fails `test_matches_reference`."""
    bounded, free = (layer_inputs((9,), mask=True, device=device, **given) for given in (options, {}))
    with_bounds, without = testing.run(plain, bounded), testing.run(plain, free)
    assert set(with_bounds) == set(without)
    differing = {name for name in with_bounds if not torch.equal(with_bounds[name], without[name])}
    assert len(differing) > len(with_bounds) // 2


def test_a_gradient_at_the_bound_and_none_beyond(backend, device):
    """Log-variances equal the bias: below, at and above the bound."""
    inputs = layer_inputs((4,), device=device, **BOUNDED, encoder_hidden=())
    hidden, separate, w_mean, b_mean, w_logvar, _ = inputs["encoder1"]
    bias = torch.tensor([-1.0, BOUNDED["logvar1_max"], 0.5], dtype=w_mean.dtype, device=device, requires_grad=True)
    encoder = hidden, separate, w_mean, b_mean, torch.zeros_like(w_logvar, requires_grad=True), bias
    y, loss, *_ = run_layer(**{**inputs, "encoder1": encoder}, backend=backend)
    (grad,) = torch.autograd.grad(y.sum() + loss, bias)
    assert (grad != 0).tolist() == [True, True, False]
