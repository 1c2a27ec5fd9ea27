"""A decoding as a step of transformers' greedy search."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from transformers import LogitsProcessor

from derta.evaluation.generation.decoding import Decoding


class TokenChoice(LogitsProcessor):
    """The tokens that may come next, for one batch of prompts.

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
        self.saw_nan = torch.tensor(False)
        self.draws = torch.zeros(len(prompts), 0, dtype=torch.float64)
        if decoding.temperature:
            drawn = [draws(decoding, prompt, max_new_tokens) for prompt in prompts]
            self.draws = torch.from_numpy(np.stack(drawn))

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # type: ignore[override]
        """Return the scores of the tokens that may come next.

        Args:
            input_ids: (B, T) prompts, padded to one length, with the tokens so far.
            scores: (B, V) float32 logits.

        Raises:
            FloatingPointError: as `check`, where a token is drawn.
        """
        self.saw_nan = self.saw_nan | scores.amax(1).isnan().any()  # waits for no device
        step = input_ids.shape[1] - self.start
        if step < self.decoding.banned_for:
            scores = scores.index_fill(1, self.banned.to(scores.device), -math.inf)
        if not self.decoding.temperature:
            return scores
        self.check()
        logits = scores.cpu().double()
        chosen = draw(logits / self.decoding.temperature, self.draws[:, step])
        alone = torch.full_like(scores, -math.inf)
        return alone.scatter_(1, chosen[:, None].to(scores.device), 0.0)

    def check(self) -> None:
        """Check that every token so far was chosen by numbers.

        Raises:
            FloatingPointError: a logit was NaN.
        """
        if self.saw_nan:
            raise FloatingPointError(
                "no token can be chosen: the model's logits are NaN, expected numbers: look at its "
                "weights, or choose dtype float32"
            )


def draws(decoding: Decoding, prompt: Sequence[int], count: int) -> np.ndarray:
    """Return the draws of one prompt's first `count` tokens: float64 in [0, 1)."""
    return np.random.default_rng(decoding.seed_of(prompt)).random(count)


def draw(logits: Tensor, shares: Tensor) -> Tensor:
    """Return the token at which the cumulative distribution of each row passes its draw.

    Args:
        logits: (B, V) float64; a token at -inf is never returned.
        shares: (B,) float64 draws in [0, 1).

    Returns:
        (B,) int64 token ids.
    """
    summed = logits.softmax(-1).cumsum(-1)
    total = summed[:, -1:]
    # Rounding may take a draw next to 1 to the total, which no token passes.
    passed = torch.minimum(shares[:, None] * total, torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(summed, passed, right=True)[:, 0]
