"""The authors' layers and checkpoints: theirs in, ours out, and back.

Their objective, in our terms (`minus_elbo == terms.loss`): ``l_rec NLL + l_kl KL_1 + l_z2 mean((z_2 - mu)^2) - l_z1 mean(z_1^2)``
with means over latent entries is the sampled Gamma with the pair ``gamma_weight = (2 l_z2 / r, 2 l_z1 / r)``. It has no
tau: ``z2_std`` is read nowhere in it, so `prior2_std` is 1. Their layer scale is ``alpha / (r + 1e-5)``, and their
decoder's is ``scale_tril + 1e-5``; both are folded in. lora_E, lora_dropout and z1z2_orthogonal_reg do nothing.
"""

import json
import os
import re
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .adapter import parameter_shapes
from .config import FVAEConfig
from .linear import FusedFVAELinear

EPSILON = 1e-5  # added by their code to the rank and to the decoder's scale

_STEMS = {
    "encoder1": "lora_A.views_conditionalGaussianEncoders_list.0",
    "encoder2": "lora_A.views_conditionalGaussianEncoders_list.1",
    "decoder": "lora_A.views_conditionalGaussianDecoders",
}
_PARTS = {"hidden": "layers", "logvar_hidden": "layers_logvar", "out": "output_layer", "scale": "scale_tril"}
_OURS = re.compile(r"(encoder1|encoder2|decoder)_(logvar_hidden|hidden|mean|logvar|out|scale)(\d*)_?(weight|bias)?")
_UNUSED = ("lora_E", "ranknum")
_FIRST_BIAS = f"{_STEMS['encoder1']}.mean.bias"
# with or without the adapter's name after lora_A, lora_B, ...
_KEY = re.compile(r"(?:(.+)\.)?(?:(lora_A)(?:\.([^.]+))?\.(views_.+)|(lora_B|lora_E|ranknum)(?:\.([^.]+))?)")
_CARRIED = (
    *("task_type", "base_model_name_or_path", "revision", "inference_mode", "modules_to_save"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"),
)


def config_from_official(settings: Mapping[str, Any]) -> FVAEConfig:
    """The config under which our objective is theirs.

    Args:
        settings: by their adapter_config.json's names (latent_dim, enc_hidden_layer, ...) or the short ones (r,
            enc_hidden, ...), as Python values or JSON strings. What is absent has their default, and dropout is 0.

    Raises:
        ValueError: for a setting without counterpart here; it says what came, what is allowed and why.
    """
    given = {name: _plain(value) for name, value in settings.items()}
    for name, value in given.items():
        if name.startswith("force_") and value:
            raise ValueError(f"{name}={value!r} is not supported: expected false, their other models are not FVAE-LoRA (4)")
    samples = _get(given, "num_of_z_sampled", "num_z_samples", default=1)
    if samples != 1:
        raise ValueError(f"num_of_z_sampled={samples!r} is not supported: expected 1, one noise per token and latent space")
    dropout, decoder_dropout = _get(given, "enc_dropout", default=0.0), _get(given, "dec_dropout", default=0.0)
    if dropout != decoder_dropout:
        raise ValueError(
            f"enc_dropout={dropout!r} and dec_dropout={decoder_dropout!r} differ: expected one probability, "
            "since a layer here has a single dropout for encoders and decoder"
        )
    rank = _whole("latent_dim", _get(given, "latent_dim", "r"), low=1)
    alpha = _get(given, "lora_alpha", default=8)
    encoder_hidden, separate = _sizes(given, "enc"), not _get(given, "encoder_use_common_hidden_layer", "common_hidden", default=True)
    weight = given["aux_weight"] if "aux_weight" in given else 1 / _get(given, "lambda_downstream", default=1)
    return FVAEConfig(
        rank=rank,
        alpha=(alpha if alpha > 0 else rank) * rank / (rank + EPSILON),
        encoder_hidden=encoder_hidden,
        separate_hidden=separate and bool(encoder_hidden),
        decoder_hidden=_sizes(given, "dec"),
        dropout=dropout,
        fusion=_get(given, "latent_fusion", "fusion", default="concat"),
        recon_weight=_get(given, "lambda_reconstruction", default=1),
        kl_weight=_get(given, "lambda_kl_z1", default=1),
        gamma_weight=tuple(2 * _get(given, name, default=1) / rank for name in ("lambda_z2_l2", "lambda_z1_l2")),
        gamma_estimator="monte_carlo",
        prior2_mean=_get(given, "z2_latent_mean", "z2_mean", default=1.5),
        loss_weight=weight,
    )


def from_official(tensors: Mapping[str, Tensor], settings: Mapping[str, Any]) -> FusedFVAELinear:
    """One layer of theirs as one of ours: same outputs, same objective, same gradients. In training mode.

    Args:
        tensors: by their names: base_layer.weight, base_layer.bias where there is one, lora_A.<adapter>.views_...,
            lora_B.<adapter>; lora_E and ranknum may be there. They are copied, and their dtype is kept.
        settings: see `config_from_official`.

    Raises:
        ValueError: for an unsupported setting, a missing or unexpected tensor, or a wrong shape.
    """
    config = config_from_official(settings)
    found, others = _group(tensors)
    if "base_layer.weight" not in others:
        raise ValueError(f"base_layer.weight is missing: expected the frozen layer's weight; there are {sorted(tensors)}")
    weight, bias = others.pop("base_layer.weight"), others.pop("base_layer.bias", None)
    if others or set(found) - {""}:
        raise ValueError(f"unexpected tensors {sorted({*others, *found} - {''})}: expected those of a single layer")
    M, D = weight.shape
    state = _to_ours(found.get("", {}), config, D, M, "the layer")
    linear = nn.Linear(D, M, bias=bias is not None, device="meta")
    linear.weight = nn.Parameter(weight.detach().clone())
    linear.bias = None if bias is None else nn.Parameter(bias.detach().clone())
    layer = FusedFVAELinear(linear, config, dtype=state["B"].dtype)
    layer.adapter.load_state_dict(state)
    return layer


def to_official(layer: FusedFVAELinear, gradients: bool = False) -> dict[str, Tensor]:
    """The tensors of a layer by the authors' names: the inverse of `from_official`. Detached copies.

    The settings are not in it. Their lora_alpha is ``config.alpha * (r + 1e-5) / r``.

    Args:
        layer: an unmerged layer that was not exported for inference.
        gradients: give the ``.grad`` of each parameter instead. Frozen ones are left out.

    Raises:
        ValueError: for a merged or inference-only layer.
        RuntimeError: if a trainable parameter has no gradient yet.
    """
    if layer.merged or layer.adapter.inference_only:
        raise ValueError("expected a whole adapter beside its base layer: call unmerge(), or load the full adapter")
    names, config = _names(layer.in_features, layer.out_features, layer.config), layer.config
    parameters = {f"base_layer.{name}": p for name, p in layer.base_layer.named_parameters()}
    parameters |= {names[name]: p for name, p in layer.adapter.named_parameters()}
    if gradients:
        missing = [name for name, p in parameters.items() if p.requires_grad and p.grad is None]
        if missing:
            raise RuntimeError(f"no gradient has reached {missing}: call backward() on an output of the layer first")
        found = {name: p.grad.detach().clone() for name, p in parameters.items() if p.grad is not None}
    else:
        found = {name: p.detach().clone() for name, p in parameters.items()}
        found[names["decoder_scale"]] -= EPSILON
        B = found["lora_B"]
        found["lora_E"], found["ranknum"] = B.new_zeros(config.rank, 1), B.new_full((1,), float(config.rank))
        found.setdefault(_FIRST_BIAS, B.new_zeros(config.rank))  # a linear encoder 1 has no bias here
    if layer.transposed and "base_layer.weight" in found:
        found["base_layer.weight"] = found["base_layer.weight"].T
    return {re.sub(r"^(lora_A|lora_B|lora_E|ranknum)", r"\1.default", name): t for name, t in found.items()}


def convert_checkpoint(source_folder: str | Path, target_folder: str | Path, model: nn.Module | None = None) -> None:
    """Turn an adapter folder of the authors into one of ours, for ``PeftModel.from_pretrained(base, target_folder)``.

    `loss_weight` becomes ``1 / (lambda_downstream * layers)``: their mean over layers, relative to the task loss. Tensors
    of no adapter, such as a trained classifier, are carried over. Nothing is written before everything is converted.

    Args:
        source_folder: holds adapter_config.json and adapter_model.safetensors, by their names.
        target_folder: another folder; it is made if need be.
        model: the base model. Give it where its layers were renamed since the checkpoint was made, as transformers 5 did
            with ViT's: their new names are then looked up in transformers, and written.

    Raises:
        ValueError: for a pickle, an unsupported setting, tensors that are missing, unexpected or of a wrong shape, or a
            layer that `model` does not have.
    """
    from safetensors.torch import load_file, save_file

    from .peft.config import FVAELoraConfig
    from .peft.files import CONTAINER, WEIGHTS, find_weights

    source, target = Path(source_folder), Path(target_folder)
    path = find_weights(str(source))
    if path is None or not (source / "adapter_config.json").is_file():
        raise ValueError(f"{source} is no adapter folder: expected adapter_config.json and {WEIGHTS} in it")
    if target.exists() and source.samefile(target):
        raise ValueError(f"target_folder={str(target)!r} is the source folder: expected another, so that theirs survives")
    settings = json.loads((source / "adapter_config.json").read_text())
    method = _checkpoint_config(settings)
    layers, others = _group(load_file(path))
    if not layers:
        raise ValueError(f"{path} holds no FVAE-LoRA weights of the authors: no key has 'lora_B' in it")
    names = {module: _current_name(module, model) for module in layers}
    state = {key: t.contiguous() for key, t in others.items()}
    for module, tensors in layers.items():
        D, M = _sides(tensors, module)
        ours = _to_ours(tensors, method, D, M, module)
        state |= {f"{names[module]}.{CONTAINER}.{name}": t.contiguous() for name, t in ours.items()}
    options = {name: settings[name] for name in _CARRIED if settings.get(name) is not None}
    if any(old != new for old, new in names.items()):
        for name in ("exclude_modules", "layers_to_transform", "layers_pattern"):
            options.pop(name, None)
        options["target_modules"] = sorted(name.removeprefix("base_model.model.") for name in names.values())
    fields = {name: getattr(method, name) for name in FVAEConfig.__dataclass_fields__ if name not in ("rank", "loss_weight")}
    config = FVAELoraConfig(r=method.rank, loss_weight=method.loss_weight / len(layers), **fields, **options)
    target.mkdir(parents=True, exist_ok=True)
    save_file(state, target / WEIGHTS, metadata={"format": "pt"})
    config.save_pretrained(str(target))
