"""The plan of a run: the packs of every step of every epoch, known before training starts.

On several ranks, packs are formed and dealt such that ranks finish together, see `ranks`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import overload

import numpy as np

from derta.data.packs.ranks import Pack, deal, level

_EXAMPLES_AT_ONCE = 1 << 17  # measured together


@dataclass(frozen=True, eq=False)
class Plan:
    """The packs of every optimizer step.

    Attributes:
        steps: the packs of each step of all epochs in order, each a tuple of example indices.
            They are formed on demand, and are the same every time. Ranks take them in turn, and all
            of them as many; () is an empty pack.
        steps_per_epoch: the number of steps in an epoch.
        lengths: (examples,) int64, the most tokens of each example.
        costs: (examples,) float64, the time that each example takes, in any unit.
        ranks: the number of ranks.
    """

    steps: _Steps
    steps_per_epoch: int
    lengths: np.ndarray
    costs: np.ndarray
    ranks: int

    def rank_packs(self, step: int, rank: int) -> list[Pack]:
        """Return the packs of `step` that `rank` runs."""
        return self.steps[step][rank :: self.ranks]

    def imbalance(self, step: int) -> float:
        """Return the cost of the costliest rank in `step`, over the mean of all ranks, less 1."""
        cost = [float(self.costs[list(pack)].sum()) for pack in self.steps[step]]
        by_rank = [sum(cost[rank :: self.ranks]) for rank in range(self.ranks)]
        return max(by_rank) * self.ranks / sum(by_rank) - 1

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
    ranks: int = 1,
    costs: np.ndarray | None = None,
    one_rank_packs: bool = False,
    examples_per_pack: int | None = None,
) -> Plan:
    """Shuffle the examples of every epoch, cut them into steps and pack each step.

    On one rank, a step is packed first-fit decreasing: the longest example first, each into the
    first pack with room. On several, its packs are levelled by cost, see `level`; they are then
    more in number and less full. Memory holds lengths, costs and the order of one epoch.

    Args:
        lengths: the most tokens of each example, see `packed_length`.
        max_tokens: the most tokens of a pack.
        examples_per_step: examples of a step; the last step of an epoch may have fewer.
        epochs: the number of times that every example is used.
        seed: the order depends on it and the epoch only.
        ranks: the number of processes that share each step.
        costs: (examples,) float64, the time that each example takes, in any unit; None: its tokens.
        one_rank_packs: if True, several ranks share the packs of one rank, for a loss that depends
            on how packs are formed.
        examples_per_pack: examples of each pack, in the order of the step; the last pack of a step
            may have fewer. None: as many as max_tokens holds.

    Raises:
        ValueError: an example, or examples_per_pack of them, are longer than a pack, or a number is
            below 1.
    """
    numbers = {"examples_per_step": examples_per_step, "epochs": epochs, "ranks": ranks}
    if examples_per_pack is not None:
        numbers["examples_per_pack"] = examples_per_pack
    for name, value in numbers.items():
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    sizes = np.asarray(lengths, np.int64)
    if len(too_long := np.flatnonzero(sizes > max_tokens)):
        index = int(too_long[0])
        raise ValueError(
            f"lengths[{index}] must be at most max_tokens ({max_tokens}), got {sizes[index]}: "
            "raise max_tokens, or encode with it"
        )
    if examples_per_pack is not None:
        together = int(np.sort(sizes)[-examples_per_pack:].sum())
        if together > max_tokens:
            raise ValueError(
                f"max_tokens must hold examples_per_pack ({examples_per_pack}) of the longest "
                f"examples, which have {together:,} tokens, got {max_tokens:,}"
            )
    costs = sizes.astype(np.float64) if costs is None else costs
    form = _Form(sizes, costs, max_tokens, ranks, one_rank_packs, examples_per_pack)
    steps = _Steps(form, examples_per_step, epochs, seed)
    return Plan(steps, steps.steps_per_epoch, sizes, costs, ranks)


@dataclass(frozen=True, eq=False)
class _Form:
    """The packing of a step; attributes as in `plan_packs`."""

    lengths: np.ndarray
    costs: np.ndarray
    max_tokens: int
    ranks: int
    one_rank_packs: bool
    examples_per_pack: int | None

    @property
    def is_first_fit(self) -> bool:
        return self.examples_per_pack is None and (self.ranks == 1 or self.one_rank_packs)

    def packs(self, examples: np.ndarray) -> list[Pack]:
        lengths = self.lengths[examples]
        if self.examples_per_pack is not None:
            size = self.examples_per_pack
            packs = [
                tuple(examples[at : at + size].tolist()) for at in range(0, len(examples), size)
            ]
        elif self.is_first_fit:
            packs = _first_fit_decreasing(examples, lengths, self.max_tokens)
        else:
            packs = level(
                examples,
                lengths,
                self.costs[examples],
                max_tokens=self.max_tokens,
                ranks=self.ranks,
            )
        return packs if self.ranks == 1 else deal(packs, self.costs, self.ranks)


class _Steps(Sequence[list[Pack]]):
    """The steps of `plan_packs`, packed on demand."""

    def __init__(self, form: _Form, examples_per_step: int, epochs: int, seed: int) -> None:
        self.form = form
        self.lengths = form.lengths
        self.examples_per_step = examples_per_step
        self.steps_per_epoch = -(-len(self.lengths) // examples_per_step)
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
        return self.form.packs(examples)

    def fullest(self) -> int:
        """Return the first step with the fullest pack."""
        if self.form.is_first_fit:
            return self._fullest_first_fit()
        best, most = 0, 0
        for step, packs in enumerate(self):
            largest = max(int(self.lengths[list(pack)].sum()) for pack in packs)
            if largest > most:
                best, most = step, largest
        return best

    def _fullest_first_fit(self) -> int:
        """Return the same for first-fit packs; many steps are measured at once."""
        max_tokens = self.form.max_tokens
        width = min(self.examples_per_step, len(self.lengths))
        at_once = max(1, _EXAMPLES_AT_ONCE // width)
        best, most = 0, 0
        for epoch in range(self.epochs):
            lengths = np.zeros(self.steps_per_epoch * width, np.int64)
            lengths[: len(self.lengths)] = self.lengths[self._order_of(epoch)]
            steps = lengths.reshape(self.steps_per_epoch, width)
            for first in range(0, len(steps), at_once):
                fills = _largest_fills(steps[first : first + at_once], max_tokens)
                place = int(fills.argmax())
                if fills[place] > most:
                    best, most = epoch * self.steps_per_epoch + first + place, fills[place]
                if most == max_tokens:
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
