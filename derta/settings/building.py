"""Dataclasses of settings built from loosely typed values, with one sentence for every error."""

from __future__ import annotations

import dataclasses
import difflib
import typing
from collections.abc import Collection, Mapping
from types import MappingProxyType
from typing import Any, TypeVar

import yaml
from pydantic import TypeAdapter, ValidationError

from derta.settings.fields import about_of, all_finite, choices_of, element_of, leaves
from derta.settings.help import type_words
from derta.settings.reading import Text, read_text, shortened

Config = TypeVar("Config")


def build(
    config_class: type[Config],
    sources: Mapping[str, Mapping[str, Any]],
    *,
    near: Mapping[str, Collection[str]] | None = None,
) -> Config:
    """Build a dataclass from loosely typed values ("1e-4" is a float here, though not in YAML).

    A single value where a list is expected becomes a list of one. `Text` is read as YAML, except
    for a field of text, which takes it unchanged.

    Args:
        config_class: a dataclass with annotated fields.
        sources: the values by key of each origin. Messages call an origin by its name. The last
            origin with a value wins.
        near: further keys by origin, which that origin may hold but which are of no use here. They
            count where the nearest to an unknown key is named.

    Raises:
        ValueError: a key is unknown (names the nearest), missing, or has the wrong type, an unknown
            choice, an empty text, or a number that is not finite.
    """
    given = {
        key: (value, origin) for origin, values in sources.items() for key, value in values.items()
    }
    return config_class(**_arguments(config_class, given, near=near or {}))


def shared(values: Mapping[str, Any], ours: Any, theirs: Any) -> dict[str, Any]:
    """Return the values of a file for `theirs` without the keys that `ours` lacks.

    Unknown keys of both stay, so that `build` refuses them. So do values of lists of dataclasses,
    entry by entry. A key of ours that is for the command line only goes.
    """
    mine, others = (
        {field.name: field for field in dataclasses.fields(kind)} for kind in (ours, theirs)
    )
    kept = {}
    for key, value in values.items():
        if key in others and (key not in mine or about_of(mine[key]).option_only):
            continue
        if key in mine and key in others and isinstance(value, list):
            parts = [element_of(typing.get_type_hints(kind)[key]) for kind in (ours, theirs)]
            if all(parts):
                value = [shared(one, *parts) if isinstance(one, dict) else one for one in value]
        kept[key] = value
    return kept


def _arguments(
    config_class: Any,
    given: Mapping[str, tuple[Any, str]],
    within: str = "",
    near: Mapping[str, Collection[str]] = MappingProxyType({}),
) -> dict[str, Any]:
    """Return the arguments of a dataclass from values and their origins.

    Args:
        within: the part of its origin that the dataclass is, if it is not the whole.
        near: see `build`.
    """
    fields = {field.name: field for field in dataclasses.fields(config_class) if field.init}
    hints = typing.get_type_hints(config_class)
    typed = {}
    for key, (value, origin) in given.items():
        place = f"{within}.{key}" if within else f"{origin}: {key}"
        if key not in fields:
            nearest = _nearest(str(key), fields) or _nearest(str(key), near.get(origin, ()))
            advice = f"; did you mean {nearest[0]!r}?" if nearest else ""
            raise ValueError(f"{within or origin}: unknown key {key!r}{advice}")
        hint = hints[key]
        try:
            if isinstance(value, Text):
                value = _read(value, hint)
            part = element_of(hint)
            typed[key] = _typed(value, hint) if part is None else _parts(value, part, place)
            if flaw := _unknown(value, hint) or _flaw(typed[key], fields[key], hint):
                raise ValueError(f"{place}: expected {flaw}, got {shortened(value)}")
        except yaml.YAMLError:
            said = f"{shortened(str(value))} is not a value that YAML can read"
            raise ValueError(f"{place}: {said}") from None
        except ValidationError:
            said = f"expected {_expected(hint)}, got {shortened(value)}"
            raise ValueError(f"{place}: {said}") from None
    missing = [
        name
        for name, field in fields.items()
        if name not in typed
        and field.default is dataclasses.MISSING
        and field.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise ValueError(f"{within}{': ' if within else ''}missing {', '.join(missing)}")
    return typed


def _nearest(key: str, known: Collection[str]) -> list[str]:
    return difflib.get_close_matches(key, known, n=1)


def _parts(values: Any, part: Any, place: str) -> list[Any]:
    """Build dataclasses from a list of mappings, or from one. Messages name the place and the key.

    Raises:
        ValueError: as `build`, or the dataclass itself refuses a value.
    """
    made = []
    for index, value in enumerate(values if isinstance(values, list) else [values]):
        here = f"{place}[{index}]"
        if not isinstance(value, dict):
            raise ValueError(
                f"{here}: expected {', '.join(field.name for field in dataclasses.fields(part))}, "
                f"got {shortened(value)}"
            )
        given = {key: (one, "") for key, one in value.items()}
        arguments = _arguments(part, given, within=here)
        try:
            made.append(part(**arguments))
        except ValueError as error:
            raise ValueError(f"{here}.{error}") from error
    return made


def _unknown(value: Any, hint: Any) -> str | None:
    """Return the keys of a library's dataclass if a mapping for it has others."""
    for part in typing.get_args(hint):
        if isinstance(value, dict) and dataclasses.is_dataclass(part):
            known = [field.name for field in dataclasses.fields(part) if field.init]
            return None if value.keys() <= set(known) else f"a mapping of {', '.join(known)}"
    return None


def _flaw(value: Any, field: dataclasses.Field[Any], hint: Any) -> str | None:
    """Return what is expected in place of a value that has the right type, None if it is right."""
    choices = choices_of(hint) or tuple(field.metadata.get("choices") or ())
    if isinstance(value, str) and choices and value not in choices:
        return "one of " + ", ".join(map(str, choices))
    if not all_finite(value):
        return "finite numbers"
    texts = [one for one in leaves(value) if isinstance(one, str)]
    if any("\0" in text for text in texts):
        return "text without a null character"
    return "text that is not empty" if "" in texts and field.default != "" else None


def _expected(hint: Any) -> str:
    if typing.get_origin(hint) is typing.Literal:
        choices = typing.get_args(hint)
        return ("one of " if len(choices) > 1 else "") + ", ".join(map(str, choices))
    if typing.get_origin(hint) is typing.Union:  # of Literal and None, as typing spells it
        return " or ".join(
            "null" if one is type(None) else _expected(one) for one in typing.get_args(hint)
        )
    if typing.get_origin(hint) is dict:
        return type_words(hint)
    return hint.__name__ if isinstance(hint, type) else str(hint)


def _read(text: Text, hint: Any) -> Any:
    if hint is str or (hint == str | None and text != "null"):
        return str(text)
    return read_text(text)


def _typed(value: Any, hint: Any) -> Any:
    adapter: TypeAdapter[Any] = TypeAdapter(hint, config={"arbitrary_types_allowed": True})
    # Read loosely, "3" becomes a number, as wanted, but so does true.
    strict = any(isinstance(one, bool) for one in leaves(value))
    try:
        return adapter.validate_python(value, strict=strict)
    except ValidationError:
        return adapter.validate_python([value], strict=strict)
