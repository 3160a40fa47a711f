"""Every raw op of every backend passes torch.library.opcheck; forwards have backwards; ops have their reference."""

import inspect

import pytest
import torch

from fvae_kernels import ops, reference, testing
from fvae_kernels.ops import _raw
from fvae_kernels.ops._backend import why_missing
from fvae_kernels.ops._checks import token_flags
from tests.helpers.layer_inputs import layer_inputs, raw_inputs

DTYPES = (torch.float32, torch.bfloat16)


def implemented():
    return [
        (backend, name)
        for backend in _raw.NAMESPACES
        if why_missing(backend) is None
        for name in _raw.implemented(backend, testing.device_of(backend))
    ]


def samples(name, dtype):
    """Arguments of a raw op: everything given, nothing optional given, no tokens."""
    for tokens, everything in ((5, True), (3, False), (0, True)):
        yield ARGUMENTS[name](tokens, everything, dtype)


def _encode(tokens, everything, dtype):
    return list(testing.encode_inputs((tokens,), bias=everything, dtype=dtype).values())


def _divergence(tokens, everything, dtype):
    *inputs, mask = testing.divergence_inputs((tokens,), mask=everything, dtype=dtype).values()
    return [*inputs, token_flags(mask)]


def _reconstruct(tokens, everything, dtype):
    inputs = testing.reconstruct_inputs((tokens,), hidden=(), bias=everything, mask=everything, dtype=dtype)
    return [inputs[n] for n in ("x", "latent", "w_out", "b_out", "scale")] + [token_flags(inputs["mask"])]


def _encode_bwd(tokens, everything, dtype):
    logvar, *grads, noise = (torch.randn(tokens, 3, dtype=dtype) for _ in range(5))
    return [*(grads if everything else [None, None, grads[0]]), logvar, noise]


def _divergence_bwd(tokens, everything, dtype):
    inputs = _divergence(tokens, everything, dtype)
    grads = [torch.tensor(0.5, dtype=_raw.wide_dtype(inputs[0])), None]
    return [*(grads if everything else grads[::-1]), *inputs, [True, everything, False, True]]


def _reconstruct_bwd(tokens, everything, dtype):
    inputs = _reconstruct(tokens, everything, dtype)
    return [torch.tensor(0.5, dtype=_raw.wide_dtype(inputs[0])), *inputs, [everything, True, True, everything]]


def _layer(tokens, everything, dtype):
    options = {"fusion": "average", "encoder_hidden": (5, 4)} if everything else {"encoder_hidden": ()}
    inputs = layer_inputs((tokens,), bias=everything, mask=everything, dtype=dtype, **options)

    base = torch.randn(tokens, inputs["B"].shape[0], dtype=dtype) if everything else None
    return [base, *raw_inputs(inputs, 0.25, torch.tensor(5) if everything else None)]


def _layer_bwd(tokens, everything, dtype):
    base, *inputs = _layer(tokens, everything, dtype)
    y, terms, state = map(torch.randn_like, _raw.FAKES["layer_fwd"](base, *inputs))
    loss = terms[0].clone()
    grads, needs = (
        ([y, loss, loss, None, loss], [True] * 5)
        if everything
        else ([None] * 3 + [loss, None], [True, True] + [False] * 3)
    )
    return [*grads, *inputs, state, not everything, needs]


ARGUMENTS = {
    "encode_fwd": _encode,
    "encode_bwd": _encode_bwd,
    "divergence_fwd": _divergence,
    "divergence_bwd": _divergence_bwd,
    "geometry_fwd": _divergence,
    "reconstruct_fwd": _reconstruct,
    "reconstruct_bwd": _reconstruct_bwd,
    "layer_fwd": _layer,
    "layer_bwd": _layer_bwd,
}


def plain(argument, device):
    if isinstance(argument, list):
        return [plain(entry, device) for entry in argument]
    return argument.detach().to(device) if isinstance(argument, torch.Tensor) else argument


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("backend", "name"), implemented())
def test_opcheck(backend, name, dtype):
    operator = getattr(_raw.RAW[backend], name).default
    for arguments in samples(name, dtype):
        torch.library.opcheck(operator, tuple(plain(a, testing.device_of(backend)) for a in arguments))


def test_every_raw_op_is_sampled_and_faked():
    assert set(ARGUMENTS) == set(_raw.SCHEMAS) == set(_raw.FAKES)


@pytest.mark.parametrize("backend", _raw.NAMESPACES)
def test_a_forward_comes_with_its_backward(backend):
    for device in ("cpu", "cuda"):
        names = set(_raw.implemented(backend, device)) - {"geometry_fwd"}  # a diagnostic, which has none
        assert {n.replace("_fwd", "_bwd") for n in names if n.endswith("_fwd")} == {
            n for n in names if n.endswith("_bwd")
        }


@pytest.mark.parametrize("op", testing.INPUTS)
def test_public_op_reads_as_its_reference(op):
    public, plain = (inspect.signature(getattr(module, op)).parameters for module in (ops, reference))
    assert list(public) == [*plain, "backend"]
    assert [p.default for p in public.values()][:-1] == [p.default for p in plain.values()]
    assert public["backend"].kind is inspect.Parameter.KEYWORD_ONLY


@pytest.mark.parametrize("op", testing.INPUTS)
def test_arguments_are_checked_before_a_backend_is_chosen(op):
    """So the tests of error texts need no backend."""
    inputs = testing.INPUTS[op]()
    first = next(iter(inputs))
    with pytest.raises(TypeError, match=f"{op}: {first} is list; expected a tensor"):
        getattr(ops, op)(**(inputs | {first: [1.0]}), backend="no such backend")
    with pytest.raises(ValueError, match="there is no backend 'no such backend'"):
        getattr(ops, op)(**inputs, backend="no such backend")
