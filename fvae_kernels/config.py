"""FVAEConfig: every option of an adapted layer in one frozen, validated dataclass."""

import math
import re
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from numbers import Real
from typing import Any

from .presets import preset
from .reference import LOGVAR_LIMIT

OBJECTIVES = ("fvae", "vae2lat", "beta_vae2lat", "symmetric")
FUSIONS = ("concat", "average")
ESTIMATORS = ("closed_form", "monte_carlo")
STARTS = ("authors", "lora")
AUTHORS_TASK_WEIGHT = 1000  # of the task loss, beside the mean of the objective over layers


@dataclass(frozen=True)
class FVAEConfig:
    """Options of one FVAE-LoRA layer; names and equation numbers as in the paper (arXiv 2510.19640).

    Args:
        rank: size r of each latent space, and rank of the update.
        alpha: the update is scaled by ``alpha / rank``.
        rslora: scale by ``alpha / sqrt(rank)`` instead.
        encoder_hidden: sizes of the encoders' hidden layers. ``()`` is a linear encoder: its mean path has no bias,
            is plain LoRA with ``A = M_1``, and can be merged.
        separate_hidden: mean and logvar each have hidden layers of their own.
        decoder_hidden: sizes of the decoder's hidden layers.
        dropout: after each hidden layer, in training.
        fusion: the decoder reads ``[z_1, z_2]`` ("concat") or ``(z_1 + z_2) / 2`` ("average").
        objective: "fvae" is (4); "vae2lat" (2), "beta_vae2lat" (8) and "symmetric" (9) are the paper's ablations.
        recon_weight: alpha of (4), weight of the reconstruction's negative log-likelihood.
        kl_weight: beta of (4), weight of KL(q_1 || p_1); in (8) and (9) of KL(q_2 || p_2) too. Choose it above
            gamma_weight (10 is a good start), or nothing holds the variance of z_1; a layer warns of that.
        gamma_weight: delta of (4). A pair weights E log p_2(z_2) and -E log p_1(z_1) one by one.
        gamma_estimator: "closed_form", or "monte_carlo" from the samples that the layer draws anyway.
        prior2_mean: mean of every entry of p_2.
        prior2_std: standard deviation of every entry of p_2.
        loss_weight: lambda of (6); a number, or ``{module name pattern: number}``, where the first pattern that matches
            the end of a module's name counts. None is the authors' ``1 / (1000 * adapted layers)``.
        detach_target: no gradient flows into x as the target of the reconstruction.
        start: parameters at the start. "authors": heads zero and B normal(0, 0.02). "lora": encoder 1's mean head as
            PEFT starts LoRA's A, and B zero. Either way the output begins as the base layer's in eval mode; with "lora"
            the task's gradient reaches B from the first step, as in LoRA.
        logvar1_start: log-variance of z_1 at the start; -4 is a standard deviation of 0.14.
        logvar1_max: upper bound of z_1's log-variance. None bounds it as every log-variance, by 20.
        logvar1_held: z_1's log-variance stays at `logvar1_start` and is not learned.
        mask_padding: tokens that the model's attention_mask marks as padding stay out of the objective (`padding`).
        sample_at_inference: draw z_1 in eval mode too, instead of taking its mean.

    Raises:
        ValueError: for a value out of range; it says what came, what is allowed and why.
    """

    rank: int = 16
    alpha: float = 16.0
    rslora: bool = False
    encoder_hidden: tuple[int, ...] = ()
    separate_hidden: bool = False
    decoder_hidden: tuple[int, ...] = ()
    dropout: float = 0.1
    fusion: str = "concat"
    objective: str = "fvae"
    recon_weight: float = 1.0
    kl_weight: float = 3.0
    gamma_weight: float | tuple[float, float] = 1.0
    gamma_estimator: str = "closed_form"
    prior2_mean: float = 1.5
    prior2_std: float = 1.0
    loss_weight: float | Mapping[str, float] | None = None
    detach_target: bool = False
    start: str = "lora"
    logvar1_start: float = -4.0
    logvar1_max: float | None = None
    logvar1_held: bool = True
    mask_padding: bool = True
    sample_at_inference: bool = False

    def __post_init__(self) -> None:
        _integer("rank", self.rank, "it is the size of the latent space")
        for name in ("encoder_hidden", "decoder_hidden"):
            object.__setattr__(self, name, _sizes(name, getattr(self, name)))
        for name in SWITCHES:
            if not isinstance(getattr(self, name), bool):
                raise _wrong(name, getattr(self, name), "True or False")
        _choice("fusion", self.fusion, FUSIONS)
        _choice("objective", self.objective, OBJECTIVES)
        _choice("gamma_estimator", self.gamma_estimator, ESTIMATORS)
        _choice("start", self.start, STARTS)
        _number("alpha", self.alpha)
        _number("dropout", self.dropout, low=0.0, below=1.0, why="it is the probability of dropping an activation")
        _number("recon_weight", self.recon_weight, low=0.0, why="a negative weight would reward bad reconstruction")
        _number("kl_weight", self.kl_weight, low=0.0, why="a negative weight would push q_1 away from its prior")
        _number("prior2_mean", self.prior2_mean)
        _number("prior2_std", self.prior2_std, above=0.0, why="it is a standard deviation")
        self._check_gamma()
        self._check_loss_weight()
        self._check_logvar1()
        if self.separate_hidden and not self.encoder_hidden:
            raise _wrong(
                "separate_hidden", True, "False where encoder_hidden=()", "there is no hidden layer to separate"
            )

    @classmethod
    def preset(cls, name: str, **options: Any) -> "FVAEConfig":
        """A config by name: "paper", "authors" or "default" (docs/recipes.md), with other `options` where given.

            fk.FVAEConfig.preset("paper", rank=8, kl_weight=10.0)

        Raises:
            ValueError: for an unknown name, or a value out of range.
        """
        return cls(**{**preset(name, options.get("rank", cls.rank)), **options})

    def _check_gamma(self) -> None:
        weight: Any = self.gamma_weight
        if isinstance(weight, (tuple, list)):
            if len(weight) != 2:
                raise _wrong("gamma_weight", weight, "a number or a pair", "Gamma is a difference of two terms")
            object.__setattr__(self, "gamma_weight", tuple(weight))
        for w in self.gamma_weights:
            _number("gamma_weight", w, low=0.0, why="a negative weight would pull z_1 and z_2 together")
        if self.objective != "fvae" and self.gamma_weights not in ((1.0, 1.0), (0.0, 0.0)):
            raise _wrong(
                "gamma_weight",
                weight,
                f"the default 1.0 (or 0.0) with objective={self.objective!r}",
                "it has no Gamma term",
            )
        if self.objective == "vae2lat" and self.kl_weight != 1.0:
            raise _wrong("kl_weight", self.kl_weight, "1.0 with objective='vae2lat'", "(8) is 'beta_vae2lat'")

    def _check_loss_weight(self) -> None:
        weight: Any = self.loss_weight
        if weight is None:
            return
        table = weight if isinstance(weight, Mapping) else {".*": weight}
        if not table:
            raise _wrong("loss_weight", weight, "a number or a table with at least one pattern")
        check_table("loss_weight", table)
        for value in table.values():
            _number("loss_weight", value, low=0.0, why="a negative lambda would maximise the objective's loss")

    def _check_logvar1(self) -> None:
        if self.logvar1_max is not None:
            _number("logvar1_max", self.logvar1_max, -LOGVAR_LIMIT, at_most=LOGVAR_LIMIT)
            if self.logvar1_held:
                raise _wrong("logvar1_max", self.logvar1_max, "None with logvar1_held=True", "logvar1_start holds it")
        highest = LOGVAR_LIMIT if self.logvar1_max is None else self.logvar1_max
        why = "beyond the bounds of z_1's log-variance no gradient would bring it back"
        _number("logvar1_start", self.logvar1_start, -LOGVAR_LIMIT, at_most=highest, why=why)

    @property
    def logvar1_bounds(self) -> tuple[float, float]:
        """z_1's log-variance is clamped to these wherever a Gaussian is made of it; held where they are equal.

        The gradient passes where it lies between them, bounds included, and nowhere where they are equal.
        """
        if self.logvar1_held:
            return float(self.logvar1_start), float(self.logvar1_start)
        return -LOGVAR_LIMIT, LOGVAR_LIMIT if self.logvar1_max is None else float(self.logvar1_max)

    @property
    def scaling(self) -> float:
        """s in ``y = W x + b + s B z_1``."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

    @property
    def gamma_weights(self) -> tuple[float, float]:
        """delta of E log p_2(z_2) and delta of -E log p_1(z_1)."""
        weight: Any = self.gamma_weight
        return (weight[0], weight[1]) if isinstance(weight, (tuple, list)) else (weight, weight)

    @property
    def mergeable(self) -> bool:
        """Whether mean_1 is linear in x, so that a weight matrix holds the whole adapter."""
        return not self.encoder_hidden and not self.sample_at_inference

    def warn_if_unheld(self) -> None:
        """Warn where the objective (4) puts no bound on the scale of z_1.

        The terms of one latent entry are ``beta/2 (mean^2 + var - 1 - logvar) - delta/2 (mean^2 + var)``: the pull
        towards zero that KL has, Gamma takes back. Their minimum is at ``var = beta / (beta - delta)``, and there is
        none unless beta is above delta. Where the log-variance is held, the mean alone is left, which is pushed away
        where beta is below delta.
        """
        delta = self.gamma_weights[1]
        unheld = self.kl_weight < delta if self.logvar1_held else self.kl_weight <= delta
        if self.objective == "fvae" and unheld and delta > 0:
            grows = "mean" if self.logvar1_held else "variance"
            warnings.warn(
                f"kl_weight={self.kl_weight:g} is not above gamma_weight={delta:g}: Gamma then cancels what KL does to "
                f"the scale of z_1, and its {grows} can grow without end. The paper advises kl_weight in 1..10 with "
                "gamma_weight=1; its code trains with kl_weight=1, gamma_weight=2/rank",
                stacklevel=2,
            )

    def loss_weight_for(self, module_name: str, layers: int = 1) -> float:
        """lambda of (6) for the layer called `module_name`, one of so many adapted `layers`."""
        if self.loss_weight is None:
            return 1 / (AUTHORS_TASK_WEIGHT * layers)
        if not isinstance(self.loss_weight, Mapping):
            return float(self.loss_weight)
        for pattern, value in self.loss_weight.items():
            if matches(pattern, module_name):
                return float(value)
        raise ValueError(
            f"loss_weight has no pattern for layer {module_name or '(unnamed)'!r}; it has {list(self.loss_weight)}. "
            "Add '.*' as its last pattern to cover the rest, or pass a number."
        )

    def check_loss_weight_patterns(self, module_names: Iterable[str]) -> None:
        """Raise unless every layer has its lambda and every pattern of the table has its layer."""
        names = list(module_names)
        for name in names:
            self.loss_weight_for(name)
        table = self.loss_weight if isinstance(self.loss_weight, Mapping) else {}
        unused = [pattern for pattern in table if not any(matches(pattern, name) for name in names)]
        if unused:
            raise ValueError(f"loss_weight has patterns that match no adapted layer: {unused}; the layers are {names}")


def check_table(name: str, table: Any) -> None:
    """Raise unless the option called `name` is a table of values by module name pattern.

    Raises:
        ValueError: it is no mapping, or a key is no regular expression.
    """
    if not isinstance(table, Mapping):
        raise _wrong(name, table, "a table of values by module name pattern")
    for pattern in table:
        if not isinstance(pattern, str):
            raise _wrong(name, table, "a table whose keys are strings, patterns of module names")
        try:
            re.compile(pattern)
        except re.error as error:
            raise _wrong(name, pattern, "a regular expression", str(error)) from None


def matches(pattern: str, module_name: str) -> bool:
    """Whether `pattern` is the name, or its end from a dot on: the rule of PEFT's rank_pattern."""
    return re.fullmatch(rf"(?:.*\.)?(?:{pattern})", module_name) is not None


