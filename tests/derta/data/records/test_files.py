"""File types are told by content, rows are streamed, and bad rows are named by place and field."""

from __future__ import annotations

import itertools
import json
import random
import re
import tracemalloc
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from derta.data import Reading, Triple, read_records, read_requests
from derta.data.records import files
from derta.data.records.reading import Wanted, read_placed
from public_rows import CONTAINERS, PACKINGS, contain

ASK = {"role": "user", "content": "How?"}
SAY = {"role": "assistant", "content": "So."}
OWN = {"prompt": "How?", "safe": "Sorry.", "harmful": "Sure."}


def write(directory: Path, text: str | bytes) -> Path:
    path = directory / "rows.txt"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def read(path: Path | str, role: str = "safety", **settings: Any) -> list[Any]:
    return list(read_records(path, role=role, **settings))  # type: ignore[arg-type]


LAYOUTS = {
    "lines": lambda rows: "".join(json.dumps(row) + "\n" for row in rows),
    "blank lines": lambda rows: "\n \r\n".join(map(json.dumps, rows)) + "\n\n",
    "array": json.dumps,
    "indented array": lambda rows: "\n\n" + json.dumps(rows, indent=2) + "\n",
    "byte order mark": lambda rows: "\ufeff" + json.dumps(rows, ensure_ascii=False),
    "object of a list": lambda rows: json.dumps({"data": rows}),
    "indented object of a list": lambda rows: "\n" + json.dumps({"data": rows}, indent=2) + "\n",
    "object of lists": lambda rows: json.dumps({"a": rows[:1], "b": rows[1:]}),
    "indented object of lists": lambda rows: json.dumps({"a": rows[:1], "b": rows[1:]}, indent=1),
    "csv": lambda rows: contain(rows, "csv").decode(),
    "csv of other newlines": lambda rows: contain(rows, "csv").decode().replace("\r\n", "\n"),
    "csv with a mark": lambda rows: "\ufeff\n" + contain(rows, "csv").decode(),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_content_tells_the_file_type(tmp_path: Path, layout: str) -> None:
    rows = [{**OWN, "prompt": f'"{n}",\nä?', "id": f"{n}", "source": "s"} for n in range(3)]
    assert read(write(tmp_path, LAYOUTS[layout](rows))) == [Triple(**row) for row in rows]


def test_rows_of_one_file_may_be_of_several_formats(tmp_path: Path) -> None:
    official = {"instruction": "How?", "output": "Sure.", "safe_response": "Sorry."}
    remarked = {"messages": [SAY, ASK], "safe": "Sorry.", "harmful": "Sure.", "score": [3]}
    path = write(tmp_path, "\n".join(map(json.dumps, [OWN, official, remarked])))
    assert [len(record.messages) for record in read(path)] == [1, 1, 2]
    # A table with rows of several formats has empty cells.
    table = tmp_path / "table"
    table.write_bytes(contain([OWN, official], "csv"))
    assert [record.prompt for record in read(table)] == ["How?", "How?"]


@pytest.mark.parametrize("nothing", ["", None])
def test_an_empty_field_unknown_to_the_format_is_ignored(
    tmp_path: Path, nothing: str | None
) -> None:
    row = {
        "instruction": "Q?",
        "input": nothing,
        "output": "A harmful one.",
        "safe_response": "No.",
    }
    (record,) = read(write(tmp_path, json.dumps(row)))
    assert isinstance(record, Triple) and record.messages[-1]["content"] == "Q?"


def test_texts_may_contain_unicode_line_separators(tmp_path: Path) -> None:
    row = {**OWN, "prompt": "a\u2028b\u0085c\rd"}
    (record,) = read(write(tmp_path, json.dumps(row, ensure_ascii=False)))
    assert record.messages[0]["content"] == row["prompt"]


def ids(*paths: Path | str) -> list[str]:
    return [record.id for record in read_records(*paths, role="safety")]


def test_rows_without_an_id_are_named_by_their_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = write(tmp_path, "\n" + json.dumps(OWN) + "\n\n" + json.dumps(OWN))
    assert ids(lines) == [f"{lines}:2", f"{lines}:4"]
    array = write(tmp_path, "\n[\n" + ",\n\n".join([json.dumps(OWN, indent=1)] * 2) + "\n]\n")
    assert ids(array) == [f"{array}:3[0]", f"{array}:9[1]"]
    monkeypatch.chdir(tmp_path)
    assert ids("rows.txt") == ["rows.txt:3[0]", "rows.txt:9[1]"]


def test_rows_on_one_line_and_files_with_one_name_get_distinct_ids(tmp_path: Path) -> None:
    paths = [tmp_path / folder / "rows.json" for folder in ("a", "b")]
    for path in paths:
        path.parent.mkdir()
        path.write_text(json.dumps([OWN] * 3))
    assert ids(*paths) == [f"{path}:1[{index}]" for path in paths for index in range(3)]


@pytest.mark.parametrize("other", [7, "7"])
def test_a_repeated_id_is_an_error_with_both_places(tmp_path: Path, other: int | str) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    first.write_text(json.dumps({**OWN, "id": 7}))
    rows = [OWN, {**OWN, "id": 7}, {**OWN, "id": other}]
    second.write_text("\n\n".join(map(json.dumps, rows)))
    expected = f"{second}:5: id: '7' is already used by {second}:3, expected a unique id"
    for paths in ([second], [first, second]):
        with pytest.raises(ValueError, match=f"^{re.escape(expected)}$"):
            ids(*paths)
    second.write_text(json.dumps([OWN, {**OWN, "id": f"{second}:1[0]"}]))
    with pytest.raises(ValueError, match=re.escape(f"is already used by {second}:1[0]")):
        ids(second)


def test_an_id_from_an_earlier_file_gets_the_stem_as_a_prefix(tmp_path: Path) -> None:
    """Random draws depend on the order of reading and on no folder's name."""
    paths = [tmp_path / name for name in ("a/x.jsonl", "b/x.jsonl", "c/x.jsonl", "y.jsonl")]
    for path in paths:
        path.parent.mkdir(exist_ok=True)
        numbers = (0, 1) if path.stem == "x" else (1, 2)
        path.write_text("".join(json.dumps({**OWN, "id": n}) + "\n" for n in numbers))
    assert ids(*paths[:3]) == ["0", "1", "x:0", "x:1", "x:x:0", "x:x:1"]
    assert ids(paths[0], paths[3]) == ["0", "1", "y:1", "2"]
    assert ids(paths[3], paths[0]) == ["1", "2", "0", "x:1"]
    reading = Reading()
    apart = [
        record.id
        for path in (paths[0], paths[3])
        for record in itertools.islice(read_records(path, role="safety", reading=reading), 2)
    ]
    assert apart == ["0", "1", "y:1", "2"]


def test_ids_stay_short_where_many_files_share_their_name_and_ids(tmp_path: Path) -> None:
    paths = [tmp_path / f"{folder:02}" / "x.jsonl" for folder in range(20)]
    for path in paths:
        path.parent.mkdir()
        path.write_text("".join(json.dumps({**OWN, "id": n}) + "\n" for n in (0, 1)))
    found = ids(*paths)
    assert len(set(found)) == 40
    assert found[8:12] == ["x:x:x:x:0", "x:x:x:x:1", "x:6:x:x:x:x:0", "x:6:x:x:x:x:1"]
    assert found[-1] == "x:20:x:x:x:x:1"


def test_reading_a_file_twice_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path, json.dumps({**OWN, "id": 7}))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"^rows\.txt: is given twice, expected every file once$"):
        ids(tmp_path, "rows.txt")
    reading = Reading()
    assert len(list(read_records(path, role="safety", reading=reading))) == 1
    (request,) = read_requests(path, kind="harmful", reading=reading)
    assert request.id == "rows:7"


