"""Packs: triples and dialogues laid end to end in one row, each seeing only what it should.

A triple is laid out as `trunk | branch | branch ...`, branches in descending order of cut. Query i
sees key j if j <= i < visible_until[j]. A prompt token is visible to the end of the example; the
harmful token t to the end of the last branch that is cut after it, or of the trunk; a token of a
branch to the end of that branch. The objective says which rows have targets.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from derta.data.packs.references import References
from derta.data.tokens.encoding import Encoded, EncodedDialogue, EncodedTriple
from derta.objectives.base import Drawn, Objective, Place, Total
from derta.objectives.cuts import example_rng, padded_length
from derta.objectives.defaults import CutPolicy, RtoDepth, RtoKeep
from derta.objectives.derta import DertaObjective

Bounds = tuple[tuple[int, int], ...]


@dataclass(frozen=True, eq=False)
class PackedBatch:
    """A pack of N tokens: tensors for the device, and what the host knows about them.

    Attributes:
        input_ids: (1, N) int64.
        position_ids: (1, N) int64, within each logical sequence: a branch continues the positions
            of its trunk at the cut.
        visible_until: (1, N) int32, see this module.
        columns: the objective's columns, (1, N) each, see `Objective.columns`; DeRTa's are
            shift_labels (int64, the token that the row predicts, or -100), rto_mask (bool, rows
            that predict the refusal token) and rto_weight (float32, weight of an RTO target by its
            depth, beside loss_weight).
        example_index: (1, N) int32, index into `example_ids`.
        depth: (1, N) int32, tokens of the harmful response that this row of the trunk has read,
            0..|h|; -1 on every other row.
        depth_tenth: (1, N) int64, floor(10 * depth / (|h| + 1)); -1 where depth is.
        loss_weight: (1, N) float32, weight of the row's example.
        benign: (1, N) bool, rows with a target in answers to harmless requests.
        live_rows: (n,) int64, the rows that meet the vocabulary, ascending, see `Objective.live`.
        row_lists: further rows by name, (n,) int64 each, ascending, see `Objective.row_lists`.
        example_ids: ids of the packed examples.
        example_roles: role of each example, "safety", "helpful" or "borderline", see
            `EncodedDialogue`.
        example_bounds: start and end of each example.
        branch_bounds: start and end of each branch of each example.
        totals: targets of each term, by the term's name.
    """

    input_ids: Tensor
    position_ids: Tensor
    visible_until: Tensor
    columns: dict[str, Tensor]
    example_index: Tensor
    depth: Tensor
    depth_tenth: Tensor
    loss_weight: Tensor
    benign: Tensor
    live_rows: Tensor
    row_lists: dict[str, Tensor]
    example_ids: tuple[str, ...]
    example_roles: tuple[str, ...]
    example_bounds: Bounds
    branch_bounds: tuple[Bounds, ...]
    totals: dict[str, Total]

    def to(self, device: torch.device | str, non_blocking: bool = False) -> PackedBatch:
        """Return the pack with its tensors on `device`."""
        return self._each(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> PackedBatch:
        """Return the pack in pinned memory, from which copies do not block the host."""
        return self._each(Tensor.pin_memory)

    def _each(self, change: Callable[[Tensor], Tensor]) -> PackedBatch:
        changed: dict[str, Any] = {
            name: change(value) for name, value in vars(self).items() if isinstance(value, Tensor)
        }
        for name in ("columns", "row_lists"):
            changed[name] = {key: change(value) for key, value in getattr(self, name).items()}
        return dataclasses.replace(self, **changed)

    def model_inputs(self) -> dict[str, Any]:
        """Return keyword arguments of a patched model, see `derta.apply_derta`."""
        return {
            "input_ids": self.input_ids,
            "position_ids": self.position_ids,
            "visible_until": self.visible_until,
            "loss_weight": self.loss_weight,
            "live_rows": self.live_rows,
            "example_bounds": (self.example_bounds,),  # one batch row
            "row_lists": self.row_lists,
            **self.columns,
        }


class _Layout(NamedTuple):
    """One example on its own, as columns of a pack; bounds count from its start."""

    input_ids: np.ndarray
    position_ids: np.ndarray
    visible_until: np.ndarray
    depth: np.ndarray
    depth_tenth: np.ndarray
    branches: list[tuple[int, int]]


def _lay_triple(triple: EncodedTriple, cuts: np.ndarray, reach: int) -> _Layout:
    start, full, branch = len(triple.prompt), len(triple.harmful), len(triple.safe) - 1
    trunk = start + reach
    first_rows = trunk + branch * np.arange(len(cuts))
    length = trunk + branch * len(cuts)

    # Branches descend: the number of those cut after harmful token t.
    readers = np.searchsorted(-cuts, -np.arange(reach))
    visible_until = np.concatenate(
        [
            np.full(start, length),
            trunk + branch * readers,
            np.repeat(first_rows + branch, branch),
        ]
    )
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
        depth=depth,
        depth_tenth=np.where(depth < 0, -1, 10 * depth // (full + 1)),
        branches=[(int(row), int(row) + branch) for row in first_rows],
    )


def _lay_dialogue(dialogue: EncodedDialogue) -> _Layout:
    length = _dialogue_length(dialogue)
    return _Layout(
        input_ids=dialogue.input_ids[:length],
        position_ids=np.arange(length),
        visible_until=np.full(length, length),
        depth=np.full(length, -1),
        depth_tenth=np.full(length, -1),
        branches=[],
    )


def _dialogue_length(dialogue: EncodedDialogue) -> int:
    """Return the number of rows up to the one that predicts the last target."""
    return int(np.flatnonzero(dialogue.is_target)[-1])


def placed(drawn: Drawn) -> Place:
    """Return where the parts of a drawn example lie when it is laid out on its own."""
    example = drawn.example
    if isinstance(example, EncodedDialogue):
        return Place(_dialogue_length(example))
    trunk, branch = len(example.prompt) + drawn.reach, len(example.safe) - 1
    first_rows = [trunk + branch * index for index in range(len(drawn.cuts))]
    return Place(trunk + branch * len(drawn.cuts), len(example.prompt) - 1, first_rows)


def _lay(drawn: Drawn) -> _Layout:
    if isinstance(drawn.example, EncodedTriple):
        return _lay_triple(drawn.example, drawn.cuts, drawn.reach)
    return _lay_dialogue(drawn.example)


_EMPTY = _Layout(
    input_ids=np.zeros(1),
    position_ids=np.zeros(1),
    visible_until=np.ones(1),
    depth=np.full(1, -1),
    depth_tenth=np.full(1, -1),
    branches=[],
)


def pack(examples: Sequence[Drawn], objective: Objective | None = None) -> PackedBatch:
    """Lay examples end to end.

    Only what a target needs is laid out: the last token of a safe response or a dialogue is a label
    and never an input, and a trunk ends at its last target. The row where a branch leaves carries
    the branch's first token as its label, and the refusal token too if it is an RTO row.

    Args:
        examples: none makes the empty pack, one token without a target, for ranks that have run
            out of examples.
        objective: says which rows have targets; None: DeRTa's with its defaults.

    Returns:
        The pack, its tensors on the CPU.
    """
    objective = objective or DertaObjective()
    layouts = [_lay(drawn) for drawn in examples] or [_EMPTY]
    laid = [objective.lay(drawn, placed(drawn)) for drawn in examples] or [
        {name: np.full(1, fill) for name, fill in objective.columns.items()}
    ]
    lengths = np.array([len(layout.input_ids) for layout in layouts])
    ends = np.cumsum(lengths)
    starts = ends - lengths
    visible_until = [
        layout.visible_until + start for layout, start in zip(layouts, starts, strict=True)
    ]

    def row(parts: Sequence[np.ndarray], dtype: torch.dtype) -> Tensor:
        return torch.from_numpy(np.concatenate(parts)).to(dtype)[None]

    def each(values: Sequence[Any] | np.ndarray, dtype: torch.dtype) -> Tensor:
        """Return one value for every row of an example."""
        return row([np.repeat(values, lengths)], dtype)

    roles = tuple(drawn.example.role for drawn in examples)
    columns = {
        name: row([one[name] for one in laid], _DTYPES[type(fill)])
        for name, fill in objective.columns.items()
    }
    targets = objective.targets(columns)
    live = objective.live(columns)
    weight = each([drawn.example.weight for drawn in examples] or [1.0], torch.float32)
    return PackedBatch(
        input_ids=row([layout.input_ids for layout in layouts], torch.int64),
        position_ids=row([layout.position_ids for layout in layouts], torch.int64),
        visible_until=row(visible_until, torch.int32),
        columns=columns,
        example_index=each(np.arange(len(layouts)), torch.int32),
        depth=row([layout.depth for layout in layouts], torch.int32),
        depth_tenth=row([layout.depth_tenth for layout in layouts], torch.int64),
        loss_weight=weight,
        benign=each([role != "safety" for role in roles] or [False], torch.bool) & live,
        live_rows=_indices(live),
        row_lists={name: _indices(mask) for name, mask in objective.row_lists(columns).items()},
        example_ids=tuple(drawn.example.id for drawn in examples),
        example_roles=roles,
        example_bounds=tuple(zip(starts.tolist(), ends.tolist(), strict=True)),
        branch_bounds=tuple(
            tuple((start + first, start + last) for first, last in layout.branches)
            for layout, start in zip(layouts, starts.tolist(), strict=True)
        ),
        totals={
            name: Total(int(rows.sum()), float(weight[rows].double().sum()))
            for name, rows in targets.items()
        },
    )


def _indices(mask: Tensor) -> Tensor:
    """Return the rows of a mask, (n,) int64."""
    return mask[0].nonzero().squeeze(1)


_DTYPES = {
    int: torch.int64,
    bool: torch.bool,
    float: torch.float32,
    np.float64: torch.float64,
}


class TokenCount(NamedTuple):
    """Tokens that a model runs over in an epoch, without padding.

    Attributes:
        one_pass: tokens of the packs.
        apart: tokens of separate passes for the same targets, as the official recipe runs them: q +
            h for every triple with targets in h, q + h[:k] + r for each of its branches, and
            dialogues as they are.
    """

    one_pass: int
    apart: int

    def __str__(self) -> str:
        return (
            f"one pass: {self.one_pass:,} tokens an epoch, {self.apart / self.one_pass:.2f} x "
            f"fewer than the {self.apart:,} of one pass for every harmful response and every safe "
            "one (padding not counted)"
        )


def count_tokens(examples: Iterable[Drawn]) -> TokenCount:
    """Count the tokens of these examples in one pass, and apart."""
    one_pass = apart = 0
    for drawn in examples:
        example, cuts = drawn.example, drawn.cuts
        if isinstance(example, EncodedDialogue):
            length = _dialogue_length(example)
            one_pass += length
            apart += length
            continue
        start, safe = len(example.prompt), len(example.safe)
        one_pass += start + drawn.reach + (safe - 1) * len(cuts)
        apart += (start + safe) * len(cuts) + int(cuts.sum())
        if drawn.depths.any():
            apart += start + len(example.harmful)
    return TokenCount(one_pass, apart)


def packed_length(example: Encoded, objective: Objective) -> int:
    """Return the most tokens that an example takes in a pack, whatever is drawn for it.

    Raises:
        ValueError: as `Objective.extent`.
    """
    if isinstance(example, EncodedDialogue):
        return _dialogue_length(example)
    most = objective.extent(example)
    trunk = len(example.prompt) + max(most.cut, most.depth)
    return trunk + most.branches * (len(example.safe) - 1)


def sequence_length(example: Encoded, objective: Objective) -> int:
    """Return the tokens of an example's longest logical sequence, whatever is drawn for it.

    That is its trunk, or the furthest branch with the trunk before it.

    Raises:
        ValueError: as `Objective.extent`.
    """
    if isinstance(example, EncodedDialogue):
        return _dialogue_length(example)
    most = objective.extent(example)
    branch = most.cut + len(example.safe) - 1 if most.branches else 0
    return len(example.prompt) + max(most.depth, branch)


class Collator:
    """Draws for examples what an objective trains of them, and packs them.

    Args:
        objective: draws, and says which rows have targets.
        seed: draws depend on it, the epoch and the example's id only; with rto_keep "official",
            also on the longest example of the pack.

    Attributes:
        references: the source of `Drawn.references`; None until it is known.
    """

    references: References | None = None

    def __init__(self, objective: Objective, *, seed: int = 0) -> None:
        self.objective = objective
        self.seed = seed

    def __call__(self, examples: Sequence[Encoded], epoch: int = 0) -> PackedBatch:
        """Pack `examples` with the draws of `epoch`."""
        padded = padded_length(examples)
        drawn = [self._draw(example, padded, epoch) for example in examples]
        return pack(drawn, self.objective)

    def draw(self, example: Encoded, epoch: int) -> Drawn:
        """Return what `epoch` draws for one example that is alone in its pack.

        In any pack it is the same, unless rto_keep is "official".
        """
        return self._draw(example, padded_length([example]), epoch)

    def _draw(self, example: Encoded, padded: int, epoch: int) -> Drawn:
        drawn = self.objective.draw(example, padded, example_rng(self.seed, epoch, example.id))
        if self.references is not None:
            drawn = dataclasses.replace(drawn, references=self.references.of(drawn))
        return drawn


class DertaCollator(Collator):
    """`Collator` of `DertaObjective`.

    Args:
        seed: see `Collator`.
        branches, cuts, rto_keep, rto_depth: see `DertaObjective`.

    Raises:
        ValueError: as `DertaObjective`.
    """

    def __init__(
        self,
        *,
        branches: int = DertaObjective.branches,
        cuts: CutPolicy = DertaObjective.cuts,
        rto_keep: RtoKeep = DertaObjective.rto_keep,
        rto_depth: RtoDepth = DertaObjective.rto_depth,
        seed: int = 0,
    ) -> None:
        objective = DertaObjective(
            branches=branches, cuts=cuts, rto_keep=rto_keep, rto_depth=rto_depth
        )
        super().__init__(objective, seed=seed)