SWITCHES = tuple(f.name for f in fields(FVAEConfig) if f.type is bool)
FIELDS = tuple(f.name for f in fields(FVAEConfig))


def _wrong(name: str, came: Any, allowed: str, why: str = "") -> ValueError:
    return ValueError(f"{name}={came!r} is not allowed: expected {allowed}" + (f" ({why})" if why else ""))


def _choice(name: str, value: Any, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise _wrong(name, value, "one of " + ", ".join(map(repr, allowed)))


def _integer(name: str, value: Any, why: str) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise _wrong(name, value, "a whole number of at least 1", why)


def _sizes(name: str, value: Any) -> tuple[int, ...]:
    if isinstance(value, (str, bytes)) or not isinstance(value, Iterable):
        raise _wrong(name, value, "a sequence of layer sizes, as (16,)", "() is no hidden layer")
    sizes = tuple(value)
    for size in sizes:
        _integer(name, size, "each entry is the size of one hidden layer")
    return sizes


def _number(
    name: str,
    value: Any,
    low: float | None = None,
    above: float | None = None,
    below: float | None = None,
    at_most: float | None = None,
    why: str = "",
) -> None:
    bounds = [
        f"{word} {bound}"
        for word, bound in (("at least", low), ("above", above), ("below", below), ("at most", at_most))
        if bound is not None
    ]
    ok = isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
    ok = ok and (at_most is None or value <= at_most)
    ok = ok and (low is None or value >= low) and (above is None or value > above) and (below is None or value < below)
    if not ok:
        raise _wrong(name, value, " and ".join(["a finite number", *bounds]), why)
