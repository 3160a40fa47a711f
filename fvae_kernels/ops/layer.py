"""The adapted layer as one op: what FusedFVAELinear and the PEFT layer call in training.

    delta, terms = layer(x, ...);  y = W x + b + delta          with delta = s B z_1

There is no fused kernel yet: every backend that is not named explicitly resolves to the reference.
"""

from torch import Tensor

from .. import reference
from .._backend import resolve
from ..config import FVAEConfig
from ._checks import check_mask, check_shape, check_tensors


def layer(
    x: Tensor,
    encoder1: reference.Encoder,
    encoder2: reference.Encoder,
    decoder: reference.Decoder,
    B: Tensor,
    config: FVAEConfig,
    noise: tuple[Tensor, Tensor],
    dropout: float = 0.0,
    mask: Tensor | None = None,
    *,
    backend: str | None = None,
) -> tuple[Tensor, reference.Terms]:
    """Low-rank update and objective of one adapted layer, equations (4) and (6) of the paper.

    Equivalent to ``reference.layer``, which is the definition.

    Args:
        x: input ``[..., D]``.
        encoder1: parameters of q(z_1 | x).
        encoder2: parameters of q(z_2 | x).
        decoder: parameters of p(x | z_1, z_2).
        B: ``[M, R]``.
        config: objective, weights, priors and scale.
        noise: two standard normal tensors ``[..., R]``.
        dropout: probability of dropping a hidden activation; 0 outside training.
        mask: tokens ``[...]`` that enter the objective; all of them where it is None.
        backend: run on this one or raise; None picks.

    Returns:
        ``delta [..., M]``, to be added to the base layer's output, and ``Terms`` (nats, means over tokens).

    Raises:
        TypeError: noise of another dtype than x.
        ValueError: noise or mask of the wrong shape, or on another device than x.
        BackendUnavailable: if `backend` was named and cannot run.
    """
    check_tensors("layer", x=x, noise1=noise[0], noise2=noise[1])
    for name, eps in zip(("noise1", "noise2"), noise, strict=True):
        check_shape("layer", name, eps, (*x.shape[:-1], config.rank), "standard normal, one entry per token and rank")
    check_mask("layer", mask, x.shape[:-1], x.device)
    resolve("layer", x.device, backend)
    return reference.layer(x, encoder1, encoder2, decoder, B, config, noise, dropout, mask)
