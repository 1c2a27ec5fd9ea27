"""Special tokens in texts: read as the plain text that they are, while the template's stay tokens.

A chat template joins texts and its own marks to one string, and a tokenizer cannot tell whose mark
it reads. So texts are *quoted* before a template sees them: a character that Unicode reserves for
internal use breaks every special token in them. In the rendered string, a whole special token is
then the template's. For the few strings with a quoted text, whole tokens are renamed to names that
no text has, the breaks are removed, and a copy of the tokenizer reads the result, which knows
special tokens by their new names alone. All else is the tokenizer's own: where it splits and what
it merges across the border of template and text. Strings without quoted texts go to the tokenizer.

Marks of a template that are no tokens of the tokenizer, such as Llama 2's "[INST]", are ordinary
text to both and cannot be kept apart.
"""

from __future__ import annotations

import functools
import json
import re
import secrets
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from derta.data.records.types import Dialogue, Request, Triple, texts_of

if TYPE_CHECKING:
    from tokenizers import AddedToken, Encoding, Tokenizer
    from transformers import PreTrainedTokenizerBase

# Special tokens of common models, for a look at texts without a tokenizer.
COMMON = re.compile(
    r"<\|[^\s<>|]{1,60}\|>|<｜[^\s<>｜]{1,60}｜>|</?s>|\[/?INST\]"
    r"|<(?:bos|eos|pad|unk|start_of_turn|end_of_turn)>"
)

# Noncharacters of Unicode. A text's own are escaped: _ESCAPE and a letter that says which.
_BREAK, _ESCAPE = "\ufdd0", "\ufdd1"
_OWN_ESCAPE, _OWN_BREAK = "\ufdd1\ufdd2", "\ufdd1\ufdd3"
_ALIAS = "\ufdd4"


def is_token(tokenizer: PreTrainedTokenizerBase, text: str) -> bool:
    """Return True if a text is the name of one token."""
    return tokenizer.convert_tokens_to_ids(text) not in (None, tokenizer.unk_token_id)


