"""An objective: targets on rows of a pack, and a loss of named terms over them.

An objective is one module. It draws branches and targets of an example for each epoch, lays them
out as columns of a pack, computes its terms from hidden states, head and columns, and names its
figures. Packing, model, trainer, metrics, plan, statistics and dry run know its terms by name only.
"""

from __future__ import annotations

import functools
import operator
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypedDict, Unpack

import numpy as np
from torch import Tensor

from derta.data.tokens.encoding import Encoded, EncodedTriple
from derta.objectives.defaults import LossNorm
from derta_kernels.head_loss import Head

Number = float | Tensor


class Term(NamedTuple):
    """One term of a loss: a weighted sum over its targets.

    Attributes:
        name: key of figures, totals and row losses; logged as `{name}_loss`.
        title: name in tables for people.
        weight: factor of the term in the loss.
        counted: if False, its targets add nothing to the count that the loss is divided by.
    """

    name: str
    title: str
    weight: float = 1.0
    counted: bool = True


@dataclass(frozen=True, eq=False)
class Drawn:
    """An example and what one epoch drew for it.

    Attributes:
        example: the example.
        cuts: (branches,) int64, distinct, descending, each in 0..cut_limit; empty for a dialogue.
        depths: (|h| + 1,) bool, the depths of the harmful response with a target on the trunk;
            empty for a dialogue.
        references: (branches, 2) float64, for each branch what a reference model says of it and of
            the trunk's rest, see `derta.objectives.preference`; None: nothing is known.

    Raises:
        ValueError: cuts or depths are out of range or have the wrong shape.
    """

    example: Encoded
    cuts: np.ndarray
    depths: np.ndarray
    references: np.ndarray | None = None

    def __post_init__(self) -> None:
        limit, rows = -1, 0
        if isinstance(self.example, EncodedTriple):
            limit, rows = self.example.cut_limit, len(self.example.harmful) + 1
        in_range = np.all((self.cuts >= 0) & (self.cuts <= limit))
        if not in_range or np.any(np.diff(self.cuts) >= 0):
            raise ValueError(
                f"cuts of {self.example.id} must be distinct, descending and in 0..{limit}, got "
                f"{self.cuts.tolist()}"
            )
        if self.depths.shape != (rows,):
            raise ValueError(
                f"depths of {self.example.id} must have shape ({rows},), got {self.depths.shape}"
            )

    @property
    def reach(self) -> int:
        """The depth of the trunk's last target: the tokens of the harmful response to lay out."""
        return int(max(self.cuts.max(initial=0), np.flatnonzero(self.depths).max(initial=0)))


class Extent(NamedTuple):
    """The most that any draw of a triple lays out.

    Attributes:
        branches: the number of branches.
        cut: the furthest cut of a branch; 0 without branches.
        depth: the greatest depth with a target on the trunk, those where branches leave left out;
            -1 without any.
    """

    branches: int
    cut: int
    depth: int


class Place(NamedTuple):
    """Positions of the parts of one example among its rows.

    Attributes:
        rows: the number of rows.
        trunk: the row at depth 0 of a triple, which predicts the first token of a response.
        branches: the first row of each branch of a triple, in the order of `Drawn.cuts`.
    """

    rows: int
    trunk: int = 0
    branches: Sequence[int] = ()


class Total(NamedTuple):
    """The number of one term's targets, and the sum of their examples' weights."""

    targets: int
    weight: float


class Mean(NamedTuple):
    """A figure to log, as a sum and its divisor, both () or (K,).

    K figures are numbered from 1; a figure whose divisor is 0 is left out.
    """

    total: Tensor
    divisor: Tensor


class ObjectiveOptions(TypedDict):
    """The keywords of `Objective.loss` that tell nothing of single terms.

    Attributes:
        refusal_token_id: the token that refusals start with, or several.
        loss_weight: (1, N) weight of each row's example; None: ones.
        live_rows: (n,) int64, the rows with a target; None: the loss counts them.
        num_items: the divisor of "mean"; None: the number of targets.
        reduction: "mean" or "sum".
        impl, scratch_mb, sparse_backward: see `derta_kernels.head_loss.head_loss`.
    """

    refusal_token_id: int | Sequence[int]
    loss_weight: Tensor | None
    live_rows: Tensor | None
    num_items: int | Tensor | None
    reduction: str
    impl: str
    scratch_mb: float | None
    sparse_backward: float


