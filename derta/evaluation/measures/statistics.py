"""Confidence intervals for rates, and the area under the ROC curve."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np


def wilson_interval(successes: float, n: float, z: float = 1.96) -> tuple[float, float]:
    """Return the Wilson interval for a rate from `successes` of `n` trials.

    Unlike the textbook interval around the mean, it stays within [0, 1] and does not shrink to a
    point at 0 or n successes, which are common in safety evaluations.

    Args:
        successes: number of successes, or sum of shares, in 0..n. If several trials of one kind
            count as one, it need not be whole.
        n: number of trials, above 0.
        z: half-width in standard deviations; 1.96 covers 95%.

    Returns:
        lower and upper end, in [0, 1].

    Raises:
        ValueError: n is not above 0, or successes are not in 0..n.

    Source: E. B. Wilson, "Probable inference, the law of succession, and statistical inference",
        1927.
    """
    if not n > 0:
        raise ValueError(f"n must be above 0, got {n}")
    if not 0 <= successes <= n:
        raise ValueError(f"successes must lie in 0..{n}, got {successes}")
    rate = successes / n
    scale = 1 + z * z / n
    center = (rate + z * z / (2 * n)) / scale
    half = z / scale * math.sqrt(rate * (1 - rate) / n + z * z / (4 * n * n))
    # At either end the exact bound is 0 or 1, which rounding would miss by an ulp.
    lower = 0.0 if successes == 0 else center - half
    upper = 1.0 if successes == n else center + half
    return lower, upper


def dispersion(successes: Sequence[float], n: Sequence[float]) -> float:
    """Return the variance of several groups' rates as a multiple of chance, at least 1.

    It is Pearson's chi-squared over its degrees of freedom. The pooled rate has that many times the
    variance of a binomial one, so its interval is that of so many times fewer trials.

    Args:
        successes: successes of each group, in 0..n.
        n: trials of each group, above 0.

    Source: P. McCullagh and J. A. Nelder, "Generalized Linear Models", 1989, section 4.5.
    """
    rate = math.fsum(successes) / math.fsum(n)
    if len(n) < 2 or not 0 < rate < 1:
        return 1.0
    squares = ((s - m * rate) ** 2 / m for s, m in zip(successes, n, strict=True))
    return max(1.0, math.fsum(squares) / (rate * (1 - rate) * (len(n) - 1)))


def newcombe_interval(
    before: tuple[float, float], after: tuple[float, float], z: float = 1.96
) -> tuple[float, float]:
    """Return the interval for the difference of a rate between two independent samples.

    It combines the two Wilson intervals. It stays within [-1, 1] and has a width even if both rates
    are 0 or 1.

    Args:
        before, after: successes, in 0..n, and trials n, above 0.
        z: half-width in standard deviations; 1.96 covers 95%.

    Returns:
        lower and upper end of the rate after less the rate before, in [-1, 1].

    Raises:
        ValueError: see `wilson_interval`.

    Source: R. G. Newcombe, "Interval estimation for the difference between independent
        proportions", 1998, method 10.
    """
    lower_before, upper_before = wilson_interval(*before, z)
    lower_after, upper_after = wilson_interval(*after, z)
    rate_before, rate_after = (successes / n for successes, n in (before, after))
    difference = rate_after - rate_before
    return (
        difference - math.hypot(rate_after - lower_after, upper_before - rate_before),
        difference + math.hypot(upper_after - rate_after, rate_before - lower_before),
    )


def roc_auc(scores: Sequence[float] | np.ndarray, labels: Sequence[bool] | np.ndarray) -> float:
    """Return the probability that a positive scores above a negative; ties count half.

    Args:
        scores: (n,) finite scores.
        labels: (n,) true for positives.

    Returns:
        exact up to one rounding, in [0, 1].

    Raises:
        ValueError: shapes differ, a score is not finite, or a class is missing.
    """
    scores = np.asarray(scores, dtype=np.float64)
    labels = np.asarray(labels, dtype=bool)
    if scores.ndim != 1 or scores.shape != labels.shape:
        raise ValueError(
            f"scores and labels must have one shape (n,), got {scores.shape} and {labels.shape}"
        )
    if not np.isfinite(scores).all():
        raise ValueError("scores must be finite, got NaN or infinity")
    positives, negatives = int(labels.sum()), int((~labels).sum())
    if not positives or not negatives:
        raise ValueError(
            f"labels must hold both classes, got {positives} positives and {negatives} negatives"
        )
    _, group, sizes = np.unique(scores, return_inverse=True, return_counts=True)
    positives_in_group = np.bincount(group, weights=labels, minlength=len(sizes))
    negatives_in_group = sizes - positives_in_group
    negatives_below = np.cumsum(negatives_in_group) - negatives_in_group
    # In halves, so that the sum is an integer and exact.
    won = (positives_in_group * (2 * negatives_below + negatives_in_group)).sum()
    return float(won / (2 * positives * negatives))
