"""FVAELoraConfig: the options of FVAEConfig, and options for where PEFT puts the adapters."""

import enum
import inspect
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

from peft.config import PeftConfig
from peft.tuners.tuners_utils import BaseTuner

from ..config import FIELDS, FVAEConfig, check_table
from ..presets import preset
from ..serving.saved import read_adapter
from ..serving.settings import BY_LAYER, TABLES, table_of

METHOD = "fvae"
DEFAULT = FVAEConfig()
BIASES = ("none", "all", "fvae_only")


def _option(name: str) -> Any:
    return field(default=getattr(DEFAULT, name), metadata={"help": f"see FVAEConfig.{name}"})


@dataclass
class FVAELoraConfig(PeftConfig):
    """FVAE-LoRA for `peft.get_peft_model`.

    The options of the method are those of `FVAEConfig`, with the same names, but `r` for `rank`.

    Args:
        r: size of each latent space, and rank of the update.
        target_modules: names or name ends of the linear layers to adapt, a regular expression, or "all-linear".
            A list may hold the names of several versions of a model: names that match nothing are ignored if one
            matches.
        target_parameters: names or name ends of projections of fused experts to adapt ("experts.gate_up_proj"), for
            each expert apart, as LoRA does; needs transformers 5. Expert 3 is the layer "...experts.gate_up_proj.3".
        exclude_modules: names, or a regular expression, of layers to leave out.
        layers_to_transform: indices of the blocks to adapt; needs a list in target_modules.
        layers_pattern: name of the list of blocks, if PEFT does not find it.
        modules_to_save: other modules to train and save, for example a classification head.
        bias: which biases of the base model are trained too: "none", "all", or "fvae_only", those of the adapted
            layers. As with LoRA they stay in the base model when adapters are disabled, switched or removed.
        trainable_token_indices: tokens whose embeddings are trained too, or a table of them by embedding, as in LoRA.
        rank_pattern: rank by module name pattern, if it differs from `r`.
        alpha_pattern: alpha by module name pattern, if it differs from `alpha`.
        encoder_hidden_pattern: sizes of the encoders' hidden layers by module name pattern, if they differ from
            `encoder_hidden`.
        init_weights: False starts from random heads, for tests: the adapter then changes the output from the start.
        inference_only: the adapter holds only encoder 1's mean path and B (`export_for_inference` writes it).

    Raises:
        ValueError: for a value out of range.
        TypeError: for an unknown option.
    """

    r: int = field(default=DEFAULT.rank, metadata={"help": "size of each latent space, and rank of the update"})
    alpha: float = _option("alpha")
    rslora: bool = _option("rslora")
    encoder_hidden: tuple[int, ...] = _option("encoder_hidden")
    separate_hidden: bool = _option("separate_hidden")
    decoder_hidden: tuple[int, ...] = _option("decoder_hidden")
    dropout: float = _option("dropout")
    fusion: str = _option("fusion")
    objective: str = _option("objective")
    recon_weight: float = _option("recon_weight")
    kl_weight: float = _option("kl_weight")
    gamma_weight: float | tuple[float, float] = _option("gamma_weight")
    gamma_estimator: str = _option("gamma_estimator")
    prior2_mean: float = _option("prior2_mean")
    prior2_std: float = _option("prior2_std")
    loss_weight: float | Mapping[str, float] | None = _option("loss_weight")
    detach_target: bool = _option("detach_target")
    start: str = _option("start")
    logvar1_start: float = _option("logvar1_start")
    logvar1_max: float | None = _option("logvar1_max")
    logvar1_held: bool = _option("logvar1_held")
    mask_padding: bool = _option("mask_padding")
    sample_at_inference: bool = _option("sample_at_inference")
    target_modules: list[str] | str | None = field(default=None, metadata={"help": "linear layers to adapt"})
    target_parameters: list[str] | None = field(default=None, metadata={"help": "parameters of fused experts to adapt"})
    exclude_modules: list[str] | str | None = field(default=None, metadata={"help": "layers to leave out"})
    layers_to_transform: list[int] | int | None = field(default=None, metadata={"help": "indices of blocks to adapt"})
    layers_pattern: list[str] | str | None = field(default=None, metadata={"help": "name of the list of blocks"})
    modules_to_save: list[str] | None = field(default=None, metadata={"help": "other modules to train and save"})
    bias: str = field(default="none", metadata={"help": "none, all or fvae_only: biases that are trained too"})
    trainable_token_indices: list[int] | dict[str, list[int]] | None = field(
        default=None, metadata={"help": "tokens whose embeddings are trained too"}
    )
    rank_pattern: dict[str, int] | None = field(default_factory=dict, metadata={"help": "rank by module name pattern"})
    alpha_pattern: dict[str, float] | None = field(default_factory=dict, metadata={"help": "alpha by name pattern"})
    encoder_hidden_pattern: dict[str, tuple[int, ...]] | None = field(
        default_factory=dict, metadata={"help": "sizes of the encoders' hidden layers by module name pattern"}
    )
    init_weights: bool = field(default=True, metadata={"help": "False: random heads, for tests"})
    inference_only: bool = field(default=False, metadata={"help": "hold the inference path alone"})

    def __new__(cls, *args: Any, **kwargs: Any) -> "FVAELoraConfig":
        """Refuse unknown options, in Python's own words: PEFT then drops them from a file of a newer version.

        It warns with their names. Weights that do not fit without such an option are still refused (`files`).
        """
        known = {f.name for f in fields(cls)}
        unknown = sorted(set(kwargs) - known)
        if unknown:
            raise TypeError(
                f"FVAELoraConfig got an unexpected keyword argument: it has no option {unknown}. Check the spelling. "
                f"It has: {sorted(known)}"
            )
        return super().__new__(cls)

    @classmethod
    def preset(cls, name: str, **options: Any) -> "FVAELoraConfig":
        """A config by name: "paper", "authors" or "default" (docs/recipes.md). `options` replace its values.

            fk.FVAELoraConfig.preset("paper", r=8, task_type="SEQ_CLS", target_modules=["query", "value"])

        Raises:
            ValueError: for an unknown name, or a value out of range.
            TypeError: for an unknown option.
        """
        return cls(**{**preset(name, options.get("r", DEFAULT.rank)), **options})

    def __getnewargs__(self) -> tuple[()]:
        return ()

    def __post_init__(self) -> None:
        super().__post_init__()
        from peft import PeftType

        self.peft_type = PeftType(METHOD.upper())
        for name in TABLES:
            value = getattr(self, name)  # a file has pairs, see to_dict
            setattr(self, name, table_of(value))
        for name in ("target_modules", "exclude_modules"):
            value = getattr(self, name)
            setattr(self, name, set(value) if isinstance(value, (list, tuple)) else value)
        validated = self.to_fvae_config()
        for name in ("encoder_hidden", "decoder_hidden", "gamma_weight"):
            setattr(self, name, getattr(validated, name))
        for name in BY_LAYER:
            setattr(self, name, getattr(self, name) or {})
            check_table(name, getattr(self, name))
        for pattern, rank in self.rank_pattern.items():  # type: ignore[union-attr]
            try:
                replace(validated, rank=rank)
            except ValueError as error:
                raise ValueError(
                    f"{error}. rank_pattern gives it to {pattern!r}; exclude_modules leaves layers out"
                ) from None
        for alpha in self.alpha_pattern.values():  # type: ignore[union-attr]
            replace(validated, alpha=alpha)
        for pattern, sizes in self.encoder_hidden_pattern.items():  # type: ignore[union-attr]
            self.encoder_hidden_pattern[pattern] = replace(validated, encoder_hidden=sizes).encoder_hidden  # type: ignore[index]
        if self.inference_only and self.sample_at_inference:
            raise ValueError(
                "inference_only=True keeps the mean path alone; it does not go with sample_at_inference=True"
            )
        self._check_placement()
        self._check_beside()

    def _check_beside(self) -> None:
        """What is trained beside the adapters."""
        if self.bias not in BIASES:
            raise ValueError(f"bias={self.bias!r} is not allowed: expected one of {BIASES}")
        if self.bias != "none" and not hasattr(BaseTuner, "_get_learnable_bias_state_dict"):
            raise ValueError(f"bias={self.bias!r} needs PEFT 0.21 or newer: older ones do not save the biases")
        tokens = self.trainable_token_indices
        table = tokens if isinstance(tokens, dict) else {} if tokens is None else {"": tokens}
        for name, indices in table.items():
            if not (isinstance(name, str) and isinstance(indices, (list, tuple)) and all(map(_is_index, indices))):
                raise ValueError(
                    f"trainable_token_indices={tokens!r} is not allowed: expected a list of token numbers, or "
                    "a table of lists by embedding"
                )

    def token_counts(self) -> set[int]:
        """Numbers of embeddings that are trained in a layer."""
        tokens = self.trainable_token_indices
        lists = tokens.values() if isinstance(tokens, dict) else [] if tokens is None else [tokens]
        return {len(indices) for indices in lists}

    def _check_placement(self) -> None:
        parameters = self.target_parameters
        if parameters is not None and (
            not isinstance(parameters, (list, tuple, set))
            or not all(isinstance(name, str) and name for name in parameters)
        ):
            raise ValueError(f"target_parameters={parameters!r} is not allowed: expected a list of names, or None")
        if parameters and self.bias == "fvae_only":
            raise ValueError(
                "bias='fvae_only' is not allowed with target_parameters: experts share one tensor of biases. Take "
                "'all' or 'none'"
            )
        for name in ("layers_to_transform", "layers_pattern"):
            if isinstance(self.target_modules, str) and getattr(self, name) is not None:
                raise ValueError(
                    f"{name} needs target_modules as a list of names; it is the string {self.target_modules!r}"
                )
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError("layers_pattern says where the blocks are; give their indices in layers_to_transform too")

    def to_fvae_config(
        self, rank: int | None = None, alpha: float | None = None, hidden: tuple[int, ...] | None = None
    ) -> FVAEConfig:
        """The options of one layer, validated."""
        options = {name: getattr(self, name) for name in FIELDS if name != "rank"}
        if alpha is not None:
            options["alpha"] = alpha
        if hidden is not None:
            options["encoder_hidden"] = hidden
        return FVAEConfig(rank=self.r if rank is None else rank, **options)

    def to_dict(self) -> dict[str, Any]:
        """The config as a file holds it. Pattern tables are pairs: PEFT sorts keys, and the first match counts."""
        tables = {name: getattr(self, name) for name in TABLES}
        pairs = {
            name: [list(pair) for pair in table.items()] for name, table in tables.items() if isinstance(table, Mapping)
        }
        return {name: _as_in_file(value) for name, value in {**super().to_dict(), **pairs}.items()}

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str, subfolder: str | None = None, **kwargs: Any) -> Any:
        """The saved config. Weights beside it are checked here, before any model is touched.

        Raises:
            ValueError: if it is another method's config, or the weights are a pickle, truncated, or not FVAE-LoRA's.
        """
        config = super().from_pretrained(pretrained_model_name_or_path, subfolder=subfolder, **kwargs)
        folder = os.path.join(pretrained_model_name_or_path, subfolder or "")
        if not isinstance(config, cls):
            raise ValueError(
                f"{folder} holds an adapter of the method {getattr(config.peft_type, 'value', None)}, not of "
                f"{METHOD.upper()}: load it with peft.PeftModel.from_pretrained, which finds its config class"
            )
        if os.path.isdir(folder) and not kwargs.get("ignore_mismatched_sizes"):
            config.__dict__["_saved"] = read_adapter(folder)  # checked against the model when it is adapted
        return config


def _is_index(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _as_in_file(value: Any) -> Any:
    """Tuples and (sorted) sets as lists, members of an enum as their value."""
    if isinstance(value, enum.Enum):
        return value.value
    if isinstance(value, (set, frozenset)):
        return sorted(value)
    if isinstance(value, (list, tuple)):
        return [_as_in_file(entry) for entry in value]
    return {key: _as_in_file(entry) for key, entry in value.items()} if isinstance(value, dict) else value


# `__new__` takes any option, so that it can refuse unknown ones by name. The constructor's signature lists the options.
_signature = inspect.signature(FVAELoraConfig.__init__)
FVAELoraConfig.__signature__ = _signature.replace(  # type: ignore[attr-defined]
    parameters=list(_signature.parameters.values())[1:], return_annotation=inspect.Signature.empty
)
