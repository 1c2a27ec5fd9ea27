"""Finished parts of a long run, kept so that a killed run goes on where it stopped.

A part is one JSON file, whole or not there. Its name holds a digest of the settings that made it,
so that a run with other settings makes its own.
"""

from __future__ import annotations

import collections.abc
import dataclasses
import hashlib
import json
import types
import typing
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from derta._version import __version__
from derta.outputs import write_whole
from derta.terminal import say

T = TypeVar("T")


class Parts:
    """The finished parts of a run, in a folder.

    Args:
        folder: folder of the files, created with the first part.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def kept(self, name: str, settings: Any, kind: Any, make: Callable[[], T]) -> T:
        """Return a part from its file, or make and keep it.

        Args:
            name: name of the part.
            settings: all that the part depends on, as for `to_plain`.
            kind: type of the part, with its fields annotated, as for `from_plain`.
            make: makes the part.
        """
        plain = json.dumps([__version__, to_plain(settings)], sort_keys=True)
        digest = hashlib.sha256(plain.encode()).hexdigest()[:12]
        path = self.folder / f"{name}-{digest}.json"
        if path.exists():
            say(f"{name}: already there, {path}")
            return typing.cast(T, from_plain(kind, json.loads(path.read_text(encoding="utf-8"))))
        made = make()
        self.folder.mkdir(parents=True, exist_ok=True)
        write_whole(path, json.dumps(to_plain(made)).encode())
        return made


def to_plain(value: Any) -> Any:
    """Return a value as JSON holds it; of an object that is no dataclass, its public fields."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, np.ndarray):
        return value.tolist()
    if isinstance(value, Mapping):
        return {str(key): to_plain(one) for key, one in value.items()}
    if isinstance(value, collections.abc.Sequence):
        return [to_plain(one) for one in value]
    return {name: to_plain(one) for name, one in vars(value).items() if not name.startswith("_")}


def from_plain(kind: Any, plain: Any) -> Any:
    """Return the value of a type that `to_plain` made plain.

    Arrays of fractions become float32, to which they are exact, and others int64. Fields that the
    file lacks take their defaults.

    Args:
        kind: a dataclass, an array, a sequence or a mapping of such, or a type of JSON.
        plain: content of a file.
    """
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        (kind,) = (one for one in inner if one is not type(None))
        return None if plain is None else from_plain(kind, plain)
    if kind is np.ndarray or origin is np.ndarray:
        array = np.asarray(plain)
        return array.astype(np.float32) if array.dtype.kind == "f" else array
    if dataclasses.is_dataclass(kind):
        hints = typing.get_type_hints(kind)
        return kind(**{name: from_plain(hints[name], one) for name, one in plain.items()})  # type: ignore[operator]
    if origin is tuple:
        kinds = inner[:1] * len(plain) if inner[-1] is ... else inner
        return tuple(from_plain(*one) for one in zip(kinds, plain, strict=True))
    if origin in (list, collections.abc.Sequence):
        return [from_plain(inner[0], one) for one in plain]
    if origin in (dict, collections.abc.Mapping):
        return {key: from_plain(inner[1], one) for key, one in plain.items()}
    return plain
