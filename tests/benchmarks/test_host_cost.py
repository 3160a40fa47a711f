"""Host cost of a step: the tool runs over the fake driver and prints what it measured."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import host_cost
from benchmarks.host_cost import internals, pages
from benchmarks.pages import block
from tests.helpers.host_costs import FOUND

KERNELS = ["layer_fwd_kernel", "layer_mean_kernel", "layer_bwd_kernel", "layer_grads_kernel", "layer_reduce_kernel"]


def test_the_last_line_by_hand() -> None:
    line = "host cost beyond base: ours 420 us, LoRA 120 us, DoRA 360 us; ours / LoRA 3.50, ours / DoRA 1.17"
    assert pages.last_line(FOUND) == line


def test_the_table_by_hand() -> None:
    assert pages.table(FOUND)[2:] == [
        "| **a layer of many in a model** |  |  |  |  |",
        "| base layer | 40 |  |  |  |",
        "| PEFT LoRA | 140 | 100 | 1.00 | 0.33 |",
        "| PEFT DoRA | 340 | 300 | 3.00 | 1.00 |",
        "| ours, Triton | 390 | 350 | 3.50 | 1.17 |",
        "| ours, Triton, the default config | 300 | 260 | 2.60 | 0.87 |",
        "| **a layer called alone** |  |  |  |  |",
        "| base layer | 80 |  |  |  |",
        "| PEFT LoRA | 200 | 120 | 1.00 | 0.33 |",
        "| PEFT DoRA | 440 | 360 | 3.00 | 1.00 |",
        "| plain PyTorch FVAE | 1000 | 920 | 7.67 | 2.56 |",
        "| ours, Triton | 500 | 420 | 3.50 | 1.17 |",
    ]


def test_the_summary_by_hand() -> None:
    assert pages.summary(FOUND)[2:] == [
        "| PEFT LoRA | 100 | 1.00 | 0.33 |",
        "| PEFT DoRA | 300 | 3.00 | 1.00 |",
        "| ours, Triton, the default config | 260 | 2.60 | 0.87 |",
        "| ours, Triton, the paper's recipe | 350 | 3.50 | 1.17 |",
    ]


def test_the_pages_have_what_was_measured() -> None:
    found = json.loads(host_cost.FOUND.read_text())
    assert block(pages.README, "host") == pages.summary(found)
    assert block(pages.PAGE, "host")[2 : 2 + len(pages.table(found))] == pages.table(found)


@pytest.mark.timeout(1200)  # the first time Triton compiles
@pytest.mark.skipif(not host_cost.possible(), reason="needs Linux, Triton and a C compiler")
def test_triton_launches_over_the_fake_driver(tmp_path: Path) -> None:
    """After `fvae_kernels.compile` the launchers find every kernel in Triton's cache."""
    sizes, how = ["64x64", "--adapter", "paper"], ["--padding", "no", "--tokens", "1", "--target", "cuda:90"]
    for command in (
        ["fvae_kernels.compile", *sizes, *how, "--processes", "2"],
        ["benchmarks.host_cost", "--quick", "--out", str(tmp_path / "found.json")],
    ):
        done = subprocess.run(
            [sys.executable, "-m", *command], cwd=host_cost.ROOT, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "found.json").read_text())
    assert done.stdout.splitlines()[-1] == pages.last_line(found)
    assert re.fullmatch(r"host cost beyond base: ours \d+ us, .* ours / DoRA \d+\.\d\d", done.stdout.splitlines()[-1])
    assert found["compiled"] == []
    assert list(found["launches"]) == KERNELS
    assert list(found["parts"]) == list(internals.PARTS)
    assert found["parts"].pop(internals.JIT) == 0, "a plan launches without Triton's own road"
    assert all(us > 0 for us in (*found["parts"].values(), *found["launches"].values()))
    assert found["launched"] == len(KERNELS)  # launches of one step, counted by the driver
    steps = found["steps"]["float32"]
    assert steps["base"] < steps["lora"] < steps["triton"]
