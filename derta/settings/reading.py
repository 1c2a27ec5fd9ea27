"""Values of settings from a YAML file and from `--key value`."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

NODES = 100_000  # of a document whose aliases are written out


class Text(str):
    """A value typed on the command line. The type of its field decides how it is read."""


class _Loader(yaml.SafeLoader):
    """YAML without its traps: `no` and dates are text (save_strategy: no), and keys are unique.

    Aliases neither refer to themselves nor multiply beyond measure.
    """

    yaml_implicit_resolvers = {
        first: [pair for pair in resolvers if not pair[0].endswith((":bool", ":timestamp"))]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def get_single_node(self) -> yaml.Node | None:
        node = super().get_single_node()
        if node is not None:
            _count(node, {})
        return node

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except ValueError:
            kind = node.tag.rpartition(":")[2]
            raise yaml.constructor.ConstructorError(
                None, None, f"{shortened(node.value)} is no {kind}", node.start_mark
            ) from None

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen = set()
        for key_node, _ in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                continue  # SafeLoader refuses a list or a mapping as a key
            if key_node.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key_node.value!r} is given twice", key_node.start_mark
                )
            seen.add(key_node.value)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile("^(true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)


def _count(node: yaml.Node, sizes: dict[yaml.Node, int]) -> int:
    """Return the number of nodes in a node, aliases written out.

    Args:
        node: the node.
        sizes: filled with the size of every node; 0 while it is being counted.

    Raises:
        ConstructorError: an alias stands within its own anchor, or there are too many nodes.
    """
    if sizes.get(node) == 0:
        said = "the alias refers to the value that it stands in"
        raise yaml.constructor.ConstructorError(None, None, said, node.start_mark)
    if node not in sizes:
        sizes[node] = 0
        parts = [] if isinstance(node, yaml.ScalarNode) else node.value
        nodes = [one for part in parts for one in (part if isinstance(part, tuple) else (part,))]
        sizes[node] = 1 + sum(_count(one, sizes) for one in nodes)
    if sizes[node] > NODES:
        said = f"with its aliases written out it has more than {NODES:,} values"
        raise yaml.constructor.ConstructorError(None, None, said, node.start_mark)
    return sizes[node]


def shortened(value: Any) -> str:
    """Return a value for a message, the middle of a long one left out."""
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:70]} ... {text[-20:]}"


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a configuration file.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the file is no YAML mapping in UTF-8, has a key twice, or an alias that refers
            to itself; names file and line.
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
    except RecursionError:
        raise ValueError(f"{path}: values are nested too deeply") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path}: expected `key: value` lines, got {type(values).__name__}")
    return values


def read_options(arguments: Sequence[str]) -> dict[str, Text | bool]:
    """Split `--key value`, `--key=value` and bare `--key`, which means true.

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


def read_text(text: str) -> Any:
    """Read one value typed on the command line as YAML.

    Raises:
        yaml.YAMLError: the text is no YAML.
    """
    try:
        return yaml.load(text, _Loader)
    except RecursionError:
        raise yaml.YAMLError("values are nested too deeply") from None
