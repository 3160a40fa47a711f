"""How a method adapts a task's model: by a PEFT config, or by training parameters of the model itself."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import KW_ONLY, dataclass, field
from typing import Any

import peft
import torch
from peft.optimizers import create_loraplus_optimizer
from torch import nn

import fvae_kernels as fk
from fvae_kernels.training.aux_loss import AuxLossLayer

from .search import Search
from .tasks import Task

WEIGHT_DECAY = 0.01  # AdamW's default
HEADS = ("classifier", "score")  # what PEFT trains beside the adapters of a sequence classifier


class DoesNotApply(Exception):  # noqa: N818 (a finding, not an error)
    """A method has no place in a task's model; the text says why."""


@dataclass(frozen=True)
class Method:
    """How a task's model is adapted, and what happens to it while it trains."""

    title: str
    _: KW_ONLY
    search: Search = field(default_factory=Search)
    trim_to: int | None = None  # rank to which the adapter is trimmed after half of the steps

    def adapt(self, model: nn.Module, task: Task, steps: int = 0, weight: float | None = None) -> Any:
        """`model` in training mode for so many `steps`, and only what the method trains requires a gradient. In place.

        Args:
            model: the task's.
            task: says where adapters are placed.
            steps: of the training to come; for methods with a schedule.
            weight: the method's own weight (`search.option`); None is its default.

        Raises:
            DoesNotApply: if the method has no place in this model.
        """
        raise NotImplementedError

    def optimizer(self, model: nn.Module, lr: float, weight: float | None = None) -> torch.optim.Optimizer:
        """AdamW for what is trained."""
        return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)


@dataclass(frozen=True)
class Full(Method):
    """Every parameter of the task's model is trained."""

    def adapt(self, model: nn.Module, task: Task, steps: int = 0, weight: float | None = None) -> nn.Module:
        """See `Method.adapt`."""
        return model.requires_grad_(True).train()


@dataclass(frozen=True)
class Head(Method):
    """The new head alone is trained."""

    def adapt(self, model: nn.Module, task: Task, steps: int = 0, weight: float | None = None) -> nn.Module:
        """See `Method.adapt`."""
        names = tuple(task.placement.options.get("modules_to_save") or HEADS)
        head = [p for name, p in model.named_parameters() if not set(names).isdisjoint(name.split("."))]
        if not task.classes:
            raise DoesNotApply("a language model has no new head")
        if not head:
            raise DoesNotApply(f"this model has no module named {' or '.join(names)}")
        model.requires_grad_(False)
        for parameter in head:
            parameter.requires_grad_(True)
        return model.train()


@dataclass(frozen=True)
class Adapter(Method):
    """A method of PEFT, or in PEFT.

    Args:
        config: makes its config from the task's placement and `options`.
        options: of that config.
        exchange: share of the examples whose z_2 is exchanged for another's, see `exchange_second`.
    """

    config: Callable[..., peft.PeftConfig]
    options: Mapping[str, Any] = field(default_factory=dict)
    _: KW_ONLY
    exchange: float = 0.0

    def adapt(self, model: nn.Module, task: Task, steps: int = 0, weight: float | None = None) -> Any:
        """See `Method.adapt`."""
        own = {} if weight is None or self.search.option is None else {self.search.option: weight}
        config = self.config(**self.placement(model, task), **{**self.options, **own})
        if isinstance(config, peft.AdaLoraConfig):  # a tenth of the steps at the first rank, the last half at the last
            config.total_step, config.tinit, config.tfinal = max(steps, 3), max(steps, 3) // 10, max(steps, 3) // 2
        adapted = peft.get_peft_model(model, config).train()
        if self.exchange:
            exchange_second(adapted, self.exchange)
        return adapted

    def placement(self, model: nn.Module, task: Task) -> dict[str, Any]:
        """Options of the config that say where it goes."""
        found = targets(model, task)
        return {**({} if found is None else {"target_modules": found}), **task.placement.options}


@dataclass(frozen=True)
class LoraPlus(Adapter):
    """LoRA+ (arXiv 2402.12354): a higher learning rate for B, by PEFT's own optimizer."""

    ratio: float = 16.0

    def adapt(self, model: nn.Module, task: Task, steps: int = 0, weight: float | None = None) -> Any:
        """See `Method.adapt`; the weight is the optimizer's."""
        return super().adapt(model, task, steps)

    def optimizer(self, model: Any, lr: float, weight: float | None = None) -> torch.optim.Optimizer:
        """AdamW with `lr` for A, and `ratio` or `weight` times as much for B."""
        ratio = self.ratio if weight is None else weight
        return create_loraplus_optimizer(
            model, torch.optim.AdamW, lr=lr, loraplus_lr_ratio=ratio, loraplus_weight_decay=WEIGHT_DECAY
        )


@dataclass(frozen=True)
class Prompt(Adapter):
    """Trained vectors before the embedded tokens."""

    def placement(self, model: nn.Module, task: Task) -> dict[str, Any]:
        """See `Adapter.placement`."""
        options = {name: value for name, value in task.placement.options.items() if name != "modules_to_save"}
        if "task_type" not in options or not hasattr(model, "get_input_embeddings"):
            raise DoesNotApply("a prompt needs a model of transformers that embeds tokens, and its task_type")
        return options


def targets(model: nn.Module, task: Task) -> list[str] | None:
    """The task's targets that this model has. Names differ between versions of transformers. None: PEFT's own choice.

    Raises:
        ValueError: if it has none of them.
    """
    wanted = task.placement.target_modules
    if wanted is None or isinstance(wanted, str):
        return wanted
    linear = {name.rpartition(".")[2] for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    present = {name.rpartition(".")[2] for name, _ in model.named_modules()}
    found = [name for name in wanted if name in present or "." in name]
    if not found:
        raise ValueError(f"task {task.name}: the model has no module {list(wanted)}; it has {sorted(linear)}")
    return found


def exchange_second(model: nn.Module, share: float) -> None:
    """In training, some inputs of each adapted layer get the z_2 of another example of their batch.

    What the decoder makes of an input's own z_2 is replaced by what it makes of the other's; all that the decoder does
    not reconstruct stays. So the label must be learned from what z_2 does not hold.
    """

    def exchanged(layer: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
        x, *rest = args
        if not layer.training or len(x) < 2:
            return args
        chosen = (torch.rand(len(x)) < share).reshape(-1, *[1] * (x.dim() - 1)).to(x.device)
        other = x[torch.randperm(len(x)).to(x.device)]
        before, after = (fk.generate_features(layer, x, z2_of, sample=False) for z2_of in (x, other))
        return x + chosen * (after - before).to(x.dtype), *rest

    for module in fvae_layers(model):
        module.register_forward_pre_hook(exchanged)


def fvae_layers(model: nn.Module) -> Iterator[Any]:
    """The layers that hold an FVAE adapter."""
    yield from (module for module in model.modules() if isinstance(module, AuxLossLayer))
