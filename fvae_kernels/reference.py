"""FVAE-LoRA in plain PyTorch: the mathematics every kernel of this package is checked against.

Paper: "Latent Space Factorization in LoRA" (arXiv 2510.19640); equation numbers are the paper's. Autograd
differentiates all of it. Sums run over latent entries or features, means over tokens; every result is in nats.

    q_i(z_i | x) = N(mean_i, diag(exp logvar_i))     encoder i = 1, 2
    p_1 = N(0, I),  p_2 = N(mu, tau^2 I)             priors
    p(x | z_1, z_2) = N(x_hat, diag(t^2))            decoder, t = `scale`
    y = W x + b + s B z_1                            the adapted layer (B mean_1 at inference)
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

BOUNDS_PASS = torch.__version__ < "2.14"  # torch.clamp's gradient is 1 at its bounds; from 2.14 on it is 0
LOGVAR_LIMIT = 20.0  # log-variances are clamped to [-20, 20] wherever a Gaussian is made of them
Linears = Sequence[tuple[Tensor, Tensor | None]]  # (weight [out, in], bias [out]) of each layer, input first


class Encoder(NamedTuple):
    """Parameters of q(z | x). `hidden_logvar` is None where mean and logvar share their hidden layers."""

    hidden: Linears
    hidden_logvar: Linears | None
    w_mean: Tensor
    b_mean: Tensor | None
    w_logvar: Tensor
    b_logvar: Tensor | None


class Decoder(NamedTuple):
    """Parameters of p(x | z_1, z_2)."""

    hidden: Linears
    w_out: Tensor
    b_out: Tensor | None
    scale: Tensor


class Terms(NamedTuple):
    """0-dim terms of the objective, each a mean over tokens: `loss` is what training minimises, -L_FVAE of (4)."""

    loss: Tensor
    nll: Tensor
    kl: Tensor
    gamma: Tensor


def widen(t: Tensor) -> Tensor:
    """Sums are taken in float32 at least."""
    return t.float() if t.dtype in (torch.float16, torch.bfloat16) else t


def token_mean(per_token: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean over all tokens, or over those that `mask` keeps; 0 where there is none."""
    if mask is None:
        return per_token.sum() / max(per_token.numel(), 1)
    keep = mask.bool()
    return per_token.where(keep, per_token.new_zeros(())).sum() / keep.sum().clamp(min=1)


def mlp(x: Tensor, layers: Linears, dropout: float = 0.0) -> Tensor:
    for weight, bias in layers:
        x = F.relu(F.linear(x, weight, bias))
        x = F.dropout(x, dropout) if dropout > 0 else x
    return x


def clamp(logvar: Tensor, low: float = -LOGVAR_LIMIT, high: float = LOGVAR_LIMIT) -> Tensor:
    """logvar clamped to [low, high], with a gradient of 1 at the bounds too."""
    if BOUNDS_PASS:
        return logvar.clamp(low, high)
    return torch.where((logvar >= low) & (logvar <= high), logvar, logvar.detach().clamp(low, high))


def bounded(logvar: Tensor, low: float, high: float) -> Tensor:
    """logvar clamped to [low, high]; held at `low`, with a gradient of zero, where the two are equal."""
    if (low, high) == (-LOGVAR_LIMIT, LOGVAR_LIMIT):
        return logvar  # clamped where a Gaussian is made of it
    if low < high:
        return clamp(logvar, low, high)
    return torch.where(torch.ones_like(logvar, dtype=torch.bool), torch.full_like(logvar, low), logvar)


def sample(mean: Tensor, logvar: Tensor, noise: Tensor) -> Tensor:
    """Reparameterisation: z = mean + exp(logvar / 2) * noise."""
    return mean + (clamp(logvar) / 2).exp() * noise


