"""Find duplicate requests: identical once normalized, or nearly identical."""

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

from derta.data.records.defaults import NEAR
from derta.data.records.types import Message, Record, Rendered, Request, Triple

SHINGLE_WORDS = 2
PERMUTATIONS = 128
MISSED = 1e-3

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
def _rewriting() -> dict[int, str | None]:
    """Map punctuation to a space and invisible characters (Unicode category Cf) to nothing."""
    table: dict[int, str | None] = {}
    for code in range(sys.maxunicode + 1):
        category = unicodedata.category(chr(code))
        if category == "Cf":
            table[code] = None
        elif category[0] == "P":
            table[code] = " "
    return table


def normalized(text: str) -> str:
    """Return the text without differences of case, white space, punctuation or NFKC form.

    Symbols are kept (C++ is not C). A text of nothing but punctuation keeps it.
    """
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    words = folded.translate(_rewriting()).split() or folded.split()
    return " ".join(words)


def digest(texts: Sequence[str]) -> bytes:
    """Return 16 bytes that two lists share only if their texts are pairwise equal, `normalized`."""
    hashed = blake2b(digest_size=16)
    for text in texts:
        data = normalized(text).encode()
        hashed.update(len(data).to_bytes(8, "little") + data)
    return hashed.digest()


class Fingerprint:
    """The digest and shingle hashes of one request; no text can be read back from them.

    Args:
        turns: the user's messages, see `user_turns`.

    Attributes:
        digest: see `digest`.
        shingles: 64-bit hashes of all pairs of neighbouring words, or of a request's only word.
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
        """The MinHash by which LSH finds candidates; computed at first use."""
        minhash = _empty_minhash().copy()
        minhash.update_batch(self.shingles)
        return minhash


@functools.cache
def _empty_minhash() -> MinHash:
    return MinHash(PERMUTATIONS, hashfunc=lambda shingle: shingle & 0xFFFFFFFF)


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

    Near requests share at least `near` of their shingles (Jaccard). Candidates come from MinHash
    LSH and are compared by their shingles, so every reported match is near. At the threshold, less
    than one near pair in a thousand (`MISSED`) is missed; above it, fewer.

    Memory: about 0.2 KB for each distinct request, and about 10 KB more unless `near` is None;
    texts are not kept (checked by tests/derta/data/records/test_duplicates.py).

    Args:
        near: least similarity of near requests, in [0.5, 1]; None: find only equal requests.

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
        """Add a request unless the index already holds an equal one."""
        place = self._places.setdefault(request.digest, len(self._ids))
        if place < len(self._ids):
            return
        self._ids.append(id)
        if self.near is not None:
            self._shingles.append(array("Q", request.shingles))
            self._lsh.insert(place, request.minhash, check_duplication=False)

    def matches(self, request: Fingerprint) -> list[Match]:
        """Return all matches: the equal request first, then near ones by falling similarity."""
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
    """Raise ValueError unless `near` is None or a similarity that LSH can find, 0.5 to 1."""
    if near is not None and not 0.5 <= near <= 1:
        raise ValueError(f"near must lie in [0.5, 1], or be null for exact matches, got {near}")


def _bands(near: float) -> tuple[int, int]:
    """Return LSH's (bands, rows): the most rows that miss at most `MISSED` of pairs at `near`."""
    return next(
        (PERMUTATIONS // rows, rows)
        for rows in range(PERMUTATIONS, 0, -1)
        if (1 - near**rows) ** (PERMUTATIONS // rows) <= MISSED
    )
