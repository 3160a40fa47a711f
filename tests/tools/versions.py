"""Run the tests with the versions that people have: `make versions` writes the table of docs/versions.md.

A row with a Python gets an environment of its own: that Python, the row's packages, a copy of this checkout with the
C++ kernels built in it. The packages of any other row are laid over this environment as a folder, so that torch is
there once. The versions in the table are those that the tests themselves imported. Rows that are not run stay as they
were.

python -m tests.tools.versions [--only ROW ...] [--list] [arguments of pytest ...]
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.machine import commit
from benchmarks.pages import block, replace_block, row
from tests import ROOT

FOLDER = ROOT / ".versions"
PAGE = ROOT / "docs" / "versions.md"
MARK = "versions"

TRANSFORMERS_4 = (
    *("transformers==4.57.6", "tokenizers==0.22.1", "huggingface-hub==0.36.0"),
    *("datasets==4.4.1", "httpx==0.28.1", "httpcore==1.0.9"),
    *("requests==2.34.2", "urllib3==2.8.0", "certifi==2026.10.18", "charset-normalizer==3.5.2"),
)
NEEDED = ("transformers", "peft", "pytest", "hypothesis", "setuptools>=77,<82", "wheel", "numpy>=2")  # torch: below 82
CORE = (  # of a torch: the ops, layers in all their forms, compiled ones, files, Trainer, launches
    *(f"tests/ops/test_{name}.py" for name in ("encode", "divergence", "geometry", "reconstruct", "no_waiting")),
    *("tests/ops/test_host.py", "tests/ops/test_step.py"),
    *(f"tests/ops/test_layer{name}.py" for name in ("", "_base", "_plan", "_edges", "_composed")),
    *("tests/nn/test_linear.py", "tests/peft/test_use.py", "tests/peft/test_saving.py", "tests/peft/test_files.py"),
    *(f"tests/training/test_{name}.py" for name in ("aux_loss", "aux_loss_compile", "trainer", "trainer_total_loss")),
    *("tests/triton/test_ahead.py", "tests/triton/test_launch.py", "-k", "not inductor and not processes"),
)
OLDER = (  # of a torch that is too old for the kernels: everything runs as plain PyTorch
    *(
        "tests/ops/test_versions.py",
        "tests/ops/test_layer.py",
        "tests/ops/test_layer_edges.py",
        "tests/nn/test_linear.py",
    ),
    *("tests/peft/test_use.py", "tests/training/test_aux_loss.py", "tests/training/test_trainer.py"),
)
TRAINER = ("tests/training/test_trainer.py", "tests/training/test_trainer_total_loss.py")
PLUGIN = ("tests/peft", "tests/serving", "tests/interop", "tests/nn/test_linear.py", *TRAINER)
COMPILE = (
    *("tests/triton/test_ahead.py", "tests/triton/test_launch.py", "tests/triton/test_compile.py"),
    *("-k", "not (gfx942 or sm_80 or sm_100 or sm_90-many or oldest or processes)"),
)


@dataclass(frozen=True)
class Row:
    """Packages to test with, the Python of an environment of their own if they get one, and the tests."""

    packages: tuple[str, ...]
    tests: tuple[str, ...] = PLUGIN
    python: str | None = None
    kernels: bool = True  # False: the C++ kernels are not built, since this torch is too old for them


ROWS = {
    "torch 2.10, Python 3.10": Row(("torch==2.10.0", *NEEDED), OLDER, "3.10", kernels=False),
    "torch 2.11, Python 3.12": Row(("torch==2.11.0", *NEEDED), CORE, "3.12"),
    "torch 2.12, Python 3.13": Row(("torch==2.12.1", *NEEDED), CORE, "3.13"),
    "torch 2.14, Python 3.11": Row(("torch==2.14.1", *NEEDED), CORE, "3.11"),
    "peft 0.18, transformers 4": Row(("peft==0.18.1", *TRANSFORMERS_4)),
    "peft 0.19, transformers 4": Row(("peft==0.19.1", *TRANSFORMERS_4)),
    "peft 0.20, transformers 4": Row(("peft==0.20.0", *TRANSFORMERS_4)),
    "peft 0.20, transformers 5": Row(("peft==0.20.0",)),
    "Triton 3.6": Row(("triton==3.6.0",), COMPILE),
    "Triton 3.7": Row(("triton==3.7.1",), COMPILE),
}
SETTINGS = {"HYPOTHESIS_PROFILE": "few", "OMP_NUM_THREADS": "1"}  # few examples: versions differ in other things
SHOWN = ("torch", "triton", "transformers", "peft", "numpy")
VERSIONS = f"""
import json, platform
from importlib.metadata import version
found = dict(python=platform.python_version())
for name in {SHOWN}:
    found[name] = getattr(__import__(name), "__version__")
