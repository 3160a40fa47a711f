"""Argument checks of the layer: what came, what was expected, what to do."""

from collections.abc import Iterator

from torch import Tensor

from ..config import FVAEConfig
from ..reference import Decoder, Encoder, Linears
from ._checks import check_features, check_mask, check_shape, check_tensors, check_weight


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
    """Raise if an argument does not fit; return every tensor by its name."""
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
    """Check a chain of linear layers; the last one has `last` outputs."""
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
