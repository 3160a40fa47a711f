"""Trainers that compute the task loss outside the model: with `prepare_trainer` a step uses the total loss (6).

Each case computes its micro-batches' task losses by hand, as the trainer does, and adds the layers' terms with the
weight of the micro-batch in the step.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.trainer_pt_utils import LabelSmoother

import fvae_kernels as fk
from fvae_kernels.training import warn
from tests.helpers.tiny_models import batch
from tests.helpers.total_loss import by_hand
from tests.helpers.trainer_tools import (
    OLD,
    ONE_STEP,
    QUIET,
    STEPS,
    InOrder,
    Rows,
    adapted,
    as_logged,
    assert_step,
    counts,
    items_of,
    params,
    step_of,
    terms_of,
    trainer_of,
)

pytestmark = [
    pytest.mark.usefixtures("fixed_noise"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

TASKS = {"llama": "CAUSAL_LM", "bert": "SEQ_CLS", "vit": None}
Criterion = Callable[[Any, dict[str, Tensor], int], Tensor]  # outputs, inputs, items of the step -> task loss
# transformers' causal LM losses are float32, and so is their gradient
RTOL = {"llama": 1e-6, "bert": 1e-9, "vit": 1e-9}


@pytest.fixture(autouse=True)
def no_unprobed_term(monkeypatch: pytest.MonkeyPatch) -> None:
    """No term may enter the gradient with weight 1, as unattached terms do."""

    def refuse() -> None:
        raise AssertionError("a term entered the gradient without a weight")

    monkeypatch.setattr(warn, "unprobed", refuse)


def objective(kind: str, rows: Rows, task: Criterion, shared: bool) -> tuple[nn.Module, Tensor]:
    """Total loss of the step: task losses that are shares or means, and terms with the same weight."""
    model, items = adapted(kind, TASKS[kind]), items_of(kind, rows)
    total = torch.zeros((), dtype=torch.float64)
    for inputs, n in zip(rows.batches, counts(kind, rows), strict=True):
        with by_hand(model) as terms:
            outputs = model(**{k: v for k, v in inputs.items() if k != "labels"})
        loss, aux = task(outputs, inputs, items), torch.stack(terms).sum()
        total = total + (loss + n / items * aux if shared else (loss + aux) / STEPS)
    return model, total


def smoothed(kind: str, with_items: bool) -> Criterion:
    def loss(outputs: Any, inputs: dict[str, Tensor], items: int) -> Tensor:
        smooth = LabelSmoother(epsilon=0.1)
        number = {} if OLD else {"num_items_in_batch": items * with_items or None}
        return smooth(outputs, inputs["labels"], shift_labels=kind == "llama", **number)

    return loss


def cross_entropy(outputs: Any, inputs: dict[str, Tensor], items: int, reduction: str = "sum") -> Tensor:
    logits, labels = outputs.logits, inputs["labels"]
    if logits.dim() == 3:
        logits, labels = logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    loss = nn.functional.cross_entropy(logits, labels, reduction=reduction)
    return loss / items if reduction == "sum" else loss


def mean_cross_entropy(outputs: Any, inputs: dict[str, Tensor], items: int) -> Tensor:
    return cross_entropy(outputs, inputs, items, "mean")


@pytest.mark.parametrize(("kind", "items"), [("llama", True), ("llama", False), ("bert", True)])
def test_label_smoothing(kind: str, items: bool, tmp_path: Path) -> None:
    """With num_items_in_batch the losses are shares of the step; without, means that the trainer divides.

    In transformers 4 they are means with it too, which the trainer does not divide.
    """
    if OLD and kind == "bert":
        pytest.skip("the BERT of transformers 4 takes no num_items_in_batch")
    rows = Rows(kind, torch.float64)
    trainer = trainer_of(
        adapted(kind, TASKS[kind]), rows, output_dir=str(tmp_path), **ONE_STEP, label_smoothing_factor=0.1
    )
    trainer.model_accepts_loss_kwargs = items
    got = step_of(fk.prepare_trainer(trainer))
    model, total = objective(kind, rows, smoothed(kind, items), items and not OLD)
    total = STEPS * total if OLD and items else total
    assert_step(got, model, total, RTOL[kind])
    logged = trainer.state.log_history[0]["loss"]
    assert logged == pytest.approx(as_logged(total), rel=1e-6), "the reported loss is not the total loss"


@pytest.mark.parametrize("kind", ["llama", "vit"])
def test_compute_loss_func(kind: str, tmp_path: Path) -> None:
    rows = Rows(kind, torch.float64)

    def loss(outputs: Any, labels: Tensor, num_items_in_batch: Tensor) -> Tensor:
        return cross_entropy(outputs, {"labels": labels}, int(num_items_in_batch))

    trainer = trainer_of(adapted(kind, TASKS[kind]), rows, output_dir=str(tmp_path), **ONE_STEP, compute_loss_func=loss)
    model, total = objective(kind, rows, cross_entropy, True)
    assert_step(step_of(fk.prepare_trainer(trainer)), model, total, RTOL[kind])


class MeanTrainer(InOrder):
    """Its own loss, a mean, declared as transformers asks for. A forward for a metric follows."""

    loss_is_scaled_for_ga = False

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        outputs = model(**inputs)
        with torch.no_grad():
            model(**inputs)
        loss = mean_cross_entropy(outputs, inputs, 0)
        return (loss, outputs) if return_outputs else loss


class MixedTrainer(fk.FVAETrainerMixin, MeanTrainer):
    pass


class OwnTrainer(fk.FVAETrainerMixin, InOrder):
    """The mixin also reaches a compute_loss in the class itself."""

    loss_is_scaled_for_ga = False
    compute_loss = MeanTrainer.compute_loss


@pytest.mark.compat("Trainers", "a `compute_loss` of your own, label smoothing: `prepare_trainer`")
@pytest.mark.parametrize("cls", [MixedTrainer, OwnTrainer])
@pytest.mark.parametrize("checkpointing", [None, True, False], ids=["plain", "reentrant", "non-reentrant"])
def test_own_compute_loss(cls: type, checkpointing: bool | None, tmp_path: Path) -> None:
    rows = Rows("llama", torch.float64)
    options = dict(ONE_STEP)
    if checkpointing is not None:
        options |= {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": checkpointing}}
    trainer = trainer_of(adapted("llama", "CAUSAL_LM"), rows, cls, output_dir=str(tmp_path), **options)
    if OLD:  # what transformers 4 reads in place of loss_is_scaled_for_ga
        trainer.model_accepts_loss_kwargs = False
    model, total = objective("llama", rows, mean_cross_entropy, False)
    got = step_of(trainer)
    assert_step(got, model, total, RTOL["llama"])
    logged = trainer.state.log_history[0]["loss"]
    assert logged == pytest.approx(as_logged(total), rel=1e-6), "the forward for a metric must not count"


class SharedTrainer(fk.FVAETrainerMixin, InOrder):
    """Its own loss, declared as a share of the whole step. No tokens are counted (as in reinforcement learning)."""

    loss_is_scaled_for_ga = True

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        assert num_items_in_batch is None
        return mean_cross_entropy(model(**inputs), inputs, 0) / self.current_gradient_accumulation_steps


@pytest.mark.skipif(OLD, reason="transformers 4 does not read loss_is_scaled_for_ga")
def test_own_compute_loss_that_is_a_share(tmp_path: Path) -> None:
    rows = Rows("llama", torch.float64)
    trainer = trainer_of(adapted("llama", "CAUSAL_LM"), rows, SharedTrainer, output_dir=str(tmp_path), **ONE_STEP)
    trainer.model_accepts_loss_kwargs = False
    model, total = objective("llama", rows, mean_cross_entropy, False)
    assert_step(step_of(trainer), model, total, RTOL["llama"])


@pytest.mark.parametrize("kind", ["llama", "vit"])
def test_a_loss_that_the_model_computed_counts_once(kind: str, tmp_path: Path) -> None:
    rows = Rows(kind, torch.float64)
    trainer = trainer_of(adapted(kind, TASKS[kind]), rows, output_dir=str(tmp_path), **ONE_STEP)
    got = step_of(fk.prepare_trainer(fk.prepare_trainer(trainer)))
    model, items = adapted(kind, TASKS[kind]), items_of(kind, rows)
    weights = [n / items if kind == "llama" else 1 / STEPS for n in counts(kind, rows)]
    pairs = [terms_of(model, b) for b in rows.batches]
    total = sum(w * (task + aux) for w, (task, aux) in zip(weights, pairs, strict=True))
    assert_step(got, model, total, RTOL[kind])  # type: ignore[arg-type]


class ScaledTrainer(InOrder):
    """Uses the model's loss of two forwards, multiplied."""

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        first = model(**inputs, num_items_in_batch=num_items_in_batch).loss
        return 2 * first + model(**inputs, num_items_in_batch=num_items_in_batch).loss


