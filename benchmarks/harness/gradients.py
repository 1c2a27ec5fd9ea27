"""Training steps judged by the gradients they leave on a module's parameters."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from benchmarks.harness.question import Values


class TrainingStep(ABC):
    """Forward and backward, ready to run.

    Attributes:
        module: module whose parameters are trained.
        device: device of the parameters.
    """

    def __init__(self, module: nn.Module, device: torch.device) -> None:
        self.module = module
        self.device = device

    @abstractmethod
    def step(self) -> None:
        """Run all batches; their gradients add up on the parameters."""

    def phases(self) -> list[tuple[str, Callable[[], None]]]:
        return [("step", self.step)]

    def clear(self) -> None:
        """Free the gradients."""
        self.module.zero_grad()

    def gradients(self) -> dict[str, Tensor]:
        """Return the gradients of one step by parameter."""
        self.clear()
        self.step()
        named = self.module.named_parameters()
        return {name: value.grad for name, value in named if value.grad is not None}

    def errors(self, answer: Mapping[str, Tensor]) -> Values:
        """Return the largest error of a parameter's gradient."""
        return {"gradient_error": gradient_error(self.gradients(), answer)}


def gradient_error(gradients: Mapping[str, Tensor], answer: Mapping[str, Tensor]) -> float:
    """Return the largest of the parameters' errors, each relative to its gradient's size."""
    return max(
        float((gradients[name].cpu().double() - right).norm() / right.norm())
        for name, right in answer.items()
    )
