"""The decoding of an answer: greedy, with tokens forbidden at its start, or by sampling.

A draw depends on the prompt, the seed and the sample's number alone, and so on no other prompt of a
batch, on no order and on no number of ranks.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import astuple, dataclass


@dataclass(frozen=True, kw_only=True)
class Decoding:
    """The choice of an answer's tokens.

    Args:
        banned: token ids that the first `banned_for` tokens of the answer may not be.
        banned_for: number of tokens.
        temperature: divisor of the logits before a token is drawn; 0: the likeliest token.
        seed: seed of all draws.
        sample: number of the sample; each number has its own draws.

    Raises:
        ValueError: a number is negative or not finite.
    """

    banned: tuple[int, ...] = ()
    banned_for: int = 0
    temperature: float = 0.0
    seed: int = 0
    sample: int = 0

    def __post_init__(self) -> None:
        for name in ("banned_for", "temperature", "seed", "sample"):
            value = getattr(self, name)
            if not (value >= 0 and math.isfinite(value)):
                raise ValueError(f"{name} must be a number from 0 on, got {value}")

    @property
    def bans(self) -> bool:
        """True if some token is forbidden somewhere."""
        return bool(self.banned and self.banned_for)

    def key(self) -> list[object]:
        """Return what tells this decoding from others, [] for the greedy one."""
        return [] if self == GREEDY else list(astuple(self))

    def seed_of(self, prompt: Sequence[int]) -> int:
        """Return the seed of one prompt's draws, of 128 bits."""
        drawn = json.dumps([list(prompt), self.seed, self.sample]).encode()
        return int.from_bytes(hashlib.sha256(drawn).digest()[:16], "big")


GREEDY = Decoding()
