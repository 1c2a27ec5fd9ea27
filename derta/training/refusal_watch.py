"""Safety and over-refusal while training: refusal curves of held-out records, without generation.

Every response has a curve: the probability of the refusal token at each position. A harmful one
that passes is a successful attack; a stopped answer to a harmless request is an over-refusal.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection

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
from derta.evaluation import forced_rates
from derta.evaluation.attacks import PREFILL_DEPTHS
from derta.modeling.patch import DertaOutput


def check_watched(metric: str | None, roles: Collection[str]) -> None:
    """Check that the evaluation records give a metric, before a run relies on it.

    Args:
        metric: one of `derta.training.config.WATCHED`, or None.
        roles: roles of the evaluation records, see `Source`.

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
    costs: Callable[[np.ndarray], np.ndarray],
) -> PackedSteps:
    """Plan harmful responses and answers as trunks without branches, watched at every position.

    Args:
        records: the encoded records.
        max_tokens, examples_per_step: see `plan_packs`.
        rank, world_size: the process that runs the steps, and the number of processes.
        costs: the time that examples take, by their lengths.
    """
    collator = DertaCollator(branches=0, cuts="zero")
    lengths = np.array([packed_length(one, collator.objective) for one in records.examples])
    plan = plan_packs(
        lengths,
        max_tokens=max_tokens,
        examples_per_step=examples_per_step,
        epochs=1,
        seed=0,
        ranks=world_size,
        costs=costs(lengths),
    )
    return PackedSteps(records.examples, plan, collator, rank)


class RefusalWatch:
    """Gathers refusal curves by the role of their records.

    `add` never waits for the device and keeps 4 bytes a token there; `read` costs one transfer to
    the host.

    Args:
        refusals: number of refusal tokens that the curves add up.
    """

    def __init__(self, refusals: int) -> None:
        self._refusals = refusals
        self._probabilities: list[Tensor] = []
        self._rows: list[tuple[str, np.ndarray]] = []
        self._tokens = 0

    def add(self, batch: PackedBatch, output: DertaOutput) -> None:
        """Add the curves of one pack of `trunk_steps`.

        Args:
            batch: the pack, on the CPU.
            output: the patched model's output for it, on any device.
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
        """Return the rates over the curves of all ranks.

        Returns:
            asr: attack success of harmful responses. over_refusal and over_refusal_borderline:
            over-refusal of answers to helpful and to borderline requests, see `forced_rates`.
            trade_off: (1 - w) asr + w times the mean over-refusal. Rates without curves are left
            out.
        """
        curves: dict[str, list[np.ndarray]] = {"safety": [], "helpful": [], "borderline": []}
        for role, curve in gather_object(self._curves()):
            curves[role].append(curve)
        rates = functools.partial(
            forced_rates, prefill_depths=PREFILL_DEPTHS, refusals=self._refusals
        )
        figures = rates(curves["safety"], curves["helpful"])
        borderline = rates([], curves["borderline"])
        if borderline:
            figures["over_refusal_borderline"] = borderline["over_refusal"]
        refused = [rate for name, rate in figures.items() if name.startswith("over_refusal")]
        if refused and "asr" in figures:
            weight = over_refusal_weight
            figures["trade_off"] = (1 - weight) * figures["asr"] + weight * float(np.mean(refused))
        return figures
