"""The share of each source and term in the weight of a run's loss, before it is trained."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

import numpy as np

from derta.data.packs.packing import placed
from derta.objectives.base import Drawn, LossNorm, Objective

LossShares = dict[str, dict[str, float]]


def loss_shares(
    examples: Iterable[Drawn], objective: Objective, loss_norm: LossNorm = "tokens"
) -> LossShares:
    """Return the effective share of the loss's weight, by source and by term.

    A target weighs as much as its example, its term and its row's own weight together.

    Args:
        examples: the examples to train on, as drawn for an epoch.
        objective: its terms.
        loss_norm: see `Objective.shares`.

    Returns:
        Shares in [0, 1] by term for each source, the largest source first; all of them sum to 1.
    """
    nothing: dict[str, float] = dict.fromkeys((term.name for term in objective.terms), 0.0)
    totals = nothing.copy()
    weights: LossShares = defaultdict(nothing.copy)
    for drawn in examples:
        columns = objective.lay(drawn, placed(drawn))
        row_weights = objective.row_weights(columns)
        of_source = weights[drawn.example.source]
        for name, rows in objective.targets(columns).items():
            totals[name] += drawn.example.weight * np.count_nonzero(rows)
            of_source[name] += drawn.example.weight * float(np.sum(rows * row_weights[name]))
    factors = {
        name: float(factor) / (totals[name] or 1.0)
        for name, factor in objective.shares(loss_norm, totals).items()
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
