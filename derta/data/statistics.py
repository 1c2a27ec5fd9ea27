"""Statistics of a data set: lengths, tokens and targets of a run, repeated requests.

Records stream through. Memory does not grow with their number, except for the index of requests
(`RequestIndex` says by how much) and 0.1 KB for every example.
"""

from __future__ import annotations

import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from derta.data.packs.packing import Collator, count_tokens
from derta.data.packs.shares import LossWeights
from derta.data.records.defaults import LISTED, NEAR, SpecialTokensInText, TooLong
from derta.data.records.duplicates import (
    Fingerprint,
    RequestIndex,
    all_texts,
    digest,
    user_turns,
)
from derta.data.records.types import Dialogue, Message, Record, Rendered, Request, Triple
from derta.data.tokens.chat import BATCH, batched
from derta.data.tokens.encoding import Encoded, EncodedDialogue, EncodedTriple, Encoder
from derta.data.tokens.refusal import choose_refusal_set
from derta.data.tokens.special import COMMON, SpecialTokenCount
from derta.objectives.base import Drawn, LossNorm

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Lengths:
    """The exact distribution of a length; memory holds each distinct length."""

    def __init__(self) -> None:
        self._counts: Counter[int] = Counter()

    def add(self, length: int) -> None:
        self._counts[length] += 1

    def summary(self) -> dict[str, int]:
        """Return the number of rows, and the lengths that 5%, 50%, 95% and all do not exceed."""
        ordered = sorted(self._counts)
        reached = np.cumsum([self._counts[length] for length in ordered])
        rows = int(reached[-1])
        summary = {"rows": rows}
        for name, percent in (("p5", 5), ("p50", 50), ("p95", 95), ("max", 100)):
            place = np.searchsorted(100 * reached, percent * rows)
            summary[name] = ordered[place]
        return summary


def character_lengths(record: Record) -> Iterator[tuple[str, int]]:
    """Yield the parts of an example and their characters, without those of a chat template."""
    if isinstance(record, Rendered):
        yield "rendered", len(record.prefix) + len(record.text)
        return
    said = sum(len(turn["content"]) for turn in record.messages)
    if isinstance(record, Dialogue):
        yield "dialogue", said
    else:
        yield "prompt", said
        yield "safe", len(record.safe)
        yield "harmful", len(record.harmful)


def token_lengths(record: Record, example: Encoded) -> Iterator[tuple[str, int]]:
    """Yield the parts of an example and their tokens, with those of the chat template."""
    if isinstance(example, EncodedDialogue):
        yield "rendered" if isinstance(record, Rendered) else "dialogue", len(example.input_ids)
    elif isinstance(record, Rendered):
        yield "rendered", len(example.prompt) + len(example.harmful) + 1  # the last is a label
    else:
        yield "prompt", len(example.prompt)
        yield "safe", len(example.safe)
        yield "harmful", len(example.harmful)


