"""Packs as causal sequences, for kernels that support nothing else.

The values of `visible_until` cut each example into segments. No key's visibility ends inside a
segment, so all its queries see the same earlier keys (its prefix) and the segment's own keys up to
themselves. That is causal attention over the prefix followed by the segment. A trunk or a dialogue
has no prefix and is a sequence in place; a branch's prefix has to be gathered.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from derta_kernels.attention.layout import Layout


class Sequences(NamedTuple):
    """Sequences laid end to end, as varlen kernels take them.

    Attributes:
        query_edges, key_edges: (sequences + 1,) int32, the start of each sequence among the queries
            and among the keys, and the end of the last one.
        most_queries, most_keys: the largest number of queries and of keys of a sequence.
    """

    query_edges: Tensor
    key_edges: Tensor
    most_queries: int
    most_keys: int


class Gathered(NamedTuple):
    """The segments that have a prefix.

    Attributes:
        queries: (nq,) int64, the tokens of these segments.
        keys: (nk,) int64, each segment's prefix and then its tokens.
        sequences: the sequences that `queries` and `keys` form.
    """

    queries: Tensor
    keys: Tensor
    sequences: Sequences


class Segments(NamedTuple):
    """A batch cut into segments.

    Attributes:
        alone: all segments in place, without their prefixes.
        gathered: the segments with a prefix; None: there are none.
        least_window: the least window that means the same in indices as in positions, as it cuts
            no sequence whose positions are not consecutive; 0 if all positions are consecutive, or
            there are none.
    """

    alone: Sequences
    gathered: Gathered | None
    least_window: int


def segments(layout: Layout) -> Segments:
    """Return the segments of a batch, on the layout's device.

    Synchronisation: values are read from a device once per batch.
    Memory: 8 bytes for each token of a segment that has a prefix, and for each key it sees.
    """
    return layout.kept("segments", lambda: _build(layout))


def _build(layout: Layout) -> Segments:
    device = layout.visible_until.device
    until = layout.visible_until.cpu().long()
    ends = torch.tensor([0, *(example.end for example in layout.examples)])
    edges = torch.cat((ends, until)).unique()
    example_starts = ends[torch.searchsorted(ends, edges[:-1], right=True) - 1]

    own: list[Tensor] = []
    whole: list[Tensor] = []
    with_prefix = []
    for first, start, end in zip(
        example_starts.tolist(), edges[:-1].tolist(), edges[1:].tolist(), strict=True
    ):
        prefix = first + (until[first:start] > start).nonzero().flatten()
        if len(prefix):
            with_prefix.append(len(own))
        own.append(torch.arange(start, end))
        whole.append(torch.cat((prefix, own[-1])))

    gathered = None
    if with_prefix:
        queries, keys = ([x[i] for i in with_prefix] for x in (own, whole))
        gathered = Gathered(
            torch.cat(queries).to(device),
            torch.cat(keys).to(device),
            _sequences(queries, keys, device),
        )
    positions = layout.position_ids
    least_window = 0 if positions is None else _least_window(positions.cpu(), whole)
    return Segments(_sequences(own, own, device), gathered, least_window)


def _sequences(queries: list[Tensor], keys: list[Tensor], device: torch.device) -> Sequences:
    """Describe the sequences that these queries and keys, laid end to end, form."""
    query_lengths, key_lengths = ([len(tokens) for tokens in x] for x in (queries, keys))
    query_edges, key_edges = (
        torch.tensor([0, *lengths]).cumsum(0).to(torch.int32).to(device)
        for lengths in (query_lengths, key_lengths)
    )
    return Sequences(query_edges, key_edges, max(query_lengths), max(key_lengths))


def _least_window(position_ids: Tensor, sequences: list[Tensor]) -> int:
    """Return `Segments.least_window`, in time linear in the tokens of the sequences."""
    lengths = torch.tensor([len(sequence) for sequence in sequences])
    number = torch.arange(len(sequences)).repeat_interleave(lengths)
    positions = position_ids[torch.cat(sequences)]
    uneven = (positions.diff() != 1) & (number.diff() == 0)
    least = 0
    for sequence in number[1:][uneven].unique().tolist():
        own = position_ids[sequences[sequence]]
        least = max(least, len(own), int(own.max() - own.min()) + 1)
    return least