class SpecialTokens:
    """The control tokens of a tokenizer, and an encoding in which texts have none of them.

    Control tokens are the added tokens that are special, those that the tokenizer names
    (`eos_token` and its like, `chat_control_tokens`), and those that the template writes around
    messages. Other added tokens, such as `<think>` and `<tool_call>`, are part of what a model may
    say: they stay tokens, in texts too. So do tokens of a single character, which have no other
    form.

    Args:
        tokenizer: the tokenizer.
        written: text that the chat template writes, for its marks that are not special.

    Attributes:
        pattern: regular expression that finds control tokens in a text.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, written: str = "") -> None:
        self.tokenizer = tokenizer
        declared = getattr(tokenizer, "chat_control_tokens", None)  # newer than transformers 5.0
        named = {*tokenizer.all_special_tokens, *(declared or ())}
        self._added = list(tokenizer.added_tokens_decoder.values())
        self._controls = [
            token
            for token in self._added
            if len(token.content.strip()) > 1
            and (token.special or token.content in named or _is_mark(token.content, written))
        ]
        self.pattern = _alternation(self._controls)
        controls = [token.content for token in self._controls]
        self._beginnings = tuple({one[:end] for one in controls for end in range(1, len(one))})
        # Tokens that are found in normalized text may be there when the text itself has none.
        self._normalizer = (
            tokenizer.backend_tokenizer.normalizer
            if tokenizer.is_fast and any(token.normalized for token in self._controls)
            else None
        )

    def quote(self, text: str) -> str:
        """Return the text with every control token broken, see `encode`.

        Raises:
            ValueError: the text has a control token, and the tokenizer is not a fast one.
        """
        text = self.verbatim(text)
        while found := self.pattern.search(text):
            if not self.tokenizer.is_fast:
                raise ValueError(
                    f"a text has the special token {found[0]!r}, which only a fast tokenizer reads "
                    f"as plain text, got {type(self.tokenizer).__name__}: choose "
                    "special_tokens_in_text: refuse, or keep"
                )
            text = self.pattern.sub(lambda token: token[0][0] + _BREAK + token[0][1:], text)
        body = text.rstrip()
        if body.endswith(self._beginnings):  # the next text could complete it
            text = body + _BREAK + text[len(body) :]
        elif self._normalizer is not None and self.pattern.search(
            self._normalizer.normalize_str(text)
        ):
            text += _BREAK
        return text

    def verbatim(self, text: str) -> str:
        """Return the text in the same form as quoted text, its control tokens whole."""
        if text.isascii():
            return text
        return text.replace(_ESCAPE, _OWN_ESCAPE).replace(_BREAK, _OWN_BREAK)

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the token ids of texts that are joined from quoted and verbatim ones.

        Raises:
            ValueError: the tokenizer overlooks a token of the template beside a text with another.
        """
        if not self.tokenizer.is_fast:
            return self._ordinary([unquoted(text) for text in texts])
        careful = [place for place, text in enumerate(texts) if _needs_care(text)]
        if not careful:
            return self._ordinary(texts)
        read = dict(zip(careful, self._renamed.encode([texts[at] for at in careful]), strict=True))
        others = [text for place, text in enumerate(texts) if place not in read]
        ids = iter(self._ordinary(others) if others else ())
        return [read[at].ids if at in read else next(ids) for at in range(len(texts))]

    def encode_with_ends(self, text: str) -> tuple[list[int], np.ndarray]:
        """Return the token ids of one text as `encode` does, and where each token ends.

        Returns:
            the ids, and (tokens,) int64, the number of characters of the unquoted text up to each
            token's end.
        """
        if _needs_care(text):
            (read,) = self._renamed.encode([text])
            ids, offsets, longer = read.ids, read.offsets, self._renamed.longer
        else:
            ordinary = self.tokenizer(
                text, add_special_tokens=False, return_offsets_mapping=True, verbose=False
            )
            ids, offsets, longer = ordinary["input_ids"], ordinary["offset_mapping"], {}
        excess = np.cumsum([longer.get(id, 0) for id in ids], dtype=np.int64)
        return ids, np.array(offsets, np.int64).reshape(-1, 2)[:, 1] - excess

    def _ordinary(self, texts: Sequence[str]) -> list[list[int]]:
        return self.tokenizer(
            list(texts), add_special_tokens=False, return_attention_mask=False, verbose=False
        )["input_ids"]

    @functools.cached_property
    def _renamed(self) -> _Renamed:
        controls = [token.content for token in self._controls]
        tokenizer = self.tokenizer
        return _Renamed(
            tokenizer.backend_tokenizer, controls, _alternation(self._added), tokenizer.unk_token
        )


class _Renamed:
    """A copy of a fast tokenizer that knows its control tokens by other names.

    Args:
        backend: the tokenizer.
        controls: its control tokens.
        added: regular expression that finds each of its added tokens.
        unknown: the control token that stands for unknown text, if there is one.

    Attributes:
        longer: characters by which the new name of a control token, by id, exceeds the old one.
    """

    def __init__(
        self,
        backend: Tokenizer,
        controls: Iterable[str],
        added: re.Pattern[str],
        unknown: str | None,
    ) -> None:
        nonce = _ALIAS + secrets.token_hex(8)
        self._names = {token: f"{nonce}{place}." for place, token in enumerate(controls)}
        self._added = added
        self._tokenizer = _with_names(backend, self._names)
        self.longer: dict[int, int] = {}
        for token, name in self._names.items():
            id = self._tokenizer.token_to_id(name)
            assert id is not None and id == backend.token_to_id(token), f"{token!r} has lost its id"
            if token != unknown:
                self.longer[id] = len(name) - len(token)

    def encode(self, texts: Sequence[str]) -> list[Encoding]:
        named = [self._added.sub(self._name, text) for text in texts]
        read: list[Encoding] = self._tokenizer.encode_batch(
            [unquoted(text) for text in named], add_special_tokens=False
        )
        for text, encoding in zip(named, read, strict=True):
            if sum(id in self.longer for id in encoding.ids) < text.count(_ALIAS):
                raise ValueError(
                    "the tokenizer overlooks a special token of chat_template beside a text that "
                    "has one: choose special_tokens_in_text: refuse, or keep"
                )
        return read

    def _name(self, token: re.Match[str]) -> str:
        return self._names.get(token[0], token[0])


