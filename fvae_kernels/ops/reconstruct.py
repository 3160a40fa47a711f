"""reconstruct: negative log-likelihood of x under the decoder, in nats.

    g      = mlp(latent)                       hidden layers, [N, H], in plain PyTorch
    x_hat  = g O^T + o                         from here on in kernels; no more of x_hat exists than one tile of tokens
    q_d    = mean over tokens of ((x_hat_d - x_d) / t_d)^2
    nll    = sum over features of  q_d / 2 + log |t_d| + log(2 pi) / 2

Backward, with N the number of tokens kept:

    delta  = grad_nll (x_hat - x) / t^2 / N                                grad_t = grad_nll (1 - q) / t
    grad_x = -delta        grad_g = delta O        grad_O = delta^T g      grad_o = column sums of delta
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import reference
from ._backend import resolve
from ._checks import check_features, check_mask, check_shape, check_tensors, check_weight, rows, token_flags
from ._once import differentiable_once
from ._raw import RAW


class ReconstructFunction(torch.autograd.Function):
    """(x [N, D], g [N, H], w_out [D, H], b_out, scale [D], mask bool [N], backend) -> nll"""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        g: Tensor,
        w_out: Tensor,
        b_out: Tensor | None,
        scale: Tensor,
        mask: Tensor | None,
        backend: str,
    ) -> Tensor:
        nll, unit_grad_scale = RAW[backend].reconstruct_fwd(x, g, w_out, b_out, scale, mask)
        ctx.save_for_backward(x, g, w_out, b_out, scale, mask, unit_grad_scale)
        ctx.backend = backend
        return nll

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, grad_nll: Tensor) -> tuple[Tensor | None, ...]:
        *inputs, unit_grad_scale = ctx.saved_tensors
        *needs, need_scale, _, _ = ctx.needs_input_grad
        grads: tuple[Tensor | None, ...] = (None,) * 4
        if any(needs):
            computed = RAW[ctx.backend].reconstruct_bwd(grad_nll, *inputs, needs)
            grads = tuple(grad if need else None for need, grad in zip(needs, computed, strict=True))
        grad_scale = (grad_nll * unit_grad_scale).to(inputs[4].dtype) if need_scale else None
        return *grads, grad_scale, None, None


def reconstruct(
    x: Tensor,
    latent: Tensor,
    hidden: Sequence[tuple[Tensor, Tensor | None]],
    w_out: Tensor,
    b_out: Tensor | None,
    scale: Tensor,
    dropout: float = 0.0,
    mask: Tensor | None = None,
    *,
    backend: str | None = None,
) -> Tensor:
    """-log p(x | z_1, z_2) of equation (4) under Normal(x_hat, diag(scale^2)), in nats.

    Equivalent to::

        for weight, bias in hidden:
            latent = F.dropout(F.relu(F.linear(latent, weight, bias)), dropout)
        x_hat = F.linear(latent, w_out, b_out)
        nll = -torch.distributions.Normal(x_hat, scale.abs()).log_prob(x).sum(-1).mean()

    Args:
        x: [..., D], the target.
        latent: [..., L], the decoder's input.
        hidden: (weight [out, in], bias [out] or None) of each hidden layer, the first one first; may be empty.
        w_out, b_out: output layer, [D, H] and [D] or None.
        scale: [D], standard deviation of each feature; the sign is ignored.
        dropout: probability after each hidden layer; 0 in evaluation.
        mask: [...], bool or of zeros and ones: the tokens that count. None is all of them.
        backend: "triton", "cpp" or "reference"; None takes the fastest for the device of x.

    Returns:
        nll: 0-dim, mean over tokens, 0 if there are none; float32 for half dtypes, else the dtype of x.

    Raises:
        TypeError: not floating point, or more than one dtype.
        ValueError: shapes do not fit, more than one device, or dropout outside [0, 1).
        BackendUnavailable: the named backend cannot run here.
    """
    _check(x, latent, hidden, w_out, b_out, scale, dropout, mask)
    backend = resolve("reconstruct", x.device, backend)
    if backend == "reference":
        return reference.reconstruct(x, latent, hidden, w_out, b_out, scale, dropout, mask)
    g = reference.mlp(rows(latent), hidden, dropout).to(x.dtype)  # autocast may have changed its dtype
    return ReconstructFunction.apply(rows(x), g, w_out, b_out, scale, token_flags(mask), backend)


def _check(
    x: Tensor,
    latent: Tensor,
    hidden: Sequence[tuple[Tensor, Tensor | None]],
    w_out: Tensor,
    b_out: Tensor | None,
    scale: Tensor,
    dropout: float,
    mask: Tensor | None,
) -> None:
    layers: dict[str, Tensor | None] = {}
    for i, (weight, bias) in enumerate(hidden):
        layers |= {f"hidden[{i}][0]": weight, f"hidden[{i}][1]": bias}
    check_tensors("reconstruct", x=x, latent=latent, **layers, w_out=w_out, b_out=b_out, scale=scale)
    check_features("reconstruct", "x", x)
    check_features("reconstruct", "latent", latent)
    check_shape(
        "reconstruct",
        "latent",
        latent,
        (*x.shape[:-1], latent.shape[-1]),
        "the leading shape of x, then latent entries",
    )
    features, of = latent.shape[-1], "latent"
    for i, (weight, bias) in enumerate(hidden):
        check_weight("reconstruct", f"hidden[{i}][0]", weight, features, of)
        check_shape(
            "reconstruct", f"hidden[{i}][1]", bias, weight.shape[:1], f"one entry for each row of hidden[{i}][0]"
        )
        features, of = weight.shape[0], f"the output of hidden[{i}]"
    check_weight("reconstruct", "w_out", w_out, features, of)
    D = x.shape[-1]
    check_shape("reconstruct", "w_out", w_out, (D, features), "one row for each feature of x")
    check_shape("reconstruct", "b_out", b_out, (D,), "one entry for each feature of x")
    check_shape("reconstruct", "scale", scale, (D,), "one entry for each feature of x")
    check_mask("reconstruct", mask, x.shape[:-1], x.device)
    if not 0 <= dropout < 1:
        raise ValueError(f"reconstruct: dropout={dropout!r}; expected a probability, at least 0 and below 1")
