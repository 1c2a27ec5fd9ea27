"""Measure: `python -m benchmarks.attention --machine NAME`."""

from __future__ import annotations

from benchmarks.attention.question import QUESTION
from benchmarks.harness.command import main

main(QUESTION)
