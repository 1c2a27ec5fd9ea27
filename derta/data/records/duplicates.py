"""Find duplicate requests: identical once normalized, or nearly identical."""

from __future__ import annotations

import functools
import re
import sys
import unicodedata
from collections.abc import Iterator, Sequence
from hashlib import blake2b
from typing import NamedTuple

import numpy as np

from derta.data.records.defaults import NEAR
from derta.data.records.near import NearSets
from derta.data.records.types import Message, Record, Rendered, Request, Triple

SHINGLE_WORDS = 2
# Latest requests that are compared one by one before they are arranged for searches.
WAITING = 64

_OFFICIAL_REQUEST = re.compile(r"\s*\[INST\](.*?)\[[\\/]INST\]", re.DOTALL)


def user_turns(record: Record | Request) -> list[str]:
    """Return the user's messages in an example, in order.

    System prompts are left out, since a whole file often shares one, unless there is nothing else.
    For a rendered row, the request is the text between the authors' [INST] marks, or else the whole
    prefix.
    """
    if isinstance(record, Rendered):
        official = _OFFICIAL_REQUEST.match(record.prefix)
        return [official[1] if official else record.prefix]
    return turns_of(record.messages)


def turns_of(messages: Sequence[Message]) -> list[str]:
    """Return the user's messages in a conversation; the first message if the user has none."""
    turns = [turn["content"] for turn in messages if turn["role"] == "user"]
    return turns or [messages[0]["content"]]


def all_texts(record: Record) -> list[str]:
    """Return every text of an example with its part in it; equal lists mean equal examples."""
    if isinstance(record, Rendered):
        return ["rto" if record.rto else "next", record.prefix, record.text]
    texts = [text for turn in record.messages for text in (turn["role"], turn["content"])]
    return texts + [record.safe, record.harmful] if isinstance(record, Triple) else texts


@functools.cache
def _rewriting(codes: int) -> dict[int, str | None]:
    """Map punctuation to a space and invisible characters (Unicode category Cf) to nothing."""
    table: dict[int, str | None] = {}
    for code in range(codes):
        category = unicodedata.category(chr(code))
        if category == "Cf":
            table[code] = None
        elif category[0] == "P":
            table[code] = " "
    return table


@functools.lru_cache(maxsize=8)  # a row's request is wanted several times in a row
def normalized(text: str) -> str:
    """Return the text without differences of case, white space, punctuation or NFKC form.

    Symbols are kept (C++ is not C). A text of nothing but punctuation keeps it.
    """
    if text.isascii():  # the same, in half the time
        folded, table = text.lower(), _rewriting(128)
    else:
        folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
        table = _rewriting(sys.maxunicode + 1)
    words = folded.translate(table).split() or folded.split()
    return " ".join(words)


def digest(texts: Sequence[str]) -> bytes:
    """Return 16 bytes that two lists share only if their texts are pairwise equal, `normalized`."""
    return _digest([normalized(text) for text in texts])


def _digest(texts: Sequence[str]) -> bytes:
    hashed = blake2b(digest_size=16)
    for text in texts:
        data = text.encode()
        hashed.update(len(data).to_bytes(8, "little") + data)
    return hashed.digest()


class Fingerprint:
    """The digest and shingle hashes of one request; no text can be read back from them.

    Args:
        turns: the user's messages, see `user_turns`.

    Attributes:
        digest: see `digest`.
        shingles: sorted 64-bit hashes of all pairs of neighbouring words, or of a request's only
            word; (m,) uint64 without repeats.
    """

    __slots__ = ("digest", "shingles")

    def __init__(self, turns: Sequence[str]) -> None:
        texts = [normalized(turn) for turn in turns]
        self.digest = _digest(texts)
        words = [word for text in texts for word in text.split()]
        count = max(1, len(words) - SHINGLE_WORDS + 1)
        pairs = {" ".join(words[i : i + SHINGLE_WORDS]) for i in range(count)}
        hashes = b"".join(blake2b(pair.encode(), digest_size=8).digest() for pair in pairs)
        self.shingles = np.unique(np.frombuffer(hashes, ">u8").astype(np.uint64))


def jaccard(first: set[int], second: Sequence[int]) -> float:
    """Return the Jaccard similarity of two sets; `second` has no repeated value."""
    common = sum(value in first for value in second)
    return common / (len(first) + len(second) - common)


