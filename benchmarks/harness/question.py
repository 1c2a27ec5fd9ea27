"""What a benchmark asks: its cases, who runs them, when a result is right, what must be reached.

Harness, processes, records and report know nothing else of it.
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

NAMES = ("attention", "head_loss", "one_pass", "step")
Values = dict[str, float]  # of one implementation of one case, by quantity


class Case(Protocol):
    """One problem that every implementation is given: a frozen dataclass of numbers and strings."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def name(self) -> str:
        """What records and tables call it."""


class Ready(Protocol):
    """One implementation of one case, ready to run: what time, memory and error are taken of."""

    @property
    def device(self) -> torch.device: ...

    def clear(self) -> None:
        """Lets go of what a step leaves behind."""

    def phases(self) -> Sequence[tuple[str, Callable[[], Any]]]:
        """The parts of a step in their order, by name."""

    def errors(self, answer: Any) -> Values:
        """Errors by name, given what `Question.answer` has made; none where there is no result."""


@dataclass(frozen=True)
class Column:
    """A column of the table.

    Attributes:
        header: of the column.
        show: what it says of an implementation, given its numbers and those of all by name.
        of_right: whether it says nothing of results that are wrong.
    """

    header: str
    show: Callable[[Values, dict[str, Values]], str]
    of_right: bool = False


class Question(ABC):
    """A benchmark.

    Attributes:
        name: of its module in this package, and of its files.
        title: of its page, and what its implementations run.
        case_type: what its cases are.
        ours: the implementation that requirements are on. Those that begin with its first word
            are this project's.
        baseline: the one whose errors say how large errors may be.
        columns: of the table, between the time and the machine's state.
        gpu_steps: steps of a turn on a GPU.
        own_op: the implementation that is PyTorch's own, if there is one that ours is judged by.
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
        """What runs interleaved, by name: cases and implementations."""

    @abstractmethod
    def setup(self, case: Any, implementation: str, device: torch.device) -> Ready:
        """Raises what the implementation raises where it cannot run."""

    @abstractmethod
    def answer(self, case: Any, device: torch.device) -> Any:
        """What is right, of tensors and plain values."""

    def answer_case(self, case: Any) -> Any:
        """The case whose answer this one shares."""
        return case

    @abstractmethod
    def is_right(self, case: Any, errors: Values, baseline: Values) -> bool:
        """Whether errors are small enough, given the baseline's."""

    def derived(self, case: Any, implementation: str, values: Values) -> Values:
        """Further numbers that follow from the measured ones."""
        return {}

    @abstractmethod
    def requirements(self) -> list[Requirement]:
        """What ours must reach."""


def question_named(name: str) -> Question:
    """The question of that name, one of `NAMES`."""
    question: Question = importlib.import_module(f"benchmarks.{name}.question").QUESTION
    return question


def within_budget(errors: Values, baseline: Values, bands: Values) -> bool:
    """Whether every error is at most 2 x (the baseline's + the band of that name)."""
    return all(
        value <= 2 * (baseline.get(name, math.nan) + bands[name]) for name, value in errors.items()
    )


def number(value: float) -> str:
    """Three digits, or all of an integer's."""
    return f"{value:.3g}" if value < 100 else f"{value:.0f}"


def number_of(header: str, quantity: str) -> Column:
    """The quantity itself."""
    return Column(header, lambda own, _: number(own[quantity]) if quantity in own else "-")


def error_of(header: str, quantity: str) -> Column:
    """An error, to two digits."""
    return Column(header, lambda own, _: f"{own[quantity]:.1e}" if quantity in own else "-")


def ratio_to(other: str, header: str, quantity: str) -> Column:
    """The quantity over that of another implementation."""

    def show(own: Values, by_name: dict[str, Values]) -> str:
        whole = by_name.get(other, {}).get(quantity)
        return "-" if whole is None else f"{own[quantity] / whole:.2f}"

    return Column(header, show, of_right=True)
