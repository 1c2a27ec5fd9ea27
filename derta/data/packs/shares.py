"""The share of each source and term in the weight of a run's loss, before it is trained."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable

import numpy as np

from derta.data.packs.packing import placed
from derta.labels import IGNORE_INDEX
from derta.objectives.base import Drawn, LossNorm, Objective

LossShares = dict[str, dict[str, float]]


class LossWeights:
    """The weight of each source and term in a run's loss, example by example.

    A target weighs as much as its example, its term and its row's own weight together. Memory grows
    with the sources and, for terms that spare refusal tokens, with the distinct tokens of each.

    Args:
        objective: its terms.
    """

    def __init__(self, objective: Objective) -> None:
        self.objective = objective
        nothing = dict.fromkeys((term.name for term in objective.terms), 0.0)
        self._totals = nothing.copy()
        self._weights: LossShares = defaultdict(nothing.copy)
        # By source, term and token.
        self._spared: dict[tuple[str, str, int], float] = defaultdict(float)

    def add(self, drawn: Drawn) -> None:
        """Add an example to train on, as drawn for an epoch."""
        example, objective = drawn.example, self.objective
        columns = objective.lay(drawn, placed(drawn))
        row_weights, of_source = objective.row_weights(columns), self._weights[example.source]
        spared = objective.spared(columns)
        for name, labels in spared.items():
            for token in labels[labels != IGNORE_INDEX].tolist():
                self._spared[example.source, name, token] += example.weight
        for name, rows in objective.targets(columns).items():
            if name not in spared:
                self._totals[name] += example.weight * np.count_nonzero(rows)
                of_source[name] += example.weight * float(np.sum(rows * row_weights[name]))

    def shares(self, loss_norm: LossNorm = "tokens", refusals: Collection[int] = ()) -> LossShares:
        """Return the effective share of the loss's weight, by source and by term.

        Args:
            loss_norm: see `Objective.shares`.
            refusals: the refusal tokens, unless the objective was `aimed` at them.

        Returns:
            Shares in [0, 1] by term for each source, the largest source first; their sum is 1.
        """
        totals = self._totals.copy()
        weights = {source: of_source.copy() for source, of_source in self._weights.items()}
        for (source, name, token), weight in self._spared.items():
            if token not in refusals:
                totals[name] += weight
                weights[source][name] += weight
        factors = {
            name: float(factor) / (totals[name] or 1.0)
            for name, factor in self.objective.shares(loss_norm, totals).items()
        }
        parts = {
            source: {name: factors[name] * weight for name, weight in of_source.items()}
            for source, of_source in weights.items()
        }
        whole = sum(sum(part.values()) for part in parts.values()) or 1.0
        shares = {
            source: {name: value / whole for name, value in part.items()}
            for source, part in parts.items()
        }
        return dict(sorted(shares.items(), key=lambda item: -sum(item[1].values())))


def loss_shares(
    examples: Iterable[Drawn], objective: Objective, loss_norm: LossNorm = "tokens"
) -> LossShares:
    """Return the `LossWeights.shares` of examples."""
    weights = LossWeights(objective)
    for drawn in examples:
        weights.add(drawn)
    return weights.shares(loss_norm)
