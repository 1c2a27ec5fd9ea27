"""From records to token ids, within the lengths that a run allows."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, NamedTuple

import numpy as np

from derta.data.records.sources import Role
from derta.data.records.types import Dialogue, Message, Record, Rendered, Triple, naming
from derta.data.tokens.chat import BATCH, Answer, Chat, batched

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, eq=False)
class EncodedTriple:
    """A triple as token ids; or a rendered row whose targets are the refusal token, all of them.

    Attributes:
        id: the record's.
        prompt: (|q|,) int32, up to where the model writes.
        harmful: (|h|,) int32, without the token that closes it; cut at its end if it was too long.
        safe: (|r|,) int32, with the token that closes it; empty in a rendered row.
        cut_limit: the largest cut after which the safe response still fits, at most |h|; -1 where
            there is none, and no branch ever.
        word_ends: (words - 2,) int64 or None: after how many harmful tokens each word ends, the
            last two words and all beyond `cut_limit` left out. Only for cuts "official".
        source, weight: the record's.
    """

    id: str
    prompt: np.ndarray
    harmful: np.ndarray
    safe: np.ndarray
    cut_limit: int
    word_ends: np.ndarray | None = None
    source: str = ""
    weight: float = 1.0
    role: ClassVar[Role] = "safety"


@dataclass(frozen=True, eq=False)
class EncodedDialogue:
    """A dialogue as token ids; or a rendered row whose targets are its own tokens.

    Attributes:
        id: the record's.
        input_ids: (n,) int32.
        is_target: (n,) bool, the tokens to be predicted: what the assistant says and closes with,
            as far as a later turn has not joined them to other tokens than the model would write.
        source, weight: the record's.
        role: what its answers answer: a harmless request, a borderline one, or, in a rendered row,
            nobody knows: "safety".
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
    """Encodes records through the model's chat template.

    A triple that is too long is cut at the end of its harmful response, and so is a rendered row of
    RTO. What does not fit even so (prompt and safe response, a dialogue, other rendered rows) is
    skipped and counted.

    A rendered row is tokenized as the authors' code does it: after the token that begins a sequence
    if the tokenizer puts one there, and with nothing that closes it. `prefix` keeps the tokens that
    it has alone; where `text` would join them, it too is tokenized alone.

    Args:
        tokenizer: with a chat template.
        max_length: tokens of the longest logical sequence: |q| + |h|, |q| + cut + |r|, a dialogue.
        max_tokens: tokens of the longest pack, which a triple with its branches must fit.
        branches: safe responses per triple.
        cuts: a policy of `derta.objectives.cuts`.

    Attributes:
        skipped: records that did not fit, so far.

    Raises:
        ValueError: the tokenizer has no usable chat template, or cannot tell where words end and
            cuts is "official".
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        max_length: int,
        max_tokens: int,
        branches: int,
        cuts: str,
    ) -> None:
        super().__init__(tokenizer)
        self.max_length = max_length
        self.max_tokens = max_tokens
        self.branches = branches
        self.at_words = cuts == "official"
        if self.at_words and not tokenizer.is_fast:
            raise ValueError(
                "cuts='official' falls between words and needs the token offsets of a fast "
                f"tokenizer, got {type(tokenizer).__name__}: choose cuts='uniform'"
            )
        self.bos_ids = [id for id in tokenizer("")["input_ids"] if id == tokenizer.bos_token_id]
        self.skipped = 0

    def encode(self, record: Record) -> Encoded | None:
        """The record as token ids, or None if it does not fit.

        Raises:
            ValueError: the chat template does not take the record; names its id.
        """
        (encoded,) = self.encode_many([record])
        return encoded

    def encode_many(self, records: Iterable[Record]) -> Iterator[Encoded | None]:
        """`encode` of each record, tokenized in batches: faster, the more cores there are.

        Raises:
            ValueError: the chat template does not take a record; names its id.
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
        """All that is said in answer: harmful and safe response, a dialogue's turns, or a text."""
        if isinstance(record, Rendered):
            return [Answer(record.prefix, record.text)]
        with naming(record):
            if isinstance(record, Triple):
                return [
                    self.render(record.messages, record.harmful),
                    self._closed(record.messages, record.safe),
                ]
            answers: list[Answer] = []
            for index, message in enumerate(record.messages):
                if message["role"] == "assistant":
                    answer = self._closed(record.messages[:index], message["content"])
                    if answers and not answer.prompt.startswith("".join(answers[-1])):
                        raise ValueError(
                            "chat_template rewrites earlier messages as the conversation goes on, "
                            f"seen at messages[{index}]: set chat_template to one that does not, "
                            "or split the dialogue"
                        )
                    answers.append(answer)
            return answers

    def _closed(self, messages: Sequence[Message], text: str) -> Answer:
        """Tokenized with what closes it, as the template has it: a tokenizer may join the two."""
        prompt, response = self.render(messages, text)
        return Answer(prompt, response + self.closing_text)

    def _triple(self, triple: Triple, turns: list[_Turn]) -> EncodedTriple | None:
        harmful, safe = turns
        prompt = harmful.prompt_ids
        safe_ids = safe.response_ids + self.appended_ids
        room = min(
            self.max_length - len(prompt),
            self.max_tokens - len(prompt) - self.branches * (len(safe_ids) - 1),
        )
        cut_limit = self.max_length - len(prompt) - len(safe_ids)
        if room < 0 or cut_limit < 0:
            return None
        harmful_ids = harmful.response_ids[:room]
        cut_limit = min(cut_limit, len(harmful_ids))
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
        )

    def _word_ends(self, turn: _Turn) -> np.ndarray:
        """After how many tokens of a response each of its words ends, but for the last two.

        Words are what single spaces part, as in the authors' data generator.
        """
        prompt, response = turn.answer
        ids, ends = self._token_ends(prompt + response)
        first, start = len(turn.prompt_ids), len(prompt)
        if ids[:first] != turn.prompt_ids:  # tokenized alone, see `continuation`
            _, ends = self._token_ends(response)
            first = start = 0
        lead = len(response) - len(response.lstrip(" "))
        spaces = [match.start() for match in re.finditer(" ", response) if match.start() >= lead]
        return np.searchsorted(ends[first:] - start, spaces[:-1], side="right")

    def _token_ends(self, text: str) -> tuple[list[int], np.ndarray]:
        encoding = self.tokenizer(
            text, add_special_tokens=False, return_offsets_mapping=True, verbose=False
        )
        return encoding["input_ids"], np.array(encoding["offset_mapping"])[:, 1]

    def _dialogue(self, dialogue: Dialogue, turns: list[_Turn]) -> EncodedDialogue | None:
        *inner, last = turns
        ids = last.prompt_ids + last.response_ids + self.appended_ids
        if not self._fits(ids):
            return None
        # The prompt of the last turn holds all others, read as the model will be shown them.
        is_target = np.zeros(len(ids), bool)
        is_target[len(last.prompt_ids) :] = True
        for turn in inner:
            written = turn.prompt_ids + turn.response_ids
            is_target[len(turn.prompt_ids) : _common(written, ids)] = True
        return EncodedDialogue(
            id=dialogue.id,
            input_ids=np.array(ids, np.int32),
            is_target=is_target,
            source=dialogue.source,
            weight=dialogue.weight,
            role="borderline" if dialogue.borderline else "helpful",
        )

    def _rendered(self, row: Rendered, turns: list[_Turn]) -> Encoded | None:
        (turn,) = turns
        prompt, text = turn.prompt_ids, turn.response_ids
        if prompt[:1] != self.bos_ids:
            prompt = self.bos_ids + prompt
        if row.rto:
            room = min(self.max_length, self.max_tokens) - len(prompt)
            if room < 0:
                return None
            return EncodedTriple(
                id=row.id,
                prompt=np.array(prompt, np.int32),
                harmful=np.array(text[:-1][:room], np.int32),
                safe=np.zeros(0, np.int32),
                cut_limit=-1,
                source=row.source,
                weight=row.weight,
            )
        ids = prompt + text
        if not self._fits(ids):
            return None
        return EncodedDialogue(
            id=row.id,
            input_ids=np.array(ids, np.int32),
            is_target=np.arange(len(ids)) >= len(prompt),
            source=row.source,
            weight=row.weight,
            role="safety",
        )

    def _fits(self, ids: list[int]) -> bool:
        """Whether a plain sequence does, whose last token is a label alone."""
        return len(ids) <= self.max_length and len(ids) - 1 <= self.max_tokens


def _common(first: list[int], second: list[int]) -> int:
    """How many tokens two lists have in common before they differ."""
    pairs = enumerate(zip(first, second, strict=False))
    return next((place for place, (a, b) in pairs if a != b), min(len(first), len(second)))
