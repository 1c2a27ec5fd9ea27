"""Files are read by the fields found in them, and a bad row is named by its place and field."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import pytest

from derta.data import Dialogue, Triple, read_records

ASK = {"role": "user", "content": "How?"}
SAY = {"role": "assistant", "content": "So."}
OWN = {"prompt": "How?", "safe": "Sorry.", "harmful": "Sure."}

# Each kind of row, and the record that it is when its id and source are "rows".
ROWS = {
    "own": (OWN, Triple(**OWN, id="rows", source="rows")),
    "own with messages": (
        {"messages": [SAY, ASK], "safe": "Sorry.", "harmful": "Sure.", "id": "a", "source": "b"},
        Triple(messages=[SAY, ASK], safe="Sorry.", harmful="Sure.", id="a", source="b"),
    ),
    "official triple": (
        {"instruction": "How?", "output": "Sure.", "safe_response": "Sorry.", "id": 7},
        Triple(**OWN, id="7", source="rows"),
    ),
    "official dialogue": (
        {"instruction": "How?", "output": "So."},
        Dialogue(messages=[ASK, SAY], id="rows", source="rows"),
    ),
    "conversation": (
        {"messages": [ASK, SAY]},
        Dialogue(messages=[ASK, SAY], id="rows", source="rows"),
    ),
    "own with remarks": (
        {**OWN, "category": ["x"], "score": 3},
        Triple(**OWN, id="rows", source="rows"),
    ),
}


def write(directory: Path, text: str | bytes) -> Path:
    path = directory / "rows.txt"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


@pytest.mark.parametrize("layout", ["line", "array", "bom"])
@pytest.mark.parametrize("kind", ROWS)
def test_the_fields_decide_and_not_the_name(tmp_path: Path, kind: str, layout: str) -> None:
    row, expected = ROWS[kind]
    text = {
        "line": json.dumps(row),
        "array": json.dumps([row]),
        "bom": "\ufeff" + json.dumps(row, ensure_ascii=False),
    }[layout]
    path = write(tmp_path, text)
    (record,) = read_records(path)
    if "id" not in row:
        assert record.id == f"{path}:1" + ("[0]" if layout == "array" else "")
        expected = dataclasses.replace(expected, id=record.id)
    assert record == expected


def test_rows_of_one_file_may_be_of_several_formats(tmp_path: Path) -> None:
    rows = [row for row, _ in ROWS.values()]
    path = write(tmp_path, "\n\r\n".join(map(json.dumps, rows)) + "\n\n")
    kinds = [type(record) for record in read_records(str(path))]
    assert kinds == [type(record) for _, record in ROWS.values()]


@pytest.mark.parametrize("nothing", ["", None])
def test_an_empty_field_that_no_format_reads_is_none(tmp_path: Path, nothing: str | None) -> None:
    row = {
        "instruction": "Q?",
        "input": nothing,
        "output": "A harmful one.",
        "safe_response": "No.",
    }
    (record,) = read_records(write(tmp_path, json.dumps(row)))
    assert isinstance(record, Triple) and record.messages[-1]["content"] == "Q?"


def test_separators_other_than_newlines_may_stand_in_a_text(tmp_path: Path) -> None:
    row = {**OWN, "prompt": "a\u2028b\u0085c\rd"}
    (record,) = read_records(write(tmp_path, json.dumps(row, ensure_ascii=False)))
    assert record.messages[0]["content"] == row["prompt"]


def ids(*paths: Path | str) -> list[str]:
    return [record.id for record in read_records(*paths, role="safety")]


def test_rows_without_an_id_are_called_by_their_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = write(tmp_path, "\n" + json.dumps(OWN) + "\n\n" + json.dumps(OWN))
    assert ids(lines) == [f"{lines}:2", f"{lines}:4"]
    array = write(tmp_path, "\n[\n" + ",\n\n".join([json.dumps(OWN, indent=1)] * 2) + "\n]\n")
    assert ids(array) == [f"{array}:3[0]", f"{array}:9[1]"]
    monkeypatch.chdir(tmp_path)
    assert ids("rows.txt") == ["rows.txt:3[0]", "rows.txt:9[1]"]


def test_rows_of_one_line_and_files_of_one_name_have_ids_of_their_own(tmp_path: Path) -> None:
    paths = [tmp_path / folder / "rows.json" for folder in ("a", "b")]
    for path in paths:
        path.parent.mkdir()
        path.write_text(json.dumps([OWN] * 3))
    assert ids(*paths) == [f"{path}:1[{index}]" for path in paths for index in range(3)]


@pytest.mark.parametrize("other", [7, "7"])
def test_an_id_given_twice_is_named_with_both_places(tmp_path: Path, other: int | str) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    first.write_text(json.dumps([OWN, {**OWN, "id": 7}]))
    second.write_text(json.dumps(OWN) + "\n\n" + json.dumps({**OWN, "id": other}))
    expected = f"{second}:3: id: '7' is that of {first}:1[1] too, expected one of its own"
    with pytest.raises(ValueError, match=f"^{re.escape(expected)}$"):
        ids(first, second)
    default = f"{first}:1[0]"
    second.write_text(json.dumps({**OWN, "id": default}))
    with pytest.raises(ValueError, match=re.escape(f"{second}:1: id: '{default}' is that of ")):
        ids(first, second)
    with pytest.raises(ValueError, match=re.escape(f"is that of {first}:1[0] too")):
        ids(first, first)


BAD = [
    ("", "1: no record, expected JSON Lines or a JSON array of records"),
    ("\n \n", "1: no record"),
    (" [ ] ", "1: no record"),
    ('\n{"prompt": ', "2: not JSON at column 12 .*, expected one object a line"),
    ("3", "1: row: is int, expected an object"),
    ("\n" + "[" * 100_000, "2: cannot be read .*recursion"),
    ('\n{"a":' * 100_000, "2: not JSON"),
    ('{"a":' * 100_000, "1: cannot be read .*recursion.*, expected one object a line"),
    ("9" * 5000, "1: cannot be read .*digits.*, expected one object a line"),
    ('[\n{"prompt"}]', "2: not JSON at column 10 .*, expected an array of objects"),
    ("[", "1: not JSON at column 2"),
    ('[3,\n"x"]', r"1\[0\]: row: is int, expected an object"),
    (f"[{json.dumps(OWN)}, 3]", r"1\[1\]: row: is int, expected an object"),
    (f"[{json.dumps(OWN)}\n", "2: the array breaks off, expected ',' or ']'"),
    (f"[{json.dumps(OWN)}\n{json.dumps(OWN)}]", "2: the array breaks off, expected ',' or ']'"),
    (f"[{json.dumps(OWN)},\n]", "2: not JSON at column 1"),
    (f"[{json.dumps(OWN)}\n]\n3", "3: text after the array, expected nothing"),
    (b'{\n"a": "\xff"}', "2: byte 0xff is not UTF-8, expected UTF-8 text"),
    ("{}", "1: fields: found none, which is no known format, expected harmful, messages, safe | "),
    ('{"question": 1}', "1: fields: found question, which is no known format"),
    (json.dumps({**OWN, "messages": [ASK]}), "1: fields: found harmful, messages, prompt, safe, "),
    (json.dumps({**OWN, "instruction": "x"}), "1: fields: found harmful, instruction, prompt"),
    (json.dumps({**OWN, "system": "x"}), "1: fields: found harmful, prompt, safe, system, "),
    (
        json.dumps({"instruction": "x", "input": "y", "output": "z"}),
        "1: fields: found input, instruction, output, which is no known format",
    ),
    (
        json.dumps({"instruction": "x", "safe_response": "y"}),
        "1: fields: found instruction, safe_response",
    ),
    (json.dumps({**OWN, "safe": ""}), "1: safe: is blank, expected text"),
    (json.dumps({**OWN, "harmful": 1}), "1: harmful: is int, expected text"),
    (json.dumps({**OWN, "prompt": "\ud800"}), r"1: prompt: has U\+D800 at character 0"),
    (json.dumps({**OWN, "id": True}), "1: id: is bool, expected text"),
    (json.dumps({**OWN, "source": ""}), "1: source: is blank, expected text"),
    (
        json.dumps({"instruction": "x", "output": None, "safe_response": "y"}),
        "1: output: is NoneType, expected text",
    ),
    (
        json.dumps({"instruction": "x", "output": "y", "safe_response": "\0"}),
        r"1: safe_response: has U\+0000 at character 0",
    ),
    (json.dumps({"instruction": " ", "output": "y"}), "1: instruction: is blank, expected text"),
    (json.dumps({"messages": [ASK]}), "1: messages: the last is the user's, expected the"),
    (json.dumps({"messages": None}), "1: messages: is NoneType, expected a list of messages"),
    (
        json.dumps({"messages": [], "safe": "x", "harmful": "y"}),
        "1: messages: is empty, expected at least one message",
    ),
    (
        "\n" + json.dumps({"messages": [ASK, {"role": "assistant", "content": ""}]}),
        r"2: messages\[1\].content: is blank, expected text",
    ),
]


@pytest.mark.parametrize(("text", "message"), BAD)
def test_a_bad_row_is_named_by_its_place_and_field(
    tmp_path: Path, text: str | bytes, message: str
) -> None:
    with pytest.raises(ValueError, match=r"rows\.txt:" + message.replace("|", r"\|")):
        list(read_records(write(tmp_path, text)))


def test_good_rows_come_before_the_error_of_a_bad_one(tmp_path: Path) -> None:
    path = write(tmp_path, json.dumps(OWN) + "\n{}")
    records = read_records(path)
    assert next(records).id == f"{path}:1"
    with pytest.raises(ValueError, match=r"rows\.txt:2: fields: found none"):
        next(records)


def test_errors_quote_no_text(tmp_path: Path) -> None:
    row = {"instruction": "secret words", "output": "secret\0words", "safe_response": "x"}
    with pytest.raises(ValueError) as error:
        list(read_records(write(tmp_path, json.dumps(row))))
    assert "secret" not in str(error.value)


def test_a_missing_file_is_an_error_of_the_file_system(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        next(read_records(tmp_path / "none.jsonl"))
