"""encode: the two heads of an encoder and the sample of its latent.

    mean = x Wm^T + bm        logvar = x Wv^T + bv        z = mean + exp(logvar / 2) * noise

Backward, with logvar clamped to [-20, 20] in the exponent and [..] = 1 inside of that range, 0 outside:

    grad_heads  = [grad_mean + grad_z | grad_logvar + grad_z * noise * exp(logvar / 2) / 2 * [..]]      N x 2R
    grad_x      = grad_heads [Wm; Wv]         grad_[Wm; Wv] = grad_heads^T x        grad_[bm, bv] = column sums
    grad_noise  = grad_z * exp(logvar / 2)

Both heads are one matrix product, forward and backward, so x is read once.
"""

from typing import Any

import torch
from torch import Tensor

from .. import reference
from ._backend import resolve
from ._checks import check_features, check_shape, check_tensors, check_weight, rows
from ._once import differentiable_once
from ._raw import RAW


class EncodeFunction(torch.autograd.Function):
    """(x [N, D], w_mean, b_mean, w_logvar, b_logvar, noise [N, R], backend) -> mean, logvar, z"""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        w_mean: Tensor,
        b_mean: Tensor | None,
        w_logvar: Tensor,
        b_logvar: Tensor | None,
        noise: Tensor,
        backend: str,
    ) -> tuple[Tensor, Tensor, Tensor]:
        mean, logvar, z = RAW[backend].encode_fwd(x, w_mean, b_mean, w_logvar, b_logvar, noise)
        ctx.save_for_backward(x, w_mean, w_logvar, logvar, noise)
        ctx.backend = backend
        ctx.set_materialize_grads(False)
        return mean, logvar, z

    @staticmethod
    @differentiable_once
    def backward(
        ctx: Any, grad_mean: Tensor | None, grad_logvar: Tensor | None, grad_z: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        x, w_mean, w_logvar, logvar, noise = ctx.saved_tensors
        need_x, need_wm, need_bm, need_wv, need_bv, need_noise, _ = ctx.needs_input_grad
        grad_x = grad_w = grad_b = grad_noise = None
        if need_x or need_wm or need_bm or need_wv or need_bv:
            grad_heads = RAW[ctx.backend].encode_bwd(grad_mean, grad_logvar, grad_z, logvar, noise)
            if need_x:
                grad_x = grad_heads @ torch.cat((w_mean, w_logvar))
            if need_wm or need_wv:
                grad_w = _of_heads(grad_heads, need_wm, need_wv).t() @ x
            if need_bm or need_bv:
                grad_b = _of_heads(grad_heads, need_bm, need_bv).sum(0)
        if need_noise and grad_z is not None:
            limit = reference.LOGVAR_LIMIT
            grad_noise = grad_z * (logvar.clamp(-limit, limit) / 2).exp()
        grad_wm, grad_wv = _split(grad_w, need_wm, need_wv)
        grad_bm, grad_bv = _split(grad_b, need_bm, need_bv)
        return grad_x, grad_wm, grad_bm, grad_wv, grad_bv, grad_noise, None


def _of_heads(grad_heads: Tensor, need_mean: bool, need_logvar: bool) -> Tensor:
    """Columns of the heads whose gradients are needed: [N, R] or [N, 2R]."""
    R = grad_heads.shape[1] // 2
    return grad_heads[:, 0 if need_mean else R : 2 * R if need_logvar else R]


def _split(grad: Tensor | None, need_mean: bool, need_logvar: bool) -> tuple[Tensor | None, Tensor | None]:
    """Split a gradient of both heads. The mean's half comes first."""
    if grad is None or not (need_mean and need_logvar):
        return (grad if need_mean else None), (grad if need_logvar else None)
    R = grad.shape[0] // 2
    return grad[:R], grad[R:]


def encode(
    x: Tensor,
    w_mean: Tensor,
    b_mean: Tensor | None,
    w_logvar: Tensor,
    b_logvar: Tensor | None,
    noise: Tensor,
    *,
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, log-variance and sample of q(z | x) = N(mean, diag(exp logvar)), reparameterised.

    Equivalent to::

        mean, logvar = F.linear(x, w_mean, b_mean), F.linear(x, w_logvar, b_logvar)
        z = mean + (logvar.clamp(-20, 20) / 2).exp() * noise

    Args:
        x: [..., D].
        w_mean, w_logvar: [R, D].
        b_mean, b_logvar: [R] or None.
        noise: [..., R], standard normal.
        backend: "triton", "cpp" or "reference"; None takes the fastest for the device of x.

    Returns:
        mean, logvar, z: [..., R] in the dtype of x; sums are taken in float32 at least. logvar is not clamped.

    Raises:
        TypeError: not floating point, or more than one dtype.
        ValueError: shapes do not fit, or more than one device.
        BackendUnavailable: the named backend cannot run here.
    """
    check_tensors("encode", x=x, w_mean=w_mean, b_mean=b_mean, w_logvar=w_logvar, b_logvar=b_logvar, noise=noise)
    check_features("encode", "x", x)
    check_weight("encode", "w_mean", w_mean, x.shape[-1], of="x")
    R = w_mean.shape[0]
    check_shape("encode", "w_logvar", w_logvar, tuple(w_mean.shape), "the shape of w_mean")
    check_shape("encode", "b_mean", b_mean, (R,), "one entry for each row of w_mean")
    check_shape("encode", "b_logvar", b_logvar, (R,), "one entry for each row of w_logvar")
    check_shape(
        "encode", "noise", noise, (*x.shape[:-1], R), "the leading shape of x and one entry for each row of w_mean"
    )
    backend = resolve("encode", x.device, backend)
    if backend == "reference":
        return reference.encode(x, w_mean, b_mean, w_logvar, b_logvar, noise)
    outputs = EncodeFunction.apply(rows(x), w_mean, b_mean, w_logvar, b_logvar, rows(noise), backend)
    mean, logvar, z = (t.view(noise.shape) for t in outputs)
    return mean, logvar, z
