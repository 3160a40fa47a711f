"""Raw operators: each schema and each fake declared once, for the namespace of every kernel backend.

``torch.ops.fvae_cpp.encode_fwd`` and ``torch.ops.fvae_triton.encode_fwd`` are one contract with two implementations.
Declaring them needs neither: the compiled library (``_C``) and the Triton kernels (``_triton``) contribute
implementations when they are loaded. Raw operators have no autograd formula and check little; `ops` wraps them.

Tokens are flattened to N; `mask` is a bool [N]. A backward takes `needs`, one flag for each gradient that it returns,
and returns an empty tensor [0] for those that are not needed. A gradient that is None counts as zero.
"""

import functools
import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ._layer_inputs import Arriving, Needs, Networks, Options, Tensors, schema_of

NAMESPACES = {"triton": "fvae_triton", "cpp": "fvae_cpp"}
MODULES = {"triton": "fvae_kernels._triton.launchers", "cpp": "fvae_kernels._C"}

_DIVERGENCE = (
    "Tensor mean1, Tensor logvar1, Tensor mean2, Tensor logvar2, float prior2_mean, float prior2_std, Tensor? mask"
)
_RECONSTRUCT = "Tensor x, Tensor g, Tensor w_out, Tensor? b_out, Tensor scale, Tensor? mask"
_LAYER = schema_of(Tensors, Options)

SCHEMAS = {
    "encode_fwd": "(Tensor x, Tensor w_mean, Tensor? b_mean, Tensor w_logvar, Tensor? b_logvar, Tensor noise)"
    " -> (Tensor mean, Tensor logvar, Tensor z)",
    "encode_bwd": "(Tensor? grad_mean, Tensor? grad_logvar, Tensor? grad_z, Tensor logvar, Tensor noise)"
    " -> Tensor grad_heads",
    "divergence_fwd": f"({_DIVERGENCE}) -> (Tensor kl, Tensor gamma)",
    "geometry_fwd": f"({_DIVERGENCE}) -> Tensor",  # Lambda, Delta, W2^2, bound of |Delta|; it has no backward
    "divergence_bwd": f"(Tensor? grad_kl, Tensor? grad_gamma, {_DIVERGENCE}, bool[4] needs)"
    " -> (Tensor grad_mean1, Tensor grad_logvar1, Tensor grad_mean2, Tensor grad_logvar2)",
    "reconstruct_fwd": f"({_RECONSTRUCT}) -> (Tensor nll, Tensor unit_grad_scale)",
    "reconstruct_bwd": f"(Tensor grad_nll, {_RECONSTRUCT}, bool[4] needs)"
    " -> (Tensor grad_x, Tensor grad_g, Tensor grad_w_out, Tensor grad_b_out)",
    "layer_fwd": f"(Tensor? base, {_LAYER}) -> (Tensor y, Tensor terms, Tensor state)",  # terms: loss, nll, kl, gamma
    "layer_bwd": f"({schema_of(Arriving)}, {_LAYER}, Tensor state, bool detach_target, bool[5] needs)"
    " -> (Tensor grad_x, Tensor[] grads)",
}


def wide_dtype(t: Tensor) -> torch.dtype:
    """The dtype of sums: float32 at least."""
    return wide_dtype_of(t.dtype)