print(json.dumps(found))
"""
COUNTS = ("passed", "failed", "error", "skipped")
HEADER = ("versions", "Python", "torch", "Triton", "transformers", "peft", "numpy", *COUNTS, "commit")


def overlay(folder: Path, packages: Sequence[str]) -> tuple[str, Path, str]:
    """Python, checkout and search path of a row over this environment, made on the first call."""
    site = folder / "site"
    if packages and not (folder / ".ready").exists():
        _pip(sys.executable, "--no-deps", "--target", str(site), *packages)
        (folder / ".ready").touch()
    return sys.executable, ROOT, os.pathsep.join([str(site), str(ROOT)])


def environment(folder: Path, packages: Sequence[str], version: str, kernels: bool) -> tuple[str, Path, str]:
    """The same of a row in an environment of its own.

    Its copy of the checkout is made anew on every call; the C++ kernels in it are built again where their sources are
    newer.
    """
    python = folder / "env" / "bin" / "python"
    if not (folder / ".ready").exists():
        subprocess.run([_interpreter(version), "-m", "venv", str(folder / "env")], check=True)
        _pip(str(python), *packages)
        (folder / ".ready").touch()
    source, before = folder / "source", folder / "before"
    shutil.rmtree(before, ignore_errors=True)
    if source.exists():
        source.rename(before)
    listed = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, check=True, **_TEXT).stdout
    for name in listed.splitlines():
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, source / name)
    sources = max(path.stat().st_mtime for path in (source / "setup.py", *source.glob("csrc/*")))
    library = next(before.glob("fvae_kernels/_C*.so"), None)
    if library is not None and library.stat().st_mtime > sources:
        shutil.copy2(library, source / "fvae_kernels")
    elif kernels:
        _build(str(python), source, folder / "build.log")
    return str(python), source, str(source)


def _build(python: str, source: Path, log: Path) -> None:
    built = subprocess.run([python, "setup.py", "-q", "build_ext", "--inplace"], cwd=source, check=False, **_TEXT)
    log.write_text(built.stdout + built.stderr)
    built.check_returncode()


_TEXT = {"text": True, "capture_output": True}


def _pip(python: str, *arguments: str) -> None:
    subprocess.run([python, "-m", "pip", "--disable-pip-version-check", "install", "--quiet", *arguments], check=True)


def _interpreter(version: str) -> str:
    """The command of this Python.

    Raises:
        FileNotFoundError: there is none on the path.
    """
    if sys.version_info[:2] == tuple(map(int, version.split("."))):
        return sys.executable
    found = shutil.which(f"python{version}")
    if found is None:
        raise FileNotFoundError(f"no python{version} on the path")
    return found


def run(name: str, arguments: Sequence[str]) -> dict[str, str]:
    """The cells of one row: what was imported, and how many tests passed, failed and were skipped."""
    tested = commit()  # now: an environment has a copy of these sources
    wanted, folder = ROWS[name], FOLDER / re.sub(r"[^\w.]+", "-", name)
    folder.mkdir(parents=True, exist_ok=True)
    if wanted.python is None:
        python, checkout, path = overlay(folder, wanted.packages)
    else:
        python, checkout, path = environment(folder, wanted.packages, wanted.python, wanted.kernels)
    where = {"cwd": checkout, "env": os.environ | SETTINGS | {"PYTHONPATH": path}}
    versions = json.loads(subprocess.run([python, "-c", VERSIONS], check=True, **where, **_TEXT).stdout)
    done = subprocess.run([python, "-m", "pytest", "-q", "--tb=short", *wanted.tests, *arguments], **where, **_TEXT)
    (folder / "pytest.log").write_text(done.stdout + done.stderr)
    summary = done.stdout.strip().splitlines()[-1] if done.stdout.strip() else ""
    counts = {kind: re.search(rf"(\d+) {kind}", summary) for kind in COUNTS}
    found = {kind: match.group(1) if match else "0" for kind, match in counts.items()}
    if not any(map(int, found.values())):
        found["error"] = f"pytest ended with {done.returncode}"
    titles = dict(zip(("python", *SHOWN), HEADER[1:], strict=False))
    return {
        "versions": name,
        **{titles[key]: version for key, version in versions.items()},
        **found,
        "commit": tested,
    }


def write(results: dict[str, dict[str, str]], page: Path = PAGE) -> None:
    """The table, with the lines of rows that were not run now as they were."""
    before = {line.split(" | ")[0].removeprefix("| "): line for line in block(page, MARK) if line}
    lines = [row(HEADER), row(["---"] * len(HEADER))]
    for name in ROWS:
        never = row([name, *["not run"] * (len(HEADER) - 1)])
        lines.append(row([results[name][key] for key in HEADER]) if name in results else before.get(name, never))
    replace_block(page, MARK, lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """1 where a test failed or a row could not be set up."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(ROWS), metavar="ROW", help="these rows")
    parser.add_argument("--list", action="store_true", help="print the rows and end")
    options, others = parser.parse_known_args(arguments)
    if options.list:
        print("\n".join(ROWS))
        return 0
    results: dict[str, dict[str, str]] = {}
    failed = False
    for name in options.only or ROWS:
        try:
            results[name] = run(name, others)
        except (OSError, subprocess.CalledProcessError) as error:
            print(f"{name}: not run: {error}", flush=True)
            failed = True
            continue
        failed |= results[name]["failed"] != "0" or results[name]["error"] != "0"
        print(row([results[name][key] for key in HEADER]), flush=True)
        write(results)
    print(f"the table is in {PAGE}, environments and logs in {FOLDER}")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
