"""Encode records as token ids, within the lengths that a run allows."""

from __future__ import annotations

import itertools
import re
import typing
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, NamedTuple

import numpy as np

from derta.data.records.defaults import SpecialTokensInText, TooLong
from derta.data.records.sources import Role
from derta.data.records.types import Dialogue, Message, Record, Rendered, Triple, naming
from derta.data.tokens.chat import BATCH, Answer, Chat, batched
from derta.data.tokens.special import COMMON, is_token, unquoted

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_CLOSING = re.compile(rf"(?=<)(?:{COMMON.pattern})\Z")


@dataclass(frozen=True, eq=False)
class EncodedTriple:
    """A triple as token ids, or a rendered row whose targets are all the refusal token.

    Attributes:
        id: the record's id.
        prompt: (|q|,) int32, up to where the model starts to write.
        harmful: (|h|,) int32, without its closing tokens unless `closing` says so; cut at its end
            if it was too long.
        safe: (|r|,) int32, with its closing token; empty in a rendered row.
        cut_limit: the largest cut after which the safe response still fits, at most |h|; -1 in a
            rendered row, which has no branch.
        word_ends: (words - 2,) int64 or None: the number of harmful tokens up to the end of each
            word, without the last two words and ends beyond `cut_limit`. Only for cuts "official".
        source, weight: the record's.
        closing: the number of closing tokens at the end of `harmful`.
    """

    id: str
    prompt: np.ndarray
    harmful: np.ndarray
    safe: np.ndarray
    cut_limit: int
    word_ends: np.ndarray | None = None
    source: str = ""
    weight: float = 1.0
    closing: int = 0
    role: ClassVar[Role] = "safety"


@dataclass(frozen=True, eq=False)
class EncodedDialogue:
    """A dialogue as token ids, or a rendered row whose targets are its own tokens.

    Attributes:
        id: the record's id.
        input_ids: (n,) int32.
        is_target: (n,) bool, the tokens to predict: the assistant's messages with their closing
            tokens, except tokens that a later turn merges differently than the model would write.
        source, weight: the record's.
        role: "helpful", "borderline", or "safety" for a rendered row, whose request is unknown.
    """

    id: str
    input_ids: np.ndarray
    is_target: np.ndarray
    source: str = ""
    weight: float = 1.0
    role: Role = "helpful"


Encoded = EncodedTriple | EncodedDialogue


class _Turn(NamedTuple):
    answer: Answer
    prompt_ids: list[int]
    response_ids: list[int]


