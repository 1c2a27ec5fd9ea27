"""The table of refusal tokens is what is found."""

from __future__ import annotations

from pathlib import Path

import pytest

from families import FAMILIES, rows

PAGE = Path(__file__).parents[4] / "docs" / "guides" / "model.md"


def table() -> list[str]:
    lines = PAGE.read_text(encoding="utf-8").splitlines()
    start = next(place for place, line in enumerate(lines) if line.startswith("| family |")) + 2
    return lines[start : start + len(FAMILIES)]


def test_the_table_has_a_row_for_each_family() -> None:
    assert [row.split("|")[1].strip() for row in table()] == [one.name for one in FAMILIES]


@pytest.mark.slow
def test_the_table_of_refusal_tokens_is_what_is_found() -> None:
    found = list(rows())
    if not found:
        pytest.skip("no package with a tokenizer is installed, see families.py")
    listed = dict(zip(FAMILIES, table(), strict=True))
    for family, row in found:
        assert listed[family] == row