BAD = [
    ("", "1: no record, expected JSON Lines, a JSON array, CSV or parquet"),
    ("\n \n", "1: no record"),
    (" [ ] ", "1: no record"),
    ('\n{"prompt": ', "2: not JSON at column 12 .*, expected one object per line"),
    ("3", "1: neither JSON nor CSV with a header that names columns of any format, expected"),
    (f"{json.dumps(OWN)}\n3", "2: row: is int, expected an object"),
    ("\n" + "[" * 100_000, "2: cannot be read .*recursion"),
    (
        f"{json.dumps(OWN)}\n" + '{"a"' * 9,
        "2: not JSON at column 5 .*, expected one object per line",
    ),
    ('\n{"a":' * 100_000, "2: not JSON"),
    ('{"a":' * 100_000, "1: cannot be read .*recursion.*, expected one object per line"),
    ('{"a": ' + "9" * 5000, "1: cannot be read .*digits.*, expected one object per line"),
    ('{"a": 1, "a": 2}', "1: cannot be read .an object has a field twice., expected one object p"),
    ("[" * 100_000, "1: cannot be read .*recursion.*, expected an array of objects"),
    ('[\n{"prompt"}]', "2: not JSON at column 10 .*, expected an array of objects"),
    ("[", "1: not JSON at column 2"),
    ('[3,\n"x"]', r"1\[0\]: row: is int, expected an object"),
    (f"[{json.dumps(OWN)}, 3]", r"1\[1\]: row: is int, expected an object"),
    (f"[{json.dumps(OWN)}\n", "2: the array breaks off, expected ',' or ']'"),
    (f"[{json.dumps(OWN)}\n{json.dumps(OWN)}]", "2: the array breaks off, expected ',' or ']'"),
    (f"[{json.dumps(OWN)},\n]", "2: not JSON at column 1"),
    (f"[{json.dumps(OWN)}\n]\n3", "3: text after the array, expected nothing"),
    ('{\n"prompt": "x"}', "2: an object over several lines, expected one a line, or lists of rows"),
    ('{\n"data": 3}', "2: an object over several lines, expected one a line"),
    ('{\n"data" 3}', "2: an object over several lines, expected one a line"),
    ("{\n[]: 3}", "2: an object over several lines, expected one a line"),
    ("{\n}", "2: an object over several lines, expected one a line"),
    (f'{{\n"data": [{json.dumps(OWN)}], "prompt": []}}', "2: an object over several lines"),
    (f'{{\n"data": [{json.dumps(OWN)},\n3]}}', r"3\[1\]: row: is int, expected an object"),
    (f'{{\n"data": [{json.dumps(OWN)}]\n', "3: the object breaks off, expected ',' or '}'"),
    (f'{{\n"data": [{json.dumps(OWN)}\n', "3: the array breaks off, expected ',' or ']'"),
    ('{\n"a": 1,\n"a": 2}', "3: an object has a field twice, expected it once"),
    (f'{{\n"data": [{json.dumps(OWN)}]}}\n3', "3: text after the object, expected nothing"),
    ('{"data": [3]}', "1: fields: found data, which is no known format"),
    ('{"data": []}', "1: fields: found data, which is no known format"),
    ('{"data": [{"x": 1}], "prompt": "x"}', "1: fields: are those of format requests"),
    (f'{{"data": [{json.dumps(OWN)}, {{}}]}}', r"1\[1\]: fields: found none, which is no known"),
    (b'[{\n"a": "\xff"}]', "2: byte 0xff is not UTF-8, expected UTF-8 text"),
    (b'\n{"a": "\xff"}', "2: byte 0xff is not UTF-8, expected UTF-8 text"),
    (b'["\xc3', "1: byte 0xc3 is not UTF-8, expected UTF-8 text"),
    (json.dumps(OWN).encode("utf-16"), "1: byte 0xff is not UTF-8"),
    ("Paint\nit", "1: neither JSON nor CSV with a header that names columns of any format"),
    (
        "{}",
        "1: fields: found none, which is no known format, expected one, or columns to read it by, "
        "from here: columns: {prompt: FIELD, safe: FIELD, harmful: FIELD}",
    ),
    ('{"doubt": 1}', "1: fields: found doubt, which is no known format"),
    (json.dumps({**OWN, "messages": [SAY, {**ASK, "content": "Why?"}]}), "1: prompt: differs from"),
    (json.dumps({**OWN, "instruction": "x"}), "1: fields: found harmful, instruction, prompt"),
    (json.dumps({**OWN, "system": "x"}), "1: fields: found harmful, prompt, safe, system, "),
    (
        json.dumps({"instruction": "x", "input": "y", "output": "z", "safe_response": "w"}),
        "1: fields: found input, instruction, output, safe_response, which is official_triple with "
        "fields of other formats, expected format: official_triple, which ignores those",
    ),
    (
        json.dumps({"instruction": "x", "safe_response": "y"}),
        "1: fields: found instruction, safe_response",
    ),
    (json.dumps({**OWN, "safe": ""}), "1: safe: is blank, expected text"),
    (json.dumps({**OWN, "harmful": 1}), "1: harmful: is int, expected text"),
    (json.dumps({**OWN, "prompt": "\ud800"}), r"1: prompt: has U\+D800 at character 0"),
    (json.dumps({**OWN, "id": True}), "1: id: is bool, expected text"),
    (json.dumps({**OWN, "source": " "}), "1: source: is blank, expected text"),
    (
        json.dumps({"instruction": "x", "output": None, "safe_response": "y"}),
        "1: output: is NoneType, expected text",
    ),
    (
        json.dumps({"instruction": "x", "output": "y", "safe_response": "\0"}),
        r"1: safe_response: has U\+0000 at character 0",
    ),
    (
        json.dumps({"messages": [], "safe": "x", "harmful": "y"}),
        "1: messages: is empty, expected at least one message",
    ),
    ("prompt,safe,harmful\r\na,b\r\n", "2: has 2 cells, expected 3 as in the header"),
    ('prompt,safe,harmful\n"a\nb",b,c\nd,e,f,g', "4: has 4 cells, expected 3 as in the header"),
    ('prompt,safe,harmful\n\na,"b"c,d', "3: not CSV .*, expected cells between commas, quoted"),
    ('prompt,safe,harmful\na,b,"c\nd\n', "2: not CSV .unexpected end of data., expected cells"),
    ("prompt,safe,harmful\na,b,c\rd", "2: not CSV .*, expected cells between commas"),
    ("prompt,safe,harmful\na,\0b,c", r"2: safe: has U\+0000 at character 0"),
    ("prompt,safe,harmful\na,,c", "2: safe: is blank, expected text"),
    ("prompt,safe,prompt\na,b,c", "1: the header names a column twice"),
    ("prompt;safe;harmful\na;b;c", "1: neither JSON nor CSV with a header that names columns"),
    (b"prompt,safe,harmful\na,b\xff,c", "2: byte 0xff is not UTF-8, expected UTF-8 text"),
    ("prompt,safe,harmful\n", "1: no record"),
]
PROMPTS = ["How?", 'He said "so", then?', "Why?"]
TALK = [{"role": "user", "content": "How?"}, {"role": "assistant", "content": "So."}]
TURNS = [{"from": "human", "value": "How?"}, {"from": "gpt", "value": "So."}]


