"""Settings from a YAML file and from `--key value`, checked against a dataclass."""

from __future__ import annotations

import dataclasses
import difflib
import re
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import TypeAdapter, ValidationError

Config = TypeVar("Config")


class Text(str):
    """A value as it was typed on the command line; the type of its field decides how it reads."""


class _Loader(yaml.SafeLoader):
    """YAML without its traps: `no` and dates are text (save_strategy: no), no key comes twice."""

    yaml_implicit_resolvers = {
        first: [pair for pair in resolvers if not pair[0].endswith((":bool", ":timestamp"))]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen = set()
        for key_node, _ in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                continue  # a list or a mapping, which SafeLoader refuses as a key
            if key_node.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key_node.value!r} is given twice", key_node.start_mark
                )
            seen.add(key_node.value)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile("^(true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)


def read_yaml(path: Path) -> dict[str, Any]:
    """Reads a configuration file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not a YAML mapping in UTF-8, or a key is given twice; names file and line.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such configuration file")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        byte = error.object[error.start]
        raise ValueError(f"{path}:{line}: byte {byte:#04x} is not UTF-8") from None
    try:
        values = yaml.load(text, _Loader)
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise ValueError(f"{path}:{line}: U+{error.character:04X} has no place in YAML") from None
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise ValueError(f"{path}:{line}: {error.problem}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path}: expected `key: value` lines, got {type(values).__name__}")
    return values


def read_options(arguments: Sequence[str]) -> dict[str, Text | bool]:
    """Splits `--key value`, `--key=value` and bare `--key`, which is true.

    Raises:
        ValueError: an argument belongs to no key.
    """
    values: dict[str, Text | bool] = {}
    remaining = list(arguments)
    while remaining:
        argument = remaining.pop(0)
        if not argument.startswith("--"):
            raise ValueError(f"expected --key value, got {argument!r}")
        key, separator, text = argument[2:].partition("=")
        value: Text | bool = Text(text)
        if not separator:
            follows = bool(remaining) and not remaining[0].startswith("--")
            value = Text(remaining.pop(0)) if follows else True
        values[key.replace("-", "_")] = value
    return values


def build(config_class: type[Config], sources: Mapping[str, Mapping[str, Any]]) -> Config:
    """Makes a dataclass from loosely typed values ("1e-4" is a float here, though not in YAML).

    What is no list where one is expected becomes a list of one. `Text` is YAML, but for a field
    that holds nothing else than text: it has it as it is.

    Args:
        config_class: a dataclass with annotated fields.
        sources: field name to value for each origin, which is what messages call it; where several
            have a value the last one's counts.

    Raises:
        ValueError: a key is unknown (names the nearest), of the wrong type, or missing.
    """
    given = {
        key: (value, origin) for origin, values in sources.items() for key, value in values.items()
    }
    return config_class(**_arguments(config_class, given))


def _arguments(
    config_class: Any, given: Mapping[str, tuple[Any, str]], within: str = ""
) -> dict[str, Any]:
    """Arguments of a dataclass from values and their origins.

    Args:
        within: which part of its origin the dataclass is, where it is not the whole.
    """
    fields = {field.name: field for field in dataclasses.fields(config_class) if field.init}
    hints = typing.get_type_hints(config_class)
    typed = {}
    for key, (value, origin) in given.items():
        place = f"{within}.{key}" if within else f"{origin}: {key}"
        if key not in fields:
            nearest = difflib.get_close_matches(str(key), fields, n=1)
            advice = f"; did you mean {nearest[0]!r}?" if nearest else ""
            raise ValueError(f"{within or origin}: unknown key {key!r}{advice}")
        hint = hints[key]
        try:
            if isinstance(value, Text):
                value = _read(value, hint)
            part = _part(hint)
            typed[key] = _typed(value, hint) if part is None else _parts(value, part, place)
        except yaml.YAMLError:
            raise ValueError(f"{place}: {value!r} is not a value that YAML can read") from None
        except ValidationError:
            raise ValueError(f"{place}: expected {_expected(hint)}, got {value!r}") from None
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


def _part(hint: Any) -> Any:
    """The dataclass that `hint` is a list of, if it is one."""
    (element,) = typing.get_args(hint) if typing.get_origin(hint) is list else (None,)
    return element if dataclasses.is_dataclass(element) else None


def _parts(values: Any, part: Any, place: str) -> list[Any]:
    """Dataclasses from a list of mappings, or from one; messages say which and which of its keys.

    Raises:
        ValueError: as `build`, or what the dataclass itself refuses.
    """
    made = []
    for index, value in enumerate(values if isinstance(values, list) else [values]):
        here = f"{place}[{index}]"
        if not isinstance(value, dict):
            raise ValueError(
                f"{here}: expected {', '.join(field.name for field in dataclasses.fields(part))}, "
                f"got {value!r}"
            )
        given = {key: (one, "") for key, one in value.items()}
        arguments = _arguments(part, given, within=here)
        try:
            made.append(part(**arguments))
        except ValueError as error:
            raise ValueError(f"{here}.{error}") from error
    return made


def _expected(hint: Any) -> str:
    if typing.get_origin(hint) is typing.Literal:
        return "one of " + ", ".join(map(str, typing.get_args(hint)))
    if typing.get_origin(hint) is typing.Union:  # of Literal and None, which typing spells out
        return " or ".join(
            "null" if one is type(None) else _expected(one) for one in typing.get_args(hint)
        )
    return hint.__name__ if isinstance(hint, type) else str(hint)


def _read(text: Text, hint: Any) -> Any:
    if hint is str or (hint == str | None and text != "null"):
        return str(text)
    return yaml.load(text, _Loader)


def _typed(value: Any, hint: Any) -> Any:
    adapter: TypeAdapter[Any] = TypeAdapter(hint, config={"arbitrary_types_allowed": True})
    # Read loosely, "3" is a number, which is wanted, but true is one too.
    strict = _holds_bool(value)
    try:
        return adapter.validate_python(value, strict=strict)
    except ValidationError:
        return adapter.validate_python([value], strict=strict)


def _holds_bool(value: Any) -> bool:
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        return any(map(_holds_bool, value))
    return isinstance(value, bool)
