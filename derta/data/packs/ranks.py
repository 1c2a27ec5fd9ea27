"""The packs of one step for several ranks: as many on each rank, and about as much work."""

from __future__ import annotations

import heapq
from collections.abc import Sequence

import numpy as np

Pack = tuple[int, ...]


def level(
    examples: np.ndarray,
    lengths: np.ndarray,
    costs: np.ndarray,
    *,
    max_tokens: int,
    ranks: int,
) -> list[Pack]:
    """Pack examples into as many packs for every rank, all of about the same cost.

    The costliest example comes first, and each goes into the cheapest pack with room. There are as
    few packs as hold all examples in this way. A pack is empty only if examples are fewer than
    packs.

    Args:
        examples: (n,) int64, the examples of the step.
        lengths: (n,) int64, the tokens of each, at most `max_tokens`.
        costs: (n,) float64, the time that each takes, in any unit, above 0.
        max_tokens: the most tokens of a pack.
        ranks: the number of ranks.
    """
    costliest_first = np.argsort(-costs, kind="stable")
    columns = (values[costliest_first].tolist() for values in (examples, lengths, costs))
    sorted_examples = list(zip(*columns, strict=True))
    a_rank = -(-int(lengths.sum()) // (ranks * max_tokens))
    while (packs := _level(sorted_examples, max_tokens, ranks * a_rank)) is None:
        a_rank += 1
    return packs


def _level(
    examples: Sequence[tuple[int, int, float]], max_tokens: int, count: int
) -> list[Pack] | None:
    """Return the packs of examples with lengths and costs, None if one of them finds no room."""
    packs: list[list[int]] = [[] for _ in range(count)]
    room = [max_tokens] * count
    cheapest = [(0.0, place) for place in range(count)]
    for example, length, cost in examples:
        full = []
        while cheapest and room[cheapest[0][1]] < length:
            full.append(heapq.heappop(cheapest))
        if not cheapest:
            return None
        before, place = cheapest[0]
        packs[place].append(example)
        room[place] -= length
        heapq.heapreplace(cheapest, (before + cost, place))
        for one in full:
            heapq.heappush(cheapest, one)
    return [tuple(pack) for pack in packs]


def deal(packs: Sequence[Pack], costs: np.ndarray, ranks: int) -> list[Pack]:
    """Order packs such that rank r does its share with packs r, r + ranks, r + 2 * ranks, ...

    Ranks wait for one another at every pack where parameters are sharded. Each round therefore has
    the costliest packs that are left, and gives them to the ranks with the least so far.

    Args:
        packs: the packs of a step. Empty ones are added up to a multiple of `ranks`.
        costs: the time that each example takes, in any unit.
        ranks: the number of ranks.
    """
    padded = [*packs, *[()] * (-len(packs) % ranks)]
    cost = {pack: float(costs[list(pack)].sum()) for pack in padded}
    padded.sort(key=lambda pack: -cost[pack])
    dealt: list[Pack] = []
    total = [0.0] * ranks
    for first in range(0, len(padded), ranks):
        least_first = sorted(range(ranks), key=total.__getitem__)
        turn = dict(zip(least_first, padded[first : first + ranks], strict=True))
        for rank in range(ranks):
            dealt.append(turn[rank])
            total[rank] += cost[turn[rank]]
    return dealt
