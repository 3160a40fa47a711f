"""The runner of comparisons: search, early stopping, processes, failures, errors, and a quick run of everything."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("rich")

from examples.compare import __main__ as command
from examples.compare import cells, records, search, tasks, training
from examples.compare.methods import GROUPS, METHODS, named
from examples.compare.tasks import Recipe
from examples.compare.watch import Watch, evaluations
from tests.helpers import compare_tasks
from tests.helpers.compare_tasks import Counting, Points, run

TIMES = ("at", "seconds", "cpu_seconds", "cpu_seconds_per_step")


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tasks, "find", compare_tasks.find)


def without_times(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    rows = [{name: value for name, value in row.items() if name not in TIMES} for row in rows]
    return sorted(rows, key=lambda row: str(records.cell(row)))


def test_every_method_runs_quickly(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The smoke run: what --quick does to all methods on a model of transformers, to some on a language model."""
    some = "head,full,prompt-tuning,p-tuning,lora-family,fvae-family"
    rows = run(tmp_path / "runs.jsonl", "--quick", "--tasks", "sentences")
    assert [row["method"] for row in rows] == list(METHODS)
    rows = run(tmp_path / "runs.jsonl", "--quick", "--tasks", "counting", "--methods", some)
    assert all(row["steps"] == 4 and row["quick"] for row in rows if "test" in row)
    assert [(row["task"], row["method"]) for row in rows if "test" not in row] == [("counting", "head")]
    said = capsys.readouterr().out
    assert "counting, head: does not apply: a language model has no new head (1 runs)" in said
    assert "| FVAE-LoRA, the default | 1 |" in said


def test_a_prompt_needs_tokens(tmp_path: Path) -> None:
    rows = run(tmp_path / "runs.jsonl", "--tasks", "points", "--methods", "prompt-tuning,p-tuning", "--seeds", "0-1")
    assert all(row["does_not_apply"].startswith("a prompt needs a model of transformers") for row in rows)
    assert len(run(tmp_path / "runs.jsonl", "--tasks", "points", "--methods", "p-tuning", "--seeds", "0-1")) == 4


@pytest.mark.parametrize(
    ("method", "trained"),
    [("head", ["classifier"]), ("full", ["classifier", "query"])],
)
def test_methods_without_adapters_train_what_they_say(method: str, trained: list[str]) -> None:
    model = METHODS[method].adapt(Points().model(0), Points())
    assert sorted({name.partition(".")[0] for name, p in model.named_parameters() if p.requires_grad}) == trained
    assert model.training


def test_prompts_train_the_head_too() -> None:
    model = METHODS["prompt-tuning"].adapt(compare_tasks.Sentences().model(0), compare_tasks.Sentences())
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert any("classifier" in name for name in trained)
    assert any("prompt_encoder" in name for name in trained)


def test_loraplus_has_a_higher_rate_for_b() -> None:
    method = METHODS["lora-plus"]
    model = method.adapt(Points().model(0), Points())
    rates = {id(p): group["lr"] for group in method.optimizer(model, 0.1).param_groups for p in group["params"]}
    names = {name.split(".")[-3]: p for name, p in model.named_parameters() if "lora_" in name}
    assert rates[id(names["lora_A"])] == 0.1
    assert rates[id(names["lora_B"])] == pytest.approx(1.6)
    weighted = method.optimizer(model, 0.1, 4.0).param_groups
    assert max(group["lr"] for group in weighted) == pytest.approx(0.4)


def test_the_own_weight_reaches_the_config() -> None:
    model = METHODS["fvae"].adapt(Points().model(0), Points(), weight=10.0)
    assert model.peft_config["default"].kl_weight == 10.0
    assert METHODS["fvae"].adapt(Points().model(0), Points()).peft_config["default"].kl_weight == 3.0


def test_every_ablation_changes_the_preset() -> None:
    def of(method: str) -> dict[str, Any]:
        return dict(METHODS[method].adapt(Points().model(0), Points()).peft_config["default"].to_dict())

    for name in GROUPS["ablations"]:
        base = of("fvae-paper" if name.startswith("fvae-paper") else "fvae")
        changed = {key for key, value in of(name).items() if value != base[key]}
        assert changed, name
        assert len(changed) <= 2, name


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
    cell = {"task": "t", "method": "lora", "epochs": 1, "weight": None, "search": True, "failed": False}
    rows = [
        {**cell, "lr": 0.1, "validation": {"average": 0.9}, "failed": True},
        {**cell, "lr": 0.2, "validation": {"average": 0.5}, "validation_best": {"average": 0.7}},
        {**cell, "lr": 0.3, "validation": {"average": 0.7}},
        {**cell, "lr": 0.4, "error": "RuntimeError"},
        {**cell, "lr": 0.5, "validation": {"average": 1.0}, "search": False},
    ]
    tried = [(lr, None) for lr in (0.1, 0.2, 0.3, 0.4)]
    assert search.chosen(rows, "t", "lora", 1, tried) == (0.2, None)
    assert search.chosen(rows, "t", "lora", 1, [*tried, (0.5, None)]) is None
    language = [{**cell, "lr": lr, "validation": {"nats": nats}} for lr, nats in ((0.1, 3.0), (0.2, 2.0))]
    assert search.chosen(language, "t", "lora", 1, tried[:2]) == (0.2, None)


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


def test_groups_of_methods() -> None:
    assert named("lora,lora-family,lora")[:2] == ["lora", "lora-dropout"]
    assert set(named("all")) == set(METHODS)
    assert all(set(members) <= set(METHODS) for members in GROUPS.values())


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


def test_the_watch_forgets_nothing_but_the_best() -> None:
    watch = Watch(Points(), Points().model(0), Points().splits(0), 2)
    watch(1)
    watch.restart()
    assert watch.best is None
    assert watch.at(1) == watch.at(1) != watch.at(2)
