"""transformers.Trainer on tiny models, for the tests of trainers.

SGD with learning rate 1 subtracts the gradient from the parameters, so the step is the gradient.
"""

from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.utils.data import Dataset, SequentialSampler
from transformers import Trainer, TrainingArguments

from tests.helpers import gradients
from tests.helpers.tiny_models import batch
from tests.helpers.total_loss import by_hand

STEPS, SIZE = 4, 2
OLD = int(transformers.__version__.partition(".")[0]) < 5


class Rows(Dataset):
    def __init__(self, kind: str, dtype: torch.dtype) -> None:
        batches = [batch(kind, SIZE, seed=k, dtype=dtype) for k in range(STEPS)]
        self.rows = [{key: value[i] for key, value in b.items()} for b in batches for i in range(SIZE)]
        self.batches = batches

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        return self.rows[i]


class InOrder(Trainer):
    def _get_train_sampler(self, *args: Any) -> SequentialSampler:
        return SequentialSampler(self.train_dataset)


def counts(kind: str, rows: Rows) -> list[int]:
    """Labelled tokens (or labels, without tokens) of each micro-batch that have a prediction."""
    labels = [b["labels"][:, 1:] if kind == "llama" else b["labels"] for b in rows.batches]
    return [int(x.ne(-100).sum()) for x in labels]


def items_of(kind: str, rows: Rows) -> int:
    """The number of items that Trainer counts in a step: transformers 4 counts the first token of a sequence too."""
    if kind == "llama" and not OLD:
        return sum(counts(kind, rows))
    return sum(int(b["labels"].ne(-100).sum()) for b in rows.batches)


def as_logged(loss: Tensor) -> float:
    """A loss as it is in Trainer's log; transformers 4 rounds it."""
    return round(loss.item(), 4) if OLD else loss.item()


def collate(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {key: torch.stack([row[key] for row in rows]) for key in rows[0]}


def adapted(kind: str, task: str | None, dtype: torch.dtype = torch.float64, **options: Any) -> nn.Module:
    """`gradients.adapted` with the task in the second place."""
    return gradients.adapted(kind, dtype, task, **options)


def params(model: nn.Module) -> dict[str, Tensor]:
    return {n: p for n, p in model.named_parameters() if p.requires_grad}


def terms_of(model: nn.Module, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Task loss of the model's own forward (a mean), and the auxiliary loss with its graph."""
    with by_hand(model) as terms:
        task = model(**inputs).loss
    return task, torch.stack(terms).sum()


QUIET: dict[str, Any] = {
    "report_to": [],
    "use_cpu": True,
    "disable_tqdm": True,
    "per_device_train_batch_size": SIZE,
    "per_device_eval_batch_size": SIZE,
}
ONE_STEP: dict[str, Any] = {
    **QUIET,
    "gradient_accumulation_steps": STEPS,
    "max_steps": 1,
    "optim": "sgd",
    "learning_rate": 1.0,
    "lr_scheduler_type": "constant",
    "max_grad_norm": 0.0,
    "save_strategy": "no",
    "logging_steps": 1,
}


def trainer_of(model: nn.Module, rows: Dataset, cls: type = InOrder, **options: Any) -> Trainer:
    """A trainer that takes the rows in order. Options are those of Trainer and of TrainingArguments."""
    own = {name: options.pop(name) for name in ("compute_loss_func", "callbacks", "eval_dataset") if name in options}
    if OLD and options.get("gradient_checkpointing"):
        model.enable_input_require_grads()  # type: ignore[operator]  # transformers 5 does so itself
    return cls(model=model, args=TrainingArguments(**options), train_dataset=rows, data_collator=collate, **own)


def step_of(trainer: Trainer) -> dict[str, Tensor]:
    """The change of each parameter in one optimizer step, negated."""
    before = {n: p.detach().clone() for n, p in params(trainer.model).items()}
    trainer.train()
    return {n: before[n] - p.detach() for n, p in params(trainer.model).items()}


def train_one_step(model: nn.Module, rows: Rows, folder: Path, **options: Any) -> dict[str, Tensor]:
    """The step of a plain Trainer."""
    return step_of(trainer_of(model, rows, output_dir=str(folder), **ONE_STEP, **options))


def assert_step(got: dict[str, Tensor], model: nn.Module, objective: Tensor, rtol: float) -> None:
    expected = torch.autograd.grad(objective, list(params(model).values()), allow_unused=True)
    for (name, step), gradient in zip(got.items(), expected, strict=True):
        assert gradient is not None, name
        assert gradient.norm() > 0, name
        error = float((step - gradient).norm() / gradient.norm())
        assert error <= rtol, f"{name}: relative error {error:.1e}"


def shuffled_run(folder: Path, **options: Any) -> Trainer:
    """A realistic run: shuffled data, dropout, and noise from torch's generator."""
    options = {"save_steps": 2, "logging_steps": 1, "learning_rate": 1e-2, **QUIET, **options}
    model = adapted("bert", "SEQ_CLS", torch.float32, dropout=0.2)
    return trainer_of(model, Rows("bert", torch.float32), Trainer, output_dir=str(folder), **options)
