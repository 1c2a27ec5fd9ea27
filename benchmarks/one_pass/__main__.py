"""Measure: `python -m benchmarks.one_pass --machine NAME`."""

from __future__ import annotations

from benchmarks.harness.command import main
from benchmarks.one_pass.question import QUESTION

main(QUESTION)
