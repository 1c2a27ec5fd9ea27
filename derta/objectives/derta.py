"""DeRTa (arXiv 2407.09121): safe responses after harmful prefixes, and refusal at every position.

Terms: `mle`, next-token loss on safe responses and dialogues; `rto`, reinforced transition
optimization, the refusal token as a target at every drawn depth of a harmful response, or a set of
refusal tokens by the sum of their probabilities, whatever token a safe response starts with. Both
kinds of target of one row are read from the same scratch row of logits.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Unpack

import numpy as np
import torch
from torch import Tensor

from derta.data.tokens.encoding import Encoded, EncodedDialogue, EncodedTriple
from derta.labels import IGNORE_INDEX
from derta.loss import derta_loss_with_rows
from derta.objectives.base import (
    Drawn,
    Extent,
    Mean,
    Number,
    Objective,
    ObjectiveOptions,
    Place,
    Term,
)
from derta.objectives.cuts import (
    cut_probabilities,
    draw_cuts,
    draw_official_rows,
    draw_rto_rows,
    rto_depth_weights,
)
from derta.objectives.defaults import RTO_WEIGHT, DrawSettings
from derta_kernels.head_loss import Head, HeadLoss

TENTHS = 10


@dataclass(frozen=True, kw_only=True)
class DertaObjective(DrawSettings, Objective):
    """The paper's objective, equation 2.

    Args:
        branches, cuts, rto_keep, rto_depth: see `DrawSettings`.
        rto_weight: factor of the RTO term in the loss.

    Raises:
        ValueError: a value is out of range, or triples would have no target.
    """

    rto_weight: float = RTO_WEIGHT

    def __post_init__(self) -> None:
        if self.branches < 0:
            raise ValueError(f"branches must be at least 0, got {self.branches}")
        keep = self.rto_keep
        if isinstance(keep, str):
            if keep != "official":
                raise ValueError(f"rto_keep must be a number or official, got {keep!r}")
        elif not 0 <= keep <= 1:
            raise ValueError(f"rto_keep must lie in [0, 1], got {keep}")
        if self.branches == 0 and self.rto_keep == 0:
            raise ValueError("branches and rto_keep are both 0: a triple would train nothing")

    @property
    def terms(self) -> tuple[Term, ...]:
        return Term("mle", "next token"), Term("rto", "RTO", self.rto_weight)

    @property
    def columns(self) -> Mapping[str, Any]:
        return {"shift_labels": IGNORE_INDEX, "rto_mask": False, "rto_weight": 1.0}

    def draw(self, example: Encoded, padded: int, rng: np.random.Generator) -> Drawn:
        if isinstance(example, EncodedDialogue):
            return Drawn(example, cuts=np.zeros(0, np.int64), depths=np.zeros(0, bool))
        cuts = draw_cuts(example, policy=self.cuts, branches=self.branches, rng=rng)
        if isinstance(self.rto_keep, str):
            depths = draw_official_rows(example, padded, rng=rng)
        else:
            said = len(example.harmful) - example.closing
            depths = np.zeros(len(example.harmful) + 1, bool)
            depths[: said + 1] = draw_rto_rows(said, keep=self.rto_keep, rng=rng)
        return Drawn(example, cuts, depths)

    def extent(self, example: EncodedTriple) -> Extent:
        possible = np.flatnonzero(cut_probabilities(example, self.cuts))
        count = min(self.branches, len(possible))
        return Extent(
            branches=count,
            cut=int(possible[-1]) if count else 0,
            depth=len(example.harmful) - example.closing if self.rto_keep else -1,
        )

    def lay(self, drawn: Drawn, place: Place) -> dict[str, np.ndarray]:
        columns = {name: np.full(place.rows, fill) for name, fill in self.columns.items()}
        labels, example = columns["shift_labels"], drawn.example
        if isinstance(example, EncodedDialogue):
            targets = np.where(example.is_target, example.input_ids, IGNORE_INDEX)
            labels[:] = targets[1 : place.rows + 1]
            return columns
        labels[place.trunk + drawn.cuts] = example.safe[:1]
        if len(drawn.cuts):
            labels[place.branches[0] :] = np.tile(example.safe[1:], len(drawn.cuts))
        columns["rto_mask"][place.trunk + np.flatnonzero(drawn.depths)] = True
        depths = slice(place.trunk, place.trunk + drawn.reach + 1)
        weights = rto_depth_weights(len(example.harmful), self.rto_depth)
        columns["rto_weight"][depths] = weights[: drawn.reach + 1]
        return columns

    def targets(self, columns: Mapping[str, Any]) -> dict[str, Any]:
        return {"mle": columns["shift_labels"] != IGNORE_INDEX, "rto": columns["rto_mask"]}

    def row_weights(self, columns: Mapping[str, Any]) -> dict[str, Any]:
        return {"mle": 1.0, "rto": columns["rto_weight"]}

    def loss(
        self,
        hidden: Tensor,
        head: Head,
        columns: Mapping[str, Tensor],
        *,
        term_weights: Mapping[str, Number],
        **options: Unpack[ObjectiveOptions],
    ) -> tuple[Tensor, dict[str, Tensor]]:
        labels = columns.get("shift_labels")
        if labels is None:
            labels = torch.full(hidden.shape[:-1], IGNORE_INDEX, device=hidden.device)
        rows = derta_loss_with_rows(
            hidden,
            head,
            labels,
            columns.get("rto_mask"),
            rto_weight=columns.get("rto_weight", 1.0) * term_weights["rto"],
            **options,
            **self._further_targets(columns, term_weights),
        )
        masses = {"gradient_mass": rows.gradient_mass, "skipped_mass": rows.skipped_mass}
        return rows.loss, self._row_losses(rows) | masses

    def _further_targets(
        self, columns: Mapping[str, Tensor], term_weights: Mapping[str, Number]
    ) -> dict[str, Any]:
        """Return keywords of `derta_loss_with_rows` for further terms of the same rows."""
        return {}

    def _row_losses(self, rows: HeadLoss) -> dict[str, Tensor]:
        """Return each term's losses; those of `rto` are there for every row with a target."""
        return {"mle": rows.next_nll, "rto": rows.refusal_nll}

    def means(self, batch: Any, rows: Mapping[str, Tensor]) -> dict[str, Mean]:
        """Return the mean probability of refusal tokens, and what a sparse backward pass lost.

        `refusal_p`: at RTO targets, by tenths of the harmful response. `benign_refusal_p`: in
        answers to harmless requests. `skipped_gradient`: the share of sum |dloss / dlogit| that was
        skipped.
        """
        probability = torch.exp(-rows["rto"])
        rto = batch.columns["rto_mask"].float()
        # Slot 0 takes the rows outside harmful responses, so that no row has to be selected.
        slot = (batch.depth_tenth + 1).flatten()
        tenths = [
            torch.zeros(TENTHS + 1, device=slot.device).scatter_add_(0, slot, values.flatten())[1:]
            for values in ((probability * rto).float(), rto)
        ]
        return {
            "refusal_p": Mean(*tenths),
            "benign_refusal_p": Mean((probability * batch.benign).sum(), batch.benign.sum()),
            "skipped_gradient": Mean(rows["skipped_mass"].sum(), rows["gradient_mass"].sum()),
        }

    @property
    def figures(self) -> tuple[str, ...]:
        tenths = (f"refusal_p_{tenth + 1}" for tenth in range(TENTHS))
        return *tenths, "benign_refusal_p", "skipped_gradient"

    def notes(
        self, row: Mapping[str, Any], quote: Callable[[list[int]], str]
    ) -> list[tuple[str, str]]:
        said = []
        if row["shift_labels"] != IGNORE_INDEX:
            said.append(("mle", f"-> {quote([row['shift_labels']])}"))
        if row["rto_mask"]:
            said.append(("rto", "-> refuse"))
        return said
