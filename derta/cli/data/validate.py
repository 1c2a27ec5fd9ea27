"""`derta data validate`: every bad row of record files, in one pass."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from derta.data import Reading
from derta.data.records.reading import read_placed


@dataclass(kw_only=True)
class ValidateConfig:
    """A validation.

    Args:
        files: record files, folders of them, or folders that `datasets` saved.
        role: what they are read for: a role in training, or a kind of request to evaluate with.
        format: name of their format, where their fields leave it open.
    """

    files: list[str]
    role: Literal["safety", "helpful", "borderline", "harmful", "harmless", "question"]
    format: str | None = None


def run(config: ValidateConfig) -> None:
    """Prints every bad row's place, field and reason, and what each file has.

    Raises:
        ValueError: a row is bad, or the format is unknown.
        FileNotFoundError: a file is not there.
    """
    reading = Reading()
    for _, record in read_placed(config.files, config.role, config.format, reading):
        if isinstance(record, ValueError):
            print(record)
    for path, counts in reading.files.items():
        print(f"{path}: {counts}")
    bad = sum(counts.bad for counts in reading.files.values())
    if bad:
        raise ValueError(f"errors: {bad} in {len(reading.files)} files")
