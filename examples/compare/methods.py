"""Methods by name, all of LoRA's family at rank 16 and alpha 16, and groups of them."""

from collections.abc import Iterator
from typing import Any

import peft

import fvae_kernels as fk

from .adapt import Adapter, DoesNotApply, Full, Head, LoraPlus, Method, Prompt
from .search import FULL_RATES, PROMPT_RATES, Search

RANK, ALPHA = 16, 16.0
PROMPT_TOKENS = 16


def _lora(rank: int = RANK, **options: Any) -> peft.PeftConfig:
    return peft.LoraConfig(r=rank, lora_alpha=rank * ALPHA / RANK, **options)


def _adalora(rank: int = RANK, **options: Any) -> peft.PeftConfig:
    """AdaLoRA from half as much rank again down to `rank` on average; its own total_step is set when it is placed."""
    first = rank * 3 // 2
    return peft.AdaLoraConfig(
        init_r=first, target_r=rank, lora_alpha=first, total_step=3, tinit=0, tfinal=1, deltaT=1, **options
    )


def _hira(**options: Any) -> peft.PeftConfig:
    if not hasattr(peft, "HiraConfig"):
        raise DoesNotApply(f"PEFT {peft.__version__} has no HiRA")
    return peft.HiraConfig(r=RANK, **options)


def _fvae(name: str = "default", **options: Any) -> peft.PeftConfig:
    return fk.FVAELoraConfig.preset(name, r=RANK, alpha=ALPHA, **options)


def _prompt(**options: Any) -> peft.PeftConfig:
    return peft.PromptTuningConfig(num_virtual_tokens=PROMPT_TOKENS, **options)


def _p_tuning(**options: Any) -> peft.PeftConfig:
    return peft.PromptEncoderConfig(num_virtual_tokens=PROMPT_TOKENS, encoder_hidden_size=128, **options)


KL = Search(option="kl_weight", values=(10.0, 1.5))

BASELINES: dict[str, Method] = {
    "head": Head("head only"),
    "full": Full("full fine-tuning", search=Search(FULL_RATES)),
    "prompt-tuning": Prompt("prompt tuning", _prompt, search=Search(PROMPT_RATES)),
    "p-tuning": Prompt("P-tuning", _p_tuning, search=Search(PROMPT_RATES)),
}
LORA: dict[str, Method] = {
    "lora": Adapter("LoRA", _lora),
    "lora-dropout": Adapter(
        *("LoRA, dropout 0.1", _lora, {"lora_dropout": 0.1}), search=Search(option="lora_dropout", values=(0.3, 0.05))
    ),
    "rslora": Adapter("rsLoRA", _lora, {"use_rslora": True}),
    "lora-plus": LoraPlus("LoRA+, B's rate 16 times A's", _lora, search=Search(option="ratio", values=(4.0, 8.0))),
    "pissa": Adapter("PiSSA", _lora, {"init_lora_weights": "pissa"}),
    "olora": Adapter("OLoRA", _lora, {"init_lora_weights": "olora"}),
    "dora": Adapter("DoRA", _lora, {"use_dora": True}),
    "adalora": Adapter("AdaLoRA, rank 16 on average", _adalora),
    "hira": Adapter("HiRA", _hira),
}
SMALLER: dict[str, Method] = {
    "lora-4": Adapter("LoRA, rank 4", _lora, {"rank": 4}),
    "adalora-4": Adapter("AdaLoRA, rank 4 on average", _adalora, {"rank": 4}),
}
FVAE: dict[str, Method] = {
    "fvae": Adapter("FVAE-LoRA, the default", _fvae, search=KL),
    "fvae-free": Adapter("FVAE-LoRA, log-variance of z₁ learned from -4", _fvae, {"logvar1_held": False}, search=KL),
    "fvae-64": Adapter("FVAE-LoRA, decoder (64,)", _fvae, {"decoder_hidden": (64,)}),
    "fvae-128": Adapter("FVAE-LoRA, decoder (128, 128, 128)", _fvae, {"decoder_hidden": (128, 128, 128)}),
    "fvae-trimmed-4": Adapter("FVAE-LoRA, trimmed to rank 4 after half of the steps", _fvae, trim_to=4),
    "fvae-exchange": Adapter("FVAE-LoRA, z₂ exchanged for half of the examples", _fvae, exchange=0.5),
    "fvae-paper": Adapter("FVAE-LoRA, the paper's recipe", _fvae, {"name": "paper"}, search=KL),
    "fvae-authors": Adapter("FVAE-LoRA, the authors' code", _fvae, {"name": "authors"}, search=KL),
}

# One option apart from a preset each. The paper's delta = 1, beta = 3 are the presets' own.
CHANGES: dict[str, tuple[str, dict[str, Any]]] = {
    "vae2lat": ("objective vae2lat", {"objective": "vae2lat", "kl_weight": 1.0}),
    "beta-vae2lat": ("objective beta-vae2lat, β = 10", {"objective": "beta_vae2lat", "kl_weight": 10.0}),
    "symmetric": ("objective symmetric", {"objective": "symmetric"}),
    "monte-carlo": ("the authors' Γ", {"gamma_estimator": "monte_carlo", "gamma_weight": 2 / RANK}),
    "lambda-0": ("λ = 0", {"loss_weight": 0.0}),
    "beta-0.1": ("β = 0.1", {"kl_weight": 0.1}),
    "beta-1": ("β = 1", {"kl_weight": 1.0}),
    "beta-10": ("β = 10", {"kl_weight": 10.0}),
    "delta-0.5": ("δ = 0.5", {"gamma_weight": 0.5}),
    "delta-2": ("δ = 2", {"gamma_weight": 2.0}),
}
NOISE: dict[str, tuple[str, dict[str, Any]]] = {
    "sd-0.05": ("log-variance of z₁ held at -6", {"logvar1_start": -6.0}),
    "sd-0.37": ("log-variance of z₁ held at -2", {"logvar1_start": -2.0}),
    "sd-1": ("log-variance of z₁ held at 0", {"logvar1_start": 0.0}),
}


def _ablations() -> Iterator[tuple[str, Method]]:
    for name, (title, options) in CHANGES.items():
        yield f"fvae-paper-{name}", Adapter(f"the paper's recipe, {title}", _fvae, {"name": "paper", **options})
    for name, (title, options) in {**CHANGES, **NOISE}.items():
        yield f"fvae-{name}", Adapter(f"the default, {title}", _fvae, options)


ABLATIONS: dict[str, Method] = dict(_ablations())
METHODS: dict[str, Method] = {**BASELINES, **LORA, **SMALLER, **FVAE, **ABLATIONS}
GROUPS: dict[str, tuple[str, ...]] = {
    "all": tuple(METHODS),
    "baselines": (*BASELINES, *LORA),
    "lora-family": tuple(LORA),
    "fvae-family": tuple(FVAE),
    "ablations": tuple(ABLATIONS),
}


def named(text: str) -> list[str]:
    """Methods of a comma-separated text of names and groups, each once.

    Raises:
        ValueError: for an unknown name.
    """
    names = text.split(",")
    if unknown := sorted(set(names) - set(METHODS) - set(GROUPS)):
        raise ValueError(f"there is no method {unknown}; there are {list(METHODS)} and the groups {list(GROUPS)}")
    return list(dict.fromkeys(method for name in names for method in GROUPS.get(name, (name,))))
