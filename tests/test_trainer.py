"""transformers.Trainer with gradient accumulation: one optimizer step is the step of the total loss (6).

SGD with learning rate 1 writes the gradient into the parameters, where it can be read off.
"""

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from tiny_models import TARGETS, batch, build
from torch import Tensor, nn
from torch.utils.data import Dataset, SequentialSampler
from total_loss import by_hand, fix_noise
from transformers import Trainer, TrainingArguments

import fvae_kernels as fk

STEPS, SIZE = 4, 2
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


@pytest.fixture(autouse=True)
def fixed_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    fix_noise(monkeypatch)


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


def collate(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {key: torch.stack([row[key] for row in rows]) for key in rows[0]}


def adapted(kind: str, task: str | None) -> nn.Module:
    torch.manual_seed(0)
    config = fk.FVAELoraConfig(
        task_type=task,
        r=3,
        target_modules=TARGETS[kind],
        init_weights=False,
        encoder_hidden=(5,),
        decoder_hidden=(7,),
        dropout=0.0,
        loss_weight=0.01,
    )
    return peft.get_peft_model(build(kind).double(), config, autocast_adapter_dtype=False).train()


def params(model: nn.Module) -> dict[str, Tensor]:
    return {n: p for n, p in model.named_parameters() if p.requires_grad}


def terms_of(model: nn.Module, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Task loss of the model's own forward (a mean), and the auxiliary loss with its graph."""
    with by_hand(model) as terms:
        task = model(**inputs).loss
    return task, torch.stack(terms).sum()


def train_one_step(model: nn.Module, rows: Rows, folder: Path, **arguments: Any) -> dict[str, Tensor]:
    """What one optimizer step subtracted from each parameter."""
    before = {n: p.detach().clone() for n, p in params(model).items()}
    args = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=SIZE,
        gradient_accumulation_steps=STEPS,
        max_steps=1,
        optim="sgd",
        learning_rate=1.0,
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
        **arguments,
    )
    InOrder(model=model, args=args, train_dataset=rows, data_collator=collate).train()
    return {n: before[n] - p.detach() for n, p in params(model).items()}


def assert_step(got: dict[str, Tensor], model: nn.Module, objective: Tensor, rtol: float) -> None:
    expected = torch.autograd.grad(objective, list(params(model).values()), allow_unused=True)
    for (name, step), gradient in zip(got.items(), expected, strict=True):
        assert gradient is not None, name
        assert gradient.norm() > 0, name
        error = float((step - gradient).norm() / gradient.norm())
        assert error <= rtol, f"{name}: relative error {error:.1e}"


@pytest.mark.parametrize("checkpointing", [None, True, False], ids=["plain", "reentrant", "non-reentrant"])
def test_causal_model_with_num_items_in_batch(tmp_path: Path, checkpointing: bool | None) -> None:
    """The task loss is sum / tokens of the step; the auxiliary loss of a micro-batch has its share of the tokens."""
    model, rows = adapted("llama", "CAUSAL_LM"), Rows("llama", torch.float64)
    counts = [int(b["labels"][:, 1:].ne(-100).sum()) for b in rows.batches]
    assert len(set(counts)) > 1, "equal shares would prove nothing"
    pairs = [terms_of(model, b) for b in rows.batches]
    objective = sum((n / sum(counts)) * (task + aux) for n, (task, aux) in zip(counts, pairs, strict=True))
    reference = adapted("llama", "CAUSAL_LM")
    arguments = (
        {}
        if checkpointing is None
        else {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": checkpointing}}
    )
    got = train_one_step(reference, rows, tmp_path, **arguments)
    assert_step(got, model, objective, rtol=1e-6)  # type: ignore[arg-type]


def test_model_that_takes_the_mean(tmp_path: Path) -> None:
    """BERT's head takes the mean and ignores num_items_in_batch: aux has the factor that Trainer gives the task."""
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
        args = TrainingArguments(
            output_dir=str(folder), per_device_train_batch_size=SIZE, max_steps=4, save_steps=2, report_to=[],
            use_cpu=True, disable_tqdm=True, learning_rate=1e-2,
        )  # fmt: skip
        trainer = InOrder(model=model, args=args, train_dataset=rows, data_collator=collate)
        trainer.train(resume_from_checkpoint=str(folder / "checkpoint-2") if resume else None)
        return {n: p.detach().clone() for n, p in params(model).items()}

    whole = run(tmp_path)
    resumed = run(tmp_path, resume=True)
    for name, value in whole.items():
        torch.testing.assert_close(resumed[name], value, rtol=0, atol=0, msg=name)
