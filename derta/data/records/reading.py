"""Read records and requests from files: each row by its format, in the role the user states."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
from array import array
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from derta.data.records.columns import Columns, format_of_columns, read_columns, suggest
from derta.data.records.files import Fields, UnknownColumnsError, data_files, read_rows
from derta.data.records.formats import (
    COLUMNS,
    FORMATS,
    KINDS,
    KNOWN,
    LISTS,
    ROLES,
    UNDESIRABLE,
    Half,
    Kind,
    Origin,
    Role,
    Row,
    is_undesirable,
    matching,
)
from derta.data.records.refusal_keywords import opens_with_refusal, refuses
from derta.data.records.types import (
    EMPTY,
    Dialogue,
    Record,
    Rendered,
    Request,
    Skipped,
    Triple,
    check_text,
    field_names,
)

# Prefixes that an id which is taken gets before it gets a number.
PREFIXES = 4

CONTRADICTION = Skipped("the responses contradict their labels")
_RESULTS = (Triple, Dialogue, Rendered, Request)
_Buckets = defaultdict[int, "array[int]"]


class Ids:
    """The ids met so far, as 64 bits each: ten million take 170 MB."""

    def __init__(self) -> None:
        self._files: set[tuple[Path, str | None]] = set()
        self._earlier: _Buckets = defaultdict(lambda: array("Q"))
        self._here: _Buckets = defaultdict(lambda: array("Q"))

    def begin(self, file: Path, purpose: str | None) -> None:
        """Start a file: the ids that follow belong to it.

        Raises:
            ValueError: the file was already read for the same purpose.
        """
        read = (file.resolve(), purpose)
        if read in self._files:
            raise ValueError(f"{file}: is given twice, expected every file once")
        self._files.add(read)
        while self._here:
            key, digests = self._here.popitem()
            self._earlier[key].extend(digests)

    def name(self, id: str, stem: str) -> str | None:
        """Return the id, prefixed by `stem` as often as another file already has it.

        After `PREFIXES` prefixes, the number of the file is one too: thousands of files may share
        their stem and their ids. Returns None if this file already has the id.
        """
        for named in alternatives(id, stem, len(self._files)):
            digest = _digest(named)
            if digest not in self._earlier.get(digest >> 46, ()):
                break
        here = self._here[digest >> 46]
        if digest in here:
            return None
        here.append(digest)
        return named


def alternatives(id: str, prefix: str, number: int) -> Iterator[str]:
    """Yield an id, then those that it gets while it is taken.

    They have one more prefix each, and from `PREFIXES` on the number too, which ends the search
    soon even if everything shares one id.
    """
    for prefixes in itertools.count(1):
        yield id
        id = f"{prefix}:{f'{number}:' if prefixes > PREFIXES else ''}{id}"


def _digest(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest())


@dataclass
class FileReading:
    """Counts of one file's rows.

    Attributes:
        records: rows, or pairs of joined rows, that are records or requests.
        bad: rows that are errors, and errors that end the file.
        skipped: other rows, by reason.
    """

    records: int = 0
    bad: int = 0
    skipped: Counter[str] = field(default_factory=Counter)

    def __str__(self) -> str:
        reasons = "; ".join(f"{count} {reason}" for reason, count in self.skipped.most_common())
        skipped = f"{self.skipped.total()} skipped" + (f" ({reasons})" if reasons else "")
        return f"{self.records} records, {self.bad} errors, {skipped}"


@dataclass
class Reading:
    """A summary that `read_records` and `read_requests` fill while they are iterated over.

    All records that share a summary have distinct ids, even if several calls read them.

    Args:
        alone: called at the end of each file with every answer that the file does not complete to a
            triple.

    Attributes:
        files: counts by path.
        ids: ids of all records and requests.
    """

    alone: Callable[[Half], object] | None = None
    files: dict[str, FileReading] = field(init=False, default_factory=dict)
    ids: Ids = field(init=False, default_factory=Ids)


def read_records(
    *paths: str | Path,
    role: Role,
    format: str | None = None,
    columns: Mapping[str, Any] | None = None,
    reading: Reading | None = None,
) -> Iterator[Record]:
    """Read training records from files and folders, one after the other, in bounded memory.

    Files are JSON Lines, JSON arrays, CSV or parquet, each plain, gzip or xz, or folders of them or
    of `datasets`; file names do not matter. Rows may have several formats, see `FORMATS`; fields
    that no format knows are ignored. A row without an `id` is named by its place: `file:line`,
    `file:line[element]` in an array, whose elements may share a line, or `file:[row]` in a table. A
    row without a `source` gets the file's stem. An id that another file already has gets this
    file's stem as a prefix, as in `stem:7`. Only records have a `weight`.

    Args:
        role: "safety" yields `Triple`s, or `Rendered` rows of the authors' files; "helpful" and
            "borderline" yield `Dialogue`s.
        format: a key of `FORMATS`, if the fields are ambiguous; responses whose texts contradict
            their columns are then accepted.
        columns: the files' fields by the names that a format knows, for rows of no known format;
            see `read_columns`. A safe response must then hold a refusal, unless `format` is given.
        reading: filled with the numbers of rows read and skipped.

    Raises:
        ValueError: `place: field: problem, expected value` for the first bad row, with names of
            fields and never their text; two rows of a file share an id; a file is given twice; or
            the role or format is unknown, or `columns` name no format's fields.
        OSError: a file cannot be read.
    """
    _check_purpose("role", role, ROLES)
    return _strict(paths, Wanted(role, format, columns), reading)


def read_requests(
    *paths: str | Path,
    kind: Kind,
    format: str | None = None,
    columns: Mapping[str, Any] | None = None,
    reading: Reading | None = None,
) -> Iterator[Request]:
    """Read evaluation requests, as `read_records` does.

    Training files are accepted: a triple's harmful response, or a dialogue's last answer, becomes
    the request's response.

    Args:
        kind: "harmful", "harmless", or "question": harmless, with its right answer.
        format, columns, reading: as for `read_records`.

    Raises:
        ValueError, OSError: as `read_records`.
    """
    _check_purpose("kind", kind, KINDS)
    return _strict(paths, Wanted(kind, format, columns), reading)


def _check_purpose(name: str, value: str, known: Sequence[str]) -> None:
    if value not in known:
        raise ValueError(f"{name} must be one of {', '.join(known)}, got {value!r}")


class Wanted:
    """The purpose, format and columns that rows are read with.

    Args:
        purpose: a role or a kind; None: the first role of the row's format.
        format: a key of `FORMATS`; None: the fields of a row tell.
        columns: see `read_records`.

    Raises:
        ValueError: the format is unknown, or `columns` are wrong or name no format's fields.
    """

    def __init__(
        self,
        purpose: str | None,
        format: str | None = None,
        columns: Mapping[str, Any] | None = None,
    ) -> None:
        if format is not None and format not in FORMATS:
            raise ValueError(f"format must be one of {', '.join(FORMATS)}, got {format!r}")
        self.purpose = purpose
        self.named = format
        self.columns: Columns | None = None
        self.mapped = ""
        if columns:
            self.columns = read_columns(columns)
            self.mapped = format_of_columns(self.columns, purpose, format)

    @property
    def fields(self) -> Fields:
        """The fields that are read from a file."""
        if self.columns is not None:
            return Fields(self.columns.roots(), self.columns.roots(LISTS))
        return Fields(COLUMNS, LISTS, FORMATS[self.named].bare if self.named else ())

    def row(self, row: Any) -> tuple[str, Row]:
        """Return the format of a row, and the row with that format's fields."""
        if self.columns is not None:
            return self.mapped, self.columns.apply(row, FORMATS[self.mapped].fields)
        if isinstance(row, str):
            row = {"prompt": row}
        elif isinstance(row, list):
            turns = bool(row) and all(isinstance(one, dict) and "from" in one for one in row)
            row = {"conversations" if turns else "messages": row}
        elif not isinstance(row, dict):
            raise TypeError(f"row: is {type(row).__name__}, expected an object")
        return self.named or _format_of(row, self.purpose), row


