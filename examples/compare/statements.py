"""The claims of the paper, and our questions, with the comparisons that test them."""

from collections.abc import Iterator
from typing import Any

from .claims import MARGIN, Claim, Comparison


def _against_lora(task: str, score: str = "average") -> Iterator[Comparison]:
    """The recipe of the paper, and the default, against LoRA."""
    return (Comparison(task, method, score=score) for method in ("fvae-paper", "fvae"))


def _long(task: str = "images-long", worse: str = "lora", **how: Any) -> Iterator[Comparison]:
    """The default, and with its log-variance free, over a long schedule; all three scores of each."""
    for method in ("fvae-free", "fvae"):
        for score in ("average", "worst", "minority"):
            yield Comparison(task, method, worse, score, **how)


def _both_ends(task: str) -> tuple[Comparison, ...]:
    """Over a long schedule against LoRA, at the last step and with early stopping."""
    return tuple(one for early in (False, True) for one in _long(task, early_stopping=early))


_PAPER = "fvae-paper"
PAPER: tuple[Claim, ...] = (
    Claim(
        "Better than LoRA on images",
        "Table 1",
        tuple(one for task in ("images", "images-other") for one in _against_lora(task)),
    ),
    Claim("Better than LoRA on text", "Tables 2 and 3", tuple(_against_lora("text"))),
    Claim("Better than LoRA on audio", "Table 4", tuple(_against_lora("audio"))),
    Claim(
        "More robust under group shift",
        "Table 5",
        tuple(one for task in ("images", "images-other", "text", "audio") for one in _against_lora(task, "minority")),
    ),
    Claim("β = 0.1 hurts", "Appendix G", (Comparison("images", _PAPER, f"{_PAPER}-beta-0.1"),)),
    Claim("Γ adds to VAE2LAT", "Table 6", (Comparison("images", _PAPER, f"{_PAPER}-vae2lat"),)),
    Claim("Γ adds to β-VAE2LAT", "Table 6", (Comparison("images", _PAPER, f"{_PAPER}-beta-vae2lat"),)),
    Claim(
        "Symmetric repulsion is worse than LoRA", "Appendix E", (Comparison("images", "lora", f"{_PAPER}-symmetric"),)
    ),
    Claim(
        "δ = 1 is a good default",
        "Appendix G",
        tuple(Comparison("images", _PAPER, f"{_PAPER}-{other}", allowed=MARGIN) for other in ("delta-0.5", "delta-2")),
    ),
)
OURS: tuple[Claim, ...] = (
    Claim(
        "The default is not worse than LoRA",
        "docs/recipes.md",
        tuple(Comparison(task, "fvae", allowed=MARGIN) for task in ("images", "text")),
    ),
    Claim(
        "The objective adds to architecture and noise",
        "λ against λ = 0",
        (
            Comparison("images", _PAPER, f"{_PAPER}-lambda-0"),
            Comparison("images", "fvae", "fvae-lambda-0"),
            Comparison("images", "fvae", "fvae-lambda-0", "minority"),
        ),
    ),
    Claim(
        "β = 3 is a good choice",
        "β of 1 and 10",
        tuple(Comparison("images", _PAPER, f"{_PAPER}-beta-{other}", allowed=MARGIN) for other in (1, 10)),
    ),
    Claim(
        "Noise held at a deviation of .14 is a good default",
        "log-variance of -6, -2 and 0",
        tuple(Comparison("images", "fvae", f"fvae-sd-{other}", allowed=MARGIN) for other in ("0.05", "0.37", "1")),
    ),
    Claim(
        "Trained wide and trimmed, it is better than adapters of that rank",
        "rank 4",
        (Comparison("images", "fvae-trimmed-4", "lora-4"), Comparison("images", "fvae-trimmed-4", "adalora-4")),
    ),
    Claim(
        "Exchange of z₂ between examples helps under group shift",
        "the decoder as augmentation",
        tuple(Comparison("images", "fvae-exchange", other, "minority") for other in ("fvae", "lora", "lora-dropout")),
    ),
)
IMAGES, OTHER, TEXT = "30 epochs", "30 epochs on cats and horses", "10 epochs on text"
LONG: tuple[Claim, ...] = (
    Claim("Better than LoRA at the same rate", IMAGES, tuple(_long())),
    Claim("Better than LoRA with dropout at the same rate", IMAGES, tuple(_long(worse="lora-dropout"))),
    Claim("Better than LoRA at the same rate, both stopped early", IMAGES, tuple(_long(early_stopping=True))),
    Claim("Better than LoRA, rates searched for both", IMAGES, tuple(_long(searched=True))),
    Claim(
        "Better than LoRA, rates searched for both, both stopped early",
        IMAGES,
        tuple(_long(searched=True, early_stopping=True)),
    ),
    Claim("Better than LoRA on other classes", OTHER, _both_ends("images-other-long")),
    Claim("Better than LoRA on text", TEXT, _both_ends("text-long")),
)
