"""Safety and over-refusal while training: refusal curves of held-out records, without generation.

A response is read with the probability of the refusal token at every position. A harmful one that
passes is a successful attack; an answer to a harmless request that is stopped is an over-refusal.
"""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
import torch
from accelerate.utils import gather_object
from torch import Tensor

from derta.data import (
    DertaCollator,
    EncodedRecords,
    PackedBatch,
    PackedSteps,
    packed_length,
    plan_packs,
)
from derta.evaluation import EvaluationSettings, forced_rates
from derta.modeling.patch import DertaOutput

# As `forced_rates` has them in evaluations: what attackers have written already, in tokens.
PREFILL_DEPTHS = EvaluationSettings().prefill_depths


def check_watched(metric: str | None, roles: Collection[str]) -> None:
    """Sees to it that a metric can be had of the evaluation records before a run relies on it.

    Args:
        metric: one of `derta.training.config.WATCHED`, or None.
        roles: that the evaluation records have, see `Source`.

    Raises:
        ValueError: records of a role are missing.
    """
    benign = {"helpful", "borderline"}
    for names, needed in (
        (("asr", "trade_off"), {"safety"}),
        (("over_refusal",), {"helpful"}),
        (("over_refusal_borderline",), {"borderline"}),
        (("trade_off",), benign),
    ):
        if metric in names and not needed & set(roles):
            raise ValueError(
                f"metric_for_best_model: {metric} needs evaluation records of role "
                f"{' or '.join(sorted(needed))}, there are none"
            )


def trunk_steps(
    records: EncodedRecords,
    *,
    max_tokens: int,
    examples_per_step: int,
    rank: int,
    world_size: int,
) -> PackedSteps:
    """Harmful responses and answers as trunks alone, each with all of its positions watched.

    Args:
        records: whose.
        max_tokens, examples_per_step: see `plan_packs`.
        rank, world_size: who runs the steps.
    """
    collator = DertaCollator(branches=0, cuts="zero")
    lengths = [packed_length(example, collator.objective) for example in records.examples]
    plan = plan_packs(
        lengths, max_tokens=max_tokens, examples_per_step=examples_per_step, epochs=1, seed=0
    )
    return PackedSteps(records.examples, plan, collator, rank, world_size)


class RefusalWatch:
    """Gathers refusal curves by the role of what they are of.

    `add` never waits for the device, which keeps 4 bytes a token; `read` costs one host transfer.
    """

    def __init__(self) -> None:
        self._probabilities: list[Tensor] = []
        self._rows: list[tuple[str, np.ndarray]] = []
        self._tokens = 0

    def add(self, batch: PackedBatch, output: DertaOutput) -> None:
        """Adds the curves of one pack of `trunk_steps`.

        Args:
            batch: the pack, on the CPU.
            output: what the patched model returned for it, on any device.
        """
        assert output.rows is not None
        self._probabilities.append(torch.exp(-output.rows["rto"][0].float()))
        watched = (batch.columns["rto_mask"] | batch.benign)[0].numpy()
        # strict=False: the empty pack has bounds and no example.
        for role, (start, end) in zip(batch.example_roles, batch.example_bounds, strict=False):
            rows = start + np.flatnonzero(watched[start:end])
            if len(rows):
                self._rows.append((role, self._tokens + rows))
        self._tokens += len(watched)

    def _curves(self) -> list[tuple[str, np.ndarray]]:
        if not self._rows:
            return []
        probability = torch.cat(self._probabilities).cpu().numpy()
        return [(role, probability[rows]) for role, rows in self._rows]

    def read(self, over_refusal_weight: float) -> dict[str, float]:
        """What the curves of all ranks come to.

        Returns:
            asr: attack success, of harmful responses; over_refusal and over_refusal_borderline: of
            answers to helpful and to borderline requests; see `forced_rates`. trade_off: w times
            the mean of the over-refusals that are there, and (1 - w) times asr. What there are no
            curves for is left out.
        """
        curves: dict[str, list[np.ndarray]] = {"safety": [], "helpful": [], "borderline": []}
        for role, curve in gather_object(self._curves()):
            curves[role].append(curve)
        figures = forced_rates(curves["safety"], curves["helpful"], PREFILL_DEPTHS)
        borderline = forced_rates([], curves["borderline"], PREFILL_DEPTHS)
        if borderline:
            figures["over_refusal_borderline"] = borderline["over_refusal"]
        refused = [rate for name, rate in figures.items() if name.startswith("over_refusal")]
        if refused and "asr" in figures:
            weight = over_refusal_weight
            figures["trade_off"] = (1 - weight) * figures["asr"] + weight * float(np.mean(refused))
        return figures
