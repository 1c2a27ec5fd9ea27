"""Outputs: folders that can be written to, and files that appear complete or not at all."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any


def check_folder(field: str, path: str) -> None:
    """Check that `path` is a folder or can become one, before any work on its content.

    Raises:
        ValueError: the path, or one of its parents, is a file.
    """
    nearest = next(place for place in (Path(path), *Path(path).parents) if place.exists())
    if not nearest.is_dir():
        raise ValueError(f"{field}: {path}: {nearest} is a file, expected a folder")


def write_whole(path: Path, data: bytes, *, private: bool = False) -> None:
    """Write a file that appears complete or not at all.

    Args:
        path: path of the file.
        data: its content.
        private: if True, only its owner can read it.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        if private:
            partial.touch(mode=0o600)
        partial.write_bytes(data)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def compact_json(value: Any, depth: int = 3, *, default: Callable[[Any], Any] | None = None) -> str:
    """Return JSON with a line for each entry down to `depth`, and one line for all within.

    Args:
        value: plain values; others as `default` makes them.
        depth: nested levels that get lines of their own.
        default: see `json.dumps`.

    Raises:
        ValueError: a number is NaN or infinite.
    """

    def laid_out(value: Any, depth: int, indent: str) -> str:
        if depth == 0 or not value or not isinstance(value, dict | list):
            return json.dumps(value, allow_nan=False, ensure_ascii=False, default=default)
        inner = indent + " "
        if isinstance(value, list):
            opening, closing = "[]"
            entries = [laid_out(one, depth - 1, inner) for one in value]
        else:
            opening, closing = "{}"
            entries = [
                f"{json.dumps(str(key), ensure_ascii=False)}: {laid_out(one, depth - 1, inner)}"
                for key, one in value.items()
            ]
        lines = f",\n{inner}".join(entries)
        return f"{opening}\n{inner}{lines}\n{indent}{closing}"

    return laid_out(value, depth, "") + "\n"


def check_file(field: str, path: str) -> None:
    """Check that a file can be written at `path`, before any work on its content.

    Raises:
        ValueError: the path is a folder, or its folder does not exist.
    """
    if Path(path).is_dir():
        raise ValueError(f"{field}: {path} is a folder, expected a file")
    if not Path(path).parent.is_dir():
        raise ValueError(f"{field}: {path}: {Path(path).parent} is no folder")


def check_new_file(field: str, path: str) -> None:
    """Check that a file can be written at `path` and that nothing is there yet.

    Raises:
        ValueError: as `check_file`, or the file exists.
    """
    if Path(path).exists():
        raise ValueError(f"{field}: {path} is there already, choose another file")
    check_file(field, path)
