"""FVAELoggingCallback: logs each adapted layer to the reports of a transformers.Trainer and to a file."""

import json
import math
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback
from transformers.integrations import get_reporting_integration_callbacks
from transformers.trainer_utils import IntervalStrategy

from ..diagnostics import collect_terms
from ..training.aux_loss import AuxLossLayer, aux_loss_layers
from ..training.hooks import hooks_of
from ..training.recompute import in_backward
from ..training.trainer import check_trainer
from .meter import LossMeter
from .observe import active_adapter, geometry
from .watch import Watch, has_settled

Values = dict[str, float]


class FVAELoggingCallback(TrainerCallback):
    """Logs every adapted layer at the steps where the trainer logs; costs nothing at other steps.

        trainer = Trainer(model=model, args=TrainingArguments(..., report_to="tensorboard"), train_dataset=data)
        trainer.add_callback(fk.FVAELoggingCallback(trainer, "runs/layers.jsonl"))

    Values of each layer are taken over the tokens of the step's last micro-batch. ``loss``, ``nll``, ``kl`` and
    ``gamma`` are those of the training forward (`collect_terms`). For the others both encoders run once more on the
    layer's input, without dropout, and `diagnostics` computes: ``Lambda``, ``Delta``, ``Gamma``, ``W2_squared`` and
    ``delta_bound`` of the two posteriors (`latent_geometry`); ``signal_to_noise`` of z_1; ``effective_rank`` and
    ``token_independent`` share of the update; ``active_units_z1`` and ``active_units_z2``. All in nats, except W2,
    ratios and counts.

    The two parts of the reported loss, ``task_loss`` and ``objective`` (over all micro-batches since the last log), are
    logged too, also in the trainer's own log.

    All values go to what `report_to` names (TensorBoard, Weights & Biases, ...) as ``fvae/<layer>/<value>``, and to a
    file with one JSON object a line: ``{"step", "epoch", "loss", ..., "layers": {<layer>: {<value>: number}}}``. Its
    first entries are the trainer's own log. NaN and infinity become null. Lines are appended: after a resume, lost
    steps are logged again, and the last line of a step counts.

    After the warm-up it warns, once each and with advice, if the noise of z_1 drowns its mean, if the update has
    collapsed to one direction, or if the task loss of a classifier is still at chance.

    Compiled layers cannot be observed and are left out. If another callback asks for a log at a step that the
    arguments do not name, the line holds only the terms.

    Args:
        trainer: the trainer that it is added to.
        path: the file; a missing folder is created. None: reports only.

    Raises:
        TypeError: for an object that is no trainer.
        ValueError: if its model has no FVAE layer.
    """

    def __init__(self, trainer: Any, path: str | os.PathLike[str] | None = None) -> None:
        check_trainer(trainer, "pass the trainer first: FVAELoggingCallback(trainer, path)")
        if not aux_loss_layers(trainer.model):
            raise ValueError(
                f"{type(trainer.model).__name__} has no FVAE layer to log: adapt the model before the trainer is made, "
                "or pass the trainer a peft_config if it takes one"
            )
        self.trainer = trainer
        self.path = None if path is None else Path(path)
        self.armed = False
        self.seen: dict[str, dict[str, Tensor | float]] = {}
        self.handles: list[Any] = []
        self.watch, self.meter = Watch(), LossMeter()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start to observe the layers."""
        self.on_train_end(args, state, control)
        if not state.is_world_process_zero:
            return
        adapters = [active_adapter(layer) for layer in self._layers().values()]
        self.watch = Watch(max((a.config.rank for a in adapters if a is not None), default=1))
        self.handles.append(self.trainer.model.register_forward_hook(self._watch_task, with_kwargs=True))
        self._meter(self.meter)
        for name, layer in self._layers().items():
            self.handles.append(layer.register_forward_pre_hook(self._watcher(name)))
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop to observe the layers."""
        for handle in self.handles:
            handle.remove()
        self._meter(None)
        self.handles, self.armed, self.seen = [], False, {}

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Observe this step if the trainer will log it."""
        self.armed = bool(self.handles) and will_log(args, state, kwargs.get("train_dataloader"))

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Report the values of the step that the trainer has just logged."""
        if logs is None or "loss" not in logs or not self.handles:  # an evaluation, or the summary at the end
            return
        parts = self.meter.split(float(logs["loss"]))
        for log in (logs, *state.log_history[-1:]):
            log.update(parts)
        layers = self._take()
        self.watch.look(layers, has_settled(args, state))
        flat = {f"fvae/{layer}/{name}": value for layer, values in layers.items() for name, value in values.items()}
        flat |= {f"fvae/{name}": value for name, value in parts.items()}
        reporters = tuple(get_reporting_integration_callbacks(args.report_to))
        for callback in self.trainer.callback_handler.callbacks:
            if isinstance(callback, reporters):
                callback.on_log(args, state, control, logs=dict(flat), **kwargs)
        if self.path is not None:
            row = {"step": state.global_step, "epoch": state.epoch, **logs, "layers": layers}
            with self.path.open("a") as file:
                file.write(json.dumps(_finite(row), allow_nan=False) + "\n")

    def _meter(self, meter: LossMeter | None) -> None:
        for hooks in hooks_of(self.trainer.model):
            hooks.meter = meter

    def _layers(self) -> dict[str, Any]:
        modules = self.trainer.model.named_modules()
        return {name: module for name, module in modules if isinstance(module, AuxLossLayer)}

    def _watch_task(self, model: Any, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        if self.armed and model.training and not torch.compiler.is_compiling():
            self.watch.note_task(output, kwargs.get("labels"))

    def _watcher(self, name: str) -> Any:
        def watch(layer: Any, args: tuple[Tensor, ...]) -> None:
            if not torch.compiler.is_compiling() and self.armed and layer.training and not in_backward():
                adapter = active_adapter(layer)
                if adapter is not None:
                    self.seen[name] = geometry(adapter, args[0], layer.token_mask(args[0], adapter.config))

        return watch

    def _take(self) -> dict[str, Values]:
        seen, self.seen, self.armed = self.seen, {}, False
        terms = collect_terms(self.trainer.model)
        return {
            name: {**terms.get(name, {}), **{key: float(value) for key, value in seen.get(name, {}).items()}}
            for name in self._layers()
            if name in terms or name in seen
        }


def will_log(args: Any, state: Any, data: Any) -> bool:
    """True if the trainer's arguments say that it will log the step that begins."""
    step = state.global_step + 1
    if step == 1 and args.logging_first_step:
        return True
    if args.logging_strategy == IntervalStrategy.STEPS:
        return bool(step % state.logging_steps == 0)
    if args.logging_strategy != IntervalStrategy.EPOCH or step == state.max_steps:
        return bool(args.logging_strategy == IntervalStrategy.EPOCH)
    try:
        steps = -(-len(data) // args.gradient_accumulation_steps)
    except TypeError:  # data of unknown length: any step may end the epoch
        return True
    return bool(step % steps == 0)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(entry) for key, entry in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value