def encode(
    x: Tensor, w_mean: Tensor, b_mean: Tensor | None, w_logvar: Tensor, b_logvar: Tensor | None, noise: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Both heads, and the sample."""
    mean, logvar = F.linear(x, w_mean, b_mean), F.linear(x, w_logvar, b_logvar)
    return mean, logvar, sample(mean, logvar, noise)


def gaussian_kl(mean: Tensor, logvar: Tensor, prior_mean: float = 0.0, prior_std: float = 1.0) -> Tensor:
    """KL( N(mean, exp logvar) || N(prior_mean, prior_std^2) ) of each token."""
    mean, logvar = widen(mean), clamp(widen(logvar))
    squares = ((mean - prior_mean).square() + logvar.exp()) / prior_std**2
    return 0.5 * (squares - 1 - logvar + 2 * math.log(prior_std)).sum(-1)


def expected_log_prior(mean: Tensor, logvar: Tensor, prior_mean: float = 0.0, prior_std: float = 1.0) -> Tensor:
    """E log N(z; prior_mean, prior_std^2) over z ~ N(mean, exp logvar), of each token, less -r/2 log(2 pi)."""
    variance = clamp(widen(logvar)).exp()
    squares = ((widen(mean) - prior_mean).square() + variance) / prior_std**2
    return -0.5 * (squares + 2 * math.log(prior_std)).sum(-1)


def sampled_log_prior(z: Tensor, prior_mean: float = 0.0, prior_std: float = 1.0) -> Tensor:
    """The one-sample estimate of `expected_log_prior`."""
    return -0.5 * (((widen(z) - prior_mean) / prior_std).square() + 2 * math.log(prior_std)).sum(-1)


def divergence(
    mean1: Tensor,
    logvar1: Tensor,
    mean2: Tensor,
    logvar2: Tensor,
    prior2_mean: float = 1.5,
    prior2_std: float = 1.0,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """KL(q_1 || p_1) and Gamma = E log p_2(z_2) - E log p_1(z_1) of (4), both closed form."""
    gamma = expected_log_prior(mean2, logvar2, prior2_mean, prior2_std) - expected_log_prior(mean1, logvar1)
    return token_mean(gaussian_kl(mean1, logvar1), mask), token_mean(gamma, mask)


def geometry(
    mean1: Tensor,
    logvar1: Tensor,
    mean2: Tensor,
    logvar2: Tensor,
    prior2_mean: float = 1.5,
    prior2_std: float = 1.0,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Lambda and Delta of (5), the squared 2-Wasserstein distance of q_1 and q_2, and its bound of |Delta|."""
    mismatch = gaussian_kl(mean2, logvar2) - gaussian_kl(mean2, logvar2, prior2_mean, prior2_std)
    mean1, mean2 = widen(mean1), widen(mean2)
    var1, var2 = (clamp(widen(v)).exp() for v in (logvar1, logvar2))
    norm1, norm2 = (mean1.square() + var1).sum(-1), (mean2.square() + var2).sum(-1)
    w2_squared = ((mean1 - mean2).square() + (var1.sqrt() - var2.sqrt()).square()).sum(-1)
    bound = w2_squared / 2 + norm1.sqrt() * w2_squared.sqrt()
    mismatch, discrepancy, w2_squared, bound = (
        token_mean(t, mask) for t in (mismatch, 0.5 * (norm1 - norm2), w2_squared, bound)
    )
    return mismatch, discrepancy, w2_squared, bound


def reconstruct(
    x: Tensor,
    latent: Tensor,
    hidden: Linears,
    w_out: Tensor,
    b_out: Tensor | None,
    scale: Tensor,
    dropout: float = 0.0,
    mask: Tensor | None = None,
) -> Tensor:
    """-log p(x | z_1, z_2) with x_hat = mlp(latent) W_out^T + b_out and Normal(x_hat, diag(scale^2))."""
    x_hat, scale = widen(F.linear(mlp(latent, hidden, dropout), w_out, b_out)), widen(scale)
    squares = ((x_hat - widen(x)) / scale).square()
    nll = (0.5 * squares + scale.abs().log() + 0.5 * math.log(2 * math.pi)).sum(-1)
    return token_mean(nll, mask)


def posterior(
    x: Tensor, encoder: Encoder, noise: Tensor, dropout: float = 0.0, bounds: tuple[float, float] | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """mean, logvar (within `bounds`) and sample of q(z | x), hidden layers included."""
    _, hidden_logvar, w_mean, b_mean, w_logvar, b_logvar = encoder
    h = mlp(x, encoder.hidden, dropout)
    h_logvar = h if hidden_logvar is None else mlp(x, hidden_logvar, dropout)
    mean, logvar = F.linear(h, w_mean, b_mean), F.linear(h_logvar, w_logvar, b_logvar)
    logvar = logvar if bounds is None else bounded(logvar, *bounds)
    return mean, logvar, sample(mean, logvar, noise)


def layer(
    x: Tensor,
    encoder1: Encoder,
    encoder2: Encoder,
    decoder: Decoder,
    B: Tensor,
    config: Any,
    noise: tuple[Tensor, Tensor],
    dropout: float = 0.0,
    mask: Tensor | None = None,
) -> tuple[Tensor, Terms]:
    """s B z_1, which the caller adds to W x + b, and the terms of the objective. `config` is an FVAEConfig."""
    q1 = posterior(x, encoder1, noise[0], dropout, config.logvar1_bounds)
    q2 = posterior(x, encoder2, noise[1], dropout)
    z1, z2 = q1[2], q2[2]
    target = x.detach() if config.detach_target else x
    latent = torch.cat((z1, z2), -1) if config.fusion == "concat" else (z1 + z2) / 2
    nll = reconstruct(target, latent, *decoder, dropout=dropout, mask=mask)
    return config.scaling * F.linear(z1, B), objective(nll, q1, q2, config, mask)


Posterior = tuple[Tensor, Tensor, Tensor]  # mean, logvar, z


def objective(nll: Tensor, q1: Posterior, q2: Posterior, config: Any, mask: Tensor | None = None) -> Terms:
    """The terms, and the loss of the chosen objective: fvae (4), vae2lat (2), beta_vae2lat (8), symmetric (9)."""
    q1 = q1[0], bounded(q1[1], *config.logvar1_bounds), q1[2]
    prior1, prior2 = (0.0, 1.0), (config.prior2_mean, config.prior2_std)
    if config.gamma_estimator == "closed_form":
        log_p1, log_p2 = expected_log_prior(*q1[:2], *prior1), expected_log_prior(*q2[:2], *prior2)
    else:
        log_p1, log_p2 = sampled_log_prior(q1[2], *prior1), sampled_log_prior(q2[2], *prior2)
    log_p1, log_p2 = token_mean(log_p1, mask), token_mean(log_p2, mask)

    def kl_of(q: Posterior, prior: tuple[float, float]) -> Tensor:
        return token_mean(gaussian_kl(*q[:2], *prior), mask)

    kl = kl_of(q1, prior1)
    loss = config.recon_weight * nll + config.kl_weight * kl
    if config.objective == "fvae":
        delta2, delta1 = config.gamma_weights
        loss = loss - (delta2 * log_p2 - delta1 * log_p1)
    else:
        loss = loss + config.kl_weight * kl_of(q2, prior2)
    if config.objective == "symmetric":
        loss = loss - kl_of(q2, prior1) - kl_of(q1, prior2)
    return Terms(loss, nll, kl, log_p2 - log_p1)
