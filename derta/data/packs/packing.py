"""Packs: triples and dialogues laid end to end in one row, each seeing only what it should.

A triple is laid out as `trunk | branch | branch ...`, branches in descending order of cut. Query i
sees key j if j <= i < visible_until[j]. A prompt token is visible to the end of the example; the
harmful token t to the end of the last branch that is cut after it, or of the trunk; a token of a
branch to the end of that branch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from derta.data.tokens.encoding import Encoded, EncodedDialogue, EncodedTriple
from derta.labels import IGNORE_INDEX
from derta.objectives.cuts import (
    cut_probabilities,
    draw_cuts,
    draw_rto_rows,
    example_rng,
    rto_depth_weights,
)

Bounds = tuple[tuple[int, int], ...]


@dataclass(frozen=True, eq=False)
class PackedBatch:
    """One pack of N tokens: what the device needs, and what the host knows about it.

    Attributes:
        input_ids: (1, N) int64.
        position_ids: (1, N) int64, within each logical sequence: a branch goes on where it leaves.
        visible_until: (1, N) int32, see this module.
        shift_labels: (1, N) int64, the token that this row predicts, or -100.
        rto_mask: (1, N) bool, whether this row predicts the refusal token.
        example_index: (1, N) int32, place in `example_ids`.
        depth: (1, N) int32, how much of the harmful response this row of the trunk has read,
            0..|h|; -1 on every other row.
        depth_tenth: (1, N) int64, floor(10 * depth / (|h| + 1)); -1 where depth is.
        loss_weight: (1, N) float32, its example's weight.
        rto_weight: (1, N) float32, what an RTO target here weighs by its depth, 1 elsewhere; a
            factor beside loss_weight.
        benign: (1, N) bool, whether this row has a target and answers what is no harmful request.
        example_ids: ids of the packed examples.
        example_roles: of each example "safety", "helpful" or "borderline", see `EncodedDialogue`.
        example_bounds: start and end of each example.
        branch_bounds: start and end of each branch of each example.
        next_count, rto_count: targets of each kind.
        next_total, rto_total: the loss_weight of all targets of each kind.
    """

    input_ids: Tensor
    position_ids: Tensor
    visible_until: Tensor
    shift_labels: Tensor
    rto_mask: Tensor
    example_index: Tensor
    depth: Tensor
    depth_tenth: Tensor
    loss_weight: Tensor
    rto_weight: Tensor
    benign: Tensor
    example_ids: tuple[str, ...]
    example_roles: tuple[str, ...]
    example_bounds: Bounds
    branch_bounds: tuple[Bounds, ...]
    next_count: int
    rto_count: int
    next_total: float
    rto_total: float

    def to(self, device: torch.device | str, non_blocking: bool = False) -> PackedBatch:
        """The same pack with its tensors on `device`."""
        return self._each(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> PackedBatch:
        """The same pack in pinned memory, from which the host need not wait for a copy."""
        return self._each(Tensor.pin_memory)

    def _each(self, change: Callable[[Tensor], Tensor]) -> PackedBatch:
        changed: dict[str, Any] = {
            name: change(value) for name, value in vars(self).items() if isinstance(value, Tensor)
        }
        return dataclasses.replace(self, **changed)

    def model_inputs(self) -> dict[str, Any]:
        """Keyword arguments of a patched model, see `derta.apply_derta`."""
        names = "input_ids position_ids visible_until shift_labels rto_mask loss_weight rto_weight"
        inputs = {name: getattr(self, name) for name in names.split()}
        return inputs | {"example_bounds": (self.example_bounds,)}  # one batch row


@dataclass(frozen=True, eq=False)
class Drawn:
    """An example and what was drawn for it.

    Attributes:
        example: the example.
        cuts: (branches,) int64, distinct, descending, each in 0..cut_limit; empty for a dialogue.
        rto_rows: (|h| + 1,) bool, the depths with an RTO target; empty for a dialogue.
        rto_depth: how RTO targets weigh by depth, see `rto_depth_weights`.

    Raises:
        ValueError: cuts or RTO rows are not such.
    """

    example: Encoded
    cuts: np.ndarray
    rto_rows: np.ndarray
    rto_depth: str = "uniform"

    def __post_init__(self) -> None:
        limit, rows = -1, 0
        if isinstance(self.example, EncodedTriple):
            limit, rows = self.example.cut_limit, len(self.example.harmful) + 1
        in_range = np.all((self.cuts >= 0) & (self.cuts <= limit))
        if not in_range or np.any(np.diff(self.cuts) >= 0):
            raise ValueError(
                f"cuts of {self.example.id} must be distinct, descending and in 0..{limit}, got "
                f"{self.cuts.tolist()}"
            )
        if self.rto_rows.shape != (rows,):
            raise ValueError(
                f"rto_rows of {self.example.id} must have shape ({rows},), got "
                f"{self.rto_rows.shape}"
            )


class _Layout(NamedTuple):
    """One example on its own, as columns of a pack; bounds count from its start."""

    input_ids: np.ndarray
    position_ids: np.ndarray
    visible_until: np.ndarray
    shift_labels: np.ndarray
    rto_mask: np.ndarray
    rto_weight: np.ndarray
    depth: np.ndarray
    depth_tenth: np.ndarray
    branches: list[tuple[int, int]]


def _lay_triple(
    triple: EncodedTriple, cuts: np.ndarray, rto_rows: np.ndarray, rto_depth: str
) -> _Layout:
    start, full, branch = len(triple.prompt), len(triple.harmful), len(triple.safe) - 1
    reach = _reach(cuts, rto_rows)
    trunk = start + reach
    first_rows = trunk + branch * np.arange(len(cuts))
    length = trunk + branch * len(cuts)

    # As branches descend, those cut after harmful token t are the first ones: this many.
    readers = np.searchsorted(-cuts, -np.arange(reach))
    visible_until = np.concatenate(
        [
            np.full(start, length),
            trunk + branch * readers,
            np.repeat(first_rows + branch, branch),
        ]
    )
    shift_labels = np.full(length, IGNORE_INDEX)
    shift_labels[start - 1 + cuts] = triple.safe[:1]
    shift_labels[trunk:] = np.tile(triple.safe[1:], len(cuts))
    rto_mask = np.zeros(length, dtype=bool)
    rto_mask[start - 1 + np.flatnonzero(rto_rows)] = True
    rto_weight = np.ones(length)
    rto_weight[start - 1 : trunk] = rto_depth_weights(full, rto_depth)[: reach + 1]
    depth = np.full(length, -1)
    depth[start - 1 : trunk] = np.arange(reach + 1)
    return _Layout(
        input_ids=np.concatenate(
            [triple.prompt, triple.harmful[:reach], np.tile(triple.safe[:-1], len(cuts))]
        ),
        position_ids=np.concatenate(
            [np.arange(trunk), (start + cuts[:, None] + np.arange(branch)).ravel()]
        ),
        visible_until=visible_until,
        shift_labels=shift_labels,
        rto_mask=rto_mask,
        rto_weight=rto_weight,
        depth=depth,
        depth_tenth=np.where(depth < 0, -1, 10 * depth // (full + 1)),
        branches=[(int(row), int(row) + branch) for row in first_rows],
    )


def _reach(cuts: np.ndarray, rto_rows: np.ndarray) -> int:
    """How much of the harmful response is laid out: up to the trunk's last target."""
    return int(max(cuts.max(initial=0), np.flatnonzero(rto_rows).max(initial=0)))


