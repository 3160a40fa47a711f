"""divergence: KL(q_1 || p_1) and Gamma of equation (4), both in closed form, in nats.

    kl    = 1/2 sum( mean1^2 + var1 - 1 - logvar1 )                                var = exp(logvar)
    gamma = 1/2 sum( mean1^2 + var1 - ((mean2 - mu)^2 + var2) / tau^2 ) - R log tau

Sums run over latent entries; both results are means over the N tokens kept. Backward, with logvar clamped to [-20, 20],
[..] = 1 inside that range and 0 outside, a = grad_kl / N, c = grad_gamma / N:

    grad_mean1 = (a + c) mean1                  grad_logvar1 = (a (var1 - 1) + c var1) / 2 * [..]
    grad_mean2 = -c (mean2 - mu) / tau^2        grad_logvar2 = -c var2 / (2 tau^2) * [..]
"""

import math
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from .. import reference
from ._backend import resolve
from ._checks import check_features, check_mask, check_shape, check_tensors, rows, token_flags
from ._once import differentiable_once
from ._raw import RAW


class DivergenceFunction(torch.autograd.Function):
    """(mean1, logvar1, mean2, logvar2 [N, R], mu, tau, mask bool [N], backend) -> kl, gamma"""

    @staticmethod
    def forward(
        ctx: Any,
        mean1: Tensor,
        logvar1: Tensor,
        mean2: Tensor,
        logvar2: Tensor,
        prior2_mean: float,
        prior2_std: float,
        mask: Tensor | None,
        backend: str,
    ) -> tuple[Tensor, Tensor]:
        kl, gamma = RAW[backend].divergence_fwd(mean1, logvar1, mean2, logvar2, prior2_mean, prior2_std, mask)
        ctx.save_for_backward(mean1, logvar1, mean2, logvar2, mask)
        ctx.prior2, ctx.backend = (prior2_mean, prior2_std), backend
        ctx.set_materialize_grads(False)
        return kl, gamma

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, grad_kl: Tensor | None, grad_gamma: Tensor | None) -> tuple[Tensor | None, ...]:
        mean1, logvar1, mean2, logvar2, mask = ctx.saved_tensors
        needs = list(ctx.needs_input_grad[:4])
        if grad_gamma is None:  # KL does not depend on the second encoder
            needs[2:] = [False, False]
        grads = RAW[ctx.backend].divergence_bwd(
            grad_kl, grad_gamma, mean1, logvar1, mean2, logvar2, *ctx.prior2, mask, needs
        )
        return *(grad if need else None for need, grad in zip(needs, grads, strict=True)), None, None, None, None


def divergence(
    mean1: Tensor,
    logvar1: Tensor,
    mean2: Tensor,
    logvar2: Tensor,
    prior2_mean: float = 1.5,
    prior2_std: float = 1.0,
    mask: Tensor | None = None,
    *,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """KL(q_1 || p_1) and Gamma = E log p_2(z_2) - E log p_1(z_1) of equation (4), closed form, in nats.

    p_1 = N(0, I) and p_2 = N(prior2_mean, prior2_std^2 I).

    Equivalent to::

        var1, var2 = logvar1.clamp(-20, 20).exp(), logvar2.clamp(-20, 20).exp()
        kl = 0.5 * (mean1**2 + var1 - 1 - logvar1.clamp(-20, 20)).sum(-1).mean()
        log_p1 = -0.5 * (mean1**2 + var1).sum(-1).mean()
        log_p2 = -0.5 * (((mean2 - prior2_mean)**2 + var2) / prior2_std**2 + 2 * log(prior2_std)).sum(-1).mean()
        gamma = log_p2 - log_p1

    Args:
        mean1, logvar1, mean2, logvar2: [..., R], as `encode` returns them.
        prior2_mean, prior2_std: mean and standard deviation of every entry of p_2.
        mask: [...], bool or of zeros and ones: the tokens that count. None is all of them.
        backend: "triton", "cpp" or "reference"; None takes the fastest for the device of mean1.

    Returns:
        kl, gamma: 0-dim, means over tokens, 0 if there are none; float32 for half dtypes, else the dtype of mean1.

    Raises:
        TypeError: not floating point, or more than one dtype.
        ValueError: shapes do not fit, more than one device, or an invalid prior.
        BackendUnavailable: the named backend cannot run here.
    """
    check_posteriors("divergence", mean1, logvar1, mean2, logvar2, prior2_mean, prior2_std, mask)
    backend = resolve("divergence", mean1.device, backend)
    if backend == "reference":
        return reference.divergence(mean1, logvar1, mean2, logvar2, prior2_mean, prior2_std, mask)
    kl, gamma = DivergenceFunction.apply(
        rows(mean1),
        rows(logvar1),
        rows(mean2),
        rows(logvar2),
        float(prior2_mean),
        float(prior2_std),
        token_flags(mask),
        backend,
    )
    return kl, gamma


def check_posteriors(
    op: str,
    mean1: Tensor,
    logvar1: Tensor,
    mean2: Tensor,
    logvar2: Tensor,
    prior2_mean: float,
    prior2_std: float,
    mask: Tensor | None,
) -> None:
    """Raise unless the four tensors, the prior and the mask fit together."""
    check_tensors(op, mean1=mean1, logvar1=logvar1, mean2=mean2, logvar2=logvar2)
    check_features(op, "mean1", mean1)
    for name, t in (("logvar1", logvar1), ("mean2", mean2), ("logvar2", logvar2)):
        check_shape(op, name, t, tuple(mean1.shape), "the shape of mean1")
    check_mask(op, mask, mean1.shape[:-1], mean1.device)
    if not isinstance(prior2_mean, Real) or not math.isfinite(prior2_mean):
        raise ValueError(f"{op}: prior2_mean={prior2_mean!r}; expected a finite number")
    if not isinstance(prior2_std, Real) or not math.isfinite(prior2_std) or prior2_std <= 0:
        raise ValueError(f"{op}: prior2_std={prior2_std!r}; expected a finite number above 0, a standard deviation")
