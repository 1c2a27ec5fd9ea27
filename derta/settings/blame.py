"""Errors of libraries over settings, each as one sentence with the keys that led to it."""

from __future__ import annotations

import enum
import logging
import re
from collections.abc import Callable, Mapping
from typing import Any

from derta.settings.reading import shortened

# The kinds that transformers, accelerate and torch raise over a value that they cannot use.
LIBRARY_ERRORS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    ImportError,
    LookupError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
    re.error,
)


def blame(
    error: BaseException,
    given: Mapping[str, Any],
    defaults: Mapping[str, Any],
    trial: Callable[[Mapping[str, Any]], object],
) -> ValueError:
    """Return an error of one sentence that names the keys which a library's error is about.

    Those are the keys without which the same trial succeeds; if there is none, those without which
    it fails in another way; if there is none either, all that differ from their defaults.

    Args:
        error: the error that `trial(given)` raised, one of `LIBRARY_ERRORS`.
        given: the values by key.
        defaults: the default of every key.
        trial: the call that failed.
    """
    said = _said(error)
    changed = [key for key, value in given.items() if not _same(value, defaults[key])]
    outcomes = {key: _outcome(trial, {**given, key: defaults[key]}) for key in changed}
    guilty = (
        [key for key in changed if outcomes[key] is None]
        or [key for key in changed if outcomes[key] != said]
        or changed
    )
    named = ", ".join(f"{key}: {_shown(given[key])}" for key in guilty)
    return ValueError(f"{named}: {said}")


def _outcome(trial: Callable[[Mapping[str, Any]], object], values: Mapping[str, Any]) -> str | None:
    disabled = logging.root.manager.disable
    logging.disable()  # what a library warns of has been said once
    try:
        trial(values)
    except LIBRARY_ERRORS as error:
        return _said(error)
    finally:
        logging.disable(disabled)
    return None


def _shown(value: Any) -> str:
    return shortened(value.value if isinstance(value, enum.Enum) else value)


def _same(value: Any, default: Any) -> bool:
    return type(value) is type(default) and bool(value == default)


def _said(error: BaseException) -> str:
    """Return an error's text on one line; the kind of one whose text does not say it."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}" if isinstance(error, LookupError) else text