def _lay_dialogue(dialogue: EncodedDialogue) -> _Layout:
    length = _dialogue_length(dialogue)
    labels = np.where(dialogue.is_target, dialogue.input_ids, IGNORE_INDEX)[1 : length + 1]
    return _Layout(
        input_ids=dialogue.input_ids[:length],
        position_ids=np.arange(length),
        visible_until=np.full(length, length),
        shift_labels=labels,
        rto_mask=np.zeros(length, dtype=bool),
        rto_weight=np.ones(length),
        depth=np.full(length, -1),
        depth_tenth=np.full(length, -1),
        branches=[],
    )


def _dialogue_length(dialogue: EncodedDialogue) -> int:
    """Rows up to the one that predicts the last target, which itself is only a label."""
    return int(np.flatnonzero(dialogue.is_target)[-1])


_EMPTY = _Layout(
    input_ids=np.zeros(1),
    position_ids=np.zeros(1),
    visible_until=np.ones(1),
    shift_labels=np.full(1, IGNORE_INDEX),
    rto_mask=np.zeros(1),
    rto_weight=np.ones(1),
    depth=np.full(1, -1),
    depth_tenth=np.full(1, -1),
    branches=[],
)


def pack(examples: Sequence[Drawn]) -> PackedBatch:
    """Lays examples end to end.

    Only what a target needs is laid out: the last token of a safe response or a dialogue is a label
    and never an input, and a trunk ends at its last target. The row where a branch leaves carries
    the branch's first token as its label, and the refusal token too if it is an RTO row.

    Args:
        examples: none makes the empty pack: one token and no target, for ranks that have run out.

    Returns:
        the pack, its tensors on the CPU.
    """
    layouts = [
        _lay_triple(drawn.example, drawn.cuts, drawn.rto_rows, drawn.rto_depth)
        if isinstance(drawn.example, EncodedTriple)
        else _lay_dialogue(drawn.example)
        for drawn in examples
    ] or [_EMPTY]
    lengths = np.array([len(layout.input_ids) for layout in layouts])
    ends = np.cumsum(lengths)
    starts = ends - lengths
    visible_until = [
        layout.visible_until + start for layout, start in zip(layouts, starts, strict=True)
    ]

    def row(columns: Sequence[np.ndarray], dtype: torch.dtype) -> Tensor:
        return torch.from_numpy(np.concatenate(columns)).to(dtype)[None]

    def each(values: Sequence[Any] | np.ndarray, dtype: torch.dtype) -> Tensor:
        """One value for every row of an example."""
        return row([np.repeat(values, lengths)], dtype)

    roles = tuple(drawn.example.role for drawn in examples)
    labels = row([layout.shift_labels for layout in layouts], torch.int64)
    has_next = labels != IGNORE_INDEX
    rto_mask = row([layout.rto_mask for layout in layouts], torch.bool)
    weight = each([drawn.example.weight for drawn in examples] or [1.0], torch.float32)
    return PackedBatch(
        input_ids=row([layout.input_ids for layout in layouts], torch.int64),
        position_ids=row([layout.position_ids for layout in layouts], torch.int64),
        visible_until=row(visible_until, torch.int32),
        shift_labels=labels,
        rto_mask=rto_mask,
        example_index=each(np.arange(len(layouts)), torch.int32),
        depth=row([layout.depth for layout in layouts], torch.int32),
        depth_tenth=row([layout.depth_tenth for layout in layouts], torch.int64),
        loss_weight=weight,
        rto_weight=row([layout.rto_weight for layout in layouts], torch.float32),
        benign=each([role != "safety" for role in roles] or [False], torch.bool) & has_next,
        example_ids=tuple(drawn.example.id for drawn in examples),
        example_roles=roles,
        example_bounds=tuple(zip(starts.tolist(), ends.tolist(), strict=True)),
        branch_bounds=tuple(
            tuple((start + first, start + last) for first, last in layout.branches)
            for layout, start in zip(layouts, starts.tolist(), strict=True)
        ),
        next_count=int(has_next.sum()),
        rto_count=int(rto_mask.sum()),
        next_total=float(weight[has_next].double().sum()),
        rto_total=float(weight[rto_mask].double().sum()),
    )


