"""TRL's SFTTrainer and DPOTrainer with ``peft_config=FVAELoraConfig(...)``: the step is that of the total loss (6)."""

from pathlib import Path

import peft
import pytest
import torch

pytest.importorskip("trl")
pytest.importorskip("datasets")

import torch.nn.functional as F

import fvae_kernels as fk
from fvae_kernels.training import warn
from tests.helpers.tiny_models import build
from tests.helpers.total_loss import by_hand, fix_noise
from tests.helpers.trainer_tools import ONE_STEP, QUIET, STEPS, assert_step, params, step_of
from tests.helpers.trl_tools import DPO, RTOL, SFT, log_probs, trainer_of

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore:FVAE. the auxiliary loss entered:UserWarning"),
]


class MixedSFT(fk.FVAETrainerMixin, SFT):
    pass


@pytest.mark.compat("Trainers", "TRL's SFTTrainer with `peft_config`")
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("cls", [SFT, MixedSFT])
def test_sft_step(cls: type, checkpointing: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fix_noise(monkeypatch)
    untrained = trainer_of(cls, tmp_path, gradient_checkpointing=False, **ONE_STEP)
    model, batches = untrained.model.train(), list(untrained.get_train_dataloader())
    kept = [b["labels"][:, 1:] != -100 for b in batches]
    counts = [int(k.sum()) for k in kept]
    assert len(batches) == STEPS
    assert len(set(counts)) > 1
    total = torch.zeros((), dtype=torch.float64)
    for batch, keep, count in zip(batches, kept, counts, strict=True):
        with by_hand(model) as terms:
            task = -(log_probs(model, batch) * keep).sum() / sum(counts)
        total = total + task + count / sum(counts) * torch.stack(terms).sum()
    trainer = trainer_of(cls, tmp_path, gradient_checkpointing=checkpointing, **ONE_STEP)
    got = step_of(trainer)
    assert_step(got, model, total, RTOL)
    logged = next(entry["loss"] for entry in trainer.state.log_history if "loss" in entry)
    assert logged == pytest.approx(float(total.detach()), rel=1e-6)


@pytest.mark.compat("Trainers", "TRL's DPOTrainer")
@pytest.mark.parametrize("checkpointing", [False, True])
def test_dpo_step(checkpointing: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fix_noise(monkeypatch)
    untrained = trainer_of(DPO, tmp_path, gradient_checkpointing=False, **ONE_STEP)
    model, batches = untrained.model.train(), list(untrained.get_train_dataloader())
    total = torch.zeros((), dtype=torch.float64)
    for batch in batches:
        keep = batch["completion_mask"][:, 1:]
        with by_hand(model) as terms:
            policy = (log_probs(model, batch) * keep).sum(-1)
        with model.disable_adapter(), torch.no_grad():
            reference = (log_probs(model, batch) * keep).sum(-1)
        chosen, rejected = (policy - reference).chunk(2)
        task = -F.logsigmoid(untrained.args.beta * (chosen - rejected)).mean()
        total = total + (task + torch.stack(terms).sum()) / STEPS
    trainer = trainer_of(DPO, tmp_path, gradient_checkpointing=checkpointing, **ONE_STEP)
    got = step_of(trainer)
    assert_step(got, model, total, 1e-5)
    logged = next(entry["loss"] for entry in trainer.state.log_history if "loss" in entry)
    assert logged == pytest.approx(float(total.detach()), rel=1e-6)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_sft_trains_saves_and_loads(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = QUIET | {"max_steps": 12, "learning_rate": 3e-2, "logging_steps": 4}
    trainer = trainer_of(SFT, tmp_path, kind, **options)
    trainer.add_callback(fk.FVAELoggingCallback(trainer, tmp_path / "layers.jsonl"))
    before = {name: p.detach().clone() for name, p in params(trainer.model).items()}
    trainer.train()
    assert all(not torch.equal(p, before[name]) for name, p in params(trainer.model).items())
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    assert len((tmp_path / "layers.jsonl").read_text().splitlines()) == 3
    trainer.save_model(str(tmp_path / "adapter"))
    fresh = peft.PeftModel.from_pretrained(build(kind).double(), tmp_path / "adapter", autocast_adapter_dtype=False)
    ids = torch.tensor([[3, 8, 13, 18]])
    with torch.no_grad():
        expected = trainer.model.eval()(input_ids=ids).logits
        torch.testing.assert_close(fresh.eval()(input_ids=ids).logits, expected, rtol=0, atol=1e-12)


def test_without_prepare_trainer_a_warning_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(warn, "said", set())
    trainer = trainer_of(SFT, tmp_path, **ONE_STEP)
    del trainer.compute_loss
    with pytest.warns(UserWarning, match=r"prepare_trainer\(trainer\)"):
        trainer.train()