class RunStatistics:
    """Records as a training run sees them: tokens, targets of each term, the refusal token.

    Args:
        tokenizer: tokenizer with a chat template.
        collator: draws for the first epoch.
        max_length, max_tokens, special_tokens_in_text, too_long: as in `DertaConfig`.

    Raises:
        ValueError: the tokenizer cannot be used, see `Encoder`.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        collator: Collator,
        *,
        max_length: int,
        max_tokens: int,
        special_tokens_in_text: SpecialTokensInText = "plain",
        too_long: TooLong = "skip",
    ) -> None:
        objective = collator.objective
        draws: Any = {
            "branches": objective.branches,
            "cuts": objective.cuts,
            "special_tokens_in_text": special_tokens_in_text,
            "too_long": too_long,
            "closes_harmful": objective.closes_harmful,
        }
        self.collator = collator
        self.whole = Encoder(tokenizer, max_length=sys.maxsize, max_tokens=sys.maxsize, **draws)
        self.fitting = Encoder(tokenizer, max_length=max_length, max_tokens=max_tokens, **draws)
        self.one_pass = self.apart = self.shortened = 0
        self.lengths: dict[str, Lengths] = defaultdict(Lengths)
        self._safe_starts: Counter[int] = Counter()
        self._first_messages: Sequence[Message] | None = None

    def drawn(self, records: Iterable[Record]) -> Iterator[Drawn]:
        """Count records as they come, and yield the examples that the run would train on."""
        for batch in batched(records, BATCH):
            for record, example in zip(batch, self.whole.encode_many(batch), strict=True):
                assert example is not None  # everything fits
                for part, tokens in token_lengths(record, example):
                    self.lengths[part].add(tokens)
                if isinstance(record, Triple) and isinstance(example, EncodedTriple):
                    self._safe_starts[int(example.safe[0])] += 1
                    self._first_messages = self._first_messages or record.messages
                if (fitted := self._fitted(record, example)) is not None:
                    drawn = self.collator.draw(fitted, epoch=0)
                    one_pass, apart = count_tokens([drawn])
                    self.one_pass += one_pass
                    self.apart += apart
                    yield drawn

    def _fitted(self, record: Record, whole: Encoded) -> Encoded | None:
        """Return the record as the run encodes it: seldom less than the whole."""
        limit = min(self.fitting.max_length, self.fitting.max_tokens)
        if isinstance(whole, EncodedDialogue):
            longest = len(whole.input_ids)
        else:
            safe = len(whole.safe) * max(1, self.collator.objective.branches)
            longest = len(whole.prompt) + len(whole.harmful) + safe
        if longest < limit:  # a closing label may count, see `Encoder`
            return whole
        fitted = self.fitting.encode(record)
        if isinstance(fitted, EncodedTriple) and isinstance(whole, EncodedTriple):
            self.shortened += len(fitted.harmful) < len(whole.harmful)
        return fitted

    def refusal(
        self,
        refusal: str | int,
        refusal_tokens: Literal["auto"] | Sequence[str | int] | None = None,
    ) -> dict[str, Any] | None:
        """Return the refusal tokens and a warning about them; None without triples.

        Raises:
            TypeError, ValueError: as `resolve_refusal_token`.
        """
        if not self._safe_starts:
            return None
        refusals = choose_refusal_set(
            self.whole, refusal, refusal_tokens, self._safe_starts, self._first_messages
        )
        tokens = [
            {"id": token.id, "text": token.text, "safe_start_share": token.safe_start_share}
            for token in refusals.tokens
        ]
        return {"tokens": tokens, "warning": refusals.warning}


class Repeats:
    """Requests of training records that are repeated in training or evaluation.

    Within training, a record counts as "example" if all of its texts came before, else as "same" if
    its request did, else as "near" if a similar request did. Against evaluation it counts as "same"
    or "near". Ids are listed, texts never.

    Args:
        evaluation: records to compare with training; read at once.
        near: least similarity of near requests, see `RequestIndex`; None finds identical ones only.
        listed: the number of repeats of each kind to list.

    Raises:
        ValueError: `near` is out of its range.
    """

    def __init__(
        self,
        evaluation: Iterable[Record | Request] = (),
        *,
        near: float | None = NEAR,
        listed: int = LISTED,
    ) -> None:
        self._near = near
        self._examples: set[bytes] = set()
        self._train = RequestIndex(near)
        self._evaluation = RequestIndex(near)
        self._held_out: dict[bytes, Fingerprint] = {}
        for record in evaluation:
            request = Fingerprint(user_turns(record))
            self._evaluation.add(_name(record), request)
            self._held_out.setdefault(request.digest, request)
        self._within = _Found(("example", "same", "near"), listed)
        self._across = _Found(("same", "near"), listed)

    def add(self, record: Record) -> None:
        """Count a training record."""
        request, name = Fingerprint(user_turns(record)), _name(record)
        self._across.find(self._evaluation, request, name)
        example = digest([type(record).__name__, *all_texts(record)])
        self._within.find(
            self._train, request, name, "example" if example in self._examples else None
        )
        self._examples.add(example)
        self._train.add(name, request)

    def summary(self) -> dict[str, Any]:
        """Return the counts, and the first repeats of each kind."""
        return {
            "near": self._near,
            "duplicates": self._within.summary(),
            "leakage": {
                **self._across.summary(),
                "evaluation": len(self._evaluation),
                "leaked": sum(map(self._train.has_match, self._held_out.values())),
            },
        }


class _Found:
    """Repeats by kind: their number, and the first of them."""

    def __init__(self, kinds: Sequence[str], listed: int) -> None:
        self._counts = dict.fromkeys(kinds, 0)
        self._listed = listed
        self._first: list[dict[str, Any]] = []

    def find(
        self, index: RequestIndex, request: Fingerprint, name: str, kind: str | None = None
    ) -> None:
        """Count a request if the index has a match; the nearest is sought only for the list.

        Args:
            kind: kind of the repeat; None: "same" or "near", as the match is.
        """
        if kind is None:
            if not index.has_match(request):
                return
            kind = "same" if index.has_same(request) else "near"
        self._counts[kind] += 1
        if self._counts[kind] <= self._listed:
            match = index.matches(request)[0]
            similarity = round(match.similarity, 4)
            found = {"kind": kind, "id": name, "of": match.id, "similarity": similarity}
            self._first.append(found)

    def summary(self) -> dict[str, Any]:
        return {**self._counts, "listed": self._first}


def _name(record: Record | Request) -> str:
    """Return the id, with its source before it unless the id holds it."""
    return record.id if record.source in record.id else f"{record.source}: {record.id}"


def _kind_of(record: Record) -> str:
    if isinstance(record, Dialogue):
        return "borderline" if record.borderline else "helpful"
    return "rendered" if isinstance(record, Rendered) else "triples"


def data_statistics(
    records: Iterable[Record],
    repeats: Repeats,
    run: RunStatistics | None = None,
    *,
    refusal: str | int | None = "auto",
    refusal_tokens: Literal["auto"] | Sequence[str | int] | None = None,
    loss_norm: LossNorm = "tokens",
) -> dict[str, Any]:
    """Compute statistics of training records, and of a run on them.

    Args:
        records: training records, read once.
        repeats: counts repeated requests; holds the evaluation records.
        run: counts tokens and targets; None counts characters and leaves the run out.
        refusal, refusal_tokens, loss_norm: as in `DertaConfig`; refusal None: a token of which safe
            responses tell nothing, as a red flag.

    Returns:
        Plain values without any text of a record: "rows" by source and kind, "unit" and "lengths"
        by part; "special_tokens" in texts, but for rendered rows, by token (without a run those of
        `COMMON`), and the records with them; with a run "tokens", "loss" by source and term, and
        "refusal"; "near", "duplicates" and "leakage", see `Repeats`.

    Raises:
        ValueError: as `RunStatistics`; the refusal token cannot be resolved.
    """
    rows: dict[str, Counter[str]] = defaultdict(Counter)
    special = SpecialTokenCount(COMMON if run is None else run.whole.special.pattern)

    def counted() -> Iterator[Record]:
        for record in records:
            rows[record.source][_kind_of(record)] += 1
            if not isinstance(record, Rendered):
                special.add(record)
            repeats.add(record)
            yield record

    of_run: dict[str, Any] = {}
    if run is None:
        lengths: dict[str, Lengths] = defaultdict(Lengths)
        for record in counted():
            for part, characters in character_lengths(record):
                lengths[part].add(characters)
    else:
        weights = LossWeights(run.collator.objective)
        for drawn in run.drawn(counted()):
            weights.add(drawn)
        lengths = run.lengths
        refusals = None if refusal is None else run.refusal(refusal, refusal_tokens)
        spared = [] if refusals is None else [one["id"] for one in refusals["tokens"]]
        of_run = {
            "tokens": {
                "one_pass": run.one_pass,
                "apart": run.apart,
                "shortened": run.shortened,
                "truncated": run.fitting.truncated,
                "context_only": run.whole.context_only,
                "skipped": run.fitting.skipped,
            },
            "loss": weights.shares(loss_norm, spared),
            "refusal": refusals,
        }
    return {
        "rows": {source: dict(kinds) for source, kinds in rows.items()},
        "unit": "characters" if run is None else "tokens",
        "lengths": {part: found.summary() for part, found in lengths.items()},
        "special_tokens": {"records": special.records, "tokens": dict(special.tokens)},
        **of_run,
        **repeats.summary(),
    }
