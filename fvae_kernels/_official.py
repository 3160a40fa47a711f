"""The authors' settings and tensor names, mapped to ours, for `interop`.

Their objective is ``minus_elbo = l_rec NLL + l_kl KL_1 + l_z2 mean((z_2 - mu)^2) - l_z1 mean(z_1^2)``, with means over
latent entries: our loss with the sampled Gamma and the pair ``gamma_weight = (2 l_z2 / r, 2 l_z1 / r)``. It has no
tau and ignores ``z2_std``, so `prior2_std` is 1. The layer scale is ``alpha / (r + 1e-5)``, the decoder's scale
``scale_tril + 1e-5``; both are folded in. lora_E, lora_dropout and z1z2_orthogonal_reg have no effect in their code.
"""

import json
import math
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .config import FVAEConfig
from .nn.parameters import parameter_shapes

RANK_EPSILON = 1e-5  # their code adds it to the rank
SCALE_EPSILON = float(torch.tensor(1e-5))  # and to the decoder's scale, in float32 for any dtype
STEMS = {
    "encoder1": "lora_A.views_conditionalGaussianEncoders_list.0",
    "encoder2": "lora_A.views_conditionalGaussianEncoders_list.1",
    "decoder": "lora_A.views_conditionalGaussianDecoders",
}
SCALE = f"{STEMS['decoder']}.scale_tril"
FIRST_BIAS = f"{STEMS['encoder1']}.mean.bias"  # ours has none in a linear encoder 1

_PARTS = {"hidden": "layers", "logvar_hidden": "layers_logvar", "out": "output_layer", "scale": "scale_tril"}
_OURS = re.compile(r"(encoder1|encoder2|decoder)_(logvar_hidden|hidden|mean|logvar|out|scale)(\d*)_?(weight|bias)?")
# with or without the adapter's name after lora_A, lora_B, ...
_KEY = re.compile(r"(?:(.+)\.)?(?:(lora_A)(?:\.([^.]+))?\.(views_.+)|(lora_B|lora_E|ranknum)(?:\.([^.]+))?)")


def config_from_official(settings: Mapping[str, Any]) -> FVAEConfig:
    """The FVAEConfig with which our objective equals the authors'.

    Args:
        settings: by the names of their adapter_config.json (latent_dim, enc_hidden_layer, ...) or short names (r,
            enc_hidden, ...), as Python values or JSON strings. Absent settings have the authors' default; dropout is 0.

    Raises:
        ValueError: a setting without a counterpart here.
    """
    given = {name: _plain(value) for name, value in settings.items()}
    for name, value in given.items():
        if name.startswith("force_") and value:
            raise ValueError(
                f"{name}={value!r} is not supported: expected false, their other models are not FVAE-LoRA (4)"
            )
    samples = _get(given, "num_of_z_sampled", "num_z_samples", default=1)
    if samples != 1:
        raise ValueError(
            f"num_of_z_sampled={samples!r} is not supported: expected 1, one noise per token and latent space"
        )
    dropout, decoder_dropout = _get(given, "enc_dropout", default=0.0), _get(given, "dec_dropout", default=0.0)
    if dropout != decoder_dropout:
        raise ValueError(
            f"enc_dropout={dropout!r} and dec_dropout={decoder_dropout!r} differ: expected one probability, "
            "since a layer here has a single dropout for encoders and decoder"
        )
    rank = _whole("latent_dim", _get(given, "latent_dim", "r"), low=1)
    alpha = _number(given, "lora_alpha", default=8)
    encoder_hidden = _sizes(given, "enc")
    separate = not _get(given, "encoder_use_common_hidden_layer", "common_hidden", default=True)
    delta2, delta1 = (2 * _number(given, name) / rank for name in ("lambda_z2_l2", "lambda_z1_l2"))
    weight = given["aux_weight"] if "aux_weight" in given else 1 / _number(given, "lambda_downstream", above=0)
    return FVAEConfig(
        rank=rank,
        alpha=(alpha if alpha > 0 else rank) * rank / (rank + RANK_EPSILON),
        encoder_hidden=encoder_hidden,
        separate_hidden=separate and bool(encoder_hidden),
        decoder_hidden=_sizes(given, "dec"),
        dropout=dropout,
        fusion=_get(given, "latent_fusion", "fusion", default="concat"),
        recon_weight=_get(given, "lambda_reconstruction", default=1),
        kl_weight=_get(given, "lambda_kl_z1", default=1),
        gamma_weight=(delta2, delta1),
        gamma_estimator="monte_carlo",
        prior2_mean=_get(given, "z2_latent_mean", "z2_mean", default=1.5),
        loss_weight=weight,
        start="authors",
        logvar1_start=0.0,
        logvar1_held=False,
    )


