"""The methods of comparisons: what each trains, where it has no place, that all of them run."""

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("PIL")
pytest.importorskip("rich")

from examples.compare import tasks
from examples.compare.methods import GROUPS, METHODS, named
from tests.helpers import compare_tasks
from tests.helpers.compare_tasks import Points, run


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tasks, "find", compare_tasks.find)


def test_every_method_runs_quickly(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The smoke run: what --quick does to all methods on a model of transformers, to some on a language model."""
    some = "head,full,prompt-tuning,p-tuning,lora-family,fvae-family"
    rows = run(tmp_path / "runs.jsonl", "--quick", "--tasks", "sentences")
    assert [row["method"] for row in rows] == list(METHODS)
    rows = run(tmp_path / "runs.jsonl", "--quick", "--tasks", "counting", "--methods", some)
    assert all(row["steps"] == 4 and row["quick"] for row in rows if "test" in row)
    assert [(row["task"], row["method"]) for row in rows if "test" not in row] == [("counting", "head")]
    said = capsys.readouterr().out
    assert "counting, head: does not apply: a language model has no new head (1 run)" in said
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


def test_groups_of_methods() -> None:
    assert named("lora,lora-family,lora")[:2] == ["lora", "lora-dropout"]
    assert set(named("all")) == set(METHODS)
    assert all(set(members) <= set(METHODS) for members in GROUPS.values())
