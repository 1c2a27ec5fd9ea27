"""A run's examples and steps: encoded once, kept on disk, packed when their turn comes."""

from __future__ import annotations

import functools
import itertools
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from torch.utils.data import Dataset

from derta.data.packs.packing import (
    Collator,
    PackedBatch,
    TokenCount,
    count_tokens,
    packed_length,
    sequence_length,
)
from derta.data.packs.planning import Pack, Plan
from derta.data.packs.shares import LossShares, loss_shares
from derta.data.records.types import Message, Record, Triple
from derta.data.tokens.chat import batched
from derta.data.tokens.encoding import Encoded, EncodedTriple, Encoder
from derta.data.tokens.store import ROWS_AT_ONCE, ExampleStore
from derta.objectives.base import Drawn, LossNorm, Objective

# Figures of an epoch are estimated before it begins, from this many evenly spread examples.
SURVEYED_EXAMPLES = 20_000
SURVEYED_STEPS = 1_000


@dataclass(frozen=True)
class EncodedRecords:
    """Records as token ids, and counts taken while they were encoded.

    Attributes:
        examples: the examples that fit.
        lengths: (examples,) int64, the most tokens that each takes in a pack.
        skipped: the number of records that did not fit.
        truncated: the number of dialogues and rendered next-token rows that lost their end.
        context_only: the number of earlier answers without targets, see `Encoder`.
        roles: the number of examples by role, without rendered rows with next-token targets: those
            may be refusals, and their refusal curves say nothing.
        safe_starts: the number of safe responses that start with each token.
        first_messages: the messages of the first triple; None without triples.
    """

    examples: ExampleStore
    lengths: np.ndarray
    skipped: int
    truncated: int
    context_only: int
    roles: Counter[str]
    safe_starts: Counter[int]
    first_messages: Sequence[Message] | None


def encode_records(
    records: Iterable[Record], encoder: Encoder, objective: Objective, context: int
) -> EncodedRecords:
    """Encode records as they come; memory grows by about 30 bytes for each.

    Args:
        records: the records to encode.
        encoder: encodes them.
        objective: draws from what is encoded.
        context: tokens of the longest sequence that the model reads.

    Raises:
        ValueError: two examples have one id, one exceeds the context, one would train nothing, or
            the chat template does not take a record.
    """
    lengths = array("q")
    roles: Counter[str] = Counter()
    safe_starts: Counter[int] = Counter()
    first_messages: list[Sequence[Message]] = []

    def passing() -> Iterator[Record]:
        for record in records:
            if not first_messages and isinstance(record, Triple):
                first_messages.append(record.messages)
            yield record

    def fitting() -> Iterator[tuple[int, Encoded]]:
        for place, example in enumerate(encoder.encode_many(passing())):
            if example is None:
                continue
            length = sequence_length(example, objective)
            if length > context:
                raise ValueError(
                    f"{example.id}: its {length} tokens exceed the model's context of "
                    f"{context}: --max_length {context} cuts or skips what is longer"
                )
            if isinstance(example, EncodedTriple):
                if len(example.safe):
                    safe_starts[int(example.safe[0])] += 1
                elif objective.extent(example).depth < 0:
                    raise ValueError(
                        f"{example.id}: rto_keep is 0, and a rendered row of RTO has no other "
                        "targets: leave its source out, or keep some"
                    )
            if isinstance(example, EncodedTriple) or example.role != "safety":
                roles[example.role] += 1
            lengths.append(packed_length(example, objective))
            yield place, example

    skipped, truncated = encoder.skipped, encoder.truncated
    context_only = encoder.context_only
    examples = ExampleStore(fitting())
    return EncodedRecords(
        examples=examples,
        lengths=np.array(lengths, np.int64),
        skipped=encoder.skipped - skipped,
        truncated=encoder.truncated - truncated,
        context_only=encoder.context_only - context_only,
        roles=roles,
        safe_starts=safe_starts,
        first_messages=first_messages[0] if first_messages else None,
    )


class PackedSteps(Dataset):
    """Item `s` is the list of packs that one rank runs in optimizer step `s`.

    Args:
        examples: the run's examples.
        plan: the plan of its steps.
        collator: draws for examples and packs them.
        rank: the process that runs the items.
    """

    def __init__(
        self, examples: ExampleStore, plan: Plan, collator: Collator, rank: int = 0
    ) -> None:
        self.examples = examples
        self.plan = plan
        self.collator = collator
        self.rank = rank

    def __len__(self) -> int:
        return len(self.plan.steps)

    def __getitem__(self, step: int) -> list[PackedBatch]:
        return [self._collated(step, pack) for pack in self.plan.rank_packs(step, self.rank)]

    def _collated(self, step: int, pack: Pack) -> PackedBatch:
        return self.collator(self.examples.take(pack), step // self.plan.steps_per_epoch)

    def largest(self) -> PackedBatch:
        """Return the pack with the most tokens that any rank runs in any step."""
        return self._collated(*self.plan.largest())

    @functools.cached_property
    def packs(self) -> int:
        """The number of filled packs of all steps and ranks, estimated from `SURVEYED_STEPS`."""
        surveyed = _evenly(len(self), SURVEYED_STEPS)
        counted = sum(map(bool, itertools.chain(*(self.plan.steps[step] for step in surveyed))))
        return round(counted * len(self) / len(surveyed))

    @functools.cached_property
    def tokens(self) -> TokenCount:
        """Tokens of the first epoch over all ranks, estimated from at most `SURVEYED_EXAMPLES`."""
        surveyed = _evenly(len(self.examples), SURVEYED_EXAMPLES)
        share = len(self.examples) / len(surveyed)
        counted = count_tokens(self._first_draws(surveyed))
        return TokenCount(*(round(count * share) for count in counted))

    def shares(self, loss_norm: LossNorm) -> LossShares:
        """Return `loss_shares` of the first epoch, estimated from at most `SURVEYED_EXAMPLES`."""
        surveyed = _evenly(len(self.examples), SURVEYED_EXAMPLES)
        return loss_shares(self._first_draws(surveyed), self.collator.objective, loss_norm)

    def _first_draws(self, indices: Sequence[int]) -> Iterator[Drawn]:
        for batch in batched(indices, ROWS_AT_ONCE):
            for example in self.examples.take(batch):
                yield self.collator.draw(example, epoch=0)


def _evenly(count: int, most: int) -> range:
    """Return at most `most` of the first `count` numbers, evenly spread."""
    return range(0, count, max(1, -(-count // most)))
