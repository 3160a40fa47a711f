"""The inputs of the adapted layer, declared once.

The raw operators' schemas, fakes, launchers, kernels, gradients and tests all use these structures. The entries of
`Networks` are parameters here, tensors or offsets of gradients in the launchers, and pointers in the kernels.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..config import FVAEConfig
from ._checks import rows


def encoder_entries(encoder_hidden: int) -> int:
    """Number of entries of both encoders in `Networks.flat`: weight and bias of hidden layers and of two heads."""
    return 2 * 2 * (encoder_hidden + 2)


class Linear(NamedTuple):
    """``x weight^T + bias``: weight ``[outputs, inputs]``, bias ``[outputs]``."""

    weight: Any
    bias: Any


class Encoder(NamedTuple):
    """q(z | x): hidden layers, and the two heads that read their output."""

    hidden: tuple[Linear, ...]
    mean: Linear
    logvar: Linear

    @property
    def state_width(self) -> int:
        """Entries per token that both encoders save for backward: hidden outputs, means, log-variances."""
        return 2 * sum(layer.weight.shape[0] for layer in (*self.hidden, self.mean, self.logvar))


class Decoder(NamedTuple):
    """p(x | z_1, z_2): hidden layers, the layer that gives x_hat, and the standard deviations t ``[D]``."""

    hidden: tuple[Linear, ...]
    output: Linear
    scale: Any


class Networks(NamedTuple):
    """All parameters of a layer; B is ``[M, R]``."""

    encoder1: Encoder
    encoder2: Encoder
    decoder: Decoder
    B: Any

    @classmethod
    def of(cls, entries: Sequence[Any], encoder_hidden: int) -> "Networks":
        """The inverse of `flat`, for encoders with `encoder_hidden` hidden layers."""
        left = iter(entries)

        def linears(count: int) -> tuple[Linear, ...]:
            return tuple(Linear(next(left), next(left)) for _ in range(count))

        encoder1, encoder2 = (Encoder(linears(encoder_hidden), *linears(2)) for _ in range(2))
        decoder_hidden = (len(entries) - encoder_entries(encoder_hidden) - 4) // 2
        decoder = Decoder(linears(decoder_hidden), linears(1)[0], next(left))
        return cls(encoder1, encoder2, decoder, next(left))

    def flat(self) -> list[Any]:
        """The parameters in the order of the raw operators: weight and bias of each layer, the first layer first."""
        encoders = [(*encoder.hidden, encoder.mean, encoder.logvar) for encoder in self[:2]]
        layers = (*encoders[0], *encoders[1], *self.decoder.hidden, self.decoder.output)
        return [*(entry for layer in layers for entry in layer), self.decoder.scale, self.B]


class Moments(NamedTuple):
    """Sums over latent entries of one posterior: mean^2, (mean - mu)^2, var, logvar, (z - mean of its prior)^2."""

    squares: Any
    from_mu: Any
    var: Any
    logvar: Any
    sampled: Any


class Statistics(NamedTuple):
    """Means over tokens; every objective is a linear function of them. `one` is 1; mu is the mean of prior 2."""

    one: Any
    nll: Any
    posterior1: Moments
    posterior2: Moments


class Objective(NamedTuple):
    """Weights of the statistics in each term: `reference.objective` as a table."""

    loss: Statistics
    kl: Statistics
    gamma: Statistics

    @classmethod
    def of(cls, entries: Sequence[float]) -> "Objective":
        """The inverse of `flat`."""
        left = iter(entries)
        rows = (
            Statistics(next(left), next(left), *(Moments(*(next(left) for _ in Moments._fields)) for _ in range(2)))
            for _ in cls._fields
        )
        return cls(*rows)

    def flat(self) -> tuple[float, ...]:
        """The weights row by row, as the raw operators take them."""
        return tuple(entry for row in self for entry in (row.one, row.nll, *row.posterior1, *row.posterior2))

    @classmethod
    def from_config(cls, config: FVAEConfig) -> "Objective":
        """The table of a config's objective, each term added up from its parts."""
        kl = _kl(1, 1, config)
        if config.gamma_estimator == "closed_form":
            log_p1, log_p2 = _expected_log_prior(1, 1, config), _expected_log_prior(2, 2, config)
        else:
            log_p1, log_p2 = _sampled_log_prior(1, config), _sampled_log_prior(2, config)
        parts = [(config.recon_weight, {"nll": 1.0}), (config.kl_weight, kl)]
        if config.objective == "fvae":
            delta2, delta1 = config.gamma_weights
            parts += [(-delta2, log_p2), (delta1, log_p1)]
        else:
            parts += [(config.kl_weight, _kl(2, 2, config))]
        if config.objective == "symmetric":
            parts += [(-1.0, _kl(2, 1, config)), (-1.0, _kl(1, 2, config))]
        return cls(*map(_statistics, (_sum(*parts), kl, _sum((1.0, log_p2), (-1.0, log_p1)))))


Form = dict[str, float]  # weight of each statistic in a term: "nll", or for example "var1" of posterior 1


def _statistics(form: Form) -> Statistics:
    moments = [Moments(*(form.get(f"{name}{i}", 0.0) for name in Moments._fields)) for i in (1, 2)]
    return Statistics(form.get("one", 0.0), form.get("nll", 0.0), *moments)


def _sum(*parts: tuple[float, Form]) -> Form:
    total: Form = {}
    for weight, form in parts:
        for name, value in form.items():
            total[name] = total.get(name, 0.0) + weight * value
    return total


