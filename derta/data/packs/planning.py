"""The plan of a run: the packs of every step of every epoch, known before training starts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import overload

import numpy as np

Pack = tuple[int, ...]

_EXAMPLES_AT_ONCE = 1 << 17  # measured together


@dataclass(frozen=True, eq=False)
class Plan:
    """The packs of every optimizer step.

    Attributes:
        steps: the packs of each step of all epochs in order, each a tuple of example indices.
            They are formed on demand, and are the same every time.
        steps_per_epoch: the number of steps in an epoch.
        lengths: (examples,) int64, the most tokens of each example.
    """

    steps: _Steps
    steps_per_epoch: int
    lengths: np.ndarray

    def rank_packs(self, step: int, rank: int, world_size: int) -> list[Pack]:
        """Return the packs of `step` that `rank` runs: as many on every rank, () for an empty pack.

        Neighbours have similar lengths and go to different ranks.
        """
        packs = self.steps[step]
        empty: list[Pack] = [()] * (-len(packs) % world_size)
        return (packs + empty)[rank::world_size]

    def largest(self) -> tuple[int, Pack]:
        """Return the step and examples of the first pack with the most tokens."""
        step = self.steps.fullest()
        return step, max(self.steps[step], key=lambda pack: self.lengths[list(pack)].sum())


def plan_packs(
    lengths: Sequence[int] | np.ndarray,
    *,
    max_tokens: int,
    examples_per_step: int,
    epochs: int,
    seed: int,
) -> Plan:
    """Shuffle the examples of every epoch, cut them into steps and pack each step.

    A step is packed first-fit decreasing: the longest example first, each into the first pack with
    room. Memory holds the lengths and the order of one epoch.

    Args:
        lengths: the most tokens of each example, see `packed_length`.
        max_tokens: the most tokens of a pack.
        examples_per_step: examples of a step; the last step of an epoch may have fewer.
        epochs: the number of times that every example is used.
        seed: the order depends on it and the epoch only.

    Raises:
        ValueError: an example is longer than a pack, or a number is below 1.
    """
    for name, value in (("examples_per_step", examples_per_step), ("epochs", epochs)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    sizes = np.asarray(lengths, np.int64)
    if len(too_long := np.flatnonzero(sizes > max_tokens)):
        index = int(too_long[0])
        raise ValueError(
            f"lengths[{index}] must be at most max_tokens ({max_tokens}), got {sizes[index]}: "
            "raise max_tokens, or encode with it"
        )
    steps = _Steps(sizes, max_tokens, examples_per_step, epochs, seed)
    return Plan(steps, steps.steps_per_epoch, sizes)


class _Steps(Sequence[list[Pack]]):
    """The steps of `plan_packs`, packed on demand."""

    def __init__(
        self, lengths: np.ndarray, max_tokens: int, examples_per_step: int, epochs: int, seed: int
    ) -> None:
        self.lengths = lengths
        self.max_tokens = max_tokens
        self.examples_per_step = examples_per_step
        self.steps_per_epoch = -(-len(lengths) // examples_per_step)
        self.epochs = epochs
        self.seed = seed
        self._epoch, self._order = -1, np.zeros(0, np.int64)

    def __len__(self) -> int:
        return self.epochs * self.steps_per_epoch

    @overload
    def __getitem__(self, step: int) -> list[Pack]: ...
    @overload
    def __getitem__(self, step: slice) -> list[list[Pack]]: ...
    def __getitem__(self, step: int | slice) -> list[Pack] | list[list[Pack]]:
        if isinstance(step, slice):
            return [self[one] for one in range(*step.indices(len(self)))]
        epoch, place = divmod(range(len(self))[step], self.steps_per_epoch)
        first = place * self.examples_per_step
        examples = self._order_of(epoch)[first : first + self.examples_per_step]
        return _first_fit_decreasing(examples, self.lengths[examples], self.max_tokens)

    def fullest(self) -> int:
        """Return the first step with the fullest pack; many steps are measured at once."""
        width = min(self.examples_per_step, len(self.lengths))
        at_once = max(1, _EXAMPLES_AT_ONCE // width)
        best, most = 0, 0
        for epoch in range(self.epochs):
            lengths = np.zeros(self.steps_per_epoch * width, np.int64)
            lengths[: len(self.lengths)] = self.lengths[self._order_of(epoch)]
            steps = lengths.reshape(self.steps_per_epoch, width)
            for first in range(0, len(steps), at_once):
                fills = _largest_fills(steps[first : first + at_once], self.max_tokens)
                place = int(fills.argmax())
                if fills[place] > most:
                    best, most = epoch * self.steps_per_epoch + first + place, fills[place]
                if most == self.max_tokens:
                    return best
        return best

    def _order_of(self, epoch: int) -> np.ndarray:
        if epoch != self._epoch:
            order = np.random.default_rng([self.seed, epoch]).permutation(len(self.lengths))
            self._epoch, self._order = epoch, order
        return self._order


def _first_fit_decreasing(examples: np.ndarray, lengths: np.ndarray, max_tokens: int) -> list[Pack]:
    packs: list[list[int]] = []
    room: list[int] = []
    longest_first = np.argsort(-lengths, kind="stable")
    for example, length in zip(
        examples[longest_first].tolist(), lengths[longest_first].tolist(), strict=True
    ):
        place = next((i for i, free in enumerate(room) if free >= length), len(packs))
        if place == len(packs):
            packs.append([])
            room.append(max_tokens)
        packs[place].append(example)
        room[place] -= length
    return [tuple(pack) for pack in packs]


def _largest_fills(lengths: np.ndarray, max_tokens: int) -> np.ndarray:
    """Return the tokens of each step's largest pack, as `_first_fit_decreasing` packs them.

    Args:
        lengths: (steps, examples) int64; 0 where a step has fewer examples.
        max_tokens: the most tokens of a pack.
    """
    steps = np.arange(len(lengths))
    room = np.full((len(lengths), 1), max_tokens)
    for length in -np.sort(-lengths).T:
        if (room[:, -1] < max_tokens).any():  # a last one is open, so that one always has room
            room = np.pad(room, ((0, 0), (0, 1)), constant_values=max_tokens)
        place = (room >= length[:, None]).argmax(axis=1)
        room[steps, place] -= length
    return max_tokens - room.min(axis=1)
