"""Measure: `python -m benchmarks.preference --machine NAME`."""

from __future__ import annotations

from benchmarks.harness.command import main
from benchmarks.preference.question import QUESTION

main(QUESTION)
