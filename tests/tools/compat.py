"""The compatibility table of docs/works_with.md, from marks on tests: `python -m tests.tools.compat` writes it.

A test (or a whole module, by `pytestmark`) that proves a row carries ``@pytest.mark.compat("Processes", "DDP, 2
processes")``: the group and the row. Rows of several tests are listed once, with all of their files.
"""

import ast
import re
import sys
from pathlib import Path

from tests import ROOT

PAGE = ROOT / "docs" / "works_with.md"
BEGIN, END = "<!-- compatibility: python -m tests.tools.compat -->", "<!-- end of compatibility -->"


def marks(folder: Path = ROOT / "tests") -> dict[str, dict[str, set[str]]]:
    """Group -> row -> files whose tests carry the mark, read from the sources: nothing is imported or run.

    Raises:
        ValueError: for a mark without two literal strings.
    """
    found: dict[str, dict[str, set[str]]] = {}
    for path in sorted(folder.rglob("test_*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "pytest.mark.compat":
                words = [a.value for a in node.args if isinstance(a, ast.Constant) and isinstance(a.value, str)]
                if len(words) != 2 or len(node.args) != 2:
                    raise ValueError(f"{path.name}:{node.lineno}: compat takes a group and a row, as literal strings")
                found.setdefault(words[0], {}).setdefault(words[1], set()).add(path.relative_to(folder).as_posix())
    return found


def table(found: dict[str, dict[str, set[str]]]) -> str:
    """The block between the markers of the page."""
    lines = ["| | works | tests |", "|---|---|---|"]
    for group, rows in sorted(found.items()):
        for i, (row, files) in enumerate(sorted(rows.items())):
            links = ", ".join(f"[{label(name)}](../tests/{name})" for name in sorted(files))
            lines.append(f"| {group if i == 0 else ''} | {row} | {links} |")
    return "\n".join(lines)


def label(name: str) -> str:
    """The text of the link to a file of tests: "peft saving" for `peft/test_saving.py`."""
    path = Path(name)
    return " ".join([*path.parts[:-1], path.stem.removeprefix("test_")])


def in_page(text: str) -> str:
    """The text between the markers.

    Raises:
        ValueError: unless there is exactly one pair of them.
    """
    blocks = re.findall(f"{re.escape(BEGIN)}\n(.*?)\n?{re.escape(END)}", text, re.DOTALL)
    if len(blocks) != 1:
        raise ValueError(f"{PAGE.name} has {len(blocks)} blocks of {BEGIN}; expected one")
    return blocks[0]


def main() -> int:
    """Write the table into the page."""
    text = PAGE.read_text()
    in_page(text)  # raises unless there is one such block
    before, _, rest = text.partition(BEGIN)
    PAGE.write_text(f"{before}{BEGIN}\n{table(marks())}\n{END}{rest.partition(END)[2]}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
