"""The tests of the Triton kernels where there is no GPU: in processes in which Triton interprets its kernels.

Triton decides whether to interpret when a kernel is decorated, hence the processes. On a GPU the tests of each op run
in the process that runs all tests.
"""

import importlib.util
import os
import subprocess
import sys

import pytest

from fvae_kernels.ops._backend import interpreting
from tests import ROOT

# Files that share a process, and the number of processes that share their tests: starting one takes seconds of its own.
GROUPS: dict[tuple[str, ...], int] = {
    ("ops/test_layer",): 2,
    ("ops/test_layer_edges", "ops/test_layer_dropout"): 2,
    ("ops/test_reconstruct", "ops/test_encode"): 1,
    ("triton/test_checks",): 2,
    ("ops/test_layer_plan", "ops/test_layer_base", "ops/test_layer_bounds"): 1,
    ("ops/test_divergence", "ops/test_geometry", "ops/test_contract", "ops/test_no_waiting"): 1,
    ("triton/test_layer", "triton/test_traffic"): 1,
}
FILES = {name for names in GROUPS for name in names}
SHARDS = [(names, f"{i + 1}/{count}") for names, count in GROUPS.items() for i in range(count)]

pytestmark = [
    pytest.mark.skipif(interpreting(), reason="this is the process that it would start"),
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton"),
    pytest.mark.timeout(
        7200
    ),  # a hanging test is ended by its own limit, in the process; this is for the whole process
]


@pytest.mark.parametrize(("names", "shard"), SHARDS, ids=str)
def test_interpreted(names: tuple[str, ...], shard: str) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-k", "triton", "--shard", shard, "-p", "no:cacheprovider"]
    done = subprocess.run(
        [*command, *(f"tests/{name}.py" for name in names)],
        cwd=ROOT,
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " passed" in done.stdout


def test_every_file_that_needs_the_interpreter_is_started() -> None:
    """Those that skip themselves elsewhere, and those with cases for every backend of an op."""
    tests, wanted = ROOT / "tests", ("\nOP = ", "needs TRITON_INTERPRET=1")
    found = [*(tests / "ops").glob("test_*.py"), *(tests / "triton").glob("test_*.py")]
    found = [path for path in found if any(words in path.read_text() for words in wanted)]
    names = {path.relative_to(tests).with_suffix("").as_posix() for path in found}
    assert names - {"triton/test_interpreted"} <= FILES
