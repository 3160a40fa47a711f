"""The weight of the auxiliary loss if the task loss is a sum over tokens divided by the tokens of the whole step.

transformers.Trainer passes `num_items_in_batch` to models that take it. If the task loss is ``sum / items``, the
micro-batches of one step are added up, not averaged. The auxiliary loss of a micro-batch, a mean over its tokens, is
then weighted by the micro-batch's share of the labelled tokens. The shares of one step sum to 1.

Many heads take the argument and ignore it: their loss is a mean, and under Trainer it is too large by the number of
accumulation steps. The auxiliary loss must follow the task loss, so that their ratio stays as configured. So the head
is observed: it gets the number as a tensor that notices when something is computed with it.
"""

from typing import Any

import torch
from torch import Tensor, nn

IGNORED_LABEL = -100
ITEMS = "num_items_in_batch"


class ObservedItems(torch.Tensor):
    """The number of items as a tensor that notices if anything is computed with it. torch.compile traces it too."""

    used: list[bool]
    plain: Tensor  # the number as it came

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Results are plain tensors, except the same number on another device, in another dtype or shape."""
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*args, **(kwargs or {}))
        seen = [entry for entry in args if isinstance(entry, ObservedItems)]
        name = getattr(func, "__name__", "")
        if name in MOVES and seen and isinstance(result, Tensor):
            return _observed(result, seen[0].used, seen[0].plain)
        if (isinstance(result, Tensor) and name != "__get__") or name in READS:  # attributes are looked at alone
            for entry in seen:
                entry.used[0] = True
        return result


MOVES = {"to", "cuda", "cpu", "float", "double", "half", "bfloat16", "long", "int", "clone", "detach", "contiguous"}
MOVES |= {"view", "reshape", "squeeze", "unsqueeze", "expand"}
READS = {"item", "tolist", "numpy", "__int__", "__float__", "__index__", "__bool__"}


def _observed(number: Tensor, used: list[bool], plain: Tensor) -> ObservedItems:
    found = number.as_subclass(ObservedItems)
    found.used, found.plain = used, plain
    return found


def observe_items(kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a forward, with the number of items as `ObservedItems`."""
    items = kwargs[ITEMS]
    if items is None:
        return kwargs
    number = items.detach() if isinstance(items, Tensor) else torch.as_tensor(items)
    return {**kwargs, ITEMS: _observed(number, [False], number)}


def token_share(model: nn.Module, given: dict[str, Any]) -> Tensor | float:
    """The share of this forward; 1 if its head did not compute with the number: then the task loss is a mean."""
    items = given.get(ITEMS)
    if not isinstance(items, ObservedItems) or not items.used[0]:
        return 1.0
    share = labelled_share(model, given, items.plain)
    return 1.0 if share is None else share.sum()


def labelled_share(model: nn.Module, inputs: Any, items: Tensor | int) -> Tensor | None:
    """Labelled tokens of `inputs` / `items` of the step, counted as the head does; None without labels."""
    labels = inputs.get("shift_labels", inputs.get("labels"))
    if not isinstance(labels, torch.Tensor):
        return None
    if inputs.get("shift_labels") is None and _shifts_labels(model):
        labels = labels[..., 1:]
    return labels.ne(IGNORED_LABEL).sum() / torch.as_tensor(items).clamp(min=1)


def _shifts_labels(model: nn.Module) -> bool:
    try:
        from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss
    except ImportError:
        return False
    encoder_decoder = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    if encoder_decoder or not hasattr(model, "loss_type"):
        return False
    loss_type: Any = model.loss_type
    return LOSS_MAPPING.get(loss_type, ForCausalLMLoss) is ForCausalLMLoss  # the default for other names
