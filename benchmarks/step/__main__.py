"""Measure: `python -m benchmarks.step --machine NAME`."""

from __future__ import annotations

from benchmarks.harness.command import main
from benchmarks.step.question import QUESTION

main(QUESTION)
