"""How an answer is decoded: greedily, with tokens forbidden at its start, or by sampling.

A draw depends on the prompt, the seed and the sample's number alone, and so on no other prompt of a
batch, on no order and on no number of ranks.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import astuple, dataclass

import numpy as np
import torch
from torch import Tensor
from transformers import LogitsProcessor


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

    def draws(self, prompt: Sequence[int], count: int) -> np.ndarray:
        """Return the draws of one prompt's first `count` tokens: float64 in [0, 1)."""
        return np.random.default_rng(self.seed_of(prompt)).random(count)


GREEDY = Decoding()


class TokenChoice(LogitsProcessor):
    """A decoding as a step of transformers' greedy search, for one batch of prompts.

    A token is drawn in float64 on the host, by inverting the cumulative distribution over the
    vocabulary's order. Only that token is left to choose.

    Args:
        decoding: the decoding.
        prompts: the prompts of the batch.
        max_new_tokens: most tokens of an answer.
    """

    def __init__(
        self, decoding: Decoding, prompts: Sequence[Sequence[int]], max_new_tokens: int
    ) -> None:
        self.decoding = decoding
        self.start = max(map(len, prompts))
        self.banned = torch.tensor(decoding.banned, dtype=torch.long)
        self.draws = torch.zeros(len(prompts), 0, dtype=torch.float64)
        if decoding.temperature:
            drawn = [decoding.draws(prompt, max_new_tokens) for prompt in prompts]
            self.draws = torch.from_numpy(np.stack(drawn))

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # type: ignore[override]
        """Return the scores of the tokens that may come next.

        Args:
            input_ids: (B, T) prompts, padded to one length, with the tokens so far.
            scores: (B, V) float32 logits.
        """
        step = input_ids.shape[1] - self.start
        if step < self.decoding.banned_for:
            scores = scores.index_fill(1, self.banned.to(scores.device), -math.inf)
        if not self.decoding.temperature:
            return scores
        chosen = draw(scores.cpu().double() / self.decoding.temperature, self.draws[:, step])
        alone = torch.full_like(scores, -math.inf)
        return alone.scatter_(1, chosen[:, None].to(scores.device), 0.0)


def draw(logits: Tensor, draws: Tensor) -> Tensor:
    """Return the token at which the cumulative distribution of each row passes its draw.

    Args:
        logits: (B, V) float64; a token at -inf is never returned.
        draws: (B,) float64 in [0, 1).

    Returns:
        (B,) int64 token ids.
    """
    summed = logits.softmax(-1).cumsum(-1)
    total = summed[:, -1:]
    # Rounding may take a draw next to 1 to the total, which no token passes.
    passed = torch.minimum(draws[:, None] * total, torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(summed, passed, right=True)[:, 0]