class Encoder(Chat):
    """An encoder of records through the model's chat template.

    A triple, or a rendered RTO row, that is too long is cut at the end of its harmful response. A
    record that still does not fit (prompt and safe response, a dialogue, another rendered row) is
    skipped and counted.

    A model sees earlier answers of a dialogue as the template writes them later on, where many drop
    thinking blocks. Of an earlier answer, the targets are the tokens that it would have written
    itself after what it sees: none if the template changes what precedes them.

    If too_long is "truncate", a dialogue or a rendered row keeps its first `max_length` tokens, of
    which the last is only a label, and is skipped if no target is among them; a harmful response is
    cut such that its closing label is counted too. The authors' code does so: an RTO row with a
    prefix of P tokens has `max_length` - P targets, where "skip" leaves it one more.

    A rendered row is tokenized as in the authors' code: with the tokenizer's beginning-of-sequence
    token, if it adds one, and without a closing token. `prefix` keeps the tokens it has by itself;
    if `text` would merge with them, it is tokenized separately. Its texts were rendered with a
    template, whose marks they hold on purpose: all special tokens in them are control tokens,
    whatever `special_tokens_in_text` says.

    Args:
        tokenizer: a tokenizer with a chat template; rendered rows need none.
        max_length: tokens of the longest logical sequence: |q| + |h|, |q| + cut + |r|, a dialogue.
        max_tokens: tokens of the longest pack; a triple with its branches must fit into it.
        branches: number of safe responses per triple.
        cuts: a policy of `derta.objectives.cuts`.
        special_tokens_in_text: as for `Chat`; "refuse" makes a control token in a text an error of
            its record.
        too_long: "skip" or "truncate", for dialogues and rendered rows.
        closes_harmful: if True, harmful responses of triples have their closing tokens, and at
            least one token, or their record does not fit.

    Attributes:
        skipped: number of records so far that did not fit.
        truncated: number of dialogues and rendered next-token rows so far that lost their end.
        context_only: number of earlier answers of dialogues so far that have no target, because the
            template writes them otherwise once the conversation goes on.

    Raises:
        ValueError: the tokenizer's chat template is not usable, too_long has another value, or cuts
            is "official" and the tokenizer has no token offsets to find words by.

    Source: the authors' code, `preprocess_function` (`truncation=True, max_length=block_size`).
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        max_length: int,
        max_tokens: int,
        branches: int,
        cuts: str,
        special_tokens_in_text: SpecialTokensInText = "plain",
        too_long: TooLong = "skip",
        closes_harmful: bool = False,
    ) -> None:
        super().__init__(tokenizer, special_tokens_in_text, needs_template=False)
        if too_long not in (choices := typing.get_args(TooLong)):
            raise ValueError(f"too_long must be one of {', '.join(choices)}, got {too_long!r}")
        self.max_length = max_length
        self.max_tokens = max_tokens
        self.branches = branches
        self.at_words = cuts == "official"
        if self.at_words and not tokenizer.is_fast:
            raise ValueError(
                "cuts='official' cuts between words and needs the token offsets of a fast "
                f"tokenizer, got {type(tokenizer).__name__}: choose cuts='uniform'"
            )
        self.bos_ids = [id for id in tokenizer("")["input_ids"] if id == tokenizer.bos_token_id]
        self.truncates = too_long == "truncate"
        self.closes_harmful = closes_harmful
        self.skipped = self.truncated = self.context_only = 0

    def encode(self, record: Record) -> Encoded | None:
        """Encode a record; return None if it does not fit.

        Raises:
            ValueError: the chat template rejects the record, a text of it has a special token that
                is refused, or a rendered row ends in one of another model; names its id.
        """
        (encoded,) = self.encode_many([record])
        return encoded

    def encode_many(self, records: Iterable[Record]) -> Iterator[Encoded | None]:
        """Encode records in batches, which is faster the more cores there are; see `encode`.

        Raises:
            ValueError: as `encode`.
        """
        for batch in batched(records, BATCH):
            answers = [self._answers(record) for record in batch]
            ids = iter(self.answer_ids(list(itertools.chain.from_iterable(answers))))
            for record, group in zip(batch, answers, strict=True):
                turns = [_Turn(answer, *next(ids)) for answer in group]
                encoded = self._encode(record, turns)
                self.skipped += encoded is None
                yield encoded

    def _encode(self, record: Record, turns: list[_Turn]) -> Encoded | None:
        if isinstance(record, Triple):
            return self._triple(record, turns)
        if isinstance(record, Dialogue):
            return self._dialogue(record, turns)
        return self._rendered(record, turns)

    def _answers(self, record: Record) -> list[Answer]:
        """Return all answers: harmful and safe response, a dialogue's turns, or a rendered text."""
        if isinstance(record, Rendered):
            with naming(record):
                self._check_closing(record.text)
            verbatim = self.special.verbatim
            return [Answer(verbatim(record.prefix), verbatim(record.text))]
        with naming(record):
            self.check(record)
            if isinstance(record, Triple):
                harmful = self._closed if self.closes_harmful else self.render
                return [
                    harmful(record.messages, record.harmful),
                    self._closed(record.messages, record.safe),
                ]
            answers: list[Answer] = []
            for index, message in enumerate(record.messages):
                if message["role"] == "assistant":
                    answers.append(self._closed(record.messages[:index], message["content"]))
            return answers

    def _closed(self, messages: Sequence[Message], text: str) -> Answer:
        """Render a response with its closing text: a tokenizer may merge the two."""
        prompt, response = self.render(messages, text)
        return Answer(prompt, response + self.closing_text)

    def _triple(self, triple: Triple, turns: list[_Turn]) -> EncodedTriple | None:
        harmful, safe = turns
        prompt = harmful.prompt_ids
        safe_ids = safe.response_ids + self.appended_ids
        room = min(
            self.max_length - len(prompt) - (self.truncates and not self.closes_harmful),
            self.max_tokens - len(prompt) - self.branches * (len(safe_ids) - 1),
        )
        cut_limit = self.max_length - len(prompt) - len(safe_ids)
        if room < self.closes_harmful or cut_limit < 0:
            return None
        harmful_ids, closing = harmful.response_ids, 0
        if self.closes_harmful:
            harmful_ids = harmful_ids + self.appended_ids
            closing = max(0, len(self.closing_ids) - len(harmful_ids[room:]))
        harmful_ids = harmful_ids[:room]
        # With closing tokens, no prefix reaches into them, and something follows it.
        cut_limit = min(cut_limit, len(harmful_ids) - max(closing, self.closes_harmful))
        word_ends = None
        if self.at_words:
            word_ends = self._word_ends(harmful)
            word_ends = word_ends[word_ends <= cut_limit]
        return EncodedTriple(
            id=triple.id,
            prompt=np.array(prompt, np.int32),
            harmful=np.array(harmful_ids, np.int32),
            safe=np.array(safe_ids, np.int32),
            cut_limit=cut_limit,
            word_ends=word_ends,
            source=triple.source,
            weight=triple.weight,
            closing=closing,
        )

    def _word_ends(self, turn: _Turn) -> np.ndarray:
        """Return the number of tokens up to each word's end, without the last two words.

        Words are separated by single spaces, as in the authors' data generator.
        """
        prompt, response = turn.answer
        ids, ends = self.special.encode_with_ends(prompt + response)
        first, start = len(turn.prompt_ids), len(unquoted(prompt))
        if ids[:first] != turn.prompt_ids:  # tokenized separately, see `continuation`
            _, ends = self.special.encode_with_ends(response)
            first = start = 0
        response = unquoted(response)
        lead = len(response) - len(response.lstrip(" "))
        spaces = [match.start() for match in re.finditer(" ", response) if match.start() >= lead]
        return np.searchsorted(ends[first:] - start, spaces[:-1], side="right")

    def _dialogue(self, dialogue: Dialogue, turns: list[_Turn]) -> EncodedDialogue | None:
        *inner, last = turns
        ids = last.prompt_ids + last.response_ids + self.appended_ids
        # The prompt of the last turn contains all other turns as the model will see them.
        is_target = np.zeros(len(ids), bool)
        is_target[len(last.prompt_ids) :] = True
        for turn in inner:
            start, end = len(turn.prompt_ids), _common(turn.prompt_ids + turn.response_ids, ids)
            is_target[start:end] = True
            self.context_only += end <= start
        role: Role = "borderline" if dialogue.borderline else "helpful"
        return self._plain(dialogue, role, ids, is_target)

    def _check_closing(self, text: str) -> None:
        """Check that what looks like the closing token of a rendered text is one."""
        closing = _CLOSING.search(text)
        if closing and not is_token(self.tokenizer, closing[0]):
            raise ValueError(
                f"text: ends in {closing[0]}, which is no token of the tokenizer and would be "
                "trained as ordinary text: expected a file that is rendered for the model"
            )

    def _rendered(self, row: Rendered, turns: list[_Turn]) -> Encoded | None:
        (turn,) = turns
        prompt, text = turn.prompt_ids, turn.response_ids
        if prompt[:1] != self.bos_ids:
            prompt = self.bos_ids + prompt
        if row.rto:
            longest = min(self.max_length + 1 - self.truncates, self.max_tokens + 1)
            if len(prompt) >= longest:
                return None
            return EncodedTriple(
                id=row.id,
                prompt=np.array(prompt, np.int32),
                harmful=np.array(text[: longest - len(prompt)][:-1], np.int32),
                safe=np.zeros(0, np.int32),
                cut_limit=-1,
                source=row.source,
                weight=row.weight,
            )
        ids = prompt + text
        return self._plain(row, "safety", ids, np.arange(len(ids)) >= len(prompt))

    def _plain(
        self, record: Dialogue | Rendered, role: Role, ids: list[int], is_target: np.ndarray
    ) -> EncodedDialogue | None:
        """Return a plain sequence, or what fits of it; its last token is only a label."""
        longest = min(self.max_length, self.max_tokens + 1)
        if len(ids) > longest:
            ids, is_target = ids[:longest], is_target[:longest]
            if not (self.truncates and is_target.any()):
                return None
            self.truncated += 1
        return EncodedDialogue(
            id=record.id,
            input_ids=np.array(ids, np.int32),
            is_target=is_target,
            source=record.source,
            weight=record.weight,
            role=role,
        )


def _common(first: list[int], second: list[int]) -> int:
    """Count the leading tokens that two lists have in common."""
    pairs = enumerate(zip(first, second, strict=False))
    return next((place for place, (a, b) in pairs if a != b), min(len(first), len(second)))