def _strict(paths: Sequence[str | Path], wanted: Wanted, reading: Reading | None) -> Iterator[Any]:
    for place, record in read_placed(paths, wanted, reading):
        if isinstance(record, _Twice):
            # Read the file again: storing every row's place would take more memory than the ids.
            again = read_placed([record.path], wanted)
            first = next(at for at, one in again if getattr(one, "id", None) == record.id)
            raise ValueError(
                f"{place}: id: {record.id!r} is already used by {first}, expected a unique id"
            )
        if isinstance(record, ValueError):
            raise record
        yield record


def read_placed(
    paths: Iterable[str | Path], wanted: Wanted, reading: Reading | None = None
) -> Iterator[tuple[str, Record | Request | ValueError]]:
    """Yield records or requests with their places; a bad row is yielded as an error.

    Args:
        paths: the files and folders.
        wanted: the purpose, format and columns.
        reading: as for `read_records`.

    Raises:
        OSError: a file cannot be read.
    """
    reading = reading or Reading()
    files = reading.files
    for path in map(Path, paths):
        place = f"{path}"
        try:
            for file in data_files(path):
                place = f"{file}"
                counts = files.setdefault(place, FileReading())
                reading.ids.begin(file, wanted.purpose)
                yield from _read_file(file, wanted, counts, reading)
        except UnknownColumnsError as error:
            files.setdefault(place, FileReading()).bad += 1
            advice = suggest(error.names, wanted.purpose)
            yield place, ValueError(f"{error}, or columns to read it by, from here: {advice}")
        except ValueError as error:
            files.setdefault(place, FileReading()).bad += 1
            yield place, error


