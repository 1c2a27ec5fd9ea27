"""Draws for a triple, anew in every epoch: cuts, where safe responses leave it, and RTO rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from hashlib import blake2b

import numpy as np

from derta.data.tokens.encoding import Encoded, EncodedDialogue, EncodedTriple

DEEP_REACH = 100
PADDED_TO = 8
RTO_DEPTHS = ("uniform", "growing")


def _zero(example: EncodedTriple) -> np.ndarray:
    mass = np.zeros(example.cut_limit + 1)
    mass[0] = 1
    return mass


def _uniform(example: EncodedTriple) -> np.ndarray:
    return np.full(example.cut_limit + 1, 1 / (example.cut_limit + 1))


def _official(example: EncodedTriple) -> np.ndarray:
    if example.word_ends is None:
        raise ValueError(
            f"{example.id}: cuts='official' needs word_ends, got None: encode with cuts='official'"
        )
    if not len(example.word_ends):
        return _zero(example)
    words = np.bincount(example.word_ends, minlength=example.cut_limit + 1)
    return _zero(example) / 3 + words / words.sum() * 2 / 3


def _deep(example: EncodedTriple) -> np.ndarray:
    reach = min(DEEP_REACH, example.cut_limit)
    if not reach:
        return _zero(example)
    mass = _zero(example) / 2
    mass[1 : reach + 1] = 1 / (2 * reach)
    return mass


# Each returns the probability of every cut 0..cut_limit.
CUT_POLICIES: dict[str, Callable[[EncodedTriple], np.ndarray]] = {
    "zero": _zero,
    "uniform": _uniform,
    "official": _official,
    "deep": _deep,
}


def cut_probabilities(example: EncodedTriple, policy: str) -> np.ndarray:
    """Return the probability of each cut, (cut_limit + 1,) float64; () without a safe response.

    Args:
        example: the triple.
        policy: "zero": always 0. "uniform": 0..cut_limit (the paper). "official": a third at zero,
            the rest after a whole number of words, the last two words never reached (the authors'
            data generator, which takes every third row instead of drawing). "deep": half at zero,
            the rest in 1..min(100, cut_limit) (arXiv 2406.05946).

    Raises:
        ValueError: there is no such policy, or "official" lacks `word_ends`.
    """
    if policy not in CUT_POLICIES:
        raise ValueError(f"cuts must be one of {', '.join(CUT_POLICIES)}, got {policy!r}")
    if example.cut_limit < 0:
        return np.zeros(0)
    return CUT_POLICIES[policy](example)


def draw_cuts(
    example: EncodedTriple, *, policy: str, branches: int, rng: np.random.Generator
) -> np.ndarray:
    """Draw `branches` distinct cuts, or all possible ones if those are fewer.

    Args:
        example: the triple.
        policy: see `cut_probabilities`.
        branches: the number of cuts.
        rng: see `example_rng`.

    Returns:
        (<= branches,) int64, descending, each in 0..cut_limit.

    Raises:
        ValueError: as `cut_probabilities`.
    """
    probabilities = cut_probabilities(example, policy)
    count = min(branches, int(np.count_nonzero(probabilities)))
    if not count:
        return np.zeros(0, np.int64)
    cuts = rng.choice(len(probabilities), size=count, replace=False, p=probabilities)
    return np.sort(cuts)[::-1]


def draw_rto_rows(harmful_length: int, *, keep: float, rng: np.random.Generator) -> np.ndarray:
    """Draw the depths of a harmful response with an RTO target.

    Args:
        harmful_length: |h|.
        keep: share of the depths 0..|h|, in [0, 1].
        rng: see `example_rng`.

    Returns:
        (harmful_length + 1,) bool; max(1, round(keep * (harmful_length + 1))) of them True, none if
        `keep` is 0.
    """
    rows = np.zeros(harmful_length + 1, dtype=bool)
    if keep > 0:
        count = max(1, round(keep * len(rows)))
        rows[rng.choice(len(rows), size=count, replace=False)] = True
    return rows


def draw_official_rows(
    example: EncodedTriple, padded: int, *, rng: np.random.Generator
) -> np.ndarray:
    """Draw the depths with an RTO target as the authors' full-parameter script does.

    It keeps max(1, (T + 19) // 20) of the T positions of the padded row, whatever stands there.
    Those at the prompt and the padding are lost, and a short response may keep none.

    Args:
        example: the triple.
        padded: T, see `padded_length`; at least |q| + |h| + 1.
        rng: see `example_rng`.

    Returns:
        (|h| + 1,) bool.

    Source: the official `run_clm_llms_derta_llama_drop_5_percent.py`.
    """
    kept = np.zeros(padded, dtype=bool)
    kept[rng.choice(padded, size=max(1, (padded + 19) // 20), replace=False)] = True
    first = len(example.prompt)
    return kept[first : first + len(example.harmful) + 1]


def padded_length(examples: Sequence[Encoded]) -> int:
    """Return the positions of each row if examples are rows of a batch, as the authors pad them.

    A dialogue or a rendered row is one row. A triple counts by its prompt with either response;
    prefixes of safe responses do not count. The longest row is padded to a multiple of 8.
    """
    longest = max(map(_row_length, examples), default=0)
    return -(-longest // PADDED_TO) * PADDED_TO


def _row_length(example: Encoded) -> int:
    if isinstance(example, EncodedDialogue):
        return len(example.input_ids)
    return len(example.prompt) + max(len(example.harmful) + 1, len(example.safe))


def rto_depth_weights(harmful_length: int, policy: str) -> np.ndarray:
    """Return the weight of an RTO target at each depth of a harmful response, 1 on average.

    Args:
        harmful_length: |h|.
        policy: "uniform": 1 everywhere. "growing": linear in the depth t, 2 (t + 1) / (|h| + 2).

    Returns:
        (|h| + 1,) float64.

    Raises:
        ValueError: there is no such policy.
    """
    if policy == "uniform":
        return np.ones(harmful_length + 1)
    if policy == "growing":
        return 2 * np.arange(1, harmful_length + 2) / (harmful_length + 2)
    raise ValueError(f"rto_depth must be one of {', '.join(RTO_DEPTHS)}, got {policy!r}")


def example_rng(seed: int, epoch: int, example_id: str) -> np.random.Generator:
    """Return a generator that depends on these three only: not on ranks, workers or order."""
    digest = blake2b(f"{seed}:{epoch}:{example_id}".encode(), digest_size=16).digest()
    return np.random.default_rng(int.from_bytes(digest, "little"))