def group(tensors: Mapping[str, Tensor]) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor]]:
    """Adapter tensors by module, without the adapter's name, and all other tensors."""
    layers: dict[str, dict[str, Tensor]] = {}
    others: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        match = _KEY.fullmatch(key)
        if match is None:
            if re.search(r"(^|\.)lora_", key):
                raise ValueError(f"unexpected tensor {key!r}: expected lora_A.<adapter>.views_..., lora_B or lora_E")
            others[re.sub(r"\.modules_to_save\.[^.]+\.", ".", key)] = tensor
            continue
        module, name = match[1] or "", f"lora_A.{match[4]}" if match[2] else match[5]
        if name in layers.setdefault(module, {}):
            raise ValueError(f"{key!r} comes a second time under another adapter's name: expected a single adapter")
        layers[module][name] = tensor
    return layers, others


def official_names(D: int, M: int, config: FVAEConfig) -> dict[str, str]:
    """Our parameter name -> the authors', without the adapter's name."""
    names = {"B": "lora_B"}
    for name, _ in parameter_shapes(D, M, config):
        if match := _OURS.fullmatch(name):
            stem, part, index, kind = match.groups()
            words = [STEMS[stem], _PARTS.get(part, part), index, kind]
            if config.separate_hidden and stem != "decoder" and part == "hidden":
                words[1] = "layers_mean"
            names[name] = ".".join(filter(None, words))
    return names


def to_ours(tensors: Mapping[str, Tensor], config: FVAEConfig, D: int, M: int, where: str) -> dict[str, Tensor]:
    """The state dict of our adapter. Everything is checked first."""
    names, remaining = official_names(D, M, config), dict(tensors)
    rank = remaining.pop("ranknum", None)
    remaining.pop("lora_E", None)
    if rank is not None and rank.tolist() != [config.rank]:
        raise ValueError(
            f"ranknum of {where} is {rank.tolist()}: expected [{config.rank}], the latent size of the settings"
        )
    if not config.encoder_hidden and remaining.pop(FIRST_BIAS, torch.zeros(())).any():
        raise ValueError(
            f"{FIRST_BIAS} of {where} is not zero: expected zeros with a linear encoder (enc_num_of_layer=0), whose "
            "mean path has no bias here, so that it can be merged"
        )
    missing, unexpected = sorted(set(names.values()) - set(remaining)), sorted(set(remaining) - set(names.values()))
    if missing or unexpected:
        raise ValueError(f"the tensors of {where} do not fit the settings: missing {missing}, unexpected {unexpected}")
    for name, shape in parameter_shapes(D, M, config):
        if (found := tuple(remaining[names[name]].shape)) != shape:
            raise ValueError(
                f"{names[name]} of {where} has shape {found}: expected {shape} by the settings and the other tensors"
            )
    state = {name: remaining[theirs].detach().clone() for name, theirs in names.items()}
    state["decoder_scale"] = state["decoder_scale"] + SCALE_EPSILON
    return state


def _plain(value: Any) -> Any:
    """A JSON string as its value; any other value unchanged."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except json.JSONDecodeError:
        return value


def _get(settings: Mapping[str, Any], *names: str, default: Any = None) -> Any:
    for name in names:
        if settings.get(name) is not None:
            return settings[name]
    if default is None:
        raise ValueError(
            f"the settings have no {' or '.join(names)}: expected it, as in the authors' adapter_config.json"
        )
    return default


def _number(settings: Mapping[str, Any], name: str, default: float = 1, above: float = -math.inf) -> float:
    value = _get(settings, name, default=default)
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not above < value < math.inf:
        bound = f" above {above:g}" if above > -math.inf else ""
        raise ValueError(f"{name}={value!r} is not allowed: expected a finite number{bound}")
    return value


def _whole(name: str, value: Any, low: int) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < low:
        raise ValueError(f"{name}={value!r} is not allowed: expected a whole number of at least {low}")
    return value


def _sizes(settings: Mapping[str, Any], side: str) -> tuple[int, ...]:
    count = _whole(f"{side}_num_of_layer", _get(settings, f"{side}_num_of_layer", f"{side}_layers"), low=0)
    width = _whole(f"{side}_hidden_layer", _get(settings, f"{side}_hidden_layer", f"{side}_hidden"), low=1)
    return (width,) * count