@pytest.mark.parametrize(
    "text",
    [
        json.dumps(PROMPTS),
        json.dumps(PROMPTS, indent=1),
        json.dumps({"prompts": PROMPTS, "inputs": []}),
        json.dumps({"prompt": PROMPTS, "tags": ["a", "b", "c"]}, indent=2),
        json.dumps(
            {"version": 2, "source": "x", "tags": ["a"], "rows": [{"prompt": p} for p in PROMPTS]}
        ),
        json.dumps(
            {"rows": [{"prompt": p} for p in PROMPTS], "about": {"n": [1]}, "tags": ["a"]}, indent=2
        ),
    ],
)
def test_requests_are_read_from_lists_tables_and_objects_around_rows(
    tmp_path: Path, text: str
) -> None:
    found = list(read_requests(write(tmp_path, text), kind="harmful"))
    assert [one.prompt for one in found] == PROMPTS
    assert len({one.id for one in found}) == 3


@pytest.mark.parametrize(
    "text",
    [
        "How?\nWhy, then, so?\n",
        'How?\n"Why, then, so?"\n',
        "prompt\nHow?\n\nWhy, then, so?",
        json.dumps({"a": ["How?"], "b": {"c": ["Why, then, so?"]}}),
        json.dumps({"a": {"b": ["How?", "Why, then, so?"]}, "c": []}, indent=1),
    ],
)
def test_a_column_of_requests_is_read_where_it_is_asked_for(tmp_path: Path, text: str) -> None:
    path = write(tmp_path, text)
    found = read_requests(path, kind="harmful", format="requests")
    assert [one.prompt for one in found] == ["How?", "Why, then, so?"]
    if not text.startswith("prompt"):
        with pytest.raises(ValueError, match=r"rows\.txt:1?"):
            list(read_requests(path, kind="harmful"))


