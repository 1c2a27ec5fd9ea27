"""A benchmark's question: its cases, implementations, correctness and requirements.

Harness, processes, records and report use nothing else of a benchmark.
"""

from __future__ import annotations

import importlib
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch

from benchmarks.harness.requirements import Requirement

NAMES = ("attention", "head_loss", "one_pass", "preference", "step")
Values = dict[str, float]  # one implementation's numbers on one case, by quantity


class Case(Protocol):
    """One problem for every implementation: a frozen dataclass of numbers and strings."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def name(self) -> str:
        """Name of the case in records and tables."""


class Ready(Protocol):
    """One implementation of one case, ready to be timed and checked."""

    @property
    def device(self) -> torch.device: ...

    def clear(self) -> None:
        """Free the results of a step."""

    def phases(self) -> Sequence[tuple[str, Callable[[], Any]]]:
        """Return the parts of a step in order, by name."""

    def errors(self, answer: Any) -> Values:
        """Return errors by name, given the result of `Question.answer`; empty without a result."""


@dataclass(frozen=True)
class Column:
    """A column of the table.

    Attributes:
        header: header of the column.
        show: function from an implementation's numbers, and all numbers by name, to a cell.
        of_right: if True, wrong results get no entry.
    """

    header: str
    show: Callable[[Values, dict[str, Values]], str]
    of_right: bool = False


class Question(ABC):
    """A benchmark.

    Attributes:
        name: name of its module in this package, and of its files.
        title: title of its page.
        case_type: type of its cases.
        ours: the implementation with requirements. Names that begin with its first word belong to
            this project.
        baseline: the implementation whose errors set the allowed errors.
        columns: columns of the table, between the time and the machine's state.
        gpu_steps: number of steps in a turn on a GPU.
        own_op: PyTorch's own implementation, if ours is judged by it.
    """

    name: str
    title: str
    case_type: type
    ours: str
    baseline: str
    columns: tuple[Column, ...]
    gpu_steps: int = 5
    own_op: str | None = None

    @abstractmethod
    def groups(self, device: str) -> dict[str, list[tuple[Any, str]]]:
        """Return the groups to run in turns, by name: cases and implementations."""

    @abstractmethod
    def setup(self, case: Any, implementation: str, device: torch.device) -> Ready:
        """Set up an implementation; raise its own error if it cannot run."""

    @abstractmethod
    def answer(self, case: Any, device: torch.device) -> Any:
        """Return the right answer, made of tensors and plain values."""

    def answer_case(self, case: Any) -> Any:
        """Return the case whose answer this one shares."""
        return case

    @abstractmethod
    def is_right(self, case: Any, errors: Values, baseline: Values) -> bool:
        """Return True if errors are small enough, given the baseline's."""

    def derived(self, case: Any, implementation: str, values: Values) -> Values:
        """Return further numbers that follow from the measured ones."""
        return {}

    @abstractmethod
    def requirements(self) -> list[Requirement]:
        """Return the requirements on our implementation."""


def question_named(name: str) -> Question:
    """Return the question of that name, one of `NAMES`."""
    question: Question = importlib.import_module(f"benchmarks.{name}.question").QUESTION
    return question


def within_budget(errors: Values, baseline: Values, bands: Values) -> bool:
    """Return True if every error is at most 2 x (the baseline's + the band of that name)."""
    return all(
        value <= 2 * (baseline.get(name, math.nan) + bands[name]) for name, value in errors.items()
    )


def number(value: float) -> str:
    """Format three digits, or all digits of the integer part."""
    return f"{value:.3g}" if value < 100 else f"{value:.0f}"


def number_of(header: str, quantity: str) -> Column:
    """Make a column of the quantity itself."""
    return Column(header, lambda own, _: number(own[quantity]) if quantity in own else "-")


def error_of(header: str, quantity: str) -> Column:
    """Make a column of an error, to two digits."""
    return Column(header, lambda own, _: f"{own[quantity]:.1e}" if quantity in own else "-")


def ratio_to(other: str, header: str, quantity: str) -> Column:
    """Make a column of the quantity over that of another implementation."""

    def show(own: Values, by_name: dict[str, Values]) -> str:
        whole = by_name.get(other, {}).get(quantity)
        return "-" if whole is None else f"{own[quantity] / whole:.2f}"

    return Column(header, show, of_right=True)
