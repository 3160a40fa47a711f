"""The compatibility table of docs/works_with.md has a row for each `compat` mark, and no others."""

from pathlib import Path

import pytest

from tests.tools import compat


def test_the_table_of_the_page_is_that_of_the_tests() -> None:
    written, expected = compat.in_page(compat.PAGE.read_text()), compat.table(compat.marks())
    assert written == expected, "python -m tests.tools.compat writes the table anew"
    assert expected.count("\n") > 10


def test_rows_are_read_from_functions_and_modules(tmp_path: Path) -> None:
    (tmp_path / "test_a.py").write_text(
        'pytestmark = [pytest.mark.compat("PEFT", "merge")]\n\n\n'
        '@pytest.mark.compat("PEFT", "save")\ndef test_x(): ...\n'
    )
    (tmp_path / "test_b.py").write_text('@pytest.mark.compat("PEFT", "save")\ndef test_y(): ...\n')
    found = compat.marks(tmp_path)
    assert found == {"PEFT": {"merge": {"test_a.py"}, "save": {"test_a.py", "test_b.py"}}}
    assert compat.table(found).splitlines()[2:] == [
        "| PEFT | merge | [a](../tests/test_a.py) |",
        "|  | save | [a](../tests/test_a.py), [b](../tests/test_b.py) |",
    ]
    (tmp_path / "test_b.py").write_text("@pytest.mark.compat(GROUP)\ndef test_y(): ...\n")
    with pytest.raises(ValueError, match=r"test_b\.py:1: compat takes a group and a row"):
        compat.marks(tmp_path)


def test_the_page_has_one_table() -> None:
    with pytest.raises(ValueError, match="has 0 blocks"):
        compat.in_page("nothing")
    assert compat.in_page(f"a\n{compat.BEGIN}\nrows\n{compat.END}\nb") == "rows"
