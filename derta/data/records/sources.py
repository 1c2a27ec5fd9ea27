"""Sources of a run's records: their files, roles and weights."""

from __future__ import annotations

import dataclasses
import itertools
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from derta.data.records.formats import ROLES, Role
from derta.data.records.reading import Reading, Wanted, read_records
from derta.data.records.types import Record, check_weight
from derta.settings import setting

COLUMNS_HELP = (
    "Fields of a file by the names that a format knows: '{prompt: behavior, harmful: meta.text}'."
)


@dataclass(frozen=True, kw_only=True)
class Source:
    """Record files of one role.

    Raises:
        TypeError: the weight is no number.
        ValueError: the path is empty, the role or the format is unknown, the weight is not above 0,
            the limit is below 1, or `columns` name no format's fields.
    """

    path: str | list[str] = setting(help="Path of a file or a folder, or several.")
    role: Role = setting(
        help="safety: triples and rendered rows; helpful: dialogues; borderline: dialogues whose "
        "requests look harmful and are not."
    )
    weight: float = setting(
        1.0,
        "Weight of its targets in the loss, relative to other sources. Multiplies the weight of a "
        "row.",
        gt=0,
    )
    format: str | None = setting(None, "Format of the rows, if their fields do not tell it.")
    columns: dict[str, Any] = setting(help=COLUMNS_HELP, factory=dict)
    limit: int | None = setting(
        None, "Number of records that are read, from the first; null: all.", ge=1
    )

    def __post_init__(self) -> None:
        if not self.paths:
            raise ValueError("path: is empty, expected the path of a file, or of several")
        if self.role not in ROLES:
            raise ValueError(f"role: is {self.role!r}, expected one of {', '.join(ROLES)}")
        check_weight("weight", self.weight)
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"limit: is {self.limit}, expected at least 1")
        Wanted(self.role, self.format, self.columns)

    @property
    def paths(self) -> Sequence[str]:
        """All paths of the source as a sequence."""
        return [self.path] if isinstance(self.path, str) else self.path


def source_records(source: Source, reading: Reading | None = None) -> Iterator[Record]:
    """Yield the records of a source, with the source's weight multiplied into theirs.

    Args:
        source: the files to read.
        reading: filled with the numbers of rows read and skipped; sources that share one get
            distinct ids.

    Raises:
        ValueError, OSError: as `read_records`.
    """
    records = read_records(
        *source.paths,
        role=source.role,
        format=source.format,
        columns=source.columns,
        reading=reading,
    )
    limit = None if source.limit is None else min(source.limit, sys.maxsize)
    for record in itertools.islice(records, limit):
        if source.weight != 1.0:  # checking a copy takes time
            record = dataclasses.replace(record, weight=record.weight * source.weight)
        yield record


def check_paths(paths: Iterable[str]) -> None:
    """Check that all record files exist, before any work on the rest.

    Raises:
        FileNotFoundError: names the first missing path.
    """
    for path in paths:
        if not Path(path).exists():
            raise FileNotFoundError(f"{path}: no such record file")


class SourceRecords(Iterable[Record]):
    """The records of several sources with distinct ids, read again at each iteration.

    Args:
        sources: the files to read; a record's weight is its row's times its source's.

    Raises:
        FileNotFoundError: a source has no file.
        ValueError: as `read_records`, during iteration.
    """

    def __init__(self, sources: Sequence[Source]) -> None:
        self.sources = sources
        check_paths(path for source in sources for path in source.paths)

    def __iter__(self) -> Iterator[Record]:
        reading = Reading()
        for source in self.sources:
            yield from source_records(source, reading)

    def check(self) -> None:
        """Read all records once, to find bad rows before any work on the rest.

        Raises:
            ValueError: as `read_records`.
        """
        for _ in self:
            pass
