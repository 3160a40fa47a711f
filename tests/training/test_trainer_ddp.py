"""Two processes and a Trainer that computes the task loss outside the model: the step equals that of one process."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests import HANGS, ROOT
from tests.helpers.total_loss import fix_noise
from tests.helpers.trainer_ddp_child import CASES, one_step

CHILD = ROOT / "tests" / "helpers" / "trainer_ddp_child.py"
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


@pytest.mark.compat("Processes", "`prepare_trainer` in two processes")
def test_two_processes_make_the_step_of_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [*launch, str(CHILD), str(tmp_path / "steps.pt")]
    child = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=HANGS)
    assert child.returncode == 0, child.stderr
    together = torch.load(tmp_path / "steps.pt")
    fix_noise(monkeypatch)
    for case in CASES:
        step, loss = one_step(case, tmp_path)
        got, reported = together[case]
        assert reported == pytest.approx(loss, rel=1e-6), case
        for name, expected in step.items():
            error = float((got[name] - expected).norm() / expected.norm())
            assert error < 1e-9, f"{case}, {name}: relative error {error:.1e}"
