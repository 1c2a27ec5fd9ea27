"""No damage to a file makes a row into a different record."""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from hypothesis import HealthCheck, given, settings, strategies as st

from derta.data import FORMATS, KINDS, ROLES, Dialogue, Reading, Rendered, Triple
from derta.data.records.formats import COLUMNS
from derta.data.records.reading import Wanted, read_placed
from public_rows import CONTAINERS, PACKINGS, ROWS, Row, contain, harmful, safe

TEXTS = ('"', ",", "\n", "\r\n", "'", "\\", "{", "ä", "\u2028", "\ufeff")


def damage(draw: st.DrawFn, format: str, row: Row, n: int) -> None:
    """Damage the row of a format in one of the ways seen in real files."""
    name = draw(st.sampled_from(sorted(row)))
    value = row[name]
    what = draw(st.sampled_from(["type", "blank", "unusable", "quoting", "absent", "foreign"]))
    if what == "type":
        row[name] = draw(st.sampled_from([None, 3, 0.5, True, False, [], ["x"], {}, {"a": "b"}]))
    elif what == "blank":
        row[name] = draw(st.sampled_from(["", " ", "\n"]))
    elif what == "unusable":
        row[name] = f"{value}" + draw(st.sampled_from(["\0", "\ud800", "\udfff"]))
    elif what == "quoting" and isinstance(value, str):
        row[name] = value + draw(st.sampled_from(TEXTS))
    elif what == "absent":
        del row[name]
    elif what == "foreign":
        other = draw(st.sampled_from(sorted(ROWS.keys() - {format})))
        row.update({key: v for key, v in ROWS[other](n)[0].items() if key not in row})


@st.composite
def written(draw: st.DrawFn, mapped: bool) -> tuple[str, Wanted, list[Row], bytes]:
    """Draw a format, a purpose, rows, and the file that holds them, under other names if mapped."""
    name = draw(st.sampled_from(sorted(FORMATS)))
    purpose = draw(st.sampled_from(sorted(FORMATS[name].readers) * 3 + [*ROLES, *KINDS]))
    numbered = [(n, row) for n in range(1, 5) for row in ROWS[name](n)]
    for n, row in draw(st.lists(st.sampled_from(numbered), max_size=2)):
        if row:
            damage(draw, name, row, n)
    rows = [row for _, row in numbered]
    columns = {}
    if mapped:
        columns = {field: f"x {field}" for field in ROWS[name](1)[0] if field in COLUMNS}
        rows = [{columns.get(key, key): value for key, value in row.items()} for row in rows]
    container = draw(st.sampled_from(CONTAINERS))
    packing = draw(st.sampled_from(sorted(PACKINGS)))
    try:
        data = contain(rows, container)
    except (pyarrow.ArrowException, UnicodeEncodeError):  # mixed types or surrogates
        data = contain(rows, "jsonl")
    data = PACKINGS[packing](data)
    how = draw(st.sampled_from(["whole"] * 4 + ["cut", "cut", "patched"]))
    place = draw(st.integers(0, len(data)))
    if how == "cut":
        data = data[:place]
    elif how == "patched":  # with bytes that no text holds
        data = data[:place] + b"\xff" + data[place + 1 :]
    try:
        return name, Wanted(purpose, None, columns), rows, data
    except ValueError:  # the purpose is not the format's
        return name, Wanted(purpose), rows, data


def item(text: str) -> str | None:
    """Return the item that a prompt asks about; None if that part is lost."""
    found = re.search(r"fence (\d)", text)
    return found and found[1]


def check(text: str, kind: str, n: str | None) -> None:
    """Check that the text names no other item or kind; in CSV, it may be lost."""
    for said in re.findall(r"(safe|harmful|helpful|prefill) (\d)", text):
        assert said == (kind, n or said[1])


def is_chosen(record: Any, rows: list[Row]) -> bool:
    """Return True for a preference's answer, which foreign fields can make of a bare prompt."""
    if isinstance(record, Dialogue):
        answer = record.messages[-1]["content"]
    else:
        answer = getattr(record, "response", "")
    chosen = (row.get("chosen", row.get("x chosen")) for row in rows)
    return bool(answer) and any(answer in f"{one}" for one in chosen)


