"""Requests that come again: the same but for how they are written, or nearly the same."""

from __future__ import annotations

import functools
import re
import sys
import unicodedata
from array import array
from collections.abc import Sequence
from hashlib import blake2b
from typing import NamedTuple

from datasketch import MinHash, MinHashLSH

from derta.data.records.types import Message, Record, Rendered, Request, Triple

NEAR = 0.7
SHINGLE_WORDS = 2
PERMUTATIONS = 128
MISSED = 1e-3

_OFFICIAL_REQUEST = re.compile(r"\s*\[INST\](.*?)\[[\\/]INST\]", re.DOTALL)


def user_turns(record: Record | Request) -> list[str]:
    """What the user says in an example, turn by turn.

    System prompts are left out, one is often that of a whole file, unless there is nothing else. Of
    a rendered row it is what stands between the authors' [INST] marks, or else its whole prefix.
    """
    if isinstance(record, Rendered):
        official = _OFFICIAL_REQUEST.match(record.prefix)
        return [official[1] if official else record.prefix]
    return turns_of(record.messages)


def turns_of(messages: Sequence[Message]) -> list[str]:
    """What the user says in a conversation; what it begins with where the user says nothing."""
    turns = [turn["content"] for turn in messages if turn["role"] == "user"]
    return turns or [messages[0]["content"]]


def all_texts(record: Record) -> list[str]:
    """Every text of an example with its part in it: two examples are one if these are alike."""
    if isinstance(record, Rendered):
        return ["rto" if record.rto else "next", record.prefix, record.text]
    texts = [text for turn in record.messages for text in (turn["role"], turn["content"])]
    return texts + [record.safe, record.harmful] if isinstance(record, Triple) else texts


@functools.cache
def _rewriting() -> dict[int, str | None]:
    """Punctuation is a space, what cannot be seen (Unicode's format characters) is nothing."""
    table: dict[int, str | None] = {}
    for code in range(sys.maxunicode + 1):
        category = unicodedata.category(chr(code))
        if category == "Cf":
            table[code] = None
        elif category[0] == "P":
            table[code] = " "
    return table


def normalized(text: str) -> str:
    """The text without what does not make it another: case, white space, punctuation, NFKC.

    Symbols stay (C++ is not C). A text of nothing but punctuation keeps it.
    """
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    words = folded.translate(_rewriting()).split() or folded.split()
    return " ".join(words)


def digest(texts: Sequence[str]) -> bytes:
    """16 bytes that two lists of texts share only if they are alike, `normalized`, one by one."""
    hashed = blake2b(digest_size=16)
    for text in texts:
        data = normalized(text).encode()
        hashed.update(len(data).to_bytes(8, "little") + data)
    return hashed.digest()


class Fingerprint:
    """What is compared of one request: nothing of it can be read back.

    Args:
        turns: see `user_turns`.

    Attributes:
        digest: see `digest`.
        shingles: 64-bit hashes of every two neighbouring words, of the one word of a single one.
    """

    def __init__(self, turns: Sequence[str]) -> None:
        self.digest = digest(turns)
        words = [word for turn in turns for word in normalized(turn).split()]
        count = max(1, len(words) - SHINGLE_WORDS + 1)
        self.shingles = {
            int.from_bytes(
                blake2b(" ".join(words[i : i + SHINGLE_WORDS]).encode(), digest_size=8).digest()
            )
            for i in range(count)
        }

    @functools.cached_property
    def minhash(self) -> MinHash:
        """What LSH finds candidates by; made when first asked for."""
        minhash = _empty_minhash().copy()
        minhash.update_batch(self.shingles)
        return minhash


@functools.cache
def _empty_minhash() -> MinHash:
    return MinHash(PERMUTATIONS, hashfunc=lambda shingle: shingle & 0xFFFFFFFF)


def jaccard(first: set[int], second: Sequence[int]) -> float:
    """Size of the intersection of two sets over that of their union; `second` repeats nothing."""
    common = sum(value in first for value in second)
    return common / (len(first) + len(second) - common)


class Match(NamedTuple):
    """A request that was found again.

    Attributes:
        id: of the example that was there before.
        similarity: Jaccard similarity of their shingles, in [0, 1].
        exact: whether they are the same once `normalized`.
    """

    id: str
    similarity: float
    exact: bool


class RequestIndex:
    """Finds requests that are the same as, or near to, those that were added.

    Near ones share at least `near` of their shingles (Jaccard). Candidates come from MinHash LSH
    and are compared themselves, so none is reported that is not near; of pairs that are, less than
    one in a thousand (`MISSED`) is missed at the threshold, and fewer above it.

    Memory: about 0.2 KB a distinct request, and about 10 KB more unless `near` is None; texts are
    not kept (tests/derta/data/records/test_duplicates.py holds it to this).

    Args:
        near: least similarity of near requests, in [0.5, 1]; None finds the same ones alone.

    Raises:
        ValueError: `near` is out of its range.

    Source: MinHash LSH of the datasketch package.
    """

    def __init__(self, near: float | None = NEAR) -> None:
        check_near(near)
        self.near = near
        self._ids: list[str] = []
        self._places: dict[bytes, int] = {}
        self._shingles: list[array] = []
        if near is not None:
            self._lsh = MinHashLSH(
                num_perm=PERMUTATIONS,
                params=_bands(near),
                hashfunc=lambda band: blake2b(band, digest_size=8).digest(),
            )

    def __len__(self) -> int:
        return len(self._ids)

    def add(self, id: str, request: Fingerprint) -> None:
        """Adds a request, unless the same one is there already."""
        place = self._places.setdefault(request.digest, len(self._ids))
        if place < len(self._ids):
            return
        self._ids.append(id)
        if self.near is not None:
            self._shingles.append(array("Q", request.shingles))
            self._lsh.insert(place, request.minhash, check_duplication=False)

    def matches(self, request: Fingerprint) -> list[Match]:
        """All that match, the same one first, then from the nearest on."""
        same = self._places.get(request.digest)
        found = [] if same is None else [Match(self._ids[same], 1.0, exact=True)]
        if self.near is None:
            return found
        near = []
        for place in self._lsh.query(request.minhash):
            if place != same:
                similarity = jaccard(request.shingles, self._shingles[place])
                if similarity >= self.near:
                    near.append((-similarity, place))
        near.sort()
        return found + [Match(self._ids[place], -value, exact=False) for value, place in near]


def check_near(near: float | None) -> None:
    """Raises ValueError unless `near` is None or a similarity that LSH can find, 0.5 to 1."""
    if near is not None and not 0.5 <= near <= 1:
        raise ValueError(f"near must lie in [0.5, 1], or be null for exact matches, got {near}")


def _bands(near: float) -> tuple[int, int]:
    """Bands and rows of LSH: as many rows as miss no more than `MISSED` of pairs at `near`."""
    return next(
        (PERMUTATIONS // rows, rows)
        for rows in range(PERMUTATIONS, 0, -1)
        if (1 - near**rows) ** (PERMUTATIONS // rows) <= MISSED
    )
