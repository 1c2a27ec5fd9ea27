"""`derta reproduce data`: the authors' training files, with a seed."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypeVar

from derta.cli.settings.reproduce import RenderSettings, ReproduceDataConfig
from derta.data import Dialogue, Triple, read_records
from derta.data.records.rendering import SAFETY_ROWS, Row, official_rows
from derta.data.records.sources import Role
from derta.outputs import write_whole
from derta.terminal import say

SAFETY = "train/safety_beaver_safe_and_unsafe_response.json"
HELPFUL = "train/helpfulness_unsencor_wizardlm_60k_part_*.json"

Kind = TypeVar("Kind")


def read_rows(config: RenderSettings) -> dict[str, list[Row]]:
    """Return the rows of each variant, made of the authors' raw files.

    Raises:
        FileNotFoundError: a raw file is missing.
        ValueError: as `read_records` and `official_rows`.
    """
    data = Path(config.data)
    safety, helpful = data / SAFETY, sorted(data.glob(HELPFUL))
    if not safety.is_file() or not helpful:
        missing = SAFETY if not safety.is_file() else HELPFUL
        raise FileNotFoundError(f"{data / missing}: no such file of the official repository")
    return official_rows(
        _read([safety], "safety", Triple),
        _read(helpful, "helpful", Dialogue),
        seed=config.seed,
        closing=config.closing,
    )


def _read(paths: Iterable[Path], role: Role, kind: type[Kind]) -> list[Kind]:
    records: list[Any] = list(read_records(*paths, role=role))
    for record in records:
        if not isinstance(record, kind):
            raise ValueError(f"{record.id}: expected rows of {kind.__name__.lower()}s")
    return records


def write_rows(rows: Iterable[Row], path: Path) -> None:
    """Write rows as JSON Lines, readable by their owner only."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    write_whole(path, "".join(json.dumps(row) + "\n" for row in rows).encode(), private=True)


def run(config: ReproduceDataConfig) -> None:
    """Write the rows of each variant.

    Raises:
        ValueError: a file is there already.
    """
    paths = {recipe: Path(config.output_dir, f"{recipe}.jsonl") for recipe in SAFETY_ROWS}
    for path in paths.values():
        if path.exists():
            raise ValueError(f"output_dir: {path} exists, choose another folder")
    for recipe, rows in read_rows(config).items():
        path = paths[recipe]
        write_rows(rows, path)
        say(f"{path}: {len(rows):,} rows")
