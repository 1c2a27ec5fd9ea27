"""Stream the rows of record files: JSON Lines, JSON arrays, CSV and parquet, plain, gzip or xz.

A JSON object that holds lists of rows, under names that are no columns, stands for those rows; the
only object of a file may have other fields around them, or be a table of parallel lists. A list of
messages is one row, and so is a text.

The content of a file decides its type, never its name. Memory holds one row, or one batch of
parquet rows, however long the file is. An error in one row is yielded in that row's place; an error
that makes the rest of a file unreadable is raised.
"""

from __future__ import annotations

import codecs
import contextlib
import csv
import gzip
import itertools
import json
import lzma
import re
import shutil
import tempfile
import zlib
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NoReturn

from derta.data.records.types import field_names

GZIP, XZ, PARQUET = b"\x1f\x8b", b"\xfd7zXZ\0", b"PAR1"
BATCH = 256  # rows of parquet in memory
CHUNK = 1 << 20
# Limit of a line, a cell or an element: an unclosed quote or bracket would swallow the whole file.
LONGEST = 1 << 28

_DAMAGED = (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile)
_SPACE = re.compile(r"[ \t\r\n]*")
# The longest token that may be cut off without the error's position showing it.
_TOKEN = 32

# A cell that may name a column. Other cells may be texts, which no error quotes.
_NAME = re.compile(r"\w[\w.-]{0,30}|")
# A line that may be the name of a file's only column.
_WORD = re.compile(r"[A-Za-z][A-Za-z0-9_.-]*")
# Letters of MMLU's choices: columns, and answers.
_CHOICES = frozenset("ABCD")
# Fields of rows that a whole file may have as well, around its rows.
_OF_FILES = frozenset("id source category type subject label text system context".split())

# A place in a file, and the row there or its error.
Placed = tuple[str, Any]


@dataclass(frozen=True)
class Fields:
    """The fields that are read from a file.

    Args:
        names: their names. A table must have at least one of them, an object of lists of rows none;
            other parquet columns are not loaded.
        lists: those that hold a list in each row, so that no list of theirs is a table's column.
        bare: column names of a CSV file without a header. A file with only one such column may have
            text lines with commas, or be lists of texts under any names.
    """

    names: Collection[str]
    lists: Collection[str] = ()
    bare: Sequence[str] = ()


class UnknownColumnsError(ValueError):
    """A table has no column that is read.

    Attributes:
        names: its columns, each with nothing.
    """

    def __init__(self, place: str, names: Sequence[str]) -> None:
        super().__init__(
            f"{place}: fields: found {field_names(names)}, which is no known format, expected one"
        )
        self.names = dict.fromkeys(names)


def data_files(path: Path) -> Iterator[Path]:
    """Yield the file, or all files below a folder in sorted order, without hidden ones.

    A folder saved by `datasets` counts as one file.

    Raises:
        FileNotFoundError: the path does not exist.
        ValueError: the folder has no file, or holds several splits.
    """
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such record file")
    if not path.is_dir() or _is_dataset(path):
        yield path
        return
    if (path / "dataset_dict.json").is_file():
        splits = ", ".join(str(folder) for folder in sorted(path.iterdir()) if _is_dataset(folder))
        raise ValueError(f"{path}: holds the splits of a dataset, expected one of them: {splits}")
    inside = [child for child in sorted(path.iterdir()) if not child.name.startswith(".")]
    if not inside:
        raise ValueError(f"{path}: no file in this folder, expected record files")
    for child in inside:
        yield from data_files(child)


