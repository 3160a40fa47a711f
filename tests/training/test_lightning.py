"""Lightning with an adapted model: the step is that of the total loss (6), with either way to accumulate."""

import warnings
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("pytorch_lightning")

import pytorch_lightning as lightning
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

import fvae_kernels as fk
from tests.helpers.gradients import adapted, checkpoint_activations
from tests.helpers.total_loss import by_hand, fix_noise
from tests.helpers.trainer_tools import SIZE, STEPS, Rows, collate, params


class Module(lightning.LightningModule):  # type: ignore[misc]
    """The model's own loss, or one of this module, from the model's logits."""

    def __init__(self, model: nn.Module, own: bool, manual: bool) -> None:
        super().__init__()
        self.model, self.own, self.automatic_optimization = model, own, not manual

    def training_step(self, batch: dict[str, Tensor], index: int) -> Tensor | None:
        loss = fk.attach_aux_loss(self, task_loss(self.model, batch)) if self.own else self.model(**batch).loss
        if self.automatic_optimization:
            return loss
        self.manual_backward(loss / STEPS)
        if (index + 1) % STEPS == 0:
            self.optimizers().step()
        return None

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(params(self).values(), lr=1.0)


def task_loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return F.cross_entropy(model(**{k: v for k, v in batch.items() if k != "labels"}).logits, batch["labels"])


@pytest.mark.compat("Trainers", "Lightning: automatic and manual accumulation")
@pytest.mark.parametrize(
    ("own", "manual", "checkpointing"), [(False, False, True), (False, True, False), (True, False, False)]
)
def test_step(own: bool, manual: bool, checkpointing: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fix_noise(monkeypatch)
    model, rows = adapted("bert"), Rows("bert", torch.float64)
    total = torch.zeros((), dtype=torch.float64)
    for batch in rows.batches:
        with by_hand(model) as terms:
            task = task_loss(model, batch)
        total = total + (task + torch.stack(terms).sum()) / STEPS
    expected = torch.autograd.grad(total, list(params(model).values()))
    before = {n: p.detach().clone() for n, p in params(model).items()}
    if checkpointing:
        checkpoint_activations(model, reentrant=False)
    options: dict[str, Any] = {} if manual else {"accumulate_grad_batches": STEPS}
    quiet = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    trainer = lightning.Trainer(
        accelerator="cpu",
        max_epochs=1,
        precision="64-true",
        default_root_dir=tmp_path,
        **options,
        **dict.fromkeys(quiet, False),
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit(Module(model, own, manual), DataLoader(rows, batch_size=SIZE, collate_fn=collate))
    assert trainer.global_step == 1
    for (name, p), gradient in zip(params(model).items(), expected, strict=True):
        assert gradient.norm() > 0, name
        assert (before[name] - p - gradient).norm() <= 1e-9 * gradient.norm(), name
