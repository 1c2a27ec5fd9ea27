"""Record files: JSON Lines or a JSON array, the format of each row told by its fields.

To add a format, write one small function from a row to a record and enter it in `FORMATS` under the
fields it reads.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from derta.data.records import Dialogue, Record, Triple, check_text, distinct

Row = Mapping[str, Any]

_SPACE = re.compile(r"[ \t\r\n]*")


def read_records(*paths: str | Path) -> Iterator[Record]:
    """Reads triples and dialogues from UTF-8 files, one after the other.

    What a file is called plays no part. Rows may be of several formats, see `FORMATS`; fields that
    no format knows are left alone. A row without an `id` is called after its place, which is
    `file:line`, the file as it is given here, or `file:line[element]` in an array, whose elements
    may share a line; one without a `source` after the file's stem.

    Raises:
        ValueError: `place: field: what is wrong, what was expected`, for the first bad row, which
            names fields and never quotes their text; or two rows of these files have one id.
        OSError: a file cannot be read.
    """
    return distinct(itertools.chain.from_iterable(map(_read, map(Path, paths))))


def _read(path: Path) -> Iterator[tuple[str, Record]]:
    """Records and their places."""
    text = _read_text(path)
    rows = _array_rows if text.startswith("[", _skip_space(text, 0)) else _line_rows
    place = ""
    for within, row in rows(path, text):
        place = f"{path}:{within}"
        try:
            record = _record(row, default_id=place, default_source=path.stem)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{place}: {error}") from error
        yield place, record
    if not place:
        raise ValueError(f"{path}:1: no record, expected JSON Lines or a JSON array of records")


def _triple(row: Row, **origin: Any) -> Triple:
    return Triple(
        prompt=row.get("prompt", ""),
        messages=row.get("messages", ()),
        safe=row["safe"],
        harmful=row["harmful"],
        **origin,
    )


def _official_triple(row: Row, **origin: Any) -> Triple:
    return Triple(
        prompt=check_text("instruction", row["instruction"]),
        safe=check_text("safe_response", row["safe_response"]),
        harmful=check_text("output", row["output"]),
        **origin,
    )


def _official_dialogue(row: Row, **origin: Any) -> Dialogue:
    question = check_text("instruction", row["instruction"])
    answer = check_text("output", row["output"])
    return Dialogue(
        messages=[
            {"role": "user", "content": question},
            {"role": "assistant", "content": answer},
        ],
        **origin,
    )


def _conversation(row: Row, **origin: Any) -> Dialogue:
    return Dialogue(messages=row["messages"], **origin)


# A row's format is the one whose fields are exactly those of its fields that are known, so that no
# row can be of two formats and no text that some format reads is left out of another.
FORMATS: dict[frozenset[str], Callable[..., Record]] = {
    frozenset({"prompt", "safe", "harmful"}): _triple,
    frozenset({"messages", "safe", "harmful"}): _triple,
    frozenset({"instruction", "output", "safe_response"}): _official_triple,
    frozenset({"instruction", "output"}): _official_dialogue,
    frozenset({"messages"}): _conversation,
}

# Fields under which public data sets keep text, or a judgement of it, that no format here reads.
# Known for the same reason: half of a prompt is not a prompt. An empty one is none.
_UNREAD = frozenset(
    "input system context history conversations response completion chosen rejected is_safe".split()
)
_KNOWN = _UNREAD.union(*FORMATS)


def _record(row: Any, *, default_id: str, default_source: str) -> Record:
    if not isinstance(row, dict):
        raise TypeError(f"row: is {type(row).__name__}, expected an object")
    empty = {field for field in row.keys() & _UNREAD if row[field] in ("", None)}
    read = FORMATS.get(frozenset(row.keys() & _KNOWN - empty))
    if read is None:
        expected = " | ".join(sorted(", ".join(sorted(fields)) for fields in FORMATS))
        found = ", ".join(sorted(row)) or "none"
        raise ValueError(f"fields: found {found}, which is no known format, expected {expected}")
    id = row.get("id", default_id)
    if type(id) is int:
        id = str(id)
    return read(
        row, id=check_text("id", id), source=check_text("source", row.get("source", default_source))
    )


def _read_text(path: Path) -> str:
    data = path.read_bytes()
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ValueError(
            f"{path}:{line}: byte {data[error.start]:#04x} is not UTF-8, expected UTF-8 text"
        ) from error


def _line_rows(path: Path, text: str) -> Iterator[tuple[str, Any]]:
    """Rows, each with its line."""
    for line, content in enumerate(text.split("\n"), start=1):
        if not content.strip():
            continue
        try:
            row = json.loads(content)
        except json.JSONDecodeError as error:
            raise ValueError(
                f"{path}:{line}: not JSON at column {error.colno} ({error.msg}), "
                "expected one object a line"
            ) from error
        except (RecursionError, ValueError) as error:  # nested too deeply, a number of 5000 digits
            raise ValueError(
                f"{path}:{line}: cannot be read ({error}), expected one object a line"
            ) from error
        yield f"{line}", row


def _array_rows(path: Path, text: str) -> Iterator[tuple[str, Any]]:
    """Elements of a JSON array, each with the line on which it starts and its index."""
    decode = json.JSONDecoder().raw_decode
    position = _skip_space(text, 0)
    line = text.count("\n", 0, position) + 1
    index = 0
    while text[position : position + 1] in ("[", ","):
        start = _skip_space(text, position + 1)
        line += text.count("\n", position, start)
        if text[position] == "[" and text[start : start + 1] == "]":
            position = start
            break
        try:
            row, end = decode(text, start)
        except json.JSONDecodeError as error:
            raise ValueError(
                f"{path}:{error.lineno}: not JSON at column {error.colno} ({error.msg}), "
                "expected an array of objects"
            ) from error
        except (RecursionError, ValueError) as error:
            raise ValueError(
                f"{path}:{line}: cannot be read ({error}), expected an array of objects"
            ) from error
        yield f"{line}[{index}]", row
        index += 1
        position = _skip_space(text, end)
        line += text.count("\n", start, position)
    if text[position : position + 1] != "]":
        raise ValueError(f"{path}:{line}: the array breaks off, expected ',' or ']'")
    end = _skip_space(text, position + 1)
    if end < len(text):
        line += text.count("\n", position, end)
        raise ValueError(f"{path}:{line}: text after the array, expected nothing")


def _skip_space(text: str, position: int) -> int:
    return _SPACE.match(text, position).end()  # type: ignore[union-attr]