def test_a_word_above_requests_may_name_their_column(tmp_path: Path) -> None:
    path = write(tmp_path, "behaviour\nHow?\nWhy, then, so?\n")
    with pytest.raises(ValueError, match=r"txt:1: is one word, which may name a column, expected"):
        list(read_requests(path, kind="harmful", format="requests"))
    path = write(tmp_path, '"behaviour"\nHow?\n')
    found = read_requests(path, kind="harmful", format="requests")
    assert [one.prompt for one in found] == ["behaviour", "How?"]


def test_a_table_is_no_column_of_requests(tmp_path: Path) -> None:
    path = write(tmp_path, "index,behaviour\n1,How?\n")
    with pytest.raises(ValueError, match=r"txt:1: names several columns, expected a column of req"):
        list(read_requests(path, kind="harmful", format="requests"))
    with pytest.raises(ValueError, match=r"txt:1: fields: found behaviour, index, .*: behaviour}"):
        list(read_requests(path, kind="harmful"))


@pytest.mark.parametrize(
    "text",
    [
        json.dumps([TALK, TURNS]),
        json.dumps([TALK, TURNS], indent=1),
        f"{json.dumps(TALK)}\n{json.dumps(TURNS)}\n",
        json.dumps({"size": 2, "talks": [TALK, TURNS]}),
        json.dumps({"talks": [TALK, TURNS], "size": 2}, indent=1),
    ],
)
def test_lists_of_messages_are_rows(tmp_path: Path, text: str) -> None:
    found = read(write(tmp_path, text), "helpful")
    assert [[one["content"] for one in record.messages] for record in found] == [
        ["How?", "So."]
    ] * 2


