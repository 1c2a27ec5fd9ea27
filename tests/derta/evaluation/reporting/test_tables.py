"""Tables fit a reader's view and name every figure."""

from __future__ import annotations

from derta.evaluation.reporting.tables import MISSING, Cell, Column, Table, to_html, to_text


def table(*groups: tuple[str, int]) -> Table:
    columns = [Column(f"{group}{nth}", group) for group, size in groups for nth in range(size)]
    return Table(columns, {"model": [Cell(str(nth)) for nth in range(len(columns))]})


def test_a_group_moves_to_the_next_table_whole() -> None:
    first, second = to_text(table(("a", 8), ("b", 5))).split("\n\n")
    assert first.splitlines()[-1].split() == ["model", *map(str, range(8))]
    assert second.splitlines()[-1].split() == ["model", *map(str, range(8, 13))]


def test_a_group_too_wide_for_one_table_is_split() -> None:
    wide = table(("a", 14), ("b", 2))
    first, second = to_text(wide).split("\n\n")
    assert [line.split()[0] for line in first.splitlines()] == ["a", "%", "model"]
    assert first.splitlines()[-1].split() == ["model", *map(str, range(12))]
    assert second.splitlines()[0].split() == ["a", "b"]
    assert second.splitlines()[-1].split() == ["model", "12", "13", "14", "15"]
    assert to_html(wide, {}).count("<table") == 2


def test_columns_widen_until_the_heading_above_them_fits() -> None:
    columns = [Column("x", "a long heading"), Column("y", "a long heading"), Column("z")]
    assert to_text(Table(columns, {"m": [Cell("1"), MISSING, Cell("3")]})).splitlines() == [
        "   a long heading",
        "%       x       y  z",
        "m       1       –  3",
    ]


def test_a_table_without_groups_has_one_line_of_headings() -> None:
    assert to_text(table(("", 1))).splitlines() == ["%      0", "model  0"]
    assert to_html(table(("", 1)), {}).count("<tr>") == 2


def test_a_table_without_columns_is_empty() -> None:
    assert to_text(table()) == ""
    assert to_html(table(), {}) == ""


def test_a_negative_figure_has_a_minus_sign_on_the_page() -> None:
    assert "<td>−1</td>" in to_html(Table([Column("x")], {"m": [Cell("-1")]}), {})
