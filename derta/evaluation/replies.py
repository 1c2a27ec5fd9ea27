"""Replies that are kept in a file as they come, so that a run that was cut short goes on there."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any


class Replies:
    """Replies by their keys, each appended to a file as it comes, that only its owner can read.

    A last line that was cut short, as by a crash, is written anew.

    Args:
        path: of the file, made with its folder when there is something to keep; None: no file.

    Raises:
        ValueError: another line of it is not a reply; names file and line.
    """

    def __init__(self, path: Path | None = None) -> None:
        self.path = path
        self._values: dict[str, Any] = {}
        self._lock = threading.Lock()
        if path is not None and path.exists():
            self._load(path)

    def __contains__(self, key: str) -> bool:
        return key in self._values

    def __getitem__(self, key: str) -> Any:
        return self._values[key]

    def keep(self, replies: Mapping[str, Any]) -> None:
        """All in one write, which a kill does not part, from any thread."""
        lines = [json.dumps({"key": key, "value": value}) + "\n" for key, value in replies.items()]
        with self._lock:
            self._values.update(replies)
            if self.path is None:
                return
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(self.path, "ab", opener=_for_owner) as file:
                os.fchmod(file.fileno(), 0o600)  # it may have been another's work
                file.write("".join(lines).encode())

    def _load(self, path: Path) -> None:
        content = path.read_bytes()
        whole = content.rfind(b"\n") + 1
        if whole < len(content):
            os.truncate(path, whole)
        for number, line in enumerate(content[:whole].splitlines(), start=1):
            try:
                entry = json.loads(line)
                self._values[entry["key"]] = entry["value"]
            except (ValueError, KeyError, TypeError):
                raise ValueError(
                    f"{path}:{number}: expected a reply as they are kept here, remove the file"
                ) from None


def _for_owner(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)
