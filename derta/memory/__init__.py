"""How much memory a training step takes, before it is run: see `StepMemory`, and `plan`."""

from derta.memory.step import Step, StepMemory

__all__ = ["Step", "StepMemory"]
