"""The latents of a tile of tokens, and the objective: statistics in forward, coefficients in backward."""

# mypy: allow-untyped-defs, disable-error-code="assignment, misc, var-annotated"

from typing import Any, NamedTuple

import triton
import triton.language as tl

from ...ops._layer_inputs import Moments
from .._common import LOGVAR_LIMIT
from .._random import normals
from .arguments import mean_column, width_of
from .networks import load_columns

# Columns in a forward program's row of sums [16], in the order of ops._layer_inputs.Statistics
NLL, POSTERIOR1, POSTERIOR2, VAR, STATISTICS = (tl.constexpr(place) for place in (1, 2, 7, 2, 12))


class Bounds(NamedTuple):
    """Bounds of z_1's logvar, in the dtype of sums."""

    low: Any
    high: Any


class Latent(NamedTuple):
    """q(z | x) of a tile of tokens, and a sample of it; logvar before the clamp."""

    mean: Any
    logvar: Any
    noise: Any
    std: Any
    z: Any


class TermGrads(NamedTuple):
    """The gradient of each term as a pointer (to zero if there is none), or one token's share of it."""

    loss: Any
    nll: Any
    kl: Any
    gamma: Any


# latents


@triton.jit
def bounds_of(low, high, S: tl.constexpr):
    return Bounds(tl.full((), low, S.acc), tl.full((), high, S.acc))


@triton.jit
def clamped_logvar(logvar, bounds, side: tl.constexpr):
    """logvar, clamped for z_1; NaN stays NaN."""
    low = bounds.low if side == 0 else -LOGVAR_LIMIT
    high = bounds.high if side == 0 else LOGVAR_LIMIT
    logvar = tl.where(logvar < low, low, logvar)
    return tl.where(logvar > high, high, logvar)


@triton.jit
def clamp_passes(logvar, bounds, side: tl.constexpr):
    """Whether the clamp passes a gradient: inside the bounds, and nowhere if both bounds are equal."""
    if side == 0:
        high = tl.where(bounds.low < bounds.high, bounds.high, float("-inf"))
        return (logvar >= bounds.low) & (logvar <= high)
    return (logvar >= -LOGVAR_LIMIT) & (logvar <= LOGVAR_LIMIT)


@triton.jit
def standard_deviation(logvar, bounds, side: tl.constexpr):
    return tl.exp(0.5 * clamped_logvar(logvar, bounds, side))


@triton.jit
def noises(layer, rows, inside, S: tl.constexpr):
    """Standard normals of both latents: as given, or made from the seed."""
    entries = tl.arange(0, width_of(S.R))
    if S.given_noise:
        eps1 = load_columns(layer.noise1, S.R, rows, inside, 0, S.R).to(S.acc)
        eps2 = load_columns(layer.noise2, S.R, rows, inside, 0, S.R).to(S.acc)
    else:
        eps1, eps2 = normals(layer.seed, rows, entries, S.R, tl.constexpr(S.acc))
    return eps1, eps2


@triton.jit
def latent(state_ptr, layer, bounds, rows, inside, side: tl.constexpr, S: tl.constexpr, WIDTH: tl.constexpr):
    """One latent, from the state [N, WIDTH] that forward saved."""
    eps1, eps2 = noises(layer, rows, inside, S)
    eps = eps1 if side == 0 else eps2
    mean = load_columns(state_ptr, WIDTH, rows, inside, mean_column(S, side), S.R)
    logvar = load_columns(state_ptr, WIDTH, rows, inside, mean_column(S, side) + S.R, S.R)
    std = standard_deviation(logvar, bounds, side)
    return Latent(mean, logvar, eps, std, mean + std * eps)


@triton.jit
def samples(state_ptr, layer, bounds, rows, inside, S: tl.constexpr, WIDTH: tl.constexpr):
    """z_1 and z_2, from the state that forward saved."""
    latent1 = latent(state_ptr, layer, bounds, rows, inside, 0, S, WIDTH)
    latent2 = latent(state_ptr, layer, bounds, rows, inside, 1, S, WIDTH)
    return latent1.z, latent2.z


# tokens that count


