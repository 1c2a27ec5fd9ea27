"""The vocabulary projection as one object."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Head:
    """A vocabulary projection: logits are softcap(logit_scale * (hidden @ weight.T + bias)).

    Attributes:
        weight: (V, d).
        bias: (V,), or None.
        softcap: bound of the logits, softcap * tanh(logits / softcap), or None (Gemma 2).
        logit_scale: factor of the logits, before the cap (Cohere, Granite).
    """

    weight: Tensor
    bias: Tensor | None = None
    softcap: float | None = None
    logit_scale: float = 1.0
