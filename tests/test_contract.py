"""One name, one contract: every raw op in every namespace that implements it, through torch.library.opcheck."""

import inspect

import pytest
import torch

import fvae_kernels as fk
from fvae_kernels import _library, reference, testing
from fvae_kernels._backend import why_missing
from fvae_kernels.ops._checks import token_flags

DTYPES = (torch.float32, torch.bfloat16)


def implemented():
    return [
        (backend, name)
        for backend in _library.NAMESPACES
        if why_missing(backend) is None
        for name in _library.implemented(backend, "cpu")
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
    grads = [torch.tensor(0.5, dtype=_library.wide_dtype(inputs[0])), None]
    return [*(grads if everything else grads[::-1]), *inputs, [True, everything, False, True]]


def _reconstruct_bwd(tokens, everything, dtype):
    inputs = _reconstruct(tokens, everything, dtype)
    return [torch.tensor(0.5, dtype=_library.wide_dtype(inputs[0])), *inputs, [everything, True, True, everything]]


ARGUMENTS = {
    "encode_fwd": _encode,
    "encode_bwd": _encode_bwd,
    "divergence_fwd": _divergence,
    "divergence_bwd": _divergence_bwd,
    "reconstruct_fwd": _reconstruct,
    "reconstruct_bwd": _reconstruct_bwd,
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("backend", "name"), implemented())
def test_opcheck(backend, name, dtype):
    operator = getattr(_library.RAW[backend], name).default
    for arguments in samples(name, dtype):
        plain = tuple(a.detach() if isinstance(a, torch.Tensor) else a for a in arguments)
        torch.library.opcheck(operator, plain)


def test_every_raw_op_is_sampled_and_faked():
    assert set(ARGUMENTS) == set(_library.SCHEMAS) == set(_library.FAKES)


@pytest.mark.parametrize("name", _library.SCHEMAS)
def test_schemas_agree_between_namespaces(name):
    schemas = {str(getattr(raw, name).default._schema).partition("::")[2] for raw in _library.RAW.values()}
    assert len(schemas) == 1


@pytest.mark.parametrize("backend", _library.NAMESPACES)
def test_a_forward_comes_with_its_backward(backend):
    for device in ("cpu", "cuda"):
        names = set(_library.implemented(backend, device))
        assert {n.replace("_fwd", "_bwd") for n in names if n.endswith("_fwd")} == {
            n for n in names if n.endswith("_bwd")
        }


@pytest.mark.parametrize("op", testing.INPUTS)
def test_public_op_reads_as_its_reference(op):
    public, plain = (inspect.signature(getattr(module, op)).parameters for module in (fk, reference))
    assert list(public) == [*plain, "backend"]
    assert [p.default for p in public.values()][:-1] == [p.default for p in plain.values()]
    assert public["backend"].kind is inspect.Parameter.KEYWORD_ONLY
