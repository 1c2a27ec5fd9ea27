"""Cuts and RTO rows follow their policies, and depend on seed, epoch and example alone."""

from __future__ import annotations

import numpy as np
import pytest

from derta.data import (
    CUT_POLICIES,
    RTO_DEPTHS,
    EncodedDialogue,
    EncodedTriple,
    cut_probabilities,
    draw_cuts,
    draw_rto_rows,
    example_rng,
    rto_depth_weights,
)
from derta.objectives.cuts import draw_official_rows, padded_length
from derta.objectives.derta import DertaObjective

DRAWS = 20_000


def triple(harmful: int, limit: int | None = None, word_ends: object = ()) -> EncodedTriple:
    return EncodedTriple(
        id="t",
        prompt=np.arange(3, dtype=np.int32),
        harmful=np.arange(harmful, dtype=np.int32),
        safe=np.arange(4, dtype=np.int32),
        cut_limit=harmful if limit is None else limit,
        word_ends=np.array(word_ends, dtype=np.int64),
    )


def official(harmful: int, ends: tuple[int, ...]) -> tuple[EncodedTriple, dict[int, float]]:
    expected = {0: 1 / 3}
    for end in ends:
        expected[end] = expected.get(end, 0) + 2 / 3 / len(ends)
    return triple(harmful, word_ends=ends), expected


# A triple and the probability of each of its cuts, from the definition of the policy.
CASES = {
    "zero": ("zero", triple(9), {0: 1.0}),
    "uniform": ("uniform", triple(9), {k: 1 / 10 for k in range(10)}),
    "uniform, limited": ("uniform", triple(9, limit=4), {k: 1 / 5 for k in range(5)}),
    "uniform, nothing to cut": ("uniform", triple(0), {0: 1.0}),
    "official": ("official", *official(20, (2, 3, 7, 11))),
    "official, two words on one token": ("official", *official(20, (2, 3, 3))),
    "official, two words": ("official", triple(5), {0: 1.0}),
    "deep": ("deep", triple(12), {0: 1 / 2} | {k: 1 / 24 for k in range(1, 13)}),
    "deep, long": ("deep", triple(300), {0: 1 / 2} | {k: 1 / 200 for k in range(1, 101)}),
    "deep, limited": ("deep", triple(300, limit=2), {0: 1 / 2, 1: 1 / 4, 2: 1 / 4}),
    "deep, nothing to cut": ("deep", triple(0), {0: 1.0}),
}


@pytest.mark.parametrize("case", CASES)
def test_cuts_fall_as_often_as_the_policy_says(case: str) -> None:
    policy, example, expected = CASES[case]
    rng = np.random.default_rng(0)
    drawn = np.concatenate(
        [draw_cuts(example, policy=policy, branches=1, rng=rng) for _ in range(DRAWS)]
    )
    counts = np.bincount(drawn, minlength=example.cut_limit + 1)
    p = np.array([expected.get(k, 0.0) for k in range(len(counts))])
    assert np.allclose(cut_probabilities(example, policy), p, rtol=0, atol=1e-15)
    # Five standard deviations of a binomial count.
    assert np.all(np.abs(counts - DRAWS * p) <= 5 * np.sqrt(DRAWS * p * (1 - p)))


@pytest.mark.parametrize("policy", CUT_POLICIES)
@pytest.mark.parametrize("branches", [0, 1, 2, 5, 50])
def test_cuts_of_one_triple_are_distinct_and_descend(policy: str, branches: int) -> None:
    example = triple(10, limit=8, word_ends=(1, 4, 5))
    possible = {"zero": 1, "uniform": 9, "official": 4, "deep": 9}[policy]
    for seed in range(50):
        rng = np.random.default_rng(seed)
        cuts = draw_cuts(example, policy=policy, branches=branches, rng=rng)
        assert len(cuts) == min(branches, possible)
        assert np.all(np.diff(cuts) < 0)
        assert np.all((cuts >= 0) & (cuts <= example.cut_limit))


