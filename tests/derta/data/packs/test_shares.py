"""The share of each source and term in the loss is told before anything is trained."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from derta.data import DertaCollator, Drawn, loss_shares, pack
from derta.objectives.derta import DertaObjective
from derta.objectives.unlikelihood import UnlikelihoodObjective
from drawn import DRAWN

OBJECTIVE = UnlikelihoodObjective(rto_weight=0.5, rto_depth="growing", unlikelihood_weight=0.25)


def of(drawn: Drawn, source: str, weight: float) -> Drawn:
    return replace(drawn, example=replace(drawn.example, source=source, weight=weight))


MIXED = [of(one, "abc"[i % 3], 1 + i / 2) for i, one in enumerate(DRAWN)]


@pytest.mark.parametrize("loss_norm", ["tokens", "terms"])
def test_shares_are_those_of_the_weights_of_the_loss(loss_norm: str) -> None:
    """Each row's factor in the loss of a step, as the trainer computes it, adds up to them."""
    batch = pack(MIXED, OBJECTIVE)
    totals = {name: total.weight for name, total in batch.totals.items()}
    num_items, factors = OBJECTIVE.normalizer(loss_norm, totals, totals, 1)
    targets = OBJECTIVE.targets(batch.columns)
    weights = OBJECTIVE.row_weights(batch.columns)
    rows = {
        name: batch.loss_weight * targets[name] * weights[name] * factor / num_items
        for name, factor in factors.items()
    }
    whole = float(sum(values.sum() for values in rows.values()))
    shares = loss_shares(MIXED, OBJECTIVE, loss_norm)
    for source in "abc":
        places = [i for i, drawn in enumerate(MIXED) if drawn.example.source == source]
        own = np.isin(batch.example_index.numpy(), places)
        for name, values in rows.items():
            assert shares[source][name] == pytest.approx(float(values[own].sum()) / whole), name
    sums = {source: sum(share.values()) for source, share in shares.items()}
    assert sum(sums.values()) == pytest.approx(1)
    assert list(shares) == sorted(shares, key=lambda source: -sums[source])


def test_dialogues_have_no_rto_and_no_examples_no_shares() -> None:
    dialogue = DertaCollator().draw(DRAWN[1].example, epoch=0)
    assert loss_shares([dialogue], DertaObjective()) == {"": {"mle": 1.0, "rto": 0.0}}
    assert loss_shares([], DertaObjective()) == {}
