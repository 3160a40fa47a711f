"""The runner of the evidence: one line for each finished cell, none twice; differences paired by seed."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("PIL")
pytest.importorskip("rich")

from examples.compare import __main__ as command
from examples.compare import paired, records, report, tasks
from examples.compare.methods import METHODS
from examples.report import interval
from tests.helpers import compare_tasks
from tests.helpers.compare_tasks import Points

PROMPTS = ("prompt-tuning", "p-tuning")  # need tokens


@pytest.fixture
def points(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tasks, "find", compare_tasks.find)


def run(path: Path, *more: str) -> list[dict[str, Any]]:
    command.main(["--tasks", "points", "--out", str(path), *more])
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.usefixtures("points")
@pytest.mark.parametrize("method", [name for name in METHODS if name not in PROMPTS])
def test_every_method_trains(method: str, tmp_path: Path) -> None:
    (row,) = run(tmp_path / "runs.jsonl", "--methods", method, "--seeds", "3")
    cell = ("task", "method", "seed", "epochs", "lr", "weight")
    assert [row[name] for name in cell] == ["points", method, 3, 5, 0.05, None]
    assert row["test"]["worst"] == min(row["test"]["groups"].values())
    assert row["test"]["average"] == pytest.approx(sum(row["test"]["groups"].values()) / 4, abs=1e-6)
    assert row["test"]["minority"] == pytest.approx(sum(row["test"]["groups"][g] for g in ("01", "10")) / 2, abs=1e-6)
    assert row["task_loss"][-1] < row["task_loss"][0]
    assert bool(row["anatomy"]) == method.startswith("fvae")


@pytest.mark.usefixtures("points")
def test_a_trimmed_run_ends_smaller(tmp_path: Path) -> None:
    rows = run(tmp_path / "runs.jsonl", "--methods", "fvae,fvae-trimmed-4", "--seeds", "0")
    assert rows[1]["parameters"] < 0.5 * rows[0]["parameters"]
    assert rows[1]["task_loss"][0] == rows[0]["task_loss"][0]


def test_the_second_latent_is_exchanged_in_training_alone() -> None:
    model = METHODS["fvae-exchange"].adapt(Points().model(0), Points())
    layer = model.base_model.model.query
    seen: list[Tensor] = []
    layer.base_layer.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    nn.init.normal_(layer.fvae_adapter["default"].encoder2_mean_weight)
    x = torch.randn(64, 6)
    for training in (True, False):
        layer.train(training)(x)
    changed = (seen[0] != x).any(1).double().mean()
    assert 0.25 < changed < 0.75
    assert torch.equal(seen[1], x)


@pytest.mark.usefixtures("points")
def test_a_finished_cell_is_not_run_again_and_a_run_repeats(tmp_path: Path) -> None:
    path = tmp_path / "runs.jsonl"
    first = run(path, "--methods", "lora,fvae", "--seeds", "0-1")
    assert [(row["seed"], row["method"]) for row in first] == [(0, "lora"), (0, "fvae"), (1, "lora"), (1, "fvae")]
    path.write_text("".join(json.dumps(row) + "\n" for row in first[:3]))  # killed during the last run
    again = run(path, "--methods", "lora,fvae", "--seeds", "0-1")
    assert again[:3] == first[:3]
    for name in ("test", "validation", "task_loss", "anatomy"):
        assert again[3][name] == first[3][name]
    assert len(run(path, "--methods", "lora", "--seeds", "0-1", "--lr", "0.01")) == 6


def test_unknown_names_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        command.main(["--methods", "lora,lorra"])
    assert "there is no method ['lorra']" in capsys.readouterr().err
    with pytest.raises(ValueError, match=r"there is no task 'sounds'; there are text, text-0\.5"):
        tasks.find("sounds")


@pytest.mark.parametrize(("text", "seeds"), [("0-9", list(range(10))), ("5,7-8", [5, 7, 8]), ("3", [3])])
def test_seeds(text: str, seeds: list[int]) -> None:
    assert command.seeds(text) == seeds


def test_the_last_of_two_equal_cells_counts(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "runs.jsonl"
    assert list(records.read(path)) == []
    cell = {"task": "t", "method": "lora", "seed": 0, "epochs": 1, "lr": 0.1, "weight": None}
    for value in (1, 2):
        records.append(path, {**cell, "value": value})
    assert [row["value"] for row in records.read(path)] == [2]


def test_numbers_that_json_lacks_become_none(tmp_path: Path) -> None:
    path, cell = tmp_path / "runs.jsonl", {"task": "t", "method": "lora", "seed": 0, "epochs": 1, "lr": 0.1}
    records.append(path, {**cell, "anatomy": {"noise1": math.inf}, "task_loss": [1.0, math.nan]})
    (row,) = records.read(path)
    assert row["anatomy"] == {"noise1": None}
    assert row["task_loss"] == [1.0, None]


def test_interval() -> None:
    """Student's sleep data, with its textbook interval."""
    mean, low, high = interval([1.2, 2.4, 1.3, 1.3, 0.0, 1.0, 1.8, 0.8, 4.6, 1.4])
    assert (mean, low, high) == pytest.approx((1.58, 0.70, 2.46), abs=0.005)
    assert interval([0.5]) == (0.5, -math.inf, math.inf)


def test_differences_pair_by_seed() -> None:
    def runs(scores: dict[int, float]) -> dict[int, Any]:
        return {seed: {"test": {"average": score}} for seed, score in scores.items()}

    found = paired.differences(runs({0: 0.5, 1: 0.75, 9: 1.0}), runs({1: 0.5, 0: 0.25, 2: 0.0}), "average")
    assert found == [0.25, 0.25]


def test_the_committed_runs_make_a_table() -> None:
    rows = list(records.read())
    assert {row["method"] for row in rows} <= set(METHODS)
    for methods in report.by_setting(rows).values():
        table = list(report.lines(methods, "lora"))
        assert len(table) == len(methods) + 2
        assert len({line.count("|") for line in table}) == 1
