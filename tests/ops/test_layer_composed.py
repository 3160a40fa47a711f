"""The layer composed of the smaller ops, for options outside the fused kernel; on this device's backend."""

import pytest
import torch

from fvae_kernels import testing
from tests.helpers.layer_inputs import layer_inputs, plain, run_layer

OBJECTIVES = [
    {},
    {"recon_weight": 0.3, "kl_weight": 2.0, "gamma_weight": 0.5},
    {"gamma_weight": (0.5, 2.0)},
    {"gamma_estimator": "monte_carlo"},
    {"objective": "symmetric", "kl_weight": 1.5},
]


@pytest.fixture(autouse=True)
def _kernels(kernels):
    if kernels == "reference":
        pytest.skip("there are no kernels here")


@pytest.fixture
def kernels():
    """The backend that runs if none is named."""
    from fvae_kernels.ops._backend import resolve

    return resolve("layer", torch.device("cpu"))


@pytest.mark.parametrize("options", OBJECTIVES, ids=str)
@pytest.mark.parametrize("more", [{}, {"fusion": "average", "detach_target": True}], ids=str)
def test_matches_reference(options, more):
    inputs = layer_inputs((9,), mask=True, separate_hidden=True, **options, **more)
    with testing.Calls() as calls:
        actual = testing.run(run_layer, inputs, backend=None)
    assert (calls.count("layer_fwd"), calls.count("reconstruct_fwd"), calls.count("reconstruct_bwd")) == (0, 1, 1)
    assert calls.count("divergence_fwd") == (options in OBJECTIVES[:2])
    testing.assert_same(actual, testing.run(plain, inputs))


def test_gradient_of_the_noise():
    inputs = layer_inputs((9,))
    for eps in inputs["noise"]:
        eps.requires_grad_()
    actual = testing.run(run_layer, inputs, backend=None)
    assert "grad_noise[0]" in actual
    testing.assert_same(actual, testing.run(plain, inputs))


def test_under_autocast_it_is_no_worse_than_plain_pytorch():
    inputs = layer_inputs((50,), 64, separate_hidden=True, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        actual, same_dtype = testing.run(run_layer, inputs, backend=None), testing.run(plain, inputs)
    exact = testing.run(plain, testing.convert(inputs, torch.float64))
    testing.assert_no_worse(actual, same_dtype, exact)


def test_more_than_one_dtype_runs_the_reference():
    inputs = layer_inputs((9,))
    *decoder, scale = inputs["decoder"]
    inputs["decoder"] = (*decoder, scale.detach().float())
    with testing.Calls() as calls:
        actual = testing.run(run_layer, inputs, backend=None)
    testing.assert_same(actual, testing.run(plain, inputs))
    assert not any("fvae" in name for name in calls.names)
