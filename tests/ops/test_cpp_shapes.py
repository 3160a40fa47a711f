"""The C++ kernels on odd shapes in every dtype; `make sanitize` runs it under AddressSanitizer and UBSan.

Values are tested op by op; here results must only be finite. Uninitialised memory holds NaN, so a kernel that reads it
returns NaN, and one that reads past an end stops the sanitized run.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fvae_kernels as fk
from fvae_kernels import reference, testing
from fvae_kernels.ops._backend import why_missing
from tests.helpers.layer_inputs import layer_inputs, plain, run_layer

pytestmark = pytest.mark.skipif(why_missing("cpp") is not None, reason="the C++ kernels are missing")

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def inputs_of(op, lead, D, R, flag, mask, **options):
    """Arguments of an op; `flag` is whether there are biases, or whether the encoders are linear."""
    if op == "encode":
        return testing.encode_inputs(lead, D, R, flag, **options)
    if op == "divergence":
        return testing.divergence_inputs(lead, R, mask, **options)
    if op == "reconstruct":
        return testing.reconstruct_inputs(lead, D, R, (3,) if flag else (), flag, mask, **options)
    return layer_inputs(lead, D, R + 2, flag, mask, rank=R, encoder_hidden=(3,) if flag else (), **options)


@settings(max_examples=150)
@given(
    op=st.sampled_from(["encode", "divergence", "reconstruct", "layer"]),
    lead=st.sampled_from([(), (0,), (1,), (2, 0), (3, 1), (129,), (2, 2, 3)]),
    D=st.integers(1, 70),
    R=st.integers(1, 19),
    flag=st.booleans(),
    mask=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    stride=st.sampled_from(testing.STRIDES),
)
def test_every_dtype_and_shape_gives_what_was_written(op, lead, D, R, flag, mask, dtype, stride):
    inputs = inputs_of(op, lead, D, R, flag, mask, dtype=dtype)
    with testing.poisoned():
        function = run_layer if op == "layer" else getattr(fk, op)
        found = testing.run(function, testing.restride(inputs, stride), backend="cpp")
    expected = testing.run(plain if op == "layer" else getattr(reference, op), inputs)
    assert found.keys() == expected.keys()
    for name, wanted in expected.items():
        assert (found[name].shape, found[name].dtype) == (wanted.shape, wanted.dtype), name
        assert found[name].isfinite().all() or not wanted.isfinite().all(), name
