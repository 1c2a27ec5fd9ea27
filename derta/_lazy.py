"""Names of a package that are imported on first use, listed once: in the package's stub."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any


def lazy_package(package: str, file: str) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """Return `__getattr__` and `__dir__` of a package whose `__init__.pyi` imports its names.

    Type checkers read the stub and know every name. At run time a name's module is imported when
    the name is first asked for, and the stub is read with the first name.

    Args:
        package: `__name__` of the package.
        file: `__file__` of the package.
    """

    @functools.cache
    def homes() -> dict[str, str]:
        import ast

        with open(file + "i", encoding="utf-8") as stub:
            body = ast.parse(stub.read()).body
        imports = [node for node in body if isinstance(node, ast.ImportFrom)]
        return {alias.name: str(node.module) for node in imports for alias in node.names}

    def names() -> list[str]:
        return sorted(homes())

    def get(name: str) -> Any:
        if name == "__all__":
            return names()
        if name not in homes():
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(importlib.import_module(homes()[name]), name)

    return get, names
