"""The keys of a dataclass of settings as a help page, 100 columns wide."""

from __future__ import annotations

import dataclasses
import textwrap
import types
import typing
from collections.abc import Iterator
from typing import Any

from derta.settings.fields import Key, choices_of, element_of, keys_of

WIDTH = 100
COLUMN = 36
WORDS = {str: "text", int: "integer", float: "number", bool: "true|false", Any: "value"}


def type_words(hint: Any) -> str:
    """Return a type as help names it: "integer", "a|b", "[text, ...]"."""
    if hint in WORDS:
        return WORDS[hint]
    if choices_of(hint):
        return "|".join(map(str, choices_of(hint)))
    if dataclasses.is_dataclass(hint):
        return "{" + ", ".join(keys_of(typing.cast(type, hint))) + "}"
    arguments = typing.get_args(hint)
    if typing.get_origin(hint) is list:
        return f"[{type_words(arguments[0])}, ...]"
    if typing.get_origin(hint) is dict:
        return f"{{name: {type_words(arguments[1])}, ...}}"
    assert typing.get_origin(hint) in (typing.Union, types.UnionType), hint
    return " | ".join(type_words(one) for one in arguments if one is not type(None))


def value_words(value: Any) -> str:
    """Return a value as YAML has it on one line."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return f"[{', '.join(map(value_words, value))}]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {value_words(one)}" for key, one in value.items()) + "}"
    return '""' if value == "" else f"{value:g}" if isinstance(value, float) else str(value)


def _notes(key: Key) -> str:
    notes = [key.about.range] if key.about.range else []
    shown = value_words(key.default) if key.about.shown is None else key.about.shown
    notes.append("required" if key.required else f"default: {shown}")
    return f"({'; '.join(notes)})"


def _lines(mark: str, key: Key) -> Iterator[str]:
    text = f"{key.about.help} {_notes(key)}" if key.about.help else _notes(key)
    # A default with blanks does not break over lines where it can stay on one.
    told = textwrap.wrap(text, WIDTH - COLUMN, break_long_words=False, break_on_hyphens=False)
    name = f"{mark}{key.name} {type_words(key.hint)}"
    if len(name) > COLUMN - 2:
        yield from textwrap.wrap(name, WIDTH, subsequent_indent=" " * 6, break_on_hyphens=False)
    else:
        told[0] = f"{name:<{COLUMN}}{told[0]}"
        yield told.pop(0)
    yield from (" " * COLUMN + line for line in told)


def describe_keys(config_class: type) -> str:
    """Return a line or more for every key, by groups: name, type, help, range and default."""
    groups: dict[str, list[str]] = {}
    parts: set[Any] = set()
    for key in keys_of(config_class).values():
        lines = groups.setdefault(key.heading, [])
        lines += _lines("  --", key)
        part = element_of(key.hint)
        if part is not None and part not in parts:
            parts.add(part)
            for inner in keys_of(part).values():
                lines += _lines("      ", inner)
    return "\n\n".join(
        "\n".join([f"{heading}:", *lines] if heading else lines)
        for heading, lines in groups.items()
    )
