"""The adapted layer composed of the smaller ops, for options that the fused kernel does not cover."""

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import reference
from ..config import FVAEConfig
from .divergence import divergence
from .reconstruct import reconstruct


def composed(
    x: Tensor,
    encoder1: reference.Encoder,
    encoder2: reference.Encoder,
    decoder: reference.Decoder,
    B: Tensor,
    config: FVAEConfig,
    noise: tuple[Tensor, Tensor],
    dropout: float,
    mask: Tensor | None,
    backend: str,
) -> tuple[Tensor, reference.Terms]:
    """`reference.layer` with the decoder's output layer, KL and Gamma on `backend`. x_hat is never stored."""
    q1 = _posterior(x, encoder1, noise[0], dropout, config.logvar1_bounds)
    q2 = _posterior(x, encoder2, noise[1], dropout)
    target = x.detach() if config.detach_target else x
    latent = torch.cat((q1[2], q2[2]), -1) if config.fusion == "concat" else (q1[2] + q2[2]) / 2
    nll = reconstruct(target, latent, *decoder, dropout=dropout, mask=mask, backend=backend)
    delta = config.scaling * F.linear(q1[2], B)
    delta2, delta1 = config.gamma_weights
    if config.objective != "fvae" or config.gamma_estimator != "closed_form" or delta1 != delta2:
        return delta, reference.objective(nll, q1, q2, config, mask)
    kl, gamma = divergence(q1[0], q1[1], q2[0], q2[1], config.prior2_mean, config.prior2_std, mask, backend=backend)
    return delta, reference.Terms(config.recon_weight * nll + config.kl_weight * kl - delta1 * gamma, nll, kl, gamma)


def _posterior(
    x: Tensor, encoder: reference.Encoder, noise: Tensor, dropout: float, bounds: tuple[float, float] | None = None
) -> reference.Posterior:
    mean, logvar, z = reference.posterior(x, encoder, noise, dropout, bounds)
    return mean.to(x.dtype), logvar.to(x.dtype), z.to(x.dtype)  # autocast may have lowered it