@triton.jit
def counting(layer, rows, N, S: tl.constexpr):
    """Which rows are tokens that the mask keeps."""
    keep = rows < N
    if S.masked:
        keep = keep & (tl.load(layer.mask + rows.to(tl.int64), mask=keep, other=0) != 0)
    return keep


@triton.jit
def tokens(kept_ptr, N, MASKED: tl.constexpr, ACC: tl.constexpr):
    """Number of tokens in a mean."""
    if MASKED:  # noqa: SIM108  (only one branch is compiled)
        count = tl.load(kept_ptr).to(ACC)
    else:
        count = tl.full((), N, ACC)
    return count


# the objective, forward


@triton.jit
def statistics_of(latent, counts, mu, bounds, side: tl.constexpr):
    """Moments of one posterior, summed over the tokens that count, each in its column of a row of sums.

    Sums var - 1, not var, so that a small KL is not lost in a sum near R. `layer_mean_kernel` adds R in float64.
    """
    from_center = latent.z - (mu if side == 1 else 0.0)
    moments = Moments(
        latent.mean * latent.mean,
        (latent.mean - mu) * (latent.mean - mu),
        latent.std * latent.std - 1,
        clamped_logvar(latent.logvar, bounds, side),
        from_center * from_center,
    )
    first: tl.constexpr = POSTERIOR1 if side == 0 else POSTERIOR2
    places, sums = tl.arange(0, 16), tl.zeros((16,), latent.z.dtype)
    for i in tl.static_range(5):
        sums += tl.where(places == first + i, tl.sum(tl.where(counts, moments[i], 0.0)), 0.0)
    return sums


# the objective, backward


@triton.jit
def token_share(term_grads, kept_ptr, N, S: tl.constexpr):
    """One token's share of the gradients of the terms."""
    share = 1.0 / tl.maximum(tokens(kept_ptr, N, tl.constexpr(S.masked), tl.constexpr(S.acc)), 1.0)
    return TermGrads(
        tl.load(term_grads.loss).to(S.acc) * share,
        tl.load(term_grads.nll).to(S.acc) * share,
        tl.load(term_grads.kl).to(S.acc) * share,
        tl.load(term_grads.gamma).to(S.acc) * share,
    )


@triton.jit
def nll_coefficient(grads, recon_weight):
    """The gradient of a token's nll, through the terms loss and nll."""
    return grads.loss * tl.full((), recon_weight, grads.loss.dtype) + grads.nll


@triton.jit
def combined(grads, loss, kl, gamma):
    """The gradients of one token's moments of a posterior, from the moments' weights in the terms."""
    return Moments(
        grads.loss * loss.squares + grads.kl * kl.squares + grads.gamma * gamma.squares,
        grads.loss * loss.from_mu + grads.kl * kl.from_mu + grads.gamma * gamma.from_mu,
        grads.loss * loss.var + grads.kl * kl.var + grads.gamma * gamma.var,
        grads.loss * loss.logvar + grads.kl * kl.logvar + grads.gamma * gamma.logvar,
        grads.loss * loss.sampled + grads.kl * kl.sampled + grads.gamma * gamma.sampled,
    )


@triton.jit
def coefficients(grads, objective, rest, side: tl.constexpr, S: tl.constexpr):
    """`combined` for one posterior; `rest` holds the rounding errors of the objective's float32 weights."""
    if side == 0:
        c = combined(grads, objective.loss.posterior1, objective.kl.posterior1, objective.gamma.posterior1)
    else:
        c = combined(grads, objective.loss.posterior2, objective.kl.posterior2, objective.gamma.posterior2)
    if S.acc == tl.float64:
        if side == 0:
            lost = combined(grads, rest.loss.posterior1, rest.kl.posterior1, rest.gamma.posterior1)
        else:
            lost = combined(grads, rest.loss.posterior2, rest.kl.posterior2, rest.gamma.posterior2)
        c = Moments(
            c.squares + lost.squares, c.from_mu + lost.from_mu, c.var + lost.var, c.logvar + lost.logvar,
            c.sampled + lost.sampled,
        )  # fmt: skip
    return c
