"""Replies are kept as they come; what else a file holds is never taken for one."""

from __future__ import annotations

from pathlib import Path

import pytest

from derta.evaluation.generation.answers import Replies


def test_a_file_of_something_else_is_refused(tmp_path: Path) -> None:
    kept = tmp_path / "kept.jsonl"
    for line in ("{}", "[1]", "text"):
        kept.write_text('{"key": "a", "value": 1}\n' + line + "\n")
        with pytest.raises(ValueError, match=r"kept.jsonl:2: expected a reply as they are kept"):
            Replies(kept)