def check_record(record: Any, name: str, purpose: str) -> None:
    """Check that the record matches its own texts and the purpose."""
    if isinstance(record, Triple):
        assert purpose == "safety"
        check(record.safe, "safe", item(record.prompt))
        check(record.harmful, "harmful", item(record.prompt))
    elif isinstance(record, Dialogue):
        assert purpose in ("helpful", "borderline")
        assert record.borderline == (purpose == "borderline")
        kind = "safe" if name.endswith("preference") else "helpful"
        check(record.messages[-1]["content"], kind, item(record.messages[-2]["content"]))
    elif isinstance(record, Rendered):
        assert purpose in ("safety", "helpful") and not (record.rto and purpose == "helpful")
        check(record.text, "harmful" if record.rto else "helpful", item(record.prefix))
    else:
        assert purpose in KINDS
        if record.response:
            kind = "safe" if name.endswith("preference") else "helpful"
            check(record.response, "harmful" if purpose == "harmful" else kind, item(record.prompt))
        if record.prefill:
            kind = "helpful" if name == "instruction_target" else "prefill"
            check(record.prefill, kind, item(record.prompt))
        if name == "xstest" and record.category:  # a row without a type is a bare prompt
            assert record.category.startswith("contrast_") == (purpose == "harmful")


@pytest.mark.parametrize(
    ("mapped", "files"),
    [(False, 700), (True, 200), pytest.param(True, 1500, marks=pytest.mark.slow)],
)
def test_no_damage_turns_a_row_into_a_different_record(
    tmp_path: Path, mapped: bool, files: int
) -> None:
    figures: Counter[str] = Counter()
    path = tmp_path / "rows"

    @settings(
        max_examples=files,
        derandomize=True,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(written(mapped))
    def fuzz(case: tuple[str, Wanted, list[Row], bytes]) -> None:
        name, wanted, rows, data = case
        path.write_bytes(data)
        reading = Reading()
        for place, found in read_placed([path], wanted, reading):
            if isinstance(found, ValueError):
                message = str(found)
                assert message.startswith(f"{path}:") and "\n" not in message
                assert not re.search(r"ladder|coats|quickly|Sorry, I", message), "quotes a text"
                figures["errors"] += 1
            else:
                assert place.startswith(f"{path}:")
                kind = "preference" if is_chosen(found, rows) else name
                check_record(found, kind, wanted.purpose or "")
                figures["records"] += 1
        (counts,) = reading.files.values()
        figures.update(files=1, rows=len(rows), skipped=counts.skipped.total())

    fuzz()
    print(f"\nfuzzed: {dict(figures)}")
    assert figures["rows"] >= 4 * files and figures["files"] >= files
    assert min(figures["records"], figures["errors"]) >= files / 7 and figures["skipped"] > 0


@pytest.mark.parametrize("container", CONTAINERS)
@pytest.mark.parametrize("name", [name for name, form in FORMATS.items() if form.columns])
def test_swapped_columns_are_an_error_in_every_row(
    tmp_path: Path, name: str, container: str
) -> None:
    one, other = FORMATS[name].columns or ("", "")
    rows = [{**row, one: row[other], other: row[one]} for n in range(9) for row in ROWS[name](n)]
    if container == "table" and isinstance(rows[0][one], dict):
        return  # a table of lists has no objects
    (tmp_path / "rows").write_bytes(contain(rows, container))
    found = [record for _, record in read_placed([tmp_path / "rows"], Wanted("safety"))]
    assert len(found) == len(rows) and all(isinstance(record, ValueError) for record in found)


def test_a_wrong_record_would_be_noticed() -> None:
    """The check above can fail."""
    triple = Triple(prompt="How do I paint fence 7?", safe=safe(7), harmful=harmful(7), id="x")
    check_record(triple, "triple", "safety")
    for wrong in ({"safe": harmful(7)}, {"harmful": safe(7)}, {"safe": safe(8)}):
        with pytest.raises(AssertionError):
            check_record(dataclasses.replace(triple, **wrong), "triple", "safety")
