"""Which tokens of a batch are padding, so that they stay out of the objective.

A model is told by its `attention_mask` argument, 1 for a token and 0 for padding. The hooks on the model note it for
the layers of that forward, and each layer asks for the flags that fit its own input.
"""

import inspect
import re
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

ARGUMENTS = ("attention_mask", "decoder_attention_mask", "encoder_attention_mask")
STACK = re.compile(r"(?:^|\.)\w*(encoder|decoder)\.")
CROSS_ATTENTION = re.compile(r"encdec|enc_dec|encoder_attn|cross", re.IGNORECASE)
READS_THE_ENCODER = re.compile(r"(k|v|kv|key|value)(_proj)?|c_attn")


class PaddingRules:
    """What a model's structure says about masks; it does not change from forward to forward."""

    def __init__(self, model: nn.Module) -> None:
        kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
        parameters = inspect.signature(model.forward).parameters
        self.positional = [name for name, parameter in parameters.items() if parameter.kind in kinds]
        self.audio: Any = next((m for m in model.modules() if hasattr(m, "_get_feat_extract_output_lengths")), None)

    def note(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> "Padding":
        """The masks among the arguments of a forward, or in a batch that it takes as one mapping."""
        given = {**dict(zip(self.positional, args, strict=False)), **kwargs}
        for batch in (value for value in args if isinstance(value, Mapping)):
            given = {**batch, **given}
        return Padding({name: given[name] for name in ARGUMENTS if given.get(name) is not None}, self.audio)


class Padding:
    """The masks that one forward was given, by argument, and the model that says how long its audio frames are."""

    def __init__(self, given: dict[str, Any], audio: Any = None) -> None:
        self.masks = {name: mask.ne(0) if _is_flat(mask) else mask for name, mask in given.items()}
        self.audio = audio
        self.frames: dict[tuple[str, int], Tensor] = {}

    def flags(self, argument: str | None, x: Tensor) -> Tensor | None:
        """bool ``[...]`` for the tokens of x ``[..., D]``, True for those that count; None where all of them do."""
        mask = None if argument is None else self.masks.get(argument)
        if argument is None or mask is None:
            return None
        tokens = x.shape[:-1]
        if not _is_flat(mask):
            shape = f"has shape {tuple(mask.shape)}" if isinstance(mask, Tensor) else f"is a {type(mask).__name__}"
            _warn(argument, f"{shape}, and only a mask [batch, tokens] says which tokens are padding")
            return None
        if tokens == mask.shape:
            return mask.to(x.device)
        if len(tokens) == 1 and tokens[0] == mask.numel():
            return mask.flatten().to(x.device)
        if len(tokens) == 1 and tokens[0] == mask.shape[0]:  # one row for each sample, as in a pooler
            return None
        if self.audio is not None and tokens == (mask.shape[0], int(_frames(self.audio, mask.shape[1]))):
            return self._frame_flags(argument, tokens[1]).to(x.device)
        _warn(argument, f"has shape {tuple(mask.shape)}, and an adapted layer's input has tokens {tuple(tokens)}")
        return None

    def _frame_flags(self, argument: str, count: int) -> Tensor:
        """Samples are padded on the right, and a frame counts if it is made of real ones."""
        flags = self.frames.get((argument, count))
        if flags is None:
            real = _frames(self.audio, self.masks[argument].sum(-1))
            flags = torch.arange(count, device=real.device) < real.unsqueeze(-1)
            if not torch.compiler.is_compiling():  # a traced checkpoint may have no side effect
                self.frames[argument, count] = flags
        return flags

    def __deepcopy__(self, memo: dict[int, Any]) -> "Padding":
        return Padding({})

    def __reduce__(self) -> tuple[type["Padding"], tuple[dict[str, Any]]]:
        return Padding, ({},)


def mask_argument(model: nn.Module, name: str) -> str | None:
    """Which argument of `model` masks the tokens of the layer called `name`; None for image patches, which none does.

    Layers of an encoder-decoder go by the stack they stand in, and the keys and values of cross-attention, whose names
    tell, are made of the encoder's tokens.
    """
    parts = name.split(".")
    around = [model, *(model.get_submodule(".".join(parts[:i])) for i in range(1, len(parts)))]
    inputs = [module.main_input_name for module in around if hasattr(module, "main_input_name")]
    if inputs and inputs[-1] == "pixel_values":
        return None
    two_stacks = any(getattr(getattr(module, "config", None), "is_encoder_decoder", False) for module in around)
    cross = bool(CROSS_ATTENTION.search(name.rpartition(".")[0]) and READS_THE_ENCODER.fullmatch(parts[-1]))
    if not two_stacks:
        return "encoder_attention_mask" if cross else "attention_mask"
    stack = STACK.search(name)
    in_encoder = stack is not None and stack.group(1) == "encoder"
    return "attention_mask" if cross or in_encoder else "decoder_attention_mask"


def _is_flat(mask: Any) -> bool:
    return isinstance(mask, Tensor) and mask.dim() == 2


def _frames(audio: Any, samples: Any) -> Any:
    """How many frames an audio model makes of these samples, before the adapter that some have on top."""
    lengths = audio._get_feat_extract_output_lengths
    return lengths(samples, **({"add_adapter": False} if "add_adapter" in lengths.__code__.co_varnames else {}))


_warned: set[str] = set()


def _warn(argument: str, what: str) -> None:
    if torch.compiler.is_compiling() or argument in _warned:
        return
    _warned.add(argument)
    warnings.warn(
        f"FVAE: {argument} {what}. All tokens of such layers enter the objective, padding too. With "
        "mask_padding=False they do so in every layer, and this warning is off.",
        stacklevel=2,
    )