def test_a_loss_made_of_those_that_the_model_computed(tmp_path: Path) -> None:
    rows = Rows("llama", torch.float64)
    tokens, items = counts("llama", rows), items_of("llama", rows)
    trainer = trainer_of(adapted("llama", "CAUSAL_LM"), rows, ScaledTrainer, output_dir=str(tmp_path), **ONE_STEP)
    got = step_of(fk.prepare_trainer(trainer))
    model = adapted("llama", "CAUSAL_LM")
    pairs = [terms_of(model, b) for b in rows.batches]
    total = sum(n / items * (3 * task + 2 * aux) for n, (task, aux) in zip(tokens, pairs, strict=True))
    assert_step(got, model, total, RTOL["llama"])  # type: ignore[arg-type]


def test_grad_scaler_and_a_call_without_items(tmp_path: Path) -> None:
    inputs = batch("llama", dtype=torch.float64)
    trainer = trainer_of(
        adapted("llama", "CAUSAL_LM"), Rows("llama", torch.float64), MixedTrainer, output_dir=str(tmp_path)
    )
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale(trainer.compute_loss(trainer.model, inputs)).backward()
    model = adapted("llama", "CAUSAL_LM")
    task, aux = terms_of(model, inputs)
    got = {n: p.grad / 1024 for n, p in params(trainer.model).items()}
    assert_step(got, model, task + aux, RTOL["llama"])


def test_evaluation_gives_the_task_loss(tmp_path: Path) -> None:
    rows = Rows("llama", torch.float64)
    trainer = trainer_of(
        adapted("llama", "CAUSAL_LM"), rows, MixedTrainer, output_dir=str(tmp_path), eval_dataset=rows, **QUIET
    )
    model = adapted("llama", "CAUSAL_LM").eval()
    with torch.no_grad():
        losses = [float(mean_cross_entropy(model(**b), b, 0)) for b in rows.batches]
    assert trainer.evaluate()["eval_loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-6)


def test_what_cannot_work_is_refused() -> None:
    with pytest.raises(TypeError, match=r"expected a transformers\.Trainer"):
        fk.prepare_trainer(nn.Linear(2, 2))
    with pytest.raises(TypeError, match=r"write class Behind\(FVAETrainerMixin, InOrder\)"):
        type("Behind", (InOrder, fk.FVAETrainerMixin), {})
