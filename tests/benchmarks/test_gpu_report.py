"""`python3 -m benchmarks.gpu` without a GPU: the whole flow at tiny sizes, and its report."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from benchmarks import roofline, sides
from benchmarks.gpu import __main__ as gpu
from benchmarks.gpu import cases, predicted, report, results, tools
from benchmarks.gpu.case import Plan
from tests import ROOT

PARTS = tuple(part.name for part in cases.PARTS)
FOLDERS = ("fvae_kernels", "benchmarks", "tests")


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A checkout without anything built."""
    for name in FOLDERS:
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return tmp_path


@pytest.mark.timeout(1500)
def test_dry_run_of_a_plain_checkout(checkout: Path) -> None:
    """All parts run, nothing fails, and the report calls no number a measurement."""
    command = [sys.executable, "-m", "benchmarks.gpu", "--dry-run"]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(command, cwd=checkout, env=environment, capture_output=True, text=True, check=False)
    folder = checkout / "runs" / "gpu-dry-run"
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    identity, found = results.read(folder / results.NAME)
    assert identity is not None
    assert identity["dry"]
    assert {key.partition(": ")[0] for key in found} == set(PARTS)
    assert set(found) == {case.key for case in cases.cases(Plan(folder, dry=True))}
    timed = [one["found"] for key, one in found.items() if key.startswith(("layer", "ops", "steps"))]
    assert {one[key] for one in timed for key in ("ms", "graph_ms", "host_ms")} == {1.0}, "a dry run has no clock"
    page = (folder / report.NAME).read_text()
    assert page.splitlines()[2].startswith("**DRY RUN. No number on this page is a measurement**")
    assert "The run ran to its end" in page
    assert all(f"\n## {part.title}\n" in page for part in cases.PARTS)
    for side in ("ours, Triton", "plain PyTorch FVAE", "torch.compile of it", "PEFT LoRA", "PEFT DoRA", "base layer"):
        assert f"\n| {side} | 1 | 1 | 1 | 1 | " in page


def test_cases_are_those_of_the_roofline() -> None:
    others = [shape for shape in cases.SHAPES if shape[0] != "ViT-B/16, 8 images"]
    assert {roofline.Shape(*shape) for shape in others} == set(roofline.SHAPES)
    assert set(cases.PRECISIONS) == set(roofline.PRECISIONS)
    assert {name for names in cases.LAYER_SIDES for name in names} == set(report.TITLES)
    assert all(sides.TITLES[name] == title for name, title in report.TITLES.items())
    assert all((ROOT / "tests" / "ops" / f"test_{name}.py").is_file() for name in cases.TESTS)


@pytest.mark.parametrize("dry", [True, False])
def test_every_case_has_a_part_and_a_name_of_its_own(tmp_path: Path, dry: bool) -> None:
    found = cases.cases(Plan(tmp_path, dry))
    assert len({case.key for case in found}) == len(found) > 50
    assert list(dict.fromkeys(case.part for case in found)) == list(PARTS)


def test_what_tells_most_comes_first(tmp_path: Path) -> None:
    keys = [case.key for case in cases.cases(Plan(tmp_path))]
    first_timed = next(i for i, key in enumerate(keys) if key.startswith("layer: "))
    assert {key.partition(": ")[0] for key in keys[:first_timed]} == {"machine", "compile", "correct"}
    assert all(key.rpartition(": ")[2] in ("base", "lora", "triton") for key in keys[first_timed : first_timed + 72])
    assert PARTS.index("layer") < PARTS.index("graphs") < PARTS.index("steps") < PARTS.index("tools")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_what_to_do(capsys: pytest.CaptureFixture, tmp_path: Path) -> None:
    assert gpu.main(["--out", str(tmp_path)]) == 2
    assert "python3 -m benchmarks.gpu --dry-run" in capsys.readouterr().err


def page(found: dict[str, Any], missing: tuple[str, ...] = (), dry: bool = False) -> str:
    return "\n".join(report.text(cases.PARTS, found, missing, "was stopped", dry))


def timed(**times: float) -> dict[str, Any]:
    return {"found": times, "seconds": 1.0}


def test_the_report_sets_sides_side_by_side() -> None:
    group = "layer: ViT (1, 2, 3), float32"
    found = {
        f"{group}: base": timed(ms=1.0, graph_ms=0.5, host_ms=0.1, peak_mb=3.0),
        f"{group}: lora": timed(ms=2.0, graph_ms=1.0, host_ms=0.2, peak_mb=4.0),
        f"{group}: triton": timed(ms=3.0, graph_ms=0.75, host_ms=0.3, peak_mb=5.0),
        f"{group}: plain": {"found": {"ms": 8.0, "host_ms": 6.0, "graph_error": "RuntimeError: no"}, "seconds": 1.0},
        f"{group}: dora": {"error": "WrongKernel: it differs", "seconds": 1.0},
    }
    text = page(found, missing=("tools: ncu",))
    assert "The run was stopped: 5 cases are here, 1 are missing." in text
    assert f"## Failed: 1\n\n- **{group}: dora**: WrongKernel: it differs" in text
    assert "| ours, Triton | 3 | 0.75 | 0.3 | 5 | 1.50 | 0.75 | 0.50 |" in text, "beyond base by graphs: 0.25 / 0.5"
    assert "| plain PyTorch FVAE | 8 | - | 6 | - | 4.00 | - | 7.00 |" in text, "by eager calls: 7 / 1"
    assert "plain PyTorch FVAE was not captured: RuntimeError: no" in text
    found[f"{group}: lora"]["found"]["wrong"] = "layer differs"
    assert f"## Failed: 2\n\n- **{group}: dora**: WrongKernel: it differs\n- **{group}: lora**: layer differs" in page(
        found
    )
    assert "| PEFT LoRA (WRONG) | 2 |" in page(found)
    assert text.endswith("## Missing\n\n- tools: ncu")
    assert "DRY RUN" not in text


