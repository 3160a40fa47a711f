"""Lambda, beta and the noise follow the optimizer step, also after a resume; the task loss is logged apart."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fvae_kernels as fk
from fvae_kernels import schedules
from tests.helpers.total_loss import by_hand
from tests.helpers.trainer_tools import QUIET, Rows, adapted, params, trainer_of

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


def small() -> nn.Module:
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
    config = fk.FVAEConfig(
        rank=2,
        encoder_hidden=(4,),
        decoder_hidden=(5,),
        kl_weight=4.0,
        loss_weight={"0": 0.5, ".*": 2.0},
        logvar1_held=False,
    )
    fk.replace_linears(model, config)
    return model


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        (0.5, [0.5, 0.5, 0.5, 0.5]),
        ({2: 0.0, 4: 1.0}, [0.0, 0.0, 0.5, 1.0]),
        (lambda step: step / 10, [0.0, 0.2, 0.3, 0.9]),
        (schedules.warmup(4), [0.0, 0.5, 0.75, 1.0]),
        (schedules.anneal(4, 1.0, 0.5), [1.0, 0.75, 0.5732233, 0.5]),
        (schedules.cycles(4), [0.0, 1.0, 1.0, 0.5]),
    ],
)
def test_values(schedule: Any, expected: list[float]) -> None:
    model = small()
    found = fk.ObjectiveSchedule(model, loss_weight=schedule, kl_weight=schedule)
    for step, factor in zip((0, 2, 3, 9), expected, strict=True):
        found.step(step)
        assert [layer.loss_weight for layer in model] == pytest.approx([0.5 * factor, 2.0 * factor])
        assert [layer.adapter.training_config.kl_weight for layer in model] == pytest.approx([4.0 * factor] * 2)
        assert model[0].config.kl_weight == 4.0


def test_the_objective_follows() -> None:
    model, x = small(), torch.randn(3, 6)
    schedule = fk.ObjectiveSchedule(model, loss_weight={0: 1.0, 1: 3.0}, noise_bound={0: -3.0})

    def objective() -> float:
        torch.manual_seed(0)
        with by_hand(model) as terms:
            model(x)
        return float(torch.stack(terms).sum().detach())

    schedule.step(0)
    first = objective()
    schedule.step(1)
    assert objective() == pytest.approx(3 * first, rel=1e-5)
    assert all(layer.adapter.training_config.logvar1_bounds[1] == -3.0 for layer in model)
    other = fk.ObjectiveSchedule(small(), loss_weight={0: 1.0, 1: 3.0})
    other.load_state_dict(schedule.state_dict())
    assert other.layers[0].loss_weight == 1.5


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: fk.ObjectiveSchedule(nn.Linear(2, 2)), "has no FVAE layer"),
        (lambda: fk.ObjectiveSchedule(small(), loss_weight="slow"), "loss_weight='slow' is not allowed"),
        (lambda: fk.ObjectiveSchedule(small(), kl_weight={}), "kl_weight={} is not allowed"),
        (lambda: fk.ObjectiveSchedule(small(), kl_weight={"a": 1.0}), "a table {step: value}"),
        (lambda: fk.ObjectiveSchedule(small(), loss_weight=lambda step: -1.0).step(7), "-1.0 at step 7"),
        (lambda: schedules.warmup(0), "steps=0 is not allowed"),
        (lambda: schedules.cycles(4, ramp=0.0), "ramp=0.0 is not allowed"),
    ],
)
def test_what_is_no_schedule_is_refused(make: Any, says: str) -> None:
    with pytest.raises(ValueError) as error:
        make()
    assert says in str(error.value)


def test_a_resumed_trainer_continues(tmp_path: Path) -> None:
    def run(resume: bool) -> dict[str, torch.Tensor]:
        rows = Rows("bert", torch.float32)
        trainer = trainer_of(
            adapted("bert", "SEQ_CLS"), rows, output_dir=str(tmp_path), max_steps=4, save_steps=2, **QUIET
        )
        schedule = fk.ObjectiveSchedule(trainer.model, loss_weight=schedules.warmup(3), kl_weight=schedules.anneal(4))
        trainer.add_callback(fk.FVAEScheduleCallback(schedule))
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2") if resume else None)
        assert schedule.last_step == 3
        return {name: p.detach().clone() for name, p in params(trainer.model).items()}

    whole, resumed = run(False), run(True)
    for name, value in whole.items():
        assert torch.equal(resumed[name], value), name


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_the_task_loss_is_logged_apart(kind: str, tmp_path: Path) -> None:
    logs = []
    for weight in (0.0, 0.5):
        rows = Rows(kind, torch.float32)
        model = adapted(kind, None, torch.float32, loss_weight=weight)
        options = QUIET | {"max_steps": 1, "gradient_accumulation_steps": 4, "logging_steps": 1}
        trainer = trainer_of(model, rows, output_dir=str(tmp_path / str(weight)), **options)
        trainer.add_callback(fk.FVAELoggingCallback(trainer, tmp_path / f"{weight}.jsonl"))
        torch.manual_seed(0)
        trainer.train()
        logs.append(next(entry for entry in trainer.state.log_history if "loss" in entry))
        row = json.loads((tmp_path / f"{weight}.jsonl").read_text())
        assert row["task_loss"] == logs[-1]["task_loss"]
        assert row["task_loss"] + row["objective"] == pytest.approx(row["loss"])
    assert logs[1]["task_loss"] == pytest.approx(logs[0]["loss"], rel=1e-4)
    assert logs[1]["objective"] > 1
