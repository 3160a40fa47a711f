"""Which tokens of a batch are padding; they stay out of the objective.

A model gets an `attention_mask`, 1 for a token and 0 for padding. The hooks on the model note it for the layers of
that forward, and each layer asks for the flags that fit its own input.
"""

import inspect
import re
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from . import warn
from .outputs import given

ARGUMENTS = ("attention_mask", "decoder_attention_mask", "encoder_attention_mask")
STACK = re.compile(r"(?:^|\.)\w*(encoder|decoder)\.")
CROSS_ATTENTION = re.compile(r"encdec|enc_dec|encoder_attn|cross|attn2", re.IGNORECASE)
READS_THE_ENCODER = re.compile(r"(to_|add_)?(k|v|kv|key|value)(_proj)?|c_attn")


class PaddingRules:
    """Which argument masks which layer of a model. Does not change from forward to forward."""

    def __init__(self, model: nn.Module, root: bool = True) -> None:
        self.root = root
        kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
        parameters = inspect.signature(model.forward).parameters
        self.positional = [name for name, parameter in parameters.items() if parameter.kind in kinds]
        self.audio: Any = next((m for m in model.modules() if hasattr(m, "_get_feat_extract_output_lengths")), None)

    def note(self, args: tuple[Any, ...], kwargs: dict[str, Any], outer: "Padding | None" = None) -> "Padding":
        """The masks among the arguments of a forward, or in a batch passed as one mapping; `outer`: those around."""
        named = given(args, kwargs, self.positional)
        return Padding({name: named[name] for name in ARGUMENTS if name in named}, self.audio, self.root, outer)


class Found(NamedTuple):
    """Result of the search in a module's masks: `flags` (None: all tokens), or nothing, perhaps with a `Problem`."""

    settled: bool
    flags: Tensor | None = None
    problem: "Problem | None" = None


class Problem(NamedTuple):
    """Why a given mask is not used."""

    argument: str
    what: str

    def warn(self, key: Any) -> None:
        """Warn, once for each kind of layer."""
        _warn(self.argument, self.what, getattr(key, "name", ""))


NOTHING, ALL = Found(False), Found(True)


class Padding:
    """The masks of one forward by argument, and the model that knows the length of its audio frames."""

    def __init__(
        self, masks: dict[str, Any], audio: Any = None, root: bool = True, outer: "Padding | None" = None
    ) -> None:
        self.came = masks
        self.masks: dict[str, Any] = {}
        for name, mask in masks.items():
            if outer is not None and outer.came.get(name) is mask:
                self.masks[name] = outer.masks[name]
            else:
                self.masks[name] = mask.ne(0) if _is_flat(mask) else mask
        self.audio = audio
        self.root = root  # True unless an outer model may have turned a token mask into an attention mask
        self.frames: dict[tuple[str, int], Tensor] = {}

    def flags(self, argument: str | None, x: Tensor) -> Tensor | None:
        """bool ``[...]`` for the tokens of x ``[..., D]``, True if a token counts; None if all do."""
        if argument is None:
            return None
        found = self.find(argument, x)
        if found.problem is not None:
            found.problem.warn(None)
        return found.flags

    def find(self, argument: str, x: Tensor) -> Found:
        """The flags for the tokens of x from this argument's mask, if it fits."""
        mask = self.masks.get(argument)
        if mask is None:
            return NOTHING
        if not _is_flat(mask):
            if not self.root:
                return NOTHING
            shape = f"has shape {tuple(mask.shape)}" if isinstance(mask, Tensor) else f"is a {type(mask).__name__}"
            return _fault(argument, f"{shape}, and only a mask [batch, tokens] says which tokens are padding")
        found = _fitted(argument, mask, x)
        if not found.settled and self.audio is not None:
            tokens = x.shape[:-1]
            if tokens == (mask.shape[0], int(_frames(self.audio, mask.shape[1]))):
                return Found(True, self._frame_flags(argument, tokens[1]).to(x.device))
        return found

    def find_in_attention(self, argument: str, x: Tensor) -> Found:
        """The same from an attention mask ``[batch, 1, queries, tokens]`` that a model passes on to its blocks.

        A token counts if any query attends to it: a causal mask lets each token attend to itself.
        """
        mask = self.masks.get(argument)
        if self.root or not isinstance(mask, Tensor) or mask.dim() != 4 or mask.shape[1] != 1:
            return NOTHING
        if x.shape[:-1] != (mask.shape[0], mask.shape[3]):
            return NOTHING
        attends = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
        return Found(True, attends.any(2).squeeze(1).to(x.device))

    def _frame_flags(self, argument: str, count: int) -> Tensor:
        """Flags of audio frames. Samples are padded on the right; a frame counts if its samples are real."""
        flags = self.frames.get((argument, count))
        if flags is None:
            real = _frames(self.audio, self.masks[argument].sum(-1))
            flags = torch.arange(count, device=real.device) < real.unsqueeze(-1)
            if not torch.compiler.is_compiling():  # a traced checkpoint must have no side effect
                self.frames[argument, count] = flags
        return flags

    def __deepcopy__(self, memo: dict[int, Any]) -> "Padding":
        return Padding({})

    def __reduce__(self) -> tuple[type["Padding"], tuple[dict[str, Any]]]:
        return Padding, ({},)