def _expected_log_prior(i: int, prior: int, config: FVAEConfig) -> Form:
    """E log p(z) over q_i, without the constant -R/2 log(2 pi)."""
    std = 1.0 if prior == 1 else config.prior2_std
    squares = f"squares{i}" if prior == 1 else f"from_mu{i}"
    return {squares: -0.5 / std**2, f"var{i}": -0.5 / std**2, "one": -config.rank * math.log(std)}


def _sampled_log_prior(i: int, config: FVAEConfig) -> Form:
    """The one-sample estimate of E log p_i(z_i)."""
    std = 1.0 if i == 1 else config.prior2_std
    return {f"sampled{i}": -0.5 / std**2, "one": -config.rank * math.log(std)}


def _kl(i: int, prior: int, config: FVAEConfig) -> Form:
    """KL(q_i || p) = -entropy - expected log prior."""
    minus_entropy = {"one": -0.5 * config.rank, f"logvar{i}": -0.5}
    return _sum((1.0, minus_entropy), (-1.0, _expected_log_prior(i, prior, config)))


class Tensors(NamedTuple):
    """Tensors that the layer reads, in both directions. The raw operators take tokens [N]."""

    x: Tensor  # [..., D]
    parameters: Sequence[Tensor | None]  # of `Networks.flat`
    noise1: Tensor | None  # [..., R]; made from the seed if None
    noise2: Tensor | None
    mask: Tensor | None  # bool [N]
    seed: Tensor | None  # int64 []; None: no dropout

    @classmethod
    def of(cls, entries: Sequence[Any]) -> "Tensors":
        """The inverse of `flat`."""
        return cls._make((entries[0], entries[5:], *entries[1:5]))  # noise1, noise2, mask, seed

    def flat(self) -> tuple[Tensor | None, ...]:
        """All of them for autograd, the parameters last."""
        return self.x, *self[2:], *self.parameters

    def rows(self) -> "Tensors":
        """The same for tokens [N]."""
        noise1, noise2 = (None if noise is None else rows(noise) for noise in (self.noise1, self.noise2))
        return self._replace(x=rows(self.x), noise1=noise1, noise2=noise2)


class Options(NamedTuple):
    """Numbers that the raw operators of the layer take, in both directions."""

    encoder_hidden: int  # hidden layers of an encoder
    dropout: float
    average: bool  # the decoder reads (z_1 + z_2) / 2, not [z_1, z_2]
    scaling: float
    prior2_mean: float
    logvar1_low: float  # bounds of z_1's logvar, clamped wherever it becomes a Gaussian
    logvar1_high: float
    objective: Sequence[float]  # of `Objective.flat`
    products: torch.dtype | None  # dtype to which factors of products are rounded; None: their own

    @classmethod
    def of(cls, config: FVAEConfig, dropout: float, products: torch.dtype | None) -> "Options":
        """The options that a layer's config gives."""
        return cls(
            len(config.encoder_hidden),
            float(dropout),
            config.fusion == "average",
            float(config.scaling),
            float(config.prior2_mean),
            *config.logvar1_bounds,
            Objective.from_config(config).flat(),
            products,
        )


class Arriving(NamedTuple):
    """Gradients that a backward receives; None counts as zero."""

    grad_y: Tensor | None  # [N, M]
    grad_loss: Tensor | None  # []
    grad_nll: Tensor | None
    grad_kl: Tensor | None
    grad_gamma: Tensor | None

    @property
    def at_decoder(self) -> bool:
        """True if a gradient passes the decoder."""
        return self.grad_loss is not None or self.grad_nll is not None


class Needs(NamedTuple):
    """Which gradients a backward computes."""

    x: bool
    encoders: bool
    decoder: bool
    scale: bool
    B: bool

    @classmethod
    def of(cls, x: bool, flags: Sequence[bool], encoder_hidden: int, arriving: Arriving) -> "Needs":
        """The gradients that autograd asks for and that the arriving ones can reach: B is reached through y only.

        `flags` says which parameters need a gradient, in the order of `Networks.flat`.
        """
        anything, at_decoder = any(grad is not None for grad in arriving), arriving.at_decoder
        encoders, decoder = flags[: encoder_entries(encoder_hidden)], flags[encoder_entries(encoder_hidden) : -2]
        return cls(
            x and anything,
            any(encoders) and anything,
            any(decoder) and at_decoder,
            flags[-2] and at_decoder,
            flags[-1] and arriving.grad_y is not None,
        )

    def flags(self, entries: Sequence[bool], encoder_hidden: int) -> list[bool]:
        """For each parameter: True if its gradient is asked for and computed."""
        first = encoder_entries(encoder_hidden)
        made = [*(self.encoders,) * first, *(self.decoder,) * (len(entries) - first - 2), self.scale, self.B]
        return [asked and there for asked, there in zip(entries, made, strict=True)]


SCHEMA_TYPES = {
    Tensor: "Tensor",
    Tensor | None: "Tensor?",
    Sequence[Tensor | None]: "Tensor?[]",
    int: "int",
    float: "float",
    bool: "bool",
    Sequence[float]: "float[]",
    torch.dtype | None: "ScalarType?",
}


def schema_of(*structures: type) -> str:
    """The fields of these structures as arguments in a schema of torch.library."""
    fields: Iterator[tuple[str, Any]] = (field for s in structures for field in s.__annotations__.items())
    return ", ".join(f"{SCHEMA_TYPES[kind]} {name}" for name, kind in fields)
