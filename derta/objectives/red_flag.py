"""A red flag: a token of its own ends a harmful answer, and harmless text stays as it was.

The refusal token is a new one, that no text has. RTO trains it at every drawn depth of a harmful
response, and no safe response is trained: a generation that reaches it ends, and what stands before
it is withheld. The term `retention` holds the next token of answers to harmless requests where a
reference model has it. The reference knows no flag, so that the same term keeps the flag out of
harmless text. The paper has a third term, for the harmful text after a flag; it is left out, as no
text follows one here.

Source: arXiv 2502.16366.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Unpack

import torch
from torch import Tensor

from derta.labels import IGNORE_INDEX
from derta.loss import mean_over
from derta.objectives.base import Mean, Number, ObjectiveOptions, Term
from derta.objectives.defaults import RETENTION_WEIGHT, CutPolicy, check_flagged
from derta.objectives.derta import DertaObjective
from derta_kernels.head_loss import Head, kl_loss


@dataclass(frozen=True, kw_only=True)
class RedFlagObjective(DertaObjective):
    """RTO towards the flag, and the reference's next token on dialogues.

    With p the model, p_ref the reference, which is the model before its first step over the ids
    below the flag's, f the flag, h a harmful response to q, and x any text before a token of an
    answer to a harmless request:

        rto        - log p(f | q, h[:t])
        retention  sum_v p_ref(v | x) log(p_ref(v | x) / p(v | x))

    retention is at least -log(1 - p(f | x)), since p_ref(f | x) is 0. It is therefore what tells of
    the flag in harmless text while training; no `benign_refusal_p` is computed beside it.

    Memory: beside that of the head loss, the reference's hidden states, (N, d), of one pack; see
    `derta_kernels.head_loss.kl_loss`. The reference itself is `derta.training.states`.

    Args:
        branches: 0.
        rto_weight: 1, as RTO is the main term.
        retention_weight: factor of the retention term in the loss, above 0.

    Raises:
        ValueError: as `DertaObjective`, or a number is another one.
    """

    branches: int = 0
    cuts: CutPolicy = "zero"
    retention_weight: float = RETENTION_WEIGHT

    def __post_init__(self) -> None:
        check_flagged(self.branches, self.rto_weight)
        super().__post_init__()
        if not self.retention_weight > 0:
            raise ValueError(f"retention_weight must be above 0, got {self.retention_weight}")

    @property
    def terms(self) -> tuple[Term, ...]:
        return Term("rto", "red flag"), Term("retention", "retention", self.retention_weight)

    def targets(self, columns: Mapping[str, Any]) -> dict[str, Any]:
        return {"rto": columns["rto_mask"], "retention": self.said(columns)}

    def said(self, columns: Mapping[str, Any]) -> Any:
        return columns["shift_labels"] != IGNORE_INDEX

    def row_lists(self, columns: Mapping[str, Any]) -> Mapping[str, Any]:
        return {"flagged_rows": columns["rto_mask"], "retained_rows": self.said(columns)}

    def row_weights(self, columns: Mapping[str, Any]) -> dict[str, Any]:
        return {"rto": columns["rto_weight"], "retention": 1.0}

    def loss(
        self,
        hidden: Tensor,
        head: Head,
        columns: Mapping[str, Tensor],
        *,
        term_weights: Mapping[str, Number],
        **options: Unpack[ObjectiveOptions],
    ) -> tuple[Tensor, dict[str, Tensor]]:
        of_flags: ObjectiveOptions = {
            **options,
            "live_rows": columns.get("flagged_rows"),
            "num_items": None,
            "reduction": "sum",
        }
        retained = columns.get("retained_rows")
        if retained is None:
            retained = self.said(columns).reshape(-1).nonzero().squeeze(1)
        flagged, rows = super().loss(
            hidden,
            head,
            {name: columns[name] for name in ("rto_mask", "rto_weight") if name in columns},
            term_weights=term_weights,
            **of_flags,
        )
        loss, kl = flagged, torch.zeros_like(rows["rto"])
        if len(retained):
            if "reference_hidden" not in columns:
                raise ValueError(
                    "reference must have the reference_hidden and reference_weight of a pack with "
                    "dialogues, got none: see derta.training.states"
                )
            weight = options["loss_weight"]
            kept = kl_loss(
                hidden.reshape(-1, hidden.shape[-1]),
                head.weight,
                columns["reference_hidden"].to(hidden.dtype).reshape(-1, hidden.shape[-1]),
                columns["reference_weight"],
                None if weight is None else weight.reshape(-1),
                rows=retained,
                bias=head.bias,
                reference_bias=columns.get("reference_bias"),
                softcap=head.softcap,
                logit_scale=head.logit_scale,
                scratch_mb=options["scratch_mb"],
                group=head.group,
            )
            loss = flagged + kept.loss * term_weights["retention"]
            kl = kept.kl.reshape(kl.shape)
        if options["reduction"] == "mean":
            count = options["num_items"]
            if count is None:
                count = columns["rto_mask"].sum() + len(retained)
            loss = mean_over(loss, count)
        return loss, {**rows, "retention": kl}

    def _row_losses(self, rows: Any) -> dict[str, Tensor]:
        return {"rto": rows.refusal_nll}

    def means(self, batch: Any, rows: Mapping[str, Tensor]) -> dict[str, Mean]:
        """Return `refusal_p` and `skipped_gradient` of `DertaObjective.means`."""
        found = super().means(batch, rows)
        del found["benign_refusal_p"]
        return found

    @property
    def figures(self) -> tuple[str, ...]:
        return tuple(name for name in super().figures if name != "benign_refusal_p")

    def notes(
        self, row: Mapping[str, Any], quote: Callable[[list[int]], str]
    ) -> list[tuple[str, str]]:
        if row["rto_mask"]:
            return [("rto", "-> red flag")]
        if row["shift_labels"] != IGNORE_INDEX:
            return [("retention", f"as before, here {quote([row['shift_labels']])}")]
        return []


@dataclass(frozen=True, kw_only=True)
class States(DertaObjective):
    """The hidden states of all rows, for a reference: nothing is trained."""

    def loss(
        self, hidden: Tensor, head: Head, columns: Mapping[str, Tensor], **_: Any
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return a loss of 0, and by row `hidden`, (1, N, d)."""
        return hidden.new_zeros(()), {"hidden": hidden}
