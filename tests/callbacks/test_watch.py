"""The callback's warnings: each once, after the warm-up, with advice; none if all is well."""

import math
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import fvae_kernels as fk
from fvae_kernels.callbacks.watch import Watch, has_settled
from fvae_kernels.nn.adapter import FVAEAdapter
from tests.helpers.trainer_tools import QUIET, Rows, adapted, trainer_of

WELL = {"signal_to_noise": 3.0, "effective_rank": 2.5}


def said(watch: Watch, values: dict[str, float], settled: bool = True) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        watch.look({"a": values, "b": values}, settled)
    return [str(w.message) for w in caught]


def output(logits: torch.Tensor) -> SimpleNamespace:
    return SimpleNamespace(logits=logits)


@pytest.mark.parametrize(
    ("values", "what", "advice"),
    [
        ({"signal_to_noise": 0.12}, "the noise of z_1 drowns its mean: signal to noise 0.12", "logvar1_held=True"),
        ({"effective_rank": 1.02}, "along one direction: effective rank 1.02", "start='lora'"),
    ],
)
def test_each_is_said_once_with_what_to_do(values: dict[str, float], what: str, advice: str) -> None:
    watch = Watch()
    assert said(watch, {**WELL, **values}, settled=False) == []
    (text,) = said(watch, {**WELL, **values})
    assert what in text
    assert advice in text
    assert said(watch, {**WELL, **values}) == []


@pytest.mark.parametrize(
    "values", [WELL, {}, {"effective_rank": 0.0}, {"effective_rank": math.nan, "signal_to_noise": math.nan}]
)
def test_nothing_is_said_where_all_is_well_or_unknown(values: dict[str, float]) -> None:
    assert said(Watch(), values) == []


def test_an_update_of_rank_one_may_have_one_direction() -> None:
    assert said(Watch(rank=1), {"effective_rank": 1.0}) == []


@pytest.mark.parametrize("labels", [[0, 1, 0, 1], [0, 0, 0, 1]])
@pytest.mark.parametrize("learned", [False, True])
def test_a_task_loss_at_chance(labels: list[int], learned: bool) -> None:
    """Chance is the loss of predicting the label frequencies."""
    watch, y = Watch(), torch.tensor(labels)
    share = y.double().mean()
    logits = torch.stack([(1 - share).log(), share.log()]).expand(4, 2) + 3.0 * learned * torch.eye(2)[y]
    for _ in range(3):
        assert said(watch, WELL) == []
        watch.note_task(output(logits), y)
    texts = said(watch, WELL)
    assert len(texts) == (not learned)
    assert learned or "at chance after the warm-up" in texts[0]


@pytest.mark.parametrize(
    ("logits", "labels"),
    [
        (torch.zeros(4, 1), torch.zeros(4)),  # regression
        (torch.zeros(2, 5, 9), torch.zeros(2, 5).long()),  # tokens
        (torch.zeros(4, 2), torch.full((4,), -100)),
        (None, torch.zeros(4).long()),
        (torch.zeros(4, 2), None),
    ],
)
def test_only_a_classifiers_loss_is_judged(logits: Any, labels: Any) -> None:
    watch = Watch()
    watch.note_task(output(logits), labels)
    watch.note_task({"logits": logits}, labels)
    assert watch.losses == []


@pytest.mark.parametrize(("step", "settled"), [(10, False), (20, False), (21, True)])
def test_when_a_run_has_settled(step: int, settled: bool) -> None:
    args = SimpleNamespace(get_warmup_steps=lambda steps: 20)
    assert has_settled(args, SimpleNamespace(global_step=step, max_steps=100)) is settled


def test_a_trainer_hears_of_all_three(tmp_path: Path) -> None:
    """The mean is equal for all tokens, and the learning rate changes nothing."""
    model = adapted("bert", "SEQ_CLS")
    for adapter in (m for m in model.modules() if isinstance(m, FVAEAdapter)):
        torch.nn.init.zeros_(adapter.encoder1_mean_weight)
    for p in (p for name, p in model.named_parameters() if "classifier" in name):
        torch.nn.init.zeros_(p)
    options = {**QUIET, "max_steps": 8, "logging_steps": 1, "learning_rate": 0.0, "save_strategy": "no"}
    trainer = trainer_of(model, Rows("bert", torch.float64), output_dir=str(tmp_path), **options)
    trainer.add_callback(fk.FVAELoggingCallback(trainer))
    with pytest.warns(UserWarning, match="FVAE: ") as caught:
        trainer.train()
    texts = [str(w.message) for w in caught if str(w.message).startswith("FVAE: ")]
    assert sorted(text.split()[2] for text in texts) == ["noise", "task", "update"]