@pytest.mark.parametrize("keep", [0.0, 0.001, 0.05, 0.5, 1.0])
@pytest.mark.parametrize("harmful", [0, 1, 9, 99])
def test_the_share_of_rto_rows_is_exact_and_never_nothing(harmful: int, keep: float) -> None:
    rows = harmful + 1
    expected = max(1, round(keep * rows)) if keep else 0
    rng = np.random.default_rng(0)
    total = np.zeros(rows)
    draws = 2_000
    for _ in range(draws):
        drawn = draw_rto_rows(harmful, keep=keep, rng=rng)
        assert drawn.dtype == bool and drawn.shape == (rows,) and drawn.sum() == expected
        total += drawn
    p = expected / rows
    assert np.all(np.abs(total - draws * p) <= 5 * np.sqrt(draws * p * (1 - p)))


@pytest.mark.parametrize("padded", [16, 40, 48, 1024])
def test_official_rows_are_a_twentieth_of_the_padded_row_whatever_stands_there(padded: int) -> None:
    example, draws = triple(11), 4_000
    rng = np.random.default_rng(0)
    rows = np.array([draw_official_rows(example, padded, rng=rng) for _ in range(draws)])
    assert rows.dtype == bool and rows.shape == (draws, 12)
    kept = max(1, (padded + 19) // 20)
    p = kept / padded
    assert np.all(np.abs(rows.sum(0) - draws * p) <= 5 * np.sqrt(draws * p * (1 - p)))
    # Drawn together: that all of them miss the response is hypergeometric.
    none = np.prod([(padded - 12 - k) / (padded - k) for k in range(kept)])
    missed = np.count_nonzero(~rows.any(1))
    assert abs(missed - draws * none) <= 5 * np.sqrt(draws * none * (1 - none)) + 1


def test_official_rows_depend_on_the_longest_row_of_the_pack() -> None:
    dialogue = EncodedDialogue("d", np.zeros(41, np.int32), np.ones(41, bool))
    assert padded_length([]) == 0
    assert padded_length([triple(4)]) == 8  # 3 + 4 + 1
    assert padded_length([triple(5)]) == 16
    assert padded_length([triple(0), dialogue]) == 48
    objective = DertaObjective(rto_keep="official")
    rng = np.random.default_rng(0)
    counts = [objective.draw(triple(30), 2000, rng).depths.sum() for _ in range(300)]
    assert min(counts) == 0 and 1 < np.mean(counts) < 2  # 100 of 2000 positions, 31 of them live


def test_draws_depend_on_seed_epoch_and_example_alone() -> None:
    def first(*key) -> int:
        return int(example_rng(*key).bit_generator.random_raw())

    assert first(1, 2, "a") == first(1, 2, "a")
    # The same in every process, on every machine and in every later version.
    assert first(0, 0, "a") == 6284943652077191481
    keys = [(1, 2, "a"), (2, 1, "a"), (1, 2, "b"), (12, 0, "a"), (1, 20, "a"), (1, 2, ":a")]
    assert len({first(*key) for key in keys}) == len(keys)


def test_an_unknown_policy_is_refused() -> None:
    with pytest.raises(ValueError, match="^cuts must be one of zero, uniform, official, deep, got"):
        draw_cuts(triple(3), policy="random", branches=1, rng=np.random.default_rng(0))


def test_official_cuts_need_words() -> None:
    example = EncodedTriple("t", np.ones(1), np.ones(1), np.ones(1), cut_limit=1)
    with pytest.raises(ValueError, match="^t: cuts='official' needs word_ends, got None: encode"):
        draw_cuts(example, policy="official", branches=1, rng=np.random.default_rng(0))


@pytest.mark.parametrize("policy", RTO_DEPTHS)
@pytest.mark.parametrize("length", [0, 1, 7, 100])
def test_rto_weighs_1_on_average_however_it_is_spread(policy: str, length: int) -> None:
    weights = rto_depth_weights(length, policy)
    assert weights.shape == (length + 1,)
    assert weights.mean() == pytest.approx(1)
    steps = np.diff(weights)
    assert np.allclose(steps, 0 if policy == "uniform" else 2 / (length + 2))


def test_an_unknown_spread_is_refused() -> None:
    with pytest.raises(ValueError, match="^rto_depth must be one of uniform, growing, got 'deep'"):
        rto_depth_weights(3, "deep")
