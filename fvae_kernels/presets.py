"""Settings by name: the paper's recipe, the authors' code, the default. docs/recipes.md has the evidence for each."""

from typing import Any

_FVAE = {"objective": "fvae", "fusion": "concat", "recon_weight": 1.0, "prior2_mean": 1.5, "prior2_std": 1.0}
_NETWORKS = {"encoder_hidden": (16,), "decoder_hidden": (128, 128, 128), "dropout": 0.1}
_AUTHORS_START = {"start": "authors", "logvar1_start": 0.0, "logvar1_max": None, "logvar1_held": False}

# Every preset but the default spells out what it depends on, and stays the same where a default changes.
PRESETS: dict[str, dict[str, Any]] = {
    "default": {},
    "paper": {
        **_FVAE,
        **_NETWORKS,
        **_AUTHORS_START,
        "kl_weight": 3.0,  # the paper: beta from 1 to 10 with delta = 1
        "gamma_weight": 1.0,
        "gamma_estimator": "closed_form",
        "loss_weight": None,
    },
    "authors": {
        **_FVAE,
        **_NETWORKS,
        **_AUTHORS_START,
        "kl_weight": 1.0,
        "gamma_estimator": "monte_carlo",  # and gamma_weight = 2 / rank, see `preset`
        "loss_weight": None,
    },
}


def preset(name: str, rank: int) -> dict[str, Any]:
    """The options of this name, for adapters of this rank.

    Raises:
        ValueError: for an unknown name.
    """
    if name not in PRESETS:
        raise ValueError(f"there is no preset {name!r}; expected one of {', '.join(map(repr, PRESETS))}")
    options = dict(PRESETS[name])
    if name == "authors":
        options["gamma_weight"] = 2 / rank  # their Gamma is a mean over latent entries
    return options