class TokenCount(NamedTuple):
    """Tokens that a model runs over in an epoch, none of them padding.

    Attributes:
        one_pass: those of the packs.
        apart: those of the official recipe for the same targets: of every triple q + h, if it has
            an RTO target, and q + h[:k] + r for each of its branches; of dialogues the same.
    """

    one_pass: int
    apart: int

    def __str__(self) -> str:
        return (
            f"one pass: {self.one_pass:,} tokens an epoch, {self.apart / self.one_pass:.2f} x "
            f"fewer than the {self.apart:,} of the official recipe, which runs the RTO sample and "
            "every prefix sample apart (padding not counted)"
        )


def count_tokens(examples: Iterable[Drawn]) -> TokenCount:
    """Tokens of these examples in one pass, and apart."""
    one_pass = apart = 0
    for drawn in examples:
        example, cuts = drawn.example, drawn.cuts
        if isinstance(example, EncodedDialogue):
            length = _dialogue_length(example)
            one_pass += length
            apart += length
            continue
        start, safe = len(example.prompt), len(example.safe)
        one_pass += start + _reach(cuts, drawn.rto_rows) + (safe - 1) * len(cuts)
        apart += (start + safe) * len(cuts) + int(cuts.sum())
        if drawn.rto_rows.any():
            apart += start + len(example.harmful)
    return TokenCount(one_pass, apart)


