"""What a source counts for in the loss is told before anything is trained."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from derta.data import DertaCollator, Drawn, loss_shares, pack
from drawn import DRAWN


def of(drawn: Drawn, source: str, weight: float) -> Drawn:
    example = replace(drawn.example, source=source, weight=weight)
    return replace(drawn, example=example, rto_depth="growing")


MIXED = [of(one, "abc"[i % 3], 1 + i / 2) for i, one in enumerate(DRAWN)]


@pytest.mark.parametrize("loss_norm", ["tokens", "terms"])
def test_shares_are_those_of_the_weights_of_the_loss(loss_norm: str) -> None:
    """Of each row's factor in the loss, as the trainer has it; see `DertaTrainer._normalizer`."""
    batch = pack(MIXED)
    rto_weight = 0.5
    norms = (batch.next_total, batch.rto_total) if loss_norm == "terms" else (1.0, 1.0)
    has_next = batch.shift_labels != -100
    next_rows = batch.loss_weight * has_next / norms[0]
    rto_rows = batch.loss_weight * batch.rto_mask * batch.rto_weight * rto_weight / norms[1]
    total = float(next_rows.sum() + rto_rows.sum())
    shares = loss_shares(MIXED, rto_weight=rto_weight, loss_norm=loss_norm)
    for source in "abc":
        places = [i for i, drawn in enumerate(MIXED) if drawn.example.source == source]
        rows = np.isin(batch.example_index.numpy(), places)
        assert shares[source].next == pytest.approx(float(next_rows[rows].sum()) / total)
        assert shares[source].rto == pytest.approx(float(rto_rows[rows].sum()) / total)
    assert sum(map(sum, shares.values())) == pytest.approx(1)
    assert list(shares) == sorted(shares, key=lambda source: -sum(shares[source]))


def test_dialogues_alone_have_no_rto_and_nothing_has_no_shares() -> None:
    dialogue = DertaCollator().draw(DRAWN[1].example, epoch=0)
    assert loss_shares([dialogue]) == {"": (1.0, 0.0)}
    assert loss_shares([]) == {}
