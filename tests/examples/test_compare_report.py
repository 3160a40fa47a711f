"""Tables and pictures of runs that nobody ran."""

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("matplotlib")

from examples.compare import figures, report
from tests.helpers.compare_rows import rows


def runs(method: str, score: float, lr: float = 5e-3, best: float | None = None) -> list[dict[str, Any]]:
    """Five runs of a task of the pictures, with a curve."""
    found = rows(method, [score] * 5, lr=lr, task="images", cpu_seconds=1.0)
    for run in found:
        run["test"] |= {"worst": score, "minority": score}
        run["curve"] = [{"epoch": epoch, "average": score} for epoch in (1, 2)]
        if best is not None:
            run["test_best"] = {"average": best}
    return found


def test_early_stopping_has_a_column_where_every_run_looked_for_it() -> None:
    found = [*runs("lora", 0.5, best=0.6), *runs("fvae", 0.7, best=0.75)]
    head, _, lora, fvae = report.tables(found)[3:-1]
    assert head.endswith("| minority - LoRA's | average, early stopping | at chance |")
    assert lora.endswith("|  | 0.600 | 0 |")
    assert fvae.startswith("| FVAE-LoRA, the default | 5 | 0.700 | 0.700 | 0.700 | +0.200 [+0.200, +0.200] (n = 5) |")
    assert fvae.endswith("| 0.750 | 0 |")
    del found[0]["curve"]
    assert "early stopping" not in report.tables(found)[3]


def test_every_picture_is_drawn_from_the_runs_of_one_setting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[tuple[str, float]] = []
    costs = figures._costs
    monkeypatch.setattr(
        figures, "_costs", lambda axis, task, methods: (drawn.extend(_rates(methods)), costs(axis, task, methods))
    )
    methods = ("lora", "lora-dropout", "fvae", "fvae-paper", "fvae-paper-beta-0.1")
    found = [*runs("lora", 0.9, lr=1e-3), *(run for method in methods for run in runs(method, 0.5))]
    paths = figures.draw(found, tmp_path)
    assert [path.name for path in paths] == ["groups.png", "curves.png", "ladders.png", "cost.png"]
    assert all(path.stat().st_size > 5000 for path in paths)
    assert drawn == [("lora", 5e-3), ("lora-dropout", 5e-3), ("fvae", 5e-3), ("fvae-paper", 5e-3)]
    assert figures.draw(rows("lora", [0.5]), tmp_path / "none") == []


def _rates(methods: dict[str, dict[int, dict[str, Any]]]) -> list[tuple[str, float]]:
    return [(method, lr) for method, found in methods.items() for lr in {run["lr"] for run in found.values()}]
