"""Settings from a YAML file and from `--key value`, checked against a dataclass."""

from __future__ import annotations

import dataclasses
import difflib
import re
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import TypeAdapter, ValidationError

Config = TypeVar("Config")


class _Loader(yaml.SafeLoader):
    """YAML without two of its traps: `no` is a word (save_strategy: no), and no key comes twice."""

    yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith(":bool")]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen = set()
        for key_node, _ in node.value:
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
        ValueError: it is not a YAML mapping, or a key is given twice; names file and line.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such configuration file")
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise ValueError(f"{path}:{line}: {error.problem}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path}: expected `key: value` lines, got {type(values).__name__}")
    return values


def read_options(arguments: Sequence[str]) -> dict[str, Any]:
    """Reads `--key value`, `--key=value` and bare `--key` (true); values are YAML.

    Raises:
        ValueError: an argument belongs to no key, or a value is not YAML.
    """
    values: dict[str, Any] = {}
    remaining = list(arguments)
    while remaining:
        argument = remaining.pop(0)
        if not argument.startswith("--"):
            raise ValueError(f"expected --key value, got {argument!r}")
        key, separator, text = argument[2:].partition("=")
        if not separator:
            follows = bool(remaining) and not remaining[0].startswith("--")
            text = remaining.pop(0) if follows else "true"
        try:
            values[key.replace("-", "_")] = yaml.load(text, _Loader)
        except yaml.YAMLError:
            raise ValueError(f"--{key}: {text!r} is not a value that YAML can read") from None
    return values


def build(config_class: type[Config], values: dict[str, Any], origin: str) -> Config:
    """Makes a dataclass from loosely typed values ("1e-4" is a float here, though not in YAML).

    Args:
        config_class: a dataclass with annotated fields.
        values: field name to value.
        origin: where the values are from, for messages.

    Raises:
        ValueError: a key is unknown (names the nearest), of the wrong type, or missing.
    """
    fields = {field.name: field for field in dataclasses.fields(config_class) if field.init}  # type: ignore[arg-type]
    hints = typing.get_type_hints(config_class)
    typed = {}
    for key, value in values.items():
        if key not in fields:
            nearest = difflib.get_close_matches(key, fields, n=1)
            advice = f"; did you mean {nearest[0]!r}?" if nearest else ""
            raise ValueError(f"{origin}: unknown key {key!r}{advice}")
        try:
            typed[key] = TypeAdapter(
                hints[key], config={"arbitrary_types_allowed": True}
            ).validate_python(value)
        except ValidationError:
            hint = hints[key]
            expected = hint.__name__ if isinstance(hint, type) else hint
            raise ValueError(f"{origin}: {key}: expected {expected}, got {value!r}") from None
    missing = [
        name
        for name, field in fields.items()
        if name not in typed
        and field.default is dataclasses.MISSING
        and field.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise ValueError(f"{origin}: missing {', '.join(missing)}")
    return config_class(**typed)
