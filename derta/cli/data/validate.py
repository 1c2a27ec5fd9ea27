"""`derta data validate`: every bad row of record files, in one pass."""

from __future__ import annotations

from derta.cli.settings.data import ValidateConfig
from derta.data import Reading
from derta.data.records.reading import read_placed


def run(config: ValidateConfig) -> None:
    """Print the place, field and reason of every bad row, and the counts of each file.

    Raises:
        ValueError: a row is bad, or the format is unknown.
        FileNotFoundError: a file does not exist.
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
