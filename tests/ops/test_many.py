"""Calls on many tensors at once, by the compiled library and by PyTorch's one after the other."""

import pytest
import torch
from torch import nn

from fvae_kernels.ops import _many


@pytest.fixture(params=["compiled", "PyTorch's"])
def _way(request, monkeypatch):
    if request.param != "compiled":
        monkeypatch.setattr(_many, "compiled", lambda: None)
    elif _many.compiled() is None:
        pytest.skip("the compiled library is not built")


CHANGES = {
    "dtype": lambda p: p.data.double(),
    "16-bit dtype": lambda p: p.data.bfloat16(),
    "bits": lambda p: p.data.view(torch.int32).view(torch.float32).half(),
    "shape": lambda p: p.data.reshape(2, 8),
    "one dimension less": lambda p: p.data.reshape(16),
    "strides": lambda p: p.data.t(),
    "device": lambda p: p.data.to("meta"),
}


@pytest.mark.usefixtures("_way")
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_looks_tell_every_change(change):
    parameters = [nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(4, 4))]
    before = _many.looks_of(parameters)
    parameters[1].data = parameters[1].data.clone()
    assert _many.looks_of(parameters) == before, "other memory of the same layout"
    parameters[1] = change(parameters[1])
    assert _many.looks_of(parameters) != before


@pytest.mark.usefixtures("_way")
def test_empties_are_as_the_tensors():
    tensors = [nn.Parameter(torch.ones(3, 4, dtype=torch.bfloat16)), torch.ones(0), torch.ones(2, device="meta")]
    made = _many.empties_like(tensors)
    assert _many.looks_of(made) == _many.looks_of(tensors)
    assert [type(t) for t in made] == [torch.Tensor] * 3
    assert not any(t.requires_grad for t in made)
    assert made[0].data_ptr() != tensors[0].data_ptr()


@pytest.mark.usefixtures("_way")
def test_other_objects_are_refused():
    with pytest.raises((TypeError, AttributeError)):
        _many.looks_of([torch.ones(2), "text"])
    with pytest.raises(TypeError):
        _many.empties_like([torch.ones(2), None])
