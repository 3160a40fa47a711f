"""FLOPs of the matrix products inside our raw kernels, by op name. PyTorch's counter cannot see them.

A product of N tokens with a weight takes 2 N times the weight's entries, and each of its gradients as much.
"""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from fvae_kernels.ops._layer_inputs import Arriving, Tensors, encoder_entries


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
}
