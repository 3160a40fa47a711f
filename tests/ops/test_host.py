"""Calls that a step makes often, by the compiled library and by PyTorch's from Python."""

from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from fvae_kernels.ops import _host

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
    before = _host.looks_of(parameters)
    parameters[1].data = parameters[1].data.clone()
    assert _host.look_as(parameters, before), "other memory of the same layout"
    parameters[1] = change(parameters[1])
    assert not _host.look_as(parameters, before)


OTHERS = {
    "x's dtype": lambda x, base: (x.bfloat16(), base),
    "base's dtype": lambda x, base: (x, base.double()),
    "x's device": lambda x, base: (x.to("meta"), base),
    "base's device": lambda x, base: (x, base.to("meta")),
    "features": lambda x, base: (torch.ones(2, 5, 3), base),
    "outputs": lambda x, base: (x, torch.ones(2, 5, 7)),
    "tokens of one": lambda x, base: (x, torch.ones(2, 4, 6)),
    "dimensions of one": lambda x, base: (x, torch.ones(10, 6)),
    "no dimension": lambda x, base: (torch.ones(()), base),
}


@pytest.mark.usefixtures("_way")
@pytest.mark.parametrize("change", OTHERS.values(), ids=OTHERS)
def test_kinds_tell_every_change(change):
    x, base = torch.ones(2, 5, 4), torch.ones(2, 5, 6)
    before = _host.kind_of(x, base)
    assert _host.kind_of(torch.zeros(3, 4, requires_grad=True), torch.zeros(3, 12)[:, ::2]) == before, "other tokens"
    assert _host.kind_of(*change(x, base)) != before


@pytest.mark.usefixtures("_way")
def test_kinds_tell_autocast():
    x, base = torch.ones(5, 4), torch.ones(5, 6)
    found = [_host.kind_of(x, base)]
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast("cpu", dtype=dtype):
            found.append(_host.kind_of(x, base))
    with torch.autocast("cpu", enabled=False):
        assert _host.kind_of(x, base) == found[0]
    assert len(set(found)) == 3


@pytest.mark.usefixtures("_way")
def test_seeds_come_from_the_default_generator():
    torch.manual_seed(3)
    expected = [torch.randint(2**63 - 1, (), dtype=torch.int64) for _ in range(3)]
    torch.manual_seed(3)
    like = torch.ones(2, dtype=torch.bfloat16, requires_grad=True) * 2
    seeds = [_host.seed_like(like) for _ in range(3)]
    assert seeds == expected
    assert [(s.dtype, s.shape, s.requires_grad) for s in seeds] == [(torch.int64, (), False)] * 3
    assert _host.seed_like(like.to("meta")).device.type == "meta"


@pytest.mark.usefixtures("_way")
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_empties_are_as_the_tensors(device):
    tensors = [nn.Parameter(torch.ones(3, 4, dtype=torch.bfloat16)), torch.ones(0), torch.ones(2, 5).double().t()]
    tensors = [t.data.to(device) if device == "meta" else t for t in tensors]
    made = _host.empties_like([*tensors, tensors[0]], (True, True, True, False))
    assert len(made) == 3
    assert _host.look_as(made, _host.looks_of(tensors))
    assert [type(t) for t in made] == [torch.Tensor] * 3
    assert not any(t.requires_grad or t._is_view() for t in made)
    assert device == "meta" or made[0].data_ptr() != tensors[0].data_ptr()
    assert len(_host.empties_like(tensors, (False,) * 3)) == 0


@pytest.mark.usefixtures("_way")
@given(sizes=st.lists(st.integers(0, 70), min_size=1, max_size=8), data=st.data())
def test_empties_do_not_overlap(sizes, data):
    dtypes = [data.draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float64])) for _ in sizes]
    like = [torch.ones(n, dtype=t) for n, t in zip(sizes, dtypes, strict=True)]
    made = list(_host.empties_like(like, (True,) * len(sizes)))
    for number, t in enumerate(made):
        t.fill_(number)
    assert all(bool((t == number).all()) for number, t in enumerate(made))
    assert all(t.data_ptr() % 64 == 0 for t in made)