@pytest.mark.parametrize(
    ("text", "count"),
    [
        (json.dumps({"turns": ["How?", "Why?"]}), 1),
        (json.dumps({"queries": ["How?", "Why?"], "tags": ["a", "b"]}), 1),
        (f"{json.dumps({'prompt': ['How?']})}\n" * 2, 0),  # two rows are no table
        (json.dumps({"prompt": ["How?"], "category": ["a", "b"]}), 0),
    ],
)
def test_a_row_with_a_list_is_no_table(tmp_path: Path, text: str, count: int) -> None:
    reading = Reading()
    wanted = Wanted("harmful")
    placed = list(read_placed([write(tmp_path, text)], wanted, reading))
    assert [isinstance(one, ValueError) for _, one in placed].count(False) == count


BAD_DIALOGUES = [
    ({"instruction": " ", "output": "y"}, "instruction: is blank, expected text"),
    ({"messages": [ASK]}, "messages: the last message is the user's, expected the"),
    ({"messages": None}, "messages: is NoneType, expected a list of messages"),
    (
        {"messages": [ASK, {"role": "assistant", "content": ""}]},
        r"messages\[1\].content: is blank, expected text",
    ),
]


@pytest.mark.parametrize(("text", "message"), BAD)
def test_a_bad_row_is_named_by_its_place_and_field(
    tmp_path: Path, text: str | bytes, message: str
) -> None:
    expected = re.sub(r"[|()]", r"\\\g<0>", message)
    with pytest.raises(ValueError, match=r"rows\.txt:" + expected):
        read(write(tmp_path, text))


@pytest.mark.parametrize(("row", "message"), BAD_DIALOGUES)
def test_a_bad_dialogue_is_named_by_its_place_and_field(
    tmp_path: Path, row: dict, message: str
) -> None:
    with pytest.raises(ValueError, match=r"rows\.txt:2: " + message):
        read(write(tmp_path, "\n" + json.dumps(row)), "helpful")


