"""The refusal token: the first token of a refusal, in the context of the chat template.

RTO trains towards one of them, or towards a set.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Literal

from derta.data.records.types import Message, Triple, naming
from derta.data.tokens.chat import BATCH, PROBE, Chat, batched

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


# The most tokens of a set that is found, and the share of the safe responses that each starts.
FOUND_REFUSALS = 8
FOUND_SHARE = 0.01


@dataclass(frozen=True)
class RefusalToken:
    """The token that RTO trains the model to say.

    Attributes:
        id: token id.
        text: decoded token.
        safe_start_share: share of the safe responses that start with it, in [0, 1]; 0 without any.
        common_start: id of the most common first token of the safe responses; None without any.
        common_start_text: decoded most common first token.
        common_start_share: share of the safe responses that start with the most common token.
    """

    id: int
    text: str
    safe_start_share: float
    common_start: int | None
    common_start_text: str
    common_start_share: float

    @property
    def warning(self) -> str | None:
        """Warning if the safe responses teach another token than RTO, else None."""
        if self.common_start in (None, self.id):
            return None
        return (
            f"RTO trains {self.text!r} (id {self.id}), but only {self.safe_start_share:.0%} of the "
            f"safe responses start with it; {self.common_start_share:.0%} start with "
            f"{self.common_start_text!r} (id {self.common_start}): set refusal to that id, or "
            "rewrite the safe responses, unless two ways to refuse are intended"
        )

    def __str__(self) -> str:
        return self.warning or f"{self.text!r} (id {self.id})"


@dataclass(frozen=True)
class RefusalSet:
    """The tokens that RTO trains the model to say one of.

    Attributes:
        tokens: the tokens, at least one; found ones by frequency, the most frequent first.
    """

    tokens: tuple[RefusalToken, ...]

    @property
    def target(self) -> int | tuple[int, ...]:
        """The id of the only token, or the ids of several, ascending."""
        ids = sorted(token.id for token in self.tokens)
        return ids[0] if len(ids) == 1 else tuple(ids)

    @property
    def safe_start_share(self) -> float:
        """Share of the safe responses that start with one of the tokens, in [0, 1]."""
        return sum(token.safe_start_share for token in self.tokens)

    @property
    def warning(self) -> str | None:
        """Warning if the safe responses teach another start, or not all of them; else None."""
        first, *others = self.tokens
        if not others or first.common_start is None:
            return first.warning
        if first.common_start in (token.id for token in self.tokens):
            untaught = [token for token in self.tokens if not token.safe_start_share]
            if not untaught:
                return None
            return (
                f"RTO trains {_listed(untaught)} too, but no safe response starts so, and nothing "
                "teaches the model to go on from there: leave them out, or add such safe responses"
            )
        return (
            f"RTO trains one of {_listed(self.tokens)}, but only {self.safe_start_share:.0%} of "
            f"the safe responses start with one of them; {first.common_start_share:.0%} start with "
            f"{first.common_start_text!r} (id {first.common_start}): add that id to refusal_tokens"
        )

    def __str__(self) -> str:
        return f"refusal token{'s' * (len(self.tokens) > 1)} {_listed(self.tokens)}"


def _listed(tokens: Iterable[RefusalToken]) -> str:
    return ", ".join(f"{token.text!r} (id {token.id})" for token in tokens)


def resolve_refusal_token(
    tokenizer: PreTrainedTokenizerBase,
    refusal: str | int = "auto",
    triples: Sequence[Triple] = (),
) -> RefusalToken:
    """Find the token that starts a refusal right after the generation prompt.

    "Sorry" and " Sorry" are different tokens, and the chat template decides which one starts a
    response. A word is therefore looked up as the response to the first triple's prompt.

    Args:
        tokenizer: a tokenizer with a chat template.
        refusal: a word, a token id, or "auto", the most common first token of the safe responses,
            each after its own prompt.
        triples: triples whose safe responses are compared with the token.

    Raises:
        TypeError: `refusal` is neither text nor an integer.
        ValueError: `refusal` is "auto" without triples, a word that is not one token or that the
            tokenizer changes, or an unknown token id; or the chat template is not usable.

    Source: arXiv 2407.09121, section 3.3, where the token is a fixed "Sorry".
    """
    chat = Chat(tokenizer)
    starts = _safe_starts(chat, triples)
    return choose_refusal_token(chat, refusal, starts, triples[0].messages if triples else PROBE)


def choose_refusal_token(
    chat: Chat, refusal: str | int, starts: Counter[int], messages: Sequence[Message] | None = None
) -> RefusalToken:
    """Do as `resolve_refusal_token`, from counts of the safe responses' first tokens.

    Args:
        chat: the model's chat template.
        refusal: see `resolve_refusal_token`.
        starts: number of safe responses that start with each token.
        messages: conversation in which a word is looked up as the response; None: a greeting.

    Raises:
        TypeError, ValueError: as `resolve_refusal_token`.
    """
    if not isinstance(refusal, str | int) or isinstance(refusal, bool):
        raise TypeError(
            f"refusal must be a word, a token id or 'auto', got {type(refusal).__name__}"
        )
    if refusal == "auto":
        if not starts:
            raise ValueError("refusal='auto' needs triples to read: give a word or a token id")
        id = starts.most_common(1)[0][0]
    elif isinstance(refusal, str):
        id = _word_id(chat, refusal, messages or PROBE)
    else:
        id = refusal
        size = len(chat.tokenizer)
        if not 0 <= id < size:
            raise ValueError(f"refusal must be a token id in 0..{size - 1}, got {refusal}")
    common, count = starts.most_common(1)[0] if starts else (None, 0)
    total = max(starts.total(), 1)
    return RefusalToken(
        id=id,
        text=chat.text(id),
        safe_start_share=starts[id] / total,
        common_start=common,
        common_start_text="" if common is None else chat.text(common),
        common_start_share=count / total,
    )


def choose_refusal_set(
    chat: Chat,
    refusal: str | int,
    refusal_tokens: Literal["auto"] | Sequence[str | int] | None,
    starts: Counter[int],
    messages: Sequence[Message] | None = None,
) -> RefusalSet:
    """Find the tokens of a run: the one of `refusal`, or those of `refusal_tokens` if given.

    Args:
        chat, refusal, starts, messages: see `choose_refusal_token`.
        refusal_tokens: words and token ids, or "auto", the first tokens of the safe responses by
            frequency: at most 8, each of at least 1% of them, the most common one in any case.

    Raises:
        TypeError, ValueError: as `resolve_refusal_token`, or two of the tokens are one.
    """
    choose = partial(choose_refusal_token, chat, starts=starts, messages=messages)
    if refusal_tokens is None:
        return RefusalSet((choose(refusal),))
    if refusal_tokens == "auto":
        first = choose("auto")
        least = FOUND_SHARE * starts.total()
        found = [id for id, count in starts.most_common(FOUND_REFUSALS) if count >= least]
        return RefusalSet(tuple(map(choose, found)) or (first,))
    tokens = tuple(map(choose, refusal_tokens))
    ids = [token.id for token in tokens]
    for place, id in enumerate(ids):
        if id in ids[:place]:
            raise ValueError(
                f"refusal_tokens must be distinct tokens, got {refusal_tokens[ids.index(id)]!r} "
                f"and {refusal_tokens[place]!r}, both {tokens[place].text!r} (id {id})"
            )
    return RefusalSet(tokens)


def _safe_starts(chat: Chat, triples: Iterable[Triple]) -> Counter[int]:
    """Count the first tokens of the safe responses."""
    starts: Counter[int] = Counter()
    for batch in batched(triples, BATCH):
        answers = []
        for triple in batch:
            with naming(triple):
                answers.append(chat.render(triple.messages, triple.safe))
        starts.update(response[0] for _, response in chat.answer_ids(answers))
    return starts


def _word_id(chat: Chat, word: str, messages: Sequence[Message]) -> int:
    if not word or word != word.strip():
        raise ValueError(
            f"refusal must be a word without spaces around it, got {word!r}: the chat template "
            "decides whether a space comes first"
        )
    if not chat.tokenizer.chat_template:
        raise ValueError(
            f"refusal {word!r} is looked up in the chat template, and the tokenizer has none: give "
            "a token id, or set chat_template"
        )
    ids = chat.response_ids(messages, word)
    pieces = [chat.text(id) for id in ids]
    if len(ids) != 1:
        raise ValueError(
            f"refusal must be one token, but {word!r} is {len(ids)}, {pieces} with ids {ids}: give "
            f"another word, or the id of its first piece, {ids[0]}"
        )
    if pieces[0].strip() != word:
        raise ValueError(
            f"refusal {word!r} becomes id {ids[0]}, which decodes to {pieces[0]!r}: the tokenizer "
            "changes the word; give the word as the tokenizer writes it or a token id"
        )
    return ids[0]
