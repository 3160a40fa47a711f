"""Run the tests of the PEFT plug-in under several versions of PEFT: `make conformance`.

Each version, with the transformers that it goes with, is laid over this environment as a folder of packages, so that
torch is there once. The versions in the table are those that the tests themselves imported.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

from tests import ROOT

FOLDER = ROOT / ".conformance"
OLD = [
    *("transformers==4.57.6", "tokenizers==0.22.1", "huggingface-hub==0.36.0"),
    *("requests==2.34.2", "urllib3==2.8.0", "certifi==2026.10.18", "charset-normalizer==3.5.2"),
]
PAIRS = {"0.18.1": OLD, "0.19.1": OLD, "0.20.0": [], "0.21.2": []}
TESTS = "peft/test_*.py"
VERSIONS = "import json, peft, transformers, torch; print(json.dumps([peft.__version__, transformers.__version__]))"
COUNTS = ("passed", "failed", "error", "skipped")


def install(version: str, others: list[str]) -> Path:
    """The folder with this version of PEFT, made on the first call."""
    folder = FOLDER / f"peft-{version}"
    if not (folder / ".ready").exists():
        pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--quiet", "--no-deps"]
        subprocess.run([*pip, "--target", str(folder), f"peft=={version}", *others], check=True)
        (folder / ".ready").touch()
    return folder


def test(folder: Path, arguments: list[str]) -> dict[str, str]:
    """What was imported, and how many tests passed, failed and were skipped."""
    path = os.pathsep.join([str(folder), str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path}
    run = {"cwd": ROOT, "env": environment, "text": True, "capture_output": True}
    versions = json.loads(subprocess.run([sys.executable, "-c", VERSIONS], check=True, **run).stdout)
    files = sorted(str(path) for path in (ROOT / "tests").glob(TESTS))
    done = subprocess.run([sys.executable, "-m", "pytest", "-q", "--tb=short", *files, *arguments], **run)
    (folder / "pytest.log").write_text(done.stdout + done.stderr)
    summary = done.stdout.strip().splitlines()[-1] if done.stdout.strip() else ""
    counts = {name: re.search(rf"(\d+) {name}", summary) for name in COUNTS}
    found = {name: match.group(1) if match else "0" for name, match in counts.items()}
    if not any(map(int, found.values())):
        found["error"] = f"pytest ended with {done.returncode}"
    return {"peft": versions[0], "transformers": versions[1], **found}


def main(arguments: list[str]) -> int:
    """One row for each version; 1 where a test failed. The arguments go to pytest."""
    header = ("peft", "transformers", *COUNTS)
    lines = [f"| {' | '.join(header)} |", "|---" * len(header) + "|"]
    bad = 0
    for version, others in PAIRS.items():
        result = test(install(version, others), arguments)
        bad += result["failed"] != "0" or result["error"] != "0"
        lines.append(f"| {' | '.join(result[name] for name in header)} |")
        print(lines[-1], flush=True)
    (FOLDER / "RESULTS.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines), f"\nlogs and this table: {FOLDER}")
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