class Stated(NamedTuple):
    """Masks that the user stated with `token_mask`: one for all layers (None: all tokens), or by argument."""

    mask: Tensor | None
    arguments: dict[str, Tensor]

    def find(self, argument: str | None, x: Tensor) -> Found:
        """The flags for x of a layer that `argument` masks."""
        if self.arguments:
            mask = None if argument is None else self.arguments.get(argument)
            return NOTHING if mask is None else _fitted(argument or "", mask, x)
        return ALL if self.mask is None else _fitted("token_mask", self.mask, x)


def _fitted(argument: str, mask: Tensor, x: Tensor) -> Found:
    """The flags of a mask for the tokens of x, flattened or not."""
    tokens = x.shape[:-1]
    if mask.shape == tokens:
        return Found(True, mask if mask.device == x.device else mask.to(x.device))
    if mask.numel() == tokens.numel() and (len(tokens) == 1 or mask.shape[-1] == tokens[-1]):
        return Found(True, mask.reshape(tokens).to(x.device))
    if mask.dim() > 1 and len(tokens) == 1 and tokens[0] == mask.shape[0]:  # one row for each sample, as in a pooler
        return ALL
    return _fault(argument, _unfit(mask, x))


def mask_argument(model: nn.Module, name: str) -> str | None:
    """Which argument of `model` masks the tokens of the layer called `name`; None for image patches: they have no mask.

    Layers of an encoder-decoder use the mask of their stack. Keys and values of cross-attention, known by their names,
    come from the encoder's tokens. `model` may be one of the stacks, or a block.
    """
    parts = name.split(".")
    around = [model, *(model.get_submodule(".".join(parts[:i])) for i in range(1, len(parts)))]
    inputs = [module.main_input_name for module in around if hasattr(module, "main_input_name")]
    if inputs and inputs[-1] == "pixel_values":
        return None
    cross = bool(CROSS_ATTENTION.search(name.rpartition(".")[0]) and READS_THE_ENCODER.fullmatch(parts[-1]))
    two_stacks = any(getattr(getattr(module, "config", None), "is_encoder_decoder", False) for module in around)
    accepted = inspect.signature(model.forward).parameters
    if not two_stacks or ("attention_mask" in accepted and "decoder_attention_mask" not in accepted):
        return "encoder_attention_mask" if cross else "attention_mask"
    stack = STACK.search(name)
    in_encoder = stack is not None and stack.group(1) == "encoder"
    return "attention_mask" if cross or in_encoder else "decoder_attention_mask"


def _is_flat(mask: Any) -> bool:
    return isinstance(mask, Tensor) and mask.dim() == 2


def _frames(audio: Any, samples: Any) -> Any:
    """Number of frames that an audio model makes of these samples, before its adapter layers if it has any."""
    lengths = audio._get_feat_extract_output_lengths
    return lengths(samples, **({"add_adapter": False} if "add_adapter" in lengths.__code__.co_varnames else {}))


def _unfit(mask: Tensor, x: Tensor) -> str:
    return f"has shape {tuple(mask.shape)}, and an adapted layer's input has tokens {tuple(x.shape[:-1])}"


def _fault(argument: str, what: str) -> Found:
    return Found(False, None, Problem(argument, what))


def _warn(argument: str, what: str, layer: str) -> None:
    if torch.compiler.is_compiling():
        return
    warn.once(
        (argument, layer.rpartition(".")[2]),
        f"{argument} {what}{f' ({layer})' if layer else ''}. All tokens of such layers enter the objective, "
        "padding too. State the mask of their tokens with `with fvae_kernels.token_mask(mask):`. With "
        "mask_padding=False all tokens count in every layer, and this warning is off.",
    )
