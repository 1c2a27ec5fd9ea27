"""The JSON Schema of a dataclass of settings, so that editors complete and check its YAML."""

from __future__ import annotations

import dataclasses
import enum
import inspect
import types
import typing
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from derta.settings.fields import About, about_of, element_of

DIALECT = "https://json-schema.org/draft/2020-12/schema"
NAMES: dict[Any, str] = {
    str: "string",
    int: "integer",
    float: "number",
    bool: "boolean",
    type(None): "null",
    dict: "object",
}


def json_schema(
    config_class: Any,
    title: str,
    *,
    whole: bool = True,
    ranges: Mapping[str, About] = MappingProxyType({}),
) -> dict[str, Any]:
    """Return the schema of a mapping that `build` makes a `config_class` of.

    Args:
        config_class: a dataclass. Described fields have help, default and range; of others, whose
            defaults may depend on the machine, the type and the first sentence of their help.
        title: the title of the schema.
        whole: if True, required keys must be there; else the command line may add them.
        ranges: ranges of fields that are not described where they are defined.
    """
    definitions: dict[str, Any] = {}
    schema = _mapping(config_class, definitions, whole)
    for name, about in ranges.items():
        if name in schema["properties"]:
            schema["properties"][name] |= _bounds(about)
    return {"$schema": DIALECT, "title": title, **schema, "$defs": definitions}


def _mapping(config_class: Any, definitions: dict[str, Any], whole: bool) -> dict[str, Any]:
    hints = typing.get_type_hints(config_class)
    fields = [field for field in dataclasses.fields(config_class) if field.init]
    required = [
        field.name
        for field in fields
        if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    ]
    schema: dict[str, Any] = {
        "type": "object",
        "properties": {
            field.name: _property(field, hints[field.name], definitions) for field in fields
        },
        "additionalProperties": False,
    }
    return schema | ({"required": required} if whole and required else {})


def _property(field: Any, hint: Any, definitions: dict[str, Any]) -> dict[str, Any]:
    about = about_of(field)
    schema = _typed(hint, definitions)
    schema |= _bounds(about)
    if not about.help:
        theirs = inspect.cleandoc(field.metadata.get("help") or "").partition(". ")[0]
        return {"description": " ".join(theirs.split()), **schema} if theirs else schema
    default = field.default
    if field.default_factory is not dataclasses.MISSING:
        default = field.default_factory()
    if about.shown is None and default is not dataclasses.MISSING:
        schema["default"] = default
    note = "" if about.shown is None else f" Default: {about.shown}."
    return {"description": about.help.removesuffix(":") + note, **schema}


def _bounds(about: About) -> dict[str, float]:
    bounds = {
        "minimum": about.ge,
        "exclusiveMinimum": about.gt,
        "maximum": about.le,
        "exclusiveMaximum": about.lt,
    }
    return {name: bound for name, bound in bounds.items() if bound is not None}


def _typed(hint: Any, definitions: dict[str, Any]) -> dict[str, Any]:
    """Return the schema of a type. A list may be given as its only element, as `build` takes it."""
    if hint in NAMES:
        return {"type": NAMES[hint]}
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        return {"enum": [one.value for one in hint]}
    arguments = typing.get_args(hint)
    origin = typing.get_origin(hint)
    if origin is typing.Literal:
        return {"enum": list(arguments)}
    if origin is dict:
        return {"type": "object", "additionalProperties": _typed(arguments[1], definitions)}
    if origin is list:
        part = element_of(hint)
        element = _typed(arguments[0], definitions)
        if part is not None:
            definitions.setdefault(part.__name__, _mapping(part, definitions, True))
            element = {"$ref": f"#/$defs/{part.__name__}"}
        return _any_of([{"type": "array", "items": element}, element])
    if origin in (typing.Union, types.UnionType):
        return _any_of([_typed(one, definitions) for one in _narrowed(arguments)])
    return {}


def _narrowed(arguments: tuple[Any, ...]) -> list[Any]:
    """Return the types of a union without str where a named choice stands for it."""
    named = any(isinstance(one, type) and issubclass(one, enum.Enum) for one in arguments)
    return [one for one in arguments if not (named and one is str)]


def _any_of(schemas: list[dict[str, Any]]) -> dict[str, Any]:
    flat = [part for schema in schemas for part in schema.get("anyOf", [schema])]
    schemas = [one for index, one in enumerate(flat) if one not in flat[:index]]
    if len(schemas) == 1:
        return schemas[0]
    if {} in schemas:
        return {}
    if all(schema.keys() == {"type"} for schema in schemas):
        return {"type": [schema["type"] for schema in schemas]}
    if all(schema.keys() <= {"enum"} or schema == {"type": "null"} for schema in schemas):
        return {"enum": [one for schema in schemas for one in schema.get("enum", [None])]}
    return {"anyOf": schemas}
