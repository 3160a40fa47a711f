"""The weight of the auxiliary loss where the task loss is a sum over tokens, divided by the tokens of a whole step.

transformers.Trainer passes `num_items_in_batch` to models that take it. The task loss is then ``sum / num_items``, and
the micro-batches of one step add up instead of being averaged. The auxiliary loss of a micro-batch, a mean over its
tokens, then counts with the micro-batch's share of the labelled tokens, so that the shares of one step sum to 1.
"""

import inspect
from typing import Any

import torch
from torch import Tensor, nn

IGNORED_LABEL = -100


def token_share(model: nn.Module, kwargs: dict[str, Any]) -> Tensor | float:
    """The share of this forward; 1 where the task loss is a plain mean."""
    items = kwargs.get("num_items_in_batch")
    if items is None or not honours_num_items(model):
        return 1.0
    share = labelled_share(model, kwargs, items)
    return 1.0 if share is None else share


def labelled_share(model: nn.Module, inputs: Any, items: Tensor | int) -> Tensor | None:
    """Labelled tokens of `inputs` among all `items` of the step, counted as Trainer does; None without labels."""
    labels = inputs.get("shift_labels", inputs.get("labels"))
    if not isinstance(labels, torch.Tensor):
        return None
    if inputs.get("shift_labels") is None and _shifts_labels(model):
        labels = labels[..., 1:]
    return labels.ne(IGNORED_LABEL).sum() / torch.as_tensor(items).clamp(min=1)


def honours_num_items(model: nn.Module) -> bool:
    """Whether the head divides by `num_items_in_batch`.

    Some heads swallow it in ``**kwargs`` and take the mean all the same (BERT, RoBERTa and others in transformers 5):
    their loss comes out larger by the accumulation steps under Trainer. The auxiliary loss must follow the task loss,
    so that their ratio stays what was asked for. Heads that honour it call ``self.loss_function``.
    """
    code = getattr(inspect.unwrap(type(model).forward), "__code__", None)
    return code is None or "loss_function" in code.co_names


def _shifts_labels(model: nn.Module) -> bool:
    try:
        from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss
    except ImportError:
        return False
    encoder_decoder = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    loss_type: Any = getattr(model, "loss_type", None)
    return LOSS_MAPPING.get(loss_type) is ForCausalLMLoss and not encoder_decoder
