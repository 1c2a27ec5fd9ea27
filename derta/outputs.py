"""Outputs: folders that can be written to, and files that appear complete or not at all."""

from __future__ import annotations

import os
from pathlib import Path


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
