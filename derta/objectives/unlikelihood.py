"""DeRTa, and unlikelihood of the harmful next token wherever RTO has a target.

RTO raises the refusal token only; an attack that picks other tokens of high rank goes on past it.
The third term, `unlikelihood`, is -log(1 - p(h_t)) at the row that predicts the harmful response's
token t, for every t with an RTO target, unless another target of the row is that token: a refusal
token that the harmful response contains, or the start of a safe response that leaves it there. The
row that predicts its end has none either. It is read from the same scratch row of logits as the
other two.

Source: Welleck et al., Neural text generation with unlikelihood training, arXiv 1908.04319.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from derta.data.tokens.encoding import EncodedTriple
from derta.labels import IGNORE_INDEX
from derta.objectives.base import Drawn, Number, Place, Term
from derta.objectives.derta import DertaObjective
from derta_kernels.head_loss import HeadLoss


@dataclass(frozen=True, kw_only=True)
class UnlikelihoodObjective(DertaObjective):
    """`DertaObjective` with a third term.

    Args:
        unlikelihood_weight: factor of the term in the loss, above 0.
        refusals: the refusal tokens of the run, see `aimed`.

    Raises:
        ValueError: as `DertaObjective`, or the weight is not above 0.
    """

    unlikelihood_weight: float
    refusals: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.unlikelihood_weight > 0:
            raise ValueError(f"unlikelihood_weight must be above 0, got {self.unlikelihood_weight}")

    def aimed(self, refusals: Sequence[int]) -> UnlikelihoodObjective:
        return dataclasses.replace(self, refusals=tuple(refusals))

    def spared(self, columns: Mapping[str, Any]) -> Mapping[str, Any]:
        return {"unlikelihood": columns["unlikely_labels"]}

    @property
    def terms(self) -> tuple[Term, ...]:
        term = Term("unlikelihood", "unlikelihood", self.unlikelihood_weight, counted=False)
        return *super().terms, term

    @property
    def columns(self) -> Mapping[str, Any]:
        return {**super().columns, "unlikely_labels": IGNORE_INDEX}

    def lay(self, drawn: Drawn, place: Place) -> dict[str, np.ndarray]:
        columns = super().lay(drawn, place)
        if isinstance(drawn.example, EncodedTriple):
            depths = np.flatnonzero(drawn.depths[: len(drawn.example.harmful)])
            rows, harmful = place.trunk + depths, drawn.example.harmful[depths]
            is_raised = np.isin(harmful, self.refusals) | (harmful == columns["shift_labels"][rows])
            columns["unlikely_labels"][rows] = np.where(is_raised, IGNORE_INDEX, harmful)
        return columns

    def targets(self, columns: Mapping[str, Any]) -> dict[str, Any]:
        unlikely = columns["unlikely_labels"] != IGNORE_INDEX
        return {**super().targets(columns), "unlikelihood": unlikely}

    def row_weights(self, columns: Mapping[str, Any]) -> dict[str, Any]:
        return {**super().row_weights(columns), "unlikelihood": 1.0}

    def _further_targets(
        self, columns: Mapping[str, Tensor], term_weights: Mapping[str, Number]
    ) -> dict[str, Any]:
        return {
            "unlikely_target": columns.get("unlikely_labels"),
            "unlikelihood_weight": term_weights["unlikelihood"],
        }

    def _row_losses(self, rows: HeadLoss) -> dict[str, Tensor]:
        return {**super()._row_losses(rows), "unlikelihood": rows.unlikelihood}

    def notes(
        self, row: Mapping[str, Any], quote: Callable[[list[int]], str]
    ) -> list[tuple[str, str]]:
        said = super().notes(row, quote)
        if row["unlikely_labels"] != IGNORE_INDEX:
            said.append(("unlikelihood", f"not {quote([row['unlikely_labels']])}"))
        return said
