"""Measure: `python -m benchmarks.head_loss --machine NAME`."""

from __future__ import annotations

from benchmarks.harness.command import main
from benchmarks.head_loss.question import QUESTION

main(QUESTION)
