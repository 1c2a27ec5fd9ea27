"""A vocabulary over the ranks of a group: their agreement, messages and merged summaries.

Each rank holds consecutive rows of the head and multiplies them alone, with the same hidden states
and targets as the others. Between the walks of a chunk the ranks gather their summaries
(`row_pass`), and after it they add up their parts of d_hidden. The gradients of weight and bias
stay where they are. kernels/README.md has the mathematics and the bytes.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from hashlib import blake2b
from typing import Any, NamedTuple, cast

import torch
import torch.distributed as dist
from torch import Tensor

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class Shards(NamedTuple):
    """A rank's knowledge of the whole vocabulary.

    Attributes:
        group: the process group that shares the vocabulary, in the order of its ranks.
        start: the vocabulary's number of this rank's first row.
        vocabulary: V, the rows of all ranks.
        chunk_rows: rows of a chunk, the same on every rank.
    """

    group: dist.ProcessGroup
    start: int
    vocabulary: int
    chunk_rows: int

    def own(self, tokens: Tensor, rows: int) -> Tensor:
        """Return tokens (...) as rows of this rank's shard of `rows` rows, -1 for the others'."""
        local = tokens - self.start
        return local.masked_fill((local < 0) | (local >= rows), -1)

    def merge(self, summary: Tensor) -> Callable[[], Tensor]:
        """Start to gather the ranks' summaries; return the function that waits and merges them."""
        summaries = summary.new_empty(self.group.size(), *summary.shape)
        work = dist.all_gather(list(summaries), summary, group=self.group, async_op=True)

        def merged_summary() -> Tensor:
            work.wait()
            return merged(summaries)

        return merged_summary

    def add(self, part: Tensor) -> Callable[[], Tensor]:
        """Start to add up the ranks' parts in place; return the function that waits for the sum."""
        work = dist.all_reduce(part, group=self.group, async_op=True)

        def total() -> Tensor:
            work.wait()
            return part

        return total


def merged(summaries: Tensor) -> Tensor:
    """Return the summary (C, 3 + K) of whole rows, given those of R shards, (R, C, 3 + K).

    As within a row: where the maximum of all is higher than a shard's, the shard's ones shrink too
    and join its rest.
    """
    highest, ones, rest, token_logits = summaries.split((1, 1, 1, summaries.shape[2] - 3), 2)
    top = highest.amax(0)
    factor = (highest - top).exp()
    is_top = factor == 1
    rest = rest.where(is_top, (ones + rest) * factor)
    ones = ones.where(is_top, 0)
    return torch.cat((top, ones.sum(0), rest.sum(0), token_logits.amax(0)), 1)


def sent_bytes(
    rows: int,
    width: int,
    columns: int,
    ranks: int,
    dtype: torch.dtype,
    hidden_gradient: bool,
    refusal_tokens: int = 0,
) -> float:
    """Return the bytes that a rank sends for `rows` live rows, by collectives that go in a ring.

    With w bytes of the dtype computed in, a summary has 3 + K + S numbers and d_hidden has d:

        (R - 1) n (3 + K + S) w  +  2 (R - 1) / R n d w

    The exchange of a call's facts, 8 bytes for each of `FACTS` and rank, is left out. A gathered
    head costs (R - 1) / R V d b bytes a gathering, and as many for d_weight where it is trained.

    Args:
        rows, width: n live rows, and d.
        columns: K, 2, or 3 with an unlikely target.
        ranks: R.
        dtype: dtype of hidden.
        hidden_gradient: if True, hidden requires a gradient.
        refusal_tokens: S, the refusal tokens if they are several, else 0.
    """
    size = torch.promote_types(dtype, torch.float32).itemsize
    summaries = (ranks - 1) * rows * (3 + columns + refusal_tokens) * size
    return summaries + hidden_gradient * 2 * (ranks - 1) / ranks * rows * width * size


