"""transformers.Trainer with gradient accumulation: one optimizer step is the step of the total loss (6)."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.helpers.trainer_tools import (
    QUIET,
    STEPS,
    Rows,
    adapted,
    assert_step,
    counts,
    items_of,
    params,
    terms_of,
    train_one_step,
    trainer_of,
)

pytestmark = [
    pytest.mark.usefixtures("fixed_noise"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.compat("Trainers", "`transformers.Trainer`: accumulation, `num_items_in_batch`, checkpointing, resume"),
]


@pytest.mark.parametrize("checkpointing", [None, True, False], ids=["plain", "reentrant", "non-reentrant"])
def test_causal_model_with_num_items_in_batch(tmp_path: Path, checkpointing: bool | None) -> None:
    """The task loss is sum / tokens of the step; a micro-batch's auxiliary loss is weighted by its share of tokens."""
    model, rows = adapted("llama", "CAUSAL_LM"), Rows("llama", torch.float64)
    tokens, items = counts("llama", rows), items_of("llama", rows)
    assert len(set(tokens)) > 1, "equal shares would prove nothing"
    pairs = [terms_of(model, b) for b in rows.batches]
    objective = sum((n / items) * (task + aux) for n, (task, aux) in zip(tokens, pairs, strict=True))
    reference = adapted("llama", "CAUSAL_LM")
    arguments = (
        {}
        if checkpointing is None
        else {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": checkpointing}}
    )
    got = train_one_step(reference, rows, tmp_path, **arguments)
    assert_step(got, model, objective, rtol=1e-6)  # type: ignore[arg-type]


def test_model_that_takes_the_mean(tmp_path: Path) -> None:
    """BERT's head takes the mean and ignores num_items_in_batch: the auxiliary loss gets the task's factor."""
    model, rows = adapted("bert", "SEQ_CLS"), Rows("bert", torch.float64)
    pairs = [terms_of(model, b) for b in rows.batches]
    got = train_one_step(adapted("bert", "SEQ_CLS"), rows, tmp_path)
    task_alone = torch.autograd.grad(
        sum(task for task, _ in pairs),
        params(model)["base_model.model.classifier.modules_to_save.default.bias"],
        retain_graph=True,
    )[0]  # type: ignore[arg-type]
    step = got["base_model.model.classifier.modules_to_save.default.bias"]
    factor = float((step @ task_alone) / (task_alone @ task_alone))
    assert factor == pytest.approx(1 / STEPS, rel=1e-6) or factor == pytest.approx(1.0, rel=1e-6)
    assert_step(got, model, factor * sum(task + aux for task, aux in pairs), rtol=1e-6)


def test_vision_model_without_task_type(tmp_path: Path) -> None:
    model, rows = adapted("vit", None), Rows("vit", torch.float64)
    pairs = [terms_of(model, b) for b in rows.batches]
    objective = sum((task + aux) / STEPS for task, aux in pairs)
    got = train_one_step(adapted("vit", None), rows, tmp_path)
    assert_step(got, model, objective, rtol=1e-6)  # type: ignore[arg-type]


def test_checkpoint_resumes_to_the_same_adapter(tmp_path: Path) -> None:
    def run(folder: Path, resume: bool = False) -> dict[str, Tensor]:
        model, rows = adapted("bert", "SEQ_CLS"), Rows("bert", torch.float32)
        trainer = trainer_of(
            model, rows, output_dir=str(folder), max_steps=4, save_steps=2, learning_rate=1e-2, **QUIET
        )
        trainer.train(resume_from_checkpoint=str(folder / "checkpoint-2") if resume else None)
        return {n: p.detach().clone() for n, p in params(model).items()}

    whole = run(tmp_path)
    resumed = run(tmp_path, resume=True)
    for name, value in whole.items():
        torch.testing.assert_close(resumed[name], value, rtol=0, atol=0, msg=name)