def test_a_list_of_empties(compiled_library):
    """One piece of memory, and a tensor for Python when an entry is read."""
    made = compiled_library.empties_like([torch.ones(3), torch.ones(5)], (True, True))
    first, second = made
    assert first.untyped_storage().data_ptr() == second.untyped_storage().data_ptr()
    assert [made[0].data_ptr(), made[1].data_ptr()] == [first.data_ptr(), second.data_ptr()]
    assert _host.pointers((made, 1)) == ((first.data_ptr(), second.data_ptr()), 1)
    with pytest.raises(IndexError):
        made[2]
    kept = made[1]
    del made, first, second
    assert kept.fill_(2).sum() == 10
    with pytest.raises(RuntimeError, match="meta"):
        compiled_library.empties_like([torch.ones(3), torch.ones(3, device="meta")], (True, True))
    with pytest.raises(TypeError, match="flags"):
        compiled_library.empties_like([torch.ones(3)])


@pytest.mark.usefixtures("_way")
def test_empties_of_several_kinds():
    like = torch.ones(2, 3, dtype=torch.float16)[:, ::2]
    made = _host.empties(like, torch.float64, (3, 4), torch.bfloat16, torch.Size([0, 5]), torch.int64, ())
    found = [(t.dtype, tuple(t.shape), t.is_contiguous(), type(t)) for t in made]
    expected = [(torch.float64, (3, 4)), (torch.bfloat16, (0, 5)), (torch.int64, ())]
    assert found == [(*kind, True, torch.Tensor) for kind in expected]
    assert _host.empties(like.to("meta"), torch.float32, (2,))[0].device.type == "meta"
    with pytest.raises(RuntimeError, match="negative"):
        _host.empties(like, torch.float32, (-1,))
    with pytest.raises((TypeError, ValueError)):
        _host.empties(like, torch.float32)


@pytest.mark.usefixtures("_way")
def test_tensors_lie_where_they_lay():
    base = torch.ones(8)
    tensors = [base, nn.Parameter(torch.ones(3)), base[2:], torch.ones(0)]
    addresses = _host.addresses_of(tensors)
    assert _host.lie_at([base[:], *tensors[1:]], addresses), "another tensor at the same place"
    assert not _host.lie_at(tensors[:-1], addresses)
    assert not _host.lie_at([*tensors[:2], base[1:], tensors[3]], addresses)
    tensors[1].data = tensors[1].data.clone()
    assert not _host.lie_at(tensors, addresses), "moved"
    assert _host.lie_at([], _host.addresses_of([]))


class Named(NamedTuple):
    """As the arguments of the kernels."""

    first: Any
    second: Any


@pytest.mark.usefixtures("compiled_library")
def test_pointers_of_arguments():
    """Tensors become addresses, and named tuples plain ones; a plain tuple without a tensor first stays."""
    a, b, constants = torch.ones(2), nn.Parameter(torch.ones(3)), (1, (2.5, None))
    arguments = (Named(a, Named(3, b)), constants, (a, 4), None, True, 1.5, b, Named(constants, 2), ())
    at, bt = a.data_ptr(), b.data_ptr()
    found = _host.pointers(arguments)
    assert found == ((at, (3, bt)), constants, (at, 4), None, True, 1.5, bt, (constants, 2), ())
    assert all(type(entry) is tuple for entry in (found, found[0], found[0][1], found[7]))
    assert found[1] is constants
    assert type(arguments[0]) is Named, "the arguments themselves stay"
    with pytest.raises(TypeError):
        _host.pointers([a])


@pytest.mark.usefixtures("_way")
def test_renewed_has_a_node_of_its_own():
    x = torch.ones(2, 3, requires_grad=True)
    y = x * 2
    z = _host.renewed(y)
    assert z.grad_fn is not y.grad_fn
    assert (z.data_ptr(), z.shape, z._is_view()) == (y.data_ptr(), y.shape, False)
    z.relu_().sum().backward()
    assert torch.equal(x.grad, torch.full((2, 3), 2.0))


@pytest.mark.usefixtures("_way")
def test_other_objects_are_refused():
    with pytest.raises((TypeError, AttributeError)):
        _host.looks_of([torch.ones(2), "text"])
    with pytest.raises((TypeError, AttributeError)):
        _host.addresses_of([torch.ones(2), "text"])
    with pytest.raises((TypeError, AttributeError)):
        _host.lie_at([torch.ones(2), "text"], _host.addresses_of([torch.ones(2)]))
    with pytest.raises(TypeError):
        _host.empties_like([torch.ones(2), None], (True, True))
    with pytest.raises((TypeError, AttributeError)):
        _host.kind_of(torch.ones(2), None)
    with pytest.raises((TypeError, AttributeError)):
        _host.seed_like(None)
