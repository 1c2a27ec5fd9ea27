"""Errors that one rank meets and all of them raise."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from accelerate.utils import gather_object


@contextmanager
def failing_together(kind: type[Exception]) -> Iterator[None]:
    """Raise on all ranks an error of a kind that any of them meets inside; all ranks enter.

    It must be met outside of collectives, or before or after all of them: the other ranks would
    wait within theirs.
    """
    errors: list[Exception] = []
    try:
        yield
    except kind as error:
        errors = [error]
    if errors := gather_object(errors):
        raise errors[0]
