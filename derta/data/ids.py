"""Ids of their own for all that is read together, however many files have the same ones."""

from __future__ import annotations

import hashlib
from array import array
from collections import defaultdict
from pathlib import Path

_Buckets = defaultdict[int, "array[int]"]


class Ids:
    """The ids met so far, by 64 bits of each: ten million take 170 MB."""

    def __init__(self) -> None:
        self._files: set[tuple[Path, str | None]] = set()
        self._earlier: _Buckets = defaultdict(lambda: array("Q"))
        self._here: _Buckets = defaultdict(lambda: array("Q"))

    def begin(self, file: Path, purpose: str | None) -> None:
        """Ids that come now are those of this file.

        Raises:
            ValueError: it was read for the same purpose before.
        """
        read = (file.resolve(), purpose)
        if read in self._files:
            raise ValueError(f"{file}: comes twice, expected every file once")
        self._files.add(read)
        while self._here:
            key, digests = self._here.popitem()
            self._earlier[key].extend(digests)

    def name(self, id: str, stem: str) -> str | None:
        """The id to use: this one, or where another file has it this one after the file's stem.

        None if it was met in this file.
        """
        while (digest := _digest(id)) in self._earlier.get(digest >> 46, ()):
            id = f"{stem}:{id}"
        here = self._here[digest >> 46]
        if digest in here:
            return None
        here.append(digest)
        return id


def _digest(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest())
