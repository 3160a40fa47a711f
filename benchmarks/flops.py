"""FLOPs of the matrix products inside our raw kernels, by op name, or by full name where a backend differs.

PyTorch's counter cannot see them.

A product of N tokens with a weight takes 2 N times the weight's entries, and each of its gradients as much.
"""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from fvae_kernels.ops._layer_inputs import Arriving, Needs, Options, Tensors, encoder_entries


def _entries(parameters: Sequence[Tensor | None]) -> int:
    """Entries of the weights in a list weight, bias, weight, ..."""
    return sum(p.numel() for p in parameters if p is not None and p.dim() > 1)


def _encode_fwd(x: Tensor, w_mean: Tensor, b_mean: Any, w_logvar: Tensor, *_: Any) -> int:
    return 2 * x.shape[0] * _entries([w_mean, w_logvar])


def _reconstruct_fwd(x: Tensor, g: Tensor, w_out: Tensor, *_: Any) -> int:
    return 2 * x.shape[0] * w_out.numel()


def _reconstruct_bwd(grad: Any, x: Tensor, g: Tensor, w_out: Tensor, *rest: Any) -> int:
    _, need_g, need_w, _ = rest[-1]
    return 2 * x.shape[0] * w_out.numel() * (1 + need_g + need_w)  # x_hat is recomputed


def _layer_fwd(base: Any, x: Tensor, parameters: Sequence[Tensor | None], *_: Any) -> int:
    return 2 * x.shape[0] * _entries(parameters)


def _layer_bwd(*arguments: Any) -> int:
    first = len(Arriving._fields)
    arriving, x, parameters, needs = Arriving(*arguments[:first]), arguments[first], arguments[first + 1], arguments[-1]
    need_x, need_encoders, need_decoder, _, need_B = needs
    encoder_hidden = arguments[first + len(Tensors._fields)]
    of_encoders, of_decoder = (
        parameters[: encoder_entries(encoder_hidden)],
        parameters[encoder_entries(encoder_hidden) : -1],
    )
    encoders, skipped = _entries(of_encoders), 0 if need_x else x.shape[1]
    unused = sum(p.numel() for p in of_encoders if p is not None and p.dim() > 1 and p.shape[1] == skipped)
    entries = encoders * need_encoders + encoders - unused
    if arriving.at_decoder:
        entries += _entries(of_decoder) * (2 + need_decoder)  # its outputs are recomputed, and gradients of its inputs
    if arriving.grad_y is not None:
        entries += parameters[-1].numel() * (1 + need_B)
    return 2 * x.shape[0] * entries


def _cpp_layer_fwd(base: Any, *rest: Any) -> int:
    return _layer_fwd(base, *rest) - 2 * rest[0].shape[0] * _left_out(*rest)


def _cpp_layer_bwd(*arguments: Any) -> int:
    first = len(Arriving._fields)
    needs = Needs(*arguments[-1])
    products = needs.encoders + needs.x
    return _layer_bwd(*arguments) - 2 * arguments[first].shape[0] * _left_out(*arguments[first:]) * products


def _left_out(*arguments: Any) -> int:
    """Entries of the head of a held logvar1, if it reads x: the C++ kernels leave it out."""
    count = len(Tensors._fields)
    tensors, options = Tensors(*arguments[:count]), Options(*arguments[count : count + len(Options._fields)])
    head = tensors.parameters[2]
    held = options.encoder_hidden == 0 and options.logvar1_low >= options.logvar1_high
    return head.numel() if held and head is not None else 0


def _none(*_: Any) -> int:
    return 0


FORMULAS: dict[str, Callable[..., int]] = {
    "encode_fwd": _encode_fwd,
    "encode_bwd": _none,  # its products are PyTorch operators
    "divergence_fwd": _none,
    "divergence_bwd": _none,
    "geometry_fwd": _none,
    "reconstruct_fwd": _reconstruct_fwd,
    "reconstruct_bwd": _reconstruct_bwd,
    "layer_fwd": _layer_fwd,
    "layer_bwd": _layer_bwd,
    "fvae_cpp::layer_fwd": _cpp_layer_fwd,
    "fvae_cpp::layer_bwd": _cpp_layer_bwd,
}