def _read_file(
    path: Path, wanted: Wanted, counts: FileReading, reading: Reading
) -> Iterator[tuple[str, Record | Request | ValueError]]:
    pairs = _Pairs()
    place = ""
    source = path.stem
    for within, row in read_rows(path, wanted.fields):
        place = f"{path}:{within}"
        record: Any
        try:
            if isinstance(row, ValueError):
                raise row
            record = _record(row, wanted, pairs, place, source)
        except (TypeError, ValueError) as error:
            record = ValueError(f"{place}: {error}")
        if isinstance(record, Skipped):
            counts.skipped[record.reason] += 1
        elif record is not None:
            if isinstance(record, _RESULTS):
                id = reading.ids.name(record.id, source)
                if id is None:
                    record = _Twice(record.id, path, place)
                elif id != record.id:
                    record = dataclasses.replace(record, id=id)
            counts.bad += isinstance(record, ValueError)
            counts.records += not isinstance(record, ValueError)
            yield place, record
    if not place:
        raise ValueError(
            f"{path}:1: no record, expected JSON Lines, a JSON array, CSV or parquet with records"
        )
    counts.skipped.update(pairs.left())
    if reading.alone is not None:
        for half in pairs.waiting():
            reading.alone(half)


def _record(
    row: Any, wanted: Wanted, pairs: _Pairs, place: str, source: str
) -> Record | Request | Skipped | None:
    """Return the row's record; None for an answer that waits for its other half."""
    purpose, trusted = wanted.purpose, wanted.named is not None
    name, row = wanted.row(row)
    form = FORMATS[name]
    if not form.fits(row.keys()):
        raise ValueError(
            f"fields: found {field_names(row)}, expected those of format {name}: "
            f"{', '.join(sorted(form.fields))}"
        )
    reader = form.readers.get(purpose or next((role for role in ROLES if role in form.readers), ""))
    if reader is None:
        raise ValueError(
            f"fields: are those of format {name}, which is for {', '.join(form.readers)}, expected "
            f"a format for {purpose or 'training'}"
        )
    record: Any = reader(row, _origin(row, place, source, weighted=purpose not in KINDS))
    if isinstance(record, Half):
        fits = refuses(record.text) if record.safe else not opens_with_refusal(record.text)
        if wanted.columns is not None and not trusted and not fits:
            return CONTRADICTION
        record = pairs.join(record)
    if isinstance(record, Triple):
        safe, harmful = form.columns or ("safe", "harmful")
        against = None
        if record.safe == record.harmful:
            against = f"{harmful}: equals {safe}, expected another response"
        elif not trusted:
            against = _contradiction(record, name, safe, harmful, wanted.columns is not None)
        if against and form.columns:
            raise ValueError(against)
        if against:
            return CONTRADICTION
    if isinstance(record, Dialogue) and is_undesirable(row):
        return UNDESIRABLE
    if purpose in KINDS and isinstance(record, Triple | Dialogue):
        return as_request(record)
    if purpose == "borderline" and isinstance(record, Dialogue):
        return dataclasses.replace(record, borderline=True)
    return record


