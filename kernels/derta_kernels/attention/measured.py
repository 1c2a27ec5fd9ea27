"""The implementations that were measured to be faster than Triton's: a table, measured.json.

`benchmarks.attention.choices` writes it from the records of GPUs, and nothing else does. It has no
row for a GPU that nobody has measured, nor for a head dimension.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

TABLE = Path(__file__).with_name("measured.json")
FIELDS: dict[str, type | tuple[type, ...]] = {
    "capability": str,
    "head_dim": int,
    "softcap": bool,
    "implementation": str,
    "version": (int, type(None)),
    "time": float,
    "gpu": str,
}


class Measured(NamedTuple):
    """An implementation that was right, and the fastest, in every pack that was measured.

    Attributes:
        capability: compute capability, as in "9.0".
        head_dim: D.
        softcap: if True, scores have a soft-cap.
        implementation: its name.
        version: major version of flash-attn; None for another implementation.
        time: its time over Triton's, the largest of all packs.
        gpu: name of the GPU, or of several.
    """

    capability: str
    head_dim: int
    softcap: bool
    implementation: str
    version: int | None
    time: float
    gpu: str


@cache
def table(path: Path) -> tuple[Measured, ...]:
    """Return the rows of a file of JSON, a list of objects with the fields of `Measured`.

    Raises:
        ValueError: it is not such a file; names the row.
    """
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path.name} must be JSON: {error}") from error
    if not isinstance(rows, list):
        raise ValueError(f"{path.name} must hold a list of rows, got {type(rows).__name__}")
    return tuple(_row(path.name, place, row) for place, row in enumerate(rows))


def _row(name: str, place: int, row: Any) -> Measured:
    if not isinstance(row, dict) or row.keys() != FIELDS.keys():
        raise ValueError(f"{name}: row {place} must have the fields {', '.join(FIELDS)}, got {row}")
    for field, kind in FIELDS.items():
        value = row[field]
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise ValueError(f"{name}: row {place}: {field} is of the wrong type: {value!r}")
    return Measured(**row)