# What the ranks of a group exchange. All but the first two must be the same on every rank.
FACTS = (
    "rows of weight",
    "rows of a chunk",
    "width d",
    "dtype of hidden",
    "number of rows N",
    "number of tokens of a row",
    "gradient of hidden",
    "softcap",
    "logit_scale",
    "refusal tokens",
    "targets and weights",
)


def agree(
    group_name: str,
    hidden: Tensor,
    weight: Tensor,
    tokens: Tensor,
    has_target: Tensor,
    token_weight: Tensor,
    softcap: float | None,
    logit_scale: float,
    form_hidden: bool,
    chunk_rows: int,
    refusal_tokens: Sequence[int],
) -> Shards:
    """Exchange what the ranks have to know of one another, in one small collective.

    Synchronisation: one transfer to the host.

    Args:
        group_name: name of the process group, which stands for it in a compiled graph.
        chunk_rows: rows of a chunk that this rank has memory for; the smallest is taken.
        hidden, weight, ...: the arguments of `loss_and_gradients`.

    Raises:
        ValueError: on every rank, if they differ in what has to be the same, or if no rank has a
            row of weight.
    """
    from torch.distributed.distributed_c10d import _resolve_process_group

    group: dist.ProcessGroup = _resolve_process_group(cast(Any, group_name))  # a str at run time
    known = [
        len(weight),
        chunk_rows,
        hidden.shape[1],
        FLOATS.index(hidden.dtype),
        *tokens.shape,
        int(form_hidden),
        _bits(softcap or 0.0),
        _bits(logit_scale),
        _digest(refusal_tokens),
    ]
    fingerprint = _fingerprint(tokens, has_target, token_weight)
    mine = torch.cat((torch.tensor(known, device=tokens.device), fingerprint[None]))
    all_ranks = mine.new_empty(group.size(), len(mine))
    dist.all_gather(list(all_ranks), mine, group=group)
    found = all_ranks.tolist()
    for name, values in zip(FACTS[2:], list(zip(*found, strict=True))[2:], strict=True):
        other = next((rank for rank, value in enumerate(values) if value != values[0]), None)
        if other is not None:
            raise ValueError(
                f"ranks that share a head must have the same {name}, got "
                f"{_shown(name, values[0])} on rank 0 and {_shown(name, values[other])} on rank "
                f"{other} of the group"
            )
    sizes = [facts[0] for facts in found]
    if sum(sizes) == 0:
        raise ValueError("weight must have at least one row on some rank of the group, got none")
    return Shards(
        group=group,
        start=sum(sizes[: group.rank()]),
        vocabulary=sum(sizes),
        chunk_rows=min(facts[1] for facts in found),
    )


def _bits(value: float) -> int:
    return struct.unpack("<q", struct.pack("<d", value))[0]


def _digest(ids: Sequence[int]) -> int:
    """Return an int64 that other ids would hardly have."""
    digest = blake2b(struct.pack(f"<{len(ids)}q", *ids), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def _shown(name: str, value: int) -> str:
    """Return an exchanged value as an error message shows it."""
    if name == "dtype of hidden":
        return str(FLOATS[value])
    if name in ("softcap", "logit_scale"):
        return f"{struct.unpack('<d', struct.pack('<q', value))[0]:g}"
    if name in ("refusal tokens", "targets and weights"):
        return f"those with the fingerprint {value & 0xFFFFFFFF:08x}"
    return str(value)


def _fingerprint(tokens: Tensor, has_target: Tensor, token_weight: Tensor) -> Tensor:
    """Return a number () int64 that other targets or weights would hardly have."""
    bits = token_weight.double().contiguous().view(torch.int64)
    place = torch.arange(tokens.numel(), device=tokens.device).view(tokens.shape)
    # Products with odd numbers modulo 2^64; shifts bring high bits down, where sums keep them.
    mixed = (2 * tokens + has_target) * 0x9E3779B97F4A7C1 + (bits ^ (bits >> 32))
    return ((mixed ^ (mixed >> 29)) * (2 * place + 1)).sum()
