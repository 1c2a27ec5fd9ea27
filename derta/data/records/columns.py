"""Columns: the fields of a file that stand for the fields which a format knows.

`{prompt: behavior, harmful: meta.target}` names, for each field of a format, the file's field or a
path into it. A mapped row has these fields and no others, and is read as any row of its format.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from derta.data.records.formats import COLUMNS, FORMATS, KNOWN, ROLES, Row, matching
from derta.data.records.types import SPEAKERS, check_text, field_names, is_name, speaker_name

_ABSENT = object()


@dataclass(frozen=True)
class Constant:
    """A value that all rows share."""

    value: Any


@dataclass(frozen=True)
class Turns:
    """A list of turns that becomes messages.

    Args:
        path: place of the list in a row.
        role, text: places of the speaker and the text in a turn.
        speakers: our role by the file's name of it.
    """

    path: str
    role: str
    text: str
    speakers: Mapping[str, str]

    def messages(self, value: Any) -> Any:
        if not isinstance(value, list):
            raise TypeError(f"messages: is {type(value).__name__}, expected a list of turns")
        messages = []
        for index, turn in enumerate(value):
            name = f"messages[{index}]"
            speaker, text = _at(turn, self.role), _at(turn, self.text)
            if speaker is _ABSENT or text is _ABSENT:
                raise ValueError(f"{name}: expected {self.role} and {self.text}")
            if not isinstance(speaker, str) or speaker not in self.speakers:
                raise ValueError(
                    f"{name}.{self.role}: is {speaker_name(speaker)}, expected one of "
                    f"{', '.join(self.speakers)}"
                )
            messages.append({"role": self.speakers[speaker], "content": text})
        return messages


@dataclass(frozen=True)
class Columns:
    """Where each field of a format stands in the rows of a file.

    Attributes:
        places: by field, a path ("meta.text", "turns.0.text"), a constant or a list of turns.
    """

    places: Mapping[str, str | Constant | Turns]

    def roots(self, of: Collection[str] = COLUMNS) -> frozenset[str]:
        """Return the fields of the file in which those of a format stand."""
        paths = [getattr(place, "path", place) for name, place in self.places.items() if name in of]
        named = [path for path in paths if isinstance(path, str)]
        return frozenset(named).union(path.partition(".")[0] for path in named)

    def apply(self, row: Any, required: frozenset[str]) -> dict[str, Any]:
        """Return the row with the fields that a format knows.

        Raises:
            TypeError: the row is no object, or its turns are no list.
            ValueError: it lacks a required field, or a turn has an unknown speaker.
        """
        if not isinstance(row, dict):
            raise TypeError(f"row: is {type(row).__name__}, expected an object")
        mapped = {}
        for name, place in self.places.items():
            if isinstance(place, Constant):
                mapped[name] = place.value
                continue
            path = place.path if isinstance(place, Turns) else place
            value = _at(row, path)
            if value is _ABSENT and name in required:
                raise ValueError(f"{name}: columns take it from {path}, found {field_names(row)}")
            if value is not _ABSENT:
                mapped[name] = place.messages(value) if isinstance(place, Turns) else value
        return mapped


def _at(row: Any, path: str) -> Any:
    """Return the value at a path. A field whose name has dots comes before a path."""
    if isinstance(row, dict) and path in row:
        return row[path]
    for part in path.split("."):
        if isinstance(row, dict) and part in row:
            row = row[part]
        elif isinstance(row, list) and part.isdecimal() and int(part) < len(row):
            row = row[int(part)]
        else:
            return _ABSENT
    return row


def read_columns(given: Mapping[str, Any], known: frozenset[str] = COLUMNS) -> Columns:
    """Read a mapping as a user writes it.

    Args:
        given: by field, a path; `{value: constant}`; or, for messages, `{path: turns, role:
            speaker, text: value, user: human, assistant: gpt}`, of which only path is required.
        known: the fields that may be mapped.

    Raises:
        ValueError: a field is unknown, or its place is none of these.
    """
    for name in given:
        if name not in known:
            nearest = difflib.get_close_matches(f"{name}", known, n=1)
            advice = f"; did you mean {nearest[0]!r}?" if nearest else ""
            raise ValueError(f"columns: no format knows a field {name!r}{advice}")
    return Columns({name: _place(name, place) for name, place in given.items()})


def _place(name: str, place: Any) -> str | Constant | Turns:
    if isinstance(place, str) and place:
        return place
    if isinstance(place, Mapping):
        if place.keys() == {"value"} and isinstance(place["value"], str | int | float):
            return Constant(place["value"])
        paths = {"path", "role", "text"}
        if name == "messages" and "path" in place and place.keys() <= paths.union(SPEAKERS):
            places = {"role": "role", "text": "content", **place}
            if all(isinstance(places[key], str) and places[key] for key in paths):
                speakers = _speakers(places)
                return Turns(places["path"], places["role"], places["text"], speakers)
    turns = f", or {{path: ..., role: ..., text: ..., {': ..., '.join(SPEAKERS)}: ...}}"
    raise ValueError(
        f"columns.{name}: expected a field's name, {{value: ...}}"
        f"{turns if name == 'messages' else ''}"
    )


def _speakers(places: Mapping[str, Any]) -> dict[str, str]:
    speakers: dict[str, str] = {}
    for role in SPEAKERS:
        names = places.get(role, role)
        for name in names if isinstance(names, list) else [names]:
            check_text(f"columns.messages.{role}", name)
            if speakers.setdefault(name, role) != role:
                raise ValueError(
                    f"columns.messages.{role}: {name!r} is the {speakers[name]} too, expected one "
                    "role for each speaker"
                )
    return speakers


def format_of_columns(columns: Columns, purpose: str | None, format: str | None) -> str:
    """Return the format of mapped rows, which their fields tell as those of any row.

    Args:
        columns: the mapping.
        purpose: a role or a kind; None: any.
        format: the format that the user names, if any.

    Raises:
        ValueError: no format for the purpose has these fields, or several have, or the rows are
            rendered ones.
    """
    found = frozenset(columns.places)
    fitting = [format] if format else list(matching(found & KNOWN))
    names = [
        name
        for name in fitting
        if FORMATS[name].fits(found) and (purpose is None or purpose in FORMATS[name].readers)
    ]
    if len(names) > 1:
        raise ValueError(
            f"columns: {field_names(found)} are fields of any of {', '.join(names)}, expected "
            "format: with one of them"
        )
    if not names:
        meant = format or f"any format for {purpose or 'training'}"
        fields = FORMATS[format].fields if format else _WANTED[purpose or "safety"]
        raise ValueError(
            f"columns: {field_names(found)} are not the fields of {meant}, expected "
            f"{', '.join(fields)}"
        )
    if names == ["rendered"]:
        raise ValueError("columns: are not for rendered rows, expected their own field names")
    return names[0]


_WANTED = {
    **dict.fromkeys(ROLES, ("prompt", "answer")),
    "safety": ("prompt", "safe", "harmful"),
    "harmful": ("prompt",),
    "harmless": ("prompt",),
    "question": ("prompt", "answer"),
}
# Words in names of fields that public files use, the likeliest first.
_WORDS = {
    "prompt": "prompt instruction question query goal behavior behaviour request user input text",
    "safe": "safe refusal refused chosen benign",
    "harmful": "harmful unsafe rejected jailbroken malicious",
    "answer": "answer response output completion reply target reference",
}
_LISTED = {"role": "role from speaker author sender", "text": "content value text utterance"}


def suggest(row: Row, purpose: str | None) -> str:
    """Return a `columns:` line to start from, guessed from names of fields, never from texts."""
    left = [f"{name}" for name in row]
    guessed = {}
    for slot in _WANTED[purpose or "safety"]:
        found = _guess(_WORDS[slot].split(), left)
        guessed[slot] = found or "FIELD"
        left = [name for name in left if name != found]
    for name, value in row.items() if "answer" in guessed else ():
        if is_name(f"{name}") and isinstance(value, list) and value and isinstance(value[0], dict):
            keys = [f"{key}" for key in value[0]]
            inner = {key: _guess(words.split(), keys) or "FIELD" for key, words in _LISTED.items()}
            turns = {"path": name, **inner, "user": "NAME", "assistant": "NAME"}
            return f"columns: {{messages: {_yaml(turns)}}}"
    return f"columns: {_yaml(guessed)}"


def _guess(words: list[str], names: list[str]) -> str | None:
    for word in words:
        for name in sorted(filter(is_name, names), key=len):
            if word in _words_of(name):
                return name
    return None


def _words_of(name: str) -> Iterator[str]:
    return (found.lower() for found in re.findall(r"[A-Z]?[a-z]+|[A-Z]+", name))


def _yaml(names: Mapping[str, str]) -> str:
    def quoted(name: str) -> str:
        plain = re.fullmatch(r"[A-Za-z_][\w.-]*", name, re.ASCII)
        return name if plain else json.dumps(name)

    return "{" + ", ".join(f"{key}: {quoted(name)}" for key, name in names.items()) + "}"
