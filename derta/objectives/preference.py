"""Preference losses of pairs: the safe response is chosen, the harmful one rejected.

A pair is a triple with one cut k. Its chosen response c is the safe one after h[:k], a branch of
the trunk; its rejected response r is the rest of h, on the trunk. Both end with the template's
closing tokens. With k = 0 it is the pair that other trainers run as two sequences: here the prompt
is computed once. With other cuts, both responses share the prefix too.

A pair's loss depends on the sums of its rows' losses, so their weights in the gradient are known
only after all rows are. Two passes over the head then take the place of logits: the first, over the
rows of pairs and without gradients, gives log P of both responses; the slope of the pair's loss in
each of them is the weight of its rows in the second, which forms the gradients of all rows. They
are exact, as a row's loss enters through those sums only. The row at the cut has two targets, which
the head loss reads from one scratch row: the next token and, as its second token, the rejected one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Unpack

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from derta.data.tokens.encoding import Encoded, EncodedDialogue, EncodedTriple
from derta.labels import IGNORE_INDEX
from derta.loss import mean_over
from derta.objectives.base import Drawn, Extent, Mean, Number, ObjectiveOptions, Place, Term
from derta.objectives.defaults import PREFERENCES, CutPolicy, Preference, RtoKeep, check_pairs
from derta.objectives.derta import DertaObjective
from derta_kernels.head_loss import Head, HeadLoss, head_loss

# Sums of losses are of integers, in units of 1 / UNIT nats: the same in any order, so that a GPU's
# order of additions changes no bit. They hold 10^8 nats.
UNIT = 2.0**36
REFERENCES = ("chosen_reference", "rejected_reference")


class Pairs(NamedTuple):
    """Pairs of responses, one to each of N places; of those without a pair, lengths are 1.

    Attributes:
        chosen, rejected: (N,) float64, log P of the response.
        chosen_tokens, rejected_tokens: (N,) int64, its number of tokens.
        chosen_reference, rejected_reference: (N,) float64, log P under the reference model, 0 if
            the loss has none.
    """

    chosen: Tensor
    rejected: Tensor
    chosen_tokens: Tensor
    rejected_tokens: Tensor
    chosen_reference: Tensor
    rejected_reference: Tensor


@dataclass(frozen=True, kw_only=True)
class PreferenceObjective(DertaObjective):
    """Pairs, and next-token loss on dialogues beside them.

    With log P(y) the sum of the log probabilities of the tokens of y, |y| their number and
    log odds(m) = m - log(1 - e^m), the loss of a pair is -log sigmoid(x):

        dpo      x = beta ((log P(c) - log P_ref(c)) - (log P(r) - log P_ref(r)))
        simpo    x = beta (log P(c) / |c| - log P(r) / |r|) - gamma
        orpo     x = log odds(log P(c) / |c|) - log odds(log P(r) / |r|)

    Terms: `mle`, the mean next-token loss of dialogues, for "orpo" of chosen responses too; and
    `preference`, the mean over pairs, by its weight. An example's weight is that of its pair.

    Memory: that of the next-token loss of the same rows; logits never exist as a whole.
    Numerics: sums over rows are exact to 2^-37 nats a row, and pairs are compared in float64.

    Args:
        preference: "dpo", "simpo" or "orpo".
        preference_beta: beta, above 0; None for "orpo".
        preference_weight: factor of the term in the loss, above 0; lambda of "orpo".
        simpo_gamma: gamma, at least 0; None but for "simpo".
        cuts: see `DrawSettings`; "zero": the whole responses.

    Raises:
        ValueError: as `DertaObjective`; there is not one branch, there are RTO targets, or a
            number is out of range, missing, or of another loss.

    Source: DPO: arXiv 2305.18290, equation 7; SimPO: arXiv 2405.14734, equation 6; ORPO: arXiv
        2403.07691, equations 6 and 7.
    """

    cuts: CutPolicy = "zero"
    rto_keep: RtoKeep = 0.0
    preference: Preference
    preference_beta: float | None = None
    preference_weight: float
    simpo_gamma: float | None = None
    closes_harmful = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.preference not in PREFERENCES:
            raise ValueError(
                f"preference must be one of {', '.join(PREFERENCES)}, got {self.preference!r}"
            )
        check_pairs(self.preference, self.branches, self.rto_keep)
        ours = PREFERENCES[self.preference]
        for name, default in (("preference_beta", ours.beta), ("simpo_gamma", ours.gamma)):
            value = getattr(self, name)
            if (value is None) != (default is None):
                needed = "no number" if default is None else "a number"
                raise ValueError(f"{name} must be {needed} for {self.preference}, got {value}")
        for name in ("preference_beta", "preference_weight"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name} must be above 0, got {value}")
        if self.simpo_gamma is not None and not self.simpo_gamma >= 0:
            raise ValueError(f"simpo_gamma must be at least 0, got {self.simpo_gamma}")

    @property
    def needs_references(self) -> bool:  # type: ignore[override]
        return self.preference == "dpo"

    @property
    def terms(self) -> tuple[Term, ...]:
        main, _ = super().terms
        return main, Term("preference", "preference", self.preference_weight, counted=False)

    @property
    def columns(self) -> Mapping[str, Any]:
        """Return columns of next tokens and of pairs.

        rejected_labels: the rejected token that the row predicts. pair_back: rows back to the one
        that predicts the first token of the row's pair; -1 outside of pairs. For "dpo"
        chosen_reference and rejected_reference: log P under the reference model at that first row,
        NaN until it is known.
        """
        pairs = {"rejected_labels": IGNORE_INDEX, "pair_back": -1}
        unknown = np.float64("nan")
        references = dict.fromkeys(REFERENCES, unknown) if self.needs_references else {}
        return {**super().columns, **pairs, **references}

    def draw(self, example: Encoded, padded: int, rng: np.random.Generator) -> Drawn:
        drawn = super().draw(example, padded, rng)
        if len(drawn.cuts):
            drawn.depths[int(drawn.cuts[0]) : -1] = True
        return drawn

    def extent(self, example: EncodedTriple) -> Extent:
        found = super().extent(example)
        return found._replace(depth=len(example.harmful) - 1) if found.branches else found

    def lay(self, drawn: Drawn, place: Place) -> dict[str, np.ndarray]:
        columns = super().lay(drawn, place)
        if isinstance(drawn.example, EncodedDialogue):
            return columns
        columns["rto_mask"][:] = False
        depths = np.flatnonzero(drawn.depths)
        columns["rejected_labels"][place.trunk + depths] = drawn.example.harmful[depths]
        if not len(drawn.cuts):
            return columns
        first, branch = place.trunk + int(drawn.cuts[0]), place.branches[0]
        for rows in (place.trunk + depths, np.arange(branch, place.rows)):
            columns["pair_back"][rows] = rows - first
        if self.needs_references and drawn.references is not None:
            for name, value in zip(REFERENCES, drawn.references[0], strict=True):
                columns[name][first] = value
        return columns

    def targets(self, columns: Mapping[str, Any]) -> dict[str, Any]:
        says = self.said(columns)
        if self.preference != "orpo":
            says = says & (columns["pair_back"] < 0)
        return {"mle": says, "preference": columns["pair_back"] == 0}

    def live(self, columns: Mapping[str, Any]) -> Any:
        return self.said(columns) | (columns["pair_back"] >= 0)

    def said(self, columns: Mapping[str, Any]) -> Any:
        return columns["shift_labels"] != IGNORE_INDEX

    def row_lists(self, columns: Mapping[str, Any]) -> Mapping[str, Any]:
        return {"pair_rows": columns["pair_back"] >= 0}

    def row_weights(self, columns: Mapping[str, Any]) -> dict[str, Any]:
        return {"mle": 1.0, "preference": 1.0}

    def loss(
        self,
        hidden: Tensor,
        head: Head,
        columns: Mapping[str, Tensor],
        *,
        term_weights: Mapping[str, Number],
        **options: Unpack[ObjectiveOptions],
    ) -> tuple[Tensor, dict[str, Tensor]]:
        shape, dtype = hidden.shape[:-1], torch.promote_types(hidden.dtype, torch.float32)
        rows = _Rows(hidden, head, columns, options)
        forms = torch.is_grad_enabled() and any(
            one is not None and one.requires_grad for one in (hidden, head.weight, head.bias)
        )
        weight = torch.ones_like(rows.labels, dtype=dtype)
        if (given := options["loss_weight"]) is not None:
            weight = given.reshape(-1).to(dtype)
        is_mle = self.targets(columns)["mle"].reshape(-1)

        if forms:
            next_nll, rejected_nll = rows.of_pairs(columns.get("pair_rows"))
        else:
            found = rows.all()
            next_nll, rejected_nll = found.next_nll, found.refusal_nll
        pairs = rows.pairs(next_nll, rejected_nll)
        margin, *slopes = self._compared(pairs)
        losses = -F.logsigmoid(margin).where(rows.is_first, 0)
        factor = term_weights["preference"]
        if forms:
            # A response's log P is minus the sum of its rows' losses: both signs turn.
            pull = torch.sigmoid(-margin) * factor
            pushes = [(pull * slope)[rows.first].to(dtype) * weight for slope in slopes]
            found = rows.all(
                next_weight=pushes[0].where(rows.is_chosen, 0) + weight.where(is_mle, 0),
                rto_weight=pushes[1].where(rows.is_rejected, 0),
                sparse_backward=options["sparse_backward"],
            )
        loss = ((found.next_nll * weight).where(is_mle, 0)).sum() + (losses * weight).sum() * factor
        # The difference is 0, with the gradient of the whole, or no number if a row's loss is none.
        loss = loss.to(dtype) + (found.loss - found.loss.detach())
        if options["reduction"] == "mean":
            count = options["num_items"]
            loss = mean_over(loss, is_mle.sum() if count is None else count)
        by_row = {
            "mle": found.next_nll,
            "preference": losses.to(dtype),
            "gradient_mass": found.gradient_mass,
            "skipped_mass": found.skipped_mass,
            **self._figures(pairs),
        }
        if isinstance(options["refusal_token_id"], int):  # a row has one second token, not a set
            by_row["rto"] = found.refusal_nll
        return loss, {name: values.reshape(shape) for name, values in by_row.items()}

    def _compared(self, pairs: Pairs) -> tuple[Tensor, Tensor, Tensor]:
        """Return x of each pair, and its slopes in log P of both responses, (N,) each."""
        if self.preference == "orpo":
            chosen, chosen_slope = _log_odds(pairs.chosen / pairs.chosen_tokens)
            rejected, rejected_slope = _log_odds(pairs.rejected / pairs.rejected_tokens)
        else:
            chosen, rejected = self._rewards(pairs)
            chosen_slope = rejected_slope = torch.full_like(chosen, self._beta)
        if self.preference != "dpo":
            chosen_slope = chosen_slope / pairs.chosen_tokens
            rejected_slope = rejected_slope / pairs.rejected_tokens
        return chosen - rejected - (self.simpo_gamma or 0.0), chosen_slope, -rejected_slope

    def _rewards(self, pairs: Pairs) -> tuple[Tensor, Tensor]:
        """Return the rewards of chosen and rejected responses, (N,) each, see `means`."""
        if self.preference == "dpo":
            return (
                self._beta * (pairs.chosen - pairs.chosen_reference),
                self._beta * (pairs.rejected - pairs.rejected_reference),
            )
        return (
            self._beta * (pairs.chosen / pairs.chosen_tokens),
            self._beta * (pairs.rejected / pairs.rejected_tokens),
        )

    @property
    def _beta(self) -> float:
        return self.preference_weight if self.preference_beta is None else self.preference_beta

    def _figures(self, pairs: Pairs) -> dict[str, Tensor]:
        """Return what is logged of each pair: log P of a response, or its mean over tokens."""
        rewards = self._rewards(pairs)
        logp = pairs.chosen, pairs.rejected
        if self.preference != "dpo":
            logp = pairs.chosen / pairs.chosen_tokens, pairs.rejected / pairs.rejected_tokens
        return {
            "reward_chosen": rewards[0],
            "reward_rejected": rewards[1],
            "reward_margin": rewards[0] - rewards[1],
            "reward_accuracy": (rewards[0] > rewards[1]).double(),
            "logp_chosen": logp[0],
            "logp_rejected": logp[1],
        }

    def means(self, batch: Any, rows: Mapping[str, Tensor]) -> dict[str, Mean]:
        """Return means over pairs, and two figures of `DertaObjective.means`.

        `reward_chosen`, `reward_rejected`: beta (log P - log P_ref) for "dpo", beta log P / |y| for
        "simpo" and, with lambda as beta, for "orpo"; `reward_margin`: their difference;
        `reward_accuracy`: the share of pairs with a positive one; `logp_chosen`, `logp_rejected`:
        log P, or for "simpo" and "orpo" log P / |y|. `skipped_gradient`: as there; so is
        `benign_refusal_p`, which needs a run with one refusal token.
        """
        is_pair = batch.columns["pair_back"] == 0
        figures = {
            name: Mean(rows[name].where(is_pair, 0).sum(), is_pair.sum()) for name in PAIR_FIGURES
        }
        if "rto" in rows:
            refused = torch.exp(-rows["rto"]) * batch.benign
            figures["benign_refusal_p"] = Mean(refused.sum(), batch.benign.sum())
        skipped = Mean(rows["skipped_mass"].sum(), rows["gradient_mass"].sum())
        return {**figures, "skipped_gradient": skipped}

    @property
    def figures(self) -> tuple[str, ...]:
        return *PAIR_FIGURES, "benign_refusal_p", "skipped_gradient"

    def notes(
        self, row: Mapping[str, Any], quote: Callable[[list[int]], str]
    ) -> list[tuple[str, str]]:
        said = []
        in_pair = row["pair_back"] >= 0
        if row["shift_labels"] != IGNORE_INDEX:
            note = f"-> {quote([row['shift_labels']])}"
            said.append(("preference", f"chosen {note}") if in_pair else ("mle", note))
        if row["rejected_labels"] != IGNORE_INDEX:
            said.append(("preference", f"rejected -> {quote([row['rejected_labels']])}"))
        return said


PAIR_FIGURES = (
    "reward_chosen",
    "reward_rejected",
    "reward_margin",
    "reward_accuracy",
    "logp_chosen",
    "logp_rejected",
)


def _log_odds(mean: Tensor) -> tuple[Tensor, Tensor]:
    """Return log(p / (1 - p)) for p = e^mean, and its slope in mean.

    A mean of 0 is taken for the largest below it that a sum can hold.
    """
    others = -torch.expm1(mean.clamp(max=-1 / UNIT))
    return mean - others.log(), 1 / others


class _Rows:
    """The rows of a pack: their targets, the head loss over them, and sums over pairs.

    Attributes:
        labels: (N,) int64, the next tokens.
        is_chosen, is_rejected: (N,) bool, rows that predict a token of such a response.
        first: (N,) int64, the first row of each row's pair; outside of pairs the row itself.
    """

    def __init__(
        self,
        hidden: Tensor,
        head: Head,
        columns: Mapping[str, Tensor],
        options: ObjectiveOptions,
    ) -> None:
        self.hidden = hidden.reshape(-1, hidden.shape[-1])
        self.head = head
        self.options = options
        self.labels = columns["shift_labels"].reshape(-1)
        back, rejected = (columns[name].reshape(-1) for name in ("pair_back", "rejected_labels"))
        self.in_pair, self.is_first = back >= 0, back == 0
        self.is_chosen = self.in_pair & (self.labels != IGNORE_INDEX)
        self.is_rejected = rejected != IGNORE_INDEX
        # Rows of dialogues have the refusal token there, for a figure.
        refusals = options["refusal_token_id"]
        one = refusals if isinstance(refusals, int) else refusals[0]
        self.tokens = rejected.where(self.is_rejected, one)
        self.first = torch.arange(len(back), device=back.device) - back.clamp(min=0)
        self.references = [
            columns[name].reshape(-1) if name in columns else None for name in REFERENCES
        ]

    def all(self, **weights: Any) -> HeadLoss:
        """Compute the head loss of all rows."""
        return self._head_loss(
            self.hidden,
            self.labels,
            self.is_rejected,
            self.tokens,
            self.options["live_rows"],
            **weights,
        )

    def of_pairs(self, rows: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return -log p of both tokens of each row of pairs, (N,) each, without gradients.

        Args:
            rows: (n,) int64, the rows of pairs; None: they are counted on the host.
        """
        if rows is None:
            rows = self.in_pair.nonzero().squeeze(1)
        with torch.no_grad():
            found = self._head_loss(
                self.hidden.index_select(0, rows),
                self.labels[rows],
                self.is_rejected[rows],
                self.tokens[rows],
                torch.arange(len(rows), device=rows.device),
            )
        nothing = found.next_nll.new_zeros(len(self.labels))
        next_nll, rejected_nll = (
            nothing.index_copy(0, rows, nll) for nll in (found.next_nll, found.refusal_nll)
        )
        return next_nll, rejected_nll

    def pairs(self, next_nll: Tensor, rejected_nll: Tensor) -> Pairs:
        """Return the pairs at their first rows, given -log p of both tokens of their rows."""
        return Pairs(
            -self._summed(next_nll, self.is_chosen),
            -self._summed(rejected_nll, self.is_rejected),
            *(
                torch.zeros_like(self.first).index_add(0, self.first, mask.long()).clamp(min=1)
                for mask in (self.is_chosen, self.is_rejected)
            ),
            *(
                torch.zeros_like(self.first) if one is None else one.where(self.is_first, 0)
                for one in self.references
            ),
        )

    def _summed(self, nll: Tensor, mask: Tensor) -> Tensor:
        """Return the sum of (N,) over each pair at its first row, (N,) float64, detached."""
        nll = nll.double().where(mask, 0)
        units = torch.round(nll * UNIT).long()
        total = torch.zeros_like(units).index_add(0, self.first, units)
        return total.double() / UNIT + nll.sum() * 0  # an integer is never NaN

    def _head_loss(
        self,
        hidden: Tensor,
        labels: Tensor,
        is_rejected: Tensor,
        tokens: Tensor,
        live_rows: Tensor | None,
        **weights: Any,
    ) -> HeadLoss:
        return head_loss(
            hidden,
            self.head.weight,
            labels,
            is_rejected,
            second_target=tokens,
            live_rows=live_rows,
            bias=self.head.bias,
            softcap=self.head.softcap,
            logit_scale=self.head.logit_scale,
            group=self.head.group,
            **weights,
            impl=self.options["impl"],
            scratch_mb=self.options["scratch_mb"],
        )
