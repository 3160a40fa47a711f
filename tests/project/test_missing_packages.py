"""The suite is there where only torch, triton, transformers, peft, pytest and hypothesis are."""

import os
import subprocess
import sys

from tests import ROOT
from tests.helpers import without

COLLECT = ["-m", "pytest", "--collect-only", "-q", "-p", "tests.helpers.without", "-p", "no:cacheprovider", "tests"]


def test_every_module_is_collected_or_skipped_without_optional_packages() -> None:
    """No module fails to import; those that are skipped for a package name one that was hidden."""
    environment = os.environ | {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "FVAE_WITHOUT": "1"}
    done = subprocess.run(
        [sys.executable, *COLLECT], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    skipped = [line for line in done.stdout.splitlines() if "could not import" in line]
    assert skipped
    assert all(any(f"import '{name}" in line for name in without.OPTIONAL) for line in skipped), skipped
    assert done.stdout.count("::") > 1000
