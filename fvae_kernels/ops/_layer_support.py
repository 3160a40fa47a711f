"""What the layer op knows besides calling its kernels: the objective as a table, checks, and what is not covered."""

import math
from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor

from ..config import FVAEConfig
from ..reference import LOGVAR_LIMIT, Decoder, Encoder, Linears
from ._checks import check_features, check_mask, check_shape, check_tensors, check_weight
from ._raw import padded

# Means over tokens, in the order of the kernels. "one" is 1; squares are sums over latent entries of mean^2, from_mu of
# (mean - mu)^2, sampled1 of z_1^2, sampled2 of (z_2 - mu)^2, where mu is the mean of prior 2.
STATISTICS = (
    *("one", "nll", "squares1", "from_mu1", "var1", "logvar1"),
    *("squares2", "from_mu2", "var2", "logvar2", "sampled1", "sampled2"),
)
# What the Triton kernels hold in registers: units of a layer, and of all hidden layers of the decoder together, each
# rounded up to a power of two. More would spill to memory, on every GPU.
WIDEST, WIDEST_DECODER = 256, 768
Form = dict[str, float]  # the weight of each statistic in a term


def objective_table(config: FVAEConfig) -> tuple[float, ...]:
    """The weights of `STATISTICS` in loss, kl and gamma, row after row: `reference.objective` as a table."""
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
    terms = (_sum(*parts), kl, _sum((1.0, log_p2), (-1.0, log_p1)))
    return tuple(form.get(name, 0.0) for form in terms for name in STATISTICS)


def _sum(*parts: tuple[float, Form]) -> Form:
    total: Form = {}
    for weight, form in parts:
        for name, value in form.items():
            total[name] = total.get(name, 0.0) + weight * value
    return total


def _expected_log_prior(i: int, prior: int, config: FVAEConfig) -> Form:
    """E log p(z) over q_i, less -R/2 log(2 pi)."""
    std = 1.0 if prior == 1 else config.prior2_std
    squares = f"squares{i}" if prior == 1 else f"from_mu{i}"
    return {squares: -0.5 / std**2, f"var{i}": -0.5 / std**2, "one": -config.rank * math.log(std)}


def _sampled_log_prior(i: int, config: FVAEConfig) -> Form:
    """The one-sample estimate of E log p_i(z_i)."""
    std = 1.0 if i == 1 else config.prior2_std
    return {f"sampled{i}": -0.5 / std**2, "one": -config.rank * math.log(std)}


def _kl(i: int, prior: int, config: FVAEConfig) -> Form:
    """KL(q_i || p): minus the entropy, less the expected log prior."""
    minus_entropy = {"one": -0.5 * config.rank, f"logvar{i}": -0.5}
    return _sum((1.0, minus_entropy), (-1.0, _expected_log_prior(i, prior, config)))


def uncovered(
    config: FVAEConfig, tensors: Mapping[str, Tensor | None], noise: Iterable[Tensor] = (), backend: str | None = None
) -> str | None:
    """What the fused kernel of `backend` does not cover; None where all is covered. Without a backend: what none does.

    Tensors are named as by `check_layer`, or as the parameters of an adapter.
    """
    if config.separate_hidden:
        return "separate_hidden=True"
    if config.logvar1_bounds != (-LOGVAR_LIMIT, LOGVAR_LIMIT):
        return f"bounds of z_1's log-variance (they are {config.logvar1_bounds})"
    if any(eps.requires_grad for eps in noise):
        return "a gradient of the noise"
    first, *others = (name for name, t in tensors.items() if t is not None)
    dtypes = {name: t.dtype for name, t in tensors.items() if t is not None}
    if dtypes.get("B") == torch.float32 and dtypes.get("x") in (torch.bfloat16, torch.float16):
        first = "B"  # x is converted where it is read
    for name in others:
        if dtypes[name] != dtypes[first]:
            return f"more than one dtype ({first} is {dtypes[first]}, {name} is {dtypes[name]})"
    return _too_wide(config, tensors) if backend == "triton" else None


def _too_wide(config: FVAEConfig, tensors: Mapping[str, Tensor | None]) -> str | None:
    if config.rank > WIDEST:
        return f"a rank above {WIDEST} (it is {config.rank})"
    for name, t in tensors.items():
        if t is not None and "hidden" in name and name.endswith("weight") and t.shape[0] > WIDEST:
            return f"a hidden layer of more than {WIDEST} units ({name} is {list(t.shape)})"
    sizes = [
        t.shape[0]
        for name, t in tensors.items()
        if t is not None and name.startswith("decoder") and "hidden" in name and name.endswith("weight")
    ]
    if sum(map(padded, sizes)) > WIDEST_DECODER:
        return (
            f"hidden layers of the decoder of more than {WIDEST_DECODER} units together, each rounded up to a power of "
            f"two (they have {', '.join(map(str, sizes))})"
        )
    return None


