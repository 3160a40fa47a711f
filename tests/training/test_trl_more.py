"""TRL's other ways to batch and to score: packing, padding-free batches, rewards, generated completions."""

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("trl")
pytest.importorskip("datasets")

import torch
import torch.nn.functional as F
from transformers import LlamaForSequenceClassification

from tests.helpers.tiny_models import build
from tests.helpers.total_loss import by_hand, fix_noise
from tests.helpers.trainer_tools import ONE_STEP, STEPS, assert_step, step_of
from tests.helpers.trl_tools import GRPO, RTOL, SFT, Reward, log_probs, trainer_of

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]
PACKED: dict[str, dict[str, Any]] = {
    "padding-free": {"padding_free": True, "max_length": None},
    "packed": {"packing": True, "max_length": 7, "per_device_train_batch_size": 1},
    "wrapped": {"packing": True, "packing_strategy": "wrapped", "max_length": 5, "per_device_train_batch_size": 1},
}


@pytest.mark.compat("Trainers", "TRL's SFTTrainer with `packing` and `padding_free`")
@pytest.mark.parametrize("how", list(PACKED))
def test_sft_without_padding(how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fix_noise(monkeypatch)
    options = ONE_STEP | PACKED[how] | {"gradient_checkpointing": False}
    untrained = trainer_of(SFT, tmp_path, **options)
    model, batches = untrained.model.train(), list(untrained.get_train_dataloader())[:STEPS]
    kept = [b["labels"][:, 1:] != -100 for b in batches]
    items = sum(int(k.sum()) for k in kept)
    assert all(bool(b.get("attention_mask", torch.ones(1)).all()) for b in batches)
    total = torch.zeros((), dtype=torch.float64)
    for batch, keep in zip(batches, kept, strict=True):
        with by_hand(model) as terms:
            task = -(log_probs(model, batch) * keep).sum() / items
        total = total + task + int(keep.sum()) / items * torch.stack(terms).sum()
    trainer = trainer_of(SFT, tmp_path, **options)
    assert_step(step_of(trainer), model, total, RTOL)
    logged = next(entry["loss"] for entry in trainer.state.log_history if "loss" in entry)
    assert logged == pytest.approx(float(total.detach()), rel=1e-6)


@pytest.mark.compat("Trainers", "TRL's RewardTrainer")
def test_reward_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fix_noise(monkeypatch)

    def made() -> Any:
        torch.manual_seed(0)
        config = build("llama").config
        config.num_labels, config.pad_token_id = 1, 0
        model = LlamaForSequenceClassification(config).double()
        return trainer_of(Reward, tmp_path, model=model, gradient_checkpointing=False, **ONE_STEP)

    untrained = made()
    model, total = untrained.model.train(), torch.zeros((), dtype=torch.float64)
    for batch in list(untrained.get_train_dataloader()):
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
        with by_hand(model) as terms:
            chosen, rejected = model(**inputs).logits.squeeze(-1).chunk(2)
        total = total + (torch.stack(terms).sum() - F.logsigmoid(chosen - rejected).mean()) / STEPS
    assert_step(step_of(made()), model, total, RTOL)


def more_of_a_word(completions: list[str], **_: Any) -> list[float]:
    return [float(len(text.split())) + 0.1 * (sum(map(ord, text)) % 7) for text in completions]


@pytest.mark.compat("Trainers", "TRL's GRPOTrainer")
def test_grpo_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fix_noise(monkeypatch)
    options = ONE_STEP | {"num_generations": 2, "max_completion_length": 4, "loss_type": "grpo"}
    options |= {"reward_funcs": more_of_a_word, "gradient_checkpointing": False}
    trainer = trainer_of(GRPO, tmp_path, **options)
    model = trainer_of(GRPO, tmp_path, **options).model.train()
    got = step_of(trainer)
    total = torch.zeros((), dtype=torch.float64)
    assert len(trainer.seen) == STEPS
    assert any(batch["advantages"].abs().max() > 0 for batch in trainer.seen)
    for batch in trainer.seen:
        ids = {
            "input_ids": torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1),
            "attention_mask": torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1),
        }
        mask = batch["completion_mask"]
        with by_hand(model) as terms:
            logp = log_probs(model, ids)[:, -mask.shape[1] :]
        ratio = (logp - logp.detach()).exp()
        task = -((ratio * batch["advantages"][:, None] * mask).sum(1) / mask.sum(1)).mean()
        total = total + (task + torch.stack(terms).sum()) / STEPS
    assert_step(got, model, total, 1e-5)
