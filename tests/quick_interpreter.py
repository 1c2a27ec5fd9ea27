"""Triton's interpreter without what it does for nothing, which is most of its time.

It widens the operands of every sum and product of integers to look for an overflow, and then says
nothing of it, as its `debug` is off; and it goes through all of Triton's language for what to
replace not once a function but at each call of one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from triton.runtime import interpreter

TRITONS_OPTIONS = interpreter.interpreter_builder.options
TRITONS_CALL = interpreter.InterpretedFunction.__call__
_prepared: set[Callable[..., Any]] = set()


def install() -> None:
    """Make every later launch of this process quick."""
    quick = dataclasses.replace(TRITONS_OPTIONS, sanitize_overflow=False)
    interpreter.interpreter_builder.options = quick
    interpreter.InterpretedFunction.__call__ = _call


def _call(function: Any, *args: Any, **kwargs: Any) -> Any:
    """Run a function that a kernel calls."""
    if function.fn not in _prepared:
        interpreter._patch_lang(function.fn)
        _prepared.add(function.fn)
    return function.rewrite()(*args, **kwargs)
