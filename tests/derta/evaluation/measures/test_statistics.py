"""Intervals and areas agree with published values and with counted pairs."""

from __future__ import annotations

import itertools
import math
import re

import numpy as np
import pytest
from hypothesis import given, strategies as st

from derta.evaluation import newcombe_interval, roc_auc, wilson_interval
from derta.evaluation.measures.statistics import dispersion


def test_wilson_interval_equals_published_values() -> None:
    # Agresti and Coull 1998: 0 of 10 at z = 1.96 gives (0, 0.2775); 5 of 10 (0.2366, 0.7634).
    assert wilson_interval(0, 10) == (0.0, pytest.approx(1.96**2 / (10 + 1.96**2), rel=1e-15))
    assert wilson_interval(5, 10) == pytest.approx((0.23659, 0.76341), abs=5e-6)


@given(st.integers(1, 500), st.data(), st.floats(0.1, 5))
def test_wilson_interval_contains_the_rates_that_a_test_does_not_reject(
    n: int, data: st.DataObject, z: float
) -> None:
    successes = data.draw(st.integers(0, n))
    lower, upper = wilson_interval(successes, n, z)
    assert 0 <= lower <= successes / n <= upper <= 1
    for end in (lower, upper):
        if 0 < end < 1:  # Wilson's ends are where the count is z standard deviations off
            deviations = abs(successes / n - end) / math.sqrt(end * (1 - end) / n)
            assert deviations == pytest.approx(z, rel=1e-6)
    mirrored = wilson_interval(n - successes, n, z)
    assert mirrored == pytest.approx((1 - upper, 1 - lower), abs=1e-12)


@pytest.mark.parametrize(
    ("successes", "n", "message"),
    [
        (0, 0, "n must be above 0, got 0"),
        (3, 2, "successes must lie in 0..2, got 3"),
        (-1, 2, "successes must lie in 0..2, got -1"),
    ],
)
def test_wilson_interval_refuses_impossible_counts(successes: int, n: int, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        wilson_interval(successes, n)


@given(st.lists(st.tuples(st.integers(0, 20), st.integers(1, 20)), min_size=2, max_size=6))
def test_dispersion_is_the_statistic_of_a_table_over_its_degrees_of_freedom(
    rows: list[tuple[int, int]],
) -> None:
    table = np.array([[hits, misses] for hits, misses in rows])
    found = dispersion(table[:, 0], table.sum(1))
    if not table.sum(0).all():
        assert found == 1.0  # no success varies, and no failure
        return
    expected = np.outer(table.sum(1), table.sum(0)) / table.sum()
    chi_squared = ((table - expected) ** 2 / expected).sum()
    assert found == pytest.approx(max(1.0, chi_squared / (len(table) - 1)), rel=1e-9)
    assert dispersion([3], [4]) == 1.0


def test_newcombe_interval_equals_published_values() -> None:
    # Newcombe 1998, table II, method 10, comparisons (a) and (f).
    assert newcombe_interval((48, 80), (56, 70)) == pytest.approx((0.0524, 0.3339), abs=5e-5)
    assert newcombe_interval((0, 10), (10, 10)) == pytest.approx((0.6075, 1.0), abs=5e-5)


@given(st.integers(1, 99), st.integers(1, 99), st.data())
def test_newcombe_interval_contains_the_difference_and_is_antisymmetric(
    n: int, m: int, data: st.DataObject
) -> None:
    before, after = (data.draw(st.integers(0, n)), n), (data.draw(st.integers(0, m)), m)
    lower, upper = newcombe_interval(before, after)
    assert -1 - 1e-12 <= lower <= after[0] / m - before[0] / n <= upper <= 1 + 1e-12
    assert newcombe_interval(after, before) == pytest.approx((-upper, -lower), abs=1e-12)


@given(
    st.lists(st.integers(0, 4), min_size=1, max_size=12),
    st.lists(st.integers(0, 4), min_size=1, max_size=12),
)
def test_auc_is_the_share_of_ordered_pairs_with_ties_as_half(
    positives: list[int], negatives: list[int]
) -> None:
    pairs = list(itertools.product(positives, negatives))
    won = sum(2 * (p > n) + (p == n) for p, n in pairs)
    labels = [True] * len(positives) + [False] * len(negatives)
    assert roc_auc(positives + negatives, labels) == won / (2 * len(pairs))


@pytest.mark.parametrize(
    ("scores", "labels", "message"),
    [
        ([1.0, 2.0], [True], "must have one shape (n,), got (2,) and (1,)"),
        ([[1.0]], [[True]], "must have one shape (n,), got (1, 1) and (1, 1)"),
        ([np.nan, 1.0], [True, False], "scores must be finite"),
        ([1.0, 2.0], [True, True], "both classes, got 2 positives and 0 negatives"),
    ],
)
def test_auc_refuses_invalid_scores_and_labels(scores: list, labels: list, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        roc_auc(scores, labels)
