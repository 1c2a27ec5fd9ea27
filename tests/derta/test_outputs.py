"""Outputs appear whole, in folders that can hold them, with a record a line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, strategies as st

from derta.outputs import check_file, check_folder, check_new_file, compact_json, write_whole

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=12,
)


@given(VALUES, st.integers(0, 4))
def test_compact_json_reads_as_what_was_written(value: object, depth: int) -> None:
    assert json.loads(compact_json(value, depth)) == value


def test_compact_json_has_a_line_for_each_record() -> None:
    text = compact_json({"rows": {"a": [1, [2, 3]], "b": {"c": 4}}, "seeds": []}, 2)
    assert text.splitlines() == [
        "{",
        ' "rows": {',
        '  "a": [1, [2, 3]],',
        '  "b": {"c": 4}',
        " },",
        ' "seeds": []',
        "}",
    ]
    with pytest.raises(ValueError, match="JSON compliant"):
        compact_json({"a": [float("nan")]})


def test_a_file_that_cannot_be_written_leaves_the_former_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "result.json"
    write_whole(path, b"former")
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        write_whole(path, b"new")
    assert path.read_bytes() == b"former" and list(tmp_path.iterdir()) == [path]


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    check_folder("output_dir", str(tmp_path / "new" / "folder"))
    with pytest.raises(
        ValueError, match="^output_dir: .*file/new: .*file is a file, expected a fo"
    ):
        check_folder("output_dir", str(tmp_path / "file" / "new"))


def test_a_file_needs_a_folder_and_a_new_one_replaces_nothing(tmp_path: Path) -> None:
    there = tmp_path / "there.json"
    there.write_text("mine")
    check_file("output", str(there))
    check_new_file("output", str(tmp_path / "new.json"))
    with pytest.raises(ValueError, match="^output: .*there.json is there already, choose another"):
        check_new_file("output", str(there))
    for check in (check_file, check_new_file):
        with pytest.raises(ValueError, match="^output: .*none/a.json: .*none is no folder$"):
            check("output", str(tmp_path / "none" / "a.json"))
    with pytest.raises(ValueError, match="^output: .* is a folder, expected a file$"):
        check_file("output", str(tmp_path))