def packed_length(example: Encoded, *, branches: int, cuts: str, rto_keep: float) -> int:
    """Tokens that an example takes in a pack at most, whatever is drawn for it.

    Args:
        example: the example.
        branches, cuts, rto_keep: see `DertaCollator`.

    Raises:
        ValueError: as `cut_probabilities`.
    """
    if isinstance(example, EncodedDialogue):
        return _dialogue_length(example)
    possible = np.flatnonzero(cut_probabilities(example, cuts))
    count = min(branches, len(possible))
    furthest_cut = possible[-1] if count else 0
    reach = len(example.harmful) if rto_keep > 0 else furthest_cut
    return int(len(example.prompt) + reach + count * (len(example.safe) - 1))


def sequence_length(example: Encoded, *, branches: int, cuts: str, rto_keep: float) -> int:
    """Tokens of the longest logical sequence of an example, whatever is drawn for it.

    That is its trunk, or what a branch sees: the same as one branch packed without RTO.

    Args:
        example: the example.
        branches, cuts, rto_keep: see `DertaCollator`.

    Raises:
        ValueError: as `cut_probabilities`.
    """
    return max(
        packed_length(example, branches=0, cuts=cuts, rto_keep=rto_keep),
        packed_length(example, branches=min(branches, 1), cuts=cuts, rto_keep=0.0),
    )


class DertaCollator:
    """Draws cuts and RTO rows for examples and packs them.

    Args:
        branches: safe responses per triple, each after a cut of its own; 0 for RTO alone.
        cuts: how cuts are drawn, see `derta.objectives.cuts`.
        rto_keep: share of the harmful response's positions with an RTO target, in [0, 1].
        rto_depth: how RTO targets weigh by depth, see `derta.objectives.cuts`.
        seed: with the epoch and an example's id, all that the draws depend on.

    Raises:
        ValueError: a value is out of range, or triples would have no target.
    """

    def __init__(
        self,
        *,
        branches: int = 1,
        cuts: str = "uniform",
        rto_keep: float = 1.0,
        rto_depth: str = "uniform",
        seed: int = 0,
    ) -> None:
        if branches < 0:
            raise ValueError(f"branches must be at least 0, got {branches}")
        if not 0 <= rto_keep <= 1:
            raise ValueError(f"rto_keep must lie in [0, 1], got {rto_keep}")
        if branches == 0 and rto_keep == 0:
            raise ValueError("branches and rto_keep are both 0: a triple would train nothing")
        self.branches = branches
        self.cuts = cuts
        self.rto_keep = rto_keep
        self.rto_depth = rto_depth
        self.seed = seed

    def __call__(self, examples: Sequence[Encoded], epoch: int = 0) -> PackedBatch:
        """Packs `examples` with the draws of `epoch`."""
        return pack([self.draw(example, epoch) for example in examples])

    def draw(self, example: Encoded, epoch: int) -> Drawn:
        """What `epoch` draws for one example."""
        if isinstance(example, EncodedDialogue):
            return Drawn(example, cuts=np.zeros(0, np.int64), rto_rows=np.zeros(0, bool))
        rng = example_rng(self.seed, epoch, example.id)
        return Drawn(
            example,
            cuts=draw_cuts(example, policy=self.cuts, branches=self.branches, rng=rng),
            rto_rows=draw_rto_rows(len(example.harmful), keep=self.rto_keep, rng=rng),
            rto_depth=self.rto_depth,
        )
