"""Two processes on the CPU, started by torchrun: DDP, FSDP2 and accelerate against one process, and a killed rank."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import peft
import pytest
import torch

from tests import HANGS, ROOT
from tests.helpers.distributed_worker import CASES
from tests.helpers.tiny_models import batch, build


def torchrun(job: str, folder: Path) -> tuple[int, str]:
    """Exit status and output of a job of distributed_worker.py in two processes."""
    command = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    paths = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    env = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "PYTHONFAULTHANDLER": "1"}
    with subprocess.Popen(
        [*command, "tests/helpers/distributed_worker.py", job, str(folder)],
        cwd=ROOT,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            output, _ = process.communicate(timeout=HANGS)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            raise
    return process.returncode, output


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str | None]]:
    """For each rank: None or the error, by case."""
    folder = tmp_path_factory.mktemp("compare")
    status, output = torchrun("compare", folder)
    assert status == 0, output[-6000:]
    return [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.compat(
    "Processes", "DDP and FSDP2, by torchrun and accelerate: gradients, losses and files are those of one process"
)
@pytest.mark.parametrize("case", CASES)
def test_two_processes(case: str, results: list[dict[str, str | None]]) -> None:
    failures = [f"rank {rank}: {found[case]}" for rank, found in enumerate(results) if found[case] is not None]
    assert not failures, "\n".join(failures)


@pytest.mark.compat("Processes", "a killed rank ends the job; its checkpoints load")
def test_a_killed_rank_ends_the_job_and_leaves_its_checkpoints(tmp_path: Path) -> None:
    status, output = torchrun("killed", tmp_path)
    assert status != 0
    assert "rank      : 1" in output
    assert "Signal 9 (SIGKILL) received" in output
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-1", "step-2"]
    logits = []
    for step in ("step-1", "step-2"):
        model = peft.PeftModel.from_pretrained(build("bert").double(), str(tmp_path / step), is_trainable=True)
        model(**batch("bert")).loss.backward()  # it still trains
        logits.append(model.eval()(**batch("bert")).logits)
    assert not torch.equal(*logits)
