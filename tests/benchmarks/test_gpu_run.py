"""`python3 -m benchmarks.gpu` with cases that need no GPU: limits, failures, and stops at any moment."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks.gpu import results
from tests import ROOT
from tests.helpers import gpu_cases

BAD = {
    "bad: raises": "ValueError: a kernel is wrong",
    "bad: breaks": "RuntimeError: CUDA error: an illegal memory access was encountered",
    "bad: dies": "the process ended with 3: Segmentation fault",
    "bad: hangs": "took longer than 1 s",
}


def start(folder: Path, *arguments: str, **variables: str) -> subprocess.Popen:
    """The command in a new process."""
    command = [sys.executable, "-m", "benchmarks.gpu", "--out", str(folder), *arguments]
    environment = os.environ | {"BENCHMARKS_GPU_CASES": "tests.helpers.gpu_cases"} | variables
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def run(folder: Path, *arguments: str, **variables: str) -> int:
    """Exit status of the command."""
    process = start(folder, *arguments, **variables)
    said, _ = process.communicate(timeout=120)
    assert b"Traceback" not in said, said.decode()
    return process.returncode


def found(folder: Path) -> dict:
    return results.read(folder / results.NAME)[1]


def test_a_case_that_fails_is_named_and_the_others_go_on(tmp_path: Path) -> None:
    assert run(tmp_path) == 1
    cases = found(tmp_path)
    assert {key: one["error"] for key, one in cases.items() if "error" in one} == BAD
    assert len(cases) == gpu_cases.QUICK + len(BAD) + 1 + gpu_cases.MANY
    processes = [cases[key]["found"]["process"] for key in ("quick: 0", "quick: 11", "bad: follows")]
    assert processes[0] == processes[1] != processes[2], "one process as long as it is whole"
    assert len({cases[f"many: {i}"]["found"]["process"] for i in range(gpu_cases.MANY)}) == gpu_cases.MANY
    page = (tmp_path / "GPU.md").read_text()
    assert "The run ran to its end: 21 cases are here, 0 are missing." in page
    assert all(f"- **{key}**: {error}\n" in page for key, error in BAD.items())


def test_a_run_that_failed_nowhere_says_so(tmp_path: Path) -> None:
    assert run(tmp_path, "--only", "quick") == 0
    assert "Failed" not in (tmp_path / "GPU.md").read_text()


@pytest.mark.parametrize("number", range(6))
def test_killed_at_any_moment_it_leaves_a_report_and_goes_on_from_there(tmp_path: Path, number: int) -> None:
    chance = random.Random(number)
    process = start(tmp_path, "--only", "quick", "many", QUICK_SECONDS="0.1")
    while process.poll() is None and not (tmp_path / "GPU.md").exists():
        time.sleep(0.01)
    time.sleep(chance.uniform(0, 2))
    os.kill(process.pid, chance.choice([signal.SIGKILL, signal.SIGTERM, signal.SIGINT]))
    process.communicate(timeout=60)
    before, page = found(tmp_path), (tmp_path / "GPU.md").read_text()
    wanted = gpu_cases.QUICK + gpu_cases.MANY
    # killed between two writes, the page may be one case behind the results
    assert any(f": {n} cases are here, {wanted - n} are missing." in page for n in (len(before), len(before) - 1))
    assert not any("error" in one for one in before.values())
    assert run(tmp_path, "--only", "quick", "many") == 0
    after = found(tmp_path)
    assert len(after) == wanted
    assert all(after[key] == one for key, one in before.items()), "what was found is not measured again"


def test_no_process_outlives_the_run(tmp_path: Path) -> None:
    process = start(tmp_path, "--only", "bad", "quick", QUICK_SECONDS="0.5")
    while not any(key.startswith("quick") for key in found(tmp_path)):
        time.sleep(0.05)
    worker = next(iter(found(tmp_path).values()))["found"]["process"]
    os.kill(process.pid, signal.SIGKILL)
    process.communicate(timeout=60)
    for _ in range(100):
        if not Path(f"/proc/{worker}").exists() or "zombie" in Path(f"/proc/{worker}/status").read_text():
            return
        time.sleep(0.1)
    raise AssertionError("the worker is still there")


def test_minutes_are_kept(tmp_path: Path) -> None:
    began = time.monotonic()
    assert run(tmp_path, "--minutes", "0.15", QUICK_SECONDS="1") in (0, 1)  # 9 s minus the reserve
    assert time.monotonic() - began < 9 + 3
    page = (tmp_path / "GPU.md").read_text()
    assert "The run ran out of its time" in page
    assert "\n## Missing\n" in page


def test_results_of_another_machine_are_kept_aside(tmp_path: Path) -> None:
    assert run(tmp_path, "--only", "many") == 0
    assert run(tmp_path, "--only", "many", PRETENDED_GPU="two") == 0
    assert json.loads((tmp_path / results.NAME).read_text().splitlines()[0])["gpu"] == "two"
    assert json.loads((tmp_path / "results-1.jsonl").read_text().splitlines()[0])["gpu"] == "one"


def test_a_line_that_was_cut_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / results.NAME
    path.write_text('{"gpu": "one"}\n{"case": "a", "found": {}}\n{"case": "b", "fou')
    assert results.read(path) == ({"gpu": "one"}, {"a": {"found": {}}})
    kept = results.Results(tmp_path, {"gpu": "one"})
    kept.add("c", {"found": {}})
    assert set(results.read(path)[1]) == {"a", "c"}