@pytest.mark.parametrize("chunk", [1, 7])
def test_chunk_borders_do_not_change_an_array(
    tmp_path: Path, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Elements, their ends and the places of errors are as if the whole text were in memory."""
    rows = [{**OWN, "id": f"{n}", "prompt": f"ä\n\\ {n}" + "\U0001f600" * n} for n in range(9)]
    texts: list[str | bytes] = [json.dumps(rows, indent=3), json.dumps(rows, ensure_ascii=False)]
    texts += [f"[{json.dumps(OWN)}, {{broken}}]", "[12.5e3, 3]"]
    texts += [json.dumps({"data": rows[1:], "more": rows[:1]}, indent=3)]
    read_in_pieces = ("[", b"[", "{\n")
    texts += [
        text
        for text, _ in BAD
        if (text[:1] in read_in_pieces or text[:2] in read_in_pieces) and len(text) < 1000
    ]

    def outcome(text: str | bytes) -> Any:
        try:
            return read(write(tmp_path, text))
        except ValueError as error:
            return str(error)

    whole = [outcome(text) for text in texts]
    assert [len(found) for found in whole[:2]] == [9, 9]
    monkeypatch.setattr(files, "CHUNK", chunk)
    assert [outcome(text) for text in texts] == whole


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"a":\n' + "1" * 99 + "}", "2: longer than 0 MiB, expected a row"),
        ('\n[{"a": "' + "1" * 99, "2: an element is longer than 0 MiB, expected a row"),
        ('prompt,safe,harmful\na,b,"c\n' + "d\n" * 99, "2: not CSV .field larger than"),
    ],
)
def test_an_unclosed_quote_or_bracket_does_not_swallow_the_file(
    tmp_path: Path, text: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "LONGEST", 64)
    monkeypatch.setattr(files, "CHUNK", 16)
    rows = files.read_rows(write(tmp_path, text), files.Fields({"prompt"}))
    with pytest.raises(ValueError, match=r"rows\.txt:" + message):
        for _ in rows:
            pass


@pytest.mark.parametrize("packing", ["gzip", "xz"])
@pytest.mark.parametrize("container", CONTAINERS)
def test_a_truncated_compressed_file_is_an_error(
    tmp_path: Path, container: str, packing: str
) -> None:
    rng = random.Random(0)
    rows = [{**OWN, "prompt": f"{rng.random()}"} for _ in range(99)]
    data = PACKINGS[packing](contain(rows, container))
    for cut in (12, len(data) // 2, len(data) - 1):
        with pytest.raises(ValueError, match=r"rows\.txt:\S+: the file cannot be unpacked .*"):
            read(write(tmp_path, data[:cut]))
    damaged = bytearray(data)
    damaged[len(data) // 2] ^= 255
    with pytest.raises(ValueError, match=r"rows\.txt:"):
        read(write(tmp_path, bytes(damaged)))


def test_a_bad_row_of_a_table_is_named_by_its_index(tmp_path: Path) -> None:
    rows = [{**OWN, "safe": safe} for safe in ("No.", None)]
    with pytest.raises(ValueError, match=r"rows\.txt:\[1\]: safe: is NoneType, expected text"):
        read(write(tmp_path, contain(rows, "parquet")))
    binary = pyarrow.array([b"a", b"\xff"]).cast(pyarrow.string(), safe=False)
    table = pyarrow.table({"prompt": binary, "safe": ["b"] * 2, "harmful": ["c"] * 2})
    path = tmp_path / "rows.txt"
    pyarrow.parquet.write_table(table, path)
    with pytest.raises(ValueError, match=r"rows\.txt:\[1\]: byte 0xff is not UTF-8, expected"):
        read(path)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (contain([OWN], "parquet")[:-9], r"\[0\]: not parquet \(.*\), expected a whole file"),
        (b"PAR1", r"\[0\]: not parquet"),
        (
            contain([OWN], "parquet").replace(b"harmful", b"\xffarmful"),
            r"\[0\]: not parquet \('utf-8' codec can't decode byte 0xff.*\), expected a whole file",
        ),
        (contain([{"a": 1}], "parquet"), r"\[0\]: fields: found a, which is no known"),
    ],
)
def test_a_file_without_records_is_an_error(tmp_path: Path, data: bytes, message: str) -> None:
    with pytest.raises(ValueError, match=r"rows\.txt:" + message):
        read(write(tmp_path, data))


def test_a_table_with_a_repeated_column_is_refused(tmp_path: Path) -> None:
    columns = [pyarrow.array([text]) for text in ("a", "b", "c", "d")]
    table = pyarrow.Table.from_arrays(columns, ["prompt", "safe", "harmful", "safe"])
    pyarrow.parquet.write_table(table, tmp_path / "rows.txt")
    with pytest.raises(ValueError, match=r"rows\.txt:\[0\]: the table names a column twice"):
        read(tmp_path / "rows.txt")


def test_a_folder_is_read_in_order_without_hidden_files(tmp_path: Path) -> None:
    for name in ("b", "a/2", "a/1", ".hidden", "a/.git/x"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("not records" if "." in name else json.dumps(OWN))
    assert ids(tmp_path) == [f"{tmp_path}/{name}:1" for name in ("a/1", "a/2", "b")]
    (tmp_path / "none").mkdir()
    with pytest.raises(ValueError, match="none: no file in this folder, expected record files"):
        ids(tmp_path / "none")


def test_a_saved_dataset_is_read_by_index(tmp_path: Path) -> None:
    rows = datasets.Dataset.from_list([{**OWN, "score": n} for n in range(300)])
    rows.shuffle(seed=0).select(range(280)).save_to_disk(tmp_path / "rows")
    assert ids(tmp_path / "rows") == [f"{tmp_path}/rows:[{n}]" for n in range(280)]
    assert read(tmp_path / "rows")[0].source == "rows"
    splits = {"train": rows, "test": rows}
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "all")  # type: ignore[arg-type]
    expected = f"holds the splits of a dataset, expected one of them: {tmp_path}/all/test, "
    with pytest.raises(ValueError, match=re.escape(f"{tmp_path}/all: {expected}{tmp_path}/all/tr")):
        ids(tmp_path / "all")
    (tmp_path / "rows" / "state.json").write_text("{}")
    with pytest.raises(ValueError, match=r"rows:\[0\]: cannot be loaded by datasets \(KeyError\)"):
        ids(tmp_path / "rows")


@pytest.mark.parametrize("container", CONTAINERS)
def test_a_cell_of_ten_megabytes_is_read(tmp_path: Path, container: str) -> None:
    row = {**OWN, "harmful": 'Sure, "step".\n' * 700_000}
    (record,) = read(write(tmp_path, contain([row], container)))
    assert record.harmful == row["harmful"]


@pytest.mark.parametrize("packing", ["plain", "xz"])
@pytest.mark.parametrize("container", [*CONTAINERS, "object"])
def test_memory_does_not_grow_with_the_file_size(
    tmp_path: Path, container: str, packing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "CHUNK", 1 << 14)
    rows = [{**OWN, "harmful": "Sure. " * 1000}] * 2000
    if container == "object":
        data = json.dumps({"data": rows}, indent=1).encode()
    else:
        data = contain(rows, container)
    records = read_records(write(tmp_path, PACKINGS[packing](data)), role="safety")
    next(records)
    tracemalloc.start()
    try:
        count = sum(1 for _ in records)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert count == 1999 and peak < 4 << 20  # of 12 MB of text


def test_good_rows_are_yielded_before_the_error_of_a_bad_one(tmp_path: Path) -> None:
    path = write(tmp_path, json.dumps(OWN) + "\n{}")
    records = read_records(path, role="safety")
    assert next(records).id == f"{path}:1"
    with pytest.raises(ValueError, match=r"rows\.txt:2: fields: found none"):
        next(records)


def test_errors_never_quote_text(tmp_path: Path) -> None:
    row = {"instruction": "secret words", "output": "secret\0words", "safe_response": "x"}
    with pytest.raises(ValueError) as error:
        read(write(tmp_path, json.dumps(row)))
    assert "secret" not in str(error.value)


def test_a_missing_file_is_a_file_not_found_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="none.jsonl: no such record file"):
        next(read_records(tmp_path / "none.jsonl", role="safety"))
