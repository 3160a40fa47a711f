"""`make gpu`, as far as it runs without a GPU: the whole flow at tiny sizes, and what becomes of a part that fails."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.gpu import __main__ as gpu
from benchmarks.gpu import parts, report

pytest.importorskip("triton")


def test_dry_run(tmp_path: Path) -> None:
    assert gpu.main(["--dry-run", "--out", str(tmp_path)]) == 0
    page = (tmp_path / report.NAME).read_text()
    found = {path.stem: json.loads(path.read_text()) for path in tmp_path.glob("*.json")}
    assert set(found) == set(parts.PARTS)
    errors = [error for part in found.values() for error in part.get("errors", {}).values()]
    assert errors == []
    assert found["about"]["interpreted"]
    assert found["suite"]["on_triton"] == found["suite"]["passed"] > 0
    times = [ms for part in ("ops", "layer") for group in found[part]["groups"] for ms in group["ms"].values()]
    assert set(times) == {1.0}, "a dry run has no clock"
    assert page.splitlines()[2].startswith("**DRY RUN. No number on this page is a measurement**")
    for section in (
        "Machine",
        "Test suite",
        "Prediction against measurement",
        "One adapted layer",
        "The ops",
        "Method",
    ):
        assert f"\n## {section}" in page
    for side in ("ours, Triton", "plain PyTorch FVAE", "torch.compile of it", "PEFT LoRA", "PEFT DoRA", "base layer"):
        assert f"\n| {side} | 1 | " in page


def test_a_part_that_fails_is_named_and_the_others_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(name: str, folder: Path, dry: bool) -> str | None:
        if name == "layer":
            return "ended with 1: CUDA error: an illegal memory access was encountered"
        found: dict[str, Any] = {"groups": [{"title": "encode", "ms": {"plain": 2.0, "triton": 1.0}}], "errors": {}}
        if name == "ops":
            (folder / "ops.json").write_text(json.dumps(found))
        return None

    monkeypatch.setattr(gpu, "run", run)
    monkeypatch.setattr(gpu, "missing", lambda: None)
    assert gpu.main(["--out", str(tmp_path)]) == 1
    page = (tmp_path / report.NAME).read_text()
    assert "## Failed: 1" in page
    assert "- **part layer**: ended with 1: CUDA error: an illegal memory access was encountered" in page
    assert "| ours, Triton | 1 | 0.50 |" in page
    assert "DRY RUN" not in page


def test_a_process_that_dies_leaves_its_last_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho an illegal memory access >&2\nexit 3\n")
    python.chmod(0o755)
    monkeypatch.setattr(gpu.sys, "executable", str(python))
    (tmp_path / "layer.json").write_text("of another run")
    assert gpu.run("layer", tmp_path, dry=True) == "ended with 3: an illegal memory access"
    assert not (tmp_path / "layer.json").exists()
    assert "about.json" in (gpu.run("prediction", tmp_path, dry=True) or ""), "what other parts should have found"


def test_a_side_that_fails_is_named_and_the_others_are_timed(tmp_path: Path) -> None:
    def build(side: str) -> Any:
        if side == "compiled":
            raise RuntimeError("no\n compiler")
        return lambda: None

    errors: dict[str, str] = {}
    plan = parts.plan(tmp_path, dry=True)
    group = parts._timed(plan, "encode", ("plain", "compiled", "lora"), "encode", build, errors)
    assert group["ms"] == {"plain": 1.0, "lora": 1.0}
    assert errors == {"encode: torch.compile of it": "RuntimeError: no\n compiler"}


def test_a_failed_test_fails_the_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cases = {"one[triton]": "", "two[cpp]": "<failure/>", "three": "<skipped/>"}
    inside = "".join(f'<testcase file="a.py" name="{name}">{result}</testcase>' for name, result in cases.items())

    def run(command: list[str], **_: Any) -> Any:
        (tmp_path / "tests.xml").write_text(f"<testsuite>{inside}</testsuite>")

    monkeypatch.setattr(parts.subprocess, "run", run)
    found = parts.suite(parts.Plan(tmp_path))
    assert (found["passed"], found["failed"], found["skipped"], found["on_triton"]) == (1, 1, 1, 1)
    assert list(found["errors"]) == ["a.py::two[cpp]"]
    inside = inside.replace("[triton]", "").replace("<failure/>", "")
    assert list(parts.suite(parts.Plan(tmp_path))["errors"]) == ["the suite"], "a GPU run without Triton's kernels"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_what_to_do(capsys: pytest.CaptureFixture) -> None:
    assert gpu.main([]) == 2
    assert 'make gpu ARGS="--dry-run"' in capsys.readouterr().err


def test_the_prediction_is_set_against_the_measurement(tmp_path: Path) -> None:
    here = {"rates": {"float32": 1e12, "bfloat16": 2e12}, "bandwidth": 1e11, "launch": 1e-6}
    shape = {"title": "small", "N": 24, "D": 12, "M": 10}
    group = {"title": "small", "shape": shape, "precision": "float32", "ms": {"base": 1.0, "lora": 1.5}}
    (tmp_path / "about.json").write_text(json.dumps(here))
    (tmp_path / "layer.json").write_text(json.dumps({"groups": [group]}))
    ours, lora, plain = parts.prediction(parts.Plan(tmp_path))["rows"]
    assert (lora["side"], lora["measured"]) == ("lora", 0.5)
    assert 10e-3 < lora["predicted"] < 12e-3, "ten launches of a microsecond and little more"
    assert plain["predicted"] > 20 * lora["predicted"]
    assert ours["measured"] is plain["measured"] is None
