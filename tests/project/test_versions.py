"""The table of versions: its rows, what stays of rows that are not run, and environments that cannot be had."""

from pathlib import Path

import pytest

from benchmarks.pages import block
from fvae_kernels.ops import _versions
from tests import ROOT
from tests.tools import versions

EMPTY = f"# Versions\n\n<!-- begin {versions.MARK}: make versions -->\n<!-- end {versions.MARK} -->\n"


def line(name: str, cell: str) -> dict[str, str]:
    return dict.fromkeys(versions.HEADER, cell) | {"versions": name}


def names(page: Path) -> list[str]:
    return [text.split(" | ")[0].removeprefix("| ") for text in block(page, versions.MARK)[2:]]


def test_the_page_has_the_rows_of_the_tool() -> None:
    assert names(versions.PAGE) == list(versions.ROWS), "make versions writes the table anew"


def test_the_page_says_what_is_declared() -> None:
    page = versions.PAGE.read_text()
    for package, oldest in (("torch", _versions.TORCH), ("Triton", _versions.TRITON)):
        assert f"| {package} | {'.'.join(map(str, oldest))} and newer" in page
    declared = (ROOT / "pyproject.toml").read_text()
    for package, oldest in (("transformers", "4.57"), ("peft", "0.20"), ("setuptools", "77"), ("python", "3.10")):
        assert f"| {package.replace('python', 'Python')} | {oldest} and newer" in page
        assert f"{package}>={oldest}" in declared or f'requires-{package} = ">={oldest}"' in declared


def test_rows_that_are_not_run_stay(tmp_path: Path) -> None:
    page, (first, second, *_) = tmp_path / "page.md", versions.ROWS
    page.write_text(EMPTY)
    versions.write({first: line(first, "1")}, page)
    versions.write({second: line(second, "2")}, page)
    assert names(page) == list(versions.ROWS)
    _, _, one, two, three, *_ = block(page, versions.MARK)
    assert one.startswith(f"| {first} | 1 | 1 |")
    assert two.startswith(f"| {second} | 2 | 2 |")
    assert three.endswith("| not run | not run |")


def test_what_cannot_be_had_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    name = "torch 2.10, Python 3.10"
    monkeypatch.setattr(versions.shutil, "which", lambda _: None)
    monkeypatch.setattr(versions.sys, "version_info", (3, 99))
    monkeypatch.setattr(versions, "write", lambda *_: pytest.fail("nothing ran"))
    monkeypatch.setattr(versions, "FOLDER", tmp_path)
    assert versions.main(["--only", name]) == 1
    assert f"{name}: not run: no python3.10 on the path" in capsys.readouterr().out