def _format_of(row: Row, purpose: str | None) -> str:
    names = matching(frozenset(row.keys() & KNOWN))
    filled = frozenset(row)
    if not names:  # ignore empty fields: one table may hold rows of several formats
        filled = frozenset(key for key in row if row[key] not in EMPTY)
        names = matching(filled & KNOWN)
    if len(names) == 1:
        return names[0]
    found = f"fields: found {field_names(row)}, which is "
    if names:
        raise ValueError(f"{found}any of {', '.join(names)}, expected format: with one of them")
    if "prefix" in row and "text" in row and "safe" not in row:
        raise ValueError(
            f"{found}an attack on a model's safety, expected the field safe beside prefix and text"
        )
    forms = {
        name: form for name, form in FORMATS.items() if purpose is None or purpose in form.readers
    }
    covered = {name: form.known & filled for name, form in forms.items() if form.fits(filled)}
    if covered:
        most = [
            name for name in covered if not any(covered[name] < other for other in covered.values())
        ]
        meant = " or ".join(most)
        raise ValueError(
            f"{found}{meant} with fields of other formats, expected format: {meant}, which "
            "ignores those"
        )
    raise ValueError(
        f"{found}no known format, expected one, or columns to read it by, from here: "
        f"{suggest(row, purpose)}"
    )


def _origin(row: Row, place: str, source: str, *, weighted: bool) -> Origin:
    given = {key: row[key] for key in ("id", "source", "weight") if row.get(key) not in (None, "")}
    id = given.get("id", place)
    origin = {
        "id": check_text("id", str(id) if type(id) is int else id),
        "source": check_text("source", given.get("source", source)),
    }
    if weighted and "weight" in given:
        origin["weight"] = _number("weight", given["weight"])
    return origin


def _number(name: str, value: Any) -> Any:
    """Return the number that a CSV text stands for."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        raise ValueError(f"{name}: is text, expected a number") from None


def _contradiction(triple: Triple, name: str, safe: str, harmful: str, mapped: bool) -> str | None:
    """Return why the texts contradict their columns; None if they do not.

    A format's own names vouch for its columns. A mapping may name any field, so that there the safe
    response must refuse.
    """
    if refuses(triple.safe):
        return None
    accept = f"expected the refusal in {safe}, or format: {name} to accept the rows as they are"
    if opens_with_refusal(triple.harmful):
        return (
            f"{harmful}: opens with a refusal and {safe} holds none, so they look swapped; {accept}"
        )
    return f"{safe}: holds no refusal, as columns must show; {accept}" if mapped else None


def as_request(record: Triple | Dialogue) -> Request:
    """Return an example as a request, with its harmful response or last answer as response."""
    if isinstance(record, Triple):
        messages, response = record.messages, record.harmful
    else:
        messages, response = record.messages[:-1], record.messages[-1]["content"]
    return Request(messages=messages, response=response, id=record.id, source=record.source)


class _Pairs:
    """Answers to one prompt, joined in order: the first safe one with the first harmful one.

    Memory: the answers that have not been joined yet.
    """

    def __init__(self) -> None:
        self._waiting: dict[str, deque[Half]] = {}

    def join(self, half: Half) -> Triple | None:
        waiting = self._waiting.setdefault(half.prompt, deque())
        if not waiting or waiting[0].safe == half.safe:
            waiting.append(half)
            return None
        other = waiting.popleft()
        if not waiting:
            del self._waiting[half.prompt]
        if other.origin.get("weight") != half.origin.get("weight"):
            raise ValueError("weight: differs from that of the row it is joined with")
        safe, harmful = (half, other) if half.safe else (other, half)
        return Triple(prompt=half.prompt, safe=safe.text, harmful=harmful.text, **half.origin)

    def left(self) -> Counter[str]:
        """Count the answers without a partner, by kind."""
        return Counter(
            "safe without a harmful one" if half.safe else "harmful without a safe one"
            for half in self.waiting()
        )

    def waiting(self) -> Iterator[Half]:
        """Yield the answers without a partner."""
        return itertools.chain.from_iterable(self._waiting.values())


class _Twice(ValueError):
    def __init__(self, id: str, path: Path, place: str) -> None:
        super().__init__(
            f"{place}: id: {id!r} is already used by an earlier record, expected a unique id"
        )
        self.id = id
        self.path = path
