"""Columns read any file as a known format, and cannot hide a harmful text from the swap check."""

from __future__ import annotations

import itertools
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from derta.data import FORMATS, Dialogue, Reading, Triple, read_records, read_requests
from derta.data.records.formats import COLUMNS, Half
from derta.data.records.reading import Wanted, read_placed
from derta.data.records.sources import Source
from public_rows import CONTAINERS, FLAT, ROWS, ask, contain, harmful, helpful, safe, transcript

ROW = {
    "behavior": ask(7),
    "meta": {"text": harmful(7), "topic": "fences", "list": [{"reply": safe(7)}]},
    "dotted.name": "whole",
}


def write(tmp_path: Path, *rows: Any, container: str = "jsonl") -> Path:
    path = tmp_path / "rows"
    path.write_bytes(contain(rows, container))
    return path


def test_paths_and_constants_name_the_parts_of_a_row(tmp_path: Path) -> None:
    columns = {
        "prompt": "behavior",
        "harmful": "meta.text",
        "safe": "meta.list.0.reply",
        "id": "dotted.name",
        "source": {"value": "mine"},
        "weight": {"value": 0.5},
    }
    (found,) = read_records(write(tmp_path, ROW), role="safety", columns=columns)
    assert found == Triple(
        prompt=ask(7), safe=safe(7), harmful=harmful(7), id="whole", source="mine", weight=0.5
    )
    columns = {"prompt": "behavior", "harmful": "meta.text", "category": "meta.topic"}
    (asked,) = read_requests(write(tmp_path, ROW), kind="harmful", columns=columns)
    assert (asked.prompt, asked.response) == (ask(7), harmful(7))


def test_turns_become_messages(tmp_path: Path) -> None:
    turns = [("bot", "Hello."), ("person", ask(7)), ("bot", helpful(7))]
    row = {"talk": [{"speaker": who, "say": {"text": said}} for who, said in turns[1:]]}
    columns: dict[str, Any] = {
        "messages": {"path": "talk", "role": "speaker", "text": "say.text", "user": "person"}
    }
    columns["messages"]["assistant"] = ["bot", "machine"]
    (found,) = read_records(write(tmp_path, row), role="helpful", columns=columns)
    assert isinstance(found, Dialogue)
    assert [one["content"] for one in found.messages] == [ask(7), helpful(7)]
    del columns["messages"]["assistant"]
    expected = (
        r"rows:1: messages\[1\].speaker: is 'bot', expected one of system, person, assistant$"
    )
    with pytest.raises(ValueError, match=expected):
        list(read_records(write(tmp_path, row), role="helpful", columns=columns))
    with pytest.raises(ValueError, match=r"messages\[0\]: expected speaker and say.text"):
        list(
            read_records(
                write(tmp_path, {"talk": [{"speaker": "x"}]}), role="helpful", columns=columns
            )
        )


BAD: list[tuple[dict[str, Any], str]] = [
    ({"promt": "a"}, "columns: no format knows a field 'promt'; did you mean 'prompt'"),
    ({"prompt": 3}, "columns.prompt: expected a field's name, {value: ...}$"),
    ({"prompt": {"value": []}}, "columns.prompt: expected a field's name"),
    ({"messages": {"role": "x"}}, "columns.messages: expected .*, or {path: ..., role: ..., t"),
    (
        {"messages": {"path": "a", "user": "x", "assistant": "x"}, "safe": "b", "harmful": "c"},
        "columns.messages.assistant: 'x' is the user too, expected one role for each speaker",
    ),
    ({"prompt": "a"}, "columns: prompt are not the fields of any format for safety, expected pr"),
    (
        {"prefix": "a", "text": "b", "safe": {"value": "false"}},
        "columns: are not for rendered rows, expected their own field names",
    ),
]


@pytest.mark.parametrize(("columns", "message"), BAD)
def test_wrong_columns_are_refused_before_a_file_is_read(
    columns: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match="^" + re.sub(r"[{]", r"\{", message)):
        Source(path="none", role="safety", columns=columns)


def test_a_row_without_a_mapped_field_is_named(tmp_path: Path) -> None:
    columns = {"prompt": "q", "answer": "meta.a"}
    for row in ({"q": "x", "meta": {"b": "y"}}, {"q": "x"}):
        expected = "rows:1: answer: columns take it from meta.a, found "
        with pytest.raises(ValueError, match=expected):
            list(read_records(write(tmp_path, row), role="helpful", columns=columns))
    with pytest.raises(ValueError, match=r"rows:1\[0\]: row: is str, expected an object"):
        list(read_records(write(tmp_path, ["x"]), role="helpful", columns=columns))


