"""Trainers that compute the task loss outside the model: TRL's, label smoothing, a loss function of your own.

The hooks on a model turn the loss that it returns into the total loss (6). If a trainer drops that loss and computes
another, the auxiliary loss must be added to that one, with the weight of a micro-batch in the trainer's accumulation.
"""

import functools
import inspect
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .attach import attached
from .aux_loss import aux_loss_layers
from .hooks import external_loss, hooks_of
from .token_share import ITEMS, labelled_share


def prepare_trainer(trainer: Any) -> Any:
    """Make this trainer train on the total loss (6), whatever its `compute_loss` does. In place.

        trainer = fk.prepare_trainer(SFTTrainer(model, args, train_dataset=data, peft_config=fk.FVAELoraConfig(...)))
        trainer.train()

    The loss that `compute_loss` returns is taken as the task loss. The auxiliary loss of its forwards with a graph is
    added, with the weight of this micro-batch in its optimizer step: 1 if the trainer divides by the accumulation
    steps, else the micro-batch's share of the step's labelled tokens, or 1 / steps without labels. The trainer knows
    which case holds; a `compute_loss` of your own says so with `loss_is_scaled_for_ga`, as transformers asks for. If
    the model computes the loss, nothing changes: it was right before.

    Args:
        trainer: a `transformers.Trainer` or a subclass, for example TRL's.

    Returns:
        The trainer.

    Raises:
        TypeError: for an object that is no such trainer.
    """
    check_trainer(trainer, "in a loop of your own use fvae_kernels.attach_aux_loss(model, loss)")
    own = trainer.compute_loss
    if not (isinstance(own, functools.partial) and own.func is _total_loss):
        trainer.compute_loss = functools.partial(_total_loss, trainer, own)
    return trainer


def check_trainer(trainer: Any, advice: str) -> None:
    """Raise a TypeError unless the object has the attributes of a transformers.Trainer."""
    if not all(hasattr(trainer, name) for name in ("compute_loss", "accelerator", "args", "model")):
        raise TypeError(f"expected a transformers.Trainer or a subclass of it, got {type(trainer).__name__}; {advice}")


class FVAETrainerMixin:
    """`prepare_trainer` as a base class: ``class MyTrainer(fk.FVAETrainerMixin, SFTTrainer): ...``.

    Raises:
        TypeError: if it does not come before the trainer among the bases: it would have no effect.
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        before = cls.__mro__[: cls.__mro__.index(FVAETrainerMixin)]
        trainer = next((c for c in before if hasattr(c, "compute_loss") and not issubclass(c, FVAETrainerMixin)), None)
        if trainer is not None:
            raise TypeError(
                f"FVAETrainerMixin has no effect behind {trainer.__name__}: write "
                f"class {cls.__name__}(FVAETrainerMixin, {trainer.__name__})"
            )

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        prepare_trainer(self)


def _total_loss(
    trainer: Any,
    own: Callable[..., Any],
    model: nn.Module,
    inputs: Any,
    return_outputs: bool = False,
    num_items_in_batch: Tensor | int | None = None,
    **options: Any,
) -> Any:
    """Call `own`, the trainer's compute_loss, and add the auxiliary loss to the result."""
    compute = functools.partial(own, return_outputs=return_outputs, num_items_in_batch=num_items_in_batch, **options)
    if not (torch.is_grad_enabled() and aux_loss_layers(model)) or _model_computes_loss(trainer, own):
        return compute(model, inputs)
    # now: compute_loss may take the labels out of the inputs
    share = 1.0 if _is_a_mean(trainer, own) else _share(trainer, inputs, num_items_in_batch)
    with external_loss(model):
        result = compute(model, inputs)
    loss = result[0] if return_outputs else result
    total = attached(model, loss, share)
    if total is None:
        return result  # no adapter took part: the sum over layers is empty
    for hooks in hooks_of(model):
        if hooks.meter is not None:
            hooks.meter.add(loss, total)
            break
    return (total, *result[1:]) if return_outputs else total


def _model_computes_loss(trainer: Any, own: Callable[..., Any]) -> bool:
    """True if this is transformers' own compute_loss and it returns the loss that the model computed."""
    return _is_stock(trainer, own) and trainer.label_smoother is None


def _is_a_mean(trainer: Any, own: Callable[..., Any]) -> bool:
    """True for the label smoothing of transformers 4, a mean however many items the step has."""
    smoother = trainer.label_smoother if _is_stock(trainer, own) else None
    return smoother is not None and ITEMS not in inspect.signature(type(smoother).__call__).parameters


def _is_stock(trainer: Any, own: Callable[..., Any]) -> bool:
    """True if this is transformers' own compute_loss without a loss function of the user's."""
    stock = isinstance(own, types.MethodType) and own.__module__ == "transformers.trainer"
    return stock and trainer.compute_loss_func is None


def _share(trainer: Any, inputs: Any, items: Tensor | int | None) -> Tensor | float:
    """The weight of this micro-batch's auxiliary loss relative to the loss that compute_loss returns."""
    scaled = getattr(trainer, "loss_is_scaled_for_ga", None)
    if scaled is None:  # the rule of Trainer.training_step
        scaled = (trainer.model_accepts_loss_kwargs and items is not None) or trainer.compute_loss_func is not None
    if not scaled:  # the loss is a mean, and Trainer divides it by the steps
        return 1.0
    base = trainer.accelerator.unwrap_model(trainer.model)
    base = base.get_base_model() if hasattr(base, "get_base_model") else base
    share = None if items is None else labelled_share(base, inputs, items)
    if share is None:
        return 1.0 / getattr(trainer, "current_gradient_accumulation_steps", trainer.args.gradient_accumulation_steps)
    if trainer.args.average_tokens_across_devices:  # items are those of all processes, and DDP averages the gradients
        share = share * trainer.accelerator.num_processes
    return share
