"""What a Trainer keeps on disk: a killed run continues bit for bit, and the best adapter is loaded at the end."""

import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import EarlyStoppingCallback
from transformers.trainer_utils import get_last_checkpoint

from tests import HANGS, ROOT
from tests.helpers.tiny_models import batch, build
from tests.helpers.trainer_tools import Rows, params, shuffled_run

CHILD = ROOT / "tests" / "helpers" / "resume_child.py"
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


def run(code: int, *arguments: object) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(CHILD), *map(str, arguments)]
    child = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=HANGS)
    assert child.returncode == code, child.stderr


def log(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


@pytest.mark.compat("Trainers", "killed in a step and resumed: bit for bit the uninterrupted run")
def test_a_killed_process_resumes_bit_for_bit(tmp_path: Path) -> None:
    """kill -9 half-way through a random step; a new process continues from the last checkpoint."""
    kill_at = random.Random().randint(3, 8)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    run(-signal.SIGKILL, whole, 0, killed, kill_at)
    before = log(killed)
    assert [row["step"] for row in before] == list(range(1, kill_at))
    saved = (kill_at - 1) // 2 * 2
    assert get_last_checkpoint(str(killed)) == str(killed / f"checkpoint-{saved}")
    run(0, killed, 0)
    resumed = log(killed)[len(before) :]
    assert [row["step"] for row in resumed] == list(range(saved + 1, 9)), f"killed in step {kill_at}"
    expected = log(whole)
    assert before == expected[: kill_at - 1]
    assert resumed == expected[saved:], f"killed in step {kill_at}"  # loss, gradient norm and all terms of all layers
    assert len({row["loss"] for row in expected}) == 8
    adapters = [load_file(folder / "final" / "adapter_model.safetensors") for folder in (whole, killed)]
    for name, tensor in adapters[0].items():
        assert torch.equal(tensor, adapters[1][name]), name


def losses(trainer: Any) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("lost", [False, True], ids=["with rng_state", "without"])
def test_the_state_of_the_noise_is_in_the_checkpoint(lost: bool, tmp_path: Path) -> None:
    whole = shuffled_run(tmp_path, max_steps=4)
    whole.train()
    checkpoint = tmp_path / "checkpoint-2"
    if lost:
        (checkpoint / "rng_state.pth").unlink()
    resumed = shuffled_run(tmp_path, max_steps=4)
    torch.rand(100)  # not a new seed: the order of the data depends on it
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert losses(resumed)[:2] == losses(whole)[:2]
    assert (losses(resumed)[2:] == losses(whole)[2:]) is not lost


def scripted_run(folder: Path, scores: list[float], patience: int) -> Any:
    """A run with these `scores` at its evaluations."""
    remaining = iter(scores)
    trainer = shuffled_run(
        folder,
        max_steps=8,
        eval_strategy="steps",
        eval_steps=2,
        load_best_model_at_end=True,
        metric_for_best_model="score",
        greater_is_better=True,
        eval_dataset=Rows("bert", torch.float32),
        callbacks=[EarlyStoppingCallback(early_stopping_patience=patience)],
    )
    trainer.compute_metrics = lambda _: {"score": next(remaining)}
    trainer.train()
    return trainer


@pytest.mark.compat("Trainers", "early stopping, best model at the end")
def test_early_stopping_and_the_best_adapter(tmp_path: Path) -> None:
    trainer = scripted_run(tmp_path, [1.0, 3.0, 2.0, 9.0], patience=1)
    assert trainer.state.global_step == 6, "it should stop when the third evaluation is worse than the second"
    best = tmp_path / "checkpoint-4"
    assert trainer.state.best_model_checkpoint == str(best)
    loaded = {name: p.detach() for name, p in params(trainer.model).items()}
    on_disk = {step: load_file(tmp_path / f"checkpoint-{step}" / "adapter_model.safetensors") for step in (4, 6)}
    changed = 0
    for name, tensor in loaded.items():
        key = name.replace(".default", "")
        assert torch.equal(tensor, on_disk[4][key.replace(".modules_to_save", "")]), name
        changed += not torch.equal(tensor, on_disk[6][key.replace(".modules_to_save", "")])
    assert changed > len(loaded) / 2, "the last adapter is the best one: nothing had to be loaded"


def test_a_saved_model_is_an_adapter_that_loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """save_model writes only the adapter, without any connection."""
    monkeypatch.setattr("huggingface_hub.HfApi.create_repo", None)
    trainer = shuffled_run(tmp_path, max_steps=2)
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    names = {path.name for path in (tmp_path / "saved").iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors"} <= names
    assert not {"model.safetensors", "pytorch_model.bin"} & names
    fresh = peft.PeftModel.from_pretrained(build("bert"), tmp_path / "saved")
    inputs = batch("bert")
    with torch.no_grad():
        expected = trainer.model.eval()(**inputs).logits
        torch.testing.assert_close(fresh.eval()(**inputs).logits, expected, rtol=0, atol=0)
