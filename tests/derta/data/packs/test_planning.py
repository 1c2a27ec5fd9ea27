"""The plan is exact before training starts, and the same whoever asks for it."""

from __future__ import annotations

import itertools
import math
import time
from collections import Counter
from unittest import mock

import numpy as np
import pytest
from hypothesis import given, strategies as st

from derta.data import plan_packs

PLANS = {
    "lengths": st.lists(st.integers(1, 50), min_size=1, max_size=60),
    "max_tokens": st.integers(50, 120),
    "examples_per_step": st.integers(1, 20),
    "epochs": st.integers(1, 3),
    "seed": st.integers(0, 5),
}


@given(**PLANS)
def test_every_example_comes_once_an_epoch_in_packs_that_fit(lengths, **settings) -> None:
    plan = plan_packs(lengths, **settings)
    n, epochs, size = len(lengths), settings["epochs"], settings["examples_per_step"]
    assert plan.steps_per_epoch == math.ceil(n / size)
    assert len(plan.steps) == epochs * plan.steps_per_epoch
    for epoch in range(epochs):
        first = epoch * plan.steps_per_epoch
        steps = plan.steps[first : first + plan.steps_per_epoch]
        counts = [sum(map(len, packs)) for packs in steps]
        assert counts == [min(size, n - index * size) for index in range(len(steps))]
        used = Counter(index for packs in steps for pack in packs for index in pack)
        assert used == Counter(range(n))
    for packs in plan.steps:
        fills = [sum(lengths[index] for index in pack) for pack in packs]
        assert 0 < min(fills) and max(fills) <= settings["max_tokens"]
        # First fit: no two packs could have been one.
        assert all(a + b > settings["max_tokens"] for a, b in zip(fills, fills[1:], strict=False))


RANKS = st.integers(2, 5)


def total(costs: np.ndarray, pack: tuple[int, ...]) -> float:
    return float(costs[list(pack)].sum())


@given(**PLANS, ranks=RANKS, power=st.sampled_from([1.0, 2.0]), one_rank_packs=st.booleans())
def test_ranks_run_every_example_once_in_equally_many_packs(
    lengths, ranks, power, one_rank_packs, **settings
) -> None:
    alone = plan_packs(lengths, **settings)
    costs = np.array(lengths, float) ** power
    shared = plan_packs(
        lengths, **settings, ranks=ranks, costs=costs, one_rank_packs=one_rank_packs
    )
    assert len(shared.steps) == len(alone.steps)
    for step, (packs, expected) in enumerate(zip(shared.steps, alone.steps, strict=True)):
        by_rank = [shared.rank_packs(step, rank) for rank in range(ranks)]
        filled = Counter(pack for rank in by_rank for pack in rank if pack)
        assert filled == Counter(pack for pack in packs if pack)
        assert len({len(rank) for rank in by_rank}) == 1
        assert max(total(shared.lengths, pack) for pack in filled) <= settings["max_tokens"]
        examples = sorted(index for pack in expected for index in pack)
        assert sorted(index for pack in filled for index in pack) == examples
        if one_rank_packs:
            assert filled == Counter(expected)
            assert len(packs) - len(expected) < ranks
        else:
            assert len(filled) == min(len(packs), len(examples))


@given(**PLANS, ranks=RANKS, one_rank_packs=st.booleans())
def test_ranks_differ_by_less_than_the_packs_of_a_round(
    lengths, ranks, one_rank_packs, **settings
) -> None:
    plan = plan_packs(lengths, **settings, ranks=ranks, one_rank_packs=one_rank_packs)
    for step, packs in enumerate(plan.steps):
        costs = np.array([total(plan.costs, pack) for pack in packs]).reshape(-1, ranks)
        totals = costs.sum(axis=0)
        assert np.ptp(totals) <= np.ptp(costs, axis=1).max()
        # Ranks that wait for one another at every pack wait no more than they must.
        assert (costs[:-1].min(axis=1) >= costs[1:].max(axis=1)).all()
        assert plan.imbalance(step) == pytest.approx(totals.max() / totals.mean() - 1)


@given(
    costs=st.lists(st.integers(1, 30), min_size=1, max_size=7),
    ranks=st.integers(2, 3),
    data=st.data(),
)
def test_packs_are_within_the_bound_of_the_best_shares(costs, ranks, data) -> None:
    """Graham's bound of the longest processing time first, against every way to share."""
    lengths = data.draw(st.permutations(range(1, len(costs) + 1)))
    plan = plan_packs(
        lengths,
        max_tokens=sum(lengths),
        examples_per_step=len(costs),
        epochs=1,
        seed=0,
        ranks=ranks,
        costs=np.array(costs, float),
    )
    best = min(
        max(np.bincount(shares, costs, minlength=ranks))
        for shares in itertools.product(range(ranks), repeat=len(costs))
    )
    slowest = max(total(plan.costs, pack) for pack in plan.steps[0])
    assert best <= slowest <= (4 / 3 - 1 / (3 * ranks)) * best


def test_eight_ranks_finish_a_realistic_step_together() -> None:
    lengths = np.random.default_rng(0).lognormal(5.8, 0.7, 6400).clip(30, 4096).astype(int)
    settings = dict(max_tokens=4096, examples_per_step=128, epochs=1, seed=0, ranks=8)
    plan = plan_packs(lengths, **settings)
    assert np.mean([plan.imbalance(step) for step in range(50)]) < 0.02
    kept = plan_packs(lengths, **settings, one_rank_packs=True)
    assert np.mean([kept.imbalance(step) for step in range(50)]) > 0.1