def read_rows(path: Path, fields: Fields) -> Iterator[Placed]:
    """Yield (place, row) pairs; a place is `line`, `line[element]` in lists, `[row]` in tables.

    An unreadable row comes as a ValueError with the reason, and reading continues.

    Args:
        path: one of `data_files`.
        fields: the names of its fields.

    Raises:
        UnknownColumnsError: no column of the table is known.
        ValueError: `path:line: reason`; the rest of the file cannot be read.
        OSError: the file cannot be opened.
    """
    if path.is_dir():
        yield from _dataset_rows(path, fields.names)
        return
    last = "1"
    with path.open("rb") as raw:
        try:
            stream: Any = raw
            if raw.peek(2).startswith(GZIP):
                stream = gzip.GzipFile(fileobj=raw)
            elif raw.peek(6).startswith(XZ):
                stream = lzma.LZMAFile(raw)
            if stream.peek(4).startswith(PARQUET):
                rows = _parquet_rows(path, stream, fields.names, packed=stream is not raw)
            else:
                rows = _text_rows(path, stream, fields)
            for last, row in rows:
                yield last, row
        except _DAMAGED as error:
            raise ValueError(
                f"{path}:{last}: the file cannot be unpacked after this place ({error}), expected "
                "a complete gzip or xz file"
            ) from error


def _text_rows(path: Path, stream: Any, fields: Fields) -> Iterator[Placed]:
    if stream.peek(3).startswith(codecs.BOM_UTF8):
        stream.read(3)
    line = 1
    while head := stream.peek(1):
        blank = len(head) - len(head.lstrip())
        read = head.rfind(b"\n", 0, blank) + 1 or (blank if blank == len(head) else 0)
        if read == 0:
            break
        line += stream.read(read).count(b"\n")
    mark = head.lstrip()[:1]
    if mark == b"[":
        return _array_rows(_Window(path, stream, line))  # or lines that are lists
    if mark == b"{":
        return _line_rows(path, stream, line, fields)
    return _csv_rows(path, stream, line, fields) if mark else iter(())


def _lines(path: Path, stream: Any, line: int) -> Iterator[bytes]:
    while content := stream.readline(LONGEST + 1):
        if len(content) > LONGEST:
            raise ValueError(f"{path}:{line}: longer than {LONGEST >> 20} MiB, expected a row")
        yield content
        line += 1


def _not_utf8(error: UnicodeDecodeError) -> str:
    return f"byte {error.object[error.start]:#04x} is not UTF-8, expected UTF-8 text"


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):  # JSON does not define which one counts
        raise ValueError("an object has a field twice")
    return found


_JSON = json.JSONDecoder(object_pairs_hook=_object)


def _line_rows(path: Path, stream: Any, first: int, fields: Fields) -> Iterator[Placed]:
    for line, content in enumerate(_lines(path, stream, first), start=first):
        if content.isspace():
            continue
        if line == first and content.strip() == b"{":
            yield from _listed_rows(_Window(path, stream, line + 1), fields)
            return
        row: Any
        try:
            row = _JSON.decode(content.rstrip(b"\n").decode("utf-8"))
        except UnicodeDecodeError as error:
            row = ValueError(_not_utf8(error))
        except json.JSONDecodeError as error:
            row = ValueError(
                f"not JSON at column {error.colno} ({error.msg}), expected one object per line"
            )
        except (RecursionError, ValueError) as error:  # nested too deeply, a number of 5000 digits
            row = ValueError(f"cannot be read ({error}), expected one object per line")
        rows = None
        if isinstance(row, dict):
            alone = line == first and not stream.peek(1).strip()
            rows = _listed(row, fields, alone)
        if rows is None:
            yield f"{line}", row
        else:
            yield from ((f"{line}[{index}]", one) for index, one in enumerate(rows))


def _listed(found: dict[str, Any], fields: Fields, alone: bool) -> Sequence[Any] | None:
    """Return the rows of an object that holds lists of them; None if it is a row itself.

    Args:
        found: the object.
        fields: the names of fields that are read.
        alone: if True, the file holds nothing else.
    """
    if not alone and not found.keys().isdisjoint(fields.names):  # most rows
        return None
    listed = {
        name: rows
        for name, rows in found.items()
        if isinstance(rows, list) and rows and all(map(_is_row, rows))
    }
    around = found.keys() - listed.keys()
    if not listed:
        return _parallel(found, fields) or _texts(found, fields) if alone else None
    if around and not (alone and around.isdisjoint(set(fields.names) - _OF_FILES)):
        return None
    if not listed.keys().isdisjoint(fields.names):
        return None
    return list(itertools.chain.from_iterable(listed.values()))


