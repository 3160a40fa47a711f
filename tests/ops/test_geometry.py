"""geometry, through latent_geometry: the reference, low precision, edges, errors; for every backend that has the op.

Its definitions are tested in test_diagnostics.py.
"""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import fvae_kernels as fk
from fvae_kernels import testing
from fvae_kernels.diagnostics import latent_geometry

OP = "geometry"


def geometry(inputs, backend="reference"):
    return latent_geometry(**inputs, backend=backend)


@torch.no_grad()
def run(inputs, backend="reference"):
    return geometry(inputs, backend)


def exact_and_rounded(inputs):
    return run(testing.convert(inputs, torch.float64)), run(inputs)


@given(
    lead=st.sampled_from([(), (0,), (1,), (5,), (2, 3), (33,), (130,)]),
    R=st.sampled_from([1, 3, 16, 19, 70]),
    mask=st.booleans(),
    stride=st.sampled_from(testing.STRIDES),
    seed=st.integers(0, 2**16),
)
def test_matches_reference(backend, device, lead, R, mask, stride, seed):
    inputs = testing.restride(testing.divergence_inputs(lead, R, mask, device=device, seed=seed), stride)
    testing.assert_same(run(inputs, backend), run(inputs), rtol=1e-12)


def test_many_tiles_match_reference(backend, device, many):
    inputs = testing.divergence_inputs((many(20_001),), 3, True, device=device)
    found = run(inputs, backend)
    testing.assert_same(found, run(inputs), rtol=1e-12)
    testing.assert_same(found, run(inputs, backend), rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_low_precision_is_no_worse(backend, device, dtype):
    inputs = testing.divergence_inputs((300,), 16, mask=True, dtype=dtype, device=device)
    exact, rounded = exact_and_rounded(inputs)
    testing.assert_no_worse(run(inputs, backend), rounded, exact)


def test_nothing_counts_where_there_is_no_token(backend, device):
    empty = testing.divergence_inputs((0,), device=device)
    hidden = testing.divergence_inputs((4,), device=device) | {"mask": torch.zeros(4, device=device)}
    for inputs in (empty, hidden):
        assert all(value == 0 for value in run(inputs, backend).values())


def test_masked_tokens_may_be_anything(backend, device):
    inputs = testing.divergence_inputs((3,), device=device) | {"mask": torch.tensor([True, False, True], device=device)}
    expected = run(inputs, backend)
    for name in ("mean1", "logvar1", "mean2", "logvar2"):
        inputs[name].data[1] = torch.nan
    testing.assert_same(run(inputs, backend), expected, rtol=0)


@pytest.mark.parametrize("name", ["mean1", "logvar1", "mean2", "logvar2"])
@pytest.mark.parametrize("value", [torch.nan, 50.0, -50.0])
def test_nan_travels_and_logvar_is_clamped(backend, device, name, value):
    inputs = testing.divergence_inputs((3,), device=device)
    inputs[name].data[1, 2] = value
    testing.assert_same(run(inputs, backend), run(inputs), rtol=1e-12)


def test_a_kernel_has_no_backward_and_says_so(backend, device):
    inputs = testing.divergence_inputs(device=device)
    if backend == "reference":
        assert geometry(inputs, backend)["W2_squared"].requires_grad
        return
    with pytest.raises(fk.BackendUnavailable, match=r"no backward.*torch\.no_grad"):
        geometry(inputs, backend)
    with fk.use_backend(backend), pytest.raises(fk.BackendUnavailable):
        geometry(inputs, None)
    assert geometry(inputs, None)["W2_squared"].requires_grad, "unnamed, PyTorch runs where a gradient is asked for"


def test_unnamed_takes_the_kernel(backend, device):
    raw = {"cpp": "fvae_cpp.geometry_fwd", "triton": "fvae_triton.geometry_fwd"}
    inputs = testing.divergence_inputs(device=device)
    with fk.use_backend(backend), testing.Calls() as calls:
        run(inputs, None)
    assert calls.count("geometry_fwd") == (backend in raw)


@pytest.mark.parametrize(
    ("change", "error", "said"),
    [
        ({"logvar2": torch.zeros(4, 3).double()}, ValueError, r"latent_geometry: logvar2 has shape \(4, 3\); expected"),
        ({"mean2": torch.zeros(5, 3)}, TypeError, "latent_geometry: mean2 is torch.float32 but mean1 is torch.float64"),
        ({"mask": torch.ones(4)}, ValueError, "latent_geometry: mask has shape"),
        ({"prior2_std": 0.0}, ValueError, r"latent_geometry: prior2_std=0\.0; expected a finite number above 0"),
    ],
)
def test_errors(change, error, said):
    with pytest.raises(error, match=said):
        latent_geometry(**(testing.divergence_inputs() | change))