def test_packs_of_one_rank_are_those_of_earlier_versions() -> None:
    """Or a checkpoint would continue with other packs."""
    settings = dict(max_tokens=9, examples_per_step=5, epochs=2, seed=42)
    steps = plan_packs([7, 3, 5, 2, 6, 4, 1, 3, 2], **settings, costs=np.arange(9.0)).steps
    assert list(steps) == [
        [(0, 3), (4, 7), (2,)],
        [(5, 1, 8), (6,)],
        [(0, 3), (4, 7), (1,)],
        [(2, 5), (8, 6)],
    ]


def test_the_plan_depends_on_the_seed_and_changes_every_epoch() -> None:
    settings = dict(lengths=list(range(1, 41)), max_tokens=60, examples_per_step=8, epochs=2)
    plan = plan_packs(**settings, seed=1)
    assert list(plan.steps) == list(plan_packs(**settings, seed=1).steps)
    assert list(plan.steps) != list(plan_packs(**settings, seed=2).steps)
    half = plan.steps_per_epoch
    assert plan.steps[:half] != plan.steps[half:]


@given(**PLANS)
def test_a_step_is_the_same_whenever_it_is_asked_for(lengths, **settings) -> None:
    steps = plan_packs(lengths, **settings).steps
    forwards = [steps[index] for index in range(len(steps))]
    assert [steps[index] for index in reversed(range(len(steps)))] == forwards[::-1]
    assert list(steps) == steps[:] == forwards and steps[-1] == forwards[-1]
    with pytest.raises(IndexError):
        steps[len(steps)]


def test_a_million_examples_are_planned_at_once_and_packed_in_their_turn() -> None:
    lengths = np.full(1_000_000, 100)
    started = time.process_time()
    plan = plan_packs(lengths, max_tokens=1024, examples_per_step=128, epochs=100, seed=0)
    assert len(plan.steps) == 100 * math.ceil(1_000_000 / 128)
    assert sum(map(len, plan.steps[500_000])) == 128
    assert time.process_time() - started < 2


@given(**PLANS, ranks=st.integers(1, 3), one_rank_packs=st.booleans(), at_once=st.integers(1, 100))
def test_the_largest_pack_is_the_first_of_the_longest(lengths, at_once, **settings) -> None:
    plan = plan_packs(lengths, **settings)
    packs = [(step, pack) for step, packs in enumerate(plan.steps) for pack in packs]
    with mock.patch("derta.data.packs.planning._EXAMPLES_AT_ONCE", at_once):
        assert plan.largest() == max(packs, key=lambda one: plan.lengths[list(one[1])].sum())


def test_the_largest_pack_of_a_million_examples_is_found_at_once() -> None:
    lengths = np.random.default_rng(0).integers(25, 400, size=1_000_000)
    plan = plan_packs(2 * lengths, max_tokens=4097, examples_per_step=128, epochs=3, seed=0)
    started = time.process_time()
    step, pack = plan.largest()  # none is full
    assert 2 * lengths[list(pack)].sum() == 4096 and pack in plan.steps[step]
    assert time.process_time() - started < 5


def test_packs_are_nearly_full() -> None:
    lengths = np.random.default_rng(0).integers(50, 800, size=2_000).tolist()
    plan = plan_packs(lengths, max_tokens=4096, examples_per_step=128, epochs=1, seed=0)
    for packs in plan.steps:
        least = math.ceil(sum(lengths[index] for pack in packs for index in pack) / 4096)
        assert len(packs) <= least + 1


def test_an_epoch_of_the_paper_is_planned_within_seconds() -> None:
    lengths = np.random.default_rng(0).integers(50, 800, size=66_000).tolist()
    started = time.process_time()
    plan_packs(lengths, max_tokens=1024, examples_per_step=128, epochs=1, seed=0)
    assert time.process_time() - started < 5


@pytest.mark.parametrize("ranks", [1, 3])
def test_packs_of_a_number_of_examples_are_cut_from_the_steps_order(ranks: int) -> None:
    lengths = list(range(1, 31))
    settings = {"max_tokens": 200, "examples_per_step": 14, "epochs": 2, "seed": 3}
    plan = plan_packs(lengths, **settings, ranks=ranks, examples_per_pack=4)
    everything = plan_packs(lengths, **{**settings, "max_tokens": 10_000})
    shuffled = []
    for packs, (whole,) in zip(plan.steps, everything.steps, strict=True):
        filled = [pack for pack in packs if pack]
        assert sorted(map(len, filled), reverse=True)[:-1] == [4] * (len(filled) - 1)
        assert sorted(itertools.chain(*filled)) == sorted(whole)
        shuffled += [list(pack) != sorted(pack, reverse=True) for pack in filled]
    assert any(shuffled)
    message = (
        r"^max_tokens must hold examples_per_pack \(4\) of the longest examples, which have 114"
    )
    with pytest.raises(ValueError, match=message):
        plan_packs(lengths, **{**settings, "max_tokens": 113}, examples_per_pack=4)


def test_an_example_longer_than_a_pack_is_named() -> None:
    with pytest.raises(ValueError, match=r"^lengths\[1\] must be at most max_tokens \(10\), got"):
        plan_packs([3, 11], max_tokens=10, examples_per_step=2, epochs=1, seed=0)


@pytest.mark.parametrize("name", ["examples_per_step", "epochs", "ranks", "examples_per_pack"])
def test_counts_are_at_least_one(name: str) -> None:
    settings = {"max_tokens": 9, "examples_per_step": 2, "epochs": 1, "seed": 0, name: 0}
    with pytest.raises(ValueError, match=f"^{name} must be at least 1, got 0"):
        plan_packs([1], **settings)