def _is_message(value: Any) -> bool:
    return isinstance(value, dict) and (
        {"role", "content"} <= value.keys() or {"from", "value"} <= value.keys()
    )


def _is_row(value: Any) -> bool:
    """Return True if an element of a list may be a row: an object, or a list of messages."""
    if isinstance(value, list):
        return bool(value) and all(map(_is_message, value))
    return isinstance(value, dict) and not _is_message(value)


def _parallel(found: dict[str, Any], fields: Fields) -> list[Any] | None:
    """Return the rows of a table of lists, `{"prompts": [...], "answers": [...]}`, if it is one.

    An empty list is a column without cells.
    """
    table: dict[str, list[Any]] = {}
    for name, cells in found.items():
        single = name.removesuffix("s")
        known = single if single in fields.names and name not in fields.lists else name
        if not isinstance(cells, list) or any(isinstance(cell, dict | list) for cell in cells):
            return None
        if known in table:
            return None
        if cells:
            table[known] = cells
    if table.keys().isdisjoint(fields.names) or not table.keys().isdisjoint(fields.lists):
        return None
    if len({len(cells) for cells in table.values()}) != 1:
        return None
    return [dict(zip(table, cells, strict=True)) for cells in zip(*table.values(), strict=True)]


def _texts(found: Any, fields: Fields) -> list[str] | None:
    """Return the texts of an object that holds nothing but lists of them, by topic and subtopic.

    None if it holds something else, or nobody asked for a file of one column.
    """
    if isinstance(found, list) and all(isinstance(text, str) for text in found):
        return found
    if len(fields.bare) != 1 or not isinstance(found, dict):
        return None
    texts = [_texts(value, fields) for value in found.values()]
    return None if None in texts else [text for held in texts for text in held or ()]


class _Window:
    """The part of a text in memory; it grows at its end and is cut off at its start."""

    def __init__(self, path: Path, stream: Any, line: int) -> None:
        self.path = path
        self.line = line  # line of the position
        self.text = ""
        self.position = 0
        self.at_end = False
        self._column = 0  # column of the first character
        self._stream = stream
        self._decoder = codecs.getincrementaldecoder("utf-8")()

    def grow(self) -> None:
        """Forget the text before the position, and double the text after it."""
        newline = self.text.rfind("\n", 0, self.position)
        self._column = self.position - newline - 1 + (self._column if newline < 0 else 0)
        self.text, self.position = self.text[self.position :], 0
        if len(self.text) > LONGEST:
            self.fail(f"an element is longer than {LONGEST >> 20} MiB, expected a row")
        data = self._stream.read(max(CHUNK, len(self.text)))
        self.at_end = not data
        try:
            self.text += self._decoder.decode(data, self.at_end)
        except UnicodeDecodeError as error:
            lines = self.text.count("\n") + error.object.count(b"\n", 0, error.start)
            raise ValueError(f"{self.path}:{self.line + lines}: {_not_utf8(error)}") from error

    def skip(self) -> str:
        """Move to the next character that is no space and return it; "" at the end."""
        while True:
            end = _SPACE.match(self.text, self.position).end()  # type: ignore[union-attr]
            self._advance(end)
            if end < len(self.text) or self.at_end:
                return self.text[end : end + 1]
            self.grow()

    def element(self) -> Any:
        """Return the JSON value at the position and move behind it."""
        while True:
            try:
                row, end = _JSON.raw_decode(self.text, self.position)
            except json.JSONDecodeError as error:
                cut = error.pos + _TOKEN > len(self.text) or error.msg.startswith("Unterminated")
                if self.at_end or not cut:
                    newline = self.text.rfind("\n", 0, error.pos)
                    column = error.pos - newline + (self._column if newline < 0 else 0)
                    self.line += self.text.count("\n", self.position, error.pos)
                    self.fail(
                        f"not JSON at column {column} ({error.msg}), expected an array of objects"
                    )
            except (RecursionError, ValueError) as error:
                self.fail(f"cannot be read ({error}), expected an array of objects")
            else:
                if self.at_end or end + _TOKEN < len(self.text):
                    self._advance(end)
                    return row
            self.grow()

    def fail(self, message: str) -> NoReturn:
        raise ValueError(f"{self.path}:{self.line}: {message}") from None

    def _advance(self, end: int) -> None:
        self.line += self.text.count("\n", self.position, end)
        self.position = end