class Objective(ABC):
    """The loss that a training run minimises: a weighted sum of terms over targets of packs.

    Attributes:
        branches: the most safe responses that are drawn per triple.
        cuts: the policy of their cuts, see `derta.objectives.cuts`.
        closes_harmful: if True, harmful responses are encoded with their closing tokens.
        needs_references: if True, draws of triples need `Drawn.references`.
    """

    branches: int
    cuts: str
    closes_harmful = False
    needs_references = False

    def aimed(self, refusals: Sequence[int]) -> Objective:
        """Return the objective of a run with these refusal tokens; by default the same.

        A run finds them in its data, once it has its objective.
        """
        return self

    def spared(self, columns: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return labels of the terms of whose targets `aimed` leaves out the refusal tokens.

        By default there are none. Such a target has the row weight 1.
        """
        return {}

    @property
    @abstractmethod
    def terms(self) -> tuple[Term, ...]:
        """The terms, the main one first. Its weight is 1."""

    @property
    @abstractmethod
    def columns(self) -> Mapping[str, Any]:
        """Columns of a pack that the loss reads, each with its value on rows without a target.

        A column is a (1, N) tensor of a pack and a keyword of a patched model. Labels are int,
        masks bool, weights float, or numpy's float64 where float32 is too coarse.
        """

    def has_targets(self, columns: Mapping[str, Any]) -> bool:
        """Return whether columns hold labels or a mask; without any, a model has no loss."""
        return any(not isinstance(self.columns[name], float) for name in columns)

    @abstractmethod
    def draw(self, example: Encoded, padded: int, rng: np.random.Generator) -> Drawn:
        """Draw the branches and targets of an example for one epoch.

        Args:
            example: the example.
            padded: the `derta.objectives.cuts.padded_length` of its pack.
            rng: see `derta.objectives.cuts.example_rng`.
        """

    @abstractmethod
    def extent(self, example: EncodedTriple) -> Extent:
        """Return the most that any draw of a triple lays out."""

    @abstractmethod
    def lay(self, drawn: Drawn, place: Place) -> dict[str, np.ndarray]:
        """Return the columns of one example, each (rows,)."""

    @abstractmethod
    def targets(self, columns: Mapping[str, Any]) -> dict[str, Any]:
        """Return each term's rows with a target, bool in the shape of the columns."""

    def live(self, columns: Mapping[str, Any]) -> Any:
        """Return the rows that meet the vocabulary, bool: by default those with a target."""
        return functools.reduce(operator.or_, self.targets(columns).values())

    def said(self, columns: Mapping[str, Any]) -> Any:
        """Return the rows that predict a token of a response to be said, bool.

        By default these are the rows with a target of the main term.
        """
        return self.targets(columns)[self.terms[0].name]

    def row_lists(self, columns: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return further masks of rows that the loss reads as indices, by name; by default none.

        A pack holds their indices, (n,) int64, and hands them to the model as `row_lists`.
        """
        return {}

    @abstractmethod
    def row_weights(self, columns: Mapping[str, Any]) -> dict[str, Any]:
        """Return each term's weight by row, beside the weights of example and term."""

    @abstractmethod
    def loss(
        self,
        hidden: Tensor,
        head: Head,
        columns: Mapping[str, Tensor],
        *,
        term_weights: Mapping[str, Number],
        **options: Unpack[ObjectiveOptions],
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Compute the loss of a pack.

        Args:
            hidden: (1, N, d) hidden states.
            head: the vocabulary projection.
            columns: those of `columns` that were given, (1, N) each, of `row_lists`, and the
                tensors of a reference by name.
            term_weights: factor of each term by its name.
            options: see `ObjectiveOptions`.

        Returns:
            The loss (), and by row, (1, N), detached: each term's unweighted losses, nats, and
            other figures that `means` reads.
        """

    @abstractmethod
    def means(self, batch: Any, rows: Mapping[str, Tensor]) -> dict[str, Mean]:
        """Return further figures to log of one pack.

        Args:
            batch: a `PackedBatch` on the device.
            rows: the row losses that `loss` returned.
        """

    @property
    def figures(self) -> tuple[str, ...]:
        """The names of all `means`, numbered ones by number."""
        return ()

    @abstractmethod
    def notes(
        self, row: Mapping[str, Any], quote: Callable[[list[int]], str]
    ) -> list[tuple[str, str]]:
        """Return each target of a row for a dry run, as the term's name and a few words.

        Args:
            row: the row's value of each column.
            quote: shows token ids as text.
        """

    def shares(self, norm: LossNorm, totals: Mapping[str, Number]) -> dict[str, Number]:
        """Return the factor of each term's mean in the loss.

        The loss is the sum over terms of factor x (weighted sum / total of the term).

        Args:
            norm: "tokens", the mean over all counted targets; "terms", each term by its own mean.
                "official" differs from "tokens" by how full packs are only, and is taken for it.
            totals: weight of each term's targets over everything that is averaged.
        """
        if norm == "terms":
            return {term.name: term.weight for term in self.terms}
        everything = _or_one(sum(totals[term.name] for term in self.terms if term.counted))
        return {term.name: term.weight * totals[term.name] / everything for term in self.terms}

    def normalizer(
        self,
        norm: LossNorm,
        pack: Mapping[str, Number],
        step: Mapping[str, Number],
        packs: Number,
    ) -> tuple[Number, dict[str, Number]]:
        """Return the divisor of a pack's sum over targets, and the factor of each term in it.

        Args:
            norm: "tokens", the mean over all counted targets of a step; "official", the mean over
                each pack, averaged; "terms", each term by its own mean over the step.
            pack, step: weight of each term's targets in the pack, and in the step over all ranks.
            packs: the number of filled packs of the step over all ranks.
        """
        factors: dict[str, Number] = {term.name: term.weight for term in self.terms}
        counted = [term.name for term in self.terms if term.counted]
        if norm == "official":
            return _or_one(sum(pack[name] for name in counted)) * packs, factors
        if norm == "tokens":
            return _or_one(sum(step[name] for name in counted)), factors
        first, *others = self.terms
        main = _or_one(step[first.name])
        for term in others:
            factors[term.name] = term.weight * main / _or_one(step[term.name])
        return main, factors


def _or_one(total: Number) -> Number:
    if isinstance(total, Tensor):
        return total.where(total != 0, 1.0)
    return total or 1.0
