"""Blocks of a page that a command writes, between two marks; and rows of a table."""

import re
from collections.abc import Sequence
from pathlib import Path


def row(cells: Sequence[str]) -> str:
    """A row of a markdown table."""
    return "| " + " | ".join(cells) + " |"


def block(page: Path, mark: str) -> list[str]:
    """The lines of a block.

    Raises:
        ValueError: the page has no such block.
    """
    return _parts(page, mark)[1].strip("\n").split("\n")


def replace_block(page: Path, mark: str, lines: Sequence[str]) -> None:
    """Write the lines into the block; ValueError as for `block`."""
    before, _, after = _parts(page, mark)
    page.write_text("\n".join([before, *lines, after]))


def _parts(page: Path, mark: str) -> tuple[str, str, str]:
    """The page up to the opening line of the block, the block, and the rest."""
    found = re.fullmatch(
        rf"(.*<!-- begin {mark}\b[^\n]*-->)\n(.*?)\n?(<!-- end {mark} -->.*)", page.read_text(), re.DOTALL
    )
    if found is None:
        raise ValueError(
            f"{page.name} has no block {mark!r}; expected `<!-- begin {mark} -->` ... `<!-- end {mark} -->`"
        )
    before, inside, after = found.groups()
    return before, inside, after
