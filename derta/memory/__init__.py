"""How much memory a training step takes, before it is run: see `StepMemory`, and `plan`."""

from derta.memory.step import StepMemory, StepSettings

__all__ = ["StepSettings", "StepMemory"]