def test_the_prediction_is_set_against_the_measurement(tmp_path: Path) -> None:
    shape, precision = ("small", 24, 12, 10), "float32"
    known = results.Results(tmp_path, {})
    with pytest.raises(RuntimeError, match="part machine has not found"):
        predicted.layer(Plan(tmp_path), shape, precision)
    rates = {"float32": 1e12, "bfloat16": 2e12}
    for name, one in {
        "launch": {"seconds": 1e-6},
        "bandwidth": {"bytes_per_second": 1e11},
        "products": {"flop_per_second": rates},
    }.items():
        known.add(f"machine: {name}", {"found": one})
    expected = predicted.layer(Plan(tmp_path), shape, precision)
    assert 10e-3 < expected["lora"] < 12e-3, "ten launches of a microsecond and little more"
    assert expected["plain"] > 20 * expected["lora"]
    name = "small (24, 12, 10), float32"
    found = {
        f"layer: {name}: base": timed(ms=1.0),
        f"layer: {name}: lora": timed(ms=1.5),
        f"prediction: {name}": {"found": expected, "seconds": 1.0},
    }
    text = page(found)
    assert f"| {name} | PEFT LoRA | {expected['lora']:.3g} | - | 0.5 | {0.5 / expected['lora']:.2f} |" in text
    assert f"| {name} | ours, Triton | {expected['triton']:.3g} | - | - | - |" in text


# scripts in place of other programs


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")

    def play(name: str, says: str, status: int = 0) -> None:
        (tmp_path / "says").write_text(says)
        (tmp_path / name).write_text(f"#!/bin/sh\ncat {tmp_path}/says\nexit {status}\n")
        (tmp_path / name).chmod(0o755)

    return play


def test_the_sanitizers_word_counts(tmp_path: Path, program: Any) -> None:
    program("compute-sanitizer", "========= ERROR SUMMARY: 0 errors\n")
    assert tools.memcheck(Plan(tmp_path)) == {"said": "ERROR SUMMARY: 0 errors"}
    program("compute-sanitizer", "========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)\n")
    assert tools.racecheck(Plan(tmp_path))["said"].startswith("RACECHECK SUMMARY: 0 hazards")
    for says, status in (("========= ERROR SUMMARY: 10 errors\n", 1), ("Device not supported\n", 0)):
        program("compute-sanitizer", says, status)
        with pytest.raises(AssertionError, match=r"10 errors|Device not supported"):
            tools.memcheck(Plan(tmp_path))


def test_the_profilers_numbers_are_kept(tmp_path: Path, program: Any) -> None:
    program(
        "ncu", "  layer_fwd_kernel (98, 1, 1)x(128, 1, 1)\n    Duration    us    12.5\n    DRAM Throughput  %  61.2\n"
    )
    assert tools.ncu(Plan(tmp_path)) == {
        "kernels": [{"kernel": "layer_fwd_kernel", "Duration": "12.5 us", "DRAM Throughput": "61.2 %"}]
    }
    assert "layer_fwd_kernel" in (tmp_path / "ncu.txt").read_text()
    program("ncu", "==ERROR== LibraryNotLoaded\n", 1)
    with pytest.raises(AssertionError, match="told of no kernel"):
        tools.ncu(Plan(tmp_path))


def test_what_is_not_installed_is_skipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert tools.memcheck(Plan(tmp_path)) == {"skipped": "compute-sanitizer is not installed"}
    assert tools.ncu(Plan(tmp_path)) == {"skipped": "ncu is not installed"}


@pytest.mark.parametrize(("summary", "status"), [("1 failed, 3 passed in 1s", 1), ("5 deselected in 1s", 5)])
def test_a_failed_test_fails_its_case(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, summary: str, status: int
) -> None:
    said = f"FAILED tests/a.py::two[triton] - no\n{summary}\n"
    done = subprocess.CompletedProcess([], status, said)
    monkeypatch.setattr(tools.subprocess, "run", lambda *_, **__: done)
    with pytest.raises(AssertionError, match=rf"pytest ended with {status}.*tests/a.py::two\[triton\]"):
        tools.tests(Plan(tmp_path), "encode")
    done.returncode, done.stdout = 0, "4 passed, 2 skipped in 1s\n"
    assert tools.tests(Plan(tmp_path), "encode") == {"passed": 4, "skipped": 2}


@pytest.mark.parametrize("dry", [True, False])
def test_a_machine_whose_kernels_cannot_run_is_told_before_any_case(monkeypatch, dry):
    """Triton 3.6 compiles the kernels, and does not interpret them."""
    monkeypatch.setattr("triton.__version__", "3.6.0")
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("fvae_kernels.ops._backend.interpreting", lambda: False)
    reason = cases.missing(dry)
    assert reason is None if not dry else "does not interpret" in reason
    monkeypatch.setattr("torch.__version__", "2.8.0")
    assert "torch 2.8.0 is older than" in cases.missing(dry)