def autocast_products(B: Tensor, backend: str) -> torch.dtype | None:
    """What the factors of products are rounded to, as autocast rounds those of PyTorch's; None where nothing is.

    Products alone: sums, latents and the objective keep the parameters' float32. The C++ kernels have no products of 16
    bits, and stay exact.
    """
    device = B.device.type
    if backend != "triton" or B.dtype != torch.float32 or not torch.is_autocast_enabled(device):
        return None
    dtype = torch.get_autocast_dtype(device)
    return dtype if dtype in (torch.bfloat16, torch.float16) else None


def composable(tensors: Mapping[str, Tensor | None]) -> bool:
    """Whether the smaller ops run what the fused kernel does not cover: they take one dtype, autocast or not."""
    dtypes = {t.dtype for name, t in tensors.items() if t is not None and name != "x"}
    return len(dtypes) == 1


def check_layer(
    x: Tensor,
    encoders: tuple[Encoder, Encoder],
    decoder: Decoder,
    B: Tensor,
    config: FVAEConfig,
    noise: tuple[Tensor, Tensor] | None,
    dropout: float,
    mask: Tensor | None,
    base: Tensor | None,
) -> dict[str, Tensor | None]:
    """Raise where something does not fit; give every tensor by its name."""
    check_tensors("layer", x=x)
    check_features("layer", "x", x)
    for name, eps in zip(("noise1", "noise2"), noise or (), strict=False):
        check_tensors("layer", B=B, **{name: eps})
        check_shape("layer", name, eps, (*x.shape[:-1], config.rank), "standard normal, one entry per token and rank")
    check_mask("layer", mask, x.shape[:-1], x.device)
    if not 0 <= dropout < 1:
        raise ValueError(f"layer: dropout={dropout!r}; expected a probability, at least 0 and below 1")
    D, R = x.shape[-1], config.rank
    latent = 2 * R if config.fusion == "concat" else R
    tensors: dict[str, Tensor | None] = {}
    for i, encoder in enumerate(encoders, 1):
        tensors |= _check_encoder(f"encoder{i}", encoder, D, R)
    tensors |= _check_linears("decoder", [*decoder.hidden, (decoder.w_out, decoder.b_out)], latent, D)
    check_shape("layer", "scale", decoder.scale, (D,), "one entry for each feature of x")
    check_weight("layer", "B", B, R, "the latent")
    check_shape("layer", "base", base, (*x.shape[:-1], B.shape[0]), "the adapted layer's output for x")
    return {"x": x, **tensors, "scale": decoder.scale, "B": B}


def _check_linears(stem: str, layers: Linears, features: int, last: int | None = None) -> dict[str, Tensor | None]:
    """A chain of linear layers, the last one with `last` outputs."""
    tensors: dict[str, Tensor | None] = {}
    for name, (weight, bias), is_last in _named(stem, layers, last is not None):
        check_weight("layer", f"{name} weight", weight, features, "its input")
        if is_last and weight.shape[0] != last:
            raise ValueError(
                f"layer: {name} weight has shape {tuple(weight.shape)}; expected [{last}, {features}], one row for "
                "each feature of x"
            )
        check_shape("layer", f"{name} bias", bias, tuple(weight.shape[:1]), "one entry for each row of its weight")
        features = weight.shape[0]
        tensors |= {f"{name} weight": weight, f"{name} bias": bias}
    return tensors


def _named(stem: str, layers: Linears, has_output: bool) -> Iterator[tuple[str, tuple[Tensor, Tensor | None], bool]]:
    for i, layer in enumerate(layers):
        is_last = has_output and i == len(layers) - 1
        yield f"{stem} {'output' if is_last else f'hidden{i}'}", layer, is_last


def _check_encoder(stem: str, encoder: Encoder, D: int, R: int) -> dict[str, Tensor | None]:
    tensors = _check_linears(stem, encoder.hidden, D)
    features = encoder.hidden[-1][0].shape[0] if encoder.hidden else D
    for head, weight, bias in (
        ("mean", encoder.w_mean, encoder.b_mean),
        ("logvar", encoder.w_logvar, encoder.b_logvar),
    ):
        name = f"{stem} {head}"
        check_shape("layer", f"{name} weight", weight, (R, features), "one row for each latent entry")
        check_shape("layer", f"{name} bias", bias, (R,), "one entry for each latent entry")
        tensors |= {f"{name} weight": weight, f"{name} bias": bias}
    return tensors
