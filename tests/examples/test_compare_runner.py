"""The runner of comparisons: search, early stopping, processes, failures, errors, and a quick run of everything."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("PIL")
pytest.importorskip("rich")

from examples.compare import __main__ as command
from examples.compare import cells, records, search, tasks, training
from examples.compare.methods import METHODS
from examples.compare.tasks import Recipe
from examples.compare.watch import evaluations
from tests.helpers import compare_rows, compare_tasks
from tests.helpers.compare_tasks import Counting, Points, run

TIMES = ("at", "seconds", "cpu_seconds", "cpu_seconds_per_step")


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tasks, "find", compare_tasks.find)


def without_times(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    rows = [{name: value for name, value in row.items() if name not in TIMES} for row in rows]
    return sorted(rows, key=lambda row: str(records.cell(row)))


@pytest.mark.parametrize("budget", range(1, 9))
def test_the_search_has_one_budget(budget: int) -> None:
    for method in METHODS.values():
        found = method.search.candidates(budget)
        assert len(set(found)) == budget
        assert len({lr for lr, _ in found}) * len({weight for _, weight in found}) >= budget
    with pytest.raises(ValueError, match="a budget of 9 runs is not allowed: expected 1 to 8"):
        METHODS["lora"].search.candidates(9)


def test_the_search_looks_at_validation_alone_and_is_not_repeated(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "runs.jsonl"
    asked = ("--tasks", "points", "--methods", "lora,fvae", "--seeds", "0-1", "--search", "--epochs", "2")
    rows = run(path, *asked)
    searched, reported = ([row for row in rows if row["search"] is wanted] for wanted in (True, False))
    assert [(row["seed"], row["method"]) for row in searched] == [(1000, "lora")] * 4 + [(1000, "fvae")] * 4
    assert not any("test" in name for row in searched for name in row)
    assert {row["weight"] for row in searched if row["method"] == "fvae"} == {None, 10.0}
    for method in ("lora", "fvae"):
        ours = [row for row in searched if row["method"] == method]
        best = max(ours, key=lambda row: row["validation_best"]["average"])
        used = {(row["lr"], row["weight"]) for row in reported if row["method"] == method}
        assert used == {(best["lr"], best["weight"])}
    assert "learning rates searched" in capsys.readouterr().out
    assert run(path, *asked) == rows
    run(path, *asked, "--dry-run")
    assert "search: 0 of 8 cells are open\n0 of 4 cells are open" in capsys.readouterr().out


def test_the_choice_leaves_failures_out() -> None:
    cell = {"task": "t", "method": "lora", "seed": 1000, "epochs": 1, "weight": None, "search": True}

    def row(lr: float, **more: Any) -> dict[str, Any]:
        return {**cell, "lr": lr, "failed": False, **more}

    rows = [
        row(0.1, validation={"average": 0.9}, failed=True),
        row(0.3, validation={"average": 0.7}),
        row(0.2, validation={"average": 0.5}, validation_best={"average": 0.7}),
        row(0.4, error="RuntimeError"),
        row(0.5, validation={"average": 1.0}, search=False),
        row(0.2, validation={"average": 1.0}, batch_size=4),
    ]
    cells = [row(lr) for lr in (0.1, 0.2, 0.3, 0.4)]
    assert search.chosen(rows, cells) == (0.2, None)
    assert search.chosen(rows, [*cells, row(0.5)]) is None
    assert search.chosen(rows, [cells[3], cells[0]]) == (0.4, None)
    language = [row(lr, validation={"nats": nats}) for lr, nats in ((0.1, 3.0), (0.2, 2.0))]
    assert search.chosen(language, cells[:2]) == (0.2, None)
    assert search.chosen(rows[1:3], [cells[1], cells[2]]) == (0.2, None)
    assert search.chosen(rows[1:3], [cells[2], cells[1]]) == (0.3, None)
    assert search.chosen(rows, cells, early_stopping=False) == (0.3, None)


@pytest.mark.parametrize(("more", "left"), [((), 1), (("--no-early-stopping",), 0)])
def test_the_search_is_judged_where_the_runs_are_scored(
    more: tuple[str, ...], left: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, shared = tmp_path / "runs.jsonl", {"task": "points", "epochs": 5}
    for row in (
        *compare_rows.tried("lora", {1e-3: 0.8}, validation_best={"average": 0.9}, **shared),
        *compare_rows.tried("lora", {5e-3: 0.85}, validation_best={"average": 0.85}, **shared),
        *compare_rows.rows("lora", [0.5], lr=5e-3, **shared),
    ):
        records.append(path, row)
    asked = ("--tasks", "points", "--methods", "lora", "--seeds", "0", "--search", "--budget", "2")
    run(path, *asked, "--dry-run", *more)
    assert f"search: 0 of 2 cells are open\n{left} of 1 cells are open" in capsys.readouterr().out


def test_several_processes_give_the_same_rows(tmp_path: Path) -> None:
    asked = ("--tasks", "points", "--methods", "lora,fvae", "--seeds", "0-1", "--epochs", "2")
    one, two = (run(tmp_path / f"{jobs}.jsonl", *asked, "--jobs", jobs) for jobs in ("1", "2"))
    assert without_times(one) == without_times(two)
    back = run(tmp_path / "back.jsonl", *asked[:2], "--methods", "fvae,lora", "--seeds", "1,0", "--epochs", "2")
    assert without_times(one) == without_times(back)


def test_failures_are_rows_and_errors_are_tried_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "runs.jsonl"
    with pytest.raises(SystemExit) as stopped:
        run(path, "--tasks", "failing", "--methods", "lora", "--seeds", "0-2")
    assert stopped.value.code == 1
    chance, diverged, error = (json.loads(line) for line in path.read_text().splitlines())
    assert (chance["failed"], chance["diverged"]) == (True, False)
    assert chance["chance"] == pytest.approx(math.log(2), abs=0.01)
    assert (diverged["failed"], diverged["diverged"], diverged["steps"]) == (True, True, 1)
    assert error["error"].startswith("RuntimeError: no memory (compare_tasks.py, line ")
    said = capsys.readouterr().out
    assert "| LoRA | 2 |" in said
    assert next(line for line in said.splitlines() if line.startswith("| LoRA")).endswith("| 2 |")
    assert "ERROR: RuntimeError: no memory" in said
    with pytest.raises(SystemExit):
        run(path, "--tasks", "failing", "--methods", "lora", "--seeds", "0-2")
    assert len(path.read_text().splitlines()) == 4


class Scripted(Points):
    """A task whose validation is best after the second of four epochs."""

    recipe = Recipe(epochs=4, lr=0.05, batch_size=8)


def test_early_stopping_keeps_the_best_epoch(monkeypatch: pytest.MonkeyPatch) -> None:
    task = Scripted()
    splits = task.splits(0)
    states: list[torch.Tensor] = []
    script = iter([0.5, 0.9, 0.9, 0.7])

    def scripted(_: Any, model: nn.Module, examples: Any) -> dict[str, Any]:
        weight = model.base_model.model.query.lora_B["default"].weight  # type: ignore[union-attr]
        if examples is splits.validation:
            states.append(weight.detach().clone())
            return {"average": next(script), "worst": 0.0}
        return {"average": -1.0 if torch.equal(weight, states[1]) else -2.0}

    monkeypatch.setattr("examples.compare.watch.score", scripted)
    monkeypatch.setattr("examples.compare.training.score", scripted)
    row = training.run(task, METHODS["lora"], 0, splits, task.recipe)
    assert [point["average"] for point in row["curve"]] == [0.5, 0.9, 0.9, 0.7]
    assert (row["best_epoch"], row["validation_best"]["average"]) == (2, 0.9)
    assert (row["test"]["average"], row["test_best"]["average"]) == (-2.0, -1.0)
    assert row["validation"]["average"] == 0.7


def test_evaluating_changes_no_run() -> None:
    rows = [
        training.run(Points(), METHODS["fvae"], 3, Points().splits(3), Points.recipe, early_stopping=early)
        for early in (True, False)
    ]
    assert all(rows[0][name] == rows[1][name] for name in ("test", "validation", "task_loss", "anatomy"))
    assert "test_best" not in rows[1]


@pytest.mark.parametrize(
    ("epochs", "train", "validation", "count"),
    [(3, 1200, 320, 3), (10, 480, 400, 5), (30, 480, 400, 10), (100, 10_000, 100, 10), (1, 10, 10, 1)],
)
def test_validation_costs_about_a_tenth(epochs: int, train: int, validation: int, count: int) -> None:
    assert evaluations(epochs, train, validation) == count


def test_a_trimmed_model_is_best_after_trimming() -> None:
    row = training.run(Points(), METHODS["fvae-trimmed-4"], 0, Points().splits(0), Points.recipe)
    assert row["best_epoch"] >= 3
    assert len(row["curve"]) == 5


def test_a_language_model_is_scored_in_nats() -> None:
    task = Counting()
    splits = task.splits(0)
    row = training.run(task, METHODS["lora"], 0, splits, task.recipe)
    assert row["metric"] == "nats"
    assert row["test_best"]["nats"] < row["chance"]
    assert not row["failed"]
    inputs, labels = task.batch(splits.validation)
    loss = task.model(0).eval()(**inputs, labels=labels)["loss"].item()  # mean of the tokens that count
    assert row["chance"] == pytest.approx(loss, abs=1e-5)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--methods", "lorra"], "there is no method ['lorra']; there are ['head', "),
        (["--tasks", "musik"], "there is no task 'musik'; there are points"),
        (["--seeds", "one"], "argument --seeds: 'one' are no seeds; expected for example 0-4"),
        (["--seeds", "4-0"], "'4-0' are no seeds"),
        (["--lr", "-1"], "'-1' is not a learning rate"),
        (["--jobs", "0"], "'0' is not a whole number above zero"),
        (["--data", "absent.csv", "--model", "m"], "there is no file or folder absent.csv"),
        (["--data", "absent.csv"], "--data needs --model"),
        (["--text", "review"], "--text is about your own data; give them by --data"),
        (["--search", "--lr", "0.1"], "--lr and --search exclude each other"),
        (["--search", "--seeds", "999-1001"], "seed 1000 is the search's own"),
        (["--budget", "9"], "a budget of 9 runs is not allowed"),
        (["--baseline", "dora"], "the baseline 'dora' is not among the methods ['lora', 'fvae']"),
    ],
)
def test_errors_are_one_line_and_nothing_is_written(
    arguments: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "runs.jsonl"
    given = [] if "--tasks" in arguments or "--data" in arguments else ["--tasks", "points"]
    with pytest.raises(SystemExit) as stopped:
        command.main([*given, *arguments, "--out", str(path)])
    assert stopped.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line
    assert not path.exists()


def test_a_broken_file_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "runs.jsonl"
    path.write_text('{"task": "points"}\n{"task": "poi')
    with pytest.raises(SystemExit):
        command.main(["--tasks", "points", "--out", str(path)])
    assert 'line 2 is no run: \'{"task": "poi\'' in capsys.readouterr().err


def test_an_interruption_keeps_what_is_finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, real = tmp_path / "runs.jsonl", cells.Worker.__call__

    def interrupted(self: cells.Worker, cell: dict[str, Any]) -> dict[str, Any]:
        if cell["seed"] == 1:
            raise KeyboardInterrupt
        return real(self, cell)

    asked = ("--tasks", "points", "--methods", "lora", "--seeds", "0-2", "--epochs", "1")
    monkeypatch.setattr(cells.Worker, "__call__", interrupted)
    with pytest.raises(SystemExit) as stopped:
        run(path, *asked)
    assert stopped.value.code == 130
    monkeypatch.setattr(cells.Worker, "__call__", real)
    assert [row["seed"] for row in run(path, *asked)] == [0, 1, 2]


def test_the_list_has_a_line_for_each(capsys: pytest.CaptureFixture[str]) -> None:
    command.main(["--list"])
    lines = capsys.readouterr().out.splitlines()
    assert {"methods", "tasks"} < set(lines)
    assert len(lines) == len(METHODS) + len(tasks.BUILT_IN) + 2
    assert "  lora                   LoRA" in lines


def test_old_rows_are_cells_of_plain_runs() -> None:
    old = {"task": "t", "method": "lora", "seed": 0, "epochs": 1, "lr": 0.1, "weight": None}
    assert records.cell(old) == records.cell({**old, "search": False})
    others = [{**old, "search": True}, {**old, "batch_size": 8}, {**old, "quick": True}]
    assert len({records.cell(row) for row in [old, *others]}) == 4