class Match(NamedTuple):
    """A duplicate found in the index.

    Attributes:
        id: id of the earlier example.
        similarity: Jaccard similarity of the shingles, in [0, 1].
        exact: if True, the requests are equal once `normalized`.
    """

    id: str
    similarity: float
    exact: bool


class RequestIndex:
    """An index that finds requests equal to, or near to, those added before.

    Near requests share at least `near` of their shingles (Jaccard). None is missed, and every match
    is near. `has_match` compares with few requests even where thousands are alike (`NearSets`);
    `matches` compares with all that may match.

    Memory: about 0.2 KB for each distinct request, and about 35 bytes more for each of its shingles
    unless `near` is None; texts are not kept (checked by
    tests/derta/data/records/test_duplicates.py).

    Args:
        near: least similarity of near requests, in [0.5, 1]; None: find only equal requests.

    Raises:
        ValueError: `near` is out of its range.
    """

    def __init__(self, near: float | None = NEAR) -> None:
        check_near(near)
        self.near = near
        self._ids: list[str] = []
        self._places: dict[bytes, int] = {}
        # Arranged requests in parts of falling size, and the latest ones, which wait.
        self._parts: list[tuple[int, NearSets]] = []
        self._latest: list[np.ndarray] = []
        self._compared = 0

    def __len__(self) -> int:
        return len(self._ids)

    @property
    def compared(self) -> int:
        """The number of requests compared with others so far: what the searches took."""
        return self._compared + sum(part.compared for _, part in self._parts)

    def add(self, id: str, request: Fingerprint) -> None:
        """Add a request unless the index already holds an equal one."""
        place = self._places.setdefault(request.digest, len(self._ids))
        if place < len(self._ids):
            return
        self._ids.append(id)
        if self.near is not None:
            self._latest.append(request.shingles)

    def has_same(self, request: Fingerprint) -> bool:
        """Return True if the index holds an equal request."""
        return request.digest in self._places

    def has_match(self, request: Fingerprint) -> bool:
        """Return True if the index holds an equal request or a near one."""
        if self.has_same(request):
            return True
        return self.near is not None and any(True for _ in self._near(request.shingles))

    def matches(self, request: Fingerprint) -> list[Match]:
        """Return all matches: the equal request first, then near ones by falling similarity."""
        same = self._places.get(request.digest)
        found = [] if same is None else [Match(self._ids[same], 1.0, exact=True)]
        if self.near is None:
            return found
        near = {place: value for place, value in self._near(request.shingles) if place != same}
        return found + [
            Match(self._ids[place], near[place], exact=False)
            for place in sorted(near, key=lambda place: (-near[place], place))
        ]

    def _near(self, shingles: np.ndarray) -> Iterator[tuple[int, float]]:
        """Yield near requests and their similarities; one may come again."""
        assert self.near is not None
        if len(self._latest) > WAITING:
            self._arrange()
        for first, part in self._parts:
            for places, similarities in part.near(shingles):
                yield from zip((places + first).tolist(), similarities.tolist(), strict=True)
        own = set(shingles.tolist())
        first = len(self._ids) - len(self._latest)
        for place, other in enumerate(self._latest, start=first):
            if min(len(own), len(other)) >= self.near * max(len(own), len(other)):
                self._compared += 1
                similarity = jaccard(own, other.tolist())
                if similarity >= self.near:
                    yield place, similarity

    def _arrange(self) -> None:
        """Arrange the latest requests, together with parts that are no larger."""
        assert self.near is not None
        first = len(self._ids) - len(self._latest)
        values = [np.concatenate(self._latest)]
        sizes = [np.array([len(one) for one in self._latest])]
        self._latest.clear()
        while self._parts and len(self._parts[-1][1]) <= len(self._ids) - first:
            first, part = self._parts.pop()
            values.append(part.values)
            sizes.append(part.sizes)
            self._compared += part.compared
        self._parts.append(
            (first, NearSets(np.concatenate(values[::-1]), np.concatenate(sizes[::-1]), self.near))
        )


def check_near(near: float | None) -> None:
    """Raise ValueError unless `near` is None or a similarity of near requests, 0.5 to 1."""
    if near is not None and not 0.5 <= near <= 1:
        raise ValueError(f"near must lie in [0.5, 1], or be null for exact matches, got {near}")