def wide_dtype_of(dtype: torch.dtype) -> torch.dtype:
    """The same, by the dtype."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def _needed(needs: list[bool], *like: tuple[Tensor, tuple[int, ...]]) -> tuple[Tensor, ...]:
    return tuple(t.new_empty(shape if need else (0,)) for need, (t, shape) in zip(needs, like, strict=True))


def _encode_fwd(x: Tensor, w_mean: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    shape = (x.shape[0], w_mean.shape[0])
    return x.new_empty(shape), x.new_empty(shape), x.new_empty(shape)


def _encode_bwd(
    grad_mean: Tensor | None, grad_logvar: Tensor | None, grad_z: Tensor | None, logvar: Tensor, noise: Tensor
) -> Tensor:
    return logvar.new_empty(logvar.shape[0], 2 * logvar.shape[1])


def _divergence_fwd(mean1: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return mean1.new_empty((), dtype=wide_dtype(mean1)), mean1.new_empty((), dtype=wide_dtype(mean1))


def _geometry_fwd(mean1: Tensor, *_: Any) -> Tensor:
    return mean1.new_empty(4, dtype=wide_dtype(mean1))


def _divergence_bwd(grad_kl: Tensor | None, grad_gamma: Tensor | None, mean1: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    return _needed(rest[-1], *[(mean1, tuple(mean1.shape))] * 4)


def _reconstruct_fwd(x: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return x.new_empty((), dtype=wide_dtype(x)), x.new_empty(x.shape[1], dtype=wide_dtype(x))


def _reconstruct_bwd(grad_nll: Tensor, x: Tensor, g: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    D, H = x.shape[1], g.shape[1]
    return _needed(rest[-1], (x, tuple(x.shape)), (g, tuple(g.shape)), (x, (D, H)), (x, (D,)))


def _layer_fwd(base: Tensor | None, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    tensors, options = Tensors(*rest[: len(Tensors._fields)]), Options(*rest[len(Tensors._fields) :])
    x, networks = tensors.x, Networks.of(tensors.parameters, options.encoder_hidden)
    dtype = wide_dtype(networks.B)
    y = x.new_empty(x.shape[0], networks.B.shape[0], dtype=(networks.B if base is None else base).dtype)
    return y, x.new_empty(4, dtype=dtype), x.new_empty(x.shape[0], networks.encoder1.state_width, dtype=dtype)


def _layer_bwd(*arguments: Any) -> tuple[Tensor, list[Tensor]]:
    rest = arguments[len(Arriving._fields) :]
    tensors, needs = Tensors(*rest[: len(Tensors._fields)]), Needs(*rest[-1])
    options = Options(*rest[len(Tensors._fields) : -3])
    x, parameters = tensors.x, tensors.parameters
    flags = needs.flags([p is not None for p in parameters], options.encoder_hidden)
    B = parameters[-1]
    assert B is not None
    grads = [
        B.new_empty(p.shape if flag and p is not None else (0,)) for flag, p in zip(flags, parameters, strict=True)
    ]
    return x.new_empty(x.shape if needs.x else (0,)), grads


FAKES: dict[str, Callable[..., Any]] = {
    "encode_fwd": _encode_fwd,
    "encode_bwd": _encode_bwd,
    "divergence_fwd": _divergence_fwd,
    "divergence_bwd": _divergence_bwd,
    "geometry_fwd": _geometry_fwd,
    "reconstruct_fwd": _reconstruct_fwd,
    "reconstruct_bwd": _reconstruct_bwd,
    "layer_fwd": _layer_fwd,
    "layer_bwd": _layer_bwd,
}

for _namespace in NAMESPACES.values():
    for _name, _schema in SCHEMAS.items():
        torch.library.define(f"{_namespace}::{_name}", _schema, tags=(torch.Tag.pt2_compliant_tag,))
        torch.library.register_fake(f"{_namespace}::{_name}", FAKES[_name])

RAW = {backend: getattr(torch.ops, namespace) for backend, namespace in NAMESPACES.items()}


@functools.cache
def load(backend: str) -> str | None:
    """Load the kernels of a backend, once. None, or why they cannot be loaded."""
    try:
        importlib.import_module(MODULES[backend])
    except (ImportError, OSError) as error:
        return str(error)
    except Exception as error:  # what decorating a kernel raises in a Triton that does not know its parts
        return f"{type(error).__name__}: {error}"
    return None


def triton_part(name: str) -> Any:
    """A module of `_triton`, which nothing else imports: `tables` needs no Triton, the others do."""
    return importlib.import_module(f"fvae_kernels._triton.{name}")


def implemented(backend: str, device_type: str) -> tuple[str, ...]:
    """Raw operators of a loaded backend that have a kernel for tensors on `device_type` ("cpu", "cuda")."""
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    return tuple(name for name in SCHEMAS if has(f"{NAMESPACES[backend]}::{name}", device_type.upper()))