def _with_names(backend: Tokenizer, names: Mapping[str, str]) -> Tokenizer:
    """Return a copy with other names of tokens, which no merge forms from text either."""
    from tokenizers import Tokenizer

    whole = json.loads(backend.to_str())
    for token in whole["added_tokens"]:
        token["content"] = names.get(token["content"], token["content"])
    model: dict[str, Any] = whole["model"]
    vocabulary = model["vocab"]
    if isinstance(vocabulary, dict):
        model["vocab"] = {names.get(piece, piece): id for piece, id in vocabulary.items()}
    else:  # a Unigram's pieces with their scores
        model["vocab"] = [[names.get(piece, piece), score] for piece, score in vocabulary]
    if model.get("unk_token") in names:
        model["unk_token"] = names[model["unk_token"]]
    if "merges" in model:
        model["merges"] = [
            [left, right]
            for left, right in model["merges"]
            if names.keys().isdisjoint((left, right, left + right))
        ]
    copy: Tokenizer = Tokenizer.from_str(json.dumps(whole))
    copy.no_truncation()
    copy.no_padding()
    return copy


def _needs_care(text: str) -> bool:
    return not text.isascii() and (_BREAK in text or _ESCAPE in text)


def unquoted(text: str) -> str:
    """Return the text that `SpecialTokens.quote` or `verbatim` was given."""
    if text.isascii():
        return text
    text = text.replace(_BREAK, "")
    return text.replace(_OWN_BREAK, _BREAK).replace(_OWN_ESCAPE, _ESCAPE)


def _is_mark(content: str, written: str) -> bool:
    """Return True for a token that a template writes, unless it is a word, such as a role."""
    return content in written and not content.strip().isalnum()


def _alternation(tokens: Iterable[AddedToken]) -> re.Pattern[str]:
    """Return a regular expression that finds tokens as tokenizers do: leftmost, then longest."""
    longest_first = sorted(tokens, key=lambda token: len(token.content), reverse=True)
    parts = (
        rf"(?<!\w){re.escape(token.content)}(?!\w)"
        if token.single_word
        else re.escape(token.content)
        for token in longest_first
    )
    return re.compile("|".join(parts) or "(?!)")


@dataclass
class SpecialTokenCount:
    """A count of special tokens in the texts of records.

    Args:
        pattern: regular expression that finds one: `COMMON`, or that of `SpecialTokens`.

    Attributes:
        records: number of records with one.
        tokens: number of occurrences of each.
    """

    pattern: re.Pattern[str]
    records: int = field(init=False, default=0)
    tokens: Counter[str] = field(init=False, default_factory=Counter)

    def add(self, record: Triple | Dialogue | Request) -> list[str]:
        """Count a record; return the names of its fields with special tokens."""
        fields = []
        for name, text in texts_of(record):
            if found := self.pattern.findall(text):
                self.tokens.update(found)
                fields.append(name)
        self.records += bool(fields)
        return fields


def listed_tokens(records: int, tokens: Mapping[str, int], most: int = 8) -> str:
    """Return the number of records with special tokens, and the most frequent of them."""
    listed = [f"{token} {count:,}" for token, count in Counter(tokens).most_common(most)]
    more = ", ..." if len(tokens) > most else ""
    return f"{records:,} records" + (f" ({', '.join(listed)}{more})" if listed else "")
