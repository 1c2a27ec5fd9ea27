"""Which examples go into which pack and step, for all epochs, before training starts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

Pack = tuple[int, ...]


@dataclass(frozen=True)
class Plan:
    """The packs of every optimizer step.

    Attributes:
        steps: for each step of all epochs in order its packs, each a tuple of example indices.
        steps_per_epoch: how many of the steps make an epoch.
    """

    steps: list[list[Pack]]
    steps_per_epoch: int

    def rank_packs(self, step: int, rank: int, world_size: int) -> list[Pack]:
        """The packs of `step` that `rank` runs: as many on every rank, () for an empty pack.

        Neighbours, which are of similar length, go to different ranks.
        """
        packs = self.steps[step]
        empty: list[Pack] = [()] * (-len(packs) % world_size)
        return (packs + empty)[rank::world_size]


def plan_packs(
    lengths: Sequence[int], *, max_tokens: int, examples_per_step: int, epochs: int, seed: int
) -> Plan:
    """Shuffles the examples of every epoch, cuts them into steps and packs each step.

    A step is packed first-fit decreasing: the longest example first, each into the first pack that
    has room.

    Args:
        lengths: tokens of each example, at most; see `packed_length`.
        max_tokens: tokens of a pack, at most.
        examples_per_step: examples of a step; the last step of an epoch may have fewer.
        epochs: how many times every example is used.
        seed: with the epoch, all that the order depends on.

    Raises:
        ValueError: an example is longer than a pack, or a number is below 1.
    """
    for name, value in (("examples_per_step", examples_per_step), ("epochs", epochs)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    for index, length in enumerate(lengths):
        if length > max_tokens:
            raise ValueError(
                f"lengths[{index}] must be at most max_tokens ({max_tokens}), got {length}: raise "
                "max_tokens, or encode with it"
            )
    steps = []
    for epoch in range(epochs):
        order = np.random.default_rng([seed, epoch]).permutation(len(lengths)).tolist()
        for first in range(0, len(order), examples_per_step):
            steps.append(
                _first_fit_decreasing(order[first : first + examples_per_step], lengths, max_tokens)
            )
    return Plan(steps, len(steps) // epochs)


def _first_fit_decreasing(
    examples: Sequence[int], lengths: Sequence[int], max_tokens: int
) -> list[Pack]:
    packs: list[list[int]] = []
    room: list[int] = []
    for example in sorted(examples, key=lambda index: -lengths[index]):
        length = lengths[example]
        place = next((i for i, free in enumerate(room) if free >= length), len(packs))
        if place == len(packs):
            packs.append([])
            room.append(max_tokens)
        packs[place].append(example)
        room[place] -= length
    return [tuple(pack) for pack in packs]
