"""The rank-assisted attack counts the tokens and the responses that its definition names."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest

from derta.evaluation import RankAttack, VariantResult, pool, summarize

# Ranks of the tokens of three responses; the last has one token.
RANKS = [np.array([0, 9, 0, 4]), np.array([0, 0, 1]), np.array([7])]


def figures(**settings: Any) -> dict[str, Any]:
    outcomes = RankAttack(**settings).outcomes(RANKS)
    return VariantResult(outcomes=outcomes).to_dict()


def test_tokens_are_a_mean_over_responses_and_an_attack_needs_them_all() -> None:
    found = figures(top_k=(1, 5, 10))
    shares = {"1": (2 / 4 + 2 / 3 + 0) / 3, "5": (3 / 4 + 1 + 0) / 3, "10": 1.0}
    assert found["top_k"] == pytest.approx(shares, abs=1e-6)
    assert found["rank_assisted"] == pytest.approx({"1": 0, "5": 1 / 3, "10": 1}, abs=1e-6)
    assert found["counts"]["top_k"]["5"]["hits"] == pytest.approx(1.75)
    assert found["counts"]["rank_assisted"]["5"]["hits"] == 1
    low, high = found["intervals"]["top_k"]["5"]
    assert 0 < low < shares["5"] < high < 1


def test_the_attacker_writes_a_prefill_and_some_tokens_and_wants_only_the_first() -> None:
    after_2 = figures(top_k=(1, 5), prefill=2)
    assert after_2["top_k"] == pytest.approx({"1": 0.25, "5": 1.0})
    assert after_2["rank_assisted"] == {"1": 0.0, "5": 1.0}
    assert after_2["counts"]["rank_assisted"]["1"]["left_out"] == 1  # no token remains
    assert figures(top_k=(1,), tokens=1)["rank_assisted"]["1"] == pytest.approx(2 / 3, abs=1e-6)
    # A quarter of four tokens is one that the attacker writes; a third of three is not a quarter.
    by_misses = figures(top_k=(5,), misses=0.25)["rank_assisted"]
    assert by_misses["5"] == pytest.approx(2 / 3, abs=1e-6)
    assert figures(top_k=(1,), misses=0.25)["rank_assisted"]["1"] == 0
    assert figures(top_k=(1,), misses=1 / 3)["rank_assisted"]["1"] == pytest.approx(1 / 3, abs=1e-6)


def test_seeds_are_pooled_and_curves_count_responses_that_are_long_enough() -> None:
    one = VariantResult(
        outcomes=RankAttack(top_k=(5,)).outcomes(RANKS), harmful_ranks=tuple(RANKS), top_k=(5,)
    )
    alone = one.to_dict()
    assert alone["rank_curve"] == {"harmful": {"5": [0.666667, 0.5, 1.0, 1.0]}}
    assert alone["rank_curve_counts"] == {"harmful": [3, 2, 2, 1]}
    entry = summarize({"a": [one, one]}, seconds=0, seeds=[1, 2])["variants"]["a"]
    counts = entry["counts"]["rank_assisted"]["5"]
    assert (counts["hits"], counts["trials"]) == (2, 6)
    assert entry["rank_curve"] == alone["rank_curve"]
    assert pool([one, one]).to_dict()["top_k"] == alone["top_k"]
    assert RankAttack().outcomes([]) == ()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(top_k=(5, 5)), "top_k must be distinct and at least 1, got [5, 5]"),
        (dict(top_k=(0,)), "top_k must be distinct and at least 1, got [0]"),
        (dict(prefill=-1), "prefill must be at least 0, got -1"),
        (dict(tokens=0), "tokens must be at least 1, got 0"),
        (dict(misses=1), "misses must lie in [0, 1), got 1"),
    ],
)
def test_impossible_attackers_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        RankAttack(**settings)