SUGGESTED = [
    ("safety", {"behavior": 1, "refusal_text": 1, "harmful": 1, "x": 1}, "{prompt: behavior, safe"
     ": refusal_text, harmful: harmful}"),
    ("harmful", {"Goal": 1, "index": 1}, "{prompt: Goal}"),
    ("helpful", {"my question": 1, "gold": 1}, '{prompt: "my question", answer: FIELD}'),
    (
        "helpful",
        {"talk": [{"speaker": "a", "utterance": "b"}], "topic": "x"},
        "{messages: {path: talk, role: speaker, text: utterance, user: NAME, assistant: NAME}}",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("purpose", "row", "line"), SUGGESTED)
@pytest.mark.parametrize("container", CONTAINERS)
def test_an_unknown_format_is_answered_with_columns_to_start_from(
    tmp_path: Path, purpose: str, row: dict[str, Any], line: str, container: str
) -> None:
    if container in FLAT and any(isinstance(value, list) for value in row.values()):
        return
    if container == "csv" and " " in "".join(row):
        return  # two words may be a text, which no error quotes
    path = write(tmp_path, row, row, container=container)
    (_, error), *_ = read_placed([path], Wanted(purpose))
    if container == "table":
        return  # unknown lists are a row of their own
    if container == "parquet":  # whose columns are not loaded
        line = line.partition("messages: {path")[0] and line
        line = "columns: {" if "talk" in row else line
    assert line in str(error), str(error)


@pytest.mark.parametrize("container", CONTAINERS)
@pytest.mark.parametrize("name", [name for name in FORMATS if name != "rendered"])
def test_renamed_fields_are_read_as_the_format_itself(
    tmp_path: Path, name: str, container: str
) -> None:
    form, rows = FORMATS[name], ROWS[name](7)
    if container in FLAT and any(isinstance(one, list | dict) for one in rows[0].values()):
        return
    columns = {key: f"x_{key}" for key in rows[0] if key in COLUMNS}
    renamed = [{f"x_{key}": value for key, value in row.items()} for row in rows]
    for purpose in form.readers:

        def records(rows: list[Any], wanted: Wanted) -> list[Any]:
            return [
                found
                for _, found in read_placed([write(tmp_path, *rows, container=container)], wanted)
            ]

        plain = records(rows, Wanted(purpose))
        mapped = records(renamed, Wanted(purpose, name if name == "xstest" else None, columns))
        assert [f"{one}" for one in mapped] == [f"{one}" for one in plain]


def told(answer: str) -> dict[str, Any]:
    return {"from": "gpt", "value": answer}


# One row with every text of item 3, in every form that a field of a format for safety has.
TEXTS = {"asked": ask(3), "refused": safe(3), "harmed": harmful(3), "helped": helpful(3)}
EVERYTHING = {
    **TEXTS,
    **{f"{name}_told": told(text) for name, text in TEXTS.items()},
    **{f"{name}_whole": transcript(ask(3), text) for name, text in TEXTS.items()},
    "turns": [{"from": "human", "value": ask(3)}],
    "yes": True,
    "no": False,
}


def places(name: str, field: str) -> list[Any]:
    """Return what a mapping can put into a field, right or wrong."""
    if field.startswith("is_"):
        return ["yes", "no", {"value": True}]
    if field.endswith("_label"):
        return [{"value": word} for word in ("harmful", "unharmful", "refusal", "compliance")]
    if field == "conversations":
        return ["turns"]
    form = {"sharegpt_preference": "_told", "whole_preference": "_whole"}.get(name, "")
    return [f"{text}{form}" for text in TEXTS]


@pytest.mark.parametrize(
    "name", [name for name, form in FORMATS.items() if {"safety"} & form.readers.keys()]
)
def test_no_mapping_puts_a_harmful_text_into_the_safe_slot(tmp_path: Path, name: str) -> None:
    """All mappings are tried, of which the right ones yield triples."""
    fields = sorted(FORMATS[name].fields | ({"prompt"} if name == "triple" else set()))
    path = write(tmp_path, EVERYTHING)
    safe_texts: set[str] = set()
    for chosen in itertools.product(*(places(name, field) for field in fields)):
        columns = dict(zip(fields, chosen, strict=True))
        alone: list[Half] = []
        if name == "rendered":
            with pytest.raises(ValueError, match="columns: are not for rendered rows"):
                Wanted("safety", None, columns)
            continue
        found = read_placed([path], Wanted("safety", None, columns), Reading(alone=alone.append))
        safe_texts |= {one.safe for _, one in found if isinstance(one, Triple)}
        safe_texts |= {half.text for half in alone if half.safe}
    assert safe_texts == (set() if name == "rendered" else {safe(3)})


def test_a_mapped_safe_response_must_refuse_unless_the_format_is_named(tmp_path: Path) -> None:
    path = write(tmp_path, {"q": ask(7), "a": harmful(7), "b": helpful(7)})
    columns = {"prompt": "q", "safe": "a", "harmful": "b"}
    expected = "rows:1: safe: holds no refusal, as columns must show; expected the refusal in safe"
    with pytest.raises(ValueError, match=expected):
        list(read_records(path, role="safety", columns=columns))
    (found,) = read_records(path, role="safety", columns=columns, format="triple")
    assert isinstance(found, Triple) and found.safe == harmful(7)
    reading = Reading()
    halves = {"prompt": "q", "response": "a", "is_safe": {"value": True}}
    assert not list(read_records(path, role="safety", columns=halves, reading=reading))
    assert reading.files[f"{path}"].skipped == Counter({"the responses contradict their labels": 1})
