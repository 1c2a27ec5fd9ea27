"""Estimate the peak memory of a training step before it runs: see `StepMemory` and `plan`."""

from derta.memory.step import StepMemory, StepSettings

__all__ = ["StepSettings", "StepMemory"]