def _array_rows(window: _Window) -> Iterator[Placed]:
    """Yield the elements of an array; or each of several arrays, if they hold messages."""
    while window.skip() == "[":
        line = window.line
        elements = _elements(window, itertools.count())
        for place, first in elements:
            if _is_message(first):
                yield f"{line}", [first, *(message for _, message in elements)]
                break
            yield place, first
            yield from elements
            if window.skip():
                window.fail("text after the array, expected nothing")
    if window.skip():
        window.fail("text after the array, expected nothing")


def _elements(window: _Window, indices: Iterator[int]) -> Iterator[Placed]:
    """Yield the elements of the array at the position and move behind it."""
    window.position += 1
    mark = "]" if window.skip() == "]" else ","
    while mark == ",":
        window.skip()
        line = window.line
        yield f"{line}[{next(indices)}]", window.element()
        mark = window.skip()
        if mark not in (",", "]"):
            window.fail("the array breaks off, expected ',' or ']'")
        window.position += mark == ","
    window.position += 1


def _listed_rows(window: _Window, fields: Fields) -> Iterator[Placed]:
    """Yield the rows of the lists in an object of several lines whose first line is read."""
    indices = itertools.count()
    around: dict[str, Any] = {}
    start = window.line - 1
    found = False
    mark = ","
    while mark == ",":
        name = window.element() if window.skip() == '"' else None
        if name is None or window.skip() != ":":
            window.fail("an object over several lines, expected one a line, or lists of rows")
        if name in around:
            window.fail("an object has a field twice, expected it once")
        window.position += 1
        if window.skip() == "[" and name not in fields.names:
            around[name] = []
            holds_rows = False
            for place, row in _elements(window, indices):
                holds_rows = holds_rows or _is_row(row)
                if holds_rows:
                    yield place, row
                else:
                    around[name].append(row)
            found = found or holds_rows
        else:
            around[name] = window.element()
        mark = window.skip()
        if mark not in (",", "}"):
            window.fail("the object breaks off, expected ',' or '}'")
        window.position += 1
    rows = None if found else _parallel(around, fields) or _texts(around, fields)
    if found and around.keys().isdisjoint(set(fields.names) - _OF_FILES):
        rows = []
    if rows is None:
        window.fail("an object over several lines, expected one a line, or lists of rows")
    yield from ((f"{start}[{index}]", row) for index, row in enumerate(rows))
    if window.skip():
        window.fail("text after the object, expected nothing")


def _csv_rows(path: Path, stream: Any, first: int, fields: Fields) -> Iterator[Placed]:
    csv.field_size_limit(LONGEST)
    undecodable: list[UnicodeDecodeError] = []

    def texts() -> Iterator[str]:
        for content in _lines(path, stream, first):
            try:
                yield content.decode("utf-8")
            except UnicodeDecodeError as error:
                undecodable.append(error)
                yield content.decode("utf-8", "replace")

    lines = texts()
    head = next(lines, "")
    known = _names(head, fields.names)
    named = _cells(head)
    # A line of a file of one column is one cell, unless it is quoted.
    single = len(fields.bare) == 1 and (not known or len(named) == 1)
    if single and len(named) > 1 and all(map(_NAME.fullmatch, named)):
        raise ValueError(f"{path}:{first}: names several columns, expected a column of requests")
    if single and not known and _WORD.fullmatch(head.strip()):
        raise ValueError(
            f"{path}:{first}: is one word, which may name a column, expected a request (in quotes "
            "if it is one word), or columns to read the column by"
        )
    reader = csv.reader(
        itertools.chain([head], lines), strict=True, delimiter="\x1f" if single else ","
    )
    header: Sequence[str] = ()
    while True:
        line = first + reader.line_num
        try:
            cells = next(reader, None)
        except csv.Error as error:
            raise ValueError(
                f"{path}:{line}: not CSV ({error}), expected cells between commas, quoted where "
                "they hold commas, quotes or newlines"
            ) from error
        if cells is None:
            return
        if not cells:
            continue
        if not header:
            if undecodable:
                raise ValueError(f"{path}:{line}: {_not_utf8(undecodable[0])}")
            header = cells if known else fields.bare[: len(cells)]
            if not header and len(cells) > 1 and all(map(_NAME.fullmatch, cells)):
                raise UnknownColumnsError(f"{path}:{line}", cells)
            if not header:
                raise ValueError(
                    f"{path}:{line}: neither JSON nor CSV with a header that names columns of any "
                    "format, expected records in JSON, CSV or parquet, plain, gzip or xz, or "
                    "format: for CSV without a header, such as format: requests"
                )
            if len(set(header)) < len(header):
                raise ValueError(f"{path}:{line}: the header names a column twice")
            if header is cells:
                continue
        if undecodable:
            yield f"{line}", ValueError(_not_utf8(undecodable[0]))
            undecodable.clear()
        elif len(cells) != len(header):
            yield (
                f"{line}",
                ValueError(f"has {len(cells)} cells, expected {len(header)} as in the header"),
            )
        else:
            yield f"{line}", dict(zip(header, cells, strict=True))


