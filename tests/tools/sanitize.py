"""``make sanitize``: the C++ kernels under AddressSanitizer and UndefinedBehaviorSanitizer.

Builds them in a folder of their own, checks that a planted read past an end is reported, and runs the kernels' tests.
Linux with gcc.
"""

import os
import subprocess
import sys

from tests import ROOT

BUILT = ROOT / "build" / "sanitize"
FLAGS = "-fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer -g1"
TESTS = (
    "cpp_shapes",
    "encode",
    "divergence",
    "geometry",
    "reconstruct",
    "layer",
    "layer_bounds",
    "layer_dropout",
    "layer_edges",
    "step",
)
# no statistics, no torch.compile: slow, and no code of ours
WANTED = "(cpp or every_dtype or compiled) and not (distribution or compiles or compiled_autograd)"

PLANTED = """
import torch
from fvae_kernels import _C
assert "sanitize" in _C.__file__, f"the wrong build was loaded: {_C.__file__}"
long, short = torch.zeros(5, 3), torch.zeros(5, 2)
torch.ops.fvae_cpp.divergence_fwd(long, long, long, long, 1.5, 1.0, None)
print("before", flush=True)
torch.ops.fvae_cpp.divergence_fwd(long, long, short, long, 1.5, 1.0, None)
"""


def build() -> None:
    """Compile into a folder of its own, unless nothing changed."""
    flags = {"CXXFLAGS": FLAGS, "LDFLAGS": FLAGS}
    command = [sys.executable, "setup.py", "--quiet", "build", "--build-base", str(BUILT), "--build-lib", str(BUILT)]
    subprocess.run(command, cwd=ROOT, env=os.environ | flags, check=True)
    if not list(BUILT.glob("fvae_kernels/_C*")):
        sys.exit("the sanitized library was not built; see above")


def environment() -> dict[str, str]:
    """The sanitizer's library is loaded first; leaks are not reported, because Python has some of its own."""
    libraries = [_library("libasan.so"), _library("libstdc++.so")]
    return os.environ | {
        "LD_PRELOAD": " ".join(libraries),
        "ASAN_OPTIONS": "detect_leaks=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
    }


def _library(name: str) -> str:
    found = subprocess.run(["gcc", f"-print-file-name={name}"], capture_output=True, text=True, check=True)
    return found.stdout.strip()


def check_that_errors_are_seen() -> None:
    """Call a raw op with a tensor that is too short. Unless that stops the process, the tests prove nothing."""
    done = subprocess.run(
        [sys.executable, "-c", PLANTED], cwd=BUILT, env=environment(), capture_output=True, text=True, check=False
    )
    if done.returncode == 0 or done.stdout != "before\n" or "heap-buffer-overflow" not in done.stderr:
        sys.exit(f"the planted read past the end of a tensor was not seen:\n{done.stdout}{done.stderr}")


def main() -> int:
    """Build, check, test."""
    build()
    check_that_errors_are_seen()
    files = [str(ROOT / "tests" / "ops" / f"test_{name}.py") for name in TESTS]
    pytest = [
        sys.executable,
        "-m",
        "pytest",
        "-p",
        "no:cacheprovider",
        "-q",
        "--capture=sys",
        "-k",
        WANTED,
        *files,
        *sys.argv[1:],
    ]
    # Imports are from the working folder. --capture=sys, because a sanitizer writes to the descriptor and exits.
    return subprocess.run(pytest, cwd=BUILT, env=environment(), check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
