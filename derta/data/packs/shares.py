"""What a loss is made of, before anything is trained: how much weight each source has in it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from derta.data.packs.packing import Drawn
from derta.data.tokens.encoding import EncodedTriple
from derta.objectives.cuts import rto_depth_weights


class LossShare(NamedTuple):
    """Of one source, the share of the loss's whole weight that either term has, in [0, 1]."""

    next: float
    rto: float


def loss_shares(
    examples: Iterable[Drawn], *, rto_weight: float = 1.0, loss_norm: str = "tokens"
) -> dict[str, LossShare]:
    """The effective share of the loss's weight, by source and term.

    A target weighs what its example does, an RTO target also `rto_weight` and what its depth gives.

    Args:
        examples: what is trained on, as drawn for an epoch.
        rto_weight, loss_norm: as in `derta.DertaConfig`; "official" is taken for "tokens", from
            which it differs by how full packs are.

    Returns:
        by source, the largest first; all of them sum to 1.
    """
    next_weights: dict[str, float] = defaultdict(float)
    rto_weights: dict[str, float] = defaultdict(float)
    rto_total = 0.0  # as the mean counts it: without what RTO weighs beside
    for drawn in examples:
        example = drawn.example
        if isinstance(example, EncodedTriple):
            next_count = len(drawn.cuts) * len(example.safe)
            depths = rto_depth_weights(len(example.harmful), drawn.rto_depth)[drawn.rto_rows]
            rto_weights[example.source] += example.weight * rto_weight * float(depths.sum())
            rto_total += example.weight * len(depths)
        else:
            next_count = int(np.count_nonzero(example.is_target[1:]))
        next_weights[example.source] += example.weight * next_count
    if loss_norm == "terms":
        next_total = sum(next_weights.values())
        next_weights = _divided(next_weights, next_total)
        rto_weights = _divided(rto_weights, rto_total)
    total = sum(next_weights.values()) + sum(rto_weights.values())
    next_weights, rto_weights = _divided(next_weights, total), _divided(rto_weights, total)
    shares = {
        source: LossShare(next_weights.get(source, 0.0), rto_weights.get(source, 0.0))
        for source in next_weights
    }
    return dict(sorted(shares.items(), key=lambda item: -sum(item[1])))


def _divided(weights: dict[str, float], total: float) -> dict[str, float]:
    return {source: weight / (total or 1.0) for source, weight in weights.items()}