def _cells(line: str) -> list[str]:
    try:
        return next(csv.reader([line], strict=True))
    except (csv.Error, StopIteration):
        return []


def _names(line: str, columns: Collection[str]) -> bool:
    """Return True if a line is a header: one of its cells names a column, and is no choice."""
    return any(cell in columns and cell not in _CHOICES for cell in _cells(line))


def _parquet_rows(
    path: Path, stream: IO[bytes], columns: Collection[str], *, packed: bool
) -> Iterator[Placed]:
    import pyarrow
    import pyarrow.parquet

    with contextlib.ExitStack() as stack:
        if packed:  # parquet is read from its end, so it needs a seekable file
            unpacked = stack.enter_context(tempfile.TemporaryFile())
            shutil.copyfileobj(stream, unpacked, CHUNK)
            stream = unpacked
        index = 0
        try:
            file = pyarrow.parquet.ParquetFile(stream)
            names = _known(path, file.schema_arrow.names, columns)
            others = dict.fromkeys(set(file.schema_arrow.names).difference(names))
            for batch in file.iter_batches(BATCH, columns=names):
                for row in _rows_of(batch):
                    yield f"[{index}]", row if isinstance(row, ValueError) else others | row
                    index += 1
        except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
            reason = str(error).splitlines()[0]
            raise ValueError(
                f"{path}:[{index}]: not parquet ({reason}), expected a whole file"
            ) from error


def _rows_of(batch: Any) -> Iterator[Any]:
    try:
        yield from batch.to_pylist()
    except UnicodeDecodeError:
        for index in range(batch.num_rows):
            try:
                yield from batch.slice(index, 1).to_pylist()
            except UnicodeDecodeError as error:
                yield ValueError(_not_utf8(error))


def _known(path: Path, names: Sequence[str], columns: Collection[str]) -> list[str]:
    if len(set(names)) < len(names):
        raise ValueError(f"{path}:[0]: the table names a column twice")
    known = [name for name in names if name in columns]
    if not known:
        raise UnknownColumnsError(f"{path}:[0]", names)
    return known


def _is_dataset(path: Path) -> bool:
    return (path / "state.json").is_file() and (path / "dataset_info.json").is_file()


def _dataset_rows(path: Path, columns: Collection[str]) -> Iterator[Placed]:
    import datasets
    import pyarrow

    try:
        table = datasets.load_from_disk(str(path))
    except (pyarrow.ArrowException, OSError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path}:[0]: cannot be loaded by datasets ({type(error).__name__}), expected a folder "
            "written by its save_to_disk"
        ) from error
    known = _known(path, table.column_names, columns)
    others = dict.fromkeys(set(table.column_names).difference(known))
    index = 0
    for batch in table.select_columns(known).with_format("arrow").iter(BATCH):
        for row in _rows_of(batch):
            yield f"[{index}]", row if isinstance(row, ValueError) else others | row
            index += 1
