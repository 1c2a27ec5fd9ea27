"""The red flag that a tokenizer names, as it names its end of sequence."""

from __future__ import annotations

from typing import Any

NAME = "red_flag_token"


def flag_of(tokenizer: Any) -> int | None:
    """Return the id of a tokenizer's red flag, None if it has none."""
    return getattr(tokenizer, f"{NAME}_id", None)
